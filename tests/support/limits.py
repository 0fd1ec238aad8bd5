"""How long a test waits: no assertion, only the end of what hangs.

Whoever runs the tests may have a slow machine, a loaded one, or one that sleeps for a minute. So a
limit is many times
what anything takes, and what is waited for is an event: a row in a log, the end of a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

HANG = 1500.0
"""Seconds; the slowest test takes less than 60 on two cores. Below pytest's own limit, so that a
child is ended."""


def until(happened: Callable[[], bool], process: Any) -> bool:
    """Wait for something that this process does, which can be polled; False if it ended or hung
    without it."""
    end = time.monotonic() + HANG
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            return happened()
        time.sleep(0.02)
    return True
