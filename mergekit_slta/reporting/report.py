"""Draw the figures of saved files, and write the section about a merge into its model card.

Scope: finding the input files, and writing figures and cards.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load, metadata_save

from mergekit_slta.calibration.resolve import solve_again
from mergekit_slta.errors import AlphasError, OutputError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.atomic import write_atomically, write_text_atomically
from mergekit_slta.files.linearity_file import Linearity, is_linearity_file
from mergekit_slta.files.merge_record import (
    has_record,
    hash_in,
    record,
    recorded,
    recorded_sources,
    recorded_took,
)
from mergekit_slta.files.names import ALPHAS_NAME, CARD_NAME, LINEARITY_NAME, MERGED_RECIPE_NAME, PAGE_NAME, figure_name
from mergekit_slta.files.statistics_file import Statistics, is_statistics_file
from mergekit_slta.files.targets import check_overwrite, check_writable
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.settings import METHOD
from mergekit_slta.reporting.card import replace_section, section
from mergekit_slta.reporting.figures.draw import draw
from mergekit_slta.reporting.metadata import front_matter, licenses_differ
from mergekit_slta.reporting.names import PublicNames
from mergekit_slta.reporting.page import is_page, write_page
from mergekit_slta.reporting.public_recipe import public_recipe
from mergekit_slta.reporting.rows_seen import rows_as_seen
from mergekit_slta.reporting.usage import Usage
from mergekit_slta.reporting.written_rows import describe_written_rows

LOG = logging.getLogger(__name__)
_DESCRIPTIONS = {
    figure_name("alphas"): "Merging weights over the depth of the model",
    figure_name("residuals"): "Share of the experts' change that is lost, over the depth of the model",
    figure_name("divergence"): "Divergence of the merge from every expert over the steps, on held-out rows",
    figure_name("levels"): "Linearity of the whole model and of its submodules",
}
"""Figures of the card, by file name."""


def report(target: Path, folder: Path | None = None, *, html: bool = False) -> list[Path]:
    """Draw the figures of a file or of a merged model's folder; a merged model's card also gets its section.

    A README that neither a merge of this package nor mergekit wrote is left as it is.

    Args:
        target: an alphas, statistics or linearity file, or a folder that holds a merge.
        folder: folder for the figures; None writes them beside the files. If it is given, no card is written.
        html: also write the page `slta_report.html`; it replaces only a page of this package.

    Returns:
        The files that were written.

    Raises:
        AlphasError: there is nothing to draw from, or a file is damaged.
        OutputError: a figure or the card cannot be written, `folder` is a file, or the card's front matter is not YAML.
    """
    if folder is not None:
        if folder.suffix.lower() in (".html", ".png", ".svg") and not folder.is_dir():
            raise OutputError(
                f"{show(folder)} is a file; name a folder: {PAGE_NAME} is written there", code="not-a-folder"
            )
        check_writable(folder)
    beside = target if target.is_dir() else target.parent
    page = (folder or beside) / PAGE_NAME
    if html:
        check_overwrite(page, "page of this package", is_page, remedy="choose another folder with -o")
    alphas, linearity = _read(target)
    written: list[Path] = []
    for source in (alphas, linearity):
        written += draw(source, folder or beside) if source is not None else []
    has_merge = target.is_dir() and alphas is not None and has_record(target)
    if has_merge and folder is None:
        written += _update_card(target)
    if html:
        title = target.resolve().name if target.is_dir() else target.name
        write_text_atomically(page, write_page(title, alphas, linearity, **_about(target, alphas) if has_merge else {}))
        written.append(page)
        if has_merge and folder is None:
            record(target, [PAGE_NAME])  # a later merge removes it
    return written


def _about(out: Path, alphas: Alphas) -> dict[str, Any]:
    """What a page says of a merge besides its alphas."""
    names = PublicNames.of_alphas(alphas, recorded_sources(out))
    rows = rows_as_seen(out, alphas, names)
    return {"names": names, "scale": _scale(out), "took": recorded_took(out), "rows": rows}


def _read(target: Path) -> tuple[Alphas | None, Linearity | None]:
    """The alphas and the linearity of a file, or of a folder.

    Raises:
        AlphasError: there are none, or a file is damaged.
    """
    if not target.is_dir():
        if is_linearity_file(target):
            return None, Linearity.load(target)
        if is_statistics_file(target):
            return solve_again(Statistics.load(target)), None
        return Alphas.load(target), None
    alphas, linearity = target / ALPHAS_NAME, target / LINEARITY_NAME
    if not alphas.is_file() and not linearity.is_file():
        raise AlphasError(
            f"{show(target)} holds neither {ALPHAS_NAME} nor {LINEARITY_NAME}: name a merged model's folder, or a file",
            code="nothing-to-draw",
        )
    return (
        Alphas.load(alphas) if alphas.is_file() else None,
        Linearity.load(linearity) if linearity.is_file() else None,
    )


def _update_card(out: Path) -> list[Path]:
    """Write the section into the card of a merge, or make a card if there is none; returns the files that were written.

    What was the merge's stays the merge's: a later merge replaces it.
    """
    path = out / CARD_NAME
    own = recorded(out).get(CARD_NAME)
    if os.path.lexists(path) and (path.is_symlink() or (own is None and not _is_mergekits_card(path))):
        LOG.warning("%s is not from a merge, and is left as it is", show(path))
        return []
    is_unchanged = not path.exists() or hash_in(out, CARD_NAME) == own
    _write_section(out)
    if is_unchanged:
        record(out, [CARD_NAME])
    return [path]


def _is_mergekits_card(path: Path) -> bool:
    """Whether a file has the tag that mergekit gives its model cards."""
    try:
        tags = (metadata_load(path) or {}).get("tags")
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tags, list) and "mergekit" in tags


def add_section(out: Path) -> None:
    """Draw the figures and write the card's section after a merge. A failure is logged and does not fail the merge."""
    try:
        for source in filter(None, _read(out)):
            draw(source, out)
        _write_section(out, is_new=True)
        if licenses_differ(recorded_sources(out)):
            LOG.warning("the licences of the models differ: the model card says which, and claims none for the merge")
    except Exception as error:
        LOG.warning(
            "the model card lacks its section on the merge (%s): `mergekit-slta report OUT` adds it", show(error)
        )


def _write_section(out: Path, *, is_new: bool = False) -> Path:
    """Write the section into the card, and the front matter of a card that is not tagged as one of this method.

    Calling it again changes nothing.

    Args:
        out: the folder of the merge.
        is_new: whether all of the card is mergekit's, which the section replaces.

    Raises:
        OutputError: the card is no file, or its front matter is no YAML.
    """
    path = out / CARD_NAME
    check_overwrite(path, "model card", Path.is_file, remedy="put the model card in its place")
    alphas, sources, name = Alphas.load(out / ALPHAS_NAME), recorded_sources(out), show(out.resolve().name, 100)
    names = PublicNames.of_alphas(alphas, sources)
    usage, recipe = Usage.of(name, out), out / MERGED_RECIPE_NAME
    text = section(
        alphas,
        [(text, figure) for figure, text in _DESCRIPTIONS.items() if (out / figure).is_file()],
        _scale(out),
        recorded_took(out),
        sources=sources,
        usage=usage,
        recipe=public_recipe(recipe.read_text(encoding="utf-8"), names) if recipe.is_file() else None,
        written=describe_written_rows(out, alphas, names),
    )
    card = path.read_bytes().decode("utf-8") if path.exists() and not is_new else f"# {name}\n"
    try:
        given = dict((metadata_load(path) if path.exists() else None) or {})
    except (ValueError, yaml.YAMLError) as error:
        raise OutputError(
            f"the front matter of {show(path)} is no valid YAML ({show(error, 120)}): mend it, then run this again",
            code="not-yaml",
        ) from error
    has_tag = METHOD in (given.get("tags") or ())
    text = replace_section(card, text)
    if path.exists() and text == card and has_tag:
        return path

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8"))
        if not has_tag or is_new:  # otherwise the front matter is not reformatted
            is_causal = usage is not None and usage.is_causal
            kept = {} if is_new else given  # mergekit lists the models in another order in every run
            metadata_save(temporary, front_matter(alphas, names, sources, name, is_causal=is_causal, given=kept))

    write_atomically(path, write)
    return path


def _scale(out: Path) -> float | None:
    """`lambda` of the recipe beside the model; 1 if there is no recipe, None if it differs between tensors."""
    recipe = out / MERGED_RECIPE_NAME
    if not recipe.is_file():
        return 1.0
    found = (load_config(recipe)[0].parameters or {}).get("lambda", 1.0)
    return float(found) if isinstance(found, (int, float)) else None
