"""What the index is told of a shard: all of it from the shard's own header."""

from __future__ import annotations

from collections.abc import Iterator

from . import shards
from .errors import FormatError, IntegrityError
from .fingerprint import Fingerprint
from .folder import StoreFolder
from .hashing import hash_block_tokens, hash_root
from .index import Index
from .types import BlockHash, Place, ShardHeader, StoredBlock


def header_root(header: ShardHeader) -> BlockHash:
    """Return the root hash that all blocks of a shard descend from."""
    origin = header.origin
    fingerprint = Fingerprint(origin.fingerprint).digest
    return hash_root(fingerprint, origin.layout, origin.tenant)


def is_sound(stored: StoredBlock) -> bool:
    """Say whether a block's hash is that of its parent and tokens."""
    block = stored.block
    return hash_block_tokens(block.parent, block.tokens) == block.hash


def index_shard(index: Index, name: str, header: ShardHeader, added_at: float) -> None:
    """Tell the index what lies in a shard, and since when, in Unix seconds."""
    origin = header.origin
    fingerprint = Fingerprint(origin.fingerprint).digest
    root = header_root(header)
    index.add_root(root, fingerprint, origin.tenant, origin.layout)
    index.add_shard(name, header.nbytes, added_at)
    for stored in filter(is_sound, header.blocks):
        index.add_block(stored.block, place_in(name, stored))


def place_in(shard: str, stored: StoredBlock) -> Place:
    """Return the place of a block in a shard."""
    return Place(
        stored.block.hash,
        shard,
        len(stored.block.tokens),
        stored.end - stored.begin,
        stored.is_lossless,
        stored.is_exact,
        stored.num_extras,
    )


def index_folder(index: Index, folder: StoreFolder) -> None:
    """Tell the index of every shard in the store that can be read."""
    for _ in _index_each(index, folder):
        pass


def confirm_folder(index: Index, folder: StoreFolder) -> None:
    """Tell the index of every shard, and compare what it then says with all of them.

    Whoever removes shards by the index's word does this first. Copies that were found
    damaged need not be known.

    Raises:
        IntegrityError: The index says something else, so it is damaged.
    """
    copies: dict[BlockHash, list[tuple[Place, BlockHash]]] = {}
    for name, header in _index_each(index, folder):
        for stored in filter(is_sound, header.blocks):
            copy = (place_in(name, stored), stored.block.parent)
            copies.setdefault(stored.block.hash, []).append(copy)
    for block, known in copies.items():
        found = next(index.chain(block), None)
        # Gone with their shards, which another process has pruned, or set aside.
        left = [p for p, _ in known if not index.is_damaged(block, p.shard)]
        if found is None and not any(_is_there(folder, place) for place in left):
            continue
        if found not in known and not _is_so(folder, found):
            raise IntegrityError(
                f"the index is damaged: block {block.hex()[:12]} is not where it says",
                path=folder.index,
            )


def _is_there(folder: StoreFolder, place: Place) -> bool:
    return shards.shard_path(folder.shards, place.shard).exists()


def _is_so(folder: StoreFolder, found: tuple[Place, BlockHash] | None) -> bool:
    """Say whether a place is right after all: others save and prune meanwhile."""
    if found is None:
        return False
    place, parent = found
    try:
        with shards.open_shard(folder.shards, place.shard) as opened:
            return (place, parent) in [
                (place_in(place.shard, stored), stored.block.parent)
                for stored in opened.header.blocks
            ]
    except (IntegrityError, FormatError, FileNotFoundError, ValueError):
        return False


def _index_each(index: Index, folder: StoreFolder) -> Iterator[tuple[str, ShardHeader]]:
    """Tell the index of one shard after the other, and yield name and header."""
    for name in shards.list_shards(folder.shards):
        try:
            with shards.open_shard(folder.shards, name) as opened:
                header = opened.header
            added_at = shards.shard_path(folder.shards, name).stat().st_mtime
        except (IntegrityError, FormatError, FileNotFoundError):
            continue  # it stays where it is, and `verify` reports it
        with index.transaction():
            index_shard(index, name, header, added_at)
        yield name, header
