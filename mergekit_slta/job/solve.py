"""Statistics and their layout -> an alphas file.

Scope: the one place that solves; used after a calibration and to solve saved statistics again. Statistics are in
canonical order (experts sorted by name), the file in the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas, finite_or_none
from mergekit_slta.files.identity import hash_identity
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution, solve_closed_form
from mergekit_slta.maths.gauss_newton import gauss_newton_step
from mergekit_slta.maths.joint import solve_joint

if TYPE_CHECKING:  # saved statistics are solved again without transformers or mergekit
    from mergekit_slta.job.preflight import Job
    from mergekit_slta.models.submodules import Submodule

_SETTINGS = ("seed", "inputs", "objective", "compute_dtype", "max_seq_length", "num_samples")


EXPECTED_ALPHA = (-0.5, 1.5)
"""A weight outside is flagged `extreme`: linearity was measured between base and expert, and little beyond. Not so
where Gauss-Newton steps have looked at the merged model itself."""


def layout_of(job: Job) -> dict[str, Any]:
    """Everything of a job's alphas file that is no result: plain JSON, kept with the statistics.

    `objectives` of a submodule name the statistics that its alpha minimises together: a tied table is read at both
    ends of the model, so it answers for `embed` and for `head`.
    """
    tied = job.plan.is_tied
    return {
        "granularity": job.recipe.settings.granularity,
        "base_model": job.recipe.label(job.recipe.base),
        "models": [job.recipe.label(task.model) for task in job.recipe.tasks],
        "canonical": [job.recipe.label(model) for model in job.plan.models[1:]],
        "submodules": [
            {
                "name": submodule.name,
                "kind": submodule.kind,
                "layer": submodule.layer,
                "tensors": list(submodule.tensors),
                "slices": _slices(submodule),
                "objectives": ["embed", "head"] if tied and submodule.kind == "embed" else [submodule.name],
            }
            for submodule in job.submodules
        ],
        "copied": list(job.plan.copied),
        "calibration": _calibration(job),
        "identity": job.identity,
        "versions": {
            "mergekit_slta": version("mergekit-slta"),
            **{package: version(package) for package in ("mergekit", "transformers", "torch")},
        },
    }


def _slices(submodule: Submodule) -> dict[str, Any]:
    """tensor -> [axis, start, stop], or a list of these where a fused tensor holds several parts."""
    slices: dict[str, Any] = {}
    for tensor in dict.fromkeys(part.tensor for part in submodule.slices):
        parts = [list(part[1:]) for part in submodule.slices if part.tensor == tensor]
        slices[tensor] = parts[0] if len(parts) == 1 else parts
    return slices


def _calibration(job: Job) -> dict[str, Any]:
    tasks = []
    for task, drawn in zip(job.recipe.tasks, job.rows, strict=True):
        if drawn is not None:
            tasks.append(
                {
                    "model": job.recipe.label(task.model),
                    "dataset": drawn.dataset,
                    "dataset_config": task.dataset_config,
                    "split": task.split,
                    "text": task.text,
                    **({"completion": task.completion} if task.completion is not None else {}),
                    "rows": [row.number for row in drawn.rows],
                    "tokens": drawn.num_tokens,
                    "sha256": drawn.sha256,
                }
            )
    settings = job.recipe.settings
    keys = (*_SETTINGS, *settings.objective_keys)
    return {**{key: getattr(settings, key) for key in keys}, "tasks": tasks}


def assemble(
    statistics: Statistics, layout: dict[str, Any], *, importance: Sequence[float], balance: bool, ridge: float | None
) -> Alphas:
    """Solve every submodule and lay the file out.

    Args:
        statistics: in the layout's canonical order; slopes are solved for all submodules together.
        layout: from `layout_of`.
        importance: w_t of the layout's `models`, in their order.
        balance, ridge: see `solve.solve` and `joint.solve_joint`.

    Raises:
        AlphasError: the statistics lack a submodule of the layout.
    """
    names: list[str] = layout["models"]
    chosen: dict[str, float] = {}
    if statistics.form != "gram":
        entries, used = solve_together(statistics, layout, importance=importance, balance=balance, ridge=ridge)
        chosen = {"ridge_used": used}
    else:
        entries = [
            solve_submodule(submodule, statistics, layout, importance=importance, balance=balance, ridge=ridge or 0.0)
            for submodule in layout["submodules"]
        ]
    solved = {"balance": str(balance), "ridge": str(ridge)}
    solved |= {f"importance of {name}": str(weight) for name, weight in zip(names, importance, strict=True)}
    record = dict(sorted({**layout["identity"], **solved}.items()))
    return Alphas(
        granularity=layout["granularity"],
        base_model=layout["base_model"],
        models=tuple(names),
        submodules=tuple(entries),
        copied=tuple(layout.get("copied", ())),
        calibration={
            **layout["calibration"],
            "balance": balance,
            "ridge": ridge,
            **chosen,
            "importance": dict(zip(names, importance, strict=True)),
        },
        provenance={**layout["versions"], "fingerprint": hash_identity(record), "identity": record},
    )


def solve_submodule(
    submodule: dict[str, Any],
    statistics: Statistics,
    layout: dict[str, Any],
    *,
    importance: Sequence[float],
    balance: bool,
    ridge: float,
    objectives: Sequence[str] | None = None,
) -> SubmoduleAlphas:
    """Solve one submodule of a layout; for its own `objectives`, or for others where these are not at hand yet."""
    names: list[str] = layout["models"]
    order, weights = _canonical(layout, importance)
    grams = _parts(statistics, objectives or submodule["objectives"])
    solution = solve_closed_form(grams, statistics.row_task, importance=weights, balance=balance, ridge=ridge)
    return _entry(submodule, solution, order, names)


def _canonical(layout: dict[str, Any], importance: Sequence[float]) -> tuple[list[int], list[float]]:
    """(the recipe's place -> the canonical place, importance in canonical order)."""
    order = [layout["canonical"].index(name) for name in layout["models"]]
    weights = [0.0] * len(order)
    for place, weight in zip(order, importance, strict=True):
        weights[place] = weight
    return order, weights


def _parts(statistics: Statistics, names: Sequence[str]) -> list[Tensor]:
    missing = [name for name in names if name not in statistics.by_submodule]
    if missing:
        raise AlphasError(f"the statistics lack {show(missing[0])}: calibrate again")
    return [statistics.by_submodule[name] for name in names]


def solve_together(
    statistics: Statistics, layout: dict[str, Any], *, importance: Sequence[float], balance: bool, ridge: float | None
) -> tuple[list[SubmoduleAlphas], float]:
    """Every submodule's entry from slopes, and the ridge that was used. Rank, condition and residual are those of the
    one system.

    A shared table's slopes at both ends are gathered under its own name already: a derivative adds up by itself.
    """
    order, weights = _canonical(layout, importance)
    slopes = {submodule["name"]: _parts(statistics, [submodule["name"]])[0] for submodule in layout["submodules"]}
    how: dict[str, Any] = {"importance": weights, "balance": balance, "ridge": ridge}
    if statistics.divergences is None:
        found = solve_joint(slopes, statistics.row_task, **how)
    else:
        how |= {"divergences": statistics.divergences, "row_step": statistics.row_step}
        found = gauss_newton_step(slopes, statistics.row_task, statistics.point, **how)
    entries = []
    for submodule in layout["submodules"]:
        name = submodule["name"]
        flags = ["unchanged"] * bool(found.unchanged[name].any())
        solution = Solution(
            alpha=tuple(found.alpha[name].tolist()),
            stderr=None if found.stderr is None else tuple(found.stderr[name].tolist()),
            condition=found.condition,
            rank=found.rank,
            residual=found.residual,
            unchanged=tuple(found.unchanged[name].tolist()),
            flags=tuple(flags),
        )
        entries.append(_entry(submodule, solution, order, layout["models"], seen=statistics.form == "step"))
    return entries, found.ridge


def _entry(
    submodule: dict[str, Any], solution: Solution, order: Sequence[int], names: Sequence[str], *, seen: bool = False
) -> SubmoduleAlphas:
    """What is kept of a submodule; `seen` where the weights come from looking at the merged model."""
    alpha = tuple(solution.alpha[place] for place in order)
    extreme = not seen and any(not EXPECTED_ALPHA[0] <= value <= EXPECTED_ALPHA[1] for value in alpha)
    return SubmoduleAlphas(
        name=submodule["name"],
        kind=submodule["kind"],
        layer=submodule["layer"],
        tensors=tuple(submodule["tensors"]),
        slices=submodule["slices"],
        alpha=alpha,
        stderr=None if solution.stderr is None else tuple(solution.stderr[place] for place in order),
        condition=finite_or_none(solution.condition),
        rank=solution.rank,
        residual=solution.residual,
        flags=(*solution.flags, *["extreme"] * extreme),
        unchanged=tuple(name for place, name in zip(order, names, strict=True) if solution.unchanged[place]),
    )
