"""A layer whose noise lies on its device: the same bits as with noise on the host, nothing read
back, fresh in every replay of a CUDA graph.

Here by the reference and the CPU backend; by the Triton kernels in ``test_triton.py``, which lends
its ``calls``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_linear import CUSTOM, SEED, Result, make, run, same, tokens, twin
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._guards import TracingContext
from torch.utils.checkpoint import checkpoint

import nvfp4
from nvfp4.backends.registry import BACKENDS
from nvfp4.layer.noise import Noise, gemm_seeds
from nvfp4.recipes import GEMMS

RECIPES = ["quartet2", "search_eden", "tetrajet2", "nvidia", CUSTOM]
READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__")
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: getattr(r, "name", r))


class HostRead(AssertionError):
    """The host asked for an integer of a tensor, for which it would wait for a device."""


@contextmanager
def no_host_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever reads an int64 tensor (words and seeds are; data is not) gets ``HostRead``."""

    def refusing(read: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: torch.Tensor, *args: Any) -> Any:
            if self.dtype == torch.int64:
                raise HostRead(read.__name__)
            return read(self, *args)

        return refuse

    with monkeypatch.context() as patch:
        for name in READERS:
            patch.setattr(torch.Tensor, name, refusing(getattr(torch.Tensor, name)))
        yield


def calls(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, count: int = 2) -> list[Result]:
    """Forward and backward, again and again."""
    return [run(layer, x, dy) for _ in range(count)]


def pair(recipe: Any, k: int, n: int, backend: str = "reference") -> tuple[nn.Linear, nn.Linear]:
    """The same layer with noise on the host, and capturable."""
    layer = make(recipe, k, n)
    layer.nvfp4.backend = backend  # type: ignore[union-attr]
    return layer, nvfp4.capturable(copy.deepcopy(layer))  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@by_recipe
def test_same_bits_as_with_noise_on_the_host(recipe: Any, backend: str) -> None:
    """Call after call, each with noise of its own; and back again, where the host goes on
    counting."""
    if reason := BACKENDS[backend].unavailable(torch.device("cpu")):
        pytest.skip(reason)
    layer, there = pair(recipe, 48, 80, backend)
    x, dy = tokens(37, 48, 80)
    wants = calls(layer, x, dy, 3)
    for call, (got, want) in enumerate(zip(calls(there, x, dy, 3), wants, strict=True)):
        same(got, want, f"call {call}")
    assert not torch.equal(wants[0].dw, wants[1].dw)  # type: ignore[arg-type]
    assert nvfp4.noise_state(there) == {"": 3}
    nvfp4.capturable(there, False)
    same(run(there, x, dy), run(layer, x, dy), "on the host again")


def test_seeds_are_those_of_the_host() -> None:
    """Every bit of seed, layer, call and rank; a rank of its own or the process's."""
    for backend in BACKENDS.values():
        if backend.unavailable(torch.device("cpu")):
            continue
        for words in (
            [5, 3, 2, -1],
            [-7, 2**40, 2**33 + 1, 3],
            [-(2**63), 0, 0, 0],
            [2**63 - 1, 9, 8, 2**31],
        ):
            made = backend.draw_seeds(torch.tensor(words), 6, len(GEMMS))
            for gemm, seeds in zip(GEMMS, made.tolist(), strict=True):
                step = words[3] if words[3] >= 0 else 6
                sign, (left, right) = gemm_seeds((*words[:3], step), gemm)
                assert [seed % 2**64 for seed in seeds] == [sign, left, right], (
                    backend.name,
                    words,
                    gemm,
                )


@by_recipe
def test_the_host_reads_nothing(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, recomputation; the layer with noise on the host does read, so the guard
    sees something."""
    layer, there = pair(recipe, 32, 48)
    x, dy = tokens(20, 32, 48)
    calls(layer, x, dy, 1)  # checks that happen once are behind us
    with no_host_read(monkeypatch):
        got = calls(there, x, dy)
        again = checkpoint(there, x, use_reentrant=False)
        again.backward(dy)
        with pytest.raises(HostRead):
            run(layer, x, dy)
    assert got[0].dw is not None
    assert nvfp4.noise_state(there) == {"": 3}


@pytest.mark.parametrize("reentrant", [False, True])
@by_recipe
def test_recomputation_and_two_uses(recipe: Any, reentrant: bool) -> None:
    """A layer used twice under checkpointing: each backward meets the seeds that its own recomputed
    forward saved."""

    def gradients(layer: nn.Module) -> list[torch.Tensor]:
        x = torch.linspace(-1, 2, 20 * 32).view(20, 32).requires_grad_()
        y = checkpoint(
            layer, checkpoint(layer, x, use_reentrant=reentrant), use_reentrant=reentrant
        )
        y.sum().backward()
        return [x.grad, layer.weight.grad]  # type: ignore[list-item]

    layer, there = pair(recipe, 32, 32)
    for got, want in zip(gradients(there), gradients(layer), strict=True):
        assert torch.equal(got, want)


@by_recipe
def test_compiled(recipe: Any) -> None:
    """One graph, step after step; the words are an input at a fixed address, so CUDA graphs may
    advance them."""
    static: list[set[int]] = []
    torch.compiler.reset()  # shapes that other tests compiled would make this one's dynamic

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        def compiler(inner: torch.fx.GraphModule, _: Any) -> Any:
            if not static:  # the forward
                static.append(set(TracingContext.get().fw_metadata.static_input_indices))
                places = [n.meta["val"] for n in inner.graph.nodes if n.op == "placeholder"]
                words = [i for i, value in enumerate(places) if value.dtype == torch.int64]
                assert set(words) < static[0]
                assert len(words) == 1
            return make_boxed_func(inner.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=compiler)  # type: ignore[arg-type]

    layer, there = pair(recipe, 32, 48)
    x, dy = tokens(20, 32, 48)
    compiled = torch.compile(there, fullgraph=True, backend=backend)
    for call in range(3):
        leaf = x.clone().requires_grad_()
        there.zero_grad()
        y = compiled(leaf)
        y.backward(dy)
        same(
            Result(y.detach(), leaf.grad, there.weight.grad, there.bias.grad),
            run(layer, x, dy),
            f"call {call}",
        )
    assert len(static) == 1


def test_copies_and_pickles() -> None:
    """A deep copy stays capturable and counts for itself; a pickle comes back with noise on the
    host."""
    _, there = pair("quartet2", 32, 32)
    x, dy = tokens(4, 32, 32)
    calls(there, x, dy)
    twin_layer, read = copy.deepcopy(there), pickle.loads(pickle.dumps(there))
    assert twin_layer.nvfp4.noise.capturable
    assert not read.nvfp4.noise.capturable
    assert twin_layer.nvfp4.noise == read.nvfp4.noise == there.nvfp4.noise
    same(run(twin_layer, x, dy), run(read, x, dy), "copy and pickle")
    assert nvfp4.noise_state(there) == {"": 2}
    assert nvfp4.noise_state(twin_layer) == {"": 3}
    nvfp4.load_noise_state(twin_layer, {"": 2})
    same(run(twin_layer, x, dy), run(there, x, dy), "restored")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretend that a CUDA graph is being captured."""

    def pretend(capturing: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    return pretend


def test_a_capture_that_would_repeat_noise_is_refused(capture: Callable[[bool], None]) -> None:
    """Forward with noise, or backward with noise; not what is deterministic, not what is
    capturable."""
    x, dy = tokens(4, 32, 32)
    layer, there = pair("quartet2", 32, 32)
    drawn, _ = pair(CUSTOM, 32, 32)
    rtn, _ = pair("rtn", 32, 32)
    capture(True)
    with torch.no_grad():
        layer(x)
        with pytest.raises(RuntimeError, match=r"call nvfp4\.capturable\(model\)"):
            drawn(x)
    with pytest.raises(RuntimeError, match=r"call nvfp4\.capturable\(model\)"):
        run(layer, x, dy)
    run(there, x, dy)
    run(rtn, x, dy)


def test_a_capture_takes_kept_codes_and_keeps_none(capture: Callable[[bool], None]) -> None:
    """Codes that a capture made would not exist before its first replay; those made before it are
    used."""
    layer, _ = pair("quartet2", 32, 32)
    x, _ = tokens(4, 32, 32)
    with torch.no_grad(), nvfp4.fixed_weights(layer):
        capture(True)
        want = layer(x)
        assert layer.nvfp4.cache.entry is None
        capture(False)
        layer(x)
        kept = layer.nvfp4.cache.entry
        assert kept is not None
        capture(True)
        assert torch.equal(layer(x), want)
        assert layer.nvfp4.cache.entry is kept


def test_a_model_that_moved_is_refused() -> None:
    """Noise on one device, x on another; weights without memory."""
    _, there = pair("quartet2", 32, 32)
    with pytest.raises(
        RuntimeError,
        match=r"x is on meta, .* put on cpu by nvfp4.capturable\(model\): call it again",
    ):
        there.to("meta")(torch.empty(4, 32, device="meta"))
    with pytest.raises(RuntimeError, match="the layer has no memory yet"):
        nvfp4.capturable(there)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["quartet2", "search_eden", "tetrajet2", "nvidia"])
def test_every_replay_has_noise_of_its_own(recipe: str) -> None:
    """Forward and backward in one graph, replayed three times: gradients of three eager calls, all
    different; and no synchronisation on the way."""
    x, dy = (t.cuda() for t in tokens(64, 256, 128))
    eager = make(recipe, 256, 128).cuda()
    layer = nvfp4.capturable(copy.deepcopy(eager))
    leaf = x.clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(leaf), [leaf, layer.weight], dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            made = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run(eager, x, dy)
    seen = []
    for replay in range(3):
        graph.replay()
        want = run(eager, x, dy)
        for got, wanted in zip(made, (want.dx, want.dw), strict=True):
            assert torch.equal(got, wanted), replay  # type: ignore[arg-type]
        seen.append([t.clone() for t in made])
    assert not any(
        torch.equal(a, b)
        for i in range(3)
        for j in range(i)
        for a, b in zip(seen[i], seen[j], strict=True)
    )
    assert nvfp4.noise_state(layer) == {"": 4}


@pytest.mark.cuda
def test_without_it_a_real_capture_is_refused() -> None:
    """On a card, and the message names what to do."""
    x, dy = (t.cuda() for t in tokens(16, 64, 32))
    layer = make("quartet2", 64, 32).cuda()
    run(layer, x, dy)
    leaf = x.clone().requires_grad_()
    with (
        pytest.raises(RuntimeError, match=r"call nvfp4\.capturable\(model\)"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.autograd.grad(layer(leaf), [leaf], dy)


@pytest.mark.cuda
def test_compiled_with_cuda_graphs() -> None:
    """``mode="reduce-overhead"``: the gradients of eager calls, step after step."""
    x, dy = (t.cuda() for t in tokens(64, 256, 128))
    eager = make("quartet2", 256, 128).cuda()
    layer = nvfp4.capturable(copy.deepcopy(eager))
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for step in range(6):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        compiled(leaf).backward(dy)
        want = run(eager, x, dy)
        assert torch.equal(leaf.grad, want.dx), step  # type: ignore[arg-type]
        assert torch.equal(layer.weight.grad, want.dw), step  # type: ignore[arg-type]


def test_the_words_keep_their_order() -> None:
    """What the device reads at places 0 to 3 is seed, layer, calls, rank."""
    assert Noise(SEED, 4, 5, 6).state.tolist() == [SEED - 2**64, 4, 5, 6]
    assert twin(make("rtn", 4, 4), "rtn", calls=9).nvfp4.noise.state[2] == 9
