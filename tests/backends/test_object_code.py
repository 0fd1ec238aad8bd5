"""The kernels as compiled are vector code on every instruction set: no compiler took their vectors
apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from object_code import instructions, missing, scalar_faults

from nvfp4.backends.native.cpu import _MISSING, native

pytestmark = [
    pytest.mark.skipif(native is None, reason=f"the native CPU kernels are not built: {_MISSING}"),
    pytest.mark.skipif(missing("objdump") is not None, reason=f"{missing('objdump')}"),
]


@pytest.fixture(scope="module")
def functions() -> dict[str, Counter[str]]:
    """The functions of the extension that is loaded."""
    assert native is not None
    found = instructions(Path(str(native.__file__)))
    if not any("nvfp4::portable::" in name for name in found):
        pytest.skip("the extension was stripped of its symbols")
    return found


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_no_kernel_goes_element_by_element(functions: dict[str, Counter[str]], isa: str) -> None:
    """No scalar compare of floats, hardly a scalar move, in anything that runs per element; and
    there is something to
    look at: each rule's own visit, the loads, decoding and the fingerprint."""
    if not any(f"nvfp4::{isa}::" in name for name in functions):
        pytest.skip(f"{isa} is not for this processor family")
    assert list(scalar_faults(functions, isa)) == []
    for kernel in (
        "ScaledPass<",
        "EdenPass<true>::visit",
        "load_transposed",
        "decode_matrix",
        "fingerprint",
    ):
        assert any(f"nvfp4::{isa}::{kernel}" in name for name in functions), kernel
