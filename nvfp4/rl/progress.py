"""What a person sees of a run: a line now and then, and on a terminal a bar below them.

    one run           step 10/80  reward 0.711±0.31  entropy 0.381  length 5.5  mismatch 0 ...
    a comparison      a bar per run, which reads the last row of that run's log

The line has what tells a run that goes wrong early: reward and its spread, entropy (falls to 0 when
the policy collapses), length (grows into the limit), mismatch (0, or the sampler is another model),
and the share of FP4 codes that the step moved (0: the linears of the next rollout are the same).
"""

from __future__ import annotations

from rich.progress import TaskID

from nvfp4.run.arms import Arm, Display
from nvfp4.run.log import Row, last_row
from nvfp4.run.progress import LastingConsole, Reporter, bar, duration, rate


class Progress(Reporter):
    """``step 10/80  reward 0.711±0.31  entropy 0.381  length 5.5  mismatch 0  codes 0.05 %``.

    Then tokens/s, and where there is any the KL, held-out pass@1 and rewards that failed.
    """

    seconds = "step_time"
    evaluated = "eval/pass@1"

    def figures(self, row: Row) -> list[str]:
        """What is shown of a row, before the time that is left."""
        width = len(str(self.steps))
        gap = row["mismatch/max"]
        shown = [
            f"step {row['step']:{width}d}/{self.steps}",
            f"reward {row['reward']:.3f}±{row['reward_std']:.2f}",
            f"entropy {row['entropy']:.3f}",
            f"length {row['completions/mean_length']:.1f}",
            f"mismatch {'0' if gap == 0 else f'{gap:.1e}'}",
        ]
        if row["fp4/codes_changed"] is not None:
            shown.append(f"codes {100 * row['fp4/codes_changed']:.2f} %")
        if "kl" in row:
            shown.append(f"kl {row['kl']:.4f}")
        shown.append(f"{rate(row['tokens_per_s'])} tok/s")
        if "eval/pass@1" in row:
            shown.append(f"held-out pass@1 {row['eval/pass@1']:.3f}")
        if row["rewards/failed"]:
            shown.append(
                f"{row['rewards/failed']} rewards failed: {next(iter(row['rewards/failures']))}"
            )
        return shown


class Bars(Display):
    """A bar for each run of a comparison on a terminal, lines elsewhere."""

    own_lines = False

    def __init__(self) -> None:
        self.console = LastingConsole(soft_wrap=True, highlight=False, markup=False)
        self._bars = bar(self.console, "{task.fields[now]}", disable=not self.console.is_terminal)
        self._tasks: dict[Arm, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def on_start(self, arm: Arm) -> None:
        """A run begins."""
        self._tasks[arm] = self._bars.add_task(arm.name, total=arm.config.steps, now="starting")
        if not self.console.is_terminal:
            self.console.print(f"{arm.name}: started")

    def look(self, arm: Arm) -> None:
        """How far the run's log has come; on a terminal only."""
        row = last_row(arm.folder.log) if self.console.is_terminal else None
        if row is not None and "reward" in row:
            now = (
                f"reward {row['reward']:.3f}  mismatch {row['mismatch/max']:.0e}  "
                f"{rate(row['tokens_per_s'])} tok/s"
            )
            self._bars.update(self._tasks[arm], completed=row["step"], now=now)

    def on_end(self, arm: Arm) -> None:
        """Its bar goes, a line stays."""
        self._bars.remove_task(self._tasks.pop(arm))
        result = arm.result()
        if result is not None:
            before, after = result["before"]["eval/pass@1"], result["after"]["eval/pass@1"]
            self.console.print(
                f"{arm.name}: pass@1 {before:.3f} -> {after:.3f}, {duration(result['seconds'])}"
            )
