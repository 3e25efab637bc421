"""What the merge of `submodule_linear.yml` will cost, without its 39 GB: `python predict.py [CHECK OPTIONS ...]`.

Makes sparse checkpoints of the shapes of Llama-3.2-3B (a header, and no weights) and rows that are all cut at
`max_seq_length` tokens, under the names in the recipe, and runs `mergekit-slta check` on them: an upper bound, since
most real rows are shorter.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Formatter

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = Path(__file__).resolve().with_name("submodule_linear.yml")
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=3072, intermediate_size=8192,
    num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=131072, dtype="bfloat16",
)  # fmt: skip
"""As in meta-llama/Llama-3.2-3B, as far as sizes go."""


def write_sparse(folder: Path) -> None:
    """Write a bfloat16 checkpoint whose tensors take no room on disk, with a tokenizer."""
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(CONFIG).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    CONFIG.save_pretrained(folder)
    words = Tokenizer(WordLevel({"word": 0, "#": 1}, unk_token="#"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_rows(folder: Path, template: str, count: int, tokens: int) -> None:
    """Write rows that are longer than the cut."""
    folder.mkdir(parents=True)
    row = json.dumps({field: "word " * tokens for _, field, _, _ in Formatter().parse(template) if field})
    (folder / "train.jsonl").write_text(f"{row}\n" * count, encoding="utf-8")


def main() -> int:
    """Print what `check` says."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    settings = recipe["parameters"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in (recipe["base_model"], *(entry["model"] for entry in recipe["models"])):
            write_sparse(Path(temporary) / name)
        for entry in recipe["models"]:
            own = entry["parameters"]
            rows = Path(temporary) / own["dataset"]
            write_rows(rows, own["text"], settings["num_samples"], settings["max_seq_length"])
        command = [sys.executable, "-m", "mergekit_slta", "check", str(RECIPE), *sys.argv[1:]]
        return subprocess.run(command, cwd=temporary).returncode


if __name__ == "__main__":
    raise SystemExit(main())
