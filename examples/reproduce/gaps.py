"""How much of what an expert has learnt a merge keeps, the choice of settings, and the spread over seeds.

Scope: arithmetic over the scores of a run; standard library only. Whatever is not there (yet) is None.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
Value = Callable[[Result], float | None]
"""What is read off a candidate's result."""


def recovered(base: float | None, expert: float | None, merged: float | None) -> float | None:
    """Share of the gap between two losses that a merge recovers: 0 is the base, 1 the expert.

    None where a loss is missing, and where the expert is no better than the base: there is no gap to recover then.
    """
    if base is None or expert is None or merged is None or base <= expert:
        return None
    return (base - merged) / (base - expert)


def loss(result: Result | None, split: str, task: str) -> float | None:
    """A completion loss, if it has been measured."""
    return ((result or {}).get(split) or {}).get(task, {}).get("loss")


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and standard deviation (n - 1); None of a single value."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where nothing was measured."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def settings_label(settings: Mapping[str, Any]) -> str:
    """How a table calls a method's settings."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


@dataclass(frozen=True)
class Evidence:
    """The results of a run: references and candidates, by name."""

    results: Mapping[str, Result]

    def shares(self, result: Result, split: str = "test") -> dict[str, float | None]:
        """Share of the gap recovered, by task of the candidate."""
        base = self.results.get("base")
        return {
            task: recovered(
                loss(base, split, task), loss(self.results.get(task), split, task), loss(result, split, task)
            )
            for task in result["tasks"]
        }

    def mean(self, result: Result, split: str = "test") -> float | None:
        """Over the candidate's tasks; None unless every task has a share, since the others alone would flatter."""
        shares = list(self.shares(result, split).values())
        return None if None in shares else statistics.fmean(shares)

    def worst(self, result: Result) -> float | None:
        """That of the task that lost most; None as in `mean`."""
        shares = list(self.shares(result).values())
        return None if None in shares else min(shares)

    def candidates(self, tasks: Sequence[str] | None = None, method: str | None = None) -> list[Result]:
        """Results of merges, of all sets and methods unless told, in the order of their names."""
        return [
            result
            for _, result in sorted(self.results.items())
            if "method" in result
            and (tasks is None or tuple(result["tasks"]) == tuple(tasks))
            and (method is None or result["method"] == method)
        ]

    def group(self, tasks: Sequence[str], method: str, settings: Mapping[str, Any]) -> list[Result]:
        """The seeds of one setting."""
        return [result for result in self.candidates(tasks, method) if result["settings"] == settings]

    def spread(self, tasks: Sequence[str], method: str, settings: Mapping[str, Any], value: Value) -> Spread | None:
        """Over the seeds of one setting."""
        return Spread.of(value(result) for result in self.group(tasks, method, settings))

    def tuned(self, tasks: Sequence[str], method: str, split: str) -> Result | None:
        """The candidate with the best mean on the rows of `split`: the first of equals."""
        known = [(self.mean(result, split), result) for result in self.candidates(tasks, method)]
        known = [(mean, result) for mean, result in known if mean is not None]
        return max(known, key=lambda pair: pair[0])[1] if known else None

    def grids(self) -> list[str]:
        """Methods whose settings are chosen: their results have no seed."""
        return sorted({result["method"] for result in self.candidates() if result.get("seed") is None})

    def untuned(self) -> list[tuple[str, dict[str, Any]]]:
        """(method, settings) of everything that has a seed, and hence nothing to choose."""
        found = {
            (result["method"], settings_label(result["settings"])): result["settings"]
            for result in self.candidates()
            if result.get("seed") is not None
        }
        return [(method, found[method, label]) for method, label in sorted(found)]
