"""The plan of a merge: the tensors that OUT will hold, the tasks that read them from every model, and what the model is
made of them.

Scope: builds the plan and opens the checkpoints. Only headers are read. OUT holds the tensors of the base's checkpoint,
by their names; mergekit plans the merge with this definition in place of its own. Calibration reads tensors with the
same tasks as the merge, so it applies adapters and the recipe's `dtype` and `tokenizer:` in the same way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_slta.checkpoints.headers import DTYPE_NAMES, StoredTensor, TensorHeader, read_stored
from mergekit_slta.checkpoints.hub import Download, HubIndex
from mergekit_slta.checkpoints.lora_loader import open_adapter
from mergekit_slta.checkpoints.naming import Source, find_sources, in_another_class
from mergekit_slta.checkpoints.outputs import define_output, place_renamed
from mergekit_slta.checkpoints.quantization import refuse_quantized
from mergekit_slta.checkpoints.weight_files import open_checkpoint
from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.mergekit import (
    LazyTensorLoader,
    copy_place,
    forget_loaders,
    models_of,
    names_of,
)
from mergekit_slta.libraries.mergekit_plan import Definition, plan_tensors, stock_names
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import Task, WeightInfo

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        weight: mergekit's description; `weight.name` is the name in OUT and in the alphas file.
        gather: mergekit's task that reads the tensor from every model.
        sources: model -> mergekit's description of the tensor in that model's checkpoint.
    """

    weight: WeightInfo
    gather: Task
    sources: Mapping[ModelReference, WeightInfo]


@dataclass
class Plan:
    """The tensors that mergekit will merge, and the tensors that the checkpoints hold.

    Attributes:
        models: base first, then the experts in canonical order (sorted by the recipe's names), then the directions.
        definition: what mergekit writes, in place of its own definition of the model class.
        outputs: name in OUT -> planned tensor, in the plan's order.
        tensors: name in the model -> its source among `outputs`: the tensors that text runs through.
        carried: names in OUT of all others: of a vision tower, of heads that predict several tokens, old buffers.
        loaders: mergekit's lazy loaders of the models.
        stored: model -> tensor name in its checkpoint -> shape and dtype.
        sources: model -> name in the base's model -> source in that model's checkpoint.
        renamed: model -> name in OUT -> name in its checkpoint, if the two differ; for whole tensors only.
        is_tied: whether the output projection is the embedding table in every model. OUT then lacks the projection, or
            holds a copy of the table.
        is_stock: whether mergekit's own definition of the model class lists the same tensors.
        unread: the models whose tensors cannot be read yet. Their weights are on the Hub, or mergekit has to merge an
            adapter into a copy on disk first.
        downloads: the weights to download, each once.
    """

    models: tuple[ModelReference, ...]
    definition: Definition
    outputs: dict[str, PlannedTensor]
    tensors: dict[str, Source]
    carried: list[str]
    loaders: dict[ModelReference, LazyTensorLoader]
    stored: dict[ModelReference, dict[str, StoredTensor]] = field(default_factory=dict)
    sources: dict[ModelReference, dict[str, Source]] = field(default_factory=dict)
    renamed: dict[ModelReference, dict[str, str]] = field(default_factory=dict)
    is_tied: bool = False
    is_stock: bool = True
    unread: frozenset[ModelReference] = frozenset()
    downloads: tuple[Download, ...] = ()

    @cached_property
    def headers(self) -> dict[ModelReference, dict[str, TensorHeader]]:
        """model -> tensor name in its checkpoint -> header; only for safetensors checkpoints."""
        return {
            model: {key: tensor for key, tensor in stored.items() if isinstance(tensor, TensorHeader)}
            for model, stored in self.stored.items()
            if self.loaders[model].index.is_safetensors
        }

    def stored_as(self, name: str, model: ModelReference) -> StoredTensor | None:
        """Shape and dtype of a planned tensor in a checkpoint; None if it is converted from others, or missing."""
        source = self.source_name(name, model)
        return self.stored.get(model, {}).get(source) if source else None

    def read_dtype(self, name: str, model: ModelReference) -> torch.dtype | None:
        """Dtype in which mergekit reads a planned tensor from a model; None if it is not floating, or not known yet.

        A recipe's `dtype` is not considered. For a tensor that is converted from others, it is the widest of the model.
        """
        loaded = getattr(self.loaders[model], "dtype", None)  # --lora-merge-dtype
        if isinstance(loaded, torch.dtype):
            return loaded
        own = self.stored_as(name, model)
        return _DTYPES.get(own.dtype) if own else self._widest.get(model)

    @cached_property
    def _widest(self) -> dict[ModelReference, torch.dtype]:
        """Model -> the dtype to which all its floating tensors can be promoted."""
        kinds = {
            model: {entry.dtype for entry in stored.values()} & {*_DTYPES} for model, stored in self.stored.items()
        }
        return {
            model: reduce(torch.promote_types, map(_DTYPES.__getitem__, found))
            for model, found in kinds.items()
            if found
        }

    def merged_dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor of the merged model, if the recipe names none: mergekit promotes those of all models.

        None if the tensor is not floating, or nothing is known yet.
        """
        found = [dtype for model in self.models if (dtype := self.read_dtype(name, model)) is not None]
        return reduce(torch.promote_types, found) if found else None

    def source_name(self, name: str, model: ModelReference) -> str | None:
        """Name of a planned tensor in a model's checkpoint; None if it is made of others, or missing."""
        other = self.renamed.get(model, {}).get(name)
        if other is not None:
            return other
        present = self.loaders[model].index.tensor_paths
        return next((other for other in names_of(self.outputs[name].sources[model]) if other in present), None)

    def num_elements(self, name: str) -> int:
        """Number of elements of a tensor of OUT in the base's checkpoint; 0 if it is not known."""
        stored = self.stored_as(name, self.models[0])
        return math.prod(stored.shape) if stored else 0

    def names_in(self, name: str, model: ModelReference) -> list[str]:
        """Names in a model's checkpoint of what a tensor of the model is made of, as far as they are known."""
        return [source for each in self.tensors[name].names if (source := self.source_name(each, model))]


def canonical(recipe: Recipe) -> tuple[ModelReference, ...]:
    """Base first, then the experts sorted by name, then the directions. Every computation uses this order, not the
    recipe's."""
    experts = [task.model for task in recipe.tasks]
    return (
        recipe.base,
        *(model for part in (experts, recipe.directions) for model in sorted(part, key=recipe.names.get)),
    )


def make_plan(
    recipe: Recipe,
    options: MergeOptions,
    skeleton: Skeleton,
    configs: Mapping[ModelReference, PretrainedConfig],
    *,
    planning: bool = False,
) -> Plan:
    """Open the checkpoints, read their headers, and plan the merge as `run_merge` will.

    Args:
        recipe: the recipe.
        options: mergekit's options.
        skeleton: the base's model.
        configs: the models' configs.
        planning: download no weights, and merge no adapter into a copy. If either is needed, the plan says so in
            `unread`; its loaders then give names and headers, and no tensors.

    Raises:
        ModelError: a checkpoint cannot be found or read, it lacks a tensor, or mergekit cannot plan the recipe.
    """
    forget_loaders(recipe.models)
    loaders: dict[ModelReference, LazyTensorLoader] = {}
    stored: dict[ModelReference, dict[str, StoredTensor]] = {}
    copies = set()
    for model in recipe.models:
        name = recipe.names[model]
        base = loaders.get(ModelReference(model=model.model))
        loader = open_adapter(model, options, base=base, skeleton=skeleton, planning=planning)
        if loader is None:
            if model.lora and not os.path.exists(copy_place(model, options)):
                copies.add(model)
            loader = open_checkpoint(model, options, name, planning=planning)
        loaders[model] = loader
        stored[model] = read_stored(loader, name)
        refuse_quantized(loader, stored[model], name)
    for loader in loaders.values():
        if isinstance(loader.index, HubIndex) and not loader.index.tensor_paths:
            loader.index.name_tensors([*skeleton.shapes, *skeleton.unused])
    base_class = configs[recipe.base].architectures

    def sources_of(model: ModelReference) -> dict[str, Source]:
        """Sources of the base's tensors in a checkpoint, also if it is of the base's language model alone."""
        shapes = {key: stored[model][key].shape if key in stored[model] else None
                  for key in loaders[model].index.tensor_paths}  # fmt: skip
        if configs[model].architectures == base_class:
            return find_sources(skeleton, shapes)
        own = Skeleton(configs[model], recipe.names[model], skeleton.dtype, "cpu", options.trust_remote_code)
        return in_another_class(find_sources(own, shapes), own, skeleton)

    sources = {model: sources_of(model) for model in recipe.models}
    for model in recipe.models[1:]:
        if configs[model].architectures == base_class:
            _refuse_extra(model, recipe, loaders, sources[model], configs[model], skeleton, options)
    definition, carried = define_output(recipe, loaders, sources, skeleton, configs)
    renamed = {
        model: place_renamed(model, recipe, loaders, sources, definition.names, skeleton, options)
        for model in recipe.models
    }
    try:
        planned = plan_tensors(recipe.config.model_copy(deep=True), options, recipe.base, configs, definition)
    except Exception as error:
        raise ModelError(
            f"mergekit cannot plan this merge ({show(error)}): correct the recipe, or try a newer mergekit",
            code="cannot-plan",
        ) from error
    outputs = {weight.name: PlannedTensor(weight, gather, models_of(gather)) for weight, gather in planned}
    own = dict(sources[recipe.base])
    if skeleton.head_weight in outputs:
        own.setdefault(skeleton.head_weight, Source((skeleton.head_weight,)))
    tensors = {name: own[name] for name in skeleton.shapes if name in own}
    plan = Plan(canonical(recipe), definition, outputs, tensors, carried, loaders, stored, sources, renamed)
    plan.is_stock = stock_names(configs[recipe.base], loaders[recipe.base].index.tensor_paths) == {*outputs}
    if planning:
        _mark_unread(plan, copies)
    return plan


def _refuse_extra(
    model: ModelReference,
    recipe: Recipe,
    loaders: Mapping[ModelReference, LazyTensorLoader],
    sources: Mapping[str, Source],
    config: PretrainedConfig,
    skeleton: Skeleton,
    options: MergeOptions,
) -> None:
    """Refuse a model with a tensor that its own config asks for and the base lacks (a bias)."""
    known = {*loaders[recipe.base].index.tensor_paths, *(name for source in sources.values() for name in source.names)}
    extra = [name for name in loaders[model].index.tensor_paths if name not in known]
    if not extra:
        return
    own = Skeleton(config, recipe.names[model], skeleton.dtype, "cpu", options.trust_remote_code)
    for source in find_sources(own, dict.fromkeys(extra)).values():
        raise ModelError(
            f"{show(recipe.names[recipe.base])} lacks the tensor {show(source.names[0])}, which "
            f"{show(recipe.names[model])} has: all models of a merge need the same tensors",
            code="missing-tensor",
        )


def _mark_unread(plan: Plan, copies: set[ModelReference]) -> None:
    """List the models of a plan whose tensors cannot be read yet, and what has to be downloaded for them."""
    downloads: dict[str, Download] = {}
    unread = set(copies)
    for model, loader in plan.loaders.items():
        missing = [load for holder in (loader, loader.index) if (load := getattr(holder, "download", None))]
        downloads |= {load.name: load for load in missing}
        unread |= {model} if missing else set()
    plan.unread, plan.downloads = frozenset(unread), tuple(downloads.values())


def total_bytes(plan: Plan, models: Sequence[ModelReference] | None = None) -> int:
    """Bytes of the checkpoints of the given models (all by default)."""
    total = 0
    for model in models or plan.models:
        headers = plan.headers.get(model)
        if headers is not None:
            total += sum(header.stop - header.start for header in headers.values())
        else:
            index = plan.loaders[model].index
            if isinstance(index, HubIndex):
                total += sum(index.sizes.values())
                continue
            total += sum(os.path.getsize(os.path.join(index.base_path, shard.filename)) for shard in index.shards)
    return total
