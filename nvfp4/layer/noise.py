"""Where a layer's random bits come from: four numbers, and nothing else.

    sign seed of a GEMM        fold_in(seed, layer, call, GEMM): both operands rotate alike,
                               wherever they are made
    rounding seed of a side    fold_in(sign seed, 1 + side, rank), left 0, right 1: operands and
                               ranks round differently

``call`` counts finished backward passes, so a forward that is recomputed meets the seeds of the
first one, and a model that resumes with its ``noise_state`` goes on to the last bit.

The four numbers of a layer (seed, layer, calls, rank) are ``Noise.state``, int64 [4]. On the host
they are read at each call, and kernels get seeds as arguments (``HostNoise``). A CUDA graph would
freeze such arguments, so the state of a layer that is ``capturable`` lies on its device: a kernel
makes the seeds there (``DeviceNoise`` in ``call.py``), the backward advances the counter there, and
every replay finds new ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from nvfp4.numerics.rng import Seed, check_seed, fold_in, signed
from nvfp4.numerics.torch_state import is_capturing
from nvfp4.recipes import GEMMS

LEFT, RIGHT = 0, 1
"""The sides of a GEMM, as ``GemmSeeds`` counts them."""

CALLS = 2
"""Place of the call counter in ``Noise.state``."""

GemmSeeds = tuple[Seed, tuple[Seed, Seed]]
"""Sign seed, rounding seeds of the left and the right operand."""


def _number_at(place: int, meaning: str) -> Any:
    """One of the numbers of ``Noise.state``, to read and to set."""

    def get(noise: Noise) -> int:
        return int(noise.state[place])

    def put(noise: Noise, number: int) -> None:
        noise.state[place] = number

    return property(get, put, doc=meaning)


class Noise:
    """The noise of one layer: its seed, its index, and how often it was used.

    seed: the user's, in [0, 2^64). layer: index in conversion order. calls: backward passes
    finished so far; it advances at the end of a backward, so that recomputing a forward (activation
    checkpointing) meets the same noise. rank: the process to round for; None is this one. state:
    the four as int64 [4], None as -1, which compiled graphs read and advance; on the CPU or, if
    ``capturable``, on the layer's device, where to read one of them here waits.
    """

    def __init__(self, seed: int, layer: int, calls: int = 0, rank: int | None = None) -> None:
        self.__setstate__([signed(check_seed(seed)), layer, calls, -1 if rank is None else rank])

    def __getstate__(self) -> list[int]:
        return self.state.tolist()  # integers, which no map_location moves

    def __setstate__(self, state: list[int]) -> None:
        self.place(torch.tensor(state, dtype=torch.int64, device="cpu"), "cpu", capturable=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noise:
        copied = Noise.__new__(Noise)
        copied.place(self.state, self.state.device, self.capturable)
        return copied

    def place(self, state: torch.Tensor, device: torch.device | str, capturable: bool) -> None:
        """Keep a copy of ``state`` on ``device``, whose memory stays the same from then on."""
        with torch.inference_mode(False):  # a model converted for a rollout may train later
            self.state = state.to(device, copy=True)
        self.capturable = capturable

        # a compiled backward advances it, which CUDA graphs allow at fixed addresses only
        if capturable:
            from torch._dynamo import mark_static_address  # takes seconds to import

            mark_static_address(self.state)

    @property
    def seed(self) -> int:
        """The user's seed."""
        return int(self.state[0]) % 2**64

    layer = _number_at(1, "Index of the layer in conversion order.")
    calls = _number_at(CALLS, "Backward passes finished so far.")

    @property
    def rank(self) -> int | None:
        """The process to round for, None for this one."""
        rank = int(self.state[3])
        return None if rank < 0 else rank

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self.state[3] = -1 if rank is None else rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Noise) and self.state.tolist() == other.state.tolist()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"Noise(seed={self.seed}, layer={self.layer}, calls={self.calls}{rank})"


class HostNoise(tuple[int, int, int, int]):
    """``Noise.state`` as integers, for one call."""

    def seeds(self, gemm: str) -> GemmSeeds:
        """The seeds of one GEMM; RuntimeError where a CUDA graph would repeat them for ever."""
        # both operands ask
        kept: GemmSeeds | None = vars(self).get(gemm)
        if kept is not None:
            return kept

        if is_capturing():
            raise RuntimeError(
                "a CUDA graph would replay this layer with the same noise for ever: call "
                "nvfp4.capturable(model) before the capture, and before its warm-up; every replay "
                "then draws its own"
            )
        seeds = vars(self)[gemm] = gemm_seeds(self, gemm)
        return seeds


def gemm_seeds(state: tuple[int, int, int, int], gemm: str) -> tuple[int, tuple[int, int]]:
    """(sign seed, (left, right rounding seed)) of one GEMM for ``Noise.state`` as integers."""
    # -1 stands for this process
    *call, rank = state
    return _gemm_seeds(*call, GEMMS.index(gemm), process() if rank < 0 else rank)


def process() -> int:
    """The rank of this process, 0 where there is one alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@lru_cache(maxsize=8)  # the two operands of a GEMM ask one after the other
def _gemm_seeds(
    seed: int, layer: int, call: int, gemm: int, rank: int
) -> tuple[int, tuple[int, int]]:
    """The formulas at the head of the file; gemm: its place in GEMMS."""
    sign_seed = fold_in(seed % 2**64, layer, call, gemm)
    return sign_seed, (fold_in(sign_seed, 1 + LEFT, rank), fold_in(sign_seed, 1 + RIGHT, rank))
