"""A task: problems drawn from a seed, and a reward for a completion."""

from __future__ import annotations

import hashlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from nvfp4.run.errors import TrainError

HELD_OUT = 1 / 8
"""Share of the problems, by hash, that training never sees when it asks for those that are not held out."""

_DRAWS = 1000  # draws for one problem of the wanted side, before its task is held to have none


@dataclass(frozen=True)
class Problem:
    """A prompt, an answer that is known to be right (for warm starts and for show), and what the verifier needs."""

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """reward in [0, 1]; reason: why it is 0 for want of a proper one (an error, a limit), else None."""

    reward: float
    reason: str | None = None


class Task(ABC):
    """Problems with verifiable answers. One class is a task; ``tasks/registry.py`` names those that come along."""

    name: ClassVar[str]
    vocabulary: ClassVar[str] = "bytes"
    """The smallest vocabulary of ``nvfp4.rl.tokens`` that can spell every prompt and answer."""

    warm_steps: ClassVar[int] = 300
    """Supervised updates with which a new model learns the form of the answers, where the config leaves them open."""

    @abstractmethod
    def problem(self, rng: np.random.Generator) -> Problem:
        """One problem, determined by the generator alone."""

    @abstractmethod
    def reward(self, problem: Problem, completion: str) -> float:
        """In [0, 1]; completion is the text without its end-of-text token. Never raises on any text."""

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Rewards of many completions, each of the problem at its place; what raises or is no reward scores 0."""
        return [self._verdict(p, text) for p, text in zip(problems, completions, strict=True)]

    def final(self, completion: str) -> str:
        """The answer within a completion, by which answers are counted for a majority; "" for none."""
        return completion.strip()

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """Whether a completion looks like an answer, right or wrong. Never raises on any text."""
        return bool(self.final(completion))

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """A wrong or doubtful demonstration, for the noisy teacher of a warm start."""
        return problem.answer

    def problems(self, count: int, seed: int, *, held_out: bool | None = None) -> list[Problem]:
        """``count`` problems, the same for the same seed; held_out: only those that are (True) or are not (False).

        Which side a problem is on depends on its ``origin`` alone, so the sides are disjoint for any two seeds.
        Raises ValueError if a side seems to be empty.
        """
        rng = np.random.default_rng(seed)
        return [self._draw(rng, held_out) for _ in range(count)]

    def origin(self, problem: Problem) -> str:
        """What must not be on both sides of the hold-out: the prompt, or the document that it was made from."""
        return problem.prompt

    def confinement(self) -> str | None:
        """What confines foreign code that the task runs, for people; None if it runs none. ``TrainError`` if it may
        not run here. May start processes."""
        return None

    def close(self) -> None:  # noqa: B027  # most tasks hold nothing
        """Give back what the task holds, such as processes; it may be used again."""

    def _draw(self, rng: np.random.Generator, held_out: bool | None) -> Problem:
        for _ in range(_DRAWS):
            problem, share = self._checked(rng)
            if held_out is None or held_out == (share < HELD_OUT):
                return problem
        side = "held out" if held_out else "not held out"
        raise ValueError(f"task {self.name}: none of {_DRAWS} problems is {side}; it has too few different ones")

    def _checked(self, rng: np.random.Generator) -> tuple[Problem, float]:
        """A problem and what decides its side; ``TrainError`` with the place if the class, a user's maybe, fails."""
        try:
            problem = self.problem(rng)
            return problem, _share(self.origin(problem))
        except TrainError:
            raise
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainError(
                f"task {self.name}: no problem can be made: {type(error).__name__}: {error} ({last.filename}, line "
                f"{last.lineno})"
            ) from error

    def _verdict(self, problem: Problem, completion: str) -> Verdict:
        try:
            return checked(self.reward(problem, completion))
        except (Exception, SystemExit) as error:  # a user's class may raise anything, and training goes on
            return Verdict(0.0, f"{type(error).__name__}: {error}"[:200])


def checked(value: object) -> Verdict:
    """The verdict of what a reward function returned: 0 with the reason if that is no number in [0, 1]."""
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return Verdict(0.0, f"the reward must be a number in [0, 1], got a {type(value).__name__}")
    reward = float(value)
    if not 0.0 <= reward <= 1.0:  # NaN neither
        return Verdict(0.0, f"the reward must be a number in [0, 1], got {reward:g}")
    return Verdict(reward)


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
