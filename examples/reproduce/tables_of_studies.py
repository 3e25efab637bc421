"""The tables that are no scores: linearity, what each method costs, and the paper's claims held against the run's.

Scope: one function per section, from a run to Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping

from claims import MISSING, NO_DIRECTION, PAPER_SETS, Claim, main_claims, other_claims
from evidence_run import Run
from formatting import number, section, table
from methods import set_name
from paper import DISTANCES, NON_LINEARITY

MIB = 2**20


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
        "Not run at this scale: Table 8 (a model of 7 billion parameters). Consensus TA (Table 9) is in the main "
        "comparison where it has been run. Tables 14 to 16 and Figures 5 and 6 are no comparisons; Table 18 gives no "
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
