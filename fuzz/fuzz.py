"""Coverage-guided fuzzing of the parsers: `python fuzz/fuzz.py recipe -max_total_time=1800`, `alphas`, `statistics`.

Needs `pip install atheris` (Linux, macOS; CPython). Everything but the project's own errors is a crash, and so is a
message that is no printable line. Found cases go into `tests/test_hostile.py`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mergekit_slta"]):
    from mergekit_slta.alphas import Alphas
    from mergekit_slta.errors import SltaError
    from mergekit_slta.gram import Statistics
    from mergekit_slta.recipe import load_config, read_recipe
    from mergekit_slta.resolve import solve_again

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def recipe(path: Path) -> None:
    """Read and validate."""
    read_recipe(load_config(path)[0])


def alphas(path: Path) -> None:
    """Read, and look every tensor's weights up."""
    found = Alphas.load(path)
    for entry in found.submodules:
        for tensor in entry.tensors:
            entry.parts(tensor)
    assert all(abs(alpha) < float("inf") for entry in found.submodules for alpha in entry.alpha)


def statistics(path: Path) -> None:
    """Read, and solve again."""
    solve_again(Statistics.load(path))


TARGETS: dict[str, Callable[[Path], None]] = {"recipe": recipe, "alphas": alphas, "statistics": statistics}


def main() -> None:
    """Fuzz the parser that the first argument names; the others are libFuzzer's."""
    target = TARGETS[sys.argv.pop(1)]
    logging.disable()

    def one(data: bytes) -> None:
        path = FOLDER / "input"
        path.write_bytes(data)
        try:
            target(path)
        except SltaError as error:
            assert error.message.isprintable(), error.message

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
