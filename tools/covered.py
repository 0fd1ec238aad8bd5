"""Lines and branches of nvfp4 that the tests reach, child processes included: ``make coverage``.

    python tools/covered.py --json FILE [--name NAME] [--data FOLDER] [pytest's options]

FILE keeps a result per NAME, so that one commit stands beside another: lines and branches of each
room, a folder of nvfp4/, and of each file. With --data the tests can be run in portions: what
earlier calls left in FOLDER counts too.

Needs ``coverage`` 7.10 or later, which sets up every Python process that a test starts (``patch =
subprocess``): the workers of pytest-xdist, the command line, torchrun's processes, the interpreter
of Triton's kernels. What is compiled is not in the figures: csrc, and kernels on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SETTINGS = """
[run]
branch = true
parallel = true
sigterm = true
patch = subprocess
source = {root}/nvfp4
data_file = {folder}/data
disable_warnings = no-data-collected,module-not-imported,couldnt-parse
"""

COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def main() -> int:
    """Run the tests under coverage and keep the figures; returns pytest's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, type=Path, help="where to keep the figures")
    parser.add_argument(
        "--name", default="now", help="of this result, which replaces an older one of that name"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder that keeps what was reached, for portions; else it is forgotten at the end",
    )
    options, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.data or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        settings, report = folder / "settings", folder / "report.json"
        settings.write_text(SETTINGS.format(root=ROOT, folder=folder))

        # One settings file for every call, and for every Python that a test starts.
        def coverage(command: str, *more: str) -> int:
            whole = [sys.executable, "-m", "coverage", command, f"--rcfile={settings}", *more]
            return subprocess.run(whole, cwd=ROOT).returncode

        # Failing tests reach lines too, so the figures are made whatever pytest's exit code is.
        code = coverage("run", "-m", "pytest", *pytest_options)
        coverage("combine", "--quiet", "--append")
        coverage("json", "--quiet", "-o", str(report))
        figures = json.loads(report.read_text())

    # Added to what the file has: one commit beside another.
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    results[options.name] = result(figures, pytest_options)
    options.json.write_text(as_json(results))
    totals = results[options.name]["totals"]
    print("lines {} of {}, branches {} of {}".format(*totals))
    return code


def room(file: str) -> str:
    """nvfp4/layer/linear.py -> layer; nvfp4/cli.py -> top."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else "top"


def result(figures: dict[str, Any], pytest_options: list[str]) -> dict[str, Any]:
    """Counts [lines, of, branches, of] in total, per room and per file; machine and commit."""
    files = {
        name: [entry["summary"][n] for n in COUNTS]
        for name, entry in sorted(figures["files"].items())
    }
    rooms: dict[str, list[int]] = {}
    for name, row in files.items():
        rooms[room(name)] = [
            a + b for a, b in zip(rooms.get(room(name), [0] * len(COUNTS)), row, strict=True)
        ]
    totals = [figures["totals"][n] for n in COUNTS]
    return {
        "machine": machine(),
        "pytest": pytest_options,
        "totals": totals,
        "rooms": rooms,
        "files": files,
    }


def machine() -> dict[str, Any]:
    """What nvfp4 says of this machine and this commit."""
    code = "import json; from nvfp4.bench.timing import machine; print(json.dumps(machine()))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(said)


def as_json(results: dict[str, Any]) -> str:
    """One line per file of the package, so that a change of the figures is a change of lines."""
    text = json.dumps(results, indent=1)
    return (
        re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
