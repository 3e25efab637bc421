"""`mergekit-slta env`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import psutil
import torch
from conftest import slta

from mergekit_slta import __version__
from mergekit_slta.cli import environment


def test_versions_and_devices_as_json():
    """Versions of what is installed, the memory of this machine, and whether mergekit knows the method."""
    result = slta("env", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["mergekit-slta"] == __version__
    for name in ("mergekit", "transformers", "torch", "datasets", "peft", "safetensors"):
        assert found["versions"][name] == version(name)
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["plugin"]["registered"] is True
    assert found["import_errors"] == {}


def test_a_broken_library_is_a_line(monkeypatch):
    """torch that cannot be loaded, or psutil that is missing, is named with its error, and the rest is printed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    result = slta("env")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.split()[:3] == ["torch", "fails:", "ModuleNotFoundError:"] for line in lines)
    assert any(line.split()[:2] == ["psutil", "fails:"] for line in lines)
    assert any(line.split() == ["torch", version("torch")] for line in lines)
    for name in ("memory", "device"):
        assert any(line.split() == [name, "unknown"] for line in lines)
    assert any(line.split()[:2] == ["mergekit", version("mergekit")] for line in lines)


def test_where_the_plugin_is_found(monkeypatch, tmp_path):
    """The .pth file in site-packages; without it, what works all the same."""
    monkeypatch.setattr(environment.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(environment.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(environment.Path, "home", lambda: tmp_path)
    assert "no mergekit_slta.pth in site-packages" in slta("env").stdout
    (tmp_path / "mergekit_slta.pth").touch()
    assert "~/mergekit_slta.pth" in slta("env").stdout
    monkeypatch.setenv("MERGEKIT_SLTA_AUTOLOAD", "0")
    assert "~/mergekit_slta.pth, off by MERGEKIT_SLTA_AUTOLOAD=0" in slta("env").stdout


def test_graphics_cards_are_listed_with_their_memory(monkeypatch):
    """Name, build and memory of each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    text = slta("env").stdout
    for number in range(2):
        assert f"cuda:{number} GPU {number} (CUDA 12.8), 80.0 GiB, 1.0 GiB free" in text
