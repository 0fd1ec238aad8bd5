"""QTensor: a tensor in NVFP4, as codes and decode scales. A record, not a tensor subclass.

    x [..., K, ...]   axis K moved last, the rest flattened to M rows, K padded to Kp
    codes             uint8 [M, Kp/2]        two E2M1 codes per byte
    block_scale       uint8 [M, Kp/16]       E4M3; [ceil(M/16), Kp/16] for 16x16 blocks
    global_scale      float32 [1] or [M]
    value           = fl(fl(e2m1 * block_scale) * global_scale), the first product exact

It is a record because nothing may happen to it unnoticed: no arithmetic, no autograd, no views.
Who wants numbers calls ``dequantize``; a GEMM takes two of them whose ``axis`` is contracted.

A rotated operand keeps its rotation, since it may only meet one that was rotated alike. Swizzled
scales are the block scales once more, in the tensor cores' order, for GEMMs that read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from nvfp4.numerics.codec import e2m1_decode, e4m3_decode, unpack
from nvfp4.numerics.formats import NVFP4, ROW_BLOCK, TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.layout import swizzle
from nvfp4.numerics.scaling import spread


@dataclass(frozen=True, eq=False)
class QTensor:
    """NVFP4 codes and scales of a tensor whose ``axis``, which a GEMM contracts, comes last.

    codes: uint8 [M, Kp/2], two E2M1 codes per byte, even column low; M is the product of the other
    axes, Kp the padded contraction length. block_scale: uint8 E4M3 [M, Kp/16], or [ceil(M/16),
    Kp/16] for 16x16 blocks. global_scale: float32 [1], or [M] when row-scaled; NaN marks non-finite
    input (for that row, or all of it). value = e2m1 * block_scale * global_scale.

    block: (1, 16) or (16, 16). shape: of the original tensor. axis: the contraction axis in it,
    negative. rotation: what the contraction axis went through, or None. swizzled_scale: the block
    scales once more, one per row and block, in the order in which tensor cores read them
    (``layout.swizzle``); uint8, from backends that made them on the way, else None. ``tensors``
    leaves it out, so what is saved between forward and backward carries none.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    block: tuple[int, int]
    shape: tuple[int, ...]
    axis: int = -1
    rotation: Rotation | None = None
    swizzled_scale: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        block: tuple[int, int] = ROW_BLOCK,
        row_scaled: bool = False,
        rotation: Rotation | None = None,
        device: torch.device | str | None = None,
    ) -> QTensor:
        """Uninitialised codes and scales for a matrix [M, K] quantised along K."""
        # the contraction is filled up to whole blocks, or to whole groups of the rotation
        rows, columns = shape
        unit = NVFP4.block_size if rotation is None else rotation.group
        padded = (columns + unit - 1) // unit * unit

        codes = torch.empty(rows, padded // 2, dtype=torch.uint8, device=device)
        scale_shape = ((rows + block[0] - 1) // block[0], padded // NVFP4.block_size)
        block_scale = torch.empty(scale_shape, dtype=torch.uint8, device=device)
        global_scale = torch.empty(rows if row_scaled else 1, dtype=torch.float32, device=device)

        # a frozen dataclass sets its eight fields one by one, which takes three times as long
        q = object.__new__(cls)
        vars(q).update(
            codes=codes,
            block_scale=block_scale,
            global_scale=global_scale,
            block=block,
            shape=tuple(shape),
            axis=-1,
            rotation=rotation,
            swizzled_scale=None,
        )
        return q

    @property
    def rows(self) -> int:
        """M: rows of the code matrix."""
        return self.codes.shape[0]

    @property
    def contraction(self) -> int:
        """K: length of the contraction axis before padding."""
        return self.shape[self.axis]

    @property
    def padded_contraction(self) -> int:
        """Kp: columns of the code matrix, a multiple of 16 (of the rotation group if rotated)."""
        return self.codes.shape[1] * 2

    @property
    def row_scaled(self) -> bool:
        """Whether each row has its own global scale; False for a single row, where both are one."""
        return self.global_scale.numel() != 1

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: about 4.5 bits per element, 4.03 with 16x16 blocks."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes, block_scale, global_scale), for ``save_for_backward`` and the like."""
        return self.codes, self.block_scale, self.global_scale

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """All that it holds: ``tensors``, and the swizzled scales where there are some."""
        return self.tensors if self.swizzled_scale is None else (*self.tensors, self.swizzled_scale)

    @property
    def record(self) -> tuple[tuple[int, int], tuple[int, ...], int, Rotation | None]:
        """(block, shape, axis, rotation): ``QTensor(*q.tensors, *q.record)`` is q, not swizzled."""
        return self.block, self.shape, self.axis, self.rotation

    def overwrite(self, source: QTensor) -> None:
        """Write codes and scales of ``source``, of the same record, over this one's memory.

        For whoever has taken pointers from it, such as a CUDA graph. Swizzled scales are written
        anew if there are any.
        """
        for target, tensor in zip(self.tensors, source.tensors, strict=True):
            target.copy_(tensor)
        # the same order in both, wherever the source's come from
        if self.swizzled_scale is not None:
            made = source.swizzled_scale
            if made is None:
                made = swizzle(spread(source.block_scale, self.block, self.rows))
            self.swizzled_scale.copy_(made)

    def to(self, device: torch.device | str) -> QTensor:
        """The same codes and scales on another device."""
        codes, block_scale, global_scale = (t.to(device) for t in self.tensors)
        return QTensor(codes, block_scale, global_scale, *self.record)

    def decode_blocks(self) -> torch.Tensor:
        """e2m1 * block_scale without the global scale, float32 [M, Kp].

        Exact, and exact in BF16 and FP16 too.
        """
        scales = e4m3_decode(spread(self.block_scale, self.block, self.rows))
        values = e2m1_decode(unpack(self.codes)).view(*scales.shape, NVFP4.block_size)
        return (values * scales[..., None]).view(self.rows, self.padded_contraction)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, rotated: bool = False
    ) -> torch.Tensor:
        """The tensor it stands for, of the original ``shape``.

        fl(fl(e2m1 * block_scale) * global_scale), then one cast to ``dtype``. A rotated operand is
        rotated back in float32 (an approximation of its input); ``rotated=True`` returns the stored
        coordinates [M, Kp] instead, padding included. A NaN global scale makes its row, or all of
        it, NaN.
        """
        values = self.decode_blocks() * self.global_scale.view(-1, 1)
        if rotated:
            return values.to(dtype)
        if self.rotation is not None:
            values = self.rotation.invert(values)

        # cut the padding, unflatten, and put the contraction axis back in its place
        lead = [size for i, size in enumerate(self.shape) if i != self.axis % len(self.shape)]
        return (
            values[:, : self.contraction]
            .reshape(*lead, self.contraction)
            .movedim(-1, self.axis)
            .to(dtype)
        )

    def transpose(self) -> QTensor:
        """The same codes and tile scales with rows and contraction exchanged; no value changes.

        Needs 16x16 blocks, no rotation and a matrix (ValueError otherwise): only there do both
        directions share scales. Columns beyond K are cut, rows are filled up to 16 with zero codes.
        """
        check_exchangeable(self.block, self.rotation, self.shape)
        return replace(
            self,
            codes=transposed_codes(self.codes)[: self.contraction],
            block_scale=self.block_scale.t().contiguous(),
            axis=-1 - self.axis % 2,
            swizzled_scale=None,
        )


def check_exchangeable(
    block: tuple[int, int], rotation: Rotation | None, shape: tuple[int, ...]
) -> None:
    """ValueError where codes do not serve the transpose too; see ``QTensor.transpose``."""
    if block != TILE_BLOCK or rotation is not None or len(shape) != 2:
        raise ValueError(
            f"transpose() needs an unrotated matrix with block={TILE_BLOCK}, got block={block}, "
            f"rotation={rotation}, shape={shape}; quantise the transposed tensor instead"
        )


def transposed_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., M, Kp/2] with rows and columns exchanged: [..., Kp, Mp/2].

    Rows are filled up to 16 with zero codes; columns that were padding become rows.
    """
    rows = F.pad(codes, (0, 0, 0, -codes.shape[-2] % NVFP4.block_size))

    # squares of 2x2 codes are two bytes here and two bytes there, so no code is unpacked:
    # 0.80 -> 0.34 ms at 1024^2 on a CPU
    upper, lower = rows[..., 0::2, :], rows[..., 1::2, :]
    shape = (*rows.shape[:-2], 2 * rows.shape[-1], rows.shape[-2] // 2)
    exchanged = torch.empty(shape, dtype=torch.uint8, device=codes.device)
    exchanged[..., 0::2, :] = ((upper & 15) | (lower << 4)).mT
    exchanged[..., 1::2, :] = ((upper >> 4) | (lower & 240)).mT
    return exchanged
