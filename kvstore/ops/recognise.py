"""Rows that the store handed out, known again by their bits when they come back.

A restored prompt cache carries a mark of what its rows went through. mlx-lm knows no
marks: merging caches into a batch, or writing them to a file of its own, loses it.
"""

from __future__ import annotations

from dataclasses import replace

from ..caches.snapshot import LiveRows, Snapshot
from ..caches.stored import CODABLE
from ..format.block import Block, ignore_progress
from ..storage.blocks import BlockStore
from .load import Hit, Loader


def mark_restored(blocks: BlockStore, snapshot: Snapshot) -> None:
    """Mark live rows that are, to the bit, those of a worse stored copy.

    What was computed elsewhere has other bits already in the first such block, so only
    that one is decoded.
    """
    chain, rows = snapshot.chain, snapshot.rows
    assert isinstance(rows, LiveRows)
    held = blocks.index.longest_prefix([block.hash for block in chain.blocks])
    worse = [n for n, place in enumerate(held) if place.bits < rows.provenance.bits]
    if not worse:
        return
    block = chain.blocks[worse[0]]
    places = tuple(held[: worse[0] + 1])
    stop = _stop(block)
    hit = Hit(chain.root, chain.layout, places, stop, "whole", "")
    restored, hit = Loader(blocks).restore(hit, ignore_progress)
    if hit.num_tokens < stop:
        return  # damaged, and written anew
    ours, theirs = (
        _bits(rows, block),
        _bits(LiveRows(restored, chain.layout, None), block),
    )
    if not ours or ours != theirs:
        return
    coded = [
        b for b, place in zip(chain.blocks, held, strict=False) if not place.is_lossless
    ]
    rows.provenance = replace(
        rows.provenance,
        coded_tokens=max([rows.provenance.coded_tokens, *map(_stop, coded)]),
        bits=min(place.bits for place in held),
    )


def _stop(block: Block) -> int:
    return block.start + len(block.tokens)


def _bits(rows: LiveRows, block: Block) -> list[bytes]:
    """Return the rows of a block that a lossy codec may code."""
    return [
        array.tobytes()
        for piece, array in rows.read(block)
        if piece.rows.side in CODABLE and piece.kind == "rows"
    ]
