"""The closed-form merges of examples/reproduce against least squares and explicit arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "reproduce"
WIDTH = 16
CONFIG = LlamaConfig(
    hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=64, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def closed_form():
    """The module, imported as the scripts beside it do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import closed_form

        yield closed_form


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Base and two experts, far apart, with norms that are no identity."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / name for name in ("base", "first", "second")]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(CONFIG)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(path)
    return paths


def token_rows(seed: int, lengths: tuple[int, ...] = (40, 30)) -> list[list[int]]:
    """Calibration rows of a task."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (length,), generator=generator).tolist() for length in lengths]


ROWS = [token_rows(1), token_rows(2)]


def regression(seed: int, num_rows: int = 40) -> tuple[numpy.ndarray, torch.Tensor]:
    """Inputs [rows, width] of a linear map and its weights [5, width]."""
    generator = numpy.random.default_rng(seed)
    return generator.normal(size=(num_rows, WIDTH)), torch.tensor(generator.normal(size=(5, WIDTH)))


def least_squares(inputs: list[numpy.ndarray], weights: list[torch.Tensor]) -> numpy.ndarray:
    """The linear map closest to all given ones on their own inputs."""
    outputs = [x @ weight.numpy().T for x, weight in zip(inputs, weights, strict=True)]
    return numpy.linalg.lstsq(numpy.concatenate(inputs), numpy.concatenate(outputs))[0].T


def grams(inputs: list[numpy.ndarray]) -> list[torch.Tensor]:
    """Gram matrices [width, width]."""
    return [torch.tensor(x.T @ x) for x in inputs]


def test_regmean_is_least_squares_on_the_experts_outputs(closed_form):
    """With alpha 1, one linear map is that of numpy's lstsq on stacked inputs and outputs."""
    inputs, weights = zip(*(regression(seed) for seed in range(3)), strict=True)
    merged = closed_form.regmean_linear(grams(inputs), weights, torch.zeros(()), alpha=1.0)
    numpy.testing.assert_allclose(merged, least_squares(inputs, weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_rows", [40, 5])
def test_lot_is_the_smallest_least_squares_step_from_the_base(closed_form, num_rows):
    """Task vectors are solved for; where the rows say nothing (10 rows, 16 inputs) the base stays."""
    inputs, weights = zip(*(regression(seed, num_rows) for seed in range(2)), strict=True)
    base = regression(9)[1]
    merged = closed_form.lot_linear(grams(inputs), weights, base)
    expected = base.numpy() + least_squares(inputs, [weight - base for weight in weights])
    numpy.testing.assert_allclose(merged, expected, rtol=1e-8, atol=1e-8)


def test_lot_scales_are_least_squares_per_dimension(closed_form, checkpoints, tmp_path):
    """The first norm reads the embeddings, so that its inputs are known without a forward pass."""
    base, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in checkpoints)
    closed_form.merge("LOT merging", checkpoints[0], checkpoints[1:], ROWS, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")["model.layers.0.input_layernorm.weight"].numpy()

    def scale(model: LlamaForCausalLM) -> numpy.ndarray:
        return model.model.layers[0].input_layernorm.weight.detach().numpy()

    normalised = []
    for expert, rows in zip(experts, ROWS, strict=True):
        x = expert.model.embed_tokens.weight.detach().numpy()[[token for row in rows for token in row]]
        normalised.append(x / numpy.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps))
    for number in range(WIDTH):
        column = numpy.concatenate([x[:, number] for x in normalised])
        drift = [
            x[:, number] * (scale(expert) - scale(base))[number] for x, expert in zip(normalised, experts, strict=True)
        ]
        step = numpy.linalg.lstsq(column[:, None], numpy.concatenate(drift))[0][0]
        assert merged[number] == pytest.approx(scale(base)[number] + step, abs=1e-5)


@pytest.mark.parametrize("method", ["RegMean", "RegMean++", "LOT merging"])
def test_identical_experts_merge_into_themselves(closed_form, checkpoints, tmp_path, method):
    """Every method returns the expert where there is only one opinion."""
    base, expert, _ = checkpoints
    closed_form.merge(method, base, [expert, expert], ROWS, tmp_path)
    merged, expected = (load_file(path / "model.safetensors") for path in (tmp_path, expert))
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4, msg=lambda text, name=name: name + text)


def shrunk_solution(inputs: list[numpy.ndarray], weights: list[numpy.ndarray]) -> numpy.ndarray:
    """RegMean's formula at alpha 0.9, spelled out."""
    left, right = numpy.zeros((WIDTH, WIDTH)), 0.0
    for x, weight in zip(inputs, weights, strict=True):
        gram = x.T.astype("float64") @ x / len(x)
        gram = numpy.where(numpy.eye(WIDTH) == 1, gram, 0.9 * gram)
        left, right = left + gram, right + gram @ weight.T
    return numpy.linalg.solve(left, right).T


@pytest.mark.parametrize("method", ["RegMean", "RegMean++"])
def test_second_layer_reads_what_the_method_says(closed_form, checkpoints, tmp_path, method):
    """Merged first layer in RegMean++, every expert's own first layer in RegMean; rows of different lengths."""
    rows = [token_rows(1), token_rows(2, (50, 12, 33))]
    closed_form.merge(method, checkpoints[0], checkpoints[1:], rows, tmp_path)
    merged, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, *checkpoints[1:]))
    inputs = []
    for expert, task in zip(experts, rows, strict=True):
        source = merged if method == "RegMean++" else expert
        with torch.no_grad():
            states = [source(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0] for ids in task]
        x = torch.cat(states).numpy()
        scale = expert.model.layers[1].input_layernorm.weight.detach().numpy()
        inputs.append(x / numpy.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * scale)
    for name in ("q_proj", "v_proj"):
        weights = [
            getattr(model.model.layers[1].self_attn, name).weight.detach().numpy() for model in (merged, *experts)
        ]
        numpy.testing.assert_allclose(weights[0], shrunk_solution(inputs, weights[1:]), atol=1e-5)
    norms = [model.model.layers[1].input_layernorm.weight for model in (merged, *experts)]
    torch.testing.assert_close(norms[0], (norms[1] + norms[2]) / 2)
    embeddings = [model.model.embed_tokens.weight for model in (merged, *experts)]
    torch.testing.assert_close(embeddings[0], (embeddings[1] + embeddings[2]) / 2)


def test_rows_are_needed_for_every_expert(closed_form, checkpoints, tmp_path):
    """Rows of one task for two experts are refused before anything is loaded."""
    with pytest.raises(ValueError, match="2 experts, but calibration rows of 1"):
        closed_form.merge("RegMean", checkpoints[0], checkpoints[1:], ROWS[:1], tmp_path)
