"""The few calls to the Linux kernel that the standard library lacks, each an exception if it fails.

Small enough that ctypes serves better than bubblewrap or nsjail, which would have to be installed,
start a program per call (0.1 s of Python each) where a fork of a warm one takes a millisecond, and
know neither Landlock nor this filter. What they do is what namespaces.py and walls.py do, in the
same order.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

# linux/prctl.h
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP = 1, 4, 22, 24
CHILD_SUBREAPER, NO_NEW_PRIVS, CAP_AMBIENT, CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4

PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # asm/unistd.h
CAPABILITIES_VERSION = 0x20080522  # linux/capability.h, _LINUX_CAPABILITY_VERSION_3
LAST_CAPABILITY = 63  # as many as the kernel's type has bits; those that it lacks give EINVAL

LIBC: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def prctl(option: int, value: int, *more: int) -> None:
    """OSError if the kernel refuses."""
    arguments = [ctypes.c_ulong(each) for each in (value, *more, 0, 0, 0)[:4]]
    _check(LIBC.prctl(option, *arguments), f"prctl {option}")


def unshare(flags: int) -> None:
    """Enter namespaces of one's own; OSError if the kernel refuses."""
    _check(LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount, as mount(2) does; OSError if the kernel refuses."""
    texts = [os.fsencode(text) if text else None for text in (source, target, kind, data)]
    _check(LIBC.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount on {target}")


def enter_root(folder: str) -> None:
    """``folder``, a mount, becomes /, and what was / is gone.

    pivot_root on itself, then let the lower one go.
    """
    detach = 2  # MNT_DETACH
    os.chdir(folder)
    _check(LIBC.syscall(PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(LIBC.umount2(b".", detach), "umount")
    os.chdir("/")


def drop_bounding_set() -> None:
    """No capability can come back, by no program with file capabilities either.

    Only the privileged can do so, or need to.
    """
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)


def drop_capabilities() -> bool:
    """No capability in any set; True if the kernel says that none is left."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    _check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    LIBC.prctl(CAP_AMBIENT, ctypes.c_ulong(CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)
    left = (ctypes.c_uint32 * 6)(*[1] * 6)
    _check(LIBC.capget(header, left), "capget")
    return not any(left)


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def load_filter(instructions: bytes) -> None:
    """Put a seccomp filter in force, for good."""
    program = FilterProgram(len(instructions) // 8, instructions)
    mode = 2  # linux/seccomp.h, SECCOMP_MODE_FILTER
    _check(LIBC.prctl(SECCOMP, ctypes.c_ulong(mode), ctypes.byref(program), 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    """OSError, naming ``what``, unless the result is 0."""
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
