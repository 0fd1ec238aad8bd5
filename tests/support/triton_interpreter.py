"""A process of its own in which Triton interprets: TRITON_INTERPRET must be set before a kernel is
defined, and tests of compiled kernels must not feel it.

Answers pickled requests (function, arguments) on standard input with pickled (result, traceback) on
standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAPPINGS: list[Any] = []
"""Kept for as long as the process lives: unmapping under a tensor would be a fault of ours."""


class Interpreter:
    """The other side of the process; used from the tests. Calls take and return what can be
    pickled."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(paths),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def __call__(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Run a function of this file over there; RuntimeError with its traceback if it raised."""
        assert self.process.stdin
        assert self.process.stdout
        pickle.dump((function, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        try:
            result, failure = pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError(
                f"the interpreting process died of {self.process.wait()}: -11 is a wild read"
            ) from None
        if failure:
            raise RuntimeError(failure)
        return result

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def gemm(a: tuple, b: tuple, dtype: Any, tile: tuple, native: bool, **extras: Any) -> Any:
    """``nvfp4.backends.triton.gemm.launch.gemm`` of two QTensors given as (tensors, record)."""
    from nvfp4.backends.triton.gemm import launch as module
    from nvfp4.numerics.qtensor import QTensor

    left, right = (QTensor(*map(guarded, tensors), *record) for tensors, record in (a, b))
    extras = {name: guarded(tensor) for name, tensor in extras.items()}
    return module.gemm(
        left, right, dtype, tile=module.GemmTile(*tile, 4, 2), native=native, **extras
    )


def guarded(tensor: Any) -> Any:
    """A copy that ends where a page begins which nobody may read: one element too far and the
    process dies."""
    import ctypes
    import mmap

    import torch

    size = tensor.numel() * tensor.element_size()
    if not size or not tensor.is_contiguous():
        return tensor
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    MAPPINGS.append(memory)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    place = torch.frombuffer(
        memory, dtype=tensor.dtype, offset=pages * mmap.PAGESIZE - size, count=tensor.numel()
    )
    return place.view(tensor.shape).copy_(tensor)


def correct_the_interpreter() -> None:
    """Triton 3.9 compiles these two rightly (test_triton_aot.py reads the PTX) and interprets them
    wrongly.

    Every scale of ``dot_scaled`` is read as E8M0, FP8 ones too; float32 is cut to BF16 instead of
    rounded.
    """
    import numpy as np
    import oracle
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    table = np.array([oracle.e4m3_value(byte) for byte in range(127)], np.float32)
    interpreter._dot_scaled_scale_to_f32 = lambda scale, _: table[scale.data]
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return (
            torch.from_numpy(np.ascontiguousarray(data))
            .bfloat16()
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )

    interpreter._convert_float = rounded


def last_tile(rows: int, columns: int, k: int, tail: int, seed: int) -> tuple[Any, Any, Any]:
    """(a, b, out) of the last ``tail`` rows of a matrix whose codes and output have 2^31 elements
    and more.

    Memory that is not touched costs nothing; only the program of the last tile runs. a, b:
    (tensors, record).
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    from nvfp4.backends.triton.gemm.kernels import gemm_kernel
    from nvfp4.numerics.qtensor import QTensor

    generator = torch.Generator().manual_seed(seed)
    a, b = QTensor.empty((rows, k)), QTensor.empty((columns, k))
    for q, start in ((a, rows - tail), (b, 0)):
        q.codes[start:] = torch.randint(
            256, q.codes[start:].shape, generator=generator, dtype=torch.uint8
        )
        q.block_scale[start:] = 0x38  # 1
        q.global_scale.fill_(1)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    tiles = -(-rows // 16) * -(-columns // 16)
    builder = interpreter.interpreter_builder
    ask = builder.create_get_program_id
    builder.create_get_program_id = lambda axis: interpreter.TensorHandle(
        np.array([tiles - 1], np.int32), tl.int32
    )
    try:
        gemm_kernel[(1,)](*a.tensors, *b.tensors, None, out, rows, columns, k // 16,
                          1, 1, False, False, False, 16, 16, 32, 1)  # fmt: skip
    finally:
        builder.create_get_program_id = ask
    end = [tensor[rows - tail :].clone() for tensor in (a.codes, a.block_scale)]
    left = ((*end, a.global_scale), ((1, 16), (tail, k), -1, None))
    return left, (b.tensors, b.record), out[rows - tail :, columns - 16 :].clone()


def serve() -> None:
    """Answer until standard input ends; what is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    correct_the_interpreter()
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (globals()[function](*args, **kwargs), None)
        except Exception:
            answer = (None, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
