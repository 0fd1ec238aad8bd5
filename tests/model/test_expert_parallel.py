"""Experts spread over processes, over gloo; what each checks is in ``experts_worker.py``."""

from __future__ import annotations

import json
from pathlib import Path

import children
import pytest
from training import environment

worker = pytest.importorskip("experts_worker", reason="transformers is not installed")


def run_checks(folder: Path, processes: int) -> dict[str, list[str | None]]:
    """Of each check, the error that it ended with on every process."""
    folder.mkdir()
    code = "import sys, experts_worker\nexperts_worker.main(sys.argv[1:])"
    run = children.processes(processes, code, [str(folder)], environment())
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    failed = any(error for result in results for error in result.values())
    complete = len(results) == processes and run.returncode == 0
    assert failed or complete, run.stdout + run.stderr
    return {name: [result.get(name, "not reached") for result in results] for name in results[0]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {count: run_checks(folder / str(count), count) for count in worker.CHECKS}


CASES = [(count, check.__name__) for count, checks in worker.CHECKS.items() for check in checks]


@pytest.mark.parametrize(("processes", "check"), CASES)
def test_experts_over_processes(results, processes, check):
    """Every check; its docstring says what it proves."""
    errors = results[processes].get(check, ["not reached: an earlier check failed"])
    assert not any(errors), "\n".join(
        f"process {rank}: {error}" for rank, error in enumerate(errors) if error
    )
