"""Find local files of rows, and read them with the library `datasets`.

Scope: files. Cells of CSV files stay text, and lines of JSON files are not parsed: `007`, `NA` and `2024-01-01` stay
what they are.
"""

from __future__ import annotations

import codecs
import glob
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_slta.data.json_files import TRAIN, document_rows, is_json_lines
from mergekit_slta.errors import DataError, listing, path_hint, show

if TYPE_CHECKING:
    from datasets import Dataset, Features

LOG = logging.getLogger(__name__)
LOADERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
"""File type -> kind of file."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow a file type."""
_LFS_POINTER = b"version https://git-lfs"
_DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def local_files(name: str, path: str) -> list[str]:
    """The files that a name stands for; none if it is an id on the Hub.

    Raises:
        DataError: it looks like a path, and there is no such file.
    """
    if os.path.isfile(path):
        return [os.path.abspath(path)]
    matches = [match for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
    looks_local = glob.has_magic(path) or _kind(path) or path.startswith((".", "/", "~"))
    if not matches and (looks_local or path.count("/") > 1):
        raise DataError(
            f"dataset {show(name)} not found: there is no such file or folder {path_hint(path)}",
            code="dataset-not-found",
        )
    return [os.path.abspath(match) for match in matches]


def _kind(path: str) -> str | None:
    stem = path.lower()
    for ending in COMPRESSED:
        stem = stem.removesuffix(ending)
    return LOADERS.get(Path(stem).suffix)


def kind_of(name: str, files: Sequence[str]) -> str:
    kinds = {_kind(path) for path in files}
    found = listing(sorted({Path(path).suffix.lower() or "none" for path in files}))
    kind = kinds.pop()
    if kind is None or None in kinds:
        raise DataError(
            f"dataset {show(name)} has file type {found}; use one of {listing(LOADERS)}, a folder, or a Hub id",
            code="unknown-file-type",
        )
    if kinds:
        raise DataError(
            f"dataset {show(name)} has files of several types, {found}: name those of one, as in `FOLDER/*.jsonl`",
            code="unknown-file-type",
        )
    return kind


def visible_files(folder: str) -> list[str]:
    """Files of known types, as `datasets` sees them: without hidden ones and those that describe the dataset."""
    found = []
    for file in sorted(Path(folder).rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in parts) or file.name in _DESCRIPTIONS
        if not hidden and _kind(file.name) and file.is_file():
            found.append(os.path.abspath(file))
    return found


def folder_splits(folder: str, files: Sequence[str], config: str | None) -> dict[str, list[str]]:
    """split -> files of a folder, as `datasets` tells them from their names.

    It is asked about a folder of empty files with these names in small letters: it does not know file types in
    capitals, and reads a `[` in the folder's own name as a wildcard.

    Args:
        folder: the folder.
        files: its files, of one type.
        config: as in `datasets.load_dataset`.
    """
    import datasets

    with tempfile.TemporaryDirectory() as copy:
        copy = os.path.realpath(copy)
        names: dict[str, str] = {}
        for number, file in enumerate(files):
            stand_in = Path(copy, os.path.relpath(file, folder).lower())
            if stand_in.exists():
                stand_in = stand_in.with_name(f"{number}-{stand_in.name}")
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.touch()
            names[str(stand_in)] = file
        found = datasets.load_dataset_builder(copy, name=config).config.data_files
        return {str(split): [names[str(path)] for path in paths] for split, paths in found.items()}


class Tables(NamedTuple):
    """What files hold.

    Attributes:
        parts: split -> rows.
        is_json: whether the rows have one column, `text`, with a JSON value each.
        undecodable: whether bytes that are not UTF-8 were replaced by U+FFFD.
    """

    parts: dict[str, Dataset]
    is_json: bool
    undecodable: bool


def read_files(name: str, kind: str, files: Mapping[str, Sequence[str]]) -> Tables:
    """Read local files of one kind. Empty files have no rows.

    Args:
        name: the dataset's name, for messages.
        kind: a value of `LOADERS`.
        files: split -> files.

    Raises:
        DataError: files are UTF-16, JSON documents are damaged, or the columns of CSV files differ.
    """
    import datasets

    filled = {key: [path for path in paths if os.path.getsize(path)] for key, paths in files.items()}
    filled = {key: paths for key, paths in filled.items() if paths}
    every = [path for paths in filled.values() for path in paths]
    if not every:
        return Tables({key: datasets.Dataset.from_dict({"text": []}) for key in files}, False, False)
    for path in every:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(
                f"cannot read dataset {show(path)}: it is UTF-16; save the file as UTF-8", code="unreadable-dataset"
            )
        if start == _LFS_POINTER:
            raise DataError(
                f"cannot read dataset {show(path)}: it only points to a file in Git LFS; mend the file with "
                "`git lfs pull`",
                code="unreadable-dataset",
            )
    if kind == "json" and not all(is_json_lines(path) for path in every):
        documents = {key: document_rows(paths) for key, paths in filled.items()}
        if set(documents) == {TRAIN}:  # a document may name splits
            texts = documents[TRAIN]
        else:
            texts = {key: [row for rows in found.values() for row in rows] for key, found in documents.items()}
        return Tables({key: datasets.Dataset.from_dict({"text": rows}) for key, rows in texts.items()}, True, False)
    schema, options = _csv_options(name, every) if kind == "csv" else (None, {})
    parts, undecodable = _read(name, "text" if kind == "json" else kind, filled, schema, options)
    if kind in ("json", "text"):
        parts = {key: _without_blank(part) for key, part in parts.items()}
    return Tables(parts, kind == "json", undecodable)


def _read(
    name: str, loader: str, files: Mapping[str, Sequence[str]], schema: Features | None, options: Mapping[str, Any]
) -> tuple[dict[str, Dataset], bool]:
    """Read files with a loader of `datasets`. Returns split -> rows, and whether bytes that are not UTF-8 were
    replaced."""
    import datasets

    escaped = {key: [glob.escape(path) for path in paths] for key, paths in files.items()}
    if loader not in ("text", "csv"):
        return dict(datasets.load_dataset(loader, data_files=escaped)), False
    import pandas

    options = {"encoding": "utf-8-sig", **options}
    while True:
        try:
            found = datasets.load_dataset(loader, data_files=escaped, features=schema, **options)
            return dict(found), "encoding_errors" in options
        except datasets.exceptions.DatasetGenerationError as error:
            cause = error.__cause__
            if isinstance(cause, UnicodeDecodeError) and "encoding_errors" not in options:
                options["encoding_errors"] = "replace"
            elif isinstance(cause, pandas.errors.ParserError) and "on_bad_lines" not in options:
                options["on_bad_lines"] = "skip"
                LOG.warning("lines of %s cannot be used, and are left out; the first: %s", show(name), show(cause))
            else:
                raise


def _csv_options(name: str, files: Sequence[str]) -> tuple[Features, dict[str, Any]]:
    """Column types and options that keep every cell as it is written: only an empty one is missing.

    Raises:
        DataError: the files have different columns.
    """
    import datasets
    import pandas

    def first_row(path: str, separator: str) -> pandas.DataFrame:
        return pandas.read_csv(path, sep=separator, nrows=1, encoding="utf-8-sig", encoding_errors="replace")

    separators = ["\t"] if ".tsv" in Path(files[0].lower()).suffixes else [",", ";", "\t"]
    separator = next((mark for mark in separators if len(first_row(files[0], mark).columns) > 1), separators[0])
    columns = list(first_row(files[0], separator))
    for path in files:
        row = first_row(path, separator)
        if not isinstance(row.index, pandas.RangeIndex):  # pandas would take the first cell for the row's name
            raise DataError(
                f"cannot read dataset {show(path)}: its rows have more cells than its first line has names; mend the "
                "file",
                code="unreadable-dataset",
            )
        if set(row) != set(columns):
            raise DataError(
                f"cannot load dataset {show(name)}: {show(path)} has other columns than {show(files[0])}, "
                f"{listing(columns)}; name one of them",
                code="unreadable-dataset",
            )
    schema = datasets.Features({column: datasets.Value("string") for column in columns})
    return schema, {"sep": separator, "keep_default_na": False, "na_values": [""]}


def _without_blank(part: Dataset) -> Dataset:
    """The lines that are not blank."""
    import pyarrow.compute

    keep = pyarrow.compute.match_substring_regex(part.data.column("text"), r"\S")
    if pyarrow.compute.all(keep).as_py() in (True, None):
        return part
    return part.select(pyarrow.compute.indices_nonzero(keep).to_pylist())
