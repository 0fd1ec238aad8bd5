"""Among backends of equal bits the faster one is chosen, as a clock says: here one that is made
up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from assertions import assert_qtensor_equal

import nvfp4
from nvfp4.backends import autotune, registry
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import quantize_both, quantize_with, requantize_with
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


class Steps(ReferenceBackend):
    """Says what it did last; a clock reads that, and how long it is said to take."""

    done: list[str]

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        self.done.append(f"{self.name} {'rows' if x.stride(1) == 1 else 'columns'}")
        return super().quantize(x, quantizer, options)

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        codes = super().requantize(q, quantizer, options)
        self.done[:] = [f"{self.name} codes"]
        return codes

    def quantize_both(self, x: torch.Tensor, rows, columns) -> tuple[QTensor, QTensor]:
        both = super().quantize_both(x, rows, columns)
        self.done[:] = [f"{self.name} both"]
        return both


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], list[tuple[str, ...]]]:
    """Backends a and b whose every step takes the seconds of a table; what was timed, in order."""

    def build(seconds: dict[str, float]) -> list[tuple[str, ...]]:
        done: list[str] = []
        timed: list[tuple[str, ...]] = []

        def clock(run: Callable[[], object], device: torch.device) -> float:
            done.clear()
            run()
            timed.append(tuple(done))
            return sum(seconds[step] for step in done)

        known = {name: Steps(name, done) for name in ("a", "b")}
        monkeypatch.setattr(registry, "ReferenceBackend", type(REFERENCE))
        monkeypatch.setattr(registry, "BACKENDS", known | {"reference": REFERENCE})
        monkeypatch.setattr(registry, "_FAULTS", {})
        monkeypatch.setattr(registry, "_SECONDS", {})
        monkeypatch.setattr(registry, "_CLOCKS", {"cpu": clock})
        monkeypatch.setattr(autotune, "SHAPE", (16, 32))
        return timed

    return build


SECONDS = {"a rows": 1.0, "b rows": 2.0, "a columns": 2.0, "b columns": 1.0}
SECONDS |= {"a codes": 2.0, "b codes": 1.0}


@pytest.mark.parametrize(
    ("both", "ways"),
    [
        ({"a both": 1.5, "b both": 1.8}, ["a both"]),
        ({"a both": 3.0, "b both": 1.8}, ["b both"]),
        ({"a both": 3.0, "b both": 2.2}, ["a rows", "b columns"]),
        ({"a both": 2.05, "b both": 2.0}, ["a both"]),
    ],
)
def test_each_road_has_its_own_winner(roads, both: dict[str, float], ways: list[str]) -> None:
    """Rows by a, columns and codes by b; both in one call, or in two where that is clearly faster.
    The second question times nothing."""
    timed = roads(SECONDS | both)
    rule = QUANTIZERS["four_over_six"]
    how = (rule, rule.check())
    x = torch.linspace(-3, 3, 32 * 48).view(32, 48)
    asked = 0
    for turn in range(2):
        got = quantize_both(x, how, how)
        assert registry.BACKENDS["a"].done[-len(ways) :] == ways
        assert_qtensor_equal(got[0], quantize_with(x, *how))
        assert registry.BACKENDS["a"].done[-1] == "a rows"
        assert_qtensor_equal(got[1], quantize_with(x.t(), *how))
        assert registry.BACKENDS["a"].done[-1] == "b columns"
        requantize_with(got[0], *how)
        assert registry.BACKENDS["a"].done == ["b codes"]
        asked = asked if turn else len(timed)
    assert len(timed) == asked
    assert {way for way in timed if len(way) > 1} == {("a rows", "b columns")}


def test_options_race_apart(roads) -> None:
    """16x16 blocks are other kernels than rows of 16; another seed is not another kind."""
    timed = roads(SECONDS)
    rule, x = QUANTIZERS["sr"], torch.linspace(-3, 3, 32 * 48).view(32, 48)
    counts = []
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 1, "block": (16, 16)}):
        quantize_with(x, rule, rule.check(**options))
        counts.append(len(timed))
    assert counts[0] == counts[1] > 0
    assert counts[2] == 2 * counts[0]


def test_a_card_without_room_holds_no_race(roads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order then stays as it is, and nobody is asked again."""
    timed = roads(SECONDS | {"a both": 9.0, "b both": 1.0})

    def full(*args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(autotune, "_matrix", full)
    rule, x = QUANTIZERS["rtn"], torch.linspace(-3, 3, 32 * 48).view(32, 48)
    how = (rule, rule.check())
    quantize_with(x.t(), *how)
    assert registry.BACKENDS["a"].done[-1] == "a columns"
    quantize_both(x, how, how)
    assert registry.BACKENDS["a"].done == ["a both"]
    assert timed == []


def test_an_answer_is_looked_up(stage) -> None:
    """The second question asks no backend anything; one about another rule, other options or other
    tables does."""
    stage(2.0, 1.0)
    asked: list[str] = []

    class Counts(dict):
        def values(self):
            asked.append("values")
            return super().values()

    tables = registry.BACKENDS
    registry.BACKENDS = Counts(tables)
    try:
        rule = QUANTIZERS["sr"]

        def ask(**options: object) -> int:
            asked.clear()
            registry.select("auto", "quantize", CPU, rule, rule.check(**options))
            return len(asked)

        assert ask(seed=1) > 0
        assert ask(seed=1) == ask(seed=2) == 0
        assert ask(seed=1, row_scaled=True) > 0
        registry.BACKENDS = Counts(tables)
        assert ask(seed=1) > 0
    finally:
        registry.BACKENDS = tables


def test_a_backend_that_comes_or_goes_is_noticed() -> None:
    """In the table as it is: "auto" sees a faster one at once, and no name outlives its backend."""
    rule, table = QUANTIZERS["rtn"], registry.BackendTable()

    def ask(name: str = "auto") -> object:
        return registry.select(name, "quantize", CPU, rule, rule.check())

    kept, registry.BACKENDS = registry.BACKENDS, table
    try:
        table.update({"slow": Stub("slow"), "reference": REFERENCE})
        assert ask() is ask("slow") is table["slow"]
        table["slow"] = Stub("slow")
        assert ask() is ask("slow") is table["slow"]
        del table["slow"]
        assert ask() is REFERENCE
        with pytest.raises(ValueError, match="unknown backend 'slow'"):
            ask("slow")
    finally:
        registry.BACKENDS = kept
