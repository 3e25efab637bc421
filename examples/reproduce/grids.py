"""The methods whose settings are chosen, their grids, and how a grid goes on while the best of it lies at an edge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gaps import Evidence
from methods import ALL, FOUR, TRIPLE, Candidate, Settings, recipe

Recipe = Callable[[Sequence[str], Settings], dict[str, Any]]


@dataclass(frozen=True)
class Axis:
    """A setting of a method.

    Attributes:
        ladder: the values that it may take, in their order.
        first: those that every grid has.
        bounds: ends of the ladder that are the method's own: beyond them it is not defined, or is another method.
    """

    ladder: tuple[float, ...]
    first: tuple[float, ...]
    bounds: tuple[float, ...] = ()

    def next(self, value: float, side: int) -> float | None:
        """The ladder's next value below (-1) or above (1) another; None at its end."""
        further = [each for each in self.ladder if side * (each - value) > 0]
        return min(further, key=lambda each: abs(each - value), default=None)

    def beyond(self, value: float, tried: Sequence[float]) -> Iterator[float | None]:
        """The next value on every side of `value` on which none was tried, unless this is a bound."""
        for side in (-1, 1):
            following = self.next(value, side)
            untried = not any(side * (each - value) > 0 for each in tried)
            if untried and not (following is None and value in self.bounds):
                yield following

    def around(self, value: float) -> list[float]:
        """The value and its neighbours on the ladder."""
        near = (self.next(value, -1), value, self.next(value, 1))
        return [each for each in near if each is not None]


@dataclass(frozen=True)
class Grid:
    """A method's settings, and the recipe that they make.

    Attributes:
        axes: by the settings' names; empty where there is nothing to choose.
        recipe: from tasks and settings, for `merging.merge`.
        untuned: the settings that its paper or repository recommends without tuning; shown beside the tuned ones.
        in_paper: the paper of `submodule_linear` compares with it.
    """

    axes: dict[str, Axis]
    recipe: Recipe
    untuned: Settings | None = None
    in_paper: bool = field(default=False, kw_only=True)

    def first(self) -> Iterator[Settings]:
        """Every combination of the values that every grid has."""
        for values in itertools.product(*(axis.first for axis in self.axes.values())):
            yield dict(zip(self.axes, values, strict=True))

    def open_sides(self, best: Settings, known: Sequence[Settings]) -> Iterator[tuple[str, float | None]]:
        """(setting, value to try next or None) of every side on which the best of the known settings is at an edge."""
        for key, axis in self.axes.items():
            line = [each[key] for each in known if {**each, key: best[key]} == best]
            yield from ((key, value) for value in axis.beyond(best[key], line))

    def beyond(self, best: Settings, known: Sequence[Settings]) -> Iterator[Settings]:
        """What to try next on the open sides: the other settings as they are, and one step to every side."""
        for key, value in self.open_sides(best, known):
            if value is None:
                continue
            near = [[value] if other == key else axis.around(best[other]) for other, axis in self.axes.items()]
            points = (dict(zip(self.axes, values, strict=True)) for values in itertools.product(*near))
            yield from (point for point in points if point not in known)

    def neighbours(self, best: Settings) -> Iterator[Settings]:
        """Settings, and those with one of them moved by one place on its ladder."""
        yield best
        for key, axis in self.axes.items():
            yield from ({**best, key: value} for value in axis.around(best[key]) if value != best[key])

    def bound(self, best: Settings) -> list[str]:
        """The settings that are at a bound of the method's own."""
        return [key for key, axis in self.axes.items() if best[key] in axis.bounds]


def steps(first: int, last: int, unit: float = 0.1) -> tuple[float, ...]:
    """Multiples of a unit, both ends included."""
    return tuple(round(number * unit, 2) for number in range(first, last + 1))


WEIGHT = Axis((0.05, *steps(1, 30)), steps(1, 10))
"""Of task vectors, and of what is merged of them."""
LAMBDA = Axis((0.1, *steps(1, 20, 0.2)), steps(1, 10, 0.2))
"""The same of methods that average: 1 is the mean of those that agree in sign."""


def data_free(method: str) -> Recipe:
    """Of a method of `data_free`."""
    return lambda tasks, settings: {"peer": method, "tasks": list(tasks), **settings}


GRIDS: dict[str, Grid] = {
    "weight average": Grid({}, lambda tasks, _: recipe("linear", tasks, {"weight": 1.0}), in_paper=True),
    "task arithmetic": Grid(
        {"weight": WEIGHT},
        lambda tasks, own: recipe("task_arithmetic", tasks, own, normalize=False),
        in_paper=True,
    ),
    "DARE": Grid(  # without drops it is task arithmetic
        {"drop": Axis((*steps(0, 9), 0.95, 0.99), steps(6, 9), (0.0,)), "weight": WEIGHT},
        lambda tasks, own: recipe(
            "dare_linear", tasks, {"weight": own["weight"], "density": round(1 - own["drop"], 2)}, normalize=False
        ),
        in_paper=True,
    ),
    "TIES": Grid(
        {"density": Axis((0.01, 0.02, 0.05, *steps(1, 10)), (0.2, 0.5), (1.0,)), "lambda": LAMBDA},
        lambda tasks, own: recipe(
            "ties", tasks, {"weight": 1.0, "density": own["density"]}, normalize=True, **{"lambda": own["lambda"]}
        ),
        in_paper=True,
    ),
    "Breadcrumbs": Grid(
        {"weight": WEIGHT},
        lambda tasks, own: recipe("breadcrumbs", tasks, {**own, "density": 0.85, "gamma": 0.01}, normalize=False),
        in_paper=True,
    ),
    "DELLA": Grid(  # density ± epsilon has to be between 0 and 1
        {"density": Axis(steps(2, 8), (0.3, 0.6), (0.2, 0.8)), "lambda": LAMBDA},
        lambda tasks, own: recipe(
            "della", tasks, {"weight": 1.0, "density": own["density"], "epsilon": 0.15}, normalize=True,
            **{"lambda": own["lambda"]},
        ),
    ),
    "SCE": Grid(  # has no scale
        {"select_topk": Axis((0.01, 0.02, 0.05, *steps(1, 10)), (0.1, 0.3, 1.0), (1.0,))},
        lambda tasks, own: recipe("sce", tasks, {}, **own),
    ),
    "model stock": Grid({}, lambda tasks, _: recipe("model_stock", tasks, {})),
    **{
        method: Grid({"scale": WEIGHT}, data_free(method), {"scale": 1.0})
        for method in ("WUDI", "SWUDI-A", "ACTMat", "TSV-M", "Iso-C", "Iso-CTS")
    },
    "Consensus TA": Grid(  # the middle of its paper's masks, and task arithmetic's weight without tuning
        {"mask": Axis(steps(1, 10), (0.4,)), "scale": WEIGHT}, data_free("Consensus TA"), {"mask": 0.4, "scale": 0.4}
    ),
}  # fmt: skip
"""In the order of the tables. The paper (A.3.4) gives grids for task arithmetic and DARE; the first values of the
others are around those that their own papers recommend. Every method with a scale has ten of it."""


def candidate(tasks: Sequence[str], method: str, settings: Settings) -> Candidate:
    """A point of a grid."""
    return Candidate(tuple(tasks), method, settings, GRIDS[method].recipe(tasks, settings))


def planned(tasks: Sequence[str]) -> list[str]:
    """Which grids a set of experts gets: all, those of the paper, or what the number of experts is compared by."""
    if tuple(tasks) == FOUR:
        return ["task arithmetic"]
    return [method for method, grid in GRIDS.items() if grid.in_paper or tuple(tasks) in (ALL, TRIPLE)]


def baselines(tasks: Sequence[str], methods: Iterable[str] = GRIDS) -> list[Candidate]:
    """What every grid of some methods has."""
    return [candidate(tasks, method, settings) for method in methods for settings in GRIDS[method].first()]


def untuned(tasks: Sequence[str], methods: Iterable[str] = GRIDS) -> list[Candidate]:
    """The recommended settings of those methods that have them."""
    return [candidate(tasks, method, own) for method in methods if (own := GRIDS[method].untuned) is not None]


def settings_tried(evidence: Evidence, tasks: Sequence[str], method: str, split: str = "calibration") -> list[Settings]:
    """Of all results of a method that have scores on the rows of `split`."""
    return [result["settings"] for result in evidence.candidates(tasks, method) if split in result]


def extensions(
    evidence: Evidence, tasks: Sequence[str], methods: Iterable[str] = GRIDS, split: str = "calibration"
) -> list[Candidate]:
    """What is to be tried next on the rows of `split`: beyond the best there, if it is at an edge."""
    found: dict[str, Candidate] = {}
    for method in methods:
        best = evidence.tuned(tasks, method, split)
        if best is None:
            continue
        for settings in GRIDS[method].beyond(best["settings"], settings_tried(evidence, tasks, method, split)):
            one = candidate(tasks, method, settings)
            found[one.name] = one
    return list(found.values())


def nearest(evidence: Evidence, tasks: Sequence[str], methods: Iterable[str] = GRIDS) -> list[Candidate]:
    """The best settings on the calibration rows and the next ones on every side: where the search on the test rows
    begins."""
    found = []
    for method in methods:
        if best := evidence.tuned(tasks, method, "calibration"):
            found += [candidate(tasks, method, each) for each in GRIDS[method].neighbours(best["settings"])]
    return found
