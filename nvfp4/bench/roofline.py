"""What a layer step should cost: bytes and FLOPs of each kernel of a recipe, and their time.

    time of a kernel = max(FLOPs / GEMM rate, bytes / memory rate) + launch
    time of a step   = sum over its kernels: they follow each other in one stream

    layer_kernels   the kernels of a forward and backward, of each GEMM first those of its operands
    Kernel.seconds  the formula above, at the rates of ``devices.py``
    step_seconds    the sums per GEMM, and for quantising
    speedup         over BF16; ``overtakes``: from how many tokens there is any

Counting bits per element shows where quantising spends its time. BF16 x to NVFP4 takes a reading
for the amax and one to round, and writes codes and scales: 16 + 16 + 4.5 = 36.5 bits. x^T from the
same readings adds 4.5, not another 36.5.

Nothing here is measured: every time is a prediction, and knows neither the host nor waves of tiles.
The shares of the peaks that GEMMs and kernels reach come in part from Quartet II's own timings, so
that meeting its speed-ups tests the traffic and how times scale with shape, not those shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nvfp4.bench.devices import Device
from nvfp4.numerics.formats import NVFP4
from nvfp4.recipes import GEMMS, RECIPES, Operand, Recipe

BF16_BITS = 16.0
CODE_BITS = 4.0
SCALE_BITS = 8 / NVFP4.block_size
WIDE_SCALE_BITS = BF16_BITS / NVFP4.block_size
"""ms_eden's block scales before the tensor's range is known.

They are BF16, until a second kernel makes E4M3 of them.
"""

PREDICTED = "predicted, not measured"
"""The words beside every number that comes from here."""

QUANTISE = "quantise"
MOST_TOKENS = 1 << 20


class Layer(NamedTuple):
    """x [tokens, inputs], w [outputs, inputs]."""

    inputs: int
    outputs: int


def _block(width: int, up: int, down: int) -> tuple[Layer, ...]:
    return Layer(width, 3 * width), Layer(width, width), Layer(width, up), Layer(down, width)


MODELS: dict[str, tuple[Layer, ...]] = {
    "800M": _block(2048, 11264, 5632),
    "3B": _block(3072, 16384, 8192),
    "7B": _block(4096, 22016, 11008),
    "22B": _block(6144, 32768, 16384),
}
"""qkv, out, up and gate, down of one block: the layers that Quartet II (arXiv 2601.22813) times."""

PUBLISHED_TOKENS = 16384
"""8 x 2048. (With the 16 x 2048 of its script, BF16 would run at twice the peak of an RTX 5090.)"""

PUBLISHED_SPEEDUPS = {
    ("RTX 5090", "800M"): 3.12,
    ("RTX 5090", "3B"): 3.64,
    ("RTX 5090", "7B"): 3.89,
    ("RTX 5090", "22B"): 4.185,
    ("B200", "22B"): 2.5,
}
"""Measured by Quartet II's authors: a block's forward and backward over BF16, amax given.

From its speed notebook and abstract. On B200 they report no gain at 800M, which host time explains
and this model does not.
"""


@dataclass(frozen=True)
class Traffic:
    """How kernels are cut.

    shared_reads: both copies of a tensor (x and x^T, dy and dy^T) are made in one reading. amax:
    whether the amax of x and w is computed here, or given, as in published benchmarks.
    """

    name: str
    shared_reads: bool
    amax: bool


OURS = Traffic("ours", shared_reads=True, amax=True)
PUBLISHED = Traffic("Quartet II's kernels", shared_reads=False, amax=False)
"""45 bits per element of the gradient, 20.5 forward, 11 to quantise again.

arXiv 2601.22813, table 2 and its code.
"""
OURS_AMAX_GIVEN = Traffic("ours, amax given", shared_reads=True, amax=False)
"""29 bits per element of the gradient; to be held beside ``PUBLISHED``."""


@dataclass(frozen=True)
class Kernel:
    """One kernel; without FLOPs it moves data.

    gemm: "fprop", "dgrad" or "wgrad", for which it runs. fp4: whether its FLOPs are NVFP4's. again:
    of ``bytes``, those that the kernel before it read too.
    """

    name: str
    gemm: str
    flops: float
    bytes: float
    fp4: bool = False
    again: float = 0.0

    def seconds(self, device: Device) -> float:
        """Predicted; what was read just before is free if it fills at most half of the L2 cache."""
        cached = self.again if self.again <= device.l2 / 2 else 0.0
        work = self.flops / device.gemm_rate(self.fp4) if self.flops else 0.0
        return max(work, (self.bytes - cached) / device.memory_rate) + device.launch


def layer_kernels(
    recipe: Recipe, layer: Layer, tokens: int, traffic: Traffic = OURS
) -> list[Kernel]:
    """All kernels of a forward and backward: of each GEMM first those that make its operands.

    x [tokens, inputs], y [tokens, outputs] and their gradients are BF16.
    """
    m, k, n = tokens, layer.inputs, layer.outputs
    tensors = {"x": m * k, "w": n * k, "dy": m * n}
    sides = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
    outputs = {"fprop": m * n, "dgrad": m * k, "wgrad": n * k}

    # Per GEMM: its operands first, then the product, which reads both and writes BF16.
    kernels: list[Kernel] = []
    for gemm in GEMMS:
        spec = getattr(recipe, gemm)
        bits = BF16_BITS * outputs[gemm]
        # scales of 16x16 blocks are read once per row too, so the block shape does not matter here
        stored = CODE_BITS + SCALE_BITS if spec.quantized else BF16_BITS
        for operand, name in zip((spec.left, spec.right), sides[gemm], strict=True):
            shared = traffic.shared_reads and _read_before(recipe, gemm, name)
            kernels += _operand_kernels(operand, name, gemm, tensors[name], traffic, shared)
            bits += tensors[name] * stored
        kernels.append(Kernel(f"{gemm} GEMM", gemm, 2.0 * m * k * n, bits / 8, spec.quantized))
    return kernels


def _read_before(recipe: Recipe, gemm: str, tensor: str) -> bool:
    """Whether an earlier operand is quantised from the same tensor: dy for dgrad, x for fprop."""
    if gemm != "wgrad":
        return False
    spec = recipe.dgrad.left if tensor == "dy" else recipe.fprop.left
    right = recipe.wgrad.right
    return spec.quantized and (tensor == "dy" or right.source == "tensor")


def _operand_kernels(
    operand: Operand, tensor: str, gemm: str, elements: int, traffic: Traffic, shared: bool
) -> Iterator[Kernel]:
    """What makes one operand; ``shared``: of elements that are read for another copy anyway."""

    def kernel(what: str, read: float, written: float, again: float = 0.0) -> Kernel:
        scale = elements / 8
        return Kernel(f"{what} {tensor}", gemm, 0.0, (read + written) * scale, again=again * scale)

    # By where the operand comes from and what rounds it; reads and writes in bits per element.
    source = CODE_BITS + SCALE_BITS if operand.source == "decoded" else BF16_BITS

    # Codes that are kept need no rounding, only other places; MS-EDEN knows its range afterwards.
    if operand.source == "codes":
        yield kernel("transpose codes of", CODE_BITS, CODE_BITS)
    elif operand.quantizer is None:
        if operand.source == "decoded":
            yield kernel("decode", source, BF16_BITS)
    elif operand.quantizer == "ms_eden":
        yield kernel("rotate and round", 0.0 if shared else source, CODE_BITS + WIDE_SCALE_BITS)
        yield kernel("fix scales of", WIDE_SCALE_BITS, SCALE_BITS)
    else:
        written = CODE_BITS + SCALE_BITS / operand.static_options.block[0]
        looks_first = traffic.amax and not shared and not operand.static_options.row_scaled
        if looks_first:
            yield kernel("amax of", source, 0.0)
        read = 0.0 if shared else source
        yield kernel("round", read, written, again=source if looks_first else 0.0)


def step_seconds(
    recipe: Recipe, layers: Sequence[Layer], tokens: int, device: Device, traffic: Traffic = OURS
) -> dict[str, float]:
    """Predicted seconds of a forward and backward: {"fprop", "dgrad", "wgrad", "quantise"}."""
    total = dict.fromkeys((*GEMMS, QUANTISE), 0.0)
    for layer in layers:
        for kernel in layer_kernels(recipe, layer, tokens, traffic):
            total[kernel.gemm if kernel.flops else QUANTISE] += kernel.seconds(device)
    return total


def speedup(
    recipe: Recipe, layers: Sequence[Layer], tokens: int, device: Device, traffic: Traffic = OURS
) -> float:
    """Predicted: how many times faster than BF16 a forward and backward of these layers are."""
    bf16 = sum(step_seconds(RECIPES["bf16"], layers, tokens, device).values())
    return bf16 / sum(step_seconds(recipe, layers, tokens, device, traffic).values())


def overtakes(
    recipe: Recipe, layers: Sequence[Layer], device: Device, traffic: Traffic = OURS
) -> int | None:
    """The number of tokens from which the recipe is predicted to beat BF16; None: above 2^20.

    The gain is taken to grow with tokens once there is one: what the weight costs does not.
    """
    low, high = 0, 1
    while speedup(recipe, layers, high, device, traffic) <= 1:
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None

    # Between the last power of two that loses and the first that gains.
    while high - low > 1:
        middle = (low + high) // 2
        if speedup(recipe, layers, middle, device, traffic) <= 1:
            low = middle
        else:
            high = middle
    return high
