"""Whole layers and what surrounds them: equal to the CPU's, in graphs, on streams, compiled, waiting for nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.checks import DTYPES, Count, _run, chosen, data, same
from benchmarks.gpu.processes import Job, Skip
from nvfp4.layer.linear import Linear
from nvfp4.model.convert import convert
from nvfp4.model.weights import capturable
from nvfp4.recipes import GEMMS, RECIPES

EXACT_PRODUCTS = 2.0**-16
"""Tolerance, in units of the largest element, of a layer in float32 whose three products have NVFP4 operands.

Their elements are exact in BF16, so products are exact in float32. Sums are at most 96 long: in another order, and with
global scales and bias, they move by at most (96 + 3) 2^-24 of the sum of magnitudes, which on these normal numbers is
less than twice the largest result: 2^-16.3.
"""

BF16_PRODUCTS = 2.0**-7
"""The same where results are rounded to BF16: operands in BF16 (autocast), or a recipe with a dense product (``rl``:
its input and weight gradients multiply BF16). BF16 has 8 significant bits, so a rounding that falls the other way moves
an element by at most 2^-7 of it; with 10^4 elements and sums in another order, one such is more likely than none.
"""


def tolerance(recipe: str, dtype: torch.dtype, autocast: bool) -> float:
    """How far a layer's results may lie from those of another device, in units of their largest element."""
    dense = not all(getattr(RECIPES[recipe], gemm).quantized for gemm in GEMMS)
    rounds = dtype is not torch.float32 or autocast or dense
    return BF16_PRODUCTS if rounds else EXACT_PRODUCTS


def layer(job: Job, backend: str, recipe: str, dtype: str, autocast: bool) -> None:
    """Forward and backward there and on the CPU: equal codes, so that only the order of sums and a cast differ."""
    place = job.settings.place
    place.backend(backend)
    element = DTYPES[dtype]
    torch.manual_seed(0)
    module = nn.Linear(96, 80, dtype=element)
    convert(module, recipe, seed=5, verbose=False)

    def results(device: torch.device, name: str) -> dict[str, torch.Tensor]:
        there = copy.deepcopy(module).to(device)
        assert isinstance(there, Linear)
        there.nvfp4.backend = name
        x = data(40, 96, element).to(device).requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            y = there(x)
        y.backward(data(40, 80, y.dtype).to(device))
        tensors = {"y": y, "dx": x.grad, "dw": there.weight.grad, "db": there.bias.grad}
        return {name: tensor.detach().cpu().float() for name, tensor in tensors.items()}

    want = results(torch.device("cpu"), "reference")
    got: dict[str, torch.Tensor] = {}
    allowed = tolerance(recipe, element, autocast)

    def near(name: str) -> bool:
        got.update(got or results(place.device, backend))
        error = (got[name] - want[name]).abs().max()
        return bool(error <= allowed * want[name].abs().max())

    case = f"{recipe} {dtype}{' autocast' if autocast else ''}"
    count = Count(job, check="layer", backend=backend, case=case)
    _run(count, [(name, lambda name=name: near(name)) for name in want])


def small_layer(recipe: str, backend: str, device: torch.device) -> tuple[nn.Linear, torch.Tensor]:
    """A layer of 256 to 128 features and 128 tokens for it, in BF16 and in whole tiles: kernels for these lie in
    Triton's cache by then."""
    torch.manual_seed(0)
    module = nn.Linear(256, 128, device=device, dtype=torch.bfloat16)
    convert(module, recipe, backend=backend, seed=1, verbose=False)
    return module, torch.randn(128, 256, device=device).bfloat16().requires_grad_()


def gradient_of_output(device: torch.device) -> torch.Tensor:
    """dy for it."""
    return torch.randn(128, 128, device=device).bfloat16()


def graph_of_quantiser(job: Job, backend: str, name: str) -> None:
    """A captured quantiser follows its input, NaN included."""
    place = job.settings.place
    chip = place.backend(backend)
    quantizer, options = chosen(name)
    if "quantize" not in chip.operations or chip.refuses("quantize", quantizer, options):
        raise Skip(f"{backend} does not quantise {name}")
    x = data(256, 512, torch.bfloat16, "normal").to(place.device)
    count = Count(job, check="graph", backend=backend, case=name)
    replay: list[Any] = []

    def follows(kind: str) -> bool:
        if not replay:
            place.warm(lambda: chip.quantize(x, quantizer, options))
            replay.extend(place.capture(lambda: chip.quantize(x, quantizer, options)))
        fresh = data(256, 512, torch.bfloat16, kind)
        x.copy_(fresh)
        replay[1]()
        return same(replay[0], quantizer.quantize(fresh, options))

    _run(count, [(kind, lambda kind=kind: follows(kind)) for kind in ("wide", "nan", "normal")])


def _gradient(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x), x, dy)[0]


def graph_of_layer(job: Job, backend: str, recipe: str) -> None:
    """Each replay of a ``capturable`` layer gives what an eager twin gives at that call, and noise is drawn anew.

    The twin runs on a side stream, since a product of scaled_mm may differ in its last bit on the default one.
    """
    place = job.settings.place
    place.backend(backend)
    module, x = small_layer(recipe, backend, place.device)
    twin, dy = copy.deepcopy(module), gradient_of_output(place.device)
    capturable(module)

    def replays() -> bool:
        for each in (module, twin):
            place.warm(lambda each=each: _gradient(each, x, dy), times=1)
        captured, replay = place.capture(lambda: _gradient(module, x, dy))
        if place.kind != "gpu":
            _gradient(twin, x, dy)  # a capture on a GPU computes nothing, its stand-in does
        kept = []
        for _ in range(3):
            replay()
            kept.append(captured.clone())
            with place.stream():
                want = _gradient(twin, x, dy)
            if not torch.equal(captured, want):
                return False
        return not torch.equal(kept[0], kept[1])

    _run(Count(job, check="graph of a layer", backend=backend, case=recipe), [("replays", replays)])


def waits_for_nothing(job: Job, backend: str, recipe: str) -> None:
    """A step after the first one never makes the host wait for the device."""
    place = job.settings.place
    place.backend(backend)
    module, x = small_layer(recipe, backend, place.device)

    def runs_ahead() -> bool:
        module(x).sum().backward()
        place.synchronize()
        with place.no_waiting():
            module(x).sum().backward()
        return True

    count = Count(job, check="waits for nothing", backend=backend, case=recipe)
    _run(count, [("a step", runs_ahead)])


def compiled_layer(job: Job, backend: str, recipe: str) -> None:
    """``torch.compile`` without a graph break gives eager mode's bits."""
    place = job.settings.place
    place.backend(backend)
    module, x = small_layer(recipe, backend, place.device)
    twin, dy = copy.deepcopy(module), gradient_of_output(place.device)
    quick = place.compile(module)

    def equal() -> bool:
        return all(torch.equal(_gradient(quick, x, dy), _gradient(twin, x, dy)) for _ in range(2))

    _run(Count(job, check="torch.compile", backend=backend, case=recipe), [("two steps", equal)])


def streams(job: Job, backend: str, recipe: str) -> None:
    """Two layers on two streams side by side give what each gives alone."""
    place = job.settings.place
    place.backend(backend)
    pairs = [small_layer(recipe, backend, place.device) for _ in range(2)]
    with torch.no_grad():
        pairs[1][0].weight.mul_(37.0)  # global scales far apart: exchanged ones would show
        pairs[1][1].mul_(0.01)
    dy = gradient_of_output(place.device)
    twins = [copy.deepcopy(module) for module, _ in pairs]

    def step(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: _gradient(module, x, dy)

    def equal() -> bool:
        with place.stream():  # not on the default one, for the same reason as in ``graph_of_layer``
            alone = [[step(twin, x)() for _ in range(8)] for twin, (_, x) in zip(twins, pairs, strict=True)]
        together = place.side_by_side([step(module, x) for module, x in pairs], 8)
        return all(torch.equal(a, b) for i in range(2) for a, b in zip(alone[i], together[i], strict=True))

    _run(Count(job, check="two streams", backend=backend, case=recipe), [("eight steps", equal)])


def compiles_once(job: Job, backend: str, recipe: str) -> None:
    """Steps after the second compile nothing: no seed and no address is a reason to."""
    place = job.settings.place
    place.backend(backend)
    module, x = small_layer(recipe, backend, place.device)

    def steady() -> bool:
        before = -1
        for i in range(40):
            module(x).square().sum().backward()
            if i == 1:
                before = compiled_kernels()
        return compiled_kernels() == before

    _run(Count(job, check="compiles once", backend=backend, case=recipe), [("40 steps", steady)])


def compiled_kernels() -> int:
    """How many Triton kernels this process holds."""
    from nvfp4.backends.triton.activation import kernels as fused_kernels
    from nvfp4.backends.triton.gemm import decoded as gemm_decoded
    from nvfp4.backends.triton.gemm import kernels as gemm_kernel
    from nvfp4.backends.triton.quantize import kernels

    modules = (kernels, gemm_kernel, gemm_decoded, fused_kernels)
    jitted = {id(v): v for module in modules for v in vars(module).values() if hasattr(v, "device_caches")}
    return sum(len(cache[0]) for kernel in jitted.values() for cache in kernel.device_caches.values())
