"""What an expert is given to write a row: the chat template up to the user's turn, or the beginning of a text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError, show
from mergekit_slta.generation.choices import DAY, MIN_ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = "sltauserturn7", "sltaanswer7"
"""Stand for the two messages while the template is cut."""
_PROBES = ("the", "The", "7")
"""Words with which a text may begin: what is one token with each of them is not the template's alone."""


@dataclass(frozen=True)
class Prompt:
    """The text around what an expert writes.

    Attributes:
        template: the expert's, on a fixed day.
        before: the text before the user's turn; without a template what the text begins with.
        between: the text from the end of the user's turn to the answer; None if there is no template.
        system: the system message; None if there is none.
        first_line: begins the user's message, with its line break; without a template it begins the text.
        before_ids, between_ids: their tokens, without spaces at the end, and other white space that may be one token
            with the next word: the expert writes them. `between_ids` follow a user's turn that ends with a token.
        ends: ids of the tokens that end a turn.
        stop: finds the text that ends the user's turn; None if a token ends it.
        rest: the text from the match of `stop` to the answer.
    """

    template: ChatTemplate
    before: str
    between: str | None
    system: str | None
    first_line: str
    before_ids: tuple[int, ...]
    between_ids: tuple[int, ...]
    ends: frozenset[int]
    stop: re.Pattern[str] | None = None
    rest: str = ""

    def as_row(self, prompt: str, answer: str) -> dict[str, object]:
        """A row of the file: `messages`, or `prompt` and `completion` where there is no template."""
        if self.between is None:
            return {"prompt": self.first_line, "completion": answer}
        return {"messages": self._messages(prompt, answer)}

    def _messages(self, prompt: str, answer: str) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": self.first_line + prompt.strip()})
        return [*messages, {"role": "assistant", "content": answer.strip()}]

    def renders(self, prompt: str, answer: str) -> bool:
        """Whether the row shows both texts as they were written: templates leave out thoughts, say. White space does
        not count."""
        if self.between is None:
            return True
        try:
            text = self.template.render(self._messages(prompt, answer))
        except Exception:  # a template may refuse a text
            return False
        bare, user, own = ("".join(part.split()) for part in (text, prompt, answer))
        return own in bare.partition(user)[2]

    def after_stop(self, match: re.Match[str]) -> tuple[tuple[int, ...], str]:
        """The template's tokens that follow a text in which `stop` was found, and what it holds of the answer.

        The token that ends the match may hold what follows it: more of the template (`:` and a line break), or the
        answer's first characters (`]` and `-`).
        """
        beyond = match.string[match.end() :]
        if not self.rest.startswith(beyond) and beyond.strip():
            return (), beyond.removeprefix(self.rest)
        following = self.rest[len(beyond) :] if self.rest.startswith(beyond) else self.rest.lstrip()
        return _template_ids(match[0] + beyond, following, self.template.tokenizer), ""


def make_prompt(
    template: ChatTemplate, hint: str | None, name: str, max_length: int, ends: Collection[str] = ()
) -> Prompt:
    """Cut a chat template at the user's turn; or begin a text, where there is none.

    A hint is the system message. Where the template takes none, it is the first line of the user's message; without a
    template, of the text.

    Args:
        template: the expert's, with the output's tokenizer.
        hint: the recipe's `hint`.
        name: the expert's name, for messages.
        max_length: the recipe's `max_seq_length`.
        ends: the tokens behind which the expert stops. Special tokens, and added ones that the template writes behind a
            turn, end a turn, too.

    Raises:
        DataError: there is neither a template nor a hint, the template cannot be cut, or too few tokens are left.
    """
    template, hint = replace(template, day=DAY), (hint or "").strip()
    tokenizer = template.tokenizer
    end_ids = special_ids(tokenizer) | {number for token, number in tokenizer.get_vocab().items() if token in ends}
    if template.text is None:
        if not hint:
            raise DataError(
                f"{show(name)} has no chat template to write rows from: give it a `hint`, the first line of its rows, "
                "or name a `dataset`",
                code="missing-chat-template",
            )
        text = f"{hint}\n"
        prompt = Prompt(template, text, None, None, text, _ids(text, tokenizer, is_text=True), (), end_ids)
    else:
        prompt = _cut(template, hint, name, end_ids)
    taken = len(prompt.before_ids) + len(prompt.between_ids)
    if max_length - taken < MIN_ROOM:
        raise DataError(
            f"{show(name)} cannot write rows of `max_seq_length` = {max_length} tokens: its template and hint take "
            f"{taken} of them; raise it",
            code="no-answers",
        )
    return prompt


def _cut(template: ChatTemplate, hint: str, name: str, ends: frozenset[int]) -> Prompt:
    """Cut a template at the two messages.

    Raises:
        DataError: it changes or repeats them, or nothing stands before the user's turn or ends it.
    """
    ways = [(hint, ""), (None, f"{hint}\n")] if hint else [(None, "")]
    reason: object = "it changes or repeats the messages"
    for system, first_line in ways:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": first_line + _USER}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = template.render(messages)
        except Exception as error:  # a template may know no system message
            reason = error
            continue
        before, _, rest = text.partition(_USER)
        if system is not None and before == _plain_beginning(template):
            reason = "it leaves out the system message"
            continue
        between, is_answer, after = rest.partition(_ANSWER)
        is_clean = is_answer and not any(mark in (before + between + after).lower() for mark in (_USER, _ANSWER))
        if not is_clean or hint not in before:
            continue
        if found := _prompt(template, (before, between, after), system, first_line, ends):
            return found
        reason = "nothing stands before the user's turn, or between it and the answer"
    raise DataError(
        f"the `chat_template` of {show(name)} is not a template that can be cut at the user's turn ({show(reason)}), "
        "so no rows can be written from it: set another, or name a `dataset`",
        code="invalid-template",
    )


def _plain_beginning(template: ChatTemplate) -> str | None:
    """The text before the user's message of a chat without a system message; None if there can be none."""
    try:
        text = template.render([{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}])
    except Exception:  # a template may ask for a system message
        return None
    return text.partition(_USER)[0]


def _prompt(
    template: ChatTemplate, parts: tuple[str, str, str], system: str | None, first_line: str, ends: frozenset[int]
) -> Prompt | None:
    """The prompt of a template's parts before, between and after the messages; None if nothing marks where the user's
    turn begins or ends."""
    tokenizer, (before, between, after) = template.tokenizer, parts
    first = {ids[0] for text in (between, after) if (ids := _ids(text.lstrip(), tokenizer))}
    ends |= first & tokenizer.added_tokens_decoder.keys()
    marks = [re.escape(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends)) if token.strip()]
    mark = re.search("|".join(marks), between) if marks else None
    head = between[: mark.start()] if mark else between
    space, line = head[: len(head) - len(head.lstrip())], head.strip().split("\n")[0]
    _, line_break, indent = space.rpartition("\n")
    stop, rest = None, ""
    if line:
        is_word = line[0].isalnum() and space  # without white space it follows a word in the template itself
        start = line_break + re.escape(indent) if line_break else r"\b" if is_word else ""
        stop, rest = re.compile(start + re.escape(line)), between[len(space) + len(line) :]
    elif mark:
        between = between.lstrip()
    elif line_break:
        stop = re.compile("\n")
    else:
        return None
    before_ids = _template_ids("", before, tokenizer)
    between_ids = _template_ids(before + _PROBES[0], between, tokenizer)
    if not before_ids or not between_ids:
        return None
    return Prompt(template, before, between, system, first_line, before_ids, between_ids, ends, stop, rest)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})


def _template_ids(left: str, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of a template's text between the text `left` and one that the expert writes.

    Spaces at its end are left out, and other white space that is one token with the next word. A text that is one token
    with `left`, or other characters of which are one with the next word, is tokenized alone.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    own = _ids(left, tokenizer)
    made = [_ids(left + text + probe, tokenizer) for probe in _PROBES]
    if any(ids[: len(own)] != own for ids in made):
        own, made = (), [_ids(text + probe, tokenizer) for probe in _PROBES]
    shared = len(list(takewhile(lambda found: len(set(found)) == 1, zip(*made, strict=False))))
    while shared > len(own) and not decode(made[0][shared - 1 : shared]).strip(" "):  # some words are one token with it
        shared -= 1
    return made[0][len(own) : shared] if decode(made[0][shared:]).strip() == _PROBES[0] else _ids(text, tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, is_text: bool = False) -> tuple[int, ...]:
    found = tokenizer(
        text, add_special_tokens=is_text, truncation=False, padding=False, split_special_tokens=False, verbose=False
    )["input_ids"]
    while is_text and found and found[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        found = found[:-1]
    return tuple(found)
