"""Every file and folder name that the package writes, or reads beside a merged model.

Scope: names and paths only; nothing here touches the disk.
"""

from __future__ import annotations

from pathlib import Path

ALPHAS_NAME = "slta_alphas.json"
STATISTICS_NAME = "slta_stats.safetensors"
LINEARITY_NAME = "slta_linearity.json"
SOLVED_NAME = "slta_alphas_solved.json"
"""What `solve` writes beside a merged model, whose alphas file says what that model was merged with."""
MERGE_RECORD_NAME = "slta_merge.json"
"""Lists the files that a merge put into its output folder, with their hashes."""

CARD_NAME = "README.md"
CONFIG_NAME = "config.json"
MERGED_RECIPE_NAME = "mergekit_config.yml"
"""The recipe that mergekit leaves in the folder of a merged model."""

HIDDEN_PREFIX = ".slta_"
"""Starts the name of every folder that a merge keeps inside its output folder until it is done."""
MERGING_FOLDER = ".slta_merging"
MERGED_FOLDER = ".slta_merged"
CALIBRATING_FOLDER = ".slta_calibrating"
PID_NAME = "pid"
"""In `MERGING_FOLDER`: the number of the process that merges."""
REPLACED_NAME = "replaces.json"
"""In `MERGED_FOLDER`: the files of the earlier merge that the finished one replaces."""

RESUME_MARKER_NAME = "resume.json"
"""In a resume folder: what is being computed there."""
ACTIVATIONS_FOLDER = "activations"
"""In a resume folder: ends the name of each folder of stored activations."""
ACTIVATIONS_NAME = "activations.bin"
ACTIVATIONS_MARKER_NAME = "activations.json"
"""Beside `ACTIVATIONS_NAME`: which depths and layers are stored there."""

FIGURE_PREFIX = "slta"


def figure_name(figure: str, suffix: str = "png", prefix: str = FIGURE_PREFIX) -> str:
    """File name of a figure: `slta_alphas.png`."""
    return f"{prefix}_{figure}.{suffix}"


def resume_folder(path: Path) -> Path:
    """Where the unfinished work of a run that writes `path` is kept."""
    return path.with_name(f".{path.name}.partial")


def lock_path(path: Path) -> Path:
    """The lock file that stands for `path`."""
    return path.with_name(path.name + ".lock")
