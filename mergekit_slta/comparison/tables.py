"""The table of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from mergekit_slta.comparison.results import amount
from mergekit_slta.errors import show
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.comparison_file import NO_BETTER, Comparison, Difference
from mergekit_slta.files.evaluation import Measure
from mergekit_slta.files.names import COMPARISON_NAME, COMPARISON_TABLE_NAME, figure_name
from mergekit_slta.reporting.figures.style import path_ends
from mergekit_slta.runtime.screen import Columns, text

_LONGEST_NAME = 24
MARK = "<!-- Written by `mergekit-slta compare`. -->"
"""First line of the Markdown table."""


def describe_comparison(comparison: Comparison) -> list[RenderableType]:
    """The table for a terminal, with notes; the verdict is the last line."""
    header, *cells = _cells(comparison)
    best = [model.kind == "merge" and model.name == comparison.best for model in comparison.scored]
    rows = [[text(cell, "bold") if is_best else cell for cell in row] for row, is_best in zip(cells, best, strict=True)]
    return [Columns(header, rows), "", *map(text, _notes(comparison)), "", text(comparison.verdict, "bold")]


def write_table(comparison: Comparison, out: Path) -> None:
    """Write the Markdown table into the folder of a comparison, after its figure.

    Raises:
        OutputError: it cannot be written.
    """
    names = _task_names(comparison)
    sections = [_markdown(_cells(comparison))]
    for title, field in (
        ("Share of the gap between base and expert that is recovered", "recovered"),
        ("Divergence from the expert, as a share of the base's", "divergence_share"),
        ("Rows with a short answer that is written exactly", "exact"),
    ):
        rows = [
            [model.label, *(_percent(getattr(task, field)) for task in result.tasks)]
            for model, result in zip(comparison.scored, comparison.results, strict=True)
        ]
        sections.append(f"## {title}\n\n{_markdown([['model', *names], *rows])}")
    figure = figure_name("compare")
    shown = [f"![Share of the gap recovered by each merge]({figure})"] * (out / figure).is_file()
    lines = [MARK, "# Comparison of merges", comparison.verdict, *shown, *sections, *_notes(comparison)]
    lines.append(f"Every row's scores: {COMPARISON_NAME}.")
    write_text_atomically(out / COMPARISON_TABLE_NAME, "\n\n".join(lines) + "\n")


def _task_names(comparison: Comparison) -> list[str]:
    return path_ends([task.model for task in comparison.tasks], _LONGEST_NAME)


def _cells(comparison: Comparison) -> list[list[str]]:
    """The header and one row for each model: the loss on each task, and the means."""
    shorts = any(any(task.is_short) for task in comparison.tasks)
    header = ["model", *(f"loss {name}" for name in _task_names(comparison)), "gap recovered"]
    rows = [[*header, *["exact"] * shorts, "diff. from best"]]
    for model, result in zip(comparison.scored, comparison.results, strict=True):
        exact = [task.exact.mean for task in result.tasks if task.exact is not None]
        difference = (
            "(best)"
            if model.kind == "merge" and model.name == comparison.best
            else _difference_cell(comparison, result.difference_from_best)
        )
        rows.append(
            [
                show(model.label, 48),
                *(_number(task.loss) for task in result.tasks),
                _percent(result.recovered),
                *([f"{100 * sum(exact) / len(exact):.0f}%"] if shorts else []),
                "" if model.kind != "merge" else difference,
            ]
        )
    return rows


def _number(measure: Measure | None) -> str:
    if measure is None:
        return "not finite"
    return f"{measure.mean:.3f}" + ("" if measure.stderr is None else f" ± {measure.stderr:.3f}")


def _percent(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    return f"{100 * measure.mean:.0f}%" + (f" ± {100 * measure.stderr:.0f}%" if measure.stderr else "")


def _difference_cell(comparison: Comparison, difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return amount(comparison, Measure(mean=difference.mean, stderr=difference.stderr)) + ", level" * difference.is_level


def _notes(comparison: Comparison) -> list[str]:
    counts = sorted({len(task.rows) for task in comparison.tasks})
    rows = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    has_gap = any(NO_BETTER not in task.flags for task in comparison.tasks)
    unit = " as a share of the gap" if has_gap else ""
    lines = [
        f"Scored on {rows} held-out rows per task; no merge was fitted to them or chosen by them. Losses are in nats "
        "per token of the answer, ± one standard error over rows.",
        "Gap recovered: 0% is the base's loss, 100% the expert's; the mean over tasks. Diff. from best: the difference "
        f"on the same rows{unit}; level: its 95% interval includes 0.",
    ]
    flagged = [task.model for task in comparison.tasks if NO_BETTER in task.flags]
    lines += [
        f"{show(model)}: the expert is no better than the base on these rows, so that there is no gap to recover; the "
        "task is left out of the means. Do its rows have the format that it was trained on?"
        for model in flagged
    ]
    return lines


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
