"""Random Hadamard rotation along the contraction axis, by butterflies in one fixed order.

    x [..., K]  ->  groups of g = 16, 32, 64 or 128  ->  per round i: y = FWHT(d_i * y) * scale_i

d_i are g random signs; FWHT is log2(g) passes of butterflies (a, b) -> (a + b, a - b). The rotation
spreads an outlier over its group, so that no element takes the scale of its block for itself alone.
It is orthonormal, and both operands of a GEMM take the same signs and rounds along the axis that
they contract: (A R)(B R)^T = A B^T, so nothing is rotated back.

One round is a fixed matrix times random signs: it leaves MS-EDEN biased on groups with few active
entries (|bias|^2 / |x|^2 up to 1e-2 with two); two rounds leave 3e-6 on average.

Scales are powers of two and therefore exact; only a last round with even index has another, g^-1/2,
which is rounded where g is 32 or 128. Butterflies in float32, in the order of strides 1, 2, ...,
g/2, are part of the definition: tensor cores would sum in another order and give other last bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nvfp4.numerics.rng import SIGN_STREAM, DeviceSeed, Seed, check_seed, philox
from nvfp4.numerics.torch_state import constant

GROUPS = (16, 32, 64, 128)
MAX_ROUNDS = 3

NVIDIA_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The one fixed sign vector of NVIDIA's recipe (arXiv 2509.25149; TransformerEngine's default)."""


@dataclass(frozen=True)
class Rotation:
    """What was done to the contraction axis of an operand.

    Two operands may meet in a GEMM only if their rotations are equal. group: elements rotated
    together, 16, 32, 64 or 128. rounds: 1 to 3, each with its own signs. sign_seed: where the signs
    come from. fixed: NVIDIA's rotation instead (group 16, one round, fixed signs, input and result
    rounded to BF16), which needs no seed. Raises ValueError for anything else.
    """

    group: int = 128
    rounds: int = 1
    sign_seed: Seed | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS}, got {self.group!r}")
        if self.rounds not in range(1, MAX_ROUNDS + 1):
            raise ValueError(f"rounds must be 1, 2 or 3, got {self.rounds!r}")
        if self.fixed and (self.group, self.rounds, self.sign_seed) != (16, 1, None):
            raise ValueError("a fixed rotation has group=16, rounds=1 and no sign_seed")
        if self.sign_seed is not None:
            check_seed(self.sign_seed, "sign_seed")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate float32 x [..., K] with K a multiple of ``group``."""
        if self.fixed:
            return nvidia_rotate(x)
        return rotate(x, self._seed(), rounds=self.rounds, group=self.group)

    def invert(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse rotation of float32 y [..., K].

        Exact but for float32 rounding, and for what BF16 rounding took when fixed.
        """
        groups = _split(y, self.group)
        if self.fixed:
            signs = constant(NVIDIA_SIGNS, y.device)
            return ((fwht(groups) * 0.25) * signs).reshape(y.shape)
        for i in reversed(range(self.rounds)):
            signs = rotation_signs(self._seed(), i, self.group, y.device)
            # H H = group * I, so the inverse scale is 1 / (group * scale of the forward round)
            groups = (
                fwht(groups) * (1 / (self.group * round_scale(i, self.rounds, self.group))) * signs
            )
        return groups.reshape(y.shape)

    def _seed(self) -> Seed:
        if self.sign_seed is None:
            raise ValueError("this rotation has random signs: give it a sign_seed")
        return self.sign_seed


def rotation_signs(
    sign_seed: Seed, round_index: int, group: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Signs of one round: float32 [group] of +-1.

    Counter ``round_index`` gives 128 bits; bit j set means -1 at position j.
    """
    words = philox(sign_seed, round_index, SIGN_STREAM)
    if isinstance(sign_seed, DeviceSeed):
        position = torch.arange(group, device=device)
        bits = torch.stack(words)[position // 32] >> position % 32 & 1  # type: ignore[arg-type]
        return 1.0 - 2.0 * bits.to(torch.float32)
    signs = [-1.0 if words[j // 32] >> (j % 32) & 1 else 1.0 for j in range(group)]
    return torch.tensor(signs, dtype=torch.float32, device=device)


def fwht(x: torch.Tensor) -> torch.Tensor:
    """Unnormalised Walsh-Hadamard transform of the last axis (a power of two n), float32.

    Strides 1, 2, ..., n/2.
    """
    n = x.shape[-1]

    # the rotated axis leads, so each butterfly runs over contiguous memory
    lead = x.reshape(-1, n).t().contiguous()
    stride = 1
    while stride < n:
        pairs = lead.view(n // (2 * stride), 2, -1)
        lead = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        stride *= 2
    return lead.view(n, -1).t().reshape(x.shape)


def rotate(
    x: torch.Tensor, sign_seed: Seed, *, rounds: int = 1, group: int = 128, axis: int = -1
) -> torch.Tensor:
    """Rotate one axis of x in groups: ``rounds`` times random signs, then a scaled transform.

    x: float32, float16 or bfloat16, any rank; the axis is zero-padded to a multiple of ``group``
    (16, 32, 64 or 128). Returns float32 with that axis padded. The transform is orthonormal;
    ``round_scale`` says what each round multiplies by. NaN and Inf spread over their group; finite
    values whose sums exceed float32 become Inf. Raises ValueError for another group, rounds outside
    1..3, or a sign_seed outside [0, 2^64).
    """
    Rotation(group, rounds, check_seed(sign_seed, "sign_seed"))  # refuses what is out of range

    moved = x.movedim(axis, -1).to(torch.float32)
    moved = F.pad(moved, (0, -moved.shape[-1] % group))
    groups = _split(moved, group)
    for i in range(rounds):
        signs = rotation_signs(sign_seed, i, group, x.device)
        groups = fwht(groups * signs) * round_scale(i, rounds, group)
    return groups.reshape(moved.shape).movedim(-1, axis)


def nvidia_rotate(x: torch.Tensor) -> torch.Tensor:
    """NVIDIA's rotation of the last axis: groups of 16, fixed signs, times 1/4.

    Input and result are rounded to BF16. x: [..., K], K a multiple of 16. Returns float32 that
    holds BF16 values.
    """
    signs = constant(NVIDIA_SIGNS, x.device)
    groups = _split(x.to(torch.bfloat16).to(torch.float32), 16) * signs
    return (fwht(groups) * 0.25).to(torch.bfloat16).to(torch.float32).reshape(x.shape)


def round_scale(i: int, rounds: int, group: int) -> float:
    """Scale of round i: fl(group^-1/2) for a last round with even i, otherwise a power of two.

    An even round and the odd one after it multiply by 1/group together.
    """
    log2 = group.bit_length() - 1
    if i == rounds - 1 and i % 2 == 0:
        return torch.tensor(math.sqrt(2.0**-log2), dtype=torch.float32).item()
    return 2.0 ** -(log2 // 2 if i % 2 == 0 else log2 - log2 // 2)


def _split(x: torch.Tensor, group: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
