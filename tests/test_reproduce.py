"""The tables of the evidence run (examples/reproduce): arithmetic by hand, partial results, the same bytes twice."""

from __future__ import annotations

import itertools
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import make_config, make_tokenizer
from example_scripts import EXAMPLES, importable
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.example


@pytest.fixture(scope="module")
def example():
    """The example's modules."""
    with importable(EXAMPLES / "reproduce", EXAMPLES / "smollm2"):
        import claims
        import costs
        import data_free
        import five_tasks
        import gaps
        import grids
        import merging
        import methods
        import repeat
        import run
        import tables

        yield SimpleNamespace(
            claims=claims, costs=costs, data_free=data_free, five_tasks=five_tasks, gaps=gaps, grids=grids,
            merging=merging, methods=methods, repeat=repeat, run=run, tables=tables,
        )  # fmt: skip


def scores(tasks, value: float) -> dict:
    """The same loss at every task."""
    return {task: {"loss": value, "accuracy": value / 10, "tokens": 9} for task in tasks}


def shares(tasks, *values: float) -> dict:
    """Losses that recover such shares of the gap of `references`: 3 at the base, 1 at the expert."""
    return {
        task: {"loss": 3 - 2 * share, "accuracy": share / 2, "tokens": 9}
        for task, share in zip(tasks, values, strict=True)
    }


def references(tasks) -> dict:
    """A base with loss 3 at every task, experts with loss 1 at theirs."""
    base = {split: scores(tasks, 3.0) for split in ("test", "calibration")}
    found = {"base": {**base, "exact": dict.fromkeys(tasks, 0.1), "general": 4.0}}
    for task in tasks:
        own = {split: {**scores(tasks, 5.0), task: {"loss": 1.0, "accuracy": 0.5, "tokens": 9}} for split in base}
        found[task] = {**own, "exact": dict.fromkeys(tasks, 0.2), "general": 4.5}
    return found


def candidate(
    tasks, method: str, settings: dict, seed: int | None, test: dict, calibration: dict | None = None
) -> dict:
    """A result as `merging.run_candidate` writes it."""
    recipe = {"parameters": {"alphas": f"alphas/{seed}.json"}}
    own = {"tasks": list(tasks), "method": method, "settings": settings, "seed": seed, "recipe": recipe, "test": test}
    return own if calibration is None else {**own, "calibration": calibration}


@pytest.fixture(scope="module")
def run(example) -> dict:
    """Every kind of result of a whole run, with shares that are known."""
    methods = example.methods
    results = references(methods.ALL)
    for tasks in methods.SETS:
        name, count = methods.set_name(tasks), len(tasks)
        for weight, share, seen in ((0.4, 0.50, 0.70), (0.6, 0.55, 0.60), (0.9, 0.20, 0.30)):
            pair = [shares(tasks, *[value] * count) for value in (share, seen)]
            results[f"{name}/task arithmetic/weight={weight}"] = candidate(
                tasks, "task arithmetic", {"weight": weight}, None, *pair
            )
        for number, seed in enumerate((42, 43, 44)):
            levels = {"model": 0.1, "layer": 0.58, "attn_mlp": 0.6, "head_mlp": 0.2 * number, "linear": 0.6}
            kinds = [({"granularity": level}, share) for level, share in levels.items()]
            kinds += [({"granularity": "attn_mlp", "rows": 3}, 0.59), ({"granularity": "attn_mlp", "rows": 99}, 0.7)]
            kinds += [({"granularity": "layer", "balance": False}, 0.3)]
            for settings, share in kinds:
                share += 0.01 * number
                own = shares(tasks, share + 0.1, *[share] * (count - 2), share - 0.1)
                label = ",".join(f"{key}={value}" for key, value in settings.items())
                results[f"{name}/{methods.OURS}/{label},seed={seed}"] = candidate(
                    tasks, methods.OURS, settings, seed, own
                )
            own = shares(tasks, *[0.4] * count)
            results[f"{name}/RegMean/seed={seed}"] = candidate(tasks, "RegMean", {}, seed, own)
    sizes = {"calibration_rows": 30, "row_counts": [1, 3, 30], "seeds": [42, 43, 44]}
    return {"settings": {"sizes": sizes, "precision": "bfloat16"}, "results": results}


def written(example, folder: Path, content: dict) -> str:
    """The tables of such results."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    example.tables.write_tables(folder / "results.json", folder / "RESULTS.md")
    return (folder / "RESULTS.md").read_text(encoding="utf-8")


def row_of(text: str, heading: str, first: str) -> list[str]:
    """The first row of a section's tables that begins with such a cell."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return next(cells for cells in lines if cells[0] == first)


@pytest.mark.parametrize(
    ("base", "expert", "merged", "share"),
    [(3.0, 1.0, 2.0, 0.5), (3.0, 1.0, 0.5, 1.25), (3.0, 1.0, 4.0, -0.5), (1.0, 1.0, 0.5, None), (3.0, None, 2.0, None)],
)
def test_share_of_the_gap(example, base, expert, merged, share):
    """0 is the base, 1 the expert; where the expert is no better there is none."""
    assert example.gaps.recovered(base, expert, merged) == share


def test_mean_and_worst_need_every_task(example):
    """A merge with one unmeasured task has no mean: the other tasks alone would flatter it."""
    tasks = ("math", "code")
    whole = candidate(tasks, "any", {}, None, shares(tasks, 0.8, 0.2))
    part = candidate(tasks, "any", {}, None, shares(("math",), 0.8))
    evidence = example.gaps.Evidence(references(tasks))
    assert evidence.mean(whole) == pytest.approx(0.5)
    assert evidence.worst(whole) == pytest.approx(0.2)
    assert evidence.mean(part) is None
    assert evidence.worst(part) is None


def test_spread_over_seeds_divides_by_one_less(example):
    """Of 1, 2 and 3 it is 1; a single value has none."""
    spread = example.gaps.Spread.of([1.0, None, 2.0, 3.0])
    assert (spread.mean, spread.std, spread.count) == (2.0, 1.0, 3)
    assert example.gaps.Spread.of([1.0]).std is None
    assert example.gaps.Spread.of([None]) is None


def test_settings_are_chosen_on_the_rows_that_are_named(example, run):
    """0.4 is best on the calibration rows, 0.6 on the test rows, which is never worse there."""
    evidence = example.gaps.Evidence(run["results"])
    chosen = {split: evidence.tuned(("math", "code"), "task arithmetic", split) for split in ("calibration", "test")}
    assert chosen["calibration"]["settings"] == {"weight": 0.4}
    assert chosen["test"]["settings"] == {"weight": 0.6}


@pytest.mark.parametrize(
    ("method", "score", "best", "edges"),
    [("DARE", lambda drop, weight: -abs(drop - 0.3) - abs(weight - 1.3 + drop), {"drop": 0.3, "weight": 1.0}, []),
     ("DARE", lambda drop, weight: -drop - abs(weight - 0.5), {"drop": 0.0, "weight": 0.5}, []),
     ("TIES", lambda density, scale: density - abs(scale - 0.2), {"density": 1.0, "lambda": 0.2}, []),
     ("SCE", lambda share: -abs(share - 0.3), {"select_topk": 0.3}, []),
     ("SWUDI-A", lambda scale: scale, {"scale": 3.0}, ["scale"]),
     ("Consensus TA", lambda mask, scale: -abs(mask - 0.6) - abs(scale - 0.5), {"mask": 0.6, "scale": 0.5}, [])],
)  # fmt: skip
def test_a_grid_goes_on_until_its_best_is_inside(example, method, score, best, edges):
    """Or at a bound of the method's own; what stays at an edge, where the ladder ends, is known as such."""
    grid = example.grids.GRIDS[method]
    known = [*grid.first()]
    while True:
        found = max(known, key=lambda point: score(*point.values()))
        following = [*grid.beyond(found, known)]
        if not following:
            break
        known += following
    assert found == best
    assert [key for key, _ in grid.open_sides(found, known)] == edges
    assert grid.bound(found) == [key for key, value in best.items() if (key, value) in {("drop", 0), ("density", 1)}]


def test_every_method_with_a_scale_has_ten(example):
    """And without one there are none: SCE, the averages. What the ladders have besides comes later."""
    counts = {}
    for method, grid in example.grids.GRIDS.items():
        scales = [key for key in grid.axes if key in ("weight", "lambda", "scale")]
        counts[method] = len(grid.axes[scales[0]].first) if scales else 0
        assert all({*axis.first, *axis.bounds} <= {*axis.ladder} for axis in grid.axes.values())
    assert [name for name, count in counts.items() if count != 10] == ["weight average", "SCE", "model stock"]
    assert {name for name, grid in example.grids.GRIDS.items() if grid.untuned} == example.data_free.METHODS.keys()


def test_settings_at_an_edge_are_marked(example, run, tmp_path):
    """0.4 is the lowest that was tried, 0.6 is between others; a merge that is not tuned has a row of its own."""
    results = dict(run["results"])
    tasks = example.methods.ALL
    for scale, share in ((0.9, 0.6), (1.0, 0.5), (0.8, 0.5)):
        pair = [shares(tasks, *[share] * 5)] * 2
        results[f"all/SWUDI-A/scale={scale}"] = candidate(tasks, "SWUDI-A", {"scale": scale}, None, *pair)
    density = {"density": 1.0, "lambda": 0.2}
    results["all/TIES/-"] = candidate(tasks, "TIES", density, None, *[shares(tasks, *[0.5] * 5)] * 2)
    text = written(example, tmp_path, {**run, "results": results})
    title = "Main comparison (the paper's Tables 1, 2, 9)"
    assert row_of(text, title, "SWUDI-A")[1] == "60.0 / 60.0"
    assert row_of(text, title, "SWUDI-A, untuned (scale 1.0)")[1] == "50.0 / 50.0"
    chosen = "## " + title + text.split("The settings chosen")[1]
    cells = {name: row_of(chosen, title, name)[1] for name in ("task arithmetic", "SWUDI-A", "TIES")}
    assert cells["task arithmetic"] == "weight 0.4 (edge: weight); weight 0.6 (of 3, not 10)"
    assert cells["SWUDI-A"] == "scale 0.9 (of 3, not 10)"
    assert cells["TIES"] == "density 1.0, lambda 0.2 (edge: density and lambda; bound: density) (of 1, not 20)"


@pytest.fixture
def scored(example, tmp_path, monkeypatch) -> list[list[str]]:
    """Candidates get the same share of every gap, that of `shares_of`: the nearer to 1.2 the first setting is, the
    more on the calibration rows; on the test rows 1.5 is best. Returns the names of each call that have new scores."""
    calls: list[list[str]] = []

    def run_candidates(workdir, candidates, processes, threads, settings):
        calls.append([each.name for each in candidates if not example.merging.is_done(workdir, each, settings)])
        for each in candidates:
            first = [*each.settings.values(), 1.0][0]
            pair = [shares(each.tasks, *[1 - abs(first - best)] * len(each.tasks)) for best in (1.5, 1.2)]
            path = example.merging.result_path(workdir, each.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            result = candidate(each.tasks, each.method, each.settings, each.seed, *pair)
            if "test" not in settings["splits"] and not path.exists():
                del result["test"]
            path.write_text(json.dumps(result))

    monkeypatch.setattr(example.run, "run_candidates", run_candidates)
    for name, result in references(example.methods.ALL).items():
        path = example.merging.result_path(tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return calls


def evidence_run(example, workdir: Path, *only: str):
    """A run of some methods."""
    return example.run.Run(workdir, example.run.Sizes(), 1, 1, "float32", "cpu", only)


def test_a_peer_is_scored_untuned_then_by_its_grid_and_beyond(example, scored, tmp_path):
    """The untuned one alone, since it computes what the others scale; what is kept for that is removed. On the test
    rows the search begins at the best on the calibration rows."""
    (tmp_path / example.merging.PEERS).mkdir()
    all_tasks = example.methods.ALL
    example.run.grids(evidence_run(example, tmp_path, "SWUDI-A"), all_tasks, [*example.grids.GRIDS])
    assert [[float(name.split("=")[1]) for name in call] for call in scored] == [
        [1.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [1.1], [1.2], [1.3],
        [1.2, 1.1, 1.3], [1.4], [1.5], [1.6],
    ]  # fmt: skip
    evidence = example.gaps.Evidence(example.merging.read_results(tmp_path))
    chosen = {split: evidence.tuned(all_tasks, "SWUDI-A", split) for split in ("calibration", "test")}
    assert {split: best["settings"]["scale"] for split, best in chosen.items()} == {"calibration": 1.2, "test": 1.5}
    open_sides = example.grids.GRIDS["SWUDI-A"].open_sides
    assert not [*open_sides({"scale": 1.5}, example.grids.settings_tried(evidence, all_tasks, "SWUDI-A", "test"))]
    assert not (tmp_path / example.merging.PEERS).exists()


def test_peers_with_rows_start_from_tuned_task_arithmetic(example, scored, tmp_path):
    """Which is scored first, whatever is asked for; Expert Merging on few rows, on as many as the joint objective has,
    and by as many passes."""
    found = [*example.run.calibrated_peers(evidence_run(example, tmp_path, "Expert Merging"), example.methods.ALL, 42)]
    assert sum(map(len, scored)) == 13 + 6
    recipes = [each.recipe for each in found]
    assert {recipe["start"] for recipe in recipes} == {1.2}
    assert [each.method for each in found] == ["FeatCal", *["Expert Merging"] * 3]
    assert [recipe["num_samples"] for recipe in recipes] == [30, 5, 180, 180]
    assert [recipe.get("steps") for recipe in recipes] == [None, 5, 180, 487]
    assert [*example.run.calibrated_peers(evidence_run(example, tmp_path, "TIES"), example.methods.ALL, 42)] == []


def test_main_comparison_has_a_row_per_method(example, run, tmp_path):
    """Grids once a way of choosing, what has seeds with its spread, whatever its name; variants are not in it."""
    text = written(example, tmp_path, run)
    title = "Main comparison (the paper's Tables 1, 2, 9)"
    assert row_of(text, title, "task arithmetic")[1] == "50.0 / 50.0"
    assert row_of(text.replace("50.0 / 50.0", "-"), title, "RegMean")[1] == "40.0 / 40.0"
    assert row_of(text, title, "submodule_linear, attn_mlp")[1] == "61.0 ± 1.0 / 51.0 ± 1.0"
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    assert "55.0 / 55.0" in section
    assert "balance" not in section
    assert "(of 3, not 10)" in section
    assert row_of(text, "Levels (Table 3)", "layer, balance False")[1] == "31.0 ± 1.0 / 21.0 ± 1.0"


def test_rows_and_experts(example, run, tmp_path):
    """The usual number of rows stands among the others; the difference carries the spread of both."""
    text = written(example, tmp_path, run)
    cells = row_of(text, "Number of rows (Table 11)", "rows per task")
    means = dict(zip(cells, row_of(text, "Number of rows (Table 11)", "attn_mlp, all: mean"), strict=True))
    assert (means["1"], means["3"], means["30"], means["99"]) == ("–", "60.0 ± 1.0", "61.0 ± 1.0", "71.0 ± 1.0")
    cells = row_of(text, "Number of experts (Table 10)", "5: all")
    assert cells[1:6] == ["61.0 ± 1.0", "50.0", "+11.0 ± 1.0", "55.0", "+6.0 ± 1.0"]


@pytest.mark.parametrize(
    ("direction", "mean", "std", "verdict"),
    [(1, 0.03, 0.02, "agrees"), (1, 0.01, 0.02, "undecided"), (1, -0.03, 0.02, "does not"), (-1, -0.03, 0.02, "agrees"),
     (1, 0.03, None, "agrees (one seed)"), (0, 0.03, 0.02, "no direction")],
)  # fmt: skip
def test_the_rule(example, direction, mean, std, verdict):
    """Beyond the spread on the paper's side, on the other, or between."""
    assert example.claims.judge(direction, example.gaps.Spread(mean, std, 3)) == verdict


def test_the_same_is_within_the_spread_or_two_points(example):
    """Neither a steady difference of one point nor a shaky one of five tells two means apart."""
    spread = example.gaps.Spread
    assert example.claims.judge_same(spread(0.01, 0.0, 3)) == "agrees"
    assert example.claims.judge_same(spread(-0.05, 0.06, 3)) == "agrees"
    assert example.claims.judge_same(spread(-0.05, 0.01, 3)) == "does not"


def test_the_papers_direction_comes_from_its_numbers(example):
    """Models that contradict each other, and those within their spread, give none."""
    direction = example.claims.paper_direction
    assert direction([((42.88, 0.27), (39.59, 0.0)), ((51.05, 0.16), (48.24, 0.0))]) == 1
    assert direction([((27.33, 0.10), (27.45, 0.0)), ((35.11, 0.29), (34.60, 0.0))]) == 0
    assert direction([((49.80, 0.23), (50.64, 0.64)), ((52.51, 0.26), (52.42, 0.15))]) == -1
    assert direction([((1.0, 1.0), (1.5, 0.0))]) == 0


def test_verdicts_follow_the_results(example, run, tmp_path):
    """Ours is ahead of task arithmetic by more than the spread; turned round, the same rows say the opposite."""
    title = "The paper's experiments at this scale"
    text = written(example, tmp_path, run)
    assert row_of(text, title, "attn_mlp and task arithmetic")[4] == "above; +6.0 ± 1.0: agrees"
    assert row_of(text, title, "attn_mlp and task arithmetic")[1] == "unclear; +6.0 ± 1.0: no direction"
    assert row_of(text, title, "attn_mlp and layer")[4] == "above; +2.0 ± 1.4: agrees"
    worse = json.loads(json.dumps(run))
    for name, result in worse["results"].items():
        if "granularity=attn_mlp" in name:
            result["test"] = shares(result["tasks"], *[0.3] * len(result["tasks"]))
    text = written(example, tmp_path, worse)
    assert row_of(text, title, "attn_mlp and task arithmetic")[4] == "above; -25.0: does not"


def test_any_part_of_a_run_gives_tables(example, run, tmp_path):
    """From nothing on, whatever is missing is a dash, and no section fails."""
    names = sorted(run["results"])
    parts = [[], ["base"], ["all/submodule_linear/granularity=attn_mlp,seed=42"], names[:20], names[::7], names[40:]]
    for number, part in enumerate(parts):
        content = {"settings": {}, "results": {name: run["results"][name] for name in part}}
        text = written(example, tmp_path / str(number), content)
        assert "nan" not in text
        assert text.count("\n## ") == 8


def test_the_same_results_give_the_same_bytes(example, run, tmp_path):
    """In whatever order they are, and from the folder of results as from the file."""
    results = run["results"]
    turned = {**run, "results": dict(reversed(results.items()))}
    assert written(example, tmp_path / "one", run) == written(example, tmp_path / "other", turned)
    folder = tmp_path / "going on" / "results"
    for name, result in itertools.islice(results.items(), 12):
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    part = {"settings": {}, "results": dict(itertools.islice(results.items(), 12))}
    example.tables.write_tables(folder, tmp_path / "going.md")
    assert (tmp_path / "going.md").read_text() == written(example, tmp_path / "part", part)


def test_what_lies_beside_the_results_is_shown(example, run, tmp_path):
    """Linearity, costs, and weights at the model level; the verdicts use them."""
    linearity = (EXAMPLES / "smollm2" / "output" / "linearity" / "slta_linearity.json").read_text()
    (tmp_path / "slta_linearity.json").write_text(linearity)
    job = {"seconds": 8.0, "peak_anonymous_bytes": 2**29}
    runs = [{"title": "task arithmetic", "method": "task arithmetic", **job, "seconds": 4.0}]
    runs.append({"title": "ours", "method": "submodule_linear", **job})
    (tmp_path / "costs.json").write_text(json.dumps({"machine": "one core", "experts": ["a", "b"], "runs": runs}))
    (tmp_path / "alphas").mkdir()
    alphas = {"models": ["code", "math"], "submodules": [{"alpha": [1.5, -0.25]}]}
    (tmp_path / "alphas" / "42.json").write_text(json.dumps(alphas))
    pair = [name for name in run["results"] if not name.startswith(("all/", "math+code+", "math+tr", "code+tr"))]
    text = written(example, tmp_path, {**run, "results": {name: run["results"][name] for name in pair}})
    assert row_of(text, "Non-linearity by level (Table 17)", "mlp")[4] == "0.203 ± 0.57"
    assert row_of(text, "Cost in time and memory", "ours")[1:] == ["2.00", "1.00", "8.0", "512"]
    assert row_of(text, "Levels (Table 3)", "math+code")[1] == "-0.250, 1.500"
    title = "The paper's experiments at this scale"
    table_17 = "Table 17: Non-linearity Score of layers, attention, MLP"
    assert row_of(text, title, table_17)[-1] == "agrees"


def test_a_repeated_run_is_held_against_the_first(example, run, tmp_path):
    """Beside it by method, and how much of the methods' order came out again; what was not repeated is left out."""
    methods = example.methods
    again = references(methods.ALL)
    for method, settings, seed, share in (
        ("task arithmetic", {"weight": 0.6}, None, 0.57),
        ("RegMean", {}, 42, 0.6),
        (methods.OURS, {"granularity": "attn_mlp"}, 42, 0.5),
    ):
        again[method] = candidate(methods.ALL, method, settings, seed, shares(methods.ALL, *[share] * 5))
    (tmp_path / "repeated.json").write_text(json.dumps({"settings": {}, "results": again}))
    text = written(example, tmp_path, run)
    title = "The main comparison with other experts"
    assert row_of(text, title, "submodule_linear, attn_mlp")[1:] == ["61.0 ± 1.0 / 51.0 ± 1.0", "50.0 / 50.0"]
    assert row_of(text, title, "task arithmetic")[1:] == ["55.0 / 55.0", "57.0 / 57.0"]
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    assert "layer" not in section
    assert (
        "By the mean: 0 of 3 pairs of methods are in the same order both times; not task arithmetic and RegMean "
        "(+15.0, then -3.0); task arithmetic and submodule_linear, attn_mlp (-6.0, then +7.0); RegMean and "
        "submodule_linear, attn_mlp (-21.0, then +10.0)."
    ) in section
    assert "By the worst: 1 of 3 pairs" in section
    same = {**again, "RegMean": candidate(methods.ALL, "RegMean", {}, 42, shares(methods.ALL, *[0.1] * 5))}
    (tmp_path / "repeated.json").write_text(json.dumps({"settings": {}, "results": same}))
    assert "2 of 3 pairs of methods are in the same order both times; not task" in written(example, tmp_path, run)


def test_costs_measure_every_method_once_and_ours_twice(example):
    """One setting of each; the second job of ours uses the weights of the first."""
    jobs = list(example.costs.jobs(example.costs.QUICK))
    methods = [job.method for job in jobs]
    assert len(set(methods)) == len(methods) - 1
    assert all("merge_method" in job.recipe for job in jobs)
    assert methods[-2:] == [example.methods.OURS] * 2
    assert "dataset" in jobs[-2].recipe["models"][0]["parameters"]
    assert jobs[-1].recipe["parameters"]["alphas"] == "costs/slta_alphas.json"


def test_quick_run(example, tmp_path, monkeypatch):
    """The whole path on a tiny base: real text, five trained experts, calibrations, merges by mergekit, tables. What a
    stopped run has left is taken up: a second run computes nothing."""
    base = tmp_path / "tiny"
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(base)
    config = make_config("llama", tied=True, hidden_size=16, intermediate_size=24, max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    library = tmp_path / "library"  # some modules in place of the whole standard library
    library.mkdir()
    for name in ("argparse", "calendar", "inspect", "mailbox", "shutil", "tarfile"):
        (library / f"{name}.py").symlink_to(Path(sysconfig.get_path("stdlib")) / f"{name}.py")
    monkeypatch.setattr(example.five_tasks, "sysconfig", SimpleNamespace(get_path=lambda _: library))
    monkeypatch.chdir(tmp_path)
    command = [str(tmp_path / "work"), "--quick", "--base", str(base), "--processes", "1", "--threads", "1"]
    unknown = CliRunner().invoke(example.run.main, [*command, "--only", "RegMeans"])
    assert (unknown.exit_code, "no method 'RegMeans'" in unknown.output) == (1, True)
    first = CliRunner().invoke(example.run.main, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    written = json.loads((tmp_path / "work" / "results.json").read_text())
    names = list(written["results"])
    assert {"base", *example.methods.ALL} <= set(names)
    assert any("objective=joint" in name for name in names)
    assert any(name.startswith("all/weight average/") for name in names)
    losses = [part["loss"] for result in written["results"].values() for part in result["test"].values()]
    assert all(0 < loss < 20 for loss in losses)
    assert any(name.startswith("all/SWUDI-A/") for name in names)
    for tuned in (["FeatCal"], {}), (["Expert Merging"], {"steps": 1}):
        (peer,) = example.methods.closed_forms(example.methods.ALL, 42, 3, tuned[0], {"start": 0.4, **tuned[1]})
        example.merging.merge(tmp_path / "peer", peer.recipe, "cpu")
        assert (tmp_path / "peer" / "model.safetensors").exists()
    table = (tmp_path / "work" / "RESULTS.md").read_bytes()
    assert b"submodule_linear" in table
    second = CliRunner().invoke(example.run.main, command, catch_exceptions=False)
    assert second.output.splitlines()[:-1] == []
    assert (tmp_path / "work" / "RESULTS.md").read_bytes() == table

    arguments = [str(tmp_path / "work" / "results.json"), str(tmp_path / "again"), "--base", str(base)]
    again = CliRunner().invoke(
        example.repeat.main, [*arguments, "--processes", "1", "--threads", "1"], catch_exceptions=False
    )
    assert again.exit_code == 0, again.output
    repeated = json.loads((tmp_path / "again" / "results.json").read_text())
    assert repeated["settings"]["sizes"] == {**written["settings"]["sizes"], "seed": 1}
    ours = [each["settings"] for each in repeated["results"].values() if each.get("method") == example.methods.OURS]
    assert sorted(map(str, ours)) == sorted(map(str, example.repeat.REPEATED))
    grids = {each["method"] for each in written["results"].values() if "method" in each and each["seed"] is None}
    assert grids <= {each.get("method") for each in repeated["results"].values()}
    assert repeated["results"]["math"]["test"] != written["results"]["math"]["test"]
    assert "pairs of methods are in the same order" in (tmp_path / "again" / "RESULTS.md").read_text()
    for folder, said in (("work", "is the first run's own folder"), ("again", "was made with seed 1, not 2")):
        refused = CliRunner().invoke(example.repeat.main, [arguments[0], str(tmp_path / folder), "--seed", "2"])
        assert refused.exit_code == 1
        assert said in refused.output
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == repeated
