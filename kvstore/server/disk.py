"""What a server keeps on disk of its prompt caches: reads, and has written.

Any thread may call it. Rows are read, and copied for writing, on the thread that asks;
another one writes.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..caches import live as caches
from ..errors import KVStoreError
from ..fingerprint import Fingerprint
from ..format.block import BlockHash, Progress
from ..format.spans import Span
from .lineage import Lineage
from .writer import Job, Writer

if TYPE_CHECKING:
    from ..caches.reanchor import Reanchoring
    from ..ops.load import Match
    from ..store import Store
    from .receipts import Receipts
    from .remote import RemoteTier

log = logging.getLogger("kvstore")
# What another conversation says is not for the log.
_TOKENS = re.compile(r": stored -?\d+, given -?\d+")
# Apart, for a server that tells of each request in a line of its own.
log_lookup = logging.getLogger("kvstore.lookup")
MIN_TOKENS = 64
"""Fewer are computed sooner than a file is opened."""
MAX_QUEUED_BYTES = 2_000_000_000
"""What may wait in memory to be written."""
# How long a read may take at least, since the first of a process may compile kernels,
# and where nobody knows what computing takes; and how long a disk that was slower is
# left alone.
_MIN_READ_S, _MAX_READ_S, _PAUSE_S = 10.0, 30.0, 60.0
# So much of the time that computing would take, rows on their way are waited for.
_WAIT = 0.05


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server's key for a model stands for."""

    # Of the model as it is loaded, adapter and draft model included.
    fingerprint: Fingerprint
    # Prompt caches as the server makes them, one of each kind that it can go on from.
    empty_caches: tuple[list[Any], ...]
    # Returns the first words of a conversation, for people. The writing thread asks.
    make_title: Callable[[Sequence[int]], str] = lambda tokens: ""
    # The model, where rows may be re-anchored. Whoever merges caches into batches then
    # has to keep their marks, as `serve` does: nothing else tells what was.
    near: Reanchoring | None = None
    # Measures what that costs.
    receipts: Receipts | None = None

    @property
    def num_computed(self) -> int:
        """Tokens that were computed so far to re-anchor what follows them."""
        return self.near.num_computed if self.near else 0


class Disk:
    """A store that several threads read, and one of its own writes.

    Args:
        store: Where prompts are looked up. Each lookup and each load locks it, so it is
            this object's from now on.
        min_tokens: Fewer tokens are neither kept nor read for.
        min_bits: Rows of fewer bits per number are not read.
        min_free_bytes: What the disk keeps free.
        max_queued_bytes: Rows that may wait to be written; more are not kept.
        max_daily_bytes: What may be written in a day, UTC.
        remote: Where more of a prompt is looked for than is on disk.
    """

    def __init__(
        self,
        store: Store,
        *,
        min_tokens: int = MIN_TOKENS,
        min_bits: int = 0,
        min_free_bytes: int = 0,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_daily_bytes: int | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        self.store = store
        self._remote = remote
        self._reading = threading.Lock()
        # Of its own, so that no insertion waits for a read.
        self._taker: Store | None = None
        self._taking = threading.Lock()
        self._min_tokens = min_tokens
        self._min_bits = min_bits
        self._lineage = Lineage()
        self._read_again_at = 0.0
        self._writer = Writer(
            store.reopen,
            min_free_bytes=min_free_bytes,
            max_queued_bytes=max_queued_bytes,
            max_daily_bytes=max_daily_bytes,
            saved=remote.offer if remote else lambda entry: None,
        )

    def read(
        self,
        served: ServedModel,
        tokens: list[int],
        num_held: int,
        spans: Sequence[Span] = (),
    ) -> tuple[tuple[list[Any], list[int]] | None, str]:
        """Return more of a prompt than memory holds, or ``None``, and why.

        Returns:
            A prompt cache, evaluated, and the tokens still to be fed; and the reason
            in words.
        """
        with self._reading:
            found, why = self._read(served, tokens, num_held, spans)
        log_lookup.info(
            "kvstore: %d tokens, %d in memory: %s", len(tokens), num_held, why
        )
        return found, why

    def latest_tokens(self, served: ServedModel) -> list[list[int]]:
        """Return the tokens of what was stored last of a model, the latest first."""
        model = served.fingerprint
        kinds = [model, model.reanchored] if served.near else [model]
        with self._reading:
            found = [self.store.latest_tokens(kind) for kind in kinds]
        # In turn, since whoever remembers only so many lets the last ones go.
        return [t for turn in zip_longest(*found) for t in turn if t is not None]

    def keep(
        self,
        served: ServedModel,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        is_shared: bool,
    ) -> bool:
        """Copy what the store lacks, and have it written; say whether it will be.

        Args:
            served: The model.
            tokens: Exactly those whose rows the prompt cache has.
            prompt_cache: Its arrays are evaluated on this thread.
            is_shared: Others go on from here, so that what continues it does not take
                its place.
        """
        with self._taking:
            return self._keep(served, tokens, prompt_cache, is_shared=is_shared)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was kept is on disk or given up; say whether it is."""
        return self._writer.flush(timeout_s)

    @property
    def queued_bytes(self) -> int:
        """What the rows take in memory that wait to be written."""
        return self._writer.queued_bytes

    def close(self, timeout_s: float | None = None) -> bool:
        """Write what waits, and close the stores; nothing more is kept then.

        Args:
            timeout_s: How long writing may take; the rest is given up, and logged.

        Returns:
            Whether nothing was given up.
        """
        begin = time.monotonic()
        is_written = self._writer.close(timeout_s)
        if self._remote is not None:
            # What it cannot be told in time is on the disk all the same.
            left = timeout_s and max(0.0, begin + timeout_s - time.monotonic())
            self._remote.close(left)
        with self._taking, self._reading:
            for store in (self._taker, self.store):
                if store is not None:
                    store.close()
        return is_written

    def _read(
        self,
        served: ServedModel,
        tokens: list[int],
        num_held: int,
        spans: Sequence[Span],
    ) -> tuple[tuple[list[Any], list[int]] | None, str]:
        if len(tokens) - 1 - num_held < self._min_tokens:
            return None, "no need of the disk"
        _remake(self.store)
        like, match = self._longest(served, tokens, spans)
        pulled = self._bring(served, tokens, max(num_held, match.num_tokens))
        if pulled is not None:
            like, match = self._longest(served, tokens, spans)
        about = f"{pulled}; " if pulled else ""
        reason = self._why_not(served, match, num_held)
        moved = self._read_near(served, tokens, num_held, spans)
        if moved is not None:
            return moved
        if reason is not None:
            return None, about + reason
        begin = time.monotonic()
        limit = self._limit(served, match.num_tokens - num_held)
        prompt_cache, rest = self.store.load(
            tokens,
            served.fingerprint,
            min_bits=self._min_bits,
            like=like,
            spans=spans,
            progress=limit,
        )
        if prompt_cache is None:
            return None, "what is on disk turned out to be damaged"
        num_read, seconds = len(tokens) - len(rest), time.monotonic() - begin
        provenance = caches.read_provenance(prompt_cache)
        self._lineage.note(served.fingerprint.digest, tokens[:num_read], provenance)
        quality = provenance.quality
        why = f"{num_read} read from disk in {seconds:.3f} s, {quality}"
        return (prompt_cache, rest), about + why

    def _read_near(
        self,
        served: ServedModel,
        tokens: list[int],
        num_held: int,
        spans: Sequence[Span],
    ) -> tuple[tuple[list[Any], list[int]], str] | None:
        """Return re-anchored rows of a prompt, where they are allowed and worth it."""
        near, begin = served.near, time.monotonic()
        if near is None or spans or begin < self._read_again_at:
            return None
        self._wait_for_near(served, tokens, num_held)
        before = served.num_computed
        prompt_cache, rest = self.store.load_near(
            tokens,
            served.fingerprint,
            near,
            held=num_held,
            min_bits=self._min_bits,
            like=served.empty_caches[0],
            progress=self._limit(served, len(tokens) - num_held),
        )
        if prompt_cache is None:
            return None
        num_rows, num_computed = len(tokens) - len(rest), served.num_computed - before
        why = (
            f"{num_rows - num_computed} read from disk and {num_computed} computed in"
            f" {time.monotonic() - begin:.3f} s,"
            f" {caches.read_provenance(prompt_cache).quality}"
        )
        return (prompt_cache, rest), why

    def _wait_for_near(
        self, served: ServedModel, tokens: list[int], num_held: int
    ) -> None:
        """Wait a little for what is much like a prompt and on its way to the disk.

        Where a tool takes but a moment, that is the turn before.
        """
        from ..caches.reanchor import Sketch

        speeds = self.store.speeds(served.fingerprint)
        computed_s = speeds.prefill_s(len(tokens) - num_held) or 0.0
        given = cache(lambda: Sketch.of(tokens).marks)
        # Of no other tenant: the time that it takes would tell what was asked.
        own = served.fingerprint.fields, served.fingerprint.reanchored.fields

        def is_near(job: Job) -> bool:
            is_own = job.snapshot.chain.origin.fingerprint in own
            return is_own and bool(given() & Sketch.of(job.tokens).marks)

        self._writer.wait_for(is_near, computed_s * _WAIT)

    def _bring(
        self, served: ServedModel, tokens: list[int], num_held: int
    ) -> str | None:
        """Have the remote asked for more than is held, and say what was done."""
        least = num_held + self._min_tokens
        if self._remote is None or least >= len(tokens):
            return None
        prefill = self.store.speeds(served.fingerprint).prefill
        return self._remote.bring(
            served.fingerprint.digest,
            tokens,
            least,
            like=served.empty_caches[0],
            min_bits=self._min_bits,
            prefill=prefill,
        )

    def _limit(self, served: ServedModel, num_gained: int) -> Progress:
        """Return what ends a load that takes longer than computing what it gains."""
        computed_s = self.store.speeds(served.fingerprint).prefill_s(num_gained)
        begin = time.monotonic()
        limit_s = max(_MIN_READ_S, computed_s or _MAX_READ_S)

        def progress(done: int, total: int) -> None:
            now = time.monotonic()
            if done < total and now > begin + limit_s:
                self._read_again_at = now + _PAUSE_S
                self.store.note_load(served.fingerprint, done, now - begin)
                raise KVStoreError(
                    f"the disk is slower than the model: {done} of {total} tokens"
                    f" read, and none are for {_PAUSE_S:.0f} s"
                )

        return progress

    def _longest(
        self, served: ServedModel, tokens: list[int], spans: Sequence[Span]
    ) -> tuple[list[Any], Match]:
        """Return the kind of prompt cache of which most is stored."""
        found = [
            (
                like,
                self.store.lookup(
                    tokens,
                    served.fingerprint,
                    min_bits=self._min_bits,
                    like=like,
                    spans=spans,
                ),
            )
            for like in served.empty_caches
        ]
        return max(found, key=lambda pair: pair[1].num_tokens)

    def _why_not(self, served: ServedModel, match: Match, num_held: int) -> str | None:
        """Return why the disk is not read, or ``None`` where it is."""
        about = f"{match.num_tokens} on disk"
        gain = match.num_tokens - num_held
        if gain <= 0:
            return f"{about}: {_TOKENS.sub('', match.detail)}"
        if gain < self._min_tokens:
            return f"{about}: too few more to read them"
        if time.monotonic() < self._read_again_at:
            return f"{about}: declined: the disk was too slow just now"
        speeds = self.store.speeds(served.fingerprint)
        if not speeds.pays(match.num_tokens, held=num_held):
            return (
                f"{about}: declined: read in {speeds.load_s(match.num_tokens):.3f} s,"
                f" computed in {speeds.prefill_s(gain):.3f} s"
            )
        return None

    def _keep(
        self,
        served: ServedModel,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        is_shared: bool,
    ) -> bool:
        if len(tokens) < self._min_tokens:
            log.info("kvstore: not kept: %d tokens are too few", len(tokens))
            return False
        self._mark(served.fingerprint, tokens, prompt_cache)
        self._taker = self._taker or self.store.reopen()
        _remake(self._taker)
        pending: set[BlockHash] = set()

        def reserve(hashes: frozenset[BlockHash]) -> bool:
            found, is_settled = self._writer.reserve(hashes)
            pending.update(found)
            return is_settled

        snapshot = self._taker.snapshot(
            tokens, prompt_cache, served.fingerprint, without=pending, reserve=reserve
        )
        return self._writer.put(Job(snapshot, is_shared, served.make_title))

    def _mark(
        self, fingerprint: Fingerprint, tokens: Sequence[int], prompt_cache: list[Any]
    ) -> None:
        """Give a prompt cache back what a batch has made it forget."""
        if self._lineage.is_empty:
            return
        kept = caches.read_provenance(prompt_cache)
        known = self._lineage.of(fingerprint.digest, tokens)
        provenance = replace(
            kept,
            coded_tokens=max(kept.coded_tokens, known.coded_tokens),
            bits=min(kept.bits, known.bits),
        )
        if provenance != kept:
            caches.set_provenance(prompt_cache, provenance)


def end_with(owner: object, disk: Disk) -> weakref.finalize[[], Any]:
    """Have a disk closed when nobody has its owner any more, or the process ends.

    What is returned closes it at once, and only once.
    """
    end = weakref.finalize(owner, disk.close)
    # `atexit` is too late: the pools of threads that a save uses have ended by then.
    threading._register_atexit(end)  # type: ignore[attr-defined]
    return end


def _remake(store: Store) -> None:
    """Make a store again, if somebody has deleted it meanwhile."""
    if store.remake():
        log.warning("kvstore: the store was deleted; it is made again")


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Log whatever goes wrong with the disk: a server lives on without it."""
    try:
        yield
    except (KVStoreError, OSError) as error:
        log.warning("kvstore: %s: %s", what, error)
    except Exception:
        # Raised on the generating thread, it would end the server.
        log.exception("kvstore: %s", what)
