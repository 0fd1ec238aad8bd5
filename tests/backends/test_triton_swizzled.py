"""Block scales on their way from a quantiser into cuBLASLt: which kernels are between the two.

A layer runs as on a Blackwell card: Triton quantises (interpreted), a stand-in for torch's
``scaled_mm`` multiplies, and every operation of torch that moves data in between is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import interpreted
from scaled_mm import ScaledGroupedMm, ScaledMm
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4
from nvfp4.backends import registry
from nvfp4.backends import scaled_mm as scaled_mm_module
from nvfp4.backends.registry import BACKENDS
from nvfp4.backends.scaled_mm import ScaledMmBackend
from nvfp4.numerics.layout import swizzle
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import spread
from nvfp4.numerics.torch_state import without_dispatch_modes

VIEWS = {"view", "t", "slice", "transpose", "detach", "alias", "as_strided", "expand", "empty"}
VIEWS |= {"fill_"}  # of conftest.py, which poisons what ``empty`` gives


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter is numpy, which warns of the infinities that the rules clamp."""
    with np.errstate(all="ignore"):
        yield


class Moved(TorchDispatchMode):
    """Operations of torch that read or write memory, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removeprefix("_").removesuffix("_memory_format")
        if name not in VIEWS:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


class Unseen(ScaledMm):
    """torch's function, whose insides nobody counts."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with without_dispatch_modes():
            return super().__call__(*args, **kwargs)


class Here(ScaledMmBackend):
    """The backend on the CPU; what its products moved beside multiplying."""

    name = "here"

    def __init__(self) -> None:
        super().__init__(Unseen(), ScaledGroupedMm())
        self.moved = Moved()

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def matmul(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.moved:
            return super().matmul(*args, **kwargs)


@interpreted
@pytest.mark.parametrize(
    ("rows", "blocks", "tile"),
    [(1, 1, 1), (130, 7, 1), (128, 4, 1), (300, 37, 16), (17, 33, 16), (256, 70, 1)],
)
def test_one_kernel_makes_the_layout(rows: int, blocks: int, tile: int) -> None:
    """Every byte, also those that fill up: the memory is not cleared before."""
    from nvfp4.backends.triton.swizzled import swizzled_scale

    q = QTensor.empty((rows, 16 * blocks), (tile, 16))
    generator = torch.Generator().manual_seed(rows)
    q.block_scale.copy_(torch.randint(1, 127, q.block_scale.shape, generator=generator))
    want = swizzle(spread(q.block_scale, q.block, q.rows))
    assert torch.equal(swizzled_scale(q), want)


def counted(names: list[str], launch: Any, kernel: Any, *args: Any, **kwargs: Any) -> None:
    """A launch, noted by the name of its kernel."""
    names.append(kernel.fn.__name__)
    with without_dispatch_modes():
        launch(kernel, *args, **kwargs)


@interpreted
@pytest.mark.parametrize("recipe", ["nvidia", "quartet2"])
def test_no_operation_of_torch_is_left_around_a_product(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales come swizzled from the quantiser or by one kernel; codes enter as they lie; 16-bit and
    float32 results leave as they are needed."""
    from nvfp4.backends.triton import operands, swizzled
    from nvfp4.backends.triton.gemm import decoded

    here, made = Here(), list[str]()
    table = {"here": here} | {name: BACKENDS[name] for name in ("triton", "reference")}
    monkeypatch.setattr(registry, "BACKENDS", table)
    monkeypatch.setattr(registry, "find_fault", lambda *what: None)
    monkeypatch.setattr(BACKENDS["triton"].__class__, "automatic", lambda self, device: True)
    monkeypatch.setattr(operands, "reads_swizzled", lambda device: True)
    monkeypatch.setattr(scaled_mm_module, "launches", lambda device: True)

    # the interpreter copies what it is given: only what stands around launches is counted
    for module in (swizzled, decoded):
        monkeypatch.setattr(module, "launch", partial(counted, made, module.launch))

    for dtype in (torch.bfloat16, torch.float32):
        here.moved.operations.clear()
        made.clear()
        linear = torch.nn.Linear(32, 64, bias=dtype == torch.bfloat16, dtype=dtype)
        layer = nvfp4.convert(linear, recipe, seed=1, verbose=False)
        x = torch.randn(32, 32, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert here._mm.calls == (3 if dtype == torch.bfloat16 else 6)  # type: ignore[union-attr]
        assert not here.moved.operations, here.moved.operations
        # one kernel per operand at most (poisoned by conftest.py, ready scales look old), and
        # one per float32 result
        kernels = Counter(made)
        assert kernels["swizzle_kernel"] <= 6
        assert kernels["scale_kernel"] == (0 if dtype == torch.bfloat16 else 3)
