"""The search of `objective: joint`: the rows of each step, where it starts, which steps it takes, and when it stops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import PLAIN_JOINT, assert_applied, assert_refused, mergekit_yaml, read, slta
from mergekit.options import MergeOptions
from test_architectures import job_of
from test_gauss_newton import as_array
from test_gauss_newton import reference as normal_equations

from mergekit_slta.calibration.calibrate import calibrate, gather_statistics, solve_job
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import prepare
from mergekit_slta.maths.ridges import FAILED_FACTOR, FIRST_RIDGES, RIDGE_FACTORS
from mergekit_slta.objectives import joint_search
from mergekit_slta.recipe.objectives import MAX_STEPS
from mergekit_slta.runner.lanes import Measured


@pytest.fixture
def searching(specimen, with_rows):
    """Make a joint job with 20 rows per task: 16 to fit, and 4 that are held out, 2 of which choose."""

    def make(**settings):
        usual = {"granularity": "attn_mlp", "label_samples": 2, "num_samples": 2}
        return job_of(with_rows(specimen("llama")), **PLAIN_JOINT, **{**usual, **settings})

    return make


class Landscape:
    """Passes over models whose divergences are quadratic in all alphas: D_x = 1/2 mean_s (u_xs (alpha - o_x))^2.

    Args:
        job: the job; its rows and submodules count, not its models.
        optimum: (task, submodule) -> the optimum's weights, on average over rows.
        noise: standard deviation of a row's optimum.
        distort: changes what is measured: (divergences [rows, P], alphas [P, K]) -> divergences.
        size: task -> factor of its divergences.
        idle: (submodule, expert) without effect.

    Attributes:
        fitted: (label, examples, point, seed) of every pass with derivatives.
        measured: (label, examples, points) of every measurement.
    """

    def __init__(self, job, optimum, noise=0.0, distort=None, size=lambda task: 1.0, idle=None) -> None:
        self.names, self.experts = [part.name for part in job.submodules], len(job.experts)
        self.fitted, self.measured = [], []
        self._optimum, self._noise, self._size = optimum, noise, size
        self._distort = distort or (lambda divergences, _: divergences)
        self._idle = [] if idle is None else [self.names.index(idle[0]) * self.experts + idle[1]]

    def __call__(self, job, resume, ranks, progress):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _flat(self, point) -> torch.Tensor:
        """[K] the alphas of a point; None is the base."""
        if point is None:
            return torch.zeros(len(self.names) * self.experts, dtype=torch.float64)
        return torch.cat([point[name] for name in self.names])

    def _row(self, example) -> tuple[torch.Tensor, torch.Tensor]:
        """(u [S, K], optimum [K]) of a row."""
        generator = torch.Generator().manual_seed(hash((example.task, *example.row.ids)) % 2**31)
        count = len(self.names) * self.experts
        u = torch.randn((3, count), generator=generator, dtype=torch.float64) * self._size(example.task) ** 0.5
        u[:, self._idle] = 0
        wish = torch.cat([torch.as_tensor(self._optimum(name), dtype=torch.float64) for name in self.names])
        return u, wish + self._noise * torch.randn(count, generator=generator, dtype=torch.float64)

    def derivatives(self, label, examples, point, *, label_samples, seed, title=""):
        self.fitted.append((label, examples, point, seed))
        rows = []
        for example in examples:
            u, optimum = self._row(example)
            gradient = (u * (u @ (self._flat(point) - optimum))[:, None]).mean(0)
            rows.append(torch.cat([gradient[None], u]))
        parts = torch.stack(rows).split(self.experts, dim=2)
        return dict(zip(self.names, parts, strict=True))

    def measure(self, label, examples, points, *, title=""):
        self.measured.append((label, examples, points))
        flat = torch.stack([self._flat(point) for point in points])  # [P, K]
        rows = [((flat - optimum) @ u.T).square().mean(1) / 2 for u, optimum in map(self._row, examples)]
        found = self._distort(torch.stack(rows), flat)
        return Measured(found, found + 1, torch.ones(len(examples), dtype=torch.float64))


def constant(value):
    """The same optimum for every expert in every submodule."""
    return lambda name: [value, value]


@pytest.fixture
def search(monkeypatch):
    """Search a landscape; returns the landscape and the alphas with their evaluation."""

    def run(job, optimum=None, **settings) -> tuple[Landscape, Alphas]:
        land = Landscape(job, optimum or constant(0.8), **settings)
        monkeypatch.setattr(joint_search, "Passes", land)
        return land, solve_job(job, gather_statistics(job))

    return run


def rows_of(examples) -> list[tuple[int, int]]:
    return [(example.task, example.row.number) for example in examples]


def steps_of(alphas: Alphas) -> list[list]:
    """The trials of each step."""
    found: dict[str, list] = {}
    for trial in alphas.evaluation.trials:
        found.setdefault(trial.name, []).append(trial)
    assert list(found) == [f"step {number}" for number in range(1, len(found) + 1)]
    return list(found.values())


def names_of(alphas: Alphas) -> list[str]:
    return [point.name for point in alphas.evaluation.points]


def test_every_step_takes_the_next_rows(searching, search):
    """As long as there are new ones, then all over again; labels are drawn anew. None of them is held out."""
    job = searching(steps=10)
    land, _ = search(job, noise=0.5)
    assert len(land.fitted) == 10
    drawn = [[row.number for row in task.rows] for task in job.task_rows()]
    assert [len(numbers) for numbers in drawn] == [16, 16]
    for step, (_, examples, point, seed) in enumerate(land.fitted):
        first = 2 * (step % 8)
        assert rows_of(examples) == [(task, number) for task in (0, 1) for number in drawn[task][first : first + 2]]
        assert seed == job.recipe.settings.seed + step + 1
        assert point is not None
    acceptance = [[row.number for row in task.held_out[:2]] for task in job.task_rows()]
    for _, examples, _ in land.measured:
        assert rows_of(examples) == [(task, number) for task in (0, 1) for number in acceptance[task]]
    for task, rows in enumerate(job.task_rows()):
        assert not {row.number for row in rows.held_out} & set(drawn[task])
        assert not {row.ids for row in rows.held_out} & {row.ids for row in rows.rows}


def test_few_rows_make_fewer_larger_groups(searching, search):
    """16 rows for steps of 5: three groups, of 5 or 6 rows each."""
    land, _ = search(searching(steps=5, num_samples=5), noise=0.5)
    groups = [rows_of(examples) for _, examples, _, _ in land.fitted]
    assert [len(group) for group in groups] == [10, 10, 12, 10, 10]
    assert groups[3:] == groups[:2]
    assert len({row for group in groups[:3] for row in group}) == 32


def test_without_fresh_rows_every_step_takes_the_same(searching, search):
    land, _ = search(searching(steps=3, num_samples=5, fresh_rows=False), noise=0.5)
    groups = [rows_of(examples) for _, examples, _, _ in land.fitted]
    assert groups[0] == groups[1] == groups[2]
    assert len({seed for *_, seed in land.fitted}) == 3


@pytest.mark.parametrize("best", ["base", "average", "features"])
def test_starts_from_the_best_candidate(searching, search, best):
    """Base, average and the alphas of `features` from the first step's rows are measured in one pass."""
    job = searching(steps=1)
    features = features_alphas(job)
    optimum = {"base": constant(0.02), "average": constant(0.51), "features": lambda name: features[name]}[best]
    land, alphas = search(job, optimum)
    _, _, (base, average, given) = land.measured[0]
    assert base is None
    assert all(torch.equal(part, torch.full((2,), 0.5, dtype=torch.float64)) for part in average.values())
    assert {name: part.tolist() for name, part in given.items()} == features
    start = {"base": {name: [0.0, 0.0] for name in features}, "average": {name: [0.5, 0.5] for name in features}}
    (_, _, point, _), *_ = land.fitted or [(None, None, given, None)]  # features is the optimum: there is no step
    assert {name: part.tolist() for name, part in point.items()} == start.get(best, features)
    assert names_of(alphas)[:3] == ["base", "average", "features"]


def features_alphas(job) -> dict[str, list[float]]:
    """submodule -> alphas of `objective: features` from the rows of the first step, in canonical order."""
    first = {(example.task, example.row.number) for example in job.examples(0)}
    order = {model: place for place, model in enumerate(job.experts)}
    rows = tuple(
        dataclasses.replace(drawn, rows=tuple(row for row in drawn.rows if (order[task.model], row.number) in first))
        for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)
    )
    recipe = read(
        {
            "merge_method": "submodule_linear",
            "base_model": str(job.recipe.base),
            "models": [
                {"model": str(task.model), "parameters": {"dataset": task.dataset}} for task in job.recipe.tasks
            ],
            "parameters": {"granularity": "attn_mlp", "num_samples": 2, "max_seq_length": 12},
        }
    )
    plain = dataclasses.replace(prepare(recipe, MergeOptions(quiet=True), for_merge=False), rows=rows)
    alphas = solve_job(plain, gather_statistics(plain))
    columns = [alphas.models.index(plain.recipe.label(model)) for model in plain.experts]
    return {entry.name: [entry.alpha[column] for column in columns] for entry in alphas.submodules}


def test_the_result_is_the_best_of_the_models_that_were_taken(searching, search):
    """Its alphas, its divergence and its share are in the file."""
    for importance in ([1.0, 1.0], [1.0, 5.0]):
        job = searching(steps=4)
        tasks = [
            task.model_copy(update={"importance": w}) for task, w in zip(job.recipe.tasks, importance, strict=True)
        ]
        job = dataclasses.replace(job, recipe=job.recipe.model_copy(update={"tasks": tuple(tasks)}))
        land, alphas = search(job, lambda name: [0.9, 0.4], noise=0.3)
        told = alphas.evaluation
        merge = told.points[told.merge]
        assert merge.weighted == min(point.weighted for point in told.points)
        for point in told.points:
            base = [measure.mean for measure in told.points[0].divergence]
            shares = [measure.mean / of_base for measure, of_base in zip(point.divergence, base, strict=True)]
            assert point.weighted == pytest.approx(np.average(shares, weights=importance))
        assert [task.divergence.mean for task in told.tasks] == [measure.mean for measure in merge.divergence]
        assert {entry.residual for entry in alphas.submodules} == {merge.weighted}
        columns = [alphas.models.index(job.recipe.label(model)) for model in job.experts]
        alpha = {entry.name: torch.tensor([entry.alpha[c] for c in columns]).double() for entry in alphas.submodules}
        again = land.measure("", land.measured[0][1], [alpha]).divergences[:, 0]
        assert [float(again[:2].mean()), float(again[2:].mean())] == pytest.approx(
            [merge.divergence[column].mean for column in columns], rel=1e-5
        )


def shares(divergences: np.ndarray, land: Landscape) -> np.ndarray:
    """[P] weighted divergences of models, from those of 2 rows of each of 2 tasks; Inf for NaN."""
    scales = land_divergences(land, 0)[:, 0].reshape(2, 2).mean(1)
    return np.nan_to_num((divergences.reshape(2, 2, -1).mean(1) / scales[:, None]).mean(0), nan=np.inf, posinf=np.inf)


def gains(first: np.ndarray, last: np.ndarray, land: Landscape) -> bool:
    """Whether the weighted divergence falls by more than its standard error, by explicit arithmetic."""
    scales = land_divergences(land, 0)[:, 0].reshape(2, 2).mean(1)
    gain = (first - last).reshape(2, 2) / scales[:, None]  # [task, row]
    return bool(gain.mean() > np.sqrt((gain.var(1, ddof=1) / 2).sum()) / 2)


def flattered(land: Landscape, path: list[np.ndarray]) -> np.ndarray:
    """[tasks] nats by which the choices of the search are estimated to flatter its result: each row's divergence of the
    model that all other rows would choose, minus that of the one chosen."""
    scales = land_divergences(land, 0)[:, 0].reshape(2, 2).mean(1).repeat(2)
    total = np.zeros(4)
    for number in range(len(land.measured)):
        found = land_divergences(land, number)
        among = found if number == 0 else np.concatenate([path[number - 1][:, None], found], axis=1)
        parts = among / scales[:, None]
        for row in range(4):
            others = np.delete(parts, row, axis=0).sum(0).argmin()
            total[row] += among[row, others] - among[row, parts.sum(0).argmin()]
    return total.reshape(2, 2).mean(1)


def replay(land: Landscape) -> tuple[list[bool], list[np.ndarray]]:
    """Whether each step has a better trial than the model before it; [rows] divergences of the model before each step,
    and of the last one."""
    start = land_divergences(land, 0)
    taken, path = [], [start[:, shares(start, land).argmin()]]
    for number in range(1, len(land.measured)):
        found = land_divergences(land, number)
        best = found[:, shares(found, land).argmin()]
        taken.append(bool(shares(best, land) < shares(path[-1], land)))
        path.append(best if taken[-1] else path[-1])
    return taken, path


def land_divergences(land: Landscape, number: int) -> np.ndarray:
    """[rows, P] of a measurement."""
    label, examples, points = land.measured[number]
    found = land.measure(label, examples, points).divergences.numpy()
    land.measured.pop()
    return found


@pytest.mark.parametrize(
    ("optimum", "noise", "is_kept", "are_all_taken"),
    [(0.8, 0.0, True, True), (0.8, 0.3, True, False), (0.8, 0.6, False, False), (0.3, 0.4, False, False)],
)
def test_a_step_that_makes_things_worse_is_not_taken(searching, search, optimum, noise, is_kept, are_all_taken):
    """Ridges follow the best trial of a step that is taken, and grow after others. Steps that together gain less than
    their standard error are forgotten."""
    land, alphas = search(searching(steps=6, seed=3), constant(optimum), noise=noise)
    taken, path = replay(land)
    assert (gains(path[0], path[-1], land), all(taken)) == (is_kept, are_all_taken)
    expected = [f"step {number}" for number, was_taken in enumerate(taken, 1) if was_taken] if is_kept else []
    assert names_of(alphas) == ["base", "average", "features", *expected]
    ridges = list(FIRST_RIDGES)
    for trials, was_taken in zip(steps_of(alphas), taken, strict=True):
        assert [trial.ridge for trial in trials] == pytest.approx(ridges)
        new = min(trials, key=lambda trial: trial.weighted)
        for point in alphas.evaluation.points:
            assert point.name != new.name or (point.ridge, point.weighted) == (new.ridge, pytest.approx(new.weighted))
        factors, center = (RIDGE_FACTORS, new.ridge) if was_taken else (ridges, FAILED_FACTOR)
        ridges = [factor * center for factor in factors]
    merge = alphas.evaluation.points[alphas.evaluation.merge]
    assert merge.weighted == pytest.approx(float(shares(path[-1] if is_kept else path[0], land)[0]))
    bias = flattered(land, path).clip(0)
    assert bias.any() == (noise > 0)
    for task, own, chosen in zip(alphas.evaluation.tasks, merge.divergence, bias, strict=True):
        assert task.divergence.stderr == pytest.approx(np.hypot(own.stderr, min(chosen, own.stderr)))


@pytest.mark.parametrize("balance", [True, False])
def test_every_step_solves_with_the_rows_so_far(searching, search, balance):
    """Those of earlier steps fade, and their forms are those of the new point."""
    job = searching(steps=3, balance=balance)
    land, alphas = search(job, noise=0.2, size=lambda task: 1.0 + task)
    base = land_divergences(land, 0)[:, 0].reshape(2, 2).mean(1)
    slopes, tasks, numbers, before = {}, [], [], None
    for number, (label, examples, point, seed) in enumerate(list(land.fitted)):
        own = land.derivatives(label, examples, point, label_samples=2, seed=seed)
        for name, part in own.items():
            along = sum(slopes[other][:, 1:] @ (point[other] - before[other]) for other in slopes)
            old = [slopes[name].clone()] if slopes else []
            for moved in old:
                moved[:, 0] += (moved[:, 1:] * along[..., None]).mean(1)
            own[name] = torch.cat([*old, part])
        slopes, before = own, point
        tasks += [example.task for example in examples]
        numbers += [number] * len(examples)
        case = {
            "slopes": slopes, "point": point, "row_task": torch.tensor(tasks), "row_step": torch.tensor(numbers),
            "scales": torch.from_numpy(base if balance else np.ones(2)),
        }  # fmt: skip
        trials = land.measured[1 + number][2]
        for tried, trial in zip(steps_of(alphas)[number], trials, strict=True):
            expected = normal_equations(case, tried.ridge, [1.0, 1.0])
            np.testing.assert_allclose(as_array(trial), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distort", [None, lambda divergences, alphas: divergences + 100 * (alphas.std(1) > 1e-9)])
def test_an_expert_that_no_row_shows_keeps_its_weight(searching, search, distort):
    """That of the starting point, with which the merge was measured, where its weights are not the base's."""
    job = searching(steps=2)
    name = job.submodules[2].name
    land, alphas = search(job, idle=(name, 1), distort=distort)
    merge = alphas.evaluation.points[alphas.evaluation.merge].name
    assert merge == ("step 2" if distort is None else "average")
    assert not any(entry.unchanged for entry in alphas.submodules)
    idle = alphas.models.index(job.recipe.label(job.experts[1]))
    (alpha,) = [entry.alpha[idle] for entry in alphas.submodules if entry.name == name]
    assert alpha != 0
    assert alpha in [float(point[name][1]) for point in land.measured[0][2] if point is not None]


@pytest.mark.parametrize("distort", [None, lambda divergences, alphas: divergences + 100 * (alphas.std(1) > 1e-9)])
def test_an_expert_that_is_the_base_somewhere_gets_nothing_there(searching, search, monkeypatch, distort):
    """In the file, whether the merge is a step's or a starting point; it is marked."""
    job = searching(steps=2)
    part, raw = job.submodules[2], Checkpoints.raw

    def with_equal(own, tensor, models=None):
        found = raw(own, tensor, models)
        if tensor in part.tensors and models == [0, 2]:
            found[1] = found[0]
        return found

    monkeypatch.setattr(Checkpoints, "raw", with_equal)
    _, alphas = search(job, idle=(part.name, 1), distort=distort)
    idle = job.recipe.label(job.experts[1])
    for entry in alphas.submodules:
        assert entry.unchanged == ((idle,) if entry.name == part.name else ())
        assert (entry.alpha[alphas.models.index(idle)] == 0) == (entry.name == part.name)


def away(divergences, alphas):
    """Every model that is not constant is worse: all trials."""
    return divergences + 100 * (alphas.std(1) > 1e-9)


def test_auto_stops_after_two_steps_in_turn_that_are_not_taken(searching, search):
    """`steps: N` makes all N."""
    land, alphas = search(searching(), distort=away)
    assert len(land.fitted) == len(steps_of(alphas)) == 2
    assert names_of(alphas) == ["base", "average", "features"]
    land, alphas = search(searching(steps=5), distort=away)
    assert len(land.fitted) == len(steps_of(alphas)) == 5
    ridges = [[trial.ridge for trial in trials] for trials in steps_of(alphas)]
    assert ridges == [pytest.approx([FAILED_FACTOR**step * ridge for ridge in FIRST_RIDGES]) for step in range(5)]


def test_auto_stops_where_two_steps_together_gain_too_little(searching, search):
    """Less than the standard error of what they gain; as many steps as `steps: N` makes have the same trials."""
    land, alphas = search(searching(), noise=0.3)
    taken, path = replay(land)
    count = len(taken)
    assert 2 < count < MAX_STEPS
    assert [gains(path[step - 2], path[step], land) for step in range(2, count + 1)] == [True] * (count - 2) + [False]
    _, others = search(searching(steps=count), noise=0.3)
    assert [trial.ridge for trial in others.evaluation.trials] == [trial.ridge for trial in alphas.evaluation.trials]


def test_auto_goes_on_while_steps_gain(searching, search):
    """Up to a stated number; a step that is not taken between two that are does not end it."""
    calls: list[int] = []

    def every_other(divergences, alphas):
        calls.append(0)
        return divergences + 1e9 * (len(calls) % 2 == 0)

    land, alphas = search(searching(), constant(20.0), distort=every_other)
    assert names_of(alphas)[3:] == [f"step {number}" for number in range(2, 13, 2)]
    assert len(land.fitted) == len(steps_of(alphas)) == MAX_STEPS == 12


def test_nothing_is_left_to_gain_at_an_expert(specimen, with_rows):
    """A single expert: the average is the expert, and there is no step."""
    models = with_rows(specimen("llama"))
    recipe = models.recipe(1, **PLAIN_JOINT, granularity="attn_mlp", num_samples=2, max_seq_length=12)
    alphas = calibrate(recipe)
    assert alphas.evaluation.points[alphas.evaluation.merge].name == "average"
    assert alphas.evaluation.trials == ()
    assert all(entry.alpha == (1.0,) for entry in alphas.submodules)


def test_nothing_is_left_to_gain_near_the_optimum(searching, search):
    """Below a ten-thousandth of the base's divergence no step is made."""
    for optimum, steps in ((0.501, 0), (0.51, 1)):
        land, alphas = search(searching(steps=1), constant(optimum))
        assert len(land.fitted) == len(steps_of(alphas)) == steps


def test_a_given_ridge_is_the_only_one(searching, search):
    """After steps that are taken, and after others."""
    for distort in (None, away):
        _, alphas = search(searching(steps=3, ridge=0.7), distort=distort)
        assert [[trial.ridge for trial in trials] for trials in steps_of(alphas)] == [[0.7]] * 3


def explode(divergences, alphas):
    """Models far from the average overflow."""
    return divergences.where((alphas.abs() < 0.9).all(1)[None], torch.tensor(float("nan"), dtype=torch.float64))


def test_trials_that_explode_are_not_taken(searching, search, tmp_path):
    """They are in the file without a value; others of the same step may be taken."""
    _, alphas = search(searching(steps=4), constant(1.5), distort=explode)
    trials = alphas.evaluation.trials
    assert any(trial.weighted is None for trial in trials)
    partly = [own[0].name for own in steps_of(alphas) if len({trial.weighted is None for trial in own}) == 2]
    assert set(partly) & set(names_of(alphas))
    assert max(alpha for entry in alphas.submodules for alpha in entry.alpha) < 0.9
    alphas.save(tmp_path / "alphas.json")
    assert Alphas.load(tmp_path / "alphas.json").evaluation == alphas.evaluation

    def all_explode(divergences, alphas):
        return divergences.where((alphas.abs() <= 0.5).all(1)[None], torch.tensor(float("inf"), dtype=torch.float64))

    _, alphas = search(searching(steps=2), constant(1.5), distort=all_explode)
    assert {trial.weighted for trial in alphas.evaluation.trials} == {None}
    first, second = steps_of(alphas)
    assert [trial.ridge for trial in second] == pytest.approx([FAILED_FACTOR * trial.ridge for trial in first])
    assert alphas.evaluation.points[alphas.evaluation.merge].name == "average"
    assert "features" not in names_of(alphas) or all(point.weighted < 1e9 for point in alphas.evaluation.points)


def test_a_weak_expert_has_the_mean_weight_of_the_others(searching, search):
    """Its task has a hundredth of the divergence: it is named, and weighed as if it had the other's. Without `balance`
    it is named, too."""
    for balance in (True, False):
        job = searching(steps=1, balance=balance)
        weak = job.recipe.label(job.experts[1])
        _, alphas = search(job, noise=0.3, size=lambda task: 1.0 if task == 0 else 0.01)
        flags = {task.model: task.flags for task in alphas.evaluation.tasks}
        assert [model for model, own in flags.items() if "weak_expert" in own] == [weak]
        strong = 1 - alphas.models.index(weak)
        scale = alphas.evaluation.points[0].divergence[strong].mean if balance else 1.0
        for point in alphas.evaluation.points:
            assert point.weighted == pytest.approx(sum(measure.mean for measure in point.divergence) / 2 / scale)


@pytest.mark.parametrize(("family", "granularity"), [("qwen3", "layer"), ("llama", "attn_mlp")])
def test_too_few_rows_give_the_weights_of_features(make_models, caplog, family, granularity):
    """12 rows: exactly those weights, each matrix that of its block; flagged and said."""
    models = make_models(family, tied=family == "qwen3")
    expected = calibrate(models.recipe(granularity="layer" if granularity == "layer" else "attn_mlp"))
    of_tensor = {tensor: entry.alpha for entry in expected.submodules for tensor in entry.tensors}
    assert not any("too_few_rows" in task["flags"] for task in expected.calibration["tasks"])
    caplog.clear()
    found = calibrate(models.recipe(**PLAIN_JOINT, granularity=granularity))
    assert all(entry.alpha == of_tensor[tensor] for entry in found.submodules for tensor in entry.tensors)
    assert found.evaluation is None
    assert [task["flags"] for task in found.calibration["tasks"]] == [["too_few_rows"]] * 2
    assert "too few rows to hold any out, so no step can be measured" in caplog.text
    assert "give 15 or more" in caplog.text


def test_one_task_with_too_few_rows_is_enough(make_models, with_rows, caplog):
    """No task is measured then; the flag is that task's."""
    models = make_models("llama")
    datasets = (models.datasets[0], with_rows(models).datasets[1])
    recipe = dataclasses.replace(models, datasets=datasets).recipe(**PLAIN_JOINT, granularity="attn_mlp")
    found = calibrate(recipe)
    assert found.evaluation is None
    assert [task["flags"] for task in found.calibration["tasks"]] == [["too_few_rows"], []]
    (line,) = [message for message in caplog.messages if "too few rows" in message]
    assert str(models.experts[0]) in line
    assert str(models.experts[1]) not in line


def test_from_recipe_to_model_by_the_stock_command(make_models, with_rows, tmp_path, write_recipe):
    """With a weight for every matrix by default; the file lists every row. What depends on the steps cannot be solved
    again with other settings. `linearity` measures the first step's rows."""
    models = with_rows(make_models("llama"))
    recipe = models.recipe_with_answers(**PLAIN_JOINT, steps=2, num_samples=2)
    path, out = write_recipe(recipe), tmp_path / "out"
    result = mergekit_yaml(path, out, "--quiet")
    assert result.exit_code == 0, result.output
    alphas = assert_applied(models, out)
    assert alphas.granularity == "linear"
    assert {key: alphas.calibration[key] for key in ("steps", "fresh_rows", "evaluate", "ridge")} == {
        "steps": 2, "fresh_rows": True, "evaluate": True, "ridge": None,
    }  # fmt: skip
    assert "ridge_used" not in alphas.calibration
    tasks = alphas.calibration["tasks"]
    assert [(len(task["rows"]), len(task["held_out"])) for task in tasks] == [(4, 4)] * 2
    assert [list(task.rows) for task in alphas.evaluation.tasks] == [task["held_out"][:2] for task in tasks]
    for entry in alphas.submodules:
        assert (entry.stderr, entry.condition, entry.rank) == (None, None, None)
    stats = out / "slta_stats.safetensors"
    assert Statistics.load(stats).form == "point"
    for option in ((), ("--rows", "2")):
        result = slta("solve", stats, *option, "-o", tmp_path / "same.json")
        assert result.exit_code == 0, result.output
        same = Alphas.load(tmp_path / "same.json")
        assert (same.submodules, same.evaluation) == (alphas.submodules, alphas.evaluation)
    for option in (("--without", "expert2"), ("--ridge", "3"), ("--rows", "1"), ("--no-balance",)):
        result = slta("solve", stats, *option, "-o", tmp_path / "other.json")
        assert_refused(result, "needs-calibration", "`steps: 2`")
    assert slta("report", stats, "-o", tmp_path / "figures").exit_code == 0
    result = slta("linearity", path, "-o", tmp_path / "linearity.json", "--quiet")
    assert result.exit_code == 0, result.output
    assert [len(task["rows"]) for task in Linearity.load(tmp_path / "linearity.json").settings["tasks"]] == [2, 2]


def test_the_order_of_the_models_does_not_matter(tiny, with_rows):
    recipe = with_rows(tiny).recipe(**PLAIN_JOINT, steps=1, granularity="attn_mlp", num_samples=3)
    found = []
    for _ in range(2):
        found.append(calibrate(recipe))
        recipe["models"].reverse()
    assert len(found[0].evaluation.trials) == len(FIRST_RIDGES)
    assert found[0].evaluation.trials == found[1].evaluation.trials
    assert found[0].evaluation.tasks == tuple(reversed(found[1].evaluation.tasks))
    for entry, other in zip(found[0].submodules, found[1].submodules, strict=True):
        assert entry.alpha == tuple(reversed(other.alpha))
