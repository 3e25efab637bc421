"""Find out which models and datasets of a merge are on the Hub, and what the cards of its models say of their licence.

Scope: done while the models are at hand; the model card is written from what is recorded here.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load
from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_slta.checkpoints.hub import is_local
from mergekit_slta.data.local_files import LOADERS
from mergekit_slta.files.merge_record import Source, Sources
from mergekit_slta.files.names import CARD_NAME
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF

_LICENSE_KEYS = ("license", "license_name", "license_link")
_SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")
"""Ends the path of a model in the Hub library's own cache."""


def sources_of(recipe: Recipe, options: MergeOptions) -> Sources:
    """Where the models and datasets of a recipe come from.

    Args:
        recipe: as it was read, before adapters are merged into copies.
        options: mergekit's options; they name the folder of the cache.
    """
    models = {}
    for model in recipe.models:
        parts = [part for part in (model.model, model.lora) if part is not None]
        stated = _stated_license(parts[-1], options.transformers_cache)
        models[recipe.label(model)] = Source(hub=tuple(map(_hub_id, parts)), license=stated)
    names = {task.dataset for task in recipe.tasks} - {None, SELF}
    datasets = {name: Source(hub=(name if _is_hub_data(name) else None,)) for name in names}
    return Sources(models=models, datasets=datasets)


def _hub_id(part: ModelPath) -> str | None:
    if not is_local(part):
        return part.path
    cached = _SNAPSHOT.search(part.path)
    return f"{cached[1]}/{cached[2]}" if cached else None


def _is_hub_data(name: str) -> bool:
    """Whether a dataset is an id on the Hub; see `data.loading.load_rows`."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and Path(name).suffix.lower() not in LOADERS
    return bool(is_id) and not Path(name).exists()


def _stated_license(part: ModelPath, cache_dir: str | None) -> dict[str, str]:
    """The keys of a model's card that are about its licence; empty if it has none, or cannot be read."""
    try:
        path = Path(part.path, CARD_NAME)
        if not is_local(part):
            path = Path(hf_hub_download(part.path, CARD_NAME, revision=part.revision, cache_dir=cache_dir))
        stated = metadata_load(path) or {}
    except Exception:  # no card, one that is damaged, or a Hub that cannot be reached: the merge's card says so
        return {}
    return {key: str(stated[key]) for key in _LICENSE_KEYS if stated.get(key)}
