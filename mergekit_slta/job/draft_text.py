"""The text of a drafted recipe: YAML with a comment for every key."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
import yaml

from mergekit_slta.errors import show
from mergekit_slta.recipe.objectives import DATA_FREE, FEATURES
from mergekit_slta.recipe.settings import METHOD, Settings


@dataclass(frozen=True)
class DraftTask:
    """One expert of a draft.

    Attributes:
        model: its name in the recipe.
        notes: lines about it, for people.
        dataset, dataset_config, split, text, completion: the keys; None if the key is not written.
        is_unseen: whether the dataset could not be looked at.
    """

    model: str
    notes: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    text: str | None = None
    completion: str | None = None
    is_unseen: bool = False


@dataclass(frozen=True)
class Draft:
    """A recipe that is to be written.

    Attributes:
        path: the file's name, for the commands in its comments.
        base: the base's name.
        why_base: how the base was found.
        tasks: the experts.
        objective: value of the key; without rows it is `data_free`.
        why_objective: why this one.
        out_dtype: value of the key; None if the base's config has no dtype.
        tokenizer: the `tokenizer` section; empty if none is needed.
        uncalibrated: value of the key; None if it is not needed.
        chat_template: name of one of mergekit's templates, if the rows are chats and no model has one; else None.
    """

    path: str
    base: str
    why_base: str
    tasks: Sequence[DraftTask]
    objective: str = FEATURES
    why_objective: str = ""
    out_dtype: str | None = None
    tokenizer: dict[str, object] = field(default_factory=dict)
    uncalibrated: str | None = None
    chat_template: str | None = None


_TEMPLATE = """\
# Recipe for mergekit, written by `mergekit-slta init`. Paths start at the folder in which a command is run.
#   mergekit-slta check {{ path | argument }}       # looks at models and rows, and says what the merge will cost
#   mergekit-yaml {{ path | argument }} merged/     # merges
merge_method: {{ method }}

# The model that the experts were fine-tuned from ({{ why_base | line }}).
base_model: {{ base | scalar }}

models:
{%- set told = namespace(completion=false, config=false, split=false) %}
{%- for task in tasks %}
{%- for note in task.notes %}
  # {{ note | line }}
{%- endfor %}
  - model: {{ task.model | scalar }}
{%- if task.dataset is not none %}
    parameters:
{%- if loop.first %}
      # Rows of this expert's task: a file, a folder, a pattern, or an id on the Hub.
{%- endif %}
      dataset: {{ task.dataset | scalar }}
{%- if task.dataset_config is not none %}
{%- if not told.config %}
      # Which of the dataset's configs.
{%- set told.config = true %}
{%- endif %}
      dataset_config: {{ task.dataset_config | scalar }}
{%- endif %}
{%- if task.split is not none %}
{%- if not told.split %}
      # Which part of it; `train[:2000]` takes the first rows.
{%- set told.split = true %}
{%- endif %}
      split: {{ task.split | scalar }}
{%- endif %}
{%- if task.completion is not none %}
{%- if not told.completion %}
      # The prompt and its answer, one after the other. Write them as in the expert's training: `{column}` stands for a
      # column of the rows. The end token follows.
{%- set told.completion = true %}
{%- endif %}
      text: {{ task.text | scalar }}
      completion: {{ task.completion | scalar }}
{%- elif task.text is not none %}
      # The column with the text of a row.
      text: {{ task.text | scalar }}
{%- endif %}
{%- elif objective == data_free %}
{%- if loop.first %}
    # To fit the weights to rows, name some of the task of every expert, and choose another `objective` below:
{%- endif %}
    # parameters:
    #   dataset: {{ task.model | example }}
{%- endif %}
{%- endfor %}

parameters:
{%- if objective == data_free %}
  # The merge is computed from the experts' weights alone, because no rows are known. With rows and their
  # answers for every expert, `joint` is usually better.
  objective: {{ objective }}
{%- else %}
  # What the weights of the merge are fitted to. `features`: to the outputs of every block, from any text, quickly.
  # `joint`: to the experts' answers, with a weight for every matrix; needs rows with answers, and more time.
  # {{ why_objective | line }}
  objective: {{ objective }}
  # Rows of each task{{ " for each step" if objective == "joint" }}.
  num_samples: {{ defaults.num_samples }}
  # Tokens of a row; longer rows are cut.
  max_seq_length: {{ defaults.max_seq_length }}
{%- endif %}
{%- if uncalibrated is not none %}
  # Tensors that text does not run through (of a vision tower, say) differ between the models: the base's are kept.
  uncalibrated: {{ uncalibrated }}
{%- endif %}
{%- if chat_template is not none %}

# Renders the rows that are chats, and becomes the merged model's: the models have no chat template of their own.
chat_template: {{ chat_template }}
{%- endif %}
{%- if tokenizer %}

# The vocabularies differ: embeddings are merged token by token, over the tokens of this tokenizer.
tokenizer:
{%- for key, value in tokenizer.items() %}
  {{ key }}: {{ value }}
{%- endfor %}
{%- endif %}
{%- if out_dtype is not none %}

# The dtype of the merged model: the base's. The merge itself is computed in float32.
out_dtype: {{ out_dtype }}
{%- endif %}
"""


def scalar(value: str) -> str:
    """A text as a YAML value on one line, in quotes unless it is a plain name."""
    if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value and not _is_number(value):
        return value
    return yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True).removesuffix("\n")


def _is_number(value: str) -> bool:
    """Whether newer YAML reads a text as a number, such as 1e3."""
    try:
        float(value)
    except ValueError:
        return False
    return True


_PLAIN = re.compile(r"[A-Za-z0-9._/][A-Za-z0-9._/+@-]*")


def recipe_text(draft: Draft) -> str:
    """The text of a recipe.

    Returns:
        YAML that reads back as the draft's values.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["scalar"] = scalar
    environment.filters["argument"] = lambda path: show(shlex.quote(path), 400)
    environment.filters["line"] = lambda text: show(text, 400)
    environment.filters["example"] = lambda model: show(f"{model.rstrip('/').rpartition('/')[2]}.jsonl", 80)
    return environment.from_string(_TEMPLATE).render(
        vars(draft), method=METHOD, data_free=DATA_FREE, defaults=Settings()
    )
