"""Every architecture at every granularity: streaming against the model's own forward, alphas against a reference that
swaps tensors inside whole models, ownership against gradients, and a stock merge that loads and generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Models, assert_refused, make_tokenizer, mergekit_yaml, slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import GRANULARITIES, ZOO

from mergekit_slta import Alphas
from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.batches import plan_batches
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import ForwardState

pytestmark = pytest.mark.zoo


def job_of(models: Models, **parameters: object):
    recipe = models.recipe(**{"num_samples": 2, "max_seq_length": 12, **parameters})
    config = read_recipe(MergeConfiguration.model_validate(recipe))
    return prepare(config, MergeOptions(quiet=True), for_merge=False)


def untied(path: Path) -> torch.nn.Module:
    """The model in memory, its output projection a tensor of its own, whatever the checkpoint says."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state)
    return other.eval()


class Reference:
    """Whole models in memory; a submodule's output is read by hooks while single tensors of the base are exchanged."""

    def __init__(self, models: Models, name: str) -> None:
        self.species = ZOO[name]
        self.base = untied(models.base)
        self.states = [untied(path).state_dict() for path in (models.base, *models.experts)]

    def forward(self, ids: list[int], model: int, names: list[str], hooks: dict[str, str]) -> dict[str, torch.Tensor]:
        """Base's forward with the named tensors of a model; what the hooked modules get ("in") or give ("out")."""
        seen: dict[str, torch.Tensor] = {}

        def take(path: str):
            def before(_, args, kwargs) -> None:
                seen.setdefault(path, args[0] if args else kwargs["hidden_states"])

            return before

        def give(path: str):
            def after(_, args, output) -> None:
                seen.setdefault(path, output[0] if isinstance(output, tuple) else output)

            return after

        handles = []
        for path, side in hooks.items():
            module = self.base.get_submodule(path)
            if side == "in":
                handles.append(module.register_forward_pre_hook(take(path), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(give(path)))
        state = {**self.states[0], **{key: self.states[model][key] for key in names}}
        with torch.no_grad():
            logits = functional_call(self.base, state, (torch.tensor([ids]),), {"use_cache": False}).logits
        for handle in handles:
            handle.remove()
        return {**{path: value.clone() for path, value in seen.items()}, "logits": logits}

    def output(self, submodule, job, ids: list[int], model: int) -> torch.Tensor:
        """f(x; theta_t) of a submodule, up to what cancels in df."""
        anatomy = job.skeleton.anatomy
        rename = job.skeleton.renamed
        names = [rename.get(tensor, tensor) for tensor in submodule.tensors]
        tied = anatomy.head_weight not in job.plan.tensors
        head = rename.get(anatomy.head_weight, anatomy.head_weight)
        if submodule.kind == "model":
            names += [head] * tied
            return self.forward(ids, model, names, {})["logits"]
        if submodule.kind == "head":
            names += [head] * tied
            return self.forward(ids, model, names, {})["logits"]
        if submodule.kind == "embed":
            first = f"{anatomy.layers_path}.0"
            return self.forward(ids, model, names, {first: "in"})[first]
        if submodule.kind in ("layer", "norm", "linear"):
            return self.forward(ids, model, names, {submodule.name: "out"})[submodule.name]
        layer = f"{anatomy.layers_path}.{submodule.layer}"
        if submodule.kind == "mlp":  # under `linear`, too, what is left of it takes the whole block's alpha
            norms = [name for name, block in anatomy.arch.norms if block == "mlp"]
            places = tuple(f"{layer}.{part}." for part in (anatomy.arch.mlp, *norms))
            own = [key for key in self.states[0] if key.startswith(places)]
            assert submodule.forward_group != submodule.name or set(own) == set(names)
            return self.forward(ids, model, own, {layer: "out"})[layer]
        attention = f"{layer}.{anatomy.arch.attention}"
        inside = [key for key in self.states[0] if key.startswith(attention + ".")]
        norms = [name for name, block in anatomy.arch.norms if block == "attention" and name != self.species.shared]
        own = inside + [key for key in self.states[0] if key.startswith(tuple(f"{layer}.{norm}." for norm in norms))]
        if submodule.kind == "attention_head":
            place = anatomy.arch.projections
            path = f"{attention}.{place.output}"
            heads = self.forward(ids, model, own, {path: "in"})[path]
            layout, group = anatomy.arch.head_layout(job.skeleton.config), int(submodule.name.rpartition(".")[2])
            width = layout.queries * layout.width
            columns = slice(group * width, (group + 1) * width)
            weight = self.states[model][f"{path}.weight"]
            return heads[..., columns] @ (weight[columns] if anatomy.arch.transposed else weight[:, columns].T)
        if self.species.parallel:
            return self.forward(ids, model, own, {layer: "out"})[layer]
        feeds = [name for name, block in anatomy.arch.norms if block == "mlp"]
        before = f"{layer}.{feeds[0]}" if feeds[0] != "post_feedforward_layernorm" else f"{layer}.{anatomy.arch.mlp}"
        return self.forward(ids, model, own, {before: "in"})[before]

    def alphas(self, job) -> dict[str, np.ndarray]:
        """Eq. 12 with Eq. 33-34, row by row."""
        rows = [[list(row.ids) for row in drawn.rows] for drawn in job.rows]
        systems = {}
        for submodule in job.submodules:
            a, b = np.zeros((2, 2)), np.zeros(2)
            for task in range(2):
                for ids in rows[task]:
                    outputs = [self.output(submodule, job, ids, model).double().numpy().ravel() for model in range(3)]
                    delta = np.stack([output - outputs[0] for output in outputs[1:]])
                    gram = delta @ delta.T
                    if np.trace(gram) > 0:
                        gram = gram / (np.trace(gram) / 2) / len(rows[task])
                        a += gram
                        b += gram[:, task]
            systems[submodule.name] = (a, b)
        if job.skeleton.anatomy.head_weight not in job.plan.tensors and "embed" in systems:
            systems["embed"] = tuple(x + y for x, y in zip(systems["embed"], systems["head"], strict=True))
        return {name: np.linalg.solve(a, b) if a.any() else np.zeros(2) for name, (a, b) in systems.items()}


@pytest.mark.parametrize("name", ZOO)
def test_stream_equals_the_models_own_forward(specimen, name):
    """Base: logits at the end of the stream are those of the model's own forward."""
    models = specimen(name)
    model = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32).eval()
    for granularity in ("layer", "attn_mlp", "linear"):
        assert_streams(job_of(models, granularity=granularity), model, 1e-4)


def assert_streams(job, model: torch.nn.Module, tolerance: float) -> None:
    """The base's logits of every row are those of the model's own forward."""
    tokens = [list(row.ids) for drawn in job.rows for row in drawn.rows]
    own_batches = job.recipe.settings.granularity == "linear"
    batches = plan_batches(tokens, max_tokens=0) if own_batches else plan_batches(tokens)
    checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype)
    found = {}
    with torch.inference_mode():
        for evaluation in evaluate_submodules(ForwardState(job.skeleton, checkpoints, batches), job.submodules):
            if evaluation.submodule.kind == "head":
                parts = evaluation.base.split(list(evaluation.lengths))
                found.update(zip(evaluation.rows, parts, strict=True))
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "dtype", "changes", "tolerance"),
    [
        ("mixtral", "float64", {}, 1e-10),
        ("qwen2_moe", "float64", {}, 1e-10),
        ("qwen3_moe", "float64", {}, 1e-10),
        ("mixtral", "float32", {"intermediate_size": 30}, 1e-4),
        ("qwen3_moe", "bfloat16", {"moe_intermediate_size": 12}, 5e-2),
    ],
)
def test_experts_in_any_precision_and_size(specimen, write_recipe, tmp_path, name, dtype, changes, tolerance):
    """torch's grouped kernel knows no float64, and no rows that are no multiple of 16 bytes: the plain one does."""
    models = specimen(name, **changes)
    model = AutoModelForCausalLM.from_pretrained(
        models.base, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    assert_streams(job_of(models, compute_dtype=dtype), model.eval(), tolerance)
    recipe = models.recipe_with_answers(objective="joint", steps=0, num_samples=2, max_seq_length=12)
    alphas = {}
    for compute_dtype in ("float32", dtype):
        recipe["parameters"]["compute_dtype"] = compute_dtype
        result = slta("calibrate", write_recipe(recipe), "-o", tmp_path / f"{compute_dtype}.json")
        assert result.exit_code == 0, result.output
        alphas[compute_dtype] = Alphas.load(tmp_path / f"{compute_dtype}.json")
    if dtype == "float64":
        for one, other in zip(alphas["float32"].submodules, alphas["float64"].submodules, strict=True):
            np.testing.assert_allclose(one.alpha, other.alpha, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ZOO)
def test_alphas_equal_the_reference(specimen, name, granularity):
    """Alphas of every submodule equal those of tensors exchanged inside whole models."""
    models = specimen(name)
    job = job_of(models, granularity=granularity)
    alphas = solve_job(job, gather_statistics(job))
    expected = Reference(models, name).alphas(job)
    for entry in alphas.submodules:
        np.testing.assert_allclose(entry.alpha, expected[entry.name], atol=2e-4, err_msg=entry.name)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_is_owned_exactly_once(specimen, name, granularity):
    """Whole tensors by one submodule; sliced ones by slices that fill them without overlap."""
    job = job_of(specimen(name), granularity=granularity)
    cover: dict[str, torch.Tensor] = {
        tensor: torch.zeros(job.skeleton.shapes[tensor], dtype=torch.int64) for tensor in job.plan.tensors
    }
    for submodule in job.submodules:
        sliced = {part.tensor for part in submodule.slices}
        for tensor in submodule.tensors:
            if tensor not in sliced:
                cover[tensor] += 1
        for tensor, axis, start, stop in submodule.slices:
            cover[tensor].narrow(axis, start, stop - start).add_(1)
    assert all((count == 1).all() for count in cover.values())
    parameters = set(job.skeleton.shapes)
    if job.skeleton.head_weight not in cover:
        parameters.discard(job.skeleton.head_weight)  # tied
    assert set(cover) == parameters


@pytest.mark.parametrize("name", ZOO)
def test_a_tensor_moves_its_own_block_only(specimen, name):
    """Gradients: the tensors that a block's output depends on are its own. Norms that feed both are left out."""
    job = job_of(specimen(name))
    checkpoints = Checkpoints(job.plan, job.recipe.names, torch.device("cpu"), torch.float32)
    table = job.skeleton.embedding_weight
    before = next(sub for sub in job.submodules if sub.kind == "embed").tensors
    job.skeleton.embed(
        torch.arange(6)[None], checkpoints.load(list(before), models=[0])[0] | {table: torch.randn(6, 32)}
    )
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    for submodule in job.submodules:
        if submodule.kind not in ("attention", "mlp"):
            continue
        prefix = f"{job.skeleton.layers_path}.{submodule.layer}."
        names = [tensor for tensor in job.plan.tensors if tensor.startswith(prefix)]
        leaves = {key: value.clone().requires_grad_() for key, value in checkpoints.load(names, models=[0])[0].items()}
        output = job.skeleton.block(submodule.layer, submodule.kind, hidden, leaves)
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        moved = {key for key, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().max() > 1e-9}
        shared = {key for key in names if ZOO[name].shared and key.startswith(prefix + ZOO[name].shared)}
        assert moved - shared <= set(submodule.tensors)
        # A key's bias shifts all scores of a query alike: softmax does not feel it.
        silent = {key for key in submodule.tensors if key.endswith("k_proj.bias")}
        assert set(submodule.tensors) - moved <= silent


@pytest.mark.parametrize("name", ZOO)
def test_stock_merge_loads_and_generates(specimen, write_recipe, tmp_path, name):
    """`mergekit-yaml` writes a model that loads without a missing tensor and generates; or it is refused, with why."""
    models = specimen(name)
    recipe = models.recipe(num_samples=2, max_seq_length=12, granularity="head_mlp")  # whole tensors and slices
    out = tmp_path / "out"
    result = mergekit_yaml(write_recipe(recipe), out, "--quiet")
    if ZOO[name].refused:
        assert_refused(result, "plan-does-not-fit", ZOO[name].refused)
        assert not out.exists()
        return
    assert result.exit_code == 0, result.output
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(out)("the quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


SEVERAL_GROUPS = [
    name for name, species in ZOO.items() if not species.full_qk_norm and not species.settings.get("multi_query")
]


@pytest.mark.parametrize("name", SEVERAL_GROUPS)
def test_zeroed_heads_difference_moves_its_own_alpha_alone(specimen, tmp_path, name):
    """Undoing one key/value group's change in an expert moves that group's alpha, and no other group's."""
    models = specimen(name)
    job = job_of(models, granularity="head_mlp")
    heads = [sub for sub in job.submodules if sub.kind == "attention_head" and sub.layer == 1]
    assert len(heads) > 1
    undone = tmp_path / "undone"
    base = AutoModelForCausalLM.from_pretrained(models.base).state_dict()
    model = AutoModelForCausalLM.from_pretrained(models.experts[0])
    state = model.state_dict()
    rename = job.skeleton.renamed
    for tensor, axis, start, stop in heads[0].slices:
        key = rename.get(tensor, tensor)
        state[key].narrow(axis, start, stop - start).copy_(base[key].narrow(axis, start, stop - start))
    # Norms and q/k norms act on every head, so they have to be the base's in both experts that are compared.
    shared = [key for key in state if (f"{job.skeleton.layers_path}.1." in key and "norm" in key) or ".1.ln_" in key]
    with torch.no_grad():
        for key in shared:
            state[key].copy_(base[key])
    same_norms = tmp_path / "same_norms"
    other = AutoModelForCausalLM.from_pretrained(models.experts[0])
    with torch.no_grad():
        for key in shared:
            other.state_dict()[key].copy_(base[key])
    for changed, path in ((model, undone), (other, same_norms)):
        changed.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    found = []
    for path in (same_norms, undone):
        variant = Models(models.folder, models.base, (path, models.experts[1]), models.datasets)
        job = job_of(variant, granularity="head_mlp")
        alphas = solve_job(job, gather_statistics(job))
        found.append({entry.name: entry.alpha for entry in alphas.submodules if entry.kind == "attention_head"})
    for head in found[0]:
        difference = np.abs(np.subtract(found[0][head], found[1][head])).max()
        assert (difference > 1e-3) == (head == heads[0].name), head
        if head != heads[0].name:
            assert difference < 1e-8
