"""The front matter of a merged model's card, in the form that the Hub reads; and the licence of a merge.

Scope: makes the values. `report` writes them once, and leaves a front matter that has them to its user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.merge_record import Sources
from mergekit_slta.recipe.settings import METHOD
from mergekit_slta.reporting.names import PublicNames

_TAGS = ["mergekit", "merge", METHOD]
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
SHARE_METRIC = "kl_divergence_share"
"""Type of the metric of the share of the base's divergence that is left."""


def front_matter(
    alphas: Alphas, names: PublicNames, sources: Sources, name: str, *, is_causal: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The front matter of a card: what the merge knows, and whatever the card has already.

    Args:
        alphas, names, sources: the merge.
        name: of the merged model.
        is_causal: whether transformers' text generation loads it.
        given: the card's own front matter. Its values stay; tags are added to its tags.
    """
    on_hub = [hub for label in (alphas.base_model, *alphas.models) for hub in names.hub_models.get(label, ())]
    used = [task.get("dataset") for task in alphas.calibration.get("tasks", ())]
    results = _results(alphas, names)
    license = agreed_license(sources)
    made = ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,
        base_model_relation="merge" if on_hub or given.get("base_model") else None,
        datasets=[dataset for dataset in names.hub_datasets if dataset in used] or None,
        library_name="transformers",
        pipeline_tag="text-generation" if is_causal else None,
        model_name=name if results else None,
        eval_results=results or None,
        **license,
    ).to_dict()
    tags = given.get("tags") or []
    tags = list(tags) if isinstance(tags, list) else [tags]
    own = {key: value for key, value in given.items() if value not in (None, [])}
    return {**made, **own, "tags": [*tags, *(tag for tag in _TAGS if tag not in tags)]}


def _results(alphas: Alphas, names: PublicNames) -> list[EvalResult]:
    """The evaluation as the Hub's results: two metrics per task, each named for its expert."""
    if alphas.evaluation is None:
        return []
    tasks = {str(task["model"]): task for task in alphas.calibration.get("tasks", ())}
    found = []
    for task in alphas.evaluation.tasks:
        data = tasks.get(task.model, {})
        dataset, expert = names.dataset(data.get("dataset") or "unknown"), names.model(task.model)
        about = {
            "task_type": "text-generation",
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_config": str(data["dataset_config"]) if data.get("dataset_config") else None,
            "dataset_split": str(data["split"]) if data.get("split") else None,
        }
        rows = f"{len(task.rows)} held-out rows"
        if task.share is not None:
            label = f"Share of the base's divergence from {expert} that is left ({rows})"
            found.append(EvalResult(
                metric_type=SHARE_METRIC, metric_name=label, metric_value=round(task.share.mean, 4), **about
            ))  # fmt: skip
        label = f"Loss on the answers of {expert}'s task, nats per token ({rows})"
        found.append(EvalResult(metric_type="loss", metric_name=label, metric_value=round(task.loss.mean, 4), **about))
    return found


def agreed_license(sources: Sources) -> dict[str, str]:
    """The licence that the cards of all models of a merge state; empty if they differ, or one states none."""
    stated = [_comparable(source.license) for source in sources.models.values()]
    agree = bool(stated) and all(each == stated[0] for each in stated)
    return stated[0] if agree and _LICENSE.fullmatch(stated[0].get("license", "")) else {}


def _comparable(stated: Mapping[str, str]) -> dict[str, str]:
    """The keys that say which licence it is: identifiers in lower case; other licences by name and link."""
    license = stated.get("license", "").lower()
    return {"license": license} if license not in ("other", "") else {**stated, "license": license}


def licenses_differ(sources: Sources) -> bool:
    """Whether the cards of all models of a merge state a licence, and not the same one."""
    return (
        bool(sources.models)
        and not agreed_license(sources)
        and all(source.license.get("license") for source in sources.models.values())
    )


def describe_license(sources: Sources, names: PublicNames, code: Any) -> str:
    """What a card says of the licence; empty if nothing is known of the merge's models."""
    if not sources.models:
        return ""
    stated = {
        label: source.license.get("license_name") or source.license.get("license")
        for label, source in sources.models.items()
    }
    if agreed := agreed_license(sources):
        shown = agreed.get("license_name") or agreed["license"]
        return f"Licence: {code(shown)}, as the cards of all of them say."
    shown = ", ".join(f"{code(names.model(label))} {code(text) if text else 'none'}" for label, text in stated.items())
    if licenses_differ(sources):
        return (
            f"**Warning.** The licences of the models differ, and none is claimed for the merge: {shown}. Which terms "
            "apply has to be found out before the model is used or passed on."
        )
    return (
        f"No licence is claimed for the merge, because not every model's card states one: {shown}. Which terms apply "
        "has to be found out before the model is used or passed on."
    )
