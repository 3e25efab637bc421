"""Names of all files and folders that the package writes, or reads beside a merged model.

Scope: names and paths only; nothing here accesses the disk.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ALPHAS_NAME = "slta_alphas.json"
STATISTICS_NAME = "slta_stats.safetensors"
LINEARITY_NAME = "slta_linearity.json"
RECIPE_NAME = "recipe.yml"
"""The recipe that `init` writes."""
COMPARISON_NAME = "slta_compare.json"
COMPARISON_TABLE_NAME = "slta_compare.md"
STOCK_RECIPE_NAME = "stock.yml"
"""The recipe that `export -o FOLDER/` writes."""
MERGE_RECORD_NAME = "slta_merge.json"
"""Lists the files that a merge put into its output folder, with their hashes."""

CARD_NAME = "README.md"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
"""A tokenizer's named chat templates, but the default one."""
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
"""A model's weights in one file, the preferred one first."""
INDEX_ENDING = ".index.json"
"""Ends the name of the index of weights in several files; it starts with the name of the one file."""
LOADERS_FOLDERS = (TEMPLATES_FOLDER, "custom_generate")
"""Subfolders of a model in which transformers looks for files."""
LOADERS_READ = (
    GENERATION_CONFIG_NAME, "custom_generate/generate.py",
    TOKENIZER_CONFIG_NAME, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "*.model",
    "tokenizer.model.v[0-9]", "tokenizer.model.v[0-9]m[0-9]", "*.spm", "*.tiktoken", "*.tokenizer", "*tekken*.json",
    "vocab.json", "vocab.txt", "merges.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "entity_vocab.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json", "word_shape.json",
    "word_pronunciation.json",
    "chat_template.jinja", "chat_template.json", f"{TEMPLATES_FOLDER}/*.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", *LOADERS_FOLDERS,
)  # fmt: skip
"""Patterns of what transformers' tokenizers, processors and generation read beside a model's weights and config, if it
is there. The subfolders count, too, because they may be links."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
MERGED_RECIPE_NAME = "mergekit_config.yml"
"""The recipe that mergekit leaves in the folder of a merged model."""

KEPT_SUFFIX = ".old"
"""Ends the new name of a user's file that was where a merge has one of its own."""

HIDDEN_PREFIX = ".slta_"
"""Starts the name of every folder that a merge keeps inside its output folder until it is done."""
MERGING_FOLDER = ".slta_merging"
MERGED_FOLDER = ".slta_merged"
CALIBRATING_FOLDER = ".slta_calibrating"
COMPARING_FOLDER = ".slta_comparing"
"""In the folder of a comparison: the merge that is being scored."""
RECIPES_FOLDER, ALPHAS_FOLDER, BENCHMARKS_FOLDER = "recipes", "alphas", "lm_eval"
"""In the folder of a comparison: the recipe of each merge, the weights that were calibrated, results of `lm_eval`."""
PID_NAME = "pid"
"""In `MERGING_FOLDER`: the id of the process that merges."""
REPLACED_NAME = "replaces.json"
"""In `MERGED_FOLDER`: the files of the earlier merge that the finished one replaces."""

RESUME_MARKER_NAME = "resume.json"
"""In a resume folder: the fingerprint of the job that is being computed."""
ACTIVATIONS_FOLDER = "activations"
"""In a resume folder: ends the name of each folder of stored activations."""
ACTIVATIONS_NAME = "activations.bin"
ACTIVATIONS_MARKER_NAME = "activations.json"
"""Beside `ACTIVATIONS_NAME`: the depths and layers that are stored in it."""

ROWS_FOLDER = "slta_rows"
"""In the folder of a merge, or beside an alphas file: the rows that experts have written."""

FIGURE_PREFIX = "slta"
PAGE_NAME = "slta_report.html"


_JSON, _STATISTICS = ".json", ".stats.safetensors"


def statistics_path(alphas: Path) -> Path:
    """Path of the statistics beside an alphas file: `slta_stats.safetensors`; for any other `A.json`,
    `A.stats.safetensors`."""
    if alphas.name == ALPHAS_NAME:
        return alphas.with_name(STATISTICS_NAME)
    return alphas.with_name(alphas.name.removesuffix(_JSON) + _STATISTICS)


def solved_path(statistics: Path) -> Path:
    """Path of the alphas file that `solve` writes beside statistics, which is never that of their calibration.

    `slta_alphas_solved.json`; for `A.stats.safetensors`, `A_solved.json`.
    """
    if statistics.name == STATISTICS_NAME:
        stem = ALPHAS_NAME.removesuffix(_JSON)
    else:
        stem = statistics.name.removesuffix(_STATISTICS).removesuffix(".safetensors")
    return statistics.with_name(f"{stem}_solved{_JSON}")


def figure_name(figure: str, suffix: str = "png", prefix: str = FIGURE_PREFIX) -> str:
    """File name of a figure: `slta_alphas.png`."""
    return f"{prefix}_{figure}.{suffix}"


def resume_folder(path: Path) -> Path:
    """Folder for the unfinished work of a run that writes `path`."""
    return path.with_name(f".{path.name}.partial")


def direction_folder(path: Path) -> Path:
    """Folder for the computed tensors of a direction, beside the alphas file `path`."""
    return path.with_name(f".{path.name}.direction")


def lock_path(path: Path) -> Path:
    """Path of the lock file for `path`."""
    return path.with_name(path.name + ".lock")


def rows_names(models: Iterable[str]) -> dict[str, str]:
    """Model -> name of the file of the rows that it has written: the last part of its name, `math.jsonl`.

    What no file name should have becomes `_`. Models whose names would be the same get part of a hash.
    """
    models = list(models)
    parts = {model: "-".join(re.split(r"[/\\]", part)[-1] for part in model.split("+")) for model in models}
    stems = {model: re.sub(r"[^\w.-]+", "_", part).strip(".")[:80] or "model" for model, part in parts.items()}
    counts = Counter(stem.lower() for stem in stems.values())
    return {
        model: stem + f"-{hashlib.sha256(model.encode()).hexdigest()[:8]}" * (counts[stem.lower()] > 1) + ".jsonl"
        for model, stem in stems.items()
    }


def rows_record_path(rows: Path) -> Path:
    """Path of the record beside a file of written rows: what they are for, and their hash."""
    return rows.with_name(rows.name.removesuffix(".jsonl") + _JSON)
