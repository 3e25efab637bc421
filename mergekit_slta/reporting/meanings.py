"""What flags mean, and names of kinds of submodules, for cards and pages."""

from __future__ import annotations

from mergekit_slta.files.alphas_file import NO_BETTER, SHARED_ROWS, TOO_FEW_ROWS
from mergekit_slta.files.evaluation import WEAK_EXPERT, WORSE_THAN_BASE

KINDS = {
    "model": "whole model",
    "layer": "decoder layers",
    "attention": "attention blocks",
    "attention_head": "attention heads",
    "mlp": "MLP blocks",
    "norm": "norms",
    "linear": "matrices",
    "embed": "embeddings",
    "head": "output head",
}
"""kind of submodule -> its name, from the whole to the parts."""
SUBMODULE_FLAGS = {
    "unchanged": "an expert equals the base here, or a closed form only averages the experts; its weight is 0",
    "rank_deficient": "experts change the same thing here; of all solutions the one of smallest norm was taken",
    "ill_conditioned": "experts are hard to tell apart here; the weights may be far off (`ridge` helps)",
    "extreme": "weights outside [-0.5, 1.5] (`ridge`, more rows or a coarser `granularity` reduce them)",
    "nonlinear": "the measured residual differs from the one that linearity predicts",
}
TASK_FLAGS = {
    WORSE_THAN_BASE: "the merge is farther from this expert than the base is, on rows that were not fitted",
    WEAK_EXPERT: "the expert hardly differs from the base; its task gets the mean weight of the others",
    NO_BETTER: "the expert's loss on its own rows is not below the base's: often a wrong prompt format",
    SHARED_ROWS: "another task has rows with the same tokens",
    TOO_FEW_ROWS: "it has too few different rows to hold any out, so the merge was not measured",
}
