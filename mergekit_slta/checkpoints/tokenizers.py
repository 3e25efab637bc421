"""Load the output's tokenizer, and the tokenizer and chat template of each model.

Scope: tokenizer files. No weights are read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mergekit_slta.checkpoints.hub import is_local
from mergekit_slta.checkpoints.hub_errors import hub_problem
from mergekit_slta.checkpoints.weight_files import refuse_pointer
from mergekit_slta.data.templates import default_template
from mergekit_slta.errors import DataError, show
from mergekit_slta.libraries.mergekit import build_tokenizer
from mergekit_slta.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import TokenizerInfo


def load_tokenizer(recipe: Recipe, options: MergeOptions) -> tuple[PreTrainedTokenizerBase, TokenizerInfo | None]:
    """Load the merged model's tokenizer: the base's, or the one that mergekit builds if the recipe asks for one.

    Returns:
        The tokenizer, and what mergekit built (None if it is the base's own).

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    try:
        if recipe.config.tokenizer or recipe.config.tokenizer_source:
            info = build_tokenizer(recipe.config, recipe.models, options)
            tokenizer = info.tokenizer
        else:
            info, tokenizer = None, _load(recipe.base.model, options)
        if _is_blank(tokenizer):
            raise ValueError("its vocabulary holds no words")
    except Exception as error:
        if not is_local(recipe.base.model) and (problem := hub_problem(recipe.base.model, error)):
            raise problem from error
        folder = recipe.base.model.path
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith((".json", ".model")):  # tokenizer.json and tokenizer.model are large enough for Git LFS
                refuse_pointer(os.path.join(folder, name), recipe.names[recipe.base])
        section = recipe.config.tokenizer
        source = section.source if section else recipe.config.tokenizer_source
        owner = recipe.names[recipe.base] if source in (None, "base", "union") else source
        raise DataError(
            f"cannot load the tokenizer of {show(owner)}: {show(error)}; "
            "the base needs one, to read the calibration rows",
            code="unreadable-tokenizer",
        ) from error
    return tokenizer, info


class OwnTokenizer(NamedTuple):
    """What a model was trained with.

    Attributes:
        tokenizer: its tokenizer; None if there is none that can be read.
        template: its chat template; None if it has none.
        problem: why its tokenizer files cannot be read; None if they can, or if there are none.
    """

    tokenizer: PreTrainedTokenizerBase | None
    template: str | None
    problem: str | None = None


def own_tokenizer(model: ModelReference, options: MergeOptions) -> OwnTokenizer:
    """Load a model's tokenizer and chat template.

    An adapter's are in its own folder, if it has any; what it lacks is its base's.
    """
    template, problem = None, None
    for place in (model.lora, model.model):
        if place is None:
            continue
        try:
            tokenizer = _load(place, options)
        except Exception as error:  # no tokenizer files, damaged ones, remote code, the Hub's errors
            template = template or _template_beside(place)
            if _may_have_files(place):
                problem = problem or show(error)
            continue
        template = template or default_template(tokenizer)
        if not _is_blank(tokenizer):
            return OwnTokenizer(tokenizer, template)
    return OwnTokenizer(None, template, problem)


def differing_tokens(own: PreTrainedTokenizerBase, output: PreTrainedTokenizerBase) -> list[str]:
    """Tokens of a model that have another number in the output's vocabulary, or whose number is another token there.

    Sorted. Tokens that the output lacks, with numbers beyond its vocabulary, are left out.
    """
    numbers = output.get_vocab()
    tokens = {number: token for token, number in numbers.items()}
    return sorted(
        str(token)  # bytes, in the vocabularies of some remote code
        for token, number in own.get_vocab().items()
        if numbers.get(token, number) != number or tokens.get(number, token) != token
    )


def _load(place: ModelPath, options: MergeOptions) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        place.path, revision=place.revision, trust_remote_code=options.trust_remote_code
    )


def _is_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether only special tokens are in the vocabulary.

    transformers makes such a tokenizer for a folder that has a config and no tokenizer files, for some classes.
    """
    return set(tokenizer.get_vocab()) <= set(tokenizer.added_tokens_encoder)


def _may_have_files(place: ModelPath) -> bool:
    """Whether a model has tokenizer files, or is on the Hub and may have some."""
    if not os.path.isdir(place.path):
        return True
    return any(name.startswith(("tokenizer", "vocab", "spiece")) for name in os.listdir(place.path))


def _template_beside(place: ModelPath) -> str | None:
    """Read the chat template of a model that has no tokenizer; None if it has none."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        try:
            file = cached_file(place.path, name, revision=place.revision)
            text = Path(file or "").read_text(encoding="utf-8")
            found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        except Exception:  # no such file, or the Hub's errors
            continue
        if isinstance(found, list):  # several templates, as transformers once stored them
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if found:
            return str(found)
    return None
