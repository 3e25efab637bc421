"""All choices of how experts write calibration rows, in one place.

Sources: the prompt from nothing but the chat template is Magpie's (arXiv 2406.08464); text written by the model itself
as calibration data, Williams et al. (NAACL 2025). The shares and limits below are this package's own.
"""

from __future__ import annotations

from datetime import date

from mergekit_slta.data.draw import HELD_OUT_SHARE, MAX_HELD_OUT, MIN_HELD_OUT
from mergekit_slta.recipe.settings import Settings

MAX_GROUPS = 6
"""Under `joint` every step has rows of its own; the steps after so many use the rows again."""
OVERSAMPLING = 3
"""So many times the rows that are needed are written."""
BATCH_ROWS = 16
"""Rows that are written at once. Batches are planned before the first one is written, so that a run can resume."""
PROMPT_TEMPERATURE, ANSWER_TEMPERATURE = 1.0, 0.7
"""Temperatures of the user's turn and of the answer; top-p is 1 for both."""
PROMPT_SHARE = 0.5
"""Share of the tokens between the template's own that the user's turn may take. A longer turn counts as endless."""
MIN_ROOM = 8
"""`max_seq_length` must leave so many tokens besides the template's own and the hint's."""
NGRAM = 8
"""Length in tokens of the runs that near-duplicates share, and that an endless text repeats."""
NEAR_SHARE = 0.5
"""A row is a near-duplicate if an earlier row has this share of its n-grams."""
LOOP_SHARE = 0.5
"""A text that was cut off is a loop if this share of its n-grams are repeats."""
UNLIKELY_SHARE = 0.1
"""This share of the remaining rows is dropped: the least likely per token under the expert."""
DAY = date(2024, 7, 26)
"""The date that templates see while rows are written: the one that Llama 3.1's has where it cannot read the clock."""
RANDOM_SHARE = 0.25
"""This share of the kept rows is drawn at random; all others are those with the largest divergence from the base."""


def num_needed(settings: Settings) -> int:
    """Number of rows that an expert writes and keeps: those to fit, and those that are held out of them."""
    wanted = total = settings.num_samples * min(settings.own.row_groups, MAX_GROUPS)
    if settings.evaluate:
        total = max(total, MIN_HELD_OUT * HELD_OUT_SHARE)
        while total - min(MAX_HELD_OUT, total // HELD_OUT_SHARE) < wanted:
            total += 1
    return total
