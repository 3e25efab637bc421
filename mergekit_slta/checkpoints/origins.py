"""What a model says of itself: whether it is an adapter, what it was fine-tuned from, and which data it names.

Scope: an adapter's settings, the front matter of a model card, `config.json`. No weights are read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelPath, ModelReference

from mergekit_slta.checkpoints.hub import is_local
from mergekit_slta.checkpoints.hub_errors import explain
from mergekit_slta.checkpoints.tokenizers import text_of
from mergekit_slta.errors import ModelError, path_hint, show
from mergekit_slta.files.names import ADAPTER_CONFIG_NAME, CARD_NAME, CONFIG_NAME, INDEX_ENDING, WEIGHTS_NAMES
from mergekit_slta.recipe.settings import Dtype

LOG = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A name that may be an id on the Hub, with or without an owner."""
_CACHED = re.compile(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\][^/\\]+")
"""A folder of the Hub's cache; the group is the model's name."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""Every training has folders of such names."""

_QUANTIZED = re.compile(r"(-unsloth)?-(bnb-)?[48]bit$|-(gptq|awq)$")
"""Ends the names of quantized copies of a model, on which adapters are trained."""


@dataclass(frozen=True)
class Origin:
    """What a model says of itself.

    Attributes:
        name: the model as it was given, without a slash at its end.
        is_adapter: whether it is an adapter without its base.
        base: what it was fine-tuned from, as it says; None if it does not say so, or names several.
        said_by: the file that names the base, for messages.
        is_sure: whether that file is about fine-tuning. `config.json` only names where a model was loaded from.
        datasets: the datasets that its card names.
    """

    name: str
    is_adapter: bool = False
    base: str | None = None
    said_by: str = ""
    is_sure: bool = True
    datasets: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The last part of the name."""
        return last_part(self.name)


def last_part(name: str) -> str:
    """The last part of a path, an id or `base+adapter`; of a folder in the Hub's cache, the model's name."""
    name = name.rpartition("+")[2]
    name = os.path.abspath(name) if os.path.isdir(name) else name.rstrip("/\\")
    cached = _CACHED.search(name)
    return cached[1] if cached else re.split(r"[/\\]", name)[-1].partition("@")[0]


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: the same folder, or the same last part unless both are folders here."""
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other)
    part, other_part = (_QUANTIZED.sub("", last_part(name).lower()) for name in (one, other))
    return part == other_part and not _CHECKPOINT.fullmatch(part)


def read_origin(name: str) -> Origin:
    """Read what a model says of itself.

    Args:
        name: a folder, an id on the Hub, or mergekit's `base+adapter`.

    Raises:
        ModelError: there is no such model, or the Hub cannot be reached and the cache does not hold the model.
    """
    name = name.rstrip("/\\") or name
    place = _path(name)
    if "+" in name and not os.path.isdir(name):
        base, _, adapter = name.rpartition("+")
        if not (base and adapter):
            raise missing_folder(name)
        card = _front_matter(_path(adapter), name)
        return Origin(name, False, base, "its name", True, _datasets(card, adapter))
    files = _files(place)
    weights = {stem + ending for stem in WEIGHTS_NAMES for ending in ("", INDEX_ENDING)}
    is_adapter = ADAPTER_CONFIG_NAME in files and not files & weights
    card = _front_matter(place, name) if CARD_NAME in files else {}
    base, said_by, is_sure = None, "", True
    if is_adapter:
        base, said_by = _text(_json(place, ADAPTER_CONFIG_NAME), "base_model_name_or_path"), "its adapter_config.json"
    if base is None:
        base, said_by = _base_in(card), "its card"
    if base is None and not is_adapter:
        base, said_by, is_sure = _text(_json(place, CONFIG_NAME), "_name_or_path"), "its config.json", False
        if base is not None and same_model(base, name):
            base = None
    return Origin(name, is_adapter, base, said_by if base else "", is_sure, _datasets(card, name))


def is_usable(name: str) -> bool:
    """Whether a name is a folder here or may be an id on the Hub."""
    return bool(HUB_ID.fullmatch(name)) or os.path.isdir(name)


def missing_folder(name: str) -> ModelError:
    """The error for a path that leads to no folder."""
    return ModelError(f"there is no model folder {show(name)} {path_hint(name)}: check the path", code="missing-model")


def config_dtype(name: str) -> str | None:
    """The dtype in the config of a model ("bfloat16"); None if there is none, or it cannot be merged."""
    config = _json(_path(name), CONFIG_NAME)
    for part in (config, config.get("text_config")):
        found = part.get("dtype") or part.get("torch_dtype") if isinstance(part, Mapping) else None
        if isinstance(found, str) and found.removeprefix("torch.") in get_args(Dtype):
            return found.removeprefix("torch.")
    return None


def _path(name: str) -> ModelPath:
    """The place of a model; of `base+adapter`, the base's.

    Raises:
        ModelError: it is neither a folder here nor an id.
    """
    if os.path.isdir(name):
        return ModelPath(path=name)
    try:
        place = ModelReference.parse(name).model
    except (RuntimeError, ValueError) as error:  # mergekit's own
        raise missing_folder(name) from error
    if place.path.startswith((".", "/", "~")) and not os.path.isdir(place.path):
        raise missing_folder(name)
    return place


def _files(place: ModelPath) -> set[str]:
    """Names of a model's files.

    Raises:
        ModelError: there is no such model, or the Hub cannot be reached and the cache does not hold it.
    """
    if is_local(place):
        return set(os.listdir(place.path))
    with explain(place):
        try:
            return set(HfApi().list_repo_files(place.path, revision=place.revision))
        except HFValidationError as error:  # no id
            raise missing_folder(place.path) from error
        except Exception as error:  # the Hub is switched off, cannot be reached, or refuses
            try:
                return set(os.listdir(snapshot_download(place.path, revision=place.revision, local_files_only=True)))
            except (OSError, RuntimeError, ValueError):  # not in the cache
                pass
            if place.path.count("/") > 1:
                raise missing_folder(place.path) from error
            raise


def _json(place: ModelPath, name: str) -> Mapping[str, Any]:
    """The content of a model's JSON file; empty if it cannot be read, which `check` explains."""
    try:
        content = json.loads(text_of(place, name) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _front_matter(place: ModelPath, name: str) -> Mapping[str, Any]:
    """The front matter of a model's card; empty if there is none, or it is damaged."""
    text = text_of(place, CARD_NAME) or ""
    if not text.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        LOG.warning("the front matter of the card of %s cannot be read (%s): it is left out", show(name), show(error))
        return {}


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    return value.strip().rstrip("/\\") or None if isinstance(value, str) else None


def _base_in(card: Mapping[str, Any]) -> str | None:
    """The base that a card names; None if it names several, as that of a merge does."""
    found = card.get("base_model")
    names = found if isinstance(found, list) else [found]
    return _text({"base_model": names[0]}, "base_model") if len(names) == 1 else None


def _datasets(card: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """The datasets that a card names: ids of the Hub. The card of a folder here may name paths, too."""
    found = card.get("datasets")
    names = [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str)]
    is_here = os.path.isdir(model)
    fitting = [name for name in names if (is_here if os.path.exists(name) else HUB_ID.fullmatch(name))]
    return tuple(dict.fromkeys(fitting))
