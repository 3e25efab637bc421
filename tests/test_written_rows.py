"""`dataset: self`: experts write their own calibration rows."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import WORDS, Models, assert_refused, make_tokenizer, mergekit_yaml, read, refused, slta
from test_generation import candidate

from mergekit_slta import Alphas
from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError, RecipeError
from mergekit_slta.generation import sampling, write
from mergekit_slta.generation.prompts import make_prompt
from mergekit_slta.job.preflight import prepare

LENGTH, SAMPLES = 64, 4


def train(model: torch.nn.Module, texts: list[str], epochs: int) -> torch.nn.Module:
    """A copy that has learnt some texts."""
    model, tokenizer = copy.deepcopy(model), make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for start in range(0, len(texts), 8):
            batch = [tokenizer(text, add_special_tokens=False).input_ids for text in texts[start : start + 8]]
            longest = max(map(len, batch))
            ids = torch.tensor([row + [1] * (longest - len(row)) for row in batch])
            labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def chats(seed: int, words: list[str]) -> list[str]:
    """Short chats as the template renders them."""
    rng = random.Random(seed)
    return [
        f"<s><|user|>{' '.join(rng.choices(words, k=3))}</s><|assistant|>{' '.join(rng.choices(words, k=4))}</s>"
        for _ in range(64)
    ]


@pytest.fixture(scope="module")
def writers(make_models, tmp_path_factory) -> Models:
    """A base and two experts that have learnt to chat in the template of their tokenizer."""
    folder = tmp_path_factory.mktemp("writers")
    start = transformers.AutoModelForCausalLM.from_pretrained(make_models("llama").base)
    base = train(start, chats(0, WORDS), 8)
    paths = []
    for number, model in enumerate([base, train(base, chats(1, WORDS[:6]), 3), train(base, chats(2, WORDS[6:]), 3)]):
        paths.append(folder / ("base", "math", "words")[number])
        model.save_pretrained(paths[-1])
        make_tokenizer().save_pretrained(paths[-1])
    return Models(folder, paths[0], tuple(paths[1:]), ())


def recipe_of(models: Models, *, dataset: str | None = "self", **parameters: object) -> dict:
    """A recipe whose experts write their rows."""
    own = {} if dataset is None else {"parameters": {"dataset": dataset}}
    return {
        "merge_method": "submodule_linear", "base_model": str(models.base),
        "models": [{"model": str(expert), **copy.deepcopy(own)} for expert in models.experts],
        "parameters": {"num_samples": SAMPLES, "max_seq_length": LENGTH, **parameters},
    }  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def merged(writers, tmp_path_factory) -> Path:
    """What the stock command makes of a recipe that names no dataset."""
    out = tmp_path_factory.mktemp("merged") / "out"
    path = out.with_name("recipe.yml")
    path.write_text(yaml.safe_dump(recipe_of(writers, dataset=None)))
    result = mergekit_yaml(path, out, card=True)
    assert result.exit_code == 0, result.output
    assert "No model names a dataset: each expert writes its own rows" in result.stderr
    return out


def test_a_recipe_without_datasets_merges_in_one_go(writers, merged):
    """The rows are in OUT, the alphas file says who wrote them, and the card shows three of each expert."""
    for name in ("math", "words"):
        rows = lines(merged / "slta_rows" / f"{name}.jsonl")
        assert len(rows) == SAMPLES
        assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
        assert all(message["content"].strip() for row in rows for message in row["messages"])
    tasks = Alphas.load(merged / "slta_alphas.json").calibration["tasks"]
    assert [task["dataset"] for task in tasks] == ["self", "self"]
    card = (merged / "README.md").read_text()
    assert card.count("```text\nuser: ") == 6
    assert "written by the expert" in card
    assert not (merged / ".slta_calibrating").exists()


def test_a_recipe_that_leaves_everything_open_is_data_free(writers, tmp_path):
    """No dataset, no objective, no key about rows: the very merge of `objective: data_free`, and it is said so. With
    one expert, which no closed form combines, or a hint, rows are written; `rows` writes them in any case."""
    paths = [tmp_path / "open.yml", tmp_path / "stated.yml"]
    content = recipe_of(writers, dataset=None)
    for path, parameters in zip(paths, ({}, {"objective": "data_free"}), strict=True):
        path.write_text(yaml.safe_dump({**content, "parameters": parameters}))
    results = [mergekit_yaml(path, path.with_suffix("")) for path in paths]
    assert [result.exit_code for result in results] == [0, 0]
    assert "No model names a dataset: the merge has `objective: data_free`" in results[0].stderr
    files = [path.with_suffix("") / "model.safetensors" for path in paths]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "open" / "slta_rows").exists()
    hinted = [dict(model) for model in content["models"]]
    hinted[0]["parameters"] = {"hint": "the fox"}
    for models in (content["models"][:1], hinted):
        paths[0].write_text(yaml.safe_dump({**content, "models": models, "parameters": {}}))
        assert "each expert writes its own rows" in slta("check", paths[0]).stderr
    for parameters in ({"compute_dtype": "float32"}, {"direction": "swudi_a"}, {"alphas": str(tmp_path / "no.json")}):
        paths[0].write_text(yaml.safe_dump({**content, "parameters": parameters}))
        assert "objective data_free" in slta("check", paths[0]).output
    for parameters in ({"direction": "none"}, {"ridge": 0.1}, {"granularity": "layer"}):
        paths[0].write_text(yaml.safe_dump({**content, "parameters": parameters}))
        assert "each expert writes its own rows" in slta("check", paths[0]).stderr
    small = {"num_samples": 1, "max_seq_length": LENGTH}
    paths[0].write_text(yaml.safe_dump({**content, "parameters": small}))
    assert slta("rows", paths[0], "-o", tmp_path / "rows").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "rows").glob("*.jsonl")) == ["math.jsonl", "words.jsonl"]


def test_a_forgotten_dataset_is_no_wish_for_other_rows(writers, tmp_path):
    """Keys about the rows of a dataset, or `evaluate`, in a recipe that names none: refused, not merged otherwise."""
    path = tmp_path / "recipe.yml"
    content = recipe_of(writers, dataset=None)
    for parameters in ({}, {"objective": "features"}):
        models = [dict(model) for model in content["models"]]
        models[1]["parameters"] = {"text": "{question} ", "split": "test"}
        path.write_text(yaml.safe_dump({**content, "models": models, "parameters": parameters}))
        assert_refused(slta("check", path), "conflicting-keys", "words", "`text`", "`split`", "no `dataset`")
    path.write_text(yaml.safe_dump({**content, "parameters": {"evaluate": True}}))
    assert_refused(slta("check", path), "missing-dataset", "math")
    path.write_text(yaml.safe_dump({**content, "parameters": {}}))
    assert "each expert writes its own rows" in slta("linearity", path, "-o", tmp_path / "l.json").stderr


def test_a_merge_that_is_done_again_uses_its_rows(writers, merged, tmp_path, monkeypatch):
    """No expert writes again, the alphas are reused, and the rows stay."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    before = {path.name: path.read_bytes() for path in (out / "slta_rows").iterdir()}
    monkeypatch.setattr(write, "write_batch", None)
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(writers)))
    result = mergekit_yaml(path, out)
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.stderr
    assert {path.name: path.read_bytes() for path in (out / "slta_rows").iterdir()} == before


def test_an_interrupted_run_with_another_seed_does_not_replace_the_rows_of_a_merge(
    writers, merged, tmp_path, monkeypatch
):
    """What it has written is not of the weights that are merged. Nothing is written again for weights that are at hand,
    also if their rows are gone: then there are none."""
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    shutil.copytree(merged, out)
    path.write_text(yaml.safe_dump(recipe_of(writers, seed=7)))
    assert slta("rows", path, "-o", out / ".slta_calibrating" / "slta_rows").exit_code == 0
    path.write_text(yaml.safe_dump(recipe_of(writers)))
    monkeypatch.setattr(write, "write_batch", None)
    assert slta("merge", path, out).exit_code == 0
    for kept in (merged / "slta_rows").iterdir():
        assert (out / "slta_rows" / kept.name).read_bytes() == kept.read_bytes()
    shutil.rmtree(out / "slta_rows")
    result = slta("merge", path, out)
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.stderr
    assert not (out / "slta_rows").exists()
    shutil.copy(out / "slta_alphas.json", tmp_path / "slta_alphas.json")
    assert "Already" in slta("calibrate", path, "-o", tmp_path / "slta_alphas.json").stderr


def test_a_card_does_not_show_edited_rows_as_the_experts(merged, tmp_path):
    """Nor those of another calibration."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    file = out / "slta_rows" / "math.jsonl"
    file.write_text(file.read_text().replace('"user"', '"user" '))
    record = out / "slta_rows" / "words.json"
    record.write_text(record.read_text().replace('"run": "', '"run": "0'))
    assert slta("report", out).exit_code == 0
    card = (out / "README.md").read_text()
    assert "wrote its" in (merged / "README.md").read_text()
    assert "wrote its" not in card


@pytest.fixture(scope="module")
def rows(writers, tmp_path_factory) -> Path:
    """The files that `mergekit-slta rows` writes for the same recipe."""
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(writers)))
    result = slta("rows", path, "-o", folder / "rows")
    assert result.exit_code == 0, result.output
    assert f"({SAMPLES} rows)" in result.stderr
    return folder / "rows"


def test_the_same_recipe_gives_the_same_bytes(merged, rows):
    """Of another run, in another folder."""
    names = sorted(path.name for path in rows.iterdir())
    assert names == ["math.json", "math.jsonl", "words.json", "words.jsonl"]
    assert all((rows / name).read_bytes() == (merged / "slta_rows" / name).read_bytes() for name in names)


def test_files_named_as_datasets_give_the_same_alphas(writers, merged, rows, tmp_path):
    recipe = recipe_of(writers)
    for entry, name in zip(recipe["models"], ("math", "words"), strict=True):
        entry["parameters"]["dataset"] = str(rows / f"{name}.jsonl")
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    assert slta("calibrate", path, "-o", tmp_path / "alphas.json").exit_code == 0
    one, other = Alphas.load(tmp_path / "alphas.json"), Alphas.load(merged / "slta_alphas.json")
    assert [entry.alpha for entry in one.submodules] == [entry.alpha for entry in other.submodules]


def test_the_experts_write_what_they_were_trained_on(rows):
    """`math` has learnt the first six words, `words` the others."""

    def share(name: str, words: list[str]) -> float:
        found = " ".join(message["content"] for row in lines(rows / name) for message in row["messages"]).split()
        return sum(word in words for word in found) / len(found)

    assert share("math.jsonl", WORDS[:6]) > share("words.jsonl", WORDS[:6])


def test_a_killed_run_goes_on(writers, rows, tmp_path, monkeypatch):
    """Finished batches are read, and the files are the same to the byte."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(writers)))
    written = write.write_batch
    monkeypatch.setattr(write, "BATCH_ROWS", 16)
    calls: list[object] = []

    def once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return written(*arguments)

    monkeypatch.setattr(write, "write_batch", once)
    result = slta("rows", path, "-o", tmp_path / "rows")
    assert result.exit_code == 130
    assert "Interrupted: finished batches of rows are kept; run the same command again" in result.stderr
    monkeypatch.setattr(write, "write_batch", lambda *arguments: calls.append(arguments[2]) or written(*arguments))
    result = slta("rows", path, "-o", tmp_path / "rows")
    assert result.exit_code == 0, result.output
    assert "Resuming an earlier run: 1 of 1 batches of rows of" in result.stderr
    assert len(calls) == 2
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == sorted(path.name for path in rows.iterdir())
    assert all(path.read_bytes() == (rows / path.name).read_bytes() for path in (tmp_path / "rows").iterdir())


def identity(recipe: dict, options) -> dict[str, str]:
    return prepare(read(recipe), options, for_merge=False, plan_only=True).identity


def test_check_writes_nothing_and_knows_the_identity(writers, merged, options, tmp_path, monkeypatch):
    """It is the one of the finished merge; hint, seed, length and number of rows change it."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(writers)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("check", "recipe.yml")
    assert "written by the expert itself (`dataset: self`)" in result.output
    assert f"{SAMPLES} rows each, chosen from {3 * SAMPLES}" in " ".join(result.output.split())
    numbers = json.loads(slta("check", "recipe.yml", "--json").stdout)
    assert numbers["phases"][0]["name"] == "rows"
    assert [(task["planned"], "first_row" in task) for task in numbers["experts"]] == [(True, False)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]
    found = identity(recipe, options)
    assert found == Alphas.load(merged / "slta_alphas.json").identity
    hinted = recipe_of(writers)
    hinted["models"][0]["parameters"]["hint"] = "the fox"
    label = f"rows of {writers.experts[0]}"
    others = [identity(recipe_of(writers, **{key: value}), options)
              for key, value in (("seed", 1), ("num_samples", 3), ("max_seq_length", 63))]  # fmt: skip
    others.append(identity(hinted, options))
    assert len({one[label] for one in (found, *others)}) == 5
    assert others[-1][f"rows of {writers.experts[1]}"] == found[f"rows of {writers.experts[1]}"]


def test_other_weights_give_other_rows(writers, rows, tmp_path):
    """A file of an earlier run is not used for them; it is replaced."""
    shutil.copytree(rows, tmp_path / "rows")
    shutil.copytree(writers.experts[1], tmp_path / "math")
    recipe = recipe_of(replace(writers, experts=(tmp_path / "math", writers.experts[1])))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert slta("rows", tmp_path / "recipe.yml", "-o", tmp_path / "rows").exit_code == 0
    assert (tmp_path / "rows" / "math.jsonl").read_bytes() != (rows / "math.jsonl").read_bytes()
    assert (tmp_path / "rows" / "words.jsonl").read_bytes() == (rows / "words.jsonl").read_bytes()


def test_an_edited_file_is_neither_used_nor_replaced(writers, rows, tmp_path):
    shutil.copytree(rows, tmp_path / "rows")
    edited = tmp_path / "rows" / "math.jsonl"
    edited.write_text(edited.read_text().replace("a", "b"))
    kept = edited.read_bytes()
    for seed in (42, 7):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(writers, seed=seed)))
        result = slta("rows", tmp_path / "recipe.yml", "-o", tmp_path / "rows")
        assert_refused(result, "foreign-file", edited)
    assert edited.read_bytes() == kept


def with_tokenizer(models: Models, folder: Path, template: str | None) -> Models:
    """The same weights with another chat template."""
    paths = []
    for path in (models.base, *models.experts):
        paths.append(folder / path.name)
        shutil.copytree(path, paths[-1])
        (paths[-1] / "chat_template.jinja").unlink(missing_ok=True)
        make_tokenizer(template).save_pretrained(paths[-1])
    return replace(models, base=paths[0], experts=tuple(paths[1:]))


def test_a_model_without_a_template_needs_a_hint(writers, tmp_path):
    """With one, every row begins with it."""
    models = with_tokenizer(writers, tmp_path, None)
    recipe = recipe_of(models, num_samples=2)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    for command in (["check"], ["rows", "-o", tmp_path / "rows"]):
        result = slta(command[0], tmp_path / "recipe.yml", *command[1:])
        assert_refused(result, "missing-chat-template", models.experts[0], "hint")
    for entry in recipe["models"]:
        entry["parameters"]["hint"] = "the fox"
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("calibrate", tmp_path / "recipe.yml", "-o", tmp_path / "alphas.json")
    assert result.exit_code == 0, result.output
    found = lines(tmp_path / "slta_rows" / "math.jsonl")
    assert [row["prompt"] for row in found] == ["the fox\n"] * 2
    assert all(row["completion"].strip() for row in found)


def test_a_template_that_hides_the_user_turn_is_refused(writers, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] | upper }}</s>{% endfor %}"
    models = with_tokenizer(writers, tmp_path, template)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(models)))
    assert_refused(slta("check", tmp_path / "recipe.yml"), "invalid-template", models.experts[0])


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"dataset": "self", "text": "{question}"}, "text"),
        ({"dataset": "rows.jsonl", "hint": "numbers"}, "hint"),
        ({"dataset": None, "hint": "numbers"}, "hint"),
    ],
)  # fmt: skip
def test_keys_that_conflict(writers, change, value, options):
    recipe = recipe_of(writers)
    recipe["models"][0]["parameters"] = {key: each for key, each in change.items() if each is not None}
    with refused(RecipeError, "conflicting-keys", value):
        prepare(read(recipe), options, plan_only=True)


def test_where_some_models_name_a_dataset_the_others_must(writers, options):
    recipe = recipe_of(writers)
    del recipe["models"][0]["parameters"]
    with refused(DataError, "missing-dataset", writers.experts[0], "dataset: self"):
        prepare(read(recipe), options, plan_only=True)


def test_data_free_takes_no_written_rows(writers):
    with refused(RecipeError, "conflicting-keys", "dataset: self", "data_free"):
        read(recipe_of(writers, objective="data_free"))


def test_compare_and_rows_say_what_they_cannot_use(writers, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(writers)))
    assert_refused(slta("compare", path, "-o", tmp_path / "out"), "conflicting-keys", "compare")
    path.write_text(yaml.safe_dump(recipe_of(writers, dataset=str(path))))
    assert_refused(slta("rows", path, "-o", tmp_path / "rows"), "conflicting-keys", "no expert of the recipe writes")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([candidate(number, prompt="", answer="") for number in range(12)], "empty: it writes only end tokens)"),
        ([candidate(number, answer="", ids=(0, 5, 6, 1, 1)) for number in range(12)], "(all are empty)"),
        ([candidate(number) for number in range(12)], "its rows are all alike"),
        ([candidate(number, is_complete=False) for number in range(12)], "raise `max_seq_length`"),
    ],
)
def test_experts_that_write_nothing_of_use(writers, made, message, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "write_batch", lambda *_: made)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(writers)))
    result = slta("rows", tmp_path / "recipe.yml", "-o", tmp_path / "rows")
    assert_refused(result, "too-few-rows", writers.experts[0], message)
    assert not (tmp_path / "rows" / "math.jsonl").exists()


def test_a_template_that_leaves_out_part_of_the_answers_is_refused_at_once(writers, tmp_path, monkeypatch):
    """Behind the first batch, if (nearly) all answers that end lose a part."""
    made = [candidate(number, answer="<think>a</think> b", is_whole=number > 10) for number in range(16)]
    batches: list[object] = []
    path, out = tmp_path / "recipe.yml", tmp_path / "rows"
    path.write_text(yaml.safe_dump(recipe_of(writers, num_samples=8)))
    monkeypatch.setattr(write, "write_batch", lambda *arguments: batches.append(arguments[2]) or made)
    result = slta("rows", path, "-o", out)
    assert_refused(result, "too-few-rows", writers.experts[0], "22 shortened by the chat template", "set another")
    batches.clear()
    shutil.rmtree(out)
    made[12:] = [replace(one, is_ended=False) for one in made[12:]]
    result = slta("rows", path, "-o", out)
    assert_refused(result, "invalid-template", writers.experts[0], "11 of 12, such as <think>a</think> b")
    assert len(batches) == 1


def test_an_end_token_of_the_generation_config_is_part_of_the_identity(writers, tmp_path, options):
    """Rows end with it, though it is no special token; special ones end a turn in any case."""
    models = with_tokenizer(writers, tmp_path, make_tokenizer().chat_template)
    label = f"rows of {models.experts[0]}"
    found = []
    for ends in (1, [1, 0], [1, 7]):
        (models.experts[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        found.append(identity(recipe_of(models), options)[label])
    assert found[0] == found[1] != found[2]


def test_a_model_that_does_not_fit_is_refused(writers, tmp_path, monkeypatch):
    """With what it needs, and what its rows would cost layer by layer."""
    monkeypatch.setattr(write.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(writers)))
    result = slta("rows", tmp_path / "recipe.yml", "-o", tmp_path / "rows")
    assert_refused(result, "out-of-memory", writers.experts[0], "every token would read", exit_code=1)


def test_a_merge_with_saved_weights_writes_no_rows(writers, merged, tmp_path, monkeypatch):
    """To verify them it needs rows: those beside the weights, which are then in OUT, too."""
    shutil.copy(merged / "slta_alphas.json", tmp_path / "alphas.json")
    monkeypatch.setattr(write, "write_batch", None)
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(writers, alphas=str(tmp_path / "alphas.json"))))
    assert mergekit_yaml(path, tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "slta_rows").exists()
    result = slta("merge", path, tmp_path / "verified", "--verify")
    assert_refused(result, "missing-dataset", writers.experts[0], "that is written yet")
    shutil.copytree(merged / "slta_rows", tmp_path / "slta_rows")
    result = slta("merge", path, tmp_path / "verified", "--verify")
    assert result.exit_code == 0, result.output
    name = Path("slta_rows") / "math.jsonl"
    assert (tmp_path / "verified" / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.parametrize("dataset", ["self", None])
def test_weights_from_rows_of_another_hint_are_refused(writers, merged, dataset, tmp_path):
    """Whether or not the recipe says that the experts wrote the rows."""
    recipe = recipe_of(writers, dataset=dataset, alphas=str(merged / "slta_alphas.json"))
    recipe["models"][0].setdefault("parameters", {})["hint"] = "the fox"
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    for command in (["check"], ["merge", tmp_path / "out"]):
        result = slta(command[0], tmp_path / "recipe.yml", *command[1:])
        assert_refused(result, "alphas-of-another-merge", f"rows of {writers.experts[0]}")


def test_joint_holds_out_rows_that_were_written(writers, tmp_path):
    """With enough of them for its steps; and the rows stay where a recipe names them as a dataset."""
    parameters = {"objective": "joint", "direction": "none", "steps": 1, "num_samples": 12, "compute_dtype": "float32"}
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe_of(writers, **parameters)))
    result = mergekit_yaml(path, out)
    assert result.exit_code == 0, result.output
    file = out / "slta_rows" / "math.jsonl"
    kept = file.read_bytes()
    tasks = Alphas.load(out / "slta_alphas.json").calibration["tasks"]
    assert [(len(task["rows"]), len(task["held_out"])) for task in tasks] == [(12, 3)] * 2
    recipe = recipe_of(writers, **parameters)
    for entry, name in zip(recipe["models"], ("math", "words"), strict=True):
        entry["parameters"]["dataset"] = str(out / "slta_rows" / f"{name}.jsonl")
    path.write_text(yaml.safe_dump(recipe))
    result = mergekit_yaml(path, out)
    assert result.exit_code == 0, result.output
    assert file.read_bytes() == kept


def test_rows_do_not_depend_on_their_batch(writers):
    """Written alone, or with others that end sooner, by the model's own forward without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(writers.experts[0]).double()
    tokenizer = make_tokenizer()
    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", LENGTH)

    def cached(ids, cache):
        output = model(ids, past_key_values=cache, use_cache=True)
        return output.logits, output.past_key_values

    def whole(ids, cache):
        return model(ids, use_cache=False).logits, None

    device = torch.device("cpu")
    with torch.no_grad():
        together = sampling.write_batch(cached, prompt, range(6), "key", LENGTH, tokenizer, device)
        alone = [sampling.write_batch(whole, prompt, [n], "key", LENGTH, tokenizer, device)[0] for n in range(6)]
    assert [row.ids for row in together] == [row.ids for row in alone]
    for row in together:
        if row.is_ended:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}], tokenize=False
            )
            assert tokenizer.decode(row.ids) == rendered
