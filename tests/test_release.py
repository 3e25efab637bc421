"""Files that a release is made with: workflows, citation, issue forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mergekit_slta import __version__
from mergekit_slta.host.method import REFERENCE_URL

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
STEPS = re.findall(r"^(\w+)\(\) \{$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
REPOSITORY = re.search(r'^Repository = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_their_major_version(name):
    """No branch that moves to another interface; what a job may write is stated, and it does not run for ever."""
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(name):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job or job["uses"].startswith("./.github/workflows/")


def test_workflows_run_the_steps_of_ci():
    """What a pull request must pass is what `.ci/run` does on any machine, every step of it."""
    ran = [step["run"].split() for name in ("tests", "release") for step in steps(name) if "run" in step]
    named = [part for command in ran if command[0] == ".ci/run" for part in command[1:]]
    assert set(named) == set(STEPS) - {"step", "command_of"}
    assert [command for command in ran if command[0] != ".ci/run"] == [
        ["grep", "-qx", '"version', "=", '\\"${GITHUB_REF_NAME#v}\\""', "pyproject.toml"]
    ]
    assert WORKFLOWS["release"]["jobs"]["publish"]["needs"] == ["tests", "build"]


def test_every_python_that_is_promised_is_tried():
    """The matrix, the classifiers and the oldest version agree."""
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert matrix == re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', PYPROJECT)
    assert f'requires-python = ">={matrix[0]}"' in PYPROJECT


def test_publishing_needs_no_token():
    """Only the job that uploads may ask for an identity, and it signs what it uploads."""
    asking = {
        (name, job_name)
        for name, workflow in WORKFLOWS.items()
        for job_name, job in workflow["jobs"].items()
        if job.get("permissions") == {"id-token": "write"}
    }
    assert asking == {("release", "publish")}
    (upload,) = (step for step in steps("release") if "gh-action-pypi-publish" in step.get("uses", ""))
    assert upload["with"] == {"attestations": True}
    assert "secrets" not in str(WORKFLOWS)


def test_upstream_is_tried_every_week():
    """mergekit's and transformers' newest commits, one after the other, with the whole suite."""
    workflow = WORKFLOWS["upstream"]
    (when,) = workflow[True]["schedule"]  # YAML reads `on` as true
    assert len(when["cron"].split()) == 5
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["library"] == [
        "arcee-ai/mergekit", "huggingface/transformers",
    ]  # fmt: skip
    assert steps("upstream")[-1]["run"].endswith("python -m pytest")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_ask_for_versions(path):
    """Each form asks for the output of `mergekit-slta env`, and its fields have names of their own."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert all(link["url"].startswith(REPOSITORY) for link in form["contact_links"])
        return
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    assert "`mergekit-slta env`" in fields["env"]["attributes"]["label"]
    assert fields["env"]["validations"] == {"required": True}


def test_citation_names_this_version_and_the_paper():
    """CITATION.cff is of this release, and the paper is the one that the merge method names."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["repository-code"] == REPOSITORY
    (paper,) = citation["references"]
    assert paper["url"] == REFERENCE_URL
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
