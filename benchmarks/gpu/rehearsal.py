"""Both calls on a CPU, through every branch, with faults: python -m benchmarks.gpu.rehearsal

    1  stand-ins of compute-sanitizer and ncu are written to a folder that comes first on PATH
    2  call 1 and call 2 run at a tenth of the sizes, each fault of ``FAULTS`` in its unit
    3  the reports are judged: each fault is one row that says what happened, nothing else is wrong,
       and what the units computed would have fitted into the call's budget on ``CORES`` idle cores
    4  call 1 runs once more with seconds as its budget: what it did not reach must be named

Code 0 if all of that holds. Limits by the clock are ``PATIENCE`` times those of a GPU: whoever
rehearses may have other things to do, and no neighbour makes a right script wrong. A limit by the
clock alone says nothing: the first call took 100 s at rest and ran out of its 300 beside 18 other
processes. ``--short`` takes one unit of each kind and a hundredth of the sizes: a test runs that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.calls import stages
from benchmarks.gpu.rows import CallRecord
from benchmarks.gpu.settings import PATIENCE, Settings
from benchmarks.on_gpu import ROOT, run_call

FAULTS: dict[int, dict[str, tuple[str, str]]] = {
    1: {
        "cuda quantise sr 256x512 bf16": ("wrong bits", "rows normal"),
        "triton quantise rtn 256x512 bf16": ("raise", "illegal memory access"),
        "triton quantise sr 17x33 bf16": ("segfault", "SIGSEGV"),
        "explain transpose": ("killed", "SIGKILL"),
        "triton both rtn": ("hang", "longer than"),
        "linear 4096 nvidia": ("silent", "without a word"),
        "cuda graph of rtn": ("wrong bits", "wide"),
        "triton 2^31 rows": ("raise", "illegal memory access"),
    },
    2: {
        "pytest": ("", "planted"),
        "racecheck cuda": ("errors", "hazard"),
        "memcheck triton": ("hang", "longer than"),
        "ncu cuda both": ("missing tool", "ncu is missing"),
        "ncu triton rtn": ("killed", "SIGKILL"),
        "triton product 1x1x1": ("wrong bits", "bf16"),
        "triton quantise rtn 17x33 f32": ("segfault", "SIGSEGV"),
        "triton layer rl f32": ("silent", "without a word"),
    },
}
"""By call and unit: the fault, and what the report must say of it.

In ``pytest`` a planted test fails.
"""

BESIDE = {
    1: (
        "card and clocks",
        "cuda quantise ms_eden(2, search) 17x33 bf16",
        "matmul_decoded",
        "GEMM tile 4",
        "explain quantize rtn",
        "cuda layer quartet2 bf16",
        "cuda both ms_eden(1)",
        "GEMM 4096",
        "cuda decode",
        "triton requantise ms_eden(1)",
        "linear 4096 search_eden",
        "memory bf16",
        "triton graph of layer quartet2",
        "triton two streams quartet2",
        "cuda waits for nothing nvidia",
        "triton compiles once",
        "scaled_mm 2^31 product",
        "cuda 2^31 columns",
    ),
    2: ("card and clocks", "ncu triton amax", "scaled_mm product 257x130x96", "cuda misaligned sr"),
}
"""What the short rehearsal runs beside the units with faults."""

SANITIZER = """#!/bin/sh
tool=$2
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@" || exit 1
errors=${STAND_IN_ERRORS:-0}
if [ "$tool" = racecheck ]; then
  [ "$errors" = 0 ] || echo "========= Error: Race reported, a planted hazard"
  echo "========= RACECHECK SUMMARY: $errors hazards displayed ($errors errors, 0 warnings)"
else
  echo "========= ERROR SUMMARY: $errors errors"
fi
"""

NCU = """#!/bin/sh
while [ "$1" != "--log-file" ]; do shift; done
log=$2
shift 2
"$@" || exit 1
cat >"$log" <<'END'
==PROF== Connected to process 1 (stand-in)
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"
"0","stand_in_kernel(int, float)","12.5","40"
END
"""

PLANTED = """
import pytest

def test_planted_good():
    pass

def test_planted_bad():
    assert 1 == 2, "planted"

@pytest.mark.skip(reason="planted, too")
def test_planted_skip():
    pass
"""

SMALL_BUDGET_MINUTES = 0.02

CORES = 2
"""For which the budget of a rehearsal is meant."""

START = 0.4
"""Seconds of a core for the process of a unit, measured, beside what the unit itself counts."""


def prepare(folder: Path) -> None:
    """Stand-ins of programs first on PATH, and a file of tests of which one fails."""
    tools = folder / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        path = tools / name
        path.write_text(text)
        path.chmod(0o755)
    (tools / "test_planted.py").write_text(PLANTED)
    os.environ["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", "")])


def settings_of(call: int, folder: Path, scale: float, short: bool) -> Settings:
    """A rehearsal with the faults of ``FAULTS``."""
    settings = Settings(call=call, folder=str(folder), kind="rehearsal", scale=scale, build=False)
    settings.faults = {unit: fault for unit, (fault, _) in FAULTS[call].items()}
    planted = str(folder.parent / "tools" / "test_planted.py")
    quick = ("tests/backends/test_vectors.py", "tests/numerics/test_formats.py")
    settings.tests = (planted,) if short else (*quick, planted)
    if short:
        settings.only = (*FAULTS[call], *BESIDE[call])
    return settings


def judged(call: int, record: CallRecord, settings: Settings) -> list[str]:
    """What is not as it should be.

    A fault that is not one row, something else that is wrong, a unit that is lost.
    """
    bad = []

    # Everything that the report blames, with the unit that it blames.
    counts = dict.fromkeys(FAULTS[call], 0)
    for name, stage in record.stages.items():
        blamed = [(unit, end["reason"]) for unit, end in stage.with_state("failed").items()]
        blamed += [
            (unit, end["reason"])
            for unit, end in stage.with_state("skipped").items()
            if "ncu" in end["reason"]
        ]
        blamed += [(str(row.get("unit")), str(row)) for row in stage.rows if row.get("wrong")]
        for unit, said in blamed:
            if unit not in counts:
                bad.append(f"{name}: {unit} was to be right: {said}")
                continue
            counts[unit] += 1
            if FAULTS[call][unit][1] not in said:
                bad.append(f"{name}: {unit} was to say {FAULTS[call][unit][1]!r}: {said}")
        if stage.not_reached:
            bad.append(f"{name}: not reached: {', '.join(stage.not_reached)}")

    # A fault that is in no row was lost, and one in two rows has spoilt another unit.
    bad += [
        f"{unit}: {count} rows, one was injected" for unit, count in counts.items() if count != 1
    ]

    planned = {unit.name for stage in stages(call) for unit in stage.units if settings.takes(unit)}
    ended = {unit for stage in record.stages.values() for unit in stage.units}
    bad += [f"{unit} is not in the report" for unit in sorted(planned - ended)]
    return bad


def processor_seconds(call: int, record: CallRecord) -> float:
    """What a call would have taken on ``CORES`` cores with nothing else to do.

    The user time of all units, in stages of several workers shared among the cores.
    """
    total = 0.0
    for stage in stages(call):
        done = record.stages[stage.name]
        cores = min(stage.workers, CORES)
        total += (done.cpu_seconds + START * len(done.units)) / cores
    return total


def main(arguments: list[str] | None = None) -> int:
    """Rehearse and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "rehearsal")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--short", action="store_true", help="one unit of each kind, tiny")
    budget = "of call 1 and of call 2, on two idle cores"
    parser.add_argument("--budget-minutes", type=float, nargs=2, default=(5.0, 6.0), help=budget)
    args = parser.parse_args(arguments)
    scale = 0.01 if args.short else args.scale
    out = args.out.resolve()
    prepare(out)
    bad = []

    # Steps 2 and 3.
    for call in (1, 2):
        folder = out / f"call{call}"
        folder.mkdir(exist_ok=True)
        settings = settings_of(call, folder, scale, args.short)
        budget = 60 * args.budget_minutes[call - 1]
        began = time.monotonic()
        code = run_call(settings, PATIENCE * budget / 60, quiet=True)
        clock = time.monotonic() - began

        record = report.read(folder)[call]
        spent = processor_seconds(call, record)
        line = (
            f"call {call}: {spent:.0f} s of {CORES} cores, of {budget:.0f}; by the clock "
            f"{clock:.0f}"
        )
        print(f"\n{line}\n", flush=True)
        bad += judged(call, record, settings)
        bad += [f"call {call} ended with code {code}, not 1"] if code != 1 else []
        bad += [f"over its budget: {line}"] if spent > budget else []

    # Step 4: a budget that cannot suffice.
    folder = out / "hurried"
    folder.mkdir(exist_ok=True)
    settings = settings_of(1, folder, scale, args.short)
    run_call(settings, SMALL_BUDGET_MINUTES, quiet=True)
    hurried = report.read(folder)[1].stages.values()
    missed = {name for stage in hurried for name in stage.not_reached}
    if not missed:
        bad.append(f"hurried: all was reached in {60 * SMALL_BUDGET_MINUTES:g} s")

    # A unit that was under way when the time was up has its row, which is as good.
    accounted = missed | {name for stage in hurried for name in stage.units}
    planned = {unit.name for stage in stages(1) for unit in stage.units if settings.takes(unit)}
    if not planned <= accounted:
        bad.append(f"hurried: neither reached nor named: {sorted(planned - accounted)}")

    print(
        "\n".join(
            ["", "The rehearsal went well." if not bad else "The rehearsal did not go well:", *bad]
        )
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
