"""Matrices in groups, such as the tokens and the weights of experts: each quantised by itself.

    tokens x [S, K], ordered by expert      ``Groups``: rows offsets[e] to offsets[e + 1] are e's
    weights w [E, R, K]                     equal groups, without offsets

    of              group e is      codes                         block_scale
    x along K       [m_e, K]        [S, Kp/2]                     [S, Kp/16]
    x^T along m_e   [K, m_e]        flat, [K, Mp_e/2] each        flat, [K, Mp_e/16] each
    w along K       [R, K]          [E, R, Kp/2]                  [E, R, Kp/16]
    w^T along R     [K, R]          [E, K, Rp/2]                  [E, K, Rp/16]

with a global scale for each group, [E], or for each row. A group's codes are those that its matrix
has alone: own amax, own noise, own padding. So a NaN poisons the group that it is in.

How many rows a group has, the device alone may know: ``offsets`` lies there, and kernels look their
group up in it. Memory is asked for without that knowledge. What is padded to units of u along the
ragged axis begins at unit offsets[e] // u + e: as sum(ceil(m_i / u)) over i < e is no more, groups
never overlap, and all of them fit into S // u + E units. The gaps, less than a unit for each group,
are never read.

``GroupedQTensor.group`` is group e as a ``QTensor`` over the same memory, for whoever goes group by
group; it reads the offsets on the host, and on a GPU waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor, check_exchangeable, transposed_codes
from nvfp4.numerics.rng import DeviceSeed, Seed, seed_on_host, signed

Ragged = Literal["rows", "contraction"]
"""The axis along which groups differ in size."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows of a matrix [rows, ...] belong to which group.

    offsets: int32 [E + 1] on the matrix's device, from 0 to ``rows``, never falling: group e has
    rows offsets[e] to offsets[e + 1]. Nothing here reads it, but ``bounds``.
    """

    offsets: torch.Tensor
    rows: int

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device | str = "cpu") -> Groups:
        """Groups of these many rows, in order; ValueError for a negative number."""
        if any(size < 0 for size in sizes):
            raise ValueError(f"groups have 0 or more rows, got {list(sizes)}")
        offsets = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(0)
        return cls(offsets.to(torch.int32).to(device), sum(sizes))

    @property
    def count(self) -> int:
        """E: how many groups."""
        return self.offsets.shape[0] - 1

    @cached_property
    def bounds(self) -> list[int]:
        """The offsets on the host, which waits for the device once; ValueError if they are none."""
        bounds = self.offsets.tolist()
        if sorted(bounds) != bounds or bounds[0] != 0 or bounds[-1] != self.rows:
            raise ValueError(f"offsets must go from 0 to {self.rows}, never falling: got {bounds}")
        return bounds

    def split(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of each group."""
        return (x[start:stop] for start, stop in zip(self.bounds, self.bounds[1:], strict=False))

    def first_unit(self, group: int, unit: int) -> int:
        """Where a group begins in memory, in units of the ragged axis."""
        return self.bounds[group] if unit == 1 else self.bounds[group] // unit + group

    def units(self, unit: int) -> int:
        """How many units of memory all groups take, whatever their sizes."""
        return self.rows if unit == 1 else self.rows // unit + self.count


def of_group(seed: Seed | None, group: int) -> Seed | None:
    """The seed of one group, of seeds int64 [E] on a device."""
    return DeviceSeed(seed.bits[group]) if isinstance(seed, DeviceSeed) else seed


def rotation_of(rotation: Rotation | None, group: int) -> Rotation | None:
    """The rotation of one group: the signs of each are its own."""
    if rotation is None or rotation.sign_seed is None:
        return rotation
    return replace(rotation, sign_seed=of_group(rotation.sign_seed, group))


@dataclass(frozen=True, eq=False)
class GroupedQTensor:
    """Codes and scales of E matrices, in the layouts at the head of the file.

    rows, contraction: of each group's matrix, before padding; of the ragged axis, of all groups
    together. groups: of the ragged axis, None if there is none, and then count says E. global_scale
    float32 [E], or row-scaled one for each row: [S], or [E * rows]. rotation: its sign_seed, if it
    has one, is a ``DeviceSeed`` of int64 [E].
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    block: tuple[int, int]
    rows: int
    contraction: int
    count: int
    groups: Groups | None = None
    ragged: Ragged | None = None
    row_scaled: bool = False
    rotation: Rotation | None = None

    @classmethod
    def empty(
        cls,
        rows: int,
        contraction: int,
        groups: Groups | int,
        ragged: Ragged | None,
        block: tuple[int, int],
        row_scaled: bool,
        rotation: Rotation | None,
        device: torch.device,
    ) -> GroupedQTensor:
        """Uninitialised codes and scales; groups: of the ragged axis, or how many equal ones."""
        count = groups if isinstance(groups, int) else groups.count
        unit = NVFP4.block_size if rotation is None else rotation.group
        scale_rows = -(-rows // block[0])

        # the shapes of codes and block scales, as the table has them
        shape: tuple[int, ...]
        scales: tuple[int, ...]
        if isinstance(groups, int):
            padded = -(-contraction // unit) * unit
            shape = (count, rows, padded // 2)
            scales = (count, scale_rows, padded // NVFP4.block_size)
        elif ragged == "rows":
            padded = -(-contraction // unit) * unit
            shape = (rows, padded // 2)
            scales = (groups.units(block[0]), padded // NVFP4.block_size)
        else:
            padded = groups.units(unit) * unit
            shape, scales = (rows * padded // 2,), (scale_rows * padded // NVFP4.block_size,)

        each = count if not row_scaled else rows if ragged == "rows" else count * rows
        return cls(
            torch.empty(shape, dtype=torch.uint8, device=device),
            torch.empty(scales, dtype=torch.uint8, device=device),
            torch.empty(each, dtype=torch.float32, device=device),
            block,
            rows,
            contraction,
            count,
            None if isinstance(groups, int) else groups,
            ragged,
            row_scaled,
            rotation,
        )

    @classmethod
    def of(cls, parts: Sequence[QTensor], ragged: Ragged | None) -> GroupedQTensor:
        """These matrices as the groups of one, copied; ragged: what they differ in."""
        first = parts[0]
        sizes = [q.rows if ragged == "rows" else q.contraction for q in parts]
        groups = Groups.of(sizes, first.device)
        seeds = [None if q.rotation is None else q.rotation.sign_seed for q in parts]
        rotation = first.rotation
        if rotation is not None and rotation.sign_seed is not None:
            bits = torch.tensor([signed(seed_on_host(seed)) for seed in seeds], device=first.device)
            rotation = replace(rotation, sign_seed=DeviceSeed(bits))
        made = cls.empty(
            groups.rows if ragged == "rows" else first.rows,
            groups.rows if ragged == "contraction" else first.contraction,
            len(parts) if ragged is None else groups,
            ragged,
            first.block,
            any(q.row_scaled for q in parts),
            rotation,
            first.device,
        )
        for e, q in enumerate(parts):
            made.group(e).overwrite(q)
        return made

    def empty_transpose(
        self, block: tuple[int, int], row_scaled: bool, rotation: Rotation | None
    ) -> GroupedQTensor:
        """Uninitialised codes of the transpose of every group [m, K]: [K, m]."""
        return self.empty(
            self.contraction,
            self.rows,
            self.count if self.groups is None else self.groups,
            None if self.groups is None else "contraction",
            block,
            row_scaled,
            rotation,
            self.device,
        )

    @property
    def unit(self) -> int:
        """What the contraction is padded to: 16, or the group of the rotation."""
        return NVFP4.block_size if self.rotation is None else self.rotation.group

    @property
    def padded_contraction(self) -> int:
        """Kp, where the contraction is not ragged."""
        return self.codes.shape[-1] * 2

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes, block_scale, global_scale), as a ``QTensor`` has them."""
        return self.codes, self.block_scale, self.global_scale

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def record(self) -> tuple[object, ...]:
        """What two of them must share for one to be written over the other."""
        shape = (self.rows, self.contraction, self.count, self.ragged, self.row_scaled)
        return self.block, *shape, self.rotation

    def overwrite(self, source: GroupedQTensor) -> None:
        """Write codes and scales of ``source``, of the same record, over this one's memory."""
        for target, tensor in zip(self.tensors, source.tensors, strict=True):
            target.copy_(tensor)

    def group(self, e: int) -> QTensor:
        """Group e over the same memory; reads the offsets on the host."""
        rotation = rotation_of(self.rotation, e)

        # equal groups, one after the other
        if self.groups is None:
            per_row = slice(e * self.rows, (e + 1) * self.rows)
            scale = self.global_scale[per_row if self.row_scaled else slice(e, e + 1)]
            shape = (self.rows, self.contraction)
            return QTensor(
                self.codes[e], self.block_scale[e], scale, self.block, shape, -1, rotation
            )

        # some rows of one matrix
        start, stop = self.groups.bounds[e], self.groups.bounds[e + 1]
        if self.ragged == "rows":
            tall = self.block[0]
            first = self.groups.first_unit(e, tall)
            scales = self.block_scale[first : first + -(-(stop - start) // tall)]
            each = slice(start, stop) if self.row_scaled else slice(e, e + 1)
            return QTensor(
                self.codes[start:stop],
                scales,
                self.global_scale[each],
                self.block,
                (stop - start, self.contraction),
                -1,
                rotation,
            )

        # a matrix of its own width
        first = self.groups.first_unit(e, self.unit) * self.unit
        padded = -(-(stop - start) // self.unit) * self.unit
        each = slice(e * self.rows, (e + 1) * self.rows) if self.row_scaled else slice(e, e + 1)
        return QTensor(
            _matrix(self.codes, self.rows, first // 2, padded // 2),
            _matrix(
                self.block_scale,
                -(-self.rows // self.block[0]),
                first // NVFP4.block_size,
                padded // NVFP4.block_size,
            ),
            self.global_scale[each],
            self.block,
            (self.rows, stop - start),
            -1,
            rotation,
        )

    def each(self) -> list[QTensor]:
        """Every group."""
        return [self.group(e) for e in range(self.count)]

    def transpose(self) -> GroupedQTensor:
        """Equal groups in 16x16 blocks, rows and contraction of each exchanged.

        As ``QTensor.transpose``, for all groups at once; ValueError where that has none, and for
        ragged groups.
        """
        if self.groups is not None:
            raise ValueError("ragged groups are transposed one by one: see ``group``")
        check_exchangeable(self.block, self.rotation, (self.rows, self.contraction))
        codes = transposed_codes(self.codes)[:, : self.contraction]
        return replace(
            self,
            codes=codes.contiguous(),
            block_scale=self.block_scale.mT.contiguous(),
            rows=self.contraction,
            contraction=self.rows,
        )


def _matrix(flat: torch.Tensor, rows: int, first: int, width: int) -> torch.Tensor:
    """[rows, width] of flat memory in which the groups before it take ``first`` columns."""
    return flat[rows * first : rows * (first + width)].view(rows, width)
