"""Write the section about a merge for the model card, in Markdown.

Scope: makes text from an alphas file. Names may come from strangers' recipes, so each is shown as inline code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import (
    REROUTED,
    TOO_FEW_ROWS,
    Alphas,
    SubmoduleAlphas,
    describe_far,
    describe_loss,
    describe_no_better,
    describe_ridge,
)
from mergekit_slta.files.evaluation import EVALUATION_HEADER, describe_flags, evaluation_cells, evaluation_note
from mergekit_slta.files.merge_record import Took
from mergekit_slta.files.names import ALPHAS_NAME, MERGED_RECIPE_NAME
from mergekit_slta.recipe.objectives import OBJECTIVES, ObjectiveRow, all_shared_keys
from mergekit_slta.runtime.clock import describe_phases

START, END = "<!-- mergekit-slta: begin -->", "<!-- mergekit-slta: end -->"
_SECTION = re.compile(re.escape(START) + "(?:(?!" + re.escape(START) + ").)*?" + re.escape(END), re.DOTALL)
_MOST_FLAGS = 20
"""At most this many submodules are named per flag; the others are counted."""
_KINDS = {
    "model": "whole model",
    "layer": "decoder layers",
    "attention": "attention blocks",
    "attention_head": "attention heads",
    "mlp": "MLP blocks",
    "linear": "matrices",
    "norm": "norms",
}
_MEANINGS = {
    "unchanged": "an expert equals the base here; its weight is 0",
    "rank_deficient": "experts change the same thing here; of all solutions the one of smallest norm was taken",
    "ill_conditioned": "experts are hard to tell apart here; the weights may be far off (`ridge` helps)",
    "extreme": "weights outside [-0.5, 1.5] (`ridge`, more rows or a coarser `granularity` reduce them)",
    "nonlinear": "the measured residual differs from the one that linearity predicts",
}


def replace_section(card: str, section: str) -> str:
    """Replace the section in a card, or append it if there is none."""
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    return card.rstrip("\n") + "\n\n" + section + "\n" if card.strip() else section + "\n"


def section(
    alphas: Alphas, figures: Sequence[tuple[str, str]], scale: float | None = 1.0, took: Took | None = None
) -> str:
    """Write the section, with the two markers around it.

    Args:
        alphas: the alphas of the merge.
        figures: description and file name (beside the card) of each figure.
        scale: the recipe's `lambda`, which multiplies every weight; None if it differs between tensors.
        took: what the merge took.
    """
    measured = any(entry.residual_measured is not None for entry in alphas.submodules)
    parts = [
        START,
        "## Submodule-wise merge (SLTA)",
        _source(alphas),
        f"Base: {code(alphas.base_model)}. {len(alphas.submodules)} submodules, granularity "
        f"{code(alphas.granularity)}, merged with mergekit-slta {show(alphas.provenance.get('mergekit_slta', ''))} and "
        f"mergekit {show(alphas.provenance.get('mergekit', ''))}.",
        *_directions(alphas),
        *([_scaled(scale)] if scale != 1.0 else []),
        "### Calibration",
        _calibration(alphas),
        *([_took(took)] if took is not None else []),
        *_evaluation(alphas),
        "### Weights",
        _weights(alphas, measured),
        *(f"![{description}]({name})" for description, name in figures),
        _residual_note(alphas, measured),
        "### Flagged",
        _flagged(alphas),
        "### Reproduce",
        _reproduce(alphas),
        END,
    ]
    return "\n\n".join(parts)


def _took(took: Took) -> str:
    threads = f", {took.threads} thread{'s' * (took.threads != 1)}" if took.device == "cpu" else ""
    memory = "" if took.device_bytes is None else f", {took.device_bytes / 2**30:.1f} GiB of its memory"
    return f"The merge took {show(describe_phases(took.seconds), 200)} (on {code(took.device)}{threads}{memory})."


def _scaled(scale: float | None) -> str:
    factor = "the recipe's `lambda`, which differs between tensors," if scale is None else f"`lambda` = {scale:g}"
    return f"All weights below were multiplied by {factor} in the merge."


def code(value: object) -> str:
    """Format any text as inline code on one line; safe inside a table."""
    text = show(value, 120).replace("`", "'").replace("|", "¦").strip()
    return f"`{text or ' '}`"


def _table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A Markdown table; the first `names` columns are aligned left, the others right."""
    header, *body = rows
    lines = [header, ["---"] * names + ["---:"] * (len(header) - names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _calibration(alphas: Alphas) -> str:
    used = alphas.calibration
    tasks = used.get("tasks", [])
    measured = any(task.get("loss_expert") is not None for task in tasks)
    rows = [["expert", "data", "rows", "tokens", "SHA-256 of the rows", *["base's loss", "expert's loss"] * measured]]
    for task in tasks:
        data = " ".join(str(task[key]) for key in ("dataset", "dataset_config", "split") if task.get(key))
        rows.append(
            [
                code(task["model"]),
                code(data),
                str(len(task["rows"])),
                str(task["tokens"] or "-"),
                code(str(task["sha256"] or "-")[:16]),
                *[describe_loss(task.get(key)) for key in ("loss_base", "loss_expert") if measured],
            ]
        )
    settings = [
        f"{key} {code(describe_ridge(used) if key == 'ridge' else used[key])}"
        for key in all_shared_keys()
        if key in used
    ]
    parts = [_table(rows, names=2) if tasks else "No calibration data."]
    parts += [f"**Warning.** {line}." for line in describe_no_better(used, code)]
    parts += [f"**Warning.** {line}" for line in describe_far(used, code)]
    if measured:
        measure = "means over the rows that were measured (under `features` a task's first 10)"
        parts.append(f"Losses are in nats per token of the answers, {measure}.")
    if any(REROUTED in task for task in tasks):
        shares = ", ".join(f"{code(task['model'])} {task[REROUTED]:.1%}" for task in tasks if REROUTED in task)
        parts.append(f"Tokens that the merge sends to other experts (MoE) than the task's model does: {shares}.")
    parts += [f"{', '.join(settings)}."] if settings else []
    return "\n\n".join(parts)


def _evaluation(alphas: Alphas) -> list[str]:
    """How far the merge is from the experts on held-out rows."""
    found = alphas.evaluation
    if found is None:
        tasks = alphas.calibration.get("tasks", ())
        few = ", ".join(code(task["model"]) for task in tasks if TOO_FEW_ROWS in task.get("flags", ()))
        start = " So no step could be measured: the weights are those of `features`." * bool(
            alphas.calibration.get("steps")
        )
        return ["### How good it is", f"Not measured: too few rows to hold any out of {few}.{start}"] if few else []
    table = _table(
        [["expert", *EVALUATION_HEADER], *([code(task.model), *evaluation_cells(task)] for task in found.tasks)]
    )
    warnings = [f"**Warning.** {line}." for line in describe_flags(found, code, fitted=alphas.is_fitted)]
    note = (
        "On rows that were not fitted. The divergence is KL(expert ‖ model) in nats, summed over a row's answer; the "
        f"share is what is left of the base's. Losses are in nats per token; {evaluation_note(found)}."
    )
    return ["### How good it is", table, *warnings, note]


def _objective(alphas: Alphas) -> ObjectiveRow | None:
    """The row of the objective that the weights minimise; None if this installation does not know it."""
    return OBJECTIVES.get(str(alphas.calibration.get("objective")))


def _source(alphas: Alphas) -> str:
    """What the model is made of, and where the weights come from."""
    if not alphas.is_fitted:
        return (
            "This model is a closed form of the experts' weights alone: no row was read, and nothing was trained or "
            "tuned."
        )
    return (
        "Every submodule of this model is `base + α₁ · (expert₁ - base) + α₂ · (expert₂ - base) + …`. Its weights α "
        f"come in closed form from a few calibration rows per task{_solves(alphas)}, without training or tuning "
        "([Leveraging Submodule Linearity Enhances Task Arithmetic Performance in LLMs]"
        "(https://arxiv.org/abs/2504.10902), ICLR 2025)."
    )


def _directions(alphas: Alphas) -> list[str]:
    """What the models without a task are."""
    lines = [
        f"{code(direction.model)} is a direction: "
        + ("computed from the weights of base and experts (SWUDI-A, arXiv 2606.07289)." if direction.closed_form
           else "a model without a task; its weights were found from the rows of the others.")
        for direction in alphas.directions
    ]  # fmt: skip
    return ["\n\n".join(lines)] if lines else []


def _solves(alphas: Alphas) -> str:
    """How many steps were taken, as part of a sentence."""
    count = sum(point.ridge is not None for point in alphas.evaluation.points) if alphas.evaluation else 0
    return f", in {count} Gauss-Newton step{'s' * (count > 1)}" if count else ""


def _weights(alphas: Alphas, measured: bool) -> str:
    header = ["submodules", "number", *(code(model) for model in alphas.models), "residual"]
    rows = [header + ["measured"] * measured]
    for label, members in _groups(alphas):
        cells = [label, str(len(members))]
        for column in range(len(alphas.models)):
            values = [entry.alpha[column] for entry in members]
            low, high = min(values), max(values)
            mean_std = f" ({low:.2f} to {high:.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{mean_std}")
        residuals = [entry.residual for entry in members if entry.residual is not None]
        cells.append(f"{sum(residuals) / len(residuals):.3f}" if residuals else "-")
        if measured:
            found = [entry.residual_measured for entry in members if entry.residual_measured is not None]
            cells.append(f"{sum(found) / len(found):.3f}" if found else "")
        rows.append(cells)
    return _table(rows)


def _groups(alphas: Alphas) -> list[tuple[str, list[SubmoduleAlphas]]]:
    """Group submodules by kind and third of the depth, in the order of a forward pass: (label, members)."""
    num_layers = 1 + max((entry.layer for entry in alphas.submodules if entry.layer is not None), default=-1)
    groups: dict[tuple[int, str], list[SubmoduleAlphas]] = {}
    for entry in alphas.submodules:
        third = -1 if entry.layer is None else 3 * entry.layer // num_layers
        groups.setdefault((third, entry.kind), []).append(entry)
    kinds = list(dict.fromkeys(entry.kind for entry in alphas.submodules if entry.layer is not None))
    ordered = [("embeddings", groups.get((-1, "embed"))), (_KINDS["model"], groups.get((-1, "model")))]
    for kind in kinds:
        for third in range(3):
            members = groups.get((third, kind), [])
            layers = sorted({entry.layer for entry in members if entry.layer is not None})
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}" if layers else ""
            ordered.append((f"{_KINDS.get(kind, kind)}, layers {span}", members))
    ordered += [("final norm", groups.get((-1, "norm"))), ("head", groups.get((-1, "head")))]
    return [(label, members) for label, members in ordered if members]


def _residual_note(alphas: Alphas, measured: bool) -> str:
    row = _objective(alphas)
    text = "Weights are means over the submodules, with their range."
    if row is not None:
        text += f" {row.residual}"
        if row.settings.measures_residuals and not measured:
            text += " It is predicted from linearity; `mergekit-slta merge --verify` also measures it."
    return text


def _flagged(alphas: Alphas) -> str:
    flagged = [entry for entry in alphas.submodules if entry.flags]
    if not flagged:
        return "Nothing."
    lines = []
    for flag in dict.fromkeys(flag for entry in flagged for flag in entry.flags):
        names = [entry.name for entry in flagged if flag in entry.flags]
        rest = f" and {len(names) - _MOST_FLAGS} more" if len(names) > _MOST_FLAGS else ""
        meaning = f" ({_MEANINGS[flag]})" if flag in _MEANINGS else ""
        lines.append(f"- {code(flag)}{meaning}: {', '.join(code(name) for name in names[:_MOST_FLAGS])}{rest}")
    return "\n".join(lines)


def _reproduce(alphas: Alphas) -> str:
    own = (
        "With the plugin, from the recipe (the models and data named above must be at hand):\n\n"
        f"```sh\npip install mergekit-slta\nmergekit-yaml {MERGED_RECIPE_NAME} out/\n```"
    )
    if alphas.granularity == "head_mlp":
        return own + "\n\nA stock mergekit recipe cannot express weights of single attention heads."
    return own + (
        "\n\nWithout it: this writes a stock mergekit recipe with all weights in it, which gives the same merge.\n\n"
        f"```sh\nmergekit-slta export {ALPHAS_NAME} -o stock.yml\nmergekit-yaml stock.yml out/\n```"
    )
