"""Solve saved statistics again, with other settings. No model, dataset or tokenizer is read.

Scope: the settings of a new solve, and the layout for fewer rows or fewer models. `assemble.py` solves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from mergekit_slta.calibration.assemble import assemble, warn_of_quality
from mergekit_slta.errors import AlphasError, RecipeError, listing, show
from mergekit_slta.files.alphas_file import SOLVED_FROM, Alphas
from mergekit_slta.files.identity import held_out_label, importance_label, role_label, rows_label, weights_label
from mergekit_slta.files.inside import statistics_in
from mergekit_slta.files.layout import Layout, LayoutTask, damaged_layout
from mergekit_slta.files.names import MERGED_RECIPE_NAME
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.recipe.objectives import OBJECTIVES

_DIRECTION = {"role": "direction"}


def solve(
    statistics: Statistics | str | os.PathLike[str],
    *,
    ridge: float | None = None,
    importance: Mapping[str, float] | None = None,
    balance: bool | None = None,
    rows: int | None = None,
    without: Sequence[str] = (),
) -> Alphas:
    """Compute new alphas from saved statistics, with other settings; reads no model and writes nothing.

    Args:
        statistics: a statistics file, the folder that holds it (that of a merge), or `Statistics`.
        ridge, importance, balance, rows, without: see `solve_again`; what is not given stays as it was.

    Raises:
        AlphasError: the statistics are missing or damaged.
        RecipeError: a value is out of range, a model is unknown, or a new calibration is needed.

    Examples:
        >>> alphas = mergekit_slta.solve("merged", ridge=0.1)
        >>> alphas.save("softer.json")
    """
    if not isinstance(statistics, Statistics):
        usable = isinstance(statistics, (str, os.PathLike))
        statistics = Statistics.load(statistics_in(Path(statistics)) if usable else statistics)
    return solve_again(statistics, ridge=ridge, importance=importance, balance=balance, rows=rows, without=without)


def solve_again(
    statistics: Statistics,
    *,
    ridge: float | None = None,
    importance: Mapping[str, float] | None = None,
    balance: bool | None = None,
    rows: int | None = None,
    without: Sequence[str] = (),
    source: str | None = None,
) -> Alphas:
    """Compute new alphas from saved statistics. Settings that are not given stay as they were in the calibration.

    Args:
        statistics: from `Statistics.load`.
        ridge: relative ridge, >= 0.
        importance: model -> w_t; a model is named as in the recipe, or by the last part of its path.
        balance: True for Eq. 33-34, False for Eq. 14.
        rows: use only the first `rows` rows of each task, as a calibration with `num_samples: rows` does.
        without: experts (with their tasks) and directions to leave out, as if they had not been calibrated; named as in
            `importance`.
        source: name of the statistics file, if the alphas are to be saved beside it.

    Raises:
        AlphasError: the statistics have no layout, or one that does not fit them.
        RecipeError: a value is out of range, a model is unknown, no model is left, there are fewer rows, or the
            statistics themselves depend on the setting.
    """
    layout = Layout.of(statistics)
    changed: list[str] = []
    if without:
        _refuse_dependent(layout, ["models"])
        dropped = {_model(given, layout.models, "--without") for given in without}
        statistics, layout = _leave_out(statistics, layout, dropped)
    weights = dict(layout.solve.importance)
    for given, weight in (importance or {}).items():
        if not (math.isfinite(weight) and weight > 0):
            raise RecipeError(
                f"`importance` of {show(given)} is {show(weight)}: give a positive number", code="invalid-value"
            )
        weights[_model(given, layout.experts, "`importance`")] = weight
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise RecipeError(f"`ridge` is {show(ridge)}: give a number of 0 or more", code="invalid-value")
    chosen = {
        "ridge": layout.solve.ridge if ridge is None else ridge,
        "importance": weights,
        "balance": layout.solve.balance if balance is None else balance,
    }
    changed += [key for key, value in chosen.items() if value != getattr(layout.solve, key)]
    if rows is not None and rows != layout.settings.get("num_samples"):
        fewer = first_rows_layout(layout, rows)
        _refuse_dependent(layout, [*changed, "num_samples"])
        layout, statistics = fewer, first_rows(statistics, rows)
    _refuse_dependent(layout, changed)
    layout = layout.model_copy(update={"solve": layout.solve.model_copy(update=chosen)})
    try:
        alphas = assemble(statistics, layout)
    except ValidationError as error:
        raise damaged_layout(error.errors()[0]["msg"]) from error
    except torch.linalg.LinAlgError as error:  # no features give such matrices
        raise AlphasError(
            f"the statistics cannot be solved ({show(error)}): calibrate again", code="unsolvable-statistics"
        ) from error
    warn_of_quality(alphas)
    if source is None:
        return alphas
    return alphas.model_copy(update={"provenance": {**alphas.provenance, SOLVED_FROM: source}})


def merged_scale(folder: Path) -> float:
    """The `lambda` of the recipe that mergekit left in a merged model's folder; 1 if there is none."""
    try:
        content = yaml.safe_load((folder / MERGED_RECIPE_NAME).read_text(encoding="utf-8"))
        return float(content["parameters"]["lambda"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return 1.0


def recipe_fragment(alphas: Alphas, path: Path, without: Sequence[str] = (), scale: float = 1.0) -> str:
    """The keys with which a recipe of the same models merges with solved alphas, as YAML.

    The models have no `dataset`, because their rows are not read again. All values that another solve may have changed
    are stated: the merge compares those with the alphas file.

    Args:
        alphas: the alphas, solved again.
        path: their file.
        without: the experts that were left out.
        scale: the recipe's `lambda`, which alphas do not hold.
    """
    used = alphas.calibration
    importance = used["importance"]
    given = {"alphas": str(path), "ridge": used["ridge"], "balance": used["balance"]}
    given |= {"num_samples": used["num_samples"]} if "num_samples" in used else {}
    given |= {"lambda": scale} if scale != 1.0 else {}
    given |= {"direction": alphas.closed_form.model} if alphas.closed_form else {}
    content = {
        "models": [
            {"model": name, "parameters": {"importance": importance[name]} if name in importance else _DIRECTION}
            for name in alphas.models
            if alphas.closed_form is None or name != alphas.closed_form.model
        ],
        "parameters": {key: value for key, value in given.items() if value is not None},
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**20)
    dropped = f"# `models` is without {listing(without)}.\n" if without else ""
    return (
        "# To merge with these weights, put these keys in place of the recipe's own, and leave its other keys; name no "
        f"`dataset`.\n{dropped}{text}"
    )


def _refuse_dependent(layout: Layout, changed: Sequence[str]) -> None:
    """Refuse a change of settings if the statistics depend on earlier solves with the old settings, or the objective
    fits no weights."""
    key, row = layout.solve_dependence, OBJECTIVES.get(layout.objective)
    unused = [f"`{name}`" for name in changed if name != "models"]
    if unused and row is not None and not row.settings.needs_rows:
        raise RecipeError(
            f"{listing(unused)} would have no effect, because `objective: {layout.objective}` fits no weights: drop "
            + listing(unused),
            code="conflicting-keys",
        )
    if changed and key is not None:
        raise RecipeError(
            f"with `{key}: {show(layout.settings.get(key))}` the statistics themselves depend on "
            f"{listing(f'`{name}`' for name in changed)}: change the recipe and calibrate again",
            code="needs-calibration",
        )


def _leave_out(statistics: Statistics, layout: Layout, dropped: set[str]) -> tuple[Statistics, Layout]:
    """Return statistics and layout as if some experts had never been calibrated.

    Drops the rows of these experts, and their rows and columns of every matrix. The rest does not depend on them.
    """
    kept = [place for place, name in enumerate(layout.canonical) if name not in dropped]
    directions = tuple(part for part in layout.directions if part.model not in dropped)
    if dropped.issuperset(layout.experts):
        raise RecipeError(
            f"--without leaves out all of {listing(layout.experts)}: keep one of them", code="missing-expert"
        )
    form = next((part.model for part in directions if part.closed_form), None)
    if form is not None and not dropped.isdisjoint(layout.experts):
        raise RecipeError(
            f"`direction: {form}` is computed from all experts: leave it out, too (--without {form}), or calibrate "
            "without the expert",
            code="needs-calibration",
        )
    own = statistics.select(torch.isin(statistics.row_task, torch.tensor(kept)))
    renumbered = torch.tensor([kept.index(place) if place in kept else -1 for place in range(statistics.num_models)])
    matrices = {name: matrix[..., kept] for name, matrix in own.by_submodule.items()}
    if statistics.form == "gram":
        matrices = {name: matrix[:, kept] for name, matrix in matrices.items()}
    lost = {
        label(name)
        for label in (rows_label, held_out_label, importance_label, weights_label, role_label)
        for name in dropped
    }
    fewer = layout.model_copy(
        update={
            "models": tuple(name for name in layout.models if name not in dropped),
            "canonical": tuple(name for name in layout.canonical if name not in dropped),
            "directions": directions,
            "tasks": tuple(task for task in layout.tasks if task.model not in dropped),
            "solve": layout.solve.model_copy(
                update={"importance": {k: v for k, v in layout.solve.importance.items() if k not in dropped}}
            ),
            "far_from_base": {name: far for name, far in layout.far_from_base.items() if name not in dropped},
            "identity": {label: value for label, value in layout.identity.items() if label not in lost}
            | ({} if form or not layout.closed_form else {"direction": "none"}),
        }
    )
    task = renumbered[own.row_task]
    return replace(own, row_task=task, num_models=len(kept), by_submodule=matrices), fewer


def _model(given: str, names: Sequence[str], option: str) -> str:
    """Find the one model with a name, given in full or as the last part of its path."""
    if given in names:
        return given
    short = [name for name in names if os.path.basename(name.rstrip("/")) == given]
    if len(short) == 1:
        return short[0]
    reason = "names several models" if short else "is none of the models"
    raise RecipeError(f"{option}: {show(given)} {reason}: name one of {listing(names)}", code="unknown-model")


def parse_importance(texts: Iterable[str]) -> dict[str, float]:
    """Parse `MODEL=W` arguments of the command line.

    Raises:
        RecipeError: an argument has another form, or a model is given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise RecipeError(
                f"--importance {show(text)} is not MODEL=W: name a model and a positive number", code="invalid-value"
            )
        if name in found:
            raise RecipeError(f"--importance names {show(name)} twice: give it one weight", code="duplicate-model")
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
    return statistics.select(rank < count)


def first_rows_layout(layout: Layout, count: int) -> Layout:
    """Return the layout that belongs to `first_rows`.

    A task that lost rows gets no token count and no hash: hashes cover texts, which statistics do not hold. Its entry
    in the identity says so and matches no recipe. Only recipes that name no dataset can use these alphas.

    Raises:
        RecipeError: `count` is not between 1 and the number of rows that were calibrated.
    """
    most = max([*(len(task.rows) for task in layout.tasks), int(layout.settings.get("num_samples") or 0)])
    if not 1 <= count <= most:
        raise RecipeError(
            f"--rows is {count}, the statistics hold up to {most} rows of each task: give 1 to {most}, "
            "or calibrate with another `num_samples`",
            code="invalid-value",
        )
    identity = dict(layout.identity)
    tasks: list[LayoutTask] = []
    for task in layout.tasks:
        if len(task.rows) > count:
            label = rows_label(task.model)
            identity[label] = f"first {count} of {identity.get(label)}"
            task = task.model_copy(update={"rows": task.rows[:count], "tokens": None, "sha256": None})
        tasks.append(task)
    settings = {**layout.settings, "num_samples": count}
    return layout.model_copy(update={"settings": settings, "tasks": tuple(tasks), "identity": identity})
