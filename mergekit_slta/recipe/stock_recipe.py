"""Export an alphas file as a stock mergekit recipe, which gives the same merge without this package.

Scope: write a `task_arithmetic` recipe with a filter for every tensor, and refuse alphas that filters cannot express.
A filter is a substring, and the first one that matches wins. So each filter is a full tensor name, and longer names
come first. As a check, the result is resolved with mergekit's own code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from safetensors import SafetensorError, safe_open

from mergekit_slta.errors import AlphasError, RecipeError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.names import MERGED_RECIPE_NAME
from mergekit_slta.files.targets import check_overwrite
from mergekit_slta.libraries.mergekit import evaluate_setting
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.objectives import DATA_FREE
from mergekit_slta.recipe.read import constant, read_recipe
from mergekit_slta.recipe.recipe import map_models
from mergekit_slta.recipe.settings import METHOD

EXPRESSIBLE = ("model", "layer", "attn_mlp", "linear")
"""Granularities whose submodules own whole tensors."""
LORA_CACHE = "--lora-merge-cache DIR"
"""Option with which stock mergekit merges adapters."""
_VERBATIM = ("tokenizer", "tokenizer_source", "chat_template")
_FIRST_WORDS = "# Made by `mergekit-slta export`"
"""Begins every stock recipe that is written here. A recipe without it is the user's."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Exported(NamedTuple):
    """A stock recipe.

    Attributes:
        text: the recipe.
        notes: for the user, one line each.
        source: path of the original recipe that was used; None if there was none.
        direction: content of the recipe whose merge is the checkpoint of the closed form; None if the alphas have none.
    """

    text: str
    notes: tuple[str, ...]
    source: Path | None
    direction: dict[str, Any] | None


def export(
    path: str | os.PathLike[str], recipe: str | os.PathLike[str] | None = None, direction: Path | None = None
) -> Exported:
    """Make the stock recipe of an alphas file.

    Args:
        path: the alphas file.
        direction: folder of the checkpoint that stands for a closed form; the caller writes it.
        recipe: the recipe that the alphas are for; by default the `mergekit_config.yml` beside the file, if there is
            one.

    Raises:
        AlphasError: the file cannot be read, or filters cannot express it.
        RecipeError: the recipe does not belong to these alphas, or has settings that a stock recipe cannot express.
    """
    alphas = Alphas.load(path)
    form = alphas.closed_form
    if not alphas.calibration.get("stock_definition", True):
        raise RecipeError(
            "mergekit's own definition of this model class does not list the tensors of these checkpoints: a stock "
            "recipe would lose some, or name them in another way; merge with the plugin",
            code="plan-does-not-fit",
        )
    if form is not None and direction is None:
        raise RecipeError(
            f"the merge has the direction {show(form.model)}, which is written as a checkpoint beside the recipe: name "
            "the recipe with -o",
            code="output-needed",
        )
    notes = []
    source = Path(recipe) if recipe is not None else None
    beside = Path(path).absolute().with_name(MERGED_RECIPE_NAME)
    if source is None and beside.is_file():
        source = beside
        notes.append(f"Output dtype, tokenizer and lambda are those of {show(beside)}; --recipe names another")
    places = [Path(), *([] if source is None else [source.parent]), beside.parent, beside.parent.parent]
    named, stored_experts = alphas.models, alphas.experts
    alphas = alphas.model_copy(
        update={
            "base_model": _reachable(alphas.base_model, places),
            "models": tuple(
                str(direction) if form and model == form.model else _reachable(model, places) for model in alphas.models
            ),
        }
    )
    experts = [model for model, name in zip(alphas.models, named, strict=True) if name in stored_experts]
    given: dict[str, Any] = {}
    if source is None:
        _check_without_recipe(alphas)
    else:
        given = _from_recipe(alphas, source, places, str(direction))
    if any(key.startswith("tokenizer") for key in given.get("extra", ())):
        notes.append(
            "Vocabulary rows that mergekit fills in (tokens that a model lacks, padding) are averaged in float32 "
            "here, and "
            "in the checkpoints' dtype with the plugin: they may differ in rounding"
        )
    if needs_cache(alphas):
        notes.append(
            f"Warning: stock mergekit merges adapters into full copies first, and needs a folder for them: run "
            f"mergekit-yaml with {LORA_CACHE}"
        )
    if "out_dtype" not in given:
        folders = [] if source is None else [Path(alphas.base_model)] + [beside.parent] * (source == beside)
        found = [(dtype, folder) for folder in folders if (dtype := weights_dtype(folder))]
        if found:
            given["out_dtype"], folder = found[0]
            notes.append(
                f"The recipe names no out_dtype: it is {given['out_dtype']}, that of the weights in {show(folder)}"
            )
        else:
            cause = "no recipe is at hand, name it with --recipe" if source is None else "the recipe names no out_dtype"
            notes.append(f"Warning: the merged model will be float32 ({cause}); `out_dtype` changes that")
    made_by = None if form is None else {
        "merge_method": METHOD,
        "base_model": alphas.base_model,
        "models": [{"model": model} for model in experts],
        "parameters": {"objective": DATA_FREE, "direction": form.closed_form},
        "out_dtype": "float32",
        **given.get("extra", {}),
    }  # fmt: skip
    return Exported(stock_recipe(alphas, **given), tuple(notes), source, made_by)


def needs_cache(alphas: Alphas) -> bool:
    """Whether stock mergekit needs `LORA_CACHE`: a model is an adapter on a base."""
    models = map(ModelReference.model_validate, (alphas.base_model, *alphas.models))
    return any(model.lora is not None for model in models)


def _from_recipe(alphas: Alphas, path: Path, places: Sequence[Path], direction: str) -> dict[str, Any]:
    """Get the arguments of `stock_recipe` from the original recipe. Local folders in `alphas` are absolute already, and
    `direction` is the model that the recipe does not name."""
    config, _ = load_config(path)
    config = map_models(config, lambda model: ModelReference.model_validate(_reachable(str(model), places)))
    read = read_recipe(config)
    names = [read.names[model] for model in read.models]
    ours = [alphas.base_model, *(model for model in alphas.models if model != direction)]
    same = sorted(names[1:]) == sorted(ours[1:]) and names[0] == ours[0]
    stated = read.settings.stated
    if not same or ("granularity" in stated and read.settings.granularity != alphas.granularity):
        raise RecipeError(
            f"{show(path)} is not the recipe of these alphas, which are for {show(alphas.granularity)} of "
            f"{listing(ours)}: name theirs with --recipe",
            code="recipe-of-other-alphas",
        )
    _check_dtype(config.dtype)
    content = read.config.model_dump(mode="json", exclude_unset=True)  # with absolute paths
    arguments: dict[str, Any] = {"extra": {key: content[key] for key in _VERBATIM if content.get(key) is not None}}
    arguments["scale"] = float(constant("lambda", (config.parameters or {}).get("lambda", 1.0)))
    if config.out_dtype or config.dtype:
        arguments["out_dtype"] = config.out_dtype or config.dtype
    return arguments


def _check_without_recipe(alphas: Alphas) -> None:
    """Refuse alphas without their recipe, if the identity shows that the stock recipe would need its settings."""
    dtype = alphas.identity.get("dtype", "None")
    _check_dtype(None if dtype == "None" else dtype)
    if alphas.identity.get("tokenizer", "None") != "None":
        raise RecipeError(
            "these alphas are for a merge with a `tokenizer` section: name its recipe with --recipe",
            code="recipe-needed",
        )


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype.removeprefix("torch.") != "float32":
        raise RecipeError(
            f"the recipe casts its inputs to `dtype: {show(dtype)}`, and the stock recipe computes in float32: where "
            "the "
            f"checkpoints are {show(dtype)} already, use `out_dtype` in place of `dtype` and name that recipe "
            "(--recipe)",
            code="not-expressible",
        )


def stock_recipe(
    alphas: Alphas,
    *,
    scale: float = 1.0,
    out_dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write a `task_arithmetic` recipe that needs no plugin, as YAML.

    Args:
        alphas: the weights.
        scale: the recipe's `lambda`.
        out_dtype: dtype of the merged model; None for float32, in which the merge is computed.
        extra: further top-level keys (tokenizer, chat template), copied unchanged.

    Raises:
        AlphasError: slices of a tensor have different weights, or mergekit resolves the filters to other weights.
    """
    weights = _weights(alphas)
    names = filter_order(weights)
    content: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": alphas.base_model,
        "models": [
            {
                "model": model,
                "parameters": {"weight": [{"filter": name, "value": weights[name][column]} for name in names]},
            }
            for column, model in enumerate(alphas.models)
        ],
        "parameters": {"normalize": False} | ({} if scale == 1.0 else {"lambda": scale}),
        "dtype": "float32",
        **({} if out_dtype is None else {"out_dtype": out_dtype}),
        **(extra or {}),
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=2**20)
    _check_filters(text, alphas, weights)
    made_from = f"alphas {show(alphas.provenance.get('fingerprint'), 16)} ({show(alphas.granularity)})"
    cache = f"# Run mergekit-yaml with {LORA_CACHE}: it merges adapters into full copies.\n" * needs_cache(alphas)
    return f"{_FIRST_WORDS} from {made_from}: no plugin needed.\n{cache}{text}"


def _reachable(model: str, places: Sequence[Path]) -> str:
    """Make the path of a local folder absolute, so that the recipe works from any folder.

    Args:
        model: a model's name; a relative path in it starts in the folder where the merge was run.
        places: where that may have been; the first one that holds the path counts. A name that none holds stays.
    """
    return "+".join(
        next((os.path.realpath(place / part) for place in places if (place / part).is_dir()), part)
        for part in model.split("+")
    )


def _weights(alphas: Alphas) -> dict[str, tuple[float, ...]]:
    """Tensor -> its weights, one per model."""
    weights = {}
    for entry in alphas.submodules:
        for name in entry.tensors:
            pieces = alphas.pieces(name) or ()
            if getattr(entry, "slices", None) or len(pieces) != 1 or pieces[0].axis is not None:
                raise AlphasError(
                    f"under `granularity: {show(alphas.granularity)}` slices of {show(name)} have weights of their "
                    "own, "
                    f"which a filter cannot express: export alphas of {listing(EXPRESSIBLE)}",
                    code="not-expressible",
                )
            weights[name] = pieces[0].alpha
    return weights


def filter_order(names: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Sort tensor names so that no name comes before one that contains it; names of equal length keep their order."""
    return sorted(names, key=len, reverse=True)


def _check_filters(text: str, alphas: Alphas, weights: Mapping[str, Sequence[float]]) -> None:
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    for column, entry in enumerate(config.models or []):
        setting = (entry.parameters or {})["weight"]
        for name, alpha in weights.items():
            found = evaluate_setting(name, setting, validate=float)
            if found != alpha[column]:
                raise AlphasError(
                    f"mergekit's filters give {show(name)} of {show(alphas.models[column])} the weight {show(found)}, "
                    f"not {alpha[column]}: this file cannot be exported, merge with `mergekit-slta merge`",
                    code="not-expressible",
                )


def weights_dtype(folder: Path) -> str | None:
    """The floating dtype of a folder's safetensors weights; None if there are no weights or several dtypes."""
    found = set()
    try:
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def check_recipe_target(path: Path, sources: Sequence[Path | None]) -> None:
    """Check that a recipe may be written: it replaces only an earlier export, and none of the export's sources.

    Raises:
        OutputError: see `check_overwrite`.
    """
    check_overwrite(path, "recipe of `mergekit-slta export`", _is_export, sources=sources)


def _is_export(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_FIRST_WORDS)) == _FIRST_WORDS.encode()
