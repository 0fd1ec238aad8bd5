"""Objectives beside their authors' code: its steps in other words, one number at a time, on random
inputs.

Each test names repository, commit and file. Nothing here calls what it checks: the rewrites are of
plain numbers, or of autograd over float64 tensors where a gradient is compared. Tolerances are
those of float32 advantages (2^-24 relative) against float64, with a factor for the sums.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rl_oracle as oracle
import torch
from rl_policy import TablePolicy, gradient, moved, prepared, shuffled, totals_of
from rl_runs import model_of

from nvfp4.rl.norm_noise import sigma_at
from nvfp4.rl.objectives.base import REFERENCE_LOGITS, REFERENCE_PROMPT_LOGITS
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.objectives.delta import DelTA, token_weights
from nvfp4.rl.objectives.dr_grpo import DrGRPO
from nvfp4.rl.objectives.gspo import GSPO
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.prorl import ProRLv2, ProRLv21
from nvfp4.rl.objectives.reasonmaxxer import ReasonMaxxer
from nvfp4.rl.objectives.rover import Rover
from nvfp4.rl.objectives.ssd import SSD
from nvfp4.rl.samples import Samples, Totals
from nvfp4.rl.score import score
from nvfp4.rl.statistics import mismatch

CLOSE: dict[str, float] = {"rtol": 3e-6, "atol": 3e-8}


@pytest.fixture
def samples(policy: TablePolicy, generator: torch.Generator) -> Samples:
    """6 completions of each of 4 prompts, shuffled, graded rewards, some cut, a sampler that is not
    the trainer."""
    drawn = shuffled(policy, 6, generator)
    rewards = torch.randint(0, 5, (24,), generator=generator) / 4
    foreign = drawn.sampler_logprobs + 0.4 * torch.randn(drawn.mask.shape, generator=generator)
    foreign = torch.where(drawn.mask, foreign, 0.0)
    return replace(
        drawn, rewards=rewards, sampler_logprobs=foreign, truncated=torch.arange(24) % 5 == 0
    )


def rows(values: torch.Tensor) -> list[list[float]]:
    """As nested lists of float64."""
    return values.double().tolist()


def same(
    objective: Any, later: TablePolicy, ready: Samples, wanted: Any, reference: Any = None
) -> None:
    """Loss and gradient of ``objective`` are those of ``wanted``, a function of the logits [.., V]
    of the table."""
    logits = later.logits.clone().requires_grad_()
    expected = wanted(later.at(logits).score(ready))
    expected.backward()
    loss, grad, _ = gradient(objective, later, ready, parts=3, reference=reference)
    assert loss == pytest.approx(expected.item(), rel=3e-6, abs=3e-8)
    torch.testing.assert_close(grad, logits.grad, **CLOSE)


# NVIDIA-NeMo/RL 7ea279abf


def nemo_advantages(samples: Samples) -> torch.Tensor:
    """nemo_rl/algorithms/advantage_estimator.py, reinforce_plus_plus with its baseline, after
    stop-properly of reward_functions.py with coefficient 0."""
    rewards = [
        0.0 if cut else r
        for r, cut in zip(samples.rewards.tolist(), samples.truncated.tolist(), strict=True)
    ]
    centred = oracle.advantages(rewards, samples.groups.tolist(), kind="group_mean")
    tokens = [a for a, n in zip(centred, samples.lengths.tolist(), strict=True) for _ in range(n)]
    mean, variance = statistics.fmean(tokens), statistics.pvariance(tokens)
    return torch.tensor(
        [(a - mean) / math.sqrt(max(variance, 1e-8)) for a in centred], dtype=torch.float64
    )


# the second: beyond the first, within the last
@pytest.mark.parametrize(("clamp", "most"), [(1.5, 0.8), (0.7, 0.8)])
@pytest.mark.parametrize("kind", [ProRLv2, ProRLv21])
def test_prorl_v2_is_nemos(
    kind: type[ProRLv2],
    clamp: float,
    most: float,
    policy: TablePolicy,
    samples: Samples,
    generator: torch.Generator,
) -> None:
    """nemo_rl/algorithms/loss/loss_functions.py and utils.py under
    examples/configs/prorlv2.v2.yaml, and
    prorlv2_1_moe.v2.yaml: clip, IcePop or the mask of sequences, k2 with clamps and the score
    function's gradient."""
    objective = kind(
        dynamic_sampling=False, kl_coef=0.3, kl_log_ratio_clamp=clamp, kl_value_clamp=most
    )
    base, later = moved(policy, generator, 1.0), moved(policy, generator, 0.3)
    ready = prepared(objective, policy, samples, reference=base)
    advantages, mask = nemo_advantages(samples)[:, None], samples.mask
    old, ref = policy.score(samples).logprobs, base.score(samples).logprobs
    drawn = samples.sampler_logprobs.double()

    def wanted(scores: Any) -> torch.Tensor:
        new = scores.logprobs
        forced = kind is ProRLv21
        before = new.detach() if forced else old
        ratio = (new - before).exp()
        surrogate = -torch.minimum(
            ratio * advantages, advantages * (ratio if forced else ratio.clamp(0.8, 1.27))
        )
        # v2.1 of ours weighs by the policy before the updates; theirs by the present one, which at
        # its only update is the same.
        weights = (old - drawn).exp()
        if forced:
            level = torch.stack(
                [(old - drawn)[i, :n].mean() for i, n in enumerate(samples.lengths)]
            ).exp()[:, None]
            weights = torch.where((level >= 0.999) & (level <= 1.002), weights, 0.0)
        else:
            weights = torch.where((weights >= 0.5) & (weights <= 5.0), weights, 0.0)
        gap = ref - new
        inside = gap.clamp(-clamp, clamp)
        importance = (new - new.detach()).exp()
        importance = torch.where(inside == gap, importance, importance.detach())
        kl = (importance * inside.square() / 2).clamp(-most, most)
        return ((weights * surrogate + 0.3 * kl) * mask).sum() / mask.sum()

    assert ((ref - later.score(samples).logprobs).abs() > clamp).any(), (
        "the clamp of the input acts"
    )
    same(objective, later, ready, wanted)


def test_the_weights_of_the_kl_matter(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Without the score function the gradient is another one; the value is the same."""
    base, later = moved(policy, generator, 1.0), moved(policy, generator, 0.3)
    found = []
    for importance in ("score", "none"):
        objective = ProRLv2(dynamic_sampling=False, kl_coef=0.3, kl_importance=importance)
        ready = prepared(objective, policy, samples, reference=base)
        found.append(gradient(objective, later, ready))
    assert found[0][0] == found[1][0]
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3


def test_gen_kl_error_is_nemos(generator: torch.Generator) -> None:
    """loss_functions.py: k3 of the sampler's log-probabilities against the trainer's, exp(r) - 1 -
    r with r = trainer - sampler; unbiased for KL(sampler || trainer), as exact sums over a
    distribution show. The other direction is not."""
    p = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    q = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    every = torch.ones(1, 1, dtype=torch.bool)
    each = [mismatch(q[i].view(1, 1), p[i].view(1, 1), every)["gen_kl_error"] for i in range(6)]
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert sum(
        math.exp(a) * value for a, value in zip(p.tolist(), each, strict=True)
    ) == pytest.approx(exact)
    assert min(each) >= 0
    for trainer, sampler, value in zip(q.tolist(), p.tolist(), each, strict=True):
        assert value == pytest.approx(math.exp(trainer - sampler) - 1 - (trainer - sampler))


# verl-project/verl 1dda039b9


def test_gspo_is_verls(policy: TablePolicy, samples: Samples, generator: torch.Generator) -> None:
    """verl/trainer/ppo/core_algos.py, compute_policy_loss_gspo: the stopped mean of a completion,
    with the gradient of each token's own log-probability; then the mean over tokens, then over
    completions. The gradients are the same since each token carries 1/length of the mean, and the
    clip is the completion's in both."""
    objective, later = GSPO(clip_low=0.05, clip_high=0.08), moved(policy, generator, 0.2)
    ready = prepared(objective, policy, samples)
    old = policy.score(samples).logprobs
    advantages = torch.tensor(
        oracle.advantages(samples.rewards.tolist(), samples.groups.tolist(), kind="group_std"),
        dtype=torch.float64,
    )

    def wanted(scores: Any) -> torch.Tensor:
        means = []
        for i, n in enumerate(samples.lengths.tolist()):
            new = scores.logprobs[i, :n]
            level = (new - old[i, :n]).mean().detach()
            ratio = (new - new.detach() + level).exp()
            losses = torch.maximum(
                -advantages[i] * ratio, -advantages[i] * ratio.clamp(1 - 0.05, 1 + 0.08)
            )
            means.append(losses.mean())
        return torch.stack(means).mean()

    same(objective, later, ready, wanted)


def test_the_overlong_penalty_is_verls(samples: Samples) -> None:
    """verl/workers/reward_manager/dapo.py: min(-(length - (limit - buffer)) / buffer * factor, 0)
    is added to rewards of +1 and -1. On rewards of 1 and 0 half of it is as much: they are halved,
    and 1/2 is added."""
    limit, buffer = 40, 8
    lengths = torch.tensor([10, 32, 33, 36, 39, 40])
    mask = torch.arange(limit) < lengths[:, None]
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    long = replace(samples.select(slice(0, 6)), mask=mask, rewards=right, max_new_tokens=limit)
    theirs = [
        (1.0 if r else -1.0) + min(-(n - (limit - buffer)) / buffer * 1.0, 0.0)
        for r, n in zip(right.tolist(), lengths.tolist(), strict=True)
    ]
    ours = DAPO(overlong_share=buffer / limit).shape_rewards(long).tolist()
    assert [2 * value - 1 for value in ours] == pytest.approx(theirs)
    signed = replace(long, rewards=2 * right - 1)
    whole = DAPO(overlong_share=buffer / limit, overlong_penalty=1.0).shape_rewards(signed)
    assert whole.tolist() == pytest.approx(theirs)


# RUCBM/DelTA cf048bd


def test_delta_is_its_authors(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """verl-DelTA/verl/workers/actor/dp_actor.py, compute_log_prob_h with K = 1, and core_algos.py's
    vanilla loss with
    clip_ratio_c 10: gammas are those of the margins to the means before the last ones."""
    vectors = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4000, generator=generator, dtype=torch.float64)
    vectors = vectors + 0.3 * advantages.sign()[:, None]
    positive, negative = advantages > 0, advantages < 0

    def centre(weights: torch.Tensor) -> torch.Tensor:
        return (weights[:, None] * vectors).sum(0) / weights.sum()

    def margins(plus: torch.Tensor, minus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        to_plus, to_minus = (vectors - plus).square().sum(1), (vectors - minus).square().sum(1)
        return to_minus - to_plus, to_plus - to_minus

    def spreads(pair: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        return [
            m[s].var(correction=0).clamp(min=1e-8).sqrt()
            for m, s in zip(pair, (positive, negative), strict=True)
        ]

    up, down = advantages.clamp(min=0), (-advantages).clamp(min=0)
    first = margins(centre(up), centre(down))
    gamma = spreads(first)
    plus = centre(up * torch.sigmoid(first[0] / gamma[0]))
    minus = centre(down * torch.sigmoid(first[1] / gamma[1]))
    last = margins(plus, minus)  # and gamma stays that of `first`
    weights = torch.full_like(advantages, 0.8)
    weights[positive] += 0.4 * torch.sigmoid(last[0] / gamma[0])[positive]
    weights[negative] += 0.4 * torch.sigmoid(last[1] / gamma[1])[negative]
    weights *= len(weights) / weights.sum()
    torch.testing.assert_close(token_weights(vectors, advantages, 1).double(), weights, **CLOSE)
    present = spreads(last)
    assert abs(present[0] / gamma[0] - 1) > 0.01, "the gamma of the last means would be another"

    objective, later = DelTA(overlong_share=0.0), moved(policy, generator, 0.8)
    ready = prepared(objective, policy, samples)
    weighted, old = ready.advantages.double(), policy.score(samples).logprobs

    def wanted(scores: Any) -> torch.Tensor:
        ratio = (scores.logprobs - old).exp()
        losses = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(0.8, 1.28))
        losses = torch.where(weighted < 0, torch.minimum(losses, -weighted * 10.0), losses)
        return losses[samples.mask].mean()

    same(objective, later, ready, wanted)


# tinnerhrhe/ROVER b0fa587


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("estimator", ["group_mean", "group_std", "batch_rates"])
def test_rover_is_its_authors(
    estimator: str,
    clip: float | None,
    policy: TablePolicy,
    samples: Samples,
    generator: torch.Generator,
) -> None:
    """Math/verl/workers/actor/dp_actor.py with rover_t, next_q_scale_factor and use_rover_clip;
    core_algos.py for the loss and the rover estimator; its grpo estimator with and without the
    standard deviation."""
    objective = Rover(advantage=estimator, q_scale=0.7, value_scale=0.9, q_clip=clip)
    later = moved(policy, generator, 0.6)
    ready = prepared(objective, policy, samples)
    old = policy.score(samples)
    if estimator == "batch_rates":
        rewards = samples.rewards.tolist()
        right = sum(r > 0 for r in rewards) / len(rewards)
        reward = [5 * (1 - right) if r > 0 else -2 * (1 - (1 - right)) for r in rewards]
    else:
        reward = oracle.advantages(
            samples.rewards.tolist(), samples.groups.tolist(), kind=estimator
        )
    before = old.logits.log_softmax(-1).mean(-1)

    def wanted(scores: Any) -> torch.Tensor:
        terms = []
        rise = 0.7 * (scores.logits.log_softmax(-1).mean(-1) - before).detach()
        for i, n in enumerate(samples.lengths.tolist()):
            for t in range(n):
                target = reward[i] + (0.9 * float(rise[i, t + 1]) if t + 1 < n else 0.0)
                q = 0.7 * (scores.logprobs[i, t] - old.logprobs[i, t])
                if clip is not None and target > q > math.log(1 + clip):
                    q = torch.tensor(math.log(1 + clip), dtype=torch.float64)
                elif clip is not None and target < q < math.log(1 - clip):
                    q = torch.tensor(math.log(1 - clip), dtype=torch.float64)
                terms.append((q - target) ** 2)
        return torch.stack(terms).mean()

    same(objective, later, ready, wanted)


# ansz42/ReasonMaxxer dae2a3a (its scripts/ are the authors')


def test_reasonmaxxer_is_its_authors(generator: torch.Generator) -> None:
    """scripts/select_mid_pool.py, prepare_training_data.py and train_reasonmaxxer.py (variant
    reasonmaxxer, adv_ce, KL
    on the prompt too) on a real model with prompts of several lengths: problems, the pooled
    shortest 80 %, advantages of what is left, a mean per rollout, everything at temperature 1
    whatever that of sampling."""
    base, model = model_of("bf16"), model_of("bf16", spread=0.2)
    groups, size = 6, 5
    count = groups * size
    lengths = torch.randint(2, 7, (count,), generator=generator)
    prompts = torch.tensor([2, 5, 3, 4, 5, 3]).repeat_interleave(size)
    width, longest = int(prompts.max()), int(lengths.max())
    place = torch.arange(width + longest)
    attention = (place >= width - prompts[:, None]) & (place < width + lengths[:, None])
    ids = torch.where(attention, torch.randint(0, 30, attention.shape, generator=generator), 0)
    ids[:, :width] = ids[::size, :width].repeat_interleave(size, dim=0)
    rewards = torch.randint(0, 2, (count,), generator=generator).float()
    rewards[:size], rewards[size : 2 * size] = 1.0, torch.tensor([0.0, 1, 0, 1, 1])
    rewards[2 * size : 3 * size] = torch.tensor([1.0, 1, 1, 1, 0])
    cut = torch.rand(count, generator=generator) < 0.2
    numbers = torch.arange(groups).repeat_interleave(size)
    samples = Samples(
        ids,
        attention,
        attention[:, width:],
        numbers,
        rewards,
        cut,
        torch.zeros(count, longest),
        max_new_tokens=7,
    )
    objective = ReasonMaxxer(entropy_gate=2.6, problem_share=0.5)
    assert objective.loss_temperature(0.6) == 1.0
    with torch.no_grad():
        old = score(base, samples, 1.0, logits=True, prompt=True)
    extra = objective.remember(samples, old, "reference")
    ready = objective.prepare(
        replace(samples, ref_logprobs=old.logprobs, extra=extra), replace(old, logits=None)
    )

    wanted, used = their_loss(base, model, samples, problems=3, gate=2.6)
    assert torch.equal(ready.extra["used"].nonzero().flatten(), torch.tensor(sorted(used)))
    assert 0 < len(used) < count / 2
    wanted.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.zeros(())
    for start in (0, 7, 21):
        part = ready.select(slice(start, {0: 7, 7: 21, 21: count}[start]))
        with torch.no_grad():
            held = score(base, part, 1.0, logits=True, prompt=True)
        logits = {REFERENCE_LOGITS: held.logits, REFERENCE_PROMPT_LOGITS: held.prompt_logits}
        part = replace(part, extra={**part.extra, **logits})
        live = score(model, part, 1.0, logits=True, prompt=True)
        loss, _ = objective.loss(part, live, Totals(1.0, float(count), 7))
        loss.backward()
        found = found + loss.detach()
    assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(
            parameter.grad, grad, rtol=1e-3, atol=2e-6 * float(grad.abs().max() + 1)
        )


def their_loss(
    base: Any, model: Any, samples: Samples, problems: int, gate: float
) -> tuple[torch.Tensor, list[int]]:
    """The mean over the rollouts that their scripts would train on, each alone in its batch; and
    which these are."""
    lengths, rewards, groups = (
        samples.lengths.tolist(),
        samples.rewards.tolist(),
        samples.groups.tolist(),
    )
    table = []
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        right = sum(rewards[i] for i in members)
        if 1 <= right <= len(members) - 1:
            cut = sum(bool(samples.truncated[i]) for i in members)
            mean = sum(lengths[i] for i in members) / len(members)
            table.append((abs(right / len(members) - 0.5), cut, mean, group))
    chosen = {entry[-1] for entry in sorted(table)[:problems]}
    pool = [i for i, g in enumerate(groups) if g in chosen]
    pool.sort(key=lambda i: (lengths[i], int(samples.truncated[i]), groups[i], i))
    used = pool[: round(0.8 * len(pool))]
    losses = []
    for i in used:
        left = [rewards[k] for k in used if groups[k] == groups[i]]
        spread = statistics.pstdev(left) if len(left) > 1 else 1e-8
        advantage = (rewards[i] - statistics.fmean(left)) / max(spread, 1e-8)
        tokens = samples.ids[i][samples.attention[i]][None]
        # the position whose distribution the first drawn token comes from
        first = tokens.shape[1] - lengths[i] - 1
        new = model(tokens).logits[0, :-1].float().log_softmax(-1)
        with torch.no_grad():
            held = base(tokens).logits[0, :-1].float().log_softmax(-1)
        entropy = -(held.exp() * held).sum(-1)
        decisions = [
            t for t in range(first, tokens.shape[1] - 1) if entropy[t] > gate and advantage != 0
        ]
        others = [t for t in range(tokens.shape[1] - 1) if t not in decisions]
        advantage = max(-2.5, min(2.5, advantage))
        ce = [-new[t, tokens[0, t + 1]] for t in decisions]
        decision = torch.stack(ce).mean() * advantage if ce else torch.zeros(())
        kl = torch.stack([(held[t].exp() * (held[t] - new[t])).sum() for t in others]).mean()
        losses.append(decision + 0.2 * kl)
    return torch.stack(losses).mean(), used


# huggingface/trl f2cd57710, sail-sg/understand-r1-zero dfca49d, NVlabs/QeRL e8c6e79,
# ZongqianLi/MicroCoder acd9bcd


def test_ssd_is_trls(policy: TablePolicy, samples: Samples, generator: torch.Generator) -> None:
    """trl/experimental/ssd/ssd_trainer.py, compute_loss: cross-entropy of raw logits, whatever the
    temperature of sampling, over the kept tokens, divided by their number. Their filter looks at
    characters, ours at tokens."""
    objective, later = SSD(), moved(policy, generator)
    ready = prepared(objective, policy, samples)
    kept = (samples.lengths > 1)[:, None] & samples.mask

    def wanted(scores: Any) -> torch.Tensor:
        logps = scores.logits.log_softmax(-1).gather(-1, samples.ids[:, 1:, None]).squeeze(-1)
        return (-logps * kept).sum() / kept.sum()

    assert objective.loss_temperature(1.6) == 1.0
    same(objective, later, ready, wanted)


def test_dr_grpo_is_its_authors(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """train_zero_math.py: reward minus the mean of the group, sums over tokens by a constant, the
    length limit; the mean over completions of PPO's clipped loss (oat c1a074c,
    oat/algorithms/ppo.py)."""
    objective, later = DrGRPO(), moved(policy, generator, 0.4)
    ready = prepared(objective, policy, samples)
    old = policy.score(samples).logprobs
    centred = oracle.advantages(
        samples.rewards.tolist(), samples.groups.tolist(), kind="group_mean"
    )

    def wanted(scores: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, n in enumerate(samples.lengths.tolist()):
            ratio = (scores.logprobs[i, :n] - old[i, :n]).exp()
            losses = torch.maximum(-centred[i] * ratio, -centred[i] * ratio.clamp(0.8, 1.2))
            total = total + losses.sum() / samples.limit
        return total / len(samples)

    same(objective, later, ready, wanted)


def test_microcoder_is_its_equation(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """figures/MicroCoder-GRPO_equation.png and MicroCoder-Insights.md: A times (1 - [length =
    limit, a correct answer, the last m tokens differ from those before, u < rho]), with a std
    without epsilon; ours has GRPO's 1e-4."""
    samples = replace(samples, rewards=samples.rewards.round())
    objective, later = MicroCoder(excused_share=0.5, loop_window=2), moved(policy, generator)
    full = samples.lengths == samples.limit
    samples = replace(samples, truncated=full)
    draws = objective._draws(samples.groups).tolist()
    ready = prepared(objective, policy, samples)
    plain = oracle.advantages(samples.rewards.tolist(), samples.groups.tolist(), kind="group_std")
    old = policy.score(samples).logprobs
    advantages = []
    for i, row in enumerate(samples.ids[:, 1:].tolist()):
        loops = row[-2:] == row[-4:-2]
        excused = bool(full[i]) and samples.rewards[i] == 1 and not loops and draws[i] < 0.5
        advantages.append(0.0 if excused else plain[i])
    assert 0 < sum(a == 0 != b for a, b in zip(advantages, plain, strict=True)) < int(full.sum())

    def wanted(scores: Any) -> torch.Tensor:
        means = []
        for i, n in enumerate(samples.lengths.tolist()):
            ratio = (scores.logprobs[i, :n] - old[i, :n]).exp()
            gain = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.28) * advantages[i])
            means.append(-gain.mean())
        return torch.stack(means).mean()

    same(objective, later, ready, wanted)


@pytest.mark.parametrize(("steps", "stages"), [(600, 10), (60, 10), (7, 3), (10, 2)])
def test_the_noise_on_norms_is_qerls(steps: int, stages: int) -> None:
    """trl_trainer/noise_scheduler.py, and the trend that trl_trainer/grpo_trainer.py makes of its
    launch scripts: the first interval has none, then a geometric row from 1e-2 to 1e-4."""
    last = stages - 1
    trend = [1e-2 * (1e-4 / 1e-2) ** (k / max(last - 1, 1)) for k in range(last)]
    for step in range(steps):
        interval = int(step // (steps / stages))
        theirs = 0.0 if interval == 0 else trend[min(interval - 1, last - 1)]
        assert sigma_at(step, steps, stages, 1e-2, 1e-4) == pytest.approx(theirs, rel=1e-12), step
    assert np.isclose(sigma_at(steps - 1, steps, stages, 1e-2, 1e-4), 1e-4 if last > 1 else 1e-2)


def test_totals_are_what_the_losses_are_divided_by(samples: Samples) -> None:
    """The helper of these tests counts as the loop does."""
    totals = totals_of(samples)
    assert (totals.tokens, totals.samples, totals.max_new_tokens) == (
        int(samples.mask.sum()),
        24,
        5,
    )
