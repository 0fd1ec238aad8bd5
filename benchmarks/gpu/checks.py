"""Is it right: each backend by its name against the reference, bit for bit, on hard cases.

    a unit      one (backend, quantiser, shape, dtype), or one shape or tile of a product
    its row     comparisons made, how many were wrong, and which the first of these was

What is compared, and with what, is ``nvfp4/bench/gates.py``; here are the shapes, the views and the
sizes beyond 2^31. A unit stops at the first exception, since what follows a fault on a GPU says
nothing. Operations that a backend does not have are not asked of it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.processes import Job, Skip
from nvfp4.backends.base import Backend
from nvfp4.bench.cases import KINDS, QuantiserCase, matrix, quantiser
from nvfp4.bench.gates import REFERENCE, Comparison, comparisons, exact_operand, same
from nvfp4.numerics.formats import ROW_BLOCK, TILE_BLOCK
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import explain
from nvfp4.quantizers.registry import get_quantizer

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}

TAIL = 48
"""Rows at the end of a tensor beyond 2^31 elements that are looked at."""


def case_of(name: str) -> QuantiserCase:
    """A quantiser of the table of cases, with a seed beyond 32 bits."""
    return quantiser(name, seed=2**63 + 16, sign_seed=48)


class Count:
    """Comparisons made, how many were wrong, and what the first of those was."""

    def __init__(self, job: Job, **labels: Any) -> None:
        self.job, self.labels = job, labels
        self.checked, self.wrong, self.first = 0, 0, ""

    def add(self, note: str, compare: Comparison) -> None:
        """One more. What ``compare`` raises is one more wrong, and ends the unit."""
        self.checked += 1
        try:
            is_right = compare()
            self.job.settings.place.synchronize()
        except Exception as error:
            self._blame(f"{note}: {type(error).__name__}: {error}")
            self.report()
            raise
        if not is_right:
            self._blame(note)

    def _blame(self, what: str) -> None:
        self.wrong += 1
        self.first = self.first or what[:400]

    def report(self) -> None:
        """Send the row of what was compared."""
        self.job.add(**self.labels, checked=self.checked, wrong=self.wrong, first=self.first)

    def run(self, all_of_them: Sequence[tuple[str, Comparison]]) -> None:
        """All of them, then the row.

        An exception is in the row already: the unit has not failed beyond that.
        """
        try:
            for note, compare in all_of_them:
                self.add(note, compare)
        except Exception:
            print(f"--- {self.labels}", file=sys.stderr)
            traceback.print_exc()
            return
        self.report()


def quantise(job: Job, backend: str, name: str, shape: tuple[int, int], dtype: str) -> None:
    """Rows, columns, both in one call, from codes, and decoded again."""
    place = job.settings.place
    chip, case = place.backend(backend), case_of(name)
    if (reason := chip.refuses("quantize", *case)) is not None:
        raise Skip(f"{backend}: {reason}")

    compared: list[tuple[str, Comparison]] = []
    for kind in KINDS if dtype == "bf16" else KINDS[:1]:
        x = matrix(*shape, kind, DTYPES[dtype])
        roads = comparisons(chip, case, x, x.to(place.device))
        compared += [(f"{road} {kind}", compare) for road, compare in roads.items()]
    title = f"{name} {shape[0]}x{shape[1]} {dtype}"
    Count(job, check="quantise", backend=backend, case=title).run(compared)


def product_of(job: Job, backend: str, shape: tuple[int, int, int]) -> None:
    """a b^T of one shape, in every combination.

    Row scales or not, 16x16 blocks or not, every output dtype, with and without bias.
    """
    place = job.settings.place
    chip = place.backend(backend)
    if "matmul" not in chip.operations:
        raise Skip(f"{backend} has no GEMM")

    # Exact operands: every order of summation gives the same product, so equality is asked for.
    m, n, k = shape
    compared: list[tuple[str, Comparison]] = []
    for row_scaled, tiles in product((False, True), (False, True)):
        a = exact_operand(m, k, row_scaled=row_scaled)
        b = exact_operand(n, k, block=TILE_BLOCK if tiles else ROW_BLOCK)
        for (label, dtype), bias in product(DTYPES.items(), (None, torch.arange(n).float() / 4)):
            note = f"{label} rows={row_scaled} tiles={tiles} bias={bias is not None}"
            compared.append((note, _multiplies(chip.matmul, a, b, dtype, bias, place.device)))
    Count(job, check="product", backend=backend, case=f"{m}x{n}x{k}").run(compared)


def _multiplies(
    multiply: Callable[..., torch.Tensor],
    a: QTensor,
    b: QTensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    device: torch.device,
) -> Comparison:
    def compare() -> bool:
        want = REFERENCE.matmul(a, b, dtype, bias)
        there = None if bias is None else bias.to(device)
        return torch.equal(multiply(a.to(device), b.to(device), dtype, there).cpu(), want)

    return compare


def way_to_multiply(job: Job, index: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    """One tile of the FP4 GEMM by its number, or decoding to BF16 first (number 0)."""
    place = job.settings.place
    ways = list(place.gemms().items())
    if index >= len(ways):
        raise Skip(f"this card has {len(ways)} ways to multiply")

    name, multiply = ways[index]
    compared = []
    for m, n, k in shapes:
        a, b = exact_operand(m, k), exact_operand(n, k)
        for label in ("bf16", "f32"):
            compare = _multiplies(multiply, a, b, DTYPES[label], None, place.device)
            compared.append((f"{m}x{n}x{k} {label}", compare))
    Count(job, check="way to multiply", backend="triton", case=name).run(compared)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "offset 1": lambda t: t.view(-1)[1:][: 40 * 48].view(40, 48),
    "offset 3, down": lambda t: t.view(-1)[3:][: 40 * 48].view(48, 40).t(),
    "every second column": lambda t: t[:, ::2],
    "a corner": lambda t: t[1:34, 3:100],
    "one row, spread": lambda t: t[:1].expand(20, 160),
    "one column, spread": lambda t: t[:, :1].expand(80, 32),
}
"""Of a matrix [80, 160]: what a kernel that trusts alignment or strides gets wrong."""


def misaligned(job: Job, backend: str, name: str) -> None:
    """Views at odd offsets, with gaps, with exchanged strides, broadcast; codes at an odd byte."""
    place = job.settings.place
    chip, case = place.backend(backend), case_of(name)
    memory = matrix(80, 160)
    there = memory.to(place.device)

    # What the reference says of the view on the CPU is what the device has to say of its view.
    compared: list[tuple[str, Comparison]] = []
    if "quantize" in chip.operations:
        for note, view in VIEWS.items():
            roads = comparisons(chip, case, view(memory), view(there))
            compared += [(f"{road}, {note}", roads[road]) for road in ("rows", "both")]
    if "matmul" in chip.operations:
        compared.append(("codes at an odd byte", lambda: _odd_codes(chip, place.device)))
    Count(job, check="misaligned", backend=backend, case=name).run(compared)


def _odd_codes(chip: Backend, device: torch.device) -> bool:
    a, b = exact_operand(20, 64), exact_operand(30, 64)
    memory = torch.empty(a.codes.numel() + 1, dtype=torch.uint8, device=device)
    shifted = memory[1:].view(a.codes.shape).copy_(a.codes)
    odd = QTensor(shifted, *(tensor.to(device) for tensor in a.tensors[1:]), *a.record)
    want = REFERENCE.matmul(a, b, torch.float32)
    return torch.equal(chip.matmul(odd, b.to(device), torch.float32).cpu(), want)


def large(job: Job, backend: str, what: str) -> None:
    """More than 2^31 elements in or out; the tail's codes are known, as its amax is the whole's."""
    place = job.settings.place
    chip = place.backend(backend)
    needed = "matmul" if what == "product" else "quantize"
    if needed not in chip.operations:
        raise Skip(f"{backend} does not {needed}")
    if place.free_bytes() < 20 * 2**30:
        raise Skip("less than 20 GiB of the GPU are free")

    compare = {"rows": _tail_of_rows, "columns": _tail_of_columns, "product": _tail_of_product}[
        what
    ]
    count = Count(job, check="2^31 elements", backend=backend, case=what)
    count.run([(what, lambda: compare(chip, place))])


def _tall(place: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [2^19 + 64, 4096], of zeros but for its last rows, on the device; those rows)."""
    rows, columns = place.size(2**19 + 64), place.size(4096)
    tail = matrix(TAIL, columns)
    tail[0, 0] = 64.0
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=place.device)
    x[-TAIL:] = tail.to(place.device)
    return x, tail


def _tail_of_rows(chip: Backend, place: Any) -> bool:
    rtn = get_quantizer("rtn")
    x, tail = _tall(place)
    q = chip.quantize(x, rtn, rtn.check())
    want = rtn.quantize(tail, rtn.check())
    ends = (q.codes[-TAIL:], q.block_scale[-TAIL:], q.global_scale)
    back = chip.dequantize(q, torch.bfloat16)[-TAIL:].cpu()
    right = same(QTensor(*ends, q.block, tuple(tail.shape)), want)
    return right and torch.equal(back, want.dequantize(torch.bfloat16))


def _tail_of_columns(chip: Backend, place: Any) -> bool:
    """Compare the last columns of x^T: two codes per byte, a scale per 16."""
    rtn = get_quantizer("rtn")
    x, tail = _tall(place)
    q = chip.quantize(x.t(), rtn, rtn.check())
    want = rtn.quantize(tail.t(), rtn.check())
    ends = (q.codes[:, -TAIL // 2 :], q.block_scale[:, -TAIL // 16 :], q.global_scale)
    return same(QTensor(*ends, q.block, tuple(tail.t().shape)), want)


def _tail_of_product(chip: Backend, place: Any) -> bool:
    m, n = place.size(2**16) + TAIL, place.size(2**15) + 64
    a, b = exact_operand(m, 64), exact_operand(n, 64)
    y = chip.matmul(a.to(place.device), b.to(place.device), torch.bfloat16)
    ends = QTensor(a.codes[-TAIL:], a.block_scale[-TAIL:], a.global_scale, a.block, (TAIL, 64))
    return torch.equal(y[-TAIL:].cpu(), REFERENCE.matmul(ends, b, torch.bfloat16))


def explained(job: Job, operation: str, quantizer: str | None) -> None:
    """What ``nvfp4.explain`` says of one operation: which backend runs it, and why not the others.

    Asking runs the self-checks, and so compiles what training will need.
    """
    lines = explain(operation, job.settings.place.device, quantizer).splitlines()
    verdicts = dict(line.split(": ", 1) for line in lines)
    best = next((name for name, said in verdicts.items() if said.startswith("chosen")), "-")
    job.add(operation=operation, quantiser=quantizer or "-", chosen=best, **verdicts)
