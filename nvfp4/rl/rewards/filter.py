"""The system calls that a reward may make: an allow-list as a seccomp filter.

A reward computes and returns. What that takes (memory, threads, clocks, its own descriptors,
reading files, files in a folder of its own) is listed; everything else is refused, numbers that did
not exist when this was written included.

    another architecture, x32           the process is killed: numbers mean other calls there
    on the list                         allowed, if its arguments pass
    clone3, new calls (424 and up)      ENOSYS: arguments lie behind a pointer; libc does without
    all others                          EPERM

Some calls are doors to much more than they are listed for, so their arguments are looked at:

    ioctl                types into terminals, sets file attributes
    fcntl                sends signals, takes locks
    prctl, clone         attributes of a process; processes, namespaces
    socketpair           may only be the self-pipe of asyncio; socket is refused altogether
    getsockopt           opens the process at the other end of the channel (SO_PEERPIDFD)
    sendto, recvfrom     MSG_OOB: out-of-band bytes, which nobody needs and which have led out of
                         other sandboxes (CVE-2025-38236)

Why not a list of what is forbidden: it cannot be finished. setxattrat, removexattrat and
file_setattr came with Linux 6.13 and 6.17 and changed files past such a list; ioctl and fcntl did
so by their arguments, and killed processes. Tried against one, 20 of 20 attempts got through as
root, 18 as a user. And uretprobe (335) passes every filter since Linux 6.14, by design, and ends
its maker with SIGILL.

A filter sees registers, not memory: paths are for Landlock and the mounts (landlock.py, walls.py).
Where no folder may be written, open itself refuses to write. Sources: linux/seccomp.h,
linux/bpf_common.h, asm/unistd_64.h (x86-64) and asm-generic/unistd.h (aarch64), compared with those
headers by tests.
"""

from __future__ import annotations

import errno
import os
import platform
import struct

KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x50000  # SECCOMP_RET_KILL_PROCESS, _ALLOW, _ERRNO
DENY, ABSENT = ERROR | errno.EPERM, ERROR | errno.ENOSYS

LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
"""linux/bpf_common.h: ld, and, jeq, jge, jset, ret."""

NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; an argument has 8 bytes, little endian."""

X32 = 0x40000000  # __X32_SYSCALL_BIT

NEW_CALLS = 424
"""From here on architectures share numbers, and user space expects older kernels, too."""

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h; the order of the columns below."""

# Name, number on x86-64, number on aarch64; the most frequent first, since the list is walked.
CALLS = """
read 0 63  write 1 64  mmap 9 222  munmap 11 215  mprotect 10 226  brk 12 214  futex 202 98
close 3 57  openat 257 56  newfstatat 262 79  fstat 5 80  lseek 8 62  ioctl 16 29  fcntl 72 25
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  getdents64 217 61  open 2 -
stat 4 -  lstat 6 -  access 21 -  madvise 28 233  mremap 25 216  clock_gettime 228 113
getrandom 318 278  getpid 39 172  gettid 186 178  readv 19 65  writev 20 66  pread64 17 67
pwrite64 18 68  preadv 295 69  pwritev 296 70  sendfile 40 71  copy_file_range 326 285
getdents 78 -  readlink 89 -  readlinkat 267 78  statx 332 291  faccessat 269 48
faccessat2 439 439  getcwd 79 17  chdir 80 49  fchdir 81 50  umask 95 166  fadvise64 221 223
dup 32 23  dup2 33 -  dup3 292 24  pipe 22 -  pipe2 293 59  close_range 436 436  poll 7 -
ppoll 271 73  select 23 -  pselect6 270 72  epoll_create1 291 20  epoll_ctl 233 21
epoll_wait 232 -  epoll_pwait 281 22  socketpair 53 199  sendto 44 206  recvfrom 45 207
getsockopt 55 209  shutdown 48 210  clone 56 220  exit 60 93  exit_group 231 94
set_robust_list 273 99  rseq 334 293  sched_yield 24 124  sched_getaffinity 204 123
membarrier 324 283  mincore 27 232  getcpu 309 168  rt_sigpending 127 136  rt_sigsuspend 130 133
rt_sigtimedwait 128 137  sigaltstack 131 132  pause 34 -  restart_syscall 219 128  alarm 37 -
getitimer 36 102  setitimer 38 103  nanosleep 35 101  clock_nanosleep 230 115
clock_getres 229 114  gettimeofday 96 169  time 201 -  times 100 153  getppid 110 173
getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177  getresuid 118 148
getresgid 120 150  getgroups 115 158  getpgrp 111 -  getrlimit 97 163  prlimit64 302 261
getrusage 98 165  uname 63 160  sysinfo 99 179  prctl 157 167
"""

# Only where the call has a folder of its own and can reach no other that may be written.
WRITING_CALLS = """
creat 85 -  mkdir 83 -  mkdirat 258 34  rmdir 84 -  unlink 87 -  unlinkat 263 35  rename 82 -
renameat 264 38  renameat2 316 276  ftruncate 77 46  truncate 76 45  fsync 74 82  fdatasync 75 83
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ASYNC = 0o20000  # FASYNC: signals on input; the same on both machines
CLONE3 = 435

IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""asm-generic/ioctls.h: TCGETS, TIOCGWINSZ (isatty, size), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

FCNTLS = (0, 1, 2, 3, 4, 1030)
"""linux/fcntl.h: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; so no owner, signal,
lease or lock."""

SET_FLAGS = 4  # F_SETFL

PRCTLS = (15, 16)  # linux/prctl.h: PR_SET_NAME, PR_GET_NAME, of a thread

ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
"""asm-generic/mman-common.h: read ahead, DONTNEED, FREE, huge pages or not."""

FUTEXES = (0, 1, 3, 4, 5, 9, 10)
"""linux/futex.h: wait, wake, requeue, with bit sets; not the priority inheriting ones."""

FUTEX_COMMAND = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME

THREAD = 0x10F00 | 0x40000
"""linux/sched.h: CLONE_THREAD, _SIGHAND, _FILES, _FS, _VM, _SYSVSEM: pthread_create's."""

THREAD_MAY = THREAD | 0x80000 | 0x100000 | 0x200000 | 0x1000000 | 0x400000
"""And SETTLS, PARENT_SETTID, CHILD_CLEARTID, CHILD_SETTID, DETACHED."""

AF_UNIX, STREAM, STREAM_MAY = 1, 1, 0x80800  # SOCK_CLOEXEC, SOCK_NONBLOCK
SOL_SOCKET = 1

SOCKET_OPTIONS = (3, 4, 38, 39)
"""asm-generic/socket.h: SO_TYPE, SO_ERROR, SO_PROTOCOL, SO_DOMAIN; nothing of a peer."""

SEND_MAY = 0x40 | 0x4000  # linux/socket.h: MSG_DONTWAIT, MSG_NOSIGNAL
RECEIVE_MAY = 0x02 | 0x20 | 0x40 | 0x100  # MSG_PEEK, MSG_TRUNC, MSG_DONTWAIT, MSG_WAITALL
LARGEST_CLOCK = 15  # MAX_CLOCKS; larger ones (negative) are the clocks of other processes

ALL_BITS = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]
Program = list[Instruction]


def build_filter(
    machine: str | None = None,
    *,
    writes: bool = False,
    threads: bool = True,
) -> bytes | None:
    """The filter as an array of struct sock_filter; None for a machine without a column here.

    writes: files may be created and changed, since mounts or Landlock leave only the call's own
    folder to do so. threads: False refuses them, where nothing would bound their number.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    allowed = numbers(machine, writes=writes)

    # the architecture first: without it a number says nothing
    program: Program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]

    # each call with its own end; the accumulator holds the number until a body is entered
    checks = _checks(writes, threads)
    for name, number in allowed.items():
        body = [*checks.get(name, []), (RETURN, 0, 0, ALLOW)]
        program += [(EQUAL, 0, len(body), number), *body]

    # what is not listed
    program += [(AT_LEAST, 0, 1, NEW_CALLS), (RETURN, 0, 0, ABSENT), (RETURN, 0, 0, DENY)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def numbers(machine: str, *, writes: bool = False) -> dict[str, int]:
    """Name and number of each call on the list that the machine has."""
    words = (CALLS + (WRITING_CALLS if writes else "")).split()
    column = 1 + list(MACHINES).index(machine)
    found = {words[i]: words[i + column] for i in range(0, len(words), 3)}
    return {name: int(number) for name, number in found.items() if number != "-"}


def _checks(writes: bool, threads: bool) -> dict[str, Program]:
    """What has to hold for a call's arguments; each check returns if it does not."""
    opening = ASYNC if writes else ASYNC | WRITING
    clone = [
        *_one_of(_low(0), (THREAD,), mask=THREAD),
        *_no_bits(_low(0), ~THREAD_MAY & ALL_BITS),
    ]
    return {
        "ioctl": _one_of(_low(1), IOCTLS),
        "fcntl": [
            *_one_of(_low(1), FCNTLS),
            *_only_of(_low(1), SET_FLAGS, _no_bits(_low(2), ASYNC)),
        ],
        "prctl": _one_of(_low(0), PRCTLS),
        "madvise": _one_of(_low(2), ADVICE),
        "futex": _one_of(_low(1), FUTEXES, mask=FUTEX_COMMAND),
        "clone": clone if threads else [(RETURN, 0, 0, DENY)],
        "open": _no_bits(_low(1), opening),
        "openat": _no_bits(_low(2), opening),
        "socketpair": [
            *_one_of(_low(0), (AF_UNIX,)),
            *_one_of(_low(1), (STREAM,), mask=~STREAM_MAY & ALL_BITS),
        ],
        # to nobody but the other end
        "sendto": [*_no_bits(_low(3), ~SEND_MAY & ALL_BITS), *_null(4)],
        "recvfrom": _no_bits(_low(3), ~RECEIVE_MAY & ALL_BITS),
        "getsockopt": [*_one_of(_low(1), (SOL_SOCKET,)), *_one_of(_low(2), SOCKET_OPTIONS)],
        # a limit of one's own, not to be set
        "prlimit64": [*_one_of(_low(0), (0,)), *_null(2)],
        "sched_getaffinity": _one_of(_low(0), (0,)),
        "clock_gettime": _at_most(_low(0), LARGEST_CLOCK),
        "clock_getres": _at_most(_low(0), LARGEST_CLOCK),
        "clock_nanosleep": _at_most(_low(0), LARGEST_CLOCK),
    }


def _low(argument: int) -> int:
    """Offset of the lower half of an argument, which is all that the kernel reads of an int."""
    return ARGUMENTS + 8 * argument


def _one_of(offset: int, values: tuple[int, ...], mask: int = ALL_BITS) -> Program:
    """The word, masked, is one of these."""
    last = len(values) - 1
    tests = [(EQUAL, 1 + last - i, 0, value) for i, value in enumerate(values)]
    return [(LOAD, 0, 0, offset), (AND, 0, 0, mask), *tests, (RETURN, 0, 0, DENY)]


def _no_bits(offset: int, mask: int) -> Program:
    """None of these bits is set."""
    return [(LOAD, 0, 0, offset), (ANY_BIT, 0, 1, mask), (RETURN, 0, 0, DENY)]


def _only_of(offset: int, value: int, check: Program) -> Program:
    """The check where the word is ``value``; other calls leave anything in the argument."""
    return [(LOAD, 0, 0, offset), (EQUAL, 0, len(check), value), *check]


def _at_most(offset: int, value: int) -> Program:
    """The word, unsigned, is no larger."""
    return [(LOAD, 0, 0, offset), (AT_LEAST, 0, 1, value + 1), (RETURN, 0, 0, DENY)]


def _null(argument: int) -> Program:
    """A pointer is null, both halves of it."""
    return [*_one_of(_low(argument), (0,)), *_one_of(_low(argument) + 4, (0,))]
