"""What changes in a long run: penalties and limits of length, the controlled clip, resets, stages
of temperature."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from rl_policy import TablePolicy, gradient, prepared, train

from nvfp4.rl.objectives.base import RESET_REFERENCE
from nvfp4.rl.objectives.controllers import EntropyClip, ResetCriterion, TemperatureStages
from nvfp4.rl.objectives.lengths import (
    cosine_penalty,
    ends_in_loop,
    overlong_penalty,
    value_at_stage,
)
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.prorl import ProRL, ProRLv2
from nvfp4.rl.samples import Samples


def test_overlong_penalty() -> None:
    """0 up to the cache, -1 at the limit and beyond, linear between, at every length of a limit of
    10."""
    found = overlong_penalty(torch.arange(13), limit=10, share=0.4).tolist()
    assert found == [0.0] * 7 + [-0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    # hardly any room: the last fifth of 8 tokens is one, and of 4 none
    assert overlong_penalty(torch.arange(10), limit=8, share=0.2).tolist() == [0.0] * 8 + [-1.0] * 2
    assert overlong_penalty(torch.arange(6), limit=4, share=0.2).tolist() == [0.0] * 6


def test_cosine_penalty() -> None:
    """0, half at half the limit, -1 at the limit and beyond."""
    found = cosine_penalty(torch.tensor([0, 5, 10, 15]), limit=10)
    torch.testing.assert_close(found, torch.tensor([0.0, -0.5, -1.0, -1.0]), atol=1e-6, rtol=0)


def test_loops_are_found() -> None:
    """Only at the end, only of exactly the window, only where there are two of them; padding does
    not count."""
    rows = torch.tensor(
        [
            [9, 1, 2, 1, 2, 0, 0],  # loops with 2
            [1, 2, 1, 2, 9, 0, 0],  # looped, and went on
            [1, 2, 3, 0, 0, 0, 0],  # too short
            [7, 7, 7, 7, 7, 7, 7],  # loops with any window up to 3
        ]
    )
    lengths = torch.tensor([5, 5, 3, 7])
    assert ends_in_loop(rows, lengths, 2).tolist() == [True, False, False, True]
    assert ends_in_loop(rows, lengths, 3).tolist() == [False, False, False, True]
    assert ends_in_loop(rows, lengths, 4).tolist() == [False] * 4


def test_length_stages() -> None:
    """The configured limit before the first stage; each stage from its step on; ProRL counts the
    steps it observes."""
    assert [value_at_stage(step, (2, 4), (16, 32), 8) for step in range(6)] == [
        8,
        8,
        16,
        16,
        32,
        32,
    ]
    objective = ProRL(length_stages=(16, 32), length_stage_steps=(2, 4))
    found = []
    for _ in range(6):
        found.append(objective.max_new_tokens(8))
        objective.observe({"policy_loss/magnitude": 1.0})
    assert found == [8, 8, 16, 16, 32, 32]
    with pytest.raises(ValueError, match="must be of equal length"):
        ProRL(length_stages=(16,))
    with pytest.raises(ValueError, match="must ascend"):
        ProRL(length_stages=(16, 32), length_stage_steps=(4, 2))


def test_length_penalty_in_its_phases() -> None:
    """The last step of every three: half the limit costs half of the weight."""
    mask = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    samples = Samples(
        mask.long(), mask, mask, torch.zeros(1), torch.ones(1), ~mask[:, 0], torch.zeros(1, 4)
    )
    objective = ProRL(length_penalty=0.2, length_penalty_period=3, length_penalty_steps=1)
    found = []
    for _ in range(6):
        found.append(round(objective.shape_rewards(samples).item(), 6))
        objective.observe({"policy_loss/magnitude": 1.0})
    assert found == [1.0, 1.0, 0.9, 1.0, 1.0, 0.9]


def test_the_clip_follows_the_entropy() -> None:
    """A scripted trace: up by 0.01 below the target, down above, within its bounds, and smoothed:
    one high value after many low ones does not turn it."""
    clip = EntropyClip(0.28, target=0.5, lowest=0.2, highest=0.3)
    trace = []
    for entropy in [0.1, 0.1, 0.1, 1.0] + [2.0] * 20:
        clip.update(entropy)
        trace.append(round(clip.value, 6))
    assert trace[:4] == [0.29, 0.3, 0.3, 0.3]
    smoothed, wanted = 0.1, 0.3
    for i in range(3, 24):
        smoothed = 0.9 * smoothed + 0.1 * (1.0 if i == 3 else 2.0)
        wanted = min(max(wanted + (0.01 if smoothed < 0.5 else -0.01), 0.2), 0.3)
        assert trace[i] == pytest.approx(wanted)
    assert trace[-1] == 0.2
    before = clip.state_dict()
    clip.update(math.nan)
    assert clip.state_dict() == before


def test_prorl_clips_where_the_controller_says() -> None:
    """Without a target the clip is constant; with one it moves, and never below clip_low or above
    the maximum."""
    constant, moving = ProRL(), ProRL(clip_high=0.25, clip_high_max=0.4, entropy_target=0.5)
    for _ in range(50):
        for objective in (constant, moving):
            objective.observe({"entropy": 0.1, "policy_loss/magnitude": 1.0})
    assert constant.upper_clip == 0.4
    assert moving.upper_clip == pytest.approx(0.4)
    for _ in range(80):
        moving.observe({"entropy": 3.0, "policy_loss/magnitude": 1.0})
    assert moving.upper_clip == pytest.approx(0.2)


def test_the_controlled_clip_is_the_one_of_the_loss(seed: int) -> None:
    """A clip that the entropy has brought from 0.25 to 0.26 makes the loss of a constant clip of
    0.26."""
    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy.random(3, 4, 3, generator)
    later = policy.at(
        policy.logits + torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
    )
    samples = policy.sample(torch.arange(3).repeat_interleave(8), generator)
    samples = replace(samples, rewards=torch.rand(24, generator=generator))
    moved = ProRL(clip_high=0.25, entropy_target=0.5, kl_coef=0.0)
    moved.observe({"entropy": 0.1, "policy_loss/magnitude": 1.0})
    ready = prepared(moved, policy, samples)
    found = gradient(moved, later, ready)
    wanted = gradient(ProRL(clip_high=0.26, kl_coef=0.0), later, ready)
    assert found[0] == wanted[0] != gradient(ProRL(clip_high=0.25, kl_coef=0.0), later, ready)[0]
    assert found[2] == wanted[2]


def test_reset_when_the_kl_dominates() -> None:
    """Three steps in a row above half of the policy loss; a step below starts the count anew, and
    so does a reset."""
    criterion = ResetCriterion(share=0.5, patience=3, every=0, stall=0, delta=0.0)
    trace = [0.6, 0.6, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert [criterion.update(kl, 1.0, None) for kl in trace] == [False] * 5 + [
        True,
        False,
        False,
        True,
    ]


def test_reset_when_validation_stalls() -> None:
    """Two evaluations without a gain of delta; steps without evaluation do not count; a reset keeps
    the best score."""
    criterion = ResetCriterion(share=0.0, patience=1, every=0, stall=2, delta=0.05)
    trace = [0.3, None, 0.34, 0.36, 0.37, None, 0.38, 0.40, 0.40]
    assert [criterion.update(9.0, 0.0, score) for score in trace] == [False] * 6 + [
        True,
        False,
        True,
    ]
    assert criterion.best == 0.36


def test_reset_every_so_many_steps() -> None:
    """And never, if every rule is off."""
    criterion = ResetCriterion(share=0.0, patience=1, every=4, stall=0, delta=0.0)
    assert [criterion.update(9.0, 0.0, 0.0) for _ in range(9)] == [
        False,
        False,
        False,
        True,
    ] * 2 + [False]
    off = ResetCriterion(share=0.0, patience=0, every=0, stall=0, delta=0.0)
    assert not any(off.update(9.0, 0.0, 0.0) for _ in range(20))


def test_prorl_wishes_for_a_reset() -> None:
    """From the metrics of its own loss; without a KL term there is no reference to reset."""
    metrics = {"kl_loss": 0.3, "policy_loss/magnitude": 0.5, "entropy": 1.0}
    objective = ProRL(reset_patience=2)
    assert [objective.observe(metrics) for _ in range(4)] == [frozenset(), {RESET_REFERENCE}] * 2
    quiet = ProRL(kl_coef=0.0, reset_every=1)
    assert quiet.observe(metrics) == frozenset()


def test_temperature_rises_in_stages() -> None:
    """After two steps in a row below the floor, one stage at a time, never down, and not beyond the
    last."""
    stages = TemperatureStages((0.6, 1.2, 1.8), floor=0.5, patience=2)
    trace = []
    for diversity in [0.4, 0.6, 0.4, 0.4, 0.9, 0.9, 0.4, 0.4, 0.4, 0.4]:
        stages.update(diversity)
        trace.append(stages.value)
    assert trace == [0.6, 0.6, 0.6, 1.2, 1.2, 1.2, 1.2, 1.8, 1.8, 1.8]
    objective = MicroCoder(temperature_stages=(0.6, 1.2), diversity_patience=1)
    assert objective.temperature(1.0) == 0.6
    objective.observe({"completions/diversity": 0.1})
    assert objective.temperature(1.0) == 1.2
    assert MicroCoder().temperature(1.0) == 1.0
    with pytest.raises(ValueError, match="from low to high"):
        MicroCoder(temperature_stages=(1.2, 0.6))


@pytest.mark.parametrize("split", [1, 6, 11])
@pytest.mark.parametrize("name", ["prorl", "prorl_v2", "microcoder"])
def test_resuming_changes_nothing(name: str, split: int, seed: int) -> None:
    """A run that stops, writes its state as JSON and goes on in another objective ends in the same
    bits, across resets of the reference, moves of the clip, stages of temperature and draws of the
    truncation mask."""
    options = {
        "prorl": (
            ProRL,
            {"reset_every": 4, "entropy_target": 0.8, "clip_high": 0.3, "kl_coef": 0.01},
        ),
        "prorl_v2": (
            ProRLv2,
            {"reset_every": 5, "length_penalty": 0.5, "length_penalty_period": 4, "kl_coef": 0.01},
        ),
        "microcoder": (
            MicroCoder,
            {"temperature_stages": (0.8, 1.0, 1.3), "diversity_patience": 2},
        ),
    }
    kind, values = options[name]

    def observed(objective, steps: range) -> list[str]:
        trace = []
        for step in steps:
            metrics = {
                "entropy": 1.2 - 0.1 * step,
                "kl_loss": 0.1 * (step % 3),
                "policy_loss/magnitude": 0.15,
                "completions/diversity": 0.3 if step % 4 else 0.7,
            }
            if name == "microcoder":
                objective.prepare(fixed, policy.score(fixed))
                trace.append(str(objective.excused(fixed).tolist()))
            trace.append(str(sorted(objective.observe(metrics))))
            trace.append(json.dumps(objective.state_dict()))
            trace.append(f"{objective.temperature(1.0)} {objective.upper_clip}")
        return trace

    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy.random(2, 4, 3, generator)
    fixed = policy.sample(torch.arange(2).repeat_interleave(16), generator)
    fixed = replace(
        fixed,
        rewards=torch.rand(32, generator=generator),
        truncated=torch.ones(32, dtype=torch.bool),
    )
    whole = observed(kind(**values), range(12))
    first, second = kind(**values), kind(**values)
    begun = observed(first, range(split))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + observed(second, range(split, 12)) == whole
    assert len(set(whole)) >= 15


def test_a_reset_reaches_the_loop(seed: int) -> None:
    """With a strong KL term and no reset the policy is held near its start; resets set it free."""
    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy.random(2, 3, 3, generator, scale=0.1)
    rises = {}
    for every in (0, 5):
        objective = ProRL(kl_coef=2.0, reset_every=every, reset_kl_share=0.0)
        reward = lambda prompts, completions: (completions[:, 0] == 1).float()  # noqa: E731
        after = train(objective, policy, reward, 30, torch.Generator().manual_seed(seed))
        rises[every] = (
            (after.logits.log_softmax(-1) - policy.logits.log_softmax(-1))[:, 0, 0, 1]
            .exp()
            .mean()
            .item()
        )
    assert rises[5] > rises[0] * 1.2
