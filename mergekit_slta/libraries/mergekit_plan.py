"""How mergekit plans a merge; see `mergekit.py` for everything else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit.architecture import WeightInfo
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Task
    from mergekit.options import MergeOptions

USED = {
    "mergekit.architecture.ModelArchitecture": "a definition of the tensors (`plan_tensors`, `defined`)",
    "mergekit.architecture.ModuleArchitecture": "a definition of the tensors (`plan_tensors`, `defined`)",
    "mergekit.architecture.ModuleDefinition": "a definition of the tensors (`plan_tensors`, `defined`)",
    "mergekit.architecture.arch_info_for_config(config)": "mergekit's own definition (`stock_names`)",
    "mergekit.common.ModelReference.config(trust_remote_code)": "replaced: `plan_tensors`",
    "mergekit.merge.get_architecture_info(config, options)": "replaced: `defined`",
    "mergekit.io.tasks.SaveTensor.tensor_task": "from the plan to the merge task (`plan_tensors`)",
    "mergekit.plan.MergePlanner(config, arch_info, options, out_model_config)": "`plan_tensors`",
    "mergekit.plan.MergePlanner.plan_to_disk(out_path)": "`plan_tensors`",
}
"""name, or name(parameters) -> its use in this package."""


@dataclass(frozen=True)
class Definition:
    """What a merge writes: the tensors before the decoder layers, of each layer, and after them.

    Attributes:
        before, layers, after: the tensors.
        vocabulary_key: key of the output's config for the size of the vocabulary.
        files: names of files that are copied from the base, if it has them.
    """

    before: tuple[WeightInfo, ...]
    layers: tuple[tuple[WeightInfo, ...], ...]
    after: tuple[WeightInfo, ...]
    vocabulary_key: str
    files: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in order."""
        parts = (self.before, *self.layers, self.after)
        return [weight.name for part in parts for weight in part]


def described(name: str, vocabulary_axis: int | None = None, other_name: str | None = None) -> WeightInfo:
    """Describe a tensor of a definition.

    Args:
        name: its name in the output.
        vocabulary_axis: its axis with an entry per token, if there is one.
        other_name: the name of the tensor that stands for it where a checkpoint lacks it.
    """
    from mergekit.architecture import WeightInfo

    return WeightInfo(name=name, vocabulary_axis=vocabulary_axis, tied_names=(other_name,) if other_name else None)


def _architecture(definition: Definition) -> Any:
    from mergekit.architecture import ModelArchitecture, ModuleArchitecture, ModuleDefinition

    class Whole(ModuleArchitecture):
        """The whole model as one module."""

        def pre_weights(self, config: Any) -> list[WeightInfo]:
            return list(definition.before)

        def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
            return list(definition.layers[index])

        def post_weights(self, config: Any) -> list[WeightInfo]:
            return list(definition.after)

        def num_layers(self, config: Any) -> int:
            return len(definition.layers)

    return ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=Whole())},
        architectures=[],
        model_type="",
        tagalong_files=list(definition.files),
        vocab_size_config_key=definition.vocabulary_key,
    )


_DEFINITIONS: dict[str, Definition] = {}
"""Definitions of the running merges of this process, by the value of `alphas` in their recipe."""


@contextmanager
def defined(key: str, definition: Definition) -> Iterator[None]:
    """Let `run_merge` use a definition for recipes whose `alphas` is `key`, in place of mergekit's own.

    Relies on `mergekit.merge` calling `get_architecture_info` by its name in that module.
    """
    import mergekit.merge

    original = mergekit.merge.get_architecture_info
    if not hasattr(original, "__wrapped__"):

        @functools.wraps(original)
        def look_up(config: MergeConfiguration, options: MergeOptions) -> Any:
            own = _DEFINITIONS.get(str((config.parameters or {}).get("alphas")))
            return original(config, options) if own is None else _architecture(own)

        mergekit.merge.get_architecture_info = look_up
    _DEFINITIONS[key] = definition
    try:
        yield
    finally:
        del _DEFINITIONS[key]


_CONFIGS: ContextVar[Mapping[ModelReference, Any] | None] = ContextVar("configs", default=None)
"""Configs that `ModelReference.config` returns instead of reading them."""


@contextmanager
def _known_configs(configs: Mapping[ModelReference, Any]) -> Iterator[None]:
    """Let mergekit use configs that have been read: it reads each again for every use, which for a model on the Hub is
    a request."""
    from mergekit.common import ModelReference

    original = ModelReference.config
    if not hasattr(original, "__wrapped__"):

        @functools.wraps(original)
        def look_up(model: ModelReference, trust_remote_code: bool = False) -> Any:
            own = (_CONFIGS.get() or {}).get(model)
            return original(model, trust_remote_code) if own is None else own

        ModelReference.config = look_up
    token = _CONFIGS.set(configs)
    try:
        yield
    finally:
        _CONFIGS.reset(token)


def plan_tensors(
    config: MergeConfiguration,
    options: MergeOptions,
    base: ModelReference,
    configs: Mapping[ModelReference, Any],
    definition: Definition,
) -> list[tuple[WeightInfo, Task]]:
    """List the tensors that a merge writes, in order: (description, the task that reads it from every model).

    Relies on `MergePlanner.plan_to_disk` only planning: it creates nothing at its path. (Its
    sibling `plan_in_memory` fails under pydantic 2.14.)

    Args:
        config: pass a copy, because the planner changes it.
        options: mergekit's options.
        base: the model whose config the output gets.
        configs: the models' configs.
        definition: the tensors.
    """
    from mergekit.io.tasks import SaveTensor
    from mergekit.plan import MergePlanner

    architecture = _architecture(definition)
    with _known_configs(configs):
        planner = MergePlanner(config, architecture, options=options, out_model_config=configs[base])
        planned = planner.plan_to_disk(out_path="")
    merged = [task.tensor_task for task in planned if isinstance(task, SaveTensor)]
    return [(task.output_weight, task.gather_tensors) for task in merged]


def stock_names(config: Any, present: Collection[str]) -> set[str] | None:
    """Names of the tensors that mergekit's own definition of a model class would write; None if it has none.

    Args:
        config: the base's config.
        present: names of the base's tensors; an optional tensor is written if it is there.
    """
    from mergekit.architecture import arch_info_for_config

    with quiet_log("mergekit.architecture"):
        own = arch_info_for_config(config)
    if own is None:
        return None
    try:
        planned = own.all_weights(config)
    except RuntimeError:  # mergekit looks for a key that this version of transformers has elsewhere
        return None
    return {
        weight.name for weight in planned if not weight.optional or {weight.name, *(weight.aliases or ())} & {*present}
    }


@contextmanager
def quiet_log(name: str) -> Iterator[None]:
    """Show only errors of a logger inside the context."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
