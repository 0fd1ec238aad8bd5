"""The figures of a step: what TRL logs under TRL's names, and what quantisation adds.

``step_row`` makes the row of log.jsonl out of what the step collected and learnt, over all
processes:

    reward*, completions/*, entropy, kl     as TRL has them
    mismatch/*                              the sampler against the trainer, as NeMo RL has it
    rewards/failed, rewards/failures        rewards that are 0 for want of a proper one
    any others                              what the objective says of its samples and its loss

Mismatch is about d = log p(trainer) - log p(sampler) of the tokens that were drawn, which is
exactly 0 where both are one function. Beside it stands how much of the weights' FP4 codes the step
moved (``weight_codes`` before and after, ``codes_changed``): an update that moves none has changed
nothing that the next rollout can see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nvfp4.layer.linear import layers
from nvfp4.numerics.codec import e2m1_decode, unpack
from nvfp4.numerics.qtensor import QTensor
from nvfp4.rl.collect import TASK_REWARD, Collected
from nvfp4.rl.learn import Learned
from nvfp4.rl.parts import RLRun
from nvfp4.rl.samples import RAW_REWARD, Samples
from nvfp4.rl.statistics import mismatch
from nvfp4.run.log import Row
from nvfp4.run.processes import gather_objects

REASONS = 5
"""Reasons of failed rewards that are written for each step."""


def weight_codes(model: nn.Module) -> dict[str, QTensor]:
    """The forward's weight operand of each converted layer, by name, where it has no noise."""
    codes = {}
    # noise would make other codes of the same weight, which is no change
    with torch.no_grad():
        for name, layer in layers(model).items():
            state = layer.nvfp4
            fixed = state.recipe.fprop.right.options_without_noise is not None
            if state.enabled and fixed:
                weight = layer.weight.detach()
                codes[name] = state.call().weight(weight, state.weight_amax())
    return codes


def codes_changed(before: Mapping[str, QTensor], after: Mapping[str, QTensor]) -> float | None:
    """The share of FP4 codes that differ; -0 and 0 are the same. None if there are none."""
    changed = total = 0
    for name, old in before.items():
        was, now = (e2m1_decode(unpack(q.codes)) for q in (old, after[name]))
        changed += int((was != now).sum())
        total += was.numel()
    return changed / total if total else None


def step_row(run: RLRun, collected: Collected, learned: Learned) -> Row:
    """All figures of a step over all processes, but for time, learning rate and codes."""
    pieces = gather_objects(run.accelerator, [_vectors(collected.samples, learned)])
    data = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    lengths, truncated = data["lengths"], data["truncated"].bool()
    rewards = data["rewards"]

    # Completions that ended by themselves; if all were cut, their mean length is 0.
    ended = lengths[~truncated] if bool((~truncated).any()) else torch.zeros(1)

    # Whole groups of all processes, so the figures do not depend on how prompts were dealt out.
    row: Row = {
        "reward": float(rewards.mean()),
        "reward_std": float(_group_std(rewards, data["groups"]).mean()),
        **_rewards_by_function(run, data),
        **_failures(run, collected.failures),
        "frac_reward_zero_std": collected.zero_std,
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/clipped_ratio": float(truncated.float().mean()),
        "entropy": float(data["entropy"].mean()),
        "num_tokens": int(lengths.sum()),
        "samples_drawn": collected.drawn,
        "temperature": collected.sampling.scale,
        "sampler_noise": collected.sigma,
    }

    # sampler against trainer, and the trainer against its reference (k3, in nats)
    tokens = torch.ones(len(data["trainer"]), dtype=torch.bool)
    gap = mismatch(data["trainer"], data["sampler"], tokens)
    row |= {f"mismatch/{name}": value for name, value in gap.items()}
    row["mismatch/same_shape"] = _largest(run, learned.shape_gap)
    if "to_reference" in data:
        d = data["to_reference"].double()
        row["kl"] = float((torch.expm1(d) - d).mean())

    # the objective's own; where it has a name of ours, ours is over whole groups and stays
    described = gather_objects(run.accelerator, [run.objective.describe(learned.samples)])
    own = {**_mean(described), **learned.metrics}
    row |= {name: value for name, value in own.items() if name not in row}
    row["skipped"] = learned.skipped
    return row


def _vectors(samples: Samples, learned: Learned) -> dict[str, torch.Tensor]:
    """What this process brings, as vectors over samples or tokens, on the CPU."""
    # over all tokens that were drawn, whatever the objective has left of them
    mask = samples.mask
    vectors = {
        "lengths": samples.lengths.float(),
        "truncated": samples.truncated.float(),
        "rewards": samples.rewards,
        "groups": samples.groups,
        TASK_REWARD: samples.extra[TASK_REWARD],
        RAW_REWARD: samples.extra[RAW_REWARD],
        "entropy": learned.entropy[mask],
        "trainer": learned.old[mask],
        "sampler": samples.sampler_logprobs[mask],
    }

    # Processes have prompts of other lengths, so vectors over tokens are gathered, not tables.
    if learned.to_reference is not None:
        vectors["to_reference"] = learned.to_reference[mask]
    return {name: value.detach().cpu() for name, value in vectors.items()}


def _rewards_by_function(run: RLRun, data: dict[str, torch.Tensor]) -> Row:
    """Mean and standard deviation of the task's rewards, and of a control's if it is maximised."""
    functions = {run.task.name: data[TASK_REWARD]}
    if run.config.reward != "task":
        functions[run.config.reward] = data[RAW_REWARD]
    row: Row = {}
    for name, values in functions.items():
        row[f"rewards/{name}/mean"] = float(values.mean())
        row[f"rewards/{name}/std"] = float(values.std())
    return row


def _failures(run: RLRun, mine: Counter[str]) -> Row:
    """How many rewards failed in the step, and the most frequent reasons if any did."""
    every: Counter[str] = sum(gather_objects(run.accelerator, [mine]), Counter())
    row: Row = {"rewards/failed": every.total()}
    if every:
        row["rewards/failures"] = dict(every.most_common(REASONS))
    return row


def _group_std(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sample standard deviation of each group's rewards."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(counts), dtype=torch.float64)
    mean = zeros.index_add(0, index, rewards.double()) / counts  # [groups]
    squares = zeros.index_add(0, index, (rewards.double() - mean[index]) ** 2)
    return (squares / (counts - 1).clamp(min=1)).sqrt()


def _largest(run: RLRun, mine: float | None) -> float | None:
    """The largest over all processes, of those that looked."""
    every = gather_objects(run.accelerator, [mine])
    return max((each for each in every if each is not None), default=None)


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each figure over processes; of one process, what it says."""
    if len(rows) == 1:
        return rows[0]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
