"""A grid of runs, each a child process: every recipe with every seed, and controls.

    Arm, Arm, ...           the grid: train/compare.py and rl/compare.py each ``plan`` their own
    run_all                 what is not finished yet, ``workers`` at a time; the first failure, or a
                            signal, stops them all
    side_by_side            how many of them at a time, with how many threads each
    paired_gaps             what a recipe costs, in pairs of runs that share seed and data
    publish                 compare.json, compare.png, tables

A run in a process of its own has its own peak memory and its own crash. A signal to the parent
stops all of them, each with a checkpoint, and the same command goes on; so does the parent's death
(``children.py``).

Runs of one seed have the same initial weights and the same batches. What these do to a loss is
common to both runs of a pair and cancels in their difference; ``paired_gaps`` therefore takes the
standard error of the differences.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from rich.console import Console
from rich.table import Table

from nvfp4.run.children import start
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields, to_yaml
from nvfp4.run.files import write_json, write_text
from nvfp4.run.folder import RunFolder
from nvfp4.run.forks import ForkServer
from nvfp4.run.options import ResumableConfig
from nvfp4.run.signals import StopWish

TRAINERS = ("nvfp4.train.loop",)
"""Imported by the fork server before its first run; by name, since a trainer stands above this
room. Only pretraining's: the runs of reinforcement learning have a bar each and are not forked."""

POLL = 0.05
"""Seconds between two looks at the children."""


@dataclass(frozen=True)
class Arm:
    """One run of a grid: its name, its config, and where it runs.

    command: of ``nvfp4``, which does it (pretrain or rl).
    """

    name: str
    command: str
    config: ResumableConfig
    folder: RunFolder = field(compare=False)

    @property
    def output(self) -> Path:
        """What it prints, where that does not go to the terminal."""
        return self.folder.root / "output.txt"

    def result(self) -> dict[str, Any] | None:
        """What it has left at its end; None if it has not ended, or was of another config."""
        done = self.folder.read_result()
        return done if done is not None and done["config"] == saved_fields(self.config) else None


class Child(Protocol):
    """A run that was started: a ``subprocess.Popen``, or what behaves as one."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def wait(self) -> int:
        """Its exit code, when it has ended."""

    def terminate(self) -> None:
        """SIGTERM."""


Start = Callable[[list[str], Path | None], Child]
"""``nvfp4 ARGUMENTS`` as a child, given the arguments and where its lines go (None: as ours)."""


class Display(nullcontext):
    """What people see of the runs: here their own lines, one run after the other.

    own_lines: the runs print to the terminal, else to their ``output``.
    """

    own_lines: ClassVar[bool] = True

    def on_start(self, arm: Arm) -> None:
        """A run begins."""
        print(f"--- {arm.name} ---", flush=True)

    def look(self, arm: Arm) -> None:
        """A run goes on."""

    def on_end(self, arm: Arm) -> None:
        """A run has ended, well or not."""


class Lines(Display):
    """The lines of runs side by side, each with its run's name in front, as they are written."""

    own_lines = False

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[Arm, int] = {}

    def on_start(self, arm: Arm) -> None:
        """A run begins; what its ``output`` holds of an earlier try has been shown."""
        self._read[arm] = arm.output.stat().st_size if arm.output.exists() else 0
        print(f"--- {arm.name} ---", flush=True)

    def look(self, arm: Arm) -> None:
        """Whole lines that have come since."""
        try:
            with open(arm.output, "rb") as file:
                file.seek(self._read[arm])
                fresh = file.read()
        except FileNotFoundError:  # it has not begun to write
            return

        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read[arm] += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            print(f"{arm.name}: {line}".rstrip(), flush=True)

    def on_end(self, arm: Arm) -> None:
        """The rest of its lines."""
        self.look(arm)
        del self._read[arm]

    def __exit__(self, *exception: object) -> None:
        for arm in list(self._read):  # stopped: where each has saved
            self.on_end(arm)


@dataclass(frozen=True)
class SideBySide:
    """How runs share a machine: ``workers`` at a time, ``threads`` each (None: all there are)."""

    workers: int
    threads: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a run has to know of it."""
        return {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}


def side_by_side(arms: list[Arm], asked: int | None) -> SideBySide:
    """``asked`` runs at a time, by default as many as there are cores; one at a time on a GPU.

    The small models of a CPU leave a second thread waiting: measured with AVX2 on two cores, an
    update of 0.9 M parameters takes 65 (bf16) and 91 ms (quartet2) on both cores, 109 and 148 ms on
    one of them beside another run, and two runs then take a sixth less.
    """
    cores = torch.get_num_threads()
    workers = asked or (min(cores, len(arms)) if _on_cpu(arms) else 1)
    return SideBySide(workers, max(1, cores // workers) if workers > 1 and _on_cpu(arms) else None)


def run_all(arms: list[Arm], share: SideBySide, display: Display) -> list[dict[str, Any]]:
    """Do what is not finished, ``share.workers`` at a time; returns the results in the arms' order.

    The first failure stops them all: ``TrainError`` with the last words of that run.
    ``Interrupted`` after a signal, which all have obeyed.
    """
    waiting = [arm for arm in arms if arm.result() is None]
    for arm in arms:
        if arm not in waiting:
            print(f"{arm.name}: finished before, in {arm.folder.root}", flush=True)

    # From here on children may live, and the callback ends them however this block is left.
    running: dict[Arm, Child] = {}
    with ExitStack() as stack:
        wish, _ = stack.enter_context(StopWish()), stack.enter_context(display)
        begin = stack.enter_context(starter(arms if waiting else [], share, display))
        stack.callback(_stop, running)  # whatever ends this: no run goes on alone
        while (waiting or running) and not wish.received:
            while waiting and len(running) < share.workers:
                arm = waiting.pop(0)
                display.on_start(arm)
                running[arm] = _start(arm, display, begin)
            time.sleep(POLL)

            # A child that ends well has left a result; exit code 0 without one is a failure too.
            for arm, child in list(running.items()):
                display.look(arm)
                code = child.poll()
                if code is not None:
                    del running[arm]
                    display.on_end(arm)
                    if code != 0 or arm.result() is None:
                        raise TrainError(_why(arm, code, display))
        if wish.received:
            raise Interrupted(wish.received, "stopped; run the same command again to go on")
    return [result for arm in arms if (result := arm.result()) is not None]


def paired_gaps(values: dict[tuple[str, int], float], baseline: str) -> dict[str, dict[str, float]]:
    """What each recipe has more than ``baseline``, in pairs of runs of the same seed.

    values: of (recipe, seed). Returns for each recipe but the baseline its mean difference, the
    standard error of that mean over seeds (the sample's deviation / sqrt n; NaN for one seed) and
    n. A seed that only one of the two has is not counted.
    """
    gaps_of: dict[str, dict[str, float]] = {}
    for recipe in dict.fromkeys(name for name, _ in values if name != baseline):
        gaps = [
            value - values[baseline, seed]
            for (name, seed), value in values.items()
            if name == recipe and (baseline, seed) in values
        ]
        if gaps:
            # of the differences, not of the two means: what the pair shares has cancelled
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            gaps_of[recipe] = {
                "mean": statistics.fmean(gaps),
                "standard_error": error,
                "seeds": len(gaps),
            }
    return gaps_of


def publish(
    report: dict[str, Any],
    root: Path,
    draw: Callable[[dict[str, Any], Path], None],
    tables: list[Table],
) -> dict[str, Any]:
    """Write compare.json and compare.png, print the tables; returns the report."""
    data, picture = root / "compare.json", root / "compare.png"
    write_json(data, report)
    draw(report, picture)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for shown in tables:
        console.print(shown)
    print(f"written: {data}, {picture}")
    return report


@contextmanager
def starter(arms: list[Arm], share: SideBySide, display: Display) -> Iterator[Start]:
    """What starts the runs of a grid: a process each, or forks of one where that is safe.

    Forked where several pretrainings follow each other on the CPU of a Linux machine
    (``forks.py``), from as many servers as there are workers: measured there, imports are 6.5 s of
    a run and the end of Python 1.1 s. The four of ``nvfp4 compare`` then import once per worker,
    and none of them takes an interpreter down. The grid decides and not what is left of it, so that
    all its runs are alike in what they count as memory: a fork counts the pages of libraries that
    it has touched itself (.33 GiB at the peak of a tiny run), a process of its own all that it
    read while it imported (.45).
    """
    forked = all(arm.command == "pretrain" for arm in arms) and len(arms) > share.workers
    if not (sys.platform == "linux" and _on_cpu(arms) and forked):
        yield partial(_start_process, share.environment)
        return
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ForkServer(*TRAINERS, environment=share.environment))
            for _ in range(share.workers)
        ]
        yield partial(_start_fork, servers, {})


def _on_cpu(arms: list[Arm]) -> bool:
    devices = {arm.config.device for arm in arms}
    return devices == {"cpu"} or (devices == {"auto"} and not torch.cuda.is_available())


def _start_process(environment: dict[str, str], arguments: list[str], output: Path | None) -> Child:
    if output is None:
        return start(arguments, environment)
    with open(output, "ab") as file:
        return start(arguments, environment, file)


def _start_fork(
    servers: list[ForkServer],
    last: dict[ForkServer, Child],
    arguments: list[str],
    output: Path | None,
) -> Child:
    """A run of the first server whose last one has ended; ``last`` keeps which that was."""
    free = next(s for s in servers if s not in last or last[s].poll() is not None)
    last[free] = free.start(arguments, output)
    return last[free]


def _start(arm: Arm, display: Display, begin: Start) -> Child:
    given = arm.folder.root / "given.yaml"
    write_text(given, to_yaml(arm.config))
    arguments = [arm.command, "--config", str(given), "--resume"]
    try:
        return begin(arguments, None if display.own_lines else arm.output)
    except OSError as error:
        raise TrainError(
            f"cannot write {error.filename}: {error.strerror}; make room and run the same again"
        ) from error


def _stop(running: dict[Arm, Child]) -> None:
    for child in running.values():
        child.terminate()
    for child in running.values():
        child.wait()


def _why(arm: Arm, code: int, display: Display) -> str:
    if display.own_lines:
        return f"the run of {arm.name} ended with exit code {code}; its message is above"
    lines = arm.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{arm.name} ended with exit code {code}: {lines[-1] if lines else 'no message'}"
