"""What the site adds to the pages of this folder: README as the front page, CONTRIBUTING,
CHANGELOG, the pictures, the tables of options.

mkdocs calls these functions (``hooks`` in mkdocs.yml). The texts stay where readers of a checkout
look for them, and link as a checkout wants it; here each link is turned into that of the site:
``docs/recipes.md`` -> ``recipes.md``, ``benchmarks/results/compare.png`` ->
``results/compare.png``. What the site does not hold, such as source files, keeps its text and loses
its link.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = "benchmarks/results/"
OPTIONS = runpy.run_path(str(Path(__file__).with_name("options.py")))

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def site_link(match: re.Match[str]) -> str:
    """One Markdown link of a page of the checkout's top folder, as the site has it."""
    picture, text, target = match.groups()
    path, hash_sign, anchor = target.partition("#")
    if "://" in target or not path:
        return match.group()

    if path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif picture and path.startswith(PICTURES):
        path = f"results/{path.removeprefix(PICTURES)}"
    else:
        return text
    return f"{picture}[{text}]({path}{hash_sign}{anchor})"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside of this folder."""
    for source, page in PAGES.items():
        text = _LINK.sub(site_link, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Pictures that a page takes from the results of the checkout, and the options of commands."""
    return OPTIONS["filled"](markdown.replace(f"](../{PICTURES}", "](results/"))
