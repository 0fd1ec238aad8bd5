"""Multiple choice made from program text: which of these lines stood in the gap?

    def area(r):
        ____
        return a
    A) a = 3.14 * r * r
    B) total = 0
    ____ is                                  -> A

After Golden Goose (arXiv 2601.22975), where a language model picks the span and invents the wrong
options; here the syntax tree picks a statement, and the other options are statements of the same
kind and of similar length from other functions. Guessing scores 1 / options.

From files to problems: ``_read`` a file, ``_of_function`` for each function with few enough
characters, a ``Gap`` for each simple statement that has a line to itself.
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

_SIMPLE = (
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Return,
    ast.Expr,
    ast.Raise,
    ast.Delete,
    ast.Assert,
)
_NEAR = 4  # times as many candidates of similar length as wrong options, drawn from
_TRIES = 100


@dataclass(frozen=True)
class Gap:
    """A statement on a line of its own within a function.

    lines: the function's, without common indent. place: of the statement among them. kind: its
    class in the syntax tree.
    """

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
    """A function with a gap and ``options`` lines; the answer is a letter.

    data: files, folders or globs of Python text; by default the standard library of the running
    Python, of which about ``files`` evenly spread ones are read. longest: characters of a function.
    The same for the same Python.
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
        """A function with a gap, and lettered choices; ``TrainError`` if there are too few."""
        # a statement, and enough others like it
        for _ in range(_TRIES):
            gap = self._gaps[rng.integers(len(self._gaps))]
            wrong = self._wrong(gap, rng)
            if wrong:
                break
        else:
            lacking = f"too few statements for {self.options} options"
            raise TrainError(f"fill_in: {lacking}; give more data")

        # shuffled: letters[i] is 0 where the right one stands, else the number of a wrong one
        letters = rng.permutation(self.options)
        choices = [wrong[i - 1] if i else gap.statement for i in letters]

        # the function with its gap, the choices, and the question
        indent = gap.lines[gap.place][: -len(gap.statement)]
        shown = [*gap.lines[: gap.place], indent + GAP, *gap.lines[gap.place + 1 :]]
        listed = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        answer = LETTERS[int(np.flatnonzero(letters == 0)[0])]
        return Problem("\n".join([*shown, *listed, f"{GAP} is "]), answer, {"file": gap.file})

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for the right letter, else 0."""
        return float(completion.strip() == problem.answer)

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """One of the letters that were offered."""
        return completion.strip() in set(LETTERS[: self.options])

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """Another letter than the right one."""
        step = int(rng.integers(1, self.options))
        return LETTERS[(LETTERS.index(problem.answer) + step) % self.options]

    def origin(self, problem: Problem) -> str:
        """The file: two gaps of one function are not on both sides."""
        return str(problem.data["file"])

    def _wrong(self, gap: Gap, rng: np.random.Generator) -> list[str]:
        """Statements of the same kind and of similar length; [] if there are too few."""
        others, lengths = self._statements[gap.kind]
        own = {line.strip() for line in gap.lines}
        count = self.options - 1

        # the neighbours of its length, of which some are drawn
        around = int(np.searchsorted(lengths, len(gap.statement)))
        reach = _NEAR * self.options
        window = others[max(0, around - reach) : around + reach]
        near = [text for text in window if text not in own]
        if len(near) < count:
            return []
        return [near[i] for i in rng.choice(len(near), count, replace=False)]

    @cached_property
    def _gaps(self) -> list[Gap]:
        """Every statement that can be left out, in the order of files."""
        paths = find_files(self.data, "data") if self.data else standard_library_files()
        step = max(1, len(paths) // self.files)
        gaps = [gap for name, path in paths[::step] for gap in _read(name, path, self.longest)]
        if not gaps:
            lacking = "no function with a statement to leave out"
            raise TrainError(f"fill_in: {lacking}; give Python files as data")
        return gaps

    @cached_property
    def _statements(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """The different statements of each kind by length, and the lengths."""
        kinds = sorted({gap.kind for gap in self._gaps})
        table = {}
        for kind in kinds:
            statements = {gap.statement for gap in self._gaps if gap.kind == kind}
            texts = sorted(statements, key=lambda text: (len(text), text))
            table[kind] = (texts, np.array([len(text) for text in texts]))
        return table


def _read(name: str, path: Path, longest: int) -> list[Gap]:
    """The gaps of a file, whose name they carry; none for what is not this Python's."""
    try:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    lines = text.split("\n")
    gaps = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            gaps += _of_function(name, node, lines, longest)
    return gaps


def _of_function(
    name: str,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    lines: list[str],
    longest: int,
) -> list[Gap]:
    """Gaps at the simple statements of a function that have a line to themselves.

    None in functions that are long, or of one statement.
    """
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    indent = node.col_offset
    whole = lines[first:last]
    body = tuple(line[indent:] for line in whole)
    too_long = sum(map(len, body)) + len(body) > longest
    if too_long or len(body) <= 2 or any(line[:indent].strip() for line in whole):
        return []

    # a line that is one simple statement and nothing else; a docstring says nothing of the code
    gaps = []
    for child in ast.walk(node):
        if not isinstance(child, _SIMPLE) or child.lineno != child.end_lineno:
            continue
        line = lines[child.lineno - 1]
        before, behind = line[: child.col_offset], line[child.end_col_offset :]
        in_body = child.lineno >= node.body[0].lineno
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if in_body and not docstring and not before.strip() and not behind.strip():
            gaps.append(Gap(name, body, child.lineno - 1 - first, type(child).__name__))
    return gaps
