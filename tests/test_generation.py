"""How experts write rows: prompts, sampling, and which rows are kept."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_tokenizer, read, refused
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
    """Where the template knows no system message, the user's message begins with it."""
    tokenizer = make_tokenizer()
    prompt = make_prompt(ChatTemplate.of(tokenizer), "about foxes", "math", LENGTH * 2)
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
    assert prompt.stop == "[assistant]"
    assert prompt.as_row(" q ", "a")["messages"][0] == {"role": "user", "content": "about foxes\nq"}
    with refused(DataError, "no-answers", "64"):
        make_prompt(ChatTemplate.of(tokenizer), "about foxes " * 20, "math", LENGTH)


def test_a_turn_that_ends_with_a_text():
    """Without a special token, the template's own text ends the user's turn; the rest of it follows unsampled."""
    tokenizer = make_tokenizer("{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }}{% endfor %}</s>")
    prompt = make_prompt(ChatTemplate.of(tokenizer), None, "math", LENGTH * 2)
    assert prompt.stop == "[assistant]:"
    script = [*tokenizer("the fox[assistant]:", add_special_tokens=False).input_ids]
    tail = [*tokenizer("lazy dog", add_special_tokens=False).input_ids, 1]
    fed: list[int] = []

    def forward(ids, cache):
        fed.append(int(ids[0, -1]))
        done = len(fed) - 1
        rest = len(tokenizer(" ", add_special_tokens=False).input_ids)
        following = [*script, *[0] * rest, *tail][done]
        return torch.nn.functional.one_hot(torch.tensor([[following]]), 300).float() * 1e4, None

    (row,) = sampling.write_batch(forward, prompt, [0], "key", LENGTH * 2, tokenizer, torch.device("cpu"))
    assert (row.prompt, row.answer, row.is_ended) == ("the fox", "lazy dog", True)
    assert tokenizer.decode(row.ids) == "[user]: the fox[assistant]: lazy dog</s>"


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
