"""SIGINT, SIGTERM and SIGHUP as a wish that a loop obeys between two steps.

A handler that raised would leave a step half done: weights moved, moments not. This one only takes
a note. The loop looks at it after each step, saves and ends with ``Interrupted``. Whoever cannot
wait sends the signal again, which then acts as usual.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopWish:
    """Context manager: ``received`` is the number of the first signal that came, 0 before.

    A second signal acts as it would without us (SIGINT raises KeyboardInterrupt, SIGTERM ends the
    process). A signal that was ignored stays ignored, as SIGHUP does under nohup. Outside the main
    thread, where Python allows no handlers, it does nothing.
    """

    received = 0

    def __enter__(self) -> StopWish:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
