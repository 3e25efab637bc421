"""What the paper's experiments say, and whether this run says so too.

The rule, for a comparison of two means of recovered gap: their difference d is held against s, the root of the sum of
the squares of their standard deviations over seeds (0 for what has no seed). The paper's direction holds where d lies
beyond s on its side ("agrees"), fails where it lies beyond s on the other ("does not"), and else is "undecided". Two
means are "the same" where d is within s, or within `TOLERANCE`. What has one seed only is marked: its s is unknown and
counts as 0. Where the paper's two models contradict each other or are both within their spread there is no direction
to test, and none is claimed. Two standard deviations differ only where the ratio of their squares is beyond the 95%
quantile of F. All s are over draws of calibration rows; that the test rows are a sample is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import Any

from gaps import Evidence, Spread
from methods import ALL, FOUR, GRANULARITIES, OURS, PAIRS, TRIPLE, set_name
from paper import MAIN, MODEL_WEIGHTS, MORE_TASKS, NON_LINEARITY, NUMBER_OF_EXPERTS, NUMBER_OF_ROWS, SCALES, Mean

TOLERANCE = 0.02
"""Share of the gap: two means as close as this are the same, however steady the seeds are."""
MISSING, NO_DIRECTION = "–", "no direction"
PAPER_SETS = (*PAIRS, TRIPLE)
COMPARISONS = (
    ("attn_mlp", "task arithmetic"),
    ("layer", "task arithmetic"),
    ("attn_mlp", "weight average"),
    ("attn_mlp", "DARE"),
    ("attn_mlp", "TIES"),
    ("attn_mlp", "Breadcrumbs"),
    ("attn_mlp", "layer"),
    ("layer", "model"),
    ("attn_mlp", "model"),
    ("layer", "head_mlp"),
    ("attn_mlp", "head_mlp"),
)
"""Pairs of rows of the paper's Tables 1, 2, 3 and 9."""


@dataclass(frozen=True)
class Claim:
    """An experiment of the paper's beside this run's: four cells of a table."""

    source: str
    paper: str
    ours: str
    verdict: str


def percent(value: float | None, sign: bool = False) -> str:
    """A share as a percentage without its sign."""
    return MISSING if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def shown(spread: Spread | None, sign: bool = False) -> str:
    """Mean ± standard deviation in percent; the mean alone where there is no spread."""
    if spread is None:
        return MISSING
    return percent(spread.mean, sign) + ("" if not spread.std else f" ± {100 * spread.std:.1f}")


def difference(one: Spread | None, other: Spread | None) -> Spread | None:
    """Of two means, with the s of the rule; std None where one of them has one seed only."""
    if one is None or other is None:
        return None
    unknown = one.std is None or other.std is None
    noise = hypot(one.std or 0.0, other.std or 0.0)
    return Spread(one.mean - other.mean, None if unknown else noise, min(one.count, other.count))


def _marked(verdict: str, found: Spread) -> str:
    return verdict if found.std is not None else f"{verdict} (one seed)"


def judge(direction: int, found: Spread | None) -> str:
    """The rule; direction 1: above, -1: below, 0: the paper has none."""
    if found is None or direction == 0:
        return MISSING if found is None else NO_DIRECTION
    ahead, noise = direction * found.mean, found.std or 0.0
    return _marked("agrees" if ahead > noise else "does not" if ahead < -noise else "undecided", found)


def judge_same(found: Spread | None) -> str:
    """The rule for two means that the paper has the same."""
    if found is None:
        return MISSING
    return _marked("agrees" if abs(found.mean) <= max(found.std or 0.0, TOLERANCE) else "does not", found)


def paper_direction(pairs: Sequence[tuple[Mean, Mean]]) -> int:
    """What the paper's models say together: 1 above, -1 below, 0 if they contradict each other or are all unclear."""
    signs = {(d > s) - (d < -s) for (a, sa), (b, sb) in pairs for d, s in [(a - b, hypot(sa, sb))]} - {0}
    return signs.pop() if len(signs) == 1 else 0


def row_of(evidence: Evidence, tasks: Sequence[str], name: str) -> Spread | None:
    """A row of the paper's tables: a granularity of ours, or another method, tuned on the test rows as there."""
    if name in GRANULARITIES:
        return evidence.spread(tasks, OURS, {"granularity": name}, evidence.mean)
    best = evidence.tuned(tasks, name, "test")
    return None if best is None else Spread(evidence.mean(best) or 0.0, 0.0, 1)


def main_claims(evidence: Evidence) -> Iterator[tuple[str, list[Claim]]]:
    """Tables 1, 2, 3 and 9 (and their details, 4 and 5): yields the pair of rows, and a claim for each set."""
    words = {1: "above", -1: "below", 0: "unclear"}
    for one, other in COMPARISONS:
        claims = []
        for tasks in PAPER_SETS:
            name = set_name(tasks)
            numbers = [(rows[one][name], rows[other][name]) for rows in MAIN.values() if one in rows and other in rows]
            direction = paper_direction(numbers)
            found = difference(row_of(evidence, tasks, one), row_of(evidence, tasks, other))
            claims.append(Claim(name, words[direction], shown(found, sign=True), judge(direction, found)))
        yield f"{one} and {other}", claims


def _more_tasks(evidence: Evidence) -> Iterator[Claim]:
    pairs = [pair for rows in MORE_TASKS.values() for pair in rows]
    ahead = sum(ours > theirs for theirs, ours in pairs)
    for tasks in (FOUR, ALL):
        found = difference(row_of(evidence, tasks, "attn_mlp"), row_of(evidence, tasks, "task arithmetic"))
        yield Claim(
            f"Tables 6, 7: other tasks ({set_name(tasks)})",
            f"attn_mlp above task arithmetic in {ahead} of {len(pairs)} sets",
            shown(found, sign=True),
            judge(1, found),
        )


NESTED: dict[int, tuple[str, ...]] = {2: PAIRS[2], 3: TRIPLE, 4: FOUR, 5: ALL}
"""As in Table 10: every set holds the one before."""


def _number_of_experts(evidence: Evidence) -> Iterator[Claim]:
    two, five = (
        difference(row_of(evidence, NESTED[count], "attn_mlp"), row_of(evidence, NESTED[count], "task arithmetic"))
        for count in (2, 5)
    )
    theirs = [NUMBER_OF_EXPERTS[count][1] - NUMBER_OF_EXPERTS[count][0] for count in (2, 5)]
    found = difference(five, two)
    yield Claim(
        "Table 10: more experts",
        f"lead over task arithmetic grows from 2 to 5 experts: {theirs[0]:+.1f} to {theirs[1]:+.1f}",
        f"{shown(two, sign=True)} to {shown(five, sign=True)}",
        judge(1, found),
    )


def _number_of_rows(evidence: Evidence, default_rows: int | None) -> Iterator[Claim]:
    for level, rows in NUMBER_OF_ROWS.items():
        few, usual = (sum(rows[count]) / 3 for count in (3, 30))
        for tasks in (TRIPLE, ALL):
            whole = {"granularity": level}
            three = whole if default_rows == 3 else {**whole, "rows": 3}
            thirty = whole if default_rows == 30 else {**whole, "rows": 30}
            one = evidence.spread(tasks, OURS, three, evidence.mean)
            other = evidence.spread(tasks, OURS, thirty, evidence.mean)
            yield Claim(
                f"Table 11: 3 rows and 30 ({level}, {set_name(tasks)})",
                f"the same: {few:.1f} and {usual:.1f}",
                f"{shown(one)} and {shown(other)}",
                judge_same(difference(one, other)),
            )


def _scales(evidence: Evidence) -> Iterator[Claim]:
    for method, ranges in SCALES.items():
        best = [evidence.tuned(tasks, method, "test") for tasks in PAPER_SETS]
        for key, (least, most) in ranges.items():
            chosen = [result["settings"][key] for result in best if result]
            inside = len(chosen) == len(best) and all(least <= value <= most for value in chosen)
            span = f"{least}" if least == most else f"{least} to {most}"
            yield Claim(
                f"Table 12: best {key} of {method}",
                f"{span} in all sets",
                ", ".join(map(str, chosen)) or MISSING,
                MISSING if len(chosen) < len(best) else "agrees" if inside else "does not",
            )


F_QUANTILES = {2: 161.4, 3: 19.0, 4: 9.28, 5: 6.39}
"""Number of draws -> the 95% quantile of the ratio of two estimated variances that are equal in truth."""


def _level_spread(evidence: Evidence) -> Iterator[Claim]:
    heads, blocks = (row_of(evidence, TRIPLE, level) for level in ("head_mlp", "attn_mlp"))
    theirs = [f"{rows[level][set_name(TRIPLE)][1]}" for rows in MAIN.values() for level in ("head_mlp", "attn_mlp")]
    known = [each.std for each in (heads, blocks) if each is not None and each.std is not None]
    verdict = MISSING
    if len(known) == 2:
        quantile = F_QUANTILES.get(min(each.count for each in (heads, blocks) if each is not None), inf)
        ahead, behind = known[0] ** 2, known[1] ** 2
        verdict = (
            "agrees" if ahead > quantile * behind else "does not" if behind > quantile * ahead else "undecided"
        )  # fmt: skip
    yield Claim(
        "Table 3: heads are unstable (standard deviation over seeds, three experts)",
        f"head_mlp above attn_mlp: {theirs[0]} and {theirs[1]} (7B), {theirs[2]} and {theirs[3]} (13B)",
        " and ".join(percent(value) for value in known) if len(known) == 2 else MISSING,
        verdict,
    )


def _variants(evidence: Evidence) -> Iterator[Claim]:
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any], int]] = []
    for level in ("layer", "attn_mlp"):
        plain = {"granularity": level}
        text = "meant to help; no numbers"
        cases.append((f"A.3.2: balance on and off ({level})", text, plain, {**plain, "balance": False}, 1))
    plain = {"granularity": "attn_mlp"}
    merged = {**plain, "inputs": "merged"}
    cases.append(
        ("A.5.3: inputs from what is merged and from the base", "proposed as better; not tried", merged, plain, 1)
    )
    cases.append(("A.5.5: single matrices and attn_mlp", "proposed; no direction", {"granularity": "linear"}, plain, 0))
    for source, text, one, other, direction in cases:
        for tasks in (TRIPLE, ALL):
            found = difference(*(evidence.spread(tasks, OURS, each, evidence.mean) for each in (one, other)))
            yield Claim(f"{source}, {set_name(tasks)}", text, shown(found, sign=True), judge(direction, found))


def _model_weights(weights: Mapping[str, Sequence[float]]) -> Iterator[Claim]:
    def wild(sets: Sequence[Sequence[float]]) -> str:
        return f"{sum(any(not 0 <= value <= 1 for value in values) for values in sets)} of {len(sets)} sets"

    ours = [weights[name] for name in map(set_name, PAPER_SETS) if name in weights]
    yield Claim(
        "Table 13: weights at the model level that are no shares (below 0 or above 1)",
        wild([values for sets in MODEL_WEIGHTS.values() for values in sets]),
        wild(ours) if ours else MISSING,
        MISSING
        if not ours
        else "agrees"
        if any(not 0 <= value <= 1 for each in ours for value in each)
        else "does not",
    )


Levels = Mapping[str, Mapping[str, Any]]
_PARTS = ("layer", "attention", "mlp")


def _mean(levels: Levels, level: str, *keys: str) -> float | None:
    value: Any = levels.get(level)
    for key in (*keys, "mean"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _all_below(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    if any(one is None or other is None for one, other in pairs):
        return MISSING
    return "agrees" if all(one < other for one, other in pairs) else "does not"  # type: ignore[operator]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2g}"


def _linearity(levels: Levels) -> Iterator[Claim]:
    def against_model(source: str, text: str, read: Callable[[str], float | None]) -> Claim:
        whole, parts = read("model"), [read(level) for level in _PARTS]
        ours = f"{', '.join(map(_number, parts))}; model {_number(whole)}"
        return Claim(source, text, ours, _all_below([(part, whole) for part in parts]))

    def distance(level: str, of: str) -> float | None:
        return _mean(levels, level, "projection_distance", of)

    def angle(level: str) -> float | None:
        value = _mean(levels, level, "cosine", "pairs")
        return None if value is None else 1 - value

    theirs = {level: f"{means['Llama-2-7B'][0]:.2g}" for level, means in NON_LINEARITY.items()}
    yield against_model(
        "Table 17: Non-linearity Score of layers, attention, MLP",
        f"below the model's: {', '.join(theirs[level] for level in _PARTS)}; model {theirs['model']} (7B)",
        lambda level: _mean(levels, level, "non_linearity"),
    )
    yield against_model(
        "Fig. 3: projection distance, pairs", "below the model's", lambda level: distance(level, "pairs")
    )
    pairs = [(distance(level, "triples"), distance(level, "pairs")) for level in _PARTS]
    yield Claim(
        "Fig. 3: projection distance of layers, attention, MLP, three experts and two",
        "three below two",
        ", ".join(f"{_number(three)} and {_number(two)}" for three, two in pairs),
        _all_below(pairs),
    )
    yield against_model("Fig. 4: 1 - cosine of merging, pairs", "below the model's", angle)
    bases = [_mean(levels, level, "cosine_base") for level in _PARTS]
    pairs = [(angle(level), None if base is None else 1 - base) for level, base in zip(_PARTS, bases, strict=True)]
    yield Claim(
        "Fig. 4: 1 - cosine of merging and of the experts with each other, by level",
        "far below",
        ", ".join(f"{_number(one)} and {_number(other)}" for one, other in pairs),
        _all_below(pairs),
    )


def other_claims(
    evidence: Evidence, levels: Levels, weights: Mapping[str, Sequence[float]], default_rows: int | None
) -> Iterator[Claim]:
    """The other experiments of section A, and those of section 2 that section A goes on with.

    Args:
        evidence: of the run.
        levels: of a linearity file; empty without one.
        weights: set -> weights of its experts at the model level; empty if unknown.
        default_rows: calibration rows per task where the settings do not say.
    """
    yield from _level_spread(evidence)
    yield from _more_tasks(evidence)
    yield from _number_of_experts(evidence)
    yield from _number_of_rows(evidence, default_rows)
    yield from _scales(evidence)
    yield from _model_weights(weights)
    yield from _variants(evidence)
    yield from _linearity(levels)
