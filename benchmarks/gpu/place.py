"""Where units run: a GPU, or what stands in for one. The only file that knows the difference.

    GPU          the card at hand: CUDA graphs, streams, events, torch's profiler
    Rehearsal    a CPU: the backends' names belong to the CPU's kernels, a graph is a list of calls,
                 sizes are a part of the real ones, faults are injected: does the script work?
    CompileOnly  a CPU: Triton compiles for a card, for real and as specialised as there, and
                 launches nothing: how long does compiling take?

Units ask ``job.settings.place`` for everything that is CUDA's own, and else compute on
``place.device``. torch is imported where it is used: whoever only starts units does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nvfp4.backends.base import Backend

Run = Callable[[], Any]


class GPU:
    """The current CUDA device."""

    kind = "gpu"
    toolboxes = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    """Where tools may lie beside PATH."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def prepare(self, fault: str) -> None:
        """Nothing to stand in for."""
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(
                f"torch {torch.__version__} sees no GPU here; --rehearse 0.1 rehearses on the CPU"
            )
        torch.set_num_threads(2)

    @property
    def device(self) -> torch.device:
        """The current CUDA device, with its index."""
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def size(self, n: int) -> int:
        """``n``; in a rehearsal a multiple of 16 near that part of it."""
        return n if self.scale == 1 else max(round(n * self.scale / 16) * 16, 16)

    def seconds(self, wanted: float) -> float:
        """How long to time something."""
        return wanted * self.scale

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong on it since."""
        import torch

        torch.cuda.synchronize()

    def timed(self, run: Run) -> float:
        """Milliseconds between two events around ``run``, which begins on an idle device."""
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    def capture(self, run: Run) -> tuple[Any, Run]:
        """A CUDA graph: (what ``run`` returned, what replays it into the same memory).

        Call ``warm`` before.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return result, graph.replay

    def warm(self, run: Run, times: int = 2) -> None:
        """Run on a side stream, as a capture asks for."""
        with self.stream():
            for _ in range(times):
                run()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Another stream, after what was asked for so far and before what comes."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def side_by_side(self, runs: list[Run], times: int) -> list[list[Any]]:
        """Results of each run, on a stream of its own; they take turns, and none waits."""
        import torch

        streams = [torch.cuda.Stream() for _ in runs]
        self.synchronize()
        results: list[list[Any]] = [[] for _ in runs]
        for _ in range(times):
            for run, stream, kept in zip(runs, streams, results, strict=True):
                with torch.cuda.stream(stream):
                    kept.append(run())
        self.synchronize()
        return results

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Within it, whatever waits for the device raises."""
        import torch

        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def free_bytes(self) -> int:
        """Memory of the device."""
        import torch

        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, run: Run) -> int:
        """The most that is allocated while ``run`` runs."""
        import torch

        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated()

    def profile(self, run: Run) -> list[tuple[str, int, float]]:
        """(kernel, calls, us) of one run, the longest first."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.synchronize()
        rows = [
            (row.key, row.count, float(row.self_device_time_total))
            for row in profile.key_averages()
        ]
        return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])

    def profiled(self, run: Run) -> None:
        """``run`` as the part of the program that an outer profiler looks at."""
        import torch

        self.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        run()
        self.synchronize()
        torch.cuda.cudart().cudaProfilerStop()

    def compile(self, layer: Any) -> Any:
        """``torch.compile`` without a graph break.

        And without Inductor's 16 processes, which each import torch.
        """
        import torch
        from torch._inductor import config

        config.compile_threads = 1
        return torch.compile(layer, fullgraph=True)

    def backend(self, name: str) -> Backend:
        """The backend of that name; ``Skip`` with the reason if it cannot run here."""
        from benchmarks.gpu.processes import Skip
        from nvfp4.backends.registry import BACKENDS

        backend = BACKENDS[name]
        reason = backend.unavailable(self.device)
        if reason is not None:
            raise Skip(f"{name}: {reason}")
        return backend

    def gemms(self) -> dict[str, Callable[..., torch.Tensor]]:
        """Every tile of the card, and decoding first: what "auto" may not take for a shape."""
        from functools import partial

        from nvfp4.backends.registry import BACKENDS
        from nvfp4.backends.triton.gemm import launch as fp4

        self.backend("triton")
        kind = fp4.tensor_cores(self.device)
        ways: dict[str, Callable[..., torch.Tensor]] = {
            "decode first": BACKENDS["triton"].matmul_decoded
        }
        for tile in fp4.TILES[kind]:
            name = f"{kind} {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"
            ways[name] = partial(fp4.gemm, tile=tile)
        return ways


class Rehearsal(GPU):
    """A CPU that plays the GPU: the same lines run; what they say of speed is worth nothing."""

    kind = "rehearsal"
    toolboxes = ()

    def prepare(self, fault: str) -> None:
        """The CPU's kernels under the names of the GPU's."""
        import torch

        torch.set_num_threads(1)
        self._stand_in(fault == "wrong bits")

    def _stand_in(self, wrong: bool) -> None:
        from benchmarks.gpu.stand_in import stand_in
        from nvfp4.backends import registry

        real = registry.BACKENDS["cpu"]
        if real.unavailable(self.device) is not None:
            real = registry.BACKENDS["reference"]
        for name, operations in (
            ("cuda", ("quantize", "dequantize")),
            ("triton", real.operations),
            ("scaled_mm", ("matmul", "grouped_matmul")),
        ):
            registry.BACKENDS[name] = stand_in(real, name, operations, wrong)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        import torch

        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing runs behind anybody's back."""

    def timed(self, run: Run) -> float:
        from nvfp4.bench.timing import on_cpu

        return on_cpu(run)

    def capture(self, run: Run) -> tuple[Any, Run]:
        """A replay runs it again and copies into the first result's memory."""
        result = run()

        def replay() -> None:
            for target, source in zip(tensors_of(result), tensors_of(run()), strict=True):
                target.copy_(source)

        return result, replay

    def stream(self) -> Any:
        return nullcontext()

    def side_by_side(self, runs: list[Run], times: int) -> list[list[Any]]:
        return [[run() for _ in range(times)] for run in runs]

    def no_waiting(self) -> Any:
        return nullcontext()

    def free_bytes(self) -> int:
        return 1 << 40

    def peak_bytes(self, run: Run) -> int:
        run()
        return 0

    def profile(self, run: Run) -> list[tuple[str, int, float]]:
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        rows = [
            (row.key, row.count, float(row.self_cpu_time_total)) for row in profile.key_averages()
        ]
        return sorted(rows, key=lambda row: -row[2])

    def profiled(self, run: Run) -> None:
        run()

    def compile(self, layer: Any) -> Any:
        import torch

        return torch.compile(layer, fullgraph=True, backend="eager")

    def gemms(self) -> dict[str, Callable[..., torch.Tensor]]:
        triton = self.backend("triton")
        return {"decode first": triton.matmul, "a stand-in of a tile": triton.matmul}


class CompileOnly(Rehearsal):
    """Triton's real JIT for an H100 over a driver that launches nothing.

    Results are what memory held.
    """

    kind = "compile"

    def _stand_in(self, wrong: bool) -> None:
        from benchmarks.gpu.stand_in import launch_nothing

        launch_nothing(capability=90, multiprocessors=132)

    def size(self, n: int) -> int:
        """Small, and a multiple of whatever kernels are specialised on."""
        return min(n, 256)

    def seconds(self, wanted: float) -> float:
        return 0.0

    def gemms(self) -> dict[str, Callable[..., torch.Tensor]]:
        return GPU.gemms(self)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and QTensors."""
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "tensors"):
        return list(result.tensors)
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


def python() -> list[str]:
    """The interpreter that runs this, for programs of its own."""
    return [sys.executable, "-u"]
