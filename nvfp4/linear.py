"""The linear layer: fprop, dgrad and wgrad on the operands that its recipe makes.

Nothing but FP4 codes and scales is saved for backward (unless the recipe leaves a GEMM in high precision). The noise of
an operand is a function of (seed, layer, call, GEMM, operand, rank, element) and of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nvfp4.backends.registry import AUTO
from nvfp4.hadamard import Rotation
from nvfp4.ops import INPUT_DTYPES, dequantize, fingerprint, matmul, quantize_with, requantize_with, without_autocast
from nvfp4.qtensor import QTensor
from nvfp4.quantizers.base import Options
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import GEMMS, Gemm, Operand, Recipe
from nvfp4.rng import fold_in

LEFT, RIGHT = 0, 1


@dataclass
class Noise:
    """Where a layer's random bits come from.

    seed: the user's, in [0, 2^64). layer: index in conversion order. calls: backward passes finished so far; it
    advances at the end of a backward, so that recomputing a forward (activation checkpointing) meets the same noise.
    """

    seed: int
    layer: int
    calls: int = 0

    def seeds(self, gemm: str, call: int) -> tuple[int, tuple[int, int]]:
        """(sign seed, rounding seeds of the left and the right operand) of one GEMM.

        Signs are equal on all ranks, since both operands must rotate alike wherever they come from; rounding differs.
        """
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return _gemm_seeds(_layer_seed(self.seed, self.layer), call, GEMMS.index(gemm), rank)


@lru_cache(maxsize=4096)
def _layer_seed(seed: int, layer: int) -> int:
    return fold_in(seed, layer)


@lru_cache(maxsize=8)  # the two operands of a GEMM ask one after the other
def _gemm_seeds(layer_seed: int, call: int, gemm: int, rank: int) -> tuple[int, tuple[int, int]]:
    sign_seed = fold_in(layer_seed, call, gemm)
    return sign_seed, (fold_in(sign_seed, 1 + LEFT, rank), fold_in(sign_seed, 1 + RIGHT, rank))


@dataclass
class LinearState:
    """What a converted layer knows beside its parameters. noise.calls is the only part that changes in training."""

    recipe: Recipe
    noise: Noise
    backend: str = AUTO
    enabled: bool = True
    keeps_weight: bool = field(default=False, repr=False, compare=False)
    weight_codes: tuple[tuple[Any, ...], QTensor] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"keeps_weight": False, "weight_codes": None}  # a copy or a pickle is outside the scope

    def operand(
        self, x: torch.Tensor | QTensor, gemm: str, side: int, call: int, partner: Rotation | None = None
    ) -> QTensor:
        """Matrix x [rows, contraction] (any strides) as the recipe's operand of a GEMM.

        A QTensor stands for the transpose of what it decodes to: x-hat^T or w-hat^T, quantised again.
        partner: the rotation of the other operand, if that one was made in an earlier call; its signs are used again.
        """
        spec = _side(getattr(self.recipe, gemm), side)
        assert spec.quantizer is not None
        quantizer, options = get_quantizer(spec.quantizer), self._options(spec, gemm, side, call, partner)
        if isinstance(x, QTensor):
            return requantize_with(x, quantizer, options, backend=self.backend)
        return quantize_with(x, quantizer, options, backend=self.backend)

    def _options(self, spec: Operand, gemm: str, side: int, call: int, partner: Rotation | None) -> Options:
        if spec.noiseless is not None:
            return spec.noiseless
        sign_seed, seeds = self.noise.seeds(gemm, call)
        if partner is not None and partner.sign_seed is not None:
            sign_seed = partner.sign_seed
        rotation = spec.rotation
        if rotation is not None and not rotation.fixed:
            rotation = Rotation(rotation.group, rotation.rounds, sign_seed)
        return spec.checked(seed=seeds[side], rotation=rotation, sign_seed=sign_seed)

    def weight(self, weight: torch.Tensor) -> QTensor:
        """The weight as fprop's operand, quantised once for as long as it stays the same.

        Where the backend can fingerprint memory, it is the bytes themselves that are compared: version counters miss
        fused optimizers, writes through ``.data`` and custom kernels. Elsewhere codes are kept inside ``fixed_weights``
        only. Stochastic operands are never kept, nor anything under torch.distributed, where memory may be sharded.
        """
        distributed = dist.is_available() and dist.is_initialized()
        kept = self.recipe.fprop.right.noiseless is not None and not distributed
        key = self._weight_key(weight) if kept else None
        if key is None:
            return self.operand(weight, "fprop", RIGHT, self.noise.calls)
        if self.weight_codes is None or self.weight_codes[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # codes made in a rollout serve training as well
                self.weight_codes = (key, self.operand(weight, "fprop", RIGHT, self.noise.calls))
        return self.weight_codes[1]

    def _weight_key(self, weight: torch.Tensor) -> tuple[Any, ...] | None:
        """What the weight's codes are kept under, or None if there is no telling whether it changed."""
        made_by = (weight.dtype, weight.shape, weight.device, self.recipe, self.backend)
        if self.keeps_weight and not weight.is_inference():
            # a weak reference, since a freed weight's address may be given to the next, as in .bfloat16().float()
            memory = (StorageWeakRef(weight.untyped_storage()), weight.storage_offset(), weight.stride())
            return (weight._version, *memory, *made_by)
        content = fingerprint(weight, backend=self.backend)
        return None if content is None else (content, *made_by)

    def matmul(self, a: QTensor, b: QTensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
        """a @ b^T [a rows, b rows] on this layer's backend."""
        return matmul(a, b, dtype, bias=bias, backend=self.backend)


def _side(gemm: Gemm, side: int) -> Operand:
    return gemm.right if side == RIGHT else gemm.left


class _LinearFunction(torch.autograd.Function):
    """y = x w^T + bias with x [M, K], w [N, K]; see ``recipes.py`` for the three GEMMs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: LinearState,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        call = state.noise.calls
        y, x_codes, w_codes = _fprop(x, weight, bias, state, dtype)
        saved_w = _save_weight(weight, w_codes, state) if ctx.needs_input_grad[0] else None
        saved_x = _save_input(x, x_codes, state, call) if ctx.needs_input_grad[1] else None
        ctx.state, ctx.x_dtype, ctx.w_dtype = state, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.records = tuple(s.record if isinstance(s, QTensor) else None for s in (saved_w, saved_x))
        ctx.save_for_backward(*_tensors(saved_w), *_tensors(saved_x))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True leaves it on in here
            raise RuntimeError(
                "nvfp4 layers have no second derivative: differentiate without create_graph=True, or compute this "
                "forward under nvfp4.disabled(model)"
            )
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        state, call = ctx.state, ctx.state.noise.calls
        tensors = iter(ctx.saved_tensors)
        saved_w, saved_x = (_restore(tensors, r, n) for r, n in zip(ctx.records, (needs_x, needs_w), strict=True))
        dx = dw = db = None
        with without_autocast(dy.device):
            if needs_x:
                dx = _dgrad(dy, saved_w, state, call, ctx.x_dtype)
            if needs_w:
                dw = _wgrad(dy, saved_x, state, call, ctx.w_dtype)
            if needs_bias:
                db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        state.noise.calls += 1
        return dx, dw, db, None, None


def _fprop(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: LinearState, dtype: torch.dtype
) -> tuple[torch.Tensor, QTensor | None, QTensor | None]:
    if not state.recipe.fprop.quantized:
        cast_bias = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), cast_bias), None, None
    x_codes = state.operand(x, "fprop", LEFT, state.noise.calls)
    w_codes = state.weight(weight)
    return state.matmul(x_codes, w_codes, dtype, bias), x_codes, w_codes


def _save_weight(weight: torch.Tensor, codes: QTensor | None, state: LinearState) -> torch.Tensor | QTensor:
    """What dgrad will need of w: fprop's codes, or the parameter itself, which costs nothing."""
    return weight if state.recipe.dgrad.right.source == "tensor" else cast(QTensor, codes)


def _save_input(x: torch.Tensor, codes: QTensor | None, state: LinearState, call: int) -> torch.Tensor | QTensor:
    """What wgrad will need of x: fprop's codes, or x^T quantised now so that x itself need not be kept."""
    spec = state.recipe.wgrad.right
    if spec.source != "tensor":
        return cast(QTensor, codes)
    return state.operand(x.t(), "wgrad", RIGHT, call) if spec.quantized else x


def _dgrad(
    dy: torch.Tensor, saved: torch.Tensor | QTensor, state: LinearState, call: int, dtype: torch.dtype
) -> torch.Tensor:
    """dx = dy w, [M, K]."""
    spec = state.recipe.dgrad.right
    if not spec.quantized:
        return _high_precision(dy, saved, dtype)
    if spec.source == "codes":
        right = cast(QTensor, saved).transpose()
    else:
        right = state.operand(saved if isinstance(saved, QTensor) else saved.t(), "dgrad", RIGHT, call)
    return state.matmul(state.operand(dy, "dgrad", LEFT, call), right, dtype)


def _wgrad(
    dy: torch.Tensor, saved: torch.Tensor | QTensor, state: LinearState, call: int, dtype: torch.dtype
) -> torch.Tensor:
    """dw = dy^T x, [N, K]."""
    spec = state.recipe.wgrad.right
    if not spec.quantized:
        return _high_precision(dy.t(), saved, dtype)
    if spec.source == "decoded":
        right = state.operand(saved, "wgrad", RIGHT, call)
    else:
        right = cast(QTensor, saved).transpose() if spec.source == "codes" else cast(QTensor, saved)
    # an x^T quantised in the forward keeps the signs of that call, and dy^T has to meet it under the same
    return state.matmul(state.operand(dy.t(), "wgrad", LEFT, call, partner=right.rotation), right, dtype)


def _high_precision(left: torch.Tensor, right: torch.Tensor | QTensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in dy's dtype, or in BF16 when ``right`` is a decoded forward operand (x-hat or w-hat)."""
    if isinstance(right, QTensor):
        return (left.to(torch.bfloat16) @ dequantize(right, torch.bfloat16)).to(dtype)
    return (left @ right.to(left.dtype)).to(dtype)


def _tensors(saved: torch.Tensor | QTensor | None) -> tuple[torch.Tensor, ...]:
    """What to save for backward.

    The seed of drawn signs travels with the codes that they turned: under activation checkpointing both must be the
    recomputation's, since a layer used twice may have finished a backward since its first forward.
    """
    if not isinstance(saved, QTensor):
        return () if saved is None else (saved,)
    if saved.rotation is None or saved.rotation.sign_seed is None:
        return saved.tensors
    return *saved.tensors, torch.tensor(saved.rotation.sign_seed, dtype=torch.uint64)


def _restore(tensors: Iterator[torch.Tensor], record: tuple | None, needed: bool) -> Any:
    """The inverse of ``_tensors``, taking what it needs from the saved tensors in order."""
    if not needed:
        return None
    if record is None:
        return next(tensors)
    q = QTensor(next(tensors), next(tensors), next(tensors), *record)
    if q.rotation is None or q.rotation.sign_seed is None:
        return q
    return replace(q, rotation=replace(q.rotation, sign_seed=int(next(tensors).item())))


class Linear(nn.Linear):
    """An ``nn.Linear`` whose GEMMs run in NVFP4; made by ``nvfp4.convert``, which turns a layer into one in place.

    Parameters, keys of ``state_dict``, hooks and dtypes are those of ``nn.Linear``. x: [..., in_features] in float32,
    bfloat16 or float16, any rank from 1, any number of tokens; y: [..., out_features] in the dtype ``F.linear`` would
    give (under autocast, the autocast dtype). NaN or Inf in x or the weight make the output NaN.
    """

    nvfp4: LinearState

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + bias of x = ``input``, the name it has in ``nn.Linear``.

        Raises ValueError if x has another last dimension, TypeError if the dtypes do not fit.
        """
        x, state = input, self.nvfp4
        if not (state.enabled and state.recipe.quantized):
            return F.linear(x, self.weight, self.bias)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., in_features={self.in_features}], got {tuple(x.shape)}")
        dtype = self._output_dtype(x)
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled():
            y = _LinearFunction.apply(rows, self.weight, self.bias, state, dtype)
        else:
            y, _, _ = _fprop(rows, self.weight, self.bias, state, dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _output_dtype(self, x: torch.Tensor) -> torch.dtype:
        if x.dtype not in INPUT_DTYPES or self.weight.dtype not in INPUT_DTYPES:
            raise TypeError(f"x and weight must be float32, bfloat16 or float16, got {x.dtype} and {self.weight.dtype}")
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x is {x.dtype} but weight is {self.weight.dtype}; cast one, or run under torch.autocast")
        return x.dtype

    def extra_repr(self) -> str:
        """Sizes, bias, recipe and backend."""
        state = self.nvfp4
        off = "" if state.enabled else ", disabled"
        return f"{super().extra_repr()}, recipe={state.recipe.name}, backend={state.backend}{off}"


def layers(model: nn.Module) -> dict[str, Linear]:
    """The converted layers of a model by dotted name, each once, in conversion order."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return dict(sorted(found.items(), key=lambda item: item[1].nvfp4.noise.layer))


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context each weight is quantised once: for generation, or the micro-batches of one optimizer step.

    No result changes. Ordinary in-place changes of a weight are noticed. A fused optimizer (``fused=True``), a write
    through ``.data`` or a custom kernel leaves no trace: end the context before it, or call ``invalidate`` after it.
    """
    states = [layer.nvfp4 for layer in layers(model).values() if not layer.nvfp4.keeps_weight]
    for state in states:
        state.keeps_weight = True
    try:
        yield model
    finally:
        for state in states:
            state.keeps_weight, state.weight_codes = False, None


def invalidate(model: nn.Module) -> None:
    """Forget every quantised weight; needed only inside ``fixed_weights``, after a write that leaves no trace."""
    for layer in layers(model).values():
        layer.nvfp4.weight_codes = None


def noise_state(model: nn.Module) -> dict[str, int]:
    """Backward passes finished by each converted layer, by name; with ``state_dict`` it resumes bit for bit."""
    return {name: layer.nvfp4.noise.calls for name, layer in layers(model).items()}


def load_noise_state(model: nn.Module, calls: Mapping[str, int]) -> None:
    """Restore ``noise_state``; KeyError-free: raises ValueError naming layers that are missing or unexpected."""
    found = layers(model)
    if found.keys() != calls.keys():
        raise ValueError(
            f"noise state does not fit the model: missing {sorted(found.keys() - calls.keys())}, "
            f"unexpected {sorted(calls.keys() - found.keys())}; convert the model with the same options first"
        )
    for name, layer in found.items():
        layer.nvfp4.noise.calls = int(calls[name])
