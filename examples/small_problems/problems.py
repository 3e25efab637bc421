"""Small random merging problems: a two-layer base, one to four experts trained on string tasks, and calibration rows.

Scope: data and models. Everything follows from a problem's number. `KINDS` lists what makes a merge difficult.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghij"
CHARACTERS = [*"<^$", *LETTERS, *"0123456789", *"ABCDEFGHIJKLMNOP", "=", ":", " ", "+"]
BOS, EOS, PAD = "^", "$", "<"
FRESH_ROWS = 200
"""Rows of each task that no method sees."""


def _word(rng: random.Random, low: int = 4, high: int = 6) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def _shift(number: int) -> Callable[[random.Random], tuple[str, str]]:
    def draw(rng: random.Random) -> tuple[str, str]:
        word = _word(rng)
        return word, "".join(LETTERS[(LETTERS.index(letter) + number) % len(LETTERS)] for letter in word)

    return draw


def _of_word(answer: Callable[[str], str]) -> Callable[[random.Random], tuple[str, str]]:
    def draw(rng: random.Random) -> tuple[str, str]:
        word = _word(rng)
        return word, answer(word)

    return draw


def _sum(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randrange(10, 100), rng.randrange(10, 100)
    return f"{left}+{right}", str(left + right)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "A": _of_word(lambda word: "".join(sorted(word))),
    "B": _of_word(lambda word: word[::-1]),
    "C": _sum,
    "D": _shift(1),
    "E": _shift(3),
    "F": _of_word(lambda word: word + word[:2]),
    "G": _of_word(lambda word: "".join(letter for letter in word if letter in "aei") or "j"),
    "H": _of_word(lambda word: str(len(set(word)))),
}
"""Letter that begins a task's prompts -> (generator -> question, answer)."""


@dataclass(frozen=True)
class Problem:
    """One merging problem.

    Attributes:
        number: seeds everything.
        kind: one of `KINDS`.
        tasks: the task of each expert.
        num_rows: calibration rows per task.
        tied: whether the output projection is the embedding table.
        updates: training updates of each expert.
        pad: the base's `pad_token_id`.
        shared: whether all experts name one mixed file.
    """

    number: int
    kind: str
    tasks: tuple[str, ...]
    num_rows: int = 60
    tied: bool = False
    updates: tuple[int, ...] = ()
    rate: float = 1e-3
    pad: int | None = 0
    shared: bool = False
    weak: tuple[int, ...] = field(default=())


KINDS = ("plain", "related", "shared", "weak", "few", "far", "tied", "pad", "single", "many")


def problem(number: int) -> Problem:
    """The problem with a number: its kind in turn, the rest at random."""
    rng = random.Random(f"problem {number}")
    kind = KINDS[number % len(KINDS)]
    count = {"single": 1, "many": 4}.get(kind, rng.choice((2, 2, 3)))
    tasks = tuple(rng.sample(sorted(TASKS), count))
    if kind == "related":
        tasks = (tasks[0],) * count
    return Problem(
        number=number,
        kind=kind,
        tasks=tasks,
        num_rows=rng.choice((3, 5, 8, 12, 20, 30)) if kind == "few" else rng.choice((60, 200, 400)),
        tied=kind == "tied" or rng.random() < 0.25,
        updates=tuple(rng.choice((80, 150, 250)) * (3 if kind == "far" else 1) for _ in tasks),
        rate=3e-3 if kind == "far" else rng.choice((5e-4, 1e-3)),
        pad=rng.choice((None, 2, 5, len(CHARACTERS) - 1)) if kind == "pad" else 0,
        shared=kind == "shared",
        weak=(rng.randrange(count),) if kind == "weak" else (),
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a begin-of-sequence token is added."""
    vocabulary = {character: number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


@dataclass(frozen=True)
class Sample:
    """A row: its prompt, its answer (with the end token), and its task."""

    prompt: str
    answer: str

    def ids(self) -> list[int]:
        """Token ids of the whole row."""
        return [CHARACTERS.index(character) for character in BOS + self.prompt + self.answer]

    @property
    def start(self) -> int:
        """Position of the answer's first token."""
        return 1 + len(self.prompt)


def draw(task: str, rng: random.Random, count: int) -> list[Sample]:
    """Rows of a task."""
    rows = []
    for _ in range(count):
        question, answer = TASKS[task](rng)
        rows.append(Sample(f"{task}{question}=", answer + EOS))
    return rows


def padded(rows: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both [rows, longest] int64."""
    longest = max(len(row.ids()) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        own = torch.tensor(row.ids())
        ids[number, : len(own)] = own
        labels[number, row.start : len(own)] = own[row.start :]
    return ids, labels


def train(model: LlamaForCausalLM, make: Callable[[], list[Sample]], updates: int, rate: float) -> None:
    """AdamW with a short warm-up and linear decay; changes the model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((update + 1) / 20, 1.0) * max(0.05, 1 - update / updates)
        ids, labels = padded(make())
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def make_base(seed: int, tied: bool) -> LlamaForCausalLM:
    """A base that has seen a little of every task."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    rng = random.Random(f"base {seed}")
    train(model, lambda: [row for _ in range(32) for row in draw(rng.choice(sorted(TASKS)), rng, 1)], 400, 3e-3)
    return model


def make(given: Problem, folder: Path) -> list[list[Sample]]:
    """Write base, experts and data of a problem; returns the fresh rows of every task."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"data {given.number}")
    fresh = [draw(task, rng, FRESH_ROWS) for task in given.tasks]
    calibration = [draw(task, rng, given.num_rows) for task in given.tasks]
    if given.shared:  # every expert is asked for what the mixed file holds
        mixture = [row for rows in fresh for row in rows]
        fresh = [
            random.Random(f"mixture {given.number} {place}").sample(mixture, FRESH_ROWS) for place in range(len(fresh))
        ]
    if (folder / "done").exists():
        return fresh
    tokenizer = make_tokenizer()
    base_path = folder.parent / f"base-{given.number % 3}-{given.tied}"
    if not base_path.exists():
        made = make_base(given.number % 3, given.tied)
        made.save_pretrained(base_path)
        tokenizer.save_pretrained(base_path)
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    _save(base, tokenizer, folder / "base", given.pad)
    for place, (task, updates) in enumerate(zip(given.tasks, given.updates, strict=True)):
        expert = copy.deepcopy(base)
        own = random.Random(f"expert {given.number} {place}")
        train(expert, lambda task=task, own=own: draw(task, own, 32), updates, given.rate)
        if place in given.weak:
            with torch.no_grad():
                for parameter, start in zip(expert.parameters(), base.parameters(), strict=True):
                    parameter.copy_(start + 0.01 * (parameter - start))
        _save(expert, tokenizer, folder / f"expert{place}", given.pad)
    mixed = [row for rows in calibration for row in rows]
    random.Random(given.number).shuffle(mixed)
    for place, rows in enumerate(calibration):
        chosen = mixed if given.shared else rows
        text = "".join(json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in chosen)
        (folder / f"rows{place}.jsonl").write_text(text)
    (folder / "done").touch()
    return fresh


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, pad: int | None) -> None:
    model.config.pad_token_id = pad
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def recipe(given: Problem, folder: Path, **parameters: object) -> dict:
    """The problem's recipe, as a mapping."""
    entries = [
        {
            "model": str(folder / f"expert{place}"),
            "parameters": {"dataset": str(folder / f"rows{place}.jsonl"), "text": "{prompt}", "completion": "{answer}"},
        }
        for place in range(len(given.tasks))
    ]
    return {
        "merge_method": "submodule_linear",
        "base_model": str(folder / "base"),
        "models": entries,
        "parameters": parameters,
    }
