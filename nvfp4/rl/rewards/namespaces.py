"""A world of its own for a worker: processes, mounts, network, an almost empty root.

    keeper -> fork: unshare(user, pid, mount, network, IPC, UTS) -> the keeper writes who is who
              -> fork: process 1

    process 1: a tmpfs, into which are bound, read-only, at the paths that they have,
                   the interpreter's folders and what rewards name
                   /dev/null, zero, urandom
               and /call, where each call mounts a tmpfs of its own;
               then pivot_root into it

There is no /proc, no home, no socket, no terminal, and no process but the worker's.

A plain user may do all this inside a user namespace; so may root, to whom only the ids 0 and 65534
are given. Where user namespaces are switched off, root does it without, and where neither goes
(most containers) Landlock has to serve alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable

from nvfp4.rl.rewards import kernel

# linux/sched.h
NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
EVERY = NEW_MOUNTS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_PID | NEW_NETWORK

# linux/mount.h
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18
KEPT = {8: NO_EXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}
"""Flags of statvfs that a remount must repeat, as they may be locked: noexec, *atime."""

NOBODY = 65534
FOLDER = "/call"
"""Of a call; not /tmp, where what a reward names may lie."""

FOLDER_MIB, FOLDER_FILES = 16, 1024
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def write_maps(pid: int, user: int, group: int) -> None:
    """Who is who in a user namespace: root keeps 0 and nobody, a user becomes nobody."""
    both = f"0 0 1\n{NOBODY} {NOBODY} 1"
    users = both if user == 0 else f"{NOBODY} {user} 1"
    groups = both if user == 0 else f"{NOBODY} {group} 1"
    lines = [("setgroups", "deny")] if user else []
    for name, text in (*lines, ("uid_map", users), ("gid_map", groups)):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def interpreter_paths() -> list[str]:
    """What Python needs to run and import: its library, sys.path, folders of shared libraries."""
    paths = {os.path.dirname(os.__file__), *(path for path in sys.path if os.path.isdir(path))}

    # the shared libraries that are loaded now
    with open("/proc/self/maps") as file:
        for line in file:
            name = line.split(maxsplit=5)[-1].strip()
            if name.startswith("/") and (name.endswith(".so") or ".so." in name):
                paths.add(os.path.dirname(name))

    files = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
    return sorted(paths - {"/"} | {path for path in files if os.path.exists(path)})


def build_root(paths: Iterable[str]) -> None:
    """Make a root that shows ``paths``, read-only, and go there; OSError if it is refused."""
    kernel.mount("none", "/", "", RECURSIVE | PRIVATE)  # nothing of this is seen outside
    new = next(each for each in ("/tmp", "/var/tmp", "/mnt", "/run") if os.path.isdir(each))

    # sources by descriptor, since the new root covers a folder that may hold some of them
    wanted = [*paths, *DEVICES]
    real = sorted({os.path.realpath(path) for path in wanted})
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in real}
    links = {link: os.readlink(link) for path in wanted for link in _links(path)}
    kernel.mount("tmpfs", new, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")

    # a folder inside one that is bound already is there with it, and so is a link
    bound: list[str] = []
    for path, fd in sources.items():
        if not any(path.startswith(each + "/") for each in bound):
            _bind(f"/proc/self/fd/{fd}", new + path)
            bound.append(path)
        os.close(fd)
    for link, target in sorted(links.items()):
        if not any(link.startswith(each + "/") for each in bound):
            os.makedirs(os.path.dirname(new + link), exist_ok=True)
            os.symlink(target, new + link)

    # an empty folder for calls; then this is all there is, and none of it can be written
    os.mkdir(new + FOLDER)
    kernel.enter_root(new)
    kernel.mount("none", "/", "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)


def mount_folder(hidden: Iterable[str]) -> None:
    """Give one call its own mounts: an empty folder, and nothing where ``hidden`` paths were."""
    kernel.unshare(NEW_MOUNTS)
    covered: list[str] = []
    for path in sorted(hidden):
        if any(path.startswith(each + "/") for each in covered):
            continue  # gone with the folder above it
        covered.append(path)
        if os.path.isdir(path):
            kernel.mount("tmpfs", path, "tmpfs", READ_ONLY | NO_SUID | NO_DEVICES, "size=4k,mode=0")
        else:
            kernel.mount("/dev/null", path, "", BIND)

    size = f"size={FOLDER_MIB}m,nr_inodes={FOLDER_FILES},mode=700,uid={NOBODY},gid={NOBODY}"
    kernel.mount("tmpfs", FOLDER, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, size)
    os.chdir(FOLDER)


def _bind(source: str, target: str) -> None:
    """Show a folder or file at ``target``, read-only."""
    folder = stat.S_ISDIR(os.stat(source).st_mode)
    device = stat.S_ISCHR(os.stat(source).st_mode)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o644))

    # a bind mount takes its flags by a second call
    kernel.mount(source, target, "", BIND)
    kept = sum(flag for seen, flag in KEPT.items() if os.statvfs(target).f_flag & seen)
    flags = REMOUNT | BIND | READ_ONLY | NO_SUID | kept | (0 if device else NO_DEVICES)
    kernel.mount("none", target, "", flags)


def _links(path: str) -> list[str]:
    """The symbolic links on the way to a path, and on the way to what they lead to."""
    found: list[str] = []
    done = "/"
    parts = path.strip("/").split("/")
    while parts and len(found) < 40:  # as many as the kernel follows
        step = os.path.normpath(os.path.join(done, parts.pop(0)))
        if os.path.islink(step):
            found.append(step)
            parts = os.readlink(step).split("/") + parts
            if os.readlink(step).startswith("/"):
                done = "/"
        else:
            done = step
    return found
