"""The import hook: finds mergekit's modules whenever they come, costs nothing, harms nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import check_message

pytestmark = pytest.mark.process
PACKAGE = Path(__file__).resolve().parent.parent


def python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_start_of_python_imports_nothing_heavy():
    """A bare interpreter has the finder installed, and neither torch nor mergekit nor anything else of note."""
    result = python(
        "import sys; print(sorted(name for name in sys.modules if name.partition('.')[0] in "
        "('torch', 'mergekit', 'transformers', 'click', 'pydantic', 'typing', 'importlib', 'mergekit_slta')))"
    )
    assert result.returncode == 0, result.stderr
    assert "'mergekit_slta', 'mergekit_slta._autoload'" in result.stdout
    for heavy in ("torch", "'mergekit'", "transformers", "click", "pydantic", "typing", "importlib.abc"):
        assert heavy not in result.stdout.replace("mergekit_slta", "")


def test_the_hook_loads_no_module_but_its_own():
    """What it costs in time is for the benchmark `startup`, and for what `.ci/run` prints; this is why it is little."""
    result = python(
        f"import os, sys; sys.path.insert(0, {str(PACKAGE)!r}); before = set(sys.modules); "
        "import mergekit_slta._autoload; print(sorted(set(sys.modules) - before))",
        "-S",
    )
    assert result.stdout.strip() == "['mergekit_slta', 'mergekit_slta._autoload']", result.stderr


KNOWN = "from mergekit import merge_methods; print([m.spec.name for m in merge_methods.registered_methods()])"


def test_stock_mergekit_knows_the_method():
    """Importing mergekit's command is enough: the method is registered without a word, and `mergekit-yaml`,
    `mergekit-multi` and `mergekit.merge` hold the same wrapped function."""
    result = python(
        "import mergekit.scripts.run_yaml as a, mergekit.scripts.multimerge as b, mergekit.merge as c\n"
        "print(a.run_merge is b.run_merge is c.run_merge, hasattr(c.run_merge, '_mergekit_slta_original'))\n" + KNOWN
    )
    wrapped, known = result.stdout.splitlines()
    assert wrapped.split() == ["True", "True"]
    assert known.count("'submodule_linear'") == 1, result.stderr
    assert "mergekit-slta" not in result.stderr


def test_isolated_interpreters_and_spawned_workers_know_it(tmp_path):
    """Spawned processes, as Ray's workers are, and `python -I`, by the doors of the methods and of the planner:
    interpreters of their own that read .pth files."""
    assert python("import sys; print('mergekit_slta._autoload' in sys.modules)", "-I").stdout == "True\n"
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "def known():\n"
        "    import mergekit.plan\n"
        "    from mergekit import merge_methods\n"
        "    return [method.spec.name for method in merge_methods.registered_methods()]\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(known).count('submodule_linear'))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("zipped", [False, True])
def test_where_no_pth_is_read_an_import_does_it(tmp_path, zipped):
    """Without `site`, importing the package is enough: before mergekit, or behind it and from an archive."""
    where = PACKAGE
    if zipped:
        where = tmp_path / "package.zip"
        with zipfile.ZipFile(where, "w") as archive:
            for path in (PACKAGE / "mergekit_slta").rglob("*.py"):
                archive.write(path, path.relative_to(PACKAGE))
    libraries = [path for path in sys.path if path.endswith("-packages")]
    paths = f"import sys; sys.path[:0] = {[str(where), *libraries]!r}; "
    code = KNOWN + "; import mergekit_slta; " + KNOWN if zipped else "print(); import mergekit_slta; " + KNOWN
    result = python(paths + code + f"; assert mergekit_slta.__file__.startswith({str(where)!r})", "-S")
    assert result.returncode == 0, result.stderr
    before, behind = result.stdout.splitlines()
    assert "'submodule_linear'" not in before
    assert behind.count("'submodule_linear'") == 1, result.stderr


def test_switch_turns_it_off_and_importing_late_catches_up():
    """MERGEKIT_SLTA_AUTOLOAD=0: mergekit is as it was. The hook that is installed behind it then registers and wraps,
    once, also where the name was imported."""
    result = python(
        f"import sys; sys.path.append({str(PACKAGE)!r})\n"  # without site-packages' .pth files there is no finder yet
        "import os; os.environ.pop('MERGEKIT_SLTA_AUTOLOAD')\n"
        "from mergekit.scripts import run_yaml\n" + KNOWN + "\nbefore = len(merge_methods.registered_methods())\n"
        "import mergekit_slta._autoload as autoload\n"
        "autoload.install(); autoload.install()\n"
        "added = len(merge_methods.registered_methods()) - before\n"
        "print(added, hasattr(run_yaml.run_merge, '_mergekit_slta_original'))",
        MERGEKIT_SLTA_AUTOLOAD="0",
    )
    known, added = result.stdout.splitlines()
    assert "submodule_linear" not in known
    assert "'task_arithmetic'" in known
    assert added.split() == ["1", "True"], result.stderr


def test_harmless_without_mergekit(tmp_path):
    """Where mergekit isn't installed, Python starts as ever, and importing mergekit fails as ever."""
    result = python(
        f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\n"
        "import mergekit_slta\n"
        "try:\n    import mergekit.merge\nexcept ModuleNotFoundError as error:\n    print(error.name)",
        "-S",
    )
    assert result.stdout.strip() == "mergekit"
    assert not result.stderr


@pytest.mark.parametrize("case", ["old", "taken"])
def test_trouble_is_one_line_and_mergekit_works_on(tmp_path, case):
    """With an old mergekit or the name taken, one line on stderr says so, and other methods are untouched."""
    trouble = {
        "old": "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.0.6' if name == 'mergekit' else real(name)\n",
        "taken": "import mergekit_slta._autoload as a, types\nhook = a.HOOKS['mergekit.merge_methods']\n"
        "def taken(module):\n"
        "    method = types.SimpleNamespace(spec=types.SimpleNamespace(name='submodule_linear'))\n"
        "    module.registry._METHODS['submodule_linear'] = method\n    hook(module)\n"
        "a.HOOKS['mergekit.merge_methods'] = taken\n",
    }[case]
    result = python(trouble + KNOWN)
    assert result.returncode == 0, result.stderr
    assert "'task_arithmetic'" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("mergekit-slta: ")]
    check_message(line, {"old": "old-mergekit", "taken": "name-taken"}[case], *(["0.0.6"] if case == "old" else []))
    assert "Traceback" not in result.stderr
