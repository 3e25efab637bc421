"""Compare mergekit's plan with the model class and with the checkpoints.

Scope: names, shapes and tied weights. mergekit's architecture definitions do not list every tensor of every checkpoint.
mergekit drops the tensors that they lack from the output, without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_slta.checkpoints.configs import ties_embeddings
from mergekit_slta.checkpoints.headers import refuse_unlisted
from mergekit_slta.checkpoints.plan import Plan, PlannedTensor
from mergekit_slta.checkpoints.quantization import is_whole_float, quantized
from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.mergekit import can_convert, gather_by_name, is_gather

_ZERO_3 = "; empty tensors are what DeepSpeed ZeRO-3 saves if it does not gather the weights"


def reconcile(
    plan: Plan,
    names: Mapping[ModelReference, str],
    shapes: Mapping[str, tuple[int, ...]],
    configs: Mapping[ModelReference, Any],
    advice: Callable[[], str],
    projection: str,
) -> list[str]:
    """Change the plan so that it holds exactly the parameters of the model class.

    Tensors that mergekit would drop are added, and read by name. Buffers that mergekit lists among the parameters are
    moved to `plan.copied`.

    Args:
        plan: changed in place.
        names: the models' names in the recipe, for messages.
        shapes: name in the plan -> shape of the model class's parameters.
        configs: the models' configs.
        advice: gives the remedy for vocabularies that differ.
        projection: name of the output projection's weight, which a tied model does not store.

    Returns:
        Reasons why mergekit cannot merge these checkpoints as they are; empty if it can.

    Raises:
        ModelError: a model lacks a tensor that another has, shapes differ, or a parameter is quantized.
    """
    _refuse_quantized(plan, names, shapes, configs)
    problems = []
    present = {model: set(plan.loaders[model].index.tensor_paths) for model in plan.models}

    def holds(name: str, model: ModelReference) -> bool:
        planned = plan.tensors.get(name)
        found = planned is not None and plan.source_name(name, model) is not None
        return found or can_convert(configs[model].model_type, present[model], name)

    for name in list(plan.tensors):
        lacking = [model for model in plan.models if not holds(name, model)]
        if not lacking:
            if name not in shapes and not plan.tensors[name].weight.optional:
                plan.copied.append(name)  # a buffer that older versions of transformers saved with the parameters
                del plan.tensors[name]
            continue
        if name in shapes and len(lacking) < len(plan.models):
            refuse_unlisted(plan.loaders[lacking[0]], name, names[lacking[0]])
            raise ModelError(
                f"{show(names[lacking[0]])} lacks the tensor {show(name)}, which "
                f"{show(names[next(model for model in plan.models if model not in lacking)])} has: "
                "all models of a merge need the same tensors",
                code="missing-tensor",
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
            weight, gather = gather_by_name(name, plan.models)
            plan.tensors[name] = PlannedTensor(weight, gather, dict.fromkeys(plan.models, weight))
        if not having and name != projection:
            raise ModelError(
                f"{show(names[plan.models[0]])} lacks the tensor {show(name)}, which its config asks for, and so do "
                "the others: fetch the model again, or correct its config.json",
                code="missing-tensor",
            )
        if having:
            problems.append(
                f"mergekit would drop {show(name)} of {show(names[having[0]])}: its definition of this architecture "
                "does not list it, and the output would load with zeros there"
            )
    _check_shapes(plan, names, shapes, advice)
    return problems


def _refuse_quantized(
    plan: Plan,
    names: Mapping[ModelReference, str],
    shapes: Mapping[str, tuple[int, ...]],
    configs: Mapping[ModelReference, Any],
) -> None:
    """Refuse parameters that are stored as integers or in 8 bits, or packed into tensors of other names."""
    for model in plan.models:
        stored, found = plan.stored[model], []
        is_quantized = bool(getattr(configs[model], "quantization_config", None))
        for name in shapes:
            source = plan.source_name(name, model) if name in plan.tensors else name
            if source in stored:
                found += [source] * (not is_whole_float(stored[source].dtype))
            elif is_quantized and not can_convert(configs[model].model_type, set(stored), name):
                found += [key for key in stored if key not in shapes and key.startswith(name.rpartition(".")[0] + ".")]
        if found:
            raise quantized(plan.loaders[model], stored, found, names[model])


def find_ties(
    plan: Plan,
    names: Mapping[ModelReference, str],
    configs: Mapping[ModelReference, Any],
    table: str,
    projection: str,
) -> bool:
    """Whether the output projection is the embedding table in every model.

    Some checkpoints of tied models store the table twice; if one does, mergekit plans a projection. A model counts as
    tied if its config ties the two weights and they are equal, or stored only once. Of a model whose tensors cannot be
    read yet, the config is believed.

    Args:
        plan: the plan.
        names: the models' names in the recipe, for messages.
        configs: the models' configs.
        table, projection: names of the embedding's and of the projection's weights.

    Raises:
        ModelError: a model has no projection, and its config does not tie it.
    """
    planned = projection in plan.tensors
    sources = {model: plan.source_name(projection, model) if planned else None for model in plan.models}
    tables = {model: plan.source_name(table, model) for model in plan.models}
    for model in plan.models:
        if not ties_embeddings(configs[model]) and sources[model] in (None, tables[model]):
            refuse_unlisted(plan.loaders[model], projection, names[model])
            raise ModelError(
                f"{show(names[model])} lacks the tensor {show(projection)}, and its config does not tie it to the "
                "embeddings: fetch the model again, or set `tie_word_embeddings: true` in its config.json",
                code="missing-tensor",
            )
    if not planned:
        return True
    for model in plan.models:
        if not ties_embeddings(configs[model]):
            return False
        stored, embedded = sources[model], tables[model]
        if stored != embedded and model not in plan.unread:
            loader = plan.loaders[model]
            same = embedded is not None and torch.equal(loader.get_tensor(stored), loader.get_tensor(embedded))
            loader.flush()
            if not same:
                return False
    return True


def _check_shapes(
    plan: Plan,
    names: Mapping[ModelReference, str],
    shapes: Mapping[str, tuple[int, ...]],
    advice: Callable[[], str],
) -> None:
    base = plan.models[0]
    for name, planned in plan.tensors.items():
        stored = plan.stored_as(name, base)
        if stored is None or not is_gather(planned.gather):  # mergekit changes the rows for another vocabulary
            continue
        if name in shapes and stored.shape != shapes[name]:
            raise ModelError(
                f"{show(name)} is {list(stored.shape)} in {show(names[base])} and {list(shapes[name])} by its config: "
                f"weights and config are of different models, fetch both again{_ZERO_3 if 0 in stored.shape else ''}",
                code="differing-sizes",
            )
        for model in plan.models[1:]:
            other = plan.stored_as(name, model)
            if other is None or other.shape == stored.shape:
                continue
            found, expected = list(other.shape), list(stored.shape)
            hint = f"all models of a merge need the same shapes{_ZERO_3 if 0 in found else ''}"
            code = "differing-sizes"
            if planned.weight.vocabulary_axis is not None:
                hint = advice()
                code = "differing-vocabularies"
            raise ModelError(
                f"{show(name)} is {found} in {show(names[model])} and {expected} in the base: {hint}", code=code
            )
