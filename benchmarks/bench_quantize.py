"""Time of every quantiser against a copy of the bytes it must move, on each instruction set.

    row-wise      codes of x                    both         codes of x and x^T from one read
    transposed    codes of x^T                  from codes   codes of x^T from codes of x

The copy, the quantiser on every instruction set and its peers take turns, so that a drifting
machine moves them alike; each is first held equal to the reference, bit for bit
(``nvfp4/bench/gates.py``). Figures are milliseconds, and multiples of the copy. Compare multiples:
with AVX2, rtn took 2.4, 2.1, 1.4 and 3.1 copies in four windows of a shared machine, and the copy
itself 2.3 to 14 ms.

    python -m benchmarks.bench_quantize --only rtn sr --isa avx512 avx2 --keep quantize

measures two of the quantisers and leaves the other rows of results/quantize.json as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.harness import gate, options, show
from nvfp4.backends.base import Backend
from nvfp4.backends.native.cpu import instruction_sets, use_instruction_set
from nvfp4.backends.registry import BACKENDS
from nvfp4.bench.cases import QUANTISERS, matrix, quantiser
from nvfp4.bench.gates import fault_of
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import CPU, Run, copier, interleaved
from nvfp4.quantizers.registry import get_quantizer

GATED_ROWS = 144
"""Of the matrix to be timed: a tile of 128 and a ragged one; the reference is slow."""


def peer(x: torch.Tensor) -> dict[str, Run]:
    """torchao's NVFP4 quantiser, amax included, where it is installed."""
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    except ImportError:
        return {}

    def to_nvfp4() -> object:
        scale = per_tensor_amax_to_scale(x.abs().amax())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)

    return {"torchao": to_nvfp4}


def candidates(backend: Backend, x: torch.Tensor, name: str, isa: str) -> dict[str, Run]:
    """What is timed of one quantiser on an instruction set, by name.

    Rows of x, those of x^T, both from one read of x, and those of x^T from codes of x.
    """
    case, rtn = quantiser(name), get_quantizer("rtn")
    saved = backend.quantize(x, rtn, rtn.check())

    # The instruction set is chosen in each run: another candidate has had its turn in between.
    def held(run: Run) -> Run:
        def on_that_isa() -> object:
            hold(isa)
            return run()

        return on_that_isa

    return {
        f"row-wise {isa}": held(lambda: backend.quantize(x, *case)),
        f"transposed {isa}": held(lambda: backend.quantize(x.t(), *case)),
        f"both {isa}": held(lambda: backend.quantize_both(x, case, case)),
        f"from codes {isa}": held(lambda: backend.requantize(saved, *case)),
    }


def hold(isa: str) -> None:
    """Keep our kernels to an instruction set; "" leaves things as they are."""
    if isa:
        use_instruction_set(isa)


def rows_of(
    backend: Backend, x: torch.Tensor, name: str, isas: Sequence[str], seconds: float
) -> list[Row]:
    """One row per instruction set, all timed in turns; nothing is timed that is wrong."""
    case = quantiser(name)
    runs: dict[str, Run] = {"copy": copier(case.bytes_moved(x))}
    for isa in isas:
        hold(isa)
        fault = fault_of(backend, case, x[:GATED_ROWS], CPU)
        gate(fault is None, f"{name} {isa}: {fault}")
        runs |= candidates(backend, x, name, isa)
    if name == "rtn":
        runs |= peer(x)

    # All in one call: two calls minutes apart are two machines.
    ms = interleaved(runs, seconds)
    return [
        {
            "quantiser": name,
            "instruction set": isa or "-",
            "copy ms": ms["copy"],
            "row-wise ms": ms[f"row-wise {isa}"],
            "x copy": ms[f"row-wise {isa}"] / ms["copy"],
            "transposed ms": ms[f"transposed {isa}"],
            "x copy (transposed)": ms[f"transposed {isa}"] / ms["copy"],
            "both ms": ms[f"both {isa}"],
            "from codes ms": ms[f"from codes {isa}"],
            **({"torchao ms": ms["torchao"]} if "torchao" in ms else {}),
        }
        for isa in isas
    ]


def main() -> None:
    """Parse, gate, time, show."""
    parser = options(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes)
    parser.add_argument("--backend", default="cpu", choices=list(BACKENDS))
    usual = "instruction sets of backend cpu; by default all but portable ones"
    parser.add_argument("--isa", nargs="*", help=usual)
    names = list(QUANTISERS)
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate")
    args = parser.parse_args()

    x = matrix(args.size, args.size, dtype=getattr(torch, args.dtype))

    # Portable kernels only if asked for: they take three to four times AVX-512's cycles.
    isas: Sequence[str] = ("",)
    if args.backend == "cpu":
        vectors = [isa for isa in instruction_sets() if isa != "portable"]
        isas = args.isa or vectors or ["portable"]
    backend = BACKENDS[args.backend]
    rows = [row for name in args.only for row in rows_of(backend, x, name, isas, args.seconds)]
    if args.backend == "cpu":
        use_instruction_set()
    title = f"{args.size} x {args.size} {args.dtype}, backend {args.backend}"
    show(title, rows, args.keep, labels=2)


if __name__ == "__main__":
    main()
