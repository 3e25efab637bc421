"""Compute merged tensors during a calibration, from alphas that are already solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.files.alphas_file import SubmoduleAlphas, weights_by_tensor
from mergekit_slta.files.layout import Layout
from mergekit_slta.job.job import Job
from mergekit_slta.maths.task_arithmetic import WeightedSlice, merge_tensor
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.row_weights import MergeWeights
from mergekit_slta.runner.state import MergeGroup

Point = Mapping[str, Tensor]
"""Alphas of a merged model: submodule -> [K] float64, models in canonical order."""


def merge_at(job: Job, layout: Layout, point: Point) -> MergeWeights:
    """Make the function that merges tensors of every model, given in canonical order, at a point.

    Args:
        job: the job.
        layout: its layout.
        point: alphas of every submodule.
    """
    entries = [
        SubmoduleAlphas.model_construct(
            tensors=submodule.tensors,
            slices=submodule.slices,
            alpha=tuple(point[submodule.name][layout.order].tolist()),
        )
        for submodule in layout.submodules
    ]
    slices = weights_by_tensor(entries)
    merge_group = merge_with(job, layout.models, lambda _: slices)
    return lambda weights: merge_group([], weights)


def merge_with(
    job: Job, models: Sequence[str], weights_of: Callable[[Sequence[Submodule]], Mapping[str, Sequence[WeightedSlice]]]
) -> MergeGroup:
    """Make the function that merges a forward group's tensors as the merge method does, with `lambda` = 1.

    Args:
        job: the job.
        models: labels of the models in the order of the alphas.
        weights_of: submodules of a group -> (tensor name -> its slices with their alphas); may contain more tensors.
    """
    columns = [models.index(label) for label in job.labels]

    def merge(group: Sequence[Submodule], weights: Sequence[Weights]) -> Weights:
        known = weights_of(group)
        merged = {}
        for tensor in weights[0]:
            tied = job.plan.is_tied and tensor == job.skeleton.head_weight
            source = job.plan.tensors[job.skeleton.embedding_weight if tied else tensor]
            slices = known[source.names[0]]
            ordered = [part._replace(alpha=tuple(part.alpha[column] for column in columns)) for part in slices]
            base, *experts = (given[tensor] for given in weights)
            merged[tensor] = merge_tensor(base, experts, ordered, 1.0, base.dtype)
        return merged

    return merge
