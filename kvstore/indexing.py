"""What the index is told of a shard: all of it from the shard's own header."""

from __future__ import annotations

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
        index.add_block(stored.block, _place(name, stored))


def _place(shard: str, stored: StoredBlock) -> Place:
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
    for name in shards.list_shards(folder.shards):
        try:
            with shards.open_shard(folder.shards, name) as opened:
                header = opened.header
            added_at = shards.shard_path(folder.shards, name).stat().st_mtime
        except (IntegrityError, FormatError, FileNotFoundError):
            continue  # it stays where it is, and `verify` reports it
        with index.transaction():
            index_shard(index, name, header, added_at)
