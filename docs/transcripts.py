"""Keep what the commands of docs/session.md print, for the documentation: docs/output/NAME.txt.

    python docs/transcripts.py [--demo DIR]

Runs them in a copy of the models and data of a demo, as through a pipe. Without --demo a demo is made first, which
takes three minutes on two CPU cores.
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
SESSION = re.findall(
    r"^\$ (.*)", re.sub(r"\\\n\s*", "", (OUTPUT.parent / "session.md").read_text(encoding="utf-8")), re.MULTILINE
)[2:7]
"""The commands of docs/session.md behind the demo."""
PARTS = {"check": "mergekit-slta check", "merge": "mergekit-yaml", "compare": "mergekit-slta compare"}
"""Name -> how the command begins whose output is kept in a file of its own. session.txt has all of it."""
_MODULES = {"mergekit-slta": "mergekit_slta", "mergekit-yaml": "mergekit.scripts.run_yaml"}


def transcript(command: str, folder: Path) -> str:
    """Run a command in a folder; what a terminal would have shown, without the progress bars of mergekit.

    Raises:
        CalledProcessError: it failed.
    """
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", _MODULES[program], *arguments], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=True, encoding="utf-8", env={"HF_HUB_OFFLINE": "1", **os.environ},
    )  # fmt: skip
    printed = [line for line in done.stdout.splitlines() if "it/s]" not in line and "?it/s" not in line]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([f"$ {command}", *printed, ""]))
    assert str(folder) not in text, "a path of this machine"
    return text


def main() -> None:
    """Write the transcripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of a demo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        demo, folder = given.demo or Path(made, "demo"), Path(made, "copy")
        if given.demo is None:
            subprocess.run([sys.executable, "-m", "mergekit_slta", "demo", str(demo)], check=True)
        for part in ("models", "data"):
            shutil.copytree(demo / part, folder / part)
        texts = {command: transcript(command, folder.resolve()) for command in SESSION}
    (OUTPUT / "session.txt").write_text("\n".join(texts.values()), encoding="utf-8")
    for name, begin in PARTS.items():
        (text,) = [text for command, text in texts.items() if command.startswith(begin)]
        (OUTPUT / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
