"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import signal
from types import FrameType


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM only sets `signal`; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
