"""Each objective's identity: what must hold exactly if it is the published one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import textwrap
import threading
import typing
from collections.abc import Callable
from dataclasses import replace

import pytest
import rl_oracle as oracle
import torch
from limits import HANG
from rl_policy import TablePolicy, beside, gradient, moved, prepared, shuffled, totals_of

from nvfp4.rl.objectives.advantages import has_spread
from nvfp4.rl.objectives.base import Objective
from nvfp4.rl.objectives.brorl import BroRL
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.objectives.delta import DelTA, token_weights
from nvfp4.rl.objectives.dr_grpo import DrGRPO
from nvfp4.rl.objectives.grpo import GRPO
from nvfp4.rl.objectives.gspo import GSPO
from nvfp4.rl.objectives.lengths import distinct_grams
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.objectives.prorl import ProRL, ProRLv2, ProRLv21
from nvfp4.rl.objectives.reasonmaxxer import ReasonMaxxer, chosen_groups, shortest
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.objectives.rejection_sampling import RejectionSampling
from nvfp4.rl.objectives.rewarded import RewardedObjective
from nvfp4.rl.objectives.rover import Rover
from nvfp4.rl.objectives.ssd import SSD
from nvfp4.rl.objectives.token_loss import aggregate
from nvfp4.rl.samples import RAW_REWARD, Samples, Totals

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture
def samples(policy: TablePolicy, generator: torch.Generator) -> Samples:
    """6 completions of each of 4 prompts, in shuffled order, rewards 0 or 1, in every group
    both."""
    drawn = shuffled(policy, 6, generator)
    rewards = torch.randint(0, 2, (24,), generator=generator).float()
    for group in range(4):
        members = (drawn.groups == group).nonzero().flatten()
        rewards[members[0]], rewards[members[1]] = 0.0, 1.0
    return replace(drawn, rewards=rewards)


def made(name: str) -> Objective:
    """An objective of that name for short completions over few symbols."""
    options = {"entropy_gate": 1.0, "problem_share": 1.0} if name == "reasonmaxxer" else {}
    return OBJECTIVES[name](**options)


# What holds for all of them


@every_objective
def test_micro_batches_add_up(
    name: str, policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Loss, gradient and every metric, at the first update and at a later one, with splits through
    groups: shares of one batch add up to it, up to the rounding of float64 sums."""
    objective, base = made(name), moved(policy, generator)
    ready = prepared(objective, policy, samples, reference=base)
    for later in (policy, moved(policy, generator)):
        whole, whole_grad, whole_metrics = gradient(objective, later, ready, reference=base)
        for parts in (3, len(ready)):
            loss, grad, metrics = gradient(objective, later, ready, parts, base)
            torch.testing.assert_close(grad, whole_grad, rtol=1e-9, atol=1e-12)
            assert loss == pytest.approx(whole, rel=1e-6, abs=1e-9)
            assert metrics == pytest.approx(whole_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ssd"])
def test_equal_rewards_move_nothing(name: str, policy: TablePolicy, samples: Samples) -> None:
    """All completions of all groups equally wrong: the gradient is exactly 0, bit for bit, or
    nothing is kept."""
    objective = made(name)
    samples = replace(
        samples, rewards=torch.full((24,), 0.1), truncated=torch.zeros(24, dtype=torch.bool)
    )
    if isinstance(objective, RewardedObjective):
        objective.overlong_share = 0.0  # the penalty is a difference in rewards
    kept = objective.keep(samples)
    assert kept.all() or not kept.any()
    if kept.all():
        ready = prepared(objective, policy, samples)
        assert (gradient(objective, policy, ready)[1] == 0).all()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ssd"])
def test_the_first_gradient_raises_good_completions(
    name: str, policy: TablePolicy, samples: Samples
) -> None:
    """A step against the gradient makes the rewarded completions likelier relative to the
    others."""
    objective = made(name)
    ready = prepared(objective, policy, samples)
    _, grad, _ = gradient(objective, policy, ready)
    totals = [
        policy.at(policy.logits - s * grad).score(ready).logprobs.sum(dim=1) for s in (0.0, 0.01)
    ]
    rise, good = totals[1] - totals[0], ready.rewards > 0.5
    used = ready.mask.any(dim=1)
    assert rise[good & used].mean() > 0
    if (~good & used).any():
        assert rise[good & used].mean() > rise[~good & used].mean()


def documented(kind: type) -> set[str]:
    """Names of the fields with a docstring beneath, in the class or one that it extends: what
    --help shows."""
    found = set()
    for parent in kind.__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found.add(field.target.id)
    return found


@every_objective
def test_options_are_data(name: str) -> None:
    """Types resolve, defaults construct and reconstruct through JSON, every option has its line of
    help: what a config file and --help need. The class says where its formula is from."""
    kind = OBJECTIVES[name]
    values = dataclasses.asdict(kind())
    assert values.keys() <= typing.get_type_hints(kind).keys()
    assert dataclasses.asdict(kind(**values)) == values
    assert json.loads(json.dumps(values)).keys() == values.keys()
    assert not values.keys() - documented(kind)
    assert kind.name == name
    assert kind.__doc__
    assert "arXiv" in kind.__doc__ or "NeMo" in kind.__doc__


@every_objective
def test_tensors_are_made_where_the_samples_are(
    name: str, policy: TablePolicy, samples: Samples
) -> None:
    """With another default device, as a stand-in for a GPU: a tensor made without naming the device
    would not mix."""
    objective = made(name)
    old = policy.score(samples)
    ready = prepared(objective, policy, samples)
    logits = old.logprobs.clone().requires_grad_()
    with torch.device("meta"):
        objective.keep(samples)
        rewards = objective.shape_rewards(samples)
        extra = {
            **objective.remember(samples, old, "old"),
            **objective.remember(samples, old, "reference"),
        }
        again = objective.prepare(
            replace(samples, rewards=rewards, ref_logprobs=old.logprobs, extra=extra), old
        )
        objective.describe(again)
        part = beside(objective, ready, policy)
        loss, metrics = objective.loss(part, replace(old, logprobs=logits), totals_of(ready))
    assert {tensor.device.type for tensor in (again.advantages, loss, *metrics.values())} == {"cpu"}


# the papers' settings, where they differ from GRPO's; kept apart from the code on purpose
PUBLISHED = {
    "grpo": {
        "advantage": "group_std",
        "aggregation": "grpo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl": "k3",
    },
    "dr_grpo": {"advantage": "group_mean", "aggregation": "dr_grpo"},
    "gspo": {"ratio": "sequence", "aggregation": "grpo", "clip_low": 3e-4, "clip_high": 4e-4},
    "dapo": {
        "clip_high": 0.28,
        "aggregation": "dapo",
        "dynamic_sampling": True,
        "overlong_share": 0.2,
        "overlong_penalty": 0.5,
    },
    "prorl": {"clip_low": 0.2, "clip_high": 0.4, "dynamic_sampling": True, "kl_coef": 1e-4},
    "prorl_v2": {
        "advantage": "reinforce_plus_plus",
        "aggregation": "dapo",
        "clip_low": 0.2,
        "clip_high": 0.27,
        "dynamic_sampling": True,
        "truncated": "scale",
        "truncated_scale": 0.0,
        "kl_coef": 1e-4,
        "kl": "k2",
        "kl_importance": "score",
        "reset_kl_share": 0.0,
        "kl_log_ratio_clamp": 20.0,
        "kl_value_clamp": 10.0,
        "correction": "token_mask",
        "correction_low": 0.5,
        "correction_high": 5.0,
    },
    "prorl_v2.1": {
        "ratio": "one",
        "dynamic_sampling": False,
        "correction": "geometric_mask_token",
        "correction_low": 0.999,
        "correction_high": 1.002,
    },
    "rover": {"q_scale": 1.0, "advantage": "group_mean", "q_clip": None, "correction": "none"},
    "delta": {
        "clip_high": 0.28,
        "dual_clip": 10.0,
        "kl_coef": 0.0,
        "aggregation": "dapo",
        "dynamic_sampling": False,
    },
    "microcoder": {"excused_share": 0.3, "loop_window": 128, "kl_coef": 0.0, "clip_high": 0.28},
    "reasonmaxxer": {
        "entropy_gate": 1.4,
        "kl_coef": 0.2,
        "advantage_clip": 2.5,
        "problem_share": 50 / 300,
        "shortest_share": 0.8,
    },
    "ssd": {"loss_at": 1.0},
    "rejection_sampling": {"loss_at": 1.0, "accept": 1.0},
}

RUN_FIELDS = ("updates", "group", "temperature", "top_p", "top_k", "lr", "weight_decay")
# the same of what the configuration leaves open, from papers, scripts and configurations of the
# authors
RUNS = {
    "grpo": (1, 8, 1.0, 1.0, 0, 1e-6, 0.0),  # TRL f2cd577; one update in the paper, too
    "dr_grpo": (8, 8, 1.0, 1.0, 0, 1e-6, 0.0),  # sail-sg/understand-r1-zero dfca49d, README.md
    # section 5.1; verl 1dda039, examples/gspo_trainer/run_qwen3_8b_fsdp.sh
    "gspo": (4, 16, 1.0, 1.0, 0, 1e-6, 0.0),
    "dapo": (16, 16, 1.0, 1.0, 0, 1e-6, 0.1),  # the paper: 512 prompts, 32 to an update
    "prorl": (4, 16, 1.2, 1.0, 0, 2e-6, 0.0),  # the paper: 256 prompts, 64 to an update
    # NeMo RL 7ea279a, prorlv2.v2.yaml on grpo_math_1B.yaml
    "prorl_v2": (1, 16, 1.0, 1.0, 0, 5e-6, 0.01),
    "prorl_v2.1": (1, 16, 1.0, 1.0, 0, 5e-6, 0.01),  # prorlv2_1_moe.v2.yaml
    "brorl": (1, 512, 1.0, 1.0, 0, 5e-6, 0.01),
    # ROVER b0fa587, Math/scripts/deepscaler/train/rover_qwen3_8b.sh
    "rover": (4, 8, 0.6, 1.0, 0, 1e-6, 0.01),
    "delta": (4, 16, 1.0, 1.0, 0, 1e-6, 0.1),  # DelTA cf048bd, recipe/dapo/srcs/run_DelTA.sh
    "microcoder": (2, 8, 1.2, 1.0, 0, 1e-6, 0.0),  # MicroCoder acd9bcd, MicroCoder-Insights.md
    # ReasonMaxxer dae2a3a, examples/qwen25_1p5b/02_*.sh
    "reasonmaxxer": (4, 20, 0.6, 0.95, 0, 1e-6, 0.0),
    "ssd": (1, 8, 1.6, 0.8, 20, 5e-6, 0.0),  # TRL f2cd577, examples/scripts/ssd.py
    "rejection_sampling": (1, 8, 1.0, 1.0, 0, 1e-6, 0.0),
}


def test_published_settings() -> None:
    """What a name stands for; BroRL is ProRL v2 with groups of 512."""
    for name, settings in PUBLISHED.items():
        values = dataclasses.asdict(OBJECTIVES[name]())
        assert {option: values[option] for option in settings} == settings
    assert dataclasses.asdict(BroRL()) == dataclasses.asdict(ProRLv2())
    assert RUNS.keys() == OBJECTIVES.keys()
    for name, values in RUNS.items():
        defaults = vars(OBJECTIVES[name].defaults)
        assert {**defaults, **dict(zip(RUN_FIELDS, values, strict=True))} == defaults, name


@every_objective
def test_scores_outside_the_mask_do_not_matter(
    name: str, policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """A loop may score before ``prepare`` shrinks the mask: what lies outside, and would overflow,
    changes no bit."""
    objective = made(name)
    if isinstance(objective, PolicyGradient):
        objective.truncated, objective.kl_coef = "mask", 0.1
    samples = replace(samples, truncated=torch.arange(24) % 4 == 0)
    ready = prepared(objective, policy, samples, reference=moved(policy, generator))
    later = moved(policy, generator).score(samples)
    found = []
    for outside in (0.0, -2000.0):
        leaf = torch.where(ready.mask, later.logprobs, outside).requires_grad_()
        part = beside(objective, ready, policy)
        loss, metrics = objective.loss(part, replace(later, logprobs=leaf), totals_of(ready))
        loss.backward()
        found.append(
            (loss.item(), leaf.grad, {name: value.item() for name, value in metrics.items()})
        )
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert (found[0][1][~ready.mask] == 0).all()


class TwoProcesses:
    """Two threads that stand for two processes: ``all_sum`` and ``gather`` wait for both."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=HANG)
        self.given: dict[int, torch.Tensor] = {}

    def both(
        self, rank: int, make: Callable[..., torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(tensor: torch.Tensor) -> torch.Tensor:
            self.given[rank] = tensor
            self.barrier.wait()
            found = make(self.given[0], self.given[1])
            self.barrier.wait()
            return found

        return call

    def connect(self, rank: int, objective: Objective) -> None:
        objective.connect(
            self.both(rank, torch.add), self.both(rank, lambda a, b: torch.cat((a, b)))
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_are_one_batch(name: str, policy: TablePolicy, samples: Samples) -> None:
    """Statistics over the batch go through all_sum and gather: half of the groups each gives what
    the whole gives; so do draws, which belong to a group and not to a process."""
    samples = replace(samples, truncated=samples.ids[:, 1] > 1)
    together = prepared(made(name), policy, samples)
    processes, halves = TwoProcesses(), {}

    def work(rank: int) -> None:
        objective = made(name)
        processes.connect(rank, objective)
        halves[rank] = prepared(objective, policy, samples.select(samples.groups % 2 == rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        own = together.select(together.groups % 2 == rank)
        torch.testing.assert_close(halves[rank].advantages, own.advantages, rtol=1e-6, atol=1e-7)
        assert torch.equal(halves[rank].mask, own.mask)
        for key in ("weight", "decision"):
            if key in own.extra:
                torch.testing.assert_close(halves[rank].extra[key], own.extra[key])


# GRPO, Dr. GRPO, GSPO


def test_the_first_gradient_of_dr_grpo_is_reinforce(policy: TablePolicy, samples: Samples) -> None:
    """Before any update the ratio is 1 and nothing is clipped: -sum (r - mean) grad log policy / (S
    * limit)."""
    ready = prepared(DrGRPO(), policy, samples)
    _, grad, _ = gradient(DrGRPO(), policy, ready)
    logits = policy.logits.clone().requires_grad_()
    centred = torch.tensor(
        oracle.advantages(samples.rewards.tolist(), samples.groups.tolist(), kind="group_mean"),
        dtype=torch.float64,
    )
    (-(policy.at(logits).score(samples).logprobs.sum(dim=1) * centred).sum() / (24 * 5)).backward()
    torch.testing.assert_close(grad, logits.grad, rtol=1e-6, atol=1e-9)


def test_gspo_clips_whole_completions(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Far from the old policy, completions with gain beyond the clip give no gradient in any
    token."""
    objective, later = GSPO(), moved(policy, generator, 0.3)
    ready = prepared(objective, policy, samples)
    scores = later.score(ready)
    mean = (scores.logprobs - ready.old_logprobs).sum(dim=1) / ready.lengths
    advantage = ready.advantages[:, 0]
    stopped = ((mean.exp() > 1 + 4e-4) & (advantage > 0)) | (
        (mean.exp() < 1 - 3e-4) & (advantage < 0)
    )
    assert stopped.any()
    assert not stopped.all()
    leaf = scores.logprobs.clone().requires_grad_()
    objective.loss(ready, replace(scores, logprobs=leaf), totals_of(ready))[0].backward()
    moves = (leaf.grad != 0).any(dim=1)
    assert (moves == ~stopped).all()


def test_a_reference_is_asked_for_only_when_it_is_read(
    policy: TablePolicy, samples: Samples
) -> None:
    assert not GRPO().needs_reference
    assert GRPO(kl_coef=0.1).needs_reference
    with pytest.raises(ValueError, match=r"grpo with kl_coef 0\.1 needs ref_logprobs"):
        gradient(GRPO(kl_coef=0.1), policy, prepared(GRPO(), policy, samples))


# DAPO


def test_overlong_penalty_at_the_papers_lengths(samples: Samples) -> None:
    """20480 tokens with a cache of 4096: 0 at 16384, -1/2 at 18432, -1 at 20480."""
    count = 3
    lengths = torch.tensor([16384, 18432, 20480])
    mask = torch.arange(20480) < lengths[:, None]
    long = replace(
        samples.select(slice(0, count)),
        mask=mask,
        rewards=torch.tensor([1.0, 1.0, -1.0]),
        max_new_tokens=20480,
    )
    assert DAPO(overlong_penalty=1.0).shape_rewards(long).tolist() == [1.0, 0.5, -2.0]
    assert DAPO().shape_rewards(long).tolist() == [1.0, 0.75, -1.5]
    assert GRPO().shape_rewards(long).tolist() == [1.0, 1.0, -1.0]


def test_dynamic_sampling_keeps_groups_with_both(samples: Samples) -> None:
    """0 < right < G; by raw rewards, so lengths do not matter."""
    rewards = torch.where(
        samples.groups == 0, 0.0, torch.where(samples.groups == 1, 1.0, samples.rewards)
    )
    samples = replace(samples, rewards=rewards)
    assert torch.equal(DAPO().keep(samples), samples.groups >= 2)
    assert GRPO().keep(samples).all()
    kept = samples.select(DAPO().keep(samples))
    ready = prepared(DAPO(), TablePolicy.random(4, 5, 4, torch.Generator()), kept)
    assert DAPO().describe(ready)["frac_reward_zero_std"] == 0.0
    assert GRPO().describe(samples)["frac_reward_zero_std"] == 0.5


def test_masked_truncated_completions_leave_no_trace(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """They stay in the baseline, but the loss, the mean over tokens and their number are those of
    the others."""
    samples = replace(samples, truncated=torch.arange(24) % 4 == 0)
    objective = DAPO(truncated="mask", overlong_share=0.0)
    ready = prepared(objective, policy, samples)
    whole = prepared(DAPO(overlong_share=0.0), policy, samples)
    others = whole.select(~samples.truncated)
    later = moved(policy, generator)
    assert totals_of(ready).tokens == totals_of(others).tokens < totals_of(whole).tokens
    torch.testing.assert_close(
        gradient(objective, later, ready)[1], gradient(DAPO(), later, others)[1]
    )


# ProRL and BroRL


def test_kl_is_exactly_zero_after_a_reset(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """The reference is the policy: metric and gradient of the KL term are 0, bit for bit; before,
    they are not."""
    for kind, name in itertools.product((ProRL, ProRLv2), ("k2", "k3")):
        objective = kind(kl=name, kl_coef=1.0, correction="none", dynamic_sampling=False)
        plain = dataclasses.replace(objective, kl_coef=0.0)
        for reference, same in ((policy, True), (moved(policy, generator), False)):
            ready = prepared(objective, policy, samples, reference=reference)
            loss, grad, metrics = gradient(objective, policy, ready)
            bare_loss, bare_grad, _ = gradient(plain, policy, ready)
            assert (metrics["kl"] == 0.0) == same
            assert (loss == bare_loss) == same
            assert torch.equal(grad, bare_grad) == same


def test_prorl_v2_is_reinforce_plus_plus(policy: TablePolicy, samples: Samples) -> None:
    """Group mean off, then standardised over the tokens of the batch: mean 0 and variance 1 over
    tokens."""
    ready = prepared(ProRLv2(truncated="keep"), policy, samples)
    values = ready.advantages[ready.mask].double()
    assert abs(values.mean()) < 1e-6
    assert values.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    centred = oracle.advantages(
        samples.rewards.tolist(), samples.groups.tolist(), kind="group_mean"
    )
    a, b = ready.advantages[:, 0], torch.tensor(centred)
    slope = (a[0] - a[1:]) / (b[0] - b[1:])
    torch.testing.assert_close(
        slope[slope.isfinite()], slope[slope.isfinite()][:1].expand(int(slope.isfinite().sum()))
    )


def test_stop_properly(samples: Samples) -> None:
    """Truncated completions keep truncated_scale of their reward, and then there is no overlong
    penalty."""
    samples = replace(samples, rewards=torch.ones(24), truncated=torch.arange(24) < 3)
    assert ProRLv2().shape_rewards(samples).tolist() == [0.0] * 3 + [1.0] * 21
    assert (
        ProRLv2(truncated_scale=0.25, overlong_share=0.2).shape_rewards(samples).tolist()
        == [0.25] * 3 + [1.0] * 21
    )


def test_prorl_masks(policy: TablePolicy, samples: Samples) -> None:
    """IcePop drops tokens outside [0.5, 5]; v2.1 whole completions whose geometric mean leaves
    [0.999, 1.002]."""
    shift = torch.zeros(samples.mask.shape)
    shift[3, 0], shift[5, 0] = math.log(6.0), math.log(1.5)
    foreign = replace(
        samples, sampler_logprobs=torch.where(samples.mask, samples.sampler_logprobs - shift, 0.0)
    )
    v2, v21 = ProRLv2(), ProRLv21()
    dropped = prepared(v2, policy, foreign)
    weights = dropped.extra["importance"]
    assert weights[3, 0] == 0
    assert weights[5, 0].item() == pytest.approx(1.5, rel=1e-6)
    assert (weights == 0).sum() == 1
    assert v2.describe(dropped)["is_oob_ratio"] == pytest.approx(1 / int(samples.mask.sum()))
    assert v2.describe(dropped)["sampling/importance_sampling_ratio/max"] == pytest.approx(
        1.5, rel=1e-6
    )
    ready = prepared(v21, policy, foreign)
    gone = (ready.extra["importance"] == 0).all(dim=1)
    assert gone.nonzero().flatten().tolist() == [3, 5]


def test_forced_on_policy_is_reinforce_at_every_update(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """v2.1: the gradient at a moved policy is that of -A log policy there, whatever the old one
    was."""
    objective = ProRLv21(kl_coef=0.0)
    ready, later = prepared(objective, policy, samples), moved(policy, generator)
    logits = later.logits.clone().requires_grad_()
    (
        -(later.at(logits).score(ready).logprobs * ready.advantages).sum() / ready.mask.sum()
    ).backward()
    torch.testing.assert_close(
        gradient(objective, later, ready)[1], logits.grad, rtol=1e-9, atol=1e-12
    )


def test_brorl_groups_without_spread() -> None:
    """By enumeration of all 513 counts of right answers among G = 512, weighted by their
    probabilities: the share of groups that say nothing is p^G + (1 - p)^G; all 256 outcomes of G =
    8 give the same formula."""
    size = 512
    counts = torch.arange(size + 1)
    rewards = (torch.arange(size) < counts[:, None]).float().flatten()
    silent = ~has_spread(rewards, counts.repeat_interleave(size)).view(-1, size)[:, 0]
    for p in (0.001, 0.01, 0.5):
        log_choose = torch.tensor(
            [math.lgamma(size + 1) - math.lgamma(c + 1) - math.lgamma(size - c + 1) for c in counts]
        )
        log_p = log_choose + counts * math.log(p) + (size - counts) * math.log1p(-p)
        found = log_p.double().exp()[silent].sum().item()
        assert found == pytest.approx(p**size + (1 - p) ** size, rel=1e-4)
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    silent = ~has_spread(outcomes.flatten(), torch.arange(256).repeat_interleave(8)).view(256, 8)[
        :, 0
    ]
    right = outcomes.sum(dim=1)
    assert ((0.3**right * 0.7 ** (8 - right))[silent].sum()).item() == pytest.approx(
        0.3**8 + 0.7**8, rel=1e-6
    )


def test_brorl_group_larger_than_a_micro_batch(
    policy: TablePolicy, generator: torch.Generator
) -> None:
    """512 completions of one prompt in 16 micro-batches have the gradient of one batch."""
    objective = BroRL(kl_coef=0.0)
    assert objective.defaults.group == 512
    drawn = policy.sample(torch.zeros(512, dtype=torch.int64), generator)
    drawn = replace(drawn, rewards=(drawn.ids[:, 1] == 2).float())
    ready, later = prepared(objective, policy, drawn), moved(policy, generator)
    whole, parts = gradient(objective, later, ready)[1], gradient(objective, later, ready, 16)[1]
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-14)


def test_gradient_variance_falls_with_the_group(generator: torch.Generator) -> None:
    """A bandit with 3 arms, 4000 groups at a time, baseline of the others: the estimate is the
    sample covariance of reward and score, unbiased, with the variance (m22 - c^2 (G-2)/(G-1) + v_r
    v_s/(G-1)) / G of a sample covariance.

    A variance estimated from 4000 draws is off by about 3%; the gate is 10%."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reward = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    score = torch.eye(3, dtype=torch.float64) - p
    covariance = p @ ((reward - p[1])[:, None] * score)
    fourth = p @ ((reward - p[1])[:, None] * score) ** 2
    spreads = p[1] * (1 - p[1]) * (p * (1 - p))
    for size in (4, 32):
        groups = torch.arange(4000).repeat_interleave(size)
        arms = torch.multinomial(p, len(groups), replacement=True, generator=generator)
        one = torch.ones(len(groups), 1, dtype=torch.bool)
        drawn = Samples(
            arms[:, None],
            one,
            one,
            groups,
            reward[arms].float(),
            ~one[:, 0],
            torch.zeros(len(groups), 1),
        )
        advantages = GRPO(advantage="leave_one_out").advantages(drawn)
        gradients = (advantages * score[arms]).view(4000, size, 3).mean(dim=1)
        variance = (fourth - covariance**2 * (size - 2) / (size - 1) + spreads / (size - 1)) / size
        assert ((gradients.mean(dim=0) - covariance).abs() < 5 * (variance / 4000).sqrt()).all()
        assert gradients.var(dim=0).sum().item() == pytest.approx(variance.sum().item(), rel=0.1)


# ROVER


def test_rovers_first_gradient_is_twice_reinforce(policy: TablePolicy, samples: Samples) -> None:
    """Q = V = 0 before any update: grad = -2 rho * mean over tokens of (r - mean) grad log policy,
    exactly."""
    for scale in (1.0, 0.5):
        objective = Rover(q_scale=scale)
        ready = prepared(objective, policy, samples)
        loss, grad, metrics = gradient(objective, policy, ready)
        logits = policy.logits.clone().requires_grad_()
        (
            -(policy.at(logits).score(ready).logprobs * ready.advantages).sum() / ready.mask.sum()
        ).backward()
        torch.testing.assert_close(grad, 2 * scale * logits.grad, rtol=1e-13, atol=0)
        assert loss == pytest.approx((ready.advantages[ready.mask] ** 2).mean().item())
        assert metrics["q"] == metrics["next_value"] == 0.0


def test_rovers_later_loss(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Token by token: the next value is the mean over the vocabulary one token on, 0 at a
    completion's last token, and not differentiated."""
    objective, later = Rover(q_scale=0.7), moved(policy, generator)
    ready = prepared(objective, policy, samples)
    logits = later.logits.clone().requires_grad_()
    new, old = later.at(logits).score(ready), policy.score(ready)
    centred = oracle.advantages(
        samples.rewards.tolist(), samples.groups.tolist(), kind="group_mean"
    )
    whole_new, whole_old = (scores.logits.log_softmax(-1) for scores in (new, old))
    terms = []
    for i, length in enumerate(ready.lengths.tolist()):
        for t in range(length):
            following = (
                0.7 * (whole_new[i, t + 1] - whole_old[i, t + 1]).mean().detach()
                if t + 1 < length
                else 0.0
            )
            terms.append(
                (0.7 * (new.logprobs[i, t] - old.logprobs[i, t]) - centred[i] - following) ** 2
            )
    wanted = torch.stack(terms).mean()
    wanted.backward()
    loss, grad, _ = gradient(objective, later, ready)
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(grad, logits.grad, rtol=1e-6, atol=1e-9)


def test_rover_can_divide_by_the_standard_deviation(policy: TablePolicy, samples: Samples) -> None:
    ready = prepared(Rover(advantage="group_std"), policy, samples)
    assert torch.equal(ready.advantages, prepared(GRPO(), policy, samples).advantages)


# DelTA


def test_delta_weights_are_the_oracles(generator: torch.Generator) -> None:
    """Random tokens with graded advantages, with and without the refinement; mean 1; before scaling
    in [0.8, 1.2]."""
    vectors = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(60, generator=generator, dtype=torch.float64)
    advantages[::7] = 0.0
    for rounds in (0, 1, 3):
        found = token_weights(vectors, advantages, rounds)
        wanted = torch.tensor(oracle.delta_weights(vectors.tolist(), advantages.tolist(), rounds))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        assert found.double().mean().item() == pytest.approx(1.0, abs=1e-6)
        raw = found / found[0] * 0.8  # the first token has no advantage: 0.8
        assert ((raw > 0.8 - 1e-6) & (raw < 1.2 + 1e-6)).all()
        assert (raw[::7] - 0.8).abs().max() < 1e-6


def test_delta_weights_the_advantages(policy: TablePolicy, samples: Samples) -> None:
    """Of a whole rollout: token vectors are (1 - probability) * hidden state, advantages GRPO's;
    hidden states go."""
    ready = prepared(DelTA(overlong_share=0.0), policy, samples)
    scores, mask = policy.score(samples), samples.mask
    vectors = ((1 - scores.logprobs.exp())[..., None] * scores.hidden)[mask]
    plain = prepared(GRPO(), policy, samples).advantages[mask]
    wanted = plain * torch.tensor(oracle.delta_weights(vectors.tolist(), plain.tolist(), 1))
    torch.testing.assert_close(ready.advantages[mask], wanted, rtol=1e-5, atol=1e-7)
    assert (ready.advantages[~mask] == 0).all()
    assert "hidden" not in ready.extra


def test_delta_on_a_symmetric_batch_is_dapo(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Every completion once with reward 1 and once with 0: no token tells the sides apart, so the
    weights are 1 and the gradient is DAPO's; to a rounding, as the two sides' means are sums in
    another order."""
    twice = samples.select(torch.arange(24).repeat_interleave(2))
    twice = replace(twice, rewards=torch.tensor([0.0, 1.0]).repeat(24))
    later = moved(policy, generator)
    options = {"overlong_share": 0.0, "dynamic_sampling": False, "dual_clip": 10.0}
    delta, dapo = DelTA(**options), DAPO(**options)
    ready, plain = prepared(delta, policy, twice), prepared(dapo, policy, twice)
    torch.testing.assert_close(ready.advantages, plain.advantages, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient(delta, later, ready)[1], gradient(dapo, later, plain)[1], rtol=1e-6, atol=1e-9
    )
    # and not on a batch whose sides differ
    assert not torch.allclose(
        prepared(delta, policy, samples).advantages,
        prepared(dapo, policy, samples).advantages,
        rtol=0.01,
    )


def test_delta_lowers_what_both_sides_share(generator: torch.Generator) -> None:
    """A template: two tokens that every completion has, then a digit that decides. The digit weighs
    more."""
    template, digits = torch.randn(2, 4, generator=generator), 3 * torch.eye(4)[:2]
    vectors = torch.stack(
        [torch.stack((template[0], template[1], digits[i % 2])) for i in range(40)]
    )
    vectors = (vectors + 0.05 * torch.randn(vectors.shape, generator=generator)).flatten(0, 1)
    advantages = torch.tensor([1.0, -1.0]).repeat(20).repeat_interleave(3)
    weights = token_weights(vectors, advantages, 1).view(40, 3)
    assert weights[:, 2].min() > weights[:, :2].max()


def test_delta_without_one_side_is_dapo(policy: TablePolicy, samples: Samples) -> None:
    """All wrong: there is nothing to tell apart."""
    found = token_weights(torch.randn(5, 3), torch.tensor([-1.0, -2.0, 0.0, -1.0, -1.0]), 1)
    assert found.tolist() == [1.0] * 5


# MicroCoder


def test_conditional_mask_truth_table() -> None:
    """Excused iff truncated, right, not looping and drawn; all 16 cases through the objective. The
    raw reward counts, not what penalties make of it."""
    cases = torch.tensor(list(itertools.product((False, True), repeat=3)))
    truncated, incorrect, looping = cases.unbind(dim=1)
    completions = torch.tensor([[1, 2, 3, 1, 3, 3]]).repeat(8, 1)
    completions[looping] = torch.tensor([1, 2, 3, 1, 2, 3])
    ids = torch.cat((torch.zeros(8, 1, dtype=torch.int64), completions), dim=1)
    mask = torch.ones(8, 6, dtype=torch.bool)
    raw = (~incorrect).float()
    samples = Samples(
        ids, mask, mask, ids[:, 0], raw - 0.5, truncated, torch.zeros(8, 6), extra={RAW_REWARD: raw}
    )
    wanted = truncated & ~incorrect & ~looping
    assert torch.equal(MicroCoder(excused_share=1.0, loop_window=3).excused(samples), wanted)
    assert not MicroCoder(excused_share=0.0, loop_window=3).excused(samples).any()
    assert torch.equal(
        MicroCoder(excused_share=1.0, loop_window=0).excused(samples), truncated & ~incorrect
    )
    # 6 < 8
    assert torch.equal(
        MicroCoder(excused_share=1.0, loop_window=4).excused(samples), truncated & ~incorrect
    )


def test_conditional_mask_draws(policy: TablePolicy, samples: Samples) -> None:
    """A share of 0.3 of many; other draws at the next rollout; the same again from the same state;
    and the same for a group and a place in it, whatever else is in the batch."""
    many = samples.select(torch.zeros(4000, dtype=torch.int64))
    always = torch.ones(4000, dtype=torch.bool)
    many = replace(many, truncated=always, rewards=always.float(), groups=torch.arange(4000) // 8)
    objective = MicroCoder(seed=5)
    first = objective.excused(many)
    assert first.float().mean().item() == pytest.approx(0.3, abs=0.03)  # standard error 0.007
    assert torch.equal(objective.excused(many), first)
    part = many.groups % 3 == 1
    assert torch.equal(objective.excused(many.select(part)), first[part])
    state = objective.state_dict()
    prepared(objective, policy, samples)
    assert not torch.equal(objective.excused(many), first)
    objective.load_state_dict(state)
    assert torch.equal(objective.excused(many), first)


def test_diversity_is_of_runs_of_tokens() -> None:
    """Two completions that begin alike and part: 3 + 3 runs of two tokens, of which (1, 2) is in
    both. The share of distinct completions would be 1 for any long answers."""
    completions = torch.tensor(
        [[1, 2, 3, 4], [1, 2, 5, 6], [7, 7, 7, 7], [7, 7, 0, 0], [9, 0, 0, 0]]
    )
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool
    )
    groups = torch.tensor([3, 3, 8, 8, 5])
    found = distinct_grams(completions, mask, groups, 2)
    torch.testing.assert_close(found, torch.tensor([5 / 6, 5 / 6, 1 / 4, 1 / 4, 1.0]))
    assert distinct_grams(completions, mask, groups, 9).tolist() == [1.0] * 5
    nothing = distinct_grams(completions, torch.zeros_like(mask), groups, 2)
    assert nothing.tolist() == [1.0] * 5


def test_limits_of_the_conditional_mask(
    policy: TablePolicy, samples: Samples, generator: torch.Generator
) -> None:
    """Share 0 is GRPO; share 1 without the loop test is the overlong filter of right ones, bit for
    bit."""
    samples = replace(samples, truncated=(torch.arange(24) % 3 == 0) & (samples.rewards == 1))
    later = moved(policy, generator)
    for share, other in (
        (0.0, GRPO(clip_high=0.28)),
        (1.0, GRPO(clip_high=0.28, truncated="mask")),
    ):
        objective = MicroCoder(excused_share=share, loop_window=0)
        ready, plain = prepared(objective, policy, samples), prepared(other, policy, samples)
        assert torch.equal(gradient(objective, later, ready)[1], gradient(other, later, plain)[1])


# ReasonMaxxer and self-distillation


def test_reasonmaxxer_finds_planted_decisions(generator: torch.Generator) -> None:
    """A base that is sure everywhere but at position 2: only there the policy is pushed, everywhere
    else it is held."""
    policy = TablePolicy.random(4, 5, 4, generator)
    logits = torch.zeros_like(policy.logits)
    logits[..., 3] = 6.0
    logits[:, 2] = 0.0
    policy = policy.at(logits)
    samples = policy.sample(torch.arange(4).repeat_interleave(8), generator)
    samples = replace(samples, rewards=(samples.ids[:, 3] == 1).float())
    objective = ReasonMaxxer(entropy_gate=1.0, shortest_share=1.0)
    ready = prepared(objective, policy, samples)
    decisions = ready.extra["decision"]
    assert decisions[:, 2].sum() == ready.mask[:, 2].sum()
    assert not decisions[:, [0, 1, 3, 4]].any()
    _, grad, metrics = gradient(objective, policy, ready)
    assert metrics["kl"] == 0.0
    assert grad[:, [0, 1, 3, 4]].abs().max() < 1e-15  # the softmax's backward rounds
    assert grad[:, 2].abs().max() > 1e-3


def test_which_problems_and_completions_are_used() -> None:
    """Groups nearest a pass rate of 1/2 with both signs, among equals those with fewer cut ones,
    then shorter ones; of all their completions together the shortest, among equals those that were
    not cut."""
    groups = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3, 5, 5, 5, 5, 4, 4, 4, 4])
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0])
    lengths = torch.tensor([4, 1, 3, 2, 5, 5, 5, 5, 9, 1, 1, 2, 6, 6, 6, 6])
    cut = torch.zeros(16, dtype=torch.bool)
    assert chosen_groups(rewards, groups, lengths, cut, 1) == {3}
    assert chosen_groups(rewards, groups, lengths, cut | (groups == 3), 1) == {4}
    assert chosen_groups(rewards, groups, lengths, cut, 2) == {3, 4}
    assert chosen_groups(rewards, groups, lengths, cut, 9) == {3, 4, 7}
    numbers = torch.arange(8)
    assert shortest(lengths[:8], cut[:8], numbers, 0.5).tolist() == [True] * 4 + [False] * 4
    assert shortest(lengths[:8], numbers == 4, numbers, 0.6).tolist() == [True] * 4 + [
        False,
        True,
        False,
        False,
    ]
    assert shortest(lengths[:8], cut[:8], numbers, 0.0).sum() == 0


def test_reasonmaxxer_keeps_no_distributions(policy: TablePolicy, samples: Samples) -> None:
    """Of a whole rollout: nothing of the size of the vocabulary. What the exact KL needs is asked
    for per micro-batch, and missed by name."""
    objective = made("reasonmaxxer")
    ready = prepared(objective, policy, samples)
    assert objective.needs_reference_logits
    assert objective.needs_prompt_logits
    assert all(value.ndim <= 2 for value in ready.extra.values())
    with pytest.raises(ValueError, match="needs logits of policy and base"):
        objective.loss(ready, policy.score(ready), totals_of(ready))
    free = ReasonMaxxer(kl_coef=0.0)
    assert not any((free.needs_logits, free.needs_prompt_logits, free.needs_reference_logits))
    assert "kl" not in gradient(free, policy, prepared(free, policy, samples))[2]


def test_ssd_has_no_gradient_at_its_sampling_temperature(generator: torch.Generator) -> None:
    """By enumeration of all completions with their probabilities: the likelihood of everything, at
    the temperature of sampling, has no gradient on average, so there is nothing to learn; at
    another temperature there is."""
    policy = TablePolicy.random(1, 2, 3, generator)
    rows = torch.tensor([(0, a, b) for a in range(3) for b in range(3)])
    mask = torch.stack((torch.ones(9, dtype=torch.bool), rows[:, 1] != 0), dim=1)
    keep = mask[:, 1] | (rows[:, 2] == 0)
    rows, mask = rows[keep], mask[keep]
    every = replace(
        policy.samples(rows, mask, torch.zeros(len(rows), dtype=torch.bool)),
        rewards=torch.zeros(len(rows)),
    )
    for hot, learns in ((1.0, False), (1.6, True)):
        drawn = replace(policy, temperature=hot).score(every).logprobs.sum(dim=1).exp()
        assert drawn.sum().item() == pytest.approx(1.0)
        logits = policy.logits.clone().requires_grad_()
        objective = SSD(least_tokens=1)
        assert objective.loss_temperature(hot) == 1.0
        total = sum(
            p * objective.loss(part, policy.at(logits).score(part), Totals(1.0, 1.0, 2))[0]
            for p, i in zip(drawn, range(len(rows)), strict=True)
            for part in [
                objective.prepare(
                    every.select(slice(i, i + 1)), policy.score(every.select(slice(i, i + 1)))
                )
            ]
        )
        total.backward()
        assert (logits.grad.abs().max().item() > 1e-2) == learns
        if not learns:
            assert logits.grad.abs().max().item() < 1e-15


def test_ssd_takes_everything_but_stubs(policy: TablePolicy, samples: Samples) -> None:
    """Rewards do not matter; a completion of its end alone is left out."""
    ready = prepared(SSD(), policy, replace(samples, rewards=torch.zeros(24)))
    assert torch.equal(ready.mask.any(dim=1), samples.lengths > 1)
    assert int((samples.lengths == 1).sum()) > 0
    with pytest.raises(ValueError, match="loss_at must be above 0, got 0"):
        SSD(loss_at=0.0)


def test_rejection_sampling_is_likelihood_of_the_right_ones(
    policy: TablePolicy, samples: Samples
) -> None:
    """Mean of -log policy over the accepted tokens; the wrong ones have no gradient, and a batch
    without right ones has loss 0."""
    objective = RejectionSampling()
    ready = prepared(objective, policy, samples)
    right = samples.select(samples.rewards == 1)
    wanted = -policy.score(right).logprobs.sum() / right.mask.sum()
    assert gradient(objective, policy, ready)[0] == pytest.approx(wanted.item(), rel=1e-12)
    assert objective.describe(ready)["accepted_share"] == samples.rewards.mean().item()
    gated = prepared(RejectionSampling(entropy_gate=1.0), policy, samples)
    entropy = policy.score(samples).entropy
    assert torch.equal(gated.mask, ready.mask & (entropy > 1.0))
    assert 0 < gated.mask.sum() < ready.mask.sum()
    hopeless = prepared(objective, policy, replace(samples, rewards=torch.zeros(24)))
    loss, grad, _ = gradient(objective, policy, hopeless)
    assert loss == 0.0
    assert (grad == 0).all()


def test_totals_of_nothing() -> None:
    """No tokens at all is a loss of 0, not NaN."""
    empty = torch.zeros(2, 3, dtype=torch.bool)
    for rule in ("grpo", "bnpo", "dapo", "dr_grpo"):
        assert aggregate(torch.ones(2, 3), empty, Totals(0, 2, 3), rule).item() == 0.0
