"""Reward functions and programs of the model, each in a process of its own, behind walls.

    trainer                          outside the walls                      behind the walls
    Sandbox -> _Round -> _Worker  =  keeper.py      ->  zygote.py       ->  one process per call
               deals calls out       judges, limits     forks, ends them    calls.py

``Sandbox`` is the trainer's end: it keeps a few workers, each of which runs one call at a time, and
deals the calls of a batch out to them (``_Round``). What a call may do is decided by walls.py, and
what it said is judged by keeper.py. One that hangs, forks, eats memory, prints or raises scores 0
with its reason, and the training goes on.

A worker that is lost (killed by the kernel, say) is replaced, and its call gets a second chance,
since others may have ended it.
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
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from nvfp4.rl.rewards import calls
from nvfp4.rl.rewards.filter import build_filter
from nvfp4.rl.rewards.keeper import SLICE, Clock
from nvfp4.rl.rewards.verdict import Verdict, to_verdict
from nvfp4.rl.rewards.walls import ALL, FILTER, sufficient
from nvfp4.run.errors import TrainError

_GRACE = 10.0  # seconds beyond its limit after which a worker counts as stuck: not meant to happen
_START = 60.0  # seconds for a worker to start, with what it imports

_BOOT = """
import sys, types
for name in ("nvfp4", "nvfp4.rl", "nvfp4.rl.rewards"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].__path__ = [sys.argv.pop(1)]
sys.path[:] = [path for path in sys.path if path]
from nvfp4.rl.rewards import keeper
keeper.main()
"""
"""A worker: this folder's modules without the package around them, which imports torch."""


@dataclass(frozen=True)
class Limits:
    """Limits of each call, and of each program that it runs.

    seconds: by a clock that stands still with the machine; of processor time one more. memory_mib:
    beyond what the empty worker occupies. output_bytes: printed.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600 or self.memory_mib < 1 or self.output_bytes < 0:
            raise ValueError(f"limits must be positive, and seconds at most 3600, got {self}")


@dataclass(frozen=True)
class RewardCall:
    """One call of a reward function.

    code: what ``compile_reward`` made. arguments: what JSON can hold. folder: where the function
    may import from, which has to be in the sandbox's ``read``.
    """

    code: bytes
    name: str
    function: str
    arguments: tuple[Any, ...]
    folder: str = ""


@dataclass(frozen=True)
class ProgramTests:
    """A program of the model's and what it has to do, 1 for all of it, else 0.

    tests: {"stdin": text, "stdout": text}, or {"call": name, "arguments": [...], "result": value}.
    Each is a process of its own, which gets the program and the input; what comes out is compared
    outside.
    """

    program: str
    tests: tuple[dict[str, Any], ...]


@lru_cache(maxsize=1024)
def compile_reward(source: str, name: str, function: str = "reward") -> bytes:
    """Python text as the sandbox takes it; nothing runs here. name: for line numbers in reasons.

    Raises ValueError if it is not Python, or does not define ``function`` at its top level.
    """
    try:
        tree = ast.parse(source, name)
        code = compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"not Python: {message}{where}") from None

    # defined, assigned or imported
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    if function not in names:
        raise ValueError(f"no function {function!r} is defined")
    return marshal.dumps(code)


def runs_text(source: str) -> int | None:
    """The first line on which a Python text calls exec or eval, or None.

    A reward function that does so with text of the model lets the model write the verdict.
    """
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("exec", "eval"):
            return called.lineno
    return None


class Sandbox:
    """Runs calls of reward functions and programs; a context manager, and safe to forget.

    A call gets its own process with limits on time, processor time, memory, open files, threads and
    output, an empty folder, an empty environment, and no more modules than the standard library. It
    sees no other process, no file but the interpreter's and those of ``read``, no network and no
    terminal; see ``walls``. Processes that run text of the model are not shown ``read`` either.

    Where the walls cannot be built (another system than Linux, another machine than x86-64 and
    aarch64, a kernel or container without seccomp, or with neither Landlock nor namespaces) ``run``
    raises ``TrainError``; with unsafe=True, what can be built is, and the calls run all the same.

    workers: processes, by default one per processor, at most 8. preload: modules to import before
    any call, which also opens site-packages to the functions. read: folders and files that reward
    functions may read. without: walls to leave out (names of ``walls.ALL``), as if they could not
    be built.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        preload: Sequence[str] = (),
        read: Sequence[str] = (),
        unsafe: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if unknown := sorted(set(without) - set(ALL)):
            got = ", ".join(unknown)
            raise ValueError(f"without: expected names of {', '.join(ALL)}, got {got}")
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self._most = workers or min(8, _processors())
        self._settings = {
            "seconds": self.limits.seconds,
            "memory_mib": self.limits.memory_mib,
            "output_bytes": self.limits.output_bytes,
            "preload": list(preload),
            "read": sorted({os.path.realpath(path) for path in read}),
            "filters": {} if FILTER in without else _filters(),
            "without": list(without),
        }

        # the workers, which start with the first call and end with the sandbox
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._workers, os.getpid())

    def run(self, calls: Sequence[RewardCall | ProgramTests]) -> list[Verdict]:
        """The verdict on each call, in order.

        ``TrainError`` if no worker can be started, or not safely.
        """
        frames = [_frame(call) for call in calls]
        with self._lock:
            while len(self._workers) < min(self._most, len(calls)):
                self._workers.append(_Worker(self._settings, self.unsafe))
            try:
                return _Round(self._workers, self._settings, self.unsafe, frames).run()
            except BaseException:  # Ctrl-C: an answer that is still owed would go to the next call
                _close(self._workers)
                raise

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls that stand, as a process of a call sees them; starts a worker."""
        with self._lock:
            if not self._workers:
                self._workers.append(_Worker(self._settings, self.unsafe))
            return self._workers[0].walls

    @property
    def confined(self) -> bool:
        """Whether foreign code may run here: ``walls.ENOUGH`` of them stand; starts a worker."""
        return sufficient(self.walls)

    def describe(self) -> str:
        """One line: the walls that stand, those that are missing, and why; starts a worker."""
        walls = self.walls
        missing = [name for name in ALL if not any(wall.startswith(name) for wall in walls)]
        failures = self._workers[0].failures
        why = f" ({'; '.join(failures)})" if missing and failures else ""
        state = "confined" if sufficient(walls) else "NOT confined"
        stand = ", ".join(walls) or "no wall stands"
        lacking = ", ".join(missing) or "none"
        return f"rewards run {state}: {stand}; missing: {lacking}{why}"

    def close(self) -> None:
        """End the workers; the next ``run`` starts new ones."""
        with self._lock:
            _close(self._workers)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _processors() -> int:
    """Processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _filters() -> dict[str, str]:
    """The system call filters of walls.py in base64, or none for this machine."""
    kinds = {
        "writes": build_filter(writes=True),
        "reads": build_filter(),
        "alone": build_filter(threads=False),
    }
    return {name: base64.b64encode(code).decode() for name, code in kinds.items() if code}


class _Lost(Exception):
    """A worker ended or does not answer."""


class _Worker:
    """A running keeper."""

    def __init__(self, settings: dict[str, Any], unsafe: bool) -> None:
        # -s -S and the environment do what -I -S would, except that -I ignores the hash seed: sets
        # of strings have to have the same order in every worker, or the reward of a sample would
        # depend on who looked at it. One thread per library: a pool made before the fork is of no
        # use after it.
        flags = ["-B", "-s", *([] if settings["preload"] else ["-S"])]
        pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        folder = str(Path(calls.__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-X", "utf8", "-c", _BOOT, folder, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "PATH": os.defpath, **dict.fromkeys(pools, "1")},
            start_new_session=True,
            bufsize=0,
        )

        # it says which walls stand, or why it cannot start
        try:
            hello = self.receive(_START)
        except _Lost:
            self.end()
            what = "the sandbox process does not start; see whether Python runs here"
            raise TrainError(f"rewards: {what}") from None
        if "error" in hello:
            self.end()
            raise TrainError(f"rewards: the sandbox process cannot start: {hello['error']}")
        self.walls: tuple[str, ...] = tuple(hello["stands"])
        self.failures: list[str] = hello["failures"]
        if not unsafe and not sufficient(self.walls):
            self.end()
            raise TrainError(_refusal(self.walls, self.failures))

    def fileno(self) -> int:
        """Where answers can be waited for."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, frame: bytes) -> None:
        """Hand one call to the worker; ``_Lost`` if it is gone."""
        assert self.process.stdin is not None
        try:
            while frame:  # a raw pipe may take a part
                frame = frame[self.process.stdin.write(frame) :]
        except OSError as error:
            raise _Lost from error

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer; ``_Lost`` if none comes within ``seconds``."""
        clock = Clock()
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while not selector.select(SLICE):
                if clock.tick() > seconds:
                    raise _Lost
        answer = calls.receive(self.fileno())
        if answer is None:
            raise _Lost
        return dict(answer)

    def end(self) -> None:
        """Kill it and what it runs: the zygote and its processes end with it."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if sys.platform != "linux" and self.process.stdin is not None:
                self.process.stdin.close()  # nothing tells it of a parent's death there
                self.process.wait(5.0)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _refusal(walls: Sequence[str], failures: Sequence[str]) -> str:
    """What is missing, and what to do."""
    stand = ", ".join(walls) or "none"
    why = f" ({'; '.join(failures)})" if failures else ""
    return (
        "rewards: foreign code cannot be confined here: it takes a system call filter (Linux on "
        "x86-64 or aarch64), Landlock or namespaces, and a user other than root; only these stand: "
        f"{stand}{why}. Use a machine that has them, or --unsafe-rewards to run it unconfined, "
        "with all that your account may do"
    )


class _Round:
    """One batch of calls, dealt out to the workers as they become free.

    waiting: numbers of calls. busy: of each worker, the number of its call and for how long it has
    been silent. lost: numbers of calls that a worker was lost with.
    """

    def __init__(
        self,
        workers: list[_Worker],
        settings: dict[str, Any],
        unsafe: bool,
        frames: list[bytes],
    ) -> None:
        self.workers = workers
        self.settings = settings
        self.unsafe = unsafe
        self.frames = frames
        self.waiting = deque(range(len(frames)))
        self.verdicts: list[Verdict | None] = [None] * len(frames)
        self.busy: dict[_Worker, tuple[int, Clock]] = {}
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
        self.busy[to] = (index, Clock())
        selector.register(to, selectors.EVENT_READ)
        with contextlib.suppress(_Lost):  # if it is gone, so is its answer, and that is seen there
            to.send(self.frames[index])

    def collect(self, selector: selectors.BaseSelector) -> list[_Worker]:
        """Take in what has come; returns the workers that are free now."""
        ready = {key.fileobj for key, _ in selector.select(SLICE)}
        free = []
        for one, (index, silence) in list(self.busy.items()):
            if one not in ready and silence.tick() < self.settings["seconds"] + _GRACE:
                continue

            # an answer, a sign of life, or nothing
            answer: dict[str, Any] | None = None
            if one in ready:
                with contextlib.suppress(_Lost):
                    answer = one.receive(0.0)
            if answer is not None and "alive" in answer:  # a run of several has ended
                self.busy[one] = (index, Clock())
                continue

            selector.unregister(one)
            del self.busy[one]
            if answer is None:
                free.append(self.replace(one, index))
                continue
            if "reason" in answer:
                self.verdicts[index] = Verdict(0.0, answer["reason"])
            else:
                self.verdicts[index] = to_verdict(answer["value"])
            free.append(one)
        return free

    def replace(self, one: _Worker, index: int) -> _Worker:
        """A new worker for one that was lost; its call gets a second chance."""
        one.end()
        if index in self.lost:
            self.verdicts[index] = Verdict(0.0, "the sandbox process was lost twice")
        else:
            self.lost.add(index)
            self.waiting.appendleft(index)
        self.workers.remove(one)
        self.workers.append(_Worker(self.settings, self.unsafe))
        return self.workers[-1]


def _frame(call: RewardCall | ProgramTests) -> bytes:
    """4 bytes of length and JSON."""
    if isinstance(call, ProgramTests):
        data: dict[str, Any] = {"program": call.program, "tests": call.tests}
    else:
        data = {
            "code": base64.b64encode(call.code).decode(),
            "name": call.name,
            "function": call.function,
            "arguments": call.arguments,
            "folder": call.folder,
        }
    text = json.dumps(data).encode()
    return struct.pack(">I", len(text)) + text


def _close(workers: list[_Worker], owner: int | None = None) -> None:
    """End all of them; a fork of the ``owner`` leaves them, since the owner still uses them."""
    while workers and owner in (None, os.getpid()):
        workers.pop().end()
