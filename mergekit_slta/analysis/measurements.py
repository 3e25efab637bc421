"""Compute the paper's measures for one forward group, from its outputs at interpolated experts.

Scope: the points at which submodules are evaluated, and what is kept of the outputs. `maths.linearity` has the
formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_slta.maths.linearity import Coefficients, Grid, Products, RowMeasures
from mergekit_slta.maths.linearity_summary import Measures
from mergekit_slta.runner.state import Evaluation


class GroupMeasurement:
    """Accumulates, for the submodules of one forward group, inner products per row and the most likely tokens.

    Args:
        row_task: the task of each row.
        grids: per batch, the points at which submodules are evaluated.
    """

    def __init__(self, row_task: Sequence[int], grids: Sequence[Grid]) -> None:
        self._row_task = row_task
        self._grids = grids
        self._products: dict[str, dict[int, Products]] = {}
        self._best: dict[tuple[int, Coefficients], tuple[Tensor, Tensor]] = {}
        self._vocabulary_seen: dict[int, int] = {}
        self._predicted: dict[int, tuple[Sequence[int], Sequence[int]]] = {}

    def add(self, evaluation: Evaluation) -> None:
        """Evaluate a submodule (or a part of the head's vocabulary) at every point of its batch's grid."""
        grid = self._grids[evaluation.batch]
        products = self._products.setdefault(evaluation.submodule.name, {})
        lengths = list(evaluation.lengths)
        predicts = evaluation.submodule.kind in ("model", "head")
        base = evaluation.base

        def change(point: Coefficients) -> Tensor:
            features = evaluation.outputs_at(point)
            if predicts:
                self._keep_best(evaluation.batch, point, features)
            return (features - base).flatten(1).to(torch.float64)

        anchors = torch.stack([change(point) for point in grid.anchors])  # [K, N, d]
        parts = [part.flatten(1) for part in anchors.split(lengths, dim=1)]  # per row [K, n d]
        for row, part in zip(evaluation.rows, parts, strict=True):
            products.setdefault(row, Products.zeros(grid)).add_anchors(part)
        for place, point in enumerate(grid.mixed):
            for row, part, mixed in zip(evaluation.rows, parts, change(point).split(lengths), strict=True):
                products[row].add_mixed(place, mixed.flatten(), part)
        if predicts:
            self._vocabulary_seen[evaluation.batch] = self._vocabulary_seen.get(evaluation.batch, 0) + base.shape[-1]
            self._predicted[evaluation.batch] = evaluation.rows, lengths

    def _keep_best(self, batch: int, point: Coefficients, logits: Tensor) -> None:
        """Update the most likely token of every position with the logits [tokens, v] of a part of the vocabulary."""
        logit, token = logits.max(-1)  # [tokens]
        token = token + self._vocabulary_seen.get(batch, 0)
        if (batch, point) in self._best:
            best_logit, best_token = self._best[batch, point]
            logit, token = torch.maximum(logit, best_logit), torch.where(logit > best_logit, token, best_token)
        self._best[batch, point] = logit, token

    def _disagreement(self) -> dict[int, Tensor]:
        """Disagreement on the most likely next token: row -> [C].

        The share of tokens for which a mixed point and the row's own expert alone, at the same weight, differ.
        """
        shares = {}
        for batch, (rows, lengths) in self._predicted.items():
            grid = self._grids[batch]
            parts = torch.zeros((len(grid.mixed), len(rows)), dtype=torch.float64)
            for place, point in enumerate(grid.mixed):
                apart = self._best[batch, point][1] != self._best[batch, grid.alone(point)][1]
                parts[place] = torch.stack([part.double().mean() for part in apart.cpu().split(list(lengths))])
            shares |= zip(rows, parts.T, strict=True)
        return shares

    def measures(self) -> dict[str, Tensor]:
        """`SUBMODULE|FIELD` -> a field of `Measures`, over all rows."""
        found = {}
        for name, products in self._products.items():
            rows = [
                (self._row_task[row], RowMeasures.of(products[row], Grid(self._row_task[row], self._num_models)))
                for row in sorted(products)
            ]
            shares = self._disagreement()
            apart = [shares[row] for row in sorted(products)] if shares else None
            measures = Measures.of(rows, self._num_models, apart)
            found |= {f"{name}|{field}": value for field, value in vars(measures).items()}
        return found

    @property
    def _num_models(self) -> int:
        return self._grids[0].num_models
