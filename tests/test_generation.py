"""How experts write rows: prompts, sampling, and which rows are kept."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, make_tokenizer, read, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError
from mergekit_slta.files.names import rows_names
from mergekit_slta.generation import sampling, write
from mergekit_slta.generation.choices import RANDOM_SHARE, num_needed
from mergekit_slta.generation.prompts import make_prompt
from mergekit_slta.generation.selection import Candidate, choose, near_duplicates, repeated_share, usable
from mergekit_slta.job.preflight import prepare
from mergekit_slta.models.running import call_with_cache

LENGTH = 64


def candidate(number: int = 0, prompt: str = "p", answer: str = "a", ids=(0, 5, 6, 1, 7, 8, 9), **changes) -> Candidate:
    made = Candidate(number, prompt, answer, tuple(ids), 1, 3, 4, True, True, -1.0, -3.0)
    return replace(made, **changes)


@pytest.mark.parametrize("kind", ["tied", "adapter"])
def test_the_model_that_writes_is_the_expert(kind, make_models, tmp_path, options):
    """Its logits, token by token with a cache, are those of transformers' own model; also of an adapter on its base."""
    models = make_models("llama", tied=kind == "tied")
    expert = transformers.AutoModelForCausalLM.from_pretrained(models.experts[0])
    name = str(models.experts[0])
    if kind == "adapter":
        expert = get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(models.base),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        expert.save_pretrained(tmp_path / "adapter")
        name = f"{models.base}+{tmp_path / 'adapter'}"
    recipe = models.recipe(1)
    recipe["models"][0]["model"] = name
    job = prepare(read(recipe), options)
    skeleton = job.skeleton
    with torch.no_grad():
        weights = write.load_model(job.checkpoints(), 1)
        ids, cache = torch.arange(24).reshape(2, 12), None
        found = []
        for place in range(12):
            logits, cache = call_with_cache(skeleton.model, weights, ids[:, place : place + 1], cache)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), expert.eval()(ids).logits, rtol=1e-4, atol=1e-4)


TOKENS = st.lists(st.integers(0, 3), max_size=30)


@settings(max_examples=30, deadline=None)
@given(st.lists(TOKENS, max_size=8))
def test_near_duplicates(texts):
    """The first of equal texts is kept; a kept text shares less than half of its n-grams with each one before it."""
    found = near_duplicates(texts)
    kept = [text for text, is_near in zip(texts, found, strict=True) if not is_near]
    assert len({tuple(text) for text in kept}) == len(kept)
    assert not texts or not found[0]
    assert near_duplicates(kept) == [False] * len(kept)


@settings(max_examples=30, deadline=None)
@given(TOKENS)
def test_repeated_share(tokens):
    """A text repeated often is a loop; one without a repeated token is none."""
    assert repeated_share(tokens * 40) >= 0.5 or not tokens
    assert repeated_share(range(len(tokens))) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.data())
def test_choose(divergences, data):
    """Most of the kept rows are those with the largest divergence; the choice is the same for the same seed."""
    wanted = data.draw(st.integers(1, len(divergences)))
    kept = choose(divergences, wanted, 1)
    assert kept == choose(divergences, wanted, 1) == tuple(sorted(set(kept)))
    assert len(kept) == wanted
    top = sorted(range(len(divergences)), key=lambda index: (-divergences[index], index))[
        : wanted - int(RANDOM_SHARE * wanted)
    ]
    assert set(top) <= set(kept)


def test_usable():
    """Empty, endless and repeated rows go, then the least likely tenth; cut answers go if enough others end."""
    rng = random.Random(0)
    good = [candidate(n, ids=(0, *rng.choices(range(99), k=2), 1, *rng.choices(range(99), k=20)), log_prob=-n)
            for n in range(20)]  # fmt: skip
    cut = replace(good[0], ids=(0, 3, 3, 1, *range(100, 130)), is_ended=False)
    loop = replace(good[0], ids=(0, 4, 4, 1, *(7, 8) * 20), is_ended=False)
    bad = [replace(good[0], answer=" "), replace(good[0], is_complete=False), loop, replace(good[0], number=99)]
    found = usable([*good, *bad, cut], 5)
    assert found.kept == tuple(range(18))
    assert found.dropped == {"empty": 1, "endless": 2, "duplicates": 1, "unlikely": 2, "cut": 1}
    assert usable([*good, *bad, cut], 19).kept == (*range(18), 24)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 1.5))
def test_sampled_tokens_follow_the_distribution(seed, temperature):
    """The inverse of the distribution function, against its definition."""
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed))
    drawn = torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64)
    tokens, log_probs = sampling.sample_tokens(logits, torch.full((3,), temperature, dtype=torch.float64), drawn)
    for row in range(3):
        cumulated = torch.softmax(logits[row].double() / temperature, 0).cumsum(0)
        assert cumulated[tokens[row]] >= drawn[row] - 1e-9
        assert tokens[row] == 0 or cumulated[tokens[row] - 1] <= drawn[row] + 1e-9
        assert torch.isclose(log_probs[row], logits[row].double().log_softmax(0)[tokens[row]])


def test_the_hint_is_a_system_message_or_the_first_line():
    """Where the template knows no system message, the user's message begins with it. White space around it is none."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("['content']", "['content'] | trim"))
    prompt = make_prompt(ChatTemplate.of(tokenizer), " about foxes\n", "math", LENGTH * 2)
    assert prompt.before == "<s><|system|>about foxes</s><|user|>"
    assert prompt.between == "</s><|assistant|>"
    assert [message["role"] for message in prompt.as_row("q", "a")["messages"]] == ["system", "user", "assistant"]
    tokenizer = make_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
        "{% endfor %}"
    )
    prompt = make_prompt(ChatTemplate.of(tokenizer), "about foxes", "math", LENGTH * 2)
    assert prompt.before == "[user] about foxes\n"
    assert prompt.stop.search("the fox[assistant]").start() == 7
    assert prompt.as_row(" q ", "a")["messages"][0] == {"role": "user", "content": "about foxes\nq"}
    with refused(DataError, "no-answers", "64"):
        make_prompt(ChatTemplate.of(tokenizer), "about foxes " * 20, "math", LENGTH)


def turns(user: str, answer: str) -> str:
    """A chat template of two turns."""
    turn = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{answer}</s>{{% endif %}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}"


TEXT = "{{ m['content'] }}"
THOUGHTLESS = turns(f"<s>[user]{TEXT}</s>", "{{ m['content'].split('</think>')[-1] }}")
"""Leaves out what stands before `</think>` in an answer, as DeepSeek-R1's template."""


def write_row(tokenizer, text: str) -> Candidate:
    """The row of an expert that writes the tokens of a text wherever the template leaves it the choice."""
    script = tokenizer(text, add_special_tokens=False).input_ids

    def forward(ids, _):
        return torch.nn.functional.one_hot(torch.tensor([[script[ids.shape[1]]]]), 320).float() * 1e4, None

    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", 4 * LENGTH)
    (row,) = sampling.write_batch(forward, prompt, [0], "key", 4 * LENGTH, tokenizer, torch.device("cpu"))
    assert list(row.ids) == script[: len(row.ids)]
    return row


@pytest.mark.parametrize("question", ["fox and dog", "so it is\n\nDNA: [answer] A SUBASSISTANT: b"])
@pytest.mark.parametrize(
    "template",
    [
        turns(f"<s>[INST] {TEXT} [/INST]", TEXT), turns(f"<s>[INST] {TEXT} [/INST] ", f"{TEXT} "),
        turns(f"USER: {TEXT} ", f"ASSISTANT: {TEXT}"), turns(f"USER: {TEXT} </s>", f"ASSISTANT: {TEXT}"),
        turns(f"Q: {TEXT}\n", f"A: {TEXT}"), turns(f"Q:{TEXT}", f"R:{TEXT}"),
        turns(f"### Instruction:\n{TEXT}\n\n", f"### Response:\n{TEXT}"),
        turns(f"[user]: {TEXT}", f"[assistant]: {TEXT}"), turns(f"[user]: {TEXT}<|end|>\n", f"[assistant]\n{TEXT}"),
    ],
)  # fmt: skip
def test_a_row_has_the_tokens_of_its_chat(template, question):
    """An expert that writes as it was trained meets no token where its training has another: not in the template's
    text before the user's turn or after it, and not where the question holds a part of the text that ends the turn."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens("<|end|>")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "lazy dog"}]
    row = write_row(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    assert (row.prompt.strip(), row.answer.strip()) == (question, "lazy dog")
    assert row.is_ended
    assert row.is_whole


def test_a_token_that_ends_a_turn_and_holds_what_follows_it():
    """What is written of the template's text is not written again."""
    tokenizer = make_tokenizer(turns(f"### Q:\n{TEXT}\n\n", f"### A:\n{TEXT}"))
    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", 2 * LENGTH)
    for written, following, beyond in (("", "\n", ""), ("\n", "", ""), ("\n\n", "", ""), ("\n-", "", "-")):
        found, begun = prompt.after_stop(prompt.stop.search(f"the fox\n\n### A:{written}"))
        assert (tokenizer.decode(found), begun) == (following, beyond)
    tokenizer = make_tokenizer(turns(f"[user]{TEXT}", f"[answer]{TEXT}"))
    tokenizer.add_tokens("]-")
    row = write_row(tokenizer, "[user]the fox[answer]- the dog</s>")
    assert (row.prompt, row.answer, row.is_whole) == ("the fox", "- the dog", True)
    assert tokenizer.decode(row.ids[row.start :]) == "]- the dog</s>"


def test_tokens_that_end_a_turn():
    """Special ones, those behind which the expert stops, and added ones that the template writes behind a turn."""
    tokenizer = make_tokenizer(turns(f"[user]: {TEXT}<|end|>\n", f"[assistant]\n{TEXT}<|stop|>"))
    tokenizer.add_tokens(["<|end|>", "<|stop|>", "<|other|>", "word"])
    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", 2 * LENGTH, {"<|other|>", "token 9999"})
    assert tokenizer.convert_ids_to_tokens(sorted(prompt.ends)) == ["<s>", "</s>", "<|end|>", "<|stop|>", "<|other|>"]
    assert prompt.stop is None


def test_an_answer_that_the_template_does_not_render_whole():
    """Its row is dropped, with a reason of its own. White space does not count."""
    tokenizer = make_tokenizer(THOUGHTLESS)
    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", 2 * LENGTH)
    assert prompt.renders("the fox", "the  dog\n")
    assert not prompt.renders("the fox", "<think>the</think> dog")
    rows = [write_row(tokenizer, f"<s>[user]the fox</s>{answer}</s>") for answer in ("dog", "fox</think>dog")]
    assert [row.is_whole for row in rows] == [True, False]
    assert usable(rows, 1).dropped == {"shortened by the chat template": 1}


def test_a_template_sees_one_day_while_rows_are_written():
    """Whatever day it is."""
    tokenizer = make_tokenizer(f"<s>{{{{ strftime_now('%d %b %Y') }}}}{turns(f'[user]{TEXT}</s>', TEXT)}")
    template = ChatTemplate.of(tokenizer)
    prompts = [make_prompt(replace(template, day=date(2026, 11, day)), None, "math", LENGTH) for day in (27, 28)]
    assert prompts[0].before == prompts[1].before == "<s>26 Jul 2024[user]"


@pytest.mark.parametrize(
    "template",
    [
        "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} {{ m['content'] }}</s>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
        "<s>{% for m in messages %}{{ m['content'] }} {% endfor %}",
    ],
)
def test_templates_that_cannot_be_cut(template):
    """They print a message twice, nothing before the user's turn, or nothing that ends it."""
    with refused(DataError, "invalid-template", "math"):
        make_prompt(ChatTemplate.of(make_tokenizer(template)), None, "math", LENGTH)


def test_a_cache_that_is_wrong_is_not_used():
    """A model whose cache gives other logits than its whole text is run without one, and a line says so."""
    calls, said = [], []

    def call(model, weights, ids, cache):
        calls.append(ids.shape[1])
        logits = torch.nn.functional.one_hot(ids % 7, 7).float()
        wrong = 1.0 if cache is not None and weights["is_wrong"] else 0.0
        return logits + wrong, "cache"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "call_with_cache", call)
        skeleton = SimpleNamespace(model=None, shapes={"embedding": (50, 4)}, embedding_weight="embedding")
        checkpoints = SimpleNamespace(skeleton=skeleton, device=torch.device("cpu"))
        writer = SimpleNamespace(name="math", prompt=SimpleNamespace(before_ids=(1, 2)))
        for is_wrong in (True, False):
            forward = write._forward(writer, checkpoints, {"is_wrong": is_wrong}, said.append)
            assert forward(torch.tensor([[1]]), None)[1] == (None if is_wrong else "cache")
    (line,) = said
    assert line.startswith("math writes without a cache")


def test_names_of_files():
    """Safe, short, and different for different models."""
    models = ["org/math", "./a/words", "b/words", "base+adapters/x", "C:\\m\\con?", "..", "org/Math"]
    names = rows_names(models)
    assert len({name.lower() for name in names.values()}) == len(models)
    assert names["base+adapters/x"] == "base-x.jsonl"
    assert all(not name.startswith(".") and "/" not in name and "\\" not in name for name in names.values())
    assert rows_names(["/x/math"]) == {"/x/math": "math.jsonl"}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.booleans())
def test_enough_rows_are_written(num_samples, evaluate):
    """With the last fifth held out, 3 rows at least and 30 at most, as many are left as are needed, and no row more."""
    recipe = {"merge_method": "submodule_linear", "base_model": "b", "models": [{"model": "e"}]}
    total = num_needed(read({**recipe, "parameters": {"num_samples": num_samples, "evaluate": evaluate}}).settings)
    if not evaluate:
        assert total == num_samples
    elif num_samples < 12:
        assert total == 15
    else:
        assert total - min(30, total // 5) == num_samples


def test_a_hint_that_the_template_writes_anyway_is_not_shown_by_it():
    """Its own system text holds the hint's words, and it leaves out system messages: the hint is the first line."""
    tokenizer = make_tokenizer(
        "<s><|system|>You help.</s>{% for m in messages %}{% if m['role'] != 'system' %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    prompt = make_prompt(ChatTemplate.of(tokenizer), "You", "math", LENGTH * 2)
    assert prompt.system is None
    assert prompt.first_line == "You\n"
