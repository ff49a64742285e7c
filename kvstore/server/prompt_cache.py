"""mlx-lm's in-memory prompt cache with a store behind it, for servers.

A miss in memory is looked up on disk; what is inserted is written through. Rows are
read, and copied for writing, on the thread that generates; another one writes. Whatever
goes wrong with the disk costs time and is logged: the server goes on from memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from ..caches import live as caches
from ..caches.live import Provenance
from ..errors import KVStoreError
from ..fingerprint import Fingerprint
from ..format.block import Progress
from ..format.spans import Span, last_end
from ..ops.load import Match
from ..store import Store
from .lineage import Lineage
from .writer import Job, Writer

log = logging.getLogger("kvstore")
MIN_TOKENS = 64
"""Fewer are computed sooner than a file is opened."""
# How long a read may take at least, since the first of a process may compile kernels,
# and where nobody knows what computing takes; and how long a disk that was slower is
# left alone.
_MIN_READ_S, _MAX_READ_S, _PAUSE_S = 10.0, 30.0, 60.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server's key for a model stands for."""

    # Of the model as it is loaded, adapter and draft model included.
    fingerprint: Fingerprint
    # Prompt caches as the server makes them, one of each kind that it can go on from.
    empty_caches: tuple[list[Any], ...]


class DiskPromptCache(LRUPromptCache):
    """mlx-lm's ``LRUPromptCache``, with a store as its second tier.

    Use it from one thread, the one that generates, except for :meth:`flush` and
    :meth:`close`. Where its store is told what prefills take (``note_prefill``), it
    reads nothing that would be computed sooner. What is inserted is believed: mlx-lm
    computes wrong states for many recurrent models in batches of prompts of several
    lengths, and on disk they would be wrong for ever.

    Args:
        store: Where prompts are looked up; a second :class:`Store` on the same folder
            writes.
        describe: Returns what a key of the server's stands for; asked for each
            request, so it should remember.
        max_size: Prompt caches held in memory.
        max_bytes: Their bytes.
        min_tokens: Fewer tokens are neither kept nor read for.
        min_free_bytes: What the disk keeps free.
        max_queued_bytes: Rows that may wait to be written; more are not kept.
    """

    def __init__(
        self,
        store: Store,
        describe: Callable[[Any], ServedModel],
        *,
        max_size: int = 10,
        max_bytes: int = 1 << 63,
        min_tokens: int = MIN_TOKENS,
        min_free_bytes: int = 0,
        max_queued_bytes: int = 4_000_000_000,
    ) -> None:
        super().__init__(max_size, max_bytes)
        self._store = store
        self._describe = describe
        self._min_tokens = min_tokens
        self._lineage = Lineage()
        self._read_again_at = 0.0
        self._writer = Writer(
            self._open_again,
            min_free_bytes=min_free_bytes,
            max_queued_bytes=max_queued_bytes,
        )
        self.longest_stall_s = 0.0
        """The longest that an insertion has kept the generating thread."""

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int], *, spans: Sequence[Span] = ()
    ) -> tuple[list[Any] | None, list[int]]:
        """Return the longest prefix held in memory or on disk, and the rest.

        Args:
            model: The server's key for the model.
            tokens: The prompt. Negative ids mark media: give each token of an image
                one and the same negative id, and another image another one. The rest
                never begins inside an image.
            spans: More parts of the prompt that are fed whole, each as the position
                of its first token and the position behind its last.

        Returns:
            A prompt cache of the caller's own, or ``None``, and the tokens still to be
            fed, of which there is always one.
        """
        served = self._served(model)
        held, rest = None, tokens
        key = _key(model, served)
        if key is not None:
            with _harmless("not looked for in memory"):
                near, beyond = super().fetch_nearest_cache(key, tokens)
                near, beyond = _leave_one(near, beyond, tokens)
                held, rest = _leave_units(near, beyond, tokens, spans)
        if served is not None:
            with _harmless("not read"):
                num_held = len(tokens) - len(rest)
                found = self._read(served, tokens, num_held, spans)
                if found is not None:
                    return found
        return held, rest

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep a prompt cache in memory, and on disk soon.

        Args:
            model: The server's key for the model.
            tokens: Those whose rows it has.
            prompt_cache: Not to be changed any more.
            cache_type: mlx-lm's ``"system"``, ``"user"`` or ``"assistant"``.
        """
        begin = time.perf_counter()
        whole = None
        # What is no cache of mlx-lm's may lack anything.
        with _harmless("not kept"):
            # Cut tokens to the rows that every layer has, for memory too: a surplus
            # row belongs to some other token.
            tokens = tokens[: caches.count_rows(prompt_cache, len(tokens))]
            whole = caches.cut_copy(prompt_cache, len(tokens))
        if whole is None or not tokens:
            log.info("kvstore: not kept: no rows of exactly %d tokens", len(tokens))
            return
        served = self._served(model)
        if served is not None:
            with _harmless("not kept"):
                is_shared = cache_type == "system"
                self._keep(served, tokens, whole, is_shared=is_shared)
        stall = time.perf_counter() - begin
        self.longest_stall_s = max(self.longest_stall_s, stall)
        log.debug("kvstore: copied for the disk in %.3f s", stall)
        key = _key(model, served)
        if key is not None:
            with _harmless("not kept in memory"):
                super().insert_cache(key, tokens, whole, cache_type=cache_type)

    @property
    def store(self) -> Store:
        """Where prompts are looked up; tell its ``note_prefill`` what prefills take."""
        return self._store

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything inserted is on disk; say whether it is."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """Write what waits, and close the store."""
        self._writer.close()
        self._store.close()

    def _served(self, model: Any) -> ServedModel | None:
        """Return what a key stands for; where that fails, there is only memory."""
        with _harmless("served from memory only"):
            return self._describe(model)
        return None

    def _read(
        self,
        served: ServedModel,
        tokens: list[int],
        num_held: int,
        spans: Sequence[Span],
    ) -> tuple[list[Any], list[int]] | None:
        """Return more of a prompt than memory holds, or ``None``."""
        about = f"{len(tokens)} tokens, {num_held} in memory"
        if len(tokens) - 1 - num_held < self._min_tokens:
            log.info("kvstore: %s: no need of the disk", about)
            return None
        like, match = self._longest(served, tokens, spans)
        reason = self._why_not(served, match, num_held)
        if reason is not None:
            log.info("kvstore: %s: %s", about, reason)
            return None
        begin = time.monotonic()
        limit = self._limit(served, match.num_tokens - num_held)
        prompt_cache, rest = self._store.load(
            tokens, served.fingerprint, like=like, spans=spans, progress=limit
        )
        if prompt_cache is None:
            log.info("kvstore: %s: what is on disk turned out to be damaged", about)
            return None
        num_read, seconds = len(tokens) - len(rest), time.monotonic() - begin
        log.info("kvstore: %s: %d read from disk in %.3f s", about, num_read, seconds)
        provenance = caches.read_provenance(prompt_cache)
        self._lineage.note(served.fingerprint.digest, tokens[:num_read], provenance)
        return prompt_cache, rest

    def _limit(self, served: ServedModel, num_gained: int) -> Progress:
        """Return a callback that ends a load which takes longer than computing.

        Args:
            served: The model.
            num_gained: Tokens that need not be computed.
        """
        computed_s = self._store.speeds(served.fingerprint).prefill_s(num_gained)
        begin = time.monotonic()
        limit_s = max(_MIN_READ_S, computed_s or _MAX_READ_S)

        def progress(done: int, total: int) -> None:
            now = time.monotonic()
            if done < total and now > begin + limit_s:
                self._read_again_at = now + _PAUSE_S
                self._store.note_load(served.fingerprint, done, now - begin)
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
                self._store.lookup(tokens, served.fingerprint, like=like, spans=spans),
            )
            for like in served.empty_caches
        ]
        return max(found, key=lambda pair: pair[1].num_tokens)

    def _why_not(self, served: ServedModel, match: Match, num_held: int) -> str | None:
        """Return why the disk is not read, or ``None`` where it is."""
        about = f"{match.num_tokens} on disk"
        gain = match.num_tokens - num_held
        if gain <= 0:
            return f"{about}: {match.detail}"
        if gain < self._min_tokens:
            return f"{about}: too few more to read them"
        if time.monotonic() < self._read_again_at:
            return f"{about}: declined: the disk was too slow just now"
        speeds = self._store.speeds(served.fingerprint)
        if not speeds.pays(match.num_tokens, held=num_held):
            return (
                f"{about}: declined: read in {speeds.load_s(match.num_tokens):.3f} s,"
                f" computed in {speeds.prefill_s(gain):.3f} s"
            )
        return None

    def _open_again(self) -> Store:
        """Return the store of the writing thread."""
        mine = self._store
        other = Store(mine.path, mine.codec)
        other.share_notes(mine)
        return other

    def _keep(
        self,
        served: ServedModel,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        is_shared: bool,
    ) -> None:
        """Copy what the store lacks, and have it written."""
        if len(tokens) < self._min_tokens:
            log.info("kvstore: not kept: %d tokens are too few", len(tokens))
            return
        self._mark(served.fingerprint, tokens, prompt_cache)
        snapshot = self._store.snapshot(
            tokens, prompt_cache, served.fingerprint, without=self._writer.pending
        )
        if not self._writer.put(Job(snapshot, is_shared)):
            log.warning("kvstore: not kept: too much is waiting for the disk")

    def _mark(
        self, fingerprint: Fingerprint, tokens: Sequence[int], prompt_cache: list[Any]
    ) -> None:
        """Give a prompt cache back what a batch has made it forget."""
        kept = caches.read_provenance(prompt_cache)
        known = self._lineage.of(fingerprint.digest, tokens)
        provenance = Provenance(
            max(kept.coded_tokens, known.coded_tokens), kept.is_exact and known.is_exact
        )
        if provenance != kept:
            caches.set_provenance(prompt_cache, provenance)


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Log whatever goes wrong with the disk: a server lives on without it."""
    try:
        yield
    except (KVStoreError, OSError) as error:
        log.warning("kvstore: %s: %s", what, error)
    except Exception:
        # Raised on the generating thread, it would end the server.
        log.exception("kvstore: %s", what)


def _key(model: Any, served: ServedModel | None) -> Any:
    """Return what memory knows a model by: its weights, which may change on disk.

    ``None`` where memory cannot know it: the key cannot be hashed.
    """
    key = model if served is None else (model, served.fingerprint.digest)
    try:
        hash(key)
    except TypeError:
        return None if served is None else served.fingerprint.digest
    return key


def _leave_one(
    prompt_cache: list[Any] | None, rest: list[int], tokens: list[int]
) -> tuple[list[Any] | None, list[int]]:
    """Return a hit that leaves a token to feed; mlx-lm's own may leave none."""
    if rest or prompt_cache is None:
        return prompt_cache, rest
    if not can_trim_prompt_cache(prompt_cache):
        return None, tokens
    trim_prompt_cache(prompt_cache, 1)
    return prompt_cache, tokens[-1:]


def _leave_units(
    prompt_cache: list[Any] | None,
    rest: list[int],
    tokens: list[int],
    spans: Sequence[Span],
) -> tuple[list[Any] | None, list[int]]:
    """Return a hit that leaves whole what is fed as a unit, such as an image."""
    num_held = len(tokens) - len(rest)
    end = last_end(tokens, num_held, spans)
    if prompt_cache is None or end == num_held:
        return prompt_cache, rest
    if not end or not can_trim_prompt_cache(prompt_cache):
        return None, tokens
    trim_prompt_cache(prompt_cache, num_held - end)
    return prompt_cache, tokens[end:]
