"""The peers of examples/reproduce against their papers' formulas, written a second way, on small random matrices."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_reproduce_closed_form import FOLDER, ROWS, WIDTH, checkpoints, regression  # noqa: F401 - a fixture
from torch.func import functional_call
from transformers import AutoModelForCausalLM

Array = NDArray[numpy.float64]


@pytest.fixture(scope="module")
def peers():
    """The modules, imported as the scripts beside them do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import data_free
        import expert_merging
        import featcal

        yield SimpleNamespace(data_free=data_free, featcal=featcal, expert_merging=expert_merging)


@pytest.fixture(params=[(7, 5), (5, 8), (30, 11)], ids=str)
def vectors(request) -> list[Array]:
    """Task vectors of three experts, of different size; of full rank, with inputs that matter less and less."""
    generator = numpy.random.default_rng(sum(request.param))
    decay = 0.7 ** numpy.arange(request.param[1])
    return [size * generator.normal(size=request.param) * decay for size in (0.5, 1.0, 2.0)]


def tensors(arrays: list[Array]) -> list[torch.Tensor]:
    """The same for torch, float64."""
    return [torch.tensor(array) for array in arrays]


def inverse_root(matrix: Array) -> Array:
    """M^(-1/2) of a positive definite matrix."""
    values, basis = numpy.linalg.eigh(matrix)
    return basis / numpy.sqrt(values) @ basis.T


def whitened(columns: Array) -> Array:
    """A (A^T A)^(-1/2): the papers' other form of the nearest orthonormal columns."""
    return columns @ inverse_root(columns.T @ columns)


def test_swudi_a_is_least_squares_in_the_leading_subspace(peers, vectors):
    """The subspace from singular vectors of the stacked task vectors, WUDI's solution in it from numpy's lstsq, and the
    sum of the task vectors outside of it."""
    scaled = [x / numpy.linalg.norm(x) for x in vectors]
    _, roots, basis = numpy.linalg.svd(numpy.concatenate(scaled))
    rank = math.ceil(roots.sum() ** 2 / (roots**2).sum())
    assert 0 < rank < len(basis)
    inside = basis[:rank].T @ basis[:rank]
    targets = [part @ x.T for part, x in zip(scaled, vectors, strict=True)]
    solution = numpy.linalg.lstsq(numpy.concatenate(scaled), numpy.concatenate(targets))[0].T
    expected = solution @ inside + sum(vectors) @ (numpy.eye(len(basis)) - inside)
    numpy.testing.assert_allclose(peers.data_free.swudi_a(tensors(vectors)), expected, rtol=1e-7, atol=1e-9)


def test_wudi_is_adam_on_the_papers_objective(peers, vectors):
    """Steps of an Adam by hand, along autograd's slopes of the sum of squared interferences."""
    merged = sum(vectors)
    mean, square = numpy.zeros_like(merged), numpy.zeros_like(merged)
    for step in range(1, 6):
        point = torch.tensor(merged, requires_grad=True)
        (sum(((point - x) @ x.T).square().sum() / x.square().sum() for x in tensors(vectors))).backward()
        slope = point.grad.numpy()
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        merged = merged - 0.01 * (mean / (1 - 0.9**step)) / (numpy.sqrt(square / (1 - 0.999**step)) + 1e-8)
    found = peers.data_free.wudi(tensors(vectors), steps=5, rate=0.01)
    numpy.testing.assert_allclose(found, merged, rtol=1e-6, atol=1e-8)
    assert (peers.data_free.WUDI_STEPS, peers.data_free.WUDI_RATE) == (300, 1e-5)


def test_actmat_is_least_squares_on_the_task_vectors_own_outputs(peers, vectors):
    """Rows of X_n are the inputs: lstsq of X_n X_n^T on X_n."""
    expected = numpy.linalg.lstsq(numpy.concatenate(vectors), numpy.concatenate([x @ x.T for x in vectors]))[0].T
    numpy.testing.assert_allclose(peers.data_free.actmat(tensors(vectors)), expected, rtol=1e-6, atol=1e-8)


def test_tsv_m_whitens_leading_singular_vectors(peers, vectors):
    """The paper's whitening of the columns, from an eigendecomposition."""
    rank = min(vectors[0].shape) // len(vectors)
    parts = [numpy.linalg.svd(x, full_matrices=False) for x in vectors]
    left = whitened(numpy.concatenate([u[:, :rank] for u, _, _ in parts], 1))
    right = whitened(numpy.concatenate([v[:rank] for _, _, v in parts]).T)
    expected = left @ numpy.diag(numpy.concatenate([s[:rank] for _, s, _ in parts])) @ right.T
    numpy.testing.assert_allclose(peers.data_free.tsv_m(tensors(vectors)), expected, rtol=1e-7, atol=1e-9)


def test_iso_c_has_one_singular_value(peers, vectors):
    """That of the sum's nuclear norm over its rank, along the sum's polar factor."""
    total = sum(vectors)
    total = total if total.shape[0] > total.shape[1] else total.T
    value = numpy.linalg.norm(total, "nuc") / min(total.shape)
    expected = value * whitened(total)
    found = peers.data_free.iso_c(tensors(vectors)).numpy()
    numpy.testing.assert_allclose(found if found.shape == expected.shape else found.T, expected, rtol=1e-7, atol=1e-9)


def test_iso_cts_adds_what_task_vectors_have_beside_the_common(peers, vectors):
    """The paper's algorithm with projections onto complements and the whitening of the columns."""
    size = min(vectors[0].shape)
    own = round((size - math.floor(0.8 * size)) / 3)
    u, s, v = numpy.linalg.svd(sum(vectors), full_matrices=False)
    common = size - 3 * own
    columns, values, rows = [u[:, :common]], [s[:common]], [v[:common]]
    complement = numpy.eye(len(u)) - u[:, :common] @ u[:, :common].T
    for x in vectors:
        left, singular, right = numpy.linalg.svd(complement @ x, full_matrices=False)
        columns.append(left[:, :own])
        values.append(singular[:own])
        rows.append(right[:own])
    left, right = whitened(numpy.concatenate(columns, 1)), whitened(numpy.concatenate(rows).T)
    expected = numpy.concatenate(values).mean() * left @ right.T
    assert len(numpy.concatenate(values)) == size
    numpy.testing.assert_allclose(peers.data_free.iso_cts(tensors(vectors)), expected, rtol=1e-7, atol=1e-9)


def test_consensus_keeps_what_two_tasks_vote_for(peers, vectors):
    """Weight by weight: |base - expert| > mask x |merge - expert| for at least two experts."""
    base = numpy.ones_like(vectors[0])
    experts, merge = [base + x for x in vectors], base + sum(vectors)
    expected = numpy.zeros_like(base)
    for place in numpy.ndindex(base.shape):
        votes = [abs(base[place] - each[place]) > 0.4 * abs(merge[place] - each[place]) for each in experts]
        expected[place] = sum(vectors)[place] if sum(votes) >= 2 else 0
    assert 0 < (expected == 0).sum() < expected.size
    numpy.testing.assert_allclose(peers.data_free.consensus(tensors(vectors), 0.4), expected)


@pytest.mark.parametrize("method", ["WUDI", "SWUDI-A", "ACTMat", "TSV-M", "Iso-C", "Iso-CTS", "Consensus TA"])
def test_layers_are_solved_for_and_the_rest_averaged(peers, checkpoints, method):  # noqa: F811
    """Every matrix of the layers by the method, norms and the tied embeddings by the mean; Consensus TA everywhere."""
    base, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in checkpoints)
    settings = {"mask": 0.4} if method == "Consensus TA" else {}
    found = peers.data_free.merged_task_vector(method, checkpoints[0], checkpoints[1:], **settings)
    assert found.keys() == dict(base.named_parameters()).keys()
    for name, value in found.items():
        own = [(expert.get_parameter(name) - base.get_parameter(name)).detach() for expert in experts]
        solved = method == "Consensus TA" or (".layers." in name and "norm" not in name)
        expected = peers.data_free.METHODS[method](own, **settings).float() if solved else (own[0] + own[1]) / 2
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: name + text)


def test_featcal_is_ridge_regression_on_the_teachers_outputs(peers):
    """Two experts; lstsq of stacked rows, scaled by the norm of their second moments, and of the ridge's own rows."""
    generator = numpy.random.default_rng(5)
    rows, (anchor, *weights) = [30, 20], [generator.normal(size=(4, WIDTH)) for _ in range(3)]
    lines, targets, moments = [], [], []
    for count, weight in zip(rows, weights, strict=True):
        own, expert = generator.normal(size=(2, count, WIDTH))
        teacher = 0.25 * expert + 0.75 * own
        moments.append((torch.tensor(own.T @ own / count), torch.tensor(own.T @ teacher / count)))
        scale = math.sqrt(count * numpy.linalg.norm(own.T @ own / count))
        lines.append(own / scale)
        targets.append(teacher @ weight.T / scale)
    lines.append(math.sqrt(0.05) * numpy.eye(WIDTH))
    targets.append(math.sqrt(0.05) * anchor.T)
    expected = numpy.linalg.lstsq(numpy.concatenate(lines), numpy.concatenate(targets))[0].T
    found = peers.featcal.solve_linear(moments, tensors(weights), torch.tensor(anchor))
    numpy.testing.assert_allclose(found, expected, atol=1e-5)


def rms(states: Array) -> Array:
    """What an RMSNorm multiplies with its scale."""
    return states / numpy.sqrt((states**2).mean(-1, keepdims=True) + 1e-6)


def test_featcal_reads_the_calibrated_merge_and_the_experts(peers, checkpoints, tmp_path):  # noqa: F811
    """The second layer's first norm and its q_proj, from hidden states of transformers' own forward passes: the merge's
    behind its calibrated first layer, every expert's own; within a layer what has been merged."""
    peers.featcal.merge(checkpoints[0], checkpoints[1:], ROWS, tmp_path, start=0.4)
    merged, base, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, *checkpoints))

    def weights(name: str) -> tuple[Array, Array, list[Array], Array]:
        found, origin, *own = (m.get_parameter(f"model.layers.1.{name}.weight") for m in (merged, base, *experts))
        found, origin, *own = (value.detach().double().numpy() for value in (found, origin, *own))
        start = origin + 0.4 * sum(each - origin for each in own)
        return found, start, own, origin + 2.2 * (start - origin)

    norm, start, own, anchor = weights("input_layernorm")
    energies, moments = [], []
    for expert, task, scale in zip(experts, ROWS, own, strict=True):
        with torch.no_grad():
            student, teacher = (
                rms(torch.cat([m(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0] for ids in task])
                .double().numpy()) for m in (merged, expert)
            )  # fmt: skip
        energies.append((student**2).mean(0))
        student, teacher = student * start, teacher * scale
        teacher = 0.25 * teacher + 0.75 * student
        moments.append([torch.tensor(student.T @ each / len(student)) for each in (student, teacher)])
    wanted = sum(energy * scale for energy, scale in zip(energies, own, strict=True))
    numpy.testing.assert_allclose(norm, (wanted + 0.05 * anchor) / (sum(energies) + 0.05), atol=1e-5)
    matrix, _, own, anchor = weights("self_attn.q_proj")
    expected = peers.featcal.solve_linear(moments, tensors(own), torch.tensor(anchor))
    numpy.testing.assert_allclose(matrix, expected, atol=2e-5)
    embeddings = [model.get_input_embeddings().weight.detach() for model in (merged, base, *experts)]
    torch.testing.assert_close(embeddings[0], embeddings[1] + 0.4 * (embeddings[2] + embeddings[3] - 2 * embeddings[1]))


def test_expert_merging_follows_the_slopes_of_its_loss(peers, checkpoints):  # noqa: F811
    """Those by the weights through the merged parameters: autograd's of a functional call of the merge."""
    module = peers.expert_merging
    base, student, *experts = (
        AutoModelForCausalLM.from_pretrained(path) for path in (checkpoints[0], checkpoints[0], *checkpoints[1:])
    )
    names = sorted(name for name, value in base.named_parameters() if value.dim() == 2 and "embed" not in name)
    assert set(names) == peers.data_free.matrices(student)
    weights = torch.rand(len(names), 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with torch.no_grad():
        module.merge_into(student, base, experts, dict(zip(names, weights, strict=True)))
    module.loss(student, experts[1], ROWS[0][0]).backward()
    found = module.slopes(student, base, experts, names)

    merged = dict(base.named_parameters())
    for name, pair in zip(names, weights, strict=True):
        own = [expert.get_parameter(name).detach() - merged[name].detach() for expert in experts]
        merged[name] = merged[name].detach() + pair[0] * own[0] + pair[1] * own[1]
    ids = torch.tensor([ROWS[0][0]])
    with torch.no_grad():
        wanted = experts[1](ids, output_hidden_states=True)
    given = functional_call(base, merged, (ids,), {"output_hidden_states": True})
    soft = -(wanted.logits.softmax(-1) * given.logits.log_softmax(-1)).sum(-1).mean()
    (soft + (given.hidden_states[1] - wanted.hidden_states[1]).square().mean()).backward()
    torch.testing.assert_close(found, weights.grad, rtol=1e-4, atol=1e-6)


def test_expert_merging_gets_nearer_to_its_experts(peers, checkpoints, tmp_path: Path):  # noqa: F811
    """Of two that are the same: a lower loss on its rows than where it began, with the base's norms and embeddings.
    The second update has two rows."""
    module, losses = peers.expert_merging, []
    base, expert = (AutoModelForCausalLM.from_pretrained(path) for path in checkpoints[:2])
    for steps in (0, 5):
        out = tmp_path / str(steps)
        module.merge(checkpoints[0], [checkpoints[1]] * 2, ROWS, out, start=0.3, steps=steps)
        merged = AutoModelForCausalLM.from_pretrained(out)
        losses.append(sum(module.loss(merged, expert, ids).item() for task in ROWS for ids in task))
        for name, value in load_file(out / "model.safetensors").items():
            if "norm" in name or "embed" in name:
                torch.testing.assert_close(value, base.get_parameter(name).detach(), rtol=0, atol=0)
    assert losses[1] < losses[0]
