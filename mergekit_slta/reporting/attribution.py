"""How the weights of a merge were found, in a sentence, and what to cite for them.

Scope: text for model cards, from an alphas file.
"""

from __future__ import annotations

import re

from mergekit_slta import __version__
from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.recipe.objectives import DATA_FREE, FEATURES, JOINT

PROJECT = "https://github.com/mergekit-slta/mergekit-slta"
_PAPER = (
    "@inproceedings{dai2025submodule,\n"
    "  title = {Leveraging Submodule Linearity Enhances Task Arithmetic Performance in {LLMs}},\n"
    "  author = {Dai, Rui and Hu, Sile and Shen, Xu and Zhang, Yonggang and Tian, Xinmei and Ye, Jieping},\n"
    "  booktitle = {International Conference on Learning Representations},\n"
    "  year = {2025},\n"
    "  url = {https://arxiv.org/abs/2504.10902}\n}"
)
_CLOSED_FORM = (
    "@misc{wei2026spectral,\n"
    "  title = {Closed-Form Spectral Regularization for Multi-Task Model Merging},\n"
    "  author = {Wei and others},\n"
    "  year = {2026},\n"
    "  url = {https://arxiv.org/abs/2606.07289}\n}"
)


def describe_method(alphas: Alphas) -> str:
    """What the model is made of, and where the weights come from."""
    if not alphas.is_fitted:
        return (
            "This model is a closed form of the experts' weights alone: no row was read, and nothing was trained or "
            "tuned."
        )
    terms = ["base", "α₁ · (expert₁ - base)", "α₂ · (expert₂ - base)", "…"][: 1 + min(3, len(alphas.experts))]
    formula = " + ".join([*terms, *["α_d · (direction - base)"] * bool(alphas.directions)])
    return f"Every submodule of this model is `{formula}`. {_fitted(alphas)}"


def _fitted(alphas: Alphas) -> str:
    """How the weights were fitted to rows."""
    evaluation, is_one_solve = alphas.evaluation, alphas.calibration.get("steps") == 0
    if alphas.calibration.get("objective") != JOINT or (evaluation is None and not is_one_solve):
        return (
            "Its weights α come in closed form from a few calibration rows per task, without training or tuning "
            "([Leveraging Submodule Linearity Enhances Task Arithmetic Performance in LLMs]"
            "(https://arxiv.org/abs/2504.10902), ICLR 2025)."
        )
    if evaluation is None or is_one_solve:
        return (
            f"Its weights α were found by `joint` of [mergekit-slta]({PROJECT}): one linear system for all submodules "
            "together, from a few calibration rows per task."
        )
    count = sum(point.ridge is not None for point in evaluation.points)
    if not count:
        starts = ", ".join(show(point.name, 40) for point in evaluation.points)
        return (
            f"Its weights α were found by `joint` of [mergekit-slta]({PROJECT}) from a few calibration rows per task: "
            f"no Gauss-Newton step was better on held-out rows than the best of its starting points ({starts})."
        )
    return (
        f"Its weights α were found by `joint` of [mergekit-slta]({PROJECT}): {count} Gauss-Newton "
        f"step{'s' * (count > 1)} on a few calibration rows per task. Held-out rows chose among the steps."
    )


def citation(alphas: Alphas) -> str:
    """BibTeX of the project, and of the method whose weights these are; `joint` is the project's own."""
    objective = alphas.calibration.get("objective")
    version = str(alphas.provenance.get("mergekit_slta", ""))
    project = (
        "@software{mergekit_slta,\n"
        "  title = {mergekit-slta: merging fine-tuned language models submodule by submodule},\n"
        "  author = {{The mergekit-slta contributors}},\n"
        f"  version = {{{version if re.fullmatch(r'[0-9A-Za-z.+-]+', version) else __version__}}},\n"
        f"  url = {{{PROJECT}}}\n}}"
    )
    return "\n\n".join([project, *{FEATURES: [_PAPER], DATA_FREE: [_CLOSED_FORM]}.get(str(objective), [])])
