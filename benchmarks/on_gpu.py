"""One command for a bare GPU machine: is everything right there, how fast is it, and are the goals met.

python -m benchmarks.on_gpu --out FOLDER [--budget-minutes 9] [--stages ...] [--dry-run]

Each stage is a process of its own (``gpu_stages.py``): a fault of one kernel poisons a CUDA context for good, and a
hang can be ended. After every row on_gpu.json and on_gpu.md are written anew, so that whoever is killed loses nothing.
Needs torch, triton and rich alone. --dry-run does everything tiny on the CPU, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

STAGES = {
    "build": 90,
    "machine": 40,
    "correct": 170,
    "graphs": 60,
    "quantise": 100,
    "gemm": 60,
    "linear": 110,
    "tests": 240,
}
"""In this order, each with the most seconds it may take; the last ones get what is left."""

RESERVE = 8.0
"""Seconds kept back for ending a process and writing the report."""

ROOT = Path(__file__).parent.parent


class Report:
    """What is known so far, in on_gpu.json and on_gpu.md; one process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "on_gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.stages = json.loads(self.path.read_text())

    def begin(self, stage: str) -> None:
        """Forget what an earlier run of this stage found."""
        self.stages[stage] = {"state": "running", "rows": []}
        self.write()

    def add(self, stage: str, **row: Any) -> None:
        """One more row of a table, printed and kept at once."""
        self.stages[stage]["rows"].append(row)
        print(f"[{stage}] " + ", ".join(f"{key} {_cell(value)}" for key, value in row.items()), flush=True)
        self.write()

    def end(self, stage: str, state: str) -> None:
        """ "done", "out of time" or what went wrong."""
        self.stages[stage]["state"] = state
        self.write()

    def write(self) -> None:
        """Both files, each replaced in one step."""
        for path, text in ((self.path, json.dumps(self.stages, indent=1)), (self.folder / "on_gpu.md", self.text())):
            fresh = path.with_suffix(".part")
            fresh.write_text(text + "\n")
            fresh.replace(path)

    def text(self) -> str:
        """Goals first, then a table for each stage."""
        parts = ["# On a GPU", "", *_table(goals(self.stages))]
        for name, stage in self.stages.items():
            parts += ["", f"## {name}: {stage['state']}", "", *_tables(stage["rows"])]
        return "\n".join(parts)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    heads = list(rows[0])
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    return [f"| {line} |" for line in (*lines, *(" | ".join(_cell(v) for v in row.values()) for row in rows))]


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    """Rows with the same columns, one after the other, make one table."""
    lines: list[str] = []
    group: list[dict[str, Any]] = []
    for row in [*rows, {}]:
        if group and list(row) != list(group[0]):
            lines += [*_table(group), ""]
            group = []
        group.append(row)
    return lines[:-1]


def goals(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is wanted, what was measured, and whether that is enough; "not measured" where a row is missing."""

    def found(stage: str, column: str, **where: Any) -> float | None:
        for row in stages.get(stage, {}).get("rows", ()):
            if column in row and all(row.get(key) == value for key, value in where.items()):
                return row[column]
        return None

    checks = [row for name in ("correct", "graphs") for row in stages.get(name, {}).get("rows", ()) if "wrong" in row]
    wrong = float(sum(row["wrong"] for row in checks)) if checks else None
    wanted: list[tuple[str, float | None, str, float]] = [("checks that fail", wrong, "<=", 0.0)]
    wanted += [
        ("rtn, share of copy bandwidth", found("quantise", "rows / copy", quantiser="rtn"), ">=", 0.70),
        ("ms_eden(2), share of copy bandwidth", found("quantise", "rows / copy", quantiser="ms_eden(2)"), ">=", 0.45),
    ]
    for name in ("rtn", "ms_eden(2)"):
        gain = found("quantise", "one read over two", quantiser=name)
        wanted.append((f"{name}, both orientations: one read over two", gain, ">=", 1.4))
    for recipe in ("nvidia", "quartet2"):
        for size, most in ((8192, 1.25), (4096, 1.5)):
            ratio = found("linear", "x bf16", recipe=recipe, size=size)
            wanted.append((f"{recipe}, forward and backward at {size}, times BF16's", ratio, "<=", most))
        saved = found("linear", "saved x bf16", recipe=recipe)
        wanted.append((f"{recipe}, bytes saved for backward, of BF16's", saved, "<=", 0.30))
    rows = []
    for what, value, relation, limit in wanted:
        met = None if value is None else value >= limit if relation == ">=" else value <= limit
        said = {None: "not measured", True: "yes", False: "NO"}[met]
        rows.append({"goal": f"{what} {relation} {limit:g}", "measured": value, "met": said})
    return rows


def run_stage(report: Report, stage: str, seconds: float, dry: bool) -> None:
    """A stage in a fresh process, ended when its time is over; its rows are in the report by then."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--only", stage, "--out", str(report.folder)]
    command += ["--seconds", f"{seconds:.0f}", *(["--dry-run"] if dry else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds + RESERVE / 2)
        state = "" if code == 0 else f"its process ended with {code}"
    except subprocess.TimeoutExpired:
        state = "out of time, and ended"
    if state:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers it started
        process.wait()
    report.stages = Report(report.folder).stages
    if state or report.stages[stage]["state"] == "running":
        report.end(stage, state or "stopped without a word")


def build(report: Report, seconds: float) -> None:
    """The native extension in place, without a network; without it everything still runs."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    asked = [sys.executable, "-c", "import nvfp4._cpu"]
    there = subprocess.run(asked, cwd=ROOT, capture_output=True).returncode == 0
    report.add("build", native=there, remark=re.sub(r"\s+", " ", "; ".join(said)) or "-")


def child(report: Report, stage: str, seconds: float, dry: bool) -> None:
    """Run one stage here and say how it ended."""
    from benchmarks import gpu_stages

    run: Callable[[Any], None] = getattr(gpu_stages, stage)
    try:
        run(gpu_stages.Job(report, stage, seconds, dry, time.monotonic()))
    except gpu_stages.OutOfTime:
        report.end(stage, "out of time")
    except Exception as error:
        report.end(stage, f"{type(error).__name__}: {error}"[:2000])
        raise
    else:
        report.end(stage, "done")


def main() -> int:
    """All stages within the budget; 1 if a check failed or a stage did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), help="folder for on_gpu.json and on_gpu.md")
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="tiny and on the CPU: does the script itself work?")
    parser.add_argument("--only", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    report = Report(args.out.resolve())
    if args.only:
        child(report, args.only, args.seconds, args.dry_run)
        return 0
    end = time.monotonic() + 60 * args.budget_minutes - RESERVE
    for stage in [stage for stage in STAGES if stage in args.stages]:
        left = end - time.monotonic()
        left = left if args.dry_run else min(STAGES[stage], left)
        report.begin(stage)
        if left < 10:
            report.end(stage, "no time left")
        elif stage == "build":
            if not args.dry_run:
                build(report, left)
            report.end(stage, "done")
        else:
            run_stage(report, stage, left, args.dry_run)
    print(report.text())
    failed = any(row["wrong"] for stage in report.stages.values() for row in stage["rows"] if "wrong" in row)
    ended = all(stage["state"] in ("done", "out of time") for stage in report.stages.values())
    return int(failed or not ended)


if __name__ == "__main__":
    sys.exit(main())
