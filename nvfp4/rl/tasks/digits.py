"""Tasks on strings of digits: sorting, reversing, parity with scratch work.

    sort       s52907>    02579
    reverse    r4821>     1284
    parity     p1011>     11011011=1      each bit with the parity so far; what is after "=" counts

Prompts begin with the task's letter, so that one model can learn several. There is one right
answer, to the letter, and the noisy teacher of the warm start gets one digit of it wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nvfp4.rl.tasks.base import Problem, Task


def replace_digit(text: str, rng: np.random.Generator) -> str:
    """``text`` with a drawn digit replaced by another drawn one; a text without digits stays."""
    places = [i for i, character in enumerate(text) if character in "0123456789"]
    if not places:
        return text
    place = places[rng.integers(len(places))]
    digit = (int(text[place]) + rng.integers(1, 10)) % 10
    return f"{text[:place]}{digit}{text[place + 1 :]}"


@dataclass
class ExactTask(Task):
    """A task with one right answer: reward 1 for it to the letter, else 0."""

    vocabulary: ClassVar[str] = "symbols"

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for the answer to the letter, else 0."""
        return float(completion == problem.answer)

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """Digits and nothing else."""
        return completion.isascii() and completion.isdigit()

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """The answer with one digit replaced by another."""
        return replace_digit(problem.answer, rng)


@dataclass
class DigitsTask(ExactTask):
    """``shortest`` to ``longest`` digits, the length drawn first."""

    shortest: int = 3
    longest: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            got = f"{self.shortest} and {self.longest}"
            raise ValueError(f"shortest must be from 1 to longest, got {got}")

    def digits(self, rng: np.random.Generator, base: int = 10) -> str:
        """A drawn string of digits below ``base``."""
        length = rng.integers(self.shortest, self.longest + 1)
        return "".join(map(str, rng.integers(0, base, length)))


@dataclass
class Sort(DigitsTask):
    """Sort the digits: ``s52907>`` -> ``02579``."""

    name: ClassVar[str] = "sort"

    def problem(self, rng: np.random.Generator) -> Problem:
        """Drawn digits, to be sorted."""
        digits = self.digits(rng)
        return Problem(f"s{digits}>", "".join(sorted(digits)))


@dataclass
class Reverse(DigitsTask):
    """Reverse the digits: ``r4821>`` -> ``1284``."""

    name: ClassVar[str] = "reverse"

    def problem(self, rng: np.random.Generator) -> Problem:
        """Drawn digits, to be reversed."""
        digits = self.digits(rng)
        return Problem(f"r{digits}>", digits[::-1])


@dataclass
class Parity(DigitsTask):
    """``p1011>`` -> ``11011011=1``: each bit with the parity so far, after "=" that of all.

    The last alone is rewarded, so that scratch work is learnt because it helps.
    """

    name: ClassVar[str] = "parity"
    shortest: int = 7
    longest: int = 7

    def problem(self, rng: np.random.Generator) -> Problem:
        """Drawn bits; the answer spells the running parity beside each."""
        bits = self.digits(rng, base=2)
        parities = [bits[: i + 1].count("1") % 2 for i in range(len(bits))]
        scratch = "".join(f"{bit}{parity}" for bit, parity in zip(bits, parities, strict=True))
        return Problem(f"p{bits}>", f"{scratch}={parities[-1]}")

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for the right parity after the last "=", whatever the scratch work, else 0."""
        return float(completion.rpartition("=")[1:] == problem.answer.rpartition("=")[1:])

    def final(self, completion: str) -> str:
        """What is after the last "="."""
        _, equals, parity = completion.rpartition("=")
        return parity if equals else ""

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """Bits, and one of them after "="."""
        return self.final(completion) in ("0", "1") and not completion.strip("01").strip("=")

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """One scratch bit or parity is wrong, and so is what follows from it: the final parity."""
        scratch, _, parity = problem.answer.partition("=")
        place = rng.integers(len(scratch))
        wrong = scratch[:place] + str(1 - int(scratch[place])) + scratch[place + 1 :]
        return f"{wrong}={1 - int(parity)}"
