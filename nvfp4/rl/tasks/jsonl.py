"""Problems from a file, one JSON object per line; rewards by equality, pattern, tests or function.

    {"prompt": "2+2=", "answer": "4"}
        reward 1 for exactly that, but for spaces around it
    {"prompt": "...", "reward": {"exact": "4"}}
        the same, without a demonstration
    {"prompt": "...", "reward": {"regex": "^\\\\s*(four|4)\\\\s*$"}}
        reward 1 if the pattern is found
    {"prompt": "...", "reward": {"code": "def reward(completion, row): ..."}}
        what the function returns, in [0, 1]
    {"prompt": "...", "reward": {"python": "rewards.py:reward"}}
        the same, from a file beside this one
    {"prompt": "...", "reward": {"tests": [{"stdin": "1 2", "stdout": "3"},
                                           {"call": "add", "arguments": [1, 2], "result": 3}]}}
        1 if the completion, a Python program, does all of this

Patterns, functions and programs run in the sandbox (rewards/). row is the whole object of the line,
with any further fields of yours. A function reads and imports what lies in the folder of its file;
``read`` names more.

**Never exec or eval a completion in a reward function**: the model's text would share a process
with the function, and could write its own verdict. Give tests; or a function with a third
parameter, ``reward(completion, row, run)``:

    outcome = run(program, stdin="1 2")                         .stdout, .stderr, .status, .stopped
    outcome = run(program, call="add", arguments=[1, 2])        .result

Each run is a process of its own that has the program and its input and nothing else, neither the
row nor your files; what it says is compared by yours. With tests the program is the last fenced
block of a completion, or else all of it; what ``run`` is given is for your function to cut out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nvfp4.rl.rewards.sandbox import (
    Limits,
    ProgramTests,
    RewardCall,
    Sandbox,
    compile_reward,
    runs_text,
)
from nvfp4.rl.rewards.verdict import Verdict
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.tasks.digits import replace_digit
from nvfp4.run.corpus import read_json
from nvfp4.run.errors import TrainError

KINDS = ("exact", "regex", "code", "python", "tests")
FOREIGN = ("code", "python", "tests")
"""What runs as code: a pattern is data, even where nothing can confine it."""

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

_SEARCH = """
import re
def reward(completion, row):
    return re.search(row["reward"]["regex"], completion) is not None
"""


@dataclass
class Jsonl(Task):
    """The problems of a file, drawn with replacement.

    seconds, memory_mib: limits of each reward, as ``sandbox.Limits`` has them. preload: modules
    that reward functions may import besides the standard library. read: files and folders that they
    may read besides the folder of their file. unsafe_rewards: run them even where they cannot be
    confined. ``TrainError`` with file and line for whatever is wrong in the file.
    """

    name: ClassVar[str] = "jsonl"
    path: str
    seconds: float = 5.0
    memory_mib: int = 512
    preload: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    unsafe_rewards: bool = False
    rows: list[Problem] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rows = read_problems(Path(self.path))
        kinds = {problem.data["kind"] for problem in self.rows}
        functions = [row.data["call"] for row in self.rows if row.data["kind"] == "python"]
        folders = {call.folder for call in functions}

        # A function may read its file's folder, so that must not be a home or /tmp.
        if not self.unsafe_rewards:
            for folder in sorted(folders):
                _check_folder(folder)
        for path in self.read:
            if not Path(path).exists():
                raise TrainError(f"task: read: {path} does not exist")

        # patterns are data: they need no walls
        self._sandbox = Sandbox(
            Limits(self.seconds, self.memory_mib),
            preload=self.preload,
            read=[*sorted(folders), *self.read],
            unsafe=self.unsafe_rewards or not kinds & set(FOREIGN),
        )

    def listed(self) -> list[Problem]:
        """All rows of the file."""
        return self.rows

    def confinement(self) -> str | None:
        """What the sandbox confines, and what it cannot, if a row brings code; else None."""
        if not any(problem.data["kind"] in FOREIGN for problem in self.rows):
            return None
        warned = {p.data["warning"]: None for p in self.rows if p.data["warning"]}
        return "\n".join([self._sandbox.describe(), *warned])

    def problem(self, rng: np.random.Generator) -> Problem:
        """A row of the file, drawn evenly."""
        return self.rows[rng.integers(len(self.rows))]

    def reward(self, problem: Problem, completion: str) -> float:
        """The one verdict of ``verdicts``."""
        return self.verdicts([problem], [completion])[0].reward

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Equality is decided here, the rest goes to the sandbox in one batch."""
        # what only the sandbox can decide, and where it belongs
        calls: list[RewardCall | ProgramTests] = []
        places = []
        verdicts = [Verdict(0.0)] * len(problems)
        for i, (problem, text) in enumerate(zip(problems, completions, strict=True)):
            data = problem.data
            if data["kind"] == "exact":
                verdicts[i] = Verdict(float(text.strip() == data["exact"].strip()))
                continue
            if data["kind"] == "tests":
                calls.append(ProgramTests(program(text), data["tests"]))
            else:
                calls.append(replace(data["call"], arguments=(text, data["row"])))
            places.append(i)

        # One batch, so that the workers of the sandbox are all busy.
        answers = self._sandbox.run(calls) if calls else []
        for i, verdict in zip(places, answers, strict=True):
            verdicts[i] = verdict
        return verdicts

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """One digit of the answer is replaced; an answer without digits stays."""
        return replace_digit(problem.answer, rng)

    def close(self) -> None:
        """End the workers of the sandbox; the next reward starts new ones."""
        self._sandbox.close()


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file; nothing of it is run.

    ``TrainError`` with file and line for the first that is wrong.
    """
    # line by line, so that the line of an error is known
    problems = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                if not raw.strip():
                    continue
                try:
                    problems.append(_problem(_row(raw), path.parent, where))
                except ValueError as error:
                    raise TrainError(f"{where}: {error}") from None
    except OSError as error:
        raise TrainError(f"task: cannot read {path}: {error.strerror or error}") from error
    if not problems:
        raise TrainError(f"task: {path} holds no problem; give one JSON object per line")
    return problems


def _row(raw: bytes) -> dict[str, Any]:
    try:
        row = read_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02X} at {error.start}"
        raise ValueError(f"not UTF-8 (byte {byte})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got a {type(row).__name__}")
    return row


def _problem(row: dict[str, Any], folder: Path, where: str) -> Problem:
    """The problem of a line; ValueError says which field is wrong, and how."""
    # the prompt, and an answer that may be missing
    prompt, answer = row.get("prompt"), row.get("answer", "")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"expected a text in field 'prompt', got {prompt!r}")
    if not isinstance(answer, str):
        raise ValueError(f"expected a text in field 'answer', got {answer!r}; put quotes around it")
    if "reward" not in row:
        if "answer" not in row:
            raise ValueError("expected a field 'answer' or 'reward', got neither")
        return _of_kind("exact", prompt, answer, row, exact=answer)

    # {kind: text}, or {"tests": list}
    spec = row["reward"]
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        expected = f"an object with one field of {', '.join(KINDS)}"
        raise ValueError(f"expected 'reward' to be {expected}, got {spec!r}")
    kind, text = next(iter(spec.items()))
    if kind == "tests":
        return _of_kind(kind, prompt, answer, row, tests=_tests(text))
    if not isinstance(text, str) or not text:
        raise ValueError(f"expected a text as reward {kind!r}, got {text!r}")
    if kind == "exact":
        return _of_kind(kind, prompt, answer or text, row, exact=text)
    call, warning = _call(kind, text, folder, where)
    return _of_kind(kind, prompt, answer, row, call=call, warning=warning)


def _of_kind(kind: str, prompt: str, answer: str, row: dict[str, Any], **data: Any) -> Problem:
    """``data``: exact, tests, or call and warning, as the kind has it."""
    return Problem(prompt, answer, {"row": row, "kind": kind, "warning": None, **data})


def _tests(given: Any) -> tuple[dict[str, Any], ...]:
    """Tests of a program, checked."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected a list of tests as reward 'tests', got {given!r}")
    # each by what it prints, or by what a function of it returns
    for test in given:
        keys = set(test) if isinstance(test, dict) else set()
        by_output = {"stdout"} <= keys <= {"stdin", "stdout"}
        by_result = {"call", "result"} <= keys <= {"call", "arguments", "result"}
        if not (by_output or by_result):
            forms = "{'stdin', 'stdout'} or {'call', 'arguments', 'result'}"
            raise ValueError(f"expected each test as {forms}, got {test!r}")
        texts = [test[key] for key in ("stdin", "stdout", "call") if key in test]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"expected texts as stdin, stdout and call of a test, got {test!r}")
        if not isinstance(test.get("arguments", []), list):
            raise ValueError(f"expected a list as arguments of a test, got {test!r}")
    return tuple(given)


def _call(kind: str, text: str, folder: Path, where: str) -> tuple[RewardCall, str | None]:
    """What to call (completion and row come later), and a warning if it lets the model judge."""
    if kind == "regex":
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"reward 'regex' is no pattern: {error}") from None
        return RewardCall(compile_reward(_SEARCH, "regex"), "regex", "reward", ()), None
    if kind == "code":
        call = RewardCall(compile_reward(text, where), where, "reward", ())
        return call, _warning(text, where)

    # python: a function of a file
    file, _, function = text.rpartition(":")
    if not file:
        raise ValueError(f"expected reward 'python' as file.py:function, got {text!r}")
    path = folder / file
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"reward 'python': cannot read {path}: {error}") from None
    code = compile_reward(source, str(path), function)
    call = RewardCall(code, str(path), function, (), str(path.resolve().parent))
    return call, _warning(source, str(path))


def _warning(source: str, name: str) -> str | None:
    """What a user should hear of a function that calls exec or eval."""
    line = runs_text(source)
    if line is None:
        return None
    return (
        f"warning: {name} calls exec or eval in line {line}; on text of the model that lets it "
        "write its own verdict: use tests, or run(program)"
    )


def _check_folder(folder: str) -> None:
    """``TrainError`` for a folder of all sorts of things: the function would see them all."""
    shared = {Path("~").expanduser().absolute().resolve(), Path(tempfile.gettempdir()).resolve()}
    if any(Path(folder) in (place, *place.parents) for place in shared):
        raise TrainError(
            f"task: reward 'python': its file lies in {folder}, all of which the function could "
            "read; put it into a folder of its own"
        )


def program(completion: str) -> str:
    """The program in a completion: the last fenced block, or else all of it."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion
