"""The names of tensors: in a model, in the checkpoints that hold it, and in the output, which has the base's names.

Scope: which tensors of a checkpoint become which of the model, as transformers loads them; a loader that gives a
checkpoint's tensors under the base's names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader
from mergekit_slta.libraries.transformers import Conversion, read_names, to_checkpoint
from mergekit_slta.models.skeleton import Skeleton


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from.

    Attributes:
        names: names in the checkpoint.
        conversion: makes the tensor of these; None if it is the one tensor as it is.
    """

    names: tuple[str, ...]
    conversion: Conversion | None = None

    def make(self, skeleton: Skeleton, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor `name` of the model, from those of the checkpoint."""
        return tensors[0] if self.conversion is None else self.conversion.convert(skeleton.model, tensors)[name]


def find_sources(skeleton: Skeleton, shapes: Mapping[str, Sequence[int] | None]) -> dict[str, Source]:
    """Find the sources of a model's tensors in a checkpoint.

    Args:
        skeleton: the model.
        shapes: name in the checkpoint -> shape; None if it is not known yet.

    Returns:
        name in the model -> source, for the tensors that the checkpoint has.
    """
    plain, conversions = read_names(skeleton.model, shapes)
    found = {name: Source((source,)) for name, source in plain.items()}
    for conversion in conversions:
        known = [shapes[name] for name in conversion.sources]
        targets = [conversion.target]
        if None not in known:
            try:
                targets = list(conversion.convert(skeleton.model, [torch.empty(s, device="meta") for s in known]))
            except Exception:  # some are missing, or of other sizes: the tensor counts as missing
                continue
        found |= {name: Source(tuple(conversion.sources), conversion) for name in targets}
    return found


def in_another_class(sources: Mapping[str, Source], own: Skeleton, other: Skeleton) -> dict[str, Source]:
    """Sources by the names of another class with the same language model: of one with a vision tower, for a model of
    text only, or the reverse.

    Args:
        sources: by the names of `own`.
        own, other: the two models.
    """
    here, there = (skeleton.layers_path.rpartition(".")[0] + "." for skeleton in (own, other))
    ends = {own.head_weight: other.head_weight}

    def renamed(name: str) -> str:
        return ends.get(name, there + name.removeprefix(here) if name.startswith(here) else name)

    return {renamed(name): source for name, source in sources.items()}


class RenamedLoader(LazyTensorLoader):
    """A checkpoint's tensors under the names that the base's checkpoint has; a drop-in for mergekit's loader.

    Args:
        loader: the checkpoint's loader.
        skeleton: the base's model.
        name: the model's name in the recipe, for messages.
        names: names in the base's checkpoint.
        wanted: name in the base's checkpoint -> the tensors of the model that are made of it.
        sources: name in the model -> source in this checkpoint.
        plain: name in the base's checkpoint -> the same tensor's name in this one.
        base: the base's loader, for tensors that this checkpoint lacks.
    """

    def __init__(
        self,
        loader: LazyTensorLoader,
        skeleton: Skeleton,
        name: str,
        names: Sequence[str],
        wanted: Mapping[str, Sequence[str]],
        sources: Mapping[str, Source],
        plain: Mapping[str, str],
        base: LazyTensorLoader,
    ) -> None:
        index = copy.copy(loader.index)
        index.tensor_paths = {each: base.index.tensor_paths.get(each, "") for each in names}
        super().__init__(index, lazy_unpickle=loader.lazy_unpickle)
        self.own, self.base = loader, base
        self._skeleton, self._name = skeleton, name
        self._wanted, self._sources, self._plain = wanted, sources, plain
        self._kept: dict[str, Tensor] = {}

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """Read a tensor by its name in the base's checkpoint.

        Raises:
            ModelError: this checkpoint divides it in another way, which transformers cannot undo.
        """
        if key in self._plain:
            return self.own.get_tensor(self._plain[key], device=device)
        targets = [name for name in self._wanted.get(key, ()) if name in self._sources]
        if not targets:
            return self.base.get_tensor(key, device=device, aliases=aliases, raise_on_missing=raise_on_missing)
        kept = self._kept  # threads share a loader
        if key not in kept:  # of a group of experts, all are made at once
            made = {}
            for name in targets:
                source = self._sources[name]
                made[name] = source.make(self._skeleton, name, [self.own.get_tensor(each) for each in source.names])
            kept = self._kept = {**made, **to_checkpoint(self._skeleton.model, made)}
        if key not in kept:
            raise ModelError(
                f"{show(self._name)} stores {show(targets[0])} in another way than the base: load it with transformers "
                "and save it with `save_pretrained`",
                code="missing-tensor",
            )
        return kept[key].to(device)

    def flush(self) -> None:
        """Close and unmap the open files."""
        self._kept = {}
        self.own.flush()


def groups_by_source(sources: Mapping[str, Source]) -> dict[str, list[str]]:
    """name in a checkpoint -> the tensors of the model that are made of it."""
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        for each in source.names:
            found.setdefault(each, []).append(name)
    return found
