"""Numbers of parameters and tokens of a job, from headers and rows only: what its costs are computed from."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from mergekit_slta.checkpoints.headers import DTYPE_NAMES
from mergekit_slta.checkpoints.plan import total_bytes
from mergekit_slta.job.job import Job
from mergekit_slta.maths.directions import is_matrix
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runtime.rates import EIGH_FLOPS

_EIGH_MATRICES = 4
"""Number of matrices [n, n] of a symmetric eigenproblem of size n."""
_PRODUCTS = 6.0
"""Floating point operations of a closed form's products, over out x in x n, for a matrix and an expert. About this
many: it depends on how many directions lead."""


class Sizes:
    """Numbers of parameters and tokens of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.models = 1 + len(job.labels)
        self.item = torch.finfo(job.dtype).bits // 8
        self.parameters = {name: math.prod(job.skeleton.shapes.get(name, ())) for name in job.plan.tensors}
        self.table = job.skeleton.embedding_weight
        self.head = self.table if job.plan.is_tied else job.skeleton.head_weight
        config = job.skeleton.config
        self.width = int(config.hidden_size)
        self.inner_width = max(int(getattr(config, "intermediate_size", 0) or 4 * self.width), self.width)
        heads = getattr(config, "num_attention_heads", None) or 1
        self.heads = heads if isinstance(heads, int) else max(heads)
        self.attention_width = self.heads * int(getattr(config, "head_dim", None) or self.width // self.heads)
        self.row_lengths = [len(row.ids) for drawn in job.rows if drawn is not None for row in drawn.rows]
        self.examples = examples = job.examples() if None not in job.rows else []
        self.measured_tokens = sum(len(examples[row].row.ids) for row in measured_rows(examples))
        self.held_out = job.held_out_examples() if examples else []
        self.held_out_tokens = sum(len(example.row.ids) for example in self.held_out)
        self.longest = max(self.row_lengths, default=job.recipe.settings.max_seq_length)

    @cached_property
    def layers(self) -> list[int]:
        """Number of parameters of every decoder layer."""
        prefix = self.job.skeleton.layers_path + "."
        sizes = [0] * self.job.skeleton.num_layers
        for name, size in self.parameters.items():
            if name.startswith(prefix):
                sizes[int(name[len(prefix) :].partition(".")[0])] += size
        return sizes

    @property
    def largest_weight(self) -> int:
        """Bytes of the largest tensor but the embeddings and the output projection, which are read in parts."""
        ends = (self.table, self.head)
        return max((size * self.item for name, size in self.parameters.items() if name not in ends), default=0)

    def copies(self, name: str) -> int:
        """Number of models in which a tensor is cast or moved to a device, which needs extra memory.

        In the other models the memory-mapped file is used.
        """
        job = self.job
        if job.device.type != "cpu":
            return self.models
        count = 0
        for model in job.plan.models:
            headers = job.plan.headers.get(model, {})
            found = [headers.get(source) for source in job.plan.names_in(name, model)]
            is_mapped = len(found) == 1 and found[0] is not None and found[0].dtype == DTYPE_NAMES.get(job.dtype)
            count += not is_mapped
        return count

    @cached_property
    def _combined(self) -> list[tuple[int, ...]]:
        """Shapes of the matrices that a closed form combines."""
        if self.job.recipe.closed_form is None:
            return []
        averaged = {*self.job.directions[-1].averaged}
        shapes = {name: self.job.skeleton.shapes[name] for name in self.job.plan.tensors}
        return [
            shape
            for name, shape in shapes.items()
            if is_matrix(len(shape)) and not {*self.job.plan.tensors[name].names} & averaged
        ]

    @cached_property
    def eigh_flops(self) -> float:
        """Floating point operations of a closed form's eigenproblems."""
        experts = len(self.job.experts)
        return sum(
            math.prod(shape[:-2]) * EIGH_FLOPS * min(shape[-1], experts * shape[-2]) ** 3 for shape in self._combined
        )

    @cached_property
    def combine_flops(self) -> float:
        """Floating point operations of a closed form; see `Costs`."""
        experts = len(self.job.experts)
        products = sum(
            experts * _PRODUCTS * math.prod(shape) * min(shape[-1], experts * shape[-2]) for shape in self._combined
        )
        return products + self.eigh_flops

    @property
    def direction_bytes(self) -> int:
        """Bytes of a closed form on disk, in float32."""
        return 0 if self.job.recipe.closed_form is None else 4 * sum(self.parameters.values())

    @property
    def combining(self) -> dict[str, int]:
        """Memory in bytes of the widest eigenproblem of a closed form."""
        if self.job.recipe.closed_form is None:
            return {}
        widest = max((shape[-1] for shape in self.job.skeleton.shapes.values() if is_matrix(len(shape))), default=0)
        return {"eigenvectors of the direction's widest matrix": _EIGH_MATRICES * widest**2 * 8}

    def written_bytes(self) -> int:
        """Bytes of the merged model."""
        config, plan = self.job.recipe.config, self.job.plan
        sizes = {name: plan.num_elements(name) for name in plan.outputs}
        dtype = config.out_dtype or config.dtype
        if dtype is not None and all(sizes.values()):
            return sum(sizes.values()) * getattr(torch, dtype.removeprefix("torch.")).itemsize
        dtypes = {name: plan.merged_dtype(name) for name in sizes}
        if not all(sizes.values()) or not any(dtypes.values()):  # pickled, on the Hub
            return total_bytes(plan, [plan.models[0]])
        return sum(sizes[name] * dtype.itemsize for name, dtype in dtypes.items() if dtype is not None)
