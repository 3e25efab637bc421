"""The output's tokenizer, and the tokenizer and chat template that each model was trained with."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from conftest import CHAT_TEMPLATE, make_tokenizer, mergekit_yaml, read, refused
from mergekit.common import ModelReference

from mergekit_slta.checkpoints.tokenizers import differing_tokens, own_tokenizer
from mergekit_slta.errors import DataError, ModelError
from mergekit_slta.job.preflight import prepare

OWN = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"


@pytest.fixture
def adapter(tiny, tmp_path):
    """A folder for an adapter's tokenizer files, and the adapter on the base."""
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter", ModelReference.parse(f"{tiny.base}+{tmp_path / 'adapter'}")


def test_an_adapter_has_its_own_tokenizer_and_template(adapter, options):
    """Trainers save both beside the adapter; a template that its tokenizer lacks is not taken from the base."""
    folder, model = adapter
    assert own_tokenizer(model, options).template == CHAT_TEMPLATE  # the base's: the folder has none
    tokenizer = make_tokenizer(OWN)
    tokenizer.add_tokens(["<|x|>"])
    tokenizer.save_pretrained(folder)
    own = own_tokenizer(model, options)
    assert own.template == OWN
    assert "<|x|>" in own.tokenizer.get_vocab()
    (folder / "chat_template.jinja").unlink()
    assert own_tokenizer(model, options).template is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", OWN),
        ("tokenizer_config.json", json.dumps({"chat_template": OWN})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": OWN}]})),
        ("tokenizer_config.json", json.dumps({"chat_template": OWN, "tokenizer_class": "Qwen2Tokenizer"})),
    ],
)
def test_a_template_alone_beside_an_adapter(adapter, options, name, content):
    """The template is the adapter's, the tokens are its base's."""
    folder, model = adapter
    (folder / name).write_text(content)
    own = own_tokenizer(model, options)
    assert own.template == OWN
    assert own.tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_a_model_without_a_tokenizer_has_no_template(tiny, options, tmp_path):
    """No files are no problem; damaged files, and a model that cannot be reached, are one that has a reason."""
    shutil.copytree(tiny.base, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink()
    bare = ModelReference.parse(str(tmp_path / "bare"))
    assert own_tokenizer(bare, options) == (None, None, None, None)
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    own = own_tokenizer(bare, options)
    assert own[:2] == (None, None)
    assert own.problem
    assert own_tokenizer(ModelReference.parse("org/none"), options).problem


def test_an_experts_damaged_tokenizer_does_not_stop_a_merge(tiny, write_recipe, tmp_path, caplog):
    """Its rows are rendered with the merged model's template, and a line says so; rows of text need no line."""
    shutil.copytree(tiny.experts[0], tmp_path / "expert")
    (tmp_path / "expert" / "tokenizer.json").write_text("{")
    (tmp_path / "expert" / "chat_template.jinja").unlink()
    chat = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "brown fox jumps"}]
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": chat, "text": "so on and so on"}) + "\n")
    recipe = tiny.recipe(2)
    recipe["models"][0] = {"model": str(tmp_path / "expert"), "parameters": {"dataset": str(data)}}
    with caplog.at_level("WARNING"):
        result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    (line,) = [record.getMessage() for record in caplog.records if "cannot be read" in record.message]
    assert line.startswith(f"the tokenizer of {tmp_path / 'expert'} cannot be read")
    caplog.clear()
    recipe["models"][0]["parameters"]["text"] = "text"
    with caplog.at_level("WARNING"):
        result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "cannot be read" not in caplog.text


def test_a_base_whose_tokenizer_has_no_words(make_models, options, tmp_path):
    """transformers makes one for a Qwen2 without tokenizer files: every row would be nothing."""
    models = make_models("qwen2")
    shutil.copytree(models.base, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).unlink()
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "base")) <= 1
    recipe = models.recipe()
    recipe["base_model"] = str(tmp_path / "base")
    for section in ({}, {"tokenizer": {"source": "base"}}):
        with refused(DataError, "unreadable-tokenizer", tmp_path / "base"):
            prepare(read({**recipe, **section}), options, for_merge=False)


def test_the_tokenizer_that_is_missing_is_named(tiny, options, tmp_path):
    """With another model's tokenizer as the source it may still be the base's; a source may be no folder."""
    recipe = tiny.recipe(2)
    expert = recipe["models"][0]["model"]
    for section in ({"tokenizer": {"source": "/no/such/path"}}, {"tokenizer_source": "/no/such/path"}):
        with refused(ModelError, "missing-model", "/no/such/path", next(iter(section))):
            prepare(read({**recipe, **section}), options)
    for name, source in (("base", tiny.base), ("expert", tiny.experts[0])):
        shutil.copytree(source, tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name / file).unlink()
    with refused(DataError, "unreadable-tokenizer", f"of {tmp_path / 'expert'}:"):
        prepare(read({**recipe, "tokenizer": {"source": str(tmp_path / "expert")}}), options)
    recipe["base_model"] = str(tmp_path / "base")
    with refused(DataError, "unreadable-tokenizer", f"of {tmp_path / 'base'}:"):
        prepare(read({**recipe, "tokenizer": {"source": expert}}), options)


def test_tokens_with_other_numbers_are_named(tiny, options, tmp_path, caplog):
    """An expert may have a token where the base has another one; a `tokenizer` section merges by name."""
    base, other = make_tokenizer(), make_tokenizer()
    base.add_tokens(["<|a|>", "<|b|>"])
    other.add_tokens(["<|b|>", "<|c|>", "<|d|>"])  # b has a's number, c has b's; d is beyond the base's
    assert differing_tokens(other, base) == ["<|b|>", "<|c|>"]
    assert differing_tokens(base, base) == []
    recipe = tiny.recipe(2)
    for name, tokenizer, source in (("base", base, tiny.base), ("expert", other, tiny.experts[0])):
        shutil.copytree(source, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe["base_model"] = str(tmp_path / "base")
    recipe["models"][0]["model"] = str(tmp_path / "expert")
    for section, lines in (({}, 1), ({"tokenizer": {"source": "union"}}, 0), ({"tokenizer_source": "base"}, 0)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            prepare(read({**recipe, **section}), options, for_merge=False)
        found = [record.getMessage() for record in caplog.records if "numbers 2 tokens" in record.getMessage()]
        assert len(found) == lines
        assert all(str(tmp_path / "expert") in line and "<|b|>" in line for line in found)
