"""mergekit's own plan of a merge: which tensors OUT will hold, and the tasks that read them from every model.

Scope: the one place that builds mergekit's planner and compares its plan with what the checkpoints hold. Only headers
are read. Calibration reads through the same tasks as the merge, so that LoRA references, aliases, conversions and the
recipe's `dtype` and `tokenizer:` treatment are what it sees.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task as GraphTask
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_slta.checkpoints.headers import TensorHeader, read_headers
from mergekit_slta.checkpoints.lora_loader import open_adapter
from mergekit_slta.errors import ModelError, show
from mergekit_slta.recipe.recipe import Recipe


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        weight: mergekit's description; `weight.name` is the name in OUT and in the alphas file.
        gather: the task that hands it to the merge method, from every model.
        sources: model -> mergekit's description of the tensor in that model's checkpoint.
    """

    weight: WeightInfo
    gather: GraphTask
    sources: Mapping[ModelReference, WeightInfo]


@dataclass
class Plan:
    """What mergekit will do, tensor by tensor, and what the checkpoints say about it.

    Attributes:
        models: base first, then the experts in canonical order (sorted by the recipe's names).
        tensors: name in OUT -> planned tensor, in the plan's order.
        loaders: mergekit's lazy loaders of the models.
        headers: model -> tensor name in its checkpoint -> header; only for safetensors checkpoints.
        is_tied: the output projection is the embedding table, in every model: the plan lacks it, or holds a copy.
        copied: tensors of the plan that are no parameters; the merge takes the base's, and refuses models that differ.
    """

    models: tuple[ModelReference, ...]
    tensors: dict[str, PlannedTensor]
    loaders: dict[ModelReference, LazyTensorLoader]
    headers: dict[ModelReference, dict[str, TensorHeader]] = field(default_factory=dict)
    is_tied: bool = False
    copied: list[str] = field(default_factory=list)

    def shape(self, name: str, model: ModelReference) -> tuple[int, ...] | None:
        """Shape of an output's tensor in a model's checkpoint; None where the header does not tell."""
        source = self.source_name(name, model)
        header = self.headers.get(model, {}).get(source) if source else None
        return header.shape if header else None

    def source_name(self, name: str, model: ModelReference) -> str | None:
        """The name under which a model's checkpoint holds an output's tensor; None where it is converted or missing."""
        present = self.loaders[model].index.tensor_paths
        return next((other for other in _names(self.tensors[name].sources[model]) if other in present), None)


def forget_loaders(models: Sequence[ModelReference]) -> None:
    """Take the models' loaders out of mergekit's cache, which outlives a merge: their files may change before the
    next, and other methods merge adapters their own way."""
    for model in models:
        LoaderCache().loaders.pop(model, None)


def canonical(recipe: Recipe) -> tuple[ModelReference, ...]:
    """Base, then the experts by name: the order in which everything is computed, whatever the recipe's order."""
    return (recipe.base, *sorted((task.model for task in recipe.tasks), key=lambda model: recipe.names[model]))


def make_plan(recipe: Recipe, options: MergeOptions) -> Plan:
    """Plan the merge as `run_merge` will, and open the checkpoints' headers.

    Raises:
        ModelError: a checkpoint cannot be found or read, or mergekit cannot plan the recipe.
    """
    cache = LoaderCache()
    cache.setup(options=options)
    loaders: dict[ModelReference, LazyTensorLoader] = {}
    forget_loaders(recipe.models)
    for model in recipe.models:
        try:
            adapter = open_adapter(model, options, base=loaders.get(ModelReference(model=model.model)))
            if adapter is not None:
                cache.loaders[model] = adapter  # where mergekit's warm-up finds it, instead of merging a copy on disk
            loaders[model] = cache.get(model)
        except ModelError:
            raise
        except Exception as error:  # whatever mergekit, the Hub or the file system say about a missing checkpoint
            raise ModelError(
                f"cannot open the checkpoint of {show(recipe.names[model])} ({show(error)}): "
                "a file is missing or corrupt, fetch it again"
            ) from error
    headers = {
        model: read_headers(loader, recipe.names[model])
        for model, loader in loaders.items()
        if loader.index.is_safetensors
    }
    config = recipe.config.model_copy(deep=True)
    try:
        planner = MergePlanner(
            config,
            get_architecture_info(config, options),
            options=options,
            out_model_config=recipe.base.config(trust_remote_code=options.trust_remote_code),
        )
        # Nothing is written: the tasks only describe what would be. (`plan_in_memory` fails under pydantic 2.14.)
        planned = [task.tensor_task for task in planner.plan_to_disk(out_path="") if isinstance(task, SaveTensor)]
    except Exception as error:
        raise ModelError(f"mergekit cannot plan this merge: {show(error)}") from error
    tensors = {task.output_weight.name: _planned(task) for task in planned}
    return Plan(canonical(recipe), tensors, loaders, headers)


def _planned(task: ExecuteMergeMethodTask) -> PlannedTensor:
    gather = task.gather_tensors
    direct = gather if isinstance(gather, GatherTensors) else gather.gather_tensors
    return PlannedTensor(task.output_weight, gather, dict(direct.weight_info.items()))


def _names(weight: WeightInfo) -> list[str]:
    return [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]


def reconcile(
    plan: Plan,
    names: Mapping[ModelReference, str],
    shapes: Mapping[str, tuple[int, ...]],
    configs: Mapping[ModelReference, Any],
) -> list[str]:
    """Compare the plan with what the models need and the checkpoints hold; mergekit drops without a word what its
    definitions do not list.

    The plan's tensors become those that the model class has, so that calibration sees the whole model: what mergekit
    would drop is added, read by name; buffers that it lists beside the parameters are left out.

    Args:
        plan: the plan; its tensors are changed.
        names: the recipe's names of the models.
        shapes: the model class's parameters, by the plan's names.
        configs: the models' configs.

    Returns:
        Why mergekit cannot merge these checkpoints as they are; empty where it can.

    Raises:
        ModelError: the checkpoints do not fit each other or the model class.
    """
    problems = []
    present = {model: set(plan.loaders[model].index.tensor_paths) for model in plan.models}

    def holds(name: str, model: ModelReference) -> bool:
        planned = plan.tensors.get(name)
        found = planned is not None and plan.source_name(name, model) is not None
        return found or can_convert_checkpoint_keys(configs[model].model_type, present[model], name)

    for name in list(plan.tensors):
        lacking = [model for model in plan.models if not holds(name, model)]
        if not lacking:
            if name not in shapes and not plan.tensors[name].weight.optional:
                plan.copied.append(name)  # a buffer that older transformers saved, computed from the config today
                del plan.tensors[name]
            continue
        if name in shapes and len(lacking) < len(plan.models):
            raise ModelError(
                f"{show(names[lacking[0]])} lacks the tensor {show(name)}, which "
                f"{show(names[next(model for model in plan.models if model not in lacking)])} has: "
                "all models of a merge need the same tensors"
            )
        problems.append(
            f"mergekit plans to merge {show(name)}, which {show(names[lacking[0]])} does not have: its definition of "
            "this architecture does not fit this checkpoint"
        )
        del plan.tensors[name]
    for name in shapes:
        if name in plan.tensors:
            continue
        having = [model for model in plan.models if holds(name, model)]
        if len(having) == len(plan.models):
            weights = {model: WeightInfo(name=name) for model in plan.models}
            plan.tensors[name] = PlannedTensor(
                weights[plan.models[0]], GatherTensors(weight_info=ImmutableMap(data=weights)), weights
            )
        if having:
            problems.append(
                f"mergekit would drop {show(name)} of {show(names[having[0]])}: its definition of this architecture "
                "does not list it, and the output would load with zeros there"
            )
    _check_shapes(plan, names)
    return problems


def find_ties(plan: Plan, configs: Mapping[ModelReference, Any], table: str, projection: str) -> bool:
    """Whether the output projection is the embedding table in every model.

    Some checkpoints of tied models store it a second time; mergekit plans it as soon as one of them does. A copy that
    equals the table, where the config ties the two, is the same tensor; any other is one of its own.

    Args:
        plan: the plan.
        configs: the models' configs.
        table, projection: names of the embedding's and of the projection's weights.
    """
    if projection not in plan.tensors:
        return True
    for model in plan.models:
        if not getattr(configs[model], "tie_word_embeddings", False):
            return False
        stored = plan.source_name(projection, model)
        embedded = plan.source_name(table, model)
        if stored != embedded:
            loader = plan.loaders[model]
            same = embedded is not None and torch.equal(loader.get_tensor(stored), loader.get_tensor(embedded))
            loader.flush()
            if not same:
                return False
    return True


def _check_shapes(plan: Plan, names: Mapping[ModelReference, str]) -> None:
    base = plan.models[0]
    for name, planned in plan.tensors.items():
        wanted = plan.shape(name, base)
        realigned = not isinstance(planned.gather, GatherTensors)  # mergekit's tokenizer treatment changes the rows
        for model in plan.models[1:]:
            found = plan.shape(name, model)
            if wanted is None or found is None or realigned or found == wanted:
                continue
            hint = "all models of a merge need the same shapes"
            if planned.weight.vocabulary_axis is not None:
                hint = "the vocabularies differ: add `tokenizer: {source: base}` to the recipe"
            raise ModelError(
                f"{show(name)} is {list(found)} in {show(names[model])} and {list(wanted)} in the base: {hint}"
            )


def total_bytes(plan: Plan, models: Sequence[ModelReference] | None = None) -> int:
    """Bytes of the checkpoints of the given models (all by default)."""
    total = 0
    for model in models or plan.models:
        headers = plan.headers.get(model)
        if headers is not None:
            total += sum(header.stop - header.start for header in headers.values())
        else:
            index = plan.loaders[model].index
            total += sum(os.path.getsize(os.path.join(index.base_path, shard.filename)) for shard in index.shards)
    return total
