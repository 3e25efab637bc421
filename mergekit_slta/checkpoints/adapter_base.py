"""Check that an adapter and the base that it is given belong together.

Scope: the adapter's settings and shapes against the base's config. `lora_adapter.py` compares with the base's tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from transformers import PretrainedConfig

from mergekit_slta.checkpoints.lora_adapter import Adapter
from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.peft import changes_weights

LOG = logging.getLogger(__name__)
_VOCABULARY = re.compile(
    r"(embed_tokens|wte|word_embeddings|embed_in|embed_out|lm_head)\."
    r"(?P<kind>(base_layer\.|modules_to_save\.)?weight|lora_embedding_A|lora_B\.weight)$"
)
"""Names of an adapter's tensors with a row (`lora_embedding_A`: a column) per token."""


def check_base(adapter: Adapter, base: str, config: PretrainedConfig, name: str) -> None:
    """Check an adapter's kind, and its vocabulary against its base's; warn if the adapter names another base.

    Args:
        adapter: the adapter.
        base: path or id of the base that it is given.
        config: the base's config.
        name: the reference in the recipe, for messages.

    Raises:
        ModelError: the adapter changes no weights, or has embeddings for more or fewer tokens.
    """
    kind = adapter.config.get("peft_type")
    if not changes_weights(kind):
        raise ModelError(
            f"the change of the adapter {show(name)} ({show(kind, 40)}) is not in the weights and cannot be "
            "merged: leave it out",
            code="cannot-merge-adapter",
        )
    rows = getattr(config, "vocab_size", None)
    for found in _vocabulary_sizes(adapter):
        if rows is not None and found != rows:
            raise ModelError(
                f"the adapter {show(name)} is for {found} tokens, and its base has {rows}: merge it with peft first "
                "(`resize_token_embeddings`, `merge_and_unload`, `save_pretrained`), and name that folder",
                code="differing-vocabularies",
            )
    indices = adapter.config.get("trainable_token_indices") or []
    groups = list(indices.values()) if isinstance(indices, dict) else [indices]
    highest = max((number for group in groups for number in group), default=-1)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the adapter {show(name)} is for {highest + 1} tokens or more, and its base has {rows}: merge it with "
            "peft first (`resize_token_embeddings`, `merge_and_unload`, `save_pretrained`), and name that folder",
            code="differing-vocabularies",
        )
    own = adapter.config.get("base_model_name_or_path")
    if own and not _alike(str(own), base):
        LOG.warning(
            "the adapter %s was trained on %s by its adapter_config.json, and is added to %s: right only if these are "
            "the same weights",
            show(name), show(own), show(base),
        )  # fmt: skip


def _vocabulary_sizes(adapter: Adapter) -> Iterator[int]:
    for key, shape in adapter.shapes.items():
        match = _VOCABULARY.search(key)
        if match and len(shape) == 2:
            yield shape[1] if match["kind"] == "lora_embedding_A" else shape[0]


def _alike(own: str, given: str) -> bool:
    """Whether two paths or ids may be of the same model: the last part of one is in the other.

    A folder of the Hub's cache has the id in it; a quantized base of the same weights has its name in front.
    """
    own, given = (re.sub(r"[\\/]+", "/", name).rstrip("/").lower() for name in (own, given))
    return own.rpartition("/")[2] in given or given.rpartition("/")[2] in own
