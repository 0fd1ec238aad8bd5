"""The system call filter of both machines, run here instruction by instruction, so that no kernel
is needed."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from nvfp4.rl.rewards.filter import (
    ABSENT,
    ALLOW,
    ASYNC,
    DENY,
    KILL,
    MACHINES,
    build_filter,
    numbers,
)

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}
both = pytest.mark.parametrize("machine", MACHINES)


def verdict(
    machine: str, name: str | int, *arguments: int, architecture: int | None = None, **kinds: bool
) -> int:
    """What the filter returns for a call."""
    number = name if isinstance(name, int) else numbers(machine, writes=True)[name]
    six = [value & 0xFFFFFFFFFFFFFFFF for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack(
        "=IIQ6Q", number, MACHINES[machine] if architecture is None else architecture, 0, *six
    )
    program = list(struct.iter_unpack("=HBBI", build_filter(machine, **kinds) or b""))
    place = accumulator = 0
    while True:
        code, yes, no, k = program[place]
        place += 1
        if code == 0x06:
            return k
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[
                code
            ]
            place += yes if holds else no


@both
def test_programs_are_well_formed(machine: str) -> None:
    """Whole instructions, jumps inside, a return at the end; none for machines not known."""
    for kinds in ({}, {"writes": True}, {"threads": False}):
        program = list(struct.iter_unpack("=HBBI", build_filter(machine, **kinds) or b""))
        assert 100 < len(program) < 4096
        for place, (code, yes, no, _) in enumerate(program):
            assert code in (0x20, 0x54, 0x15, 0x35, 0x45, 0x06)
            assert place + 1 + max(yes, no) < len(program) or code == 0x06
        assert program[-1][0] == 0x06
    assert build_filter("pdp11") is None


@both
@pytest.mark.parametrize("writes", [False, True])
def test_every_number_is_decided_by_the_list(machine: str, writes: bool) -> None:
    """With arguments of 0: what is not listed is refused, and the largest numbers kill."""
    listed = set(numbers(machine, writes=writes).values())
    for number in (*range(700), 1000, 5000, 0x3FFFFFFF):
        given = verdict(machine, number, writes=writes)
        if number not in listed:
            assert given == (DENY if number < 424 else ABSENT), number
        else:
            assert given in (ALLOW, DENY), number
    for number in (0x40000000, 0x40000001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert verdict(machine, number) == KILL


@both
def test_other_architectures_kill(machine: str) -> None:
    for architecture in (0, 0x40000003, 0x40000028, *set(MACHINES.values()) - {MACHINES[machine]}):
        assert verdict(machine, "getpid", architecture=architecture) == KILL


@both
@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "ioctl",
            [(0, 0x5401), (1, 0x541B), (9, 0x5421)],
            [(0, 0x5412), (0, 0x40086602), (0, 0x540E), (0, 0)],
        ),
        (
            "fcntl",
            [
                (3, 3, 0xFFFFFFFFFFFFFFFF),
                (3, 1, ASYNC),
                (0, 1),
                (0, 3),
                (0, 4, 0o4000),
                (0, 1030, 9),
            ],
            [(0, 8), (0, 10), (0, 6), (0, 1024), (0, 4, 0o20000)],
        ),
        ("prctl", [(15,), (16,)], [(1,), (4,), (22,), (36,), (38,), (47,), (0x59616D61,)]),
        (
            "clone",
            [(0x3D0F00,), (0x50F00,)],
            [(17,), (0,), (0x10000,), (0x103D0F00,), (0x203D0F00,), (0x43D0F00,)],
        ),
        ("socketpair", [(1, 1), (1, 0x80801)], [(2, 1), (1, 2), (1, 5), (16, 3), (1, 0x1001)]),
        (
            "sendto",
            [(3, 7, 9, 0, 0, 0), (3, 7, 9, 0x4040)],
            [(3, 7, 9, 0, 1, 16), (3, 7, 9, 0, 1 << 32, 16), (3, 7, 9, 1), (3, 7, 9, 0x20000000)],
        ),
        (
            "recvfrom",
            [(3, 7, 9, 0), (3, 7, 9, 0x162)],
            [(3, 7, 9, 1), (3, 7, 9, 0x41), (3, 7, 9, 0x40000000)],
        ),
        (
            "getsockopt",
            [(3, 1, 3), (3, 1, 4)],
            [(3, 1, 17), (3, 1, 59), (3, 1, 77), (3, 6, 3), (3, 0, 4)],
        ),
        ("prlimit64", [(0, 7, 0, 9)], [(1, 7, 0, 9), (0, 7, 1, 0), (0, 7, 1 << 32, 0)]),
        ("sched_getaffinity", [(0, 8, 9)], [(1, 8, 9), (-1, 8, 9)]),
        ("clock_gettime", [(0,), (3,), (11,)], [(16,), (-6,), (-1,)]),
        ("futex", [(9, 128), (9, 0x189), (9, 1)], [(9, 6), (9, 134), (9, 11), (9, 13), (9, 2)]),
        ("madvise", [(9, 9, 4), (9, 9, 14)], [(9, 9, 100), (9, 9, 101), (9, 9, 12), (9, 9, 21)]),
    ],
)
def test_arguments_decide(
    machine: str, name: str, good: list[tuple[int, ...]], bad: list[tuple[int, ...]]
) -> None:
    """Of the calls that are doors to more; the upper half of an int is not looked at by the kernel
    either."""
    for arguments in good:
        assert verdict(machine, name, *arguments) == ALLOW, arguments
    for arguments in bad:
        assert verdict(machine, name, *arguments) == DENY, arguments
    junk = 0xDEAD << 32
    if name in ("ioctl", "fcntl"):
        assert verdict(machine, name, 0, bad[0][1] | junk) == DENY


@both
def test_files_are_opened_for_reading_only_where_nothing_may_be_written(machine: str) -> None:
    for flags in (1, 2, 0o100, 0o1000, 0o2001):
        assert verdict(machine, "openat", -100, 1, flags) == DENY
        assert verdict(machine, "openat", -100, 1, flags, writes=True) == ALLOW
    for kinds in ({}, {"writes": True}):
        assert verdict(machine, "openat", -100, 1, 0o20000, **kinds) == DENY  # signals on input
        assert verdict(machine, "openat", -100, 1, 0o2000000, **kinds) == ALLOW


@both
def test_threads_can_be_refused(machine: str) -> None:
    assert verdict(machine, "clone", 0x3D0F00) == ALLOW
    assert verdict(machine, "clone", 0x3D0F00, threads=False) == DENY


@both
def test_the_arm_list_lacks_nothing(machine: str) -> None:
    """ioprio_set and vhangup once stood on one list of two: now there is one list, of what is
    allowed."""
    for number in {"x86_64": (251, 153), "aarch64": (30, 58)}[machine]:
        assert verdict(machine, number) == DENY


@both
def test_numbers_are_those_of_the_headers(machine: str) -> None:
    """A wrong number would allow another call."""
    path = next((path for path in HEADERS[machine] if Path(path).exists()), None)
    if path is None:
        pytest.skip(f"the kernel's headers for {machine} are not installed")
    text = Path(path).read_text()
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    for name, number in numbers(machine, writes=True).items():
        assert known.get(name) in (None, str(number)), name
    missing = [name for name in numbers(machine, writes=True) if name not in known]
    assert len(missing) < 5, missing  # younger than the headers
