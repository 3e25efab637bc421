"""Experts whose tokenizer, chat template or end token is not the base's are named, by `check` and by the merge."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import tokenizers
import transformers
from conftest import CHAT_TEMPLATE, make_tokenizer, mergekit_yaml, slta

WORD = "Ġover"
"""A token of the tests' vocabulary."""
PLAIN = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def reordered():
    """The tests' tokenizer with two words that have changed their numbers."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["Ġso"], vocab[WORD] = vocab[WORD], vocab["Ġso"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def other_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = WORD
    return tokenizer


def edit(path, name, **changes):
    content = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({**content, **changes}))


OVER = make_tokenizer().convert_tokens_to_ids(WORD)
CHANGES = {
    "another order": (lambda path: reordered().save_pretrained(path), ["numbers 2 tokens in another way", WORD]),
    "another template": (
        lambda path: make_tokenizer(PLAIN).save_pretrained(path), ["chat template of its own", "another", "top-level"]
    ),
    "another end in the tokenizer": (
        lambda path: other_eos().save_pretrained(path), ["ends its answers with Ġover", "stops at </s>"]
    ),
    "another end in the generation config": (
        lambda path: edit(path, "generation_config.json", eos_token_id=[1, OVER]), ["ends its answers with Ġover"]
    ),
    "another end in the config": (
        lambda path: edit(path, "config.json", eos_token_id=OVER), ["ends its answers with Ġover"]
    ),
    "an end beyond the vocabulary": (
        lambda path: edit(path, "config.json", eos_token_id=[1, 319]), ["ends its answers with token 319"]
    ),
    "no other": (lambda path: edit(path, "generation_config.json", eos_token_id=[1], temperature=1.0), []),
    "none in the generation config": (lambda path: (path / "generation_config.json").unlink(), []),
    "fewer ends": (lambda path: edit(path, "config.json", eos_token_id=None), []),
}  # fmt: skip


def experts_own(tiny, tmp_path, change, place="expert"):
    """A recipe of plain texts, one of whose models is a changed copy; the copy."""
    source = tiny.experts[0] if place == "expert" else tiny.base
    path = shutil.copytree(source, tmp_path / place)
    change(path)
    recipe = tiny.recipe(2)
    if place == "expert":
        recipe["models"][0]["model"] = str(path)
    else:
        recipe["base_model"] = str(path)
    return recipe, path


@pytest.mark.parametrize("name", CHANGES)
def test_an_expert_with_another_tokenizer_is_named(tiny, write_recipe, tmp_path, caplog, name):
    """One warning, of `check` and of the stock command, although no row is a chat."""
    change, values = CHANGES[name]
    recipe, path = experts_own(tiny, tmp_path, change)
    for command in (
        lambda: slta("check", write_recipe(recipe)),
        lambda: mergekit_yaml(write_recipe(recipe), tmp_path / "out"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            result = command()
        assert result.exit_code == 0, result.output
        told = [record.message for record in caplog.records if "no better than the base" not in record.message]
        assert len(told) == bool(values), told
        for value in (str(path), *values) if told else ():
            assert value in told[0]


def test_the_base_may_stop_at_more(tiny, write_recipe, tmp_path, caplog):
    """A base that also stops where the experts do is no matter; one that stops elsewhere is, for every expert."""
    recipe, _ = experts_own(
        tiny, tmp_path, lambda path: edit(path, "generation_config.json", eos_token_id=[OVER, 1]), "base"
    )
    with caplog.at_level(logging.WARNING):
        slta("check", write_recipe(recipe))
        assert "ends its answers" not in caplog.text
        edit(tmp_path / "base", "generation_config.json", eos_token_id=OVER)
        slta("check", write_recipe(recipe))
    assert caplog.text.count("ends its answers with </s>, and the merged model stops at Ġover") == 2


def test_ends_are_compared_by_name(tiny, write_recipe, tmp_path, caplog):
    """A merged tokenizer may number tokens in another way; a token is the same under any number."""

    def change(path):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        tokenizer.save_pretrained(path)
        for name in ("config.json", "generation_config.json"):
            edit(path, name, eos_token_id=tokenizer.eos_token_id)

    recipe, path = experts_own(tiny, tmp_path, change)
    with caplog.at_level(logging.WARNING):
        slta("check", write_recipe({**recipe, "tokenizer": {"source": "union"}}))
    assert caplog.text.count(f"{path} ends its answers with <|end|>, and the merged model stops at </s>") == 1


@pytest.mark.parametrize(("top", "told"), [({}, 1), ({"chat_template": "auto"}, 1), ({"chat_template": PLAIN}, 0)])
def test_a_template_that_was_chosen_is_not_warned_of(tiny, write_recipe, tmp_path, caplog, top, told):
    """The recipe's own choice; `auto` takes the base's among equals."""
    recipe, _ = experts_own(tiny, tmp_path, lambda path: make_tokenizer(PLAIN).save_pretrained(path))
    with caplog.at_level(logging.WARNING):
        slta("check", write_recipe({**recipe, **top}))
    assert caplog.text.count("chat template of its own") == told
