"""The folder of a reinforcement learning run: that of any run, and completions, plots and the warm start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from nvfp4.rl.config import EVALUATION, FREE_ON_RESUME, RENAMED, RLConfig
from nvfp4.run import log
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.folder import RunFolder


class RLFolder(RunFolder):
    """Paths below ``out``."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.completions = self.root / "completions.jsonl"
        self.plot = self.root / "run.png"
        self.base = self.root / "base"  # beside it, while it is being made, base.unfinished

    def claim(self, config: RLConfig) -> None:
        """Before a warm start, which takes minutes and replaces base/: ``TrainError`` if the run could not begin then.

        The folder is this process's from now on.
        """
        self.lock()
        self.refuse_earlier(cast(Any, config))

    def lock(self) -> None:
        """As that of any run; a second call does nothing."""
        if "_lock" not in vars(self):
            super().lock()

    def clear(self) -> None:
        """Delete what a run has written, and nothing else; the warm start stays, a config of another makes another."""
        super().clear()
        for path in (self.completions, self.plot):
            path.unlink(missing_ok=True)

    def ready(
        self, config: RLConfig, problems: str, evaluation_teaches: bool
    ) -> tuple[tuple[Path, Snapshot] | None, list[str]]:
        """``open``, for the problems of this SHA-256; completions after the snapshot are dropped as rows are.

        evaluation_teaches: the run learns from its evaluations, so those must go on as they were.
        """
        self.bound = frozenset(EVALUATION if evaluation_teaches else ())
        if config.resume_from is None:
            free = [name for name in FREE_ON_RESUME if name not in self.bound]
            config = replace(config, allow_changes=(*config.allow_changes, *free))
        self._refuse_renamed(config)
        found, notes = self.open(cast(Any, config), problems)
        log.cut(self.completions, -1 if found is None else found[1].state["step"])
        return found, notes

    def _refuse_renamed(self, config: RLConfig) -> None:
        """``TrainError`` for a run of an earlier version that is to go on: what it did has another name now."""
        if not (config.resume or config.resume_from) or not self.config.exists():
            return
        saved = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        for name in RENAMED.keys() & (saved.keys() if isinstance(saved, dict) else set()):
            raise TrainError(
                f"resume: {self.config} is of an earlier version, whose {name} is no longer an option: "
                f"{RENAMED[name]}; finish it with that version, or start again with --overwrite"
            )
