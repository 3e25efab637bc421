"""The closed form that is one model more: computed from the experts tensor by tensor, and kept until it is not needed.

Scope: which tensors are matrices, and the folder of the computed tensors beside the alphas. `maths.directions` has the
closed forms. A merge can always compute a tensor again, so the folder only saves time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.errors import OutputError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.files.identity import hash_identity, weights_label
from mergekit_slta.job.job import Job
from mergekit_slta.libraries.torch import product_precision
from mergekit_slta.maths.directions import is_matrix
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.runtime.distributed import ALONE, Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore


def directions_of(recipe: Recipe, skeleton: Skeleton, plan: Plan) -> tuple[Direction, ...]:
    """The recipe's models without a task, in canonical order."""
    stored = sorted(recipe.directions, key=lambda model: recipe.names[model])
    found = [Direction(model=recipe.label(model)) for model in stored]
    if recipe.closed_form is not None:
        form = recipe.closed_form
        found.append(Direction(model=form, closed_form=form, **_exceptions(skeleton, plan)))
    return tuple(found)


def _exceptions(skeleton: Skeleton, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Names in OUT of the tensors of two or three dimensions that are not matrices [..., out, in]; see `Direction`."""
    found: dict[str, list[str]] = {"transposed": [], "averaged": []}
    for path, module in skeleton.model.named_modules():
        is_transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)  # of fused experts
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            source = plan.tensors.get(name)
            if source is None or not is_matrix(parameter.dim()):
                continue
            if key.endswith("bias") or isinstance(module, nn.Conv1d):
                found["averaged"] += source.names
            elif is_transposed and source.conversion is None:
                found["transposed"] += source.names
    return {kind: tuple(names) for kind, names in found.items()}


class DirectionStore:
    """The tensors of a job's closed form; one that is not stored yet is computed.

    Args:
        job: the recipe, prepared.
        store: keeps the tensors.
    """

    def __init__(self, job: Job, store: ResumeStore) -> None:
        self._store, self._direction, self._num_models = store, job.directions[-1], 1 + len(job.experts)
        self._checkpoints = replace(job, read_direction=None).checkpoints()

    def read(self, name: str) -> Tensor:
        """A tensor of the closed form, on the CPU, memory-mapped; see `maths.directions.combine`."""
        if name not in self._store.finished:
            raw = self._checkpoints.output(name, range(self._num_models))
            base, *experts = (tensor.to(self._checkpoints.device) for tensor in raw)
            with product_precision(self._checkpoints.device, tf32=False):  # whatever the recipe's precision
                combined = self._direction.combine(name, base, experts)
            self._store.put(name, {name: combined.cpu()})
        return self._store.mapped(name)[name]


def direction_fingerprint(identity: Mapping[str, str], models: Iterable[str]) -> str:
    """Hash of everything that the tensors of a closed form depend on.

    Args:
        identity: of a job, or of its alphas.
        models: names of the base and the experts in it.
    """
    kept = {*map(weights_label, models), "direction", "dtype", "tokenizer", "config of the base"}
    return hash_identity({label: value for label, value in sorted(identity.items()) if label in kept})


@contextmanager
def with_direction(job: Job, folder: Path | None = None, ranks: Ranks = ALONE) -> Iterator[Job]:
    """Yield a job that can read its closed form, if it has one.

    All tensors are computed first. Several processes share this work if they see the same folder; else each computes
    all.

    Args:
        job: the recipe, prepared.
        folder: where the tensors are kept, also after the block; None for a temporary folder.
        ranks: the processes; the others use the first one's folder.

    Raises:
        OutputError: another process uses the folder, or the disk is full.
        ModelError: a model lacks a tensor.
    """
    if job.recipe.closed_form is None or job.read_direction is not None:
        yield job
        return
    with ExitStack() as stack:
        if folder is None and ranks.is_first:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="mergekit-slta-"))) / "direction"
        models = map(job.recipe.label, (job.recipe.base, *job.experts))
        fingerprint = direction_fingerprint(job.identity, models)
        store = stack.enter_context(ResumeStore(Path(ranks.broadcast(folder)), fingerprint))
        if ranks.is_first:
            store.open()
        wanted = dict.fromkeys(name for source in job.plan.tensors.values() for name in source.names)
        missing = [name for name in wanted if name not in store.finished]
        missing = ranks.broadcast(missing)
        directions = DirectionStore(job, store)
        quiet = job.options.quiet or not ranks.is_first
        with (
            job.clock.phase("direction"),
            job.computing(subtracts=True),
            Progress("direction", len(missing), quiet=quiet, num_layers=job.skeleton.num_layers) as progress,
        ):
            for place in ranks.share([job.plan.num_elements(name) for name in missing]):
                progress.work_on(missing[place])
                directions.read(missing[place])
        ranks.all_reduce_(torch.zeros(1))  # all are done
        store.refresh()
        yield replace(job, read_direction=directions.read)


class StoredDirection:
    """The tensors of the alphas' closed form that a calibration has left in a folder.

    Args:
        alphas: the alphas.
        folder: the folder; need not exist.
    """

    def __init__(self, alphas: Alphas, folder: Path) -> None:
        models = (alphas.base_model, *alphas.experts)
        self._store = ResumeStore(folder, direction_fingerprint(alphas.identity, models))
        self._store.refresh()

    def read(self, name: str) -> Tensor | None:
        """A tensor, memory-mapped; None if it is not there."""
        try:
            return self._store.mapped(name)[name] if name in self._store.finished else None
        except (OSError, SafetensorError):  # another merge has removed it
            return None

    def remove(self) -> None:
        """Remove the folder, unless another process uses it."""
        if self._store.finished:
            with suppress(OutputError), self._store:
                self._store.open()
                self._store.remove()
