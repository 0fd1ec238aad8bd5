"""after_step: codes made right after the optimiser step, none in forwards, and the same training
bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import nvfp4
from nvfp4.layer.call import LayerCall
from nvfp4.layer.linear import layers
from nvfp4.layer.weight_cache import Mode
from nvfp4.model.weights import states

RECIPES = ["nvidia", "quartet2", "search_eden", "rl"]


class Attention(nn.Module):
    """Projections that may share their amax, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(32, 32),
            nn.Linear(32, 16),
            nn.Linear(32, 16),
        )
        self.out = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.q_proj(x)[:, :16] * self.k_proj(x).sigmoid() + self.v_proj(x))


def model_of(recipe: str, shared: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nvfp4.convert(nn.Sequential(Attention(), Attention()), recipe, seed=3, verbose=False)
    if shared:
        nvfp4.share_amax(model)
    return model


def optimizer_of(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, parts: int = 2
) -> list[torch.Tensor]:
    """Weights after training on the same data with accumulation over ``parts``."""
    data = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for _ in range(parts):
            model(torch.randn(24, 32, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def quantised_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every weight that is quantised."""
    seen: list[int] = []
    real = LayerCall.weight

    def counted(call, weight, amax):
        seen.append(id(weight))
        return real(call, weight, amax)

    monkeypatch.setattr(LayerCall, "weight", counted)
    return seen


def no_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where telling whether bytes changed would cost a synchronisation."""
    monkeypatch.setattr("nvfp4.layer.weight_cache.fingerprint", lambda x, backend="auto": None)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared amax"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_bit_equal(recipe, shared, gpu, monkeypatch):
    """Fused AdamW, which leaves no trace in version counters, and two micro-batches a step."""
    if gpu:
        no_fingerprints(monkeypatch)
    plain, kept = model_of(recipe, shared), model_of(recipe, shared)
    want = train(plain, optimizer_of(plain))
    optimizer = optimizer_of(kept)
    nvfp4.after_step(optimizer, kept)
    assert all(torch.equal(a, b) for a, b in zip(train(kept, optimizer), want, strict=True))


def test_no_forward_quantises_a_weight(quantised_weights, monkeypatch):
    """Eight layers, three steps of two micro-batches: 8 codes at first and 8 a step; without it, 8
    a forward on a GPU."""
    no_fingerprints(monkeypatch)
    model = model_of("quartet2")
    optimizer = optimizer_of(model)
    with nvfp4.after_step(optimizer, model):
        train(model, optimizer)
        assert len(quantised_weights) == 8 + 3 * 8
    del quantised_weights[:]
    train(model, optimizer)
    assert len(quantised_weights) == 3 * 2 * 8, "remove() puts things back"


def test_codes_are_overwritten_where_they_lie():
    """What a CUDA graph read once is what it reads later; a backward that comes too late hears of
    it."""
    model = model_of("quartet2")
    optimizer = optimizer_of(model)
    nvfp4.after_step(optimizer, model)
    places = [layer.nvfp4.cache.entry.codes[0].codes.data_ptr() for layer in layers(model).values()]
    before = [layer.nvfp4.cache.entry.codes[0].codes.clone() for layer in layers(model).values()]
    train(model, optimizer)
    codes = [layer.nvfp4.cache.entry.codes[0].codes for layer in layers(model).values()]
    assert [c.data_ptr() for c in codes] == places
    assert not any(torch.equal(a, b) for a, b in zip(before, codes, strict=True))
    late = model(torch.randn(4, 32)).sum()
    train(model, optimizer, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize(
    "change", ["in place", "load_state_dict", "other memory", "invalidate", "renew"]
)
def test_changes_between_steps_are_seen(change, monkeypatch):
    """Everything that leaves a trace, and the two ways to say so of what leaves none."""
    no_fingerprints(monkeypatch)
    model = model_of("quartet2")
    kept = nvfp4.after_step(optimizer_of(model), model)
    with torch.no_grad():
        if change == "in place":
            model[0].out.weight.mul_(2)
        elif change == "load_state_dict":
            model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
        elif change == "other memory":
            model[0].out.weight.data = 2 * model[0].out.weight.data
        else:
            model[0].out.weight.data.mul_(2)
            nvfp4.invalidate(model) if change == "invalidate" else kept.renew()
    fresh = nvfp4.convert(
        copy.deepcopy(nvfp4.revert(copy.deepcopy(model))), "quartet2", seed=3, verbose=False
    )
    x = torch.randn(8, 32)
    assert torch.equal(model(x), fresh(x))


def test_only_what_was_stepped_is_quantised(quantised_weights, monkeypatch):
    """Two optimizers, one step: the other's layers and a frozen one keep their codes, and all
    compute alike."""
    no_fingerprints(monkeypatch)
    model = model_of("quartet2")
    model[1].out.weight.requires_grad_(False)
    optimizers = [optimizer_of(block) for block in model]
    for optimizer in optimizers:
        nvfp4.after_step(optimizer, model)
    del quantised_weights[:]
    train(model, optimizers[0], steps=1)
    assert set(quantised_weights) == {id(layer.weight) for layer in layers(model[0]).values()}
    assert len(quantised_weights) == 4


def test_what_is_not_an_optimizer_is_refused():
    """accelerate's wrapper has the class of an optimizer and no hooks of its own."""
    model = model_of("quartet2")
    for wrong in (object(), AcceleratedOptimizer.__new__(AcceleratedOptimizer)):
        with pytest.raises(TypeError, match="must be a torch"):
            nvfp4.after_step(wrong, model)


def test_nothing_is_left_behind():
    """Twice is once, the first to be removed ends nothing of the other's, and the hook goes."""
    model = model_of("quartet2")
    optimizer = optimizer_of(model)
    first = nvfp4.after_step(optimizer, model)
    second = nvfp4.after_step(optimizer, model)
    second.remove()
    assert all(state.cache.mode is Mode.AFTER_STEP for state in states(model).values())
    first.remove()
    assert not any(state.cache.mode is Mode.AFTER_STEP for state in states(model).values())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("scope", ["fixed_weights", "after_step"])
def test_shared_magnitudes_end_with_the_scope(scope):
    """A fused step between two scopes leaves no trace in version counters: magnitudes known in the
    first must not serve in the second."""
    model = model_of("four_over_six", shared=True)
    optimizer, x = optimizer_of(model), torch.randn(24, 32)
    with (
        nvfp4.fixed_weights(model)
        if scope == "fixed_weights"
        else nvfp4.after_step(optimizer, model)
    ):
        model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad(), nvfp4.fixed_weights(model):
        assert torch.equal(model(x), copy.deepcopy(model)(x)), "a copy knows no magnitudes yet"
