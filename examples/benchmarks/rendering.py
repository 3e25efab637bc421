"""Tables of what the benchmarks have found: mappings in, Markdown out. Ratios first; seconds and bytes beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MIB = 2**20


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, marks, *rows])


def _ratio(values: Mapping[str, Any]) -> str:
    """Median, and the extremes where there are several rounds."""
    text = f"{values['median']:.2f}"
    return text if len(values["values"]) < 2 else f"{text} ({values['min']:.2f} to {values['max']:.2f})"


def _seconds(values: Mapping[str, Any]) -> str:
    return f"{values['median']:.3g}"


def _mib(values: Mapping[str, Any] | float) -> str:
    return f"{(values if isinstance(values, (int, float)) else values['median']) / MIB:.0f}"


def floor(found: Mapping[str, Any]) -> str:
    """Table, and the profile of every model."""
    header = ["models", "rows, tokens", "calibration / floor", "by CPU time", "floor: TFLOP", "GFLOP/s", "s",
              "calibration: s", "checks of it: s"]  # fmt: skip
    rows = [
        [
            f"{model['title']}, base + {model['num_experts']}",
            f"{model['num_rows']}, {model['num_tokens']}",
            _ratio(model["ratio"]), _ratio(model["ratio_cpu"]),
            f"{model['floor_flops'] / 1e12:.3g}",
            f"{model['flops_per_second']['median'] / 1e9:.1f}",
            _seconds(model["floor_seconds"]), _seconds(model["seconds"]), _seconds(model["check_seconds"]),
        ]
        for model in found["models"]
    ]  # fmt: skip
    parts = [table(header, rows)]
    for model in found["models"]:
        share = {key: 100 * model[key] / model["floor_flops"] for key in ("gram_flops", "attention_flops")}
        drift = ", ".join(f"{value:.2f}" for value in model["rate_after_before"])
        warning = "" if model["steady"] else " **The machine was not steady: do not quote this ratio, measure again.**"
        profiled = "The measured run was profiled."
        if model["profiled_apart"]:
            profiled = f"A profiled run took {model['profiled_to_plain']:.2f} of the median one."
        parts.append(
            f"{model['title']}: not in the floor are the Gram matrices' {model['gram_flops'] / 1e9:.3g} GFLOP in "
            f"float64 ({share['gram_flops']:.2f}% of the floor's operations) and the attention scores' "
            f"{model['attention_flops'] / 1e9:.3g} GFLOP ({share['attention_flops']:.2f}%). The products' speed after "
            f"the calibration against before it: {drift}. {profiled}{warning}"
        )
        parts.append(profile(model["title"], model["profile"]))
    return "\n\n".join(parts)


def profile(title: str, profile: Mapping[str, Any]) -> str:
    """A calibration's profile, see `jobs.profile_of`."""

    def lines(entries: Sequence[Sequence[Any]]) -> list[str]:
        return [
            f"{100 * seconds / profile['seconds']:6.1f}%  {seconds:9.3f} s  {calls:9d} calls  {label}"
            for label, calls, seconds in entries
        ]

    text = [
        f"{title}: where the calibration's time goes, by function itself",
        *lines(profile["own"]),
        "by function of the package, with what it calls",
        *lines(profile["package"]),
    ]
    return "```\n" + "\n".join(text) + "\n```"


def naive(found: Mapping[str, Any]) -> str:
    """How many times faster, and the share of memory."""
    rows = [
        ["time: naive.py / calibrate", _ratio(found["ratio"])],
        ["CPU time: naive.py / calibrate", _ratio(found["ratio_cpu"])],
        ["time without loading and checks: naive.py / calibrate", _ratio(found["ratio_without_loading"])],
        ["peak anonymous memory: calibrate / naive.py", _ratio(found["memory_ratio"])],
        ["the same, above that after imports", _ratio(found["memory_ratio_above_imports"])],
    ]
    title = f"{found['title']}, base + {found['num_experts']}, {found['num_tokens']} tokens"
    agreement = f"The weights differ by {found['largest_difference_of_alphas']:.1g} at most."
    return "\n\n".join([table([title, "ratio"], rows), agreement, _runs(found["runs"])])


def _runs(runs: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["", "s", "imports: s", "peak anonymous: MiB", "above imports: MiB"]
    return table(
        header,
        [
            [name, _seconds(run["seconds"]), _seconds(run["import_seconds"]), _mib(run["peak_anonymous"]),
             _mib(run["peak_above_imports"])]
            for name, run in runs.items()
        ],
    )  # fmt: skip


def merge(found: Mapping[str, Any]) -> str:
    """Ours over mergekit's."""
    header = [f"{found['title']}, base + {found['num_experts']}: submodule_linear against", "time", "CPU time",
              "peak anonymous memory", "above imports"]  # fmt: skip
    keys = ("seconds", "cpu_seconds", "peak_anonymous", "peak_above_imports")
    rows = [[name, *(_ratio(each[key]) for key in keys)] for name, each in found["ratios"].items()]
    return table(header, rows) + "\n\n" + _runs(found["runs"])


_VARIED = {"layers": "layers", "num_rows": "rows per task", "length": "tokens per row", "num_experts": "experts T"}


def growth(found: Mapping[str, Any]) -> str:
    """A table for each size that is varied."""
    origin = ", ".join(f"{_VARIED[key]} {value}" for key, value in found["origin"].items())
    parts = [f"{found['title']}; {origin}, one of them varied at a time. Ratios to the smallest."]
    for series in found["series"]:
        header = [_VARIED[series["varied"]], "time", "linear growth", "floor's operations", "peak above imports",
                  "peak with imports", "s", "MiB above imports"]  # fmt: skip
        rows = [
            [
                str(point["value"]), _ratio(point["time_ratio"]), f"{point['linear']:.2f}", f"{point['flops']:.2f}",
                _ratio(point["memory_ratio"]), _ratio(point["memory_ratio_with_imports"]), _seconds(point["seconds"]),
                _mib(point["peak_above_imports"]),
            ]
            for point in series["points"]
        ]  # fmt: skip
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def startup(found: Mapping[str, Any]) -> str:
    """Milliseconds."""
    titles = {
        "bare": "bare interpreter, with the .pth less without",
        "switch": "this environment, less MERGEKIT_SLTA_AUTOLOAD=0",
    }
    rows = [
        [
            titles[name],
            f"{_milliseconds(each['difference'])} "
            f"({' to '.join(_milliseconds(quartile) for quartile in each['difference_quartiles'])})",
            f"{1e3 * each['seconds_with']:.1f}", f"{1e3 * each['seconds_without']:.1f}", str(each["pairs"]),
        ]
        for name, each in found.items() if each is not None
    ]  # fmt: skip
    text = table(["", "difference: ms (quartiles)", "with: ms", "without: ms", "pairs"], rows)
    missing = "\n\nThe .pth is not installed in this environment: the switch was not measured."
    return text if found["switch"] else text + missing


def check(found: Mapping[str, Any]) -> str:
    """Predicted over measured."""
    header = [f"{found['title']}, base + {found['num_experts']}", "rows, tokens", "operations: predicted / counted",
              "bytes: predicted / handed out", "predicted / distinct", "peak: predicted / measured",
              "predicted: TFLOP", "read: MiB", "peak: MiB", "measured peak: MiB"]  # fmt: skip
    rows = [
        [
            line["job"], f"{line['num_rows']}, {line['num_tokens']}", f"{line['flops_ratio']:.2f}",
            f"{line['read_ratio']:.2f}", f"{line['distinct_ratio']:.2f}", f"{line['peak_ratio']:.2f}",
            f"{line['predicted_flops'] / 1e12:.3g}", _mib(line["predicted_read_bytes"]),
            _mib(line["predicted_peak_bytes"]), _mib(line["peak_above_imports"]),
        ]
        for line in found["lines"]
    ]  # fmt: skip
    return table(header, rows)


def minutes(found: Mapping[str, Any]) -> str:
    """Predicted over measured, of all phases and of each."""
    names = list(dict.fromkeys(name for line in found["lines"] for name in line["predicted"]))

    def cell(line: Mapping[str, Any], name: str) -> str:
        predicted, measured = line["predicted"].get(name), line["measured"].get(name)
        return "-" if predicted is None or not measured else f"{predicted / measured:.2f} ({measured:.3g})"

    rows = [
        [line["job"], str(line["num_tokens"]), f"{line['ratio']:.2f} ({sum(line['measured'].values()):.3g})",
         *(cell(line, name) for name in names)]
        for line in found["lines"]
    ]  # fmt: skip

    def ratio(line: Mapping[str, Any], chosen: Sequence[str]) -> str:
        products = sum(line["products"].get(name, 0.0) for name in chosen)
        return f"{sum(line['measured'].get(name, 0.0) for name in chosen) / products:.2f}" if products else "-"

    parts = list(dict.fromkeys(name for line in found["lines"] for name in line["products"]))
    floors = [[line["job"], ratio(line, parts), *(ratio(line, [name]) for name in parts)] for line in found["lines"]]
    return "\n\n".join([
        table(["predicted / measured (measured: s)", "tokens", "all", *names], rows),
        table(["measured / products alone", "all of these", *parts], floors),
    ])  # fmt: skip


def limit(found: Mapping[str, Any]) -> str:
    """Within 3 GB, or not."""
    if "skipped" in found:
        return f"Left out ({found['skipped']})."
    rows = [
        ["peak anonymous memory / 3 GB", f"{found['peak_anonymous'] / found['limit_bytes']:.2f}"],
        ["peak anonymous memory: MiB", _mib(found["peak_anonymous"])],
        ["above imports: MiB", _mib(found["peak_above_imports"])],
        ["predicted by `check`: MiB", _mib(found["predicted_peak_bytes"])],
        ["mapped files at most: MiB", _mib(found["peak_file"])],
        ["checkpoints on disk: MiB", _mib(found["checkpoint_bytes"])],
        ["s", f"{found['seconds']:.3g}"],
    ]
    title = f"{found['title']}, base + {found['num_experts']}, {found['num_tokens']} tokens"
    verdict = "It stays within 3 GB." if found["holds"] else "It does NOT stay within 3 GB."
    return table([title, ""], rows) + "\n\n" + verdict


def versions(found: Mapping[str, Any]) -> str:
    """This version over another one."""
    this, other = found["versions"]["this"], found["versions"]["other"]
    header = [f"{found['title']}, base + {found['num_experts']}: {this} / {other}", "time", "CPU time", "peak memory",
              "CPU: s", "CPU, other: s", "pairs"]  # fmt: skip
    rows = [
        [
            job["job"], *(_ratio_quartiles(job[key]) for key in ("seconds", "cpu_seconds", "peak_anonymous")),
            _seconds(job["cpu_seconds"]["this"]), _seconds(job["cpu_seconds"]["other"]), str(job["pairs"]),
        ]
        for job in found["jobs"]
    ]  # fmt: skip
    return table(header, rows) + "\n\nMedians of the pairs' ratios; in brackets their quartiles."


def _ratio_quartiles(values: Mapping[str, Any]) -> str:
    first, third = values["quartiles"]
    return f"{values['median']:.3f} ({first:.3f} to {third:.3f})"


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "floor": ("Calibration against its FLOP floor", floor),
    "naive": ("Calibration against the in-memory script", naive),
    "merge": ("The merge stage against task_arithmetic", merge),
    "growth": ("Growth of time and memory", growth),
    "startup": ("Interpreter start", startup),
    "check": ("What check predicts", check),
    "minutes": ("How long check says that it takes", minutes),
    "limit": ("1.1B models in 3 GB", limit),
    "versions": ("This version against another", versions),
}
"""Name -> the heading, and what writes the section."""


def section(name: str, found: Mapping[str, Any]) -> str:
    """One benchmark's heading and tables."""
    title, write = SECTIONS[name]
    return f"## {name}: {title}\n\n{write(found)}\n"


def document(machine: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """All benchmarks that have been run, in their order."""
    about = ", ".join(f"{key} {value}" for key, value in [*machine.items(), *settings.items()])
    parts = [section(name, found[name]) for name in SECTIONS if name in found]
    note = "Medians; in brackets the least and the greatest of the rounds."
    return "\n".join(["# Benchmarks\n", f"{about}. {note}\n", *parts])
