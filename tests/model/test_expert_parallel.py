"""Experts spread over processes, over gloo; what each checks is in ``experts_worker.py``."""

from __future__ import annotations

import pytest
from training import run_checks

worker = pytest.importorskip("experts_worker", reason="transformers is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {
        count: run_checks("experts_worker", folder / str(count), count) for count in worker.CHECKS
    }


CASES = [(count, check.__name__) for count, checks in worker.CHECKS.items() for check in checks]


@pytest.mark.parametrize(("processes", "check"), CASES)
def test_experts_over_processes(results, processes, check):
    """Every check; its docstring says what it proves."""
    errors = results[processes].get(check, ["not reached: an earlier check failed"])
    assert not any(errors), "\n".join(
        f"process {rank}: {error}" for rank, error in enumerate(errors) if error
    )
