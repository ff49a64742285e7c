"""What was loaded and how long it took, kept in memory until it is written down."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from ..errors import IndexDamagedError, StoreLockedError
from ..fingerprint import Fingerprint
from ..format.block import BlockHash
from ..storage.index import Index, Score, Timing
from . import scores, speeds
from .worth import sum_uses

if TYPE_CHECKING:
    from .load import Hit

# With older observations fading, more would change nothing.
_MAX_TIMINGS = 256
# Of requests that no save has followed.
_MAX_REQUESTS = 4096
# What was not measured for so long is not shown any more.
_KEEP_S = 90 * 86_400.0


class LoadNotes:
    """Counts loads, when blocks were last used, and how long work took.

    They are not written when a prompt waits, since SQLite may sync; losing them costs
    nothing but a worse choice of what to evict. Any thread may add to them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._uses: dict[BlockHash, float] = {}
        self._timings: deque[Timing] = deque(maxlen=_MAX_TIMINGS)
        self._requests: deque[Score] = deque(maxlen=_MAX_REQUESTS)

    def add(self, hit: Hit | None, num_tokens: int) -> None:
        """Note one load of a prompt of so many tokens, a miss where there is no hit."""
        restored = hit.num_tokens if hit else 0
        with self._lock:
            self._counts += Counter(
                hits=1 if hit else 0,
                misses=0 if hit else 1,
                restored_tokens=restored,
                missed_tokens=num_tokens - restored,
                read_bytes=sum(place.nbytes for place in hit.places) if hit else 0,
            )
            if hit:
                self._uses[hit.places[-1].hash] = time.time()

    def add_timing(
        self,
        fingerprint: Fingerprint,
        codec: str | None,
        num_tokens: int,
        *,
        seconds: float,
    ) -> None:
        """Note how long restoring rows took, or computing them where there is no codec.

        Too few tokens, or a time that cannot be, are left out.
        """
        timing = speeds.observe(
            fingerprint.bare.digest,
            codec,
            num_tokens,
            seconds=seconds,
            at=time.time(),
            model=fingerprint.label,
        )
        if timing is not None:
            with self._lock:
                self._timings.append(timing)

    def add_reanchored(self, kl: float) -> None:
        """Note how far re-anchored rows moved what a model says, by KL divergence.

        What is no number, as where logits overflow, is left out.
        """
        if not math.isfinite(kl):
            return
        with self._lock:
            self._counts += Counter(
                reanchored_checks=1, reanchored_kl_e9=round(kl * 1e9)
            )

    def add_request(self, score: Score) -> None:
        """Note what one request has cost."""
        with self._lock:
            self._requests.append(score)

    def timings(self, read: Callable[[], Iterable[Timing]]) -> list[Timing]:
        """Return what is written with what is noted and not written yet.

        While another thread writes, a timing may be in both: it counts twice, which
        changes a speed little. Nothing is in neither.

        Args:
            read: Reads what is written.
        """
        with self._lock:
            noted = list(self._timings)
        return list(_added(read(), noted).values())

    def __bool__(self) -> bool:
        return bool(self._counts or self._timings or self._requests)

    def write(self, index: Index) -> None:
        """Write everything down, and forget it."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            uses, self._uses = self._uses, {}
            timings = list(self._timings)
            requests = list(self._requests)
            self._requests.clear()
        try:
            with (
                suppress(StoreLockedError, IndexDamagedError, OSError),
                index.unsynced(),
            ):
                index.count(**counts)
                for block, used_at in uses.items():
                    index.note_use(block, used_at, sum_uses)
                if timings:
                    _write_timings(index, timings)
                if requests:
                    scores.write(index, requests)
        finally:
            with self._lock:
                written = set(map(id, timings))
                later = (t for t in self._timings if id(t) not in written)
                self._timings = deque(later, maxlen=_MAX_TIMINGS)


def _write_timings(index: Index, noted: list[Timing]) -> None:
    known = _added(index.timings(), noted)
    for timing in noted:
        index.put_timing(known[timing.fingerprint, timing.codec])
    index.drop_timings(time.time() - _KEEP_S)
    saved_s = _saved_s(noted, known)
    if saved_s is not None:
        index.count(saved_ms=round(saved_s * 1000))


Key = tuple[str, str | None]


def _added(known: Iterable[Timing], noted: Iterable[Timing]) -> dict[Key, Timing]:
    """Return sums by model and codec, with what was noted added."""
    found: dict[Key, Timing] = {(t.fingerprint, t.codec): t for t in known}
    for timing in noted:
        key = (timing.fingerprint, timing.codec)
        found[key] = speeds.add(found.get(key), timing)
    return found


def _saved_s(noted: Iterable[Timing], known: dict[Key, Timing]) -> float | None:
    """Return by how much loads were faster than prefills; ``None`` if nobody knows.

    Any speed will do that was ever measured: nothing is decided by it.
    """
    saved = []
    for timing in noted:
        prefill = known.get((timing.fingerprint, None))
        if timing.codec is not None and prefill and speeds.is_sound(prefill):
            compute_s = speeds.Speeds(prefill).prefill_s(int(timing.tokens))
            saved.append(max(0.0, (compute_s or 0.0) - timing.seconds))
    return sum(saved) if saved else None
