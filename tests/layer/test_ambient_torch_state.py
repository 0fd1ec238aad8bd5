"""What may be switched on around a layer: default dtypes and devices, dispatch modes, tracing. No
bit depends on it."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nvfp4
from nvfp4.layer.sharding import Shards
from nvfp4.numerics.hadamard import Rotation
from nvfp4.quantizers.base import Options

RECIPES = ["rtn", "nvidia", "quartet2", "search_eden", "rl"]


def model(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    stack = nn.Sequential(
        nn.Linear(64, 48, dtype=torch.float32), nn.ReLU(), nn.Linear(48, 32, bias=False)
    )
    return nvfp4.convert(stack, recipe, seed=3, verbose=False)


def data(rows: int = 20) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def step(run, stack: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one pass, which are then cleared."""
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    made = [y.detach(), x.grad, *(p.grad for p in stack.parameters())]
    stack.zero_grad()
    return made


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(recipe: str, dtype: torch.dtype) -> None:
    """Large enough that scratch memory of half the size would be overrun."""
    layer = nvfp4.convert(nn.Linear(256, 512), recipe, seed=3, verbose=False)
    x = torch.randn(128, 256)
    want = step(copy.deepcopy(layer), layer, x)
    layer = copy.deepcopy(layer)
    layer.nvfp4.noise.calls = 0
    torch.set_default_dtype(dtype)
    try:
        got = step(layer, layer, x)
        empty = nvfp4.quantize(torch.empty(0, 16, dtype=torch.float32), "rtn", row_scaled=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(got[:2], want[:2])
    assert empty.global_scale.dtype == torch.float32


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_device_changes_nothing(recipe: str) -> None:
    """Kernels write to the CPU's memory though new tensors would be meta."""
    stack, twin = model(recipe), model(recipe)
    x = data()
    want = step(twin, twin, x)
    with torch.device("meta"):
        got = step(stack, stack, x)
    assert_equal(got, want)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("saved", [{torch.ops.aten.mm.default}, {"all but relu"}], ids=str)
def test_selective_checkpointing_gives_the_same_bits(recipe: str, saved: set) -> None:
    """A mode that keeps some operators' results and replays the others meets one operator for each
    layer."""

    def policy(ctx, op, *args, **kwargs):
        keep = op in saved or ("all but relu" in saved and op is not torch.ops.aten.relu.default)
        return (
            checkpointing.CheckpointPolicy.PREFER_SAVE
            if keep
            else checkpointing.CheckpointPolicy.PREFER_RECOMPUTE
        )

    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, policy)
    stack, twin = model(recipe), model(recipe)
    for _ in range(2):
        got = step(
            lambda x: checkpointing.checkpoint(stack, x, use_reentrant=False, context_fn=contexts),
            stack,
            data(),
        )
        assert_equal(got, step(twin, twin, data()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_make_fx_records_the_layer(recipe: str) -> None:
    """The recorded graph holds the operator and gives the layer's output for another input."""
    stack = model(recipe)
    with torch.no_grad():
        graph = make_fx(stack)(data())
        assert "nvfp4.linear_fprop" in graph.code
        other = data() * 3
        assert torch.equal(graph(other), stack(other))


def test_fake_tensors_have_shapes_and_no_values() -> None:
    """A converted model under FakeTensorMode, and one that was converted within it."""
    stack = model("quartet2")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = stack(mode.from_tensor(data(7)))
        assert (tuple(y.shape), y.dtype) == ((7, 32), torch.float32)
        inside = nvfp4.convert(nn.Sequential(nn.Linear(64, 16)), "quartet2", seed=0, verbose=False)
        assert tuple(inside(torch.empty(5, 64)).shape) == (5, 16)


def test_public_functions_within_a_mode() -> None:
    """Quantising inside a selectively checkpointed region gives the codes that it gives outside."""

    def region(x: torch.Tensor) -> torch.Tensor:
        return x + nvfp4.quantize(x.detach(), "four_over_six").dequantize()

    def save_all(ctx, op, *args, **kwargs):
        return checkpointing.CheckpointPolicy.PREFER_SAVE

    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, save_all)
    x = data().requires_grad_()
    y = checkpointing.checkpoint(region, x, use_reentrant=False, context_fn=contexts)
    y.square().sum().backward()
    assert torch.equal(y, region(data()))


def test_jit_trace_is_refused() -> None:
    """It would bake one call's codes into the graph."""
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(model("rtn"), data())


def test_compiling_a_part_of_a_whole_is_refused() -> None:
    """A tensor-parallel layer scales by the amax of all parts, which a compiled graph would drop in
    silence."""
    layer = nvfp4.convert(nn.Linear(32, 32), "rtn", verbose=False)
    layer.nvfp4.shards = Shards(None, {})  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(Exception, match="one part of a whole"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(4, 32))


def test_one_element_without_a_unit_stride() -> None:
    """A head with one output on one token: the gradient of a sum has strides of 0."""
    head = nvfp4.convert(nn.Linear(8, 1), "quartet2", verbose=False)
    head(torch.randn(1, 8)).sum().backward()
    assert head.weight.grad.isfinite().all()
    strided = torch.randn(10, 10)[:1, ::10]
    assert torch.equal(
        nvfp4.quantize(strided, "rtn").codes, nvfp4.quantize(strided.clone(), "rtn").codes
    )


def test_a_model_converted_for_inference_trains_later() -> None:
    """Its call counter is no inference tensor."""
    layer = nn.Linear(16, 16)
    with torch.inference_mode():
        nvfp4.convert(layer, "rtn", verbose=False)
    layer(torch.randn(4, 16)).sum().backward()
    assert layer.nvfp4.noise.calls == 1


def test_noise_stays_where_it_is_when_a_model_is_loaded_elsewhere() -> None:
    """torch.load with map_location moves tensors; the noise is integers."""
    stack = model("quartet2")
    stack[0].nvfp4.noise.calls = 5
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert loaded[0].weight.device.type == "meta"
    assert loaded[0].nvfp4.noise == stack[0].nvfp4.noise


def test_options_of_an_operand_are_checked_once_and_seeded_right() -> None:
    """The quick way to options with the seeds of a call gives what the checked way gives."""
    for recipe in nvfp4.RECIPES.values():
        for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad):
            for spec in (gemm.left, gemm.right):
                if spec.quantizer is None:
                    continue
                drawn = spec.rotation is not None and not spec.rotation.fixed
                rotation = Rotation(spec.rotation.group, spec.rotation.rounds, 9) if drawn else None
                want: Options = spec.checked(seed=5, rotation=rotation, sign_seed=9)
                assert spec.options_for(5, 9) == want
