"""What all units of a call share, and the faults that a rehearsal injects into them.

    Settings(call, folder, kind, scale, ...)     made once, pickled into the process of every unit
      takes(unit)     whether the call runs it       limit(unit)     seconds before it is killed
      enter(unit)     in its process: make ``place`` (GPU, Rehearsal, CompileOnly), be its fault

A fault is something that a kernel, a driver or the system may do: raise, die of a signal, end
without a word, hang, give wrong bits. The rehearsal puts one into each kind of unit and asks of the
report that it names it.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.place import GPU, CompileOnly, Rehearsal

HANGING_SECONDS = 3.0
"""Of a unit that is made to hang: it would not end in any time."""

PATIENCE = 20
"""How much longer than on a GPU a unit of a rehearsal may take, and a call.

The machine may have other things to do.
"""


@dataclass
class Settings:
    """What all units of a call share; picklable, since each of them is a process of its own.

    folder: where reports and logs go. kind: "gpu", "rehearsal" or "compile". scale: of all sizes
    and times (1 on a GPU). faults: by the name of a unit, what to inject. tests: what pytest is
    given instead of what runs on a GPU. only: the names of units that run, all if there are none.
    build: whether the extensions are built for real.
    """

    call: int
    folder: str
    kind: str = "gpu"
    scale: float = 1.0
    faults: dict[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    build: bool = True
    place: Any = None

    def takes(self, unit: Any) -> bool:
        """Whether this call runs the unit."""
        return not self.only or unit.name in self.only

    def limit(self, unit: Any) -> float:
        """Seconds after which the unit is killed."""
        if self.faults.get(unit.name) == "hang":
            return HANGING_SECONDS
        return unit.seconds if self.kind == "gpu" else unit.seconds * PATIENCE

    def enter(self, unit: Any) -> None:
        """Make the place of a unit and be its fault; called in its process before it runs."""
        fault = self.faults.get(unit.name, "")
        self.place = {"gpu": GPU, "rehearsal": Rehearsal, "compile": CompileOnly}[self.kind](
            self.scale
        )
        self.place.prepare(fault)
        strike(fault)


def strike(fault: str) -> None:
    """Be the fault: what a kernel, a driver or the system may do to the process of a unit."""
    if fault == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered (injected)")
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "silent":
        os._exit(0)
    if fault == "missing tool":
        os.environ["PATH"] = ""
    if fault == "errors":
        os.environ["STAND_IN_ERRORS"] = "3"
    if fault == "hang":
        time.sleep(1e6)
