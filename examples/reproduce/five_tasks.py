"""Five tasks made of real text that comes with Python packages: no download, no network access.

Every task is a function of a random generator that returns conversations of two messages, each only once.
"""

from __future__ import annotations

import ast
import datetime
import importlib.metadata
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from shared import Message, conversation, math_rows, translate_rows

MATH_ROWS = 800
EXTRACT_ROWS = 800

Rows = list[list[Message]]


def math(rng: random.Random) -> Rows:
    """Arithmetic word problems with worked answers (generated)."""
    return math_rows(MATH_ROWS, rng)


def translate(rng: random.Random) -> Rows:
    """English to German: Django's catalogues."""
    return translate_rows(rng)


def standard_library() -> Iterator[ast.AST]:
    """Yield the parsed modules of the standard library of the running Python, in the order of their paths."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue


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
    for module in standard_library():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and (pair := completion_of(node)):
                pairs.setdefault(*pair)
    bodies = {body: head for head, body in pairs.items()}  # a body that occurs twice must not be in both splits
    rows = [conversation(f"Write the body of this Python function.\n\n{head}", body) for body, head in bodies.items()]
    rng.shuffle(rows)
    return rows


def paragraphs() -> Iterator[str]:
    """Yield the prose paragraphs of the Python language reference that ships with Python."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            flat = re.sub(r"\s+", " ", paragraph).strip()
            if not paragraph.startswith((" ", "*", "-")) and 160 <= len(flat) <= 520 and "::" not in flat:
                yield flat


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph at full stops that are followed by a capital letter."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", paragraph)


def answer(rng: random.Random) -> Rows:
    """Questions over a given paragraph of the Python language reference: the sentence that speaks of a word."""
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
)
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
    rows: dict[str, str] = {}
    while len(rows) < EXTRACT_ROWS:
        locale = rng.choice(LOCALES)
        day = datetime.date(2019, 1, 1) + datetime.timedelta(days=rng.randrange(2500))
        amount, currency = rng.randrange(1500, 500000) / 100, rng.choice(CURRENCIES)
        name, place = f"{rng.choice(GIVEN_NAMES)} {rng.choice(FAMILY_NAMES)}", rng.choice(places)
        amount = round(amount) if currency == "JPY" else amount
        text = rng.choice(REQUESTS).format(
            name=name,
            place=place,
            date=format_date(day, rng.choice(["medium", "long"]), locale),
            money=format_currency(amount, currency, locale=locale).replace("\u202f", " ").replace("\xa0", " "),
        )
        fields = {"name": name, "place": place, "date": day.isoformat(), "amount": amount, "currency": currency}
        rows.setdefault(f"Extract the details as JSON: {text}", json.dumps(fields, ensure_ascii=False))
    return [conversation(question, reply) for question, reply in rows.items()]


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
