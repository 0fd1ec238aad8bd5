"""What has to be right before anything is timed: every backend against the reference, bit for bit.

    comparisons(backend, case, x, there)  one quantiser on one matrix: every road to codes
    fault_of(backend, case, x)            the same as one sentence, or None
    exact_operand(rows, columns)          codes whose products no order of summation can change
    near_bf16(layer, exact, x)            a whole layer: the right operands of the right GEMMs
    check_all(device)                     all of it, on every backend that "auto" may choose there

``backends/selfcheck.py`` asks less, once, when a backend is first used; this asks more and by name.
``nvfp4 bench all``, the scripts of benchmarks/ and the calls on a GPU all judge with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nvfp4.backends.base import Backend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import find_fault
from nvfp4.bench.cases import (
    KINDS,
    QUANTISERS,
    QuantiserCase,
    Shape,
    at_hand,
    layer_for,
    matrix,
    quantiser,
)
from nvfp4.numerics.codec import e4m3_encode
from nvfp4.numerics.formats import NVFP4, ROW_BLOCK
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.registry import get_quantizer

Comparison = Callable[[], bool]
"""Runs a backend once; True if what it returns is what the reference returns."""

REFERENCE = ReferenceBackend()

SHAPES = ((5, 48), (64, 256), (130, 400))
"""Rows and columns: one row of blocks, whole groups and tiles, and ragged ones of each."""

LAYER = Shape(96, 256, 160)

NEAR = 0.3
"""Norm of the difference of two products over the norm of the exact one, one with NVFP4 operands.

Each operand's relative error is at most 0.15 in norm (relative MSE 22e-3, that of ``sr``).
"""


class WrongResults(RuntimeError):
    """A gate is red, so nothing is timed; the message names what is wrong."""


@dataclass(frozen=True)
class Gate:
    """One thing that was looked at. fault: None if it passed."""

    backend: str
    what: str
    fault: str | None


def check_all(device: torch.device, quick: bool = False) -> list[Gate]:
    """Every gate on a device; raises ``WrongResults`` listing the red ones.

    quick: without the largest, ragged shape.
    """
    shapes = SHAPES[: 2 if quick else 3]
    gates = [gate for backend in at_hand(device) for gate in _of_backend(backend, device, shapes)]
    gates += _of_layers(device)

    wrong = [f"{gate.backend}, {gate.what}: {gate.fault}" for gate in gates if gate.fault]
    if wrong:
        raise WrongResults(f"not timed, because it is wrong: {'; '.join(wrong)}")
    return gates


def _of_backend(
    backend: Backend, device: torch.device, shapes: Sequence[tuple[int, int]]
) -> Iterator[Gate]:
    for operation in backend.operations:
        if operation != "quantize":
            yield Gate(backend.name, operation, find_fault(backend, operation, device, None))
    if "matmul" in backend.operations:
        yield Gate(backend.name, "matmul of real operands", _product_fault(backend, device))

    # Every quantiser that the backend does not refuse, on every kind of matrix and shape.
    for name in QUANTISERS:
        case = quantiser(name)
        if "quantize" not in backend.operations or backend.refuses("quantize", *case):
            continue
        faults = [
            f"{fault} of a {kind} {rows} x {columns} matrix"
            for kind in KINDS
            for rows, columns in shapes
            if (fault := fault_of(backend, case, matrix(rows, columns, kind), device))
        ]
        yield Gate(backend.name, name, "; ".join(faults) or None)


def _of_layers(device: torch.device) -> Iterator[Gate]:
    x = matrix(LAYER.tokens, LAYER.in_features, seed=1).to(device)
    # a layer in BF16 is no reference bit for bit, so here "near" has to do
    exact = layer_for(LAYER, "bf16", device=device)
    for recipe in ("nvidia", "quartet2", "search_eden"):
        near = near_bf16(layer_for(LAYER, recipe, device=device), exact, x)
        fault = None if near else "output or weight gradient is far from BF16's"
        yield Gate("auto", f"layer, {recipe}", fault)


def fault_of(
    backend: Backend, case: QuantiserCase, x: torch.Tensor, device: torch.device
) -> str | None:
    """Which roads of ``comparisons`` lead to other bits, or None.

    x: [rows, columns] on the CPU.
    """
    roads = comparisons(backend, case, x, x.to(device), stored=("rtn", "rtn_2d"))
    wrong = [road for road, is_right in roads.items() if not is_right()]
    return f"{', '.join(wrong)} differ" if wrong else None


def comparisons(
    backend: Backend,
    case: QuantiserCase,
    x: torch.Tensor,
    there: torch.Tensor,
    stored: Sequence[str] = ("rtn_2d",),
) -> dict[str, Comparison]:
    """All that a backend does with one matrix, by name; nothing runs before it is called.

    x: [rows, columns] on the CPU. there: the same where the backend runs, perhaps a view with other
    strides. stored: quantisers whose codes of x are quantised again along the other axis.
    """
    quantizer, options = case
    across = quantizer.quantize(x, options)
    down = quantizer.quantize(x.t(), options)

    # Functions, so that a caller may run each road by itself and report it by its name.
    def both() -> bool:
        rows, columns = backend.quantize_both(there, case, case)
        return same(rows, across) and same(columns, down)

    # NaN payloads are nobody's concern: any NaN equals any other.
    def decoded() -> bool:
        got = backend.dequantize(across.to(there.device), torch.bfloat16).cpu()
        want = across.dequantize(torch.bfloat16)
        return torch.equal(torch.nan_to_num(got), torch.nan_to_num(want))

    # What the backward does with kept codes: decode, turn, quantise again.
    def from_codes(name: str) -> Comparison:
        def compare() -> bool:
            first = get_quantizer(name)
            q = first.quantize(x, first.check())
            want = REFERENCE.requantize(q, quantizer, options)
            return same(backend.requantize(q.to(there.device), quantizer, options), want)

        return compare

    roads: dict[str, Comparison] = {
        "rows": lambda: same(backend.quantize(there, quantizer, options), across),
        "columns": lambda: same(backend.quantize(there.t(), quantizer, options), down),
        "both": both,
        "decoded": decoded,
    }
    return roads | {f"from codes of {name}": from_codes(name) for name in stored}


def same(got: QTensor, want: QTensor) -> bool:
    """Bit for bit, except that any NaN equals any other."""
    pairs = zip(got.tensors, want.tensors, strict=True)
    equal = all(torch.equal(torch.nan_to_num(a.cpu()), torch.nan_to_num(b)) for a, b in pairs)
    return equal and torch.equal(got.global_scale.isnan().cpu(), want.global_scale.isnan())


def exact_operand(
    rows: int, columns: int, block: tuple[int, int] = ROW_BLOCK, row_scaled: bool = False
) -> QTensor:
    """Any codes [rows, columns], block scales of 1/2, 1 and 2, a global scale of 1/2.

    row_scaled: global scales of 1/2, 1 and 3/2 by row.

    A product of two such elements is a multiple of 1/16 not above 144, and 1/2 * 1/2 or 3/2 * 1/2
    times a sum of 2048 of them one of 1/64 not above 144 * 2048 * 3/4, so below 2^24 of those:
    exact in float32 in any order of summation and with the global scales applied in any way. A
    wrong place of a scale, or a missing one, shows.

    With global scales of real data cuBLASLt's fl(ga * gb) may round a tie the other way than the
    reference, and a right product would be called wrong.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    width = -(-columns // NVFP4.block_size)
    padded_bytes = width * NVFP4.block_size // 2
    codes = torch.randint(256, (rows, padded_bytes), generator=generator).to(torch.uint8)
    # what lies beyond the contraction is padding: code 0
    codes[:, columns // 2 :] = 0

    # E4M3 holds 1/2, 1 and 2 exactly, so no scale is rounded either.
    exponents = torch.randint(-1, 2, (-(-rows // block[0]), width), generator=generator)
    block_scale = e4m3_encode(torch.exp2(exponents.float()))
    global_scale = torch.full((rows if row_scaled else 1,), 0.5)
    if row_scaled:
        global_scale[::2] = 1.5
        global_scale[::3] = 1.0
    return QTensor(codes, block_scale, global_scale, block, (rows, columns))


def _product_fault(backend: Backend, device: torch.device) -> str | None:
    """Real operands within what float32 sums may err: (K + 3) 2^-24 of the sum of magnitudes."""
    rtn = get_quantizer("rtn")
    a, b = (
        REFERENCE.quantize(matrix(rows, 512, seed=rows), rtn, rtn.check()) for rows in (144, 80)
    )
    y = backend.matmul(a.to(device), b.to(device), torch.float32).cpu().double()

    # The exact product in float64, and per element the most that K + 3 roundings may be off.
    scale = a.global_scale.double() * b.global_scale.double()
    left, right = a.decode_blocks().double(), b.decode_blocks().double()
    bound = (a.padded_contraction + 3) * 2**-24 * scale * (left.abs() @ right.abs().t())
    wrong = ((y - scale * (left @ right.t())).abs() > bound) | y.isnan()
    share = wrong.double().mean().item()
    return f"{share:.2e} of its elements err by more than summation may" if share else None


def near_bf16(layer: nn.Linear, exact: nn.Linear, x: torch.Tensor) -> bool:
    """Whether y, dx and dw of a layer are near those of ``exact``, the same layer in BF16.

    Quantised, but of the right things: a wrong operand, scale or transpose is off by its norm.
    """
    dy = matrix(x.shape[0], exact.out_features, seed=3).to(x.device)
    results = []
    for module in (layer, exact):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, module.weight), dy)))
    pairs = zip(*results, strict=True)
    return all((a.float() - b.float()).norm() < NEAR * b.float().norm() for a, b in pairs)
