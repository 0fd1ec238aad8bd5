"""What kernels are told of tensors: where an operand is read from, and what a result is written to.

    Source    x [M, K] of any strides, or codes whose transpose is wanted:
              the first arguments of every kernel that reads
    Target    from quantiser, options and shape: an empty QTensor to fill, the seeds, and scratch

A Target lives through two launches: one finds the amax (as bits, in ``peak``), one makes codes and
scales. Rules that scale by what came out (``ms_eden``) need no amax, and ``finish`` makes their
block scales last. Peaks have to begin as zeros, and are cleared many at a time (``zero_peak``).

Nothing here waits for the device, so all of it goes into a CUDA graph. All of it runs at every
quantisation of every layer, so what does not change is remembered: the policy of a quantiser under
its options, and what the card can do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nvfp4.backends.triton.launch import current_stream, launch
from nvfp4.backends.triton.quantize import kernels
from nvfp4.backends.triton.quantize.policy import RULES, Coded, Policy, Tile
from nvfp4.backends.triton.quantize.rules import scaled_by_amax
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.hadamard import Rotation, round_scale
from nvfp4.numerics.layout import reads_swizzled, swizzled_bytes
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed, Seed
from nvfp4.numerics.scaling import element_scale
from nvfp4.quantizers.base import Options, Quantizer

SCALES = Tile(16, 64, False, 4, 2, 4)
"""Of kernels on block scales: a thread takes eight, the draws of a counter."""

DRAWS = 8
"""Of a counter of Philox."""

PEAK_UNIT = 4
"""Peaks in 16 bytes: what Triton asks of an aligned pointer, without which it compiles anew."""

DEFAULT_STREAM = 0
"""The handle of a device's default stream, on which nothing can be captured."""

CLEARED = 64
"""Peaks that are cleared at a time.

To clear one per operand was five of the nineteen launches of a quartet2 layer's forward and
backward.
"""

SeedArguments = tuple[int, int] | tuple[torch.Tensor, None]
"""The halves of a seed, or where on the device it lies."""

# called on the host, a function of the kernels takes 10 us; remembered, nearly nothing
_scaled_by_amax = lru_cache(maxsize=None)(scaled_by_amax)
_POLICIES: dict[tuple[Any, ...], Policy] = {}


class Source(NamedTuple):
    """The operand [rows, columns] in memory, dense or as codes: arguments of ``load_tile``."""

    x: torch.Tensor
    scale: torch.Tensor | None
    global_scale: torch.Tensor | None
    rows: int
    columns: int
    stride_row: int
    stride_column: int

    @classmethod
    def dense(cls, x: torch.Tensor) -> Source:
        """Matrix x [M, K], float32, float16 or bfloat16, any strides."""
        return cls(x, None, None, *x.shape, *x.stride())

    def along_memory(self) -> Source:
        """The same elements with rows that are contiguous, if rows or columns are."""
        if self.stride_row != 1 or self.stride_column == 1:
            return self
        shape, strides = (self.columns, self.rows), (self.stride_column, self.stride_row)
        return Source(self.x, self.scale, self.global_scale, *shape, *strides)

    @classmethod
    def transposed_codes(cls, q: QTensor) -> Source:
        """What matrix q [M, K] stands for, read as its transpose [K, M]."""
        codes, block_scale, global_scale = (t.contiguous() for t in q.tensors)
        return cls(codes, block_scale, global_scale, q.contraction, q.rows, 1, codes.shape[1])


def coded_as(q: QTensor) -> Coded:
    """How q is scaled, for a kernel that reads its codes."""
    return Coded(q.block[0], q.row_scaled)


class Target:
    """The result [M, K] that kernels fill, and what they need beside it.

    peak: int32 zeros, one or row-scaled [M], if there are some already. amax: float32 of that
    shape, if it is known; one that ``options`` hold is. single: whether this orientation is made
    alone.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        quantizer: Quantizer,
        options: Options,
        device: torch.device,
        peak: torch.Tensor | None = None,
        amax: torch.Tensor | None = None,
        single: bool = True,
    ) -> None:
        # what the kernel is compiled for
        self.policy = policy_of(quantizer, options, card_converts(device))
        self.scaled_by_amax = _scaled_by_amax(self.policy.rule)

        # what it fills; codes are stored eight at a time, as int32 [M, Kp/8]
        self.q = QTensor.empty(shape, options.block, options.row_scaled, options.rotation, device)
        self.codes = self.q.codes.view(torch.int32)
        self.padded = self.q.codes.shape[1] * 2

        # the largest magnitude, as bits: integers order like magnitudes, so that programs agree by
        # an atomic maximum; a known amax is read as it is, without a copy
        held = options.held
        if peak is None and amax is None:
            # a result shares its memory with no other: an operator of torch may not return both
            own = options.row_scaled or held is not None
            count = shape[0] if options.row_scaled else 1
            peak = _zeros(count, device) if own else zero_peak(device)

        # a held one leaves these zeros to the global scale, which programs raise: the first to its
        # value, any that meets a NaN to NaN
        self.seen: torch.Tensor | None = None
        if held is not None and self.scaled_by_amax:
            assert peak is not None
            self.q = replace(self.q, global_scale=peak[:1].view(torch.float32))
            self.seen = None if held.seen is None else held.seen.view(torch.int32)
            amax = held.amax

        self.amax_known = amax is not None
        if amax is not None:
            peak = amax.contiguous().view(torch.int32)
        assert peak is not None
        self.peak = peak

        # rules that know a block's scale only when all blocks are done keep its length meanwhile
        self.scale = self.q.block_scale
        if not self.scaled_by_amax:
            self.scale = torch.empty(self.scale.shape, dtype=torch.float32, device=device)

        # kernels of both orientations write no swizzled scales; ``finish`` does. Zeros, as the
        # layout is filled up to 128 rows and 4 blocks
        if reads_swizzled(device) and (single or not self.scaled_by_amax):
            size = swizzled_bytes(self.q.rows, self.padded // NVFP4.block_size)
            swizzled = torch.zeros(size, dtype=torch.uint8, device=device)
            self.q = replace(self.q, swizzled_scale=swizzled)

        self.seed = seed_arguments(options.seed)
        rotation = options.rotation
        self.signs = seed_arguments(None if rotation is None else rotation.sign_seed)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """peak, codes, block scale, global scale, as the kernels take them."""
        return self.peak, self.codes, self.scale, self.q.global_scale

    def finish(self) -> QTensor:
        """The result; for rules that scale by what came out, their scales are made now."""
        if not self.scaled_by_amax:
            shape = self.scale.shape
            results = (self.q.block_scale, self.q.global_scale, self.q.swizzled_scale)
            arguments = (self.scale, self.peak, self.codes, *results, *shape, *self.seed)
            count = programs(shape, SCALES)
            constants = (shape[1] % DRAWS == 0, SCALES)
            launch(kernels.finish_kernel, count, arguments, constants, warps=SCALES.warps)
        return self.q


def two_targets(
    x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
) -> tuple[Target, Target]:
    """What x and x^T are quantised into.

    Peaks of rows are one allocation for both, cleared at once; each begins at 16 bytes.
    """
    shapes = (tuple(x.shape), (x.shape[1], x.shape[0]))
    if not (rows[1].row_scaled or columns[1].row_scaled):
        return (
            Target(shapes[0], *rows, x.device, single=False),
            Target(shapes[1], *columns, x.device, single=False),
        )

    # how many peaks each has
    across, down = (
        shape[0] if how[1].row_scaled else 1
        for shape, how in zip(shapes, (rows, columns), strict=True)
    )

    # the second begins at 16 bytes, whatever the number of the first
    start = -(-across // PEAK_UNIT) * PEAK_UNIT
    peaks = _zeros(start + down, x.device)
    return (
        Target(shapes[0], *rows, x.device, peak=peaks[:across], single=False),
        Target(shapes[1], *columns, x.device, peak=peaks[start:], single=False),
    )


def zero_peak(device: torch.device) -> torch.Tensor:
    """An int32 zero on ``device`` for one Target, in order with the current stream.

    Taken from a few that were cleared together, each used once, while the default stream is the
    current one. Any other may be captured into a CUDA graph, which has to clear its own at every
    replay, or warmed up by torch.compile, whose graphs refuse memory that outlives a call.
    """
    if device.type == "cuda" and current_stream(device) != DEFAULT_STREAM:
        return _zeros(1, device)
    cleared = _CLEARED.setdefault(device, [])
    try:
        return cleared.pop()
    except IndexError:
        first, *rest = _zeros(CLEARED * PEAK_UNIT, device).split(PEAK_UNIT)
        cleared += rest
        return first


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    """int32 zeros."""
    return torch.zeros(count, dtype=torch.int32, device=device)


_CLEARED: dict[torch.device, list[torch.Tensor]] = {}
"""By device, what ``zero_peak`` hands out next."""


def programs(shape: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """How many programs a matrix takes, one per tile of [tile[0], tile[1]], or per its turns.

    All lie on the first axis of the grid, which alone takes 2^31 of them.
    """
    turns = tile.turns if isinstance(tile, Tile) else 1
    return -(-shape[0] // (tile[0] * turns)) * -(-shape[1] // tile[1])


def seed_arguments(seed: Seed | None) -> SeedArguments:
    """A seed as two arguments of a kernel: its halves, or where on the device it lies."""
    if seed is None:
        return 0, 0
    return (seed.bits, None) if isinstance(seed, DeviceSeed) else halves(seed)


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed, each as a signed number: int32 whatever the seed."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return (low ^ 1 << 31) - (1 << 31), (high ^ 1 << 31) - (1 << 31)


def converts(capability: int) -> bool:
    """Whether a card of this compute capability (90, 120, ...) rounds float32 to E2M1 by itself."""
    return capability in (100, 103, 120, 121)


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> int:
    """Compute capability of the card at hand (90, 120, ...); 0 of a processor."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def card_converts(device: torch.device) -> bool:
    """``converts`` of the card at hand; no processor does."""
    return converts(capability_of(device))


def policy_of(quantizer: Quantizer, options: Options, by_card: bool) -> Policy:
    """What a kernel is compiled for under these options; by_card: ``converts`` of the card.

    Remembered by all that it depends on, which no seed is part of.
    """
    rotation = options.rotation
    rotated = None if rotation is None else (rotation.group, rotation.rounds, rotation.fixed)
    what = (quantizer.name, options.block, options.row_scaled, options.metric, options.search)
    held = options.held is not None
    key = (*what, options.candidates, options.factors, rotated, by_card, held)
    policy = _POLICIES.get(key)
    if policy is None:
        policy = _POLICIES[key] = _make_policy(quantizer, options, by_card)
    return policy


def _make_policy(quantizer: Quantizer, options: Options, by_card: bool) -> Policy:
    """``policy_of``, worked out."""
    # without a rotation: no rounds, and one group for all, so that equal kernels are equal
    rotation = options.rotation or Rotation(16, fixed=True)
    rounds = rotation.rounds if options.rotation is not None else 0
    scales = tuple(round_scale(i, rounds, rotation.group) for i in range(rounds))

    # nothing to try for other rules, again so that equal kernels are equal
    factors = () if not quantizer.rotates else options.factors if options.search else (1.0,)
    return Policy(
        RULES[quantizer.name],
        options.block[0],
        options.row_scaled,
        options.metric,
        options.search,
        rotation.group,
        scales,
        rounds > 0 and rotation.fixed,
        by_card,
        options.candidates if quantizer.name == "scale_search" else (),
        tuple(element_scale(factor) for factor in factors),
        options.held is not None,
    )
