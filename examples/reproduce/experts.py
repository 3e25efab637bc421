"""Base model, data and one fully fine-tuned expert per task: everything that the experiments merge."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from five_tasks import ALL_NAMES, TASKS, general_text
from peft import LoraConfig, get_peft_model
from shared import (
    completed_directory,
    load_model,
    load_tokenizer,
    make_base,
    read_json,
    read_rows,
    save_checkpoint,
    train,
    write_json,
    write_rows,
)
from splits import split

LORA_FACTOR = 10
"""So many times the learning rate of full fine-tuning, for adapters."""
SEED_NAME = "seed.json"
"""Beside the data: what it was made with."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; of every grid each `grid_step`-th setting, of the sets of experts the first `sets`.

    With a `lora_rank` experts are adapters of this rank on every linear map of the layers, merged into the base's
    weights."""

    train_rows: int = 500
    test_rows: int = 100
    choose_rows: int = 40
    general_passages: int = 20
    steps: int = 60
    batch_tokens: int = 800
    learning_rate: float = 1e-4
    lora_rank: int = 0
    calibration_rows: int = 30
    seeds: tuple[int, ...] = (42, 43, 44)
    row_counts: tuple[int, ...] = (1, 3, 10, 30, 50)
    generated_tokens: int = 80
    grid_step: int = 1
    sets: int = 6
    seed: int = 20251
    """Of how rows are split, and of the order in which an expert sees its own: another one makes other experts."""


QUICK = Sizes(
    train_rows=8,
    test_rows=2,
    choose_rows=2,
    general_passages=2,
    steps=3,
    batch_tokens=300,
    calibration_rows=3,
    seeds=(42,),
    row_counts=(1, 3),
    generated_tokens=4,
    grid_step=60,
    sets=1,
)
"""Everything once, too small to mean anything: for trying the command and for the project's own tests."""


@contextlib.contextmanager
def products_in(precision: str, device: str) -> Iterator[None]:
    """Multiply matrices in ``precision`` (``bfloat16`` or ``float32``); weights and sums stay float32.

    Without autocast's cache: it would keep the first step's weights through a whole training.
    """
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        yield


def make_data(workdir: Path, sizes: Sizes) -> None:
    """Write per task the rows to train and calibrate on, rows to choose settings by, and rows to report on; none of one
    kind is nearly one of another (see `splits`)."""
    with completed_directory(workdir / "data") as folder:
        for task, make in TASKS.items():
            kept = {"test": sizes.test_rows, "choose": sizes.choose_rows, "train": sizes.train_rows}
            for name, rows in split(make(random.Random(sizes.seed)), kept.items(), ALL_NAMES).items():
                write_rows(folder / f"{task}_{name}.jsonl", rows)
        write_json(folder / "general.json", general_text(sizes.general_passages))
        write_json(folder / SEED_NAME, sizes.seed)


def make_expert(workdir: Path, task: str, sizes: Sizes, precision: str, device: str) -> None:
    """Fine-tune the base on one task, every weight or an adapter, with the loss on completions."""
    model, tokenizer = load_model(workdir / "base").to(device), load_tokenizer(workdir / "base")
    rank, adapted = sizes.lora_rank, None
    if rank:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)  # `model` gets the adapters, too
    with products_in(precision, device):
        train(
            model,
            tokenizer,
            read_rows(workdir / "data" / f"{task}_train.jsonl"),
            steps=sizes.steps,
            learning_rate=sizes.learning_rate * (LORA_FACTOR if rank else 1),
            batch_tokens=sizes.batch_tokens,
            seed=sizes.seed,
            log=click.echo,
        )
    if adapted is not None:
        model = adapted.merge_and_unload()
    with completed_directory(workdir / task) as folder:
        save_checkpoint(model.cpu(), tokenizer, folder)


def check_seed(workdir: Path, sizes: Sizes) -> None:
    """Refuse a folder whose data, and hence experts, come from another seed.

    Raises:
        click.ClickException: they do.
    """
    path = workdir / "data" / SEED_NAME
    made = read_json(path) if path.exists() else sizes.seed
    if made != sizes.seed:
        raise click.ClickException(
            f"{workdir / 'data'} was made with seed {made}, not {sizes.seed}: choose another folder"
        )


def prepare(workdir: Path, sizes: Sizes, base: Path | None, precision: str, device: str) -> None:
    """Make what is missing in the work directory of base, data and experts.

    Raises:
        click.ClickException: the data that is there comes from another seed.
    """
    check_seed(workdir, sizes)
    jobs = {"base": lambda: copy_base(base, workdir) if base else make_base(workdir)}
    jobs["data"] = lambda: make_data(workdir, sizes)
    jobs |= {task: lambda task=task: make_expert(workdir, task, sizes, precision, device) for task in TASKS}
    for name, job in jobs.items():
        if (workdir / name).exists():
            continue
        click.echo(f"{name}: working")
        started = time.monotonic()
        job()
        click.echo(f"{name}: done in {time.monotonic() - started:.0f} s")


def copy_base(base: Path, workdir: Path) -> None:
    """Take a checkpoint of the user's as the base."""
    with completed_directory(workdir / "base") as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
