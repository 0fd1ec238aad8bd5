"""The system calls that a reward function may not make: a seccomp filter, which needs no privileges.

A reward function computes and returns. It may read files, allocate and start threads; it may not start processes, touch
other ones, reach the network, change files, leave things behind in the kernel, or configure the machine.
"""

from __future__ import annotations

import errno
import os
import platform
import struct

KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x50000  # linux/seccomp.h: RET_KILL_PROCESS, RET_ALLOW, RET_ERRNO
DENY, ABSENT = ERROR | errno.EPERM, ERROR | errno.ENOSYS
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h: ld abs, jeq, jge, jset, ret
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes
CLONE_THREAD = 0x10000  # linux/sched.h
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OTHER_ABI = 0x40000000  # x32's numbers start here on x86-64, and nowhere else is one so large

# asm/unistd.h; from 424 on the numbers are those of every architecture
COMMON = """
pidfd_send_signal 424 io_uring_setup 425 open_tree 428 move_mount 429 fsopen 430 fsconfig 431 fsmount 432 fspick 433
pidfd_open 434 pidfd_getfd 438 process_madvise 440 mount_setattr 442 memfd_secret 447 fchmodat2 452
"""
X86_64 = """
shmget 29 socket 41 socketpair 53 fork 57 vfork 58 execve 59 kill 62 semget 64 msgget 68 truncate 76 ftruncate 77
rename 82 mkdir 83 rmdir 84 creat 85 link 86 unlink 87 symlink 88 chmod 90 fchmod 91 chown 92 fchown 93 lchown 94
ptrace 101 syslog 103 setpgid 109 setsid 112 rt_sigqueueinfo 129 utime 132 mknod 133 personality 135 setpriority 141
sched_setscheduler 144 vhangup 153 pivot_root 155 adjtimex 159 setrlimit 160 chroot 161 acct 163 settimeofday 164
mount 165 umount2 166 swapon 167 swapoff 168 reboot 169 sethostname 170 setdomainname 171 iopl 172 ioperm 173
init_module 175 delete_module 176 quotactl 179 setxattr 188 lsetxattr 189 fsetxattr 190 removexattr 197
lremovexattr 198 fremovexattr 199 tkill 200 clock_settime 227 tgkill 234 utimes 235 mq_open 240 mq_unlink 241
kexec_load 246 add_key 248 request_key 249 keyctl 250 ioprio_set 251 mkdirat 258 mknodat 259 fchownat 260
futimesat 261 unlinkat 263 renameat 264 linkat 265 symlinkat 266 fchmodat 268 unshare 272 utimensat 280 fallocate 285
rt_tgsigqueueinfo 297 perf_event_open 298 fanotify_init 300 open_by_handle_at 304 clock_adjtime 305 setns 308
process_vm_readv 310 process_vm_writev 311 kcmp 312 finit_module 313 sched_setattr 314 renameat2 316 memfd_create 319
kexec_file_load 320 bpf 321 execveat 322 userfaultfd 323
"""
AARCH64 = """
setxattr 5 lsetxattr 6 fsetxattr 7 removexattr 14 lremovexattr 15 fremovexattr 16 mknodat 33 mkdirat 34 unlinkat 35
symlinkat 36 linkat 37 renameat 38 umount2 39 mount 40 pivot_root 41 truncate 45 ftruncate 46 fallocate 47 chroot 51
fchmod 52 fchmodat 53 fchownat 54 fchown 55 quotactl 60 utimensat 88 acct 89 personality 92 unshare 97 kexec_load 104
init_module 105 delete_module 106 clock_settime 112 syslog 116 ptrace 117 sched_setscheduler 119 kill 129 tkill 130
tgkill 131 rt_sigqueueinfo 138 setpriority 140 reboot 142 setpgid 154 setsid 157 sethostname 161 setdomainname 162
setrlimit 164 settimeofday 170 adjtimex 171 mq_open 180 mq_unlink 181 msgget 186 semget 190 shmget 194 socket 198
socketpair 199 add_key 217 request_key 218 keyctl 219 execve 221 swapon 224 swapoff 225 rt_tgsigqueueinfo 240
perf_event_open 241 fanotify_init 262 open_by_handle_at 265 clock_adjtime 266 setns 268 process_vm_readv 270
process_vm_writev 271 kcmp 272 finit_module 273 sched_setattr 274 renameat2 276 memfd_create 279 bpf 280 execveat 281
userfaultfd 282 kexec_file_load 294
"""
CLONE3, OPENAT2 = 435, 437  # their flags are behind a pointer; the C library does without them where they are absent

# audit architecture (linux/audit.h), denied, clone, prlimit64, and (call, place of its flags) of those that open files
MACHINES: dict[str, tuple[int, str, int, int, tuple[tuple[int, int], ...]]] = {
    "x86_64": (0xC000003E, X86_64, 56, 302, ((2, 1), (257, 2))),
    "aarch64": (0xC00000B7, AARCH64, 220, 261, ((56, 2),)),
}

Instruction = tuple[int, int, int, int]


def build_filter(machine: str | None = None) -> bytes | None:
    """The filter as an array of struct sock_filter, or None for a machine whose system calls are not listed here.

    Denied calls fail with EPERM. Calls of another architecture end the process: their numbers mean other things.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    architecture, denied, clone, prlimit, opens = MACHINES[machine]
    program: list[Instruction] = [
        *_when(ARCHITECTURE, EQUAL, architecture, otherwise=KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, DENY),
    ]
    for number in _numbers(COMMON + denied):
        program += _for(number, [(RETURN, 0, 0, DENY)])
    for number in (CLONE3, OPENAT2):
        program += _for(number, [(RETURN, 0, 0, ABSENT)])
    program += _for(clone, [*_when(ARGUMENTS, ANY_BIT, CLONE_THREAD, otherwise=DENY), (RETURN, 0, 0, ALLOW)])
    for number, place in opens:
        flags = ARGUMENTS + 8 * place
        program += _for(
            number, [(LOAD, 0, 0, flags), (ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
        )
    # asking for a limit (the new one is a null pointer) is fine, setting it is not
    limit = ARGUMENTS + 8 * 2
    low, high = _when(limit, EQUAL, 0, otherwise=DENY), _when(limit + 4, EQUAL, 0, otherwise=DENY)
    program += _for(prlimit, [*low, *high, (RETURN, 0, 0, ALLOW)])
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _numbers(table: str) -> list[int]:
    return [int(word) for word in table.split()[1::2]]


def _for(number: int, body: list[Instruction]) -> list[Instruction]:
    """``body``, which returns in the end, if the number in the accumulator is this one."""
    return [(EQUAL, 0, len(body), number), *body]


def _when(offset: int, test: int, value: int, otherwise: int) -> list[Instruction]:
    """Go on if the word at ``offset`` passes, else return."""
    return [(LOAD, 0, 0, offset), (test, 1, 0, value), (RETURN, 0, 0, otherwise)]
