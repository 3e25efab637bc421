"""Tables of what the GPU check has found: mappings in, Markdown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_predict import STEPS, Work, eigen_seconds, extrapolated
from rendering import profile, table
from workload import Shape

GIB = 2**30
TOP = 10
_PRODUCTS = ("float32", "tf32", "bfloat16")
Found = Mapping[str, Mapping[str, Any]]


def document(about: Mapping[str, Any], found: Found, left_out: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    """All parts that have been run.

    Args:
        about: what was measured, and how.
        found: part -> its mapping.
        left_out: part -> why it was not run.
        shapes: name -> shape.
    """
    sections = [("# GPU check", _about(about))]
    rates = found.get("probe", {}).get("flops_per_second", {})
    runs = {name: part for name, part in found.items() if _shape_of(name) != "small" and name != "probe"}
    if "small-alphas" in found:
        sections.append(("## Weights against those of the CPU", _alphas(found["small-alphas"])))
    if runs:
        sections.append(("## Time and memory", _times(runs, rates, shapes)))
        sections.append(("## `joint`, extrapolated", _joints(runs, about["rows"])))
    if "small-synchronizations" in found:
        sections.append(("## Synchronizations", _synchronizations(found["small-synchronizations"])))
    if "probe" in found:
        sections.append(("## The device's rates", _rates(found["probe"], runs, shapes)))
    profiles = [profile(name, part["profile"]) for name, part in runs.items() if part.get("profile")]
    if profiles:
        sections.append(("## Profiles", "\n\n".join(profiles)))
    if left_out:
        sections.append(("## Left out", "\n".join(f"- {name}: {why}" for name, why in left_out.items())))
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections if text) + "\n"


def _shape_of(part: str) -> str:
    return part.partition("-")[0]


def _about(about: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None) + "."
    if about["quick"]:
        return f"**A dry run on tiny shapes: it shows that every part runs. Its numbers mean nothing.**\n\n{text}"
    if about["device"] == "cpu":
        return f"**No GPU was measured: all parts ran on the CPU.**\n\n{text}"
    return text


def _alphas(found: Mapping[str, Any]) -> str:
    header = ["objective", "`compute_dtype` on the device", "largest deviation", "median", "largest weight",
              "device: s", "CPU, float32: s"]  # fmt: skip
    rows = [
        [
            line["objective"], line["precision"], f"{line['largest']:.1e}", f"{line['median']:.1e}",
            f"{line['largest_weight']:.2f}", f"{line['seconds']:.2f}", f"{line['seconds_cpu']:.2f}",
        ]
        for line in found["lines"]
    ]  # fmt: skip
    note = (
        f"Differences of weights from the CPU's in float32; base and {found['experts']} experts, "
        f"{found['rows']['features']} rows per task for `features`, {found['rows']['joint']} for `joint` with one step "
        "and no direction. With steps `joint` draws labels, chooses a ridge, and takes the step only if it is better: "
        "where the choice is another one, weights differ by more than rounding."
    )
    return f"{table(header, rows)}\n\n{note}"


def _times(runs: Found, rates: Mapping[str, float], shapes: Mapping[str, Shape]) -> str:
    header = ["part", "s", "checks: s", "TFLOP", "TFLOP/s", "share of " + " / ".join(_PRODUCTS), "GB", "GB/s",
              "device: GiB", "host, anonymous: GiB", "host, pinned: GiB", "host, with files: GiB"]  # fmt: skip
    rows, notes = [], []
    for name, part in runs.items():
        if "skipped" in part:
            notes.append(f"{name}: {part['skipped']}.")
            continue
        predicted = part.get("predicted", {})
        flops, seconds = predicted.get("predicted_flops", 0.0), part["seconds"]
        nbytes = predicted.get("predicted_read_bytes") or part["read_bytes"] + part["written_bytes"]
        shares = " / ".join(_share(flops / seconds, rates.get(kind)) for kind in _PRODUCTS)
        rows.append([
            f"{shapes[_shape_of(name)].title}, base + {part['experts']}: {_title(name, part)}",
            f"{seconds:.3g}", f"{part['phases']['check']:.2g}" if flops else "-",
            f"{flops / 1e12:.3g}" if flops else "-",
            f"{flops / seconds / 1e12:.3g}" if flops else "-", shares if flops else "-", f"{nbytes / 1e9:.3g}",
            f"{nbytes / seconds / 1e9:.3g}", _gib(part.get("peak_device")), _gib(part["peak_anonymous"]),
            _gib(part.get("peak_pinned")), _gib(part["peak_resident"]),
        ])  # fmt: skip
        if part.get("bars"):
            bars = ", ".join(f"{title} {each:.3g} s" for title, each in part["bars"])
            notes.append(f"{name}, by its progress bars: {bars}.")
    note = (
        "Seconds are of the whole call without imports. Operations and bytes are those that `mergekit-slta check` "
        "prints, of a merge those of the models read and written. Device memory is what torch's allocator had in use "
        "at most."
    )
    return "\n\n".join([table(header, rows), note, "\n".join(f"- {line}" for line in notes)]).rstrip()


def _title(name: str, part: Mapping[str, Any]) -> str:
    objective = name.split("-")[1]
    return f"{objective}, 1 step, {part['rows']} rows per task" if objective == "joint" else objective


def _share(rate: float, of: float | None) -> str:
    return f"{100 * rate / of:.2g}%" if of else "-"


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _work(predicted: Mapping[str, float]) -> Work:
    return Work(predicted["predicted_flops"], predicted["predicted_read_bytes"])


def _joints(runs: Found, rows: int) -> str:
    header = ["shape", f"joint, {STEPS} steps, {STEPS * rows} rows per task: s (extrapolated)", "from two runs: s",
              "TFLOP", "GB"]  # fmt: skip
    lines = []
    for name in dict.fromkeys(map(_shape_of, runs)):
        parts = [runs[key] for key in (f"{name}-joint", f"{name}-joint-longer") if key in runs]
        if not parts:
            continue
        real = _work(parts[0]["real"])
        seconds = extrapolated([(part["seconds"], _work(part["predicted"])) for part in parts], real)
        best = "-" if seconds["best"] is None else f"{seconds['best']:.3g}"
        lines.append([name, f"{seconds['low']:.3g} to {seconds['high']:.3g}", best, f"{real.flops / 1e12:.3g}",
                      f"{real.nbytes / 1e9:.3g}"])  # fmt: skip
    note = (
        "Not measured. Time is taken as a sum of a part that grows as operations and one that grows as bytes, so the "
        "real run is between the short one times either ratio. Two short runs of the same bytes tell the parts apart."
    )
    return f"{table(header, lines)}\n\n{note}" if lines else ""


def _synchronizations(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return f"Not counted: {found['skipped']}."
    header = ["objective and rows per task", "waits for the device", "per layer"]
    totals = {name: sum(lines.values()) for name, lines in found["counted"].items()}
    parts = [table(header, [[name, str(each), f"{each / found['layers']:.1f}"] for name, each in totals.items()])]
    for name, lines in found["counted"].items():
        top = sorted(lines.items(), key=lambda line: -line[1])[:TOP]
        parts.append(table([name, "waits", "per layer"], [
            [f"`{line}`", str(count), f"{count / found['layers']:.1f}"] for line, count in top
        ]))  # fmt: skip
    return "\n\n".join(parts)


def _rates(found: Mapping[str, Any], runs: Found, shapes: Mapping[str, Shape]) -> str:
    products = [[f"products, {name}", f"{rate / 1e12:.3g} TFLOP/s"] for name, rate in found["flops_per_second"].items()]
    copies = [[name, f"{rate / 1e9:.3g} GB/s"] for name, rate in found["bytes_per_second"].items()]
    eigen = {int(size): seconds for size, seconds in found["eigen_seconds"].items()}
    solves = [[f"eigenproblem of size {size}, float64", f"{seconds:.3g} s"] for size, seconds in eigen.items()]
    experts = {_shape_of(name): part["experts"] for name, part in runs.items() if "experts" in part}
    predicted: Sequence[Sequence[str]] = [
        [f"the direction of {name}, by the largest of these (extrapolated)",
         f"{eigen_seconds(shapes[name], number, eigen):.3g} s"]
        for name, number in experts.items()
    ]  # fmt: skip
    return table([found["device"], ""], [*products, *copies, *solves, *predicted])
