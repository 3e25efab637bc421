"""The paper's measures of linearity (sections 2.2-2.3, A.1-A.2), computed from features.

Scope: tensors only, one calibration row at a time. The features of a submodule are given at several points of weight
space `theta_0 + sum_t c_t tau_t`. Their changes from the base are reduced to inner products (`Products`), which are
summed over parts of a row's features (the vocabulary of the head comes in chunks). All measures are computed from them.

Decisions where the paper gives none, or contradicts itself:
- if an expert does not change the features of a row, the row has no score and is left out of the means;
- the expectation for a pair or triple of experts is over the rows of their tasks;
- Eq. 17 sums T (T - 1) / 2 pairs and divides by T (T - 1), but the text says "average over all possible pairs". The
  average is computed here; two equal experts then have a baseline of 1;
- the weight disentanglement error of the companion paper is measured on features: on the rows of task t, the distance
  between the features of the merged submodule and those of theta_0 + c_t tau_t, relative to the change by expert t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from mergekit_slta.errors import DataError

NUM_INTERVALS = 10
"""N of Eq. 19."""
PAIR_GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Weights of each expert of a pair (the paper's Fig. 3 and 4)."""
TRIPLE_GRID = (0.3, 0.5, 0.7)
"""Weights of each expert of a triple."""

Coefficients = tuple[float, ...]
"""T coefficients c_t: the weights theta_0 + sum_t c_t tau_t."""


def non_linearity_score(features: Tensor) -> float:
    """The Non-linearity Score of one row (Eq. 19), a sum of (N + 1)^2 squared deviations; 0 is exactly linear.

    Args:
        features: [N + 1, ...] outputs f(x; theta_0 + i / N tau) for i = 0..N, any floating dtype.

    Returns:
        The score; NaN if the expert does not change the features.

    Raises:
        DataError: they are no such tensor, or not finite.

    Examples:
        >>> points = torch.linspace(0, 1, 11)[:, None]
        >>> mergekit_slta.non_linearity_score(points * torch.ones(3)) < 1e-9
        True
    """
    usable = isinstance(features, Tensor) and features.is_floating_point() and features.layout == torch.strided
    if not usable or features.is_meta or features.dim() < 2 or len(features) < 2:
        found = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise DataError(
            f"`features` is of type {found}: it must be a dense floating tensor [N + 1, ...] of N + 1 >= 2 points",
            code="invalid-value",
        )
    if not torch.isfinite(features).all():
        raise DataError(
            "`features` has NaN or infinite values: they must be a model's finite outputs", code="invalid-value"
        )
    changes = (features[1:] - features[0]).flatten(1).to(torch.float64)
    return float(scores(distance_ratios(changes @ changes.T)))


def distance_ratios(grams: Tensor) -> Tensor:
    """D(f(theta_i), f(theta_j)) / D(f(theta), f(theta_0)) of Eq. 19 and Fig. 6.

    Args:
        grams: [..., N, N] float64 inner products of the changes f(theta_i) - f(theta_0), i = 1..N.

    Returns:
        [..., N + 1, N + 1] float64; NaN if the last change is zero.
    """
    steps = grams.shape[-1]
    full = torch.zeros((*grams.shape[:-2], steps + 1, steps + 1), dtype=torch.float64)
    full[..., 1:, 1:] = grams
    diagonal = full.diagonal(dim1=-2, dim2=-1)
    squared = diagonal[..., :, None] + diagonal[..., None, :] - 2 * full
    squared.diagonal(dim1=-2, dim2=-1).zero_()  # exactly zero, without rounding errors
    whole = full[..., -1, -1]
    return squared.clamp(min=0).sqrt() / torch.where(whole > 0, whole, torch.nan).sqrt()[..., None, None]


def scores(ratios: Tensor) -> Tensor:
    """Eq. 19 from `distance_ratios`: [..., N + 1, N + 1] -> [...]."""
    line = torch.linspace(0, 1, ratios.shape[-1], dtype=torch.float64)
    return ((ratios - (line[:, None] - line[None, :]).abs()) ** 2).sum((-2, -1))


@dataclass(frozen=True)
class Grid:
    """The points of weight space at which the features of a task's rows are needed.

    Attributes:
        task: index of the task and of its expert.
        num_models: T.
        own: N points from the base (excluded) to that expert.
        others: the points of the other experts.
        mixed: C points: every pair with that expert over `PAIR_GRID`, then every triple over `TRIPLE_GRID`.
        members: the experts of each point of `mixed`.
    """

    task: int
    num_models: int

    @property
    def own(self) -> list[Coefficients]:
        return [self._point((self.task,), (step / NUM_INTERVALS,)) for step in range(1, NUM_INTERVALS + 1)]

    @property
    def others(self) -> list[Coefficients]:
        return [self._point((model,), (1.0,)) for model in range(self.num_models) if model != self.task]

    @property
    def anchors(self) -> list[Coefficients]:
        """`own`, then `others`: K points with which the mixed points are compared."""
        return [*self.own, *self.others]

    @property
    def members(self) -> list[tuple[int, ...]]:
        return [members for members, _ in self._mixtures()]

    @property
    def mixed(self) -> list[Coefficients]:
        return [self._point(members, weights) for members, weights in self._mixtures()]

    def column(self, model: int) -> int:
        """The index of an expert among the anchors."""
        return NUM_INTERVALS - 1 if model == self.task else NUM_INTERVALS + model - (model > self.task)

    def alone(self, point: Coefficients) -> Coefficients:
        """The point of the own expert alone, at its weight in `point`. It is in `own`: grids are multiples of 1 / N."""
        return self.own[round(point[self.task] * NUM_INTERVALS) - 1]

    def _point(self, members: Sequence[int], weights: Sequence[float]) -> Coefficients:
        point = [0.0] * self.num_models
        for model, weight in zip(members, weights, strict=True):
            point[model] = weight
        return tuple(point)

    def _mixtures(self) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
        for size, grid in ((2, PAIR_GRID), (3, TRIPLE_GRID)):
            for members in combinations(range(self.num_models), size):
                if self.task in members:
                    for weights in product(grid, repeat=size):
                        yield members, weights


@dataclass
class Products:
    """Inner products of a row's feature changes, summed over parts of the features.

    Attributes:
        anchors: [K, K] float64, among the changes at the anchors.
        norms: [C] float64, squared norms of the changes at the mixed points.
        cross: [C, K] float64, between the changes at mixed points and at anchors.
    """

    anchors: Tensor
    norms: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, grid: Grid) -> Products:
        """All zeros: no features added yet."""
        size, count = len(grid.anchors), len(grid.mixed)
        shapes = ((size, size), (count,), (count, size))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add_anchors(self, changes: Tensor) -> None:
        """Add a part of the features: `changes` [K, n] float64 at the anchors."""
        self.anchors += (changes @ changes.T).cpu()

    def add_mixed(self, place: int, change: Tensor, anchors: Tensor) -> None:
        """Add the same part at mixed point number `place`: `change` [n] and the anchors' changes [K, n], float64."""
        self.norms[place] += (change @ change).cpu()
        self.cross[place] += (anchors @ change).cpu()


@dataclass(frozen=True)
class RowMeasures:
    """The measures of one row of a task for one submodule; NaN if a change in a denominator is zero.

    Attributes:
        ratios: [N + 1, N + 1], see `distance_ratios`.
        score: Eq. 19.
        projections: [C] the terms of Eq. 8: |merged| cos / |linear combination|.
        cosines: [C] Eq. 15.
        disentanglement: [C] distance from the own expert alone, relative to its change; used for pairs only.
        cosine_base: the terms of Eq. 17, the mean over pairs of experts.
    """

    ratios: Tensor
    score: Tensor
    projections: Tensor
    cosines: Tensor
    disentanglement: Tensor
    cosine_base: Tensor

    @classmethod
    def of(cls, products: Products, grid: Grid) -> RowMeasures:
        """Compute all measures of a row."""
        ratios = distance_ratios(products.anchors[:NUM_INTERVALS, :NUM_INTERVALS])
        columns = [grid.column(model) for model in range(grid.num_models)]
        experts = products.anchors[columns][:, columns]  # [T, T]
        weights = torch.tensor(grid.mixed, dtype=torch.float64).reshape(-1, grid.num_models)  # [C, T]
        inner = (products.cross[:, columns] * weights).sum(-1)  # <merged, linear>
        linear = _or_nan(torch.einsum("cj,jk,ck->c", weights, experts, weights))
        merged = _or_nan(products.norms)
        places = (
            weights[:, grid.task] * NUM_INTERVALS
        ).round().long() - 1  # index of theta_0 + c_t tau_t among the own points
        apart = (
            products.norms + products.anchors.diagonal()[places] - 2 * products.cross.gather(1, places[:, None])[:, 0]
        )
        return cls(
            ratios=ratios,
            score=scores(ratios),
            projections=inner / linear,
            cosines=inner / (linear * merged).sqrt(),
            disentanglement=(apart.clamp(min=0) / _or_nan(experts[grid.task, grid.task])).sqrt(),
            cosine_base=_mean_cosine(experts),
        )


def _or_nan(squared: Tensor) -> Tensor:
    return torch.where(squared > 0, squared, torch.nan)


def _mean_cosine(grams: Tensor) -> Tensor:
    """Mean cosine over all pairs of rows; NaN with fewer than two."""
    norms = _or_nan(grams.diagonal()).sqrt()
    cosines = grams / norms[:, None] / norms[None, :]
    above = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    return cosines[above].nanmean() if above.any() else torch.tensor(torch.nan, dtype=torch.float64)


def projection_distance(terms: Tensor) -> Tensor:
    """Eq. 8: |1 - mean over rows of the terms|, [rows, ...] -> [...]."""
    return (1 - terms.nanmean(0)).abs()
