"""What a layer step should cost: each kernel that a recipe launches, and what bounds its time.

    layer_kernels    what a forward and backward launch, of each GEMM first its operands' kernels
    Kernel.terms     seconds that memory, tensor cores and each pipe of the multiprocessors take
    Kernel.seconds   the longest of them, and the launches
    step_seconds     the same by GEMM, and for quantising
    speedup          over BF16; ``overtakes``: from how many tokens there is any

A kernel's time is max(bytes / bandwidth, FLOPs / rate, instructions / issue rate): on data-centre
cards the last decides for all but the plainest rounding. Bytes follow from the recipe, instructions
are counted in code compiled for that card (``issue.py``), and the three shares of the peaks that
programs reach are the same for all kernels and cards: DRAM_SHARE and ISSUE_SHARE in ``devices.py``,
WARP_RATE in ``issue.py``. GEMMs run at the rate that others published for them on that card.

Counting bits per element shows where quantising spends its bytes. BF16 x to NVFP4 takes a reading
for the amax and one to round, and writes codes and scales: 16 + 16 + 4.5 = 36.5 bits. x^T from the
same readings adds 4.5, not another 36.5.

Nothing here is measured: every time is a prediction. It knows no waves of tiles, no bank conflicts
and no clocks below the card's boost; ``published.py`` holds it to what others measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nvfp4.backends.triton.quantize.policy import reads_once
from nvfp4.bench.devices import Device
from nvfp4.bench.issue import Counted, counted
from nvfp4.numerics.formats import NVFP4, TILE_BLOCK
from nvfp4.numerics.scaling import BYTE_STEPS, SEARCH_FACTORS
from nvfp4.recipes import GEMMS, RECIPES, Operand, Recipe

BF16_BITS = 16.0
CODE_BITS = 4.0
SCALE_BITS = 8 / NVFP4.block_size
CODED_BITS = CODE_BITS + SCALE_BITS
FLOAT_BITS = 32.0

PREDICTED = "predicted, not measured"
"""The words beside every number that comes from here."""

QUANTISE = "quantise"
HOST = "host"
QUARTET = "Quartet II"

HOST_BF16 = 117e-6
HOST_LAUNCH = 10e-6
"""Seconds of the host per layer, and per launch of a quantised one.

benchmarks/results/overhead.json: 117 us for BF16's forward and backward, 136 us more beside the
kernels for quartet2, of 14 launches. Measured with the CPU's kernels; no GPU was there.
"""
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


@dataclass(frozen=True)
class Traffic:
    """How kernels are cut, and whose they are.

    shared_reads: both copies of a tensor (x and x^T, dy and dy^T) are made in one reading. amax: of
    which tensors it is computed here, and not given, as in published benchmarks. kernels: whose
    instructions count, "ours", "Quartet II" or "" for nobody's, which leaves bytes.
    """

    name: str
    shared_reads: bool
    amax: frozenset[str]
    kernels: str = "ours"

    @property
    def wide_scale_bits(self) -> float:
        """Per element, of ms_eden's block scales before the tensor's range is known, until a second
        kernel makes E4M3 of them: BF16 in Quartet II's kernels, float32 in ours."""
        return (BF16_BITS if self.kernels == QUARTET else FLOAT_BITS) / NVFP4.block_size


OURS = Traffic("ours", shared_reads=True, amax=frozenset({"x", "w", "dy"}))
PUBLISHED = Traffic("Quartet II's kernels", False, amax=frozenset({"w"}), kernels=QUARTET)
"""45 bits per element of the gradient, 20.5 forward, 11 to quantise again.

arXiv 2601.22813, table 2 and its code; its script means to give both amaxes and gives that of x.
"""
OURS_AMAX_GIVEN = Traffic("ours, amax given", shared_reads=True, amax=frozenset())
"""29 bits per element of the gradient; to be held beside ``PUBLISHED``."""

MEMORY = "memory"
TENSOR_CORES = "tensor cores"
UNCOUNTED = "memory (not counted)"
"""Bound of a kernel whose instructions nobody counted for this card."""


@dataclass(frozen=True)
class Kernel:
    """One kernel; without FLOPs it moves data.

    gemm: "fprop", "dgrad" or "wgrad", for which it runs. fp4: whether its FLOPs are NVFP4's. again:
    of ``bytes``, those that the kernel before it read too; backwards: whether it begins where that
    ended, so that a part of them is still there. counted: its name in instructions.json,
    of ``elements``; "" for what is not ours to count. launches: with the small ones around it.
    """

    name: str
    gemm: str
    flops: float
    bytes: float
    fp4: bool = False
    again: float = 0.0
    backwards: bool = False
    counted: str = ""
    elements: float = 0.0
    launches: int = 1

    def counts(self, device: Device) -> Counted | None:
        """What was counted of it for this card."""
        if device.capability is None:
            return None
        return counted().get((self.counted, device.capability))

    def terms(self, device: Device) -> dict[str, float]:
        """Seconds by what takes them: memory, tensor cores, and pipes of the multiprocessors.

        What was read just before is free if it fills at most half of the L2 cache; backwards, half
        of that cache is free of anything larger.
        """
        half = device.l2 / 2
        cached = min(self.again, half) if self.backwards or self.again <= half else 0.0
        counts = self.counts(device)
        uncounted = self.counted and counts is None and device.capability is not None
        memory = UNCOUNTED if uncounted else MEMORY
        terms = {memory: (self.bytes - cached) / device.memory_rate}
        if self.flops:
            terms[TENSOR_CORES] = self.flops / device.gemm_rate(self.fp4)
        if counts is not None:
            terms |= {
                pipe: self.elements * cycles / device.issue_rate
                for pipe, cycles in counts.cycles().items()
            }
        return terms

    def bound(self, device: Device) -> str:
        """What decides its time."""
        terms = self.terms(device)
        return max(terms, key=lambda name: terms[name])

    def seconds(self, device: Device) -> float:
        """Predicted."""
        return max(self.terms(device).values()) + self.launches * device.launch


def layer_kernels(
    recipe: Recipe,
    layer: Layer,
    tokens: int,
    traffic: Traffic = OURS,
    decodes: bool = False,
    capability: int | None = None,
) -> list[Kernel]:
    """All kernels of a forward and backward: of each GEMM first those that make its operands.

    x [tokens, inputs], y [tokens, outputs] and their gradients are BF16. decodes: for a card
    without FP4 units, whose GEMMs read BF16 that the codes are decoded to, and apply the global
    scales themselves (``backends/cublaslt.py``). capability: of the card, which decides what reads
    x once.
    """
    m, k, n = tokens, layer.inputs, layer.outputs
    tensors = {"x": m * k, "w": n * k, "dy": m * n}
    sides = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
    outputs = {"fprop": m * n, "dgrad": m * k, "wgrad": n * k}

    # Per GEMM: its operands first, then the product, which reads both and writes BF16.
    kernels: list[Kernel] = []
    for gemm in GEMMS:
        spec = getattr(recipe, gemm)
        stored = CODED_BITS if spec.quantized and not decodes else BF16_BITS
        read = 0.0
        for operand, name in zip((spec.left, spec.right), sides[gemm], strict=True):
            elements = tensors[name]
            kernels += _operand_kernels(recipe, operand, name, gemm, elements, traffic, capability)
            if decodes and operand.quantized:
                coder = operand if operand.quantizer is not None else _forward(recipe, name)
                kernels.append(decode(coder, name, gemm, elements, with_global=False))
            # scales of 16x16 blocks are read once per row too, so the block shape does not matter
            read += elements * (stored if operand.quantized else BF16_BITS)

        made, quantized = outputs[gemm], spec.quantized
        flops, moved = 2.0 * m * k * n, (read + BF16_BITS * made) / 8
        # the two global scales are multiplied before each product; torch copies that for FP4 ones
        launches = 1 if not quantized else 2 if decodes else 3
        kernels.append(
            Kernel(f"{gemm} GEMM", gemm, flops, moved, quantized and not decodes, launches=launches)
        )
    if recipe.delays_amax:
        kernels.append(Kernel("end of the call", "wgrad", 0.0, 0.0))
    return kernels


def _operand_kernels(
    recipe: Recipe,
    operand: Operand,
    tensor: str,
    gemm: str,
    elements: int,
    traffic: Traffic,
    capability: int | None,
) -> Iterator[Kernel]:
    """What makes one operand, or both copies of its tensor if they are made at once."""
    pair = _made_at_once(recipe, tensor) if traffic.shared_reads else None
    if pair is not None and operand.source == "tensor" and tensor != "w":
        if gemm != "wgrad":
            yield from both(*pair, tensor, gemm, elements, traffic, capability)
        return
    if operand.source == "codes":
        what = f"transpose codes of {tensor}"
        yield _mover(what, gemm, elements, 2 * CODE_BITS, "transpose_kernel")
    elif operand.quantizer is None:
        if operand.source == "decoded":
            coder = _forward(recipe, tensor)
            yield decode(coder, tensor, gemm, elements, with_global=True)
    else:
        yield from alone(operand, tensor, gemm, elements, traffic)


def _made_at_once(recipe: Recipe, tensor: str) -> tuple[Operand, Operand] | None:
    """The operands of a tensor's two copies, if the layer makes both in one call.

    A search is bound by arithmetic, so that the kernels of each copy are launched apart.
    """
    first = recipe.dgrad.left if tensor == "dy" else recipe.fprop.left
    second = recipe.wgrad.left if tensor == "dy" else recipe.wgrad.right
    whole = first.quantizer is not None and second.quantizer is not None
    if not whole or second.source != "tensor":
        return None
    searches = first.static_options.search or second.static_options.search
    return None if searches else (first, second)


def _mover(
    what: str,
    gemm: str,
    elements: int,
    bits: float,
    name: str,
    again: float = 0.0,
    backwards: bool = False,
) -> Kernel:
    """A kernel without FLOPs. bits: per element, and of them ``again`` that were read just before.

    name: in instructions.json.
    """
    moved, cached = bits * elements / 8, again * elements / 8
    return Kernel(
        what, gemm, 0.0, moved, again=cached, backwards=backwards, counted=name, elements=elements
    )


def _looks(operand: Operand) -> bool:
    """Whether a pass before the rounding one looks for the amax.

    A delayed one is noted by the pass that rounds, from maxima that it has: taken to cost nothing.
    """
    return operand.quantizer != "ms_eden" and not operand.delayed_amax


def both(
    rows: Operand,
    columns: Operand,
    tensor: str,
    gemm: str,
    elements: int,
    traffic: Traffic,
    capability: int | None = None,
) -> Iterator[Kernel]:
    """Kernels that read a tensor once for both copies, or twice where ours are quicker so."""
    ours = traffic.kernels == "ours"
    rules = str(rows.quantizer), str(columns.quantizer)
    on_tensor_cores = _sums_on_tensor_cores(rows) and _sums_on_tensor_cores(columns)
    apart = capability is not None and not reads_once(*rules, capability)
    if ours and apart and not on_tensor_cores:
        yield from alone(rows, tensor, gemm, elements, traffic, down=False)
        yield from alone(columns, tensor, gemm, elements, traffic, down=True)
        return

    label = f"{rule_label(rows)} and {rule_label(columns)}^T of bfloat16"
    looks = any(map(_looks, (rows, columns))) and tensor in traffic.amax
    if looks:
        name = f"amax_both_kernel: {label}" if ours else ""
        if ours and all(_is_bare(each) for each in (rows, columns)):
            name = f"amax_kernel: {rule_label(rows)} of bfloat16"
        yield _mover(f"amax of both {tensor}", gemm, elements, BF16_BITS, name)

    bits = BF16_BITS + sum(CODE_BITS + _scale_bits(each, traffic) for each in (rows, columns))
    name = f"quantize_both_kernel: {label}" if ours else ""
    if ours and on_tensor_cores:
        name = "mma_eden_kernel: both of bfloat16"
    again = BF16_BITS if looks else 0.0
    yield _mover(f"round both {tensor}", gemm, elements, bits, name, again, ours)
    for each in (rows, columns):
        if each.quantizer == "ms_eden":
            yield _finish(tensor, gemm, elements, traffic)


def _is_bare(operand: Operand) -> bool:
    """Whether its amax is that of the tensor's elements."""
    options = operand.static_options
    return operand.quantizer != "ms_eden" and options.rotation is None and not options.row_scaled


def alone(
    operand: Operand,
    tensor: str,
    gemm: str,
    elements: int,
    traffic: Traffic,
    down: bool | None = None,
) -> Iterator[Kernel]:
    """Kernels that make one copy of a tensor, of BF16 or of codes.

    down: whether the contraction runs down the tensor's columns; None: as the GEMM has it.
    """
    coded = operand.source == "decoded"
    read = CODED_BITS if coded else BF16_BITS
    if down is None:
        down = gemm == "wgrad" or (gemm == "dgrad" and tensor == "w")
    source = "codes" if coded else "bfloat16^T" if down else "bfloat16"
    label = f"{rule_label(operand)} of {source}"
    looks = _looks(operand) and tensor in traffic.amax
    if looks:
        name = f"amax_kernel: {label}" if traffic.kernels == "ours" else ""
        yield _mover(f"amax of {tensor}", gemm, elements, read, name)

    bits = read + CODE_BITS + _scale_bits(operand, traffic)
    name = _rounding_kernel(operand, label, down, traffic.kernels)
    if traffic.kernels == "ours" and _sums_on_tensor_cores(operand):
        name = f"mma_eden_kernel: {source}"
    what = "rotate and round" if operand.quantizer == "ms_eden" else "round"
    again, backwards = read if looks else 0.0, traffic.kernels == "ours"
    yield _mover(f"{what} {tensor}", gemm, elements, bits, name, again, backwards)
    if operand.quantizer == "ms_eden":
        yield _finish(tensor, gemm, elements, traffic)


def _sums_on_tensor_cores(operand: Operand) -> bool:
    """Whether its rotation is one that csrc/cuda/mma_eden.cu sums on tensor cores."""
    options = operand.static_options
    whole_groups = options.rounds == 1 and options.group == 128 and not options.search
    return options.summation == "tensor_core" and whole_groups


def _rounding_kernel(operand: Operand, label: str, down: bool, kernels: str) -> str:
    """The name of the kernel that makes one copy, in the tables of counts."""
    if kernels == "ours":
        return f"quantize_kernel: {label}"
    if kernels != QUARTET:
        return ""
    if operand.quantizer != "ms_eden":
        return f"{QUARTET}: four_six_fp4_kernel"
    if operand.source == "decoded":
        return f"{QUARTET}: rht128_requant_kernel"
    return f"{QUARTET}: rht128_eden_tma_kernel, {'transposed' if down else 'rows'}"


def _scale_bits(operand: Operand, traffic: Traffic) -> float:
    """Bits per element of the block scales that the rounding kernel writes."""
    if operand.quantizer == "ms_eden":
        return traffic.wide_scale_bits
    return SCALE_BITS / operand.static_options.block[0]


def _finish(tensor: str, gemm: str, elements: int, traffic: Traffic) -> Kernel:
    """The end of ms_eden: block scales as E4M3."""
    names = {"ours": "finish_kernel: ms_eden, row-major scales"}
    name = names.get(traffic.kernels, f"{QUARTET}: eden_convert_scales_kernel")
    bits = traffic.wide_scale_bits + SCALE_BITS
    return _mover(f"fix scales of {tensor}", gemm, elements, bits, name)


def decode(coder: Operand, tensor: str, gemm: str, elements: int, with_global: bool) -> Kernel:
    """Codes to BF16. coder: the operand that made them."""
    options = coder.static_options
    scaled = "rows" if options.row_scaled and with_global else "tensor"
    label = f"{scaled} of {options.block[0]}x16 to bfloat16{'' if with_global else ', no global'}"
    bits = CODED_BITS + BF16_BITS
    return _mover(f"decode {tensor}", gemm, elements, bits, f"decode_kernel: {label}")


def _forward(recipe: Recipe, tensor: str) -> Operand:
    """The operand of fprop that codes of a tensor come from."""
    return recipe.fprop.left if tensor == "x" else recipe.fprop.right


def rule_label(operand: Operand) -> str:
    """How instructions.json names the rule of an operand: "sr_te_rotation=nvidia"."""
    options = operand.static_options
    words = [str(operand.quantizer)]
    if options.row_scaled:
        words.append("row_scaled=True")
    if operand.quantizer != "rtn_2d" and options.block == TILE_BLOCK:
        words.append("block=tile")
    rotation = options.rotation
    if operand.quantizer == "ms_eden" and rotation is not None:
        words.append(f"rounds={rotation.rounds}")
    elif rotation is not None:
        turn = "nvidia" if rotation.fixed else f"{rotation.group}x{rotation.rounds}"
        words.append(f"rotation={turn}")
    if options.candidates != BYTE_STEPS:
        words.append(f"candidates={options.candidates}")
    if options.search:
        words.append("search=True")
    if options.factors != SEARCH_FACTORS:
        words.append(f"factors={options.factors}")
    return "_".join(words)


def step_seconds(
    recipe: Recipe, layers: Sequence[Layer], tokens: int, device: Device, traffic: Traffic = OURS
) -> dict[str, float]:
    """Predicted seconds of a forward and backward, by part.

    {"fprop", "dgrad", "wgrad", "quantise", "host"}: the last is what the card waits for the
    processor, where a layer's kernels take less than their launches do.
    """
    total = dict.fromkeys((*GEMMS, QUANTISE, HOST), 0.0)
    for layer in layers:
        kernels = layer_kernels(recipe, layer, tokens, traffic, device.decodes, device.capability)
        busy = 0.0
        for kernel in kernels:
            seconds = kernel.seconds(device)
            total[kernel.gemm if kernel.flops else QUANTISE] += seconds
            busy += seconds
        if device.capability is not None:
            total[HOST] += max(host_seconds(recipe, kernels) - busy, 0.0)
    return total


def host_seconds(recipe: Recipe, kernels: Sequence[Kernel]) -> float:
    """What Python and torch take for a layer's forward and backward, on one thread."""
    launches = sum(kernel.launches for kernel in kernels)
    return HOST_BF16 + (HOST_LAUNCH * launches if recipe.quantized else 0.0)


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
