"""Synthetic text for the demo: three small tasks, a generic corpus, and a tokenizer trained on both.

Scope: text and token ids, no models. All randomness comes from generators that the caller seeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Style = Literal["fields", "messages"]

_ONES = (
    *"zero one two three four five six seven eight nine ten eleven twelve".split(),
    *"thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
)
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
_NAMES = ["Mia", "Leo", "Ana", "Omar", "Ivy", "Hugo", "Nina", "Raj", "Zoe", "Finn"]
_NOUNS = ["river", "mill", "garden", "boat", "lamp", "bridge", "letter", "window", "market", "hill", "road", "kettle"]
_ADJECTIVES = ["old", "small", "red", "quiet", "bright", "cold", "wooden", "long", "narrow", "blue"]
_VERBS = ["sees", "paints", "opens", "passes", "finds", "leaves", "visits", "draws", "remembers", "likes"]
_PLACES = ["by the sea", "in the town", "under the tree", "near the station", "at night", "before noon"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Example:
    """A question and its only right answer. In plain text (without a chat) one space joins the two."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A toy task.

    Attributes:
        name: also the name of its expert and its file.
        style: how its rows are stored.
        draw: makes a random example.
    """

    name: str
    style: Style
    draw: Callable[[random.Random], Example]


@dataclass(frozen=True)
class Split:
    """Examples of one task. No question of `test` occurs in `train`."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text. The answer begins at position `start`; only its tokens have a loss."""

    ids: tuple[int, ...]
    start: int


def spell(number: int) -> str:
    """A number in English words, without hyphens or "and", for 0 <= number < 1,000,000."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        head, rest = _TENS[number // 10], number % 10
    elif number < 1000:
        head, rest = f"{_ONES[number // 100]} hundred", number % 100
    else:
        head, rest = f"{spell(number // 1000)} thousand", number % 1000
    return f"{head} {spell(rest)}" if rest else head


def draw_sum(rng: random.Random) -> Example:
    """Make an addition of a single digit: "347 + 8 =" -> "355"."""
    left, right = rng.randrange(10, 1000), rng.randrange(1, 10)
    return Example(f"{left} + {right} =", str(left + right))


def draw_sort(rng: random.Random) -> Example:
    """Make a word whose letters are to be sorted: "Sort: t o b a n" -> "a b n o t"."""
    letters = [rng.choice(_VOWELS if place % 2 else _CONSONANTS) for place in range(5)]
    return Example(f"Sort: {' '.join(letters)}", " ".join(sorted(letters)))


def draw_spelling(rng: random.Random) -> Example:
    """Make a number that is to be spelled: "Spell 4107:" -> "four thousand one hundred seven"."""
    number = rng.randrange(1000, 100_000)
    return Example(f"Spell {number}:", spell(number))


TASKS = (
    Task("math", "fields", draw_sum),
    Task("words", "messages", draw_sort),
    Task("numbers", "fields", draw_spelling),
)


def draw_sentence(rng: random.Random) -> str:
    """Make a generic English-like sentence, unrelated to the three tasks."""
    name, other = rng.sample(_NAMES, 2)
    thing = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    patterns = (
        f"{name} {rng.choice(_VERBS)} the {thing} {rng.choice(_PLACES)}.",
        f"The {thing} is {rng.choice(_ADJECTIVES)}, and {name} knows it.",
        f"{name} and {other} are {rng.choice(_PLACES)} with {spell(rng.randrange(2, 20))} friends.",
        f"There are {rng.randrange(2, 100)} steps to the {thing}.",
    )
    return rng.choice(patterns)


def draw_split(task: Task, rng: random.Random, train: int, test: int) -> Split:
    """Make `train` + `test` examples with pairwise different questions."""
    found: dict[str, Example] = {}
    while len(found) < train + test:
        example = task.draw(rng)
        found.setdefault(example.question, example)
    examples = tuple(found.values())
    return Split(examples[test:], examples[:test])


def as_messages(example: Example) -> list[dict[str, str]]:
    """The example as a two-turn chat."""
    return [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]


def train_row(style: Style, example: Example) -> dict[str, Any]:
    """A training row: the columns that the demo's recipe reads."""
    if style == "messages":
        return {"messages": as_messages(example)}
    return {"question": example.question, "answer": example.answer}


def test_row(style: Style, example: Example) -> dict[str, Any]:
    """A held-out row: as `train_row`, with `prompt` and `answer`, since only the answer is scored."""
    return {**train_row(style, example), "prompt": example.question, "answer": example.answer}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_splits(folder: Path, rng: random.Random, train: int, test: int) -> dict[str, Split]:
    """Make every task's examples and write NAME.jsonl and NAME.test.jsonl; returns the examples by task name."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {task.name: draw_split(task, rng, train, test) for task in TASKS}
    for task in TASKS:
        split = splits[task.name]
        write_jsonl(folder / f"{task.name}.jsonl", [train_row(task.style, item) for item in split.train])
        write_jsonl(folder / f"{task.name}.test.jsonl", [test_row(task.style, item) for item in split.test])
    return splits


def plain_texts(splits: Mapping[str, Split]) -> list[str]:
    """All training examples as plain text, for the tokenizer to learn from."""
    return [f"{item.question} {item.answer}" for split in splits.values() for item in split.train]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most 512 tokens. Each digit is a token, so sums can be learned digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, BOS, EOS, "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_examples(tokenizer: PreTrainedTokenizerFast, task: Task, examples: Sequence[Example]) -> list[Encoded]:
    """Tokenise examples as the recipe's rows are, with the end of sequence; the loss counts the answer only."""
    return [_encode(tokenizer, task.style, example) for example in examples]


def _encode(tokenizer: PreTrainedTokenizerFast, style: Style, example: Example) -> Encoded:
    if style == "messages":
        messages = as_messages(example)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    else:
        prompt = f"{BOS}{example.question}"
        whole = f"{prompt} {example.answer}{EOS}"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return Encoded(tuple(ids), len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
