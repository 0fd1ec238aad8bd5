"""Time of every quantiser against a copy of the bytes it must move, on each instruction set of a processor.

The copy, the quantiser on every instruction set and its peers take turns, so that a drifting machine moves them alike;
each is first held equal to the reference, bit for bit. Figures are milliseconds and multiples of the copy.
``python -m benchmarks.bench_quantize --help`` lists the options.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import gate, show
from nvfp4.backends.base import Backend
from nvfp4.backends.native.cpu import instruction_sets, use_instruction_set
from nvfp4.backends.registry import BACKENDS
from nvfp4.bench.cases import QUANTISERS
from nvfp4.bench.timing import copier, interleaved
from nvfp4.quantizers.registry import get_quantizer


def peer(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """torchao's NVFP4 quantiser, amax included, where it is installed."""
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    except ImportError:
        return {}
    return {"torchao": lambda: NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))}


def held(isa: str, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` on an instruction set of the processor; "" leaves things as they are."""

    def on_that() -> object:
        if isa:
            use_instruction_set(isa)
        return run()

    return on_that


def candidates(backend: Backend, x: torch.Tensor, name: str) -> dict[str, Callable[[], object]]:
    """What is timed of one quantiser: x, x^T, both from one read, and the transpose from codes."""
    quantizer_name, options = QUANTISERS[name]
    quantizer, rtn = get_quantizer(quantizer_name), get_quantizer("rtn")
    pair = (quantizer, quantizer.check(seed=1, sign_seed=2, **options))
    saved = backend.quantize(x, rtn, rtn.check())
    return {
        "row-wise": lambda: backend.quantize(x, *pair),
        "transposed": lambda: backend.quantize(x.t(), *pair),
        "both": lambda: backend.quantize_both(x, pair, pair),
        "from codes": lambda: backend.requantize(saved, *pair),
    }


def rows_of(backend: Backend, x: torch.Tensor, name: str, isas: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row per instruction set, all timed in turns; nothing is timed that differs from the reference."""
    quantizer_name, options = QUANTISERS[name]
    quantizer = get_quantizer(quantizer_name)
    checked = quantizer.check(seed=1, sign_seed=2, **options)
    expected = BACKENDS["reference"].quantize(x, quantizer, checked)
    runs: dict[str, Callable[[], object]] = {}
    for isa in isas:
        if isa:
            use_instruction_set(isa)
        q = backend.quantize(x, quantizer, checked)
        gate(all(torch.equal(a, b) for a, b in zip(q.tensors, expected.tensors, strict=True)), f"{name} {isa}")
        runs |= {f"{what} {isa}": held(isa, run) for what, run in candidates(backend, x, name).items()}

    # amax reads the input, the quantiser reads it again and writes 4.5 bits an element; ms_eden reads it once
    reads = 1 if quantizer.rotates else 2
    copy = copier(int(x.numel() * (reads * x.element_size() + 9 / 16)))
    ms = interleaved({"copy": copy, **runs, **(peer(x) if name == "rtn" else {})}, seconds)
    return [
        {
            "quantiser": name,
            **({"instruction set": isa} if isa else {}),
            "copy ms": ms["copy"],
            "row-wise ms": ms[f"row-wise {isa}"],
            "x copy": ms[f"row-wise {isa}"] / ms["copy"],
            "transposed ms": ms[f"transposed {isa}"],
            "x copy (transposed)": ms[f"transposed {isa}"] / ms["copy"],
            "both ms": ms[f"both {isa}"],
            "from codes ms": ms[f"from codes {isa}"],
            "torchao ms": ms.get("torchao", math.nan),
        }
        for isa in isas
    ]


def main() -> None:
    """Parse, gate, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="cpu", choices=list(BACKENDS))
    parser.add_argument("--isa", nargs="*", help="instruction sets of backend cpu; by default all but portable ones")
    parser.add_argument("--only", nargs="*", default=list(QUANTISERS), choices=list(QUANTISERS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    args = parser.parse_args()
    x = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(getattr(torch, args.dtype))
    isas: Sequence[str] = ("",)
    if args.backend == "cpu":
        isas = args.isa or [isa for isa in instruction_sets() if isa != "portable"] or ["portable"]
    rows = [row for name in args.only for row in rows_of(BACKENDS[args.backend], x, name, isas, args.seconds)]
    if args.backend == "cpu":
        use_instruction_set()
    show(f"{args.size} x {args.size} {args.dtype}, backend {args.backend}", rows, args.keep)


if __name__ == "__main__":
    main()
