"""Which submodule owns a tensor."""

from __future__ import annotations

from conftest import refused

from mergekit_slta.errors import ModelError
from mergekit_slta.models.submodules import partition


def test_tensors_without_a_place(job):
    """A tensor of a layer that the model does not have is named, never left unmerged."""
    names, anatomy = list(job.plan.tensors), job.skeleton.anatomy
    prefix = anatomy.layers_path
    name = f"{prefix}.{anatomy.num_layers}.mlp.up_proj.weight"
    for granularity in ("layer", "attn_mlp", "head_mlp", "linear"):
        partition(names, anatomy, granularity, tied=True)
        with refused(ModelError, "unknown-tensor", name):
            partition([*names, name], anatomy, granularity, tied=True)
