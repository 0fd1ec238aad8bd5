"""Launches kernels: what Triton compiled for a call is launched directly by later calls like it.

    launch(kernel, programs, arguments, constants)
      first call of its kind    Triton compiles (seconds, then kept on disk) and launches
      later calls               our own key -> the compiled kernel -> launch

    compile_together(run)       what ``run`` would launch, compiled on all cores beforehand

Triton's own launch looks its kernel up by everything it could depend on, among others every global
number that the source mentions: 6 to 12 us each, several times as long as the launch itself. With
the key below, the host time of a quartet2 layer fell from about 14 to 5 times BF16's, under a
driver that launches nothing. The key holds what Triton specialises on, and nothing else: the
device, warps, stages, constants, the type and alignment of every pointer, and of every number
whether it is 1 or divides by 16.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from nvfp4.backends.triton.arithmetic import INTERPRETED

EXACT = {"enable_fp_fusion": False} | ({} if INTERPRETED else {"sanitize_overflow": False})
"""How every kernel is compiled.

The reference rounds a product before it adds to it, so no fusion. Philox computes modulo 2^32,
which TRITON_DEBUG=1 would take for a mistake: 54 asserts in a ``quantize_kernel`` of sr. (The
interpreter does not know that option, nor look.)
"""


def version() -> tuple[int, ...]:
    """Triton's, major and minor."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


DIRECT = not INTERPRETED and (3, 6) <= version() <= (3, 9)
"""Whether a compiled kernel is known to take the arguments of its function, constants included.

Under other versions Triton looks its kernels up at every launch.
"""

FAMILIES = {
    "quantize.kernels": "quantisation",
    "activation.kernels": "RMSNorm and SwiGLU",
    "gemm.kernels": "products",
    "gemm.decoded": "what follows a product",
    "transpose": "transposes",
    "held": "held amaxes",
    "swizzled": "swizzled scales",
}
"""What the kernels of a module are for, in words."""

_ANNOUNCED: set[str] = set()
_LOG = logging.getLogger("nvfp4")

PATIENCE = 1.0
"""Seconds of compiling before it is said: what lies on disk is loaded sooner, and in silence."""

_COMPILED: dict[tuple[Any, ...], CompiledKernel] = {}
_SPECIALISED: dict[Any, tuple[bool, ...]] = {}
"""By function, whether Triton specialises on the value of each parameter."""


class Wanted(NamedTuple):
    """What it takes to compile a kernel as a launch would."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int


class _Rehearsal(threading.local):
    """Where launches of this thread are noted instead of being done; None: they are done."""

    wanted: dict[tuple[Any, ...], Wanted] | None = None


_REHEARSAL = _Rehearsal()
_COMPILED_BEFOREHAND: set[tuple[Any, ...]] = set()
"""Keys of kernels that ``compile_together`` has seen to."""


def launch(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Sequence[Any],
    *,
    warps: int,
    stages: int = 3,
) -> None:
    """``kernel[(programs,)](*arguments, *constants)`` on the current device and stream.

    arguments: of all parameters that are not ``tl.constexpr``, which come first. constants: of the
    others, hashable.
    """
    grid = (programs, 1, 1)

    # the interpreter, and versions whose compiled kernels nobody has looked at
    if not DIRECT:
        if not INTERPRETED:
            _announce(kernel)
        kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages, **EXACT)
        return

    # compiled before: launched as a compiled kernel launches itself, which takes 3 us more to ask
    # for metadata that only hooks read
    active = driver.active
    device = active.get_current_device()
    key = (device, warps, stages, *key_of(kernel, arguments, constants))
    compiled = _COMPILED.get(key)
    if compiled is not None:
        if _is_hooked():
            compiled[grid](*arguments, *constants)
            return
        run = compiled.run
        how = (active.get_current_stream(device), compiled.function, compiled.packed_metadata)
        run(programs, 1, 1, *how, None, None, None, *arguments, *constants)
        return

    # a rehearsal launches nothing
    if _REHEARSAL.wanted is not None:
        wanted = Wanted(kernel, tuple(arguments), tuple(constants), warps, stages)
        _REHEARSAL.wanted.setdefault(key, wanted)
        return

    # compile, launch, keep; not one that is still being compiled
    if key not in _COMPILED_BEFOREHAND:
        _announce(kernel)
    compiled = kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages, **EXACT)
    if isinstance(compiled, CompiledKernel):
        _COMPILED[key] = compiled


def compile_together(run: Callable[[], object]) -> None:
    """Compile what ``run`` would launch and nobody has compiled yet, on several cores at a time.

    ``run`` is called on this thread, and its launches are noted and not done, so its results are
    void. Compiling takes 1.6 to 2.5 s per kernel, of which Python's part is a tenth; a recipe needs
    31 to 53 of them. All that takes more than ``PATIENCE`` is said in a line, and when it is done.
    What fails to compile is left to the launch that needs it, which raises.
    """
    if not DIRECT or _REHEARSAL.wanted is not None:
        return

    # whoever compiles in threads already has a way of his own
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    if active_mode.get() is not None:
        return

    wanted: dict[tuple[Any, ...], Wanted] = {}
    _REHEARSAL.wanted = wanted
    try:
        run()
    except Exception:  # on results that are void anything may go wrong; the real run tells
        pass
    finally:
        _REHEARSAL.wanted = None
    if len(wanted) < 2:
        return

    # processes of one machine begin at different places, and find on disk what the others made
    rank, processes = _place()
    kernels = [*wanted.values()]
    start = rank * len(kernels) // processes
    began, threads = time.perf_counter(), max(1, _cores() // processes)
    with (
        ThreadPoolExecutor(min(threads, len(kernels))) as pool,
        AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):
        for each in kernels[start:] + kernels[:start]:
            each.kernel.run(
                *each.arguments,
                *each.constants,
                grid=(1, 1, 1),
                warmup=True,
                num_warps=each.warps,
                num_stages=each.stages,
                **EXACT,
            )
        late = wait(mode.raw_futures, timeout=PATIENCE).not_done
        if late:
            counts = Counter(each.kernel.fn.__name__ for each in kernels)
            names = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())
            what = f"{len(kernels)} Triton kernels, {min(threads, len(kernels))} at a time"
            _say("nvfp4 compiles %s, once, then kept on disk: %s", what, names)
    _COMPILED_BEFOREHAND.update(wanted)
    if late:
        seconds = time.perf_counter() - began
        _say("nvfp4 has compiled its %d Triton kernels in %.0f s", len(kernels), seconds)


def _place() -> tuple[int, int]:
    """Which process this is, and of how many that may share this machine."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    processes = max(1, min(dist.get_world_size(), torch.cuda.device_count()))
    return dist.get_rank() % processes, processes


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(message: str, *values: object) -> None:
    """At the level of warnings, so that it shows unless somebody set up logging otherwise.

    Of several processes the first alone says it: all compile, and one line is enough.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        _LOG.warning(message, *values)


def _announce(kernel: Any) -> None:
    """Say in one line that a family of kernels is compiled: the first step would seem to hang."""
    module = kernel.fn.__module__.removeprefix("nvfp4.backends.triton.")
    if module in _ANNOUNCED:
        return
    _ANNOUNCED.add(module)

    purpose = FAMILIES.get(module, module)
    _say(
        "nvfp4 compiles its Triton kernels for %s: seconds each at first use, then kept on disk",
        purpose,
    )


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; make that the one the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(device)


_ALREADY = nullcontext()


def current_stream(device: torch.device) -> int:
    """The handle of the current stream of a GPU."""
    handle: int = driver.active.get_current_stream(device.index)
    return handle


def key_of(kernel: Any, arguments: Sequence[Any], constants: Sequence[Any]) -> tuple[Any, ...]:
    """What decides which compilation of a kernel takes these arguments.

    Equal for two calls only if Triton would compile the same for both.
    """
    specialised = _SPECIALISED.get(kernel.fn)
    if specialised is None:
        specialised = _SPECIALISED[kernel.fn] = tuple(
            not parameter.do_not_specialize for parameter in kernel.params
        )

    # the usual ones stand here: to call a function for each of 17 arguments took twice as long as
    # all the rest
    kinds: list[Any] = []
    for value, special in zip(arguments, specialised, strict=False):
        kind = type(value)
        if kind is int and _LEAST <= value <= _MOST:
            if not special:
                kinds.append(_NUMBER)
            else:
                kinds.append(_ONE if value == 1 else _NUMBER if value & 15 else _SIXTEENS)
        elif kind is torch.Tensor and not value.data_ptr() & 15:
            kinds.append(value.dtype)
        elif value is None:
            kinds.append(None)
        else:
            kinds.append(_kind(value, special))
    return (kernel.fn, tuple(constants), *kinds)


_LEAST, _MOST = -(2**31), 2**31 - 1
_ONE, _SIXTEENS, _NUMBER = "1", "divides by 16", "i32"
"""Kinds of numbers of 32 bits."""


def _kind(value: Any, specialised: bool) -> Any:
    """What Triton specialises on in one of the other arguments.

    Of a pointer its type and whether it is aligned to 16 bytes; of a number its size and, unless
    the kernel forbids that, whether it divides by 16.
    """
    if type(value) is int:
        return value < 2**63, specialised and value % 16 == 0
    if isinstance(value, torch.Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)
    return type(value)


def _is_hooked() -> bool:
    """Whether somebody, such as a profiler, wants to hear of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
