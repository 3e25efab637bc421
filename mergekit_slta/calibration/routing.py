"""Measure how often a merged model with experts (MoE) sends a token to others than the token's own expert model does.

Scope: the merge and the experts run over rows that were measured before, or held out: two forward passes per row.
"""

from __future__ import annotations

import torch

from mergekit_slta.data.batches import plan_task_batches
from mergekit_slta.files.alphas_file import REROUTED, Alphas
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.objectives.merging import merge_at
from mergekit_slta.runner.lanes import Lanes
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runtime.activations import ActivationStore
from mergekit_slta.runtime.progress import Progress


@torch.no_grad()
def measure_routing(job: Job, alphas: Alphas) -> Alphas:
    """Add to each task of a job's alphas the share of (token, layer) pairs whose experts change, with `lambda` 1.

    Raises:
        ModelError, RunError: as in a calibration.
    """
    layout = layout_of(job)
    examples = job.held_out_examples()
    if not examples:
        every = job.examples()
        examples = [every[row] for row in measured_rows(every)]
    alpha = {
        entry.name: torch.tensor([entry.alpha[alphas.models.index(name)] for name in layout.canonical]).double()
        for entry in alphas.submodules
    }
    # One row per batch: padding tokens have experts, too.
    batches = plan_task_batches([example.row.ids for example in examples], [example.task for example in examples], 0)
    lengths = [sum(batch.lengths) for batch in batches]
    num_layers = job.skeleton.num_layers
    with job.computing(), Progress("routing", num_layers, quiet=job.options.quiet, num_layers=num_layers) as progress:
        lanes = Lanes(
            job.skeleton, job.checkpoints(), examples, batches, [merge_at(job, layout, alpha)],
            lambda _: ActivationStore(lengths, 2, 0, job.skeleton.width, job.dtype, None, job.device),
            with_routes=True, announce=progress.work_on,
        )  # fmt: skip
        lanes.forward()
    task = torch.tensor([example.task for example in examples])
    shares = {}
    for place, name in enumerate(layout.experts):
        changed, total = lanes.rerouted[task == place, 0].sum(0).tolist()
        shares[name] = changed / total
    tasks = [{**entry, REROUTED: shares[entry["model"]]} for entry in alphas.calibration["tasks"]]
    return alphas.model_copy(update={"calibration": {**alphas.calibration, "tasks": tasks}})


def is_routing_wanted(job: Job, alphas: Alphas) -> bool:
    """Whether the model has experts, there are rows, and nothing was measured yet."""
    tasks = alphas.calibration.get("tasks", [])
    return bool(job.skeleton.routers and tasks and None not in job.rows) and any(REROUTED not in task for task in tasks)
