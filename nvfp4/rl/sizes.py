"""How long the completions and the sequences of a task are, where the config leaves it open."""

from __future__ import annotations

from nvfp4.numerics.rng import LENGTH_BRANCH, fold_in
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.tasks.jsonl import Jsonl
from nvfp4.rl.text import Text
from nvfp4.run.errors import TrainError

DRAWN = 256
"""Problems that are looked at."""

LEAST_NEW, LEAST_LOCAL = 8, 64
"""Tokens that a completion may have at least: of a new model, which knows the task alone, and of one that may think."""

_SEED = fold_in(0, LENGTH_BRANCH)
_BLOCK = 32  # a context is a multiple of this many tokens


def lengths(task: Task, text: Text) -> tuple[int, int]:
    """Tokens of the longest prompt and the longest answer, with its end, among ``DRAWN`` problems."""
    try:
        problems = task.problems(DRAWN, _SEED)
    except ValueError as error:
        raise TrainError(f"task {task.name}: {error}") from error
    return max(len(text.prompt(p.prompt)) for p in problems), max(len(text.answer(p.answer)) for p in problems)


def longest_prompt(task: Task, text: Text) -> int:
    """Tokens of the longest prompt: of all rows of a file, else of ``DRAWN`` problems."""
    problems = task.rows if isinstance(task, Jsonl) else task.problems(DRAWN, _SEED)
    return max(len(text.prompt(problem.prompt)) for problem in problems)


def completion_tokens(answer: int, new: bool) -> int:
    """The length limit for answers of so many tokens: one more, so that a right one is never cut for want of room."""
    return max(LEAST_NEW if new else LEAST_LOCAL, answer + 1)


def context_tokens(prompt: int, completion: int) -> int:
    """The context of a new model: room for a prompt half as long again, since longer ones may come."""
    return -(-(prompt + prompt // 2 + completion) // _BLOCK) * _BLOCK
