"""The examples in the docstrings of what the package exports."""

from __future__ import annotations

import doctest
import pydoc
import shutil
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import refused
from mergekit.options import MergeOptions

import mergekit_slta
from mergekit_slta import Alphas
from mergekit_slta.errors import AlphasError, RunError, SltaError

EXPORTED = {name: getattr(mergekit_slta, name) for name in dir(mergekit_slta)}
ERRORS = {name for name, value in EXPORTED.items() if isinstance(value, type) and issubclass(value, SltaError)}
EXAMPLES = sorted(EXPORTED.keys() - ERRORS - {"__version__", "Recipe", "Solution"})
LINEARITY = Path(__file__).resolve().parent.parent / "examples" / "demo" / "linearity" / "slta_linearity.json"


@pytest.fixture(scope="module")
def folder(plenty, tmp_path_factory):
    """The folder that the examples speak of: models, rows, a recipe, its merge and a comparison."""
    folder = tmp_path_factory.mktemp("examples")
    for name, source in zip(("base", "math", "words"), (plenty.base, *plenty.experts), strict=True):
        shutil.copytree(source, folder / "models" / name)
    experts = [
        {"model": f"models/{name}", "parameters": {"dataset": str(rows)}}
        for name, rows in zip(("math", "words"), plenty.datasets, strict=True)
    ]
    recipe = {
        "merge_method": "submodule_linear", "base_model": "models/base", "models": experts,
        "parameters": {"num_samples": 2, "max_seq_length": 12}, "dtype": "float32",
    }  # fmt: skip
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    shutil.copy(LINEARITY, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mergekit_slta.merge("recipe.yml", "merged", MergeOptions(quiet=True, write_model_card=False))
        mergekit_slta.compare("recipe.yml", "compared", methods=["average"])
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, folder, monkeypatch):
    """Every function and class has an example, and it prints what it says."""
    monkeypatch.chdir(folder)
    globs = {"mergekit_slta": mergekit_slta, "torch": torch}
    (found,) = doctest.DocTestFinder(recurse=False).find(EXPORTED[name], name, globs=globs)
    assert found.examples
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(found, out=printed.append).failed == 0, "".join(printed)


def test_help_fits_on_two_screens_and_names_everything():
    """Two screens of 50 lines have every exported name."""
    text = pydoc.plain(pydoc.render_doc(mergekit_slta))
    assert len(text.splitlines()) <= 100
    assert [name for name in EXPORTED if name not in text and name != "__version__"] == []


def test_every_exception_is_exported():
    """All classes of errors.py."""
    from mergekit_slta import errors

    own = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, SltaError)}
    assert own == ERRORS


def test_what_editors_see_is_what_python_has():
    """The names below TYPE_CHECKING are those that are loaded when they are used, from the same modules."""
    source = Path(mergekit_slta.__file__).read_text(encoding="utf-8")
    for name, module in mergekit_slta._PUBLIC.items():
        assert f"    from {module} import {name} as {name}\n" in source
    assert source.count("    from ") == len(mergekit_slta._PUBLIC)


@pytest.fixture(scope="module")
def alphas(folder, tiny):
    """The alphas of a solve, by name."""
    return mergekit_slta.calibrate(tiny.recipe(2, num_samples=2, max_seq_length=12))


def test_an_entry_is_found_by_its_name(alphas):
    """`alphas[name]` is the entry; what is unknown is refused with names like it."""
    for entry in alphas.submodules:
        assert alphas[entry.name] is entry
        assert entry.name in alphas
    assert "model.layers.9.mlp" not in alphas
    with refused(AlphasError, "unknown-submodule", "model.layers.9.mlp", "model.layers.0.mlp"):
        alphas["model.layers.9.mlp"]
    with refused(AlphasError, "unknown-submodule", "3"):
        alphas[3]


def test_the_frame_has_every_weight(alphas, monkeypatch):
    """A row per submodule, a column per model, in the file's order; without pandas there is one line."""
    frame = alphas.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [entry.name for entry in alphas.submodules]
    for entry in alphas.submodules:
        assert tuple(frame.loc[entry.name, list(alphas.models)]) == entry.alpha
        assert frame.loc[entry.name, "residual"] == entry.residual
        assert frame.loc[entry.name, "kind"] == entry.kind
    assert frame["layer"].isna().sum() == sum(entry.layer is None for entry in alphas.submodules)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with refused(RunError, "missing-package", "pandas"):
        alphas.to_frame()


def test_reprs_are_short(alphas, tiny):
    """One line, however many submodules, models and tensors there are."""
    large = Alphas.model_construct(**{**dict(alphas), "models": tuple(f"org/model-{n}" for n in range(50))})
    for value in (alphas, large, *alphas.submodules):
        assert len(repr(value)) < 600
        assert "\n" not in repr(value)
        assert str(value) == repr(value)
    assert "6 submodules" in repr(alphas)


def test_solve_reads_files_folders_and_statistics(folder, monkeypatch):
    """The same weights from each; nothing is written."""
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    statistics = mergekit_slta.Statistics.load("merged/slta_stats.safetensors")
    found = [
        mergekit_slta.solve(source, ridge=0.1)
        for source in ("merged", Path("merged/slta_stats.safetensors"), statistics)
    ]
    assert found[0].submodules == found[1].submodules == found[2].submodules
    assert found[0].submodules != Alphas.load("merged/slta_alphas.json").submodules
    assert sorted(path.name for path in folder.rglob("*")) == before
    for source in (3, None, "none", "a\0b", [1]):
        with refused(AlphasError, "missing-file"):
            mergekit_slta.solve(source)
