"""Random system calls from inside the sandbox, watched from outside.

    python -m tests.support.fuzz_sandbox --minutes 10

Each call of the sandbox is a program that makes system calls for some seconds: any number (those of
the list, those not, those that do not exist, with the bits of other calling conventions), with
arguments that are random, small, of the descriptors it has, flags and commands of known escapes, or
pointers to paths, names and structures that mean
something outside: another process, a file, a terminal, sockets, System V objects
(tests/support/sandbox_world.py).

Three watchers, as root and as a user in turn:

    the things outside     compared with what they were after every call of the sandbox
    strace -f              where it is installed, every successful call of the fuzzing process is
                           written down and has to be on the list that the filter was made from,
                           with a path that is its own or the interpreter's
    the keeper             has to go on answering, and no process may stay

Prints what was done; exits with 1 at the first thing that got out, with the seed that made it.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nvfp4.rl.rewards.filter import numbers
from tests.support.sandbox_world import Account, Outside

SECONDS = 2  # of each call of the sandbox
CALLS = 5  # of each round

PROGRAM = """
import ctypes, os, random, signal, struct, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
LISTED = {listed!r}
LEAVE_OUT = {left_out!r}
def reward(seed, file, lock, pid, terminal, port, name, memory, semaphore, queue, folder):
    dice = random.Random(seed)
    signal.signal(signal.SIGALRM, lambda *a: None)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)  # calls that block are interrupted
    texts = [file, lock, terminal, folder, file + 'x', '/', '.', '..', 'mine', '/proc/self/mem',
    '/proc/1/root',
             f'/proc/{{pid}}/mem', f'/proc/{{pid}}/environ', '/dev/tty', '/dev/null',
             '/etc/shadow', '/etc/passwd',
             '/dev/pts/0', '/dev/shm/x', '/tmp/nvfp4-fuzz', 'user.kept', 'tmpfs', '/bin/sh', '',
             '../' * 9 + file]
    buffers = [ctypes.create_string_buffer(text.encode() + b'\\0', 1 << 14) for text in texts]
    address = struct.pack('HH4s8x', 2, port >> 8 | (port & 255) << 8, bytes([127, 0, 0, 1]))
    abstract = struct.pack('H', 1) + b'\\0' + name.encode()
    typed = ctypes.create_string_buffer(b'x' * 64, 1 << 14)
    shapes = [address, abstract, struct.pack('Hhh', 0, 1, 0), struct.pack('l8s', 1, b'hello'),
    b'\\xff' * 64,
              bytes(256), struct.pack('QII', ctypes.addressof(typed), 1, 0), struct.pack('QII',
              0x80, 0, 0) + bytes(16),
              struct.pack('QQ', ctypes.addressof(typed), 64), struct.pack('I', 0x10) + bytes(60),
              struct.pack('Qiiii', 0x3f, 0, 9, 0, 0) + bytes(64)]
    buffers += [ctypes.create_string_buffer(shape, 1 << 14) for shape in shapes] + [typed]
    pointers = [ctypes.addressof(buffer) for buffer in buffers]
    numbers = [*range(11), 16, 17, 64, 256, 1024, 4096, -1, -2, -3, -100, 1 << 31, 1 << 32, 1 << 63]
    things = [pid, 1, os.getpid(), -pid, memory, semaphore, queue, port]
    commands = [0x5412, 0x540e, 0x5421, 0x5452, 0x8901, 0x8902, 0x40086602, 0x401c5820, 0x4004667f,
    8, 10, 15, 1024,
                1026, 1031, 36, 0x3d0f00, 0x10000, 0x10000000, 0x20000000, 0x40000000, 0o2, 0o101,
                0o1101, 0o20000,
                0x1000, 0x40000, 0x80000, 17, 9, 19, 0x16, 0x26, 0x36, 0x4206, 0x4207, 1 << 12,
                1 << 13]
    known = list(LISTED)
    kinds = [lambda: dice.choice(pointers), lambda: dice.choice(numbers),
    lambda: dice.choice(things),
             lambda: dice.choice(commands), lambda: dice.getrandbits(dice.choice((3, 8, 16, 32,
             64))),
             lambda: dice.choice(pointers) + dice.randrange(64)]
    weights = (8, 6, 4, 5, 3, 1)
    end = time.monotonic() + {seconds}
    made = 0
    while time.monotonic() < end:
        for _ in range(64):
            wide = dice.randrange(0, 1 << dice.randrange(1, 30))
            number = dice.choice((dice.choice(known), dice.randrange(0, 480), wide))
            if number in LEAVE_OUT:
                continue
            words = [dice.choices(kinds, weights)[0]() & (1 << 64) - 1 for _ in range(6)]
            arguments = [ctypes.c_ulong(word) for word in words]
            libc.syscall(ctypes.c_long(number), *arguments)
            made += 1
    return made / 1e9
"""

SUICIDAL = (
    *(
        "exit",
        "exit_group",
        "rt_sigreturn",
        "munmap",
        "mprotect",
        "mremap",
        "mmap",
        "brk",
        "madvise",
    ),
    *(
        "pause",
        "rt_sigsuspend",
        "rt_sigtimedwait",
        "restart_syscall",
        "set_robust_list",
        "sigaltstack",
    ),
    *(
        "read",
        "readv",
        "preadv",
        "pread64",
        "recvfrom",
        "poll",
        "ppoll",
        "select",
        "pselect6",
        "epoll_wait",
    ),
    *(
        "epoll_pwait",
        "nanosleep",
        "clock_nanosleep",
        "futex",
        "clone",
        "rseq",
        "close",
        "close_range",
        "dup2",
    ),
    *("dup3", "alarm", "setitimer", "rt_sigaction", "rt_sigprocmask", "getrandom", "sendfile"),
    *("write", "writev", "pwritev", "pwrite64", "sendto", "copy_file_range", "dup", "fcntl"),
)
"""Calls that end, block or blind the program that makes them at random; in one of four rounds they
are made too."""


KILLED_BY_THE_KERNEL = {335, 336} if platform.machine() == "x86_64" else set()
"""uretprobe and uprobe: Linux 6.14 lets them past any filter, since they end whoever makes them
with SIGILL."""


def fuzz(
    account: Account, seed: int, seconds: int, folder: Path, trace: Path | None
) -> tuple[int, str]:
    """One round: the number of system calls made by calls that ended well, and how all ended.

    AssertionError if anything got out.
    """
    listed = numbers(platform.machine(), writes=True)
    wild = seed % 4 == 3
    left_out = (
        set()
        if wild
        else {listed[name] for name in SUICIDAL if name in listed} | KILLED_BY_THE_KERNEL
    )
    folder.mkdir()
    outside = Outside(folder, account.uid)
    tracer = start_tracer(account.process.pid, trace) if trace is not None else None
    try:
        source = PROGRAM.format(listed=list(listed.values()), left_out=left_out, seconds=seconds)
        things = (outside.victim.pid, outside.terminal, outside.port, outside.name[1:])
        shared = (outside.memory, outside.semaphore, outside.queue)
        paths = (str(outside.file), str(outside.lock))
        made, ends = 0, collections.Counter[str]()
        for i in range(CALLS):
            reward, reason = account.run(
                source, seed * CALLS + i, *paths, *things, *shared, str(outside.folder)
            )
            made += round(reward * 1e9)
            ends[reason or "to the end"] += 1
        after = outside.state()
        changed = {
            key: (outside.before[key], value)
            for key, value in after.items()
            if value != outside.before[key]
        }
        assert not changed, changed
        assert account.run("def reward(): return 1.0") == (1.0, None), "the keeper does not go on"
    finally:
        outside.close()
        if tracer is not None:
            tracer.terminate()
            tracer.wait()
    return made, ", ".join(f"{how} {count}" for how, count in ends.items())


def start_tracer(pid: int, trace: Path) -> subprocess.Popen[bytes]:
    """strace on the driver and all that it has started, successful calls only."""
    pids = [arguments for one in family(pid) for arguments in ("-p", str(one))]
    command = ["strace", "-f", "-z", "-s", "96", "-e", "signal=none", "-o", str(trace), *pids]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not all(traced(one) for one in family(pid)):
        assert tracer.poll() is None, "strace does not start"
        time.sleep(0.05)
    return tracer


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
PATHS = {
    "open",
    "openat",
    "stat",
    "lstat",
    "newfstatat",
    "statx",
    "access",
    "faccessat",
    "faccessat2",
    "readlink",
}
CHANGES = {
    "creat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "truncate",
}


def check_trace(trace: Path) -> collections.Counter[str]:
    """Successful calls by name of the processes that put the filter in force, after they had;
    AssertionError for one that is not on the list, or that changes what is not the call's own."""
    listed = {*numbers(platform.machine(), writes=True)} | {"fstatat64", "prlimit"}
    filtered: set[str] = set()
    made: collections.Counter[str] = collections.Counter()
    with trace.open(errors="replace") as file:
        for line in file:
            match = LINE.match(line)
            if match is None:
                continue
            pid, name, rest = match.groups()
            if pid not in filtered:
                if name in ("prctl", "seccomp") and "FILTER" in rest:
                    filtered.add(pid)
                continue
            made[name] += 1
            assert name in listed, line
            # with which the other flags mean nothing
            opened = name in ("open", "openat") and "O_PATH" not in rest
            if name in CHANGES or (opened and re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", rest)):
                # of a relative one only the folder of the call can be meant
                for path in QUOTED.findall(rest):
                    place = os.path.normpath(path).replace("//", "/")
                    assert not place.startswith("/") or place.startswith(("/call", "/dev/null")), (
                        line
                    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    accounts = [Account(root) for root in ((True, False) if os.geteuid() == 0 else (False,))]
    users = [account.uid for account in accounts]
    tracing = shutil.which("strace") is not None
    print(
        f"{platform.machine()}, Linux {platform.release()}, users {users}, strace {tracing}",
        flush=True,
    )
    end, seed, total = time.monotonic() + options.minutes * 60, options.seed, 0
    made: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="nvfp4-fuzz-") as name:
        os.chmod(name, 0o755)
        while time.monotonic() < end:
            # half without: it is ten times as slow
            trace = Path(name) / "trace" if tracing and seed % 2 == 0 else None
            try:
                count, how = fuzz(
                    accounts[seed // 2 % len(accounts)],
                    seed,
                    SECONDS,
                    Path(name) / str(seed),
                    trace,
                )
                if trace is not None:
                    made += check_trace(trace)
            except AssertionError as error:
                print(f"seed {seed}: got out: {error}", flush=True)
                sys.exit(1)
            total += count
            print(f"seed {seed}: {count} calls, {how}", flush=True)
            seed += 1
    for account in accounts:
        account.close()
    print(f"{total} counted calls in {seed - options.seed} rounds, none reached anything outside")
    print(f"{made.total()} traced calls succeeded, all of the list: {dict(made.most_common())}")


if __name__ == "__main__":
    main()
