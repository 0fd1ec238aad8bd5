"""Counter-based random bits: a pure function of (seed, stream, index), equal on every backend.

    philox(seed, i, stream)      -> four 32-bit words, which are eight 16-bit draws
    draw n of a stream            = word (n mod 8) div 2, half n mod 2, of counter i = n div 8
    uniform                       = (k + 1/2) / 2^16 of a draw k, in (0, 1), of mean exactly 1/2
    fold_in(seed, d, ...)         = a new seed: words 0 and 1 at counter d of stream 3

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011) with key = (seed mod 2^32, seed div 2^32) and counter = (i mod 2^32, i div 2^32, stream, 0).

There is no state to advance. The noise of an element is a function of its seed and its index in the
padded matrix, so it does not depend on the kernel, the launch shape, the number of threads or the
device, and a recomputed forward draws the same. What changes from call to call is the seed, which
is folded from (user seed, layer, call, gemm); see ``layer/noise.py``.

This file is also the one table of all streams and branches: two uses of a seed never share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Streams of Philox, the third word of the counter. The first four are part of the definition of the
# numerics and stand in csrc/philox.h and in the Triton kernels too.
SIGN_STREAM = 0  # of a rotation
ELEMENT_STREAM = 1  # stochastic rounding of elements; in reinforcement learning, draws of tokens
BLOCK_SCALE_STREAM = 2  # stochastic rounding of block scales
FOLD_STREAM = 3  # new seeds from old ones: ``fold_in``
ORDER_STREAM = 4  # of training windows within an epoch
TABLE_STREAM = 5  # signs of a random projection: of its table,
PARAMETER_STREAM = 6  # of the parameters of a gradient,
PIECE_STREAM = 7  # and of the pieces that they are summed into

# Branches of a run's seed, ``fold_in(seed, BRANCH, step, ...)``: what each kind of random number of
# a run comes from.
MODEL_BRANCH = 1  # what a model draws itself, such as dropout; by process
WARM_START_BRANCH = 10  # demonstrations of the supervised warm start; by update
PROBLEM_BRANCH = 11  # problems of a step
DRAW_BRANCH = 12  # tokens of completions
COIN_BRANCH = 13  # rewards by chance, a control
NORM_NOISE_BRANCH = 14  # noise on the sampler's norms
# the next three branch from the seed 0: all runs are measured on the same problems and draws
EVALUATION_BRANCH = 21  # problems of the evaluation, and their completions
ABLATION_BRANCH = 22  # problems of the ablation of recipes, and their completions
LENGTH_BRANCH = 23  # problems that are only measured for their length
CANDIDATE_BRANCH = 31  # of the run's seed again: candidates of a round of Prismatic Synthesis

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # M0, M1 of Philox4x32 (SC 2011, table 2)
# the key increments: golden ratio and sqrt(3) - 1 (SC 2011, section 3.3)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF
_SEED_LIMIT = 2**64
_CHUNK = 2**15  # counters at a time: an int64 temporary of a round is then never above 256 KiB

Word = TypeVar("Word", int, torch.Tensor)


@dataclass(frozen=True, eq=False)
class DeviceSeed:
    """A seed in the memory of a device, where every replay of a CUDA graph may find another.

    bits: int64 [], the unsigned seed's bits. Equal to itself alone, since comparing two would wait
    for the device.
    """

    bits: torch.Tensor


Seed = int | DeviceSeed
"""A seed as a number in [0, 2^64), or one that only the device knows."""
SeedKind = TypeVar("SeedKind", bound=Seed)

try:
    # a layer asks six times per step, with two or three numbers; Python takes 10 us for each number
    from nvfp4._cpu import fold_in as _native_fold_in
except ImportError:
    _native_fold_in = None


def check_seed(seed: SeedKind, name: str = "seed") -> SeedKind:
    """Return ``seed`` if it is an integer in [0, 2^64), or lies on a device.

    Otherwise raise ``ValueError``, which names the argument.
    """
    # what a layer asks, ten times per step
    if type(seed) is int and 0 <= seed < _SEED_LIMIT:  # type: ignore[operator]
        return seed
    if isinstance(seed, DeviceSeed):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEED_LIMIT:
        raise ValueError(f"{name} must be an integer in [0, 2**64), got {seed!r}")
    return seed


def philox(seed: Seed, index: Word, stream: int) -> tuple[Word, Word, Word, Word]:
    """Four 32-bit words of Philox4x32-10 at counter ``index`` of ``stream``.

    index: an int in [0, 2^64), or an int64 tensor of any shape; the words come back as the same
    type, each in [0, 2^32). Products wrap modulo 2^64 in int64 exactly as the unsigned ones do, so
    one body serves integers and tensors. From a seed on a device they come as tensors there.
    """
    key: Any = seed.bits if isinstance(seed, DeviceSeed) else seed
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = index & _MASK, (index >> 32) & _MASK, (index & 0) + stream, index & 0

    # a round: two 32 x 32 -> 64 bit products, whose halves change places; the key goes on by WEYL
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _MASK ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32) & _MASK ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def fold_in(seed: int, *data: int) -> int:
    """A new 64-bit seed from ``seed`` and each integer of ``data`` in turn, left to right."""
    check_seed(seed)
    if _native_fold_in is not None:
        return _native_fold_in(seed, data)
    for datum in data:
        low, high, _, _ = philox(seed, datum, FOLD_STREAM)
        seed = low | high << 32
    return seed


def fold_in_tensor(seed: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
    """``fold_in`` on the device of the seed's bits, int64 of any shape; data: int64, broadcast."""
    for datum in data:
        low, high, _, _ = philox(DeviceSeed(seed), datum, FOLD_STREAM)
        seed = low | high << 32
    return seed


def seed_on_host(seed: Seed | None) -> int:
    """The seed as a number, 0 for None; waits for the device if the seed lies on one."""
    return int(seed.bits) % _SEED_LIMIT if isinstance(seed, DeviceSeed) else seed or 0


def draw16(seed: Seed, stream: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The first ``count`` 16-bit draws of a stream, int64 [count], each in [0, 2^16).

    Draw n comes from the words of counter n div 8: word (n mod 8) div 2, low half first.
    """
    # [counter, word, half]: row-major, that is the order of the draws
    counters = -(-count // 8)
    out = torch.empty(counters, 4, 2, dtype=torch.int64, device=device)

    for start in range(0, counters, _CHUNK):
        stop = min(start + _CHUNK, counters)
        words = philox(seed, torch.arange(start, stop, device=device), stream)
        for j, word in enumerate(words):
            out[start:stop, j, 0] = word & 0xFFFF
            out[start:stop, j, 1] = word >> 16

    return out.view(-1)[:count]


def uniform(
    seed: Seed, stream: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Centred uniforms u = (k + 1/2) / 2^16 in (0, 1), float32 of ``shape``, drawn row-major.

    Never 0 or 1, so stochastic rounding leaves representable values alone; the mean of u is exactly
    1/2.
    """
    count = 1
    for size in shape:
        count *= size

    draws = draw16(check_seed(seed), stream, count, device)
    return draws.to(torch.float32).add_(0.5).mul_(2.0**-16).view(shape)
