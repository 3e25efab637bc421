"""`mergekit-slta solve`: saved statistics solved again equal a fresh calibration, without the models."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_refused, mergekit_yaml, refused, slta, tensors
from safetensors.torch import save_file

from mergekit_slta.calibration import resolve
from mergekit_slta.calibration.resolve import first_rows, parse_importance, solve_again
from mergekit_slta.errors import AlphasError, RecipeError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics

QUIET = ["--quiet"]


def calibrated(recipe: dict, folder: Path) -> Path:
    """Calibrate into `folder`; returns the statistics' path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("calibrate", folder / "recipe.yml", "-o", folder / "slta_alphas.json", *QUIET)
    assert result.exit_code == 0, result.output
    return folder / "slta_stats.safetensors"


def reversed_names(recipe: dict) -> dict:
    """The recipe's order is not the canonical one."""
    return {**recipe, "models": recipe["models"][::-1]}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """Statistics of three experts, listed against their canonical order, calibrated with a ridge and importances."""
    recipe = reversed_names(tiny.recipe(ridge=0.02))
    recipe["models"][0]["parameters"]["importance"] = 2.0
    return calibrated(recipe, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def stats(saved, tmp_path) -> Path:
    """The statistics alone, elsewhere."""
    return Path(shutil.copy(saved, tmp_path / "slta_stats.safetensors"))


def assert_same_alphas(one: Alphas, other: Alphas, tolerance: float) -> None:
    assert one.models == other.models
    assert [entry.name for entry in one.submodules] == [entry.name for entry in other.submodules]
    for ours, theirs in zip(one.submodules, other.submodules, strict=True):
        np.testing.assert_allclose(ours.alpha, theirs.alpha, rtol=tolerance, atol=tolerance, err_msg=ours.name)
        np.testing.assert_allclose(ours.stderr or (), theirs.stderr or (), rtol=1e-3, atol=1e-6, err_msg=ours.name)
        assert (ours.tensors, ours.flags) == (theirs.tensors, theirs.flags)


def assert_same_provenance(solved: Alphas, fresh: Alphas) -> None:
    """Fingerprint included, so that a recipe takes the file for its own; and the file says what it was made from."""
    assert solved.provenance == {**fresh.provenance, "solved_from": "slta_stats.safetensors"}


def assert_same_calibration(one: Alphas, other: Alphas) -> None:
    """The same settings and tasks. A base's losses are rounded differently in batches with other rows."""
    rest = []
    for alphas in (one, other):
        tasks = [{**task, "loss_base": None, "loss_expert": None} for task in alphas.calibration["tasks"]]
        rest.append({**alphas.calibration, "tasks": tasks})
    assert rest[0] == rest[1]
    for ours, theirs in zip(one.calibration["tasks"], other.calibration["tasks"], strict=True):
        for key in ("loss_base", "loss_expert"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)


CHANGES = {
    "as calibrated": ({}, {}, []),
    "ridge": ({"ridge": 0.5}, {}, ["--ridge", "0.5"]),
    "balance": ({"balance": False}, {}, ["--no-balance"]),
    "importance": ({}, {1: 3.5}, ["--importance", "expert2=3.5"]),
    "all": ({"ridge": 0.0, "balance": False}, {0: 0.25, 2: 7}, ["--ridge", "0", "--no-balance"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_solve_equals_a_fresh_calibration(tiny, stats, tmp_path, case):
    """Other ridge, balance and importance from statistics alone: the alphas, and the file, of a calibration with them.

    What is not given stays as calibrated: a ridge of 0.02, and an importance of 2 for the recipe's first model.
    """
    shared, importance, options = CHANGES[case]
    recipe = reversed_names(tiny.recipe(**{"ridge": 0.02, **shared}))
    for number, weight in {0: 2.0, **importance}.items():
        recipe["models"][number]["parameters"]["importance"] = weight
    if case == "all":
        for number, weight in importance.items():
            options = [*options, "--importance", f"{recipe['models'][number]['model']}={weight}"]
    result = slta("solve", stats, *options)
    assert result.exit_code == 0, result.output
    ours = Alphas.load(stats.with_name("slta_alphas_solved.json"))
    fresh = Alphas.load(calibrated(recipe, tmp_path / "fresh").with_name("slta_alphas.json"))
    assert_same_alphas(ours, fresh, 1e-10)
    assert_same_provenance(ours, fresh)
    assert_same_calibration(ours, fresh)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_first_rows_equal_a_smaller_calibration(tiny, stats, tmp_path, count):
    """`--rows n` gives the alphas of a calibration with `num_samples: n`."""
    recipe = reversed_names(tiny.recipe(ridge=0.02, num_samples=count))
    recipe["models"][0]["parameters"]["importance"] = 2.0
    result = slta("solve", stats, "--rows", count, "-o", tmp_path / "fewer.json")
    assert result.exit_code == 0, result.output
    ours = Alphas.load(tmp_path / "fewer.json")
    fresh = Alphas.load(calibrated(recipe, tmp_path / "fresh").with_name("slta_alphas.json"))
    assert_same_alphas(ours, fresh, 1e-6)
    assert ours.calibration["num_samples"] == count
    for task, other in zip(ours.calibration["tasks"], fresh.calibration["tasks"], strict=True):
        assert task["rows"] == other["rows"]
        assert task["loss_expert"] == pytest.approx(other["loss_expert"], rel=1e-6)


@pytest.mark.parametrize("dropped", [["expert1"], ["expert3", "expert1"]])
def test_fewer_experts_equal_a_calibration_of_the_others(tiny, stats, tmp_path, dropped):
    """`--without` gives the alphas, and the file, of a recipe that never had those experts."""
    recipe = reversed_names(tiny.recipe(ridge=0.02))
    recipe["models"][0]["parameters"]["importance"] = 2.0
    recipe["models"] = [entry for entry in recipe["models"] if Path(entry["model"]).name not in dropped]
    result = slta("solve", stats, *(part for name in dropped for part in ("--without", name)))
    assert result.exit_code == 0, result.output
    ours = Alphas.load(stats.with_name("slta_alphas_solved.json"))
    fresh = Alphas.load(calibrated(recipe, tmp_path / "fresh").with_name("slta_alphas.json"))
    assert_same_alphas(ours, fresh, 1e-6)
    assert_same_provenance(ours, fresh)
    assert_same_calibration(ours, fresh)


def test_fewer_rows_are_said_and_never_taken_by_accident(tiny, stats, tmp_path):
    """No hash or token count of rows that are gone; the fingerprint is that of no calibration.

    A recipe that names its rows refuses such a file; one that names none uses it.
    """
    full, fewer = solve_again(Statistics.load(stats)), solve_again(Statistics.load(stats), rows=2)
    assert full.provenance["fingerprint"] != fewer.provenance["fingerprint"]
    for task, whole in zip(fewer.calibration["tasks"], full.calibration["tasks"], strict=True):
        assert (task["tokens"], task["sha256"]) == (None, None)
        assert task["rows"] == whole["rows"][:2]
        assert fewer.identity[f"rows of {task['model']}"] == f"first 2 of {whole['sha256']}"
    assert solve_again(Statistics.load(stats), rows=6).provenance == full.provenance
    fewer.save(tmp_path / "fewer.json")
    recipe = reversed_names(tiny.recipe(ridge=0.02, num_samples=2, alphas=str(tmp_path / "fewer.json")))
    recipe["models"][0]["parameters"]["importance"] = 2.0
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("merge", tmp_path / "recipe.yml", tmp_path / "out", *QUIET)
    assert_refused(result, "alphas-of-another-merge", "other rows of")
    for entry in recipe["models"]:
        entry["parameters"] = {}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("merge", tmp_path / "recipe.yml", tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output


def test_tasks_with_fewer_rows_keep_theirs():
    """Only rows beyond the count go, task by task, wherever they stand."""
    row_task = torch.tensor([1, 0, 1, 1, 0])
    gram = torch.arange(5, dtype=torch.float64)[:, None, None].expand(5, 2, 2).contiguous()
    kept = first_rows(Statistics(row_task, 2, {"head": gram}, {"layout": "all rows"}), 2)
    assert kept.row_task.tolist() == [1, 0, 1, 0]
    assert kept.by_submodule["head"][:, 0, 0].tolist() == [0, 1, 2, 4]
    assert kept.metadata == {}


def test_no_model_is_needed(make_models, tmp_path):
    """Models, data and recipe are gone; the statistics say it all."""
    models = make_models("llama", num_experts=2, scale=0.25)
    copy = tmp_path / "models"
    shutil.copytree(models.folder, copy)
    recipe = {**models.recipe(), "base_model": str(copy / "base")}
    for entry in recipe["models"]:
        entry["model"] = str(copy / Path(entry["model"]).name)
        entry["parameters"]["dataset"] = str(copy / Path(entry["parameters"]["dataset"]).name)
    path = calibrated(recipe, tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(path, elsewhere)
    shutil.rmtree(copy)
    shutil.rmtree(tmp_path / "out")
    result = slta("solve", elsewhere / path.name, "--ridge", "0.1")
    assert result.exit_code == 0, result.output
    assert "ridge 0.1" in result.stderr
    assert Alphas.load(elsewhere / "slta_alphas_solved.json").calibration["ridge"] == 0.1


# --- what is written ------------------------------------------------------------------------------------------------


def test_alphas_are_replaced_and_other_files_are_not(stats, tmp_path):
    """What `solve` wrote is overwritten; anything else of that name, and links and folders' links, are not."""
    target = tmp_path / "slta_alphas_solved.json"
    for _ in range(2):
        assert slta("solve", stats).exit_code == 0
    target.write_text('{"precious": true}')
    (tmp_path / "link.json").symlink_to(target)
    (tmp_path / "note.txt").write_text("precious")
    for path, code in (
        (None, "wrong-file-type"), (tmp_path / "link.json", "not-a-plain-file"),
        (tmp_path / "note.txt", "unreadable-file"), (stats, "reserved-name"),
    ):  # fmt: skip
        before = stats.read_bytes()
        line = assert_refused(slta("solve", stats, *(["-o", path] if path else [])), code, path or target)
        assert "remove" not in line
        assert stats.read_bytes() == before
    assert target.read_text() == '{"precious": true}'
    assert (tmp_path / "note.txt").read_text() == "precious"


def test_a_calibrations_alphas_are_replaced_only_on_demand(saved, tmp_path):
    """By default `solve` writes a file of its own name; with -o it refuses a calibrated file without --overwrite, which
    makes nothing else replaceable."""
    folder = tmp_path / "copy"
    shutil.copytree(saved.parent, folder)
    calibrated_file = folder / "slta_alphas.json"
    before = calibrated_file.read_bytes()
    assert slta("solve", folder, "--ridge", "1").exit_code == 0  # a folder stands for the statistics in it
    assert calibrated_file.read_bytes() == before
    result = slta("solve", folder, "--ridge", "1", "-o", calibrated_file)
    assert_refused(result, "foreign-file", calibrated_file, "--overwrite")
    assert calibrated_file.read_bytes() == before
    assert slta("solve", folder, "--ridge", "1", "-o", calibrated_file, "--overwrite").exit_code == 0
    assert Alphas.load(calibrated_file).calibration["ridge"] == 1.0
    for target, code in ((folder / "recipe.yml", "unreadable-file"), (saved, "reserved-name")):
        content = target.read_bytes()
        assert_refused(slta("solve", folder, "-o", target, "--overwrite"), code, target)
        assert target.read_bytes() == content


def test_two_calibrations_into_one_folder(tiny, write_recipe, tmp_path):
    """Each keeps its statistics, and each is solved again from its own; a later run takes up both."""
    pairs = {"A": {}, "B.v1": {"granularity": "layer"}, "B.v2": {"granularity": "model"}}
    for name, parameters in pairs.items():
        recipe = write_recipe(tiny.recipe(2, **parameters), f"{name}.yml")
        result = slta("calibrate", recipe, "-o", tmp_path / "d" / f"{name}.json", *QUIET)
        assert result.exit_code == 0, result.output
    names = {f"{name}{end}" for name in pairs for end in (".json", ".stats.safetensors")}
    assert {path.name for path in (tmp_path / "d").iterdir()} == names
    for name in pairs:
        result = slta("solve", tmp_path / "d" / f"{name}.stats.safetensors")
        assert result.exit_code == 0, result.output
        solved, own = (Alphas.load(tmp_path / "d" / f"{name}{end}.json") for end in ("_solved", ""))
        assert solved.submodules == own.submodules
        recipe = write_recipe(tiny.recipe(2, ridge=0.5, **pairs[name]), f"{name}.yml")
        result = slta("calibrate", recipe, "-o", tmp_path / "d" / f"{name}.json")
        assert f"Solving again from the statistics in {tmp_path / 'd' / name}.stats.safetensors" in result.output
    assert_refused(slta("solve", tmp_path / "d"), "several-files", "A.stats.safetensors", "B.v2.stats.safetensors")
    assert_refused(slta("solve", tmp_path), "missing-file", tmp_path)


# --- the printed recipe fragment ------------------------------------------------------------------------------------

PASTED = {
    "ridge": ["--ridge", "1e-5"],
    "importance": ["--importance", "expert2=3.5"],
    "balance": ["--no-balance"],
    "rows": ["--rows", "2"],
    "without": ["--without", "expert1"],
    "all": ["--without", "expert3", "--rows", "3", "--ridge", "0.5", "--no-balance", "--importance", "expert1=2"],
}


def paste_whole(recipe: dict, fragment: dict) -> dict:
    """The fragment's sections in place of the recipe's."""
    return {**recipe, **fragment}


def paste_keys(recipe: dict, fragment: dict) -> dict:
    """The same, but other keys under `parameters` stay."""
    return {**recipe, **fragment, "parameters": {**recipe["parameters"], **fragment["parameters"]}}


@pytest.fixture(scope="module")
def merged(saved, tmp_path_factory) -> Path:
    """OUT of the stock command with the recipe of `saved`."""
    out = tmp_path_factory.mktemp("merged") / "out"
    result = mergekit_yaml(saved.parent / "recipe.yml", out, *QUIET)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("case", "paste"), [*((case, paste_whole) for case in PASTED), ("rows", paste_keys), ("all", paste_keys)]
)
def test_the_printed_fragment_works_when_pasted(tiny, saved, merged, write_recipe, tmp_path, case, paste):
    """The recipe with the fragment merges with the solved weights, under the stock command, into the very folder."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    result = slta("solve", out, *PASTED[case])
    assert result.exit_code == 0, result.output
    text = result.stderr[result.stderr.index("# To merge") :]
    dropped = [value for option, value in itertools.pairwise(PASTED[case]) if option == "--without"]
    assert ("without " + "".join(dropped) in text) == bool(dropped)
    recipe = yaml.safe_load((saved.parent / "recipe.yml").read_text())
    result = mergekit_yaml(write_recipe(paste(recipe, yaml.safe_load(text))), out, *QUIET)
    assert result.exit_code == 0, result.output
    solved = Alphas.load(out / "slta_alphas_solved.json")
    experts = {str(path): tensors(path) for path in tiny.experts}
    base, found = tensors(tiny.base), tensors(out)
    own = Alphas.load(out / "slta_alphas.json")
    assert (own.submodules, own.identity, own.solved_from) == (solved.submodules, solved.identity, None)
    # another solve stays possible
    assert (out / "slta_stats.safetensors").read_bytes() == (merged / "slta_stats.safetensors").read_bytes()
    for entry in solved.submodules:
        for name in entry.tensors:
            changes = [w * (experts[m][name] - base[name]) for w, m in zip(entry.alpha, solved.models, strict=True)]
            torch.testing.assert_close(found[name], base[name] + sum(changes), rtol=1e-5, atol=1e-6)


def test_the_fragment_keeps_the_recipes_lambda(saved, tmp_path):
    """Alphas do not hold it; the recipe in a merged model's folder does."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(saved, folder / saved.name)
    for recipe, scale in (
        (None, None), ("parameters: {lambda: 0.5}", 0.5), ("parameters: {lambda: 1}", None), ("parameters: 3", None),
        ("{", None),
    ):  # fmt: skip
        if recipe is not None:
            (folder / "mergekit_config.yml").write_text(recipe)
        result = slta("solve", folder)
        assert result.exit_code == 0, result.output
        text = result.stderr[result.stderr.index("# To merge") :]
        assert "leave its other keys" in text
        assert yaml.safe_load(text)["parameters"].get("lambda") == scale


@pytest.mark.parametrize("is_solved", [False, True])
def test_an_alphas_file_is_no_statistics_file(saved, tmp_path, is_solved):
    """The statistics beside it are named."""
    for end in (".json", ".stats.safetensors"):
        source = saved.with_name("slta_alphas.json") if end == ".json" else saved
        shutil.copy(source, tmp_path / f"A{end}")
    if is_solved:
        assert slta("solve", tmp_path / "A.stats.safetensors").exit_code == 0
    path = tmp_path / ("A_solved.json" if is_solved else "A.json")
    assert_refused(slta("solve", path), "wrong-file-type", path, "alphas file", tmp_path / "A.stats.safetensors")
    (tmp_path / "A.stats.safetensors").unlink()
    assert_refused(slta("solve", path), "wrong-file-type", path, "alphas file")


# --- refusals -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown model": (["--importance", "expert9=1"], "unknown-model", "expert9"),
    "the base": (["--importance", "base=1"], "unknown-model", "base"),
    "no weight": (["--importance", "expert1"], "invalid-value", "expert1"),
    "no model": (["--importance", "=1"], "invalid-value", "=1"),
    "no number": (["--importance", "expert1=much"], "invalid-value", "expert1=much"),
    "zero": (["--importance", "expert1=0"], "invalid-value", "expert1"),
    "negative": (["--importance", "expert1=-1"], "invalid-value", "expert1"),
    "infinite": (["--importance", "expert1=inf"], "invalid-value", "expert1"),
    "twice": (["--importance", "expert1=1", "--importance", "expert1=2"], "duplicate-model", "expert1"),
    "negative ridge": (["--ridge", "-0.1"], "invalid-value", "`ridge` is -0.1"),
    "ridge that is none": (["--ridge", "nan"], "invalid-value", "`ridge` is nan"),
    "no rows": (["--rows", "0"], "invalid-value", "--rows is 0"),
    "no expert": ([f"--without=expert{number}" for number in (1, 2, 3)], "missing-expert", "--without"),
    "unknown expert": (["--without", "expert9"], "unknown-model", "--without: expert9"),
    "too many rows": (["--rows", "7"], "invalid-value", "up to 6 rows"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_out_of_range(stats, case):
    """One line, exit code 2, no file."""
    options, code, value = BAD_OPTIONS[case]
    assert_refused(slta("solve", stats, *options), code, value)
    assert not stats.with_name("slta_alphas_solved.json").exists()


def test_two_models_of_one_basename(saved):
    """A basename that two models share is refused, and the full names are taken."""
    statistics = Statistics.load(saved)
    layout = statistics.metadata["layout"]
    for old, new in (("expert1", "x/same"), ("expert2", "y/same")):
        layout = layout.replace(old, new)
    statistics.metadata["layout"] = layout
    with refused(RecipeError, "unknown-model", "same"):
        solve_again(statistics, importance={"same": 2.0})
    (name,) = [name for name in json.loads(layout)["models"] if name.endswith("x/same")]
    assert solve_again(statistics, importance={name: 5.0}).calibration["importance"][name] == 5.0


def test_importance_is_read_from_the_right():
    """A model's name may hold an `=`."""
    assert parse_importance(["a=b=2"]) == {"a=b": 2.0}


@pytest.mark.parametrize("change", [{"ridge": 0.1}, {"balance": False}, {"importance": {"expert1": 4.0}}, {"rows": 3}])
def test_merged_inputs_cannot_be_solved_again(saved, change):
    """With `inputs: merged` the features depended on these; the values of the calibration are no change."""
    statistics = Statistics.load(saved)
    layout = json.loads(statistics.metadata["layout"])
    layout |= {"solve_dependence": "inputs", "settings": {**layout["settings"], "inputs": "merged"}}
    statistics.metadata["layout"] = json.dumps(layout)
    with refused(RecipeError, "needs-calibration", "`inputs: merged`"):
        solve_again(statistics, **change)
    solve_again(statistics, ridge=0.02, balance=True, importance={"expert3": 2.0}, rows=6)


def drop(*keys: str):
    def change(layout: dict) -> dict:
        return {key: value for key, value in layout.items() if key not in keys}

    return change


def fewer_rows(layout: dict) -> dict:
    layout["tasks"][0]["rows"].pop()
    return layout


def other_models(layout: dict) -> dict:
    layout["canonical"][0] = "another"
    return layout


def lost_submodule(layout: dict) -> dict:
    layout["submodules"][0]["objectives"] = ["nothing"]
    return layout


def tensor_twice(layout: dict) -> dict:
    layout["submodules"][0]["tensors"] = layout["submodules"][1]["tensors"]
    return layout


def no_number(layout: dict) -> dict:
    layout["solve"]["ridge"] = "much"
    return layout


DAMAGES = [
    drop("identity"), drop("models"), drop("submodules", "versions"), fewer_rows, other_models, lost_submodule,
    tensor_twice, no_number, lambda layout: [], lambda layout: None,
]  # fmt: skip


def test_statistics_of_an_objective_that_is_not_known(saved):
    """A release that lacks the objective says which it has."""
    statistics = Statistics.load(saved)
    layout = {**json.loads(statistics.metadata["layout"]), "objective": "magic"}
    statistics.metadata["layout"] = json.dumps(layout)
    with refused(AlphasError, "unknown-objective", "magic", "features"):
        solve_again(statistics)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_layouts(saved, damage):
    """Whatever does not fit the matrices is an AlphasError."""
    statistics = Statistics.load(saved)
    statistics.metadata["layout"] = json.dumps(damage(json.loads(statistics.metadata["layout"])))
    with refused(AlphasError, "incomplete-statistics" if damage is lost_submodule else "damaged-layout"):
        solve_again(statistics)


NO_STATISTICS = {
    "missing": "missing-file", "empty": "unreadable-file", "text": "unreadable-file", "truncated": "unreadable-file",
    "foreign": "wrong-file-type", "no layout": "damaged-layout", "folder": "missing-file",
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_STATISTICS)
def test_files_that_are_no_statistics(stats, tmp_path, kind):
    """Missing, corrupt and foreign files: one line, exit code 2, nothing written."""
    path = tmp_path / "file.safetensors"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no statistics")
    elif kind == "truncated":
        path.write_bytes(stats.read_bytes()[:-8])
    elif kind == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no layout":
        Statistics(torch.tensor([0, 0]), 1, {"head": torch.ones(2, 1, 1, dtype=torch.float64)}).save(path)
    before = sorted(os.listdir(tmp_path))
    assert_refused(slta("solve", path), NO_STATISTICS[kind])
    assert sorted(os.listdir(tmp_path)) == before


def test_solving_over_another_file(tiny, tmp_path, write_recipe):
    """-o onto a file that is no alphas file is refused, and the file stays."""
    recipe = write_recipe(tiny.recipe())
    assert slta("calibrate", recipe, "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
    before = recipe.read_bytes()
    result = slta("solve", tmp_path / "slta_stats.safetensors", "-o", recipe)
    assert_refused(result, "unreadable-file", recipe)
    assert recipe.read_bytes() == before


def test_layouts_for_other_matrices(tiny, tmp_path, write_recipe):
    """A layout whose models are not as many as the matrices have columns is refused."""
    assert slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
    statistics = Statistics.load(tmp_path / "slta_stats.safetensors")
    assert len(Layout.of(statistics).models) == statistics.num_models
    other = Statistics(statistics.row_task, statistics.num_models + 1, {}, metadata=statistics.metadata)
    with refused(AlphasError, "damaged-layout", "the statistics are for"):
        Layout.of(other)


def test_matrices_without_a_solution(tiny, tmp_path, write_recipe, monkeypatch):
    """Where the solver gives up, the error says to calibrate again."""
    assert slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(resolve, "assemble", fail)
    with refused(AlphasError, "unsolvable-statistics", "did not converge"):
        solve_again(Statistics.load(tmp_path / "slta_stats.safetensors"))
