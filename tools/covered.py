"""Lines and branches of nvfp4 that the tests reach, child processes included, kept as data: ``make
coverage``.

    python tools/covered.py --json FILE [pytest's options]

Needs ``coverage`` 7.10 or later, which sets up every Python process that a test starts (``patch =
subprocess``): the workers of pytest-xdist, the command line, torchrun's processes, the interpreter
of Triton's kernels. What is compiled is not counted: csrc, and kernels on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main() -> int:
    """pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where to keep the figures")
    options, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "settings", Path(folder) / "report.json"
        settings.write_text(SETTINGS.format(root=ROOT, folder=folder))

        def coverage(command: str, *more: str) -> int:
            whole = [sys.executable, "-m", "coverage", command, f"--rcfile={settings}", *more]
            return subprocess.run(whole, cwd=ROOT).returncode

        code = coverage("run", "-m", "pytest", *pytest_options)
        coverage("combine", "--quiet")
        coverage("json", "--quiet", "-o", str(report))
        figures = json.loads(report.read_text())
    Path(options.json).write_text(as_json(figures, pytest_options) + "\n")
    print(f"lines {figures['totals']['covered_lines']} of {figures['totals']['num_statements']}, "
          f"branches {figures['totals']['covered_branches']} of {figures['totals']['num_branches']}")  # fmt: skip
    return code


def as_json(figures: dict, pytest_options: list[str]) -> str:
    """Totals and, per file, [lines, of, branches, of], with the commit."""
    names = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    files = {name: [entry["summary"][n] for n in names] for name, entry in sorted(figures["files"].items())}
    kept = {"commit": commit, "pytest": pytest_options, "totals": {n: figures["totals"][n] for n in names}}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in files.items())
    return f'{json.dumps(kept)[:-1]},\n "files": {{\n{rows}\n }}}}'


if __name__ == "__main__":
    sys.exit(main())
