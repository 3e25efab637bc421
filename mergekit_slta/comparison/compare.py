"""`compare`: merge a recipe's models by several methods, one at a time, and score all on rows that no merge has seen.

Scope: the order of the work, what is kept between runs, and the files in the output folder. The compared rows are the
second half of the rows that each task holds out: no calibration fits them, and no step is chosen by them.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.calibration.calibrate import checked_options
from mergekit_slta.calibration.recorded_day import recorded_day
from mergekit_slta.calibration.reuse import check_disk_space
from mergekit_slta.comparison.benchmarks import Benchmarks
from mergekit_slta.comparison.merging import Merger, as_file_name
from mergekit_slta.comparison.methods import NAMES, Method, make_methods, parse_methods
from mergekit_slta.comparison.results import with_results
from mergekit_slta.comparison.rows import MIN_ROWS, ComparedRows, check_datasets
from mergekit_slta.comparison.scoring import Scorer, Scores
from mergekit_slta.comparison.tables import write_table
from mergekit_slta.data.rows import hash_rows
from mergekit_slta.errors import AlphasError, OutputError, RecipeError, show
from mergekit_slta.files.comparison_file import Comparison, ScoredModel
from mergekit_slta.files.identity import hash_identity, weights_label
from mergekit_slta.files.lock import file_lock
from mergekit_slta.files.names import COMPARING_FOLDER, COMPARISON_NAME, lock_path
from mergekit_slta.files.targets import check_comparison_target
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries.mergekit import forget_loaders
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.objectives import DATA_FREE
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import ObjectiveSettings
from mergekit_slta.reporting.figures.comparison import draw_comparison
from mergekit_slta.reporting.figures.style import path_ends
from mergekit_slta.runtime.clock import Clock
from mergekit_slta.runtime.interruption import interruptible

DEFAULT_FOLDER = "slta_compare"
_LONGEST_NAME = 36
_PACKAGES = ("mergekit-slta", "mergekit", "transformers", "torch")
_KEPT_LABELS = ("compute_dtype", "config of the base", "dtype", "tokenizer")
"""Labels of a job's identity, besides the weights, that change the scores of given rows."""


class _Answers(ObjectiveSettings):
    """The scores are losses over the rows' answers; nothing is fitted."""

    needs_answers = True


def compare(
    recipe: MergeConfiguration | dict[str, Any] | str | os.PathLike[str],
    output: str | os.PathLike[str] = DEFAULT_FOLDER,
    options: MergeOptions | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    rows: int | None = None,
    lm_eval: str | None = None,
) -> Comparison:
    """Merge a recipe's models by several methods and score them on held-out rows.

    One merge at a time is written into a hidden folder inside `output`, scored, and removed. What was scored stays in
    the comparison file, and a later call with the same recipe goes on from there.

    Args:
        recipe: a recipe file's path, its content as a mapping, or mergekit's configuration.
        output: folder for `slta_compare.json`, the table, the figure, and the recipe of each merge.
        options: mergekit's options (device, caches, ...); by default mergekit's own defaults, on the CPU.
        methods: names of methods, as a list or joined by commas; all by default.
        rows: score on the first so many of the compared rows of each task; all by default.
        lm_eval: tasks of lm-evaluation-harness, joined by commas; they are run on every model if it is installed.

    Returns:
        The content of the comparison file.

    Raises:
        SltaError: the recipe, the data or the models are refused, a method is unknown, a task has too few rows, or a
            merge failed; the message is one line.

    Examples:
        >>> comparison = mergekit_slta.compare("recipe.yml", "compared", methods=["average"])
        >>> [result.name for result in comparison.results]
        ['base', 'models/math', 'models/words', 'average']
    """
    options = checked_options(options)
    if rows is not None and rows < MIN_ROWS:
        raise RecipeError(f"--rows is {rows}: use at least {MIN_ROWS} rows of each task", code="invalid-value")
    names, config, out = parse_methods(methods), as_config(recipe), Path(output)
    path = out / COMPARISON_NAME
    read = read_recipe(config)
    check_comparison_target(path)
    check_datasets(read)
    earlier = _earlier(path, read)
    job = prepare(for_comparison(read), options, for_merge=False, day=recorded_day([path]))
    try:
        return _Run(config, read, job, out, names, rows, Benchmarks(lm_eval, out, options)).run(earlier)
    finally:
        forget_loaders(job.recipe.models)


def for_comparison(recipe: Recipe) -> Recipe:
    """The recipe as one that fits nothing and holds rows out: its models and rows, without its objective."""
    changes = {
        "objective": DATA_FREE, "own": _Answers(), "granularity": "model", "direction": "none", "evaluate": True,
        "alphas": None,
    }  # fmt: skip
    return recipe.model_copy(update={"settings": recipe.settings.model_copy(update=changes)})


def _earlier(path: Path, recipe: Recipe) -> Comparison | None:
    """The comparison in the folder; None if there is none, or it cannot be read.

    Raises:
        OutputError: it is one of other models.
    """
    try:
        found = Comparison.load(path)
    except AlphasError:  # missing, damaged, or of another version
        return None
    experts = {recipe.label(task.model) for task in recipe.tasks}
    if found.base_model != recipe.label(recipe.base) or {*found.models} != experts:
        raise OutputError(
            f"{show(path)} holds the comparison of other models ({show(', '.join((found.base_model, *found.models)))}) "
            "and is not overwritten: name another folder with -o, or remove it",
            code="foreign-file",
        )
    return found


@dataclass
class _Run:
    """One call of `compare`.

    Attributes:
        given, read: the user's recipe.
        job: its models and rows, see `for_comparison`.
        out: the output folder.
        names: the methods that the user names; None for all.
        limit: compared rows of each task, at most.
        benchmarks: what runs lm-evaluation-harness.
        scored: the models that are scored.
        lines: command lines of the harness.
    """

    given: MergeConfiguration
    read: Recipe
    job: Job
    out: Path
    names: tuple[str, ...] | None
    limit: int | None
    benchmarks: Benchmarks
    scored: list[ScoredModel] = field(init=False, default_factory=list)
    lines: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.rows = ComparedRows(self.job, self.limit)
        self.experts = [self._name_of(self.read.label(task.model)) for task in self.read.tasks]
        self.tasks = self.rows.tasks(self.experts)
        self.path = self.out / COMPARISON_NAME
        self.scratch = self.out / COMPARING_FOLDER
        self.fingerprint = self._fingerprint()
        self.recipe_hash = hash_identity({"recipe": self.given.model_dump_json()})

    @staticmethod
    def _name_of(label: str) -> str:
        """An expert's name in the file, where no merge has the same."""
        return f"./{label}" if label in ("base", *NAMES) else label

    def run(self, earlier: Comparison | None) -> Comparison:
        """Score what is not scored yet, and write the files."""
        job = self.job
        methods, left_out = make_methods(self.given, job, self.names, _out_dtype(job))
        merger = Merger(job, self.out, self.scratch, self.tasks)
        prints = {}
        for method in list(methods):
            found = merger.fingerprint(method)
            if isinstance(found, str):
                left_out[method.name] = found
                methods.remove(method)
            else:
                prints[method.name] = hash_identity({**found, "reference": self.fingerprint})
        for name, reason in left_out.items():
            job.say(f"Left out: {name} ({reason})")
        self.lines = self.benchmarks.lines(job, [method.name for method in methods])
        self._take_over(earlier, prints)
        check_disk_space(job, self.out)
        merger.check_targets(methods)

        def busy(holder: str) -> OutputError:
            return OutputError(
                f"another process ({show(holder)}) works on {show(self.path)}: wait for it, or write to another "
                "folder with -o",
                code="in-use",
            )

        with file_lock(lock_path(self.path), busy):
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
            try:
                with interruptible(lambda: "finished merges are kept; run the same command again, and it goes on"):
                    self._score_all(methods, merger, prints)
            finally:
                shutil.rmtree(self.scratch, ignore_errors=True)
            comparison = self._save()
            merger.write_recipes(methods)
            draw_comparison(comparison, self.out)
            write_table(comparison, self.out)
        return comparison

    def _take_over(self, earlier: Comparison | None, prints: dict[str, str]) -> None:
        """Take the scores of an earlier run that are still valid."""
        if earlier is None:
            return
        if earlier.provenance.get("fingerprint") != self.fingerprint:
            self.job.say(f"{show(self.path)} is for other rows, weights or versions: everything is scored anew")
            return
        same_recipe = earlier.provenance.get("recipe") == self.recipe_hash
        for model in earlier.scored:
            known = prints.get(model.name) if model.kind == "merge" else self.fingerprint
            if known == model.fingerprint or (known is None and (same_recipe or "objective" not in model.settings)):
                self.scored.append(model)
            elif model.kind == "merge":
                self.job.say(f"{show(model.label)} is for another recipe: " + (
                    "scored anew" if known else "left out; name it with --methods to score it anew"))  # fmt: skip
        done = [model.label for model in self.scored if model.kind == "merge"]
        if done:
            self.job.say(f"Scored already: {', '.join(map(show, done))}")

    def _score_all(self, methods: Sequence[Method], merger: Merger, prints: dict[str, str]) -> None:
        scorer = Scorer(self.job, self.rows.examples(), self.scratch)
        have = {model.name for model in self.scored if model.kind == "merge"}
        pending = [method for method in methods if method.name not in have or self.benchmarks.misses(method.name)]
        if pending or len(self.scored) == len(have):
            clock = Clock()
            with clock.phase("score"):
                references = scorer.score_references()
            self._put_references(references, clock.seconds)
        self.benchmarks.run_references(self.job)
        for number, method in enumerate(pending, start=1):
            self.job.say(f"[{number} of {len(pending)}] {method.label}")
            clock = Clock()
            folder = self.scratch / as_file_name(method.name)
            fitted = merger.merge(method, folder, clock)
            with clock.phase("score"):
                scores = scorer.score_merge(folder, method.label)
            self.benchmarks.run(method.name, folder)
            shutil.rmtree(folder, ignore_errors=True)
            self.scored = [model for model in self.scored if (model.kind, model.name) != ("merge", method.name)]
            self.scored.append(
                self._scored("merge", method.name, method.label, scores, prints[method.name]).model_copy(
                    update={"settings": method.settings, "fitted_rows": fitted, "seconds": _rounded(clock.seconds)}
                )
            )
            self._save()

    def _put_references(self, references: Sequence[Scores], seconds: dict[str, float]) -> None:
        """Put the scores of the base, and of the experts in the file's order, in front."""
        base, *experts = references
        found = [self._scored("base", "base", "base", base, self.fingerprint)]
        ends = path_ends(self.experts, _LONGEST_NAME)
        for name, end, place in zip(self.experts, ends, self.rows.places, strict=True):
            found.append(self._scored("expert", name, f"expert {end}", experts[place], self.fingerprint))
        found[0] = found[0].model_copy(update={"seconds": _rounded(seconds)})
        self.scored = [*found, *(model for model in self.scored if model.kind == "merge")]
        self._save()

    def _scored(self, kind: Any, name: str, label: str, scores: Scores | None, fingerprint: str) -> ScoredModel:
        if scores is None:
            nothing = torch.full((len(self.rows.examples()),), math.nan)
            scores = Scores(nothing, nothing, nothing > 0)
        return ScoredModel(
            name=name, kind=kind, label=label, fingerprint=fingerprint, losses=self.rows.by_task(scores.losses),
            divergences=self.rows.by_task(scores.divergences), exact=self.rows.by_task(scores.exact),
        )  # fmt: skip

    def _save(self) -> Comparison:
        settings = self.job.recipe.settings
        comparison = with_results(
            Comparison.model_construct(
                base_model=self.read.label(self.read.base),
                models=tuple(self.read.label(task.model) for task in self.read.tasks),
                tasks=self.tasks,
                scored=tuple(sorted(self.scored, key=_place)),
                settings={
                    "rows": self.limit, "max_seq_length": settings.max_seq_length, "seed": settings.seed,
                    "compute_dtype": settings.compute_dtype, "device": self.job.device.type,
                    "date": self.job.day and self.job.day.isoformat(), "lm_eval": self.lines,
                },
                provenance={
                    **{package: version(package) for package in _PACKAGES},
                    "fingerprint": self.fingerprint, "recipe": self.recipe_hash,
                },
            )
        )  # fmt: skip
        comparison.save(self.path)
        return comparison

    def _fingerprint(self) -> str:
        """Hash of all that the scores of the base and the experts depend on."""
        job = self.job
        models = [weights_label(job.recipe.label(model)) for model in job.plan.models]
        record = {label: job.identity[label] for label in (*_KEPT_LABELS, *models) if label in job.identity}
        record |= {f"rows {place}": hash_rows(rows) for place, rows in enumerate(self.rows.rows)}
        record |= {package: version(package) for package in _PACKAGES}
        return hash_identity({**record, "device": job.device.type})


def _out_dtype(job: Job) -> str | None:
    """The recipe's output dtype, else that of the embeddings in a merge of this package: mergekit's methods compute in
    float32 here, and would write it."""
    config, (table, *_) = job.recipe.config, job.plan.tensors[job.skeleton.embedding_weight].names
    dtype = config.out_dtype or config.dtype or job.plan.merged_dtype(table)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _place(model: ScoredModel) -> tuple[int, ...]:
    """Sorts the base and the experts before the merges, and the merges in the order of `NAMES`."""
    kind = ("base", "expert", "merge").index(model.kind)
    return (kind, NAMES.index(model.name.partition(":")[0])) if kind == 2 else (kind,)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {phase: round(taken, 3) for phase, taken in seconds.items()}
