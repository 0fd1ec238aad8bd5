"""Tables of numbers on the devices where they are read."""

from __future__ import annotations

from functools import lru_cache

import torch


def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [n], the same tensor at every call: not to be written to.

    Copying it to a GPU waits for that and cannot go into a CUDA graph, so that this happens once, in the warm-up.
    Where a compiler or a dispatch mode watches, it is made anew, for their tensors are not to be kept.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _kept(values, device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)
