"""The walls around a call: what a worker builds, what each process puts up, and what then stands.

Once per worker (``Walls.build``), in this order, since each step takes away what the ones before it
need:

    namespaces and a root of its own     namespaces.py; if refused, Landlock has to serve alone
    no capability in the bounding set, no new privileges

Once per process of a call (``Walls.confine``), before it sees a byte of what it is to run:

    session without a terminal
    mounts of its own, an empty folder   a tmpfs that ends with the process: nothing to clean up
    limits                               address space, processor time, file size, threads, no core
    user 65534, no groups                whenever the worker is root
    no capabilities, not dumpable        neither traced nor read by the user's next process
    Landlock                             files that may be read, the folder that may be written;
                                         signals, TCP
    descriptors                          none but the call's five, and a limit on new ones
    the system call filter               filter.py; last, since it forbids all of the above

All of them cost less than the fork that they stand around: measured, 240 rewards per second and
worker with all, 234 to 251 with any one left out. The mounts are 1 ms of the 4, and in return
nothing has to be cleaned up, not after kill -9 either.

``ENOUGH`` says which of them foreign code must be behind. A probe looks at them from inside, so
what is reported is what was seen. bubblewrap, nsjail, minijail and Chromium's sandbox put up the
same ones.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import resource
import signal
from collections.abc import Sequence
from typing import Any

from nvfp4.rl.rewards import kernel, landlock, namespaces

FILTER, LANDLOCK, NAMESPACES, USER, CAPABILITIES = (
    "system call filter",
    "Landlock",
    "namespaces",
    "unprivileged user",
    "no capabilities",
)
ALL = (FILTER, LANDLOCK, NAMESPACES, USER, CAPABILITIES)
ENOUGH = ((FILTER,), (LANDLOCK, NAMESPACES), (USER,), (CAPABILITIES,))
"""Of each of these, one wall at least."""

TASKS = 64
"""Processes and threads of a worker's user at a time."""

OPEN_FILES = 64
FILE_BYTES = namespaces.FOLDER_MIB << 20

OWN_USERS = 1 << 30
"""User ids that no account has: one per worker, where a user namespace does not keep them apart."""


class Walls:
    """The walls of one worker; see the file's head for who calls what, and in which order.

    settings: seconds, memory_mib; filters, {"writes": ..., "reads": ..., "alone": ...} in base64 or
    {}; read, paths that rewards name; without, walls to leave out.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.seconds: float = settings["seconds"]
        self.memory_mib: int = settings["memory_mib"]
        self.shown: list[str] = settings["read"]
        self.filters = {name: base64.b64decode(text) for name, text in settings["filters"].items()}
        self.without: list[str] = settings["without"]
        self.linux = kernel.LIBC is not None
        self.root = os.geteuid() == 0

        # what ``build`` and ``confine`` find out
        self.version = 0
        self.own_root = False
        self.own_users = False
        self.identity = namespaces.NOBODY
        self.files: list[tuple[int, int]] = []
        self.reward_files: list[tuple[int, int]] = []
        self.base_bytes = 0
        self.powerless = False

    def build(self, namespaced: bool, own_users: bool) -> None:
        """Once per worker, in the process that calls are forked from, after all its imports."""
        if not self.linux:
            return
        self.base_bytes = occupied()

        # a root of its own, while there are the capabilities to make one
        paths = namespaces.interpreter_paths()
        if namespaced:
            namespaces.build_root([*paths, *self.shown])
            self.own_root, self.own_users = True, own_users

        # no capability can come back
        kernel.drop_bounding_set()
        kernel.prctl(kernel.NO_NEW_PRIVS, 1)
        kernel.prctl(kernel.DUMPABLE, 0)

        # What may be read, opened now. The user ``nobody`` may not read an interpreter in a folder
        # of root's (pyenv and uv as root). Bound into a root of its own, it may; with Landlock
        # alone, what a call may import is imported before (``zygote.UNREADABLE``).
        if LANDLOCK not in self.without:
            self.version = landlock.abi(kernel.LIBC)
        if self.version:
            self.files = [*_readable(paths), *_readable(["/dev/zero", "/dev/urandom"])]
            self.files.append((_path("/dev/null"), landlock.READ_FILE | landlock.WRITE_FILE))
            self.reward_files = _readable(self.shown)

    def confine(self, judged: bool) -> None:
        """Once per process of a call, in the order of the file's head.

        judged: it runs text of the model, and is not shown what rewards name.
        """
        os.setsid()
        if not self.linux:
            self._limit()
            _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
            return

        # mounts, limits, user
        if self.own_root:
            namespaces.mount_folder(self.shown if judged else ())
        self._limit()
        self._become_nobody()
        self.powerless = kernel.drop_capabilities()
        kernel.prctl(kernel.DUMPABLE, 0)
        kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)  # after the change of user, which resets it

        # files
        if self.version:
            rules = [*self.files, *(() if judged else self.reward_files)]
            if self.own_root:
                folder = _path(namespaces.FOLDER)
                rules.append((folder, landlock.READ | landlock.CHANGE))
            landlock.restrict(kernel.LIBC, self.version, rules)

        # 0 to 4 are the call's own; the numbers of all others lie below this, since each new one is
        # the lowest free
        os.closerange(5, 256 + len(self.files) + len(self.reward_files))
        _lower(resource.RLIMIT_NOFILE, OPEN_FILES)  # only now: a rule of Landlock's is a descriptor

        if program := self.filters.get(self._filter()):
            kernel.load_filter(program)

    def stands(self) -> list[str]:
        """The walls that the calling process, confined, finds around it."""
        if not self.linux:
            return []
        # each by an attempt that it must refuse, or by what it must have changed
        found = []
        if self.filters and _refused(lambda: os.getsid(0)):
            found.append(FILTER)
        if self.version and _refused(lambda: os.listdir("/")):
            found.append(f"{LANDLOCK} (ABI {self.version})")
        if self.own_root and os.getppid() == 1 and not os.path.exists("/proc"):
            kinds = ("user, " if self.own_users else "") + "process, mount, network, IPC, host name"
            found.append(f"{NAMESPACES} ({kinds})")
        if 0 not in (*os.getresuid(), *os.getresgid()):
            found.append(f"{USER} {os.getuid()}")
        if self.powerless:
            found.append(CAPABILITIES)
        return found

    def _filter(self) -> str:
        """writes: where there is a folder for it. alone: nothing would bound a user's threads."""
        if self.own_root:
            return "writes"
        return "reads" if self.root else "alone"

    def _limit(self) -> None:
        """Limit this process, and the tasks of its user where they are only its own."""
        base = self.base_bytes if self.linux else occupied()
        _lower(resource.RLIMIT_CPU, math.ceil(self.seconds) + 1)
        _lower(resource.RLIMIT_AS, base + (self.memory_mib << 20))
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_FSIZE, FILE_BYTES if self.own_root else 0)
        if not self.filters:
            # a filter allows threads alone; without one neither, so that nothing outlives its call
            _lower(resource.RLIMIT_NPROC, 0)
        elif self.own_root or self.root:
            _lower(resource.RLIMIT_NPROC, TASKS)

    def _become_nobody(self) -> None:
        """Where root: no groups, and a user that owns nothing.

        Without a user namespace, one that nobody else is.
        """
        if not self.root:
            return
        os.setgroups([])
        users = [namespaces.NOBODY]
        if not self.own_users:
            users.insert(0, OWN_USERS + os.getppid())
        for user in users:
            with contextlib.suppress(OSError):  # in a container not every id exists
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                return
        raise OSError(f"cannot become user {namespaces.NOBODY}")


def sufficient(stands: Sequence[str]) -> bool:
    """Whether foreign code may run behind these walls."""
    return all(any(wall.startswith(each) for wall in stands for each in group) for group in ENOUGH)


def occupied() -> int:
    """Bytes of address space of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 28


def _readable(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Rules of Landlock's for those of the paths that exist."""
    rules = []
    for path in paths:
        if os.path.exists(path):
            rights = landlock.READ if os.path.isdir(path) else landlock.READ_FILE
            rules.append((_path(path), rights))
    return rules


def _path(path: str) -> int:
    """A descriptor that names a path and reads nothing of it."""
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def _refused(attempt: Any) -> bool:
    """Whether the kernel forbids it, and does not merely fail."""
    try:
        attempt()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _lower(which: int, most: int) -> None:
    """Lower a limit, the hard one too; where the system has it no lower than that, it stays."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (most, most))
