"""Among backends of equal bits the faster one is chosen, as a clock says: here one that is made
up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nvfp4
from nvfp4.backends import autotune, registry
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import QUANTIZERS

CPU = torch.device("cpu")


class Stub(ReferenceBackend):
    """Another name for the reference; counts its calls. A fault makes its codes wrong."""

    def __init__(self, name: str, wrong: bool = False) -> None:
        self.name, self.wrong, self.calls = name, wrong, 0

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        self.calls += 1
        q = super().quantize(x, quantizer, options)
        if self.wrong:
            q.codes.zero_()
        return q


class Tracks:
    """A clock: each run takes what its backend is said to take."""

    def __init__(self, backends: list[Stub], seconds: dict[str, float]) -> None:
        self.backends, self.seconds, self.asked = backends, seconds, 0

    def __call__(self, run: Callable[[], object], device: torch.device) -> float:
        self.asked += 1
        before = [backend.calls for backend in self.backends]
        run()
        (who,) = (b for b, n in zip(self.backends, before, strict=True) if b.calls != n)
        return self.seconds[who.name]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Stub], Tracks]]:
    """Backends "first" and "second" before the reference on a device whose quantisers are timed."""

    def build(first: float, second: float, wrong: bool = False) -> tuple[list[Stub], Tracks]:
        backends = [Stub("first"), Stub("second", wrong)]
        clock = Tracks(backends, {"first": first, "second": second})
        known = {backend.name: backend for backend in backends}
        monkeypatch.setattr(registry, "ReferenceBackend", type(REFERENCE))
        monkeypatch.setattr(registry, "BACKENDS", known | {"reference": REFERENCE})
        monkeypatch.setattr(registry, "_FAULTS", {})
        monkeypatch.setattr(registry, "_SECONDS", {})
        monkeypatch.setattr(registry, "_CLOCKS", {"cpu": clock})
        monkeypatch.setattr(autotune, "SHAPE", (16, 32))
        return backends, clock

    return build


class _Last(ReferenceBackend):
    """The reference, of a class that the stubs are not of."""


REFERENCE = _Last()


def test_the_faster_one_is_chosen_and_said(stage) -> None:
    """Its line comes first with its time, the other's with the time it lost by; asked once a
    quantiser."""
    backends, clock = stage(57e-6, 41e-6)
    said = nvfp4.explain("quantize", "cpu", "rtn")
    assert (
        said
        == "second: chosen, measured 41 us\nfirst: available, measured 57 us\nreference: available"
    )
    asked = clock.asked
    assert asked == 2 * autotune.TURNS
    assert (
        registry.select("auto", "quantize", CPU, QUANTIZERS["rtn"], QUANTIZERS["rtn"].check())
        is backends[1]
    )
    assert clock.asked == asked
    nvfp4.explain("quantize", "cpu", "rtn_2d")
    assert clock.asked == 2 * asked


@pytest.mark.parametrize(("second", "wrong"), [(56e-6, False), (1e-6, True)])
def test_the_order_stays_without_a_clear_and_right_winner(
    stage, second: float, wrong: bool
) -> None:
    """Within the margin the earlier one stays; one whose bits differ is not timed at all."""
    backends, clock = stage(57e-6, second, wrong)
    assert (
        registry.select("auto", "quantize", CPU, QUANTIZERS["rtn"], QUANTIZERS["rtn"].check())
        is backends[0]
    )
    assert (clock.asked == 0) == wrong


def test_products_are_not_timed(stage) -> None:
    """Nor is anything without a quantiser: bits of a product depend on the order of its sums."""
    backends, clock = stage(2.0, 1.0)
    assert registry.select("auto", "matmul", CPU) is backends[0]
    assert registry.select("auto", "quantize", CPU) is backends[0]
    assert clock.asked == 0


def test_slow_backends_are_timed_for_one_turn(stage) -> None:
    """The bound on what it costs."""
    _, clock = stage(2.0, 1.0)
    nvfp4.explain("quantize", "cpu", "rtn")
    assert clock.asked == 2
