"""The output folder: whose weights are in it, and how a merge replaces them without ever leaving a mixture.

Scope: files of OUT, no tensors. mergekit neither refuses nor clears a folder that holds a model: a one-file model left
beside a new sharded one silently wins in `from_pretrained`. A small record, `slta_merge.json`, says which weight files
a merge of this package wrote; any other weights are somebody's, and refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_slta.errors import OutputError, listing, show
from mergekit_slta.files import write_text_atomically

ALPHAS_NAME = "slta_alphas.json"
STATISTICS_NAME = "slta_stats.safetensors"
RECORD_NAME = "slta_merge.json"
FORMAT = "mergekit-slta/merge"
_ASIDE = ".slta_previous"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?$")


def weight_files(out: Path) -> list[str]:
    """Names of weight and index files in a folder, this package's statistics apart."""
    if not out.is_dir():
        return []
    names = (entry.name for entry in os.scandir(out))
    return sorted(name for name in names if _WEIGHTS.match(name) and name != STATISTICS_NAME)


def check_output(out: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder in which a merge would do harm.

    Args:
        out: the output folder; need not exist.
        inputs: paths of the models that are merged.

    Raises:
        OutputError: it is a file, cannot be written to, is one of the inputs, or holds weights that no merge of this
            package recorded.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {show(out)} is a file: name a folder")
    if any(os.path.exists(path) and out.exists() and os.path.samefile(path, out) for path in inputs):
        raise OutputError(f"the output {show(out)} is one of the models to merge: name another folder")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {show(existing)}: choose a folder that you may write to")
    recover(out)
    foreign = _foreign(out)
    if foreign:
        raise OutputError(
            f"{show(out)} holds weights of another origin ({listing(foreign, 3)}): "
            "name another folder, or move them away"
        )


def _foreign(out: Path) -> list[str]:
    found = weight_files(out)
    if not found:
        return []
    record = _read_record(out)
    if record is None:
        return found
    if not record["complete"]:  # a merge died; it had begun in a folder without weights of others
        return []
    return [name for name in found if record["weights"].get(name) != (out / name).stat().st_size]


def _read_record(folder: Path) -> dict | None:
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("weights"), dict)
    return record if sound and isinstance(record.get("complete"), bool) else None


def _write_record(out: Path, *, complete: bool) -> None:
    weights = {name: (out / name).stat().st_size for name in weight_files(out)} if complete else {}
    content = {"format": FORMAT, "version": 1, "merge": os.urandom(8).hex(), "complete": complete, "weights": weights}
    write_text_atomically(out / RECORD_NAME, json.dumps(content, indent=1) + "\n")


def recover(out: Path) -> None:
    """Finish or undo a replacement that was killed half-way, so that OUT holds one merge's weights or none."""
    aside = out / _ASIDE
    if not aside.is_dir():
        return
    before, now = _read_record(aside), _read_record(out)
    if before is not None and (now is None or not now["complete"]):  # killed while merging
        _drop_weights(out)
        _move(aside, out)
    elif before is not None and now == before:  # killed while moving aside
        _move(aside, out)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replacing_weights(out: Path) -> Iterator[None]:
    """Move weights of an earlier merge aside, and remove them after success; put them back after failure."""
    aside = out / _ASIDE
    record = _read_record(out)
    if record is not None and record["complete"]:
        aside.mkdir(exist_ok=True)
        shutil.copy2(out / RECORD_NAME, aside / RECORD_NAME)  # first: `recover` goes by it
        for name in weight_files(out):
            os.replace(out / name, aside / name)
    else:
        _drop_weights(out)  # what a killed merge left; `check_output` has refused everything else
    _write_record(out, complete=False)
    try:
        yield
        _write_record(out, complete=True)
    except BaseException:
        _drop_weights(out)
        if aside.is_dir():
            _move(aside, out)
        else:
            (out / RECORD_NAME).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _drop_weights(out: Path) -> None:
    for name in weight_files(out):
        (out / name).unlink(missing_ok=True)


def _move(aside: Path, out: Path) -> None:
    for entry in sorted(aside.iterdir(), key=lambda entry: entry.name == RECORD_NAME):  # the record last
        os.replace(entry, out / entry.name)


def free_bytes(out: Path) -> int:
    """Bytes left on the disk that `out` is or will be on."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
