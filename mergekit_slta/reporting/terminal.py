"""Plain text for the terminal: the plan and costs of a job, and results of a calibration or an analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from mergekit_slta.errors import listing, show
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas, describe_loss
from mergekit_slta.files.evaluation import EVALUATION_HEADER, Evaluation, evaluation_cells, evaluation_note
from mergekit_slta.files.output_folder import free_bytes
from mergekit_slta.runtime.clock import describe_phases
from mergekit_slta.runtime.devices import is_here

if TYPE_CHECKING:
    from mergekit_slta.data.rows import TaskRows
    from mergekit_slta.files.linearity_file import Linearity, MeanStd
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs

_SETTINGS = ("objective", "num_samples", "max_seq_length", "seed", "balance", "ridge", "evaluate", "compute_dtype")
"""Shared keys that `check` shows, besides the objective's own keys."""
_MOST_NAMES = 12
"""At most this many submodules are named per flag; the others are counted."""


def describe_job(job: Job, costs: Costs, seconds: Mapping[str, float] | None = None) -> str:
    """Describe the plan of a job and its costs, for `check`.

    Args:
        job, costs: the job, and its estimated costs.
        seconds: of each phase, see `job.forecast`; None if they are not known.
    """
    from mergekit_slta.job.templates import describe_template  # imports mergekit, which other tables do not need

    recipe, settings = job.recipe, job.recipe.settings
    lines = [
        f"base        {show(recipe.names[recipe.base])}  ({type(job.skeleton.model).__name__}, "
        f"{job.skeleton.num_layers} layers)",
    ]
    for task, drawn in zip(recipe.tasks, job.rows, strict=True):
        data = ("no rows named" if settings.needs_rows else "no rows needed") if drawn is None else (
            f"{len(drawn.rows)} rows, {drawn.num_tokens} tokens of {show(drawn.dataset)}"
        )  # fmt: skip
        lines.append(f"expert      {show(recipe.names[task.model])}  ({data}; importance {task.importance:g})")
        if drawn is not None and drawn.chat_template:
            lines.append(f"            {describe_template(drawn.chat_template)} chat template renders its rows")
        if drawn is not None and settings.evaluate:
            lines.append(f"            {_held_out(drawn)}")
    lines += [f"direction   {show(recipe.names[model])}  (no task; its weights are found from the others' rows)"
              for model in recipe.directions]  # fmt: skip
    if recipe.closed_form is not None:
        lines.append(f"direction   {recipe.closed_form}, computed from the experts' weights")
    shown = {**{key: getattr(settings, key) for key in _SETTINGS}, **settings.own.model_dump()}
    covered = sum(len(submodule.tensors) for submodule in job.submodules)
    lines += [
        f"granularity {settings.granularity}: {len(job.submodules)} submodules cover all {covered} tensors",
        f"settings    {', '.join(f'{key} {value}' for key, value in shown.items() if value is not None)}",
    ]
    undivided = sum(heads is None for heads in job.skeleton.anatomy.heads)
    if settings.granularity == "head_mlp" and undivided:
        lines.append(f"heads       not found in {undivided} layers: their attention has one weight per model")
    if carried := job.plan.carried:
        size = sum(map(job.plan.num_elements, carried))
        share = size / max(1, sum(map(job.plan.num_elements, job.plan.outputs)))
        lines.append(
            f"carried     {len(carried)} tensors ({share:.1%} of the weights) that text does not run through: copied "
            f"where all models agree; `uncalibrated: {settings.uncalibrated}` where they differ"
        )
    if job.plan.is_tied:
        lines.append("tied        the output projection is the embedding table: one alpha for both")
    for name, reason in job.merged_copies.items():
        size = _bytes(costs.written_bytes)
        lines.append(f"copy        {show(name)} is merged into a full copy first ({show(reason)}): about {size} more")
    lines += _downloads(job)
    lines += [
        f"device      {_device(job)}",
        f"reads       {_bytes(costs.read_bytes)} for calibration, once more for the merge",
        f"takes       {_takes(job, seconds)}",
        *_measuring(job),
        f"memory      about {_bytes(costs.peak_bytes + _libraries())} at the peak of calibration; the largest "
        f"allocation is {_bytes(costs.largest_bytes)}",
        *(f"            {_bytes(size):>8} {part}" for part, size in costs.memory.items()),
        f"            and half as much again, which the allocator keeps; {_bytes(_libraries())} the libraries",
        f"writes      {_bytes(costs.written_bytes)}",
    ]
    if costs.scratch_bytes:
        kept, until = (" and the direction", "merge") if recipe.closed_form else ("", "calibration")
        lines.append(f"keeps       {_bytes(costs.scratch_bytes)} of features{kept} on disk until the {until} is done")
    return "\n".join(lines)


def _held_out(drawn: TaskRows) -> str:
    """The rows of a task that `evaluate` holds out."""
    if not drawn.held_out:
        return "too few rows to hold any out: the merge is not measured"
    return f"{len(drawn.held_out)} more rows are held out; the first {len(drawn.acceptance)} of them measure the merge"


def _measuring(job: Job) -> list[str]:
    """How far the costs depend on the held-out rows, and what is measured on these."""
    settings = job.recipe.settings
    if not settings.evaluate or None in job.rows:
        return []
    held_out = job.held_out_examples()
    steps = settings.own.model_dump().get("steps", 0)
    if not held_out:
        return (
            ["            no steps: there are too few rows to hold any out, and the weights are those of `features`"]
            if steps
            else []
        )
    num_tokens = sum(len(example.row.ids) for example in held_out)
    how = "their expert, and every model that is tried" if steps else (
        "the base, the merge and their expert; this reads the checkpoints once more"
    )  # fmt: skip
    return [
        *["            at most: `steps: auto` ends when a step gains nothing"] * (steps == "auto"),
        f"measures    {len(held_out)} held-out rows, {num_tokens} tokens: a forward pass through {how}",
    ]


def _takes(job: Job, seconds: Mapping[str, float] | None) -> str:
    if seconds is None:
        return f"a time that is not known: it needs a trial on {job.device}, which cannot be used here now"
    if not job.plan.downloads:
        return f"about {describe_phases(seconds)}"
    return f"about {describe_phases(seconds)}; the download comes on top"


def numbers_of_job(job: Job, costs: Costs, seconds: Mapping[str, float] | None) -> dict[str, Any]:
    """The same as `describe_job`, as numbers: what `check --json` prints. Sizes are in bytes."""
    phases = [{**asdict(phase), "seconds": seconds and seconds[phase.name]} for phase in costs.phases]
    return {
        "base": job.recipe.names[job.recipe.base],
        "experts": [
            {
                "model": job.recipe.names[task.model],
                "rows": 0 if drawn is None else len(drawn.rows),
                "tokens": 0 if drawn is None else drawn.num_tokens,
                "held_out_rows": 0 if drawn is None else len(drawn.acceptance),
            }
            for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)
        ],
        "objective": job.recipe.settings.objective,
        "granularity": job.recipe.settings.granularity,
        "submodules": len(job.submodules),
        "device": str(job.device),
        "device_is_here": is_here(job.device),
        "seconds": sum(seconds.values()) if seconds else None,
        "phases": phases,
        "flops": costs.flops,
        "combine_flops": costs.combine_flops,
        "read_bytes": costs.read_bytes,
        "written_bytes": costs.written_bytes,
        "scratch_bytes": costs.scratch_bytes,
        "download_bytes": sum(load.num_bytes for load in job.plan.downloads),
        "peak_bytes": costs.peak_bytes,
        "library_bytes": _libraries(),
        "largest_bytes": costs.largest_bytes,
        "memory": costs.memory,
    }


def _downloads(job: Job) -> list[str]:
    """What has to be downloaded, and what can only be checked after that."""
    plan, names = job.plan, job.recipe.names
    lines = [f"download    {_bytes(load.num_bytes)} of {show(load.name)}" for load in plan.downloads]
    for folder in dict.fromkeys(load.folder for load in plan.downloads):
        total = sum(load.num_bytes for load in plan.downloads if load.folder == folder)
        lines.append(f"            {_bytes(total)} in all, to {show(folder)} ({_bytes(free_bytes(Path(folder)))} free)")
    pickled = [show(names[model]) for model in plan.models if model in plan.unread and model not in plan.headers]
    if pickled:
        lines.append(f"later       {', '.join(pickled)}: pickled (.bin), shapes are compared after the download")
    if plan.unread:
        unread = listing(names[model] for model in plan.models if model in plan.unread)
        lines.append(
            f"later       {unread}: NaN, tied tables and whose weights an alphas file is for: seen in the merge"
        )
    return lines


def _device(job: Job) -> str:
    """The device that the job is planned for, and whether this machine has it."""
    missing = []
    if not is_here(job.device):
        missing.append(f"this machine has no {job.device}")
    if job.options.multi_gpu and not torch.accelerator.is_available():
        missing.append("--multi-gpu needs an accelerator, and this machine has none")
    return str(job.device) + (f" (planned; {'; '.join(missing)})" if missing else "")


def _libraries() -> int:
    """Anonymous memory of this process in bytes. It has loaded a calibration's libraries, and no weights."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))  # without mapped files, if the system reports them


def describe_alphas(alphas: Alphas) -> str:
    """Describe alphas: the mean by kind of submodule and expert, the losses of each task, and all flags."""
    kinds = list(dict.fromkeys(submodule.kind for submodule in alphas.submodules))
    header = ["submodules", "n", *alphas.models, "residual"]
    rows = [_kind_row(kind, [sub for sub in alphas.submodules if sub.kind == kind]) for kind in kinds]
    lines = table([header, *rows])
    losses = [
        [task["model"], describe_loss(task["loss_base"]), describe_loss(task["loss_expert"])]
        for task in alphas.calibration.get("tasks", ())
        if task.get("loss_expert") is not None
    ]
    if losses:
        lines += "\n\n" + table([["loss per token on its own rows", "base", "expert"], *losses])
    if alphas.evaluation is not None:
        lines += "\n\n" + describe_evaluation(alphas.evaluation)
    flagged: dict[str, list[str]] = {}
    for submodule in alphas.submodules:
        if submodule.flags:
            note = f" ({', '.join(show(name) for name in submodule.unchanged)})" if submodule.unchanged else ""
            flagged.setdefault(f"{', '.join(submodule.flags)}{note}", []).append(submodule.name)
    for what, names in flagged.items():
        lines += "".join(f"\n{name}: {what}" for name in names[:_MOST_NAMES])
        if len(names) > _MOST_NAMES:
            lines += f"\nand {len(names) - _MOST_NAMES} more: {what}"
    return lines


def _kind_row(kind: str, members: Sequence[SubmoduleAlphas]) -> list[str]:
    count = len(members)
    means = [sum(column) / count for column in zip(*(member.alpha for member in members), strict=True)]
    residuals = [member.residual for member in members if member.residual is not None]
    residual = f"{sum(residuals) / len(residuals):.3f}" if residuals else "-"
    return [kind, str(count), *(f"{mean:.3f}" for mean in means), residual]


def describe_evaluation(evaluation: Evaluation) -> str:
    """Describe how far the merge is from each expert on held-out rows."""
    header = ["on rows that were not fitted", *EVALUATION_HEADER]
    lines = table([header, *([task.model, *evaluation_cells(task)] for task in evaluation.tasks)])
    return f"{lines}\nDivergence in nats per row, loss in nats per token; {evaluation_note(evaluation)}."


def describe_linearity(linearity: Linearity) -> str:
    """Describe the measures of every level, as in the paper's Fig. 1 to 4. In every column 0 means linear."""
    header = ["level", "n", "non-linearity score", "projection distance", "1 - cosine", "(of the experts)",
              "disentanglement error"]  # fmt: skip
    rows = []
    for kind, level in linearity.levels.items():
        cosine = level.cosine.pairs
        rows.append(
            [
                kind.replace("_", " "),
                str(level.count),
                _mean_std(level.non_linearity),
                _mean_std(level.projection_distance.pairs),
                _mean_std(cosine and cosine.model_copy(update={"mean": max(0.0, 1 - cosine.mean)})),
                "-" if level.cosine_base is None else f"{max(0.0, 1 - level.cosine_base.mean):.3g}",
                _mean_std(level.disentanglement),
            ]
        )
    return table([header, *rows])


def _mean_std(mean_std: MeanStd | None) -> str:
    return "-" if mean_std is None else f"{mean_std.mean:.3g} ± {mean_std.std:.2g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format a plain-text table; the first column is left-aligned, the others right-aligned."""
    cells = [[show(cell, 48) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )  # fmt: skip


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.3g} {unit}"
        number /= 1024
    raise AssertionError("unreachable")
