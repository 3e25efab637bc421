"""What is printed: tables on a terminal and in plain text, rows from strangers, and the same facts as JSON."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import mergekit_yaml, read, slta

from mergekit_slta.data.rows import Row
from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.job import job as job_file
from mergekit_slta.job import preflight
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives import phases
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.reporting import plan, row_view
from mergekit_slta.reporting.plan import describe_job
from mergekit_slta.reporting.plan_numbers import numbers_of_job
from mergekit_slta.reporting.terminal import describe_alphas
from mergekit_slta.runtime import progress as progress_bar
from mergekit_slta.runtime import screen
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.warnings_log import collected_warnings

DOCS = Path(__file__).resolve().parent.parent / "docs"
HOSTILE = "[bold red]x[/]\x1b[2J\x1b]0;title\x07 \u202ereversed\r\u0000"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def printed(monkeypatch, *parts, stream=None, **environment) -> str:
    """What goes to a terminal of 80 columns, or to `stream`."""
    stream = stream or Terminal()
    for key, value in {"COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(key, value)
    with monkeypatch.context() as patch:
        patch.setattr(screen.sys, "stdout", stream)
        screen.print_parts(*parts)
    return stream.getvalue()


# --- tables -----------------------------------------------------------------------------------------------------------

NAMES = ["organisation/a-model-with-a-very-long-name-v0.1-instruct-sft-dpo" + end for end in ("", "-2")]
TABLE = screen.Columns(["model", "rows"], [[NAMES[0], "30"], [NAMES[1] + HOSTILE, "1,000"]])


def test_plain_text_has_neither_escapes_nor_boxes(monkeypatch):
    """Not cut at any width, no space at the end of a line, and no character of a name acts on a terminal."""
    text = printed(monkeypatch, TABLE, stream=io.StringIO())
    assert text == screen.plain(TABLE) + "\n"
    assert all(name in text for name in NAMES)
    assert text.isascii()
    assert not re.search(r"[^\n -~]| $", text, re.MULTILINE)
    assert "[bold red]x[/]" in text


def test_a_terminal_gets_colours_and_its_width(monkeypatch):
    """No line is wider than the terminal, names are folded, and markup in a name is text."""
    text = printed(monkeypatch, TABLE)
    assert "\x1b[1m" in text
    assert "─" in text
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in bare
    assert "\x07" not in bare
    assert max(map(len, bare.splitlines())) <= 80
    assert "[bold" in bare
    assert "red]x[/]" in bare


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_escape_sequences_where_they_are_unwanted(monkeypatch, environment):
    """`NO_COLOR`, and terminals that do not know them."""
    assert "\x1b" not in printed(monkeypatch, TABLE, **environment)


def test_an_encoding_without_a_character_gets_an_escape(monkeypatch):
    """A pipe on Windows may be in a code page."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(screen.sys, "stdout", stream)
    screen.print_parts(screen.text("Ä"))
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xc4\n"


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (999.9, "1 kFLOP"), (2.96e15, "2.96 PFLOP"), (2.96e24, "2.96e+03 ZFLOP")],
)
def test_operations_have_readable_units(number, expected):
    assert screen.describe_flops(number) == expected


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_text_is_shown_safely_and_whole():
    """Line breaks are marked, other characters that are not printable are escaped, and letters of any script stay."""
    lines, note, tail = row_view.visible_lines("Grüße 你好 مرحبا\n\n" + HOSTILE)
    assert lines == [
        "Grüße 你好 مرحبا↵", "↵", "[bold red]x[/]\\x1b[2J\\x1b]0;title\\x07 \\u202ereversed\\r\\x00",
    ]  # fmt: skip
    assert not note
    assert not tail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b  \nc ", ["a b␣␣↵", "c␣"]),
        ("  a", ["␣␣a"]),
        ("   ", ["␣␣␣"]),
        ("\n", ["↵"]),
        (" \n ", ["␣↵", "␣"]),
        ("", []),
    ],
)
def test_spaces_at_the_ends_are_seen(text, expected):
    """A prompt that ends with a space is tokenized in another way than one that does not."""
    assert row_view.visible_lines(text) == (expected, "", [])


@pytest.mark.parametrize("text", ["word " * 1000, "x\n" * 300, "\n".join("y" * 90 for _ in range(40))])
def test_a_long_text_is_shortened_in_the_middle(text):
    """The beginning and the end are there, and how much there is in all."""
    head, note, tail = row_view.visible_lines(text)
    assert sum(map(len, head + tail)) < 700
    assert len(head + tail) <= 12
    assert text.startswith(head[0].removesuffix("↵")[:50])
    assert text.rstrip("\n").endswith(tail[-1].removesuffix("↵").replace("␣", " ")[-50:])
    assert re.search(r"the middle of [\d,]+ (characters|lines) is not shown", note)


@pytest.fixture
def hostile(tiny, tmp_path):
    """A recipe of two experts: chats and prompts with answers, of strangers."""
    recipe = tiny.recipe_with_answers(num_samples=4, max_seq_length=40)
    recipe["models"] = recipe["models"][:2]
    rows = [{"question": f"{number} Grüße {HOSTILE[:-1]}\nnext", "answer": "你好"} for number in range(6)]
    rows[1:4] = [{"question": "short?", "answer": "word " * 60}] * 3
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["models"][0]["parameters"]["dataset"] = str(path)
    return recipe


def test_check_shows_the_rows_as_the_model_sees_them(hostile, write_recipe, options):
    """Numbers of rows, tokens, cut rows and answer tokens, and the first row of each task with its answer marked: the
    same as what is fitted, in text and JSON."""
    path = write_recipe(hostile)
    result = slta("check", path)
    assert result.exit_code == 0, result.output
    found = json.loads(slta("check", path, "--json").stdout)
    job = prepare(read(hostile), options, for_merge=False)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("expert")]
    for expert, drawn, line in zip(found["experts"], job.rows, lines, strict=True):
        row, tokenizer = drawn.rows[0], job.row_tokenizer
        numbers = [len(drawn.rows), sum(len(row.ids) for row in drawn.rows),
                   sum(len(tokenizer(row.text).input_ids) >= 40 for row in drawn.rows),
                   sum(len(row.ids) - row.completion for row in drawn.rows)]  # fmt: skip
        assert [expert[key] for key in ("rows", "tokens", "cut_rows", "answer_tokens")] == numbers
        assert list(map(int, line[2:6])) == numbers
        first = expert["first_row"]
        assert first["prompt"] + first["answer"] == tokenizer.decode(row.ids)
        assert first["answer"] == tokenizer.decode(row.ids[row.completion :])
        assert first["number"] == row.number
    assert any(expert["cut_rows"] for expert in found["experts"])
    shown = [line for line in result.stdout.splitlines() if " |" in line[:9]]
    assert sum(line.startswith("prompt | <s>") for line in shown) == 2
    assert sum(line.startswith("answer |") for line in shown) == 2
    assert not re.search(r"[^\n\x20-\x7e\xa0-\uffff]|\u202e", result.stdout)
    assert found["settings"]["compute_dtype"] == "auto"
    assert found["precision"] == {"dtype": "float32", "products": "float32"}


@pytest.mark.parametrize(
    ("settings", "is_fast", "products", "line"),
    [
        ({}, True, "float32", "float32 (`compute_dtype: auto`)"),
        ({"objective": "joint"}, True, "bfloat16", "float32; the layers' products in bfloat16 (`compute_dtype: auto`)"),
        ({"objective": "joint"}, False, "float32", "float32 (`compute_dtype: auto`: cpu has no fast bfloat16)"),
        ({"objective": "joint", "compute_dtype": "float64"}, True, "float64", "float64 (`compute_dtype: float64`)"),
    ],
)
def test_check_says_what_auto_stands_for(plenty, options, monkeypatch, settings, is_fast, products, line):
    """In the text and in JSON; a calibration records it."""
    for place in (job_file, preflight, phases):
        monkeypatch.setattr(place, "has_fast_bfloat16", lambda _: is_fast)
    job = prepare(read(plenty.recipe_with_answers(num_samples=2, **settings)), options, plan_only=True)
    costs = estimate(job)
    assert numbers_of_job(job, costs, None)["precision"]["products"] == products
    assert f"precision   {line}" in screen.plain(*describe_job(job, costs)).splitlines()


@pytest.mark.parametrize(
    ("objective", "available", "line"),
    [
        ("features", 1 << 40, None),
        ("joint", 1 << 40, "they fit into the free memory"),
        ("joint", 1000, "the free memory holds 0 B of them, so the disk is read each time"),
    ],
)
def test_check_says_whether_checkpoints_stay_in_memory(plenty, options, monkeypatch, objective, available, line):
    """Where they are read several times: all reads, and the size of what is read."""
    job = prepare(read(plenty.recipe_with_answers(num_samples=2, objective=objective)), options, plan_only=True)
    costs = estimate(job)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
    said = [row for row in screen.plain(*describe_job(job, costs)).splitlines() if row.startswith("reads ")]
    assert len(said) == (line is not None)
    if line:
        assert line in said[0]
        models = (plenty.base, *plenty.experts)
        size = sum(file.stat().st_size for model in models for file in model.glob("*.safetensors"))
        assert f"the checkpoints have {screen.describe_bytes(costs.phases[-1].read_bytes)}" in said[0]
        assert costs.phases[-1].read_bytes == pytest.approx(size, rel=0.05)


def test_a_device_that_is_elsewhere_decides_there(plenty, write_recipe, monkeypatch):
    """Whether a GPU multiplies in bfloat16 is not known before it is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = slta("check", write_recipe(plenty.recipe_with_answers(objective="joint")), "--cuda")
    assert result.exit_code == 0, result.output
    assert "precision   float32; the layers' products in bfloat16 if cuda is fast at it" in result.stdout


def test_a_row_without_an_answer_within_its_tokens_says_so(hostile, options):
    """A cut that leaves no token of the answer, and a row that is its own answer."""
    job = prepare(read(hostile), options, for_merge=False)
    row = job.rows[1].rows[0]
    cut = Row(0, row.text, row.ids[:3], 3, num_cut=9)
    text = screen.plain(row_view.view_of_row(cut, job.row_tokenizer))
    assert "answer |" in text
    assert "(cut off by `max_seq_length`)" in text
    assert "9 more tokens are cut off" in text
    whole = screen.plain(row_view.view_of_row(Row(0, row.text, row.ids), job.row_tokenizer))
    assert "prompt" not in whole
    assert "answer | <s>" in whole


# --- progress ---------------------------------------------------------------------------------------------------------


def watched(monkeypatch, stream, work, **keys) -> str:
    """What a bar of 10 layers writes to `stream` while `work(progress, clock)` runs; `clock(60)` lets a minute pass."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")

    def clock(seconds: float) -> None:
        now[0] += seconds

    with monkeypatch.context() as patch:
        patch.setattr(progress_bar.sys, "stderr", stream)
        with Progress("step 1 of 3, backward", 10, **{"quiet": False, "num_layers": 10, **keys}) as bar:
            work(bar, clock)
    return stream.getvalue()


def ten_layers(seconds: float):
    def work(bar, clock):
        for layer in range(10):
            bar.work_on(f"model.layers.{layer}.mlp")
            clock(seconds)

    return work


def test_a_terminal_has_one_line_that_goes_away(monkeypatch):
    """The phase, the layer, the time left and the memory; log messages are lines above it."""
    handler = logging.StreamHandler(stream := Terminal())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    def work(bar, clock):
        ten_layers(60)(bar, clock)
        bar._bars.refresh()
        logging.getLogger("mergekit_slta").warning("something is odd")
        bar.say("step 1: better [bold]")

    text = watched(monkeypatch, stream, work)
    bare = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"step 1 of 3, backward, layer 10/10 .* 67 s left, [\d.]+ [MG]iB", bare)
    assert "something is odd\n" in bare
    assert "step 1: better [bold]" in bare
    assert text.rstrip().endswith("\x1b[2K")
    assert handler.stream is stream


@pytest.mark.parametrize(("seconds", "lines"), [(1, 0), (10, 3), (29, 4), (1000, 9)])
def test_elsewhere_there_are_few_plain_lines(monkeypatch, seconds, lines):
    """At most one in half a minute, and each a tenth further than the one before."""
    text = watched(monkeypatch, io.StringIO(), ten_layers(seconds))
    assert len(text.splitlines()) == lines
    for line in text.splitlines():
        assert re.fullmatch(r"step 1 of 3, backward, layer \d+/10: \d0%, .+ left, [\d.]+ [MG]iB", line)


def test_a_long_silence_is_broken(monkeypatch):
    """A part that takes very long says that it is still there whenever it can."""

    def work(bar, clock):
        for _ in range(5):
            clock(200)
            bar.announce("head")

    text = watched(monkeypatch, io.StringIO(), work)
    assert len(text.splitlines()) == 2
    assert text.startswith("step 1 of 3, backward, head: 0%, ")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(monkeypatch, stream):
    def work(bar, clock):
        ten_layers(1000)(bar, clock)
        bar.say("step 1")

    assert watched(monkeypatch, stream(), work, quiet=True) == ""


def test_parts_of_an_earlier_run_take_no_time(monkeypatch):
    """The time left is told from the parts of this run."""
    left = []

    def work(bar, clock):
        bar.advance(6)
        for _ in range(2):
            clock(100)
            bar.advance(1)
        left.append(bar.rest)

    watched(monkeypatch, io.StringIO(), work)
    assert left[0].startswith("3.3 min left, ")


# --- the end of a merge -----------------------------------------------------------------------------------------------


def test_a_merge_ends_with_what_it_made(plenty, write_recipe, tmp_path, monkeypatch):
    """Weights by depth, the table of each task, warnings, where things are, and how to upload them: the same in the
    stock command and the project's own; with --quiet nothing."""
    monkeypatch.chdir(tmp_path)
    path = write_recipe(plenty.recipe_with_answers(num_samples=4, evaluate=True))
    stock = mergekit_yaml(path, "a model", card=True)
    assert stock.exit_code == 0, stock.output
    alphas = Alphas.load("a model/slta_alphas.json")
    lines = stock.stderr.splitlines()
    for column, expert in enumerate(plenty.experts):
        (first,) = [
            place for place, line in enumerate(lines) if line.startswith(f"{expert.name} ") and "attention" in line
        ]
        for line, kind in ((lines[first], "attention"), (lines[first + 1], "mlp")):
            for layer in range(2):
                (entry,) = [each for each in alphas.submodules if (each.kind, each.layer) == (kind, layer)]
                assert f"{entry.alpha[column]:.3f}" in line
        for kind in ("embed", "head"):
            (entry,) = [each for each in alphas.submodules if each.kind == kind]
            assert f"{entry.alpha[column]:.3f}" in lines[first]
    assert alphas.calibration["products"] == "float32"
    assert "on rows that were not fitted" in stock.stderr
    warnings = [line for line in lines if line.startswith("warning ")]
    assert any("measured on 3 rows: neither the choice" in line for line in warnings)
    assert len(warnings) == len(set(warnings))
    assert "slta_alphas.json, slta_stats.safetensors" in stock.stderr
    assert "README.md; figures: slta_alphas.png" in stock.stderr
    assert lines[-1] == "upload      hf upload ORG/NAME 'a model'"
    assert "How good is it?" not in stock.stderr
    own = slta("merge", path, "own")
    assert own.stderr.splitlines()[-1] == "upload      hf upload ORG/NAME own"
    assert "README.md" not in own.stderr.split("merged ")[-1]
    assert slta("merge", path, "own", "--quiet").output.count("\n") == 0


def test_a_merge_that_was_not_measured_says_how_to(tiny, write_recipe, tmp_path):
    """`features` measures nothing unless asked."""
    result = mergekit_yaml(write_recipe(tiny.recipe(2, num_samples=2)), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "How good is it? Not measured: with a `dataset` for each expert, `evaluate: true`" in result.output


@pytest.mark.parametrize(
    ("kinds", "lines"),
    [
        (["model"], ["whole model"]),
        (["embed", "layer", "head"], ["layers"]),
        (["embed", "attention_head", "mlp", "norm", "head"], ["attention", "MLP", "norms"]),
        (["embed", "attention", "another", "norm"], ["attention", "norms", "another"]),
    ],
)
def test_weights_of_every_kind_have_a_line(kinds, lines):
    """Whole models, layers, heads, norms, and kinds that nobody has named; a norm without a layer is the last one."""
    entries = [
        SubmoduleAlphas(name=f"{kind}.{layer}", kind=kind, layer=layer, tensors=(f"{kind}.{layer}.weight",),
                        alpha=(0.5, 0.25), stderr=None, condition=None, rank=None, residual=0.5, flags=("extreme",))
        for kind in kinds
        for layer in ([None] if kind in ("model", "embed", "head") else [0, 1, 2, 3, *[None] * (kind == "norm")])
    ]  # fmt: skip
    known = {"granularity": "layer", "base_model": "b", "models": ("x/e", "y/e"), "calibration": {}, "provenance": {}}
    text = screen.plain(*describe_alphas(Alphas(submodules=entries, **known)))
    rows = [line for line in text.splitlines() if "0.500" in line or "0.250" in line]
    assert len(rows) == 2 * len(lines)
    assert all(part in row for row, part in zip(rows, lines * 2, strict=True))
    assert rows[0].startswith("x/e ")
    assert rows[len(lines)].startswith("y/e ")
    assert "extreme " in text


def test_weights_of_matrices_are_told_apart_by_their_names():
    """With `granularity: linear` attention, MLP and norms have lines of their own."""
    names = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm", "mixer.in_proj"]
    entries = [
        SubmoduleAlphas(name=f"model.layers.0.{name}", kind="norm" if "norm" in name else "linear", layer=0,
                        tensors=(f"{name}.weight",), alpha=(number / 10,), stderr=None, condition=None, rank=None,
                        residual=None)
        for number, name in enumerate(names)
    ]  # fmt: skip
    alphas = Alphas(
        granularity="linear", base_model="b", models=("x/e",), submodules=entries, calibration={}, provenance={}
    )
    rows = [line.split() for line in screen.plain(*describe_alphas(alphas)).splitlines()[2:]]
    assert rows == [["e", "attention", "0.050"], ["MLP", "0.200"], ["norms", "0.300"], ["matrices", "0.400"]]


def test_warnings_are_collected_and_still_printed(capfd, monkeypatch):
    """Also where no logging is set up, and its last resort prints them."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with collected_warnings() as found:
        logging.getLogger("mergekit_slta.any").warning("odd: %d", 3)
        logging.getLogger("mergekit_slta.any").info("fine")
        logging.getLogger("other").warning("theirs")
    assert found == ["odd: 3"]
    assert "odd: 3" in capfd.readouterr().err


# --- transcripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["check", "merge"])
def test_the_transcripts_of_the_documentation_are_what_is_printed(name, plenty, write_recipe, tmp_path):
    """The same tables and keys; `python docs/transcripts.py` makes them anew."""
    path = write_recipe(plenty.recipe_with_answers(num_samples=4, evaluate=True))
    command = ("check", path) if name == "check" else ("merge", path, tmp_path / "out")
    printed, kept = slta(*command, card=True).output, (DOCS / "output" / f"{name}.txt").read_text(encoding="utf-8")

    def skeleton(text: str) -> set[str]:
        keys = {line.split()[0] for line in text.splitlines() if re.match(r"[a-z]+ {2,}\S", line)}
        headers = {" ".join(line.split()) for line in text.splitlines() if "  tokens  " in line or "  rows  " in line}
        return keys | headers

    assert skeleton(printed) - skeleton(kept) <= {"warning"}  # of these untrained experts; the demo's have none
    assert "/" + "tmp" not in kept
