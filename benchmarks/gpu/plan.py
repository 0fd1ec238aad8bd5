"""What each stage of a call is expected to take, and from what: ``on_gpu --plan`` prints it.

    python -m benchmarks.gpu.plan --measure build/plan --keep benchmarks/results/on_gpu_plan.json

measures, on any machine with the Triton that GPU users have and with nvcc:

    user CPU seconds of each unit that compiles: Triton's JIT for an H100 over a driver that
    launches nothing
    seconds of nvcc for each CUDA source, for sm_90a

Expected of a stage on 16 hardware threads: the compiling at ``SPEED`` times one thread's, and per
unit what its process costs (``CONTEXT``) and what its own code waits for (``WAITS``). What a GPU
does to it, the making of a CUDA context above all, is an assumption and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.calls import BUDGET_MINUTES, RESERVE, WORKERS, stages
from benchmarks.gpu.processes import Runner, Stage, Unit
from benchmarks.gpu.rates import SECONDS
from benchmarks.gpu.rows import CallRecord, StageRecord
from benchmarks.gpu.settings import Settings
from nvfp4.backends.native.cuda_targets import FLAGS, OF_A_LIBRARY, SOURCES, find_nvcc
from nvfp4.bench.timing import machine

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / "benchmarks" / "results" / "on_gpu_plan.json"

SPEED = 8
"""How much faster than one thread 16 hardware threads compile: as many times as there are cores."""

CONTEXT = 1.2
"""Seconds of a unit beside its work.

Measured: 0.4 of imports. Assumed: 0.8 for a CUDA context and for loading kernels from Triton's
cache.
"""

SLOWER = 1.4
"""By how much longer the slowest CUDA source takes while all threads are busy. Assumed."""

WAITS = {
    "rates:machine_facts": 2 * 0.6 + 3.0,
    "rates:quantising": 3 * SECONDS + 0.3,
    "rates:from_codes": 2 * SECONDS + 0.3,
    "rates:multiplying": 5 * SECONDS + 0.5,
    "rates:linear": 4 * SECONDS + 2.5,
    "rates:one_more_layer": 1.0,
    "checks:large": 0.8,
    "tools:tests": 105.0,
    "tools:sanitizer": 40.0,
    "tools:counters": 5.0,
    "layers:compiled_layer": 15.0,
    "layers:graph_of_layer": 8.0,
    "layers:waits_for_nothing": 8.0,
    "layers:streams": 8.0,
    "layers:compiles_once": 8.0,
    "layers:layer": 12.0,
}
"""Seconds that a unit waits by its own code: what it times, by the number of its candidates.

Assumed are 2.5 for the self-checks and the profile of a layer, 15 for torch.compile, 8 for a
layer's pairs of operands that no unit has compiled before (12 with ragged tokens), 40 for torch
under compute-sanitizer, 5 for one call under ncu, and 105 for pytest in 16 processes, which is cut
off at its limit with every failure written till then.
"""


def measure(folder: Path, names: list[str], workers: int, seconds: float) -> None:
    """Time the units of these stages, and with "build" nvcc, for at most so many seconds.

    folder: keeps what was timed, so that a measurement that was ended goes on from there.
    """
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # empty at first, as on a fresh machine
    if "build" in names:
        _time_nvcc(folder / "build.json")
    for call in (1, 2):
        for stage in stages(call):
            if stage.name in names:
                _time_units(stage, call, folder, workers, end)


def _time_units(stage: Stage, call: int, folder: Path, workers: int, end: float) -> None:
    """Triton's units of a stage that have no time yet."""
    path = folder / f"{stage.name}.jsonl"
    units = tuple(
        unit._replace(seconds=3600)
        for unit in stage.units
        if _compiles(unit) and unit.name not in _times(path, stage.name)
    )
    # whenever it is ended, it has timed some of each kind
    units = tuple(random.Random(0).sample(units, len(units)))
    settings = Settings(call=call, folder=str(folder), kind="compile", build=False)
    runner = Runner(path, folder / "log", settings, quiet=True)
    try:
        runner.run_stage(stage._replace(workers=workers, units=units), end)
    finally:
        runner.end_all("interrupted")


def _times(path: Path, stage: str) -> dict[str, float]:
    """CPU seconds of each unit that was timed to its end."""
    ended = CallRecord.of(path).stages.get(stage, StageRecord()).units
    return {
        name: unit["cpu s"]
        for name, unit in ended.items()
        if unit["state"] == "done" and "cpu s" in unit
    }


def kept(folder: Path) -> dict[str, Any]:
    """What was measured so far, with what it was measured."""
    import torch
    import triton

    facts = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    facts["processor"] = machine()["processor"]
    facts["unit"] = "user CPU seconds of one thread"

    # Only units that ended by themselves have a time.
    times = {path.stem: _times(path, path.stem) for path in sorted(folder.glob("*.jsonl"))}
    build = folder / "build.json"
    return facts | {
        "nvcc sm_90a": json.loads(build.read_text()) if build.exists() else {},
        "stages": times,
    }


def table(call: int) -> list[dict[str, Any]]:
    """Per stage of a call: units, CPU seconds of compiling, expected and allowed seconds.

    "reached": how much of the stage ends within its limit.
    """
    figures = json.loads(KEPT.read_text())
    plan, rows = stages(call), []

    # Compiling is shared among threads, waiting is not.
    for stage in plan:
        times = figures["stages"].get(stage.name, {})
        seconds = [_cpu_seconds(unit, stage.name, figures) for unit in stage.units]
        cpu = sum(seconds)
        waits = [CONTEXT + WAITS.get(unit.function, 0.0) for unit in stage.units]
        if stage.workers == 1:
            expected = sum(waits) + cpu
        else:  # all threads are busy, but no stage is shorter than its longest unit
            longest = max(map(sum, zip(seconds, waits, strict=True)))
            threads = SPEED if stage.workers == WORKERS else min(stage.workers, SPEED)
            expected = max((cpu + sum(waits)) / threads, longest)
        if stage.name == "smoke":
            expected = max(expected, build_seconds(figures) + CONTEXT)
        whole = expected
        if stage is plan[-1]:  # it has what the others leave, and ends where its time does
            expected = min(expected, stage.limit)
        row = {
            "call": call,
            "stage": stage.name,
            "units": len(stage.units),
            "timed here": len(times),
        }
        row |= {"CPU s": round(cpu, 1), "expected s": round(expected, 1), "limit s": stage.limit}
        rows.append(row | {"reached": f"{expected / whole:.0%}"})
    return rows


def build_seconds(figures: dict[str, Any]) -> float:
    """Seconds of building ``_cuda`` for one target: its slowest source, beside Triton."""
    return SLOWER * max(figures["nvcc sm_90a"].values(), default=0.0)


def _cpu_seconds(unit: Unit, stage: str, figures: dict[str, Any]) -> float:
    """Measured seconds; of a unit that was not timed the mean of its kind, or of all."""
    timed = figures["stages"]
    if unit.name in timed.get(stage, {}) or not _compiles(unit):
        return timed.get(stage, {}).get(unit.name, 0.0)
    every = [(other, each) for call in (1, 2) for other in stages(call) for each in other.units]
    seconds = [
        (each.function, timed[other.name][each.name])
        for other, each in every
        if each.name in timed.get(other.name, {})
    ]
    alike = [value for function, value in seconds if function == unit.function]
    some = alike or [value for _, value in seconds]
    return sum(some) / len(some) if some else 0.0


def show() -> int:
    """Print the plan of both calls; returns 0."""
    figures = json.loads(KEPT.read_text())
    about = ", ".join(f"{key} {figures[key]}" for key in ("triton", "processor", "date", "unit"))
    print(f"Measured: {about}.")
    print(f"Expected: compiling / {SPEED}, {CONTEXT} s per process, and what units wait for.\n")

    # A table per call, and how much of its budget is expected to be left.
    for call, minutes in BUDGET_MINUTES.items():
        rows = table(call)
        heads = list(rows[0])
        widths = {head: max(len(head), *(len(str(row[head])) for row in rows)) for head in heads}
        for row in [dict(zip(heads, heads, strict=True)), *rows]:
            print("  ".join(f"{row[head]!s:>{widths[head]}}" for head in heads))
        expected, limit = (sum(row[key] for row in rows) for key in ("expected s", "limit s"))
        most = limit + RESERVE
        print(f"call {call}: {expected:.0f} s expected, {most:.0f} at most of {60 * minutes:.0f}\n")
    build = figures["nvcc sm_90a"]
    slowest = max(build, key=build.get, default="-")
    print(
        f"_cuda for sm_90a, beside it: {build_seconds(figures):.0f} s, as long as {slowest} takes"
    )
    return 0


def _compiles(unit: Unit) -> bool:
    """Whether a unit has Triton compile what is not in its cache yet, and a CPU can ask for it."""
    elsewhere = {"cuda", "scaled_mm"} & set(map(str, unit.arguments))
    return unit.function.startswith("checks:") and unit.function != "checks:large" and not elsewhere


def _time_nvcc(path: Path) -> None:
    """User seconds of each CUDA source for sm_90a alone, with setup.py's flags, into a file.

    One after the other; what the file has already is not timed again.
    """
    seconds = json.loads(path.read_text()) if path.exists() else {}
    flags = [*FLAGS, *OF_A_LIBRARY, "-gencode=arch=compute_90a,code=sm_90a"]
    with tempfile.TemporaryDirectory() as folder:
        for source in (f"{name}.cu" for name in SOURCES):
            if source in seconds:
                continue

            # User time of the compiler, on which a busy machine has little influence.
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            command = [
                str(find_nvcc()),
                *flags,
                "-c",
                f"csrc/cuda/{source}",
                "-o",
                f"{folder}/object.o",
            ]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            seconds[source] = round(after - before, 1)
            path.write_text(json.dumps(seconds))


def main() -> int:
    """Measure, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", type=Path, required=True, metavar="FOLDER", help="where it goes on from"
    )
    parser.add_argument(
        "--keep", type=Path, help=f"write the figures there, e.g. {KEPT.relative_to(ROOT)}"
    )
    parser.add_argument("--stages", nargs="+", default=["build", "smoke", "graphs", "others"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=7200.0)
    args = parser.parse_args()
    measure(args.measure, args.stages, args.workers, args.seconds)
    if args.keep:
        args.keep.write_text(json.dumps(kept(args.measure), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
