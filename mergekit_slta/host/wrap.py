"""Put the pre-pass before mergekit's `run_merge`."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from mergekit_slta.host.method import NAME

_WRAPPED = "_mergekit_slta_original"


def wrap_run_merge(module: ModuleType) -> None:
    """Put the pre-pass before `mergekit.merge.run_merge`, for this method only; calling it again changes nothing."""
    original = module.run_merge
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def run_merge(merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(merge_config, "merge_method", None) != NAME:
            return original(merge_config, *args, **kwargs)
        from mergekit_slta.host.merge import run

        return run(original, merge_config, *args, **kwargs)

    setattr(run_merge, _WRAPPED, original)
    for loaded in list(sys.modules.values()):  # modules that imported the name before this package came
        if getattr(loaded, "__name__", "").startswith("mergekit.") and vars(loaded).get("run_merge") is original:
            loaded.run_merge = run_merge  # type: ignore[attr-defined]
