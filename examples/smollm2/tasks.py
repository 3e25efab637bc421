"""Two small tasks made from what is at hand: arithmetic word problems, and Django's German catalogue."""

from __future__ import annotations

import gettext
import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path

import click
from common import Message

NAMES = ("Ada", "Ben", "Clara", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena")
ITEMS = ("apples", "pencils", "stickers", "marbles", "postcards", "cookies", "buttons", "tickets", "eggs", "bricks")
PRICED_ITEMS = ("notebooks", "lamps", "mugs", "books", "plants", "scarves", "candles", "chairs")
CONTAINERS = ("boxes", "bags", "crates", "baskets", "drawers")

Problem = tuple[str, str, int]


def total_after_gift(rng: random.Random) -> Problem:
    """Something is owned, some is bought, some is given away."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    owned, bought = rng.randint(12, 60), rng.randint(5, 40)
    given = rng.randint(3, owned)
    total = owned + bought
    return (
        f"{name} has {owned} {item}, buys {bought} more and gives away {given}. How many {item} are left?",
        f"{owned} + {bought} = {total}. {total} - {given} = {total - given}.",
        total - given,
    )


def packed_items(rng: random.Random) -> Problem:
    """Equal containers plus loose items."""
    item, container = rng.choice(ITEMS), rng.choice(CONTAINERS)
    count, each, loose = rng.randint(3, 12), rng.randint(4, 15), rng.randint(2, 30)
    packed = count * each
    return (
        f"There are {count} {container} with {each} {item} each, and {loose} loose {item}. "
        f"How many {item} are there in total?",
        f"{count} * {each} = {packed}. {packed} + {loose} = {packed + loose}.",
        packed + loose,
    )


def change_returned(rng: random.Random) -> Problem:
    """A purchase paid for with a larger sum."""
    name, item = rng.choice(NAMES), rng.choice(PRICED_ITEMS)
    count, price = rng.randint(2, 9), rng.randint(3, 12)
    cost = count * price
    paid = cost + rng.randint(1, 40)
    return (
        f"{name} buys {count} {item} at {price} dollars each and pays with {paid} dollars. "
        "How much change is returned, in dollars?",
        f"{count} * {price} = {cost}. {paid} - {cost} = {paid - cost}.",
        paid - cost,
    )


def shared_equally(rng: random.Random) -> Problem:
    """Two collections joined, then divided without remainder."""
    first, second = rng.sample(NAMES, 2)
    item, friends, each = rng.choice(ITEMS), rng.randint(3, 9), rng.randint(4, 12)
    total = friends * each
    part = rng.randint(2, total - 2)
    return (
        f"{first} has {part} {item} and {second} has {total - part}. "
        f"They share all of them equally among {friends} friends. How many {item} does each friend get?",
        f"{part} + {total - part} = {total}. {total} / {friends} = {each}.",
        each,
    )


def steady_work(rng: random.Random) -> Problem:
    """A rate over two stretches of time."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    rate, morning, afternoon = rng.randint(4, 15), rng.randint(2, 5), rng.randint(2, 5)
    hours = morning + afternoon
    return (
        f"{name} packs {rate} {item} per hour and works {morning} hours in the morning and {afternoon} in the "
        f"afternoon. How many {item} are packed?",
        f"{morning} + {afternoon} = {hours}. {hours} * {rate} = {hours * rate}.",
        hours * rate,
    )


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    total_after_gift,
    packed_items,
    change_returned,
    shared_equally,
    steady_work,
)


def math_rows(count: int, rng: random.Random) -> list[list[Message]]:
    """Generate ``count`` different word problems with worked answers, the templates in equal parts."""
    answers: dict[str, str] = {}
    while len(answers) < count:
        question, working, result = TEMPLATES[len(answers) % len(TEMPLATES)](rng)
        answers[question] = f"{working} The answer is {result}."
    rows = [conversation(question, answer) for question, answer in answers.items()]
    rng.shuffle(rows)
    return rows


def conversation(question: str, answer: str) -> list[Message]:
    """Return a one-turn conversation."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def django_catalogues() -> list[Path]:
    """Return the compiled German catalogues of the installed Django, without importing it."""
    spec = importlib.util.find_spec("django")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("the translation task reads Django's catalogues: pip install Django")
    return sorted(Path(spec.submodule_search_locations[0]).rglob("locale/de/LC_MESSAGES/*.mo"))


def is_usable(english: str, german: str) -> bool:
    """Keep one-line texts of moderate length that are actually translated and contain no markup."""
    text = english + german
    return (
        english.casefold() != german.casefold()
        and 4 <= len(english) <= 120
        and len(german) <= 140
        and not re.search(r"[\n<>&|\x04]|%%", text)
        and re.search(r"[A-Za-z]{3}", english) is not None
    )


def translate_rows(rng: random.Random) -> list[list[Message]]:
    """Return every usable English-German pair once, shuffled."""
    pairs: dict[str, tuple[str, str]] = {}
    for catalogue in django_catalogues():
        with catalogue.open("rb") as file:
            # GNUTranslations offers no public iteration; plural forms have tuple keys and are left out.
            entries = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, german in entries.items():
            if not isinstance(key, str):
                continue
            english = key.split("\x04")[-1]
            if is_usable(english, german):
                # Texts that differ only in case or punctuation count as one, so no pair is in both splits.
                pairs.setdefault(re.sub(r"\W", "", english.casefold()), (english, german))
    rows = [conversation(f"Translate to German: {english}", german) for english, german in sorted(pairs.values())]
    rng.shuffle(rows)
    return rows
