"""Checks that no sound world reaches, one by one: what a race, a foreign file or a new version would meet."""

from __future__ import annotations

import errno
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, slta
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_slta import Alphas
from mergekit_slta.analysis.analyse import _submodules
from mergekit_slta.calibration.resolve import read_layout, solve_again
from mergekit_slta.checkpoints.headers import read_headers
from mergekit_slta.checkpoints.lora_adapter import check_shapes
from mergekit_slta.checkpoints.plan import make_plan
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.cli import mergekit_commands as commands
from mergekit_slta.data.loading import load_rows
from mergekit_slta.demo.run import merge_by_command, prepare_folder
from mergekit_slta.errors import (
    AlphasError,
    DataError,
    ModelError,
    OutputError,
    RecipeError,
    RegistrationError,
    RunError,
)
from mergekit_slta.files.output_folder import _replace
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.host import merge as host_module
from mergekit_slta.host import method
from mergekit_slta.job.preflight import _check_chat_template, prepare
from mergekit_slta.libraries.mergekit import run_task
from mergekit_slta.models.skeleton import Skeleton, _find_layers
from mergekit_slta.models.submodules import partition
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.reporting.report import _write_section, add_section
from mergekit_slta.runtime.distributed import joined
from mergekit_slta.runtime.resume import ResumeStore


def read(recipe: dict):
    return read_recipe(MergeConfiguration.model_validate(recipe))


@pytest.fixture
def job(tiny, options):
    return prepare(read(tiny.recipe()), options, for_merge=False)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_token_beyond_a_table(job):
    checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer)
    table = job.skeleton.embedding_weight
    rows = checkpoints.raw(table)[0].shape[0]
    assert checkpoints.table_rows(table, torch.tensor([0, rows - 1]))[0].shape[0] == 2
    with pytest.raises(ModelError, match=f"token {rows} of the calibration rows is beyond the {rows} rows"):
        checkpoints.table_rows(table, torch.tensor([0, rows]))


def test_a_tensor_that_one_model_lacks(job, monkeypatch):
    checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer)
    table = job.skeleton.embedding_weight
    last = job.plan.models[-1]

    def without_the_last(task, build):
        return {model: tensor for model, tensor in run_task(task, build).items() if model != last}

    monkeypatch.setattr("mergekit_slta.checkpoints.tensors.run_task", without_the_last)
    assert len(checkpoints.raw(table, [0])) == 1
    with pytest.raises(ModelError, match=f"lacks the tensor {table}"):
        checkpoints.raw(table)


def broken_copy(tiny, folder, change) -> LazyTensorLoader:
    """A checkpoint in shards whose first was changed behind the index."""
    shutil.copytree(tiny.experts[0], folder)
    shard = min(folder.glob("model*.safetensors"))
    loader = LazyTensorLoader.from_disk(str(folder))
    change(shard)
    return loader


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def promise_too_much(path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def drop_a_tensor(path) -> None:
    content = load_file(path)
    content.pop(sorted(content)[0])
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "shorter than its header says"),
        (promise_too_much, "header is longer than the file"),
        (drop_a_tensor, "which its index promises"),
    ],
)
def test_headers_of_broken_shards(tiny, tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read_headers(broken_copy(tiny, tmp_path / "broken", change), "x")


def test_an_adapter_on_a_broken_base(tiny, tmp_path):
    loader = broken_copy(tiny, tmp_path / "broken", promise_too_much)
    names = dict.fromkeys(loader.index.tensor_paths)
    with pytest.raises(ModelError, match="is missing or corrupt .*fetch it again"):
        check_shapes(loader, names)


def test_what_mergekit_cannot_plan(tiny, options, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr("mergekit.plan.MergePlanner", fail)
    with pytest.raises(ModelError, match=r"mergekit cannot plan this merge: no such thing"):
        make_plan(read(tiny.recipe()), options)


def test_a_base_without_a_tokenizer(tiny, options, tmp_path):
    shutil.copytree(tiny.base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    recipe = tiny.recipe()
    recipe["base_model"] = str(tmp_path / "base")
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        prepare(read(recipe), options, for_merge=False)


# --- models ---------------------------------------------------------------------------------------------------------


def test_tensors_without_a_place(job):
    names, anatomy = list(job.plan.tensors), job.skeleton.anatomy
    prefix = anatomy.layers_path
    strange = {
        "layer": f"{prefix}.{anatomy.num_layers}.mlp.up_proj.weight",
        "attn_mlp": f"{prefix}.0.memory.weight",
        "head_mlp": f"{prefix}.0.memory.weight",
        "linear": f"{prefix}.0.memory.weight",
    }
    for granularity, name in strange.items():
        partition(names, anatomy, granularity, tied=True)
        with pytest.raises(ModelError, match=f"tensor {name} belongs to no submodule that is known here"):
            partition([*names, name], anatomy, granularity, tied=True)


def test_a_model_without_layers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model._no_split_modules = ["Block"]
    with pytest.raises(ModelError, match=r"no decoder layers .*Block.* found in x"):
        _find_layers(model, "x")


def test_blocks_that_do_not_add_up(monkeypatch):
    """A layer whose output is scaled is neither wiring."""
    skeleton = Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
               for name, shape in skeleton.shapes.items()}  # fmt: skip
    ids = torch.tensor([[1, 2, 3]])
    hidden = skeleton.embed(ids, weights)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{skeleton.layers_path}.0.")}
    assert not skeleton.has_parallel_blocks(0, hidden, own)
    layer = type(skeleton).layer

    def scaled(self, index, hidden, weights):
        silent = self.layers[index].get_submodule(self.arch.mlp).forward.__name__ == "_zeros"
        return layer(self, index, hidden, weights) * (1 if silent else 3)

    monkeypatch.setattr(type(skeleton), "layer", scaled)
    with pytest.raises(ModelError, match="do not add up to the layer: use `granularity: layer`"):
        skeleton.has_parallel_blocks(0, hidden, own)


def test_heads_that_cannot_be_told_apart(job, monkeypatch, caplog):
    """The analysis leaves them out; at other levels the refusal stands."""
    import mergekit_slta.analysis.analyse as analysis_module

    def refuse(names, anatomy, level, tied):
        if level != "attn_mlp":
            raise ModelError("no heads here")
        return partition(names, anatomy, level, tied=tied)

    monkeypatch.setattr(analysis_module, "split", refuse)
    with caplog.at_level("WARNING"):
        found = _submodules(job, "head_mlp")
    assert not any(submodule.kind == "head_group" for submodule in found)
    assert "attention heads cannot be told apart" in caplog.text
    with pytest.raises(ModelError, match="no heads here"):
        _submodules(job, "layer")


def test_buffers_that_differ():
    """Copied tensors are the base's, and are no experts' to change."""
    alphas = Alphas(granularity="layer", base_model="b", models=("x",), submodules=(), copied=("m.buffer",),
                    calibration={}, provenance={})  # fmt: skip
    entries = [SimpleNamespace(tensor=torch.tensor(values)) for values in ([1.0, 2.0], [1.0, 3.0])]

    def group(*members):
        return SimpleNamespace(metadata=SimpleNamespace(name="m.buffer"), entries=members)

    method._ACTIVE["here"] = SimpleNamespace(alphas=alphas)
    try:
        assert torch.equal(method._merge_group(group(entries[0], entries[0]), "here", 1.0), entries[0].tensor)
        with pytest.raises(ModelError, match=r"the buffer m\.buffer differs between the models"):
            method._merge_group(group(*entries), "here", 1.0)
    finally:
        del method._ACTIVE["here"]


def test_configs_that_differ_are_warned_of(tiny, options, tmp_path, caplog):
    """The merged model runs with the base's settings, whatever an expert was trained with."""
    shutil.copytree(tiny.experts[0], tmp_path / "expert")
    path = tmp_path / "expert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.125}))
    recipe = tiny.recipe()
    recipe["models"][0]["model"] = str(tmp_path / "expert")
    with caplog.at_level("WARNING"):
        prepare(read(recipe), options, for_merge=False)
    assert "has other rms_norm_eps; the base's is used" in caplog.text


def test_narrow_precision_is_warned_of(tiny, options, caplog):
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe()), options, for_merge=False)
    assert "cancel badly" not in caplog.text
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe(compute_dtype="bfloat16")), options, for_merge=False)
    assert "compute_dtype bfloat16: differences of outputs cancel badly" in caplog.text


def test_what_only_a_merge_would_refuse_is_warned_of(tiny, options, monkeypatch, caplog):
    import mergekit_slta.job.preflight as preflight_module

    monkeypatch.setattr(preflight_module, "reconcile", lambda *_: ["mergekit drops a tensor"])
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe()), options, for_merge=False)
    assert "the alphas can be computed, but not merged: mergekit drops a tensor" in caplog.text
    with pytest.raises(ModelError, match="mergekit drops a tensor"):
        prepare(read(tiny.recipe()), options)


# --- files and folders ----------------------------------------------------------------------------------------------


def test_solving_over_another_file(tiny, tmp_path, write_recipe):
    recipe = write_recipe(tiny.recipe())
    assert slta("calibrate", recipe, "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
    before = recipe.read_bytes()
    result = slta("solve", tmp_path / "slta_stats.safetensors", "-o", recipe)
    assert result.exit_code == 2
    assert "cannot read the alphas file" in result.output
    assert recipe.read_bytes() == before


def test_damaged_statistics_of_unfinished_work_are_gathered_anew(job, tmp_path, caplog):
    (tmp_path / "slta_stats.safetensors").write_bytes(b"{" * 100)
    with caplog.at_level("WARNING"):
        assert host_module._statistics_at(job, tmp_path / "slta_alphas.json") is None
    assert "they are gathered anew" in caplog.text


def test_folders_where_files_belong(tmp_path):
    (tmp_path / "new").write_text("x")
    (tmp_path / "old").mkdir()
    with pytest.raises(OutputError, match="is a folder where the merge has a file"):
        _replace(tmp_path / "new", tmp_path / "old")
    (tmp_path / "README.md").mkdir()
    with pytest.raises(OutputError, match="is no plain file"):
        _write_section(tmp_path)


def test_a_card_that_cannot_be_written_costs_no_merge(tmp_path, caplog):
    (tmp_path / "README.md").mkdir()
    with caplog.at_level("WARNING"):
        add_section(tmp_path)
    assert "the model card lacks its section on the merge" in caplog.text


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    from mergekit_slta.files.targets import check_writable

    check_writable(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot write to"):
        check_writable(tmp_path / "out")


def test_a_lock_that_its_holder_has_just_removed(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def late(handle, operation):
        flock(handle, operation)
        (tmp_path / "work.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another process"), ResumeStore(tmp_path / "work", "a") as records:
        records.open()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING"), ResumeStore(tmp_path / "work", "a") as records:
        records.open()
    assert "cannot be locked" in caplog.text


def test_an_empty_dataset(tmp_path):
    """A file whose rows are all blank."""
    (tmp_path / "rows.txt").write_text("\n\n \n")
    with pytest.raises(DataError, match="has no rows: choose another"):
        load_rows(str(tmp_path / "rows.txt"), None, "train")


def test_layouts_for_other_matrices(tiny, tmp_path, write_recipe):
    assert slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
    statistics = Statistics.load(tmp_path / "slta_stats.safetensors")
    assert read_layout(statistics)
    other = Statistics(statistics.row_task, statistics.num_models + 1, {}, metadata=statistics.metadata)
    with pytest.raises(AlphasError, match="the matrices are for"):
        read_layout(other)


def test_matrices_without_a_solution(tiny, tmp_path, write_recipe, monkeypatch):
    import mergekit_slta.calibration.resolve as resolve_module

    assert slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(resolve_module, "assemble", fail)
    with pytest.raises(AlphasError, match=r"cannot be solved \(did not converge\): calibrate again"):
        solve_again(Statistics.load(tmp_path / "slta_stats.safetensors"))


# --- commands -------------------------------------------------------------------------------------------------------


def test_a_mistake_of_ours_is_one_line(tiny, write_recipe, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(commands, "prepare", fail, raising=False)
    monkeypatch.setattr("mergekit_slta.job.preflight.prepare", fail)
    result = slta("check", write_recipe(tiny.recipe()))
    assert result.exit_code == 1
    assert "ZeroDivisionError: division by zero; -v shows where" in result.output
    assert "Traceback" not in result.output


def test_clicks_own_errors_pass_a_merge(tiny, options, tmp_path):
    """Usage errors and exits inside a merge are mergekit's to report."""
    import click

    def fail(*_, **__):
        raise click.UsageError("no such option")

    config = MergeConfiguration.model_validate(tiny.recipe())
    with pytest.raises(click.UsageError, match="no such option"):
        host_module.run(fail, config, str(tmp_path / "out"), options, None)


@pytest.mark.parametrize(("key", "on"), [("ridge", "shared"), ("lambda", "shared"), ("importance", "model")])
def test_truth_values_are_no_numbers(tiny, key, on):
    recipe = tiny.recipe()
    (recipe["parameters"] if on == "shared" else recipe["models"][0]["parameters"])[key] = True
    with pytest.raises(RecipeError, match=f"`{key}`.*must be a number|{key}.*number"):
        read(recipe)


@pytest.mark.parametrize("template", ["no-such-template", "short {"])
def test_chat_templates(template):
    _check_chat_template("auto")
    _check_chat_template("chatml")
    _check_chat_template("{% for message in messages %}{{ message }}{% endfor %}")
    with pytest.raises(RecipeError, match="`chat_template` is"):
        _check_chat_template(template)


def test_demo_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        prepare_folder(tmp_path / "file")


def test_a_demo_whose_merge_fails(tmp_path):
    (tmp_path / "recipe.yml").write_text("merge_method: no_such_method\n")
    with pytest.raises(RunError, match=r"mergekit-yaml ended with exit code \d+: .+"):
        merge_by_command(tmp_path, lambda _: None)


def test_processes_that_cannot_join(monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(RunError, match="the processes cannot be joined"), joined():
        pass


def test_without_mergekit(monkeypatch):
    def gone(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(method, "version", gone)
    with pytest.raises(RegistrationError, match="mergekit is not installed: pip install"):
        method._check_mergekit()


# --- alphas files ---------------------------------------------------------------------------------------------------


def document(**changes) -> str:
    content = {"format": "mergekit-slta/alphas", "version": 1, "granularity": "layer", "base_model": "b",
               "models": ["x"], "submodules": [], "calibration": {}, "provenance": {}}  # fmt: skip
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models are missing or listed twice"),
        ({"models": ["x", "x"]}, "models are missing or listed twice"),
        ({"version": 2}, "is an alphas file of version 2"),
        ({"version": "1"}, "is an alphas file of version 1"),
    ],
)
def test_alphas_files_say_what_is_wrong(tmp_path, changes, message):
    path = tmp_path / "slta_alphas.json"
    path.write_text(document())
    Alphas.load(path)
    path.write_text(document(**changes))
    with pytest.raises(AlphasError, match=message):
        Alphas.load(path)


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": "2"}])
def test_statistics_of_another_version(tmp_path, changes):
    sound = Statistics(torch.zeros(1, dtype=torch.int64), 1, {"m": torch.ones(1, 1, 1, dtype=torch.float64)})
    path = tmp_path / "slta_stats.safetensors"
    sound.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata={**header, **changes})
    with pytest.raises(AlphasError, match="is not a statistics file of version 1; calibrate again"):
        Statistics.load(path)
