"""What runs in each of several processes: ``main([FOLDER])``, all checks for their number.

FOLDER/RANK.json tells of each check the error it ended with, or null. Run by
``test_distributed.py``.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from limits import HANG
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import nvfp4
from nvfp4.layer.linear import layers
from nvfp4.layer.noise import gemm_seeds
from nvfp4.layer.sharding import GatheredWeight
from nvfp4.model.distributed import fp4_all_gather, share_noise

RECIPES = ("search_eden", "quartet2", "nvidia", "rtn", "rl")
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WIDTH, SEED = 64, 11


class Block(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.norm, self.recompute = nn.RMSNorm(WIDTH), recompute
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(2))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(recipe: str, recompute: bool = False) -> Net:
    """Equal in every process."""
    torch.manual_seed(SEED)
    model = Net(recompute)
    with torch.no_grad():
        model.blocks[0].up.bias.normal_()
    return nvfp4.convert(model, recipe, seed=SEED, verbose=False)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(3, 16, WIDTH, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(whole(a[name]), whole(b[name])), name


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def play(
    model: Net,
    optimizer: torch.optim.Optimizer,
    steps: range,
    world: int,
    dtype: torch.dtype | None = None,
) -> list[list[float]]:
    """One process plays every rank in turn and averages the gradients; the losses of each rank.

    dtype: of the copy of the weights that computes, as in mixed precision; gradients are averaged
    in float32.
    """
    losses: list[list[float]] = [[] for _ in range(world)]
    for step in steps:
        total: list[torch.Tensor] = []
        for rank in range(world):
            working = copy.deepcopy(model).to(dtype) if dtype else copy.deepcopy(model)
            for layer in layers(working).values():
                layer.nvfp4.noise.rank = rank
            loss = loss_of(working, batch(rank, step, dtype or torch.float32))
            loss.backward()
            losses[rank].append(float(loss.detach()))
            grads = [p.grad.float() for p in working.parameters()]
            total = [t + g for t, g in zip(total, grads, strict=True)] if total else grads
        nvfp4.load_noise_state(model, nvfp4.noise_state(working))
        for parameter, grad in zip(model.parameters(), total, strict=True):
            parameter.grad = grad / world
        optimizer.step()
        optimizer.zero_grad()
    return losses


def played(recipe: str, steps: int, dtype: torch.dtype | None = None) -> tuple[Net, list[float]]:
    """The model and this rank's losses after one process has played both."""
    model = net(recipe)
    return model, play(model, sgd(model), range(steps), 2, dtype)[dist.get_rank()]


def trained(
    model: nn.Module,
    steps: int,
    dtype: torch.dtype = torch.float32,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """This rank's losses; the model learns in place."""
    optimizer, losses = optimizer or sgd(model), []
    for step in range(steps):
        loss = loss_of(model, batch(dist.get_rank(), step, dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def shard(model: nn.Module, **options: object) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


# Two processes


def ddp() -> None:
    """DDP's losses and weights are those of one process that plays both ranks, to the bit, in every
    recipe."""
    for recipe in RECIPES:
        alone, expected = played(recipe, 3)
        model = nn.parallel.DistributedDataParallel(net(recipe))
        assert trained(model, 3) == expected, recipe
        assert_same(model.module.state_dict(), alone.state_dict())


def fsdp2() -> None:
    """So are FSDP2's, in float32 and in mixed precision, with activation checkpointing, from meta
    initialisation."""
    for recipe in RECIPES:
        for dtype in (None, torch.bfloat16):
            alone, expected = played(recipe, 3, dtype)
            with torch.device("meta"):
                model = net(recipe, recompute=True)
            shard(model, **({"mp_policy": BF16} if dtype else {}))
            model.to_empty(device="cpu")
            with torch.no_grad():
                for name, value in net(recipe).state_dict().items():
                    parameter = model.get_parameter(name)
                    parameter.copy_(
                        distribute_tensor(value, parameter.device_mesh, parameter.placements)
                    )
            assert trained(model, 3, dtype or torch.float32) == expected, (recipe, dtype)
            assert_same(model.state_dict(), alone.state_dict())


def fsdp2_keeps_no_weight() -> None:
    """Between forward and backward no unsharded weight is in memory, also where backward will need
    one (rtn)."""
    for recipe in ("search_eden", "nvidia", "rtn"):
        model = shard(net(recipe), mp_policy=BF16)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            loss = loss_of(model, batch(0, 0, torch.bfloat16))
        size = WIDTH * 2 * WIDTH * 2
        weights = [
            t
            for t in saved
            if t.dtype == torch.bfloat16 and t.numel() * 2 == size and t.shape[0] != 48
        ]
        assert all(t.untyped_storage().nbytes() == 0 for t in weights), recipe
        assert bool(weights) == (recipe == "rtn")
        loss.backward()


class CountingGather:
    """FSDP2's all-gather, and the bytes that this process sent with it."""

    def __init__(self) -> None:
        self.sent = 0

    def allocate(self, size: object, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.sent += input_tensor.nbytes
        return dist.all_gather_into_tensor(
            output_tensor, input_tensor, group=group, async_op=async_op
        )


def fp4_gather() -> None:
    """Weights gathered as codes give the bits of weights gathered in BF16, with all recipes that
    can."""
    for recipe in ("search_eden", "quartet2", "nvidia", "four_over_six", "rl"):
        models = [shard(net(recipe, recompute=True), mp_policy=BF16) for _ in range(2)]
        assert fp4_all_gather(models[1]) == {}
        losses = [trained(model, 3, torch.bfloat16) for model in models]
        assert losses[0] == losses[1], recipe
        assert_same(models[0].state_dict(), models[1].state_dict())
        for value in models[1].state_dict().values():
            assert type(value.to_local()) is torch.Tensor
            assert not hasattr(value.to_local(), "fsdp_pre_all_gather")
        for reload in (
            lambda model: model.load_state_dict(model.state_dict(), assign=True),
            lambda model: None,
        ):
            reload(models[1])
            fp4_all_gather(models[1])
            assert trained(models[0], 1, torch.bfloat16) == trained(models[1], 1, torch.bfloat16)
        models[1].load_state_dict(models[1].state_dict(), assign=True)
        fp4_all_gather(models[1], False)
        assert trained(models[0], 2, torch.bfloat16) == trained(models[1], 2, torch.bfloat16)


def fp4_gather_in_other_loops() -> None:
    """Gradients too, without resharding, with frozen weights, accumulated over batches, around an
    evaluation."""
    for reshard in (True, False):
        results = []
        for fp4 in (False, True):
            model = net("search_eden")
            model.blocks[0].up.weight.requires_grad_(False)
            shard(model, mp_policy=BF16, reshard_after_forward=reshard)
            if fp4:
                fp4_all_gather(model)
            for step in range(2):
                model.set_requires_gradient_sync(step == 1)
                loss = loss_of(model, batch(dist.get_rank(), step, torch.bfloat16))
                with torch.no_grad():
                    loss_of(model, batch(0, 7, torch.bfloat16))
                loss.backward()
            results.append(
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            )
        assert "blocks.0.up.weight" not in results[0]
        assert_same(*results)


def fp4_gather_of_bad_weights() -> None:
    """A NaN or Inf on one process makes the codes NaN on all; a zero weight stays zero."""
    for value in (float("nan"), float("inf"), 0.0):
        outputs = []
        for fp4 in (False, True):
            model = shard(net("search_eden"))
            with torch.no_grad():
                weight = model.blocks[0].up.weight.to_local()
                weight.zero_() if value == 0 else weight[0, 0].fill_(
                    value if dist.get_rank() else 1.0
                )
            if fp4:
                fp4_all_gather(model)
            with torch.no_grad():
                outputs.append(model(batch(0, 0)))
        assert torch.equal(*outputs) if value == 0 else all(y.isnan().all() for y in outputs), value


def fp4_gather_traffic() -> None:
    """The bytes that one process sends for the weights: at least 3.5 times fewer than in BF16."""
    sent = []
    for fp4 in (False, True):
        layer = nvfp4.convert(
            nn.Linear(1024, 256, bias=False), "search_eden", seed=SEED, verbose=False
        )
        model = fully_shard(nn.Sequential(layer), mp_policy=BF16)
        gather = CountingGather()
        model.set_custom_all_gather(gather)
        if fp4:
            fp4_all_gather(model)
        model(torch.randn(16, 1024))
        sent.append(gather.sent)
    assert sent == [1024 * 128 * 2, 1024 * 128 // 2 + 1024 * 128 // 16 + 4]
    assert sent[0] / sent[1] > 3.5


def fp4_gather_refusals() -> None:
    """Each weight that cannot travel as codes travels in high precision, and the answer says
    why."""
    reasons = fp4_all_gather(shard(net("rtn")))
    assert set(reasons.values()) == {"recipe rtn: dgrad needs w in high precision"}
    for recipe, rows, reason in (
        ("search_eden", 33, r"33 rows do not divide into 2 shards of whole blocks (1, 16)"),
        ("nvidia", 48, r"48 rows do not divide into 2 shards of whole blocks (16, 16)"),
    ):
        layer = nvfp4.convert(nn.Sequential(nn.Linear(32, rows)), recipe, verbose=False)
        assert fp4_all_gather(fully_shard(layer)) == {"0": reason}
        layer(torch.randn(4, 32)).sum().backward()
    with pytest.raises(ValueError, match=r"call torch\.distributed\.fsdp\.fully_shard on it first"):
        fp4_all_gather(net("rtn"))
    model = shard(net("search_eden"))
    fp4_all_gather(model)
    with (
        nvfp4.disabled(model),
        pytest.raises(RuntimeError, match=r"call nvfp4\.fp4_all_gather\(model, F"),
    ):
        model(batch(0, 0))
    model = shard(net("search_eden"))
    fp4_all_gather(model)
    nvfp4.revert(model)
    with pytest.raises(RuntimeError, match="the layer was reverted"):
        model(batch(0, 0))


def fp4_gather_leaves_no_weight() -> None:
    """After forward the codes are freed as FSDP2 frees weights: what is saved for backward points
    to no memory."""
    model = shard(net("search_eden"), mp_policy=BF16)
    fp4_all_gather(model)
    seen = []
    model.blocks[0].up.register_forward_pre_hook(lambda layer, args: seen.append(layer.weight))
    loss = loss_of(model, batch(0, 0, torch.bfloat16))
    assert isinstance(seen[0], GatheredWeight)
    assert seen[0].codes.codes.untyped_storage().nbytes() == 0
    loss.backward()
    assert model.blocks[0].up.weight.grad is not None


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What a run goes on from, sharded as the model is; for ``torch.distributed.checkpoint``."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "noise": nvfp4.noise_state(model)}


def load_full_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = full_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=not dist.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    nvfp4.load_noise_state(model, state["noise"])


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and momentum, whole."""
    momentum = {
        f"momentum of {n}": optimizer.state[p]["momentum_buffer"]
        for n, p in model.named_parameters()
    }
    return {
        name: whole(value) for name, value in (dict(model.named_parameters()) | momentum).items()
    }


def saved_checkpoint() -> None:
    """Save an FSDP2 model, its optimizer and its noise after two steps; other worlds go on from
    it."""
    model = shard(net("search_eden"))
    optimizer = sgd(model)
    trained(model, 2, optimizer=optimizer)
    dcp.save(full_state(model, optimizer), checkpoint_id=FOLDER / "dcp")


def _slices(q: nvfp4.QTensor, parts: int, rank: int) -> nvfp4.QTensor:
    """Columns of an unrotated row-blocked matrix, cut in the codes."""
    width = q.contraction // parts
    codes = q.codes[:, rank * width // 2 : (rank + 1) * width // 2].contiguous()
    scales = q.block_scale[:, rank * width // 16 : (rank + 1) * width // 16].contiguous()
    return nvfp4.QTensor(codes, scales, q.global_scale, q.block, (q.rows, width))


def tensor_parallel_codes() -> None:
    """rtn under tensor parallelism: y and dx are sums of products of the whole tensors' codes, dw
    is the whole's.

    All to the bit; ``rl`` too, whose rows have scales of their own.
    """
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for recipe in ("rtn", "rl"):
        torch.manual_seed(SEED)
        alone = nvfp4.convert(
            nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 96)), recipe, seed=1, verbose=False
        )
        model = copy.deepcopy(alone)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        x, dy = torch.randn(5, 7, 64) * torch.rand(7, 1), torch.randn(5, 7, 96)
        hidden = alone[0](x)
        row = {"row_scaled": True} if recipe == "rl" else {}
        name = "four_over_six" if recipe == "rl" else "rtn"
        q_h, q_w = (
            nvfp4.quantize(hidden.view(-1, 128), name, **row),
            nvfp4.quantize(alone[1].weight, name),
        )
        bias = (alone[1].bias.detach(), None)
        y = sum(
            nvfp4.matmul(_slices(q_h, 2, r), _slices(q_w, 2, r), bias=bias[r]) for r in range(2)
        )
        with torch.no_grad():
            assert torch.equal(model[0](x), hidden[..., 64 * rank : 64 * rank + 64]), recipe
            assert torch.equal(model(x), y.view(5, 7, 96)), recipe
        leaf = x.clone().requires_grad_()
        model(leaf).backward(dy)
        alone(x).backward(dy)
        assert torch.equal(whole(model[1].weight.grad), alone[1].weight.grad), recipe
        assert torch.equal(whole(model[0].weight.grad), alone[0].weight.grad), recipe
        assert torch.equal(whole(model[1].bias.grad), alone[1].bias.grad)
        if recipe == "rtn":
            d_hidden = torch.autograd.grad(alone[1](hidden), hidden, dy)[0].view(-1, 128)
            q_d, q_t = nvfp4.quantize(d_hidden, "rtn"), nvfp4.quantize(alone[0].weight.t(), "rtn")
            dx = sum(nvfp4.matmul(_slices(q_d, 2, r), _slices(q_t, 2, r)) for r in range(2))
            assert torch.equal(leaf.grad, dx.view(5, 7, 64))


def _error(grads: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True))


def tensor_parallel_recipes() -> None:
    """Stochastic recipes, with and without sequence parallelism: gradients about as exact as one
    process has them.

    The activations that colwise makes are those of one process to the bit, with 16x16 tiles
    (nvidia) too.
    """
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for recipe in ("search_eden", "nvidia", "tetrajet2"):
        for layout in (None, Shard(0)):
            torch.manual_seed(SEED)
            plain = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 96))
            x, dy = torch.randn(64, 128), torch.randn(64, 96)
            part = slice(32 * rank, 32 * rank + 32) if layout else slice(None)
            alone = nvfp4.convert(copy.deepcopy(plain), recipe, seed=1, verbose=False)
            model = copy.deepcopy(alone)
            plan = {
                "0": ColwiseParallel(input_layouts=layout),
                "2": RowwiseParallel(output_layouts=layout),
            }
            parallelize_module(model, mesh, plan)
            with torch.no_grad():
                assert torch.equal(model[0](x[part]), alone[0](x)[:, 128 * rank : 128 * rank + 128])
            results = []
            for net_, rows in ((plain, slice(None)), (alone, slice(None)), (model, part)):
                leaf = x[rows].clone().requires_grad_()
                net_(leaf).backward(dy[rows])
                dx = (
                    whole(DTensor.from_local(leaf.grad, mesh, [layout]))
                    if layout and net_ is model
                    else leaf.grad
                )
                results.append([dx, *(whole(p.grad) for p in net_.parameters())])
            exact, one, two = results
            assert _error(two, exact) < 1.3 * _error(one, exact), (recipe, layout)


def tensor_parallel_replicas() -> None:
    """A layer left whole between parallel ones: its gradient is equal on all processes once they
    share the noise."""
    mesh = init_device_mesh("cpu", (2,))
    for shared in (False, True):
        model = nvfp4.convert(
            nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)),
            "nvidia",
            seed=1,
            verbose=False,
        )
        parallelize_module(model, mesh, {"1": ColwiseParallel(output_layouts=Replicate())})
        if shared:
            share_noise(model, mesh)
        torch.manual_seed(SEED)
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.weight)
        model(torch.randn(32, 64)).backward(torch.randn(32, 64))
        for layer in (model[0], model[2]):
            theirs = [torch.empty_like(layer.weight.grad) for _ in range(2)]
            dist.all_gather(theirs, layer.weight.grad)
            assert torch.equal(*theirs) == shared
    unlike = nvfp4.convert(
        nn.Sequential(nn.Linear(16, 16)), "rtn", seed=dist.get_rank(), verbose=False
    )
    with pytest.raises(ValueError, match="converted with different seeds"):
        share_noise(unlike, mesh)
    seeds = [None, None]
    seed, index, _, rank = model[1].nvfp4.noise.state.tolist()
    dist.all_gather_object(seeds, gemm_seeds((seed, index, 0, rank), "wgrad"))
    assert seeds[0][0] == seeds[1][0]  # signs
    assert len({s for _, pair in seeds for s in pair}) == 4  # rounding


def tensor_parallel_replicated_weights() -> None:
    """DTensor weights that every process holds: equal gradients of equal tokens, summed gradients
    of different ones."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    torch.manual_seed(SEED)
    alone = nvfp4.convert(nn.Linear(64, 48), "search_eden", seed=1, verbose=False)
    model = copy.deepcopy(alone)
    for name, value in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Replicate()])))
    x, dy = torch.randn(2, 32, 64), torch.randn(2, 32, 48)

    alone.nvfp4.noise.rank = 0
    results = []
    for layer, given, grad in (
        (alone, x, dy),
        (model, *(distribute_tensor(t, mesh, [Replicate()]) for t in (x, dy))),
    ):
        leaf = given.requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        results.append({"y": y, "dx": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()})
    assert results[1]["weight"].placements == (Replicate(),)
    assert_same(
        *[{n: t.to_local() if isinstance(t, DTensor) else t for n, t in r.items()} for r in results]
    )

    model.zero_grad()
    model.nvfp4.noise.calls = 0
    y = model(distribute_tensor(x, mesh, [Shard(0)]))
    y.backward(distribute_tensor(dy, mesh, [Shard(0)]))
    grads = []
    for part in range(2):
        alone.zero_grad()
        alone.nvfp4.noise.rank, alone.nvfp4.noise.calls = part, 0
        one = alone(x[part : part + 1].detach())
        one.backward(dy[part : part + 1])
        grads.append([p.grad for p in alone.parameters()])
        if part == rank:
            assert torch.equal(y.to_local(), one)
    for parameter, first, second in zip(model.parameters(), *grads, strict=True):
        assert torch.equal(whole(parameter.grad), first + second)


def converting_last() -> None:
    """``convert`` after ``parallelize_module`` or ``fully_shard`` gives what it gives before
    them."""
    mesh, x = init_device_mesh("cpu", (2,)), batch(0, 0)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def spread(block: nn.Module, how: str) -> nn.Module:
        return parallelize_module(block, mesh, plan) if how == "tensor" else fully_shard(block)

    for how in ("tensor", "data"):
        results = []
        for last in (False, True):
            torch.manual_seed(SEED)
            block = Block()
            if last:
                spread(block, how)
            nvfp4.convert(block, "search_eden", seed=1, verbose=False)
            if not last:
                spread(block, how)
            loss_of(block, x).backward()
            results.append({name: p.grad for name, p in block.named_parameters()})
        assert_same(*results)


def observing() -> None:
    """``observe`` sees the part that a process holds; of a weight gathered in FP4 it sees
    nothing."""
    model = net("search_eden")
    parallelize_module(
        model.blocks[0],
        init_device_mesh("cpu", (2,)),
        {"up": ColwiseParallel(), "down": RowwiseParallel()},
    )
    with nvfp4.observe(model) as seen:
        model(batch(0, 0))
    part = model.blocks[0].down.weight.to_local()
    assert seen["blocks.0.down/w"] == nvfp4.health(part, nvfp4.quantize(part, "scale_search"))
    model = shard(net("search_eden"))
    fp4_all_gather(model)
    with nvfp4.observe(model) as seen:
        model(batch(0, 0))
    assert set(seen) == {f"{name}/x" for name in layers(model)}
    with pytest.raises(TypeError, match=r"quantise x\.to_local\(\) or x\.full_tensor\(\)"):
        nvfp4.quantize(model.blocks[0].up.weight)


def tensor_parallel_refusals() -> None:
    """Layouts that no parallel style makes are refused by name, before anything is computed."""
    mesh = init_device_mesh("cpu", (2,))
    layer = nvfp4.convert(nn.Sequential(nn.Linear(32, 32)), "rtn", verbose=False)[0]
    x = torch.randn(4, 32)
    for of_x, of_weight, message in (
        (None, Shard(0), "weight is a DTensor, x is not"),
        (Replicate(), None, "x is a DTensor, weight a plain tensor"),
        (
            Shard(0),
            Shard(0),
            r"x is Shard\(dim=0\) and weight Shard\(dim=0\); supported are ColwiseParallel",
        ),
    ):
        one = copy.deepcopy(layer)
        if of_weight is not None:
            one.weight = nn.Parameter(distribute_tensor(one.weight.detach(), mesh, [of_weight]))
        given = x if of_x is None else distribute_tensor(x, mesh, [of_x])
        with pytest.raises(TypeError, match=message):
            one(given)


def tensor_parallel_uneven() -> None:
    """Sizes that nothing divides work: 33 rows and 30 columns over 2 processes, within rounding of
    the codes."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(SEED)
    plain = nn.Sequential(nn.Linear(30, 33), nn.Linear(33, 7))
    model = nvfp4.convert(copy.deepcopy(plain), "search_eden", verbose=False)
    replicated = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(
        model, mesh, {"0": ColwiseParallel(**replicated), "1": RowwiseParallel(**replicated)}
    )
    x, dy = torch.randn(16, 30), torch.randn(16, 7)
    plain(x).backward(dy)
    model(x).backward(dy)
    assert (
        _error([whole(p.grad) for p in model.parameters()], [p.grad for p in plain.parameters()])
        < 0.35
    )


# Four processes


def loaded_checkpoint() -> None:
    """Load the checkpoint of two processes; ``test_distributed.py`` compares what arrived, and
    training goes on."""
    torch.manual_seed(0)
    model = shard(nvfp4.convert(Net(), "search_eden", seed=SEED, verbose=False))
    optimizer = sgd(model)
    load_full_state(FOLDER.parent / "two", model, optimizer)
    torch.save(tensors(model, optimizer), FOLDER / f"{dist.get_rank()}.pt")
    assert set(nvfp4.noise_state(model).values()) == {2}
    trained(model, 1, optimizer=optimizer)
    assert set(nvfp4.noise_state(model).values()) == {3}


def fsdp2_of_tensor_parallel() -> None:
    """FSDP2 over tensor parallelism, 2 x 2: rtn's losses are those of plain FSDP2 up to the order
    of sums.

    Rowwise sums two halves of 128 products in float32: a relative 2^-24 for each of log2(128) + 1
    levels, on values near 1; it could flip no code here, or the difference would be far larger.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    losses = []
    for tensor in (False, True):
        model = net("rtn")
        if tensor:
            for block in model.blocks:
                parallelize_module(block, mesh["tp"], plan)
        shard(model, mesh=mesh["dp"])
        loss = loss_of(model, batch(mesh["dp"].get_local_rank(), 0))
        loss.backward()
        losses.append(float(loss.detach()))
        if tensor:
            share_noise(model, mesh["tp"])
            assert {layer.nvfp4.noise.rank for layer in layers(model).values()} == {
                dist.get_rank() // 2 * 2
            }
            model(batch(0, 0))
            assert model.blocks[0].up.nvfp4.noise.rank is None
            assert set(fp4_all_gather(model).values()) == {
                "recipe rtn: dgrad needs w in high precision"
            }
    assert losses[1] == pytest.approx(losses[0], rel=8 * 2**-24)


def fp4_gather_in_hybrid_shards() -> None:
    """Sharded over two, replicated over two processes: FP4 gathers within a shard group, bits as in
    BF16."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = [shard(net("search_eden"), mesh=mesh, mp_policy=BF16) for _ in range(2)]
    assert fp4_all_gather(models[1]) == {}
    assert trained(models[0], 2, torch.bfloat16) == trained(models[1], 2, torch.bfloat16)
    assert_same(models[0].state_dict(), models[1].state_dict())


CHECKS: dict[int, tuple[Callable[[], None], ...]] = {
    2: (
        ddp,
        fsdp2,
        fsdp2_keeps_no_weight,
        fp4_gather,
        fp4_gather_in_other_loops,
        fp4_gather_of_bad_weights,
        fp4_gather_traffic,
        fp4_gather_refusals,
        fp4_gather_leaves_no_weight,
        saved_checkpoint,
        tensor_parallel_codes,
        tensor_parallel_recipes,
        tensor_parallel_replicas,
        tensor_parallel_replicated_weights,
        converting_last,
        observing,
        tensor_parallel_refusals,
        tensor_parallel_uneven,
    ),
    4: (loaded_checkpoint, fsdp2_of_tensor_parallel, fp4_gather_in_hybrid_shards),
}


def main(arguments: list[str]) -> None:
    """FOLDER [CHECKS]: run them up to the first that fails; what came of each is written to a
    file."""
    global FOLDER
    FOLDER, only = Path(arguments[0]), arguments[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    errors: dict[str, str | None] = {}
    for check in CHECKS[dist.get_world_size()]:
        if only and check.__name__ not in only:
            continue
        try:
            check()
            errors[check.__name__] = None
        except Exception:
            errors[check.__name__] = traceback.format_exc()
            break
        gc.collect()
    (FOLDER / f"{dist.get_rank()}.json").write_text(json.dumps(errors))
    if any(errors.values()):
        os._exit(1)  # the others may wait for this process in a collective, and are ended
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()  # else gloo's threads abort the interpreter


if __name__ == "__main__":
    main(sys.argv[1:])
