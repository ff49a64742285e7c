"""Says once what differs in request after request, and so is computed again each time.

A clock in a system prompt costs a client all that stands behind it, and nobody sees
why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from threading import Lock

from ..caches.reanchor import Sketch
from ..format.chain import common_run
from ..models.changes import ADVICE, Change, Decode, find_changes

_TIMES = 3
# Fewer are no loss that anybody would notice.
_LEAST = 256
# So many tokens from the first that differs are compared: where the same lines come
# again and again, comparing takes the square of their number, beside who generates.
_COMPARED = 2048


class Drift:
    """Counts where prompts differ from those before them; for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._times: Counter[str] = Counter()

    def note(self, change: Change) -> str | None:
        """Note a change, and return what to tell of it: the third time, and once."""
        with self._lock:
            self._times[change.cause] += 1
            if self._times[change.cause] != _TIMES:
                return None
        # No word of the prompt: who reads the log may be somebody else.
        return (
            f"prompts differ again and again, now in line {change.line}, and"
            f" {change.num_behind:,} tokens or more behind it are computed each time;"
            f" {ADVICE[change.cause]}"
        )


def find_drift(
    prompt: Sequence[int],
    num_computed: int,
    known: Iterable[Sequence[int]],
    decode: Decode,
) -> Change | None:
    """Return the first change in a prompt that has cost much, if there is one."""
    if num_computed < _LEAST:
        return None
    change = _first_change(prompt, known, decode)
    return change if change and change.num_behind >= _LEAST else None


def _first_change(
    prompt: Sequence[int], known: Iterable[Sequence[int]], decode: Decode
) -> Change | None:
    """Return where a prompt first differs from the one that is most like it."""
    given = Sketch.of(prompt)
    # What has all of the prompt is what it has become.
    others = [one for one in known if common_run(one, prompt) < len(prompt) - 1]
    shared = [len(given.marks & Sketch.of(one).marks) for one in others]
    if not any(shared):
        return None
    stored = others[shared.index(max(shared))]
    stop = common_run(stored, prompt) + _COMPARED
    changes = find_changes(list(stored[:stop]), list(prompt[:stop]), decode)
    return next(iter(changes), None)
