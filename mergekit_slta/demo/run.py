"""`mergekit-slta demo`: train a tiny base and three experts, merge them, and compare with other merges.

Scope: the order of the work, and which files of an earlier demo may be overwritten. All numbers are measured in the run
that reports them, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_slta.demo import tasks as data
from mergekit_slta.demo.measuring import (
    encode_tests,
    evaluate,
    markdown_table,
    measure_baselines,
    plain,
    text_table,
    with_mean,
)
from mergekit_slta.demo.training import new_model, one_thread, quiet_transformers, save, train
from mergekit_slta.errors import OutputError, RunError, show
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.names import ALPHAS_NAME
from mergekit_slta.recipe.objectives import FEATURES
from mergekit_slta.recipe.settings import METHOD

Echo = Callable[[str], None]

MARK = "# Written by `mergekit-slta demo`; a later demo in this folder overwrites it.\n"
"""First line of the demo's recipe. Only a folder whose recipe begins with it may be overwritten."""
RECIPE = f"""{MARK}merge_method: {METHOD}
base_model: ./models/base
models:
  - model: ./models/math
    parameters: {{dataset: data/math.jsonl, text: "{{question}} {{answer}}"}}
  - model: ./models/words
    parameters: {{dataset: data/words.jsonl}}      # its `messages` column, rendered with the chat template
  - model: ./models/numbers
    parameters: {{dataset: data/numbers.jsonl, text: "{{question}} {{answer}}"}}
parameters:
  granularity: attn_mlp
  num_samples: 30
out_dtype: bfloat16
"""


@dataclass(frozen=True)
class DemoSize:
    """How much a demo trains and measures.

    Attributes:
        base_updates: optimizer updates of the base.
        expert_updates: optimizer updates of each expert, by task.
        base_shares: share of each task's examples in the base's batches; the rest is generic text.
        train_rows: training rows per task.
        test_rows: held-out rows per task.
        batch_rows: rows per update.
        base_rate: peak learning rate of the base.
        expert_rate: peak learning rate of the experts.
    """

    base_updates: int
    expert_updates: Mapping[str, int]
    base_shares: Mapping[str, float]
    train_rows: int = 4000
    test_rows: int = 300
    batch_rows: int = 64
    base_rate: float = 3e-3
    expert_rate: float = 1e-3


_SHARES = {"math": 0.3, "words": 0.07, "numbers": 0.06}
FULL = DemoSize(450, {"math": 220, "words": 140, "numbers": 130}, _SHARES)
QUICK = DemoSize(12, {"math": 6, "words": 6, "numbers": 6}, _SHARES, train_rows=60, test_rows=20, batch_rows=16)


def run_demo(directory: Path, *, seed: int = 0, quick: bool = False, echo: Echo = print) -> dict[str, Any]:
    """Train the models, merge them with the stock command, and compare with baselines.

    Args:
        directory: a new or empty folder, or the folder of an earlier demo, which is overwritten.
        seed: seed of data, initialisation and batches.
        quick: train for a few updates and measure few rows; checks only that everything runs.
        echo: called with each line of output.

    Returns:
        The content of results.json.

    Raises:
        OutputError: the folder holds something other than an earlier demo.
        RunError: the merge command failed.
    """
    from mergekit_slta.reporting.figures.draw import draw_alphas

    directory = Path(directory).absolute()
    clock = _Clock(echo)
    splits = make_models(directory, seed, QUICK if quick else FULL, clock)
    with clock.phase(f"merge with {METHOD}"):
        merge_by_command(directory, echo)
    with quiet_transformers(), one_thread():
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
        "each expert on its own task": with_mean({name: models[name][name] for name in splits}),
        "plain average": average,
        f"task arithmetic, {best} (best of {len(grid)} on these rows)": grid[best],
        FEATURES: merged,
    }
    results = {
        "seed": seed,
        "quick": quick,
        "test_rows": len(next(iter(splits.values())).test),
        "scores": plain(table),
        "task_arithmetic": plain({str(scale): scores for scale, scores in grid.items()}),
        "seconds": clock.seconds,
    }
    write_text_atomically(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_text_atomically(directory / "results.md", markdown_table(table))
    draw_alphas(directory / "merged" / ALPHAS_NAME, directory / "alphas.png")
    echo(f"\nexact match in % (loss in nats per answer token), {results['test_rows']} held-out rows per task\n")
    echo(text_table(table))
    echo(f"\nresults.md, results.json, alphas.png, recipe.yml and the models are in {directory}")
    return results


def make_models(directory: Path, seed: int, size: DemoSize, clock: _Clock) -> dict[str, data.Split]:
    """Write recipe.yml, data/ and models/ (the base and one expert for each task).

    PyTorch's global random state is left as it was.

    Returns:
        The examples, by task name.

    Raises:
        OutputError: see `prepare_folder`.
    """
    import torch

    prepare_folder(directory)
    with clock.phase("data and tokenizer"):
        splits = data.write_splits(directory / "data", random.Random(f"data {seed}"), size.train_rows, size.test_rows)
        sentences = random.Random(f"generic {seed}")
        generic = [data.draw_sentence(sentences) for _ in range(size.train_rows)]
        tokenizer = data.train_tokenizer([*generic, *data.plain_texts(splits)])
    pools = {task.name: data.encode_examples(tokenizer, task, splits[task.name].train) for task in data.TASKS}
    texts = [data.Encoded((*tokenizer(text)["input_ids"], tokenizer.eos_token_id), 1) for text in generic]
    batches = random.Random(f"batches {seed}")
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(seed)
        with clock.phase("train the base"):
            base = new_model(tokenizer)
            mixture = [(texts, 1 - sum(size.base_shares.values()))]
            mixture += [(pools[name], share) for name, share in size.base_shares.items()]
            train(base, mixture, size.base_updates, size.base_rate, size.batch_rows, batches)
            save(base, tokenizer, directory / "models" / "base")
        start = {name: value.clone() for name, value in base.state_dict().items()}
        for name, pool in pools.items():
            with clock.phase(f"train the {name} expert"):
                base.load_state_dict(start)
                train(base, [(pool, 1.0)], size.expert_updates[name], size.expert_rate, size.batch_rows, batches)
                save(base, tokenizer, directory / "models" / name)
    return splits


def prepare_folder(directory: Path) -> None:
    """Create the folder, or remove an earlier demo's files from it; then write the recipe that marks it as a demo.

    Raises:
        OutputError: the path is a file, or the folder holds files that no demo wrote.
    """
    recipe = directory / "recipe.yml"
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{show(directory)} is not a folder: choose a new or empty one", code="not-a-folder")
    if directory.is_dir() and any(directory.iterdir()):
        if not (recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(MARK)):
            raise OutputError(
                f"{show(directory)} holds files that no demo wrote: choose a new or empty folder", code="foreign-file"
            )
        for name in ("merged", "models/base", *(f"models/{task.name}" for task in data.TASKS)):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in ("results.json", "results.md", "alphas.png"):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(recipe, RECIPE)


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
        env={"OMP_NUM_THREADS": "1", **os.environ},  # as `one_thread` does
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = " | ".join(done.stderr.strip().splitlines()[-5:])
        raise RunError(
            f"mergekit-yaml ended with exit code {done.returncode} ({show(tail, 1000)}): "
            f"run it again in {show(directory)}; -v shows where",
            code="merge-failed",
        )


class _Clock:
    """Measures the seconds that each phase of a run takes, keeps them, and prints them with `echo`."""

    def __init__(self, echo: Echo) -> None:
        self.seconds: dict[str, float] = {}
        self._echo = echo

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        self._echo(f"{name}: {self.seconds[name]:.1f} s")
