"""The tables of an evidence run, beside the paper's: `python tables.py WORK/results.json -o WORK/RESULTS.md`.

Scope: from the JSON of a run (or the folder of its results, while it is going on) to Markdown. Nothing is measured
here, and what has not been measured is a dash. The same files give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from claims import (
    MISSING,
    NESTED,
    NO_DIRECTION,
    PAPER_SETS,
    Claim,
    difference,
    main_claims,
    other_claims,
    percent,
    row_of,
    shown,
)
from experts import QUICK
from gaps import Evidence, Result, Spread, loss, recovered, settings_label
from methods import ALL, GRANULARITIES, OURS, SETS, TRIPLE, baselines, set_name
from paper import DISTANCES, MAIN, MODEL_WEIGHTS, NON_LINEARITY, NUMBER_OF_EXPERTS, NUMBER_OF_ROWS

GRID_ORDER = ("weight average", "task arithmetic", "DARE", "TIES", "Breadcrumbs", "DELLA", "SCE", "model stock")
STUDIED_APART = {"rows", "balance", "inputs"}
"""Settings of ours with a table of their own: they are no rows of the main comparison."""
TABLES = "python examples/reproduce/tables.py WORK/results.json -o WORK/RESULTS.md"
LINEARITY_NAMES = ("slta_linearity.json", "linearity/slta_linearity.json")
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """All that the tables are made of.

    Attributes:
        evidence: the scores.
        settings: of the run; empty where they are not known yet.
        linearity: what `mergekit-slta linearity` wrote; empty without.
        weights: set -> weights at the model level, in the order of its experts; of the first seed.
        costs: what `costs.py` wrote; empty without.
    """

    evidence: Evidence
    settings: Mapping[str, Any]
    linearity: Mapping[str, Any]
    weights: Mapping[str, Sequence[float]]
    costs: Mapping[str, Any]

    @property
    def rows(self) -> int | None:
        """Calibration rows per task where a candidate's settings do not say."""
        return self.settings.get("sizes", {}).get("calibration_rows")

    @property
    def command(self) -> str:
        """The command of the run."""
        sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in self.settings.get("sizes", {}).items()}
        precision = self.settings.get("precision", "bfloat16")
        quick = " --quick" if sizes == dataclasses.asdict(QUICK) else ""
        return f"python examples/reproduce/run.py WORK{quick}" + (
            "" if precision == "bfloat16" else f" --precision {precision}"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load(results: Path, linearity: Path | None = None, costs: Path | None = None) -> Run:
    """Read a run: its results.json, or its folder of results; and what lies beside them."""
    if results.is_dir():
        found = {str(path.relative_to(results).with_suffix("")): read_json(path) for path in results.rglob("*.json")}
        content: dict[str, Any] = {"settings": {}, "results": found}
    else:
        content = read_json(results)
    folder = results.parent
    evidence = Evidence(content["results"])
    beside = [folder / name for name in LINEARITY_NAMES if (folder / name).exists()]
    linearity = linearity or (beside[0] if beside else None)
    costs = costs or (folder / "costs.json" if (folder / "costs.json").exists() else None)
    return Run(
        evidence,
        content.get("settings", {}),
        read_json(linearity) if linearity else {},
        dict(model_weights(evidence, folder)),
        read_json(costs) if costs else {},
    )


def model_weights(evidence: Evidence, folder: Path) -> Iterable[tuple[str, list[float]]]:
    """Yield (set, weights at the model level), from the alphas files that lie beside the results."""
    for tasks in SETS:
        for result in evidence.group(tasks, OURS, {"granularity": "model"})[:1]:
            path = folder / result["recipe"]["parameters"]["alphas"]
            if path.exists():
                alphas = read_json(path)
                of_task = dict(zip(alphas["models"], alphas["submodules"][0]["alpha"], strict=True))
                yield set_name(tasks), [of_task[task] for task in tasks]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A Markdown table; the first column to the left, the others to the right unless they are words."""
    marks = ["---", *["---" if words else "---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), marks, *rows])


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return MISSING if value is None else format(value, form)


def section(title: str, *parts: str, command: str) -> str:
    """A heading, its parts, and where the numbers come from."""
    return "\n\n".join([f"## {title}", *parts, f"Measured by `{command}`, printed by `{TABLES}`."])


@dataclass(frozen=True)
class Row:
    """A row of the main comparison: a method and, for each set, the results that stand for it (one, or one a seed)."""

    title: str
    of: Callable[[Sequence[str]], list[Result]]


def main_rows(evidence: Evidence, split: str) -> list[Row]:
    """Grids tuned on the rows of `split`, then everything without a grid; the paper's method last."""

    def chosen(method: str) -> Callable[[Sequence[str]], list[Result]]:
        return lambda tasks: [best] if (best := evidence.tuned(tasks, method, split)) else []

    def seeds(method: str, settings: Mapping[str, Any]) -> Callable[[Sequence[str]], list[Result]]:
        return lambda tasks: evidence.group(tasks, method, settings)

    rows = [Row(method, chosen(method)) for method in in_order(evidence.grids(), GRID_ORDER)]
    untuned = [(method, each) for method, each in evidence.untuned() if not STUDIED_APART & each.keys()]
    others = [pair for pair in untuned if pair[0] != OURS]
    return rows + [Row(title(*pair), seeds(*pair)) for pair in others + our_settings(evidence, STUDIED_APART)]


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Known names in their order, then the others by name."""
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def title(method: str, settings: Mapping[str, Any]) -> str:
    """How a table calls a method without a grid."""
    shown_settings = {"granularity": "", **settings}
    parts = [shown_settings.pop("granularity"), settings_label(shown_settings)]
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


SET_NAMES = [set_name(tasks) for tasks in SETS]


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
        "per task. The settings of the others are chosen by the mean on those rows (of the first draw):"
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
        "The settings chosen: on the calibration rows; on the test rows, where those are others.",
        chosen_settings(evidence),
    ]
    parts.append("Beside the paper's Tables 1, 2 and 9 (mean accuracy of the tasks; settings chosen on the test rows):")
    parts.append(beside_the_paper(run, [*list(MAIN["7B"])[:5], "layer", "attn_mlp"]))
    return section("Main comparison (the paper's Tables 1, 2, 9)", *parts, command=run.command)


def chosen_settings(evidence: Evidence) -> str:
    """Which candidate of a grid; with how much of the grid there is, where it is not whole."""
    rows = []
    for method in in_order(evidence.grids(), GRID_ORDER):
        cells = []
        for tasks in SETS:
            expected = Counter(each.method for each in baselines(tasks, everything=tasks in (ALL, TRIPLE)))[method]
            count = len(evidence.candidates(tasks, method))
            pair = [evidence.tuned(tasks, method, split) for split in ("calibration", "test")]
            labels = [MISSING if each is None else settings_label(each["settings"]) or "none" for each in pair]
            text = labels[0] if labels[0] == labels[1] else "; ".join(labels)
            cells.append(text if count >= expected else f"{text} (of {count}, not {expected})")
        rows.append([method, *cells])
    return table(["method", *SET_NAMES], rows, words=True)


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


def _spread(values: Mapping[str, float] | None) -> str:
    return MISSING if not values else f"{values['mean']:.3g} ± {values['std']:.2g}"


def _complement(values: Mapping[str, float] | None) -> Mapping[str, float] | None:
    return None if not values else {"mean": 1 - values["mean"], "std": values["std"]}


def non_linearity(run: Run) -> str | None:
    """f. Table 17, Figures 3 and 4, Table 18."""
    scores = run.linearity
    if not scores:
        return None
    models = list(NON_LINEARITY["model"])
    lines = []
    for level, found in scores["levels"].items():
        cosine, projection = found.get("cosine") or {}, found.get("projection_distance") or {}
        theirs = [NON_LINEARITY.get(level, {}).get(model) for model in models]
        lines.append(
            [level, str(found["count"]), _spread(found.get("non_linearity")),
             *(_spread({"mean": each[0], "std": each[1]} if each else None) for each in theirs),
             *(_spread(projection.get(of)) for of in ("pairs", "triples")),
             *(_spread(_complement(cosine.get(of))) for of in ("pairs", "triples")),
             _spread(_complement(found.get("cosine_base")))]
        )  # fmt: skip
    header = ["level", "submodules", "Non-linearity Score", *(f"paper: {model}" for model in models),
              "projection distance: pairs", "triples", "1 - cosine: pairs", "triples", "of experts"]  # fmt: skip
    about = (
        f"Of {', '.join(scores['models'])}. Non-linearity by level, 0 is exactly linear: mean ± standard deviation "
        "over submodules and experts, beside the paper's Table 17. Of merging: projection distance (its Fig. 3) and "
        "1 - cosine (Fig. 4), both 0 where it is linear; the last column is what 1 - cosine is between experts. In the "
        "paper submodules are far more linear than the model."
    )
    parts = [about, table(header, lines)]
    distances = [
        matrix[-1]
        for each in scores["submodules"]
        if each["kind"] == "model" and each.get("distances")
        for matrix in each["distances"]
    ]
    if distances:
        ours = [sum(column) / len(column) for column in zip(*distances, strict=True)]
        rows = [["ours, mean of the experts", *(f"{value:.3f}" for value in ours)]]
        rows += [[f"paper: {model}", *(f"{value:.3f}" for value in values)] for model, values in DISTANCES.items()]
        parts.append("Distance of base + α · (expert - base) to the expert at the model's end, as in Table 18:")
        parts.append(table(["α", *(f"{step / 10:.1f}" for step in range(11))], rows))
    drawn = max(len(task["rows"]) for task in scores["settings"]["tasks"])
    command = f"mergekit-slta linearity recipe.yml --rows {drawn} -o slta_linearity.json"
    return section("Non-linearity by level (Table 17)", *parts, command=command)


def cost(run: Run) -> str | None:
    """g. Time and memory."""
    if not run.costs:
        return None
    runs = run.costs["runs"]
    unit = next((each for each in runs if each["method"] == "task arithmetic"), None)
    lines = []
    for each in runs:
        pair = [each["seconds"], each["peak_anonymous_bytes"]]
        of_unit = [unit["seconds"], unit["peak_anonymous_bytes"]] if unit else [None, None]
        ratios = [number(one / other if other else None, ".2f") for one, other in zip(pair, of_unit, strict=True)]
        lines.append([each["title"], *ratios, f"{pair[0]:.1f}", f"{pair[1] / MIB:.0f}"])
    header = ["method", "time over task arithmetic's", "peak memory over it", "s", "peak anonymous memory: MiB"]
    about = (
        f"A merge of {len(run.costs['experts'])} experts by the stock command, one setting of each method, in a "
        f"process of its own, libraries included ({run.costs['machine']}). A tuned method costs its grid: a merge "
        "and a score for every setting. The paper gives no numbers."
    )
    repeat = min(len(each.get("all_seconds", [0])) for each in runs)
    command = f"python examples/reproduce/costs.py WORK --repeat {repeat}"
    return section("Cost in time and memory", about, table(header, lines), command=command)


def claim_tables(run: Run) -> str:
    """h. The paper's experiments at this scale."""
    pairs = []
    for name, claims in main_claims(run.evidence):
        clear = [each.verdict for each in claims if each.verdict not in (MISSING, NO_DIRECTION)]
        agreed = sum(verdict.startswith("agrees") for verdict in clear)
        cells = [f"{each.paper}; {each.ours}: {each.verdict}" for each in claims]
        pairs.append([name, *cells, f"{agreed} of {len(clear)}" if clear else MISSING])
    others: list[Claim] = [*other_claims(run.evidence, run.linearity.get("levels", {}), run.weights, run.rows)]
    rule = (
        "The rule: a difference d of two means of recovered gap is held against s, the root of the sum of squares of "
        "their standard deviations over seeds (0 for what has no seed). The paper's direction holds (agrees) where d "
        "is beyond s on its side, and fails (does not) where it is beyond s on the other side; between them it is "
        "undecided. Two means are the same within s or 2 points. Of linearity, means are compared as they stand. The "
        "seeds draw calibration rows: that the test rows are a sample is in no s, so small agreements are weak ones."
    )
    missing = (
        "Not run at this scale: Table 8 (a model of 7 billion parameters) and the Consensus TA row of Table 9 "
        "(mergekit has no such method). Tables 14 to 16 and Figures 5 and 6 are no comparisons; Table 18 gives no "
        "direction, and is above where there is a linearity file."
    )
    return section(
        "The paper's experiments at this scale",
        rule,
        "Tables 1 to 5 and 9. In each cell the paper's direction (the first name above or below the second; unclear "
        "where its two models contradict each other or lie within their spread); ours in points of recovered gap, "
        "first less second, ± s; and the verdict. Settings of other methods are chosen on the test rows, as in "
        "the paper:",
        table(["first and second", *map(set_name, PAPER_SETS), "agrees"], pairs, words=True),
        "The other experiments:",
        table(
            ["experiment", "paper", "ours", "verdict"],
            [[each.source, each.paper, each.ours, each.verdict] for each in others],
            words=True,
        ),
        missing,
        command=run.command,
    )


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


SECTIONS: tuple[Callable[[Run], str | None], ...] = (
    experts, main_comparison, by_task, levels, number_of_rows, number_of_experts, non_linearity, cost, claim_tables,
    accuracy,
)  # fmt: skip


def document(run: Run) -> str:
    """The whole text."""
    sizes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in run.settings.get("sizes", {}).items())
    precision = f" Products in {run.settings['precision']}." if "precision" in run.settings else ""
    head = (
        f"{len(run.evidence.candidates())} merges of {len(ALL)} experts in {len(SETS)} sets.{precision} "
        f"{sizes[:1].upper()}{sizes[1:]}{'.' if sizes else ''}"
    )
    definition = (
        "The share of the gap recovered at a task is (base's loss - merge's loss) / (base's loss - expert's loss) on "
        "its held-out rows: 0 is the base, 100% the expert. ± is the standard deviation (n - 1) over seeds, which draw "
        "the calibration rows; the paper's divides by n. – has not been measured."
    )
    parts = [part for write in SECTIONS if (part := write(run)) is not None]
    return "\n\n".join(["# Results", head.strip(), definition, *parts]) + "\n"


def write_tables(results: Path, target: Path, linearity: Path | None = None, costs: Path | None = None) -> None:
    """Write the tables of a run.

    Args:
        results: its results.json, or its folder of results.
        target: the Markdown file.
        linearity: what `mergekit-slta linearity` wrote; else slta_linearity.json beside the results, if there is one.
        costs: what `costs.py` wrote; else costs.json beside the results, if there is one.
    """
    target.write_text(document(load(results, linearity, costs)), encoding="utf-8")


_FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("results", type=_FILE)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("RESULTS.md"),
              show_default=True, help="Markdown file to write.")  # fmt: skip
@click.option("--linearity", type=_FILE, help="Linearity file  [default: slta_linearity.json beside RESULTS]")
@click.option("--costs", type=_FILE, help="Measured costs  [default: costs.json beside RESULTS]")
def main(results: Path, output: Path, linearity: Path | None, costs: Path | None) -> None:
    """Write the tables of RESULTS: a run's results.json, or its folder of results while it is going on."""
    write_tables(results, output, linearity, costs)
    click.echo(f"Written: {output}")


if __name__ == "__main__":
    main()
