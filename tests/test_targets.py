"""Files of this package made by another version are replaced; files of any other origin are not."""

from __future__ import annotations

import json

from conftest import assert_refused, refused, slta

from mergekit_slta.errors import OutputError
from mergekit_slta.files.targets import check_linearity_target


def make_older(path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 0}))


def test_alphas_of_another_version_are_calibrated_again(tiny, write_recipe, tmp_path):
    """`calibrate` replaces them, under any name; a recipe that names them is refused with what to do."""
    path = tmp_path / "mine.json"
    recipe = write_recipe(tiny.recipe(2))
    assert slta("calibrate", recipe, "-o", path, "--quiet").exit_code == 0
    before = path.read_bytes()
    make_older(path)
    named = write_recipe(tiny.recipe(2, alphas=str(path)), "named.yml")
    assert_refused(slta("merge", named, tmp_path / "out", "--quiet"), "other-file-version", path, "calibrate` again")
    path.with_name("mine.stats.safetensors").unlink()
    assert slta("calibrate", recipe, "-o", path, "--quiet").exit_code == 0
    assert path.read_bytes() == before


def test_a_linearity_file_of_another_version_may_be_replaced(tmp_path):
    """What is no linearity file may not."""
    path = tmp_path / "slta_linearity.json"
    path.write_text(json.dumps({"format": "mergekit-slta/linearity", "version": 1}))
    check_linearity_target(path)
    path.write_text(json.dumps({"format": "other"}))
    with refused(OutputError, "foreign-file", f"{path} is no linearity file"):
        check_linearity_target(path)


def test_a_merge_prints_its_traceback_once(tiny, write_recipe, tmp_path):
    """-v shows where a refusal comes from."""
    recipe = tiny.recipe(2)
    recipe["models"][0]["parameters"]["dataset"] = "missing.jsonl"
    result = slta("merge", write_recipe(recipe), tmp_path / "out", "-v", "--quiet")
    assert result.exit_code == 2
    assert result.output.count("Traceback (most recent call last)") == result.output.count("direct cause") + 1
