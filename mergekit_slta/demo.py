"""The whole method on a fresh machine: train a tiny base and three experts, merge them, and measure every merge.

Scope: the engine of `mergekit-slta demo`. All numbers are measured in the run that reports them; nothing is
downloaded. Models are Llamas of about a million parameters, trained in float32 on the CPU and stored as bfloat16.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_slta import _demo_data as data
from mergekit_slta.errors import RunError
from mergekit_slta.files import write_text_atomically

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Echo = Callable[[str], None]

MARK = "# Written by `mergekit-slta demo`; a later demo in this folder overwrites it.\n"
"""First line of the demo's recipe: only a folder that has it may be overwritten."""
RECIPE = f"""{MARK}merge_method: submodule_linear
base_model: ./models/base
models:
  - model: ./models/math
    parameters: {{dataset: data/math.jsonl, text: "{{question}} {{answer}}"}}
  - model: ./models/words
    parameters: {{dataset: data/words.jsonl}}      # its `messages` column, rendered with the chat template
  - model: ./models/numbers
    parameters: {{dataset: data/numbers.jsonl}}    # its `text` column
parameters:
  granularity: attn_mlp
  num_samples: 30
out_dtype: bfloat16
"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SCALES = tuple(tenth / 10 for tenth in range(1, 11))
"""Scales tried for task arithmetic."""
SHARD_SIZE = "500KB"
"""Small enough that every checkpoint has several shards, as real ones have."""
NO_LOSS = -100
"""The label that a transformers loss skips."""


@dataclass(frozen=True)
class Plan:
    """How much to train and to measure.

    Attributes:
        base_steps: optimizer steps of the base.
        expert_steps: optimizer steps of each expert, by task.
        base_shares: share of each task's examples in the base's batches; the rest is generic text.
        train_rows: training rows per task.
        test_rows: held-out rows per task.
        batch_rows: rows per optimizer step.
        base_rate: peak learning rate of the base.
        expert_rate: peak learning rate of the experts.
    """

    base_steps: int
    expert_steps: Mapping[str, int]
    base_shares: Mapping[str, float]
    train_rows: int = 4000
    test_rows: int = 300
    batch_rows: int = 64
    base_rate: float = 3e-3
    expert_rate: float = 1e-3


_SHARES = {"math": 0.35, "words": 0.1, "numbers": 0.1}
FULL = Plan(500, {"math": 300, "words": 150, "numbers": 100}, _SHARES)
QUICK = Plan(12, {"math": 6, "words": 6, "numbers": 6}, _SHARES, train_rows=60, test_rows=20, batch_rows=16)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text; the loss counts from position `start` (of the first answer token) on."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Score:
    """Held-out quality on one task (or the mean over tasks).

    Attributes:
        exact: share of rows, 0 to 1, whose every answer token is the likeliest one, end of sequence included.
        loss: mean cross-entropy of the answer tokens, in nats per token.
    """

    exact: float
    loss: float


Scores = Mapping[str, Score]
"""Task name, or "mean", to score."""


def run_demo(directory: Path, *, seed: int = 0, quick: bool = False, echo: Echo = print) -> dict[str, Any]:
    """Make the models, merge them with the stock command, compare with baselines; returns what results.json holds.

    Args:
        directory: a new or empty folder, or that of an earlier demo, which is overwritten.
        seed: of data, initialisation and batches.
        quick: train next to nothing and measure few rows; shows that everything runs, not how well.
        echo: receives the progress lines and the table.

    Raises:
        ValueError: the folder holds something other than an earlier demo.
        RunError: the merge command failed.
    """
    from mergekit_slta.report import draw_alphas

    directory = Path(directory).absolute()
    clock = _Clock(echo)
    splits = _make_models(directory, seed, quick, clock)
    with clock.phase("merge with submodule_linear"):
        merge_by_command(directory, echo)
    with _quiet_bars(), _one_thread():
        with clock.phase("evaluate"):
            tests = encode_tests(splits, directory)
            models = {name: evaluate(directory / "models" / name, tests) for name in ("base", *splits)}
            merged = evaluate(directory / "merged", tests)
        with clock.phase("baselines"):
            average, grid = measure_baselines(directory, tests)
    best = max(grid, key=lambda scale: (grid[scale]["mean"].exact, -grid[scale]["mean"].loss))
    table = {
        "base": models["base"],
        **{f"expert: {name}": models[name] for name in splits},
        "plain average": average,
        f"task arithmetic, scale {best} (best of {len(grid)} on these test rows)": grid[best],
        "submodule_linear": merged,
    }
    results = {
        "seed": seed,
        "quick": quick,
        "test_rows": len(next(iter(splits.values())).test),
        "scores": _plain(table),
        "task_arithmetic": _plain({str(scale): scores for scale, scores in grid.items()}),
        "seconds": clock.seconds,
    }
    write_text_atomically(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_text_atomically(directory / "results.md", markdown_table(table))
    draw_alphas(directory / "merged" / "slta_alphas.json", directory / "alphas.png")
    echo(f"\nexact match in % (loss in nats per answer token), {results['test_rows']} held-out rows per task\n")
    echo(text_table(table))
    echo(f"\nresults.md, results.json, alphas.png, recipe.yml and the models are in {directory}")
    return results


def make_models(directory: Path, seed: int = 0, quick: bool = False, echo: Echo = print) -> dict[str, data.Split]:
    """Write recipe.yml, data/ and models/ (base and one expert per task); returns the examples by task name.

    PyTorch's global random state is left as it was.
    """
    return _make_models(Path(directory).absolute(), seed, quick, _Clock(echo))


def _make_models(directory: Path, seed: int, quick: bool, clock: _Clock) -> dict[str, data.Split]:
    import torch

    plan = QUICK if quick else FULL
    prepare_folder(directory)
    with clock.phase("data and tokenizer"):
        splits = write_data(directory / "data", plan, random.Random(f"data {seed}"))
        generic = [data.draw_sentence(random.Random(f"generic {seed} {number}")) for number in range(plan.train_rows)]
        tokenizer = train_tokenizer([*generic, *_plain_texts(splits)])
    pools = {task.name: encode_examples(tokenizer, task, splits[task.name].train) for task in data.TASKS}
    texts = [Encoded((*tokenizer(text)["input_ids"], tokenizer.eos_token_id), 1) for text in generic]
    batches = random.Random(f"batches {seed}")
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.default_generator.manual_seed(seed)
        with clock.phase("train the base"):
            base = new_model(tokenizer)
            mixture = [(texts, 1 - sum(plan.base_shares.values()))]
            mixture += [(pools[name], share) for name, share in plan.base_shares.items()]
            train(base, mixture, plan.base_steps, plan.base_rate, plan.batch_rows, batches)
            save(base, tokenizer, directory / "models" / "base")
        start = {name: value.clone() for name, value in base.state_dict().items()}
        for name, pool in pools.items():
            with clock.phase(f"train the {name} expert"):
                base.load_state_dict(start)
                train(base, [(pool, 1.0)], plan.expert_steps[name], plan.expert_rate, plan.batch_rows, batches)
                save(base, tokenizer, directory / "models" / name)
    return splits


def prepare_folder(directory: Path) -> None:
    """Create the folder, or clear what an earlier demo left there; then write the recipe, which marks it as a demo's.

    Raises:
        ValueError: something else is there.
    """
    recipe = directory / "recipe.yml"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder: choose a new or empty one for the demo")
    if directory.is_dir() and any(directory.iterdir()):
        if not (recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(MARK)):
            raise ValueError(f"{directory} is not empty and not an earlier demo: choose a new or empty folder")
        for name in ("data", "models", "merged"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in ("results.json", "results.md", "alphas.png"):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(recipe, RECIPE)


def write_data(folder: Path, plan: Plan, rng: random.Random) -> dict[str, data.Split]:
    """Draw every task's examples and write NAME.jsonl and NAME.test.jsonl; returns them by task name."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {task.name: data.draw_split(task, rng, plan.train_rows, plan.test_rows) for task in data.TASKS}
    for task in data.TASKS:
        split = splits[task.name]
        data.write_jsonl(folder / f"{task.name}.jsonl", [data.train_row(task.style, item) for item in split.train])
        data.write_jsonl(folder / f"{task.name}.test.jsonl", [data.test_row(task.style, item) for item in split.test])
    return splits


def _plain_texts(splits: Mapping[str, data.Split]) -> list[str]:
    return [f"{item.question} {item.answer}" for split in splits.values() for item in split.train]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens; digits stay single, so that sums can be learned column by column."""
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


def encode_examples(
    tokenizer: PreTrainedTokenizerFast, task: data.Task, examples: Sequence[data.Example]
) -> list[Encoded]:
    """Token ids as the recipe's rows have them, closed by the end of sequence; the loss counts the answer only."""
    return [_encode(tokenizer, task.style, example) for example in examples]


def _encode(tokenizer: PreTrainedTokenizerFast, style: data.Style, example: data.Example) -> Encoded:
    if style == "messages":
        messages = data.as_messages(example)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    else:
        prompt = f"{BOS}{example.question}"
        whole = f"{prompt} {example.answer}{EOS}"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return Encoded(tuple(ids), len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama: 6 layers, hidden size 128, 4 query and 2 key-value heads, separate output embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    mixture: Sequence[tuple[Sequence[Encoded], float]],
    steps: int,
    rate: float,
    batch_rows: int,
    rng: random.Random,
) -> None:
    """AdamW with a short warm-up and linear decay.

    Args:
        mixture: pools of texts with their shares of a batch.
        steps: optimizer steps.
        rate: peak learning rate.
        batch_rows: rows per step.
        rng: draws the batches.
    """
    import torch

    pools, shares = zip(*mixture, strict=True)
    warm_up = max(1, min(30, steps // 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0) * max(0.02, 1 - step / steps)
    )
    model.train()
    for _ in range(steps):
        rows = [rng.choice(pool) for pool in rng.choices(pools, shares, k=batch_rows)]
        ids, labels = _padded(rows)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _padded(rows: Sequence[Encoded]) -> tuple[Any, Any]:
    """(ids, labels), both [rows, longest] int64. Padding is on the right and causally invisible, so needs no mask."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (longest - len(row.ids))] for row in rows]
    labels = [
        [*[NO_LOSS] * row.start, *row.ids[row.start :], *[NO_LOSS] * (longest - len(row.ids))] for row in rows
    ]
    return torch.tensor(ids), torch.tensor(labels)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 copy in several shards, with the tokenizer; `model` stays float32."""
    import copy

    import torch

    with _quiet_bars():
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def merge_by_command(directory: Path, echo: Echo) -> None:
    """Run the stock `mergekit-yaml recipe.yml merged` in the demo's folder.

    Raises:
        RunError: it failed; the message ends with the last lines of its error output.
    """
    script = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    echo(f"$ cd {directory} && mergekit-yaml recipe.yml merged")
    done = subprocess.run(
        [*command, "recipe.yml", "merged"],
        cwd=directory,
        env={"OMP_NUM_THREADS": "1", **os.environ},  # as in `_one_thread`
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = " | ".join(done.stderr.strip().splitlines()[-5:])
        raise RunError(f"mergekit-yaml ended with exit code {done.returncode}: {tail}")


def measure_baselines(directory: Path, tests: Mapping[str, Sequence[Encoded]]) -> tuple[Scores, dict[float, Scores]]:
    """Scores of mergekit's own merges of the same checkpoints: the experts' average, and task arithmetic by scale."""
    models = directory / "models"
    experts = [str(models / name) for name in tests]

    def measured(recipe: dict[str, Any]) -> Scores:
        with tempfile.TemporaryDirectory(prefix="slta-demo-") as folder:
            _merge_in_process(recipe, Path(folder))
            return evaluate(Path(folder), tests)

    average = measured(_baseline("linear", experts, 1 / len(experts)))
    arithmetic = {
        scale: measured(
            {**_baseline("task_arithmetic", experts, scale), "base_model": str(models / "base")},
        )
        for scale in SCALES
    }
    return average, arithmetic


def _baseline(method: str, experts: Sequence[str], weight: float) -> dict[str, Any]:
    return {
        "merge_method": method,
        "models": [{"model": path, "parameters": {"weight": weight}} for path in experts],
        "parameters": {"normalize": False},
        "out_dtype": "bfloat16",
    }


def _merge_in_process(recipe: dict[str, Any], folder: Path) -> None:
    """One merge by mergekit, quietly."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(recipe)
    try:
        run_merge(config, str(folder), MergeOptions(quiet=True, write_model_card=False))
    finally:
        # mergekit keeps open files by path for the whole process: a later demo would read what it has overwritten.
        for model in config.referenced_models():
            LoaderCache().loaders.pop(model, None)


def encode_tests(splits: Mapping[str, data.Split], directory: Path) -> dict[str, list[Encoded]]:
    """The held-out examples by task, as token ids of the base's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / "models" / "base")
    return {task.name: encode_examples(tokenizer, task, splits[task.name].test) for task in data.TASKS}


def evaluate(folder: Path, tests: Mapping[str, Sequence[Encoded]]) -> dict[str, Score]:
    """Scores of one checkpoint, computed in float32, by task and their "mean"."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {name: score(model, rows) for name, rows in tests.items()}
    parts = list(scores.values())
    mean = Score(sum(part.exact for part in parts) / len(parts), sum(part.loss for part in parts) / len(parts))
    return {**scores, "mean": mean}


def score(model: LlamaForCausalLM, rows: Sequence[Encoded], batch_rows: int = 128) -> Score:
    """Teacher-forced: a row whose argmaxes all match is exactly what greedy decoding would write."""
    import torch
    import torch.nn.functional as functional

    exact, loss, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(rows), batch_rows):
            ids, labels = _padded(rows[begin : begin + batch_rows])
            logits, wanted = model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]
            counted = wanted != NO_LOSS  # [rows, tokens]
            exact += int(((logits.argmax(-1) == wanted) | ~counted).all(1).sum())
            loss += float(functional.cross_entropy(logits[counted], wanted[counted], reduction="sum"))
            tokens += int(counted.sum())
    return Score(exact / len(rows), loss / tokens)


def _cells(table: Mapping[str, Scores]) -> list[list[str]]:
    """Header and one row per model: exact match in percent with the loss in parentheses."""
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{100 * s[c].exact:5.1f} ({s[c].loss:.3f})" for c in columns)] for name, s in table.items()]
    return [["model", *columns], *rows]


def text_table(table: Mapping[str, Scores]) -> str:
    """Columns aligned for a terminal: names to the left, numbers to the right."""
    cells = _cells(table)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(table: Mapping[str, Scores]) -> str:
    """The same cells as a Markdown table."""
    header, *rows = _cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    caption = "Exact match in % (loss in nats per answer token) on held-out rows.\n\n"
    return caption + "".join(f"| {' | '.join(map(str.strip, row))} |\n" for row in [header, rule, *rows])


def _plain(table: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    return {model: {task: asdict(score) for task, score in scores.items()} for model, scores in table.items()}


class _Clock:
    """Echoes and keeps the seconds that each phase of a run took."""

    def __init__(self, echo: Echo) -> None:
        self.seconds: dict[str, float] = {}
        self._echo = echo

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        self._echo(f"{name}: {self.seconds[name]:.1f} s")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from more threads, which crawl wherever other work holds one of the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """transformers draws a bar per checkpoint; `echo` is the only output wanted here."""
    from transformers.utils import logging as progress

    enabled = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            progress.enable_progress_bar()
