"""What a backend is: operations on matrices, and an honest answer to whether it can do them.

    quantize(x [M, K])             -> QTensor along K
    quantize_both(x)               -> x along K, x^T along M
    requantize(q [M, K])           -> what q stands for, transposed, along M
    quantize_activation(a)         -> RMSNorm or SwiGLU, quantised
    dequantize(q), matmul(a, b)    -> matrices
    unavailable, refuses           -> why not, in words that a person reads (``nvfp4.explain``)

Whatever a backend leaves out it inherits from here, in terms of ``quantize`` and ``decode``:
correct and slower. A backend sees matrices, quantisers and options; it knows no layer and no
recipe. Codes and scales equal the reference's bit for bit, and ``selfcheck`` looks at first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from nvfp4.numerics.activations import Activation
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import fold_in_tensor
from nvfp4.quantizers.base import Options, Quantizer

Operation = Literal[
    "quantize", "dequantize", "matmul", "grouped_matmul", "activation", "draw_seeds", "transpose"
]


class Backend(ABC):
    """The numerics of ``quantizers/`` and of the NVFP4 GEMM on some devices, with equal bits."""

    name: str
    operations: tuple[Operation, ...] = get_args(Operation)
    """What it implements. Named for another operation, it leaves that to "auto"."""

    scope: str = "it has no kernel for this operation"
    """Why not the other operations, in words."""

    quantizers: Container[str] | None = None
    """Names of the quantisers that it implements; None: all."""

    decodes: tuple[torch.dtype, ...] = ()
    """What its ``decode`` can write.

    For other dtypes, and for rotated codes, ``dequantize`` is the reference's.
    """

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """None if this backend can run on ``device`` on this machine, or why not, in words."""

    def automatic(self, device: torch.device) -> bool:
        """Whether "auto" may choose it on ``device``; otherwise it has to be named to run there."""
        return True

    def refuses(
        self,
        operation: Operation,
        quantizer: Quantizer | None = None,
        options: Options | None = None,
    ) -> str | None:
        """None if it implements the operation for this quantiser and these options, or why not."""
        if operation not in self.operations:
            return self.scope
        if operation != "quantize" or quantizer is None or self.quantizers is None:
            return None
        known = quantizer.name in self.quantizers
        return None if known else f"it has no kernel for {quantizer.name}"

    def prepare(self, run: Callable[[], object]) -> None:
        """Do beforehand what the first call of ``run`` would wait for, such as compiling kernels.

        ``run`` may be called, and what that returns is void.
        """
        del run  # nothing is made at first use

    @abstractmethod
    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """Quantise matrix x [M, K] (float32, float16, bfloat16, any strides) along K."""

    def quantize_with_amax(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, amax: torch.Tensor
    ) -> QTensor:
        """``quantize`` scaled by ``amax`` instead of by x's own magnitude.

        amax: float32 on the device of x, [1] or, row-scaled, [M]. For deterministic rules without
        rotation, whose scale is a function of it; x may not be empty, and no magnitude of it may
        exceed ``amax``, which is not finite if x is not.
        """
        # a block beyond x's own holds amax while x is quantised, and is then dropped; it costs a
        # copy of x, so backends with kernels have a way of their own
        rows, columns = x.shape
        if options.row_scaled:
            larger = F.pad(x, (0, -columns % NVFP4.block_size + NVFP4.block_size))
            larger[:, -NVFP4.block_size] = amax
        else:
            larger = F.pad(x, (0, 0, 0, -rows % options.block[0] + 1))
            larger[-1, 0] = amax[0]

        # the codes of x itself; swizzled scales would still hold the block beyond
        q = self.quantize(larger, quantizer, options)
        blocks = -(-columns // NVFP4.block_size)
        return replace(
            q,
            codes=q.codes[:rows, : blocks * NVFP4.block_size // 2].contiguous(),
            block_scale=q.block_scale[: -(-rows // options.block[0]), :blocks].contiguous(),
            shape=(rows, columns),
            swizzled_scale=None,
        )

    def quantize_both(
        self, x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
    ) -> tuple[QTensor, QTensor]:
        """(quantize(x, *rows), quantize(x^T, *columns)); a backend may read x only once."""
        return self.quantize(x, *rows), self.quantize(x.t(), *columns)

    def quantize_activation(
        self,
        activation: Activation,
        rows: tuple[Quantizer, Options],
        columns: tuple[Quantizer, Options] | None = None,
    ) -> tuple[QTensor, QTensor | None]:
        """``quantize_both`` of ``activation.values()``; without ``columns``, ``quantize`` and None.

        A backend need not write these values to memory.
        """
        x = activation.values()
        return (
            (self.quantize(x, *rows), None)
            if columns is None
            else self.quantize_both(x, rows, columns)
        )

    def activation_gradients(
        self, activation: Activation, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``activation.gradients(dy)`` of dy [M, K], float32, float16 or bfloat16."""
        return activation.gradients(dy)

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        """Quantise the transpose of what matrix q [M, K] stands for, in float32, along M."""
        return self.quantize(self.dequantize(q, torch.float32).t(), quantizer, options)

    def transpose(self, q: QTensor) -> QTensor:
        """``q.transpose()``: codes of 16x16 blocks with rows and columns exchanged."""
        return q.transpose()

    def draw_seeds(self, words: torch.Tensor, rank: int, gemms: int) -> torch.Tensor:
        """The seeds of one call of a layer, made on its device: int64 [gemms, 3] of their bits.

        Of each GEMM those for signs, for the left and for the right operand. words:
        ``Noise.state``, int64 [4] (seed, layer, calls, rank) on a device, which nothing waits for;
        rank: counts where words[3] is negative. Equal to ``noise.gemm_seeds``.
        """
        signs = fold_in_tensor(
            words[0], words[1], words[2], torch.arange(gemms, device=words.device)
        )
        sides = torch.arange(1, 3, device=words.device)
        rounding = fold_in_tensor(signs[:, None], sides, torch.where(words[3] < 0, rank, words[3]))
        return torch.cat((signs[:, None], rounding), dim=1)

    def fingerprint(self, x: torch.Tensor) -> int | None:
        """A number that changes whenever the bytes of x do.

        None where telling would cost a synchronisation.
        """
        return None

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that q stands for, in its original shape; see ``QTensor.dequantize``."""
        if q.rotation is not None or dtype not in self.decodes or q.codes.numel() == 0:
            return q.dequantize(dtype)
        out = self.decode(q, q.contraction, dtype, with_global=True)
        lead = [size for i, size in enumerate(q.shape) if i != q.axis % len(q.shape)]
        return out.view(*lead, q.contraction).movedim(-1, q.axis)

    def decode_blocks(self, q: QTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """e2m1 * block_scale without the global scale, [M, Kp]: exact in BF16, FP16 and float32."""
        return self.decode(q, q.padded_contraction, dtype, with_global=False)

    def decode(
        self, q: QTensor, columns: int, dtype: torch.dtype, with_global: bool
    ) -> torch.Tensor:
        """The first ``columns`` of the matrix of q, [M, columns], in a dtype of ``decodes``.

        NotImplementedError from a backend that decodes nothing.
        """
        raise NotImplementedError(f"the {self.name} backend decodes to {self.decodes or 'nothing'}")

    @abstractmethod
    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """decode(a) @ decode(b)^T, [a.rows, b.rows] of ``out_dtype``.

        The contraction in float32 without the global scales, then
        fl(fl(acc * a.global_scale) * b.global_scale) (+ bias [b.rows]), then one cast.
        """

    def grouped_matmul(
        self, a: Sequence[QTensor], b: Sequence[QTensor], out_dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """``matmul`` of every pair; a backend may do it in one launch."""
        return [self.matmul(left, right, out_dtype) for left, right in zip(a, b, strict=True)]
