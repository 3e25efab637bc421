"""Average the linearity measures of the rows into a submodule's entry of the linearity file.

Scope: tensors only; expectations over rows as in Eq. 8, 16 and 17.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mergekit_slta.maths.linearity import Grid, RowMeasures, projection_distance


@dataclass(frozen=True)
class Measures:
    """The measures of one submodule: means over rows; NaN if nothing changes.

    Attributes:
        score, score_std: [T] Eq. 19 of every expert: mean and standard deviation over the rows of its task.
        ratios: [T, N + 1, N + 1], see `distance_ratios`.
        pair_projection, pair_cosine, pair_disentanglement: [pairs, 25] Eq. 8, Eq. 16 and the weight disentanglement
            error of every pair of experts over `PAIR_GRID` x `PAIR_GRID`; the last is a mean over the pair's two tasks.
        triple_projection, triple_cosine: [triples, 27] the same over `TRIPLE_GRID`.
        cosine_base: [] Eq. 17.
        pair_disagreement: [pairs, 25] share of tokens for which the merged model and the task's expert alone, at the
            same weight, predict different next tokens; NaN for submodules that predict no tokens.
    """

    score: Tensor
    score_std: Tensor
    ratios: Tensor
    pair_projection: Tensor
    pair_cosine: Tensor
    pair_disentanglement: Tensor
    triple_projection: Tensor
    triple_cosine: Tensor
    cosine_base: Tensor
    pair_disagreement: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[int, RowMeasures]], num_models: int, apart: Sequence[Tensor] | None) -> Measures:
        """Average over the rows.

        Args:
            rows: the task of each row, and its measures.
            num_models: T.
            apart: [C] per row, the terms of `pair_disagreement`; None if the submodule predicts no tokens.
        """
        own = [[row for task, row in rows if task == model] for model in range(num_models)]
        scored = [torch.stack([row.score for row in group]) for group in own]
        grids = [Grid(task, num_models) for task in range(num_models)]
        missing = torch.full_like(rows[0][1].cosines, torch.nan)

        def gather(size: int, field: str) -> list[list[Tensor]]:
            """Per combination of `size` experts, and per task in it: [rows, configurations]."""
            combined = []
            for members in combinations(range(num_models), size):
                per_task = []
                for task in members:
                    chosen = [place for place, other in enumerate(grids[task].members) if other == members]
                    values = [
                        (missing if apart is None else apart[number]) if field == "apart" else getattr(row, field)
                        for number, (owner, row) in enumerate(rows)
                        if owner == task
                    ]
                    per_task.append(torch.stack([value[chosen] for value in values]))
                combined.append(per_task)
            return combined

        def over_rows(size: int, field: str) -> Tensor:
            found = [torch.cat(per_task) for per_task in gather(size, field)]
            reduced = [projection_distance(part) if field == "projections" else part.nanmean(0) for part in found]
            return torch.stack(reduced) if reduced else torch.zeros((0, 0), dtype=torch.float64)

        def over_tasks(field: str) -> Tensor:
            found = [torch.stack([part.nanmean(0) for part in per_task]).nanmean(0) for per_task in gather(2, field)]
            return torch.stack(found) if found else torch.zeros((0, 0), dtype=torch.float64)

        return cls(
            score=torch.stack([values.nanmean() for values in scored]),
            score_std=torch.stack([_std(values) for values in scored]),
            ratios=torch.stack([torch.stack([row.ratios for row in group]).nanmean(0) for group in own]),
            pair_projection=over_rows(2, "projections"),
            pair_cosine=over_rows(2, "cosines"),
            pair_disentanglement=over_tasks("disentanglement"),
            triple_projection=over_rows(3, "projections"),
            triple_cosine=over_rows(3, "cosines"),
            cosine_base=torch.stack([row.cosine_base for _, row in rows]).nanmean(),
            pair_disagreement=over_tasks("apart"),
        )


def _std(values: Tensor) -> Tensor:
    """Standard deviation of the values that are not NaN."""
    found = values[~values.isnan()]
    return found.std(correction=0) if len(found) else torch.tensor(torch.nan, dtype=torch.float64)
