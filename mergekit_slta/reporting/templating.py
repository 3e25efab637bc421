"""The templates of cards and pages."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


@cache
def environment(*, autoescape: bool) -> Environment:
    """The templates in `reporting/templates`.

    Args:
        autoescape: whether values are escaped for HTML. Cards are Markdown: each value is escaped where it is made.
    """
    found = Environment(
        loader=PackageLoader("mergekit_slta.reporting"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "code_marks": code_marks}
    return found


def source_of(name: str) -> str:
    """The text of a file beside the templates."""
    loaded = environment(autoescape=True)
    assert loaded.loader is not None
    return loaded.loader.get_source(loaded, name)[0]


def number(value: float | None, form: str = ".3g") -> str:
    """A number in a table; "-" if there is none."""
    return "-" if value is None else format(value, form)


def code_marks(text: str) -> Markup:
    """Escape a message for HTML, and show what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part)
        if place % 2 and place < len(parts) - 1
        else Markup("`") * (place % 2) + part
        for place, part in enumerate(parts)
    )
