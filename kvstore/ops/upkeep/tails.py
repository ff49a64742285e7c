"""Tails that no entry has any more since their conversations went on, freed at once.

A tail is the last block of an entry, shorter than the others. What goes on from there
stores the same rows again, so that each turn of a chat leaves one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from ...errors import FormatError, IntegrityError
from ...format.block import BlockHash
from ...storage import files
from ...storage.blocks import BlockStore
from ...storage.entries import Catalog, list_ids


def free_tails(blocks: BlockStore, catalog: Catalog, tips: Iterable[BlockHash]) -> None:
    """Free those of some blocks that are tails and that no entry has.

    There is no grace period as in :mod:`~kvstore.ops.upkeep.prune`: a save elsewhere
    that counts on such a tail looks for it when it commits, under the same lock, and
    writes it again. Tails with windows or states stay, since only from these can a
    chat go back to where they end.
    """
    found = {tip: shard for tip in tips for shard in _shard_of_tail(blocks, tip)}
    dead = found.keys() - _needed(blocks, catalog)
    for shard in {found[tip] for tip in dead}:
        places = blocks.index.places_in(shard)
        kept = [place for place in places if place.hash not in dead]
        # Few bytes in a large shard are not worth rewriting it.
        if kept and sum(p.nbytes for p in kept) < 0.75 * sum(p.nbytes for p in places):
            blocks.repack(shard, {place.hash for place in kept})
    with files.locked(blocks.folder.lock, exclusive=True):
        # The second look: a save may have committed one meanwhile.
        dead -= _needed(blocks, catalog)
        left = {found[tip]: blocks.index.places_in(found[tip]) for tip in dead}
        blocks.drop_shards(
            {s: ps for s, ps in left.items() if all(p.hash in dead for p in ps)}
        )


def _shard_of_tail(blocks: BlockStore, tip: BlockHash) -> Iterator[str]:
    """Yield where a block lies, if it is a tail whose rows the next one has too."""
    place = blocks.index.place(tip)
    if place is None or place.num_extras or blocks.index.has_children(tip):
        return
    with suppress(IntegrityError, FormatError):
        # By its header, for the index may lie.
        if len(blocks.stored(place).block.tokens) < blocks.folder.block_size:
            yield place.shard


def _needed(blocks: BlockStore, catalog: Catalog) -> set[BlockHash]:
    """Return the last block of each entry.

    Raises:
        IntegrityError: One cannot be read, and may have any.
    """
    entries = catalog.all()
    if len(entries) < len(list_ids(blocks.folder)):
        raise IntegrityError(
            "an entry cannot be read", hint="`kvstore verify` names it"
        )
    return {BlockHash(bytes.fromhex(entry.tip)) for entry in entries}
