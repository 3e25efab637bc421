"""Figures come from saved files, show their numbers, and hide nothing that makes a number doubtful."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import refused
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from mergekit_slta.calibration.calibrate import calibrate
from mergekit_slta.errors import AlphasError, OutputError
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.files.evaluation import Evaluation, Measure, MeasuredPoint, TaskEvaluation, Trial
from mergekit_slta.files.linearity_file import Combined, Level, Linearity, SubmoduleLinearity
from mergekit_slta.maths.linearity import PAIR_GRID
from mergekit_slta.reporting.figures import heatmaps, levels, style
from mergekit_slta.reporting.figures.draw import draw, draw_alphas
from mergekit_slta.reporting.figures.evaluation import divergence_figure
from mergekit_slta.reporting.figures.over_depth import alphas_figure, residuals_figure

NUM_LAYERS = 3
KINDS = {
    "model": (),
    "layer": (("", "layer"),),
    "attn_mlp": ((".self_attn", "attention"), (".mlp", "mlp")),
    "head_mlp": (
        (".self_attn", "attention"), (".self_attn.heads.0", "attention_head"), (".self_attn.heads.1", "attention_head"),
        (".mlp", "mlp"),
    ),
    "linear": (
        (".input_layernorm", "norm"), (".self_attn.q_proj", "linear"), (".self_attn.o_proj", "linear"),
        (".post_attention_layernorm", "norm"), (".mlp.up_proj", "linear"), (".mlp.down_proj", "linear"),
    ),
}  # fmt: skip


def make_alphas(granularity="attn_mlp", num_models=2, num_layers=NUM_LAYERS, names=None, **changes) -> Alphas:
    """Random weights; `changes` are fields of submodules, by the last part of their name and their layer, as mlp_2."""
    rng = np.random.default_rng(0)
    places = [("embed", "embed", None)]
    for layer in range(num_layers):
        places += [(f"model.layers.{layer}{path}", kind, layer) for path, kind in KINDS[granularity]]
    places += [("model.norm", "norm", None)] * (granularity == "linear") + [("head", "head", None)]
    if granularity == "model":
        places = [("model", "model", None)]
    submodules = []
    for name, kind, layer in places:
        fields = {
            "alpha": tuple(rng.normal(1 / num_models, 0.05, num_models)),
            "stderr": tuple(rng.uniform(0.001, 0.02, num_models)),
            "condition": 2.0, "rank": num_models, "residual": rng.uniform(0.2, 0.5),
        }  # fmt: skip
        fields |= changes.get(f"{name.rpartition('.')[2]}_{layer}", {}) | changes.get("every", {})
        submodules.append(SubmoduleAlphas(name=name, kind=kind, layer=layer, tensors=(), **fields))
    return Alphas(
        granularity=granularity, base_model="org/base", submodules=tuple(submodules), calibration={}, provenance={},
        models=tuple(names or (f"org/expert-{number}" for number in range(num_models))),
    )  # fmt: skip


def make_linearity(num_models=3, num_layers=NUM_LAYERS, names=None, spoil=lambda values: values) -> Linearity:
    """A full model far from linear, layers and blocks nearly so; `spoil` may take numbers out of every vector."""
    rng = np.random.default_rng(0)
    pairs, triples = (tuple(itertools.combinations(range(num_models), size)) for size in (2, 3))
    line = np.linspace(0, 1, 11)

    def some(scale, count):
        return spoil(tuple(float(value) for value in scale * rng.uniform(0.5, 1.5, count)))

    def one(name, kind, layer, scale):
        bent = line ** (1 + scale)
        ratios = tuple(spoil(tuple(row)) for row in np.abs(bent[:, None] - bent).tolist())
        return SubmoduleLinearity(
            name=name, kind=kind, layer=layer, non_linearity=some(scale, num_models),
            non_linearity_std=some(scale / 3, num_models),
            distances=None if kind == "attention_head" else (ratios,) * num_models,
            projection_distance=Combined(
                pairs=tuple(some(scale, 25) for _ in pairs), triples=tuple(some(scale / 2, 27) for _ in triples)
            ),
            cosine=Combined(
                pairs=tuple(some(0.6, 25) for _ in pairs), triples=tuple(some(0.6, 27) for _ in triples)
            ),
            cosine_base=0.1 if pairs else None,
            disentanglement=tuple(some(0.1 * scale, 25) for _ in pairs),
            disagreement=tuple(some(0.2, 25) for _ in pairs) if kind == "model" else None,
        )  # fmt: skip

    scales = {"layer": 0.01, "attention": 0.02, "attention_head": 0.02, "mlp": 0.003}
    submodules = [
        one(f"{kind}{layer}", kind, layer, scale) for layer in range(num_layers) for kind, scale in scales.items()
    ]
    submodules += [one("head", "head", None, 0.01), one("model", "model", None, 3.0)]
    return Linearity(
        base_model="org/base", models=names or tuple(f"expert-{number}" for number in range(num_models)), pairs=pairs,
        triples=triples, settings={}, submodules=tuple(submodules), provenance={},
        levels={
            kind: Level.of([entry for entry in submodules if entry.kind == kind]) for kind in (*scales, "head", "model")
        },
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _on_paper():
    """Figures are made with the settings that they are written with."""
    with style.figure_style():
        yield


def entries(alphas: Alphas, *kinds: str) -> list[SubmoduleAlphas]:
    return [entry for entry in alphas.submodules if entry.kind in kinds]


def heights(axis, expert: int) -> np.ndarray:
    """What is drawn of an expert inside the layers: the heights of its line with error bars."""
    return np.asarray(axis.containers[expert].lines[0].get_ydata(), dtype=float)


def texts(figure) -> str:
    """Everything that the figure says."""
    found = [text for axis in figure.axes for text in (*axis.texts, axis.title, axis._left_title, axis.xaxis.label)]
    legends = [legend for legend in (*figure.legends, *(axis.get_legend() for axis in figure.axes)) if legend]
    found += [*figure.texts, *(text for legend in legends for text in legend.get_texts())]
    return "\n".join(text.get_text() for text in found).replace("\n", " ")


@pytest.mark.parametrize("granularity", KINDS)
def test_alphas_files_of_every_granularity_are_drawn(tmp_path, granularity):
    """Two figures, each as PNG of 1400 pixels' width and as SVG, and nothing else is left in the folder."""
    written = draw(make_alphas(granularity), tmp_path / "new", "x")
    assert [path.name for path in written] == ["x_alphas.png", "x_alphas.svg", "x_residuals.png", "x_residuals.svg"]
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(content[16:20], "big") == 1400
        else:
            assert b"<svg" in content


@pytest.mark.parametrize("num_models", [1, 2])
def test_linearity_files_of_any_number_of_experts_are_drawn(tmp_path, num_models):
    """Pairs need two experts; their figure is left out with one."""
    names = [path.stem for path in draw(make_linearity(num_models, 1), tmp_path) if path.suffix == ".svg"]
    assert names == ["slta_levels", "slta_distances", "slta_disentanglement"][: 2 + (num_models > 1)]


def test_same_file_gives_same_bytes_whatever_the_user_has_set(tmp_path):
    """Neither the clock nor a dark style in `matplotlibrc` changes a figure."""
    source = make_alphas("layer")
    draw(source, tmp_path / "one")
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 20, "svg.hashsalt": None}):
        draw(source, tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 20
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_alphas_are_drawn_from_a_real_file(tiny, options, tmp_path):
    """PNG and SVG, by the suffix; the file may be given by its path."""
    calibrate(tiny.recipe(granularity="attn_mlp"), options).save(tmp_path / "alphas.json")
    draw_alphas(tmp_path / "alphas.json", tmp_path / "alphas.png")
    draw_alphas(tmp_path / "alphas.json", tmp_path / "alphas.svg")
    assert (tmp_path / "alphas.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (tmp_path / "alphas.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alphas.json", "alphas.png", "alphas.svg"]


def test_every_panel_has_a_line_per_expert_with_the_numbers_of_the_file():
    """Blocks in the order of the layers, standard errors as bars, and embeddings and head in a panel of their own."""
    alphas = make_alphas("attn_mlp", 3)
    figure = alphas_figure(alphas)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "Attention blocks",
        "MLP blocks",
        "Outside the layers",
    ]
    for axis, kinds in zip(figure.axes, (("attention",), ("mlp",), ("embed", "head")), strict=True):
        wanted = entries(alphas, *kinds)
        for expert in range(3):
            drawn = axis.containers[expert]
            assert list(drawn.lines[0].get_ydata()) == [entry.alpha[expert] for entry in wanted]
            bars = [(high - low) / 2 for (_, low), (_, high) in drawn.lines[2][0].get_segments()]
            assert bars == pytest.approx([entry.stderr[expert] for entry in wanted])
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["embed", "head"]


def test_heads_are_drawn_as_mean_and_range():
    """A band from the smallest to the largest weight of a layer's groups, their mean as the line."""
    alphas = make_alphas("head_mlp", 2)
    figure = alphas_figure(alphas)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == "Attention heads, by key/value group: mean and range within a layer"
    assert titles[1:] == ["Rest of attention, what no head owns (norms, biases)", "MLP blocks", "Outside the layers"]
    heads = np.array([entry.alpha for entry in entries(alphas, "attention_head")]).reshape(NUM_LAYERS, 2, 2)
    bands = [one for one in figure.axes[0].collections if isinstance(one, PolyCollection)]
    for expert in range(2):
        assert heights(figure.axes[0], expert) == pytest.approx(heads[:, :, expert].mean(1))
        band = bands[expert].get_paths()[0].vertices[:, 1]
        assert set(band) == set(heads[:, :, expert].flatten())


def test_matrices_are_drawn_by_the_block_they_belong_to():
    """Attention's, the MLP's, and norms; the final one is outside the layers."""
    alphas = make_alphas("linear", 2)
    figure = alphas_figure(alphas)
    titles = [axis.get_title(loc="left").partition(":")[0] for axis in figure.axes]
    assert titles == ["Attention matrices", "MLP matrices", "Norms", "Outside the layers"]
    for axis, part in zip(figure.axes[:3], (".self_attn.", ".mlp.", "norm"), strict=True):
        of_layer = [
            np.mean([entry.alpha[1] for entry in alphas.submodules if entry.layer == layer and part in entry.name])
            for layer in range(NUM_LAYERS)
        ]
        assert heights(axis, 1) == pytest.approx(of_layer)
    ends = figure.axes[3].containers[0].lines[0].get_ydata()
    assert list(ends) == [entry.alpha[0] for entry in alphas.submodules if entry.layer is None]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["embed", "norm", "head"]


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.c_attn", "gpt_neox.layers.0.attention.dense", "transformer.h.0.self_attention.dense"]
)
def test_attention_is_recognised_in_every_architecture(name):
    """Matrices of GPT-2, GPT-NeoX and Falcon too."""
    submodule = SubmoduleAlphas(
        name=name, kind="linear", layer=0, tensors=(), alpha=(1.0,), stderr=None, condition=1, rank=1, residual=0
    )
    alphas = make_alphas("linear", 1).model_copy(update={"submodules": (submodule,)})
    assert alphas_figure(alphas).axes[0].get_title(loc="left") == "Attention matrices"


def test_whole_models_are_a_list_of_numbers():
    """One submodule has no depth: a point per expert, its weight and error in figures."""
    alphas = make_alphas("model", 3)
    figure = alphas_figure(alphas)
    (entry,) = alphas.submodules
    for alpha, error in zip(entry.alpha, entry.stderr, strict=True):
        assert f"{alpha:.3f} ± {error:.3f}" in texts(figure)
    assert [float(one.lines[0].get_xdata()[0]) for one in figure.axes[0].containers] == list(entry.alpha)


def test_unchanged_experts_are_rings_at_zero_and_no_points():
    """A 0 by rule is not a 0 that was measured: the line breaks, and the legend explains the ring."""
    alphas = make_alphas(mlp_1={"alpha": (0.0, 0.5), "flags": ("unchanged",), "unchanged": ("org/expert-0",)})
    figure = alphas_figure(alphas)
    axis = figure.axes[1]
    assert np.isnan(heights(axis, 0)).tolist() == [False, True, False]
    assert not np.isnan(heights(axis, 1)).any()
    rings = [line for line in axis.lines if line.get_fillstyle() == "none" and len(line.get_xdata())]
    assert [(round(ring.get_xdata()[0]), list(ring.get_ydata())) for ring in rings] == [(1, [0])]
    assert axis.get_ylim()[0] < 0
    assert "at 0: no weight here" in texts(figure)
    assert "at 0" not in texts(alphas_figure(make_alphas()))


@pytest.mark.parametrize(
    ("directions", "told"), [(("swudi_a",), "the direction swudi_a"), (("first", "second"), "2 directions")]
)
def test_directions_are_no_experts(directions, told):
    """They have no task: the plain average and the title count the experts, and the legend says what is a direction."""
    names = ("org/math", "org/code", *directions)
    alphas = make_alphas("linear", len(names), names=names)
    alphas = Alphas(**{**alphas.model_dump(), "directions": [{"model": name} for name in directions]})
    figure = alphas_figure(alphas)
    text = texts(figure)
    assert f"Merging weight α of 2 experts and {told}" in text
    assert "plain average, 1/2" in text
    assert all(list(axis.lines[-1].get_ydata()) == [0.5, 0.5] for axis in figure.axes)
    assert [name for name in ("math", "code", *directions) if f"{name} (direction)" in text] == list(directions)


@pytest.mark.parametrize("make", [alphas_figure, residuals_figure])
def test_doubtful_solves_are_marked_above_their_layer(make):
    """Each flag has a symbol of its own, explained only where it occurs."""
    flags = {"rank_deficient": "rank lost", "ill_conditioned": "ill-conditioned", "nonlinear": "measured residual"}
    figure = make(make_alphas(mlp_0={"flags": tuple(flags)}, mlp_2={"flags": ("nonlinear",)}))
    marks = [line for line in figure.axes[1].lines if not line.get_clip_on() and min(line.get_ydata(), default=0) > 1]
    assert [list(line.get_xdata()) for line in marks] == [[0], [0], [0, 2]]
    assert len({line.get_marker() for line in marks}) == 3
    assert not any(min(line.get_ydata(), default=0) > 1 and len(line.get_xdata()) for line in figure.axes[0].lines
                   if not line.get_clip_on())  # fmt: skip
    for meaning in flags.values():
        assert meaning in texts(figure)
        assert meaning not in texts(make(make_alphas()))


def test_a_number_far_off_is_shown_at_the_edge():
    """One wild weight does not flatten the others, and does not vanish."""
    alphas = make_alphas(num_layers=10, mlp_4={"alpha": (90.0, 0.5)})
    figure = alphas_figure(alphas)
    low, high = figure.axes[1].get_ylim()
    assert -1 < low < high < 3
    edge = [line for line in figure.axes[1].lines if line.get_marker() == "^" and list(line.get_ydata()) == [high]]
    assert [round(line.get_xdata()[0]) for line in edge] == [4]
    assert "beyond the axis" in texts(figure)
    assert "beyond the axis" not in texts(alphas_figure(make_alphas(num_layers=10)))


def test_ten_experts_share_no_panel_with_more_than_five():
    """Two panels per kind, every expert in the legend, no two with the same look."""
    figure = alphas_figure(make_alphas(num_models=10))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        f"{kind} · experts {span}"
        for kind in ("Attention blocks", "MLP blocks", "Outside the layers")
        for span in ("1–5", "6–10")
    ]
    handles = figure.legends[0].legend_handles[:10]
    assert [handle.get_label() for handle in handles] == [f"{place + 1}  expert-{place}" for place in range(10)]
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 10
    assert len({handle.get_linestyle() for handle in handles[:4]}) == 4


def test_missing_standard_errors_are_said():
    """With one row per task there are none."""
    assert "No standard errors: there was one calibration row" in texts(
        alphas_figure(make_alphas(every={"stderr": None}))
    )
    after_steps = make_alphas(every={"stderr": None, "condition": None, "rank": None})
    assert "No standard errors: the weights are those of the merge that was best" in texts(alphas_figure(after_steps))
    assert "jackknife" in texts(alphas_figure(make_alphas()))


def test_residuals_predicted_and_measured():
    """Both lines where it was measured; otherwise one, and the title says so."""
    alphas = make_alphas(mlp_0={"residual_measured": 0.6}, mlp_2={"residual_measured": 0.7})
    axis = residuals_figure(alphas).axes[1]
    assert list(heights(axis, 0)) == [entry.residual for entry in entries(alphas, "mlp")]
    assert np.array_equal(heights(axis, 1), [0.6, np.nan, 0.7], equal_nan=True)
    assert axis.get_ylim()[0] == 0
    figure = residuals_figure(make_alphas())
    assert len(figure.axes[1].containers) == 1
    assert "(predicted only)" in texts(figure)


def measured_alphas(num_models=2, num_steps=3, names=None, steps=None) -> Alphas:
    """Weights after steps: the base, two starting points, and a point for each step that was taken."""
    rng = np.random.default_rng(1)
    alphas = make_alphas(num_models=num_models, names=names, every={"stderr": None, "condition": None, "rank": None})
    made = [("base", None), ("average", None), ("features", None)]
    made += [(name, 1.0) for name in steps or (f"step {number + 1}" for number in range(num_steps))]

    def measures(number: int) -> tuple[Measure, ...]:
        return tuple(Measure(mean=3.0 / (number + 1), stderr=error) for error in rng.uniform(0.1, 0.3, num_models))

    points = [
        MeasuredPoint(name=name, ridge=ridge, divergence=measures(number), weighted=1 / (number + 1))
        for number, (name, ridge) in enumerate(made)
    ]
    tasks = [
        TaskEvaluation(
            model=model, rows=(1, 2), divergence_base=points[0].divergence[place],
            divergence=points[-1].divergence[place], share=Measure(mean=0.2, stderr=None),
            **dict.fromkeys(("loss_base", "loss_expert", "loss"), Measure(mean=1.0, stderr=None)),
        )
        for place, model in enumerate(alphas.models)
    ]  # fmt: skip
    trials = (Trial(name="step 1", ridge=1.0, weighted=0.5),)
    evaluation = Evaluation(points=points, merge=len(points) - 1, trials=trials, tasks=tasks)
    return alphas.model_copy(update={"evaluation": evaluation})


def test_divergence_is_drawn_from_the_best_start_over_the_steps():
    """As a share of the base's, with standard errors, a line for each expert."""
    alphas = measured_alphas()
    points = alphas.evaluation.points
    figure = divergence_figure(alphas)
    (axis,) = figure.axes
    for expert in range(2):
        base = points[0].divergence[expert].mean
        bars = axis.containers[expert]
        assert bars.lines[0].get_ydata() == pytest.approx([1 / 3, 1 / 4, 1 / 5, 1 / 6])
        errors = [np.diff(segment[:, 1])[0] / 2 for segment in bars.lines[2][0].get_segments()]
        assert errors == pytest.approx([point.divergence[expert].stderr / base for point in points[2:]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["start", "1", "2", "3"]
    assert "the best of base, average, features" in texts(figure)
    assert "expert-1" in texts(figure)


def test_files_after_steps_have_a_figure_of_the_divergence_and_none_of_residuals(tmp_path):
    """Its residual is one number for all. Where no step was taken there is no path to draw."""
    assert residuals_figure(measured_alphas()) is None
    found = {path.name for path in draw(measured_alphas(), tmp_path)}
    assert found == {f"slta_{figure}.{form}" for figure in ("alphas", "divergence") for form in ("png", "svg")}
    assert divergence_figure(measured_alphas(num_steps=0)) is None
    assert divergence_figure(make_alphas()) is None
    plain = measured_alphas()
    same = plain.evaluation.points[0].model_copy(update={"divergence": (Measure(mean=0.0, stderr=0.0),) * 2})
    changed = plain.evaluation.model_copy(update={"points": (same, *plain.evaluation.points[1:])})
    assert divergence_figure(plain.model_copy(update={"evaluation": changed})) is None


def test_names_are_only_names(tmp_path):
    """Neither formulas, control characters nor a leading underscore harm a figure; equal last parts are told apart."""
    names = ("run1/$\\frac{$", "run2/$\\frac{$", "a/_hidden\x1b[31m", "b/" + "long-" * 40 + "end")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(make_alphas("attn_mlp", 4, names=names), tmp_path)
        draw_alphas(make_alphas("model", 4, names=names), tmp_path / "x.svg")
        draw(measured_alphas(4, names=names, steps=["$\\frac{$", "_x"]), tmp_path, "steps")
        draw(make_linearity(2, 1, names=names[:2]), tmp_path, "$^$")
    labels = style.short_names(names, 30)
    assert labels[0] != labels[1]
    assert "\\$" in labels[0]
    assert labels[2] == "a/_hidden[31m"
    assert style.short_name("x/_y") == " _y"
    assert len(labels[3]) == 30
    assert labels[3].endswith("-end")
    assert style.short_name("org/model/") == "model"


def test_levels_show_means_deviations_and_counts():
    """A row per level, the whole model first; the points and bars are the file's."""
    linearity = make_linearity(3)
    figure = levels.levels_figure(linearity)
    score, projection, cosine = figure.axes
    order = ["model", "layer", "attention", "attention_head", "mlp", "head"]
    assert [label.get_text() for label in score.get_yticklabels()] == [
        "whole model (n = 1)", "decoder layers (n = 3)", "attention blocks (n = 3)", "attention heads (n = 3)",
        "MLP blocks (n = 3)", "output head (n = 1)",
    ]  # fmt: skip
    assert score.get_xscale() == "log"
    of_level = [linearity.levels[kind] for kind in order]
    for axis, values in (
        (score, [level.non_linearity.mean for level in of_level]),
        (projection, [one.mean for level in of_level for one in (level.projection_distance.pairs,
                                                                level.projection_distance.triples)]),
        (cosine, [1 - one.mean for level in of_level for one in (level.cosine.pairs, level.cosine.triples,
                                                                level.cosine_base)]),
    ):  # fmt: skip
        assert [float(one.lines[0].get_xdata()[0]) for one in axis.containers] == pytest.approx(values)
    (ends,) = score.containers[0].lines[2][0].get_segments()
    mean_std = linearity.levels["model"].non_linearity
    assert list(ends[:, 0]) == pytest.approx([mean_std.mean - mean_std.std, mean_std.mean + mean_std.std])
    assert f"{mean_std.mean:.2g}" in [text.get_text() for text in score.texts]
    width, height = figure.get_size_inches()
    assert height < width  # as high as the other figures of a card


def test_zero_and_nothing_do_not_vanish_from_a_logarithmic_axis():
    """An exactly linear level is an arrow at the edge and a 0; a level without change says so."""
    linearity = make_linearity(2)
    zero = linearity.levels["mlp"].non_linearity.model_copy(update={"mean": 0.0, "std": 0.0})
    changed = {
        **linearity.levels,
        "mlp": linearity.levels["mlp"].model_copy(update={"non_linearity": zero}),
        "head": linearity.levels["head"].model_copy(update={"non_linearity": None}),
    }
    figure = levels.levels_figure(linearity.model_copy(update={"levels": changed}))
    axis = figure.axes[0]
    arrows = [line for line in axis.lines if line.get_marker() == "<"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in arrows] == [(axis.get_xlim()[0], 4)]
    assert [text.get_text() for text in axis.texts][4:] == ["0", "no change"]


@pytest.mark.parametrize(("num_models", "panels"), [(1, 1), (2, 3), (3, 3)])
def test_levels_have_panels_for_what_was_merged(num_models, panels):
    """One expert: scores alone; two: pairs; three: triples as well."""
    figure = levels.levels_figure(make_linearity(num_models))
    assert len(figure.axes) == panels
    assert ("triples" in texts(figure)) is (num_models > 2)


def test_distances_are_the_matrices_of_the_file_beside_a_straight_line():
    """Whole model, middle layer and its MLP in one row per expert, on one colour scale."""
    linearity = make_linearity(2)
    figure = heatmaps.distances_figure(linearity)
    meshes = [axis.collections[0] for axis in figure.axes[:-1]]
    by_name = {entry.name: entry for entry in linearity.submodules}
    for place, name in enumerate(["model", "layer1", "mlp1"]):
        for expert in range(2):
            drawn = meshes[2 * place + expert].get_array()
            assert np.array_equal(drawn, by_name[name].distances[expert])
    ideal = np.abs(np.subtract.outer(np.arange(11), np.arange(11))) / 10
    assert np.allclose(meshes[-1].get_array(), ideal)
    assert {mesh.get_clim() for mesh in meshes} == {(0, 1)}
    for title in ("whole model", "layer 1", "MLP of layer 1", "if it were linear"):
        assert title in texts(figure)
    assert f"S = {by_name['model'].non_linearity[1]:.2g}" in texts(figure)


def test_what_is_cut_is_said():
    """Four of ten experts, three of their pairs."""
    linearity = make_linearity(10, 1)
    assert "first 4 of 10 experts" in texts(heatmaps.distances_figure(linearity))
    assert "first 3 of 45 pairs" in texts(heatmaps.disentanglement_figure(linearity))
    assert "Shown" not in texts(heatmaps.distances_figure(make_linearity(2)))


def test_disentanglement_is_laid_out_by_both_weights():
    """First expert's weight across, second's up; layers are means; next tokens have a scale of their own."""
    linearity = make_linearity(3)
    figure = heatmaps.disentanglement_figure(linearity)
    grids = [np.asarray(axis.collections[0].get_array()) for axis in figure.axes[:15]]
    whole = linearity.submodules[-1]
    layers = [entry for entry in linearity.submodules if entry.kind == "layer"]
    for pair in range(3):
        for first in range(5):
            for second in range(5):
                place = len(PAIR_GRID) * first + second  # the last expert's weight varies fastest
                assert grids[pair][second, first] == whole.disentanglement[pair][place]
                assert grids[12 + pair][second, first] == whole.disagreement[pair][place]
                mean = np.mean([entry.disentanglement[pair][place] for entry in layers])
                assert grids[3 + pair][second, first] == pytest.approx(mean)
    limits = [axis.collections[0].get_clim() for axis in figure.axes[:15]]
    assert len(set(limits[:12])) == len(set(limits[12:])) == 1
    cell = next(text for text in figure.axes[0].texts if text.get_position() == (0.4, 1.0))
    assert cell.get_text() == f"{100 * grids[0][4, 1]:.0f}"


def test_cells_hold_short_percentages():
    """Whole numbers, tenths below one."""
    known = {0.0: "0", 0.0031: ".3", 0.0099: "1", 0.0094: ".9", 0.124: "12", 1.5: "150"}
    values = tuple(itertools.islice(itertools.cycle(known), len(PAIR_GRID) ** 2))
    figure = heatmaps.disentanglement_figure(make_linearity(2, 1, spoil=lambda _: values))
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(text for text in cells if text in known.values()) == sorted(known[value] for value in values)


def test_numbers_that_are_missing_leave_grey_cells(tmp_path):
    """NaN may stand anywhere in a linearity file; nothing at all may be left of it."""
    holes = make_linearity(3, spoil=lambda values: (None, *values[1:]))
    figure = heatmaps.distances_figure(holes)
    assert np.ma.getmaskarray(np.ma.masked_invalid(figure.axes[0].collections[0].get_array()))[:, 0].all()
    assert "unchanged" in texts(figure)
    assert "–" in [text.get_text() for text in heatmaps.disentanglement_figure(holes).axes[0].texts]
    empty = make_linearity(2, 1, spoil=lambda values: (None,) * len(values))
    assert len(draw(empty, tmp_path)) == 6


def test_colours_survive_black_and_white():
    """The map's lightness rises evenly; series differ in marker as well as in hue."""
    shades = matplotlib.colormaps[style.MAP](np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(shades) > 0).all()
    looks = [style.Look.of(place) for place in range(10)]
    assert len({look.marker for look in looks}) == 10
    assert all(np.dot(to_rgb(look.color), (0.2126, 0.7152, 0.0722)) < 0.7 for look in looks)  # on white paper


def test_files_that_cannot_be_drawn_are_errors_of_our_own(tmp_path):
    """Nothing is drawn from nothing, from contradictions, or in a format that is not ours."""
    with refused(AlphasError, "missing-file", tmp_path / "none.json"):
        draw_alphas(tmp_path / "none.json", tmp_path / "x.png")
    with refused(AlphasError, "nothing-to-draw"):
        draw(make_alphas().model_copy(update={"submodules": ()}), tmp_path)
    linearity = make_linearity(2, 1)
    for changes in ({"models": ("one",)}, {"pairs": ((0, 7),)}, {"pairs": ()}):
        with refused(AlphasError, "damaged-file"):
            draw(linearity.model_copy(update=changes), tmp_path)
    for change in ({"distances": (((0.0,),),) * 2}, {"disentanglement": ((0.1,),)}):
        spoiled = (linearity.submodules[0].model_copy(update=change), *linearity.submodules[1:])
        with refused(AlphasError, "damaged-file", "layer0"):
            draw(linearity.model_copy(update={"submodules": spoiled}), tmp_path)
    with refused(OutputError, "unsupported-format", tmp_path / "x.gif"):
        draw_alphas(make_alphas(), tmp_path / "x.gif")
    (tmp_path / "file").write_text("")
    with refused(OutputError, "cannot-write", tmp_path / "file"):
        draw(make_alphas("model"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.process
def test_importing_the_figures_is_cheap():
    """Neither matplotlib nor torch before something is drawn."""
    code = (
        "import sys, mergekit_slta.reporting.figures.draw; print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    )
    folder = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert result.stdout.strip() == "set()", result.stderr
