"""The alphas file: which weight every submodule of every expert gets, how it was found, and for what it is valid.

Scope: the file's layout, reading and writing it, and looking a tensor's weights up. JSON, no pickle anywhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergekit_slta.errors import AlphasError, listing, show
from mergekit_slta.files import write_text_atomically

FORMAT = "mergekit-slta/alphas"
VERSION = 1
LARGEST_BYTES = 256 * 2**20
"""A file larger than this is none of ours: 100 layers x 100 heads x 10 experts stay far below."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Piece(NamedTuple):
    """A slice of a tensor and its weights: `alpha` holds one number per expert, in the file's order of models.

    `axis` None stands for the whole tensor.
    """

    axis: int | None
    start: int
    stop: int
    alpha: tuple[float, ...]


class SubmoduleAlphas(BaseModel):
    """One submodule of the file.

    Attributes:
        name, kind, layer, tensors: see `submodules.Submodule`; tensor names are those of the merged model.
        alpha: one weight per model of the file.
        stderr: jackknife standard errors of `alpha` over the calibration rows; None with a single row per task.
        condition: of the system that was solved; None where it lost rank.
        rank: of that system.
        residual: predicted by linearity, relative to the experts' own changes.
        flags: what is remarkable: "unchanged", "rank_deficient", "ill_conditioned".
        unchanged: models that equal the base here, whose alpha is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    layer: int | None
    tensors: tuple[str, ...]
    alpha: tuple[Finite, ...]
    stderr: tuple[Finite, ...] | None
    condition: Finite | None
    rank: int
    residual: Finite
    flags: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()


class Alphas(BaseModel):
    """An alphas file. `models` are the recipe's experts in the recipe's order, base left out.

    Attributes:
        calibration: settings and rows that the weights come from.
        provenance: versions, the fingerprint, and `identity`: everything the fingerprint was taken over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mergekit-slta/alphas"] = FORMAT
    version: Literal[1] = VERSION
    granularity: str
    base_model: str
    models: tuple[str, ...]
    submodules: tuple[SubmoduleAlphas, ...]
    calibration: dict[str, Any]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Alphas:
        if len(set(self.models)) != len(self.models) or not self.models:
            raise ValueError("models are missing or listed twice")
        seen: set[str] = set()
        for submodule in self.submodules:
            if len(submodule.alpha) != len(self.models):
                raise ValueError(
                    f"{show(submodule.name)} has {len(submodule.alpha)} alphas for {len(self.models)} models"
                )
            twice = seen.intersection(submodule.tensors)
            if twice:
                raise ValueError(f"{listing(twice, 3)} belongs to two submodules")
            seen.update(submodule.tensors)
        return self

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the weights are valid for, by label: `weights of X`, `rows of X`, settings."""
        identity = self.provenance.get("identity")
        return identity if isinstance(identity, dict) else {}

    @cached_property
    def _by_tensor(self) -> dict[str, SubmoduleAlphas]:
        return {tensor: submodule for submodule in self.submodules for tensor in submodule.tensors}

    def pieces(self, tensor: str) -> tuple[Piece, ...] | None:
        """How a tensor is merged, slice by slice; None where the file does not cover it."""
        submodule = self._by_tensor.get(tensor)
        return None if submodule is None else (Piece(None, 0, 0, submodule.alpha),)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically; the same alphas give the same bytes.

        Raises:
            OutputError: it cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
        write_text_atomically(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alphas:
        """Read an alphas file.

        Raises:
            AlphasError: it is missing, unreadable, too large, not JSON, of another format or version, or inconsistent.
        """
        remedy = "name the file that `mergekit-slta calibrate` wrote, or remove it to calibrate again"
        try:
            if not os.path.isfile(path):
                raise AlphasError(f"there is no alphas file {show(path)}: {remedy}")
            if os.path.getsize(path) > LARGEST_BYTES:
                raise AlphasError(
                    f"{show(path)} is larger than {LARGEST_BYTES >> 20} MiB, hence no alphas file: {remedy}"
                )
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AlphasError(f"cannot read the alphas file {show(path)} ({show(error)}): {remedy}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise AlphasError(f"{show(path)} is not an alphas file: {remedy}")
        if content.get("version") != VERSION:
            raise AlphasError(
                f"{show(path)} is an alphas file of version {show(content.get('version'))}, this release reads version "
                f"{VERSION}: calibrate again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise AlphasError(f"{show(path)} is damaged at {show(place)} ({show(problem['msg'])}): {remedy}") from error


def is_alphas_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file that may be overwritten with alphas: an alphas file itself."""
    try:
        Alphas.load(path)
    except AlphasError:
        return False
    return True


def finite_or_none(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
