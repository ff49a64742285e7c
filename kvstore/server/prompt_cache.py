"""mlx-lm's in-memory prompt cache with a store behind it, for servers.

A miss in memory is looked up on disk; what is inserted is written through. Rows are
read, and copied for writing, on the thread that generates; another one writes. Whatever
goes wrong with the disk costs time and is logged: the server goes on from memory.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from ..caches import live as caches
from ..format.block import EXACT_BITS
from ..format.chain import common_run
from ..format.spans import Span, last_end
from .disk import MAX_QUEUED_BYTES, MIN_TOKENS, Disk, ServedModel, end_with, harmless
from .replay import Sampled
from .tenants import tenant_of

if TYPE_CHECKING:
    from ..store import Store
    from .remote import RemoteTier

log = logging.getLogger("kvstore")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What was found of one prompt, and why not more."""

    num_prompt_tokens: int
    from_memory: int
    from_disk: int
    reason: str
    # Of these, rows that were computed behind other words, at most.
    num_reanchored: int = 0

    def sums(self) -> dict[str, int]:
        """Return where the rows of the prompt come from."""
        return {
            "memory_tokens": self.from_memory,
            "disk_tokens": self.from_disk,
            "computed_tokens": self.num_computed,
        }

    @property
    def num_computed(self) -> int:
        """Tokens whose rows the model computes."""
        return self.num_prompt_tokens - self.from_memory - self.from_disk

    def __str__(self) -> str:
        moved = f", {self.num_reanchored} re-anchored" if self.num_reanchored else ""
        return (
            f"{self.num_prompt_tokens} tokens: {self.from_memory} from memory,"
            f" {self.from_disk} from disk{moved}, {self.num_computed} computed"
            f" ({self.reason})"
        )


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
        max_bytes: Their bytes, and those of rows that wait to be written.
        min_tokens: Fewer tokens are neither kept nor read for.
        exact: Read only rows that nothing lossy went into.
        min_bits: Read only rows of at least so many bits per number.
        min_free_bytes: What the disk keeps free.
        max_queued_bytes: Rows that may wait to be written; more are not kept.
        max_daily_bytes: What may be written in a day, UTC; what is there stays.
        remote: Where more of a prompt is looked for than is on disk.
    """

    def __init__(
        self,
        store: Store,
        describe: Callable[[Any], ServedModel],
        *,
        max_size: int = 10,
        max_bytes: int = 1 << 63,
        min_tokens: int = MIN_TOKENS,
        exact: bool = False,
        min_bits: int = 0,
        min_free_bytes: int = 0,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_daily_bytes: int | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        super().__init__(max_size, max_bytes)
        self._describe = describe
        self._disk = Disk(
            store,
            min_tokens=min_tokens,
            min_bits=EXACT_BITS if exact else min_bits,
            min_free_bytes=min_free_bytes,
            max_queued_bytes=min(max_queued_bytes, max_bytes),
            max_daily_bytes=max_daily_bytes,
            remote=remote,
        )
        self._end = end_with(self, self._disk)
        self._known: dict[str, Sampled] = {}
        self._lookups: deque[tuple[int, Lookup]] = deque(maxlen=64)
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
        held, rest, lookup = self._fetch(model, tokens, spans)
        self._lookups.append((self._id(tokens), lookup))
        return held, rest

    def lookup_of(self, tokens: Sequence[int]) -> Lookup | None:
        """Return what was found of one of the last prompts; any thread may ask."""
        wanted = self._id(tokens)
        known = reversed(tuple(self._lookups))
        return next((found for prompt, found in known if prompt == wanted), None)

    def _id(self, tokens: Sequence[int]) -> int:
        """Return what a prompt is known by among the last ones."""
        return hash(tuple(tokens))

    def _fetch(
        self, model: Any, tokens: list[int], spans: Sequence[Span]
    ) -> tuple[list[Any] | None, list[int], Lookup]:
        served = self._served(model)
        held, rest, why = None, tokens, "the model has no store"
        key = _key(model, served)
        if key is not None:
            with harmless("not looked for in memory"):
                near, beyond = super().fetch_nearest_cache(key, tokens)
                near, beyond = _leave_one(near, beyond, tokens)
                held, rest = _leave_units(near, beyond, tokens, spans)
        num_held = len(tokens) - len(rest)
        if served is not None:
            why, before = "the disk failed", served.num_computed
            with harmless("not read"):
                found, why = self._disk.read(served, tokens, num_held, spans)
                if found is not None:
                    num_read = len(tokens) - len(found[1])
                    num_read -= served.num_computed - before
                    moved = _num_moved(served, found[0], num_read)
                    return *found, Lookup(len(tokens), 0, num_read, why, moved)
        moved = _num_moved(served, held, num_held)
        return held, rest, Lookup(len(tokens), num_held, 0, why, moved)

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
        served = self._served(model)
        key = _key(model, served)
        if (known := self._known_of(served)) is not None:
            known.add(tokens)
        whole = None
        is_known = False
        with harmless("kept in memory only"):
            caches.check_classes(prompt_cache)
            is_known = True
        if not is_known:
            # Nothing is known of such a cache, so memory holds it as mlx-lm would.
            with harmless("not kept in memory"):
                super().insert_cache(key, tokens, prompt_cache, cache_type=cache_type)
            return
        with harmless("not kept"):
            # Cut tokens to the rows that every layer has, for memory too: a surplus
            # row belongs to some other token.
            tokens = tokens[: caches.count_rows(prompt_cache, len(tokens))]
            whole = caches.cut_copy(prompt_cache, len(tokens))
        if whole is None or not tokens:
            log.info("kvstore: not kept: no rows of exactly %d tokens", len(tokens))
            return
        if served is not None:
            with harmless("not kept"):
                is_shared = cache_type == "system"
                self._disk.keep(served, tokens, whole, is_shared=is_shared)
                if served.receipts is not None and cache_type == "assistant":
                    served.receipts.offer(tokens, whole)
        self._note_stall(begin)
        if key is not None:
            with harmless("not kept in memory"):
                super().insert_cache(key, tokens, whole, cache_type=cache_type)

    def _note_stall(self, begin: float) -> None:
        """Note that rows were taken on this thread, since a time that is past."""
        stall = time.perf_counter() - begin
        self.longest_stall_s = max(self.longest_stall_s, stall)
        log.debug("kvstore: taken for the disk in %.3f s", stall)

    def sampled(self, model: Any, tokens: Sequence[int]) -> Sampled | None:
        """Return the latest conversations of a model, of this process and on disk.

        Args:
            model: The server's key for the model.
            tokens: A prompt, which says whose they may be.
        """
        return self._known_of(self._served(model))

    def _known_of(self, served: ServedModel | None) -> Sampled | None:
        if served is None:
            return None
        digest = served.fingerprint.digest
        if digest not in self._known:
            self._known[digest] = Sampled()
            with harmless("what was said before is not known"):
                self._known[digest] = Sampled(self._disk.latest_tokens(served))
        return self._known[digest]

    def keep_prefill(
        self, model: Any, tokens: list[int], prompt_cache: list[Any]
    ) -> None:
        """Have what a prefill has computed so far written; memory does not keep it.

        Args:
            model: The server's key for the model.
            tokens: Those whose rows it has.
            prompt_cache: May grow when this has returned: what is written is taken.
        """
        begin = time.perf_counter()
        served = self._served(model)
        if served is None:
            return
        with harmless("not kept"):
            num_rows = caches.count_rows(prompt_cache, len(tokens))
            whole = caches.cut_copy(prompt_cache, num_rows)
            if whole is not None and num_rows:
                self._disk.keep(served, tokens[:num_rows], whole, is_shared=False)
        self._note_stall(begin)

    @property
    def store(self) -> Store:
        """Where prompts are looked up; tell its ``note_prefill`` what prefills take."""
        return self._disk.store

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything inserted is on disk; say whether it is."""
        return self._disk.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Write what waits, and close the store.

        Args:
            timeout_s: How long writing may take; the rest is given up, and logged.

        Returns:
            Whether nothing was given up.
        """
        self._end.detach()
        return self._disk.close(timeout_s)

    @property
    def max_bytes(self) -> int:
        """What mlx-lm's part may take: rows that wait to be written count too."""
        return max(0, self._max_bytes - self._disk.queued_bytes)

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = value

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Let go of prompt caches until there are so many, of so many bytes.

        Args:
            n_sequences: How many may stay.
            n_bytes: What they and the rows that wait to be written may take.
        """
        if n_bytes is not None:
            n_bytes -= self._disk.queued_bytes
        super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)

    def _served(self, model: Any) -> ServedModel | None:
        """Return what a key stands for; where that fails, there is only memory."""
        with harmless("served from memory only"):
            return self._describe(model)
        return None


def _num_moved(
    served: ServedModel | None, prompt_cache: list[Any] | None, num_rows: int
) -> int:
    """Return how many of so many rows may have been re-anchored."""
    if served is None or served.near is None or prompt_cache is None:
        return 0
    return min(num_rows, served.near.count(prompt_cache))


def _key(model: Any, served: ServedModel | None) -> Any:
    """Return what memory knows a model by: its weights, which may change on disk.

    And whether rows are re-anchored: once they are not any more, none are found.
    ``None`` where memory cannot know it: the key cannot be hashed.
    """
    key = model
    if served is not None:
        key = (model, served.fingerprint.digest, served.near is not None)
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


class TenantPromptCache(DiskPromptCache):
    """A prompt cache in which each tenant finds its own prompts only.

    The tenant is a salt of the fingerprint, on disk and in memory. Beside its own, a
    tenant finds what the operator has named, which no client can add to.

    Args:
        store: As :class:`DiskPromptCache` takes it.
        describe: The same.
        shared: Tokens of entries that all tenants find.
        options: As :class:`DiskPromptCache` takes them.
    """

    def __init__(
        self,
        store: Store,
        describe: Callable[[Any], ServedModel],
        shared: Sequence[Sequence[int]],
        **options: Any,
    ) -> None:
        def describe_for(key: tuple[Any, str]) -> ServedModel:
            served = describe(key[0])
            salted = served.fingerprint.with_salt(key[1])
            # Re-anchored rows of the operator's may come from what is not shared.
            near = served.near if key[1] else None
            return replace(served, fingerprint=salted, near=near)

        super().__init__(store, describe_for, **options)
        self._shared = shared

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep a prompt cache for the tenant whose tokens these are."""
        tenant = _known(tokens)
        if tenant is not None:
            key = (model, tenant)
            super().insert_cache(key, tokens, prompt_cache, cache_type=cache_type)

    def keep_prefill(
        self, model: Any, tokens: list[int], prompt_cache: list[Any]
    ) -> None:
        """Have a prefill written for the tenant whose tokens these are."""
        tenant = _known(tokens)
        if tenant is not None:
            super().keep_prefill((model, tenant), tokens, prompt_cache)

    def sampled(self, model: Any, tokens: Sequence[int]) -> Sampled | None:
        """Return the latest conversations of the tenant whose tokens these are."""
        tenant = _known(tokens)
        return None if tenant is None else super().sampled((model, tenant), tokens)

    def _fetch(
        self, model: Any, tokens: list[int], spans: Sequence[Span]
    ) -> tuple[list[Any] | None, list[int], Lookup]:
        tenant = _known(tokens)
        if tenant is None:
            return None, tokens, Lookup(len(tokens), 0, 0, "nobody knows whose it is")
        held, rest, lookup = super()._fetch((model, tenant), tokens, spans)
        stop = max((common_run(tokens, one) for one in self._shared), default=0)
        if stop <= len(tokens) - len(rest):
            return held, rest, lookup
        # Only what the operator shares; other entries of no tenant stay hidden.
        named, after = tokens[: stop + 1], tokens[stop + 1 :]
        common, left, found = super()._fetch((model, ""), named, spans)
        if common is None or len(left) + len(after) >= len(rest):
            return held, rest, lookup
        return common, left + after, replace(found, num_prompt_tokens=len(tokens))

    def _id(self, tokens: Sequence[int]) -> int:
        return hash((tenant_of(tokens), *tokens))


def _known(tokens: Sequence[int]) -> str | None:
    tenant = tenant_of(tokens)
    if tenant is None:
        log.warning("kvstore: tokens of an unknown tenant are left alone")
    return tenant
