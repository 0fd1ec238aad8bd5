"""A pytest plugin for ``on_gpu``: which tests run on a GPU, and a row per failure, as it comes.

    chosen    tests marked ``cuda``, and in the files of ``tools.TRITON_TESTS`` all that neither
              interpret nor look at compiled code
    left out  in other files, Triton where a test runs on every backend: it would compile for
              minutes what those files hold it to

With ON_GPU_EVERYTHING set (rehearsals) nothing is left out. Only the process that reports writes:
under xdist the one that started the others.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.rows import append
from benchmarks.gpu.tools import TRITON_TESTS

STAGE = "tests"
ELSEWHERE = ("interpreter", "compiled_code")
"""In the names of tests that need no GPU, and minutes."""

SECONDS = 5.0
"""So often counts are written: a stage that is cut off keeps all but the last of them."""

reported: set[str] = set()
counts: Counter[str] = Counter()
reasons: Counter[str] = Counter()
started = written = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not run on a GPU."""
    if os.environ.get("ON_GPU_EVERYTHING"):
        return
    kept = [item for item in items if _on_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _on_gpu(item)])
    items[:] = kept


def _on_gpu(item: pytest.Item) -> bool:
    named = Path(item.path).name in TRITON_TESTS
    if item.get_closest_marker("cuda") is not None:
        generated = getattr(item, "callspec", None)
        return named or generated is None or generated.params.get("backend") != "triton"
    return named and not any(word in item.name for word in ELSEWHERE)


def _write(**row: Any) -> None:
    target = os.environ.get("ON_GPU_ROWS")
    if target and "PYTEST_XDIST_WORKER" not in os.environ:
        append(Path(target), kind="row", stage=STAGE, unit="pytest", **row)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count each test once; a failure is a row."""
    if report.failed:
        counts["failed"] += 1
        _write(test=report.nodeid, wrong=1, first=_last_words(report))
    elif report.skipped:
        counts["skipped"] += 1
        reasons[_reason(report)] += 1
    elif report.when == "call":
        counts["passed"] += 1
    if time.monotonic() - written >= SECONDS:
        _write_counts()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a row too: one, however many processes tried."""
    if report.nodeid in reported:
        return
    if report.failed or report.skipped:
        reported.add(report.nodeid)
    if report.failed:
        _write(test=report.nodeid, wrong=1, first=_last_words(report))
    elif report.skipped:
        reasons[_reason(report)] += 1


def pytest_sessionfinish() -> None:
    """The last counts, and why what was skipped was."""
    _write_counts()
    for reason, count in reasons.most_common(40):
        _write(skipped=count, because=reason)


def _write_counts() -> None:
    """How many of each since the last time."""
    global written
    written = time.monotonic()
    numbers = {name: counts[name] for name in ("passed", "failed", "skipped")}
    _write(checked=sum(counts.values()), **numbers, seconds=round(written - started, 1))
    counts.clear()


def _last_words(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = [line for line in str(report.longreprtext).splitlines() if line.startswith("E ")]
    return " ".join(lines[:3])[:300] or str(report.longreprtext)[-300:]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    where = report.longrepr
    return str(where[2] if isinstance(where, tuple) else where)[:160]
