"""Object files, each compiled again only when something that it is made of has changed.

Beside an object lies its record: the command that made it, and a hash of every file that the
compiler read for it, as -MMD lists them (system headers excepted). So a changed header compiles
what includes it and nothing else, a changed flag what it is given to, and a file that was only
touched, or is back as it was, compiles nothing.

``setup.py`` runs this file; nothing but Python itself is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def compile_changed(commands: dict[str, list[str]], workers: int | None = None) -> list[str]:
    """Bring objects up to date, as many compilers at a time as there are cores; returns those that
    were compiled.

    commands: of each object, what makes it from its source but for "-o object", in the order in
    which they begin: the longest first, since the last to end is waited for. RuntimeError names an
    object whose compiler failed.
    """
    stale = [target for target, command in commands.items() if not is_current(target, command)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = [pool.submit(compile_one, target, commands[target]) for target in stale]
    for job in jobs:  # all have ended: one that fails keeps no other from its object
        job.result()
    return stale


def compile_one(target: str, command: list[str]) -> None:
    """Run the compiler, then write the record; one that is killed on the way leaves no record."""
    record, listed = Path(f"{target}.json"), Path(f"{target}.d")
    record.unlink(missing_ok=True)
    Path(target).parent.mkdir(parents=True, exist_ok=True)

    status = subprocess.run(
        [*command, "-MMD", "-MF", str(listed), "-o", target], check=False
    ).returncode
    if status != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed with {status} on {target}")

    files = {name: digest(name) for name in sorted(set(prerequisites(listed.read_text())))}
    record.write_text(json.dumps({"command": command, "files": files}))


def is_current(target: str, command: list[str]) -> bool:
    """Whether this command would make the same object from the same files."""
    try:
        record = json.loads(Path(f"{target}.json").read_text())
        same_files = all(digest(name) == known for name, known in record["files"].items())
    # never compiled, half written, or a header that is gone
    except (OSError, ValueError, KeyError):
        return False
    return record["command"] == command and same_files and Path(target).exists()


def prerequisites(rule: str) -> list[str]:
    """The files to the right of the colon of a rule that a compiler wrote for make; blanks in names
    are escaped."""
    names = rule.replace("\\\n", " ").split(":", 1)[1]
    return [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", names)]


def digest(name: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()
