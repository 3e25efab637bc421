"""Read the tensors of every model when they are needed, with mergekit's own tasks; names are those in the model.

Scope: reading, casting, moving to the device. Nothing is cached except open shards, which `flush` closes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.mergekit import gather_from, run_task
from mergekit_slta.maths.task_arithmetic import all_finite
from mergekit_slta.models.skeleton import Skeleton

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import Task, TokenizerInfo

Weights = dict[str, Tensor]
"""Tensors of one model, by their names in it."""


class Checkpoints:
    """Tensors of the base, the experts, and the directions.

    An argument `models` holds indices into the plan's models, then the closed form, if there is one; None means all.
    Returned lists are in that order.

    Args:
        plan: the plan; its models are the base, then the experts in canonical order.
        skeleton: the base's model.
        names: the models' names in the recipe, for messages.
        device: the device of the loaded tensors.
        dtype: the dtype of the loaded tensors.
        tokenizer: the output's tokenizer, if mergekit has already built it.
        read_direction: name in OUT -> tensor of the closed form; None if there is none.
    """

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        names: dict[ModelReference, str],
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: TokenizerInfo | None = None,
        read_direction: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.plan = plan
        self.skeleton = skeleton
        self.names = names
        self.device = device
        self.dtype = dtype
        self._tokenizer = tokenizer
        self._read_direction = read_direction

    @property
    def num_models(self) -> int:
        """Number of models, with the base."""
        return len(self.plan.models) + (self._read_direction is not None)

    def raw(self, name: str, models: Sequence[int] | None = None) -> list[Tensor]:
        """Read one tensor of each model in its own dtype, on the CPU, maybe memory-mapped.

        Args:
            name: its name in the model (see `Plan.tensors`).
            models: see the class.

        Raises:
            ModelError: a model lacks it.
        """
        source = self.plan.tensors[name]
        parts = zip(*(self.output(each, models) for each in source.names), strict=True)
        return [source.make(self.skeleton, name, list(tensors)) for tensors in parts]

    def output(self, name: str, models: Sequence[int] | None = None) -> list[Tensor]:
        """Read one tensor of each model as the merge method gets it, by its name in OUT; see `raw`."""
        numbers = self._numbers(models)
        chosen = self._stored(numbers)
        gather = gather_from(self.plan.outputs[name].gather, chosen)
        tensors = run_task(gather, self._build_tokenizer) if chosen else {}
        missing = [model for model in chosen if tensors.get(model) is None]
        if missing:
            raise ModelError(
                f"{show(self.names[missing[0]])} lacks the tensor {show(name)}: "
                "all models of a merge need the same tensors",
                code="missing-tensor",
            )
        found = iter([tensors[model] for model in chosen])
        read = self._read_direction or next  # never called without a closed form
        return [next(found) if number < len(self.plan.models) else read(name) for number in numbers]

    def load(self, names: Sequence[str], models: Sequence[int] | None = None) -> list[Weights]:
        """Load the named tensors of each model, cast and on the device.

        Raises:
            ModelError: a tensor holds NaN or Inf.
        """
        numbers = self._numbers(models)
        weights: list[Weights] = [{} for _ in numbers]
        for name in names:
            for into, model, raw in zip(weights, numbers, self.raw(name, numbers), strict=True):
                into[name] = self.place(raw, name, model)
        return weights

    def table_rows(self, table: str, used: Tensor, models: Sequence[int] | None = None) -> list[Tensor]:
        """Load rows of the embedding table of each model, [U, d], cast and on the device.

        Args:
            table: name of the embedding table.
            used: [U] int64 token ids, ascending.
            models: see the class.

        Raises:
            ModelError: a model's table lacks one of these rows, or a row holds NaN or Inf.
        """
        numbers = self._numbers(models)
        found = []
        for model, raw in zip(numbers, self.raw(table, numbers), strict=True):
            if int(used[-1]) >= raw.shape[0]:
                raise token_out_of_range(int(used[-1]), raw.shape[0], table)
            found.append(self.place(raw[used], table, model))  # [U, d]
        return found

    def place(self, tensor: Tensor, name: str, model: int) -> Tensor:
        """Cast a tensor (or rows of it) from `raw` of the model with index `model`, and move it to the device.

        Raises:
            ModelError: it holds NaN or Inf.
        """
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            # Copy, then cast on the device: fewer bytes are copied. Pinned memory makes the copy asynchronous.
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        placed = tensor.to(device=self.device, dtype=self.dtype)
        if not all_finite(placed):
            raise ModelError(
                f"{show(name)} of {show(self.model_name(model))} holds NaN or Inf: "
                "fetch that checkpoint again, or leave the model out",
                code="not-finite-weights",
            )
        return placed

    def prefetch(self, names: Sequence[str], models: Sequence[int] | None = None) -> None:
        """Ask the operating system to read tensors into its file cache in the background."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        for model in self._stored(self._numbers(models)):
            headers = self.plan.headers.get(model)
            if headers is None:
                continue
            index = self.plan.loaders[model].index
            sources = [each for name in names for each in self.plan.names_in(name, model) if each in headers]
            for shard in {index.tensor_paths[source] for source in sources}:
                with open(os.path.join(index.base_path, shard), "rb") as file:
                    for source in sources:
                        if index.tensor_paths[source] == shard:
                            start, stop = headers[source].start, headers[source].stop
                            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def flush(self) -> None:
        """Close and unmap the open shards."""
        for loader in self.plan.loaders.values():
            loader.flush()

    def _numbers(self, models: Sequence[int] | None) -> list[int]:
        return list(range(self.num_models) if models is None else models)

    def _stored(self, numbers: Sequence[int]) -> list[ModelReference]:
        """Those of some models that are checkpoints."""
        return [self.plan.models[number] for number in numbers if number < len(self.plan.models)]

    def model_name(self, model: int) -> str:
        """Name of a model in messages."""
        return self.names[self.plan.models[model]] if model < len(self.plan.models) else "the direction"

    def _build_tokenizer(self, task: Task) -> TokenizerInfo:
        if self._tokenizer is None:
            self._tokenizer = task.execute()
        return self._tokenizer


def token_out_of_range(token: int, num_rows: int, table: str) -> ModelError:
    """The error for a token id of the calibration rows for which the embedding table `table` has no row."""
    return ModelError(
        f"token {token} of the calibration rows is beyond the {num_rows} rows of {show(table)}: use the tokenizer that "
        "belongs to these embeddings",
        code="token-out-of-range",
    )
