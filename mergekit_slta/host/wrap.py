"""Wrap mergekit's `run_merge` so that the pre-pass runs first. All of mergekit's commands call this function."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from mergekit_slta.recipe.settings import METHOD

_WRAPPED = "_mergekit_slta_original"


def wrap_run_merge(module: ModuleType) -> None:
    """Replace `run_merge` in `mergekit.merge` and in the modules of mergekit that have imported it.

    The new function runs the pre-pass for recipes of this method, and calls the original for all others. Calling this
    again changes nothing.

    Args:
        module: `mergekit.merge`.
    """
    original = module.run_merge
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def run_merge(merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(merge_config, "merge_method", None) != METHOD:
            return original(merge_config, *args, **kwargs)
        from mergekit_slta.host.merge import run

        return run(original, merge_config, *args, **kwargs)

    setattr(run_merge, _WRAPPED, original)
    for loaded in list(sys.modules.values()):  # also modules that imported the name before this package was loaded
        if getattr(loaded, "__name__", "").startswith("mergekit.") and vars(loaded).get("run_merge") is original:
            loaded.run_merge = run_merge  # type: ignore[attr-defined]
