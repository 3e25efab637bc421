"""Tensors of every model, by the plan's names, read lazily through mergekit's own tasks.

Scope: reading, casting, placing. At most what was asked for is in memory; `flush` lets the mapped shards go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task as GraphTask
from mergekit.io.tasks import GatherTensors
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from torch import Tensor

from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.errors import ModelError, show

Weights = dict[str, Tensor]
"""Tensors of one model, by the plan's names."""


class Checkpoints:
    """Lazy tensors of the base and the experts.

    Args:
        plan: mergekit's plan; its models, base first, are the order of everything returned here.
        names: the recipe's names of the models, for messages.
        device: where tensors are put.
        dtype: what floating tensors are cast to.
        tokenizer: what mergekit's tokenizer task makes, where that is known already.
    """

    def __init__(
        self,
        plan: Plan,
        names: dict[ModelReference, str],
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: TokenizerInfo | None = None,
    ) -> None:
        self.plan = plan
        self.names = names
        self.device = device
        self.dtype = dtype
        self._tokenizer = tokenizer

    def raw(self, name: str, models: Sequence[int] | None = None) -> list[Tensor]:
        """One tensor from every model (or from those with the given numbers), as the merge method will get it (its
        dtype, on the CPU, maybe mapped)."""
        task = self.plan.tensors[name].gather
        wanted = [self.plan.models[number] for number in models] if models is not None else list(self.plan.models)
        if isinstance(task, GatherTensors):  # else models depend on each other: a tokenizer is built for all
            sources = {model: source for model, source in task.weight_info.items() if model in wanted}
            task = task.model_copy(update={"weight_info": ImmutableMap(sources)})
        tensors = self._run(task)
        missing = [model for model in wanted if tensors.get(model) is None]
        if missing:
            raise ModelError(f"{show(self.names[missing[0]])} lacks the tensor {show(name)}")
        return [tensors[model] for model in wanted]

    def load(self, names: Sequence[str], models: Sequence[int] | None = None) -> list[Weights]:
        """The named tensors of every model (or of those with the given numbers), cast and placed.

        Raises:
            ModelError: a tensor holds NaN or Inf.
        """
        numbers = list(range(len(self.plan.models)) if models is None else models)
        weights: list[Weights] = [{} for _ in numbers]
        for name in names:
            for into, model, raw in zip(weights, numbers, self.raw(name, numbers), strict=True):
                into[name] = self.place(raw, name, model)
        return weights

    def table_rows(self, table: str, used: Tensor, models: Sequence[int] | None = None) -> list[Tensor]:
        """Rows of the embedding table of every model (or of those with the given numbers), cast and placed.

        Args:
            table: its name.
            used: [U] the rows' numbers, in ascending order.
            models: their numbers.

        Raises:
            ModelError: the table of a model ends before the last, or holds NaN or Inf there.
        """
        numbers = list(range(len(self.plan.models)) if models is None else models)
        found = []
        for model, raw in zip(numbers, self.raw(table, numbers), strict=True):
            if int(used[-1]) >= raw.shape[0]:
                raise ModelError(
                    f"token {int(used[-1])} of the calibration rows is beyond the {raw.shape[0]} rows of "
                    f"{show(table)}: the tokenizer and the embeddings do not fit"
                )
            found.append(self.place(raw[used], table, model))  # [U, d]
        return found

    def place(self, tensor: Tensor, name: str, model: int) -> Tensor:
        """A raw tensor (or some of its rows) of model number `model`, cast, placed and checked for NaN and Inf."""
        if (
            self.device.type == "cuda" and tensor.device.type == "cpu"
        ):  # half the bytes on the bus, while the host goes on; cast over there
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        placed = tensor.to(device=self.device, dtype=self.dtype)
        # A sum is finite only if every element is, and costs no mask; a sum that overflows is looked at twice.
        if not torch.isfinite(placed.sum()) and not torch.isfinite(placed).all():
            raise ModelError(f"{show(name)} of {show(self.names[self.plan.models[model]])} holds NaN or Inf")
        return placed

    def prefetch(self, names: Sequence[str], models: Sequence[int] | None = None) -> None:
        """Ask the system to read the tensors' bytes from disk meanwhile, into its cache: costs no memory of ours."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        for number, model in enumerate(self.plan.models):
            headers = self.plan.headers.get(model)
            if headers is None or (models is not None and number not in models):
                continue
            index = self.plan.loaders[model].index
            sources = [source for name in names if (source := self.plan.source_name(name, model)) in headers]
            for shard in {index.tensor_paths[source] for source in sources}:
                with open(os.path.join(index.base_path, shard), "rb") as file:
                    for source in sources:
                        if index.tensor_paths[source] == shard:
                            start, stop = headers[source].start, headers[source].stop
                            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def flush(self) -> None:
        """Close the shards that are open, which unmaps them."""
        for loader in self.plan.loaders.values():
            loader.flush()

    def _run(self, task: GraphTask) -> Any:
        if isinstance(task, BuildTokenizer):
            if self._tokenizer is None:
                self._tokenizer = task.execute()
            return self._tokenizer
        return task.execute(**{key: self._run(needed) for key, needed in task.arguments().items()})
