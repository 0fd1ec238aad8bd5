"""One call of a layer: which quantiser each operand meets, with which seeds, as part of what.

    LayerCall.quantizer(gemm, side)     the recipe's quantiser, with the seeds of this call
    LayerCall.operand(x, gemm, side)    x [rows, contraction] -> QTensor
    LayerCall.weight(w)                 fprop's operand of w [N, K]
    dense_fprop, dense_product          the GEMMs that the recipe does not quantise

Noise comes from the state of the layer, read on the host (``HostNoise``) or left on its device
(``DeviceNoise``). Where this process holds a part of an operand (``Shards``), and codes depend on
the whole, the processes agree on its largest magnitude first.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nvfp4.backends.registry import AUTO, select
from nvfp4.layer.delayed_amax import DelayedAmax
from nvfp4.layer.dense import affine, times
from nvfp4.layer.noise import RIGHT, GemmSeeds, HostNoise, process
from nvfp4.layer.saved import Matrix
from nvfp4.layer.sharding import Shards, amax_of_parts
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed
from nvfp4.numerics.scaling import magnitude
from nvfp4.numerics.torch_state import without_dispatch_modes
from nvfp4.ops import dequantize, draw_seeds, quantize_with, requantize_with
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.recipes import GEMMS, Recipe


class DeviceNoise:
    """``Noise.state`` on its device; the seeds of one call are made there when first asked for.

    state: int64 [4], or [E, 4] of E layers, whose seeds are then int64 [E]. backend: of the layer.
    """

    def __init__(self, state: torch.Tensor, backend: str) -> None:
        self._state = state
        self._backend = backend
        self._table: torch.Tensor | None = None
        self._seeds: dict[str, GemmSeeds] = {}

    def seeds(self, gemm: str) -> GemmSeeds:
        """The seeds of one GEMM, the same objects each time: both operands must see equal signs."""
        if gemm not in self._seeds:
            # one launch makes the seeds of all three GEMMs, [3, 3] or [3, 3, E]
            if self._table is None:
                table = draw_seeds(self._state, process(), len(GEMMS), backend=self._backend)
                many = table.dim() == 3  # of E layers: side by side for each GEMM and use
                self._table = table.permute(1, 2, 0).contiguous() if many else table
            sign_seed, left, right = map(DeviceSeed, self._table[GEMMS.index(gemm)].unbind())
            self._seeds[gemm] = sign_seed, (left, right)
        return self._seeds[gemm]


CallNoise = HostNoise | DeviceNoise


def noise_for_call(state: torch.Tensor, capturable: bool, backend: str) -> CallNoise:
    """``Noise.state`` for one call: read, unless it is on a device for good."""
    return DeviceNoise(state, backend) if capturable else HostNoise(state.tolist())


class LayerCall(NamedTuple):
    """One call of a layer: recipe, backend, noise; shards: which operands are a part of a whole.

    amax: of the call before, where the recipe scales by that. records: whether this call has a
    backward, so that what it sees is held for the next.
    """

    recipe: Recipe
    backend: str
    noise: CallNoise
    shards: Shards | None = None
    amax: DelayedAmax | None = None
    records: bool = False

    @classmethod
    def of(
        cls,
        key: str,
        backend: str,
        state: torch.Tensor,
        capturable: bool,
        shards: Shards | None = None,
        amax: DelayedAmax | None = None,
    ) -> LayerCall:
        """The call under the recipe with this ``Recipe.key``, with the noise of ``Noise.state``."""
        noise = noise_for_call(state, capturable, backend)
        return cls(Recipe.from_key(key), backend, noise, shards, amax)

    def recording(self) -> LayerCall:
        """This call, as one that has a backward."""
        return self if self.amax is None or self.records else self._replace(records=True)

    def quantizer(
        self, gemm: str, side: int, x: Matrix | None = None, partner: Rotation | None = None
    ) -> tuple[Quantizer, Options]:
        """The quantiser of operand x, with the seeds of this call in its options.

        x: as in ``operand``; None for one that is not written, which has no delayed amax. partner:
        the rotation of the other operand if an earlier call made that one; its signs are used
        again.
        """
        pair = getattr(self.recipe, gemm)
        spec = pair.right if side == RIGHT else pair.left

        # nearest rounding without a rotation reads no seed
        options = spec.options_without_noise
        if options is None:
            sign_seed, seeds = self.noise.seeds(gemm)
            if partner is not None and partner.sign_seed is not None:
                sign_seed = partner.sign_seed
            options = spec.options_for(seeds[side], sign_seed)

        if spec.delayed_amax and self.amax is not None and x is not None:
            own = partial(self._own_amax, x, gemm, side, options)
            options = options.holding(self.amax.of(gemm, side, own, self.records))
        return spec.rule, options

    def operand(self, x: Matrix, gemm: str, side: int, partner: Rotation | None = None) -> QTensor:
        """Matrix x [rows, contraction] (any strides) as the recipe's operand of a GEMM.

        A QTensor stands for the transpose of what it decodes to: x-hat^T or w-hat^T, which is
        quantised again. partner: as in ``quantizer``.
        """
        quantizer, options = self.quantizer(gemm, side, x, partner)

        # one part of a matrix that is spread over processes asks the others for its scale, unless
        # that was held
        shards = self.shards if options.held is None else None
        if shards is not None and shards.needs_amax(gemm, side, options):
            return self._part(x, shards, quantizer, options)

        if isinstance(x, QTensor):
            return requantize_with(x, quantizer, options, backend=self.backend)
        return quantize_with(x, quantizer, options, backend=self.backend)

    def weight(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> QTensor:
        """fprop's operand of the weight [N, K].

        amax: float32 [1], what to scale by if it is not the weight's own magnitude.
        """
        if amax is None:
            return self.operand(weight, "fprop", RIGHT)
        return quantize_with_amax(
            weight, *self.quantizer("fprop", RIGHT, weight), amax, backend=self.backend
        )

    def end(self) -> None:
        """At the end of the backward: what this call has seen scales the next."""
        if self.amax is None:
            return
        if self.shards is not None:
            self.amax.agree(self.recipe, self.shards)
        table = self.amax.table
        with without_dispatch_modes():
            select(self.backend, "quantize_held", table.device).turn_amax(table)

    def _own_amax(self, x: Matrix, gemm: str, side: int, options: Options) -> torch.Tensor:
        """The amax of operand x after its rotation, float32 [1]; 0 if that is not finite.

        Of a part of a matrix, where that needs one, the amax of the whole.
        """
        values = self._values(x)
        if options.rotation is not None:
            padding = (0, -values.shape[1] % options.rotation.group)
            padded = F.pad(values.to(torch.float32), padding).contiguous()
            values = options.rotation.apply(padded) if padded.numel() else padded

        if self.shards is not None and self.shards.needs_amax(gemm, side, options):
            amax = amax_of_parts(values, self.shards.mesh.get_group())
        else:
            amax = magnitude(values)
        return torch.where(amax.isfinite(), amax, 0.0)

    def _values(self, x: Matrix) -> torch.Tensor:
        """x itself, or the transpose of what it decodes to."""
        return dequantize(x, backend=self.backend).t() if isinstance(x, QTensor) else x.detach()

    def _part(self, x: Matrix, shards: Shards, quantizer: Quantizer, options: Options) -> QTensor:
        """This process's part x of an operand, with the codes of the whole; a collective call."""
        part = self._values(x)
        amax = amax_of_parts(part, shards.mesh.get_group(), options.row_scaled)
        return quantize_with_amax(part, quantizer, options, amax, backend=self.backend)


def dense_fprop(
    call: LayerCall, x: torch.Tensor, w: Matrix, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x w^T + bias in ``dtype``, not quantised; w: itself, or its codes, which are decoded."""
    w = dequantize(w, dtype, backend=call.backend) if isinstance(w, QTensor) else w.to(dtype)
    return affine(x.to(dtype), w, None if bias is None else bias.to(dtype))


def dense_product(dy: torch.Tensor, saved: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """dy @ saved in dy's dtype, rounded to ``dtype``: a GEMM of the backward, not quantised.

    Where ``saved`` is fprop's codes, dy and what the codes stand for are both rounded to BF16
    first.
    """
    if isinstance(saved, QTensor):
        return times(dy.to(torch.bfloat16), dequantize(saved, torch.bfloat16)).to(dtype)
    return times(dy, saved.to(dy.dtype)).to(dtype)


def quantize_with_amax(
    x: torch.Tensor,
    quantizer: Quantizer,
    options: Options,
    amax: torch.Tensor,
    *,
    backend: str = AUTO,
) -> QTensor:
    """Matrix x [M, K] with the codes it has inside a larger matrix of magnitude ``amax``.

    amax: [1], or [M] when row-scaled, in float32; not finite if the whole is not. ValueError for a
    rotated operand, whose scale comes from the rotated values, and for a stochastic quantiser,
    whose noise comes from the place in x.
    """
    if options.rotation is not None or not quantizer.claims(options).deterministic:
        raise ValueError(
            f"codes of {quantizer.name} under {options} are not a function of x and amax"
        )
    if x.numel() == 0:
        return quantize_with(x, quantizer, options, backend=backend)
    return quantize_with(x, quantizer, options, backend=backend, amax=amax)
