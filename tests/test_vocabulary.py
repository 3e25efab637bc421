"""The `tokenizer` section: paths in it, what mergekit would fail on only while it merges, and what it loses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Models, assert_refused, make_tokenizer, mergekit_yaml, read, refused, slta, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mergekit_slta.errors import DataError, ModelError, RecipeError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.stock_recipe import export


def grown(source: Path, target: Path, *tokens: str, rows: int = 320) -> Path:
    """A checkpoint whose tokenizer has more tokens, and whose embeddings have `rows` rows."""
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(3)
    model.resize_token_embeddings(rows)
    model.save_pretrained(target)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(target)
    return target


def with_section(models: Models, expert: object = None, **section: object) -> dict:
    recipe = models.recipe(2)
    if expert is not None:
        recipe["models"][1]["model"] = str(expert)
    recipe["tokenizer"] = section
    return recipe


def relative(recipe: dict, folder: Path) -> dict:
    """The recipe with its paths below `folder` written as relative ones."""
    text = yaml.safe_dump(recipe).replace(f"{folder}/", "")
    assert str(folder) not in text
    return yaml.safe_load(text)


SECTIONS = {
    "source": lambda folder: {"source": str(folder / "expert2")},
    "a token's model": lambda folder: {
        "source": "base", "tokens": {"<new>": {"source": str(folder / "expert2")}},
    },
    "a token of a model": lambda folder: {
        "source": "base",
        "tokens": {
            "<new>": {"source": {"kind": "model_token", "model": str(folder / "expert2"), "token": "the"}},
            "the": {"source": {"kind": "model_token", "model": str(folder / "base"), "token_id": 7}, "force": True},
        },
    },
}  # fmt: skip


@pytest.fixture
def family(tiny, tmp_path) -> Models:
    """A base and two experts in one folder; the second has one token more."""
    folder = tmp_path / "family"
    shutil.copytree(tiny.base, folder / "base")
    shutil.copytree(tiny.experts[0], folder / "expert1")
    grown(tiny.experts[1], folder / "expert2", "<new>")
    for number in (1, 2):
        shutil.copy(tiny.datasets[number - 1], folder / f"task{number}.jsonl")
    return Models(
        folder,
        folder / "base",
        (folder / "expert1", folder / "expert2"),
        (folder / "task1.jsonl", folder / "task2.jsonl"),
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_relative_paths(family, write_recipe, tmp_path, monkeypatch, section):
    """Paths in the section are as good as absolute ones: the same tensors, and alphas that fit both recipes."""
    recipe = with_section(family, **SECTIONS[section](family.folder))
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "one", "--quiet").exit_code == 0
    monkeypatch.chdir(family.folder)
    result = mergekit_yaml(write_recipe(relative(recipe, family.folder)), tmp_path / "two", "--quiet")
    assert result.exit_code == 0, result.output
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab()


def test_the_top_level_key_and_the_export(family, write_recipe, tmp_path, monkeypatch):
    """`tokenizer_source` may be a path too; the recipe of `export` works from any folder; another spelling of the path
    is the same merge."""
    monkeypatch.chdir(family.folder)
    recipe = relative({**family.recipe(2), "tokenizer_source": str(family.folder / "expert2")}, family.folder)
    path = write_recipe(recipe)
    assert slta("calibrate", path, "-o", tmp_path / "alphas.json", "--quiet").exit_code == 0
    recipe["tokenizer_source"] = "./expert2/"
    recipe["parameters"]["alphas"] = str(tmp_path / "alphas.json")
    result = mergekit_yaml(write_recipe(recipe, "other.yml"), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output
    text = export(tmp_path / "alphas.json", path).text
    assert yaml.safe_load(text)["tokenizer_source"] == str(family.folder / "expert2")


def token(**source: object) -> dict:
    return {"source": "base", "tokens": {"<new>": {"source": source}}}


BAD_TOKENS = {
    "a model that is not merged": (
        lambda family, tiny: token(kind="model_token", model=str(tiny.experts[2]), token="the"), RecipeError,
        "unknown-model", ["<new>"],
    ),
    "a model's token that it lacks": (
        lambda family, tiny: token(kind="model_token", model=str(family.experts[0]), token="<none>"), ModelError,
        "missing-token", ["<none>", "expert1"],
    ),
    "a model that lacks the token": (
        lambda family, tiny: {"source": "union", "tokens": {"<new>": {"source": str(family.base)}}}, ModelError,
        "missing-token", ["<new>", "base"],
    ),
    "a number beyond the table": (
        lambda family, tiny: token(kind="model_token", model=str(family.base), token_id=320), ModelError,
        "token-out-of-range", ["token 320", "320 rows"],
    ),
    "a token that mergekit adds to the base's tokenizer": (
        lambda family, tiny: {
            "source": "base",
            "tokens": {"<x>": {"source": {"kind": "model_token", "model": str(family.base), "token": "<x>"}}},
        }, ModelError, "missing-token", ["<x>", "base"],
    ),
    "no source": (
        lambda family, tiny: {"source": "base", "tokens": {"<new>": {}}}, RecipeError, "missing-value", ["<new>"]
    ),
    "a padding of nothing": (
        lambda family, tiny: {"source": "base", "pad_to_multiple_of": -64}, RecipeError, "invalid-value", ["-64"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_sections_that_mergekit_fails_on_while_merging(family, tiny, options, case):
    """Refused before anything is computed."""
    section, error, code, values = BAD_TOKENS[case]
    with refused(error, code, *values):
        prepare(read(with_section(family, **section(family, tiny))), options)


@pytest.mark.parametrize(
    ("section", "code", "named"),
    [
        (token(kind="model_tokn", model="x", token="a"), "invalid-value", "model_tokn"),
        (token(kind="model_token", model="x"), "invalid-value", "`token` and `token_id`"),
        (token(kind="model_token", model="x", token="a", token_id=3), "invalid-value", "`token` and `token_id`"),
        (token(kind="zero", model="x"), "unknown-key", "`model`"),
        (token(model="x", token="a"), "unknown-key", "`token`"),
        ({"tokens": {"<new>": {"sourc": "x"}}}, "unknown-key", "`sourc`"),
        ({"source": "base", "pad_to_multiple": 64}, "unknown-key", "pad_to_multiple_of"),
        ({"source": "base", "pad_to_multiple_of": "many"}, "not-a-recipe", "pad_to_multiple_of"),
    ],
)  # fmt: skip
def test_keys_that_mergekit_ignores(tiny, write_recipe, tmp_path, section, code, named):
    """A wrong kind would be the name of a model, and a misspelled key the default."""
    path = write_recipe(with_section(tiny, **section))
    assert_refused(slta("check", path), code, named)
    if code != "not-a-recipe":  # mergekit's own error comes first
        assert_refused(mergekit_yaml(path, tmp_path / "out", "--quiet"), code, named)


def test_tokens_that_were_added_without_rows(family, tiny, options, tmp_path):
    """One expert's tokenizer has a token that its embeddings have no row for, another's has the row: mergekit fails
    with a bare KeyError."""
    folder = tmp_path / "family"
    tokens = len(make_tokenizer().get_vocab())
    for name in ("expert1", "expert2"):
        shutil.rmtree(folder / name)
    grown(tiny.experts[0], folder / "expert1", "<pad>", rows=tokens)
    grown(tiny.experts[1], folder / "expert2", "<pad>", rows=tokens + 1)
    with refused(ModelError, "token-out-of-range", f"token {tokens} (<pad>)", "expert1", f"{tokens} rows"):
        prepare(read(with_section(family, source="union")), options)


def test_tokens_that_mergekit_adds_to_the_base(family, tiny, options, tmp_path, caplog):
    """Under `source: base` mergekit takes rows of the base's padding for them, or fails where there is none."""
    section = {"source": "base", "tokens": {"<new>": {"source": str(family.experts[1])}}}
    prepare(read(with_section(family, **section)), options)
    assert "the base has no token <new>, and mergekit takes a row of its padding" in caplog.text
    tokens = len(make_tokenizer().get_vocab())
    shutil.rmtree(family.base)
    grown(tiny.base, family.base, rows=tokens)
    with refused(ModelError, "token-out-of-range", "<new>", f"{tokens} rows", "take `source: union`"):
        prepare(read(with_section(family, **section)), options)
    caplog.clear()
    prepare(read(with_section(family, **{**section, "source": "union"})), options)
    assert "the base has no token" not in caplog.text


def test_ids_with_gaps(family, options):
    """mergekit would give the tokens behind a gap the mean of all rows, or none."""
    path = family.base / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 5
    path.write_text(json.dumps(content))
    for section in ({}, {"pad_to_multiple_of": 64}):
        with refused(ModelError, "token-out-of-range", "have gaps"):
            prepare(read(with_section(family, source="base", **section)), options)


@pytest.mark.parametrize(("rows", "advice"), [(320, "64"), (304, "16"), (331, "331"), (None, None)])
def test_advice_keeps_the_size_of_a_padded_base(tiny, write_recipe, tmp_path, rows, advice):
    """A base with more rows than tokens: what the message says to add gives an output of the base's size."""
    tokens = len(make_tokenizer().get_vocab())
    recipe = tiny.recipe(2)
    recipe["base_model"] = str(grown(tiny.base, tmp_path / "base", rows=rows or tokens))
    recipe["models"][0]["model"] = str(grown(tiny.experts[0], tmp_path / "same", rows=rows or tokens))
    recipe["models"][1]["model"] = str(grown(tiny.experts[1], tmp_path / "grown", "<a>", rows=tokens + 3))
    section = "{source: base}" if advice is None else f"{{source: base, pad_to_multiple_of: {advice}}}"
    line = assert_refused(slta("check", write_recipe(recipe)), "differing-vocabularies", f"tokenizer: {section}")
    recipe["tokenizer"] = yaml.safe_load(line.split("`")[1])["tokenizer"]
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == (rows or tokens)


@pytest.mark.parametrize("section", [{"source": "base"}, {"source": "union"}, None])
@pytest.mark.parametrize("template", ["chatml", None])
def test_generation_config_is_kept(family, write_recipe, tmp_path, section, template):
    """However mergekit writes the tokenizer. Custom code goes with a config that refers to it."""
    GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[1, 5]).save_pretrained(family.base)
    config = json.loads((family.base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mine.Mine"}
    (family.base / "config.json").write_text(json.dumps(config))
    (family.base / "configuration_mine.py").write_text("X = 1\n")
    recipe = {key: value for key, value in {**with_section(family), "tokenizer": section}.items() if value is not None}
    if template:
        recipe["chat_template"] = template
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.temperature, found.top_p, found.eos_token_id) == (0.6, 0.9, [1, 5])
    assert (tmp_path / "out" / "configuration_mine.py").read_text() == "X = 1\n"


def test_token_ids_follow_another_tokenizer(family, write_recipe, tmp_path):
    """An expert's tokenizer that numbers the end token otherwise: OUT's configs name that token, not another."""
    path = family.experts[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    other = next(word for word, number in vocabulary.items() if number == 9)
    vocabulary["</s>"], vocabulary[other] = 9, 1
    for entry in content["added_tokens"]:
        if entry["content"] == "</s>":
            entry["id"] = 9
    path.write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(family.experts[1]).eos_token_id == 9
    GenerationConfig(eos_token_id=[1], bos_token_id=0).save_pretrained(family.base)
    result = mergekit_yaml(write_recipe(with_section(family, source=str(family.experts[1]))), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "has other token ids than the base's" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 9
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.bos_token_id) == ([9], 0)


def test_a_tokenizer_that_is_not_there(tiny, options, tmp_path):
    """The message names the model that `source` names."""
    (tmp_path / "none").mkdir()
    with refused(DataError, "unreadable-tokenizer", tmp_path / "none"):
        prepare(read(with_section(tiny, source=str(tmp_path / "none"))), options)
