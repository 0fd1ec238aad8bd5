"""What a converted layer knows beside its parameters, and what linear layers and experts share.

``LinearState`` is the attribute ``nvfp4`` of a layer: its recipe, its noise, and the cache of its
weight's codes. Each call starts from it: ``call`` fixes recipe, backend and noise of that call,
``kept_codes`` gives the weight's codes if an earlier call has made them. It travels with copies and
pickles of the layer and is no part of the ``state_dict``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nvfp4.backends.registry import AUTO
from nvfp4.layer.call import LayerCall, noise_for_call
from nvfp4.layer.delayed_amax import DelayedAmax
from nvfp4.layer.lazy_activation import LazyActivation
from nvfp4.layer.noise import Noise
from nvfp4.layer.saved import saved_specs
from nvfp4.layer.sharding import GatheredWeight, Shards
from nvfp4.layer.weight_cache import Codes, WeightCache
from nvfp4.numerics.torch_state import autocast_dtype, is_traced
from nvfp4.ops import INPUT_DTYPES
from nvfp4.recipes import Recipe


@dataclass
class LinearState:
    """What a converted layer knows beside its parameters.

    recipe, backend: what runs, and where. noise: its seed, index and call counter; the counter
    alone changes in training. enabled: False makes it an ``nn.Linear``. full_recipe: the recipe to
    come back to while ``forward_precision`` keeps the forward in BF16. shards: set for one call if
    operands are one process's part of a whole. cache: the codes of its weight. amax: what its
    operands are scaled by, where the recipe takes that from the call before.
    """

    recipe: Recipe
    noise: Noise
    backend: str = AUTO
    enabled: bool = True
    full_recipe: Recipe | None = None
    shards: Shards | None = field(default=None, repr=False, compare=False)
    cache: WeightCache = field(default_factory=WeightCache, repr=False, compare=False)
    amax: DelayedAmax | None = field(default=None, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

        # worked out once per recipe, since every call asks
        if name == "recipe":
            self.key = value.key
            self.specs = saved_specs(value)

    def call(self, amax: DelayedAmax | None = None) -> LayerCall:
        """The next call of this layer. amax: ``delayed_amax`` where its operands lie."""
        noise = noise_for_call(self.noise.state, self.noise.capturable, self.backend)
        return LayerCall(self.recipe, self.backend, noise, self.shards, amax)

    def delayed_amax(self, device: torch.device) -> DelayedAmax | None:
        """What operands on ``device`` are scaled by; None where each looks for its own amax.

        Begins, or moves there, what is not there yet.
        """
        if not self.recipe.delays_amax:
            return None
        amax = self.amax
        if amax is None or amax.table.device != device:
            amax = self.amax = DelayedAmax.new(device) if amax is None else amax.on(device)
        return amax

    def can_quantize_lazily(self, x: LazyActivation) -> bool:
        """Whether the next call can quantise x from its formula.

        False where x's values exist already, because something else asked for them, and where an
        operand has a delayed amax, for which there is no such kernel.
        """
        if self.shards is not None or x.is_written or is_traced(x):
            return False
        if self.recipe.fprop.left.delayed_amax or self.recipe.wgrad.right.delayed_amax:
            return False
        return self.recipe.fprop.quantized and self.specs.for_dw is not None

    def weight_amax(self) -> torch.Tensor | None:
        """What the weight's codes are scaled by, float32 [1].

        None for its own magnitude, or if fprop takes the weight as it is.
        """
        return self.cache.amax() if self.recipe.fprop.right.quantized else None

    def kept_codes(self, weight: torch.Tensor, call: LayerCall) -> Codes | None:
        """The weight as fprop's operands, quantised once for as long as it stays the same.

        None if they are not to be kept: see ``weight_cache``, which also keeps no stochastic
        operand.
        """
        spec = self.recipe.fprop.right

        # FSDP gathered codes instead of values
        if isinstance(weight, GatheredWeight) and spec.quantized:
            return (weight.codes,)

        # a stochastic operand is another one at every call; None, too, for fprop in high precision
        if spec.options_without_noise is None:
            return None
        return self.cache.get(weight, self.key, self.backend, self.quantized, call)

    def renew_codes(self, weight: torch.Tensor) -> None:
        """Quantise the weight now, as the next forward would, into the memory of its codes."""
        old, self.cache.entry = self.cache.entry, None
        self.kept_codes(weight, self.call())
        self.cache.overwrite(old)

    def quantized(self, weight: torch.Tensor, call: LayerCall, amax: torch.Tensor | None) -> Codes:
        """The operands that fprop needs of a weight: one, or for stacked experts one each."""
        return (call.weight(weight, amax),)


def refuse_second_derivative() -> None:
    """RuntimeError in a backward that is to be differentiated."""
    # only create_graph=True leaves it on in there
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(
            "nvfp4 layers have no second derivative: differentiate without create_graph=True, or "
            "compute this forward under nvfp4.disabled(model)"
        )


def output_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` gives, also under autocast; TypeError if theirs do not fit."""
    if x.dtype not in INPUT_DTYPES or weight.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"x and weight must be float32, bfloat16 or float16, got {x.dtype} and {weight.dtype}"
        )

    # under autocast both are rounded to its dtype, elsewhere they must agree
    cast = autocast_dtype(x.device)
    if cast is not None:
        return cast
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast"
        )
    return x.dtype
