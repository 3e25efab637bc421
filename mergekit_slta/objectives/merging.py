"""Compute merged tensors during a calibration, from alphas that are already solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.job.job import Job
from mergekit_slta.maths.task_arithmetic import WeightedSlice, merge_tensor
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import MergeGroup


def merge_with(
    job: Job, models: Sequence[str], weights_of: Callable[[Sequence[Submodule]], Mapping[str, Sequence[WeightedSlice]]]
) -> MergeGroup:
    """Make the function that merges a forward group's tensors as the merge method does, with `lambda` = 1.

    Args:
        job: the job.
        models: labels of the experts in the order of the alphas.
        weights_of: submodules of a group -> (tensor name -> its slices with their alphas); may contain more tensors.
    """
    columns = [models.index(job.recipe.label(model)) for model in job.experts]

    def merge(group: Sequence[Submodule], weights: Sequence[Weights]) -> Weights:
        known = weights_of(group)
        merged = {}
        for tensor in weights[0]:
            tied = job.plan.is_tied and tensor == job.skeleton.head_weight
            slices = known[job.skeleton.embedding_weight if tied else tensor]
            ordered = [part._replace(alpha=tuple(part.alpha[column] for column in columns)) for part in slices]
            base, *experts = (given[tensor] for given in weights)
            merged[tensor] = merge_tensor(base, experts, ordered, 1.0, base.dtype)
        return merged

    return merge
