"""The native CPU backend: C++ kernels over raw memory, equal to the reference to the last bit.

    quantize, both orientations    x is read where it lies, with any strides of which one is 1
    requantize                     from codes, decoded in registers and never written
    transpose                      of codes in 16x16 blocks, in squares of two by two
    matmul                         codes are decoded into packed panels; sums in float32; global
                                   scales, bias and the one rounding on the way out
    dense_product                  the same for float32, BF16 and FP16 operands, where torch would
                                   emulate (``layer/dense.py``)
    fingerprint                    64 bits of a tensor's bytes, at memory speed
    grouped_...                    all groups in one call, several at a time where they are many

The kernels (``csrc/``) exist for AVX-512, AVX2 and portably; the best one the processor has is
used. Products need AVX2; without it torch multiplies decoded operands. Codes and scales do not
depend on the instruction set, sums of products do. Threads follow ``torch.get_num_threads()``. If
the extension was not built, this backend says why and the reference takes over.

Pointers go to C++ as integers, so whatever they point to has to live until the call returns: hence
the local names that nothing else reads.
"""

from __future__ import annotations

import torch

from nvfp4.backends.native.extension import (
    ELEMENTS,
    RULES,
    code_matrix,
    contiguous,
    rule_numbers,
)
from nvfp4.backends.native.groups import NativeGroups, Told
from nvfp4.backends.native.products import MISSING as _MISSING
from nvfp4.backends.native.products import float_product, multiply, native, products
from nvfp4.backends.reference import reference_matmul
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import fold_in, seed_on_host, signed
from nvfp4.numerics.scaling import magnitude
from nvfp4.numerics.torch_state import without_autocast
from nvfp4.quantizers.base import HeldAmax, Options, Quantizer


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that kernels exist for and this process may use, the best first.

    Of "avx512", "avx2" and "portable"; the first is in use. Empty where the extension was not
    built.
    """
    return () if native is None else tuple(native.instruction_sets())


def use_instruction_set(isa: str = "") -> None:
    """Hold this process to an instruction set, as if the processor had nothing better.

    isa: "avx512", "avx2", "portable", or "" for the best there is again. It holds for our kernels,
    products included; torch's own follow ``ATEN_CPU_CAPABILITY``. No result changes but the order
    in which products are summed. ValueError: unknown or not on this processor. RuntimeError: the
    extension was not built.
    """
    if native is None:
        raise RuntimeError(f"there are no native CPU kernels to hold to {isa!r}: {_MISSING}")
    native.use(isa)


INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
"""What multiplies a dtype on x86-64, as ``torch.cpu.get_capabilities`` calls it; one will do."""


def emulated_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes whose products torch emulates on this CPU.

    Empty where torch cannot tell, or off x86-64.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if found.get("architecture") != "x86_64":
        return frozenset()
    return frozenset(
        d for d, names in INSTRUCTIONS.items() if not any(found.get(name, False) for name in names)
    )


EMULATED = emulated_dtypes()
"""``emulated_dtypes`` at import: compiled graphs rely on it, so it does not change in a process."""


def dense_product_name(dtype: torch.dtype = torch.bfloat16) -> str:
    """Which dense product of ``dtype`` runs on this CPU, and why, in words."""
    names = ", ".join(INSTRUCTIONS[dtype])
    if dtype not in EMULATED:
        return (
            f"torch's: the processor has one of {names}, or torch does not say, or it is no x86-64"
        )

    # emulated, and so computed here, by a kernel if there is one
    kernel = float_product()
    ours = (
        "torch's of float32 copies" if kernel is None else f"the native float32 kernel for {kernel}"
    )
    return f"{ours}: the processor has none of {names}, and torch would emulate them"


class CpuBackend(NativeGroups):
    """The C++ kernels as a backend.

    isa: "avx512", "avx2", "portable", or "" for the best that this process may use (tests force
    each).
    """

    name = "cpu"
    quantizers = RULES.keys()
    decodes = tuple(ELEMENTS)

    def __init__(self, isa: str = "") -> None:
        self.isa = isa

    def unavailable(self, device: torch.device) -> str | None:
        """Why not: another device, or an extension that was not built, and why it was not."""
        if device.type != "cpu":
            return f"it runs on the cpu, not on {device.type}"
        return _MISSING

    def quantize(self, x: torch.Tensor, quantizer: Quantizer, options: Options) -> QTensor:
        """On ``torch.get_num_threads()`` threads, any strides; an empty x is the reference's."""
        if x.numel() == 0:
            return quantizer.quantize(x, options)
        if options.held is not None:
            return self._quantize_held(x, quantizer, options, options.held)
        assert native is not None
        x = _readable(x)
        args, q, _scratch = self._prepare(_source(x), x.shape, quantizer, options)
        native.quantize(args, self.isa)
        return q

    def quantize_with_amax(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, amax: torch.Tensor
    ) -> QTensor:
        """Without a copy of x: the kernel is told ``amax``."""
        assert native is not None
        x, amax = _readable(x), amax.contiguous()
        args, q, _scratch = self._prepare(_source(x), x.shape, quantizer, options, amax)
        native.quantize(args, self.isa)
        return q

    def _quantize_held(
        self, x: torch.Tensor, quantizer: Quantizer, options: Options, held: HeldAmax
    ) -> QTensor:
        """By the kernel that is told an amax; x's own is looked for before, to be noted.

        A processor gains nothing by it (0.7 of rtn's 4.1 ms at 4096 x 4096), so there is no kernel
        that does both; a rotated x, and one that is not finite, is the reference's.
        """
        if options.rotation is not None:
            return quantizer.quantize(x, options)
        own = magnitude(x)
        if not own.isfinite():
            return quantizer.quantize(x, options)
        held.note(own)
        return self.quantize_with_amax(x, quantizer, options, held.amax)

    def quantize_both(
        self, x: torch.Tensor, rows: tuple[Quantizer, Options], columns: tuple[Quantizer, Options]
    ) -> tuple[QTensor, QTensor]:
        """Both orientations in one call of the extension; x [M, K], then x^T [K, M]."""
        if x.numel() == 0 or rows[1].held is not None or columns[1].held is not None:
            return super().quantize_both(x, rows, columns)
        assert native is not None
        x = _readable(x)

        # x^T, which a forward keeps, is allocated before x's codes, which it soon drops
        down, q_columns, _scratch_columns = self._prepare(_source(x.t()), x.t().shape, *columns)
        across, q_rows, _scratch_rows = self._prepare(_source(x), x.shape, *rows)
        native.quantize_both(across, down, self.isa)
        return q_rows, q_columns

    def requantize(self, q: QTensor, quantizer: Quantizer, options: Options) -> QTensor:
        """From the codes as they lie, in one call; rotated or empty ones are decoded first."""
        if q.rotation is not None or q.codes.numel() == 0 or options.held is not None:
            return super().requantize(q, quantizer, options)
        assert native is not None

        # the first K columns of the codes, read as rows
        q = contiguous(q)
        shape = (q.shape[q.axis], q.codes.shape[0])
        transposed = QTensor.empty(
            shape, options.block, options.row_scaled, options.rotation, "cpu"
        )
        args, _scratch = self._coded(q, transposed, quantizer, options)
        native.quantize(args, self.isa)
        return transposed

    def _prepare(
        self,
        source: object,
        shape: tuple[int, ...],
        quantizer: Quantizer,
        options: Options,
        amax: torch.Tensor | None = None,
    ) -> tuple[object, QTensor, torch.Tensor | None]:
        """What the kernel is told, the result that it will fill, and its scratch memory.

        That memory and ``amax`` must outlive the call.
        """
        q = QTensor.empty(shape, options.block, options.row_scaled, options.rotation, "cpu")
        args, scratch = self._told(source, q, quantizer, options, amax)
        return args, q, scratch

    def _told(
        self,
        source: object,
        q: QTensor,
        quantizer: Quantizer,
        options: Options,
        amax: torch.Tensor | None = None,
    ) -> Told:
        """What the kernel is told to fill q with, and its scratch memory."""
        assert native is not None

        # ms_eden knows a block's scale only when all blocks are done: their lengths until then
        scratch = (
            torch.empty(q.block_scale.shape, dtype=torch.float32, device="cpu")
            if quantizer.rotates
            else None
        )
        args = native.QuantizeArgs(
            source,
            _options(quantizer, options),
            q.codes.shape[1] * 2,
            q.codes.data_ptr(),
            q.block_scale.data_ptr(),
            q.global_scale.data_ptr(),
            0 if scratch is None else scratch.data_ptr(),
            0 if amax is None else amax.data_ptr(),
            torch.get_num_threads(),
        )
        return args, scratch

    def transpose(self, q: QTensor) -> QTensor:
        """In one call for unrotated 16x16 tiles; the rest, and its errors, are the base's."""
        has_one = q.block == TILE_BLOCK and q.rotation is None and len(q.shape) == 2
        if not has_one or q.codes.numel() == 0:
            return super().transpose(q)
        assert native is not None

        # [K, Mp/2]: columns beyond K are cut, rows are filled up to 16 with zero codes
        q = contiguous(q)
        down, across = q.block_scale.shape
        codes = torch.empty(q.contraction, down * 8, dtype=torch.uint8, device="cpu")
        scales = torch.empty(across, down, dtype=torch.uint8, device="cpu")
        native.transpose(
            code_matrix(native, q),
            q.contraction,
            codes.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )
        return QTensor(codes, scales, q.global_scale, q.block, q.shape, -1 - q.axis % 2)

    def fingerprint(self, x: torch.Tensor) -> int | None:
        """A 64-bit hash of the bytes, on all threads; None for strided or empty x."""
        if not x.is_contiguous() or x.numel() == 0:
            return None
        assert native is not None
        return native.fingerprint(
            x.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads(), self.isa
        )

    def decode(
        self, q: QTensor, columns: int, dtype: torch.dtype, with_global: bool
    ) -> torch.Tensor:
        """[M, columns] in ``dtype``, on ``torch.get_num_threads()`` threads."""
        assert native is not None
        q = contiguous(q)
        out = torch.empty(q.rows, columns, dtype=dtype, device="cpu")
        matrix = code_matrix(native, q, with_global)
        native.decode(
            matrix, columns, ELEMENTS[dtype], out.data_ptr(), torch.get_num_threads(), self.isa
        )
        return out

    def matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By the fastest product that the processor has, else by torch's of decoded operands."""
        assert native is not None
        kernel = self._product()
        if kernel is None or a.codes.numel() == 0 or b.codes.numel() == 0:
            return self._emulated_matmul(a, b, out_dtype, bias)
        return multiply(a, b, out_dtype, bias, kernel)

    def _product(self) -> str | None:
        """The fastest product that the processor has, or the one of this instruction set."""
        return next((name for name in products() if self.isa in ("", name)), None)

    def _dense(
        self,
        x: torch.Tensor,
        q: QTensor,
        quantizer: Quantizer,
        options: Options,
        amax: torch.Tensor | None = None,
    ) -> Told:
        """``_told`` of matrix x, which has a stride of 1."""
        return self._told(_source(_readable(x)), q, quantizer, options, amax)

    def _coded(self, codes: QTensor, q: QTensor, quantizer: Quantizer, options: Options) -> Told:
        """``_told`` of the transpose of what codes stand for."""
        assert native is not None
        source = native.Source(code_matrix(native, codes), codes.contraction)
        return self._told(source, q, quantizer, options)

    def draw_seeds(self, words: torch.Tensor, rank: int, gemms: int) -> torch.Tensor:
        """By the extension's ``fold_in``: of 8 layers 0.23 ms where torch's operators took 3.1."""
        table = []
        for seed, layer, calls, own in words.view(-1, 4).tolist():
            for gemm in range(gemms):
                sign = fold_in(seed % 2**64, layer, calls, gemm)
                sides = (fold_in(sign, 1 + side, rank if own < 0 else own) for side in range(2))
                table.append([signed(sign), *map(signed, sides)])
        return torch.tensor(table, dtype=torch.int64).view(*words.shape[:-1], gemms, 3)

    def _emulated_matmul(
        self, a: QTensor, b: QTensor, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Without AVX2: torch's float32 GEMM of decoded operands, as in the reference."""
        if a.codes.numel() == 0 or b.codes.numel() == 0:
            return reference_matmul(a.decode_blocks(), b.decode_blocks(), a, b, out_dtype, bias)
        left, right = (self.decode_blocks(q, torch.float32) for q in (a, b))
        return reference_matmul(left, right, a, b, out_dtype, bias)


def dense_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, isa: str = ""
) -> torch.Tensor:
    """a b^T + bias [M, N] of a [M, K], b [N, K], summed in float32 and rounded once to ``dtype``.

    a, b: float32, bfloat16 or float16. bias: [N] or None, added in float32. isa: as for
    ``CpuBackend``. Without a kernel torch multiplies float32 copies.
    """
    (rows, depth), columns = a.shape, b.shape[0]

    # no kernel, or nothing to sum
    kernel = float_product(isa)
    if kernel is None or rows == 0 or columns == 0 or depth == 0:
        with without_autocast(a.device):  # it would round the sums before the bias is added
            y = a.to(torch.float32) @ b.to(torch.float32).t()
        return (y if bias is None else y.add_(bias)).to(dtype)

    # the kernel packs 16-bit elements straight into its float32 panels
    a, b = _readable(a), _readable(b)
    out = torch.empty(rows, columns, dtype=dtype, device="cpu")
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    native.dense_matmul(  # type: ignore[union-attr]
        a.data_ptr(),
        ELEMENTS[a.dtype],
        *a.stride(),
        b.data_ptr(),
        ELEMENTS[b.dtype],
        *b.stride(),
        rows,
        columns,
        depth,
        0 if bias is None else bias.data_ptr(),
        ELEMENTS[dtype],
        out.data_ptr(),
        torch.get_num_threads(),
        kernel,
    )
    return out


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x with one stride of 1, as the kernels want it.

    Whoever takes pointers from it has to keep it alive.
    """
    if 1 in x.stride():
        return x

    # a single element has any stride that one likes
    return x.reshape(-1).as_strided((1, 1), (1, 1)) if x.numel() == 1 else x.contiguous()


def _source(x: torch.Tensor) -> object:
    """What the kernels are told of matrix x."""
    assert native is not None
    return native.Source(x.data_ptr(), ELEMENTS[x.dtype], *x.shape, *x.stride())


_UNROTATED = Rotation(16, fixed=True)


def _options(quantizer: Quantizer, options: Options) -> object:
    """What the kernels are told of a method and its seeds."""
    assert native is not None

    # a group of 0 says that nothing is rotated; the rest is then not read
    rotation = options.rotation or _UNROTATED
    seed, sign = options.seed, rotation.sign_seed
    return native.Options(
        *rule_numbers(native, quantizer, options),
        seed if type(seed) is int else seed_on_host(seed),
        0 if options.rotation is None else rotation.group,
        rotation.rounds,
        sign if type(sign) is int else seed_on_host(sign),
        rotation.fixed,
    )
