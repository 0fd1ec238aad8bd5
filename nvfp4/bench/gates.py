"""What has to be right before anything is timed: every backend at hand against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvfp4.backends.base import Backend
from nvfp4.backends.registry import BACKENDS
from nvfp4.backends.selfcheck import find_fault
from nvfp4.bench.cases import QUANTISERS, Shape
from nvfp4.bench.layers import check, layer_for, normal
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

SHAPES = ((5, 48), (64, 256), (130, 400))
"""Rows and columns: one block row, whole groups and tiles, and ragged ones of each."""

ROTATED_SHARE = 1e-4
"""Codes and scales of rotated operands that may differ on a GPU, where tensor cores add in an order of their own."""


class WrongResults(RuntimeError):
    """A gate is red, so nothing is timed; the message names what is wrong."""


@dataclass(frozen=True)
class Gate:
    """One thing that was looked at. differing: share of bytes unlike the reference's. fault: None if it passed."""

    backend: str
    what: str
    differing: float
    fault: str | None


def at_hand(device: torch.device) -> list[Backend]:
    """The backends that "auto" may choose on a device, the reference, which is the judge, left out."""
    return [
        backend
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.unavailable(device) is None and backend.automatic(device)
    ]


def check_all(device: torch.device, quick: bool = False) -> list[Gate]:
    """Every gate on a device; raises ``WrongResults`` listing the red ones."""
    gates = [gate for backend in at_hand(device) for gate in _of_backend(backend, device, SHAPES[: 2 if quick else 3])]
    gates += _of_layers(device)
    wrong = [f"{gate.backend}, {gate.what}: {gate.fault}" for gate in gates if gate.fault is not None]
    if wrong:
        raise WrongResults(f"not timed, because it is wrong: {'; '.join(wrong)}")
    return gates


def _of_backend(backend: Backend, device: torch.device, shapes: tuple[tuple[int, int], ...]) -> Iterator[Gate]:
    for operation in backend.operations:
        if operation != "quantize":
            yield Gate(backend.name, operation, 0.0, find_fault(backend, operation, device, None))
    if "matmul" in backend.operations:
        yield _product(backend, device)
    for name, (quantizer_name, options) in QUANTISERS.items():
        quantizer = get_quantizer(quantizer_name)
        checked = quantizer.check(seed=1, sign_seed=2, **options)
        if "quantize" in backend.operations and backend.refuses("quantize", quantizer, checked) is None:
            yield _quantised(backend, device, name, quantizer, checked, shapes)


def _quantised(
    backend: Backend,
    device: torch.device,
    name: str,
    quantizer: Quantizer,
    options: Options,
    shapes: tuple[tuple[int, int], ...],
) -> Gate:
    """x, x^T, both at once, and once more from codes, on every shape."""
    reference, saved = BACKENDS["reference"], get_quantizer("rtn")
    bytes_, differing = 0, 0
    for rows, columns in shapes:
        x = normal(rows, columns)
        want = [reference.quantize(each, quantizer, options) for each in (x, x.t(), x, x.t())]
        stored = reference.quantize(x, saved, saved.check())
        want.append(reference.requantize(stored, quantizer, options))
        here = x.to(device)
        got = [backend.quantize(each, quantizer, options) for each in (here, here.t())]
        got += backend.quantize_both(here, (quantizer, options), (quantizer, options))
        got.append(backend.requantize(stored.to(device), quantizer, options))
        for a, b in zip(got, want, strict=True):
            size, wrong = _unlike(a, b)
            bytes_, differing = bytes_ + size, differing + wrong
    share = differing / max(bytes_, 1)
    rotated = options.rotation is not None and device.type == "cuda"
    allowed = ROTATED_SHARE if rotated else 0.0
    return Gate(backend.name, name, share, None if share <= allowed else f"{share:.2e} of its bytes differ")


def _unlike(a: QTensor, b: QTensor) -> tuple[int, int]:
    """(bytes of codes and scales, how many differ)."""
    pairs = [(x.cpu().view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.tensors, b.tensors, strict=True)]
    return sum(y.numel() for _, y in pairs), sum(int((x != y).sum()) for x, y in pairs)


def _product(backend: Backend, device: torch.device) -> Gate:
    """Real operands within what float32 sums may err: (K + 3) 2^-24 of the sum of magnitudes, in any order."""
    rtn = get_quantizer("rtn")
    a, b = (BACKENDS["reference"].quantize(normal(rows, 512, rows), rtn, rtn.check()) for rows in (144, 80))
    y = backend.matmul(a.to(device), b.to(device), torch.float32).cpu().double()
    scale = a.global_scale.double() * b.global_scale.double()
    left, right = a.decode_blocks().double(), b.decode_blocks().double()
    bound = (a.padded_contraction + 3) * 2**-24 * scale * (left.abs() @ right.abs().t())
    wrong = ((y - scale * (left @ right.t())).abs() > bound) | y.isnan()
    share = wrong.double().mean().item()
    fault = f"{share:.2e} of its elements err by more than summation may" if share else None
    return Gate(backend.name, "matmul of real operands", share, fault)


def _of_layers(device: torch.device) -> Iterator[Gate]:
    """Whole layers near BF16: the right operands of the right GEMMs."""
    shape = Shape(96, 256, 160)
    x = normal(shape.tokens, shape.in_features, 1).to(device).requires_grad_()
    exact = layer_for(shape, "bf16", device=device)
    for recipe in ("nvidia", "quartet2", "search_eden"):
        good = check(layer_for(shape, recipe, device=device), exact, x)
        yield Gate("auto", f"layer, {recipe}", 0.0, None if good else "output or weight gradient is far from BF16's")
