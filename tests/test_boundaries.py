"""The order of the folders holds: what each may import, and what stays unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_slta

PACKAGE = Path(__file__).resolve().parent.parent / "mergekit_slta"
ORDER = (
    "errors < maths < files < libraries < recipe < data < models < checkpoints < runtime < runner < generation < job"
    " < objectives < calibration < analysis < reporting < host < comparison < demo < cli"
).split(" < ")
"""A folder imports only folders to its left."""
DOOR = ("mergekit_slta/_autoload.py", {"mergekit_slta.host.method", "mergekit_slta.host.wrap"})
"""The one import to the right: the import hook loads the method when mergekit is loaded."""
FORBIDDEN = {
    "maths": {"mergekit", "transformers", "datasets", "accelerate", "peft", "safetensors", "numpy", "pydantic"},
    "files": {"mergekit", "transformers", "datasets", "accelerate", "peft"},
}
"""Other packages that a folder does not import."""
LONGEST_FILE = 350


def imports_of(source: str, *, top_level: bool = False) -> Iterator[str]:
    """Modules that a file imports, as `a.b.c` (a name imported from a package counts as `package.name`).

    Imports for type checkers only are left out; with `top_level`, so are those inside functions.
    """
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if alias.name.islower() else node.module


def folder_of(module: str) -> str | None:
    """The folder (or file at the root) that a module of the package is in; None for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mergekit_slta" and len(parts) > 1 else None


def is_to_the_right(folder: str | None, own: str) -> bool:
    """Whether `folder` stands to the right of `own`, which may be a file at the root: all folders are right of that."""
    return folder in ORDER and (own not in ORDER or ORDER.index(folder) > ORDER.index(own))


def violations(path: str, source: str) -> list[str]:
    """Imports of a file of the package that the order forbids; `path` starts with `mergekit_slta/`."""
    own = Path(path).parts[1].removesuffix(".py")
    found = []
    for module in imports_of(source):
        folder = folder_of(module)
        if path == DOOR[0]:
            if folder is not None and ".".join(module.split(".")[:3]) not in DOOR[1]:
                found.append(module)
        elif own == "__main__" or (own == "__init__" and folder == "_autoload"):
            continue
        elif is_to_the_right(folder, own) or module.split(".")[0] in FORBIDDEN.get(own, ()):
            found.append(module)
    return found


def test_every_folder_has_a_place_in_the_order():
    """A new folder is put into the order."""
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__", "_autoload"} <= set(ORDER)


def test_folders_import_only_folders_to_their_left():
    """No file imports a folder to the right of its own, nor a library that its folder does without."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).as_posix()
        if bad := violations(name, path.read_text(encoding="utf-8")):
            found[name] = bad
    assert not found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("mergekit_slta/maths/joint.py", "from mergekit_slta.files.atomic import write_atomically"),
        ("mergekit_slta/maths/joint.py", "import transformers"),
        ("mergekit_slta/files/atomic.py", "from mergekit.common import ModelReference"),
        ("mergekit_slta/job/preflight.py", "def f():\n    from mergekit_slta.host.merge import merge"),
        ("mergekit_slta/host/method.py", "import mergekit_slta.cli.main"),
        ("mergekit_slta/errors.py", "from mergekit_slta.maths.closed_form import Solution"),
        ("mergekit_slta/_autoload.py", "from mergekit_slta.recipe.read import read_recipe"),
    ],
)
def test_an_import_to_the_right_is_found(path, line):
    """The check sees what it is for, at the top of a file or inside a function."""
    assert violations(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("mergekit_slta/files/alphas_file.py", "from mergekit_slta.maths.task_arithmetic import WeightedSlice"),
        ("mergekit_slta/_autoload.py", "def f():\n    from mergekit_slta.host.wrap import wrap_run_merge"),
        ("mergekit_slta/cli/main.py", "from mergekit_slta.errors import SltaError"),
        ("mergekit_slta/maths/grams.py", "import torch\nfrom mergekit_slta.maths import ridges"),
    ],
)
def test_an_import_to_the_left_is_allowed(path, line):
    """Neighbours in a folder, folders to the left, and the one door."""
    assert not violations(path, line)


def test_init_files_are_empty():
    """Importing one file of a folder loads no other."""
    for path in PACKAGE.glob("*/**/__init__.py"):
        assert not path.read_text(encoding="utf-8").strip(), path


def test_no_file_is_long():
    """A file that needs more lines than this holds two subjects."""
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, path


def test_matplotlib_is_loaded_only_to_draw():
    """No file imports it at its top level."""
    for path in PACKAGE.rglob("*.py"):
        names = imports_of(path.read_text(encoding="utf-8"), top_level=True)
        assert not any(name.split(".")[0] == "matplotlib" for name in names), path


@pytest.mark.process
def test_solving_again_needs_neither_mergekit_nor_transformers():
    """`mergekit-slta solve` is a matter of seconds because it imports only what it needs."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_slta.cli.main import main\n"
        "result = CliRunner().invoke(main, ['solve', 'none.safetensors'])\n"
        "assert result.exit_code == 2, result.output\n"
        "print(sorted({'mergekit', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.process
def test_public_names_exist_and_come_lazily():
    """`mergekit_slta.calibrate` and the others are there, and importing the package alone loads no torch."""
    code = "import sys, mergekit_slta; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
    assert [name for name in dir(mergekit_slta) if not hasattr(mergekit_slta, name)] == []
    assert callable(mergekit_slta.calibrate)
    assert callable(mergekit_slta.register)
