"""Tests of Triton kernels where there is no GPU: each of them runs in a process in which Triton
interprets.

Triton decides when a kernel is defined whether it will be compiled or interpreted, and other tests
need the compiler, so one process cannot do both. A test under ``interpreted`` is therefore an item
like any other, which pytest-xdist gives to whichever worker is free; only its body runs elsewhere:

    pytest (or one of its workers)                    python -m pytest -p interpreting FILES,
    TRITON_INTERPRET=1 the body of an item would be called       ->      its name on standard input
                                                      the item of that name is set up, called, torn
                                                      down
    passed, skipped or failed, with the text  <-      what came of all three, pickled, on standard
    output

Each worker starts one such process, at its first test of the kind, and keeps it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/backends/test_triton.py",
    "tests/backends/test_triton_fused.py",
    "tests/backends/test_held_amax.py",
    "tests/backends/test_triton_swizzled.py",
)
interpreted = pytest.mark.interpreted


def is_elsewhere(item: pytest.Item) -> bool:
    """Whether the body of this test runs in another process: it needs kernels and finds neither GPU
    nor interpreter."""
    needs_kernels = item.get_closest_marker("interpreted") is not None
    return (
        needs_kernels
        and os.environ.get("TRITON_INTERPRET") != "1"
        and not torch.cuda.is_available()
    )


class Process:
    """The interpreting process, as the tests' own process sees it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object lives

    def start(self) -> subprocess.Popen[bytes]:
        """A pytest that has collected FILES and waits for names."""
        command = [sys.executable, "-m", "pytest", "-p", "interpreting", *FILES]
        command += [
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-W",
            "ignore",
            "-m",
            "",
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        pipe = subprocess.PIPE
        self.said.truncate(0)
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.said, env=environment, cwd=ROOT
        )

    def run(self, name: str) -> None:
        """The test of this name, over there: returns, skips or fails as it did."""
        if self.child is None:
            self.child = self.start()
        assert self.child.stdin
        assert self.child.stdout
        try:
            self.child.stdin.write(name.encode() + b"\n")
            self.child.stdin.flush()
            reports = pickle.load(self.child.stdout)
        except (EOFError, BrokenPipeError):
            status = self.child.wait()
            self.child = None
            self.said.seek(0)
            said = self.said.read()[-5000:].decode(errors="replace")
            pytest.fail(
                f"the interpreting process ended with {status} and said:\n{said}", pytrace=False
            )
        # a time-out or Ctrl-C: what it would answer later belongs to no question
        except BaseException:
            self.close()
            raise
        for report in reports:
            if report["outcome"] == "failed":
                pytest.fail(report["text"], pytrace=False)
            if report["outcome"] == "skipped":
                pytest.skip(report["text"])

    def close(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


PROCESS = Process()


def plain(report: pytest.TestReport) -> dict[str, str]:
    """What the other side needs of a report."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    printed = "".join(f"\n--- {title} ---\n{content}" for title, content in report.sections)
    return {"outcome": report.outcome, "text": text.removeprefix("Skipped: ") + printed}


# From here on: the plug-in of the process that interprets, which is loaded there alone, with -p
# interpreting.
REQUESTS: Any = None
ANSWERS: Any = None
REPORTS: list[dict[str, str]] = []


def pytest_load_initial_conftests() -> None:
    """Where names come from and answers go, before anything is printed; -s keeps pytest from taking
    either."""
    global REQUESTS, ANSWERS
    REQUESTS, ANSWERS = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Kept until the test is torn down."""
    REPORTS.append(plain(report))


def pytest_runtestloop(session: pytest.Session) -> bool:
    """In the place of running everything: one test for each line, until standard input ends."""
    items = {item.nodeid: item for item in session.items}
    for line in REQUESTS:
        item = items.get(line.rstrip("\n"))
        if item is None:
            text = f"not collected there: {line}; see FILES in tests/support/interpreting.py"
            REPORTS.append({"outcome": "failed", "text": text})
        else:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        pickle.dump(REPORTS, ANSWERS)
        ANSWERS.flush()
        REPORTS.clear()
    return True
