"""The self-check finds a card that converts to E2M1 in its own way: ties, zeros, overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nvfp4.backends import registry
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import find_fault
from nvfp4.backends.selfcheck import _GRID, edge_cases
from nvfp4.numerics import rounding
from nvfp4.numerics.formats import E2M1, ElementFormat
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rounding import nearest
from nvfp4.numerics.scaling import element_scale
from nvfp4.quantizers import ms_eden, rtn
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import QUANTIZERS

CPU = torch.device("cpu")
TO_NEAREST = ["rtn", "rtn_2d", "four_over_six", "scale_search", "ms_eden"]


class Converts(ReferenceBackend):
    """Rounds the elements of quantisers by ``convert`` instead of by ``nearest``."""

    name = "here"

    def __init__(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.convert, self.seen = convert, list[torch.Tensor]()

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        def rounded(values: torch.Tensor, fmt: ElementFormat) -> torch.Tensor:
            if fmt is not E2M1:
                return nearest(values, fmt)
            self.seen.append(values.clone())
            return self.convert(values)

        with pytest.MonkeyPatch.context() as patched:
            for module in (rtn, rounding, ms_eden):
                patched.setattr(module, "nearest", rounded)
            return super().quantize(x, quantizer, options)


def _right(x: torch.Tensor) -> torch.Tensor:
    return nearest(x, E2M1)


def _one_tie(middle: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Right but for one tie, which goes the other way."""
    even = _right(torch.tensor(middle)).item()
    other = 2 * middle - even
    return lambda x: torch.where(
        x.abs() == middle, torch.full_like(x, other).copysign(x), _right(x)
    )


def _unsigned_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 0.0, _right(x))


def _infinity_is_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isinf(), 0.0, _right(x))


def _wraps(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() > E2M1.max, 0.0, _right(x))


MIDDLES = ((_GRID[1:] + _GRID[:-1]) / 2).tolist()


@pytest.mark.parametrize("name", TO_NEAREST)
def test_a_conversion_of_its_own_is_found(name: str) -> None:
    """Each of the seven ties the other way round, a lost sign of zero, no saturation: one alone is
    enough."""
    rule = QUANTIZERS[name]
    assert find_fault(Converts(_right), "quantize", CPU, rule) is None
    faults = {f"tie at {middle}": _one_tie(middle) for middle in MIDDLES}
    faults |= {"-0": _unsigned_zero, "beyond 6": _wraps}
    if name in ("rtn", "rtn_2d"):  # elsewhere nothing overflows
        faults["Inf"] = _infinity_is_zero
    for what, convert in faults.items():
        said = find_fault(Converts(convert), "quantize", CPU, rule)
        assert said == "its first quantize differs from the reference", f"{name}: {what} passes"


@pytest.mark.parametrize("name", TO_NEAREST)
def test_edge_cases_hold_every_tie(name: str) -> None:
    """Once scaled, the elements are exactly each of the seven ties; those of plain rules in both
    signs."""
    rule, seen = QUANTIZERS[name], Converts(_right)
    for x in edge_cases(rule):
        seen.quantize(x, rule, rule.check(seed=1))
    values = torch.cat([each.flatten() for each in seen.seen])
    signs = (1,) if rule.rotates else (1, -1)
    assert all((values == sign * middle).any() for middle in MIDDLES for sign in signs)
    assert {bool(s) for s in values[values == 0].signbit()} == {True, False}


def test_spikes_are_those_of_the_rule() -> None:
    """The ties of ms_eden rest on its constants: they come out of rotation, division and
    multiplication as written."""
    rule = QUANTIZERS["ms_eden"]
    (x,) = edge_cases(rule)
    rotation = rule.check(seed=1).rotation
    assert rotation is not None
    y = rotation.apply(x)[:-1].abs()
    v = y * (1 / y.amax(dim=1, keepdim=True)) * element_scale(1.0)[0]
    assert v.amin(dim=1).tolist() == MIDDLES


class Stub(ReferenceBackend):
    """Another name for the reference; "raises" and "differs" make its codes wrong in their ways."""

    def __init__(self, name: str, fault: str = "") -> None:
        self.name, self.fault = name, fault

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        if self.fault == "raises":
            raise RuntimeError("no kernel image")
        q = super().quantize(x, quantizer, options)
        if self.fault == "differs":
            q.codes.zero_()
        return q


class Last(ReferenceBackend):
    """The reference, of a class that the stubs are not of."""


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, ReferenceBackend]]:
    """Backends "first", with a fault, and "second" before the reference, in a process that has said
    nothing yet."""

    def install(fault: str) -> dict[str, ReferenceBackend]:
        known = {"first": Stub("first", fault), "second": Stub("second"), "reference": Last()}
        monkeypatch.setattr(registry, "ReferenceBackend", Last)
        monkeypatch.setattr(registry, "BACKENDS", known)
        monkeypatch.setattr(registry, "_FAULTS", {})
        monkeypatch.setattr(registry, "_FAILED", set())
        monkeypatch.setattr(registry, "_SAID", {"meta"})
        return known

    return install


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "its first quantize failed: no kernel image"),
        ("differs", "its first quantize differs from the ref"),
    ],
)
def test_a_failed_check_is_said_though_another_takes_over(stubs, fault: str, reason: str) -> None:
    """Once for a backend, an operation and a device, with the reason, though nothing slow is left:
    several quantisers that fail alike are one warning."""
    known = stubs(fault)

    def select(name: str) -> object:
        rule = QUANTIZERS[name]
        return registry.select("auto", "quantize", CPU, rule, rule.check(seed=1))

    words = f"does not use its first backend for quantize by sr on cpu: {reason}"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        chosen = [select(name) for name in ("sr", "rtn", "sr")]
    assert chosen == [known["second"]] * 3
    assert len(caught) == 1
    with pytest.warns(
        RuntimeWarning, match="does not use its first backend for activation on cpu"
    ) as caught:
        assert registry.select("auto", "activation", CPU) is known["second"]
    assert len(caught) == 1


def test_nothing_is_said_of_what_is_right(stubs, recwarn: pytest.WarningsRecorder) -> None:
    known = stubs("")
    assert (
        registry.select("auto", "quantize", CPU, QUANTIZERS["rtn"], QUANTIZERS["rtn"].check())
        is known["first"]
    )
    # a ResourceWarning is the garbage collector's, of an earlier test
    assert not [w for w in recwarn.list if w.category is not ResourceWarning]


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_device_is_named(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that took the device with it is told from one that raised: only then does the
    process have to end."""

    def synchronize(device: torch.device) -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    card, move = torch.device("cuda", 0), torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *to, **how: self if to == (card,) else move(self, *to, **how),
    )
    said = find_fault(Stub("first", "raises"), "quantize", card, QUANTIZERS["rtn"])
    assert said is not None
    assert said.startswith("its first quantize failed: no kernel image")
    assert ("cuda:0 is lost to this process (an illegal memory access" in said) == lost
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert (
        find_fault(Stub("first", "raises"), "quantize", CPU, None)
        == "its first quantize failed: no kernel image"
    )
