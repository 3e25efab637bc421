"""Check everything that can be checked before a weight is read.

Scope: configs, tokenizer, datasets, checkpoint headers, device. The cheapest checks come first. Weights are downloaded
last, if they are not only planned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.checkpoints.configs import read_configs, ties_embeddings
from mergekit_slta.checkpoints.hub import check_room
from mergekit_slta.checkpoints.lora_loader import needs_merged_copy
from mergekit_slta.checkpoints.plan import Plan, make_plan
from mergekit_slta.checkpoints.reconcile import find_ties, reconcile, refuse_differing
from mergekit_slta.checkpoints.tensors import token_out_of_range
from mergekit_slta.checkpoints.tokenizers import load_tokenizer
from mergekit_slta.checkpoints.vocabulary import check_vocabulary, vocabulary_advice
from mergekit_slta.data.draw import RowSource, draw_rows
from mergekit_slta.data.rows import TaskRows
from mergekit_slta.data.templates import today
from mergekit_slta.errors import RecipeError, RunError, listing, show
from mergekit_slta.files.identity import weights_label
from mergekit_slta.job.direction import directions_of
from mergekit_slta.job.identity import ROW_SETTINGS, job_identity
from mergekit_slta.job.job import Job
from mergekit_slta.job.templates import Templates
from mergekit_slta.job.written_rows import WrittenRows, reading, without_datasets
from mergekit_slta.libraries.mergekit import chat_template_names, forget_loaders
from mergekit_slta.libraries.torch import has_fast_bfloat16
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.models.submodules import partition
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF, TaskSettings

LOG = logging.getLogger(__name__)


def prepare(
    recipe: Recipe,
    options: MergeOptions,
    *,
    need_rows: bool = True,
    for_merge: bool = True,
    day: date | None = None,
    plan_only: bool = False,
    before_reading: Callable[[Job], None] | None = None,
    rows_in: Sequence[Path] | None = None,
    is_calibrated: Callable[[Job], bool] = lambda _: False,
) -> Job:
    """Check a recipe against its models and data.

    Weights on the Hub are looked at through their headers first. They are downloaded, and adapters merged into copies,
    after everything else has been checked.

    Args:
        recipe: the validated recipe.
        options: mergekit's options.
        need_rows: whether every expert must name a dataset, if the objective reads rows. False if an existing alphas
            file is used.
        for_merge: warn if the merged model will have a wider dtype than the base.
        day: the date that chat templates see as today; by default it is today's.
        plan_only: download no weights, merge no adapter into a copy, and do not use the device, which may be elsewhere.
            If weights are missing, the job's `plan.unread` is not empty, and the job cannot be run.
        before_reading: called with such a job before weights are downloaded or adapters merged, or with any job before
            an expert writes rows. It may raise.
        rows_in: folders in which self-written rows are looked for; those that are missing are written into the last
            one. None: no expert may write any.
        is_calibrated: whether the alphas of such a job are at hand, so that no expert has to write rows.

    Raises:
        ModelError, DataError, RunError: the first check that fails.
        OutputError: the disk has no room for the downloads.
    """
    _check_device(options, recipe.settings.compute_dtype, plan_only)
    _check_chat_template(recipe.config.chat_template)
    recipe = without_datasets(recipe, options, is_allowed=need_rows and (plan_only or rows_in is not None))
    recipe, configs = read_configs(recipe, options)
    tokenizer, info = load_tokenizer(recipe, options)
    dtype = getattr(torch, recipe.settings.tensor_dtype)
    if dtype in (torch.bfloat16, torch.float16) and recipe.settings.own.needs_rows:
        LOG.warning(
            "compute_dtype %s: differences of outputs cancel badly; residuals and alphas may mislead",
            recipe.settings.compute_dtype,
        )
    narrow = (recipe.config.dtype or "").removeprefix("torch.")
    if narrow in ("bfloat16", "float16"):
        LOG.warning(
            "dtype: %s rounds every model to it before the merge; out_dtype: %s in its place rounds only the result",
            narrow, narrow,
        )  # fmt: skip
    device = torch.device("cpu" if plan_only else options.device or "cpu")
    config = configs[recipe.base]
    products = torch.bfloat16 if recipe.settings.allows_bfloat16 and has_fast_bfloat16(device) else None
    skeleton = Skeleton(config, recipe.names[recipe.base], dtype, device, options.trust_remote_code, products)
    stated, recipe = recipe, _within_positions(recipe, skeleton.max_positions)
    templates = Templates(recipe, options, tokenizer, day or today())
    templates.warn_of_differing_tokens()
    templates.warn_of_other_ends(configs)
    written = WrittenRows(recipe, templates, configs, rows_in, need_rows=need_rows)
    rows = _draw_all(recipe, templates, need_rows=need_rows)
    templates.warn_of_lost_templates()
    if recipe is not stated:
        _warn_of_cut_rows(recipe, rows)

    def plan_job(planning: bool) -> Job:
        plan = make_plan(recipe, options, skeleton, configs, planning=planning)
        table = plan.tensors.get(skeleton.embedding_weight)
        stored = {model: plan.stored_as(table.names[0], model) for model in recipe.models} if table else {}
        if info is None:
            _check_tokens(rows, [entry.shape[0] for entry in stored.values() if entry], skeleton.embedding_weight)
        else:
            sizes = {
                model: entry.shape[0] if entry else configs[model].get_text_config().vocab_size
                for model, entry in stored.items()
            }
            own = templates.own(recipe.base).tokenizer
            check_vocabulary(recipe, info, own.get_vocab() if own else {}, sizes)
        reconcile(plan, recipe.names, skeleton, configs, advice=lambda: vocabulary_advice(recipe, config, options))
        plan.is_tied = find_ties(plan, recipe.names, configs, skeleton.embedding_weight, skeleton.head_weight)
        if recipe.settings.uncalibrated == "error":
            refuse_differing(plan)
        submodules = partition(plan.tensors, skeleton.anatomy, recipe.settings.granularity, tied=plan.is_tied)
        filled = [written.planned.get(task.model, own) for task, own in zip(recipe.tasks, rows, strict=True)]
        record = job_identity(recipe, plan, filled, written.hashes)
        if plan_only or not plan.unread:  # else there will be another plan
            _warn_of_same_weights(recipe, record)
            if for_merge and not (recipe.config.dtype or recipe.config.out_dtype):
                _warn_of_wider_dtype(plan)
        reasons = {recipe.names[model]: needs_merged_copy(model) for model in recipe.models if model.lora}
        return Job(
            recipe,
            options,
            tuple(filled) if need_rows else rows,
            info,
            skeleton,
            plan,
            tuple(submodules),
            record,
            ties_embeddings(config),
            {name: reason for name, reason in reasons.items() if reason},
            templates.resolved_key,
            directions_of(recipe, skeleton, plan),
            row_tokenizer=tokenizer,
        )

    try:
        job = plan_job(planning=True)
        if plan_only:
            forget_loaders(recipe.models)
        elif job.plan.unread or written.is_needed:
            if job.plan.unread:
                check_room(job.plan.downloads)
            if before_reading is not None:
                before_reading(job)
            if job.plan.unread:
                job = plan_job(planning=False)
        write = need_rows and not plan_only and not (written.is_needed and is_calibrated(replace(job, rows=rows)))
        files = written.obtain(job, write=write)
        others = job.rows if write or plan_only else rows
        found = _draw_all(recipe, templates, need_rows=need_rows, files=files) if files else others
        job = replace(job, rows=tuple(own or other for own, other in zip(found, others, strict=True)))
    except BaseException:
        forget_loaders(recipe.models)
        raise
    return job


def _within_positions(recipe: Recipe, most: int | None) -> Recipe:
    """Lower `max_seq_length` to the number of the model's positions, if these are learned."""
    settings = recipe.settings
    if most is None or settings.max_seq_length <= most:
        return recipe
    return recipe.model_copy(update={"settings": settings.model_copy(update={"max_seq_length": most})})


def _draw_all(
    recipe: Recipe, templates: Templates, *, need_rows: bool, files: Mapping[ModelReference, Path] | None = None
) -> tuple[TaskRows | None, ...]:
    """Draw the rows of every task; None for a task without a dataset, if it needs none, and for one whose expert writes
    its rows, unless `files` has them."""
    if files is None:
        _warn_of_unused_keys(recipe)
    if not recipe.settings.needs_rows:
        return (None,) * len(recipe.tasks)
    files = files or {}
    sources = {
        place: RowSource(
            reading(task, files[task.model]) if task.model in files else task,
            recipe.names[task.model], recipe.settings, templates.of(task),
        )
        for place, task in enumerate(recipe.tasks)
        if task.model in files or (task.dataset != SELF and (need_rows or task.dataset))
    }  # fmt: skip
    drawn = dict(zip(sources, draw_rows(list(sources.values())), strict=True))
    for place, rows in drawn.items():
        if recipe.tasks[place].chat_template and rows.chat_template is None:
            LOG.warning("`chat_template` of %s has no effect: its rows are no chats", show(rows.name))
        if recipe.tasks[place].model in files:
            drawn[place] = replace(rows, dataset=SELF)
    return tuple(drawn.get(place) for place in range(len(recipe.tasks)))


def _warn_of_unused_keys(recipe: Recipe) -> None:
    """Warn of keys that have no effect, because the objective fits no weights."""
    settings = recipe.settings
    if settings.own.needs_rows:
        return
    of_tasks = {*TaskSettings.model_fields} - {"role", "importance"}
    unused = {"ridge", "balance", "importance"} | (set() if settings.evaluate else {*ROW_SETTINGS, *of_tasks})
    stated = settings.stated | {key for task in recipe.tasks for key in task.model_fields_set}
    if found := sorted(unused & stated):
        LOG.warning(
            "`objective: %s` fits no weights, so these keys have no effect: %s%s",
            settings.objective,
            listing(found, len(found)),
            "" if settings.evaluate else "; `evaluate: true` measures the merge on rows of a `dataset`",
        )


def _warn_of_cut_rows(recipe: Recipe, rows: Sequence[TaskRows | None]) -> None:
    """Warn of rows that fill all positions of the model."""
    most = recipe.settings.max_seq_length
    for drawn in rows:
        if cut := sum(len(row.ids) == most for row in drawn.rows) if drawn else 0:
            LOG.warning(
                "%d rows of %s are cut to %d tokens: %s has learned no more positions",
                cut, show(drawn.dataset if drawn else ""), most, show(recipe.names[recipe.base]),
            )  # fmt: skip


def _check_device(options: MergeOptions, precision: str, plan_only: bool) -> None:
    try:
        device = torch.device(options.device or "cpu")
        if not plan_only:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {show(options.device)} cannot be used here ({show(error)}): drop --cuda or --device",
            code="unusable-device",
        ) from error
    if precision == "tf32" and device.type != "cuda":
        raise RunError(
            f"`compute_dtype` is tf32, and {device} is no CUDA GPU: use auto, or add --cuda", code="unusable-device"
        )
    if options.multi_gpu and not plan_only and not torch.accelerator.is_available():
        raise RunError("--multi-gpu needs an accelerator, and there is none here: drop it", code="unusable-device")


def _check_tokens(rows: Sequence[TaskRows | None], sizes: Sequence[int], table: str) -> None:
    """Check that the embedding tables have a row for each token of the calibration rows.

    Args:
        rows: the rows of each task.
        sizes: number of rows of each model's table, as far as they are known.
        table: the table's name.

    Raises:
        ModelError: the shortest table has too few rows.
    """
    largest = max(
        (max(row.ids) for drawn in rows if drawn is not None for row in (*drawn.rows, *drawn.held_out)), default=-1
    )
    if sizes and largest >= min(sizes):
        raise token_out_of_range(largest, min(sizes), table)


def _warn_of_same_weights(recipe: Recipe, record: Mapping[str, str]) -> None:
    """Warn of an expert with the same weights as the base or another expert: probably its path is wrong."""
    names: dict[str, str] = {}
    for model in recipe.models:
        name = show(recipe.names[model])
        weights = record.get(weights_label(recipe.label(model)), name)  # not there before they are downloaded
        earlier = names.setdefault(weights, name)
        if earlier != name:
            LOG.warning("%s holds the same weights as %s: check its path, or leave it out", name, earlier)


def _warn_of_wider_dtype(plan: Plan) -> None:
    """Warn if the merged model will have a wider dtype than the base, because an expert has another one."""
    for name in plan.outputs:
        own, merged = plan.read_dtype(name, plan.models[0]), plan.merged_dtype(name)
        if own is not None and own != merged:
            kept, wide = (str(dtype).removeprefix("torch.") for dtype in (own, merged))
            LOG.warning(
                "the checkpoints have several dtypes: mergekit writes %s and tensors like it as %s, and the base has "
                "them as %s; `out_dtype: %s` writes a model as large as the base",
                name, wide, kept, kept,
            )  # fmt: skip
            return


def _check_chat_template(template: str | None) -> None:
    """Refuse an unknown chat template now; mergekit would refuse it only after the merge."""
    if template is None or template == "auto":
        return
    known = chat_template_names()
    if template not in known and (len(template) < 20 or "{" not in template):
        raise RecipeError(
            f"`chat_template` is {show(template)!r}: write `auto`, a Jinja template, or one of {listing(known, 20)}",
            code="invalid-value",
        )
