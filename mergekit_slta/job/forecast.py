"""How long the phases of a job will take, from rates that are measured on this machine in about a second."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from safetensors import safe_open
from torch import Tensor

from mergekit_slta.data.batches import BATCH_TOKENS, plan_task_batches
from mergekit_slta.errors import RunError, show
from mergekit_slta.job.job import Job
from mergekit_slta.maths.task_arithmetic import all_finite
from mergekit_slta.runtime.devices import is_here
from mergekit_slta.runtime.rates import Phase, Rates, measure_rates

LOG = logging.getLogger(__name__)
_PIECES, _PIECE_BYTES = 8, 2**24
"""Number and size of the pieces of checkpoints that are read to measure how fast they are read."""


def forecast(job: Job, phases: Sequence[Phase]) -> dict[str, float] | None:
    """Seconds of each phase, with checkpoints as they are read at the moment: from the disk, or from its cache.

    None if the job's device is not on this machine, or has no room at the moment, of which the log warns.
    """
    if not is_here(job.device) or job.device.type == "meta":
        return None
    try:
        rates = rates_of(job, phases)
    except (RunError, RuntimeError) as error:  # another process may use the device; the merge may run later
        LOG.warning("%s could not be tried, so no time is known: %s", job.device, show(error))
        return None
    return {phase.name: rates.seconds(phase) for phase in phases}


def rates_of(job: Job, phases: Sequence[Phase]) -> Rates:
    """The rates of this machine for some work of a job, in matrices of the sizes of its model and batches."""
    config = job.skeleton.config
    inner = int(getattr(config, "intermediate_size", 0) or 4 * job.skeleton.width)
    examples = job.examples() if None not in job.rows else []
    planned = plan_task_batches([example.row.ids for example in examples], [example.task for example in examples])
    tokens = sum(sum(batch.lengths) for batch in planned) // len(planned) if planned else BATCH_TOKENS
    kinds = sorted({kind for phase in phases for kind in phase.flops})
    sizes = tokens, job.skeleton.width, max(inner, job.skeleton.width)
    with job.computing():
        return measure_rates(job.device, job.dtype, kinds, sizes, _pieces(job))


def _pieces(job: Job) -> Iterator[Callable[[], tuple[int, Tensor]]]:
    """Yield functions that read a piece of a checkpoint each, at places that chance chooses; see `measure_rates`."""
    found = []
    for model in job.plan.models:
        index = job.plan.loaders[model].index
        for name, header in job.plan.headers.get(model, {}).items():
            path = os.path.join(index.base_path, index.tensor_paths[name])
            if len(header.shape) > 1 and header.stop > header.start and os.path.isfile(path):
                found.append((path, name, header.shape[0], (header.stop - header.start) // header.shape[0]))
    chosen = random.sample(found, min(_PIECES, len(found)))
    files = {path: safe_open(path, framework="pt") for path in {path for path, *_ in chosen}}
    for path, name, count, row_bytes in chosen:
        rows = min(count, max(1, _PIECE_BYTES // max(1, row_bytes)))
        start = random.randrange(count - rows + 1)
        yield partial(_read, job, files[path], name, slice(start, start + rows), rows * row_bytes)


def _read(job: Job, file: safe_open, name: str, rows: slice, num_bytes: int) -> tuple[int, Tensor]:
    """Read some rows of a tensor as `Checkpoints` does; returns their bytes on disk, and the tensor."""
    placed = file.get_slice(name)[rows].to(device=job.device, dtype=job.dtype)
    all_finite(placed)
    return num_bytes, placed
