"""Signals that ask a run to stop, noted before the seconds that imports take."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """Remembers the last stop signal since it was made. A handler only notes it: saving needs collectives, which it may interrupt."""

    def __init__(self) -> None:
        self.received = ""
        """Name of the signal, or an empty string."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
