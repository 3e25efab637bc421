"""What is looked at before the first weight is read."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from conftest import Models, make_tokenizer, mergekit_yaml, perturbed, read, refused, slta, write_rows
from mergekit.options import MergeOptions
from transformers import GPT2Config, GPT2LMHeadModel
from zoo import ZOO

from mergekit_slta import Alphas
from mergekit_slta.errors import DataError, RecipeError
from mergekit_slta.job.preflight import prepare


def test_a_base_without_a_tokenizer(tiny, options, tmp_path):
    """A base whose folder holds no tokenizer is refused before anything is computed."""
    shutil.copytree(tiny.base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    recipe = tiny.recipe()
    recipe["base_model"] = str(tmp_path / "base")
    with refused(DataError, "unreadable-tokenizer", tmp_path / "base"):
        prepare(read(recipe), options, for_merge=False)


def test_narrow_precision_is_warned_of(tiny, options, caplog):
    """Differences of outputs cancel in bfloat16: that is said, and not said of float32."""
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe()), options, for_merge=False)
    assert "cancel badly" not in caplog.text
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe(compute_dtype="bfloat16")), options, for_merge=False)
    assert "compute_dtype bfloat16: differences of outputs cancel badly" in caplog.text


@pytest.mark.parametrize(
    "template",
    ["auto", "chatml", "{% for message in messages %}{{ message }}{% endfor %}", "no-such-template", "short {"],
)
def test_chat_templates(tiny, options, template):
    """A name that mergekit knows or a Jinja template; anything else is refused before mergekit would write it down."""
    recipe = read({**tiny.recipe(2), "chat_template": template})
    is_unknown = template in ("no-such-template", "short {")
    with refused(RecipeError, "invalid-value", "chat_template", template) if is_unknown else contextlib.nullcontext():
        prepare(recipe, options)


@pytest.fixture(scope="module")
def short(tmp_path_factory, make_models):
    """GPT-2 with 16 learned positions."""
    folder = tmp_path_factory.mktemp("short")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(**{**ZOO["gpt2"].settings, "n_positions": 16}))
    paths, datasets = [], []
    for number in range(3):
        paths.append(folder / f"model{number}")
        (base if number == 0 else perturbed(base, number)).save_pretrained(paths[-1])
        make_tokenizer().save_pretrained(paths[-1])
        datasets.append(folder / f"task{number}.jsonl")
        write_rows(datasets[-1], number)
    return Models(folder, paths[0], tuple(paths[1:]), tuple(datasets[1:]))


@pytest.mark.parametrize("objective", ["features", "joint"])
def test_rows_are_cut_to_learned_positions(short, write_recipe, tmp_path, caplog, objective):
    """The limit is named and recorded, and longer rows end there; nothing is said where the recipe asks for less."""
    keys = {"objective": objective, "max_seq_length": 40, **({"steps": 1} if objective == "joint" else {})}
    recipe = write_recipe(short.recipe_with_answers(**keys))
    with caplog.at_level("WARNING"):
        assert slta("check", recipe).exit_code == 0
    lines = [record.getMessage() for record in caplog.records if "learned no more positions" in record.getMessage()]
    assert len(lines) == 2
    assert all("cut to 16 tokens" in line and str(short.base) in line for line in lines)
    result = mergekit_yaml(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Alphas.load(tmp_path / "out" / "slta_alphas.json").calibration["max_seq_length"] == 16
    caplog.clear()
    with caplog.at_level("WARNING"):
        prepare(read(short.recipe_with_answers(**{**keys, "max_seq_length": 15})), MergeOptions(quiet=True))
    assert "positions" not in caplog.text


def test_an_alphas_file_of_cut_rows_fits_a_recipe_without_datasets(short, write_recipe, tmp_path):
    """It says what was used, which a recipe that states more than the positions means, too."""
    recipe = short.recipe(max_seq_length=40)
    assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json").exit_code == 0
    for entry in recipe["models"]:
        del entry["parameters"]
    recipe["parameters"]["alphas"] = str(tmp_path / "a.json")
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_linearity_is_measured_on_cut_rows(short, write_recipe, tmp_path):
    result = slta("linearity", write_recipe(short.recipe(max_seq_length=40)), "-o", tmp_path / "l.json", "--rows", 1)
    assert result.exit_code == 0, result.output
