"""Matrices in groups on the CPU: one call of the extension for all of them.

    tokens and weights of experts     a call's arguments for each group, over memory of one result
    one call                          several groups at a time on a thread each where they are many,
                                      else one after the other on all threads

A group's codes are those of its matrix alone, whichever way it goes. An empty group has nothing to
compute: its result is the reference's. What is the same for one matrix, such as what a kernel is
told of it, is in ``cpu.py``.

Pointers go to C++ as integers: inputs, results and scratch have to live until the call returns.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from nvfp4.backends.base import Backend, grouped_output, options_of
from nvfp4.backends.native.extension import ELEMENTS, code_matrix, load
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer

native, _ = load("nvfp4._cpu", "native", "a C++17 compiler on PATH")

Told = tuple[object, torch.Tensor | None]
"""The arguments of a kernel, and scratch memory that must outlive the call."""


class NativeGroups(Backend):
    """The grouped operations of ``CpuBackend``."""

    isa: str

    @abstractmethod
    def _dense(
        self,
        x: torch.Tensor,
        q: QTensor,
        quantizer: Quantizer,
        options: Options,
        amax: torch.Tensor | None = None,
    ) -> Told:
        """What a kernel is told to quantise matrix x, which has a stride of 1, into q."""

    @abstractmethod
    def _coded(self, codes: QTensor, q: QTensor, quantizer: Quantizer, options: Options) -> Told:
        """The same of the transpose of what codes stand for."""

    @abstractmethod
    def _product(self) -> str | None:
        """The fastest product that the processor has, or the one of this instruction set."""

    def grouped_quantize(
        self,
        x: torch.Tensor,
        groups: Groups | None,
        quantizer: Quantizer,
        options: Options,
        transposed: bool = False,
        amax: torch.Tensor | None = None,
    ) -> GroupedQTensor:
        """One call of the extension for all groups."""
        result = self._grouped_result(x, groups, options, transposed)
        x, amax = _readable(x), None if amax is None else amax.contiguous()

        told = []
        for e, part, own in self._grouped_parts(x, groups, options):
            part, q = part.t() if transposed else part, result.group(e)
            if part.numel() == 0:
                q.overwrite(quantizer.quantize(part, own))
                continue
            given = None if amax is None else amax[e : e + 1]
            told.append([self._dense(part, q, quantizer, own, given)])
        self._quantize(told)
        return result

    def grouped_quantize_both(
        self,
        x: torch.Tensor,
        groups: Groups,
        rows: tuple[Quantizer, Options],
        columns: tuple[Quantizer, Options],
    ) -> tuple[GroupedQTensor, GroupedQTensor]:
        """One call of the extension, which reads each group once for both."""
        across = self._grouped_result(x, groups, rows[1], transposed=False)
        down = self._grouped_result(x, groups, columns[1], transposed=True)
        x = _readable(x)

        told = []
        for e, part in enumerate(groups.split(x)):
            both = []
            for matrix, result, how in ((part, across, rows), (part.t(), down, columns)):
                q, own = result.group(e), options_of(how[1], e)
                if part.numel() == 0:
                    q.overwrite(how[0].quantize(matrix, own))
                else:
                    both.append(self._dense(matrix, q, how[0], own))
            told.append(both)
        self._quantize([both for both in told if both])
        return across, down

    def grouped_requantize(
        self, q: GroupedQTensor, quantizer: Quantizer, options: Options
    ) -> GroupedQTensor:
        """One call of the extension, from the codes as they lie; rotated ones one by one."""
        if q.rotation is not None:
            return super().grouped_requantize(q, quantizer, options)
        result = q.empty_transpose(options.block, options.row_scaled, options.rotation)

        told = []
        for e, codes in enumerate(q.each()):
            target, own = result.group(e), options_of(options, e)
            if codes.codes.numel() == 0:
                target.overwrite(self.requantize(codes, quantizer, own))
            else:
                told.append([self._coded(codes, target, quantizer, own)])
        self._quantize(told)
        return result

    def grouped_transpose(self, q: GroupedQTensor) -> GroupedQTensor:
        """Straight into the result, where ``transpose`` has a kernel."""
        if q.block != TILE_BLOCK or q.rotation is not None:
            return super().grouped_transpose(q)
        assert native is not None
        result = q.empty_transpose(q.block, False, None)
        result.global_scale.copy_(q.global_scale)

        for codes, target in zip(q.each(), result.each(), strict=True):
            if codes.codes.numel():
                native.transpose(
                    code_matrix(native, codes),
                    q.contraction,
                    target.codes.data_ptr(),
                    target.block_scale.data_ptr(),
                    torch.get_num_threads(),
                )
        return result

    def _quantize(self, told: list[list[Told]]) -> None:
        """Run the kernels: of each group one orientation or both."""
        assert native is not None
        calls = [native.ManyArgs(*(args for args, _ in group)) for group in told]
        native.quantize_many(calls, torch.get_num_threads(), self.isa)

    def grouped_matmul(
        self,
        a: GroupedQTensor,
        b: GroupedQTensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One call of the extension, by the product that ``matmul`` would take."""
        assert native is not None
        kernel = self._product()
        if kernel is None:
            return super().grouped_matmul(a, b, out_dtype, bias)

        # what is read and written, group by group
        y = grouped_output(a, b, out_dtype)
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        parts = iter(y) if a.ragged != "rows" else a.groups.split(y)  # type: ignore[union-attr]
        threads, calls = torch.get_num_threads(), []
        for e, (part, left, right) in enumerate(zip(parts, a.each(), b.each(), strict=True)):
            added = None if bias is None else bias[e]
            if left.codes.numel() == 0 or right.codes.numel() == 0:
                part.copy_(self.matmul(left, right, out_dtype, added))
                continue
            matrices = (code_matrix(native, left), code_matrix(native, right))
            pointer = 0 if added is None else added.data_ptr()
            calls.append(
                native.MatmulArgs(*matrices, pointer, ELEMENTS[out_dtype], part.data_ptr(), threads)
            )
        native.matmul_many(calls, threads, kernel)
        return y


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x whose groups have a stride of 1."""
    return x if 1 in x.stride()[-2:] else x.contiguous()
