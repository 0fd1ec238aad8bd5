"""Programs of the model, judged from outside; where the walls cannot be built; and what a killed
run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from limits import HANG

from nvfp4.rl.config import RLConfig, make_task
from nvfp4.rl.rewards import keeper, outcomes, walls
from nvfp4.rl.rewards import sandbox as module
from nvfp4.rl.rewards.sandbox import Limits, ProgramTests, RewardCall, Sandbox, compile_reward
from nvfp4.rl.rewards.verdict import Verdict
from nvfp4.rl.tasks.jsonl import program
from nvfp4.rl.tasks.registry import load_task
from nvfp4.run.errors import TrainError

LIMITS = Limits(seconds=30.0, memory_mib=256, output_bytes=10_000)
STRICT = Limits(seconds=1.0, memory_mib=64, output_bytes=10_000)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=1, unsafe=True) as box:
        yield box


def call(source: str, *arguments: object, folder: str = "") -> RewardCall:
    return RewardCall(compile_reward(source, "r.py"), "r.py", "reward", arguments, folder)


# --- tests of programs

ADD = {"call": "add", "arguments": [1, 2], "result": 3}
SUM = {"stdin": "1 2\n", "stdout": "3\n"}
PASSING = {
    "print(sum(map(int, input().split())))": [SUM],
    "import sys\nprint(sum(map(int, sys.stdin.read().split())), end='')": [
        SUM,
        {"stdin": "4\n5", "stdout": "9"},
    ],
    "import sys\nfor line in sys.stdin: print(line.strip() + '  ')\nprint()": [
        {"stdin": "a\nb", "stdout": "a\nb"}
    ],
    "print('x'); raise SystemExit": [{"stdout": "x"}],
    "def add(a, b): return a + b": [ADD, {"call": "add", "arguments": ["a", "b"], "result": "ab"}],
    "def add(a, b): return 0.1 * 3": [{**ADD, "result": 0.3}],
    "def add(a, b): return (a, [b], {'k': None})": [{**ADD, "result": [1, [2], {"k": None}]}],
    "if __name__ == '__main__': print(3)": [SUM],
    "open('a', 'w').write('3'); print(open('a').read())": [SUM],
    "print('\\ud83d\\ude00'.encode('utf-16', 'surrogatepass').decode('utf-16'))": [
        {"stdout": "\U0001f600"}
    ],
}
FAILING = {
    "print(4)": [SUM],
    "print(3, 3)": [SUM],
    "": [SUM],
    "print(3); raise ValueError": [SUM],
    "print(3); raise SystemExit(1)": [SUM],
    "print(3); import os; os._exit(3)": [SUM],
    "print(3); import os; os.kill(os.getpid(), 9)": [SUM],
    "print(3": [SUM],
    "\0": [SUM],
    "\ud800": [SUM],
    "def add(a, b): return True": [{**ADD, "result": 1}],
    "def add(a, b): return 1": [{**ADD, "result": True}],
    "def add(a, b): return '3'": [ADD],
    "def add(a, b): return float('nan')": [ADD],
    "def add(a, b): return object()": [ADD],
    "def add(a, b): return 10 ** 5000": [ADD],
    "x = []\nfor _ in range(900): x = [x]\ndef add(a, b): return x": [ADD],
    "def other(): pass": [ADD],
    "add = 3": [ADD],
    "def add(a, b): print('x' * 20_000); return 3": [ADD],
    "def add(a, b): return 'x' * (2 << 20)": [ADD],
    "import os; os.write(3, b'\\0\\0\\0\\x0b' + b'{\"value\": 1}')": [ADD],
    "import os; os.write(3, b'\\xff' * 100)": [ADD],
    "import os; os.write(3, b'\\0\\0\\0\\x0f' + b'{\"walls\": \"no\"}')": [ADD],
    "import os; os.write(3, b'\\1\\0\\0\\0\\x0f' + b'{\"walls\": \"no\"}')": [ADD],
    "import os, sys\nos.closerange(0, 64)": [SUM],
    "bytearray(1 << 40)": [SUM],
    "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()": [ADD],
}


@pytest.mark.parametrize("text", PASSING)
def test_programs_that_pass(sandbox: Sandbox, text: str) -> None:
    assert sandbox.run([ProgramTests(text, tuple(PASSING[text]))]) == [Verdict(1.0)]


@pytest.mark.parametrize("text", FAILING, ids=range(len(FAILING)))
def test_programs_that_fail(sandbox: Sandbox, text: str) -> None:
    """It is the program that fails, not the reward, so there is no reason."""
    assert sandbox.run([ProgramTests(text, tuple(FAILING[text]))]) == [Verdict(0.0)]


def test_programs_that_never_end() -> None:
    """One hangs, one sleeps, one writes for ever; the next one gets its reward."""
    texts = ["while True: pass", "import time; time.sleep(600)", "while True: print('x')"]
    # the last one needs some of them
    with Sandbox(replace(STRICT, seconds=5.0), workers=1, unsafe=True) as box:
        verdicts = box.run([ProgramTests(text, (SUM,)) for text in [*texts, "print(3)"]])
    assert verdicts == [Verdict(0.0)] * 3 + [Verdict(1.0)]


def test_all_tests_have_to_pass(sandbox: Sandbox) -> None:
    constant = "def add(a, b): return 3"
    assert sandbox.run(
        [
            ProgramTests(constant, (ADD,)),
            ProgramTests(constant, (ADD, {**ADD, "arguments": [2, 2], "result": 4})),
        ]
    ) == [
        Verdict(1.0),
        Verdict(0.0),
    ]


SECRET = b"nvfp4-the-expected-answer-7c1e"
SCAN = f"""
import ctypes, gc, hashlib, os
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
def scan():
    # whole chunks around everything that Python knows of, and the heap; write(2) says EFAULT where
    # nothing is; what is looked for must not be here itself, so only its beginning is, and a digest
    # of all of it
    reader, writer = os.pipe()
    end = libc.sbrk(0) >> 20
    chunks = {{id(each) >> 20 for each in gc.get_objects()}} | set(range(end - 16, end + 1))
    before = b''
    for chunk in sorted(chunks):
        for page in range(chunk << 20, chunk + 1 << 20, 4096):
            if libc.write(writer, ctypes.c_void_p(page), 4096) != 4096:
                before = b''
                continue
            text = before + os.read(reader, 4096)
            place = text.find({SECRET[:12]!r})
            while place >= 0:
                found = hashlib.sha256(text[place : place + {len(SECRET)}]).hexdigest()
                if found == {sha256(SECRET).hexdigest()!r}:
                    return True
                place = text.find({SECRET[:12]!r}, place + 1)
            before = text[-64:]
    return False
"""


def test_the_expected_answer_is_not_in_the_memory_of_a_program(sandbox: Sandbox) -> None:
    """Neither with tests nor with run; the same search finds it in the process of the function,
    which knows it."""
    look = f"""
{SCAN}
def reward(secret, run):
    if not scan():
        raise ValueError('it is not even here')
    return float(run({SCAN + "print(scan())"!r}).stdout == 'False\\n')
"""
    assert sandbox.run([call(look, SECRET.decode())]) == [Verdict(1.0)]
    tests = ({"stdin": "", "stdout": "False"}, {"stdin": "", "stdout": SECRET.decode()})
    search = SCAN + "print(scan())"
    assert sandbox.run([ProgramTests(search, tests[:1]), ProgramTests(search, tests)]) == [
        Verdict(1.0),
        Verdict(0.0),
    ]


# --- run, for reward functions


def test_a_function_runs_programs(sandbox: Sandbox) -> None:
    """It is told what they printed and returned, how they ended, and which limit stopped them."""
    source = """
def reward(run):
    a = run("print(input()[::-1]); import sys; print('e', file=sys.stderr)", stdin="abc")
    assert (a.stdout, a.stderr, a.status, a.stopped) == ("cba\\n", "e\\n", 0, None), a
    b = run("def f(x): return [x, x]", call="f", arguments=[{"k": 1}])
    assert b.result == [{"k": 1}, {"k": 1}], b
    c = run("1 / 0")
    assert c.status == 1 and "ZeroDivisionError" in c.stderr, c
    d = run("print('x' * 20_000)")
    assert d.stopped == "printed more than 10000 bytes", d
    e = run("import ctypes; ctypes.string_at(0)")
    assert e.status == -11, e
    return 1.0
"""
    assert sandbox.run([call(source)]) == [Verdict(1.0)]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "def reward(run):\n    for _ in range(101): run('')\n    return 1",
            "ValueError: run: at most 100 programs a call",
        ),
        ("def reward(run): return run(3)", "TypeError: run: expected texts"),
        ("def reward(run): run('1', call=3)", "TypeError: run: expected texts"),
        (
            "import json, os, struct\ndef reward(run):\n    ask = json.dumps({'run': {'program': "
            "3}}).encode()\n"
            "    os.write(3, struct.pack('>I', len(ask)) + ask)\n    run('1')",
            # what it gets back first, or the second that it no longer waits for
            "ValueError: run: expected texts / does not take the outcome of a run",
        ),
        (
            "import os\ndef reward():\n    for _ in range(300):\n        os.write(3, "
            "b'\\0\\0\\0\\x0b{\"run\": {}}')\n"
            "        os.read(3, 1 << 16)\n    return 1",
            "asked for more than 200 runs of programs",
        ),
        (
            "def reward(run): run('1', stdin='\\ud800')",
            "ValueError: run: cannot be handed over: UnicodeEncodeError",
        ),
    ],
    ids=["too many", "no text", "no name", "nonsense", "a flood", "half a character"],
)
def test_run_has_limits(source: str, reason: str) -> None:
    with Sandbox(Limits(seconds=20.0), workers=1, unsafe=True) as box:
        [verdict] = box.run([call(source)])
    assert verdict.reward == 0.0
    assert any(one in str(verdict.reason) for one in reason.split(" / "))


def test_time_of_programs_is_not_the_caller_s() -> None:
    """Three that hang until the limit, in one call under the same limit."""
    source = (
        "def reward(run): return float(all('took more' in run('while True: pass').stopped for _ "
        "in range(3)))"
    )
    with Sandbox(replace(STRICT, seconds=4.0), workers=1, unsafe=True) as box:
        assert box.run([call(source)]) == [Verdict(1.0)]


def test_files_of_the_function_are_not_those_of_programs(tmp_path: Path) -> None:
    """It imports and reads what lies beside it; a program does not, nor does another folder
    open."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "helper.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "mine" / "words.txt").write_text("answer")
    (tmp_path / "other.txt").write_text("other")
    source = """
import os
from helper import double
def reward(folder, run):
    assert double(2) == 4 and open(folder + '/mine/words.txt').read() == 'answer'
    try:
        open(folder + '/other.txt')
        return 0.0
    except OSError:
        pass
    for path in ('/mine/words.txt', '/other.txt'):
        if run(f"print(open({folder + path!r}).read())").status == 0:
            return 0.0
    return 1.0
"""
    folder = str(tmp_path / "mine")
    for without in ((), (walls.LANDLOCK,), (walls.NAMESPACES,)):
        with Sandbox(LIMITS, workers=1, read=[folder], without=without, unsafe=True) as box:
            if not box.confined:
                pytest.skip("files cannot be confined here")
            if (
                os.geteuid() == 0
                and not box.walls[1].startswith(walls.LANDLOCK)
                and walls.NAMESPACES in without
            ):
                continue
            for parent in [tmp_path, *tmp_path.parents[:3]]:
                parent.chmod(0o755)
            assert box.run([call(source, str(tmp_path), folder=folder)]) == [Verdict(1.0)], without


def test_a_program_cannot_speak_for_the_walls(sandbox: Sandbox) -> None:
    """What it writes is no reason of the sandbox's, and makes no exception in the function that
    runs it."""
    forged = "import os; os.write(3, b'\\0\\0\\0\\x0f' + b'{\"walls\": \"no\"}')"
    assert sandbox.run(
        [call("def reward(text, run): return float(run(text).status == 0)", forged)]
    ) == [Verdict(1.0)]


def test_reasons_can_be_printed(sandbox: Sandbox) -> None:
    """A text of the model's in an exception moves no cursor of a terminal, and is not more than
    UTF-8 can take."""
    [verdict] = sandbox.run(
        [call("def reward(text): raise ValueError(text)", "\x1b[2J\ud800\r\né")]
    )
    assert verdict.reason == "line 1: ValueError: \\x1b[2J\\ud800\\r\\né"


@pytest.mark.parametrize("without", [(), (walls.LANDLOCK,), (walls.NAMESPACES,)])
def test_what_rewards_name_may_overlap_and_be_much(
    tmp_path: Path, without: tuple[str, ...]
) -> None:
    """A folder and one in it, and more files than a call may have open."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    files = [tmp_path / "a" / "b" / "c", *(tmp_path / f"{i}" for i in range(80))]
    for file in files:
        file.write_text("answer")
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    read = [str(each) for each in (tmp_path / "a", tmp_path / "a" / "b", *files)]
    look = """
import os
def seen(paths):
    count = 0
    for path in paths:
        try:
            count += open(path).read() == 'answer'
        except OSError:
            pass
    for fd in range(5, 1024):
        try:
            os.fstat(fd)
            count += 1000
        except OSError:
            pass
    return count
"""
    source = f"""
{look}
def reward(paths, run):
    there = run({look!r}, call='seen', arguments=[paths]).result
    return float(seen(paths) == len(paths) and there == 0)
"""
    with Sandbox(LIMITS, workers=1, without=without, unsafe=True) as bare:
        if not bare.confined:
            pytest.skip("files cannot be confined here")
    with Sandbox(LIMITS, workers=1, read=read, without=without) as box:
        assert box.run([call(source, [str(file) for file in files])]) == [Verdict(1.0)]


# --- files of problems


def write(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_problems_with_tests(tmp_path: Path) -> None:
    """The program is the last fenced block, or all of it; sibling modules of a function are
    there."""
    (tmp_path / "helper.py").write_text("def right(text): return text == 'yes'\n")
    (tmp_path / "rewards.py").write_text(
        "import helper\ndef mine(completion, row): return helper.right(completion)\n"
    )
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "reward": {"tests": [SUM, {"stdin": "5 5", "stdout": "10"}]}},
        {"prompt": "b", "reward": {"tests": [ADD]}},
        {"prompt": "c", "reward": {"python": "rewards.py:mine"}},
    )
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    task = load_task(path, seconds=30.0, unsafe_rewards=True)
    a, b, c = task.rows
    answer = (
        "First:\n```python\nprint(0)\n```\nNo:\n```python\nprint(sum(map(int, "
        "input().split())))\n```\nDone."
    )
    cases = [
        (a, answer, 1),
        (a, "print(3)", 0),
        (b, "def add(a, b): return a + b", 1),
        (b, "I cannot", 0),
    ]
    cases += [(c, "yes", 1), (c, "no", 0), (a, "\ud800", 0)]
    verdicts = task.verdicts([p for p, _, _ in cases], [text for _, text, _ in cases])
    assert verdicts == [Verdict(float(reward)) for _, _, reward in cases]
    assert str(task.confinement()).startswith("rewards run ")
    task.close()


def test_fenced_programs() -> None:
    assert program("print(1)") == "print(1)"
    assert program("```\nx\n```") == "x\n"
    assert program("```python\nx\n```\n\n```py\ny\nz\n```\nend") == "y\nz\n"
    assert program("```python\nunfinished") == "```python\nunfinished"


@pytest.mark.parametrize(
    "tests",
    [
        *([], "x", [1], [{}], [{"stdin": "1"}], [{"stdout": 1}], [{"call": "f"}]),
        *([{"call": "f", "result": 1, "stdout": ""}], [{"call": 3, "result": 1}]),
        [{"call": "f", "arguments": 3, "result": 1}],
    ],
)
def test_bad_tests_are_named(tmp_path: Path, tests: Any) -> None:
    with pytest.raises(TrainError, match=r"p.jsonl:1: expected .*test"):
        load_task(write(tmp_path / "p.jsonl", {"prompt": "a", "reward": {"tests": tests}}))


def test_functions_that_execute_text_are_warned_of(tmp_path: Path) -> None:
    source = "def reward(completion, row):\n    return eval(completion)"
    task = load_task(
        write(tmp_path / "p.jsonl", {"prompt": "a", "reward": {"code": source}}),
        unsafe_rewards=True,
    )
    assert "p.jsonl:1 calls exec or eval in line 2" in str(task.confinement())
    task.close()


def test_answers_alone_need_no_walls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality and patterns run anywhere: neither is code of somebody else's."""
    monkeypatch.setattr(module, "_filters", dict)
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "answer": "4"},
        {"prompt": "b", "reward": {"regex": "^x"}},
    )
    task = load_task(path, seconds=30.0)
    assert task.confinement() is None
    assert task.verdicts(task.rows, ["4", "xy"]) == [Verdict(1.0), Verdict(1.0)]
    task.close()


@pytest.mark.parametrize("place", ["home", "temp", "above"])
def test_functions_in_shared_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The sandbox would show all of it to them; a folder of its own is asked for, early."""
    (tmp_path / "rewards.py").write_text("def reward(completion, row): return 1\n")
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "reward": {"python": "rewards.py:reward"}})
    if place == "temp":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    else:
        monkeypatch.setenv("HOME", str(tmp_path if place == "home" else tmp_path / "below"))
    with pytest.raises(TrainError, match="put it into a folder of its own"):
        load_task(path)
    load_task(path, unsafe_rewards=True).close()


# --- where walls are missing

ENOUGH_ALONE = [(walls.LANDLOCK,), (walls.NAMESPACES,)]


@pytest.mark.parametrize(
    "without", [(walls.FILTER,), (walls.LANDLOCK, walls.NAMESPACES), walls.ALL[:3]]
)
def test_what_cannot_be_confined_is_refused(without: tuple[str, ...]) -> None:
    """With what is missing and what to do; unsafe runs it all the same, behind what can be built,
    and says so."""
    with pytest.raises(TrainError, match=r"cannot be confined here.*--unsafe-rewards"):
        Sandbox(LIMITS, workers=1, without=without).run([call("def reward(): return 1")])
    with Sandbox(LIMITS, workers=1, without=without, unsafe=True) as box:
        assert not box.confined
        assert box.describe().startswith("rewards run NOT confined: ")
        assert all(name in box.describe().split("missing: ")[1] for name in without)
        assert box.run([call("def reward(): return 1")]) == [Verdict(1.0)]


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One whose system calls are not listed has no filter; the option goes from the command line to
    the worker."""
    monkeypatch.setattr(module, "_filters", dict)
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "reward": {"code": "def reward(completion, row): return 1"}},
    )
    task = make_task(RLConfig(task=path))
    with pytest.raises(TrainError, match="cannot be confined here"):
        task.confinement()
    with pytest.raises(TrainError, match="cannot be confined here"):
        task.reward(task.rows[0], "x")
    # said twice
    make_task(
        RLConfig(task=path, unsafe_rewards=True, task_options=("unsafe_rewards=true",))
    ).close()
    unsafe = make_task(RLConfig(task=path, unsafe_rewards=True))
    assert "NOT confined" in str(unsafe.confinement())
    assert unsafe.reward(unsafe.rows[0], "x") == 1.0
    unsafe.close()
    with pytest.raises(TrainError, match="unsafe_rewards"):
        make_task(RLConfig(task="sort", unsafe_rewards=True))


def test_without_a_filter_no_process_outlives_its_call() -> None:
    """Where nothing else would stop a fork bomb, the limit on processes does."""
    bomb = call("import os\ndef reward():\n    while True: os.fork()")
    with Sandbox(LIMITS, workers=1, without=walls.ALL[:3], unsafe=True) as box:
        verdicts = box.run([bomb, call("def reward(): return 1")])
    assert [v.reward for v in verdicts] == [0.0, 1.0]
    assert "BlockingIOError" in str(verdicts[0].reason)


def test_unknown_walls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without: expected names of .*moat"):
        Sandbox(without=["moat"])


def test_enough() -> None:
    """Of the walls: the filter, one of two for files, no root, no capabilities."""
    assert walls.sufficient(
        ["system call filter", "Landlock (ABI 1)", "unprivileged user 7", "no capabilities"]
    )
    assert not walls.sufficient(
        ["Landlock (ABI 1)", "namespaces (x)", "unprivileged user 7", "no capabilities"]
    )
    assert not walls.sufficient(["system call filter", "unprivileged user 7", "no capabilities"])
    assert not walls.sufficient(["system call filter", "Landlock (ABI 1)", "no capabilities"])
    assert not walls.sufficient([])


# --- what remains

RUN = """
import sys
from nvfp4.rl.rewards.sandbox import Limits, RewardCall, Sandbox, compile_reward
code = compile_reward("def reward():\\n    while True: pass", "r.py")
wait = RewardCall(code, "r.py", "reward", ())
box = Sandbox(Limits(seconds=3000.0), workers=2, without=sys.argv[1:], unsafe=True)
box.walls
print(box._workers[0].process.pid, flush=True)
box.run([wait, wait])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
@pytest.mark.parametrize("without", [(), walls.ALL[:3]], ids=["walls", "none"])
def test_a_killed_run_leaves_nothing(without: tuple[str, ...]) -> None:
    """kill -9 in the middle of calls that hang: every process of the sandbox ends, and no folder
    stays."""
    before = set(os.listdir(tempfile.gettempdir()))
    run = subprocess.Popen([sys.executable, "-c", RUN, *without], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    run.stdout.readline()
    deadline = time.monotonic() + HANG  # to be reached by nothing but a defect
    while len(children(run.pid)) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    family = children(run.pid)
    assert len(family) >= 6
    run.send_signal(signal.SIGKILL)
    run.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")]
    assert not [
        name for name in set(os.listdir(tempfile.gettempdir())) - before if "reward" in name
    ]


def children(pid: int) -> list[int]:
    """All descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


# --- the judge's own rules


def test_lines() -> None:
    """White space at the ends of lines and empty lines at the end do not count; all else does."""
    assert outcomes.lines("a \nb\t\n\n") == outcomes.lines("a\nb") == ["a", "b"]
    assert outcomes.lines("a\r\nb") == ["a", "b"]
    assert outcomes.lines("a\n\nb") != outcomes.lines("a\nb")
    assert outcomes.lines(" a") != outcomes.lines("a")
    assert outcomes.lines("") == outcomes.lines("\n") == [""]


def test_lines_take_no_longer_for_white_space() -> None:
    """Which a program may print in the middle of a line; by a pattern that backtracks these were
    hours."""
    text = " \t" * (1 << 19) + "x"
    assert outcomes.lines(text + "\u2003\n") == [text]


def test_same() -> None:
    """Of two JSON values."""
    for value in (None, True, 0, 1.5, "x", [1, [2]], {"a": [None]}):
        assert outcomes.same(value, json.loads(json.dumps(value)))
    assert outcomes.same(1, 1.0)
    assert outcomes.same(0.1 + 0.2, 0.3)
    assert outcomes.same(float("inf"), float("inf"))
    for a, b in [
        (1, True),
        (0, False),
        (1, "1"),
        (1, None),
        ([1], [1, 1]),
        ({"a": 1}, {"b": 1}),
        (1.0, 1.001),
    ]:
        assert not outcomes.same(a, b)
        assert not outcomes.same(b, a)
    assert not outcomes.same(float("nan"), float("nan"))
    assert not outcomes.same(10**400, 1.5)


def test_a_reply_too_deep_to_be_written_has_no_result() -> None:
    """How deep a value may be is not the same for reading it and for writing it, nor in every
    Python."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    reader, writer = os.pipe()
    assert keeper.give(writer, {"status": 0, "result": deep})
    assert list(keeper.frames(os.read(reader, 1000))) == [{"status": 0, "result": None}]
    os.close(reader)
    os.close(writer)


def test_frames() -> None:
    """Only whole objects, up to the first thing that is none."""

    def framed(text: bytes) -> bytes:
        return len(text).to_bytes(4, "big") + text

    good = framed(b'{"a": 1}')
    assert list(keeper.frames(good + good)) == [{"a": 1}] * 2
    for bad in (
        b"",
        b"\0\0",
        good[:-1],
        framed(b"[1]"),
        framed(b"nonsense"),
        framed(b"[" * 100_000),
        b"\xff" * 9,
    ):
        assert list(keeper.frames(bad)) == []
    assert list(keeper.frames(framed(b'{"a": ' + b"9" * 5000 + b"}"))) == []
