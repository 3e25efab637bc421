"""Tables for the terminal: results of a calibration, of a merge and of an analysis. `runtime.screen` prints them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from mergekit_slta.errors import listing, show
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas, describe_loss
from mergekit_slta.files.evaluation import EVALUATION_HEADER, Evaluation, evaluation_cells, evaluation_note
from mergekit_slta.files.names import ALPHAS_NAME, CARD_NAME, FIGURE_PREFIX, STATISTICS_NAME
from mergekit_slta.reporting.facts import flagged
from mergekit_slta.reporting.figures.style import path_ends
from mergekit_slta.runtime.clock import describe_phases
from mergekit_slta.runtime.screen import Columns, describe_bytes, facts, text

if TYPE_CHECKING:
    from mergekit_slta.files.linearity_file import Linearity, MeanStd
    from mergekit_slta.files.merge_record import Took

_MOST_NAMES = 12
"""At most this many submodules are named per flag; the others are counted."""
_LONGEST_NAME = 36
_PARTS = {
    "model": "whole model", "layer": "layers", "attention": "attention", "attention_head": "attention", "mlp": "MLP",
    "norm": "norms",
}  # fmt: skip
_OF_MATRIX = {"attention": re.compile(r"attn|attention"), "MLP": re.compile(r"mlp|ffn|feed_forward|expert|moe")}
"""Parts of a layer, and what the names of their modules hold; for single matrices."""


def describe_alphas(alphas: Alphas) -> list[RenderableType]:
    """Describe alphas: the weights over depth, the losses of each task, the evaluation, and all flags."""
    names = _names(alphas)
    parts: list[RenderableType] = [_weights(alphas)]
    if residuals := ", ".join(_residuals(alphas)):
        parts += [text(f"Predicted to be lost of the experts' changes: {residuals}")]
    losses = [
        [names[task["model"]], describe_loss(task["loss_base"]), describe_loss(task["loss_expert"])]
        for task in alphas.calibration.get("tasks", ())
        if task.get("loss_expert") is not None
    ]
    if losses:
        parts += ["", Columns(["loss per token on its own rows", "base", "expert"], losses)]
    if alphas.evaluation is not None:
        parts += ["", *describe_evaluation(alphas.evaluation)]
    if flags := [*_flags(alphas)]:
        parts += ["", facts(flags)]
    return parts


def _names(alphas: Alphas) -> dict[str, str]:
    """Each model's name in tables: the end of its path."""
    return dict(zip(alphas.models, path_ends(alphas.models, _LONGEST_NAME), strict=True))


def _weights(alphas: Alphas) -> RenderableType:
    """Mean weights of every model: embeddings, thirds of the layers, head; attention and MLP apart if they are told.

    A norm outside the layers is in the row of the norms, beside the embeddings or the head.
    """
    num_layers = 1 + max((entry.layer for entry in alphas.submodules if entry.layer is not None), default=-1)
    groups: dict[str, dict[str, list[SubmoduleAlphas]]] = {}
    spans: dict[str, list[int]] = {}
    for entry in alphas.submodules:
        if entry.layer is None:
            place = {"model": "all", "embed": "embed"}.get(entry.kind, "head" if spans else "embed")
            part = _PARTS[entry.kind] if entry.kind in ("model", "norm") else ""
        else:
            place, part = ("early", "middle", "late")[3 * entry.layer // num_layers], _part_of(entry)
            spans.setdefault(place, []).append(entry.layer)
        groups.setdefault(part, {}).setdefault(place, []).append(entry)
    beside = groups.pop("", {})  # shown in the first line of each model
    places = [place for place in ("all", "embed", "early", "middle", "late", "head")
              if place in beside or any(place in group for group in groups.values())]  # fmt: skip
    titles = [f"{place}\n{_span(spans[place])}" if place in spans else place for place in places]
    parts = sorted(groups, key=lambda part: [*_PARTS.values(), *_OF_MATRIX, part].index(part)) or [""]
    rows = []
    for column, model in enumerate(_names(alphas).values()):
        for number, part in enumerate(parts):
            group = {**groups.get(part, {}), **(beside if number == 0 else {})}
            cells = [_mean([entry.alpha[column] for entry in group.get(place, ())]) for place in places]
            rows.append([model if number == 0 else "", part, *cells])
    return Columns(["mean weights of", "", *titles], rows, names=2)


def _part_of(entry: SubmoduleAlphas) -> str:
    if entry.kind != "linear":
        return _PARTS.get(entry.kind, entry.kind)
    return next((part for part, mark in _OF_MATRIX.items() if mark.search(entry.name)), "matrices")


def _span(layers: Sequence[int]) -> str:
    return f"{min(layers)}" if min(layers) == max(layers) else f"{min(layers)}-{max(layers)}"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else ""


def _residuals(alphas: Alphas) -> Iterator[str]:
    """The mean residual of each kind of submodule."""
    for kind in dict.fromkeys(entry.kind for entry in alphas.submodules):
        found = [entry.residual for entry in alphas.submodules if entry.kind == kind and entry.residual is not None]
        if found and alphas.evaluation is None:
            yield f"{_PARTS.get(kind, kind)} {sum(found) / len(found):.0%}"


def _flags(alphas: Alphas) -> Iterator[tuple[str, str]]:
    """Each flag with its submodules."""
    for flag, meaning, names in flagged(alphas):
        count = f"{len(names)} submodule{'s' * (len(names) > 1)}"
        yield flag, f"{count}, {meaning or flag}: {listing(names, _MOST_NAMES)}"


def describe_evaluation(evaluation: Evaluation) -> list[RenderableType]:
    """Describe how far the merge is from each expert on held-out rows."""
    names = path_ends([task.model for task in evaluation.tasks], _LONGEST_NAME)
    rows = [[name, *evaluation_cells(task)] for name, task in zip(names, evaluation.tasks, strict=True)]
    return [
        Columns(["on rows that were not fitted", *EVALUATION_HEADER], rows),
        text(f"Divergence in nats per row, loss in nats per token; {evaluation_note(evaluation)}."),
    ]


def describe_merge(
    alphas: Alphas, out: Path, took: Took, warnings: Sequence[str] = (), *, is_evaluated: bool = True
) -> list[RenderableType]:
    """Describe a finished merge: its weights, how good it is, warnings, where things are, and how to upload them.

    Args:
        alphas: those of the merge.
        out: the merged model.
        took: what the merge took.
        warnings: the warnings of the run.
        is_evaluated: whether the recipe asks for the evaluation.
    """
    parts: list[RenderableType] = ["", *describe_alphas(alphas), ""]
    if alphas.evaluation is None and not is_evaluated:
        parts += [
            text(
                "How good is it? Not measured: with a `dataset` for each expert, `evaluate: true` under the recipe's "
                "`parameters` holds out rows of each task and shows how near the merge is to each expert on them, "
                "beside the losses."
            ),
            "",
        ]
    if warnings:
        parts += [facts(("warning", warning) for warning in dict.fromkeys(warnings)), ""]
    return [*parts, facts(_places(out, took))]


def _places(out: Path, took: Took) -> Iterator[tuple[str, str]]:
    """Where things are."""
    weights = sum(path.stat().st_size for pattern in ("model*.safetensors", "*.bin") for path in out.glob(pattern))
    yield "merged", f"{show(out)}, {describe_bytes(weights)}"
    yield "", f"weights of the experts: {ALPHAS_NAME}" + f", {STATISTICS_NAME}" * (out / STATISTICS_NAME).is_file()
    figures = sorted(path.name for path in out.glob(f"{FIGURE_PREFIX}_*.png"))
    if (out / CARD_NAME).is_file():
        yield "", f"model card: {CARD_NAME}" + f"; figures: {listing(figures)}" * bool(figures)
    yield "took", describe_phases(took.seconds)
    yield "upload", f"hf upload ORG/NAME {shlex.quote(str(out))}"


def describe_linearity(linearity: Linearity) -> Columns:
    """Describe the measures of every level, as in the paper's Fig. 1 to 4. In every column 0 means linear."""
    header = ["level", "n", "non-linearity score", "projection distance", "1 - cosine", "(of the experts)",
              "disentanglement error"]  # fmt: skip
    rows = []
    for kind, level in linearity.levels.items():
        cosine = level.cosine.pairs
        rows.append(
            [
                kind.replace("_", " "),
                str(level.count),
                _mean_std(level.non_linearity),
                _mean_std(level.projection_distance.pairs),
                _mean_std(cosine and cosine.model_copy(update={"mean": max(0.0, 1 - cosine.mean)})),
                "-" if level.cosine_base is None else f"{max(0.0, 1 - level.cosine_base.mean):.3g}",
                _mean_std(level.disentanglement),
            ]
        )
    return Columns(header, rows)


def _mean_std(mean_std: MeanStd | None) -> str:
    return "-" if mean_std is None else f"{mean_std.mean:.3g} ± {mean_std.std:.2g}"
