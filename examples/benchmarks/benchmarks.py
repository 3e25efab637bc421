"""The benchmarks: which jobs run, in which order, and what is made of what they took.

Scope: each function returns a mapping for `WORKDIR/NAME.json`; `rendering.py` makes tables of it. What is compared runs
in turns, round by round, and ratios are taken within a round. Bytes are bytes, seconds are seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import workload
from measure import BenchmarkError, above_imports, quartiles, ratios, run_job, spread
from workload import Shape, Workload

NUM_EXPERTS = 3
AGREEMENT = 1e-3
"""How far alphas of `naive.py` and ours may be apart."""
UNSTEADY = 0.1
"""Relative differences of a speed from which a machine counts as unsteady."""
LIMIT_BYTES = 3_000_000_000
FLOORED = ("features", "steps", "measuring")
"""Phases of a calibration that are held against their products."""
Run = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What the command line asks for.

    Attributes:
        folder: WORKDIR.
        quick: tiny shapes and few rows.
        large: whether the 1.1B models take part.
        threads: of every job.
        repeat: rounds.
        log: is told what is being run.
        other: a source tree of another version of the package, for `versions`.
    """

    folder: Path
    quick: bool
    large: bool
    threads: int
    repeat: int
    log: Callable[[str], None] = lambda _: None
    other: Path | None = None

    @property
    def num_rows(self) -> int:
        """Rows of each task."""
        return 3 if self.quick else 30

    @property
    def small_shape(self) -> Shape:
        """SmolLM2-135M's, or a tiny one."""
        return workload.QUICK_SMALL if self.quick else workload.SMALL

    @property
    def large_shape(self) -> Shape:
        """TinyLlama-1.1B's, or a tiny one."""
        return workload.QUICK_LARGE if self.quick else workload.LARGE

    def run(self, job: str, **arguments: Any) -> Run:
        """A job in a process of its own."""
        return run_job(job, folder=self.folder, threads=self.threads, **arguments)

    def workload(
        self, shape: Shape, num_experts: int = NUM_EXPERTS, lengths: Sequence[int] | None = None, data: str = "data"
    ) -> Workload:
        """Checkpoints and data, made if need be and read once; rows like instruction data, or of given lengths."""
        made = workload.place(self.folder, shape, num_experts, data)
        if not all(path.exists() for path in (*made.paths, *made.data)):
            self.log(f"making the models: {shape.title}")
            own = [lengths or workload.instruction_lengths(self.num_rows, task) for task in range(num_experts)]
            self.run("make", workload=workload.as_mapping(made), lengths=own)
        workload.warm(made)
        return made

    def rounds(self, jobs: Mapping[str, Callable[[], Run]]) -> dict[str, list[Run]]:
        """Run all jobs in turns, every other round backwards; one result per round."""
        results: dict[str, list[Run]] = {name: [] for name in jobs}
        for number in range(self.repeat):
            for name in list(jobs)[:: -1 if number % 2 else 1]:
                self.log(f"round {number + 1} of {self.repeat}: {name}")
                results[name].append(jobs[name]())
        return results


def _of(runs: Sequence[Run], phase: str, key: str) -> list[float]:
    return [run["phases"][phase][key] for run in runs]


def _without(runs: Sequence[Run], phase: str, key: str = "seconds") -> list[float]:
    """The work less the part of it that is a phase of its own."""
    return [run["phases"]["work"][key] - run["phases"][phase][key] for run in runs]


def _above(runs: Sequence[Run]) -> list[float]:
    return [above_imports(run["phases"]) for run in runs]


def floor(bench: Bench) -> dict[str, Any]:
    """Calibration against the matrix products that it cannot do without."""
    shapes = [(bench.small_shape, bench.repeat), *([(bench.large_shape, 1)] if bench.large else [])]
    return {"models": [_floor_of(bench, shape, repeat) for shape, repeat in shapes]}


def _floor_of(bench: Bench, shape: Shape, repeat: int) -> dict[str, Any]:
    made = bench.workload(shape)
    arguments = {"recipe": made.recipe(num_samples=bench.num_rows), "matrices": shape.matrices()}
    runs = []
    for number in range(repeat):
        bench.log(f"{shape.title}: round {number + 1} of {repeat}")
        # Minutes of products are not moved by a profiler that counts calls; seconds may be, and get a run of their own.
        runs.append(bench.run("calibrate_with_floor", **arguments, profiled=repeat == 1))
    profiled = runs[0]
    if repeat > 1:
        bench.log(f"{shape.title}: with the profiler")
        profiled = bench.run("calibrate_with_floor", **arguments, profiled=True)
    rows = [length for task in range(NUM_EXPERTS) for length in workload.instruction_lengths(bench.num_rows, task)]
    floors = [run["values"]["floors"] for run in runs]
    models, tokens = NUM_EXPERTS + 1, runs[0]["values"]["num_tokens"]
    least = {key: [models * min(each[key] for each in both) for both in floors] for key in ("seconds", "cpu_seconds")}
    flops = models * tokens * 2.0 * shape.multiplied()
    seconds = _of(runs, "work", "seconds")
    ratio = ratios(seconds, least["seconds"])
    ratio_cpu = ratios(_of(runs, "work", "cpu_seconds"), least["cpu_seconds"])
    drift = [before["seconds"] / after["seconds"] for before, after in floors]
    widths = shape.hidden * (2 * shape.layers + 1) + shape.vocab
    return {
        "title": shape.title,
        "num_experts": NUM_EXPERTS,
        "num_rows": len(rows),
        "num_tokens": tokens,
        "floor_flops": flops,
        "gram_flops": 2.0 * NUM_EXPERTS**2 * tokens * widths,
        "attention_flops": models * sum(4.0 * row * row * shape.hidden * shape.layers for row in rows),
        "flops_per_second": spread([flops / one for one in least["seconds"]]),
        "rate_after_before": drift,
        "steady": steady(drift, ratio, ratio_cpu),
        "floors": floors,
        "floor_seconds": spread(least["seconds"]),
        "seconds": spread(seconds),
        "ratio": ratio,
        "ratio_cpu": ratio_cpu,
        "check_seconds": spread(_of(runs, "check", "seconds")),
        "profiled_to_plain": profiled["phases"]["work"]["seconds"] / statistics.median(seconds),
        "profile": profiled["values"]["profile"],
        "profiled_apart": repeat > 1,
    }  # fmt: skip


def steady(drift: Sequence[float], ratio: Mapping[str, Any], ratio_cpu: Mapping[str, Any]) -> bool:
    """Whether a ratio to the floor can be believed: the products were as fast before as after, the clock and the
    processor's time agree, and nothing was faster than its floor.

    Args:
        drift: of each round, the products' time before over that after.
        ratio, ratio_cpu: spreads of the calibration's time over the floor's.
    """
    agree = all(
        abs(one / other - 1) <= UNSTEADY for one, other in zip(ratio["values"], ratio_cpu["values"], strict=True)
    )
    return agree and all(abs(each - 1) <= UNSTEADY for each in drift) and ratio["min"] >= 1


def naive(bench: Bench) -> dict[str, Any]:
    """Calibration against the script that one would write."""
    made = bench.workload(bench.small_shape)
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        ours, theirs = f"{temporary}/ours.json", f"{temporary}/naive.json"
        runs = bench.rounds(
            {
                "calibrate": lambda: bench.run(
                    "calibrate", recipe=made.recipe(num_samples=bench.num_rows), save=ours
                ),
                "naive": lambda: bench.run(
                    "naive", base=str(made.base), experts=[str(path) for path in made.experts],
                    data=[str(path) for path in made.data], save=theirs,
                ),
            }
        )  # fmt: skip
        distance = alphas_apart(json.loads(Path(ours).read_text()), json.loads(Path(theirs).read_text()))
    if distance > AGREEMENT:
        raise BenchmarkError(f"the alphas of naive.py and ours differ by {distance:.2g}, more than {AGREEMENT:g}")
    own, other = runs["calibrate"], runs["naive"]
    return {
        "title": made.shape.title,
        "num_experts": NUM_EXPERTS,
        "num_tokens": own[0]["values"]["num_tokens"],
        "largest_difference_of_alphas": distance,
        "ratio": ratios(_of(other, "work", "seconds"), _of(own, "work", "seconds")),
        "ratio_cpu": ratios(_of(other, "work", "cpu_seconds"), _of(own, "work", "cpu_seconds")),
        "ratio_without_loading": ratios(_without(other, "load"), _without(own, "check")),
        "memory_ratio": ratios(_of(own, "work", "peak_anonymous"), _of(other, "work", "peak_anonymous")),
        "memory_ratio_above_imports": ratios(_above(own), _above(other)),
        "runs": {
            "naive.py": {**_summary(other), "load_seconds": spread(_of(other, "load", "seconds"))},
            "calibrate": _summary(own),
        },
    }


def alphas_apart(ours: dict[str, Any], theirs: dict[str, list[float]]) -> float:
    """The largest difference of any weight of an alphas file from `naive.py`'s.

    Raises:
        BenchmarkError: they do not name the same submodules.
    """
    own = {submodule["name"]: submodule["alpha"] for submodule in ours["submodules"]}
    if own.keys() != theirs.keys():
        raise BenchmarkError(f"only one of the two has weights for {sorted(own.keys() ^ theirs.keys())}")
    return max(abs(one - other) for name in own for one, other in zip(own[name], theirs[name], strict=True))


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "seconds": spread(_of(runs, "work", "seconds")),
        "import_seconds": spread([run["import_seconds"] for run in runs]),
        "peak_anonymous": spread(_of(runs, "work", "peak_anonymous")),
        "peak_above_imports": spread(_above(runs)),
    }


def merge(bench: Bench) -> dict[str, Any]:
    """The merge stage, alphas at hand, against mergekit's task_arithmetic."""
    made = bench.workload(bench.small_shape)
    common = {"base_model": str(made.base), "out_dtype": "bfloat16"}
    arithmetic = {
        **common, "merge_method": "task_arithmetic",
        "models": [{"model": str(path), "parameters": {"weight": 0.4}} for path in made.experts],
        "parameters": {"normalize": False},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        alphas = f"{temporary}/alphas.json"
        bench.log("alphas")
        bench.run("calibrate", recipe=made.recipe(num_samples=2, max_seq_length=32), save=alphas)
        own = {
            **common, "merge_method": "submodule_linear", "models": [{"model": str(path)} for path in made.experts],
            "parameters": {"alphas": alphas},
        }  # fmt: skip
        recipes = {
            "submodule_linear": own,
            "task_arithmetic": arithmetic,
            "task_arithmetic, dtype: float32": {**arithmetic, "dtype": "float32"},
        }

        def merged(recipe: dict[str, Any]) -> Run:
            out = Path(temporary) / "out"
            os.sync()  # what an earlier merge has written is not this one's to wait for
            run = bench.run("merge", recipe=recipe, out=str(out))
            if not list(out.glob("model*.safetensors")):
                raise BenchmarkError("a merge has written no model")
            shutil.rmtree(out)
            return run

        runs = bench.rounds({name: lambda recipe=recipe: merged(recipe) for name, recipe in recipes.items()})
    ours = runs["submodule_linear"]
    return {
        "title": made.shape.title,
        "num_experts": NUM_EXPERTS,
        "runs": {name: _summary(each) for name, each in runs.items()},
        "ratios": {
            name: {
                "seconds": ratios(_of(ours, "work", "seconds"), _of(each, "work", "seconds")),
                "cpu_seconds": ratios(_of(ours, "work", "cpu_seconds"), _of(each, "work", "cpu_seconds")),
                "peak_anonymous": ratios(_of(ours, "work", "peak_anonymous"), _of(each, "work", "peak_anonymous")),
                "peak_above_imports": ratios(_above(ours), _above(each)),
            }
            for name, each in runs.items() if name != "submodule_linear"
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A point of `growth`: one of these is varied at a time. `num_rows` is per task, and all rows are `length` long."""

    layers: int
    num_rows: int
    length: int
    num_experts: int


def growth(bench: Bench) -> dict[str, Any]:
    """Time and memory over layers, rows, tokens per row, and experts."""
    if bench.quick:
        origin = Size(layers=1, num_rows=2, length=8, num_experts=2)
        series = {"layers": (1, 2), "num_rows": (1, 2), "length": (8, 16), "num_experts": (1, 2)}
    else:
        origin = Size(layers=6, num_rows=30, length=128, num_experts=2)
        series = {"layers": (6, 12, 24), "num_rows": (10, 30, 90), "length": (64, 128, 256, 512),
                  "num_experts": (1, 2, 3, 4)}  # fmt: skip
    lengths = [max(series["length"]) + 8] * max(series["num_rows"])
    experts = dict.fromkeys(series["layers"], origin.num_experts)
    experts[origin.layers] = max(series["num_experts"])
    made = {
        layers: bench.workload(workload.growing(layers, quick=bench.quick), count, lengths, data="rows")
        for layers, count in experts.items()
    }
    results = []
    for name, values in series.items():
        sizes = {value: Size(**{**vars(origin), name: value}) for value in values}

        def measured(size: Size) -> Run:
            recipe = made[size.layers].recipe(size.num_experts, num_samples=size.num_rows, max_seq_length=size.length)
            return bench.run("calibrate", recipe=recipe)

        runs = bench.rounds({f"{name} {value}": lambda size=size: measured(size) for value, size in sizes.items()})
        first = runs[f"{name} {values[0]}"]
        flops = {value: _floor_flops(made[size.layers].shape, size) for value, size in sizes.items()}
        points = []
        for value in values:
            each = runs[f"{name} {value}"]
            start = int(name == "num_experts")  # T + 1 streams
            points.append(
                {
                    "value": value,
                    "linear": (value + start) / (values[0] + start),
                    "flops": flops[value] / flops[values[0]],
                    "seconds": spread(_without(each, "check")),
                    "peak_above_imports": spread(_above(each)),
                    "time_ratio": ratios(_without(each, "check"), _without(first, "check")),
                    "memory_ratio": ratios(_above(each), _above(first)),
                    "memory_ratio_with_imports": ratios(
                        _of(each, "work", "peak_anonymous"), _of(first, "work", "peak_anonymous")
                    ),
                }
            )
        results.append({"varied": name, "points": points})
    return {"title": made[origin.layers].shape.title, "origin": vars(origin), "series": results}


def _floor_flops(shape: Shape, size: Size) -> float:
    tokens = size.num_experts * size.num_rows * size.length
    return (size.num_experts + 1) * tokens * 2.0 * shape.multiplied()


_LOADED = "import sys; print('mergekit_slta._autoload' in sys.modules)"


def startup(bench: Bench) -> dict[str, Any]:
    """The interpreter's start with and without the plugin's .pth."""
    pairs = 5 if bench.quick else 200
    spec = find_spec("mergekit_slta")
    if spec is None or spec.origin is None:
        raise BenchmarkError("mergekit_slta cannot be imported by this interpreter")
    root = Path(spec.origin).parent.parent
    plain = {key: value for key, value in os.environ.items() if key != "MERGEKIT_SLTA_AUTOLOAD"}
    found = {**plain, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [plain.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        sites = {"with": Path(temporary) / "with", "without": Path(temporary) / "without"}
        for site in sites.values():
            site.mkdir()
        shutil.copy(root / "mergekit_slta.pth", sites["with"])

        def started(name: str, code: str) -> list[str]:
            return [sys.executable, "-S", "-c", f"import site; site.addsitedir({str(sites[name])!r}); {code}"]

        if not _is_true(started("with", _LOADED), found) or _is_true(started("without", _LOADED), found):
            raise BenchmarkError("a .pth in a folder of its own does not decide over the plugin's hook here")
        bench.log(f"{pairs} pairs, bare interpreter with and without the .pth")
        bare = _starts({name: (started(name, "pass"), found) for name in sites}, pairs)
    switch = None
    if _is_true([sys.executable, "-c", _LOADED], plain):
        bench.log(f"{pairs} pairs, this environment with the switch on and off")
        command = [sys.executable, "-c", "pass"]
        off = {**plain, "MERGEKIT_SLTA_AUTOLOAD": "0"}
        switch = _starts({"with": (command, plain), "without": (command, off)}, pairs)
    return {"bare": bare, "switch": switch}


def _is_true(command: Sequence[str], env: Mapping[str, str]) -> bool:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == "True"


def _starts(commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], pairs: int) -> dict[str, Any]:
    """Seconds of pairs of starts (command, environment), in turns; the first pair fills the caches and is not
    counted."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(pairs + 1):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            command, env = commands[name]
            begin = time.perf_counter()
            subprocess.run(command, env=env, check=True)
            if number:
                taken[name].append(time.perf_counter() - begin)
    differences = [one - other for one, other in zip(taken["with"], taken["without"], strict=True)]
    quartiles = statistics.quantiles(differences, n=4)
    return {
        "pairs": pairs,
        "seconds_with": statistics.median(taken["with"]),
        "seconds_without": statistics.median(taken["without"]),
        "difference": statistics.median(differences),
        "difference_quartiles": [quartiles[0], quartiles[2]],
    }


def check(bench: Bench) -> dict[str, Any]:
    """What `mergekit-slta check` predicts against what is measured."""
    made = bench.workload(bench.small_shape)
    few = min(5, bench.num_rows)
    jobs: dict[str, dict[str, Any]] = {"attn_mlp": {"num_samples": bench.num_rows}}
    jobs |= {name: {"granularity": name, "num_samples": few} for name in ("layer", "head_mlp", "linear", "model")}
    gradients: dict[str, dict[str, Any]] = {
        "joint, steps 0": {"steps": 0}, "joint, the same rows": {"steps": 2, "fresh_rows": False},
        "joint, linear, rows of their own": {"granularity": "linear", "steps": 2},
    }  # fmt: skip
    for name, settings in gradients.items():
        jobs[name] = {"objective": "joint", "num_samples": few, **settings}
    if bench.quick:  # one of each objective
        jobs = {name: jobs[name] for name in ("attn_mlp", "joint, the same rows")}
    lines = []
    for name, settings in jobs.items():
        recipe = made.recipe(**settings)
        bench.log(f"{name}: counted")
        counted = bench.run("count", recipe=recipe)["values"]
        bench.log(f"{name}: measured")
        run = bench.run("calibrate", recipe=recipe)
        predicted = run["values"]
        products = counted["flops"].get("float32", 0.0)
        peak = above_imports(run["phases"])
        lines.append(
            {
                "job": name,
                "num_rows": predicted["num_rows"],
                "num_tokens": predicted["num_tokens"],
                "predicted_flops": predicted["predicted_flops"],
                "counted_flops": counted["flops"],
                "flops_ratio": predicted["predicted_flops"] / products,
                "predicted_read_bytes": predicted["predicted_read_bytes"],
                "handed_out_bytes": counted["read_bytes"],
                "distinct_bytes": counted["distinct_bytes"],
                "read_ratio": predicted["predicted_read_bytes"] / counted["read_bytes"],
                "distinct_ratio": predicted["predicted_read_bytes"] / counted["distinct_bytes"],
                "predicted_peak_bytes": predicted["predicted_peak_bytes"],
                "peak_above_imports": peak,
                "peak_ratio": predicted["predicted_peak_bytes"] / peak,
                "seconds": run["phases"]["work"]["seconds"],
            }
        )
    return {"title": made.shape.title, "num_experts": NUM_EXPERTS, "lines": lines}


def minutes(bench: Bench) -> dict[str, Any]:
    """The time of each phase: what `mergekit-slta check` says just before, against what the merge's record says."""
    joint = {"objective": "joint", "granularity": "linear", "compute_dtype": "auto", "steps": 1}
    small = bench.workload(bench.small_shape)
    recipes = {
        f"features, {small.shape.title}": small.recipe(num_samples=bench.num_rows),
        f"joint, {small.shape.title}": small.recipe(num_samples=min(5, bench.num_rows), **joint),
    }
    if bench.large:
        large = bench.workload(bench.large_shape)
        few = {"num_samples": min(3, bench.num_rows), "direction": "none"}
        recipes |= {f"features, {large.shape.title}": large.recipe(num_samples=few["num_samples"])}
        recipes |= {f"joint, {large.shape.title}": large.recipe(**joint, **few)}
    if not bench.quick:
        demo = bench.folder / "demo"
        if not demo.exists():
            bench.log("making the models of the demo")
            bench.run("demo", folder=str(demo))
        recipes |= {"features, demo": demo_recipe(demo), "joint, demo": demo_recipe(demo, objective="joint", steps=3)}
    lines = []
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        for name, recipe in recipes.items():
            bench.log(name)
            found = bench.run("phases", recipe={**recipe, "out_dtype": "bfloat16"}, out=f"{temporary}/out")["values"]
            shutil.rmtree(f"{temporary}/out")
            predicted, measured = found["predicted_seconds"], found["took"]["seconds"]
            lines.append(
                {
                    "job": name,
                    "num_tokens": found["num_tokens"],
                    "predicted": predicted,
                    "measured": measured,
                    "ratio": sum(predicted.values()) / sum(measured.values()),
                    "rates": found["rates"],
                    "products": _products_seconds(found),
                }
            )
    return {"lines": lines}


def _products_seconds(found: Mapping[str, Any]) -> dict[str, float]:
    """The time of each calibration phase's products alone, at the faster of two measurements; see `jobs.phases`."""
    rates = {kind: max(each[kind] for each in found["rates"]) for kind in found["rates"][0]}
    return {
        name: sum(amount / rates[kind] for kind, amount in flops.items() if amount)
        for name, flops in found["predicted_products"].items()
        if name in FLOORED and name in found["took"]["seconds"]
    }


def demo_recipe(folder: Path, **parameters: Any) -> dict[str, Any]:
    """The demo's recipe, over absolute paths."""
    answers = {"text": "{question} {answer}"}
    columns = {"math": answers, "words": {}, "numbers": answers}
    models = [
        {"model": f"{folder}/models/{name}", "parameters": {"dataset": f"{folder}/data/{name}.jsonl", **more}}
        for name, more in columns.items()
    ]
    return {
        "merge_method": "submodule_linear", "base_model": f"{folder}/models/base", "models": models,
        "parameters": {"num_samples": 30, **parameters},
    }  # fmt: skip


def limit(bench: Bench) -> dict[str, Any]:
    """Whether a calibration of the large models stays within 3 GB of anonymous memory."""
    if not bench.large:
        return {"skipped": "--no-large"}
    made = bench.workload(bench.large_shape)
    bench.log(f"{made.shape.title}: calibration")
    run = bench.run("calibrate", recipe=made.recipe(num_samples=bench.num_rows))
    work = run["phases"]["work"]
    return {
        "title": made.shape.title,
        "num_experts": NUM_EXPERTS,
        "num_tokens": run["values"]["num_tokens"],
        "checkpoint_bytes": sum(file.stat().st_size for path in made.paths for file in path.glob("*.safetensors")),
        "limit_bytes": LIMIT_BYTES,
        "peak_anonymous": work["peak_anonymous"],
        "peak_above_imports": above_imports(run["phases"]),
        "predicted_peak_bytes": run["values"]["predicted_peak_bytes"],
        "peak_file": work["peak_file"],
        "seconds": work["seconds"],
        "holds": work["peak_anonymous"] <= LIMIT_BYTES,
    }


THIS = Path(__file__).resolve().parents[2]
"""The source tree that this file is part of."""


def versions(bench: Bench) -> dict[str, Any]:
    """This version of the package against another one: the same calibrations and the same merge, in turns."""
    if bench.other is None:
        raise BenchmarkError("versions needs --other PATH")
    made = bench.workload(bench.small_shape)
    recipes = {
        "features, attn_mlp": made.recipe(num_samples=min(5, bench.num_rows)),
        "features, linear": made.recipe(granularity="linear", num_samples=min(5, bench.num_rows)),
        "joint, linear": made.recipe(objective="joint", granularity="linear", steps=1, num_samples=2),
    }
    trees = {"this": THIS, "other": bench.other}
    results = []
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:

        def merged(key: str) -> dict[str, Any]:
            """A recipe with alphas that this version has made: an older file may be refused."""
            alphas = f"{temporary}/{key}.json"
            few = made.recipe(num_samples=1, max_seq_length=32)
            bench.run("calibrate", tree=trees[key], recipe=few, save=alphas)
            return {
                "merge_method": "submodule_linear", "base_model": str(made.base), "out_dtype": "bfloat16",
                "models": [{"model": str(path)} for path in made.experts], "parameters": {"alphas": alphas},
            }  # fmt: skip

        def merge_with(key: str, recipe: dict[str, Any]) -> Run:
            os.sync()
            run = bench.run("merge", tree=trees[key], recipe=recipe, out=f"{temporary}/out")
            shutil.rmtree(f"{temporary}/out")
            return run

        for name, recipe in recipes.items():
            bench.log(name)
            runs = bench.rounds(
                {key: lambda tree=tree, recipe=recipe: bench.run("calibrate", tree=tree, recipe=recipe)
                 for key, tree in trees.items()}
            )  # fmt: skip
            results.append({"job": name, **_compared(runs)})
        bench.log("merge")
        merges = {key: merged(key) for key in trees}
        runs = bench.rounds({key: lambda key=key: merge_with(key, merges[key]) for key in trees})
        results.append({"job": "merge, alphas at hand", **_compared(runs)})
    return {
        "title": made.shape.title,
        "num_experts": NUM_EXPERTS,
        "versions": {key: revision(tree) for key, tree in trees.items()},
        "jobs": results,
    }


def _compared(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Ratios of this version to the other, pair by pair, with quartiles."""
    this, other = runs["this"], runs["other"]

    def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
        paired = ratios(ours, theirs)
        return {**paired, "quartiles": quartiles(paired["values"]), "this": spread(ours), "other": spread(theirs)}

    keys = ("seconds", "cpu_seconds", "peak_anonymous")
    return {
        "pairs": len(this),
        **{key: compared(_of(this, "work", key), _of(other, "work", key)) for key in keys},
        "import_seconds": compared(*([run["import_seconds"] for run in each] for each in (this, other))),
    }


def revision(tree: Path) -> str:
    """The commit of a source tree, with a + where its files differ from it; where git knows none, the folder's name."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else tree.name


BENCHMARKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "floor": floor, "naive": naive, "merge": merge, "growth": growth, "startup": startup, "check": check,
    "minutes": minutes, "limit": limit, "versions": versions,
}  # fmt: skip
