"""Every architecture: streaming against the model's own forward, alphas against a reference that exchanges tensors
inside whole models, ownership against gradients, and a stock merge that is explicit arithmetic, loads and generates."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    PREPROCESSOR,
    Models,
    assert_refused,
    make_tokenizer,
    mergekit_yaml,
    own_class,
    slta,
    tensors,
)
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import GRANULARITIES, MERGED, TYPICAL, ZOO, Species

from mergekit_slta import Alphas
from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.batches import plan_batches
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.models.submodules import Submodule, partition
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import ForwardState

pytestmark = pytest.mark.zoo


def job_of(models: Models, *, trust_remote_code: bool = False, **parameters: object):
    recipe = models.recipe(**{"num_samples": 2, "max_seq_length": 12, **parameters})
    config = read_recipe(MergeConfiguration.model_validate(recipe))
    return prepare(config, MergeOptions(quiet=True, trust_remote_code=trust_remote_code), for_merge=False)


def with_granularity(job: Job, granularity: str) -> Job:
    """The same job at another granularity: only its submodules differ."""
    recipe, plan = job.recipe, job.plan
    settings = recipe.settings.model_copy(update={"granularity": granularity})
    submodules = partition(plan.tensors, job.skeleton.anatomy, granularity, tied=plan.is_tied)
    return replace(job, recipe=recipe.model_copy(update={"settings": settings}), submodules=tuple(submodules))


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose output projection is a tensor of its own, whatever the checkpoint says."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model.eval()


class Reference:
    """Models in memory. The base's own forward gives every module's arguments; a submodule's output is read where the
    species says, while single tensors of the base are exchanged."""

    def __init__(self, species: Species, models: Models, load: functools.partial | None = None) -> None:
        self.species = species
        load = load or functools.partial(own_class(models.base).from_pretrained, dtype=torch.float32)
        self.base, *experts = (untied(load(path)) for path in (models.base, *models.experts))
        self.states = [model.state_dict() for model in (self.base, *experts)]
        self.calls = functools.cache(self._calls)
        self.output = functools.cache(self._output)  # a submodule may be there at several granularities

    @torch.no_grad()
    def run(self, ids: tuple[int, ...], model: int, names: Sequence[str]) -> torch.Tensor:
        """The base's logits with the named tensors of a model."""
        state = {**self.states[0], **{name: self.states[model][name] for name in names}}
        return functional_call(self.base, state, (), {"input_ids": torch.tensor([ids]), "use_cache": False}).logits

    def _calls(self, ids: tuple[int, ...]) -> dict[str, tuple]:
        """path -> arguments of every module in the base's layers, on a row."""
        seen: dict[str, tuple] = {}

        def record(path: str):
            return lambda _, args, kwargs: seen.setdefault(path, (args, kwargs)) and None

        places = [(path, part) for path, part in self.base.named_modules() if path.startswith(self.species.path + ".")]
        handles = [part.register_forward_pre_hook(record(path), with_kwargs=True) for path, part in places]
        self.run(ids, 0, [])
        for handle in handles:
            handle.remove()
        return seen

    @torch.no_grad()
    def module(self, path: str, ids: tuple[int, ...], model: int, names: list[str], entering: str = "") -> torch.Tensor:
        """A module's output on the arguments that it has in the base, with the named tensors of a model; or the input
        of a module in it."""
        part, prefix = self.base.get_submodule(path), path + "."
        state = {name.removeprefix(prefix): self.states[0][name] for name in self.states[0] if name.startswith(prefix)}
        state |= {name.removeprefix(prefix): self.states[model][name] for name in names if name.startswith(prefix)}
        args, kwargs = self.calls(ids)[path]
        seen: list[torch.Tensor] = []
        if entering:
            inner = part.get_submodule(entering)
            handle = inner.register_forward_pre_hook(
                lambda _, given, named: seen.append(given[0] if given else named["hidden_states"]), with_kwargs=True
            )
        output = functional_call(part, state, args, kwargs)
        if entering:
            handle.remove()
            return seen[0]
        return output[0] if isinstance(output, tuple) else output

    def watched(self, path: str, side: str, ids: tuple[int, ...], model: int, names: list[str]) -> torch.Tensor:
        """What a module gets ("in") or gives ("out") in the base, with the named tensors of a model."""
        seen: list[torch.Tensor] = []

        def look(_, args, kwargs, output) -> None:
            seen.append(output if side == "out" else args[0] if args else kwargs["hidden_states"])

        handle = self.base.get_submodule(path).register_forward_hook(look, with_kwargs=True)
        self.run(ids, model, names)
        handle.remove()
        return seen[0]

    def block(self, index: int, block: str) -> list[str]:
        """Names of all tensors of a layer's block."""
        layer, prefix = self.species.layer(index), f"{self.species.path}.{index}."
        parts = [f"{part}." for part in (layer.mixers if block == "attention" else layer.mlps)]
        parts += [f"{norm}." for norm, owner in layer.norms.items() if owner == block]
        parts += layer.own if block == "mlp" else ()
        return [name for name in self.states[0] if name.startswith(tuple(prefix + part for part in parts))]

    def _output(self, submodule: Submodule, tied: bool, ids: tuple[int, ...], model: int) -> torch.Tensor:
        """f(x; theta_t) of a submodule, up to what cancels in df."""
        names = list(submodule.tensors)
        head = f"{self.species.head}.weight"
        if submodule.kind in ("model", "head"):
            return self.run(ids, model, [*names, *[head] * tied])
        if submodule.kind == "embed":
            return self.watched(f"{self.species.path}.0", "in", ids, model, names)
        if submodule.kind == "norm" and submodule.layer is None:
            return self.watched(submodule.name, "out", ids, model, names)
        if submodule.kind in ("layer", "norm", "linear"):
            return self.module(submodule.name, ids, model, names)
        layer, path = self.species.layer(submodule.layer), f"{self.species.path}.{submodule.layer}"
        if submodule.kind == "mlp":  # under `linear`, too, what is left of it takes the whole block's alpha
            own = self.block(submodule.layer, "mlp")
            assert set(names) <= set(own)
            assert submodule.forward_group != submodule.name or set(own) == set(names)
            return self.module(path, ids, model, own)
        own = self.block(submodule.layer, "attention")
        assert set(names) <= set(own)
        if submodule.kind == "attention_head":
            heads = self.module(path, ids, model, own, layer.heads.output)
            weight = self.states[model][f"{path}.{layer.heads.output}.weight"]
            is_transposed = type(self.base.get_submodule(f"{path}.{layer.heads.output}")).__name__ == "Conv1D"
            weight = weight if is_transposed else weight.T  # [in, out]
            width = weight.shape[0] // layer.heads.groups
            assert width % layer.heads.queries == 0
            group = int(submodule.name.rpartition(".")[2])
            columns = slice(group * width, (group + 1) * width)
            return heads[..., columns] @ weight[columns]
        if layer.parallel or not layer.mlps:
            return self.module(path, ids, model, own)
        return self.module(path, ids, model, own, layer.entry)

    def alphas(self, job) -> dict[str, np.ndarray]:
        """Eq. 12 with Eq. 33-34, row by row."""
        rows = [[tuple(row.ids) for row in drawn.rows] for drawn in job.rows]
        systems = {}
        tied = f"{self.species.head}.weight" not in job.plan.tensors
        for submodule in job.submodules:
            a, b = np.zeros((2, 2)), np.zeros(2)
            for task in range(2):
                for ids in rows[task]:
                    outputs = [self.output(submodule, tied, ids, model).double().numpy().ravel() for model in range(3)]
                    delta = np.stack([output - outputs[0] for output in outputs[1:]])
                    gram = delta @ delta.T
                    if np.trace(gram) > 0:
                        gram = gram / (np.trace(gram) / 2) / len(rows[task])
                        a += gram
                        b += gram[:, task]
            systems[submodule.name] = (a, b)
        if tied and "embed" in systems:
            systems["embed"] = tuple(x + y for x, y in zip(systems["embed"], systems["head"], strict=True))
        return {name: np.linalg.solve(a, b) if a.any() else np.zeros(2) for name, (a, b) in systems.items()}


def assert_anatomy(species: Species, job) -> None:
    """What the package found is what the species says."""
    found = job.skeleton.anatomy
    assert found.layers_path == species.path
    assert found.head_weight == f"{species.head}.weight"
    for index, (layer, heads) in enumerate(zip(found.layers, found.heads, strict=True)):
        said = species.layer(index)
        assert layer is not None
        assert (layer.mixers, layer.mlps, dict(layer.norms)) == (said.mixers, said.mlps, dict(said.norms))
        assert (layer.parallel, layer.entry) == (said.parallel, said.entry)
        assert (heads is None) == (said.heads is None)
        if said.heads is not None:
            output = f"{species.path}.{index}.{said.heads.output}"
            assert (heads.output, heads.groups, heads.queries) == (output, said.heads.groups, said.heads.queries)


def assert_owned_once(job) -> None:
    """Whole tensors by one submodule; sliced ones by slices that fill them without overlap."""
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


def assert_equal_alphas(found: Alphas, expected: dict[str, np.ndarray]) -> None:
    assert {entry.name for entry in found.submodules} == expected.keys()
    for entry in found.submodules:
        np.testing.assert_allclose(entry.alpha, expected[entry.name], atol=1e-4, err_msg=entry.name)


def assert_merged(models: Models, out: Path) -> Alphas:
    """OUT has the base's names and shapes, and is explicit arithmetic; what is not weighted is the base's."""
    alphas = Alphas.load(out / "slta_alphas.json")
    base, *experts = ({name: value.double() for name, value in tensors(path).items()} for path in
                      (models.base, *models.experts))  # fmt: skip
    merged = tensors(out)
    assert {name: value.shape for name, value in merged.items()} == {name: value.shape for name, value in base.items()}
    expected = {name: value.clone() for name, value in base.items()}
    owned = set()
    for entry in alphas.submodules:
        for name in entry.tensors:
            owned.add(name)
            changes = sum(
                alpha * (expert[name] - base[name]) for alpha, expert in zip(entry.alpha, experts, strict=True)
            )
            for part in entry.parts(name):
                axis, start, stop = part
                expected[name].narrow(axis, start, stop - start).add_(changes.narrow(axis, start, stop - start))
            if not entry.parts(name):
                expected[name] += changes
    assert owned | set(alphas.copied) == set(merged)
    assert not owned & set(alphas.copied)
    for name, value in merged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    return alphas


def assert_loads_and_generates(kind: type, out: Path, **arguments: object) -> None:
    model, info = kind.from_pretrained(out, output_loading_info=True, **arguments)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    ids = AutoTokenizer.from_pretrained(out)("the quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def merged_by_stock(models: Models, folder: Path, *flags: str, **parameters: object) -> Path:
    """The folder that `mergekit-yaml` has written."""
    recipe = models.recipe(**{"num_samples": 2, "max_seq_length": 12, **parameters})
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    result = mergekit_yaml(folder / "recipe.yml", folder / "out", "--quiet", *flags)
    assert result.exit_code == 0, result.output
    return folder / "out"


def assert_supported(species: Species, models: Models, reference: Reference, folder: Path, kind: type, **code) -> None:
    """All that is promised of an architecture; `code` is `trust_remote_code`, if its class needs that."""
    prepared = job_of(models, **code)
    for granularity in GRANULARITIES:
        job = with_granularity(prepared, granularity)
        assert_owned_once(job)
        expected = reference.alphas(job)
        if granularity == "head_mlp":  # whole tensors and slices
            (folder / "merge").mkdir()
            flags = ["--trust-remote-code"] * bool(code)
            out = merged_by_stock(models, folder / "merge", *flags, granularity=granularity)
            assert_equal_alphas(assert_merged(models, out), expected)
            assert_loads_and_generates(kind, out, **code)
            continue
        assert_equal_alphas(solve_job(job, gather_statistics(job)), expected)
        if granularity == "attn_mlp":
            assert_anatomy(species, job)
            assert_carried(models, job)
        if granularity != "model":
            assert_streams(job, reference.base, 1e-4)


def assert_carried(models: Models, job) -> None:
    """Everything in the base's checkpoint is either calibrated or carried."""
    calibrated = {name for source in job.plan.tensors.values() for name in source.names}
    assert calibrated.isdisjoint(job.plan.carried)
    assert calibrated.union(job.plan.carried) == tensors(models.base).keys()


@pytest.mark.parametrize("name", MERGED)
def test_architecture(specimen, tmp_path, name):
    """What is found is what the code says; streaming is the model's own forward; alphas are those of tensors exchanged
    inside whole models; the stock merge keeps every tensor, is explicit arithmetic, loads and generates."""
    species, models = ZOO[name], specimen(name)
    assert_supported(species, models, Reference(species, models), tmp_path, own_class(models.base))
    if species.carried:
        found = tmp_path / "merge" / "out" / "preprocessor_config.json"
        assert json.loads(found.read_text()) == PREPROCESSOR


def test_every_decoder_of_mergekit_is_here():
    """Classes that mergekit defines and transformers has, but for those with an encoder or without a vocabulary."""
    others = ("Bert", "DistilBert", "Roberta", "T5", "Whisper")
    defined = {
        name
        for name in NAME_TO_ARCH
        if hasattr(transformers, name) and not name.startswith(others) and "SequenceClassification" not in name
    }
    assert defined <= {species.model for species in ZOO.values()}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in MERGED])
def test_refused_architectures(specimen, write_recipe, tmp_path, name):
    """The table says why; the message says what was seen."""
    result = mergekit_yaml(write_recipe(specimen(name).recipe()), tmp_path / "out", "--quiet")
    assert_refused(result, "unsupported-architecture", ZOO[name].model, "its layers read the tokens of a row")
    assert not (tmp_path / "out").exists()


def assert_streams(job, model: torch.nn.Module, tolerance: float) -> None:
    """The base's logits of every row are those of the model's own forward."""
    tokens = [list(row.ids) for drawn in job.rows for row in drawn.rows]
    own_batches = job.recipe.settings.granularity == "linear"
    batches = plan_batches(tokens, max_tokens=0) if own_batches else plan_batches(tokens)
    checkpoints = Checkpoints(job.plan, job.skeleton, job.recipe.names, job.device, job.dtype)
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
    for compute_dtype in ("float32", "float64") if dtype == "float64" else (dtype,):
        recipe["parameters"]["compute_dtype"] = compute_dtype
        result = slta("calibrate", write_recipe(recipe), "-o", tmp_path / f"{compute_dtype}.json")
        assert result.exit_code == 0, result.output
        alphas[compute_dtype] = Alphas.load(tmp_path / f"{compute_dtype}.json")
    if dtype == "float64":
        for one, other in zip(alphas["float32"].submodules, alphas["float64"].submodules, strict=True):
            np.testing.assert_allclose(one.alpha, other.alpha, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TYPICAL)
def test_a_tensor_moves_its_own_block_only(specimen, name):
    """Gradients: the tensors that a block's output depends on are its own. Norms that feed both are left out."""
    job = job_of(specimen(name))
    checkpoints = Checkpoints(job.plan, job.skeleton, job.recipe.names, torch.device("cpu"), torch.float32)
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
        norms = ZOO[name].layer(submodule.layer).norms
        shared = {key for key in names for norm, block in norms.items() if block is None and f"{prefix}{norm}." in key}
        assert moved - shared <= set(submodule.tensors)
        # A key's bias shifts all scores of a query alike: softmax does not feel it.
        silent = {key for key in submodule.tensors if key.endswith("k_proj.bias")}
        assert set(submodule.tensors) - moved <= silent


@pytest.mark.parametrize(
    "name", ["llama_bias", "gpt2", "gpt_neox", "phi3", "falcon", "opt", "gemma2", "qwen3_moe", "mistral3", "lfm2"]
)
def test_zeroed_heads_difference_moves_its_own_alpha_alone(specimen, tmp_path, name):
    """Undoing one key/value group's change in an expert moves that group's alpha, and no other group's."""
    models = specimen(name)
    job = job_of(models, granularity="head_mlp")
    heads = [sub for sub in job.submodules if sub.kind == "attention_head" and sub.layer == 1]
    assert len(heads) > 1
    undone = tmp_path / "undone"
    load = own_class(models.base).from_pretrained
    base = load(models.base).state_dict()
    model = load(models.experts[0])
    state = model.state_dict()
    for key, axis, start, stop in heads[0].slices:
        state[key].narrow(axis, start, stop - start).copy_(base[key].narrow(axis, start, stop - start))
    # Norms and q/k norms act on every head, so they have to be the base's in both experts that are compared.
    shared = [key for key in state if (f"{job.skeleton.layers_path}.1." in key and "norm" in key) or ".1.ln_" in key]
    with torch.no_grad():
        for key in shared:
            state[key].copy_(base[key])
    same_norms = tmp_path / "same_norms"
    other = load(models.experts[0])
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
