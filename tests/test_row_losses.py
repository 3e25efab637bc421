"""Losses of base and experts on the experts' own rows: transformers' own, kept in files, and a warning that follows."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FORMATS, PLAIN_JOINT, Models, mergekit_yaml, slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from test_architectures import job_of
from torch.nn.functional import cross_entropy
from whole_models import models_of

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.rows import Example, Row
from mergekit_slta.files.alphas_file import Alphas, describe_no_better
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runner import row_losses
from mergekit_slta.runner.row_losses import RowLosses, measured_rows

WARNING = "no better than the base on its own rows"


def test_plain_text_without_known_answers_is_told_from_a_wrong_format():
    """Where no row says where its answer begins, the prompts count, too; equal losses are those of equal weights."""
    task = {"model": "m", "loss_base": 5.3, "loss_expert": 5.7, "flags": ["no_better_than_base"]}
    (whole,) = describe_no_better({"tasks": [{**task, "whole_rows": True}]})
    assert "(loss 5.7, base 5.3 nats per token). No row says where its answer begins" in whole
    assert "wrong prompt format" not in whole
    (known,) = describe_no_better({"tasks": [task]})
    assert "wrong prompt format? check" in known
    (shared,) = describe_no_better({"tasks": [{**task, "flags": [*task["flags"], "shared_rows"]}]})
    assert "another task has rows with the same tokens" in shared
    assert "wrong prompt format" not in shared
    assert describe_no_better({"tasks": [{**task, "loss_expert": 5.3}]}) == []


def with_answers(models: Models, **parameters):
    """A prepared recipe whose rows are a question and its answer."""
    config = MergeConfiguration.model_validate(models.recipe_with_answers(**parameters))
    return prepare(read_recipe(config), MergeOptions(quiet=True), for_merge=False)


@torch.no_grad()
def own_loss(model, row) -> float:
    """The loss that a transformers model computes itself, with labels that are the row's answer."""
    ids = torch.tensor([row.ids])
    labels = ids.clone()
    labels[:, : row.completion] = -100
    return float(model(ids, labels=labels).loss)


def expected_losses(models: Models, examples) -> torch.Tensor:
    """[rows, 2] of base and expert, of whole models in memory; NaN for rows without an answer."""
    base, *experts = models_of(models)
    return torch.tensor(
        [[own_loss(model, each.row) for model in (base, experts[each.task])] for each in examples],
        dtype=torch.float64,
    )


FEATURES = [{"granularity": name} for name in ("model", "layer", "attn_mlp", "head_mlp", "linear")]
FEATURES += [{"granularity": name, "inputs": "merged"} for name in ("model", "attn_mlp", "linear")]
JOINT = [{"steps": 0}, {"steps": 0, "label_samples": 0}]
SETTINGS = [*FEATURES, *({**PLAIN_JOINT, **settings} for settings in JOINT)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_losses_are_those_of_transformers(make_models, settings, tied):
    """Of answers, in packed batches, at every granularity of both objectives."""
    models = make_models("llama", tied=tied)
    job = with_answers(models, **settings)
    examples = job.examples()
    assert len({example.row.completion for example in examples}) > 1
    losses = gather_statistics(job).losses
    torch.testing.assert_close(losses, expected_losses(models, examples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_steps_measure_losses_on_rows_that_are_held_out(make_models, with_rows, tied):
    """Of base and expert, as of every model on the way."""
    models = with_rows(make_models("llama", tied=tied))
    job = with_answers(models, **PLAIN_JOINT, steps=1, num_samples=3)
    found = gather_statistics(job)
    expected = expected_losses(models, job.held_out_examples())
    assert found.losses.shape == (4, len(found.by_submodule["embed"]) + 1)
    torch.testing.assert_close(found.losses_of_base_and_expert, expected, rtol=1e-5, atol=1e-5)
    for task in solve_job(job, found).calibration["tasks"]:
        place = job.model_names.index(task["model"])
        means = expected[found.row_task == place].mean(0).tolist()
        assert [task["loss_base"], task["loss_expert"]] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("objective", ["features", "joint"])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [("cohere", "attn_mlp"), ("falcon_7b", "head_mlp"), ("gpt_neox", "attn_mlp"), ("mixtral", "linear"),
     ("qwen3_moe", "attn_mlp"), ("gemma3", "layer"), ("cohere", "linear"), ("gpt2", "linear")],
)  # fmt: skip
def test_losses_of_other_architectures(specimen, objective, name, granularity):
    """Parallel blocks, shared norms, mixtures of experts, a scaled head; whole rows where no answer is known."""
    models = specimen(name)
    steps = {**PLAIN_JOINT, "steps": 0} if objective == "joint" else {}
    job = job_of(models, **{"granularity": granularity, "objective": objective, **steps})
    losses = gather_statistics(job).losses
    torch.testing.assert_close(losses, expected_losses(models, job.examples()), rtol=1e-5, atol=1e-5)


def test_parts_of_the_vocabulary_add_up():
    """Logits in parts give the loss of the whole; other rows and other experts' logits do not count."""
    examples = [Example(Row(0, "", (1, 5, 2, 0), completion=2), task=1), Example(Row(1, "", (3, 4)), task=0)]
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    losses = RowLosses(examples, [0])
    for part in logits.split(3, dim=1):
        losses.add(0, 2, part)
        losses.add(0, 1, part + 1)
        losses.add(1, 0, part[:2])
    found = losses.losses()
    assert found[0, 1] == pytest.approx(float(cross_entropy(logits[1:3], torch.tensor([2, 0]))), rel=1e-6)
    assert found[0, 0] == 0
    assert found[1].isnan().all()


def test_first_rows_with_an_answer_are_measured(tiny, monkeypatch):
    """As many of each task as are asked for, in the order of drawing; a row whose answer is cut off has no loss."""
    monkeypatch.setattr(row_losses, "LOSS_ROWS", 2)
    recipe = tiny.recipe(2, text="{text}", num_samples=6, max_seq_length=24)
    recipe["models"][0]["parameters"]["completion"] = " {answer}"
    config = read_recipe(MergeConfiguration.model_validate(recipe))
    job = prepare(config, MergeOptions(quiet=True), for_merge=False)
    examples = job.examples()
    whole = [index for index, each in enumerate(examples) if each.row.completion < len(each.row.ids)]
    own = [[index for index in whole if examples[index].task == task] for task in (0, 1)]
    assert own[0] != list(range(len(own[0])))  # some are cut
    assert measured_rows(examples) == own[0][:2] + own[1][:2]
    losses = gather_statistics(job).losses
    assert (~losses.isnan().any(dim=1)).nonzero().flatten().tolist() == measured_rows(examples)


@pytest.mark.parametrize("settings", FEATURES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_nothing_is_read_for_the_losses(tiny, monkeypatch, settings):
    """A pass that measures them asks for the same tensors as one that does not."""
    read: list[tuple[str, ...]] = []
    raw = Checkpoints.raw

    def counting(self, name, models=None):
        read.append((name, *map(str, models or ())))
        return raw(self, name, models)

    monkeypatch.setattr(Checkpoints, "raw", counting)
    counts = []
    for rows in (row_losses.LOSS_ROWS, 0):
        monkeypatch.setattr(row_losses, "LOSS_ROWS", rows)
        read.clear()
        measured = gather_statistics(with_answers(tiny, num_samples=2, **settings)).losses
        assert measured.isnan().all() == (rows == 0)
        counts.append(sorted(read))
    assert counts[0] == counts[1]


def test_a_task_without_answers_is_not_measured(tiny):
    """Null in the alphas file, and no warning."""
    recipe = tiny.recipe(2, text="{text}", num_samples=2, max_seq_length=4)
    recipe["models"][0]["parameters"]["completion"] = "{answer}"
    job = prepare(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions(quiet=True), for_merge=False)
    tasks = solve_job(job, gather_statistics(job)).calibration["tasks"]
    assert (tasks[0]["loss_base"], tasks[0]["loss_expert"], tasks[0]["flags"]) == (None, None, [])
    assert tasks[1]["loss_expert"] > 0


@pytest.mark.parametrize("settings", [{}, {**PLAIN_JOINT, "steps": 1}, {**PLAIN_JOINT, "steps": 0}])
def test_rows_in_another_format_warn(trained, tmp_path, write_recipe, caplog, settings):
    """By the stock command: one line with the task, both losses and the remedy; the file and the card say it, too. Rows
    in the expert's own format do not."""
    for name in ("own", "other"):
        recipe = trained.recipe(text=FORMATS[name], num_samples=6, max_seq_length=64, **settings)
        recipe["models"][0]["parameters"]["completion"] = "{answer}"
        path, out = write_recipe(recipe), tmp_path / name
        caplog.clear()
        result = mergekit_yaml(path, out, card=name == "other")
        assert result.exit_code == 0, result.output
        (task,) = Alphas.load(out / "slta_alphas.json").calibration["tasks"]
        assert (task["loss_expert"] < task["loss_base"]) == (name == "own")
        assert not task["whole_rows"]
        assert task["flags"] == ["no_better_than_base"] * (name == "other")
        assert caplog.text.count(WARNING) == (name == "other")
    told = f"(loss {task['loss_expert']:.3g}, base {task['loss_base']:.3g} nats per token): wrong prompt format? check"
    (line,) = [message for message in caplog.messages if WARNING in message]
    assert line.isprintable()
    assert f"{trained.experts[0]}: its expert" in line
    assert told in line
    assert "`chat_template`, `text` and `completion`" in line
    card = (out / "README.md").read_text()
    assert told in card
    assert f"(under `features` a task's first {row_losses.LOSS_ROWS})" in card
    assert f"| {task['loss_base']:.3g} | {task['loss_expert']:.3g} |" in card
    caplog.clear()
    assert "Reusing the alphas" in mergekit_yaml(path, out).output
    assert told in caplog.text


def test_saying_where_the_answer_begins_measures_anew(trained, tmp_path, write_recipe):
    """`completion` alone changes no alpha, but it does change the losses: no earlier file is reused for them."""
    recipe = trained.recipe(text=FORMATS["own"] + "{answer}", num_samples=3, max_seq_length=64)
    found = []
    for _ in range(2):
        assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "slta_alphas.json", "--quiet").exit_code == 0
        found.append(Alphas.load(tmp_path / "slta_alphas.json"))
        recipe["models"][0]["parameters"] |= {"text": FORMATS["own"], "completion": "{answer}"}
    assert found[0].submodules == found[1].submodules
    losses = [alphas.calibration["tasks"][0]["loss_expert"] for alphas in found]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_solving_again_keeps_the_losses(tiny, tmp_path, write_recipe, caplog):
    """`solve` writes and says the same of the losses; of fewer rows and fewer experts, those that are left."""
    result = slta("calibrate", write_recipe(tiny.recipe()), "-o", tmp_path / "slta_alphas.json")
    assert result.exit_code == 0, result.output
    assert "loss per token on its own rows" in result.output
    stats = tmp_path / "slta_stats.safetensors"
    losses, row_task = Statistics.load(stats).losses, Statistics.load(stats).row_task
    tasks = Alphas.load(tmp_path / "slta_alphas.json").calibration["tasks"]
    expected = torch.stack([losses[row_task == task].mean(0) for task in range(3)])
    assert [[task["loss_base"], task["loss_expert"]] for task in tasks] == expected.tolist()
    cases = ((), expected), (("--rows", 2), torch.stack([losses[row_task == task][:2].mean(0) for task in range(3)]))
    for options, values in (*cases, (("--without", "expert1"), expected[1:])):
        caplog.clear()
        again = slta("solve", stats, *options, "-o", tmp_path / "again.json")
        assert again.exit_code == 0, again.output
        tasks = Alphas.load(tmp_path / "again.json").calibration["tasks"]
        assert [[task["loss_base"], task["loss_expert"]] for task in tasks] == values.tolist()
        assert [bool(task["flags"]) for task in tasks] == [bool(base <= expert) for base, expert in values]
        assert caplog.text.count(WARNING) == sum(len(task["flags"]) for task in tasks) > 0


def test_statistics_without_losses_are_solved(tiny, tmp_path, write_recipe):
    """Rows that have no loss, and files without losses, give null."""
    assert slta("calibrate", write_recipe(tiny.recipe(2)), "-o", tmp_path / "a.json", "--quiet").exit_code == 0
    stats = next(tmp_path.glob("*stats*"))
    statistics = Statistics.load(stats)
    for losses in (None, torch.full_like(statistics.losses, math.nan), torch.full_like(statistics.losses, math.inf)):
        statistics.losses = losses
        statistics.save(tmp_path / "other.safetensors")
        result = slta("solve", tmp_path / "other.safetensors", "-o", tmp_path / "b.json")
        assert result.exit_code == 0, result.output
        task = Alphas.load(tmp_path / "b.json").calibration["tasks"][0]
        assert (task["loss_base"], task["loss_expert"], task["flags"]) == (None, None, [])
