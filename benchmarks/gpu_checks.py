"""What ``on_gpu.py`` asks of every backend on a device: the reference's bits, products, layers, graphs, large tensors.

A check counts what it compared and what was wrong; it never raises, and says what came first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from nvfp4.backends.base import Backend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS
from nvfp4.bench.cases import QUANTISERS
from nvfp4.convert import convert
from nvfp4.formats import E2M1
from nvfp4.linear import Linear
from nvfp4.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import RECIPES

Task = tuple[str, str]
Row = dict[str, Any]
REFERENCE = ReferenceBackend()
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHAPES = ((256, 512), (17, 33), (130, 100), (1, 1), (5, 270))
"""Whole multiples, as in training; odd in every way; a single element."""


def tasks(dry: bool) -> list[Task]:
    """What is checked, each part on its own, the slowest to compile first."""
    cases = ["ms_eden(2)", "rtn", "sr"] if dry else list(QUANTISERS)
    recipes = ["nvidia"] if dry else [name for name, recipe in RECIPES.items() if recipe.quantized]
    parts = [("quantise", name) for name in cases] + [("layer", name) for name in recipes]
    return [*parts, ("gemm", "exact"), ("misaligned", "views"), ("again", "compiled"), ("large", "2^31")]


def backends(device: torch.device) -> list[Backend]:
    """Those that run there; on a GPU the reference too, which is judged by itself on the CPU."""
    there = [b for b in BACKENDS.values() if b.unavailable(device) is None]
    return [b for b in there if device.type != "cpu" or b is not BACKENDS["reference"]]


class Count:
    """Comparisons made, how many were wrong, and the first of those."""

    def __init__(self, what: str, backend: str) -> None:
        self.what, self.backend, self.checked, self.wrong, self.first = what, backend, 0, 0, "-"

    def add(self, note: str, compare: Callable[[], bool]) -> None:
        """``compare`` says whether all is well; raising is wrong too."""
        self.checked += 1
        try:
            fine, said = compare(), ""
        except Exception as error:
            fine, said = False, f": {type(error).__name__}: {error}"
        if not fine:
            self.wrong += 1
            self.first = f"{note}{said}"[:400] if self.first == "-" else self.first

    @property
    def row(self) -> Row:
        """For the report."""
        names = {"check": self.what, "backend": self.backend}
        return names | {"checked": self.checked, "wrong": self.wrong, "first": self.first}


def check(task: Task, device: str, dry: bool) -> list[Row]:
    """All backends through one task."""
    torch.set_num_threads(1 if dry else 2)
    kind, name = task
    where = torch.device(device)
    run: dict[str, Callable[..., None]] = {
        "quantise": _quantise, "layer": _layer, "gemm": _gemm, "misaligned": _misaligned, "again": _again,
        "large": _large,
    }  # fmt: skip
    rows = []
    for backend in backends(where):
        if (kind, backend.name) == ("large", "reference"):
            continue
        count = Count(f"{kind} {name}", backend.name)
        try:
            run[kind](count, backend, name, where, dry)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"

            def broken(message: str = message) -> bool:
                raise RuntimeError(message)

            count.add("the check itself", broken)
        rows.append(count.row)
    return rows


def same(got: QTensor, want: QTensor) -> bool:
    """Bit for bit, any NaN being equal to any."""
    pairs = zip(got.tensors, want.tensors, strict=True)
    return all(torch.equal(torch.nan_to_num(a.cpu()), torch.nan_to_num(b)) for a, b in pairs) and torch.equal(
        got.global_scale.isnan().cpu(), want.global_scale.isnan()
    )


def _data(rows: int, columns: int, dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 7919 + columns))
    if kind == "wide":
        x *= torch.exp2(torch.arange(rows).remainder(41).sub(20).float())[:, None]
    if kind == "nan":
        x[-1, -1] = float("nan")
    return x.to(dtype)


def _quantise(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    quantizer = get_quantizer(QUANTISERS[name][0])
    options = quantizer.check(seed=2**63 + 16, sign_seed=48, **QUANTISERS[name][1])
    if backend.refuses("quantize", quantizer, options) is not None:
        return
    shapes = SHAPES[1:2] if dry else SHAPES
    for shape, dtype, kind in product(shapes, DTYPES[: 1 if dry else None], ("normal", "wide", "nan")):
        if dry and kind != "wide":
            continue
        if kind != "normal" and dtype is not torch.bfloat16:
            continue
        x = _data(*shape, dtype, kind)
        there = x.to(device)
        across, down = quantizer.quantize(x, options), quantizer.quantize(x.t(), options)
        note = f"{shape} {dtype} {kind}"
        count.add(f"rows {note}", lambda: same(backend.quantize(there, quantizer, options), across))  # noqa: B023
        count.add(f"columns {note}", lambda: same(backend.quantize(there.t(), quantizer, options), down))  # noqa: B023
        pair = (quantizer, options)
        count.add(f"both {note}", lambda: _both(backend, there, pair, across, down))  # noqa: B023
        count.add(f"decoded {note}", lambda: _decoded(backend, across, device))  # noqa: B023
        count.add(f"from codes {note}", lambda: _requantised(backend, x, quantizer, options, device))  # noqa: B023


def _both(backend: Backend, x: torch.Tensor, pair: tuple[Quantizer, Options], across: QTensor, down: QTensor) -> bool:
    rows, columns = backend.quantize_both(x, pair, pair)
    return same(rows, across) and same(columns, down)


def _decoded(backend: Backend, q: QTensor, device: torch.device) -> bool:
    got, want = backend.dequantize(q.to(device), torch.bfloat16).cpu(), q.dequantize(torch.bfloat16)
    return torch.equal(torch.nan_to_num(got), torch.nan_to_num(want))


def _requantised(
    backend: Backend, x: torch.Tensor, quantizer: Quantizer, options: Options, device: torch.device
) -> bool:
    rtn = get_quantizer("rtn_2d")
    q = rtn.quantize(x, rtn.check())
    want = quantizer.quantize(q.dequantize().t(), options)
    return same(backend.requantize(q.to(device), quantizer, options), want)


def _exact(rows: int, columns: int, **options: Any) -> QTensor:
    """Codes of multiples of 1/2 up to 6 on equal scales: their products of up to 2^9 terms are exact in any order."""
    grid = torch.tensor([*E2M1.grid, *(-value for value in E2M1.grid[1:])])
    x = grid[torch.randint(len(grid), (rows, columns), generator=torch.Generator().manual_seed(rows + columns))]
    x[:, ::16] = E2M1.max
    rtn = get_quantizer("rtn")
    return rtn.quantize(x, rtn.check(**options))


def _gemm(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    from nvfp4.backends.triton import gemm as fp4

    shapes = ((5, 9, 100),) if dry else ((256, 512, 256), (257, 130, 96), (1, 513, 272), (1, 1, 1), (3000, 2000, 512))
    for (m, n, k), scaled, tall in product(shapes, (False, True), (False, True)):
        a = _exact(m, k, row_scaled=scaled)
        b = _exact(n, k, block=(16, 16) if tall else (1, 16))
        bias = torch.arange(n).float()
        here = (a.to(device), b.to(device))
        for dtype, add in product(DTYPES[1 if dry else 0 :], (None, bias)):
            want = REFERENCE.matmul(a, b, dtype, add)
            there = None if add is None else add.to(device)
            note = f"{m}x{n}x{k} {dtype} rows={scaled} tiles={tall} bias={add is not None}"
            count.add(note, lambda: torch.equal(backend.matmul(*here, dtype, there).cpu(), want))  # noqa: B023
        if backend.name == "triton" and not dry:
            want = REFERENCE.matmul(a, b, torch.bfloat16)
            for tile in fp4.TILES[fp4._device(device)[0]]:
                count.add(
                    f"{m}x{n}x{k} {tile}",
                    lambda: torch.equal(fp4.gemm(*here, torch.bfloat16, tile=tile).cpu(), want),  # noqa: B023
                )


def _misaligned(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    """Views at odd offsets, with gaps, reversed roles of the strides, broadcast; codes that begin at an odd byte."""
    memory = _data(80, 160, torch.bfloat16)
    there = memory.to(device)
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "offset 1": lambda t: t.view(-1)[1:][: 40 * 48].view(40, 48),
        "offset 3, down": lambda t: t.view(-1)[3:][: 40 * 48].view(48, 40).t(),
        "every second column": lambda t: t[:, ::2],
        "a corner": lambda t: t[1:34, 3:100],
        "one row, spread": lambda t: t[:1].expand(20, 160),
        "one column, spread": lambda t: t[:, :1].expand(80, 32),
    }
    for name_ in ("rtn",) if dry else ("rtn", "sr"):
        quantizer = get_quantizer(name_)
        checked = quantizer.check(seed=3)
        for note, view in views.items():
            want = quantizer.quantize(view(memory), checked)
            count.add(
                f"{name_} {note}",
                lambda: same(backend.quantize(view(there), quantizer, checked), want),  # noqa: B023
            )
            pair = (quantizer, checked)
            down = quantizer.quantize(view(memory).t(), checked)
            count.add(f"both {name_} {note}", lambda: _both(backend, view(there), pair, want, down))  # noqa: B023
    a, b = _exact(20, 64), _exact(30, 64)
    shifted = torch.empty(a.codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view(a.codes.shape)
    odd = QTensor(shifted.copy_(a.codes), *(t.to(device) for t in a.tensors[1:]), *a.record)
    want_y = REFERENCE.matmul(a, b, torch.float32)
    count.add(
        "codes at an odd byte", lambda: torch.equal(backend.matmul(odd, b.to(device), torch.float32).cpu(), want_y)
    )


def _layer(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    """Forward and backward there and on the CPU: equal codes, so that only the order of sums and a cast differ."""
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        module = nn.Linear(96, 80, dtype=dtype)
        convert(module, name, seed=5, verbose=False)
        found = []
        for place, chosen in ((torch.device("cpu"), "auto"), (device, backend.name)):
            layer = copy.deepcopy(module).to(place)
            assert isinstance(layer, Linear)
            layer.nvfp4.backend = chosen
            x = _data(40, 96, dtype).to(place).requires_grad_()
            with torch.autocast(place.type, dtype=torch.bfloat16, enabled=autocast):
                y = layer(x)
            dy = _data(40, 80, y.dtype).to(place)
            y.backward(dy)
            found.append([t.detach().cpu().float() for t in (y, x.grad, layer.weight.grad, layer.bias.grad)])
        # float32: sums of up to 96 terms; BF16: one rounding more or less
        tolerance = 2.0**-18 if dtype is torch.float32 and not autocast else 2.0**-7
        for what, want, got in zip(("y", "dx", "dw", "db"), *found, strict=True):
            near = float((got - want).abs().max()) <= tolerance * float(want.abs().max())
            count.add(f"{what} {dtype} autocast={autocast}", lambda near=near: near)


def _again(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    """Steps after the first compile nothing: no seed and no address is a reason to."""
    if backend.name != "triton" or dry:
        return
    layer, x = _small_layer("quartet2", backend.name, device)
    before = -1
    for i in range(40):
        layer(x).square().sum().backward()
        if i == 1:
            before = compiled_kernels()
    fresh = compiled_kernels() - before
    count.add(f"{fresh} kernels compiled in steps 3 to 40", lambda: fresh == 0)


def compiled_kernels() -> int:
    """How many kernels this process holds."""
    from nvfp4.backends.triton import gemm_kernel, kernels

    found = {
        id(v): v for module in (kernels, gemm_kernel) for v in vars(module).values() if hasattr(v, "device_caches")
    }
    return sum(len(cache[0]) for kernel in found.values() for cache in kernel.device_caches.values())


def _small_layer(recipe: str, backend: str, device: torch.device) -> tuple[nn.Linear, torch.Tensor]:
    layer = nn.Linear(256, 128, device=device)
    convert(layer, recipe, backend=backend, seed=1, verbose=False)
    return layer, torch.randn(128, 256, device=device, requires_grad=True)


def _large(count: Count, backend: Backend, name: str, device: torch.device, dry: bool) -> None:
    """More than 2^31 elements in and out. The tail's codes are known: its maximum is the whole's."""
    rows = 2**19 + 64 if not dry else 160
    columns = 4096 if not dry else 32
    if not dry and torch.cuda.mem_get_info(device)[0] < 40 * 2**30:
        count.what += " (left out: less than 40 GiB free)"
        return
    rtn = get_quantizer("rtn")
    options = rtn.check()
    tail = _data(48, columns, torch.bfloat16)
    tail[0, 0] = 64.0
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    x[-48:] = tail.to(device)
    want = rtn.quantize(tail, options)

    def along() -> bool:
        q = backend.quantize(x, rtn, options)
        last = QTensor(q.codes[-48:], q.block_scale[-48:], q.global_scale, q.block, (48, columns))
        back = backend.dequantize(q, torch.bfloat16)[-48:].cpu()
        return same(last, want) and torch.equal(back, want.dequantize(torch.bfloat16))

    def down() -> bool:
        q = backend.quantize(x.t(), rtn, options)
        other = rtn.quantize(tail.t(), options)
        last = QTensor(q.codes[:, -24:], q.block_scale[:, -3:], q.global_scale, q.block, (columns, 48))
        return same(last, other)

    def multiplied() -> bool:
        m, n = (2**16 + 48, 2**15 + 64) if not dry else (80, 40)
        a, b = _exact(m, 64), _exact(n, 64)
        dtype = torch.float16 if dry else torch.bfloat16  # the interpreter cuts off what BF16 would round
        y = backend.matmul(a.to(device), b.to(device), dtype)
        ends = QTensor(a.codes[-48:], a.block_scale[-48:], a.global_scale, a.block, (48, 64))
        return torch.equal(y[-48:].cpu(), REFERENCE.matmul(ends, b, dtype))

    count.add("rows", along)
    count.add("columns", down)
    count.add("product", multiplied)


def graph_checks(device: torch.device) -> Iterator[Row]:
    """Of every fast backend on this GPU: no waiting, graphs that follow their inputs and draw anew, compiled."""
    for backend in backends(device):
        if backend.name == "reference":
            continue
        for name in ("rtn", "sr", "ms_eden(2)", "four_over_six", "rtn row-scaled"):
            count = Count(f"graph of {name}", backend.name)
            count.add("replays", lambda: _replays(backend, name, device))  # noqa: B023
            yield count.row
        checks = {"waits for nothing": _no_waiting, "in a graph": _layer_replays, "compiled": _compiled}
        for what, compare in checks.items():
            count = Count(f"layer {what}", backend.name)
            for recipe in ("nvidia", "quartet2"):
                count.add(recipe, lambda: compare(recipe, backend.name, device))  # noqa: B023
            yield count.row


def _replays(backend: Backend, name: str, device: torch.device) -> bool:
    quantizer = get_quantizer(QUANTISERS[name][0])
    options = quantizer.check(seed=1, sign_seed=2, **QUANTISERS[name][1])
    x = torch.randn(256, 512, device=device).bfloat16()
    backend.quantize(x, quantizer, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = backend.quantize(x, quantizer, options)
    fine = True
    for kind in ("normal", "nan", "wide"):
        fresh = _data(256, 512, torch.bfloat16, kind)
        x.copy_(fresh)
        graph.replay()
        fine &= same(q, quantizer.quantize(fresh, options))
    return fine


def _no_waiting(recipe: str, backend: str, device: torch.device) -> bool:
    layer, x = _small_layer(recipe, backend, device)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def _layer_replays(recipe: str, backend: str, device: torch.device) -> bool:
    """Each replay gives what the same layer gives in eager mode at that call, and noise is drawn anew."""
    layer, x = _small_layer(recipe, backend, device)
    twin, dy = copy.deepcopy(layer), torch.randn(128, 128, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for module in (layer, twin):
            torch.autograd.grad(module(x), x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(layer(x), x, dy)
    for _ in range(3):
        graph.replay()
        (want,) = torch.autograd.grad(twin(x), x, dy)
        if not torch.equal(captured, want):
            return False
    return True


def _compiled(recipe: str, backend: str, device: torch.device) -> bool:
    layer, x = _small_layer(recipe, backend, device)
    twin, dy = copy.deepcopy(layer), torch.randn(128, 128, device=device)
    quick = torch.compile(layer, fullgraph=True)
    pairs = [[torch.autograd.grad(module(x), x, dy)[0] for _ in range(2)] for module in (quick, twin)]
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
