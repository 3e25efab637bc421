"""Which submodule owns a tensor."""

from __future__ import annotations

from conftest import refused

from mergekit_slta.errors import ModelError
from mergekit_slta.models.submodules import partition


def test_tensors_without_a_place(job):
    """A tensor that no submodule takes is named at every granularity, never left unmerged."""
    names, anatomy = list(job.plan.tensors), job.skeleton.anatomy
    prefix = anatomy.layers_path
    strange = {
        "layer": f"{prefix}.{anatomy.num_layers}.mlp.up_proj.weight",
        "attn_mlp": f"{prefix}.0.memory.weight",
        "head_mlp": f"{prefix}.0.memory.weight",
        "linear": f"{prefix}.0.memory.weight",
    }
    for granularity, name in strange.items():
        partition(names, anatomy, granularity, tied=True)
        with refused(ModelError, "unknown-tensor", name):
            partition([*names, name], anatomy, granularity, tied=True)
