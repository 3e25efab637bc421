"""Calibration rows that experts write themselves beside real ones: `python self_written.py WORK`.

WORK is a folder of `run.py`. Every draw and way has as many rows of each task; they lie in WORK/self_written, and the
same command goes on where it was stopped. `self` and `hint` are written by `mergekit-slta rows`; the others, which are
no option of the package, are chosen here from what experts or base have written:

real        rows of the task's training data
self        written by the expert
hint        written by the expert, whose `hint` names the kind of task
undirected  as self, but any rows that can be used in place of those that differ most from the base
unfiltered  as self, but the first rows that were written, whatever they are
base        written by the base, for every task
random      random tokens, as question and as answer
on_policy   the questions of self, answered by the merge that self gives
none        no rows: `objective: data_free`
"""

from __future__ import annotations

import dataclasses
import functools
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from intervals import Draws, compare, publish
from methods import ALL, recipe
from scoring import drawn_rows
from shared import load_model, load_tokenizer, read_json, read_rows, write_json, write_rows
from versions import ALPHAS, merged, references, scores_of

from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.generation.choices import ANSWER_TEMPERATURE, BATCH_ROWS, MIN_ROOM, OVERSAMPLING
from mergekit_slta.generation.prompts import make_prompt
from mergekit_slta.generation.sampling import write_batch
from mergekit_slta.generation.selection import Candidate, Selection, usable

HINTS = {
    "math": "Solve the arithmetic word problem.",
    "code": "Write the body of a Python function.",
    "translate": "Translate to German.",
    "extract": "Extract the details as JSON.",
    "answer": "Answer a question about a paragraph of documentation.",
}
MAX_LENGTH = 256
"""Tokens of a row that is written; real rows are shorter."""
KEYS = {"features": {"num_samples": 30}, "joint": {"num_samples": 10}}
COUNTS = {"features": 30, "joint": 75}
"""Rows of each task in all; under `joint` ten for each of six steps, and those that are held out of them."""
Rows = list[list[dict[str, str]]]
"""Conversations."""
WAYS = ("real", "self", "hint", "undirected", "unfiltered", "base", "random", "on_policy", "none")


@dataclasses.dataclass(frozen=True)
class Study:
    """Where, and of which objective."""

    workdir: Path
    objective: str
    command: tuple[str, ...]

    @property
    def count(self) -> int:
        """Rows of each task."""
        return COUNTS[self.objective]

    def folder(self, seed: int, way: str) -> Path:
        """Where a draw of a way is kept."""
        return self.workdir / "self_written" / self.objective / way / str(seed)

    def run(self, *arguments: str | Path) -> None:
        """Run `mergekit-slta`.

        Raises:
            click.ClickException: it fails.
        """
        words = [*self.command, "-m", "mergekit_slta", *map(str, arguments)]
        if code := subprocess.run(words, cwd=self.workdir).returncode:
            raise click.ClickException(f"{shlex.join(words)} ended with {code}")


def recipe_of(study: Study, seed: int, **of_task: Callable[[str], str | None]) -> dict[str, Any]:
    """A recipe with keys of every task."""
    shared = {"objective": study.objective, "seed": seed, "max_seq_length": MAX_LENGTH, **KEYS[study.objective]}
    content = recipe("submodule_linear", ALL, **shared)
    for entry in content["models"]:
        entry["parameters"] = {key: value for key, of in of_task.items() if (value := of(entry["model"])) is not None}
    content["out_dtype"] = content.pop("dtype")
    return content


def write_recipe(folder: Path, content: dict[str, Any]) -> Path:
    """A recipe's file."""
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def by_command(study: Study, seed: int, folder: Path, *, with_hint: bool) -> None:
    """Rows of `mergekit-slta rows`."""
    content = recipe_of(study, seed, dataset=lambda _: "self", hint=lambda task: HINTS[task] if with_hint else None)
    written = folder / "written"
    study.run("rows", write_recipe(folder, content), "-o", written)
    for task in ALL:
        shutil.copyfile(written / f"{task}.jsonl", folder / f"{task}.jsonl")


def candidates(study: Study, seed: int, model_name: str, of: str) -> list[Candidate]:
    """What a model has written for a task."""
    path = study.workdir / "self_written" / "candidates" / f"{study.objective}-{seed}-{model_name}-{of}.json"
    if not path.exists():
        click.echo(f"{model_name} writes rows of {of}")
        model, tokenizer = load_model(study.workdir / model_name).eval(), load_tokenizer(study.workdir / "base")
        prompt = make_prompt(ChatTemplate.of(tokenizer), None, model_name, MAX_LENGTH)

        def forward(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
            found = model(input_ids=ids, past_key_values=cache, use_cache=True)
            return found.logits, found.past_key_values

        numbers = range(OVERSAMPLING * study.count)
        rows = []
        with torch.inference_mode():
            for start in range(0, len(numbers), BATCH_ROWS):
                batch, key = numbers[start : start + BATCH_ROWS], f"{seed} {of}"
                rows += write_batch(forward, prompt, batch, key, MAX_LENGTH, tokenizer, torch.device("cpu"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [dataclasses.asdict(row) for row in rows])
    return [Candidate(**{**row, "ids": tuple(row["ids"])}) for row in read_json(path)]


def as_messages(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@functools.cache
def merge_of(workdir: Path, folder: Path) -> torch.nn.Module:
    """The merge of a folder's weights."""
    return merged(workdir, read_json(folder / ALPHAS))


@torch.inference_mode()
def answered(study: Study, seed: int, task: str) -> Rows:
    """The questions that an expert has written, answered by the merge of `self`, sampled as the expert samples."""
    folder = calibrate(study, seed, "self")
    model, tokenizer = merge_of(study.workdir, folder), load_tokenizer(study.workdir / "base")
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    rows: Rows = []
    asked = [messages[:-1] for messages in read_rows(folder / f"{task}.jsonl")]
    for start in range(0, len(asked), BATCH_ROWS):
        batch = asked[start : start + BATCH_ROWS]
        prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in batch]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        room = MAX_LENGTH - inputs["input_ids"].shape[1]
        written = model.generate(
            **inputs, max_new_tokens=max(MIN_ROOM, room), do_sample=True, temperature=ANSWER_TEMPERATURE, top_k=0
        )
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [[*each, {"role": "assistant", "content": text.strip() or "-"}]
                 for each, text in zip(batch, texts, strict=True)]  # fmt: skip
    return rows


def make_rows(study: Study, seed: int, way: str, task: str) -> Rows:
    """The conversations of a task, of a way that is no command.

    Raises:
        click.ClickException: too few of the rows that were written can be used.
    """
    if way == "real":
        return drawn_rows(study.workdir, task, seed, study.count)
    if way == "on_policy":
        return answered(study, seed, task)
    rng = random.Random(f"{seed} {task} {way}")
    if way == "random":
        tokenizer = load_tokenizer(study.workdir / "base")
        texts = [tokenizer.decode([rng.randrange(len(tokenizer)) for _ in range(40)], skip_special_tokens=True)
                 for _ in range(2 * study.count)]  # fmt: skip
        return [as_messages(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    written = candidates(study, seed, "base" if way == "base" else task, task)
    found: Selection = usable(written, study.count)
    able = [written[index] for index in found.kept]
    if len(able) < study.count:
        raise click.ClickException(f"{way}: {len(able)} of {len(written)} rows of {task} can be used: {found.dropped}")
    chosen = written[: study.count] if way == "unfiltered" else rng.sample(able, study.count)
    return [as_messages(row.prompt.strip() or "-", row.answer.strip() or "-") for row in chosen]


def calibrate(study: Study, seed: int, way: str) -> Path:
    """Rows and weights of a draw, unless they are there; returns their folder."""
    folder = study.folder(seed, way)
    if (folder / ALPHAS).exists():
        return folder
    click.echo(f"{study.objective}, {way}, {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    if way == "none":
        content = recipe("submodule_linear", ALL, objective="data_free")
        content["out_dtype"] = content.pop("dtype")
    else:
        if way in ("self", "hint"):
            by_command(study, seed, folder, with_hint=way == "hint")
        else:
            for task in ALL:
                rows = make_rows(study, seed, way, task)
                write_rows(folder / f"{task}.jsonl", rows)
        content = recipe_of(study, seed, dataset=lambda task: str(folder / f"{task}.jsonl"))
    study.run("calibrate", write_recipe(folder, content), "-o", folder / ALPHAS)
    return folder


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--objective", type=click.Choice(list(KEYS)), default="features", show_default=True)
@click.option("--seeds", default="42,43,44", show_default=True, help="Of the draws.")
@click.option("--ways", default=",".join(WAYS), show_default=True, help="Rows to calibrate with, in this order.")
@click.option("--python", default="python", show_default=True, help="Command line of Python with the package.")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Of the scores' matrix products.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Markdown file; beside it JSON.")
def main(
    workdir: Path, objective: str, seeds: str, ways: str, python: str, precision: str, output: Path | None
) -> None:
    """Compare calibration rows on the experts of WORK."""
    study = Study(workdir, objective, tuple(shlex.split(python)))
    found: dict[str, Draws] = {}
    for seed in map(int, seeds.split(",")):
        for way in ways.split(","):
            if way == "none" and way in found:
                continue
            scores = scores_of(workdir, calibrate(study, seed, way), ALL, precision)
            found.setdefault(way, {})[None if way == "none" else seed] = scores
    base, experts = references(workdir, workdir / "versions" / "five", ALL, precision)
    text, data = compare(base, experts, found, "real")
    text = f"`objective: {objective}`, {study.count} rows of each task in all.\n\n{text}"
    publish(text, data, output)


if __name__ == "__main__":
    main()
