"""Where a layer's random bits come from: a function of (seed, layer, call, GEMM, operand, rank) and of nothing else.

On the host, where seeds are numbers that kernels get as arguments; or, for a layer that is ``capturable``, in the
memory of its device, where the kernels of a CUDA graph find new ones at every replay.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from nvfp4.numerics.rng import DeviceSeed, Seed, check_seed, fold_in
from nvfp4.numerics.torch_state import is_capturing
from nvfp4.ops import draw_seeds
from nvfp4.recipes import GEMMS

LEFT, RIGHT = 0, 1
CALLS = 2
"""Place of the call counter in ``Noise.words``."""

GemmSeeds = tuple[Seed, tuple[Seed, Seed]]
"""Sign seed, rounding seeds of the left and the right operand."""


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


class Noise:
    """The noise of one layer: its seed, its index, and how often it was used.

    seed: the user's, in [0, 2^64). layer: index in conversion order. calls: backward passes finished so far; it
    advances at the end of a backward, so that recomputing a forward (activation checkpointing) meets the same noise.
    rank: the process to round for; None is this one. words: the four as int64 [4], None as -1, which compiled graphs
    read and advance; on the CPU or, if ``capturable``, on the layer's device, where to read one of them here waits.
    """

    def __init__(self, seed: int, layer: int, calls: int = 0, rank: int | None = None) -> None:
        self.__setstate__([signed(check_seed(seed)), layer, calls, -1 if rank is None else rank])

    def __getstate__(self) -> list[int]:
        return self.words.tolist()  # integers, which no map_location moves

    def __setstate__(self, words: list[int]) -> None:
        self.place(torch.tensor(words, dtype=torch.int64, device="cpu"), "cpu", capturable=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noise:
        made = Noise.__new__(Noise)
        made.place(self.words, self.words.device, self.capturable)
        return made

    def place(self, words: torch.Tensor, device: torch.device | str, capturable: bool) -> None:
        """Keep a copy of ``words`` on ``device``, whose memory stays the same from then on."""
        with torch.inference_mode(False):  # a model converted for a rollout may train later
            self.words = words.to(device, copy=True)
        self.capturable = capturable
        if capturable:  # a compiled backward advances it, which CUDA graphs allow at fixed addresses only
            from torch._dynamo import mark_static_address  # takes seconds to import

            mark_static_address(self.words)

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
        return int(self.words[CALLS])

    @calls.setter
    def calls(self, calls: int) -> None:
        self.words[CALLS] = calls

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
        return isinstance(other, Noise) and self.words.tolist() == other.words.tolist()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"Noise(seed={self.seed}, layer={self.layer}, calls={self.calls}{rank})"


class HostWords(tuple[int, int, int, int]):
    """``Noise.words`` as integers."""

    __slots__ = ()

    def seeds(self, gemm: str) -> GemmSeeds:
        """The seeds of one GEMM of this call; RuntimeError where a CUDA graph would repeat them for ever."""
        if is_capturing():
            raise RuntimeError(
                "a CUDA graph would replay this layer with the same noise for ever: call nvfp4.capturable(model) "
                "before the capture, and before its warm-up; every replay then draws its own"
            )
        return gemm_seeds(self, gemm)


class DeviceWords:
    """``Noise.words`` on their device, and the seeds of one call, which are made there when first asked for.

    words: int64 [4]. backend: of the layer.
    """

    def __init__(self, words: torch.Tensor, backend: str) -> None:
        self._words, self._backend = words, backend
        self._table: torch.Tensor | None = None
        self._seeds: dict[str, GemmSeeds] = {}

    def seeds(self, gemm: str) -> GemmSeeds:
        """The seeds of one GEMM of this call, the same objects each time: both operands must see equal signs."""
        if gemm not in self._seeds:
            if self._table is None:
                self._table = draw_seeds(self._words, _process(), len(GEMMS), backend=self._backend)
            sign_seed, left, right = map(DeviceSeed, self._table[GEMMS.index(gemm)].unbind())
            self._seeds[gemm] = sign_seed, (left, right)
        return self._seeds[gemm]


Words = HostWords | DeviceWords


def words_of(words: torch.Tensor, capturable: bool, backend: str) -> Words:
    """``Noise.words`` for one call: read, unless they are on a device for good."""
    return DeviceWords(words, backend) if capturable else HostWords(words.tolist())


def gemm_seeds(words: tuple[int, int, int, int], gemm: str) -> tuple[int, tuple[int, int]]:
    """(sign seed, rounding seeds of the left and the right operand) of one GEMM for ``Noise.words`` as integers.

    Signs are equal on all ranks, since both operands must rotate alike wherever they come from; rounding differs.
    """
    *call, rank = words
    return _gemm_seeds(*call, GEMMS.index(gemm), _process() if rank < 0 else rank)


def _process() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@lru_cache(maxsize=8)  # the two operands of a GEMM ask one after the other
def _gemm_seeds(seed: int, layer: int, call: int, gemm: int, rank: int) -> tuple[int, tuple[int, int]]:
    sign_seed = fold_in(seed % 2**64, layer, call, gemm)
    return sign_seed, (fold_in(sign_seed, 1 + LEFT, rank), fold_in(sign_seed, 1 + RIGHT, rank))
