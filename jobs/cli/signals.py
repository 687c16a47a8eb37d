"""SIGINT and SIGTERM as a flag, so that a job stops between two steps, not within one."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from splatshard.jobs.cli.text import say

MESSAGES = {
    signal.SIGINT: "interrupted; run the same command again to continue",
    signal.SIGTERM: "terminated; run the same command again to continue",
}

STOPPING = {
    signal.SIGINT: "stopping after the current batch (Ctrl-C again to stop now) ...",
    signal.SIGTERM: "terminated: stopping after the current batch; the same command continues ...",
}


class StopSignals:
    """While active, the first signal sets `received`; a second Ctrl-C raises KeyboardInterrupt.
    `quiet` ones say nothing: they are beside one that does."""

    def __init__(self, quiet: bool = False) -> None:
        self.received = 0
        self.quiet = quiet
        self._before: dict[int, object] = {}

    @property
    def message(self) -> str:
        return MESSAGES[signal.Signals(self.received)]

    def __enter__(self) -> StopSignals:
        for number in MESSAGES:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        if not self.quiet:
            say(STOPPING[signal.Signals(number)])
