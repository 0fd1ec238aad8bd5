"""Problems from a file, one JSON object a line, with a reward by equality, by pattern, or by a function.

{"prompt": "2+2=", "answer": "4"}                                   reward 1 for exactly that, but for spaces around it
{"prompt": "...", "reward": {"exact": "4"}}                         the same, without a demonstration
{"prompt": "...", "reward": {"regex": "^\\\\s*(four|4)\\\\s*$"}}      reward 1 if the pattern is found
{"prompt": "...", "reward": {"code": "def reward(completion, row): ..."}}       what the function returns, in [0, 1]
{"prompt": "...", "reward": {"python": "rewards.py:reward"}}                    the same, from a file beside this one

Patterns and functions run in the sandbox. row is the whole object of the line, with any further fields of yours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nvfp4.rl.rewards.sandbox import Call, Limits, Sandbox, compile_reward
from nvfp4.rl.tasks.base import Problem, Task, Verdict
from nvfp4.rl.tasks.digits import replace_digit
from nvfp4.train.corpus import read_json
from nvfp4.train.errors import TrainError

KINDS = ("exact", "regex", "code", "python")
ARGUMENTS = 2  # of a reward function: completion, row

_SEARCH = """
import re
def reward(completion, row):
    return re.search(row["reward"]["regex"], completion) is not None
"""


@dataclass
class Jsonl(Task):
    """The problems of a file, drawn with replacement.

    seconds, memory_mib: limits of each reward, as ``sandbox.Limits`` has them. preload: modules that reward functions
    may import besides the standard library. ``TrainError`` with file and line for whatever is wrong in the file.
    """

    name: ClassVar[str] = "jsonl"
    path: str
    seconds: float = 5.0
    memory_mib: int = 512
    preload: tuple[str, ...] = ()
    rows: list[Problem] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rows = read_problems(Path(self.path))
        self._sandbox = Sandbox(Limits(self.seconds, self.memory_mib), preload=self.preload)

    def problem(self, rng: np.random.Generator) -> Problem:
        return self.rows[rng.integers(len(self.rows))]

    def reward(self, problem: Problem, completion: str) -> float:
        return self.verdicts([problem], [completion])[0].reward

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        calls, where = [], []
        verdicts = [Verdict(0.0)] * len(problems)
        for i, (problem, text) in enumerate(zip(problems, completions, strict=True)):
            call: Call | None = problem.data["call"]
            if call is None:
                verdicts[i] = Verdict(float(text.strip() == problem.data["exact"].strip()))
            else:
                calls.append(Call(call.code, call.name, call.function, (text, problem.data["row"])))
                where.append(i)
        for i, verdict in zip(where, self._sandbox.run(calls) if calls else [], strict=True):
            verdicts[i] = verdict
        return verdicts

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """One digit of the answer is replaced; an answer without digits stays."""
        return replace_digit(problem.answer, rng)

    def close(self) -> None:
        self._sandbox.close()


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file; nothing of it is run. ``TrainError`` with file and line for the first that is wrong."""
    problems = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    try:
                        problems.append(_problem(_row(raw), path.parent, f"{path}:{number}"))
                    except ValueError as error:
                        raise TrainError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise TrainError(f"task: cannot read {path}: {error.strerror or error}") from error
    if not problems:
        raise TrainError(f"task: {path} holds no problem; give one JSON object a line")
    return problems


def _row(raw: bytes) -> dict[str, Any]:
    try:
        row = read_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{raw[error.start]:02X} at {error.start})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got a {type(row).__name__}")
    return row


def _problem(row: dict[str, Any], folder: Path, where: str) -> Problem:
    prompt, answer = row.get("prompt"), row.get("answer", "")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"expected a text in field 'prompt', got {prompt!r}")
    if not isinstance(answer, str):
        raise ValueError(f"expected a text in field 'answer', got {answer!r}; put quotes around it")
    if "reward" not in row:
        if "answer" not in row:
            raise ValueError("expected a field 'answer' or 'reward', got neither")
        return Problem(prompt, answer, {"row": row, "exact": answer, "call": None})
    spec = row["reward"]
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise ValueError(f"expected 'reward' to be an object with one field of {', '.join(KINDS)}, got {spec!r}")
    kind, text = next(iter(spec.items()))
    if not isinstance(text, str) or not text:
        raise ValueError(f"expected a text as reward {kind!r}, got {text!r}")
    if kind == "exact":
        return Problem(prompt, answer or text, {"row": row, "exact": text, "call": None})
    return Problem(prompt, answer, {"row": row, "call": _call(kind, text, folder, where)})


def _call(kind: str, text: str, folder: Path, where: str) -> Call:
    """What to call; completion and row come later."""
    if kind == "regex":
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"reward 'regex' is no pattern: {error}") from None
        return Call(compile_reward(_SEARCH, "regex"), "regex", "reward", ())
    if kind == "code":
        return Call(compile_reward(text, where), where, "reward", ())
    file, _, function = text.rpartition(":")
    if not file:
        raise ValueError(f"expected reward 'python' as file.py:function, got {text!r}")
    try:
        source = (folder / file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"reward 'python': cannot read {folder / file}: {error}") from None
    return Call(compile_reward(source, str(folder / file), function), str(folder / file), function, ())
