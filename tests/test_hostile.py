"""Files from strangers: recipes, alphas, statistics and adapters that mean harm, or are broken as if they did."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_refused, check_message, fork, mergekit_yaml, refused, slta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.scripts import run_yaml
from safetensors.torch import save_file

from mergekit_slta.calibration.resolve import solve_again
from mergekit_slta.errors import AlphasError, SltaError
from mergekit_slta.files import alphas_file as alphas_module
from mergekit_slta.files import statistics_file as statistics_module
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.gauss_newton import gauss_newton_steps
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.read import read_recipe


def bomb() -> str:
    """Ten aliases of ten aliases, ten levels deep."""
    lines = ["a0: &a0 [" + ", ".join(["1"] * 10) + "]"]
    lines += [f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]" for level in range(1, 10)]
    return "\n".join(lines) + "\nmerge_method: submodule_linear\nbase_model: b\nmodels: [{model: x}]\n"


RECIPES = {
    "python object": (b"merge_method: !!python/object/apply:os.system ['touch owned']\n", "not-yaml", []),
    "python name": (b"merge_method: !!python/name:os.system\n", "not-yaml", []),
    "deep list": (b"models: " + b"[" * 5000 + b"]" * 5000, "not-a-recipe", ["recursion"]),
    "deep mapping": (b"a: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "not-a-recipe", ["recursion"]),
    "alias bomb in a value": (bomb().encode() + b"parameters: {granularity: *a9}\n", "unknown-key", ["`a0`"]),
    "alias bomb in a model": (bomb().encode() + b"parameters: {text: *a9}\n", "unknown-key", ["`a0`"]),
    "itself": (b"&a {merge_method: submodule_linear, base_model: b, models: *a}\n", "not-a-recipe", []),
    "no text": (bytes(range(128, 256)), "unreadable-recipe", []),
    "zeros": (b"\0" * 4096, "not-yaml", []),
    "escapes": (b"merge_method: submodule_linear\nbase_model: b\nmodels: [{model: x}]\n"
                b'parameters: {"\\e[2J\\e]0;owned\\a": 1}\n', "unknown-key", ["[2J]0;owned"]),
    "text that turns around": (b'merge_method: submodule_linear\nbase_model: b\nmodels: [{model: "\\u202e"}, '
                               b'{model: "\\u202e"}]\n', "duplicate-model", []),
    "half a character": (b"merge_method: submodule_linear\nbase_model: b\nmodels: [{model: x}]\n"
                         b'parameters: {"\\ud800": 1}\n', "unknown-key", []),
    "a number": (b"42", "not-a-recipe", ["not a mapping"]),
    "two documents": (b"a: 1\n---\nb: 2\n", "not-a-recipe", ["2 documents"]),
    "an unhashable key": (b"{[a]: 1}", "not-yaml", []),
    "infinity": (b"merge_method: submodule_linear\nbase_model: b\nmodels: [{model: x}]\nparameters: {ridge: .inf}\n",
                 "invalid-value", ["`ridge`"]),
    "a huge number": (b"merge_method: submodule_linear\nbase_model: b\nmodels: [{model: x}]\n"
                      b"parameters: {num_samples: 1e999}\n", "invalid-value", ["`num_samples`"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(tmp_path, monkeypatch, case):
    content, code, values = RECIPES[case]
    (tmp_path / "recipe.yml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert len(assert_refused(slta("check", "recipe.yml"), code, *values)) < 2100
    assert os.listdir(tmp_path) == ["recipe.yml"]


def sound_alphas() -> dict:
    return {
        "format": "mergekit-slta/alphas", "version": 1, "granularity": "layer", "base_model": "b", "models": ["x"],
        "submodules": [{"name": "m", "kind": "layer", "layer": 0, "tensors": ["t"], "slices": {}, "alpha": [1.0],
                        "stderr": None, "condition": 1.0, "rank": 1, "residual": 0.0, "flags": [], "unchanged": []}],
        "copied": [], "calibration": {}, "provenance": {},
    }  # fmt: skip


def changed(**top) -> bytes:
    return json.dumps({**sound_alphas(), **top}).encode()


def entry(**own) -> bytes:
    content = sound_alphas()
    content["submodules"][0].update(own)
    return json.dumps(content).encode()


HARMLESS = None
ALPHAS = {
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "unreadable-file"),
    "deep object": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "unreadable-file"),
    "deep calibration": (
        changed().replace(b'"calibration": {}', b'"calibration": ' + b'{"a":' * 900 + b"1" + b"}" * 900), HARMLESS
    ),
    "a list": (b"[1, 2]", "wrong-file-type"),
    "a pickle": (
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "unreadable-file"
    ),
    "another format": (changed(format="mergekit-slta/linearity"), "wrong-file-type"),
    "a later version": (changed(version=2), "other-file-version"),
    "a version that is no number": (changed(version="1; rm -rf /"), "other-file-version"),
    "an unknown key": (changed(run="import os"), "damaged-file"),
    "two experts of one name": (changed(models=["x", "x"]), "damaged-file"),
    "NaN": (entry(alpha=[float("nan")]), "damaged-file"),
    "infinity": (entry(alpha=[float("inf")]), "damaged-file"),
    "too few weights": (entry(alpha=[]), "damaged-file"),
    "too many weights": (entry(alpha=[1.0, 2.0]), "damaged-file"),
    "a weight that is text": (entry(alpha=["1; import os"]), "damaged-file"),
    "text that turns around": (entry(name="\u202etxt.exe", alpha=[]), "damaged-file"),
    "half a character": (entry(name="\ud800", alpha=[]), "damaged-file"),
    "a huge integer": (entry(rank=10**400), HARMLESS),
    "a tensor twice": (entry(tensors=["t", "t"]), "damaged-file"),
    "a slice that runs backwards": (entry(slices={"t": [0, 5, 2]}), "damaged-file"),
    "a slice of another tensor": (entry(slices={"u": [0, 0, 1]}), "damaged-file"),
    "a negative slice": (entry(slices={"t": [0, -1, 2]}), "damaged-file"),
    "no submodules": (changed(submodules=[]), HARMLESS),
    "latin-1": ('{"format": "é"}'.encode("latin-1"), "unreadable-file"),
    "cut short": (changed()[:-20], "unreadable-file"),
    "nothing": (b"", "unreadable-file"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALPHAS)
def test_alphas_files(tmp_path, case):
    """Refused, or what they say is harmless; never another exception, never a weight that is not finite."""
    content, code = ALPHAS[case]
    path = tmp_path / "slta_alphas.json"
    path.write_bytes(content)
    if code is not HARMLESS:
        with refused(AlphasError, code, path):
            Alphas.load(path)
        return
    found = Alphas.load(path)
    assert all(abs(alpha) < float("inf") for each in found.submodules for alpha in each.alpha)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    """A sparse file of 10 GB is refused by its size."""
    path = tmp_path / "slta_alphas.json"
    with open(path, "wb") as file:
        file.truncate(10 * 2**30)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with refused(AlphasError, "file-too-large", "256 MiB"):
        Alphas.load(path)
    assert alphas_module.LARGEST_BYTES == 256 * 2**20


def with_header(path: Path, header: bytes, content: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


HEADERS = {
    "rows without end": b'{"slope.m":{"dtype":"F64","shape":[1000000000,2,2],"data_offsets":[0,32000000000]}}',
    "a header without end": None,
    "offsets that overlap": b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
                            b'"b":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}',
    "a negative shape": b'{"a":{"dtype":"F64","shape":[-1],"data_offsets":[0,8]}}',
    "no JSON": b"\x80\x04pickle",
    "deep": b'{"a":' * 2000 + b"1" + b"}" * 2000,
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_statistics_headers(tmp_path, case):
    path = tmp_path / "slta_stats.safetensors"
    if HEADERS[case] is None:
        path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    else:
        with_header(path, HEADERS[case], b"\0" * 8)
    with refused(AlphasError, "unreadable-file", path):
        Statistics.load(path)


def test_statistics_of_another_form(tmp_path):
    """Tensors under names that no form has, and metadata that is no mapping of texts."""
    header = {"format": statistics_module.FORMAT, "version": str(statistics_module.VERSION), "metadata": "{}"}
    row_task = torch.zeros(2, dtype=torch.int64)
    for number, (tensors, more, code) in enumerate(
        [
            ({"code.m": torch.zeros(2, 1, 1, dtype=torch.float64), "row_task": row_task}, {}, "damaged-file"),
            ({"gram.m": torch.zeros(2, 1, 1), "row_task": row_task}, {}, "damaged-file"),
            ({"gram.m": torch.zeros(2, 1, 1, dtype=torch.float64)}, {}, "damaged-file"),
            ({"gram.m": torch.zeros(2, 1, 1, dtype=torch.float64), "row_task": row_task + 1}, {}, "damaged-file"),
            (
                {"gram.m": torch.zeros(2, 1, 1, dtype=torch.float64), "row_task": row_task},
                {"metadata": "[1]"},
                "damaged-file",
            ),
            (
                {"gram.m": torch.zeros(2, 1, 1, dtype=torch.float64), "row_task": row_task},
                {"metadata": '{"a": 1}'},
                "damaged-file",
            ),
            (
                {"gram.m": torch.zeros(2, 1, 1, dtype=torch.float64), "row_task": row_task},
                {"metadata": "{"},
                "unreadable-file",
            ),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata={**header, **more})
        with refused(AlphasError, code, path):
            Statistics.load(path)


def test_a_checkpoint_that_is_a_pickle_runs_nothing(tiny, tmp_path, write_recipe):
    """A `.bin` whose unpickling would call `os.system` is refused, and nothing was called."""
    import pickle
    import shutil

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    evil = tmp_path / "evil"
    shutil.copytree(tiny.experts[1], evil, ignore=shutil.ignore_patterns("*.safetensors*"))
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Harm()}))
    recipe = tiny.recipe()
    recipe["models"][1]["model"] = str(evil)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert_refused(result, "unreadable-checkpoint", "evil", "Weights only load failed")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_remote_code_needs_the_users_own_flag(tiny, tmp_path, write_recipe):
    """A config that names code of its own: nothing of it is imported."""
    import shutil

    evil = tmp_path / "evil"
    shutil.copytree(tiny.experts[1], evil)
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "owned", "auto_map": {"AutoConfig": "owned.Config", "AutoModelForCausalLM": "owned.Model"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "owned.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    recipe = tiny.recipe()
    recipe["models"][1]["model"] = str(evil)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert_refused(result, "unreadable-config", evil)
    assert not (tmp_path / "owned").exists()


def merge_offline(*arguments: str) -> None:
    """The stock command, that ends when it asks for the network."""

    def closed(*_, **__):
        raise SystemExit("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, closed)
    socket.getaddrinfo = socket.create_connection = closed
    run_yaml.main(arguments)


@pytest.mark.process
def test_local_files_need_no_network(tiny, tmp_path, write_recipe):
    """A whole merge, dataset and tokenizer and card included, in a process whose sockets are closed."""
    path = write_recipe(tiny.recipe())
    result = fork(merge_offline, str(path), str(tmp_path / "out"), "--quiet", cwd=tmp_path).ended()
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "README.md").exists()


YAMLISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    "granularity num_samples max_seq_length seed balance inputs objective label_samples steps fresh_rows ridge "
    "lambda compute_dtype alphas dataset weight".split()
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parameters=st.dictionaries(KEYS, YAMLISH, max_size=3), models=YAMLISH, base=st.text(max_size=5) | YAMLISH)
def test_any_recipe_is_read_or_refused(tmp_path, parameters, models, base):
    """Whatever stands where: a recipe, or one of the project's own errors in one printable line."""
    sound = [{"model": "x", "parameters": {"dataset": "d"}}]
    for content in (
        {"merge_method": "submodule_linear", "base_model": "b", "models": sound, "parameters": parameters},
        {"merge_method": "submodule_linear", "base_model": base, "models": models},
    ):
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        try:
            read_recipe(load_config(path)[0])
        except SltaError as error:
            check_message(error.message, error.code)


@pytest.mark.parametrize("value", [1e300, -1.0, 1e-320])
def test_matrices_that_no_features_have(tiny, tmp_path, write_recipe, value):
    """Found by fuzzing: finite numbers whose products are not. Solved, or refused in one line."""
    assert slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
    statistics = Statistics.load(tmp_path / "slta_stats.safetensors")
    for gram in statistics.by_submodule.values():
        gram[:, 0, 0] = value
        gram[:, 0, 1] = value
    try:
        found = solve_again(statistics)
    except SltaError as error:
        check_message(error.message, error.code)
    else:
        assert all(abs(alpha) < float("inf") for entry in found.submodules for alpha in entry.alpha)


def test_solving_sound_statistics_with_a_strange_layout(tmp_path):
    statistics = Statistics(torch.zeros(1, dtype=torch.int64), 1, {"m": torch.ones(1, 1, 1, dtype=torch.float64)})
    for layout in ("", "[]", "{}", '{"models": 3}', "null", '{"a":' * 500 + "1" + "}" * 500):
        statistics.metadata = {"layout": layout}
        with refused(AlphasError, "damaged-layout"):
            solve_again(statistics)


def damaged_layouts(layout: dict):
    """Every key of a layout, of its submodules and of its tasks, left out or of another type."""
    for part in ([layout], layout["submodules"][:1], [layout["solve"]], layout["tasks"][:1]):
        for own in part:
            for key, value in list(own.items()):
                del own[key]
                yield layout
                for other in (None, 7, [], {}, "x", [[]], {"a": {}}):
                    own[key] = other
                    yield layout
                own[key] = value


@pytest.fixture(scope="module")
def measured(plenty, tmp_path_factory):
    """The file of statistics after a step."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "recipe.yml").write_text(yaml.safe_dump(plenty.recipe(num_samples=2, objective="joint", steps=1)))
    assert slta("calibrate", folder / "recipe.yml", "-o", folder / "slta_alphas.json", "--quiet").exit_code == 0
    return folder / "slta_stats.safetensors"


@pytest.mark.parametrize("settings", [{}, {"objective": "joint", "steps": 0}, None], ids=["features", "joint", "steps"])
def test_layouts_that_miss_a_key(tiny, tmp_path, write_recipe, settings, measured):
    """Found by fuzzing: whatever is missing, the statistics are solved, or refused in one line."""
    if settings is None:
        statistics = Statistics.load(measured)
    else:
        recipe = write_recipe(tiny.recipe(2, num_samples=2, granularity="layer", **settings))
        assert slta("calibrate", recipe, "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
        statistics = Statistics.load(tmp_path / "slta_stats.safetensors")
    refused = 0
    for layout in damaged_layouts(json.loads(statistics.metadata["layout"])):
        statistics.metadata = statistics.metadata | {"layout": json.dumps(layout)}
        for rows in (None, 1):
            try:
                solve_again(statistics, rows=rows)
            except SltaError as error:
                refused += 1
                check_message(error.message, error.code, "calibrate again")
    assert refused > 100


@pytest.mark.parametrize("part", ["", "[]", "{}", "points", "trials", "unchanged"])
def test_measured_models_that_are_damaged(measured, part):
    """Statistics after steps whose list of models is not what was written: refused in one line."""
    statistics = Statistics.load(measured)
    record = json.loads(statistics.metadata["search"])
    for value in (7, [7], [[]], {"a": 7}, record["points"][1:]):
        statistics.metadata["search"] = json.dumps(record | {part: value}) if part.isalpha() else part
        with refused(AlphasError, "damaged-file", "calibrate again"):
            solve_again(statistics)


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e80, 1e150, 1e300])
def test_slopes_that_no_features_have(size):
    """Found by fuzzing: a step whose numbers have no squares is made, or not solved; never another exception."""
    generator = torch.Generator().manual_seed(0)
    slopes = {"m": torch.randn(4, 3, 2, generator=generator, dtype=torch.float64) * size}
    try:
        found = gauss_newton_steps(
            slopes, torch.tensor([0, 0, 1, 1]), {"m": torch.ones(2, dtype=torch.float64)},
            torch.ones(2, dtype=torch.float64), ridges=(0.1, 1.0),
        )  # fmt: skip
    except torch.linalg.LinAlgError:  # the command fails in one line
        return
    assert [step["m"].shape for step in found] == [(2,), (2,)]
