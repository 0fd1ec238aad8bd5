"""How things are timed: candidates take turns, and the median counts. And on what machine it was.

    interleaved({"copy": copy, "rtn": run})      milliseconds of each, by name
        one run of each, which warms up and is not counted
        a b a b a b ..., until the time is over and each has had its least number of runs
        the median of each

A shared machine drifts, and turns let the drift fall on all candidates alike: ratios hold where
single times do not. What one run takes is asked of ``timed``: the clock of a CPU, or two events of
a GPU with its L2 cache filled with something else before (``timer``).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nvfp4.backends.native.cpu import instruction_sets

CPU = torch.device("cpu")

Run = Callable[[], Any]


def on_cpu(run: Run) -> float:
    """Milliseconds of one run by the clock."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def timer(device: torch.device) -> Callable[[Run], float]:
    """What times one run on a device, in milliseconds."""
    if device.type != "cuda":
        return on_cpu
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    # twice the L2 cache, so that nothing of the run before is left in it
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(run: Run) -> float:
        with torch.cuda.device(device):
            flush.zero_()

            # Filling the cache is queued before the first event, so it is not timed.
            start.record()
            run()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop)

    return timed


def interleaved(
    candidates: Mapping[str, Run],
    seconds: float = 2.0,
    least: int = 5,
    timed: Callable[[Run], float] = on_cpu,
) -> dict[str, float]:
    """Median milliseconds of each candidate, all taking turns.

    seconds: per candidate. least: rounds that are run however long they take.
    """
    # the first run of each compiles, allocates and warms caches; it does not count
    for run in candidates.values():
        run()

    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, run in candidates.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def copier(nbytes: int, device: torch.device = CPU) -> Run:
    """A copy that reads and writes ``nbytes`` in total: the lower bound of what moves as much."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What figures are measured on: processor or GPU with its clocks, versions, commit and date.

    commit: absent where ``commit`` knows none.
    """
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device)} | clocks(device)
    facts["processor"] = _processor()
    facts["threads"] = torch.get_num_threads()
    facts["instruction sets"] = ", ".join(instruction_sets()) or "no native kernels"
    if device.type == "cuda":
        facts["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        facts["cuda"] = torch.version.cuda

    # What a figure may change with: versions, and the commit of what was measured.
    for package in ("nvfp4", "torch", "triton"):
        if (version := _version(package)) is not None:
            facts[package] = version
    facts["python"] = platform.python_version()
    if (measured := commit()) is not None:
        facts["commit"] = measured

    # How much else ran: on a shared machine the first thing to ask of a strange figure.
    if (load := _load()) is not None:
        facts["load"] = load
    facts["date"] = time.strftime("%Y-%m-%d")
    return facts


SMI = {
    "SM clock": "clocks.sm",
    "memory clock": "clocks.mem",
    "largest SM clock": "clocks.max.sm",
    "power limit": "power.limit",
    "driver": "driver_version",
}


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power limit and driver of a GPU; nothing where ``nvidia-smi`` cannot be asked."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SMI.values())}"]

    # Asked by UUID: torch's numbers and nvidia-smi's differ under CUDA_VISIBLE_DEVICES.
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in done.stdout.split(",")), strict=False))


CHANGES = ("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
"""What git says of tracked files that are not as they were committed."""


def commit() -> str | None:
    """The commit of the checkout that holds this package, with + if tracked files changed.

    Kept figures are no change. None if it lies in none: some other checkout may hold an installed
    package.
    """
    here = Path(__file__)

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(here.parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Not merely some checkout around it: the one that tracks this very file.
    if ask("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = ask("rev-parse", "--short", "HEAD")
    return head and head + ("+" if ask(*CHANGES) else "")


def _load() -> str | None:
    """What else runs: now, and as the system's mean over the last minute."""
    if not hasattr(os, "getloadavg"):
        return None
    mean = f"{os.getloadavg()[0]:.1f} in the last minute"
    now = Path("/proc/loadavg")
    if not now.exists():
        return mean
    running = int(now.read_text().split()[3].partition("/")[0])
    return f"{running - 1} other processes running, {mean}"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    for line in about.read_text().splitlines() if about.exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return torch.__version__ if package == "torch" else None
