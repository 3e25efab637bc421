"""What alphas are valid for: a labelled record of settings, calibration rows and checkpoint contents, and its hash.

Scope: taking fingerprints and saying where two differ. A checkpoint's covers its headers, sizes and a sample of each
tensor's bytes: training moves nearly all weights and so changes it, and 100 GB take seconds. An edit of single elements
between the samples goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from transformers import PretrainedConfig

from mergekit_slta.checkpoints.headers import TensorHeader
from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.data.rows import TaskRows
from mergekit_slta.files.identity import hash_text
from mergekit_slta.recipe.read import OBJECTIVE_KEYS, Recipe

_SAMPLES = 4
_SAMPLE_BYTES = 1024
_FILE_SAMPLES = 64
_BLOCK_BYTES = 2**20


def checkpoint_fingerprint(loader: LazyTensorLoader, headers: Mapping[str, TensorHeader] | None) -> str:
    """Hash of a checkpoint: of every shard its size and sampled bytes, for safetensors of every tensor.

    Args:
        loader: mergekit's loader, for the files.
        headers: tensor name -> header; None for checkpoints that are not safetensors.
    """
    digest = hashlib.sha256(str(getattr(loader, "dtype", None)).encode())
    for path in getattr(loader, "fingerprint_files", ()):  # an adapter on top of the shards
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    for shard in sorted(loader.index.shards, key=lambda shard: shard.filename):
        path = os.path.join(loader.index.base_path, shard.filename)
        size = os.path.getsize(path)
        digest.update(f"{size};".encode())
        with open(path, "rb", buffering=0) as file:
            if headers is None:
                ranges = [(0, size, _FILE_SAMPLES)]
            else:
                ranges = []
                for name in sorted(shard.contained_keys):
                    header = headers[name]
                    digest.update(f"{name};{header.dtype};{header.shape};".encode())
                    ranges.append((header.start, header.stop, _SAMPLES))
            for start, stop, samples in ranges:
                step = max(_SAMPLE_BYTES, (stop - start - _SAMPLE_BYTES) // max(1, samples - 1))
                for offset in range(start, stop, step):
                    file.seek(offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, stop - offset)))
    return digest.hexdigest()


def job_identity(
    recipe: Recipe,
    plan: Plan,
    config: PretrainedConfig,
    rows: Sequence[TaskRows | None],
) -> dict[str, str]:
    """Everything that alphas depend on, by label.

    Args:
        recipe: the recipe; `lambda` only acts at merge time and is left out.
        plan: mergekit's plan, for the checkpoints.
        config: the base's config, which shapes the forward passes.
        rows: the rows of each of the recipe's tasks; None where the recipe names no dataset.

    Returns:
        label -> value. Without rows the settings of the calibration do not matter, and only those that the recipe
        states are there.
    """
    stated = recipe.settings.model_fields_set if None in rows else set(type(recipe.settings).model_fields)
    record = {
        key: str(value) for key, value in recipe.settings.model_dump().items() if key in stated and key != "alphas"
    }
    for key in OBJECTIVE_KEYS["joint"]:
        if key not in recipe.settings.objective_keys:
            record.pop(key, None)
    if recipe.settings.row_groups == 1:  # says nothing then
        record.pop("fresh_rows", None)
    record["dtype"] = str(recipe.config.dtype)
    tokenizer = recipe.config.tokenizer.model_dump_json() if recipe.config.tokenizer else recipe.config.tokenizer_source
    record["tokenizer"] = str(tokenizer)
    settings = {key: value for key, value in config.to_dict().items() if not key.startswith(("_", "transformers_"))}
    record["config of the base"] = hash_text(json.dumps(settings, sort_keys=True, default=str))
    for task, drawn in zip(recipe.tasks, rows, strict=True):
        name = recipe.label(task.model)
        if drawn is not None:
            record[f"rows of {name}"] = drawn.sha256
        if drawn is not None or "importance" in task.model_fields_set:
            record[f"importance of {name}"] = str(task.importance)
    for model in plan.models:
        record[f"weights of {recipe.label(model)}"] = checkpoint_fingerprint(
            plan.loaders[model], plan.headers.get(model)
        )
    return dict(sorted(record.items()))
