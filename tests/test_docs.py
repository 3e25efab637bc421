"""What the documents say is so."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from string import Formatter

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.scripts import run_yaml
from test_boundaries import ORDER

from mergekit_slta import __version__
from mergekit_slta.cli import main as cli
from mergekit_slta.data.draw import HELD_OUT_SHARE, MAX_HELD_OUT, MAX_UNUSABLE, MIN_HELD_OUT
from mergekit_slta.data.formats import FORMATS, ROLES
from mergekit_slta.data.local_files import COMPRESSED, LOADERS
from mergekit_slta.errors import SltaError
from mergekit_slta.maths.divergence import WEAK_SHARE
from mergekit_slta.objectives.joint_search import PATIENCE
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.objectives import MAX_STEPS, all_shared_keys
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.settings import METHOD, SELF, TASK_KEYS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
OUTPUTS = "\n".join(
    path.read_text(encoding="utf-8")
    for pattern in ("docs/output/*", "examples/*/*.md", "examples/*/output/*.md", "examples/*/output/*.txt")
    for path in sorted(ROOT.glob(pattern))
)
BLOCKS = [
    pytest.param(language, body, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, (language, body) in enumerate(re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL), 1)
]
ALL_RECIPES = sorted((ROOT / "yaml_recipes").rglob("*.yml"))
RECIPES = [path for path in ALL_RECIPES if path.stem != "task_arithmetic"]
WORDS_OF_README = 1100


@pytest.mark.parametrize(("language", "body"), BLOCKS)
def test_every_block_is_valid(language, body, tmp_path, monkeypatch):
    """Recipes and parts of recipes are read, commands parsed, rows rendered, Python compiled, output compared with
    what is committed."""
    monkeypatch.chdir(tmp_path)
    parse = {
        "yaml": _read_part, "bash": _parse_commands, "sh": _parse_commands, "console": _parse_session,
        "json": _parse_rows, "python": _compile, "text": _find_output,
    }  # fmt: skip
    parse[language](body)


def _read_part(body: str) -> None:
    """A recipe, its `models`, or keys of a model or of all."""
    part = yaml.safe_load(body)
    recipe = {"merge_method": METHOD, "base_model": "base", "models": [{"model": "expert"}]}
    if part.keys() <= set(TASK_KEYS):
        recipe["models"][0]["parameters"] = {"dataset": "rows.jsonl", **part}
    elif part.keys() <= set(all_shared_keys()):
        recipe["parameters"] = part
    else:
        recipe |= part
    read_recipe(MergeConfiguration.model_validate(recipe))


def _parse_commands(body: str) -> None:
    """Every command is one that exists, and takes these arguments."""
    for line in re.sub(r"\\\n\s*", " ", body).splitlines():
        for command in re.split(r"\s&&\s", line):
            words = shlex.split(command, comments=True)
            if words:
                _parse_command(words)


def _parse_session(body: str) -> None:
    """The commands of a transcript; the test that makes it holds what they print."""
    joined = re.sub(r"\\\n\s*", " ", body)
    _parse_commands("\n".join(re.findall(r"^\$ (.*)", joined, re.MULTILINE)))


def _parse_command(words: list[str]) -> None:
    name, rest = Path(words[0]).name, words[1:]
    if name == "torchrun":
        name, rest = "mergekit-slta", rest[rest.index("mergekit_slta") + 1 :]
    elif name == "srun":
        return _parse_commands(rest[-1])
    if name in ("export", "cd"):
        return None
    if name == "python":
        assert (rest[0] == "-m" and rest[1] in ("venv", "pytest")) or (ROOT / rest[0]).exists(), words
        return None
    if name in ("pip", "hf", "mkdocs", "lm_eval"):
        return None
    for word in rest:
        if re.fullmatch(r"[\w./-]+", word) and not word.startswith("-"):
            Path(word).parent.mkdir(parents=True, exist_ok=True)  # `report` looks whether its target exists
            Path(word).touch() if not Path(word).is_dir() else None
    if name == "mergekit-yaml":
        command = run_yaml.main
    else:
        assert name == "mergekit-slta", words
        command = cli.main.get_command(None, rest.pop(0))
        assert command is not None, words
    command.make_context(name, rest)
    return None


def _parse_rows(body: str) -> None:
    """Every row is of a format that is known, or has the columns of the template above it."""
    for line in body.splitlines():
        row = json.loads(line)
        assert row.keys() == {"question", "answer"} or any(known.parse(row) for known in FORMATS), line


def _compile(body: str) -> None:
    compile(body, "block", "exec")


def _find_output(body: str) -> None:
    """Its lines are those of committed outputs; a list of the package's folders has each of them."""
    if body.startswith("errors.py"):
        listed = re.findall(r"^(\w+)/(?:, (\w+)/)?", body, re.MULTILINE)
        assert [name for pair in listed for name in pair if name] == [
            name for name in ORDER if (ROOT / "mergekit_slta" / name).is_dir()
        ]
        return
    for line in body.splitlines():
        assert line.strip() in OUTPUTS, line


def test_the_notebook_is_valid():
    """Its cells compile; its outputs are of one run, without paths of that machine. `.ci/run` runs it."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        _compile("".join(cell["source"]).replace("%pip", "pass  # "))
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not re.search(r"/(root|home|tmp|work)/", json.dumps([cell["outputs"] for cell in cells]))


def test_every_recipe_is_listed():
    """yaml_recipes/README.md has a row for each."""
    listed = re.findall(
        r"^\| \[([\w.]+)\]\(([\w./]+)\) \|", (ROOT / "yaml_recipes/README.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in listed} == {path.name for path in (ROOT / "yaml_recipes").iterdir()} - {"README.md"}


def test_readme_is_short_and_has_the_commands_of_ci():
    """It is read in some minutes; `.ci/run` takes two command lines from it."""
    assert len(README.split()) < WORDS_OF_README
    for end in ("demo", "-m pytest"):
        assert re.search(rf"^python -m venv .* {end}$|^python -m venv .*mergekit-slta {end}$", README, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "commands.md"])
def test_every_command_is_documented_and_exists(page):
    """The README and the page name each command, and no other."""
    documented = set(re.findall(r"^[|-] `mergekit-slta ([a-z]+)", PAGES[page], re.MULTILINE))
    assert documented == set(cli.main.list_commands(None))


@pytest.mark.parametrize("page", ["recipe.md", "models.md", "session.md"])
def test_generated_pages_are_what_the_script_writes(page):
    """The tables of keys and of architectures are up to date: `python docs/generate.py`."""
    namespace = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert namespace["filled"](page, PAGES[page]) == PAGES[page]


def test_every_recipe_key_is_documented():
    """docs/recipe.md has a row per key with its meaning, and every row is a key."""
    table = re.findall(
        r"^\| `([a-z_]+)` \| .+ \| .+ \| \w.* \|$|^\| `([a-z_]+)` \| .+ \| .+ \| `.* \|$",
        PAGES["recipe.md"],
        re.MULTILINE,
    )
    assert sorted(one or other for one, other in table) == sorted({*all_shared_keys(), *TASK_KEYS})


def test_version_is_in_one_voice():
    """pyproject and package agree."""
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_links_lead_somewhere():
    """Relative links and images of the documents exist."""
    for name in (
        *("README.md", "CONTRIBUTING.md"),
        *(f"docs/{name}" for name in PAGES if name != "README.md"),
        "examples/smollm2/README.md",
        "examples/gemma3/README.md",
        "examples/linear_attention_finetuning/README.md",
        "yaml_recipes/README.md",
        "yaml_recipes/mergebench/README.md",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_check(path, tiny, tmp_path, monkeypatch):
    """Every recipe in yaml_recipes/ passes `check` once its models and data stand in for tiny ones."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    places = {recipe["base_model"]: tiny.base}
    stand_ins = itertools.cycle(zip(tiny.experts, tiny.datasets, strict=True))
    for entry, (expert, dataset) in zip(recipe["models"], stand_ins, strict=False):
        places[entry["model"]] = expert
        parameters = entry.get("parameters", {})
        if parameters.get("dataset", SELF) != SELF:
            _stand_in(parameters["dataset"], dataset, parameters)
    for name, source in places.items():
        base, _, adapter = str(name).partition("+")
        if adapter:
            _stand_in_adapter(tmp_path / base, tmp_path / adapter)
        else:
            shutil.copytree(source, tmp_path / name)
    named = recipe.get("parameters", {}).get("alphas")
    runner = CliRunner()
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    if named:
        calibrated = {**recipe, "parameters": {}}
        for entry, dataset in zip(calibrated["models"], tiny.datasets, strict=False):
            entry["parameters"] = {"dataset": str(dataset)}
        (tmp_path / "calibrate.yml").write_text(yaml.safe_dump(calibrated))
        made = runner.invoke(cli.main, ["calibrate", "calibrate.yml", "-o", named, "--quiet"])
        assert made.exit_code == 0, made.output
    result = runner.invoke(cli.main, ["check", "recipe.yml"])
    assert result.exit_code == 0, result.output
    assert "submodules cover all" in result.output


def _stand_in_adapter(base: Path, target: Path) -> None:
    """A LoRA adapter of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian")).save_pretrained(target)


def _stand_in(name: str, rows: Path, parameters: dict) -> None:
    """Put tiny rows where a recipe expects data; Hub ids become local folders of that name."""
    import pandas

    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in content:
        row["content"] = row["text"]
        row["messages"] = [{"role": "user", "content": row["text"]}]
        row.pop("tags")
    if "text" in parameters:
        fields = [field for _, field, _, _ in Formatter().parse(parameters["text"]) if field]
        for row in content:
            row.pop("messages")
            for field in fields:
                row.setdefault(field, row["text"])
    frame = pandas.DataFrame(content)
    path = Path(name.replace("*", "part"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        if not path.suffix:  # a Hub id
            path.mkdir(parents=True)
            parameters.pop("dataset_config", None)
            path = path / "train.jsonl"
        frame.to_json(path, orient="records", lines=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_as_they_stand(path):
    """Every recipe in yaml_recipes/ reads without an error."""
    try:
        read_recipe(load_config(path)[0])
    except SltaError as error:
        pytest.fail(error.message)


@pytest.mark.parametrize("path", sorted({*ALL_RECIPES} - {*RECIPES}), ids=lambda path: path.parent.name)
def test_stock_recipes_are_over_the_same_models(path):
    """A recipe to compare with is one of mergekit's own, over the models of the recipe beside it."""
    stock, ours = (load_config(each)[0] for each in (path, path.with_name("submodule_linear.yml")))
    assert stock.merge_method == "task_arithmetic"
    assert [entry.model for entry in stock.models] == [entry.model for entry in ours.models]
    assert stock.base_model == ours.base_model


@pytest.mark.parametrize("page", ["README.md", "results.md", "processes.md", "objectives.md"])
def test_numbers_with_errors_are_those_of_committed_outputs(page):
    """Each "value ± error" is, to its digits, in a table that is committed with the script that made it."""
    committed = [tuple(map(float, pair)) for pair in re.findall(r"(-?\d+\.?\d*) ± (\d+\.?\d*)", OUTPUTS)]
    stated = re.findall(r"(-?\d+\.\d) ± (\d+\.\d)\b", PAGES[page])
    assert stated
    whole = re.findall(r"\d+% ± \d+%|(?<![\d.] ± )\b\d+\.\d / \d+\.\d\b(?! ±)", PAGES[page])
    assert not [share for share in whole if share not in OUTPUTS]
    for value, error in stated:
        assert any(
            abs(abs(float(value)) - abs(other)) < 0.0501 and abs(float(error) - spread) < 0.0501
            for other, spread in committed
        ), f"{value} ± {error}"


def test_the_evidence_is_a_table_of_the_results():
    """Every row of the long table is a row of the evidence run's; so is the demo's table in the README."""
    rows = [line for line in PAGES["results.md"].splitlines() if line.startswith("|") and line.count("|") == 8]
    assert len(rows) > 20
    assert not [row for row in rows if row not in OUTPUTS]
    section = README.partition("## Demo")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 4
    demo = (ROOT / "examples" / "demo" / "results.md").read_text().splitlines()
    assert not [row for row in rows if row not in demo]


def test_the_readme_counts_the_models():
    """The number of classes is that of the table of architectures."""
    classes = {
        name for name in re.findall(r"`(\w+)`", PAGES["models.md"].partition("generated")[2]) if name[0].isupper()
    }
    assert f"[{len(classes)} classes](docs/models.md)" in README


def test_every_file_type_and_format_is_documented():
    """docs/data.md names each type of file, each ending of compression, each column and role that is known."""
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = {name for known in FORMATS for name in known.columns.split(" with ")}
    for name in {*names, *LOADERS, *COMPRESSED, *ROLES} - {"system"}:
        assert f"`{name}`" in document, name
    assert str(MAX_UNUSABLE) in document


def test_numbers_of_held_out_rows_and_steps_are_the_codes():
    """docs/objectives.md and docs/data.md say how many rows are held out, and how many steps there may be."""
    assert HELD_OUT_SHARE == 5  # a fifth
    for text in (PAGES["objectives.md"], PAGES["data.md"]):
        flat = " ".join(text.split())
        assert "the last fifth of" in flat
        assert f"at most {MAX_HELD_OUT}" in flat
        assert f"fewer than {MIN_HELD_OUT * HELD_OUT_SHARE} rows" in flat
    assert f"up to {MAX_STEPS} times `num_samples` rows" in " ".join(PAGES["objectives.md"].split())
    assert PATIENCE == 2  # "two steps in turn"
    assert WEAK_SHARE == 0.03  # "below 3%"
