"""What a kept kernel is kept under, and that it is launched as Triton would have launched it. A
driver that compiles for sm_90 and launches nothing stands in for the GPU."""

from __future__ import annotations

import gc
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launches_nothing import Driver, ToIR

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

import nvfp4  # noqa: E402
from nvfp4.backends import registry  # noqa: E402
from nvfp4.backends.registry import BACKENDS  # noqa: E402
from nvfp4.backends.triton import backend as backend_module  # noqa: E402
from nvfp4.backends.triton import held, launch, operands  # noqa: E402
from nvfp4.backends.triton import transpose as transpose_module  # noqa: E402
from nvfp4.backends.triton.backend import TritonBackend  # noqa: E402
from nvfp4.backends.triton.gemm import launch as gemm  # noqa: E402
from nvfp4.backends.triton.quantize import launch as quantizing  # noqa: E402
from nvfp4.backends.triton.quantize.policy import Tile  # noqa: E402
from nvfp4.quantizers.base import HeldAmax  # noqa: E402
from nvfp4.quantizers.registry import QUANTIZERS  # noqa: E402
from nvfp4.recipes import RECIPES  # noqa: E402
from tools import aot  # noqa: E402

ROOT = Path(__file__).parents[2]
TARGET = GPUTarget("cuda", 90, 32)
MEMORY = torch.zeros(64, dtype=torch.uint8)
START = -MEMORY.data_ptr() % 16
ALIGNED, ODD = MEMORY[START:], MEMORY[START + 8 :]

pytestmark = pytest.mark.skipif(
    not launch.DIRECT, reason="kernels are not launched directly by this Triton"
)


@triton.jit(do_not_specialize=("seed",))
def fill(x, other, n, seed, T: tl.constexpr, FLAG: tl.constexpr):
    """x[: n] = seed."""
    at = tl.program_id(0) * T.columns + tl.arange(0, T.columns)
    tl.store(x + at, at + seed, mask=at < n)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """In the place of Triton's, for one test."""
    made = Driver()
    kept_kernels: dict[Any, Any] = {}
    monkeypatch.setattr(launch, "_COMPILED", kept_kernels)
    kept = triton.runtime.driver._active
    triton.runtime.driver.set_active(made)
    fill.device_caches.clear()
    yield made
    fill.device_caches.clear()
    kept_kernels.clear()  # they unload themselves through the driver
    gc.collect()
    triton.runtime.driver._active = kept


TILE = Tile(1, 32, False, 1, 1, 1)


def put(
    x: torch.Tensor,
    n: int = 32,
    seed: int = 7,
    tile: Tile = TILE,
    flag: object = None,
    warps: int = 1,
) -> None:
    launch.launch(fill, 3, (x, None, n, seed), (tile, flag), warps=warps)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_kept_kernel_is_launched_as_triton_would(driver: Driver, hooked: bool) -> None:
    """The second launch goes past Triton's look-up, with everything that the first one had: grid,
    stream, function, metadata and arguments, and for whoever listens hooks and what they read."""
    look_ups = []
    hook = triton.knobs.runtime.launch_exit_hook
    if hooked:
        hook.add(print)
    fill.add_pre_run_hook(lambda *args, **options: look_ups.append(args))
    try:
        put(ALIGNED)
        put(ALIGNED)
    finally:
        fill.pre_run_hooks.clear()
        hook.remove(print)
    first, second = driver.launches
    if not hooked:  # nobody asks for what hooks would see
        assert second[6:9] == (None, None, None)
        first = (*first[:6], None, None, None, *first[9:])
    assert len(look_ups) == 1
    # what hooks would see
    plain = [[v.get() if hasattr(v, "extras") else v for v in call] for call in (first, second)]
    assert [a is b or a == b for a, b in zip(*plain, strict=True)] == [True] * len(first), plain
    assert first[:4] == (3, 1, 1, 100)


def test_the_first_of_a_family_says_that_it_compiles(driver: Driver, monkeypatch, caplog) -> None:
    """One line, before anything is compiled; not again for another kernel, nor in any process but
    the first."""
    monkeypatch.setattr(launch, "_ANNOUNCED", set())
    monkeypatch.setitem(launch.FAMILIES, __name__, "tests")
    put(ALIGNED)
    put(ALIGNED, n=33)
    assert [record.getMessage() for record in caplog.records] == [
        "nvfp4 compiles its Triton kernels for tests: seconds each at first use, then kept on disk"
    ]
    monkeypatch.setattr(launch, "_ANNOUNCED", set())
    for name, value in (("is_initialized", True), ("get_rank", 1)):
        monkeypatch.setattr(launch.dist, name, lambda value=value: value)
    put(ALIGNED, n=1)
    assert len(caplog.records) == 1


def test_kernels_are_compiled_together(driver: Driver, monkeypatch, caplog) -> None:
    """What a run would launch is compiled beforehand, by several threads, and nothing is launched;
    one line says which kernels and another that they are done. The run then compiles nothing, and
    says no more."""
    late = type("Late", (), {"not_done": {1}})
    monkeypatch.setattr(launch, "wait", lambda futures, timeout: late)
    monkeypatch.setattr(launch, "_ANNOUNCED", set())
    monkeypatch.setattr(launch, "_COMPILED_BEFOREHAND", set())
    sizes = (32, 33, 1, 32)

    def run() -> None:
        for n in sizes:
            put(ALIGNED, n=n)
        put(ALIGNED, flag=1)

    launch.compile_together(run)
    assert driver.launches == []
    assert len(fill.device_caches[0][0]) == 4
    first, second = (record.getMessage() for record in caplog.records)
    at_once = min(4, launch._cores())
    assert first == (
        f"nvfp4 compiles 4 Triton kernels, {at_once} at a time, once, then kept on disk: 4 x fill"
    )
    assert re.fullmatch(r"nvfp4 has compiled its 4 Triton kernels in \d+ s", second)

    run()
    assert len(driver.launches) == 5
    assert len(fill.device_caches[0][0]) == 4
    launch.compile_together(run)
    assert len(driver.launches) == 10, "what is compiled is launched in a rehearsal too"
    assert len(caplog.records) == 2


def test_a_rehearsal_that_fails_is_left_to_the_run(driver: Driver, monkeypatch) -> None:
    """Whatever a run makes of results that are void, and what does not compile."""

    def run() -> None:
        put(ALIGNED)
        put(ALIGNED, n=33)
        put(ALIGNED, tile=TILE._replace(columns=33))  # no power of two
        raise RuntimeError("void")

    launch.compile_together(run)
    assert driver.launches == []
    put(ALIGNED, n=33)
    assert len(driver.launches) == 1
    for _ in range(2):
        with pytest.raises(triton.CompilationError):
            put(ALIGNED, tile=TILE._replace(columns=33))


def test_processes_begin_at_different_kernels(driver: Driver, monkeypatch) -> None:
    """So that on one machine each finds on disk what the others have made; cores are shared."""
    order = []
    monkeypatch.setattr(launch, "_place", lambda: (1, 2))
    monkeypatch.setattr(launch, "_cores", lambda: 2)
    pools = []
    monkeypatch.setattr(
        launch, "ThreadPoolExecutor", lambda n: pools.append(n) or ThreadPoolExecutor(n)
    )
    fill.add_pre_run_hook(lambda *args, **options: order.append(args[2]))
    try:
        launch.compile_together(lambda: [put(ALIGNED, n=n) for n in (32, 33, 1, 2**40)])
    finally:
        fill.pre_run_hooks.clear()
    assert order == [1, 2**40, 32, 33]
    assert pools == [1]


def test_sums_modulo_a_power_of_two_are_not_trapped(driver: Driver, monkeypatch) -> None:
    """Under TRITON_DEBUG=1 Triton asserts that no integer overflows, and Philox does so at every
    step."""
    from nvfp4.backends.triton.quantize import kernels

    words, seeds = torch.zeros(4, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    traps = []
    for options in (launch.EXACT, {"enable_fp_fusion": False}):
        monkeypatch.setattr(launch, "EXACT", options)
        launch._COMPILED.clear()
        launch.launch(kernels.seeds_kernel, 1, (words, seeds, 0), (3, 4), warps=1)
        (compiled,) = launch._COMPILED.values()
        traps.append("tt.assert" in compiled.asm["ttir"])
    kernels.seeds_kernel.device_caches.clear()
    assert traps == [False, True]


def test_what_is_compiled_anew(driver: Driver) -> None:
    """Only what Triton specialises on, and an unaligned pointer never reaches a kernel compiled for
    aligned ones."""
    put(ALIGNED)
    same = driver.launches[-1][4]
    for changed in ({"seed": 1}, {"seed": 16}, {"seed": -5}, {"n": 48}):
        put(ALIGNED, **changed)
        assert driver.launches[-1][4] == same, changed
    others = [
        {"x": ODD},
        {"n": 33},
        {"n": 1},
        {"n": 2**40},
        {"x": ALIGNED.view(torch.int8)},
        {"seed": 2**40},
    ]
    others += [{"flag": 5}, {"tile": TILE._replace(columns=64)}, {"warps": 2}]
    for changed in others:
        put(**({"x": ALIGNED} | changed))
    driver.device = 1
    put(ALIGNED)
    functions = [arguments[4] for arguments in driver.launches]
    assert len(set(functions)) == len(others) + 2, functions
    driver.device = 0
    for changed in others:
        put(**({"x": ALIGNED} | changed))
    assert [arguments[4] for arguments in driver.launches[-len(others) :]] == functions[5:-1]


def test_equal_keys_mean_equal_specialisations() -> None:
    """Against Triton's own verdict, over every pair of calls with these arguments."""
    tensors = [ALIGNED, ODD, ALIGNED.view(torch.float32), ODD.view(torch.float32), None]
    numbers = [
        0,
        1,
        2,
        16,
        -16,
        -1,
        2**31 - 1,
        2**31,
        -(2**31),
        -(2**31) - 1,
        2**35,
        2**63 - 1,
        2**63,
        1.0,
        True,
        None,
    ]
    calls = [(x, None, n, 5) for x in tensors for n in numbers] + [
        (ALIGNED, None, 32, n) for n in numbers
    ]
    calls = [c for c in calls if c[3] is not None]
    binder = create_function_from_signature(fill.signature, fill.params, make_backend(TARGET))
    verdicts = [(launch.key_of(fill, c, (TILE, 1)), tuple(binder(*c, TILE, 1)[1])) for c in calls]
    kept = {}
    for call, (key, verdict) in zip(calls, verdicts, strict=True):
        assert kept.setdefault(key, verdict) == verdict, call
    assert len({verdict for _, verdict in verdicts}) > 20


@pytest.mark.parametrize("capability", [90])
def test_constants_come_last(capability: int) -> None:
    """As ``launch`` passes them, in every kernel that is listed."""
    for kernel in {
        id(v.kernel): v.kernel for p in aot.places([capability]) for v in p.variants()
    }.values():
        constant = [parameter.is_constexpr for parameter in kernel.params]
        assert [group for group, _ in itertools.groupby(constant)] == [False, True], kernel.__name__


def launched_by_a_layer(recipe: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of a layer's third forward and backward, in order.

    A card without FP4 units whose kernels are only lowered stands in for the GPU; the first two
    calls look for amaxes of their own, and compile.
    """
    monkeypatch.setattr(triton.compiler, "compile", ToIR(driver))
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self, device: None)
    monkeypatch.setattr(TritonBackend, "automatic", lambda self, device: True)
    monkeypatch.setattr(registry, "BACKENDS", {"triton": BACKENDS["triton"]})
    monkeypatch.setattr(registry, "find_fault", lambda *what: None)
    monkeypatch.setattr(registry, "_FAULTS", {})
    layer = nvfp4.convert(torch.nn.Linear(64, 48), recipe, backend="triton", verbose=False)
    names: list[str] = []
    plain = launch.launch

    def named(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)
        plain(kernel, *args, **kwargs)

    for module in (operands, quantizing, gemm, held, transpose_module, backend_module):
        monkeypatch.setattr(module, "launch", named)
    for _ in range(3):
        names.clear()
        x = torch.randn(32, 64, requires_grad=True)
        layer(x).sum().backward()
    return names


def test_a_delayed_amax_costs_no_launch(driver: Driver, monkeypatch) -> None:
    """Both orientations of x and of dy are read once instead of twice, and the call ends in one
    launch. The weight looks for its own."""
    kernels = launched_by_a_layer("nvidia", driver, monkeypatch)
    assert kernels.count("amax_both_kernel") == 2
    delayed = launched_by_a_layer("nvidia+delayed_amax", driver, monkeypatch)
    assert sorted([*delayed, *["amax_both_kernel"] * 2]) == sorted([*kernels, "turn_kernel"])
    assert delayed[-1] == "turn_kernel"


LAUNCHES = {
    "rtn": (5, 11),
    "nvidia": (5, 10),
    "four_over_six": (5, 10),
    "tetrajet2": (5, 13),
    "quartet2": (5, 14),
    "rl": (5, 7),
}
"""At most, of a forward, and of forward and backward: amax and codes of an operand are two, codes
and scales of ms_eden too, its search one more; of one read for both orientations all but the scales
are shared; a product, and codes transposed, are one each."""
OTHERS = 5, 15


def test_a_layer_launches_no_more() -> None:
    """Of every recipe that quantises, a small layer with operands whose peaks are cleared already.

    In a process of its own, in which Triton compiles nothing; the counts are printed.
    """
    recipes = [name for name, recipe in RECIPES.items() if recipe.quantized]
    command = [sys.executable, "-m", "benchmarks.bench_overhead", "--counts"]
    child = subprocess.run(
        [*command, "--recipes", ",".join(recipes)], capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr[-3000:]
    rows = json.loads(child.stdout.splitlines()[-1])
    counted = {(recipe, call): of_triton for recipe, call, of_triton, _ in rows}
    for (recipe, call), count in counted.items():
        print(f"{recipe:14} {call:20} {count:3}")
    for recipe in recipes:
        got = [counted[recipe, call] for call in ("forward", "forward + backward")]
        most = LAUNCHES.get(recipe, OTHERS)
        assert all(0 < n <= limit for n, limit in zip(got, most, strict=True)), (recipe, got, most)


def test_results_share_no_memory() -> None:
    """Peaks are cleared many at a time, and one of them may become the global scale of a result: an
    operator of torch may return no two tensors of one memory."""
    from nvfp4.backends.triton.operands import Target, zero_peak

    rule = QUANTIZERS["rtn"]
    held = replace(rule.check(), held=HeldAmax(torch.ones(1)))
    kinds = (rule.check(), rule.check(row_scaled=True), held)
    targets = [Target((16, 32), rule, options, torch.device("cpu")) for options in kinds * 2]
    tensors = [tensor for target in targets for tensor in target.q.tensors]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    peaks = [zero_peak(torch.device("cpu")) for _ in range(200)]
    assert len({peak.data_ptr() for peak in peaks}) == 200
    assert all(peak.data_ptr() % 16 == 0 and not peak.any() for peak in peaks)


def test_peaks_of_other_streams_are_cleared_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is captured there clears its own, and keeps no memory beyond a call; on the
    default stream many are cleared at a time."""
    from nvfp4.backends.triton import operands

    card, counts, stream = torch.device("cuda", 0), list[int](), [7]
    monkeypatch.setattr(operands, "_CLEARED", {})
    monkeypatch.setattr(operands, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(
        operands, "_zeros", lambda n, device: counts.append(n) or torch.zeros(n, dtype=torch.int32)
    )
    for _ in range(3):
        operands.zero_peak(card)
    assert counts == [1, 1, 1]
    assert operands._CLEARED == {}
    stream[0] = 0
    for _ in range(operands.CLEARED + 1):
        operands.zero_peak(card)
    assert counts[3:] == [operands.CLEARED * operands.PEAK_UNIT] * 2
