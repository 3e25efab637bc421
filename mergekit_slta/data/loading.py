"""Load datasets from files, folders, glob patterns and the Hub, with the library `datasets`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_slta.errors import DataError, listing, show

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""File type -> name of the loader in `datasets`."""


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """Load a dataset.

    Args:
        name: a file, a folder, a glob pattern, or an id on the Hub.
        config, split: passed to `datasets.load_dataset`.

    Raises:
        DataError: the dataset or split does not exist, the file type is unknown, or there are no rows.
    """
    import datasets

    arguments = _load_arguments(name, config)
    try:
        with _no_progress_bars():
            rows = datasets.load_dataset(**arguments, split=split)
            if arguments["path"] == "text":  # every line is a row; blank lines are skipped
                rows = rows.filter(lambda row: bool(row["text"].strip()))
    except Exception as error:  # `datasets`, fsspec, pyarrow and the Hub raise different errors
        cause = error.__cause__ or error
        reason = show(cause, 300) or type(cause).__name__
        raise DataError(
            f"cannot load dataset {show(name)} (config {show(config)}, split {show(split)}): {reason}; "
            "check `dataset`, `dataset_config` and `split`",
            code="unreadable-dataset",
        ) from error
    if len(rows) == 0:
        raise DataError(
            f"dataset {show(name)}, split {show(split)}, has no rows: choose another `dataset` or `split`",
            code="too-few-rows",
        )
    return rows


def _load_arguments(name: str, config: str | None) -> dict[str, Any]:
    """Arguments for `datasets.load_dataset`; a path that exists on disk takes precedence over the Hub."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return {"path": path, "name": config}
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path] * os.path.isfile(path)
    if not matches:
        looks_local = glob.has_magic(path) or Path(path).suffix in LOADERS or path.startswith((".", "/", "~"))
        if looks_local or path.count("/") > 1:
            raise DataError(
                f"dataset {show(name)} not found: no such file or folder (paths start at the current one)",
                code="dataset-not-found",
            )
        return {"path": name, "name": config}
    kinds = {Path(match).suffix.lower() for match in matches}
    if len(kinds) > 1 or not kinds <= LOADERS.keys():
        raise DataError(
            f"dataset {show(name)} has file type {listing(sorted(kinds))}; use one of {listing(LOADERS)}, "
            "a folder, or a Hub id",
            code="unknown-file-type",
        )
    return {"path": LOADERS[kinds.pop()], "data_files": [os.path.abspath(match) for match in matches]}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of `datasets`; this package draws its own."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bar()
