"""The tables of scores: which merge recovers how much of the gap between base and experts, beside the paper's.

Scope: one function per section, from a run to Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claims import MISSING, NESTED, PAPER_SETS, difference, percent, row_of, shown
from evidence_run import Run
from formatting import number, section, table
from gaps import Evidence, Result, Spread, loss, recovered, settings_label
from grids import GRIDS, baselines, planned, settings_tried
from methods import ALL, GRANULARITIES, JOINT_STEPS, OURS, SETS, TRIPLE, set_name
from paper import MAIN, MODEL_WEIGHTS, NUMBER_OF_EXPERTS, NUMBER_OF_ROWS

STUDIED_APART = {"rows", "balance", "inputs"}
"""Settings of ours with a table of their own: they are no rows of the main comparison."""
SET_NAMES = [set_name(tasks) for tasks in SETS]


@dataclass(frozen=True)
class Row:
    """A row of the main comparison: a method and, for each set, the results that stand for it (one, or one a seed)."""

    title: str
    of: Callable[[Sequence[str]], list[Result]]


def main_rows(evidence: Evidence, split: str) -> list[Row]:
    """Grids tuned on the rows of `split`, each with what is recommended without tuning, then everything without a grid;
    the paper's method last."""

    def chosen(method: str) -> Callable[[Sequence[str]], list[Result]]:
        return lambda tasks: [best] if (best := evidence.tuned(tasks, method, split)) else []

    def seeds(method: str, settings: Mapping[str, Any]) -> Callable[[Sequence[str]], list[Result]]:
        return lambda tasks: evidence.group(tasks, method, settings)

    rows = []
    for method in in_order(evidence.grids()):
        rows.append(Row(method, chosen(method)))
        if (own := GRIDS[method].untuned) is not None:
            rows.append(Row(f"{method}, untuned ({settings_label(own)})", seeds(method, own)))
    untuned = [(method, each) for method, each in evidence.untuned() if not STUDIED_APART & each.keys()]
    others = [pair for pair in untuned if pair[0] != OURS]
    return rows + [Row(title(*pair), seeds(*pair)) for pair in others + our_settings(evidence, STUDIED_APART)]


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods with a grid, in the order of the grids."""
    return sorted(methods, key=[*GRIDS].index)


def title(method: str, settings: Mapping[str, Any]) -> str:
    """How a table calls a method without a grid."""
    shown_settings = {"granularity": "", **settings}
    parts = [shown_settings.pop("granularity"), settings_label(shown_settings)]
    if settings.get("objective") == "joint" and not {"granularity", "steps"} & settings.keys():
        parts.append(f"by default linear, {JOINT_STEPS} steps, fresh_rows")
    return ", ".join(part for part in (method, *parts) if part)


def our_settings(evidence: Evidence, without: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """(our method, settings), coarse levels first, leaving out settings with certain keys."""
    coarse = ("model", *(name for name in GRANULARITIES if name != "model"))

    def place(settings: Mapping[str, Any]) -> tuple[int, int, str]:
        level = settings.get("granularity")
        return len(settings), coarse.index(level) if level in coarse else len(coarse), settings_label(settings)

    found = [each for method, each in evidence.untuned() if method == OURS and not without & each.keys()]
    return [(OURS, each) for each in sorted(found, key=place)]


def mean_and_worst(evidence: Evidence, results: Sequence[Result]) -> str:
    """`mean / worst`, each with its spread over seeds."""
    pair = [Spread.of(map(value, results)) for value in (evidence.mean, evidence.worst)]
    return MISSING if None in pair else " / ".join(map(shown, pair))


def experts(run: Run) -> str:
    """a. What there is to merge."""
    results = run.evidence.results
    rows = []
    for task in ALL:
        pair = [results.get("base"), results.get(task)]
        cells = [number(loss(each, "test", task)) for each in pair]
        cells += [percent((each or {}).get("test", {}).get(task, {}).get("accuracy")) for each in pair]
        cells += [percent((each or {}).get("exact", {}).get(task)) for each in pair]
        rows.append([task, *cells, number((pair[1] or {}).get("general"))])
    header = ["task", "loss: base", "expert", "token accuracy, %: base", "expert", "exact match, %: base", "expert",
              "loss of the expert on general text"]  # fmt: skip
    about = (
        "The base and one expert per task on the expert's held-out rows: loss in nats per completion token, tokens "
        f"predicted right, greedy answers that are right. The base's loss on general text is "
        f"{number((results.get('base') or {}).get('general'))}."
    )
    gapless = [task for task in ALL if no_gap(results.get("base"), results.get(task), task)]
    if gapless:
        about += (
            f" No better than the base at its own task: {', '.join(gapless)}; there is no gap to recover, and no share "
            "in any table that has it."
        )
    return section("The experts", about, table(header, rows), command=run.command)


def no_gap(base: Result | None, expert: Result | None, task: str) -> bool:
    """Whether both have been measured, and the expert has learnt nothing."""
    pair = [loss(each, "test", task) for each in (base, expert)]
    return None not in pair and recovered(*pair, pair[1]) is None


def beside_the_paper(run: Run, names: Sequence[str]) -> str:
    """Recovered gap and the paper's two accuracies, for the sets that both have."""
    rows = []
    for name in names:
        cells = []
        for tasks in PAPER_SETS:
            theirs = [MAIN[model].get(name, {}).get(set_name(tasks)) for model in ("7B", "13B")]
            ours = row_of(run.evidence, tasks, name)
            cells.append(" · ".join([shown(ours), *(number(each and each[0], ".2f") for each in theirs)]))
        rows.append([name, *cells])
    return table(["recovered, % · paper's accuracy 7B · 13B", *map(set_name, PAPER_SETS)], rows)


def main_comparison(run: Run) -> str:
    """b. Tables 1, 2 and 9."""
    evidence = run.evidence
    parts = [
        "Share of the gap between base and expert that a merge recovers, in %: mean over the tasks / worst task. "
        f"{OURS} has nothing to tune: mean ± standard deviation over the draws of {run.rows or 'the'} calibration rows "
        "per task; of the joint objective with fresh_rows, its default, as many for each of its six steps. The "
        "settings of the others are chosen by the mean on those rows (of the first draw):"
    ]
    for number_of_table, split in enumerate(("calibration", "test")):
        if number_of_table:
            parts.append(
                "The same with settings chosen on the test rows themselves, as the paper does: an upper bound."
            )
        rows = [[row.title, *(mean_and_worst(evidence, row.of(tasks)) for tasks in SETS)]
                for row in main_rows(evidence, split)]  # fmt: skip
        parts.append(table(["method", *SET_NAMES], rows))
    parts += [
        "The settings chosen: on the calibration rows; on the test rows, where those are others. Edge: nothing has "
        "been tried on one side of this setting, and the method may be better than its row; the next run goes on from "
        "there. Bound: the setting ends there.",
        chosen_settings(evidence),
    ]
    parts.append("Beside the paper's Tables 1, 2 and 9 (mean accuracy of the tasks; settings chosen on the test rows):")
    parts.append(beside_the_paper(run, [*list(MAIN["7B"])[:5], "layer", "attn_mlp"]))
    return section("Main comparison (the paper's Tables 1, 2, 9)", *parts, command=run.command)


def chosen_settings(evidence: Evidence) -> str:
    """Which candidate of a grid; with how much of the grid there is, where it is not whole."""
    rows = []
    for method in in_order(evidence.grids()):
        cells = []
        for tasks in SETS:
            expected = len(baselines(tasks, {method} & {*planned(tasks)}))
            count = len(evidence.candidates(tasks, method))
            labels = [choice(evidence, tasks, method, split) for split in ("calibration", "test")]
            text = labels[0] if labels[0] == labels[1] else "; ".join(labels)
            cells.append(text if count >= expected else f"{text} (of {count}, not {expected})")
        rows.append([method, *cells])
    return table(["method", *SET_NAMES], rows, words=True)


def choice(evidence: Evidence, tasks: Sequence[str], method: str, split: str) -> str:
    """The settings chosen on the rows of `split`; with those at an edge of what was tried, and at a bound."""
    best, grid = evidence.tuned(tasks, method, split), GRIDS[method]
    if best is None:
        return MISSING
    edges = dict(grid.open_sides(best["settings"], settings_tried(evidence, tasks, method, split)))
    at = {"edge": list(edges), "bound": grid.bound(best["settings"])}
    notes = [f"{name}: {' and '.join(keys)}" for name, keys in at.items() if keys]
    return (settings_label(best["settings"]) or "none") + (f" ({'; '.join(notes)})" if notes else "")


def by_task(run: Run) -> str:
    """The details of the main comparison: Tables 4 and 5."""
    parts = [
        "Share of the gap recovered by task, in %; settings chosen on the calibration rows. The paper's Tables 4 and 5 "
        "have accuracies in this place."
    ]
    rows = main_rows(run.evidence, "calibration")
    for tasks in SETS:
        lines = []
        for row in rows:
            found = [run.evidence.shares(result) for result in row.of(tasks)]
            lines.append([row.title, *(shown(Spread.of(each[task] for each in found)) for task in tasks)])
        parts.append(table([set_name(tasks), *tasks], lines))
    return section("Main comparison by task (Tables 4, 5)", *parts, command=run.command)


def levels(run: Run) -> str:
    """c. Table 3, and what varies beside the level."""
    evidence = run.evidence
    settings = our_settings(evidence, {"rows"})
    rows = [
        [title("", each), *(mean_and_worst(evidence, evidence.group(tasks, OURS, each)) for tasks in SETS)]
        for _, each in settings
    ]
    parts = [
        f"Share of the gap recovered by {OURS}, in %: mean / worst task, mean ± standard deviation over seeds. In the "
        "paper attn_mlp is best, layer close to it, and model and heads break down in most sets.",
        table(["level", *SET_NAMES], rows),
        "Beside the paper's Table 3:",
        beside_the_paper(run, ["model", "layer", "attn_mlp", "head_mlp"]),
    ]
    if run.weights:
        cells = {name: [f"{value:.3f}" for value in values] for name, values in run.weights.items()}
        lines = [
            [name, ", ".join(cells.get(name, [MISSING])),
             *(", ".join(f"{value:.3f}" for value in MODEL_WEIGHTS[model][place]) for model in ("7B", "13B"))]
            for place, name in enumerate(map(set_name, PAPER_SETS))
        ]  # fmt: skip
        parts += ["Weights at the model level (one draw), beside the paper's Table 13:"]
        parts.append(table(["set", "ours", "paper 7B", "13B"], lines))
    return section("Levels (Table 3)", *parts, command=run.command)


def number_of_rows(run: Run) -> str:
    """d. Table 11."""
    evidence = run.evidence
    known = {each["rows"] for _, each in our_settings(evidence, set()) if "rows" in each}
    counts = sorted(known | {*run.settings.get("sizes", {}).get("row_counts", NUMBER_OF_ROWS["layer"])})
    lines = []
    for level, theirs in NUMBER_OF_ROWS.items():
        for tasks in (TRIPLE, ALL):
            for text, value in (("mean", evidence.mean), ("worst", evidence.worst)):
                cells = []
                for count in counts:
                    own = {"granularity": level, "rows": count}
                    own = own if count != (run.rows or 30) else {"granularity": level}
                    cells.append(shown(evidence.spread(tasks, OURS, own, value)))
                lines.append([f"{level}, {set_name(tasks)}: {text}", *cells])
        means = [number(sum(theirs[count]) / 3 if count in theirs else None, ".2f") for count in counts]
        lines.append([f"paper, {level}, three experts: mean accuracy", *means])
    about = (
        "Share of the gap recovered with fewer and more calibration rows per task, in %, mean ± standard deviation "
        "over seeds. In the paper it hardly matters from 3 rows on."
    )
    return section(
        "Number of rows (Table 11)", about, table(["rows per task", *map(str, counts)], lines), command=run.command
    )


def number_of_experts(run: Run) -> str:
    """e. Table 10."""
    evidence = run.evidence
    lines = []
    for count, tasks in NESTED.items():
        ours = evidence.spread(tasks, OURS, {"granularity": "attn_mlp"}, evidence.mean)
        cells = [shown(ours)]
        for split in ("calibration", "test"):
            best = evidence.tuned(tasks, "task arithmetic", split)
            mean = None if best is None else evidence.mean(best)
            theirs = None if mean is None else Spread(mean, 0.0, 1)
            cells += [shown(theirs), shown(difference(ours, theirs), sign=True)]
        paper = NUMBER_OF_EXPERTS[count]
        cells += [f"{paper[0]:.2f}", f"{paper[1]:.2f}", f"{paper[1] - paper[0]:+.2f}"]
        lines.append([f"{count}: {set_name(tasks)}", *cells])
    header = ["experts", "ours", "task arithmetic, tuned on calibration rows", "difference", "tuned on test rows",
              "difference", "paper: task arithmetic", "ours", "difference"]  # fmt: skip
    about = (
        f"Mean share of the gap recovered, in %: {OURS} (attn_mlp) and task arithmetic, every set with one expert "
        "more. In the paper (accuracy) task arithmetic leads with 2 and 3 experts, and falls behind with 4 and 5."
    )
    return section("Number of experts (Table 10)", about, table(header, lines), command=run.command)


def accuracy(run: Run) -> str:
    """i. Other measures than the loss."""
    evidence = run.evidence

    def of(result: Result) -> float | None:
        values = [result.get("test", {}).get(task, {}).get("accuracy") for task in result["tasks"]]
        return None if None in values else sum(values) / len(values)

    def of_reference(tasks: Sequence[str], name: Callable[[str], str]) -> float | None:
        values = [evidence.results.get(name(task), {}).get("test", {}).get(task, {}).get("accuracy") for task in tasks]
        return None if None in values else sum(values) / len(values)

    lines = [
        ["base", *(percent(of_reference(tasks, lambda _: "base")) for tasks in SETS)],
        ["the experts, each at its task", *(percent(of_reference(tasks, lambda task: task)) for tasks in SETS)],
    ]
    for row in main_rows(evidence, "calibration"):
        lines.append([row.title, *(shown(Spread.of(map(of, row.of(tasks)))) for tasks in SETS)])
    parts = [
        "Completion tokens predicted right, in %, mean over the tasks; settings chosen on the calibration rows.",
        table(["method", *SET_NAMES], lines),
    ]
    scored = [(name, result) for name, result in sorted(evidence.results.items()) if _has_more(result)]
    if scored:
        base = evidence.results.get("base", {}).get("general")
        rows = []
        for name, result in sorted(scored, key=lambda pair: ("method" in pair[1], pair[0] != "base")):
            general = result.get("general")
            change = None if general is None or base is None else general - base
            cells = [percent(result.get("exact", {}).get(task)) for task in ALL]
            rows.append([name, *cells, number(general), number(change, "+.3f")])
        parts.append("Greedy answers that are right, in %, and the loss on text that no task is about (forgetting):")
        parts.append(table(["model", *ALL, "loss on general text", "less the base's"], rows))
    return section("Token accuracy, exact match, forgetting", *parts, command=run.command)


def _has_more(result: Result) -> bool:
    return bool(result.get("exact")) or result.get("general") is not None
