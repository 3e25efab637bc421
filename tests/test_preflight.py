"""What is looked at before the first weight is read."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from conftest import read, refused

from mergekit_slta.errors import DataError, RecipeError
from mergekit_slta.job.preflight import prepare


def test_a_base_without_a_tokenizer(tiny, options, tmp_path):
    """A base whose folder holds no tokenizer is refused before anything is computed."""
    shutil.copytree(tiny.base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    recipe = tiny.recipe()
    recipe["base_model"] = str(tmp_path / "base")
    with refused(DataError, "unreadable-tokenizer", tmp_path / "base"):
        prepare(read(recipe), options, for_merge=False)


def test_narrow_precision_is_warned_of(tiny, options, caplog):
    """Differences of outputs cancel in bfloat16: that is said, and not said of float32."""
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe()), options, for_merge=False)
    assert "cancel badly" not in caplog.text
    with caplog.at_level("WARNING"):
        prepare(read(tiny.recipe(compute_dtype="bfloat16")), options, for_merge=False)
    assert "compute_dtype bfloat16: differences of outputs cancel badly" in caplog.text


@pytest.mark.parametrize(
    "template",
    ["auto", "chatml", "{% for message in messages %}{{ message }}{% endfor %}", "no-such-template", "short {"],
)
def test_chat_templates(tiny, options, template):
    """A name that mergekit knows or a Jinja template; anything else is refused before mergekit would write it down."""
    recipe = read({**tiny.recipe(2), "chat_template": template})
    is_unknown = template in ("no-such-template", "short {")
    with refused(RecipeError, "invalid-value", "chat_template", template) if is_unknown else contextlib.nullcontext():
        prepare(recipe, options)
