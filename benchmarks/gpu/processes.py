"""Runs units, each in a process of its own: a fault of a kernel poisons a CUDA context for good.

    Runner.run_stage(stage):
        the next unit of the queue starts whenever fewer than ``stage.workers`` run
        its process is forked from a server with torch imported and no CUDA context: 0.4 s, not 3
        what it sends (rows, its end) is written to the file of rows as it comes
        it has died without an end: one ``failed`` record that names the signal, and the next starts
        it is beyond its seconds, or the stage beyond its own: its whole process group is killed

So a fault, a death or a hang costs one row. Units of a stage that is over are all killed before any
is waited for: one after the other held a stage of 16 for 55 s beyond its limit.

Background units (the builds) go on while stages run, one after the other; units that need the first
wait for its end.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.rows import append

TICK = 0.25
"""Seconds between two looks at the clock."""

LONGEST_TICK = 3.0
"""Seconds that one tick counts for at most in the limit of a unit.

A machine that stood still for a minute, as in a neighbour's measurement, took no unit's time.
"""

PRELOADED = ["torch", "triton", "numpy"]
"""Imported once, by the server that units are forked from.

Not nvfp4: an extension may get built in between.
"""

EVERYTHING = [
    *PRELOADED,
    "nvfp4",
    *(f"benchmarks.gpu.{name}" for name in ("checks", "layers", "rates", "stand_in")),
]
"""The same where nothing is built: 0.4 s less for each unit."""

PR_SET_PDEATHSIG = 1
"""``prctl(2)``: the signal that a process gets when its parent dies."""


BACKGROUND = "build"
"""The name of the stage of background units."""


class Unit(NamedTuple):
    """What one process does: ``function`` of the job and ``arguments``.

    function: "module:name" below benchmarks.gpu. seconds: after so many it is killed. needs_build:
    it does not start before the build has ended.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0
    needs_build: bool = False


class Stage(NamedTuple):
    """Units in the order of their importance, and how many run at once."""

    name: str
    limit: float
    workers: int
    units: tuple[Unit, ...]


class Skip(Exception):
    """Raised by a unit that cannot run here; the message says why."""


@dataclass
class Job:
    """What a unit is given: its settings, and where its rows go."""

    settings: Any
    unit: Unit
    pipe: Connection

    def add(self, **row: Any) -> None:
        """Send one row; it is written at once."""
        self.pipe.send(("row", row))


@dataclass
class _Live:
    unit: Unit
    stage: str
    process: Any
    pipe: Connection
    began: float
    spent: float = 0.0
    said: tuple[str, Any] | None = None
    resources: dict[str, float] = field(default_factory=dict)


class Runner:
    """Starts, watches and ends the processes of all units.

    The only writer of the file of rows, but for pytest's.
    """

    def __init__(self, path: Path, log: Path, settings: Any, quiet: bool = False) -> None:
        self.path, self.log, self.settings, self.quiet = path, log, settings, quiet
        self.live: list[_Live] = []
        self.background: deque[Unit] = deque()
        self.build = ""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED if settings.build else EVERYTHING)

    def begin_background(self, units: Iterable[Unit]) -> None:
        """Start the first, and each other one when the one before has ended.

        Units that need the build wait for the first.
        """
        self.background = deque(units)
        self.build = self.background[0].name
        append(self.path, kind="stage", stage=BACKGROUND, state="running")
        append(
            self.path, kind="plan", stage=BACKGROUND, units=[unit.name for unit in self.background]
        )
        self._start(BACKGROUND, self.background.popleft())

    def run_stage(self, stage: Stage, end: float) -> None:
        """All units of a stage, until ``end`` on the monotonic clock; says how it ended."""
        began = time.monotonic()
        limit = end - began
        append(self.path, kind="stage", stage=stage.name, state="running", limit=round(limit, 1))
        waiting, state = deque(stage.units), "done"

        while waiting or self._of(stage.name):
            if time.monotonic() >= end:
                state = "out of time"
                self._stop(self._of(stage.name), "the stage's time was over")
                break
            while len(self._of(stage.name)) < stage.workers and (unit := self._startable(waiting)):
                self._start(stage.name, unit)
            self._pump()

        # However it ended, the stage has its record.
        seconds = round(time.monotonic() - began, 2)
        append(self.path, kind="stage", stage=stage.name, state=state, seconds=seconds)

    def finish_background(self, end: float) -> None:
        """Wait for background units until ``end``."""
        while time.monotonic() < end and self._of(BACKGROUND):
            self._pump()

    def end_all(self, reason: str) -> None:
        """Kill whatever runs, with what it started."""
        if self._of(BACKGROUND):
            append(self.path, kind="stage", stage=BACKGROUND, state=reason)
        self._stop(list(self.live), reason)

    def _of(self, stage: str) -> list[_Live]:
        return [live for live in self.live if live.stage == stage]

    def _startable(self, waiting: deque[Unit]) -> Unit | None:
        """The first that does not wait for the build, taken out of the queue."""
        for unit in waiting:
            if not (unit.needs_build and self.build):
                waiting.remove(unit)
                return unit
        return None

    def _start(self, stage: str, unit: Unit) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (unit, self.settings, theirs, str(self.log))
        process = self._context.Process(target=_work, args=arguments, daemon=False)
        process.start()
        theirs.close()
        self.live.append(_Live(unit, stage, process, ours, time.monotonic()))

    def _pump(self) -> None:
        """Wait for a tick or a message; then look after every unit."""
        before = time.monotonic()
        wait([live.pipe for live in self.live], TICK)
        for live in list(self.live):
            if self._read(live):
                self._bury(live)

        # Time in which the runner itself stood still is nobody's.
        passed = min(time.monotonic() - before, LONGEST_TICK)
        for live in list(self.live):
            live.spent += passed
            limit = self.settings.limit(live.unit)
            if live.spent > limit:
                _kill(live.process)
                live.process.join(5)
                reason = f"it took longer than {limit:g} s and was killed"
                self._record(live, "failed", reason)

    def _read(self, live: _Live) -> bool:
        """Write what a unit sent; True if it will send no more."""
        try:
            while live.pipe.poll():
                kind, value = live.pipe.recv()
                if kind == "row":
                    self._row(live, value)
                elif kind == "resources":
                    live.resources = value
                else:
                    live.said = (kind, value)
        except (EOFError, OSError):
            return True
        return False

    def _row(self, live: _Live, row: dict[str, Any]) -> None:
        append(self.path, kind="row", stage=live.stage, unit=live.unit.name, **row)
        if not self.quiet:
            cells = ", ".join(f"{key} {_cell(value)}" for key, value in row.items())
            print(f"[{live.stage}] {cells}", flush=True)

    def _bury(self, live: _Live) -> None:
        """Its pipe is closed: it has ended, or soon will."""
        live.process.join(5)
        code = live.process.exitcode
        if code is None:
            _kill(live.process)
        if live.said is not None:
            self._record(live, *live.said)
        else:
            self._record(live, "failed", f"its process {_death(code)} without a word")

    def _stop(self, some: list[_Live], reason: str) -> None:
        for live in some:
            self._read(live)
            _kill(live.process)
        for live in some:
            live.process.join(5)
            self._record(live, *(live.said or ("stopped", reason)))

    def _record(self, live: _Live, state: str, reason: str) -> None:
        """Write how a unit ended; what waits for it may start."""
        self.live.remove(live)
        live.pipe.close()
        seconds = round(time.monotonic() - live.began, 2)
        record = {"unit": live.unit.name, "state": state, "reason": reason, "seconds": seconds}
        append(self.path, kind="unit", stage=live.stage, **record, **live.resources)
        if state != "done" and not self.quiet:
            print(f"[{live.stage}] {live.unit.name}: {state}: {reason}", flush=True)

        # Units that wait for the build may start even if it failed: they say that it is not there.
        if live.unit.name == self.build:
            self.build = ""
        if live.stage == BACKGROUND and state != "stopped":
            if self.background:
                self._start(BACKGROUND, self.background.popleft())
            else:
                append(self.path, kind="stage", stage=BACKGROUND, state="done")


def _work(unit: Unit, settings: Any, pipe: Connection, log: str) -> None:
    """The process of one unit: a group of its own, its words in the log, its result in the pipe."""
    os.setpgid(0, 0)
    # whoever interrupts ends the runner, and that ends this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)

    # Whatever happens inside, one ending is sent.
    before = os.times()
    try:
        settings.enter(unit)
        module, _, name = unit.function.partition(":")
        run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        run(Job(settings, unit, pipe), *unit.arguments)
        ending = ("done", "")
    except Skip as reason:
        ending = ("skipped", str(reason))
    except BaseException as error:
        print(f"--- {unit.name}", file=sys.stderr)
        traceback.print_exc()
        ending = ("failed", f"{type(error).__name__}: {error}")

    # Compilers and other children count too.
    after = os.times()
    user = after.user + after.children_user - before.user - before.children_user
    pipe.send(("resources", {"cpu s": round(user, 2)}))
    pipe.send(ending)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no finaliser of a poisoned context may have a say


def _kill(process: Any) -> None:
    """A unit and everything in its process group: compilers, pytest's workers, profilers."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process.pid, signal.SIGKILL)  # it may not have made its group yet


def _death(code: int | None) -> str:
    if code is None:
        return "would not end and was killed"
    if code < 0:
        with suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
