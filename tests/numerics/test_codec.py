"""Codes and values are one to one, for every code there is: 16 of E2M1, 256 packed bytes, 128 of
E4M3."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from assertions import assert_bytes_equal, assert_floats_bitwise
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nvfp4.numerics.codec import e2m1_decode, e2m1_encode, e4m3_decode, e4m3_encode, pack, unpack
from nvfp4.numerics.torch_state import constant

CODES = torch.arange(16, dtype=torch.uint8)
BYTES = torch.arange(256, dtype=torch.uint8)


def test_all_e2m1_codes() -> None:
    """Values as enumerated, code 8 is -0, and encoding leads back."""
    assert_floats_bitwise(e2m1_decode(CODES), oracle.e2m1_value(CODES.numpy()), "e2m1")
    assert_bytes_equal(e2m1_encode(e2m1_decode(CODES)), CODES, "e2m1")


def test_all_e4m3_bytes() -> None:
    """Bytes 0..126 as enumerated and back; 127 is NaN."""
    bytes_ = BYTES[:127]
    assert_floats_bitwise(e4m3_decode(bytes_), oracle.E4M3.values, "e4m3")
    assert_bytes_equal(e4m3_encode(e4m3_decode(bytes_)), bytes_, "e4m3")
    assert e4m3_decode(BYTES[127:128]).isnan().all()


def test_e4m3_is_torch_float8() -> None:
    """torch's conversion of each grid value gives our byte: what scaled_mm will read is what we
    wrote."""
    values = torch.from_numpy(oracle.E4M3.values)
    assert_bytes_equal(
        e4m3_encode(values), values.to(torch.float8_e4m3fn).view(torch.uint8), "e4m3"
    )


def test_all_packed_bytes() -> None:
    """The even column is the low nibble, and no pair of codes is lost."""
    packed = BYTES.view(16, 16)
    codes = unpack(packed)
    assert_bytes_equal(codes[:, 0::2].contiguous(), packed & 15, "even columns")
    assert_bytes_equal(codes[:, 1::2].contiguous(), packed >> 4, "odd columns")
    assert_bytes_equal(pack(codes), packed, "bytes")


def test_packing_agrees_with_the_oracle(rng: np.random.Generator) -> None:
    """A matrix, and the transposed view of one: strides do not matter."""
    codes = rng.integers(0, 16, (6, 32), dtype=np.uint8)
    assert_bytes_equal(pack(torch.from_numpy(codes)), oracle.pack(codes), "pack")
    assert_bytes_equal(unpack(torch.from_numpy(oracle.pack(codes))), codes, "unpack")
    view = torch.from_numpy(np.ascontiguousarray(codes.T)).t()
    assert_bytes_equal(pack(view), oracle.pack(codes), "pack of a view")


def test_empty() -> None:
    """No codes, no bytes."""
    assert pack(torch.zeros(3, 0, dtype=torch.uint8)).shape == (3, 0)
    assert unpack(torch.zeros(0, 4, dtype=torch.uint8)).shape == (0, 8)


def test_tables_are_made_once_a_device_and_never_kept_from_a_mode():
    """A copy to a GPU cannot go into a CUDA graph, so decoding must find its table there; fake
    tensors are not kept."""
    cpu = torch.device("cpu")
    with FakeTensorMode():
        fake = constant((1.0, -2.5), cpu)
    kept = constant((1.0, -2.5), cpu)
    assert isinstance(fake, FakeTensor)
    assert type(kept) is torch.Tensor
    with torch.inference_mode():
        assert constant((7.0,), cpu) is constant((7.0,), cpu)
    assert not constant((7.0,), cpu).is_inference()
    assert constant((1.0, -2.5), cpu) is kept
    assert kept.tolist() == [1.0, -2.5]
