"""One page and one JSON file from what calls wrote.

    the page's head   card, clocks, versions; the goals; what is wrong, what could not run, what was
                      not reached, each by name
    below             the rows of each stage as tables

Works on whatever is there: of both calls, of one, of one that was killed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import CallRecord, StageRecord
from nvfp4.bench.tables import Row, markdown, shown

Goal = tuple[str, float | None, str, float]
"""What is wanted, the figure or None, "<=" or ">=", and the bound."""


def read(folder: Path) -> dict[int, CallRecord]:
    """What each call that has begun in this folder wrote."""
    paths = {call: folder / f"call{call}.jsonl" for call in (1, 2)}
    return {call: CallRecord.of(path) for call, path in paths.items() if path.exists()}


def write(folder: Path, call: int) -> str:
    """call<n>.md and call<n>.json, each replaced in one step; returns the page's head."""
    calls = read(folder)
    mine = calls[call]
    judged = judge(calls)
    head = [f"# On a GPU, call {call}", "", *_about(mine), "", *markdown(judged), ""]
    head += [*_wrong(mine), "", *_skipped(mine), "", *_missed(mine)]

    # The page's head is also what the terminal shows at the end.
    tables = [line for name, stage in mine.stages.items() for line in _tables(name, stage)]

    # The same as data, with what was not reached by name.
    data = {
        "call": mine.call,
        "facts": facts(mine),
        "goals": judged,
        "wrong": mine.wrong,
        "compared": mine.compared,
        "stages": {
            name: vars(stage) | {"not_reached": stage.not_reached}
            for name, stage in mine.stages.items()
        },
    }

    for path, text in (
        (folder / f"call{call}.md", "\n".join([*head, *tables])),
        (folder / f"call{call}.json", json.dumps(data, indent=1)),
    ):
        part = path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(path)
    return "\n".join(head)


def facts(call: CallRecord) -> Row:
    """Card, clocks, versions, rates: what the machine stage said."""
    rows = call.stages["machine"].rows if "machine" in call.stages else []
    return {str(row["what"]): row["value"] for row in rows if "what" in row}


def _about(call: CallRecord) -> list[str]:
    about = {key: value for key, value in call.call.items() if key != "state"} | facts(call)
    lines = [f"- {key}: {shown(value)}" for key, value in about.items()]
    stages = [
        f"{name} {stage.state} ({stage.seconds:.0f} of {stage.limit:.0f} s)"
        for name, stage in call.stages.items()
    ]
    lines.append(f"- stages: {', '.join(stages) or 'none begun'}")
    lines.append(f"- {call.compared} comparisons, {call.wrong} wrong or failed")
    return lines


def _chapter(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *(lines or ["Nothing."])]


def _wrong(call: CallRecord) -> list[str]:
    lines = []
    for name, stage in call.stages.items():
        for row in stage.rows:
            if row.get("wrong"):
                said = {key: value for key, value in row.items() if value != "" and key != "unit"}
                cells = ", ".join(f"{key} {shown(value)}" for key, value in said.items())
                lines.append(f"- {name}: {cells}".replace("|", "\\|").replace("\n", " "))
        lines += [
            f"- {name}: {unit}: {end['reason']}" for unit, end in stage.with_state("failed").items()
        ]
    return _chapter("Wrong or failed", lines)


def _skipped(call: CallRecord) -> list[str]:
    lines = []
    for name, stage in call.stages.items():
        reasons: dict[str, list[str]] = defaultdict(list)
        for unit, end in stage.with_state("skipped").items():
            reasons[end["reason"]].append(unit)
        lines += [
            f"- {name}: {len(units)} units: {why} ({', '.join(units)})"
            for why, units in reasons.items()
        ]
    return _chapter("Could not run here", lines)


def _missed(call: CallRecord) -> list[str]:
    lines = [
        f"- {name} ({stage.state}): {', '.join(stage.not_reached)}"
        for name, stage in call.stages.items()
        if stage.not_reached
    ]
    return _chapter("Not reached", lines)


def _tables(name: str, stage: StageRecord) -> list[str]:
    """Rows with the same columns make one table."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in stage.rows:
        plain = {key: value for key, value in row.items() if key != "unit"}
        tables.setdefault(tuple(plain), []).append(plain)
    lines = ["", f"## {name}: {stage.state}"]
    for columns in sorted(tables):
        lines += ["", *markdown(tables[columns])]
    return lines


def judge(calls: dict[int, CallRecord]) -> list[Row]:
    """What is wanted, what was measured, and whether that is enough."""
    return [_judged(*goal) for goal in _goals(calls)]


def _judged(what: str, value: float | None, relation: str, bound: float) -> Row:
    if value is None:
        met = "not measured"
    else:
        met = "yes" if (value >= bound if relation == ">=" else value <= bound) else "NO"
    measured = "-" if value is None else value
    return {"goal": f"{what} {relation} {bound:g}", "measured": measured, "met": met}


def _goals(calls: dict[int, CallRecord]) -> list[Goal]:
    """The goals of the first GPU work: nothing wrong, near the copy, near BF16, little kept."""
    rows = [
        (name, row)
        for call in calls.values()
        for name, stage in call.stages.items()
        for row in stage.rows
    ]

    def best(stage: str, column: str, highest: bool, **where: Any) -> float | None:
        values = [
            row[column]
            for name, row in rows
            if name == stage
            and column in row
            and all(row.get(key) == value for key, value in where.items())
        ]
        if not values:
            return None
        return max(values) if highest else min(values)

    # None where nothing was compared: no fault found is no proof then.
    compared = sum(call.compared for call in calls.values())
    wrong = float(sum(call.wrong for call in calls.values()))

    # A goal that was not measured is reported as such, and is not met.
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
            what = f"{recipe}, forward and backward at {size}, times BF16's"
            goals.append((what, ratio, "<=", most))
        saved = best("linear", "saved x bf16", False, recipe=recipe)
        goals.append((f"{recipe}, bytes saved for backward, of BF16's", saved, "<=", 0.30))
    return goals
