"""What an sdist and a wheel must hold and must not: run by ``make package`` on what it built.

    python tests/support/shipped.py DIST     a folder with one .tar.gz and one .whl

The sdist has all that builds the package (``nvfp4``, ``csrc``) and what is read with it; the wheel
has the package and what was compiled. Neither has tests, measurements, or what a build leaves.
Prints the sizes; exit code 1 and the names of what is missing or too much.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
READ_WITH_IT = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md")
BUILD = ("pyproject.toml", "setup.py", "constraints.txt", "MANIFEST.in")
# what setuptools adds
OWN = re.compile(r"PKG-INFO|setup\.cfg|nvfp4\.egg-info/[\w-]+(\.txt)?")
NOT_SHIPPED = re.compile(r"(^|/)(__pycache__|\..*|_\w+_missing\.txt)(/|$)|\.(pyc|so|o)$")


def checkout(*patterns: str) -> set[str]:
    """The files of the checkout that match, without what a build or an editor left there."""
    names = {str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p)}
    return {name for name in names if (ROOT / name).is_file() and not NOT_SHIPPED.search(name)}


def wrong(what: str, found: set[str], wanted: set[str]) -> list[str]:
    """A line for each file that is missing, and for each that nobody wants."""
    return [f"{what} lacks {name}" for name in sorted(wanted - found)] + [
        f"{what} has {name}" for name in sorted(found - wanted)
    ]


def of_sdist(archive: Path) -> list[str]:
    """What is wrong with an sdist; everything lies in one folder of the project's name."""
    with tarfile.open(archive) as opened:
        names = [member.name.partition("/")[2] for member in opened if member.isfile()]
    wanted = checkout("nvfp4/**/*", "csrc/**/*", "docs/*.md", "examples/*")
    return wrong(
        archive.name,
        {name for name in names if not OWN.fullmatch(name)},
        wanted | {*READ_WITH_IT, *BUILD},
    )


def of_wheel(archive: Path) -> list[str]:
    """What is wrong with a wheel: the package, its extension, and the metadata with the licence."""
    with zipfile.ZipFile(archive) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("nvfp4/")}
    compiled = {name for name in package if name.endswith(".so")}
    told = {name for name in package if re.fullmatch(r"nvfp4/_\w+_missing\.txt", name)}
    metadata = {re.sub(r"^nvfp4-[^/]+\.dist-info/", "", name) for name in names - package}
    expected = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    lines = wrong(archive.name, package - compiled - told, checkout("nvfp4/**/*"))
    if not any("/_cpu." in name for name in compiled):
        lines.append(f"{archive.name} lacks the native kernels of the CPU")
    return lines + wrong(archive.name, metadata, expected | {"licenses/LICENSE"})


def main() -> int:
    """Judge the folder; returns the exit code."""
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    lines = of_sdist(sdist) + of_wheel(wheel)
    for archive in (sdist, wheel):
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB")
    print("\n".join(lines) or "nothing is missing, nothing too much")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
