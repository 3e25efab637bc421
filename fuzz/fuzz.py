"""Coverage-guided fuzzing of the parsers: `python fuzz/fuzz.py recipe -max_total_time=1800 CORPUS`, `alphas`,
`statistics`.

Half of the mutations are libFuzzer's own, of bytes; the others change one node of the document that the bytes hold, so
that what lies behind the JSON and YAML parsers is reached. CORPUS is a folder with sound files to begin with.

Needs `pip install atheris` (Linux, macOS; CPython). Everything but the project's own errors is a crash, and so is a
message that is no printable line. Found cases go into `tests/test_hostile.py`.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris
import yaml

with atheris.instrument_imports(include=["mergekit_slta"]):
    from mergekit_slta import Alphas, Statistics, load_config, read_recipe
    from mergekit_slta.calibration.resolve import solve_again
    from mergekit_slta.errors import SltaError

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
    """Read, and solve again with all rows and with fewer."""
    found = Statistics.load(path)
    solve_again(found)
    solve_again(found, rows=1)


TARGETS: dict[str, Callable[[Path], None]] = {"recipe": recipe, "alphas": alphas, "statistics": statistics}

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 1e308, -1e-320, float("nan"), float("inf"), "", "0", "nan", "base", "a/../b",
    "\x1b[2J", "\u202e", "~", "[[" * 60, "{text.__class__}", [], {}, [[]], [0], [""], {"": ""}, {"a": {"a": []}},
)  # fmt: skip
"""What a node is replaced by."""


def read_statistics(data: bytes) -> tuple[Any, bytes]:
    """(header with the JSON texts inside it parsed, tensors) of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["metadata"] = json.loads(header["__metadata__"]["metadata"])
    header["__metadata__"]["metadata"]["layout"] = json.loads(header["__metadata__"]["metadata"]["layout"])
    return header, data[8 + size :]


def write_statistics(header: Any, tensors: bytes) -> bytes:
    """The reverse of `read_statistics`."""
    if isinstance(inner := header.get("__metadata__", {}).get("metadata"), dict):
        if not isinstance(inner.get("layout"), str):
            inner["layout"] = json.dumps(inner.get("layout"))
        header["__metadata__"]["metadata"] = json.dumps(inner)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


READERS: dict[str, Callable[[bytes], tuple[Any, bytes]]] = {
    "recipe": lambda data: (yaml.safe_load(data), b""),
    "alphas": lambda data: (json.loads(data), b""),
    "statistics": read_statistics,
}
WRITERS: dict[str, Callable[[Any, bytes], bytes]] = {
    "recipe": lambda document, _: yaml.safe_dump(document).encode(),
    "alphas": lambda document, _: json.dumps(document).encode(),
    "statistics": write_statistics,
}


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


def changed(document: Any, chance: random.Random) -> None:
    """Change one node: replace it, remove it, repeat it, or put another node of the document in its place."""
    known = list(places(document))
    container, key = chance.choice(known)
    match chance.randrange(5):
        case 0:
            container[key] = copy.deepcopy(chance.choice(ODD))
        case 1:
            del container[key]
        case 2 if isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        case 3 if isinstance(container[key], int | float):
            container[key] = container[key] * chance.choice((-1, 0.5, 2, 1e30)) + chance.choice((-1, 0, 1))
        case _:
            other, place = chance.choice(known)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = copy.deepcopy(other[place])


def mutator(parser: str) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's mutations, and those of the document."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return atheris.Mutate(data, most)
        try:
            document, rest = READERS[parser](data)
            for _ in range(chance.choice((1, 1, 2, 4))):
                changed(document, chance)
            if rest and chance.random() < 0.2:
                rest = atheris.Mutate(rest, len(rest))
            written = WRITERS[parser](document, rest)
        except Exception:  # no document (any more): its bytes are left to libFuzzer
            return atheris.Mutate(data, most)
        return written if len(written) <= most else atheris.Mutate(data, most)

    return mutate


def main() -> None:
    """Fuzz the parser that the first argument names; the others are libFuzzer's."""
    parser = sys.argv.pop(1)
    target = TARGETS[parser]
    logging.disable()

    def one(data: bytes) -> None:
        path = FOLDER / "input"
        path.write_bytes(data)
        try:
            target(path)
        except SltaError as error:
            assert error.message.isprintable(), error.message

    atheris.Setup(sys.argv, one, custom_mutator=mutator(parser))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
