"""What a quantiser is: a rule on blocks, the options it takes, and the claims it is held to.

    x [M, K]         -> float32, K padded to Kp with zeros, rotated if asked for
    amax             -> not finite: the whole tensor (or its row) counts as zeros from here on
                        (a held amax: of that block alone, see ``HeldAmax``)
    Blocks           -> float32 [m, k, 16], or [m, k, 256] for 16x16
    rule(Blocks)     -> grid values like the blocks, block scales [m, k], global scale
    QTensor          <- codes, scale bytes, and a NaN global scale where x was not finite

The rule is the whole of a method, in reference mathematics: it fits on a screen, and it is what
every kernel must equal to the last bit. Everything around it is the same for all methods and lives
here. ``Claims`` are promises in numbers (unbiased, idempotent, the error on N(0, 1)), which the
property tests check for every quantiser in the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from nvfp4.numerics.codec import e2m1_encode, e4m3_encode, pack
from nvfp4.numerics.formats import E4M3, FLOAT32_MAX, NVFP4, ROW_BLOCK, SEARCH_CAP, TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import BLOCK_SCALE_STREAM, ELEMENT_STREAM, Seed, check_seed, uniform
from nvfp4.numerics.rounding import nearest
from nvfp4.numerics.scaling import (
    BYTE_STEPS,
    FACTOR_RANGE,
    FACTOR_UNIT,
    FURTHEST_STEP,
    MOST_TRIALS,
    SEARCH_FACTORS,
    base_scale,
    encode_scale,
    from_blocks,
    tensor_amax,
    to_blocks,
)

METRICS = ("mse", "mae", "abs_max")

SUMMATIONS = ("butterflies", "tensor_core")
"""How a rotation may add up: in the order of the definition, or sixteen at once as tensor cores do,
which may change a code in ten thousand by a step, where a backend has kernels for it."""


@dataclass(frozen=True)
class Claims:
    """What a quantiser promises; ``tests/quantizers/test_quantizers.py`` checks every one of them.

    deterministic: the same x gives the same codes whatever the seed. unbiased: E[dequantised] = x
    over seeds (rotated quantisers: over signs and rounding, as spelled out in ``ms_eden.py``).
    idempotent: quantising the dequantised tensor returns the same values. max_error: bound on
    |dequantised - x| as a multiple of the block maximum (None: none claimed). These two hold for
    blocks whose scale is a normal E4M3 number (the block's amax over the tensor's amax above
    2^-14 or so). relative_mse: mean squared error over mean square on N(0, 1), and by how much it
    may be off at 2048 x 2048 (None: not measured for these options).
    """

    deterministic: bool
    unbiased: bool
    idempotent: bool
    max_error: float | None
    relative_mse: float | None
    relative_mse_tolerance: float


@dataclass(frozen=True, eq=False)
class HeldAmax:
    """An amax from elsewhere that a matrix is scaled by, while its own is noted for the next time.

    Both float32 [1] on the device of the matrix. amax: g of the definition, finite and not
    negative; the matrix may exceed it. seen: raised to the largest magnitude of the (rotated)
    matrix, NaN and Inf included; None if nobody will ask. So one pass over the matrix is enough.
    """

    amax: torch.Tensor
    seen: torch.Tensor | None = None

    def note(self, amax: torch.Tensor) -> None:
        """Raise ``seen`` to ``amax`` [1]."""
        if self.seen is not None:
            self.seen.copy_(torch.maximum(self.seen, amax))


@dataclass(frozen=True)
class Options:
    """Everything a rule may read; a quantiser names those it takes, the others keep their defaults.

    block: (1, 16) or (16, 16). row_scaled: a global scale per row. metric: of METRICS. rounds,
    group: of a rotation that the rule asks for. search: more candidate scales. candidates: of
    scale_search, steps from the scale byte that the maximum asks for; factors: of ms_eden's search;
    both in the order of trial, the first of equals wins. rotation: of an operand whose rule does
    not rotate by itself. seed: of rounding. sign_seed: of that rotation, the seed if None.
    summation: of SUMMATIONS, for a rule that rotates. held: of one call, for rules that scale by
    the amax of a whole tensor; no option of ``check``.
    """

    block: tuple[int, int] = ROW_BLOCK
    row_scaled: bool = False
    metric: str = "mse"
    rounds: int = 1
    search: bool = False
    candidates: tuple[int, ...] = BYTE_STEPS
    factors: tuple[float, ...] = SEARCH_FACTORS
    group: int = 128
    rotation: Rotation | None = None
    seed: Seed | None = None
    sign_seed: Seed | None = None
    summation: str = "butterflies"
    held: HeldAmax | None = None

    def holding(self, held: HeldAmax) -> Options:
        """The same with a held amax; ``replace`` would take 7 us where this takes 1."""
        options = object.__new__(Options)
        vars(options).update(vars(self), held=held, kind=self.kind)
        return options

    @cached_property
    def kind(self) -> str:
        """All of it but the seeds, as a key: what decides who can compute it, and how fast.

        A string, whose hash is worked out once. A held amax is no part of it either.
        """
        turn = self.rotation
        rotation = None if turn is None else (turn.group, turn.rounds, turn.fixed)
        return _as_text((*[getattr(self, name) for name in _KIND], rotation))


_NO_KIND = {"rotation", "seed", "sign_seed", "held"}
_KIND = tuple(f.name for f in fields(Options) if f.name not in _NO_KIND)
_as_text = lru_cache(maxsize=1024)(repr)


@dataclass(frozen=True)
class Blocks:
    """Finite float32 blocks [m, k, size] with the noise that belongs to their elements and scales.

    values: size is 16 or 256, k is Kp / 16. rows: M, without the rows that fill up 16x16 blocks.
    """

    values: torch.Tensor
    rows: int
    options: Options

    def amax(self) -> torch.Tensor:
        """Largest magnitude of each block, [m, k]; exact."""
        return self.values.abs().amax(dim=-1)

    def scaled_by(self, block_amax: torch.Tensor) -> torch.Tensor:
        """g, [1, 1] or per row [m, 1]: the largest of ``amax()``, unless one is held."""
        held = self.options.held
        if held is not None:
            return held.amax.view(1, 1)
        return tensor_amax(block_amax, self.options.row_scaled)

    def nearest_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(block scales rounded to nearest, global scale) with cap 448."""
        block_amax = self.amax()
        encode = encode_scale(self.scaled_by(block_amax), E4M3.max)
        return nearest(base_scale(block_amax, encode), E4M3), 1 / encode

    def search_scales(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x S, base, global scale) with the cap that leaves room to enlarge a block scale."""
        block_amax = self.amax()
        encode = encode_scale(self.scaled_by(block_amax), SEARCH_CAP)
        return self.values * encode[..., None], base_scale(block_amax, encode), 1 / encode

    def scaled(self, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        """x * m, the elements before they are rounded; m = min(1 / (s * global_scale), FLT_MAX).

        A non-zero block whose scale underflowed to 0 keeps m = FLT_MAX and so codes of +-6; it
        decodes to 0.
        """
        multiplier = (1 / (block_scale * global_scale)).clamp_(max=FLOAT32_MAX)
        return self.values * multiplier[..., None]

    def element_noise(self) -> torch.Tensor:
        """Uniforms of the element stream, blocked like the values; draw n = row * Kp + column."""
        columns = self.values.shape[1] * NVFP4.block_size
        u = uniform(self._seed(), ELEMENT_STREAM, (self.rows, columns), self.values.device)
        return to_blocks(u, self.options.block)

    def scale_noise(self) -> torch.Tensor:
        """Uniforms of the scale stream, [m, k]; draw n = row * (Kp/16) + block column."""
        return uniform(
            self._seed(), BLOCK_SCALE_STREAM, tuple(self.values.shape[:2]), self.values.device
        )

    def _seed(self) -> Seed:
        assert self.options.seed is not None, (
            "Quantizer.check lets no stochastic rule run without a seed"
        )
        return self.options.seed


Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Grid values [m, k, size], block scales on the E4M3 grid [m, k], global scale [1, 1] or [m, 1].

All float32.
"""


@dataclass(frozen=True)
class Quantizer:
    """A named quantiser.

    rule: blocks to (values, block scales, global scale), the method itself. options: names of the
    options it accepts beside ``rotation``, ``seed`` and ``sign_seed``. claims: options to what it
    promises under them. block: the default block shape. rotates: the rule wants its blocks rotated
    by (group, rounds, sign_seed).
    """

    name: str
    rule: Callable[[Blocks], Quantized]
    claims: Callable[[Options], Claims]
    options: frozenset[str]
    block: tuple[int, int] = ROW_BLOCK
    rotates: bool = False

    def check(self, **options: object) -> Options:
        """``Options`` from keyword arguments.

        Raises TypeError for an unknown name, ValueError for an option that this quantiser does not
        take, a value out of range, or a stochastic rule without a seed; each says what would do.
        """
        # names, and options of other quantisers
        accepted = {"rotation", "seed", "sign_seed", *self.options}
        defaults = {f.name: f.default for f in fields(Options)} | {"block": self.block}
        for name, value in options.items():
            if name not in defaults:
                raise TypeError(
                    f"unknown option {name!r} for {self.name}; it takes {sorted(accepted)}"
                )
            if name not in accepted and value != defaults[name]:
                raise ValueError(
                    f"{self.name} does not take {name}={value!r}; it takes {sorted(accepted)}"
                )

        # values
        checked = Options(**(defaults | options))  # type: ignore[arg-type]
        if checked.block not in (ROW_BLOCK, TILE_BLOCK):
            raise ValueError(f"block must be {ROW_BLOCK} or {TILE_BLOCK}, got {checked.block!r}")
        if checked.row_scaled and checked.block != ROW_BLOCK:
            raise ValueError(
                f"row_scaled needs block={ROW_BLOCK}: a tile spans 16 rows, got "
                f"block={checked.block}"
            )
        if checked.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {checked.metric!r}")
        check_candidates(checked.candidates)
        check_factors(checked.factors)
        if checked.factors != SEARCH_FACTORS and not checked.search:
            raise ValueError(f"factors={checked.factors} are of a search: pass search=True as well")
        if checked.summation not in SUMMATIONS:
            raise ValueError(f"summation must be one of {SUMMATIONS}, got {checked.summation!r}")

        return self._check_seeds(checked)

    def _check_seeds(self, options: Options) -> Options:
        for name in ("seed", "sign_seed"):
            if getattr(options, name) is not None:
                check_seed(getattr(options, name), name)
        if options.seed is None and not self.claims(options).deterministic:
            raise ValueError(f"{self.name} is stochastic: pass seed=, an integer in [0, 2**64)")

        # a rule that rotates makes its rotation from group, rounds and sign_seed
        if not self.rotates:
            return options
        if options.rotation is not None:
            raise ValueError(
                f"{self.name} rotates by itself: use its group, rounds and sign_seed, not rotation="
            )
        sign_seed = options.seed if options.sign_seed is None else options.sign_seed
        return replace(options, rotation=Rotation(options.group, options.rounds, sign_seed))

    def quantize(self, x: torch.Tensor, options: Options) -> QTensor:
        """Quantise matrix x [M, K] (float32, float16, bfloat16; any strides) along its last axis.

        Zero blocks give zero scales and signed zero codes. A NaN or Inf in x, or in the rotated x,
        gives a NaN global scale with all codes and block scales 0, for the tensor or, when
        row-scaled, for that row. With a held amax codes and block scales are 0 in the blocks that
        are not finite alone: the others were written before anybody could know.
        """
        # whole blocks, or whole groups of the rotation
        rows = x.shape[0]
        rotation = options.rotation
        columns = rotation.group if rotation is not None else NVFP4.block_size
        padded = F.pad(x.to(torch.float32), (0, -x.shape[1] % columns)).contiguous()
        if padded.numel() == 0:
            return _empty(padded, tuple(x.shape), options)
        if rotation is not None:
            padded = rotation.apply(padded)

        # a rotation may overflow where x is finite, so this is asked of what it made; the rule then
        # sees zeros, and no rule has to think of NaN
        amax = tensor_amax(padded.abs(), options.row_scaled)
        finite = amax.isfinite()
        if options.held is not None:
            return self._quantize_held(padded, amax, tuple(x.shape), options, options.held)
        blocks = Blocks(to_blocks(torch.where(finite, padded, 0.0), options.block), rows, options)
        values, block_scale, global_scale = self.rule(blocks)

        # codes and scales 0, the global scale NaN: all of it decodes to NaN, and the loss shows it
        poisoned = torch.where(finite, global_scale, float("nan"))
        codes = pack(from_blocks(e2m1_encode(values), options.block, rows)) * finite
        scale_codes = e4m3_encode(block_scale) * finite
        return QTensor(
            codes, scale_codes, poisoned.view(-1), options.block, tuple(x.shape), -1, rotation
        )

    def _quantize_held(
        self,
        padded: torch.Tensor,
        amax: torch.Tensor,
        shape: tuple[int, ...],
        options: Options,
        held: HeldAmax,
    ) -> QTensor:
        """``quantize`` of a padded, rotated matrix [M, Kp] whose own ``amax`` [1, 1] only counts
        for the next time."""
        held.note(amax.view(1))

        # a block that is not finite counts as zeros, and so does its scale
        values = to_blocks(padded, options.block)
        finite = values.isfinite().all(dim=-1, keepdim=True)
        blocks = Blocks(torch.where(finite, values, 0.0), shape[0], options)
        grid, block_scale, global_scale = self.rule(blocks)

        # any of them makes all of it decode to NaN
        poisoned = torch.where(amax.isfinite(), global_scale, float("nan"))
        codes = pack(from_blocks(e2m1_encode(grid), options.block, shape[0]))
        scales = (poisoned.view(-1), options.block)
        return QTensor(codes, e4m3_encode(block_scale), *scales, shape, -1, options.rotation)


def check_candidates(candidates: object) -> None:
    """ValueError unless these are steps that scale_search may try."""
    fits = isinstance(candidates, tuple) and all(
        type(step) is int and -FURTHEST_STEP <= step <= FURTHEST_STEP for step in candidates
    )
    what = f"different integers from {-FURTHEST_STEP} to {FURTHEST_STEP}"
    _check_trials("candidates", candidates, fits, what, "steps from the nearest scale byte")


def check_factors(factors: object) -> None:
    """ValueError unless these are factors that a search of ms_eden may try."""
    low, high = FACTOR_RANGE
    fits = isinstance(factors, tuple) and all(
        type(k) in (int, float) and low <= k <= high and k % FACTOR_UNIT == 0 for k in factors
    )
    what = f"different multiples of {FACTOR_UNIT} from {low} to {high}"
    _check_trials("factors", factors, fits, what, "by which the maximum lands lower on the grid")


def _check_trials(name: str, trials: object, fits: bool, what: str, meaning: str) -> None:
    """ValueError for what is no tuple, or not of ``what``, or too long, or has something twice."""
    if fits and isinstance(trials, tuple) and 1 <= len(set(trials)) == len(trials) <= MOST_TRIALS:
        return
    raise ValueError(
        f"{name} must be a tuple of 1 to {MOST_TRIALS} {what}, {meaning}, in the order of trial; "
        f"got {trials!r}"
    )


def _empty(padded: torch.Tensor, shape: tuple[int, ...], options: Options) -> QTensor:
    """Empty input: empty codes and block scales, global scale 1 ([1], or [M] when row-scaled)."""
    # rows without columns, or columns without rows
    rows, columns = padded.shape
    scale_shape = (-(-rows // options.block[0]), columns // options.block[1])
    return QTensor(
        codes=torch.zeros(rows, columns // 2, dtype=torch.uint8, device=padded.device),
        block_scale=torch.zeros(scale_shape, dtype=torch.uint8, device=padded.device),
        global_scale=torch.ones(
            rows if options.row_scaled else 1, dtype=torch.float32, device=padded.device
        ),
        block=options.block,
        shape=shape,
        rotation=options.rotation,
    )
