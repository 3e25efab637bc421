"""The model card's section: valid on the Hub's rules, the same a second time, and safe with strangers' names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import assert_refused, mergekit_yaml, slta
from huggingface_hub import ModelCard

from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.files.evaluation import Evaluation, Measure, MeasuredPoint, TaskEvaluation
from mergekit_slta.files.merge_record import hash_in, recorded
from mergekit_slta.reporting import report as module
from mergekit_slta.reporting.card import END, START, code, replace_section, section
from mergekit_slta.reporting.report import add_section
from mergekit_slta.reporting.terminal import describe_alphas
from mergekit_slta.runtime.screen import plain


def alphas_of(num_layers: int = 7, models: tuple[str, ...] = ("org/math", "org/code"), **changes) -> Alphas:
    """A small file."""
    entries = [
        SubmoduleAlphas(
            name=f"model.layers.{layer}.mlp", kind="mlp", layer=layer, tensors=(f"t{layer}",),
            alpha=tuple(0.1 * layer + column for column in range(len(models))), stderr=None, condition=2.0, rank=2,
            residual=0.25,
        )
        for layer in range(num_layers)
    ]  # fmt: skip
    given = {
        "granularity": "attn_mlp",
        "base_model": "org/base",
        "models": models,
        "submodules": tuple(entries),
        "calibration": {
            "seed": 42, "balance": True,
            "tasks": [{"model": models[0], "dataset": "x/y", "rows": [1, 2], "tokens": 9, "sha256": "ab" * 32}],
        },
        "provenance": {"mergekit_slta": "0.1.0", "mergekit": "0.1.5"},
    }  # fmt: skip
    return Alphas(**{**given, **changes})


def tables(text: str) -> list[list[list[str]]]:
    """Markdown tables, as cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append(rows)
            rows = []
    return found


@pytest.fixture(scope="module")
def merged(make_models, tmp_path_factory) -> Path:
    """A folder that the stock command has merged into."""
    folder = tmp_path_factory.mktemp("merged")
    models = make_models("llama")
    (folder / "recipe.yml").write_text(yaml.safe_dump(models.recipe(num_samples=2)))
    result = mergekit_yaml(folder / "recipe.yml", folder / "out", "--quiet", card=True)
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_stock_command_leaves_a_valid_card(merged):
    """Front matter that the Hub's own parser reads, with the tag; image links to files that are there; sound tables."""
    card = ModelCard.load(merged / "README.md")
    assert {"mergekit", "merge", "submodule_linear"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    text = card.text
    assert "## Merge Details" not in text  # mergekit's own part, which names local models by their paths
    assert text.count(START) == text.count(END) == 1
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert "slta_alphas.png" in links
    assert all((merged / link).is_file() for link in links)
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    alphas = Alphas.load(merged / "slta_alphas.json")
    head = next(entry for entry in alphas.submodules if entry.name == "head")
    row = next(row for table in tables(text) for row in table if row[0] == "head")
    assert row[2:4] == [f"{alpha:.3f}" for alpha in head.alpha]


def test_report_changes_nothing_the_second_time(merged):
    """`report OUT` on a finished card leaves its bytes."""
    before = (merged / "README.md").read_bytes()
    result = slta("report", merged)
    assert result.exit_code == 0, result.output
    assert (merged / "README.md").read_bytes() == before


def test_what_others_wrote_stays(merged, tmp_path):
    """A user's own front matter and text, before and behind the section, outlive it."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    card = (out / "README.md").read_text()
    card = card.replace("library_name: transformers", "library_name: transformers\nlicense: apache-2.0\nlanguage: de")
    (out / "README.md").write_text(card + "\n## My own remarks\n\nkept\n")
    assert slta("report", out).exit_code == 0
    text = (out / "README.md").read_text()
    assert "## My own remarks\n\nkept" in text
    assert text.count(START) == 1
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"


def test_bytes_of_others_stay(merged, tmp_path):
    """Comments and numbers of the front matter, line ends, and text behind a marker that lost its end."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    front = "---\r\nlicense: mit # mine\r\nversion: 1.10\r\ntags: [submodule_linear]\r\n---\r\n"
    (out / "README.md").write_bytes(f"{front}{START}\r\nold\r\n\r\nmy own text\r\n".encode())
    for _ in range(2):
        assert slta("report", out).exit_code == 0
        text = (out / "README.md").read_bytes().decode()
        assert text.startswith(front)
        assert "my own text\r\n" in text
        assert text.count(END) == 1


def test_no_card_where_none_is_wanted(make_models, tmp_path):
    """--no-write-model-card: no README, no figures; `report OUT` adds both later, with front matter."""
    models = make_models("llama")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(models.recipe(num_samples=2)))
    out = tmp_path / "out"
    assert mergekit_yaml(tmp_path / "recipe.yml", out, "--quiet", "--no-write-model-card").exit_code == 0
    assert not (out / "README.md").exists()
    assert not list(out.glob("*.png"))
    result = slta("report", out)
    assert result.exit_code == 0, result.output
    assert "submodule_linear" in ModelCard.load(out / "README.md").data.tags
    assert (out / "slta_alphas.svg").is_file()


@pytest.mark.parametrize("front", ["---\ntags: [unclosed\n---\n# x\n", "---\n- a list\n---\n# x\n"])
def test_broken_front_matter_is_not_touched(merged, tmp_path, front):
    """One line, exit code 2, and the card as it was."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    (out / "README.md").write_text(front)
    result = slta("report", out)
    assert_refused(result, "not-yaml", out / "README.md")
    assert (out / "README.md").read_text() == front
    add_section(out)  # behind a merge the same is a warning: it must not cost the model
    assert (out / "README.md").read_text() == front


@pytest.fixture
def undrawn(monkeypatch):
    """Cards alone: drawing takes longer than all else."""
    monkeypatch.setattr(module, "draw", lambda *_: [Path("undrawn.png")])


PROJECT = b"# My project\r\n\r\nno card of a model  \n"


@pytest.mark.parametrize("kind", ["no merge", "no merge, none", "merge without a card", "link", "stock card"])
def test_a_readme_of_others_is_left_alone(merged, tmp_path, caplog, undrawn, kind):
    """`report FOLDER` draws beside it, and changes no byte of it: in a folder that no merge wrote into, in one whose
    merge wrote no card, and through a link. A card that mergekit made is a card in any merge's folder."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("slta_alphas.json", "slta_stats.safetensors", "slta_merge.json"):
        shutil.copy(merged / name, out / name)
    card, elsewhere = out / "README.md", tmp_path / "README.md"
    elsewhere.write_bytes(PROJECT)
    record = json.loads((out / "slta_merge.json").read_text())
    if kind == "link":
        card.symlink_to(elsewhere)
    else:
        del record["files"]["README.md"]
        (out / "slta_merge.json").write_text(json.dumps(record))
        if kind != "no merge, none":
            card.write_bytes(PROJECT if kind != "stock card" else b"---\ntags:\n- mergekit\n- merge\n---\n# merged\n")
    if kind.startswith("no merge"):
        (out / "slta_merge.json").unlink()
    result = slta("report", out)
    assert result.exit_code == 0, result.output
    assert elsewhere.read_bytes() == PROJECT
    if kind == "stock card":
        assert START in card.read_text()
    elif kind == "no merge, none":
        assert not card.exists()
    else:
        assert card.read_bytes() == PROJECT
        assert ("left as it is" in caplog.text) == (kind != "no merge")


def test_a_card_stays_the_merges_unless_it_was_edited(merged, tmp_path, undrawn):
    """After `report` a later merge replaces the card that it wrote; an edited one is the user's."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    (out / "README.md").unlink()
    assert slta("report", out).exit_code == 0
    assert recorded(out)["README.md"] == hash_in(out, "README.md")
    (out / "README.md").write_text((out / "README.md").read_text().replace(END, f"{END}\n\nmine"))
    Alphas.load(out / "slta_alphas.json").model_copy(update={"base_model": "other"}).save(out / "slta_alphas.json")
    assert slta("report", out).exit_code == 0
    assert "`other`" in (out / "README.md").read_text()
    assert recorded(out)["README.md"] != hash_in(out, "README.md")


def test_statistics_of_any_name_are_drawn(merged, tmp_path):
    """By their header; beside them if no folder is given."""
    path = shutil.copy(merged / "slta_stats.safetensors", tmp_path / "A.stats.safetensors")
    (tmp_path / "README.md").write_bytes(PROJECT)
    result = slta("report", path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "slta_alphas.png").is_file()
    assert (tmp_path / "README.md").read_bytes() == PROJECT


def test_nothing_to_report_is_said(tmp_path):
    """An empty folder, and a file of another kind."""
    assert_refused(slta("report", tmp_path), "nothing-to-draw", tmp_path)
    (tmp_path / "x.json").write_text("{}")
    result = slta("report", tmp_path / "x.json")
    assert_refused(result, "wrong-file-type", tmp_path / "x.json")


def test_a_file_for_the_figures_folder_is_refused(merged, tmp_path):
    """Or a link to nothing; the file stays."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, cause in (("file", "is a file"), ("link", "is a link to nothing")):
        assert_refused(slta("report", merged, "-o", tmp_path / name), "not-a-folder", tmp_path / name, cause)
    assert (tmp_path / "file").read_text() == "mine"


def test_statistics_are_drawn(merged, tmp_path):
    """`report slta_stats.safetensors -o DIR` solves them and draws."""
    result = slta("report", merged / "slta_stats.safetensors", "-o", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "figures" / "slta_alphas.png").is_file()


def test_strangers_names_stay_text():
    """Pipes, backticks, HTML, line breaks and escapes in a model's name end neither the code nor the table."""
    evil = "a|b`c<script>\n| x |\x1b[31m"
    text = section(alphas_of(models=(evil, "other")), [])
    assert "\x1b" not in text
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    assert code(evil).count("`") == 2
    assert "\n" not in code(evil)


def test_weights_are_given_by_thirds():
    """Seven layers: 0-2, 3-4, 5-6, with mean and range of each expert."""
    text = section(alphas_of(7), [])
    rows = {row[0]: row for table in tables(text) for row in table}
    assert rows["MLP blocks, layers 0 to 2"][1:3] == ["3", "0.100 (0.00 to 0.20)"]
    assert rows["MLP blocks, layers 5 to 6"][3] == "1.550 (1.50 to 1.60)"


def test_flags_are_listed_with_their_meaning():
    """Which, where, and what it means; at most twenty names."""
    flagged = [entry.model_copy(update={"flags": ("ill_conditioned",)}) for entry in alphas_of(30).submodules]
    text = section(alphas_of(30, submodules=tuple(flagged)), [])
    assert "`ill_conditioned` (experts are hard to tell apart" in text
    assert "and 10 more" in text
    assert "## Flagged\n\nNothing." in section(alphas_of(), [])


def evaluation_of(*models: str) -> Evaluation:
    """The first task is worse than the base, the second one's expert hardly differs from it."""
    measures = {
        key: Measure(mean=mean, stderr=error)
        for key, mean, error in (
            ("divergence_base", 2.0, 0.5), ("divergence", 3.0, 0.25), ("share", 1.5, 0.125), ("loss_base", 4.0, 1.0),
            ("loss_expert", 0.5, 0.0625), ("loss", 5.0, None),
        )
    }  # fmt: skip
    flags = (("worse_than_base",), ("weak_expert",))
    tasks = [
        TaskEvaluation(model=model, rows=(7, 8), flags=own, **measures)
        for model, own in zip(models, flags, strict=True)
    ]
    points = [
        MeasuredPoint(name=name, ridge=ridge, divergence=(measures["divergence"],) * 2, weighted=1.0)
        for name, ridge in (("base", None), ("step 2", 0.3))
    ]
    return Evaluation(points=points, merge=1, tasks=tasks)


def test_the_evaluation_is_a_table_with_its_warnings():
    """In the card and in the terminal: the same cells, and the flagged tasks by name."""
    evil = "a|b`c<script>\n| x |"
    alphas = alphas_of(models=(evil, "other"), evaluation=evaluation_of(evil, "other"))
    text = section(alphas, [])
    cells = ["2", "3 ± 0.25", "2 ± 0.5", "150 ± 12%", "5", "4 ± 1", "0.5 ± 0.062"]
    (table,) = [table for table in tables(text) if "share left" in table[0]]
    assert [row[1:] for row in table[2:]] == [cells, cells]
    assert table[3][0] == "`other`"
    assert f"**Warning.** {code(evil)}: the merge is worse than the base at this task: 150 ± 12% of the base's" in text
    assert f"**Warning.** {code(evil)}, `other`: measured on 2 rows: neither the choice" in text
    assert "the merge is the base" not in text
    at_base = alphas.evaluation.model_copy(update={"merge": 0})
    assert "**Warning.** the merge is the base: " in section(alphas.model_copy(update={"evaluation": at_base}), [])
    assert "**Warning.** `other` hardly differs from the base (divergence 2 nats per row)" in text
    joint = alphas.model_copy(update={"calibration": {**alphas.calibration, "objective": "joint"}})
    assert "found by `joint` of" in section(joint, [])
    assert "1 Gauss-Newton step on a few calibration rows per task. Held-out rows chose" in section(joint, [])
    printed = plain(*describe_alphas(alphas))
    assert all(cell in printed for cell in cells)
    assert "at lambda 1" in printed
    assert "How good it is" not in section(alphas_of(), [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "come in closed form"),
        ({"objective": "features"}, "come in closed form"),
        ({"objective": "joint"}, "come in closed form"),  # too few rows to measure: those of `features`
        ({"objective": "joint", "steps": 0}, "one linear system for all submodules"),
    ],
)
def test_the_card_says_how_the_weights_were_found(changes, told):
    """The paper is cited only for its own closed form."""
    alphas = alphas_of()
    text = section(alphas.model_copy(update={"calibration": {**alphas.calibration, **changes}}), [])
    assert f"Its weights α {told}" in text or f"{told} together" in text
    assert ("Leveraging Submodule Linearity" in text.partition("## Citation")[0]) == (told == "come in closed form")
    assert "α₂ · (expert₂ - base)`" in text


def test_a_direction_is_in_the_formula_and_no_expert():
    """Submodules that were solved together have one residual, which is said once; what installs the plugin works."""
    alphas = alphas_of(models=("org/math", "org/code", "swudi_a"))
    entries = tuple(entry.model_copy(update={"rank": None}) for entry in alphas.submodules)
    direction = Direction(model="swudi_a", closed_form="swudi_a")
    calibration = {**alphas.calibration, "objective": "joint", "steps": 0}
    changed = {"submodules": entries, "directions": (direction,), "calibration": calibration}
    text = section(alphas.model_copy(update=changed), [])
    assert "`base + α₁ · (expert₁ - base) + α₂ · (expert₂ - base) + α_d · (direction - base)`" in text
    (header,) = [table[0] for table in tables(text) if "number" in table[0]]
    assert header == ["submodules", "number", "`org/math`", "`org/code`", "`swudi_a`"]
    assert "It is 0.250." in text
    assert "pip install git+https://github.com/" in text
    assert "`stock_direction`" in text
    assert "`stock_direction`" not in section(alphas_of(), [])


def test_the_column_of_the_head_is_the_head_alone():
    """The final norm is in the row of the norms."""
    alphas = alphas_of(num_layers=1, models=("org/math",))
    (entry,) = alphas.submodules
    parts = [("embed", "embed", 0.125), ("x.0.norm", "norm", 0.25), ("x.0.mlp", "mlp", 0.375), ("norm", "norm", 0.5),
             ("head", "head", 0.75)]  # fmt: skip
    entries = tuple(
        entry.model_copy(update={"name": name, "kind": kind, "layer": 0 if "x." in name else None, "alpha": (alpha,)})
        for name, kind, alpha in parts
    )
    printed = plain(*describe_alphas(alphas.model_copy(update={"submodules": entries})))
    rows = [line.split() for line in printed.splitlines()[2:4]]
    assert rows == [["math", "MLP", "0.125", "0.375", "0.750"], ["norms", "0.250", "0.500"]]


@pytest.mark.parametrize(("steps", "told"), [({"steps": "auto"}, True), ({"steps": 0}, False), ({}, False)])
def test_what_was_not_measured_is_told(steps, told):
    """Too few rows to hold any out; where steps were wanted, what the weights are instead."""
    calibration = alphas_of().calibration | steps
    calibration["tasks"] = [calibration["tasks"][0] | {"flags": ["too_few_rows"]}]
    text = section(alphas_of(calibration=calibration), [])
    assert "## How good it is\n\nNot measured: too few rows to hold any out of `org/math`." in text
    assert ("the weights are those of `features`" in text) == told


def test_lambda_is_told(merged, tmp_path):
    """Weights in the file are before `lambda`; the card says what multiplied them."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    assert "lambda" not in (out / "README.md").read_text().split(START)[1]
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text())
    recipe["parameters"]["lambda"] = 0.8
    (out / "mergekit_config.yml").write_text(yaml.safe_dump(recipe))
    assert slta("report", out).exit_code == 0
    assert "multiplied by `lambda` = 0.8" in (out / "README.md").read_text()
    recipe["parameters"]["lambda"] = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    (out / "mergekit_config.yml").write_text(yaml.safe_dump(recipe))
    assert slta("report", out).exit_code == 0
    assert "`lambda`, which differs between tensors, in the merge" in (out / "README.md").read_text()


def test_section_is_replaced_in_place():
    """Whatever stands around it, backslashes in the new text included."""
    card = f"before\n\n{START}\nold\n{END}\n\nbehind\n"
    assert replace_section(card, f"{START}\n\\1 new\n{END}") == f"before\n\n{START}\n\\1 new\n{END}\n\nbehind\n"
    assert replace_section("", "new") == "new\n"


def test_a_card_that_cannot_be_written_costs_no_merge(tmp_path, caplog):
    """Where README.md is a folder the merge stands, without its section, and that is said."""
    (tmp_path / "README.md").mkdir()
    with caplog.at_level("WARNING"):
        add_section(tmp_path)
    assert "the model card lacks its section on the merge" in caplog.text
