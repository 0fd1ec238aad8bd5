"""Dense products of 16-bit matrices: float32 sums, one rounding, whatever the instruction set,
orientation and threads.

Bits are asked for where every order of summation gives the same: small integers, whose sums stay
below 2^24. Elsewhere the float32 error of a sum of K exact products bounds the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4
from nvfp4.backends.native import cpu
from nvfp4.backends.native.cpu import dense_product
from nvfp4.backends.native.products import PAIRS, products
from nvfp4.layer import dense

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = [name for name in products() if name != PAIRS]
ISAS = [*KERNELS, "portable"]  # the last one: torch multiplies float32 copies
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (6, 16, 8),
    (14, 32, 16),
    (13, 33, 17),
    (97, 40, 300),
    (40, 257, 64),
    (20, 30, 515),
]
"""Rows, columns, contraction: single elements, one tile of each kernel, ragged ones, several blocks
and depths."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without BF16 and FP16 instructions, whatever runs the tests."""
    for module in (dense, cpu):
        monkeypatch.setattr(module, "EMULATED", frozenset({torch.bfloat16, torch.float16}))


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads comes back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def integers(rows: int, columns: int, dtype: torch.dtype, across: bool = False) -> torch.Tensor:
    """-8 to 8: products of 515 pairs add up to less than 2^24. across: columns contiguous in
    memory."""
    x = torch.randint(-8, 9, (rows, columns)).to(dtype)
    return x.t().contiguous().t() if across else x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_products_agree_bitwise(isa: str, dtype: torch.dtype) -> None:
    """Every shape in every orientation, with bias and without, into every dtype."""
    for (m, n, k), a_across, b_across in itertools.product(SHAPES, (False, True), (False, True)):
        a, b = integers(m, k, dtype, a_across), integers(n, k, dtype, b_across)
        bias = torch.randn(n)
        want = a.float() @ b.float().t()
        for out in DTYPES:
            got = dense_product(a, b, None, out, isa)
            assert torch.equal(got, want.to(out)), f"{m} {n} {k} {a_across} {b_across} {out}"
            assert torch.equal(dense_product(a, b, bias, out, isa), (want + bias).to(out))
            if out != torch.float32:
                narrow = bias.to(out)
                assert torch.equal(
                    dense_product(a, b, narrow, out, isa), (want + narrow.float()).to(out)
                )


@pytest.mark.parametrize("isa", ISAS)
def test_operands_may_have_different_dtypes(isa: str) -> None:
    """A gradient in float32 meets an activation in BF16."""
    for left, right in itertools.permutations(DTYPES, 2):
        a, b = integers(20, 50, left), integers(30, 50, right)
        assert torch.equal(dense_product(a, b, None, torch.float32, isa), a.float() @ b.float().t())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_products_agree_within_float32_summation(isa: str, dtype: torch.dtype) -> None:
    """Products of 16-bit floats are exact, K - 1 additions each err by 2^-24 of at most sum |p|;
    hence the bound."""
    for m, n, k in SHAPES:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        exact = a.double() @ b.double().t()
        bound = k * 2**-24 * (a.double().abs() @ b.double().abs().t())
        got = dense_product(a, b, None, torch.float32, isa)
        assert ((got.double() - exact).abs() <= bound).all()
        assert torch.equal(dense_product(a, b, None, dtype, isa), got.to(dtype)), (
            "rounded once, from the same sums"
        )


@pytest.mark.parametrize("isa", ISAS)
def test_memory_does_not_matter(isa: str) -> None:
    """Rows apart, columns apart, both, one element seen many times, a single row or column, an odd
    address."""
    whole = integers(64, 96, torch.bfloat16)
    b = integers(12, 24, torch.bfloat16)
    for a in (
        whole[3:20, 5:29],
        whole[::3, 7:31],
        whole[:20, 1:49:2],
        whole.t()[4:33, 9:33],
        whole[1:2, :24],
        whole[:1, :24].expand(9, 24),
        whole[:1, :1].expand(9, 24),
        whole[:9, :1].expand(9, 24),
        torch.ones((), dtype=torch.bfloat16).expand(7, 24),
    ):
        want = a.float() @ b.float().t()
        assert torch.equal(dense_product(a, b, None, torch.float32, isa), want)
        assert torch.equal(dense_product(b, a, None, torch.float32, isa), want.t())
    column = whole[:, 3:4]
    assert torch.equal(
        dense_product(column, column, None, torch.float32, isa), column.float() @ column.float().t()
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_products(isa: str, m: int, n: int, k: int) -> None:
    """No rows give no rows; nothing to contract gives the bias, or zeros."""
    a, b, bias = (
        torch.ones(m, k).bfloat16(),
        torch.ones(n, k).bfloat16(),
        torch.arange(n).bfloat16(),
    )
    assert torch.equal(dense_product(a, b, None, torch.bfloat16, isa), torch.zeros(m, n).bfloat16())
    assert torch.equal(dense_product(a, b, bias, torch.bfloat16, isa), bias.expand(m, n))


@pytest.mark.parametrize("isa", ISAS)
def test_not_finite_and_tiny_numbers(isa: str) -> None:
    """NaN stays in its row, Inf times 0 is NaN, sums beyond the dtype are Inf, subnormal operands
    are not flushed."""
    a, b = integers(20, 40, torch.bfloat16), integers(24, 40, torch.bfloat16)
    a[3, 5], b[7, 6] = float("nan"), float("inf")
    a[:, 6] = 0
    for dtype in DTYPES:
        y = dense_product(a, b, None, dtype, isa)
        assert y[3].isnan().all()
        assert y[:, 7].isnan().all()
        assert y.isfinite().sum() == 19 * 23
    large = torch.full((2, 2), 3e38).bfloat16()
    assert dense_product(large, torch.ones(2, 2).bfloat16(), None, torch.float32, isa).isinf().all()
    tiny = torch.full((1, 1), 2.0**-130).bfloat16()
    assert (
        dense_product(tiny, torch.ones(1, 1).bfloat16(), None, torch.float32, isa).item()
        == 2.0**-130
    )


@pytest.mark.parametrize("isa", KERNELS)
def test_threads_do_not_change_bits(isa: str, threads: None) -> None:
    """Every sum runs along the contraction, whoever computes it. Large enough for more than one
    thread."""
    a, b = torch.randn(200, 700).bfloat16(), torch.randn(170, 700).bfloat16()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(dense_product(a, b, None, torch.float32, isa))
    assert all(torch.equal(found[0], other) for other in found[1:])


def layer(dtype: torch.dtype, lead: tuple[int, ...] = (2, 3)) -> tuple[torch.Tensor, ...]:
    """x [*lead, 40], w [24, 40] and bias [24] of small integers, which want gradients, and dy."""
    x, w = integers(6, 40, dtype).view(2, 3, 40)[: lead[0], : lead[-1]], integers(24, 40, dtype)
    bias = integers(1, 24, dtype)[0]
    leaves = [t.clone().requires_grad_() for t in (x if len(lead) > 1 else x[0], w, bias)]
    return *leaves, integers(6, 24, dtype).view(2, 3, 24) if len(lead) > 1 else integers(
        3, 24, dtype
    )


def reference(*leaves: torch.Tensor) -> torch.Tensor:
    """The same in float32, whose sums of these integers are exact, rounded once."""
    return F.linear(*(t.float() for t in leaves)).to(leaves[0].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("lead", [(2, 3), (3,)], ids=str)
def test_linear_and_its_gradients(
    dtype: torch.dtype, has_bias: bool, lead: tuple[int, ...]
) -> None:
    """y, dx, dw and dbias equal those of float32 rounded once; no more than what is wanted is
    computed."""
    *leaves, dy = layer(dtype, lead)
    leaves = leaves if has_bias else leaves[:2]
    y, want = dense.affine(*leaves), reference(*leaves)
    assert torch.equal(y, want)
    assert y.dtype == dtype
    for got, right in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert torch.equal(got, right)
        assert got.dtype == dtype
    frozen = dense.affine(leaves[0], leaves[1].detach())
    assert frozen.requires_grad
    assert not dense.affine(leaves[0].detach(), leaves[1].detach()).requires_grad


def test_one_vector_and_many_axes() -> None:
    """x of rank 1 gives y of rank 1, as ``F.linear`` does; leading axes of size 0 stay."""
    w = integers(24, 40, torch.bfloat16)
    for shape in ((40,), (2, 2, 2, 40), (0, 40), (3, 0, 40)):
        x = torch.randint(-8, 9, shape).bfloat16()
        assert torch.equal(dense.affine(x, w), reference(x, w))


def test_second_derivatives() -> None:
    """d/dx of |dL/dx|^2 and of |dL/dw|^2: the backward is differentiable, like torch's own."""
    *leaves, dy = layer(torch.bfloat16)
    results = []
    for linear in (dense.affine, reference):
        y = linear(*leaves).float()
        first = torch.autograd.grad((y * y * dy.float()).sum() / 256, leaves[:2], create_graph=True)
        results.append(
            torch.autograd.grad(sum(g.float().square().sum() for g in first) / 2**20, leaves)
        )
    for got, want in zip(*results, strict=True):
        # both round dL/dx and dL/dw to BF16, and the sums behind them in float32 in another order:
        # 2^-8 of the largest
        assert (got.float() - want.float()).abs().max() <= 2**-7 * want.float().abs().max()


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_operands(weight: torch.dtype) -> None:
    """Float32 weights are rounded to BF16 before the product, their gradients come back in
    float32."""
    x, w = torch.randn(10, 40).requires_grad_(), torch.randn(24, 40).to(weight).requires_grad_()
    dy = integers(10, 24, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dense.affine(x, w)
    assert y.dtype == torch.bfloat16
    narrow = [t.detach().bfloat16() for t in (x, w)]
    assert torch.equal(y, dense_product(*narrow, None, torch.bfloat16))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert (dx.dtype, dw.dtype) == (torch.float32, weight)
    assert torch.equal(dx, dense_product(dy, narrow[1].t(), None, torch.bfloat16).float())
    assert torch.equal(dw, dense_product(dy.t(), narrow[0].t(), None, torch.bfloat16).to(weight))


def test_autocast_does_not_round_sums_where_there_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch multiplies float32 copies then; 257 and a bias of 1 are 258, but 256 rounded first and
    256 again."""
    monkeypatch.setattr("nvfp4.backends.native.cpu.products", lambda: ())
    a, b = torch.tensor([[257.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dense_product(a, b, torch.ones(1), torch.bfloat16)
    assert y.item() == 258.0


def test_a_compiled_graph_sees_one_operator() -> None:
    """fullgraph, the same bits in forward and backward, also under autocast; ``opcheck`` of the
    operator."""
    *leaves, dy = layer(torch.bfloat16)
    compiled = torch.compile(dense.affine, fullgraph=True, backend="aot_eager")
    y, want = compiled(*leaves), dense.affine(*leaves)
    assert torch.equal(y, want)
    for got, right in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert torch.equal(got, right)
    wide = [t.detach().float() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*wide), dense.affine(*wide))
    a, b, bias = leaves[0].detach().view(6, 40).requires_grad_(), leaves[1], leaves[2]
    torch.library.opcheck(torch.ops.nvfp4.dense_product, (a, b, bias, torch.bfloat16))
    torch.library.opcheck(torch.ops.nvfp4.dense_product, (a, b, None, torch.float32))


class Names(TorchDispatchMode):
    """Writes down what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_one_operator() -> None:
    """Selective checkpointing and the like must not take the kernel's output for uninitialised
    memory."""
    *leaves, _ = layer(torch.bfloat16)
    with Names() as names, torch.no_grad():
        y = dense.affine(*leaves)
    assert "nvfp4.dense_product.default" in names.seen
    assert "aten.empty.memory_format" not in names.seen
    assert torch.equal(y, dense.affine(*leaves))


def test_torch_computes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 and float64 always, everything where the processor has instructions; errors are
    torch's own."""
    monkeypatch.setattr(dense, "product", None)  # any call of it would raise
    for dtype in (torch.float32, torch.float64):
        x, w = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
        assert torch.equal(dense.affine(x, w), F.linear(x, w))
        assert torch.equal(dense.times(x, w.t()), x @ w.t())
    x, w = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    for wrong in (
        (x, w[:, :7]),
        (x, w.float()),
        (x, w, torch.zeros(4).bfloat16()),
        (x, w, torch.zeros(5)),
    ):
        with pytest.raises(RuntimeError):
            dense.affine(*wrong)
    monkeypatch.setattr(dense, "EMULATED", frozenset())
    assert torch.equal(dense.affine(x, w), F.linear(x, w))
    assert torch.equal(dense.times(x, w.t()), x @ w.t())


X86 = {"architecture": "x86_64", "avx2": True}


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        (X86, (torch.bfloat16, torch.float16)),
        (X86 | {"avx512_f": True, "avx512_bf16": False}, (torch.bfloat16, torch.float16)),
        (X86 | {"avx512_bf16": True}, (torch.float16,)),
        (X86 | {"amx_bf16": True, "amx_fp16": True}, ()),
        (X86 | {"avx512_bf16": True, "avx512_fp16": True}, ()),
        ({"architecture": "aarch64", "avx512_bf16": False}, ()),
        ({}, ()),
    ],
    ids=str,
)
def test_processors_are_asked(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, emulated: tuple
) -> None:
    """By name of the instructions; off x86-64, or where torch cannot tell, torch's products are
    left alone."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu.emulated_dtypes() == set(emulated)


def test_layers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bf16 recipe, ``disabled`` and the dense products of recipes, forward and backward."""
    calls: list[torch.dtype] = []

    def counted(a, b, bias, dtype, isa=""):  # type: ignore[no-untyped-def]
        calls.append(a.dtype)
        return dense_product(a, b, bias, dtype, isa)

    monkeypatch.setattr(dense, "dense_product", counted)
    x = integers(16, 32, torch.bfloat16).requires_grad_()

    def run(module: torch.nn.Module) -> int:
        calls.clear()
        module(x).sum().backward()
        return len(calls)

    converted = nvfp4.convert(plain(), "quartet2", seed=0, verbose=False)
    assert run(converted) == 0
    with nvfp4.disabled(converted):
        assert run(converted) == 3
    assert run(nvfp4.convert(plain(), "rl", verbose=False)) == 2
    assert run(nvfp4.convert(plain(), nvfp4.W4A16, verbose=False)) == 3


def plain() -> torch.nn.Linear:
    """A BF16 layer."""
    return torch.nn.Linear(32, 16, dtype=torch.bfloat16)


def test_plain_linears_of_a_model() -> None:
    """``dense_linears`` changes classes and nothing else, names what it changed, and is undone;
    subclasses stay."""

    class Other(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        plain(), torch.nn.Sequential(plain(), Other(16, 4, dtype=torch.bfloat16))
    )
    model[1][0] = torch.nn.Linear(16, 16, dtype=torch.bfloat16)
    weights = [id(p) for p in model.parameters()]
    x = integers(5, 32, torch.bfloat16)
    assert nvfp4.dense_linears(model) == ["0", "1.0"]
    assert [type(m) for m in (model[0], *model[1])] == [dense.DenseLinear, dense.DenseLinear, Other]
    assert [id(p) for p in model.parameters()] == weights
    assert torch.equal(model[0](x), dense.affine(x, model[0].weight, model[0].bias))
    assert nvfp4.dense_linears(model) == []
    assert nvfp4.dense_linears(model, enabled=False) == ["0", "1.0"]
    assert [type(m) for m in (model[0], *model[1])] == [torch.nn.Linear, torch.nn.Linear, Other]


def test_they_are_converted_like_any_other() -> None:
    """``convert`` takes a layer that ``dense_linears`` changed, and ``revert`` makes a plain one of
    it."""
    model = torch.nn.Sequential(plain(), torch.nn.Linear(16, 16, dtype=torch.bfloat16))
    nvfp4.dense_linears(model)
    nvfp4.convert(model, "rtn", exclude="1", verbose=False)
    assert [type(m) for m in model] == [nvfp4.Linear, dense.DenseLinear]
    assert [type(m) for m in nvfp4.revert(model)] == [torch.nn.Linear, dense.DenseLinear]


def test_convert_says_what_stays_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with count, dtype, reason and remedy; none for float32, converted layers, or where
    nothing is slow."""
    model = torch.nn.Sequential(plain(), torch.nn.Linear(16, 16, dtype=torch.bfloat16))
    nvfp4.convert(model, "rtn", exclude="1")
    *_, line = capsys.readouterr().out.splitlines()
    for part in ("1 linears", "bfloat16", "avx512_bf16", "nvfp4.dense_linears(model)"):
        assert part in line
    nvfp4.dense_linears(model)
    nvfp4.convert(model, "rtn", exclude="1")
    nvfp4.convert(torch.nn.Linear(16, 16), "bf16")
    monkeypatch.setattr(dense, "EMULATED", frozenset())
    nvfp4.convert(plain(), "bf16")
    assert "emulates" not in capsys.readouterr().out


def test_info_says_which_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours with the reason, or torch's with the reason."""
    assert "torch would emulate" in cpu.dense_product_name(torch.bfloat16)
    assert all(
        name in cpu.dense_product_name(torch.float16) for name in cpu.INSTRUCTIONS[torch.float16]
    )
    assert cpu.dense_product_name() in nvfp4.info()
    monkeypatch.setattr(cpu, "EMULATED", frozenset())
    assert cpu.dense_product_name().startswith("torch's")


def test_products_of_dtensors_are_left_to_torch(monkeypatch):
    """A kernel would multiply this process's part as if it were the whole."""
    monkeypatch.setattr(dense, "EMULATED", frozenset({torch.bfloat16}))
    monkeypatch.setattr(dense, "is_dtensor", lambda x: x is b)
    monkeypatch.setattr(dense, "product", lambda *args: pytest.fail("the kernel was called"))
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    assert torch.equal(dense.times(a, b), a @ b)
