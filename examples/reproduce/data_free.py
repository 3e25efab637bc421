"""Merges from the weights of the experts alone, a tensor at a time, done here since mergekit has none of them.

* WUDI: Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
  Vectors", ICML 2025 (arXiv 2503.08099); https://github.com/nathanielyvo/WUDI-Merging.
* SWUDI-A: Wei et al., "Closed-Form Spectral Regularization for Multi-Task Model Merging", 2026 (arXiv 2606.07289), with
  its default rule for the rank; https://github.com/WalkerWorldPeace/MLLMerging (there `aswudi`).
* ACTMat: Hameed et al., "Model Merging via Data-Free Covariance Estimation", 2026 (arXiv 2604.01329);
  https://github.com/marawangamal/actmat.
* TSV-M: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025 (arXiv
  2412.00081); https://github.com/AntoAndGar/task_singular_vectors.
* Iso-C, Iso-CTS: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
  Subspaces", ICML 2025 (arXiv 2502.04959); https://github.com/danielm1405/iso-merging.
* Consensus TA: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024 (arXiv
  2405.07813); https://github.com/nik-dim/tall_masks.

All but the last solve for the matrices of the decoder's layers and average everything else. Consensus TA goes through
single weights, those of embeddings and norms too. What comes out is a merged task vector, which is added to the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from closed_form import load_models, lot_linear, mean
from torch import Tensor
from transformers import PreTrainedModel

SOLVES_EMBEDDINGS = False
"""Whether embeddings and output head count as matrices to solve for; they are averaged here.

The repositories differ: ACTMat's averages what has 20,000 rows or more, SWUDI-A's leaves both as in the base where it
merges language models, and those of TSV-M and Iso-C, made for CLIP, solve for every matrix but a projection to text.
"""

NORM_FLOOR, EIGENVALUE_FLOOR = 1e-12, 1e-8
"""What a task vector's squared norm, and an eigenvalue in SWUDI-A, are at least, as in its repository."""

WUDI_STEPS, WUDI_RATE = 300, 1e-5
"""Of Adam in WUDI: the paper's, which uses them untuned on all models (its script for RoBERTa has 2e-5)."""

COMMON_SPACE = 0.8
"""Share of Iso-CTS's singular vectors that come from the sum of the task vectors: the paper's."""

VOTES = 2
"""Tasks that a weight has to matter to in Consensus TA: the paper's, without weights of one task only or of none."""

Solver = Callable[..., Tensor]
"""(task vectors of every expert, [out, in] float32, ...) -> merged task vector."""


def quadratic(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """C [in, in] and D [out, in] of WUDI's objective, the sum of |(T - X_n) X_n^T|^2 / |X_n|^2: half its gradient is
    T C - D."""
    weights = [1 / vector.square().sum().clamp_min(NORM_FLOOR) for vector in vectors]
    moments = [weight * vector.T @ vector for weight, vector in zip(weights, vectors, strict=True)]
    return sum(moments), sum(vector @ moment for vector, moment in zip(vectors, moments, strict=True))


def wudi(vectors: Sequence[Tensor], steps: int = WUDI_STEPS, rate: float = WUDI_RATE) -> Tensor:
    """Adam on the objective of `quadratic`, from the sum of the task vectors on."""
    moment, wanted = quadratic(vectors)
    merged = torch.stack(list(vectors)).sum(0)
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = 2 * (merged @ moment - wanted)
        optimizer.step()
    return merged


def swudi_a(vectors: Sequence[Tensor]) -> Tensor:
    """The same objective solved in the leading eigenvectors Q_k of C, the sum S of the task vectors elsewhere:
    S - S Q_k Q_k^T + D Q_k L_k^-1 Q_k^T, with k = (sum of sqrt l)^2 / (sum of l) over all eigenvalues l, rounded up."""
    vectors = [vector.double() for vector in vectors]
    moment, wanted = quadratic(vectors)
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    eigenvalues = eigenvalues.clamp_min(EIGENVALUE_FLOOR)
    rank = math.ceil(eigenvalues.sqrt().sum().square() / eigenvalues.sum())
    leading = eigenvectors[:, -rank:]
    total = sum(vectors)
    return total + (wanted @ leading / eigenvalues[-rank:] - total @ leading) @ leading.T


def actmat(vectors: Sequence[Tensor]) -> Tensor:
    """The least-squares merge of task vectors with X_n^T X_n in the place of the second moments of inputs.

    The pseudo-inverse drops what the repository's, in float32, drops.
    """
    vectors = [vector.double() for vector in vectors]
    return lot_linear([vector.T @ vector for vector in vectors], vectors, torch.zeros_like(vectors[0]))


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def leading(vector: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left singular vectors [out, rank], singular values, right singular vectors [rank, in]."""
    left, values, right = torch.linalg.svd(vector, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of several matrices beside each other, made orthonormal together, and their singular values."""
    left, values, right = zip(*parts, strict=True)
    return polar(torch.cat(left, 1)), torch.cat(values), polar(torch.cat(right))


def tsv_m(vectors: Sequence[Tensor]) -> Tensor:
    """A share of 1 / T of every task vector's singular vectors, made orthonormal together."""
    rank = min(vectors[0].shape) // len(vectors)
    left, values, right = joined([leading(vector, rank) for vector in vectors])
    return left * values @ right


def iso_c(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of the task vectors with all singular values at their mean."""
    left, values, right = torch.linalg.svd(sum(vectors), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(vectors: Sequence[Tensor], share: float = COMMON_SPACE) -> Tensor:
    """As Iso-C, but the least singular vectors make room for those of what the task vectors have beside the leading."""
    size, count = min(vectors[0].shape), len(vectors)
    own = round((size - int(size * share)) / count)
    common = leading(sum(vectors), size - own * count)
    rest = [leading(vector - common[0] @ (common[0].T @ vector), own) for vector in vectors]
    left, values, right = joined([*rest, common])
    return values.mean() * left @ right


def consensus(vectors: Sequence[Tensor], mask: float) -> Tensor:
    """The sum of the task vectors where it matters to at least two tasks: to those whose own change there is more than
    `mask` times what the others change.

    The paper chooses `mask` for every task from 0.2 to 0.6, by the scores of models that are masked for one task. Here
    one value is for all tasks.
    """
    total = sum(vectors)
    votes = sum((vector.abs() > mask * (total - vector).abs()).int() for vector in vectors)
    return total * (votes >= VOTES)


METHODS: dict[str, Solver] = {
    "WUDI": wudi, "SWUDI-A": swudi_a, "ACTMat": actmat, "TSV-M": tsv_m, "Iso-C": iso_c, "Iso-CTS": iso_cts,
    "Consensus TA": consensus,
}  # fmt: skip


def matrices(model: PreTrainedModel) -> set[str]:
    """Names of the matrices to solve for."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = () if SOLVES_EMBEDDINGS else {id(end.weight) for end in ends}
    return {name for name, value in model.named_parameters() if value.dim() == 2 and id(value) not in left_out}


@torch.no_grad()
def merged_task_vector(method: str, base: Path, experts: Sequence[Path], **settings: float) -> dict[str, Tensor]:
    """Merge the task vectors of experts by one of `METHODS`; name -> float32 tensor."""
    origin, *models = load_models(base, experts)
    solve, solved, found = METHODS[method], matrices(origin), {}
    for name, start in origin.named_parameters():
        vectors = [model.get_parameter(name) - start for model in models]
        whole = solve is consensus or name in solved
        found[name] = solve(vectors, **settings).float() if whole else mean(vectors)
    return found
