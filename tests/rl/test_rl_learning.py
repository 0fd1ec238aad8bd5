"""Every objective learns a small task, and none learns from rewards that mean nothing."""

from __future__ import annotations

import pytest
import torch
from rl_policy import END, TablePolicy, train

from nvfp4.rl.objectives.registry import OBJECTIVES

PROMPTS, LENGTH, SYMBOLS = 6, 3, 4
HEAD_START = 1.0
"""Added to the logits of the right tokens: 0.475 at each of three positions, 0.11 for a right
completion."""

OPTIONS = {
    # its own clips are for networks with thousands of tokens
    "gspo": {"clip_low": 0.2, "clip_high": 0.2},
    "dapo": {"overlong_share": 0.0},  # a right completion fills the limit here
    "delta": {"overlong_share": 0.0},
    "reasonmaxxer": {"entropy_gate": 0.5, "shortest_share": 1.0, "problem_share": 1.0},
}


def answers() -> torch.Tensor:
    """The right completion of each prompt, int64 [PROMPTS, LENGTH]: two symbols and the end."""
    first, second = torch.arange(PROMPTS) % 3 + 1, torch.arange(PROMPTS) // 2 % 3 + 1
    return torch.stack((first, second, torch.full((PROMPTS,), END)), dim=1)


def base(seed: int) -> TablePolicy:
    """A policy with a head start."""
    policy = TablePolicy.random(
        PROMPTS, LENGTH, SYMBOLS, torch.Generator().manual_seed(seed), scale=0.1
    )
    previous = torch.cat((torch.zeros(PROMPTS, 1, dtype=torch.int64), answers()[:, :-1]), dim=1)
    where = (torch.arange(PROMPTS)[:, None], torch.arange(LENGTH)[None], previous)
    policy.logits[(*where, answers())] += HEAD_START
    return policy


def accuracy(policy: TablePolicy) -> float:
    """Probability of a right completion, mean over prompts: exact, not sampled."""
    ids = torch.cat((torch.arange(PROMPTS)[:, None], answers()), dim=1)
    whole = torch.ones(PROMPTS, LENGTH, dtype=torch.bool)
    return (
        policy.score(policy.samples(ids, whole, ~whole[:, 0]))
        .logprobs.sum(dim=1)
        .exp()
        .mean()
        .item()
    )


# it has no use for rewards
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ssd"])
def test_learns_and_only_from_meaning(name: str, seed: int) -> None:
    """30 steps of 48 completions: right with probability 0.9 and more (0.97 to 0.99 seen in 4
    seeds). With coins for rewards it drifts (0.00 to 0.17 seen) and stays far below."""
    before = accuracy(base(seed))
    assert 0.05 < before < 0.2
    reached = {}
    for control in (False, True):
        generator = torch.Generator().manual_seed(seed)

        def reward(
            prompts: torch.Tensor, completions: torch.Tensor, control=control, generator=generator
        ):
            if control:
                return torch.randint(0, 2, prompts.shape, generator=generator)
            return (completions == answers()[prompts]).all(dim=1)

        objective = OBJECTIVES[name](**OPTIONS.get(name, {}))
        reached[control] = accuracy(train(objective, base(seed), reward, 30, generator))
    assert reached[False] > 0.9
    assert reached[True] < 0.4
