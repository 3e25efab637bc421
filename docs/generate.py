"""Write the generated parts of the documentation: the tables of recipe.md and models.md, the output in session.md.

    python docs/generate.py

A part stands between two comments with its name. `tests/test_docs.py` fails if a page is not what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from mergekit_slta.recipe.objectives import OBJECTIVES  # noqa: E402
from mergekit_slta.recipe.settings import Settings, TaskSettings  # noqa: E402

LAMBDA = (
    "| `lambda` | a number | 1.0 | Multiplies every weight at merge time. The one key that may have filters and "
    "gradients, as mergekit's own parameters. |"
)
STATED_DEFAULTS = {"text": "found from the columns", "chat_template": "see right", "alphas": "`OUT/slta_alphas.json`"}
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "`true`, `false`"}


def values_of(kind: Any) -> list[str]:
    """What a key may be: literals as they are written, and types in words."""
    if get_origin(kind) is Annotated:
        return values_of(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [value for part in get_args(kind) for value in values_of(part)]
    if get_origin(kind) is Literal:
        return [f"`{value}`" for value in get_args(kind)]
    return [] if kind is type(None) else [WORDS[kind.__name__]]


def bounds_of(metadata: Iterable[Any]) -> Iterable[str]:
    """The limits of a number."""
    for bound in metadata:
        if isinstance(bound, Ge):
            yield f"{bound.ge} or more"
        elif isinstance(bound, Gt):
            yield f"above {bound.gt}"
        elif isinstance(bound, Lt) and bound.lt < 2**63:
            yield f"below {bound.lt}"
        elif isinstance(bound, FieldInfo):
            yield from bounds_of(bound.metadata)
        elif get_origin(bound) is Annotated:
            yield from bounds_of(get_args(bound)[1:])


def shown(value: object) -> str:
    """A default as a recipe would have it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, (bool, int, float)) else f"`{value}`"


def descriptions_of(model: type[BaseModel]) -> dict[str, str]:
    """Key -> the docstring below it."""
    (defined,) = ast.parse(inspect.getsource(model)).body
    return {
        key.target.id: " ".join(below.value.value.split())
        for key, below in pairwise(defined.body)
        if isinstance(key, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def rows_of(model: type[BaseModel], skip: Iterable[str] = ()) -> str:
    """A table of the keys of one model of settings."""
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    descriptions = descriptions_of(model)
    for key, field in model.model_fields.items():
        if key in skip:
            continue
        values = values_of(field.annotation)
        if key == "objective":
            values = [f"`{name}`" for name in OBJECTIVES]
        bounds = [*bounds_of(field.metadata), *(b for part in get_args(field.annotation) for b in bounds_of([part]))]
        default = STATED_DEFAULTS.get(key, shown(field.default))
        for name, row in OBJECTIVES.items() if model is Settings else ():
            if key in row.defaults:
                default += f"; `{name}`: {shown(row.defaults[key])}"
        lines.append(f"| `{key}` | {', '.join(values + bounds)} | {default} | {descriptions[key]} |")
    return "\n".join(lines)


def parts() -> dict[str, dict[str, str]]:
    """Page -> name of a part -> its text."""
    from zoo import table

    own = {f"keys of {name}": rows_of(row.settings) for name, row in OBJECTIVES.items() if row.settings.model_fields}
    shared = rows_of(Settings, skip=("own", "stated")) + "\n" + LAMBDA
    return {
        "recipe.md": {"keys of a model": rows_of(TaskSettings), "keys of all": shared, **own},
        "models.md": {"architectures": table()},
        "session.md": {
            "session": f"```text\n{(DOCS / 'output' / 'session.txt').read_text(encoding='utf-8').strip()}\n```"
        },
    }


def filled(page: str, text: str) -> str:
    """A page with its generated parts."""
    for name, content in parts()[page].items():
        begin, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        pattern = re.escape(begin) + r"(.*?\n)??" + re.escape(end.strip())
        text, found = re.subn(pattern, lambda _, new=begin + content + end: new, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{page}: no part `{name}`")
    return text


if __name__ == "__main__":
    for page in parts():
        path = DOCS / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
