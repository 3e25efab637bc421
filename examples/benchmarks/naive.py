"""The script that one would write for a few Llamas that fit into memory; `submodule_linear` is compared with it.

All models in float32, forward hooks that catch what every attention and MLP block of the base is given, each expert's
block run on that, one row at a time; then the closed form (Eq. 12, 13, 33, 34 of arXiv 2504.10902). Shares no code with
the package.

    python naive.py BASE EXPERT1 DATA1.jsonl EXPERT2 DATA2.jsonl ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(path: str | Path) -> nn.Module:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def read_rows(path: str | Path, tokenizer: object, max_length: int = 512) -> list[Tensor]:
    """[1, tokens] ids of every row of a jsonl file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"] for text in texts]


class Watched:
    """What the base's blocks were given and returned when it last ran."""

    def __init__(self, base: nn.Module) -> None:
        self.before: dict[str, tuple[tuple, dict]] = {}
        self.after: dict[str, Tensor] = {}
        self._watch("embed", base.model.embed_tokens)
        for index, layer in enumerate(base.model.layers):
            self._watch(f"{index} layer", layer)
            self._watch(f"{index} attention", layer.self_attn)
            self._watch(f"{index} norm", layer.post_attention_layernorm)
            self._watch(f"{index} mlp", layer.mlp)
        self._watch("norm", base.model.norm)
        self._watch("head", base.lm_head)

    def _watch(self, name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.before[name] = (args, kwargs)
            self.after[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook, with_kwargs=True)

    def given(self, name: str) -> Tensor:
        """The features that a module was given."""
        args, kwargs = self.before[name]
        return args[0] if args else kwargs["hidden_states"]


def gram(outputs: Sequence[Tensor], origin: Tensor) -> Tensor:
    """[T, T] float64 of the experts' outputs less the base's."""
    deltas = torch.stack([(output - origin).flatten() for output in outputs]).double()
    return deltas @ deltas.T


@torch.inference_mode()
def row_grams(base: nn.Module, experts: Sequence[nn.Module], watched: Watched, ids: Tensor) -> dict[str, Tensor]:
    """block -> [T, T] of one row."""
    base(input_ids=ids, use_cache=False)
    grams = {"embed": gram([expert.model.embed_tokens(ids) for expert in experts], watched.after["embed"])}
    for index in range(len(base.model.layers)):
        layers = [expert.model.layers[index] for expert in experts]
        hidden = watched.given(f"{index} layer")
        rest = {key: value for key, value in watched.before[f"{index} attention"][1].items() if key != "hidden_states"}
        outputs = [layer.self_attn(layer.input_layernorm(hidden), **rest)[0] for layer in layers]
        grams[f"model.layers.{index}.self_attn"] = gram(outputs, watched.after[f"{index} attention"])
        hidden = watched.given(f"{index} norm")
        outputs = [layer.mlp(layer.post_attention_layernorm(hidden)) for layer in layers]
        grams[f"model.layers.{index}.mlp"] = gram(outputs, watched.after[f"{index} mlp"])
    hidden = watched.given("norm")
    logits = [expert.lm_head(expert.model.norm(hidden)) for expert in experts]
    grams["head"] = gram(logits, watched.after["head"])
    return grams


def solve(objectives: Sequence[Sequence[Sequence[Tensor]]]) -> list[float]:
    """T weights; objectives[o][a] are the matrices of task a's rows. Every row counts alike."""
    num_models = len(objectives[0])
    a = torch.zeros(num_models, num_models, dtype=torch.float64)
    b = torch.zeros(num_models, dtype=torch.float64)
    for tasks in objectives:
        for task, rows in enumerate(tasks):
            mean = torch.stack([row * num_models / row.trace() for row in rows]).mean(0)
            a += mean
            b += mean[:, task]
    return torch.linalg.solve(a, b).tolist()


def gather(
    base: nn.Module, experts: Sequence[nn.Module], tasks: Sequence[Sequence[Tensor]]
) -> dict[str, list[list[Tensor]]]:
    """block -> task -> the matrices of its rows; tasks[a] are the ids of task a's rows."""
    watched = Watched(base)
    grams: dict[str, list[list[Tensor]]] = {}
    for task, rows in enumerate(tasks):
        for ids in rows:
            for name, matrix in row_grams(base, experts, watched, ids).items():
                grams.setdefault(name, [[] for _ in tasks])[task].append(matrix)
    return grams


def solve_all(grams: dict[str, list[list[Tensor]]], *, tied: bool) -> dict[str, list[float]]:
    """block -> T weights. A table that serves both ends of the model is solved for both."""
    alphas = {name: solve([tasks]) for name, tasks in grams.items()}
    if tied:
        alphas["embed"] = solve([grams["embed"], grams["head"]])
    return alphas


def main() -> None:
    """Print the weights of every block as JSON."""
    base_path, *pairs = sys.argv[1:]
    base, experts = load(base_path), [load(path) for path in pairs[::2]]
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    grams = gather(base, experts, [read_rows(path, tokenizer) for path in pairs[1::2]])
    print(json.dumps(solve_all(grams, tied=base.config.tie_word_embeddings), indent=1))


if __name__ == "__main__":
    main()
