"""The exceptions a person sees: messages for the user, never tracebacks."""

from __future__ import annotations


class TrainError(Exception):
    """Something the user can put right; the message names it, says what was expected, what came and
    what to do."""


class Interrupted(Exception):
    """A SIGINT, SIGTERM or SIGHUP (``signal_number``) was obeyed: the step was finished and a
    checkpoint saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
