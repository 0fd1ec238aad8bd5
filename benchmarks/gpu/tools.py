"""What other programs find out: pytest, compute-sanitizer, ncu. One that is missing is named.

    tests       the package's tests of what runs on CUDA; each failure is a row     (collect.py)
    sanitizer   memcheck or racecheck over every quantiser of a backend             (small_case.py)
    counters    ncu's counters of one call at full size, a row per kernel           (small_case.py)

A tool can fail in three ways that are told apart: it is not installed or not permitted (``Skip``,
no fault of a kernel), it did not get to its end (RuntimeError), or it found something (a wrong
row).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.place import python
from benchmarks.gpu.processes import Job, Skip

ROOT = Path(__file__).parent.parent.parent

TRITON_TESTS = ("test_triton.py", "test_triton_fused.py", "test_triton_gemm.py", "test_vectors.py")
"""Files of which all that runs on a GPU is run there; of the others, what is marked ``cuda``."""

ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
"""How compute-sanitizer's memcheck and racecheck end."""

REFUSED = re.compile(r"ERR_NVGPUCTRPERM|LibraryNotLoaded|Device not supported", re.IGNORECASE)
"""What profiler and sanitizer say where the machine does not let them: no fault of a kernel."""

BY_FIXTURE = re.compile(r"def test_\w+\([^)]*\bbackend(: str)?, device\b")
"""A test that ``tests/conftest.py`` runs on every backend and device.

The GPU's too, which it marks ``cuda``.
"""

COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "pipe_alu_cycles_active",
    "pipe_fma_cycles_active",
    "pipe_xu_cycles_active",
    "inst_executed_pipe_alu",
    "inst_executed_pipe_fma",
    "inst_executed_pipe_xu",
    "inst_executed_pipe_lsu",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
"""Parts of the names of ncu's raw columns that are kept, where a card has them."""

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
)


def tests(job: Job) -> None:
    """The package's own tests of what runs on CUDA.

    Each failure is a row as it comes (``collect.py``).
    """
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise Skip(f"{needed} is not installed here")
    command = [
        *python(),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.gpu.collect",
    ]
    command += ["--continue-on-collection-errors", *(job.settings.tests or files_with_gpu_tests())]

    # Each helps, and none is needed.
    if find_spec("pytest_timeout"):
        command += ["--timeout", "90"]
    if find_spec("xdist") and job.settings.kind == "gpu":
        command += ["-n", "16", "--dist", "worksteal"]
    environment = os.environ | {
        "ON_GPU_ROWS": str(Path(job.settings.folder) / f"call{job.settings.call}.jsonl"),
        "ON_GPU_EVERYTHING": "1" if job.settings.tests else "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }

    # Its failures are rows already, so that it failed is no news.
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code not in (0, 1, 5):  # all well; tests failed, which their rows say; none was chosen
        raise RuntimeError(f"pytest ended with code {code}; see the log")


def files_with_gpu_tests() -> list[str]:
    """Files of ``TRITON_TESTS``, and all that mark a test ``cuda`` or take every device.

    Collecting every file takes a minute.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))

    def runs_on_a_gpu(path: Path) -> bool:
        text = path.read_text()
        return path.name in TRITON_TESTS or "mark.cuda" in text or bool(BY_FIXTURE.search(text))

    some = [path for path in files if path.name != "test_on_gpu.py" and runs_on_a_gpu(path)]
    return [str(path.relative_to(ROOT)) for path in some]


def sanitizer(job: Job, tool: str, backend: str) -> None:
    """compute-sanitizer over every quantiser of a backend: bad addresses, or races.

    On small ragged matrices (``small_case.py``).
    """
    program = path_of(job, "compute-sanitizer")
    command = [program, "--tool", tool, "--print-limit", "20", "--launch-timeout", "0"]
    # torch asks the driver for functions that it may not have: answers, and no errors of a kernel
    command += ["--report-api-errors", "no", *case(job, backend, "small")]
    # the caching allocator would hide an access beyond a tensor within its block
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    print(text)
    if "not here: " in text:
        raise Skip(text.partition("not here: ")[2].splitlines()[0])

    # The first line that names the fault stands in the row; the log has all of them.
    errors = errors_of(tool, done.stdout, text, done.returncode)
    first = next(
        (line for line in text.splitlines() if re.search(r"Invalid|hazard|Error", line)), ""
    )
    job.add(
        tool=tool,
        backend=backend,
        checked=1,
        wrong=int(errors > 0),
        errors=errors,
        first=first[:300],
    )


def errors_of(tool: str, said: str, text: str, code: int) -> int:
    """How many errors or hazards a tool counted; ``Skip`` if it cannot work on this machine.

    said: standard output; text: that and standard error; code: of the program. None counted says
    nothing of a program that did not get to its end: RuntimeError.
    """
    if (refused := REFUSED.search(text)) is not None:
        raise Skip(f"{tool} does not work on this machine: {refused[0]}")
    summary = ERRORS.search(text)
    errors = (
        0
        if summary is None
        else int(next(group for group in summary.groups() if group is not None))
    )
    if summary is None or (errors == 0 and "ran" not in said.splitlines()):
        raise RuntimeError(f"{tool} did not finish (code {code}): {text.strip()[-400:]}")
    return errors


def counters(job: Job, backend: str, what: str) -> None:
    """ncu's counters of the kernels of one call at full size: what a kernel waits for."""
    program = path_of(job, "ncu")
    target = Path(job.settings.folder) / f".ncu.{backend}.{what}.csv"
    command = [
        program,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "raw",
    ]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--log-file", str(target), *case(job, backend, what)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if "not here: " in done.stdout:
        raise Skip(done.stdout.partition("not here: ")[2].splitlines()[0])

    # ncu may write its log and still have failed, so what counts is whether rows came.
    text = target.read_text() if target.exists() else ""
    target.unlink(missing_ok=True)
    rows = ncu_rows(text)
    if not rows:
        words = (text + done.stdout + done.stderr).strip()
        if (refused := REFUSED.search(words)) is not None:
            raise Skip(f"ncu does not work on this machine: {refused[0]}")
        words = words[-400:]
        raise RuntimeError(f"ncu gave no row (code {done.returncode}): {words}")
    for row in rows:
        job.add(case=what, backend=backend, **row)


def ncu_rows(text: str) -> list[dict[str, str]]:
    """One row per kernel of ncu's raw page as CSV, with the counters that are kept.

    Its second line holds units.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(lines))
    rows = []
    for line in table:
        # the line of units has no number
        if not (line.get("ID") or "").isdigit():
            continue
        kept = {
            key: value
            for key, value in line.items()
            if any(name in (key or "") for name in COUNTERS)
        }
        rows.append({"kernel": (line.get("Kernel Name") or "")[:60], **kept})
    return rows


def case(job: Job, backend: str, what: str) -> list[str]:
    """The program that such a tool runs: ``small_case.py`` with this backend."""
    settings = json.dumps({"kind": job.settings.kind, "scale": job.settings.scale})
    return [*python(), "-m", "benchmarks.gpu.small_case", backend, what, settings]


def path_of(job: Job, program: str) -> str:
    """The path of a program; ``Skip`` that names it if there is none.

    CUDA's tools often lie beside nvcc and not on PATH.
    """
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    places = [os.environ.get("PATH", ""), *beside, *job.settings.place.toolboxes]
    path = shutil.which(program, path=os.pathsep.join(places))
    if path is None:
        raise Skip(f"{program} is missing: it is neither on PATH nor beside nvcc")
    return path
