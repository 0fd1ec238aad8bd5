"""Launches kernels: what Triton compiled for a call is launched directly by later calls like it.

    launch(kernel, programs, arguments, constants)
      first call of its kind    Triton compiles (seconds, then kept on disk) and launches
      later calls               our own key -> the compiled kernel -> launch

Triton's own launch looks its kernel up by everything it could depend on, among others every global
number that the source mentions: 6 to 12 us each, several times as long as the launch itself. With
the key below, the host time of a quartet2 layer fell from about 14 to 5 times BF16's, under a
driver that launches nothing. The key holds what Triton specialises on, and nothing else: the
device, warps, stages, constants, the type and alignment of every pointer, and of every number
whether it is 1 or divides by 16.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

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
}
"""What the kernels of a module are for, in words."""

_ANNOUNCED: set[str] = set()
_LOG = logging.getLogger("nvfp4")

_COMPILED: dict[tuple[Any, ...], CompiledKernel] = {}
_SPECIALISED: dict[Any, tuple[bool, ...]] = {}
"""By function, whether Triton specialises on the value of each parameter."""


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

    # compiled before
    key = (driver.active.get_current_device(), warps, stages, *key_of(kernel, arguments, constants))
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return

    # compile, launch, keep; not one that is still being compiled
    _announce(kernel)
    compiled = kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages, **EXACT)
    if isinstance(compiled, CompiledKernel):
        _COMPILED[key] = compiled


def _announce(kernel: Any) -> None:
    """Say in one line that a family of kernels is compiled: the first step would seem to hang.

    At the level of warnings, so that it shows unless somebody set up logging otherwise; of several
    processes the first alone says it.
    """
    module = kernel.fn.__module__.removeprefix("nvfp4.backends.triton.")
    if module in _ANNOUNCED:
        return
    _ANNOUNCED.add(module)

    # all processes compile; one line is enough
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    purpose = FAMILIES.get(module, module)
    _LOG.warning(
        "nvfp4 compiles its Triton kernels for %s: seconds each at first use, then kept on disk",
        purpose,
    )


def key_of(kernel: Any, arguments: Sequence[Any], constants: Sequence[Any]) -> tuple[Any, ...]:
    """What decides which compilation of a kernel takes these arguments.

    Equal for two calls only if Triton would compile the same for both.
    """
    specialised = _SPECIALISED.get(kernel.fn)
    if specialised is None:
        specialised = _SPECIALISED[kernel.fn] = tuple(
            not parameter.do_not_specialize for parameter in kernel.params
        )
    return (kernel.fn, tuple(constants), *map(_kind, arguments, specialised))


def _kind(value: Any, specialised: bool) -> Any:
    """What Triton specialises on in one argument.

    Of a pointer its type and whether it is aligned to 16 bytes; of a number its size and, unless
    the kernel forbids that, whether it is 1 or divides by 16.
    """
    if type(value) is int:
        size = -(2**31) <= value < 2**31, value < 2**63
        return size if not specialised else 1 if value == 1 else (size, value % 16 == 0)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value if value is None else type(value)
