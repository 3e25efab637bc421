"""Keep what the commands print, for the documentation: docs/output/NAME.txt.

    python docs/transcripts.py [--demo DIR] [NAME...]

Runs the commands of `TRANSCRIPTS` in a copy of the models and data of a demo, as through a pipe. Without --demo a demo
is made first, which takes three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent / "output"
RECIPE = """merge_method: submodule_linear
base_model: ./models/base
models:
  - model: ./models/math
    parameters: {dataset: data/math.jsonl, text: "{question} ", completion: "{answer}"}
  - model: ./models/words
    parameters: {dataset: data/words.jsonl}      # its `messages` column, rendered with the chat template
  - model: ./models/numbers
    parameters: {dataset: data/numbers.jsonl}    # its `text` column
parameters:
  objective: joint
out_dtype: bfloat16
"""
COMPARED = RECIPE.replace(
    "data/numbers.jsonl}    # its `text` column", 'data/numbers.test.jsonl, text: "{prompt} ", completion: "{answer}"}'
).replace("parameters:\n  evaluate: true\n", "")
"""Every task has answers."""
TRANSCRIPTS = {
    "check": ["mergekit-slta check merge.yml"],
    "merge": ["mergekit-yaml merge.yml merged"],
    "compare": ["mergekit-slta compare compare.yml --quiet"],
}
"""Name -> the commands that are run in turn."""
_SESSION = re.findall(
    r"^\$ (.*)", re.sub(r"\\\n\s*", "", (OUTPUT.parent / "session.md").read_text(encoding="utf-8")), re.MULTILINE
)[2:]
"""The commands of docs/session.md behind the demo."""
TRANSCRIPTS["session"] = _SESSION
_MODULES = {"mergekit-slta": "mergekit_slta", "mergekit-yaml": "mergekit.scripts.run_yaml"}


def transcript(commands: list[str], folder: Path) -> str:
    """Run commands in a folder; what a terminal would have shown, without the progress bars of mergekit.

    Raises:
        CalledProcessError: a command failed.
    """
    lines = []
    for command in commands:
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, "-m", _MODULES[program], *arguments], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=True, encoding="utf-8", env={"HF_HUB_OFFLINE": "1", **os.environ},
        )  # fmt: skip
        printed = [line for line in done.stdout.splitlines() if "it/s]" not in line and "?it/s" not in line]
        lines += [f"$ {command}", *printed, ""]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    assert str(folder) not in text, "a path of this machine"
    return text


def main() -> None:
    """Write the transcripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of a demo")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(TRANSCRIPTS)}  [default: all]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        demo, folder = given.demo or Path(made, "demo"), Path(made, "copy")
        if given.demo is None:
            subprocess.run([sys.executable, "-m", "mergekit_slta", "demo", str(demo)], check=True)
        for part in ("models", "data"):
            shutil.copytree(demo / part, folder / part)
        (folder / "merge.yml").write_text(RECIPE, encoding="utf-8")
        (folder / "compare.yml").write_text(COMPARED, encoding="utf-8")
        OUTPUT.mkdir(exist_ok=True)
        for name in given.names or TRANSCRIPTS:
            text = transcript(TRANSCRIPTS[name], folder.resolve())
            (OUTPUT / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
