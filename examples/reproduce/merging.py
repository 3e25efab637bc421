"""Candidates -> merged models -> scores, each kept in a file of its own, so that a stopped run goes on."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from five_tasks import TASKS
from methods import Candidate, set_name
from safetensors.torch import load_file, save_file
from scoring import drawn_rows, exact_matches, general_loss, general_passages, score, score_test_rows, task_rows
from shared import load_model, load_tokenizer, read_json, write_json

PEERS = "peers"
"""Folder of merged task vectors in the work folder, while a set of experts is gone through."""
RANDOM_SEED = 7
"""Of the methods that drop at random."""


def result_path(workdir: Path, name: str) -> Path:
    """Where the scores of a candidate are kept."""
    return workdir / "results" / f"{name}.json"


def evaluate(
    workdir: Path, folder: Path, tasks: Sequence[str], *, calibration: tuple[int, int] | None, splits: Sequence[str],
    precision: str, device: str, answers: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Score a checkpoint.

    Args:
        workdir: for the data.
        folder: the checkpoint.
        tasks: what it is scored on.
        calibration: (seed, rows): also score it on the training rows that a calibration draws with these.
        splits: of the held-out rows; may be none.
        precision, device: of the forward passes.
        answers: tokens of greedy answers to the test rows; 0 leaves them out.
    """
    model, tokenizer = load_model(folder).to(device).eval(), load_tokenizer(workdir / "base")
    found: dict[str, Any] = {}
    for split in splits:
        if split == "test":
            found[split] = score_test_rows(workdir, model, tasks, precision)
        else:
            found[split] = score(model, tokenizer, {task: task_rows(workdir, task, split) for task in tasks}, precision)
    if calibration:
        seed, count = calibration
        drawn = {task: drawn_rows(workdir, task, seed, count) for task in tasks}
        found["calibration"] = score(model, tokenizer, drawn, precision)
    if answers:
        found["general"] = general_loss(model, tokenizer, general_passages(workdir), precision)
        if precision == "bfloat16":  # as such models are used, and several times as fast token by token
            model = model.to(torch.bfloat16)
        found["exact"] = {
            task: exact_matches(model, tokenizer, task, task_rows(workdir, task, "test"), answers) for task in tasks
        }
    return found


def merge(out: Path, recipe: dict[str, Any], device: str) -> None:
    """Run a recipe with mergekit, or a method that it has not; its paths start at the current folder."""
    shutil.rmtree(out, ignore_errors=True)
    for key, run in (("closed_form", merge_with_rows), ("peer", merge_data_free)):
        if key in recipe:
            run(out, **recipe)
            return
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=RANDOM_SEED, device=device
    )
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options, yaml.safe_dump(recipe))


def merge_with_rows(
    out: Path, closed_form: str, tasks: Sequence[str], seed: int, num_samples: int, **settings: float
) -> None:
    """RegMean and others, with the very rows that a calibration draws; they compute in float32 on the CPU."""
    import expert_merging
    import featcal
    from closed_form import merge

    tokenizer = load_tokenizer(Path("base"))
    rows = []
    for task in tasks:
        drawn = drawn_rows(Path(), task, seed, num_samples)
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in drawn]
        rows.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    others = {"FeatCal": featcal.merge, "Expert Merging": expert_merging.merge}
    run = others.get(closed_form) or partial(merge, closed_form)
    run(Path("base"), [Path(task) for task in tasks], rows, out, **settings)


@torch.no_grad()
def merge_data_free(out: Path, peer: str, tasks: Sequence[str], scale: float, **settings: float) -> None:
    """Base plus scaled task vector of a method of `data_free`; the task vector is kept in PEERS for other scales."""
    from data_free import merged_task_vector

    stem = "--".join([set_name(tasks), peer, *(f"{key}={value}" for key, value in settings.items())])
    path = Path(PEERS) / f"{stem}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        save_file(merged_task_vector(peer, Path("base"), [Path(task) for task in tasks], **settings), temporary)
        os.replace(temporary, path)
    model = load_model(Path("base"))
    for name, value in load_file(path).items():
        model.get_parameter(name).add_(value, alpha=scale)
    model.save_pretrained(out)


def without(result: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `evaluate`, less what a result has already."""
    splits = tuple(split for split in settings["splits"] if split not in result)
    return {**settings, "splits": splits, "calibration": None if "calibration" in result else settings["calibration"]}


def is_done(workdir: Path, candidate: Candidate, settings: dict[str, Any]) -> bool:
    """Whether a candidate has all scores that are asked for."""
    path = result_path(workdir, candidate.name)
    if not path.exists():
        return False
    missing = without(read_json(path), settings)
    return not missing["splits"] and missing["calibration"] is None


def run_candidate(workdir: Path, candidate: Candidate, threads: int, settings: dict[str, Any]) -> str:
    """Merge a candidate with mergekit, score it, keep the scores, and remove the model."""
    torch.set_num_threads(threads)
    os.chdir(workdir)
    out = workdir / "merged" / candidate.name.replace("/", "--")
    merge(out, candidate.recipe, settings["device"])
    path = result_path(workdir, candidate.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = (
        read_json(path)
        if path.exists()
        else {
            "tasks": list(candidate.tasks),
            "method": candidate.method,
            "settings": candidate.settings,
            "seed": candidate.seed,
            "recipe": candidate.recipe,
        }
    )
    write_json(path, {**result, **evaluate(workdir, out, candidate.tasks, **without(result, settings))})
    shutil.rmtree(out, ignore_errors=True)
    gc.collect()
    return candidate.name


def run_candidates(
    workdir: Path, candidates: Sequence[Candidate], processes: int, threads: int, settings: dict[str, Any]
) -> None:
    """Do what is not done yet, several at a time."""
    missing = [candidate for candidate in candidates if not is_done(workdir, candidate, settings)]
    if processes == 1:
        for number, candidate in enumerate(missing, 1):
            click.echo(f"[{number}/{len(missing)}] {run_candidate(workdir, candidate, threads, settings)}")
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run_candidate, workdir, candidate, threads, settings) for candidate in missing]
        for number, done in enumerate(as_completed(waiting), 1):
            click.echo(f"[{number}/{len(missing)}] {done.result()}")


def evaluate_references(workdir: Path, tasks: Sequence[str], settings: dict[str, Any]) -> None:
    """Scores of the base on all tasks, and of every expert."""
    for name in ("base", *tasks):
        path = result_path(workdir, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, evaluate(workdir, workdir / name, tasks, **settings))
            click.echo(f"scored: {name}")


def add_answers(workdir: Path, name: str, tokens: int, precision: str, device: str) -> None:
    """Greedy answers to the test rows, for what has been scored; a candidate is merged again."""
    path = result_path(workdir, name)
    result = read_json(path)
    if "exact" in result:
        return
    tasks = result.get("tasks") or [task for task in TASKS if name in ("base", task)]
    folder = workdir / name
    if "recipe" in result:
        folder = workdir / "merged" / name.replace("/", "--")
        merge(folder, result["recipe"], device)
    found = evaluate(
        workdir, folder, tasks, calibration=None, splits=(), precision=precision, device=device, answers=tokens
    )
    write_json(path, {**result, "exact": found["exact"], "general": found["general"]})
    if "recipe" in result:
        shutil.rmtree(folder, ignore_errors=True)
    click.echo(f"answered: {name}")


def calibrate(workdir: Path, name: str, recipe: dict[str, Any], device: str) -> Path:
    """Do what `mergekit-slta calibrate` does in WORKDIR/calibrations/`name`, unless it has been; return its statistics.

    The recipe's paths start at the current folder, which is WORKDIR.
    """
    from mergekit_slta.cli.main import main

    folder = workdir / "calibrations" / name
    statistics = folder / "slta_stats.safetensors"
    if not statistics.exists():
        click.echo(f"calibrating {name}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        arguments = [folder / "recipe.yml", "-o", folder / "slta_alphas.json", "--quiet", "--device", device]
        main(["calibrate", *map(str, arguments)], standalone_mode=False)
    return statistics


def read_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """Every result by name, in the order of the names."""
    folder = workdir / "results"
    paths = sorted(folder.rglob("*.json"))
    return {str(path.relative_to(folder).with_suffix("")): read_json(path) for path in paths}
