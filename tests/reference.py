"""An independent reference: all models in memory, forward hooks, Eq. 10-14 and 33-34 written out with numpy.

Shares no code with the package. One row at a time, no batching, no padding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def row_deltas(base: torch.nn.Module, experts: list[torch.nn.Module], ids: list[int], granularity: str) -> dict:
    """submodule name -> [T, tokens * d] float64: df_t at the inputs that the submodule gets inside the base."""
    seen: dict[str, tuple] = {}
    handles = []

    def keep(name: str):
        def hook(module, args, kwargs):
            seen[name] = (args, dict(kwargs))

        return hook

    for index, layer in enumerate(base.model.layers):
        handles.append(layer.register_forward_pre_hook(keep(f"layer{index}"), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_pre_hook(keep(f"attn{index}"), with_kwargs=True))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(keep(f"mlp{index}"), with_kwargs=True))
    handles.append(base.model.norm.register_forward_pre_hook(keep("head"), with_kwargs=True))
    base(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()

    outputs: dict[str, list[torch.Tensor]] = {}

    def add(name: str, value: torch.Tensor) -> None:
        outputs.setdefault(name, []).append(value)

    for model in [base, *experts]:
        add("embed", model.model.embed_tokens(torch.tensor([ids])))
        for index, layer in enumerate(model.model.layers):
            args, kwargs = seen[f"layer{index}"]
            path = f"model.layers.{index}"
            if granularity == "layer":
                add(path, layer(*args, **kwargs))
                continue
            attention_kwargs = {k: v for k, v in seen[f"attn{index}"][1].items() if k != "hidden_states"}
            add(f"{path}.self_attn", layer.self_attn(layer.input_layernorm(args[0]), **attention_kwargs)[0])
            add(f"{path}.mlp", layer.mlp(layer.post_attention_layernorm(seen[f"mlp{index}"][0][0])))
        add("head", model.lm_head(model.model.norm(seen["head"][0][0])))
    return {
        name: np.stack([(value - values[0]).double().numpy().reshape(-1) for value in values[1:]])
        for name, values in outputs.items()
    }


def reference_alphas(
    base_path: Path,
    expert_paths: list[Path],
    rows: list[list[list[int]]],
    granularity: str,
    balance: bool,
    tied: bool,
    importance: list[float] | None = None,
) -> dict[str, np.ndarray]:
    """submodule name -> alpha [T]; `rows[a]` are the token ids of task a's rows."""
    base, experts = load(base_path), [load(path) for path in expert_paths]
    count = len(experts)
    importance = importance or [1.0] * count
    systems: dict[str, list] = {}
    for task in range(count):
        for ids in rows[task]:
            for name, delta in row_deltas(base, experts, ids, granularity).items():
                a, b = systems.setdefault(name, [np.zeros((count, count)), np.zeros(count)])
                norm = np.mean([delta[t] @ delta[t] for t in range(count)]) if balance else 1.0  # Eq. 33
                for j in range(count):
                    for k in range(count):
                        term = importance[task] * (delta[j] @ delta[k]) / norm / len(rows[task])  # Eq. 14, 34
                        a[j, k] += term
                        if k == task:
                            b[j] += term  # Eq. 13
    if tied:
        systems["embed"] = [x + y for x, y in zip(systems["embed"], systems["head"], strict=True)]
    return {name: np.linalg.solve(a, b) for name, (a, b) in systems.items()}  # Eq. 12
