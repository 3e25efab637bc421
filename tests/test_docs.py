"""What the documents say is so."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from string import Formatter

import pytest
import yaml
from click.testing import CliRunner

from mergekit_slta import __version__
from mergekit_slta.cli import main as cli
from mergekit_slta.data.draw import HELD_OUT_SHARE, MAX_HELD_OUT, MAX_UNUSABLE, MIN_HELD_OUT
from mergekit_slta.data.formats import FORMATS, ROLES
from mergekit_slta.data.local_files import COMPRESSED, LOADERS
from mergekit_slta.errors import SltaError
from mergekit_slta.maths.divergence import WEAK_SHARE
from mergekit_slta.objectives.joint_search import PATIENCE
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.objectives import MAX_STEPS
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.settings import SHARED_KEYS, TASK_KEYS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_RECIPES = sorted((ROOT / "yaml_recipes").rglob("*.yml"))
RECIPES = [path for path in ALL_RECIPES if path.stem != "task_arithmetic"]


def test_every_command_is_documented_and_exists():
    """The README names each command, and no other."""
    documented = set(re.findall(r"`mergekit-slta ([a-z]+)", README))
    assert documented == set(cli.main.list_commands(None))


def test_every_recipe_key_is_documented():
    """The README's table has a row per key, and every row is a key."""
    table = set(re.findall(r"^\| `([a-z_]+)` \|", README, re.MULTILINE))
    assert set(SHARED_KEYS + TASK_KEYS) <= table | set(re.findall(r"`([a-z_]+)`, `", README))


def test_readme_recipe_is_the_one_in_yaml_recipes():
    """The first recipe that a reader sees loads."""
    (block,) = re.findall(r"```yaml\n(merge_method.*?)```", README, re.DOTALL)[:1]
    shown = yaml.safe_load(block)
    assert shown["merge_method"] == "submodule_linear"
    from mergekit.config import MergeConfiguration

    read_recipe(MergeConfiguration.model_validate(shown))


def test_version_is_in_one_voice():
    """pyproject and package agree."""
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_links_lead_somewhere():
    """Relative links and images of the documents exist."""
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "examples/smollm2/README.md",
        "examples/gemma3/README.md",
        "examples/linear_attention_finetuning/README.md",
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
        if "dataset" in parameters:
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


def test_table_of_architectures_is_the_tests_own():
    """The README's table is what `python tests/zoo.py` prints."""
    from zoo import table

    assert table() in README


def _stand_in(name: str, rows: Path, parameters: dict) -> None:
    """Put tiny rows where a recipe expects data; Hub ids become local folders of that name."""
    import json

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


def test_the_readmes_evidence_is_a_table_of_the_results():
    """Every row of it is a row of the evidence run's tables."""
    section = (ROOT / "README.md").read_text().partition("## Does it help?")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    results = (ROOT / "examples" / "reproduce" / "RESULTS.md").read_text().splitlines()
    assert not [row for row in rows if row not in results]


def test_every_file_type_and_format_is_documented():
    """docs/data.md names each type of file, each ending of compression, each column and role that is known."""
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = {name for known in FORMATS for name in known.columns.split(" with ")}
    for name in {*names, *LOADERS, *COMPRESSED, *ROLES} - {"system"}:
        assert f"`{name}`" in document, name
    assert str(MAX_UNUSABLE) in document


def test_numbers_of_held_out_rows_and_steps_are_the_codes():
    """The README and docs/data.md say how many rows are held out, and how many steps there may be."""
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert HELD_OUT_SHARE == 5  # a fifth
    for text in (README, document):
        flat = " ".join(text.split())
        assert "the last fifth of" in flat
        assert f"at most {MAX_HELD_OUT}" in flat
        assert f"fewer than {MIN_HELD_OUT * HELD_OUT_SHARE} rows" in flat
    assert f"up to {MAX_STEPS} times `num_samples` rows" in " ".join(README.split())
    assert PATIENCE == 2  # "two steps in turn"
    assert WEAK_SHARE == 0.03  # "below 3%"
