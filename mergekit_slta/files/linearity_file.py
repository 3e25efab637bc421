"""The linearity file: linearity measures of every submodule, and the rows and grids on which they were taken.

Scope: the fields of the file, reading and writing it. The format is JSON; NaN (an expert changes nothing) is null.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.json_file import DocumentType, read_document, write_with_rows

FORMAT = "mergekit-slta/linearity"
VERSION = 2
DOCUMENT = DocumentType(
    noun="linearity file",
    article="a",
    format=FORMAT,
    version=VERSION,
    largest_bytes=1024 * 2**20,
    command="mergekit-slta linearity",
    remedy="name the file that `mergekit-slta linearity` wrote",
)

Number = Annotated[float, Field(allow_inf_nan=False)] | None
Vector = tuple[Number, ...]


class MeanStd(BaseModel):
    """Mean and standard deviation over submodules and, as in the paper, over experts or merging weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> MeanStd | None:
        """Mean and standard deviation of the values that are not None; None if all are None."""
        found = [value for value in values if value is not None]
        return cls(mean=_rounded(statistics.fmean(found)), std=_rounded(statistics.pstdev(found))) if found else None


class Combined(BaseModel):
    """A measure of merged experts for one submodule, over pairs and over triples of experts.

    There is one row per combination of experts, in the file's order. A row has one number per configuration of weights;
    the last expert's weight varies fastest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: tuple[Vector, ...] = ()
    triples: tuple[Vector, ...] = ()


class CombinedMeanStd(BaseModel):
    """`Combined` over all submodules of a level."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: MeanStd | None
    triples: MeanStd | None

    @classmethod
    def of(cls, values: Iterable[Combined]) -> CombinedMeanStd:
        """Compute over the submodules of a level."""
        values = list(values)
        return cls(
            pairs=MeanStd.of(number for one in values for row in one.pairs for number in row),
            triples=MeanStd.of(number for one in values for row in one.triples for number in row),
        )


class SubmoduleLinearity(BaseModel):
    """One submodule of the file.

    Attributes:
        name, kind, layer: see `submodules.Submodule`.
        non_linearity, non_linearity_std: Eq. 19 per model of the file: mean and standard deviation over the rows of its
            task.
        distances: per model, the mean matrix of distance ratios (Fig. 6), 11 x 11; left out for attention heads.
        projection_distance: Eq. 8.
        cosine: Eq. 16.
        cosine_base: Eq. 17.
        disentanglement: per pair, the weight disentanglement error at every pair of weights, on features.
        disagreement: the same error on the most likely next token; None if the submodule predicts no tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    layer: int | None
    non_linearity: Vector
    non_linearity_std: Vector
    distances: tuple[tuple[Vector, ...], ...] | None = None
    projection_distance: Combined
    cosine: Combined
    cosine_base: Number
    disentanglement: tuple[Vector, ...]
    disagreement: tuple[Vector, ...] | None = None


class Level(BaseModel):
    """All submodules of a kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    non_linearity: MeanStd | None
    projection_distance: CombinedMeanStd
    cosine: CombinedMeanStd
    cosine_base: MeanStd | None
    disentanglement: MeanStd | None
    disagreement: MeanStd | None

    @classmethod
    def of(cls, members: list[SubmoduleLinearity]) -> Level:
        """Average over the submodules of one kind."""
        return cls(
            count=len(members),
            non_linearity=MeanStd.of(number for one in members for number in one.non_linearity),
            projection_distance=CombinedMeanStd.of(one.projection_distance for one in members),
            cosine=CombinedMeanStd.of(one.cosine for one in members),
            cosine_base=MeanStd.of(one.cosine_base for one in members),
            disentanglement=MeanStd.of(number for one in members for row in one.disentanglement for number in row),
            disagreement=MeanStd.of(number for one in members for row in one.disagreement or () for number in row),
        )


class Linearity(BaseModel):
    """A linearity file.

    Attributes:
        models: the experts, sorted by name, so that the file does not depend on the recipe's order.
        pairs, triples: the merged combinations of experts, as indices of `models`.
        settings: settings of the measurement: `intervals` (N of Eq. 19), grids, rows and precision.
        submodules: in the order of a forward pass: layers, blocks, then the whole model.
        levels: kind of submodule -> averages over its submodules.
        provenance: versions and fingerprint.

    Examples:
        >>> linearity = mergekit_slta.Linearity.load("slta_linearity.json")
        >>> sorted(linearity.levels)
        ['attention', 'attention_head', 'embed', 'head', 'layer', 'mlp', 'model']
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mergekit-slta/linearity"] = FORMAT
    version: Literal[2] = VERSION
    base_model: str
    models: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    triples: tuple[tuple[int, int, int], ...]
    settings: dict[str, Any]
    submodules: tuple[SubmoduleLinearity, ...]
    levels: dict[str, Level]
    provenance: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically; the same measures give the same bytes.

        Raises:
            OutputError: it cannot be written.
        """
        content = self.model_dump(mode="json")
        for submodule in content["submodules"]:
            for key in ("distances", "disagreement"):
                if submodule[key] is None:
                    del submodule[key]
        write_with_rows(path, content, "submodules")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Linearity:
        """Read a linearity file.

        Raises:
            AlphasError: it is missing, unreadable, too large, or not such a file.
        """
        return read_document(path, cls, DOCUMENT)


def is_linearity_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a valid linearity file."""
    try:
        Linearity.load(path)
    except AlphasError:
        return False
    return True


def number(value: float) -> float | None:
    """Round a measure to six digits; None for NaN."""
    return _rounded(value) if math.isfinite(value) else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
