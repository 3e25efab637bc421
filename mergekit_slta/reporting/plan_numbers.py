"""What `check --json` prints: the numbers of a job's plan and of its estimated costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mergekit_slta.data.rows import TaskRows
from mergekit_slta.job.job import Job
from mergekit_slta.objectives.costs import Costs
from mergekit_slta.reporting.plan import libraries_bytes
from mergekit_slta.reporting.row_view import row_parts
from mergekit_slta.runtime.devices import is_here


def numbers_of_job(job: Job, costs: Costs, seconds: Mapping[str, float] | None) -> dict[str, Any]:
    """The same as `describe_job`, as numbers: what `check --json` prints. Sizes are in bytes."""
    settings = job.recipe.settings
    phases = [{**asdict(phase), "seconds": seconds and seconds[phase.name]} for phase in costs.phases]
    return {
        "base": job.recipe.names[job.recipe.base],
        "experts": [
            {"model": job.recipe.names[task.model], "importance": task.importance, **_numbers_of_rows(job, drawn)}
            for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)
        ],
        "directions": [*(job.recipe.names[model] for model in job.recipe.directions),
                       *filter(None, [job.recipe.closed_form])],
        "objective": settings.objective,
        "granularity": settings.granularity,
        "submodules": len(job.submodules),
        "settings": {**settings.model_dump(exclude={"own", "stated"}), **settings.own.model_dump()},
        "precision": {"dtype": settings.tensor_dtype, "products": job.layer_products},
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
        "library_bytes": libraries_bytes(),
        "largest_bytes": costs.largest_bytes,
        "memory": costs.memory,
    }  # fmt: skip


def _numbers_of_rows(job: Job, drawn: TaskRows | None) -> dict[str, Any]:
    """The numbers of a task's rows. Of rows that are only planned, tokens are counted as if all were of full length."""
    if drawn is None:
        return {"rows": 0, "tokens": 0, "held_out_rows": 0}
    found = {
        "dataset": drawn.dataset,
        "chat_template": drawn.chat_template,
        "planned": drawn.is_planned,
        "rows": len(drawn.rows),
        "tokens": drawn.num_tokens,
        "cut_rows": None if drawn.is_planned else drawn.num_cut,
        "answer_tokens": drawn.num_answer_tokens,
        "held_out_rows": len(drawn.held_out),
        "measured_rows": len(drawn.acceptance),
    }
    if drawn.is_planned:
        return found
    row = drawn.rows[0]
    parts = row_parts(row, job.row_tokenizer) if job.row_tokenizer is not None else {}
    first = {"number": row.number, "tokens": len(row.ids), "cut_tokens": row.num_cut,
             "answer_tokens": row.num_answer_tokens, **parts}  # fmt: skip
    return {**found, "first_row": first}
