"""What a person sees of a run: a line now and then, and on a terminal a bar below them.

    step 120/300  loss 2.4132  lr 3.9e-03  norm 0.82  12.3k tok/s  0.61 GiB  eta 0:42

Each trainer says in ``Reporter.figures`` what stands in its line. Lines go to the output as plain
text where that is no terminal. A reader who leaves (``| head``, a terminal that closes) ends the
lines, not the run: log.jsonl has every step anyway.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nvfp4.run.log import Row


class LastingConsole(Console):
    """A console whose reader may leave (``| head``, a closed terminal) without ending the run."""

    def on_broken_pipe(self) -> None:
        """rich would end the process here, without a checkpoint."""
        self._fall_silent()

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; a terminal that has hung up counts as a broken pipe."""
        try:
            super().print(*objects, **options)
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        self.quiet = True
        # else Python complains when it flushes at its end
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def bar(console: Console, last: str, **options: Any) -> Progress:
    """A bar per task: name, bar, how many of how many, and ``last`` of the task's fields."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(last),
    )
    return Progress(*columns, console=console, **options)


class Reporter:
    """Prints lines: without bar and colour where the output is no terminal.

    every: steps between lines. enabled: False for the other processes of a run, which print
    nothing. A trainer says in ``figures`` what it shows of a row, in ``seconds`` which figure is
    the time of a step, and in ``evaluated`` which one makes a row worth a line.
    """

    seconds: ClassVar[str] = "seconds"
    evaluated: ClassVar[str] = "val_bpb"

    def __init__(self, name: str, steps: int, every: int, enabled: bool = True) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.console = LastingConsole(
            quiet=not enabled, soft_wrap=True, highlight=False, markup=False
        )
        self._recent: list[float] = []
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = bar(self.console, "eta {task.fields[eta]}", transient=True)
            self._task = self._bar.add_task(name, total=steps, eta="?")

    def start(self, step: int) -> None:
        """Begin at a step (above 0 when resumed)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text)

    def step(self, row: Row) -> None:
        """Take note of a step; print it if first, last, ``every``-th, skipped or evaluated."""
        step = row["step"]

        # The last 50 steps tell how long the rest takes; the first ones, which warm up, drop out.
        self._recent = [*self._recent[-49:], row[self.seconds]]
        eta = duration(sum(self._recent) / len(self._recent) * (self.steps - step))

        # The bar moves at every step, lines are rarer.
        if self._bar is not None:
            self._bar.update(self._task, completed=step, eta=eta)
        if (
            step % self.every == 0
            or step in (1, self.steps)
            or row["skipped"]
            or self.evaluated in row
        ):
            self.say(
                "  ".join(
                    [*self.figures(row), "SKIPPED: not finite" if row["skipped"] else f"eta {eta}"]
                )
            )

    def figures(self, row: Row) -> list[str]:
        """What is shown of a row, before the time that is left."""
        return [f"{self.name} {row['step']}/{self.steps}", f"loss {number(row['loss'])}"]

    def close(self) -> None:
        """The end, whatever it was."""
        if self._bar is not None:
            self._bar.stop()


def number(value: float | None, digits: int = 4) -> str:
    """A figure that may be missing because it was not finite."""
    return "nan" if value is None else f"{value:.{digits}f}"


def rate(value: float) -> str:
    """A rate for people: 12345 as 12.3k."""
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated by PyTorch on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
