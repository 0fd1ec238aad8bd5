"""What keeps the codes of a weight: streams that stand in for a GPU's, and the memory that a read
needs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvfp4.layer.weight_cache import Done, Mode, WeightCache
from nvfp4.numerics.layout import swizzle
from nvfp4.ops import quantize


class Stream:
    """Writes down what it is told."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def record_event(self) -> str:
        return f"event {len(self.told)}"

    def wait_event(self, event: str) -> None:
        self.told.append((self, event))


def test_another_stream_waits_and_the_memory_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that made it does not wait; another one does, at every read, and the allocator is
    told."""
    told: list[Any] = []
    maker, reader = Stream(told), Stream(told)
    current = maker
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: told.append((tensor, stream))
    )
    x = torch.zeros(3)
    done = Done(torch.device("cuda", 0))
    done.before_reading([x])
    assert told == []
    current = reader
    done.before_reading([x])
    assert told[0] == (reader, "event 0")
    assert told[1][0] is x
    assert told[1][1] is reader


def test_all_that_kept_codes_hold_outlives_a_read() -> None:
    """The swizzled scales that a GEMM reads are memory too, which the allocator must not give away
    before."""
    weight = torch.ones(32, 64)
    q = quantize(weight, "rtn")
    q = replace(q, swizzled_scale=swizzle(q.block_scale))
    cache = WeightCache()
    cache.mode = Mode.FIXED
    read: list[torch.Tensor] = []
    assert cache.get(weight, "recipe", "auto", lambda *_: (q,), None) == (q,)
    assert cache.entry is not None
    cache.entry = cache.entry._replace(done=SimpleNamespace(before_reading=read.extend))
    assert cache.get(weight, "recipe", "auto", lambda *_: (q,), None) == (q,)
    assert [id(tensor) for tensor in read] == [
        id(tensor) for tensor in (*q.tensors, q.swizzled_scale)
    ]


def test_a_processor_has_no_streams() -> None:
    """Nothing is asked of torch.cuda there."""
    Done(torch.device("cpu")).before_reading([torch.zeros(3)])
