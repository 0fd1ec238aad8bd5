"""Completions drawn by the model that is trained, each with random numbers of its own.

    prompts [ids]  --sorted by length, ``rows`` completions at a time-->  batches
    batch: read each prompt once -> KV cache -> repeat its row for each completion of it
    for place 0, 1, ... T - 1:
        logits [R, V] -> log_probabilities -> pick(uniform of (seed, sample, place)) -> token [R]
        note token and log-probability; rows that drew an end-of-text token are finished
        when fewer than 3/4 of the rows are unfinished: take the finished ones out of the cache

A completion is a function of (weights, prompt, seed, group, place in the group): neither the size
of the batch nor the company in it enters. With float64 attention (score.py) that holds to the bit
up to the output embedding, whose float32 product adds in another order for a few rows than for
many; elsewhere last bits move FP4 codes, and a draw now and then.

Tried: at least two rows in every batch; the float32 output embedding depended on the batch all the
same. Measured on the CPU: sampled and trained log-probabilities were equal to the bit in all 560
steps (7 runs of 80) of the comparison in ``benchmarks/results/rl.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from nvfp4.numerics.rng import ELEMENT_STREAM, philox
from nvfp4.rl.samples import Samples, Stops, in_float64
from nvfp4.rl.score import log_probabilities, positions
from nvfp4.run.errors import TrainError

_PLACE_BITS = 24  # of a counter, for the place of a token; the others are the number of the sample
_SPARSE = 0.75  # with fewer unfinished rows the others leave: a copy of the cache, then less work


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    max_new_tokens: the longest completion, with its end-of-text token. temperature: 0 for the most
    likely token each time. top_k: 0 for all. top_p: the fewest tokens that together have this
    probability.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def scale(self) -> float:
        """The temperature of log-probabilities; those of greedy completions are at 1."""
        return self.temperature or 1.0


def rollout(
    model: Any,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[int],
    size: int,
    sampling: Sampling,
    stops: Stops,
    seed: int,
    rows: int | None = None,
) -> Samples:
    """``size`` completions of each prompt, in the order of prompts.

    model: a causal LM of transformers in eval mode. prompts: token ids, each at least one. groups:
    the number of each prompt, which with ``seed`` in [0, 2^64) decides its random numbers. rows:
    completions drawn at a time; None: all. Log-probabilities are those before any top-k or top-p
    cut. ``TrainError`` if a prompt and its completion are longer than the model's context.
    """
    width, length = max(map(len, prompts)), sampling.max_new_tokens
    check_fits(model, width + length)
    device = model.device

    # A sample's number decides its random numbers, whichever batch it lands in.
    prompt_of = [prompt for prompt in range(len(prompts)) for _ in range(size)]
    numbers = torch.tensor([group * size + i for group in groups for i in range(size)])
    count = len(prompt_of)

    # what the samples will hold, still empty
    ids = torch.full((count, width + length), stops.pad, device=device)
    logprobs = torch.zeros(count, length, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    truncated = torch.zeros(count, dtype=torch.bool, device=device)

    # prompts of like length together: little padding within a batch, none where there are enough
    order = sorted(range(count), key=lambda i: len(prompts[prompt_of[i]]))
    step = rows or count
    for start in range(0, count, step):
        members = order[start : start + step]
        distinct = sorted({prompt_of[i] for i in members})
        batch = _Batch(model, [prompts[p] for p in distinct], stops, sampling)
        batch.draw([distinct.index(prompt_of[i]) for i in members], numbers[members], seed)

        where = torch.tensor(members, device=device)
        ids[where, width:] = batch.tokens
        logprobs[where] = batch.logprobs
        lengths[where] = batch.lengths
        truncated[where] = batch.unfinished

    # prompts in front, each against the right edge of its part
    attention = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompt_of):
        tokens = torch.tensor(prompts[prompt], device=device)
        ids[row, width - len(tokens) : width] = tokens
        attention[row, width - len(tokens) : width] = True
    mask = torch.arange(length, device=device) < lengths[:, None]
    attention[:, width:] = mask

    # no wider than the longest completion that came
    longest = max(1, int(lengths.max()))
    return Samples(
        ids=ids[:, : width + longest],
        attention=attention[:, : width + longest],
        mask=mask[:, :longest],
        groups=torch.tensor(groups, device=device).repeat_interleave(size),
        rewards=torch.full((count,), float("nan"), device=device),
        truncated=truncated,
        sampler_logprobs=logprobs[:, :longest],
        max_new_tokens=length,
    )


def check_fits(model: Any, tokens: int) -> None:
    """``TrainError`` if a sequence of so many tokens is longer than the model's context."""
    text_config = model.config.get_text_config()
    check_context(getattr(text_config, "max_position_embeddings", None), tokens)


def check_context(context: int | None, tokens: int) -> None:
    """``TrainError`` if so many tokens are more than the context of a model; None: any fits."""
    if context is not None and tokens > context:
        raise TrainError(
            f"context: a prompt and its completion may have {tokens} tokens, the model takes at "
            f"most {context}; lower --max-new-tokens or the length stages, leave out long "
            f"problems, or give a new model a larger --context"
        )


def uniforms(seed: int, numbers: torch.Tensor, place: int) -> torch.Tensor:
    """float64 in (0, 1), one for each sample number (int64, below 2^39): its draw for ``place``.

    On the device of the numbers, or on the CPU where that device has no float64.
    """
    counters = (numbers << _PLACE_BITS) + place
    high, low, _, _ = philox(seed, counters, ELEMENT_STREAM)
    bits = (high >> 5) << 26 | low >> 6  # 27 and 26 bits; with the half below, never an end
    return (in_float64(bits) + 0.5) * 2.0**-53


def pick(logprobs: torch.Tensor, sampling: Sampling, u: torch.Tensor) -> torch.Tensor:
    """The token of each row of ``logprobs`` [R, V] that the uniform ``u`` [R] points at; int64 [R].

    The inverse of the distribution function over tokens in the order of their ids, in float64.
    Top-k keeps all tokens as likely as the k-th; top-p counts within what top-k left.
    """
    if sampling.temperature == 0:
        return logprobs.argmax(dim=-1)
    p = logprobs.to(u.device).double().exp()

    if 0 < sampling.top_k < p.shape[-1]:
        least = p.topk(sampling.top_k, dim=-1).values[:, -1:]
        p = torch.where(p < least, 0.0, p)

    # a token stays if those before it, the likeliest first, have not yet reached top_p
    if sampling.top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        before = (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True)
        kept = torch.where(before < sampling.top_p, ordered, 0.0)
        p = torch.zeros_like(p).scatter(-1, index, kept)

    # how many tokens lie wholly below u times the mass that is left
    total = p.cumsum(dim=-1)  # [R, V]
    token = (total <= u[:, None] * total[:, -1:]).sum(dim=-1)
    return token.clamp(max=p.shape[-1] - 1).to(logprobs.device)


class _Batch:
    """Completions drawn together over one cache; prompts on the left, padded on their left."""

    def __init__(
        self,
        model: Any,
        prompts: list[Sequence[int]],
        stops: Stops,
        sampling: Sampling,
    ) -> None:
        self.model, self.stops, self.sampling = model, stops, sampling
        width = max(map(len, prompts))
        rows = [[stops.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.tensor(rows, device=model.device)
        counts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.attention = torch.arange(width, device=model.device) >= width - counts[:, None]
        self.padded = len(set(map(len, prompts))) > 1

    def draw(self, which: list[int], numbers: torch.Tensor, seed: int) -> None:
        """Draw a completion of prompt ``which[i]`` with the random numbers of ``numbers[i]``.

        Leaves tokens, logprobs [S, T], lengths [S] and unfinished [S]. Each prompt is read once for
        all of its completions.
        """
        count, length, device = len(which), self.sampling.max_new_tokens, self.model.device
        self.tokens = torch.full((count, length), self.stops.pad, device=device)
        self.logprobs = torch.zeros(count, length, device=device)
        self.lengths = torch.full((count,), length, device=device)
        self.unfinished = torch.ones(count, dtype=torch.bool, device=device)
        stops = torch.tensor(self.stops.ids, device=device)
        numbers = numbers.to(device)

        # each prompt once, then its row of the cache for each of its completions
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(self.ids, positions(self.attention))
        here = torch.arange(count, device=device)  # the samples still in the batch
        logits = logits[self._take(torch.tensor(which, device=device))]

        for place in range(length):
            every = log_probabilities(logits, self.sampling.scale)  # [R, V]
            token = pick(every, self.sampling, uniforms(seed, numbers[here], place))

            # finished rows may still be in the batch; what they draw is not noted
            active = self.unfinished[here]
            rows = here[active]
            self.tokens[rows, place] = token[active]
            self.logprobs[rows, place] = every.gather(-1, token[:, None])[active, 0]

            ended = here[active & torch.isin(token, stops)]
            self.unfinished[ended] = False
            self.lengths[ended] = place + 1
            active = self.unfinished[here]
            left = int(active.sum())
            if left == 0 or place + 1 == length:
                break

            # Leaving costs a copy of the cache, and spares every later place the finished rows.
            if left <= _SPARSE * len(here):
                kept = active.nonzero()[:, 0]
                self._take(kept)
                here, token = here[kept], token[kept]

            # Places count tokens and not the padding on the left, as in ``score``.
            ones = self.attention.new_ones(len(here), 1)
            self.attention = torch.cat([self.attention, ones], dim=1)
            where = self.attention.sum(dim=1, keepdim=True) - 1
            logits = self._forward(token[:, None], where)

    def _take(self, rows: torch.Tensor) -> torch.Tensor:
        """Let these rows, of which one may come often, be the batch from now on; returns them."""
        self.cache.batch_select_indices(rows)
        self.attention = self.attention[rows]
        return rows

    def _forward(self, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, [R, V]."""
        out = self.model(
            input_ids=ids,
            attention_mask=self.attention if self.padded else None,
            position_ids=where if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]
