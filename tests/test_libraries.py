"""What the package uses of other libraries without their promise: each name is there, and behaves as it has to."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from peft import LoraConfig
from transformers import AutoConfig, LlamaConfig

from mergekit_slta.libraries import mergekit, mergekit_files, peft, transformers
from mergekit_slta.libraries.mergekit_plan import Definition, described, plan_tensors
from mergekit_slta.libraries.torch import is_out_of_memory, replaced_forwards

PACKAGE = Path(__file__).resolve().parent.parent / "mergekit_slta"
USED = [
    pytest.param(library, name, use, id=name.partition("(")[0])
    for library, module in (
        ("mergekit", mergekit),
        ("mergekit", mergekit_files),
        ("transformers", transformers),
        ("peft", peft),
    )
    for name, use in module.USED.items()
]
DOCUMENTED = {
    "mergekit.common.ModelPath",
    "mergekit.common.ModelReference",
    "mergekit.config.MergeConfiguration",
    "mergekit.merge",
    "mergekit.merge.run_merge",
    "mergekit.options.MergeOptions",
}
"""What every folder may import from mergekit, beside `mergekit.merge_methods`."""


def find(path: str) -> Any:
    """The object of a dotted name; the annotation of a field that has no default.

    Raises:
        AttributeError: there is none.
    """
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for length, part in enumerate(parts[1:], start=2):
        fields = getattr(found, "__annotations__", {})
        if inspect.ismodule(found) and not hasattr(found, part):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError as error:
                raise AttributeError(str(error)) from error
            continue
        found = getattr(found, part) if hasattr(found, part) or part not in fields else fields[part]
    return found


@pytest.mark.parametrize(("library", "name", "use"), USED)
def test_names_are_there(library, name, use):
    """Each name exists, and a function takes the parameters that it is given."""
    path, _, parameters = name.partition("(")
    installed = f"{library} {version(library)}"
    try:
        found = find(path)
    except AttributeError as error:
        pytest.fail(f"{path} is gone from {installed} ({error}); it is used for: {use}")
    if parameters:
        lacking = set(parameters.removesuffix(")").split(", ")) - set(inspect.signature(found).parameters)
        assert not lacking, f"{path} of {installed} no longer takes {sorted(lacking)}; it is used for: {use}"


def test_a_name_that_is_gone_is_reported_with_the_version():
    with pytest.raises(pytest.fail.Exception, match=f"no_such_name is gone from peft {version('peft')}"):
        test_names_are_there("peft", "peft.utils.other.no_such_name", "nothing")
    with pytest.raises(pytest.fail.Exception, match="no_such_module.name is gone from mergekit"):
        test_names_are_there("mergekit", "mergekit.no_such_module.name", "nothing")
    with pytest.raises(AssertionError, match=r"no longer takes \['no_such_parameter'\]"):
        test_names_are_there("peft", "peft.utils.other.get_pattern_key(no_such_parameter)", "nothing")


def imports_of(path: Path) -> set[str]:
    """Names that a file imports, wherever it does: `a.b.c` for `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_other_folders_import_documented_names_only():
    """The undocumented names of mergekit, and private ones of all libraries, are imported in `libraries` alone."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "libraries":
            continue
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "mergekit" and parts[:2] != ["mergekit", "merge_methods"] and len(parts) > 1:
                assert name in DOCUMENTED, path
            if parts[0] in ("mergekit", "transformers", "peft", "torch", "accelerate", "datasets"):
                assert not any(part.startswith("_") for part in parts), path


@pytest.mark.process
def test_importing_a_file_loads_no_other_library():
    """Nor its own, where only functions need it."""
    code = (
        "import sys\n"
        "def loaded(): return sorted({'mergekit', 'transformers', 'peft', 'torch'} & set(sys.modules))\n"
        "import mergekit_slta.libraries.transformers, mergekit_slta.libraries.peft\n"
        "print(loaded())\n"
        "import mergekit_slta.libraries.torch\n"
        "print(loaded())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[]", "['torch']"], result.stderr


# --- mergekit -------------------------------------------------------------------------------------------------------


DEFINITION = Definition((), ((described("model.layers.0.mlp.up_proj.weight"),),), (), "vocab_size")


@pytest.fixture
def planned(tiny, options):
    """A recipe's models and planned tensors."""
    config = MergeConfiguration.model_validate(tiny.recipe(2))
    models = [config.base_model, *(entry.model for entry in config.models)]
    configs = {model: model.config() for model in models}
    mergekit.forget_loaders(models)
    yield (
        models,
        {
            weight.name: (weight, task)
            for weight, task in plan_tensors(config.model_copy(deep=True), options, models[0], configs, DEFINITION)
        },
    )
    mergekit.forget_loaders(models)


def test_planning_writes_nothing_and_reads_no_config_again(tiny, options, tmp_path, monkeypatch):
    """Each read of a config is a request where the model is on the Hub."""
    config = MergeConfiguration.model_validate(tiny.recipe(2))
    configs = {model: model.config() for model in (config.base_model, *(entry.model for entry in config.models))}
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("a config is read again"))
        plan_tensors(config, options, config.base_model, configs, DEFINITION)
    assert config.base_model.config() is not configs[config.base_model]
    assert not list(tmp_path.iterdir())


def test_tasks_read_what_the_checkpoints_hold(planned, options):
    """From all models or some, with the planner's own task."""
    models, tensors = planned
    name = "model.layers.0.mlp.up_proj.weight"
    weight, task = tensors[name]
    assert mergekit.is_gather(task)
    assert set(mergekit.models_of(task)) == set(models)
    assert mergekit.names_of(weight)[0] == name
    for model in models:
        stored = model.lazy_loader().get_tensor(name)
        own = mergekit.run_task(mergekit.gather_from(task, [model]), pytest.fail)
        assert list(own) == [model]
        assert torch.equal(own[model], stored)
    assert set(mergekit.run_task(task, pytest.fail)) == set(models)


def test_a_placed_loader_serves_every_thread(options):
    model, loader = ModelReference.parse("none/such"), object()
    mergekit.place_loader(model, loader, options)
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(LoaderCache().get(model)))
        thread.start()
        thread.join()
        assert found == [loader]
    finally:
        mergekit.forget_loaders([model])
    assert model not in LoaderCache().loaders


def test_chat_templates_have_names():
    assert {"alpaca", "chatml"} <= set(mergekit.chat_template_names())


def test_dtypes_by_name():
    assert mergekit.dtype_named("bfloat16") is torch.bfloat16
    assert mergekit.dtype_named(None) is None


# --- transformers, peft, torch --------------------------------------------------------------------------------------


def test_built_in_classes():
    class Other(LlamaConfig):
        pass

    assert transformers.is_built_in(LlamaConfig())
    assert not transformers.is_built_in(Other())


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.q_proj", "layers.1.q_proj"}),
        ({"target_modules": r".*\.v_proj"}, {"layers.1.v_proj"}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]}, {"layers.1.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]}, {"layers.0.q_proj"}),
    ],
)
def test_targets_of_an_adapter(settings, targets):
    config = LoraConfig(**settings).to_dict()
    modules = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.v_proj")
    assert {name for name in modules if peft.is_target(config, name)} == {f"model.{name}" for name in targets}


def test_patterns_of_an_adapter():
    assert peft.pattern_key(["k_proj", "q_proj"], "layers.0.q_proj") == "q_proj"
    assert peft.pattern_key(["k_proj"], "layers.0.q_proj") == "layers.0.q_proj"


def test_adapters_that_change_no_weights():
    assert all(peft.changes_weights(kind) for kind in ("LORA", "IA3", "LOHA", "OFT", "new", None))
    kinds = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
    assert not any(peft.changes_weights(kind) for kind in kinds)


def test_forwards_are_replaced_for_a_while():
    """In a plain call and in a functional one; whatever is raised inside, the class's method is back afterwards."""
    module = torch.nn.Linear(2, 2, bias=False)
    row = torch.ones(1, 2)
    expected = module(row)
    with pytest.raises(ValueError, match="stop"), replaced_forwards({module: lambda x: x + 1}):
        assert torch.equal(module(row), row + 1)
        assert torch.equal(torch.func.functional_call(module, {"weight": torch.eye(2)}, (row,)), row + 1)
        raise ValueError("stop")
    assert torch.equal(module(row), expected)
    assert "forward" not in vars(module)


def test_memory_that_the_allocator_does_not_find():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value), f"torch {torch.__version__} words it otherwise: {caught.value}"
    assert not is_out_of_memory(RuntimeError("another"))
