"""Which worker runs which tests, and when: the longest first.

pytest-xdist hands each worker one stretch of the collected tests, and who has done his own takes
half of what another has left, from its end. So the collected order is made to suit that:

    stretch of worker 0                      stretch of worker 1                      ...
    files with long tests, longest first | the rest ...  || files with long tests | the rest ...

A long test begins while there is work for all, and what is taken over at the end is short. Tests of
a file stay together: fixtures of a module and what a process has compiled are made once.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar

SECONDS = {
    "test_triton.py": 150,
    "test_triton_jit.py": 90,
    "test_distributed.py": 68,
    "test_on_gpu.py": 60,
    "test_triton_aot.py": 51,
    "test_rl_loop.py": 51,
    "test_rl_config.py": 45,
    "test_oracle.py": 40,
    "test_cuda.py": 31,
    "test_triton_fused.py": 31,
    "test_train_endings.py": 23,
    "test_cuda_compile.py": 22,
    "test_examples.py": 21,
    "test_train_compare.py": 21,
    "test_clients.py": 20,
    "test_cli.py": 17,
    "test_contract.py": 16,
    "test_fused.py": 16,
    "test_packaging.py": 14,
    "test_bench.py": 13,
    "test_rl_endings.py": 12,
    "test_train_model.py": 12,
    "test_rl_learning.py": 11,
    "test_train_resume.py": 11,
    "test_docs.py": 10,
    "test_triton_launch.py": 10,
    "test_distributed_runs.py": 7,
    "test_train_loop.py": 7,
}
"""Of files with tests of several seconds, or whose tests share what takes them: what all of their
tests take of a core, on a busy Cascade Lake held to AVX2. A guess does; it is about who begins
early."""


class HasPath(Protocol):
    """As much of ``pytest.Item`` as is looked at."""

    path: Path


Item = TypeVar("Item", bound=HasPath)


def stretches(items: list[Item], workers: int) -> list[list[Item]]:
    """One stretch per worker, equally long but for one test: the files of ``SECONDS`` dealt among
    them so that each has about as many seconds, then the rest in the order of collection."""
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    longest = sorted(
        (file for file in files if file[0].path.name in SECONDS),
        key=lambda file: -SECONDS[file[0].path.name],
    )
    dealt: list[list[Item]] = [[] for _ in range(workers)]
    seconds = [0.0] * workers
    for file in longest:
        least = seconds.index(min(seconds))
        dealt[least] += file
        seconds[least] += SECONDS[file[0].path.name]

    rest = [item for file in files if file[0].path.name not in SECONDS for item in file]
    for number, stretch in enumerate(dealt):
        # xdist divides what is left by the workers that are left
        missing = (len(rest) + sum(map(len, dealt[number:]))) // (workers - number) - len(stretch)
        stretch += rest[: max(0, missing)]
        del rest[: max(0, missing)]
    return dealt
