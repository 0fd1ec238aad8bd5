"""Recipes as data: which quantiser each operand of the three GEMMs of a linear layer goes through.

With x [M, K] activations, w [N, K] weights, dy [M, N] the gradient of the output:

    fprop  y  = x    w^T    left x,    right w,    contracts K
    dgrad  dx = dy   w      left dy,   right w^T,  contracts N
    wgrad  dw = dy^T x      left dy^T, right x^T,  contracts M (the tokens)

A ``Recipe`` is three ``Gemm``s, a ``Gemm`` two ``Operand``s, an ``Operand`` a quantiser's name with
its options, or None for high precision. dgrad and wgrad contract another axis than fprop, so w and
x are needed in a second orientation, and ``source`` says where that comes from:

    tensor     w or x itself, quantised along the other axis
    codes      fprop's codes of w or x, transposed: needs 16x16 blocks in fprop, and costs no second
               rounding
    decoded    what fprop's codes stand for, quantised again: the backward then differentiates what
               the forward computed, and only 4-bit codes are kept between the two

An operand that is scaled by its largest magnitude may take that of the call before
(``delayed_amax``), times a head-room: its codes then come out of one pass instead of two.

Rules between the fields are checked when a recipe is made, so that a layer may rely on them. A
recipe knows no seed: signs and rounding are drawn anew in every call (``layer/noise.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.rng import Seed
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

OperandSource = Literal["tensor", "codes", "decoded"]
GEMMS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Operand:
    """How one operand of a GEMM is made.

    quantizer: a name from ``quantizers.registry``, or None for high precision. options: its
    options. source: "tensor", the high-precision tensor itself; "codes", the codes and tile scales
    that fprop used, transposed (16x16 blocks only, unrotated); "decoded", what fprop's codes stand
    for (x-hat, w-hat), which is quantised again, or used in BF16 when ``quantizer`` is None.
    rotation: applied before quantising; its sign_seed is filled in at run time. delayed_amax: scale
    by the amax of the call before (``layer/delayed_amax.py``). Raises ValueError or TypeError for
    what the quantiser does not take.
    """

    quantizer: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    source: OperandSource = "tensor"
    rotation: Rotation | None = None
    delayed_amax: bool = False

    def __post_init__(self) -> None:
        if self.source not in get_args(OperandSource):
            raise ValueError(
                f"source must be one of {get_args(OperandSource)}, got {self.source!r}"
            )

        # so that == ignores their order
        object.__setattr__(self, "options", tuple(sorted(self.options)))

        # what an operand has depends on whether it is quantised by itself
        if self.rotation is not None and self.rotation.sign_seed is not None:
            raise ValueError(
                f"sign_seed is drawn anew per call; a recipe's rotation has none: {self.rotation}"
            )
        if self.quantizer is None or self.source == "codes":
            if self.options or self.rotation is not None or (self.quantizer is not None):
                raise ValueError(
                    f"an operand without its own quantizer takes no options or rotation: {self}"
                )
            self._check_delay()
            return
        self.checked(seed=0)
        self._check_delay()

    def _check_delay(self) -> None:
        if self.delayed_amax and not self.can_delay:
            raise ValueError(
                "delayed_amax needs an operand that one amax scales as a whole, which ms_eden, "
                f"row-scaled and high-precision ones are not: {self}"
            )

    @property
    def can_delay(self) -> bool:
        """Whether one amax of the whole tensor scales it, so that an earlier one can."""
        if self.quantizer is None:
            return False
        return not self.rule.rotates and not self.static_options.row_scaled

    def checked(
        self, seed: int | None, rotation: Rotation | None = None, sign_seed: int | None = None
    ) -> Options:
        """The quantiser's ``Options`` for these seeds; an error if it does not take them."""
        assert self.quantizer is not None
        options = dict(self.options)
        quantizer = get_quantizer(self.quantizer)
        return quantizer.check(
            **options, rotation=rotation or self.rotation, seed=seed, sign_seed=sign_seed
        )

    @cached_property
    def rule(self) -> Quantizer:
        """Its quantiser."""
        assert self.quantizer is not None
        return get_quantizer(self.quantizer)

    @cached_property
    def static_options(self) -> Options:
        """Its ``Options`` but for the seeds, which are 0: what is the same in every call."""
        return self.checked(seed=0)

    def options_for(self, seed: Seed, sign_seed: Seed) -> Options:
        """Its ``Options`` with the seeds of a call; the rest is checked once, not per step."""
        static = self.static_options
        rotation = static.rotation
        if rotation is not None and not rotation.fixed:
            rotation = object.__new__(Rotation)
            vars(rotation).update(vars(static.rotation), sign_seed=sign_seed)

        # ``replace`` goes through every field, 7 us where this takes 1; ``kind`` knows no seed
        options = object.__new__(Options)
        vars(options).update(
            vars(static), kind=static.kind, seed=seed, sign_seed=sign_seed, rotation=rotation
        )
        return options

    @cached_property
    def quantized(self) -> bool:
        """Whether this operand reaches the GEMM as NVFP4."""
        return self.quantizer is not None or self.source == "codes"

    @cached_property
    def rotation_key(self) -> tuple[int, int, bool] | None:
        """(group, rounds, fixed) of its rotation, or None: must be equal on both operands."""
        if self.quantizer is None:
            return None
        rotation = self.static_options.rotation
        return None if rotation is None else (rotation.group, rotation.rounds, rotation.fixed)

    @cached_property
    def options_without_noise(self) -> Options | None:
        """Its ``Options`` if it needs no seed, neither for rounding nor for signs; or None."""
        if self.quantizer is None:
            return None
        rotation = self.static_options.rotation
        draws_signs = rotation is not None and not rotation.fixed
        if draws_signs or not self.rule.claims(self.static_options).deterministic:
            return None
        return self.checked(seed=None)

    @cached_property
    def options_given_amax(self) -> Options | None:
        """Its ``Options`` if its codes follow from the matrix and one amax alone; None otherwise.

        A rotated matrix is scaled by what the rotation makes of it, a row-scaled one has an amax
        per row.
        """
        options = self.options_without_noise
        if options is None or options.rotation is not None or options.row_scaled:
            return None
        return options

    def __str__(self) -> str:
        if not self.quantized:
            return "bf16 of decoded" if self.source == "decoded" else "high precision"
        if self.source == "codes":
            return "same codes"
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        rotation = "" if self.rotation is None else f"rot{self.rotation.group} "
        taken = f"({options})" if options else ""
        decoded = " of decoded" if self.source == "decoded" else ""
        delayed = ", amax of the call before" if self.delayed_amax else ""
        return f"{rotation}{self.quantizer}{taken}{decoded}{delayed}"


@dataclass(frozen=True)
class Gemm:
    """The two operands of one GEMM."""

    left: Operand = field(default_factory=Operand)
    right: Operand = field(default_factory=Operand)

    @cached_property
    def quantized(self) -> bool:
        """Whether it runs on NVFP4 operands."""
        return self.left.quantized


@dataclass(frozen=True)
class Recipe:
    """Three GEMMs by name; immutable, compared by value.

    Round-trips through ``to_dict`` and ``from_dict``. Raises ValueError naming the GEMM when a rule
    between fields is broken: both operands quantised or neither (fprop may quantise w alone); equal
    rotations; "codes" only where fprop has 16x16 blocks; "decoded" only of what fprop quantised;
    gradients come as tensors.
    """

    name: str
    fprop: Gemm = field(default_factory=Gemm)
    dgrad: Gemm = field(default_factory=Gemm)
    wgrad: Gemm = field(default_factory=Gemm)

    def __post_init__(self) -> None:
        for gemm in GEMMS:
            self._check_gemm(gemm, getattr(self, gemm))
        if self.fprop.right.delayed_amax:
            raise ValueError(
                f"{self.name}: fprop.right is the weight, whose codes are kept, shared and "
                "exported, so they follow from it alone: delayed_amax is for the other operands"
            )

        # what the backward takes from the forward has to be there, in a form that it can use
        for gemm, operand, saved in (
            ("dgrad", self.dgrad.right, self.fprop.right),
            ("wgrad", self.wgrad.right, self.fprop.left),
        ):
            if operand.source != "tensor" and not saved.quantized:
                problem = f"{gemm}.right uses {operand.source!r}, but fprop does not quantise it"
                raise ValueError(f"{self.name}: {problem}")
            if operand.source == "codes" and saved.rotation_key is not None:
                raise ValueError(
                    f"{self.name}: {gemm}.right uses 'codes', but fprop rotates them along the "
                    f"axis that it contracts ({saved}); use 'decoded' to quantise again"
                )
            if operand.source == "codes" and saved.static_options.block != TILE_BLOCK:
                raise ValueError(
                    f"{self.name}: {gemm}.right uses 'codes', which needs block={TILE_BLOCK} in "
                    "fprop, where a matrix and its transpose share scales; use 'decoded' to "
                    "quantise again"
                )

    def _check_gemm(self, name: str, gemm: Gemm) -> None:
        """ValueError if the two operands of a GEMM do not go together."""
        # a tensor core multiplies two FP4 operands; w alone is decoded again (weights only)
        weights_only = name == "fprop" and gemm.right.quantized
        if gemm.left.quantized != gemm.right.quantized and not weights_only:
            raise ValueError(
                f"{self.name}: {name} quantises one operand only ({gemm.left} / {gemm.right})"
            )

        # (A R)(B R)^T = A B^T
        if gemm.left.rotation_key != gemm.right.rotation_key:
            raise ValueError(
                f"{self.name}: {name} rotates its operands differently (group, rounds, fixed): "
                f"{gemm.left.rotation_key} and {gemm.right.rotation_key}; the rotation only "
                "cancels if they are equal"
            )

        # there are no codes yet of what comes into a GEMM for the first time
        sources = (gemm.left.source, gemm.right.source) if name == "fprop" else (gemm.left.source,)
        if any(source != "tensor" for source in sources):
            raise ValueError(
                f"{self.name}: {name} can only quantise tensors here, got sources {sources}"
            )

    @cached_property
    def quantized(self) -> bool:
        """Whether any GEMM runs on NVFP4 operands, or on weights that went through NVFP4."""
        return self.fprop.right.quantized or any(getattr(self, gemm).quantized for gemm in GEMMS)

    def with_dense_forward(self) -> Recipe:
        """This recipe with a dense fprop: the backward quantises w and x, not their codes."""
        dgrad = Gemm(self.dgrad.left, _of_tensor(self.dgrad.right, self.fprop.right))
        wgrad = Gemm(self.wgrad.left, _of_tensor(self.wgrad.right, self.fprop.left))
        return Recipe(f"{self.name}+bf16_forward", Gemm(), dgrad, wgrad)

    @cached_property
    def delays_amax(self) -> bool:
        """Whether any operand is scaled by the amax of the call before."""
        return any(
            side.delayed_amax
            for g in GEMMS
            for side in (getattr(self, g).left, getattr(self, g).right)
        )

    def with_delayed_amax(self) -> Recipe:
        """This recipe with ``delayed_amax`` on every operand that can have it, but the weight's.

        ValueError if there is none: gradients of ms_eden and row-scaled activations need no amax of
        a whole tensor.
        """
        gemms = {
            name: Gemm(_delayed(gemm.left), gemm.right if name == "fprop" else _delayed(gemm.right))
            for name, gemm in ((name, getattr(self, name)) for name in GEMMS)
        }
        made = Recipe(self.name + DELAYED, **gemms)
        if not made.delays_amax:
            raise ValueError(f"{self.name}: no operand is scaled by one amax that could be delayed")
        return made

    def with_tensor_core_sums(self) -> Recipe:
        """This recipe with ms_eden rotations that may sum on tensor cores (docs/numerics.md).

        ValueError where there is none.
        """
        pairs = {name: getattr(self, name) for name in GEMMS}
        gemms = {
            name: Gemm(_on_tensor_cores(gemm.left), _on_tensor_cores(gemm.right))
            for name, gemm in pairs.items()
        }
        if gemms == pairs:
            raise ValueError(f"{self.name} has no rotation that tensor cores could sum")
        return Recipe(self.name + TENSOR_CORE, **gemms)

    @classmethod
    def from_name(cls, name: str) -> Recipe:
        """The named recipe, "+delayed_amax" or "+tensor_core" behind it; ValueError lists them."""
        known, *additions = name.split("+")
        changes = [_ADDITIONS.get(f"+{each}") for each in additions]
        if known not in RECIPES or None in changes or len(set(additions)) < len(additions):
            raise ValueError(
                f"unknown recipe {name!r}; known: {', '.join(RECIPES)}; behind a name: "
                f"{', '.join(_ADDITIONS)}"
            )
        recipe = RECIPES[known]
        for change in filter(None, changes):
            recipe = change(recipe)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON or YAML."""
        plain = asdict(self)
        for gemm in GEMMS:
            for side in ("left", "right"):
                plain[gemm][side]["options"] = {
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in plain[gemm][side]["options"]
                }
                # what an earlier version wrote, as long as it says everything
                if not plain[gemm][side]["delayed_amax"]:
                    del plain[gemm][side]["delayed_amax"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``; unknown keys raise TypeError."""
        pairs = {gemm: plain[gemm] for gemm in GEMMS if gemm in plain}
        gemms = {
            gemm: Gemm(**{side: _operand(spec) for side, spec in pair.items()})
            for gemm, pair in pairs.items()
        }
        return cls(**{**plain, **gemms})

    @cached_property
    def key(self) -> str:
        """Its name if that says everything, else all of it as JSON; ``from_key`` inverts it."""
        return self.name if RECIPES.get(self.name) == self else json.dumps(self.to_dict())

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> Recipe:
        """The recipe that has this ``key``."""
        return RECIPES[key] if key in RECIPES else Recipe.from_dict(json.loads(key))

    def __str__(self) -> str:
        return f"{self.name}: " + "; ".join(
            f"{g} {getattr(self, g).left} / {getattr(self, g).right}" for g in GEMMS
        )


DELAYED = "+delayed_amax"
"""Behind a recipe's name: ``Recipe.with_delayed_amax``."""

TENSOR_CORE = "+tensor_core"
"""Behind a recipe's name: ``Recipe.with_tensor_core_sums``."""

_ADDITIONS: dict[str, Callable[[Recipe], Recipe]] = {
    DELAYED: Recipe.with_delayed_amax,
    TENSOR_CORE: Recipe.with_tensor_core_sums,
}


def _delayed(spec: Operand) -> Operand:
    """An operand with ``delayed_amax``, or as it is where that has no meaning."""
    return replace(spec, delayed_amax=True) if spec.can_delay else spec


def _of_tensor(spec: Operand, forward: Operand) -> Operand:
    """An operand of the backward that does without the forward's codes: quantised as they were."""
    if spec.source == "codes":  # 16x16 tiles: the transpose has the same codes and scales
        return Operand(forward.quantizer, forward.options)
    return Operand(
        spec.quantizer, spec.options, rotation=spec.rotation, delayed_amax=spec.delayed_amax
    )


def _on_tensor_cores(spec: Operand) -> Operand:
    """An operand whose rotation may sum on tensor cores, if it is one that its quantiser makes."""
    if spec.quantizer is None or "summation" not in spec.rule.options:
        return spec
    options = {**dict(spec.options), "summation": "tensor_core"}
    return replace(spec, options=tuple(options.items()))


def _operand(plain: Mapping[str, Any]) -> Operand:
    """An operand from ``to_dict``'s plain values: lists are tuples again."""
    options = plain.get("options", {})
    options = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
    rotation = None if plain.get("rotation") is None else Rotation(**plain["rotation"])
    return Operand(**{**plain, "options": tuple(options.items()), "rotation": rotation})


def operand(
    quantizer: str | None,
    *,
    source: OperandSource = "tensor",
    rotation: Rotation | None = None,
    **options: Any,
) -> Operand:
    """``Operand`` with options as keywords: ``operand("ms_eden", source="decoded", rounds=2)``."""
    return Operand(quantizer, tuple(options.items()), source, rotation)


def as_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe from its name, or itself; TypeError for anything else."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.from_name(recipe)
    raise TypeError(
        f"recipe must be a name ({', '.join(RECIPES)}) or a Recipe, got {type(recipe).__name__}"
    )


_NVIDIA_ROT16 = Rotation(group=16, fixed=True)
_RANDOM_ROT16 = Rotation(group=16)
_SAME_CODES = operand(None, source="codes")
_DEQUANTISED = Gemm(operand(None), operand(None, source="decoded"))
_NVIDIA_DGRAD = Gemm(operand("sr_te"), _SAME_CODES)
_NVIDIA_WGRAD = Gemm(
    operand("sr_te", rotation=_NVIDIA_ROT16), operand("rtn", rotation=_NVIDIA_ROT16)
)


def _requantised(quantizer: str, rotation: Rotation | None = None, **options: Any) -> Gemm:
    """The gradient and the decoded forward operand through the same quantiser."""
    right = operand(quantizer, source="decoded", rotation=rotation, **options)
    return Gemm(operand(quantizer, rotation=rotation, **options), right)


def _both(quantizer: str, **options: Any) -> Gemm:
    """The same quantiser on both sides, each from its tensor."""
    return Gemm(operand(quantizer, **options), operand(quantizer, **options))


_TETRAJET = _requantised("sr", _RANDOM_ROT16)
_QUARTET = _requantised("ms_eden")
_SEARCH_EDEN = _requantised("ms_eden", rounds=2, search=True)

# the best three of each: benchmarks/bench_searches.py
_THREE_SCALES = _both("scale_search", candidates=(0, -1, 5))
_THREE_FACTORS = _requantised("ms_eden", rounds=2, search=True, factors=(1.0, 0.9375, 1.5))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("bf16"),
        Recipe("rtn", _both("rtn"), _both("rtn"), _both("rtn")),
        Recipe("nvidia", Gemm(operand("rtn"), operand("rtn_2d")), _NVIDIA_DGRAD, _NVIDIA_WGRAD),
        Recipe(
            "four_over_six",
            Gemm(operand("four_over_six"), operand("four_over_six", block=TILE_BLOCK)),
            _NVIDIA_DGRAD,
            _NVIDIA_WGRAD,
        ),
        Recipe("tetrajet2", _both("rtn"), _TETRAJET, _TETRAJET),
        Recipe("quartet2", _both("four_over_six"), _QUARTET, _QUARTET),
        Recipe("search_eden", _both("scale_search"), _SEARCH_EDEN, _SEARCH_EDEN),
        Recipe("search_eden_3", _THREE_SCALES, _THREE_FACTORS, _THREE_FACTORS),
        Recipe(
            "rl",
            Gemm(operand("four_over_six", row_scaled=True), operand("four_over_six")),
            _DEQUANTISED,
            _DEQUANTISED,
        ),
    )
}
"""The recipes by name.

Sources: nvidia, arXiv 2509.25149; four_over_six, 2512.02010; tetrajet2, 2510.27527; quartet2,
2601.22813; search_eden, search_eden_3 and rl are ours.
"""

W4A16 = Recipe("w4a16", Gemm(operand(None), operand("four_over_six")), _DEQUANTISED, Gemm())
"""Weights only, as QeRL has it (arXiv 2510.11696): x stays as it is, GEMMs take decoded weights."""
