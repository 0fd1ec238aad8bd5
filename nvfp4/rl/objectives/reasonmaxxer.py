"""ReasonMaxxer: reinforcement learning only where the base model hesitates.

Three decisions come before the loss, each over the whole batch of all processes:

    which problems       those that are solved about half of the time                 chosen_groups
    which completions    the shortest of them                                         shortest
    which tokens         those at which the base model's entropy is above a gate      DECISION

Decision tokens get a policy gradient; everything else, the prompt included, is held where the base
model has it by KL(base || policy).

    remember   the base model's entropy [S, T], in the scoring by the reference
    prepare    the three decisions and A, over whole groups
    loss       per completion: mean over decisions of -A log policy + kl_coef mean KL of the others
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from nvfp4.rl.objectives.advantages import on_tokens, place_in_group, population_advantages
from nvfp4.rl.objectives.base import (
    REFERENCE_LOGITS,
    REFERENCE_PROMPT_LOGITS,
    Defaults,
    Metrics,
    Objective,
    ScoredBy,
    StepPlan,
)
from nvfp4.rl.objectives.divergence import exact_kl, kl_estimate
from nvfp4.rl.objectives.token_loss import token_mean
from nvfp4.rl.samples import Samples, Scores, Totals, in_float64

BASE_ENTROPY, DECISION, USED, WEIGHT = "base_entropy", "decision", "used", "weight"
"""Keys of ``Samples.extra``: [S, T] of the base model's entropy and of decision tokens; [S] of
samples that are used, and of what makes up for the others in a mean over all samples."""

_PLACE_BITS = 20  # of the number of a sample, for its place in the group; the others are the group


def chosen_groups(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    lengths: torch.Tensor,
    cut: torch.Tensor,
    most: int,
) -> set[int]:
    """The ``most`` groups with right and wrong completions whose mean reward is nearest 1/2.

    Among equals those with fewer that were cut by the length limit, then shorter ones, then those
    of lower number. All [S]; returns the numbers of groups.
    """
    rewards, lengths = in_float64(rewards), in_float64(lengths)
    groups, cut = groups.to(rewards.device), cut.to(rewards.device)
    ranks = []
    for group in torch.unique(groups).tolist():
        members = groups == group
        of_group = rewards[members]
        if bool((of_group != of_group[0]).any()):
            distance = abs(float(of_group.mean()) - 0.5)
            length = float(lengths[members].mean())
            ranks.append((distance, int(cut[members].sum()), length, group))
    return {rank[-1] for rank in sorted(ranks)[:most]}


def shortest(
    lengths: torch.Tensor,
    cut: torch.Tensor,
    numbers: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """bool [S]: the shortest ``share`` of all samples, to the nearest count.

    Among equals those that were not cut, then those of lower number. All [S].
    """
    places = range(len(lengths))
    rows = zip(lengths.tolist(), cut.tolist(), numbers.tolist(), places, strict=True)
    ranked = [row[-1] for row in sorted(rows)]
    kept = torch.zeros_like(cut)
    kept[ranked[: round(share * len(ranked))]] = True
    return kept


@dataclass(kw_only=True)
class ReasonMaxxer(Objective):
    """Entropy-gated policy gradient (arXiv 2605.06241; details from the authors' code).

        A    = (r - mean) / population std of those left of a group, clipped to +-2.5
        loss = mean over completions of [mean over its decision tokens of -A log policy]
               + kl_coef [mean over its other tokens, the prompt's included, of KL(base || policy)]

    Used are the problems with pass rates nearest 1/2 (50 of 300), and of all their completions
    together the shortest 80 %. All at temperature 1, while sampling is at 0.6 with top-p 0.95.

    Theirs is offline: one set of samples, 8 completions to an update, at most 149 updates with LoRA
    at a learning rate of 1e-4, ordered by |A| times the share of decisions. Here a step draws anew,
    its updates keep the order of the prompts, and all weights learn. Ours, too: that a reward which
    is not 0 or 1 is a pass rate. Measured on small tasks: signed advantages diverge easily;
    ``rejection_sampling`` with an entropy gate does not.
    """

    name: ClassVar[str] = "reasonmaxxer"
    defaults: ClassVar[Defaults] = Defaults(group=20, updates=4, temperature=0.6, top_p=0.95)
    renamed: ClassVar[Mapping[str, str]] = {"problems": "problem_share=0.17 (50 of 300)"}

    entropy_gate: float = 1.4
    """Entropy of the base model at temperature 1, in nats, above which a token is a decision; the
    paper's for a 1.5B model."""
    kl_coef: float = 0.2
    """Weight of the KL to the base model on all other tokens."""
    kl: Literal["exact", "k3"] = "exact"
    """Over the whole vocabulary and with the prompt, which takes a forward of the base model in
    every micro-batch; or estimated from the drawn tokens of the completion."""
    advantage_clip: float = 2.5
    """Bound on the magnitude of an advantage."""
    problem_share: float = 1 / 6
    """Share of the groups of a step that is used, those with both signs and pass rates nearest 1/2;
    at least one."""
    shortest_share: float = 0.8
    """Share of their completions that is used, the shortest of all."""

    @property
    def needs_reference(self) -> bool:
        """The base model: the policy of the first rollout."""
        return True

    @property
    def needs_logits(self) -> bool:
        """True for the exact KL, which sums over the vocabulary."""
        return self.needs_reference_logits

    @property
    def needs_reference_logits(self) -> bool:
        """True for the exact KL, which sums over the vocabulary."""
        return self.kl == "exact" and self.kl_coef != 0

    @property
    def needs_prompt_logits(self) -> bool:
        """The exact KL holds the prompt, too."""
        return self.needs_reference_logits

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """The kind of a KL without weight."""
        return {} if self.kl_coef else {"kl": "kl_coef is 0"}

    def loss_temperature(self, sampling: float) -> float:
        """1: entropies, likelihoods and the KL are those of the model as it is."""
        return 1.0

    def remember(
        self,
        samples: Samples,
        scores: Scores,
        source: ScoredBy,
    ) -> dict[str, torch.Tensor]:
        """The base model's entropy."""
        return {BASE_ENTROPY: scores.entropy} if source == "reference" else {}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Add decisions and advantages.

        What was not remembered of the base is taken from ``old``: in the first rollout they are the
        same model.
        """
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())
        if BASE_ENTROPY not in samples.extra:
            extra = self.remember(samples, old, "reference")
            samples = replace(samples, extra={**samples.extra, **extra})

        # which completions, and their advantages among those left of their group
        used, weight = self._used(samples)
        advantages = torch.zeros_like(samples.rewards)
        if bool(used.any()):
            rewards, groups = samples.rewards[used], samples.groups[used]
            advantages[used] = population_advantages(rewards, groups)
        samples = samples.within(used[:, None])

        # which tokens: a decision without an advantage would be held by nothing
        hesitates = samples.extra[BASE_ENTROPY] > self.entropy_gate
        decision = samples.mask & hesitates & (advantages != 0)[:, None]
        weights = torch.where(used, weight, 0.0).float()
        extra = {**samples.extra, DECISION: decision, USED: used, WEIGHT: weights}
        bounded = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return replace(samples, advantages=on_tokens(bounded, samples.mask), extra=extra)

    def _used(self, samples: Samples) -> tuple[torch.Tensor, float]:
        """Which samples are used, bool [S], and what makes up for the others in a mean over all.

        Decided over all processes by the numbers of the samples, so that no process is another's
        part of a batch.
        """
        numbers = (samples.groups << _PLACE_BITS) + place_in_group(samples.groups)
        columns = (numbers, samples.lengths, samples.truncated.long())
        table = self.gather(torch.stack(columns, dim=1))
        rewards = self.gather(samples.rewards)
        every, lengths, cut = table[:, 0], table[:, 1], table[:, 2].bool()

        # A group's number is the high bits of its samples' numbers, on every process.
        groups = every >> _PLACE_BITS
        most = max(1, round(self.problem_share * len(torch.unique(groups))))
        group_numbers = sorted(chosen_groups(rewards, groups, lengths, cut, most))
        used_groups = torch.tensor(group_numbers, dtype=groups.dtype, device=groups.device)
        among = torch.isin(groups, used_groups)

        # The shortest of all together, not of each group: problems with long answers lose more.
        every, lengths, cut = every[among], lengths[among], cut[among]
        kept = every[shortest(lengths, cut, every, self.shortest_share)]
        return torch.isin(numbers, kept), len(table) / max(1, len(kept))

    def describe(self, samples: Samples) -> dict[str, float]:
        """Shares of the completions that are used, and of their tokens that are decisions."""
        decisions = samples.extra[DECISION].sum() / samples.mask.sum().clamp(min=1)
        used = samples.extra[USED].float().mean()
        return {"used_share": used.item(), "decision_share": decisions.item()}

    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the mean over completions."""
        assert samples.advantages is not None, "prepare puts them there"
        decision = samples.extra[DECISION]

        # Decisions are pushed: A > 0 makes the token likelier, A < 0 less likely.
        weights = samples.extra[WEIGHT] / totals.samples  # [S]
        pushed = torch.where(decision, -samples.advantages * scores.logprobs, 0.0).sum(dim=1)
        policy = (weights * pushed / decision.sum(dim=1).clamp(min=1)).sum()
        metrics = {
            "policy_loss": policy.detach(),
            "entropy": token_mean(scores.entropy, samples.mask, totals),
        }
        if not self.kl_coef:
            return policy, metrics

        # All other tokens are held where the base model has them.
        kl = (weights * self._held(samples, scores)).sum()
        return policy + self.kl_coef * kl, {**metrics, "kl": kl.detach()}

    def _held(self, samples: Samples, scores: Scores) -> torch.Tensor:
        """KL(base || policy) [S], the mean over a completion's tokens that are no decisions."""
        other = samples.mask & ~samples.extra[DECISION]
        if self.kl != "exact":
            base = samples.ref_logprobs
            base = samples.old_logprobs if base is None else base
            assert base is not None, "prepare puts them there"

            # the roles are exchanged: k3 from the drawn tokens, of the base against the policy
            logprobs = torch.where(samples.mask, scores.logprobs, 0.0)
            values = torch.where(other, kl_estimate(base, logprobs, "k3"), 0.0)
            return values.sum(dim=1) / other.sum(dim=1).clamp(min=1)

        # Over the whole vocabulary. Logits of base and policy are of this micro-batch alone: those
        # of a rollout of Qwen3-0.6B (256 x 512 tokens) would be 80 GB.
        known = REFERENCE_LOGITS in samples.extra
        if scores.logits is None or scores.prompt_logits is None or not known:
            needs = "logits of policy and base, the prompt's too"
            raise ValueError(f"reasonmaxxer with the exact KL needs {needs}")
        # The first token of a prompt has no distribution before it, and padding is no token.
        length = samples.prompt_length
        attention = samples.attention
        prompt = attention[:, : length - 1] & attention[:, 1:length] & samples.extra[USED][:, None]
        # [S, T] behind the prompt, [S, P - 1] within it.
        behind = exact_kl(samples.extra[REFERENCE_LOGITS], scores.logits)
        behind = torch.where(other, behind, 0.0)
        before = exact_kl(samples.extra[REFERENCE_PROMPT_LOGITS], scores.prompt_logits)
        before = torch.where(prompt, before, 0.0)
        count = (other.sum(dim=1) + prompt.sum(dim=1)).clamp(min=1)
        return (behind.sum(dim=1) + before.sum(dim=1)) / count
