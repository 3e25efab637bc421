"""Which chat template renders a task's rows, what of it is refused, and the date in it."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from conftest import (
    CHAT_TEMPLATE,
    WORDS,
    assert_refused,
    make_tokenizer,
    mergekit_yaml,
    read,
    refused,
    slta,
)
from transformers import AutoTokenizer

from mergekit_slta import Alphas
from mergekit_slta.calibration.recorded_day import recorded_day
from mergekit_slta.data.templates import ChatTemplate, Template
from mergekit_slta.errors import DataError, RecipeError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries.mergekit import chat_template_text
from mergekit_slta.recipe.read import check_content
from mergekit_slta.runtime.resume import ResumeStore

CHATS = [
    [
        {"role": "user", "content": " ".join(WORDS[number : number + 4])},
        {"role": "assistant", "content": " ".join(WORDS[number + 2 : number + 7])},
    ]
    for number in range(8)
]
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }} {% for message in messages %}{{ message['content'] }} {% endfor %}"
TOKENS = ["<|im_start|>", "<|im_end|>"]


def with_tokens(template=PLAIN, tokens=TOKENS):
    """A tokenizer that has tokens of its own, within the embeddings' 320 rows."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


@pytest.fixture
def chats(tiny, tmp_path):
    """Make a recipe over chats; each expert may get another tokenizer than the base's, and each task keys."""

    def make(*tokenizers, keys=({}, {}), base=None, **top):
        data = tmp_path / "chats.jsonl"
        data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
        recipe = tiny.recipe(2, num_samples=4)
        recipe["base_model"] = str(tiny.base if base is None else model(tmp_path / "base", tiny.base, base))
        for number, (entry, own) in enumerate(zip(recipe["models"], keys, strict=True)):
            if number < len(tokenizers) and tokenizers[number] is not None:
                path = model(tmp_path / f"expert{number}", tiny.experts[number], tokenizers[number])
                entry["model"] = str(path)
            entry["parameters"] = {"dataset": str(data), **own}
        return {**recipe, **top}

    return make


def model(path: Path, source: Path, tokenizer) -> Path:
    """A copy of a model with another tokenizer."""
    shutil.copytree(source, path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    return path


def texts(job, task=0):
    """The rendered rows, by their numbers in the dataset."""
    return {row.number: row.text for row in job.rows[task].rows}


def by_hand(template, tokenizer, rows):
    """The same rows, rendered by transformers alone."""
    return {
        number: tokenizer.apply_chat_template(CHATS[number], chat_template=template, tokenize=False) for number in rows
    }


@pytest.mark.parametrize(
    ("own", "key", "top", "expected", "origin"),
    [
        (PLAIN, None, None, PLAIN, "model"),
        (None, None, None, CHAT_TEMPLATE, "output"),
        (PLAIN, None, "mistral", chat_template_text("mistral"), "output"),
        (PLAIN, "model", "mistral", PLAIN, "model"),
        (PLAIN, "output", None, CHAT_TEMPLATE, "output"),
        (PLAIN, "base", "mistral", CHAT_TEMPLATE, "base"),
        (PLAIN, "alpaca", "mistral", chat_template_text("alpaca"), "alpaca"),
        (PLAIN, DATED, None, DATED, "inline"),
        ({"default": PLAIN, "tool_use": DATED}, None, None, PLAIN, "model"),
        ({"tool_use": PLAIN}, None, None, CHAT_TEMPLATE, "output"),
    ],
)
def test_the_template_is_chosen_by_key_recipe_expert_output(chats, options, own, key, top, expected, origin):
    """The model's key, else the recipe's top-level one, else the expert's own template, else the output's; special
    tokens in it are the output's."""
    expert = make_tokenizer(own)
    expert.eos_token = "the"  # a template writes the output's </s>
    keys = ({} if key is None else {"chat_template": key}, {"chat_template": "output"})
    recipe = chats(expert, keys=keys, **({} if top is None else {"chat_template": top}))
    job = prepare(read(recipe), options)
    assert texts(job) == by_hand(expected, make_tokenizer(), texts(job))
    assert job.rows[0].chat_template == origin
    shipped = CHAT_TEMPLATE if top is None else chat_template_text(top)
    assert texts(job, 1) == by_hand(shipped, make_tokenizer(), texts(job, 1))


TOOL_USE = "{{ tools | tojson }} the " + PLAIN


@pytest.mark.parametrize(
    ("own", "base", "key", "top", "expected"),
    [
        ({"default": PLAIN, "tool_use": TOOL_USE}, None, None, None, TOOL_USE),
        ({"default": PLAIN, "rag": DATED}, None, None, None, PLAIN),
        (None, {"default": PLAIN, "tool_use": TOOL_USE}, None, None, TOOL_USE),
        (PLAIN, {"default": PLAIN, "tool_use": TOOL_USE}, "output", None, TOOL_USE),
        (PLAIN, {"default": PLAIN, "tool_use": TOOL_USE}, "base", None, TOOL_USE),
        (PLAIN, {"default": PLAIN, "tool_use": TOOL_USE}, "base", "mistral", TOOL_USE),
        (PLAIN, {"default": PLAIN, "tool_use": TOOL_USE}, "output", "auto", PLAIN),
    ],
)
def test_tools_take_the_template_that_is_for_them(chats, options, tmp_path, own, base, key, top, expected):
    """As in transformers, for every tokenizer's own templates; rows without tools take the default one."""
    tools = [{"type": "function", "function": {"name": "quick", "parameters": {}}}]
    rows = [{"messages": chat, "tools": tools if number % 2 else None} for number, chat in enumerate(CHATS)]
    recipe = chats(make_tokenizer(own), base=make_tokenizer(base), keys=({"chat_template": key} if key else {}, {}))
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["models"][0]["parameters"]["dataset"] = str(tmp_path / "tools.jsonl")
    recipe["parameters"]["num_samples"] = 8
    recipe["parameters"]["max_seq_length"] = 512
    job = prepare(read({**recipe, **({"chat_template": top} if top else {})}), options)
    tokenizer = make_tokenizer({"default": PLAIN, "tool_use": expected})
    assert len(job.rows[0].rows) == 8
    for row in job.rows[0].rows:
        ids = tokenizer.apply_chat_template(**{"conversation": CHATS[row.number], "tools": rows[row.number]["tools"]})
        assert row.text == tokenizer.apply_chat_template(
            CHATS[row.number], tools=rows[row.number]["tools"], tokenize=False
        )
        assert list(row.ids) == list(ids["input_ids"])


def test_only_the_templates_that_are_used_are_checked(chats, options, tmp_path):
    """`tool_use` may write tokens that the output's tokenizer splits, as long as no row has tools."""
    split = {"default": PLAIN, "tool_use": "<|tools|> " + TOOL_USE}
    recipe = chats(with_tokens(split, ["<|tools|>"]))
    prepare(read(recipe), options)
    data = tmp_path / "tools.jsonl"
    data.write_text("".join(json.dumps({"messages": chat, "tools": [{"name": "quick"}]}) + "\n" for chat in CHATS))
    recipe["models"][0]["parameters"]["dataset"] = str(data)
    with refused(DataError, "split-token", "<|tools|>"):
        prepare(read(recipe), options)


def test_a_file_is_a_template(chats, options, tmp_path, monkeypatch):
    """Its path starts at the current folder; its content counts, not its name."""
    monkeypatch.chdir(tmp_path)
    recipe = chats(keys=({"chat_template": "own.jinja"}, {}))
    found = []
    for text in (PLAIN, DATED):
        (tmp_path / "own.jinja").write_text(text, encoding="utf-8-sig")
        job = prepare(read(recipe), options)
        assert texts(job) == by_hand(text, make_tokenizer(), texts(job))
        assert job.rows[0].chat_template == "own.jinja"
        found.append(job.identity)
    assert found[0] != found[1]


def test_alphas_equal_those_of_rows_rendered_by_hand(chats, write_recipe, tmp_path):
    """Through the stock command: experts with templates of their own, and the same rows as plain text."""
    first, second = make_tokenizer(PLAIN), make_tokenizer()
    recipe = chats(first, keys=({}, {"chat_template": "mistral"}))
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    rendered = [by_hand(PLAIN, first, range(8)), by_hand(chat_template_text("mistral"), second, range(8))]
    for number, (entry, rows) in enumerate(zip(recipe["models"], rendered, strict=True)):
        path = tmp_path / f"text{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows.values()))
        entry["parameters"] = {"dataset": str(path)}
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "by_hand")
    assert result.exit_code == 0, result.output
    found, expected = (Alphas.load(tmp_path / name / "slta_alphas.json") for name in ("out", "by_hand"))
    for one, other in zip(found.submodules, expected.submodules, strict=True):
        assert one.alpha == other.alpha
    assert [task["chat_template"] for task in found.calibration["tasks"]] == ["model", "mistral"]
    assert [task["chat_template"] for task in expected.calibration["tasks"]] == [None, None]
    assert found.calibration["truncation"] == "right"


CHATML = chat_template_text("chatml")


@pytest.mark.parametrize(
    ("experts", "keys", "top", "values"),
    [
        ([with_tokens(CHATML)], ({}, {}), {}, ["its own", "tokenizer: {source: union}", "`chat_template: output`"]),
        ([with_tokens(CHAT_TEMPLATE, ["<|user|>"])], ({}, {}), {}, ["its own", "<|user|>"]),
        ([None, with_tokens()], ({"chat_template": "chatml"}, {}), {}, ["chatml", "{source: union}"]),
        ([], ({"chat_template": "chatml"}, {}), {}, ["chatml", "set `chat_template: output`"]),
        ([], ({"chat_template": CHATML}, {}), {}, ["the recipe's"]),
        ([], ({}, {}), {"chat_template": "chatml"}, ["the merged model's", "choose another `chat_template`"]),
        ([], ({"chat_template": "exaone"}, {}), {}, ["[|system|]"]),
        ([with_tokens(CHATML)] * 2, ({}, {}), {"chat_template": "auto"}, ["the merged model's", "{source: union}"]),
        ([with_tokens(None, ["<|user|>"])], ({}, {}), {}, ["the merged model's", "<|user|>"]),
    ],
)
def test_a_template_with_tokens_that_are_split_is_refused(chats, options, write_recipe, experts, keys, top, values):
    """A marker that is one token for the template's model, or looks like one, must be one token of the output's."""
    recipe = chats(*experts, keys=keys, **top)
    with refused(DataError, "split-token", *values):
        prepare(read(recipe), options)
    assert_refused(slta("check", write_recipe(recipe)), "split-token", *values)


@pytest.mark.parametrize(
    ("experts", "keys", "top"),
    [
        ([with_tokens(CHATML)], ({}, {}), {"tokenizer": {"source": "union"}}),
        ([with_tokens(CHATML)], ({"chat_template": "output"}, {}), {}),
        ([make_tokenizer(CHATML)] * 2, ({}, {}), {"chat_template": "auto"}),
        ([make_tokenizer(CHATML)], ({}, {"chat_template": CHATML}), {}),
        ([make_tokenizer(CHATML + "{# another #}")] * 2, ({}, {}), {"chat_template": "chatml"}),
        ([None, with_tokens(CHAT_TEMPLATE, ["<|user|>"])], ({}, {"chat_template": PLAIN}), {}),
    ],
)
def test_a_template_is_fine_where_its_own_model_splits_it_too(chats, options, experts, keys, top):
    """Zephyr writes `<|user|>`, which is seven tokens for itself; `union` keeps tokens; no template, no tokens."""
    recipe = chats(*experts, keys=keys, **top)
    job = prepare(read(recipe), options, for_merge=False)
    if top.get("tokenizer"):
        assert [with_tokens().convert_tokens_to_ids(TOKENS[0]) in row.ids for row in job.rows[0].rows] == [True] * 4


def test_a_marker_in_parts_is_found_whole(chats, options):
    """`'<|' + role + '|>'` is one token for each role, and no marker of its own."""
    joined = CHAT_TEMPLATE.replace("<|{{ message['role'] }}|>", "{{ '<|' + message['role'] + '|>' }}")
    tokenizer = with_tokens(CHAT_TEMPLATE, ["<|user|>", "<|assistant|>", "<|system|>"])
    recipe = chats(tokenizer, tokenizer, base=tokenizer, keys=({"chat_template": joined}, {}))
    rows = texts(prepare(read(recipe), options))
    assert rows == by_hand(CHAT_TEMPLATE, tokenizer, rows)
    recipe = chats(base=with_tokens(CHAT_TEMPLATE, ["<|user|>"]), keys=({"chat_template": joined}, {}))
    with refused(DataError, "split-token", "<|assistant|>"):
        prepare(read(recipe), options)


def test_plain_text_needs_no_template(chats, options, caplog):
    """A template that is damaged, missing or split is no matter where rows are text; a key without effect is named."""
    recipe = chats(with_tokens("{% for %}"), keys=({"text": "text"}, {"text": "text", "chat_template": "none.jinja"}))
    for entry in recipe["models"]:
        path = Path(entry["parameters"]["dataset"]).with_name("text.jsonl")
        path.write_text("".join(json.dumps({"text": " ".join(WORDS[number:])}) + "\n" for number in range(8)))
        entry["parameters"]["dataset"] = str(path)
    with caplog.at_level("WARNING"):
        job = prepare(read({**recipe, "chat_template": "chatml"}), options)
    assert [drawn.chat_template for drawn in job.rows] == [None, None]
    (warning,) = [record.message for record in caplog.records if "chat_template" in record.message]
    assert recipe["models"][1]["model"] in warning
    assert "has no effect" in warning


@pytest.mark.parametrize(
    ("template", "error", "code", "values"),
    [
        ("chatlm", RecipeError, "invalid-value", ["chatlm", "chatml", "`.jinja` file"]),
        ("none.jinja", RecipeError, "invalid-value", ["'none.jinja', and there is no such file"]),
        ("{% if x", DataError, "invalid-template", ["the recipe's", "unexpected end of template"]),
        ("{% for message in messages %}{{ message.", DataError, "invalid-template", ["expected name or number"]),
        ("chat_template.json", RecipeError, "invalid-value", ["chat_template.json"]),
        ("latin.jinja", DataError, "invalid-template", ["latin.jinja"]),
        ("broken.jinja", DataError, "invalid-template", ["broken.jinja"]),
        ("{% for message in messages %}", DataError, "invalid-template", ["the recipe's"]),
        ("model", DataError, "missing-chat-template", ["'model'", "its own"]),
        ("base", DataError, "missing-chat-template", ["'base'", "the base's"]),
        ("output", DataError, "missing-chat-template", ["'output'", "the merged model's"]),
        (None, DataError, "missing-chat-template", ["`messages`"]),
    ],
)
def test_what_is_no_template_is_refused(chats, options, tmp_path, monkeypatch, template, error, code, values):
    """Names, files and texts that are none, and the template of a model that has none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    (tmp_path / "latin.jinja").write_bytes("{# \xfc #}".encode("latin-1") + PLAIN.encode())
    (tmp_path / "broken.jinja").write_text("{% if messages %}")
    recipe = chats(make_tokenizer(None), base=make_tokenizer(None), keys=({"chat_template": template}, {}))
    if template is None:
        del recipe["models"][0]["parameters"]["chat_template"]
    else:
        values = [*values, recipe["models"][0]["model"]] if code != "invalid-template" else values
    with refused(error, code, *values):
        prepare(read(recipe), options)


def test_the_key_has_its_place(chats):
    """`chat_template` beside `merge_method` is mergekit's; beside a model it would be ignored."""
    recipe = chats()
    recipe["models"][0]["chat_template"] = "model"
    with refused(RecipeError, "misplaced-key", "chat_template", "that model"):
        check_content(recipe)
    del recipe["models"][0]["chat_template"]
    check_content({**recipe, "chat_template": "chatml"})
    assert [task.chat_template for task in read({**recipe, "parameters": {"chat_template": "base"}}).tasks] == [
        "base",
        "base",
    ]


def test_check_names_the_templates(chats, write_recipe, caplog):
    """The plan says what renders each task's chats; a warning says where the merged model gets another template than
    an expert had. One that renders the same text is no other."""
    same = CHAT_TEMPLATE.replace("{% for", "{# a remark #}{% for")
    recipe = chats(make_tokenizer(PLAIN), make_tokenizer(same))
    with caplog.at_level("WARNING"):
        result = slta("check", write_recipe(recipe))
    assert result.exit_code == 0, result.output
    assert result.output.count("; its own chat template") == 2
    (warning,) = [record.getMessage() for record in caplog.records if "rendered with" in record.message]
    assert recipe["models"][0]["model"] in warning
    assert "its rows are rendered with its own chat template, but the merged model gets another" in warning
    assert "add `chat_template: output` under its `parameters`" in warning
    caplog.clear()
    recipe["chat_template"] = "mistral"
    with caplog.at_level("WARNING"):
        result = slta("check", write_recipe(recipe))
    assert result.output.count("; the merged model's chat template") == 2
    told = "rendered with the merged model's chat template, not with its own: add `chat_template: model` under its"
    assert sum(told in record.message for record in caplog.records) == 2
    caplog.clear()
    with caplog.at_level("WARNING"):
        slta("check", write_recipe(chats(make_tokenizer(PLAIN), make_tokenizer(PLAIN), base=make_tokenizer(None))))
    assert sum("the merged model gets none" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize(("experts", "expected"), [([PLAIN, PLAIN], PLAIN), ([PLAIN, DATED], CHAT_TEMPLATE)])
def test_auto_is_what_the_merged_model_gets(chats, options, write_recipe, tmp_path, experts, expected):
    """The template of most models; among equals the base's. (mergekit's own choice among equals is a hash's.)"""
    recipe = chats(*map(make_tokenizer, experts), chat_template="auto")
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == expected.strip()
    job = prepare(read(recipe), options)
    assert texts(job) == by_hand(expected, make_tokenizer(), texts(job))


@pytest.fixture
def clock(monkeypatch):
    """Set today's date."""

    def set_to(day):
        monkeypatch.setattr("mergekit_slta.job.preflight.today", lambda: date.fromisoformat(day))

    return set_to


LLAMA_32 = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- bos_token }}Today: {{ date_string }}
{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"""
"""The beginning of Llama 3.2's template."""


def test_a_template_sees_the_given_date():
    """And no other one, nor an hour; transformers' own clock is left alone."""
    tokenizer = make_tokenizer(LLAMA_32)
    template = ChatTemplate(tokenizer, lambda with_tools: Template(LLAMA_32, "output"), date(2024, 2, 29))
    assert template.written_day is None  # nothing has been rendered yet
    assert template.render(CHATS[0][:1]) == f"<s>Today: 29 Feb 2024\n{CHATS[0][0]['content']}</s>"
    assert template.written_day == date(2024, 2, 29)
    assert f"{date.today():%d %b %Y}" in tokenizer.apply_chat_template(CHATS[0], tokenize=False)


def test_alphas_do_not_expire_overnight(chats, write_recipe, tmp_path, clock):
    """The date is that of the file's first calibration: another `lambda` reuses it, `solve` keeps it, and a recipe that
    names the file fits it."""
    recipe = chats(base=make_tokenizer(LLAMA_32), keys=({"chat_template": "output"},) * 2)
    out = tmp_path / "out"
    clock("2026-01-31")
    assert mergekit_yaml(write_recipe(recipe), out).exit_code == 0
    first = (out / "slta_alphas.json").read_bytes()
    assert json.loads(first)["calibration"]["date"] == "2026-01-31"
    clock("2026-02-01")
    for changes in ({}, {"lambda": 0.5}):
        recipe["parameters"].update(changes)
        result = mergekit_yaml(write_recipe(recipe), out)
        assert "Reusing the alphas" in result.output, result.output
        assert (out / "slta_alphas.json").read_bytes() == first
    recipe["parameters"]["ridge"] = 0.1
    result = mergekit_yaml(write_recipe(recipe), out)
    assert "Solving again from the statistics" in result.output, result.output
    recipe["parameters"]["alphas"] = str(out / "slta_alphas.json")
    assert slta("check", write_recipe(recipe)).exit_code == 0
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "other").exit_code == 0
    (out / "slta_alphas.json").unlink()  # the statistics have the date, too
    assert "Solving again" in slta("calibrate", write_recipe(recipe)).output
    assert Alphas.load(out / "slta_alphas.json").calibration["date"] == "2026-01-31"
    recipe["parameters"].pop("alphas")
    slta("calibrate", write_recipe(recipe), "-o", tmp_path / "new.json")
    assert Alphas.load(tmp_path / "new.json").calibration["date"] == "2026-02-01"


def test_a_run_resumes_after_midnight(chats, write_recipe, tmp_path, clock, monkeypatch):
    """The marker of unfinished work has the date of its rows, for a calibration and for `linearity`."""
    recipe = write_recipe(chats(base=make_tokenizer(LLAMA_32), keys=({"chat_template": "output"},) * 2))
    put = ResumeStore.put
    for command, target in (("calibrate", "a.json"), ("linearity", "l.json")):
        path = tmp_path / target

        def stop(store, key, tensors):
            put(store, key, tensors)
            raise KeyboardInterrupt

        clock("2026-01-31")
        with monkeypatch.context() as patch:
            patch.setattr(ResumeStore, "put", stop)
            assert slta(command, recipe, "-o", path).exit_code != 0
        clock("2026-02-01")
        finished = []
        with monkeypatch.context() as patch:
            patch.setattr(ResumeStore, "remove", lambda store, kept=finished: kept.append(len(store.finished)))
            result = slta(command, recipe, "-o", path)
        assert result.exit_code == 0, result.output
        assert len(finished) == 1  # at the end alone: the unfinished work was of this very job
        content = json.loads(path.read_text())
        assert content.get("calibration", content.get("settings"))["date"] == "2026-01-31"
        clock("2026-02-02")
        assert "Already" in slta(command, recipe, "-o", path).output


@pytest.mark.parametrize("content", ["", "[]", "{", '{"calibration": 3}', '{"calibration": {"date": "tomorrow"}}'])
def test_a_file_without_a_date_gives_none(tmp_path, content):
    """Damaged or foreign files are not this check's to refuse."""
    path = tmp_path / "slta_alphas.json"
    path.write_text(content)
    (tmp_path / "slta_stats.safetensors").write_text(content)
    (tmp_path / ".slta_alphas.json.partial").mkdir()
    (tmp_path / ".slta_alphas.json.partial" / "resume.json").write_text(content)
    assert recorded_day([path, tmp_path / "none.json"]) is None


def test_rows_without_a_date_record_none(chats, options):
    """A template that reads no clock makes no file depend on the day."""
    job = prepare(read(chats()), options, for_merge=False)
    assert job.day is None
