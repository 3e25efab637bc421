"""An answer ends with its end token: that of the chat template, or the tokenizer's behind `completion`."""

from __future__ import annotations

import logging
import shutil

import pytest
from conftest import assert_refused, make_tokenizer, mergekit_yaml, read, refused, slta
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from test_rows import write_jsonl
from test_tokens import _Words

from mergekit_slta import Alphas
from mergekit_slta.data.draw import RowSource, draw_rows
from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.data.tokens import encode
from mergekit_slta.errors import RecipeError
from mergekit_slta.recipe.objectives import JointSettings
from mergekit_slta.recipe.read import Settings, Task

CHAT = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TWO_TOKENS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|><|im_end|>\n{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]


def tokenizer_with(template: str | None = None, **changes: object):
    """The tests' tokenizer with the special tokens of a few families."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def ending(tokenizer):
    """A tokenizer that ends every text with </s>, as with `add_eos_token`."""
    processor = type(tokenizer._tokenizer.post_processor)
    tokenizer._tokenizer.post_processor = processor(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def draw(tokenizer, path, max_seq_length=99, **keys):
    task = Task(model=ModelReference.parse("org/a"), dataset=str(path), **keys)
    own = Settings(objective="joint", own=JointSettings(steps=0), num_samples=2, max_seq_length=max_seq_length)
    (drawn,) = draw_rows([RowSource(task, "org/a", own, ChatTemplate.of(tokenizer))])
    return drawn


def answer_of(tokenizer, drawn):
    """The one answer of all rows, as its tokens say it."""
    (answer,) = {tokenizer.decode(row.ids[row.completion :]) for row in drawn.rows}
    return answer


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML, "a dog<|im_end|>"),
        (PHI, "a dog<|end|>"),
        (THINKING, "a dog</s>"),
        (TWO_TOKENS, "<|assistant|>a dog<|end|><|im_end|>"),
        (NO_END, "assistant: a dog"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"), "a dog<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", " </s>"), "a dog </s>"),
    ],
    ids=["ChatML", "Phi-3", "a header that thinks", "two tokens", "no end token", "two lines", "a space before it"],
)
def test_a_chat_ends_with_what_the_assistant_generates(tmp_path, template, answer):
    """Neither the line break behind the end token counts, nor what follows that; the header is the prompt's."""
    tokenizer = tokenizer_with(template)
    drawn = draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2))
    assert answer_of(tokenizer, drawn) == answer
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    for row in drawn.rows:
        assert row.text == whole
        assert list(row.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"][: len(row.ids)]


def test_a_line_break_inside_a_token_is_kept():
    """Where the tokenizer joins the last character and the line break, the token is the answer's."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["dog\n"])
    ids = encode("a dog\n", tokenizer, 99, add_special_tokens=False, answer=1).ids
    assert list(ids) == tokenizer("a dog\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[-1]) == "dog\n"


PAIR = {"prompt": "the fox:\n", "completion": "a dog"}


@pytest.mark.parametrize(
    ("keys", "row", "answer"),
    [
        ({"text": "{prompt}", "completion": "{completion}"}, PAIR, "a dog</s>"),
        ({}, PAIR, "a dog</s>"),
        ({"text": "{prompt}", "completion": "{completion}\n"}, PAIR, "a dog\n</s>"),
        ({"text": "{prompt}", "completion": "{completion}</s>"}, PAIR, "a dog</s>"),
        ({"text": "{prompt}", "completion": "{completion}</s>\n"}, PAIR, "a dog</s>"),
        ({"text": "{prompt}", "completion": "{completion}<|im_end|>\n"}, PAIR, "a dog<|im_end|>"),
        ({"text": "{prompt}", "completion": "{completion}<|user|>"}, PAIR, "a dog<|user|></s>"),
        ({"text": "empty", "completion": "completion"}, {**PAIR, "empty": ""}, "a dog</s>"),
        ({"text": "{prompt}", "completion": "{completion}", "completion_eos": False}, PAIR, "a dog"),
        ({"text": "{prompt}", "completion": "{completion}</s>", "completion_eos": False}, PAIR, "a dog</s>"),
        ({"completion_eos": False}, PAIR, "a dog"),
        ({}, {"prompt": "the fox", "response": "a dog"}, "a dog</s>"),
        ({}, {"instruction": "the fox", "output": "a dog"}, "a dog</s>"),
        ({}, {"chosen": "Human: fox\n\nAssistant: a dog", "rejected": "Human: fox\n\nAssistant: no"}, " a dog</s>"),
        ({}, {"chosen": "Human: fox\n\nAssistant: a dog"}, "Human: fox\n\nAssistant: a dog"),
        ({}, {"text": "the fox\n"}, "the fox\n"),
        ({"text": "{prompt}{completion}"}, PAIR, "the fox:\na dog"),
    ],
)
@pytest.mark.parametrize("adds_eos", [False, True])
def test_the_end_token_follows_completion(tmp_path, keys, row, answer, adds_eos):
    """Once, whatever the completion ends with; a whole text, without an answer, is what the tokenizer makes of it."""
    tokenizer = tokenizer_with()
    tokenizer = ending(tokenizer) if adds_eos else tokenizer
    drawn = draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row] * 2), max_seq_length=400, **keys)
    if adds_eos and drawn.rows[0].completion == 1 and keys.get("text") != "empty":
        answer += "</s>"  # the tokenizer's own
    assert answer_of(tokenizer, drawn) == answer


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 30), adds_eos=st.booleans(), completion_eos=st.booleans())
def test_a_cut_takes_the_end_token_too(length, adds_eos, completion_eos):
    """A row that is cut is the beginning of the whole row; its answer has no end unless there is room for it."""
    tokenizer = ending(make_tokenizer()) if adds_eos else make_tokenizer()
    options = {"add_special_tokens": True, "answer": 4, "completion_eos": completion_eos}
    whole = encode("what is a dog?", tokenizer, 99, **options)
    bare = make_tokenizer()("what is a dog?")["input_ids"]
    assert list(whole.ids) == [*bare, *([1] if completion_eos else [])]
    cut = encode("what is a dog?", tokenizer, length, **options)
    assert cut.ids == whole.ids[:length]
    assert cut.completion == min(whole.completion, len(cut.ids))


def test_a_tokenizer_without_offsets_and_without_an_end_token():
    words = _Words()
    text = "the quick fox jumps"
    bare = encode(text, words, 99, add_special_tokens=True, answer=9)
    assert encode(text, words, 99, add_special_tokens=True, answer=9, completion_eos=True) == bare
    ended = _Words(eos_token="so")
    found = encode(text.replace("fox", "dog"), ended, 99, add_special_tokens=True, answer=9, completion_eos=True)
    assert ended.convert_ids_to_tokens(found.ids) == ["<s>", "the", "quick", "dog", "jumps", "so"]
    assert found.completion == 3


def test_no_end_token_is_said(tmp_path, caplog):
    """A tokenizer without one: the rows are as they are, and a line says so, unless the recipe wants none."""
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR] * 2)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        drawn = draw(tokenizer, path)
    assert answer_of(tokenizer, drawn) == "a dog"
    assert "org/a" in caplog.text
    assert "no end token (`eos_token`)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        draw(tokenizer, path, completion_eos=False)
    assert "eos" not in caplog.text


@pytest.mark.parametrize(
    ("row", "says"), [({"messages": CHAT}, "chats, whose template ends the answers"), ({"text": "fox"}, "whole texts")]
)
def test_a_key_without_effect_is_named(tmp_path, caplog, row, says):
    """As with `chat_template` where no row is a chat."""
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    for keys in ({}, {"completion_eos": True}, {"completion_eos": False}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            draw(make_tokenizer(), path, **keys)
        assert (f"`completion_eos` of org/a has no effect: its rows are {says}" in caplog.text) == bool(keys)


def test_the_key_is_a_truth_value(tiny):
    """And it may stand at the top, for all models."""
    recipe = tiny.recipe_with_answers(completion_eos=False)
    assert [task.completion_eos for task in read(recipe).tasks] == [False] * 3
    recipe["parameters"]["completion_eos"] = "no"
    with refused(RecipeError, "invalid-value", "`completion_eos`", "'no'"):
        read(recipe)


def test_the_end_counts_in_a_merge(tiny, write_recipe, tmp_path):
    """Through the stock command: the alphas are those of rows whose completion names the end token."""
    recipe = tiny.recipe_with_answers(granularity="attn_mlp", objective="joint", steps=0)
    alphas = {}
    for name, eos, completion in (
        ("by_key", True, "{answer}"),
        ("by_hand", False, "{answer}</s>"),
        ("without", False, "{answer}"),
    ):
        for entry in recipe["models"]:
            entry["parameters"] |= {"completion_eos": eos, "completion": completion}
        result = mergekit_yaml(write_recipe(recipe), tmp_path / name)
        assert result.exit_code == 0, result.output
        alphas[name] = [entry.alpha for entry in Alphas.load(tmp_path / name / "slta_alphas.json").submodules]
    assert alphas["by_key"] == alphas["by_hand"] != alphas["without"]


def test_check_sees_an_end_token_without_an_embedding(tiny, write_recipe, tmp_path):
    """An end token beyond the embeddings is refused before a weight is read."""
    shutil.copytree(tiny.base, tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(40)])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = {**tiny.recipe_with_answers(), "base_model": str(tmp_path / "base")}
    assert_refused(slta("check", write_recipe(recipe)), "token-out-of-range", tokenizer.eos_token_id, 320)
    for entry in recipe["models"]:
        entry["parameters"]["completion_eos"] = False
    result = slta("check", write_recipe(recipe))
    assert result.exit_code == 0, result.output
