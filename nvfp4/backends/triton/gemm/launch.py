"""decode(a) @ decode(b)^T on a GPU through Triton: which tile, the launch, what to compile ahead.

    a [M, Kp], b [N, Kp]  ->  the card's kind of tensor core  ->  a tile [m, n, k]  ->  out [M, N]

``family`` says what a card is programmed for, ``TILES`` what compiles for that without a spill,
``choose_tile`` which of these finishes first: the card works in waves of one tile per
multiprocessor, and a wave that is half empty takes as long as a full one. So small outputs get
smaller tiles.

All figures here are of data sheets or of compilers (``tools/aot.py``, benchmarks/results/aot.json);
none was timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nvfp4.backends.triton.arithmetic import INTERPRETED
from nvfp4.backends.triton.gemm.kernels import gemm_kernel
from nvfp4.backends.triton.launch import launch, on, version
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.qtensor import QTensor

BALANCE = {"tcgen05": 128, "tcgen05_decoded": 32, "mma_fp4": 16, "wgmma": 16, "mma": 8}
"""Products that a multiprocessor makes in the time that one code takes from L2.

A code is half a byte, and L2 gives 64 bytes per clock. Products per clock: 16 k (B200: 9 PFLOP/s /
2 / 148 / 1.9 GHz), 2 k (RTX 5090: 1.68 PFLOP/s / 2 / 170 / 2.4 GHz; H100 in FP16: the same), 1 k.
FP16 is a quarter of FP4 on a B200.
"""

GROUP = 8
"""Rows of tiles that are walked together.

8 x 8 tiles of 128 share 16 operand panels, where a row-major walk reads 65.
"""

WIDEST_WITH_BIAS = 128
"""Columns of a tile that adds a bias and writes float32.

With 256 it spills 32 bytes per thread on sm_100, as ptxas of Triton 3.9 compiles it. 16-bit output
with a bias does not spill.
"""

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class GemmTile:
    """What one program computes, [m, n] in steps of k along the contraction, and with how much.

    warps: of 32 threads. stages: steps of the contraction in flight at once, loads ahead of sums.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILES: dict[str, tuple[GemmTile, ...]] = {
    # 128 rows always: with 64, Triton 3.9 leaves FP4 and multiplies in FP16
    "tcgen05": (
        GemmTile(128, 256, 256, 8, 3),
        GemmTile(128, 128, 256, 8, 4),
        GemmTile(128, 64, 256, 4, 4),
    ),
    # one tile: with 128 rows, Triton 3.6 wants more tensor memory than there is, and compiles the
    # kernel to a trap
    "tcgen05_decoded": (GemmTile(64, 64, 64, 4, 4),),
    "mma_fp4": (
        GemmTile(128, 128, 128, 8, 4),
        GemmTile(64, 128, 128, 4, 4),
        GemmTile(16, 128, 256, 4, 4),
    ),
    # 128 registers, so that two programs fit: one decodes while the other multiplies (with a bias
    # Triton 3.6 takes 130, and one fits)
    "wgmma": (GemmTile(128, 128, 64, 8, 3), GemmTile(64, 64, 64, 4, 4)),
    # 4 warps: with 8, each decodes more of what its neighbours decode too (2376 instead of 1386
    # issues a step)
    "mma": (GemmTile(128, 128, 64, 4, 4), GemmTile(64, 64, 64, 4, 4), GemmTile(16, 64, 128, 4, 4)),
}
"""The largest tiles that ptxas compiles without spilling, and smaller ones for fewer rows.

Chosen by what they compile to (benchmarks/results/aot.json): none has been timed on a GPU.
"""

INSTRUCTIONS = {
    # two names of the same: Triton 3.6 writes scale_vec::4X, 3.9 block16
    "tcgen05": r"tcgen05\.mma\S*kind::mxf4nvf4\S*(block16|scale_vec::4X)",
    "mma_fp4": r"mma\.sync\S*kind::mxf4nvf4\S*scale_vec::4X\S*ue4m3",
    "wgmma": r"wgmma\.mma_async\S*f32\.f16\.f16",
    "tcgen05_decoded": r"tcgen05\.mma\S*kind::f16",
    "mma": r"mma\.sync\S*f32\.f16\.f16\.f32",
}
"""The tensor core instruction of each family, as PTX writes it."""


def family(capability: int, native: bool = True) -> str:
    """The kind of tensor core, of ``TILES``, that a card of this capability is programmed for.

    capability: 90, 120, ... Native FP4 on 100 and 103 (tcgen05) and on 120 and 121 (mma.sync),
    unless ``native`` is false.
    On 121 Triton 3.6 cannot compile it (its passes fail; 3.9.0's do not), so there codes are
    decoded until 3.9.
    """
    if capability in (100, 103):
        return "tcgen05" if native else "tcgen05_decoded"
    if native and (capability == 120 or (capability == 121 and version() >= (3, 9))):
        return "mma_fp4"
    return "wgmma" if capability == 90 else "mma"


@lru_cache(maxsize=4096)
def choose_tile(
    rows: int, columns: int, kind: str, multiprocessors: int, widest: int = 256
) -> GemmTile:
    """The tile whose waves over the card cost least.

    A wave is one tile per multiprocessor and takes as long as its tile, full or not. A tile takes
    as long as its products, m * n, and reading its operands from L2, ``BALANCE`` * (m + n); the
    sum, for they overlap in part. widest: columns that a tile may have at most.
    """

    def cost(tile: GemmTile) -> int:
        tiles = -(-rows // tile.m) * -(-columns // tile.n)
        return -(-tiles // multiprocessors) * (tile.m * tile.n + BALANCE[kind] * (tile.m + tile.n))

    return min((tile for tile in TILES[kind] if tile.n <= widest), key=cost)


@lru_cache(maxsize=64)
def _device(device: torch.device, native: bool = True) -> tuple[str, int]:
    """(family, multiprocessors); on a CPU, where only Triton's interpreter runs, the smallest."""
    if device.type != "cuda":
        return "mma", 1
    major, minor = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return family(10 * major + minor, native), count


def tensor_cores(device: torch.device) -> str:
    """The family of a device."""
    return _device(device)[0]


def gemm(
    a: QTensor,
    b: QTensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    *,
    tile: GemmTile | None = None,
    native: bool | None = None,
) -> torch.Tensor:
    """decode(a) @ decode(b)^T, [a.rows, b.rows] of ``out_dtype``.

    fl(fl(acc * a.global_scale) * b.global_scale), acc in float32. bias [b.rows] (any float dtype)
    is added in float32, then there is one cast to ``out_dtype`` (float32, float16, bfloat16). tile,
    native: override what the device suggests. A NaN global scale makes its output NaN. Raises
    ValueError for other dtypes or shapes that do not fit.
    """
    _check(a, b, out_dtype, bias)
    (rows, row_bytes), columns, device = a.codes.shape, b.codes.shape[0], a.codes.device
    kind, multiprocessors = _device(device, native is not False)

    # the interpreter's casts to BF16 truncate: under it the kernel writes float32, torch casts
    dtype = torch.float32 if INTERPRETED else out_dtype
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    if rows == 0 or columns == 0:
        return out.to(out_dtype)

    # the tile, unless the caller names one
    if tile is None:
        widest = 256 if bias is None or out_dtype != torch.float32 else WIDEST_WITH_BIAS
        tile = choose_tile(rows, columns, kind, multiprocessors, widest)
    if native is None:
        native = kind in ("tcgen05", "mma_fp4")

    tensors = [t if t is None else _readable(t) for t in (*a.tensors, *b.tensors, bias)]
    arguments = (*tensors, out, rows, columns, row_bytes * 2 // NVFP4.block_size)
    scaling = (a.block[0], b.block[0], a.row_scaled, b.row_scaled)
    constants = (*scaling, native, tile.m, tile.n, tile.k, GROUP)
    programs = -(-rows // tile.m) * -(-columns // tile.n)
    with on(device):
        launch(gemm_kernel, programs, arguments, constants, warps=tile.warps, stages=tile.stages)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def _readable(t: torch.Tensor) -> torch.Tensor:
    """t contiguous and aligned to 16 bytes, as the kernel reads words of codes.

    A view of a file may begin anywhere.
    """
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _check(a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    if out_dtype not in TYPES:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    if a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(
            f"a contracts {a.padded_contraction} columns and b {b.padded_contraction}; they must "
            "be equal"
        )
    if bias is not None and tuple(bias.shape) != (b.rows,):
        raise ValueError(f"bias must have shape ({b.rows},), got {tuple(bias.shape)}")


def kernel_variants(capability: int, few: bool = False) -> list[KernelVariant]:
    """What to compile for a card: every tile as training uses it, the largest with other options.

    few: only the largest tile, and one with all options.
    """
    # every tile with BF16 output, and the smallest with all that an operand may have
    kind = family(capability)
    plain = [_variant(kind, tile) for tile in TILES[kind]]
    rich = _variant(
        kind, TILES[kind][-1], torch.float32, tall=NVFP4.block_size, by_row=True, biased=True
    )
    if few:
        return [plain[0], rich]

    # other outputs with and without bias; and codes decoded where the card has FP4
    narrower = choose_tile(8192, 8192, kind, 1, WIDEST_WITH_BIAS)
    options = [
        _variant(kind, TILES[kind][0], torch.float16, by_row=True),
        _variant(kind, TILES[kind][0], biased=True),
        _variant(kind, narrower, torch.float32, tall=NVFP4.block_size, biased=True),
    ]
    other = family(capability, native=False)
    decoded = [] if other == kind else [_variant(other, tile) for tile in TILES[other][:1]]
    return [*plain, *options, rich, *decoded]


def _variant(
    kind: str,
    tile: GemmTile,
    out: torch.dtype = torch.bfloat16,
    tall: int = 1,
    by_row: bool = False,
    biased: bool = False,
) -> KernelVariant:
    """The GEMM with this tile and output.

    tall: rows of a block of b. by_row: a has a global scale per row. biased: there is a bias.
    """
    # what is None is a constant, whatever kind of argument it stands for
    types = dict.fromkeys(("a_codes", "a_scale", "b_codes", "b_scale"), "*u8")
    types |= {"a_global": "*fp32", "b_global": "*fp32", "out": f"*{TYPES[out]}"}
    types |= dict.fromkeys(("M", "N", "blocks"), "i32")
    constants: dict[str, Any] = {
        "A_TALL": 1,
        "B_TALL": tall,
        "A_ROWS": by_row,
        "B_ROWS": False,
        "NATIVE": kind in ("tcgen05", "mma_fp4"),
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": GROUP,
    }
    if biased:
        types |= {"bias": "*bf16"}
    else:
        constants |= {"bias": None}

    traits = {TYPES[out]: True, "tiles": tall > 1, "rows": by_row, "bias": biased}
    name = " ".join(
        [
            f"gemm {kind} {tile.m}x{tile.n}x{tile.k}",
            *(trait for trait, has in traits.items() if has),
        ]
    )
    return KernelVariant(
        name, gemm_kernel, types, constants, tile.warps, tile.stages, INSTRUCTIONS[kind]
    )
