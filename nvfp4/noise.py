"""Where a layer's random bits come from: a function of (seed, layer, call, GEMM, operand, rank) and of nothing else."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist

from nvfp4.recipes import GEMMS
from nvfp4.rng import check_seed, fold_in

LEFT, RIGHT = 0, 1


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


class Noise:
    """The noise of one layer: its seed, its index, and how often it was used.

    seed: the user's, in [0, 2^64). layer: index in conversion order. calls: backward passes finished so far; it
    advances at the end of a backward, so that recomputing a forward (activation checkpointing) meets the same noise.
    rank: the process to round for; None is this one. words: the four as int64 [4] on the CPU, None as -1, which
    compiled graphs read and advance.
    """

    def __init__(self, seed: int, layer: int, calls: int = 0, rank: int | None = None) -> None:
        self.__setstate__([signed(check_seed(seed)), layer, calls, -1 if rank is None else rank])

    def __getstate__(self) -> list[int]:
        return self.words.tolist()  # integers, which no map_location moves

    def __setstate__(self, words: list[int]) -> None:
        with torch.inference_mode(False):  # a model converted for a rollout may train later
            self.words = torch.tensor(words, dtype=torch.int64, device="cpu")

    @property
    def seed(self) -> int:
        """The user's seed."""
        return int(self.words[0]) % 2**64

    @property
    def layer(self) -> int:
        """Index of the layer in conversion order."""
        return int(self.words[1])

    @layer.setter
    def layer(self, layer: int) -> None:
        self.words[1] = layer

    @property
    def calls(self) -> int:
        """Backward passes finished so far."""
        return int(self.words[2])

    @calls.setter
    def calls(self, calls: int) -> None:
        self.words[2] = calls

    @property
    def rank(self) -> int | None:
        """The process to round for, None for this one."""
        rank = int(self.words[3])
        return None if rank < 0 else rank

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self.words[3] = -1 if rank is None else rank

    def seeds(self, gemm: str, call: int | None = None) -> tuple[int, tuple[int, int]]:
        """(sign seed, rounding seeds of the left and the right operand) of a GEMM in a call, by default the next."""
        seed, layer, calls, rank = self.words.tolist()
        return gemm_seeds((seed, layer, calls if call is None else call, rank), gemm)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Noise) and torch.equal(self.words, other.words)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"Noise(seed={self.seed}, layer={self.layer}, calls={self.calls}{rank})"


def gemm_seeds(words: tuple[int, int, int, int], gemm: str) -> tuple[int, tuple[int, int]]:
    """(sign seed, rounding seeds of the left and the right operand) of one GEMM for ``Noise.words`` as integers.

    Signs are equal on all ranks, since both operands must rotate alike wherever they come from; rounding differs.
    """
    *call, rank = words
    if rank < 0:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return _gemm_seeds(*call, GEMMS.index(gemm), rank)


@lru_cache(maxsize=8)  # the two operands of a GEMM ask one after the other
def _gemm_seeds(seed: int, layer: int, call: int, gemm: int, rank: int) -> tuple[int, tuple[int, int]]:
    sign_seed = fold_in(seed % 2**64, layer, call, gemm)
    return sign_seed, (fold_in(sign_seed, 1 + LEFT, rank), fold_in(sign_seed, 1 + RIGHT, rank))
