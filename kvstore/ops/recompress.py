"""Exact blocks of an entry, written again with another codec, because a user asks.

That is the one case in which a worse copy replaces a better one. Rows that something
lossy went into stay as they are: none is coded twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..caches.kinds import known_layout
from ..caches.layout import Group, group_layers
from ..caches.stored import decode_piece, stored_pieces
from ..codecs import Codec
from ..format.block import BlockHash, EncodedBlock, Origin, Progress, StoredBlock
from ..format.chain import origin_root
from ..format.entry import RECOMPRESSED, Entry
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from ..storage.index import Place
from ..storage.shards import staged_shard
from .bases import own_codecs
from .commit import receipts_of
from .save import batches, codec_of_rows, encode_block


def recompress_entry(
    blocks: BlockStore,
    catalog: Catalog,
    entry: Entry,
    codec: Codec,
    progress: Progress,
) -> Entry:
    """Write the exact blocks of an entry with another codec, and return the entry.

    Those that another entry has too, which is pinned or signed, stay as they are. At
    every moment each block can be read: its new copy lasts before the old one goes.

    Raises:
        IndexDamagedError: The index does not say what is in the blocks' shards.
        IntegrityError: A part of the entry is missing or damaged.
        OSError: The disk is full or fails; the entry can be loaded as before.
    """
    origin = blocks.origin(entry)
    groups = group_layers(known_layout(origin.layout))
    codec = codec_of_rows(codec, groups)
    # Their shards go, with all that the index does not know of.
    blocks.confirm(only={place.shard for place, _ in blocks.chain(entry)})
    chain = blocks.chain(entry)
    fixed = _fixed_elsewhere(blocks, catalog, entry)
    wanted = [
        (place, stored)
        for place, stored in chain
        if stored.is_exact
        and place.hash not in fixed
        and stored.codec != codec.name
        and place.num_tokens == blocks.folder.block_size  # a tail stays lossless
    ]
    old = {place.hash: place.shard for place, _ in wanted}
    num_tokens = sum(place.num_tokens for place, _ in wanted)
    done = 0
    progress(0, num_tokens)
    for batch in batches(_encoded(blocks, origin, groups, codec, wanted)):
        with staged_shard(blocks.folder, origin, batch) as staged:
            blocks.replace(staged, old)
        done += sum(len(encoded.block.tokens) for encoded in batch)
        progress(done, num_tokens)
    blocks.drop_copies(dict.fromkeys(old.values()))
    codecs = sorted({stored.codec for _, stored in wanted})
    with files.locked(blocks.folder.lock, exclusive=True):
        if not wanted or catalog.find(entry.id) != entry:
            return catalog.find(entry.id)  # it has moved on meanwhile
        return catalog.commit(_described(blocks, entry, codec, codecs))


def _fixed_elsewhere(
    blocks: BlockStore, catalog: Catalog, entry: Entry
) -> set[BlockHash]:
    others = [o for o in catalog.all() if (o.pinned or o.signer) and o.id != entry.id]
    tips = [BlockHash(bytes.fromhex(other.tip)) for other in others]
    return {place.hash for tip in tips for place, _ in blocks.index.chain(tip)}


def _encoded(
    blocks: BlockStore,
    origin: Origin,
    groups: Sequence[Group],
    codec: Codec,
    wanted: Sequence[tuple[Place, StoredBlock]],
) -> Iterator[EncodedBlock]:
    """Yield blocks in another codec, from their exact rows."""
    own, root = own_codecs(blocks.folder), origin_root(origin)
    for place, _ in wanted:
        for stored, data in blocks.read(place.shard, [place], root):
            pieces = [
                (piece, list(decode_piece(found, piece, stored, data)))
                for found, piece in stored_pieces(stored, groups, own)
            ]
            bits = codec.bits
            yield encode_block(stored.block, codec, pieces, bits, stored.num_extras)


def _described(
    blocks: BlockStore, entry: Entry, codec: Codec, codecs: Sequence[str]
) -> Entry:
    """Return an entry that says what its blocks are now, and were before."""
    chain = blocks.chain(entry)
    stored = [block for _, block in chain]
    note = {RECOMPRESSED: ", ".join(codecs)}
    return replace(
        entry,
        codec=codec.name,
        nbytes=sum(place.nbytes for place, _ in chain),
        made_with=entry.made_with | note,
        receipts=receipts_of(blocks, blocks.origin(entry), stored, (entry,)),
        updated_at=time.time(),
        signer="",  # of other bytes
        probe=None,
    )
