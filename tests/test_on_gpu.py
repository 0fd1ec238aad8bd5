"""benchmarks/on_gpu.py, of which no session with a GPU may find out that it has a typing error: it runs on a CPU, tiny,
and judges and keeps what it is given."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.on_gpu import Report, goals  # noqa: E402


@pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7),
    reason="the interpreter of Triton 3.6 does not run on today's numpy",
)
def test_dry_run(tmp_path: Path) -> None:
    """Every backend right on tiny cases, in stages that are processes of their own, and both files written."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--dry-run", "--out", str(tmp_path), "--budget-minutes", "9"]
    command += ["--stages", "correct", "gemm"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-5000:]
    stages = json.loads((tmp_path / "on_gpu.json").read_text())
    assert {name: stage["state"] for name, stage in stages.items()} == {"correct": "done", "gemm": "done"}
    rows = stages["correct"]["rows"]
    assert {row["backend"] for row in rows} >= {"triton"}
    assert all(row["wrong"] == 0 for row in rows)
    assert sum(row["checked"] for row in rows) > 60
    assert "| checks that fail <= 0 | 0 | yes |" in (tmp_path / "on_gpu.md").read_text()


def test_goals_are_judged(tmp_path: Path) -> None:
    """Enough, not enough, and not measured; what was written is read again, as after a kill."""
    report = Report(tmp_path)
    report.begin("quantise")
    report.add("quantise", quantiser="rtn", **{"rows / copy": 0.71, "one read over two": 1.39})
    report.begin("linear")
    for size, ratio in ((8192, 1.25), (4096, 1.6)):
        report.add("linear", size=size, recipe="nvidia", **{"x bf16": ratio, "saved x bf16": 0.2814})
    report.begin("correct")
    report.add("correct", check="gemm", backend="triton", checked=3, wrong=2, first="a | b")
    again = Report(tmp_path)
    met = {row["goal"]: row["met"] for row in goals(again.stages)}
    assert met["checks that fail <= 0"] == "NO"
    assert met["rtn, share of copy bandwidth >= 0.7"] == "yes"
    assert met["rtn, both orientations: one read over two >= 1.4"] == "NO"
    assert met["ms_eden(2), share of copy bandwidth >= 0.45"] == "not measured"
    assert met["nvidia, forward and backward at 8192, times BF16's <= 1.25"] == "yes"
    assert met["nvidia, forward and backward at 4096, times BF16's <= 1.5"] == "NO"
    assert met["nvidia, bytes saved for backward, of BF16's <= 0.3"] == "yes"
    assert again.stages["correct"]["state"] == "running"
    assert re.search(r"gemm \\| triton \\| 3 \\| 2 \\| a \\\\\\| b \\|", (tmp_path / "on_gpu.md").read_text())


def test_a_stage_that_hangs_or_dies_is_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reported before stays."""
    from benchmarks import on_gpu

    report = Report(tmp_path)
    for name, code, state in (
        ("gemm", "import time; time.sleep(60)", "out of time, and ended"),
        ("linear", "import os; os.abort()", "its process ended with -6"),
    ):
        report.begin(name)
        report.add(name, ms=1.5)
        command, start = [sys.executable, "-c", code], subprocess.Popen
        monkeypatch.setattr(on_gpu.subprocess, "Popen", lambda _, c=command, s=start, **more: s(c, **more))
        on_gpu.run_stage(report, name, -3.0 if name == "gemm" else 20.0, dry=True)
        monkeypatch.undo()
        assert report.stages[name] == {"state": state, "rows": [{"ms": 1.5}]}
