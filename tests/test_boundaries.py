"""Rooms stay rooms: what each file may import, and that arrows point down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mergekit_slta"
FLOORS = [
    {"errors", "_autoload"},
    {"files", "documents"},
    {
        "gram",
        "solve",
        "joint",
        "linearity",
        "records",
        "scores",
        "alphas",
        "identity",
        "watch",
        "outfolder",
        "distributed",
        "drawing",
    },
    {"newton"},
    {"method", "recipe", "architectures", "batches", "lora", "headers", "measures", "card", "panels", "levels", "maps"},
    {"adapters", "depth"},
    {"submodules", "figures"},
    {"samples", "plan", "skeleton", "export", "slopes"},
    {"checkpoints", "fingerprint", "streams"},
    {"state", "tape"},
    {"ends", "layers", "observation", "gradients"},
    {"stream", "fisher"},
    {"preflight"},
    {"assembly", "costs", "results"},
    {"summary"},
    {"progress"},
    {"gathering"},
    {"passes"},
    {"calibration", "resolve", "analysis"},
    {"verification", "report"},
    {"host"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def imports_of(path: Path, *, top_level: bool = False) -> set[str]:
    """Names of the modules that a file imports (at its top level only, without TYPE_CHECKING blocks, if asked)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.state(tree))
    typing_only = {
        id(inner)
        for node in ast.state(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.state(node)
    }
    nodes = [node for node in nodes if id(node) not in typing_only]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_every_room_has_a_floor():
    """A new file needs a place in the building."""
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"demo"}
    assert rooms == set().union(*FLOORS)


def test_arrows_point_down():
    """A room imports rooms below it only.

    Two lazy imports are doors upward: from the hook to the method, and from the method to the host.
    """
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    doors = {("method", "host"), ("_autoload", "method"), ("demo", "demo")}
    for room, level in floor.items():
        files = PACKAGE.joinpath(room).glob("*.py") if room == "demo" else [PACKAGE / f"{room}.py"]
        for path in files:
            for name in imports_of(path):
                parts = name.split(".")
                if parts[0] == "mergekit_slta" and len(parts) > 1 and parts[1] in floor:
                    assert floor[parts[1]] < level or (room, parts[1]) in doors, f"{room} imports {parts[1]}"


@pytest.mark.parametrize(
    "room", ["gram", "solve", "joint", "newton", "files", "errors", "alphas", "identity", "assembly", "resolve"]
)
def test_maths_knows_neither_mergekit_nor_transformers(room):
    """Statistics and solves are tensors in, tensors out."""
    roots = {name.split(".")[0] for name in imports_of(PACKAGE / f"{room}.py")}
    assert not roots & {"mergekit", "transformers", "datasets", "accelerate"}


def test_runner_knows_no_statistics():
    """The runner hands outputs out; what is made of them is not its business."""
    for room in ("stream", "state", "ends", "layers", "skeleton", "checkpoints", "gradients", "slopes", "tape"):
        assert not imports_of(PACKAGE / f"{room}.py") & {
            f"mergekit_slta.{name}" for name in ("gram", "solve", "alphas", "assembly", "calibration")
        }


def test_matplotlib_is_loaded_only_to_draw():
    """No file imports it at its top level."""
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "matplotlib" for name in imports_of(path, top_level=True)), path


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
    code = (
        "import sys, mergekit_slta\n"
        "assert 'torch' not in sys.modules\n"
        "for name in mergekit_slta.__all__: getattr(mergekit_slta, name)\n"
        "assert callable(mergekit_slta.calibrate) and callable(mergekit_slta.register)\n"
        "print(mergekit_slta.Alphas.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "Alphas", result.stderr
