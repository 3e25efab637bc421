"""Statistics and their layout -> an alphas file.

Scope: the one place that solves; used after a calibration and to solve saved statistics again. Statistics are in
canonical order (experts sorted by name), the file in the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mergekit_slta.alphas import Alphas, SubmoduleAlphas, finite_or_none
from mergekit_slta.errors import AlphasError, show
from mergekit_slta.gram import Statistics
from mergekit_slta.identity import fingerprint
from mergekit_slta.solve import Solution, solve

if TYPE_CHECKING:  # saved statistics are solved again without transformers or mergekit
    from mergekit_slta.preflight import Job
    from mergekit_slta.submodules import Submodule

_SETTINGS = ("seed", "inputs", "objective", "compute_dtype", "max_seq_length", "num_samples")


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
                    "rows": [row.number for row in drawn.rows],
                    "tokens": drawn.num_tokens,
                    "sha256": drawn.sha256,
                }
            )
    return {**{key: getattr(job.recipe.settings, key) for key in _SETTINGS}, "tasks": tasks}


def assemble(
    statistics: Statistics, layout: dict[str, Any], *, importance: Sequence[float], balance: bool, ridge: float
) -> Alphas:
    """Solve every submodule and lay the file out.

    Args:
        statistics: Gram matrices, in the layout's canonical order.
        layout: from `layout_of`.
        importance: w_t of the layout's `models`, in their order.
        balance, ridge: see `solve.solve`.

    Raises:
        AlphasError: the statistics lack a submodule of the layout.
    """
    names: list[str] = layout["models"]
    entries = [
        solve_submodule(submodule, statistics, layout, importance=importance, balance=balance, ridge=ridge)
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
            "importance": dict(zip(names, importance, strict=True)),
        },
        provenance={**layout["versions"], "fingerprint": fingerprint(record), "identity": record},
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
    order = [layout["canonical"].index(name) for name in names]  # the recipe's place -> the canonical place
    weights = [0.0] * len(order)
    for place, weight in zip(order, importance, strict=True):
        weights[place] = weight
    wanted = objectives or submodule["objectives"]
    missing = [name for name in wanted if name not in statistics.grams]
    if missing:
        raise AlphasError(f"the statistics lack {show(missing[0])}: calibrate again")
    grams = [statistics.grams[name] for name in wanted]
    solution = solve(grams, statistics.row_task, importance=weights, balance=balance, ridge=ridge)
    return _entry(submodule, solution, order, names)


def _entry(
    submodule: dict[str, Any], solution: Solution, order: Sequence[int], names: Sequence[str]
) -> SubmoduleAlphas:
    return SubmoduleAlphas(
        name=submodule["name"],
        kind=submodule["kind"],
        layer=submodule["layer"],
        tensors=tuple(submodule["tensors"]),
        slices=submodule["slices"],
        alpha=tuple(solution.alpha[place] for place in order),
        stderr=None if solution.stderr is None else tuple(solution.stderr[place] for place in order),
        condition=finite_or_none(solution.condition),
        rank=solution.rank,
        residual=solution.residual,
        flags=solution.flags,
        unchanged=tuple(name for place, name in zip(order, names, strict=True) if solution.unchanged[place]),
    )
