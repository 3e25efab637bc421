"""What `check` prints: models and rows, the first row of each task, the settings, and what calibration and merge take.

Scope: text and numbers about a prepared job and its estimated costs. `runtime.screen` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from rich.console import RenderableType

from mergekit_slta.data.rows import TaskRows
from mergekit_slta.errors import listing, show
from mergekit_slta.files.names import ALPHAS_NAME, CARD_NAME, ROWS_FOLDER, STATISTICS_NAME
from mergekit_slta.files.output_folder import free_bytes
from mergekit_slta.generation.choices import OVERSAMPLING
from mergekit_slta.generation.write import model_bytes
from mergekit_slta.job.job import Job
from mergekit_slta.job.templates import describe_template
from mergekit_slta.objectives.costs import MEMORY_MARGIN, Costs
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.reporting.row_view import view_of_row
from mergekit_slta.runtime.clock import describe_seconds
from mergekit_slta.runtime.devices import is_here
from mergekit_slta.runtime.screen import Columns, describe_bytes, describe_flops, facts, text

_SETTINGS = ("objective", "num_samples", "max_seq_length", "seed", "balance", "ridge", "evaluate")
"""Shared keys that `check` shows, besides the objective's own keys."""


def describe_job(
    job: Job, costs: Costs, seconds: Mapping[str, float] | None = None, *, is_detailed: bool = False
) -> list[RenderableType]:
    """Describe the plan of a job and its costs, for `check`.

    Args:
        job, costs: the job, and its estimated costs.
        seconds: of each phase, see `job.forecast`; None if they are not known.
        is_detailed: whether the parts of the memory are listed.
    """
    needs = facts(_needs(job, costs, seconds, is_detailed))
    parts: list[RenderableType] = [_models(job), ""]
    for drawn in job.rows:
        if drawn is not None and drawn.rows and not drawn.is_planned and job.row_tokenizer is not None:
            parts += [text(_first_row(drawn), "bold"), view_of_row(drawn.rows[0], job.row_tokenizer), ""]
    return [*parts, facts(_plan(job)), "", _phases(job, costs, seconds), "", needs]


def _models(job: Job) -> RenderableType:
    """The models, and the rows of each task."""
    recipe, needs_rows = job.recipe, job.recipe.settings.needs_rows
    header = ["role", "model", "rows", "tokens", "cut rows", "answer tokens", "held out"]
    rows = [["base", recipe.names[recipe.base]]]
    for task, drawn in zip(recipe.tasks, job.rows, strict=True):
        cells = ["none" if needs_rows else "-"]
        if drawn is not None:
            numbers = len(drawn.rows), drawn.num_tokens, drawn.num_cut, drawn.num_answer_tokens, len(drawn.held_out)
            cells = [f"{number:,}" for number in numbers] if not drawn.is_planned else [
                f"{numbers[0]:,}", f"≤{numbers[1]:,}", "-", f"≤{numbers[3]:,}", f"{numbers[4]:,}",
            ]  # fmt: skip
        rows.append(["expert", recipe.names[task.model], *cells])
    rows += [["direction", recipe.names[model]] for model in recipe.directions]
    rows += [["direction", recipe.closed_form]] if recipe.closed_form is not None else []
    rows = [row + ["-"] * (len(header) - len(row)) for row in rows]
    if any(task.importance != 1 for task in recipe.tasks):
        weights = {recipe.names[task.model]: f"{task.importance:g}" for task in recipe.tasks}
        header, rows = [*header, "importance"], [[*row, weights.get(row[1], "-")] for row in rows]
    return Columns(header, rows, names=2)


def _first_row(drawn: TaskRows) -> str:
    row = drawn.rows[0]
    template = f"; {describe_template(drawn.chat_template)} chat template" if drawn.chat_template else ""
    answer = f"{row.num_answer_tokens} of them the answer"
    if row.completion == 1:
        answer = "no prompt: the whole row is the answer"
    return (
        f"First row of {show(drawn.name, 120)}: row {row.number} of {show(drawn.dataset, 120)}, "
        f"{len(row.ids)} tokens, {answer}{template}"
    )


def _plan(job: Job) -> Iterator[tuple[str, str]]:
    """What is merged, and with which settings."""
    recipe, settings, plan = job.recipe, job.recipe.settings, job.plan
    shown = {**{key: getattr(settings, key) for key in _SETTINGS}, **settings.own.model_dump()}
    covered = sum(len(submodule.tensors) for submodule in job.submodules)
    yield "model", f"{type(job.skeleton.model).__name__}, {job.skeleton.num_layers} layers"
    yield "granularity", f"{settings.granularity}: {len(job.submodules)} submodules cover all {covered} tensors"
    yield "settings", ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
    yield "precision", _precision(job)
    if recipe.directions:
        yield "direction", "a model without a task; its weights are found from the others' rows"
    if recipe.closed_form is not None:
        yield "direction", f"{recipe.closed_form} is computed from the experts' weights"
    if not settings.needs_rows:
        yield "rows", "no rows needed: the weights are a closed form of the experts'"
    yield from _writing(job)
    yield from _measuring(job)
    undivided = sum(heads is None for heads in job.skeleton.anatomy.heads)
    if settings.granularity == "head_mlp" and undivided:
        yield "heads", f"not found in {undivided} layers: their attention has one weight per model"
    if carried := plan.carried:
        share = sum(map(plan.num_elements, carried)) / max(1, sum(map(plan.num_elements, plan.outputs)))
        yield (
            "carried",
            (
                f"{len(carried)} tensors ({share:.1%} of the weights) that text does not run through: copied where all "
                f"models agree; `uncalibrated: {settings.uncalibrated}` where they differ"
            ),
        )
    if plan.is_tied:
        yield "tied", "the output projection is the embedding table: one alpha for both"


def _precision(job: Job) -> str:
    """Which precision `compute_dtype` stands for in this run."""
    settings, products = job.recipe.settings, job.layer_products
    name = f"`compute_dtype: {settings.compute_dtype}`"
    if products is None:
        return f"{settings.tensor_dtype}; the layers' products in bfloat16 if {job.device} is fast at it ({name})"
    if products == settings.tensor_dtype:
        reason = " has no fast bfloat16" if settings.allows_bfloat16 else ""
        return f"{products} ({name}{': ' + str(job.device) + reason if reason else ''})"
    return f"{settings.tensor_dtype}; the layers' products in {products} ({name})"


def _writing(job: Job) -> Iterator[tuple[str, str]]:
    """The rows that experts have to write, and what that needs."""
    planned = [drawn for drawn in job.rows if drawn is not None and drawn.is_planned]
    if not planned:
        return
    count = len(planned[0].rows) + len(planned[0].held_out)
    size = describe_bytes(model_bytes(job.skeleton.shapes, job.dtype.itemsize))
    yield "rows", f"{listing((drawn.name for drawn in planned), 6)}: written by the expert itself (`dataset: {SELF}`)"
    yield (
        "",
        (
            f"{count} rows each, chosen from {OVERSAMPLING * count}; kept in {ROWS_FOLDER}/ beside the weights; one "
            f"whole model at a time is in memory ({size})"
        ),
    )


def _measuring(job: Job) -> Iterator[tuple[str, str]]:
    """What is measured on the held-out rows."""
    settings = job.recipe.settings
    if not settings.evaluate or None in job.rows:
        return
    held_out, steps = job.held_out_examples(), settings.own.model_dump().get("steps", 0)
    few = [drawn.name for drawn in job.rows if drawn is not None and not drawn.held_out]
    if few:
        yield "measures", f"nothing: too few rows to hold any out of {listing(few)}"
    if few and steps:
        yield "", "no steps: the weights are those of `features`; give 15 or more different rows per task"
    if not held_out:
        return
    num_tokens = sum(len(example.row.ids) for example in held_out)
    how = "their expert, and every model that is tried" if steps else (
        "the base, the merge and their expert; this reads the checkpoints once more"
    )  # fmt: skip
    yield (
        "measures",
        (
            f"the merge, on the first half of the held-out rows: {len(held_out)} rows, {num_tokens} tokens, a forward "
            f"pass through {how}"
        ),
    )


def _phases(job: Job, costs: Costs, seconds: Mapping[str, float] | None) -> RenderableType:
    """Time and work of every phase."""
    rows = [
        [
            phase.name,
            describe_seconds(seconds[phase.name]) if seconds else "?",
            describe_flops(sum(phase.flops.values())) if any(phase.flops.values()) else "-",
            describe_bytes(phase.read_bytes) if phase.read_bytes else "-",
            describe_bytes(phase.written_bytes) if phase.written_bytes else "-",
        ]
        for phase in costs.phases
    ]
    return Columns(["phase", "time", "work", "reads", "writes"], rows)


def _needs(job: Job, costs: Costs, seconds: Mapping[str, float] | None, is_detailed: bool) -> Iterator[tuple[str, str]]:
    """Time, memory and disk."""
    yield "device", _device(job)
    yield "takes", _takes(job, seconds)
    peak, libraries = costs.peak_bytes, libraries_bytes()
    beside = f", and {describe_bytes(libraries)} on the CPU" if job.device.type != "cpu" else ""
    total = peak + (0 if beside else libraries)
    yield "memory", f"about {describe_bytes(total)} on {job.device} at the peak of calibration{beside}{_free(job)}"
    if is_detailed:
        parts = ", ".join(f"{describe_bytes(size)} {part}" for part, size in costs.memory.items())
        yield (
            "",
            (
                f"{parts}; {(MEMORY_MARGIN - 1):.0%} more that the allocator keeps; {describe_bytes(libraries)} "
                f"libraries; the largest allocation is {describe_bytes(costs.largest_bytes)}"
            ),
        )
    yield from _reads(costs, total)
    for name, reason in job.merged_copies.items():
        size = describe_bytes(costs.written_bytes)
        yield "copy", f"{show(name)} is merged into a full copy first ({show(reason)}): about {size} more"
    yield from _downloads(job)
    if costs.scratch_bytes:
        kept, until = (" and the direction", "merge") if job.recipe.closed_form else ("", "calibration")
        yield "keeps", f"{describe_bytes(costs.scratch_bytes)} of features{kept} on disk until the {until} is done"
    beside = f", {STATISTICS_NAME}" if job.recipe.settings.needs_rows else ""
    yield (
        "writes",
        (
            f"{describe_bytes(costs.written_bytes)}: the merged model with its tokenizer, {ALPHAS_NAME}{beside}, "
            f"figures and {CARD_NAME}; {describe_bytes(free_bytes(Path.cwd()))} are free on the disk of this folder"
        ),
    )


def _reads(costs: Costs, needed: int) -> Iterator[tuple[str, str]]:
    """Whether a calibration that reads the checkpoints several times finds them in memory: mapped files stay in the
    system's page cache as long as nothing else needs the memory.

    Args:
        costs: their last phase, the merge, reads every checkpoint once.
        needed: bytes of memory that the calibration takes.
    """
    once = costs.phases[-1].read_bytes
    total = sum(phase.read_bytes for phase in costs.phases)
    if total <= 2 * once:  # as for `features`
        return
    room = max(0, psutil.virtual_memory().available - needed)
    where = (
        "they fit into the free memory, where the system keeps them after the first time"
        if once <= room
        else f"the free memory holds {describe_bytes(room)} of them, so the disk is read each time"
    )
    yield "reads", f"{describe_bytes(total)}: the checkpoints have {describe_bytes(once)}, and {where}"


def _takes(job: Job, seconds: Mapping[str, float] | None) -> str:
    if seconds is None:
        return f"a time that is not known: it needs a trial on {job.device}, which cannot be used here now"
    steps = ""
    if _steps(job) == "auto":
        steps = f" for all {job.recipe.settings.own.max_steps} steps, often fewer"  # type: ignore[attr-defined]
    elif any(drawn is not None and drawn.is_planned for drawn in job.rows):
        steps = " if every row that an expert writes is as long as it can be"
    download = "; the download comes on top" if job.plan.downloads else ""
    return f"about {describe_seconds(sum(seconds.values()))}{steps}; longer on a busy machine{download}"


def _steps(job: Job) -> object:
    """The recipe's `steps`; None if the job makes none."""
    can_measure = None not in job.rows and job.held_out_examples()
    return job.recipe.settings.own.model_dump().get("steps") if can_measure else None


def _free(job: Job) -> str:
    """How much of the device's memory is free now."""
    if not is_here(job.device) or job.device.type not in ("cpu", "cuda"):
        return ""
    try:
        free = psutil.virtual_memory().available if job.device.type == "cpu" else torch.cuda.mem_get_info(job.device)[0]
    except RuntimeError:  # another process has all of it
        return ""
    return f"; {describe_bytes(free)} are free now"


def _downloads(job: Job) -> Iterator[tuple[str, str]]:
    """What has to be downloaded, and what can only be checked after that."""
    plan, names = job.plan, job.recipe.names
    for load in plan.downloads:
        yield "download", f"{describe_bytes(load.num_bytes)} of {show(load.name)}"
    for folder in dict.fromkeys(load.folder for load in plan.downloads):
        total = sum(load.num_bytes for load in plan.downloads if load.folder == folder)
        free = describe_bytes(free_bytes(Path(folder)))
        yield "", f"{describe_bytes(total)} in all, to {show(folder)} ({free} free)"
    pickled = [show(names[model]) for model in plan.models if model in plan.unread and model not in plan.headers]
    if pickled:
        yield "later", f"{', '.join(pickled)}: pickled (.bin), shapes are compared after the download"
    if plan.unread:
        unread = listing(names[model] for model in plan.models if model in plan.unread)
        yield "later", f"{unread}: NaN, tied tables and whose weights an alphas file is for: seen in the merge"


def _device(job: Job) -> str:
    """The device that the job is planned for, and whether this machine has it."""
    missing = []
    if not is_here(job.device):
        missing.append(f"this machine has no {job.device}")
    if job.options.multi_gpu and not torch.accelerator.is_available():
        missing.append("--multi-gpu needs an accelerator, and this machine has none")
    if missing:
        return f"{job.device} (planned; {'; '.join(missing)})"
    if job.device.type == "cuda":
        return f"{job.device} ({torch.cuda.get_device_name(job.device)})"
    threads = torch.get_num_threads()
    return f"{job.device} ({threads} thread{'s' * (threads != 1)})" if job.device.type == "cpu" else str(job.device)


def libraries_bytes() -> int:
    """Anonymous memory of this process in bytes. It has loaded a calibration's libraries, and no weights."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))  # without mapped files, if the system reports them
