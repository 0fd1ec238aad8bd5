"""``nvfp4 bench all``: gate, measure, and write the page with device, clocks and versions.

    bench_all("r.md")
        1  options and paths are tried out, before anything runs
        2  every gate (``gates.py``); nothing is timed if one is red
        3  each section of ``measure.SECTIONS``, row by row as they come
        4  after every section r.md and r.json are written anew: an interruption loses one section

Columns named "predicted" come from data sheets (``roofline.py``); everything else was measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nvfp4.bench.devices import DEVICES, Device, gpu_at_hand, this_cpu
from nvfp4.bench.gates import Gate, check_all
from nvfp4.bench.measure import SECTIONS, workload
from nvfp4.bench.roofline import MODELS, PREDICTED, PUBLISHED_TOKENS, overtakes, speedup
from nvfp4.bench.tables import Row, markdown, terminal
from nvfp4.bench.timing import clocks, machine
from nvfp4.recipes import RECIPES

PREDICTED_RECIPES = ("nvidia", "quartet2", "search_eden")


@dataclass
class Findings:
    """What was looked at, on what machine, and what came out.

    expected: the device that predictions are for, or None. complete: whether all was measured.
    """

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
            ends = ", ".join(f"{key} {value}" for key, value in self.clocks_at_the_end.items())
            lines.append(f"- at the end: {ends}")

        passed = (
            f"{len(self.gates)} gates passed before anything was timed: every backend gives the"
        )
        lines += ["", f"{passed} reference's bytes. Times are medians of runs that took turns."]
        if self.expected is not None:
            about = f"{PREDICTED}, for {self.expected.name} ({self.expected.source})"
            lines += ["", f"Columns named predicted: {about}."]

        # A page that is not whole says so before its tables.
        if not self.complete:
            lines += ["", "**Interrupted: what follows is what was measured until then.**"]
        for title, rows in self.sections.items():
            lines += ["", f"## {title}", "", *markdown(rows)]

        note = "From data sheets and the traffic of our kernels (`nvfp4 bench roofline`)"
        lines += ["", f"## Blackwell: {PREDICTED}", "", f"{note}; nobody has measured these.", ""]
        return "\n".join([*lines, *markdown(predictions())]) + "\n"

    def as_json(self) -> str:
        """The same as data."""
        data = {
            "complete": self.complete,
            "machine": self.machine,
            "clocks_at_the_end": self.clocks_at_the_end,
            "gates": [asdict(gate) for gate in self.gates],
            "sections": self.sections,
            "what": f"columns named predicted, and all of predictions: {PREDICTED}",
            "predictions": predictions(),
        }
        return json.dumps(data, indent=1) + "\n"

    def write(self, paths: tuple[Path, Path] | None) -> None:
        """Replace the page and the data, if there are to be any."""
        if paths is not None:
            paths[0].write_text(self.markdown())
            paths[1].write_text(self.as_json())


@cache  # every section writes the page anew
def predictions() -> list[Row]:
    """Speed-ups over BF16 of a block's forward and backward on the cards with FP4 tensor cores."""
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
    report: str | None = None,
    device: str = "auto",
    quick: bool = False,
    seconds: float | None = None,
) -> Findings:
    """Gate on correctness, then measure quantisers, GEMMs, layers and memory on one device.

    report: a Markdown file to write; beside it the same as JSON. device: "auto" (the GPU if there
    is one), "cpu", "cuda". quick: small shapes. seconds: per candidate.

    Raises ``WrongResults`` before anything is timed if a backend is wrong; ValueError for a device
    that is not here or a time that is not positive, OSError for a path that cannot be written, all
    before anything is run.
    """
    # Mistakes of the caller, before an hour of work.
    place = _device(device)
    paths = None if report is None else _writable(Path(report))
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be positive, got {seconds}")

    # The machine, and whether it computes right.
    console = Console()
    expected = gpu_at_hand() if place.type == "cuda" else this_cpu(0.05 if quick else 0.5)
    findings = Findings(machine(place), expected)
    facts = ", ".join(f"{key} {value}" for key, value in findings.machine.items())
    console.print(facts, style="dim", highlight=False)

    # Red gates end it here: a wrong kernel has no speed.
    findings.gates = check_all(place, quick)
    console.print(f"{len(findings.gates)} gates passed")

    # Only now how fast it is. Rows are shown as they come: an interruption is a known loss.
    work = workload(place, quick, seconds, expected)
    try:
        for title, section in SECTIONS.items():
            rows = findings.sections.setdefault(title, [])
            for row in section(work):
                rows.append(row)
                what = ", ".join(str(value) for value in list(row.values())[:2])
                line = f"{title}: {what}: {row['ms']:.3g} ms"
                console.print(line, style="dim", highlight=False)
            console.print(terminal(title, rows, labels=2))
            findings.write(paths)
        findings.complete = True
    finally:
        findings.clocks_at_the_end = clocks(place)
        findings.write(paths)
        if paths is not None:
            how = "" if findings.complete else ", interrupted: what was measured until then"
            console.print(f"written: {paths[0]}, {paths[1]}{how}", soft_wrap=True)
    return findings


def _device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not cuda:
        raise ValueError("device cuda: torch sees no GPU here; use cpu or auto")
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _writable(path: Path) -> tuple[Path, Path]:
    """The Markdown and the JSON file, tried out now: after an hour it would be too late."""
    if path.is_dir():
        raise IsADirectoryError(f"report {str(path)!r} is a directory; name a file in it")
    data = path.with_suffix(".json")
    if data == path:
        hint = "name it .md or the like; the data go beside it as .json"
        raise ValueError(f"report {str(path)!r} is the page, so {hint}")

    # Opened for appending, which changes nothing; what was not there is taken away again.
    for each in (path, data):
        existed = each.exists()
        with each.open("a"):
            pass
        if not existed:
            each.unlink()
    return path, data
