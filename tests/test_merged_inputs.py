"""`inputs: merged`: features come from what has been merged before, against a reference in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mergekit.config import MergeConfiguration
from reference import load

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe


def job_of(recipe, options):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), options)


def solve(deltas: list[list[np.ndarray]], importance, balance: bool, ridge: float) -> np.ndarray:
    """Eq. 12 with Eq. 34; `deltas[a]` are task a's rows, each [T, size]."""
    count = len(deltas)
    a, b = np.zeros((count, count)), np.zeros(count)
    for task, rows in enumerate(deltas):
        for row in rows:
            scale = np.mean((row * row).sum(1)) if balance else 1.0
            gram = importance[task] * row @ row.T / scale / len(rows)
            a += gram
            b += gram[:, task]
    strength = ridge * np.diag(a).mean()
    return np.linalg.solve(a + strength * np.eye(count), b + strength / count)


@torch.no_grad()
def sequential_reference(models, rows, importance=(1.0, 1.0), balance=True, ridge=0.0) -> dict[str, np.ndarray]:
    """Llama, untied, attn_mlp: each block solved on, and then passed through as, what has been merged so far."""
    base, experts = load(models.base), [load(path) for path in models.experts[: len(rows)]]
    merged = copy.deepcopy(base)
    found: dict[str, np.ndarray] = {}

    def merge(name: str, modules: list[str], outputs) -> None:
        """Solve at the present inputs; put the merged tensors into `merged`."""
        deltas = []
        for task_rows in rows:
            deltas.append([])
            for ids in task_rows:
                reference = outputs(base, ids)
                deltas[-1].append(
                    np.stack([(outputs(model, ids) - reference).double().numpy().ravel() for model in experts])
                )
        found[name] = solve(deltas, importance, balance, ridge)
        for module in modules:
            target, origin = merged.get_submodule(module), base.get_submodule(module)
            for key, parameter in target.named_parameters():
                start = origin.get_parameter(key)
                moves = [model.get_submodule(module).get_parameter(key) - start for model in experts]
                parameter.copy_(start + sum(float(w) * move for w, move in zip(found[name], moves, strict=True)))

    def before_layer(ids: list[int], index: int) -> tuple[torch.Tensor, dict]:
        """The merged model's features and arguments before a layer."""
        seen = {}

        def hook(_, args, kwargs):
            seen["x"], seen["kwargs"] = args[0], dict(kwargs)

        handle = merged.model.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
        merged(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        return seen["x"], seen["kwargs"]

    def attend(model, ids, index):
        x, kwargs = before_layer(ids, index)
        layer = model.model.layers[index]
        return x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]

    merge("embed", ["model.embed_tokens"], lambda model, ids: model.model.embed_tokens(torch.tensor([ids])))
    for index in range(len(base.model.layers)):
        path = f"model.layers.{index}"
        merge(
            f"{path}.self_attn", [f"{path}.self_attn", f"{path}.input_layernorm"],
            lambda model, ids, index=index: attend(model, ids, index),
        )  # fmt: skip

        def feed(model, ids, index=index):
            hidden = attend(merged, ids, index)  # attention is merged by now
            layer = model.model.layers[index]
            return layer.mlp(layer.post_attention_layernorm(hidden))

        merge(f"{path}.mlp", [f"{path}.mlp", f"{path}.post_attention_layernorm"], feed)

    def head(model, ids):
        last = len(base.model.layers) - 1
        x, kwargs = before_layer(ids, last)
        return model.lm_head(model.model.norm(merged.model.layers[last](x, **kwargs)))

    merge("head", ["lm_head", "model.norm"], head)
    return found


def test_alphas_follow_the_merged_features(tiny, options):
    """Block after block, the reference's alphas; and they are not those of the base's features."""
    recipe = tiny.recipe(2, inputs="merged", num_samples=3)
    job = job_of(recipe, options)
    alphas = solve_job(job, gather_statistics(job))
    rows = [[list(row.ids) for row in drawn.rows] for drawn in job.rows]
    expected = sequential_reference(tiny, rows)
    for entry in alphas.submodules:
        np.testing.assert_allclose(entry.alpha, expected[entry.name], atol=2e-4, err_msg=entry.name)
    plain = job_of(tiny.recipe(2, num_samples=3), options)
    other = solve_job(plain, gather_statistics(plain))
    assert max(np.abs(np.subtract(*pair)).max() for pair in zip(
        (entry.alpha for entry in alphas.submodules), (entry.alpha for entry in other.submodules), strict=True
    )) > 0.01  # fmt: skip


def test_the_rows_move_on_by_the_recipes_own_solve(tiny, options):
    """Importance, balance and ridge, and a recipe against the canonical order: the features follow all of them."""
    recipe = tiny.recipe(2, inputs="merged", num_samples=3, balance=False, ridge=0.3)
    recipe["models"][1]["parameters"]["importance"] = 4.0
    expected_rows = [[list(row.ids) for row in drawn.rows] for drawn in job_of(recipe, options).rows]
    expected = sequential_reference(tiny, expected_rows, importance=(1.0, 4.0), balance=False, ridge=0.3)
    recipe["models"].reverse()
    job = job_of(recipe, options)
    for entry in solve_job(job, gather_statistics(job)).submodules:
        np.testing.assert_allclose(entry.alpha[::-1], expected[entry.name], atol=2e-4, err_msg=entry.name)


@pytest.mark.parametrize("changes", [{"ridge": 0.5}, {"balance": False}])
def test_merged_statistics_are_not_solved_again(tiny, options, changes):
    """The features themselves depended on the solve: another one needs another calibration."""
    from mergekit_slta.calibration.calibrate import statistics_match

    job = job_of(tiny.recipe(2, inputs="merged", num_samples=2), options)
    statistics = gather_statistics(job)
    assert statistics_match(job, statistics)
    assert not statistics_match(job_of(tiny.recipe(2, inputs="merged", num_samples=2, **changes), options), statistics)


@pytest.mark.parametrize("granularity", ["attn_mlp", "head_mlp", "layer"])
@pytest.mark.parametrize("parallel_form", ["cohere", "falcon"])
def test_shared_norms_move_on_merged(options, tmp_path, parallel_form, granularity):
    """A norm that feeds both blocks: with one expert the rows end where the expert's own forward does."""
    import transformers
    from conftest import Models, make_tokenizer, perturbed, write_rows

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    config = (
        transformers.CohereConfig(**common, intermediate_size=48, num_key_value_heads=2)
        if parallel_form == "cohere"
        else transformers.FalconConfig(**common, multi_query=True)
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    expert = perturbed(base, 1).eval()
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", 0)
    models = Models(tmp_path, tmp_path / "base", (tmp_path / "expert",), (tmp_path / "rows.jsonl",))
    recipe = models.recipe(1, inputs="merged", num_samples=2, granularity=granularity)
    job = prepare(read_recipe(MergeConfiguration.model_validate(recipe)), options, for_merge=False)
    statistics = gather_statistics(job)
    ids = torch.tensor([list(job.rows[0].rows[0].ids)])
    norm, seen = job.skeleton.anatomy.final_norm, {}
    hook = expert.get_submodule(norm).register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        expert(input_ids=ids, use_cache=False)
        hook.remove()
        scale = getattr(config, "logit_scale", 1.0)
        outputs = [
            scale * model.get_output_embeddings()(model.get_submodule(norm)(seen["x"])) for model in (base, expert)
        ]
    delta = (outputs[1] - outputs[0]).double().square().sum()
    assert float(statistics.by_submodule["head"][0, 0, 0]) == pytest.approx(float(delta), rel=1e-4)


@pytest.mark.parametrize("granularity", ["model", "layer", "attn_mlp", "head_mlp", "linear"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_features_are_those_of_the_merged_model(make_models, options, granularity, tied):
    """With one expert every alpha is 1, so that the rows move through the expert: the head then sees its features."""
    models = make_models("llama", tied=tied)
    job = job_of(models.recipe(1, inputs="merged", granularity=granularity, num_samples=3), options)
    statistics = gather_statistics(job)
    for entry in solve_job(job, statistics).submodules:
        assert entry.alpha == pytest.approx((1.0,), abs=1e-6)
    if granularity == "model":
        return
    base, expert = load(models.base), load(models.experts[0])
    ids = list(job.rows[0].rows[0].ids)
    seen = {}
    handle = expert.model.norm.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        expert(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        norm = base.model.norm if granularity == "linear" else expert.model.norm
        delta = expert.lm_head(norm(seen["x"])) - base.lm_head(base.model.norm(seen["x"]))
    assert float(statistics.by_submodule["head"][0, 0, 0]) == pytest.approx(
        float(delta.double().square().sum()), rel=1e-3
    )


def test_parallel_blocks_move_on_together(options, tmp_path_factory):
    """GPT-NeoX's blocks both read the layer's input: with one expert the rows end where the expert's forward does."""
    import transformers
    from conftest import Models, make_tokenizer, perturbed, write_rows

    folder = tmp_path_factory.mktemp("neox")
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=320
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    expert = perturbed(base, 1)
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", 0)
    models = Models(folder, folder / "base", (folder / "expert",), (folder / "rows.jsonl",))
    recipe = read_recipe(MergeConfiguration.model_validate(models.recipe(1, inputs="merged", num_samples=2)))
    job = prepare(recipe, options, for_merge=False)
    statistics = gather_statistics(job)
    ids = torch.tensor([list(job.rows[0].rows[0].ids)])
    seen = {}
    expert.eval()
    base.eval()
    hook = expert.gpt_neox.final_layer_norm.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        expert(input_ids=ids, use_cache=False)
        hook.remove()
        outputs = [
            model.get_output_embeddings()(model.gpt_neox.final_layer_norm(seen["x"])) for model in (base, expert)
        ]
    delta = (outputs[1] - outputs[0]).double().square().sum()
    assert float(statistics.by_submodule["head"][0, 0, 0]) == pytest.approx(float(delta), rel=1e-3)
