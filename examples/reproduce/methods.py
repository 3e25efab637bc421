"""What is merged: sets of experts, methods that have rows, and the ways of computing our weights (others: `grids`).

Every candidate is a recipe, mergekit's where it has the method; nothing here computes a merge by itself.
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
CALIBRATED = ("FeatCal", "Expert Merging")
"""These start from task arithmetic at its best weight on the calibration rows."""
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


def closed_forms(
    tasks: Sequence[str], seed: int, rows: int, methods: Sequence[str] = CLOSED_FORMS, own: Settings | None = None,
    **shown: Any,
) -> Iterator[Candidate]:  # fmt: skip
    """Methods that have rows, as their papers recommend them, on those of a calibration.

    Args:
        tasks: the experts.
        seed: of the calibration.
        rows: its rows per task.
        methods: of `CLOSED_FORMS` and `CALIBRATED`.
        own: more that a method is given.
        shown: what a table says of them.
    """
    for method in methods:
        how = {"closed_form": method, "tasks": list(tasks), "seed": seed, "num_samples": rows, **(own or {})}
        yield Candidate(tuple(tasks), method, shown, how, seed)


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
