"""All undocumented names, attributes and behaviours of mergekit that this package uses.

Scope: this is the file to check when a new version of mergekit breaks something. Names that mergekit's README and its
guide to merge methods describe (`run_merge`, `MergeConfiguration`, `MergeOptions`, `ModelReference`, `merge_methods`)
are imported directly where they are used. Only leaf modules of mergekit are imported at the top: other modules may
still be loading when this package registers its method.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, InputModelDefinition, evaluate_setting
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import PrettyPrintHelp, add_merge_options

from mergekit_slta.libraries.mergekit_files import prefer_open_loaders

if TYPE_CHECKING:
    import torch
    from mergekit.architecture import WeightInfo
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Task
    from mergekit.options import MergeOptions
    from mergekit.tokenizer import TokenizerInfo
    from torch import Tensor

__all__ = [
    "ConditionalParameter",
    "InputModelDefinition",
    "LazyTensorLoader",
    "PrettyPrintHelp",
    "ShardInfo",
    "ShardedTensorIndex",
    "add_merge_options",
    "evaluate_setting",
]
"""Classes and functions of mergekit that other files import from here."""
USED = {
    "mergekit._data.chat_templates": "the chat templates (`chat_template_names`, `chat_template_text`)",
    "mergekit.architecture.WeightInfo.aliases": "other names of a tensor (`names_of`)",
    "mergekit.architecture.WeightInfo.tied_names": "other names of a tensor (`names_of`)",
    "mergekit.architecture.WeightInfo.optional": "tensors that a checkpoint may lack (`stock_names`)",
    "mergekit.architecture.WeightInfo.vocabulary_axis": "tensors with a row per token (checkpoints/reconcile.py)",
    "mergekit.common.ImmutableMap": "the type of `GatherTensors.weight_info`",
    "mergekit.common.ModelPath._unique_id": "names of merged copies (`copy_place`)",
    "mergekit.common.ModelReference.merged(cache_dir, trust_remote_code, lora_merge_dtype)": "makes merged copies",
    "mergekit.common.dtype_from_name(name)": "`dtype_named`",
    "mergekit.config.ConditionalParameter": "filters of a setting (recipe/)",
    "mergekit.config.InputModelDefinition": "keys of an entry of `models` (recipe/)",
    "mergekit.config.evaluate_setting(tensor_name, setting)": "how filters are resolved (recipe/)",
    "mergekit.graph.Task.arguments": "tasks that a task needs (`run_task`)",
    "mergekit.graph.Task.execute": "what a task makes of them (`run_task`)",
    "mergekit.io.lazy_tensor_loader.LazyTensorLoader(index, lazy_unpickle)": "base class of the adapters' loader",
    "mergekit.io.lazy_tensor_loader.LazyTensorLoader.flush": "closes the shards that are open",
    "mergekit.io.lazy_tensor_loader.LazyTensorLoader.get_tensor(key, device, aliases, raise_on_missing)": "overridden",
    "mergekit.io.lazy_tensor_loader.LazyTensorLoader.index": "a checkpoint's files and tensor names",
    "mergekit.io.lazy_tensor_loader.ShardInfo(filename, contained_keys)": "one file of a checkpoint",
    "mergekit.io.lazy_tensor_loader.ShardedTensorIndex(base_path, is_safetensors, tensor_paths, shards)": "as above",
    "mergekit.io.tasks.GatherTensors(weight_info)": "reads one tensor from every model",
    "mergekit.io.lazy_tensor_loader.ShardedTensorIndex.from_file(file_path)": "`open_file`",
    "mergekit.io.tasks.LoaderCache.get(model)": "mergekit's own tasks get their loaders from it (`place_loader`)",
    "mergekit.io.tasks.LoaderCache.loaders": "written to: `place_loader`, `forget_loaders`",
    "mergekit.io.tasks.LoaderCache.setup(options)": "its options, for mergekit's own tasks (`place_loader`)",
    "mergekit.merge.run_merge(merge_config, out_path, options, config_source)": "replaced by host/wrap.py",
    "mergekit.merge_methods.base.MergeMethodSpec.parameters": "other methods' keys (`methods_with`)",
    "mergekit.merge_methods.base.ParameterSpec(name, value_type, scope, default)": "the method's keys (host/method.py)",
    "mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask.gather_tensors": "a planned tensor's task",
    "mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask.output_weight": "a planned tensor's description",
    "mergekit.options.PrettyPrintHelp": "the help of commands with mergekit's options (cli/)",
    "mergekit.options.add_merge_options": "mergekit's options on our commands (cli/)",
    "mergekit.scripts.run_yaml": "`python -m` it where `mergekit-yaml` is not on the path (demo/run.py)",
    "mergekit.tokenizer.BuildTokenizer": "the task that makes the output's tokenizer (`run_task`)",
    "mergekit.tokenizer.PermutedVocabulary.gather_tensors": "rows reordered for another tokenizer (`models_of`)",
    **{
        f"mergekit.tokenizer.config.{name}": "keys of the `tokenizer` section (`tokenizer_keys`)"
        for name in ("TokenizerConfig", "TokenEmbeddingConfig", "ModelTokenEmbedding", "ZeroEmbedding")
    },
    "mergekit.tokenizer.build.build_tokenizer"
    "(base_model, referenced_models, tokenizer_source, trust_remote_code, add_tokens)": "checkpoints/configs.py",
    "mergekit.tokenizer.truncate.TruncatedVocabulary.gather_tensors": "rows cut to the smallest vocabulary",
}
"""name, or name(parameters) -> its use in this package."""


def place_loader(model: ModelReference, loader: LazyTensorLoader, options: MergeOptions) -> None:
    """Put a loader into mergekit's cache, where its tasks find it, and give the cache mergekit's options.

    Relies on `LoaderCache.get`, which opens a model only if `loaders` lacks it: there is one cache per thread, but all
    threads share `loaders`, for the life of the process.
    """
    from mergekit.io.tasks import LoaderCache

    prefer_open_loaders()
    cache = LoaderCache()
    cache.setup(options=options)
    cache.loaders[model] = loader


def placed_loader(model: ModelReference) -> LazyTensorLoader:
    """The loader that `place_loader` put into mergekit's cache."""
    from mergekit.io.tasks import LoaderCache

    return LoaderCache().loaders[model]


class _DetachedLoader(LazyTensorLoader):
    """mergekit's loader, for pickles that hold parameters with gradients, too."""

    def get_tensor(self, *args: Any, **kwargs: Any) -> Tensor | None:
        tensor = super().get_tensor(*args, **kwargs)
        return None if tensor is None else tensor.detach()


def open_file(path: str, *, lazy_unpickle: bool) -> LazyTensorLoader:
    """Open a checkpoint in one file, safetensors or pickled."""
    return _DetachedLoader(ShardedTensorIndex.from_file(path), lazy_unpickle=lazy_unpickle)


def open_shards(folder: str, tensor_files: dict[str, str], *, lazy_unpickle: bool) -> LazyTensorLoader:
    """Open a checkpoint in several files of a folder.

    Args:
        folder: the folder.
        tensor_files: tensor name -> its file.
        lazy_unpickle: as in mergekit's options.
    """
    shards = [
        ShardInfo(file, [key for key, other in tensor_files.items() if other == file])
        for file in sorted(set(tensor_files.values()))
    ]
    is_safetensors = all(file.endswith(".safetensors") for file in tensor_files.values())
    return _DetachedLoader(ShardedTensorIndex(folder, is_safetensors, tensor_files, shards), lazy_unpickle)


def copy_place(model: ModelReference, options: MergeOptions) -> str:
    """The folder in which mergekit keeps the full copy that an adapter was merged into; it need not exist.

    Relies on the name that `ModelReference.merged` gives it.
    """
    lora: Any = model.lora
    return os.path.join(str(options.lora_merge_cache), f"{model.model._unique_id()}_{lora._unique_id()}")


def forget_loaders(models: Iterable[ModelReference]) -> None:
    """Remove models from mergekit's cache of loaders.

    The cache outlives a merge, but the files may change before the next one, and other merge methods use mergekit's own
    loaders for adapters.
    """
    from mergekit.io.tasks import LoaderCache

    for model in models:
        LoaderCache().loaders.pop(model, None)


def loader_of_file(path: str, names: Sequence[str]) -> LazyTensorLoader:
    """Open a loader for one file, safetensors or pickled, whose tensors have the given names.

    `lazy_unpickle` is off: pickles are read by torch's own loader with `weights_only`.
    """
    folder, file = os.path.split(path)
    index = ShardedTensorIndex(
        base_path=folder,
        is_safetensors=file.endswith(".safetensors"),
        tensor_paths=dict.fromkeys(names, file),
        shards=[ShardInfo(file, list(names))],
    )
    return LazyTensorLoader(index, lazy_unpickle=False)


def names_of(weight: WeightInfo) -> list[str]:
    """All names under which a checkpoint may hold a tensor, in the order in which mergekit tries them."""
    return [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]


def is_gather(task: Task) -> bool:
    """Whether a planned tensor is read as it is stored. If not, mergekit changes its rows for another vocabulary."""
    from mergekit.io.tasks import GatherTensors

    return isinstance(task, GatherTensors)


def models_of(task: Task) -> dict[ModelReference, WeightInfo]:
    """model -> description of a planned tensor in that model's checkpoint.

    Relies on tasks that change a vocabulary: they hold the task that reads the tensors in `gather_tensors`.
    """
    plain: Any = task if is_gather(task) else task.gather_tensors  # type: ignore[attr-defined]
    return dict(plain.weight_info.items())


def gather_from(task: Task, models: Collection[ModelReference]) -> Task:
    """Make the task that reads a tensor from some of the models only.

    Returns the same task if mergekit changes the rows for another vocabulary (see `is_gather`), because the models then
    depend on each other.
    """
    from mergekit.common import ImmutableMap

    if not is_gather(task):
        return task
    sources = {model: weight for model, weight in models_of(task).items() if model in models}
    return task.model_copy(update={"weight_info": ImmutableMap(sources)})


def build_tokenizer(
    config: MergeConfiguration, models: Sequence[ModelReference], options: MergeOptions
) -> TokenizerInfo:
    """Build the output's tokenizer as mergekit does for a recipe with `tokenizer` or `tokenizer_source`.

    Relies on `build_tokenizer` being all that the planner's `BuildTokenizer` does.

    Args:
        config: the recipe.
        models: all models of the recipe, base first; with `source: union` the order determines the ids of added tokens.
        options: mergekit's options.
    """
    from mergekit.tokenizer.build import build_tokenizer

    section = config.tokenizer
    return build_tokenizer(
        base_model=config.base_model,
        referenced_models=list(models),
        tokenizer_source=section.source if section else config.tokenizer_source,
        trust_remote_code=options.trust_remote_code,
        add_tokens=list((section.tokens or {}) if section else {}),
    )


def run_task(task: Task, build: Callable[[Task], TokenizerInfo]) -> Any:
    """Execute a task of mergekit's graph and the tasks that it depends on, and return its result.

    Args:
        task: any task.
        build: called for the task that builds the output's tokenizer, so that the caller can cache the result.
    """
    from mergekit.tokenizer import BuildTokenizer

    if isinstance(task, BuildTokenizer):
        return build(task)
    return task.execute(**{key: run_task(needed, build) for key, needed in task.arguments().items()})


def dtype_named(name: str | None) -> torch.dtype | None:
    """Convert the dtype name of a mergekit option ("bfloat16", "float16", ...); None for None."""
    from mergekit.common import dtype_from_name

    return dtype_from_name(name)


def tokenizer_keys() -> dict[str, tuple[str, ...]]:
    """Keys of a recipe's `tokenizer` section, of an entry of its `tokens`, and of an entry's `source` by `kind`."""
    from mergekit.tokenizer import config as types

    kinds: dict[str, type[Any]] = {
        "section": types.TokenizerConfig,
        "token": types.TokenEmbeddingConfig,
        "model": ModelReference,
        "model_token": types.ModelTokenEmbedding,
        "zero": types.ZeroEmbedding,
    }
    return {name: tuple(kind.model_fields) for name, kind in kinds.items()}


def methods_with(parameter: str, besides: str) -> list[str]:
    """Names of the registered merge methods that have a parameter, without the method `besides`."""
    from mergekit.merge_methods import registered_methods

    specs = [method.spec for method in registered_methods() if method.spec.name != besides]
    return [spec.name for spec in specs if parameter in {known.name for known in spec.parameters}]


def chat_template_names() -> list[str]:
    """Names of the chat templates that mergekit includes, sorted.

    Relies on the files `NAME.jinja` in its package `_data.chat_templates`.
    """
    from mergekit._data import chat_templates

    files = [entry.name for entry in importlib.resources.files(chat_templates).iterdir()]
    return sorted(name.removesuffix(".jinja") for name in files if name.endswith(".jinja"))


def chat_template_text(name: str) -> str:
    """The text of a chat template that mergekit includes."""
    from mergekit._data import chat_templates

    return importlib.resources.files(chat_templates).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
