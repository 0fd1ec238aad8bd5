"""One way to time and to report: gate on correctness, interleave, take medians, keep the result as data."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, threads, versions and the commit (with + if files were changed)."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit + ("+" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor()


def interleaved(candidates: dict[str, Callable[[], Any]], seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Median milliseconds of each candidate, all taking turns for ``seconds`` per candidate or ``least`` rounds.

    A shared machine drifts; turns let the drift fall on all of them alike, so ratios hold where single times do not.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def copier(nbytes: int) -> Callable[[], Any]:
    """A copy that reads and writes ``nbytes`` in total: the lower bound of anything that must move as much."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def gate(ok: bool, what: str) -> None:
    """Stop before any figure is printed if the thing to be timed gives wrong answers."""
    if not ok:
        sys.exit(f"not timed, because it is wrong: {what}")


def show(title: str, rows: list[dict[str, Any]], name: str | None = None) -> None:
    """Print rows as a table under the machine line; with ``name`` also keep them as results/<name>.json."""
    facts = machine()
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim", highlight=False)
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if name:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"title": title, "machine": facts, "rows": rows}, indent=1) + "\n")
        console.print(f"kept as {path.name} under benchmarks/results/", style="dim")
