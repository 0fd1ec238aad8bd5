"""The door to the backends: any tensor is the 2-D contiguous float32 case, and every misuse is
named."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from assertions import assert_floats_bitwise, assert_qtensor_equal

import nvfp4
from nvfp4.backends.registry import BACKENDS
from nvfp4.ops import quantize_with, requantize_with
from nvfp4.quantizers.base import Options
from nvfp4.quantizers.registry import get_quantizer

CASES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "rtn_2d": {},
    "sr": {"seed": 5},
    "sr_te": {"seed": 2**63 + 9},
    "four_over_six": {"row_scaled": True},
    "scale_search": {"block": (16, 16)},
    "ms_eden": {"seed": 3, "sign_seed": 4, "rounds": 2, "group": 32},
}
"""Every quantiser once, with an option that changes its path where there is one."""


def _strided(kind: str) -> torch.Tensor:
    """A [6, 40] float32 tensor without the plain strides (40, 1)."""
    if kind == "transposed":
        return torch.randn(40, 6).t()
    if kind == "sliced":
        return torch.randn(12, 90)[::2, 5:85:2]
    if kind == "expanded":
        return torch.randn(1, 40).expand(6, 40)
    assert kind == "storage offset"
    return torch.randn(7 * 40 + 3).as_strided((6, 40), (40, 1), 3)


@pytest.mark.parametrize("quantizer", CASES)
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "storage offset"])
def test_strides_do_not_matter(quantizer: str, kind: str) -> None:
    """Any strides give the codes of the contiguous copy, and the input is not written to."""
    x = _strided(kind)
    before = x.clone()
    want = nvfp4.quantize(
        x.clone(memory_format=torch.contiguous_format), quantizer, **CASES[quantizer]
    )
    assert_qtensor_equal(nvfp4.quantize(x, quantizer, **CASES[quantizer]), want)
    assert torch.equal(x, before)


@pytest.mark.parametrize("quantizer", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_exactly(quantizer: str, dtype: torch.dtype) -> None:
    """BF16 and FP16 give the codes of their exact float32 values."""
    x = torch.randn(6, 40).to(dtype)
    want = nvfp4.quantize(x.float(), quantizer, **CASES[quantizer])
    assert_qtensor_equal(nvfp4.quantize(x, quantizer, **CASES[quantizer]), want)


SHAPES = [
    ((40,), -1),
    ((40,), 0),
    ((6, 40), 0),
    ((6, 40), -2),
    ((3, 4, 20), -1),
    ((3, 4, 20), 1),
    ((3, 4, 20), 0),
]
SHAPES += [((2, 3, 5, 7), axis) for axis in (-4, -3, 2, 3)]


@pytest.mark.parametrize("quantizer", CASES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_rank_and_axis_reduce_to_a_matrix(
    quantizer: str, shape: tuple[int, ...], axis: int
) -> None:
    """Codes are those of the matrix with ``axis`` last, the other axes flattened in order; decoding
    gives the shape."""
    x = torch.randn(shape)
    matrix = torch.movedim(x, axis, -1).reshape(-1, shape[axis]).contiguous()
    q = nvfp4.quantize(x, quantizer, axis=axis, **CASES[quantizer])
    flat = nvfp4.quantize(matrix, quantizer, **CASES[quantizer])
    assert_qtensor_equal(q, flat)
    assert (q.shape, q.contraction, q.rows) == (shape, shape[axis], matrix.shape[0])
    decoded = nvfp4.dequantize(q)
    assert decoded.shape == shape
    back = torch.movedim(decoded, axis, -1).reshape(-1, shape[axis]).contiguous()
    assert_floats_bitwise(back, nvfp4.dequantize(flat).contiguous(), "decoded")


@pytest.mark.parametrize("quantizer", CASES)
@pytest.mark.parametrize("shape", [(0, 40), (6, 0), (0, 0), (2, 0, 5), (0,)])
def test_empty(quantizer: str, shape: tuple[int, ...]) -> None:
    """Nothing in, nothing out: empty codes, global scales of 1, and a decoded tensor of the same
    empty shape."""
    q = nvfp4.quantize(torch.zeros(shape), quantizer, **CASES[quantizer])
    assert q.codes.numel() == q.block_scale.numel() == 0
    assert (q.global_scale == 1).all()
    assert nvfp4.dequantize(q).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_dtype(dtype: torch.dtype) -> None:
    """The float32 value, rounded once to the dtype asked for."""
    q = nvfp4.quantize(torch.randn(5, 33))
    assert torch.equal(nvfp4.dequantize(q, dtype), nvfp4.dequantize(q).to(dtype))
    assert nvfp4.dequantize(q, dtype).dtype == dtype


def test_defaults() -> None:
    """scale_search along the last axis; sign_seed is seed if not given."""
    x = torch.randn(4, 140)
    assert_qtensor_equal(nvfp4.quantize(x), nvfp4.quantize(x, "scale_search", axis=-1))
    alone, both = (
        nvfp4.quantize(x, "ms_eden", seed=7),
        nvfp4.quantize(x, "ms_eden", seed=7, sign_seed=7),
    )
    assert_qtensor_equal(alone, both)
    assert alone.rotation == both.rotation == nvfp4.Rotation(128, 1, 7)
    other = nvfp4.quantize(x, "ms_eden", seed=7, sign_seed=8)
    assert not torch.equal(alone.codes, other.codes)


def test_rotation_option_is_rotate_then_quantise() -> None:
    """``rotation=`` gives the codes of the rotated matrix, drawn and fixed (the fixed one by the
    oracle)."""
    x = torch.randn(5, 50)
    drawn = nvfp4.quantize(x, "sr", seed=1, rotation=nvfp4.Rotation(32, 2, 9))
    assert_qtensor_equal(
        drawn, nvfp4.quantize(nvfp4.rotate(x, 9, rounds=2, group=32), "sr", seed=1)
    )
    fixed = nvfp4.quantize(x, "rtn", rotation=nvfp4.Rotation(16, fixed=True))
    assert_qtensor_equal(
        fixed, nvfp4.quantize(torch.from_numpy(oracle.nvidia_rotate(x.numpy())), "rtn")
    )


X = torch.zeros(4, 32)

QUANTIZE_ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "float64": (X.double(), {}, TypeError, r"x must be one of float32, .*got torch\.float64"),
    "integers": (X.int(), {}, TypeError, r"x must be one of .*got torch\.int32"),
    "complex": (X.to(torch.complex64), {}, TypeError, r"x must be one of .*got torch\.complex64"),
    "a list": ([1.0, 2.0], {}, TypeError, r"x must be a torch\.Tensor, got list"),
    "axis too large": (
        X,
        {"axis": 2},
        ValueError,
        r"axis must be in \[-2, 1\].*shape \(4, 32\), got 2",
    ),
    "axis too small": (X, {"axis": -3}, ValueError, "axis must be in .*got -3"),
    "a scalar has no axis": (torch.tensor(1.0), {}, ValueError, "axis must be in"),
    "unknown quantiser": (
        X,
        {"quantizer": "rtn2"},
        ValueError,
        "unknown quantizer 'rtn2'; known: rtn, rtn_2d",
    ),
    "unknown option": (
        X,
        {"metrik": "mse"},
        TypeError,
        "unknown option 'metrik' for scale_search; it takes",
    ),
    "option of another": (
        X,
        {"quantizer": "rtn", "search": True},
        ValueError,
        "rtn does not take search=True",
    ),
    "metric": (
        X,
        {"quantizer": "four_over_six", "metric": "l1"},
        ValueError,
        "metric must be one of .*got 'l1'",
    ),
    "block": (X, {"block": (4, 4)}, ValueError, r"block must be .*got \(4, 4\)"),
    "row_scaled tiles": (
        X,
        {"row_scaled": True, "block": (16, 16)},
        ValueError,
        "row_scaled needs block",
    ),
    "no seed": (X, {"quantizer": "sr"}, ValueError, "sr is stochastic: pass seed="),
    "negative seed": (
        X,
        {"quantizer": "sr", "seed": -1},
        ValueError,
        r"seed must be an integer in \[0, 2\*\*64\)",
    ),
    "huge seed": (X, {"quantizer": "sr", "seed": 2**64}, ValueError, "seed must be an integer"),
    "seed of a float": (
        X,
        {"quantizer": "sr", "seed": 1.0},
        ValueError,
        r"seed must be an integer.*got 1\.0",
    ),
    "sign seed": (
        X,
        {"quantizer": "ms_eden", "seed": 1, "sign_seed": -2},
        ValueError,
        "sign_seed must be .*got -2",
    ),
    "group": (
        X,
        {"quantizer": "ms_eden", "seed": 1, "group": 24},
        ValueError,
        "group must be one of .*got 24",
    ),
    "rounds": (
        X,
        {"quantizer": "ms_eden", "seed": 1, "rounds": 4},
        ValueError,
        "rounds must be 1, 2 or 3, got 4",
    ),
    "backend": (
        X,
        {"backend": "nonsense"},
        ValueError,
        "unknown backend 'nonsense'; known: auto, .*reference",
    ),
}


@pytest.mark.parametrize("case", QUANTIZE_ERRORS)
def test_quantize_errors_name_the_argument(case: str) -> None:
    """What was wrong, what was expected, what came."""
    x, arguments, error, message = QUANTIZE_ERRORS[case]
    with pytest.raises(error, match=message):
        nvfp4.quantize(x, **arguments)


def test_backend_nonsense_everywhere() -> None:
    """Every door checks the name of the backend; a known one gives what "auto" gives."""
    q = nvfp4.quantize(X, backend="reference")
    for call in (
        lambda: nvfp4.dequantize(q, backend="nonsense"),
        lambda: nvfp4.matmul(q, q, backend="nonsense"),
        lambda: nvfp4.convert(torch.nn.Linear(4, 4), backend="nonsense"),
    ):
        with pytest.raises(
            ValueError, match=r"unknown backend 'nonsense'; known: auto, .*reference"
        ):
            call()
    assert_qtensor_equal(q, nvfp4.quantize(X))


def _narrow(rows: int, columns: int) -> torch.Tensor:
    """Magnitudes in [1/2, 1]: every block maximum is above 1/2, so products of decoded values share
    a narrow range."""
    return (torch.rand(rows, columns) / 2 + 0.5) * (torch.randint(0, 2, (rows, columns)) * 2 - 1)


@pytest.mark.parametrize(
    ("lead_a", "lead_b"), [((5,), (3,)), ((2, 3), (4,)), ((), (3,)), ((5,), ()), ((2, 3), (2, 2))]
)
@pytest.mark.parametrize("quantizer", ["rtn", "rtn_2d", "scale_search"])
def test_matmul_is_the_product_of_what_is_stored(
    lead_a: tuple[int, ...], lead_b: tuple[int, ...], quantizer: str
) -> None:
    """Bitwise fl(fl(acc ga) gb) + bias, cast once, for all leading axes.

    acc is exact: with magnitudes in [1/2, 1] block scales lie in [64, 448], multiples of 2^3, so
    values are multiples of 2^2 up to 6 * 448, products multiples of 2^4 below 2^22.8, and 33 of
    them below 2^28: 24 bits.
    """
    a = nvfp4.quantize(
        _narrow(max(1, len(lead_a) and torch.Size(lead_a).numel()), 33).view(*lead_a, 33), quantizer
    )
    b = nvfp4.quantize(
        _narrow(max(1, len(lead_b) and torch.Size(lead_b).numel()), 33).view(*lead_b, 33), quantizer
    )
    bias = torch.randn(lead_b)
    accumulated = (a.decode_blocks().double() @ b.decode_blocks().double().t()).float()
    want = (accumulated * a.global_scale * b.global_scale).view(*lead_a, *lead_b)
    assert_floats_bitwise(nvfp4.matmul(a, b), want, "y")
    if lead_b:
        flat = nvfp4.matmul(a, b, torch.bfloat16, bias=bias.view(-1))
        assert torch.equal(flat, (want + bias).to(torch.bfloat16))


def test_matmul_row_scaled_on_both_sides() -> None:
    """Row scales of a go with rows of the output, those of b with its columns; each is applied
    once."""
    a = nvfp4.quantize(
        _narrow(5, 32) * torch.tensor([1.0, 3, 10, 0.01, 7])[:, None], "rtn", row_scaled=True
    )
    b = nvfp4.quantize(
        _narrow(3, 32) * torch.tensor([2.0, 0.3, 50])[:, None], "rtn", row_scaled=True
    )
    # exact, as above
    accumulated = (a.decode_blocks().double() @ b.decode_blocks().double().t()).float()
    want = (accumulated * a.global_scale[:, None]) * b.global_scale[None, :]
    assert_floats_bitwise(nvfp4.matmul(a, b), want, "y")


def test_matmul_nan_reaches_its_rows_alone() -> None:
    """A NaN in a row-scaled operand makes its output row NaN, in a tensor-scaled one everything,
    though acc is 0."""
    x = _narrow(4, 32)
    x[2, 5] = float("inf")
    b = nvfp4.quantize(torch.zeros(3, 32), "rtn")
    rows = nvfp4.matmul(nvfp4.quantize(x, "rtn", row_scaled=True), b)
    assert rows.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert (rows[[0, 1, 3]] == 0).all()
    assert nvfp4.matmul(nvfp4.quantize(x, "rtn"), b).isnan().all()
    assert nvfp4.matmul(b, nvfp4.quantize(x, "rtn", row_scaled=True)).isnan().all(
        dim=0
    ).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_ignores_autocast(dtype: torch.dtype, backend: str) -> None:
    """The accumulator stays float32 under autocast; the same product without it, bit for bit."""
    a, b = nvfp4.quantize(torch.randn(8, 64)), nvfp4.quantize(torch.randn(8, 64))
    want = nvfp4.matmul(a, b, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        assert_floats_bitwise(nvfp4.matmul(a, b, backend=backend), want, "y")


def test_matmul_refuses_what_cannot_meet() -> None:
    """Other lengths, other padding, other rotations and other devices, each with both values in the
    message."""
    plain = nvfp4.quantize(torch.randn(3, 128))
    with pytest.raises(
        ValueError, match=r"different lengths: 128 \(padded 128\) and 127 \(padded 128\)"
    ):
        nvfp4.matmul(plain, nvfp4.quantize(torch.randn(3, 127)))
    with pytest.raises(
        ValueError, match=r"different lengths: 100 \(padded 128\) and 100 \(padded 112\)"
    ):
        nvfp4.matmul(
            nvfp4.quantize(torch.randn(3, 100), "ms_eden", seed=1),
            nvfp4.quantize(torch.randn(3, 100)),
        )
    rotated = nvfp4.quantize(torch.randn(3, 128), "ms_eden", seed=1, sign_seed=2)
    for other in (
        plain,
        nvfp4.quantize(torch.randn(3, 128), "ms_eden", seed=1, sign_seed=3),
        nvfp4.quantize(torch.randn(3, 128), "ms_eden", seed=1, sign_seed=2, rounds=2),
        nvfp4.quantize(torch.randn(3, 128), "ms_eden", seed=1, sign_seed=2, group=64),
        nvfp4.quantize(torch.randn(3, 128), "rtn", rotation=nvfp4.Rotation(16, fixed=True)),
    ):
        with pytest.raises(ValueError, match="rotated differently"):
            nvfp4.matmul(rotated, other)
    with pytest.raises(ValueError, match="different devices: cpu and meta"):
        nvfp4.matmul(plain, plain.to("meta"))
    for bias in (torch.zeros(2), torch.zeros(1), torch.zeros(3, 3), torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match=r"bias must be \[3\] on cpu, got"):
            nvfp4.matmul(plain, plain, bias=bias)
    with pytest.raises(
        TypeError, match=r"out_dtype must be float32, bfloat16 or float16, got torch\.float64"
    ):
        nvfp4.matmul(plain, plain, torch.float64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("quantizer", ["rtn", "rtn_2d"])
def test_strides_of_codes_do_not_matter(backend: str, quantizer: str) -> None:
    """Codes and scales are read by index, not by position in memory: any strides decode and
    multiply alike."""
    q = nvfp4.quantize(torch.randn(32, 64), quantizer)
    strided = nvfp4.QTensor(
        *(t.t().contiguous().t() if t.dim() == 2 else t for t in q.tensors), *q.record
    )
    assert strided.codes.stride() != q.codes.stride()
    want = q.dequantize()
    assert torch.equal(nvfp4.dequantize(strided, backend=backend), want)
    product = nvfp4.matmul(q, q, backend=backend)
    assert torch.equal(nvfp4.matmul(strided, strided, backend=backend), product)
    rtn = get_quantizer("rtn")
    again = requantize_with(strided, rtn, rtn.check(), backend=backend)
    assert_qtensor_equal(again, nvfp4.quantize(want.t().contiguous(), "rtn", backend="reference"))


@pytest.mark.parametrize("quantizer", CASES)
@pytest.mark.parametrize("source", ["rtn", "rtn_2d", "four_over_six", "ms_eden"])
@pytest.mark.parametrize("shape", [(37, 50), (32, 64), (1, 1), (0, 16)])
def test_requantize_is_decode_transpose_quantise(
    quantizer: str, source: str, shape: tuple[int, int]
) -> None:
    """Requantising equals its three steps in float32, padding cut in between, bit for bit, on the
    default backend."""
    q = nvfp4.quantize(torch.randn(shape), source, **({"seed": 1} if source == "ms_eden" else {}))
    chosen = get_quantizer(quantizer)
    got = requantize_with(q, chosen, chosen.check(**CASES[quantizer]))
    decoded = q.dequantize().t().contiguous()
    assert_qtensor_equal(
        got, nvfp4.quantize(decoded, quantizer, backend="reference", **CASES[quantizer])
    )
    assert got.shape == (shape[1], shape[0])
    with pytest.raises(ValueError, match="q must be a matrix quantised along its last axis"):
        requantize_with(
            nvfp4.quantize(torch.randn(2, 3, 4)), chosen, chosen.check(**CASES[quantizer])
        )


def test_quantize_does_not_build_a_graph() -> None:
    """Quantising is no differentiable operation: codes of a tensor that requires grad carry
    none."""
    q = nvfp4.quantize(torch.randn(4, 32, requires_grad=True))
    assert not any(t.requires_grad for t in q.tensors)


def test_explain() -> None:
    """One line a backend in order of preference, exactly one chosen; names are checked here too."""
    for arguments in (
        ("quantize", "cpu", "ms_eden"),
        ("matmul", "cpu"),
        ("dequantize", torch.device("cpu")),
    ):
        lines = nvfp4.explain(*arguments).splitlines()
        assert [line.split(":")[0] for line in lines] == list(BACKENDS)
        assert sum(line.endswith(": chosen") for line in lines) == 1
    with pytest.raises(ValueError, match="unknown quantizer"):
        nvfp4.explain("quantize", "cpu", "nonsense")
    with pytest.raises(ValueError, match="rtn does not take search"):
        nvfp4.explain("quantize", "cpu", "rtn", search=True)


def test_explain_gives_the_reason_and_auto_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that refuses is passed over by "auto", explained by its own words, and raises them
    if asked for."""
    reference = BACKENDS["reference"]

    class Picky(type(reference)):  # type: ignore[misc]
        name = "picky"

        def refuses(
            self, operation: str, quantizer: Any = None, options: Options | None = None
        ) -> str | None:
            return "only rtn" if operation == "quantize" and quantizer.name != "rtn" else None

        def quantize(self, x: torch.Tensor, quantizer: Any, options: Options) -> nvfp4.QTensor:
            ran.append(quantizer.name)
            return super().quantize(x, quantizer, options)

    ran: list[str] = []
    picky = Picky()
    monkeypatch.setattr(
        "nvfp4.backends.registry.BACKENDS", {"picky": picky, "reference": reference}
    )
    assert nvfp4.explain("quantize", "cpu", "sr") == "picky: only rtn\nreference: chosen"
    assert nvfp4.explain("quantize", "cpu", "rtn") == "picky: chosen\nreference: available"
    nvfp4.quantize(X, "rtn")
    nvfp4.quantize(X, "scale_search")
    assert ran == ["rtn"]
    with pytest.raises(
        nvfp4.BackendUnavailable, match="'picky' cannot quantize here: only rtn; use backend='auto'"
    ):
        nvfp4.quantize(X, "scale_search", backend="picky")
    monkeypatch.setattr(picky, "unavailable", lambda device: "no such chip")
    with pytest.raises(nvfp4.BackendUnavailable, match="'picky' cannot run on cpu: no such chip"):
        nvfp4.convert(torch.nn.Linear(4, 4), backend="picky")


def test_quantize_with_is_quantize() -> None:
    """The layer's entry, with quantiser and options looked up before, gives the same codes."""
    x, chosen = torch.randn(4, 50, 3), get_quantizer("sr")
    got = quantize_with(x, chosen, chosen.check(seed=5), axis=1)
    assert_qtensor_equal(got, nvfp4.quantize(x, "sr", axis=1, seed=5))
