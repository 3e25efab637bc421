"""The statistics file: one small tensor per submodule and calibration row, from which the alphas are solved.

Scope: accumulate statistics, save and load them; `maths/` solves them. There are three forms:

    gram   G_x[j, k] = <df_j(x), df_k(x)>, the sum over the tokens and features of row x      (the terms of Eq. 14)
    slope  u_x[s, t] = <d loss / d theta^m at theta_a, tau_t^m> of row x of task a, for its s-th label sample
    point  [p, t]: alpha_t of the p-th merged model that was measured on held-out rows
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.atomic import write_atomically
from mergekit_slta.files.json_file import why_missing
from mergekit_slta.maths.grams import row_grams

FORMAT = "mergekit-slta/statistics"
VERSION = 3
_REMEDY = "name the file that `mergekit-slta calibrate` wrote beside its alphas (slta_stats.safetensors)"
_ROW_TASK = "row_task"
_PER_ROW = ("divergences", "tokens", "row_group", "losses")
"""Optional tensors with an entry per row, by the names of their fields."""
_FORMS = ("gram", "slope", "point")


@dataclass
class Statistics:
    """Gram matrices, or derivatives of losses, for every submodule and calibration row.

    Attributes:
        row_task: [rows] int64, each row's task, as an index into the experts in canonical order. Form "point": the
            held-out rows; there may be none.
        num_models: K, the T experts and the directions.
        by_submodule: submodule -> [rows, K, K] float64 Gram matrices, [rows, S, K] derivatives, or [P, K] alphas of
            measured models. A tied embedding table has two Gram matrices, `embed` and `head`.
        metadata: fingerprint and layout, as strings; form "point": what each model is, too (`evaluation.SearchRecord`).
        form: "gram", "slope" or "point".
        divergences: form "point": [rows, P] float64, KL(expert || model) in nats, summed over the row's answer. The
            first model is the base.
        tokens: form "point": [rows] int64, tokens of each row's answer.
        row_group: form "slope": [rows] int64, equal for rows with equal tokens.
        losses: [rows, 2] float64, the mean loss over a row's answer in nats per token, of the base and of the expert of
            the row's task; NaN where it was not measured. None if no row was measured. Form "point": [rows, P + 1], of
            every model and of the expert.

    Examples:
        >>> statistics = mergekit_slta.Statistics.load("merged/slta_stats.safetensors")
        >>> statistics.by_submodule["model.layers.0.mlp"].shape
        torch.Size([4, 2, 2])
    """

    row_task: Tensor
    num_models: int
    by_submodule: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    form: str = "gram"
    divergences: Tensor | None = None
    tokens: Tensor | None = None
    row_group: Tensor | None = None
    losses: Tensor | None = None

    @property
    def losses_of_base_and_expert(self) -> Tensor | None:
        """[rows, 2] float64, the first and the last column of `losses`; None if no row was measured."""
        return None if self.losses is None else self.losses[:, [0, -1]]

    def add(
        self, name: str, rows: Iterable[int], outputs: Sequence[Tensor], lengths: Sequence[int],
        base: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add the Gram matrices of `outputs` (minus `base`, see `row_grams`) to those of submodule `name`.

        Args:
            name: the submodule.
            rows: the rows that the outputs belong to.
            outputs: K times [N, d], the rows' tokens one after another.
            lengths: tokens of each row.
            base: [N, d], subtracted from the outputs; None if they are differences already.
        """
        grams = row_grams(outputs, lengths, base)
        self.begin(name, grams.device)
        self.by_submodule[name].index_add_(0, torch.as_tensor(list(rows)).to(grams.device), grams)

    def begin(self, name: str, device: torch.device | str = "cpu") -> None:
        """Set the matrices of `name` to zeros if it has none yet. They stay on `device` until `finish`."""
        if name not in self.by_submodule:
            shape = (len(self.row_task), self.num_models, self.num_models)
            self.by_submodule[name] = torch.zeros(shape, dtype=torch.float64, device=device)

    def finish(self, name: str) -> Tensor:
        """Move the matrices of `name` to the CPU, zeros if it has none, and return them."""
        self.begin(name)
        self.by_submodule[name] = self.by_submodule[name].cpu()
        return self.by_submodule[name]

    def select(self, rows: Tensor) -> Statistics:
        """The statistics of some rows, without the metadata, which describes all rows. Not for form "point".

        Args:
            rows: [n] int64 indices, or [rows] bool.
        """
        given = {name: getattr(self, name) for name in _PER_ROW}
        return replace(
            self,
            row_task=self.row_task[rows],
            by_submodule={name: tensor[rows] for name, tensor in self.by_submodule.items()},
            metadata={},
            **{name: None if tensor is None else tensor[rows] for name, tensor in given.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one float64 tensor per name, the row-to-task map and the metadata, atomically; the same statistics give
        the same bytes.

        Raises:
            OutputError: it cannot be written.
        """
        tensors = {f"{self.form}.{name}": gram.contiguous() for name, gram in sorted(self.by_submodule.items())}
        tensors[_ROW_TASK] = self.row_task.to(torch.int64)
        given = {name: getattr(self, name) for name in _PER_ROW}
        tensors |= {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
        header = {"format": FORMAT, "version": str(VERSION), "metadata": json.dumps(self.metadata, sort_keys=True)}

        def write(temporary: Path) -> None:
            save_file(tensors, temporary, metadata=header)
            _sort_metadata(temporary, header)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            AlphasError: the file is missing, corrupt, of another format or version, or inconsistent in itself.
        """
        if what := why_missing(path):
            raise AlphasError(f"there is no statistics file {show(path)} ({what}): {_REMEDY}", code="missing-file")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise AlphasError(f"{show(path)} is not a statistics file: {_REMEDY}", code="wrong-file-type")
                if header.get("version") != str(VERSION):
                    raise AlphasError(
                        f"{show(path)} was made by another version of this package: calibrate again",
                        code="other-file-version",
                    )
                metadata = json.loads(header["metadata"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise AlphasError(
                f"cannot read statistics from {show(path)} ({show(error)}): {_REMEDY}, or calibrate again",
                code="unreadable-file",
            ) from error
        row_task = tensors.pop(_ROW_TASK, None)
        given = {name: tensors.pop(name, None) for name in _PER_ROW}
        form = next(iter(tensors), "").partition(".")[0]
        grams = {name.removeprefix(f"{form}."): gram for name, gram in tensors.items()}
        _check(path, row_task, grams, metadata, form)
        num_models = next(iter(grams.values())).shape[-1]
        found = cls(row_task, num_models, grams, metadata, form, **given)
        if not _fits(found):
            raise _unfit(path)
        return found


def _sort_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put the metadata of a safetensors file, which `save_file` writes in any order, into the given one."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(metadata)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # else the library writes JSON in another way than today
            file.seek(8)
            file.write(text)


def _check(
    path: str | os.PathLike[str], row_task: Tensor | None, grams: dict[str, Tensor], metadata: object, form: str
) -> None:
    shapes = {tuple(gram.shape) for gram in grams.values()}
    sound = (
        row_task is not None
        and form in _FORMS
        and row_task.dtype == torch.int64
        and row_task.dim() == 1
        and len(shapes) == 1
        and all(len(shape) == (2 if form == "point" else 3) for shape in shapes)
        and all(form == "point" or shape[0] == len(row_task) for shape in shapes)
        and all(form != "gram" or shape[1] == shape[2] for shape in shapes)
        and all(gram.dtype == torch.float64 and bool(torch.isfinite(gram).all()) for gram in grams.values())
        and isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and bool(((row_task >= 0) & (row_task < next(iter(shapes))[-1])).all())
    )
    if not sound:
        raise _unfit(path)


def _fits(statistics: Statistics) -> bool:
    """Whether `divergences`, `row_group` and `losses` fit the form of the statistics."""
    rows, divergences, losses = len(statistics.row_task), statistics.divergences, statistics.losses
    is_point = statistics.form == "point"
    points = len(next(iter(statistics.by_submodule.values()))) if is_point else 1
    if losses is not None and (losses.dtype != torch.float64 or losses.shape != (rows, points + 1)):
        return False
    group = statistics.row_group
    if group is not None and (group.dtype != torch.int64 or group.shape != (rows,) or statistics.form != "slope"):
        return False
    tokens = statistics.tokens
    if tokens is not None and (tokens.dtype != torch.int64 or tokens.shape != (rows,) or bool((tokens < 1).any())):
        return False
    if not is_point:
        return divergences is None and tokens is None
    return (
        divergences is not None
        and divergences.dtype == torch.float64
        and divergences.shape == (rows, points)
        and bool(torch.isfinite(divergences).all())
    )


def _unfit(path: str | os.PathLike[str]) -> AlphasError:
    return AlphasError(f"the statistics in {show(path)} do not fit together; calibrate again", code="damaged-file")


def is_statistics_file(path: Path) -> bool:
    """Whether a file's header says that it is a statistics file; False for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False
