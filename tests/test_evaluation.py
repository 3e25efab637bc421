"""The evaluation of a merge, against whole models: divergences, losses, flags, and where they are shown."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import PLAIN_JOINT, Models, assert_refused, make_tokenizer, mergekit_yaml, perturbed, slta, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_slta import Alphas
from mergekit_slta.data.rows import sample_numbers
from mergekit_slta.files.names import ALPHAS_NAME, STATISTICS_NAME
from mergekit_slta.files.statistics_file import Statistics

KEYS = {"max_seq_length": 40, "num_samples": 4}


def whole(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def held_out_rows(dataset, count: int) -> list[int]:
    """Row numbers: of the seeded permutation the last fifth, of that the first half."""
    size = len(dataset.read_text().splitlines())
    last = list(sample_numbers(size, 42))[-(size // 5) :]
    assert len(last) == 2 * count
    return last[:count]


@torch.no_grad()
def answer(model: torch.nn.Module, dataset, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] log probabilities at the places that predict a row's answer, and its tokens [n]."""
    row, tokenizer = json.loads(dataset.read_text().splitlines()[number]), make_tokenizer()
    prompt = row["question"] + " "
    encoded = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
    ids = [*encoded.input_ids, tokenizer.eos_token_id]  # the end of a completion
    first = next(place for place, (_, end) in enumerate(encoded.offset_mapping) if end > len(prompt))
    logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
    return logits.double().log_softmax(-1), torch.tensor(ids[first:])


def measured(model, expert, dataset, rows) -> tuple[np.ndarray, np.ndarray]:
    """[rows] KL(expert || model) summed over the answer, and [rows] mean loss over the answer."""
    divergences, losses = [], []
    for number in rows:
        (taught, ids), (ours, _) = answer(expert, dataset, number), answer(model, dataset, number)
        divergences.append(float((taught.exp() * (taught - ours)).sum()))
        losses.append(-float(ours.gather(1, ids[:, None]).mean()))
    return np.array(divergences), np.array(losses)


def assert_mean(found, values: np.ndarray, bias: float = 0.0) -> None:
    """`found` is the mean of `values`, with the standard error of the mean and a bias, at most as large."""
    assert found.mean == pytest.approx(values.mean(), rel=1e-3, abs=1e-5)
    error = values.std(ddof=1) / math.sqrt(len(values))
    error = math.hypot(error, min(bias, error))
    assert found.stderr == pytest.approx(error, rel=1e-3, abs=1e-5)


def assert_evaluated(
    models: Models, alphas: Alphas, merge: torch.nn.Module, optimism: Sequence[float] = (0.0, 0.0)
) -> None:
    """The file's evaluation is that of explicit arithmetic on whole models; `optimism` is what the choice of the merge
    by the same rows adds to its errors."""
    evaluation = alphas.evaluation
    base = whole(models.base)
    assert [task.model for task in evaluation.tasks] == [str(path) for path in models.experts]
    weighted = 0.0
    for place, (task, path, dataset) in enumerate(zip(evaluation.tasks, models.experts, models.datasets, strict=True)):
        expert, rows = whole(path), held_out_rows(dataset, 3)
        assert list(task.rows) == rows
        before, base_losses = measured(base, expert, dataset, rows)
        after, losses = measured(merge, expert, dataset, rows)
        assert_mean(task.divergence_base, before)
        assert_mean(task.divergence, after, optimism[place])
        assert_mean(task.loss_base, base_losses)
        assert_mean(task.loss, losses)
        assert_mean(task.loss_expert, measured(expert, expert, dataset, rows)[1])
        ratio = after.sum() / before.sum()
        error = (after - ratio * before).std(ddof=1) * math.sqrt(len(rows)) / before.sum()
        error = math.hypot(error, min(error, optimism[place] / before.mean()))
        assert task.share.mean == pytest.approx(ratio, rel=2e-3)
        assert task.share.stderr == pytest.approx(error, rel=1e-2, abs=1e-5)
        assert ("worse_than_base" in task.flags) == (after.mean() > before.mean())
        assert evaluation.points[0].divergence[place] == task.divergence_base
        assert_mean(evaluation.points[evaluation.merge].divergence[place], after)
        weighted += ratio / len(models.experts)
    assert evaluation.points[0].weighted == pytest.approx(1)
    assert evaluation.points[evaluation.merge].weighted == pytest.approx(weighted, rel=2e-3)


def assert_table(text: str, alphas: Alphas, heading: str) -> None:
    """A line for each expert, with its share and losses, below the heading."""
    lines = text[text.index(heading) :].splitlines()
    for task in alphas.evaluation.tasks:  # paths may be cut
        measures = (task.divergence, task.divergence_base, task.loss, task.loss_base, task.loss_expert)
        cells = [f"{100 * task.share.mean:.3g} ", *(f"{measure.mean:.3g} " for measure in measures)]
        assert [line for line in lines if all(cell in line for cell in cells)], (task.model, cells)


# --- after steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(plenty, tmp_path_factory):
    """A merge by two steps: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("joint")
    recipe = folder / "recipe.yml"
    recipe.write_text(json.dumps(plenty.recipe_with_answers(**PLAIN_JOINT, steps=2, **KEYS)))
    result = mergekit_yaml(recipe, folder / "out", card=True)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output, recipe


def test_steps_are_measured_as_whole_models_are(plenty, joint):
    alphas = Alphas.load(joint[0] / ALPHAS_NAME)
    record = json.loads(Statistics.load(joint[0] / STATISTICS_NAME).metadata["search"])
    assert min(record["optimism"]) >= 0
    assert_evaluated(plenty, alphas, whole(joint[0]), record["optimism"])
    evaluation = alphas.evaluation
    assert [point.name for point in evaluation.points[:3]] == ["base", "average", "features"]
    best = min(point.weighted for point in evaluation.points)
    assert evaluation.points[evaluation.merge].weighted == best
    average = whole(plenty.base)
    base, one, two = (tensors(path) for path in (plenty.base, *plenty.experts))
    average.load_state_dict({name: base[name] + (one[name] + two[name] - 2 * base[name]) / 2 for name in base})
    for place, dataset in enumerate(plenty.datasets):
        expert = whole(plenty.experts[place])
        divergences, _ = measured(average, expert, dataset, held_out_rows(dataset, 3))
        assert_mean(evaluation.points[1].divergence[place], divergences)


def test_no_standard_errors_after_steps(joint):
    """Those of the last step alone would be far too small, so there are none; the residual is what was measured."""
    alphas = Alphas.load(joint[0] / ALPHAS_NAME)
    evaluation = alphas.evaluation
    for entry in alphas.submodules:
        assert (entry.stderr, entry.condition, entry.rank) == (None, None, None)
        assert entry.residual == pytest.approx(evaluation.points[evaluation.merge].weighted)


def test_the_table_is_printed_and_in_the_card(joint):
    out, printed, _ = joint
    alphas = Alphas.load(out / ALPHAS_NAME)
    assert_table(printed, alphas, "on rows that were not fitted")
    card = (out / "README.md").read_text()
    assert_table(card, alphas, "## How good it is")
    assert "at lambda 1" in printed
    assert "at lambda 1" in card
    assert "these rows chose the merge" in card
    assert "(slta_divergence.png)" in card
    assert (out / "slta_divergence.svg").is_file()
    assert not (out / "slta_residuals.png").exists()
    assert "slta_residuals" not in card


def test_a_second_merge_keeps_the_evaluation(joint):
    """The alphas are reused, with what was measured; it is printed again."""
    out, _, recipe = joint
    before = Alphas.load(out / ALPHAS_NAME)
    result = mergekit_yaml(recipe, out)
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output
    assert Alphas.load(out / ALPHAS_NAME) == before
    assert_table(result.output, before, "on rows that were not fitted")


def test_solve_without_a_change_chooses_the_same_merge(joint, tmp_path):
    """The measured models are in the statistics, so that the choice and its evaluation can be repeated."""
    out, _, _ = joint
    assert_refused(slta("solve", out, "--no-balance", "-o", tmp_path / "other.json"), "needs-calibration", "`steps")
    result = slta("solve", out, "-o", tmp_path / "again.json")
    assert result.exit_code == 0, result.output
    again, before = Alphas.load(tmp_path / "again.json"), Alphas.load(out / ALPHAS_NAME)
    assert again.evaluation == before.evaluation
    assert again.submodules == before.submodules


def test_the_evaluation_is_at_lambda_1(plenty, joint, write_recipe, tmp_path):
    """Whatever the recipe's `lambda` is, which acts only in the merge; the table says so."""
    recipe = plenty.recipe_with_answers(**PLAIN_JOINT, steps=2, **KEYS, alphas=str(joint[0]), **{"lambda": 0.5})
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Alphas.load(tmp_path / "out" / ALPHAS_NAME).evaluation == Alphas.load(joint[0] / ALPHAS_NAME).evaluation
    assert "at lambda 1" in result.output


# --- with evaluate: true ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(plenty, tmp_path_factory):
    """A merge by `features` that is evaluated."""
    folder = tmp_path_factory.mktemp("features")
    recipe = folder / "recipe.yml"
    recipe.write_text(json.dumps(plenty.recipe_with_answers(evaluate=True, **KEYS)))
    result = mergekit_yaml(recipe, folder / "out", card=True)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output, recipe


def test_features_can_be_evaluated(plenty, features):
    out, printed, _ = features
    alphas = Alphas.load(out / ALPHAS_NAME)
    assert_evaluated(plenty, alphas, whole(out))
    assert [point.name for point in alphas.evaluation.points] == ["base", "merge"]
    assert_table(printed, alphas, "on rows that were not fitted")
    card = (out / "README.md").read_text()
    assert_table(card, alphas, "## How good it is")
    assert "these rows chose the merge" not in card
    assert "slta_divergence" not in card  # no steps, no figure of them
    assert "slta_residuals.png" in card
    assert all(entry.stderr is not None for entry in alphas.submodules)


def test_evaluate_is_added_to_a_merge_that_is_there(plenty, features, write_recipe, tmp_path):
    """The statistics are solved again, nothing is gathered; without the key nothing is measured."""
    plain = plenty.recipe_with_answers(**KEYS)
    assert mergekit_yaml(write_recipe(plain), tmp_path / "out").exit_code == 0
    first = Alphas.load(tmp_path / "out" / ALPHAS_NAME)
    assert first.evaluation is None
    plain["parameters"]["evaluate"] = True
    result = mergekit_yaml(write_recipe(plain), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Solving again from the statistics" in result.output
    second, expected = Alphas.load(tmp_path / "out" / ALPHAS_NAME), Alphas.load(features[0] / ALPHAS_NAME)
    assert second.submodules == first.submodules == expected.submodules
    assert second.evaluation == expected.evaluation


def test_solve_drops_the_evaluation_of_other_weights(features, tmp_path):
    out, _, _ = features
    result = slta("solve", out, "--ridge", "0.5", "-o", tmp_path / "solved.json")
    assert result.exit_code == 0, result.output
    assert Alphas.load(tmp_path / "solved.json").evaluation is None
    assert "on rows that were not fitted" not in result.output


@pytest.mark.parametrize(
    "keys",
    [
        {"granularity": "head_mlp", "inputs": "merged"},
        {**PLAIN_JOINT, "steps": 1},
        {**PLAIN_JOINT, "steps": 0},
    ],
    ids=repr,
)
def test_tied_models_are_evaluated(make_models, plenty, write_recipe, tmp_path, keys):
    """One table at both ends, weights for heads and single matrices, features of the merge."""
    made = make_models("llama", tied=True)
    models = Models(made.folder, made.base, made.experts, plenty.datasets)
    result = mergekit_yaml(write_recipe(models.recipe_with_answers(evaluate=True, **keys, **KEYS)), tmp_path / "out")
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(tmp_path / "out" / ALPHAS_NAME)
    record = json.loads(Statistics.load(tmp_path / "out" / STATISTICS_NAME).metadata.get("search", "{}"))
    assert_evaluated(models, alphas, whole(tmp_path / "out"), record.get("optimism", (0.0, 0.0)))
    assert not any("unchanged" in entry.flags for entry in alphas.submodules)


def test_a_change_that_only_held_out_rows_show_is_kept(plenty, write_recipe, tmp_path):
    """Of a token's embedding. The merge of one expert is the expert, and what the file promises is measured of it."""
    tokenizer = AutoTokenizer.from_pretrained(plenty.base)
    lines = [json.loads(line) for line in plenty.datasets[0].read_text().splitlines()]
    used = {number for row in lines for number in tokenizer(f"{row['question']} {row['answer']}").input_ids}
    rare = next(number for number in range(5, len(tokenizer)) if number not in used)
    for place in [*sample_numbers(len(lines), 42)][-(len(lines) // 5) :]:
        lines[place]["question"] = f"{tokenizer.decode([rare])} {lines[place]['question']}"
    assert rare in tokenizer(lines[place]["question"]).input_ids
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    base, expert = whole(plenty.base), whole(plenty.experts[0])
    with torch.no_grad():
        expert.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
        expert.model.embed_tokens.weight[rare] += 1.0
    expert.save_pretrained(tmp_path / "expert")
    tokenizer.save_pretrained(tmp_path / "expert")
    models = Models(plenty.folder, plenty.base, (tmp_path / "expert",), (tmp_path / "rows.jsonl",))
    recipe = {**models.recipe_with_answers(**PLAIN_JOINT, steps=1, **KEYS), "out_dtype": "float32"}
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(tmp_path / "out" / ALPHAS_NAME)
    assert not any(entry.unchanged for entry in alphas.submodules)
    merged, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "expert")
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-3, atol=1e-4)
    (task,) = alphas.evaluation.tasks
    assert task.share.mean < 1e-4


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_merge_that_is_worse_than_the_base_is_flagged(plenty, features, write_recipe, tmp_path, caplog):
    """For the task that it harms, in the file, in a warning, and in the card: here by weights of the wrong sign."""
    content = json.loads((features[0] / ALPHAS_NAME).read_text())
    del content["evaluation"]
    for entry in content["submodules"]:
        entry["alpha"] = [-1.0, 1.0]
    (tmp_path / "a.json").write_text(json.dumps(content))
    recipe = plenty.recipe_with_answers(evaluate=True, alphas=str(tmp_path / "a.json"), **KEYS)
    with caplog.at_level("WARNING"):
        result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", card=True)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(tmp_path / "out" / ALPHAS_NAME)
    assert_evaluated(plenty, alphas, whole(tmp_path / "out"))
    first, second = alphas.evaluation.tasks
    assert "worse_than_base" in first.flags
    assert first.share.mean > 1
    share = f"{100 * first.share.mean:.3g} ± {100 * first.share.stderr:.2g}% of the base's"
    line = f"{first.model}: the merge is worse than the base at this task: {share}"
    assert line in caplog.text
    assert "measured on 3 rows: neither the choice of the merge nor the errors can be relied on" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the merge is worse than the base at this task" in card
    assert ("worse than the base" in caplog.text.replace(line, "")) == ("worse_than_base" in second.flags)


def test_a_weak_expert_is_flagged(plenty, write_recipe, tmp_path, caplog):
    """One that hardly differs from the base: its task counts as the mean of the others does."""
    weak = whole(plenty.base)
    other = perturbed(weak, 9).state_dict()
    base = {name: value.clone() for name, value in weak.state_dict().items()}
    weak.load_state_dict({name: base[name] + 0.01 * (other[name] - base[name]) for name in base})
    weak.save_pretrained(tmp_path / "weak1")
    make_tokenizer().save_pretrained(tmp_path / "weak1")
    recipe = plenty.recipe_with_answers(evaluate=True, **KEYS)
    recipe["models"][1]["model"] = str(tmp_path / "weak1")
    with caplog.at_level("WARNING"):
        result = slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    evaluation = Alphas.load(tmp_path / "a.json").evaluation
    strong, flagged = evaluation.tasks
    remaining = (strong.divergence.mean + flagged.divergence.mean) / strong.divergence_base.mean / 2
    assert evaluation.points[1].weighted == pytest.approx(remaining)
    assert "weak_expert" in flagged.flags
    assert "weak_expert" not in strong.flags
    assert f"{flagged.model} hardly differs from the base (divergence {flagged.divergence_base.mean:.3g} nats" in (
        caplog.text
    )


def test_tasks_that_share_rows_are_flagged(plenty, write_recipe, tmp_path):
    """Also where one row of two files has the same tokens."""
    shared = tmp_path / "shared.jsonl"
    lines = [plenty.datasets[number].read_text().splitlines() for number in (0, 1)]
    fitted = next(sample_numbers(30, 42))
    lines[1][fitted] = lines[0][fitted]
    shared.write_text("\n".join(lines[1]) + "\n")
    for datasets, flagged in (((0, 1), False), ((0, 0), True), ((0, shared), True)):
        recipe = plenty.recipe_with_answers(**KEYS)
        for entry, dataset in zip(recipe["models"], datasets, strict=True):
            entry["parameters"]["dataset"] = str(dataset if dataset == shared else plenty.datasets[dataset])
        result = slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json")
        assert result.exit_code == 0, result.output
        tasks = Alphas.load(tmp_path / "a.json").calibration["tasks"]
        assert ["shared_rows" in task["flags"] for task in tasks] == [flagged] * 2


def test_an_expert_that_is_the_base(plenty, write_recipe, tmp_path):
    """Alone, there is nothing to approach: alpha 0, no share, no step; beside another one it is weak."""
    shutil.copytree(plenty.base, tmp_path / "base_copy")
    for count in (1, 2):
        recipe = plenty.recipe_with_answers(**PLAIN_JOINT, steps=1, **KEYS)
        recipe["models"][0]["model"] = str(tmp_path / "base_copy")
        recipe["models"] = recipe["models"][:count]
        result = mergekit_yaml(write_recipe(recipe), tmp_path / f"out{count}", card=count == 2)
        assert result.exit_code == 0, result.output
        alphas = Alphas.load(tmp_path / f"out{count}" / ALPHAS_NAME)
        same = alphas.evaluation.tasks[0]
        assert same.divergence_base.mean == 0
        assert same.share is None
        assert ("weak_expert" in same.flags) == (count == 2)
        assert {entry.alpha[0] for entry in alphas.submodules} == {0}
        assert {entry.unchanged for entry in alphas.submodules} == {(same.model,)}
        assert {entry.flags for entry in alphas.submodules} == {("unchanged",)}
        if count == 1:
            assert {entry.residual for entry in alphas.submodules} == {None}
            merged, base = tensors(tmp_path / "out1"), tensors(plenty.base)
            assert all(torch.equal(merged[name], base[name]) for name in base)


# --- too few rows -----------------------------------------------------------------------------------------------------


def test_too_few_rows_to_hold_any_out_give_the_weights_of_features(tiny, write_recipe, tmp_path, caplog):
    """Every matrix has the weight that `features` gives its block, from the same rows; it is said and flagged."""
    keys = {"num_samples": 4}
    joint, features = tiny.recipe_with_answers(**PLAIN_JOINT, **keys), tiny.recipe_with_answers(**keys)
    with caplog.at_level("WARNING"):
        assert slta("calibrate", write_recipe(joint), "-o", tmp_path / "joint.json").exit_code == 0
    assert (
        "too few rows to hold any out, so no step can be measured: the weights are those of `features`" in caplog.text
    )
    assert slta("calibrate", write_recipe(features), "-o", tmp_path / "features.json").exit_code == 0
    found, expected = (Alphas.load(tmp_path / name) for name in ("joint.json", "features.json"))
    assert found.evaluation is None
    assert all("too_few_rows" in task["flags"] for task in found.calibration["tasks"])
    assert not any("too_few_rows" in task["flags"] for task in expected.calibration["tasks"])
    block = {tensor: entry.alpha for entry in expected.submodules for tensor in entry.tensors}
    assert len(found.submodules) > len(expected.submodules)
    for entry in found.submodules:
        for tensor in entry.tensors:
            assert entry.alpha == pytest.approx(block[tensor], abs=1e-9)


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_says_what_is_held_out_and_what_it_costs(plenty, tiny, write_recipe):
    def told(models, **keys) -> str:
        result = slta("check", write_recipe(models.recipe_with_answers(**KEYS | keys)))
        assert result.exit_code == 0, result.output
        return result.output

    plain, evaluated = told(plenty), told(plenty, evaluate=True)
    assert [line.split()[-1] for line in plain.splitlines() if line.startswith("expert")] == ["0", "0"]
    assert "held-out" not in plain
    assert [line.split()[-1] for line in evaluated.splitlines() if line.startswith("expert")] == ["6", "6"]
    assert "measures    the merge, on the first half of the held-out rows: 6 rows" in evaluated
    assert "the base, the merge and their expert; this reads the checkpoints once more" in evaluated
    auto, one = told(plenty, **PLAIN_JOINT), told(plenty, **PLAIN_JOINT, steps=1)
    assert re.search(r"takes .* for all 12 steps, often fewer; longer on a busy machine", auto)
    assert "often fewer" not in one
    assert "allocator" not in auto
    detailed = slta("check", write_recipe(tiny.recipe_with_answers(**KEYS)), "-v").output
    assert "more that the allocator keeps" in detailed
    assert "every model that is tried" in one
    few = told(tiny, **PLAIN_JOINT)
    assert f"nothing: too few rows to hold any out of {', '.join(map(str, tiny.experts))}" in few
    assert "no steps: the weights are those of `features`" in few
