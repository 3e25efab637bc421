"""What cards and pages say of a calibration: its rows, its settings and its flags. Local paths are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import REROUTED, Alphas, describe_loss, describe_ridge
from mergekit_slta.recipe.objectives import all_shared_keys
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.reporting.meanings import SUBMODULE_FLAGS, TASK_FLAGS
from mergekit_slta.reporting.names import PublicNames


@dataclass(frozen=True)
class CalibrationTask:
    """The rows of a task; all texts are short and on one line.

    Attributes:
        model: public name of the expert.
        data: public name of the dataset, with its config and split.
        rows, tokens, held_out: counts; None if the file does not say.
        numbers: of the first rows in the dataset.
        sha256: begin of the hash of the rows.
        template: what rendered chats; None if the rows are no chats.
        text, completion: the recipe's templates.
        loss_base, loss_expert: texts.
        importance: the task's share in the objective.
        rerouted: share of (token, layer) pairs; None if the model has no experts.
        flags: (flag, meaning).
    """

    model: str
    data: str
    rows: int | None
    tokens: int | None
    held_out: int | None
    numbers: str
    sha256: str
    template: str | None
    text: str | None
    completion: str | None
    loss_base: str
    loss_expert: str
    is_measured: bool
    importance: float | None
    rerouted: float | None
    flags: list[tuple[str, str]]


def calibration_tasks(alphas: Alphas, names: PublicNames) -> list[CalibrationTask]:
    """The tasks of a file, as far as it says what they are."""
    found = []
    importance = alphas.calibration.get("importance")
    for task in alphas.calibration.get("tasks", ()):
        numbers, held_out, tokens = (task.get(key) for key in ("rows", "held_out", "tokens"))
        numbers = numbers if isinstance(numbers, list) else []
        data = [names.dataset(task["dataset"])] if task.get("dataset") else []
        parts = (show(task[key], 60) for key in ("dataset_config", "split") if task.get(key))
        is_own = task.get("dataset") == SELF
        template = task.get("chat_template")
        share = task.get(REROUTED)
        found.append(
            CalibrationTask(
                model=names.model(task["model"]),
                data="written by the expert" if is_own else " ".join([*data, *parts]),
                rows=len(numbers) or None,
                tokens=tokens if isinstance(tokens, int) else None,
                held_out=len(held_out) if isinstance(held_out, list) else None,
                numbers=", ".join(show(number, 12) for number in numbers[:30]) + ", …" * (len(numbers) > 30),
                sha256=show(task.get("sha256") or "-")[:16],
                template=_template_name(template),
                text=show(task["text"], 300) if task.get("text") else None,
                completion=show(task["completion"], 300) if task.get("completion") else None,
                loss_base=describe_loss(task.get("loss_base")),
                loss_expert=describe_loss(task.get("loss_expert")),
                is_measured=isinstance(task.get("loss_expert"), float),
                importance=_number((importance if isinstance(importance, dict) else {}).get(str(task["model"]))),
                rerouted=_number(share),
                flags=[(show(flag, 40), TASK_FLAGS.get(str(flag), "")) for flag in task.get("flags", ())],
            )
        )  # fmt: skip
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _template_name(value: Any) -> str | None:
    """What rendered chats: a name, the last part of a file's path, or that the recipe has it."""
    if not value:
        return None
    text = str(value)
    if "\n" in text or "{" in text:
        return "of the recipe"
    return show(text.replace("\\", "/").rstrip("/").rpartition("/")[2], 60)


def settings_of(alphas: Alphas) -> list[tuple[str, str]]:
    """The shared keys of the recipe that the calibration used, with their values."""
    used = alphas.calibration
    return [
        (key, describe_ridge(used) if key == "ridge" else show(used[key], 100))
        for key in all_shared_keys()
        if used.get(key) is not None or (key == "ridge" and used.get("ridge_used") is not None)
    ]


def flagged(alphas: Alphas) -> list[tuple[str, str, list[str]]]:
    """(flag, meaning, names of the submodules) for each flag that submodules have; without those that only a closed
    form leaves unchanged, as it should."""
    form = alphas.closed_form and alphas.closed_form.model
    found: dict[str, list[str]] = {}
    for entry in alphas.submodules:
        for flag in entry.flags:
            if flag != "unchanged" or {*entry.unchanged} != {form}:
                found.setdefault(flag, []).append(entry.name)
    return [(flag, SUBMODULE_FLAGS.get(flag, ""), names) for flag, names in found.items()]


def shared_residual(alphas: Alphas) -> float | None:
    """The one residual of submodules that were solved together."""
    found = {entry.residual for entry in alphas.submodules}
    return found.pop() if len(found) == 1 and all(entry.rank is None for entry in alphas.submodules) else None
