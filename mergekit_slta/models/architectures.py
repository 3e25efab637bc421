"""The few facts about model classes that their code does not show.

Scope: spellings of class names, and the layout of heads in matrices that hold queries, keys and values together.
Everything else is found by running the model's code (`anatomy.py`, `skeleton.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Packing = Literal["separate", "stacked", "grouped"]

PACKINGS: dict[str, Packing] = {
    "Phi3ForCausalLM": "stacked",
    "GPT2LMHeadModel": "stacked",
    "GPTNeoXForCausalLM": "grouped",
    "FalconForCausalLM": "grouped",
}
"""Class -> layout of the rows of a matrix for queries, keys and values: "stacked": [all q | all k | all v]; "grouped":
by key/value group, in each group [queries | key | value]. In other classes such a matrix is not divided by head."""
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_TOGETHER = ("qkv_proj", "c_attn", "query_key_value")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
_SPELLINGS = {"LLaMaForCausalLM": "LlamaForCausalLM"}
"""Class names as the first conversion scripts wrote them."""
TRANSPOSED = frozenset({"GPT2LMHeadModel"})
"""Classes of transformers whose linear layers store their weights as [in, out] (Conv1D)."""
BASE_MODEL_NAMES = ("model", "transformer")
"""Prefixes that parameter names lack in checkpoints saved without the output head (GPT-2 on the Hub)."""
OUTPUT_PROJECTION = "lm_head"
"""The output projection's name in transformers."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention block. Without grouped-query attention each head is its own group.

    Attributes:
        inputs: paths of the modules that project to queries, keys and values (in this order), or of the one for all.
        output: path of the output projection.
        packing: "separate" for three modules; else see `PACKINGS`.
        groups: number of key/value groups.
        queries: query heads per group.
        width: features per head.
        transposed: whether weights are stored as [in, out] (transformers' Conv1D).
    """

    inputs: tuple[str, ...]
    output: str
    packing: Packing
    groups: int
    queries: int
    width: int
    transposed: bool = False


def find_heads(
    path: str, class_name: str, num_heads: int, shapes: Mapping[str, Sequence[int]], *, transposed: bool = False
) -> Heads | None:
    """Find the heads of an attention block by the names and shapes of its projections.

    Args:
        path: path of the attention module.
        class_name: the model's class.
        num_heads: number of query heads.
        shapes: name -> shape of the model's tensors.
        transposed: see `Heads`.

    Returns:
        None if the block is not divided by head: it has other projections (a gate, low-rank keys), or their sizes do
        not fit.
    """

    def size(module: str, axis: int) -> int:
        shape = shapes.get(f"{path}.{module}.weight", ())
        return int(shape[1 - axis if transposed else axis]) if len(shape) == 2 else 0

    output = next((module for module in _OUTPUTS if size(module, 1)), "")
    together = next((module for module in _TOGETHER if size(module, 0)), "")
    if not output or not num_heads or size(output, 1) % num_heads:
        return None
    width = size(output, 1) // num_heads
    queries, keys, values = (size(module, 0) for module in _SEPARATE)
    if together and class_name in PACKINGS:
        inputs, packing = (f"{path}.{together}",), PACKINGS[class_name]
        queries, keys = num_heads * width, (size(together, 0) - num_heads * width) // 2
        fits = size(together, 0) == queries + 2 * keys
    else:
        inputs, packing = tuple(f"{path}.{module}" for module in _SEPARATE), "separate"
        fits = keys == values and queries == num_heads * width
    if not fits or keys <= 0 or keys % width or num_heads % (keys // width):
        return None
    groups = keys // width
    return Heads(inputs, f"{path}.{output}", packing, groups, num_heads // groups, width, transposed)


def class_name(class_names: Sequence[str] | None, own: str | None) -> str | None:
    """The class that a config means.

    Args:
        class_names: the config's `architectures`: usually one name, but there may be several or none.
        own: the class that transformers makes for the config's `model_type`, whatever `architectures` says.

    Returns:
        The one name, or `own` if there is none or it is one of several; else the first.
    """
    names = [_SPELLINGS.get(name, name) for name in class_names or ()]
    if len(names) == 1:
        return names[0]
    return own if not names or own in names else names[0]
