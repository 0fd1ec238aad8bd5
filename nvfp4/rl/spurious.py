"""Controls: rewards that know nothing of the right answer, which a gain has to beat.

Spurious Rewards (arXiv 2506.10947) found that some models improve under them almost as under true
ones, since any reward sharpens what a model already prefers: then it is the model's prior that is
measured, and the verifier deserves no credit. ``--reward`` names them:

    random      1 with probability --random-share, whatever it says     ``coin_rewards``
    format      1 for what looks like an answer, right or wrong         ``format_rewards``
    majority    1 for the most frequent answer of the group             ``majority_rewards``
    incorrect   1 for the most frequent wrong answer of the group       ``majority_rewards``

The paper labels all problems before training, by a majority of 64 answers of the initial model;
here the label is that of the group at hand, so it moves with the policy and nothing is prepared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from nvfp4.rl.tasks.base import Problem, Task


def coin_rewards(
    prompts: int,
    size: int,
    numbers: Sequence[int],
    seed: int,
    share: float,
) -> torch.Tensor:
    """1 with probability ``share``, else 0, float32 [len(numbers) * size].

    numbers: which of the step's ``prompts`` prompts; each has the same coins however the prompts
    are spread over processes. seed: in [0, 2^63).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(prompts, size, generator=generator)
    return (drawn < share)[list(numbers)].flatten().float()


def format_rewards(
    task: Task,
    problems: Sequence[Problem],
    texts: Sequence[str],
    truncated: torch.Tensor,
) -> torch.Tensor:
    """1 for a completion that ended and that the task takes for an answer; float32 [S]."""
    well = [task.well_formed(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return torch.tensor(well, dtype=torch.float32, device=truncated.device) * ~truncated


def majority_rewards(
    task: Task,
    texts: Sequence[str],
    groups: torch.Tensor,
    candidates: torch.Tensor,
) -> torch.Tensor:
    """1 for every completion with the most frequent answer of its group, else 0; float32 [S].

    candidates: bool [S], the completions whose answers are counted. Among equally frequent answers
    the one that was drawn first wins; an empty answer is none.
    """
    answers = [task.final(text) for text in texts]
    ids = groups.tolist()
    counts: dict[int, Counter[str]] = {}
    for group, answer, candidate in zip(ids, answers, candidates.tolist(), strict=True):
        if candidate and answer:
            counts.setdefault(group, Counter())[answer] += 1

    # most_common keeps the order of first sight among equals
    label = {group: counted.most_common(1)[0][0] for group, counted in counts.items()}
    same = [answer == label.get(group) for group, answer in zip(ids, answers, strict=True)]
    return torch.tensor(same, dtype=torch.float32, device=groups.device)
