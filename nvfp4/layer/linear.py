"""The linear layer: ``nn.Linear`` with its three GEMMs in NVFP4, in eager mode and in compiled graphs.

The arithmetic is in ``gemms.py``. Here it meets autograd: eager mode calls it directly and keeps a weight's codes for
as long as the weight stays the same; a compiled graph calls the operators of ``operators.py``, which do the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nvfp4.backends.registry import AUTO
from nvfp4.layer import operators as layer_ops
from nvfp4.layer.dense import affine
from nvfp4.layer.gemms import Call, flatten, fprop, stored_operands
from nvfp4.layer.lazy_activation import Deferred
from nvfp4.layer.noise import CALLS, Noise, words_of
from nvfp4.layer.sharding import GatheredWeight, Shards
from nvfp4.layer.shared_amax import Contents, SharedAmax
from nvfp4.layer.streams import Done
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.torch_state import autocast_dtype, is_capturing, is_dtensor, is_traced
from nvfp4.ops import INPUT_DTYPES, fingerprint
from nvfp4.recipes import Recipe


@dataclass
class LinearState:
    """What a converted layer knows beside its parameters. noise.calls is the only part that changes in training."""

    recipe: Recipe
    noise: Noise
    backend: str = AUTO
    enabled: bool = True
    full_recipe: Recipe | None = None  # the one to come back to, while forward_precision keeps the forward in BF16
    keeps_weight: bool = field(default=False, repr=False, compare=False)
    renews_weight: bool = field(default=False, repr=False, compare=False)  # codes stay where they lie: see ``renew``
    weight_codes: tuple[tuple[Any, ...], tuple[QTensor, ...], Done] | None = field(
        default=None, repr=False, compare=False
    )
    shards: Shards | None = field(default=None, repr=False, compare=False)
    shared: SharedAmax | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {
            "keeps_weight": False,
            "renews_weight": False,
            "weight_codes": None,
        }  # a copy or a pickle is outside the scope

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "recipe":  # spelt out, since compiled graphs hold a recipe as its key
            self.key = value.key
            self.saves_weight, self.saves_input = (stored is None for stored in stored_operands(value))

    def call(self) -> Call:
        """The next call of this layer."""
        words = words_of(self.noise.words, self.noise.capturable, self.backend)
        return Call(self.recipe, self.backend, words, self.shards)

    def takes(self, x: Deferred) -> bool:
        """Whether the next call can quantise x without its being written to memory, which nothing else asked for."""
        whole = self.shards is None and not is_traced(x)
        return whole and self.recipe.fprop.quantized and not self.saves_input and not x.in_memory

    def fprop(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        needs: Sequence[bool],
    ) -> list[torch.Tensor]:
        """y [M, N], and the codes that backward will need where ``needs`` asks for dx and dw."""
        quantized, noise = self.recipe.fprop.right.quantized, self.noise
        if noise.capturable and noise.words.device != x.device:
            raise RuntimeError(
                f"x is on {x.device}, but the noise of this layer was put on {noise.words.device} by "
                f"nvfp4.capturable(model): call it again, now that the model has moved"
            )
        shared = self.shared if quantized else None
        among = () if shared is None else shared.contents()
        if is_traced(x):
            _check_whole(self.shards)
            w_amax = None if shared is None else shared.amax(among)
            key, backend = self.key, self.backend
            return layer_ops.fprop(
                x, weight, bias, noise.words, key, backend, dtype, list(needs), w_amax, noise.capturable
            )
        call = self.call()
        kept = self.operands(weight, call, among) if quantized else None
        w_amax = shared.amax(among) if shared is not None and kept is None else None
        y, saved_w, saved_x = fprop(call, x, weight, bias, dtype, needs, w_amax, None if kept is None else kept[0])
        return [y, *flatten(saved_w), *flatten(saved_x)]

    def operands(self, weight: torch.Tensor, call: Call, among: Contents = ()) -> tuple[QTensor, ...] | None:
        """The weight as fprop's operands, quantised once for as long as it stays the same; None: not to be kept.

        Where the backend can fingerprint memory, it is the bytes themselves that are compared: version counters miss
        fused optimizers, writes through ``.data`` and custom kernels. Elsewhere codes are kept inside ``fixed_weights``
        only. Stochastic operands are never kept, nor anything under torch.distributed, where memory may be sharded.
        A CUDA graph takes codes that ``after_step`` renews where they lie; others would be freed or grow old under it,
        and its own hold nothing before a replay. among: ``SharedAmax.contents``, if the weight is scaled by others too.
        """
        if isinstance(weight, GatheredWeight):
            return (weight.codes,)
        if self.recipe.fprop.right.noiseless is None or (dist.is_available() and dist.is_initialized()):
            return None
        key = self._weight_key(weight, among)
        if key is None:
            return None
        kept = self.weight_codes  # read once: another thread may end ``fixed_weights``
        if is_capturing():
            return kept[1] if self.renews_weight and kept is not None and kept[0] == key else None
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # codes made in a rollout serve training as well
                amax = None if self.shared is None else self.shared.amax(among)
                kept = self.weight_codes = (key, self.made(weight, amax, call), Done(weight.device))
        kept[2].before_reading(tensor for q in kept[1] for tensor in q.tensors)
        return kept[1]

    def _weight_key(self, weight: torch.Tensor, among: Contents) -> tuple[Any, ...] | None:
        """What the weight's codes are kept under, or None if there is no telling whether they would change."""
        content = self.content(weight)
        if content is None or any(other is None for other in among):
            return None
        return (*content, weight.dtype, weight.shape, weight.device, self.key, self.backend, among)

    def content(self, weight: torch.Tensor) -> tuple[Any, ...] | None:
        """What changes when the weight does: its bytes or, inside ``fixed_weights``, version and place; None if
        unknown."""
        if is_traced(weight):
            return None
        if self.keeps_weight and not weight.is_inference():
            # a weak reference, since a freed weight's address may be given to the next, as in .bfloat16().float()
            return weight._version, StorageWeakRef(weight.untyped_storage()), weight.storage_offset(), weight.stride()
        found = fingerprint(weight, backend=self.backend)
        return None if found is None else (found,)

    def made(self, weight: torch.Tensor, amax: torch.Tensor | None, call: Call) -> tuple[QTensor, ...]:
        """The operands that fprop needs of a weight: one, or for stacked experts one each."""
        return (call.weight(weight, amax),)

    def renew(self, weight: torch.Tensor) -> None:
        """Quantise the weight now, as the next forward would; codes kept before are overwritten where they lie.

        So what was captured in a CUDA graph reads the new ones, and a backward that still waits for the old ones is
        told so by autograd, as it would be of the weight itself.
        """
        old, self.weight_codes = self.weight_codes, None
        among = () if self.shared is None else self.shared.contents()
        new = self.operands(weight, self.call(), among) if self.recipe.fprop.right.quantized else None
        if new is None or old is None or [q.record for q in old[1]] != [q.record for q in new]:
            return
        with torch.inference_mode(False), torch.no_grad():
            for kept, made in zip(old[1], new, strict=True):
                for target, source in zip(kept.tensors, made.tensors, strict=True):
                    target.copy_(source)
        assert self.weight_codes is not None
        self.weight_codes = (self.weight_codes[0], old[1], Done(weight.device))


def _check_whole(shards: Shards | None) -> None:
    """RuntimeError for a part of a layer where operators are watched: they know of no other processes."""
    if shards is not None:
        raise RuntimeError(
            "torch.compile, and other tracing, cannot see that a layer of parallelize_module is one part of a whole: "
            "run such layers eagerly, for example with torch.compiler.disable"
        )


def refuse_second_derivative() -> None:
    """RuntimeError in a backward that is to be differentiated."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # only create_graph=True leaves it on in there
        raise RuntimeError(
            "nvfp4 layers have no second derivative: differentiate without create_graph=True, or compute this "
            "forward under nvfp4.disabled(model)"
        )


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
        needs = ctx.needs_input_grad[:3]
        y, *codes = state.fprop(x, weight, bias, dtype, needs)
        ctx.words = state.noise.words  # not a saved tensor: other backward passes may advance it before this one
        ctx.capturable = state.noise.capturable
        ctx.key, ctx.backend, ctx.shards, ctx.needs = state.key, state.backend, state.shards, needs
        ctx.features = x.shape[1]
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        if needs[0] and state.saves_weight:
            codes.append(weight)
        if needs[1] and state.saves_input:
            codes.append(x)
        ctx.save_for_backward(*codes)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        saved, needs = list(ctx.saved_tensors), list(ctx.needs)
        if is_traced(dy):
            _check_whole(ctx.shards)
            what = (ctx.key, ctx.backend, needs, ctx.features)
            made = layer_ops.backward(dy, saved, ctx.words, *what, *ctx.dtypes, ctx.capturable)
        else:
            words = words_of(ctx.words, ctx.capturable, ctx.backend)
            call = Call(Recipe.from_key(ctx.key), ctx.backend, words, ctx.shards)
            made = layer_ops.eager_backward(call, dy, saved, needs, ctx.features, ctx.dtypes)
        gradients = iter(made)
        dx, dw, db = [next(gradients) if need else None for need in needs]
        ctx.words[CALLS].add_(1)
        return dx, dw, db, None, None


class Linear(nn.Linear):
    """An ``nn.Linear`` whose GEMMs run in NVFP4; made by ``nvfp4.convert``, which turns a layer into one in place.

    Parameters, keys of ``state_dict``, hooks and dtypes are those of ``nn.Linear``. x: [..., in_features] in float32,
    bfloat16 or float16, any rank from 1, any number of tokens; y: [..., out_features] in the dtype ``F.linear`` would
    give (under autocast, the autocast dtype). NaN or Inf in x or the weight make the output NaN. With DTensors, as
    ``parallelize_module`` makes them, y is a DTensor: see ``tensor_parallel.py``.
    """

    nvfp4: LinearState

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError(
            "nvfp4.Linear has no constructor, since seed and index of its noise belong to a model: make an nn.Linear "
            "and convert it, or the model that holds it, with nvfp4.convert"
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + bias of x = ``input``, the name it has in ``nn.Linear``.

        Raises ValueError if x has another last dimension, TypeError if the dtypes do not fit.
        """
        x, state = input, self.nvfp4
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace cannot record an nvfp4 layer: use torch.export or torch.compile")
        if not (state.enabled and state.recipe.quantized):
            return affine(x, self.weight, self.bias)
        if is_dtensor(self.weight) or is_dtensor(x):
            return self._sharded(x)
        return self._compute(x, self.weight, self.bias, state)

    def _sharded(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of y, as a DTensor, of DTensors x and weight."""
        from nvfp4.layer.tensor_parallel import layout

        where = layout(x, self.weight)
        self.nvfp4.noise.rank = where.noise_rank
        state = replace(self.nvfp4, shards=where.shards)
        return where.whole(self._compute(*where.local(x, self.weight, self.bias), state), self.out_features)

    def _compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: LinearState
    ) -> torch.Tensor:
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x must be [..., in_features={weight.shape[1]}], got {tuple(x.shape)}")
        dtype = output_dtype(x, weight)
        rows = x.reshape(-1, weight.shape[1])
        if isinstance(rows, Deferred) and not state.takes(rows):
            rows = rows.written()
        if torch.is_grad_enabled():
            y = _LinearFunction.apply(rows, weight, bias, state, dtype)
        else:
            y = state.fprop(rows, weight, bias, dtype, (False, False, False))[0]
        return y.view(*x.shape[:-1], weight.shape[0])

    def extra_repr(self) -> str:
        """Sizes, bias, recipe and backend."""
        state = self.nvfp4
        shared = "" if state.shared is None else f", amax shared by {len(state.shared.layers)}"
        off = "" if state.enabled else ", disabled"
        return f"{super().extra_repr()}, recipe={state.recipe.name}, backend={state.backend}{shared}{off}"


def output_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` gives, also under autocast; TypeError if theirs do not fit."""
    if x.dtype not in INPUT_DTYPES or weight.dtype not in INPUT_DTYPES:
        raise TypeError(f"x and weight must be float32, bfloat16 or float16, got {x.dtype} and {weight.dtype}")
    cast = autocast_dtype(x.device)
    if cast is not None:
        return cast
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast")
    return x.dtype
