"""Generated arithmetic word problems: eight kinds of problem, six wordings of each, worked answers.

A wording belongs to one part of the rows (test, choose, train), so that no question of one part is one of another with
other names and numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from shared import Message, conversation

NAMES = (
    "Ada", "Ben", "Clara", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena", "Mira", "Noor",
    "Oskar", "Pia", "Quentin", "Rosa", "Samir", "Tilda",
)  # fmt: skip
ITEMS = (
    "apples", "pencils", "stickers", "marbles", "postcards", "cookies", "buttons", "tickets", "eggs", "bricks",
    "stamps", "oranges", "tiles", "shells", "coins", "candles", "bottles", "seeds", "badges", "ropes",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "crates", "baskets", "drawers", "trays", "jars", "cartons")
WORDINGS_BY_PART = (2, 1, 3)
"""Wordings of each kind that go to the test rows, to the rows for choosing, and to training."""

Problem = tuple[dict[str, Any], str, int]
"""(values of the wording's fields, working, result)."""


def left_over(rng: random.Random) -> Problem:
    """Something is owned, some is bought, some is given away."""
    owned, bought = rng.randint(12, 60), rng.randint(5, 40)
    total = owned + bought
    given = rng.randint(3, owned)
    values = {"owned": owned, "bought": bought, "given": given}
    return values, f"{owned} + {bought} = {total}. {total} - {given} = {total - given}.", total - given


def packed(rng: random.Random) -> Problem:
    """Equal containers and some loose items."""
    count, each, loose = rng.randint(3, 12), rng.randint(4, 15), rng.randint(2, 30)
    inside = count * each
    values = {"count": count, "each": each, "loose": loose, "container": rng.choice(CONTAINERS)}
    return values, f"{count} * {each} = {inside}. {inside} + {loose} = {inside + loose}.", inside + loose


def change(rng: random.Random) -> Problem:
    """A purchase that is paid for with a larger sum."""
    count, price = rng.randint(2, 9), rng.randint(3, 12)
    cost = count * price
    paid = cost + rng.randint(1, 40)
    values = {"count": count, "price": price, "paid": paid}
    return values, f"{count} * {price} = {cost}. {paid} - {cost} = {paid - cost}.", paid - cost


def shared_equally(rng: random.Random) -> Problem:
    """Two collections joined, then divided without remainder."""
    people, each = rng.randint(3, 9), rng.randint(4, 12)
    total = people * each
    part = rng.randint(2, total - 2)
    values = {"part": part, "rest": total - part, "people": people}
    return values, f"{part} + {total - part} = {total}. {total} / {people} = {each}.", each


def steady_work(rng: random.Random) -> Problem:
    """A rate over two stretches of time."""
    rate, early, late = rng.randint(4, 15), rng.randint(2, 5), rng.randint(2, 5)
    hours = early + late
    return (
        {"rate": rate, "early": early, "late": late},
        f"{early} + {late} = {hours}. {hours} * {rate} = {hours * rate}.",
        hours * rate,
    )


def times_as_many(rng: random.Random) -> Problem:
    """One has several times what the other has; both together."""
    own, times = rng.randint(4, 25), rng.randint(2, 6)
    more = own * times
    return {"own": own, "times": times}, f"{own} * {times} = {more}. {more} + {own} = {more + own}.", more + own


def still_to_do(rng: random.Random) -> Problem:
    """So much a day, for some days, of a known total."""
    daily, days = rng.randint(3, 15), rng.randint(3, 9)
    done = daily * days
    total = done + rng.randint(5, 60)
    values = {"daily": daily, "days": days, "total": total}
    return values, f"{daily} * {days} = {done}. {total} - {done} = {total - done}.", total - done


def around(rng: random.Random) -> Problem:
    """The way around a rectangle."""
    width, length = rng.randint(3, 30), rng.randint(4, 40)
    half = width + length
    return {"width": width, "length": length}, f"{width} + {length} = {half}. 2 * {half} = {2 * half}.", 2 * half


KINDS: dict[Callable[[random.Random], Problem], tuple[str, ...]] = {
    left_over: (
        "{name} has {owned} {item}, buys {bought} more and gives away {given}. How many {item} are left?",
        "After collecting {owned} {item}, {name} receives another {bought} as a present, then loses {given}. "
        "What number of {item} remains?",
        "A shelf holds {owned} {item}. {bought} are added in the evening, and the next day {given} get sold. "
        "How many does the shelf hold now?",
        "In spring {name} owned {owned} {item}. Over summer the collection grew by {bought}; in autumn {given} broke. "
        "Count the {item} that are still whole.",
        "There were {owned} {item} in the cellar when {name} carried {bought} downstairs and took {given} up again. "
        "How many stay below?",
        "{name} found {owned} {item} on Monday and {bought} on Tuesday, but had to return {given} of them. "
        "With how many does {name} end up?",
    ),
    packed: (
        "There are {count} {container} with {each} {item} each, and {loose} loose {item}. "
        "How many {item} are there in total?",
        "{name} fills {count} {container}, putting {each} {item} into every one; {loose} do not fit. "
        "How many {item} did {name} start with?",
        "A truck delivers {item}: {count} {container} of {each}, plus {loose} unpacked ones. "
        "What is the size of the delivery?",
        "Every one of the {count} {container} in the hall contains {each} {item}. Beside them lie {loose} more. "
        "Add up all {item}.",
        "For the fair, {item} come in {container} of {each}. "
        "{name} brings {count} such {container} and {loose} single pieces. "
        "How many pieces are at the fair?",
        "If {each} {item} go into each of {count} {container} and {loose} stay on the table, "
        "how many {item} exist altogether?",
    ),
    change: (
        "{name} buys {count} {item} at {price} dollars each and pays with {paid} dollars. "
        "How much change is returned, in dollars?",
        "One of the {item} costs {price} dollars. {name}, who has {paid} dollars, takes {count}. "
        "How many dollars does {name} keep?",
        "The till receives {paid} dollars for {count} {item} priced {price} dollars apiece. "
        "What does the customer get back?",
        "With a budget of {paid} dollars, a school orders {count} {item} for {price} dollars per piece. "
        "How much of the budget is unspent?",
        "{name} hands over {paid} dollars. The bill lists {count} {item}, {price} dollars for every one. "
        "Calculate the change.",
        "From {paid} dollars of savings {name} pays for {count} {item}, and each is {price} dollars. "
        "What sum stays in the savings?",
    ),
    shared_equally: (
        "{name} has {part} {item} and {other} has {rest}. They share all of them equally among {people} friends. "
        "How many {item} does each friend get?",
        "{part} {item} from {name} and {rest} from {other} are put together and dealt out evenly to {people} children. "
        "What does one child receive?",
        "Two sacks hold {part} and {rest} {item}. Emptied into one heap, they are split into {people} equal piles. "
        "How large is a pile?",
        "{name} picked {part} {item}, {other} picked {rest}. The harvest goes to {people} neighbours in equal parts. "
        "How many per neighbour?",
        "A class of {people} pupils divides the {part} {item} of last week and the {rest} of this week fairly. "
        "How many {item} is that for every pupil?",
        "Into {people} packets of the same size {name} sorts {part} old and {rest} new {item}. "
        "How many {item} make a packet?",
    ),
    steady_work: (
        "{name} packs {rate} {item} per hour and works {early} hours in the morning and {late} in the afternoon. "
        "How many {item} are packed?",
        "A machine that makes {rate} {item} an hour runs for {early} hours, stops, and runs {late} hours more. "
        "What is its output?",
        "On Friday {name} painted {item} for {early} hours and on Saturday for {late}, always {rate} in an hour. "
        "How many {item} were painted?",
        "Checking {rate} {item} takes {name} one hour. {name} spent {early} hours before lunch on it and {late} after. "
        "How many were checked?",
        "At a speed of {rate} {item} every hour, "
        "how many can {name} wrap in a shift of {early} hours followed by one of {late}?",
        "The conveyor carries {rate} {item} hourly. It was on for {early} hours yesterday, {late} today. "
        "Find the number of {item} carried.",
    ),
    times_as_many: (
        "{name} owns {own} {item}, and {other} owns {times} times as many. How many {item} do they own together?",
        "A small crate weighs as much as {own} {item}, a big one as much as {times} small crates. "
        "How many {item} balance both crates?",
        "{other} sold {own} {item}; {name} sold {times} times that number. What did the two sell in all?",
        "In the north garden grow {own} {item}. The south garden has {times} for each of those. Total of both gardens?",
        "{name} counted {own} {item} at home and then {times} times this amount at the club. "
        "How many were counted overall?",
        "Last year the museum showed {own} {item}, this year the {times}-fold number. "
        "How many {item} in the two years?",
    ),
    still_to_do: (
        "A book has {total} pages. {name} reads {daily} pages a day for {days} days. How many pages are still unread?",
        "{name} must deliver {total} {item} and manages {daily} daily. How many are undelivered after {days} days?",
        "Of {total} kilometres, the hikers walk {daily} on every one of {days} days. What distance lies ahead?",
        "The tank starts with {total} litres and loses {daily} litres each day. "
        "What does it contain when {days} days are over?",
        "For {days} days the baker uses {daily} kilograms of flour per day, out of a stock of {total}. "
        "How much flour is in stock then?",
        "{total} {item} wait to be labelled. {name} labels {daily} between breakfast and dinner, {days} days in a row. "
        "How many have no label yet?",
    ),
    around: (
        "A rectangular field is {width} metres wide and {length} metres long. How long is a fence around it, "
        "in metres?",
        "{name} walks once along all four sides of a court measuring {width} by {length} metres. "
        "How many metres is the walk?",
        "What length of ribbon borders a cloth with sides of {width} and {length} centimetres?",
        "The sides of a picture are {width} and {length} inches. {name} glues a strip along the whole edge. "
        "How many inches of strip?",
        "A pool has a short side of {width} feet and a long side of {length} feet. Find its perimeter in feet.",
        "Lights go round a roof, {length} yards in one direction and {width} in the other. "
        "How many yards of lights are needed?",
    ),
}  # fmt: skip


def math_rows(count: int, rng: random.Random) -> list[list[Message]]:
    """Generate ``count`` different problems for each part, part by part; kinds and wordings in equal parts."""
    wordings = {kind: rng.sample(texts, len(texts)) for kind, texts in KINDS.items()}
    rows: list[list[Message]] = []
    start = 0
    for number in WORDINGS_BY_PART:
        templates = [(kind, text) for kind, texts in wordings.items() for text in texts[start : start + number]]
        start += number
        answers: dict[str, str] = {}
        while len(answers) < count:
            kind, text = templates[len(answers) % len(templates)]
            values, working, result = kind(rng)
            name, other = rng.sample(NAMES, 2)
            answers[text.format(name=name, other=other, item=rng.choice(ITEMS), **values)] = (
                f"{working} The answer is {result}."
            )
        part = [conversation(question, answer) for question, answer in answers.items()]
        rng.shuffle(part)
        rows += part
    return rows
