"""The backends in order of preference, and the choice among them."""

from __future__ import annotations

import warnings

import torch

from nvfp4.backends.base import Backend, Operation
from nvfp4.backends.cpu import CpuBackend
from nvfp4.backends.cuda import CudaBackend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.scaled_mm import ScaledMmBackend
from nvfp4.backends.selfcheck import find_fault
from nvfp4.backends.triton.backend import TritonBackend
from nvfp4.quantizers.base import Options, Quantizer

_ORDER: tuple[Backend, ...] = (ScaledMmBackend(), CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
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
    """Every backend in order of preference with None, or the reason why "auto" does not choose it here."""
    return [(backend, _objection(backend, operation, device, quantizer, options)) for backend in BACKENDS.values()]


def select(
    name: str,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None = None,
    options: Options | None = None,
) -> Backend:
    """The backend ``name``, or for "auto" the first that can; ``BackendUnavailable`` if a named one cannot.

    A backend that only multiplies leaves the rest to "auto" when it is named.
    Says once for each kind of device that only the reference is left, and why.
    """
    check_backend(name, device)
    if name == AUTO or operation not in BACKENDS[name].operations:
        for backend in BACKENDS.values():
            if _objection(backend, operation, device, quantizer, options) is None:
                if backend is BACKENDS["reference"] and device.type not in _SAID:
                    _say_why(operation, device, quantizer, options)
                return backend
    backend = BACKENDS[name]
    reason = _obstacle(backend, operation, device, quantizer, options)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot {operation} here: {reason}; use backend={AUTO!r}")
    return backend


def able(backend: Backend, operation: Operation, device: torch.device, quantizer: Quantizer, options: Options) -> bool:
    """Whether this backend can do the operation here, whether or not "auto" would choose it."""
    return _obstacle(backend, operation, device, quantizer, options) is None


_FAULTS: dict[tuple[Backend, Operation, torch.device, str | None], str | None] = {}
_SAID = {"meta"}  # where nothing is computed
"""What this process found out and said: verdicts of the self-check, and devices on which a fallback was announced."""


def _obstacle(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
) -> str | None:
    """Why this backend cannot, or must not be trusted to, do the operation; the first question runs a self-check."""
    reason = backend.unavailable(device) or backend.refuses(operation, quantizer, options)
    if reason is not None or isinstance(backend, ReferenceBackend) or device.type == "meta":
        return reason
    key = (backend, operation, device, None if quantizer is None else quantizer.name)
    if key not in _FAULTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # a graph can be captured only after a warm-up, which has asked already
        _FAULTS[key] = find_fault(backend, operation, device, quantizer)
    return _FAULTS[key]


def _objection(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
) -> str | None:
    """Why "auto" passes over this backend."""
    if not backend.automatic(device):
        return backend.unavailable(device) or "it runs here only when named"
    return _obstacle(backend, operation, device, quantizer, options)


def _say_why(operation: Operation, device: torch.device, quantizer: Quantizer | None, options: Options | None) -> None:
    _SAID.add(device.type)
    reasons = [f"{b.name}: {why}" for b, why in candidates(operation, device, quantizer, options) if why is not None]
    if reasons:
        warnings.warn(
            f"nvfp4 computes on {device.type} with the reference backend, exactly but slowly ({'; '.join(reasons)})",
            RuntimeWarning,
            stacklevel=4,
        )
