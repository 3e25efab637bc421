"""Five tasks made of real text that comes with Python packages: no download, no network access.

Every task is a function of a random generator that returns conversations of two messages, each only once. Those of
generated text are in three parts, each with wordings of its own: for test rows, for choosing, for training.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import importlib.metadata
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from shared import Message, conversation, translate_rows
from word_problems import NAMES, math_rows

MATH_ROWS = 600
EXTRACT_ROWS = 600
"""Generated rows of each part, of which the splits take what they need."""

Rows = list[list[Message]]


def math(rng: random.Random) -> Rows:
    """Arithmetic word problems with worked answers (generated)."""
    return math_rows(MATH_ROWS, rng)


def translate(rng: random.Random) -> Rows:
    """English to German: Django's catalogues."""
    return translate_rows(rng)


@functools.cache
def standard_library() -> tuple[list[tuple[str, str]], list[str]]:
    """What the tasks take from the standard library of the running Python, in the order of its paths: functions as
    `completion_of` gives them, and the docstrings of modules and classes. (The trees themselves are some million
    objects: kept, they would slow down every garbage collection.)"""
    functions: list[tuple[str, str]] = []
    documents: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and (pair := completion_of(node)):
                    functions.append(pair)
                elif isinstance(node, (ast.Module, ast.ClassDef)):
                    documents.append(ast.get_docstring(node) or "")
    return functions, documents


def completion_of(function: ast.FunctionDef) -> tuple[str, str] | None:
    """Return a function's head with its docstring, and its body; None where there is too little or too much of it."""
    document = ast.get_docstring(function)
    if not document or len(function.body) < 2 or function.decorator_list:
        return None
    empty = ast.FunctionDef(
        function.name, function.args, [ast.Expr(ast.Constant(document))], [], function.returns, lineno=1, col_offset=0
    )
    head = ast.unparse(ast.fix_missing_locations(empty))
    body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
    return (head, body) if len(head) <= 350 and 20 <= len(body) <= 250 else None


def code(rng: random.Random) -> Rows:
    """Python: the body of a function of the standard library, from its head and docstring."""
    pairs: dict[str, str] = {}
    for pair in standard_library()[0]:
        pairs.setdefault(*pair)
    bodies = {body: head for head, body in pairs.items()}  # a body that occurs twice must not be in both splits
    rows = [conversation(f"Write the body of this Python function.\n\n{head}", body) for body, head in bodies.items()]
    rng.shuffle(rows)
    return rows


def documents() -> Iterator[str]:
    """Yield the Python language reference that ships with Python, and the docstrings of the standard library's modules
    and classes (those of functions belong to another task)."""
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))
    yield from standard_library()[1]


def paragraphs() -> Iterator[str]:
    """Yield the paragraphs of prose of all documents."""
    for text in documents():
        for paragraph in text.split("\n\n"):
            flat = re.sub(r"\s+", " ", paragraph).strip()
            if not paragraph.startswith((" ", "*", "-", ">")) and 160 <= len(flat) <= 520 and "::" not in flat:
                yield flat


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph at full stops that are followed by a capital letter."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", paragraph)


def answer(rng: random.Random) -> Rows:
    """Questions over a given paragraph of Python's documentation: the sentence that speaks of a word."""
    found: dict[str, tuple[str, str]] = {}
    for paragraph in paragraphs():
        parts = sentences(paragraph)
        if not 2 <= len(parts) <= 6:
            continue
        words = [re.findall(r"[a-z]{6,}", part) for part in parts]
        counts = [word for of_one in words for word in set(of_one)]
        choices = [
            (word, part)
            for of_one, part in zip(words, parts, strict=True)
            for word in dict.fromkeys(of_one)
            if counts.count(word) == 1 and 30 <= len(part) <= 200
        ]
        if choices:
            word, sentence = rng.choice(choices)
            question = f"{paragraph}\n\nWhat does the text say about the word “{word}”?"
            found.setdefault(re.sub(r"\W", "", sentence.casefold()), (question, sentence))
    rows = [conversation(question, sentence) for question, sentence in found.values()]
    rng.shuffle(rows)
    return rows


REQUESTS = (
    "Please book a room in {place} for {name} from {date}. The price must not exceed {money}.",
    "{name} has to be in {place} by {date}; the ticket costs {money}.",
    "Invoice of {date}: {money}, to be paid by {name}, {place}.",
    "On {date} we received {money} from {name}. Goods to be sent to {place}.",
    "Hi, this is {name}. I flew to {place} on {date} and paid {money} for it.",
    "Reminder: {money} for the order of {date} are still open. Customer: {name}, country: {place}.",
    "Donation by {name} ({place}), {money}, booked {date}.",
    "Dear team, our partner {name} opens an office in {place} on {date}. We contribute {money}.",
    "A parcel worth {money} left for {place} on {date}. The recipient is called {name}.",
    "{date} | {place} | {name} | {money}",
    "The court in {place} ordered {name} to pay {money} before {date}.",
    "Refund {money} to {name}; the trip to {place} planned for {date} was cancelled.",
    "Since {date} the flat in {place} has been rented to {name} at {money} a month.",
    "{money} is what {name} asked for the concert in {place}, which takes place on {date}.",
    "Insurance claim: {name} lost luggage in {place} (value {money}). Reported {date}.",
    "Could you transfer {money} to {name} until {date}? The bank is in {place}.",
    "{name} won {money} at a tournament in {place}. The final was played on {date}.",
    "Meeting minutes, {date}: {name} will visit our supplier in {place}; travel budget {money}.",
    "Sold to {name}: one painting, {money}. Shipped to {place}, {date}.",
    "We hired {name} for the branch in {place}. First day {date}, bonus {money}.",
    "Between us: {name} spent {money} in {place}, all on {date}!",
    "Subscription of {name} renewed on {date}. Charged: {money}. Billing address in {place}.",
    "Scholarship granted. Student {name}, university in {place}, start {date}, total {money}.",
    "My grandmother {name} emigrated from {place} on {date} with {money} in her pocket.",
    "Customs in {place} stopped a van of {name} on {date} and demanded {money}.",
    "For repairs in {place} the plumber charged {name} {money}; the work was done on {date}.",
    "Loan agreement: lender {name}, amount {money}, signed in {place}, due {date}.",
    "It was {date} when {name} bought land in {place}. The seller wanted {money} for it.",
    "Expense report. Who: {name}. Where: {place}. When: {date}. How much: {money}.",
    "Good news from {place}: {name} raised {money} for the school by {date}.",
)
REQUESTS_BY_PART = (10, 4, 16)
"""Wordings that go to the test rows, to the rows for choosing, and to training."""
GIVEN_NAMES = ("Ada", "Benedikt", "Chiara", "Dolores", "Emil", "Fatima", "Gérard", "Hanna", "Ivo", "Jelena", "Kofi")
FAMILY_NAMES = ("Abel", "Brandt", "Castro", "Dubois", "Eriksen", "Ferrari", "Grant", "Huber", "Ito", "Jansen", "Kaya")
LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL")
CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "SEK")


def extract(rng: random.Random) -> Rows:
    """Text to JSON: who, where, when and how much, with dates and amounts written as the CLDR does in seven locales."""
    try:
        from babel import Locale
        from babel.dates import format_date
        from babel.numbers import format_currency
    except ImportError:
        raise click.ClickException(
            "the extraction task writes dates and amounts with Babel: pip install Babel"
        ) from None
    places = sorted(
        name for key, name in Locale("en").territories.items() if key.isalpha() and re.fullmatch(r"[A-Z][a-z]+", name)
    )
    requests = rng.sample(REQUESTS, len(REQUESTS))
    rows: dict[str, str] = {}
    for part, number in enumerate(REQUESTS_BY_PART, 1):
        own, requests = requests[:number], requests[number:]
        while len(rows) < part * EXTRACT_ROWS:
            locale = rng.choice(LOCALES)
            day = datetime.date(2019, 1, 1) + datetime.timedelta(days=rng.randrange(2500))
            amount, currency = rng.randrange(1500, 500000) / 100, rng.choice(CURRENCIES)
            name, place = f"{rng.choice(GIVEN_NAMES)} {rng.choice(FAMILY_NAMES)}", rng.choice(places)
            amount = round(amount) if currency == "JPY" else amount
            text = rng.choice(own).format(
                name=name,
                place=place,
                date=format_date(day, rng.choice(["medium", "long"]), locale),
                money=format_currency(amount, currency, locale=locale).replace("\u202f", " ").replace("\xa0", " "),
            )
            fields = {"name": name, "place": place, "date": day.isoformat(), "amount": amount, "currency": currency}
            rows.setdefault(f"Extract the details as JSON: {text}", json.dumps(fields, ensure_ascii=False))
    return [conversation(question, reply) for question, reply in rows.items()]


ALL_NAMES = frozenset({*NAMES, *GIVEN_NAMES, *FAMILY_NAMES})
"""Of people in generated rows."""

TASKS: dict[str, Callable[[random.Random], Rows]] = {
    "math": math,
    "code": code,
    "translate": translate,
    "extract": extract,
    "answer": answer,
}
"""The five tasks; the first three are the paper's kinds, in the paper's order."""


def general_text(count: int, width: int = 700) -> list[str]:
    """Return passages of text that no task trains on: the descriptions of installed packages, prose lines only."""
    passages: list[str] = []
    for name in ("numpy", "torch", "transformers", "datasets", "safetensors", "Django", "mergekit", "accelerate"):
        try:
            text = importlib.metadata.metadata(name).get_payload() or ""
        except importlib.metadata.PackageNotFoundError:
            continue
        prose = [line.strip() for line in text.splitlines() if re.match(r"[A-Z][^<>|`=#]{60,}$", line.strip())]
        passages += textwrap.wrap(" ".join(prose), width)
    return [passage for passage in passages if len(passage) > width // 2][:count]
