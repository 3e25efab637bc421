"""The GPU check of examples/benchmarks: tiny shapes on this CPU and in this process, and its arithmetic."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from example_scripts import BENCHMARK_MARKS, BENCHMARKS, importable, run_here

from mergekit_slta.runtime.progress import Progress

pytestmark = BENCHMARK_MARKS


@pytest.fixture(scope="module", autouse=True)
def _importable():
    with importable(BENCHMARKS):
        yield


@pytest.fixture(scope="module")
def gpu_check(_importable, tmp_path_factory):
    """Run the GPU check with tiny shapes, jobs in this process; its WORKDIR, and how to call it again."""
    import gpu
    import gpu_jobs
    import gpu_parts
    import workload

    folder = tmp_path_factory.mktemp("gpu")

    def run_job(job: str, *, folder: Path, threads: int, script: Path, **arguments: object) -> dict:
        return run_here(gpu_jobs.JOBS, job, arguments)

    def run(*arguments: str) -> int:
        common = ["--device", "cpu", "--quick", "--threads", "1", "--experts", "2", "--models", str(folder)]
        return gpu.main([str(folder), *common, *arguments])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts, "run_job", run_job)
        patch.setattr(workload, "BLOCK", 10007)
        assert run("--only", "probe", "1b-features", "1b-joint", "1b-merge") == 0
        yield folder, run


def test_the_gpu_check_leaves_a_table_and_no_models(gpu_check):
    """Every part leaves its rows, `joint` an extrapolation that is marked as one, and the text says that it is a dry
    run."""
    folder, _ = gpu_check
    text = (folder / "gpu.md").read_text()
    assert "A dry run on tiny shapes" in text
    for title in ("features |", "joint, 1 step, 5 rows per task |", "merge |", "(extrapolated)"):
        assert title in text
    assert "nan" not in text
    assert str(folder) not in text
    assert not [*folder.rglob("*.safetensors")]


def test_operations_are_predicted_as_check_does(gpu_check):
    """The arithmetic of `--predict` gives the operations and bytes that `mergekit-slta check` prints, to three digits
    and the rows' tokens."""
    import gpu_predict
    import workload

    folder, _ = gpu_check
    features, joint = (
        json.loads((folder / "parts" / f"1b-{name}.json").read_text())["found"] for name in ("features", "joint")
    )
    shape = workload.QUICK_LARGE
    for work, found in (
        (gpu_predict.features(shape, 2, 4), features["predicted"]),
        (gpu_predict.joint(shape, 2, 5, 1, held_out=4), joint["predicted"]),
        (gpu_predict.joint(shape, 2, 4, 6, held_out=10), joint["real"]),
    ):
        assert found["predicted_flops"] == pytest.approx(work.flops, rel=0.2)  # a few rows are not like all rows
        assert found["predicted_read_bytes"] == pytest.approx(work.nbytes, rel=0.01)


def test_finished_parts_are_not_run_again(gpu_check, capsys, monkeypatch):
    """What is there is kept, other settings are refused, and what is not expected to fit is left out and told."""
    import gpu_parts

    folder, run = gpu_check
    monkeypatch.setattr(gpu_parts, "run_job", None)
    assert run("--only", "1b-features", "1b-merge") == 0
    assert run("--only", "1b-features", "--rows", "3") == 1
    assert "--again" in capsys.readouterr().err
    assert run("--only", "small-synchronizations", "8b-features", "--budget", "1") == 0
    text = (folder / "gpu.md").read_text()
    assert "- 8b-features: about" in text.partition("## Left out")[2]
    assert "joint, 1 step" in text


def test_room_for_models_is_looked_for_before_they_are_made():
    """The most experts in the first folder that fits them, the merge where room is left; else one line with what is
    needed."""
    import gpu_predict
    from gpu_room import find_room
    from measure import BenchmarkError

    shape, memory, disk = gpu_predict.EIGHT_B, Path("/ram"), Path("/disk")

    def found(ram: float, drive: float, experts: int | None = None) -> tuple:
        free = [(memory, ram * 1e9), (disk, drive * 1e9)]
        room = find_room(shape, free, free, experts)
        return room.folder, room.experts, room.output

    assert found(100, 100) == (memory, 3, memory)
    assert found(67, 60) == (memory, 3, disk)
    assert found(67, 10) == (memory, 3, None)
    assert found(50, 60) == (memory, 2, disk)
    assert found(10, 50) == (disk, 2, None)
    assert found(10, 90, experts=4) == (disk, 4, None)
    for experts in (None, 5):
        with pytest.raises(
            BenchmarkError, match=r"base and [25] experts need (49|98)\.\d GB.*/ram has 40\.0 GB"
        ) as error:
            found(40, 40, experts)
        assert len(str(error.value).splitlines()) == 1


def test_a_ram_disk_is_known_by_its_mount():
    """The longest mount point counts."""
    from gpu_room import is_ram_disk

    mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n/dev/vdb /dev/shm/disk xfs rw 0 0\n"
    assert is_ram_disk(Path("/dev/shm/models"), mounts)
    assert not is_ram_disk(Path("/dev/shm/disk/models"), mounts)
    assert not is_ram_disk(Path("/dev/shmem"), mounts)


def test_a_short_run_is_extrapolated_between_operations_and_bytes():
    """Time that is a sum of both is found again from two runs, and lies between the limits of one."""
    from gpu_predict import Work, extrapolated

    def seconds(work: Work) -> float:
        return work.flops / 5e12 + work.nbytes / 2e9

    short, longer, real = Work(1e12, 1e9), Work(2e12, 1e9), Work(100e12, 4e9)
    assert extrapolated([(seconds(short), short)], real) == {
        "low": pytest.approx(4 * seconds(short)), "high": pytest.approx(100 * seconds(short)), "best": None,
    }  # fmt: skip
    both = [(seconds(work), work) for work in (short, longer)]
    assert extrapolated(both, real)["best"] == pytest.approx(seconds(real))
    assert extrapolated([both[0], (both[0][0] - 0.1, longer)], real)["best"] is None


def test_a_block_of_random_numbers_makes_other_weights_for_every_tensor(monkeypatch):
    """Bases differ by tensor, experts from the base by `STEP` of a deviation; the same name gives the same again."""
    import workload

    monkeypatch.setattr(workload, "BLOCK", 10007)
    block = workload.RandomBlock("cpu")
    base, other, expert = block("a", (300, 64), 0), block("b", (300, 64), 0), block("a", (300, 64), 1)
    assert torch.equal(base, block("a", (300, 64), 0))
    assert base.dtype == torch.bfloat16
    deviation = 64**-0.5
    assert float(base.float().std()) == pytest.approx(deviation, rel=0.05)
    assert float((base - other).float().std()) > deviation
    assert float((expert - base).float().std()) == pytest.approx(workload.STEP * deviation, rel=0.1)
    assert len(base.unique(dim=0)) == 300  # more numbers than the block has
    assert float(block("norm.weight", (64,), 0).float().mean()) == pytest.approx(1, abs=0.1)


def test_waits_for_the_gpu_are_counted_by_line_of_the_package():
    """The innermost frame of the package counts; other warnings do not."""
    from gpu_jobs import counted_synchronizations

    code = "def wait():\n    warnings.warn('called a synchronizing CUDA operation')\n"
    space: dict = {"warnings": warnings}
    exec(compile(code, "/anywhere/mergekit_slta/runner/fake.py", "exec"), space)
    with counted_synchronizations() as found:
        space["wait"]()
        space["wait"]()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert found == {"runner/fake.py:2 wait": 2, "elsewhere": 1}


def test_progress_bars_are_told_apart():
    """Each phase of each bar, in order, with its seconds."""
    from gpu_jobs import phases_noted

    with phases_noted() as found:
        for phase in ("features", "features"):
            with Progress(phase, 2, quiet=True) as progress:
                progress.advance(2)
        with Progress("step 1", 1, quiet=True) as progress:
            progress.begin("step 1, backward", 3)
    assert [title for title, _ in found] == ["features (2)", "features (2)", "step 1 (1)", "step 1, backward (3)"]
    assert all(seconds >= 0 for _, seconds in found)


def test_weights_of_two_devices_are_compared():
    """The largest difference of any weight; other submodules and NaN are refused."""
    from gpu_parts import deviation
    from measure import BenchmarkError

    one = {"a": [0.5, -2.0], "b": [0.25]}
    assert deviation(one, {"a": [0.5, -1.5], "b": [0.5]}) == {"largest": 0.5, "median": 0.25, "largest_weight": 2.0}
    with pytest.raises(BenchmarkError, match="submodules"):
        deviation(one, {"a": [0.5, -2.0]})
    with pytest.raises(BenchmarkError, match="NaN"):
        deviation(one, {"a": [0.5, float("nan")], "b": [0.25]})


def test_the_prediction_says_what_it_assumes(capsys):
    """`--predict` measures nothing: a table of the 1B, 8B and 70B shapes with the aims."""
    import gpu

    assert gpu.main(["--predict"]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured" in text
    assert "Llama-3-8B shape: joint | bfloat16" in text


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_peaks_and_waits_of_a_gpu_come_into_the_table(monkeypatch):
    """With the GPU's own functions replaced: what they give is in the values, and what is in the values in the text."""
    import gpu_jobs
    import gpu_predict
    import gpu_tables
    import measure

    for name, value in (
        ("init", None), ("reset_peak_memory_stats", None), ("set_sync_debug_mode", None), ("synchronize", None),
        ("get_device_name", "H100"), ("max_memory_allocated", 3 * 2**30), ("max_memory_reserved", 4 * 2**30),
        ("host_memory_stats", {"allocated_bytes.peak": 2**30}),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with gpu_jobs._on("cuda") as peaks:
        pass
    assert peaks["peak_device"] == 3 * 2**30
    assert peaks["peak_pinned"] == 2**30
    assert peaks["peak_resident"] > 0

    def wait(recipe: dict, _: str) -> None:
        for _ in range(recipe["rows"]):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(gpu_jobs, "_calibrated", wait)
    waits = gpu_jobs.synchronizations(measure.Clock(), {"features 5": {"rows": 5}, "features 10": {"rows": 10}})
    assert waits["counted"] == {"features 5": {"elsewhere": 5}, "features 10": {"elsewhere": 10}}
    run = {
        "seconds": 2.0, "phases": {"check": 0.5}, "peak_anonymous": 2**30, "experts": 3, "rows": 5, **peaks,
        "predicted": {"predicted_flops": 1e13, "predicted_read_bytes": 8e9},
        "real": {"predicted_flops": 1e14, "predicted_read_bytes": 32e9},
    }  # fmt: skip
    rates = {
        "flops_per_second": {"float32": 5e13, "tf32": 4e14, "bfloat16": 7e14}, "bytes_per_second": {"copy": 5e10},
        "eigen_seconds": {"1024": 0.1, "4096": 1.0}, "device": "H100",
    }  # fmt: skip
    found = {"probe": rates, "small-synchronizations": {**waits, "layers": 5}, "8b-features": run, "8b-joint": run}
    text = gpu_tables.document(
        {"rows": 30, "quick": False, "device": "cuda"}, found, {"8b-merge": "too long"}, gpu_predict.SHAPES
    )
    assert "| 10% / 1.2% / 0.71% | 8 | 4 | 3.00 | 1.00 | 1.00 |" in text
    assert "| features 10 | 10 | 2.0 |" in text
    assert "| 8b | 8 to 20 | - | 100 | 32 |" in text
    assert "- 8b-merge: too long" in text
