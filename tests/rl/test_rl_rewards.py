"""The sandbox: every way to misbehave scores 0 with its reason, within its limits, and nobody else
notices."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nvfp4.rl.rewards.sandbox import Limits, RewardCall, Sandbox, compile_reward
from nvfp4.rl.rewards.verdict import Verdict, to_verdict
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.tasks.registry import load_task
from nvfp4.run.errors import TrainError

LIMITS = Limits(seconds=60.0, memory_mib=64, output_bytes=10_000)
"""Of calls that are to end by themselves: no assertion about this machine."""
STRICT = Limits(seconds=1.0, memory_mib=64, output_bytes=10_000)
"""Of calls that never end."""


def call(source: str, *arguments: object) -> RewardCall:
    """A function of one line, or a whole text that defines ``reward``."""
    text = source if "def reward" in source else f"def reward(*a):\n    {source}"
    return RewardCall(compile_reward(text, "r.py"), "r.py", "reward", arguments)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2, unsafe=True) as box:
        yield box


MISBEHAVIOUR = {
    "hangs": ("while True: pass", r"took more than \d s"),
    "sleeps": ("import time; time.sleep(60)", r"took more than 1 s"),
    "ignores signals": (
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; exec('while True: "
        "pass')",
        r"took more than \d s",
    ),
    "eats memory": (
        "return len([bytearray(1 << 20) for _ in range(10**6)])",
        r"took more than 64 MiB of memory",
    ),
    "eats memory at once": ("return len(bytearray(1 << 40))", r"took more than 64 MiB of memory"),
    "keeps memory": (
        "KEPT = []\ndef reward(*a):\n    while True: KEPT.append('x' * 1000 + str(len(KEPT)))",
        r"took more than 64 MiB of memory",
    ),
    "prints megabytes": ("print('x' * 5_000_000)", r"printed more than 10000 bytes"),
    "prints for ever": ("while True: print('x')", r"printed more than 10000 bytes"),
    "complains for ever": (
        "import os\n    while True: os.write(2, b'x' * 1000)",
        r"printed more than 10000 bytes",
    ),
    "prints and returns": ("print('x' * 20_000); return 1.0", r"printed more than 10000 bytes"),
    "raises": ("raise KeyError('boo')", r"^line 2: KeyError: 'boo'$"),
    "raises at import": (
        "import nothing_of_the_sort\ndef reward(*a): return 1",
        r"^line 1: ModuleNotFoundError",
    ),
    "raises what cannot be printed": (
        "class E(Exception):\n    def __str__(self): raise ValueError\ndef reward(*a): raise E",
        r"line 3: E: \(its message cannot be read\)",
    ),
    "raises a long text": ("raise ValueError('x' * 10**6)", r"^line 2: ValueError: x{200}$"),
    "os._exit": ("import os; os._exit(0)", r"without a result \(exit status 0\)"),
    "os._exit 3": ("import os; os._exit(3)", r"without a result \(exit status 3\)"),
    "sys.exit": ("import sys; sys.exit(0)", r"SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", r"KeyboardInterrupt"),
    "crashes": ("import ctypes; ctypes.string_at(0)", r"killed by SIGSEGV"),
    "recurses": ("def reward(*a): return reward()", r"RecursionError"),
    "returns NaN": ("return float('nan')", r"a number in \[0, 1\], got nan"),
    "returns infinity": ("return float('inf')", r"got inf"),
    "returns 2": ("return 2", r"got 2"),
    "returns -1": ("return -1.0", r"got -1"),
    "returns a string": ("return '1'", r"got a str"),
    "returns None": ("pass", r"got a NoneType"),
    "returns a list": ("return [1.0]", r"got a list"),
    "returns a huge integer": ("return 10**400", r"OverflowError"),
    "closes stdout": ("import sys; sys.stdout.close(); raise ValueError('x')", r"ValueError: x"),
    "closes everything": ("import os; os.closerange(0, 64); return 1.0", r"without a result"),
    "closes everything and hangs": (
        "import os; os.closerange(0, 64)\n    while True: pass",
        r"took more than \d s",
    ),
    "talks nonsense": ("import os; os.write(3, b'nonsense'); return 1", r"without a result"),
    "talks too long": ("import os\n    while True: os.write(3, b'x' * 100)", r"returned more than"),
}
SYSTEM = {
    "forks": ("import os\n    while True: os.fork()", r"PermissionError|BlockingIOError"),
    "starts programs": ("import os; os.execv('/bin/true', ['true'])", r"PermissionError"),
    "kills": ("import os; os.kill(os.getppid(), 9)", r"PermissionError"),
    "opens sockets": (
        "import _socket; _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)",
        r"PermissionError",
    ),
    "raises its limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
        r"Error",
    ),
    "new session": ("import os; os.setsid()", r"PermissionError"),
    "shared memory": (
        "import _posixshmem, os; _posixshmem.shm_open('/nvfp4', os.O_CREAT | os.O_RDWR)",
        r"PermissionError|FileNotFoundError",
    ),
}


def test_every_misbehaviour_scores_0_with_its_reason(sandbox: Sandbox) -> None:
    """All at once, between calls that behave, which all get their reward; those that never end
    under a short limit."""
    cases = {**MISBEHAVIOUR, **(SYSTEM if sandbox.confined else {})}
    endless = {name: case for name, case in cases.items() if case[1].endswith(" s")}
    others = {name: case for name, case in cases.items() if name not in endless}
    good = call("return float(a[0])", 0.25)
    verdicts = sandbox.run([item for source, _ in others.values() for item in (call(source), good)])
    assert verdicts[1::2] == [Verdict(0.25)] * len(others)
    with Sandbox(STRICT, workers=2, unsafe=True) as strict:
        ended = strict.run([call(source) for source, _ in endless.values()])
    for (name, (_, pattern)), verdict in zip(
        [*others.items(), *endless.items()], [*verdicts[::2], *ended], strict=True
    ):
        assert verdict.reward == 0.0, name
        assert verdict.reason is not None, name
        assert len(verdict.reason) < 300, name
        assert re.search(pattern, verdict.reason), (name, verdict.reason)


def test_calls_share_nothing(sandbox: Sandbox) -> None:
    """Neither globals nor modules nor random numbers: the reward of a sample does not depend on the
    others."""
    spoil = call(
        "import builtins, math; builtins.float = None; math.pi = 3; import random; random.seed(7)"
    )
    look = call("import math, random; return float(math.pi > 3.1) * random.random()")
    order = call("return float(list({'a', 'b', 'c', 'd', 'e'}) == a[0])", list(_order(sandbox)))
    verdicts = sandbox.run([look, spoil, look, spoil, look, order, order, order])
    assert len({verdicts[i] for i in (0, 2, 4)}) == 1
    assert verdicts[0].reward > 0
    assert verdicts[5:] == [Verdict(1.0)] * 3


def _order(sandbox: Sandbox) -> str:
    """The order of a set of strings in the sandbox, from its digits."""
    source = (
        "return sum('abcde'.index(c) * 10**i for i, c in enumerate({'a', 'b', 'c', 'd', 'e'})) / "
        "10**5"
    )
    digits = round(sandbox.run([call(source)])[0].reward * 10**5)
    return "".join("abcde"[digits // 10**i % 10] for i in range(5))


def test_surroundings_are_clean(sandbox: Sandbox) -> None:
    """No environment of the trainer, an empty folder, no input, no site-packages, descriptors of
    its own only."""
    os.environ["NVFP4_SECRET"] = "1"
    try:
        with Sandbox(LIMITS, workers=1) as fresh:
            seen = fresh.run([call("import os; return 'NVFP4_SECRET' not in os.environ")])
    finally:
        del os.environ["NVFP4_SECRET"]
    assert seen == [Verdict(1.0)]
    checks = [
        "import os; return os.listdir('.') == []",
        "import sys; return sys.stdin is None or sys.stdin.read() == ''",
        "import sys; return not [p for p in sys.path if 'packages' in p or 'nvfp4' in p]",
        "import os; return len(os.listdir('/proc/self/fd')) <= 5 if "
        "os.path.exists('/proc/self/fd') else 1",
    ]
    assert sandbox.run([call(text) for text in checks]) == [Verdict(1.0)] * len(checks)


def test_preload_opens_packages() -> None:
    """Named modules are there at once; one that is missing is an error at the start, not a reward
    of 0."""
    with Sandbox(LIMITS, workers=1, preload=["numpy"]) as box:
        assert box.run([call("import numpy; return numpy.float32(0.5)")]) == [Verdict(0.5)]
    with pytest.raises(TrainError, match="nothing_of_the_sort"):
        Sandbox(LIMITS, workers=1, preload=["nothing_of_the_sort"]).run([call("return 1")])


def test_a_lost_worker_is_replaced() -> None:
    """Killed from outside: its call gets a reward all the same; closed, a sandbox starts anew;
    forgotten, it ends."""
    box = Sandbox(LIMITS, workers=1)
    assert box.run([call("return 1")]) == [Verdict(1.0)]
    os.kill(box._workers[0].process.pid, signal.SIGKILL)
    assert box.run([call("return 1"), call("return 0.5")]) == [Verdict(1.0), Verdict(0.5)]
    box.close()
    box.close()
    assert box.run([call("return 1")]) == [Verdict(1.0)]
    process = box._workers[0].process
    del box
    assert process.poll() is not None


def test_a_call_that_loses_its_worker_twice_scores_0() -> None:
    """Not a third time: something about it may be what ends them."""
    with Sandbox(Limits(seconds=30.0), workers=1) as box:

        def kill_two() -> None:
            killed: set[int] = set()
            while len(killed) < 2:
                for one in list(box._workers):
                    if one.process.pid not in killed:
                        os.kill(one.process.pid, signal.SIGKILL)
                        killed.add(one.process.pid)
                time.sleep(0.01)

        killer = threading.Thread(target=kill_two)
        killer.start()
        verdicts = box.run([call("import time; time.sleep(60)"), call("return 1")])
        killer.join()
    assert verdicts == [Verdict(0.0, "the sandbox process was lost twice"), Verdict(1.0)]


def test_nothing_to_do(sandbox: Sandbox) -> None:
    assert sandbox.run([]) == []


@pytest.mark.parametrize("source", ["def reward(:", "def other(): pass", "x = " + "(" * 1000, "\0"])
def test_what_is_no_reward_function_is_refused_before(source: str) -> None:
    with pytest.raises(ValueError, match=r"not Python|no function 'reward'"):
        compile_reward(source, "r.py")


# --- problems from files


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return str(path)


def test_jsonl_rewards(tmp_path: Path) -> None:
    """Each kind of reward gives what it says, each of them in one batch; the function sees the
    row."""
    (tmp_path / "mine.py").write_text(
        "def close(completion, row):\n    return 1 / (1 + abs(int(completion) - row['n']))\n"
    )
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "answer": "4"},
        {"prompt": "b", "reward": {"exact": "x y"}},
        {"prompt": "c", "reward": {"regex": r"^\d+$"}},
        {
            "prompt": "d",
            "reward": {"code": "def reward(completion, row): return completion == row['want']"},
            "want": "w",
        },
        "",
        {"prompt": "e", "reward": {"python": "mine.py:close"}, "n": 7},
        {"prompt": "f", "reward": {"regex": "(x+x+)+y"}},
    )
    task = load_task(path, seconds=60.0)
    a, b, c, d, e, f = task.rows
    assert (a.answer, b.answer, c.answer) == ("4", "x y", "")
    cases = [
        (a, " 4\n", 1),
        (a, "5", 0),
        (b, "x y", 1),
        (b, "x  y", 0),
        (c, "12", 1),
        (c, "1a", 0),
        (d, "w", 1),
        (d, "", 0),
    ]
    cases += [(e, "7", 1), (e, "8", 0.5), (e, "x", 0), (f, "xxy", 1), (c, "\ud800", 0)]
    verdicts = task.verdicts([p for p, _, _ in cases], [text for _, text, _ in cases])
    assert [v.reward for v in verdicts] == [reward for _, _, reward in cases]
    assert verdicts[10].reason == "line 2: ValueError: invalid literal for int() with base 10: 'x'"
    assert [v.reason for i, v in enumerate(verdicts) if i != 10] == [None] * 12
    assert task.reward(e, "7") == 1.0
    task.close()
    strict = load_task(path, seconds=1.0)
    # a pattern can hang as well
    assert strict.verdicts([f], ["x" * 40]) == [Verdict(0.0, "took more than 1 s")]
    strict.close()


def test_jsonl_draws_and_holds_out(tmp_path: Path) -> None:
    """Every problem is drawn; by hash of the prompt, none is on both sides."""
    path = write(tmp_path / "p.jsonl", *({"prompt": f"q{i}", "answer": str(i)} for i in range(64)))
    task = load_task(path)
    assert {p.prompt for p in task.problems(1000, 0)} == {f"q{i}" for i in range(64)}
    sides = [
        {p.prompt for p in task.problems(1000, seed, held_out=side)}
        for seed, side in ((0, True), (1, False))
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 64
    only = load_task(write(tmp_path / "one.jsonl", {"prompt": "q", "answer": "1"}))
    with pytest.raises(ValueError, match="too few different ones"):
        [only.problems(1, 0, held_out=side) for side in (True, False)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p.jsonl:2: is not JSON \(.* at column 1\)"),
        ("[1]", r"p.jsonl:2: expected a JSON object, got a list"),
        ({"answer": "4"}, r"p.jsonl:2: expected a text in field 'prompt', got None"),
        ({"prompt": "", "answer": "4"}, r"p.jsonl:2: .*'prompt', got ''"),
        ({"prompt": "a"}, r"p.jsonl:2: expected a field 'answer' or 'reward'"),
        ({"prompt": "a", "answer": 4}, r"p.jsonl:2: .*'answer', got 4; put quotes"),
        ({"prompt": "a", "reward": "x"}, r"p.jsonl:2: expected 'reward' to be an object"),
        (
            {"prompt": "a", "reward": {"a": "x"}},
            r"p.jsonl:2: .*one field of exact, regex, code, python",
        ),
        (
            {"prompt": "a", "reward": {"exact": 3}},
            r"p.jsonl:2: expected a text as reward 'exact', got 3",
        ),
        ({"prompt": "a", "reward": {"regex": "("}}, r"p.jsonl:2: reward 'regex' is no pattern"),
        (
            {"prompt": "a", "reward": {"code": "def reward(:"}},
            r"p.jsonl:2: not Python: .* \(line 1\)",
        ),
        (
            {"prompt": "a", "reward": {"code": "x = 1"}},
            r"p.jsonl:2: no function 'reward' is defined",
        ),
        (
            {"prompt": "a", "reward": {"python": "mine.py"}},
            r"p.jsonl:2: .*file.py:function, got 'mine.py'",
        ),
        ({"prompt": "a", "reward": {"python": "no.py:f"}}, r"p.jsonl:2: .*cannot read .*no.py"),
        ("[" * 100_000, r"p.jsonl:2: "),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    """File and line, what was expected, what came."""
    with pytest.raises(TrainError, match=message):
        load_task(write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"}, line))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="cannot read"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(TrainError, match="holds no problem"):
        load_task(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(TrainError, match=r"latin.jsonl:1: not UTF-8 \(byte 0xE9"):
        load_task(str(tmp_path / "latin.jsonl"))


# --- verdicts


def test_a_task_that_raises_scores_0() -> None:
    """In the default of ``Task``, for classes of users: the reason, and the others get their
    rewards."""

    class Mine(Task):
        name = "mine"

        def problem(self, rng: np.random.Generator) -> Problem:
            return Problem("q", "1")

        def reward(self, problem: Problem, completion: str) -> float:
            return 1 / int(completion)

    task = Mine()
    verdicts = task.verdicts(task.problems(4, 0), ["1", "0", "x", "-1"])
    assert [v.reward for v in verdicts] == [1.0, 0.0, 0.0, 0.0]
    assert verdicts[1].reason == "ZeroDivisionError: division by zero"
    assert "[0, 1], got -1" in str(verdicts[3].reason)


def test_checked_takes_numbers_only() -> None:
    """Also those of numpy; a string that looks like one is none."""
    for value in (1, 1.0, True, np.float32(1), np.int64(1), np.bool_(True)):
        assert to_verdict(value) == Verdict(1.0)
    for value in ("1", None, [1], np.ones(1), 1j):
        assert "got a" in str(to_verdict(value).reason)
