"""Names of a merge's models and datasets that may be published: ids on the Hub, and the last part of local paths.

Scope: names, from an alphas file and from what its merge recorded of their sources.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.merge_record import Source, Sources

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|[ct]sv|parquet|arrow|txt)(\.\w+)?$", re.IGNORECASE)
_SEPARATOR = re.compile(r"[/\\]+")


@dataclass(frozen=True)
class PublicNames:
    """Names without local paths.

    Attributes:
        models: name in the alphas file -> name to show, of the base, too.
        hub_models: name in the alphas file -> its ids on the Hub, as far as the merge recorded them.
        hub_datasets: the recorded ids of datasets on the Hub.
        local_datasets: datasets that the merge recorded as local.
    """

    models: Mapping[str, str]
    hub_models: Mapping[str, tuple[str, ...]]
    hub_datasets: tuple[str, ...] = ()
    local_datasets: frozenset[str] = frozenset()

    @classmethod
    def of(cls, base: str, models: Sequence[str], sources: Sources | None = None) -> PublicNames:
        """Choose the names of a file's models.

        Args:
            base, models: the names in the file.
            sources: what the merge recorded. Without it, a name that is like a Hub id and is no folder here counts as
                one, but is not linked.
        """
        sources = sources or Sources()
        parts = {label: _parts(label, sources.models.get(label)) for label in (base, *models)}
        local = dict.fromkeys(text for pairs in parts.values() for text, hub in pairs if hub is None)
        short = dict(zip(local, last_parts(list(local)), strict=True))
        shown = {
            label: " + ".join(short[text] if hub is None else hub for text, hub in pairs)
            for label, pairs in parts.items()
        }
        recorded = {label: tuple(filter(None, source.hub)) for label, source in sources.models.items()}
        datasets = {name: source.hub[:1] != (None,) for name, source in sources.datasets.items()}
        return cls(
            shown,
            {label: ids for label, ids in recorded.items() if ids and all(map(_HUB_ID.fullmatch, ids))},
            tuple(name for name, on_hub in datasets.items() if on_hub and _HUB_ID.fullmatch(name)),
            frozenset(name for name, on_hub in datasets.items() if not on_hub),
        )

    @classmethod
    def of_alphas(cls, alphas: Alphas, sources: Sources | None = None) -> PublicNames:
        """Choose the names of an alphas file's models."""
        return cls.of(alphas.base_model, alphas.models, sources)

    def model(self, label: object) -> str:
        """The name of a model to show."""
        text = str(label)
        return self.models.get(text) or (text if _is_like_hub_id(text) else last_parts([text])[0])

    def dataset(self, name: object) -> str:
        """The name of a dataset to show: an id on the Hub, or the last part of a path."""
        text = str(name)
        is_local = text in self.local_datasets or not (text in self.hub_datasets or _is_like_hub_id(text))
        return last_parts([text])[0] if is_local else text


def last_parts(paths: Sequence[str]) -> list[str]:
    """The last part of each path; with as many parts before it as make the names different."""
    parts = [[part for part in _SEPARATOR.split(path) if part not in ("", ".", "..", "~")] or ["model"]
             for path in paths]  # fmt: skip
    names = [each[-1:] for each in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        joined = ["/".join(name) for name in names]
        names = [part[-depth:] if joined.count(name) > 1 else kept
                 for part, name, kept in zip(parts, joined, names, strict=True)]  # fmt: skip
    return [show("/".join(name), 120) for name in names]


def _parts(label: str, source: Source | None) -> list[tuple[str, str | None]]:
    """A model, and its adapter: (name in the file, name on the Hub or None)."""
    texts = label.split("+")
    if source is not None and len(source.hub) == len(texts):
        return [
            (text, text if hub and text.startswith(f"{hub}@") else hub)
            for text, hub in zip(texts, source.hub, strict=True)
        ]
    return [(text, text if _is_like_hub_id(text) else None) for text in texts]


def _is_like_hub_id(text: str) -> bool:
    name = text.partition("@")[0]
    return "/" in name and bool(_HUB_ID.fullmatch(name)) and not (_DATA_FILE.search(text) or os.path.exists(text))
