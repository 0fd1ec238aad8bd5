"""Arithmetic tasks: addition written from the units, sums and products modulo a number, countdown.

    addition     a407+058>      5640      465 from the units on
    modular      m7*8%5>        1
    countdown    c3,7,2=13>     3*2+7     or any other way that uses each number once

Countdown has many right answers, so it needs a verifier that computes (expressions.py); the others
compare with the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.tasks.digits import ExactTask
from nvfp4.rl.tasks.expressions import ExpressionError, evaluate

_OPERATORS = "+-*"
_TRIES = 1000


@dataclass
class Addition(ExactTask):
    """``a407+058>`` -> ``5640``: of fixed width and reversed.

    So each digit needs only digits that are already written.
    """

    name: ClassVar[str] = "addition"
    digits: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits must be from 1 to 9, got {self.digits}")

    def problem(self, rng: np.random.Generator) -> Problem:
        """Two numbers of ``digits`` digits; the answer is their sum, last digit first."""
        a, b = (int(n) for n in rng.integers(0, 10**self.digits, 2))
        width = self.digits
        return Problem(f"a{a:0{width}}+{b:0{width}}>", f"{a + b:0{width + 1}}"[::-1])


@dataclass
class Modular(ExactTask):
    """``m7*8%5>`` -> ``1``: +, - or * of two numbers below the modulus, from 2 to ``largest``."""

    name: ClassVar[str] = "modular"
    largest: int = 19

    def __post_init__(self) -> None:
        if not 2 <= self.largest < 10**9:
            raise ValueError(f"largest must be from 2 to 10**9 - 1, got {self.largest}")

    def problem(self, rng: np.random.Generator) -> Problem:
        """A modulus, two numbers below it and an operator, all drawn evenly."""
        modulus = int(rng.integers(2, self.largest + 1))
        a, b = (int(n) for n in rng.integers(0, modulus, 2))
        operator = _OPERATORS[rng.integers(len(_OPERATORS))]
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
        return Problem(f"m{a}{operator}{b}%{modulus}>", str(value % modulus))


@dataclass
class Countdown(Task):
    """``c3,7,2=13>`` -> ``3*2+7``: reach the target with each number once, in any way.

    The numbers are from 1 to 9, the target from 0 to ``largest``; a right answer without
    parentheses always exists. Answers may use + - * / and parentheses; intermediate results may be
    negative or fractions.
    """

    name: ClassVar[str] = "countdown"
    vocabulary: ClassVar[str] = "symbols"
    numbers: int = 3
    largest: int = 99

    def __post_init__(self) -> None:
        if not 1 <= self.numbers <= 9 or self.largest < 9:
            got = f"{self.numbers} and {self.largest}"
            raise ValueError(f"numbers must be from 1 to 9 and largest at least 9, got {got}")

    def problem(self, rng: np.random.Generator) -> Problem:
        """Numbers and an expression of them, drawn until its value is a target."""
        # from an answer to its target, so that every problem can be solved
        for _ in range(_TRIES):
            numbers = [int(n) for n in rng.integers(1, 10, self.numbers)]
            answer = _joined(numbers, rng)
            target = evaluate(answer)[0]
            if 0 <= target <= self.largest:
                break
        else:  # below 1e-25 for any setting above: of nine numbers 7 % of the draws are below 10
            numbers = [1] * self.numbers
            answer = "*".join("1" * self.numbers)
            target = evaluate("1")[0]

        shown = ",".join(str(numbers[i]) for i in rng.permutation(self.numbers))
        data = {"numbers": sorted(numbers), "target": int(target)}
        return Problem(f"c{shown}={target}>", answer, data)

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for an expression of these numbers, each once, of the target's value, else 0."""
        try:
            value, used = evaluate(completion)
        except ExpressionError:
            return 0.0
        once = sorted(used) == problem.data["numbers"]
        return float(once and value == problem.data["target"])

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """An expression of any numbers and value."""
        try:
            evaluate(completion)
        except ExpressionError:
            return False
        return True

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """The same numbers in any order with any operators: mostly wrong."""
        numbers = re.findall(r"\d+", problem.answer)
        return _joined([int(numbers[i]) for i in rng.permutation(len(numbers))], rng)


def _joined(numbers: list[int], rng: np.random.Generator) -> str:
    """The numbers in their order with operators between them, drawn."""
    text = str(numbers[0])
    for number in numbers[1:]:
        text += f"{_OPERATORS[rng.integers(len(_OPERATORS))]}{number}"
    return text
