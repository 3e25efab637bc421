"""Validate every key of a recipe for `submodule_linear`.

Scope: checks that need only the recipe, not the models or the data. `load.py` reads the file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ValidationError

from mergekit_slta.errors import RecipeError, listing, show
from mergekit_slta.libraries.mergekit import ConditionalParameter, InputModelDefinition, methods_with
from mergekit_slta.recipe.objectives import OBJECTIVES, all_shared_keys, owners_of
from mergekit_slta.recipe.recipe import Recipe, Task, map_models
from mergekit_slta.recipe.self_written import check_rows_are_fitted, check_self_written
from mergekit_slta.recipe.settings import METHOD, SHARED_KEYS, TASK_KEYS, Dtype, Settings, to_number
from mergekit_slta.recipe.tokenizer_section import check_tokenizer_section

_TOP_KEYS = (*MergeConfiguration.model_fields, "name")
"""Top-level keys of a recipe; `name` is used by mergekit-multi."""
_MODEL_KEYS = tuple(InputModelDefinition.model_fields)


def check_content(content: object, path: str | os.PathLike[str] | None = None) -> None:
    """Refuse keys that mergekit would ignore, and keys without a value.

    Args:
        content: the parsed YAML of the recipe.
        path: its file, for messages.

    Raises:
        RecipeError: it is not a mapping, or a key is unknown, in the wrong place, or without a value.
    """
    where = f"the recipe {show(path)}" if path is not None else "the recipe"
    recipes = content.get("merges") if isinstance(content, dict) else content
    if isinstance(recipes, list) and any(isinstance(recipe, dict) for recipe in recipes):
        raise RecipeError(
            f"{where} holds {len(recipes)} documents, as those of mergekit-multi do: put each recipe into a file of "
            "its own, or merge all of them with `mergekit-multi`",
            code="not-a-recipe",
        )
    if not isinstance(content, dict):
        kind = "empty" if content is None else "not a mapping of keys to values"
        raise RecipeError(f"{where} is {kind}: it starts with `merge_method: {METHOD}`", code="not-a-recipe")
    if "merge_method" not in content:
        raise RecipeError(f"{where} has no `merge_method`: add `merge_method: {METHOD}`", code="not-a-recipe")
    models = content.get("models")
    entries = [entry for entry in (models if isinstance(models, list) else ()) if isinstance(entry, dict)]
    if content.get("merge_method") == METHOD:
        _check_places(content, entries)
        check_tokenizer_section(content.get("tokenizer"))
    for holder in (content, *entries):
        parameters = holder.get("parameters")
        for key, value in parameters.items() if isinstance(parameters, dict) else ():
            if value is None:
                raise RecipeError(
                    f"`{show(key)}` in {where} has no value: give it one, or remove the line", code="missing-value"
                )


def _check_places(content: Mapping[Any, Any], entries: Sequence[Mapping[Any, Any]]) -> None:
    """Refuse keys at the top level, or in a model's entry, that mergekit does not know there."""
    for key in content:
        if key in all_shared_keys():
            _refuse_place(key, "beside `merge_method`", "under the top-level `parameters:`")
        elif key in TASK_KEYS and key not in _TOP_KEYS:
            _refuse_place(key, "beside `merge_method`", "under `parameters:` of its model")
        elif key not in _TOP_KEYS:
            _refuse_unknown(str(key), (*_TOP_KEYS, *all_shared_keys(), *TASK_KEYS), "beside `merge_method`")
    for entry in entries:
        where = f"beside `model: {show(entry.get('model'))}`"
        for key in entry:
            if key in TASK_KEYS:
                _refuse_place(key, where, "under `parameters:` of that model")
            elif key in all_shared_keys():
                _refuse_place(key, where, "under the top-level `parameters:`")
            elif key not in _MODEL_KEYS:
                _refuse_unknown(str(key), (*_MODEL_KEYS, *TASK_KEYS), where)


def _refuse_top_key(key: str, where: str) -> None:
    """Refuse a key under `parameters:` that mergekit reads beside `merge_method` alone, such as `dtype`."""
    if key in _TOP_KEYS and key not in (*all_shared_keys(), *TASK_KEYS):
        _refuse_place(key, where, "beside `merge_method`")


def _refuse_place(key: str, where: str, place: str) -> None:
    raise RecipeError(f"`{show(key)}` stands {where}, where it is ignored: move it {place}", code="misplaced-key")


def no_recipe(given: object) -> RecipeError:
    """The error for what is neither a recipe nor the path of one."""
    return RecipeError(
        f"the recipe is of type {type(given).__name__}: give the path of a recipe, its content as a mapping, "
        "or mergekit's configuration",
        code="not-a-recipe",
    )


def read_recipe(config: MergeConfiguration) -> Recipe:
    """Validate mergekit's configuration for this method.

    Raises:
        RecipeError: the recipe has another method, `slices` or `modules`, no base, no expert, an expert twice, an
            unknown key or value, or a value that differs between tensors; or it is no configuration.

    Examples:
        >>> recipe = mergekit_slta.read_recipe(mergekit_slta.load_config("recipe.yml")[0])
        >>> recipe.settings.num_samples
        2
    """
    if not isinstance(config, MergeConfiguration):
        raise no_recipe(config)
    if config.merge_method != METHOD:
        raise RecipeError(
            f"merge_method is {show(config.merge_method)!r}, and this command runs {METHOD!r} recipes only: "
            "use `mergekit-yaml` for others",
            code="other-method",
        )
    for layout in ("slices", "modules"):
        if getattr(config, layout):
            raise RecipeError(
                f"{METHOD} merges whole models: replace `{layout}:` by `models:`", code="unsupported-layout"
            )
    if config.base_model is None:
        raise RecipeError(
            f"{METHOD} needs the model that the experts were fine-tuned from: add `base_model:`", code="missing-base"
        )
    for key in ("dtype", "out_dtype"):
        dtype = getattr(config, key)
        if dtype is not None and dtype.removeprefix("torch.") not in get_args(Dtype):
            raise RecipeError(
                f"`{key}` is {show(dtype)!r}: choose one of {listing(get_args(Dtype))}", code="invalid-value"
            )
    labels: dict[ModelReference, str] = {}

    def absolute_model(model: ModelReference) -> ModelReference:
        labels.setdefault(_absolute(model), _label(str(model)))
        return _absolute(model)

    absolute = map_models(config, absolute_model)
    names: dict[ModelReference, str] = {}
    base = _absolute(config.base_model)
    names[base] = str(config.base_model)

    tasks, directions = [], []
    for given, entry in zip(config.models or [], absolute.models or [], strict=True):
        parameters = entry.parameters or {}
        if entry.model == base:
            if parameters:
                raise RecipeError(
                    f"{show(given.model)} is the base and is listed with `parameters`: list the expert that you meant, "
                    "or drop its `parameters`",
                    code="misplaced-key",
                )
            continue
        if entry.model in names:
            raise RecipeError(f"{show(given.model)} is listed twice; list each expert once", code="duplicate-model")
        names[entry.model] = str(given.model)
        task = _task(entry.model, str(given.model), parameters, config.parameters or {})
        if task.role == "task":
            tasks.append(task)
        else:
            directions.append(entry.model)
    if not tasks:
        raise RecipeError(
            f"{METHOD} needs at least one expert besides the base: add it under `models:`"
            + " (a model with `role: direction` is none)" * bool(directions),
            code="missing-expert",
        )
    settings = _settings(config.parameters or {})
    if len(tasks) < 2 and "direction" not in settings.stated and settings.own.needs_rows:
        settings = settings.model_copy(update={"direction": "none"})  # a closed form combines experts
    recipe = Recipe(
        base=base, tasks=tuple(tasks), directions=tuple(directions), settings=settings, config=absolute, names=names,
        labels=labels,
    )  # fmt: skip
    _check_directions(recipe)
    check_rows_are_fitted(recipe)
    return recipe


def _check_directions(recipe: Recipe) -> None:
    """Refuse directions that the recipe's models or objective do not allow."""
    settings, form = recipe.settings, recipe.closed_form
    if recipe.directions and not settings.own.needs_rows:
        raise RecipeError(
            f"{show(recipe.names[recipe.directions[0]])} has `role: direction`, and `objective: {settings.objective}` "
            "reads no rows that would give it a weight: leave the model out, or change `objective`",
            code="conflicting-keys",
        )
    if form is not None and len(recipe.tasks) < 2:
        raise RecipeError(
            f"`direction: {form}` combines experts, and there is one: add another, or "
            + ("set `direction: none`" if settings.own.needs_rows else "change `objective`"),
            code="missing-expert",
        )
    if recipe.model_labels.count(form or "") > 1:
        raise RecipeError(
            f"a model is named {show(form)!r}, as the direction is: give its folder another name",
            code="duplicate-model",
        )


def _label(name: str) -> str:
    parts = [os.path.normpath(part) if os.path.exists(part) else part for part in name.split("+")]
    return "+".join(parts)


def _task(model: ModelReference, name: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Task:
    for key in own:
        _refuse_top_key(key, f"under {show(name)}")
        if key in all_shared_keys():
            raise RecipeError(
                f"`{key}` of {show(name)} is shared by all models: move it to the top-level `parameters:`",
                code="misplaced-key",
            )
        if key not in TASK_KEYS:
            _refuse_unknown(key, TASK_KEYS, f"under {show(name)}")
    if constant("role", own.get("role", "task")) == "direction":
        for key in own:
            if key != "role":
                raise RecipeError(
                    f"{show(name)} has `role: direction`, and no task that `{key}` could belong to: drop `{key}`",
                    code="conflicting-keys",
                )
    given = {key: own.get(key, shared.get(key)) for key in TASK_KEYS if key in own or key in shared}
    values = {key: constant(key, setting) for key, setting in given.items()}
    task = _validated(Task, {"model": model, **values}, name)
    check_self_written(task, name, own)
    return task


def _settings(shared: Mapping[str, Any]) -> Settings:
    for key in shared:
        _refuse_top_key(key, "under the top-level `parameters:`")
        if key not in (*all_shared_keys(), *TASK_KEYS):
            _refuse_unknown(key, (*all_shared_keys(), *TASK_KEYS), "under the top-level `parameters:`")
    for leaf in _leaves(shared.get("lambda", 1.0)):
        try:
            scale = to_number(leaf)
        except ValueError:
            scale = None
        if not isinstance(scale, (int, float)) or scale != scale or abs(scale) == float("inf"):
            raise RecipeError(f"`lambda` is {show(leaf)!r}; it must be a finite number", code="invalid-value")
    stated = {key: constant(key, setting) for key, setting in shared.items() if key not in ("lambda", *TASK_KEYS)}
    name = stated.get("objective", Settings.model_fields["objective"].default)
    if name not in OBJECTIVES:
        raise RecipeError(
            f"`objective` of the recipe is {show(name)!r}: choose one of {listing(OBJECTIVES)}", code="invalid-value"
        )
    objective = OBJECTIVES[name]
    for key in stated:
        if key not in SHARED_KEYS and key not in objective.settings.model_fields:
            raise RecipeError(
                f"`{key}` only applies to `objective: {listing(owners_of(key))}`, and this recipe's is {name!r}: "
                f"drop `{key}`, or change `objective`",
                code="key-of-another-objective",
            )
    own = _validated(
        objective.settings, {key: value for key, value in stated.items() if key not in SHARED_KEYS}, "the recipe"
    )
    values = {**objective.defaults, **{key: value for key, value in stated.items() if key in SHARED_KEYS}}
    settings = _validated(Settings, {**values, "own": own, "stated": frozenset(stated)}, "the recipe")
    if settings.granularity not in objective.granularities:
        raise RecipeError(
            f"`objective` is {name!r} and `granularity` is {settings.granularity!r}: choose one of "
            f"{listing(objective.granularities)}, or another objective",
            code="conflicting-keys",
        )
    own.check_shared(settings)
    return settings


def _refuse_unknown(key: str, known: Sequence[str], where: str) -> None:
    """Refuse a key: one of another merge method's by that method's name, any other with the nearest known key."""
    methods = methods_with(key, besides=METHOD)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8 if methods else 0.5)
    if methods and not near:
        share = "; `importance` sets a task's share" if key == "weight" else ""
        hint = f"it belongs to {listing(methods, 3)}; {METHOD} computes the weights itself: remove it{share}"
    else:
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {listing(known, 20)}"
    raise RecipeError(f"unknown key `{show(key)}` {where}: {hint}", code="unknown-key")


def constant(key: str, setting: Any) -> Any:
    """Get the value of a mergekit setting that must be the same for all tensors.

    Raises:
        RecipeError: filters or gradients give tensors different values, or give some tensors none.
    """
    leaves = list(_leaves(setting))
    conditions = (
        [setting] if isinstance(setting, ConditionalParameter) else setting if isinstance(setting, list) else []
    )
    filtered = bool(conditions) and all(isinstance(entry, ConditionalParameter) for entry in conditions)
    covers_all = not filtered or any(entry.filter in (None, "*") for entry in conditions)
    if not leaves or not covers_all or any(repr(leaf) != repr(leaves[0]) for leaf in leaves):
        raise RecipeError(
            f"`{key}` differs between tensors (filters or a gradient): give one value for all of them",
            code="value-differs-between-tensors",
        )
    return leaves[0]


def _leaves(setting: Any) -> Iterator[Any]:
    if isinstance(setting, ConditionalParameter):
        yield from _leaves(setting.value)
    elif isinstance(setting, list):
        for entry in setting:
            yield from _leaves(entry)
    else:
        yield setting


def _validated(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0]) if problem["loc"] else "?"
        messages = [other["msg"] for other in error.errors() if other["loc"][:1] == problem["loc"][:1]]  # of a union
        allowed = get_args(model.model_fields[key].annotation) if problem["type"] == "literal_error" else ()
        is_choice = allowed and len(messages) == 1
        remedy = f"choose one of {listing(allowed)}" if is_choice else messages[0].removeprefix("Value error, ")
        remedy += "".join(f" or {message.removeprefix('Input should be ')}" for message in messages[1:])
        raise RecipeError(
            f"`{key}` of {show(where)} is {show(problem['input'])!r}: {show(remedy)}", code="invalid-value"
        ) from error


def _absolute(model: ModelReference) -> ModelReference:
    """Make a local path absolute. mergekit's model card looks up a relative `a/b` on the Hub, which fails offline."""
    changes = {}
    for part in ("model", "lora"):
        path = getattr(model, part)
        if path is not None and os.path.exists(path.path):
            changes[part] = path.model_copy(update={"path": os.path.realpath(path.path)})
    return model.model_copy(update=changes) if changes else model
