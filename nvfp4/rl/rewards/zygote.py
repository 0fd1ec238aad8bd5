"""The process that calls are forked from: warm, behind the walls, and knowing nothing.

    keeper  --(p, j or s: a kind, a number, five descriptors)-->  zygote  --fork-->  the process
            --(k, a number)-->                                            --SIGKILL-->
            <--(number, exit code)--                                      <--SIGCHLD--

What a process is to run, and every answer, goes past the zygote, from the keeper to the process: a
fork inherits the memory of its parent, so what a parent never read cannot be found there by any
later call. It never runs code of a call itself. A fork takes a millisecond, a start of Python a
hundred.

Where there are namespaces it is process 1 of its own, and the kernel ends everything in them with
it. How it gets there is a plan; ``start`` tries ``PLANS`` from the strongest on.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import select
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any

from nvfp4.rl.rewards import kernel, namespaces
from nvfp4.rl.rewards.calls import CHANNEL, describe, perform, receive, send
from nvfp4.rl.rewards.walls import NAMESPACES, Walls

PRELOADED = (
    *("collections", "datetime", "decimal", "fractions", "functools", "itertools", "re"),
    *("statistics", "string"),
)
"""What reward functions tend to import: imported once, before any fork."""

UNREADABLE = (
    *("bisect", "copy", "dataclasses", "enum", "heapq", "io", "math", "operator", "typing", "time"),
    *("types", "json", "csv", "hashlib", "textwrap", "random", "difflib", "unicodedata", "ast"),
    *("tokenize", "threading", "queue", "ctypes", "fcntl", "select", "socket", "tempfile"),
    *("shutil", "logging", "bz2", "lzma", "sqlite3", "asyncio", "calendar", "pprint", "cmath"),
    *("array", "zlib", "struct", "numbers", "contextlib", "abc", "warnings", "signal"),
)
"""Imported before any fork too where their files are unreadable to a call, which runs as the user
``nobody``: where Python lies in a folder of root's and no bind mount shows it (walls.py)."""

COMMAND = struct.Struct(">ci")
"""What to do (p, j, s, k), and the number that the keeper gave the process."""

REPORT = struct.Struct(">ii")
"""Number, exit code as ``os.waitstatus_to_exitcode`` has it."""

PROBE, JUDGING, JUDGED, KILL = b"p", b"j", b"s", b"k"
STANDING = b"\1"
"""First on the channel, if the walls stand; no frame begins so, since none is 16 MiB long."""
DESCRIPTORS = 5

Plan = tuple[str, int]
"""Name, and flags of unshare."""

PLANS: tuple[Plan, ...] = (
    ("user namespace", namespaces.EVERY | namespaces.NEW_USER),
    ("namespaces", namespaces.EVERY),
    ("none", 0),
)
"""From the strongest on; each in a process of its own: one that fails leaves nothing behind."""


def start(settings: dict[str, Any]) -> tuple[socket.socket, int, list[str]]:
    """A zygote by the first plan that works.

    Its control socket, the process to wait for, and why stronger plans failed. ImportError for a
    module of ``preload`` that cannot be imported, OSError if no plan works.
    """
    failures: list[str] = []
    for plan in PLANS:
        if plan[1] and (kernel.LIBC is None or NAMESPACES in settings["without"]):
            continue

        # a fork tries the plan, and says how it went
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            ours.close()
            _begin(plan, settings, theirs)
        theirs.close()
        hello = _introduce(ours, child, plan)
        if "import" in hello:
            raise ImportError(hello["import"])
        if "error" not in hello:
            return ours, child, failures
        ours.close()
        os.waitpid(child, 0)
        failures.append(f"{plan[0]}: {hello['error']}")
    raise OSError("; ".join(failures))


def _introduce(control: socket.socket, child: int, plan: Plan) -> dict[str, Any]:
    """Answer the new zygote's wish for a user map, then hear whether it is ready."""
    while (hello := receive(control.fileno())) is not None:
        if "map" not in hello:
            return dict(hello)
        try:
            namespaces.write_maps(child, os.getuid(), os.getgid())
            control.send(b"y")
        except OSError as error:
            control.send(b"n")
            return {"error": f"user map: {error}"}
    return {"error": "it ended"}


def _begin(plan: Plan, settings: dict[str, Any], control: socket.socket) -> None:
    """Become the zygote of this plan, or say why not; runs in the fork, does not return."""
    walls = Walls(settings)
    flags = plan[1]

    # nothing of the keeper's is held, but for the socket to it
    for fd in range(3, 256):
        if fd != control.fileno():
            with contextlib.suppress(OSError):
                os.close(fd)
    # 0 to 4 are filled, so that nothing opened here gets a number that is a call's
    while (fd := os.open(os.devnull, os.O_RDWR)) < DESCRIPTORS:
        pass
    os.close(fd)

    # namespaces first, since being process 1 takes another fork; imports before walls hide files
    try:
        if flags:
            kernel.unshare(flags)
            if flags & namespaces.NEW_USER:
                send(control.fileno(), {"map": True})
                if control.recv(1) != b"y":
                    os._exit(1)
            _fork_process_1()
        _die_with_parent()
        unreadable = UNREADABLE if walls.root and not flags else ()
        _import((*PRELOADED, *unreadable), settings["preload"])
        walls.build(bool(flags), bool(flags & namespaces.NEW_USER))
    except BaseException as error:
        kind = "import" if isinstance(error, _Unimportable) else "error"
        with contextlib.suppress(OSError):
            send(control.fileno(), {kind: describe(error, "")})
        os._exit(1)

    os.environ.clear()
    gc.freeze()  # forks need not copy what the collector would otherwise mark
    send(control.fileno(), {"ready": True})
    _serve(walls, control)
    os._exit(0)


class _Unimportable(Exception):
    """A module of ``preload``."""


def _import(own: Sequence[str], preload: Sequence[str]) -> None:
    """``_Unimportable`` for a module of ``preload``, which a user has named."""
    for name in own:
        importlib.import_module(name)
    for name in preload:
        try:
            importlib.import_module(name)
        except BaseException as error:
            raise _Unimportable(describe(error, "")) from None


def _fork_process_1() -> None:
    """Go on as the first process of the new namespace; this one waits, and ends with it."""
    child = os.fork()
    if child:
        _die_with_parent()
        os.closerange(0, 256)
        os.waitpid(child, 0)
        os._exit(0)


def _die_with_parent() -> None:
    """Whatever ends the parent ends this process too."""
    if kernel.LIBC is not None:
        kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)


def _serve(walls: Walls, control: socket.socket) -> None:
    """Start, kill and reap processes until the keeper is gone."""
    running: dict[int, int] = {}  # process id by number

    # a process that ends writes a byte into this pipe (SIGCHLD), which is polled like the keeper
    alarm, bell = os.pipe()
    for fd in (alarm, bell):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(alarm, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if alarm in ready:
            os.read(alarm, 4096)
            _reap(running, control)
        if control.fileno() not in ready:
            continue

        # an order, or the end of the keeper
        message, fds, _, _ = socket.recv_fds(control, COMMAND.size, DESCRIPTORS)
        if not message:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
            return
        kind, number = COMMAND.unpack(message)
        if kind == KILL:
            if number in running:
                os.kill(running[number], signal.SIGKILL)
            continue

        child = os.fork()
        if not child:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _child(walls, kind, fds)
        running[number] = child
        for fd in fds:
            os.close(fd)


def _reap(running: dict[int, int], control: socket.socket) -> None:
    """Report each process that has ended."""
    numbers = {pid: number for number, pid in running.items()}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if pid in numbers:
            del running[numbers[pid]]
            control.sendall(REPORT.pack(numbers[pid], os.waitstatus_to_exitcode(status)))


def _child(walls: Walls, kind: bytes, fds: list[int]) -> None:
    """Put up the walls, then do the work; runs in the fork, does not return."""
    code = 1
    try:
        # first to numbers above 4, so that none is overwritten before its turn; then to 0 to 4
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, DESCRIPTORS) for fd in fds]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        walls.confine(judged=kind == JUDGED)
        os.write(CHANNEL, STANDING)  # from here on nothing in the channel is about the walls
    except BaseException as error:  # nothing of the call has been read, nor can be in this
        with contextlib.suppress(BaseException):
            send(CHANNEL, {"walls": describe(error, "")})
        os._exit(code)

    # only now is anything of the call read
    try:
        if kind == PROBE:
            send(CHANNEL, {"stands": walls.stands()})
        else:
            perform(kind == JUDGED)
        code = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            send(CHANNEL, {"reason": describe(error, "")})
    finally:
        os._exit(code)
