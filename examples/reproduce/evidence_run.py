"""What the tables of an evidence run are made of, as it is read from a run's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts import QUICK
from gaps import Evidence
from methods import OURS, SETS, set_name

LINEARITY_NAMES = ("slta_linearity.json", "linearity/slta_linearity.json")


@dataclass(frozen=True)
class Run:
    """All that the tables are made of.

    Attributes:
        evidence: the scores.
        settings: of the run; empty where they are not known yet.
        linearity: what `mergekit-slta linearity` wrote; empty without.
        weights: set -> weights at the model level, in the order of its experts; of the first seed.
        costs: what `costs.py` wrote; empty without.
        repeated: the scores of `repeat.py`, with other experts; None without.
    """

    evidence: Evidence
    settings: Mapping[str, Any]
    linearity: Mapping[str, Any]
    weights: Mapping[str, Sequence[float]]
    costs: Mapping[str, Any]
    repeated: Evidence | None = None

    @property
    def rows(self) -> int | None:
        """Calibration rows per task where a candidate's settings do not say."""
        return self.settings.get("sizes", {}).get("calibration_rows")

    @property
    def command(self) -> str:
        """The command of the run."""
        sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in self.settings.get("sizes", {}).items()}
        precision = self.settings.get("precision", "bfloat16")
        known = {**dataclasses.asdict(QUICK), "seed": sizes.get("seed")}
        quick = " --quick" if {"seed": None, **sizes} == known else ""
        return f"python examples/reproduce/run.py WORK{quick}" + (
            "" if precision == "bfloat16" else f" --precision {precision}"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load(results: Path, linearity: Path | None = None, costs: Path | None = None, repeated: Path | None = None) -> Run:
    """Read a run: its results.json, or its folder of results; and what lies beside them."""
    if results.is_dir():
        found = {str(path.relative_to(results).with_suffix("")): read_json(path) for path in results.rglob("*.json")}
        content: dict[str, Any] = {"settings": {}, "results": found}
    else:
        content = read_json(results)
    folder = results.parent
    evidence = Evidence(content["results"])
    beside = [folder / name for name in LINEARITY_NAMES if (folder / name).exists()]
    linearity = linearity or (beside[0] if beside else None)
    costs = costs or (folder / "costs.json" if (folder / "costs.json").exists() else None)
    repeated = repeated or (folder / "repeated.json" if (folder / "repeated.json").exists() else None)
    return Run(
        evidence,
        content.get("settings", {}),
        read_json(linearity) if linearity else {},
        dict(model_weights(evidence, folder)),
        read_json(costs) if costs else {},
        Evidence(read_json(repeated)["results"]) if repeated else None,
    )


def model_weights(evidence: Evidence, folder: Path) -> Iterable[tuple[str, list[float]]]:
    """Yield (set, weights at the model level), from the alphas files that lie beside the results."""
    for tasks in SETS:
        for result in evidence.group(tasks, OURS, {"granularity": "model"})[:1]:
            path = folder / result["recipe"]["parameters"]["alphas"]
            if path.exists():
                alphas = read_json(path)
                of_task = dict(zip(alphas["models"], alphas["submodules"][0]["alpha"], strict=True))
                yield set_name(tasks), [of_task[task] for task in tasks]
