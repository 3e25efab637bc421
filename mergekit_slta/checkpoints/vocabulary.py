"""Check a recipe's `tokenizer` section against the models, and say what to write there where vocabularies differ.

Scope: the output's tokenizer as mergekit builds it, and numbers of embedding rows. mergekit itself would fail only
while it merges. No tensor is read.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_slta.checkpoints.tokenizers import load_tokenizer
from mergekit_slta.errors import DataError, ModelError, RecipeError, listing, show
from mergekit_slta.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import TokenizerInfo

LOG = logging.getLogger(__name__)
_MULTIPLES = (64, 128, 256, 512, 1024, 32, 16, 8)
"""Usual paddings of a vocabulary, the ones to propose first."""


def check_vocabulary(
    recipe: Recipe, info: TokenizerInfo, base_tokens: Container[str], rows: Mapping[ModelReference, int]
) -> None:
    """Check that mergekit finds a row for every token of the output in the models' embeddings.

    Args:
        recipe: the recipe.
        info: the output's tokenizer, and for every model where its tokens are.
        base_tokens: the tokens of the base's own tokenizer. mergekit adds those of `tokens` to it under `source: base`,
            and then takes rows of the base for them.
        rows: model -> number of rows of its embeddings.

    Raises:
        RecipeError: the section asks for a padding of less than 1, or for the embedding of a token from no model or
            from none of the recipe's.
        ModelError: a token has no row in the output's embeddings or in a model's, or a model lacks it.
    """
    section = recipe.config.tokenizer
    multiple = section.pad_to_multiple_of if section else None
    if multiple is not None and multiple < 1:
        raise RecipeError(
            f"`pad_to_multiple_of` of `tokenizer` is {show(multiple)}: use at least 1, or leave it out",
            code="invalid-value",
        )
    vocabulary = info.tokenizer.get_vocab()
    last = max(vocabulary.values())
    if last >= len(vocabulary):  # mergekit has a row per token, and fills the rows of a padding with their mean
        raise ModelError(
            f"token {last} of the merged tokenizer is beyond the {len(vocabulary)} rows of the merged embeddings, "
            "because its ids have gaps: use a tokenizer without gaps",
            code="token-out-of-range",
        )
    for model in recipe.models:
        lacking = [token for token, number in vocabulary.items() if number not in info.permutations[model]]
        if lacking:
            own = info.original_vocabs.get(model, info.original_vocabs[recipe.base])
            added = model == recipe.base and lacking[0] not in base_tokens
            remedy = "take `source: union`" if added else "use the tokenizer that belongs to these embeddings"
            raise ModelError(
                f"token {own[lacking[0]]} ({show(lacking[0], 40)}) of the tokenizer of {show(recipe.names[model])} is "
                f"beyond the {rows[model]} rows of its embeddings: {remedy}",
                code="token-out-of-range",
            )
    for token, entry in ((section.tokens if section else None) or {}).items():
        number = vocabulary.get(token)
        if number is None:  # a normalizer changed it
            raise _missing(token, token, "the merged tokenizer")
        if entry.force or any(info.permutations[model][number] < 0 for model in recipe.models):
            _check_source(recipe, info, base_tokens, rows, token, entry.source)
        if token not in base_tokens and info.permutations[recipe.base][number] >= 0 and not entry.force:
            LOG.warning(
                "the base has no token %s, and mergekit takes a row of its padding for it: `force: true` or "
                "`source: union` take that of the token's own `source`",
                show(token, 40),
            )


def _check_source(
    recipe: Recipe,
    info: TokenizerInfo,
    base_tokens: Container[str],
    rows: Mapping[ModelReference, int],
    token: str,
    source: Any,
) -> None:
    """Check that the embedding of `token` can be taken from `source`, one of the kinds of mergekit's configuration."""
    if getattr(source, "kind", None) == "zero":
        return
    model = source if isinstance(source, ModelReference) else getattr(source, "model", None)
    names = listing(recipe.names.values())
    if model is None:
        raise RecipeError(
            f"`tokenizer.tokens` has no `source` for {show(token, 40)}, which not every model has: name one of {names}",
            code="missing-value",
        )
    if model not in recipe.names:
        raise RecipeError(
            f"{show(model)}, from which `tokenizer.tokens` takes {show(token, 40)}, is none of the models: "
            f"name one of {names}",
            code="unknown-model",
        )
    name = recipe.names[model]
    number = getattr(source, "token_id", None)
    if number is not None:
        if not 0 <= number < rows[model]:
            raise ModelError(
                f"token {number}, which `tokenizer.tokens` names, is beyond the {rows[model]} rows of {show(name)}: "
                "name another `token_id`",
                code="token-out-of-range",
            )
        return
    wanted = token if source is model else source.token
    if wanted not in (base_tokens if model == recipe.base else info.original_vocabs.get(model, ())):
        raise _missing(token, wanted, name)


def _missing(token: str, wanted: str, name: str) -> ModelError:
    return ModelError(
        f"`tokenizer.tokens` takes {show(token, 40)} from {show(wanted, 40)} of {show(name)}, which has no such token: "
        "name another model or token",
        code="missing-token",
    )


def shared_vocabulary(recipe: Recipe, base: PretrainedConfig, options: MergeOptions) -> dict[str, object]:
    """The `tokenizer` section with which models of different vocabularies merge over the base's.

    mergekit makes as many rows as the tokenizer has tokens. A base with more rows keeps their number by padding.
    """
    section: dict[str, object] = {"source": "base"}
    try:
        rows, tokens = int(base.vocab_size), len(load_tokenizer(recipe, options)[0].get_vocab())
        if tokens < rows:
            multiple = next((size for size in _MULTIPLES if -(-tokens // size) * size == rows), rows)
            section["pad_to_multiple_of"] = multiple
    except (DataError, TypeError):  # no tokenizer: another message says so
        pass
    return section


def vocabulary_advice(recipe: Recipe, base: PretrainedConfig, options: MergeOptions) -> str:
    """What to add to a recipe whose models have different vocabularies."""
    section = ", ".join(f"{key}: {value}" for key, value in shared_vocabulary(recipe, base, options).items())
    return f"the vocabularies differ: add `tokenizer: {{{section}}}` to the recipe"
