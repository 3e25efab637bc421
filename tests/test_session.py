"""The commands of docs/session.md, one after the other, on tiny models in the places of the demo's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from conftest import mergekit_yaml, slta

PAGE = Path(__file__).resolve().parent.parent / "docs" / "session.md"
QUESTIONS = ("question", "answer")
COLUMNS = {"math": QUESTIONS, "words": ("messages",), "numbers": QUESTIONS}
ROWS = 29
"""One fewer than `init` asks for before it chooses `joint`, which takes longer."""


def commands_of(text: str) -> list[list[str]]:
    """The commands of the first transcript of a page."""
    (block,) = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[:1]
    joined = re.sub(r"\\\n\s*", "", block)
    return [shlex.split(line) for line in re.findall(r"^\$ (.*)", joined, re.MULTILINE)]


def test_the_session_of_the_documentation_runs(plenty, tmp_path, monkeypatch):
    """From models and rows to a merge, a comparison and a page, with no file edited between the commands."""
    monkeypatch.chdir(tmp_path)
    experts = [*plenty.experts, plenty.experts[0]]
    for name, source in zip(("base", *COLUMNS), (plenty.base, *experts), strict=True):
        shutil.copytree(source, tmp_path / "models" / name)
    Path("data").mkdir()
    for (name, columns), source in zip(COLUMNS.items(), [*plenty.datasets, plenty.datasets[0]], strict=True):
        rows = [json.loads(line) for line in source.read_text().splitlines()[:ROWS]]
        for row in rows:
            turns = {"user": row["question"], "assistant": row["answer"]}
            row["messages"] = [{"role": role, "content": content} for role, content in turns.items()]
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (Path("data") / f"{name}.jsonl").write_text("\n".join(lines))
    demo, folder, *commands = commands_of(PAGE.read_text(encoding="utf-8"))
    assert demo == ["mergekit-slta", "demo"]
    assert folder == ["cd", "slta-demo"]
    ran = []
    for program, *arguments in commands:
        result = mergekit_yaml(*arguments) if program == "mergekit-yaml" else slta(*arguments)
        assert result.exit_code == 0, result.output
        ran.append(arguments[0] if program == "mergekit-slta" else program)
    assert ran == ["init", "check", "mergekit-yaml", "compare", "report"]
    assert Path("mine/slta_report.html").stat().st_size > 0
