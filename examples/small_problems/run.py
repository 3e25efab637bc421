"""Compare merges of small random problems on fresh rows: divergence from the experts.

    python examples/small_problems/run.py WORK [--problems N] [--first N] [--methods features,joint] [-o FOLDER]

Each problem is trained from scratch (seconds) and kept in WORK. With -o the results are written to FOLDER/results.json
and FOLDER/results.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from problems import Problem, Sample, make, padded, problem, recipe
from transformers import LlamaForCausalLM

from mergekit_slta import Alphas, calibrate
from mergekit_slta.errors import SltaError

METHODS: dict[str, dict[str, object]] = {
    "features": {"objective": "features"},
    "joint": {"objective": "joint", "direction": "none"},
    "joint-5-rows": {"objective": "joint", "direction": "none", "num_samples": 5},
    "data_free": {"objective": "data_free"},
    "features-direction": {"objective": "features", "direction": "swudi_a"},
    "joint-direction": {"objective": "joint"},
}


def merged(base: LlamaForCausalLM, experts: Sequence[LlamaForCausalLM], alphas: Alphas) -> LlamaForCausalLM:
    """base + sum of alpha times the experts' changes, and that of a direction, tensor by tensor."""
    model = copy.deepcopy(base)
    states = [dict(other.named_parameters()) for other in (base, *experts)]
    own = dict(model.named_parameters())
    form = alphas.closed_form
    with torch.no_grad():
        if form is not None:
            parts = {name: [state[name] for state in states] for name in own}
            states.append({name: form.combine(name, first, others) for name, (first, *others) in parts.items()})
        for entry in alphas.submodules:
            for name in entry.tensors:
                if name in own:
                    changes = (state[name] - states[0][name] for state in states[1:])
                    own[name].add_(sum(alpha * change for alpha, change in zip(entry.alpha, changes, strict=True)))
    return model


@torch.no_grad()
def divergences(teacher: LlamaForCausalLM, model: LlamaForCausalLM, rows: Sequence[Sample]) -> torch.Tensor:
    """KL(teacher || model) in nats, summed over the answer, [rows] float64."""
    ids, labels = padded(rows)
    ours = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    theirs = teacher(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    return ((theirs.exp() * (theirs - ours)).sum(-1) * (labels[:, 1:] != -100)).sum(1)


def run_problem(given: Problem, folder: Path, methods: Sequence[str]) -> dict[str, Any]:
    """Every method's divergence on the fresh rows, and its paired difference to the first one.

    Differences are means over tasks and rows, with the standard error over rows.
    """
    fresh = make(given, folder)
    base, *experts = (
        LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("base", *(f"expert{place}" for place in range(len(given.tasks))))
    )
    of_base = torch.stack([divergences(expert, base, rows) for expert, rows in zip(experts, fresh, strict=True)])
    found: dict[str, Any] = {"number": given.number, "kind": given.kind, "tasks": len(given.tasks)}
    found |= {"rows": given.num_rows, "base": of_base.mean(1).tolist(), "methods": {}}
    per_row: dict[str, torch.Tensor] = {}
    for name in methods:
        try:
            alphas = calibrate(recipe(given, folder, **METHODS[name]))
        except SltaError as error:
            found["methods"][name] = {"error": error.message}
            continue
        model = merged(base, experts, alphas)
        per_row[name] = torch.stack(
            [divergences(expert, model, rows) for expert, rows in zip(experts, fresh, strict=True)]
        )
        values = [value for entry in alphas.submodules for value in entry.alpha]
        found["methods"][name] = {
            "divergence": per_row[name].mean(1).tolist(),
            "left": (per_row[name].mean(1) / of_base.mean(1)).tolist(),
            "alpha": [min(values), max(values)],
        }
        if alphas.evaluation is not None:
            measured = alphas.evaluation
            found["methods"][name] |= {
                "merge": measured.points[measured.merge].name,
                "promised": [[task.divergence.mean, task.divergence.stderr] for task in measured.tasks],
            }
    for name, rows in per_row.items() if methods[0] in per_row else ():
        difference = rows - per_row[methods[0]]
        error = (difference.var(1) / difference.shape[1]).sum().sqrt() / len(difference)
        found["methods"][name]["difference"] = [float(difference.mean()), float(error)]
    return found


def describe(found: dict[str, Any], name: str, reference: str) -> str:
    """A cell: the mean divergence, and the difference to the reference with its standard error."""
    part = found["methods"][name]
    if "error" in part:
        return part["error"]
    mean = sum(part["divergence"]) / len(part["divergence"])
    if name == reference or "difference" not in part:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({part['difference'][0]:+.4f} ± {part['difference'][1]:.4f})"


def summary(results: Sequence[dict[str, Any]], name: str, reference: str) -> str:
    """In how many problems a method is better or worse than the reference, and which model its search ended at."""
    parts = [(found, found["methods"][name]) for found in results if "difference" in found["methods"][name]]
    mean = sum(part["difference"][0] for _, part in parts) / len(parts)
    above = [found["number"] for found, part in parts if part["difference"][0] > 2 * part["difference"][1]]
    below = sum(part["difference"][0] < -2 * part["difference"][1] for _, part in parts)
    ends = [part["merge"] for _, part in parts if "merge" in part]
    starts = sum(not end.startswith("step ") for end in ends)
    promised = [
        abs(value - truth) <= 2 * error
        for _, part in parts
        for (value, error), truth in zip(part.get("promised", ()), part["divergence"], strict=False)
    ]
    refused = len(results) - len(parts)
    which = f" {above}" if above else ""
    return (
        f"{name}: {len(parts)} problems, {refused} refused; mean difference to {reference} {mean:+.4f}; below it by "
        f"more than two standard errors in {below}, above it in {len(above)}{which}. The search ended "
        f"at a starting point in {starts} of {len(ends)} problems. The divergence in the file is within two of its "
        f"standard errors of that on the fresh rows in {sum(promised)} of {len(promised)} tasks."
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--methods", default="features,joint", help="the first is the reference of the differences")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("mergekit_slta").setLevel(logging.ERROR)
    methods, results = arguments.methods.split(","), []
    lines = ["| problem | kind | experts | rows | base | " + " | ".join(methods) + " |"]
    lines.append("| ---: | --- | ---: | ---: | ---: |" + " ---: |" * len(methods))
    print(*lines, sep="\n")
    for number in range(arguments.first, arguments.first + arguments.problems):
        found = run_problem(problem(number), arguments.work / f"problem-{number}", methods)
        results.append(found)
        base = sum(found["base"]) / len(found["base"])
        cells = [str(number), found["kind"], str(found["tasks"]), str(found["rows"]), f"{base:.3f}"]
        lines.append("| " + " | ".join([*cells, *(describe(found, name, methods[0]) for name in methods)]) + " |")
        print(lines[-1], flush=True)
    notes = [summary(results, name, methods[0]) for name in methods[1:]]
    print("", *notes, sep="\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        title = (
            "Mean divergence from the experts on 200 fresh rows of each task, in nats per row; in parentheses the "
            f"paired difference to `{methods[0]}` with its standard error over rows."
        )
        text = "\n\n".join([title, "\n".join(lines), *notes])
        (arguments.output / "results.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
