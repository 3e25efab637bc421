"""Checkpoints that people really merge: adapters, .bin files, mixed dtypes, tied beside untied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import Models, assert_refused, make_tokenizer, mergekit_yaml, refused, tensors
from mergekit.io.tasks import GatherTensors
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.errors import ModelError
from mergekit_slta.files.alphas_file import Alphas

QUIET = ["--quiet"]


def merge(recipe: Path, out: Path, *options: object) -> Result:
    return mergekit_yaml(recipe, out, *QUIET, *options)


def adapter(models: Models, folder: Path, seed: int, **config: object) -> tuple[Path, Path]:
    """A LoRA adapter of the base with weights that matter, and the full checkpoint that peft makes of it."""
    base = AutoModelForCausalLM.from_pretrained(models.base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **config}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / f"adapter{seed}")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models.base), folder / f"adapter{seed}")
    merged.merge_and_unload().save_pretrained(folder / f"full{seed}")
    make_tokenizer().save_pretrained(folder / f"full{seed}")
    return folder / f"adapter{seed}", folder / f"full{seed}"


def with_experts(models: Models, experts: list[object], **parameters: object) -> dict:
    recipe = models.recipe(len(experts), **parameters)
    for entry, expert in zip(recipe["models"], experts, strict=True):
        entry["model"] = str(expert)
    return recipe


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapter_is_as_good_as_the_merged_checkpoint(make_models, write_recipe, tmp_path, family):
    """base+adapter gives the alphas and tensors of the full checkpoint, to 1e-4, and leaves no copy on disk."""
    models = make_models(family)
    adapters, fulls = zip(*(adapter(models, tmp_path, seed) for seed in (1, 2)), strict=True)
    before = set(tmp_path.rglob("*"))
    references = [f"{models.base}+{path}" for path in adapters]
    result = merge(write_recipe(with_experts(models, references)), tmp_path / "one")
    assert result.exit_code == 0, result.output
    new = [path for path in tmp_path.rglob("*") if path not in before and tmp_path / "one" not in (path, *path.parents)]
    assert [path.name for path in new] == ["recipe.yml"]  # extra disk: nothing
    result = merge(write_recipe(with_experts(models, list(fulls))), tmp_path / "two")
    assert result.exit_code == 0, result.output
    one, two = (Alphas.load(tmp_path / name / "slta_alphas.json") for name in ("one", "two"))
    assert list(one.models) == references
    for mine, theirs in zip(one.submodules, two.submodules, strict=True):
        np.testing.assert_allclose(mine.alpha, theirs.alpha, atol=1e-4)
    for name, tensor in tensors(tmp_path / "two").items():
        torch.testing.assert_close(tensors(tmp_path / "one")[name], tensor, rtol=1e-4, atol=1e-4)


def test_untouched_blocks_of_an_adapter_are_unchanged(tiny, write_recipe, tmp_path):
    """Where an adapter does not reach, its alpha is 0 and marked."""
    path, _ = adapter(tiny, tmp_path, 3, target_modules=["q_proj"])
    recipe = with_experts(tiny, [f"{tiny.base}+{path}", tiny.experts[1]])
    assert merge(write_recipe(recipe), tmp_path / "out").exit_code == 0
    for entry in Alphas.load(tmp_path / "out" / "slta_alphas.json").submodules:
        assert (entry.alpha[0] == 0.0) == (entry.kind != "attention")
        assert ("unchanged" in entry.flags) == (entry.kind != "attention")


def test_changed_adapter_is_noticed(tiny, write_recipe, tmp_path):
    """Alphas are bound to the adapter's bytes, too."""
    path, _ = adapter(tiny, tmp_path, 4)
    recipe = with_experts(tiny, [f"{tiny.base}+{path}", tiny.experts[1]], alphas=str(tmp_path / "saved.json"))
    assert merge(write_recipe(recipe), tmp_path / "one").exit_code == 0
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    result = merge(write_recipe(recipe), tmp_path / "two")
    assert_refused(result, "alphas-of-another-merge", "other weights of")


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["DoRA", "modules_to_save"]
)
def test_other_adapters_go_mergekits_way(tiny, write_recipe, tmp_path, config):
    """DoRA and saved modules need mergekit's merged copy: said when its folder is missing, right when it is there."""
    path, full = adapter(tiny, tmp_path, 5, **config)
    recipe = write_recipe(with_experts(tiny, [f"{tiny.base}+{path}", tiny.experts[1]]))
    result = merge(recipe, tmp_path / "out")
    assert_refused(result, "adapter-needs-copy", path, next(iter(config)).replace("use_dora", "DoRA"))
    result = merge(recipe, tmp_path / "out", "--lora-merge-cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert merge(write_recipe(with_experts(tiny, [full, tiny.experts[1]])), tmp_path / "two").exit_code == 0
    for name, tensor in tensors(tmp_path / "two").items():
        torch.testing.assert_close(tensors(tmp_path / "out")[name], tensor, rtol=1e-4, atol=1e-4)


def test_bin_checkpoints(tiny, write_recipe, tmp_path):
    """Experts stored as pytorch_model.bin give the same merge as safetensors."""
    folder = tmp_path / "bin"
    shutil.copytree(tiny.experts[0], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = AutoModelForCausalLM.from_pretrained(tiny.experts[0]).state_dict()
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    assert merge(write_recipe(with_experts(tiny, [folder, tiny.experts[1]])), tmp_path / "one").exit_code == 0
    assert merge(write_recipe(tiny.recipe(2)), tmp_path / "two").exit_code == 0
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


class Evil:
    """What a pickle from a stranger can do."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_bin_checkpoints_run_no_code(tiny, write_recipe, tmp_path, monkeypatch):
    """A pickled object in a .bin is refused, not run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "evil"
    shutil.copytree(tiny.experts[0], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    result = merge(write_recipe(with_experts(tiny, [folder, tiny.experts[1]])), tmp_path / "out")
    assert_refused(result, "unreadable-checkpoint", "evil", "Weights only load failed")
    assert not (tmp_path / "pwned").exists()


def test_experts_in_different_dtypes(tiny, write_recipe, tmp_path):
    """float16, bfloat16 and float32 side by side: read as they are, computed in float32."""
    paths = []
    for number, dtype in enumerate((torch.float16, torch.bfloat16)):
        path = tmp_path / f"expert{number}"
        AutoModelForCausalLM.from_pretrained(tiny.experts[number], dtype=dtype).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        paths.append(path)
    result = merge(write_recipe(with_experts(tiny, paths)), tmp_path / "out")
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    base, experts = tensors(tiny.base), [tensors(path) for path in paths]
    for entry in alphas.submodules:
        for name in entry.tensors:
            expected = base[name].double() + sum(
                weight * (expert[name].double() - base[name].double())
                for weight, expert in zip(entry.alpha, experts, strict=True)
            )
            found = tensors(tmp_path / "out")[name]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def untied_copy(source: Path, target: Path, scale: float = 1.3) -> Path:
    """A tied checkpoint with an output projection of its own, moved away from the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    other = AutoModelForCausalLM.from_config(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= scale
    other.load_state_dict(state)
    other.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


@pytest.mark.parametrize("side", ["expert", "base"])
def test_tied_beside_untied(make_models, write_recipe, tmp_path, side):
    """A tied base with an untied expert, and the reverse: an untied output whose config says so, and which loads as the
    arithmetic says."""
    models = make_models("llama", tied=True)
    base, experts = models.base, list(models.experts)
    if side == "expert":
        experts[1] = untied_copy(experts[1], tmp_path / "untied")
    else:
        base = untied_copy(base, tmp_path / "untied", scale=1.0)
    recipe = with_experts(models, experts)
    recipe["base_model"] = str(base)
    result = merge(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    (entry,) = [entry for entry in alphas.submodules if entry.kind == "head"]
    assert "lm_head.weight" in entry.tensors

    def head(path: Path) -> torch.Tensor:
        state = tensors(path)
        return state.get("lm_head.weight", state["model.embed_tokens.weight"]).double()

    expected = head(base) + sum(
        weight * (head(path) - head(base)) for weight, path in zip(entry.alpha, experts, strict=True)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_old_gpt_neox_checkpoints_merge(write_recipe, tmp_path):
    """As older transformers saved Pythia: `embed_out`, masks and rotary buffers. Buffers are the base's; it loads."""
    import transformers
    from conftest import perturbed, write_rows
    from safetensors.torch import save_file

    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=320
    )
    base = AutoModelForCausalLM.from_config(config)
    for number in range(3):
        folder = tmp_path / f"model{number}"
        (base if number == 0 else perturbed(base, number)).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        state = tensors(folder)
        assert "embed_out.weight" in state  # transformers 5 still writes the old name, but none of the buffers
        for layer in range(2):
            path = f"gpt_neox.layers.{layer}.attention"
            state[f"{path}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            state[f"{path}.masked_bias"] = torch.tensor(-1e9)
            state[f"{path}.rotary_emb.inv_freq"] = torch.rand(1, generator=torch.Generator().manual_seed(0))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_rows(tmp_path / f"task{number}.jsonl", number)
    models = Models(
        tmp_path, tmp_path / "model0", (tmp_path / "model1", tmp_path / "model2"),
        (tmp_path / "task1.jsonl", tmp_path / "task2.jsonl"),
    )  # fmt: skip
    result = merge(write_recipe(models.recipe()), tmp_path / "out")
    assert result.exit_code == 0, result.output
    merged = tensors(tmp_path / "out")
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    assert "gpt_neox.layers.0.attention.masked_bias" in alphas.copied
    assert float(merged["gpt_neox.layers.1.attention.masked_bias"]) == -1e9
    (entry,) = [entry for entry in alphas.submodules if entry.kind == "head"]
    assert "embed_out.weight" in entry.tensors
    states = [tensors(tmp_path / f"model{number}")["embed_out.weight"].double() for number in range(3)]
    expected = states[0] + sum(w * (state - states[0]) for w, state in zip(entry.alpha, states[1:], strict=True))
    torch.testing.assert_close(merged["embed_out.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_the_dtype_of_an_adapters_sum_counts(tiny, write_recipe, tmp_path):
    """--lora-merge-dtype changes the tensors, and so what alphas are valid for."""
    path, _ = adapter(tiny, tmp_path, 6)
    recipe = with_experts(tiny, [f"{tiny.base}+{path}", tiny.experts[1]], alphas=str(tmp_path / "saved.json"))
    assert merge(write_recipe(recipe), tmp_path / "one").exit_code == 0
    result = merge(write_recipe(recipe), tmp_path / "two", "--lora-merge-dtype", "float16")
    assert_refused(result, "alphas-of-another-merge", "other weights of")


def test_a_token_beyond_a_table(job):
    """A token that a table has no row for is named, with the number of rows."""
    checkpoints = Checkpoints(job.plan, job.skeleton, job.recipe.names, job.device, job.dtype, job.tokenizer)
    table = job.skeleton.embedding_weight
    rows = checkpoints.raw(table)[0].shape[0]
    assert checkpoints.table_rows(table, torch.tensor([0, rows - 1]))[0].shape[0] == 2
    with refused(ModelError, "token-out-of-range", f"token {rows} ", f"the {rows} rows of {table}"):
        checkpoints.table_rows(table, torch.tensor([0, rows]))


def test_a_tensor_that_one_model_lacks(job, monkeypatch):
    """A tensor that a checkpoint turns out not to have is named; those that have it can be asked alone."""
    checkpoints = Checkpoints(job.plan, job.skeleton, job.recipe.names, job.device, job.dtype, job.tokenizer)
    table = job.skeleton.embedding_weight
    gather, last = GatherTensors.execute, job.plan.models[-1]

    def without_the_last(self, **tensors):
        return {model: tensor for model, tensor in gather(self, **tensors).items() if model != last}

    monkeypatch.setattr(GatherTensors, "execute", without_the_last)
    assert len(checkpoints.raw(table, [0])) == 1
    with refused(ModelError, "missing-tensor", table):
        checkpoints.raw(table)
