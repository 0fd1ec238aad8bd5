"""A GPU lent for fifteen minutes, in two calls: is it right, how fast is it, are the goals met.

    python -m benchmarks.on_gpu --call 1 --out FOLDER
        5 minutes: build, smoke, rates, layers, graphs, 2^31 elements
    python -m benchmarks.on_gpu --call 2 --out FOLDER
        6 minutes: tests, compute-sanitizer, ncu, the other dtypes
    python -m benchmarks.on_gpu --plan
        what each stage is expected to take, and from what
    python -m benchmarks.on_gpu --call 1 --rehearse 0.1
        all of it on a CPU at a tenth of the sizes; ``make rehearsal`` does so with faults injected

On a machine with fifteen minutes: give each call a command of its own with a limit a minute above
its budget, one right after the other, so that the extension, Triton's cache and the machine's start
are paid for once; mend between them only what a minute mends. A bare machine needs torch, triton,
numpy, rich, setuptools, pybind11 and nvcc (pytest, hypothesis, xdist and pytest-timeout for the
tests); no package index, no pydantic. FOLDER then holds four files per call:

    call1.jsonl             each row as it came: what a killed call leaves
    call1.log               what compilers, tests and tools said
    call1.md, call1.json    the report: goals first; wrong, skipped and not reached by name; tables

Keep both .json under benchmarks/results/, which name card, clocks, versions and commit. The last
lines printed are the head of the report; the code is 0 if nothing was wrong, 1 if something was,
130 if it was interrupted.

Each unit of work is a process of its own (``gpu/processes.py``): a fault, a death or a hang costs
one row.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP: children are ended, the report is written."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


def run_call(settings: Any, minutes: float, commit: str | None = None, quiet: bool = False) -> int:
    """One call within its budget: all stages, then the report, whatever happens in between.

    commit: of what is measured, by default that of this checkout. Returns 0 if nothing was wrong, 1
    if something was, 130 if it was interrupted.
    """
    from benchmarks.gpu import report
    from benchmarks.gpu.calls import BACKGROUND, BUDGET_MINUTES, RESERVE, stages
    from benchmarks.gpu.processes import Runner
    from benchmarks.gpu.rows import append
    from nvfp4.bench.timing import commit as commit_here

    # what the call is about, and all that it plans to do, before any of it
    commit = commit or commit_here() or "unknown"
    began = time.monotonic()
    folder = Path(settings.folder)
    path = folder / f"call{settings.call}.jsonl"
    plan = [
        stage._replace(units=tuple(unit for unit in stage.units if settings.takes(unit)))
        for stage in stages(settings.call)
    ]
    facts = {"kind": "call", "state": "began", "call": settings.call}
    facts |= {"place": settings.kind, "scale": settings.scale, "budget_minutes": minutes}
    append(path, **facts, commit=commit, began=time.strftime("%Y-%m-%d %H:%M:%S"))

    # The plan is written first: what a killed call did not reach can then be named.
    for stage in plan:
        append(path, kind="plan", stage=stage.name, units=[unit.name for unit in stage.units])
    runner = Runner(path, folder / f"call{settings.call}.log", settings, quiet)

    # each stage ends at its place in the budget at the latest: what one leaves, the next ones have
    stretch = minutes / BUDGET_MINUTES[settings.call]
    ends, at = [], began
    for stage in plan:
        at += stage.limit * stretch
        ends.append(at)
    assert at + RESERVE * stretch <= began + 60 * minutes + 1e-6, "the limits exceed the budget"

    ending, code = "done", 0
    handlers = {
        s: signal.signal(s, _interrupt) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        runner.begin_background(BACKGROUND)
        for stage, end in zip(plan, ends, strict=True):
            runner.run_stage(stage, end)
        runner.finish_background(ends[-1])
    except Interrupted as signal_name:
        ending, code = f"interrupted by {signal_name}", 130
    finally:
        # a second Ctrl-C may not cost the report
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        runner.end_all("the call was over" if code == 0 else ending)
        append(path, kind="call", ended=ending, seconds=round(time.monotonic() - began, 1))
        head = report.write(folder, settings.call)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(head, flush=True)
    return code or int(report.read(folder)[settings.call].wrong > 0)


def main(arguments: list[str] | None = None) -> int:
    """One call, or the plan."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--call", type=int, choices=(1, 2), help="which of the two calls")
    parser.add_argument(
        "--out", type=Path, default=Path("build/on_gpu"), help="folder for rows, report and log"
    )
    parser.add_argument(
        "--budget-minutes", type=float, help="of this call; limits of stages shrink or grow with it"
    )
    parser.add_argument(
        "--rehearse", type=float, metavar="SCALE", help="on the CPU, at this part of all sizes"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument(
        "--plan", action="store_true", help="print what each stage is expected to take"
    )
    args = parser.parse_args(arguments)

    # What needs no GPU, and what makes no sense.
    if args.plan:
        from benchmarks.gpu.plan import show

        return show()
    if args.call is None:
        parser.error("which call? --call 1 or --call 2, or --plan")
    if args.rehearse is not None and not 0 < args.rehearse <= 1:
        parser.error(
            f"--rehearse takes a part of the sizes, above 0 and up to 1, got {args.rehearse}"
        )

    from benchmarks.gpu.calls import BUDGET_MINUTES
    from benchmarks.gpu.settings import Settings

    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    minutes = BUDGET_MINUTES[args.call] if args.budget_minutes is None else args.budget_minutes
    if minutes <= 0:
        parser.error(f"--budget-minutes must be positive, got {minutes}")

    # Sizes, place and build are all that a rehearsal changes.
    settings = Settings(call=args.call, folder=str(folder))
    if args.rehearse is not None:
        settings.kind, settings.scale, settings.build = "rehearsal", args.rehearse, False
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    return run_call(settings, minutes, args.commit)


if __name__ == "__main__":
    sys.exit(main())
