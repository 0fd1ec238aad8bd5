"""The Triton backend: one family of kernels for every NVIDIA GPU, equal to the reference to the last bit.

Nothing here waits for the device, so everything can be captured in a CUDA graph; launches go to the current stream.
Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, to be tested and debugged, and only when named.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nvfp4.backends.base import Backend, Operation, reads_swizzled
from nvfp4.backends.reference import reference_matmul
from nvfp4.numerics.activations import Activation
from nvfp4.numerics.formats import NVFP4, TILE_BLOCK
from nvfp4.numerics.layout import swizzled_bytes
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed, Seed
from nvfp4.quantizers.base import Options, Quantizer

try:
    from triton import next_power_of_2

    from nvfp4.backends.triton.activation import launch as fused
    from nvfp4.backends.triton.arithmetic import INTERPRETED
    from nvfp4.backends.triton.gemm.decoded import contract, pays, scaled
    from nvfp4.backends.triton.gemm.launch import gemm, tensor_cores
    from nvfp4.backends.triton.launch import launch
    from nvfp4.backends.triton.quantize import kernels
    from nvfp4.backends.triton.quantize.rules import RULES, SEARCHES, Coded, Policy, Tile, scaled_by_amax
    from nvfp4.backends.triton.transpose import transpose

    _scaled_by_amax = lru_cache(maxsize=None)(scaled_by_amax)  # called on the host, it takes 10 us
    _MISSING = None
except ImportError as error:
    _MISSING = f"triton does not load: {error}; install triton>=3.6"
    INTERPRETED = False

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISY = ("sr", "sr_te")
"""The rules that draw a number for each element."""


def tile_along(policy: Policy) -> Tile:
    """For operands whose rows are contiguous: a thread reads 16 bytes of BF16 at once and holds whole blocks, a quarter
    of a rotation group of 128, or one block alone where candidates are compared."""
    if policy.search or policy.rule in SEARCHES:
        return Tile(16, 128, False, 8, 2, 4)
    wide = policy.group == 128 and bool(policy.round_scales)
    return Tile(16, 256, False, 32, 4, 4) if wide else Tile(16, 256, False, 8, 2, 4)


def tile_down(policy: Policy, coded: bool = False) -> Tile:
    """For operands whose columns are contiguous: whole blocks in a thread, whole rotation groups in a warp. With 128
    columns, groups of 16 would take 168 registers, and sr of codes spill on sm_100; groups of 128 take half the rows
    if the source is ``coded``, for the same reason."""
    if policy.search or policy.rule in SEARCHES:
        return Tile(max(8, policy.tile), 128, True, 2, 1, 2 if policy.tile == 16 else 1)
    if policy.round_scales:
        small = policy.group == 16
        return Tile(8 if coded and not small else 16, 64 if small else 128, True, 4, 1, 1)
    return Tile(32, 128, True, 4, 1, 2)


def tiles_of_both(rows: Policy, columns: Policy) -> tuple[Tile, Tile]:
    """The same elements as a tile of x and of x^T, holding whole groups and tiles of both.

    Two groups of 128 go on twice the warps, or they would need 256 registers a thread; and so do two roundings by
    noise, which with the rotation of one of them spill 48 bytes a thread where Triton 3.6 compiles for sm_90.
    """
    height, width = max(columns.group, 32), max(rows.group, 64)
    along, down = tile_along(rows), tile_down(columns)
    crowded = height == width == 128 or (rows.rule in NOISY and columns.rule in NOISY)
    warps = height * width // (32 * 16 * down.run) * (2 if crowded else 1)
    return (
        Tile(height, width, False, min(along.run, width), along.pieces, warps),
        Tile(width, height, True, down.run, 1, warps),
    )


def converts(capability: int) -> bool:
    """Whether a card of this compute capability (90, 120, ...) rounds float32 to E2M1 by itself."""
    return capability in (100, 103, 120, 121)


def tiles_of_activation(rows: Policy, columns: Policy | None, gated: bool) -> tuple[Tile, Tile | None]:
    """``tile_along`` or ``tiles_of_both`` where the elements are computed first, which takes registers: on more
    warps."""
    if columns is None:
        return tile_along(rows), None
    across, down = tiles_of_both(rows, columns)
    warps = min(across.warps * (16 if gated else 4), 16)  # 512 threads
    return across._replace(warps=warps), down._replace(warps=warps)


PEAK_UNIT = 4
"""Peaks in 16 bytes: what Triton asks of an aligned pointer."""
DECODING = (16, 256, 4)
SCALES = (16, 64, 4)
"""Rows, columns and warps for decoding, and for kernels on block scales."""


def _programs(shape: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """How many a matrix in tiles of [tile[0], tile[1]] takes, all on the first axis, which alone takes 2^31 of them."""
    return -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])


class _Source(NamedTuple):
    """Arguments of ``load_tile``: an operand in memory."""

    x: torch.Tensor
    scale: torch.Tensor | None
    global_scale: torch.Tensor | None
    rows: int
    columns: int
    stride_row: int
    stride_column: int

    @classmethod
    def dense(cls, x: torch.Tensor) -> _Source:
        return cls(x, None, None, *x.shape, *x.stride())

    @classmethod
    def transposed_codes(cls, q: QTensor) -> _Source:
        codes, block_scale, global_scale = (t.contiguous() for t in q.tensors)
        return cls(codes, block_scale, global_scale, q.contraction, q.rows, 1, codes.shape[1])


class _Target:
    """The result a kernel fills, and what it needs beside it. peak: int32 zeros like the global scale, if there are
    some already. amax: float32 like the global scale, if it is known. single: whether one orientation is made alone."""

    def __init__(
        self,
        shape: tuple[int, ...],
        quantizer: Quantizer,
        options: Options,
        device: torch.device,
        peak: torch.Tensor | None = None,
        amax: torch.Tensor | None = None,
        single: bool = True,
    ) -> None:
        self.policy = _policy(quantizer, options, _converts(device))
        self.scaled_by_amax = _scaled_by_amax(self.policy.rule)
        self.q = QTensor.empty(shape, options.block, options.row_scaled, options.rotation, device)
        self.codes = self.q.codes.view(torch.int32)
        self.padded = self.q.padded_contraction
        if amax is not None:
            peak = amax.contiguous().view(torch.int32)
        self.peak = torch.zeros(self.q.global_scale.shape, dtype=torch.int32, device=device) if peak is None else peak
        self.scale = self.q.block_scale
        if not self.scaled_by_amax:
            self.scale = torch.empty(self.scale.shape, dtype=torch.float32, device=device)
        # kernels of both orientations write none, but the rules that finish later can
        if reads_swizzled(device) and (single or not self.scaled_by_amax):
            size = swizzled_bytes(self.q.rows, self.padded // NVFP4.block_size)
            self.q = replace(self.q, swizzled_scale=torch.zeros(size, dtype=torch.uint8, device=device))
        self.amax_known = amax is not None
        self.seed = seed_arguments(options.seed)
        self.signs = seed_arguments(None if options.rotation is None else options.rotation.sign_seed)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """peak, codes, block scale, global scale, as the kernels take them."""
        return self.peak, self.codes, self.scale, self.q.global_scale

    def finish(self) -> QTensor:
        """The result; for rules that scale by what came out, their scales are made now."""
        if not self.scaled_by_amax:
            shape = self.scale.shape
            rows, columns, warps = SCALES
            results = (self.q.block_scale, self.q.global_scale, self.q.swizzled_scale)
            tensors = (self.scale, self.peak, self.codes, *results)
            arguments = (*tensors, *shape, *self.seed)
            launch(kernels.finish_kernel, _programs(shape, SCALES), arguments, (rows, columns), warps=warps)
        return self.q


class TritonBackend(Backend):
    """Quantises and decodes without FP8 or FP4 hardware, multiplies in FP4 where there is some, on NVIDIA GPUs."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if device.type == "cpu":
            return None if INTERPRETED else "it runs on cuda, and on the cpu only under TRITON_INTERPRET=1"
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "there is no NVIDIA GPU that torch can use"
        return None

    def automatic(self, device: torch.device) -> bool:
        return not INTERPRETED

    def refuses(
        self, operation: Operation, quantizer: Quantizer | None = None, options: Options | None = None
    ) -> str | None:
        if operation == "quantize" and quantizer is not None and quantizer.name not in RULES:
            return f"it has no kernel for {quantizer.name}"
        return None

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        if x.numel() == 0:
            return quantizer.quantize(x, options)
        return self._quantize(_Source.dense(x), None, _Target(tuple(x.shape), quantizer, options, x.device))

    def quantize_with_amax(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, amax: torch.Tensor
    ) -> QTensor:
        target = _Target(tuple(x.shape), quantizer, options, x.device, amax=amax)
        return self._quantize(_Source.dense(x), None, target)

    def quantize_both(
        self, x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
    ) -> tuple[QTensor, QTensor]:
        if x.numel() == 0 or rows[1].search or columns[1].search:  # a search is bound by arithmetic, not by reading x
            return super().quantize_both(x, rows, columns)
        across, down = _two_targets(x, rows, columns)
        policies = (across.policy, down.policy)
        tiles = tiles_of_both(*policies)
        programs, constants = _programs(tuple(x.shape), tiles[0]), (*policies, *tiles)
        matrix = (x, *x.shape, *x.stride())
        with _on(x.device):
            if across.scaled_by_amax or down.scaled_by_amax:
                peaks = (across.peak, *across.signs, down.peak, *down.signs)
                launch(kernels.amax_both_kernel, programs, (*matrix, *peaks), constants, warps=tiles[0].warps)
            operands = [value for t in (across, down) for value in (*t.stored, t.padded, *t.seed, *t.signs)]
            launch(kernels.quantize_both_kernel, programs, (*matrix, *operands), constants, warps=tiles[0].warps)
            return across.finish(), down.finish()

    def quantize_activation(
        self,
        activation: Activation,
        rows: tuple[Quantizer, Options],
        columns: tuple[Quantizer, Options] | None = None,
    ) -> tuple[QTensor, QTensor | None]:
        x = activation[0]
        if x.numel() == 0:
            return super().quantize_activation(activation, rows, columns)
        if columns is None:
            across, down = _Target(tuple(x.shape), *rows, x.device, single=False), None
        else:
            across, down = _two_targets(x, rows, columns)
        with _on(x.device):
            fused.fill(activation, across, down, tiles_of_activation)
            return across.finish(), None if down is None else down.finish()

    def activation_gradients(self, activation: Activation, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if dy.numel() == 0:
            return super().activation_gradients(activation, dy)
        with _on(dy.device):
            return fused.gradients(activation, dy)

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        if q.rotation is not None or q.codes.numel() == 0 or len(q.shape) != 2:
            return super().requantize(q, quantizer, options)
        target = _Target((q.contraction, q.rows), quantizer, options, q.device)
        return self._quantize(_Source.transposed_codes(q), Coded.of(q), target)

    def _quantize(self, source: _Source, coded: Coded | None, target: _Target) -> QTensor:
        down = coded is not None or source.stride_row == 1 != source.stride_column
        tile = tile_down(target.policy, coded is not None) if down else tile_along(target.policy)
        programs = _programs((source.rows, source.columns), tile)
        constants = (target.policy, coded, tile)
        with _on(source.x.device):
            if target.scaled_by_amax and not target.amax_known:
                peak = (target.peak, *target.signs)
                launch(kernels.amax_kernel, programs, (*source, *peak), constants, warps=tile.warps)
            swizzled = target.q.swizzled_scale if target.scaled_by_amax else None
            operands = (*target.stored, swizzled, target.padded, *target.seed, *target.signs)
            launch(kernels.quantize_kernel, programs, (*source, *operands), constants, warps=tile.warps)
            return target.finish()

    def transpose(self, q: QTensor) -> QTensor:
        if q.block != TILE_BLOCK or q.rotation is not None or len(q.shape) != 2 or q.codes.numel() == 0:
            return super().transpose(q)
        with _on(q.device):
            return transpose(q)

    def draw_seeds(self, words: torch.Tensor, rank: int, gemms: int) -> torch.Tensor:
        seeds = torch.empty(gemms, 3, dtype=torch.int64, device=words.device)
        with _on(words.device):
            launch(kernels.seeds_kernel, 1, (words, seeds, rank), (gemms, next_power_of_2(gemms)), warps=1)
        return seeds

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> torch.Tensor:
        if q.rotation is not None or dtype not in DTYPES or q.codes.numel() == 0:
            return q.dequantize(dtype)
        lead = [size for i, size in enumerate(q.shape) if i != q.axis % len(q.shape)]
        out = self._decode(q, q.contraction, dtype, with_global=True)
        return out.view(*lead, q.contraction).movedim(-1, q.axis)

    def decode_blocks(self, q: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """e2m1 * block_scale without the global scale, [M, Kp]: exact in BF16, FP16 and float32 alike."""
        return self._decode(q, q.padded_contraction, dtype, with_global=False)

    def _decode(self, q: QTensor, columns: int, dtype: torch.dtype, with_global: bool) -> torch.Tensor:
        codes, block_scale, global_scale = (t.contiguous() for t in q.tensors)
        out = torch.empty(q.rows, columns, dtype=dtype, device=q.device)
        tile_rows, tile_columns, warps = DECODING
        tensors = (codes, block_scale, global_scale if with_global else None, out)
        arguments, constants = (*tensors, q.rows, columns, codes.shape[1]), (Coded.of(q), tile_rows, tile_columns)
        with _on(q.device):
            launch(kernels.decode_kernel, _programs((q.rows, columns), DECODING), arguments, constants, warps=warps)
        return out

    def matmul(self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
        if a.codes.numel() == 0 or b.codes.numel() == 0:
            return reference_matmul(a.decode_blocks(), b.decode_blocks(), a, b, out_dtype, bias)
        if pays(a.rows, b.rows, a.padded_contraction, tensor_cores(a.device)):
            return self.matmul_decoded(a, b, out_dtype, bias)
        return gemm(a, b, out_dtype, bias)

    def matmul_decoded(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``matmul`` of operands decoded in memory, 2 bytes an element of them and 4 of the product for its duration;
        ``gemm`` decodes in registers, as often as a tile of the product needs an element."""
        with _on(a.device):
            return scaled(contract(self.decode_blocks(a), self.decode_blocks(b)), a, b, out_dtype, bias)


def seed_arguments(seed: Seed | None) -> fused.SeedArguments:
    """A seed as two arguments of a kernel: its halves, or where on the device it lies."""
    return (seed.bits, None) if isinstance(seed, DeviceSeed) else halves(seed or 0)


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed, each as a signed number, so that every seed has the same type."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return (low ^ 1 << 31) - (1 << 31), (high ^ 1 << 31) - (1 << 31)


def _two_targets(
    x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
) -> tuple[_Target, _Target]:
    """What x and x^T are quantised into; the peaks of both come out of one allocation, aligned alike."""
    shapes = (tuple(x.shape), (x.shape[1], x.shape[0]))
    counts = [shape[0] if how[1].row_scaled else 1 for shape, how in zip(shapes, (rows, columns), strict=True)]
    start = -(-counts[0] // PEAK_UNIT) * PEAK_UNIT
    peaks = torch.zeros(start + counts[1], dtype=torch.int32, device=x.device)
    return (
        _Target(shapes[0], *rows, x.device, peak=peaks[: counts[0]], single=False),
        _Target(shapes[1], *columns, x.device, peak=peaks[start:], single=False),
    )


def _policy(quantizer: Quantizer, options: Options, converts: bool) -> Policy:
    """``Policy.of``, remembered by all that it depends on, which no seed is part of."""
    turn = options.rotation
    turned = None if turn is None else (turn.group, turn.rounds, turn.fixed)
    key = (quantizer.name, options.block, options.row_scaled, options.metric, options.search, turned, converts)
    policy = _POLICIES.get(key)
    if policy is None:
        policy = _POLICIES[key] = Policy.of(quantizer, options, converts)
    return policy


_POLICIES: dict[tuple[Any, ...], Policy] = {}


@lru_cache(maxsize=64)
def _converts(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return converts(10 * major + minor)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; make that the one the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(device)


_ALREADY = nullcontext()
