"""The row of a step: what TRL logs under TRL's names, the mismatch, and what quantisation adds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object

from nvfp4.rl.collect import TASK_REWARD, Collected
from nvfp4.rl.learn import Learned
from nvfp4.rl.meter import mismatch
from nvfp4.rl.samples import RAW_REWARD, Samples
from nvfp4.rl.setup import Run
from nvfp4.run.log import Row

REASONS = 5
"""Of failed rewards, written for each step."""


def step_row(run: Run, collected: Collected, learned: Learned) -> Row:
    """All figures of a step over all processes, but for time, learning rate and codes."""
    pieces = [_numbers(collected.samples, learned)]
    every = pieces if run.accelerator.num_processes == 1 else gather_object(pieces)
    data = {name: torch.cat([piece[name] for piece in every]) for name in every[0]}
    lengths, truncated, rewards = data["lengths"], data["truncated"].bool(), data["rewards"]
    ended = lengths[~truncated] if bool((~truncated).any()) else torch.zeros(1)
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
    found = mismatch(data["trainer"], data["sampler"], torch.ones(len(data["trainer"]), dtype=torch.bool))
    row |= {f"mismatch/{name}": value for name, value in found.items()}
    row["mismatch/same_shape"] = _largest(run, learned.shape_gap)
    if "to_reference" in data:
        d = data["to_reference"].double()
        row["kl"] = float((torch.expm1(d) - d).mean())
    described = run.objective.describe(learned.samples)
    shares = described if run.accelerator.num_processes == 1 else _mean(gather_object([described]))
    own = {name: value for name, value in {**shares, **learned.metrics}.items() if name not in row}
    return {**row, **own, "skipped": learned.skipped}


def _numbers(samples: Samples, learned: Learned) -> dict[str, torch.Tensor]:
    """What this process brings, as vectors over samples or tokens, on the CPU."""
    mask = samples.mask
    found = {
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
    if learned.to_reference is not None:
        found["to_reference"] = learned.to_reference[mask]
    return {name: value.detach().cpu() for name, value in found.items()}


def _rewards_by_function(run: Run, data: dict[str, torch.Tensor]) -> Row:
    functions = {run.task.name: data[TASK_REWARD]}
    if run.config.reward != "task":
        functions[run.config.reward] = data[RAW_REWARD]
    row: Row = {}
    for name, values in functions.items():
        row |= {f"rewards/{name}/mean": float(values.mean()), f"rewards/{name}/std": float(values.std())}
    return row


def _failures(run: Run, mine: Counter[str]) -> Row:
    """How many rewards failed in the step, and the most frequent reasons; nothing for a task that cannot fail."""
    parts = [mine] if run.accelerator.num_processes == 1 else gather_object([mine])
    every: Counter[str] = sum(parts, Counter())
    row: Row = {"rewards/failed": every.total()}
    return {**row, "rewards/failures": dict(every.most_common(REASONS))} if every else row


def _group_std(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sample standard deviation of each group's rewards."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(counts), dtype=torch.float64)
    mean = zeros.index_add(0, index, rewards.double()) / counts
    squares = zeros.index_add(0, index, (rewards.double() - mean[index]) ** 2)
    return (squares / (counts - 1).clamp(min=1)).sqrt()


def _largest(run: Run, mine: float | None) -> float | None:
    """The largest over all processes, of those that looked."""
    every = [mine] if run.accelerator.num_processes == 1 else gather_object([mine])
    return max((each for each in every if each is not None), default=None)


def _mean(found: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}
