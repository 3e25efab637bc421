"""The output folder at every moment at which a merge can die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_refused, mergekit_yaml, refused, slta, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_slta.files.lock as lock_module
import mergekit_slta.files.output_folder as module
from mergekit_slta.errors import OutputError
from mergekit_slta.files.merge_record import hash_in
from mergekit_slta.files.names import LOADERS_READ
from mergekit_slta.files.output_folder import check_output, check_writable, staged, weight_files
from mergekit_slta.files.statistics_file import Statistics

ONE = ("model.safetensors",)
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


NESTED = "additional_chat_templates/tool.jinja"
"""transformers writes it for a tokenizer with several named templates."""


def merge(out: Path, content: str, names: tuple[str, ...], **options: bool) -> None:
    """A stand-in for a merge: weights, a config, a card and a folder."""
    with staged(out, **options) as folder:
        for name in (*names, "config.json", "README.md", "slta_alphas.json", NESTED):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    merge(folder, "first", TWO)
    return folder


def content(out: Path) -> dict[str, str]:
    names = [*weight_files(out), "README.md", "slta_alphas.json", NESTED]
    return {name: (out / name).read_text() for name in names if (out / name).exists()}


def whole(text: str, names: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys((*names, "README.md", "slta_alphas.json", NESTED), text)


def test_replacement_leaves_no_mixture(out: Path):
    """Files of the earlier merge are gone after the later one; other files of the folder stay."""
    (out / "notes.txt").write_text("mine")
    merge(out, "second", ONE)
    assert content(out) == whole("second", ONE)
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".slta*"))
    check_output(out, [])


def test_failure_changes_nothing(out: Path):
    """An error inside leaves OUT as it was, alphas and card included."""
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        (folder / "model.safetensors").write_text("half")
        (folder / "README.md").write_text("half")
        raise KeyboardInterrupt
    assert content(out) == whole("first", TWO)
    assert not list(out.glob(".slta*"))
    check_output(out, [])


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it does anything."""


@contextlib.contextmanager
def dying_after(moment: int, monkeypatch):
    """Every change to the file system works `moment` times, and never again until the end of the block."""
    count = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(module, "write_text_atomically", dying(module.write_text_atomically))
        with contextlib.suppress(Killed):
            yield


@pytest.mark.parametrize("names", [ONE, TWO], ids=["other files", "same files"])
@pytest.mark.parametrize("moment", range(30))
def test_killed_at_any_file_operation(out: Path, monkeypatch, moment: int, names: tuple[str, ...]):
    """Whatever operation is the last one: OUT has no config.json, or is one merge whole; after any number of further
    deaths the next run ends well."""
    with dying_after(moment, monkeypatch):
        merge(out, "second", names)
    if (out / "config.json").exists():
        state = (out / "config.json").read_text()
        expected = {"first": whole("first", TWO), "second": whole("second", names)}[state]
        assert content(out) == expected
    check_output(out, [])  # what a killed merge leaves is not mistaken for somebody's weights
    for again in range(8):
        with dying_after(again, monkeypatch):
            merge(out, "third", ONE)
    merge(out, "last", ONE)
    assert content(out) == whole("last", ONE)
    assert not list(out.glob(".slta*"))


@pytest.mark.parametrize("change", ["added", "edited", "same size", "no record"])
def test_weights_that_no_merge_recorded_are_refused(out: Path, change: str):
    """A file added or exchanged since, or a lost record: somebody may want these weights."""
    if change == "added":
        (out / "adapter_model.safetensors").write_text("mine")
    if change == "edited":
        (out / TWO[0]).write_text("fine-tuned further")
    if change == "same size":
        (out / TWO[0]).write_text("FIRST")
    if change == "no record":
        (out / "slta_merge.json").unlink()
    before = content(out)
    with refused(OutputError, "foreign-weights", out):
        check_output(out, [])
    assert content(out) == before


def test_weights_added_after_a_killed_merge_are_somebodys(out: Path, monkeypatch):
    """What lies in OUT beside an unfinished merge was put there by someone else."""
    with dying_after(4, monkeypatch):
        merge(out, "second", ONE)
    (out / "model.fp16.safetensors").write_text("precious")
    with refused(OutputError, "foreign-weights", "model.fp16.safetensors"):
        check_output(out, [])
    with refused(OutputError, "foreign-weights", "during the merge"):
        merge(out, "third", ONE)
    assert (out / "model.fp16.safetensors").read_text() == "precious"


def test_a_second_merge_is_refused_while_one_runs(out: Path, monkeypatch):
    """Checking, and merging, into a folder that is being merged into: refused, and nothing of it is touched."""
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: None)
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("second")
        for attempt in (lambda: check_output(out, []), lambda: merge(out, "third", ONE)):
            with refused(OutputError, "in-use", f"process {os.getpid()}", out):
                attempt()
        assert (folder / "model.safetensors").read_text() == "second"
    assert (out / "model.safetensors").read_text() == "second"


def test_output_that_is_a_file_or_not_writable(tmp_path: Path):
    """Named before anything is computed."""
    (tmp_path / "file").write_text("x")
    with refused(OutputError, "not-a-folder", tmp_path / "file"):
        check_output(tmp_path / "file", [])
    with refused(OutputError, "not-a-folder", tmp_path / "file" / "out"):
        check_output(tmp_path / "file" / "out", [])
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with refused(OutputError, "cannot-write", locked):
        check_output(locked / "out", [])


def test_other_spellings_of_the_folder(out: Path, monkeypatch):
    """`..` and `.` are folders like any other."""
    (out / "sub").mkdir()
    monkeypatch.chdir(out / "sub")
    merge(Path(".."), "second", ONE)
    assert content(out) == whole("second", ONE)
    monkeypatch.chdir(out)
    merge(Path("."), "third", ONE)
    assert content(out) == whole("third", ONE)


def test_other_files_of_an_earlier_merge_go_with_it(out: Path):
    """A chat template that the later merge does not write must not stay; one edited since gets another name."""
    with staged(out) as folder:
        for name in (*ONE, "config.json", "chat_template.jinja", "generation_config.json"):
            (folder / name).write_text("second")
    (out / "generation_config.json").write_text("edited")
    merge(out, "third", ONE)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "generation_config.json.old").read_text() == "edited"


def test_file_systems_without_locks(out: Path, monkeypatch, caplog):
    """Where flock is not implemented a merge runs unguarded, instead of never, and says so."""
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
    with caplog.at_level("WARNING"):
        merge(out, "second", ONE)
    assert content(out) == whole("second", ONE)
    assert "cannot be locked" in caplog.text


# --- folders of a merge ---------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, str]:
    """Relative path -> content or target of every file and link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_text()
    return found


def test_folders_are_files_of_the_merge_like_others(out: Path):
    """A later merge replaces them, removes those that it does not write, and leaves no empty folder."""
    merge(out, "second", ONE)
    assert (out / NESTED).read_text() == "second"
    (out / NESTED).with_name("mine.jinja").write_text("mine")
    (out / NESTED).with_name("mine.txt").write_text("mine")
    (out / "empty").mkdir()
    with staged(out) as folder:
        for name in (*ONE, "config.json", "deep/er/code.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("third")
    assert not (out / NESTED).exists()
    assert (out / NESTED).with_name("mine.txt").read_text() == "mine"  # a folder with a user's file stays
    assert not (out / NESTED).with_name("mine.jinja").exists()  # it would be a template of the merge
    assert (out / NESTED).with_name("mine.jinja.old").read_text() == "mine"
    merge(out, "fourth", TWO)
    assert not (out / "deep").exists()
    assert (out / "empty").is_dir()
    assert content(out) == whole("fourth", TWO)


@pytest.mark.parametrize("obstacle", ["folder for a file", "file for a folder", "link for a folder", "nested folder"])
def test_what_is_in_the_way_is_said_before_the_first_move(out: Path, tmp_path: Path, obstacle: str):
    """Whatever cannot be replaced: the earlier merge stays whole, and the next run ends well when it is moved away."""
    elsewhere = tmp_path / "elsewhere"
    shutil.rmtree((out / NESTED).parent)
    if obstacle == "folder for a file":
        (out / "README.md").unlink()
        path, code = out / "README.md", "not-a-plain-file"
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif obstacle == "nested folder":
        path, code = out / NESTED, "not-a-plain-file"
        (path / "deeper").mkdir(parents=True)
        (path / "mine.txt").write_text("mine")
    else:
        path, code = (out / NESTED).parent, "not-a-folder"
        elsewhere.mkdir()
        (elsewhere / "tool.jinja").write_text("mine")
        path.symlink_to(elsewhere) if "link" in obstacle else path.write_text("mine")
    before = files(out)
    with refused(OutputError, code, path):
        merge(out, "second", ONE)
    kept = {".slta_merging/out/slta_alphas.json": "second"}  # for the next run
    assert {name: text for name, text in files(out).items() if not name.endswith("pid")} == {**before, **kept}
    check_output_is_early = obstacle == "folder for a file"
    if check_output_is_early:
        with refused(OutputError, code, path):
            check_output(out, [])
    path.rename(tmp_path / "moved")
    merge(out, "third", ONE)
    assert content(out) == whole("third", ONE)
    assert not elsewhere.exists() or (elsewhere / "tool.jinja").read_text() == "mine"


def test_a_half_moved_merge_of_an_earlier_release_is_mended(out: Path):
    """It had stopped at a folder: no config.json, the folder unrecorded, a list of names in replaces.json."""
    merged = out / ".slta_merged"
    (merged / "out" / "additional_chat_templates").mkdir(parents=True)
    (merged / "replaces.json").write_text(json.dumps(["README.md", "config.json", *TWO]))
    for name in (*ONE, "config.json", "slta_alphas.json", NESTED):
        (merged / "out" / name).write_text("second")
    (out / "README.md").write_text("second")
    hashes = {name: hash_in(merged / "out", name) for name in (*ONE, "config.json", "slta_alphas.json")}
    hashes["README.md"] = hash_in(out, "README.md")
    record = json.loads((out / "slta_merge.json").read_text())
    (merged / "out" / "slta_merge.json").write_text(json.dumps({**record, "files": hashes}))
    record["files"].pop(NESTED)
    (out / "slta_merge.json").write_text(json.dumps(record))
    for name in ("config.json", *TWO):
        (out / name).unlink()
    check_output(out, [])
    with contextlib.suppress(KeyError), staged(out):
        raise KeyError  # whatever becomes of the new merge
    assert content(out) == whole("second", ONE)
    assert (out / "config.json").read_text() == "second"
    merge(out, "third", ONE)
    assert content(out) == whole("third", ONE)


def test_records_lead_nowhere_else(out: Path, tmp_path: Path):
    """A stranger's record cannot make a merge remove files outside of OUT, nor behind a link in it."""
    (tmp_path / "mine.txt").write_text("mine")
    (out / "link").symlink_to(tmp_path)
    record = json.loads((out / "slta_merge.json").read_text())
    taken = hash_in(tmp_path, "mine.txt")
    record["files"] |= dict.fromkeys(
        ["../mine.txt", str(tmp_path / "mine.txt"), "link/mine.txt", "a/../../mine.txt"], taken
    )
    (out / "slta_merge.json").write_text(json.dumps(record))
    merge(out, "second", ONE)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- files of others ------------------------------------------------------------------------------------------------

FOREIGN = ("model.safetensors", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with somebody's model, an adapter and other files."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in (*FOREIGN, "config.json", "README.md", "notes.txt", "optimizer.pt", "data.gguf"):
        (folder / name).write_text(f"their {name}")
    (tmp_path / "cached").write_text("their weights in a cache")
    (folder / "model.fp16.safetensors").symlink_to(tmp_path / "cached")
    return folder


def test_weights_of_others_are_replaced_on_demand(foreign: Path, tmp_path: Path):
    """Only what could be loaded in place of the merge goes; other weights and files stay, under another name where the
    merge has one of theirs."""
    with refused(OutputError, "foreign-weights", "--overwrite"):
        check_output(foreign, [])
    before = files(foreign)
    names = sorted([*FOREIGN, "model.fp16.safetensors"])
    assert check_output(foreign, [], overwrite=True) == names
    assert files(foreign) == before
    merge(foreign, "ours", TWO, overwrite=True)
    kept = {"notes.txt": "their notes.txt", "optimizer.pt": "their optimizer.pt", "data.gguf": "their data.gguf"}
    kept |= {"README.md.old": "their README.md", "config.json.old": "their config.json"}
    found = files(foreign)
    assert {name: text for name, text in found.items() if text != "ours" and name != "slta_merge.json"} == kept
    assert {name for name, text in found.items() if text == "ours"} == {*whole("ours", TWO), "config.json"}
    assert (tmp_path / "cached").read_text() == "their weights in a cache"


def test_a_failed_merge_loses_nothing_of_others(foreign: Path):
    """All of it stays until the merge is complete; weights that come meanwhile are not replaced."""
    before = files(foreign)
    with pytest.raises(KeyboardInterrupt), staged(foreign, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert files(foreign) == before
    with refused(OutputError, "foreign-weights", "during the merge"), staged(foreign, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("ours")
        (foreign / "model-00001-of-00002.safetensors").write_text("new")
    assert files(foreign) == {**before, "model-00001-of-00002.safetensors": "new"}


@pytest.mark.parametrize("moment", range(0, 36, 2))
def test_killed_while_weights_of_others_are_replaced(foreign: Path, monkeypatch, moment: int):
    """Either all is as before, or the next run, which overwrites nothing itself, completes the move."""
    before = files(foreign)
    with dying_after(moment, monkeypatch):
        merge(foreign, "ours", TWO, overwrite=True)
    found = {name: text for name, text in files(foreign).items() if not name.startswith(".slta_merging/")}
    if found != before:
        check_output(foreign, [])
        merge(foreign, "last", ONE)
        assert content(foreign) == whole("last", ONE)
        assert (foreign / "README.md.old").read_text() == "their README.md"


def test_files_of_the_user_are_kept(tmp_path: Path):
    """A README and a config in a folder without weights, and a card edited since: kept under another name, also the
    second time; what is the same is not kept twice."""
    out = tmp_path / "project"
    out.mkdir()
    (out / "README.md").write_text("# My project")
    (out / "generation_config.json").write_text("first")
    merge(out, "first", (*ONE, "generation_config.json"))
    assert (out / "README.md.old").read_text() == "# My project"
    assert not (out / "generation_config.json.old").exists()
    (out / "README.md").write_text("edited")
    (out / "generation_config.json").unlink()
    (out / "generation_config.json").symlink_to(tmp_path / "elsewhere")
    merge(out, "second", (*ONE, "generation_config.json"))
    assert (out / "README.md.old2").read_text() == "edited"
    assert os.readlink(out / "generation_config.json.old") == str(tmp_path / "elsewhere")
    merge(out, "third", ONE)
    assert [name for name in files(out) if ".old" in name] == [
        "README.md.old", "README.md.old2", "generation_config.json.old"
    ]  # fmt: skip


def test_statistics_are_no_weights(out: Path):
    """Told by their header, whatever they are called; a foreign file of a like name is."""
    statistics = Statistics(torch.zeros(1, dtype=torch.int64), 1, {"m": torch.ones(1, 1, 1, dtype=torch.float64)})
    for name in ("A.stats.safetensors", "model-of-mine.safetensors"):
        statistics.save(out / name)
    check_output(out, [])
    (out / "model.stats.safetensors").write_text("weights")
    with refused(OutputError, "foreign-weights", "(model.stats.safetensors)"):
        check_output(out, [])


HARMLESS = (
    "m.gguf", "model.Q4_K_M.gguf", "optimizer.pt", "rng_state.pth", "training_args.bin", "consolidated.safetensors",
    "consolidated.00.pth", "weights.safetensors", "tf_model.h5", "model.onnx",
)  # fmt: skip


def test_weights_that_nothing_loads_are_no_reason_to_refuse(out: Path):
    """Neither before nor after a merge beside them; they stay as they are."""
    for name in HARMLESS:
        (out / name).write_text("theirs")
    for text in ("second", "third"):
        check_output(out, [])
        merge(out, text, ONE)
        assert content(out) == whole(text, ONE)
    assert {(out / name).read_text() for name in HARMLESS} == {"theirs"}


# --- files of others that transformers would read as the merge's -----------------------------------------------------

READ = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "additional_chat_templates/rag.jinja",
    "custom_generate/generate.py",
)  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder without weights, with files of another model and with files that nothing reads."""
    folder = tmp_path / "mixed"
    for name in (*READ, "notes.txt", "LICENSE", "additional_chat_templates/notes.txt", "tokenizer.model.old"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"their {name}")
    return folder


def test_files_that_would_be_read_as_the_merges_are_kept_under_another_name(mixed: Path, caplog):
    """Each with a warning; the second merge renames nothing, and a file edited since is kept, too."""
    before = files(mixed)
    with pytest.raises(KeyboardInterrupt), staged(mixed):
        raise KeyboardInterrupt
    assert files(mixed) == before
    merge(mixed, "ours", ONE)
    kept = {f"{name}.old": f"their {name}" for name in READ if name != "tokenizer.model"}
    kept |= {name: before[name] for name in before if name not in READ}
    kept["tokenizer.model.old2"] = "their tokenizer.model"
    ours = {*whole("ours", ONE), "config.json", "slta_merge.json"}
    assert {name: text for name, text in files(mixed).items() if name not in ours} == kept
    assert len(caplog.messages) == len(READ)
    caplog.clear()
    with staged(mixed) as folder:
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            (folder / name).write_text("again")
    assert not caplog.messages
    (mixed / "generation_config.json").write_text("edited")
    merge(mixed, "last", ONE)
    assert (mixed / "generation_config.json.old2").read_text() == "edited"
    assert not {"tokenizer_config.json", "generation_config.json"} & files(mixed).keys()  # the former was a merge's


def test_a_link_to_templates_of_others_is_renamed(tmp_path: Path):
    """The link, and not the files behind it."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "rag.jinja").write_text("theirs")
    (out / "additional_chat_templates").symlink_to(elsewhere)
    with staged(out) as folder:
        (folder / "config.json").write_text("ours")
    assert not (out / "additional_chat_templates").exists()
    assert os.readlink(out / "additional_chat_templates.old") == str(elsewhere)
    assert (elsewhere / "rag.jinja").read_text() == "theirs"


@pytest.mark.parametrize("moment", range(0, 50, 3))
def test_killed_while_files_of_others_are_renamed(mixed: Path, monkeypatch, moment: int):
    """The next run completes the move, keeps what was theirs, and takes none of the first merge's files for theirs."""
    before = files(mixed)
    with dying_after(moment, monkeypatch), staged(mixed) as folder:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            (folder / name).write_text("ours")
    if (mixed / "config.json").exists():
        assert not {name for name, text in files(mixed).items() if name in READ and text != "ours"}
    merge(mixed, "last", ONE)
    found = files(mixed)
    assert not found.keys() & set(READ)
    assert sorted(text for text in found.values() if text.startswith("their")) == sorted(before.values())
    assert "ours" not in found.values()


def test_all_names_of_vocabularies_are_known():
    """Those in the sources of the installed transformers."""
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for each in re.findall(r"^VOCAB_FILES_NAMES = (\{[^}]*\})", path.read_text(encoding="utf-8"), re.MULTILINE):
            found |= set(re.findall(r': "([^"]+)"', each))
    assert {"tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"} <= found
    assert not {name for name in found if not any(fnmatchcase(name, pattern) for pattern in LOADERS_READ)}


def test_a_dangling_link(tmp_path: Path):
    """It is said to be one, as OUT itself and as a parent of it."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path in (link, link / "out"):
        with refused(OutputError, "not-a-folder", link, "is a link to nothing"):
            check_output(path, [])
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    """A folder without the right to write is refused before the merge."""
    check_writable(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(OutputError, "cannot-write", tmp_path):
        check_writable(tmp_path / "out")


# --- the same through the commands ----------------------------------------------------------------------------------


def test_named_chat_templates_come_along_every_time(tiny, tmp_path, write_recipe):
    """A tokenizer with several templates writes a folder into OUT: the second merge replaces it, and one without them
    removes it."""
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    named = {"default": tokenizer.chat_template, "tool": "{{ messages }}", "rag": "{{ messages[0] }}"}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base)
    recipe = {**tiny.recipe(2, num_samples=2), "base_model": str(base), "tokenizer": {"source": "base"}}
    out = tmp_path / "out"
    for _ in range(2):
        result = mergekit_yaml(write_recipe(recipe), out, "--quiet")
        recipe.pop("tokenizer", None)  # the second time mergekit copies the tokenizer's files, but no folder
        assert result.exit_code == 0, result.output
        assert AutoTokenizer.from_pretrained(out).chat_template == named
        assert not list(out.glob(".slta*"))
        assert (out / "config.json").is_file()
    recipe["chat_template"] = "{{ messages }} and nothing else"
    result = mergekit_yaml(write_recipe(recipe), out, "--quiet")
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(out).chat_template == recipe["chat_template"]
    assert not (out / "additional_chat_templates").exists()


def test_overwriting_a_model_of_others(tiny, tmp_path, write_recipe):
    """The stock command refuses and names the command that can; that one replaces the weights, says so in a line, and
    the result loads as the merge. An adapter's config would have led transformers to another model."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    shutil.copytree(tiny.experts[0], out)
    (out / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny.base)}))
    save_file(tensors(out), out / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tiny.recipe(2, num_samples=2))
    before = sorted(os.listdir(out))
    assert_refused(mergekit_yaml(recipe, out, "--quiet"), "foreign-weights", out, "mergekit-slta merge --overwrite")
    assert sorted(os.listdir(out)) == before
    broken = write_recipe(tiny.recipe(2, granularity="fine"), "broken.yml")
    assert_refused(slta("merge", broken, out, "--overwrite", "--quiet"), "invalid-value", "`granularity`")
    assert sorted(os.listdir(out)) == before
    assert slta("merge", recipe, alone, "--quiet").exit_code == 0
    result = slta("merge", recipe, out, "--overwrite", "--out-shard-size", "5000")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Replaced")]
    assert "adapter_config.json" in line
    assert "model.safetensors" in line
    assert not (out / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(alone).items())
    assert mergekit_yaml(recipe, out, "--quiet").exit_code == 0  # it is ours now


def test_an_input_is_never_overwritten(tiny, tmp_path, write_recipe):
    """Neither a model nor an adapter of the recipe."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    recipe = tiny.recipe(2)
    result = slta("merge", write_recipe(recipe), tiny.experts[0], "--overwrite", "--quiet")
    assert_refused(result, "output-is-an-input", tiny.experts[0])
    recipe["models"][0]["model"] = f"{tiny.base}+{adapter}"
    result = slta("merge", write_recipe(recipe), adapter, "--overwrite", "--quiet")
    assert_refused(result, "output-is-an-input", adapter)
    assert (adapter / "adapter_config.json").read_text() == "{}"


def test_nothing_of_another_model_acts_on_the_merge(tiny, tmp_path, write_recipe, caplog):
    """Another model's tokenizer files, templates and sampling, which this merge does not write: what loads is what
    loads from a merge into a new folder."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    (out / "additional_chat_templates").mkdir(parents=True)
    (out / "additional_chat_templates" / "rag.jinja").write_text("foreign")
    (out / "chat_template.jinja").write_text("foreign")
    (out / "special_tokens_map.json").write_text('{"bos_token": "foreign", "eos_token": "foreign"}')
    (out / "added_tokens.json").write_text('{"foreign": 3}')
    (out / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.1}')
    recipe = write_recipe(tiny.recipe(2, num_samples=2))
    for folder in (alone, out):
        assert mergekit_yaml(recipe, folder, "--quiet").exit_code == 0
    expected, found = (AutoTokenizer.from_pretrained(folder) for folder in (alone, out))
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.get_vocab() == expected.get_vocab()
    assert found.chat_template == expected.chat_template
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict() for folder in (alone, out)
    )
    assert second == first
    assert "special_tokens_map.json.old" in caplog.text


def test_a_project_folder_keeps_its_files(tiny, tmp_path, write_recipe, caplog):
    """Merging into a folder with a config of another kind: it is kept beside the model's, and that is said."""
    (tmp_path / "config.json").write_text('{"port": 8080}')
    (tmp_path / "notes.txt").write_text("mine")
    result = mergekit_yaml(write_recipe(tiny.recipe(2, num_samples=2)), tmp_path, "--quiet")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "config.json.old").read_text() == '{"port": 8080}'
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    assert "config.json.old" in caplog.text
