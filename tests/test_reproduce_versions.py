"""Splits without near-duplicates, scores of single rows, and the comparison of two versions (examples/reproduce)."""

from __future__ import annotations

import json
import random
import shutil
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_config, make_tokenizer
from example_scripts import EXAMPLES, importable
from transformers import AutoModelForCausalLM

from mergekit_slta.data.rows import sample_numbers

pytestmark = pytest.mark.example


@pytest.fixture(scope="module")
def example():
    """The example's modules."""
    with importable(EXAMPLES / "reproduce", EXAMPLES / "smollm2"):
        import compare_versions
        import experts
        import five_tasks
        import intervals
        import paired
        import scoring
        import self_written
        import shared
        import splits
        import versions

        yield SimpleNamespace(
            compare_versions=compare_versions, experts=experts, five_tasks=five_tasks, intervals=intervals,
            paired=paired, scoring=scoring, self_written=self_written, shared=shared, splits=splits, versions=versions,
        )  # fmt: skip


def question(text: str) -> list[dict[str, str]]:
    """A conversation with this question."""
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]


def test_near_duplicates_do_not_get_into_two_parts(example):
    """Other numbers and names are the same question, and so is a paragraph in common; parts take the rows in order."""
    paragraph = "A lazy dog sleeps below the old bridge while a quick brown fox runs over it every single morning."
    rows = [
        question("Say: Ada has 12 apples and gives 3 of them to a friend. How many are left?"),
        question(f"Say: {paragraph} What is said of the fox?"),
        question("Say: Ben has 9 apples and gives 44 of them to a friend. How many are left?"),
        question("Say: Tell me what a train costs that goes from Rome to Bonn tomorrow."),
        question(f"Say: {paragraph} Where is the dog?"),
        question("Say: Ada has a garden with nine trees in it, and each of those bears fruit in spring."),
    ]
    parts = example.splits.split(rows, {"test": 2, "train": 9}.items(), {"Ada", "Ben"})
    assert parts == {"test": rows[:2], "train": [rows[3], rows[5]]}
    assert example.splits.split(rows, {"test": 2, "train": 1}.items(), {"Ada", "Ben"})["train"] == [rows[3]]
    without_names = example.splits.split(rows[:3], {"test": 1, "train": 9}.items())
    assert without_names["train"] == [rows[1]], "two names among eleven sequences leave more than half"


@pytest.mark.parametrize("seed", [20251, 1])
@pytest.mark.parametrize("task", ["math", "extract", "translate"])
def test_parts_of_a_task_have_no_question_in_common(example, task, seed):
    """Held against the rule itself, pair by pair, with the numbers of rows of a run."""
    parts = example.splits.split(
        example.five_tasks.TASKS[task](random.Random(seed)),
        {"test": 100, "choose": 40, "train": 500}.items(),
        example.five_tasks.ALL_NAMES,
    )
    sizes = {name: len(rows) for name, rows in parts.items()}
    assert sizes == {"test": 100, "choose": 40, "train": 500} or (task == "translate" and sizes["train"] > 300)
    every = [(name, row[0]["content"]) for name, rows in parts.items() for row in rows]
    found = example.splits.shingles([text for _, text in every], example.five_tasks.ALL_NAMES)
    marked = [(name, one) for (name, _), one in zip(every, found, strict=True)]
    for name, one in marked:
        if name != "train":
            others = [other for their, other in marked if their != name]
            assert max(len(one & other) / min(len(one), len(other)) for other in others) < 0.5


def scores(example, seed: int, tasks: tuple[str, ...], level: float) -> dict:
    """Scores of random rows around a loss per token."""
    generator = np.random.default_rng(seed)
    found = {}
    for number, task in enumerate(tasks):
        rows = 40 + number
        tokens = np.random.default_rng(number).integers(3, 30, rows)
        losses = tokens * (level + 0.1 * generator.standard_normal(rows))
        found[task] = {
            "rows": {"loss": losses.tolist(), "tokens": tokens.tolist(), "divergence": (losses * 0.5).tolist()}
        }
    return found


def test_measures_are_those_of_gaps_and_differences_are_paired(example):
    """On all rows: explicit arithmetic over draws. Methods that differ in nothing differ by 0 with no error, however
    much their rows scatter; the error of one method's mean is the rows' and the draws'."""
    tasks = ("a", "b")
    base, experts = scores(example, 1, tasks, 3.0), scores(example, 2, tasks, 1.0)
    draws = [scores(example, 10 + draw, tasks, 1.4 + 0.1 * draw) for draw in range(3)]
    worse = [{task: {"rows": dict(one["rows"])} for task, one in draw.items()} for draw in draws]
    for rows in (one["rows"] for draw in worse for one in draw.values()):
        rows["loss"] = [loss + 0.2 * tokens for loss, tokens in zip(rows["loss"], rows["tokens"], strict=True)]
    found = example.paired.bootstrap(base, experts, {"one": draws, "same": draws, "worse": worse}, seed=3)

    def loss(one: dict, task: str) -> float:
        return sum(one[task]["rows"]["loss"]) / sum(one[task]["rows"]["tokens"])

    shares = [
        [(loss(base, task) - loss(draw, task)) / (loss(base, task) - loss(experts, task)) for task in tasks]
        for draw in draws
    ]
    mean = example.paired.Estimate.of(found["one"]["mean"])
    assert mean.value == pytest.approx(np.mean(shares))
    assert found["one"]["worst"][0] == pytest.approx(np.mean([min(share) for share in shares]))
    left = [
        [sum(draw[task]["rows"]["divergence"]) / sum(base[task]["rows"]["divergence"]) for task in tasks]
        for draw in draws
    ]
    assert found["one"]["divergence"][0] == pytest.approx(np.mean(left))
    of_draws = np.std([np.mean(share) for share in shares], ddof=1) / np.sqrt(3)
    assert of_draws < mean.error < 1.2 * of_draws
    assert mean.low < mean.value < mean.high
    same = example.paired.Estimate.of(found["same"]["mean"] - found["one"]["mean"])
    assert (same.value, same.error, same.low, same.high) == (0.0, 0.0, 0.0, 0.0)
    lost = example.paired.Estimate.of(found["worse"]["mean"] - found["one"]["mean"])
    gaps = [loss(base, task) - loss(experts, task) for task in tasks]
    assert lost.value == pytest.approx(np.mean([-0.2 / gap for gap in gaps]))
    assert lost.error < 0.1 * mean.error
    spread = example.paired.spread(base, experts, draws)
    assert spread["mean"] == pytest.approx(np.std([np.mean(share) for share in shares], ddof=1))


def test_no_gap_has_no_share_and_draws_must_be_the_same(example):
    """An expert that is no better than the base gives no number instead of a wrong one."""
    base, experts = scores(example, 1, ("a",), 1.0), scores(example, 2, ("a",), 3.0)
    draw = scores(example, 3, ("a",), 2.0)
    found = example.paired.bootstrap(base, experts, {"one": [draw]}, resamples=9)
    assert example.paired.Estimate.of(found["one"]["mean"]) == example.paired.Estimate(None, None, None, None)
    assert example.paired.Estimate.of(found["one"]["divergence"]).value > 0
    with pytest.raises(ValueError, match=r"\[1, 2\] draws"):
        example.paired.bootstrap(base, experts, {"one": [draw], "two": [draw, draw]})


def test_methods_are_compared_on_the_draws_that_both_have(example):
    """A merge without calibration rows stands beside every draw of another."""
    tasks = ("a", "b")
    base, experts = scores(example, 1, tasks, 3.0), scores(example, 2, tasks, 1.0)
    one, two, three, free = (scores(example, 10 + number, tasks, 1.5 + 0.2 * number) for number in range(4))
    methods = {"joint": {42: one, 43: two}, "peer": {43: three, 44: one}, "free": {None: free}}
    text, data = example.intervals.compare(base, experts, methods, "joint")

    def value(draw: dict) -> float:
        return example.paired.bootstrap(base, experts, {"": [draw]}, resamples=0)[""]["mean"][0]

    assert data["peer"]["difference"]["mean"]["value"] == pytest.approx(value(three) - value(two))
    expected = value(free) - (value(one) + value(two)) / 2
    assert data["free"]["difference"]["mean"]["value"] == pytest.approx(expected)
    assert data["joint"]["difference"] == {}
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")][2:] == ["2", "2", "–"]
    assert f"| {100 * value(free):.1f} ± " in text
    methods["peer"].pop(43)
    assert example.intervals.compare(base, experts, methods, "joint")[1]["peer"]["difference"] == {}


@pytest.fixture(scope="module")
def workdir(example, tmp_path_factory) -> Path:
    """A base, three experts and their rows, as a run leaves them."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    config = make_config("llama", tied=True, hidden_size=16, intermediate_size=24)
    (folder / "data").mkdir()
    for number, name in enumerate(("base", "math", "code", "translate")):
        torch.manual_seed(number)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        rows = [question(f"{name} {'very ' * length}quick?") for length in range(5)]
        example.shared.write_rows(folder / "data" / f"{name}_test.jsonl", rows)
    return folder


def test_an_expert_of_adapters_changes_linear_maps_by_their_rank(example, workdir, tmp_path):
    """What is saved is an ordinary checkpoint; embeddings and norms are the base's."""
    (tmp_path / "data").mkdir()
    shutil.copytree(workdir / "base", tmp_path / "base")
    example.shared.write_rows(tmp_path / "data" / "math_train.jsonl", [question(f"math {n}?") for n in range(9)])
    sizes = example.experts.Sizes(steps=12, lora_rank=2, learning_rate=5e-3)
    example.experts.make_expert(tmp_path, "math", sizes, "float32", "cpu")
    base, expert = (dict(example.shared.load_model(tmp_path / name).named_parameters()) for name in ("base", "math"))
    assert base.keys() == expert.keys()
    for name in (name for name in base if "proj" in name):
        powers = torch.linalg.svdvals((expert[name] - base[name]).detach()) ** 2
        assert powers[:2].sum() > 0.95 * powers.sum() > 0  # the rest is rounding to bfloat16
    rounded = {name: value.bfloat16().float() for name, value in base.items()}
    assert all(torch.equal(rounded[name], expert[name]) for name in base if "proj" not in name)


def test_ways_to_get_rows(example, workdir, monkeypatch):
    """As many of each. Real ones are those that a calibration draws, the base's are in the base's words, unfiltered
    ones the first; every row is a question and its answer."""
    own = example.self_written
    monkeypatch.setitem(own.COUNTS, "features", 2)
    monkeypatch.setattr(own, "usable", lambda rows, wanted: own.Selection(tuple(range(1, len(rows)))))
    study = own.Study(workdir, "features", ())
    example.shared.write_rows(workdir / "data" / "math_train.jsonl", [question(f"math {n}?") for n in range(9)])
    drawn = list(islice(sample_numbers(9, 42), 2))
    assert own.make_rows(study, 42, "real", "math") == [question(f"math {number}?") for number in drawn]
    found = {way: own.make_rows(study, 42, way, "math") for way in ("random", "base", "unfiltered", "undirected")}
    assert {len(rows) for rows in found.values()} == {2}
    assert len({json.dumps(rows) for rows in found.values()}) == 4
    for row in (row for rows in found.values() for row in rows):
        assert [message["role"] for message in row] == ["user", "assistant"]
        assert all(message["content"] for message in row)
    kept = workdir / "self_written" / "candidates"
    written = {path.name: json.loads(path.read_text()) for path in kept.iterdir()}
    assert sorted(written) == ["features-42-base-math.json", "features-42-math-math.json"]
    assert found["unfiltered"] == [
        own.as_messages(row["prompt"].strip() or "-", row["answer"].strip() or "-")
        for row in written["features-42-math-math.json"][:2]
    ]


def test_scores_of_rows_are_those_of_a_plain_forward(example, workdir):
    """Loss and divergence of every row, without batches, padding or shared work; they add up to the task's."""
    base = example.shared.load_model(workdir / "base").eval()
    expert = example.shared.load_model(workdir / "math").eval()
    tokenizer = example.shared.load_tokenizer(workdir / "base")
    found = example.scoring.score_test_rows(workdir, base, ["math"], "float32")["math"]
    for number, messages in enumerate(example.scoring.task_rows(workdir, "math", "test")):
        row = example.shared.encode_row(tokenizer, messages)
        ids, start = torch.tensor([row.ids]), row.prompt_length
        with torch.no_grad():
            ours, theirs = (one(ids).logits[0, start - 1 : -1].log_softmax(-1) for one in (base, expert))
        loss = -sum(ours[at, token] for at, token in enumerate(row.ids[start:])).item()
        assert found["rows"]["loss"][number] == pytest.approx(loss, rel=1e-4)
        assert found["rows"]["divergence"][number] == pytest.approx(
            (theirs.exp() * (theirs - ours)).sum().item(), rel=1e-4
        )
        assert found["rows"]["tokens"][number] == len(row.ids) - start
    assert found["loss"] == pytest.approx(sum(found["rows"]["loss"]) / found["tokens"], rel=1e-4)


STUB = """
import json, sys
if sys.argv[1] == "-c":
    print("abc")
elif sys.argv[3] == "calibrate":
    text = open(sys.argv[4]).read()
    seed = int(text.split("seed: ")[1].split()[0])
    alphas = json.load(open("alphas.json"))
    shift = 0.1 * (seed - 42) + (0.2 if "features" in text else 0.0)
    for one in alphas["submodules"]:
        one["alpha"] = [value + shift for value in one["alpha"]]
    json.dump(alphas, open(sys.argv[6], "w"))
    open("calls", "a").write(f"{seed} ")
"""
"""Stands for a version of the package: `alphas.json` moved by the draw and by the objective."""


def test_compare_versions_goes_on_and_merges_as_the_weights_say(example, workdir, tmp_path):
    """Every draw of every version is calibrated once; the merge is explicit arithmetic; another recipe is refused."""
    base = example.shared.load_model(workdir / "base")
    names = [name for name, _ in base.named_parameters()]
    halves = [names[::2], names[1::2]]
    alphas = {
        "models": ["code", "math", "translate"],
        "submodules": [
            {"name": str(number), "tensors": half, "alpha": [0.1 + number, 0.3, 0.2]}
            for number, half in enumerate(halves)
        ],
    }
    (workdir / "alphas.json").write_text(json.dumps(alphas))
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    python = f"{sys.executable} {stub}"
    command = [str(workdir), "--old", python, "--new", python, "--set", "three", "--seeds", "42,43"]
    command += ["--new-key", "objective=features"]
    first = CliRunner().invoke(example.compare_versions.main, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert (workdir / "calls").read_text() == "42 42 43 43 "
    folder = workdir / "versions" / "three"
    assert "objective: features" in (folder / "new-objective=features" / "42" / "recipe.yml").read_text()
    found = json.loads((folder / "old--new-objective=features.json").read_text())
    old, new, difference = found["estimates"].values()
    assert difference["divergence"]["value"] == pytest.approx(new["divergence"]["value"] - old["divergence"]["value"])
    assert "| divergence code |" in (folder / "old--new-objective=features.md").read_text()
    assert found["times"]["old"][0]["source"] == "abc"

    merged = dict(example.versions.merged(workdir, alphas).named_parameters())
    start, *experts = (
        dict(example.shared.load_model(workdir / name).named_parameters()) for name in ("base", *alphas["models"])
    )
    for name in names:
        weights = alphas["submodules"][name in halves[1]]["alpha"]
        expected = start[name] + sum(a * (one[name] - start[name]) for a, one in zip(weights, experts, strict=True))
        torch.testing.assert_close(merged[name], expected)

    again = CliRunner().invoke(example.compare_versions.main, command, catch_exceptions=False)
    assert again.output == first.output[first.output.index("| %") :]
    assert (workdir / "calls").read_text() == "42 42 43 43 "
    (folder / "old" / "42" / "recipe.yml").write_text("another")
    refused = CliRunner().invoke(example.compare_versions.main, command)
    assert refused.exit_code == 1
    assert "is of another recipe: choose another name for old" in refused.output
    same = CliRunner().invoke(example.compare_versions.main, [*command[:-2], "--new-name", "old"])
    assert same.exit_code == 2
    assert "two versions of one name" in same.output


def test_weights_that_do_not_cover_the_model_are_refused(example, workdir):
    """A tensor without a weight, an unknown one, and weights of parts of tensors."""
    names = [name for name, _ in example.shared.load_model(workdir / "base").named_parameters()]
    whole = {"name": "all", "tensors": names, "alpha": [1.0]}
    for submodule, said in (
        ({**whole, "tensors": names[1:]}, f"{names[0]} has no weight"),
        ({**whole, "tensors": [*names, "x"]}, "x is no parameter of"),
        ({**whole, "slices": {names[0]: [[0, 0, 1]]}}, "has weights for parts of tensors"),
    ):
        with pytest.raises(Exception, match=said):
            example.versions.merged(workdir, {"models": ["math"], "submodules": [submodule]})
