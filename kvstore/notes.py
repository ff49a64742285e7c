"""What was loaded, kept in memory until there is time to write it down."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import IntegrityError, StoreLockedError
from .index import Index
from .types import BlockHash

if TYPE_CHECKING:
    from .loading import Hit


class LoadNotes:
    """Counts loads, and when blocks were last used.

    They are not written when a prompt waits, since SQLite may sync; losing them costs
    nothing but a worse choice of what to evict.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._uses: dict[BlockHash, float] = {}

    def add(self, hit: Hit | None, num_tokens: int) -> None:
        """Note one load of a prompt of so many tokens, a miss where there is no hit."""
        restored = hit.num_tokens if hit else 0
        self._counts += Counter(
            hits=1 if hit else 0,
            misses=0 if hit else 1,
            restored_tokens=restored,
            missed_tokens=num_tokens - restored,
            read_bytes=sum(place.nbytes for place in hit.places) if hit else 0,
        )
        if hit:
            self._uses[hit.places[-1].hash] = time.time()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def write(self, index: Index) -> None:
        """Write everything down, and forget it."""
        counts, uses = self._counts, self._uses
        self._counts, self._uses = Counter(), {}
        with suppress(StoreLockedError, IntegrityError, OSError), index.unsynced():
            index.count(**counts)
            for block, used_at in uses.items():
                index.note_use(block, used_at)
