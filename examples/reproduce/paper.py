"""The numbers of the paper that the tables stand beside: Dai et al., ICLR 2025 (arXiv 2504.10902).

Accuracies in %, averaged over the tasks of a set as the paper averages them. A pair (mean, standard deviation) is over
three seeds. The paper's standard deviations divide by n: on HumanEval's 164 problems its 23.37 ± 0.57 (Table 4) can
only be 37, 39, 39 right, whose deviation is 0.57 over n and 0.70 over n - 1.
"""

from __future__ import annotations

Mean = tuple[float, float]
SETS = ("math+code", "math+translate", "code+translate", "math+code+translate")
"""The sets of Tables 1, 2, 3 and 9, in their order."""


def _row(*means: float | Mean) -> dict[str, Mean]:
    return {name: value if isinstance(value, tuple) else (value, 0.0) for name, value in zip(SETS, means, strict=True)}


MAIN: dict[str, dict[str, dict[str, Mean]]] = {
    "7B": {
        "weight average": _row(25.14, 53.70, 49.25, 38.30),
        "DARE": _row(19.11, 50.77, 50.15, 39.00),
        "task arithmetic": _row(27.45, 54.65, 51.11, 39.59),
        "Breadcrumbs": _row(18.51, 49.23, 50.89, 36.55),
        "TIES": _row(26.69, 57.54, 51.13, 42.12),
        "model": _row((28.34, 0.22), (13.38, 0.57), (46.51, 0.15), (35.95, 0.51)),
        "layer": _row((27.18, 0.04), (49.79, 0.43), (50.64, 0.64), (42.68, 0.26)),
        "attn_mlp": _row((27.33, 0.10), (55.86, 0.48), (49.80, 0.23), (42.88, 0.27)),
        "head_mlp": _row((13.08, 9.33), (14.17, 1.14), (41.14, 12.39), (8.16, 1.30)),
    },
    "13B": {
        "weight average": _row(33.57, 64.57, 52.28, 46.95),
        "DARE": _row(32.97, 62.47, 54.33, 47.51),
        "task arithmetic": _row(34.60, 64.72, 53.22, 48.24),
        "model": _row((31.27, 0.43), (18.90, 2.45), (15.75, 7.60), (50.68, 0.10)),
        "layer": _row((34.47, 0.17), (66.08, 0.14), (52.42, 0.15), (50.80, 0.17)),
        "attn_mlp": _row((35.11, 0.29), (66.11, 0.11), (52.51, 0.26), (51.05, 0.16)),
        "head_mlp": _row((12.91, 15.60), (30.17, 19.36), (13.71, 3.50), (22.59, 19.65)),
    },
}
"""Tables 1, 2, 3 and 9: Llama-2 of 7 and 13 billion parameters -> method, or granularity of ours -> set -> accuracy."""

MORE_TASKS = {
    "Table 6, Qwen-2-0.5B": ((38.31, 40.08), (40.99, 43.72), (38.76, 41.46), (47.36, 48.25)),
    "Table 7, Llama-2-7B": ((72.03, 76.30), (63.21, 69.72), (66.11, 70.83), (63.74, 65.63)),
}
"""Other tasks: (task arithmetic, ours at the level of attention and MLP) of every set."""

NUMBER_OF_EXPERTS = {2: (51.11, 49.80), 3: (56.43, 55.81), 4: (52.57, 53.82), 5: (46.66, 54.89)}
"""Table 10: (task arithmetic, ours)."""

NUMBER_OF_ROWS = {
    "layer": {
        1: (29.92, 16.87, 81.78), 3: (31.19, 15.24, 81.67), 10: (30.83, 15.65, 81.72), 30: (30.50, 15.85, 81.68),
        50: (30.81, 15.65, 81.80),
    },
    "attn_mlp": {
        1: (32.17, 15.24, 81.84), 3: (32.78, 14.63, 81.74), 10: (32.85, 14.63, 81.72), 30: (32.02, 14.84, 81.79),
        50: (32.68, 14.43, 81.79),
    },
}  # fmt: skip
"""Table 11: level -> rows per task -> accuracy at math, code, translation."""

SCALES = {
    "task arithmetic": {"weight": (0.4, 0.6)},
    "DARE": {"drop": (0.7, 0.8), "weight": (1.0, 1.0)},
}
"""Table 12: least and greatest of the best settings over four sets and both models."""

MODEL_WEIGHTS = {
    "7B": ((0.851, 0.259), (3.431, -1.537), (0.237, 0.882), (0.758, 0.480, -0.180)),
    "13B": ((1.039, 0.132), (-1.083, 1.652), (-0.463, 1.923), (0.562, 0.422, 0.062)),
}
"""Table 13: weights at the model level, in the order of `SETS`."""

NON_LINEARITY: dict[str, dict[str, Mean]] = {
    "model": {"Qwen-2-0.5B": (2.1130, 0.5250), "Llama-2-7B": (2.7637, 0.3442), "Llama-2-13B": (2.1929, 0.2271)},
    "layer": {"Qwen-2-0.5B": (0.4430, 0.7331), "Llama-2-7B": (0.1645, 0.4329), "Llama-2-13B": (0.1675, 0.3760)},
    "attention": {"Qwen-2-0.5B": (0.2439, 0.1631), "Llama-2-7B": (0.0229, 0.0107), "Llama-2-13B": (0.0250, 0.0115)},
    "mlp": {"Qwen-2-0.5B": (0.3112, 0.8353), "Llama-2-7B": (0.2030, 0.5655), "Llama-2-13B": (0.1622, 0.4295)},
}
"""Table 17, without the largest model."""

DISTANCES = {
    "Qwen-2-0.5B": (1.000, 0.923, 0.828, 0.763, 0.719, 0.655, 0.570, 0.427, 0.262, 0.125, 0.000),
    "Llama-2-7B": (1.000, 0.871, 0.726, 0.637, 0.545, 0.483, 0.370, 0.263, 0.169, 0.080, 0.000),
    "Llama-2-13B": (1.000, 0.805, 0.760, 0.635, 0.531, 0.435, 0.339, 0.247, 0.150, 0.073, 0.000),
}
"""Table 18, without the largest model: distance of base + alpha x (expert - base) to the expert, at the model level."""
