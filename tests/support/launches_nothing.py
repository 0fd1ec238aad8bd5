"""Triton's real JIT over a driver that launches nothing: what a GPU would compile, on any machine.

Triton compiles a kernel anew for what a call looks like: an integer that is 1 becomes a constant,
one that divides by 16 and a pointer aligned to 16 bytes promise so, any other is a number of its
type. Its interpreter does none of this, and a list of kernels to compile ahead of time holds the
cases somebody thought of. What a kernel makes of ``columns == 1``, or what one version of Triton
thinks of an attribute, would otherwise show on a GPU, on the first day, and nowhere else.

Two uses. ``Driver`` alone stands in for the GPU in a test (test_triton_launch.py). As a plugin of
pytest this module turns the tests that are written for a GPU into tests of the compiler:

    NVFP4_TEST_CARD=90 python -m pytest -p launches_nothing tests/backends/test_triton.py ...

They run on CPU tensors. Each launch goes through the JIT with the arguments that a GPU would get,
and
then nowhere: results hold what their memory held, and every comparison is told that they agree.
What fails is what does not compile. NVFP4_TEST_STAGE "ir" stops at Triton's own IR, a tenth of a
second a kernel, where all specialisation has been done; "cubin" goes on to machine code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).parents[2]
CAPABILITY = int(os.environ.get("NVFP4_TEST_CARD", "90"))
STAGE = os.environ.get("NVFP4_TEST_STAGE", "ir")
SAMPLES = int(os.environ.get("NVFP4_TEST_SAMPLES", "0"))
"""Of each test function, so many of its cases, evenly spread over them; 0: all."""
CPU = torch.device("cpu")


class Driver:
    """Of one of several cards that are not there. launches: the arguments of each launch, as Triton
    hands them over, unless they are only counted."""

    def __init__(self, capability: int = 90, keep: bool = True) -> None:
        self.capability, self.keep = capability, keep
        self.device, self.loaded, self.count = 0, 0, 0
        self.launches: list[tuple[Any, ...]] = []
        self.utils, self.launcher_cls = self, self.launcher

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def unload_module(self, *args: Any) -> None: ...

    def launcher(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, *args: Any) -> None:
        self.count += 1
        if self.keep:
            self.launches.append(args)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class Lowered:
    """In the place of a compiled kernel, for one that was lowered to Triton's IR and no further."""

    function = packed_metadata = None

    def __init__(self, run: Any) -> None:
        self.run = run

    def launch_metadata(self, *args: Any) -> None: ...


class ToIR:
    """In the place of ``triton.compile``: the front end alone. A marker of every source that went
    through is kept under build/, so that what has not changed is not lowered again."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.folder = ROOT / "build" / f"lowered-{triton.__version__}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fresh = self.kept = 0

    def __call__(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> Lowered:
        backend = triton.compiler.make_backend(target)
        parsed = backend.parse_options(dict(options, **source.parse_options()))
        state = f"{source.hash()} {target} {parsed}"
        marker = self.folder / hashlib.sha256(state.encode()).hexdigest()
        if marker.exists():
            self.kept += 1
            return Lowered(self.driver.launch)
        context = triton._C.libtriton.ir.context()
        triton._C.libtriton.ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        source.make_ir(target, parsed, functions, modules, context)
        self.fresh += 1
        marker.touch()
        return Lowered(self.driver.launch)


class Session:
    """What the plugin sets up and counts: kernels by whether they had to be compiled, launches, and
    assertions of tests about results that nobody computed."""

    def __init__(self) -> None:
        self.driver = Driver(CAPABILITY, keep=False)
        self.lowering = ToIR(self.driver)
        self.unmet: list[str] = []

    def install(self) -> None:
        """The driver under Triton and the card under the backend, whose self-check only
        launches."""
        triton.runtime.driver.set_active(self.driver)
        if STAGE == "ir":
            triton.compiler.compile = self.lowering
        import interpreting

        from nvfp4.backends import registry, selfcheck
        from nvfp4.backends.triton import backend, operands
        from nvfp4.backends.triton.gemm import launch as gemm

        interpreting.is_elsewhere = lambda item: False
        backend.TritonBackend.unavailable = lambda self, device: None
        operands.card_converts = lambda device: operands.converts(CAPABILITY)
        gemm._device = lambda device, native=True: (gemm.family(CAPABILITY, native), 132)
        backend.contract = lambda left, right: left.float() @ right.float().t()

        def launch_all(which: Any, operation: Any, device: Any, quantizer: Any) -> None:
            selfcheck._PROBES[operation](which, device, quantizer or selfcheck.RTN)

        registry.find_fault = launch_all

    def agree(self) -> None:
        """Every comparison holds. Before test modules are imported, which take these by name."""
        import assertions
        import test_linear
        import test_native

        torch.equal = lambda a, b: True
        test_native.same = test_linear.same = lambda *args: True
        test_native.assert_same = lambda *args: None
        for name in [name for name in vars(assertions) if name.startswith("assert_")]:
            setattr(assertions, name, lambda *args, **kwargs: None)


SESSION: Session | None = None
"""Of the process in which this module is a plugin."""


def pytest_configure(config: pytest.Config) -> None:
    global SESSION
    SESSION = Session()
    SESSION.install()


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Session):
        assert SESSION is not None
        SESSION.agree()


def is_for_gpus(item: pytest.Item) -> bool:
    """Whether a test launches on a GPU what it launches here. The three that are about the
    interpreter do not, nor does anything but the kernels' own tests."""
    name = item.name
    if name.startswith(("test_conversions_of", "test_rows_further", "test_the_interpreter_is")):
        return False
    if item.path.name == "test_triton_gemm.py":
        return name.startswith("test_on_a_gpu")
    if item.path.name == "test_vectors.py":
        return "triton-cpu" in name
    return item.get_closest_marker("interpreted") is not None


def sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    """``SAMPLES`` cases of each function."""
    if not SAMPLES:
        return items
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    spread = [cases[:: -(-len(cases) // SAMPLES)] for cases in functions.values()]
    return [item for cases in spread for item in cases]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = sampled([item for item in items if is_for_gpus(item)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in kept:
        item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]
        item.module.DEVICE = CPU
        item.module.capability = lambda: CAPABILITY


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """An assertion that still does not hold is counted, and is no failure."""
    try:
        return (yield)
    except AssertionError:
        assert SESSION is not None
        SESSION.unmet.append(pyfuncitem.name)
        return True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    assert SESSION is not None
    lowering, driver = SESSION.lowering, SESSION.driver
    terminalreporter.write_line(
        f"Triton {triton.__version__}, sm_{CAPABILITY}: {lowering.fresh} kernels lowered, "
        f"{lowering.kept} known, "
        f"{driver.loaded} built, {driver.count} launches, {len(SESSION.unmet)} unmet: "
        f"{SESSION.unmet}"
    )
