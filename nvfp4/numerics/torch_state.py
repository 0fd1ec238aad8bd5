"""What torch is doing around a call, asked in one place.

    tracing      ``torch.compile``, a fake tensor, or a dispatch mode such as selective
                 checkpointing. Our kernels are invisible to them: they write through raw pointers,
                 so what they fill would be taken for uninitialised memory. A layer must then be one
                 registered operator (``is_traced``), and whoever calls kernels directly does so out
                 of their sight (``without_dispatch_modes``).
    capturing    a CUDA graph records what is computed now and computes it again and again later.
                 What the host reads, keeps or measures now would be wrong at the second replay
                 (``is_capturing``).
    spreading    a DTensor is spread over processes; its memory here is a part (``is_dtensor``).
    casting      autocast would round the float32 GEMM of an emulated product to BF16
                 (``without_autocast``).

All of these are asked in every call of every layer, so none of them imports a module. Here too:
which parameters are ordinary ones (``is_plain_parameter``), and small tensors that are copied to a
device once (``constant``).
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def is_traced(x: torch.Tensor) -> bool:
    """Whether a compiler, a dispatch mode, or x itself, a fake, watches the operators on ``x``."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or isinstance(x, FakeTensor)
    )


def without_dispatch_modes() -> AbstractContextManager[object]:
    """No dispatch mode within: for kernels over raw pointers, and for self-checks.

    Nobody should count or replay those. To a mode that records, the results are constants.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() > 0 else _NOTHING


def is_capturing(device: torch.device | None = None) -> bool:
    """Whether operations on ``device`` (any, if None) are recorded into a CUDA graph now."""
    if device is not None and device.type != "cuda":
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor."""
    # where none was made their module is not loaded, and loading it would take half a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_plain_parameter(x: object) -> bool:
    """Whether x is an ordinary parameter, or a fake or sharded tensor that stands for one.

    Other subclasses, such as quantised weights, have arithmetic of their own.
    """
    return type(x) is torch.nn.Parameter or isinstance(x, FakeTensor) or is_dtensor(x)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on ``device``, or None where it is off.

    None, too, for devices that autocast does not know.
    """
    kind = device.type
    if not _knows_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


_knows_autocast = lru_cache(maxsize=None)(torch.amp.is_autocast_available)
_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off within; nothing where it is off already or unknown to the device."""
    return (
        _NOTHING if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
    )


def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [n], the same tensor at every call: not to be written to.

    Copying it to a GPU waits for the GPU and cannot go into a CUDA graph, so it happens once, in
    the warm-up. Where a compiler or a dispatch mode watches, the tensor is made anew, for what they
    see is not to be kept.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _kept(values, device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums of values on ``device`` can be made: there, or on the CPU for MPS.

    MPS has no float64.
    """
    return torch.device("cpu") if device.type == "mps" else device
