"""A table of merges of the same experts, with standard errors and intervals of a paired bootstrap (`paired`).

Scope: from the scores of single rows to Markdown and data. A method without calibration rows has one draw, which stands
beside every draw of the others; two methods are compared on the draws that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from formatting import number, table
from paired import MEASURES, Estimate, Scores, Values, bootstrap
from shared import write_json

Draws = Mapping[int | None, Scores]
"""Seed of the calibration rows -> scores; None: there are no calibration rows."""
TITLES = {"mean": "mean", "worst": "worst task", "divergence": "divergence left"}
ABOUT = (
    "Share of the gap in loss between base and experts that a merge recovers, in %: mean of the tasks, and worst task. "
    "Divergence left: KL from the expert, as a share of the base's, mean of the tasks. Value ± standard error (95% "
    "interval) by a paired bootstrap over test rows and draws of calibration rows; differences are on the draws that "
    "both have."
)


def percent(estimate: Estimate, form: str = ".1f") -> str:
    """Value, standard error and interval in percent."""
    parts = (estimate.value, estimate.error, estimate.low, estimate.high)
    value, error, low, high = (number(None if part is None else 100 * part, form) for part in parts)
    return f"{value} ± {error} ({low} to {high})"


def common(one: Draws, other: Draws) -> tuple[list[Scores], list[Scores]]:
    """The scores of two methods on the draws that both have."""
    if None in one:
        return [one[None]] * len(other), [*other.values()]
    if None in other:
        return [*one.values()], [other[None]] * len(one)
    seeds = [seed for seed in one if seed in other]
    return [one[seed] for seed in seeds], [other[seed] for seed in seeds]


def difference(base: Scores, experts: Scores, one: Draws, other: Draws) -> dict[str, Estimate]:
    """One method minus another, by measure; empty where they have no draw in common."""
    pair = dict(zip(("one", "other"), common(one, other), strict=True))
    if not pair["one"]:
        return {}
    found = bootstrap(base, experts, pair)
    return {key: Estimate.of(found["one"][key] - found["other"][key]) for key in MEASURES}


def compare(
    base: Scores, experts: Scores, methods: Mapping[str, Draws], against: str | None
) -> tuple[str, dict[str, Any]]:
    """The table and its data.

    Args:
        base: scores of the base, by task.
        experts: scores of each task's own expert.
        methods: scores of every draw, by the method's name.
        against: the method that the others are compared with; None: there are no differences.
    """
    rows, data = [], {}
    for name, draws in methods.items():
        values: Values = bootstrap(base, experts, {name: [*draws.values()]})[name]
        own = {key: Estimate.of(value) for key, value in values.items()}
        cells = [name, "–" if None in draws else str(len(draws)), *(percent(own[key]) for key in MEASURES)]
        entry: dict[str, Any] = {"draws": [*draws], **{key: asdict(value) for key, value in own.items()}}
        if against in methods:
            found = {} if name == against else difference(base, experts, draws, methods[against])
            cells += [percent(found[key]) if found else "" for key in MEASURES]
            entry["difference"] = {key: asdict(value) for key, value in found.items()}
        rows.append(cells)
        data[name] = entry
    header = ["", "draws", *TITLES.values()]
    if against in methods:
        header += [f"{title} − `{against}`" for title in TITLES.values()]
    return f"{ABOUT}\n\n{table(header, rows)}\n", data


def publish(text: str, data: Mapping[str, Any], output: Path | None) -> None:
    """Print a table; with `output` also write it there, and its data beside it as JSON."""
    if output:
        output.write_text(text, encoding="utf-8")
        write_json(output.with_suffix(".json"), data)
    click.echo(text)
