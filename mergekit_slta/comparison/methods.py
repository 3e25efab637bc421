"""The merges that are compared: their names, and the recipe of each, made from the user's recipe.

Scope: recipes, no weights. The other methods are mergekit's own. They get the recipe's models, tokenizer and output
dtype, and compute in float32.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_slta.errors import RecipeError, listing, show
from mergekit_slta.files.inside import output_path
from mergekit_slta.files.names import ALPHAS_NAME
from mergekit_slta.job.job import Job
from mergekit_slta.libraries.mergekit import InputModelDefinition
from mergekit_slta.recipe.objectives import DATA_FREE, FEATURES, JOINT, OBJECTIVES
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.settings import METHOD, TASK_KEYS

SCALES = (0.3, 0.5, 0.7, 1.0)
"""Scales of task arithmetic. Each is a merge of its own: no scale is chosen by the compared rows."""
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""Share of each task vector's elements that is kept. That of TIES is its paper's."""
_MERGEKITS = {"ties": ("ties", "TIES"), "dare": ("dare_ties", "DARE-TIES")}
"""Name -> mergekit's name of the method, and the label."""
RECIPE, AVERAGE, TASK_ARITHMETIC = "recipe", "average", "task_arithmetic"
OURS = (FEATURES, JOINT, DATA_FREE)
NAMES = (AVERAGE, TASK_ARITHMETIC, "ties", "dare", DATA_FREE, FEATURES, JOINT, RECIPE)
"""Values of `--methods`, in the order in which they are merged."""
_ALWAYS = ("base", "experts")
"""Always scored; accepted in `--methods`."""
_SHARED, _ROW_KEYS = ("compute_dtype", "uncalibrated"), ("num_samples", "max_seq_length", "seed", "balance")
"""Shared keys of the recipe that a merge by another objective keeps; the latter if it reads rows."""


@dataclass(frozen=True)
class Method:
    """One merge.

    Attributes:
        name: in files, and of its recipe's file.
        label: in tables.
        config: its recipe. Weights of `submodule_linear` are calibrated first.
        is_asked: whether the user asked for it by name. Else it may be left out where it does not apply.
    """

    name: str
    label: str
    config: MergeConfiguration
    is_asked: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is a merge of this package."""
        return self.config.merge_method == METHOD

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from other merges of the same models."""
        shared = {key: value for key, value in (self.config.parameters or {}).items() if key != "alphas"}
        first = next((entry.parameters for entry in self.config.models or [] if entry.parameters), {})
        own = {} if self.is_ours else {key: first[key] for key in ("weight", "density") if key in first}
        return {"merge_method": self.config.merge_method, **shared, **own}


def parse_methods(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of methods from `--methods`; None if none are given.

    A scale may follow the name of task arithmetic: `task_arithmetic:0.4`.

    Raises:
        RecipeError: a name is unknown, or a scale is no number.
    """
    if given is None:
        return None
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    found = []
    for name in dict.fromkeys(filter(None, names)):
        kind, _, scale = name.partition(":")
        if kind not in (*NAMES, *_ALWAYS) or (scale and kind != TASK_ARITHMETIC):
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}? Or " if near else ""
            raise RecipeError(
                f"--methods names {show(name)!r}: {hint}choose one of {listing(NAMES)}", code="invalid-value"
            )
        if scale:
            try:
                name = f"{kind}:{float(scale):g}"
            except ValueError as error:
                raise RecipeError(
                    f"--methods names {show(name)!r}: the scale must be a number, such as {kind}:0.4",
                    code="invalid-value",
                ) from error
        found.append(name)
    if not found:
        raise RecipeError(f"--methods names no method: choose one of {listing(NAMES)}", code="invalid-value")
    return tuple(name for name in found if name not in _ALWAYS)


def make_methods(
    given: MergeConfiguration, job: Job, names: Sequence[str] | None, out_dtype: str | None
) -> tuple[list[Method], dict[str, str]]:
    """The merges to compare, in order, and those that are left out, with the reason.

    Args:
        given: the user's recipe.
        job: its models, prepared.
        names: from `parse_methods`; None for all.
        out_dtype: dtype of the models that mergekit's own methods write; None for that of the checkpoints.

    Raises:
        RecipeError: a method that was asked for does not apply to this recipe.
    """
    made, left_out = [], {}
    for name in NAMES if names is None else names:
        try:
            made += _make(given, job, name, out_dtype, is_asked=names is not None)
        except RecipeError as error:
            if names is not None:
                raise
            left_out[name] = error.message
    own = next((method for method in made if method.name == RECIPE), None)
    same = [method for method in made if own and method.name in OURS and _content(method) == _content(own)]
    for method in same:
        left_out[method.name] = "the recipe itself has these settings"
    return [method for method in made if method not in same], left_out


def _content(method: Method) -> tuple[object, object]:
    """What the weights of one of our merges depend on."""
    scale = (method.config.parameters or {}).get("lambda", 1.0)
    return read_recipe(method.config).settings.model_dump(exclude={"stated"}), scale


def _make(given: MergeConfiguration, job: Job, name: str, out_dtype: str | None, *, is_asked: bool) -> list[Method]:
    kind, _, scale = name.partition(":")
    if kind in ("ties", "dare") and len(job.experts) < 2:
        raise RecipeError(
            f"--methods names {kind}, which combines experts, and the recipe has one: choose one of "
            f"{listing(each for each in NAMES if each not in (*DENSITIES, DATA_FREE))}",
            code="invalid-value",
        )
    if kind == AVERAGE:
        return [Method(name, "average", _stock(job, "linear", out_dtype, {"normalize": True}, weight=1.0), is_asked)]
    if kind == TASK_ARITHMETIC:
        return [
            Method(
                f"{kind}:{each:g}", f"task arithmetic {each:g}",
                _stock(job, kind, out_dtype, {"normalize": False}, weight=each), is_asked,
            )
            for each in ([float(scale)] if scale else SCALES)
        ]  # fmt: skip
    if kind in DENSITIES:
        stock, label = _MERGEKITS[kind]
        config = _stock(job, stock, out_dtype, {"normalize": True}, weight=1.0, density=DENSITIES[kind])
        return [Method(name, f"{label} (density {DENSITIES[kind]:g})", config, is_asked)]
    config = _recipe_itself(given) if kind == RECIPE else _by_objective(given, kind)
    read = read_recipe(config)
    if kind == DATA_FREE and read.directions:
        raise RecipeError(
            f"{show(read.names[read.directions[0]])} has `role: direction`, and `objective: {DATA_FREE}` reads no "
            "rows: leave the model out, or change `objective`",
            code="conflicting-keys",
        )
    return [Method(name, f"recipe ({read.settings.objective})" if kind == RECIPE else kind, config, is_asked)]


def _stock(job: Job, method: str, out_dtype: str | None, shared: Mapping[str, Any], **own: float) -> MergeConfiguration:
    """A recipe of one of mergekit's methods. Models without a task get weight 0: they count for the vocabulary only."""
    recipe = job.recipe
    entries: list[tuple[ModelReference, dict[str, Any]]] = [(task.model, dict(own)) for task in recipe.tasks]
    entries += [(model, {**own, "weight": 0.0}) for model in recipe.directions]
    if method == "linear":  # which takes the base as one of the models
        entries.insert(0, (recipe.base, {"weight": 0.0}))
    made = MergeConfiguration(
        merge_method=method,
        base_model=recipe.base,
        models=[InputModelDefinition(model=model, parameters=parameters) for model, parameters in entries],
        parameters=dict(shared),
        dtype="float32",
        out_dtype=out_dtype,
    )
    kept = {key: getattr(recipe.config, key) for key in ("tokenizer", "tokenizer_source")}
    return made.model_copy(update={**kept, "chat_template": job.chat_template})


def _recipe_itself(given: MergeConfiguration) -> MergeConfiguration:
    """The recipe as it stands, but a calibration leaves the held-out rows out, and writes no file that it names."""
    config, settings = given.model_copy(deep=True), read_recipe(given).settings
    stated = config.parameters or {}
    if settings.alphas is not None:
        if output_path(settings.alphas, ALPHAS_NAME).exists():
            return config
        del stated["alphas"]
    config.parameters = {**stated, **({"evaluate": True} if settings.own.needs_rows else {})}
    return config


def _by_objective(given: MergeConfiguration, objective: str) -> MergeConfiguration:
    """The recipe with another objective: its models, rows and precision, and that objective's defaults."""
    config = given.model_copy(deep=True)
    stated, needs_rows = config.parameters or {}, OBJECTIVES[objective].settings.needs_rows
    kept = (*_SHARED, *((*_ROW_KEYS, *TASK_KEYS) if needs_rows else ()))
    config.parameters = {
        "objective": objective,
        **{key: stated[key] for key in kept if key in stated},
        **({"evaluate": True} if needs_rows else {}),
    }
    return config
