"""The stages of ``on_gpu.py``: what is computed and timed on a GPU; with ``dry``, the same lines tiny on a CPU.

Timing is by CUDA events around a replayed graph, so that what the host takes is left out, and by events around plain
calls where it shall count; all candidates take turns, and the median is kept.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NotDone
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_checks
from benchmarks.on_gpu import ROOT, Report
from nvfp4.bench.cases import QUANTISERS, Shape
from nvfp4.bench.layers import layer_for, saved_bytes
from nvfp4.bench.timing import copier, interleaved
from nvfp4.ops import matmul, quantize_both, quantize_with
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.weights import invalidate

Run = Callable[[], Any]
RECIPES = ("nvidia", "quartet2", "search_eden")
REPEATS = 4
"""Calls between two events: a replay costs some microseconds beside its kernels, and plain calls run ahead of them."""


class OutOfTime(Exception):
    """The stage's seconds are over; what is reported stays."""


class Job(NamedTuple):
    """One stage: where its rows go, how long it may take, and whether it is the tiny one."""

    report: Report
    stage: str
    seconds: float
    dry: bool
    began: float

    @property
    def device(self) -> torch.device:
        """The current GPU, or the CPU."""
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    @property
    def left(self) -> float:
        """Seconds."""
        return self.began + self.seconds - time.monotonic()

    def add(self, **row: Any) -> None:
        """Keep a row; ``OutOfTime`` if it was the last that fits."""
        self.report.add(self.stage, **row)
        if self.left <= 0:
            raise OutOfTime


def machine(job: Job) -> None:
    """Device, driver, versions, clocks at rest and under load, and the two rates everything is held against."""
    import triton

    job.add(what="torch", value=f"{torch.__version__}, cuda {torch.version.cuda}, triton {triton.__version__}")
    job.add(what="python", value=sys.version.split()[0])
    if not job.dry:
        facts = torch.cuda.get_device_properties(job.device)
        job.add(what="device", value=f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory >> 30} GiB")
        job.add(what="multiprocessors", value=facts.multi_processor_count)
        job.add(what="L2 bytes", value=getattr(facts, "L2_cache_size", 0))
        job.add(what="driver, clocks, power at rest", value=_smi())
    n, nbytes = (64, 1 << 16) if job.dry else (8192, 1 << 31)
    a, b = (torch.randn(n, n, device=job.device).bfloat16() for _ in range(2))
    ms = medians(job, {"copy": copier(nbytes, job.device), "gemm": lambda: a @ b}, 2.0)
    if not job.dry:
        job.add(what="driver, clocks, power under load", value=_smi())
    job.add(what="copy, GB/s read and written", value=nbytes / ms["copy"] / 1e6)
    job.add(what=f"BF16 GEMM of {n}, TFLOP/s", value=2 * n**3 / ms["gemm"] / 1e9)
    small = a[:64, :64].contiguous()
    for name in ("rtn", "ms_eden"):
        quantizer = get_quantizer(name)
        options = quantizer.check(seed=1)
        job.add(
            what=f"host us of one {name} call", value=host_us(lambda q=quantizer, o=options: quantize_with(small, q, o))
        )


def _smi() -> str:
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError) as error:
        return f"nvidia-smi: {error}"


def correct(job: Job) -> None:
    """Every backend against the reference; several processes, since most of the time goes into compiling kernels."""
    tasks = gpu_checks.tasks(job.dry)
    if job.dry:
        for task in tasks:
            for row in gpu_checks.check(task, str(job.device), True):
                job.add(**row)
        return
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(gpu_checks.check, task, str(job.device), False) for task in tasks]
        try:
            for done in as_completed(waiting, timeout=max(job.left, 1)):
                for row in done.result():
                    job.add(**row)
        except (NotDone, OutOfTime) as error:
            for process in list(pool._processes.values()):
                process.kill()
            raise OutOfTime from error


def graphs(job: Job) -> None:
    """Captured and replayed, compiled, on another stream, watched for synchronisation; in the order of importance."""
    if job.dry:
        job.add(remark="a CPU has no graphs")
        return
    for check in gpu_checks.graph_checks(job.device):
        job.add(**check)


def quantise(job: Job) -> None:
    """Every quantiser on one BF16 matrix: its rows, its columns, both in one read, against a copy of as many bytes."""
    n = 64 if job.dry else 8192
    x = torch.randn(n, n, device=job.device).bfloat16()
    for name in ("rtn", "ms_eden(2)", *(name for name in QUANTISERS if name not in ("rtn", "ms_eden(2)"))):
        quantizer = get_quantizer(QUANTISERS[name][0])
        options = quantizer.check(seed=1, sign_seed=2, **QUANTISERS[name][1])
        reads = 1 if quantizer.rotates else 2  # ms_eden needs no amax first
        nbytes = int(n * n * (reads * x.element_size() + 9 / 16))
        ms = medians(
            job,
            {
                "copy": copier(nbytes, job.device),
                "rows": lambda q=quantizer, o=options: quantize_with(x, q, o),
                "columns": lambda q=quantizer, o=options: quantize_with(x.t(), q, o),
                "both": lambda q=quantizer, o=options: quantize_both(x, (q, o), (q, o)),
            },
            1.5,
        )
        job.add(
            quantiser=name,
            MB=nbytes / 1e6,
            **{f"{key} ms": value for key, value in ms.items()},
            **{f"{key} / copy": ms["copy"] / ms[key] for key in ("rows", "columns")},
            **{"one read over two": (ms["rows"] + ms["columns"]) / ms["both"]},
        )


def gemm(job: Job) -> None:
    """The FP4 GEMM with each of its tiles, and decoding to BF16 for the vendor's GEMM, against the latter alone."""
    from nvfp4.backends.registry import BACKENDS
    from nvfp4.backends.triton import gemm as fp4

    kind = fp4._device(job.device)[0]
    for n in (32,) if job.dry else (8192, 4096):
        a, b = (torch.randn(n, n, device=job.device).bfloat16() for _ in range(2))
        quantizer = get_quantizer("rtn")
        qa, qb = (quantize_with(x, quantizer, quantizer.check()) for x in (a, b))
        runs: dict[str, Run] = {"bf16": lambda a=a, b=b: a @ b.t()}
        runs |= {"auto": lambda qa=qa, qb=qb: matmul(qa, qb, torch.bfloat16)}
        runs |= {"decode, then BF16": lambda qa=qa, qb=qb: BACKENDS["triton"].matmul_decoded(qa, qb, torch.bfloat16)}
        tiles = fp4.TILES[kind][-1:] if job.dry else fp4.TILES[kind]
        for tile in tiles:
            label = f"{kind} {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
            runs[label] = lambda qa=qa, qb=qb, tile=tile: fp4.gemm(qa, qb, torch.bfloat16, tile=tile)
        ms = medians(job, runs, 1.0)
        for what, value in ms.items():
            job.add(size=n, gemm=what, ms=value, TFLOPs=2 * n**3 / value / 1e9, **{"x bf16": value / ms["bf16"]})


def linear(job: Job) -> None:
    """Forward and backward of a layer without bias: plain calls, replayed graphs, bytes kept, where the time goes."""
    for n in (128,) if job.dry else (4096, 8192):
        x = torch.randn(n, n, device=job.device).bfloat16().requires_grad_()
        dy = torch.randn(n, n, device=job.device).bfloat16()
        layers = {name: layer_for(Shape(n, n, n), name, "auto").to(job.device) for name in ("bf16", *RECIPES)}

        def step(layer: torch.nn.Linear, x: torch.Tensor = x, dy: torch.Tensor = dy) -> Any:
            invalidate(layer)
            return torch.autograd.grad(layer(x), (x, layer.weight), dy)

        runs = {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}
        eager = medians(job, runs, 2.0, plain=True)
        device = medians(job, runs, 2.0)
        kept = {name: saved_bytes(layer, x) for name, layer in layers.items()}
        for name in layers:
            job.add(
                size=n,
                recipe=name,
                ms=eager[name],
                **{"x bf16": eager[name] / eager["bf16"]},
                **{"ms of graph": device[name], "x bf16 of graph": device[name] / device["bf16"]},
                **{"saved x bf16": kept[name] / kept["bf16"]},
            )
    for name in ("bf16", *RECIPES):
        job.add(recipe=name, **{"MB for one more layer": _one_more_layer(job, name) / 1e6})
    for name in RECIPES:
        _profile(job, name, runs[name])


def _profile(job: Job, name: str, run: Run) -> None:
    """The kernels of one step by the time they take."""
    if job.dry:
        return
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    except RuntimeError as error:  # no counters may be allowed on a machine that is lent
        job.add(remark=f"no profile: {error}"[:300])
        return
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:14]:
        job.add(recipe=name, kernel=row.key[:70], calls=row.count, us=float(row.self_device_time_total))


def _one_more_layer(job: Job, recipe: str) -> float:
    """Bytes by which the peak of training grows with each further application of one layer."""
    n = 64 if job.dry else 4096
    layer = layer_for(Shape(n, n, n), recipe, "auto").to(job.device)
    x = torch.randn(n, n, device=job.device).bfloat16().requires_grad_()
    peaks = []
    for depth in (2, 10):
        for _ in range(2):
            if not job.dry:
                torch.cuda.reset_peak_memory_stats()
            y = x
            for _ in range(depth):
                y = layer(y) * 1.7  # keeps the size of the numbers; the product with a number keeps nothing
            y.sum().backward()
        peaks.append(0 if job.dry else torch.cuda.max_memory_allocated())
    return (peaks[1] - peaks[0]) / 8


def tests(job: Job) -> None:
    """The package's own tests of what runs on CUDA; their words are in tests.txt."""
    if find_spec("pytest") is None:
        job.add(pytest="it is not installed here")
        return
    chosen = "(cuda or test_triton) and not aot and not interpreter and not compiled_code"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-k", "halves_fit" if job.dry else chosen, "tests/test_triton.py" if job.dry else "tests"]
    command += ["-n", "4"] if find_spec("xdist") and not job.dry else []
    path = job.report.folder / "tests.txt"
    with path.open("w") as log:
        try:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=max(job.left - 5, 5))
            end = "ended"
        except subprocess.TimeoutExpired:
            end = "stopped, the time was over"
    lines = path.read_text().splitlines()
    for line in [line for line in lines if re.match(r"(FAILED|ERROR) ", line)][:40]:
        job.report.add("tests", failed=line[:300])
    job.add(pytest=end, result=lines[-1] if lines else "-")


def medians(job: Job, candidates: dict[str, Run], seconds: float, plain: bool = False) -> dict[str, float]:
    """Median milliseconds of each candidate in turns; of its kernels alone, or with what the host takes if ``plain``.

    A candidate that cannot be captured is timed plainly, and a row says so.
    """
    if job.dry:
        return interleaved(candidates, 0.0, 1)
    replays: dict[str, tuple[Run, int]] = {}
    for name, run in candidates.items():
        with _on_a_side_stream():
            for _ in range(2):
                run()
        replays[name] = (_several(run), REPEATS) if plain else _captured(job, name, run)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + min(seconds * len(candidates), max(job.left, 0))
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        events = []
        for name, (run, calls) in replays.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            events.append((name, start, stop, calls))
        torch.cuda.synchronize()
        for name, start, stop, calls in events:
            times[name].append(start.elapsed_time(stop) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def _on_a_side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _captured(job: Job, name: str, run: Run) -> tuple[Run, int]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _several(run)()
    except Exception as error:
        torch.cuda.synchronize()
        job.add(remark=f"{name} cannot be captured, timed with its host time: {error}"[:300])
        return _several(run), REPEATS
    return graph.replay, REPEATS


def _several(run: Run) -> Run:
    def repeated() -> None:
        for _ in range(REPEATS):
            run()

    return repeated


def host_us(run: Run, calls: int = 200) -> float:
    """Microseconds that the host takes to ask for one call, without waiting for it."""
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6
