"""The cuBLASLt backend: NVFP4 GEMMs through ``torch.nn.functional.scaled_mm``, on Blackwell.

    codes a [M, Kp/2], b [N, Kp/2]   filled up to 32 codes and (b) 16 rows with zeros
    block scales                     swizzled: those that the quantiser wrote, or made here by one
                                     kernel and kept
    global scales                    inside (16-bit output, one each) or afterwards, by a kernel
    -> y [M, N]

It only multiplies; quantising is left to the others.

What is exact and what is not. float32 output, and every product with row scales, is the contraction
alone, multiplied by the global scales afterwards in their order: the bits of the definition, up to
the order and the rounding of the sum. 16-bit output hands both scales to cuBLASLt, which multiplies
by fl(global_a * global_b). That saves a float32 matrix that would be written and read three times
(predicted, not measured: on B200 longer than the GEMM itself at 4096^3); it costs one float32
rounding, 2^-16 of a BF16 one, and bits of results whose global_a * global_b lies below 2^-126.
Nothing here has run on a GPU of its kind so far; what a card makes of it is checked at first use
(``selfcheck.py``).

Where both scales may go inside. torch (all versions that have this function, 2.10 to 2.13) hands
their product to cuBLASLt through one buffer of four bytes: ``get_user_alpha_ptr``, allocated once
in a process, on the device that is current then, and written before each such product
(``BLASConstants.cu``, ``CUDABlas.cpp``). On one stream writing and reading take turns. Two streams,
or two graphs replayed side by side, would exchange their scales without any error; another GPU
would read the first one's memory; and a first use within a capture would allocate. So it is left
alone but on the default stream of one device, outside of captures: ``SharedAlpha``. Everywhere else
the contraction is asked for alone and one kernel of ours does the rest, to the bits of the
definition; so a 16-bit product of a captured graph may differ in its last bit from the same product
outside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from nvfp4.backends.base import Backend
from nvfp4.backends.reference import apply_globals, reference_matmul
from nvfp4.numerics.formats import NVFP4, ROW_BLOCK
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.layout import SWIZZLED_MAJORS, TILE_COLUMNS, TILE_ROWS, swizzle
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import spread
from nvfp4.numerics.torch_state import is_capturing
from nvfp4.quantizers.base import Options, Quantizer

try:
    from nvfp4.backends.triton.gemm.decoded import scaled
    from nvfp4.backends.triton.launch import on
    from nvfp4.backends.triton.swizzled import swizzled_scale
except ImportError:  # there is no Triton
    scaled = swizzled_scale = None  # type: ignore[assignment]

GROUPED_MAJORS = (10,)
"""Those that ``scaled_grouped_mm`` accepts for FP4 (and 9, which has no FP4)."""

CONTRACTION_UNIT = 32
"""Bytes of a row of codes must be a multiple of 16: checked by torch's ``_scaled_mm_v2``."""

COLUMN_UNIT = 16
"""Columns of the result (rows of b) must be a multiple of this: checked there too."""


class SharedAlpha:
    """torch's one buffer for the product of two global scales, of this process.

    device: where we used it first, and where it therefore lies, unless somebody else's NVFP4
    products came before ours.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, device: torch.device) -> Iterator[bool]:
        """Whether a product enqueued within may go through the buffer.

        No other thread enqueues one meanwhile.
        """
        if device.type != "cuda":
            yield True  # stand-ins of tests, which have no such buffer
            return
        with self._lock:
            yield self._is_ours(device)

    def _is_ours(self, device: torch.device) -> bool:
        """The default stream of the one device where the buffer lies, outside of captures."""
        if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
            return False
        if is_capturing():
            return False
        if self.device is None:
            self.device = device
        return self.device == device


ALPHA = SharedAlpha()


class ScaledMmBackend(Backend):
    """Products by torch's ``scaled_mm`` and ``scaled_grouped_mm``, or by stand-ins in tests."""

    name = "scaled_mm"
    operations = ("matmul", "grouped_matmul")
    scope = "it only multiplies"

    def __init__(
        self,
        scaled_mm: Callable[..., torch.Tensor] | None = None,
        scaled_grouped_mm: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self._mm = scaled_mm or getattr(F, "scaled_mm", None)
        self._grouped_mm = scaled_grouped_mm or getattr(F, "scaled_grouped_mm", None)
        self._swizzled: WeakKeyDictionary[object, tuple[int, torch.Tensor]] = WeakKeyDictionary()

    def unavailable(self, device: torch.device) -> str | None:
        """Why not: a torch before 2.10, another device, or a GPU without FP4 units."""
        if self._mm is None:
            return (
                f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; it came with 2.10"
            )
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "there is no NVIDIA GPU that torch can use"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in SWIZZLED_MAJORS:  # torch itself lets Hopper through, to fail late
            return (
                f"compute capability {major}.{minor} has no FP4 units that cuBLASLt knows; it "
                "needs 10.x or 12.x"
            )
        return None

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """NotImplementedError: it only multiplies."""
        raise NotImplementedError("the scaled_mm backend only multiplies")

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """NotImplementedError, as ``quantize``."""
        raise NotImplementedError("the scaled_mm backend only multiplies")

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One GEMM of cuBLASLt, with the global scales inside or after it (head of the file)."""
        if a.codes.numel() == 0 or b.codes.numel() == 0:
            return reference_matmul(a.decode_blocks(), b.decode_blocks(), a, b, out_dtype, bias)

        # both global scales inside, if the buffer is free and nobody sees how they are applied
        if _may_scale_inside(a, b, out_dtype) and (bias is None or bias.dtype == out_dtype):
            with ALPHA.lent(a.device) as lent:
                if lent:
                    ragged = -b.rows % COLUMN_UNIT
                    if bias is not None and ragged:  # a pad of nothing is a copy
                        bias = F.pad(bias, (0, ragged))
                    return self._product(a, b, out_dtype, bias, inside=True)

        # the contraction alone, and then the bits of the definition
        return _finished(
            self._product(a, b, torch.float32, None, inside=False), a, b, out_dtype, bias
        )

    def _product(
        self, a: QTensor, b: QTensor, dtype: torch.dtype, bias: torch.Tensor | None, inside: bool
    ) -> torch.Tensor:
        """a b^T, [a.rows, b.rows] of ``dtype``, without the global scales.

        inside: cuBLASLt applies these, too, and adds the bias, which is padded already.
        """
        assert self._mm is not None

        # torch wants the second operand as [Kp, N], whose columns are contiguous: b's rows
        y = self._mm(
            _codes(a),
            _codes(b, COLUMN_UNIT).t(),
            self._scales(a, inside),
            _recipe(inside),
            self._scales(b, inside),
            _recipe(inside),
            _swizzles(inside),
            _swizzles(inside),
            bias=bias,
            output_dtype=dtype,
        )
        return y[:, : b.rows].contiguous()

    def grouped_matmul(
        self,
        a: GroupedQTensor,
        b: GroupedQTensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One launch of torch's grouped GEMM where it takes the groups, else one per group."""
        if not self._fits_grouped(a, b, out_dtype, bias):
            return super().grouped_matmul(a, b, out_dtype, bias)
        assert self._grouped_mm is not None
        assert a.groups is not None

        # codes of all rows as they lie, where each group ends, and scales of each group in tiles of
        # its own: nobody waits for the device
        blocks = -(-a.padded_contraction // NVFP4.block_size // TILE_COLUMNS) * TILE_COLUMNS
        return self._grouped_mm(
            _filled(a.codes).view(torch.float4_e2m1fn_x2),
            _filled(b.codes).view(torch.float4_e2m1fn_x2).transpose(1, 2),
            [_scales_in_tiles(a.block_scale, a.groups).view(-1, blocks), a.global_scale],
            _recipe(True),
            [self._stacked_scale(b), b.global_scale],
            _recipe(True),
            _swizzles(True),
            _swizzles(True),
            offs=a.groups.offsets[1:],
            output_dtype=torch.bfloat16,
        )

    def _fits_grouped(
        self,
        a: GroupedQTensor,
        b: GroupedQTensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> bool:
        """Whether torch's grouped GEMM takes it.

        It takes BF16 output, a's that differ in rows alone and b's that are alike, no bias, on its
        hardware. An empty group among others is its own affair: the self-check has one.
        """
        if self._grouped_mm is None or a.count < 2 or out_dtype != torch.bfloat16:
            return False

        # stand-ins of tests run elsewhere
        device = a.device
        if (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] not in GROUPED_MAJORS
        ):
            return False
        plain = not a.row_scaled and not b.row_scaled and a.block == ROW_BLOCK and bias is None
        fits = a.ragged == "rows" and b.ragged is None and b.rows % COLUMN_UNIT == 0
        return plain and fits and a.rows > 0 and a.padded_contraction > 0

    def _stacked_scale(self, q: GroupedQTensor) -> torch.Tensor:
        """Block scales of a stack, each group's swizzled by itself: [E, bytes]; kept as for one."""
        kept = None if is_capturing(q.device) else self._swizzled.get(q)
        if kept is None or kept[0] != q.block_scale._version:
            scale = q.block_scale.repeat_interleave(q.block[0], dim=1)[:, : q.rows]
            tiles = F.pad(scale, (0, 0, 0, -q.rows % TILE_ROWS)).flatten(0, 1)
            made = swizzle(tiles).view(q.count, -1).view(torch.float8_e4m3fn)
            if is_capturing(q.device) or q.block_scale.is_inference():
                return made
            kept = self._swizzled[q] = (q.block_scale._version, made)
        return kept[1]

    def _scales(self, q: QTensor, with_global: bool) -> list[torch.Tensor]:
        """The scales of an operand as torch lists them, coarser ones last."""
        return [self._scale(q), q.global_scale] if with_global else [self._scale(q)]

    def _scale(self, q: QTensor) -> torch.Tensor:
        """Block scales, one per row and block, swizzled by the quantiser on the way, or here.

        What is made here is kept as long as q lives, so that a weight's scales are swizzled once.
        """
        if (ready := _ready_scale(q)) is not None:
            return ready

        # a graph must swizzle at every replay, and keeps nothing
        capturing = is_capturing(q.device)
        kept = None if capturing else self._swizzled.get(q)
        if kept is None or kept[0] != q.block_scale._version:
            made = _swizzled(q).view(torch.float8_e4m3fn)
            if capturing or q.block_scale.is_inference():
                return made
            kept = self._swizzled[q] = (q.block_scale._version, made)
        return kept[1]


def _swizzled(q: QTensor) -> torch.Tensor:
    """q's block scales, one per row and block, swizzled: by a kernel of Triton's, or by PyTorch."""
    if launches(q.device) and swizzled_scale is not None:
        return swizzled_scale(q)
    return swizzle(spread(q.block_scale, q.block, q.rows))


def launches(device: torch.device) -> bool:
    """Whether kernels of Triton's can follow on a device; not where stand-ins of tests run."""
    return device.type == "cuda"


def _ready_scale(q: QTensor) -> torch.Tensor | None:
    """The swizzled scales that q carries, if they still equal its block scales.

    Kernels write through raw pointers and leave versions at 0; ``QTensor.overwrite`` raises both
    alike.
    """
    made = q.swizzled_scale
    if made is None or made.is_inference() or q.block_scale.is_inference():
        return None
    return made.view(torch.float8_e4m3fn) if made._version == q.block_scale._version else None


def _finished(
    y: torch.Tensor, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """Global scales in their order, bias, one cast: one kernel of Triton's, or four of torch's."""
    if launches(y.device) and scaled is not None:
        with on(y.device):
            return scaled(y, a, b, out_dtype, bias)
    return apply_globals(y, a, b, out_dtype, bias)


def _may_scale_inside(a: QTensor, b: QTensor, out_dtype: torch.dtype) -> bool:
    """Whether cuBLASLt may apply the global scales: one each, and a coarse enough output."""
    return out_dtype != torch.float32 and not a.row_scaled and not b.row_scaled


def _codes(q: QTensor, row_unit: int = 1) -> torch.Tensor:
    """Codes in memory as torch wants them, filled up with zeros.

    The scales of what is filled up are 0, or never read. The swizzled scales need no filling: they
    come in tiles of 4 columns and 128 rows, and both units divide those.
    """
    return _filled(q.codes, -q.rows % row_unit).view(torch.float4_e2m1fn_x2)


def _filled(codes: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """Codes [..., M, Kp/2] with whole units of the contraction, and so many rows more."""
    padding = (0, -codes.shape[-1] % (CONTRACTION_UNIT // 2), 0, rows)
    return F.pad(codes, padding) if any(padding) else codes.contiguous()


def _scales_in_tiles(block_scale: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Block scales [S, C] swizzled, each group from a tile of 128 rows on, the rest 0.

    Where a group begins among the tiles is worked out on the device; there may be a tile of nothing
    for every group at the end.
    """
    sizes = groups.offsets.diff()
    tiled = (sizes + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    ends = tiled.cumsum(0)
    rows = (groups.rows // TILE_ROWS + groups.count) * TILE_ROWS

    # of each row in tiles its group, and its row there
    row = torch.arange(rows, device=block_scale.device)
    group = torch.searchsorted(ends, row, right=True).clamp_(max=groups.count - 1)
    within = row - (ends - tiled)[group]
    inside = within < sizes[group]
    source = torch.where(inside, groups.offsets[group] + within, 0)
    tiles = torch.where(inside[:, None], block_scale[source], 0)
    return swizzle(tiles).view(torch.float8_e4m3fn)


def _recipe(with_global: bool) -> list[F.ScalingType]:
    """What torch calls a recipe: the kinds of the scales in ``_scales``."""
    return [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise][: 1 + with_global]


def _swizzles(with_global: bool) -> list[F.SwizzleType]:
    """The orders of these scales in memory."""
    return [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE][: 1 + with_global]


assert TILE_ROWS % COLUMN_UNIT == 0
assert TILE_COLUMNS * NVFP4.block_size % CONTRACTION_UNIT == 0
