"""Adapters added tensor by tensor, against peft's own `merge_and_unload`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import make_config, refused
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mergekit_slta.checkpoints.lora_loader import AdapterLoader, needs_merged_copy, open_adapter
from mergekit_slta.errors import ModelError
from mergekit_slta.files.names import ADAPTER_CONFIG_NAME

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EPSILON = torch.finfo(torch.bfloat16).eps


def save_base(folder: Path, config: transformers.PretrainedConfig, dtype: torch.dtype, shard: str = "40KB") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    gpt2 = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return {
        "llama": save_base(folder / "llama", make_config("llama"), torch.float32),
        "llama-bf16": save_base(folder / "llama-bf16", make_config("llama"), torch.bfloat16),
        "tied": save_base(folder / "tied", make_config("llama", tied=True), torch.float32),
        "gpt2": save_base(folder / "gpt2", gpt2, torch.float32),
    }


@pytest.fixture
def save_adapter(tmp_path: Path) -> Callable[..., ModelReference]:
    """An adapter with a product that is not zero, saved by peft itself."""

    def save(base: Path, dtype: torch.dtype = torch.float32, name: str = "adapter", **settings: object):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.data = torch.randn(parameter.shape).mul_(0.2).to(dtype)
        model.save_pretrained(tmp_path / name)
        return ModelReference.parse(f"{base}+{tmp_path / name}")

    return save


def merged_by_peft(model: ModelReference, dtype: torch.dtype | None = None, **how: object) -> dict[str, torch.Tensor]:
    base = transformers.AutoModelForCausalLM.from_pretrained(model.model.path, dtype=dtype or "auto")
    return PeftModel.from_pretrained(base, model.lora.path, **how).merge_and_unload().state_dict()


def opened(model: ModelReference, **options: object) -> AdapterLoader:
    assert needs_merged_copy(model) is None
    loader = open_adapter(model, MergeOptions(quiet=True, **options))
    assert loader is not None
    return loader


def check_all(loader: AdapterLoader, reference: dict[str, torch.Tensor], base: Path, changed: int) -> None:
    """Every tensor is peft's, and those that no target names are the base's own bytes."""
    plain = LazyTensorLoader.from_disk(str(base), lazy_unpickle=False)
    assert len(loader.updates) == changed
    for name in plain.index.tensor_paths:
        tensor, own = loader.get_tensor(name), plain.get_tensor(name)
        assert tensor.dtype == own.dtype
        assert tensor.is_contiguous()
        if name in loader.updates:
            assert not torch.equal(tensor, own)
        else:
            assert torch.equal(tensor, own)
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6)
        else:  # one rounding apart at most
            torch.testing.assert_close(tensor, reference[name], rtol=EPSILON, atol=0)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"target_modules": ATTENTION, "lora_alpha": 16}, 8),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj", "lora_alpha": 3}, 2),
        ({"target_modules": ATTENTION + MLP, "use_rslora": True, "r": 9, "lora_alpha": 5}, 14),
        (
            {
                "target_modules": ATTENTION + MLP,
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7, "model.layers.0.mlp.up_proj": 3},
                "alpha_pattern": {r"^model\.layers\.1\..*": 32, "o_proj": 1},
            },
            14,
        ),
        ({"target_modules": ["o_proj"], "rank_pattern": {"o_proj": 2}, "use_rslora": True, "lora_dropout": 0.1}, 2),
        ({"target_modules": ATTENTION, "layers_to_transform": [1], "init_lora_weights": "gaussian"}, 4),
        ({"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}, 7),
    ],
)
def test_llama(bases, save_adapter, settings: dict, changed: int) -> None:
    model = save_adapter(bases["llama"], **settings)
    check_all(opened(model), merged_by_peft(model), bases["llama"], changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(bases, save_adapter, dtype: torch.dtype) -> None:
    model = save_adapter(bases["llama-bf16"], dtype, target_modules=ATTENTION + MLP, lora_alpha=16)
    loader = opened(model)
    check_all(loader, merged_by_peft(model), bases["llama-bf16"], 14)

    # Rounded once: the nearest bfloat16 of the float32 sum. peft without its float32 adapters rounds twice.
    exact = merged_by_peft(model, torch.float32)
    for name in loader.updates:
        assert (loader.get_tensor(name).float() - exact[name]).abs().le(exact[name].abs() * EPSILON / 2 + 1e-7).all()


def test_merge_dtype_is_honoured(bases, save_adapter) -> None:
    model = save_adapter(bases["llama-bf16"], target_modules=ATTENTION)
    loader = opened(model, lora_merge_dtype="float32")
    for name, expected in merged_by_peft(model, torch.float32).items():
        torch.testing.assert_close(loader.get_tensor(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["attn.c_proj"]])
@pytest.mark.parametrize("flag", [True, False])  # peft goes by the layer's class, whatever the flag
def test_fan_in_fan_out(bases, save_adapter, targets: list[str], flag: bool) -> None:
    model = save_adapter(bases["gpt2"], target_modules=targets, fan_in_fan_out=True)
    path = Path(model.lora.path, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": flag}))
    loader = opened(model)
    check_all(loader, merged_by_peft(model), bases["gpt2"], 2 * (4 if "c_fc" in targets else 1))


def test_flag_without_conv1d(bases, save_adapter) -> None:
    model = save_adapter(bases["llama"], target_modules=["q_proj", "o_proj"])  # square
    path = Path(model.lora.path, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    check_all(opened(model), merged_by_peft(model), bases["llama"], 4)


def test_checkpoint_without_prefix(bases, save_adapter, tmp_path: Path) -> None:
    model = save_adapter(bases["gpt2"], target_modules=["c_attn", "c_proj"])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(bases["gpt2"] / "config.json", bare)
    plain = LazyTensorLoader.from_disk(str(bases["gpt2"]))
    tensors = {name: plain.get_tensor(name) for name in plain.index.tensor_paths}
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors"
    )
    loader = opened(ModelReference.parse(f"{bare}+{model.lora.path}"))
    reference = {name.removeprefix("transformer."): tensor for name, tensor in merged_by_peft(model).items()}
    check_all(loader, reference, bare, 6)


def test_pickled_files(bases, save_adapter, tmp_path: Path) -> None:
    model = save_adapter(bases["llama"], target_modules=ATTENTION)
    reference = merged_by_peft(model)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(bases["llama"] / "config.json", pickled)
    plain = LazyTensorLoader.from_disk(str(bases["llama"]))
    torch.save({name: plain.get_tensor(name) for name in plain.index.tensor_paths}, pickled / "pytorch_model.bin")
    weights = Path(model.lora.path, "adapter_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    loader = opened(ModelReference.parse(f"{pickled}+{model.lora.path}"))
    assert loader.fingerprint_files[1].endswith(".bin")
    check_all(loader, reference, pickled, 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"bias": "all"}, "bias: all"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
        ({"target_modules": ["q_proj", "lm_head"]}, "tensors besides LoRA's"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: 1, 2"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
def test_what_needs_a_merged_copy(bases, save_adapter, settings: dict, reason: str) -> None:
    model = save_adapter(bases["llama"], **{"target_modules": ["q_proj"], **settings})
    assert needs_merged_copy(model).startswith(reason)
    assert open_adapter(model, MergeOptions()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters: mlp.experts"),
        ({"peft_type": "IA3"}, "peft_type: IA3"),
        ({"peft_type": None}, "peft_type: None"),
        ({"from_the_future": {"a": 1}}, "from_the_future"),
        ({"target_modules": ["q_proj"]}, "tensors outside of target_modules: model.layers.0.self_attn.v_proj"),
    ],
)
def test_settings_that_need_a_merged_copy(bases, save_adapter, changes: dict, reason: str) -> None:
    model = save_adapter(bases["llama"], target_modules=["q_proj", "v_proj"])
    path = Path(model.lora.path, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert needs_merged_copy(model).startswith(reason)
    assert open_adapter(model, MergeOptions()) is None


def test_non_lora_and_no_adapter(bases, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
    reference = ModelReference.parse(f"{bases['llama']}+{tmp_path / 'ia3'}")
    assert needs_merged_copy(reference) == "peft_type: IA3"
    assert open_adapter(reference, MergeOptions()) is None
    plain = ModelReference.parse(str(bases["llama"]))
    assert needs_merged_copy(plain) is None
    assert open_adapter(plain, MergeOptions()) is None


@pytest.fixture
def edit(bases, save_adapter) -> Callable[..., ModelReference]:
    """A good adapter whose tensors, or settings, have been changed afterwards."""

    def change(tensors: Callable[[dict], dict] = lambda tensors: tensors, **settings: object) -> ModelReference:
        model = save_adapter(bases["llama"], target_modules=["q_proj", "k_proj"])
        weights, config = (Path(model.lora.path, name) for name in ("adapter_model.safetensors", "adapter_config.json"))
        save_file(tensors(load_file(weights)), weights)
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        return model

    return change


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "code", "values"),
    [
        (
            lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()},
            "other-base",
            ["adapts model.layers.7.self_attn"],
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{Q}B.weight"},
            "corrupt-adapter",
            ["lora_A.weight of the two"],
        ),
        (lambda t: {**t, f"{Q}B.weight": torch.ones(31, 4)}, "other-base", ["q_proj is [31, 32]", "[32, 32]"]),
        (lambda t: {**t, f"{Q}B.weight": torch.ones(32, 3)}, "corrupt-adapter", ["ranks 4 and 3", "says 4"]),
        (lambda t: {}, "corrupt-adapter", ["no LoRA tensors"]),
    ],
)
def test_tensors_that_do_not_fit(edit, tensors: Callable, code: str, values: list[str]) -> None:
    model = edit(tensors)
    with refused(ModelError, code, *values):
        open_adapter(model, MergeOptions())


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"r": 8}, ["ranks 4 and 4", "says 8"]),
        ({"r": 0}, ["no usable rank and alpha"]),
        ({"r": "x"}, ["no usable rank and alpha"]),
        ({"lora_alpha": float("nan")}, ["no usable rank and alpha"]),
        ({"rank_pattern": {"(": 2}}, ["no usable rank and alpha"]),
        ({"rank_pattern": [3]}, ["no usable rank and alpha"]),
        ({"target_modules": "("}, ["peft cannot match"]),
        ({"target_modules": 3}, ["peft cannot match"]),
    ],
)
def test_settings_that_make_no_sense(edit, settings: dict, values: list[str]) -> None:
    with refused(ModelError, "corrupt-adapter", *values):
        open_adapter(edit(**settings), MergeOptions())


def test_wrong_shapes_of_a_pickled_base(edit, bases, tmp_path: Path) -> None:
    model = edit(lambda t: {**t, f"{Q}B.weight": torch.ones(31, 4)})
    shutil.copy(bases["llama"] / "config.json", tmp_path)
    plain = LazyTensorLoader.from_disk(str(bases["llama"]))
    torch.save({name: plain.get_tensor(name) for name in plain.index.tensor_paths}, tmp_path / "pytorch_model.bin")
    loader = open_adapter(ModelReference.parse(f"{tmp_path}+{model.lora.path}"), MergeOptions())
    loader.get_tensor("model.layers.0.self_attn.q_proj.weight")
    with refused(ModelError, "other-base", "q_proj is [31, 32]"):
        loader.get_tensor("model.layers.1.self_attn.q_proj.weight")


def test_damaged_and_missing_files(edit, bases, tmp_path: Path) -> None:
    model = edit()
    weights = Path(model.lora.path, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-40])
    for ask in (needs_merged_copy, lambda model: open_adapter(model, MergeOptions())):
        with refused(ModelError, "corrupt-adapter", "adapter_model.safetensors"):
            ask(model)
    weights.unlink()
    with refused(ModelError, "missing-adapter", "adapter_model.safetensors"):
        needs_merged_copy(model)
    config = Path(model.lora.path, "adapter_config.json")
    for text in ("{", "[]"):
        weights.touch()
        config.write_text(text)
        with refused(ModelError, "corrupt-adapter", "adapter_config.json"):
            needs_merged_copy(model)
    with refused(ModelError, "missing-adapter", "adapter_config.json"):
        needs_merged_copy(ModelReference.parse(f"{bases['llama']}+{tmp_path / 'nowhere'}"))
    with refused(ModelError, "hub-unreachable", "nobody/nothing@main", "HF_HUB_OFFLINE"):
        needs_merged_copy(ModelReference.parse(f"{bases['llama']}+nobody/nothing@main"))


def test_missing_base(edit, tmp_path: Path) -> None:
    with refused(ModelError, "unreadable-checkpoint", tmp_path / "nowhere", "the base of an adapter"):
        open_adapter(ModelReference.parse(f"{tmp_path / 'nowhere'}+{edit().lora.path}"), MergeOptions())


def test_quantized_base(edit, bases, tmp_path: Path) -> None:
    model = edit()
    shutil.copy(bases["llama"] / "config.json", tmp_path)
    plain = LazyTensorLoader.from_disk(str(bases["llama"]))
    tensors = {name: plain.get_tensor(name).to(torch.float8_e4m3fn) for name in plain.index.tensor_paths}
    save_file(tensors, tmp_path / "model.safetensors")
    with refused(ModelError, "quantized-weights", "F8_E4M3", tmp_path):
        open_adapter(ModelReference.parse(f"{tmp_path}+{model.lora.path}"), MergeOptions())


def test_tied_head(bases, save_adapter) -> None:
    model = save_adapter(bases["tied"], target_modules=["q_proj", "lm_head"])
    weights = Path(model.lora.path, "adapter_model.safetensors")
    save_file({key: value for key, value in load_file(weights).items() if "lora_" in key}, weights)
    with refused(ModelError, "adapter-on-tied-head", "lm_head"):
        open_adapter(model, MergeOptions())
    model = save_adapter(bases["tied"], name="other", target_modules=["q_proj"])
    check_all(opened(model), merged_by_peft(model), bases["tied"], 2)


def test_interface_of_the_loader(bases, save_adapter) -> None:
    model = save_adapter(bases["llama"], target_modules=["q_proj"])
    loader = opened(model)
    plain = LazyTensorLoader.from_disk(str(bases["llama"]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(loader, LazyTensorLoader)
    assert loader.index == plain.index
    assert [Path(path).name for path in loader.fingerprint_files] == [
        ADAPTER_CONFIG_NAME,
        "adapter_model.safetensors",
    ]
    assert all(Path(path).parent == Path(model.lora.path) for path in loader.fingerprint_files)
    assert torch.equal(loader.get_tensor("elsewhere", aliases=["nor.here", name]), loader.get_tensor(name))
    assert loader.get_tensor("elsewhere", aliases=["nor.here"], raise_on_missing=False) is None
    with pytest.raises(KeyError):
        loader.get_tensor("elsewhere")


def test_flush_and_laziness(bases, save_adapter) -> None:
    model = save_adapter(bases["llama"], target_modules=["q_proj"])
    shared = LazyTensorLoader.from_disk(str(bases["llama"]))
    loader = open_adapter(model, MergeOptions(), base=shared)
    assert loader.base is shared
    assert shared.current_shard is None
    assert loader.adapter.current_shard is None
    name = "model.layers.0.self_attn.q_proj.weight"
    before, own = loader.get_tensor(name), shared.get_tensor(name)
    assert torch.equal(shared.get_tensor(name), own)  # nothing is added in place
    loader.flush()
    assert shared.current_shard is None
    assert loader.adapter.current_shard is None
    assert torch.equal(loader.get_tensor(name), before)


def test_threads(bases, save_adapter) -> None:
    model = save_adapter(bases["llama"], target_modules="all-linear")
    loader = opened(model)
    names = list(loader.index.tensor_paths)
    expected = {name: loader.get_tensor(name).clone() for name in names}

    def read(number: int) -> bool:
        if number % 17 == 0:
            loader.flush()
        name = names[number * 7 % len(names)]
        return torch.equal(loader.get_tensor(name), expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


@pytest.fixture
def cache() -> Iterator[LoaderCache]:
    cache = LoaderCache()
    before = dict(cache.loaders)
    yield cache
    cache.loaders.clear()
    cache.loaders.update(before)


def test_in_mergekits_tasks(bases, save_adapter, cache: LoaderCache) -> None:
    model = save_adapter(bases["llama"], target_modules=ATTENTION)
    cache.setup(MergeOptions())
    cache.loaders[model] = opened(model)
    reference = merged_by_peft(model)
    for name, expected in reference.items():
        torch.testing.assert_close(LoadTensor(model=model, tensor=name).execute(), expected, rtol=1e-5, atol=1e-6)
    name = "model.layers.1.self_attn.o_proj.weight"
    half = LoadTensor(model=model, tensor="missing", aliases=(name,), dtype="bfloat16").execute()
    assert torch.equal(half, cache.loaders[model].get_tensor(name).bfloat16())
    assert LoadTensor(model=model, tensor="missing", optional=True).execute() is None
    cache.flush_all()
    assert not (Path(model.lora.path) / "model.safetensors").exists()


def test_experts_that_are_fused_on_loading(tmp_path: Path, cache: LoaderCache) -> None:
    """An adapter of single experts meets a checkpoint of single experts; mergekit fuses the sums as it does weights."""
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    base, folder = save_base(tmp_path / "base", config, torch.float32), tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for expert in range(3):
        for name, (outputs, inputs) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}.lora_"
            tensors |= {f"{key}A.weight": torch.randn(2, inputs), f"{key}B.weight": torch.randn(outputs, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    model, plain = ModelReference.parse(f"{base}+{folder}"), ModelReference.parse(str(base))
    cache.setup(MergeOptions())
    cache.loaders[model] = opened(model)
    for name, expected in merged_by_peft(model).items():
        tensor = LoadTensor(model=model, tensor=name).execute()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(tensor, LoadTensor(model=plain, tensor=name).execute()) != (".experts." in name)
