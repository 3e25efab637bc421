"""mergekit's plan of a merge."""

from __future__ import annotations

from conftest import read, refused

from mergekit_slta.errors import ModelError
from mergekit_slta.job.preflight import prepare


def test_what_mergekit_cannot_plan(tiny, options, monkeypatch):
    """A plan that mergekit refuses to make is refused with its own words."""

    def fail(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr("mergekit.plan.MergePlanner", fail)
    with refused(ModelError, "cannot-plan", "no such thing"):
        prepare(read(tiny.recipe()), options)
