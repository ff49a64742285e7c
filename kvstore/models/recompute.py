"""Stored rows against what the model computes anew, for blocks drawn at random.

Digests show that rows are those that were written, and a signature who wrote them. Only
the model shows that they are its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..caches import live as caches
from ..caches.layout import group_layers
from ..errors import KVStoreError
from ..format.block import STATE_EXTRAS, BlockHash, Progress, StoredBlock
from ..format.entry import Entry
from ..ops.upkeep.check import Finding
from ..storage.index import Place
from ..storage.shards import shard_path
from ..store import Store
from .load import LoadedModel
from .session import make_empty_cache, prefill

Drawn = tuple[Place, StoredBlock]
# A row alone may differ by so many times as much as all of them together.
_ROW_SLACK = 3.0
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came out for one block."""

    # Name or id of an entry that has it.
    entry: str
    # Hash of the block in hex, and the shard that it lies in.
    block: str
    shard: str
    # Position of its first token.
    start: int
    # Of the layer that differs most: the size of the difference against that of what
    # the model computes.
    error: float
    # What it may be.
    limit: float
    # It has a state of recurrent layers in the middle of the entry, which was not
    # compared: only that at the end comes with the entry.
    has_unseen_state: bool = False

    @property
    def is_right(self) -> bool:
        """Whether the rows are such as the model computes."""
        return self.error <= self.limit

    @property
    def finding(self) -> Finding:
        """What `verify` says where they are not."""
        detail = (
            f"block {self.block[:12]}, tokens {self.start:,} on, differs by"
            f" {self.error:.0%} from what the model computes"
        )
        path = str(shard_path(Path("shards"), self.shard))
        return Finding("foreign-rows", path, detail, (self.entry,))


def recompute(
    store: Store, model: LoadedModel, num_blocks: int, *, progress: Progress
) -> list[Recomputed]:
    """Compute the rows of some blocks of a model anew, and compare.

    Whatever is stored was computed in other steps, on another machine perhaps, and may
    be coded, so it differs a little. Rows of other tokens, or of another model, differ
    by as much as they are large; smaller lies in coded rows are not told from the loss.
    ``num_blocks`` are drawn, of those that the model has there; ``progress`` is called
    with (tokens computed, tokens to compute).

    Raises:
        IntegrityError: A block that was drawn is missing or damaged.
        KVStoreError: The store has nothing of this model.
    """
    entries = [entry for entry, is_like in _entries(store, model) if is_like]
    if not entries:
        raise KVStoreError(
            "the store has no entry that this model made",
            hint="`kvstore ls` says which models made what is there",
        )
    drawn = _draw(store, entries, num_blocks)
    total = sum(_end(blocks[-1]) for _, blocks in drawn)
    found: list[Recomputed] = []
    done = 0
    for entry, blocks in drawn:
        # One prefill serves all blocks of an entry that were drawn.
        num_tokens = _end(blocks[-1])
        stored, tokens = store.load_entry(entry.id, None)
        computed = make_empty_cache(model)
        for part, cache in model.parts(computed):
            prefill(part, tokens[:num_tokens], cache)
        done += num_tokens
        progress(done, total)
        found += _compare(entry, blocks, stored, computed)
    return found


def count_quantized(store: Store, model: LoadedModel) -> int:
    """Return how many entries of a model are never compared: their rows are codes."""
    return sum(not is_like for _, is_like in _entries(store, model))


def _entries(store: Store, model: LoadedModel) -> Iterator[tuple[Entry, bool]]:
    """Yield the entries of a model, and whether they hold what it computes."""
    empty = make_empty_cache(model)
    for entry in store.entries():
        if store.fingerprint_of(entry.id).digest == model.fingerprint.digest:
            yield entry, store.is_like(entry.id, empty)


def _draw(
    store: Store, entries: Sequence[Entry], num_blocks: int
) -> list[tuple[Entry, list[Drawn]]]:
    known: dict[BlockHash, tuple[Entry, Drawn]] = {}
    for entry in entries:
        for drawn in store.chain(entry.id):
            known.setdefault(drawn[0].hash, (entry, drawn))
    chosen = random.sample(list(known.values()), min(num_blocks, len(known)))
    held: dict[str, tuple[Entry, list[Drawn]]] = {}
    for entry, drawn in chosen:
        held.setdefault(entry.id, (entry, []))[1].append(drawn)
    return [(entry, sorted(blocks, key=_end)) for entry, blocks in held.values()]


def _end(drawn: Drawn) -> int:
    return drawn[1].block.start + len(drawn[1].block.tokens)


def _compare(
    entry: Entry, blocks: Sequence[Drawn], stored: list[Any], computed: list[Any]
) -> Iterator[Recomputed]:
    num_rows = _end(blocks[-1])
    layout = caches.read_layout(computed, num_rows)
    mine, theirs = caches.hold(computed), caches.hold(stored)
    for drawn in blocks:
        place, block = drawn[0], drawn[1].block
        start, stop = block.start, _end(drawn)
        is_last = stop == entry.num_tokens
        kinds = ("rows", "window", "state") if is_last else ("rows", "window")
        errors = [
            # A state is one row, and not that of a token.
            _error(theirs[layer][spec], mine[layer][spec], *rows)
            for group in group_layers(layout)
            for layer in group.layers
            for spec in mine[layer].keys() & theirs[layer].keys()
            if (kind := group.spec(spec).kind) in kinds
            for rows in [(0, 1) if kind == "state" else (start, stop)]
        ]
        yield Recomputed(
            entry.name or entry.id,
            block.hash.hex(),
            place.shard,
            start,
            max(errors, default=0.0),
            # Rounding; or what a codec loses, too, on the way to there as well.
            0.1 if place.is_exact else 0.75,
            place.num_extras >= STATE_EXTRAS and not is_last,
        )


def _error(
    left: tuple[mx.array, int], right: tuple[mx.array, int], start: int, stop: int
) -> float:
    """Return how far rows are from others, against the size of these."""
    begin = max(start, left[1], right[1])
    rows, wanted = (
        array[:, :, begin - first : stop - first].astype(mx.float32)
        for array, first in (left, right)
    )
    if right[0].dtype not in _FLOATS or not wanted.size or rows.shape != wanted.shape:
        return 0.0
    sizes = mx.linalg.norm(wanted, axis=-1).square().sum(axis=(0, 1))  # of each row
    errors = mx.linalg.norm(rows - wanted, axis=-1).square().sum(axis=(0, 1))
    mean = mx.maximum(sizes.mean(), 1e-18)
    # One foreign row among hundreds is no rounding, though all of them differ little.
    worst = (errors / mx.maximum(sizes, mean)).max() / _ROW_SLACK**2
    error = float(mx.maximum(errors.mean() / mean, worst).sqrt())
    # A NaN is neither smaller nor larger than what other layers differ by.
    return math.inf if math.isnan(error) else error
