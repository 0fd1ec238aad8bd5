"""What a person sees of a run: a line now and then, and on a terminal a bar below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from nvfp4.run.log import Row, last_row
from nvfp4.run.progress import LastingConsole, Reporter, duration, rate


class Progress(Reporter):
    """Prints the figures of reinforcement learning."""

    def step(self, row: Row) -> None:
        """Take note of a step; prints every ``every``-th, the first, the last and those skipped or evaluated."""
        self._recent = [*self._recent[-49:], row["step_time"]]
        eta = duration(sum(self._recent) / len(self._recent) * (self.steps - row["step"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], eta=eta)
        if row["step"] % self.every == 0 or row["step"] in (1, self.steps) or row["skipped"] or "eval/pass@1" in row:
            self.say(line(row, self.steps, eta))


def line(row: Row, steps: int, eta: str) -> str:
    """``step 10/80  reward 0.711±0.31  entropy 0.381  length 5.5  mismatch 0  codes 0.05 %  6.2k tok/s  eta 0:21``."""
    width = len(str(steps))
    parts = [f"step {row['step']:{width}d}/{steps}", f"reward {row['reward']:.3f}±{row['reward_std']:.2f}"]
    parts += [f"entropy {row['entropy']:.3f}", f"length {row['completions/mean_length']:.1f}"]
    gap = row["mismatch/max"]
    parts.append(f"mismatch {'0' if gap == 0 else f'{gap:.1e}'}")
    if row["fp4/codes_changed"] is not None:
        parts.append(f"codes {100 * row['fp4/codes_changed']:.2f} %")
    if "kl" in row:
        parts.append(f"kl {row['kl']:.4f}")
    parts.append(f"{rate(row['tokens_per_s'])} tok/s")
    if "eval/pass@1" in row:
        parts.append(f"held-out pass@1 {row['eval/pass@1']:.3f}")
    if row["rewards/failed"]:
        parts.append(f"{row['rewards/failed']} rewards failed: {next(iter(row['rewards/failures']))}")
    parts.append("SKIPPED: not finite" if row["skipped"] else f"eta {eta}")
    return "  ".join(parts)


class Bars:
    """Context manager: a bar for each run of a comparison on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self.console = LastingConsole(soft_wrap=True, highlight=False, markup=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self._bars = RichProgress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def add(self, name: str, steps: int) -> None:
        """A run has started."""
        self._tasks[name] = self._bars.add_task(name, total=steps, now="starting")
        if not self.console.is_terminal:
            self.console.print(f"{name}: started")

    def advance(self, name: str, path: Path) -> None:
        """Look how far the run's log has come; on a terminal only."""
        if not self.console.is_terminal or not path.exists():
            return
        row = last_row(path)
        if row is not None and "reward" in row:
            now = f"reward {row['reward']:.3f}  mismatch {row['mismatch/max']:.0e}  {rate(row['tokens_per_s'])} tok/s"
            self._bars.update(self._tasks[name], completed=row["step"], now=now)

    def done(self, name: str, result: dict[str, Any] | None) -> None:
        """A run has ended: its bar goes, a line stays."""
        self._bars.remove_task(self._tasks.pop(name))
        if result is not None:
            before, after = result["before"]["eval/pass@1"], result["after"]["eval/pass@1"]
            self.console.print(f"{name}: pass@1 {before:.3f} -> {after:.3f}, {duration(result['seconds'])}")
