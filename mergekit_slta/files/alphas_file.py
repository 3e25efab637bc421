"""The alphas file: each submodule's weight for every expert, how it was computed, and the merge it is valid for.

Scope: the fields of the file, reading, writing, and looking up a tensor's weights. The format is JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from mergekit_slta.errors import AlphasError, RunError, listing, show
from mergekit_slta.files.alphas_parts import Direction, Part, SubmoduleAlphas
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.evaluation import Evaluation
from mergekit_slta.files.json_file import DocumentType, read_document

if TYPE_CHECKING:
    from pandas import DataFrame

    from mergekit_slta.maths.task_arithmetic import WeightedSlice

FORMAT = "mergekit-slta/alphas"
VERSION = 1
LARGEST_BYTES = 256 * 2**20
"""Larger files are refused without reading. 100 layers x 100 heads x 10 experts need far less."""
DOCUMENT = DocumentType(
    noun="alphas file",
    article="an",
    format=FORMAT,
    version=VERSION,
    largest_bytes=LARGEST_BYTES,
    command="mergekit-slta calibrate",
    remedy="name the file that `mergekit-slta calibrate` wrote",
)

SOLVED_FROM = "solved_from"
"""Key in `provenance`."""
REROUTED = "rerouted"
"""Key of a task: share of (token, layer) pairs that the merge sends to other experts than the task's model does."""
NO_BETTER = "no_better_than_base"
"""Flag of a task: the loss of its expert on its rows is not below the base's."""
SHARED_ROWS = "shared_rows"
"""Flag of a task: another task has rows with the same tokens."""
TOO_FEW_ROWS = "too_few_rows"
"""Flag of a task: it has too few rows to hold any out, so that no merge is measured."""
_WRONG_FORMAT = ": wrong prompt format? check `chat_template`, `text` and `completion`"
_UNKNOWN_ANSWERS = (
    ". No row says where its answer begins, so its prompt counts, too: give prompt and answer apart, with `text` and "
    "`completion`; if the rows have no prompts, the format is probably not the one that the expert was trained on"
)
_OTHER_TASKS = (
    ": another task has rows with the same tokens, and the expert need not be better on those; only rows of its own "
    "show whether the prompt format is right"
)
"""Ends of `describe_no_better`."""


class Alphas(BaseModel):
    """The weights of a merge: for every submodule one weight per model. This is the content of an alphas file.

    `alphas["model.layers.3.mlp"]` is the entry of a submodule, see `SubmoduleAlphas`.

    Attributes:
        models: the recipe's models in the recipe's order, base left out, then a closed form.
        submodules: the entries, in the order of the model.
        directions: those of the models that are no experts.
        copied: tensors that text does not run through. They have no weights: those that are equal in all models are
            copied, for the others `calibration.uncalibrated` of a merge says what was done.
        calibration: the settings and rows from which the weights were computed. Each of its `tasks` has `loss_base` and
            `loss_expert`, mean losses over the answers of its measured rows in nats per token (None: not measured),
            `held_out`, the numbers of the rows that were not fitted, and `flags`; if the models have experts (MoE),
            `rerouted`.
        evaluation: how good the merge is on held-out rows; None if it was not measured.
        provenance: versions, the identity (see `identity`) and its hash, the `fingerprint`; of a file that `solve`
            wrote, `solved_from`, too.

    Examples:
        >>> alphas = mergekit_slta.Alphas.load("merged/slta_alphas.json")
        >>> alphas["model.layers.0.mlp"].alpha[alphas.models.index("models/math")] > 0
        True
        >>> alphas.to_frame().loc["model.layers.0.mlp", "kind"]
        'mlp'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mergekit-slta/alphas"] = FORMAT
    version: Literal[1] = VERSION
    granularity: str
    base_model: str
    models: tuple[str, ...]
    directions: tuple[Direction, ...] = ()
    submodules: tuple[SubmoduleAlphas, ...]
    copied: tuple[str, ...] = ()
    calibration: dict[str, Any]
    evaluation: Evaluation | None = None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Alphas:
        if len(set(self.models)) != len(self.models) or not self.models:
            raise ValueError("models are missing or listed twice")
        if not {direction.model for direction in self.directions} < set(self.models):
            raise ValueError("its directions are not among its models, or there is no expert")
        if sum(direction.closed_form is not None for direction in self.directions) > 1:
            raise ValueError("it has two closed forms")
        if self.evaluation is not None and [task.model for task in self.evaluation.tasks] != list(self.experts):
            raise ValueError("the evaluation's tasks are not the experts")
        tasks = self.calibration.get("tasks", [])
        if not isinstance(tasks, list) or not all(
            isinstance(task, dict) and "model" in task and isinstance(task.get("flags", []), list) for task in tasks
        ):
            raise ValueError("the calibration's tasks are not what was written")
        far = self.calibration.get("far_from_base", {})
        if not isinstance(far, dict) or not all(isinstance(share, float) for share in far.values()):
            raise ValueError("the calibration's far_from_base is not what was written")
        whole: set[str] = set()
        parts: dict[str, list[Part]] = {}
        for submodule in self.submodules:
            if len(submodule.alpha) != len(self.models):
                raise ValueError(
                    f"{show(submodule.name)} has {len(submodule.alpha)} alphas for {len(self.models)} models"
                )
            if not set(submodule.slices) <= set(submodule.tensors):
                raise ValueError(f"{show(submodule.name)} slices tensors that are not its own")
            for tensor in submodule.tensors:
                if tensor in submodule.slices:
                    parts.setdefault(tensor, []).extend(submodule.parts(tensor))
                elif tensor in whole:
                    raise ValueError(f"{show(tensor)} belongs to two submodules")
                else:
                    whole.add(tensor)
        for tensor, slices in parts.items():
            ordered = sorted(slices)
            gaps = any(one[2] != other[1] for one, other in pairwise(ordered))
            if tensor in whole or len({part[0] for part in ordered}) > 1 or ordered[0][1] != 0 or gaps:
                raise ValueError(f"the slices of {show(tensor)} overlap or leave a gap")
        return self

    def __repr__(self) -> str:
        kept = f"{len(self.submodules)} submodules, {self.granularity}"
        return f"Alphas({kept}, {listing(self.models, 5)}, base {show(self.base_model, 80)})"

    __str__ = __repr__

    def __contains__(self, name: object) -> bool:
        return any(submodule.name == name for submodule in self.submodules)

    def __getitem__(self, name: str) -> SubmoduleAlphas:
        """The entry of a submodule, by its name.

        Raises:
            AlphasError: there is no such submodule.
        """
        for submodule in self.submodules:
            if submodule.name == name:
                return submodule
        names = [submodule.name for submodule in self.submodules]
        near = listing(get_close_matches(str(name), names, 3, 0) or names)
        raise AlphasError(f"{show(name)} is none of the submodules: there is {near}", code="unknown-submodule")

    def to_frame(self) -> DataFrame:
        """A pandas table with a row for each submodule.

        The index is the submodule's name. Columns: `kind`, `layer`, one for each model with its weight, `residual`, and
        `flags` (joined by commas).

        Raises:
            RunError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise RunError("pandas is not installed: run `pip install pandas`", code="missing-package") from error
        rows = [
            {"kind": entry.kind, "layer": entry.layer}
            | dict(zip(self.models, entry.alpha, strict=True))
            | {"residual": entry.residual, "flags": ",".join(entry.flags)}
            for entry in self.submodules
        ]
        names = pandas.Index([entry.name for entry in self.submodules], name="submodule")
        return pandas.DataFrame(rows, index=names).astype({"layer": "Int64", "residual": float})

    @property
    def experts(self) -> tuple[str, ...]:
        """The models that are no directions."""
        directions = {direction.model for direction in self.directions}
        return tuple(model for model in self.models if model not in directions)

    @property
    def is_fitted(self) -> bool:
        """Whether the weights were fitted to rows, and are not a closed form of the experts' weights alone."""
        tasks = self.calibration.get("tasks", ())
        return self.closed_form is None or any(task.get("rows") for task in tasks)

    @property
    def closed_form(self) -> Direction | None:
        """The direction that is computed from the experts; None if there is none."""
        return next((direction for direction in self.directions if direction.closed_form), None)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The inputs that the weights depend on, as label -> value (see `files.identity`)."""
        identity = self.provenance.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def solved_from(self) -> str | None:
        """Name of the statistics file beside it from which `solve` made it; None for a calibration's own file."""
        name = self.provenance.get(SOLVED_FROM)
        return os.path.basename(name) if isinstance(name, str) else None

    def of_merge(self, uncalibrated: str = "error") -> Alphas:
        """The same alphas as the file of a merge, which `solve` must not replace.

        Args:
            uncalibrated: the recipe's `uncalibrated`.
        """
        kept = {key: value for key, value in self.provenance.items() if key != SOLVED_FROM}
        rule = {"uncalibrated": uncalibrated} if self.copied else {}
        return self.model_copy(update={"provenance": kept, "calibration": {**self.calibration, **rule}})

    @cached_property
    def _by_tensor(self) -> dict[str, tuple[WeightedSlice, ...]]:
        return weights_by_tensor(self.submodules)

    def pieces(self, tensor: str) -> tuple[WeightedSlice, ...] | None:
        """The slices of a tensor with their weights; None if the file does not cover the tensor."""
        return self._by_tensor.get(tensor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically; the same alphas give the same bytes.

        Raises:
            OutputError: it cannot be written.
        """
        content = self.model_dump(mode="json", by_alias=True)
        for key in ("copied", "evaluation", "directions"):
            if not content[key]:
                del content[key]
        for submodule in content["submodules"]:
            if not submodule["slices"]:
                del submodule["slices"]
            if submodule["residual_measured"] is None:
                del submodule["residual_measured"]
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_text_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alphas:
        """Read an alphas file.

        Raises:
            AlphasError: it is missing, unreadable, too large, not JSON, of another format or version, or inconsistent.
        """
        return read_document(path, cls, DOCUMENT)


def is_alphas_file(path: Path) -> bool:
    """Whether a file begins as the alphas files that `Alphas.save` writes do."""
    try:
        with open(path, "rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(200)
    except (OSError, ValueError):
        return False


def describe_no_better(calibration: Mapping[str, Any], name: Callable[[str], str] = show) -> list[str]:
    """One line for each task that is flagged `NO_BETTER`; `name` formats the name of its model.

    None for an expert whose loss is the base's: it holds the base's weights, of which `check` and the merge warn.
    """
    return [
        f"{name(task['model'])}: its expert is no better than the base on its own rows (loss "
        f"{describe_loss(task.get('loss_expert'))}, base {describe_loss(task.get('loss_base'))} nats per token)"
        f"{_why_no_better(task)}"
        for task in calibration.get("tasks", ())
        if NO_BETTER in task.get("flags", ()) and task.get("loss_expert") != task.get("loss_base")
    ]


def _why_no_better(task: Mapping[str, Any]) -> str:
    if SHARED_ROWS in task.get("flags", ()):
        return _OTHER_TASKS
    return _UNKNOWN_ANSWERS if task.get("whole_rows") else _WRONG_FORMAT


def describe_loss(loss: object) -> str:
    """Format a loss from an alphas file; "-" if it was not measured."""
    return f"{loss:.3g}" if isinstance(loss, float) else "-"


def describe_far(calibration: Mapping[str, Any], name: Callable[[object], str] = show) -> list[str]:
    """A line for each expert that was probably not fine-tuned from the base, for a warning or a card.

    Args:
        calibration: an alphas file's settings. Their `far_from_base` is model -> Frobenius norm of its task vector in
            the middle layer over that of the base's layer.
        name: formats a model's name.
    """
    return [
        f"{name(model)} differs from the base by {100 * share:.0f}% of the weights in the middle layer: was it "
        "fine-tuned from this very base?"
        for model, share in calibration.get("far_from_base", {}).items()
    ]


def describe_ridge(calibration: Mapping[str, Any]) -> str:
    """Describe the ridge in an alphas file's settings, given by the user or chosen by the solve, for a message."""
    given, chosen = calibration.get("ridge"), calibration.get("ridge_used")
    if given is None and chosen is not None:
        return f"{chosen:.3g}, chosen by leaving out rows" if isinstance(chosen, float) else show(chosen)
    return show(given)


def weights_by_tensor(submodules: Sequence[SubmoduleAlphas]) -> dict[str, tuple[WeightedSlice, ...]]:
    """Tensor name -> its slices with their weights, sorted along the sliced axis."""
    from mergekit_slta.maths.task_arithmetic import WeightedSlice  # imports torch, which reading a file does not need

    pieces: dict[str, list[WeightedSlice]] = {}
    for submodule in submodules:
        for tensor in submodule.tensors:
            parts = submodule.parts(tensor) or ((None, 0, 0),)
            pieces.setdefault(tensor, []).extend(WeightedSlice(*part, submodule.alpha) for part in parts)
    return {tensor: tuple(sorted(found, key=lambda piece: piece.start)) for tensor, found in pieces.items()}


def finite_or_none(value: float) -> float | None:
    """`value`; None if it is infinite or NaN, which JSON cannot represent."""
    return value if math.isfinite(value) else None
