"""Finish a merged model's folder: what mergekit leaves out of it, or gets wrong in its config.

Scope: small files of OUT. No tensor is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import safe_open

from mergekit_slta.errors import RunError, listing, show
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.names import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_ENDING,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_NAME,
    WEIGHTS_NAMES,
)
from mergekit_slta.job.job import Job

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def finish_output(job: Job, folder: Path) -> None:
    """Check a merged model's tensors, add the base's generation config and custom code, and correct its config.

    Args:
        job: what was merged.
        folder: the merged model.

    Raises:
        RunError: a tensor of the plan is missing, or there is one more.
    """
    _check_tensors(job, folder)
    _copy_missing(job, folder)
    _write_index(folder)
    path = folder / CONFIG_NAME
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        changed = _untie(job, config) | _drop_quantization(job, config)
        if config.pop("transformers_weights", None) or changed:  # the name of a file of the base
            _write(path, config)
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        _renumber_tokens(job, folder / name)


def _check_tensors(job: Job, folder: Path) -> None:
    """Compare the names of the written tensors with the plan's, if they are in safetensors files."""
    written: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written |= {*file.keys()}
    different = sorted(written ^ job.plan.outputs.keys())
    if written and different:
        raise RunError(
            f"mergekit wrote other tensors than planned ({listing(different, 3)}): please report the model",
            code="other-tensors",
        )


def _write(path: Path, config: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_index(folder: Path) -> None:
    """Write the index of a model in one file. Without one, vLLM loads every safetensors file of a folder, the
    statistics, too."""
    whole = folder / WEIGHTS_NAMES[0]
    if not whole.is_file():
        return
    with safe_open(whole, framework="pt") as file:
        weight_map = dict.fromkeys(file.keys(), whole.name)
    index = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": weight_map}
    write_text_atomically(folder / (whole.name + INDEX_ENDING), json.dumps(index, indent=2) + "\n")


def _untie(job: Job, config: dict[str, Any]) -> bool:
    """Set `tie_word_embeddings: false` if an expert has its own output projection.

    With the config of a tied base, transformers would drop the merged projection.
    """
    if job.plan.is_tied or not job.base_is_tied:
        return False
    config["tie_word_embeddings"] = False
    job.say("The base's embeddings are tied and an expert's are not: the merged model is written untied")
    return True


def _drop_quantization(job: Job, config: dict[str, Any]) -> bool:
    """Remove the base's `quantization_config`: the merged weights are not quantized, and transformers would read them
    so."""
    if config.pop("quantization_config", None) is None:
        return False
    job.say("The base's config.json has a `quantization_config` and its weights are not quantized: left out")
    return True


def _copy_missing(job: Job, folder: Path) -> None:
    """Copy what mergekit leaves out: the base's generation config (unless it copies the tokenizer), the named chat
    templates of a tokenizer that it copies, and custom code."""
    base = job.recipe.base.model
    if not (folder / GENERATION_CONFIG_NAME).exists():
        try:
            source = Path(base.path, GENERATION_CONFIG_NAME)
            if not os.path.isdir(base.path):
                cached = {"revision": base.revision, "cache_dir": job.options.transformers_cache}
                source = Path(hf_hub_download(base.path, GENERATION_CONFIG_NAME, **cached))
            if source.is_file():
                shutil.copyfile(source, folder / GENERATION_CONFIG_NAME)
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            if not isinstance(error, EntryNotFoundError):
                job.say(f"No {GENERATION_CONFIG_NAME} is written: the base's cannot be read ({show(error)})")
    named = Path(job.plan.loaders[job.recipe.base].index.base_path, TEMPLATES_FOLDER)
    copied = job.tokenizer is None and not job.recipe.config.chat_template and (folder / TOKENIZER_CONFIG_NAME).exists()
    if copied and named.is_dir() and not (folder / TEMPLATES_FOLDER).exists():
        shutil.copytree(named, folder / TEMPLATES_FOLDER)
    if os.path.isdir(base.path) and any(_own_code(folder)):
        for source in Path(base.path).glob("*.py"):
            if not (folder / source.name).exists():
                shutil.copyfile(source, folder / source.name)


def _own_code(folder: Path) -> Iterator[str]:
    """Classes of custom code beside the weights, to which the configs refer; transformers marks those on the Hub with
    `--`."""
    for name in (CONFIG_NAME, TOKENIZER_CONFIG_NAME):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("auto_map") if path.is_file() else None
        for value in found.values() if isinstance(found, dict) else ():
            yield from (each for each in ([value] if isinstance(value, str) else value) if each and "--" not in each)


def _renumber_tokens(job: Job, path: Path) -> None:
    """Give the token ids of a config the numbers that the tokens have in the merged vocabulary."""
    if job.tokenizer is None or not path.is_file():
        return
    numbers = {old: new for new, old in job.tokenizer.permutations[job.recipe.base].items() if old >= 0}
    config = json.loads(path.read_text(encoding="utf-8"))
    lost = []
    before = dict(config)
    for key in _TOKEN_KEYS:
        value = config.get(key)
        given = value if isinstance(value, list) else [] if value is None else [value]
        kept = [numbers[number] for number in given if number in numbers]
        lost += [f"{key} {number}" for number in given if number not in numbers]
        config[key] = kept if isinstance(value, list) else kept[0] if kept else None
    if {key: before.get(key) for key in _TOKEN_KEYS} != {key: config[key] for key in _TOKEN_KEYS}:
        _write(path, {key: value for key, value in config.items() if key in before})
        job.say(
            f"The merged vocabulary has other token ids than the base's: those of {path.name} are changed"
            + (f", and the base's {listing(lost)} left out" if lost else "")
        )
