"""What a fresh installation must do, with the core dependencies alone: run by ``make package`` in a
clean venv.

    VENV/bin/python tests/support/smoke.py        from outside of the checkout, so that what is
    installed is imported

Prints what was found and how long the import took; exit code 1 and the reason if something is
missing.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

began = time.perf_counter()
import nvfp4  # noqa: E402

SECONDS = time.perf_counter() - began

EXTRAS = ("accelerate", "matplotlib", "pydantic", "transformers", "tyro", "yaml")


def main() -> None:
    """Import, quantise on every backend that runs here, train a layer, and ask the command line."""
    folder = Path(nvfp4.__file__).parent
    assert "site-packages" in folder.parts, f"this is not what was installed: {folder}"
    assert (folder / "py.typed").exists(), "py.typed is missing: type checkers ignore the package"
    present = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    print(
        f"nvfp4 {nvfp4.__version__} from {folder}, imported in {SECONDS:.2f} s beyond torch "
        f"{torch.__version__}"
    )
    print(f"extras present: {', '.join(present) or 'none'}")

    # quantise, decode, multiply: native kernels if they were built, and the reference's bits
    x = torch.randn(64, 256)
    want = nvfp4.quantize(x, "ms_eden", seed=1, backend="reference")
    got = nvfp4.quantize(x, "ms_eden", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))
    print("quantised by:", nvfp4.explain("quantize", "cpu", "ms_eden").replace("\n", "; "))

    # train and go back
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)
    )
    nvfp4.convert(model, seed=0)
    model(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not any(isinstance(module, nvfp4.Linear) for module in nvfp4.revert(model).modules())

    # the command line: info needs no extra, the trainers say which they need
    nvfp4_command = str(Path(sys.executable).with_name("nvfp4"))
    info = subprocess.run([nvfp4_command, "info"], capture_output=True, text=True, check=True)
    assert info.stdout.startswith("nvfp4 "), info.stdout
    if not present:
        for command, extra in (("pretrain", "train"), ("compare", "train"), ("rl", "rl")):
            refused = subprocess.run([nvfp4_command, command], capture_output=True, text=True)
            assert (refused.returncode, refused.stdout) == (1, ""), refused
            assert refused.stderr.endswith(
                f"which is not installed: pip install 'nvfp4[{extra}]'\n"
            ), refused.stderr
            print(refused.stderr.strip())
    print("all well")


if __name__ == "__main__":
    main()
