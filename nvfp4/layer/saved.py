"""What passes from the forward of a layer to its backward, and how it travels.

The forward has x [M, K] and w [N, K]; the backward multiplies dy [M, N] by w for dx and by x for
dw. What it starts from is the recipe's choice (``source`` of the right operand of dgrad and wgrad):

    source     dgrad, dx = dy w         wgrad, dw = dy^T x
    codes      fprop's codes of w       fprop's codes of x
    decoded    fprop's codes of w       fprop's codes of x
    tensor     w itself, a parameter    x^T [K, M], which the forward quantises for it;
                                        x itself if wgrad is dense

So FP4 codes are all that is kept, 4.5 bits per element where BF16 takes 16, unless the recipe
leaves wgrad in high precision.

Autograd, activation checkpointing and operators of ``torch.library`` hold nothing but tensors.
``pack`` turns ``Saved`` into a list of them, ``unpack`` is the inverse, and ``empty`` makes the
list without values for a compiler that asks for shapes. The order is: codes of w, codes of x, then
w and x themselves (``inputs_to_save``), last and apart because an operator may not return its own
inputs. One set of codes is

    codes          uint8 [rows, Kp / 2]
    block_scale    uint8 [rows, Kp / 16], or one per 16x16 tile
    global_scale   float32 [1], or [rows]
    sign seed      int64 [], if the forward drew the signs of a rotation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed, signed
from nvfp4.recipes import Operand, Recipe

Matrix = torch.Tensor | QTensor


class Needs(NamedTuple):
    """Which gradients a backward will compute: of x, of the weight and of the bias."""

    dx: bool
    dw: bool
    db: bool = False


class Dtypes(NamedTuple):
    """The dtypes of these gradients: the dtypes of x, weight and bias."""

    dx: torch.dtype
    dw: torch.dtype
    db: torch.dtype | None = None


NO_GRADIENTS = Needs(dx=False, dw=False)


class Saved(NamedTuple):
    """What the backward multiplies dy by. Either is None where that gradient is not needed.

    for_dx: w [N, K] or its codes. for_dw: x [M, K] or its codes, or the codes of x^T [K, M]
    (``SavedSpecs``).
    """

    for_dx: Matrix | None
    for_dw: Matrix | None


class SavedSpecs(NamedTuple):
    """Which operand of the recipe made the codes that are saved; None: the tensor itself is saved.

    x_is_transposed: for_dw is wgrad's own operand x^T [K, M], quantised in the forward.
    """

    for_dx: Operand | None
    for_dw: Operand | None
    x_is_transposed: bool

    def shapes(self, m: int, k: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the two matrices for x [m, k] and w [n, k]."""
        return (n, k), (k, m) if self.x_is_transposed else (m, k)


def saved_specs(recipe: Recipe) -> SavedSpecs:
    """What a forward under ``recipe`` keeps for its backward."""
    return _saved_specs(recipe.key)  # a string is hashed once, a recipe every time


@lru_cache(maxsize=256)
def _saved_specs(key: str) -> SavedSpecs:
    """The table at the head of the file, for the recipe with this key."""
    recipe = Recipe.from_key(key)
    w, x = recipe.dgrad.right, recipe.wgrad.right
    for_dx = None if w.source == "tensor" else recipe.fprop.right
    if x.source != "tensor":
        return SavedSpecs(for_dx, recipe.fprop.left, False)
    return SavedSpecs(for_dx, x if x.quantized else None, x.quantized)


def pack(saved: Saved) -> list[torch.Tensor]:
    """The tensors of the codes in ``saved``; of a matrix saved as it is, none."""
    return [
        tensor for matrix in saved if isinstance(matrix, QTensor) for tensor in _pack_codes(matrix)
    ]


def inputs_to_save(
    specs: SavedSpecs, needs: Needs, weight: torch.Tensor, x: torch.Tensor
) -> list[torch.Tensor]:
    """Those of (weight, x) that the backward needs as they are."""
    # the order in which ``gemms.backward`` takes them
    inputs = []
    if needs.dx and specs.for_dx is None:
        inputs.append(weight)
    if needs.dw and specs.for_dw is None:
        inputs.append(x)
    return inputs


def unpack(
    tensors: Iterator[torch.Tensor],
    recipe: Recipe,
    needs: Needs,
    sizes: tuple[int, int, int],
    on_device: bool,
) -> Saved:
    """``Saved`` again, from ``pack``'s tensors in order; None for a matrix that is saved as it is.

    sizes: (M, K, N). on_device: whether the seeds of signs lie on a device, or are read here.
    """
    # in the order of ``pack``: w, then x
    specs = saved_specs(recipe)
    w_shape, x_shape = specs.shapes(*sizes)
    for_dx = for_dw = None
    if needs.dx and specs.for_dx is not None:
        for_dx = _unpack_codes(tensors, specs.for_dx, w_shape, on_device)
    if needs.dw and specs.for_dw is not None:
        for_dw = _unpack_codes(tensors, specs.for_dw, x_shape, on_device)
    return Saved(for_dx, for_dw)


def empty(
    recipe: Recipe,
    needs: Needs,
    sizes: tuple[int, int, int],
    device: torch.device,
    capturable: bool,
) -> list[torch.Tensor]:
    """Uninitialised tensors, shaped like the result of ``pack``, for shape inference.

    sizes: (M, K, N). capturable: the layer's noise lies on its device, and so do the seeds of
    signs.
    """
    specs = saved_specs(recipe)
    tensors: list[torch.Tensor] = []
    for need, spec, shape in zip(needs, specs[:2], specs.shapes(*sizes), strict=False):
        if not need or spec is None:
            continue

        options = spec.static_options
        tensors += QTensor.empty(
            shape, options.block, options.row_scaled, options.rotation, device
        ).tensors

        # the seed of the signs, which travels with the codes
        if _draws_signs(spec):
            tensors.append(
                torch.empty((), dtype=torch.int64, device=device if capturable else "cpu")
            )
    return tensors


def _draws_signs(spec: Operand) -> bool:
    """Whether the operand is rotated by signs that each call draws."""
    rotation = spec.static_options.rotation
    return rotation is not None and not rotation.fixed


def _pack_codes(q: QTensor) -> tuple[torch.Tensor, ...]:
    """Codes and scales, and the seed of the signs that rotated them, if it was drawn.

    The seed travels along, since under activation checkpointing codes and seed must both be the
    recomputation's: a layer that is used twice may have finished a backward, and so moved to other
    seeds, since its first forward.
    """
    if q.rotation is None or q.rotation.sign_seed is None:
        return q.tensors
    seed = q.rotation.sign_seed

    # int64 of the same bits, where the seed lies
    if isinstance(seed, DeviceSeed):
        return *q.tensors, seed.bits.clone()  # two results of an operator may not share memory
    return *q.tensors, torch.tensor(signed(seed), device="cpu")


def _unpack_codes(
    tensors: Iterator[torch.Tensor], spec: Operand, shape: tuple[int, int], on_device: bool
) -> QTensor:
    """The matrix of ``shape`` that ``spec`` quantised."""
    options = spec.static_options
    codes, block_scale, global_scale = next(tensors), next(tensors), next(tensors)
    rotation = options.rotation

    # the signs of the call that made the codes, whichever it was
    if rotation is not None and not rotation.fixed:
        bits = next(tensors)
        sign_seed = DeviceSeed(bits) if on_device else int(bits) % 2**64
        rotation = replace(rotation, sign_seed=sign_seed)
    return QTensor(codes, block_scale, global_scale, options.block, shape, -1, rotation)
