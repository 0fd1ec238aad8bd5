"""A program for compute-sanitizer and ncu to look at.

    python -m benchmarks.gpu.small_case BACKEND CASE SETTINGS

BACKEND   cuda or triton
CASE      small: every quantiser in three dtypes and both orientations on small ragged matrices;
          with triton, which would compile for minutes, three quantisers in BF16
          rtn, ms_eden, both, amax: one call of that kind on a matrix of 8192 x 8192, which alone is
          profiled
SETTINGS  a JSON object with kind and scale, as in ``settings.Settings``

Prints "ran" at its end, and "not here: REASON" where the backend cannot run.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.gpu.checks import DTYPES, case_of
from benchmarks.gpu.processes import Skip, Unit
from benchmarks.gpu.settings import Settings
from nvfp4.backends.base import Backend
from nvfp4.bench.cases import QUANTISERS, matrix
from nvfp4.bench.timing import Run

SHAPES = ((17, 33), (130, 100))
FEW = ("rtn", "sr", "ms_eden(1)")


def small(chip: Backend, place: Any) -> None:
    """Every quantiser on ragged matrices."""
    few = chip.name == "triton"
    shapes = SHAPES[:1] if few else SHAPES
    dtypes = [torch.bfloat16] if few else list(DTYPES.values())

    # Triton compiles each case for seconds, under the sanitizer for longer.
    for name in FEW if few else QUANTISERS:
        case = case_of(name)
        if chip.refuses("quantize", *case) is not None:
            continue
        for shape in shapes:
            for dtype in dtypes:
                x = matrix(*shape, dtype=dtype).to(place.device)
                q, _ = chip.quantize_both(x, case, case)
                chip.quantize(x.t(), *case)
                if q.rotation is None:
                    chip.requantize(q, *case)
                    chip.dequantize(q, torch.bfloat16)
    place.synchronize()


def one_call(chip: Backend, place: Any, what: str) -> None:
    """One call of a kind at full size, after one that compiles and warms up."""
    n = place.size(8192)
    x = torch.randn(n, n, device=place.device).bfloat16()
    rtn, eden = case_of("rtn"), case_of("ms_eden(1)")
    runs: dict[str, Run] = {
        "rtn": lambda: chip.quantize(x, *rtn),
        "ms_eden": lambda: chip.quantize(x, *eden),
        "both": lambda: chip.quantize_both(x, eden, eden),
        # its first kernel is the amax of both orientations
        "amax": lambda: chip.quantize_both(x, rtn, rtn),
    }
    runs[what]()
    place.profiled(runs[what])


def main() -> int:
    """What the command line says."""
    backend, what, text = sys.argv[1:]
    settings = Settings(call=2, folder=".", **json.loads(text))
    settings.enter(Unit(what, ""))
    place = settings.place
    try:
        chip = place.backend(backend)
    except Skip as reason:
        print(f"not here: {reason}", flush=True)
        return 0
    if what == "small":
        small(chip, place)
    else:
        one_call(chip, place, what)
    print("ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
