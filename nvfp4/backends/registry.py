"""The backends by name, and the choice among them.

``BACKENDS`` has them in order of preference. The choice knows what a backend is and none of them by
name: ``builtin.py`` lists those of this package, and a later one is another entry.

"auto" takes the first that can do the operation on the device: it runs there (``unavailable``),
implements the operation for this quantiser and these options (``refuses``), may be chosen without
being named (``automatic``), and gave the reference's bits when it was first asked
(``selfcheck.find_fault``, once per backend, operation, device and rule). Where two backends
quantise alike on a GPU, the first question times both, and the faster goes first from then on: per
quantiser, kind of options and road (rows, columns, codes; both orientations in one call or in two).

A layer asks about ten times per step, so every answer is kept (``_CHOSEN``): the second question
costs one look-up in a dict. The key is all that an answer depends on; seeds are no part of it.

Whatever is passed over is passed over loudly: a failed self-check warns, and so does a device on
which only the reference is left. ``nvfp4.explain`` gives every reason.
"""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import torch

from nvfp4.backends import autotune, selfcheck
from nvfp4.backends.autotune import BOTH, TWO, Clock, Road, fastest, fastest_first, seconds_on_gpu
from nvfp4.backends.base import Backend, Operation
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.selfcheck import head_of_family
from nvfp4.numerics.torch_state import is_capturing
from nvfp4.quantizers.base import Options, Quantizer


class BackendTable(UserDict[str, Backend]):
    """Backends by name; whoever changes it has every choice made anew."""

    def __setitem__(self, name: str, backend: Backend) -> None:
        super().__setitem__(name, backend)
        _forget_choices()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        _forget_choices()


BACKENDS = BackendTable()
"""Fastest first, unless measuring says otherwise; the reference comes last and refuses nothing.

Filled by ``builtin.py``, which the package imports first of all.
"""

_REFERENCE = ReferenceBackend()

AUTO = "auto"


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot do this on this machine; the message says why and what can."""


def find_fault(
    backend: Backend, operation: Operation, device: torch.device, quantizer: Quantizer | None
) -> str | None:
    """None if ``backend`` gives the reference's bits on ``device``; see ``selfcheck.py``."""
    return selfcheck.find_fault(_REFERENCE, backend, operation, device, quantizer)


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
        raise BackendUnavailable(
            f"backend {name!r} cannot run on {device}: {reason}; use backend={AUTO!r}"
        )
    return name


def candidates(
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None = None,
    options: Options | None = None,
) -> list[tuple[Backend, str | None]]:
    """Every backend in order of preference, with None or why "auto" does not choose it here."""
    order = _in_order(operation, device, quantizer, options, "rows")
    return [
        (backend, why_not_auto(backend, operation, device, quantizer, options)) for backend in order
    ]


def measured(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
) -> float | None:
    """Seconds this backend took for rows when the order was measured, or None if it was not."""
    if operation != "quantize" or quantizer is None or options is None:
        return None
    return _SECONDS.get((device, "rows", quantizer.name, options.kind), {}).get(backend.name)


def select(
    name: str,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None = None,
    options: Options | None = None,
    road: Road = "rows",
) -> Backend:
    """The backend ``name``, or for "auto" the first that can.

    road: what is quantised, for the order of backends that were timed. A backend that only
    multiplies leaves the rest to "auto" when it is named. Raises ``BackendUnavailable`` if a named
    one cannot. Warns once of each backend, operation and device whose self-check failed, and once
    for each kind of device on which only the reference is left, and why.
    """
    # the answer of an earlier call, from the same tables
    how = None if quantizer is None else quantizer.name, None if options is None else options.kind
    key = (name, operation, device, road, *how)
    kept = _CHOSEN.get(key)
    if kept is not None and kept[0] is BACKENDS and kept[1] is _FAULTS:
        return kept[2]

    backend = _select(name, operation, device, quantizer, options, road)
    _keep(key, device, backend)
    return backend


def select_both(
    name: str,
    device: torch.device,
    rows: tuple[Quantizer, Options],
    columns: tuple[Quantizer, Options],
) -> Backend | None:
    """The backend whose ``quantize_both`` makes both orientations; None: two calls are better.

    Two where no backend has both quantisers, and where a GPU was faster at two; with a held amax
    nothing is timed. Raises and warns as ``select``.
    """
    if rows[1].held is not None or columns[1].held is not None:
        across, down = (
            select(name, "quantize" if how[1].held is None else "quantize_held", device, *how)
            for how in (rows, columns)
        )
        return across if across is down else None

    how = (rows[0].name, rows[1].kind, columns[0].name, columns[1].kind)
    key = (name, "quantize", device, BOTH, *how)
    kept = _CHOSEN.get(key)
    if kept is not None and kept[0] is BACKENDS and kept[1] is _FAULTS:
        return kept[2]

    backend = _select_both(name, device, rows, columns)
    _keep(key, device, backend)
    return backend


def _keep(key: tuple[object, ...], device: torch.device, backend: Backend | None) -> None:
    """Keep an answer, unless a graph is being captured: then nothing could be checked or timed."""
    if not is_capturing(device):
        _CHOSEN[key] = (BACKENDS, _FAULTS, backend)


def _select(
    name: str,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
    road: Road,
) -> Backend:
    """``select``, worked out."""
    check_backend(name, device)
    if name == AUTO or operation not in BACKENDS[name].operations:
        return _select_auto(operation, device, quantizer, options, road)

    # whoever names a backend wants it, or an error: no other steps in
    backend = BACKENDS[name]
    reason = why_not(backend, operation, device, quantizer, options)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {name!r} cannot {operation} here: {reason}; use backend={AUTO!r}"
        )
    return backend


def _select_auto(
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
    road: Road,
) -> Backend:
    """The first backend that can."""
    for backend in _in_order(operation, device, quantizer, options, road):
        if why_not_auto(backend, operation, device, quantizer, options) is not None:
            continue

        # said once per kind of device
        if backend is BACKENDS["reference"] and device.type not in _SAID:
            _say_why(operation, device, quantizer, options)
        return backend

    # only where somebody took the reference, which refuses nothing, out of the table
    raise BackendUnavailable(
        f"no backend can {operation} on {device}; the reference is missing from BACKENDS"
    )


def _select_both(
    name: str,
    device: torch.device,
    rows: tuple[Quantizer, Options],
    columns: tuple[Quantizer, Options],
) -> Backend | None:
    """``select_both``, worked out."""
    across = select(name, "quantize", device, *rows, road="rows")
    down = select(name, "quantize", device, *columns, road="columns")
    clock = _CLOCKS.get(device.type)
    if clock is None or is_capturing(device):
        return across if across is down else None

    # every backend that may be asked and has both
    named = name != AUTO and "quantize" in BACKENDS[name].operations
    runners = [
        backend
        for backend in ([BACKENDS[name]] if named else _timed(device, *rows))
        if why_not(backend, "quantize", device, *rows) is None
        and why_not(backend, "quantize", device, *columns) is None
    ]
    if not runners:
        return across if across is down else None

    # against the best of each orientation; the first where there was no room for a race
    seconds = autotune.race_both(runners, (across, down), device, (rows, columns), clock)
    first = fastest([*(backend.name for backend in runners), TWO], seconds)
    return None if first == TWO else runners[0] if first is None else BACKENDS[first]


def can_run(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer,
    options: Options,
) -> bool:
    """Whether this backend can do the operation here, whether or not "auto" would choose it."""
    return why_not(backend, operation, device, quantizer, options) is None


# What this process found out, and what it has said.
_FAULTS: dict[tuple[Backend, Operation, torch.device, str | None], str | None] = {}
"""Verdicts of the self-check."""

_SAID = {"meta"}  # where nothing is computed
"""Kinds of devices on which a fallback to the reference was announced."""

_FAILED: set[tuple[Backend, Operation, torch.device]] = set()
"""Failed self-checks that were announced."""

_SECONDS: dict[tuple[torch.device, Road, str, str], dict[str, float]] = {}
"""Of each quantiser and kind of options on a road of a device, the times of the backends."""

_CLOCKS: dict[str, Clock] = {"cuda": seconds_on_gpu}
"""Kinds of devices on which quantisers are timed.

Products are not: their bits depend on the order of summation, so the fastest is not free to win.
"""

_CHOSEN: dict[tuple[object, ...], tuple[object, object, Any]] = {}
"""Answers of ``select`` and ``select_both``, with the tables of that time.

A small layer asks nine times per step, and asking every backend took a sixth of such a step on a
CPU (32 x 64 -> 64, quartet2: 1274 -> 1069 us); on a GPU each question goes to the driver too. When
a table changes, or is another one, as in tests, it is asked again.
"""


def _forget_choices() -> None:
    """Make every choice anew, and time again: a backend came, went, or is another of that name."""
    _CHOSEN.clear()
    _SECONDS.clear()


def _in_order(
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
    road: Road,
) -> Sequence[Backend]:
    """The backends as "auto" asks them: of those that quantise on a GPU the fastest first."""
    everyone = [*BACKENDS.values()]
    clock = _CLOCKS.get(device.type)
    if operation != "quantize" or quantizer is None or options is None or clock is None:
        return everyone

    # measured at the first question, among those that gave the reference's bits
    key = (device, road, quantizer.name, options.kind)
    if key not in _SECONDS:
        if is_capturing(device):  # nothing can be timed now
            return everyone
        runners = _timed(device, quantizer, options)
        _SECONDS[key] = (
            autotune.race(runners, device, road, quantizer, options, clock)
            if len(runners) > 1
            else {}
        )
    return fastest_first(everyone, _SECONDS[key])


def _timed(device: torch.device, quantizer: Quantizer, options: Options) -> list[Backend]:
    """Who takes part in a race: who may be chosen without being named, but the reference."""
    return [
        backend
        for backend in BACKENDS.values()
        if not isinstance(backend, ReferenceBackend)
        and "quantize" in backend.operations
        and why_not_auto(backend, "quantize", device, quantizer, options) is None
    ]


def why_not(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
) -> str | None:
    """Why this backend cannot, or must not be trusted to, do the operation; or None.

    The first question runs a self-check.
    """
    reason = backend.unavailable(device) or backend.refuses(operation, quantizer, options)
    if reason is not None or isinstance(backend, ReferenceBackend) or device.type == "meta":
        return reason

    # once per operation and rule, whatever the options: rtn and rtn_2d are one
    head = None if quantizer is None else head_of_family(quantizer)
    key = (backend, operation, device, None if head is None else head.name)
    if key not in _FAULTS:
        if is_capturing(device):
            return None  # a graph can be captured only after a warm-up, which has asked already
        reason = _FAULTS[key] = find_fault(backend, operation, device, head)
        if reason is not None:
            _say_it_failed(backend, operation, device, quantizer, reason)
    return _FAULTS[key]


def why_not_auto(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    options: Options | None,
) -> str | None:
    """Why "auto" passes over this backend, or None."""
    if not backend.automatic(device):
        return backend.unavailable(device) or "it runs here only when named"
    return why_not(backend, operation, device, quantizer, options)


def _say_it_failed(
    backend: Backend,
    operation: Operation,
    device: torch.device,
    quantizer: Quantizer | None,
    reason: str,
) -> None:
    """Warn that a self-check failed: what takes over may be several times as slow."""
    if (backend, operation, device) in _FAILED:
        return
    _FAILED.add((backend, operation, device))
    what = operation if quantizer is None else f"{operation} by {quantizer.name}"
    warnings.warn(
        f"nvfp4 does not use its {backend.name} backend for {what} on {device}: {reason}. "
        "Another backend "
        f"takes over, at worst the reference, exact but slow; nvfp4.explain({operation!r}, "
        f"{str(device)!r}) says which",
        RuntimeWarning,
        stacklevel=6,
    )


def _say_why(
    operation: Operation, device: torch.device, quantizer: Quantizer | None, options: Options | None
) -> None:
    """Warn that only the reference is left, and why.

    Not where failed self-checks alone are why: each of those has warned.
    """
    _SAID.add(device.type)
    refused = [
        (b, why) for b, why in candidates(operation, device, quantizer, options) if why is not None
    ]
    if any((b, operation, device) not in _FAILED for b, _ in refused):
        reasons = "; ".join(f"{b.name}: {why}" for b, why in refused)
        warnings.warn(
            f"nvfp4 computes on {device.type} with the reference backend, exactly but slowly "
            f"({reasons})",
            RuntimeWarning,
            stacklevel=6,
        )
