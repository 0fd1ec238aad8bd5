"""What a backend is: operations on matrices, and an honest answer to whether it can do them.

    quantize(x [M, K])             -> QTensor along K
    quantize_both(x)               -> x along K, x^T along M
    requantize(q [M, K])           -> what q stands for, transposed, along M
    quantize_activation(a)         -> RMSNorm or SwiGLU, quantised
    dequantize(q), matmul(a, b)    -> matrices
    grouped_...                    -> the same of matrices in groups (``numerics/groups.py``)
    unavailable, refuses           -> why not, in words that a person reads (``nvfp4.explain``)

Whatever a backend leaves out it inherits from here, in terms of ``quantize`` and ``decode``:
correct and slower. A backend sees matrices, quantisers and options; it knows no layer and no
recipe. Codes and scales equal the reference's bit for bit, and ``selfcheck`` looks at first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from nvfp4.numerics.activations import Activation
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.groups import GroupedQTensor, Groups, of_group, rotation_of
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import fold_in_tensor
from nvfp4.numerics.scaling import with_headroom
from nvfp4.quantizers.base import Options, Quantizer

Operation = Literal[
    "quantize",
    "quantize_held",
    "dequantize",
    "matmul",
    "grouped_quantize",
    "grouped_matmul",
    "activation",
    "draw_seeds",
    "transpose",
]
"""What is asked for; "quantize_held": ``quantize`` and its kin where ``Options`` hold an amax."""

QUANTISING = ("quantize", "quantize_held", "grouped_quantize")


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
        if operation not in QUANTISING or quantizer is None or self.quantizers is None:
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
        """Quantise matrix x [M, K] (float32, float16, bfloat16, any strides) along K.

        By ``options.held`` instead of x's own amax, if there is one and the operation
        "quantize_held" is among this backend's.
        """

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
        rank: counts where words[3] is negative. Equal to ``noise.gemm_seeds``. Words [E, 4] are
        those of E layers: [E, gemms, 3].
        """
        seed, layer, calls, own = words[..., None].unbind(-2)
        signs = fold_in_tensor(seed, layer, calls, torch.arange(gemms, device=words.device))
        sides = torch.arange(1, 3, device=words.device)
        own = torch.where(own < 0, rank, own)[..., None]
        rounding = fold_in_tensor(signs[..., None], sides, own)
        return torch.cat((signs[..., None], rounding), dim=-1)

    def turn_amax(self, table: torch.Tensor) -> None:
        """At the end of a call, hold for the next what this one has seen; in place, no waiting.

        table: float32 [3, n] of ``layer.delayed_amax``: held, seen, exceeded.
        """
        held, seen, exceeded = table.unbind()

        # NaN, Inf and a call that saw only zeros leave what was held
        useful = seen.isfinite() & (seen > 0)
        exceeded += useful & (seen > held)
        held.copy_(torch.where(useful, with_headroom(seen), held))
        seen.zero_()

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

    def grouped_quantize(
        self,
        x: torch.Tensor,
        groups: Groups | None,
        quantizer: Quantizer,
        options: Options,
        transposed: bool = False,
        amax: torch.Tensor | None = None,
    ) -> GroupedQTensor:
        """``quantize`` of every group: of its rows of x [S, K], or of its matrix of x [E, R, K].

        groups: of the rows, None for a stack. transposed: quantise the transpose of each. amax:
        float32 [E], what to scale each group by; see ``quantize_with_amax``. Seeds in ``options``
        are int64 [E]. One by one here, which reads the offsets; a backend may do it in one launch,
        from offsets that only the device knows.
        """
        q = self._grouped_result(x, groups, options, transposed)
        for e, part, own in self._grouped_parts(x, groups, options):
            part = part.t() if transposed else part
            if amax is None or part.numel() == 0:
                q.group(e).overwrite(self.quantize(part, quantizer, own))
            else:
                given = amax[e : e + 1]
                q.group(e).overwrite(self.quantize_with_amax(part, quantizer, own, given))
        return q

    def grouped_quantize_both(
        self,
        x: torch.Tensor,
        groups: Groups,
        rows: tuple[Quantizer, Options],
        columns: tuple[Quantizer, Options],
    ) -> tuple[GroupedQTensor, GroupedQTensor]:
        """``quantize_both`` of every group: x [S, K] along K, and x^T along each group's rows."""
        return (
            self.grouped_quantize(x, groups, *rows),
            self.grouped_quantize(x, groups, *columns, transposed=True),
        )

    def grouped_requantize(
        self, q: GroupedQTensor, quantizer: Quantizer, options: Options
    ) -> GroupedQTensor:
        """``requantize`` of every group [m_e, K], to [K, m_e]; q is ragged in its rows or not."""
        result = q.empty_transpose(options.block, options.row_scaled, options.rotation)
        for e, own in enumerate(q.each()):
            made = self.requantize(own, quantizer, options_of(options, e))
            result.group(e).overwrite(made)
        return result

    def grouped_transpose(self, q: GroupedQTensor) -> GroupedQTensor:
        """``transpose`` of every group: of a stack at once, of ragged rows one by one."""
        if q.groups is None:
            return q.transpose()
        result = q.empty_transpose(q.block, False, None)
        for e, own in enumerate(q.each()):
            exchanged = self.transpose(own)
            result.group(e).overwrite(exchanged)
        return result

    def grouped_matmul(
        self,
        a: GroupedQTensor,
        b: GroupedQTensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``matmul`` of every group: [S, N] if a's rows are ragged, else [E, a.rows, b.rows].

        bias: [E, b.rows]. A group whose contraction is empty gives zeros.
        """
        y = grouped_output(a, b, out_dtype)
        parts = iter(y) if a.ragged != "rows" else a.groups.split(y)  # type: ignore[union-attr]
        for e, (part, left, right) in enumerate(zip(parts, a.each(), b.each(), strict=True)):
            part.copy_(self.matmul(left, right, out_dtype, None if bias is None else bias[e]))
        return y

    def grouped_sum(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """The sum of the rows of x [S, N] of every group, float32 [E, N]; 0 for none."""
        return torch.stack([part.sum(0, dtype=torch.float32) for part in groups.split(x)])

    def _grouped_result(
        self, x: torch.Tensor, groups: Groups | None, options: Options, transposed: bool
    ) -> GroupedQTensor:
        """What ``grouped_quantize`` fills."""
        rows, columns = x.shape[-2:]
        if transposed:
            rows, columns = columns, rows
        ragged = None if groups is None else "contraction" if transposed else "rows"
        return GroupedQTensor.empty(
            rows,
            columns,
            x.shape[0] if groups is None else groups,
            ragged,  # type: ignore[arg-type]
            options.block,
            options.row_scaled,
            options.rotation,
            x.device,
        )

    def _grouped_parts(
        self, x: torch.Tensor, groups: Groups | None, options: Options
    ) -> Iterator[tuple[int, torch.Tensor, Options]]:
        """(group, its matrix, its options), on the host."""
        parts = iter(x) if groups is None else groups.split(x)
        for e, part in enumerate(parts):
            yield e, part, options_of(options, e)


def options_of(options: Options, group: int) -> Options:
    """The options of one group: its seeds, of seeds int64 [E]."""
    if options.seed is None and options.rotation is None:
        return options
    return replace(
        options,
        seed=of_group(options.seed, group),
        sign_seed=of_group(options.sign_seed, group),
        rotation=rotation_of(options.rotation, group),
    )


def grouped_output(a: GroupedQTensor, b: GroupedQTensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for the product of all groups: [S, N], or [E, a.rows, b.rows]."""
    shape = (a.rows, b.rows) if a.ragged == "rows" else (a.count, a.rows, b.rows)
    return torch.empty(shape, dtype=dtype, device=a.device)
