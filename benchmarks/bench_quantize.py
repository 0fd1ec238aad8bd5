"""Time of every quantiser against a copy of the bytes it must move. python -m benchmarks.bench_quantize --help"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from benchmarks.harness import gate, show
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


def main() -> None:
    """Parse, gate, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="cpu", choices=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    x = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(dtype)
    backend, reference = BACKENDS[args.backend], BACKENDS["reference"]
    elements = x.numel()
    # amax reads the input, the quantiser reads it again and writes 4.5 bits an element; ms_eden reads it once
    two_reads = int(elements * (2 * x.element_size() + 9 / 16))
    one_read = int(elements * (x.element_size() + 9 / 16))
    saved = backend.quantize(x, get_quantizer("rtn"), get_quantizer("rtn").check())
    rows = []
    for name, (quantizer_name, options) in QUANTISERS.items():
        quantizer = get_quantizer(quantizer_name)
        checked = quantizer.check(seed=1, sign_seed=2, **options)
        q, expected = backend.quantize(x, quantizer, checked), reference.quantize(x, quantizer, checked)
        gate(all(torch.equal(a, b) for a, b in zip(q.tensors, expected.tensors, strict=True)), name)
        copy = copier(one_read if quantizer.rotates else two_reads)
        ms = interleaved(
            {
                "copy": copy,
                "rows": lambda quantizer=quantizer, checked=checked: backend.quantize(x, quantizer, checked),
                "columns": lambda quantizer=quantizer, checked=checked: backend.quantize(x.t(), quantizer, checked),
                "again": lambda quantizer=quantizer, checked=checked: backend.requantize(saved, quantizer, checked),
                "both": lambda pair=(quantizer, checked): backend.quantize_both(x, pair, pair),
                **(peer(x) if name == "rtn" else {}),
            },
            args.seconds,
        )
        rows.append(
            {
                "quantiser": name,
                "copy ms": ms["copy"],
                "row-wise ms": ms["rows"],
                "x copy": ms["rows"] / ms["copy"],
                "transposed ms": ms["columns"],
                "x copy (transposed)": ms["columns"] / ms["copy"],
                "both ms": ms["both"],
                "from codes ms": ms["again"],
                "torchao ms": ms.get("torchao", math.nan),
            }
        )
    show(f"{args.size} x {args.size} {args.dtype}, backend {args.backend}", rows, args.keep)


if __name__ == "__main__":
    main()
