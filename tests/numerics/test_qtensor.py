"""A QTensor decodes to what its bytes say, in the shape it came from."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import (
    assert_bytes_equal,
    assert_codes_bitwise,
    assert_floats_bitwise,
    assert_qtensor_equal,
)

from nvfp4.backends.registry import BACKENDS
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import dequantize, quantize, transpose


def random_qtensor(
    rng: np.random.Generator, rows: int, k: int, block: tuple[int, int], row_scaled: bool
) -> QTensor:
    """Every code, every scale byte 0..126 and any finite global scale: more than a quantiser would
    ever produce."""
    kp = -(-k // 16) * 16
    codes = rng.integers(0, 256, (rows, kp // 2), dtype=np.uint8)
    scales = rng.integers(0, 127, (-(-rows // block[0]), kp // 16), dtype=np.uint8)
    globals_ = (2.0 ** rng.uniform(-130, 110, rows if row_scaled else 1)).astype(np.float32)
    return QTensor(
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        torch.from_numpy(globals_),
        block,
        (rows, k),
    )


def oracle_decode(q: QTensor) -> np.ndarray:
    return oracle.decode(
        q.codes.numpy(), q.block_scale.numpy(), q.global_scale.numpy(), q.contraction, q.block
    )


@pytest.mark.parametrize(
    ("block", "row_scaled"),
    [((1, 16), False), ((1, 16), True), ((16, 16), False)],
    ids=["blocks", "row_scaled", "tiles"],
)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 100), (16, 16), (37, 64)])
def test_dequantize_agrees_with_the_oracle(
    block: tuple[int, int], row_scaled: bool, rows: int, k: int, rng: np.random.Generator
) -> None:
    """Two products, each rounded once, in this order (the first is exact); padding cut off; -0
    kept; denormals kept."""
    q = random_qtensor(rng, rows, k, block, row_scaled)
    assert_floats_bitwise(q.dequantize(), oracle_decode(q), "x")
    assert_floats_bitwise(dequantize(q), oracle_decode(q), "x through ops")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_once_to_the_dtype(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The float32 value, cast: not codes and scales multiplied in the narrow type."""
    x = torch.from_numpy(rng.standard_normal((8, 64)).astype(np.float32))
    q = quantize(x, "rtn")
    want = torch.from_numpy(oracle_decode(q)).to(dtype)
    assert torch.equal(q.dequantize(dtype), want)
    assert torch.equal(dequantize(q, dtype), want)


def test_decode_blocks_is_exact_in_bf16(rng: np.random.Generator) -> None:
    """The GEMM operand: no global scale, padding kept, nothing lost when a 16-bit tensor core reads
    it."""
    q = random_qtensor(rng, 20, 72, (16, 16), False)
    decoded = q.decode_blocks()
    assert decoded.shape == (20, 80)
    assert torch.equal(decoded.bfloat16().float(), decoded)
    assert torch.equal(decoded.half().float(), decoded)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_shape_and_axis_come_back(axis: int, rng: np.random.Generator) -> None:
    """Whatever axis was contracted, dequantize returns the original order of axes."""
    x = torch.from_numpy(rng.standard_normal((3, 20, 5)).astype(np.float32))
    q = quantize(x, "rtn", axis=axis)
    assert q.shape == (3, 20, 5)
    assert q.contraction == x.shape[axis]
    moved = np.ascontiguousarray(np.moveaxis(x.numpy(), axis, -1))
    want = oracle.decode(
        *oracle.quantize(moved.reshape(-1, moved.shape[-1]), "rtn"), moved.shape[-1]
    )
    assert_floats_bitwise(q.dequantize(), np.moveaxis(want.reshape(moved.shape), -1, axis), "x")


def test_a_vector_is_one_row(rng: np.random.Generator) -> None:
    """Rank 1 works and stays rank 1."""
    x = torch.from_numpy(rng.standard_normal(50).astype(np.float32))
    q = quantize(x, "rtn")
    assert (q.rows, q.contraction, q.padded_contraction) == (1, 50, 64)
    assert_floats_bitwise(
        q.dequantize(), oracle.decode(*oracle.quantize(x.numpy()[None], "rtn"), 50)[0], "x"
    )


def test_rotated_coordinates_and_back(rng: np.random.Generator, seed: int) -> None:
    """rotated=True is what is stored, [M, Kp], bit for bit; the default turns it back in float32,
    not bit for bit.

    Two rounds multiply by powers of two, so only the 14 levels of butterflies round, each by 2^-24
    of its result, and
    an orthonormal transform spreads an error over its group without making it longer: 14 * 2^-24 *
    |group|, where
    |group| is at most sqrt(128) times the largest value.
    """
    x = rng.standard_normal((6, 100)).astype(np.float32)
    q = quantize(torch.from_numpy(x), "ms_eden", rounds=2, seed=seed)
    stored = q.dequantize(rotated=True)
    want = oracle.decode(*oracle.quantize(x, "ms_eden", rounds=2, seed=seed, sign_seed=seed), 128)
    assert_floats_bitwise(stored, want, "stored")
    basis = torch.from_numpy(oracle.rotate(np.eye(128, dtype=np.float32), seed, rounds=2)).double()
    exact = (stored.double() @ basis.t())[:, :100]
    assert (
        q.dequantize().double() - exact
    ).abs().max() <= 14 * 2**-24 * 128**0.5 * stored.abs().max()


def test_nan_global_scale_shows(rng: np.random.Generator) -> None:
    """Under a NaN global scale every value is NaN, though codes and scales are 0; a row-scaled one
    keeps to its row."""
    x = torch.from_numpy(rng.standard_normal((4, 32)).astype(np.float32))
    x[2, 7] = float("inf")
    whole = quantize(x, "rtn")
    assert whole.dequantize().isnan().all()
    assert not whole.codes.any()
    assert not whole.block_scale.any()
    by_row = quantize(x, "rtn", row_scaled=True).dequantize()
    assert by_row[2].isnan().all()
    assert by_row[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("n", "k"), [(32, 48), (20, 40), (16, 5), (1, 16), (330, 415)])
def test_transpose_keeps_every_value(
    n: int, k: int, backend: str, rng: np.random.Generator
) -> None:
    """The same weight codes, read along the other axis: bytes as defined, and it decodes to the
    transposed matrix."""
    if reason := BACKENDS[backend].unavailable(torch.device("cpu")):
        pytest.skip(reason)
    x = rng.standard_normal((n, k)).astype(np.float32)
    q = quantize(torch.from_numpy(x), "rtn_2d")
    t = transpose(q, backend=backend)
    codes, scales = oracle.transpose_tiles(q.codes.numpy(), q.block_scale.numpy(), k)
    assert_codes_bitwise(t.codes, codes)
    assert_bytes_equal(t.block_scale, scales, "block_scale")
    assert (t.contraction, t.rows) == (n, k)
    decoded = oracle.decode(codes, scales, q.global_scale.numpy(), n, (16, 16))
    assert_floats_bitwise(decoded, np.ascontiguousarray(oracle_decode(q).T), "transposed values")
    assert_floats_bitwise(
        t.dequantize(), q.dequantize(), "the tensor itself, in its own order of axes"
    )
    assert_qtensor_equal(transpose(t, backend=backend), q, "twice")


def test_transpose_refuses_what_it_cannot_share(rng: np.random.Generator) -> None:
    """1x16 scales and rotated operands belong to one direction."""
    x = torch.from_numpy(rng.standard_normal((16, 32)).astype(np.float32))
    rotated = quantize(x, "rtn", block=(16, 16), rotation=Rotation(16, 1, 5))
    for q in (quantize(x, "rtn"), rotated):
        with pytest.raises(ValueError, match=r"transpose\(\) needs"):
            q.transpose()


def test_size_is_what_the_format_promises() -> None:
    """4.5 bits an element, 4.03 with tiles, and one float32."""
    x = torch.ones(256, 512)
    assert (quantize(x, "rtn").nbytes - 4) * 8 == 4.5 * x.numel()
    assert (quantize(x, "rtn_2d").nbytes - 4) * 8 == (4 + 8 / 256) * x.numel()


def test_tensors_and_record_make_it_again(rng: np.random.Generator) -> None:
    """What an autograd function saves: three tensors, and a record that holds no storage."""
    q = random_qtensor(rng, 4, 20, (1, 16), True)
    again = QTensor(*q.tensors, *q.record)
    assert_qtensor_equal(again, q)
    assert (again.shape, again.axis, again.block, again.row_scaled) == (
        q.shape,
        q.axis,
        q.block,
        True,
    )
    assert not any(isinstance(part, torch.Tensor) for part in q.record)
    assert_qtensor_equal(q.to("cpu"), q)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0), (2, 0, 3), (0,)])
@pytest.mark.parametrize("axis", [0, -1])
def test_empty_tensors_come_back_empty(shape: tuple[int, ...], axis: int) -> None:
    """No tokens, or nothing to contract: the shape is kept and nothing is raised."""
    q = quantize(torch.zeros(shape), "rtn", axis=axis)
    assert q.dequantize().shape == shape
    assert q.dequantize().dtype == torch.float32
