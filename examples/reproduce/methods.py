"""What is merged: sets of experts, the other methods with their grids, and the ways of computing our weights.

Every candidate is a mergekit recipe; nothing here computes a merge by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from five_tasks import TASKS

PAIRS = (("math", "code"), ("math", "translate"), ("code", "translate"))
TRIPLE = ("math", "code", "translate")
FOUR = ("math", "code", "translate", "extract")
ALL = tuple(TASKS)
SETS: tuple[tuple[str, ...], ...] = (ALL, TRIPLE, *PAIRS, FOUR)
"""Pairs and triple as in the paper's Tables 1 to 3; the others for its Table 10 (two to five experts)."""

Settings = dict[str, Any]

OURS = "submodule_linear"
CLOSED_FORMS = ("RegMean", "RegMean++", "LOT merging")
JOINT_STEPS = 6
"""Default steps of the joint objective, each on rows of its own: so many times the rows of a calibration are seen."""
GRANULARITIES = ("layer", "attn_mlp", "head_mlp", "linear", "model")


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        tasks: the experts, by task.
        method: row of the tables.
        settings: what tells it from the method's other candidates.
        recipe: for mergekit.
        seed: of the calibration rows; None where there are none.
    """

    tasks: tuple[str, ...]
    method: str
    settings: dict[str, Any] = field(hash=False)
    recipe: dict[str, Any] = field(hash=False)
    seed: int | None = None

    @property
    def name(self) -> str:
        """Where its result is kept, below the folder of results."""
        parts = [f"{key}={value}" for key, value in self.settings.items()]
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        return "/".join([set_name(self.tasks), self.method, ",".join([*parts, *seed]) or "only"])


def set_name(tasks: Sequence[str]) -> str:
    """How files and tables call a set of experts."""
    return "all" if tuple(tasks) == ALL else "+".join(tasks)


def recipe(method: str, tasks: Sequence[str], own: dict[str, Any] | None = None, **shared: Any) -> dict[str, Any]:
    """A mergekit recipe over the experts of the work directory.

    Stock methods compute in the type they are given: float32 here, since a third of a bfloat16 difference is often no
    bfloat16 number, and rounding would blur what is compared.
    """
    models: list[dict[str, Any]] = [{"model": task, **({"parameters": dict(own)} if own else {})} for task in tasks]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    if method != "linear":
        content["base_model"] = "base"
    if shared:
        content["parameters"] = shared
    return content


def baselines(tasks: Sequence[str], everything: bool) -> Iterator[Candidate]:
    """The other methods, each with its grid: the paper's (A.3.4) for task arithmetic and DARE.

    The paper gives no grid for the others; theirs are around the values that their own papers recommend.

    Args:
        tasks: the experts.
        everything: also the methods that the paper does not compare with (DELLA, SCE, model stock), and all of DARE's
            grid instead of half of it.
    """
    tasks = tuple(tasks)

    def one(
        shown: str, method: str, own: dict[str, Any], shared: dict[str, Any], settings: dict[str, Any]
    ) -> Candidate:
        return Candidate(tasks, shown, settings, recipe(method, tasks, own, **shared))

    yield one("weight average", "linear", {"weight": 1.0}, {}, {})
    for weight in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        yield one("task arithmetic", "task_arithmetic", {"weight": weight}, {"normalize": False}, {"weight": weight})
    for drop in (0.6, 0.7, 0.8, 0.9) if everything else (0.6, 0.8):
        for weight in (0.6, 0.8, 1.0):
            own = {"weight": weight, "density": round(1 - drop, 1)}
            yield one("DARE", "dare_linear", own, {"normalize": False}, {"drop": drop, "weight": weight})
    for density in (0.2, 0.5):
        for scale in (1.0, 1.5, 2.0):
            own, shared = {"weight": 1.0, "density": density}, {"normalize": True, "lambda": scale}
            yield one("TIES", "ties", own, shared, {"density": density, "lambda": scale})
    for weight in (0.3, 0.4, 0.5, 0.6, 0.8):
        own = {"weight": weight, "density": 0.85, "gamma": 0.01}
        yield one("Breadcrumbs", "breadcrumbs", own, {"normalize": False}, {"weight": weight})
    if everything:
        for density in (0.3, 0.6):
            for scale in (1.0, 1.5, 2.0):
                own = {"weight": 1.0, "density": density, "epsilon": 0.15}
                shared = {"normalize": True, "lambda": scale}
                yield one("DELLA", "della", own, shared, {"density": density, "lambda": scale})
        for share in (0.1, 0.3, 1.0):
            yield one("SCE", "sce", {}, {"select_topk": share}, {"select_topk": share})
        yield one("model stock", "model_stock", {}, {}, {})


def closed_forms(
    tasks: Sequence[str], seed: int, rows: int, methods: Sequence[str] = CLOSED_FORMS, **shown: Any
) -> Iterator[Candidate]:
    """RegMean, RegMean++ and LOT merging, as their papers recommend them, on the rows of a calibration.

    Args:
        tasks: the experts.
        seed: of the calibration.
        rows: its rows per task.
        methods: which of them.
        shown: what a table says of them.
    """
    for method in methods:
        own = {"closed_form": method, "tasks": list(tasks), "seed": seed, "num_samples": rows}
        yield Candidate(tuple(tasks), method, shown, own, seed)


def calibration_recipe(tasks: Sequence[str], seed: int, rows: int, **shared: Any) -> dict[str, Any]:
    """A `submodule_linear` recipe with the tasks' training rows as calibration data."""
    content = recipe(OURS, tasks, num_samples=rows, seed=seed, **shared)
    for entry in content["models"]:
        entry["parameters"] = {"dataset": f"data/{entry['model']}_train.jsonl"}
    content["out_dtype"] = content.pop("dtype")
    return content


def with_alphas(tasks: Sequence[str], alphas: str, scale: float = 1.0) -> dict[str, Any]:
    """A `submodule_linear` recipe that uses a file of weights."""
    content = recipe(OURS, tasks, alphas=alphas, **({"lambda": scale} if scale != 1 else {}))
    content["out_dtype"] = content.pop("dtype")
    return content
