"""Whole layers and what surrounds them, on one backend by its name.

    layer               forward and backward as on the CPU, up to the order of sums
    graph_of_quantiser  a captured quantiser follows its input, NaN included
    graph_of_layer      a replay draws the noise that an eager call would
    streams             two layers side by side give what each gives alone
    compiled_layer      torch.compile gives eager mode's bits
    waits_for_nothing   after its first step no layer makes the host wait for the device
    compiles_once       no seed and no address is a reason to compile again

All but the first run one small layer, ``SMALL``, in whole tiles: its kernels lie in Triton's cache
by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.checks import DTYPES, Count, case_of
from benchmarks.gpu.processes import Job, Skip
from nvfp4.bench.cases import Kind, Shape, matrix
from nvfp4.bench.gates import same
from nvfp4.layer.linear import Linear
from nvfp4.model.convert import convert
from nvfp4.model.switches import capturable
from nvfp4.recipes import GEMMS, RECIPES

EXACT_PRODUCTS = 2.0**-16
"""Tolerance of a float32 layer with NVFP4 operands, in units of the largest element.

Their elements are exact in BF16, so products are exact in float32. Sums are at most 96 long: in
another order, and with global scales and bias, they move by at most (96 + 3) 2^-24 of the sum of
magnitudes, which on these normal numbers is less than twice the largest result: 2^-16.3.
"""

BF16_PRODUCTS = 2.0**-7
"""The same where results are rounded to BF16.

Operands in BF16 (autocast), or a recipe with a dense product (``rl``: its input and weight
gradients multiply BF16). BF16 has 8 significant bits, so a rounding that falls the other way moves
an element by at most 2^-7 of it; with 10^4 elements and sums in another order, one such is more
likely than none.
"""

SMALL = Shape(tokens=128, in_features=256, out_features=128)


def tolerance(recipe: str, dtype: torch.dtype, autocast: bool) -> float:
    """How far results may lie from those of another device, in units of their largest element."""
    dense = not all(getattr(RECIPES[recipe], gemm).quantized for gemm in GEMMS)
    rounds = dtype is not torch.float32 or autocast or dense
    return BF16_PRODUCTS if rounds else EXACT_PRODUCTS


def layer(job: Job, backend: str, recipe: str, dtype: str, autocast: bool) -> None:
    """Forward and backward there and on the CPU: equal codes, so only sums and a cast differ."""
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
        x = matrix(40, 96, dtype=element).to(device).requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            y = there(x)
        y.backward(matrix(40, 80, dtype=y.dtype, seed=1).to(device))
        tensors = {"y": y, "dx": x.grad, "dw": there.weight.grad, "db": there.bias.grad}
        return {name: tensor.detach().cpu().float() for name, tensor in tensors.items()}

    # The CPU once, the device at the first comparison: an exception there is then a row.
    want = results(torch.device("cpu"), "reference")
    got: dict[str, torch.Tensor] = {}
    allowed = tolerance(recipe, element, autocast)

    def near(name: str) -> bool:
        got.update(got or results(place.device, backend))
        error = (got[name] - want[name]).abs().max()
        return bool(error <= allowed * want[name].abs().max())

    title = f"{recipe} {dtype}{' autocast' if autocast else ''}"
    count = Count(job, check="layer", backend=backend, case=title)
    count.run([(name, lambda name=name: near(name)) for name in want])


def small_layer(
    job: Job, backend: str, recipe: str
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer of ``SMALL`` with bias in BF16, x and dy for it; ``Skip`` without the backend."""
    place = job.settings.place
    place.backend(backend)
    torch.manual_seed(0)
    module = nn.Linear(
        SMALL.in_features, SMALL.out_features, device=place.device, dtype=torch.bfloat16
    )
    convert(module, recipe, backend=backend, seed=1, verbose=False)
    x = torch.randn(SMALL.tokens, SMALL.in_features, device=place.device).bfloat16()
    dy = torch.randn(SMALL.tokens, SMALL.out_features, device=place.device).bfloat16()
    return module, x.requires_grad_(), dy


def _gradient(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x), x, dy)[0]


def graph_of_quantiser(job: Job, backend: str, name: str) -> None:
    """A captured quantiser follows its input, NaN included."""
    place = job.settings.place
    chip, case = place.backend(backend), case_of(name)
    if "quantize" not in chip.operations or chip.refuses("quantize", *case):
        raise Skip(f"{backend} does not quantise {name}")

    # Captured once; then new input is written into the captured memory before each replay.
    x = matrix(256, 512).to(place.device)
    replay: list[Any] = []

    def follows(kind: Kind) -> bool:
        if not replay:
            place.warm(lambda: chip.quantize(x, *case))
            replay.extend(place.capture(lambda: chip.quantize(x, *case)))
        fresh = matrix(256, 512, kind, seed=1)
        x.copy_(fresh)
        replay[1]()
        return same(replay[0], case.quantizer.quantize(fresh, case.options))

    count = Count(job, check="graph", backend=backend, case=name)
    kinds: tuple[Kind, ...] = ("wide", "nan", "normal")
    count.run([(kind, lambda kind=kind: follows(kind)) for kind in kinds])


def graph_of_layer(job: Job, backend: str, recipe: str) -> None:
    """Each replay of a ``capturable`` layer gives what an eager twin gives at that call.

    So noise is drawn anew. The twin runs on a side stream: a product of scaled_mm may differ in its
    last bit on the default one.
    """
    place = job.settings.place
    module, x, dy = small_layer(job, backend, recipe)
    twin = copy.deepcopy(module)
    capturable(module)

    def replays() -> bool:
        for each in (module, twin):
            place.warm(lambda each=each: _gradient(each, x, dy), times=1)
        captured, replay = place.capture(lambda: _gradient(module, x, dy))
        if place.kind != "gpu":
            _gradient(twin, x, dy)  # a capture on a GPU computes nothing, its stand-in does

        # Equal to the twin each time, and different from one replay to the next.
        kept = []
        for _ in range(3):
            replay()
            kept.append(captured.clone())
            with place.stream():
                want = _gradient(twin, x, dy)
            if not torch.equal(captured, want):
                return False
        return not torch.equal(kept[0], kept[1])

    count = Count(job, check="graph of a layer", backend=backend, case=recipe)
    count.run([("replays", replays)])


def waits_for_nothing(job: Job, backend: str, recipe: str) -> None:
    """A step after the first one never makes the host wait for the device."""
    place = job.settings.place
    module, x, _ = small_layer(job, backend, recipe)

    def runs_ahead() -> bool:
        module(x).sum().backward()
        place.synchronize()
        with place.no_waiting():
            module(x).sum().backward()
        return True

    count = Count(job, check="waits for nothing", backend=backend, case=recipe)
    count.run([("a step", runs_ahead)])


def compiled_layer(job: Job, backend: str, recipe: str) -> None:
    """``torch.compile`` without a graph break gives eager mode's bits."""
    place = job.settings.place
    module, x, dy = small_layer(job, backend, recipe)
    twin = copy.deepcopy(module)
    quick = place.compile(module)

    def equal() -> bool:
        pairs = [(_gradient(quick, x, dy), _gradient(twin, x, dy)) for _ in range(2)]
        return all(torch.equal(a, b) for a, b in pairs)

    count = Count(job, check="torch.compile", backend=backend, case=recipe)
    count.run([("two steps", equal)])


def streams(job: Job, backend: str, recipe: str) -> None:
    """Two layers on two streams side by side give what each gives alone."""
    place = job.settings.place
    layers = [small_layer(job, backend, recipe) for _ in range(2)]
    with torch.no_grad():
        # global scales far apart, so that exchanged ones show
        layers[1][0].weight.mul_(37.0)
        layers[1][1].mul_(0.01)
    twins = [(copy.deepcopy(module), x, dy) for module, x, dy in layers]

    def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: _gradient(module, x, dy)

    def equal() -> bool:
        with place.stream():  # not on the default one, for the same reason as in ``graph_of_layer``
            alone = [[step(*twin)() for _ in range(8)] for twin in twins]
        together = place.side_by_side([step(*layer) for layer in layers], 8)
        return all(
            torch.equal(a, b)
            for one, other in zip(alone, together, strict=True)
            for a, b in zip(one, other, strict=True)
        )

    count = Count(job, check="two streams", backend=backend, case=recipe)
    count.run([("eight steps", equal)])


def compiles_once(job: Job, backend: str, recipe: str) -> None:
    """Steps after the second compile nothing."""
    module, x, _ = small_layer(job, backend, recipe)

    def steady() -> bool:
        before = -1
        for i in range(40):
            module(x).square().sum().backward()
            if i == 1:
                before = compiled_kernels()
        return compiled_kernels() == before

    count = Count(job, check="compiles once", backend=backend, case=recipe)
    count.run([("40 steps", steady)])


def compiled_kernels() -> int:
    """How many Triton kernels this process holds."""
    from nvfp4.backends.triton.activation import kernels as activation
    from nvfp4.backends.triton.gemm import decoded
    from nvfp4.backends.triton.gemm import kernels as gemm
    from nvfp4.backends.triton.quantize import kernels as quantize

    modules = (quantize, gemm, decoded, activation)
    jitted = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    }
    return sum(
        len(cache[0]) for kernel in jitted.values() for cache in kernel.device_caches.values()
    )
