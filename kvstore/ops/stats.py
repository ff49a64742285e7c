"""Sums over a store: what it holds, what that would take otherwise, what it saved.

From entries and index alone, so that it takes a moment. Knows no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..format.block import BlockHash
from ..format.entry import Entry
from ..format.safetensors import ITEM_SIZES
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.index import HASH_PREFIX, Index, Timing
from .speeds import Speeds, is_sound


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
    # (what was written, before any codec). And ``written_on_`` with the day, UTC, on
    # which shards were written last: bytes, of what was moved too.
    counters: dict[str, int]
    # How far re-anchored rows moved what is said next: the mean KL divergence of
    # ``reanchored_checks`` requests, or ``None``.
    reanchored_kl: float | None
    # How fast each model's rows are computed and restored.
    speeds: tuple[Speeds, ...]


_MAX_NESTING = 8
_MAX_ROUNDS = 32


def sum_up(blocks: BlockStore, entries: Sequence[Entry]) -> Stats:
    """Return sums over a store."""
    folder, index = blocks.folder, blocks.index
    sizes, counters = index.shards(), index.counters()
    layouts = {root: layout for root, _, layout in index.all_roots()}
    reach = _Reach(index)
    kept = [entry for entry in entries if _is_kept(entry)]
    reach.add(kept, layouts)
    kept_bytes = reach.nbytes
    reach.add([entry for entry in entries if not _is_kept(entry)], layouts)
    quarantined, staged = (
        list(files.sizes_in(path).values())
        for path in (folder.quarantine, folder.staging)
    )
    saved_ms = counters.get("saved_ms")
    return Stats(
        num_entries=len(entries),
        num_blocks=reach.num_blocks,
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
        reanchored_kl=_mean_kl(counters),
        speeds=tuple(_speeds(index.timings())),
    )


class _Reach:
    """The blocks that entries reach, each counted when the first one does.

    All blocks at once, in arrays: a store may have millions.
    """

    def __init__(self, index: Index) -> None:
        # Imported here, since a command line that needs none starts faster.
        import numpy as np

        self._np, self._index = np, index
        hashes, parents, num_tokens, nbytes, shards = index.columns()
        nbytes, kept = self._with_headers(nbytes, shards)
        del shards
        self.num_blocks = len(nbytes)
        self.entry_bytes = self.nbytes = 0
        self.raw_bytes = self.coded_bytes = 0  # both of what has raw bytes
        self._hashes = self._numbers(hashes)[kept]
        del hashes
        # One more stands for what a first block hangs from.
        self._parent = np.append(self._find(self._numbers(parents)[kept]), -1)
        self._num_tokens = np.frombuffer(num_tokens, np.int64)[kept]
        self._nbytes = np.append(nbytes, 0)
        self._seen = np.zeros(self.num_blocks + 1, np.bool_)
        self._totals = self._sum_up()

    def add(self, entries: Sequence[Entry], layouts: Mapping[BlockHash, Any]) -> None:
        """Count the blocks of entries."""
        by_root: dict[str, list[bytes]] = {}
        for entry in entries:
            tips = by_root.setdefault(entry.root, [])
            tips.append(self._index.written(bytes.fromhex(entry.tip))[:HASH_PREFIX])
        for root, tips in by_root.items():
            found = self._find(self._numbers(bytearray(b"".join(tips))))
            self.entry_bytes += int(self._totals[found].sum())
            num_tokens, nbytes = self._walk(found)
            self.nbytes += nbytes
            token_bytes = _token_bytes(layouts.get(BlockHash(bytes.fromhex(root))))
            if token_bytes:
                self.raw_bytes += token_bytes * num_tokens
                self.coded_bytes += nbytes

    def _numbers(self, hashes: bytearray) -> Any:
        """Return the beginnings of hashes as numbers that have their order."""
        return self._np.frombuffer(hashes, ">u8").astype(self._np.uint64)

    def _with_headers(self, nbytes: Any, shards: Any) -> tuple[Any, Any]:
        """Return bytes with a share of the header, where the shard is known.

        By its bytes, rounded up; and which those are, as an index of arrays.
        """
        np = self._np
        sizes = self._index.shard_sizes()
        column, held_by = (np.frombuffer(array, np.int64) for array in (nbytes, shards))
        numbers = np.unique(held_by)
        at = np.searchsorted(numbers, held_by)
        whole = np.array([sizes.get(one, -1) for one in numbers.tolist()], np.int64)
        inner = np.bincount(at, column).clip(1, 2**62).astype(np.int64)
        # A shard that went between the two queries has no size now. Where there is no
        # such one, nothing is copied.
        kept = slice(None) if (whole >= 0).all() else whole[at] >= 0
        at = at[kept]
        return -(-column[kept] * whole[at] // inner[at]), kept

    def _find(self, wanted: Any) -> Any:
        """Return where hashes stand, -1 for others."""
        np, among = self._np, self._hashes
        if not len(among):
            return np.full(len(wanted), -1)
        # In their order, which looks at one place of memory after the other.
        order = np.argsort(wanted)
        found = np.searchsorted(among, wanted[order])
        at = np.empty_like(found)
        at[order] = found
        del order, found
        at[at == len(among)] = 0
        at[among[at] != wanted] = -1
        return at

    def _sum_up(self) -> Any:
        totals, before = self._nbytes.copy(), self._parent.copy()
        # Each round doubles how far back it looks. An index may say anything, circles
        # included, which would go on for ever.
        for _ in range(_MAX_ROUNDS):
            if (before == -1).all():
                break
            totals += totals.take(before)
            before = before.take(before)
        return totals

    def _walk(self, tips: Any) -> tuple[int, int]:
        """Return tokens and bytes of the blocks of some chains that are new."""
        np = self._np
        num_tokens = nbytes = 0
        while len(tips):
            tips = np.unique(tips[(tips >= 0) & ~self._seen[tips]])
            self._seen[tips] = True
            num_tokens += int(self._num_tokens[tips].sum())
            nbytes += int(self._nbytes[tips].sum())
            tips = self._parent[tips]
        return num_tokens, nbytes


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


def _speeds(timings: Sequence[Timing]) -> list[Speeds]:
    """Return the speeds of each model and codec, what was measured last first."""
    sound = [timing for timing in timings if is_sound(timing)]
    prefills = {t.fingerprint: t for t in sound if t.codec is None}
    loads = [timing for timing in sound if timing.codec is not None]
    restored = {timing.fingerprint for timing in loads}
    pairs: list[tuple[Timing | None, Timing | None]] = [
        (prefills.get(load.fingerprint), load) for load in loads
    ]
    pairs += [(p, None) for p in prefills.values() if p.fingerprint not in restored]
    known = [Speeds(*pair) for pair in pairs]
    return sorted(known, key=lambda speeds: -speeds.measured_at)


def _mean_kl(counters: Mapping[str, int]) -> float | None:
    checks = counters.get("reanchored_checks", 0)
    return counters.get("reanchored_kl_e9", 0) / 1e9 / checks if checks else None


def _ratio(above: int, below: int) -> float:
    return round(above / below, 3) if below else 1.0
