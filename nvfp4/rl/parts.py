"""The objects of one reinforcement learning run, as a record, and what every step asks of them.

    sampling()                    how the next completions are drawn
    score(model, samples)         log-probabilities, and what else the objective reads
    completions(samples)          their texts
    rewards(problems, texts)      the verifier's word on them, float32 [S]

Models, optimiser, objective and logs change while it trains; nothing else does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from nvfp4.rl.config import RLConfig
from nvfp4.rl.folder import RLFolder
from nvfp4.rl.objectives.base import Objective
from nvfp4.rl.rollout import Sampling
from nvfp4.rl.samples import Samples, Scores, Stops
from nvfp4.rl.score import score
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.vocabulary import Text
from nvfp4.run.parts import RunParts


@dataclass
class RLRun(RunParts):
    """The objects of one run in one process.

    Only models, optimiser, objective and the logs change while it trains. model: the policy, which
    is scored. sampler: the same one, or another model on the same weights, in a recipe of its own.
    reference: a frozen copy from the beginning, or from the last reset, if it is needed.
    """

    config: RLConfig
    accelerator: Accelerator
    folder: RLFolder
    task: Task
    objective: Objective
    text: Text
    stops: Stops
    sampler: PreTrainedModel
    reference: PreTrainedModel | None

    def sampling(self) -> Sampling:
        """How the next completions are drawn in training; the objective may have a say."""
        drawn = self.configured
        return replace(
            drawn,
            max_new_tokens=self.objective.max_new_tokens(drawn.max_new_tokens),
            temperature=self.objective.temperature(drawn.temperature),
        )

    @property
    def configured(self) -> Sampling:
        """How completions are drawn by the resolved config alone."""
        config = self.config
        assert config.max_new_tokens is not None
        assert config.temperature is not None
        assert config.top_k is not None
        assert config.top_p is not None
        return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)

    def score(self, forward: Any, samples: Samples, temperature: float) -> Scores:
        """``score`` with what the objective asks for."""
        objective = self.objective
        wishes = {
            "logits": objective.needs_logits,
            "prompt": objective.needs_prompt_logits,
            "hidden": objective.needs_hidden,
        }
        with self.autocast():
            return score(forward, samples, temperature, **wishes)

    def completions(self, samples: Samples) -> list[str]:
        """The texts of completions, without what ended them."""
        rows, lengths = samples.completions.tolist(), samples.lengths.tolist()
        return [self.text.completion(row[:n]) for row, n in zip(rows, lengths, strict=True)]

    def rewards(
        self, problems: list[Problem], texts: list[str], device: torch.device
    ) -> tuple[torch.Tensor, list[str | None]]:
        """The verifier's rewards, float32 [S], and the reasons of those that failed."""
        verdicts = self.task.verdicts(problems, texts)
        values = [verdict.reward for verdict in verdicts]
        reasons = [verdict.reason for verdict in verdicts]
        return torch.tensor(values, dtype=torch.float32, device=device), reasons


def all_failed(failed: Counter[str], count: int) -> str:
    """What a run that cannot be rewarded ends with; the most frequent reasons first."""
    common = failed.most_common(3)
    reasons = "; ".join(f"{reason} ({times} times)" for reason, times in common)
    return (
        f"every reward of {count} completions failed, so that nothing can be learnt: {reasons}; "
        f"repair the rewards, and go on from a checkpoint, if there is one, with --resume"
    )
