"""What a backend has to show at its first use on a device: the reference's bits.

A kernel built for another architecture may return zeros or what was in memory, without any error.
So the first question for an operation (and rule) on a device runs a probe: a small fixed input
through the backend and through the reference on the CPU, which must agree to the last bit.

    quantize, _held     an ordinary matrix, both orientations, from codes; ties, zeros, overflow;
                        in 16x16 blocks too, if the rule takes them: rtn vouches for rtn_2d
    matmul, grouped     operands whose products are exact in float32 in every order of summation
    grouped_quantize    ragged rows, one group of none, both orientations, from codes
    activation          RMSNorm, SwiGLU, and their gradients
    dequantize, transpose, draw_seeds

The inputs are chosen so that what goes wrong shows: scales read from the wrong place, a missing
global scale, a conversion that breaks ties the other way. They draw on no generator, so a check
changes no random number of the program that it runs in.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nvfp4.backends.base import Backend, Operation
from nvfp4.numerics.activations import RMSNorm, SwiGLU
from nvfp4.numerics.codec import e4m3_encode
from nvfp4.numerics.codec import pack as pack_codes
from nvfp4.numerics.formats import E2M1, E4M3, NVFP4, ROW_BLOCK, SEARCH_CAP, TILE_BLOCK
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed
from nvfp4.numerics.torch_state import without_autocast, without_dispatch_modes
from nvfp4.quantizers.base import HeldAmax, Quantizer
from nvfp4.quantizers.rtn import RTN

_ROWS, _COLUMNS = 16, 128  # one tile high, one rotation group of any quantiser wide
_INPUTS, _OUTPUTS = 136, 152
_CONTRACTION = 208
"""Of the GEMM: scales in 2 x 4 tiles of 128 x 4, the last ones ragged.

Neither side is a multiple of what a library asks for (32 codes of the contraction, 16 output
columns).
"""

_HEIGHTS = (5, 130, 0, 16)
"""Rows of the groups of a grouped GEMM; an expert may get none."""

_GRID = torch.tensor(E2M1.grid, device="cpu")
_FILLING = (0, 6, 5, 6, 2, 6, 5, 2, 6, 6, 2, 5, 6, 2)
"""Codes of the exact elements beside a tie."""


def head_of_family(quantizer: Quantizer) -> Quantizer:
    """The quantiser that is checked for all with the same rule: rtn for rtn_2d, others for
    themselves.
    """
    return RTN if quantizer.rule is RTN.rule else quantizer


def find_fault(
    judge: Backend,
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
) -> str | None:
    """None if ``backend`` gives the judge's bits on ``device``, otherwise what went wrong.

    judge: the reference, by which ``registry.find_fault`` goes. quantizer: what to quantise by; rtn
    if None. Waits for the device; draws no random number.
    """
    probe = _PROBES[operation]
    chosen = quantizer or RTN

    # the first use may lie under anything: a dispatch mode that counts or replays operators must
    # not see these
    with without_dispatch_modes(), torch.no_grad(), without_autocast(torch.device("cpu")):
        want = probe(judge, torch.device("cpu"), chosen)
        try:
            backend.prepare(lambda: probe(backend, device, chosen))
            got = [tensor.cpu() for tensor in probe(backend, device, chosen)]
        except Exception as error:  # whatever a kernel raises here, the backend is of no use
            return f"its first {operation} failed: {error or type(error).__name__}{_lost(device)}"
        same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return None if same else f"its first {operation} differs from the reference"


def _lost(device: torch.device) -> str:
    """What to add where a kernel took the whole device with it.

    After an illegal address or a trap CUDA refuses all that this process ever asks of the device
    again, so passing over the backend that did it saves nothing, and whatever runs next would be
    blamed for it.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return ""

    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return (
            f"; {device} is lost to this process ({error}): whatever it computes there from now "
            "on fails as well, so "
            f"start it anew with another backend"
        )
    return ""


def _quantized(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    """Codes and scales of an ordinary matrix on every road, and of edge cases."""
    options = quantizer.check(seed=1)
    x = _matrix().to(device)
    fresh = backend.quantize(x, quantizer, options)
    rows, columns = backend.quantize_both(x, (quantizer, options), (quantizer, options))
    again = backend.requantize(_stored(_matrix(_COLUMNS, _ROWS), device), quantizer, options)
    made = [fresh, rows, columns, again]
    if "block" in quantizer.options:
        made.append(backend.quantize(x, quantizer, quantizer.check(seed=1, block=TILE_BLOCK)))

    if "summation" in quantizer.options:
        made += _summed(backend, device, quantizer)

    # a matrix whose columns are contiguous is read by another kernel
    for edges in edge_cases(quantizer):
        for x in (edges.to(device), edges.to(device).t().contiguous().t()):
            made += [backend.quantize(y, quantizer, options) for y in (x, x.to(torch.bfloat16))]
    return [tensor for q in made for tensor in q.tensors]


def _quantized_held(
    backend: Backend, device: torch.device, quantizer: Quantizer
) -> list[torch.Tensor]:
    """By an amax that the matrix exceeds, one that a NaN is in, and what is noted of both."""
    options = quantizer.check(seed=1)
    table = torch.zeros(3, len(_MAGNITUDES), dtype=torch.float32, device=device)
    table[0] = torch.tensor(_MAGNITUDES, dtype=torch.float32).to(device)

    # one column of the table each: x, x and x^T, codes, and x with a NaN
    how = [
        (quantizer, options.holding(HeldAmax(table[0, i : i + 1], table[1, i : i + 1])))
        for i in range(len(_MAGNITUDES))
    ]
    x = _matrix().to(device)
    spoilt = x.clone()
    spoilt[3, 21] = float("nan")
    made = [backend.quantize(x, *how[0]), *backend.quantize_both(x, how[1], how[2])]
    made.append(backend.requantize(_stored(_matrix(_COLUMNS, _ROWS), device), *how[3]))
    made.append(backend.quantize(spoilt, *how[4]))

    seen = table[1, :-1].clone()
    backend.turn_amax(table)
    values = [tensor for q in made for tensor in q.tensors]
    values[-1] = values[-1].isnan()
    return [*values, seen, table]


_MAGNITUDES = (100.0, 7.0, 1000.0, 64.0, 20.0)
"""Held amaxes of the probe, whose matrix has magnitudes up to 64."""


def _summed(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[QTensor]:
    """Rotated by tensor cores, where it has kernels for it: of BF16 and of codes.

    Elements are integers below 128, but for one half in each group of a row or column, so that
    every sum is exact in whatever order and width it is made, and none of them is zero, whose sign
    would tell an order.
    """
    options = quantizer.check(seed=1, summation="tensor_core")
    x = (_noise(_COLUMNS, _COLUMNS, 40503) >> 8) - 128.0
    x += 0.5 * torch.eye(_COLUMNS, device="cpu")
    x = x.to(device, torch.bfloat16)

    # the same in codes: 1, 2, 3, 4 and 6 with signs, and one 1/2 per row and column
    whole = torch.tensor((2, 4, 5, 6, 7), device="cpu")
    codes = whole[_noise(_COLUMNS, _COLUMNS, 48271) % len(whole)] | (x.cpu() < 0).long() * 8
    codes = torch.where(torch.eye(_COLUMNS, device="cpu") > 0, 1, codes).to(torch.uint8)
    one = torch.full((_COLUMNS, _COLUMNS // NVFP4.block_size), 0x38, dtype=torch.uint8)
    shape = (_COLUMNS, _COLUMNS)
    scale = torch.tensor([0.25], device=device)
    q = QTensor(pack_codes(codes).to(device), one.to(device), scale, ROW_BLOCK, shape)
    return [
        backend.quantize(x, quantizer, options),
        *backend.quantize_both(x, (quantizer, options), (quantizer, options)),
        backend.requantize(q, quantizer, options),
    ]


def _dequantized(
    backend: Backend, device: torch.device, quantizer: Quantizer
) -> list[torch.Tensor]:
    return [backend.dequantize(_stored(_matrix(), device), torch.float32)]


def _transposed(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    return list(backend.transpose(_exact(device, _OUTPUTS, 1.25, 48271, TILE_BLOCK)).tensors)


def _multiplied(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    bias = _GRID[_noise(1, _OUTPUTS, 30269)[0] % len(_GRID)].to(torch.bfloat16)
    made = []
    for block, by_row in ((ROW_BLOCK, False), (TILE_BLOCK, True)):
        a = _exact(device, _INPUTS, 1.5, 40503, by_row=by_row)
        b = _exact(device, _OUTPUTS, 1.25, 48271, block)
        made.append(backend.matmul(a, b, torch.float32))
        made.append(backend.matmul(a, b, torch.bfloat16, None if by_row else bias.to(device)))
    return made


def _multiplied_in_groups(
    backend: Backend, device: torch.device, quantizer: Quantizer
) -> list[torch.Tensor]:
    """Groups of unequal height, one of them beyond a tile of scales; 32 columns suit every path.

    Then groups of unequal contraction, as wgrad has them.
    """
    scales = (1.5, 1.25, 3.0, 2.0)
    a = [
        _exact(device, rows, scale, 40503 + rows)
        for rows, scale in zip(_HEIGHTS, scales, strict=True)
    ]
    b = [
        _exact(device, 32, scale, 48271 + rows)
        for rows, scale in zip(_HEIGHTS, scales[::-1], strict=True)
    ]
    left, right = GroupedQTensor.of(a, "rows"), GroupedQTensor.of(b, None)
    made = [backend.grouped_matmul(left, right, d) for d in (torch.bfloat16, torch.float32)]

    # the first columns of the same codes; both are by the same groups
    across, down = (
        GroupedQTensor.of(
            [_narrow(q, columns) for q, columns in zip(b, _HEIGHTS, strict=True)], "contraction"
        )
        for _ in range(2)
    )
    down = replace(down, groups=across.groups)
    return [*made, backend.grouped_matmul(across, down, torch.float32)]


def _narrow(q: QTensor, columns: int) -> QTensor:
    """The first columns of q; what pads them to whole blocks is any codes on either side."""
    blocks = -(-columns // NVFP4.block_size)
    codes = q.codes[:, : blocks * NVFP4.block_size // 2].contiguous()
    scale = q.block_scale[:, :blocks].contiguous()
    return replace(q, codes=codes, block_scale=scale, shape=(q.rows, columns))


def _quantized_in_groups(
    backend: Backend, device: torch.device, quantizer: Quantizer
) -> list[torch.Tensor]:
    """Codes and scales of every group; what lies between groups is nobody's."""
    seeds = DeviceSeed((torch.arange(3, device="cpu") + 5).to(device))
    options = quantizer.check(seed=seeds)
    x = _matrix(21, _COLUMNS).to(device).to(torch.bfloat16)
    groups = Groups.of((5, 0, 16), device)
    stored = GroupedQTensor.of(
        [_stored(part, device) for part in groups.split(_matrix(21, _COLUMNS))], "rows"
    )
    made = [
        backend.grouped_quantize(x, groups, quantizer, options),
        backend.grouped_quantize(x, groups, quantizer, options, transposed=True),
        backend.grouped_quantize(x.view(3, 7, _COLUMNS), None, quantizer, options),
        backend.grouped_requantize(stored, quantizer, options),
    ]
    return [tensor for q in made for own in q.each() for tensor in own.tensors]


def _exact(
    device: torch.device,
    rows: int,
    scale: float,
    multiplier: int,
    block: tuple[int, int] = ROW_BLOCK,
    by_row: bool = False,
) -> QTensor:
    """[rows, _CONTRACTION] of any codes; no two neighbouring blocks, rows or tiles of scales alike.

    With block scales of 1/2, 1 and 2 a product is a multiple of 1/16 up to 144, and a sum of them,
    times both global scales, one of 1/128 below 2^16 (or 1/64 below 2^17): exact in float32 in any
    order, with the global scales applied in any way. Wrong places of scales, a missing global
    scale, zeros and leftovers of memory all show.
    """
    # any byte is two codes; scales of 1/2, 1 and 2
    codes = (_noise(rows, _CONTRACTION // 2, multiplier) >> 8).to(torch.uint8)
    shape = (-(-rows // block[0]), _CONTRACTION // NVFP4.block_size)
    exponents = (_noise(*shape, multiplier + 2) >> 5) % 3 - 1
    block_scale = e4m3_encode(torch.exp2(exponents.to(torch.float32)))
    global_scale = torch.full((rows if by_row else 1,), scale, dtype=torch.float32, device="cpu")
    if by_row:
        global_scale[::3] = 1
    tensors = [tensor.to(device) for tensor in (codes, block_scale, global_scale)]
    return QTensor(tensors[0], tensors[1], tensors[2], block, (rows, _CONTRACTION))


def _activated(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    """Codes of both activations, and their gradients."""
    x, other = (
        (_noise(_ROWS, _COLUMNS, multiplier) - 32768).to(device) / 8192
        for multiplier in (40503, 48271)
    )
    x, other, options = x.to(torch.bfloat16), other.to(torch.bfloat16), quantizer.check(seed=1)
    made = []
    for activation in (RMSNorm(x, other[0], 1e-6), SwiGLU(x, other)):
        codes, _ = backend.quantize_activation(activation, (quantizer, options))
        made += [*codes.tensors, *backend.activation_gradients(activation, other)]
    return made


def _drawn(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    """Seeds of two states: a seed above 2^63 under the argument's rank, another under its own."""
    words = torch.tensor([[-(2**63) + 5, 2, 3, -1], [2**40 + 1, 7, 2**33, 6]], device="cpu").to(
        device
    )
    return [backend.draw_seeds(row, 4, 3) for row in words]


def _stored(x: torch.Tensor, device: torch.device) -> QTensor:
    """The reference's quantisation of x, on ``device``."""
    q = RTN.quantize(x, RTN.check())
    codes, block_scale, global_scale = (tensor.to(device) for tensor in q.tensors)
    return QTensor(codes, block_scale, global_scale, *q.record)


def _matrix(rows: int = _ROWS, columns: int = _COLUMNS) -> torch.Tensor:
    """Both signs, many magnitudes, rows that differ in size: float32 [rows, columns]."""
    size = torch.arange(1, rows + 1, device="cpu").to(torch.float32)[:, None]
    return (_noise(rows, columns, 40503) - 32768) / 8192 * size


def edge_cases(quantizer: Quantizer) -> list[torch.Tensor]:
    """Float32 matrices on which a conversion to E2M1 goes wrong without a trace.

    Their elements, once scaled, are ties of either sign, zeros of either sign, or beyond the
    largest value, some infinitely so.
    """
    return [_spikes()] if quantizer.rotates else [_ties(cap) for cap in (E4M3.max, SEARCH_CAP)]


_SPIKES = (
    (13327, 12273),
    (7427, 5794),
    (3087, 2033),
    (12607, 6966),
    (1807, 753),
    (9795, 2632),
    (1167, 113),
)
"""Pairs (a, b) that, rotated among zeros, become a + b and a - b.

For ms_eden the one is the maximum of its block and the other a tie after all roundings: 1/4, 3/4,
..., 5, in this order. Found by trying; test_selfcheck.py holds it.
"""


def _spikes() -> torch.Tensor:
    """[8, 128], the last row of zeros."""
    x = torch.zeros(len(_SPIKES) + 1, _COLUMNS, device="cpu")
    x[:-1, :2] = torch.tensor(_SPIKES, dtype=torch.float32, device="cpu")
    x[-1, ::3] = -0.0
    return x


def _ties(cap: float) -> torch.Tensor:
    """[16, 144] whose largest block scale is ``cap``; scales are powers of two, maxima 6 of them.

    A block holds one tie between grid values that make every other scale worse, and is the same in
    all rows but for the sign. Of the last two one has its maximum at 6.34, on a scale rounded down,
    and one is so small that its scale becomes zero, while its elements overflow on their way to the
    grid.
    """
    # a block per tie: the maximum, the tie, and elements that are exact
    middles = (_GRID[1:] + _GRID[:-1]) / 2
    exact = _GRID[torch.tensor(_FILLING, device="cpu")].expand(len(middles), -1)
    maxima = torch.full((len(middles), 1), E2M1.max, device="cpu")
    blocks = torch.cat([maxima, middles[:, None], exact], dim=1)
    blocks[-1] *= cap  # the maximum of all

    # one beyond the largest value, one too small to have a scale; every second row is negative
    clipped, tiny = blocks[:1].clone(), blocks[:1] * 2.0**-14
    clipped[0, 0] = 6.34375
    rows = torch.cat([blocks, clipped, tiny]).view(1, -1).repeat(_ROWS, 1) * 2.0**20
    rows[1::2] *= -1
    return rows


def _noise(rows: int, columns: int, multiplier: int) -> torch.Tensor:
    """Integers in [0, 65536), [rows, columns], without any generator's help."""
    return (torch.arange(1, rows * columns + 1, device="cpu") * multiplier % 65536).view(
        rows, columns
    )


_PROBES = {
    "quantize": _quantized,
    "quantize_held": _quantized_held,
    "dequantize": _dequantized,
    "matmul": _multiplied,
    "grouped_quantize": _quantized_in_groups,
    "grouped_matmul": _multiplied_in_groups,
    "activation": _activated,
    "draw_seeds": _drawn,
    "transpose": _transposed,
}
