"""Make the screenshots in docs/images of a merge's HTML page and model card, and of `check` on a terminal.

    python docs/screenshots.py OUT [RECIPE]

OUT is the folder of a merge, RECIPE the recipe to check, which is read in its own folder. Needs Chromium and the
packages of the documentation (`markdown`).
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import markdown
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from rich.text import Text

from mergekit_slta.files.names import CARD_NAME, PAGE_NAME
from mergekit_slta.reporting.report import report

IMAGES = Path(__file__).resolve().parent / "images"
COLORS = 256
COLUMNS = 118
CARD_STYLE = """
body { margin: 0 auto; max-width: 860px; padding: 24px; font: 15px/1.5 system-ui, sans-serif; color: #1f2328; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 5px; } img { max-width: 100%; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { border: 1px solid #d1d9e0; padding: 4px 9px; }
code, pre { background: #f2f4f6; border-radius: 5px; font-size: 85%; }
code { padding: 2px 4px; } pre { padding: 12px; overflow-x: auto; } pre code { padding: 0; } a { color: #0969da; }
"""


def shoot(page: Path, image: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Take a screenshot of the top of a page, with few colours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("needs Chromium")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--window-size={width},{height}", "--virtual-time-budget=2000",
                *["--blink-settings=preferredColorScheme=0"] * dark, f"--screenshot={image}", page.as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    Image.open(image).convert("RGB").quantize(COLORS).save(image, optimize=True)


def shoot_check(recipe: Path, image: Path) -> None:
    """Run `check` on a terminal of its own, and take a picture of what it prints."""
    printed: list[bytes] = []

    def read(descriptor: int) -> bytes:
        printed.append(os.read(descriptor, 65536))
        return printed[-1]

    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"}
    with contextlib.chdir(recipe.parent):
        pty.spawn([sys.executable, "-m", "mergekit_slta", "check", recipe.name], read)
    lines = b"".join(printed).decode().replace("\r\n", "\n").split("\n")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ mergekit-slta check {recipe.name}", style="bold"))
    console.print(Text.from_ansi("\n".join(line.rsplit("\r", 1)[-1] for line in lines)))
    drawn = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="mergekit-slta"), flags=re.DOTALL)
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        page.write(f"<!DOCTYPE html><meta charset='utf-8'><body style='margin: 0'>{drawn}")
        page.flush()
        shoot(Path(page.name), image, 1200, 985)


def main(out: Path, recipe: Path | None = None) -> None:
    """Write the page and the card of a merge again, and take their pictures."""
    report(out, html=True)
    IMAGES.mkdir(exist_ok=True)
    if recipe is not None:
        shoot_check(recipe.resolve(), IMAGES / "check.png")
    page = (out / PAGE_NAME).resolve()
    shoot(page, IMAGES / "report-desktop.png", 1440, 1560)
    shoot(page, IMAGES / "report-phone.png", 360, 1100, dark=True)
    text = markdown.markdown(ModelCard.load(out / CARD_NAME).text, extensions=["tables", "fenced_code"])
    with tempfile.NamedTemporaryFile("w", suffix=".html", dir=out, encoding="utf-8") as card:
        card.write(f"<!DOCTYPE html><meta charset='utf-8'><style>{CARD_STYLE}</style>{text}")
        card.flush()
        shoot(Path(card.name).resolve(), IMAGES / "card.png", 940, 1500)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
