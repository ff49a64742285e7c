"""Signals that end a run between two steps, not in the middle of one. Knows no model.

Where mlx-lm is stopped in the middle of a step, nobody knows which rows of its prompt
cache are whole. So Ctrl-C is noted while it works, and looked at between steps.

A step may take minutes, in which Python runs no handler. So a thread watches for the
byte that the system writes in the same instant, and says that the signal was heard.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any

# What ends the process once all is saved, and not only what it does.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP, as long as this is entered; in the main thread.

    Each raises ``KeyboardInterrupt``, as Ctrl-C does; but within :meth:`deferred`, the
    first is only noted. What is ignored, as by ``nohup``, stays so.

    Args:
        on_heard: Called at once, on another thread, where a signal comes while
            something works that will end only later.

    Attributes:
        is_pending: There was a signal since :meth:`deferred` was last entered.
        ending: The signal that asks the process to end, or ``None``.
    """

    def __init__(self, on_heard: Callable[[], None] | None = None) -> None:
        self._on_heard = on_heard
        # Whoever works wants to be told of the next signal.
        self._is_waiting = False
        self._watcher: Thread | None = None
        self._pipe = (-1, -1)
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
        if self._on_heard is not None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._watcher = Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        if self._watcher is not None:
            os.close(self._pipe[1])
            self._watcher.join()
            os.close(self._pipe[0])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note the first signal instead of raising; it may stay pending at the end."""
        self.is_pending, self._is_deferring = False, True
        try:
            with self.heard():
                yield
        finally:
            self._is_deferring = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Say at once that a signal was heard, however late it is acted upon."""
        if self._watcher is None:
            yield
            return
        # Only now: whoever reads a line between messages has a descriptor of its own.
        former = signal.set_wakeup_fd(self._pipe[1])
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False
            signal.set_wakeup_fd(former)

    def _watch(self) -> None:
        wanted = {signal.SIGINT, *_ENDING}
        while numbers := os.read(self._pipe[0], 64):
            if self._is_waiting and self._on_heard and wanted & set(numbers):
                self._is_waiting = False
                self._on_heard()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            self.ending = number
        is_first = not self.is_pending
        self.is_pending = True
        if not (self._is_deferring and is_first):
            raise KeyboardInterrupt
