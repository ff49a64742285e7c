"""What comes from elsewhere into a store: checked, then published; all or nothing.

Blocks are checked by the functions that load them, so what passes can be loaded. What
the store has already stays as it is: rows that it computed are never replaced by rows
from elsewhere.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from ...caches.fit import wanted_of, why_foreign
from ...caches.kinds import known_layout
from ...caches.layout import group_layers
from ...caches.restore import check_layout
from ...caches.snapshot import Chain
from ...caches.stored import (
    Piece,
    count_extras,
    is_restorable,
    open_piece,
    stored_pieces,
)
from ...codecs import MLX_DTYPES, Codec, CodecFamily, find_codec
from ...errors import IntegrityError, KVStoreError
from ...format.block import Block, BlockHash, Origin, StoredBlock
from ...format.chain import digest_fields
from ...format.entry import Entry
from ...storage import files
from ...storage.blocks import BlockStore, is_sound
from ...storage.entries import Catalog
from ...storage.folder import StoreFolder
from ...storage.shards import OpenShard, StagedShard, open_shard_at, staged_copy
from ..commit import commit, make_room, replaceable

# Decoded, since a frame of a few bytes can stand for gigabytes. A block of 256 tokens
# takes 1.3 GB with 61 layers of 128 heads of 192 and 128 coordinates in 16 bits, more
# than which no model has that mlx-lm runs; and what an entry holds has to fit into a
# machine's memory at once.
_MAX_BLOCK_BYTES = 2 * 1024**3
_MAX_ENTRY_BYTES = 512 * 1024**3
# How often it is tried again where the store has changed meanwhile.
_TRIES = 3


Held = dict[BlockHash, StoredBlock]
"""The blocks that a store has, as its own shards describe them."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """An entry from elsewhere that is staged in a store and not yet visible."""

    # The entry, as it came.
    entry: Entry
    chain: Chain
    # The blocks as they came, or as the store has them.
    blocks: tuple[StoredBlock, ...]
    # Shards of blocks that came, not yet synced.
    shards: tuple[StagedShard, ...]


def check_space(folder: StoreFolder, nbytes: int) -> None:
    """Refuse what the disk has no room for, before it is written.

    Raises:
        OSError: The disk is too full.
    """
    disk = os.statvfs(folder.staging)
    if nbytes > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path))


class Inspector:
    """Follows the blocks of an entry from elsewhere, first to last.

    Args:
        entry: The entry, as it came.
        origin: What its shards say that computed them.
        block_size: Tokens in a full block.
        own: The codecs that the store alone has.
        like: The prompt cache of the model that it must be of, empty.

    Attributes:
        blocks: Those that were found good.
        num_tokens: How many tokens they have.
        nbytes: How many bytes they have.

    Raises:
        CodecError: There is no such codec.
        IntegrityError: The layout cannot be that of a prompt cache, or of this one.
    """

    def __init__(
        self,
        entry: Entry,
        origin: Origin,
        block_size: int,
        own: CodecFamily,
        like: Sequence[Any] | None = None,
    ) -> None:
        self._own = own
        self._entry, self._origin, self._block_size = entry, origin, block_size
        self._layout = known_layout(origin.layout)
        if like is not None and (why := why_foreign(self._layout, wanted_of(like))):
            raise IntegrityError(f"its rows are not of this model: {why}")
        # Before anything is allocated or written for it.
        check_layout(self._layout, entry.num_tokens)
        find_codec(entry.codec, own)
        self._groups = group_layers(self._layout)
        self._root = BlockHash(bytes.fromhex(self._entry.root))
        self._tip = self._root
        self.blocks: list[StoredBlock] = []
        self.num_tokens = 0
        self.nbytes = 0
        self._decoded_bytes = 0

    def inspect(self, stored: StoredBlock, opened: OpenShard) -> None:
        """Check a block as far as loading it would, and take it as the next one.

        Args:
            stored: The block.
            opened: The shard that it lies in, of which the header has been checked.

        Raises:
            CodecError: A codec cannot be what it is said to be.
            IntegrityError: The block does not go on with the chain, or cannot be
                decoded.
        """
        self.follow(stored)
        self.check_rows(stored, opened)

    def check_rows(self, stored: StoredBlock, opened: OpenShard) -> None:
        """Check a block that has been followed, as :meth:`inspect` does."""
        pieces = list(stored_pieces(stored, self._groups, self._own))
        # Counted before it is read: a frame of a few bytes may stand for gigabytes.
        self._decoded_bytes += _check_tensors(stored, pieces)
        if self._decoded_bytes > _MAX_ENTRY_BYTES:
            raise IntegrityError("the rows of all blocks are too large")
        (data,) = opened.read([stored])
        for codec, piece in pieces:
            open_piece(codec, piece, stored, data)

    def finish(self) -> Chain:
        """Return the chain that all blocks make.

        Raises:
            IntegrityError: It is not the entry's, or cannot be restored.
        """
        entry = self._entry
        if (self._tip.hex(), self.num_tokens) != (entry.tip, entry.num_tokens):
            raise IntegrityError("its blocks end elsewhere than its entry says")
        if not is_restorable(self._layout, self.blocks, self.num_tokens):
            raise IntegrityError("a state or rows of a window are missing")
        blocks = tuple(stored.block for stored in self.blocks)
        return Chain(self._root, self._layout, self._origin, blocks)

    def follow(self, stored: StoredBlock) -> None:
        """Take the next block of the chain, without a look at its rows.

        Only the last may be short.

        Raises:
            IntegrityError: It does not go on with the chain.
        """
        block, size = stored.block, self._block_size
        name = block.hash.hex()[:12]
        if (block.parent, block.start) != (self._tip, self.num_tokens):
            raise IntegrityError(f"block {name} does not follow the one before")
        # After one that is short nothing may follow.
        if self.num_tokens % size or len(block.tokens) > size:
            raise IntegrityError(f"block {name} is not of {size} tokens")
        if not is_sound(stored):
            raise IntegrityError(f"block {name} is not named by its tokens")
        self._tip = block.hash
        self.num_tokens += len(block.tokens)
        # Or a bundle without end would fill the disk.
        if self.num_tokens > self._entry.num_tokens:
            raise IntegrityError(f"block {name} goes beyond the entry")
        self.nbytes += stored.end - stored.begin
        self.blocks.append(stored)


def _check_tensors(stored: StoredBlock, pieces: Sequence[tuple[Codec, Piece]]) -> int:
    """Check that a block has just the tensors of its pieces, before any is read.

    Returns:
        Bytes of its rows, decoded.

    Raises:
        IntegrityError: It has others, or says otherwise what it has.
    """
    name = stored.block.hash.hex()[:12]
    expected = set() if pieces else {"nothing"}
    nbytes = 0
    for codec, piece in pieces:
        rows = piece.rows
        nbytes += math.prod(rows.shape) * MLX_DTYPES[rows.dtype].size
        prefix = f"{piece.number}.{rows.side}."
        expected |= {prefix + part for part in codec.array.parts(rows)}
    if set(stored.tensors) != expected:
        raise IntegrityError(f"block {name} has other tensors than its layout")
    # Codes and frames never take twice what they stand for.
    most = min(_MAX_BLOCK_BYTES, 2 * nbytes + 4096 * len(expected))
    if nbytes > _MAX_BLOCK_BYTES or stored.end - stored.begin > most:
        raise IntegrityError(f"block {name} is too large")
    if stored.num_extras != count_extras([piece for _, piece in pieces]):
        raise IntegrityError(f"block {name} has other windows or states than it says")
    return nbytes


def admit(
    blocks: BlockStore,
    catalog: Catalog,
    found: Incoming,
    name: str | None,
    *,
    replace: bool,
) -> Entry:
    """Publish the blocks that the store lacks, and commit the entry.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        found: What came, checked.
        name: The name that the entry is to have here.
        replace: Take the name from an entry that this one does not continue.

    Raises:
        EntryExistsError: The name belongs to something else.
        KVStoreError: With the store's own blocks, the entry could not be restored.
        OSError: The disk is full or fails.
    """
    replaceable(catalog, name, found.chain, replace)
    for _ in range(_TRIES):
        held = held_blocks(blocks, found.chain.blocks)
        _check_restorable(found, held)
        described = _vouched(found, held)
        with _prepared(blocks.folder, found, held) as prepared:
            # Before the lock, which evicting takes itself.
            nbytes = sum(shard.header.nbytes for shard in prepared)
            make_room(blocks, nbytes, lambda: found.chain.hashes)
            with files.locked(blocks.folder.lock, exclusive=True):
                # Another process may have taken the name meanwhile. What is refused
                # takes no signature away.
                replaceable(catalog, name, found.chain, replace)
                _unsign(blocks, catalog, prepared, described.signer)
                # It may have had a signature until now.
                old = replaceable(catalog, name, found.chain, replace)
                # The lock keeps `prune` from blocks that no entry needs yet.
                entry = _publish(blocks, found, held, prepared) and commit(
                    blocks,
                    catalog,
                    found.chain,
                    old,
                    name=name,
                    codec=found.entry.codec,
                    model=found.entry.model,
                    described=described,
                )
            if entry:
                return entry
    raise _vanishing()


def _vouched(found: Incoming, held: Held) -> Entry:
    """Return the entry; unsigned, where the store has other rows than were signed."""
    signed = {stored.block.hash: stored for stored in found.blocks}

    def rows(stored: StoredBlock) -> tuple[str, str, int]:
        return stored.codec, stored.digest, stored.bits

    if all(rows(held[name]) == rows(signed[name]) for name in held):
        return found.entry
    return changed(found.entry, signer="")


def _unsign(
    blocks: BlockStore, catalog: Catalog, shards: Sequence[StagedShard], signer: str
) -> None:
    """Take the signature from entries that lack a block which somebody else brings."""
    new = {stored.block.hash for shard in shards for stored in shard.header.blocks}
    for entry in catalog.all() if new else ():
        if entry.signer not in ("", signer):
            missing = BlockHash(bytes.fromhex(entry.tip))
            for _, parent in blocks.index.chain(missing):
                missing = parent  # ends at the first block that the store lacks
            if missing in new:
                catalog.commit(changed(entry, signer=""))


def held_blocks(blocks: BlockStore, wanted: Iterable[Block]) -> Held:
    """Return the blocks that the store has and can read."""
    held: Held = {}
    for block in wanted:
        place = blocks.index.place_of(block)
        if place is None:
            continue
        try:
            held[block.hash] = blocks.stored(place)
        except IntegrityError:
            # The damaged copy has left the index; a good one may take its place.
            continue
    return held


def _check_restorable(found: Incoming, held: Held) -> None:
    """Refuse what could not be loaded, since the store's own blocks stay."""
    blocks = [held.get(s.block.hash, s) for s in found.blocks]
    if not is_restorable(found.chain.layout, blocks, found.chain.num_tokens):
        raise KVStoreError(
            "the store has blocks of this entry without the states or windows that"
            " its entry needs, and what it has is never replaced",
            hint="import it into another store",
        )


@contextmanager
def _prepared(
    folder: StoreFolder, found: Incoming, held: Held
) -> Iterator[list[StagedShard]]:
    """Yield synced shards of just the blocks that the store lacks."""
    prepared = []
    with ExitStack() as stack:
        for staged in found.shards:
            blocks = staged.header.blocks
            wanted = [b for b in blocks if b.block.hash not in held]
            if not wanted:
                continue
            try:
                if len(wanted) == len(blocks):
                    files.sync_file(staged.path)
                else:
                    opened = stack.enter_context(
                        open_shard_at(staged.path, folder.cipher)
                    )
                    copy = staged_copy(folder, opened, wanted)
                    staged = stack.enter_context(copy)
            except FileNotFoundError as error:
                raise _vanishing() from error
            prepared.append(staged)
        yield prepared


def _publish(
    blocks: BlockStore, found: Incoming, held: Held, prepared: Sequence[StagedShard]
) -> bool:
    """Publish shards and tell the index; ``False`` where it knows others by now."""
    chain, index = found.chain, blocks.index
    with index.transaction():
        for block in chain.blocks:
            if (index.place(block.hash) is None) == (block.hash in held):
                return False
        groups = group_layers(chain.layout)
        blocks.add_new(prepared, sum(g.token_bytes for g in groups))
        digest = digest_fields(chain.origin.fingerprint)
        index.add_root(chain.root, digest, chain.origin.layout)
    return True


def _vanishing() -> IntegrityError:
    return IntegrityError(
        "files vanish from the store while they are imported",
        hint="is something else removing files from it?",
    )
