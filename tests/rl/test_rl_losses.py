"""Advantages, clipping, aggregation, KL and importance weights: against an oracle, by enumeration,
and against TRL."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rl_oracle as oracle
import torch
from rl_policy import TablePolicy, gradient, moved, prepared, sequences, shuffled, totals_of

from nvfp4.rl.objectives.advantages import (
    group_advantages,
    has_spread,
    leave_one_out_advantages,
    normalise_over_batch,
    place_in_group,
    population_advantages,
)
from nvfp4.rl.objectives.corrections import importance_weights, out_of_bounds
from nvfp4.rl.objectives.divergence import exact_kl, kl_estimate
from nvfp4.rl.objectives.grpo import GRPO
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.objectives.token_loss import aggregate, clip_metrics, clipped_loss, log_ratio
from nvfp4.rl.samples import Samples, Totals

AGGREGATIONS = ("grpo", "bnpo", "dapo", "dr_grpo")


@pytest.fixture
def policy(generator: torch.Generator) -> TablePolicy:
    return TablePolicy.random(prompts=3, length=5, symbols=4, generator=generator)


@pytest.fixture
def samples(policy: TablePolicy, generator: torch.Generator) -> Samples:
    """4 completions of each of 3 prompts with graded rewards, in shuffled order."""
    drawn = shuffled(policy, 4, generator)
    return replace(drawn, rewards=torch.randint(0, 5, (12,), generator=generator) / 4)


# Advantages


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
def test_advantages_are_the_oracles(samples: Samples, kind: str) -> None:
    """Groups in any order; float32 results of float64 sums, so one rounding apart."""
    wanted = oracle.advantages(samples.rewards.tolist(), samples.groups.tolist(), kind=kind)
    found = PolicyGradient.advantages(GRPO(advantage=kind), samples)
    assert (found[~samples.mask] == 0).all()
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1.0, -3.3])
def test_equal_rewards_give_exact_zeros(reward: float, dtype: torch.dtype) -> None:
    """0.1 summed three times and divided by 3 is not 0.1 in float64; the advantage is 0 all the
    same."""
    rewards, groups = torch.full((7,), reward, dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    for made in (
        group_advantages(rewards, groups, divide_by_std=True),
        group_advantages(rewards, groups, divide_by_std=False),
        leave_one_out_advantages(rewards, groups),
        population_advantages(rewards, groups),
        normalise_over_batch(torch.zeros(7), torch.ones(7, 2, dtype=torch.bool)),
    ):
        assert (made == 0).all()


def test_a_group_of_one_has_no_advantage() -> None:
    """Neither a standard deviation nor others: 0, not NaN."""
    rewards, groups = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([5, 9, 9])
    assert group_advantages(rewards, groups, divide_by_std=True)[0] == 0
    assert leave_one_out_advantages(rewards, groups).tolist() == [0.0, -1.0, 1.0]


def test_population_advantages() -> None:
    """One right of four: (1 - 1/4) / sqrt(3/16) = sqrt 3, and -1/sqrt 3."""
    found = population_advantages(
        torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    )
    torch.testing.assert_close(found, torch.tensor([-(3**-0.5), 3**0.5, -(3**-0.5), -(3**-0.5)]))


def test_reinforce_plus_plus_is_standardised_over_tokens() -> None:
    """By hand: 3 tokens of A = 1 and 1 token of A = -1 have mean 1/2 and variance 3/4."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    found = normalise_over_batch(torch.tensor([1.0, -1.0]), mask)
    root = 0.75**0.5
    wanted = torch.tensor([[0.5 / root] * 3, [-1.5 / root, 0, 0]])
    torch.testing.assert_close(found, wanted)


def test_spread_and_places() -> None:
    rewards, groups = torch.tensor([0.1, 0.1, 1.0, 0.0, 0.1]), torch.tensor([4, 4, 2, 2, 4])
    assert has_spread(rewards, groups).tolist() == [False, False, True, True, False]
    assert place_in_group(groups).tolist() == [0, 1, 0, 1, 2]


# Surrogate


@pytest.mark.parametrize("dual", [None, 3.0])
def test_clip_truth_table(dual: float | None) -> None:
    """Every side of both clips and of the dual one, with its gradient: 0 exactly where the clip is
    active."""
    old = -1.0
    for ratio, advantage in itertools.product(
        (0.3, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1), (-2.0, 0.0, 1.5)
    ):
        new = torch.tensor([[old + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        loss = clipped_loss(new - old, torch.tensor([[advantage]]), 0.2, 0.28, dual)
        loss.backward()
        assert loss.item() == pytest.approx(
            oracle.token_loss(new.item(), old, advantage, 0.2, 0.28, dual), abs=1e-12
        )
        active = (
            (advantage > 0 and ratio > 1.28)
            or (advantage < 0 and ratio < 0.8)
            or (dual is not None and advantage < 0 and ratio > dual)
        )
        assert new.grad.item() == (0 if active else pytest.approx(-ratio * advantage))


def test_clip_metrics_count_tokens_without_gradient() -> None:
    """Low counts with a negative advantage only, high with a positive one, padding never."""
    ratios = torch.tensor([[0.5, 0.5, 1.0, 2.0, 2.0, 2.0]])
    advantages = torch.tensor([[-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    found = clip_metrics(ratios.log(), advantages, mask, 0.2, 0.28, Totals(5, 1, 6))
    assert {name: round(value.item(), 6) for name, value in found.items()} == {
        "clip_ratio/low_mean": 0.2,
        "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": 0.4,
    }


def test_ratio_levels() -> None:
    """token: each. sequence: the mean over the completion on each. one: value 0, gradient of the
    log-probability."""
    new = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    old, mask = torch.tensor([[-1.5, -1.0, 0.0]]), torch.tensor([[1, 1, 0]], dtype=torch.bool)
    assert log_ratio(new, old, mask, "token").tolist() == [[0.5, -1.0, 0.0]]
    assert log_ratio(new, old, mask, "sequence").tolist() == [[-0.25, -0.25, 0.0]]
    one = log_ratio(new, old, mask, "one")
    assert one.tolist() == [[0.0, 0.0, 0.0]]
    one.sum().backward()
    assert new.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_an_absurd_ratio_stays_finite() -> None:
    """exp(200) is infinite in float32, and times an advantage of 0 NaN."""
    new = torch.tensor([[0.0, 0.0]], requires_grad=True)
    ratios = log_ratio(
        new, torch.tensor([[-200.0, 200.0]]), torch.ones(1, 2, dtype=torch.bool), "token"
    )
    loss = clipped_loss(ratios, torch.tensor([[0.0, -1.0]]), 0.2, 0.2).sum()
    loss.backward()
    assert loss.isfinite()
    assert new.grad.isfinite().all()


# Aggregation


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_the_loss_is_the_oracles(
    samples: Samples, policy: TablePolicy, generator: torch.Generator, rule: str
) -> None:
    """The whole formula at a policy that has moved, with both clips active and a KL term."""
    objective = GRPO(
        aggregation=rule,
        clip_low=0.2,
        clip_high=0.28,
        kl_coef=0.3,
        kl_importance="none" if rule == "dapo" else "ratio",
    )
    ready = prepared(objective, policy, samples, reference=moved(policy, generator, 0.5))
    later = moved(policy, generator, 0.6)
    found, _, metrics = gradient(objective, later, ready)
    new = later.score(ready).logprobs
    made = oracle.advantages(samples.rewards.tolist(), samples.groups.tolist(), kind="group_std")
    values = [
        [
            oracle.token_loss(n, o, made[i], 0.2, 0.28)
            + 0.3 * oracle.kl(n, r, "k3") * (math.exp(n - o) if rule != "dapo" else 1.0)
            for n, o, r in zip(
                new[i].tolist(),
                ready.old_logprobs[i].tolist(),
                ready.ref_logprobs[i].tolist(),
                strict=True,
            )
        ]
        for i in range(len(ready))
    ]
    lengths = ready.lengths.tolist()
    assert found == pytest.approx(
        oracle.aggregate(values, lengths, rule, max_new_tokens=5), rel=1e-6
    )
    assert min(metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) > 0, (
        "the test must reach the clips"
    )
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_gradients_are_finite_differences(
    samples: Samples, policy: TablePolicy, generator: torch.Generator, rule: str
) -> None:
    """Of the stated scalar, at a policy that has moved, with the importance weights of a foreign
    sampler."""
    samples = replace(
        samples, sampler_logprobs=moved(policy, generator, 0.3).score(samples).logprobs
    )
    objective = GRPO(
        aggregation=rule, kl_coef=0.3, kl="k2", kl_importance="ratio", correction="token_truncate"
    )
    ready = prepared(objective, policy, samples, reference=moved(policy, generator, 0.5))

    def scalar(logits: torch.Tensor) -> torch.Tensor:
        return objective.loss(ready, policy.at(logits).score(ready), totals_of(ready))[0]

    assert torch.autograd.gradcheck(scalar, moved(policy, generator, 0.6).logits.requires_grad_())


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_micro_batches_add_up(
    samples: Samples, policy: TablePolicy, generator: torch.Generator, rule: str
) -> None:
    """dapo, dr_grpo and grpo do not notice the split, even through groups; bnpo does, which is what
    it is known for."""
    objective = GRPO(aggregation=rule, kl_coef=0.1)
    ready = prepared(objective, policy, samples, reference=moved(policy, generator, 0.5))
    later = moved(policy, generator, 0.6)
    whole, whole_grad, _ = gradient(objective, later, ready)
    for parts in (2, 5, 12):
        loss, grad, _ = gradient(objective, later, ready, parts)
        same = torch.allclose(grad, whole_grad, rtol=1e-9, atol=1e-12) and loss == pytest.approx(
            whole, rel=1e-9
        )
        assert same == (rule != "bnpo")


def test_aggregation_ignores_what_is_masked() -> None:
    """Infinities there do not spread; a completion without tokens counts as a sample and not as a
    token."""
    values = torch.tensor([[1.0, 2.0, torch.inf], [torch.inf] * 3])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    totals = Totals(tokens=2, samples=2, max_new_tokens=4)
    found = {rule: aggregate(values, mask, totals, rule).item() for rule in AGGREGATIONS}
    assert found == {"grpo": 0.75, "bnpo": 1.5, "dapo": 1.5, "dr_grpo": 0.375}
    half = Totals(tokens=4, samples=4, max_new_tokens=4)  # there is a second micro-batch as large
    found = {rule: aggregate(values, mask, half, rule).item() for rule in AGGREGATIONS}
    assert found == {"grpo": 0.375, "bnpo": 0.75, "dapo": 0.75, "dr_grpo": 0.1875}


# KL


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators(kind: str) -> None:
    """Each value is the oracle's, and exactly 0 with gradient exactly 0 (k1: 1) where policy and
    reference agree."""
    for new, ref in itertools.product((-0.1, -1.0, -4.0), repeat=2):
        found = kl_estimate(
            torch.tensor(new, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64), kind
        )
        assert found.item() == pytest.approx(oracle.kl(new, ref, kind), abs=1e-12)
    same = torch.tensor(-1.3, requires_grad=True)
    kl_estimate(same, torch.tensor(-1.3), kind).backward()
    assert kl_estimate(same, torch.tensor(-1.3), kind).item() == 0.0
    assert same.grad.item() == (1.0 if kind == "k1" else 0.0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", [False, True])
def test_kl_estimators_in_expectation(
    kind: str, importance: bool, generator: torch.Generator
) -> None:
    """By enumeration of a vocabulary: k1 and k3 have the KL's value. As a loss, k2 has its
    gradient, k1 none and k3 that of the other KL; times the ratio, k1 and k3 have the right one.
    This is what the docstring promises."""
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=generator, dtype=torch.float64)
    new = logits.log_softmax(0)
    old = new.detach()
    estimate = kl_estimate(new, ref.log_softmax(0), kind)
    if importance:
        estimate = estimate * (new - old).exp()
    expected = (old.exp() * estimate).sum()
    forward, backward = exact_kl(logits, ref), exact_kl(ref, logits)
    (grad,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (right,) = torch.autograd.grad(forward, logits)
    (other,) = torch.autograd.grad(backward, logits)
    if kind != "k2":
        assert expected.item() == pytest.approx(forward.item(), rel=1e-12)
    wanted = {"k1": torch.zeros(6, dtype=torch.float64), "k2": right, "k3": other}[kind]
    if importance and kind != "k2":
        wanted = right
    if not (importance and kind == "k2"):  # k2 times the ratio is no one's gradient
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


def test_kl_clamps() -> None:
    """v2's: the log-ratio at 20, then the value at 10; the gradient beyond is 0."""
    new, ref = torch.tensor([0.0, -4.0, -5.0]), torch.tensor([-30.0, 0.0, 0.0])
    new.requires_grad_()
    found = kl_estimate(new, ref, "k2", log_ratio_clamp=20.0)
    assert found.tolist() == [200.0, 8.0, 12.5]
    clamped = kl_estimate(new, ref, "k2", log_ratio_clamp=20.0, value_clamp=10.0)
    assert clamped.tolist() == [10.0, 8.0, 10.0]
    clamped.sum().backward()
    assert new.grad.tolist() == [0.0, -4.0, 0.0]


def test_exact_kl() -> None:
    """Exactly 0 for equal logits; by hand for two symbols: .5 ln(.5/.8) + .5 ln(.5/.2)."""
    logits = torch.tensor([[0.3, -1.2, 2.0]])
    assert exact_kl(logits, logits).item() == 0.0
    found = exact_kl(
        torch.zeros(2, dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    )
    assert found.item() == pytest.approx(
        0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), rel=1e-12
    )


# Importance weights of a foreign sampler

# of tokens with w = 2, 1/4, 3 and one of padding, bounds [0.5, 2.5]; the product is 1.5
WEIGHTS = {
    "none": [1, 1, 1],
    "token": [2, 0.25, 3],
    "token_truncate": [2, 0.25, 2.5],
    "token_mask": [2, 0, 0],
    "prefix": [2, 0.5, 1.5],
    "sequence": [1.5, 1.5, 1.5],
    "sequence_truncate": [1.5, 1.5, 1.5],
    "sequence_mask": [1.5, 1.5, 1.5],
    "geometric_mask": [1, 1, 1],
    "geometric_mask_token": [2, 0.25, 3],
}
# the same with bounds [0.9, 1.12]: the geometric mean 1.145 is outside too; over four tokens it
# were 1.107
NARROW = {
    "token_truncate": [1.12, 0.25, 1.12],
    "sequence_truncate": [1.12, 1.12, 1.12],
    "sequence_mask": [0, 0, 0],
    "geometric_mask": [0, 0, 0],
    "geometric_mask_token": [0, 0, 0],
}


@pytest.mark.parametrize(
    ("kind", "low", "high", "wanted"),
    [(k, 0.5, 2.5, v) for k, v in WEIGHTS.items()] + [(k, 0.9, 1.12, v) for k, v in NARROW.items()],
)
def test_importance_weights(kind: str, low: float, high: float, wanted: list[float]) -> None:
    """Each kind by hand, and which tokens it calls out of bounds; without gradient."""
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    old = torch.tensor([[2.0, 0.25, 3.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    sampler = torch.zeros(1, 4, dtype=torch.float64)
    found = importance_weights(old, sampler, mask, kind, low, high)
    assert not found.requires_grad
    torch.testing.assert_close(found[0, :3], torch.tensor(wanted, dtype=torch.float64))
    outside = out_of_bounds(old, sampler, mask, kind, low, high)
    assert not outside[0, 3]
    if kind.startswith("token_"):
        assert outside[0, :3].tolist() == [
            w > high or (kind == "token_mask" and w < low) for w in (2.0, 0.25, 3.0)
        ]
    elif kind.startswith(("sequence_", "geometric")):
        assert outside[0, :3].all() == (high == 1.12)
    else:
        assert not outside.any()


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_weights_are_one_where_sampler_and_trainer_agree(
    kind: str, policy: TablePolicy, samples: Samples
) -> None:
    """Bit for bit: the corrected loss of a faithful sampler is the plain loss."""
    plain, corrected = GRPO(), GRPO(correction=kind)
    before, ready = prepared(plain, policy, samples), prepared(corrected, policy, samples)
    assert gradient(plain, policy, before)[0] == gradient(corrected, policy, ready)[0]
    assert torch.equal(gradient(plain, policy, before)[1], gradient(corrected, policy, ready)[1])


def test_the_gradient_under_a_foreign_sampler() -> None:
    """3 tokens of 3 symbols, all 27 sequences, logits of the sampler perturbed by 0.4: expectations
    without sampling.

    The product over the sequence gives the exact policy gradient; token weights leave most of the
    bias, prefixes some. Figures are means over 20 policies; the research notes have .235, .208,
    .208, .208, .170 and 0 for one.
    """
    errors: dict[str, list[float]] = defaultdict(list)
    for case in range(20):
        generator = torch.Generator().manual_seed(case)
        policy = TablePolicy.random(1, 3, 3, generator)
        ids = torch.tensor([(0, *sequence) for sequence in sequences(3, 3)])
        whole = torch.ones(27, 3, dtype=torch.bool)
        drawn = moved(policy, generator, 0.4).samples(ids, whole, whole[:, 0])
        rewards = torch.rand(27, 1, generator=generator, dtype=torch.float64)

        def policy_gradient(
            policy: TablePolicy, samples: Samples, weights: torch.Tensor
        ) -> torch.Tensor:
            logits = policy.logits.clone().requires_grad_()
            new = policy.at(logits).score(samples).logprobs
            loss = clipped_loss(new - new.detach(), weights, 0.2, 0.2)
            aggregate(loss, samples.mask, Totals(81, 1, 1), "dr_grpo").backward()
            assert logits.grad is not None
            return logits.grad

        old = policy.score(drawn).logprobs
        truth = policy_gradient(
            policy, drawn, old.sum(1, keepdim=True).exp() * rewards * torch.ones(3)
        )
        for kind, low, high in [
            ("none", 0, 0),
            ("token", 0, 0),
            ("token_truncate", 0, 2.0),
            ("token_mask", 0.5, 5.0),
            ("prefix", 0, 0),
            ("sequence", 0, 0),
        ]:
            w = importance_weights(old, drawn.sampler_logprobs, whole, kind, low, high)
            drawn_with = drawn.sampler_logprobs.sum(1, keepdim=True).exp() * rewards
            found = policy_gradient(policy, drawn, drawn_with * w)
            errors[kind].append(((found - truth).norm() / truth.norm()).item())
    mean = {kind: sum(values) / len(values) for kind, values in errors.items()}
    assert max(errors["sequence"]) < 1e-12
    assert mean["none"] > mean["token"] > mean["prefix"] > 0.05
    assert 0.1 < mean["token_truncate"] < mean["none"]
    assert 0.1 < mean["token_mask"] < mean["none"]


def test_weights_stay_finite() -> None:
    """A product over 1000 tokens of w = e has weight exp(20), not infinity, and nothing is 0 times
    infinity."""
    mask = torch.ones(1, 1000, dtype=torch.bool)
    for kind in WEIGHTS:
        found = importance_weights(
            torch.zeros(1, 1000), torch.full((1, 1000), -1.0), mask, kind, 0.5, 2.0
        )
        assert found.isfinite().all()


# TRL


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_trl_computes_the_same_loss(
    samples: Samples, policy: TablePolicy, generator: torch.Generator, rule: str, level: str
) -> None:
    """TRL's own loss function on our samples, in three accumulated micro-batches: loss, gradient
    and metrics."""
    trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="trl is not installed (extra: clients)"
    )
    objective = GRPO(
        aggregation=rule,
        ratio=level,
        clip_high=0.28,
        dual_clip=4.0,
        kl_coef=0.2,
        kl_importance="ratio",
    )
    ready = prepared(objective, policy, samples, reference=moved(policy, generator, 0.5))
    later = moved(policy, generator, 0.6)
    logits = later.logits.clone().requires_grad_()
    total, parts, logged = 0.0, 3, defaultdict(list)
    for index in torch.arange(len(ready)).chunk(parts):
        part = ready.select(index)
        scores = policy.at(logits).score(part)
        fake = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, s=scores, **k: (
                s.logprobs,
                s.entropy,
                None,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            loss_type=rule,
            epsilon_low=0.2,
            epsilon_high=0.28,
            beta=0.2,
            args=SimpleNamespace(
                delta=4.0, use_bias_correction_kl=True, steps_per_generation=parts
            ),
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=parts,
            max_completion_length=5,
            accelerator=SimpleNamespace(
                num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t
            ),
            _entropy_bonus_enabled=False,
            _metrics={"train": logged},
        )
        inputs = {
            "prompt_ids": part.ids[:, :1],
            "prompt_mask": part.attention[:, :1].long(),
            "completion_ids": part.ids[:, 1:],
            "completion_mask": part.mask.long(),
            "advantages": part.advantages[:, 0],
            "old_per_token_logps": part.old_logprobs,
            "ref_per_token_logps": part.ref_logprobs,
            "num_items_in_batch": ready.mask.sum(),
        }
        loss = trainer.GRPOTrainer._compute_loss(fake, None, inputs)
        loss.backward()
        total += loss.item()
    found, grad, metrics = gradient(objective, later, ready, parts)
    assert found == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(grad, logits.grad, rtol=1e-6, atol=1e-9)
    names = {name for name in logged if not name.endswith(("_min", "_max"))}
    assert names <= metrics.keys(), "TRL logs something under a name that we do not have"
