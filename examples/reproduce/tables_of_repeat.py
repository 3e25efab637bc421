"""The table of a run that was repeated with other experts, and how much of the order of the methods it keeps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from claims import percent
from evidence_run import Run
from formatting import section, table
from gaps import Evidence, Result
from methods import ALL
from tables_of_scores import main_rows, mean_and_worst

REPEAT = "python examples/reproduce/repeat.py WORK/results.json AGAIN"


def other_experts(run: Run) -> str | None:
    """The main comparison with experts that were trained a second time."""
    if run.repeated is None:
        return None
    known: list[tuple[str, list[Result], list[Result]]] = []
    for row in main_rows(run.evidence, "test"):
        first = row.of(ALL)
        again = run.repeated.group(ALL, first[0]["method"], first[0]["settings"]) if first else []
        values = [run.evidence.mean(result) for result in first] + [run.repeated.mean(result) for result in again]
        if again and None not in values:
            known.append((row.title, first, again))
    lines = [
        [name, mean_and_worst(run.evidence, first), mean_and_worst(run.repeated, again)] for name, first, again in known
    ]
    about = (
        "Share of the gap recovered of all tasks, in %: mean / worst. Again: rows split anew, experts trained anew, "
        "one draw of calibration rows. The settings of the others are those that were best on the test rows of the "
        "first run, and need not be best again; submodule_linear has nothing to choose. AGAIN/results.json lies "
        "beside the first run's as repeated.json."
    )
    parts = [about, table(["method", "first", "again"], lines)]
    for label in ("mean", "worst"):
        values = [
            (name, _mean(run.evidence, label, first), _mean(run.repeated, label, again)) for name, first, again in known
        ]
        parts.append(f"By the {label}: {order_kept(values)}")
    return section("The main comparison with other experts", *parts, command=REPEAT)


def _mean(evidence: Evidence, label: str, results: Sequence[Result]) -> float:
    return statistics.fmean(getattr(evidence, label)(result) for result in results)


def order_kept(values: Sequence[tuple[str, float, float]]) -> str:
    """How many pairs of methods come out in the same order twice, and which do not.

    Args:
        values: (name, first value, second value).
    """
    pairs = list(itertools.combinations(values, 2))
    turned = [(one, other) for one, other in pairs if not (one[1] - other[1]) * (one[2] - other[2]) > 0]
    text = f"{len(pairs) - len(turned)} of {len(pairs)} pairs of methods are in the same order both times"
    named = [
        f"{one[0]} and {other[0]} ({', then '.join(percent(one[i] - other[i], sign=True) for i in (1, 2))})"
        for one, other in turned
    ]
    return f"{text}; not {'; '.join(named)}." if turned else f"{text}."
