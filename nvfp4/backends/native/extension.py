"""What the compiled extensions have in common: the numbers of their enums, and why one is missing.

They use no header of torch: pointers, sizes and small numbers are all that passes, so one build
serves every version of torch. The price is that nothing checks them on the way. What passes is made
in one place for each kind, with ``INTERFACE`` to refuse an extension of other sources.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from nvfp4.backends.native.cuda_targets import MISSING_FILE
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import element_scale
from nvfp4.quantizers.base import METRICS, Options, Quantizer

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {
    "rtn": 0,
    "rtn_2d": 0,
    "sr": 1,
    "sr_te": 2,
    "four_over_six": 3,
    "scale_search": 4,
    "ms_eden": 5,
}
"""Numbers of ``enum class Rule`` and ``enum class Element`` in csrc/operands.h."""


INTERFACE = 5
"""``kInterface`` in csrc/interface.h, as these sources have it."""


def load(name: str, kind: str, needs: str) -> tuple[ModuleType | None, str | None]:
    """The extension module ``name`` and None, or None and why it is missing.

    kind: of extension, in words; needs: to build it. One that was built from other sources than
    these is as good as missing: it would fail in the middle of a call.
    """
    # not there, or there and not to be loaded (another Python, another C library)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        reason = (
            "it was not built"
            if isinstance(error, ModuleNotFoundError)
            else f"it does not load: {error}"
        )
        why = why_not_built(name.rpartition("_")[2], Path(__file__).parents[2])
        return None, f"the {kind} extension is missing, {reason}; reinstall with {needs}{why}"

    # there, but not of these sources
    if getattr(module, "interface", None) != INTERFACE:
        reason = f"was built from older or newer sources than {__name__}"
        return (
            None,
            f"the {kind} extension ({module.__file__}) {reason}; build it again, with {needs}",
        )
    return module, None


def why_not_built(kind: str, folder: Path) -> str:
    """What setup.py wrote into ``folder`` when it did not build an extension, in brackets, or "".

    kind: "cpu" or "cuda". folder: of the package.
    """
    try:
        return (
            f" (when it was installed, {(folder / MISSING_FILE.format(kind)).read_text().strip()})"
        )
    except OSError:
        return ""


def rule_numbers(
    native: ModuleType, quantizer: Quantizer, options: Options
) -> tuple[int, int, bool, bool, bool, object]:
    """What an extension is told of a method first: rule, metric, tiles, rows, search, trials."""
    key = (native, quantizer.name, options.kind)
    numbers = _NUMBERS.get(key)
    if numbers is None:
        numbers = _NUMBERS[key] = _rule_numbers(native, quantizer, options)
    return numbers


_NUMBERS: dict[tuple[ModuleType, str, str], tuple[int, int, bool, bool, bool, object]] = {}
"""What ``rule_numbers`` gave, by all that it depends on: five times per step of a layer."""


def _rule_numbers(
    native: ModuleType, quantizer: Quantizer, options: Options
) -> tuple[int, int, bool, bool, bool, object]:
    """``rule_numbers``, worked out."""
    rule, tiles = RULES[quantizer.name], options.block == TILE_BLOCK
    factors = options.factors if options.search else ()
    trials = _trials(native, rule, options.candidates, factors)
    metric = METRICS.index(options.metric)
    return rule, metric, tiles, options.row_scaled, options.search, trials


@lru_cache(maxsize=64)
def _trials(
    native: ModuleType, rule: int, candidates: tuple[int, ...], factors: tuple[float, ...]
) -> object:
    """What a rule tries: steps of a scale byte, or scales of the elements with their inverses."""
    values: list[tuple[float, float]] = []
    if rule == RULES["scale_search"]:
        values = [(step, 0.0) for step in candidates]
    elif rule == RULES["ms_eden"]:
        values = [element_scale(factor) for factor in factors]
    return native.Trials([value for value, _ in values], [inverse for _, inverse in values])


def contiguous(q: QTensor) -> QTensor:
    """q over plain memory; whoever takes pointers from it has to keep it alive."""
    # one after the other: to loop over them took five times as long, and each product asks twice
    if q.codes.is_contiguous() and q.block_scale.is_contiguous() and q.global_scale.is_contiguous():
        return q

    # swizzled scales stay behind: no kernel here reads them
    codes, block_scale, global_scale = (t.contiguous() for t in q.tensors)
    return QTensor(codes, block_scale, global_scale, *q.record)


def code_matrix(native: ModuleType | None, q: QTensor, with_global: bool = True) -> object:
    """What the kernels are told of q, which must be ``contiguous``."""
    assert native is not None
    codes, block_scale, global_scale = q.codes, q.block_scale, q.global_scale
    return native.CodeMatrix(
        codes.data_ptr(),
        block_scale.data_ptr(),
        global_scale.data_ptr() if with_global else 0,
        *codes.shape,
        block_scale.shape[1],
        q.block[0],
        global_scale.numel() != 1,
    )
