"""Errors: every one has a code, and every code one exit code, one wording in tests/wording.py, one row in docs."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import slta
from wording import WORDING

from mergekit_slta import errors
from mergekit_slta.errors import SltaError, path_hint

ROOT = Path(__file__).resolve().parents[1]
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "mergekit_slta").rglob("*.py"))
    if path.name != "errors.py"
}
ROW = re.compile(r"\| `(?P<code>[^`]+)` \| (?P<exit>\d+) \| (?P<what>[^|]+) \| (?P<remedy>[^|]+) \|")


def codes_of(value: ast.expr, tree: ast.Module) -> Iterator[str]:
    """The codes that an expression may be: a text, a name that this file assigns texts to, or a call of a function
    `..._code` that returns texts."""
    if isinstance(value, ast.Constant):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from codes_of(value.body, tree)
        yield from codes_of(value.orelse, tree)
    elif isinstance(value, ast.Name):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == value.id for target in node.targets):
                yield from codes_of(node.value, tree)
    else:
        assert isinstance(value, ast.Call), ast.unparse(value)
        for each in TREES.values():
            for node in ast.walk(each):
                if isinstance(node, ast.FunctionDef) and node.name == value.func.id:
                    for end in ast.walk(node):
                        if isinstance(end, ast.Return):
                            yield from codes_of(end.value, each)


def exit_codes() -> dict[str, set[int]]:
    """Code -> the exit codes of the errors that are made with it anywhere in the package."""
    found = defaultdict(set)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            kind = getattr(errors, node.func.id, None) if getattr(node, "func", None).__class__ is ast.Name else None
            if not (isinstance(kind, type) and issubclass(kind, SltaError)):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            assert len(given) == 1, f"{path}:{node.lineno}: an error without a code"
            codes = list(codes_of(given[0], tree))
            assert codes, f"{path}:{node.lineno}: {ast.unparse(given[0])}"
            for code in codes:
                found[code].add(kind.exit_code)
    return found


EXIT_CODES = exit_codes()
DOCUMENTED = [match.groupdict() for match in ROW.finditer((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))]


def test_codes_are_in_kebab_case():
    """Lower-case words with hyphens."""
    for code in EXIT_CODES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", code), code


def test_a_code_has_one_exit_code():
    """Whoever reads `error.code` knows whether the input was bad or the run failed."""
    assert {code: found for code, found in EXIT_CODES.items() if len(found) > 1} == {}


def test_every_code_has_a_wording():
    """The table of the tests has each code of the package and no other, and is in order."""
    assert list(WORDING) == sorted(EXIT_CODES)
    for wording in WORDING.values():
        re.compile(wording)


def test_every_code_is_documented():
    """docs/errors.md has each code of the package once, with its exit code, and no other, and is in order."""
    assert [row["code"] for row in DOCUMENTED] == sorted(EXIT_CODES)
    for row in DOCUMENTED:
        assert {int(row["exit"])} == EXIT_CODES[row["code"]], row


def test_every_code_is_tried():
    """Some test names it."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [code for code in EXIT_CODES if f'"{code}"' not in tests] == []


def test_a_code_is_required():
    """An error cannot be made without one."""
    with pytest.raises(TypeError, match="code"):
        SltaError("something is wrong")  # type: ignore[call-arg]


@pytest.mark.parametrize(("length", "shown"), [(9, "x" * 9), (10, "x" * 10), (11, "x" * 9 + "…")])
def test_what_is_too_long_is_cut_and_nothing_else(length, shown):
    """A value of the longest length is shown whole."""
    assert errors.show("x" * length, 10) == shown


def test_a_path_to_nothing_names_the_one_that_is_meant(tmp_path, monkeypatch):
    """The name that is spelled nearly like it, at whatever level; only if it leads somewhere."""
    (tmp_path / "models" / "math").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for typo in ("models/maht", "modles/math", "Models/math", "./models/maths"):
        hint = path_hint(typo)
        assert hint == f"(paths start at the current folder; did you mean {Path('models/math')}?)"
    assert path_hint(tmp_path / "models" / "mat") == (
        f"(paths start at the current folder; did you mean {tmp_path / 'models' / 'math'}?)"
    )
    for other in ("words", "modles/words", "org/name", "", "\0"):
        assert path_hint(other) == "(paths start at the current folder)"


@pytest.mark.parametrize(("typo", "command"), [("chek", "check"), ("Merge", "merge"), ("exports", "export")])
def test_a_mistyped_command_names_the_one_that_is_meant(typo, command):
    result = slta(typo)
    assert result.exit_code == 2
    assert f"No such command '{typo}': did you mean {command}?" in result.output
    assert "did you mean" not in slta("zzz").output
