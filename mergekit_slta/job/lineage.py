"""Find which of some models is the base of the others.

Scope: names, and what the models say of themselves (`checkpoints.origins`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_slta.checkpoints.origins import Origin, is_usable, same_model
from mergekit_slta.errors import RecipeError, listing, show


@dataclass(frozen=True)
class Lineage:
    """A base and its experts.

    Attributes:
        base: the base's name.
        why: how it was found, for people.
        experts: the experts, in the order in which they were given.
        others: the experts that name another base.
    """

    base: str
    why: str
    experts: tuple[Origin, ...]
    others: tuple[Origin, ...] = ()

    def reference(self, expert: Origin) -> str:
        """An expert's name in a recipe: `base+adapter` for an adapter."""
        return f"{self.base}+{expert.name}" if expert.is_adapter else expert.name


def find_lineage(origins: Sequence[Origin], base: str | None = None) -> Lineage:
    """Find the base. The first of these rules that applies decides:

    1. `base`, if it is stated.
    2. The given model that the others name as their base.
    3. The model that all given models name as their base.
    4. The first given model, if it names no base itself.

    `config.json` names the place that a model was loaded from, which may be an earlier place of the same model. So it
    counts for rule 2 alone, and for rule 3 if one model is given or the place is a folder here.

    Args:
        origins: the given models.
        base: the base that the user states.

    Raises:
        RecipeError: no rule applies, or two given models are named as a base.
    """
    if base is not None:
        experts = tuple(origin for origin in origins if not same_model(origin.name, base))
        return Lineage(base, "stated", experts, _others(experts, base))
    named = [one for one in origins if not one.is_adapter and any(_names(other, one.name) for other in origins)]
    if len(named) == 1:
        (found,) = named
        experts = tuple(origin for origin in origins if origin is not found)
        if not _others(experts, found.name):
            by = [origin for origin in experts if _names(origin, found.name)]
            return Lineage(found.name, _why(by), experts)
    elif not named:
        shared = next((origin.base for origin in origins if origin.base), None)
        if shared and all(_names(origin, shared) for origin in origins):
            usable = next((origin.base for origin in origins if origin.base and is_usable(origin.base)), None)
            if usable and (len(origins) == 1 or os.path.isdir(usable) or all(origin.is_sure for origin in origins)):
                return Lineage(usable, _why(origins), tuple(origins))
        first, *rest = origins
        is_free = first.base is None or not (first.is_sure or any(_names(other, first.base) for other in rest))
        if rest and not first.is_adapter and is_free:
            return Lineage(first.name, "named first", tuple(rest), _others(rest, first.name))
    said = listing(
        (f"{show(one.name)} names {show(one.base)} ({one.said_by})" if one.base else f"{show(one.name)} names none")
        for one in origins
    )
    raise RecipeError(f"the base is not clear: {said}; name the base first, or with --base", code="missing-base")


def _names(origin: Origin, base: str) -> bool:
    return origin.base is not None and same_model(origin.base, base) and not same_model(origin.name, base)


def _others(experts: Sequence[Origin], base: str) -> tuple[Origin, ...]:
    """The experts that name another base, and are sure of it."""
    return tuple(one for one in experts if one.base and one.is_sure and not same_model(one.base, base))


def _why(experts: Sequence[Origin]) -> str:
    return f"named by {listing((f'{one.short} ({one.said_by})' for one in experts), 3)}"
