"""Where rows come from: files of every type, folders, saved datasets, splits; and what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os

import datasets
import pytest
from conftest import assert_refused, make_tokenizer, mergekit_yaml, refused, slta
from test_rows import draw, write_jsonl

from mergekit_slta.data.loading import load_rows
from mergekit_slta.errors import DataError

ROWS = [{"a": "007"}, {"a": "NA"}, {"a": "2024-01-01"}, {"a": "1.10"}]


def read(path, split="train", config=None) -> list:
    """All rows; an unusable one is its message."""
    rows = load_rows(str(path), config, split)
    found = []
    for number in range(len(rows)):
        try:
            found.append(dict(rows[number]))
        except DataError as error:
            assert error.code == "unusable-row"
            found.append(error.message)
    return found


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = "a\n007\nNA\n2024-01-01\n1.10\n"
FILES = {
    "rows.jsonl": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "ROWS.JSONL": "\n" + lines(ROWS),
    "lines.json": lines(ROWS),
    "list.json": json.dumps(ROWS),
    "by line.json": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]",
    "pretty.json": json.dumps(ROWS, indent=1),
    "pretty.jsonl": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "columns.json": json.dumps({"a": [row["a"] for row in ROWS]}),
    "pandas.json": json.dumps({"a": {str(number): row["a"] for number, row in enumerate(ROWS)}}),
    "index.json": json.dumps({str(number): row for number, row in enumerate(ROWS)}),
    "bom.jsonl": "\ufeff" + lines(ROWS),
    "joined.jsonl": "\ufeff" + lines(ROWS[:2]) + "\ufeff" + lines(ROWS[2:]),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "bom.csv": "\ufeff" + CSV,
    "rows.csv": CSV,
    "rows.tsv": CSV,
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "crlf.jsonl": lines(ROWS).replace("\n", "\r\n"),
    "rows [1].jsonl": lines(ROWS),
    "what?*.jsonl": lines(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_what_the_file_says(tmp_path, name):
    """Every type and layout, byte order marks, names with wildcards: no zero, date or NA is read as something else."""
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl.gz", gzip.compress), ("rows.json.gz", gzip.compress), ("rows.csv.gz", gzip.compress),
        ("rows.jsonl.bz2", bz2.compress), ("rows.jsonl.xz", lzma.compress),
    ],
)  # fmt: skip
def test_compressed_files(tmp_path, name, write):
    """The same by what is inside."""
    content = {"jsonl": lines(ROWS), "json": json.dumps(ROWS), "csv": CSV}[name.split(".")[1]]
    (tmp_path / name).write_bytes(write(content.encode()))
    assert read(tmp_path / name) == ROWS
    assert read(tmp_path) == ROWS


def test_lines_of_other_types_and_columns(tmp_path):
    """Each line is read by itself; a text is a row with `text`, a list of messages one with `messages`."""
    chat = [{"role": "user", "content": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": "x", "b": [1, "y", {"c": null}]}\n"fox"\n' + json.dumps(chat) + "\n17\n")
    *good, bad = read(path)
    assert good == [{"a": 1}, {"a": "x", "b": [1, "y", {"c": None}]}, {"text": "fox"}, {"messages": chat}]
    assert "int in place of an object" in bad
    assert load_rows(str(path), None, "train").columns == ["a", "b", "text", "messages"]
    write_jsonl(tmp_path / "list.json", [[chat, chat]])
    assert read(tmp_path / "list.json") == [{"messages": chat}] * 2
    write_jsonl(tmp_path / "one.json", [{"messages": chat}])  # a list of messages is no list of rows
    assert read(tmp_path / "one.json") == [{"messages": chat}]
    for document in ({"a": [1, 2], "b": [3]}, {"a": 1}, 3):
        write_jsonl(tmp_path / "one.json", [document])
        assert len(read(tmp_path / "one.json")) == 1
    (tmp_path / "one.json").write_text('[\n{"a": 1}\n]')
    assert read(tmp_path / "one.json") == [{"a": 1}]


def test_splits_of_a_json_document(tmp_path):
    path = write_jsonl(tmp_path / "rows.json", [{"train": ROWS[:1], "test": ROWS[1:]}])
    assert read(path) == ROWS[:1]
    assert read(path, "test[1:]") == ROWS[2:]


def test_a_damaged_line_is_named_with_its_file(tmp_path):
    """Other lines are read. The line is counted in the file, with blank ones."""
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(b'\n{"a": "1"}\n\n{"a": \n{"a": "\xe9"}\n')
    found = read(tmp_path / "*.jsonl")
    assert found[:5] == [*ROWS, {"a": "1"}]
    assert f"row 5 of {tmp_path / '*.jsonl'} (line 4 of {tmp_path / 'b.jsonl'}) is not a JSON object" in found[5]
    assert "is not UTF-8: save the file as UTF-8" in found[6]  # files are searched once, for the first
    rows = load_rows(str(tmp_path / "*.jsonl"), None, "train")
    with refused(DataError, "unusable-row", f"(line 5 of {tmp_path / 'b.jsonl'})", "save the file as UTF-8"):
        rows[6]


@pytest.mark.parametrize(("name", "content"), [("rows.txt", "fox\n\xe9\ndog\n"), ("rows.csv", "a\nfox\n\xe9\ndog\n")])
def test_lines_that_are_not_utf8(tmp_path, name, content):
    """Latin-1: the other rows are read."""
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    first, bad, last = read(tmp_path / name)
    assert [*first.values(), *last.values()] == ["fox", "dog"]
    assert "row 1" in bad
    assert "save the file as UTF-8" in bad


def test_a_replacement_character_of_the_file_is_kept(tmp_path):
    """In a file that is UTF-8 it is a character like others."""
    rows = [{"text": "a \N{REPLACEMENT CHARACTER} b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("rows.txt", "fox\n".encode("utf-16"), ["UTF-16", "save the file as UTF-8"]),
        ("rows.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", ["`git lfs pull`"]),
        ("rows.json", '[{"a": "x"},\n{"a": "é"}]'.encode("latin-1"), ["line 2", "save the file as UTF-8"]),
        ("rows.json", b'[{"a": 1},\n{"a": \n', ["line 3", "mend the file"]),
        ("rows.csv", b'a,b\n1,2\n"1,2\n', ["EOF inside string"]),
        ("rows.csv", b"a,b\n1,2,\n3,4,\n", ["more cells than its first line has names"]),
        ("rows.parquet", b"no parquet", ["Parquet"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, values):
    """The file, the place, and what to do."""
    (tmp_path / name).write_bytes(content)
    with refused(DataError, "unreadable-dataset", tmp_path / name, *values):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""), ("rows.jsonl", "\n \n"), ("rows.json", ""), ("rows.json", "[]"), ("rows.csv", ""),
        ("rows.csv", "\n\n"), ("rows.csv", "a,b\n"), ("rows.txt", ""), ("rows.txt", "\n\n \n"),
    ],
)  # fmt: skip
def test_empty_files(tmp_path, name, content):
    """0 bytes, blank lines, an empty list, a header alone."""
    (tmp_path / name).write_text(content)
    with refused(DataError, "too-few-rows", tmp_path / name, "is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["rows.gguf", "rows.zip", "rows.xlsx", "rows.safetensors", "rows.py"])
def test_other_file_types(tmp_path, kind):
    (tmp_path / kind).write_text("x")
    with refused(DataError, "unknown-file-type", kind, ".jsonl"):
        read(tmp_path / kind)


def test_csv_separators_and_columns(tmp_path):
    """Semicolons of other locales; files with other columns are refused, in another order read."""
    (tmp_path / "a.csv").write_text("q;a\n1,5;x\n")
    assert read(tmp_path / "a.csv") == [{"q": "1,5", "a": "x"}]
    (tmp_path / "b.csv").write_text('q,a\n"x\ny",\n')
    assert read(tmp_path / "b.csv") == [{"q": "x\ny", "a": None}]
    (tmp_path / "c.csv").write_text("a,q\n1,2\n")
    assert read(tmp_path / "[bc].csv") == [{"q": "x\ny", "a": None}, {"q": "2", "a": "1"}]
    (tmp_path / "d.csv").write_text("a,other\n1,2\n")
    with refused(DataError, "unreadable-dataset", "d.csv", "c.csv", "q"):
        read(tmp_path / "[cd].csv")


def test_csv_lines_with_too_many_cells(tmp_path, caplog):
    """They are left out, with a warning that names the first."""
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n3\n")
    for _ in range(2):  # the second time from the cache of `datasets`
        caplog.clear()
        assert read(tmp_path / "a.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": None}]
        (record,) = caplog.records
        assert f"lines of {tmp_path / 'a.csv'} cannot be used" in record.message
        assert "line 3" in record.message


def test_save_to_disk(tmp_path):
    """A folder of one dataset, whatever its split was called, one of several, and the Arrow file in it."""
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "two") == ROWS
    assert read(tmp_path / "one", "train[1:2]") == ROWS[1:2]
    assert read(tmp_path / "two", "test") == read(tmp_path / "two" / "test") == ROWS[2:3]
    assert read(tmp_path / "one" / "data-00000-of-00001.arrow") == ROWS
    assert read(tmp_path / "two", "all") == [*ROWS, ROWS[2]]
    with refused(DataError, "unreadable-dataset", "validation", "['train', 'test']"):
        read(tmp_path / "two", "validation")
    datasets.Dataset.from_list([{"n": 1}], split="test").with_format("torch").save_to_disk(tmp_path / "three")
    assert read(tmp_path / "three") == read(tmp_path / "three", "test[:1]") == read(tmp_path / "three", "all")
    assert type(read(tmp_path / "three")[0]["n"]) is int


def test_folders(tmp_path, monkeypatch):
    """Splits by the names of files; a card with `configs`; names in capitals; `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:1])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    (folder / ".hidden.csv").write_text("x")
    assert read("~/data") == ROWS
    assert read(folder, "test") == ROWS[:1]
    with refused(DataError, "unreadable-dataset", "validation", "['train', 'test']"):
        read(folder, "validation")
    (folder / "LICENSE.txt").write_text("none of the rows")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: tests\n  data_files: test.jsonl\n---\n")
    assert read(folder, config="tests") == ROWS[:1]
    with refused(DataError, "unreadable-dataset", "'other'", "['tests']"):
        read(folder, config="other")
    card = "---\nconfigs:\n- config_name: rows\n  data_files: test.jsonl\n  on_mixed_types: null\n---\n"
    (folder / "README.md").write_text(card)
    assert len(read(folder, config="rows")) == 1
    (folder / "README.md").unlink()
    with refused(DataError, "unknown-file-type", folder, ".jsonl, .txt"):
        read(folder)


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".jsonl.gz"])
@pytest.mark.parametrize("name", ["rows", "rows [1]", "link"])
def test_splits_of_a_folder(tmp_path, caplog, name, suffix):
    """By the names of files, in capitals or not; with wildcards in the folder's name; through a link. Files of no split
    are named in a warning."""
    folder = tmp_path / name
    (tmp_path / "origin").mkdir()
    if name == "link":
        folder.symlink_to(tmp_path / "origin")
    else:
        folder.mkdir()
    for part, rows in (("train", ROWS), ("test", ROWS[:1]), ("other", ROWS[:2])):
        content = lines(rows).encode()
        part = part if suffix.islower() else part.upper()
        (folder / f"{part}{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(folder) == ROWS
    assert read(folder, "test") == ROWS[:1]
    assert "1 of the 3 files" in caplog.text
    assert "its splits are train, test" in caplog.text


def test_folders_without_rows(tmp_path):
    """A model's folder, an empty one, one of other files."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    with refused(DataError, "unreadable-dataset", "the folder of a model"):
        read(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with refused(DataError, "unreadable-dataset", tmp_path / "empty"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "rows.py").write_text("x")
    with refused(DataError, "unreadable-dataset", tmp_path / "empty"):
        read(tmp_path / "empty")


def test_splits_of_a_file(tmp_path):
    """A file's rows are its split `train`; parts of it work, another name is refused."""
    path = write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert read(path, "train[:50%]") == ROWS[:2]
    assert read(path, "train[:1]+train[3:]") == [ROWS[0], ROWS[3]]
    for split in ("test", "train[:3"):
        with refused(DataError, "unreadable-dataset", f"split {split}", "the rows of a file are its split `train`"):
            read(path, split)
    with refused(DataError, "too-few-rows", "train[9:]"):
        read(path, "train[9:]")


def test_scripts_are_not_run(monkeypatch):
    """What `datasets` says of a script comes with the way out."""

    def refuse(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found squad.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with refused(DataError, "unreadable-dataset", "squad.py", "refs/convert/parquet"):
        read("org/squad")


def test_nothing_is_said_beside_the_error(tmp_path, capfd):
    """`datasets` logs what it fails at; its log level is what it was afterwards."""
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n"1,2\n')
    before = datasets.logging.get_verbosity()
    with refused(DataError, "unreadable-dataset"):
        read(tmp_path / "rows.csv")
    assert "".join(capfd.readouterr()) == ""
    assert datasets.logging.get_verbosity() == before


def test_merges_end_right_or_refused(tmp_path, tiny, write_recipe):
    """The stock command reads rows around a damaged line; `check` refuses an empty file as the merge does."""
    recipe = tiny.recipe(2, num_samples=4)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the quick fox"}\n{"text": \n{"text": "a lazy dog"}\n')
    recipe["models"][0]["parameters"]["dataset"] = str(path)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    alphas = json.loads((tmp_path / "out" / "slta_alphas.json").read_text())
    assert sorted(alphas["calibration"]["tasks"][0]["rows"]) == [0, 2]
    path.write_text("")
    for command in (mergekit_yaml, slta):
        arguments = (
            (write_recipe(recipe), tmp_path / "other") if command is mergekit_yaml else ("check", write_recipe(recipe))
        )
        assert_refused(command(*arguments), "too-few-rows", path, "is empty")
    assert not os.path.exists(tmp_path / "other")


def test_the_same_chats_in_other_words(tmp_path, tiny, write_recipe):
    """ShareGPT, content blocks, and a saved dataset give the statistics that plain messages give."""
    chats = [
        [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": "a fox"}] for n in range(6)
    ]
    blocks = [
        [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat] for chat in chats
    ]
    sharegpt = [
        [{"from": name, "value": message["content"]} for name, message in zip(("human", "gpt"), chat, strict=True)]
        for chat in chats
    ]
    write_jsonl(tmp_path / "plain.jsonl", [{"messages": chat} for chat in chats])
    write_jsonl(tmp_path / "blocks.jsonl", [{"messages": chat} for chat in blocks])
    write_jsonl(tmp_path / "sharegpt.jsonl", [{"conversations": chat} for chat in sharegpt])
    datasets.Dataset.from_list([{"messages": chat} for chat in chats]).save_to_disk(tmp_path / "saved")
    found = []
    for name in ("plain.jsonl", "blocks.jsonl", "sharegpt.jsonl", "saved"):
        recipe = tiny.recipe(1, granularity="layer")
        recipe["models"][0]["parameters"]["dataset"] = str(tmp_path / name)
        result = slta("calibrate", write_recipe(recipe), "-o", tmp_path / f"{name}.json", "--quiet")
        assert result.exit_code == 0, result.output
        alphas = json.loads((tmp_path / f"{name}.json").read_text())
        found.append((alphas["submodules"], alphas["calibration"]["tasks"][0]["sha256"]))
    assert found == [found[0]] * 4


def test_images_are_not_decoded(monkeypatch):
    """Rows of the Hub with images need no image library."""
    rows = datasets.Dataset.from_dict({"image": [None], "text": ["the fox"]}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: rows)
    assert read("org/pictures") == [{"image": None, "text": "the fox"}]
    assert not load_rows("org/pictures", None, "train").table.features["image"].decode


def test_big_files_are_not_parsed_whole(tmp_path, monkeypatch, caplog):
    """Only what is drawn is parsed, and some rows for the columns."""
    from mergekit_slta.data import loading

    parsed = []
    monkeypatch.setattr(loading, "parse_row", lambda line: parsed.append(line) or json.loads(line))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the fox"}\n' * 50_000)
    with caplog.at_level(logging.ERROR):
        draw(make_tokenizer(), path)
    assert len(parsed) < 1200


def test_a_config_beside_files(tmp_path):
    """Only folders and the Hub have configs."""
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"text": "fox"}\n')
    datasets.Dataset.from_list([{"text": "fox"}]).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.jsonl", "*.jsonl", "saved"):
        with refused(DataError, "unreadable-dataset", tmp_path / name, "config main", "drop `dataset_config`"):
            load_rows(str(tmp_path / name), "main", "train")
