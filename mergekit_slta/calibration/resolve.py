"""Saved statistics -> new alphas; no model, no data set and no tokenizer is touched.

Scope: which settings a new solve takes over from the calibration, and what a file made from fewer rows says of itself.
Solving and laying out is `assembly.py`.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_slta.errors import AlphasError, RecipeError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.solve import assemble


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Submodule(_Part):
    name: str
    kind: str
    layer: int | None
    tensors: list[str]
    slices: dict[str, Any]
    objectives: list[str] = Field(min_length=1)


class _Task(_Part):
    model: str
    rows: list[int]


class _Calibration(_Part):
    tasks: list[_Task]
    num_samples: int | None = None
    inputs: str = "base"
    steps: int = 0


class _Layout(_Part):
    """What `assembly.layout_of` writes, as far as a solve needs it."""

    granularity: str
    base_model: str
    models: list[str]
    canonical: list[str]
    submodules: list[_Submodule] = Field(min_length=1)
    copied: list[str] = []
    calibration: _Calibration
    identity: dict[str, str]
    versions: dict[str, Any]


def solve_again(
    statistics: Statistics,
    *,
    ridge: float | None = None,
    importance: Mapping[str, float] | None = None,
    balance: bool | None = None,
    rows: int | None = None,
    without: Sequence[str] = (),
) -> Alphas:
    """New alphas from saved statistics. What is not given stays as it was calibrated.

    Args:
        statistics: as `Statistics.load` reads them.
        ridge: relative ridge, >= 0.
        importance: w_t by model; a model is named as in the recipe, or by the last part of its path.
        balance: Eq. 33-34 or Eq. 14.
        rows: only the first so many rows of each task: what a calibration with `num_samples: rows` gives.
        without: experts to leave out with their tasks, named as in `importance`: what calibrating the others gives.

    Raises:
        AlphasError: the statistics carry no layout, or one that does not fit them.
        RecipeError: a value out of range, a model that is not there, no model left, more rows than were calibrated, or
            a change that the statistics themselves depend on.
    """
    layout = read_layout(statistics)
    if without:
        _refuse_merged_inputs(layout, ["models"])
        dropped = {_model(given, layout["models"], "--without") for given in without}
        statistics, layout = _other_models(statistics, layout, dropped)
    recorded = _recorded(layout)
    names = layout["models"]
    weights = dict(zip(names, recorded["importance"], strict=True))
    for given, weight in (importance or {}).items():
        if not (math.isfinite(weight) and weight > 0):
            raise RecipeError(f"`importance` of {show(given)} is {show(weight)}: give a positive number")
        weights[_model(given, names, "`importance`")] = weight
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise RecipeError(f"`ridge` is {show(ridge)}: give a number of 0 or more")
    chosen = {
        "ridge": recorded["ridge"] if ridge is None else ridge,
        "importance": tuple(weights[name] for name in names),
        "balance": recorded["balance"] if balance is None else balance,
    }
    changed = [key for key, value in chosen.items() if value != recorded[key]]
    calibration = layout["calibration"]
    if rows is not None and rows != calibration.get("num_samples"):
        fewer = first_rows_layout(layout, rows)
        other = _row_counts(fewer) != _row_counts(layout) or calibration.get("fresh_rows")
        changed += ["num_samples"] * bool(other)
        layout, statistics = fewer, first_rows(statistics, rows)
    _refuse_merged_inputs(layout, changed)
    try:
        return assemble(statistics, layout, **chosen)
    except ValidationError as error:
        raise _unfit(error.errors()[0]["msg"]) from error
    except torch.linalg.LinAlgError as error:  # matrices that no features have
        raise AlphasError(f"the statistics cannot be solved ({show(error)}): calibrate again") from error


def read_layout(statistics: Statistics) -> dict[str, Any]:
    """The layout that statistics carry, checked against them (see `assembly.layout_of`).

    Raises:
        AlphasError: there is none, or it does not fit the Gram matrices.
    """
    try:
        layout = _Layout.model_validate_json(statistics.metadata.get("layout", ""))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise _unfit(f"{place}: {problem['msg']}" if place else problem["msg"]) from error
    tasks = [task.model for task in layout.calibration.tasks]
    if len(set(layout.models)) != len(layout.models) or not (
        sorted(layout.models) == sorted(layout.canonical) == sorted(tasks)
    ):
        raise _unfit("its models are not those of its tasks")
    if len(layout.models) != statistics.num_models:
        raise _unfit(f"it names {len(layout.models)} models, the matrices are for {statistics.num_models}")
    counts = torch.bincount(statistics.row_task, minlength=statistics.num_models).tolist()
    for task in layout.calibration.tasks:
        if len(task.rows) != counts[layout.canonical.index(task.model)]:
            raise _unfit(f"it lists {len(task.rows)} rows of {task.model}")
    return json.loads(statistics.metadata["layout"])


def _unfit(reason: str) -> AlphasError:
    return AlphasError(f"the statistics' layout is damaged ({show(reason)}): calibrate again")


def _recorded(layout: Mapping[str, Any]) -> dict[str, Any]:
    """`ridge`, `balance` and `importance` (in the order of the layout's models) of the calibration."""
    identity = layout["identity"]
    ridge = identity.get("ridge", "0.0")
    try:
        return {
            "ridge": None if ridge == "None" else float(ridge),
            "balance": identity.get("balance", "True") == "True",
            "importance": tuple(float(identity.get(f"importance of {name}", 1.0)) for name in layout["models"]),
        }
    except ValueError as error:
        raise _unfit(str(error)) from error


def _refuse_merged_inputs(layout: Mapping[str, Any], changed: Sequence[str]) -> None:
    calibration = layout["calibration"]
    for key, usual, what in (("inputs", "base", "features"), ("steps", 0, "gradients")):
        if changed and calibration.get(key, usual) != usual:
            raise RecipeError(
                f"with `{key}: {show(calibration[key])}` the {what} themselves depend on "
                f"{listing(f'`{key}`' for key in changed)}: change the recipe and calibrate again"
            )


def _other_models(
    statistics: Statistics, layout: Mapping[str, Any], dropped: set[str]
) -> tuple[Statistics, dict[str, Any]]:
    """Statistics and layout as if some experts had never been calibrated.

    With the base's inputs nothing that an expert brings depends on the others: its rows, and the rows and columns of
    every Gram matrix, are left out.
    """
    kept = [place for place, name in enumerate(layout["canonical"]) if name not in dropped]
    if not kept:
        raise RecipeError(f"--without leaves out all of {listing(layout['models'])}: keep one of them")
    own = torch.isin(statistics.row_task, torch.tensor(kept))
    renumbered = torch.tensor([kept.index(place) if place in kept else -1 for place in range(statistics.num_models)])
    grams = {name: gram[own][..., kept] for name, gram in statistics.by_submodule.items()}
    if statistics.form == "gram":
        grams = {name: gram[:, kept] for name, gram in grams.items()}
    fewer: dict[str, Any] = copy.deepcopy(dict(layout))
    for key in ("models", "canonical"):
        fewer[key] = [name for name in layout[key] if name not in dropped]
    tasks = fewer["calibration"]["tasks"]
    fewer["calibration"]["tasks"] = [task for task in tasks if task["model"] not in dropped]
    for label in [f"{what} of {name}" for what in ("rows", "importance", "weights") for name in dropped]:
        fewer["identity"].pop(label, None)
    return Statistics(renumbered[statistics.row_task[own]], len(kept), grams, form=statistics.form), fewer


def _model(given: str, names: Sequence[str], option: str) -> str:
    if given in names:
        return given
    short = [name for name in names if os.path.basename(name.rstrip("/")) == given]
    if len(short) == 1:
        return short[0]
    reason = "names several models" if short else "is none of the models"
    raise RecipeError(f"{option}: {show(given)} {reason}: name one of {listing(names)}")


def parse_importance(texts: Iterable[str]) -> dict[str, float]:
    """`MODEL=W` of the command line, read.

    Raises:
        RecipeError: a text of another form, or a model given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise RecipeError(f"--importance {show(text)} is not MODEL=W: name a model and a positive number")
        if name in found:
            raise RecipeError(f"--importance names {show(name)} twice: give it one weight")
        found[name] = value
    return found


def first_rows(statistics: Statistics, count: int) -> Statistics:
    """The first `count` rows of each task, in the order they were drawn; all rows of a task that has fewer.

    The metadata is dropped: it describes all rows (see `first_rows_layout`).
    """
    rank = torch.zeros_like(statistics.row_task)
    for task in range(statistics.num_models):
        own = statistics.row_task == task
        rank[own] = torch.arange(int(own.sum()))
    kept = (rank < count).nonzero().flatten()
    grams = {name: gram[kept] for name, gram in statistics.by_submodule.items()}
    rest = {"divergences": statistics.divergences, "row_step": statistics.row_step}
    own = {name: None if tensor is None else tensor[kept] for name, tensor in rest.items()}
    return replace(statistics, row_task=statistics.row_task[kept], by_submodule=grams, metadata={}, **own)


def first_rows_layout(layout: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The layout of `first_rows`: a task that lost rows has no token count and no hash, and another identity.

    Rows' hashes cover texts, which statistics don't hold. The identity says what the rows are a part of, and equals
    that of no recipe: such alphas are only used by recipes that name no data set.

    Raises:
        RecipeError: `count` is not between 1 and the `num_samples` of the calibration.
    """
    calibration = layout["calibration"]
    most = max([*_row_counts(layout), int(calibration.get("num_samples") or 0)])
    if not 1 <= count <= most:
        raise RecipeError(
            f"--rows is {count}, the statistics hold up to {most} rows of each task: give 1 to {most}, "
            "or calibrate with another `num_samples`"
        )
    fewer: dict[str, Any] = copy.deepcopy(dict(layout))
    fewer["calibration"]["num_samples"] = count
    fewer["identity"]["num_samples"] = str(count)
    for task in fewer["calibration"]["tasks"]:
        if len(task["rows"]) > count:
            label = f"rows of {task['model']}"
            fewer["identity"][label] = f"first {count} of {fewer['identity'].get(label)}"
            task.update(rows=task["rows"][:count], tokens=None, sha256=None)
    return fewer


def _row_counts(layout: Mapping[str, Any]) -> list[int]:
    return [len(task["rows"]) for task in layout["calibration"]["tasks"]]
