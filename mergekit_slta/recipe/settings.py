"""The keys of a recipe: their names, types and defaults, and the method's name.

Scope: pydantic models. mergekit is not imported, so that registering the method stays cheap. `objectives.py` has the
own keys of each objective. The docstring below a key is its description in docs/recipe.md, which `docs/generate.py`
writes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

METHOD = "submodule_linear"
SELF = "self"
"""Value of `dataset`: the expert writes its rows itself."""
Granularity = Literal["model", "layer", "attn_mlp", "head_mlp", "linear"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "tf32", Dtype]


def to_number(value: object) -> object:
    """Convert text to a number: YAML reads "1e-3" as text.

    Raises:
        ValueError: the value is a boolean (a number in Python), or text that is not a number.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError("must be a number") from error


def _to_count(value: object) -> object:
    """Convert a quoted whole number; the strict type `Count` then refuses fractions and booleans."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


Number = Annotated[float, BeforeValidator(to_number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_to_count), Field(strict=True)]


class TaskSettings(BaseModel):
    """The keys of one model: the calibration rows of its task, and the task's importance in the objective."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["task", "direction"] = "task"
    """`direction`: a model without rows and without a task. Its weights are found from the other models' rows. It
    takes no other keys."""
    dataset: str | None = None
    """Calibration rows of this model's task: an id on the Hub, a file, a folder or a glob pattern. `self`: the expert
    writes them. That is the default if no model of the recipe names a dataset, and a key asks for weights that are
    fitted to rows, such as `objective: joint`. If some models name a dataset, the others must, too, unless `alphas`
    names an existing file or `objective` is `data_free`. A folder of that name is `./self`."""
    dataset_config: str | None = None
    """Name of the dataset's configuration, as in `datasets.load_dataset`."""
    split: str = "train"
    """Split of the dataset. Slices such as `train[:2000]` work. The rows of a file are its split `train`."""
    text: str | None = None
    """A column, which may hold messages, or a template over columns, such as `"{question} {answer}"`. Without it the
    format is found from the columns."""
    completion: str | None = None
    """Column or template of the answer. It follows `text` without a separator. Of messages, the last one is the
    answer."""
    completion_eos: Annotated[bool, Field(strict=True)] = True
    """Whether the tokenizer's end token follows an answer that no chat template wrote, unless the answer ends with it
    already. With false a merge may forget to stop."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Template that renders this model's chats: `model` (the expert's own), `output` (the merged model's), `base`,
    `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, a `.jinja` file, or a template. Without it the recipe's
    top-level `chat_template` is used, else the expert's own, else the merged model's. The tokens are always those of
    the merged model's tokenizer."""
    hint: Annotated[str, Field(min_length=1)] | None = None
    """With `dataset: self`: a system prompt that steers what the expert writes about. A model without a chat template
    begins every row with it, as a line of its own."""
    importance: Annotated[Number, Field(gt=0)] = 1.0
    """The task's share in the objective."""


class ObjectiveSettings(BaseModel):
    """Base class for the own keys of an objective: the keys that only this objective reads.

    Attributes:
        needs_answers: whether the statistics are made of losses over the rows' answers; a row without one is of no use.
        uses_seed: whether `seed` also affects the statistics of given rows.
        measures_residuals: whether the residual after the merge can be measured (`--verify`).
        needs_rows: whether the weights depend on calibration rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_answers: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False
    measures_residuals: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = True

    @property
    def row_groups(self) -> int:
        """Number of groups of `num_samples` rows that are drawn for each task."""
        return 1

    @property
    def inputs_are_merged(self) -> bool:
        """Whether a submodule's inputs are the features of the merged submodules before it, and not the base's."""
        return False

    @property
    def solve_dependence(self) -> str | None:
        """The key that makes the statistics depend on earlier solves. New weights then need a new calibration.

        None if saved statistics can be solved again with another ridge, balance or importance.
        """
        return None

    def effective(self) -> dict[str, object]:
        """The keys and values that affect the weights."""
        return self.model_dump()

    def check_shared(self, shared: Settings) -> None:
        """Check that the shared settings are compatible with these keys.

        Raises:
            RecipeError: two keys conflict.
        """


class Settings(BaseModel):
    """The keys shared by all models, except `lambda`, which mergekit resolves for each tensor at merge time.

    Attributes:
        own: the objective's own keys.
        stated: the keys that the recipe states; all others have their defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str = "features"
    """What the weights minimise. `features` (the paper): the difference between the outputs of merged and expert
    submodules. `joint`: the divergence of the merged model's answers from the experts' answers, over all submodules
    together. `data_free`: nothing, the merge is a closed form of the weights and reads no rows."""
    granularity: Granularity = "attn_mlp"
    """What gets a weight of its own for each expert: the whole `model`; each `layer`; each attention and each MLP
    block (`attn_mlp`); each key/value group of attention heads and each MLP block (`head_mlp`); each matrix and norm
    (`linear`)."""
    num_samples: Annotated[Count, Field(ge=1)] = 30
    """Rows per task, drawn without replacement. With `fresh_rows` this many for each step of `joint`, as far as there
    are enough. Rows that are held out come on top."""
    max_seq_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens of a row. A longer row loses its end. A model with learned positions (GPT-2) limits it to their
    number."""
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 42
    """Seed of the draw of rows, and under `joint` of sampled answers. The global random state is not touched."""
    balance: Annotated[bool, Field(strict=True)] = True
    """Under `features` every row has the same weight, whatever its length and the size of its features (Eq. 33-34).
    Under `joint` each task is divided by the base's mean divergence from its expert, so that tasks have the same
    weight; within a task long answers have more."""
    ridge: Annotated[Number, Field(ge=0)] | None = 0.0
    """Relative ridge. It shrinks weights towards 1/T for T experts, and those of directions towards 0. Under `joint` it
    shrinks them towards those of the step before: each step measures several values and takes the best, unless one is
    given (0.001 or more). With `steps: 0` it shrinks them towards 1, and cross-validation over
    rows chooses it."""
    evaluate: Annotated[bool, Field(strict=True)] = False
    """Hold out the last fifth of each task's rows, at most 30, and measure the merge on the first half of them. The
    steps of `joint` need it."""
    direction: Literal["none", "swudi_a"] = "none"
    """`swudi_a`: a closed form of the experts' weights is merged as one model more. As a default it applies to two
    experts or more."""
    uncalibrated: Literal["error", "base", "average"] = "error"
    """What becomes of tensors that text does not run through (a vision tower, heads for several tokens) if they
    differ between the models. `error` refuses the merge, `base` keeps the base's, `average` takes the mean of the
    experts'. Tensors that agree are copied."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the forward and backward passes. `auto`: float32; the matrix products inside the layers in
    bfloat16 under `joint`, on devices that have instructions for it."""
    alphas: Annotated[str, Field(min_length=1)] | None = None
    """The alphas file, or its folder, from which weights are read if it exists, and to which they are written
    otherwise."""
    own: SerializeAsAny[ObjectiveSettings] = ObjectiveSettings()
    stated: frozenset[str] = frozenset()

    @property
    def needs_rows(self) -> bool:
        """Whether rows are read at all."""
        return self.own.needs_rows or self.evaluate

    @property
    def tensor_dtype(self) -> Dtype:
        """Name of the dtype of weights and features in the forward passes."""
        return "float32" if self.compute_dtype in ("auto", "tf32") else self.compute_dtype

    @property
    def allows_bfloat16(self) -> bool:
        """Whether the layers' products may be computed in bfloat16, and all others on a GPU in TF32: no outputs are
        subtracted."""
        return self.compute_dtype == "auto" and self.own.needs_answers


TASK_KEYS = tuple(TaskSettings.model_fields)
SHARED_KEYS = (*(key for key in Settings.model_fields if key not in ("own", "stated")), "lambda")
"""Keys that every objective reads; `objectives.all_shared_keys` also has the own keys of the objectives."""
