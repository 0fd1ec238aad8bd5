"""The backends in order of preference, and the choice among them."""

from __future__ import annotations

import torch

from nvfp4.backends.base import Backend, Operation
from nvfp4.backends.cpu import CpuBackend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.quantizers.base import Options, Quantizer

_ORDER: tuple[Backend, ...] = (CpuBackend(), ReferenceBackend())
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ORDER}
"""Fastest first; the reference comes last and refuses nothing."""

AUTO = "auto"


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot do this on this machine; the message says why and what can."""


def check_backend(name: str, device: torch.device | None = None) -> str:
    """Return ``name`` if it is "auto" or a backend that runs on ``device`` (any device if None).

    Raises ValueError for an unknown name, ``BackendUnavailable`` with the reason otherwise.
    """
    if name == AUTO:
        return name
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {AUTO}, {', '.join(BACKENDS)}")
    reason = None if device is None else BACKENDS[name].unavailable(device)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run on {device}: {reason}; use backend={AUTO!r}")
    return name


def candidates(
    operation: Operation, device: torch.device, quantizer: Quantizer | None = None, options: Options | None = None
) -> list[tuple[Backend, str | None]]:
    """Every backend in order of preference with None, or the reason why it cannot do this operation here."""
    return [(b, b.unavailable(device) or b.refuses(operation, quantizer, options)) for b in BACKENDS.values()]


def select(
    name: str,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None = None,
    options: Options | None = None,
) -> Backend:
    """The backend ``name``, or for "auto" the first that can; ``BackendUnavailable`` if a named one cannot."""
    if name == AUTO:
        for backend in BACKENDS.values():
            if backend.unavailable(device) is None and backend.refuses(operation, quantizer, options) is None:
                return backend
    check_backend(name, device)
    backend = BACKENDS[name]
    reason = backend.refuses(operation, quantizer, options)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot {operation} here: {reason}; use backend={AUTO!r}")
    return backend
