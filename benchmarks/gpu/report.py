"""One page and one JSON file from what calls wrote: card, goals, what is wrong, what was not reached, tables.

Works on whatever is there: of both calls, of one, of one that was killed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Findings, Row, Stage

Goal = tuple[str, float | None, str, float]


def read(folder: Path) -> dict[int, Findings]:
    """The findings of each call that has begun in this folder."""
    paths = {call: folder / f"call{call}.jsonl" for call in (1, 2)}
    return {call: Findings.of(path) for call, path in paths.items() if path.exists()}


def write(folder: Path, call: int) -> str:
    """call<n>.md and call<n>.json, each replaced in one step; returns the page's head, which is worth printing."""
    calls = read(folder)
    mine = calls[call]
    judged = judge(calls)
    head = [f"# On a GPU, call {call}", "", *_about(mine), "", *_table(judged), "", *_troubles(mine)]
    tables = [line for name, stage in mine.stages.items() for line in _stage(name, stage)]
    data = {
        "call": mine.call,
        "facts": facts(mine),
        "goals": judged,
        "wrong": mine.wrong,
        "compared": mine.compared,
        "stages": {name: vars(stage) | {"not_reached": stage.not_reached} for name, stage in mine.stages.items()},
    }
    for path, text in (
        (folder / f"call{call}.md", "\n".join([*head, *tables])),
        (folder / f"call{call}.json", json.dumps(data, indent=1)),
    ):
        fresh = path.with_suffix(".part")
        fresh.write_text(text + "\n")
        fresh.replace(path)
    return "\n".join(head)


def facts(found: Findings) -> Row:
    """Card, clocks, versions, rates: what the machine stage said."""
    rows = found.stages["machine"].rows if "machine" in found.stages else []
    return {str(row["what"]): row["value"] for row in rows if "what" in row}


def _about(found: Findings) -> list[str]:
    about = {key: value for key, value in found.call.items() if key != "state"} | facts(found)
    lines = [f"- {key}: {_cell(value)}" for key, value in about.items()]
    ended = [
        f"{name} {stage.state} ({stage.seconds:.0f} of {stage.limit:.0f} s)" for name, stage in found.stages.items()
    ]
    lines.append(f"- stages: {', '.join(ended) or 'none begun'}")
    lines.append(f"- {found.compared} comparisons, {found.wrong} wrong or failed")
    return lines


def _troubles(found: Findings) -> list[str]:
    """What is wrong, what failed, what could not run, what was not reached: by name."""
    lines = ["## Wrong or failed", ""]
    for name, stage in found.stages.items():
        for row in stage.rows:
            if row.get("wrong"):
                lines.append(
                    f"- {name}: " + ", ".join(f"{k} {_cell(v)}" for k, v in row.items() if v != "" and k != "unit")
                )
        lines += [f"- {name}: {unit}: {end['reason']}" for unit, end in stage.with_state("failed").items()]
    if len(lines) == 2:
        lines.append("Nothing.")

    lines += ["", "## Could not run here", ""]
    for name, stage in found.stages.items():
        reasons: dict[str, list[str]] = defaultdict(list)
        for unit, end in stage.with_state("skipped").items():
            reasons[end["reason"]].append(unit)
        lines += [f"- {name}: {len(units)} units: {why} ({', '.join(units)})" for why, units in reasons.items()]
    if lines[-1] == "":
        lines.append("Nothing.")

    lines += ["", "## Not reached", ""]
    for name, stage in found.stages.items():
        if stage.not_reached:
            lines.append(f"- {name} ({stage.state}): {', '.join(stage.not_reached)}")
    if lines[-1] == "":
        lines.append("Nothing.")
    return lines


def _stage(name: str, stage: Stage) -> list[str]:
    """Rows with the same columns, one after the other, make one table."""
    lines = ["", f"## {name}: {stage.state}"]
    group: list[Row] = []
    rows = [{key: value for key, value in row.items() if key != "unit"} for row in stage.rows]
    for row in [*sorted(rows, key=lambda row: list(map(str, row))), {}]:
        if group and list(row) != list(group[0]):
            lines += ["", *_table(group)]
            group = []
        group.append(row)
    return lines


def _table(rows: list[Row]) -> list[str]:
    heads = list(rows[0])
    body = [" | ".join(_cell(row.get(head, "")) for head in heads) for row in rows]
    return [f"| {line} |" for line in (" | ".join(heads), " | ".join("---" for _ in heads), *body)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def judge(calls: dict[int, Findings]) -> list[Row]:
    """What is wanted, what was measured, and whether that is enough; "not measured" where a row is missing."""
    return [_judged(*goal) for goal in _goals(calls)]


def _judged(what: str, value: float | None, relation: str, limit: float) -> Row:
    met = None if value is None else value >= limit if relation == ">=" else value <= limit
    said = {None: "not measured", True: "yes", False: "NO"}[met]
    return {"goal": f"{what} {relation} {limit:g}", "measured": "-" if value is None else value, "met": said}


def _goals(calls: dict[int, Findings]) -> list[Goal]:
    """The goals of the first GPU work: nothing wrong, near the copy, near BF16, little kept."""
    rows = [(name, row) for found in calls.values() for name, s in found.stages.items() for row in s.rows]

    def best(stage: str, column: str, highest: bool, **where: Any) -> float | None:
        values = [
            row[column]
            for name, row in rows
            if name == stage and column in row and all(row.get(key) == value for key, value in where.items())
        ]
        if not values:
            return None
        return max(values) if highest else min(values)

    compared = sum(found.compared for found in calls.values())
    wrong = float(sum(found.wrong for found in calls.values()))
    goals: list[Goal] = [("wrong or failed", wrong if compared or wrong else None, "<=", 0.0)]
    for name, least in (("rtn", 0.70), ("ms_eden(2)", 0.45)):
        share = best("rates", "rows / copy", True, quantiser=name)
        goals.append((f"{name}, share of copy bandwidth", share, ">=", least))
    for name in ("rtn", "ms_eden(1)"):
        gain = best("rates", "one read over two", True, quantiser=name)
        goals.append((f"{name}, both orientations: one read over two", gain, ">=", 1.4))
    for recipe in ("nvidia", "quartet2"):
        for size, most in ((8192, 1.25), (4096, 1.5)):
            ratio = best("linear", "x bf16", False, recipe=recipe, size=size)
            goals.append((f"{recipe}, forward and backward at {size}, times BF16's", ratio, "<=", most))
        saved = best("linear", "saved x bf16", False, recipe=recipe)
        goals.append((f"{recipe}, bytes saved for backward, of BF16's", saved, "<=", 0.30))
    return goals
