"""Explain a lookup: how far any model stored these tokens, and what blocks the rest.

`ops.load` asks how far rows can be restored. This asks how far the tokens are stored,
for any model and any kind of cache, and which stored prompt is most like another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..caches.kinds import known_layout
from ..errors import FormatError, IntegrityError
from ..fingerprint import Fingerprint
from ..format.block import Block, BlockHash, StoredBlock
from ..format.chain import common_run, hash_block_tokens, hash_root, split_tokens
from ..format.entry import Entry
from ..storage.blocks import BlockStore
from ..storage.index import Link, Place
from .load import (
    Child,
    Hit,
    Match,
    Request,
    children,
    find_prefix,
    to_match,
    why_unusable,
)

# The latest; each costs its shards' headers.
_MAX_ENTRIES = 64


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves what is stored."""

    # Of the first token that differs.
    position: int
    # Position of the first token of ``stored`` and ``given``.
    start: int
    # Stored tokens around it.
    stored: tuple[int, ...]
    # The prompt's tokens around it.
    given: tuple[int, ...]
    # Name or id of an entry that goes on with the stored ones, if one does.
    entry: str | None


@dataclass(frozen=True, slots=True)
class OtherModel:
    """What another model, or another kind of cache, has stored of a prompt."""

    # How many tokens from the start on it has of the prompt.
    num_tokens: int
    # The first field that differs, with both values.
    difference: str
    # What that model was called, or empty.
    model: str
    # Name or id of an entry that holds these tokens, if one does.
    entry: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the store holds of a prompt what it holds."""

    # What ``load`` would restore.
    match: Match
    # So many leading tokens are stored for this model and this kind of cache,
    # restorable up to there or not.
    num_common: int
    # Where the prompt leaves them, unless they just end.
    divergence: Divergence | None
    # Name or id of an entry that has these tokens, if one does.
    entry: str | None
    # What has more of the prompt, and cannot be used.
    other: OtherModel | None
    # Which block is damaged or missing, one sentence, or ``None``.
    damage: str | None


WINDOW = 12
"""Tokens shown on each side of a divergence."""


@dataclass(frozen=True, slots=True)
class _Trace:
    """How far a prompt's tokens are stored under one root."""

    # The root.
    root: BlockHash
    # Digest of the model's fingerprint.
    fingerprint: str
    # JSON value that describes the layers.
    layout: Any
    # The prompt's full blocks by hash, stored or not.
    blocks: dict[BlockHash, Block]
    # Where the leading ones lie.
    places: tuple[Place, ...]
    # Tokens that are stored, those of a part of a block included.
    num_common: int
    # The block behind the full ones that has most of the prompt, if any has.
    child: Child | None

    @property
    def tip(self) -> BlockHash:
        """Hash of the last full block, or the root."""
        return self.places[-1].hash if self.places else self.root

    @property
    def place(self) -> Place | None:
        """Where the last block lies that has tokens of the prompt."""
        if self.child is not None:
            return self.child[1]
        return self.places[-1] if self.places else None


def _find_damage(blocks: BlockStore, request: Request) -> str | None:
    """Return which of the blocks that would be restored is damaged, if one is.

    Their headers are read; what is damaged is dropped from the index, as a load
    would.
    """
    hit = find_prefix(blocks, request)
    for place in hit.places if isinstance(hit, Hit) else ():
        try:
            blocks.stored(place)
        except (IntegrityError, FormatError) as error:
            return f"block {place.hash.hex()[:12]}: {error}"
    return None


def explain(
    blocks: BlockStore,
    entries: Sequence[Entry],
    request: Request,
    given: Fingerprint,
) -> Explanation:
    """Return what would be restored of a prompt, and what is stored beside it."""
    # First: what is damaged leaves the index, and so does not count as held.
    damage = _find_damage(blocks, request)
    match = to_match(find_prefix(blocks, request), len(request.tokens))
    traces = list(_traces(blocks, request))
    holders = _Holders(entries, blocks.index.links())
    mine = [trace for trace in traces if _is_usable(trace, request)]
    best = max(mine, key=_num_common, default=None)
    return Explanation(
        match=match,
        num_common=best.num_common if best else 0,
        divergence=(
            _divergence(blocks, best, request, match, holders) if best else None
        ),
        entry=_label(_holder(best, holders)) if best else None,
        other=_other(blocks, traces, mine, request, given, holders),
        damage=damage or _find_gap(blocks, mine, request, holders),
    )


def _traces(blocks: BlockStore, request: Request) -> Iterator[_Trace]:
    size = blocks.folder.block_size
    for root, fingerprint, layout in blocks.index.all_roots():
        if hash_root(fingerprint, layout) != root:
            continue  # a damaged row of the index
        full = {
            block.hash: block
            for block in split_tokens(root, request.tokens, size)
            if len(block.tokens) == size
        }
        places = tuple(blocks.index.longest_prefix(list(full)))
        tip = places[-1].hash if places else root
        done = len(places) * size
        behind = children(blocks, tip, request.tokens[done:])
        # One that goes on says more than one that ends there.
        child = max(behind, key=_run_and_length, default=None)
        done += child[0] if child else 0
        yield _Trace(root, fingerprint, layout, full, places, done, child)


def _is_usable(trace: _Trace, request: Request) -> bool:
    is_of_model = trace.fingerprint == request.fingerprint
    return is_of_model and _kind_difference(trace, request) is None


def _other(
    blocks: BlockStore,
    traces: Sequence[_Trace],
    mine: Sequence[_Trace],
    request: Request,
    given: Fingerprint,
    holders: _Holders,
) -> OtherModel | None:
    """Return what has more of a prompt than what can be used, if anything has."""
    others = [trace for trace in traces if trace not in mine]
    latest = {trace.root: holders.latest(trace.root) for trace in others}

    def rank(trace: _Trace) -> tuple[int, float]:
        entry = latest[trace.root]
        return trace.num_common, entry.updated_at if entry else 0.0

    other = max(others, key=rank, default=None)
    if other is None:
        return None
    is_there = any(blocks.index.has_children(trace.root) for trace in mine)
    if is_there and other.num_common <= max(map(_num_common, mine)):
        return None
    holder = _holder(other, holders) if other.place else latest[other.root]
    if holder is None and other.place is None:
        return None  # pruned: only the root is left
    difference = (
        _kind_difference(other, request)
        if other.fingerprint == request.fingerprint
        else _model_difference(blocks, other, given)
    )
    return OtherModel(
        other.num_common,
        difference or "",
        holder.model if holder else "",
        _label(holder),
    )


def _model_difference(blocks: BlockStore, trace: _Trace, given: Fingerprint) -> str:
    """Return the first field in which two fingerprints differ, with both values."""
    place = trace.place or next(iter(blocks.index.followers(trace.root)), None)
    try:
        fields = blocks.origin_at(place).fingerprint if place else None
    except (IntegrityError, FormatError):
        fields = None
    found = Fingerprint(fields).difference(given) if fields else None
    return found or (
        f"fingerprint: stored {trace.fingerprint[:12]}…, given {given.digest[:12]}…"
    )


def _divergence(
    blocks: BlockStore, trace: _Trace, request: Request, match: Match, holders: _Holders
) -> Divergence | None:
    """Return where a prompt leaves what is stored; ``None`` where that ends."""
    at = trace.num_common
    if match.reason == "whole" or at >= len(request.tokens):
        return None
    owners = holders.of(trace.root)
    stored, run = _other_side(blocks, trace, owners)
    if stored is None:
        return None
    owner = owners.get(stored.block.hash)
    behind = _behind(blocks, holders.chain(owner), stored) if owner else iter(())
    after = [*stored.block.tokens[run:], *islice(behind, WINDOW)]
    start = max(0, at - WINDOW)
    return Divergence(
        position=at,
        start=start,
        stored=(*request.tokens[start:at], *after[:WINDOW]),
        given=tuple(request.tokens[start : at + WINDOW]),
        entry=_label(owner),
    )


def _other_side(
    blocks: BlockStore, trace: _Trace, owners: Mapping[BlockHash, Entry]
) -> tuple[StoredBlock | None, int]:
    """Return a block that goes on otherwise than a prompt, and after how many."""
    if trace.child is not None:
        run, _, stored = trace.child
        return (stored, run) if run < len(stored.block.tokens) else (None, run)
    found = blocks.index.followers(trace.tip)
    for place in sorted(found, key=lambda place: place.hash not in owners):
        try:
            return blocks.stored(place), 0
        except (IntegrityError, FormatError):
            continue
    return None, 0


def _behind(
    blocks: BlockStore, chain: Sequence[BlockHash], stored: StoredBlock
) -> Iterator[int]:
    """Yield the tokens of a chain behind one of its blocks."""
    for block in chain[chain.index(stored.block.hash) + 1 :]:
        place = blocks.index.place(block)
        if place is None:
            return
        try:
            yield from blocks.stored(place).block.tokens
        except (IntegrityError, FormatError):
            return


def _find_gap(
    blocks: BlockStore, traces: Sequence[_Trace], request: Request, holders: _Holders
) -> str | None:
    """Return which block of the prompt an entry needs and the index lacks."""
    for trace in traces:
        for entry in holders.entries(trace.root):
            block = _lost(blocks, entry, trace, request, holders)
            if block is not None:
                stop = block.start + len(block.tokens)
                return (
                    f"block {block.hash.hex()[:12]} of `{_label(entry)}`, tokens"
                    f" {block.start:,} to {stop - 1:,}, is damaged or missing"
                )
    return None


def _lost(
    blocks: BlockStore, entry: Entry, trace: _Trace, request: Request, holders: _Holders
) -> Block | None:
    """Return the last block of an entry that is lost, if the prompt has it too."""
    lost = holders.lost(entry)
    if lost is None or lost in trace.blocks:
        return trace.blocks[lost] if lost else None
    size = blocks.folder.block_size
    start = (entry.num_tokens - 1) // size * size
    tokens = tuple(request.tokens[start : entry.num_tokens])
    before = [b.hash for b in trace.blocks.values() if b.start < start]
    parent = before[-1] if before else trace.root
    is_tail = hash_block_tokens(parent, tokens) == lost
    return Block(lost, parent, start, tokens) if is_tail else None


class _Holders:
    """Which of some entries, latest first, hold which blocks."""

    def __init__(
        self, entries: Sequence[Entry], links: Mapping[BlockHash, Link]
    ) -> None:
        self._entries = entries
        self._links = links

    def entries(self, root: BlockHash) -> list[Entry]:
        """Return the entries under a root, latest first."""
        return [entry for entry in self._entries if entry.root == root.hex()]

    def latest(self, root: BlockHash) -> Entry | None:
        """Return the latest entry under a root."""
        return next(iter(self.entries(root)), None)

    def of(self, root: BlockHash) -> dict[BlockHash, Entry]:
        """Return the latest entry that needs each block under a root."""
        owners: dict[BlockHash, Entry] = {}
        for entry in self.entries(root):
            for block in self._backwards(entry):
                if block in owners:
                    break  # and so are all before it
                owners[block] = entry
        return owners

    def chain(self, entry: Entry) -> list[BlockHash]:
        """Return the blocks of an entry, first to last, those behind the last gap."""
        return list(self._backwards(entry))[::-1]

    def lost(self, entry: Entry) -> BlockHash | None:
        """Return the last block of an entry that the index lacks."""
        chain = self.chain(entry)
        tip = BlockHash(bytes.fromhex(entry.tip))
        missing = self._links[chain[0]].parent if chain else tip
        return None if missing.hex() == entry.root else missing

    def _backwards(self, entry: Entry) -> Iterator[BlockHash]:
        block = BlockHash(bytes.fromhex(entry.tip))
        # An index may say anything, circles included.
        for _ in range(entry.num_tokens):
            if block not in self._links:
                return
            yield block
            block = self._links[block].parent


def _num_common(trace: _Trace) -> int:
    return trace.num_common


def _run_and_length(child: Child) -> tuple[int, int]:
    run, _, stored = child
    return run, len(stored.block.tokens)


def _holder(trace: _Trace, holders: _Holders) -> Entry | None:
    """Return an entry that has the last block with tokens of the prompt."""
    return holders.of(trace.root).get(trace.place.hash) if trace.place else None


def _label(entry: Entry | None) -> str | None:
    return (entry.name or entry.id) if entry else None


def _kind_difference(trace: _Trace, request: Request) -> str | None:
    """Return why rows of the model that is asked for cannot be used, or ``None``."""
    try:
        layout = known_layout(trace.layout)
    except IntegrityError as error:
        return f"layers: {error}"
    return why_unusable(layout, request)


def find_nearest(
    blocks: BlockStore, entries: Sequence[Entry], tokens: list[int], fingerprint: str
) -> tuple[Entry, list[int]] | None:
    """Return the entry of a model that has most of a prompt's tokens, and its own."""
    wanted = Counter(tokens)

    def likeness(pair: tuple[Entry, list[int]]) -> tuple[int, int]:
        return (Counter(pair[1]) & wanted).total(), common_run(pair[1], tokens)

    return max(latest(blocks, entries, fingerprint), key=likeness, default=None)


def latest(
    blocks: BlockStore, entries: Sequence[Entry], fingerprint: str
) -> Iterator[tuple[Entry, list[int]]]:
    """Yield the latest entries of a model with their tokens, but damaged ones."""
    roots = {root.hex() for root, _ in blocks.index.roots(fingerprint)}
    for entry in [entry for entry in entries if entry.root in roots][:_MAX_ENTRIES]:
        if (found := _tokens(blocks, entry)) is not None:
            yield entry, found


def _tokens(blocks: BlockStore, entry: Entry) -> list[int] | None:
    try:
        chain = blocks.chain(entry)
    except (IntegrityError, FormatError):
        return None  # which `verify` reports
    return [token for _, stored in chain for token in stored.block.tokens]
