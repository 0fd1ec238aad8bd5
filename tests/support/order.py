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
    "test_on_gpu.py": 75,
    "test_clients.py": 60,
    "test_distributed.py": 60,
    "test_triton_jit.py": 60,
    "test_triton_aot.py": 50,
    "test_train_endings.py": 45,
    "test_rl_loop.py": 40,
    "test_cuda.py": 35,
    "test_distributed_runs.py": 35,
    "test_rl_config.py": 30,
    "test_cuda_compile.py": 25,
    "test_packaging.py": 22,
    "test_examples.py": 21,
    "test_train_compare.py": 20,
    "test_train_model.py": 20,
    "test_cli.py": 17,
    "test_docs.py": 10,
}
"""Of files with a test that takes more than 5 s of a core, or with such a fixture: what all of
their tests take, on a Cascade Lake held to AVX2. A guess does; it is about who begins early."""


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
