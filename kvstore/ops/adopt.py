"""An entry of one model, taken over for another one: its blocks under new hashes.

Nothing shows that two models compute the same rows, so somebody vouches for it, and the
entry says so for as long as it lives. Bytes are copied, never decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from ..caches.kinds import known_layout
from ..caches.layout import group_layers
from ..caches.snapshot import Chain
from ..errors import FingerprintError, IntegrityError
from ..fingerprint import Fingerprint
from ..format.block import BlockHash, EncodedBlock, Origin
from ..format.chain import is_reanchored, origin_root, split_tokens
from ..format.entry import ADOPTED, MAX_LABEL, Entry
from ..format.shard import as_written
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from ..storage.folder import StoreFolder
from ..storage.index import Place
from ..storage.shards import staged_shard
from .commit import commit, make_room, replaceable
from .save import batches


def adopt_entry(
    blocks: BlockStore, catalog: Catalog, entry: Entry, given: Fingerprint
) -> Entry:
    """Copy an entry's blocks for another model, give its name to them, and return it.

    Raises:
        FingerprintError: It is of that model already.
        IntegrityError: A part of it is missing or damaged.
        OSError: The disk is full or fails.
    """
    origin = blocks.origin(entry)
    stored = Fingerprint(origin.fingerprint)
    if is_reanchored(stored.fields):
        given = given.reanchored  # no model computes these rows of these tokens
    if stored == given:
        raise FingerprintError(
            f"`{entry.name or entry.id}` is of this model already",
            hint="nothing needs to be done",
        )
    held = blocks.chain(entry)
    tokens = [token for _, block in held for token in block.block.tokens]
    chain = _chain(tokens, Origin(given.fields, origin.layout), blocks.folder)
    places = [place for place, _ in held]
    needed = chain.hashes.union(place.hash for place in places)
    token_bytes = sum(group.token_bytes for group in group_layers(chain.layout))
    for batch in batches(_copies(blocks, places, origin_root(origin), chain)):
        with staged_shard(blocks.folder, chain.origin, batch) as staged:
            make_room(blocks, staged.header.nbytes, lambda: needed)
            with blocks.index.transaction():
                blocks.add_new([staged], token_bytes)
    blocks.add_root(chain.root, chain.origin)
    label = given.label[:MAX_LABEL]
    note = {ADOPTED: f"{entry.model}, fingerprint {stored.digest[:12]}"}
    with files.locked(blocks.folder.lock, exclusive=True):
        adopted = commit(
            blocks,
            catalog,
            chain,
            replaceable(catalog, entry.name, chain, entry),
            name=entry.name,
            codec=entry.codec,
            model=label,
            described=replace(
                entry, model=label, made_with=entry.made_with | note, signer=""
            ),
        )
    if adopted is None:
        raise IntegrityError(
            "blocks vanish from the store while they are taken over", hint="try again"
        )
    return adopted


def _chain(tokens: Sequence[int], origin: Origin, folder: StoreFolder) -> Chain:
    root = origin_root(origin)
    split = tuple(split_tokens(root, tokens, folder.block_size))
    return Chain(root, known_layout(origin.layout), origin, split)


def _copies(
    blocks: BlockStore, places: Sequence[Place], root: BlockHash, chain: Chain
) -> Iterator[EncodedBlock]:
    """Yield stored blocks as those of a chain, but what the store has of it."""
    new = iter(chain.blocks)
    for shard, run in groupby(places, key=lambda place: place.shard):
        for stored, data in blocks.read(shard, list(run), root):
            block = next(new)
            if blocks.index.place_of(block) is None:
                yield replace(as_written(stored, data), block=block)
