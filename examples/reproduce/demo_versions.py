"""Versions of the package, or settings of it, on the demo's experts: which merges are nearer to them?

`mergekit-slta demo WORK`, then `python examples/reproduce/demo_versions.py WORK --variant NAME PYTHON [--key NAME
KEY=VALUE] ...`: as `compare_versions.py`, with any number of variants, on the demo's test rows. Every variant is
compared with the first. `rows` among the keys is the number of rows that each task's data have in all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from formatting import table
from intervals import percent
from paired import Estimate, bootstrap
from scoring import six_digits
from shared import read_json, write_json
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from versions import ALPHAS, Variant, calibrate, models_of

from mergekit_slta.demo import tasks as data
from mergekit_slta.demo.training import NO_LOSS, padded

TASKS = tuple(task.name for task in data.TASKS)
Predictions = dict[str, torch.Tensor]


class DemoVariant(Variant):
    """A variant whose recipe is that of the demo, with questions and answers apart, so that losses count on answers."""

    def recipe(self, tasks: Sequence[str], seed: int) -> dict[str, Any]:
        """The recipe of a draw."""
        keys = dict(self.keys)
        folder = f"rows-{keys.pop('rows', 'all')}"
        columns = {"text": "{question}", "completion": " {answer}"}
        entries = [
            {
                "model": f"models/{task}",
                "parameters": {"dataset": f"{folder}/{task}.jsonl", **({} if task == "words" else columns)},
            }
            for task in tasks
        ]
        return {
            "merge_method": "submodule_linear",
            "base_model": "models/base",
            "models": entries,
            "parameters": {"seed": seed, **keys},
        }


def write_data(workdir: Path, rows: int | None) -> None:
    """Write the calibration rows of the demo."""
    folder = workdir / f"rows-{rows or 'all'}"
    folder.mkdir(exist_ok=True)
    for task in TASKS:
        lines = (workdir / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        data.write_jsonl(folder / f"{task}.jsonl", map(json.loads, lines))


def load(workdir: Path, name: str) -> LlamaForCausalLM:
    """One of the demo's models."""
    return LlamaForCausalLM.from_pretrained(workdir / "models" / name, dtype=torch.float32).eval()


@torch.inference_mode()
def predictions(model: LlamaForCausalLM, tests: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Predictions:
    """Task -> log-probabilities [rows, tokens - 1, vocabulary]."""
    return {
        task: model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for task, (ids, _) in tests.items()
    }


def scores_of(
    known: Predictions, experts: Predictions, tests: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, dict[str, Any]]:
    """Task -> `rows`: loss, tokens and KL(expert || model) of every row, summed over its answer."""
    found = {}
    for task, (_, labels) in tests.items():
        targets, wanted = labels[:, 1:], experts[task]
        counted = targets != NO_LOSS
        losses = -known[task].gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted
        divergences = (wanted.exp() * (wanted - known[task])).sum(-1) * counted
        found[task] = {
            "rows": {
                "loss": [six_digits(value) for value in losses.sum(1).tolist()],
                "tokens": counted.sum(1).tolist(),
                "divergence": [six_digits(value) for value in divergences.sum(1).tolist()],
            }
        }
    return found


@torch.inference_mode()
def merged(workdir: Path, alphas: Mapping[str, Any]) -> LlamaForCausalLM:
    """The base plus the weighted task vectors, in float32."""
    model = load(workdir, "base")
    parameters = dict(model.named_parameters())
    base = {name: value.clone() for name, value in parameters.items()}
    models = models_of(alphas, base, lambda name: dict(load(workdir, Path(name).name).named_parameters()))
    for number, model_name in enumerate(alphas["models"]):
        other = models[model_name]
        for submodule in alphas["submodules"]:
            for name in submodule["tensors"]:
                parameters[name].add_(submodule["alpha"][number] * (other[name] - base[name]))
    return model


def promises(alphas: Mapping[str, Any], scores: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Per task the share of the base's divergence that the file promises, with its error, and that on the test rows."""
    cells = []
    for task in alphas.get("evaluation", {}).get("tasks", ()):
        name, share = Path(task["model"]).name, task["share"]
        found, whole = (sum(each[name]["rows"]["divergence"]) for each in (scores, base))
        error = "" if share["stderr"] is None else f" ± {100 * share['stderr']:.1f}"
        cells.append(f"{name} {100 * share['mean']:.1f}{error} (test {100 * found / whole:.1f})")
    return cells


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--variant", "variants", nargs=2, multiple=True, required=True, metavar="NAME PYTHON",
              help="A variant and the command line of its Python.")  # fmt: skip
@click.option("--key", "keys", nargs=2, multiple=True, metavar="NAME KEY=VALUE", help="A key of a variant's recipe.")
@click.option("--seeds", default="42,43,44", show_default=True, help="Of the draws.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the table (Markdown), too.")
def main(
    workdir: Path, variants: Sequence[tuple[str, str]], keys: Sequence[tuple[str, str]], seeds: str,
    output: Path | None,
) -> None:  # fmt: skip
    """Compare versions of the package on the experts of a demo."""
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workdir / "models" / "base")
    tests = {}
    for task in data.TASKS:
        lines = (workdir / "data" / f"{task.name}.test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [data.Example(row["prompt"], row["answer"]) for row in map(json.loads, lines)]
        tests[task.name] = padded(data.encode_examples(tokenizer, task, rows))
    experts = {task: predictions(load(workdir, task), {task: tests[task]})[task] for task in TASKS}
    of_base = scores_of(predictions(load(workdir, "base"), tests), experts, tests)
    of_experts = scores_of(experts, experts, tests)
    scores: dict[str, list[dict[str, Any]]] = {}
    times: dict[str, list[dict[str, Any]]] = {}
    promised: list[list[str]] = []
    for name, command in variants:
        own = [pair for other, pair in keys if other == name]
        parsed = DemoVariant.of(name, command, own)
        one = DemoVariant(name, tuple(shlex.split(command)), parsed.keys)
        write_data(workdir, one.keys.get("rows"))
        for seed in map(int, seeds.split(",")):
            folder = workdir / "versions" / name / str(seed)
            times.setdefault(name, []).append(calibrate(workdir, folder, one, TASKS, seed))
            alphas = read_json(folder / ALPHAS)
            found = scores_of(predictions(merged(workdir, alphas), tests), experts, tests)
            scores.setdefault(name, []).append(found)
            if cells := promises(alphas, found, of_base):
                promised.append([name, str(seed), *cells])
            click.echo(f"{name}, {seed}: done")
    values = bootstrap(of_base, of_experts, scores)
    measures = ("mean", "worst", "divergence")
    rows = [[name, *(percent(Estimate.of(values[name][key]), ".2f") for key in measures)] for name in scores]
    first = next(iter(scores))
    for name in list(scores)[1:]:
        differences = [percent(Estimate.of(values[name][key] - values[first][key]), ".2f") for key in measures]
        rows.append([f"{name} - {first}", *differences])
    head = ["%", "gap recovered, mean task", "gap recovered, worst task", "of the base's divergence left"]
    note = (
        f"The demo's experts, {len(next(iter(tests.values()))[0])} test rows per task, draws {seeds}. Value ± standard "
        "error (95% interval) over test rows and draws, paired."
    )
    seconds = [[name, f"{sum(one['cpu_seconds'] for one in parts) / len(parts):.0f}"] for name, parts in times.items()]
    parts = [note, table(head, rows), table(["variant", "CPU seconds of a calibration"], seconds)]
    if promised:
        parts.append("Of the base's divergence left, in %: as the alphas file says, and on the test rows.")
        parts.append(table(["variant", "draw", *TASKS], promised))
    text = "\n\n".join(parts) + "\n"
    click.echo(text)
    if output:
        output.write_text(text, encoding="utf-8")
        write_json(output.with_suffix(".json"), {"scores": scores, "base": of_base, "experts": of_experts})


if __name__ == "__main__":
    main()
