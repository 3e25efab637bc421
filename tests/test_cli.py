"""The commands: their order and summaries, which options act on which, `-v`, and a quick `--help`."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import click
import pytest
from conftest import assert_refused, check_message, fork, own_command, slta
from mergekit.options import MergeOptions

from mergekit_slta.cli.main import COMMANDS, main
from mergekit_slta.cli.mergekit_commands import ACTING_OPTIONS

READING = ("check", "calibrate", "linearity")


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_commands_are_listed_in_the_order_of_use():
    """First look, then compute, merge, look at the result; the demo last."""
    order = [
        "init",
        "check",
        "rows",
        "calibrate",
        "merge",
        "compare",
        "report",
        "solve",
        "export",
        "linearity",
        "env",
        "demo",
    ]
    assert main.list_commands(click.Context(main)) == list(COMMANDS) == order
    listed = [
        line.split()[0] for line in slta("--help").output.partition("Commands:\n")[2].splitlines() if line[2:3] > " "
    ]
    assert listed == order


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_the_first_line_of_its_commands_docstring(name):
    """The table that `--help` reads says what the command's own help says."""
    assert inspect.cleandoc(command(name).help or "").splitlines()[0] == COMMANDS[name].summary
    assert command(name).name == name


@pytest.mark.process
def test_help_loads_nothing_heavy():
    """The list of commands, and the help of those without mergekit's options, wait for no library."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_slta.cli.main import main\n"
        "for arguments in [], ['report'], ['solve'], ['export'], ['env'], ['demo']:\n"
        "    assert CliRunner().invoke(main, [*arguments, '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'mergekit', 'transformers', 'peft', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_merge_takes_all_of_mergekits_options():
    """What works with `mergekit-yaml` works with `merge`."""
    assert set(MergeOptions.model_fields) <= {param.name for param in command("merge").params}


@pytest.mark.parametrize("name", READING)
def test_a_command_takes_only_options_that_act_on_it(name):
    """No option for writing a model where none is written."""
    given = {param.name for param in command(name).params} & set(MergeOptions.model_fields)
    assert given == {option for option, names in ACTING_OPTIONS.items() if name in names} | {"verbosity"}
    assert not given & {"write_model_card", "copy_tokenizer", "out_shard_size", "low_cpu_memory", "random_seed"}


def test_the_table_of_options_names_what_exists():
    """An option that mergekit renames is noticed."""
    assert set(ACTING_OPTIONS) <= set(MergeOptions.model_fields)
    assert {name for names in ACTING_OPTIONS.values() for name in names} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_verbose(name):
    """One option, by one name, in every command."""
    (option,) = (param for param in command(name).params if param.name == "verbosity")
    assert option.opts == ["-v", "--verbose"]


@pytest.mark.parametrize(
    ("name", "code"),
    [("solve", "unreadable-file"), ("export", "wrong-file-type"), ("report", "wrong-file-type"),
     ("demo", "not-a-folder")],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["-v", "--verbose", None])
def test_verbose_shows_the_traceback(tmp_path, name, code, flag):
    """With `-v` the traceback and the line, else the line alone; the exit code is the same."""
    (tmp_path / "file").write_text("{}")
    result = slta(name, tmp_path / "file", *([flag] if flag else []))
    if flag is None:
        assert_refused(result, code, tmp_path / "file")
        return
    assert result.exit_code == 2, result.output
    assert "Traceback" in result.output
    check_message(result.output.splitlines()[-1], code, "Error: ", tmp_path / "file")


@pytest.mark.parametrize("flag", ["-v", None])
def test_an_unexpected_error_is_one_line(tmp_path, monkeypatch, flag):
    """Its type and text, and how to see where it came from."""

    def fail(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("mergekit_slta.reporting.report.report", fail)
    result = slta("report", tmp_path, *([flag] if flag else []))
    if flag is None:
        assert_refused(result, "unexpected-error", "ZeroDivisionError: division by zero; -v shows where", exit_code=1)
        return
    assert result.exit_code == 1
    assert "Traceback" in result.output
    assert result.output.splitlines()[-1] == "Error: ZeroDivisionError: division by zero"


def without_reader(*arguments: str) -> None:
    """The command, where the reader of its standard output has ended, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    own_command(*arguments)


def on_a_full_disk(*arguments: str) -> None:
    """The command, where its standard output goes to a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    own_command(*arguments)


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["solve", "--help"], ["check"]])
def test_a_reader_that_ends_early_ends_the_command_quietly(tiny, write_recipe, tmp_path, arguments):
    """`mergekit-slta check RECIPE | head -1` says nothing about the pipe."""
    recipe = [str(write_recipe(tiny.recipe(2)))] if arguments == ["check"] else []
    result = fork(without_reader, *arguments, *recipe, cwd=tmp_path).ended()
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
@pytest.mark.parametrize("arguments", [["--help"], ["check"]])
def test_standard_output_on_a_full_disk_is_an_error(tiny, write_recipe, tmp_path, arguments):
    """What could not be written is said, once."""
    recipe = [str(write_recipe(tiny.recipe(2)))] if arguments == ["check"] else []
    result = fork(on_a_full_disk, *arguments, *recipe, cwd=tmp_path).ended()
    assert result.stderr.count("\n") == 1
    assert_refused(result, "cannot-write", "the output (No space left on device)")
