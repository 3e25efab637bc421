"""The parts of the GPU check: which jobs each runs on which models, and what is kept of them.

Scope: the order of the parts, and each part's mapping for `WORKDIR/parts/NAME.json`. Jobs run in
processes of their own; nothing here imports torch.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_predict as predict
import workload
from gpu_predict import Work
from gpu_room import NUM_EXPERTS, Room, find_room, free_bytes
from measure import BenchmarkError, run_job
from workload import Shape, Workload

SCRIPT = Path(__file__).resolve().parent / "gpu_jobs.py"
SHORT_ROWS, LONGER_ROWS, FILE_ROWS = 5, 10, 20
"""Rows per task of the short runs of `joint`, and rows of their files, of which the last 4 are held out."""
SMALL_ROWS = 10
"""Rows per task where devices are compared."""
START_SECONDS, ASSUMED_RATE, ASSUMED_COPY, ASSUMED_WRITE = 20.0, 0.1, 3e9, 1e9
"""What a part is expected to take, on the safe side: its start, a share of a rate of products, bytes per second."""
CPU_RATE = 30e9
"""Assumed operations per second of a core."""


@dataclass
class Check:
    """What the command line asks for.

    Attributes:
        folder: WORKDIR.
        candidates: folders where models may be made.
        device: "cuda" or "cpu".
        experts: see `find_room`.
        rows: rows per task of `features`, and of each step of `joint`.
        quick: tiny shapes.
        threads: of every job.
        direction: of `joint`.
        profiled: calibrations run under cProfile.
        log: is told what is being run.
    """

    folder: Path
    candidates: list[Path]
    device: str
    experts: int | None
    rows: int
    quick: bool
    threads: int
    direction: str
    profiled: bool
    log: Callable[[str], None] = lambda _: None
    rooms: dict[str, Room] = field(default_factory=dict)

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """A job in a process of its own."""
        return run_job(job, folder=self.folder, threads=self.threads, script=SCRIPT, **arguments)

    def shape(self, name: str) -> Shape:
        """A shape by its name, or a tiny one in its place."""
        if not self.quick:
            return replace(predict.SHAPES[name], name=name)
        tiny = workload.QUICK_SMALL if predict.SHAPES[name].tied else workload.QUICK_LARGE
        return replace(tiny, name=f"quick-{name}", title=f"{tiny.title}, for the {name} shape")

    def room(self, name: str) -> Room:
        """Where a shape's models are, or will be; see `find_room`."""
        if name not in self.rooms:
            shape = self.shape(name)
            free = [(folder, free_bytes(folder, folder / "models" / shape.name)) for folder in self.candidates]
            outputs = [*free, (self.folder, free_bytes(self.folder))]
            self.rooms[name] = found = find_room(shape, free, outputs, self.experts)
            if self.experts is None and found.experts < NUM_EXPERTS:
                self.log(f"{shape.title}: room for {found.experts} experts instead of {NUM_EXPERTS}")
        return self.rooms[name]

    def place(self, name: str, data: str) -> Workload:
        """A shape's workload with data of its own, see `file_rows`; `made` makes it."""
        room = self.room(name)
        return workload.place(room.folder, self.shape(name), room.experts, f"{data}{self.file_rows()[data]}")

    def made(self, name: str, data: str) -> Workload:
        """As `place`; models and all data are made if need be."""
        here = self.place(name, data)
        if not all(path.exists() for path in (*here.paths, *here.data)):
            self.log(f"making {len(here.paths)} models in {here.base.parent}: {here.shape.title}")
            made = []
            for kind, count in self.file_rows().items():
                lengths = [workload.instruction_lengths(count, task) for task in range(len(here.experts))]
                made.append((workload.as_mapping(self.place(name, kind)), lengths))
            self.run("make", device=self.device, made=made, writers=1 if self.quick else len(here.paths))
        return here

    def file_rows(self) -> dict[str, int]:
        """Rows of each data file: for `features`, for short runs of `joint`, and for a real one."""
        return {"rows": self.rows, "short": FILE_ROWS, "real": predict.STEPS * self.rows + predict.HELD_OUT}

    def joint(self, name: str, rows: int | None = None, **parameters: Any) -> dict[str, Any]:
        """A recipe of `joint`: one step on so many rows per task; None for the real run that it stands for."""
        if rows is None:
            here, keys = self.place(name, "real"), {"num_samples": self.rows, "steps": predict.STEPS}
        else:
            here, keys = self.place(name, "short"), {"num_samples": rows, "steps": 1}
        return here.recipe(**{**_JOINT, "direction": self.direction, **keys, **parameters})

    def forget(self, name: str) -> None:
        """Remove a shape's models."""
        if room := self.rooms.pop(name, None):
            models = room.folder / "models"
            shutil.rmtree(models / self.shape(name).name, ignore_errors=True)
            with suppress(OSError):  # other shapes' models are in it
                models.rmdir()


_ONE_SOLVE = "steps 0, label_samples 0, ridge 0.01"
"""A `joint` that chooses nothing and draws nothing: its weights differ by rounding alone."""
_JOINT = {"objective": "joint", "granularity": "linear", "compute_dtype": "auto"}


def _measured(result: Mapping[str, Any], phase: str = "work") -> dict[str, Any]:
    """What the tables show of a job."""
    own = result["phases"][phase]
    return {
        "seconds": own["seconds"], "cpu_seconds": own["cpu_seconds"], "peak_anonymous": own["peak_anonymous"],
        "import_seconds": result["import_seconds"],
        "phases": {name: each["seconds"] for name, each in result["phases"].items()}, **(result["values"] or {}),
    }  # fmt: skip


def _probe(check: Check, _: str) -> dict[str, Any]:
    sizes = (256, 2**20, [64, 128]) if check.quick else (8192, 2**30, [1024, 4096])
    if check.device == "cpu" and not check.quick:
        sizes = (2048, 2**28, [512, 1024])
    size, copied, eigen = sizes
    folder = max(check.candidates, key=free_bytes)
    return _measured(check.run("probe", device=check.device, models=str(folder), size=size, copied=copied, eigen=eigen))


def _alphas(check: Check, name: str) -> dict[str, Any]:
    """Weights by `features` and `joint` on the CPU in float32, and on the device in each precision."""
    rows = min(SMALL_ROWS, check.rows)
    here = check.made(name, "rows")

    def recipes(*precisions: str) -> dict[str, dict[str, Any]]:
        found = {}
        for each in precisions:
            own = {"compute_dtype": each, "direction": "none"}
            found[f"{each}: features"] = here.recipe(num_samples=rows, compute_dtype=each)
            found[f"{each}: joint, 1 step"] = check.joint(name, SHORT_ROWS, **own)
            found[f"{each}: joint, {_ONE_SOLVE}"] = check.joint(
                name, SHORT_ROWS, **own, steps=0, label_samples=0, ridge=0.01
            )
        return found

    cpu = check.run("compare", recipes=recipes("float32"), device="cpu")
    own = ("float32", "auto") if check.device == "cpu" else ("float32", "tf32", "auto")
    there = check.run("compare", recipes=recipes(*own), device=check.device)
    lines = []
    for recipe, alphas in there["values"]["alphas"].items():
        precision, objective = recipe.split(": ")
        reference = f"float32: {objective}"
        lines.append({
            "objective": objective, "precision": precision, "seconds": there["phases"][recipe]["seconds"],
            "seconds_cpu": cpu["phases"][reference]["seconds"],
            **deviation(cpu["values"]["alphas"][reference], alphas),
        })  # fmt: skip
    lines.sort(key=lambda line: line["objective"])  # stable: precisions keep their order
    return {"lines": lines, "rows": {"features": rows, "joint": SHORT_ROWS}, "experts": len(here.experts)}


def _synchronizations(check: Check, name: str) -> dict[str, Any]:
    """Per layer, with rows and twice as many."""
    if check.device != "cuda":
        return {"skipped": "no GPU"}
    here = check.made(name, "rows")
    rows = max(1, min(SMALL_ROWS, check.rows) // 2)
    recipes = {f"features {n}": here.recipe(num_samples=n, compute_dtype="auto") for n in (rows, 2 * rows)}
    recipes |= {f"joint {n}": check.joint(name, n, direction="none") for n in (SHORT_ROWS, 2 * SHORT_ROWS)}
    found = check.run("synchronizations", recipes=recipes)
    return {**found["values"], "layers": here.shape.layers}


def _features(check: Check, name: str) -> dict[str, Any]:
    here = check.made(name, "rows")
    workload.warm(here)
    recipe = here.recipe(num_samples=check.rows, compute_dtype="auto")
    result = check.run("calibrate", recipe=recipe, device=check.device, save=str(_alphas_file(check, name)),
                       profiled=check.profiled)  # fmt: skip
    return {**_measured(result), "experts": len(here.experts)}


def _alphas_file(check: Check, name: str) -> Path:
    return check.folder / "parts" / f"{name}-alphas.json"


def _joint_with(rows: int) -> Callable[[Check, str], dict[str, Any]]:
    def run(check: Check, name: str) -> dict[str, Any]:
        here = check.made(name, "short")
        workload.warm(here)
        result = check.run("calibrate", recipe=check.joint(name, rows), real=check.joint(name), device=check.device,
                           profiled=check.profiled)  # fmt: skip
        return {**_measured(result), "experts": len(here.experts), "rows": rows}

    return run


def _merge(check: Check, name: str) -> dict[str, Any]:
    alphas = _alphas_file(check, name)
    if not alphas.exists():
        return {"skipped": f"no {alphas.name}: run {name}-features first"}
    if check.room(name).output is None:
        return {"skipped": f"no room for the merge, {check.shape(name).model_bytes() / 1e9:.1f} GB"}
    here = check.made(name, "rows")
    workload.warm(here)
    out = check.room(name).output / f"merge-{name}"
    recipe = {
        "merge_method": "submodule_linear", "base_model": str(here.base), "parameters": {"alphas": str(alphas)},
        "models": [{"model": str(path)} for path in here.experts],
    }  # fmt: skip
    try:
        result = check.run("merge", recipe=recipe, out=str(out), device=check.device)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    read = here.shape.model_bytes() * len(here.paths)
    return {**_measured(result), "experts": len(here.experts), "read_bytes": read, "written_bytes": written}


def deviation(reference: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Largest and median difference of weights, and the largest of the reference.

    Raises:
        BenchmarkError: they are of different submodules, or not finite.
    """
    if reference.keys() != other.keys():
        raise BenchmarkError("the weights of CPU and device are of different submodules")
    pairs = [pair for name in reference for pair in zip(reference[name], other[name], strict=True)]
    differences = [abs(one - two) for one, two in pairs]
    if not all(map(math.isfinite, differences)):
        raise BenchmarkError("a weight is NaN or Inf")
    return {
        "largest": max(differences), "median": statistics.median(differences),
        "largest_weight": max(abs(one) for one, _ in pairs),
    }  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its file.
        shape: name of its shape; None without models.
        run: what runs it.
        work: of a shape, a number of experts and rows, on the device.
        processes: number of processes besides that which makes the models.
        on_cpu: work on the CPU, whatever the device.
    """

    name: str
    shape: str | None
    run: Callable[[Check, str], dict[str, Any]]
    work: Callable[[Shape, int, int], Work]
    processes: int = 1
    on_cpu: Callable[[Shape, int, int], Work] | None = None

    def expected_seconds(self, check: Check) -> float:
        """Seconds that it may take, with the models that it has to make."""
        if self.shape is None:
            return START_SECONDS
        shape, experts = check.shape(self.shape), check.room(self.shape).experts
        cpu = CPU_RATE * check.threads
        rate = cpu if check.device == "cpu" else ASSUMED_RATE * predict.H100["tf32"]
        here = check.place(self.shape, "rows")
        making = 0.0
        if not here.base.exists():
            making = START_SECONDS + len(here.paths) * shape.model_bytes() / ASSUMED_WRITE
        seconds = self.work(shape, experts, check.rows).seconds(rate, ASSUMED_COPY)
        if self.on_cpu:
            seconds += self.on_cpu(shape, experts, check.rows).seconds(cpu, ASSUMED_COPY)
        return making + self.processes * START_SECONDS + seconds


def _nothing(*_: Any) -> Work:
    return Work(0.0, 0.0)


def _short(rows: int) -> Callable[[Shape, int, int], Work]:
    return lambda shape, experts, _: predict.joint(shape, experts, rows, 1, FILE_ROWS // 5)


def _compared(times: int) -> Callable[[Shape, int, int], Work]:
    """`features` and a short run of `joint`, in so many precisions."""

    def work(shape: Shape, experts: int, rows: int) -> Work:
        both = predict.features(shape, experts, min(SMALL_ROWS, rows)), _short(SHORT_ROWS)(shape, experts, rows)
        return Work(times * sum(each.flops for each in both), times * sum(each.nbytes for each in both))

    return work


def parts(shapes: Iterable[str]) -> list[Part]:
    """All parts, those that are worth most first."""
    chosen = [shape for shape in ("small", "1b", "8b") if shape in set(shapes)]
    found = [Part("probe", None, _probe, _nothing)]
    for shape in chosen:
        if shape == "small":
            found.append(Part("small-alphas", shape, _alphas, _compared(3), processes=2, on_cpu=_compared(1)))
            found.append(Part("small-synchronizations", shape, _synchronizations, _compared(2)))
            continue
        found += [
            Part(f"{shape}-features", shape, _features, predict.features),
            Part(f"{shape}-joint", shape, _joint_with(SHORT_ROWS), _short(SHORT_ROWS)),
            Part(f"{shape}-merge", shape, _merge, lambda shape, experts, _: predict.merge(shape, experts)),
            Part(f"{shape}-joint-longer", shape, _joint_with(LONGER_ROWS), _short(LONGER_ROWS)),
        ]
    return found
