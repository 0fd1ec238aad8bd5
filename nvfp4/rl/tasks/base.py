"""A task: problems drawn from a seed, and a reward for a completion.

**A new task is one class**: ``problem`` and ``reward``, a ``name``, and options as dataclass
fields. One of the package's is a file in this folder and a line in registry.py; one of yours is
used from where it is:

    nvfp4 rl --task sort --task-options longest=5        a name of the registry
    nvfp4 rl --task my_tasks.py:MyTask                   a class of yours (examples/rl_own_task.py)
    nvfp4 rl --task problems.jsonl                       a file of problems (jsonl.py)

A run asks a task for

    problems        of a step or an evaluation, from a seed; training and evaluation never share one
    verdicts        on completions, in [0, 1]; whatever raises scores 0 with a reason
    corrupt         wrong demonstrations, for the warm start of a new model
    final, well_formed    for controls (spurious.py): the answer within a completion, and its looks
    confinement, close    where it runs foreign code

**Held out.** Each problem has an ``origin``, its prompt unless the task says otherwise, and an
eighth of all origins, by hash, is on the held-out side: so the two sides are disjoint for any two
seeds, and nobody has to keep a list.
"""

from __future__ import annotations

import hashlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from nvfp4.rl.rewards.verdict import Verdict, to_verdict
from nvfp4.run.errors import TrainError

HELD_OUT = 1 / 8
"""Share of the problems, by hash, that training never sees."""

_DRAWS = 1000  # draws for one problem of the wanted side, before its task is held to have none


@dataclass(frozen=True)
class Problem:
    """A prompt, an answer that is known to be right, and what the verifier needs.

    The answer is for warm starts and for show; "" if there is none.
    """

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Problems with verifiable answers; ``problem`` and ``reward`` are what a class must have."""

    name: ClassVar[str]
    vocabulary: ClassVar[str] = "bytes"
    """The smallest vocabulary of ``nvfp4.rl.vocabulary`` that can spell every prompt and answer."""

    warm_steps: ClassVar[int] = 300
    """Supervised updates of a new model, for the form of the answers, unless the config says."""

    @abstractmethod
    def problem(self, rng: np.random.Generator) -> Problem:
        """One problem, determined by the generator alone."""

    @abstractmethod
    def reward(self, problem: Problem, completion: str) -> float:
        """The reward in [0, 1] of a completion, without its end-of-text; raises on no text."""

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Rewards of many completions, each of the problem at its place; what raises scores 0."""
        return [self._verdict(p, text) for p, text in zip(problems, completions, strict=True)]

    def final(self, completion: str) -> str:
        """The answer within a completion, as a majority counts it; "" for none."""
        return completion.strip()

    def well_formed(self, problem: Problem, completion: str) -> bool:
        """Whether a completion looks like an answer, right or wrong. Never raises on any text."""
        return bool(self.final(completion))

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """A wrong or doubtful demonstration, for the noisy teacher of a warm start."""
        return problem.answer

    def problems(
        self,
        count: int,
        seed: int,
        *,
        held_out: bool | None = None,
    ) -> list[Problem]:
        """``count`` problems, the same for the same seed.

        held_out: only those that are (True) or are not (False). Raises ValueError if a side seems
        to be empty.
        """
        rng = np.random.default_rng(seed)
        return [self._draw(rng, held_out) for _ in range(count)]

    def listed(self) -> Sequence[Problem] | None:
        """Every problem, where they are a list and not drawn from a rule; else None."""
        return None

    def origin(self, problem: Problem) -> str:
        """What must not be on both sides: the prompt, or the document that it is from."""
        return problem.prompt

    def confinement(self) -> str | None:
        """What confines foreign code that the task runs, for people; None if it runs none.

        ``TrainError`` if it may not run here. May start processes.
        """
        return None

    def close(self) -> None:  # noqa: B027  # most tasks hold nothing
        """Give back what the task holds, such as processes; it may be used again."""

    def _draw(self, rng: np.random.Generator, held_out: bool | None) -> Problem:
        for _ in range(_DRAWS):
            problem, share = self._drawn_with_share(rng)
            if held_out is None or held_out == (share < HELD_OUT):
                return problem
        side = "held out" if held_out else "not held out"
        why = f"none of {_DRAWS} problems is {side}; it has too few different ones"
        raise ValueError(f"task {self.name}: {why}")

    def _drawn_with_share(self, rng: np.random.Generator) -> tuple[Problem, float]:
        """A problem, and what decides its side in [0, 1).

        ``TrainError`` with the place in the code if the class, a user's maybe, fails.
        """
        try:
            problem = self.problem(rng)
            return problem, _share(self.origin(problem))
        except TrainError:
            raise
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainError(
                f"task {self.name}: no problem can be made: {type(error).__name__}: {error} "
                f"({last.filename}, line {last.lineno})"
            ) from error

    def _verdict(self, problem: Problem, completion: str) -> Verdict:
        try:
            return to_verdict(self.reward(problem, completion))
        except (Exception, SystemExit) as error:  # a user's class may raise anything
            return Verdict(0.0, f"{type(error).__name__}: {error}"[:200])


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
