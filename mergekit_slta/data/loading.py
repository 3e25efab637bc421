"""Datasets from files, folders, glob patterns and the Hub, as `datasets` reads them."""

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
        config, split: as `datasets.load_dataset` takes them.

    Raises:
        DataError: nothing is there, the file type is unknown, the split does not exist, or there are no rows.
    """
    import datasets

    arguments = _load_arguments(name, config)
    try:
        with _no_progress_bars():
            rows = datasets.load_dataset(**arguments, split=split)
            if arguments["path"] == "text":  # every line is a row; blank ones are left out
                rows = rows.filter(lambda row: bool(row["text"].strip()))
    except Exception as error:  # `datasets` raises its own errors, fsspec's, pyarrow's and the Hub's
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
    """Arguments of `datasets.load_dataset`; what exists on disk goes before the Hub."""
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
    """Switch off the bars that `datasets` draws while it converts a file; this package draws its own."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bar()
