"""Landlock: a process gives up all files but those that it names, for good; it needs no privileges.

Linux 5.13 has it (ABI 1), later kernels can forbid more:

    ABI 2    moving between folders        ABI 5    ioctl of devices
    ABI 3    truncation                    ABI 6    signals and abstract sockets to outside
    ABI 4    TCP

All that the running kernel knows is forbidden, whatever the ABI, and then allowed again below the
named folders. A ruleset names inodes by descriptor, not paths, so it is indifferent to mounts made
later. Source: linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

CREATE, ADD, RESTRICT = 444, 445, 446
"""landlock_create_ruleset, _add_rule, _restrict_self; on every architecture."""

VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH

FILE_RIGHTS = (13, 14, 15, 15, 16)
"""Of LANDLOCK_ACCESS_FS_*, how many bits ABI 1, 2, ... know: REFER came with 2, TRUNCATE with 3,
IOCTL_DEV with 5."""

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
READ = READ_FILE | READ_DIR
CHANGE = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE

TCP = 0b11  # bind, connect
SCOPES = 0b11  # abstract sockets, signals


def abi(libc: ctypes.CDLL) -> int:
    """Which Landlock the kernel has; 0: none, or it is switched off."""
    return max(0, libc.syscall(CREATE, None, ctypes.c_size_t(0), VERSION))


def restrict(libc: ctypes.CDLL, version: int, rules: Sequence[tuple[int, int]]) -> None:
    """Keep only these (descriptor of a folder or file, rights); OSError if the kernel refuses.

    version: what ``abi`` said, at least 1. ``PR_SET_NO_NEW_PRIVS`` has to be set.
    """
    handled = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS)) - 1]) - 1

    # struct landlock_ruleset_attr has grown; a kernel takes the part that it knows
    fields = [handled, TCP, SCOPES][: 1 + (version >= 4) + (version >= 6)]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _call(libc, CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)

    for fd, rights in rules:
        # struct landlock_path_beneath_attr is packed
        rule = struct.pack("=Qi", rights & handled, fd)
        _call(libc, ADD, ruleset, PATH_BENEATH, rule, 0)
    _call(libc, RESTRICT, ruleset, 0)


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    """The result of a system call; OSError if it is below 0."""
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock call {number}")
    return result
