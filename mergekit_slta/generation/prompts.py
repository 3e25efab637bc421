"""What an expert is given to write a row: the chat template up to the user's turn, or the beginning of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError, show
from mergekit_slta.generation.choices import MIN_ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = "sltauserturn7", "sltaanswer7"
"""Stand for the two messages while the template is cut."""


@dataclass(frozen=True)
class Prompt:
    """The text around what an expert writes.

    Attributes:
        before: the text before the user's turn; without a template what the text begins with.
        between: the text from the end of the user's turn to the answer; None if there is no template.
        system: the system message; None if there is none.
        first_line: begins the user's message, with its line break; without a template it begins the text.
        before_ids, between_ids: their tokens.
        ends: ids of the tokens that end a turn: all special tokens.
        stop: a text that ends the user's turn, if no special token does.
    """

    before: str
    between: str | None
    system: str | None
    first_line: str
    before_ids: tuple[int, ...]
    between_ids: tuple[int, ...]
    ends: frozenset[int]
    stop: str | None

    def as_row(self, prompt: str, answer: str) -> dict[str, object]:
        """A row of the file: `messages`, or `prompt` and `completion` where there is no template."""
        if self.between is None:
            return {"prompt": self.first_line, "completion": answer}
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": self.first_line + prompt.strip()})
        return {"messages": [*messages, {"role": "assistant", "content": answer.strip()}]}


def make_prompt(template: ChatTemplate, hint: str | None, name: str, max_length: int) -> Prompt:
    """Cut a chat template at the user's turn; or begin a text, where there is none.

    A hint is the system message. Where the template takes none, it is the first line of the user's message; without a
    template, of the text.

    Args:
        template: the expert's, with the output's tokenizer.
        hint: the recipe's `hint`.
        name: the expert's name, for messages.
        max_length: the recipe's `max_seq_length`.

    Raises:
        DataError: there is neither a template nor a hint, the template cannot be cut, or too few tokens are left.
    """
    tokenizer = template.tokenizer
    if template.text is None:
        if not hint:
            raise DataError(
                f"{show(name)} has no chat template to write rows from: give it a `hint`, the first line of its rows, "
                "or name a `dataset`",
                code="missing-chat-template",
            )
        before, between, system, first_line = f"{hint}\n", None, None, f"{hint}\n"
    else:
        before, between, system, first_line = _cut(template, hint, name)
    before_ids = _ids(before, tokenizer, is_text=between is None)
    between_ids = _ids(between, tokenizer) if between else ()
    room = max_length - len(before_ids) - len(between_ids)
    if room < MIN_ROOM:
        raise DataError(
            f"{show(name)} cannot write rows of `max_seq_length` = {max_length} tokens: its template and hint take "
            f"{len(before_ids) + len(between_ids)} of them; raise it",
            code="no-answers",
        )
    ends = special_ids(tokenizer)
    is_by_token = between is None or (between_ids and between_ids[0] in ends)
    stop = None if is_by_token else (between or "").strip().split("\n")[0]
    return Prompt(before, between, system, first_line, before_ids, between_ids, ends, stop or None)


def _cut(template: ChatTemplate, hint: str | None, name: str) -> tuple[str, str, str | None, str]:
    """The text before the user's turn, the text between it and the answer, the system message, and the first line."""
    ways = [(hint, ""), (None, f"{hint}\n")] if hint else [(None, "")]
    reason: object = "it changes the messages"
    for system, first_line in ways:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": first_line + _USER}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = template.render(messages)
        except Exception as error:  # a template may know no system message
            reason = error
            continue
        before, is_user, rest = text.partition(_USER)
        between, is_answer, after = rest.partition(_ANSWER)
        if is_user and is_answer and between and not {_USER, _ANSWER} & {*after.split()} and (hint or "") in before:
            return before, between, system, first_line
    raise DataError(
        f"the `chat_template` of {show(name)} is not a template that can be cut at the user's turn ({show(reason)}), "
        "so no rows can be written from it: set another, or name a `dataset`",
        code="invalid-template",
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, is_text: bool = False) -> tuple[int, ...]:
    found = tokenizer(
        text, add_special_tokens=is_text, truncation=False, padding=False, split_special_tokens=False, verbose=False
    )["input_ids"]
    while is_text and found and found[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        found = found[:-1]
    return tuple(found)
