"""benchmarks/on_gpu.py, of which no session with a GPU may find out that it has a typing error:
both calls are rehearsed on the CPU with faults injected, in an interpreter that has no pydantic;
interrupted; and judged.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import calls, report  # noqa: E402
from benchmarks.gpu.layers import BF16_PRODUCTS, EXACT_PRODUCTS, tolerance  # noqa: E402
from benchmarks.gpu.processes import Skip  # noqa: E402
from benchmarks.gpu.rows import CallRecord, append  # noqa: E402
from benchmarks.gpu.settings import Settings  # noqa: E402
from benchmarks.gpu.tools import TRITON_TESTS, errors_of, files_with_gpu_tests, ncu_rows  # noqa: E402

ABSENT = ("pydantic", "tyro", "ruff", "mypy", "trl", "datasets", "lightning", "lightning_fabric")
"""What a machine on loan does not have."""

BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def environment(folder: Path) -> dict[str, str]:
    """Of a process in which importing what is ``ABSENT`` raises, for its children too."""
    (folder / "absent").mkdir(exist_ok=True)
    (folder / "absent" / "sitecustomize.py").write_text(BLOCKER)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    paths = os.pathsep.join([str(folder / "absent"), str(ROOT)])
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """The short rehearsal without what is ``ABSENT``; its limits are far off, since this machine
    may be busy.
    """
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.rehearsal",
        "--short",
        "--out",
        str(folder / "out"),
    ]
    command += ["--budget-minutes", "600", "600"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder), capture_output=True, text=True
    )
    return done, folder / "out"


@pytest.mark.timeout(3600)
def test_the_rehearsal_reports_each_fault_as_one_row(rehearsed: tuple) -> None:
    """Wrong bits, exceptions, deaths, silence, hangs, a missing tool, hazards, a failing test: one
    row each that says so; nothing else wrong; all units accounted for; nothing imported that a bare
    machine lacks.
    """
    done, _ = rehearsed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "The rehearsal went well." in done.stdout


@pytest.mark.timeout(3600)
def test_the_reports_hold_everything(rehearsed: tuple) -> None:
    """Four files per call; goals, machine, tables, what could not run: on the page, as data."""
    _, out = rehearsed
    for call in (1, 2):
        files = {path.name for path in (out / f"call{call}").iterdir()}
        assert files == {f"call{call}.{kind}" for kind in ("jsonl", "log", "md", "json")}
        page = (out / f"call{call}" / f"call{call}.md").read_text()
        data = json.loads((out / f"call{call}" / f"call{call}.json").read_text())
        assert "| wrong or failed <= 0 | " in page
        assert "## Wrong or failed" in page
        assert {"processor", "torch", "triton", "python"} <= data["facts"].keys()
        assert data["call"]["commit"]
        assert data["stages"].keys() == {*(stage.name for stage in calls.stages(call)), "build"}
        assert all(not stage["not_reached"] for stage in data["stages"].values())
    assert (
        "| nvidia, forward and backward at 4096, times BF16's <= 1.5 | - | not measured |"
        in (out / "call1" / "call1.md").read_text()
    )


@pytest.mark.timeout(3600)
def test_packages_that_are_absent_are_named_not_imported(tmp_path: Path) -> None:
    """The blocker blocks; a file of tests that needs pydantic is skipped with its name; a core file
    still runs.
    """
    command = [sys.executable, "-c", "import pydantic"]
    assert subprocess.run(command, env=environment(tmp_path), capture_output=True).returncode == 1
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["tests/test_cli.py", "tests/numerics/test_formats.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/test_cli.py:1: pydantic is not installed here" in done.stdout
    assert " passed" in done.stdout


def processes_with(mark: str) -> list[int]:
    """Process ids whose environment holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and (folder / "stat").read_text().split()[2] != "Z"
            ):
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


def begun(rows: Path) -> bool:
    """Whether the smoke stage is under way."""
    stage = CallRecord.of(rows).stages.get("smoke")
    return stage is not None and any(unit["state"] == "done" for unit in stage.units.values())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_call_ends_its_children_and_reports(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in the middle of a unit: no process is left, the rest is named as not reached.

    SIGTERM, which one handler takes alike, is slow: a whole call once more.
    """
    mark = f"ON_GPU_TEST={tmp_path}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--call", "1", "--rehearse", "0.01"]
    command += ["--out", str(tmp_path), "--budget-minutes", "600"]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path) | {name: value},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = tmp_path / "call1.jsonl"
    while not begun(rows):
        assert child.poll() is None, "it ended by itself"
        time.sleep(0.05)
    child.send_signal(number)
    said, _ = child.communicate()
    assert child.returncode == 130, said[-3000:]
    found = CallRecord.of(rows)
    assert found.call["ended"] == f"interrupted by {number.name}"
    assert "linear 8192 quartet2" in found.stages["linear"].not_reached
    assert f"- ended: interrupted by {number.name}" in (tmp_path / "call1.md").read_text()
    assert "linear 8192 quartet2" in said.partition("## Not reached")[2]
    while left := processes_with(mark):  # a killed process leaves /proc some moments later
        assert not [pid for pid in left if pid == child.pid]
        time.sleep(0.1)


@pytest.mark.parametrize("call", [1, 2])
def test_limits_are_below_the_budget_and_names_are_unique(call: int) -> None:
    """Five and six minutes, the reserve included; each unit can be named."""
    plan = calls.stages(call)
    assert sum(stage.limit for stage in plan) + calls.RESERVE < 60 * calls.BUDGET_MINUTES[call]
    names = [unit.name for stage in plan for unit in stage.units]
    assert len(names) == len(set(names))


def test_a_rehearsal_counts_what_its_units_computed(tmp_path: Path) -> None:
    """Of stages with several workers half, on two cores; what the clock said does not count."""
    from benchmarks.gpu import rehearsal

    path = tmp_path / "call1.jsonl"
    append(path, kind="call", state="began", call=1)
    for stage in calls.stages(1):
        append(path, kind="stage", stage=stage.name, state="done", seconds=1e6)
    append(path, kind="unit", stage="smoke", unit="a", state="done", **{"cpu s": 7.0})
    append(path, kind="unit", stage="smoke", unit="b", state="failed", reason="killed")
    append(path, kind="unit", stage="linear", unit="c", state="done", **{"cpu s": 3.0})
    want = (7 + 2 * rehearsal.START) / 2 + 3 + rehearsal.START
    assert rehearsal.processor_seconds(1, CallRecord.of(path)) == pytest.approx(want)


@pytest.mark.parametrize("reason", ["there is no nvcc\n", None])
def test_the_cpu_build_leaves_what_is_said_of_cuda(
    reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forbids CUDA kernels to be quick, and setup.py would keep that as the reason why there are
    none."""
    from benchmarks.gpu import build

    said = tmp_path / "nvfp4" / "_cuda_missing.txt"
    said.parent.mkdir()
    if reason is not None:
        said.write_text(reason)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "importable", lambda module: "no such module")
    monkeypatch.setattr(
        build, "run_setup", lambda *arguments: said.write_text("NVFP4_CUDA=0 forbade it")
    )
    monkeypatch.setattr(build.os, "nice", lambda by: by)
    build.build_cpu(None)
    assert (said.read_text() if said.exists() else None) == reason


def test_goals_are_judged(tmp_path: Path) -> None:
    """Enough, not enough, and not measured; the better backend counts; a line cut off by a kill is
    left out.
    """
    path = tmp_path / "call1.jsonl"
    append(path, kind="call", state="began", call=1)
    for backend, share in (("cuda", 0.71), ("triton", 0.5)):
        append(
            path,
            kind="row",
            stage="rates",
            quantiser="rtn",
            backend=backend,
            **{"rows / copy": share},
        )
    append(path, kind="row", stage="rates", quantiser="rtn", **{"one read over two": 1.39})
    for size, ratio in ((8192, 1.25), (4096, 1.6)):
        append(
            path,
            kind="row",
            stage="linear",
            size=size,
            recipe="nvidia",
            **{"x bf16": ratio, "saved x bf16": 0.28},
        )
    append(
        path,
        kind="row",
        stage="smoke",
        check="gemm",
        backend="triton",
        checked=3,
        wrong=2,
        first="a | b",
    )
    append(
        path,
        kind="unit",
        stage="smoke",
        unit="dead",
        state="failed",
        reason="its process died of SIGSEGV",
    )
    with path.open("a") as file:
        file.write('{"kind": "row", "stage": "smoke", "wro')
    met = {
        row["goal"]: (row["measured"], row["met"]) for row in report.judge(report.read(tmp_path))
    }
    assert met["wrong or failed <= 0"] == (3.0, "NO")
    assert met["rtn, share of copy bandwidth >= 0.7"] == (0.71, "yes")
    assert met["rtn, both orientations: one read over two >= 1.4"] == (1.39, "NO")
    assert met["ms_eden(2), share of copy bandwidth >= 0.45"] == ("-", "not measured")
    assert met["nvidia, forward and backward at 8192, times BF16's <= 1.25"] == (1.25, "yes")
    assert met["nvidia, forward and backward at 4096, times BF16's <= 1.5"] == (1.6, "NO")
    assert met["nvidia, bytes saved for backward, of BF16's <= 0.3"] == (0.28, "yes")
    head = report.write(tmp_path, 1)
    assert "first a \\| b" in head
    assert "dead: its process died of SIGSEGV" in head


def test_tolerances_of_layers() -> None:
    """rl has dense products in its backward, so one BF16 rounding more or less is right, in float32
    as well.
    """
    import torch

    assert tolerance("rl", torch.float32, False) == BF16_PRODUCTS
    assert tolerance("quartet2", torch.float32, False) == EXACT_PRODUCTS
    assert tolerance("quartet2", torch.float32, True) == BF16_PRODUCTS
    assert tolerance("quartet2", torch.bfloat16, False) == BF16_PRODUCTS


def test_operands_whose_products_are_exact_in_any_order() -> None:
    """What products are judged with: float64 and float32, forwards and backwards, scales in any
    way, all agree.
    """
    import torch

    from nvfp4.bench.gates import exact_operand as exact
    from nvfp4.numerics.formats import TILE_BLOCK

    for m, n, k, block in (
        (33, 40, 2048, (1, 16)),
        (64, 17, 272, TILE_BLOCK),
        (3, 5, 100, (1, 16)),
    ):
        a, b = exact(m, k, row_scaled=True), exact(n, k, block)
        left, right = a.decode_blocks().double(), b.decode_blocks().double()
        want = (left @ right.t()) * a.global_scale[:, None].double() * b.global_scale.double()
        backwards = (
            left.float().flip(1)
            @ (right.float() * b.global_scale).flip(1).t()
            * a.global_scale[:, None]
        )
        assert torch.equal(backwards.double(), want)
        assert want.abs().max() > 1


def test_files_with_gpu_tests() -> None:
    """The named ones and all that mark a test ``cuda``, and not the whole suite."""
    files = {Path(path).name for path in files_with_gpu_tests()}
    assert {*TRITON_TESTS, "test_cuda.py", "test_contract.py", "test_capturable.py"} <= files
    assert {"test_quantizers.py", "test_matmul.py", "test_sharding.py"} <= files, (
        "they take every device"
    )
    assert "test_train_loop.py" not in files


def test_goals_of_every_device_are_marked_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture makes for a GPU is chosen there by its mark, and nothing else is."""
    from types import SimpleNamespace

    import conftest
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made: list = []
    names = ("backend", "device")
    conftest.pytest_generate_tests(
        SimpleNamespace(fixturenames=names, parametrize=lambda _, cases: made.extend(cases))
    )
    assert {case.values[1] for case in made} == {"cpu", "cuda"}
    for case in made:
        assert ("cuda" in {mark.name for mark in case.marks}) == (case.values[1] == "cuda")


def test_goals_of_chosen_tests() -> None:
    """Marked ones, and the files named; of tests that run on every backend Triton's in these files
    alone.
    """
    from types import SimpleNamespace

    from benchmarks.gpu.collect import _on_gpu

    def item(
        file: str, marked: bool, backend: str | None = None, name: str = "test_x"
    ) -> SimpleNamespace:
        made = SimpleNamespace(
            path=Path(file), name=name, get_closest_marker=lambda mark: marked or None
        )
        if backend is not None:
            made.callspec = SimpleNamespace(params={"backend": backend})
        return made

    assert _on_gpu(item("test_cuda.py", True))
    assert _on_gpu(item("test_quantizers.py", True, "cuda"))
    assert not _on_gpu(item("test_quantizers.py", True, "triton"))
    assert not _on_gpu(item("test_quantizers.py", False, "cuda"))
    assert _on_gpu(item("test_vectors.py", True, "triton"))
    assert _on_gpu(item("test_triton.py", False))
    assert not _on_gpu(item("test_triton.py", False, name="test_the_interpreter_is_never_chosen"))


def test_goals_of_compute_sanitizer() -> None:
    """Counted errors count; none counted is good only of a program that ran to its end; a refusal
    is no fault.
    """
    good = "ran\n========= ERROR SUMMARY: 0 errors\n"
    assert errors_of("memcheck", good, good, 0) == 0
    bad = "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n"
    assert errors_of("memcheck", bad, bad, 1) == 3
    raced = "ran\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert errors_of("racecheck", raced, raced, 0) == 2
    for died in ("ModuleNotFoundError: numpy\n========= ERROR SUMMARY: 0 errors\n", "", "ran\n"):
        with pytest.raises(RuntimeError, match="did not finish"):
            errors_of("memcheck", died, died, 1)
    refused = "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error\n"
    with pytest.raises(Skip, match="does not work on this machine"):
        errors_of("memcheck", refused, refused, 1)


def test_goals_of_tests_that_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are written as they come, each test in one of them, so that a killed pytest leaves
    what it did.
    """
    from types import SimpleNamespace

    from benchmarks.gpu import collect

    rows = tmp_path / "rows.jsonl"
    monkeypatch.setenv("ON_GPU_ROWS", str(rows))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(collect, "SECONDS", 0.0)
    for _ in range(3):
        collect.pytest_runtest_logreport(SimpleNamespace(failed=False, skipped=False, when="call"))
    bad = SimpleNamespace(
        failed=True, skipped=False, when="call", nodeid="bad", longreprtext="E  planted"
    )
    collect.pytest_runtest_logreport(bad)
    found = CallRecord.of(rows)
    assert (found.compared, found.wrong) == (4, 1)


def test_goals_explained_in_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler says has many lines, of which none is taken for another backend's."""
    import torch

    from benchmarks.gpu import checks
    from nvfp4 import ops
    from nvfp4.backends.registry import BACKENDS

    order = [
        (BACKENDS["triton"], "its first matmul failed: at 3:4:\n    x = y\n  ^"),
        (BACKENDS["reference"], None),
    ]
    monkeypatch.setattr(ops, "candidates", lambda *arguments: order)
    rows: list = []
    place = type("Place", (), {"device": torch.device("cpu")})
    job = type(
        "Job",
        (),
        {"settings": type("Settings", (), {"place": place}), "add": lambda **row: rows.append(row)},
    )
    checks.explained(job, "matmul", None)
    assert rows[0]["triton"] == "its first matmul failed: at 3:4: x = y ^"
    assert rows[0]["chosen"] == "reference"


def test_rows_of_ncu() -> None:
    """Its raw page: words of its own, a head, units, a row per kernel; only the counters that are
    kept.
    """
    text = (
        '==PROF== Connected\n"ID","Kernel '
        'Name","gpu__time_duration.sum","other","launch__registers_per_thread"\n'
        '"","","us","","register/thread"\n"0","amax_kernel(int)","12.5","1","40"\n"1","quantize","7","2","64"\n'
    )
    first = {
        "kernel": "amax_kernel(int)",
        "gpu__time_duration.sum": "12.5",
        "launch__registers_per_thread": "40",
    }
    second = {
        "kernel": "quantize",
        "gpu__time_duration.sum": "7",
        "launch__registers_per_thread": "64",
    }
    assert ncu_rows(text) == [first, second]
    assert ncu_rows("==ERROR== no permission\n") == []


def test_settings_travel_to_processes() -> None:
    """They are pickled for each unit."""
    import pickle

    settings = Settings(call=1, folder="x", faults={"a": "hang"})
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_plan_fits() -> None:
    """Expected times, from compile times that were measured, are below the limits of each stage and
    the budgets; only the last stage, which has what is left, may be cut.
    """
    from benchmarks.gpu import plan

    for call in (1, 2):
        rows = plan.table(call)
        assert (
            sum(row["expected s"] for row in rows) < 60 * calls.BUDGET_MINUTES[call] - calls.RESERVE
        )
        assert all(row["expected s"] <= row["limit s"] for row in rows)
        assert all(row["reached"] == "100%" for row in rows[:-1])
        assert [row["stage"] for row in rows] == [stage.name for stage in calls.stages(call)]


def test_the_gpu_s_place_calls_what_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is CUDA's own, with torch's own signatures in the place of its functions: no typing
    error waits for a GPU.
    """
    from unittest import mock

    import torch

    from benchmarks.gpu.place import GPU

    names = (
        "is_available current_device synchronize current_stream stream graph set_sync_debug_mode "
        "mem_get_info"
    )
    names += " reset_peak_memory_stats max_memory_allocated"
    for name in names.split():
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock(spec=getattr(torch.cuda, name)))
    monkeypatch.setattr(torch.cuda, "cudart", mock.MagicMock())
    profile, cpu = torch.profiler.profile, torch.profiler.ProfilerActivity.CPU
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=[cpu]))
    monkeypatch.setattr(torch, "set_num_threads", mock.create_autospec(torch.set_num_threads))
    torch.cuda.current_device.return_value = 0
    torch.cuda.mem_get_info.return_value = (5, 7)
    torch.cuda.max_memory_allocated.return_value = 11

    ran: list[int] = []
    place = GPU()
    place.prepare("")
    assert place.device == torch.device("cuda", 0)
    assert place.size(8192) == 8192
    place.synchronize()
    place.warm(lambda: ran.append(1))
    assert place.timed(lambda: ran.append(2)) == 1.0
    result, replay = place.capture(lambda: ran.append(3) or 4)
    replay()
    assert result == 4
    assert len(place.side_by_side([lambda: 1, lambda: 2], 3)) == 2
    with place.no_waiting():
        ran.append(5)
    assert torch.cuda.set_sync_debug_mode.call_args_list == [
        mock.call("error"),
        mock.call("default"),
    ]
    assert place.free_bytes() == 5
    assert place.peak_bytes(lambda: ran.append(6)) == 11
    place.profiled(lambda: ran.append(7))
    assert isinstance(place.profile(lambda: ran.append(8)), list)
    place.compile(torch.nn.Linear(2, 2))
    assert sorted({*ran}) == [1, 2, 3, 5, 6, 7, 8]
    torch.cuda.is_available.return_value = False
    with pytest.raises(RuntimeError, match="sees no GPU"):
        place.prepare("")
