"""ReasonMaxxer: reinforcement learning only where the base model hesitates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from nvfp4.rl.objectives.advantages import has_spread, on_tokens, population_advantages
from nvfp4.rl.objectives.aggregation import token_mean
from nvfp4.rl.objectives.base import Metrics, Objective
from nvfp4.rl.objectives.divergence import exact_kl, kl_estimate
from nvfp4.rl.samples import Samples, Scores, Totals

BASE_ENTROPY, BASE_LOGPROBS, DECISION, SCALE = "base_entropy", "base_logprobs", "decision", "token_scale"


def near_even_groups(rewards: torch.Tensor, groups: torch.Tensor, most: int) -> torch.Tensor:
    """bool [S]: samples of the ``most`` groups with spread whose mean reward is nearest 1/2, earlier groups first."""
    spread = has_spread(rewards, groups)
    distance = {}
    for group in dict.fromkeys(groups[spread].tolist()):
        distance[group] = abs(rewards[groups == group].mean().item() - 0.5)
    chosen = sorted(distance, key=lambda group: distance[group])[:most]
    return torch.isin(groups, torch.tensor(chosen, dtype=groups.dtype, device=groups.device))


def shortest(lengths: torch.Tensor, groups: torch.Tensor, share: float) -> torch.Tensor:
    """bool [S]: the shortest ``share`` of each group, to the nearest count but at least one, earlier ones first."""
    order = torch.argsort(lengths, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    for group in torch.unique(groups).tolist():
        members = order[groups[order] == group]
        kept[members[: max(1, round(share * len(members)))]] = True
    return kept


@dataclass(kw_only=True)
class ReasonMaxxer(Objective):
    """Entropy-gated policy gradient on samples of the base model (arXiv 2605.06241; details from the authors' code).

    Decision tokens are those at which the base model's entropy exceeds ``entropy_gate``. The loss is the mean over them
    of -A log policy, A = (r - mean) / population standard deviation of the group, clipped to +-2.5, plus ``kl_coef``
    times the mean over all other tokens of KL(base || policy). Only the groups with pass rates nearest 1/2 and the
    shortest completions are used. Measured here on small tasks: signed advantages diverge easily; ``self_distillation``
    with an entropy gate does not. The paper's order of samples (a curriculum) is left to the loop.
    """

    name: ClassVar[str] = "reasonmaxxer"
    default_group: ClassVar[int | None] = 20

    entropy_gate: float = 1.4
    """Entropy of the base model, in nats, above which a token is a decision; the paper's for a 1.5B model."""
    kl_coef: float = 0.2
    """Weight of the KL to the base model on all other tokens."""
    kl: Literal["exact", "k3"] = "exact"
    """Over the whole vocabulary, keeping the base model's log-probabilities [S, T, V]; or estimated, keeping [S, T]."""
    advantage_clip: float = 2.5
    """Bound on the magnitude of an advantage."""
    problems: int = 50
    """Groups of a rollout that are used, those with both signs and pass rates nearest 1/2."""
    shortest_share: float = 0.8
    """Share of each group that is used, the shortest completions."""

    @property
    def needs_reference(self) -> bool:
        """The base model: the policy of the first rollout."""
        return True

    @property
    def needs_logits(self) -> bool:
        """For the exact KL."""
        return self.kl == "exact"

    def remember(
        self, samples: Samples, scores: Scores, source: Literal["old", "reference"]
    ) -> dict[str, torch.Tensor]:
        """The base model's entropy, and for the exact KL its log-probabilities."""
        if source == "old":
            return {}
        if self.kl != "exact":
            return {BASE_ENTROPY: scores.entropy}
        if scores.logits is None:
            raise ValueError("reasonmaxxer with the exact KL needs the logits of the base model")
        return {BASE_ENTROPY: scores.entropy, BASE_LOGPROBS: scores.logits.detach().log_softmax(dim=-1)}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """With decisions and advantages. What was not remembered of the base is taken from ``old``: in the first
        rollout they are the same model."""
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())
        if BASE_ENTROPY not in samples.extra:
            samples = replace(samples, extra={**samples.extra, **self.remember(samples, old, "reference")})
        rewards, groups = samples.rewards, samples.groups
        used = near_even_groups(rewards, groups, self.problems) & shortest(samples.lengths, groups, self.shortest_share)
        bound = self.advantage_clip
        advantages = population_advantages(rewards, groups).clamp(-bound, bound)
        samples = samples.within(used[:, None])
        decision = samples.mask & (samples.extra[BASE_ENTROPY] > self.entropy_gate)
        other = samples.mask & ~decision
        # Two means over different tokens, with one count of tokens in Totals: scale each by all / its own.
        counts = self.all_sum(torch.stack((decision.sum(), other.sum())).double())
        scale = counts.sum() / counts.clamp(min=1)
        scales = torch.where(decision, scale[0], torch.where(other, scale[1], 0.0)).float()
        extra = {**samples.extra, DECISION: decision, SCALE: scales}
        return replace(samples, advantages=on_tokens(advantages, samples.mask), extra=extra)

    def describe(self, samples: Samples) -> dict[str, float]:
        """Share of the tokens that are decisions."""
        tokens = samples.mask.sum().clamp(min=1)
        return {"decision_share": (samples.extra[DECISION].sum() / tokens).item()}

    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the two means."""
        assert samples.advantages is not None, "prepare puts them there"
        decision, scale = samples.extra[DECISION], samples.extra[SCALE]
        policy = token_mean(-samples.advantages * scores.logprobs * scale, decision, totals)
        kl = token_mean(self._kl(samples, scores) * scale, samples.mask & ~decision, totals)
        metrics = {"policy_loss": policy.detach(), "kl": kl.detach()}
        metrics["entropy"] = token_mean(scores.entropy, samples.mask, totals)
        return policy + self.kl_coef * kl, metrics

    def _kl(self, samples: Samples, scores: Scores) -> torch.Tensor:
        """KL(base || policy) [S, T]."""
        if self.kl == "exact":
            if scores.logits is None:
                raise ValueError("reasonmaxxer with the exact KL needs Scores.logits")
            return exact_kl(samples.extra[BASE_LOGPROBS], scores.logits)
        base = samples.ref_logprobs if samples.ref_logprobs is not None else samples.old_logprobs
        assert base is not None, "prepare puts them there"
        return kl_estimate(base, torch.where(samples.mask, scores.logprobs, 0.0), "k3")
