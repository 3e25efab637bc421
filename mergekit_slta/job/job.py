"""A job: a recipe that has passed every check, with its models, plan and calibration rows.

Everything is computed in canonical order (experts sorted by name), so that the order of models in the recipe does not
change the results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

import click
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.draw import missing_dataset
from mergekit_slta.data.rows import Example, TaskRows
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.libraries.torch import has_fast_bfloat16, product_precision
from mergekit_slta.maths.directions import is_matrix
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.runtime.clock import Clock
from mergekit_slta.runtime.devices import is_here
from mergekit_slta.runtime.progress import advice_on_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergekit_slta.libraries.mergekit import TokenizerInfo


@dataclass(frozen=True)
class Job:
    """A recipe that has passed every check.

    Attributes:
        recipe, options: the recipe, and mergekit's options.
        rows: calibration rows of each task, in the recipe's order; None for a task without a dataset.
        tokenizer: the output's tokenizer as mergekit builds it; None if it is the base's own.
        skeleton, plan, submodules: the model's code, mergekit's plan, and the submodules.
        identity: label -> value, the inputs that the alphas depend on (see `job.identity`).
        base_is_tied: whether the base's config ties its embeddings.
        merged_copies: adapter that mergekit merges into a full copy on disk -> reason.
        chat_template: the recipe's top-level key, with `auto` replaced by the template that it stands for.
        directions: the models without a task, in canonical order.
        read_direction: name -> tensor of the closed form among them; see `job.direction`.
        clock: how long the phases of `objectives.costs` take.
        row_tokenizer: the output's tokenizer, which has tokenized the rows.
    """

    recipe: Recipe
    options: MergeOptions
    rows: tuple[TaskRows | None, ...]
    tokenizer: TokenizerInfo | None
    skeleton: Skeleton
    plan: Plan
    submodules: tuple[Submodule, ...]
    identity: dict[str, str]
    base_is_tied: bool
    merged_copies: dict[str, str]
    chat_template: str | None = None
    directions: tuple[Direction, ...] = ()
    read_direction: Callable[[str], Tensor] | None = None
    clock: Clock = field(default_factory=Clock, compare=False)
    row_tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False)

    @property
    def device(self) -> torch.device:
        """The device of the forward passes."""
        return torch.device(self.options.device or "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward passes."""
        return getattr(torch, self.recipe.settings.tensor_dtype)

    @property
    def layer_products(self) -> str | None:
        """Precision of the matrix products inside the layers: a dtype, or "tf32". None if the device decides it, and is
        not on this machine."""
        settings = self.recipe.settings
        if not settings.allows_bfloat16:
            return "tf32" if settings.compute_dtype == "tf32" else settings.tensor_dtype
        if not is_here(self.device):
            return None
        if has_fast_bfloat16(self.device):
            return "bfloat16"
        return "tf32" if self.device.type == "cuda" else settings.tensor_dtype

    @property
    def experts(self) -> tuple[ModelReference, ...]:
        """The experts in canonical order."""
        return self.plan.models[1 : 1 + len(self.recipe.tasks)]

    @property
    def labels(self) -> list[str]:
        """Names in files of all models that get weights, in canonical order: the experts, then the directions."""
        return [*map(self.recipe.label, self.experts), *(direction.model for direction in self.directions)]

    @property
    def model_names(self) -> list[str]:
        """As `labels`, with the names as in the recipe, for messages."""
        return [*(self.recipe.names[model] for model in self.plan.models[1:]), *filter(None, [self.recipe.closed_form])]

    @property
    def averaged(self) -> frozenset[str]:
        """The submodules in which a closed form only averages the experts; it gets no weight there."""
        form = self.recipe.closed_form
        direction = next((direction for direction in self.directions if direction.model == form), None)
        if form is None or direction is None:
            return frozenset()
        averaged = {*direction.averaged}

        def is_averaged(name: str) -> bool:
            is_vector = not is_matrix(len(self.skeleton.shapes[name]))
            return is_vector or averaged.issuperset(self.plan.tensors[name].names)

        return frozenset(part.name for part in self.submodules if all(map(is_averaged, part.tensors)))

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens of all tasks."""
        return sum(drawn.num_tokens for drawn in self.rows if drawn is not None)

    @property
    def day(self) -> date | None:
        """The date that a chat template may have written into rows; None if no template reads it."""
        return next((drawn.day for drawn in self.rows if drawn is not None and drawn.day), None)

    def check_rows(self) -> None:
        """Check that every expert has calibration rows.

        Raises:
            DataError: an expert without a `dataset`.
        """
        for task, drawn in zip(self.recipe.tasks, self.rows, strict=True):
            if drawn is None:
                raise missing_dataset(self.recipe.names[task.model], is_self_written=task.dataset == SELF)

    def task_rows(self) -> list[TaskRows]:
        """Every task's rows, in canonical order.

        Raises:
            DataError: an expert without a `dataset`.
        """
        self.check_rows()
        by_model = {task.model: drawn for task, drawn in zip(self.recipe.tasks, self.rows, strict=True)}
        return [drawn for model in self.experts if (drawn := by_model[model]) is not None]

    def examples(self, step: int | None = None) -> list[Example]:
        """Calibration rows in canonical order.

        Args:
            step: number of a step, from 0. Every step takes the next `num_samples` rows of each task. If there are
                fewer in all, later steps use the rows again, in groups of at least `num_samples`. None: all rows.

        Raises:
            DataError: an expert without a `dataset`.
        """
        settings = self.recipe.settings
        found = []
        seen: Counter[tuple[int, ...]] = Counter()
        for task, drawn in enumerate(self.task_rows()):
            groups = max(1, min(settings.own.row_groups, len(drawn.rows) // settings.num_samples))
            rows = drawn.rows if step is None else drawn.part(step % groups, groups)
            for row in rows:
                found.append(Example(row, task, seen[row.ids]))
                seen[row.ids] += 1
        return found

    def held_out_examples(self) -> list[Example]:
        """The held-out rows that choose among merges, in canonical order; empty if a task has none."""
        rows = [drawn.acceptance for drawn in self.task_rows()]
        return [Example(row, task) for task, own in enumerate(rows) for row in own] if all(rows) else []

    def checkpoints(self) -> Checkpoints:
        """The models' tensors, base first, in the precision of the forward passes."""
        return Checkpoints(
            self.plan, self.skeleton, self.recipe.names, self.device, self.dtype, self.tokenizer, self.read_direction
        )  # fmt: skip

    @contextmanager
    def computing(self, *, subtracts: bool = False) -> Iterator[None]:
        """Compute in the recipe's precision inside the context.

        Args:
            subtracts: outputs of models are subtracted, which under `auto` forbids TF32.

        Raises:
            RunError: out of memory; the message names this job's settings.
        """
        settings = self.recipe.settings
        knobs = {"max_seq_length": settings.max_seq_length, "num_samples": settings.num_samples}
        uses_tf32 = settings.compute_dtype == "tf32" or (settings.allows_bfloat16 and not subtracts)
        with product_precision(self.device, tf32=uses_tf32), advice_on_memory(self.device, **knobs):
            yield

    def say(self, text: str) -> None:
        """Print a line to stderr, unless --quiet."""
        if not self.options.quiet:
            click.echo(text, err=True)
