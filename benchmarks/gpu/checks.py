"""Is it right: each backend by its name against the reference, bit for bit, on what kernels get wrong.

A unit is one (backend, quantiser, shape, dtype), or one shape or tile of a product. It compares several things and
stops at the first exception, since what follows a fault on a GPU says nothing. Operations that a backend does not have
are not asked of it.
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
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.bench.cases import QUANTISERS
from nvfp4.numerics.codec import e4m3_encode
from nvfp4.numerics.formats import NVFP4, ROW_BLOCK, TILE_BLOCK
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import explain
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

REFERENCE = ReferenceBackend()
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
Pair = tuple[Quantizer, Options]


class Count:
    """Comparisons made, how many were wrong, and what the first of those was."""

    def __init__(self, job: Job, **labels: Any) -> None:
        self.job, self.labels = job, labels
        self.checked, self.wrong, self.first = 0, 0, ""

    def add(self, note: str, compare: Callable[[], bool]) -> None:
        """``compare`` says whether all is well. What it raises is one more wrong, and ends the unit."""
        self.checked += 1
        try:
            good = compare()
            self.job.settings.place.synchronize()
        except Exception as error:
            self._blame(f"{note}: {type(error).__name__}: {error}")
            self.report()
            raise
        if not good:
            self._blame(note)

    def _blame(self, what: str) -> None:
        self.wrong += 1
        self.first = self.first or what[:400]

    def report(self) -> None:
        """The row."""
        self.job.add(**self.labels, checked=self.checked, wrong=self.wrong, first=self.first)


def _run(count: Count, comparisons: Sequence[tuple[str, Callable[[], bool]]]) -> None:
    """All of them, then the row. An exception is in the row already: the unit has not failed beyond that."""
    try:
        for note, compare in comparisons:
            count.add(note, compare)
    except Exception:
        print(f"--- {count.labels}", file=sys.stderr)
        traceback.print_exc()
        return
    count.report()


def same(got: QTensor, want: QTensor) -> bool:
    """Bit for bit, any NaN being equal to any."""
    pairs = zip(got.tensors, want.tensors, strict=True)
    equal = all(torch.equal(torch.nan_to_num(a.cpu()), torch.nan_to_num(b)) for a, b in pairs)
    return equal and torch.equal(got.global_scale.isnan().cpu(), want.global_scale.isnan())


def data(rows: int, columns: int, dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    """On the CPU: N(0, 1); "wide": rows of magnitudes from 2^-20 to 2^20; "nan": the last element is one."""
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "wide":
        x *= torch.exp2(torch.arange(rows).remainder(41).sub(20).float())[:, None]
    if kind == "nan":
        x[-1, -1] = float("nan")
    return x.to(dtype)


def chosen(name: str) -> Pair:
    """A quantiser of the table of cases, with its options and seeds beyond 32 bits."""
    quantizer = get_quantizer(QUANTISERS[name][0])
    return quantizer, quantizer.check(seed=2**63 + 16, sign_seed=48, **QUANTISERS[name][1])


def quantise(job: Job, backend: str, name: str, shape: tuple[int, int], dtype: str) -> None:
    """Rows, columns, both in one call, from codes, and decoded again."""
    place = job.settings.place
    chip = place.backend(backend)
    pair = chosen(name)
    reason = chip.refuses("quantize", *pair)
    if reason is not None:
        raise Skip(f"{backend}: {reason}")

    comparisons: list[tuple[str, Callable[[], bool]]] = []
    for kind in ("normal", "wide", "nan") if dtype == "bf16" else ("normal",):
        x = data(*shape, DTYPES[dtype], kind)
        comparisons += [
            (f"{what} {kind}", compare) for what, compare in _of_matrix(chip, x, x.to(place.device), pair).items()
        ]
    count = Count(job, check="quantise", backend=backend, case=f"{name} {shape[0]}x{shape[1]} {dtype}")
    _run(count, comparisons)


def _of_matrix(chip: Backend, x: torch.Tensor, there: torch.Tensor, pair: Pair) -> dict[str, Callable[[], bool]]:
    """All that a backend does with one matrix, each to be compared with the reference on the CPU."""
    quantizer, options = pair
    across = quantizer.quantize(x, options)
    down = quantizer.quantize(x.t(), options)

    def both() -> bool:
        rows, columns = chip.quantize_both(there, pair, pair)
        return same(rows, across) and same(columns, down)

    def decoded() -> bool:
        got = chip.dequantize(across.to(there.device), torch.bfloat16).cpu()
        return torch.equal(torch.nan_to_num(got), torch.nan_to_num(across.dequantize(torch.bfloat16)))

    def from_codes() -> bool:
        tiles = get_quantizer("rtn_2d")
        q = tiles.quantize(x, tiles.check())
        want = quantizer.quantize(q.dequantize().t(), options)
        return same(chip.requantize(q.to(there.device), quantizer, options), want)

    return {
        "rows": lambda: same(chip.quantize(there, quantizer, options), across),
        "columns": lambda: same(chip.quantize(there.t(), quantizer, options), down),
        "both": both,
        "decoded": decoded,
        "from codes": from_codes,
    }


def exact(rows: int, columns: int, block: tuple[int, int] = ROW_BLOCK, row_scaled: bool = False) -> QTensor:
    """Any codes on block scales of 1/2, 1 and 2 and global scales of 1/2 (by row also 1 and 3/2).

    A product of two such elements is a multiple of 1/16 not above 144, and 1/2 * 1/2 or 3/2 * 1/2 times a sum of 2048
    of them one of 1/64 not above 144 * 2048 * 3/4, so below 2^24 of those: exact in float32 in any order of summation
    and with the global scales applied in any way. A wrong place of a scale, or a missing one, shows.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    width = -(-columns // NVFP4.block_size)
    scales = (-(-rows // block[0]), width)
    codes = torch.randint(256, (rows, width * NVFP4.block_size // 2), generator=generator).to(torch.uint8)
    codes[:, columns // 2 :] = 0
    exponents = torch.randint(-1, 2, scales, generator=generator)
    block_scale = e4m3_encode(torch.exp2(exponents.float()))
    global_scale = torch.full((rows if row_scaled else 1,), 0.5)
    if row_scaled:
        global_scale[::2] = 1.5
        global_scale[::3] = 1.0
    return QTensor(codes, block_scale, global_scale, block, (rows, columns))


def product_of(job: Job, backend: str, shape: tuple[int, int, int]) -> None:
    """a b^T of one shape: row scales or not, 16x16 blocks or not, every output dtype, with and without bias."""
    place = job.settings.place
    chip = place.backend(backend)
    if "matmul" not in chip.operations:
        raise Skip(f"{backend} has no GEMM")
    m, n, k = shape
    comparisons: list[tuple[str, Callable[[], bool]]] = []
    for scaled, tall in product((False, True), (False, True)):
        a = exact(m, k, row_scaled=scaled)
        b = exact(n, k, block=TILE_BLOCK if tall else ROW_BLOCK)
        for (label, dtype), bias in product(DTYPES.items(), (None, torch.arange(n).float() / 4)):
            note = f"{label} rows={scaled} tiles={tall} bias={bias is not None}"
            comparisons.append((note, _multiplies(chip.matmul, a, b, dtype, bias, place.device)))
    count = Count(job, check="product", backend=backend, case=f"{m}x{n}x{k}")
    _run(count, comparisons)


def _multiplies(
    multiply: Callable[..., torch.Tensor],
    a: QTensor,
    b: QTensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    device: torch.device,
) -> Callable[[], bool]:
    def compare() -> bool:
        want = REFERENCE.matmul(a, b, dtype, bias)
        there = None if bias is None else bias.to(device)
        return torch.equal(multiply(a.to(device), b.to(device), dtype, there).cpu(), want)

    return compare


def way_to_multiply(job: Job, index: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    """One tile of the FP4 GEMM by its number, or decoding to BF16 first (number 0), on aligned and ragged shapes."""
    place = job.settings.place
    ways = list(place.gemms().items())
    if index >= len(ways):
        raise Skip(f"this card has {len(ways)} ways to multiply")
    name, multiply = ways[index]
    comparisons = []
    for m, n, k in shapes:
        a, b = exact(m, k), exact(n, k)
        for label in ("bf16", "f32"):
            compare = _multiplies(multiply, a, b, DTYPES[label], None, place.device)
            comparisons.append((f"{m}x{n}x{k} {label}", compare))
    count = Count(job, check="way to multiply", backend="triton", case=name)
    _run(count, comparisons)


def misaligned(job: Job, backend: str, name: str) -> None:
    """Views at odd offsets, with gaps, with exchanged strides, broadcast; codes that begin at an odd byte."""
    place = job.settings.place
    chip = place.backend(backend)
    quantizer, options = chosen(name)
    memory = data(80, 160, torch.bfloat16)
    there = memory.to(place.device)
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "offset 1": lambda t: t.view(-1)[1:][: 40 * 48].view(40, 48),
        "offset 3, down": lambda t: t.view(-1)[3:][: 40 * 48].view(48, 40).t(),
        "every second column": lambda t: t[:, ::2],
        "a corner": lambda t: t[1:34, 3:100],
        "one row, spread": lambda t: t[:1].expand(20, 160),
        "one column, spread": lambda t: t[:, :1].expand(80, 32),
    }
    comparisons: list[tuple[str, Callable[[], bool]]] = []
    if "quantize" in chip.operations:
        for note, view in views.items():
            each = _of_matrix(chip, view(memory), view(there), (quantizer, options))
            comparisons += [(f"{what}, {note}", each[what]) for what in ("rows", "both")]
    if "matmul" in chip.operations:
        comparisons.append(("codes at an odd byte", lambda: _odd_codes(chip, place.device)))
    count = Count(job, check="misaligned", backend=backend, case=name)
    _run(count, comparisons)


def _odd_codes(chip: Backend, device: torch.device) -> bool:
    a, b = exact(20, 64), exact(30, 64)
    shifted = torch.empty(a.codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view(a.codes.shape)
    odd = QTensor(shifted.copy_(a.codes), *(t.to(device) for t in a.tensors[1:]), *a.record)
    want = REFERENCE.matmul(a, b, torch.float32)
    return torch.equal(chip.matmul(odd, b.to(device), torch.float32).cpu(), want)


def large(job: Job, backend: str, what: str) -> None:
    """More than 2^31 elements in or out; the tail's codes are known, since its maximum is the whole's."""
    place = job.settings.place
    chip = place.backend(backend)
    needed = "matmul" if what == "product" else "quantize"
    if needed not in chip.operations:
        raise Skip(f"{backend} does not {needed}")
    if place.free_bytes() < 20 * 2**30:
        raise Skip("less than 20 GiB of the GPU are free")
    compare = {"rows": _tail_of_rows, "columns": _tail_of_columns, "product": _tail_of_product}[what]
    count = Count(job, check="2^31 elements", backend=backend, case=what)
    _run(count, [(what, lambda: compare(chip, place))])


def _tall(place: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [2^19 + 64, 4096] of zeros but for its last 48 rows, on the device; those)."""
    rows, columns = place.size(2**19 + 64), place.size(4096)
    tail = data(48, columns, torch.bfloat16)
    tail[0, 0] = 64.0
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=place.device)
    x[-48:] = tail.to(place.device)
    return x, tail


def _tail_of_rows(chip: Backend, place: Any) -> bool:
    rtn = get_quantizer("rtn")
    x, tail = _tall(place)
    q = chip.quantize(x, rtn, rtn.check())
    want = rtn.quantize(tail, rtn.check())
    last = QTensor(q.codes[-48:], q.block_scale[-48:], q.global_scale, q.block, tuple(tail.shape))
    back = chip.dequantize(q, torch.bfloat16)[-48:].cpu()
    return same(last, want) and torch.equal(back, want.dequantize(torch.bfloat16))


def _tail_of_columns(chip: Backend, place: Any) -> bool:
    rtn = get_quantizer("rtn")
    x, tail = _tall(place)
    q = chip.quantize(x.t(), rtn, rtn.check())
    want = rtn.quantize(tail.t(), rtn.check())
    shape = (tail.shape[1], tail.shape[0])
    last = QTensor(q.codes[:, -24:], q.block_scale[:, -3:], q.global_scale, q.block, shape)
    return same(last, want)


def _tail_of_product(chip: Backend, place: Any) -> bool:
    m, n = place.size(2**16) + 48, place.size(2**15) + 64
    a, b = exact(m, 64), exact(n, 64)
    y = chip.matmul(a.to(place.device), b.to(place.device), torch.bfloat16)
    ends = QTensor(a.codes[-48:], a.block_scale[-48:], a.global_scale, a.block, (48, 64))
    return torch.equal(y[-48:].cpu(), REFERENCE.matmul(ends, b, torch.bfloat16))


def explained(job: Job, operation: str, quantizer: str | None) -> None:
    """What ``nvfp4.explain`` says of one operation: which backend runs it, and why each one before it does not.

    Asking runs the self-checks, and so compiles what training will need.
    """
    said = explain(operation, job.settings.place.device, quantizer)
    verdicts = dict(line.split(": ", 1) for line in said.splitlines())
    best = next((name for name, verdict in verdicts.items() if verdict.startswith("chosen")), "-")
    job.add(operation=operation, quantiser=quantizer or "-", chosen=best, **verdicts)
