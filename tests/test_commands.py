"""The commands themselves."""

from __future__ import annotations

from conftest import assert_refused, slta


def test_a_mistake_of_ours_is_one_line(tiny, write_recipe, monkeypatch):
    """An exception that nobody has foreseen is its name and words in a line; -v shows where."""

    def fail(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("mergekit_slta.job.preflight.prepare", fail)
    result = slta("check", write_recipe(tiny.recipe()))
    assert_refused(result, "unexpected-error", "ZeroDivisionError: division by zero; -v shows where", exit_code=1)
