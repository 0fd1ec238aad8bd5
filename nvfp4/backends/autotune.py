"""Which of the backends that give the same bits is the fastest here: measured once, not assumed.

Both the CUDA and the Triton backend quantise on Hopper and Blackwell, to the same codes. Which is
faster depends on the card and on the quantiser, so the first use of each quantiser on each device
times them on one matrix, for one orientation and for both, and keeps the order. That takes five
turns, or the turns that fit into ``SECONDS``, when kernels are compiled anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nvfp4.backends.base import Backend
from nvfp4.numerics.torch_state import without_dispatch_modes
from nvfp4.quantizers.base import Quantizer

Clock = Callable[[Callable[[], object], torch.device], float]
"""Seconds that a call takes on a device."""

SHAPE = (2048, 4096)
TURNS = 5

SECONDS = 0.1
"""After so long measuring ends at the end of a turn."""

MARGIN = 0.95
"""A later backend wins only below this share of the earlier one's time: noise must not decide."""

_BUSY_BYTES = 64 << 20
"""Memory that is cleared eight times before a run: the device is busy while the host launches."""


def autotune(
    backends: Sequence[Backend], device: torch.device, quantizer: Quantizer, clock: Clock
) -> dict[str, float]:
    """Seconds that each backend takes for one BF16 matrix and then for both orientations of it.

    By the backend's name; the least of its turns. Each runs once before, which compiles. Waits for
    the device; draws no random number.
    """
    options = quantizer.check(seed=1)
    with without_dispatch_modes(), torch.no_grad():
        x = torch.linspace(-3, 3, SHAPE[0] * SHAPE[1], device=device).view(SHAPE).to(torch.bfloat16)

        def work(backend: Backend) -> Callable[[], object]:
            how = (quantizer, options)
            return lambda: (backend.quantize(x, *how), backend.quantize_both(x, how, how))

        # compile
        runs = {backend.name: work(backend) for backend in backends}
        for run in runs.values():
            run()

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


def fastest_first(backends: Sequence[Backend], seconds: dict[str, float]) -> list[Backend]:
    """The backends with the fastest of those that were timed first, the others as they were."""
    runners = [backend for backend in backends if backend.name in seconds]
    if not runners:
        return list(backends)

    best = runners[0]
    for backend in runners[1:]:
        if seconds[backend.name] < MARGIN * seconds[best.name]:
            best = backend
    if best is runners[0]:
        return list(backends)

    # it takes the place of the first that was timed, before those that were not
    rest = [backend for backend in backends if backend is not best]
    rest.insert(rest.index(runners[0]), best)
    return rest


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
