"""How things are timed: taking turns, medians, cold caches on a GPU; and on what machine it was."""

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


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What figures are measured on: processor or GPU with its clocks, threads, versions, commit and date.

    commit: of the checkout that this package lies in, with + if tracked files were changed; absent if it lies in none.
    """
    facts: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    facts["instruction sets"] = ", ".join(instruction_sets()) or "no native kernels"
    if device.type == "cuda":
        facts = {"gpu": torch.cuda.get_device_name(device)} | clocks(device) | facts
        facts["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        facts["cuda"] = torch.version.cuda
    facts |= {name: version for name in ("nvfp4", "torch", "triton") if (version := _version(name)) is not None}
    commit = _commit()
    facts |= {"python": platform.python_version()} | ({} if commit is None else {"commit": commit})
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f} processes wanted to run in the last minute"
    return facts | {"date": time.strftime("%Y-%m-%d")}


SMI = {
    "SM clock": "clocks.sm",
    "memory clock": "clocks.mem",
    "largest SM clock": "clocks.max.sm",
    "power limit": "power.limit",
    "driver": "driver_version",
}


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power limit and driver of a GPU as ``nvidia-smi`` tells them; nothing where it cannot be asked."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in said.split(",")), strict=False))


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


def _commit() -> str | None:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]

    def ask(*words: str) -> str | None:
        try:
            said = subprocess.run([*git, *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", here.name) is None:  # some other checkout may hold an installed package
        return None
    commit = ask("rev-parse", "--short", "HEAD")
    return commit and commit + ("+" if ask("status", "--porcelain", "-uno") else "")


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], seconds: float = 2.0, least: int = 5, device: torch.device = CPU
) -> dict[str, float]:
    """Median milliseconds of each candidate, all taking turns for ``seconds`` per candidate or ``least`` rounds.

    A shared machine drifts; turns let the drift fall on all of them alike, so ratios hold where single times do not.
    On a GPU each run is timed by events, with its L2 cache filled with something else before.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    timed = _on_gpu(device) if device.type == "cuda" else _on_cpu
    for run in candidates.values():
        run()
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, run in candidates.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def _on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _on_gpu(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(run: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop)

    return timed


def copier(nbytes: int, device: torch.device = CPU) -> Callable[[], Any]:
    """A copy that reads and writes ``nbytes`` in total: the lower bound of anything that must move as much."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
