"""mergekit's plan of a merge."""

from __future__ import annotations

from conftest import read, refused

from mergekit_slta.checkpoints.plan import make_plan
from mergekit_slta.errors import ModelError


def test_what_mergekit_cannot_plan(tiny, options, monkeypatch):
    """A plan that mergekit refuses to make is refused with its own words."""

    def fail(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr("mergekit.plan.MergePlanner", fail)
    with refused(ModelError, "cannot-plan", "no such thing"):
        make_plan(read(tiny.recipe()), options)
