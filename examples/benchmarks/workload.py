"""Models and rows to measure with, made from nothing: Llama shapes with random weights, and synthetic text.

Scope: shapes, checkpoints, tokenizer, data files, recipes. Checkpoints are written shard by shard, so that making a
model takes the memory of one shard. torch and transformers are imported where they are needed: the command that asks
for the work must not hold them.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEP = 0.05
"""An expert's distance from the base, in standard deviations of each tensor."""
BLOCK = 2**26 - 5
"""Numbers of a `RandomBlock`. A prime, so that no two rows of a matrix that is larger are equal."""

MakeTensor = Callable[[str, tuple[int, ...], int], Any]
"""(name, shape, number of the model) -> the tensor; the number 0 is the base."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; `name` is also the folder of its checkpoints."""

    name: str
    title: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    shard_bytes: int = 400_000_000

    @property
    def kv_width(self) -> int:
        """Features of all keys of a token."""
        return self.hidden // self.heads * self.kv_heads

    def matrices(self) -> list[tuple[int, int, int]]:
        """(count, inputs, outputs) of all matrices that a token is multiplied with: each layer's, and the output
        projection last."""
        return [
            (2 * self.layers, self.hidden, self.hidden),
            (2 * self.layers, self.hidden, self.kv_width),
            (2 * self.layers, self.hidden, self.intermediate),
            (self.layers, self.intermediate, self.hidden),
            (1, self.hidden, self.vocab),
        ]

    def multiplied(self) -> int:
        """Parameters that a token is multiplied with; the embedding is looked up."""
        return sum(count * inputs * outputs for count, inputs, outputs in self.matrices())

    def model_bytes(self) -> int:
        """Bytes of a bfloat16 checkpoint."""
        return 2 * sum(math.prod(size) for size in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the checkpoint, in the order of a forward pass."""
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            named |= {
                f"{prefix}input_layernorm.weight": (self.hidden,),
                f"{prefix}self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}self_attn.k_proj.weight": (self.kv_width, self.hidden),
                f"{prefix}self_attn.v_proj.weight": (self.kv_width, self.hidden),
                f"{prefix}self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        named["model.norm.weight"] = (self.hidden,)
        return named if self.tied else {**named, "lm_head.weight": (self.vocab, self.hidden)}


SMALL = Shape("small", "SmolLM2-135M shape", 49152, 576, 1536, 30, 9, 3, tied=True, shard_bytes=100_000_000)
LARGE = Shape("large", "TinyLlama-1.1B shape", 32000, 2048, 5632, 22, 32, 4, tied=False)
QUICK_SMALL = Shape("quick-small", "tiny shape, tied", 512, 32, 48, 2, 4, 2, tied=True, shard_bytes=40_000)
QUICK_LARGE = Shape("quick-large", "tiny shape, untied", 512, 48, 96, 2, 4, 2, tied=False, shard_bytes=40_000)


def growing(layers: int, *, quick: bool) -> Shape:
    """The shape whose sizes are varied one by one."""
    if quick:
        return Shape(f"quick-growth-{layers}", "tiny shape", 512, 32, 48, layers, 4, 2, tied=False, shard_bytes=40_000)
    return Shape(
        f"growth-{layers}", "hidden size 384", 4096, 384, 1024, layers, 6, 2, tied=False, shard_bytes=20_000_000
    )


@dataclass(frozen=True)
class Workload:
    """Checkpoints of a shape, and data.

    Attributes:
        shape: of all models.
        base, experts: the checkpoints' folders.
        data: a jsonl file for each expert, with a `text` column.
    """

    shape: Shape
    base: Path
    experts: tuple[Path, ...]
    data: tuple[Path, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders of all models, the base first."""
        return (self.base, *self.experts)

    def recipe(self, num_experts: int | None = None, **parameters: Any) -> dict[str, Any]:
        """A `submodule_linear` recipe over absolute paths, as a mapping."""
        pairs = list(zip(self.experts, self.data, strict=True))[:num_experts]
        return {
            "merge_method": "submodule_linear",
            "base_model": str(self.base),
            "models": [{"model": str(model), "parameters": {"dataset": str(data)}} for model, data in pairs],
            "parameters": {"granularity": "attn_mlp", **parameters},
        }


def instruction_lengths(count: int, seed: int) -> list[int]:
    """Tokens per row, many short and few long ones: log-normal around 120, between 40 and 300."""
    rng = random.Random(seed)
    return [round(min(300.0, max(40.0, math.exp(rng.gauss(math.log(120), 0.55))))) for _ in range(count)]


def place(folder: Path, shape: Shape, num_experts: int, data: str) -> Workload:
    """Where a workload is, or will be; `data` names the data files' folder."""
    models = folder.absolute() / "models" / shape.name
    return Workload(
        shape,
        models / "base",
        tuple(models / f"expert{number}" for number in range(1, num_experts + 1)),
        tuple(models / data / f"task{number}.jsonl" for number in range(1, num_experts + 1)),
    )


def make(
    workload: Workload,
    lengths: Sequence[Sequence[int]],
    tensor: MakeTensor | None = None,
    threads: int = 1,
    *,
    sparse: bool = False,
) -> None:
    """Make what is not there yet of a workload.

    Args:
        workload: see `place`.
        lengths: for each expert's data the tokens of every row.
        tensor: makes the weights; by default every tensor has random numbers of its own.
        threads: checkpoints that are written at a time; each takes the memory of a shard.
        sparse: write files without weights, for `check` alone.
    """
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("aeiounrstldm", k=rng.randint(2, 9))) for _ in range(400)]
    tokenizer = make_tokenizer(vocabulary, min(workload.shape.vocab, 1200))

    def write(number: int) -> None:
        path = workload.paths[number]
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_checkpoint(partial, workload.shape, number, None if sparse else tensor or _tensor)
            tokenizer.save_pretrained(partial)
            os.replace(partial, path)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(len(workload.paths))))
    for task, (path, own) in enumerate(zip(workload.data, lengths, strict=True)):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(_rows(own, vocabulary, tokenizer, seed=task)), encoding="utf-8")
            os.replace(partial, path)


def write_checkpoint(folder: Path, shape: Shape, number: int, tensor: MakeTensor | None) -> None:
    """A bfloat16 checkpoint in shards: number 0 is the base, any other an expert a small random step away from it.

    Without `tensor` the files are sparse: of the right size, with headers, and take no room.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shape.tensors().items():
        nbytes = 2 * math.prod(size)
        if shards[-1] and filled + nbytes > shape.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += nbytes
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        if tensor is None:
            _write_sparse(folder / file, shard)
        else:
            save_file(
                {name: tensor(name, size, number).to(torch.bfloat16).cpu() for name, size in shard.items()},
                folder / file,
                metadata={"format": "pt"},
            )
        places |= dict.fromkeys(shard, file)
    index_file = {"metadata": {"total_size": shape.model_bytes()}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1), encoding="utf-8")
    LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip


def _write_sparse(path: Path, shard: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose tensors are holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, size in shard.items():
        start, stop = stop, stop + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)


def _tensor(name: str, size: tuple[int, ...], number: int) -> Any:
    """Matrices that keep a feature's size, norms near 1; an expert's differ by `STEP` of that."""
    import torch

    width = 1 / math.sqrt(size[-1]) if len(size) > 1 else 0.1

    def noise(model: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(random.Random(f"{name} {model}").getrandbits(60))
        return torch.randn(size, generator=generator).mul_(width)

    tensor = noise(0).add_(1.0 if len(size) == 1 else 0.0)
    return tensor.add_(noise(number), alpha=STEP) if number else tensor


class RandomBlock:
    """Weights like those of `_tensor`, as quickly as memory is copied: every tensor is cut out of one block of random
    bfloat16 numbers, at a place of its own.

    Args:
        device: where they are made.
    """

    def __init__(self, device: str) -> None:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        self._numbers = torch.randn(BLOCK, generator=generator, device=device, dtype=torch.bfloat16)

    def __call__(self, name: str, size: tuple[int, ...], number: int) -> Any:
        width = 1 / math.sqrt(size[-1]) if len(size) > 1 else 0.1
        tensor = self._cut(name, size).mul_(width).add_(1.0 if len(size) == 1 else 0.0)
        return tensor.add_(self._cut(f"{name} {number}", size), alpha=STEP * width) if number else tensor

    def _cut(self, key: str, size: tuple[int, ...]) -> Any:
        """Numbers from a place that depends on `key`; after the block's end comes its start."""
        tensor = self._numbers.new_empty(size)
        flat, filled, start = tensor.view(-1), 0, random.Random(key).randrange(BLOCK)
        while filled < len(flat):
            part = self._numbers[start : start + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
        return tensor


def make_tokenizer(vocabulary: Sequence[str], size: int) -> Any:
    """A byte-level BPE that puts <s> before every text, as Llama's does; its ids are below `size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(vocabulary)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _rows(lengths: Sequence[int], vocabulary: Sequence[str], tokenizer: Any, seed: int) -> Iterator[str]:
    """Lines of a jsonl file: words until a row has its tokens (a word may add some too many)."""
    rng = random.Random(seed)
    tokens = {word: len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) for word in vocabulary}
    for length in lengths:
        words: list[str] = []
        count = 1
        while count < length:
            words.append(rng.choice(vocabulary))
            count += tokens[words[-1]]
        yield json.dumps({"text": " " + " ".join(words)}) + "\n"


def warm(workload: Workload) -> None:
    """Read every shard once, so that the first job to be measured does not wait for the disk alone."""
    for path in workload.paths:
        for shard in sorted(path.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def as_mapping(workload: Workload) -> dict[str, Any]:
    """For a job's arguments."""
    return {
        "shape": asdict(workload.shape), "base": str(workload.base),
        "experts": [str(path) for path in workload.experts], "data": [str(path) for path in workload.data],
    }  # fmt: skip


def from_mapping(content: dict[str, Any]) -> Workload:
    """What `as_mapping` has made a mapping of."""
    experts, data = (tuple(map(Path, content[key])) for key in ("experts", "data"))
    return Workload(Shape(**content["shape"]), Path(content["base"]), experts, data)
