"""Steps at merged models: divergences, slopes, points and alphas against whole models and autograd."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil

import pytest
import torch
from conftest import assert_applied, assert_refused, mergekit_yaml, refused, slta
from test_architectures import job_of, specimen  # noqa: F401 - a fixture
from test_backward import assert_close, stop_after, whole_model
from zoo import ZOO

from mergekit_slta.calibration.assemble import assemble
from mergekit_slta.calibration.calibrate import calibrate, gather_statistics, solve_job
from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.layout import SolveSettings
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.layout import layout_of
from mergekit_slta.objectives import costs
from mergekit_slta.objectives.costs import estimate_gradients as estimate
from mergekit_slta.objectives.gradient_passes import gather_derivatives, report_divergence
from mergekit_slta.objectives.solving import solve_together
from mergekit_slta.runner import head_loss
from mergekit_slta.runner.backward import BackwardPass
from mergekit_slta.runtime.distributed import ALONE
from mergekit_slta.runtime.resume import ResumeStore


def same(models, **settings):
    """A joint job whose steps share their rows."""
    usual = {"granularity": "attn_mlp", "steps": 2, "fresh_rows": False}
    return job_of(models, objective="joint", **{**usual, **settings})


@functools.lru_cache(maxsize=1)
def states_of(models) -> list[dict[str, torch.Tensor]]:
    """Parameters of the base and of the experts."""
    return [dict(whole_model(path).named_parameters()) for path in (models.base, *models.experts)]


def merged_model(models, job, point) -> torch.nn.Module:
    """The base, with every submodule moved by `point`, submodule -> [T]."""
    rename = job.skeleton.renamed
    states, merged = states_of(models), whole_model(models.base)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for submodule in job.submodules:
            for tensor in submodule.tensors:
                name = rename.get(tensor, tensor)
                parts = [part for part in submodule.slices if part.tensor == tensor]
                for expert, alpha in enumerate(point[submodule.name].tolist()):
                    change = alpha * (states[expert + 1][name] - states[0][name])
                    if not parts:
                        parameters[name].add_(change)
                    for part in parts:
                        where = (part.axis, part.start, part.stop - part.start)
                        parameters[name].narrow(*where).add_(change.narrow(*where))
    return merged


def answer_log_probabilities(model, example) -> torch.Tensor:
    logits = model(torch.tensor([list(example.row.ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits[example.row.completion - 1 : -1].float(), dim=-1)


def divergence(expert, model, example) -> torch.Tensor:
    """KL(expert || model), summed over the answer."""
    wanted, known = answer_log_probabilities(expert, example).detach(), answer_log_probabilities(model, example)
    return (wanted.exp() * (wanted - known)).sum()


def slopes_of(loss, merged, models, job) -> dict[str, torch.Tensor]:
    """submodule -> [T]: <d loss, change> from whole gradients of whole models."""
    rename = job.skeleton.renamed
    states = states_of(models)
    merged.zero_grad()
    loss.backward()
    parameters = dict(merged.named_parameters())
    found = {submodule.name: torch.zeros(len(states) - 1) for submodule in job.submodules}
    for submodule in job.submodules:
        for tensor in submodule.tensors:
            name = rename.get(tensor, tensor)
            gradient = parameters[name].grad
            for expert in range(len(states) - 1) if gradient is not None else ():
                product = gradient * (states[expert + 1][name] - states[0][name]).detach()
                own = [part for part in submodule.slices if part.tensor == tensor]
                parts = [product.narrow(part.axis, part.start, part.stop - part.start) for part in own] or [product]
                found[submodule.name][expert] += sum(part.sum() for part in parts)
    return found


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "granularity"), [*((name, "attn_mlp") for name in ZOO), ("qwen3", "head_mlp"), ("llama", "model")]
)
def test_a_step_equals_autograd(specimen, monkeypatch, name, granularity):  # noqa: F811
    """Divergences of base and point, their slopes, and those of a loss with known labels."""
    monkeypatch.setattr(head_loss, "label_uniforms", lambda *_: None)  # the rows' own tokens
    models = specimen(name)
    job = same(models, granularity=granularity, label_samples=1, steps=1)
    found = gather_statistics(job)
    assert found.form == "step"
    experts = [whole_model(path) for path in models.experts]
    base, merged = whole_model(models.base), merged_model(models, job, found.point)
    expected: dict[str, list[torch.Tensor]] = {key: [] for key in found.by_submodule}
    for row, example in enumerate(job.examples()):
        teacher = experts[example.task]
        felt = divergence(teacher, merged, example)
        for place, model in enumerate((base, merged)):
            assert found.divergences[row, place] == pytest.approx(
                divergence(teacher, model, example).item(), rel=1e-4, abs=1e-5
            )
        wanted = torch.tensor(list(example.row.ids[example.row.completion :]))
        loss = -answer_log_probabilities(merged, example).gather(1, wanted[:, None]).sum()
        both = [slopes_of(part, merged, models, job) for part in (felt, loss)]
        for key, parts in expected.items():
            parts.append(torch.stack([part[key] for part in both]))
    assert_close(found.by_submodule, {key: torch.stack(parts) for key, parts in expected.items()})


@pytest.mark.parametrize("objective", ["features", "joint"])
@pytest.mark.parametrize("pad", [0, 7, 319])
def test_the_padding_token_is_a_token_like_others(tiny, tmp_path, objective, pad):
    """A base's `pad_token_id` changes nothing: not one that occurs in the rows, nor one beyond the rows that occur."""
    padded = tmp_path / "padded"
    for source in (tiny.base, *tiny.experts[:2]):
        shutil.copytree(source, padded / source.name)
        config = json.loads((source / "config.json").read_text())
        (padded / source.name / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    own = {"steps": 1} if objective == "joint" else {}
    recipe = tiny.recipe(2, objective=objective, granularity="attn_mlp", num_samples=3, **own)
    expected = calibrate(recipe)
    recipe["base_model"] = str(padded / tiny.base.name)
    for entry, source in zip(recipe["models"], tiny.experts, strict=False):
        entry["model"] = str(padded / source.name)
    found = calibrate(recipe)
    assert [entry.alpha for entry in found.submodules] == [entry.alpha for entry in expected.submodules]


def test_points_follow_from_the_solves_before(specimen):  # noqa: F811
    """Step by step as by hand: solve at the experts, merge, solve there, merge, and solve once more."""
    models = specimen("qwen3")
    found = [gather_statistics(same(models, steps=steps)) for steps in range(3)]
    job = same(models, steps=2)
    layout = layout_of(job)
    assert [each.form for each in found] == ["slope", "step", "step"]
    for before, after in itertools.pairwise(found):
        entries = solve_together(before, layout).entries
        names = [layout.models.index(name) for name in layout.canonical]
        for entry in entries:
            assert after.point[entry.name].tolist() == [entry.alpha[place] for place in names]
    alphas = solve_job(job, found[2])
    assert alphas.calibration["steps"] == 2
    assert 0 <= alphas.submodules[0].residual < 1


def test_steps_lead_to_the_experts(specimen):  # noqa: F811
    """Each lowers the divergence that is measured at the next point."""
    models = specimen("llama")
    left = []
    for steps in (1, 2, 3):
        found = gather_statistics(same(models, steps=steps, num_samples=8, label_samples=4))
        base, here = found.divergences.sum(0).tolist()
        left.append(here / base)
    assert left[2] < left[1] < left[0] < 1


# Of one pass; of passes that share their rows; of passes with rows of their own.
@pytest.mark.parametrize(("settings", "stops"), [({"steps": 0}, 6), ({}, 14), ({"fresh_rows": True}, 16)])
def test_goes_on_where_it_was_stopped(specimen, tmp_path, settings, stops):  # noqa: F811
    """Stopped behind every step of every pass in turn, the rest gives the same bits."""
    job = same(specimen("qwen3"), **settings)
    whole = gather_statistics(job)
    folder = tmp_path / ".partial"
    for stop in range(stops):
        stop_after(job, folder, 0)  # behind the next one
        with ResumeStore(folder, "same") as records:
            records.open()
            assert len(records.finished) == stop + 1  # 4 of each pass, the teachers and the base (of each step's rows)
    with ResumeStore(folder, "same") as records:
        records.open()
        found = gather_statistics(job, records)
        assert len(records.finished) == stops
    assert all(torch.equal(found.by_submodule[key], whole.by_submodule[key]) for key in whole.by_submodule)
    assert torch.equal(found.losses, whole.losses)
    if found.form == "step":
        assert all(torch.equal(found.point[key], whole.point[key]) for key in whole.point)
        assert torch.equal(found.divergences, whole.divergences)
    if found.row_step is not None:
        assert torch.equal(found.row_step, whole.row_step)
    assert not list(folder.glob("*streams"))


def test_rows_without_an_answer_and_a_single_row(tmp_path, specimen):  # noqa: F811
    """One row per task is enough; nothing is divided by what is missing."""
    job = same(specimen("llama"), num_samples=1)
    found = gather_derivatives(job, resume=None, ranks=ALONE)
    alphas = solve_job(job, found)
    assert all(entry.stderr is None for entry in alphas.submodules)
    found.save(tmp_path / "stats.safetensors")
    again = Statistics.load(tmp_path / "stats.safetensors")
    assert again.form == "step"
    assert torch.equal(again.divergences, found.divergences)
    assert all(torch.equal(again.point[key], found.point[key]) for key in found.point)


@pytest.mark.parametrize(
    ("earlier", "left", "row_step", "said"),
    [
        (0.2, 0.3, None, True),
        (0.3, 0.2, None, False),
        (0.2, 0.3, [1, 2], True),
        (0.2, 0.22, [1, 2], False),
        (0.2, 0.9, [1, 1], False),
    ],
)
def test_a_step_that_leads_away_is_said(caplog, earlier, left, row_step, said):
    """Divergences at two points, as shares of the base's; of other rows, a little more is put down to these, and
    nothing is said where the first were fitted already."""
    row_task = torch.zeros(2, dtype=torch.int64)
    older = earlier if row_step is None else 0.9
    before = Statistics(row_task, 1, form="step", divergences=torch.tensor([[1.0, older], [1.0, earlier]]))
    before.row_step = None if row_step is None else torch.tensor(row_step)
    with caplog.at_level(logging.WARNING):
        number = 2 if row_step is None else 1 + max(row_step)
        report_divergence(number, before, torch.tensor([[1.0, left], [1.0, left]]))
    assert (f"step {number - 1} increased the divergence from the experts from 20.0%" in caplog.text) == said


def test_costs_are_counted(specimen, tmp_path):  # noqa: F811
    job = same(specimen("qwen3"), label_samples=3, steps=2)
    expert_only = estimate(same(specimen("qwen3"), label_samples=3, steps=0))
    costs = estimate(job)
    assert costs.flops / expert_only.flops == pytest.approx((8 + 1 + 2 * 10) / (8 + 1))
    largest = 0

    class Watching(ResumeStore):
        def put(self, step, tensors):
            nonlocal largest
            super().put(step, tensors)
            stores = self.folder.glob("*activations/activations.bin")
            largest = max([largest, *(path.stat().st_size for path in stores)])

    with Watching(tmp_path / ".partial", "same") as records:
        records.open()
        gather_statistics(job, records)
    assert largest == costs.scratch_bytes


def test_from_recipe_to_model_by_the_stock_command(tiny, tmp_path, write_recipe):
    """Two steps on the same rows. What depends on the earlier solves cannot be solved again with other settings."""
    recipe = tiny.recipe_with_answers(objective="joint", steps=2, fresh_rows=False)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    alphas = assert_applied(tiny, tmp_path / "out")
    assert alphas.calibration["steps"] == 2
    statistics = tmp_path / "out" / "slta_stats.safetensors"
    assert slta("solve", statistics, "-o", tmp_path / "same.json").exit_code == 0
    assert Alphas.load(tmp_path / "same.json").submodules == alphas.submodules
    for option in (("--without", "expert2"), ("--ridge", "3"), ("--rows", "2"), ("--no-balance",)):
        result = slta("solve", statistics, *option, "-o", tmp_path / "other.json")
        assert_refused(result, "needs-calibration", "`steps: 2`")
    assert slta("report", tmp_path / "out").exit_code == 0
    assert slta("report", statistics, "-o", tmp_path / "figures").exit_code == 0


def test_the_order_of_the_models_does_not_matter(tiny, tmp_path, write_recipe):
    recipe = tiny.recipe(objective="joint", steps=1)
    found = []
    for number in range(2):
        path = tmp_path / str(number) / "slta_alphas.json"  # no statistics are beside it to begin with
        assert slta("calibrate", write_recipe(recipe), "-o", path, "--quiet").exit_code == 0
        found.append(Alphas.load(path))
        recipe["models"].reverse()
    for entry, other in zip(found[0].submodules, found[1].submodules, strict=True):
        assert entry.alpha == tuple(reversed(other.alpha))


def test_every_pass_draws_labels_of_its_own(specimen, monkeypatch):  # noqa: F811
    seeds = []
    original = BackwardPass.__init__

    def spy(self, *args, seed, **kwargs):
        seeds.append(seed)
        original(self, *args, seed=seed, **kwargs)

    monkeypatch.setattr(BackwardPass, "__init__", spy)
    gather_statistics(same(specimen("llama"), seed=7))
    experts, _, first, second = seeds  # the base's pass draws none
    assert len({experts, first, second}) == 3


@pytest.fixture(scope="module")
def one_step(specimen, tmp_path_factory):  # noqa: F811
    """A file of statistics after one step."""
    path = tmp_path_factory.mktemp("step") / "stats.safetensors"
    gather_statistics(same(specimen("llama"), steps=1, num_samples=2)).save(path)
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.point.pop("embed"),
        lambda found: found.point.update(embed=torch.zeros(1, dtype=torch.float64)),
        lambda found: found.point.update(embed=torch.full((2,), float("nan"), dtype=torch.float64)),
        lambda found: setattr(found, "divergences", None),
        lambda found: setattr(found, "divergences", found.divergences[:, :1]),
        lambda found: setattr(found, "form", "slope"),
        lambda found: found.by_submodule.update({key: part[:, :1] for key, part in found.by_submodule.items()}),
        lambda found: setattr(found, "row_step", torch.ones(len(found.row_task))),
        lambda found: setattr(found, "row_step", torch.ones(len(found.row_task) - 1, dtype=torch.int64)),
        lambda found: setattr(found, "row_step", torch.zeros_like(found.row_task)),
        lambda found: setattr(found, "row_step", torch.ones_like(found.row_task) * 2**62),
    ],
)
def test_damaged_statistics_are_refused(one_step, tmp_path, damage):
    """Parts that are missing, of another shape or kind, or no numbers: one line, not a wrong solve."""
    found = Statistics.load(one_step)
    damage(found)
    found.save(tmp_path / "stats.safetensors")
    with refused(AlphasError, "damaged-file", tmp_path / "stats.safetensors"):
        Statistics.load(tmp_path / "stats.safetensors")


def test_assembly_keeps_importance_and_ridge(specimen):  # noqa: F811
    """An important task moves its expert's weights; a huge ridge leaves the point."""
    job = same(specimen("llama"), steps=1)
    found = gather_statistics(job)
    layout = layout_of(job)

    def alphas(importance, ridge):
        how = {"importance": dict(zip(layout.canonical, importance, strict=True)), "balance": True, "ridge": ridge}
        solved = assemble(found, layout.model_copy(update={"solve": SolveSettings(**how)}))
        return torch.tensor([entry.alpha for entry in solved.submodules])

    assert not torch.allclose(alphas([1.0, 1.0], 1.0), alphas([1.0, 9.0], 1.0), atol=1e-3)
    columns = [layout.canonical.index(name) for name in layout.models]
    point = torch.stack([found.point[entry.name][columns] for entry in layout.submodules])
    torch.testing.assert_close(alphas([1.0, 1.0], 1e9).double(), point, rtol=1e-5, atol=1e-6)


def test_what_a_step_has_looked_at_is_not_extreme(specimen):  # noqa: F811
    """Weights far outside the usual are no news where they come from the merged model itself."""
    job = same(specimen("llama"), steps=1)
    found = gather_statistics(job)
    found.point = {key: torch.full_like(part, 9.0) for key, part in found.point.items()}
    layout = layout_of(job)
    layout = layout.model_copy(update={"solve": layout.solve.model_copy(update={"ridge": 1e9})})
    entries = solve_together(found, layout).entries
    assert all(alpha == pytest.approx(9.0) for entry in entries for alpha in entry.alpha)
    assert not any(entry.flags for entry in entries)


def test_memory_of_the_output_projection_is_counted(specimen, monkeypatch):  # noqa: F811
    """Two gradients by the logits of the longest row for every draw; a solve among many rows where that is more."""
    models = specimen("qwen3")
    jobs = [same(models, steps=0, label_samples=count) for count in (100, 300)]
    head = jobs[0].skeleton.shapes[jobs[0].skeleton.embedding_weight]
    longest = max(len(row.ids) for rows in jobs[0].rows for row in rows.rows)
    monkeypatch.setattr(costs, "SOLVE_MATRICES", 0)
    few, many = (estimate(job).peak_bytes for job in jobs)
    assert many - few == pytest.approx(200 * 2 * longest * head[0] * 4 * costs.MEMORY_MARGIN, abs=2)
    monkeypatch.setattr(costs, "SOLVE_MATRICES", 1000)
    draws = 300 * sum(len(rows.rows) for rows in jobs[1].rows)
    slopes = 6 * draws * 2 * len(jobs[1].submodules) * 8
    assert estimate(jobs[1]).peak_bytes == int(costs.MEMORY_MARGIN * (1000 * draws**2 * 8 + slopes))
