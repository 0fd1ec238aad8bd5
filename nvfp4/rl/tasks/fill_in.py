"""Multiple choice made from program text that has no answers: which of these lines stood in the gap?

After Golden Goose (arXiv 2601.22975), where a language model picks the span and invents the wrong options; here the
syntax tree picks a statement, and the other options are statements of the same kind from other functions.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.run.corpus import find_files, standard_library_files
from nvfp4.run.errors import TrainError

GAP = "____"
LETTERS = "ABCDEFGHIJKLMNOP"

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Raise, ast.Delete, ast.Assert)
_NEAR = 4  # times as many candidates of similar length as wrong options, drawn from
_TRIES = 100


@dataclass(frozen=True)
class Gap:
    """A statement on a line of its own within a function. lines: the function's, without common indent."""

    file: str
    lines: tuple[str, ...]
    place: int
    kind: str

    @property
    def statement(self) -> str:
        """The line without its indent."""
        return self.lines[self.place].strip()


@dataclass
class FillIn(Task):
    """A function with a gap and ``options`` lines; the answer is a letter. Guessing scores 1/options.

    data: files, folders or globs of Python text, by default the standard library of the running Python, of which every
    so manieth file is read until there are ``files``. longest: characters of a function. The same for the same Python.
    """

    name: ClassVar[str] = "fill_in"
    options: int = 4
    data: tuple[str, ...] = ()
    files: int = 60
    longest: int = 300

    def __post_init__(self) -> None:
        if not 2 <= self.options <= len(LETTERS):
            raise ValueError(f"options must be from 2 to {len(LETTERS)}, got {self.options}")

    def problem(self, rng: np.random.Generator) -> Problem:
        for _ in range(_TRIES):
            gap = self._gaps[rng.integers(len(self._gaps))]
            wrong = self._wrong(gap, rng)
            if wrong:
                break
        else:
            raise TrainError(f"fill_in: too few statements for {self.options} options; give more data")
        letters = rng.permutation(self.options)
        choices = [wrong[i - 1] if i else gap.statement for i in letters]
        indent = gap.lines[gap.place][: -len(gap.statement)]
        shown = [*gap.lines[: gap.place], indent + GAP, *gap.lines[gap.place + 1 :]]
        listed = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        answer = LETTERS[int(np.flatnonzero(letters == 0)[0])]
        return Problem("\n".join([*shown, *listed, f"{GAP} is "]), answer, {"file": gap.file})

    def reward(self, problem: Problem, completion: str) -> float:
        return float(completion.strip() == problem.answer)

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """One of the letters that were offered."""
        return completion.strip() in set(LETTERS[: self.options])

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """Another letter."""
        return LETTERS[(LETTERS.index(problem.answer) + int(rng.integers(1, self.options))) % self.options]

    def origin(self, problem: Problem) -> str:
        """The file: two gaps of one function are not on both sides."""
        return str(problem.data["file"])

    def _wrong(self, gap: Gap, rng: np.random.Generator) -> list[str]:
        """Statements of the same kind, of similar length, from elsewhere; [] if there are too few."""
        others, lengths = self._statements[gap.kind]
        own = {line.strip() for line in gap.lines}
        wanted, around = self.options - 1, int(np.searchsorted(lengths, len(gap.statement)))
        reach = _NEAR * self.options
        near = [text for text in others[max(0, around - reach) : around + reach] if text not in own]
        if len(near) < wanted:
            return []
        return [near[i] for i in rng.choice(len(near), wanted, replace=False)]

    @cached_property
    def _gaps(self) -> list[Gap]:
        found = find_files(self.data, "data") if self.data else standard_library_files()
        step = max(1, len(found) // self.files)
        gaps = [gap for name, path in found[::step] for gap in _read(name, path, self.longest)]
        if not gaps:
            raise TrainError("fill_in: no function with a statement to leave out; give Python files as data")
        return gaps

    @cached_property
    def _statements(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """Of each kind: the different statements by length, and the lengths."""
        kinds = sorted({gap.kind for gap in self._gaps})
        table = {}
        for kind in kinds:
            texts = sorted({gap.statement for gap in self._gaps if gap.kind == kind}, key=lambda t: (len(t), t))
            table[kind] = (texts, np.array([len(text) for text in texts]))
        return table


def _read(name: str, path: Path, longest: int) -> list[Gap]:
    try:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # text that is not this Python's has no gaps
    lines = text.split("\n")
    return [
        gap
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for gap in _of_function(name, node, lines, longest)
    ]


def _of_function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], longest: int) -> list[Gap]:
    """Gaps at simple statements that have a line to themselves, not in functions that are long or of one statement."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    indent = node.col_offset
    body = tuple(line[indent:] for line in lines[first:last])
    if sum(map(len, body)) + len(body) > longest or any(line[:indent].strip() for line in lines[first:last]):
        return []
    gaps = []
    for child in ast.walk(node):
        if isinstance(child, _SIMPLE) and child.lineno == child.end_lineno and child.lineno > node.body[0].lineno - 1:
            line = lines[child.lineno - 1]
            alone = line[: child.col_offset].strip() == "" and line[child.end_col_offset :].strip() == ""
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if alone and not docstring and len(body) > 2:
                gaps.append(Gap(name, body, child.lineno - 1 - first, type(child).__name__))
    return gaps
