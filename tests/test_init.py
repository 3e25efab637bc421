"""`mergekit-slta init`: what it finds, what it writes, and that `check` accepts it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import Models, assert_refused, make_tokenizer, refused, slta, write_rows
from test_checkpoints import adapter
from transformers import AutoModelForCausalLM

from mergekit_slta.checkpoints.origins import Origin, read_origin
from mergekit_slta.cli import init_command
from mergekit_slta.cli.main import main
from mergekit_slta.data.columns import Keys, guess_keys
from mergekit_slta.data.rows import Row, TaskRows
from mergekit_slta.errors import RecipeError
from mergekit_slta.job.draft import why_not_joint
from mergekit_slta.job.draft_text import Draft, DraftTask, recipe_text, scalar
from mergekit_slta.job.lineage import find_lineage


def card(model: Path, text: str) -> Path:
    """Write a model's card."""
    (model / "README.md").write_text(f"---\n{text}\n---\n# A model\n", encoding="utf-8")
    return model


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def answers(path: Path, count: int) -> Path:
    """Rows with a question and its answer, and nothing else."""
    write_rows(path, 1, count)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: row[key] for key in ("question", "answer")}) + "\n" for row in rows))
    return path


def accepted(path: Path | str) -> dict:
    """The content of a recipe that `check` accepts."""
    result = slta("check", path)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def test_base_first_and_rows_from_options(tiny, tmp_path, monkeypatch):
    """Models that say nothing: the first is the base, and both spellings of a model name its rows. Paths are written as
    they were given; the recipe is in another folder."""
    monkeypatch.chdir(tmp_path)
    for source in (tiny.base, *tiny.experts[:2], *tiny.datasets[:2]):
        Path(source.name).symlink_to(source)
    result = slta(
        "init", "base/", "./expert1", "expert2/", "--data", "expert1=task1.jsonl", "--data", "expert2/=task2.jsonl",
        "-o", "recipes/new/",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Base: base (named first)" in result.stderr
    assert accepted("recipes/new/recipe.yml") == {
        "merge_method": "submodule_linear",
        "base_model": "base",
        "models": [
            {"model": "./expert1", "parameters": {"dataset": "task1.jsonl"}},
            {"model": "expert2", "parameters": {"dataset": "task2.jsonl"}},
        ],
        "parameters": {"objective": "features", "num_samples": 30, "max_seq_length": 512},
        "out_dtype": "float32",
    }
    text = Path("recipes/new/recipe.yml").read_text()
    assert "# 12 rows: `text`; not used: question, answer, number, tags." in text
    assert "mergekit-slta check recipes/new/recipe.yml" in text
    above = text.splitlines()
    for number, line in enumerate(above):
        key = line.strip().partition(":")[0]
        if key in ("base_model", "dataset", "objective", "num_samples", "max_seq_length", "out_dtype"):
            assert above[number - 1].strip().startswith("#") or key == "dataset"


def test_adapters_name_their_base(tiny, tmp_path):
    """Without BASE: each expert is written as base+adapter. The card of one names its rows."""
    paths = [adapter(tiny, tmp_path / str(number), number)[0] for number in (1, 2)]
    card(paths[0], f"base_model: other/thing\ndatasets:\n- {tiny.datasets[0]}")
    result = slta("init", *paths, "--data", f"{paths[1]}={tiny.datasets[1]}", "-o", tmp_path / "recipe.yml", "--yes")
    assert result.exit_code == 0, result.output
    content = accepted(tmp_path / "recipe.yml")
    assert content["base_model"] == str(tiny.base)
    assert [entry["model"] for entry in content["models"]] == [f"{tiny.base}+{path}" for path in paths]
    assert content["models"][0]["parameters"] == {"dataset": str(tiny.datasets[0])}
    assert "rows, from its card: `text`; not used: " in (tmp_path / "recipe.yml").read_text()


def test_cards_name_the_base_wherever_it_stands(tiny, tmp_path, monkeypatch):
    """`base_model` as a text or a list of one; the base need not be first. No rows: the recipe needs none, and says how
    to add them."""
    monkeypatch.chdir(tmp_path)
    for number, text in ((0, "base_model: org/base"), (1, "base_model: [org/Base]")):
        card(copy(tiny.experts[number], Path(f"e{number}")), text)
    Path("base").symlink_to(tiny.base)
    result = slta("init", "e0", "base", "e1")
    assert result.exit_code == 0, result.output
    content = accepted("recipe.yml")
    assert content["base_model"] == "base"
    assert content["models"] == [{"model": "e0"}, {"model": "e1"}]
    assert content["parameters"] == {"objective": "data_free"}
    assert "#   dataset: e0.jsonl" in Path("recipe.yml").read_text()
    assert "named by e0 (its card), e1 (its card)" in result.stderr


@pytest.mark.parametrize(("count", "objective"), [(45, "joint"), (20, "features")])
def test_joint_where_every_task_has_enough_rows_with_answers(tiny, tmp_path, count, objective):
    """Questions and answers become `text` and `completion`; with few rows it stays with `features`."""
    rows = answers(tmp_path / "rows.jsonl", count)
    data = [f"--data={model}={rows}" for model in tiny.experts[:2]]
    result = slta("init", tiny.base, *tiny.experts[:2], *data, "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    content = accepted(tmp_path / "recipe.yml")
    assert content["parameters"]["objective"] == objective
    assert content["models"][0]["parameters"] == {
        "dataset": str(rows), "text": "{question}\n", "completion": "{answer}",
    }  # fmt: skip


def test_other_vocabularies_get_a_tokenizer_section(tiny, tmp_path):
    """An expert whose embeddings were padded merges over the base's tokens, and the output has the base's rows."""
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[0])
    model.resize_token_embeddings(328)
    model.save_pretrained(copy(tiny.experts[0], tmp_path / "wide"))
    result = slta("init", tiny.base, tmp_path / "wide", tiny.experts[1], "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    content = accepted(tmp_path / "recipe.yml")
    assert content["tokenizer"] == {"source": "base", "pad_to_multiple_of": 64}


def test_chats_name_their_template(tiny, tmp_path):
    """A comment says what renders the rows, and by which markers it is known."""
    rows = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    result = slta("init", tiny.base, tiny.experts[0], "--data", f"expert1={rows}", "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    accepted(tmp_path / "recipe.yml")
    text = (tmp_path / "recipe.yml").read_text()
    assert "# 4 rows: `messages`." in text
    assert "# Chats are rendered with its own chat template." in text


def test_rows_of_the_hub_that_cannot_be_reached(tiny, tmp_path):
    """They are written with a comment that says so, and nothing is claimed about their columns."""
    rows = [f"--data=expert{number}=org/rows{number}" for number in (1, 2)]
    result = slta("init", tiny.base, *tiny.experts[:2], *rows, "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "recipe.yml").read_text()
    assert "# org/rows1, could not be looked at (the Hub cannot be reached)." in text
    content = yaml.safe_load(text)
    assert content["models"][0]["parameters"] == {"dataset": "org/rows1"}
    assert content["parameters"]["objective"] == "features"


# --- on a terminal --------------------------------------------------------------------------------------------------


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: object) -> Result:
    """The command, with somebody who types these lines."""
    monkeypatch.setattr(init_command, "is_terminal", lambda: True)
    return CliRunner().invoke(main, ["init", *map(str, arguments)], input="".join(f"{line}\n" for line in lines))


def test_empty_answers_are_the_defaults(tiny, tmp_path, monkeypatch):
    """Who presses Enter gets what --yes writes."""
    models = [copy(path, tmp_path / path.name) for path in tiny.experts[:2]]
    for model, rows in zip(models, tiny.datasets, strict=False):
        card(model, f"datasets: {rows}")
    result = on_a_terminal(monkeypatch, [""] * 4, tiny.base, *models, "-o", tmp_path / "asked.yml")
    assert result.exit_code == 0, result.output
    assert slta("init", tiny.base, *models, "-o", tmp_path / "yes.yml", "--yes").exit_code == 0
    asked, unasked = ((tmp_path / name).read_text() for name in ("asked.yml", "yes.yml"))
    assert asked.replace("asked.yml", "yes.yml") == unasked


def test_answers_are_taken(tiny, tmp_path, monkeypatch):
    """Another base, rows after a mistake, a format, another objective."""
    rows = answers(tmp_path / "rows.jsonl", 45)
    lines = [
        str(tiny.base), str(tmp_path / "none.jsonl"), str(rows), "Q: {question}\\nA: ", "{answer}",
        str(tiny.datasets[1]), "joint",
    ]  # fmt: skip
    result = on_a_terminal(monkeypatch, lines, *tiny.experts[:2], "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    assert "not found" in result.stderr
    content = accepted(tmp_path / "recipe.yml")
    assert content["base_model"] == str(tiny.base)
    assert content["models"][0]["parameters"]["text"] == "Q: {question}\nA: "
    assert content["models"][1]["parameters"] == {"dataset": str(tiny.datasets[1])}
    assert content["parameters"]["objective"] == "joint"


def test_columns_that_are_not_clear_are_asked_for(tiny, tmp_path, monkeypatch):
    """A terminal asks for the template; without one the columns are listed and nothing is written."""
    rows = tmp_path / "odd.jsonl"
    rows.write_text('{"left": "the quick", "right": "brown fox"}\n' * 3)
    arguments = (tiny.base, tiny.experts[0], "--data", f"expert1={rows}", "-o", tmp_path / "recipe.yml")
    assert_refused(slta("init", *arguments), "missing-column", rows, "left, right")
    assert not (tmp_path / "recipe.yml").exists()
    result = on_a_terminal(monkeypatch, ["", "{left} {right}", "", ""], *arguments)
    assert result.exit_code == 0, result.output
    assert accepted(tmp_path / "recipe.yml")["models"][0]["parameters"]["text"] == "{left} {right}"


def test_a_chat_template_is_asked_for(tiny, tmp_path, monkeypatch):
    """Where the rows are chats and no model has a template, and again if the tokenizer splits its tokens."""
    models = [copy(path, tmp_path / path.name) for path in (tiny.base, tiny.experts[0])]
    for model in models:
        make_tokenizer(None).save_pretrained(model)
        (model / "chat_template.jinja").unlink(missing_ok=True)
    rows = tmp_path / "chats.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "and"}]}\n' * 3
    )
    arguments = (*models, "--data", f"expert1={rows}", "-o", tmp_path / "recipe.yml")
    assert_refused(slta("init", *arguments), "missing-chat-template")
    result = on_a_terminal(monkeypatch, ["", "chatml", "", ""], *arguments)
    assert result.exit_code == 0, result.output
    assert accepted(tmp_path / "recipe.yml")["chat_template"] == "alpaca"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tiny, tmp_path):
    """A file that is there stays, with --overwrite it goes; rows and links never do."""
    path = tmp_path / "recipe.yml"
    path.write_text("mine")
    models = (tiny.base, *tiny.experts[:2])
    assert_refused(slta("init", *models, "-o", path), "foreign-file", path, "--overwrite")
    assert path.read_text() == "mine"
    assert slta("init", *models, "-o", path, "--overwrite").exit_code == 0
    accepted(path)
    rows = Path(shutil.copy(tiny.datasets[0], tmp_path / "rows.jsonl"))
    data = [f"--data=expert{number}={rows}" for number in (1, 2)]
    assert_refused(slta("init", *models, *data, "-o", rows, "--overwrite"), "output-is-an-input", rows)
    assert rows.read_bytes() == tiny.datasets[0].read_bytes()
    (tmp_path / "link").symlink_to(path)
    assert_refused(slta("init", *models, "-o", tmp_path / "link", "--overwrite"), "not-a-plain-file")


def test_rows_for_some_experts_only(tiny, tmp_path, monkeypatch):
    """The line to add is said; so it is for one expert without rows."""
    data = ("--data", f"expert1={tiny.datasets[0]}")
    result = slta("init", tiny.base, *tiny.experts[:2], *data, "-o", tmp_path / "recipe.yml")
    assert_refused(result, "missing-dataset", tiny.experts[1], "--data expert2=FILE_OR_ID")
    result = slta("init", tiny.base, tiny.experts[0], "-o", tmp_path / "recipe.yml")
    assert_refused(result, "missing-dataset", "--data expert1=FILE_OR_ID")
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)  # long names are cut in messages
    twins = [copy(tiny.experts[0], Path(number, "final")) for number in "ab"]
    options = ("-o", tmp_path / "recipe.yml", "--data")
    assert_refused(slta("init", tiny.base, *twins, *options, "final=x.jsonl"), "unknown-model", "several", *twins)
    result = slta("init", tiny.base, *twins, *options, f"{twins[0]}={tiny.datasets[0]}")
    assert_refused(result, "missing-dataset", f"--data {twins[1]}=FILE_OR_ID")


def test_what_check_refuses_is_not_written(tiny, tmp_path, make_models):
    """Models of another size, a folder that is not there, an expert without weights of its own."""
    other = make_models("llama", hidden_size=16)
    path = tmp_path / "recipe.yml"
    assert_refused(slta("init", tiny.base, other.experts[0], tiny.experts[0], "-o", path), "differing-sizes")
    for name in (tmp_path / "none", "./none", "a+b+c", "org/a b", "a+"):
        assert_refused(slta("init", tiny.base, name, "-o", path), "missing-model", name)
    assert_refused(slta("init", "--base", tmp_path / "none", tiny.experts[0], "-o", path), "missing-dataset")
    assert_refused(slta("init", tiny.base, tiny.experts[0], tiny.experts[0], "-o", path), "duplicate-model")
    assert_refused(slta("init", "org/none", tiny.experts[0], "-o", path), "hub-unreachable", "org/none")
    assert not path.exists()


@pytest.mark.parametrize(
    ("data", "code", "value"),
    [
        (["expert1"], "invalid-value", "expert1"),
        (["=rows"], "invalid-value", "=rows"),
        (["expert9=rows.jsonl"], "unknown-model", "expert9"),
        (["expert1=a.jsonl", "expert1=b.jsonl"], "duplicate-model", "expert1"),
        (["expert1=none.jsonl"], "dataset-not-found", "none.jsonl"),
    ],
)
def test_wrong_data_options(tiny, tmp_path, data, code, value):
    """Named with what is wrong about them."""
    options = [f"--data={text}" for text in data]
    result = slta("init", tiny.base, *tiny.experts[:2], *options, "-o", tmp_path / "recipe.yml")
    assert_refused(result, code, value)


# --- the base -------------------------------------------------------------------------------------------------------


def lineage(*models: tuple[str, str | None], base: str | None = None) -> tuple[str, list[str]]:
    """The base and the experts, of (name, the base that it names). `+` before a name marks an adapter, `?` before a
    base one that only config.json names."""
    origins = [
        Origin(name.lstrip("+"), name[0] == "+", named and named.lstrip("?"), "its card", (named or "")[:1] != "?")
        for name, named in models
    ]
    found = find_lineage(origins, base)
    return found.base, [found.reference(expert) for expert in found.experts]


def test_rules_for_the_base():
    """Stated; named by the others; named by all; first."""
    assert lineage(("a", "x/y"), ("b", "x/z"), base="c") == ("c", ["a", "b"])
    assert lineage(("c", None), ("a", None), base="c") == ("c", ["a"])
    assert lineage(("a", "org/c"), ("c", None), ("b", None)) == ("c", ["a", "b"])
    assert lineage(("c-it", "c"), ("a", "c-it"), ("b", "x/C-it")) == ("c-it", ["a", "b"])
    assert lineage(("a", "org/c"), ("b", "other/c")) == ("org/c", ["a", "b"])
    assert lineage(("a", "org/c")) == ("org/c", ["a"])
    assert lineage(("+a", "org/c-bnb-4bit"), ("org/c", None)) == ("org/c", ["org/c+a"])
    assert lineage(("c", None), ("a", None)) == ("c", ["a"])
    assert lineage(("c", None), ("a", "x/y"), ("+b", "x/z")) == ("c", ["a", "c+b"])
    assert lineage(("c", "?/old/place"), ("a", None)) == ("c", ["a"])
    assert lineage(("c", None), ("a", "?c")) == ("c", ["a"])
    assert lineage(("c", None), ("a", "c"), ("b", "?old/place")) == ("c", ["a", "b"])
    assert lineage(("a", "?org/c")) == ("org/c", ["a"])
    here = str(Path(__file__).parent)
    assert lineage(("a", f"?{here}"), ("b", f"?{here}")) == (here, ["a", "b"])


@pytest.mark.parametrize(
    "models",
    [
        [("a", None)],
        [("a", "org/x"), ("b", "org/y")],
        [("a", "org/x"), ("b", None)],
        [("a", "/not/here")],
        [("+a", None), ("b", None)],
        [("c", None), ("d", "c"), ("e", "d")],
        [("c", None), ("a", "c"), ("b", "org/x")],
        [("copy-of-c", "?org/c"), ("a", "?org/c")],
        [("copy-of-c", "?org/c"), ("a", "org/c")],
        [("runs/checkpoint-100", "org/x"), ("a", "/train/checkpoint-100")],
    ],
)
def test_a_base_that_is_not_clear(models):
    """One line with what every model names."""
    with refused(
        RecipeError,
        "missing-base",
        *(f"{name.lstrip('+')} names {(base or 'none').lstrip('?')}" for name, base in models),
    ):
        lineage(*models)


def test_what_a_model_says_of_itself(tiny, tmp_path, caplog):
    """Several bases are none, a damaged card is left out, and `_name_or_path` counts only for want of anything else."""
    model = copy(tiny.experts[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/start"}))
    assert (read_origin(str(model)).base, read_origin(str(model)).is_sure) == ("org/start", False)
    assert read_origin(str(card(model, "base_model: [a/b, c/d]"))).base == "org/start"
    assert read_origin(str(card(model, "base_model: a/b"))).base == "a/b"
    assert read_origin(str(card(model, "datasets: [a/b, ../c, 3, a/b]"))).datasets == ("a/b",)
    assert read_origin(str(card(model, "base_model: ["))).base == "org/start"
    assert "front matter" in caplog.text
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/model"}))
    assert read_origin(str(model)).base is None
    assert read_origin("org/base+org/adapter").base == "org/base"


# --- columns and text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, Keys("messages")),
        ({"instruction": "a", "output": "b"}, Keys("instruction with output")),
        ({"question": "How many?", "answer": 3}, Keys("question with answer", "{question}\n", "{answer}")),
        ({"Problem": "1 + 1 =", "Solution": "2"}, Keys("Problem with Solution", "{Problem} ", "{Solution}")),
        ({"input": "a", "target": "b", "id": 7}, Keys("input with target", "{input} ", "{target}")),
        ({"id": 7, "content": "a", "path": "b"}, Keys("content", "content")),
        ({"id": 7, "story": "a"}, Keys("story", "story")),
        ({"left": "a", "right": "b"}, None),
        ({"question": "a", "answer": ["b"]}, None),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, None),
        ({"question": "a", "context": "b", "answer": "c"}, None),
        ({"article": "a", "highlights": "b"}, None),
        ({"id": 7}, None),
    ],
)
def test_what_columns_hold(row, keys):
    """Known formats need no keys; questions and answers, and lone texts, are found by their names."""
    assert guess_keys([row] * 3, list(row)) == keys


NAMES = [
    "no", "1e3", "~", "a b", "a: b", "a #b", "- a", "'a'", '"a"', "{a}\n{b}", "a\tb", "ä/ö", "\U0001f600", "[a]", "&a",
    "*a", "a\\n", "", "2024-01-01", "a\u2028b", "%a", "@a", "`a`", "key: |\n  b", "0x10", ".5", "models/base",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_text_reads_back(name):
    """As a value alone, and in a recipe; also for readers of newer YAML, where 1e3 is a number."""
    assert "\n" not in scalar(name)
    assert yaml.safe_load(f"a: {scalar(name)}") == {"a": name}
    task = DraftTask(name, (f"note {name}",), name, name, name, name, name)
    draft = Draft(name, name, name, [task, DraftTask(name)], "joint", name, tokenizer={"source": "base"})
    content = yaml.safe_load(recipe_text(draft))
    parameters = dict.fromkeys(("dataset", "dataset_config", "split", "text", "completion"), name)
    assert content["base_model"] == name
    assert content["models"] == [{"model": name, "parameters": parameters}, {"model": name}]
    assert scalar("1e3") == '"1e3"'
    free = yaml.safe_load(recipe_text(Draft(name, name, name, [DraftTask(name)], "data_free")))
    assert free["models"] == [{"model": name}]


def test_special_names_of_folders(tiny, tmp_path, monkeypatch):
    """Models that YAML would read as something else pass `check`."""
    monkeypatch.chdir(tmp_path)
    for source, name in zip((tiny.base, *tiny.experts[:2]), ("no", "1e3", "a b: #c"), strict=True):
        Path(name).symlink_to(source)
    assert slta("init", "no", "1e3", "a b: #c").exit_code == 0
    content = accepted("recipe.yml")
    assert [content["base_model"], *(entry["model"] for entry in content["models"])] == ["no", "1e3", "a b: #c"]


def test_everything_is_told(tiny: Models, tmp_path, monkeypatch):
    """An expert that names another base is warned of, and the recipe is written."""
    monkeypatch.chdir(tmp_path)  # long names are cut in messages
    model = card(copy(tiny.experts[0], Path("expert")), "base_model: org/other")
    result = slta("init", tiny.base, model, tiny.experts[1], "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    assert f"Warning: {model} names org/other as its base" in result.stderr


def test_splits_and_configs_of_a_folder(tiny, tmp_path):
    """Where there is no split `train`, or there are several configs, one is written into the recipe."""
    tests, several = tmp_path / "tests", tmp_path / "several"
    for folder in (tests, several):
        folder.mkdir()
    answers(tests / "test.jsonl", 6)
    for name, count in (("socratic", 6), ("main", 7), ("test", 5)):
        answers(several / f"{name}.jsonl", count)
    files = "[{split: test, path: test.jsonl}, {split: train, path: %s.jsonl}]"
    configs = [f"- {{config_name: {name}, data_files: {files % name}}}" for name in ("socratic", "main")]
    card(several, "\n".join(["configs:", *configs]))
    data = [f"--data=expert1={tests}", f"--data=expert2={several}"]
    result = slta("init", tiny.base, *tiny.experts[:2], *data, "-o", tmp_path / "recipe.yml")
    assert result.exit_code == 0, result.output
    one, two = (entry["parameters"] for entry in accepted(tmp_path / "recipe.yml")["models"])
    assert (one["split"], one.get("dataset_config")) == ("test", None)
    assert (two.get("split"), two["dataset_config"]) == (None, "main")
    assert "# 7 rows: `question` and `answer`." in (tmp_path / "recipe.yml").read_text()


def test_an_adapter_folder_with_a_config(tmp_path):
    """Some trainers put the base's config beside an adapter: without weights it is an adapter all the same."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/other"}')
    assert read_origin(str(tmp_path)).is_adapter
    assert read_origin(str(tmp_path)).base == "org/base"
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert not read_origin(str(tmp_path)).is_adapter


def test_the_recipe_in_the_documentation_is_what_is_written():
    """docs/init.md shows the text of today."""
    document = (Path(__file__).parents[1] / "docs" / "init.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    tasks = [
        DraftTask("models/math", ("4000 rows: `question` and `answer`.",), "data/math.jsonl", text="{question} ",
                  completion="{answer}"),
        DraftTask("models/words", ("4000 rows: `messages`.", "Chats are rendered with its own chat template "
                                   "(`<|assistant|>`)."), "data/words.jsonl"),
        DraftTask("models/numbers", ("4000 rows: `question` and `answer`.",), "data/numbers.jsonl", text="{question} ",
                  completion="{answer}"),
    ]  # fmt: skip
    why = "Every task has at least 30 rows with answers."
    draft = Draft("recipe.yml", "models/base", "named first", tasks, "joint", why, out_dtype="bfloat16")
    assert recipe_text(draft) == shown
    assert why in document


def test_joint_is_not_proposed_without_enough_rows_with_known_answers():
    """The reason says which it is: too few rows, or plain text."""

    def rows(number: int, completion: int) -> TaskRows:
        return TaskRows("m", "d.jsonl", tuple(Row(place, "", (1, 2, 3, 4), completion) for place in range(number)))

    def why(drawn: TaskRows | None) -> str:
        return why_not_joint([(DraftTask("m", (), "d.jsonl"), drawn)])

    assert why(rows(30, 2)) == ""
    assert why(rows(30, 1)).startswith("`joint` needs to know where answers begin, and d.jsonl is plain text: give")
    assert why(rows(29, 2)) == "`joint` needs 30 rows for every task; there are fewer for m."
    assert "could not be looked at" in why(None)
