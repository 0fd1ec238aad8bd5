"""What a sandbox must not reach, and an account from which to try: for the tests of the sandbox and
its fuzzer.

``Account`` runs calls in a process of root's or of user 65534's. ``Outside`` makes a file, a
process, a terminal, a socket and System V objects, all of the same account, and tells what has
become of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import tty
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
USER = 65534
NEW_MOUNTS, PRIVATE, BIND = 0x20000, 0x44000, 4096  # linux/sched.h; linux/mount.h, recursive

# only what the sandbox has had from the start, so that it also drives older ones
DRIVER = """
import json, sys
from nvfp4.rl.rewards.sandbox import Limits, RewardCall, Sandbox, compile_reward
without = {"without": sys.argv[1:]} if sys.argv[1:] else {}
with Sandbox(Limits(seconds=60.0, memory_mib=256), workers=1, **without) as box:
    print(json.dumps(["ready", str(getattr(box, "walls", ""))]), flush=True)
    for line in sys.stdin:
        source, arguments = json.loads(line)
        call = RewardCall(compile_reward(source, "r.py"), "r.py", "reward", tuple(arguments))
        [verdict] = box.run([call])
        print(json.dumps([verdict.reward, verdict.reason]), flush=True)
"""


class Account:
    """A process of this account that runs reward functions; ``root`` takes root. without: walls to
    leave out."""

    def __init__(self, root: bool, without: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-c", DRIVER, *without]
        if not root and os.geteuid() == 0:
            command = [sys.executable, __file__, *command]
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.uid = 0 if root else USER if os.geteuid() == 0 else os.geteuid()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "PATH": os.defpath,
                "SECRET_TOKEN": "hf_secret",
            },
        )
        self.walls = self._read()[1]

    def run(self, source: str, *arguments: object) -> tuple[float, str | None]:
        """Reward and reason of one call."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([source, arguments]) + "\n")
        self.process.stdin.flush()
        reward, reason = self._read()
        return reward, reason

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> list[Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that runs the sandbox has ended"
        return list(json.loads(line))


class Outside:
    """Things of an account that nothing in a sandbox may reach."""

    def __init__(self, folder: Path, uid: int) -> None:
        self.folder, self.uid = folder, uid
        os.chmod(folder, 0o755)
        self.file = folder / "precious"
        self.file.write_text("data")
        os.setxattr(self.file, "user.kept", b"1")
        self.lock = folder / ".lock"
        self.lock.write_text("")
        self.victim = subprocess.Popen(
            ["/bin/sleep", "1000"],
            env={"SECRET_TOKEN": "hf_secret"},
            **({"user": uid, "group": uid, "extra_groups": []} if os.geteuid() == 0 else {}),
        )
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        self.terminal = os.ttyname(self.slave)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.name = f"\0nvfp4-{os.getpid()}-{self.victim.pid}"
        self.abstract.bind(self.name)
        for one in (self.listener, self.abstract):
            one.setblocking(False)
        if os.geteuid() == 0:
            for path in (folder, self.file, self.lock, self.terminal):
                os.chown(path, uid, uid)
        create = 0o1000 | 0o666
        self.memory = LIBC.shmget(0, 4096, create)
        self.semaphore = LIBC.semget(0, 1, create)
        self.queue = LIBC.msgget(0, create)
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        """All that a sandbox could have changed."""
        stat = self.file.stat()
        return {
            "file": (
                self.file.read_bytes(),
                stat.st_mode,
                stat.st_uid,
                stat.st_gid,
                stat.st_mtime_ns,
                stat.st_nlink,
            ),
            "attributes": {name: os.getxattr(self.file, name) for name in os.listxattr(self.file)},
            "flags": self._flags(),
            "names": sorted(path.name for path in self.folder.iterdir()),
            "lock": self._locked(),
            "victim": self._victim(),
            "typed": struct.unpack("i", fcntl.ioctl(self.slave, termios.FIONREAD, b"\0" * 4))[0],
            "printed": self._printed(),
            "terminal": str(termios.tcgetattr(self.slave)),
            "visitors": self._visitors(),
            "shared": self._shared(),
            "host": os.uname().nodename,
        }

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for fd in (self.master, self.slave):
            os.close(fd)
        self.listener.close()
        self.abstract.close()
        LIBC.shmctl(self.memory, 0, None)
        LIBC.semctl(self.semaphore, 0, 0)
        LIBC.msgctl(self.queue, 0, None)

    def _flags(self) -> int:
        """FS_IOC_GETFLAGS."""
        fd = os.open(self.file, os.O_RDONLY)
        try:
            return int(struct.unpack("i", fcntl.ioctl(fd, 0x80086601, b"\0" * 4))[0])
        except OSError:  # not every file system has them
            return 0
        finally:
            os.close(fd)

    def _victim(self) -> tuple[object, ...]:
        """Whether it lives, where it may run, and how urgently."""
        pid = self.victim.pid
        if self.victim.poll() is not None:
            return ("dead",)
        return (
            sorted(os.sched_getaffinity(pid)),
            os.sched_getscheduler(pid),
            os.getpriority(os.PRIO_PROCESS, pid),
        )

    def _locked(self) -> bool:
        with open(self.lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _printed(self) -> bytes:
        os.set_blocking(self.master, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self.master, 100)
        return b""

    def _visitors(self) -> int:
        count = 0
        for receive in (self.listener.accept, lambda: self.abstract.recv(100)):
            with contextlib.suppress(BlockingIOError):
                receive()
                count += 1
        return count

    def _shared(self) -> tuple[bytes, int, int]:
        """The memory, the semaphore, and the bytes and messages in the queue."""
        LIBC.shmat.restype = ctypes.c_void_p
        address = LIBC.shmat(self.memory, None, 0)
        content = b"removed"
        if address != ctypes.c_void_p(-1).value:
            content = ctypes.string_at(address, 8)
            LIBC.shmdt(ctypes.c_void_p(address))
        status = ctypes.create_string_buffer(256)
        # IPC_STAT; msg_qnum lies at 80 (asm-generic/msgbuf.h, 64 bits)
        LIBC.msgctl(self.queue, 2, status)
        return content, LIBC.semctl(self.semaphore, 0, 12), struct.unpack_from("Q", status, 80)[0]


def become_user() -> None:
    """User 65534 for good, with the interpreter where it was even if it lies in a folder of root's
    only."""
    interpreter = os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))
    parents = [str(parent) for parent in reversed(Path(interpreter).parents)]
    closed = [parent for parent in parents if not os.stat(parent).st_mode & 0o001]
    if closed:
        LIBC.unshare(NEW_MOUNTS)
        LIBC.mount(b"none", b"/", None, ctypes.c_ulong(PRIVATE), None)
        fd = os.open(interpreter, os.O_PATH)
        LIBC.mount(b"tmpfs", closed[0].encode(), b"tmpfs", ctypes.c_ulong(0), b"mode=755")
        os.makedirs(interpreter)
        LIBC.mount(
            f"/proc/self/fd/{fd}".encode(), interpreter.encode(), None, ctypes.c_ulong(BIND), None
        )
        os.close(fd)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    become_user()
    os.execv(sys.argv[1], sys.argv[1:])
