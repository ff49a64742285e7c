"""Saves on a thread of its own, so that a slow disk keeps nobody waiting.

Snapshots are written in the order in which they come, by a store that only this thread
uses. Whatever goes wrong is logged, and costs the entry only.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..errors import EntryNotFoundError, KVStoreError
from ..format.block import BlockHash
from ..format.entry import Entry

if TYPE_CHECKING:
    from ..caches.snapshot import Chain, Snapshot
    from ..caches.taken import TakenRows
    from ..store import Store

log = logging.getLogger("kvstore")
NICE = 10
"""By how much the writing thread gives way to others, on Linux."""
# Two ends a turn: that of the prompt and that of the reply.
_NUM_NEWEST = 4
# Entries that a later one may take the place of.
_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """Something to be saved."""

    # Taken from the prompt cache.
    snapshot: Snapshot
    # Others will go on from here, so that what continues it does not take its place.
    is_shared: bool
    # Returns the first words of a conversation, for people.
    make_title: Callable[[Sequence[int]], str]

    @property
    def tokens(self) -> list[int]:
        """The tokens of what is saved."""
        blocks = self.snapshot.chain.blocks
        return [token for block in blocks for token in block.tokens]

    @property
    def title(self) -> str:
        """The first words of what is saved."""
        return self.make_title(self.tokens)

    @property
    def rows(self) -> TakenRows:
        """The rows of the blocks that are to be written."""
        return cast("TakenRows", self.snapshot.rows)  # of another thread's caches

    def joined(self, other: Job) -> Job:
        """Return the same with what another was to write of its blocks."""
        hashes = {block.hash for block in self.snapshot.chain.blocks}
        rows = self.rows.joined(other.rows, hashes)
        return replace(self, snapshot=replace(self.snapshot, rows=rows))


def give_way() -> None:
    """Let other threads go first, where a thread has a priority of its own."""
    # On two cores, a token takes three times as long beside an equal that encodes: each
    # product of matrices waits for its slower half.
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread) + NICE
            os.setpriority(os.PRIO_PROCESS, thread, nice)


class Writer:
    """Writes snapshots behind the back of a server.

    Args:
        open_store: Opens the store, on the writing thread.
        min_free_bytes: Nothing is written that would leave less of the disk free.
        max_queued_bytes: Rows that may wait; a snapshot that would be more is dropped.
        max_daily_bytes: What may be written of shards in a day, UTC, by all processes.
        saved: Called with each entry that is on disk now.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        *,
        min_free_bytes: int,
        max_queued_bytes: int,
        max_daily_bytes: int | None = None,
        saved: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._open_store = open_store
        self._saved = saved
        self._min_free_bytes = min_free_bytes
        self._max_queued_bytes = max_queued_bytes
        self._max_daily_bytes = max_daily_bytes
        self._full_on = 0  # the day since 1970
        self._jobs: deque[Job] = deque()
        self._queued_bytes = 0
        # The first of the queue is being written.
        self._has_begun = False
        self._changed = threading.Condition()
        self._is_closing = self._is_given_up = False
        # Blocks that the next job builds on, or has; one job at a time is made.
        self._reserved: frozenset[BlockHash] = frozenset()
        self._is_evicting = False
        self._kept: dict[str, Entry] = {}
        self._thread = threading.Thread(
            target=self._run, name="kvstore-writer", daemon=True
        )
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes of all rows that wait, which are copies in memory."""
        return self._queued_bytes

    @property
    def pending(self) -> frozenset[BlockHash]:
        """The blocks that are on their way."""
        with self._changed:
            return frozenset(block for job in self._jobs for block in job.rows.hashes)

    def reserve(
        self, hashes: frozenset[BlockHash]
    ) -> tuple[frozenset[BlockHash], bool]:
        """Have no job evict some blocks, until the next :meth:`put` says what it needs.

        Args:
            hashes: The blocks of what is put next.

        Returns:
            The blocks that are on their way, and whether those that the store has now
            stay there: they do unless something is just being evicted.
        """
        with self._changed:
            self._reserved = hashes
            return self.pending, not self._is_evicting

    def _spare(self) -> frozenset[BlockHash]:
        """Return the blocks that jobs build on; from now on, others are evicted."""
        with self._changed:
            self._is_evicting = True
            chains = (job.snapshot.chain.hashes for job in self._jobs)
            return self._reserved.union(*chains)

    def put(self, job: Job) -> bool:
        """Have something saved soon; ``False`` if too much waits, or it has closed.

        What waits of the same conversation is saved with it.
        """
        with self._changed:
            queued = self._queued_bytes + job.rows.nbytes
            # Into an empty queue goes even what is larger than the limit: it would
            # never fit.
            if self._is_closing or (self._jobs and queued > self._max_queued_bytes):
                why = "it is closed" if self._is_closing else "too much is waiting"
                log.warning("kvstore: not kept: %s for the disk", why)
                return False
            self._jobs.append(self._merged(job))
            self._queued_bytes = sum(each.rows.nbytes for each in self._jobs)
            self._changed.notify_all()
        return True

    def _merged(self, job: Job) -> Job:
        """Return a job with what waits of its conversation, and empty the queue of it.

        One end is written then in the place of several, with one sync.
        """
        waiting = list(self._jobs)[self._has_begun :]
        for old in reversed(waiting):
            later = waiting[waiting.index(old) + 1 :]
            if old.is_shared or not job.snapshot.chain.contains(old.snapshot.chain):
                continue
            # Others may build on its blocks, and are written before this one.
            if not any(
                other.snapshot.chain.hashes & old.rows.hashes for other in later
            ):
                job = job.joined(old)
                waiting.remove(old)
                self._jobs.remove(old)
        return job

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was put is saved or given up; say whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def wait_for(self, is_wanted: Callable[[Job], bool], timeout_s: float) -> None:
        """Wait until nothing that is wanted is on its way, or so long."""
        with self._changed:
            self._changed.wait_for(
                lambda: not any(map(is_wanted, self._jobs)), timeout_s
            )

    def close(self, timeout_s: float | None = None) -> bool:
        """Save what waits, end the thread, and say whether nothing was given up.

        Args:
            timeout_s: How long that may take; what waits then is given up, as it is
                where Ctrl-C comes.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        try:
            self._thread.join(timeout_s)
        finally:
            is_written = self._give_up()
        return is_written

    def _give_up(self) -> bool:
        """Write no further job, and say what is lost; nothing where all is written."""
        with self._changed:
            self._is_given_up = True
            if not self._jobs:
                return True
            tokens = sum(job.snapshot.chain.num_tokens for job in self._jobs)
            log.warning(
                "kvstore: not kept: %d prompts of %d tokens in all, %.1f MB of rows and"
                " codes: the disk was too slow to write them before the end",
                len(self._jobs),
                tokens,
                self._queued_bytes / 1e6,
            )
            return False

    def _run(self) -> None:
        give_way()
        store: Store | None = None
        while (job := self._next()) is not None:
            is_saved = False
            try:
                store = store or self._open_store()
                store.remake()
                is_saved = self._save(store, job)
            except (KVStoreError, OSError) as error:
                log.warning("kvstore: not kept: %s", error)
            except Exception:
                # A server goes on without its disk.
                log.exception("kvstore: not kept")
            finally:
                self._finish(job, is_saved)
        if store is not None:
            store.close()

    def _next(self) -> Job | None:
        """Return the next job, still in the queue; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing)
            self._has_begun = bool(self._jobs) and not self._is_given_up
            # It stays in the queue while it is written, so that `pending` names its
            # blocks.
            return self._jobs[0] if self._has_begun else None

    def _finish(self, job: Job, is_saved: bool) -> None:
        with self._changed:
            self._jobs.popleft()
            self._is_evicting = self._has_begun = False
            self._queued_bytes -= job.rows.nbytes
            if not is_saved:
                self._hand_on(job)
            self._changed.notify_all()

    def _hand_on(self, job: Job) -> None:
        """Give the blocks of a failed job to the next one.

        Later jobs skipped these blocks because this job was to write them.
        """
        for number, later in enumerate(self._jobs):
            joined = later.joined(job)
            if joined.rows is not later.rows:
                self._jobs[number] = joined
                self._queued_bytes += joined.rows.nbytes - later.rows.nbytes
                return

    def _may_write(self, store: Store, nbytes: int) -> bool:
        """Whether so many more bytes are allowed today; the first time not, log it."""
        most, today = self._max_daily_bytes, int(time.time() // 86_400)
        if most is None:
            return True
        written = store.run(lambda blocks: blocks.index.written_today())
        if written + nbytes <= most:
            return True
        if self._full_on != today:
            self._full_on = today
            log.warning(
                "kvstore: not kept: %.1f of %.1f GB are written today, and what comes"
                " next has %.1f GB of rows; there is no more such line today",
                *(size / 1e9 for size in (written, most, nbytes)),
            )
        return False

    def _save(self, store: Store, job: Job) -> bool:
        """Save one; ``False`` where the disk is to be spared."""
        if not self._may_write(store, job.rows.nbytes):
            return False
        disk = os.statvfs(store.path)
        free = disk.f_bavail * disk.f_frsize
        if free - job.rows.nbytes < self._min_free_bytes:
            log.warning(
                "kvstore: not kept: the disk has %.1f GB free, %.1f GB are reserved",
                free / 1e9,
                self._min_free_bytes / 1e9,
            )
            return False
        begin = time.monotonic()
        entry = store.save_snapshot(job.snapshot, title=job.title, spared=self._spare)
        log.info(
            "kvstore: kept %d tokens: %d blocks new, %.1f MB of rows and codes, in"
            " %.3f s",
            entry.num_tokens,
            len(job.rows.hashes),
            job.rows.nbytes / 1e6,
            time.monotonic() - begin,
        )
        if not job.is_shared:
            self._remember(entry)
        self._supersede(store, job.snapshot.chain, entry)
        self._saved(entry)
        return True

    def _supersede(self, store: Store, chain: Chain, entry: Entry) -> None:
        """Remove our entries that this one continues, as far as nobody needs them.

        It has all of their rows. But windows and states can be restored only where an
        entry ends, so of these some stay.
        """
        continued = [
            old
            for old in self._kept.values()
            if old.id != entry.id and chain.continues(old)
        ]
        for old in continued if chain.has_only_rows else dispensable(continued):
            try:
                if not store.entry(old.id).pinned:
                    store.remove(old.id)
            except EntryNotFoundError:
                pass  # somebody else was faster
            except (KVStoreError, OSError) as error:
                log.info("kvstore: `%s` stays for now: %s", old.id[:12], error)
                continue
            del self._kept[old.id]

    def _remember(self, entry: Entry) -> None:
        self._kept.pop(entry.id, None)
        self._kept[entry.id] = entry
        if len(self._kept) > _MAX_REMEMBERED:
            del self._kept[next(iter(self._kept))]


def dispensable(continued: Sequence[Entry]) -> list[Entry]:
    """Return the ends of a conversation at which it need not be restored any more.

    The newest stay: a client renders the last turns anew, or takes them back. Before
    them stays one at about each half of the length, since a conversation is also
    compacted or forked. So their number grows with the logarithm of the length.

    Args:
        continued: Entries of one conversation, in any order.
    """
    newest_first = sorted(continued, key=lambda entry: -entry.num_tokens)
    limit, found = float("inf"), []
    for number, entry in enumerate(newest_first):
        if number < _NUM_NEWEST or entry.num_tokens <= limit:
            limit = entry.num_tokens / 2
        else:
            found.append(entry)
    return found
