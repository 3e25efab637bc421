"""The HTML page: all numbers are in it, it needs nothing else, and strangers' names stay text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import assert_refused, slta
from test_figures import KINDS, make_alphas, make_linearity

from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.files.evaluation import Evaluation, Measure, MeasuredPoint, TaskEvaluation, Trial
from mergekit_slta.files.merge_record import recorded
from mergekit_slta.reporting.meanings import SUBMODULE_FLAGS, TASK_FLAGS
from mergekit_slta.reporting.page import RowAsSeen, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</title></script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements and the text of a page; fails where a tag is not closed."""

    EMPTY = frozenset({"meta", "input", "br", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


def parsed(text: str) -> Page:
    """A page that loads nothing: no address but those of links, and a policy that forbids the rest."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "action", "xlink:href", "style"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        if href := attributes.get("href"):
            assert tag == "a"
            assert href.startswith(("#", "https://"))
    assert page.names().count("script") == page.names().count("style") == 1
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [each["content"] for _, each in page.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    ids = [each["id"] for _, each in page.tags if each.get("id")]
    assert len(set(ids)) == len(ids)
    assert {each["href"][1:] for _, each in page.tags if (each.get("href") or "").startswith("#")} <= {*ids}
    return page


def evaluation_of(*models: str) -> Evaluation:
    measure = {key: Measure(mean=mean, stderr=0.125) for key, mean in (
        ("divergence_base", 2.0), ("divergence", 0.5), ("loss_base", 4.0), ("loss_expert", 1.0), ("loss", 1.5),
    )}  # fmt: skip
    tasks = [
        TaskEvaluation(model=model, rows=(7, 8, 9), share=None if place else Measure(mean=0.2571, stderr=0.03),
                       flags=("weak_expert",) * place, **measure)
        for place, model in enumerate(models)
    ]  # fmt: skip
    points = [
        MeasuredPoint(
            name=name, ridge=ridge, divergence=(Measure(mean=mean, stderr=None),) * len(models), weighted=mean
        )
        for name, ridge, mean in (("base", None, 2.0), ("features", None, 1.25), ("step 1", 0.3, 0.75))
    ]
    trials = (Trial(name="step 1", ridge=0.3, weighted=0.75), Trial(name="step 1", ridge=1e9, weighted=None))
    return Evaluation(points=points, merge=2, tasks=tasks, trials=trials)


def calibration_of(*models: str, **changes) -> dict:
    tasks = [
        {"model": model, "dataset": "org/data", "dataset_config": None, "split": "train", "text": "{q}",
         "rows": [3, 14, 15], "tokens": 9265, "sha256": "ab" * 32, "held_out": [1], "loss_base": 3.25,
         "loss_expert": 3.5, "flags": ["no_better_than_base"], **changes}
        for model in models
    ]  # fmt: skip
    return {"objective": "joint", "num_samples": 30, "ridge": None, "ridge_used": 0.25, "tasks": tasks,
            "importance": dict.fromkeys(models, 2.0)}  # fmt: skip


def joint_alphas(*models: str) -> Alphas:
    alphas = make_alphas("linear", len(models) + 1, names=[*models, "swudi_a"], head_None={"flags": ("extreme",)})
    entries = [entry.model_copy(update={"rank": None, "stderr": None, "condition": None, "residual": 0.375})
               for entry in alphas.submodules]  # fmt: skip
    return alphas.model_copy(update={
        "directions": (Direction(model="swudi_a", closed_form="swudi_a"),), "submodules": tuple(entries),
        "evaluation": evaluation_of(*models), "calibration": calibration_of(*models),
        "provenance": {"mergekit_slta": "1.2.3", "fingerprint": "f" * 64, "identity": {"not": "shown"}},
    })  # fmt: skip


@pytest.mark.parametrize("granularity", KINDS)
def test_every_number_is_in_the_page(granularity):
    """Of alphas files of every granularity: all weights with their errors, residuals, conditions and flags; a chart for
    each kind, and a caption for every layer."""
    alphas = make_alphas(granularity, 3, mlp_1={"flags": ("ill_conditioned",), "residual_measured": 0.625})
    page = parsed(write_page("x", alphas, None))
    assert "Condition is its condition number" in page.text
    for entry in alphas.submodules:
        assert entry.name in page.text
        assert f"{entry.residual:.4f}" in page.text
        for value, error in zip(entry.alpha, entry.stderr, strict=True):
            assert f"{value:.4f} ± {error:.2g}" in page.text
            assert f"{value:.3f} ± {error:.3f}" in page.text or granularity == "head_mlp"  # in a caption
    assert ("0.6250" in page.text) == any(entry.kind == "mlp" for entry in alphas.submodules)
    places = {(entry.layer, entry.kind, entry.name.partition(f".{entry.layer}.")[2].replace("heads.1", "heads.0"))
              for entry in alphas.submodules if entry.layer is not None}  # fmt: skip
    outside = [entry for entry in alphas.submodules if entry.layer is None]
    assert page.names().count("rect") == 2 * (len(places) + len(outside))  # weights and residuals


def test_a_joint_merge_shows_how_good_it_is():
    """Table, share, steps with the chosen one, trials, what was not measured, warnings, rows, settings and versions."""
    page = parsed(write_page("my merge", joint_alphas("org/math", "org/code"), None, scale=0.8,
                             rows=[RowAsSeen("math", 14, "What is 6 x 7?", "42")]))  # fmt: skip
    for words in (
        "2 experts ( org/math , org/code ) merged into org/base with the direction swudi_a",
        "0.5 ± 0.12", "25.7% ± 3", "equals the base on these rows", "step 1 (the merge) 0.3 0.75 37.5% 37.5%",
        "2 trials", "org/code hardly differs from the base", "its expert is no better than the base on its own rows",
        "The residual is 0.3750", "lambda = 0.8", "org/data train 3 9265 1 2 3.25 3.5", "3, 14, 15",
        "Row 14 of math", "What is 6 x 7? 42", "num_samples 30", "0.25, chosen by leaving out rows",
        "mergekit_slta 1.2.3", "f" * 64, "the plain average of the experts, 1/2", "swudi_a (direction)",
    ):  # fmt: skip
        assert words in page.text, words
    assert "not shown" not in page.text
    assert "Condition" not in page.text  # all were solved together
    assert SUBMODULE_FLAGS["extreme"].replace("`", "").split(" (")[0] in page.text
    assert TASK_FLAGS["no_better_than_base"] in page.text


def test_a_merge_without_rows_says_so():
    alphas = make_alphas(
        "model", 3, names=["a", "b", "swudi_a"], every={"residual": None, "stderr": None, "rank": None}
    )
    alphas = alphas.model_copy(update={
        "directions": (Direction(model="swudi_a", closed_form="swudi_a"),), "calibration": {"objective": "data_free"},
    })  # fmt: skip
    page = parsed(write_page("x", alphas, None))
    assert "no row was read" in page.text
    assert "Nothing is flagged" in page.text
    assert 'id="residuals"' not in page.text


def test_linearity_files_have_a_page():
    """Levels, scores of every submodule, and charts of them; alone, and behind a merge."""
    linearity = make_linearity(3, spoil=lambda values: (None, 0.0, *values[2:]))
    page = parsed(write_page("x", None, linearity))
    score = linearity.levels["model"].non_linearity
    assert f"{score.mean:.3g} ± {score.std:.2g}" in page.text
    for entry in linearity.submodules:
        assert f"{entry.name} " in page.text
        assert f"{entry.non_linearity[2]:.4g}" in page.text
    both = parsed(write_page("x", make_alphas(), linearity))
    assert len(both.tags) > len(page.tags)


def test_strangers_names_stay_text():
    """Markup in the names of models, datasets, submodules, flags, settings and rows makes no element of the page."""
    tame, wild = (
        joint_alphas(f"org/{name}", "org/code").model_copy(update={
            "calibration": calibration_of(f"org/{name}", dataset=name, split=name, text=name, chat_template=name,
                                          flags=[name], sha256=name) | {"objective": name, "seed": name},
            "provenance": {"torch": name, name: name}, "granularity": name, "base_model": name,
        })
        for name in ("tame", EVIL)
    )  # fmt: skip
    tame, wild = (
        alphas.model_copy(update={"submodules": tuple(
            entry.model_copy(update={"name": f"{entry.name}{name}", "kind": entry.kind + name, "flags": (name,)})
            for entry in alphas.submodules
        )})
        for alphas, name in ((tame, "tame"), (wild, EVIL))
    )  # fmt: skip
    pages = [
        parsed(write_page(name, alphas, None, rows=[RowAsSeen(name, 1, name, name)]))
        for alphas, name in ((tame, "tame"), (wild, EVIL))
    ]
    assert pages[0].names() == pages[1].names()
    assert "alert(1)" in pages[1].text  # as text
    assert "{{ 7 * 7 }}" in pages[1].text
    named = make_linearity(2, names=("tame", EVIL))
    assert "img" not in parsed(write_page(EVIL, None, named)).names()


@pytest.mark.parametrize("change", [
    {"rows": 3, "tokens": "many", "sha256": 5, "held_out": None}, {"rows": None, "dataset": ["x"], "importance": "?"},
    {"loss_expert": "low", "chat_template": {"a": 1}, "rerouted": "some"}, {"flags": [{"a": 1}, 3], "split": 4},
], ids=str)  # fmt: skip
def test_what_is_not_what_it_should_be_is_no_crash(change):
    """A file that passes as an alphas file and has strange values has a page."""
    alphas = make_alphas(num_models=1, names=["org/math"])
    calibration = calibration_of("org/math", **change) | {"importance": ["odd"], "ridge": {"a": 1}}
    parsed(write_page("x", alphas.model_copy(update={"calibration": calibration}), None))


def test_local_paths_are_not_shown():
    """Models and data are named by the last part of their paths, or by as much as tells them apart."""
    models = ("/home/me/run1/final", "/home/me/run2/final")
    points = [point.model_copy(update={"name": point.name.replace("features", models[0])})
              for point in evaluation_of(*models).points]  # fmt: skip
    alphas = make_alphas(names=models).model_copy(update={
        "evaluation": evaluation_of(*models).model_copy(update={"points": tuple(points)}),
        "base_model": "/home/me/base/", "calibration": calibration_of(*models, dataset="/home/me/rows.jsonl",
                                                                      chat_template="/home/me/chat.jinja"),
    })  # fmt: skip
    page = parsed(write_page("x", alphas, None))
    assert "/home" not in page.text
    for name in ("run1/final", "run2/final", "rows.jsonl train", "chat.jinja", "merged into base"):
        assert name in page.text


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """A folder with the alphas and the record of a merge; figures are not drawn."""
    from mergekit_slta.reporting import report as module

    monkeypatch.setattr(module, "draw", lambda *_: [])
    folder = tmp_path / "merged"
    folder.mkdir()
    make_alphas().save(folder / "slta_alphas.json")
    (folder / "slta_merge.json").write_text(json.dumps({
        "format": "mergekit-slta/merge", "version": 1, "files": {},
        "took": {"seconds": {"features": 61.0}, "device": "cuda:0", "threads": 2},
    }))  # fmt: skip
    return folder


def test_the_command_writes_one_page(out):
    """Beside the card, named for the folder, with what the merge took; the next merge replaces it, and so does the next
    report."""
    for _ in range(2):
        result = slta("report", out, "--html")
        assert result.exit_code == 0, result.output
        assert f"Written: {out / 'slta_report.html'}" in result.stderr
    page = parsed((out / "slta_report.html").read_text(encoding="utf-8"))
    assert "61 s: features 61 s, on cuda:0" in page.text
    assert page.text.startswith("merged")
    assert "slta_report.html" in recorded(out)
    assert "slta_report.html" not in slta("report", out).stderr


def test_the_page_of_a_file_goes_where_it_is_told(out, tmp_path):
    """For a file and a folder alike; no card then, and no record."""
    for target in (out / "slta_alphas.json", out):
        result = slta("report", target, "--html", "-o", tmp_path / "new" / target.name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "new" / target.name / "slta_report.html").is_file()
    assert not (out / "slta_report.html").exists()
    assert "slta_report.html" not in recorded(out)
    result = slta("report", out, "--html", "-o", tmp_path / "page.html")
    assert_refused(result, "not-a-folder", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_others_wrote_is_not_replaced(out, kind):
    """One line, exit code 2; nothing else is written either."""
    page = out / "slta_report.html"
    if kind == "file":
        page.write_text("<html>mine</html>")
    elif kind == "link":
        page.symlink_to(out / "elsewhere")
    else:
        page.mkdir()
    result = slta("report", out, "--html")
    assert_refused(result, "foreign-file" if kind == "file" else "not-a-plain-file", page)
    assert not (out / "README.md").exists()
    assert kind != "file" or page.read_text() == "<html>mine</html>"


HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const found = [], pages = [360, 1440].map((width) => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow, column = page.querySelector("#weights .column");
    column.dispatchEvent(new view.PointerEvent("pointerenter", { clientX: 50, clientY: 50 }));
    const field = page.querySelector("[data-filter]"), box = page.querySelector("[data-curve]");
    field.value = "q_proj"; field.dispatchEvent(new view.Event("input"));
    box.checked = false; box.dispatchEvent(new view.Event("change"));
    const smallest = Math.min(...[...page.querySelectorAll(".tick")].map((one) => one.getBoundingClientRect().height));
    found.push({
      width, scroll: page.documentElement.scrollWidth, smallest, tip: page.getElementById("tip").innerText,
      rows: [...page.querySelectorAll("#all tbody tr")].filter((row) => !row.hidden).length,
      hidden: page.querySelectorAll("g.hidden").length,
    });
    if (found.length === 2) {
      const result = document.createElement("pre");
      result.textContent = JSON.stringify(found); document.body.replaceChildren(result);
    }
  };
  document.body.append(frame);
});
</script></body>"""


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(tmp_path):
    """No message in the console; nothing is wider than a phone's screen; type of 9 pixels or more; captions, the filter
    and the legend work."""
    text = write_page("x", joint_alphas("org/a-model-with-a-very-long-name-" * 3, "org/code"), None)
    harness = HARNESS.replace("PAGE", json.dumps(text).replace("</", "<\\/"))
    (tmp_path / "harness.html").write_text(harness, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--window-size=1600,1000", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
        "--dump-dom", (tmp_path / "harness.html").as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    (found,) = re.findall(r"<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    for page in json.loads(found):
        assert page["scroll"] <= page["width"]
        assert page["smallest"] >= 9
        assert page["tip"].startswith("layer 0\n")
        assert page["rows"] == 3
        assert page["hidden"] > 0


def test_every_flag_is_documented():
    """docs/report.md has a row for each flag, and no other."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \|", text.partition("## Flags of submodules")[2], re.MULTILINE)
    assert rows == [*SUBMODULE_FLAGS, *TASK_FLAGS]
