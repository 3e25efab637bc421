"""The merge method: looks up a tensor's weights by name and computes the weighted sum; registers with mergekit.

Scope: merging one tensor, from mergekit's group of inputs and an alphas file. There is no calibration and no
thread-local state: mergekit's executor chooses the thread and the device.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from mergekit_slta.errors import AlphasError, ModelError, RegistrationError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.libraries.torch import product_precision
from mergekit_slta.maths.task_arithmetic import merge_tensor
from mergekit_slta.recipe.objectives import all_shared_keys
from mergekit_slta.recipe.settings import METHOD, TASK_KEYS

OLDEST_MERGEKIT = "0.1.5"
REFERENCE_URL = "https://arxiv.org/abs/2504.10902"


@dataclass(frozen=True)
class ActiveMerge:
    """The alphas that a running merge uses.

    Attributes:
        alphas: the content of the alphas file.
        columns: id of an input in mergekit's group -> index in `alphas.models`.
        keep_precision: return the sum in the dtype of the computation; mergekit casts it to the recipe's `out_dtype`.
        read_direction: name -> tensor of the alphas' closed form; None if it has to be computed.
        uncalibrated: the recipe's `uncalibrated`.
    """

    alphas: Alphas
    columns: Mapping[Any, int]
    keep_precision: bool
    read_direction: Callable[[str], Tensor | None] = lambda _: None
    uncalibrated: str = "error"


_ACTIVE: dict[str, ActiveMerge] = {}
"""Running merges of this process, by the value of `alphas` in their recipe. All threads of an executor read it."""


@contextmanager
def active(key: str, merge: ActiveMerge) -> Iterator[None]:
    """Let `merge_group` use `merge` for recipes whose `alphas` is `key`. Each running merge needs its own key."""
    _ACTIVE[key] = merge
    try:
        yield
    finally:
        del _ACTIVE[key]


def _load(path: str) -> ActiveMerge:
    """Read an alphas file for a caller that does not use `run_merge`. Models are matched by their names in the file.

    Raises:
        AlphasError: it is missing or damaged.
    """
    try:
        status = os.stat(path)
    except OSError:
        return _load_version(path, ())
    return _load_version(path, (status.st_mtime_ns, status.st_size, status.st_ino))


@functools.lru_cache(maxsize=8)
def _load_version(path: str, version: tuple[int, ...]) -> ActiveMerge:
    """Cached, because it is called for every tensor; `version` changes when the file is rewritten."""
    alphas = Alphas.load(path)
    return ActiveMerge(alphas, {name: column for column, name in enumerate(alphas.models)}, keep_precision=False)


@functools.cache
def method() -> Any:
    """Return the method object; there is one per process.

    Raises:
        RegistrationError: mergekit is missing, or older than `OLDEST_MERGEKIT`.
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

    class SubmoduleLinear(GroupMergeMethod):
        """Weights per submodule from a calibration pre-pass (SLTA, ICLR 2025); `host.merge` runs the pre-pass."""

        spec = MergeMethodSpec(
            name=METHOD,
            pretty_name="Submodule Linear (SLTA)",
            reference_url=REFERENCE_URL,
            # `recipe.read` validates the values before mergekit plans the merge.
            parameters=(
                ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
                *(
                    ParameterSpec(key, Any, ParameterScope.SHARED, default=None)
                    for key in all_shared_keys()
                    if key != "lambda"
                ),
                *(ParameterSpec(key, Any, ParameterScope.NON_BASE, default=None) for key in TASK_KEYS),
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
            f"{METHOD} was called without its pre-pass and without `alphas`: run `mergekit-yaml` or "
            "`mergekit-slta merge`, or name an existing alphas file",
            code="missing-alphas",
        )
    merge = _ACTIVE.get(path) or _load(path)
    if name in merge.alphas.copied:
        return _carry(name, group, merge)
    slices = merge.alphas.pieces(name)
    if slices is None:
        raise AlphasError(
            f"the alphas file {show(path)} does not cover the tensor {show(name)}: calibrate again",
            code="uncovered-tensor",
        )
    models, form = merge.alphas.models, merge.alphas.closed_form
    tensors: list[Tensor | None] = [None] * len(models)
    for entry in group.non_base:
        column = _column(merge, entry)
        if column is None:
            raise AlphasError(
                f"the alphas file {show(path)} knows no model {show(entry.id)}; "
                f"it is for {listing(models)}: calibrate again",
                code="unknown-model",
            )
        tensors[column] = entry.tensor
    stored = [model for model in models if form is None or model != form.model]
    missing = [model for model, tensor in zip(models, tensors, strict=True) if tensor is None and model in stored]
    if missing or group.base is None:
        raise ModelError(
            f"tensor {show(name)} is missing in {listing(missing or ['the base'])}: "
            "all models of a merge need the same tensors",
            code="missing-tensor",
        )
    base = group.base.tensor
    if form is not None:
        place = models.index(form.model)
        has_weight = any(part.alpha[place] for part in slices)
        tensors[place] = _closed_form(merge, name, base, tensors) if has_weight else base
    wide = torch.promote_types(base.dtype, torch.float32)
    return merge_tensor(base, tensors, slices, scale, wide if merge.keep_precision else base.dtype)  # type: ignore[arg-type]


def _carry(name: str, group: Any, merge: ActiveMerge) -> Tensor:
    """A tensor that text does not run through, by the recipe's `uncalibrated`.

    Raises:
        ModelError: it differs between the models, and the rule is "error".
    """
    first = group.entries[0].tensor if group.base is None else group.base.tensor
    if merge.uncalibrated == "base" or all(torch.equal(first, entry.tensor) for entry in group.entries):
        return first.clone()
    if merge.uncalibrated == "error":
        raise ModelError(
            f"{show(name)} differs between the models, and text does not run through it: add `uncalibrated: base` or "
            "`uncalibrated: average`",
            code="uncalibrated-tensors",
        )
    columns = [merge.alphas.models.index(expert) for expert in merge.alphas.experts]
    wide = torch.promote_types(first.dtype, torch.float32)
    own = [entry.tensor.to(wide) for entry in group.non_base if _column(merge, entry) in columns]
    return torch.stack(own).mean(0).to(first.dtype)


def _column(merge: ActiveMerge, entry: Any) -> int | None:
    """Index of an input's model in the alphas; None if they do not know it."""
    return merge.columns.get(entry.id, merge.columns.get(str(entry.id)))


def _closed_form(merge: ActiveMerge, name: str, base: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """A tensor of the closed form: the stored one, or computed from the experts, in canonical order."""
    stored = merge.read_direction(name)
    if stored is not None:
        return stored.to(base.device)
    alphas = merge.alphas
    experts = [tensors[alphas.models.index(model)] for model in sorted(alphas.experts)]
    assert alphas.closed_form is not None
    with product_precision(base.device, tf32=False):  # as in `DirectionStore`, so that the bits are the same
        return alphas.closed_form.combine(name, base, experts)  # type: ignore[arg-type]


def _check_mergekit() -> None:
    try:
        found = version("mergekit")
    except PackageNotFoundError as error:
        raise RegistrationError(
            f"mergekit is not installed: pip install 'mergekit>={OLDEST_MERGEKIT}'", code="missing-mergekit"
        ) from error
    if Version(found) < Version(OLDEST_MERGEKIT):
        raise RegistrationError(
            f"{METHOD} needs mergekit {OLDEST_MERGEKIT} or newer, but {show(found)} is installed: "
            f"pip install -U 'mergekit>={OLDEST_MERGEKIT}'",
            code="old-mergekit",
        )


def register() -> None:
    """Register `submodule_linear` with mergekit; calling it again changes nothing.

    Raises:
        RegistrationError: mergekit is missing or too old, or another package has taken the name.

    Examples:
        >>> mergekit_slta.register()
    """
    instance = method()
    from mergekit import merge_methods

    taken = {known.spec.name: known for known in merge_methods.registered_methods()}.get(METHOD)
    if taken is instance:
        return
    if taken is not None:
        raise RegistrationError(
            f"the name {METHOD} is already registered with mergekit {version('mergekit')} by "
            f"{type(taken).__module__}: uninstall one of the two",
            code="name-taken",
        )
    merge_methods.register(instance)
