"""Write the HTML page of a merge or of a linearity analysis: one file that needs nothing else.

Scope: what the page says. `charts` lays the charts out, and `templates/page.html.jinja` is the page. The names in the
files may come from strangers: the template escapes them, and the page's policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mergekit_slta import __version__
from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import Alphas, describe_far, describe_no_better
from mergekit_slta.files.evaluation import describe_flags, evaluation_note
from mergekit_slta.files.linearity_file import Linearity, MeanStd
from mergekit_slta.files.merge_record import Took
from mergekit_slta.recipe.objectives import OBJECTIVES
from mergekit_slta.reporting.charts import HEIGHT, WIDTH, Chart, Curve, Scale, charts, path_chart
from mergekit_slta.reporting.facts import calibration_tasks, flagged, settings_of, shared_residual
from mergekit_slta.reporting.figures.evaluation import path_of
from mergekit_slta.reporting.meanings import KINDS
from mergekit_slta.reporting.names import PublicNames
from mergekit_slta.reporting.templating import environment, source_of
from mergekit_slta.runtime.clock import describe_phases

GENERATOR = '<meta name="generator" content="mergekit-slta">'
"""In the head of every page: only files that have it are overwritten."""
NUM_COLORS = 8


def is_page(path: Path) -> bool:
    """Whether a file is a page of this package."""
    try:
        with open(path, "rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


@dataclass(frozen=True)
class RowAsSeen:
    """A calibration row as the model sees it, in two parts; `number` is its place in the dataset."""

    model: str
    number: int
    prompt: str
    answer: str


def write_page(
    title: str,
    alphas: Alphas | None,
    linearity: Linearity | None,
    names: PublicNames | None = None,
    *,
    scale: float | None = 1.0,
    took: Took | None = None,
    rows: Sequence[RowAsSeen] = (),
) -> str:
    """Write the page.

    Args:
        title: of the page: the name of the merged model, or of the file.
        alphas, linearity: the content of the files; one of them may be missing.
        names: public names of the alphas file's models.
        scale: the recipe's `lambda`; None if it differs between tensors.
        took: what the merge took, if it is known.
        rows: rows to show.
    """
    script = source_of("page.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment(autoescape=True)
        .get_template("page.html.jinja")
        .render(
            generator=Markup(GENERATOR),
            title=show(title, 100),
            version=__version__,
            style=Markup(source_of("page.css")),  # both are this package's own files
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            width=WIDTH,
            height=HEIGHT,
            colors=NUM_COLORS,
            merge=alphas and _merge(alphas, names or PublicNames.of_alphas(alphas), scale, took, rows),
            linearity=linearity and _linearity(linearity),
        )
    )


def _merge(
    alphas: Alphas, names: PublicNames, scale: float | None, took: Took | None, rows: Sequence[RowAsSeen]
) -> dict[str, Any]:
    """What the page says of a merge."""
    models = [names.model(model) for model in alphas.models]
    used, evaluation = alphas.calibration, alphas.evaluation
    measured = any(entry.residual_measured is not None for entry in alphas.submodules)
    row = OBJECTIVES.get(str(used.get("objective")))
    forms = {direction.model: direction.closed_form for direction in alphas.directions}
    curves = [name + " (direction)" * (model in forms) for model, name in zip(alphas.models, models, strict=True)]
    return {
        "base": names.model(alphas.base_model),
        "models": models,
        "curves": curves,
        "directions": [(names.model(model), form) for model, form in forms.items()],
        "experts": [names.model(model) for model in alphas.experts],
        "is_fitted": alphas.is_fitted,
        "objective": show(used.get("objective", "-"), 40),
        "granularity": show(alphas.granularity, 40),
        "scale": scale,
        "warnings": [
            *describe_flags(evaluation, names.model, fitted=alphas.is_fitted),
            *describe_no_better(used, names.model),
            *describe_far(used, names.model),
        ],
        "evaluation": evaluation
        and {
            "note": evaluation_note(evaluation),
            "tasks": [(names.model(task.model), task) for task in evaluation.tasks],
            "path": (path := _path(alphas, names)),
            "path_chart": path and _path_chart(path, [names.model(task.model) for task in evaluation.tasks]),
            "starts": [
                (_point_name(alphas, names, point.name), point.weighted)
                for point in evaluation.points
                if point.ridge is None
            ],
            "trials": evaluation.trials,
        },
        "weights": _weight_charts(alphas, curves),
        "residuals": _residual_charts(alphas, measured=measured),
        "residual_text": row.residual if row else "",
        "residual": shared_residual(alphas),
        "measured": measured,
        "is_solved_apart": any(entry.rank is not None for entry in alphas.submodules),
        "tasks": calibration_tasks(alphas, names),
        "settings": settings_of(alphas),
        "took": took and (show(describe_phases(took.seconds), 300), show(took.device, 40), took.threads),
        "provenance": [(key, show(value, 100)) for key, value in alphas.provenance.items()
                       if not isinstance(value, (dict, list))],
        "flags": flagged(alphas),
        "submodules": alphas.submodules,
        "kinds": KINDS,
        "copied": len(alphas.copied),
        "rows": rows,
    }  # fmt: skip


def _point_name(alphas: Alphas, names: PublicNames, name: str) -> str:
    """The name of a measured model; a direction alone is named as the model is."""
    return names.model(name) if name in alphas.models else name


def _path(alphas: Alphas, names: PublicNames) -> list[dict[str, Any]]:
    """The share of the base's divergence after each step, per task; empty if no step was taken."""
    evaluation = alphas.evaluation
    if evaluation is None:
        return []
    found = []
    base = evaluation.points[0].divergence
    for _, number in path_of(evaluation):
        point = evaluation.points[number]
        shares = [
            each.mean / own.mean if own.mean > 0 else None for each, own in zip(point.divergence, base, strict=True)
        ]
        found.append({"name": _point_name(alphas, names, point.name), "ridge": point.ridge, "weighted": point.weighted,
                      "shares": shares, "is_merge": number == evaluation.merge})  # fmt: skip
    return found if len(found) > 1 else []


def _path_chart(path: Sequence[dict[str, Any]], models: Sequence[str]) -> Chart:
    def share_of(place: int) -> Callable[[Any], float | None]:
        return lambda point: None if (share := point["shares"][place]) is None else 100 * share

    curves = [Curve(model, share_of(place)) for place, model in enumerate(models)]
    values = [value for point in path for curve in curves if (value := curve.value(point)) is not None]
    scale = replace(Scale.of(values, floor=0.0), text="{:.3g}%".format)
    return path_chart(path, [point["name"] for point in path], curves, scale)


def _weight_charts(alphas: Alphas, models: Sequence[str]) -> list[Chart]:
    def curve(place: int, model: str) -> Curve:
        return Curve(
            model,
            lambda entry: entry.alpha[place],
            lambda entry: entry.stderr[place] if entry.stderr else None,
            lambda entry: " (unchanged)" if alphas.models[place] in entry.unchanged else "",
        )

    count = len(alphas.experts)  # a direction has no task, and no part in the plain average
    values = [value for entry in alphas.submodules for value in entry.alpha]
    scale = Scale.of(values, floor=min([0.0, *values]), reference=1 / count if count > 1 else None)
    return charts(alphas.submodules, [curve(place, model) for place, model in enumerate(models)], scale)


def _residual_charts(alphas: Alphas, *, measured: bool) -> list[Chart]:
    """Charts of the residuals; none if the submodules were solved together and have one."""
    solved = [entry for entry in alphas.submodules if entry.residual is not None]
    if not solved or all(entry.rank is None for entry in alphas.submodules):
        return []
    curves = [Curve("predicted", lambda entry: entry.residual)]
    if measured:
        curves.append(Curve("measured", lambda entry: entry.residual_measured))
    values = [value for entry in solved for curve in curves if (value := curve.value(entry)) is not None]
    return charts(solved, curves, Scale.of(values, floor=min([0.0, *values])))


def _linearity(linearity: Linearity) -> dict[str, Any]:
    """What the page says of a linearity analysis."""
    names = PublicNames.of(linearity.base_model, linearity.models)
    models = [names.model(model) for model in linearity.models]
    curves = [Curve(model, _logarithm_of(place)) for place, model in enumerate(models)]
    values = [value for entry in linearity.submodules for curve in curves if (value := curve.value(entry)) is not None]

    def cell(measure: MeanStd | None) -> str:
        return "-" if measure is None else f"{measure.mean:.3g} ± {measure.std:.2g}"

    levels = [
        (
            KINDS.get(kind, kind),
            level.count,
            list(map(cell, (level.non_linearity, level.projection_distance.pairs, level.projection_distance.triples,
                        level.cosine.pairs, level.cosine.triples, level.cosine_base, level.disentanglement))),
        )
        for kind, level in linearity.levels.items()
    ]  # fmt: skip
    return {
        "base": names.model(linearity.base_model),
        "models": models,
        "levels": levels,
        "charts": charts(linearity.submodules, curves, Scale.of_logarithms(values)),
        "submodules": linearity.submodules,
        "kinds": KINDS,
        "settings": _plain(linearity.settings),
        "provenance": _plain(linearity.provenance),
    }


def _logarithm_of(place: int) -> Callable[[Any], float | None]:
    def value(entry: Any) -> float | None:
        score = entry.non_linearity[place] if place < len(entry.non_linearity) else None
        return math.log10(score) if score is not None and score > 0 else None

    return value


def _plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, show(value, 100)) for key, value in values.items() if not isinstance(value, (dict, list))]
