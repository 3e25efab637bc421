"""The merge method: explicit arithmetic, borrowed inputs, worker threads, registration."""

from __future__ import annotations

import threading
import types
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from conftest import refused
from mergekit import merge_methods
from mergekit.merge_methods import TensorGroup

from mergekit_slta.errors import AlphasError, ModelError, RegistrationError
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.host import method as module
from mergekit_slta.host.method import ActiveMerge, active, register
from mergekit_slta.host.wrap import wrap_run_merge
from mergekit_slta.maths.task_arithmetic import WeightedSlice, merge_tensor
from mergekit_slta.recipe.objectives import all_shared_keys
from mergekit_slta.recipe.settings import TASK_KEYS

ALPHA = (0.25, -0.5, 1.25)


def make_alphas(models: tuple[str, ...] = ("a", "b", "c")) -> Alphas:
    entry = SubmoduleAlphas(
        name="model.layers.0.mlp", kind="mlp", layer=0, tensors=("w",), alpha=ALPHA[: len(models)], stderr=None,
        condition=1.0, rank=2, residual=0.1,
    )  # fmt: skip
    return Alphas(
        granularity="attn_mlp", base_model="base", models=models, submodules=(entry,), calibration={}, provenance={}
    )


def tensors(dtype: torch.dtype, shape=(300, 70), count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(300, 70), (7,), (), (0, 3), (2, 3, 5)])
def test_combine_is_explicit_arithmetic(dtype, shape):
    """theta_0 + lambda sum alpha_t (theta_t - theta_0), to the rounding of the dtype, for any shape."""
    base, *experts = tensors(dtype, shape)
    found = merge_tensor(base, experts, (WeightedSlice(None, 0, 0, ALPHA),), 0.7, dtype)
    expected = base.double() + 0.7 * sum(
        weight * (expert.double() - base.double()) for weight, expert in zip(ALPHA, experts, strict=True)
    )
    assert found.dtype == dtype
    assert found.shape == base.shape
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_combine_covers_slices_and_strides():
    """Slices of an axis get their own alphas, and transposed inputs are as good as contiguous ones."""
    base, one, two = (tensor.T for tensor in tensors(torch.float32, (6, 4), 3))
    pieces = (WeightedSlice(1, 0, 2, (1.0, 0.0)), WeightedSlice(1, 2, 6, (0.0, 0.5)))
    found = merge_tensor(base, [one, two], pieces, 1.0, torch.float32)
    torch.testing.assert_close(found[:, :2], one[:, :2])
    torch.testing.assert_close(found[:, 2:], base[:, 2:] + 0.5 * (two - base)[:, 2:])


def test_equal_experts_give_the_base_to_the_bit():
    """Where nothing differs, nothing is rounded away."""
    base = tensors(torch.bfloat16)[0]
    assert torch.equal(
        merge_tensor(base, [base, base], (WeightedSlice(None, 0, 0, (0.3, 0.9)),), 1.0, torch.bfloat16), base
    )


def test_inputs_are_not_written():
    """The tensors are borrowed: the same bytes after as before."""
    group = tensors(torch.float32)
    copies = [tensor.clone() for tensor in group]
    merge_tensor(group[0], group[1:], (WeightedSlice(None, 0, 0, ALPHA),), 1.0, torch.float32)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(group, copies, strict=True))


def test_group_is_matched_by_id_not_by_place():
    """The base may come last and the experts in any order: entries are matched by their ids."""
    base, one, two, three = tensors(torch.float32)
    group = TensorGroup.from_tensors([three, one, two, base], ids=["c", "a", "b", "base"], base_index=3, name="w")
    expected = merge_tensor(base, [one, two, three], (WeightedSlice(None, 0, 0, ALPHA),), 1.0, torch.float32)
    merge = ActiveMerge(make_alphas(), {"a": 0, "b": 1, "c": 2}, keep_precision=False)
    with active("file", merge):
        (found,) = merge_methods.get("submodule_linear")([group], parameters={"alphas": "file"})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_alphas_file_serves_callers_that_bypass_run_merge(tmp_path):
    """mergekit's in-memory API works with an existing alphas file named in the parameters."""
    path = tmp_path / "slta_alphas.json"
    make_alphas().save(path)
    base, *experts = tensors(torch.bfloat16)
    group = TensorGroup.from_tensors([base, *experts], ids=["base", "a", "b", "c"], base_index=0, name="w")
    (found,) = merge_methods.get("submodule_linear")([group], parameters={"alphas": str(path)})
    expected = merge_tensor(base, experts, (WeightedSlice(None, 0, 0, ALPHA),), 1.0, torch.bfloat16)
    assert torch.equal(found, expected)


def test_a_rewritten_alphas_file_is_read_again(tmp_path):
    """The weights are those that the file holds now, not those of an earlier call."""
    path = tmp_path / "slta_alphas.json"
    base, *experts = tensors(torch.float32)
    group = TensorGroup.from_tensors([base, *experts], ids=["base", "a", "b", "c"], base_index=0, name="w")
    for alpha in (ALPHA, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)):
        alphas = make_alphas()
        entry = alphas.submodules[0].model_copy(update={"alpha": alpha})
        alphas.model_copy(update={"submodules": (entry,)}).save(path)
        (found,) = merge_methods.get("submodule_linear")([group], parameters={"alphas": str(path)})
        assert torch.equal(found, merge_tensor(base, experts, (WeightedSlice(None, 0, 0, alpha),), 1.0, torch.float32))


def test_the_methods_parameters_are_the_recipes_keys():
    """mergekit is told of every key that a recipe may have."""
    spec = merge_methods.get("submodule_linear").spec
    assert {parameter.name for parameter in spec.parameters} == {*all_shared_keys(), *TASK_KEYS}


def test_lookup_works_from_worker_threads():
    """No thread-local state: groups merged in four threads equal those merged in the main one, under another default
    device too."""
    base, *experts = tensors(torch.bfloat16)
    group = TensorGroup.from_tensors([base, *experts], ids=["base", "a", "b", "c"], base_index=0, name="w")
    merge = ActiveMerge(make_alphas(), {"a": 0, "b": 1, "c": 2}, keep_precision=True)
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.device("meta"):  # as mergekit's GPU workers do with their device
            results.extend(merge_methods.get("submodule_linear")([group], parameters={"alphas": "file"}))

    with active("file", merge):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = merge_tensor(base, experts, (WeightedSlice(None, 0, 0, ALPHA),), 1.0, torch.float32)
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_combine_needs_no_second_buffer_of_the_tensors_size():
    """Beside the result only chunks are allocated."""
    base, *experts = tensors(torch.bfloat16, (4096, 1024))
    peak = current = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak, current
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                peak = max(peak, result.untyped_storage().nbytes())
                current += result.numel() >= base.numel()
            return result

    with Watch():
        merge_tensor(base, experts, (WeightedSlice(None, 0, 0, ALPHA),), 1.0, torch.bfloat16)
    assert current == 1  # the result itself
    assert peak == base.numel() * 2


def test_missing_inputs_are_refused(tmp_path):
    """A tensor that one expert lacks, an unknown model and an uncovered tensor are errors, never a silent default."""
    base, one, two, _ = tensors(torch.float32)
    merge = ActiveMerge(make_alphas(), {"a": 0, "b": 1, "c": 2}, keep_precision=False)
    call = merge_methods.get("submodule_linear")
    with active("file", merge):
        group = TensorGroup.from_tensors([base, one, two], ids=["base", "a", "b"], base_index=0, name="w")
        with refused(ModelError, "missing-tensor", "tensor w ", "in c:"):
            call([group], parameters={"alphas": "file"})
        group = TensorGroup.from_tensors([base, one], ids=["base", "z"], base_index=0, name="w")
        with refused(AlphasError, "unknown-model", "model z;"):
            call([group], parameters={"alphas": "file"})
        group = TensorGroup.from_tensors([base, one], ids=["base", "a"], base_index=0, name="v")
        with refused(AlphasError, "uncovered-tensor", "tensor v:"):
            call([group], parameters={"alphas": "file"})
    with refused(AlphasError, "missing-alphas"):
        call([group], parameters={})
    with refused(AlphasError, "missing-file", tmp_path / "none.json"):
        call([group], parameters={"alphas": str(tmp_path / "none.json")})


def test_register_is_idempotent():
    """Registering twice leaves one method."""
    register()
    register()
    assert [known.spec.name for known in merge_methods.registered_methods()].count("submodule_linear") == 1


def test_old_mergekit_is_named(monkeypatch):
    """With a mergekit before 0.1.5 the error names both versions and the remedy."""
    monkeypatch.setattr(module, "version", lambda _: "0.0.6")
    monkeypatch.setattr(module, "method", module.method.__wrapped__)  # not the instance that is registered already
    with refused(RegistrationError, "old-mergekit", "0.1.5", "0.0.6"):
        register()


def test_taken_name_is_named(monkeypatch):
    """Where another package has the name, the error says whose it is."""
    from mergekit.merge_methods import registry

    other = types.SimpleNamespace(spec=types.SimpleNamespace(name="submodule_linear"))
    monkeypatch.setitem(registry._METHODS, "submodule_linear", other)
    with refused(RegistrationError, "name-taken", version("mergekit")):
        register()


def test_run_merge_is_wrapped_once_and_passes_others_through():
    """The wrapper calls mergekit's own function for other methods, with the arguments as they came."""
    calls = []

    def run_merge(merge_config, out_path, options, config_source=None):
        calls.append((merge_config, out_path, options, config_source))

    fake = types.ModuleType("mergekit.fake")
    fake.run_merge = run_merge
    wrap_run_merge(fake)
    wrapped = fake.run_merge
    wrap_run_merge(fake)
    assert fake.run_merge is wrapped
    config = types.SimpleNamespace(merge_method="linear")
    fake.run_merge(config, "out", options="options", config_source="text")
    assert calls == [(config, "out", "options", "text")]


def test_tensors_that_text_does_not_reach():
    """Equal ones are copied; for others the recipe says what becomes of them."""
    changes = {"copied": ("m.vision",), "directions": (Direction(model="d"),)}
    alphas = make_alphas(("a", "b", "d")).model_copy(update=changes)
    values = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0]), torch.tensor([9.0, 9.0])]
    call = merge_methods.get("submodule_linear")

    def merged(rule, *tensors):
        ids = ["base", "a", "b", "d"]
        group = TensorGroup.from_tensors(list(tensors), ids=ids, base_index=0, name="m.vision")
        with active("file", ActiveMerge(alphas, {"a": 0, "b": 1, "d": 2}, keep_precision=False, uncalibrated=rule)):
            return call([group], parameters={"alphas": "file"})[0].tolist()

    assert merged("error", *values[:1] * 4) == [1, 2]
    assert merged("base", *values) == [1, 2]
    assert merged("average", *values) == [2, 3]
    with refused(ModelError, "uncalibrated-tensors", "m.vision"):
        merged("error", *values)


def test_without_mergekit(monkeypatch):
    """Where mergekit is not installed the error says how to get it."""

    def gone(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", gone)
    monkeypatch.setattr(module, "method", module.method.__wrapped__)  # not the instance that is registered already
    with refused(RegistrationError, "missing-mergekit"):
        register()
