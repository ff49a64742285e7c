"""Sums over a store: what it holds, what that would take otherwise, what it saved.

From entries and index alone, so that it takes a moment. Knows no arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..format.block import BlockHash
from ..format.entry import Entry
from ..format.safetensors import ITEM_SIZES
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.index import Link, Timing
from .speeds import ModelSpeeds, Speeds, is_current, is_sound


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over a store."""

    num_entries: int
    # Blocks the index knows.
    num_blocks: int
    # Shards the index knows.
    num_shards: int
    # Tokens over all entries, shared ones counted each time.
    num_tokens: int
    # Bytes of all shards.
    nbytes: int
    # Bytes of all entries' blocks, shared ones counted each time.
    entry_bytes: int
    # The same, each block counted once; the rest can be pruned.
    reached_bytes: int
    # Those of them that entries with a name, or pinned, have; these are never evicted
    # unasked.
    kept_bytes: int
    # The size limit.
    max_bytes: int
    # Files that could not be read, in quarantine.
    num_quarantined: int
    # Bytes of these.
    quarantine_bytes: int
    # Files that are being written, or that a crash has left, in ``tmp``.
    num_staged: int
    # Bytes of these.
    staged_bytes: int
    # ``entry_bytes`` over ``reached_bytes``.
    dedup_ratio: float
    # What the blocks that entries reach would take as they are in memory, over what
    # they take.
    compression_ratio: float
    # By how much hits were faster than computing the same rows; ``None`` where the
    # speed of that was never measured.
    seconds_saved: float | None
    # Sums over the life of the index: ``hits``, ``misses``, ``restored_tokens`` (not
    # recomputed), ``missed_tokens``, ``written_bytes``, ``read_bytes``, ``raw_bytes``
    # (what was written, before any codec).
    counters: dict[str, int]
    # How fast each model's rows are computed and restored.
    speeds: tuple[ModelSpeeds, ...]


_MAX_NESTING = 8


def sum_up(blocks: BlockStore, entries: Sequence[Entry], *, now: float) -> Stats:
    """Return sums over a store.

    Args:
        blocks: The store's blocks.
        entries: Its entries.
        now: Unix seconds, by which speeds are current or not.
    """
    folder, index = blocks.folder, blocks.index
    sizes, counters = index.shards(), index.counters()
    layouts = {root: layout for root, _, layout in index.all_roots()}
    reach = _Reach(index.links(), layouts)
    for entry in filter(_is_kept, entries):
        reach.add(entry)
    kept_bytes = reach.nbytes
    for entry in entries:
        if not _is_kept(entry):
            reach.add(entry)
    quarantined, staged = (
        list(files.sizes_in(path).values())
        for path in (folder.quarantine, folder.staging)
    )
    saved_ms = counters.get("saved_ms")
    return Stats(
        num_entries=len(entries),
        num_blocks=index.count_blocks(),
        num_shards=len(sizes),
        num_tokens=sum(entry.num_tokens for entry in entries),
        nbytes=sum(sizes.values()),
        entry_bytes=reach.entry_bytes,
        reached_bytes=reach.nbytes,
        kept_bytes=kept_bytes,
        max_bytes=folder.max_bytes,
        num_quarantined=len(quarantined),
        quarantine_bytes=sum(quarantined),
        num_staged=len(staged),
        staged_bytes=sum(staged),
        dedup_ratio=_ratio(reach.entry_bytes, reach.nbytes),
        compression_ratio=_ratio(reach.raw_bytes, reach.coded_bytes),
        seconds_saved=None if saved_ms is None else saved_ms / 1000,
        counters=counters,
        speeds=tuple(_speeds(index.timings(), now)),
    )


@dataclass(slots=True)
class _Reach:
    """The blocks that entries reach, each counted when the first one does."""

    links: dict[BlockHash, Link]
    layouts: dict[BlockHash, Any]
    entry_bytes: int = 0
    nbytes: int = 0
    raw_bytes: int = 0
    coded_bytes: int = 0  # of what has raw bytes
    _totals: dict[BlockHash, int] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Count an entry's blocks."""
        tip, root = (BlockHash(bytes.fromhex(text)) for text in (entry.tip, entry.root))
        new = [self.links[block] for block in self._walk(tip)]
        nbytes = sum(link.nbytes for link in new)
        self.entry_bytes += self._totals.get(tip, 0)
        self.nbytes += nbytes
        token_bytes = _token_bytes(self.layouts.get(root))
        if token_bytes:
            self.raw_bytes += token_bytes * sum(link.num_tokens for link in new)
            self.coded_bytes += nbytes

    def _walk(self, tip: BlockHash) -> list[BlockHash]:
        """Return the blocks of a chain that are new, and note the bytes up to each."""
        new: dict[BlockHash, None] = {}
        # An index may say anything, circles included.
        while tip in self.links and tip not in self._totals and tip not in new:
            new[tip] = None
            tip = self.links[tip].parent
        total = self._totals.get(tip, 0)
        for block in reversed(new):
            total += self.links[block].nbytes
            self._totals[block] = total
        return list(new)


def _is_kept(entry: Entry) -> bool:
    """Whether no save evicts an entry."""
    return entry.name is not None or entry.pinned


def _token_bytes(layout: Any) -> int:
    """Return the bytes that a token adds to a prompt cache; 0 where nobody knows."""
    try:
        return _bytes_of(layout, _MAX_NESTING)
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0


def _bytes_of(layers: Any, nesting: int) -> int:
    if nesting == 0:
        raise ValueError("too many levels")
    total = 0
    for layer in layers:
        if layer["class"] == "CacheList":
            total += _bytes_of(layer["caches"], nesting - 1)
            continue
        for _, heads, dim, dtype, _, end, kind in layer["rows"]:
            if end is None and kind in ("rows", "window"):
                total += int(heads) * int(dim) * ITEM_SIZES[dtype]
    return total


def _speeds(timings: Sequence[Timing], now: float) -> Iterable[ModelSpeeds]:
    """Yield the speeds of each model and codec, what was measured last first."""
    sound = [timing for timing in timings if is_sound(timing)]
    prefills = {t.fingerprint: t for t in sound if t.codec is None}
    loads = [timing for timing in sound if timing.codec is not None]
    restored = {timing.fingerprint for timing in loads}
    pairs: list[tuple[Timing | None, Timing | None]] = [
        (prefills.get(load.fingerprint), load) for load in loads
    ]
    pairs += [(p, None) for p in prefills.values() if p.fingerprint not in restored]
    shown = [
        _describe(Speeds(prefill, load), [t for t in (load, prefill) if t], now)
        for prefill, load in pairs
    ]
    yield from sorted(shown, key=lambda speeds: -speeds.measured_at)


def _describe(speeds: Speeds, known: Sequence[Timing], now: float) -> ModelSpeeds:
    return ModelSpeeds(
        fingerprint=known[0].fingerprint,
        model=next((timing.model for timing in known if timing.model), ""),
        codec=speeds.load.codec if speeds.load else None,
        prefill_tps=speeds.prefill_tps,
        load_tps=speeds.load_tps,
        verdict=speeds.verdict,
        break_even_tokens=speeds.break_even_tokens,
        measured_at=min(timing.measured_at for timing in known),
        is_current=all(is_current(timing, now) for timing in known),
    )


def _ratio(above: int, below: int) -> float:
    return round(above / below, 3) if below else 1.0
