"""The folder of a reinforcement learning run: that of any run, and what people look at.

    completions.jsonl   some completions of each step and of each evaluation
    run.png             the run in six pictures
    base/               the model after the warm start; base.unfinished/ while that goes on

``clear`` leaves base/, which took minutes: an equal warm start is used again, one of another config
makes another.
"""

from __future__ import annotations

from nvfp4.run.folder import RunFolder
from nvfp4.run.options import ResumableConfig

RENAMED = {
    "truncated_reward": "what a completion keeps that the length limit cuts off is up to the "
    "objective: give --objective-options truncated=scale truncated_scale=0 for what was the "
    "default, nothing to keep all"
}
"""Options of earlier versions, and what to give instead."""


class RLFolder(RunFolder):
    """Paths below ``out``. base: the model after the warm start, base.unfinished until then."""

    data_field = "task"
    renamed = RENAMED

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.completions = self.root / "completions.jsonl"
        self.plot = self.root / "run.png"
        # which ``clear`` leaves: a config of another warm start makes another
        self.base = self.root / "base"
        self.logs = (self.log, self.completions)
        self.pictures = (self.plot,)

    def claim(self, config: ResumableConfig) -> None:
        """Keep the folder to this process; ``TrainError`` if the run could not begin in it.

        Done before a warm start, which takes minutes and replaces base/.
        """
        self.lock()
        self.refuse_earlier(config)
