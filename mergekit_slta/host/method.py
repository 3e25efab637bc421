"""The merge method: look a tensor's weights up by name, and take the weighted sum; and its registration with mergekit.

Scope: pure functions of the group that mergekit hands over and of an alphas file. No calibration, no thread-local
state: it runs on whatever device and thread mergekit's executor chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from mergekit_slta.errors import AlphasError, ModelError, RegistrationError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.maths.task_arithmetic import merge_tensor

NAME = "submodule_linear"
OLDEST_MERGEKIT = "0.1.5"
REFERENCE_URL = "https://arxiv.org/abs/2504.10902"


@dataclass(frozen=True)
class ActiveMerge:
    """Alphas in use by a running merge.

    Attributes:
        alphas: the file's content.
        columns: input id -> position in `alphas.models`.
        keep_precision: return the sum as it was accumulated, since mergekit casts it to the recipe's `out_dtype`.
    """

    alphas: Alphas
    columns: Mapping[Any, int]
    keep_precision: bool


_ACTIVE: dict[str, ActiveMerge] = {}
"""Merges that run in this process, by the path of their alphas file. Shared by all threads, written by the host."""


@contextmanager
def active(path: str, merge: ActiveMerge) -> Iterator[None]:
    """Let `merge_group` use `merge` for recipes whose `alphas` is `path`."""
    _ACTIVE[path] = merge
    try:
        yield
    finally:
        _ACTIVE.pop(path, None)


@functools.lru_cache(maxsize=8)
def _loaded(path: str) -> ActiveMerge:
    """For callers that do not pass through `run_merge`: the file alone, models found by their names in it."""
    alphas = Alphas.load(path)
    return ActiveMerge(alphas, {name: column for column, name in enumerate(alphas.models)}, keep_precision=False)


@functools.cache
def method() -> Any:
    """The method object, one per process.

    Raises:
        RegistrationError: the installed mergekit is older than the API this is written for.
    """
    _check_mergekit()
    from mergekit.merge_methods.base import (
        BasePolicy,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        ParameterScope,
        ParameterSpec,
        TensorGroup,
    )

    shared = ("granularity", "num_samples", "max_seq_length", "seed", "balance", "inputs", "objective",
              "label_samples", "steps", "fresh_rows", "ridge", "compute_dtype", "alphas")  # fmt: skip
    per_model = ("dataset", "dataset_config", "split", "text", "completion", "importance")

    class SubmoduleLinear(GroupMergeMethod):
        """Weights per submodule from a calibration pre-pass (SLTA, ICLR 2025); see `host.py` for the pre-pass."""

        spec = MergeMethodSpec(
            name=NAME,
            pretty_name="Submodule Linear (SLTA)",
            reference_url=REFERENCE_URL,
            # Values are validated by `recipe.py`, before the planner meets them, with better messages.
            parameters=(
                *(ParameterSpec(key, Any, ParameterScope.SHARED, default=None) for key in shared),
                ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
                *(ParameterSpec(key, Any, ParameterScope.NON_BASE, default=None) for key in per_model),
            ),
            contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
        )

        def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
            return _merge_group(group, parameters.get("alphas"), parameters.get("lambda", 1.0))

    return SubmoduleLinear()


def _merge_group(group: Any, path: str | None, scale: float) -> Tensor:
    name = group.metadata.name
    if path is None:
        raise AlphasError(
            f"{NAME} was called without its pre-pass and without `alphas`: run `mergekit-yaml` or "
            "`mergekit-slta merge`, or name an existing alphas file"
        )
    merge = _ACTIVE.get(path) or _loaded(path)
    if name in merge.alphas.copied:
        if any(not torch.equal(entry.tensor, group.entries[0].tensor) for entry in group.entries):
            raise ModelError(f"the buffer {show(name)} differs between the models, and cannot be merged")
        return group.entries[0].tensor.clone()
    pieces = merge.alphas.pieces(name)
    if pieces is None:
        raise AlphasError(f"the alphas file {show(path)} does not cover the tensor {show(name)}: calibrate again")
    experts: list[Tensor | None] = [None] * len(merge.alphas.models)
    for entry in group.non_base:
        column = merge.columns.get(entry.id, merge.columns.get(str(entry.id)))
        if column is None:
            raise AlphasError(
                f"the alphas file {show(path)} knows no model {show(entry.id)}; "
                f"it is for {listing(merge.alphas.models)}"
            )
        experts[column] = entry.tensor
    missing = [model for model, tensor in zip(merge.alphas.models, experts, strict=True) if tensor is None]
    if missing or group.base is None:
        raise ModelError(
            f"tensor {show(name)} is missing in {listing(missing or ['the base'])}, so it cannot be merged"
        )
    base = group.base.tensor
    wide = torch.promote_types(base.dtype, torch.float32)
    return merge_tensor(base, experts, pieces, scale, wide if merge.keep_precision else base.dtype)  # type: ignore[arg-type]


def _check_mergekit() -> None:
    try:
        found = version("mergekit")
    except PackageNotFoundError as error:
        raise RegistrationError("mergekit is not installed: pip install 'mergekit>=0.1.5'") from error
    if Version(found) < Version(OLDEST_MERGEKIT):
        raise RegistrationError(
            f"{NAME} needs mergekit {OLDEST_MERGEKIT} or newer, but {show(found)} is installed: "
            f"pip install -U 'mergekit>={OLDEST_MERGEKIT}'"
        )


def register() -> None:
    """Make `submodule_linear` known to mergekit; calling it again changes nothing.

    Raises:
        RegistrationError: mergekit is missing or too old, or another package has taken the name.
    """
    instance = method()
    from mergekit import merge_methods

    taken = {known.spec.name: known for known in merge_methods.registered_methods()}.get(NAME)
    if taken is instance:
        return
    if taken is not None:
        raise RegistrationError(
            f"the name {NAME} is already registered with mergekit {version('mergekit')} by "
            f"{type(taken).__module__}: uninstall one of the two"
        )
    merge_methods.register(instance)
