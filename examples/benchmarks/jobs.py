"""What is measured: each job runs in a process of its own, started by `measure.run_job`.

Scope: `jobs.py REQUEST RESULT`, JSON in and JSON out. Imports come first and are timed by themselves, so that the
phases hold none. The package is used as its users do: `prepare`, `gather_statistics`, `run_merge`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Clock
from workload import from_mapping, make

_TRANSFORMERS = ("torch", "transformers", "transformers.models.llama.modeling_llama")
_PACKAGE = (*_TRANSFORMERS, "datasets", "mergekit.merge", "mergekit_slta.calibration.calibrate",
            "mergekit_slta.objectives.costs",
            "mergekit_slta.host.merge")  # fmt: skip


def make_workload(clock: Clock, workload: dict[str, Any], lengths: list[list[int]]) -> None:
    """Checkpoints and data; not measured."""
    make(from_mapping(workload), lengths)


def _prepare(clock: Clock, recipe: dict[str, Any]) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_slta import read_recipe
    from mergekit_slta.job.preflight import prepare

    with clock.phase("prepare"):
        configuration = MergeConfiguration.model_validate(recipe)
        return prepare(read_recipe(configuration), MergeOptions(quiet=True), for_merge=False)


def calibrate(clock: Clock, recipe: dict[str, Any], save: str | None = None) -> dict[str, Any]:
    """`mergekit_slta.calibrate(recipe)` in its three parts; the alphas in `save`, if asked for."""
    from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
    from mergekit_slta.objectives.costs import estimate

    with clock.phase("work"):
        job = _prepare(clock, recipe)
        with clock.phase("gather"):
            statistics = gather_statistics(job)
        with clock.phase("solve"):
            alphas = solve_job(job, statistics)
    if save:
        alphas.save(save)
    costs = estimate(job)
    return {
        "num_rows": sum(len(drawn.rows) for drawn in job.rows if drawn is not None),
        "num_tokens": job.num_tokens, "predicted_flops": costs.flops, "predicted_read_bytes": costs.read_bytes,
        "predicted_peak_bytes": costs.peak_bytes,
    }  # fmt: skip


def calibrate_with_floor(
    clock: Clock, recipe: dict[str, Any], matrices: list[list[int]], profiled: bool = False
) -> dict[str, Any]:
    """A calibration between two measurements of the matrix products alone; optionally under the profiler."""
    from products import floor

    from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
    from mergekit_slta.data.batches import plan_batches

    with clock.phase("work"):
        job = _prepare(clock, recipe)
    rows = [row.ids for drawn in job.rows for row in drawn.rows]
    batch_tokens = [sum(batch.lengths) for batch in plan_batches(rows)]
    sizes = [tuple(size) for size in matrices]
    floors = [floor(sizes, batch_tokens)]
    profile = None
    with clock.phase("gather"):
        if profiled:
            statistics, profile = _profiled(lambda: gather_statistics(job))
        else:
            statistics = gather_statistics(job)
    with clock.phase("solve"):
        solve_job(job, statistics)
    floors.append(floor(sizes, batch_tokens))
    return {"row_tokens": [len(row) for row in rows], "batch_tokens": batch_tokens, "floors": floors,
            "profile": profile}  # fmt: skip


def _profiled(call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """A call's result, and where its time went: by function itself, and by function of the package with what it
    calls."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    result = profiler.runcall(call)
    entries = pstats.Stats(profiler).stats  # type: ignore[attr-defined] - (file, line, name) -> (.., calls, own, all, ..)
    own = sorted(entries.items(), key=lambda entry: -entry[1][2])[:14]
    package = [entry for entry in entries.items() if Path(entry[0][0]).parent.name == "mergekit_slta"]
    package = sorted(package, key=lambda entry: -entry[1][3])[:24]
    return result, {
        "seconds": sum(entry[2] for entry in entries.values()),
        "own": [[_label(key), value[1], value[2]] for key, value in own],
        "package": [[_label(key), value[1], value[3]] for key, value in package],
    }


def _label(key: tuple[str, int, str]) -> str:
    file, line, name = key
    if file == "~":
        return name.strip("<>").removeprefix("built-in method ").removeprefix("method ")
    path = Path(file)
    return f"{path.parent.name}/{path.name}:{line} {name}"


def count(clock: Clock, recipe: dict[str, Any]) -> dict[str, Any]:
    """What a calibration does, counted: bytes that the loaders hand out, and operations of matrix products."""
    import torch
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader
    from products import CountedProducts

    from mergekit_slta.calibration.calibrate import gather_statistics

    job = _prepare(clock, recipe)
    original = LazyTensorLoader.get_tensor
    handed: list[int] = []
    distinct: dict[tuple[str, str], int] = {}

    def counted(loader: LazyTensorLoader, key: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(loader, key, *args, **kwargs)
        if tensor is not None:
            handed.append(tensor.numel() * tensor.element_size())
            distinct[loader.index.base_path, key] = handed[-1]
        return tensor

    LazyTensorLoader.get_tensor = counted
    try:
        with CountedProducts() as products:
            gather_statistics(job)
    finally:
        LazyTensorLoader.get_tensor = original
    return {"read_bytes": sum(handed), "distinct_bytes": sum(distinct.values()), "flops": dict(products.flops)}


def merge(clock: Clock, recipe: dict[str, Any], out: str) -> None:
    """mergekit's `run_merge`."""
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    import mergekit_slta  # noqa: F401 - registers the method where .pth files are not read

    configuration = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(quiet=True, write_model_card=False)
    with clock.phase("work"):
        mergekit.merge.run_merge(configuration, out, options)


def naive(clock: Clock, base: str, experts: list[str], data: list[str], save: str) -> None:
    """`naive.py` in its three parts."""
    from naive import gather, load, read_rows, solve_all
    from transformers import AutoTokenizer

    with clock.phase("work"):
        with clock.phase("load"):
            models = [load(path) for path in (base, *experts)]
            tokenizer = AutoTokenizer.from_pretrained(base)
            tasks = [read_rows(path, tokenizer) for path in data]
        with clock.phase("gather"):
            grams = gather(models[0], models[1:], tasks)
        with clock.phase("solve"):
            alphas = solve_all(grams, tied=models[0].config.tie_word_embeddings)
    Path(save).write_text(json.dumps(alphas), encoding="utf-8")


JOBS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "make": (make_workload, _TRANSFORMERS),
    "calibrate": (calibrate, _PACKAGE),
    "calibrate_with_floor": (calibrate_with_floor, _PACKAGE),
    "count": (count, _PACKAGE),
    "merge": (merge, _PACKAGE),
    "naive": (naive, _TRANSFORMERS),
}
"""Name -> the job, and what is imported before it."""


def main() -> None:
    """Run the job of the request, and write what it took."""
    request = json.loads(sys.argv[1])
    job, modules = JOBS[request["job"]]
    begin = time.perf_counter()
    for module in modules:
        importlib.import_module(module)
    import_seconds = time.perf_counter() - begin
    import torch

    torch.set_num_threads(request["threads"])
    clock = Clock()
    values = job(clock, **request["arguments"])
    result = {"import_seconds": import_seconds, "phases": clock.phases, "values": values}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
