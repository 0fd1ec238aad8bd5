"""The two exceptions a person sees. Both carry a sentence for the user; neither shows a traceback.

``cli.py`` turns ``TrainError`` into exit code 1 and ``Interrupted`` into 128 + the number of the
signal. Any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class TrainError(Exception):
    """Something the user can put right.

    The message names the option or file, what was expected, what came and what to do.
    """


class Interrupted(Exception):
    """A SIGINT, SIGTERM or SIGHUP was obeyed: the step was finished and a checkpoint saved.

    signal_number: which one, for the exit code.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
