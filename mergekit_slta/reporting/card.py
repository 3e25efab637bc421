"""Write the section about a merge for the model card, in Markdown.

Scope: makes text from an alphas file, and from what is known of the model's folder; `templates/card.md.jinja` orders
it. Names may come from strangers' recipes, so each is shown as inline code, or is a Hub id. Local paths are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import (
    TOO_FEW_ROWS,
    Alphas,
    SubmoduleAlphas,
    describe_far,
    describe_no_better,
)
from mergekit_slta.files.evaluation import (
    EVALUATION_HEADER,
    describe_flags,
    evaluation_cells,
    evaluation_note,
    percent_left,
)
from mergekit_slta.files.merge_record import Sources, Took
from mergekit_slta.files.names import ALPHAS_NAME, MERGED_RECIPE_NAME
from mergekit_slta.recipe.objectives import FEATURES, OBJECTIVES, ObjectiveRow
from mergekit_slta.recipe.stock_recipe import LORA_CACHE, needs_cache
from mergekit_slta.reporting.attribution import PROJECT, citation, describe_method
from mergekit_slta.reporting.facts import calibration_tasks, flagged, settings_of, shared_residual
from mergekit_slta.reporting.meanings import KINDS
from mergekit_slta.reporting.metadata import describe_license
from mergekit_slta.reporting.names import PublicNames
from mergekit_slta.reporting.templating import environment
from mergekit_slta.reporting.usage import Usage
from mergekit_slta.runtime.clock import describe_phases

START, END = "<!-- mergekit-slta: begin -->", "<!-- mergekit-slta: end -->"
_SECTION = re.compile(re.escape(START) + "(?:(?!" + re.escape(START) + ").)*?" + re.escape(END), re.DOTALL)
_MERGEKITS = re.compile(
    r"This is a merge of pre-trained language models created using \[mergekit\]\([^)\n]*\)\.\n\n## Merge Details\n"
    r"(?:(?!\n## ).)*?\n### Configuration\n(?:(?!\n## ).)*?\n```yaml\n.*?\n```\n",
    re.DOTALL,
)
"""What mergekit writes below the title of a card. It names local models by their paths."""
_MOST_FLAGS = 20
"""At most this many submodules are named per flag; the others are counted."""


def replace_section(card: str, section: str) -> str:
    """Replace the section in a card. If there is none, replace mergekit's own part, or append the section."""
    for part, text in ((_SECTION, section), (_MERGEKITS, section + "\n")):
        if part.search(card):
            return part.sub(lambda _, text=text: text, card, count=1)
    return card.rstrip("\n") + "\n\n" + section + "\n" if card.strip() else section + "\n"


def section(
    alphas: Alphas,
    figures: Sequence[tuple[str, str]],
    scale: float | None = 1.0,
    took: Took | None = None,
    *,
    sources: Sources | None = None,
    usage: Usage | None = None,
    recipe: str | None = None,
    written: str = "",
) -> str:
    """Write the section, with the two markers around it.

    Args:
        alphas: the alphas of the merge.
        figures: description and file name (beside the card) of each figure.
        scale: the recipe's `lambda`, which multiplies every weight; None if it differs between tensors.
        took: what the merge took.
        sources: where its models and datasets come from.
        usage: how the model is used.
        recipe: the recipe without local paths.
        written: rows that experts have written.
    """
    names = PublicNames.of_alphas(alphas, sources)
    measured = any(entry.residual_measured is not None for entry in alphas.submodules)
    fences = [len(run) for run in re.findall("`+", recipe or "")]
    text = environment(autoescape=False).get_template("card.md.jinja").render(
        start=START,
        end=END,
        summary=_summary(alphas, names),
        directions=_directions(alphas, names),
        scaled=_scaled(scale) if scale != 1.0 else "",
        evaluation=_evaluation(alphas, names),
        usage=usage.code if usage is not None else "",
        models=_models(alphas, names),
        license=describe_license(sources or Sources(), names, code),
        calibration=_calibration(alphas, names),
        written=written,
        took=_took(took) if took is not None else "",
        weights=_weights(alphas, names, measured),
        figures=figures,
        residuals=_residual_note(alphas, measured),
        flagged=_flagged(alphas),
        recipe_name=MERGED_RECIPE_NAME,
        alphas_name=ALPHAS_NAME,
        can_export=alphas.granularity != "head_mlp",
        has_closed_form=alphas.closed_form is not None,
        stock_options=f" {LORA_CACHE}" * needs_cache(alphas),
        project=PROJECT,
        recipe=recipe,
        fence="`" * max(3, 1 + max(fences, default=0)),
        citation=citation(alphas),
    )  # fmt: skip
    return text.strip()


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


def _summary(alphas: Alphas, names: PublicNames) -> str:
    """What the model is made of, how, and how good it is."""
    experts = [_name(alphas, names, model) for model in alphas.experts]
    listed = experts[0] if len(experts) == 1 else f"{', '.join(experts[:-1])} and {experts[-1]}"
    objective, count = code(alphas.calibration.get("objective", FEATURES)), len(alphas.submodules)
    made = (
        f"This model is {_name(alphas, names, alphas.base_model)} with {listed} merged into it, by "
        f"[mergekit](https://github.com/arcee-ai/mergekit) {code(alphas.provenance.get('mergekit', ''))} and "
        f"[mergekit-slta]({PROJECT}) {code(alphas.provenance.get('mergekit_slta', ''))}: objective {objective}, "
        f"granularity {code(alphas.granularity)}, {count} submodule{'s' * (count != 1)}."
    )
    parts = [made, describe_method(alphas)]
    if alphas.evaluation is not None:
        shares = ", ".join(
            f"{percent_left(task)} for {code(names.model(task.model))}" for task in alphas.evaluation.tasks
        )
        parts.append(
            "**How near it is to the experts.** On rows that were not fitted, this share of the base's divergence from "
            f"each expert is left (0%: it predicts what the expert does; 100%: it is no better than the base): "
            f"{shares}."
        )
    elif alphas.is_fitted and not any(TOO_FEW_ROWS in task.get("flags", ()) for task in _tasks(alphas)):
        parts.append("How near it is to the experts was not measured (`evaluate: true` does that).")
    return "\n\n".join(parts)


def _name(alphas: Alphas, names: PublicNames, label: str) -> str:
    """The name of a model: a link to the Hub for each part that the merge recorded as there."""
    parts, ids = names.model(label).split(" + "), names.hub_models.get(label, ())
    links = {part: f"[{code(part)}](https://huggingface.co/{part.partition('@')[0]})" for part in parts
             if part.partition("@")[0] in ids}  # fmt: skip
    return " + ".join(links.get(part, code(part)) for part in parts)


def _tasks(alphas: Alphas) -> Sequence[dict[str, Any]]:
    return alphas.calibration.get("tasks", ())


def _models(alphas: Alphas, names: PublicNames) -> str:
    forms = {direction.model: direction.closed_form for direction in alphas.directions}
    rows = [["model", "role"], [_name(alphas, names, alphas.base_model), "base"]]
    for label in alphas.models:
        role = "expert" if label not in forms else "direction" if forms[label] is None else "closed-form direction"
        rows.append([_name(alphas, names, label), role])
    return _table(rows, names=2)


def _calibration(alphas: Alphas, names: PublicNames) -> str:
    used, tasks = alphas.calibration, calibration_tasks(alphas, names)
    measured = any(task.is_measured for task in tasks)
    rows = [["expert", "data", "rows", "tokens", "SHA-256 of the rows", *["base's loss", "expert's loss"] * measured]]
    for task in tasks:
        counts = [str(task.rows or 0), str(task.tokens or "-"), code(task.sha256)]
        losses = [task.loss_base, task.loss_expert] if measured else []
        rows.append([code(task.model), code(task.data), *counts, *losses])
    parts = [_table(rows, names=2) if tasks else "No calibration data."]
    parts += [f"**Warning.** {line}." for line in describe_no_better(used, lambda model: code(names.model(model)))]
    parts += [f"**Warning.** {line}" for line in describe_far(used, lambda model: code(names.model(model)))]
    if measured:
        measure = "means over the rows that were measured (under `features` a task's first 10)"
        parts.append(f"Losses are in nats per token of the answers, {measure}.")
    shares = ", ".join(f"{code(task.model)} {task.rerouted:.1%}" for task in tasks if task.rerouted is not None)
    if shares:
        parts.append(f"Tokens that the merge sends to other experts (MoE) than the task's model does: {shares}.")
    settings = ", ".join(f"{key} {code(value)}" for key, value in settings_of(alphas))
    return "\n\n".join([*parts, *([f"{settings}."] if settings else [])])


def _evaluation(alphas: Alphas, names: PublicNames) -> str:
    """How far the merge is from the experts on held-out rows; empty if it was not to be measured."""
    found = alphas.evaluation
    if found is None:
        few = ", ".join(
            code(names.model(task["model"])) for task in _tasks(alphas) if TOO_FEW_ROWS in task.get("flags", ())
        )
        start = " So no step could be measured: the weights are those of `features`." * bool(
            alphas.calibration.get("steps")
        )
        return f"Not measured: too few rows to hold any out of {few}.{start}" if few else ""
    table = _table([["expert", *EVALUATION_HEADER],
                    *([code(names.model(task.model)), *evaluation_cells(task)] for task in found.tasks)])  # fmt: skip
    lines = describe_flags(found, lambda model: code(names.model(model)), fitted=alphas.is_fitted)
    note = (
        "On rows that were not fitted. The divergence is KL(expert ‖ model) in nats, summed over a row's answer; the "
        f"share is what is left of the base's. Losses are in nats per token; {evaluation_note(found)}."
    )
    return "\n\n".join([table, *(f"**Warning.** {line}." for line in lines), note])


def _objective(alphas: Alphas) -> ObjectiveRow | None:
    """The row of the objective that the weights minimise; None if this installation does not know it."""
    return OBJECTIVES.get(str(alphas.calibration.get("objective")))


def _directions(alphas: Alphas, names: PublicNames) -> list[str]:
    """What the models without a task are."""
    return [
        f"{code(names.model(direction.model))} is a direction: "
        + ("computed from the weights of base and experts (SWUDI-A, arXiv 2606.07289)." if direction.closed_form
           else "a model without a task; its weights were found from the rows of the others.")
        for direction in alphas.directions
    ]  # fmt: skip


def _weights(alphas: Alphas, names: PublicNames, measured: bool) -> str:
    has_residuals = shared_residual(alphas) is None and any(entry.residual is not None for entry in alphas.submodules)
    header = ["submodules", "number", *(code(names.model(model)) for model in alphas.models)]
    rows = [header + ["residual"] * has_residuals + ["measured"] * measured]
    for label, members in _groups(alphas):
        cells = [label, str(len(members))]
        for column in range(len(alphas.models)):
            values = [entry.alpha[column] for entry in members]
            low, high = min(values), max(values)
            mean_std = f" ({low:.2f} to {high:.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{mean_std}")
        if has_residuals:
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
    ordered = [("embeddings", groups.get((-1, "embed"))), (KINDS["model"], groups.get((-1, "model")))]
    for kind in kinds:
        for third in range(3):
            members = groups.get((third, kind), [])
            layers = sorted({entry.layer for entry in members if entry.layer is not None})
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}" if layers else ""
            ordered.append((f"{KINDS.get(kind) or code(kind)}, layers {span}", members))
    ordered += [("final norm", groups.get((-1, "norm"))), ("head", groups.get((-1, "head")))]
    return [(label, members) for label, members in ordered if members]


def _residual_note(alphas: Alphas, measured: bool) -> str:
    row = _objective(alphas)
    text = "Weights are means over the submodules, with their range."
    if row is not None:
        shared = shared_residual(alphas)
        text += f" {row.residual}" + ("" if shared is None else f" It is {shared:.3f}.")
        if row.settings.measures_residuals and not measured:
            text += " It is predicted from linearity; `mergekit-slta merge --verify` also measures it."
    return text


def _flagged(alphas: Alphas) -> str:
    lines = []
    for flag, meaning, members in flagged(alphas):
        rest = f" and {len(members) - _MOST_FLAGS} more" if len(members) > _MOST_FLAGS else ""
        shown = ", ".join(code(name) for name in members[:_MOST_FLAGS])
        lines.append(f"- {code(flag)}{f' ({meaning})' if meaning else ''}: {shown}{rest}")
    return "\n".join(lines) or "Nothing."
