"""Fine-tune two experts of SmolLM2 twice: all weights, and only the linear layers of attention.

Runs on a CPU and without network access. Finished steps are skipped when the script is run again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from ways import (
    ATTENTION_WEIGHT,
    LEARNING_RATES_NAME,
    TRAINING_NAME,
    WAYS,
    align,
    evaluate,
    expert_name,
    read_json,
    smollm2_prepare,
    write_json,
)

# isort: split
from common import (  # of the SmolLM2 example; importing `ways` makes it reachable
    TASKS,
    EncodedRow,
    Message,
    completed_directory,
    encode_row,
    held_out_loss,
    load_model,
    load_tokenizer,
    make_batches,
    read_rows,
    save_checkpoint,
    set_threads,
    write_rows,
)

SEED = 20250
BATCH_TOKENS = 400
SEARCH_TASK = "translate"

RECIPE = """\
merge_method: submodule_linear
base_model: ./base
models:
  - model: ./{way}_math
    parameters: {{dataset: data/math.jsonl}}
  - model: ./{way}_translate
    parameters: {{dataset: data/translate.jsonl}}
parameters: {{granularity: attn_mlp, num_samples: 30}}
out_dtype: bfloat16
"""


@dataclass(frozen=True)
class Budget:
    """Steps per expert, and what the choice of the learning rate may spend."""

    steps: int = 60
    search_steps: int = 15
    validation_rows: int = 40
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


QUICK = Budget(steps=4, search_steps=2, validation_rows=4, learning_rates=(3e-4, 1e-3))


class Progress(TrainerCallback):
    """Report the training loss in one line."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Called by the trainer every ``logging_steps`` steps, and once at the end without a loss."""
        if logs and "loss" in logs:
            self.log(f"  step {state.global_step:3d}/{state.max_steps}  loss {float(logs['loss']):.3f}")


def collate(batches: list[list[EncodedRow]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad one ready-made batch; labels are -100 (no loss) everywhere but on the completions."""
    (batch,) = batches
    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(batch):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention[index, : len(row.ids)] = 1
        labels[index, row.prompt_length : len(row.ids)] = torch.tensor(row.ids[row.prompt_length :])
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def choose_parameters(model: PreTrainedModel, way: str) -> int:
    """Freeze what ``way`` does not train; return the number of trained parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(way == "all" or ATTENTION_WEIGHT.search(name) is not None)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        raise click.ClickException(
            "the base has no weights called q_proj, k_proj, v_proj or o_proj: use a Llama-like one"
        )
    return trained


def fine_tune(
    base: Path, way: str, rows: list[list[Message]], *, steps: int, learning_rate: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """Fine-tune the base on conversations with the ``Trainer`` of transformers; return it with its trained size.

    Batches hold up to 400 tokens of rows of similar length and come in an order that depends on the seed alone, so
    both ways see the same ones.
    """
    model, tokenizer = load_model(base), load_tokenizer(base)
    trained = choose_parameters(model, way)
    batches = make_batches([encode_row(tokenizer, messages) for messages in rows], BATCH_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=1,  # an item of the data set is a whole batch already
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="linear",
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=SEED,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=min(10, steps),
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=partial(collate, pad_id=tokenizer.pad_token_id),
            callbacks=[Progress(click.echo)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model, tokenizer, trained


def choose_learning_rate(workdir: Path, way: str, budget: Budget) -> float:
    """Try learning rates from small to large until the validation loss rises, and return the best.

    Validation rows are the last rows of the training file of one task. They are left out of the training here (the
    experts are then trained with them), and the held-out test rows play no part.
    """
    path = workdir / LEARNING_RATES_NAME
    chosen = read_json(path)
    setting = {
        "task": SEARCH_TASK,
        "steps": budget.search_steps,
        "validation_rows": budget.validation_rows,
        "candidates": list(budget.learning_rates),
    }
    found = chosen.get(way, {})
    if found and {key: found[key] for key in setting} == setting:
        click.echo(f"learning rate, {WAYS[way]}: already chosen, {found['chosen']:g}")
        return found["chosen"]
    rows = read_rows(workdir / "data" / f"{SEARCH_TASK}.jsonl")
    losses: dict[float, float] = {}
    for rate in budget.learning_rates:
        click.echo(f"learning rate, {WAYS[way]}: trying {rate:g}")
        model, tokenizer, _ = fine_tune(
            workdir / "base",
            way,
            rows[: -budget.validation_rows],
            steps=budget.search_steps,
            learning_rate=rate,
        )
        with tempfile.TemporaryDirectory() as scratch:
            validation = Path(scratch) / "validation.jsonl"
            write_rows(validation, rows[-budget.validation_rows :])
            losses[rate] = held_out_loss(model, tokenizer, validation)
        click.echo(f"  validation loss {losses[rate]:.3f}")
        if losses[rate] > min(losses.values()):
            break
    best = min(losses, key=losses.__getitem__)
    tried = {f"{rate:g}": loss for rate, loss in losses.items()}
    chosen[way] = {**setting, "validation_loss": tried, "chosen": best}
    write_json(path, chosen)
    click.echo(f"learning rate, {WAYS[way]}: {best:g}")
    return best


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, as stored."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_only_attention_changed(base: Path, expert: Path, name: str) -> None:
    """Fail unless the expert is the base to the bit in everything but the linear layers of attention."""
    before, after = load_weights(base), load_weights(expert)
    if before.keys() != after.keys():
        raise click.ClickException(f"{name} and the base do not have the same tensors: was the base replaced?")
    changed = {
        key
        for key, tensor in before.items()
        if tensor.dtype != after[key].dtype or not torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))
    }
    wrong = sorted(key for key in changed if not ATTENTION_WEIGHT.search(key))
    if wrong:
        raise click.ClickException(
            f"{name} differs from the base in {wrong[0]} ({len(wrong)} such), where only q/k/v/o_proj.weight may: "
            "if base was replaced during the training, run again"
        )
    if not changed:
        raise click.ClickException(f"{name} is the base, nothing was learned: raise the learning rate or --steps")
    click.echo(
        f"  {len(changed)} linear layers of attention changed, {len(before) - len(changed)} tensors as in the base"
    )


def make_expert(workdir: Path, way: str, task: str, steps: int, learning_rate: float) -> None:
    """Fine-tune the base on one task in one way and write the expert."""
    name = expert_name(way, task)
    setting = {"way": way, "task": task, "steps": steps, "learning_rate": learning_rate, "seed": SEED}
    setting["batch_tokens"] = BATCH_TOKENS
    if (workdir / name).exists():
        found = read_json(workdir / name / TRAINING_NAME)
        other = next((key for key, value in setting.items() if found.get(key) != value), None)
        if other:
            remedy = f"delete {name}, or use another WORKDIR"
            raise click.ClickException(
                f"{name} was made with {other} {found.get(other)}, not {setting[other]}: {remedy}"
            )
        click.echo(f"{name}: already there, skipped")
        return
    click.echo(f"{name}: working")
    started = time.monotonic()
    rows = read_rows(workdir / "data" / f"{task}.jsonl")
    model, tokenizer, trained = fine_tune(workdir / "base", way, rows, steps=steps, learning_rate=learning_rate)
    with completed_directory(workdir / name) as path:
        save_checkpoint(model, tokenizer, path)
        if way == "attention":
            check_only_attention_changed(workdir / "base", path, name)
        seconds = round(time.monotonic() - started)
        write_json(path / TRAINING_NAME, {**setting, "trained_parameters": trained, "seconds": seconds})
    click.echo(f"{name}: {trained / 1e6:.1f} million parameters trained in {seconds} s")


def copy_base(source: Path, workdir: Path) -> None:
    """Copy a checkpoint into the work directory."""
    with completed_directory(workdir / "base") as path:
        shutil.copytree(source, path, dirs_exist_ok=True)


def make_inputs(workdir: Path, base: Path | None) -> None:
    """Write base and data where they are absent."""
    jobs = {
        "base": lambda: copy_base(base, workdir) if base else smollm2_prepare().make_base(workdir),
        "data": lambda: smollm2_prepare().make_data(workdir),
    }
    for name, job in jobs.items():
        if (workdir / name).exists():
            click.echo(f"{name}: already there, skipped")
            continue
        click.echo(f"{name}: working")
        job()


@click.command()
@click.argument("workdir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Checkpoint to copy where WORKDIR has no base yet  [default: made as in the SmolLM2 example]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps per expert  [default: 60]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for torch  [default: torch's choice]")
@click.option("--quick", is_flag=True, help="A few training steps only: shows the steps, not the quality")
def main(workdir: Path, base: Path | None, steps: int | None, threads: int | None, quick: bool) -> None:
    """Write base, data, four experts and two recipes into WORKDIR."""
    set_threads(threads)
    budget = QUICK if quick else Budget()
    workdir.mkdir(parents=True, exist_ok=True)
    make_inputs(workdir, base)
    for way in WAYS:
        rate = choose_learning_rate(workdir, way, budget)
        for task in TASKS:
            make_expert(workdir, way, task, steps or budget.steps, rate)
        (workdir / f"recipe_{way}.yml").write_text(RECIPE.format(way=way), encoding="utf-8")
    names = ["base", *(expert_name(way, task) for way in WAYS for task in TASKS)]
    losses = evaluate(workdir, names, click.echo)
    table = [["model", *TASKS]] + [[name, *(f"{losses[name][task]:.3f}" for task in TASKS)] for name in names]
    click.echo(f"\nHeld-out completion loss:\n{align(table)}")
    click.echo(f"\nNext: python {Path(__file__).with_name('compare.py')} {workdir}")


if __name__ == "__main__":
    main()
