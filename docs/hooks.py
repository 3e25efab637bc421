"""What the site needs besides Markdown: links to files outside docs/, and formulas as MathML.

In the repository a page links to `../examples/...`. On the site such a link leads to the repository, and such a picture
is copied. Formulas become MathML when the site is built, which browsers draw without a script.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")
PICTURES = (".png", ".svg")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Add the pictures outside docs/ that a page shows."""
    for page in files.documentation_pages():
        for target in OUTSIDE.findall(page.content_string):
            if target.endswith(PICTURES) and target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files outside docs/ lead to the repository."""

    def link(found):
        target = found[1]
        if target.endswith(PICTURES):
            return f"]({target})"
        kind = "tree" if (ROOT / target.partition("#")[0]).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target})"

    return OUTSIDE.sub(link, markdown)


def on_page_content(html, page, config, files):
    """Turn the formulas that pymdownx.arithmatex marked into MathML."""

    def formula(found):
        return convert(unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline")

    return FORMULA.sub(formula, html)
