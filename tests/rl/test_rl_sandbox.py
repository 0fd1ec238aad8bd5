"""The walls: what a reward tries against things outside fails, as root and as a user, and leaves
them as they were.

Each attempt is the text of a function that returns 1.0 if it got through. The things outside are
real ones of the same account (tests/support/sandbox_world.py), and are looked at afterwards,
whatever the attempt says about itself.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from sandbox_world import Account, Outside

from nvfp4.rl.rewards import keeper

MACHINE = platform.machine()
if sys.platform != "linux" or MACHINE not in ("x86_64", "aarch64"):
    pytest.skip(f"the sandbox has no walls on {sys.platform} {MACHINE}", allow_module_level=True)


@pytest.fixture(scope="module", params=["root", "user"])
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    """As root and as a user; "root, no Landlock" leaves out a wall."""
    who, _, missing = request.param.partition(", no ")
    if who == "root" and os.geteuid():
        pytest.skip("this is not root")
    account = Account(who == "root", (missing,) if missing else ())
    yield account
    account.close()


degraded = pytest.mark.parametrize(
    "account",
    [
        f"{who}{missing}"
        for who in ("root", "user")
        for missing in ("", ", no Landlock", ", no namespaces")
    ],
    indirect=True,
)


@pytest.fixture(scope="module")
def made(account: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Outside]]:
    """The things outside of the attempts of this account, so far."""
    made: list[Outside] = []
    yield made
    for outside in made:
        outside.close()


@pytest.fixture
def outside(
    account: Account, made: list[Outside], tmp_path_factory: pytest.TempPathFactory
) -> Outside:
    """Those of the attempt before, which it left as they were, or else new ones: a process takes a
    fork of all of pytest's memory."""
    if not made or made[-1].state() != made[-1].before:
        folder = tmp_path_factory.mktemp("outside")
        for parent in folder.parents[:2]:  # pytest's are its owner's alone
            parent.chmod(0o755)
        made.append(Outside(folder, account.uid))
    return made[-1]


HEAD = """
import ctypes, errno, fcntl, os, signal, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    kinds = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *kinds)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def reward(file, lock, pid, terminal, port, name, memory, semaphore, queue, home):
    path = file.encode()
"""


def attempt(account: Account, outside: Outside, body: str) -> tuple[float, str | None]:
    """Reward and reason of the lines of ``body``; asserts that nothing outside has changed."""
    source = HEAD + "".join(f"    {line}\n" for line in body.strip().split("\n"))
    home = str(outside.folder)
    things = (outside.victim.pid, outside.terminal, outside.port, outside.name[1:])
    shared = (outside.memory, outside.semaphore, outside.queue)
    result = account.run(source, str(outside.file), str(outside.lock), *things, *shared, home)
    assert outside.state() == outside.before
    return result


REFUSED = re.compile(
    r"PermissionError|OSError: \[Errno (1|13|38)\]|FileNotFoundError|ProcessLookupError"
)

# struct xattr_args, linux/xattr.h
NEW_ATTRIBUTE = "struct.pack('QII', ctypes.addressof(value), 1, 0)"
ESCAPES = {
    "type into a terminal": """
fd = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
fcntl.ioctl(fd, 0x5412, b'x')
return 1.0""",
    "kill by the owner of a pipe": """
reader, writer = os.pipe()
fcntl.fcntl(reader, 8, pid)
fcntl.fcntl(reader, 10, signal.SIGKILL)
fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(writer, b'x')
return 1.0""",
    "pin a process to a core": "os.sched_setaffinity(pid, {0}); return 1.0",
    "read an environment": (
        "return float(b'hf_secret' in open(f'/proc/{pid}/environ', 'rb').read())"
    ),
    "read memory": """
maps = open(f'/proc/{pid}/maps').read()
start = int(next(line for line in maps.splitlines() if '[stack]' in line).split('-')[0], 16)
memory = open(f'/proc/{pid}/mem', 'rb')
memory.seek(start)
return float(len(memory.read(16)) == 16)""",
    "read a file": "return float(open(file).read() == 'data')",
    "list a home": "return float('precious' in os.listdir(home))",
    "setxattrat": f"""
value = ctypes.create_string_buffer(b'2')
call(463, -100, path, 0, b'user.kept', {NEW_ATTRIBUTE}, 16)
return 1.0""",
    "removexattrat": "call(466, -100, path, 0, b'user.kept'); return 1.0",
    "file_setattr": (
        "call(469, -100, path, struct.pack('QIIIII', 0x80, 0, 0, 0, 0, 0) + b'\\0' * "
        "4, 32, 0); return 1.0"
    ),
    "FS_IOC_SETFLAGS": """
fd = os.open(file, os.O_RDONLY)
flags = struct.unpack('i', fcntl.ioctl(fd, 0x80086601, b'\\0' * 4))[0]
fcntl.ioctl(fd, 0x40086602, struct.pack('i', flags | 0x40))
return 1.0""",
    "take a lock": """
fd = os.open(lock, os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
return 1.0""",
    "write shared memory": """
libc.shmat.restype = ctypes.c_void_p
address = libc.shmat(memory, None, 0)
if address in (None, ctypes.c_void_p(-1).value):
    raise OSError(ctypes.get_errno(), '')
ctypes.memmove(address, b'written', 7)
return 1.0""",
    "remove shared memory": (
        "call({'x86_64': 31, 'aarch64': 195}[os.uname().machine], memory, 0, None); return 1.0"
    ),
    "raise a semaphore": """
call({'x86_64': 65, 'aarch64': 193}[os.uname().machine], semaphore, struct.pack('Hhh', 0, 1, 0), 1)
return 1.0""",
    "send a message": """
message = struct.pack('l8s', 1, b'hello')
call({'x86_64': 69, 'aarch64': 189}[os.uname().machine], queue, message, 8, 0)
return 1.0""",
    "sched_setparam": "os.sched_setparam(pid, os.sched_param(0)); return 1.0",
    "migrate_pages": """
mask = ctypes.byref(ctypes.c_ulong(1))
call({'x86_64': 256, 'aarch64': 238}[os.uname().machine], pid, 64, mask, mask)
return 1.0""",
    "many threads": """
threading.stack_size(65536)
rest = threading.Event()
count = 0
try:
    for count in range(300):
        threading.Thread(target=rest.wait, daemon=True).start()
except RuntimeError:
    pass
return float(count > 100)""",
    "see another process": "return float(os.path.exists(f'/proc/{pid}'))",
}


@degraded
@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(account: Account, outside: Outside, name: str) -> None:
    """Each of them got through a list of forbidden calls alone, as root or as both; any two walls
    of three stop it."""
    if name == "see another process" and "namespaces" not in account.walls:
        pytest.skip("without namespaces, names in /proc can be seen, though none of it can be read")
    reward, reason = attempt(account, outside, ESCAPES[name])
    assert reward == 0.0, name
    assert reason is None or REFUSED.search(reason), (name, reason)


FORGED = """
import json, os, struct
def reward(completion):
    exec(completion)
    return 0.0
"""
FORGERY = """
import fcntl, json, os, stat, struct
answer = json.dumps({"value": 1.0}).encode()
answer = (struct.pack(">I", len(answer)) if FRAMED else b"") + answer
for fd in range(3, 64):
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.write(fd, answer)
    except OSError:
        pass
LEAVE
"""


@pytest.mark.parametrize("framed", ["True", "False"])
@pytest.mark.parametrize("leave", ["os._exit(0)", ""])
def test_a_verdict_is_not_written_into_a_pipe(account: Account, framed: str, leave: str) -> None:
    """By text that a reward function executes, against all advice: it would have to know the ticket
    of the call."""
    text = FORGERY.replace("FRAMED", framed).replace("LEAVE", leave)
    assert account.run(FORGED, text)[0] == 0.0


# name, numbers on x86-64 and aarch64, arguments; numbers from asm/unistd_64.h and
# asm-generic/unistd.h
CALLS = """
fork 57 - ; vfork 58 - ; clone 56 220 17 0 0 0 0 ; clone 56 220 0x10000011 0 0 0 0
clone3 435 435 buffer 88
execve 59 221 program arguments 0 ; execveat 322 281 -100 program arguments 0 0 ; kill 62 129 pid 9
kill 62 129 0 9 ; kill 62 129 1 9 ; tkill 200 130 pid 9 ; tgkill 234 131 pid pid 9
rt_sigqueueinfo 129 138 pid 9 buffer ; rt_tgsigqueueinfo 297 240 pid pid 9 buffer
pidfd_open 434 434 pid 0
pidfd_open 434 434 1 0 ; pidfd_send_signal 424 424 3 9 0 0 ; pidfd_getfd 438 438 3 0 0
ptrace 101 117 16 pid 0 0 ; ptrace 101 117 0 0 0 0
process_vm_readv 310 270 pid buffer 1 buffer 1 0
process_vm_writev 311 271 1 buffer 1 buffer 1 0 ; process_madvise 440 440 3 buffer 1 4 0
kcmp 312 272 1 pid 0 0 0 ; get_robust_list 274 100 1 buffer buffer ; getsid 124 156 pid
getpgid 121 155 pid
setpgid 109 154 0 0 ; setsid 112 157 ; getpriority 140 141 0 pid ; setpriority 141 140 0 pid 5
ioprio_set 251 30 1 pid 0x4007 ; ioprio_get 252 31 1 pid ; sched_setscheduler 144 119 pid 3 buffer
sched_getscheduler 145 120 pid ; sched_setattr 314 274 pid buffer 0
sched_getaffinity 204 123 1 8 buffer
prlimit64 302 261 pid 0 0 buffer ; prlimit64 302 261 0 0 buffer 0 ; setrlimit 160 164 0 buffer
move_pages 279 239 pid 0 0 0 0 0 ; setns 308 268 0 0 ; unshare 272 97 0x10000000
unshare 272 97 0x20000
mount 165 40 path path 0 4096 0 ; umount2 166 39 folder 2 ; pivot_root 155 41 folder folder
chroot 161 51 folder ; open_tree 428 428 -100 folder 1 ; move_mount 429 429 3 path 3 path 4
fsopen 430 430 kind 0 ; fsmount 432 432 3 0 0 ; fspick 433 433 -100 folder 0
mount_setattr 442 442 -100 folder 0 buffer 32 ; statmount 457 457 buffer buffer 64 0
listmount 458 458 buffer buffer 8 0 ; socket 41 198 2 1 0 ; socket 41 198 1 1 0
socket 41 198 16 3 0
socket 41 198 17 3 0 ; socket 41 198 38 5 0 ; socketpair 53 199 1 2 0 buffer
socketpair 53 199 1 5 0 buffer
socketpair 53 199 2 1 0 buffer ; connect 42 203 3 buffer 16 ; bind 49 200 3 buffer 16
listen 50 201 3 1
getsockopt 55 209 3 1 17 buffer buffer ; getsockopt 55 209 3 1 77 buffer buffer
getsockopt 55 209 3 6 1 buffer buffer
sendto 44 206 3 buffer 1 1 0 0 ; recvfrom 45 207 3 buffer 1 1 0 0
accept4 288 242 3 0 0 0 ; sendto 44 206 3 buffer 1 0 buffer 16 ; sendmsg 46 211 3 buffer 0
recvmsg 47 212 3 buffer 0 ; sendmmsg 307 269 3 buffer 1 0 ; io_uring_setup 425 425 1 buffer
bpf 321 280 0 buffer 64 ; perf_event_open 298 241 buffer pid -1 -1 0 ; userfaultfd 323 282 1
memfd_create 319 279 name 0 ; memfd_secret 447 447 0 ; seccomp 317 277 0 0 0 ; keyctl 250 219 0 -3 0
add_key 248 217 kind name buffer 1 -3 ; request_key 249 218 kind name 0 -3 ; prctl 157 167 4 1
prctl 157 167 1 0 ; prctl 157 167 36 1 ; prctl 157 167 0x59616d61 1 ; prctl 157 167 23 0
capset 126 91 buffer buffer ; setuid 105 146 0 ; setresuid 117 147 0 0 0
setgroups 116 159 0 buffer
setfsuid 122 151 0 ; personality 135 92 0x0040000 ; shmget 29 194 0 4096 0x3b6
semget 64 190 0 1 0x3b6
msgget 68 186 0 0x3b6 ; mq_open 240 180 name 0x42 0x1b6 0 ; mq_unlink 241 181 name ; flock 73 32 1 2
fcntl 72 25 1 8 pid ; fcntl 72 25 1 10 9 ; fcntl 72 25 1 1024 0 ; fcntl 72 25 1 1026 1
fcntl 72 25 1 1031 4096
fcntl 72 25 1 6 buffer ; fcntl 72 25 1 37 buffer ; fcntl 72 25 1 4 0x2000 ; fcntl 72 25 1 1033 1
ioctl 16 29 0 0x5412 buffer ; ioctl 16 29 0 0x5452 buffer ; ioctl 16 29 0 0x540e 0
ioctl 16 29 1 0x8901 buffer
ioctl 16 29 0 0xb701 0 ; ioctl 16 29 0 0xc0045877 buffer ; setxattr 188 5 path name buffer 1 0
lsetxattr 189 6 path name buffer 1 0 ; fsetxattr 190 7 1 name buffer 1 0
removexattr 197 14 path name
getxattr 191 8 path name buffer 8 ; chmod 90 - path 0 ; fchmod 91 52 1 0
fchmodat 268 53 -100 path 0
fchmodat2 452 452 -100 path 0 0 ; fchownat 260 54 -100 path 65534 65534 0
fchown 93 55 1 65534 65534
utimensat 280 88 -100 path 0 0 ; linkat 265 37 -100 path -100 new 0 ; link 86 - path new
symlinkat 266 36 path -100 new ; mknodat 259 33 -100 new 0x2180 0x103 ; fallocate 285 47 1 0 0 4096
name_to_handle_at 303 264 -100 path buffer buffer 0 ; open_by_handle_at 304 265 -100 buffer 0
fanotify_init 300 262 0 0 ; inotify_init1 294 26 0 ; quotactl 179 60 0x80000700 0 0 buffer
acct 163 89 path
swapon 167 224 path 0 ; swapoff 168 225 path ; reboot 169 142 0xfee1dead 672274793 0 0
syslog 103 116 3 buffer 8 ; sethostname 170 161 name 4 ; setdomainname 171 162 name 4
settimeofday 164 170 buffer 0 ; clock_settime 227 112 0 buffer ; adjtimex 159 171 buffer
clock_adjtime 305 266 0 buffer ; clock_gettime 228 113 -6 buffer
timer_create 222 107 0 buffer buffer
init_module 175 105 buffer 8 name ; finit_module 313 273 0 name 0 ; delete_module 176 106 name 0
kexec_load 246 104 0 0 0 0 ; kexec_file_load 320 294 0 0 0 name 0 ; vhangup 153 58 ; iopl 172 - 3
ioperm 173 - 0 1 1 ; modify_ldt 154 - 0 buffer 16 ; vmsplice 278 75 1 buffer 1 0
splice 275 76 0 0 1 0 1 0
tee 276 77 0 1 1 0 ; mlockall 151 230 1 ; mbind 237 235 buffer 4096 0 0 0 0
remap_file_pages 216 234 buffer 4096 0 0 0 ; sync 162 81 ; signalfd4 289 74 -1 buffer 8 0
openat2 437 437 -100 path buffer 24 ; landlock_create_ruleset 444 444 buffer 8 0
landlock_restrict_self 446 446 0 0 ; lookup_dcookie 212 18 0 buffer 8
futex 202 98 buffer 6 0 0 0 0
madvise 28 233 buffer 4096 100 ; open_tree_attr 467 467 -100 folder 1 buffer 32
rseq_slice 9999 9999
none 512 512
"""


def _misbehaviours() -> dict[str, tuple[int, list[str]]]:
    found = {}
    for entry in CALLS.replace("\n", ";").split(";"):
        name, *words = entry.split() or [""]
        number = words[MACHINE == "aarch64"] if words else "-"
        if number != "-":
            found[" ".join([name, *words[2:]])] = (int(number), words[2:])
    return found


MISBEHAVIOURS = _misbehaviours()
ARGUMENTS = """
buffer = ctypes.create_string_buffer(1 << 14)
words = {'buffer': ctypes.byref(buffer), 'path': path, 'folder': home.encode(),
         'new': path + b'x', 'pid': pid, 'name': b'user.kept', 'kind': b'tmpfs',
         'program': b'/bin/true', 'arguments': (ctypes.c_char_p * 2)(b'true', None)}
"""


def test_there_are_enough_of_them() -> None:
    assert len(MISBEHAVIOURS) >= 150


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_calls_are_refused(account: Account, outside: Outside, name: str) -> None:
    """With EPERM by the filter, or ENOSYS where the C library goes on without, whatever the
    arguments."""
    number, words = MISBEHAVIOURS[name]
    arguments = "".join(
        f", words.get({word!r}) or {word if word[-1].isdigit() else 0}" for word in words
    )
    reward, reason = attempt(account, outside, f"{ARGUMENTS}call({number}{arguments})\nreturn 1.0")
    assert reward == 0.0, name
    assert re.search(r"PermissionError: \[Errno 1\]|OSError: \[Errno 38\]", str(reason)), (
        name,
        reason,
    )


DEEDS = {
    "write to a terminal": (
        "os.write(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), b'x'); return 1.0"
    ),
    "its own terminal": "os.open('/dev/tty', os.O_RDWR); return 1.0",
    "the terminal of its input": "return float(any(os.isatty(fd) for fd in range(3)))",
    "the password file": "return float(len(open('/etc/passwd').read()) > 0)",
    "the shadow file": "return float(len(open('/etc/shadow').read()) > 0)",
    "the root": "return float(len(os.listdir('/')) > 0)",
    "its own environment": "return float(len(os.environ) > 0)",
    "the folder above": "open('../x', 'w'); return 1.0",
    "the interpreter's folder": "open(os.path.dirname(os.__file__) + '/x.py', 'w'); return 1.0",
    "the interpreter's file": "open(os.__file__, 'r+'); return 1.0",
    "truncate the interpreter's file": (
        "os.close(os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)); return 1.0"
    ),
    "remove the interpreter's file": "os.remove(os.__file__); return 1.0",
    "temporary files elsewhere": "open('/tmp/nvfp4-escaped', 'w'); return 1.0",
    "shared memory files": "open('/dev/shm/nvfp4-escaped', 'w'); return 1.0",
    "the disk": "open('/dev/vda', 'rb'); return 1.0",
    "kernel memory": "open('/dev/mem', 'rb'); return 1.0",
    "the kernel's log": "open('/dev/kmsg', 'rb'); return 1.0",
    "the kernel's settings": "return float(len(open('/proc/sys/kernel/core_pattern').read()) > 0)",
    "the machine's devices": "return float(len(os.listdir('/sys')) > 0)",
    "control groups": "return float(len(os.listdir('/sys/fs/cgroup')) > 0)",
    "its parent's root": "return float(len(os.listdir('/proc/1/root')) > 0)",
    "a file by a link": "os.symlink(file, 'link'); return float(len(open('link').read()) > 0)",
    "a file by a descriptor of /": (
        "return float(os.open(file, os.O_RDONLY, dir_fd=os.open('/', os.O_PATH)) > 0)"
    ),
    "a file by its inode alone": "return float(os.open(file, os.O_PATH) > 0)",
    "a program": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "a shell": "return float(os.system('true') == 0)",
    "a subprocess": "import subprocess; return float(subprocess.run(['true']).returncode == 0)",
    "a pool of processes": (
        "import multiprocessing; multiprocessing.Process(target=print).start(); return 1.0"
    ),
    "the network": "import socket; socket.create_connection(('127.0.0.1', port), 1); return 1.0",
    "names of hosts": (
        "import socket; socket.getaddrinfo('localhost', port); socket.socket(); return 1.0"
    ),
    "an abstract socket": (
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + name); return 1.0"
    ),
    "descriptors of others": """
found = []
for fd in range(5, 64):
    try:
        os.fstat(fd)
        found.append(fd)
    except OSError:
        pass
return float(len(found) > 0)""",
    "change its work": "os.write(4, b'x'); return 1.0",
    "its priority": "os.nice(-5); return 1.0",
    "back to root": "os.setuid(0); return 1.0",
    "no limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 1.0",
    "a core dump": (
        "import resource; return float(resource.getrlimit(resource.RLIMIT_CORE)[0] != 0)"
    ),
    "many descriptors": "return float(len([os.pipe() for _ in range(100)]) > 64)",
    "a user with rights": "return float(0 in (*os.getresuid(), *os.getresgid()))",
    "the host's name": "return float(os.uname().nodename == name)",
}


@pytest.mark.parametrize("name", DEEDS)
def test_deeds_fail(account: Account, outside: Outside, name: str) -> None:
    """The same from Python's side: no file, no descriptor, no program, no right that is not the
    call's own."""
    reward, reason = attempt(account, outside, DEEDS[name])
    assert reward == 0.0, (name, reason)


FULL = """
written = 0
try:
    for i in range(100):
        with open(f'{i}', 'wb') as file:
            written += file.write(b'x' * (1 << 20))
except OSError:
    pass
return float(written > 17 << 20)
"""
CRUMBS = """
try:
    for i in range(100_000):
        open(f'{i}', 'w').close()
except OSError:
    return float(i > 2000)
return 1.0
"""
BOMB = """
import _thread
rest = threading.Event()
started = 0
threading.stack_size(65536)
while True:
    try:
        _thread.start_new_thread(rest.wait, ())
        started += 1
    except RuntimeError:
        return float(started > 64)
"""


@pytest.mark.parametrize("body", [FULL, CRUMBS, BOMB], ids=["bytes", "files", "threads"])
def test_what_fills_the_machine_is_bounded(account: Account, outside: Outside, body: str) -> None:
    """The folder holds 16 MiB in 1024 files, a user has 64 tasks; and the next call finds nothing
    of it."""
    for _ in range(3):
        reward, reason = attempt(account, outside, body)
        assert reward == 0.0, reason
    assert account.run("import os\ndef reward(): return float(os.listdir('.') == [])") == (
        1.0,
        None,
    )


ENTER = """
import ctypes, mmap, os
def reward(*a):
    code = bytes.fromhex({code!r})
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CFUNCTYPE(ctypes.c_long)(address)()
    return 1.0
"""


@pytest.mark.skipif(
    MACHINE != "x86_64", reason="other numbers for the same kernel exist on x86-64 only"
)
@pytest.mark.parametrize(
    "code",
    # getpid as i386 and as x32; a number of neither
    ["b814000000cd80c3", "b827000040 0f05c3", "b8ffffff7f 0f05c3"],
    ids=["i386", "x32", "large"],
)
def test_other_numbers_kill(account: Account, code: str) -> None:
    """They would mean other calls than those on the list."""
    reward, reason = account.run(ENTER.format(code=code.replace(" ", "")))
    assert (reward, reason) == (0.0, "killed by SIGSYS")


ALLOWED = {
    "threads": (
        "import threading; t = threading.Thread(target=print); t.start(); t.join(); return 1"
    ),
    "a pool of threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: return float(sum(pool.map(abs, range(-4, 0))) == 10)""",
    "asyncio": "import asyncio; return asyncio.run(asyncio.sleep(0, 1.0))",
    "temporary files": """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    with tempfile.NamedTemporaryFile(dir=folder): return 1""",
    "files": """
open('a', 'w').write('x'); os.rename('a', 'b'); os.mkdir('c'); os.truncate('b', 0)
import shutil; shutil.copyfile('b', 'c/d'); return float(os.listdir('c') == ['d'])""",
    "clocks": (
        "import time; time.sleep(0.001); return float(time.process_time() > 0 and "
        "time.thread_time() > 0)"
    ),
    "alarms": (
        "signal.signal(signal.SIGALRM, lambda *a: None); signal.alarm(1); signal.pause(); return 1"
    ),
    "random bytes": "return float(len(os.urandom(8) + open('/dev/urandom', 'rb').read(8)) == 16)",
    "no output": "print('x', file=open(os.devnull, 'w')); return 1",
    "the library": (
        "import sqlite3, decimal, xml.dom.minidom, unicodedata, zoneinfo, ssl, lzma; return 1"
    ),
    "a database": (
        "import sqlite3; return sqlite3.connect(':memory:').execute('select 1').fetchone()[0]"
    ),
    "a pair of sockets": """
import socket
a, b = socket.socketpair()
a.sendall(b'xy')
a.send(b'z', socket.MSG_DONTWAIT)
return float(b.recv(1, socket.MSG_PEEK) == b'x' and b.recv(3) == b'xyz'
             and b.getsockopt(1, socket.SO_ERROR) == 0)""",
    "json": "import json; return float(json.loads('[1]') == [1])",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_reward_needs_is_allowed(account: Account, outside: Outside, name: str) -> None:
    assert attempt(account, outside, ALLOWED[name]) == (1.0, None)


def test_all_walls_stand_or_are_named(account: Account) -> None:
    """A kernel without one of them passes as well, if the others are enough: else the account could
    not run at all."""
    for wall in ("system call filter", "unprivileged user", "no capabilities"):
        assert wall in account.walls
    assert "Landlock" in account.walls or "namespaces" in account.walls


def test_seconds_do_not_pass_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that was stopped for an hour, and goes on, takes a quarter of a second of it for the
    call's time."""
    now = [100.0]
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock, found = keeper.Clock(), []
    for step in (0.0, 0.125, 3600.0, 0.0625):
        now[0] += step
        found.append(clock.tick())
    assert found == [0.0, 0.125, 0.375, 0.4375]
