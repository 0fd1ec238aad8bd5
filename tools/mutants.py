"""One fault at a time in a copy of the package, each of which a test has to find: ``make mutants``.

    python tools/mutants.py [--only PATTERN] [--json FILE]

Each mutant is one small change of arithmetic, layout or noise: a wrong tie, a constant off by one,
a swapped operand, a step left out. For each of them the tests that ``make test`` runs on that code
run until one fails: first the one that found it the last time, by FILE. In the end all tests that
found something have to pass without a mutant. A mutant that survives is a hole in the tests, and
the exit code is then 1.

A copy of the tree in a temporary folder is changed, never this one. Python with torch in it is
forked for each mutant, which saves the seconds that importing torch takes; one in csrc is compiled
first, for the portable instruction set alone, since the headers are the same for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("nvfp4", "csrc", "tests", "pyproject.toml", "setup.py", "benchmarks", "tools")
CPU_SECONDS = 900
"""A mutant that makes a loop endless is ended by its CPU time, on which a busy machine has no
influence."""

NOTHING_FAILED = (0, 4, 5)
"""pytest's exit codes where all pass, where a test that was named is not there, and where none was
chosen."""

VECTORS = ("tests/backends/test_vectors.py", "-k", "reference or seeds")
ROUNDING = ("tests/numerics/test_rounding.py",)
CODEC = ("tests/numerics/test_codec.py", "tests/numerics/test_rounding.py")
SCALING = (
    "tests/numerics/test_scaling.py",
    "tests/backends/test_vectors.py",
    "-k",
    "reference or seeds or scaling",
)
LAYOUT = ("tests/numerics/test_layout.py",)
HADAMARD = ("tests/numerics/test_hadamard.py",)
RNG = ("tests/numerics/test_rng.py",)
LAYER = (
    "tests/layer/test_linear.py",
    "-k",
    "composition or ranks or 31_ or 32_ or stored or transposed",
)
NATIVE = (
    "tests/backends/test_native.py",
    "-k",
    "portable and (quantize or decode or dequantize or input)",
)
TABLES = ("tests/backends/test_native.py", "-k", "tables or fold_in")
SIGNS = ("tests/layer/test_linear.py", "-k", "signs_drawn")
BIAS = ("tests/layer/test_linear.py", "-k", "bias")
REFUSED = ("tests/quantizers/test_quantizers.py", "-k", "seed or option or refuse")
PRINTS = ("tests/backends/test_native.py", "-k", "fingerprint")
TRITON = (
    "tests/backends/test_triton.py",
    "-k",
    "quantize_equals or difficult or dequantize or noise or folded or every_code",
)


class Mutant(NamedTuple):
    """``before``, which stands once in ``file``, becomes ``after``; these tests have to find it."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def mutants(file: str, tests: tuple[str, ...], *changes: tuple[str, str]) -> list[Mutant]:
    """One mutant for each (before, after)."""
    return [Mutant(file, before, after, tests) for before, after in changes]


MUTANTS = [
    *mutants(
        "nvfp4/numerics/formats.py",
        CODEC,
        ("min_exponent=0, max=6.0", "min_exponent=1, max=6.0"),
        ("min_exponent=-6, max=448.0", "min_exponent=-6, max=416.0"),
    ),
    *mutants(
        "nvfp4/numerics/formats.py",
        VECTORS,
        ("SEARCH_CAP = 256.0", "SEARCH_CAP = 288.0"),
    ),
    *mutants(
        "nvfp4/numerics/rounding.py",
        ROUNDING,
        ("div_(step).round_()", "div_(step).add_(0.5).floor_()"),
        (".ceil_()", ".round_()"),
        (".add_(u).floor_()", ".add_(u).round_()"),
        ("mul_(step).copysign_(x)", "mul_(step).mul_(x.sign())"),
        ("fmt.min_exponent + _BIAS)", "fmt.min_exponent + _BIAS + 1)"),
    ),
    *mutants(
        "nvfp4/numerics/codec.py",
        CODEC,
        ("values.signbit(), alpha=8", "values < 0, alpha=8"),
        ("codes[..., 0::2] | codes[..., 1::2] << 4", "codes[..., 1::2] | codes[..., 0::2] << 4"),
        ("values < 2.0**E4M3.min_exponent", "values < 2.0 ** (E4M3.min_exponent - 1)"),
        ("a * 0.5 + 4", "a * 0.5 + 5"),
    ),
    *mutants(
        "nvfp4/numerics/scaling.py",
        SCALING,
        ("block_amax * (scale * SIXTH)", "block_amax * scale / 6"),
        ("torch.where(amax == 0, torch.ones_like(scale), scale)", "scale"),
        ("x[..., :half] + x[..., half:]", "x[..., 0::2] + x[..., 1::2]"),
        ("block_amax.amax(dim=1, keepdim=True)", "block_amax.amax(dim=0, keepdim=True).T"),
    ),
    *mutants(
        "nvfp4/numerics/layout.py",
        LAYOUT,
        ("row % 32 * 16 + row % TILE_ROWS // 32 * 4", "row % 32 * 4 + row % TILE_ROWS // 32 * 128"),
        ("return tiles.permute(0, 3, 2, 1, 4)", "return tiles.permute(0, 3, 1, 2, 4)"),
    ),
    *mutants(
        "nvfp4/numerics/hadamard.py",
        HADAMARD,
        ("(1, 1, 1, -1, 1, -1, -1, -1, -1,", "(1, 1, 1, -1, 1, -1, -1, -1, 1,"),
        ("if i == rounds - 1 and i % 2 == 0:", "if i == rounds - 1:"),
    ),
    *mutants(
        "nvfp4/numerics/hadamard.py",
        VECTORS,
        (
            "(fwht(groups) * 0.25).to(torch.bfloat16).to(torch.float32).reshape",
            "(fwht(groups) * 0.25).reshape",
        ),
    ),
    *mutants(
        "nvfp4/numerics/rng.py",
        RNG,
        ("ROUNDS = 10", "ROUNDS = 9"),
        ("add_(0.5).mul_", "add_(0.0).mul_"),
        ("out[start:stop, j, 0] = word & 0xFFFF", "out[start:stop, j, 0] = word >> 16"),
    ),
    *mutants(
        "nvfp4/numerics/rng.py",
        VECTORS,
        ("BLOCK_SCALE_STREAM = 2", "BLOCK_SCALE_STREAM = 1"),
    ),
    *mutants(
        "nvfp4/layer/noise.py",
        LAYER,
        ("fold_in(sign_seed, 1 + LEFT, rank)", "fold_in(sign_seed, 1 + RIGHT, rank)"),
        (
            "fold_in(seed % 2**64, layer, call, gemm)",
            "fold_in(seed % 2**64, layer, call, gemm, rank)",
        ),
        ("fold_in(seed % 2**64, layer, call, gemm)", "fold_in(seed % 2**64, layer, 0, gemm)"),
    ),
    *mutants(
        "nvfp4/quantizers/base.py",
        REFUSED,
        ("check_seed(getattr(options, name), name)", "pass"),
    ),
    *mutants(
        "nvfp4/quantizers/base.py",
        VECTORS,
        ("uniform(self._seed(), ELEMENT_STREAM,", "uniform(self._seed(), BLOCK_SCALE_STREAM,"),
        ('poisoned = torch.where(finite, global_scale, float("nan"))', "poisoned = global_scale"),
        (
            "(1 / (block_scale * global_scale)).clamp_(max=FLOAT32_MAX)",
            "1 / (block_scale * global_scale)",
        ),
    ),
    *mutants(
        "nvfp4/numerics/rounding.py",
        VECTORS,
        ("better = error < best_error", "better = error <= best_error"),
    ),
    *mutants(
        "nvfp4/quantizers/sr.py",
        VECTORS,
        ("up(base_scale(block_amax, encode), E4M3)", "blocks.nearest_scales()[0]"),
    ),
    *mutants(
        "nvfp4/quantizers/four_over_six.py",
        VECTORS,
        ("nearest(1.5 * base, E4M3)", "nearest(1.25 * base, E4M3)"),
    ),
    *mutants(
        "nvfp4/numerics/scaling.py",
        VECTORS,
        ("SEARCH_FACTORS = (1.0, 0.875,", "SEARCH_FACTORS = (1.0, 0.9375,"),
        ("BYTE_STEPS = (0, -2, -1, 1, 2, 3, 4, 5, 6)", "BYTE_STEPS = (0, -2, -1, 1, 2, 3, 4, 5)"),
    ),
    *mutants(
        "nvfp4/quantizers/ms_eden.py",
        VECTORS,
        ("numerator / denominator)", "denominator / numerator)"),
        ("peak / torch.full_like(peak, E4M3.max)", "peak / 256"),
    ),
    *mutants(
        "nvfp4/layer/gemms.py",
        BIAS,
        ("db = dy.sum(0, dtype=torch.float32)", "db = dy.sum(0)"),
    ),
    *mutants(
        "nvfp4/layer/gemms.py",
        SIGNS,
        (
            'call.quantizer("wgrad", LEFT, dy.t(), partner=x.rotation)',
            'call.quantizer("wgrad", LEFT, dy.t())',
        ),
        (
            '(call.operand(dy.t(), "wgrad", LEFT, partner=x.rotation), x)',
            '(call.operand(dy.t(), "wgrad", LEFT), x)',
        ),
    ),
    *mutants(
        "nvfp4/backends/triton/arithmetic.py",
        TRITON,
        ("half = 0x7FFF + ((b >> 16) & 1)", "half = 0x8000"),
        ("tl.where(n.to(tl.float32) < steps, n + 1, n)", "n + 1"),
    ),
    *mutants(
        "nvfp4/backends/triton/noise.py",
        TRITON,
        ("2.0**6 - 2.0**-18", "2.0**6"),
    ),
    *mutants(
        "nvfp4/backends/triton/quantize/rules.py",
        TRITON,
        ("amax * (encode * SIXTH)", "(amax * encode) * SIXTH"),
        ("best_error = tl.where(error < best_error, error, best_error)", "best_error = error"),
        ("amax < SMALLEST_AMAX, 0.0, amax)", "amax < 0.0, 0.0, amax)"),
    ),
    *mutants(
        "csrc/formats.h",
        NATIVE,
        ("kSearchCap = 256.0f", "kSearchCap = 288.0f"),
    ),
    *mutants(
        "csrc/codec.h",
        NATIVE,
        ("b + 0x7fffu + (b >> 16 & 1u)", "b + 0x8000u"),
    ),
    *mutants(
        "csrc/rounding.h",
        NATIVE,
        ("0x1p22f, 0x1p23f + 2.0f, 0x1p24f + 8.0f", "0x1p22f, 0x1p23f, 0x1p24f + 8.0f"),
        ("select(to_float(n) < t, n + 1u, n)", "select(to_float(n) <= t, n + 1u, n)"),
    ),
    *mutants(
        "csrc/scaling.h",
        NATIVE,
        ("amax * (scale * (1.0f / 6.0f))", "amax * scale / 6.0f"),
    ),
    *mutants(
        "csrc/hadamard.h",
        NATIVE,
        ("0xD7E8u", "0xD7E9u"),
    ),
    *mutants(
        "csrc/philox.h",
        NATIVE,
        ("(1.0f - 0x1p-17f)", "1.0f"),
        ("0xBB67AE85u", "0xBB67AE86u"),
    ),
    *mutants(
        "csrc/layout.h",
        TABLES,
        ("row % 128 / 32 * 4", "row % 128 / 32 * 8"),
    ),
    *mutants(
        "csrc/quantizers.h",
        NATIVE,
        ("base * 1.5f", "base * 1.25f"),
        ("best_error = smaller(error, best_error)", "best_error = error"),
        ("amax < 0x1p-120f", "amax < 0x1p-149f"),
    ),
    *mutants(
        "csrc/cpu/fingerprint.h",
        PRINTS,
        ("static_cast<size_t>(count - from)", "static_cast<size_t>(count - from - 1)"),
    ),
    *mutants(
        "csrc/cpu/decode.h",
        NATIVE,
        ("c & 8u ? -v : v", "v"),
    ),
]


def build(copy: Path) -> None:
    """nvfp4._cpu of this copy, for the portable instruction set.

    Compiled by what setup.py compiles objects with, so that only changed ones are.
    """
    import pybind11

    for name in ("csrc/bind.cpp", "csrc/cpu/kernels.h"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace("defined(__x86_64__)", "0"))

    # Without vectors, as on a processor that has none; -O1, since compiling is what costs here.
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w", *include]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    objects = runpy.run_path(str(copy / "csrc" / "objects.py"))
    commands = {
        str(copy / "build" / f"{Path(source).stem}.o"): ["g++", *flags, "-c", str(copy / source)]
        for source in ("csrc/cpu/portable.cpp", "csrc/bind.cpp")
    }
    objects["compile_changed"](commands)
    library = copy / "nvfp4" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.unlink(missing_ok=True)  # another process may have the old one in its memory
    subprocess.run(["g++", "-shared", "-fopenmp", *commands, "-o", str(library)], check=True)


def run(copy: Path, tests: tuple[str, ...], log: Path, interpreted: bool) -> int:
    """pytest's exit code for these tests on the copy, in a fork of this process.

    interpreted: Triton's kernels, by its interpreter.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    # The child: its words go to a file, its CPU time is limited, the copy comes first on the path.
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(copy)
    sys.path[:] = [
        str(copy),
        *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tools")),
    ]
    code = 99
    try:
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests])
    finally:
        sys.stdout.flush()
        os._exit(code)


def misplaced(root: Path) -> list[str]:
    """What cannot be put in below root, since its text does not stand there exactly once."""
    counts = [(m, (root / m.file).read_text().count(m.before)) for m in MUTANTS]
    return [
        f"{m.file} holds {m.before!r} {times} times, not once" for m, times in counts if times != 1
    ]


def native(mutant: Mutant) -> bool:
    """Whether a mutant is in C++, and has to be compiled."""
    return mutant.file.startswith("csrc/")


def selections(mutant: Mutant, known: dict[str, str]) -> list[tuple[str, ...]]:
    """What to run until something fails: first the test that found this mutant the last time."""
    before = known.get(f"{mutant.file}: {mutant.before} -> {mutant.after}")
    return [(before,), mutant.tests] if before and before.startswith("tests/") else [mutant.tests]


def verdict(mutant: Mutant, copy: Path, known: dict[str, str]) -> dict[str, Any]:
    """What became of one mutant: put in, tests run until one fails, taken out."""
    file, log = copy / mutant.file, copy / "log.txt"
    text = file.read_text()
    file.write_text(text.replace(mutant.before, mutant.after))
    if native(mutant):
        build(copy)
    for tests in selections(mutant, known):
        code = run(copy, tests, log, interpreted=mutant.tests is TRITON)
        if code not in NOTHING_FAILED:
            break
    file.write_text(text)

    # Named by the first test that failed; without one (a crash, the limit) by the exit code.
    lines = log.read_text().splitlines()
    # A test's name may hold blanks: it ends where its reason begins.
    said = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    failed = [words.split(" - ")[0] for words in said]
    by = failed[0] if failed else f"exit code {code}"
    row = {"file": mutant.file, "before": mutant.before, "after": mutant.after}
    return row | {"killed": code not in NOTHING_FAILED, "by": by}


def pass_without_mutants(rows: list[dict[str, Any]], selection: list[Mutant], copy: Path) -> None:
    """RuntimeError if a test that found a mutant fails without any, and so has found nothing."""
    log = copy / "log.txt"
    if any(map(native, selection)):
        build(copy)

    # Each test once, however many mutants it found.
    for interpreted in (False, True):
        killers = {
            r["by"]: None
            for r, m in zip(rows, selection, strict=True)
            if (m.tests is TRITON) == interpreted
        }
        tests = tuple(name for name in killers if name.startswith("tests/"))
        if tests and (code := run(copy, tests, log, interpreted)) != 0:
            raise RuntimeError(
                f"tests end with {code} without a mutant:\n{log.read_text()[-3000:]}"
            )


def kept(path: str | None) -> dict[str, str]:
    """The test that found each mutant of an earlier result."""
    if path is None or not Path(path).exists():
        return {}
    rows = json.loads(Path(path).read_text())["mutants"]
    return {f"{row['file']}: {row['before']} -> {row['after']}": row["by"] for row in rows}


def main() -> int:
    """Run the mutants; returns 0 if every one was killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="mutants whose file matches this regular expression"
    )
    parser.add_argument(
        "--json", help="where to keep the verdicts; the tests it names are tried first"
    )
    options = parser.parse_args()
    if faults := misplaced(ROOT):
        raise SystemExit("\n".join(faults))
    known = kept(options.json)
    selection = sorted((m for m in MUTANTS if re.search(options.only, m.file)), key=native)

    import hypothesis  # noqa: F401 - these once, for all forks
    import pytest  # noqa: F401
    import torch  # noqa: F401

    # of a file that changes within a second, or is back, bytecode would be stale
    sys.dont_write_bytecode = True

    # One after the other: each changes the same copy.
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nvfp4"
        copy.mkdir()
        for name in COPIED:
            source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                source, copy / name, ignore=ignored
            ) if source.is_dir() else shutil.copy(source, copy)
        for number, mutant in enumerate(selection, 1):
            rows.append(verdict(mutant, copy, known))
            said = "killed  " if rows[-1]["killed"] else "SURVIVED"
            change = f"{mutant.file}: {mutant.before} -> {mutant.after}"
            print(f"{number:3} {said}  {change}   {rows[-1]['by']}", flush=True)
        pass_without_mutants(rows, selection, copy)

    killed = sum(row["killed"] for row in rows)
    print(f"{killed} of {len(rows)} mutants killed")
    if options.json:
        # not before the forks, each of which imports its own nvfp4
        from nvfp4.bench.timing import machine

        result = {"machine": machine(), "killed": killed, "of": len(rows), "mutants": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return killed != len(rows)


if __name__ == "__main__":
    sys.exit(main())
