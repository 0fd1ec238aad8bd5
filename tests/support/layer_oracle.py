"""What a linear layer has to compute under each recipe, put together by hand from quantise, decode
and multiply.

``TABLE`` is section 7 of the definition typed out, ``operands`` builds the two operands of each
GEMM from it with seeds folded by the oracle. Nothing here reads a Recipe or imports the layer.
"""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch

import nvfp4

GEMMS = ("fprop", "dgrad", "wgrad")


class Op(NamedTuple):
    """One operand: quantiser, its options, made from (x | codes | hat), rotated before (None |
    fixed | drawn).

    quantizer None: not quantised; then "hat" is the decoded forward operand rounded to BF16.
    """

    quantizer: str | None
    options: dict[str, object] = {}  # noqa: RUF012 (never written)
    source: str = "x"
    rotation: str | None = None


_RTN, _RTN_2D = Op("rtn"), Op("rtn_2d")
_SR_TE = Op("sr_te")
_FOS, _FOS_2D, _FOS_ROW = (
    Op("four_over_six"),
    Op("four_over_six", {"block": (16, 16)}),
    Op("four_over_six", {"row_scaled": True}),
)
_SEARCH = Op("scale_search")
_SAME_W_CODES = Op(None, source="codes")
_ROT16_SR_TE, _ROT16_RTN = Op("sr_te", rotation="fixed"), Op("rtn", rotation="fixed")
_ROT16_SR, _ROT16_SR_HAT = Op("sr", rotation="drawn"), Op("sr", source="hat", rotation="drawn")
_EDEN, _EDEN_HAT = Op("ms_eden", {"rounds": 1}), Op("ms_eden", {"rounds": 1}, "hat")
_EDEN_2, _EDEN_2_HAT = (
    Op("ms_eden", {"rounds": 2, "search": True}),
    Op("ms_eden", {"rounds": 2, "search": True}, "hat"),
)
_SEARCH_3 = Op("scale_search", {"candidates": (0, -1, 5)})
_OF_THREE = {"rounds": 2, "search": True, "factors": (1.0, 0.9375, 1.5)}
_EDEN_3, _EDEN_3_HAT = Op("ms_eden", _OF_THREE), Op("ms_eden", _OF_THREE, "hat")
_DENSE, _DENSE_HAT = Op(None), Op(None, source="hat")

TABLE: dict[str, dict[str, tuple[Op, Op]]] = {
    "bf16": {"fprop": (_DENSE, _DENSE), "dgrad": (_DENSE, _DENSE), "wgrad": (_DENSE, _DENSE)},
    "rtn": {"fprop": (_RTN, _RTN), "dgrad": (_RTN, _RTN), "wgrad": (_RTN, _RTN)},
    "nvidia": {
        "fprop": (_RTN, _RTN_2D),
        "dgrad": (_SR_TE, _SAME_W_CODES),
        "wgrad": (_ROT16_SR_TE, _ROT16_RTN),
    },
    "four_over_six": {
        "fprop": (_FOS, _FOS_2D),
        "dgrad": (_SR_TE, _SAME_W_CODES),
        "wgrad": (_ROT16_SR_TE, _ROT16_RTN),
    },
    "tetrajet2": {
        "fprop": (_RTN, _RTN),
        "dgrad": (_ROT16_SR, _ROT16_SR_HAT),
        "wgrad": (_ROT16_SR, _ROT16_SR_HAT),
    },
    "quartet2": {"fprop": (_FOS, _FOS), "dgrad": (_EDEN, _EDEN_HAT), "wgrad": (_EDEN, _EDEN_HAT)},
    "search_eden": {
        "fprop": (_SEARCH, _SEARCH),
        "dgrad": (_EDEN_2, _EDEN_2_HAT),
        "wgrad": (_EDEN_2, _EDEN_2_HAT),
    },
    "search_eden_3": {
        "fprop": (_SEARCH_3, _SEARCH_3),
        "dgrad": (_EDEN_3, _EDEN_3_HAT),
        "wgrad": (_EDEN_3, _EDEN_3_HAT),
    },
    "rl": {"fprop": (_FOS_ROW, _FOS), "dgrad": (_DENSE, _DENSE_HAT), "wgrad": (_DENSE, _DENSE_HAT)},
}
QUANTISED = tuple(name for name in TABLE if name != "bf16")

Side = nvfp4.QTensor | torch.Tensor
Pair = tuple[Side, Side]


class Noise(NamedTuple):
    """Where the random bits of a GEMM come from."""

    seed: int
    layer: int = 0
    call: int = 0
    rank: int = 0

    def sign_seed(self, gemm: str) -> int:
        return oracle.fold_in(self.seed, self.layer, self.call, GEMMS.index(gemm))

    def seed_of(self, gemm: str, operand: int) -> int:
        return oracle.fold_in(self.sign_seed(gemm), 1 + operand, self.rank)


def operands(
    recipe: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, noise: Noise
) -> dict[str, Pair]:
    """Both operands of the three GEMMs, each with its contraction axis last: left @ right^T is the
    result.

    x [M, K], w [N, K], dy [M, N]; any float dtype of up to 32 bits.
    """
    fprop_x, fprop_w = (
        _operand(op, tensor, None, "fprop", side, noise)
        for side, (op, tensor) in enumerate(zip(TABLE[recipe]["fprop"], (x, w), strict=True))
    )
    dgrad, wgrad = TABLE[recipe]["dgrad"], TABLE[recipe]["wgrad"]
    return {
        "fprop": (fprop_x, fprop_w),
        "dgrad": (
            _operand(dgrad[0], dy, None, "dgrad", 0, noise),
            _operand(dgrad[1], w.t(), fprop_w, "dgrad", 1, noise),
        ),
        "wgrad": (
            _operand(wgrad[0], dy.t(), None, "wgrad", 0, noise),
            _operand(wgrad[1], x.t(), fprop_x, "wgrad", 1, noise),
        ),
    }


def _operand(
    op: Op, x: torch.Tensor, forward: Side | None, gemm: str, side: int, noise: Noise
) -> Side:
    """x: the tensor, contraction axis last. forward: the operand of fprop that holds the same data,
    untransposed."""
    if op.source == "codes":
        assert isinstance(forward, nvfp4.QTensor)
        return forward.transpose()
    if op.source == "hat":
        assert isinstance(forward, nvfp4.QTensor)
        x = forward.dequantize().t()
    if op.quantizer is None:
        return x.to(torch.bfloat16)
    x = x.to(torch.float32)
    if op.rotation == "fixed":
        x = torch.from_numpy(oracle.nvidia_rotate(x.contiguous().numpy()))
    elif op.rotation == "drawn":
        x = nvfp4.rotate(x, noise.sign_seed(gemm), rounds=1, group=16)
    seeds = {"seed": noise.seed_of(gemm, side)}
    if op.quantizer == "ms_eden":
        seeds["sign_seed"] = noise.sign_seed(gemm)
    return nvfp4.quantize(x.contiguous(), op.quantizer, **seeds, **op.options)  # type: ignore[arg-type]


def product(pair: Pair, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right^T by the same operations in the same order as the layer: to be compared bit for
    bit."""
    left, right = pair
    if isinstance(left, nvfp4.QTensor) and isinstance(right, nvfp4.QTensor):
        return nvfp4.matmul(left, right, dtype, bias=bias)
    assert isinstance(left, torch.Tensor)
    assert isinstance(right, torch.Tensor)
    return (left @ right.t()).to(dtype)


def exact_product(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """(left @ right^T, |left| @ |right|^T) of the decoded operands in float64, as stored: padded
    and still rotated."""
    left, right = (
        (side.dequantize(rotated=True) if isinstance(side, nvfp4.QTensor) else side).double()
        for side in pair
    )
    return left @ right.t(), left.abs() @ right.abs().t()


def summation_bound(pair: Pair, magnitude: torch.Tensor) -> torch.Tensor:
    """How far a float32 GEMM of exact products may be from exact, elementwise.

    n terms in any order: gamma_n |A| |B|^T with gamma_n = n u / (1 - n u), u = 2^-24 (Higham,
    Accuracy and Stability, section 3.1); the decoded operands carry one rounding each, the two
    global scales and a bias one each: n + 5.
    """
    left = pair[0]
    n = 5 + (left.padded_contraction if isinstance(left, nvfp4.QTensor) else left.shape[1])
    u = 2.0**-24
    return magnitude * (n * u / (1 - n * u))
