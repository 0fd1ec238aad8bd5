"""Sampler and trainer are one function: to the bit, whatever the batch; draws are what temperature
and cuts say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rl_runs import model_of
from torch.nn import functional as F

from nvfp4.model.weights import fixed_weights
from nvfp4.recipes import RECIPES, W4A16
from nvfp4.rl.metrics import codes_changed, weight_codes
from nvfp4.rl.norm_noise import noisy_norms, norm_weights, sigma_at
from nvfp4.rl.report import tensor_scaled
from nvfp4.rl.rollout import Sampling, pick, rollout, uniforms
from nvfp4.rl.samples import Samples, Stops
from nvfp4.rl.score import score
from nvfp4.rl.statistics import mismatch

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
STOPS, SIX = Stops((1,), 0), Sampling(6)


def draw(
    model, prompts=PROMPTS, groups=None, size=8, sampling=SIX, seed=3, rows=None, stops=STOPS
) -> Samples:
    groups = range(len(prompts)) if groups is None else groups
    with torch.no_grad(), fixed_weights(model):
        return rollout(model, prompts, list(groups), size, sampling, stops, seed, rows)


@pytest.mark.parametrize(
    "recipe", [RECIPES["bf16"], RECIPES["rl"], W4A16], ids=lambda recipe: recipe.name
)
def test_a_cached_rollout_is_the_trainer_to_the_bit(recipe):
    """Log-probabilities noted while sampling over a KV cache, against one differentiable forward of
    the whole text."""
    model = model_of(recipe)
    samples = draw(model)
    trained = score(model, samples, 1.0)
    assert trained.logprobs.requires_grad
    assert torch.equal(trained.logprobs, samples.sampler_logprobs)
    assert mismatch(trained.logprobs, samples.sampler_logprobs, samples.mask) == {
        "token_mult_prob_error": 1.0,
        "gen_kl_error": 0.0,
        "max": 0.0,
        "quantile_999": 0.0,
        "share": 0.0,
        "exact": 1.0,
    }


def test_float32_attention_is_what_would_spoil_it():
    """The test above can fail: PyTorch's own kernels add in another order over a cache."""
    model = model_of("rl", attention="sdpa")
    samples = draw(model, size=16)
    assert not torch.equal(score(model, samples, 1.0).logprobs, samples.sampler_logprobs)


def test_one_scale_for_all_rows_is_what_would_ruin_it():
    """With a per-tensor amax a token's logits depend on its batch; the loss in likelihood is not
    small."""
    model = model_of(tensor_scaled(RECIPES["rl"]))
    samples = draw(model, size=16)
    found = mismatch(score(model, samples, 1.0).logprobs, samples.sampler_logprobs, samples.mask)
    assert found["token_mult_prob_error"] > 1.1
    assert found["share"] > 0.3


def test_scores_are_those_of_transformers_one_text_at_a_time():
    """Padding, positions and temperature, against a plain forward of each text alone; float32 sums
    differ a little."""
    model = model_of("bf16", attention="sdpa")
    samples = draw(model, sampling=Sampling(6, temperature=1.3))
    scores = score(model, samples, 1.3)
    for i in range(0, len(samples), 7):
        ids = samples.ids[i][samples.attention[i]][None]
        with torch.no_grad():
            every = F.log_softmax(model(input_ids=ids).logits[0] / 1.3, dim=-1)
        count = int(samples.lengths[i])
        expected = every[-count - 1 : -1].gather(1, ids[0, -count:, None])[:, 0]
        assert torch.allclose(scores.logprobs[i, :count], expected, atol=2e-5)
        entropy = -(every.exp() * every).sum(dim=-1)[-count - 1 : -1]
        assert torch.allclose(scores.entropy[i, :count], entropy, atol=2e-5)
        assert not scores.logprobs[i, count:].any()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_completion_does_not_depend_on_its_batch(rows):
    """The same tokens, whatever else is drawn with it, in whatever order and however many at a
    time.

    Log-probabilities to a few last bits: the output embedding's float32 product adds otherwise for
    a few rows. An FP4 code that moves would cost a thousand times as much.
    """
    model = model_of("rl")
    whole = draw(model)
    order = [3, 0, 4, 1, 2]
    other = draw(model, [PROMPTS[p] for p in order], order, rows=rows)
    assert whole.ids.shape == other.ids.shape
    for place, prompt in enumerate(order):
        mine, theirs = (
            samples.select(slice(8 * i, 8 * i + 8))
            for samples, i in ((other, place), (whole, prompt))
        )
        for name in ("ids", "attention", "mask", "truncated"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert torch.allclose(mine.sampler_logprobs, theirs.sampler_logprobs, rtol=0, atol=2e-6)


def test_seed_and_group_decide_the_draws():
    model = model_of("rl")
    first = draw(model)
    assert torch.equal(first.ids, draw(model).ids)
    assert not torch.equal(first.ids, draw(model, seed=4).ids)
    assert not torch.equal(
        first.ids[:8], draw(model, [PROMPTS[0]], [9]).ids[:8, -first.ids.shape[1] :]
    )
    distinct = {tuple(row.tolist()) for row in first.ids[:8]}
    assert len(distinct) > 4, "the completions of a group have random numbers of their own"


def test_completions_end_where_they_should():
    """A flat model: ends anywhere. The mask holds the end-of-text token, nothing stands behind it,
    cut ones say so."""
    model = model_of("bf16")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    stops = Stops((1, 5, 6, 7), 0)
    samples = draw(model, size=32, stops=stops)
    ends = torch.isin(samples.ids[:, samples.prompt_length :], torch.tensor(stops.ids))
    lengths = samples.lengths
    assert 0 < samples.truncated.sum() < len(samples)
    for i, length in enumerate(lengths.tolist()):
        assert not ends[i, : length - 1].any()
        assert bool(ends[i, length - 1]) != bool(samples.truncated[i])
        assert length == 6 or not samples.truncated[i]
        assert not samples.ids[i, samples.prompt_length + length :].any()
        assert samples.attention[i].sum() == len(PROMPTS[samples.groups[i]]) + length
        assert not samples.sampler_logprobs[i, length:].any()
    inside = samples.sampler_logprobs[samples.mask]
    assert torch.allclose(inside, torch.full_like(inside, -math.log(32)))
    everything = draw(model, stops=Stops(tuple(range(32)), 0))
    assert everything.mask.shape == (40, 1)


def test_uniforms():
    """Strictly inside (0, 1), even, and different for each sample and place."""
    u = torch.stack([uniforms(7, torch.arange(2000), place) for place in range(4)])
    assert 0 < u.min() < 2e-3
    assert 1 - 2e-3 < u.max() < 1
    assert len(u.flatten().unique()) == 8000
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 8000)


def test_pick_follows_the_distribution():
    """A comb of uniforms meets each token as often as its probability says, up to one tooth at each
    end."""
    logprobs = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0, -4.0]), 0)
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    for sampling, kept in (
        (Sampling(1), [0, 1, 2, 3, 4]),
        (Sampling(1, top_k=2), [0, 2]),
        (Sampling(1, top_k=9), [0, 1, 2, 3, 4]),
        (Sampling(1, top_p=0.5), [2]),
        (Sampling(1, top_p=0.9), [0, 2, 3]),
        (Sampling(1, top_k=2, top_p=0.9), [0, 2]),
        (Sampling(1, temperature=0), [2]),
    ):
        tokens = pick(logprobs.expand(10000, 5), sampling, u)
        p = torch.zeros(5).double()
        p[kept] = logprobs.double().exp()[kept]
        counts = torch.bincount(tokens, minlength=5)
        assert (counts - 10000 * p / p.sum()).abs().max() <= 1, sampling


def test_pick_never_yields_what_cannot_be():
    logprobs = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (2.0**-54, 0.5, 1 - 2.0**-53):
        assert pick(logprobs, Sampling(1), torch.tensor([u], dtype=torch.float64)).item() == 1


def test_mismatch_by_hand():
    trainer, sampler = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
    found = mismatch(trainer, sampler, torch.tensor([[True, True, False]]))
    assert found["token_mult_prob_error"] == pytest.approx((math.exp(0.5) + 1) / 2)
    assert found["gen_kl_error"] == pytest.approx((math.exp(0.5) - 0.5 - 1) / 2)
    assert (found["max"], found["share"], found["exact"]) == (0.5, 0.5, 0.5)


def test_share_of_codes_that_change():
    """One weight moved from its block's maximum to 0: one code of all, and none if nothing
    moves."""
    model = model_of("rl")
    before = weight_codes(model)
    assert codes_changed(before, weight_codes(model)) == 0
    weight = model.model.layers[0].mlp.down_proj.weight
    total = sum(2 * q.codes.numel() for q in before.values())
    with torch.no_grad():
        smallest = int(weight[0, :16].abs().argmax())
        others = [i for i in range(16) if i != smallest]
        weight[0, others[3]] = -weight[0, others[3]]
        flipped = weight[0, others[3]]
    changed = codes_changed(before, weight_codes(model))
    assert changed == pytest.approx(1 / total), float(flipped)
    assert codes_changed({}, {}) is None


def test_the_noise_schedule():
    """QeRL's: nothing in the first of ten stages, then from start to end, each stage by the same
    factor."""
    sigmas = [sigma_at(step, 200, 10, 1e-2, 1e-4) for step in range(200)]
    assert sigmas[:20] == [0.0] * 20
    stages = [sigmas[20 * stage] for stage in range(1, 10)]
    assert stages[0] == 1e-2
    assert stages[-1] == pytest.approx(1e-4)
    ratios = [b / a for a, b in itertools.pairwise(stages)]
    assert ratios == pytest.approx([1e-2 ** (1 / 8)] * 8)
    assert all(len(set(sigmas[20 * i : 20 * i + 20])) == 1 for i in range(10))
    assert sigma_at(5, 10, 0, 1.0, 1.0) == 0.0


def test_noise_is_the_samplers_alone():
    """Within the context all norms move and completions with them; after it every bit is back, also
    after an error."""
    model = model_of("rl")
    gains = norm_weights(model)
    assert len(gains) == 5  # two of each layer, one at the end
    before, clean = [gain.detach().clone() for gain in gains], draw(model)
    with noisy_norms(model, 0.5, seed=1):
        inside = [gain.detach().clone() for gain in gains]
        noisy = draw(model)
    with noisy_norms(model, 0.5, seed=1):
        assert all(map(torch.equal, gains, inside)), "the noise is a function of the seed"
    assert not any(map(torch.equal, before, inside))
    assert not torch.equal(noisy.ids, clean.ids)
    with pytest.raises(KeyError), noisy_norms(model, 0.5, seed=2):
        raise KeyError
    assert all(map(torch.equal, before, gains))
    versions = [gain._version for gain in gains]
    with noisy_norms(model, 0.0, seed=1):
        pass
    assert [gain._version for gain in gains] == versions, "sigma 0 touches nothing"
