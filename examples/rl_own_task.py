"""Reinforcement learning on a task of one's own: one class with problems and a verifier.

    python examples/rl_own_task.py [FOLDER]     any CPU, half a minute

What it shows: the class is all that is needed; the model is warmed up on demonstrations of which
half are wrong, then samples in NVFP4, is rewarded by the class, and learns in NVFP4. On the command
line the same task is ``nvfp4 rl --task examples/rl_own_task.py:Larger``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nvfp4.rl.config import RLConfig
from nvfp4.rl.loop import rl
from nvfp4.rl.tasks.base import Problem, Task


class Larger(Task):
    """``17,42>`` -> ``42``: the larger of two numbers."""

    name: ClassVar[str] = "larger"
    vocabulary: ClassVar[str] = "symbols"

    def problem(self, rng: np.random.Generator) -> Problem:
        """Two numbers of two digits each."""
        a, b = (int(n) for n in rng.integers(10, 100, 2))
        return Problem(f"{a},{b}>", str(max(a, b)))

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for the larger one to the letter, else 0."""
        return float(completion == problem.answer)

    def corrupt(self, problem: Problem, rng: np.random.Generator) -> str:
        """A wrong demonstration, for the warm start: either number."""
        return str(rng.choice(problem.prompt.rstrip(">").split(",")))


def main(folder: Path) -> dict[str, Any]:
    """Train, and print held-out pass@1 before and after."""
    config = RLConfig(
        out=str(folder),
        overwrite=True,
        task=f"{__file__}:Larger",
        recipe="rl",
        depth=2,
        width=64,
        heads=2,
        warm_steps=200,
        warm_batch=64,
        steps=60,
        lr=3e-4,
        eval_problems=64,
        eval_samples=8,
        device="cpu",
    )
    result = rl(config)
    before, after = result["before"]["eval/pass@1"], result["after"]["eval/pass@1"]
    print(
        f"\nheld-out pass@1: {before:.3f} before, {after:.3f} after; see "
        f"{folder / 'completions.jsonl'}"
    )
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/rl_own_task"))
