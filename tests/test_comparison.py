"""`compare`: its scores against whole models, the rows that it uses, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import (
    Models,
    assert_refused,
    check_message,
    make_tokenizer,
    mergekit_yaml,
    refused,
    slta,
    tensors,
    write_rows,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mergekit_slta
from mergekit_slta import Alphas, Comparison
from mergekit_slta.comparison import benchmarks, merging
from mergekit_slta.comparison.compare import compare, for_comparison
from mergekit_slta.comparison.merging import as_file_name
from mergekit_slta.comparison.methods import NAMES, SCALES, make_methods
from mergekit_slta.comparison.results import with_results
from mergekit_slta.comparison.tables import describe_comparison
from mergekit_slta.data.rows import sample_numbers
from mergekit_slta.errors import AlphasError, DataError, OutputError, RecipeError, RunError
from mergekit_slta.files.comparison_file import ComparedTask, ScoredModel
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.reporting.figures.comparison import comparison_figure
from mergekit_slta.reporting.figures.style import figure_style
from mergekit_slta.runtime.screen import plain

KEYS = {"max_seq_length": 60, "num_samples": 30, "compute_dtype": "float32"}
FILES = {"slta_compare.json", "slta_compare.md", "slta_compare.png", "slta_compare.svg", "recipes", "alphas"}


def recipe_of(models: Models, **parameters: object) -> dict:
    return models.recipe_with_answers(**{**KEYS, **parameters})


@pytest.fixture(scope="module")
def better(plenty, tmp_path_factory) -> Models:
    """The same base, and experts whose predictions are flatter than its random ones: their losses are smaller."""
    folder, paths = tmp_path_factory.mktemp("better"), []
    for number, path in enumerate(plenty.experts):
        model = whole(path)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.4)
        paths.append(folder / f"expert{number}")
        model.save_pretrained(paths[-1])
        make_tokenizer().save_pretrained(paths[-1])
    return replace(plenty, experts=tuple(paths))


@pytest.fixture(scope="module")
def done(better, tmp_path_factory):
    """A comparison of three merges: its folder, its recipe, and what the command printed."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe_of(better)))
    result = slta(
        "compare", folder / "recipe.yml", "-o", folder / "out", "--methods", "average,task_arithmetic:0.4,recipe",
        "--lm-eval", "gsm8k, ifeval",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_next_step_is_the_best_merge_s_recipe(done):
    """The line after the verdict is a command that makes the best merge."""
    folder, output = done
    found = Comparison.load(folder / "out" / "slta_compare.json")
    assert found.best is not None
    path = folder / "out" / "recipes" / f"{as_file_name(found.best)}.yml"
    assert path.is_file()
    lines = output.splitlines()
    assert lines[lines.index(found.verdict) + 1] == f"To make it: mergekit-yaml {path} out/"
    assert "torch_dtype" not in output


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch, done):
    """Drawing takes longer than everything else; `done` has the figures."""
    monkeypatch.setattr("mergekit_slta.comparison.compare.draw_comparison", lambda *_: [])


def whole(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def compared(dataset) -> list[int]:
    """Row numbers: of the seeded permutation the last fifth, of that the second half."""
    size = len(dataset.read_text().splitlines())
    last = list(sample_numbers(size, 42))[-(size // 5) :]
    return last[(len(last) + 1) // 2 :]


@torch.no_grad()
def log_probs(model, dataset, number) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] at the places that predict a row's answer, and its tokens [n]."""
    row, tokenizer = json.loads(dataset.read_text().splitlines()[number]), make_tokenizer()
    prompt = row["question"] + " "
    encoded = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
    ids = [*encoded.input_ids, tokenizer.eos_token_id]
    first = next(place for place, (_, end) in enumerate(encoded.offset_mapping) if end > len(prompt))
    logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
    return logits.double().log_softmax(-1), torch.tensor(ids[first:])


def averaged(models: Models) -> torch.nn.Module:
    model, experts = whole(models.base), [tensors(path) for path in models.experts]
    model.load_state_dict({name: sum(each[name] for each in experts) / len(experts) for name in experts[0]})
    return model


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_whole_models(done, better):
    """Losses, divergences and exact answers of base, experts and the average, row by row."""
    folder, _ = done
    found = Comparison.load(folder / "out" / "slta_compare.json")
    experts = [whole(path) for path in better.experts]
    models = {"base": whole(better.base), "average": averaged(better)}
    models |= {str(path): expert for path, expert in zip(better.experts, experts, strict=True)}
    assert [task.model for task in found.tasks] == [str(path) for path in better.experts]
    scored = {model.name: model for model in found.scored}
    assert scored.keys() == {*models, "task_arithmetic:0.4", "recipe"}
    for name, model in models.items():
        for place, (task, dataset) in enumerate(zip(found.tasks, better.datasets, strict=True)):
            assert list(task.rows) == compared(dataset)
            for row, number in enumerate(task.rows):
                ours, labels = log_probs(model, dataset, number)
                taught, _ = log_probs(experts[place], dataset, number)
                loss = -float(ours.gather(1, labels[:, None]).mean())
                divergence = float((taught.exp() * (taught - ours)).sum())
                assert scored[name].losses[place][row] == pytest.approx(loss, rel=1e-4)
                assert scored[name].divergences[place][row] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
                assert scored[name].exact[place][row] == bool((ours.argmax(-1) == labels).all())
                assert task.answer_tokens[row] == len(labels)


def test_no_calibration_sees_the_compared_rows(done, better):
    """By row numbers: with as many samples as there are rows, all rows are fitted but those that are held out."""
    folder, _ = done
    found = Comparison.load(folder / "out" / "slta_compare.json")
    (ours,) = (model for model in found.scored if model.name == "recipe")
    alphas = Alphas.load(folder / "out" / "alphas" / "recipe.json")
    for place, (task, dataset) in enumerate(zip(found.tasks, better.datasets, strict=True)):
        held_out = list(sample_numbers(30, 42))[-6:]
        assert {*ours.fitted_rows[place]} == {*range(30)} - {*held_out}
        assert not {*ours.fitted_rows[place]} & {*task.rows}
        assert list(ours.fitted_rows[place]) == alphas.calibration["tasks"][place]["rows"]
        assert compared(dataset) == list(task.rows) == held_out[3:]


@pytest.mark.parametrize("objective", ["features", "joint", "data_free"])
def test_every_objective_leaves_the_held_out_rows_out(better, objective, options, monkeypatch):
    """What is calibrated for a method draws none of the compared rows, though `features` holds out none by default."""
    drawn = {}

    def calibrate_to(job, path):
        drawn["rows"] = job.rows
        raise RunError("enough", code="merge-failed")

    monkeypatch.setattr(merging, "calibrate_to", calibrate_to)
    with pytest.raises(RunError):
        compare(recipe_of(better, granularity="layer"), better.folder / objective, options, methods=[objective])
    for rows, dataset in zip(drawn["rows"], better.datasets, strict=True):
        if objective == "data_free":
            assert rows is None
        else:
            assert len(rows.rows) == 24
            assert not {row.number for row in rows.rows} & {*compared(dataset)}


def test_results_are_explicit_arithmetic(done):
    """Shares of the gap, their mean, and the paired distance from the best with its error and its interval."""
    folder, _ = done
    found = Comparison.load(folder / "out" / "slta_compare.json")
    losses = {model.name: [np.array(own) for own in model.losses] for model in found.scored}
    tasks = range(len(found.tasks))
    gaps = [losses["base"][t].mean() - losses[found.models[t]][t].mean() for t in tasks]
    errors = [(losses["base"][t] - losses[found.models[t]][t]).std(ddof=1) / math.sqrt(3) for t in tasks]
    known = [t for t in tasks if gaps[t] > errors[t]]
    assert [t for t in tasks if found.tasks[t].flags] == [t for t in tasks if t not in known]
    merges = [model.name for model in found.scored if model.kind == "merge"]
    means = {}
    for name in merges:
        result = found.of(name)
        shares = [(losses["base"][t].mean() - losses[name][t].mean()) / gaps[t] for t in known]
        assert [result.tasks[t].recovered.mean for t in known] == pytest.approx(shares)
        assert all(result.tasks[t].recovered is None for t in tasks if t not in known)
        means[name] = np.mean(shares) if known else -result.loss.mean
    assert found.best == max(means, key=means.get)
    for name in merges:
        if name == found.best:
            assert found.of(name).difference_from_best is None
            continue
        used = known or tasks
        parts = [(losses[name][t] - losses[found.best][t]) / (gaps[t] if known else 1) for t in used]
        behind = found.of(name).difference_from_best
        assert behind.mean == pytest.approx(np.mean([part.mean() for part in parts]), rel=1e-4)
        error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
        assert behind.stderr == pytest.approx(error, rel=1e-4)
        assert 1.9 * error < behind.half_width < 4.4 * error  # Student's t of 2 to many degrees of freedom
        assert behind.is_level == (abs(behind.mean) <= behind.half_width)


def made(losses: dict[str, list[list[float]]], **kinds: str) -> Comparison:
    """A comparison of models with given losses; expert 1 and 2 have the names of the tasks."""
    tasks = [
        ComparedTask(
            model=name, dataset="d", rows=range(len(own)), answer_tokens=[3] * len(own), is_short=[True] * len(own)
        )
        for name, own in zip(("one", "two"), losses["base"], strict=False)
    ]  # fmt: skip
    scored = [
        ScoredModel(
            name=name, kind=kinds.get(name, "merge"), label=name, fingerprint="", losses=own, divergences=own,
            exact=[[True] * len(each) for each in own],
        )
        for name, own in losses.items()
    ]  # fmt: skip
    return with_results(
        Comparison.model_construct(
            base_model="base", models=("one", "two")[: len(tasks)], tasks=tuple(tasks), scored=tuple(scored),
            settings={}, provenance={},
        )
    )  # fmt: skip


def shown(comparison: Comparison) -> str:
    """What the command prints."""
    return plain(*describe_comparison(comparison))


KINDS = {"base": "base", "one": "expert", "two": "expert"}
BASE, OWN = [2.0, 2.2, 1.8, 2.1], [1.0, 1.1, 0.9, 1.2]


def test_level_and_best():
    """The last line says which merge is best and by how much beside its error, or that it is level with others."""
    close = [x + d for x, d in zip(BASE, (-0.5, -0.45, -0.6, -0.4), strict=True)]
    near = [x + d for x, d in zip(close, (0.1, -0.1, 0.1, -0.05), strict=True)]
    far = [x + d for x, d in zip(close, (0.4, 0.41, 0.39, 0.4), strict=True)]
    models = {"base": [BASE], "one": [OWN]}
    found = made({**models, "a": [close], "b": [far]}, **KINDS)
    assert (found.best, found.of("b").difference_from_best.is_level) == ("a", False)
    assert found.verdict.startswith("Best: a, by 41")
    assert "of the gap before b" in found.verdict
    found = made({**models, "a": [close], "b": [near], "c": [far]}, **KINDS)
    assert found.verdict.startswith("Level: a is first, by ")
    assert found.verdict.endswith("its 95% interval includes 0. Level with it: b.")
    assert shown(found).splitlines()[-1] == found.verdict


def test_an_expert_that_is_no_better_than_the_base():
    """It has no gap: its task is left out of the means, and the table says so. Without any gap, losses decide."""
    models = {"base": [BASE, BASE], "one": [OWN, BASE], "two": [BASE, BASE]}
    found = made({**models, "a": [OWN, BASE], "b": [BASE, OWN]}, **KINDS)
    assert [task.flags for task in found.tasks] == [(), ("no_better_than_base",)]
    assert found.of("a").tasks[1].recovered is None
    assert found.of("a").recovered.mean == pytest.approx(1)
    assert "two: the expert is no better than the base" in shown(found)
    found = made({"base": [BASE], "one": [BASE], "a": [OWN], "b": [BASE]}, **KINDS)
    assert found.best == "a"
    assert found.of("a").recovered is None
    assert "nats per token" in found.verdict


def test_the_figure_shows_what_it_cuts_and_leaves_out():
    """A share below the axis has an arrow and its number, and no error bar; a task without a gap is named."""
    far = [x + 1 for x in BASE]
    models = {"base": [BASE, BASE], "one": [OWN, BASE], "two": [BASE, BASE]}
    with figure_style():
        figure = comparison_figure(made({**models, "a": [OWN, BASE], "b": [far, BASE]}, **KINDS))
        plain = comparison_figure(made({"base": [BASE], "one": [OWN], "a": [OWN], "b": [BASE]}, **KINDS))
    (axis,) = figure.axes
    notes = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "Arrow: the value is further to the left. Left out: two, where the expert is no better" in notes
    assert len([text for text in axis.texts if getattr(text, "arrow_patch", None)]) == 2  # of the bar, of the task
    assert [text.get_text() for text in axis.texts if text.get_text()] == ["-103%"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean over tasks", "one"]
    assert not plain.axes[0].texts
    assert "Arrow" not in plain.texts[1].get_text()


def test_a_merge_that_is_not_finite():
    """It has no loss, is not the best, and the table says so."""
    found = made({"base": [BASE], "one": [OWN], "a": [[None, 1.0, 1.0, 1.0]], "b": [BASE]}, **KINDS)
    assert found.best == "b"
    assert found.of("a").loss is None
    assert "not finite" in shown(found)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_and_printed(done):
    """The table with the verdict last, the files, no merged model; and the harness's commands."""
    folder, printed = done
    found = Comparison.load(folder / "out" / "slta_compare.json")
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    assert not [*folder.rglob("*model*.safetensors")]
    assert found.verdict in printed
    assert "takes about" in printed
    for model in found.scored:
        assert [line for line in printed.splitlines() if line.startswith(model.label[:40])], model.label
    text = (folder / "out" / "slta_compare.md").read_text()
    assert found.verdict in text
    assert all(f"| {model.label} |" in text for model in found.scored)
    assert found.of("recipe").recovered or all(task.flags for task in found.tasks)
    (line,) = [line for line in printed.splitlines() if line.startswith("mergekit-yaml") and "average" in line]
    assert "recipes/average.yml merged/average && lm_eval --model hf" in line
    assert "--tasks gsm8k,ifeval" in line
    kept = (Path(__file__).parents[1] / "docs" / "output" / "compare.txt").read_text(encoding="utf-8")
    (note,) = [line for line in printed.splitlines() if line.startswith("Gap recovered: ")]
    assert note in kept
    assert "diff. from best" in kept
    reread = folder / "again.json"
    found.save(reread)
    assert reread.read_bytes() == (folder / "out" / "slta_compare.json").read_bytes()


@pytest.mark.parametrize("method", ["average", "recipe"])
def test_the_recipes_make_the_merges(done, better, method, tmp_path):
    """`mergekit-yaml` makes the merge that was scored, without a calibration."""
    folder, _ = done
    result = mergekit_yaml(folder / "out" / "recipes" / f"{method}.yml", tmp_path / "merged", "--quiet")
    assert result.exit_code == 0, result.output
    found = Comparison.load(folder / "out" / "slta_compare.json")
    (scored,) = (model for model in found.scored if model.name == method)
    model = whole(tmp_path / "merged")
    for place, (task, dataset) in enumerate(zip(found.tasks, better.datasets, strict=True)):
        for row, number in enumerate(task.rows):
            ours, labels = log_probs(model, dataset, number)
            assert scored.losses[place][row] == pytest.approx(-float(ours.gather(1, labels[:, None]).mean()), rel=1e-4)


def test_relative_paths(better, tmp_path, monkeypatch, options):
    """The recipe of a merge works where the user's recipe does."""
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_dump(recipe_of(better))
    for path in (better.base, *better.experts, *better.datasets):
        text = text.replace(str(path), os.path.relpath(path))
    found = compare(yaml.safe_load(text), "out", options, methods=["recipe"], rows=2)
    assert found.base_model == os.path.relpath(better.base)
    result = mergekit_yaml("out/recipes/recipe.yml", "merged", "--quiet")
    assert result.exit_code == 0, result.output


def test_a_second_run_goes_on(done, tmp_path, monkeypatch):
    """What was scored is kept; a method more is the only one that is merged; a failure loses nothing."""
    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")
    merged = []
    original = merging.Merger.merge

    def merge(self, method, *arguments):
        merged.append(method.name)
        if method.name == "dare":
            raise RunError("the merge failed (X): y; -v shows where", code="merge-failed")
        return original(self, method, *arguments)

    monkeypatch.setattr(merging.Merger, "merge", merge)
    arguments = ("compare", folder / "recipe.yml", "-o", tmp_path / "out", "--quiet")
    before = Comparison.load(tmp_path / "out" / "slta_compare.json")
    assert slta(*arguments, "--methods", "average,recipe").exit_code == 0
    assert merged == []
    assert Comparison.load(tmp_path / "out" / "slta_compare.json").scored == before.scored
    assert_refused(slta(*arguments, "--methods", "ties,dare"), "merge-failed", exit_code=1)
    assert merged == ["ties", "dare"]
    found = Comparison.load(tmp_path / "out" / "slta_compare.json")
    assert [model.name for model in found.scored][-2:] == ["ties", "recipe"]
    assert len(found.scored) == len(before.scored) + 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_changed_recipe_is_scored_anew(done, better, tmp_path):
    """Other settings: that merge alone; other rows: everything. Both are said."""
    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = tmp_path / "changed.yml"
    changed.write_text(yaml.safe_dump(recipe_of(better, granularity="layer")))
    result = slta("compare", changed, "-o", tmp_path / "out", "--methods", "recipe,average")
    assert result.exit_code == 0, result.output
    assert "recipe (features) is for another recipe: scored anew" in result.output
    assert "Scored already: average" in result.output
    before, after = (Comparison.load(each / "out" / "slta_compare.json") for each in (folder, tmp_path))
    assert before.scored[3] == after.scored[3]
    assert before.scored[-1].losses != after.scored[-1].losses
    result = slta("compare", changed, "-o", tmp_path / "out", "--methods", "average", "--rows", 2)
    assert "everything is scored anew" in result.output
    found = Comparison.load(tmp_path / "out" / "slta_compare.json")
    assert [len(task.rows) for task in found.tasks] == [2, 2]
    assert [model.name for model in found.scored][-1] == "average"
    assert found.scored[-1].losses[0] == after.scored[3].losses[0][:2]


def test_python(done, better, tmp_path, options):
    """The function is the command; it is exported."""
    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")
    assert mergekit_slta.compare is compare
    found = mergekit_slta.compare(folder / "recipe.yml", tmp_path / "out", options, methods="recipe")
    assert found == Comparison.load(tmp_path / "out" / "slta_compare.json")
    with refused(RecipeError, "invalid-value", "options"):
        compare(recipe_of(better), tmp_path / "out", {})


# --- recipes of other kinds -------------------------------------------------------------------------------------------


def test_adapters_need_no_merged_copy(tiny, better, tmp_path, options):
    """mergekit's own methods read adapters through the same loader: no --lora-merge-cache, and the same numbers."""
    base = whole(tiny.base)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).mul_(0.2)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "full")
    recipes = []
    for expert in (f"{tiny.base}+{tmp_path / 'adapter'}", str(tmp_path / "full")):
        recipe = recipe_of(better)
        recipe["models"][0]["model"] = expert
        recipes.append(recipe)
    one, two = (
        compare(recipe, tmp_path / f"out{number}", options, methods=["average"])
        for number, recipe in enumerate(recipes)
    )
    for adapted, full in zip(one.scored, two.scored, strict=True):
        for place in range(2):
            assert adapted.losses[place] == pytest.approx(full.losses[place], rel=1e-4)


def test_a_larger_vocabulary(better, tmp_path, options):
    """An expert with one token more and a `tokenizer` section: the merge has its own table, and is scored with it."""
    grown = tmp_path / "grown"
    model, tokenizer = whole(better.experts[1]), make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(321, mean_resizing=False)
    model.save_pretrained(grown)
    tokenizer.save_pretrained(grown)
    recipe = {**recipe_of(better), "tokenizer": {"source": "base"}}
    recipe["models"][1]["model"] = str(grown)
    found = compare(recipe, tmp_path / "out", options, methods=["average"])
    plain = compare(recipe_of(better), tmp_path / "plain", options, methods=["average"])
    for own, other in zip(found.scored, plain.scored, strict=True):  # a few rows more or less of the softmax
        assert np.array(own.losses) == pytest.approx(np.array(other.losses), rel=0.1)


def test_directions_and_methods_that_do_not_apply(better, tiny, tmp_path, options, monkeypatch):
    """A model without a task has no weight in mergekit's methods, and `data_free` refuses it. Features on the disk give
    the same scores, and are removed."""
    recipe = recipe_of(better)
    plain = compare(recipe, tmp_path / "plain", options, methods=["average"])
    monkeypatch.setattr("mergekit_slta.comparison.scoring.ACTIVATIONS_IN_MEMORY", 0)
    recipe["models"].append({"model": str(tiny.experts[2]), "parameters": {"role": "direction"}})
    found = compare(recipe, tmp_path / "out", options, methods=["average"])
    assert found.models == plain.models
    assert [model.losses for model in found.scored] == [model.losses for model in plain.scored]
    assert not (tmp_path / "out" / ".slta_comparing").exists()
    with refused(RecipeError, "conflicting-keys", "direction"):
        compare(recipe, tmp_path / "out", options, methods=["data_free"])


def test_weights_from_a_file(done, better, tmp_path, options):
    """Weights that the recipe names are taken, unless they were fitted on compared rows."""
    folder, _ = done
    path = folder / "out" / "alphas" / "recipe.json"
    recipe = recipe_of(better, alphas=str(path), evaluate=True)
    found = compare(recipe, tmp_path / "out", options, methods=["recipe"])
    before = Comparison.load(folder / "out" / "slta_compare.json")
    assert found.scored[-1].losses == before.scored[-1].losses
    assert found.scored[-1].fitted_rows == before.scored[-1].fitted_rows
    assert not (tmp_path / "out" / "alphas").exists()
    own = tmp_path / "alphas.json"
    mergekit_slta.calibrate(recipe_of(better), options).save(own)
    with refused(RecipeError, "conflicting-keys", better.datasets[0], "alphas"):
        compare(recipe_of(better, alphas=str(own)), tmp_path / "other", options, methods=["recipe"])


def test_a_named_file_is_not_written(better, options, tmp_path):
    """If the recipe names a file for its alphas that is not there, a comparison leaves that to `merge`."""
    path = tmp_path / "alphas.json"
    config = as_config(recipe_of(better, alphas=str(path)))
    job = prepare(for_comparison(read_recipe(config)), options, for_merge=False)
    (method,), _ = make_methods(config, job, ["recipe"], None)
    assert method.config.parameters["evaluate"] is True
    assert "alphas" not in method.config.parameters


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--methods", "tie"], ["tie", "did you mean ties?"]),
        (["--methods", "ties:0.3"], ["ties:0.3", *NAMES]),
        (["--methods", "task_arithmetic:x"], ["task_arithmetic:x", "0.4"]),
        (["--methods", ","], NAMES),
        (["--rows", "1"], ["--rows is 1"]),
        (["--lm-eval", " , "], ["--lm-eval"]),
    ],
)
def test_options_that_are_refused(done, tmp_path, arguments, values):
    """One line each, and nothing is written."""
    folder, _ = done
    assert_refused(slta("compare", folder / "recipe.yml", "-o", tmp_path / "out", *arguments), "invalid-value", *values)
    assert not (tmp_path / "out").exists()


def test_rows_are_needed(better, tmp_path, options):
    """Also where the weights are from a file, or from no rows."""
    recipe = recipe_of(better, objective="data_free", granularity="model")
    del recipe["models"][1]["parameters"]["dataset"]
    with refused(DataError, "missing-dataset", better.experts[1], "compared"):
        compare(recipe, tmp_path / "out", options, methods=["average"])


def test_an_interruption_says_how_it_goes_on(done, tmp_path, monkeypatch):
    """Ctrl-C during a merge: one line, no scratch folder."""
    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")

    def merge(self, method, place, clock):
        place.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging.Merger, "merge", merge)
    result = slta("compare", folder / "recipe.yml", "-o", tmp_path / "out", "--methods", "ties", "--quiet")
    assert result.exit_code == 130, result.output
    check_message(result.output.splitlines()[-1], "interrupted-run", "finished merges are kept")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_too_few_rows(better, tmp_path, options):
    """Rows that leave fewer than two to compare on are refused with the number that is needed."""
    short = tmp_path / "short.jsonl"
    write_rows(short, 5, count=19)
    recipe = recipe_of(better)
    recipe["models"][1]["parameters"]["dataset"] = str(short)
    with refused(DataError, "too-few-rows", short, "20 or more"):
        compare(recipe, tmp_path / "out", options)
    write_rows(short, 5, count=20)
    compare(recipe, tmp_path / "out", options, methods=["average"])


def test_what_is_in_the_way(done, better, tiny, tmp_path, options):
    """Other people's files, a comparison of other models, a full disk: refused before a weight is merged."""
    folder, _ = done
    recipe, out = recipe_of(better), tmp_path / "out"
    (out / "recipes").mkdir(parents=True)
    (out / "recipes" / "average.yml").write_text("mine")
    with refused(OutputError, "foreign-file", out / "recipes" / "average.yml"):
        compare(recipe, out, options, methods=["average"])
    (out / "slta_compare.json").write_text("{}")
    with refused(OutputError, "foreign-file", out / "slta_compare.json"):
        compare(recipe, out, options)
    recipe["models"][1]["model"] = str(tiny.experts[2])
    with refused(OutputError, "foreign-file", better.experts[1]):
        compare(recipe, folder / "out", options)
    assert (out / "recipes" / "average.yml").read_text() == "mine"


def test_a_full_disk(better, tmp_path, options, monkeypatch):
    """There must be room for one merge."""
    monkeypatch.setattr("mergekit_slta.calibration.reuse.free_bytes", lambda _: 1000)
    with refused(OutputError, "disk-full"):
        compare(recipe_of(better), tmp_path / "out", options, methods=["average"])


def test_damaged_files_are_found(done, tmp_path):
    """Scores that are not for the rows, or results of other models."""
    folder, _ = done
    content = json.loads((folder / "out" / "slta_compare.json").read_text())
    for change in (
        lambda found: found["scored"][0]["losses"].pop(),
        lambda found: found["results"].pop(),
        lambda found: found["tasks"][0]["rows"].pop(),
    ):
        changed = json.loads(json.dumps(content))
        change(changed)
        (tmp_path / "bad.json").write_text(json.dumps(changed))
        with refused(AlphasError, "damaged-file"):
            Comparison.load(tmp_path / "bad.json")


# --- lm-evaluation-harness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
def test_the_harness_runs_where_it_is_installed(done, tmp_path, monkeypatch, code):
    """On every model, a merge while it is there; once; a failure is one line."""
    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")
    ran = []

    def run(command):
        ran.append(command)
        place = dict(part.split("=") for part in command[command.index("--model_args") + 1].split(","))["pretrained"]
        transformers.AutoConfig.from_pretrained(place)
        make_tokenizer().from_pretrained(place)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: name == "lm_eval" or None)
    monkeypatch.setattr(benchmarks.subprocess, "run", run)
    arguments = ("compare", folder / "recipe.yml", "-o", tmp_path / "out", "--methods", "average", "--lm-eval", "gsm8k")
    result = slta(*arguments)
    if code:
        assert_refused(result, "benchmark-failed", "exit code 3", "gsm8k", exit_code=1)
        return
    assert result.exit_code == 0, result.output
    names = [command[command.index("--output_path") + 1].rpartition("/")[2] for command in ran]
    assert names == ["base", "expert_1", "expert_2", "average"]
    assert slta(*arguments).exit_code == 0
    assert len(ran) == 4


def test_the_default_methods(better, tmp_path, options):
    """All of them; an objective whose settings are the recipe's own is not merged twice."""
    config = as_config(recipe_of(better))
    job = prepare(for_comparison(read_recipe(config)), options, for_merge=False)
    methods, left_out = make_methods(config, job, None, "float32")
    scales = [f"task_arithmetic:{scale:g}" for scale in SCALES]
    assert [each.name for each in methods] == ["average", *scales, "ties", "dare", "data_free", "joint", "recipe"]
    assert [*left_out] == ["features"]
