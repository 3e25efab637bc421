"""Compare the plan with the model class and the checkpoints: names, shapes, ties, tensors that are carried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_slta.checkpoints.configs import ties_embeddings
from mergekit_slta.checkpoints.headers import refuse_unlisted
from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.checkpoints.quantization import is_whole_float, quantized
from mergekit_slta.errors import ModelError, listing, show
from mergekit_slta.libraries.mergekit import is_gather, placed_loader
from mergekit_slta.models.skeleton import Skeleton

_ZERO_3 = "; empty tensors are what DeepSpeed ZeRO-3 saves if it does not gather the weights"


def reconcile(
    plan: Plan,
    names: Mapping[ModelReference, str],
    skeleton: Skeleton,
    configs: Mapping[ModelReference, Any],
    advice: Callable[[], str],
) -> None:
    """Check that every model has every tensor of the model class, in the same shape and unquantized.

    Args:
        plan: the plan.
        names: the models' names in the recipe, for messages.
        skeleton: the base's model.
        configs: the models' configs.
        advice: gives the remedy for vocabularies that differ.

    Raises:
        ModelError: a model lacks a tensor, or has one that the base lacks; shapes differ; or a tensor is quantized.
    """
    _refuse_quantized(plan, names, skeleton, configs)
    every = [*skeleton.shapes, *skeleton.unused]
    for name in every:
        having = [model for model in plan.models if name in plan.sources[model]]
        wanted = [model for model in plan.models if name in skeleton.shapes or _same_class(configs, plan, model)]
        lacking = [model for model in wanted if model not in having]
        if not lacking or name == skeleton.head_weight or not (having or name in skeleton.shapes):
            continue
        refuse_unlisted(plan.loaders[lacking[0]], name, names[lacking[0]])
        if having:
            reason = f"which {show(names[having[0]])} has: all models of a merge need the same tensors"
        else:
            reason = (
                "which its config asks for, and so do the others: fetch the model again, or correct its config.json"
            )
        raise ModelError(f"{show(names[lacking[0]])} lacks the tensor {show(name)}, {reason}", code="missing-tensor")
    _check_shapes(plan, names, skeleton, advice)


def _same_class(configs: Mapping[ModelReference, Any], plan: Plan, model: ModelReference) -> bool:
    return configs[model].architectures == configs[plan.models[0]].architectures


def refuse_differing(plan: Plan) -> None:
    """Refuse tensors that text does not run through and that differ between the models.

    Args:
        plan: the plan; of models that cannot be read yet, nothing is compared.

    Raises:
        ModelError: there are some.
    """
    if plan.unread:
        return
    base, *others = (placed_loader(model) for model in plan.models)
    differing = []
    for name in plan.carried:
        own = base.get_tensor(name)
        if any(not torch.equal(own, loader.get_tensor(name)) for loader in others):
            differing.append(name)
    for loader in (base, *others):
        loader.flush()
    if differing:
        share = sum(map(plan.num_elements, differing)) / max(1, sum(map(plan.num_elements, plan.outputs)))
        raise ModelError(
            f"text does not run through {len(differing)} tensors that differ between the models ({share:.1%} of the "
            f"weights: {listing(differing, 3)}): add `uncalibrated: base` to keep the base's, or `uncalibrated: "
            "average`",
            code="uncalibrated-tensors",
        )


def _refuse_quantized(
    plan: Plan, names: Mapping[ModelReference, str], skeleton: Skeleton, configs: Mapping[ModelReference, Any]
) -> None:
    """Refuse parameters that are stored as integers or in 8 bits, or packed into tensors of other names."""
    for model in plan.models:
        stored, found = plan.stored[model], []
        is_quantized = bool(getattr(configs[model], "quantization_config", None))
        for name in skeleton.shapes:
            source = plan.sources[model].get(name)
            if source is not None:
                found += [each for each in source.names if each in stored and not is_whole_float(stored[each].dtype)]
            elif is_quantized:
                prefix = name.rpartition(".")[0] + "."
                found += [key for key in stored if key not in skeleton.shapes and key.startswith(prefix)]
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
        table, projection: names of the embedding's and of the projection's weights, in the model.

    Raises:
        ModelError: a model has no projection, and its config does not tie it.
    """
    planned = projection in plan.tensors
    sources = {model: _name_of(plan, model, projection) for model in plan.models}
    tables = {model: _name_of(plan, model, table) for model in plan.models}
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
        if stored not in (None, embedded) and model not in plan.unread:
            loader = plan.loaders[model]
            same = embedded is not None and torch.equal(loader.get_tensor(stored), loader.get_tensor(embedded))
            loader.flush()
            if not same:
                return False
    return True


def _name_of(plan: Plan, model: ModelReference, name: str) -> str | None:
    """Name in a model's checkpoint of a tensor of the model; None if it has none."""
    source = plan.sources[model].get(name)
    return None if source is None else source.names[0]


def _check_shapes(
    plan: Plan, names: Mapping[ModelReference, str], skeleton: Skeleton, advice: Callable[[], str]
) -> None:
    base = plan.models[0]
    shapes = {source.names[0]: skeleton.shapes[name] for name, source in plan.tensors.items() if not source.conversion}
    for name, planned in plan.outputs.items():
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
