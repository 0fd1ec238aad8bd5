"""The quantising kernels in every form in which recipes launch them, for ``aot`` to compile.

kernel_variants    the rules of the named recipes on BF16, its transpose, tile codes, and both
                   orientations in one read
all_variants       every rule on every source and dtype, which the tests launch over no driver
roofline_variants  what the named recipes launch per layer, which ``instructions`` counts

A form is what Triton specialises a kernel on: the rule with its options, the kind of source, the
tile, which pointers are absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from triton import next_power_of_2

from nvfp4.backends.triton import transpose
from nvfp4.backends.triton.gemm import decoded
from nvfp4.backends.triton.operands import SCALES, converts, policy_of
from nvfp4.backends.triton.quantize import kernels
from nvfp4.backends.triton.quantize.launch import DECODING
from nvfp4.backends.triton.quantize.policy import (
    Coded,
    Policy,
    tile_along,
    tile_down,
    tile_of_peak,
    tiles_of_both,
)
from nvfp4.backends.triton.quantize.rules import scaled_by_amax
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.layout import SWIZZLED_MAJORS
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import GEMMS
from tools.machine_code import E2M1_CONVERSION

ELEMENTS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_POINTERS = {
    "x_scale": "*u8",
    "x_global": "*fp32",
    "seen": "*i32",
    "peak": "*i32",
    "codes": "*i32",
    "block_scale": "*u8",
    "global_scale": "*fp32",
    "swizzled": "*u8",
    "lengths": "*fp32",
    "words": "*i64",
    "seeds": "*i64",
}
_FIXED = Rotation(16, fixed=True)

SIDE = 8192
"""Rows and columns of the operand that variants are compiled for."""


CANDIDATES = ((0, -1, 4, 5), (0, -1, 5), (0, 5))
FACTORS = ((1.0, 0.9375, 1.4375, 1.5625), (1.0, 0.9375, 1.5), (1.0, 1.5))
"""What a search tries beside the default: of four, three and two the best."""


def policies(capability: int) -> dict[str, Policy]:
    """Compiled for on a card: every rule with each of its options, and the recipes' rotations."""
    options: list[tuple[str, dict[str, Any]]] = [("rtn_2d", {})]
    for name in ("rtn", "sr", "sr_te"):
        options += [
            (name, o)
            for o in (
                {},
                {"row_scaled": True},
                {"rotation": _FIXED},
                {"rotation": Rotation(16, 1, 0)},
            )
        ]

    # 16x16 blocks, whose codes serve x and x^T.
    for name in ("sr", "sr_te", "scale_search"):
        options.append((name, {"block": TILE_BLOCK}))
    options += [("scale_search", o) for o in ({}, {"row_scaled": True})]
    options += [("four_over_six", o) for o in ({}, {"metric": "mae"}, {"metric": "abs_max"})]
    options += [("four_over_six", o) for o in ({"block": TILE_BLOCK}, {"row_scaled": True})]

    # MS-EDEN by its rounds and groups, and as the default recipe has it.
    options += [("ms_eden", {"rounds": rounds}) for rounds in (1, 2, 3)]
    options += [("ms_eden", {"group": group}) for group in (16, 32, 64)]
    options.append(("ms_eden", {"rounds": 2, "search": True}))
    table = _labelled(options, capability)

    # scaled by the amax of an earlier call
    table |= {f"{label}{HELD}": table[label]._replace(held=True) for label in DELAYED}
    return table


def searches(capability: int) -> dict[str, Policy]:
    """Of fewer scales to choose among the best sets, by their number."""
    options: list[tuple[str, dict[str, Any]]] = []
    options += [("scale_search", {"candidates": steps}) for steps in CANDIDATES]
    options += [("ms_eden", {"rounds": 2, "search": True, "factors": k}) for k in FACTORS]
    return _labelled(options, capability)


def _labelled(options: list[tuple[str, dict[str, Any]]], capability: int) -> dict[str, Policy]:
    """Policies by quantiser and options.

    Checked as a recipe's are, so that no policy is listed that none can have.
    """
    table = {}
    for name, settings in options:
        label = "_".join([name, *(f"{key}={_label(value)}" for key, value in settings.items())])
        checked = QUANTIZERS[name].check(seed=0, sign_seed=0, **settings)
        table[label] = policy_of(QUANTIZERS[name], checked, converts(capability))
    return table


HELD = "_held"
"""Behind the label of a policy whose amax is held."""

DELAYED = (
    "rtn",
    "rtn_2d",
    "rtn_rotation=nvidia",
    "sr_te",
    "sr_te_rotation=nvidia",
    "sr_rotation=16x1",
    "four_over_six",
    "scale_search",
)
"""Policies of which recipes may delay the amax, as ``Recipe.with_delayed_amax`` has them."""


def _label(value: object) -> str:
    if isinstance(value, Rotation):
        return "nvidia" if value.fixed else f"{value.group}x{value.rounds}"
    return "tile" if value == TILE_BLOCK else str(value)


COMPILED = (
    "rtn",
    "rtn_2d",
    "rtn_rotation=nvidia",
    "sr_te",
    "sr_te_rotation=nvidia",
    "sr_rotation=16x1",
    "four_over_six",
    "four_over_six_block=tile",
    "scale_search",
    "ms_eden_rounds=1",
    "ms_eden_rounds=2_search=True",
)
"""Policies of the named recipes alone, with which ``aot`` takes half an hour of a core."""


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What ``aot`` compiles: the recipes' policies on BF16, its transpose, codes, and both at once.

    few: the few that the tests compile.
    """
    table = policies(capability)
    variants: list[KernelVariant] = []
    for label in ("rtn", "ms_eden_rounds=1") if few else COMPILED:
        for source in ("bfloat16",) if few else ("bfloat16", "bfloat16^T", "tile_codes"):
            variants += (
                v
                for v in _single(label, table[label], source)
                if v.kernel is kernels.quantize_kernel
            )

    # Blackwell alone: there scales are also written in the order of its tensor cores.
    if not few and capability // 10 in SWIZZLED_MAJORS:
        for label in (label for label in COMPILED if scaled_by_amax(table[label].rule)):
            swizzled = _single(label, table[label], "bfloat16", swizzled=True)
            variants += (v for v in swizzled if v.kernel is kernels.quantize_kernel)
    if not few:
        variants += (
            v
            for v in _both(table, (*BOTH, *BOTH_HELD))
            if v.name.endswith("of bfloat16") and v.kernel is kernels.quantize_both_kernel
        )
        for label in (f"{label}{HELD}" for label in DELAYED):
            variants += (
                v
                for v in _single(label, table[label], "bfloat16")
                if v.kernel is kernels.quantize_kernel
            )
    variants += list(_scales())[:1]
    variants += list(_decoding())[:1]
    variants += (v for v in _seeds(table) if v.kernel is not kernels.amax_kernel)
    return variants


def all_variants() -> Iterator[KernelVariant]:
    """All of them, the same for every card.

    Each policy on each kind of source, pairs of orientations, scales, decoding, seeds.
    """
    table = policies(capability=90)
    for label, policy in table.items():
        for source in (
            *ELEMENTS,
            *(f"{name}^T" for name in ELEMENTS),
            "codes",
            "tile_codes",
            "row_scaled_codes",
        ):
            yield from _single(label, policy, source)
    yield from _both(table, (*BOTH, *BOTH_HELD))
    yield from _scales()
    yield from _decoding()
    yield from _seeds(table)


ROOFLINE_SINGLE = (
    ("rtn", "bfloat16"),
    ("four_over_six", "bfloat16"),
    ("scale_search", "bfloat16"),
    ("ms_eden_rounds=1", "bfloat16"),
    ("ms_eden_rounds=1", "codes"),
    ("ms_eden_rounds=2_search=True", "bfloat16"),
    ("ms_eden_rounds=2_search=True", "bfloat16^T"),
    ("ms_eden_rounds=2_search=True", "codes"),
    ("rtn_2d", "bfloat16"),
    ("sr_te", "bfloat16"),
    ("rtn", "bfloat16^T"),
    ("ms_eden_rounds=1", "bfloat16^T"),
    ("ms_eden_rounds=2", "bfloat16"),
    ("four_over_six_block=tile", "bfloat16"),
    ("four_over_six_row_scaled=True", "bfloat16"),
    ("sr_rotation=16x1", "codes"),
    *((f"scale_search_candidates={steps}", "bfloat16") for steps in CANDIDATES),
    *((f"ms_eden_rounds=2_search=True_factors={k}", "bfloat16") for k in FACTORS),
    *((f"ms_eden_rounds=2_search=True_factors={FACTORS[1]}", f) for f in ("bfloat16^T", "codes")),
)
"""Rules and sources of one orientation, as a layer's forward and backward have them."""

ROOFLINE_BOTH = (
    ("rtn", "rtn"),
    ("rtn", "rtn_rotation=nvidia"),
    ("sr_te", "sr_te_rotation=nvidia"),
    ("ms_eden_rounds=1", "ms_eden_rounds=1"),
    ("four_over_six", "rtn_rotation=nvidia"),
    ("sr_rotation=16x1", "sr_rotation=16x1"),
)
"""Rules of x and of x^T, read once."""


def roofline_variants(capability: int) -> list[KernelVariant]:
    """What layers launch on BF16 in the named recipes, but for products of codes."""
    table = policies(capability) | searches(capability)
    variants: list[KernelVariant] = []
    for label, source in ROOFLINE_SINGLE:
        variants += _single(label, table[label], source)
    variants += (v for v in _both(table, ROOFLINE_BOTH) if v.name.endswith("of bfloat16"))
    variants += list(_scales())[:1]
    variants += (v for v in _decoding() if " to bfloat16" in v.name)
    variants += transpose.kernel_variants(capability, few=True)
    variants += (
        v for v in decoded.kernel_variants(capability, few=False) if v.name.endswith(": bf16")
    )
    return variants


def _single(
    label: str, policy: Policy, source: str, in_memory: bool = False, swizzled: bool = False
) -> Iterator[KernelVariant]:
    """amax and quantise of one orientation.

    source: a dtype, a dtype with ^T, or a kind of codes. in_memory: seeds are on the device, for
    CUDA graphs. swizzled: scales are also written as tensor cores read them.
    """
    coded = (
        Coded(16 if source == "tile_codes" else 1, source == "row_scaled_codes")
        if "codes" in source
        else None
    )
    down = coded is not None or source.endswith("^T")
    tile = tile_down(policy, coded is not None) if down else tile_along(policy)
    constants: dict[str, Any] = {"P": policy, "CODED": coded, "T": tile} | (
        {} if swizzled else {"swizzled": None}
    )
    if not policy.held:
        constants |= {"seen": None}

    # A contiguous axis has stride 1, which Triton specialises on.
    constants |= {"stride_row" if down else "stride_column": 1}
    if coded is None:
        constants |= {"x_scale": None, "x_global": None}
    pointers = {"x": "*u8" if coded is not None else ELEMENTS[source.removesuffix("^T")]}
    if not scaled_by_amax(policy.rule):
        pointers["block_scale"] = "*fp32"

    # Seeds on the device are read by the kernel; otherwise they are numbers of the launch.
    if in_memory:
        pointers |= dict.fromkeys(("seed_low", "sign_low"), "*i64")
        constants |= dict.fromkeys(("seed_high", "sign_high"))
    for kernel in (kernels.amax_kernel, kernels.quantize_kernel):
        if kernel is kernels.quantize_kernel or _looks(policy):
            seeds = ", seeds in memory" if in_memory else ""
            order = ", swizzled" if swizzled else ""
            name = f"{label} of {source}{seeds}{order}"
            how: dict[str, Any] = constants | {"T": tile.of(policy, SIDE, SIDE)}
            if kernel is kernels.amax_kernel:
                how = constants | {"T": tile}
                if coded is None and policy.is_bare:  # read along memory, whichever way it lies
                    bits = int(source.removesuffix("^T")[-2:])
                    how |= {"T": tile_of_peak(policy, tile, bits), "stride_column": 1}
                    how.pop("stride_row", None)
            yield _variant(name, kernel, tile.warps, pointers, how)


BOTH = (
    ("rtn", "rtn"),
    ("rtn", "rtn_rotation=nvidia"),
    ("rtn_2d", "rtn_2d"),
    ("sr_te", "sr_te_rotation=nvidia"),
    ("sr_rotation=16x1", "sr_rotation=16x1"),
    ("four_over_six", "four_over_six"),
    ("ms_eden_rounds=1", "ms_eden_rounds=1"),
)
"""Rules of x and of x^T that ``kernel_variants`` and ``all_variants`` list."""

BOTH_HELD = (
    ("rtn_held", "rtn_rotation=nvidia_held"),
    ("sr_te_held", "sr_te_rotation=nvidia_held"),
    ("four_over_six_held", "rtn_rotation=nvidia_held"),
    ("sr_rotation=16x1_held", "sr_rotation=16x1_held"),
)
"""The same with held amaxes, for x and dy of the recipes that scale both orientations by them."""


def _looks(policy: Policy) -> bool:
    """Whether a launch before the quantising one looks for the amax."""
    return scaled_by_amax(policy.rule) and not policy.held


def _both(
    table: dict[str, Policy], pairs: Sequence[tuple[str, str]] = BOTH
) -> Iterator[KernelVariant]:
    for (left, right), (dtype, element) in product(pairs, ELEMENTS.items()):
        rows, columns = table[left], table[right]
        tiles = tiles_of_both(rows, columns)
        constants: dict[str, Any] = {
            "P_ROWS": rows,
            "P_COLUMNS": columns,
            "T_ROWS": tiles[0],
            "T_COLUMNS": tiles[1],
        }
        pointers = {"x": element}

        # Each orientation has its own outputs. MS-EDEN's scales wait as float32 for the range.
        for side, policy in (("rows", rows), ("columns", columns)):
            pointers |= {
                f"{name}_{side}": _POINTERS[name]
                for name in ("peak", "codes", "block_scale", "global_scale")
            }
            if not scaled_by_amax(policy.rule):
                pointers[f"block_scale_{side}"] = "*fp32"
            if policy.held:
                pointers[f"seen_{side}"] = _POINTERS["seen"]
            else:
                constants[f"seen_{side}"] = None

        # No amax where both rules find their scales themselves.
        for kernel in (kernels.amax_both_kernel, kernels.quantize_both_kernel):
            if kernel is kernels.quantize_both_kernel or _looks(rows) or _looks(columns):
                name = f"{left} and {right}^T of {dtype}"
                yield _variant(
                    name, kernel, tiles[0].warps, pointers, constants | {"stride_column": 1}
                )


def _scales() -> Iterator[KernelVariant]:
    for swizzled in (False, True):
        constants = {"ALIGNED": True, "T": SCALES}
        constants |= {} if swizzled else {"swizzled": None}
        name = f"ms_eden, {'swizzled' if swizzled else 'row-major'} scales"
        yield _variant(name, kernels.finish_kernel, SCALES.warps, {}, constants)


def _seeds(table: dict[str, Policy]) -> Iterator[KernelVariant]:
    """What CUDA graphs need: seeds made on the device, and one kernel that finds its own there."""
    gemms = len(GEMMS)
    yield _variant(
        "of three GEMMs",
        kernels.seeds_kernel,
        1,
        {},
        {"GEMMS": gemms, "COUNT": next_power_of_2(gemms)},
    )
    yield from _single("sr_rotation=16x1", table["sr_rotation=16x1"], "bfloat16", in_memory=True)


def _decoding() -> Iterator[KernelVariant]:
    rows, columns, warps = DECODING
    for (dtype, element), tile, row_scaled, with_global in product(
        ELEMENTS.items(), (1, 16), (False, True), (False, True)
    ):
        # row scales come with blocks of 1x16 alone, and are global scales
        if row_scaled and (tile == 16 or not with_global):
            continue
        constants = {"CODED": Coded(tile, row_scaled), "R": rows, "C": columns}
        if not with_global:
            constants |= {"global_scale": None}
        scaled, without = "rows" if row_scaled else "tensor", "" if with_global else ", no global"
        name = f"{scaled} of {tile}x16 to {dtype}{without}"
        yield _variant(
            name, kernels.decode_kernel, warps, {"codes": "*u8", "out": element}, constants
        )


def _variant(
    name: str, kernel: Any, warps: int, pointers: dict[str, str], constants: dict[str, Any]
) -> KernelVariant:
    """The constants that the kernel has; of its other arguments pointers, and 32-bit numbers.

    A kernel that rounds an operand to nearest has to use the card's conversion, if it has one.
    """
    types = _POINTERS | pointers
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    operands = [value for value in constants.values() if isinstance(value, Policy)]
    converts = any(each.converts and each.rule not in ("sr", "sr_te") for each in operands)
    return KernelVariant(
        f"{kernel.__name__}: {name}",
        kernel,
        {key: types.get(key, "i32") for key in kernel.arg_names if key not in constants},
        constants,
        warps,
        instruction=E2M1_CONVERSION if converts else None,
        divides=True,
    )
