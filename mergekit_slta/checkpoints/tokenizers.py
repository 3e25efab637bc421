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
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mergekit_slta.checkpoints.hub import is_local
from mergekit_slta.checkpoints.hub_errors import hub_problem
from mergekit_slta.checkpoints.weight_files import refuse_pointer
from mergekit_slta.data.templates import own_template
from mergekit_slta.errors import DataError, ModelError, path_hint, show
from mergekit_slta.libraries.mergekit import build_tokenizer
from mergekit_slta.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import TokenizerInfo

_TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"


def load_tokenizer(recipe: Recipe, options: MergeOptions) -> tuple[PreTrainedTokenizerBase, TokenizerInfo | None]:
    """Load the merged model's tokenizer: the base's, or the one that mergekit builds if the recipe asks for one.

    Returns:
        The tokenizer, and what mergekit built (None if it is the base's own).

    Raises:
        DataError: there is none, or it cannot be loaded.
        ModelError: the model that the recipe names as its source is a folder that is not there.
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
        owner = recipe.names[recipe.base]
        if isinstance(source, ModelReference) and not (problem := _problem_of(recipe.base.model, options)):
            path, owner = source.model.path, recipe.names.get(source, str(source))
            if path.startswith((".", "/", "~")) and not os.path.isdir(path):
                key = "tokenizer.source" if section else "tokenizer_source"
                raise ModelError(
                    f"there is no model folder {show(path)} {path_hint(path)}: check `{key}`, which names it",
                    code="missing-model",
                ) from error
        elif isinstance(source, ModelReference):
            error = problem
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
        tool_template: its template for chats with tools, if it has one of its own (`tool_use`).
    """

    tokenizer: PreTrainedTokenizerBase | None
    template: str | None
    problem: str | None = None
    tool_template: str | None = None

    @property
    def templates(self) -> list[str]:
        """All its templates."""
        return [text for text in (self.template, self.tool_template) if text]

    def template_for(self, with_tools: bool) -> str | None:
        """The template for chats with tools, or without; None if there is none."""
        return (with_tools and self.tool_template) or self.template


def own_tokenizer(model: ModelReference, options: MergeOptions) -> OwnTokenizer:
    """Load a model's tokenizer and chat template.

    An adapter's are in its own folder, if it has any; what it lacks is its base's.
    """
    template, tool_template, problem = None, None, None
    for place in (model.lora, model.model):
        if place is None:
            continue
        try:
            tokenizer = _load(place, options)
        except Exception as error:  # no tokenizer files, damaged ones, remote code, the Hub's errors
            if template is None:
                template, tool_template = _templates_beside(place)
            if _may_have_files(place):
                problem = problem or show(error)
            continue
        if template is None:
            template, tool_template = own_template(tokenizer), own_template(tokenizer, with_tools=True)
        if not _is_blank(tokenizer):
            return OwnTokenizer(tokenizer, template, tool_template=tool_template)
    return OwnTokenizer(None, template, problem, tool_template)


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


class EndTokens(NamedTuple):
    """The tokens behind which a model stops to generate.

    Attributes:
        acting: those of its generation config; without one, those of its config.
        all: also those of its config and its tokenizer.
    """

    acting: frozenset[str]
    all: frozenset[str]


def end_tokens(
    model: ModelReference, config: PretrainedConfig, own: PreTrainedTokenizerBase, output: PreTrainedTokenizerBase
) -> EndTokens:
    """Read which tokens end a model's answers.

    Args:
        model: the model.
        config: its config.
        own: the tokenizer that numbers its tokens.
        output: the tokenizer that generates: its own, or the merged model's.
    """
    try:
        generation = json.loads(text_of(model.model, "generation_config.json") or "{}").get("eos_token_id")
    except (ValueError, AttributeError):  # it is damaged
        generation = None
    tokens = {number: str(token) for token, number in own.get_vocab().items()}
    in_config, in_generation = (
        frozenset(
            tokens.get(number, f"token {number}")
            for number in (value if isinstance(value, list) else [value])
            if isinstance(number, int) and number >= 0
        )
        for value in (getattr(config, "eos_token_id", None), generation)
    )
    of_tokenizer = {str(output.eos_token)} if output.eos_token is not None else set()
    return EndTokens(in_generation or in_config, in_generation | in_config | of_tokenizer)


def _load(place: ModelPath, options: MergeOptions) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        place.path, revision=place.revision, trust_remote_code=options.trust_remote_code
    )


def _problem_of(place: ModelPath, options: MergeOptions) -> Exception | None:
    """Why a model has no usable tokenizer; None if it has one."""
    try:
        return ValueError("its vocabulary holds no words") if _is_blank(_load(place, options)) else None
    except Exception as error:  # no tokenizer files, damaged ones, remote code, the Hub's errors
        return error


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


def _templates_beside(place: ModelPath) -> tuple[str | None, str | None]:
    """Read the chat templates of a model that has no tokenizer: the usual one, and that for tools; None for neither."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        text, for_tools = text_of(place, name), None
        try:
            found = text if name.endswith(".jinja") else json.loads(text or "{}").get("chat_template")
            if isinstance(found, list):  # several templates, as transformers once stored them
                several = {entry["name"]: entry["template"] for entry in found}
                found, for_tools = several.get("default"), several.get("tool_use")
        except (ValueError, AttributeError, KeyError, TypeError):  # it is damaged
            continue
        if found:
            for_tools = for_tools or text_of(place, _TOOL_TEMPLATE)
            return str(found), for_tools
    return None, None


def text_of(place: ModelPath, name: str) -> str | None:
    """Text of a model's file; None if there is no such file."""
    try:
        return Path(cached_file(place.path, name, revision=place.revision) or "").read_text(encoding="utf-8")
    except Exception:  # no such file, or the Hub's errors
        return None
