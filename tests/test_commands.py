"""The commands themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import assert_refused, mergekit_yaml, refused, slta

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import Alphas


def test_a_mistake_of_ours_is_one_line(tiny, write_recipe, monkeypatch):
    """An exception that nobody has foreseen is its name and words in a line; -v shows where."""

    def fail(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("mergekit_slta.host.api.prepare", fail)
    result = slta("check", write_recipe(tiny.recipe()))
    assert_refused(result, "unexpected-error", "ZeroDivisionError: division by zero; -v shows where", exit_code=1)


# --- where the output goes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory) -> Path:
    """A folder with a recipe of two experts, its alphas and its statistics."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "recipe.yml").write_text(yaml.safe_dump(tiny.recipe(2, num_samples=2)))
    result = slta("calibrate", folder / "recipe.yml", "-o", folder / "slta_alphas.json", "--quiet")
    assert result.exit_code == 0, result.output
    return folder


WRITING = {
    "calibrate": ("recipe.yml", ["--quiet"], "slta_alphas.json"),
    "linearity": ("recipe.yml", ["--quiet", "--rows", "1"], "slta_linearity.json"),
    "solve": ("slta_stats.safetensors", [], "slta_alphas_solved.json"),
    "export": ("slta_alphas.json", [], "stock.yml"),
}


@pytest.mark.parametrize("command", WRITING)
def test_an_output_folder_gets_the_default_name(calibrated, tmp_path, monkeypatch, command):
    """`-o new/`, `-o new/deeper/` and `-o existing`: the file is written into the folder, which is made; it never
    becomes a file called `new`."""
    source, options, name = WRITING[command]
    monkeypatch.chdir(tmp_path)
    Path("existing").mkdir()
    for given in ("new/", "new/deeper/", "existing", "existing/"):
        result = slta(command, calibrated / source, *options, "-o", given)
        assert result.exit_code == 0, result.output
        assert (Path(given) / name).is_file()
        assert str(tmp_path / given / name) in result.stderr
    Path("file").write_text("mine")
    assert_refused(slta(command, calibrated / source, *options, "-o", "file/"), "not-a-folder", tmp_path / "file")
    assert Path("file").read_text() == "mine"


def test_alphas_of_a_recipe_may_name_a_folder(tiny, write_recipe, tmp_path):
    """Of an earlier merge, or a new one: its slta_alphas.json is read, or written there."""
    out = tmp_path / "out"
    recipe = write_recipe(tiny.recipe(2, num_samples=2, alphas=f"{tmp_path / 'saved'}/"))
    assert slta("merge", recipe, out, "--quiet").exit_code == 0
    assert (tmp_path / "saved" / "slta_alphas.json").read_bytes() == (out / "slta_alphas.json").read_bytes()
    recipe = write_recipe(tiny.recipe(2, num_samples=2, alphas=str(out)))
    assert slta("check", recipe).exit_code == 0
    result = slta("merge", recipe, tmp_path / "again")
    assert f"Reusing the alphas in {out / 'slta_alphas.json'}" in result.output
    other = write_recipe(tiny.recipe(2, num_samples=2, seed=1, alphas=str(out)))
    assert_refused(slta("merge", other, tmp_path / "other", "--quiet"), "alphas-of-another-merge", out)


def test_alphas_of_other_models_are_kept(tiny, calibrated, write_recipe, tmp_path, monkeypatch):
    """A file named by -o or by `alphas` is another recipe's; the same models are computed anew, and so is the file of
    the default name."""
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(calibrated / "slta_alphas.json", "A.json"))
    default = Path(shutil.copy(path, "slta_alphas.json"))
    before = path.read_bytes()
    others = tiny.recipe(3, num_samples=2)
    based = {**tiny.recipe(2, num_samples=2), "base_model": str(tiny.experts[2])}
    named = tiny.recipe(1, num_samples=2, alphas=str(path))
    for recipe, options in ((others, ["-o", path]), (based, ["-o", path]), (named, [])):
        result = slta("calibrate", write_recipe(recipe), *options, "--quiet")
        assert_refused(result, "foreign-file", path, tiny.experts[1])
        assert path.read_bytes() == before
        assert not Path("A.stats.safetensors").exists()
    result = slta("calibrate", write_recipe(tiny.recipe(2, num_samples=2, seed=1)), "-o", path)
    assert result.exit_code == 0, result.output
    assert "is for another merge" in result.output
    assert path.read_bytes() != before
    assert slta("calibrate", write_recipe(others), "--quiet").exit_code == 0
    assert len(Alphas.load(default).models) == 3


# --- a folder in place of a file ------------------------------------------------------------------------------------


def test_solve_and_export_take_a_folder(calibrated, tmp_path):
    """The one file of the kind in it; several, or none, are said, and nobody is told to remove a file."""
    folder = tmp_path / "folder"
    shutil.copytree(calibrated, folder)
    assert slta("export", folder, "--recipe", folder / "recipe.yml", "-o", tmp_path / "stock.yml").exit_code == 0
    assert slta("solve", folder).exit_code == 0
    line = assert_refused(slta("export", folder), "several-files", "slta_alphas.json, slta_alphas_solved.json")
    assert "remove" not in line
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in ("solve", "export"):
        line = assert_refused(slta(command, empty), "missing-file", empty)
        assert "remove" not in line
        line = assert_refused(slta(command, tmp_path / "none"), "missing-file", tmp_path / "none")
        assert "remove" not in line


def test_a_merged_models_own_files_are_meant(calibrated, tmp_path):
    """OUT stands for the weights that it was merged with, whatever lies beside them."""
    out = tmp_path / "out"
    assert mergekit_yaml(calibrated / "recipe.yml", out, "--quiet").exit_code == 0
    for ridge in ("0.5", "1"):
        result = slta("solve", out, "--ridge", ridge)
        assert result.exit_code == 0, result.output
        assert Alphas.load(out / "slta_alphas_solved.json").calibration["ridge"] == float(ridge)
    result = slta("export", out, "--recipe", calibrated / "recipe.yml")
    assert result.exit_code == 0, result.output
    weight = yaml.safe_load(result.stdout)["models"][0]["parameters"]["weight"]
    head = next(entry for entry in Alphas.load(out / "slta_alphas.json").submodules if entry.name == "head")
    assert {"filter": "lm_head.weight", "value": head.alpha[0]} in weight


def test_a_folder_is_no_alphas_file(calibrated):
    """From Python the message says so, and nothing of removing."""
    with refused(AlphasError, "missing-file", calibrated, "is a folder") as caught:
        Alphas.load(calibrated)
    assert "remove" not in caught.value.message
