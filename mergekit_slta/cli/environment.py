"""`mergekit-slta env`: versions and devices, for reports of problems.

Scope: click and the standard library. Everything else may be missing or broken: what fails to import becomes a line of
the output.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import site
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mergekit_slta import __version__
from mergekit_slta._autoload import ENVIRONMENT_SWITCH
from mergekit_slta.cli.verbosity import with_verbose
from mergekit_slta.errors import show

LIBRARIES = ("mergekit", "transformers", "torch", "datasets", "peft", "safetensors")
PTH_NAME = "mergekit_slta.pth"
_VARIABLES = (ENVIRONMENT_SWITCH, "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Environment variables that change what is computed or found. None of them holds a secret."""


@with_verbose
@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def env(as_json: bool) -> None:
    """Print versions and devices, for bug reports.

    Every library is imported. One that fails to import is named with its error, and the rest is printed all the same.
    No path of a model, no token and no user name is printed.
    """
    found = environment()
    click.echo(json.dumps(found, indent=2) if as_json else describe(found))


def environment() -> dict[str, Any]:
    """Versions, devices, and how mergekit finds the plugin.

    Returns:
        `versions`: name -> version, None if it is not installed. `import_errors`: name -> error. `plugin`: `pth`, the
        path of the `.pth` file or None; `autoload`, whether it is switched on; `registered`, whether mergekit knows the
        method, None if mergekit cannot be imported. `devices`: a list with `name`, and `memory_bytes` and `free_bytes`
        where they are known. `cpu`: `name`, `cores`, `threads` of torch. `memory_bytes` and `free_bytes` of the
        machine. `variables`: name -> value of the environment variables that are set and matter.
    """
    errors: dict[str, str] = {}
    modules = {name: _imported(name, errors) for name in (*LIBRARIES, "psutil")}
    torch, memory = modules["torch"], _tried("memory", errors, lambda: _memory(modules["psutil"]))
    return {
        "versions": {
            "mergekit-slta": __version__,
            **{name: _version(name) for name in LIBRARIES},
            "python": platform.python_version(),
            "os": platform.platform(),
        },
        "import_errors": errors,
        "plugin": {
            "pth": find_pth(),
            "autoload": os.environ.get(ENVIRONMENT_SWITCH) != "0",
            "registered": _tried("mergekit.merge_methods", errors, _is_registered) if modules["mergekit"] else None,
        },
        "devices": _tried("devices", errors, lambda: _devices(torch)) or [],
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": _tried("threads", errors, lambda: torch.get_num_threads()) if torch else None,
        },
        **(memory or {"memory_bytes": None, "free_bytes": None}),
        "variables": {name: show(os.environ[name], 80) for name in _VARIABLES if name in os.environ},
    }


def describe(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    for name, error in found["import_errors"].items():
        rows.append((name, f"fails: {error}"))
    plugin = found["plugin"]
    if plugin["pth"] is None:
        rows.append(("plugin", f"no {PTH_NAME} in site-packages: `mergekit-slta merge` works, `mergekit-yaml` may not"))
    else:
        rows.append(("plugin", f"{plugin['pth']}" + ("" if plugin["autoload"] else f", off by {ENVIRONMENT_SWITCH}=0")))
    if plugin["registered"] is not None:
        rows.append(("method", "registered with mergekit" if plugin["registered"] else "not registered with mergekit"))
    for device in found["devices"]:
        rows.append(("device", f"{device['name']}{_sizes(device)}"))
    if not found["devices"]:
        is_known = not {"torch", "devices"} & found["import_errors"].keys()
        rows.append(("device", "no GPU that torch can use" if is_known else "unknown"))
    cpu = found["cpu"]
    threads = f", {cpu['threads']} threads in torch" if cpu["threads"] else ""
    rows.append(("cpu", f"{cpu['name']}, {cpu['cores']} cores{threads}"))
    rows.append(("memory", _sizes(found).removeprefix(", ") or "unknown"))
    rows += found["variables"].items()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def find_pth() -> str | None:
    """Path of the `.pth` file that a Python start reads, the home folder shortened to `~`; None if there is none."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    for folder in dict.fromkeys(folders):
        path = Path(folder, PTH_NAME)
        if path.is_file():
            home = Path.home()
            return str(Path("~", path.relative_to(home)) if path.is_relative_to(home) else path)
    return None


def _sizes(entry: dict[str, Any]) -> str:
    if entry.get("memory_bytes") is None:
        return ""
    free = "" if entry.get("free_bytes") is None else f", {entry['free_bytes'] / 2**30:.1f} GiB free"
    return f", {entry['memory_bytes'] / 2**30:.1f} GiB{free}"


def _imported(name: str, errors: dict[str, str]) -> Any:
    return _tried(name, errors, lambda: importlib.import_module(name))


def _tried(name: str, errors: dict[str, str], function: Callable[[], Any]) -> Any:
    """What a function returns; None if it fails, with its error in `errors`."""
    try:
        return function()
    except Exception as error:  # a broken library may raise anything, such as OSError for a missing shared object
        errors[name] = f"{type(error).__name__}: {show(error)}"
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_registered() -> bool:
    from mergekit.merge_methods import registered_methods

    from mergekit_slta.recipe.settings import METHOD

    return any(method.spec.name == METHOD for method in registered_methods())


def _devices(torch: Any) -> list[dict[str, Any]]:
    """The accelerators that torch can use."""
    if torch is None:
        return []
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = f"cuda:{number} {torch.cuda.get_device_name(number)} ({build})"
            found.append({"name": name, "memory_bytes": total, "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "memory_bytes": torch.mps.recommended_max_memory(), "free_bytes": None})
    return found


def _memory(psutil: Any) -> dict[str, int] | None:
    if psutil is None:
        return None
    memory = psutil.virtual_memory()
    return {"memory_bytes": memory.total, "free_bytes": memory.available}


def _cpu_name() -> str:
    """The processor's name. Linux has it in a file, other systems where `platform` looks."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
