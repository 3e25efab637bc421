"""Which tensors OUT holds, and how each model's checkpoint gives them by the names that they have there.

Scope: names. OUT has the tensors of the base's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_slta.checkpoints.configs import ties_embeddings
from mergekit_slta.checkpoints.naming import RenamedLoader, Source, groups_by_source
from mergekit_slta.libraries.mergekit import LazyTensorLoader, place_loader
from mergekit_slta.libraries.mergekit_plan import Definition, described
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mergekit_slta.libraries.mergekit import WeightInfo

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
)
"""Files of a checkpoint that describe how images, videos and audio are read."""


def define_output(
    recipe: Recipe,
    loaders: Mapping[ModelReference, LazyTensorLoader],
    sources: Mapping[ModelReference, Mapping[str, Source]],
    skeleton: Skeleton,
    configs: Mapping[ModelReference, PretrainedConfig],
) -> tuple[Definition, list[str]]:
    """Define the output by the base's checkpoint; also returns the tensors that text does not run through."""
    base = sources[recipe.base]
    names = list(loaders[recipe.base].index.tensor_paths)
    head, table = skeleton.head_weight, skeleton.embedding_weight
    own_head = [model for model in recipe.models if head in sources[model] and not ties_embeddings(configs[model])]
    extra = [head] if head not in base and own_head and head not in names else []
    made = groups_by_source({name: source for name, source in base.items() if name in skeleton.shapes})
    made |= {name: [name] for name in extra}
    ends = {table, head, head.removesuffix("weight") + "bias"}
    table_name = base[table].names[0] if table in base else None
    layers: list[list[WeightInfo]] = [[] for _ in range(skeleton.num_layers)]
    before: list[WeightInfo] = []
    after: list[WeightInfo] = []
    prefix = skeleton.layers_path + "."
    for name in [*names, *extra]:
        first = made.get(name, [""])[0]
        weight = described(name, 0 if first in ends else None, table_name if first == head else None)
        if first.startswith(prefix):
            layers[int(first[len(prefix) :].partition(".")[0])].append(weight)
        else:
            (after if first.startswith(skeleton.anatomy.head_prefixes) else before).append(weight)
    definition = Definition(
        tuple(before), tuple(map(tuple, layers)), tuple(after), skeleton.vocabulary_key, PROCESSOR_FILES
    )
    return definition, [name for name in names if name not in made]


def place_renamed(
    model: ModelReference,
    recipe: Recipe,
    loaders: Mapping[ModelReference, LazyTensorLoader],
    sources: Mapping[ModelReference, Mapping[str, Source]],
    names: Sequence[str],
    skeleton: Skeleton,
    options: MergeOptions,
) -> dict[str, str]:
    """Put a model's loader into mergekit's cache. If its tensors have other names than the base's, it renames them.

    Returns:
        name in OUT -> name in the checkpoint, of whole tensors, where names differ.
    """
    loader, base = loaders[model], loaders[recipe.base]
    present = loader.index.tensor_paths
    table, head = skeleton.embedding_weight, skeleton.head_weight
    same = {name for source in sources[model].values() for name in source.names} & {*names}
    made = groups_by_source(sources[recipe.base])
    made |= {name: [name] for name in names if name not in base.index.tensor_paths}
    # A tensor that the model class does not know keeps its name; mergekit finds a tied projection by itself.
    missing = [name for name in names if name not in same and (name in made or name not in present)]
    if model == recipe.base or not [name for name in missing if made.get(name) != [head]]:
        place_loader(model, loader, options)
        return {}
    whole = {}
    for name in names:
        targets = made.get(name, [])
        own = sources[model].get(targets[0]) if len(targets) == 1 else None
        if targets == [head] and own is None:  # tied
            own = sources[model].get(table)
        if name in present and (name in same or not targets):
            whole[name] = name
        elif (
            own is not None and own.conversion is None and sources[recipe.base].get(targets[0], own).conversion is None
        ):
            whole[name] = own.names[0]
    name = recipe.names[model]
    place_loader(model, RenamedLoader(loader, skeleton, name, names, made, sources[model], whole, base), options)
    return {name: other for name, other in whole.items() if name != other}
