"""The process behind ``sandbox.Sandbox``, run as a script: it needs the standard library alone, and starts in no time.

It reads calls, runs each in a fork of itself that is confined first, and answers with the value or the reason why
there is none. The fork starts from the same memory each time, so no call sees what another did. This process never
runs code of a call, and so can be relied on to judge it. Frames: length (4 bytes, big endian) and JSON.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import marshal
import math
import numbers
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import traceback
from typing import Any

PRELOADED = ("collections", "datetime", "decimal", "fractions", "functools", "itertools", "re", "statistics", "string")
"""What reward functions tend to import: imported once, before any fork."""

LONGEST_RESULT = 4096
LONGEST_REASON = 200
NOBODY = 65534

PDEATHSIG, SECCOMP, CHILD_SUBREAPER, NO_NEW_PRIVS = 1, 22, 36, 38  # linux/prctl.h, PR_SET_...
FILTER = 2  # linux/seccomp.h, SECCOMP_MODE_FILTER


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class Worker:
    """settings: seconds, memory_mib, output_bytes, and filter, the system call filter in base64 or None."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.seconds: float = settings["seconds"]
        self.memory_mib: int = settings["memory_mib"]
        self.output_bytes: int = settings["output_bytes"]
        self.filter = base64.b64decode(settings["filter"]) if settings["filter"] else None
        self.libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self.filtered = False
        if self.libc is not None:
            self.prctl(CHILD_SUBREAPER, 1)

    def serve(self, requests: int, answers: int) -> None:
        """Answer until there are no more requests."""
        missing = self.run({"probe": True}, (requests, answers))
        self.filtered = not missing.get("value", 1)
        send(answers, {"filtered": self.filtered})
        while (call := receive(requests)) is not None:
            send(answers, self.run(call, (requests, answers)))

    def run(self, call: dict[str, Any], private: tuple[int, ...]) -> dict[str, Any]:
        """{"value": number} or {"reason": text}; ``private``: descriptors that the call must not have."""
        result, result_end = os.pipe()
        output, output_end = os.pipe()
        child = os.fork()
        if not child:
            try:
                for fd in (*private, result, output):
                    os.close(fd)
                self.become_confined(output_end)
                answer = {"value": int(not self.filtered)} if "probe" in call else evaluate(call, self.memory_mib)
                os.write(result_end, json.dumps(answer).encode()[:LONGEST_RESULT])
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    os.write(result_end, json.dumps({"reason": describe(error, "")}).encode()[:LONGEST_RESULT])
            finally:
                os._exit(0)
        os.close(result_end)
        os.close(output_end)
        answer, ended = self.watch(child, result, output)
        os.close(result)
        os.close(output)
        self.clear(child, ended)
        return answer

    def become_confined(self, output: int) -> None:
        """Limits on this process, its output into the pipe, and the filter or, without one, no processes."""
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for target, fd in ((0, null), (1, output), (2, output)):
            os.dup2(fd, target)
        os.close(output)
        os.close(null)
        if self.libc is not None:
            self.prctl(PDEATHSIG, signal.SIGKILL)
        processor = math.ceil(self.seconds) + 1
        limit(resource.RLIMIT_CPU, processor)
        limit(resource.RLIMIT_AS, occupied() + (self.memory_mib << 20))
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_FSIZE, 0)
        limit(resource.RLIMIT_NOFILE, 64)
        random.seed(0)
        if self.filter is not None and self.libc is not None:
            self.prctl(NO_NEW_PRIVS, 1)
            program = Program(len(self.filter) // 8, self.filter)
            self.filtered = self.libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0
        else:
            self.filtered = False
        if not self.filtered:
            if os.geteuid() == 0:  # whom the next limit would not bind
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            limit(resource.RLIMIT_NPROC, 0)

    def watch(self, child: int, result: int, output: int) -> tuple[dict[str, Any], bool]:
        """Wait for the child within its time, read what it has to say, make an answer of it; and whether it ended."""
        deadline = time.monotonic() + self.seconds
        said = {result: b"", output: b""}
        printed, status, pause = 0, None, 1e-4
        poller = select.poll()
        for fd in said:
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        watched = len(said)
        while status is None and printed <= self.output_bytes and len(said[result]) <= LONGEST_RESULT:
            left = deadline - time.monotonic()
            if left <= 0:
                return {"reason": f"took more than {self.seconds:g} s"}, False
            if not watched:  # both pipes are closed: it is about to end, or has closed them itself
                time.sleep(min(left, pause))
                pause = min(2 * pause, 0.01)
            for fd, _ in poller.poll(min(left, 0.05) * 1000) if watched else ():
                chunk = drain(fd)
                if not chunk:
                    poller.unregister(fd)
                    watched -= 1
                elif fd == output:
                    printed += len(chunk)
                else:
                    said[result] += chunk
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                said[result] += drain(result)
                printed += len(drain(output))
        if printed > self.output_bytes:
            return {"reason": f"printed more than {self.output_bytes} bytes"}, status is not None
        return self.answer(status, said[result]), status is not None

    def answer(self, status: int | None, said: bytes) -> dict[str, Any]:
        """What a child that ended said, if it is proper; else how it ended."""
        if status == -signal.SIGXCPU:
            return {"reason": f"took more than {math.ceil(self.seconds) + 1} s of processor time"}
        if status is not None and status < 0:
            return {"reason": f"killed by {signal.Signals(-status).name}"}
        try:
            answer = json.loads(said)
            if isinstance(answer.get("value"), (int, float)) or isinstance(answer.get("reason"), str):
                return dict(answer)
        except (ValueError, AttributeError, RecursionError):
            pass
        return {"reason": f"ended the process without a result (exit status {status})"}

    def clear(self, child: int, ended: bool) -> None:
        """Nothing of the call may remain: neither the child nor, where it could start any, its descendants."""
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if self.filtered:
            return
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        if self.libc is None:
            return
        with contextlib.suppress(ChildProcessError):  # there are no more
            while True:  # orphans become ours, so what is killed gives way to its own children
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    for orphan in children():
                        with contextlib.suppress(OSError):
                            os.kill(orphan, signal.SIGKILL)
                    os.waitpid(-1, 0)

    def prctl(self, option: int, value: int) -> None:
        if self.libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def evaluate(call: dict[str, Any], memory_mib: int) -> dict[str, Any]:
    """The value of the call's function, or the reason why there is none."""
    name = call["name"]
    space: dict[str, Any] = {"__name__": "reward", "__builtins__": builtins}
    try:
        exec(marshal.loads(base64.b64decode(call["code"])), space)
        value = space[call["function"]](*call["arguments"])
        if not isinstance(value, numbers.Real):
            return {"reason": f"the reward must be a number in [0, 1], got a {type(value).__name__}"}
        value = float(value)
        with contextlib.suppress(ValueError, AttributeError):  # closed or replaced
            sys.stdout.flush()
        return {"value": value}
    except MemoryError:
        space.clear()  # the traceback and the globals hold what filled the memory: now both are gone
    except BaseException as error:
        return {"reason": describe(error, name)}
    return {"reason": f"took more than {memory_mib} MiB of memory"}


def describe(error: BaseException, name: str) -> str:
    """One line: the last line of ``name`` that was running, the kind, and the beginning of the message."""
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    where = f"line {places[-1]}: " if places else ""
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be read)"
    return f"{where}{type(error).__name__}: {text[:LONGEST_REASON]}"


def limit(which: int, most: int) -> None:
    """Lower a limit, the hard one too; where the system has it no lower than that, it stays."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (most, most))


def occupied() -> int:
    """Bytes of address space of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 28


def children() -> list[int]:
    """Processes whose parent this one is."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            if entry.isdigit():
                with open(f"/proc/{entry}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                        found.append(int(entry))
    return found


def drain(fd: int) -> bytes:
    """What a pipe holds now; b'' at its end too."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def send(fd: int, value: Any) -> None:
    """Write one frame."""
    data = json.dumps(value).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """One frame, or None at the end."""
    head = read(fd, 4)
    return None if head is None else json.loads(read(fd, struct.unpack(">I", head)[0]) or b"null")


def read(fd: int, count: int) -> bytes | None:
    """``count`` bytes, or None at the end."""
    data = b""
    while len(data) < count:
        chunk = os.read(fd, count - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def main() -> None:
    """Settings are the first argument, calls come on standard input, answers go to standard output."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides what Ctrl-C ends
    try:
        for name in (*PRELOADED, *settings["preload"]):
            importlib.import_module(name)
        worker = Worker(settings)
    except BaseException as error:
        send(answers, {"error": describe(error, "")})
        return
    gc.freeze()  # forks need not copy what the collector would otherwise mark
    worker.serve(requests, answers)


if __name__ == "__main__":
    main()
