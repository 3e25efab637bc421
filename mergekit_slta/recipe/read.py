"""A recipe: mergekit's YAML, read for `submodule_linear` and validated to the last key.

Scope: what the recipe says, nothing about files, models or data. Every refusal here needs the recipe alone.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mergekit_slta.errors import RecipeError, listing, show
from mergekit_slta.maths.gauss_newton import SMALLEST_RIDGE

METHOD = "submodule_linear"
Granularity = Literal["model", "layer", "attn_mlp", "head_mlp", "linear"]
OBJECTIVE_KEYS = {"features": (), "joint": ("label_samples", "steps", "fresh_rows")}
"""Keys that matter to some objectives only; elsewhere they are no part of what alphas are valid for."""
OWN_DEFAULTS = {"joint": {"granularity": "linear"}}
"""Defaults that are others under an objective: what is solved together gains from finer units (examples/reproduce)."""
ComputeDtype = Literal["float32", "float64", "bfloat16", "float16"]


def _number(value: object) -> object:
    """YAML reads 1e-3 as a string and true as a number of Python's: take the first, refuse the second."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


def _count(value: object) -> object:
    """Quoted whole numbers are numbers; fractions and truth values are not."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


Count = Annotated[int, BeforeValidator(_count), Field(strict=True)]


class Task(BaseModel):
    """One expert and the calibration rows of its task (the per-model keys of a recipe)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelReference
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text: str | None = None
    completion: str | None = None
    importance: Annotated[Number, Field(gt=0)] = 1.0


class Settings(BaseModel):
    """The keys shared by all models. `lambda` is left out: mergekit resolves it tensor by tensor at merge time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Granularity = "attn_mlp"
    num_samples: Annotated[Count, Field(ge=1)] = 30
    max_seq_length: Annotated[Count, Field(ge=2)] = 512
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 42
    balance: Annotated[bool, Field(strict=True)] = True
    inputs: Literal["base", "merged"] = "base"
    objective: Literal["features", "joint"] = "features"
    label_samples: Annotated[Count, Field(ge=0)] = 2
    steps: Annotated[Count, Field(ge=0)] = 6
    fresh_rows: Annotated[bool, Field(strict=True)] = True
    ridge: Annotated[Number, Field(ge=0)] | None = None
    compute_dtype: ComputeDtype = "float32"
    alphas: Annotated[str, Field(min_length=1)] | None = None

    @property
    def objective_keys(self) -> tuple[str, ...]:
        """Those of the gradient objectives' keys that this objective reads."""
        return OBJECTIVE_KEYS[self.objective]

    @property
    def row_groups(self) -> int:
        """How often `num_samples` rows of each task are drawn: once, or for every step."""
        return self.steps if self.objective == "joint" and self.fresh_rows and self.steps else 1

    @model_validator(mode="after")
    def _defaults_of_the_objective(self) -> Settings:
        """Not counted as stated; a ridge of None stays only where the solve chooses one."""
        for key, value in OWN_DEFAULTS.get(self.objective, {}).items():
            if key not in self.model_fields_set:
                object.__setattr__(self, key, value)
        if self.ridge is None and self.objective != "joint":
            object.__setattr__(self, "ridge", 0.0)
        return self


TASK_KEYS = tuple(name for name in Task.model_fields if name != "model")
SHARED_KEYS = (*Settings.model_fields, "lambda")


class Recipe(BaseModel):
    """A validated recipe.

    Attributes:
        base: the base model.
        tasks: the experts in the recipe's order, base left out.
        settings: the shared keys.
        config: mergekit's own configuration, local model paths made absolute.
        names: how the recipe spells base and experts; used in files and messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ModelReference
    tasks: tuple[Task, ...]
    settings: Settings
    config: MergeConfiguration
    names: dict[ModelReference, str]

    def label(self, model: ModelReference) -> str:
        """A model's name in files: as the recipe spells it, local paths without `./` and trailing slashes."""
        name = self.names[model]
        parts = [os.path.normpath(part) if os.path.exists(part) else part for part in name.split("+")]
        return "+".join(parts)

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Base first, then the experts in the recipe's order."""
        return (self.base, *(task.model for task in self.tasks))


def load_config(path: str | os.PathLike[str]) -> tuple[MergeConfiguration, str]:
    """Read a recipe file; returns mergekit's configuration and the file's text.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a recipe that mergekit accepts.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(source)
        _check_layout(content, path)
        config = MergeConfiguration.model_validate(content)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {show(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {show(path)} is not a UTF-8 text file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {show(path)} is not valid YAML: {show(error)}") from error
    except ValidationError as error:
        raise RecipeError(f"the recipe {show(path)} is not a merge recipe: {_first(error)}") from error
    except RuntimeError as error:  # mergekit's own validators
        raise RecipeError(f"the recipe {show(path)} is not a merge recipe: {show(error)}") from error
    return config, source


def _check_layout(content: object, path: str | os.PathLike[str]) -> None:
    """What mergekit's own models would say in many words."""
    if not isinstance(content, dict):
        kind = "empty" if content is None else "not a mapping of keys to values"
        raise RecipeError(f"the recipe {show(path)} is {kind}: it starts with `merge_method: {METHOD}`")
    models = content.get("models")
    for holder in (
        content,
        *(entry for entry in (models if isinstance(models, list) else ()) if isinstance(entry, dict)),
    ):
        parameters = holder.get("parameters")
        for key, value in parameters.items() if isinstance(parameters, dict) else ():
            if value is None:
                raise RecipeError(f"`{show(key)}` in {show(path)} has no value: give it one, or remove the line")


def read_recipe(config: MergeConfiguration) -> Recipe:
    """Validate mergekit's configuration for this method.

    Raises:
        RecipeError: another method, `slices` or `modules`, no base, no expert, an expert twice, an unknown key or
            value, or a value that differs between tensors.
    """
    if config.merge_method != METHOD:
        raise RecipeError(f"merge_method is {show(config.merge_method)!r}; this command runs {METHOD!r} recipes only")
    for layout in ("slices", "modules"):
        if getattr(config, layout):
            raise RecipeError(f"{METHOD} merges whole models: replace `{layout}:` by `models:`")
    if config.base_model is None:
        raise RecipeError(f"{METHOD} needs the model that the experts were fine-tuned from: add `base_model:`")
    for key in ("dtype", "out_dtype"):
        dtype = getattr(config, key)
        if dtype is not None and dtype.removeprefix("torch.") not in get_args(ComputeDtype):
            raise RecipeError(f"`{key}` is {show(dtype)!r}: choose one of {listing(get_args(ComputeDtype))}")
    absolute = config.model_copy(deep=True)
    names: dict[ModelReference, str] = {}
    base = _absolute(config.base_model)
    names[base] = str(config.base_model)
    absolute.base_model = base

    tasks = []
    for given, entry in zip(config.models or [], absolute.models or [], strict=True):
        entry.model = _absolute(given.model)
        parameters = entry.parameters or {}
        if entry.model == base:
            if parameters:
                raise RecipeError(f"the base model {show(given.model)} takes no parameters; give them to the experts")
            continue
        if entry.model in names:
            raise RecipeError(f"{show(given.model)} is listed twice; list each expert once")
        names[entry.model] = str(given.model)
        tasks.append(_task(entry.model, str(given.model), parameters, config.parameters or {}))
    if not tasks:
        raise RecipeError(f"{METHOD} needs at least one expert besides the base: add it under `models:`")
    return Recipe(
        base=base, tasks=tuple(tasks), settings=_settings(config.parameters or {}), config=absolute, names=names
    )


def _task(model: ModelReference, name: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Task:
    for key in own:
        if key in SHARED_KEYS:
            raise RecipeError(
                f"`{key}` of {show(name)} is shared by all models: move it to the top-level `parameters:`"
            )
        _check_key(key, TASK_KEYS, f"under {show(name)}")
    given = {key: own.get(key, shared.get(key)) for key in TASK_KEYS if key in own or key in shared}
    values = {key: constant(key, setting) for key, setting in given.items()}
    return _validated(Task, {"model": model, **values}, name)


def _settings(shared: Mapping[str, Any]) -> Settings:
    for key in shared:
        _check_key(key, SHARED_KEYS + TASK_KEYS, "under the top-level `parameters:`")
    for leaf in _leaves(shared.get("lambda", 1.0)):
        try:
            scale = _number(leaf)
        except ValueError:
            scale = None
        if not isinstance(scale, (int, float)) or scale != scale or abs(scale) == float("inf"):
            raise RecipeError(f"`lambda` is {show(leaf)!r}; it must be a finite number")
    values = {key: constant(key, shared[key]) for key in Settings.model_fields if key in shared}
    settings = _validated(Settings, values, "the recipe")
    if settings.objective != "features" and settings.inputs != "base":
        raise RecipeError(
            f"`objective` is {settings.objective!r} and `inputs` is {show(settings.inputs)!r}, which only applies to "
            "`objective: features`: drop `inputs`"
        )
    if settings.objective == "joint":
        if settings.steps and not settings.label_samples:
            raise RecipeError(
                f"`label_samples` is 0 and `steps` is {settings.steps}: steps learn from the experts, not from "
                "the rows' own tokens; set `steps: 0`, or draw labels"
            )
        if settings.steps and settings.ridge is not None and settings.ridge < SMALLEST_RIDGE:
            raise RecipeError(
                f"`ridge` is {settings.ridge:g} and `steps` is {settings.steps}: a step needs {SMALLEST_RIDGE:g} or "
                "more; drop `ridge` to have it chosen, or set `steps: 0`"
            )
    return settings


def _check_key(key: str, known: tuple[str, ...], where: str) -> None:
    if key in known:
        return
    if key == "weight":
        raise RecipeError(
            f"unknown key `weight` {where}: the weights are what {METHOD} computes; `importance` sets a task's share"
        )
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {listing(known, 20)}"
    raise RecipeError(f"unknown key `{show(key)}` {where}: {hint}")


def constant(key: str, setting: Any) -> Any:
    """The one value of a mergekit setting.

    Raises:
        RecipeError: filters or gradients give different tensors different values, or leave some without one.
    """
    leaves = list(_leaves(setting))
    conditions = (
        [setting] if isinstance(setting, ConditionalParameter) else setting if isinstance(setting, list) else []
    )
    filtered = bool(conditions) and all(isinstance(entry, ConditionalParameter) for entry in conditions)
    covers_all = not filtered or any(entry.filter in (None, "*") for entry in conditions)
    if not leaves or not covers_all or any(repr(leaf) != repr(leaves[0]) for leaf in leaves):
        raise RecipeError(f"`{key}` differs between tensors (filters or a gradient): give one value for all of them")
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
        allowed = get_args(model.model_fields[key].annotation) if problem["type"] == "literal_error" else ()
        remedy = f"choose one of {listing(allowed)}" if allowed else problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"`{key}` of {show(where)} is {show(problem['input'])!r}: {show(remedy)}") from error


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return show(f"{place}: {problem['msg']}" if place else problem["msg"])


def _absolute(model: ModelReference) -> ModelReference:
    """Local paths made absolute: offline, mergekit's model card asks the Hub about a relative `a/b`."""
    changes = {}
    for part in ("model", "lora"):
        path = getattr(model, part)
        if path is not None and os.path.exists(path.path):
            changes[part] = path.model_copy(update={"path": os.path.realpath(path.path)})
    return model.model_copy(update=changes) if changes else model
