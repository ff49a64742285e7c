"""Rows that the store handed out, known again by their bits when they come back.

A restored prompt cache carries a mark of what its rows went through. mlx-lm knows no
marks: merging caches into a batch, or writing them to a file of its own, loses it. Rows
stay unknown where the store has the worse copy no more, or where they were quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from itertools import chain as joined

from ..caches.fit import Wanted
from ..caches.kinds import holds_codes
from ..caches.snapshot import Chain, LiveRows, Snapshot
from ..caches.stored import CODABLE
from ..codecs.turbo import NUM_SINKS
from ..format.block import Block, ignore_progress
from ..format.chain import digest_fields
from ..storage.blocks import BlockStore
from .load import Hit, Request, find_prefixes, restore


def mark_restored(
    blocks: BlockStore, snapshot: Snapshot, wanted: tuple[Wanted, ...]
) -> None:
    """Mark live rows that are, to the bit, those of a worse stored copy.

    What was computed elsewhere has other bits already in the first such block, so only
    that one is compared.
    """
    chain, rows = snapshot.chain, snapshot.rows
    assert isinstance(rows, LiveRows)
    model = digest_fields(chain.origin.fingerprint)

    def hits(some: Sequence[Block]) -> list[Hit]:
        tokens = joined.from_iterable(block.tokens for block in some)
        # A hit leaves one token to be fed, so there is one more.
        request = Request(
            [*tokens, -1], model, wanted=wanted, from_codes=True, blocks=some
        )
        return find_prefixes(blocks, request)

    def is_other(hit: Hit) -> bool:
        is_worse = bool(hit.places) and hit.places[0].bits < rows.provenance.bits
        return is_worse and not _is_of(blocks, hit, chain, rows)

    # Mostly the very first block tells, and nobody has to look for the others.
    if all(map(is_other, hits(chain.blocks[:1]))):
        return
    for hit in hits(chain.blocks):
        if _is_of(blocks, hit, chain, rows):
            has_codes = holds_codes(hit.layout)
            held = zip(_stops(hit), hit.places, strict=True)
            coded = [n for n, place in held if has_codes or not place.is_lossless]
            rows.provenance = replace(
                rows.provenance,
                coded_tokens=max([rows.provenance.coded_tokens, *coded]),
                bits=min(place.bits for place in hit.places),
            )


def _is_of(blocks: BlockStore, hit: Hit, chain: Chain, rows: LiveRows) -> bool:
    """Whether rows are those of a hit's first block that is worse than they say."""
    bits = rows.provenance.bits
    worse = [n for n, place in enumerate(hit.places) if place.bits < bits]
    if not worse:
        return False
    number, stop = worse[0], _stops(hit)[worse[0]]
    if stop <= NUM_SINKS:
        return False  # codecs store these first rows unchanged: they prove nothing
    part = replace(hit, places=hit.places[: number + 1], num_tokens=stop)
    restored, done = restore(blocks, part, ignore_progress)
    if done.num_tokens < stop:
        return False  # damaged, and written anew
    whole = chain.blocks[number]
    block = replace(whole, tokens=whole.tokens[: stop - whole.start])
    theirs = LiveRows(restored, chain.layout, None)
    pairs = zip(_bits(rows, block), _bits(theirs, block), strict=False)
    is_same = (mine == other for mine, other in pairs)
    return next(is_same, False) and all(is_same)


def _stops(hit: Hit) -> list[int]:
    """Return where each block of a hit stops; the hit may end inside the last."""
    stops = accumulate(place.num_tokens for place in hit.places)
    return [min(stop, hit.num_tokens) for stop in stops]


def _bits(rows: LiveRows, block: Block) -> Iterator[bytes]:
    """Yield the rows of a block that a lossy codec may code."""
    for piece, layers in rows.read(block):
        if piece.rows.side in CODABLE and piece.kind == "rows":
            assert isinstance(layers, list)  # the others are codes
            yield b"".join(layer.tobytes() for layer in layers)
