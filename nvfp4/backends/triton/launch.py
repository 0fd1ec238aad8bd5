"""Launches kernels: what Triton compiled for a call is kept and launched directly by later calls
like it.

Triton's own launch looks its kernel up by everything it could depend on, among others every global
number that the source mentions, which takes several times as long as the launch itself.
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
"""Every kernel is compiled so: the reference rounds a product before it adds to it, and Philox
computes modulo 2^32, which TRITON_DEBUG=1 would take for a mistake (the interpreter does not know
that option, nor look)."""


def version() -> tuple[int, ...]:
    """Triton's, major and minor."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


DIRECT = not INTERPRETED and (3, 6) <= version() <= (3, 9)
"""Where a compiled kernel is known to take the arguments of its function, constants included;
elsewhere Triton looks its kernels up at every launch."""

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
    if not DIRECT:
        if not INTERPRETED:
            _announce(kernel)
        kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages, **EXACT)
        return
    key = (driver.active.get_current_device(), warps, stages, *key_of(kernel, arguments, constants))
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return
    _announce(kernel)
    compiled = kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages, **EXACT)
    if isinstance(compiled, CompiledKernel):  # not one that is still being compiled
        _COMPILED[key] = compiled


def _announce(kernel: Any) -> None:
    """One line before the first kernel of a family is compiled: the first step would seem to hang
    without it.

    At the level of warnings, so that it shows unless somebody set up logging otherwise; of several
    processes the first alone says it.
    """
    module = kernel.fn.__module__.removeprefix("nvfp4.backends.triton.")
    if module in _ANNOUNCED:
        return
    _ANNOUNCED.add(module)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    purpose = FAMILIES.get(module, module)
    _LOG.warning(
        "nvfp4 compiles its Triton kernels for %s: seconds each at first use, then kept on disk",
        purpose,
    )


def key_of(kernel: Any, arguments: Sequence[Any], constants: Sequence[Any]) -> tuple[Any, ...]:
    """What decides which compilation of a kernel takes these arguments; equal for two calls only if
    Triton would compile the same for both."""
    specialised = _SPECIALISED.get(kernel.fn)
    if specialised is None:
        specialised = _SPECIALISED[kernel.fn] = tuple(
            not parameter.do_not_specialize for parameter in kernel.params
        )
    return (kernel.fn, tuple(constants), *map(_kind, arguments, specialised))


def _kind(value: Any, specialised: bool) -> Any:
    """A pointer's type and whether it is aligned to 16 bytes; a number's size and whether it is 1
    or divides by 16."""
    if type(value) is int:
        size = -(2**31) <= value < 2**31, value < 2**63
        return size if not specialised else 1 if value == 1 else (size, value % 16 == 0)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value if value is None else type(value)
