"""Which of the ways that give the same bits is the fastest here: measured once, not assumed.

Both the CUDA and the Triton backend quantise on Hopper and Blackwell, to the same codes. Which is
faster depends on the card, on the quantiser with its options, and on the road that the operand
takes, so each of these is a race of its own, run when a call first asks:

    rows       x [M, K] along K, contiguous rows
    columns    x^T [K, M] along M, read where x lies
    codes      requantize: what codes [M, K] stand for, along M
    both       both orientations in one call, ``quantize_both``, against
    two        one call for each, by the winners of rows and of columns: reading x twice may cost
               less than one kernel that has registers for two rules

A race is of BF16 [8192, 4096], 64 MiB: one of 16 MiB lies in the L2 cache of a card (50 to 126 MB)
when the next one reads it. It takes five turns, or the turns that fit into ``SECONDS``, when
kernels are compiled anyway; a card without room for the matrix holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch

from nvfp4.backends.base import Backend
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.torch_state import without_dispatch_modes
from nvfp4.quantizers.base import Options, Quantizer

Clock = Callable[[Callable[[], object], torch.device], float]
"""Seconds that a call takes on a device."""

Road = Literal["rows", "columns", "codes"]
BOTH, TWO = "both", "two"

SHAPE = (8192, 4096)
TURNS = 5

SECONDS = 0.1
"""After so long measuring ends at the end of a turn."""

MARGIN = 0.95
"""A later one wins only below this share of the earlier one's time: noise must not decide."""

_ONE = 0x38
"""1 as an E4M3 code: exponent 7, whose bias is 7."""

_BUSY_BYTES = 64 << 20
"""Memory that is cleared eight times before a run: the device is busy while the host launches."""


def race(
    backends: Sequence[Backend],
    device: torch.device,
    road: Road,
    quantizer: Quantizer,
    options: Options,
    clock: Clock,
) -> dict[str, float]:
    """Seconds that each backend takes on one road, by its name; {} without room for the matrix."""

    def run(backend: Backend, operand: torch.Tensor | QTensor) -> object:
        if isinstance(operand, QTensor):
            return backend.requantize(operand, quantizer, options)
        return backend.quantize(operand, quantizer, options)

    def entries() -> dict[str, Callable[[], object]]:
        operand = _operand(road, device)
        return {backend.name: partial(run, backend, operand) for backend in backends}

    return _race({backend.name: backend for backend in backends}, entries, device, clock)


def race_both(
    backends: Sequence[Backend],
    winners: tuple[Backend, Backend],
    device: torch.device,
    how: tuple[tuple[Quantizer, Options], tuple[Quantizer, Options]],
    clock: Clock,
) -> dict[str, float]:
    """Seconds of ``quantize_both`` by the backend's name, and of two calls by the name "two".

    winners: of rows and of columns. how: (rows, columns).
    """
    across, down = winners

    def entries() -> dict[str, Callable[[], object]]:
        x = _matrix(device)
        one: dict[str, Callable[[], object]] = {
            backend.name: partial(backend.quantize_both, x, *how) for backend in backends
        }
        return one | {TWO: lambda: (across.quantize(x, *how[0]), down.quantize(x.t(), *how[1]))}

    return _race({backend.name: backend for backend in backends}, entries, device, clock)


def fastest(names: Sequence[str], seconds: Mapping[str, float]) -> str | None:
    """The fastest of those that were timed; an earlier name unless a later one clearly wins."""
    best = None
    for name in names:
        if name in seconds and (best is None or seconds[name] < MARGIN * seconds[best]):
            best = name
    return best


def fastest_first(backends: Sequence[Backend], seconds: Mapping[str, float]) -> list[Backend]:
    """The backends with the fastest of those that were timed first, the others as they were."""
    names = [backend.name for backend in backends]
    best = fastest(names, seconds)
    first = next((name for name in names if name in seconds), None)
    if best == first:
        return list(backends)

    # it takes the place of the first that was timed, before those that were not
    rest = [backend for backend in backends if backend.name != best]
    rest.insert(names.index(str(first)), backends[names.index(str(best))])
    return rest


def _race(
    backends: Mapping[str, Backend],
    entries: Callable[[], Mapping[str, Callable[[], object]]],
    device: torch.device,
    clock: Clock,
) -> dict[str, float]:
    """The least seconds of each entry, in turns; each runs once before, which compiles.

    Waits for the device; draws no random number.
    """
    with without_dispatch_modes(), torch.no_grad():
        try:
            runs = entries()
            for name, run in runs.items():
                if name in backends:
                    backends[name].prepare(run)
                run()
        except torch.OutOfMemoryError:
            return {}

        # take turns, so that a card that slows down slows all of them
        least, spent = dict.fromkeys(runs, float("inf")), 0.0
        for _ in range(TURNS):
            for name, run in runs.items():
                seconds = clock(run, device)
                least[name] = min(least[name], seconds)
                spent += seconds
            if spent > SECONDS:
                break
    return least


def _matrix(device: torch.device) -> torch.Tensor:
    """BF16 ``SHAPE``, both signs; rows are equal, which no kernel can tell."""
    row = torch.linspace(-3, 3, SHAPE[1], device=device).to(torch.bfloat16)
    return row.repeat(SHAPE[0], 1)


def _operand(road: Road, device: torch.device) -> torch.Tensor | QTensor:
    """What is quantised on a road."""
    if road == "codes":
        # every byte is two codes
        q = QTensor.empty(SHAPE, device=device)
        codes = torch.arange(256, device=device).to(torch.uint8)
        q.codes.copy_(codes.repeat(q.codes.numel() // 256).view_as(q.codes))
        q.block_scale.fill_(_ONE)
        q.global_scale.fill_(1.0)
        return q
    x = _matrix(device)
    return x if road == "rows" else x.t()


def seconds_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Seconds between two events around a run.

    The device is kept busy before, so that what the host takes to launch does not count.
    """
    busy = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        # while the device clears, the host gets ahead of it
        for _ in range(8):
            busy.zero_()

        start.record()
        run()
        stop.record()
        stop.synchronize()
    return start.elapsed_time(stop) * 1e-3
