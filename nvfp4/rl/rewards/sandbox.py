"""Reward functions in processes of their own: one that hangs, forks, eats memory, prints or raises scores 0.

``Sandbox`` keeps a few workers; each runs one call at a time in a confined fork of itself, so that calls share nothing.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import marshal
import os
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from nvfp4.rl.rewards import worker
from nvfp4.rl.rewards.filter import build_filter
from nvfp4.rl.tasks.base import Verdict, checked
from nvfp4.train.errors import TrainError

_GRACE = 10.0  # seconds beyond its limit after which a worker is held to be stuck itself: it is not meant to happen
_START = 60.0  # seconds for a worker to start, with what it imports


@dataclass(frozen=True)
class Limits:
    """Of each call. seconds: by the clock. memory_mib: beyond what the empty worker occupies. output_bytes: printed."""

    seconds: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600 or self.memory_mib < 1 or self.output_bytes < 0:
            raise ValueError(f"limits must be positive, and seconds at most 3600, got {self}")


@dataclass(frozen=True)
class Call:
    """One call of a function. code: what ``compile_reward`` made; arguments: what JSON can hold."""

    code: bytes
    name: str
    function: str
    arguments: tuple[Any, ...]


@lru_cache(maxsize=1024)
def compile_reward(source: str, name: str, function: str = "reward") -> bytes:
    """Python text as the sandbox takes it; nothing of it is run here. name: for line numbers in reasons.

    Raises ValueError if it is not Python, or does not define ``function`` at its top level.
    """
    try:
        tree = ast.parse(source, name)
        code = compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"not Python: {error.msg if isinstance(error, SyntaxError) else error}{where}") from None
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    defined |= {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    if function not in defined:
        raise ValueError(f"no function {function!r} is defined")
    return marshal.dumps(code)


class Sandbox:
    """Runs calls of reward functions; a context manager, and safe to forget.

    A call gets its own process with limits on time, processor time, memory, open files and output, an empty working
    directory, an empty environment, and no more modules than the standard library. On Linux (x86-64, aarch64) a system
    call filter, which needs no privileges, denies it processes, the network, and any change to files. ``confined``
    tells whether that filter is in force; without it, the limits and a fork limit remain, but files that the user may
    change and the network are open to the function.

    What a function is handed, it can judge wrongly: one that executes text of the model shares its process with it.

    workers: processes, by default one per processor, at most 8. preload: modules to import before any call, which also
    opens site-packages to the functions. system_calls: False does without the filter.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        preload: Sequence[str] = (),
        system_calls: bool = True,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.limits = limits or Limits()
        self._most = workers or min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
        filter_program = build_filter() if system_calls else None
        self._settings = {
            "seconds": self.limits.seconds,
            "memory_mib": self.limits.memory_mib,
            "output_bytes": self.limits.output_bytes,
            "preload": list(preload),
            "filter": base64.b64encode(filter_program).decode() if filter_program else None,
        }
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._workers, os.getpid())

    def run(self, calls: Sequence[Call]) -> list[Verdict]:
        """The verdict on each call, in order; raises ``TrainError`` only if no worker can be started."""
        frames = [_frame(call) for call in calls]
        with self._lock:
            while len(self._workers) < min(self._most, len(calls)):
                self._workers.append(_Worker(self._settings))
            try:
                return _Round(self._workers, self._settings, frames).run()
            except BaseException:  # Ctrl-C: workers that still owe an answer would give it to the next call
                _close(self._workers)
                raise

    @property
    def confined(self) -> bool:
        """Whether the system call filter is in force; starts a worker."""
        with self._lock:
            if not self._workers:
                self._workers.append(_Worker(self._settings))
            return self._workers[0].filtered

    def close(self) -> None:
        """End the workers; the next ``run`` starts new ones."""
        with self._lock:
            _close(self._workers)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Lost(Exception):
    """A worker ended or does not answer."""


class _Worker:
    """A running ``worker.py``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="nvfp4-reward-")
        # -s -S and the environment do what -I -S would, except that -I ignores the hash seed: sets of strings have to
        # have the same order in every worker, or the reward of a sample would depend on who looked at it
        flags = ["-B", "-s", *([] if settings["preload"] else ["-S"])]
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-X", "utf8", str(Path(worker.__file__)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder.name,
            env={"PYTHONHASHSEED": "0", "PATH": os.defpath, "HOME": self.folder.name},
            start_new_session=True,
            bufsize=0,
        )
        try:
            hello = self.receive(_START)
        except _Lost:
            self.end()
            raise TrainError("rewards: the sandbox process does not start; see whether Python runs here") from None
        if "error" in hello:
            self.end()
            raise TrainError(f"rewards: the sandbox process cannot start: {hello['error']}")
        self.filtered: bool = hello["filtered"]

    def fileno(self) -> int:
        """Where answers can be waited for."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, frame: bytes) -> None:
        """One call."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(frame)
        except OSError as error:
            raise _Lost from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer; ``_Lost`` if none comes within ``seconds``."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise _Lost
        answer = worker.receive(self.fileno())
        if answer is None:
            raise _Lost
        return dict(answer)

    def end(self) -> None:
        """Kill it and what it runs, and remove its folder."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(OSError):
            self.folder.cleanup()


class _Round:
    """One batch of calls, dealt out to the workers as they become free."""

    def __init__(self, workers: list[_Worker], settings: dict[str, Any], frames: list[bytes]) -> None:
        self.workers, self.settings, self.frames = workers, settings, frames
        self.waiting = deque(range(len(frames)))
        self.verdicts: list[Verdict | None] = [None] * len(frames)
        self.busy: dict[_Worker, tuple[int, float]] = {}
        self.lost: set[int] = set()

    def run(self) -> list[Verdict]:
        idle = list(self.workers)
        with selectors.DefaultSelector() as selector:
            while self.waiting or self.busy:
                while self.waiting and idle:
                    self.hand_out(idle.pop(), selector)
                idle += self.collect(selector)
        return [verdict for verdict in self.verdicts if verdict is not None]

    def hand_out(self, to: _Worker, selector: selectors.BaseSelector) -> None:
        index = self.waiting.popleft()
        self.busy[to] = (index, time.monotonic() + self.settings["seconds"] + _GRACE)
        selector.register(to, selectors.EVENT_READ)
        with contextlib.suppress(_Lost):  # if it is gone, so is its answer, and that is seen there
            to.send(self.frames[index])

    def collect(self, selector: selectors.BaseSelector) -> list[_Worker]:
        """Take in what has come; returns the workers that are free now."""
        first = min(deadline for _, deadline in self.busy.values())
        ready = {key.fileobj for key, _ in selector.select(max(0.0, first - time.monotonic()))}
        free = []
        for one, (index, deadline) in list(self.busy.items()):
            if one not in ready and time.monotonic() < deadline:
                continue
            selector.unregister(one)
            del self.busy[one]
            try:
                answer = one.receive(0.0)
            except _Lost:
                free.append(self.replace(one, index))
                continue
            self.verdicts[index] = Verdict(0.0, answer["reason"]) if "reason" in answer else checked(answer["value"])
            free.append(one)
        return free

    def replace(self, one: _Worker, index: int) -> _Worker:
        """A new worker for one that was lost; its call gets a second chance, since others may have ended it."""
        one.end()
        if index in self.lost:
            self.verdicts[index] = Verdict(0.0, "the sandbox process was lost twice")
        else:
            self.lost.add(index)
            self.waiting.appendleft(index)
        self.workers.remove(one)
        self.workers.append(_Worker(self.settings))
        return self.workers[-1]


def _frame(call: Call) -> bytes:
    data = {
        "code": base64.b64encode(call.code).decode(),
        "name": call.name,
        "function": call.function,
        "arguments": call.arguments,
    }
    text = json.dumps(data).encode()
    return struct.pack(">I", len(text)) + text


def _close(workers: list[_Worker], owner: int | None = None) -> None:
    """End all of them; not in a fork of the ``owner``, which has use for them."""
    while workers and owner in (None, os.getpid()):
        workers.pop().end()
