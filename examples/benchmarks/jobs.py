"""What is measured: each job runs in a process of its own, started by `measure.run_job`.

Scope: `jobs.py REQUEST RESULT`, JSON in and JSON out. Imports come first and are timed by themselves. Of the package,
jobs use what its users do and nothing else: `mergekit_slta.calibrate`, the command `mergekit-slta check`, and
mergekit's `run_merge`. So the same job measures any version of it: whichever the process finds first.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import Clock
from workload import from_mapping, make

TRANSFORMERS = ("torch", "transformers", "transformers.models.llama.modeling_llama")
PACKAGE = (*TRANSFORMERS, "datasets", "mergekit.merge", "mergekit_slta")
_PUBLIC = ("Alphas", "calibrate", "register")
"""Names of the package that load its modules."""


def make_workload(clock: Clock, workload: dict[str, Any], lengths: list[list[int]]) -> None:
    """Checkpoints and data; not measured."""
    make(from_mapping(workload), lengths)


def calibrate(clock: Clock, recipe: dict[str, Any], save: str | None = None) -> dict[str, Any]:
    """`mergekit-slta check`, then `mergekit_slta.calibrate(recipe)`; the alphas in `save`, if asked for.

    Returns:
        what `check` predicts; see `checked`.
    """
    import mergekit_slta

    predicted = checked(clock, recipe)
    with clock.phase("work"):
        alphas = mergekit_slta.calibrate(recipe)
    if save:
        alphas.save(save)
    return predicted


def checked(clock: Clock, recipe: dict[str, Any], *options: str, phase: str = "check") -> dict[str, Any]:
    """Run `mergekit-slta check --json OPTIONS` in this process, as a phase, and read what it prints; {} for a version
    of the package that does not print JSON.

    Returns:
        num_rows, num_tokens; predicted_flops, predicted_read_bytes, predicted_peak_bytes (without the libraries), and
        predicted_seconds of each phase.
    """
    printed = io.StringIO()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        with clock.phase(phase), contextlib.redirect_stdout(printed), contextlib.suppress(RuntimeError):
            _command("check", "--json", str(path), *options)
    return read_check(json.loads(printed.getvalue())) if printed.getvalue() else {}


def _command(*arguments: str) -> None:
    """`mergekit-slta ARGUMENTS`, in this process."""
    before, sys.argv = sys.argv, ["mergekit-slta", *arguments]
    try:
        runpy.run_module("mergekit_slta", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"mergekit-slta {arguments[0]} ended with exit code {ended.code}") from ended
    finally:
        sys.argv = before


def read_check(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are compared, of those that `mergekit-slta check --json` has printed."""
    return {
        "num_rows": sum(expert["rows"] for expert in found["experts"]),
        "num_tokens": sum(expert["tokens"] for expert in found["experts"]),
        "predicted_flops": found["flops"],
        "predicted_read_bytes": found["read_bytes"],
        "predicted_peak_bytes": found["peak_bytes"],
        "predicted_seconds": {phase["name"]: phase["seconds"] for phase in found["phases"]},
        "predicted_products": {phase["name"]: phase["flops"] for phase in found["phases"]},
    }


def calibrate_with_floor(
    clock: Clock, recipe: dict[str, Any], matrices: list[list[int]], profiled: bool = False
) -> dict[str, Any]:
    """A calibration between two measurements of the matrix products alone; optionally under the profiler."""
    from products import floor

    import mergekit_slta

    predicted = checked(clock, recipe)
    sizes = [tuple(size) for size in matrices]
    floors = [floor(sizes, predicted["num_tokens"])]
    profile = None
    with clock.phase("work"):
        if profiled:
            profile = profile_of(lambda: mergekit_slta.calibrate(recipe))
        else:
            mergekit_slta.calibrate(recipe)
    floors.append(floor(sizes, predicted["num_tokens"]))
    return {"num_tokens": predicted["num_tokens"], "floors": floors, "profile": profile}


def profile_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Where a call's time goes: by function itself, and by function of the package with what it calls."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(call)
    entries = pstats.Stats(profiler).stats  # type: ignore[attr-defined] - (file, line, name) -> (.., calls, own, all, ..)
    own = sorted(entries.items(), key=lambda entry: -entry[1][2])[:14]
    package = [entry for entry in entries.items() if "mergekit_slta" in Path(entry[0][0]).parts]
    package = sorted(package, key=lambda entry: -entry[1][3])[:24]
    return {
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

    import mergekit_slta

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
            mergekit_slta.calibrate(recipe)
    finally:
        LazyTensorLoader.get_tensor = original
    return {"read_bytes": sum(handed), "distinct_bytes": sum(distinct.values()), "flops": dict(products.flops)}


def phases(clock: Clock, recipe: dict[str, Any], out: str) -> dict[str, Any]:
    """`mergekit-slta check --json`, then `run_merge`: what was predicted, and the record of what each phase took.

    Also the rates of the products by themselves, before and after.
    """
    from products import rates

    predicted = checked(clock, recipe)
    config = json.loads(Path(recipe["base_model"], "config.json").read_text(encoding="utf-8"))
    kinds = sorted(
        {kind for flops in predicted["predicted_products"].values() for kind in flops} & {"float32", "bfloat16"}
    )
    sizes = config["hidden_size"], config["intermediate_size"]
    before = rates(kinds, *sizes)
    merge(clock, recipe, out)
    took = json.loads(Path(out, "slta_merge.json").read_text(encoding="utf-8"))["took"]
    return {**predicted, "took": took, "rates": [before, rates(kinds, *sizes)]}


def merge(clock: Clock, recipe: dict[str, Any], out: str, device: str = "cpu") -> None:
    """mergekit's `run_merge`."""
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    import mergekit_slta  # noqa: F401 - registers the method where .pth files are not read

    configuration = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(quiet=True, write_model_card=False, device=device)
    with clock.phase("work"):
        mergekit.merge.run_merge(configuration, out, options)


def demo(clock: Clock, folder: str) -> None:
    """The demo's models, hardly trained; not measured."""
    with contextlib.redirect_stdout(io.StringIO()):
        _command("demo", folder, "--quick")


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


Jobs = dict[str, tuple[Callable[..., Any], tuple[str, ...]]]
"""Name -> the job, and what is imported before it."""
JOBS: Jobs = {
    "make": (make_workload, TRANSFORMERS),
    "calibrate": (calibrate, PACKAGE),
    "calibrate_with_floor": (calibrate_with_floor, PACKAGE),
    "count": (count, PACKAGE),
    "merge": (merge, PACKAGE),
    "phases": (phases, PACKAGE),
    "demo": (demo, PACKAGE),
    "naive": (naive, TRANSFORMERS),
}


def main(jobs: Jobs) -> None:
    """Run the job of the request, and write what it took."""
    request = json.loads(sys.argv[1])
    job, modules = jobs[request["job"]]
    begin = time.perf_counter()
    for module in modules:
        importlib.import_module(module)
    if "mergekit_slta" in modules:
        for name in _PUBLIC:
            getattr(sys.modules["mergekit_slta"], name)
    import_seconds = time.perf_counter() - begin
    import torch

    torch.set_num_threads(request["threads"])
    clock = Clock()
    values = job(clock, **request["arguments"])
    package = sys.modules.get("mergekit_slta")
    result = {
        "import_seconds": import_seconds, "phases": clock.phases, "values": values,
        "package": package and str(Path(package.__file__).parent),
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(JOBS)
