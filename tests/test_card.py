"""The model card as people post it: its front matter, how to use the model, its licence and citation; no local path."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import mergekit_yaml, slta
from huggingface_hub import ModelCard, ModelCardData
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from test_page import EVIL, calibration_of, joint_alphas, parsed

from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.merge_record import Source, Sources, record_sources, recorded_sources
from mergekit_slta.host.sources import sources_of
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.reporting import report as module
from mergekit_slta.reporting.card import END, START, section
from mergekit_slta.reporting.metadata import agreed_license

APACHE, OTHER = {"license": "apache-2.0"}, {"license": "other", "license_name": "x", "license_link": "LICENSE"}


@pytest.fixture(scope="module", autouse=True)
def _undrawn():
    """Cards alone: drawing takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def merged(plenty, tmp_path_factory) -> Path:
    """A measured merge of local models whose cards state a licence, by the stock command."""
    folder = tmp_path_factory.mktemp("card")
    names = [plenty.base, *plenty.experts]
    for place in names:
        shutil.copytree(place, folder / "models" / place.name)
        (folder / "models" / place.name / "README.md").write_text("---\nlicense: Apache-2.0\n---\n# mine\n")
    recipe = plenty.recipe_with_answers(num_samples=4, evaluate=True, max_seq_length=24)
    text = yaml.safe_dump(recipe).replace(str(plenty.base.parent), str(folder / "models"))
    (folder / "recipe.yml").write_text(text)
    result = mergekit_yaml(folder / "recipe.yml", folder / "my-merge", "--quiet", card=True)
    assert result.exit_code == 0, result.output
    return folder / "my-merge"


def test_the_front_matter_is_what_the_hub_reads(merged, plenty):
    """Parsed back it is the same; two results per task have the file's numbers, with the data's name and split."""
    card = ModelCard.load(merged / "README.md")
    again = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == card.data.to_dict()
    alphas = Alphas.load(merged / "slta_alphas.json")
    results = {(each.dataset_name, each.metric_type): each for each in card.data.eval_results}
    assert len(results) == 4
    for task, data in zip(alphas.evaluation.tasks, plenty.datasets, strict=True):
        share = results[data.name, "kl_divergence_share"]
        assert share.metric_value == pytest.approx(task.share.mean, abs=1e-4)
        assert share.dataset_split == "train"
        assert Path(task.model).name in share.metric_name
        assert f"{len(task.rows)} held-out rows" in share.metric_name
        assert results[data.name, "loss"].metric_value == pytest.approx(task.loss.mean, abs=1e-4)
    assert card.data.model_name == "my-merge"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # none of them is on the Hub
    assert card.data.datasets is None


def test_no_local_path_is_in_the_card(merged, plenty):
    """Neither of models nor of data, nor in mergekit's own part, nor in the recipe; their last parts are."""
    text = (merged / "README.md").read_text()
    assert str(merged.parent) not in text
    assert str(plenty.folder) not in text
    assert "/tmp" not in text
    assert "Merge Details" not in text
    for name in (*(path.name for path in (plenty.base, *plenty.experts)), *(path.name for path in plenty.datasets)):
        assert f"`{name}" in text
        assert f": {name}\n" in text  # in the recipe


def test_the_summary_comes_first(merged):
    """What it is made of, with what is left of each expert's divergence, before anything else."""
    text = ModelCard.load(merged / "README.md").text
    assert text.startswith(f"# my-merge\n\n{START}\n\nThis model is `base` with `expert1` and `expert2` merged into it")
    alphas = Alphas.load(merged / "slta_alphas.json")
    summary = text.partition("\n## ")[0]
    for task in alphas.evaluation.tasks:
        assert f"{100 * task.share.mean:.3g} ± " in summary
    assert "`features`" in summary


def test_the_page_shows_rows_that_are_at_hand(merged, plenty, tmp_path):
    """The first row of each task, with its answer marked; not where the data has changed, or the recipe is gone."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    assert slta("report", out, "--html").exit_code == 0
    page = parsed((out / "slta_report.html").read_text(encoding="utf-8"))
    tasks = Alphas.load(out / "slta_alphas.json").calibration["tasks"]
    assert page.names().count("mark") == len(tasks) == 2
    for task, data in zip(tasks, plenty.datasets, strict=True):
        number = task["rows"][0]
        row = json.loads(data.read_text().splitlines()[number])
        heading = f"Row {number} of {Path(task['model']).name}, as the model sees it"
        assert f"{heading} <s>{row['question']} {row['answer']}</s>" in page.text
    alphas = Alphas.load(out / "slta_alphas.json")
    alphas.calibration["tasks"][0]["sha256"] = "0" * 64
    alphas.save(out / "slta_alphas.json")
    for count in (1, 0):
        assert slta("report", out, "--html").exit_code == 0
        assert parsed((out / "slta_report.html").read_text(encoding="utf-8")).names().count("mark") == count
        (out / "mergekit_config.yml").unlink(missing_ok=True)


def snippet(text: str) -> str:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_snippet_runs(merged, tmp_path, is_chat):
    """It loads the model with transformers and prints an answer; a chat only if the tokenizer has a template."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    if not is_chat:
        (out / "chat_template.jinja").unlink()
        (out / "README.md").unlink()
        assert slta("report", out).exit_code == 0
    code = snippet((out / "README.md").read_text())
    assert ("messages" in code) == is_chat
    code = re.sub(r'"your-name/[\w-]+"', repr(str(out)), code).replace("=256", "=3").replace("=64", "=3")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    assert printed.getvalue().strip() or is_chat


def test_other_ways_to_load_a_model(merged, tmp_path):
    """Code of its own is asked for; a model that is more than a language model has no text generation; without a
    tokenizer there is nothing to show."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    config = json.loads((out / "config.json").read_text())
    for changes, words in (
        ({"auto_map": {"AutoConfig": "own.Config"}}, "trust_remote_code=True"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "AutoModelForImageTextToText"),
    ):
        (out / "README.md").unlink()
        (out / "config.json").write_text(json.dumps(config | changes))
        assert slta("report", out).exit_code == 0
        card = ModelCard.load(out / "README.md")
        assert words in snippet(card.text)
        assert (card.data.pipeline_tag is None) == ("architectures" in changes)
    (out / "README.md").unlink()
    (out / "tokenizer_config.json").unlink()
    assert slta("report", out).exit_code == 0
    assert "```python" not in (out / "README.md").read_text()


def test_what_is_on_the_hub_is_named_and_linked(merged, tmp_path):
    """Base, experts and adapters in `base_model`, data in `datasets`, of the text a link each; a local expert is not
    among them, even if its path is like an id."""
    alphas = joint_alphas("org/math+org/lora", "org/local").model_copy(update={
        "calibration": calibration_of("org/math+org/lora", dataset="org/rows") | {"objective": "joint"},
    })  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    (out / "README.md").unlink()
    alphas.save(out / "slta_alphas.json")
    sources = Sources(
        models={
            "org/base": Source(hub=("org/base",)), "org/math+org/lora": Source(hub=("org/math", "org/lora")),
            "org/local": Source(hub=(None,)),
        },
        datasets={"org/rows": Source(hub=("org/rows",)), "org/unused": Source(hub=("org/unused",))},
    )  # fmt: skip
    record_sources(out, sources)
    assert recorded_sources(out) == sources
    assert slta("report", out).exit_code == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["org/base", "org/math", "org/lora"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.datasets == ["org/rows"]
    assert {each.dataset_name for each in card.data.eval_results} == {"org/rows", "unknown"}
    summary = card.text.partition("\n## ")[0]
    for name in ("org/base", "org/math", "org/lora"):
        assert f"[`{name}`](https://huggingface.co/{name})" in summary
    assert "and `local` merged into it" in summary
    assert "org/local" not in card.text


@pytest.mark.parametrize(
    ("stated", "agreed", "words"),
    [
        ((APACHE, {"license": "Apache-2.0"}, APACHE), APACHE, "`apache-2.0`, as the cards of all of them say"),
        ((OTHER, OTHER, OTHER), OTHER, "`x`, as the cards"),
        ((OTHER, OTHER, {**OTHER, "license_link": "elsewhere"}), {}, "**Warning.** The licences of the models differ"),
        ((APACHE, {"license": "llama3.1"}, APACHE), {}, "`base` `apache-2.0`, `math` `llama3.1`, `code` `apache-2.0`"),
        ((APACHE, {}, APACHE), {}, "not every model's card states one: `base` `apache-2.0`, `math` none"),
        (({}, {}, {}), {}, "No licence is claimed"),
        (({"license": EVIL},) * 3, {}, "licences of the models"),
    ],
)
def test_a_licence_is_claimed_where_all_agree(stated, agreed, words):
    """Else the card says which differ, or which state none, and claims nothing."""
    names = ("/m/base", "/m/math", "/m/code")
    sources = Sources(models={
        name: Source(hub=(None,), license=each) for name, each in zip(names, stated, strict=True)
    })  # fmt: skip
    assert agreed_license(sources) == agreed
    alphas = joint_alphas(*names[1:]).model_copy(update={"base_model": names[0]})
    text = section(alphas, [], sources=sources)
    assert words in text
    assert "licence" not in section(alphas, [])  # where nothing is known, nothing is said


@pytest.mark.parametrize(("license", "warned"), [("mit", True), ("apache-2.0", False)])
def test_a_merge_warns_where_licences_differ(merged, tmp_path, caplog, license, warned):
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    record_sources(out, Sources(models={
        "a": Source(hub=(None,), license=APACHE), "b": Source(hub=(None,), license={"license": license}),
    }))  # fmt: skip
    module.add_section(out)
    assert ("the licences of the models differ" in caplog.text) == warned
    assert ("**Warning.** The licences" in (out / "README.md").read_text()) == warned


@pytest.mark.parametrize(("objective", "cited"), [
    ("joint", ["mergekit_slta"]), ("features", ["mergekit_slta", "dai2025submodule"]),
    ("data_free", ["mergekit_slta", "wei2026spectral"]),
])  # fmt: skip
def test_the_method_is_cited(objective, cited):
    """`joint` is this project's own; the others are from papers."""
    alphas = joint_alphas("a", "b").model_copy(update={"calibration": {"objective": objective}})
    assert re.findall(r"@\w+\{(\w+),", section(alphas, [])) == cited


def test_mergekits_part_is_replaced_and_other_text_stays(merged, tmp_path):
    """Of a card that has mergekit's own part, and what its user wrote before and behind it."""
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    recipe = (out / "mergekit_config.yml").read_text()
    card = generate_card(MergeConfiguration.model_validate(yaml.safe_load(recipe)), recipe, "x")
    assert str(merged.parent) in card
    (out / "README.md").write_text(card.replace("# x\n", "# x\n\nA word before.\n") + "\n## Mine\n\nA word behind.\n")
    for _ in range(2):
        assert slta("report", out).exit_code == 0
        text = (out / "README.md").read_text()
        assert str(merged.parent) not in text
        assert text.index("A word before.") < text.index(START) < text.index(END) < text.index("A word behind.")
        assert text.count(START) == 1


def test_a_front_matter_that_was_edited_is_its_users(merged, tmp_path):
    """What the user changed or removed stays so; only the section is written again."""
    out = tmp_path / merged.name
    shutil.copytree(merged, out)
    text = (out / "README.md").read_text()
    front = "---\nlicense: mit # mine\ntags: [submodule_linear]\n---\n"
    (out / "README.md").write_text(front + text[text.index("# my-merge") :].replace("`expert1`", "?"))
    assert slta("report", out).exit_code == 0
    assert (out / "README.md").read_text() == front + text[text.index("# my-merge") :]


def test_strangers_names_stay_code():
    """Markup in the names of models, data, settings, versions and kinds is inside code, also in the recipe."""
    alphas = joint_alphas(EVIL, "b`|c").model_copy(update={
        "base_model": EVIL, "granularity": EVIL, "calibration": calibration_of(EVIL, dataset=EVIL, split=EVIL)
        | {"objective": EVIL}, "provenance": {"mergekit": EVIL, "mergekit_slta": EVIL},
    })  # fmt: skip
    alphas = alphas.model_copy(update={"submodules": tuple(
        entry.model_copy(update={"kind": EVIL, "flags": (EVIL,)}) for entry in alphas.submodules
    )})  # fmt: skip
    text = section(alphas, [], recipe=f"a: |\n  ```\n  {EVIL}\n")
    assert "\n````yaml\n" in text
    fenced = re.sub(r"(`{3,})\w*\n.*?\n\1\n", "", text, flags=re.DOTALL)
    assert "<script" in fenced
    for line in fenced.splitlines():
        outside = re.sub(r"`[^`]*`", "", line)
        assert "<script" not in outside, line
        assert "onerror" not in outside, line


def test_sources_are_looked_up_where_the_models_are(tiny, tmp_path, monkeypatch):
    """Local folders and files are not on the Hub, but for those in the Hub library's own cache; the licence is that of
    each model's card, of an adapter's for an adapter. A damaged card says nothing."""
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--org--cached" / "snapshots" / "abc"
    for path, card in ((cached, "---\nlicense: mit\n---\n"), (tmp_path / "org" / "local", "---\n[\n---\n"),
                       (tmp_path / "adapter", "---\nlicense: [mit, gpl]\n---\n")):  # fmt: skip
        path.mkdir(parents=True)
        (path / "README.md").write_text(card)
    (tmp_path / "org" / "rows").mkdir()
    recipe = tiny.recipe(2)
    recipe["base_model"] = str(cached)
    recipe["models"] = [
        {"model": "org/local", "parameters": {"dataset": "org/rows"}},
        {"model": f"org/remote+{tmp_path / 'adapter'}", "parameters": {"dataset": "org/elsewhere"}},
    ]
    found = sources_of(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions())
    assert [source.hub for source in found.models.values()] == [("org/cached",), (None,), ("org/remote", None)]
    licenses = [source.license.get("license") for source in found.models.values()]
    assert licenses[:2] == ["mit", None]
    assert "mit" in licenses[2]
    assert "gpl" in licenses[2]
    assert {name: source.hub for name, source in found.datasets.items()} == {
        "org/rows": (None,), "org/elsewhere": ("org/elsewhere",),
    }  # fmt: skip
