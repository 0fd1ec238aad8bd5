"""What machines can do at best, and what share of it programs are assumed to reach.

    DEVICES        GPUs by name: peaks from their data sheets, shares as published or assumed
    this_cpu()     the processor at hand: its peaks are measured now
    gpu_at_hand()  the row of ``DEVICES`` for the GPU of this machine, if it has one

    rate of a kernel = peak * share, for FP4 products, for BF16 products, and for memory

A share stands apart from its peak, because their sources differ: a peak is a vendor's promise, a
share somebody's measurement or our assumption. Every number carries its source, which the reports
print beside what they predict from it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4.bench.issue import LANES, SCHEDULERS
from nvfp4.layer.dense import times


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that GEMMs reach as published, and where that stands.

    memory: of the bandwidth, ``DRAM_SHARE`` on every GPU.
    """

    fp4: float
    bf16: float
    memory: float
    source: str


@dataclass(frozen=True)
class Device:
    """What a machine can do at best.

    fp4, fp8, bf16: dense peaks in FLOP/s; fp4 None: no such units, NVFP4 is decoded to 16 bits.
    bandwidth: bytes/s. l2: bytes. launch: seconds from the end of a kernel to the start of the next
    in one stream. capability: for which code was counted (90, 100, also for 10.3, for which ptxas
    makes the same), None for a processor. multiprocessors: how many; clock: theirs in Hz, boosted.
    """

    name: str
    fp4: float | None
    fp8: float | None
    bf16: float
    bandwidth: float
    l2: float
    launch: float
    source: str
    efficiency: Efficiency
    capability: int | None = None
    multiprocessors: int = 0
    clock: float = 0.0

    @property
    def decodes(self) -> bool:
        """Whether it is a GPU whose GEMMs take BF16 that codes are decoded to."""
        return self.capability is not None and self.fp4 is None

    @property
    def issue_rate(self) -> float:
        """Cycles per second of all schedulers, per lane of a warp, as far as kernels fill them.

        Elements times cycles per element of the busiest pipe (``issue.py``), divided by this, are
        seconds.
        """
        return LANES * SCHEDULERS * self.multiprocessors * self.clock * ISSUE_SHARE

    def gemm_rate(self, fp4: bool) -> float:
        """FLOP/s that a GEMM is assumed to run at, on NVFP4 operands or on BF16 ones."""
        if fp4 and self.fp4 is not None:
            return self.fp4 * self.efficiency.fp4
        return self.bf16 * self.efficiency.bf16

    @property
    def memory_rate(self) -> float:
        """Bytes/s that a kernel which only moves data is assumed to reach."""
        return self.bandwidth * self.efficiency.memory


_LAUNCH = 3e-6
"""Assumed: of dependent kernels without graphs, 2 to 4 microseconds are commonly measured."""

DRAM_SHARE = 0.85
"""Of the bandwidth, that a kernel reaches which only moves data.

Global, and fitted to no row of published.json: a Triton copy reaches 81 % on a GB200 (pytorch/ao PR
4247, without what its times leave at no bytes), flashinfer's quantiser 84 % (PR 2838).
"""

ISSUE_SHARE = 0.9
"""Of the cycles of the busiest pipe, that a kernel with warps enough fills.

Global, and fitted once, to TransformerEngine's four rates on a B300 (PR 2412): the two that issue
decides ask for 0.9 to 0.97, by instructions counted in its source. What is left goes to dependent
instructions, barriers, and the beginning and end of each block.
"""

_HOPPER = 1.98e9
"""Boost clock of H100 and H200 SXM."""

_BLACKWELL = 1.965e9
"""Boost clock of B200, assumed for GB200 and GB300."""

_B200_GEMMS = (
    "FP4: mean of the 4720 to 5342 TFLOP/s that Quartet II publishes for its GEMMs on B200; BF16: "
    "assumed, 1.6 PFLOP/s"
)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "B200",
            fp4=9e15,
            fp8=4.5e15,
            bf16=2.25e15,
            bandwidth=7.672e12,
            l2=126e6,
            launch=_LAUNCH,
            source="HGX B200 data sheet (1000 W; an eighth, dense); L2: Blackwell tuning guide; "
            "bandwidth: 7680 bits at 3996 MHz, as its driver says (pytorch/ao PR 4002)",
            efficiency=Efficiency(fp4=0.56, bf16=0.72, memory=DRAM_SHARE, source=_B200_GEMMS),
            capability=100,
            multiprocessors=148,
            clock=_BLACKWELL,
        ),
        Device(
            "GB200",
            fp4=10e15,
            fp8=5e15,
            bf16=2.5e15,
            bandwidth=7.928e12,
            l2=126e6,
            launch=_LAUNCH,
            source="GB200 NVL72 data sheet (per GPU, dense); bandwidth as its driver says "
            "(pytorch/ao, benchmarks/prototype/nvfp4_training)",
            efficiency=Efficiency(fp4=0.56, bf16=0.72, memory=DRAM_SHARE, source=_B200_GEMMS),
            capability=100,
            multiprocessors=152,
            clock=_BLACKWELL,
        ),
        Device(
            "GB300",
            fp4=15e15,
            fp8=5e15,
            bf16=2.5e15,
            bandwidth=8e12,
            l2=126e6,
            launch=_LAUNCH,
            source="GB300 NVL72 data sheet (per GPU, dense); L2 and multiprocessors as GB200",
            efficiency=Efficiency(
                fp4=0.56, bf16=0.72, memory=DRAM_SHARE, source=_B200_GEMMS + "; assumed the same"
            ),
            capability=100,
            multiprocessors=152,
            clock=_BLACKWELL,
        ),
        Device(
            "B300",
            fp4=13.5e15,
            fp8=4.5e15,
            bf16=2.25e15,
            bandwidth=8e12,
            l2=126e6,
            launch=_LAUNCH,
            source="HGX B300 data sheet (an eighth, dense); L2 and multiprocessors as B200",
            efficiency=Efficiency(
                fp4=0.56, bf16=0.72, memory=DRAM_SHARE, source=_B200_GEMMS + "; assumed the same"
            ),
            capability=100,
            multiprocessors=148,
            clock=_BLACKWELL,
        ),
        Device(
            "RTX 5090",
            fp4=1676e12,
            fp8=419e12,
            bf16=209.5e12,
            bandwidth=1.792e12,
            l2=96 * 2**20,
            launch=_LAUNCH,
            source="RTX Blackwell architecture white paper, appendix A (dense, FP32 sums)",
            efficiency=Efficiency(
                fp4=0.72,
                bf16=1.05,
                memory=DRAM_SHARE,
                source="FP4: mean of the 1162 to 1241 TFLOP/s that Quartet II publishes for its "
                "GEMMs; BF16: 213 to 235 TFLOP/s by cuBLAS (vllm PR 38338), above the peak at the "
                "nominal clock",
            ),
            capability=120,
            multiprocessors=170,
            clock=2.407e9,
        ),
        Device(
            "H200",
            fp4=None,
            fp8=1979e12,
            bf16=989.5e12,
            bandwidth=4.8e12,
            l2=50e6,
            launch=_LAUNCH,
            source="H200 data sheet (SXM, dense: half of its sparse figures); L2: H100 white paper",
            efficiency=Efficiency(
                fp4=0.72, bf16=0.72, memory=DRAM_SHARE, source="BF16: assumed as on B200"
            ),
            capability=90,
            multiprocessors=132,
            clock=_HOPPER,
        ),
        Device(
            "H100",
            fp4=None,
            fp8=1979e12,
            bf16=989.5e12,
            bandwidth=3.35e12,
            l2=50e6,
            launch=_LAUNCH,
            source="H100 data sheet (SXM, dense: half of its sparse figures), white paper",
            efficiency=Efficiency(
                fp4=0.72, bf16=0.72, memory=DRAM_SHARE, source="BF16: assumed as on B200"
            ),
            capability=90,
            multiprocessors=132,
            clock=_HOPPER,
        ),
    )
}


def this_cpu(seconds: float = 0.2, clock: Callable[[], float] = time.perf_counter) -> Device:
    """The processor at hand, measured: a BF16 GEMM and a copy, each the best of ``seconds``.

    The GEMM is that of ``times``, torch's or this package's; clock: what tells the seconds.
    """
    n = 1024
    a, b = (torch.ones(n, n, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * n**3 / _best(lambda: times(a, b), seconds, clock)

    # 64 MiB: larger than the caches of most processors, so memory is what answers.
    source = torch.ones(2**26, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), seconds, clock)

    # Where the system does not say how large the L2 cache is, nothing is taken to be cached.
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    l2 = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in names else 0

    # Shares of 1: what was measured is what programs reach, so predictions are lower bounds.
    why = "peaks are measured; rounding is taken to be free, so times are lower bounds"
    what = (
        f"BF16 GEMM of {n}, copy of {source.numel() >> 20} MiB, {torch.get_num_threads()} threads"
    )
    return Device(
        "CPU",
        fp4=None,
        fp8=None,
        bf16=flops,
        bandwidth=bandwidth,
        l2=float(max(l2, 0)),
        launch=0.0,
        source=f"measured now: {what}",
        efficiency=Efficiency(1.0, 1.0, 1.0, why),
    )


def _best(run: Callable[[], Any], seconds: float, clock: Callable[[], float]) -> float:
    """The shortest run, in seconds; the first, which warms up, does not count."""
    run()
    shortest = math.inf
    end = clock() + seconds
    while shortest == math.inf or clock() < end:
        start = clock()
        run()
        shortest = min(shortest, clock() - start)
    return shortest


def find_device(name: str) -> Device:
    """A device of ``DEVICES`` by name, case and spaces aside ("rtx5090"); "cpu": the one at hand.

    Raises ValueError for any other name.
    """
    plain = name.lower().replace(" ", "").replace("_", "")
    if plain == "cpu":
        return this_cpu()
    for device in DEVICES.values():
        if device.name.lower().replace(" ", "") == plain:
            return device
    raise ValueError(f"unknown device {name!r}; known: {', '.join(DEVICES)}, cpu")


def gpu_at_hand() -> Device | None:
    """The GPU of this machine, if the table has it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = [device for device in DEVICES.values() if device.name in name]  # GB200 has B200 in it
    return max(known, key=lambda device: len(device.name), default=None)
