"""What is found in a dataset's columns without `text`: chats of every spelling, prompts with answers, preferences."""

from __future__ import annotations

import json

import pytest
from conftest import make_tokenizer, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import answers, draw, write_jsonl

from mergekit_slta.data.formats import ALPACA, BadRow, find_format, raw_messages, read_messages
from mergekit_slta.data.rendering import renderer
from mergekit_slta.data.templates import ChatTemplate
from mergekit_slta.errors import DataError

ASK, REPLY = {"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}
CHAT = [ASK, REPLY]
SHAREGPT = [{"from": "human", "value": "fox"}, {"from": "gpt", "value": "dog"}]
ALPACA_PROMPT = ALPACA.format(paired="", instruction="fox", input="")
ALPACA_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nfox\n\n### Input:\nlazy\n\n### Response:\n"
)
FOUND = {
    "messages": ({"messages": CHAT}, CHAT),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, CHAT),
    "messages as Python writes them": ({"messages": str(CHAT)}, CHAT),
    "messages in columns": ({"messages": {"role": ["user", "assistant"], "content": ["fox", "dog"]}}, CHAT),
    "ShareGPT": ({"conversations": SHAREGPT, "id": "x"}, CHAT),
    "ShareGPT in `messages`": ({"messages": SHAREGPT}, CHAT),
    "ShareGPT, other names": (
        {"conversations": [{"from": "Human", "value": "fox"}, {"from": "chatgpt", "value": "dog"}]}, CHAT,
    ),
    "roles in `conversation`": ({"conversation": CHAT}, CHAT),
    "roles of ShareGPT": ({"messages": [{"role": "human", "content": "fox"}, {"role": "gpt", "content": "dog"}]}, CHAT),
    "roles of OpenAssistant": ({"messages": [{"role": "prompter", "content": "fox"}, REPLY]}, CHAT),
    "system prompt in a column": (
        {"conversations": SHAREGPT, "system": "lazy"}, [{"role": "system", "content": "lazy"}, *CHAT]
    ),
    "text blocks": ({"messages": [{**ASK, "content": [{"type": "text", "text": "f"}, "ox"]}, REPLY]}, CHAT),
    "text blocks of a table": (
        {"messages": [{**ASK, "content": [{"type": "text", "text": "fox", "image_url": None}], "name": None}, REPLY]},
        CHAT,
    ),
    "chosen": ({"chosen": CHAT, "rejected": [ASK, {**REPLY, "content": "cat"}]}, CHAT),
    "chosen with the prompt": ({"prompt": "fox", "chosen": CHAT, "rejected": CHAT}, CHAT),
    "chosen after the prompt": ({"prompt": [ASK], "chosen": [REPLY], "rejected": [REPLY]}, CHAT),
    "chosen after the prompt's text": ({"prompt": "fox", "chosen": [REPLY]}, CHAT),
    "chosen message": ({"prompt": "fox", "chosen": REPLY}, CHAT),
    "chosen text": ({"prompt": "the fox", "chosen": " a dog", "rejected": " x"}, ("the fox", " a dog")),
    "chosen text with its prompt": ({"prompt": "the fox", "chosen": "the fox a dog"}, ("the fox", " a dog")),
    "chosen dialogue": ({"chosen": "Human: fox\n\nAssistant: dog"}, ("", "Human: fox\n\nAssistant: dog")),
    "chosen dialogue beside the other": (
        {"chosen": "\n\nHuman: fox\n\nAssistant: the dog", "rejected": "\n\nHuman: fox\n\nAssistant: the cat"},
        ("\n\nHuman: fox\n\nAssistant:", " the dog"),
    ),
    "chosen ChatML beside the other": (
        {"chosen": "<|im_start|>assistant\nthe dog", "rejected": "<|im_start|>assistant\nthe cat"},
        ("<|im_start|>assistant", "\nthe dog"),
    ),
    "chosen text beside the other": ({"chosen": "the fox dog", "rejected": "the fox door"}, ("the fox", " dog")),
    "completion with its prompt": ({"prompt": "the fox", "completion": "the fox a dog"}, ("the fox", " a dog")),
    "response with its prompt": ({"prompt": "fox", "response": "fox\ndog"}, CHAT),
    "prompt and completion": ({"prompt": "the fox", "completion": " a dog"}, ("the fox", " a dog")),
    "prompt and completion, chats": ({"prompt": [ASK], "completion": [REPLY]}, CHAT),
    "prompt and response": ({"prompt": "fox", "response": "dog"}, CHAT),
    "prompt and response, chats": ({"prompt": [ASK], "response": "dog"}, CHAT),
    "Alpaca": ({"instruction": "fox", "input": "", "output": "dog", "text": "x"}, CHAT),
    "Alpaca without input": ({"instruction": "fox", "output": "dog"}, CHAT),
    "Alpaca with input": (
        {"instruction": "fox", "input": "lazy", "output": "dog"}, [{**ASK, "content": "fox\nlazy"}, REPLY]
    ),
    "Dolly": (
        {"instruction": "fox", "context": "lazy", "response": "dog", "category": "x"},
        [{**ASK, "content": "fox\nlazy"}, REPLY],
    ),
    "Alpaca with history": (
        {"instruction": "fox", "output": "dog", "history": [["one", "two"]], "system": "lazy"},
        [{"role": "system", "content": "lazy"}, {**ASK, "content": "one"}, {**REPLY, "content": "two"}, *CHAT],
    ),
    "text": ({"text": "the fox", "number": 3}, ("", "the fox")),
    "messages in `text`": ({"text": CHAT}, CHAT),
    "`messages` that are a text": ({"messages": "fox", "text": "the fox"}, ("", "the fox")),
}  # fmt: skip


TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER


@pytest.mark.parametrize("name", FOUND)
def test_found_without_text(tmp_path, tokenizer, name):
    """The row is what the tokenizer's own rendering of the messages is, or the texts one after the other; the answer is
    known, and ends with the end token."""
    row, expected = FOUND[name]
    drawn = draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row] * 2), objective="joint")
    if isinstance(expected, list):
        text = tokenizer.apply_chat_template(expected, tokenize=False)
        answer = "<|assistant|>dog</s>"
    else:
        text, answer = "".join(expected), expected[1] + ("</s>" if expected[0] else "")
    assert {each.text for each in drawn.rows} == {text}
    assert set(answers(tokenizer, drawn)) == {answer}


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"instruction": "fox", "output": "dog"}, ALPACA_PROMPT + "dog", "dog"),
        ({"instruction": "fox", "input": "lazy", "output": "dog"}, ALPACA_PAIRED + "dog", "dog"),
        ({"prompt": "fox", "response": "dog"}, "fox\ndog", "dog"),
    ],
)
def test_without_a_chat_template(tmp_path, row, text, answer):
    """Alpaca's own prompt, and a line break between prompt and response."""
    tokenizer = make_tokenizer(chat_template=None)
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    drawn = draw(tokenizer, path, objective="joint", max_seq_length=400)
    assert {each.text for each in drawn.rows} == {text}
    assert set(answers(tokenizer, drawn)) == {answer + "</s>"}


def test_chats_of_a_table(tmp_path, tokenizer):
    """Parquet gives every message all keys; those without a value are no part of it."""
    import datasets

    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if 'name' in m %}!{{ m.name }}{% endif %}{% endfor %}"
    )
    named = [{**ASK, "name": "ann"}, {**REPLY, "name": None}]
    datasets.Dataset.from_list([{"messages": named}] * 2).to_parquet(tmp_path / "rows.parquet")
    drawn = draw(make_tokenizer(template), tmp_path / "rows.parquet")
    assert {each.text for each in drawn.rows} == {"<|user|>fox!ann<|assistant|>dog"}


def test_tool_calls_reach_the_template_as_they_are(tmp_path):
    """A message without content that calls a tool; the row's `tools`; both as JSON or not."""
    template = (
        "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content or m.tool_calls[0].function.name }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    chat = [ASK, call, {"role": "tool", "content": "3"}, REPLY]
    tools = [{"type": "function", "function": {"name": "look"}}]
    written = [ASK, {**call, "tool_calls": json.dumps(call["tool_calls"])}, *chat[2:]]
    rows = [{"messages": chat, "tools": tools}, {"messages": written, "tools": json.dumps(tools)}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    drawn = draw(make_tokenizer(template), path)
    assert {each.text for each in drawn.rows} == {"look;<|user|>fox<|assistant|>look<|tool|>3<|assistant|>dog"}


def test_tool_calls_that_the_template_drops(tmp_path, tokenizer):
    """An empty turn would be left."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [ASK, call]}])
    with refused(DataError, "unusable-row", "'look'"):
        draw(tokenizer, path)


def test_nulls_inside_calls_of_a_table():
    """Parquet gives every call the arguments of all functions."""
    call = {"function": {"name": "look", "arguments": {"at": "fox", "with": None}}}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [{"function": {"name": "look", "arguments": {"at": "fox"}}}]


def test_an_answer_that_begins_otherwise_than_its_prompt(tmp_path):
    """Templates of reasoning models begin an answer with a mark that they do not write before a given one."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    drawn = draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2), objective="joint")
    assert set(answers(tokenizer, drawn)) == {"<|assistant|>dog"}


def test_a_template_that_prints_blocks_only(tmp_path):
    """Content is given as a text block where a text would be dropped."""
    template = "{% for m in messages %}<|{{ m.role }}|>{% for b in m.content %}{{ b.text }}{% endfor %}{% endfor %}"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 2)
    assert {each.text for each in draw(make_tokenizer(template), path).rows} == {"<|user|>fox<|assistant|>dog"}


PRINTS = {
    "trims": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}",
    "drops thoughts": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].strip() }}{% endfor %}"
    ),
    "escapes": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson }}{% endfor %}",
    "drops the system prompt": (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", PRINTS)
def test_contents_that_a_template_rewrites(tmp_path, name):
    """A trimmed, shortened or escaped content is printed; a system prompt may be left out."""
    chat = [
        {"role": "system", "content": "lazy"}, {"role": "user", "content": '  a "fox"\n'},
        {"role": "assistant", "content": "<think>\nno\n</think>\n\nyes\n"}, {"role": "tool", "content": '{"a": 1}\n'},
        {"role": "assistant", "content": "dog"},
    ]  # fmt: skip
    tokenizer = make_tokenizer(PRINTS[name])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}] * 2)
    assert {row.text for row in draw(tokenizer, path).rows} == {tokenizer.apply_chat_template(chat, tokenize=False)}


def test_messages_that_a_template_drops(tmp_path):
    """Such rows are left out; the content need not be unlike the rest."""
    template = "{% for m in messages if m.role in 'user assistant' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    rows = [{"messages": [ASK, {"role": "ipython", "content": "fox"}, REPLY]}, {"messages": CHAT}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row.number for row in draw(make_tokenizer(template), path).rows] == [1]
    with refused(DataError, "unusable-row", f"row 0 of {path}", "message 1", "'ipython'", "does not print"):
        draw(make_tokenizer(template), write_jsonl(path, rows[:1]))


@pytest.mark.parametrize("role", ["customer", "agent", "User:"])
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_that_no_template_names(tmp_path, tokenizer, role, key):
    """A role in a list of roles is held to the same names as one of ShareGPT's; a template may name others."""
    messages = [{key: role, "content": "fox"}, REPLY]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    with refused(DataError, "unusable-row", f"row 0 of {path}", "message 0", repr(role), "prompter"):
        draw(tokenizer, path)
    template = (
        f"{{% for m in messages %}}{{% if m.role == '{role}' %}}Q: {{% endif %}}{{{{ m.content }}}};{{% endfor %}}"
    )
    assert {row.text for row in draw(make_tokenizer(template), path).rows} == {"Q: fox;dog;"}


@pytest.mark.parametrize(
    ("messages", "values"),
    [
        ([{"from": "moon", "value": "fox"}], ["message 0", "'moon'"]),
        ([{"value": "fox"}, ASK], ["message 0", "no role"]),
        ([ASK, {"role": "assistant", "content": None}], ["message 1", "no content"]),
        ([ASK, {"role": "assistant", "text": "dog"}], ["message 1", "no content"]),
        ([ASK, {"role": "assistant", "content": " \n"}], ["message 1", "is empty"]),
        ([{"from": "human", "value": ""}], ["message 0", "is empty"]),
        ([ASK, {"role": "assistant", "content": None, "function_call": {"name": "x"}}], ["message 1", "no content"]),
        ([{"role": "user", "content": 3}], ["message 0", "int"]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], ["message 0", "'image_url'"]),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], ["message 0", "'text'"]),
        ([ASK, {**REPLY, "tool_calls": ["look"]}], ["message 1", "`tool_calls`"]),
        ('[{"role": "user", "content"', ["not valid JSON"]),
        ({"role": ["user", "assistant"], "content": ["fox"]}, ["unequal length"]),
    ],
)
def test_bad_chats(tmp_path, tokenizer, messages, values):
    """No role, an unknown one, no text, an image: another row is drawn; named where there is none."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    with refused(DataError, "unusable-row", f"row 0 of {path}", *values):
        draw(tokenizer, path, "messages")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}, {"messages": CHAT}])
    assert [row.number for row in draw(tokenizer, path).rows] == [1]


def test_unwanted_completions(tmp_path, tokenizer):
    """TRL's `label` of a completion that was not wanted."""
    rows = [{"prompt": "fox", "completion": " dog", "label": label} for label in (False, True)]
    assert [row.number for row in draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows)).rows] == [1]


def test_any_column_may_hold_messages(tmp_path, tokenizer):
    """`text: conversations` is what is found without it, whatever the column is called."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"body": SHAREGPT, "answer": "x"}] * 2)
    drawn = draw(tokenizer, path, "body", objective="joint")
    assert {each.text for each in drawn.rows} == {tokenizer.apply_chat_template(CHAT, tokenize=False)}
    assert set(answers(tokenizer, drawn)) == {"<|assistant|>dog</s>"}
    with refused(DataError, "conflicting-keys", path, "`body`", "`completion`"):
        draw(tokenizer, path, "body", completion="answer")
    with refused(DataError, "conflicting-keys", path, "`body`", "`completion`"):
        draw(tokenizer, path, "answer", completion="body")


def test_a_dialogue_whose_answer_cannot_be_told(tmp_path, tokenizer, caplog):
    """Without `rejected`, or with one that is alike: said, as of chats."""
    for number, row in enumerate([{"chosen": "fox and dog"}, {"chosen": "fox and dog", "rejected": "fox and dog"}]):
        caplog.clear()
        drawn = draw(tokenizer, write_jsonl(tmp_path / f"{number}.jsonl", [row, {**row, "n": 1}]), objective="joint")
        assert {each.completion for each in drawn.rows} == {1}
        assert "2 of 2 rows" in caplog.text
        assert "the whole row" in caplog.text


@pytest.mark.parametrize("answer", ["chosen", "response", "completion"])
def test_an_answer_that_only_happens_to_begin_like_its_prompt(tmp_path, tokenizer, answer):
    """Most rows decide whether prompts are repeated."""
    rows = [{"prompt": prompt, answer: f"Hi! {prompt}"} for prompt in ("Hi", "fox", "dog")]
    drawn = draw(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows), num_samples=3)
    assert all("Hi! " in row.text for row in drawn.rows)


def test_nothing_found(tmp_path, tokenizer):
    """The columns, and what would be found."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "fox", "chosen": "dog"}])
    with refused(DataError, "missing-column", "question, chosen", "conversations", "prompt with completion"):
        draw(tokenizer, path)


def test_the_order_of_the_table_decides():
    """Several formats in one row; a bad chat is no reason to take another column."""
    row = {"messages": CHAT, "chosen": CHAT, "prompt": "fox", "completion": "dog", "text": "fox"}
    order = []
    while row:
        found = find_format([row])
        order.append(found.columns)
        row = {key: value for key, value in row.items() if key not in found.columns.split(" with ")}
        if order[-1] == "prompt with completion":
            row["text"] = "fox"
    assert order == ["messages", "chosen", "prompt with completion", "text"]
    bad = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "text": "fox"}
    assert find_format([{"text": None}, bad]).columns == "messages"
    assert find_format([]) is None


def test_raw_messages_are_left_alone():
    """Reading does not change the row."""
    row = [{"from": "human", "value": [{"type": "text", "text": "fox"}], "weight": None}]
    before = json.dumps(row)
    assert read_messages(raw_messages(row)) == [ASK]
    assert json.dumps(row) == before
    assert raw_messages([]) is None
    assert raw_messages(["fox"]) is None
    assert raw_messages("[1, 2]") is None
    with pytest.raises(BadRow):
        raw_messages('[{"role": "user",')


KEYS = st.sampled_from(["role", "from", "content", "value", "tool_calls", "function", "name", "type", "text"])
TEXTS = st.sampled_from(["user", "human", "gpt", "moon", "", " ", "x", "[", '[{"role": "user", "content": "a"}]'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1) | st.floats(0, 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
COLUMNS = st.sampled_from(
    "messages conversations chosen prompt completion response instruction output history system tools text".split()
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(COLUMNS, VALUES, min_size=1, max_size=4))
def test_any_row_renders_or_is_refused(row):
    """Whatever stands in a row, the outcome is a text or a DataError."""
    template = ChatTemplate.of(TOKENIZER)
    for text in (None, next(iter(row))):
        try:
            rendered = renderer(text, list(row), template, "data", sample=[row])(row, "row 0")
        except DataError:
            continue
        assert isinstance(rendered.text, str)
        assert 0 <= rendered.answer <= len(rendered.text)
