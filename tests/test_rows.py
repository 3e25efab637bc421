"""Calibration rows: every source, column, template and chat, and what is refused."""

from __future__ import annotations

import json
import logging
import string
from itertools import islice

import pytest
from conftest import make_tokenizer, refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference

from mergekit_slta.data.draw import RowSource, draw_rows
from mergekit_slta.data.loading import load_rows
from mergekit_slta.data.rendering import renderer
from mergekit_slta.data.rows import sample_numbers
from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError
from mergekit_slta.recipe.objectives import FeaturesSettings, JointSettings
from mergekit_slta.recipe.read import Settings, Task

ROWS = [{"question": f"q{number}", "answer": f"a{number}", "number": number} for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows in every supported kind of file."""
    import pandas

    path = tmp_path_factory.mktemp("rows")
    frame = pandas.DataFrame(ROWS)
    (path / "jsonl").mkdir()
    (path / "jsonl" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    (path / "jsonl" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[6:]))
    (path / "rows.json").write_text(json.dumps(ROWS))
    frame.to_csv(path / "rows.csv", index=False)
    frame.to_parquet(path / "rows.parquet")
    (path / "rows.txt").write_text("\n\n".join(row["question"] for row in ROWS) + "\n")
    return path


def write_jsonl(path, rows):
    """Rows as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(tokenizer, dataset, text=None, split="train", completion=None, **settings):
    task = Task(
        model=ModelReference.parse("org/a"), dataset=str(dataset), text=text, split=split, completion=completion
    )
    own = JointSettings(steps=0) if settings.get("objective") == "joint" else FeaturesSettings()
    return RowSource(task, "org/a", Settings(**{"own": own, **settings}), ChatTemplate.of(tokenizer))


def draw(tokenizer, dataset, *args, **settings):
    (drawn,) = draw_rows([source(tokenizer, dataset, *args, **settings)])
    return drawn


@pytest.mark.parametrize(
    "name", ["jsonl/a.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.txt", "jsonl", "jsonl/*.jsonl"]
)
def test_every_kind_of_local_data_is_read(folder, tokenizer, name):
    """Files by suffix, folders and globs, through `datasets`."""
    text = "text" if name == "rows.txt" else "{question}"
    drawn = draw(tokenizer, folder / name, text, num_samples=20)
    expected = 6 if name == "jsonl/a.jsonl" else 10
    assert sorted(row.text for row in drawn.rows) == sorted(f"q{number}" for number in range(expected))


def test_split_slices_work(folder, tokenizer):
    """`split: train[:3]` means what it means in `datasets.load_dataset`."""
    drawn = draw(tokenizer, folder / "rows.json", "question", split="train[:3]")
    assert {row.text for row in drawn.rows} == {"q0", "q1", "q2"}


def test_template_over_columns(folder, tokenizer):
    """Plain column names in braces, numbers included, double braces for a brace."""
    drawn = draw(tokenizer, folder / "rows.json", "Q: {question} {{n={number}}}\nA: {answer}", num_samples=1)
    number = drawn.rows[0].number
    assert drawn.rows[0].text == f"Q: q{number} {{n={number}}}\nA: a{number}"


@pytest.mark.parametrize(
    ("template", "code", "values"),
    [
        ("{question.__class__}", "missing-column", ["'question.__class__'"]),
        ("{question[0]}", "missing-column", ["'question[0]'"]),
        ("{0}", "missing-column", ["'0'"]),
        ("{}", "missing-column", ["''"]),
        ("{question!r}", "invalid-template", ["conversions"]),
        ("{question:>10}", "invalid-template", ["formats"]),
        ("{missing}", "missing-column", ["'missing'", "columns question, answer, number"]),
        ("{question", "invalid-template", ["'{question'"]),
        ("missing", "missing-column", ["'missing'", "columns question, answer, number"]),
        ("{{question}}", "invalid-template", ["'{{question}}'", "write {question} for"]),
        ("Q: {{ question }} {answer}", "invalid-template", ["question is a column", "write {question} for"]),
        ("{{anything}}", "invalid-template", ["names no column", "write {anything} for"]),
        ("{{", "invalid-template", ["names no column", "write {question} for"]),
    ],
)
def test_templates_reach_columns_only(folder, tokenizer, template, code, values):
    """No attribute, index, format or conversion: recipes come from strangers."""
    with refused(DataError, code, *values):
        draw(tokenizer, folder / "rows.json", template)


def test_auto_prefers_messages_then_text(tmp_path, tokenizer):
    """Without `text`: the chat template over `messages`, else `text`, else an error that lists the columns."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat, "text": "plain"}) + "\n")
    (row,) = draw(tokenizer, path).rows
    assert row.text == "<s><|user|>hi</s><|assistant|>there</s>"
    assert tokenizer.decode(row.ids) == row.text  # one <s>: the template's, none added by the tokenizer
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"body": "x"}) + "\n")
    with refused(DataError, "missing-column", path, "body"):
        draw(tokenizer, path)


def test_missing_chat_template_is_named(tmp_path):
    """A `messages` column without a chat template is refused with the way out."""
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with refused(DataError, "missing-chat-template", "`messages`"):
        draw(make_tokenizer(chat_template=None), path)


def test_rows_are_cut(folder, tokenizer):
    """A row has at most max_seq_length tokens."""
    drawn = draw(tokenizer, folder / "rows.json", "{question} {answer} {question} {answer}", max_seq_length=5)
    assert {len(row.ids) for row in drawn.rows} == {5}


def test_fewer_rows_than_asked_is_a_warning(folder, tokenizer, caplog):
    """All rows are used, and it is said so."""
    with caplog.at_level(logging.WARNING):
        drawn = draw(tokenizer, folder / "rows.json", "question", num_samples=50)
    assert len(drawn.rows) == 10
    assert "fewer than num_samples = 50" in caplog.text


@pytest.mark.parametrize(
    ("rows", "values"),
    [
        ([{"text": "   "}], ["is empty"]),
        ([{"text": ""}], ["is empty"]),
        ([{"text": None}], ["column 'text'", "is missing"]),
        ([{"text": ["a", "b"]}], ["column 'text'", "is list"]),
        ([{"text": True}], ["column 'text'", "is bool"]),
        ([{"text": {"a": 1}}], ["column 'text'", "is dict"]),
        ([{"text": "a\0b"}], ["has NUL characters"]),
        ([{"text": "a\ud83d"}], ["has half a surrogate pair"]),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, rows, values):
    """A row that is empty, missing or no text is named by its number."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(DataError, "unusable-row", f"row 0 of {path}", *values):
        draw(tokenizer, path, "text")


def test_too_short_rows_are_named(tmp_path):
    """A single token shows a submodule nothing but its first position."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = None
    with refused(DataError, "unusable-row", f"row 0 of {path}", "1 tokens"):
        draw(tokenizer, path)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("none.jsonl", "dataset-not-found"),
        ("./none", "dataset-not-found"),
        ("*.none", "dataset-not-found"),
        ("a/b/c", "dataset-not-found"),
        ("rows.xlsx", "unknown-file-type"),
        ("empty.jsonl", "too-few-rows"),
        ("broken.json", "unreadable-dataset"),
    ],
)
def test_missing_or_unreadable_data_is_named(tmp_path, monkeypatch, name, code):
    """No such file, an unknown kind, nothing in it, or damage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text('[{"a": 1},\n{"a": \n')
    with refused(DataError, code, ".xlsx" if name == "rows.xlsx" else name):
        load_rows(name, None, "train")


def test_unknown_split_is_named(folder):
    """The message lists the splits there are."""
    with refused(DataError, "unreadable-dataset", "split test", "['train']"):
        load_rows(str(folder / "rows.json"), None, "test")


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(1, 200), fewer=st.integers(1, 50), more=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_sampling_is_without_replacement_and_nested(num_rows, fewer, more, seed):
    """Rows are distinct, and what a smaller `num_samples` draws comes first in what a larger one draws."""
    fewer, more = sorted((fewer, more))
    small, large = (list(islice(sample_numbers(num_rows, seed), count)) for count in (fewer, more))
    assert large[: len(small)] == small
    assert len(set(large)) == len(large) == min(more, num_rows)


@settings(max_examples=100, deadline=None)
@given(
    literals=st.lists(st.text(string.printable.replace("{", "").replace("}", ""), max_size=6), min_size=3, max_size=3),
    values=st.lists(st.text(max_size=6), min_size=2, max_size=2),
)
def test_templates_substitute_and_nothing_else(literals, values):
    """A template is its literals with the values between them, whatever the values contain."""
    assume(all(value is not None for value in values))
    template = literals[0] + "{a}" + literals[1] + "{b}" + literals[2]
    rendered = renderer(template, ["a", "b"], None, "data")({"a": values[0], "b": values[1]}, "row 0")
    assert rendered.text == literals[0] + values[0] + literals[1] + values[1] + literals[2]
    assert not rendered.is_chat


@settings(max_examples=150, deadline=None)
@given(template=st.text(alphabet="{}ab.[]!:0 ", max_size=12))
def test_any_template_renders_or_is_refused(template):
    """Whatever stands in `text`, the outcome is a text or a DataError."""
    try:
        render = renderer(template, ["a", "b"], None, "data")
    except DataError:
        return
    render({"a": "x", "b": "y"}, "row 0")


def test_hash_covers_text_and_tokens(folder, tokenizer):
    """Another template, another cut or another order is another hash; the same rows give the same."""
    one = draw(tokenizer, folder / "rows.json", "question")
    assert one.sha256 == draw(tokenizer, folder / "rows.json", "{question}").sha256
    others = [
        draw(tokenizer, folder / "rows.json", "answer"),
        draw(tokenizer, folder / "rows.json", "question", seed=1),
        draw(tokenizer, folder / "rows.json", "question", max_seq_length=2),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 4


# --- where the answer begins ----------------------------------------------------------------------------------------


def answers(tokenizer, drawn) -> list[str]:
    """What the marked tokens say."""
    return [tokenizer.decode(row.ids[row.completion :]) for row in drawn.rows]


def test_completion_follows_the_text_and_is_marked(folder, tokenizer):
    """`text` and `completion` make one row, and the hash covers where the answer begins, under any objective."""
    keys = {"text": "{question}: ", "completion": "{answer}!"}
    drawn = draw(tokenizer, folder / "rows.json", **keys, objective="joint", num_samples=10)
    assert [row.text for row in drawn.rows] == [f"q{row.number}: a{row.number}!" for row in drawn.rows]
    for row, answer in zip(drawn.rows, answers(tokenizer, drawn), strict=True):
        assert answer.strip() == f"a{row.number}!</s>"
        assert tokenizer.decode(row.ids[1 : row.completion]).strip() == f"q{row.number}:"
    features = draw(tokenizer, folder / "rows.json", **keys, num_samples=10)
    assert features.rows == drawn.rows
    plain = draw(tokenizer, folder / "rows.json", text="{question}: {answer}!", num_samples=10)
    assert [(*row.ids, tokenizer.eos_token_id) for row in plain.rows] == [row.ids for row in drawn.rows]
    assert {row.completion for row in plain.rows} == {1}
    assert plain.sha256 != drawn.sha256


def test_the_last_message_of_a_chat_is_the_answer(tmp_path, tokenizer):
    """Not earlier ones of the assistant's; a chat that ends with the user counts as a whole."""
    chats = [
        [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}],
        [*({"role": role, "content": "one"} for role in ("user", "assistant", "user")),
         {"role": "assistant", "content": "two"}],
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "x"}],
    ]  # fmt: skip
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    drawn = draw(tokenizer, path, objective="joint", num_samples=3)
    by_number = dict(zip((row.number for row in drawn.rows), answers(tokenizer, drawn), strict=True))
    assert by_number[0] == "<|assistant|>dog</s>"  # this template writes no header before the answer
    assert by_number[1] == "<|assistant|>two</s>"
    assert next(row for row in drawn.rows if row.number == 2).completion == 1


def test_answers_that_were_cut_off_are_said(folder, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        keys = {"text": "{question} and a very long introduction: ", "completion": "{answer}"}
        with refused(DataError, "no-answers", "all 4 rows"):
            draw(tokenizer, folder / "rows.json", **keys, objective="joint", num_samples=4, max_seq_length=5)
        keys["text"] = "{question}"
        path = folder / "uneven.jsonl"
        rows = [{"question": "one two " * (1 + 40 * (number == 2)), "answer": "three"} for number in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        drawn = draw(tokenizer, path, **keys, objective="joint", num_samples=4, max_seq_length=30)
    assert "1 of 4 rows" in caplog.text
    assert "raise `max_seq_length`" in caplog.text
    assert sum(row.completion == len(row.ids) for row in drawn.rows) == 1


def test_chats_whose_answer_cannot_be_told_are_said(tmp_path, tokenizer, caplog):
    path = tmp_path / "chat.jsonl"
    chats = [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with caplog.at_level(logging.WARNING):
        drawn = draw(tokenizer, path, objective="joint", num_samples=2)
        assert "1 of 2 rows" in caplog.text
        assert sorted(row.completion > 1 for row in drawn.rows) == [False, True]
        caplog.clear()
        draw(tokenizer, path, num_samples=2)  # features count whole rows anyway
    assert not caplog.text


def test_completion_beside_messages_is_refused(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "answer": "x"}) + "\n")
    with refused(DataError, "conflicting-keys", path, "`completion`"):
        draw(tokenizer, path, completion="answer", objective="joint")


def test_an_empty_dataset(tmp_path):
    """A file whose rows are all blank."""
    (tmp_path / "rows.txt").write_text("\n\n \n")
    with refused(DataError, "too-few-rows", tmp_path / "rows.txt"):
        load_rows(str(tmp_path / "rows.txt"), None, "train")


# --- rows that cannot be used -----------------------------------------------------------------------------------------


def test_a_bad_row_is_replaced_by_the_next(tmp_path, tokenizer, caplog):
    """Of every kind; one line says how many, and why the first. More rows begin with the same rows."""
    rows = [{"text": f"row {number}"} for number in range(40)]
    for number, bad in enumerate([{"text": None}, {"text": " "}, {"other": 1}, {"text": ["x"]}, {"text": "\0"}]):
        rows[7 * number] = bad
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with path.open("a") as file:
        file.write('{"text": "broken\n')
    good = [number for number in range(40) if number % 7 or number == 35]
    every = [row.number for row in draw(tokenizer, path, num_samples=35, seed=3).rows]
    assert sorted(every) == good
    assert every == [number for number in sample_numbers(41, 3) if number in good]
    for count in (1, 5, 20):
        caplog.clear()
        drawn = draw(tokenizer, path, num_samples=count, seed=3)
        assert [row.number for row in drawn.rows] == every[:count]
        seen = list(islice(sample_numbers(41, 3), 41))
        seen = seen[: seen.index(every[count - 1]) + 1]
        bad = [number for number in seen if number not in good]
        assert len(caplog.records) == bool(bad)
        if bad:
            assert f"{len(bad)} of the {len(seen)} rows that were drawn" in caplog.text
            assert f"the first: row {bad[0]} of {path}" in caplog.text


def test_too_few_good_rows(tmp_path, tokenizer, caplog):
    """None is an error with the first reason; fewer than `num_samples` a warning."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": None}, {"text": ""}, {"text": "the fox"}])
    drawn = draw(tokenizer, path, num_samples=3)
    assert [row.number for row in drawn.rows] == [2]
    assert "has 1 rows to fit, fewer than num_samples = 3" in caplog.text
    assert "2 of the 3 rows that were drawn" in caplog.text
    write_jsonl(path, [{"text": None}, {"text": None}])
    with refused(DataError, "unusable-row", "all 2 rows", "the first: row", "is missing"):
        draw(tokenizer, path)


def test_many_bad_rows_end_the_search(tmp_path, tokenizer, monkeypatch):
    """A large dataset is not searched to its end for a good row."""
    monkeypatch.setattr("mergekit_slta.data.draw.MAX_UNUSABLE", 20)
    rows = [{"text": "fox" if number == 990 else None} for number in range(1000)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with refused(DataError, "unusable-row", "20 rows in a row", "the first: row"):
        draw(tokenizer, path, "text")
    rows = [{"text": "fox" if number % 3 == 0 else None} for number in range(1000)]  # never so many in a row
    assert len(draw(tokenizer, write_jsonl(path, rows), "text", num_samples=100).rows) == 100


# --- the answer stands in the row once --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        ("{question} {answer}", "{answer}"),
        ("{question} {answer}", "answer"),
        ("{question}\nA: {answer}\n", " {answer}"),
        ("{question}{answer}</s>", "{answer}"),
        ("[INST] {question} [/INST] {answer} <|im_end|>\n", "{answer}"),
        ("{question} = {answer} {number}.", "{answer} {number}"),
        ("answer", "answer"),
    ],
)
def test_an_answer_that_the_text_has_already(folder, tokenizer, text, completion):
    """`completion` follows `text`: with both, it would be there twice."""
    with refused(DataError, "conflicting-keys", folder / "rows.json", "`text`", "`completion`"):
        draw(tokenizer, folder / "rows.json", text, completion=completion)


def test_an_answer_that_a_column_has_already(tmp_path, tokenizer):
    """A column with the whole text, or a `prompt` that ends with its `completion`."""
    pairs = [("what is 1? one", "one"), ("what is 2? two </s>", "two")]
    whole = write_jsonl(tmp_path / "whole.jsonl", [{"whole": text, "end": end} for text, end in pairs])
    with refused(DataError, "conflicting-keys", whole, "`text`", "`completion`"):
        draw(tokenizer, whole, "whole", completion="end")
    found = write_jsonl(tmp_path / "found.jsonl", [{"prompt": text, "completion": end} for text, end in pairs])
    with refused(DataError, "conflicting-keys", found):
        draw(tokenizer, found)


def test_prompts_that_name_the_answer_among_others(tmp_path, tokenizer):
    """Multiple choice, a hint in the middle, a prompt that happens to end like its answer: all are legitimate."""
    rows = [
        {"question": f"{number}?", "options": "one, two", "answer": ["one", "two"][number % 2]} for number in range(6)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for text in ("{question} {options}", "{answer}: {question}", "say {answer}, and again: "):
        drawn = draw(tokenizer, path, text, completion="{answer}", objective="joint")
        assert len(drawn.rows) == 6
        assert {answer.strip() for answer in answers(tokenizer, drawn)} == {"one</s>", "two</s>"}


def test_an_answer_that_begins_with_its_prompt(tmp_path, tokenizer):
    """A column with the whole text as `completion`."""
    rows = [{"q": f"what is {number}? ", "full": f"what is {number}? it is {number}"} for number in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for text in ("q", "{q}", "{q}\n"):
        with refused(DataError, "conflicting-keys", path, "`text`", "`completion`"):
            draw(tokenizer, path, text, completion="full")
    rows = [{"q": str(number), "next": str(10 * number + 1)} for number in range(4)]  # 1 -> 11 is no repetition
    assert len(draw(tokenizer, write_jsonl(path, rows), "{q}: ", completion="next").rows) == 4


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_some_answers_that_are_there_twice(tmp_path, tokenizer, caplog, count):
    """More than half are refused; fewer are counted in a warning."""
    rows = [
        {"q": f"what is {number}?" + f" {number * 'x'}." * (number <= count), "a": f"{number * 'x'}."}
        for number in range(1, 5)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    if count > 2:
        with refused(DataError, "conflicting-keys", path):
            draw(tokenizer, path, "q", completion="{a}")
        return
    assert len(draw(tokenizer, path, "q", completion="{a}", num_samples=4).rows) == 4
    assert len(caplog.records) == bool(count)
    assert not count or f"{count} of 4 prompts of {path} end with their answer" in caplog.text


def test_an_ending_that_all_prompts_share(tmp_path, tokenizer, caplog):
    """Most answers may be the last of the choices."""
    rows = [{"q": f"is {number} odd, yes or no?", "a": "yes" if number == 1 else "no?"} for number in range(4)]
    assert (
        len(draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows), "q", completion="a", num_samples=4).rows) == 4
    )
    assert not caplog.text


def test_a_typo_in_completion_names_completion(folder, tokenizer):
    for value, code in (("anser", "missing-column"), ("{anser}", "missing-column"), ("{answer", "invalid-template")):
        with refused(DataError, code, "`completion`", "anser" if code == "missing-column" else value):
            draw(tokenizer, folder / "rows.json", "question", completion=value)


def test_jinja_in_completion(folder, tokenizer):
    with refused(DataError, "invalid-template", "`completion`", "'{{answer}}'", "write {answer} for a column"):
        draw(tokenizer, folder / "rows.json", "question", completion="{{answer}}")
    for template, text in (("{{{question}}}", "{q0}"), ('{{"q": "{question}"}}', '{"q": "q0"}')):  # these are meant
        assert draw(tokenizer, folder / "rows.json", template, split="train[:1]").rows[0].text == text


def test_a_template_over_messages(tmp_path, tokenizer):
    """It would print the messages as a list; the message names the column alone."""
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "fox", "messages": messages}] * 3)
    with refused(DataError, "invalid-template", "'messages'", "write `text: messages`, without braces"):
        draw(tokenizer, path, "{messages}")
    with refused(DataError, "invalid-template", "`completion`", "`text: messages`", "drop `completion`"):
        draw(tokenizer, path, "q", completion="{messages}")


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ({"question": "Who?", "answer": "I"}, [r'`text: "{question}\n"`', '`completion: "{answer}"`', "init"]),
        ({"question": "Who", "answer": "I"}, ['`text: "{question} "`', '`completion: "{answer}"`']),
        ({"content": "fox"}, ["`text: content`"]),
        ({"a": 1, "b": 2}, ["conversations", "set `text` to a column or a template"]),
    ],
)
def test_rows_that_need_keys_name_those_that_init_writes(tmp_path, tokenizer, row, values):
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    with refused(DataError, "missing-column", *row, *values):
        draw(tokenizer, path)


def test_an_unusable_completion_names_the_key(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "fox", "a": ["dog"]}])
    with refused(DataError, "unusable-row", "'a' that is list", "choose another `text` or `completion`"):
        draw(tokenizer, path, "q", completion="a")


def test_an_empty_answer_is_no_answer(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "fox", "a": answer} for answer in ("", " \n", "dog")])
    assert [row.number for row in draw(tokenizer, path, "q", completion="a").rows] == [2]


def test_values_that_are_no_text(tmp_path, tokenizer):
    """Numbers and dates are written; a time, whose format is not known, and what is missing are not."""
    import datetime
    import decimal

    import pandas
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "number": [1, None, 3], "part": [1.5, float("nan"), 2.0], "day": [datetime.date(2024, 1, 2)] * 3,
            "price": [decimal.Decimal("1.10")] * 3, "time": [pandas.Timestamp("2024-01-02")] * 3,
        }
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    drawn = draw(tokenizer, tmp_path / "rows.parquet", "{number} {part} {day} {price}")
    assert {row.text for row in drawn.rows} == {"1 1.5 2024-01-02 1.10", "3 2.0 2024-01-02 1.10"}
    assert {row.text for row in draw(tokenizer, tmp_path / "rows.parquet", "of {part}").rows} == {"of 1.5", "of 2.0"}
    with refused(DataError, "unusable-row", "'time'", "is datetime"):
        draw(tokenizer, tmp_path / "rows.parquet", "{number} {time}")


# --- rows that are held out -------------------------------------------------------------------------------------------


def texts(path, words):
    """A row for each word, in a file; returns its path."""
    return write_jsonl(path, [{"text": f"the {word}"} for word in words])


def numbers(rows) -> list[int]:
    return [row.number for row in rows]


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (14, 0), (15, 3), (19, 3), (20, 4), (149, 29), (150, 30), (400, 30)]
)
def test_the_last_fifth_of_the_permutation_is_held_out(tmp_path, tokenizer, count, held_out):
    """At most 30 rows, none if these are fewer than 3; the rest is there to be drawn, in the permutation's order."""
    path = texts(tmp_path / "rows.jsonl", range(count))
    drawn = draw(tokenizer, path, evaluate=True, num_samples=1000, seed=3)
    order = list(sample_numbers(count, 3))
    assert numbers(drawn.held_out) == (order[-held_out:] if held_out else [])
    assert numbers(drawn.rows) == order[: count - held_out]
    assert numbers(drawn.acceptance) == numbers(drawn.held_out)[: (held_out + 1) // 2]
    assert numbers(draw(tokenizer, path, num_samples=1000, seed=3).rows) == order  # nothing is held out


def test_the_first_rows_do_not_depend_on_their_number(tmp_path, tokenizer):
    """The same rows are held out, and the same come first, for every number of rows and groups of rows."""
    path = texts(tmp_path / "rows.jsonl", range(40))
    whole = draw(tokenizer, path, evaluate=True, num_samples=1000)
    assert (len(whole.rows), len(whole.held_out)) == (32, 8)
    for keys in ({"num_samples": 1}, {"num_samples": 5}, {"num_samples": 5, "own": JointSettings(steps=3)}):
        drawn = draw(tokenizer, path, evaluate=True, **keys)
        assert len(drawn.rows) == keys["num_samples"] * (3 if "own" in keys else 1)
        assert drawn.rows == whole.rows[: len(drawn.rows)]
        assert drawn.held_out == whole.held_out


def test_rows_with_the_tokens_of_a_held_out_row_are_not_drawn(tmp_path, tokenizer, caplog):
    """In any task, whatever their text beyond the cut; what remains is counted in the warning."""
    one = texts(tmp_path / "one.jsonl", [f"fox {number}" for number in range(10, 30)])
    order = list(sample_numbers(20, 42))
    held = order[-4:]
    ends = [10 + number for number in held]  # two also in the second task, one twice, one with another end
    others = [f"fox {ends[0]}", f"fox {ends[0]}", f"fox {ends[1]} {'and so on ' * 9}", *(f"dog {n}" for n in range(7))]
    two = texts(tmp_path / "two.jsonl", others)
    keys = {"evaluate": True, "num_samples": 30}
    short = {"max_seq_length": len(tokenizer("the fox 10").input_ids)}
    first, second = draw_rows([source(tokenizer, path, **keys, **short) for path in (one, two)])
    assert sorted(numbers(first.held_out)) == sorted(held)
    assert not second.held_out  # a fifth of ten rows is fewer than 3
    tokens = {row.ids for row in first.held_out}
    assert not tokens & {row.ids for row in (*first.rows, *second.rows)}
    assert sorted(numbers(second.rows)) == [3, 4, 5, 6, 7, 8, 9]
    assert (
        f"{two} has 7 rows to fit, fewer than num_samples = 30: all are used; 3 have the tokens of held-out"
        in caplog.text
    )
    assert f"{one} has 16 rows to fit, fewer than num_samples = 30: all are used; 4 others are held out" in caplog.text


def test_tasks_that_share_a_file_hold_out_the_same_rows(tmp_path, tokenizer):
    path = texts(tmp_path / "rows.jsonl", range(25))
    one, other = draw_rows([source(tokenizer, path, evaluate=True) for _ in range(2)])
    assert one == other
    assert len(one.held_out) == 5
    assert not {row.ids for row in one.held_out} & {row.ids for row in one.rows}


@pytest.mark.parametrize("other", [False, True])
def test_without_other_rows_nothing_is_held_out(tmp_path, tokenizer, other):
    """A task whose rows all hold the same tokens, and one whose rows are all held out of another task."""
    same = texts(tmp_path / "same.jsonl", ["fox"] * 20)
    many = texts(tmp_path / "many.jsonl", range(20))
    held = list(sample_numbers(20, 42))[-4:]
    few = texts(tmp_path / "few.jsonl", held)
    sources = [source(tokenizer, path, evaluate=True) for path in ([many, few] if other else [same])]
    drawn = draw_rows(sources)
    assert [rows.held_out for rows in drawn] == [()] * len(drawn)
    assert [len(rows.rows) for rows in drawn] == [20, 4][: len(drawn)]


def test_only_the_task_without_other_rows_holds_none_out(tmp_path, tokenizer):
    """A task with many rows still holds some out: all but those that are all the rows of another task."""
    same, many = texts(tmp_path / "same.jsonl", ["fox"] * 20), texts(tmp_path / "many.jsonl", range(40))
    held = list(sample_numbers(40, 42))[-8:]
    for other, left in ((same, held), (texts(tmp_path / "few.jsonl", held[:2]), held[2:])):
        for paths in ([other, many], [many, other]):
            drawn = draw_rows([source(tokenizer, path, evaluate=True) for path in paths])
            (few, enough) = drawn if paths[0] == other else drawn[::-1]
            assert few.held_out == ()
            assert numbers(enough.held_out) == left
            tokens = {row.ids for row in enough.held_out}
            assert not tokens & {row.ids for row in (*few.rows, *enough.rows)}


def test_rows_that_cannot_be_used_are_not_held_out(tmp_path, tokenizer):
    """Nor rows without an answer; others take their place. If the usable ones are all held out, they are fitted."""
    order = list(sample_numbers(30, 42))
    rows = [{"q": "the fox", "a": f"dog {number}"} for number in range(30)]
    rows[order[-1]] = {"q": "the fox", "a": " "}
    rows[order[-3]] = {"q": "the quick fox " * 9, "a": "dog"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    drawn = draw(tokenizer, path, "{q} ", completion="{a}", evaluate=True, max_seq_length=20)
    assert numbers(drawn.held_out) == [*order[-8:-3], order[-2]]  # six, as of 30 good rows
    for number in (*order[:-6], order[-3]):
        rows[number] = {"q": None, "a": None}
    drawn = draw(tokenizer, write_jsonl(path, rows), "{q} ", completion="{a}", evaluate=True, max_seq_length=20)
    assert not drawn.held_out
    assert set(order[-6:-3]) < set(numbers(drawn.rows))


def test_bad_rows_at_the_end_are_not_searched_for_ever(tmp_path, tokenizer, monkeypatch):
    """A large dataset without a usable row is refused after some rows at either end."""
    monkeypatch.setattr("mergekit_slta.data.draw.MAX_UNUSABLE", 20)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": None}] * 1000)
    opened = source(tokenizer, path, "text", evaluate=True)
    seen = []
    real = opened._tokenized
    monkeypatch.setattr(opened, "_tokenized", lambda number: (seen.append(number), real(number))[1])
    with refused(DataError, "unusable-row", "20 rows in a row"):
        draw_rows([opened])
    assert len(seen) < 80
