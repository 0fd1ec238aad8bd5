"""``nvfp4 bench all``: gate, measure, and write the table with device, clocks and versions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nvfp4.bench.devices import DEVICES, Device, at_hand, this_cpu
from nvfp4.bench.gates import Gate, check_all
from nvfp4.bench.measure import SECTIONS, Row, workload
from nvfp4.bench.roofline import MODELS, PUBLISHED_TOKENS, overtakes, speedup
from nvfp4.bench.roofline_report import PREDICTED
from nvfp4.bench.timing import clocks, machine
from nvfp4.recipes import RECIPES

PREDICTED_RECIPES = ("nvidia", "quartet2", "search_eden")


@dataclass
class Findings:
    """What was looked at, on what machine, and what came out; complete: whether all of it was measured."""

    machine: dict[str, Any]
    expected: Device | None
    gates: list[Gate] = field(default_factory=list)
    sections: dict[str, list[Row]] = field(default_factory=dict)
    complete: bool = False
    clocks_at_the_end: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """All of it as a page."""
        lines = ["# nvfp4 benchmark", ""]
        lines += [f"- {key}: {value}" for key, value in self.machine.items()]
        if self.clocks_at_the_end:
            lines.append(f"- at the end: {', '.join(f'{k} {v}' for k, v in self.clocks_at_the_end.items())}")
        differing = max((gate.differing for gate in self.gates), default=0.0)
        lines += ["", f"{len(self.gates)} gates passed before anything was timed; largest share of differing bytes: "]
        lines[-1] += f"{differing:.1e}. Times are medians of runs that took turns."
        if self.expected is not None:
            lines += ["", f"Columns named predicted: {PREDICTED}, for {self.expected.name} ({self.expected.source})."]
        if not self.complete:
            lines += ["", "**Interrupted: what follows is what was measured until then.**"]
        for title, rows in self.sections.items():
            lines += ["", f"## {title}", "", *_markdown_table(rows)]
        title = f"## Blackwell: {PREDICTED}"
        note = "From data sheets and the traffic of our kernels (`nvfp4 bench roofline`); nobody has measured these."
        lines += ["", title, "", note, "", *_markdown_table(predictions())]
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """The same as data."""
        kept = {"complete": self.complete, "machine": self.machine, "clocks_at_the_end": self.clocks_at_the_end}
        kept |= {"gates": [asdict(gate) for gate in self.gates], "sections": self.sections}
        kept["what"] = f"columns named predicted, and all of predictions: {PREDICTED}"
        kept["predictions"] = predictions()
        return json.dumps(kept, indent=1) + "\n"


@cache  # written anew with every section
def predictions() -> list[Row]:
    """Speed-ups over BF16 of a block's forward and backward on the Blackwell cards of the table."""
    return [
        {
            "predicted for": device.name,
            "block": model,
            "tokens": PUBLISHED_TOKENS,
            "recipe": recipe,
            "predicted speed-up": speedup(RECIPES[recipe], layers, PUBLISHED_TOKENS, device),
            "predicted from tokens": overtakes(RECIPES[recipe], layers, device) or "never",
        }
        for device in DEVICES.values()
        if device.fp4 is not None
        for model, layers in MODELS.items()
        for recipe in PREDICTED_RECIPES
    ]


def bench_all(
    report: str | None = None, device: str = "auto", quick: bool = False, seconds: float | None = None
) -> Findings:
    """Gate on correctness, then measure quantisers, GEMMs, layers and memory on one device, printing as it goes.

    report: a Markdown file to write; beside it the same as JSON. It grows with every section, so that whatever ends the
    run keeps what was measured. device: "auto" (the GPU if there is one), "cpu", "cuda". quick: small shapes. seconds:
    for each candidate. Raises ``WrongResults`` before anything is timed if a backend is wrong; ValueError for a device
    that is not here, OSError for a path that cannot be written, both before anything is run.
    """
    where = _device(device)
    paths = None if report is None else _writable(Path(report))
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be positive, got {seconds}")
    console = Console()
    found = Findings(machine(where), at_hand() if where.type == "cuda" else this_cpu(0.05 if quick else 0.5))
    console.print(", ".join(f"{key} {value}" for key, value in found.machine.items()), style="dim", highlight=False)
    found.gates = check_all(where, quick)
    console.print(f"{len(found.gates)} gates passed")
    work = workload(where, quick, seconds, found.expected)
    try:
        for title, section in SECTIONS.items():
            rows = found.sections.setdefault(title, [])
            for row in section(work):
                rows.append(row)
                what = ", ".join(str(value) for value in list(row.values())[:2])
                console.print(f"{title}: {what}: {row['ms']:.3g} ms", style="dim", highlight=False)
            console.print(_rich_table(title, rows))
            _write(found, paths)
        found.complete = True
    finally:
        found.clocks_at_the_end = clocks(where)
        _write(found, paths)
        if paths is not None:
            said = "" if found.complete else ", interrupted: what was measured until then"
            console.print(f"written: {paths[0]}, {paths[1]}{said}", soft_wrap=True)
    return found


def _device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not cuda:
        raise ValueError("device cuda: torch sees no GPU here; use cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if cuda and name != "cpu" else torch.device("cpu")


def _writable(path: Path) -> tuple[Path, Path]:
    """The Markdown and the JSON file, tried out now: an hour later would be late to hear that they cannot be."""
    if path.is_dir():
        raise IsADirectoryError(f"report {str(path)!r} is a directory; name a file in it")
    data = path.with_suffix(".json")
    if data == path:
        raise ValueError(
            f"report {str(path)!r} is the page, so name it .md or the like; the data go beside it as .json"
        )
    for each in (path, data):
        existed = each.exists()
        with each.open("a"):
            pass
        if not existed:
            each.unlink()
    return path, data


def _write(found: Findings, paths: tuple[Path, Path] | None) -> None:
    if paths is not None:
        paths[0].write_text(found.markdown())
        paths[1].write_text(found.as_json())


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _markdown_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["(nothing measured)"]
    columns = _columns(rows)
    numeric = [isinstance(next(row[c] for row in rows if c in row), (int, float)) for c in columns]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---:' if n else '---' for n in numeric)}|"]
    return lines + [f"| {' | '.join(_shown(row.get(column, '')) for column in columns)} |" for row in rows]


def _rich_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = _columns(rows)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    return table


def _shown(value: Any) -> str:
    """Three digits, without an exponent for what is large."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
