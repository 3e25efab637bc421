"""The merge method: a look-up by tensor name and a weighted sum; and its registration with mergekit.

Scope: pure functions of the group that mergekit hands over and of an alphas file. No calibration, no thread-local
state: it runs on whatever device and thread mergekit's executor chooses.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from mergekit_slta.alphas import Alphas, Piece
from mergekit_slta.errors import AlphasError, ModelError, RegistrationError, listing, show

NAME = "submodule_linear"
OLDEST_MERGEKIT = "0.1.5"
REFERENCE_URL = "https://arxiv.org/abs/2504.10902"
_CHUNK_ELEMENTS = 2**18
"""Elements summed at a time: the operands of a chunk stay in a core's cache, and no second buffer of the tensor's
size is needed."""
_WRAPPED = "_mergekit_slta_original"


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


def combine(
    base: Tensor, experts: Sequence[Tensor], pieces: Sequence[Piece], scale: float, dtype: torch.dtype
) -> Tensor:
    """theta_0 + scale * sum_t alpha_t (theta_t - theta_0)     (Eq. 1 with Algorithm 1's weights)

    Args:
        base: theta_0, any shape and strides.
        experts: theta_t in the order of the pieces' alphas; same shape and device. Inputs are never written.
        pieces: slices of the tensor with their alphas; together they cover it once.
        scale: the recipe's `lambda`.
        dtype: of the result; the sum is taken in float32, or float64 for float64 inputs, and cast once.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    merged = torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    for axis, start, stop, alpha in pieces:
        views = [merged, base, *experts]
        if axis is not None:
            views = [view.narrow(axis, start, stop - start) for view in views]
        views = [view.reshape(1) if view.dim() == 0 else view for view in views]
        rows = max(1, _CHUNK_ELEMENTS // max(1, views[0][0].numel())) if views[0].numel() else 1
        if views[0].device.type != "cpu":
            rows *= 64  # an accelerator wants fewer, larger launches
        for into, origin, *others in zip(*(view.split(rows) for view in views), strict=True):
            start_point = origin.to(wide)
            total = torch.zeros_like(start_point)
            # Rounded step by step as mergekit's task_arithmetic is, so that an exported recipe gives the same digits.
            for weight, other in zip(alpha, others, strict=True):
                if weight != 0.0:
                    total.add_((other.to(wide) - start_point).mul_(weight))
            if scale != 1.0:
                total.mul_(scale)
            into.copy_(total.add_(start_point))
    return merged


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
    return combine(base, experts, pieces, scale, wide if merge.keep_precision else base.dtype)  # type: ignore[arg-type]


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


def wrap_run_merge(module: ModuleType) -> None:
    """Put the pre-pass before `mergekit.merge.run_merge`, for this method only; calling it again changes nothing."""
    original = module.run_merge
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def run_merge(merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(merge_config, "merge_method", None) != NAME:
            return original(merge_config, *args, **kwargs)
        from mergekit_slta.host import run

        return run(original, merge_config, *args, **kwargs)

    setattr(run_merge, _WRAPPED, original)
    for loaded in list(sys.modules.values()):  # modules that imported the name before this package came
        if getattr(loaded, "__name__", "").startswith("mergekit.") and vars(loaded).get("run_merge") is original:
            loaded.run_merge = run_merge  # type: ignore[attr-defined]
