"""Experts spread over processes, held against one process that has all experts and all tokens.

As ``distributed_worker.py``, whose ``main`` runs these; run by ``test_expert_parallel.py``.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import distributed_worker
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import nvfp4

H, INNER, EXPERTS, CHOICES = 32, 48, 4, 2
RECIPES = ("search_eden", "quartet2", "rl", "tetrajet2", "rtn", "nvidia")
CODES = ("search_eden", "quartet2", "rl", "tetrajet2")
"""Recipes whose backward starts from fprop's codes of x, which therefore travel alone."""


class Block(nn.Module):
    """A router that is given, and experts."""

    def __init__(self, kind: str, experts: int = EXPERTS) -> None:
        super().__init__()
        config: Any
        if kind == "gpt_oss":
            config = GptOssConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=experts)
        else:
            config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INNER, num_experts=experts)
        self.experts = (GptOssExperts if kind == "gpt_oss" else Qwen3MoeExperts)(config)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, chosen, weights)


def block(recipe: str, kind: str = "qwen3_moe", experts: int = EXPERTS) -> Block:
    """Equal in every process."""
    torch.manual_seed(0)
    made = Block(kind, experts)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nvfp4.convert(made, recipe, seed=5, experts=True, verbose=False)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


Given = tuple[torch.Tensor, ...]


def tokens(rank: int, step: int, chosen: tuple[int, ...] = (0, 1, 2, 3)) -> Given:
    """x, choices among ``chosen``, weights, dy of a process: each has another number of tokens."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = 5 + 4 * rank
    orders = [torch.randperm(len(chosen), generator=generator) for _ in range(count)]
    choices = torch.tensor(chosen)[torch.stack(orders)][:, :CHOICES]
    x, weights, dy = (
        torch.randn(count, size, generator=generator) for size in (H, choices.shape[1], H)
    )
    return x, choices, weights, dy


def step_of(model: Block, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dx."""
    x, chosen, weights, dy = given
    x = x.clone().requires_grad_()
    y = model(x, chosen, weights)
    y.backward(dy)
    return y.detach(), x.grad


def alone(model: Block) -> Block:
    """It rounds as the first process, wherever it runs."""
    for state in model.experts.nvfp4.values():
        state.noise.rank = 0
    return model


def compare(one: Block, many: Block, step: int, chosen: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """The same bits: y, dx of this process's tokens, gradients of this process's experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [tokens(r, step, chosen) for r in range(size)]
    one.zero_grad(), many.zero_grad()
    want = step_of(one, tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    got = step_of(many, parts[rank])
    start = sum(len(part[0]) for part in parts[:rank])
    for a, b, what in zip(got, want, ("y", "dx"), strict=True):
        assert torch.equal(a, b[start : start + len(a)]), what
    others = dict(one.named_parameters())
    for name, parameter in many.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.placements == (Shard(0),)
        whole = others[name].grad
        assert whole is not None
        assert torch.equal(parameter.grad.to_local(), whole.chunk(size)[rank]), name


def same_bits() -> None:
    """All recipes, two steps: the noise of the second is another, and again the same."""
    for recipe in RECIPES:
        one, many = alone(block(recipe)), block(recipe)
        assert nvfp4.expert_parallel(many, mesh()) == ["experts"]
        for step in range(2):
            compare(one, many, step)


def same_bits_with_biases() -> None:
    """GPT-OSS: transposed stacks with biases, whose gradients are of this process's experts too."""
    one, many = alone(block("quartet2", "gpt_oss")), block("quartet2", "gpt_oss")
    nvfp4.expert_parallel(many, mesh())
    assert sorted(dict(many.named_parameters())) == sorted(dict(one.named_parameters()))
    compare(one, many, 0)


def few_experts_chosen() -> None:
    """All tokens on two experts, so processes get no rows at all, and go on with the others."""
    for recipe in ("quartet2", "nvidia"):
        one, many = alone(block(recipe)), block(recipe)
        nvfp4.expert_parallel(many, mesh())
        compare(one, many, 0, chosen=(0, 1))
        compare(one, many, 1)
        assert nvfp4.noise_state(many) == nvfp4.noise_state(one)


def codes_on_the_wire() -> None:
    """Bytes that each row takes there: 4.5 bits per element for fprop's codes, and a float32 where
    rows have scales; all of x for recipes that start from it, but for no gradient."""
    sent: list[tuple[int, int]] = []
    original = dist.all_to_all_single

    def counting(out: torch.Tensor, rows: torch.Tensor, *splits: Any, **more: Any) -> Any:
        sent.append((rows.shape[0], rows.nbytes))
        return original(out, rows, *splits, **more)

    given = tokens(dist.get_rank(), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        for recipe in RECIPES:
            many = block(recipe)
            nvfp4.expert_parallel(many, mesh())
            sent.clear()
            step_of(many, given)
            assert len(sent) == 4, "there and back, forward and backward"
            rows, size = sent[0]
            codes = H // 2 + H // 16 + (4 if recipe == "rl" else 0)
            assert rows == len(given[0]) * CHOICES
            assert size == rows * (codes if recipe in CODES else 4 * H), recipe
            sent.clear()
            with torch.no_grad():
                many(*given[:3])
            assert sent[0][1] == rows * codes, recipe
            assert len(sent) == 2


def poison() -> None:
    """A NaN in a token of the last process: of both its experts every row is NaN, wherever it is
    from; everything else is as without it."""
    many, rank, size = block("search_eden"), dist.get_rank(), dist.get_world_size()
    nvfp4.expert_parallel(many, mesh())
    parts = [tokens(r, 0) for r in range(size)]
    with torch.no_grad():
        clean = many(*parts[rank][:3])
        bad = parts[-1][1][0].tolist()
        parts[-1][0][0, 3] = math.nan
        y = many(*parts[rank][:3])
    hit = torch.isin(parts[rank][1], torch.tensor(bad)).any(dim=1)
    assert torch.equal(y.isnan().all(dim=1), hit)
    assert torch.equal(y[~hit], clean[~hit])
    assert not hit.all()


def resumption() -> None:
    """A new model with the state_dict and the noise of another goes on as that one; so does one of
    deeper checkpoints (a copy)."""
    many = block("quartet2")
    nvfp4.expert_parallel(many, mesh())
    step_of(many, tokens(dist.get_rank(), 0))
    again = block("quartet2")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    nvfp4.expert_parallel(again, mesh())
    again.load_state_dict(copy.deepcopy(many.state_dict()))
    nvfp4.load_noise_state(again, nvfp4.noise_state(many))
    results = [step_of(model, tokens(dist.get_rank(), 1)) for model in (many, again)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def recomputation() -> None:
    """Activation checkpointing, reentrant and not: the same bits, by the same collectives again."""
    results = []
    for reentrant in (None, False, True):
        many = block("search_eden")
        nvfp4.expert_parallel(many, mesh())
        x, chosen, weights, dy = tokens(dist.get_rank(), 0)
        x.requires_grad_()
        args = (x, chosen, weights)
        y = many(*args) if reentrant is None else checkpoint(many, *args, use_reentrant=reentrant)
        y.backward(dy)
        results.append([x.grad, *(p.grad.to_local() for p in many.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def refusals() -> None:
    """Experts that processes cannot share alike, another mesh, twice, other seeds, BF16; nothing is
    changed by any of them."""
    odd = block("quartet2", experts=3)
    with pytest.raises(ValueError, match="experts has 3 experts, which 2 processes cannot share"):
        nvfp4.expert_parallel(odd, mesh())
    assert not any(isinstance(parameter, DTensor) for parameter in odd.parameters())
    with pytest.raises(ValueError, match="one dimension"):
        nvfp4.expert_parallel(odd, init_device_mesh("cpu", (2, 1)))

    many = block("quartet2")
    for state in many.experts.nvfp4.values():
        state.noise.state[0] += dist.get_rank()
    with pytest.raises(ValueError, match="different seeds"):
        nvfp4.expert_parallel(many, mesh())
    many = block("quartet2")
    nvfp4.expert_parallel(many, mesh())
    with pytest.raises(ValueError, match="spread over processes already"):
        nvfp4.expert_parallel(many, mesh())
    with nvfp4.disabled(many), pytest.raises(RuntimeError, match="compute in NVFP4 alone"):
        many(*tokens(0, 0)[:3])


CHECKS: dict[int, tuple[Callable[[], None], ...]] = {
    2: (
        same_bits,
        same_bits_with_biases,
        few_experts_chosen,
        codes_on_the_wire,
        poison,
        resumption,
        recomputation,
        refusals,
    ),
    4: (same_bits, few_experts_chosen),
}


def main(arguments: list[str]) -> None:
    """As ``distributed_worker.main``, of the checks here."""
    distributed_worker.CHECKS = CHECKS  # type: ignore[assignment]
    distributed_worker.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
