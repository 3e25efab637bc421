"""Checkpoints on the Hub before they are downloaded: files, sizes, names and headers of tensors.

Scope: file metadata, small files (an index of shards, configs), and range reads of headers. Only `fetch` downloads
weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import tqdm
from mergekit.common import ModelPath

from mergekit_slta.checkpoints.headers import TensorHeader
from mergekit_slta.checkpoints.hub_errors import explain
from mergekit_slta.errors import ModelError, OutputError, show
from mergekit_slta.files.output_folder import free_bytes
from mergekit_slta.libraries.mergekit import ShardedTensorIndex, ShardInfo

_SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Configs, index files and tokenizers. mergekit copies some of them to the output."""
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Names of weights files, the preferred ones first."""
_THREADS = 8


class Download(NamedTuple):
    """A model or adapter that is not in the cache: its name, the bytes to download, and the cache's folder."""

    name: str
    num_bytes: int
    folder: str


@dataclass
class HubIndex(ShardedTensorIndex):
    """mergekit's index of a checkpoint whose weights have not been downloaded.

    The names of the tensors in a single pickled file are not known: `tensor_paths` is then empty.

    Attributes:
        headers: shard -> tensor name -> header; empty for pickled checkpoints.
        sizes: shard -> bytes.
        download: what `fetch` would download.
    """

    headers: dict[str, dict[str, TensorHeader]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    download: Download | None = None

    def name_tensors(self, names: Iterable[str]) -> None:
        """Assume that a single pickled file holds these tensors."""
        (shard,) = self.shards
        shard.contained_keys[:] = names
        self.tensor_paths.update(dict.fromkeys(shard.contained_keys, shard.filename))


@dataclass(frozen=True)
class HubFiles:
    """The files of a model that a merge reads, some of which are not in the cache.

    Attributes:
        model: the id and the revision.
        commit: the revision's commit.
        cache_dir: folder of the cache.
        sizes: file -> bytes.
        missing: the files that are not in the cache.
        weights: the weights files of the checkpoint, a subset of `sizes`.
        tensor_paths: tensor name -> weights file, if the checkpoint has an index.
    """

    model: ModelPath
    commit: str
    cache_dir: str
    sizes: dict[str, int]
    missing: frozenset[str]
    weights: tuple[str, ...]
    tensor_paths: dict[str, str]

    @property
    def download(self) -> Download:
        """What `fetch` would download."""
        return Download(str(self.model), sum(self.sizes[name] for name in self.missing), self.cache_dir)


def is_local(model: ModelPath) -> bool:
    """Whether a model or adapter is a folder on this machine; all others are looked up on the Hub."""
    return os.path.exists(model.path)


def adapter_folder(model: ModelPath) -> str | None:
    """The folder in the cache with an adapter's settings, if the id is an adapter's."""
    try:
        return os.path.dirname(hf_hub_download(model.path, "adapter_config.json", revision=model.revision))
    except Exception:  # there is none, or the Hub cannot be asked
        return None


def find_files(model: ModelPath, cache_dir: str | None = None) -> str | HubFiles:
    """Find a model's files.

    Args:
        model: a folder, or an id on the Hub with an optional revision.
        cache_dir: folder of the cache of downloads; by default the Hub library's own.

    Returns:
        The folder that holds the files: the model's own, or one in the cache. If a file is not in the cache, the list
        of files on the Hub.

    Raises:
        ModelError: there is no such model, it may not be read, it holds no weights, or the Hub cannot be reached and
            the cache does not hold the model.
    """
    if is_local(model):
        return model.path
    place = cache_dir or constants.HF_HUB_CACHE
    with explain(model):
        try:
            listed = snapshot_download(
                model.path,
                revision=model.revision,
                cache_dir=cache_dir,
                allow_patterns=[*_SMALL, *(f"*.{suffix}" for _, suffix in _WEIGHTS)],
                tqdm_class=_Quiet,
                dry_run=True,
            )
        except Exception as error:  # the Hub is switched off, cannot be reached, or refuses
            return _cached(model, cache_dir, error)
        entries = {entry.filename: entry for entry in listed}
        commit = listed[0].commit_hash if listed else ""
        weights, tensor_paths = _weights(model, set(entries), commit, cache_dir)
        needed = [name for name in entries if not name.endswith(tuple(suffix for _, suffix in _WEIGHTS))] + weights
        files = HubFiles(
            model,
            commit,
            place,
            {name: entries[name].file_size or 0 for name in needed},
            frozenset(name for name in needed if entries[name].will_download),
            tuple(weights),
            tensor_paths,
        )
        return files if files.missing & set(weights) else fetch(files)


def _cached(model: ModelPath, cache_dir: str | None, cause: Exception) -> str:
    """The folder of a model in the cache, for when the Hub cannot be asked."""
    try:
        folder = snapshot_download(model.path, revision=model.revision, cache_dir=cache_dir, local_files_only=True)
        index = ShardedTensorIndex.from_disk(folder)
        if all(os.path.isfile(os.path.join(folder, shard.filename)) for shard in index.shards):
            return folder
    except (OSError, RuntimeError):  # not in the cache, or without weights
        pass
    raise cause


def _weights(model: ModelPath, names: set[str], commit: str, cache_dir: str | None) -> tuple[list[str], dict[str, str]]:
    """The weights files of a checkpoint that mergekit reads, and tensor name -> file if there is an index."""
    for stem, suffix in _WEIGHTS:
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if single in names:
            return [single], {}
        if index in names:
            path = hf_hub_download(model.path, index, revision=commit, cache_dir=cache_dir)
            tensor_paths: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(tensor_paths.values()))
            lacking = [shard for shard in shards if shard not in names]
            if lacking:
                raise ModelError(
                    f"{show(lacking[0])} of {show(model)} is missing or corrupt (it is not on the Hub); fetch it again",
                    code="corrupt-checkpoint",
                )
            return shards, tensor_paths
    raise ModelError(
        f"cannot open the checkpoint of {show(model)} (it has neither safetensors nor .bin weights on the Hub): "
        "a file is missing or corrupt, fetch it again",
        code="unreadable-checkpoint",
    )


def fetch(files: HubFiles) -> str:
    """Download the files that are not in the cache; returns the folder that holds all of them.

    Raises:
        ModelError: the Hub cannot be reached, or refuses.
    """
    with explain(files.model):
        return snapshot_download(
            files.model.path, revision=files.commit, cache_dir=files.cache_dir, allow_patterns=list(files.sizes)
        )


def read_index(files: HubFiles) -> HubIndex:
    """Read the index of a checkpoint on the Hub, with the headers of its safetensors files.

    Raises:
        ModelError: the Hub cannot be reached, or a file is damaged.
    """
    safe = all(name.endswith(".safetensors") for name in files.weights)
    headers: dict[str, dict[str, TensorHeader]] = {}
    if safe:
        with ThreadPoolExecutor(_THREADS) as pool:
            read = pool.map(lambda name: read_header(files.model, name, files.commit, files.sizes[name]), files.weights)
            headers = dict(zip(files.weights, read, strict=True))
    tensor_paths = files.tensor_paths or {name: shard for shard, header in headers.items() for name in header}
    return HubIndex(
        base_path=f"{constants.ENDPOINT}/{files.model.path}",
        is_safetensors=safe,
        tensor_paths=tensor_paths,
        shards=[
            ShardInfo(shard, [name for name, path in tensor_paths.items() if path == shard]) for shard in files.weights
        ],
        headers=headers,
        sizes={name: files.sizes[name] for name in files.weights},
        download=files.download,
    )


def read_header(model: ModelPath, name: str, commit: str, size: int) -> dict[str, TensorHeader]:
    """Tensor name -> header, of a safetensors file on the Hub. Byte ranges count from the end of the header.

    Args:
        model: the id.
        name: the file.
        commit: commit of the id.
        size: bytes of the file.

    Raises:
        ModelError: the Hub cannot be reached, or the file is damaged.
    """
    try:
        with explain(model):
            found = HfApi().parse_safetensors_file_metadata(model.path, name, revision=commit).tensors
        headers = {
            key: TensorHeader(tuple(entry.shape), entry.dtype, *entry.data_offsets) for key, entry in found.items()
        }
        if 8 + max((header.stop for header in headers.values()), default=0) > size:
            raise ValueError("it is shorter than its header says")
    except ModelError:
        raise
    except Exception as error:  # httpx, the Hub's library and malformed headers raise different errors
        raise ModelError(
            f"{show(name)} of {show(model)} is missing or corrupt ({show(error)}); fetch it again",
            code="corrupt-checkpoint",
        ) from error
    return headers


def check_room(downloads: Sequence[Download], out: Path | None = None, out_bytes: int = 0) -> None:
    """Check that downloads fit on the disk of the cache, together with what is written to `out` if it is the same disk.

    Raises:
        OutputError: there is too little space; the message gives the needed and the free bytes.
    """
    needed: dict[int, int] = {}
    for place, num_bytes in [(Path(load.folder), load.num_bytes) for load in downloads]:
        disk = _disk(place)
        needed[disk] = needed.get(disk, 0) + num_bytes
        total = needed[disk] + (out_bytes if out is not None and disk == _disk(out) else 0)
        if total > (free := free_bytes(place)):
            beside = " for downloads and the output" if total > needed[disk] else " for downloads"
            raise OutputError(
                f"{show(place)} needs {total / 2**30:.1f} GiB{beside} and its disk has {free / 2**30:.1f} GiB left: "
                "free some, or choose another cache with --transformers-cache or HF_HOME",
                code="disk-full",
            )


def _disk(folder: Path) -> int:
    """Number of the disk that holds a folder, which need not exist."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()).stat().st_dev


class _Quiet(tqdm):
    """No progress bar: looking at metadata takes a moment."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
