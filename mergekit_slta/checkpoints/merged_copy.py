"""Full copies of models with an adapter merged in, which mergekit keeps in `--lora-merge-cache` and finds by name.

Scope: the cache's folders. mergekit takes whatever folder it finds in a copy's place for a finished copy.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.errors import ModelError, show
from mergekit_slta.files.names import ADAPTER_CONFIG_NAME, CONFIG_NAME, INDEX_ENDING, WEIGHTS_NAMES
from mergekit_slta.libraries.mergekit import copy_place


def make_copy(model: ModelReference, options: MergeOptions, name: str) -> str:
    """Let mergekit merge an adapter into a full copy; returns its folder.

    The copy is made beside its place and moved there when it is whole; nothing is left of one that fails.

    Args:
        model: "base+adapter".
        options: mergekit's options, with a `lora_merge_cache`.
        name: the model's name in the recipe, for messages.

    Raises:
        ModelError: mergekit fails.
    """
    cache, place = str(options.lora_merge_cache), copy_place(model, options)
    made_cache = not os.path.isdir(cache)
    try:
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".merging-") as folder:
            copy = model.merged(folder, options.trust_remote_code, options.lora_merge_dtype)
            os.rename(copy.model.path, place)
    except BaseException as error:  # peft, transformers and the file system raise different errors
        if made_cache:
            with suppress(OSError):
                os.rmdir(cache)
        if not isinstance(error, Exception):
            raise
        raise ModelError(
            f"mergekit cannot merge the adapter {show(name)} into a copy ({show(error)}): merge it with peft first "
            "(`merge_and_unload`, `save_pretrained`), and name that folder",
            code="cannot-merge-adapter",
        ) from error
    return place


def existing_copy(model: ModelReference, options: MergeOptions, name: str) -> str | None:
    """The folder of a copy that was made earlier; None if there is none.

    Args:
        model, options, name: see `make_copy`.

    Raises:
        ModelError: the copy is not whole, or is older than the adapter or its base.
    """
    if model.lora is None or not options.lora_merge_cache:
        return None
    place = copy_place(model, options)
    if not os.path.exists(place):
        return None
    config = os.path.join(place, CONFIG_NAME)
    names = [whole + end for whole in WEIGHTS_NAMES for end in ("", INDEX_ENDING)]
    is_whole = os.path.isfile(config) and any(os.path.isfile(os.path.join(place, each)) for each in names)
    reason = None if is_whole else "is not whole"
    for source in (model.model.path, model.lora.path) if is_whole else ():
        for entry in os.scandir(source) if os.path.isdir(source) else ():
            is_read = entry.name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) or entry.name.endswith((".safetensors", ".bin"))
            if is_read and entry.stat().st_mtime > os.path.getmtime(config):
                reason = f"is older than {entry.path}"
    if reason:
        raise ModelError(
            f"the merged copy {show(place)} of {show(name)} {show(reason)}: remove it, and it is made again",
            code="stale-copy",
        )
    return place
