"""What the training tests share: a small text corpus, a tiny config, and the command line in a
process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import children

from nvfp4.run import log
from nvfp4.train.config import PretrainConfig

ROOT = Path(__file__).parents[2]
WORDS = [
    "if",
    "x",
    "else",
    "return",
    "def",
    "for",
    "value",
    "in",
    "range",
    "0",
    "1",
    "(self, other):",
    "é",
    "∑",
    "=",
    "\n",
]


def write_texts(folder: Path, files: int = 12, words: int = 500) -> Path:
    """Text files with the same content on every machine: words drawn by a linear congruential
    generator."""
    state = 1
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        drawn = []
        for _ in range(words):
            state = (1103515245 * state + 12345) % 2**31
            drawn.append(WORDS[(state >> 16) % len(WORDS)])
        (folder / f"text{number:02d}.txt").write_text(" ".join(drawn), encoding="utf-8")
    return folder


def tiny(out: Path, data: Path, **changes: Any) -> PretrainConfig:
    """A run of a few thousand parameters and a few seconds, one held-out file of twelve."""
    fields: dict[str, Any] = {
        "out": str(out),
        "data": (str(data),),
        "holdout": 0.1,
        "depth": 1,
        "width": 32,
        "heads": 2,
        "ffn": 64,
        "lr": 1e-2,
        "seq_len": 16,
        "batch": 4,
        "steps": 12,
        "warmup": 2,
        "device": "cpu",
        "recipe": "bf16",
        "eval_every": 5,
        "eval_bytes": 256,
        "final_eval_bytes": 512,
        "save_every": 4,
        "sample_tokens": 0,
    }
    return PretrainConfig(**{**fields, **changes})


def steps_of(out: Path) -> dict[int, dict[str, Any]]:
    """What log.jsonl says that must not depend on the clock or the machine, by step."""
    clock = ("seconds", "tokens_per_s", "memory_gib")
    rows = log.read(out / "log.jsonl")
    assert len({row["step"] for row in rows}) == len(rows), "a step is logged twice"
    return {
        row["step"]: {key: value for key, value in row.items() if key not in clock} for row in rows
    }


CLI = "import sys\nfrom nvfp4.cli import main\nsys.exit(main(sys.argv[1:]))"
"""``python -m nvfp4.cli`` as a text, for a process that has imported it."""


def run_cli(
    *arguments: str, before: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``nvfp4 ARGUMENTS`` in a process of its own, where the Python code ``before`` runs first."""
    return children.python(f"{before}\n{CLI}", list(arguments), environment(), cwd)


def start_cli(*arguments: str) -> children.Child:
    """The same, without waiting for its end."""
    return children.Child(CLI, list(arguments), environment())


def environment() -> dict[str, str]:
    """The environment of a child process: the package under test, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_checks(worker: str, folder: Path, count: int) -> dict[str, list[str | None]]:
    """``worker.main`` on so many processes: of each check, the error it ended with on every one."""
    folder.mkdir()
    code = f"import sys, {worker}\n{worker}.main(sys.argv[1:])"
    run = children.processes(count, code, [str(folder)], environment())
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    failed = any(error for result in results for error in result.values())
    complete = len(results) == count and run.returncode == 0
    assert failed or complete, run.stdout + run.stderr
    return {name: [result.get(name, "not reached") for result in results] for name in results[0]}
