"""Models without a task: the closed form against numpy, and every command with `direction:` and `role: direction`."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_refused, mergekit_yaml, read, refused, slta, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference import load, row_deltas
from safetensors.torch import load_file, save_file
from test_distributed import started_together

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.errors import RecipeError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries.torch import product_precision
from mergekit_slta.maths import directions
from mergekit_slta.maths.directions import combine
from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.objectives.starts import starting_points
from mergekit_slta.runtime.resume import ResumeStore

QUIET = ["--quiet"]
FORM = {"direction": "swudi_a"}


def swudi_a(base: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    """The closed form as the paper writes it, [out, in] matrices in float64."""
    changes = [expert - base for expert in experts if np.any(expert != base)]
    if not changes:
        return base
    weights = [1 / np.sum(change**2) for change in changes]
    c = sum(weight * change.T @ change for weight, change in zip(weights, changes, strict=True))
    d = sum(weight * change @ change.T @ change for weight, change in zip(weights, changes, strict=True))
    total = sum(changes)
    values, vectors = np.linalg.eigh(c)
    values = np.where(values > 1e-11 * values.max(), values, 0)
    count = math.ceil(np.sqrt(values).sum() ** 2 / values.sum() - 1e-9)
    leading, inverse = vectors[:, -count:], np.diag(1 / values[-count:])
    return base + total - total @ leading @ leading.T + d @ leading @ inverse @ leading.T


def combined(states: list[dict[str, torch.Tensor]], transposed=()) -> dict[str, torch.Tensor]:
    """Every tensor of the closed form, in float64, from the state dicts of base and experts."""
    base, *experts = ({name: tensor.double().numpy() for name, tensor in state.items()} for state in states)
    found = {}
    for name, origin in base.items():
        others = [expert[name] for expert in experts]
        if origin.ndim == 1:
            found[name] = origin + np.mean([other - origin for other in others], axis=0)
        elif origin.ndim == 3:
            found[name] = np.stack([swudi_a(origin[n], [other[n] for other in others]) for n in range(len(origin))])
        elif any(part in name for part in transposed):
            found[name] = swudi_a(origin.T, [other.T for other in others]).T
        else:
            found[name] = swudi_a(origin, others)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def combined_of(models) -> dict[str, torch.Tensor]:
    return combined([tensors(path) for path in (models.base, *models.experts)])


def explicit(models, alphas: Alphas, directions: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """theta_0 + sum_t alpha_t tau_t in float64; `directions` are models that are no checkpoints."""
    states = {str(path): tensors(path) for path in (models.base, *models.experts)} | directions
    merged = {}
    for entry in alphas.submodules:
        for name in entry.tensors:
            base = states[str(models.base)][name].double()
            changes = [
                weight * (states[model][name].double() - base)
                for weight, model in zip(entry.alpha, alphas.models, strict=True)
            ]
            merged[name] = base + sum(changes)
    return merged


def data_free(models) -> dict:
    return {
        "merge_method": "submodule_linear",
        "base_model": str(models.base),
        "models": [{"model": str(path)} for path in models.experts],
        "parameters": {"objective": "data_free"},
        "out_dtype": "float32",
    }


def assert_merged(out, expected) -> None:
    found = tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(2, 4)).flatmap(
        lambda shape: arrays.arrays(
            np.float64, (shape[2] + 1, shape[0], shape[1]),
            elements=st.floats(-2, 2).map(lambda value: round(value, 3)),
        )
    ),
    st.booleans(),
)  # fmt: skip
def test_closed_form_is_numpys(parts, transposed):
    """Wide, tall, low-rank, with unchanged and equal experts."""
    base, *experts = parts
    if all(np.array_equal(base, expert) for expert in experts):
        expected = base
    else:
        values = np.linalg.eigvalsh(sum(
            (e - base).T @ (e - base) / max(np.sum((e - base) ** 2), 1e-300) for e in experts
        ))  # fmt: skip
        share = np.sqrt(values.clip(0)).sum() ** 2 / values.clip(0).sum()
        if abs(share - round(share)) < 1e-4 or ((values.max() > values).any() and values[values > 1e-9].min() < 1e-6):
            return  # which directions lead is a matter of rounding
        expected = swudi_a(base, experts)
    parts = [torch.from_numpy(np.ascontiguousarray(part.T if transposed else part)) for part in parts]
    found = combine("swudi_a", parts[0], parts[1:], is_transposed=transposed).numpy()
    np.testing.assert_allclose(found.T if transposed else found, expected, rtol=1e-7, atol=1e-7)


def test_large_tables_are_combined_in_parts(monkeypatch):
    """The rows of a matrix, and the elements of an average, a few at a time."""
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.randn((4, 30, 7), generator=generator)
    for averaged in (False, True):
        whole = combine("swudi_a", base, experts, is_averaged=averaged)
        monkeypatch.setattr("mergekit_slta.maths.directions._BLOCK_ELEMENTS", 20)
        torch.testing.assert_close(combine("swudi_a", base, experts, is_averaged=averaged), whole)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("tied", "granularity"),
    [(False, None), (True, "layer"), (True, "attn_mlp"), (False, "head_mlp"), (False, "linear")],
)
def test_data_free_merges_by_the_closed_form(make_models, write_recipe, tmp_path, tied, granularity):
    """Through the stock command, without a row, the same at every granularity; `lambda` scales the change."""
    models = make_models("llama", num_experts=3, tied=tied, dtype=torch.bfloat16)
    recipe = data_free(models)
    if granularity:
        recipe["parameters"]["granularity"] = granularity
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    expected = combined_of(models)
    assert_merged(tmp_path / "out", expected)
    assert set(os.listdir(tmp_path / "out")) >= {"config.json", "tokenizer.json", "slta_alphas.json"}
    recipe["parameters"]["lambda"] = 0.5
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "half", *QUIET).exit_code == 0
    base = tensors(models.base)
    assert_merged(tmp_path / "half", {name: (value + base[name].double()) / 2 for name, value in expected.items()})


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("species", "transposed"),
    [("gpt2", ("c_attn.weight", "c_proj.weight", "c_fc.weight")), ("mixtral", ()), ("qwen3_moe", ()), ("gemma3", ())],
)
def test_orientation_of_matrices(specimen, write_recipe, tmp_path, species, transposed):
    """[in, out] of GPT-2; the experts of MoE layers one by one, as the checkpoints have them."""
    models = specimen(species)
    recipe = data_free(models)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    expected = combined([tensors(path) for path in (models.base, *models.experts)], transposed)
    merged = tensors(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"granularity": "attn_mlp"},
        {"granularity": "linear", "inputs": "merged"},
        {"granularity": "head_mlp", "evaluate": True},
        {"objective": "joint", "steps": 2},
        {"objective": "joint", "steps": 0},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_a_closed_form_is_one_model_more(tiny, with_rows, write_recipe, tmp_path, parameters):
    """The merge is explicit arithmetic, with and without the stored tensors; no folder of them stays."""
    models = with_rows(tiny)
    recipe = {**models.recipe_with_answers(**FORM, **parameters), "out_dtype": "float32"}
    out = tmp_path / "out"
    result = mergekit_yaml(write_recipe(recipe), out, *QUIET)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(out / "slta_alphas.json")
    assert alphas.models[-1] == "swudi_a"
    assert alphas.experts == alphas.models[:-1]
    assert any(entry.alpha[-1] for entry in alphas.submodules)
    norms = [entry for entry in alphas.submodules if entry.kind == "norm"]
    assert all(entry.alpha[-1] == 0 and "swudi_a" in entry.unchanged for entry in norms)  # the experts' average
    if parameters.get("granularity") != "head_mlp":
        assert_merged(out, explicit(models, alphas, {"swudi_a": combined_of(models)}))
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    if alphas.evaluation is not None:
        assert [task.model for task in alphas.evaluation.tasks] == list(alphas.experts)
    before = tensors(out)
    again = mergekit_yaml(tmp_path / "recipe.yml", out)  # computes the direction's tensors as it merges
    assert "Reusing the alphas" in again.output, again.output
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(out).items())


def test_features_solve_for_a_direction(tiny, with_rows, options, tmp_path):
    """The Gram matrices have a column more, whose model has no rows: numpy's least squares."""
    models = replace(with_rows(tiny), experts=tiny.experts)
    recipe = models.recipe(granularity="attn_mlp", ridge=0.3)
    recipe["models"][1]["parameters"] = {"role": "direction"}
    job = prepare(read(recipe), options, for_merge=False)
    alphas = solve_job(job, gather_statistics(job))
    order = [job.recipe.label(model) for model in job.plan.models[1:]]
    assert order == [str(models.experts[0]), str(models.experts[2]), str(models.experts[1])]
    base, *experts = (load(path) for path in (models.base, *order))
    a, b = {}, {}
    for example in job.examples():
        for name, change in row_deltas(base, experts, list(example.row.ids), "attn_mlp").items():
            gram = change @ change.T
            gram = gram / np.trace(gram) * 3 / 6
            a[name] = a.get(name, 0) + gram
            b[name] = b.get(name, 0) + gram[:, example.task]
    for entry in alphas.submodules:
        shift = 0.3 * np.mean(np.diag(a[entry.name]))
        expected = np.linalg.solve(a[entry.name] + shift * np.eye(3), b[entry.name] + shift * np.array([0.5, 0.5, 0]))
        alpha = dict(zip(alphas.models, entry.alpha, strict=True))
        np.testing.assert_allclose([alpha[name] for name in order], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", [{}, {"objective": "joint", "steps": 1}], ids=["features", "joint"])
def test_role_direction(tiny, with_rows, write_recipe, tmp_path, parameters):
    """A checkpoint without a task: no rows, weights from the others' rows; the closed form is of the experts."""
    models = with_rows(tiny)
    recipe = {**models.recipe_with_answers(**parameters, **FORM), "out_dtype": "float32"}
    recipe["models"][0]["parameters"] = {"role": "direction"}
    recipe["parameters"]["completion_eos"] = False  # for all tasks
    path, out = write_recipe(recipe), tmp_path / "out"
    checked = slta("check", path)
    assert checked.exit_code == 0, checked.output
    assert "without a task" in checked.output
    assert "computed from the experts" in checked.output
    result = mergekit_yaml(path, out, *QUIET)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(out / "slta_alphas.json")
    first = str(models.experts[0])
    assert [direction.model for direction in alphas.directions] == [first, "swudi_a"]
    assert {task["model"] for task in alphas.calibration["tasks"]} == set(alphas.experts)
    assert first not in alphas.experts
    assert any(entry.alpha[alphas.models.index(first)] for entry in alphas.submodules)
    form = combined_of(replace(models, experts=models.experts[1:]))
    assert_merged(out, explicit(models, alphas, {"swudi_a": form}))
    assert "Reusing" in mergekit_yaml(path, out).output  # computes the closed form as it merges
    assert_merged(out, explicit(models, alphas, {"swudi_a": form}))
    assert slta("report", out).exit_code == 0
    if parameters:
        assert {"base", "average", "features", first, "swudi_a"} <= {point.name for point in alphas.evaluation.points}


def test_a_direction_can_only_help_the_search(tiny, with_rows, write_recipe, tmp_path):
    """Where an expert's copy is the direction that is needed, `joint` starts there."""
    models = with_rows(tiny)
    recipe = models.recipe_with_answers(objective="joint", steps=1)
    recipe["models"] = [recipe["models"][0], {"model": str(models.experts[1]), "parameters": {"role": "direction"}}]
    recipe["models"][0]["parameters"]["dataset"] = str(models.datasets[0])
    assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json", "--quiet").exit_code == 0
    weighted = {point.name: point.weighted for point in Alphas.load(tmp_path / "a.json").evaluation.points}
    assert weighted["average"] == pytest.approx(0, abs=1e-6)  # the only expert itself
    assert weighted[str(models.experts[1])] > 0.1


@pytest.mark.parametrize("settings", [{}, {"objective": "joint", "steps": 1}], ids=["features", "joint"])
def test_a_stopped_direction_goes_on(tiny, with_rows, write_recipe, tmp_path, monkeypatch, settings):
    """Interrupted within the closed form and after it: nothing is computed twice, and the bytes are the same."""
    models = with_rows(tiny)
    path = write_recipe(models.recipe_with_answers(**FORM, **settings))
    assert slta("calibrate", path, "-o", tmp_path / "whole.json", "--quiet").exit_code == 0
    put, stored = ResumeStore.put, []

    def stopping(self, key, found):
        put(self, key, found)
        stored.append(key)
        if len(stored) in (3, 40, 44):
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumeStore, "put", stopping)
    for _ in range(4):
        result = slta("calibrate", path, "-o", tmp_path / "parts.json", "--quiet")
    assert result.exit_code == 0, result.output
    assert len(set(stored)) == len(stored)
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_other_experts_start_the_direction_anew(tiny, with_rows, write_recipe, tmp_path):
    """The stored tensors are those of these very experts."""
    models = with_rows(tiny)
    out = tmp_path / "a.json"
    for experts in (models.experts[:2], models.experts[1:]):
        recipe = replace(models, experts=experts, datasets=models.datasets[:2]).recipe(**FORM)
        out.unlink(missing_ok=True)
        assert slta("calibrate", write_recipe(recipe), "-o", out, "--quiet").exit_code == 0
    assert (tmp_path / ".a.json.direction").is_dir()
    short = {**recipe, "models": [{"model": entry["model"]} for entry in recipe["models"]], "out_dtype": "float32"}
    short["parameters"] = {"alphas": str(out)}
    merged = mergekit_yaml(write_recipe(short), tmp_path / "out", *QUIET)
    assert merged.exit_code == 0, merged.output
    pair = replace(models, experts=models.experts[1:])
    assert_merged(tmp_path / "out", explicit(pair, Alphas.load(out), {"swudi_a": combined_of(pair)}))
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.stats.safetensors", "out", "recipe.yml"]


@pytest.mark.process
def test_the_closed_form_has_the_same_bits_everywhere(tiny, with_rows, write_recipe, tmp_path, monkeypatch):
    """Computed by a calibration, or by a merge with its alphas: float32 products are set alike, also where the rest of
    the calibration computes in another precision."""

    def mode() -> str | None:
        return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)

    def watched(*arguments, **settings):
        modes.append(mode())
        return combine(*arguments, **settings)

    modes: list[str | None] = []
    monkeypatch.setattr(directions, "combine", watched)
    with product_precision(torch.device("cpu"), tf32=False):
        expected = mode()
    path = write_recipe(with_rows(tiny).recipe(**FORM))
    counts = []
    for _ in range(2):
        assert mergekit_yaml(path, tmp_path / "out").exit_code == 0
        counts.append(len(modes))
    assert 0 < counts[0] < counts[1]
    assert {*modes} == {expected}


def test_processes_share_the_closed_form(tiny, with_rows, write_recipe, tmp_path):
    """Two processes give the alphas of one."""
    path = write_recipe(with_rows(tiny).recipe_with_answers(objective="joint", steps=1, **FORM))
    assert slta("calibrate", path, "-o", tmp_path / "one.json", "--quiet").exit_code == 0
    codes, output = started_together(tmp_path, 2, "-o", "two.json")
    assert codes == [0, 0], output
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for ours, theirs in zip(one["submodules"], two["submodules"], strict=True):
        assert ours["alpha"] == pytest.approx(theirs["alpha"], rel=1e-10, abs=1e-10)


def test_lora_experts(make_models, write_recipe, tmp_path):
    """The closed form is that of the experts that peft would make."""
    import peft
    import transformers

    models = make_models("llama", num_experts=2)
    references, full = [], []
    for number in range(2):
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_pretrained(models.base)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=16))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / f"lora{number}")
        references.append(f"{models.base}+{tmp_path / f'lora{number}'}")
        full.append(tmp_path / f"full{number}")
        model.merge_and_unload().save_pretrained(full[-1])
    recipe = {**data_free(models), "models": [{"model": name} for name in references]}
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    expected = combined_of(replace(models, experts=tuple(full)))
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("parameters", [{"objective": "data_free"}, {"granularity": "linear"}], ids=["free", "linear"])
def test_export_writes_the_closed_form(tiny, with_rows, write_recipe, tmp_path, stock_merge, parameters):
    """Stock mergekit gives the same bits from the checkpoint of the direction; without -o there is no place for it."""
    recipe = {**with_rows(tiny).recipe(**FORM, **parameters), "out_dtype": "bfloat16"}
    out = tmp_path / "out"
    assert mergekit_yaml(write_recipe(recipe), out, *QUIET).exit_code == 0
    assert_refused(slta("export", out / "slta_alphas.json"), "output-needed", "swudi_a", "-o")
    for _ in range(2):  # an earlier export is replaced
        exported = slta("export", out, "-o", tmp_path / "stock.yml", "--recipe", tmp_path / "recipe.yml")
        assert exported.exit_code == 0, exported.output
        assert "upload" not in exported.output + exported.stderr  # it is no merge to publish
    direction = tensors(tmp_path / "stock_direction")
    for name, tensor in combined_of(tiny).items():
        assert direction[name].dtype == torch.float32
        torch.testing.assert_close(direction[name].double(), tensor, rtol=1e-5, atol=1e-6)
    code, output = stock_merge(tmp_path / "stock.yml", tmp_path / "stock")
    assert code == 0, output
    found = tensors(tmp_path / "stock")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(out).items())


def test_solve_with_a_closed_form(tiny, with_rows, write_recipe, tmp_path):
    """Another ridge, and without the direction; an expert that it was computed from cannot be left out alone."""
    models = with_rows(tiny)
    path, out = write_recipe(models.recipe(**FORM)), tmp_path / "a.json"
    assert slta("calibrate", path, "-o", out, "--quiet").exit_code == 0
    statistics, expert = tmp_path / "a.stats.safetensors", models.experts[0].name
    refusal = slta("solve", statistics, "--without", expert)
    assert_refused(refusal, "needs-calibration", "swudi_a", "--without")
    fewer = slta("solve", statistics, "--without", expert, "--without", "swudi_a", "-o", tmp_path / "fewer.json")
    assert fewer.exit_code == 0, fewer.output
    alone = tmp_path / "alone.json"
    plain = replace(models, experts=models.experts[1:], datasets=models.datasets[1:]).recipe()
    assert slta("calibrate", write_recipe(plain), "-o", alone, "--quiet").exit_code == 0
    for ours, theirs in zip(
        Alphas.load(tmp_path / "fewer.json").submodules, Alphas.load(alone).submodules, strict=True
    ):
        assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    ridged = slta("solve", statistics, "--ridge", "1e9", "-o", tmp_path / "ridge.json")
    assert ridged.exit_code == 0, ridged.output
    assert "direction: swudi_a" in ridged.output
    for entry in Alphas.load(tmp_path / "ridge.json").submodules:  # towards the average of the experts
        expected = [0 if name in entry.unchanged else 1 / 3 for name in Alphas.load(out).experts] + [0]
        assert entry.alpha == pytest.approx(expected, abs=1e-6)


def test_data_free_is_measured_if_asked(tiny, with_rows, write_recipe, tmp_path, caplog):
    """`evaluate: true` measures the merge on held-out rows; without it, datasets are said to have no effect."""
    models = with_rows(tiny)
    recipe = models.recipe_with_answers(objective="data_free", evaluate=True)
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "out", card=True).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "There is no residual, because no row was fitted." in card
    assert "calibration rows per task" not in card
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    assert [task.model for task in alphas.evaluation.tasks] == list(alphas.models[:-1])
    for option in (["--ridge", "1"], ["--importance", f"{models.experts[0]}=5"], ["--rows", "2"]):
        solved = slta("solve", tmp_path / "out", *option)
        assert_refused(solved, "conflicting-keys", "objective: data_free", "no effect")
    solved = slta("solve", tmp_path / "out", "--without", models.experts[0])
    assert_refused(solved, "needs-calibration", "direction: swudi_a")
    assert slta("report", tmp_path / "out").exit_code == 0
    tasks = alphas.calibration["tasks"]
    assert all(task["held_out"] and not task["rows"] for task in tasks)
    del recipe["parameters"]["evaluate"]
    recipe["parameters"]["ridge"] = 0.1
    checked = slta("check", write_recipe(recipe))
    assert checked.exit_code == 0, checked.output
    assert "no rows needed" in checked.output
    assert "no effect: completion, dataset, max_seq_length, num_samples" in caplog.text
    assert "ridge" in caplog.text


@pytest.mark.parametrize(
    ("changes", "own", "code", "values"),
    [
        ({"direction": "ties"}, {}, "invalid-value", ["direction", "ties", "swudi_a"]),
        ({"objective": "data_free", "direction": "none"}, {}, "conflicting-keys", ["direction", "data_free"]),
        ({"objective": "data_free"}, {"role": "direction"}, "conflicting-keys", ["role: direction", "data_free"]),
        ({}, {"role": "expert"}, "invalid-value", ["role", "expert"]),
        ({}, {"role": "direction", "dataset": "x.jsonl"}, "conflicting-keys", ["role: direction", "dataset"]),
        ({}, {"role": "direction", "importance": 2}, "conflicting-keys", ["role: direction", "importance"]),
        ({"role": "direction"}, {}, "missing-expert", ["expert"]),
        ({"objective": "data_free", "inputs": "base"}, {}, "key-of-another-objective", ["inputs", "features"]),
    ],
)  # fmt: skip
def test_refused_recipes(tiny, changes, own, code, values):
    """In one line, before anything is read."""
    recipe = tiny.recipe(2, **changes)
    if own:
        recipe["models"][0]["parameters"] = own
    with refused(RecipeError, code, *values):
        read(recipe)


def test_too_few_experts_for_a_closed_form(tiny):
    """One expert, or one beside a direction."""
    recipe = tiny.recipe(2, **FORM)
    recipe["models"][0]["parameters"] = {"role": "direction"}
    for single in (recipe, tiny.recipe(1, **FORM)):
        with refused(RecipeError, "missing-expert", "swudi_a"):
            read(single)


def test_names_are_not_the_closed_forms(tiny, tmp_path, monkeypatch):
    """A folder with its name would be two models of one name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swudi_a").symlink_to(tiny.experts[0])
    recipe = tiny.recipe(2, **FORM)
    recipe["models"][0]["model"] = "swudi_a"
    with refused(RecipeError, "duplicate-model", "swudi_a"):
        read(recipe)


def test_broken_weights_are_refused(tiny, write_recipe, tmp_path):
    """NaN in an expert, which no row would show: nothing is written."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny.experts[0], broken)
    file = sorted(broken.glob("*.safetensors"))[1]
    found = load_file(file)
    name = next(name for name, tensor in found.items() if tensor.dim() == 2)
    found[name][0, 0] = torch.nan
    save_file(found, file, metadata={"format": "pt"})
    recipe = data_free(replace(tiny, experts=(broken, *tiny.experts[1:])))
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert_refused(result, "not-finite-weights", name)
    assert not tensors(tmp_path / "out")


def test_starting_points_give_averages_to_the_experts(tiny, with_rows, options):
    """Where the closed form only averages, its weight is the experts': the point stays the same merge."""
    job = prepare(read(with_rows(tiny).recipe_with_answers(objective="joint", **FORM)), options, for_merge=False)
    features = {part.name: torch.tensor([0.1, 0.2, 0.3, 0.6], dtype=torch.float64) for part in job.submodules}
    points = starting_points(job, features)
    for part in job.submodules:
        is_norm = part.kind == "norm"
        expected = {
            "base": [0, 0, 0, 0],
            "average": [1 / 3, 1 / 3, 1 / 3, 0],
            "features": [0.3, 0.4, 0.5, 0] if is_norm else [0.1, 0.2, 0.3, 0.6],
            "swudi_a": [1 / 3, 1 / 3, 1 / 3, 0] if is_norm else [0, 0, 0, 1],
        }
        assert {name: pytest.approx(point[part.name].tolist()) for name, point in points.items()} == expected


def test_a_ridge_at_the_experts_pulls_directions_to_nothing():
    """`steps: 0`: towards the experts' whole changes."""
    slopes = {"a": torch.randn((6, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    found = solve_joint(slopes, torch.tensor([0, 0, 0, 1, 1, 1]), ridge=1e9, num_tasks=2)
    assert found.alpha["a"].tolist() == pytest.approx([1, 1, 0], abs=1e-6)


def test_a_direction_among_the_experts_is_seen(tiny, with_rows, write_recipe, tmp_path):
    """The rounded average of two experts adds nothing: the solve is flagged, and its weights stay moderate."""
    models = with_rows(tiny)
    shutil.copytree(models.base, tmp_path / "average")
    for file in (tmp_path / "average").glob("*.safetensors"):
        first, second = (tensors(path) for path in models.experts[:2])
        save_file({name: (first[name] + second[name]) / 2 for name in load_file(file)}, file, metadata={"format": "pt"})
    recipe = models.recipe(2, granularity="linear")
    recipe["models"].append({"model": str(tmp_path / "average"), "parameters": {"role": "direction"}})
    assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json", "--quiet").exit_code == 0
    entries = Alphas.load(tmp_path / "a.json").submodules
    assert all("rank_deficient" in entry.flags for entry in entries if entry.tensors)
    assert max(abs(alpha) for entry in entries for alpha in entry.alpha) < 3


def test_a_reused_merge_that_cannot_be_measured_computes_nothing(tiny, write_recipe, tmp_path):
    """Too few rows to hold any out: there is nothing to evaluate, and no tensor of the closed form is needed."""
    path = write_recipe(tiny.recipe(objective="joint", **FORM))
    assert slta("calibrate", path, "-o", tmp_path / "a.json", "--quiet").exit_code == 0
    shutil.rmtree(tmp_path / ".a.json.direction")
    again = slta("calibrate", path, "-o", tmp_path / "a.json", "--quiet")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / ".a.json.direction").exists()
