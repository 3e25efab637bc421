"""What is looked at before the first weight is read."""

from __future__ import annotations

import contextlib
import re
import shutil

import pytest
import torch
from conftest import (
    Models,
    assert_refused,
    make_tokenizer,
    mergekit_yaml,
    perturbed,
    read,
    refused,
    slta,
    tensors,
    write_rows,
)  # fmt: skip
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from zoo import ZOO

from mergekit_slta import Alphas
from mergekit_slta.errors import DataError, RecipeError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives.registry import estimate


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


@pytest.mark.parametrize("cut", ["base", "expert"])
def test_tokens_that_a_table_has_no_row_for(make_models, tiny, write_recipe, tmp_path, cut):
    """`check` and the merge compare the rows' tokens with the embedding table of every model, before reading it."""
    small = make_models("llama", num_experts=1, vocab_size=64)
    recipe = tiny.recipe(2)
    if cut == "base":
        recipe["base_model"], recipe["models"] = str(small.base), recipe["models"][:1]
        recipe["models"][0]["model"] = str(small.experts[0])
        options = []
    else:
        recipe["models"][1]["model"], options = str(small.experts[0]), ["--unsafe-truncate-embeddings"]
    path = write_recipe(recipe)
    for result in (slta("check", path, *options), mergekit_yaml(path, tmp_path / "out", *options)):
        assert_refused(result, "token-out-of-range", "beyond the 64 rows of model.embed_tokens.weight")


@pytest.mark.parametrize("options", [["--cuda"], ["--device", "cuda:7"], ["--device", "xpu"], ["--multi-gpu"]])
def test_check_plans_for_a_device_that_is_elsewhere(tiny, write_recipe, options):
    """A laptop makes the plan of a GPU machine: `check` says that the device is missing, and what it would cost."""
    if torch.accelerator.is_available() and options != ["--device", "cuda:7"]:
        pytest.skip("this machine has an accelerator")
    result = slta("check", write_recipe(tiny.recipe(2)), *options)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("device")]
    assert re.search(r"planned; (this machine has no (cuda|cuda:7|xpu)|--multi-gpu needs an accelerator)", line)


def test_a_device_that_is_none(tiny, write_recipe):
    """A name that torch does not know is refused by `check`, too."""
    assert_refused(
        slta("check", write_recipe(tiny.recipe(2)), "--device", "gpu0"), "unusable-device", "gpu0", exit_code=1
    )


def test_check_merges_no_adapter(tiny, write_recipe, tmp_path):
    """An adapter that needs a copy on disk gets it in the merge; alphas for it are compared as far as they can be."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny.base),
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "dora")
    recipe = tiny.recipe(2, alphas=str(tmp_path / "a.json"))
    recipe["models"][1]["model"] = f"{tiny.base}+{tmp_path / 'dora'}"
    path, cache = write_recipe(recipe), ["--lora-merge-cache", tmp_path / "cache"]
    result = slta("check", path, *cache)
    assert result.exit_code == 0, result.output
    assert "is merged into a full copy first (DoRA)" in result.output
    assert not (tmp_path / "cache").exists()
    assert slta("calibrate", path, *cache).exit_code == 0
    assert slta("check", path, *cache).exit_code == 0
    recipe["parameters"]["num_samples"] = 5
    assert_refused(slta("check", write_recipe(recipe), *cache), "alphas-of-another-merge", "other rows of")


WIDER = {  # dtypes of base and expert, further keys -> the merge's dtype, and whether that is warned of
    "wider": (torch.bfloat16, torch.float32, {}, torch.float32, True),
    "other": (torch.bfloat16, torch.float16, {}, torch.float32, True),
    "narrower": (torch.float32, torch.bfloat16, {}, torch.float32, False),
    "same": (torch.bfloat16, torch.bfloat16, {}, torch.bfloat16, False),
    "named": (torch.bfloat16, torch.float32, {"out_dtype": "bfloat16"}, torch.bfloat16, False),
}


@pytest.mark.parametrize("case", WIDER)
def test_the_size_of_a_merge_of_several_dtypes(make_models, write_recipe, tmp_path, caplog, case):
    """mergekit promotes the models' dtypes: the plan says so, and a wider dtype than the base's is warned of."""
    *dtypes, keys, dtype, is_warned = WIDER[case]
    models = [make_models("llama", dtype=each) for each in dtypes]
    recipe = {**models[1].recipe(1, num_samples=2), "base_model": str(models[0].base), **keys}
    with caplog.at_level("WARNING"):
        job = prepare(read(recipe), MergeOptions(quiet=True))
    told = [each.getMessage() for each in caplog.records if "several dtypes" in each.getMessage()]
    assert len(told) == is_warned
    assert all("`out_dtype: bfloat16`" in line and "as float32" in line for line in told)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    written = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert estimate(job).written_bytes == sum(tensor.nbytes for tensor in written.values())
