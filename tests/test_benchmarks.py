"""The benchmarks of examples/benchmarks run, on tiny shapes; most jobs in this process, where the imports are paid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import BENCHMARK_MARKS, BENCHMARKS, EXAMPLES, importable, run_here

pytestmark = BENCHMARK_MARKS


@pytest.fixture(scope="module", autouse=True)
def _importable():
    with importable(BENCHMARKS):
        yield


@pytest.fixture(scope="module")
def in_process(_importable):
    """Run jobs here instead of in processes of their own."""
    import benchmarks
    import jobs

    def run_job(job: str, *, folder: Path, threads: int, tree: Path | None = None, **arguments: object) -> dict:
        return run_here(jobs.JOBS, job, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "run_job", run_job)
        patch.setattr(benchmarks, "above_imports", lambda phases: 1.0)  # this process has grown long ago
        yield benchmarks


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A WORKDIR that the benchmarks share."""
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.parametrize("name", ["floor", "naive", "merge", "growth", "check", "minutes", "limit", "versions"])
def test_quick_benchmarks_give_tables(in_process, workdir, name):
    """Each runs with --quick, and what it found becomes a section without a hole."""
    import run

    arguments = ["--other", str(EXAMPLES.parent)] if name == "versions" else []
    assert run.main([str(workdir), "--quick", "--only", name, *arguments]) == 0
    text = (workdir / "results.md").read_text()
    assert f"## {name}" in text
    assert "nan" not in text
    assert str(workdir) not in text + (workdir / "results.json").read_text()
    assert json.loads((workdir / "results.json").read_text())["benchmarks"][name]


def test_found_is_kept_and_other_settings_are_refused(in_process, workdir, capsys, monkeypatch):
    """A second run measures nothing; one with other settings says what to do."""
    import run

    assert run.main([str(workdir), "--quick", "--only", "limit"]) == 0
    monkeypatch.setitem(in_process.BENCHMARKS, "limit", None)
    assert run.main([str(workdir), "--quick", "--only", "limit"]) == 0
    assert run.main([str(workdir), "--quick", "--only", "limit", "--threads", "2"]) == 1
    assert "--again" in capsys.readouterr().err


@pytest.mark.process
def test_a_job_imports_the_package_of_its_tree(workdir, monkeypatch):
    """A tree without the package is refused, and so is one that another installation hides."""
    import measure
    import run

    job = workdir / "job.py"
    job.write_text(
        "import json, sys\nimport mergekit_slta as package\n"
        "found = {'phases': {}, 'values': 0, 'import_seconds': 0.0, 'package': package.__path__[0]}\n"
        "json.dump(found, open(sys.argv[2], 'w'))\n"
    )
    monkeypatch.setattr(measure, "JOBS", job)
    other = workdir / "other"
    with pytest.raises(SystemExit):
        run.main([str(workdir), "--only", "versions", "--other", str(workdir)])
    with pytest.raises(measure.BenchmarkError, match="not the package in"):
        measure.run_job("any", folder=workdir, threads=1, tree=other)
    (other / "mergekit_slta").mkdir(parents=True)
    (other / "mergekit_slta" / "__init__.py").touch()
    measure.run_job("any", folder=workdir, threads=1, tree=other)


def test_what_check_predicts_is_read_from_its_output():
    """Rows and tokens are summed over the experts; each phase has its seconds."""
    import jobs

    found = {
        "experts": [{"rows": 30, "tokens": 3902}, {"rows": 20, "tokens": 98}], "flops": 12.6e12, "read_bytes": 1030,
        "peak_bytes": 2**29,
        "phases": [
            {"name": "features", "seconds": 3.0, "flops": {"float32": 2e9}},
            {"name": "merge", "seconds": 1.0, "flops": {}},
        ],
    }  # fmt: skip
    assert jobs.read_check(found) == {
        "num_rows": 50, "num_tokens": 4000, "predicted_flops": 12.6e12, "predicted_read_bytes": 1030,
        "predicted_peak_bytes": 2**29, "predicted_seconds": {"features": 3.0, "merge": 1.0},
        "predicted_products": {"features": {"float32": 2e9}, "merge": {}},
    }  # fmt: skip


@pytest.mark.process
def test_startup(workdir):
    """The command itself, on the benchmark that starts no job."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), str(workdir / "startup"), "--quick", "--only", "startup"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "with the .pth less without" in done.stdout


@pytest.mark.process
def test_peaks_and_phases_come_from_a_process_of_its_own(workdir, monkeypatch):
    """The parent sees the memory of a phase that the job itself has let go of by its end."""
    import measure

    job = workdir / "job.py"
    job.write_text(
        f"import sys, json, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from measure import Clock\n"
        "clock = Clock()\n"
        "with clock.phase('small'): time.sleep(0.02)\n"
        "with clock.phase('large'):\n"
        "    held = bytearray(b'1') * 2**26; time.sleep(0.02); del held\n"
        "json.dump({'phases': clock.phases, 'values': 7, 'import_seconds': 0.0}, open(sys.argv[2], 'w'))\n"
    )
    monkeypatch.setattr(measure, "JOBS", job)
    result = measure.run_job("any", folder=workdir, threads=1)
    assert result["values"] == 7
    assert 2**26 <= measure.above_imports(result["phases"], "large") < 2**26 + 2**22
    assert measure.above_imports(result["phases"], "small") < 2**22
    job.write_text("raise SystemExit('no luck')")
    with pytest.raises(measure.BenchmarkError, match="no luck"):
        measure.run_job("any", folder=workdir, threads=1)


def test_products_are_counted_as_the_model_says():
    """A forward pass of a Llama has the operations that its matrices give, and attention's apart."""
    import products
    import workload
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = workload.QUICK_LARGE
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with products.CountedProducts() as counted, torch.inference_mode():
        model(torch.zeros((1, 10), dtype=torch.int64))
    assert counted.flops["float32"] == pytest.approx(2 * 10 * shape.multiplied(), rel=0.01)  # and rotary positions
    assert counted.flops["attention"] > 0
    assert products.floor(shape.matrices(), 10)["flops"] == 2 * 10 * shape.multiplied()
    assert shape.multiplied() == sum(p.numel() for p in model.parameters() if p.dim() > 1) - shape.vocab * shape.hidden


def test_ratios_are_taken_within_a_round():
    """A round that is slow for both does not count."""
    import measure

    assert measure.ratios([1.0, 10.0, 3.0], [2.0, 20.0, 2.0]) == {
        "median": 0.5, "min": 0.5, "max": 1.5, "values": [0.5, 0.5, 1.5],
    }  # fmt: skip


def test_an_unsteady_machine_is_told():
    """Drift, a clock that disagrees with the processor's time, or a run below its floor."""
    import benchmarks
    import measure

    def steady(drift: float, ratio: float, cpu: float) -> bool:
        return benchmarks.steady([drift], measure.spread([ratio]), measure.spread([cpu]))

    assert steady(1.05, 1.2, 1.19)
    assert not steady(1.9, 1.2, 1.19)
    assert not steady(1.0, 1.5, 1.19)
    assert not steady(1.0, 0.94, 0.95)
