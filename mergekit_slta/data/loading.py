"""Load datasets from files, folders, glob patterns and the Hub, with the library `datasets`.

Scope: rows as mappings. Rows of local JSON and CSV files keep the text of the file: `007`, `NA` and `2024-01-01` stay
what they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_slta.data.json_files import TRAIN, find_line, parse_row
from mergekit_slta.data.local_files import folder_splits, kind_of, local_files, read_files, visible_files
from mergekit_slta.errors import DataError, listing, show

if TYPE_CHECKING:
    from datasets import BuilderConfig, Dataset

LOG = logging.getLogger(__name__)
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_NO_ROWS = ("corresponds to no data", "No columns to parse from file")
"""What `datasets` and pandas say of a split without rows, and of an empty file."""
_COLUMN_ROWS = 1000
"""Rows that are looked at for the columns of JSON lines, spread over the whole dataset."""


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset. A row is read and parsed when it is asked for.

    Attributes:
        name: the dataset's name, for messages.
        table: the rows; if `is_json`, its one column `text` has a JSON value each.
        is_json: whether rows are parsed as JSON.
        undecodable: whether the file holds bytes that are not UTF-8, which were replaced by U+FFFD.
        files: the files, for messages.
        places: number of the first unusable row -> its place in the files, which is searched for once.
    """

    name: str
    table: Dataset
    is_json: bool = False
    undecodable: bool = False
    files: tuple[str, ...] = ()
    places: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """A row.

        Raises:
            DataError: the row is not valid JSON, or was not UTF-8.
        """
        row = self.table[number]
        where = f"row {number} of {show(self.name)}"
        if self.undecodable and any(UNDECODABLE in value for value in row.values() if isinstance(value, str)):
            raise DataError(
                f"{where}{self._place(number, row)} is not UTF-8: save the file as UTF-8", code="unusable-row"
            )
        if not self.is_json:
            return row
        try:
            return parse_row(row["text"])
        except ValueError as error:
            raise DataError(
                f"{where}{self._place(number, row)} is not a JSON object ({show(error)}): mend the row",
                code="unusable-row",
            ) from error

    def _place(self, number: int, row: Mapping[str, Any]) -> str:
        """Where a line stands; empty if it is not a line, or not the first that is asked for."""
        if not self.places and list(row) == ["text"]:
            self.places[number] = find_line(self.files, row["text"])
        return self.places.get(number, "")

    @property
    def columns(self) -> list[str]:
        """The columns; of JSON lines, those of rows spread over the whole dataset."""
        if not self.is_json:
            return self.table.column_names
        found: dict[str, None] = {}
        for number in range(0, len(self), max(1, len(self) // _COLUMN_ROWS)):
            try:
                found |= dict.fromkeys(parse_row(self.table[number]["text"]))
            except ValueError:
                continue
        return list(found)


def load_rows(name: str, config: str | None, split: str) -> Rows:
    """Load a dataset.

    Args:
        name: a file, a folder, a glob pattern, or an id on the Hub. A path that exists takes precedence.
        config: passed to `datasets.load_dataset`, for folders and the Hub.
        split: as in `datasets.load_dataset`; the rows of a file are the split `train`.

    Raises:
        DataError: the dataset or split does not exist, the file type is unknown, or there are no rows.
    """
    path = os.path.expanduser(name)
    try:
        with _quiet():
            if os.path.isdir(path):
                rows = _load_folder(name, path, config, split)
            elif files := local_files(name, path):
                if config is not None:
                    raise _unreadable(name, config, split, "a file has no configs", "drop `dataset_config`")
                rows = _load_files(name, kind_of(name, files), {TRAIN: files}, split)
            else:
                rows = _load_from_hub(name, config, split)
    except DataError:
        raise
    except Exception as error:  # `datasets`, fsspec, pyarrow and the Hub raise different errors
        cause = error.__cause__ or error
        reason = show(cause, 300) or type(cause).__name__
        if any(words in reason for words in _NO_ROWS):
            raise _empty(name, split) from error
        raise _unreadable(name, config, split, reason) from error
    if len(rows) == 0:
        raise _empty(name, split)
    return replace(rows, table=_plain(rows.table))


def _unreadable(name: str, config: str | None, split: str, reason: str, remedy: str | None = None) -> DataError:
    if remedy is None:
        remedy = "check `dataset`, `dataset_config` and `split`"
        if os.path.exists(os.path.expanduser(name)):
            remedy = f"mend the file, name another, or {remedy}"
        elif "scripts are no longer supported" in reason or "trust_remote_code" in reason:
            remedy = "scripts are not run: name files of its rows (on the Hub in its branch refs/convert/parquet)"
    return DataError(
        f"cannot load dataset {show(name)} (config {show(config)}, split {show(split)}): {reason}; {remedy}",
        code="unreadable-dataset",
    )


def _empty(name: str, split: str) -> DataError:
    return DataError(
        f"dataset {show(name)}, split {show(split)}, is empty and has no rows: choose another `dataset` or `split`",
        code="too-few-rows",
    )


def _load_from_hub(name: str, config: str | None, split: str) -> Rows:
    import datasets

    return Rows(name, datasets.load_dataset(name, config, split=split))


def _plain(table: Dataset) -> Dataset:
    """Rows as Python values; images and audio are not decoded, which takes other packages."""
    for column, feature in table.features.items():
        if hasattr(feature, "decode"):
            table = table.cast_column(column, replace(feature, decode=False))
    return table.with_format(None)


def _load_folder(name: str, path: str, config: str | None, split: str) -> Rows:
    """Load a folder: one of `save_to_disk`, or one of files, whose splits `datasets` finds."""
    import datasets

    entries = {entry.name for entry in os.scandir(path)}
    if entries & {"state.json", "dataset_dict.json"}:
        if config is not None:
            raise _unreadable(name, config, split, "a saved dataset has no configs", "drop `dataset_config`")
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            return Rows(name, _part(name, saved, split))
        own = str(saved.split or TRAIN)
        return Rows(name, _part(name, {own if split.startswith(own) else TRAIN: saved}, split))
    if entries & {"config.json", "adapter_config.json"} and any(
        entry.endswith((".safetensors", ".bin", ".gguf")) or entry == "tokenizer_config.json" for entry in entries
    ):
        raise DataError(
            f"dataset {show(name)} is the folder of a model: name a file or folder of rows", code="unreadable-dataset"
        )
    path = os.path.realpath(path)
    visible = visible_files(path)
    card = Path(path, "README.md")
    if visible and not (card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")):
        kind = kind_of(name, visible)
        files = folder_splits(path, visible, config)
        left = len(visible) - sum(map(len, files.values()))
        if left:
            LOG.warning(
                "%d of the %d files of %s are named for no split and are left out; its splits are %s: name files in "
                "place of the folder to read others", left, len(visible), show(name), listing(files),
            )  # fmt: skip
        return _load_files(name, kind, files, split)
    chosen = datasets.load_dataset_builder(path, name=config).config
    files = {str(key): [str(file) for file in found] for key, found in (chosen.data_files or {}).items()}
    every = [file for found in files.values() for file in found]
    if every and set(every) <= set(visible) and not _has_options(chosen):
        return _load_files(name, kind_of(name, every), files, split)
    return Rows(name, _part(name, datasets.load_dataset(path, name=config), split))


def _has_options(config: BuilderConfig) -> bool:
    """Whether a dataset's card gives options for reading its files, such as names of columns."""
    usual = type(config)()
    stated = {part.name for part in fields(config) if getattr(config, part.name) != getattr(usual, part.name)}
    return bool(stated - {"name", "version", "data_dir", "data_files", "description", "sep"})


def _load_files(name: str, kind: str, files: Mapping[str, Sequence[str]], split: str) -> Rows:
    tables = read_files(name, kind, files)
    every = tuple(path for paths in files.values() for path in paths)
    return Rows(name, _part(name, tables.parts, split), tables.is_json, tables.undecodable, every)


def _part(name: str, parts: Mapping[str, Dataset], split: str) -> Dataset:
    """The rows that `split` names.

    Raises:
        DataError: there is no such split.
    """
    import datasets

    spec = "+".join(parts) if split == "all" else split
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({key: len(rows) for key, rows in parts.items()})
    except (ValueError, AssertionError) as error:
        reason = show(error, 300).rstrip(".")
        if list(parts) == [TRAIN]:
            reason += "; the rows of a file are its split `train`"
        raise _unreadable(name, None, split, reason, "correct `split`, as in `train[:100]`") from error
    chosen = [
        parts[piece.splitname].select(range(piece.from_, piece.to) if piece.from_ < piece.to else [])
        for piece in pieces
    ]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars and log lines of `datasets`: this package draws its own bars and has its own errors."""
    import datasets

    enabled, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if enabled:
            datasets.enable_progress_bar()
