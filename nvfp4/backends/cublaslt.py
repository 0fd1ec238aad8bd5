"""cuBLASLt itself, for what torch does not offer: products scaled by a number on the device.

    a [M, K], b [N, K], BF16  ->  y [M, N] = round(alpha a b^T + bias), 16-bit, alpha on the device

torch's ``mm`` rounds before anybody could scale, ``addmm`` takes alpha from the host, ``scaled_mm``
on Hopper multiplies FP8 alone. So a product of decoded operands had to leave float32, to be read
and scaled by a kernel of ours: 10 bytes per result element instead of 2. cuBLASLt takes alpha from
device memory, scales the float32 sum by it, adds the bias and rounds once. No value is known to the
host, and nothing waits.

With alpha = fl(global_a * global_b) that is the licence that ``scaled_mm`` has on Blackwell: up to
one rounding of float32, 2^-16 of a BF16 one, and but for results of alphas below 2^-126. Sums stay
in float32: of the ways to split a sum only those are allowed that keep its parts in that type.

The library is the one that torch has loaded, called through ctypes. It has to show at its first use
on a device that small products come out exact, and is left alone where one does not, or where
anything fails; then there are two passes as before. None of this has run on a GPU: a library with
the same functions stands in for it in tests.

Source of functions, attributes and their numbers: NVIDIA, cuBLAS 12 and 13, cublasLt.h.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from nvfp4.numerics.torch_state import is_capturing

TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
"""cudaDataType_t."""

COMPUTE_FLOAT32 = 68
FLOAT32 = TYPES[torch.float32]

# cublasLtMatmulDescAttributes_t, and what is set
POINTER_MODE, POINTERS_ON_DEVICE = 2, 1
TRANSPOSE_A = 3
EPILOGUE, EPILOGUE_BIAS = 7, 4
BIAS_POINTER, BIAS_TYPE = 8, 26

# cublasLtMatmulPreferenceAttributes_t; a sum's parts in float32 (cublasLtReductionScheme_t)
WORKSPACE_BYTES = 1
REDUCTION_SCHEMES, REDUCTION_IN_COMPUTE_TYPE = 3, 2
ALIGNMENTS = (5, 6, 7, 8)

WORKSPACE = 32 << 20
"""Bytes that an algorithm may use, as NVIDIA advises for Hopper."""

ALIGNMENT = 16
"""Bytes that every operand begins at a multiple of, at least."""


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Plan(NamedTuple):
    """How one kind of product is done: descriptors, and the algorithm that the library advises."""

    operation: ctypes.c_void_p
    a: ctypes.c_void_p
    b: ctypes.c_void_p
    y: ctypes.c_void_p
    algorithm: _Algorithm


NOT_SUPPORTED = 15
"""The status of a question that has no answer, cublasStatus_t."""


class BlasLtError(RuntimeError):
    """A function of the library did not do what it was asked for. status: cublasStatus_t."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} returned status {status}")
        self.status = status


def _torchs_library() -> ctypes.CDLL:
    """What torch has loaded; OSError if it has none."""
    major = (torch.version.cuda or "").partition(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class BlasLt:
    """The library on the devices of this process.

    load: gives it; stand-ins in tests. Handles, plans and verdicts are kept by device.
    """

    def __init__(self, load: Callable[[], ctypes.CDLL] = _torchs_library) -> None:
        self._load = load
        self._library: ctypes.CDLL | None = None
        self._handles: dict[torch.device, ctypes.c_void_p] = {}
        self._plans: dict[tuple[object, ...], _Plan | None] = {}
        self._zeros: dict[torch.device, torch.Tensor] = {}
        self._usable: dict[torch.device, bool] = {}
        self._lock = threading.Lock()

    def usable(self, device: torch.device) -> bool:
        """Whether products may go through it there; the first question multiplies, and waits.

        Not while a graph is captured, unless it was asked before. Warns once where it fails.
        """
        if device in self._usable:
            return self._usable[device]
        if is_capturing(device) or (self._load is _torchs_library and device.type != "cuda"):
            return False
        try:
            exact = self._is_exact(device)
            fault = None if exact else "its first products differ from the exact ones"
        except (OSError, AttributeError, BlasLtError) as error:
            fault = str(error)
        if fault is not None:
            self._give_up(device, fault)
        self._usable[device] = fault is None
        return fault is None

    def _give_up(self, device: torch.device, fault: str) -> None:
        """Warn, and leave the library alone on this device from now on."""
        self._usable[device] = False
        warnings.warn(
            f"nvfp4 scales products of decoded operands in two passes on {device}: cuBLASLt cannot "
            f"do it in one ({fault})",
            RuntimeWarning,
            stacklevel=4,
        )

    def product_or_none(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        alpha: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """``product``, or None where the caller has to do without, now or for good."""
        if not self.usable(a.device):
            return None
        try:
            return self.product(a, b, alpha, bias, dtype)
        except BlasLtError as error:
            self._give_up(a.device, str(error))
            return None

    def product(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        alpha: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """round(alpha a b^T + bias) [M, N] of ``dtype``, float16 or bfloat16, on a's stream.

        a [M, K], b [N, K]: contiguous and not empty, of one 16-bit dtype. alpha: float32 [1] on
        their device. bias: [N] of ``dtype``. BlasLtError if the library refuses; None if it has no
        algorithm for this shape.
        """
        device = a.device
        plan = self._plan(a, b, bias is not None, dtype)
        if plan is None:
            return None
        y = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=device)
        if device not in self._zeros:
            self._zeros[device] = torch.zeros(1, dtype=torch.float32, device=device)

        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)

        # column by column, as the library reads memory, y^T [N, M] = b a^T
        operands = (_at(alpha), _at(b), plan.b, _at(a), plan.a, _at(self._zeros[device]))
        results = (_at(y), plan.y, _at(y), plan.y)
        how = (ctypes.byref(plan.algorithm), _at(workspace), ctypes.c_size_t(WORKSPACE))
        stream = ctypes.c_void_p(_current_stream(device))
        with self._lock:
            # the pointer of this call's bias; everything else of the plan holds
            if bias is not None:
                self._set(plan.operation, BIAS_POINTER, _at(bias))
            handle = self._handle(device)
            self._call("cublasLtMatmul", handle, plan.operation, *operands, *results, *how, stream)
        return y

    def _plan(
        self, a: torch.Tensor, b: torch.Tensor, biased: bool, dtype: torch.dtype
    ) -> _Plan | None:
        """The plan for operands of this shape; made at the first of them."""
        (m, k), n = a.shape, b.shape[0]
        key = (a.device, a.dtype, m, n, k, biased, dtype)
        if key not in self._plans:
            with self._lock:
                plan = self._make_plan(a.device, a.dtype, (m, n, k), biased, dtype)
            self._plans[key] = plan
        return self._plans[key]

    def _make_plan(
        self,
        device: torch.device,
        of_operands: torch.dtype,
        shape: tuple[int, int, int],
        biased: bool,
        dtype: torch.dtype,
    ) -> _Plan | None:
        """Descriptors, and the first algorithm that the library advises for them, if any."""
        m, n, k = shape

        # y^T = (b as [K, N] columns)^T (a as [K, M] columns), alpha and beta on the device
        operation = self._make("cublasLtMatmulDescCreate", COMPUTE_FLOAT32, FLOAT32)
        self._set(operation, POINTER_MODE, ctypes.c_int32(POINTERS_ON_DEVICE))
        self._set(operation, TRANSPOSE_A, ctypes.c_int32(1))
        if biased:
            self._set(operation, EPILOGUE, ctypes.c_uint32(EPILOGUE_BIAS))
            self._set(operation, BIAS_TYPE, ctypes.c_int32(TYPES[dtype]))
            self._set(operation, BIAS_POINTER, ctypes.c_void_p(ALIGNMENT))  # not read yet
        layouts = [
            self._make(
                "cublasLtMatrixLayoutCreate",
                TYPES[kind],
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
            for kind, rows, columns in ((of_operands, k, m), (of_operands, k, n), (dtype, n, m))
        ]

        # parts of sums stay in float32; memory may begin anywhere that torch lets it
        preference = self._make("cublasLtMatmulPreferenceCreate")
        for attribute, value in (
            (WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE)),
            (REDUCTION_SCHEMES, ctypes.c_uint32(REDUCTION_IN_COMPUTE_TYPE)),
            *((each, ctypes.c_uint32(ALIGNMENT)) for each in ALIGNMENTS),
        ):
            size = ctypes.c_size_t(ctypes.sizeof(value))
            name = "cublasLtMatmulPreferenceSetAttribute"
            self._call(name, preference, attribute, ctypes.byref(value), size)

        found, count = _Heuristic(), ctypes.c_int(0)
        of_a, of_b, of_y = layouts
        try:
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                self._handle(device),
                operation,
                of_b,
                of_a,
                of_y,
                of_y,
                preference,
                1,
                ctypes.byref(found),
                ctypes.byref(count),
            )
        except BlasLtError as error:
            if error.status != NOT_SUPPORTED:
                raise
        if count.value < 1 or found.state != 0:
            return None
        return _Plan(operation, of_a, of_b, of_y, found.algorithm)

    def _handle(self, device: torch.device) -> ctypes.c_void_p:
        """One per device, made where that is the current one."""
        if device not in self._handles:
            self._handles[device] = self._make("cublasLtCreate")
        return self._handles[device]

    def _make(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """What a function creates, for as long as the process lives: there are few of them."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return made

    def _set(self, operation: ctypes.c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cublasLtMatmulDescSetAttribute"
        self._call(name, operation, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: object) -> None:
        """Call a function of the library; BlasLtError with its status unless that is 0."""
        if self._library is None:
            self._library = self._load()
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise BlasLtError(name, status)

    def _is_exact(self, device: torch.device) -> bool:
        """Whether products of small integers come out right: scaled, biased, of both dtypes."""
        numbers = (torch.arange(96 * 64, device="cpu") * 40503 >> 4) % 13 - 6
        a = numbers.view(96, 64)[:40].to(torch.bfloat16)
        b = numbers.flip(0).view(96, 64).to(torch.bfloat16)
        alpha = torch.tensor([0.375], dtype=torch.float32, device="cpu")
        bias = numbers[:96].to(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            for added in (None, bias):
                # sums below 2^24 / 8: exact in float32 in any order
                want = 0.375 * (a.double() @ b.double().t()) + (0 if added is None else added)
                got = self.product(
                    a.to(device),
                    b.to(device),
                    alpha.to(device),
                    None if added is None else added.to(dtype).to(device),
                    dtype,
                )
                right = want.to(torch.float32).to(dtype)
                if got is None or not torch.equal(got.cpu(), right):
                    return False
        return True


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


BLAS_LT = BlasLt()
"""Of this process."""
