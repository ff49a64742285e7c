"""Signals that end a run between two steps, not in the middle of one. Knows no model.

Where mlx-lm is stopped in the middle of a step, nobody knows which rows of its prompt
cache are whole. So Ctrl-C is noted while it works, and looked at between steps.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# What ends the process once all is saved, and not only what it does.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP, as long as this is entered; in the main thread.

    Each raises ``KeyboardInterrupt``, as Ctrl-C does; but within :meth:`deferred`, the
    first is only noted. What is ignored, as by ``nohup``, stays so.

    Attributes:
        is_pending: There was a signal since :meth:`deferred` was last entered.
        ending: The signal that asks the process to end, or ``None``.
    """

    def __init__(self) -> None:
        self.is_pending = False
        self.ending: int | None = None
        self._is_deferring = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, *_ENDING):
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note the first signal instead of raising; it may stay pending at the end."""
        self.is_pending, self._is_deferring = False, True
        try:
            yield
        finally:
            self._is_deferring = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            self.ending = number
        is_first = not self.is_pending
        self.is_pending = True
        if not (self._is_deferring and is_first):
            raise KeyboardInterrupt
