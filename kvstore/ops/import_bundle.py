"""A bundle into a store: all of it, checked to the last byte, or nothing.

The shards of a bundle are staged and checked by the functions that load them, so what
passes can be loaded. Then the blocks that the store lacks are published. What the store
has already stays as it is: rows that it computed are never replaced by rows from
elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..caches.kinds import known_layout
from ..caches.layout import group_layers
from ..caches.restore import check_layout
from ..caches.snapshot import Chain
from ..caches.stored import (
    Piece,
    count_extras,
    is_restorable,
    open_piece,
    stored_pieces,
)
from ..codecs import MLX_DTYPES, Codec, get_codec
from ..errors import CodecError, IntegrityError, KVStoreError
from ..fingerprint import Fingerprint, refuse_other
from ..format.block import BlockHash, Progress, StoredBlock
from ..format.bundle import BundleReader, refused
from ..format.chain import digest_fields
from ..format.entry import Entry
from ..storage import files
from ..storage.blocks import BlockStore, is_sound
from ..storage.entries import Catalog
from ..storage.folder import StoreFolder
from ..storage.shards import OpenShard, StagedShard, open_shard_at, staged_copy
from .commit import commit, make_room, replaceable

# Decoded, since a frame of a few bytes can stand for gigabytes. A block of 256 tokens
# takes 1.3 GB with 61 layers of 128 heads of 192 and 128 coordinates in 16 bits, more
# than which no model has that mlx-lm runs; and what a bundle holds has to fit into a
# machine's memory at once.
_MAX_BLOCK_BYTES = 2 * 1024**3
_MAX_BUNDLE_BYTES = 512 * 1024**3
# `prune` takes staged files for forgotten after an hour.
_TOUCH_EVERY_S = 600.0
# How often it is tried again where the store has changed meanwhile.
_TRIES = 3


Held = dict[BlockHash, StoredBlock]
"""The blocks that a store has, as its own shards describe them."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A bundle that is staged in a store and not yet visible."""

    # The entry, as the bundle holds it.
    entry: Entry
    chain: Chain
    # The blocks as the bundle's shards describe them.
    blocks: tuple[StoredBlock, ...]
    # The shards, not yet synced.
    shards: tuple[StagedShard, ...]


def import_entry(
    blocks: BlockStore,
    catalog: Catalog,
    bundle: BundleReader,
    name: str | None,
    *,
    replace: bool,
    progress: Progress,
) -> Entry:
    """Take a bundle's entry into a store and return it.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        bundle: From :func:`open_bundle`.
        name: A name in place of the entry's own.
        replace: Take the name from an entry that this one does not continue.
        progress: Called with (tokens checked, tokens in all).

    Raises:
        FormatError: It has a shard of a newer release.
        IntegrityError: It is not, to the byte, what a store would have written.
        EntryExistsError: The name belongs to something else.
        KVStoreError: Its blocks have another size, or the store's own blocks lack
            states or windows that the entry needs.
        OSError: The disk is full or fails.
    """
    _check_block_size(bundle, blocks.folder)
    name = bundle.entry.name if name is None else name
    with _unpacked(blocks.folder, bundle, progress) as found:
        return blocks.run(lambda: _admit(blocks, catalog, found, name, replace=replace))


def open_bundle(
    file: IO[bytes] | BundleReader, fingerprint: Fingerprint | None = None
) -> BundleReader:
    """Return a bundle of the model wanted, as far as its start tells.

    It needs no store, so none has to be made for what is refused here.

    Args:
        file: The bundle, or a reader that this has returned.
        fingerprint: Of the model wanted; ``None`` takes any.

    Raises:
        FormatError: It is no bundle, or one of a newer release.
        IntegrityError: It is damaged.
        FingerprintError: Another model made it.
    """
    bundle = file if isinstance(file, BundleReader) else BundleReader(file)
    if fingerprint is not None:
        stored = Fingerprint(bundle.origin.fingerprint)
        refuse_other(bundle.entry.name or bundle.entry.tip[:12], stored, fingerprint)
    return bundle


def _check_block_size(bundle: BundleReader, folder: StoreFolder) -> None:
    if bundle.block_size != folder.block_size:
        raise KVStoreError(
            f"the bundle has blocks of {bundle.block_size} tokens, and the store of"
            f" {folder.block_size}: {folder.path}",
            hint="import it into another store",
        )


@contextmanager
def _unpacked(
    folder: StoreFolder, bundle: BundleReader, progress: Progress
) -> Iterator[Unpacked]:
    """Stage the shards of a bundle and check all of it; remove what is not published.

    Raises:
        FormatError: It has a shard of a newer release.
        IntegrityError: Anything is not as it must be.
        OSError: The disk is full or fails.
    """
    inspector = _Inspector(bundle)
    found: list[StagedShard] = []
    touched_at = time.monotonic()
    with ExitStack() as stack:
        # Before a gigabyte has been read from a pipe.
        _check_space(folder, bundle.entry.nbytes)
        for name, size, parts in bundle.shards():
            _check_space(folder, size)
            path = stack.enter_context(files.staged_path(folder.staging))
            _receive(path, name, parts)
            with _refusing(name, path), open_shard_at(path) as opened:
                inspector.inspect(opened)
            found.append(StagedShard(path, name, opened.header))
            progress(inspector.num_tokens, bundle.entry.num_tokens)
            if time.monotonic() - touched_at > _TOUCH_EVERY_S:
                touched_at = time.monotonic()
                for staged in found:
                    os.utime(staged.path)
        chain = inspector.finish()
        yield Unpacked(bundle.entry, chain, tuple(inspector.blocks), tuple(found))


def _check_space(folder: StoreFolder, nbytes: int) -> None:
    """Refuse what the disk has no room for, before it is written.

    Raises:
        OSError: The disk is too full.
    """
    disk = os.statvfs(folder.staging)
    if nbytes > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path))


def _receive(path: Path, name: str, parts: Iterable[bytes]) -> None:
    """Write a shard to a new file.

    Raises:
        IntegrityError: Its bytes are not those that its name says.
    """
    digest = hashlib.sha256()
    descriptor = files.create(path)
    try:
        for part in parts:
            digest.update(part)
            files.write_all(descriptor, part)
        os.fchmod(descriptor, 0o400)
    finally:
        os.close(descriptor)
    if digest.hexdigest() != name:
        raise refused(f"shard {name[:12]} has other bytes than its name says")


@contextmanager
def _refusing(name: str, path: Path) -> Iterator[None]:
    """Refuse the bundle where a shard is refused; nobody knows the staged file."""
    try:
        yield
    except (IntegrityError, CodecError) as error:
        why = str(error).replace(f": {path}", "")
        raise refused(f"shard {name[:12]}: {why}") from error


class _Inspector:
    """Follows the blocks of a bundle, shard by shard.

    Args:
        bundle: The bundle, of which the entry has been read.

    Attributes:
        blocks: Those that were found good.
        num_tokens: How many tokens they have.
    """

    def __init__(self, bundle: BundleReader) -> None:
        self._entry, self._origin = bundle.entry, bundle.origin
        self._block_size = bundle.block_size
        try:
            self._layout = known_layout(self._origin.layout)
            check_layout(self._layout, self._entry.num_tokens)
            get_codec(self._entry.codec)
        except (IntegrityError, CodecError) as error:
            raise refused(str(error)) from error
        self._groups = group_layers(self._layout)
        self._root = BlockHash(bytes.fromhex(self._entry.root))
        self._tip = self._root
        self.blocks: list[StoredBlock] = []
        self.num_tokens = 0
        self._nbytes = 0

    def inspect(self, opened: OpenShard) -> None:
        """Check a shard whose header has been checked.

        Raises:
            CodecError: A codec cannot be what it is said to be.
            IntegrityError: The shard does not go on with the chain, or cannot be
                decoded to the last block.
        """
        if opened.header.origin != self._origin or not opened.header.blocks:
            raise IntegrityError("it is of another model or layout, or has no block")
        for stored in opened.header.blocks:
            self._follow(stored)
            pieces = list(stored_pieces(stored, self._groups))
            self._nbytes += _check_tensors(stored, pieces)
            if self._nbytes > _MAX_BUNDLE_BYTES:
                raise IntegrityError("the rows of all blocks are too large")
            (data,) = opened.read([stored])
            for codec, piece in pieces:
                open_piece(codec, piece, stored, data)
            self.blocks.append(stored)

    def finish(self) -> Chain:
        """Return the chain that all blocks make.

        Raises:
            IntegrityError: It is not the entry's, or cannot be restored.
        """
        entry = self._entry
        if (self._tip.hex(), self.num_tokens) != (entry.tip, entry.num_tokens):
            raise refused("its blocks end elsewhere than its entry says")
        if sum(stored.end - stored.begin for stored in self.blocks) != entry.nbytes:
            raise refused("its blocks have another size than its entry says")
        if not is_restorable(self._layout, self.blocks, self.num_tokens):
            raise refused("a state or rows of a window are missing")
        blocks = tuple(stored.block for stored in self.blocks)
        return Chain(self._root, self._layout, self._origin, blocks)

    def _follow(self, stored: StoredBlock) -> None:
        """Take the next block of the chain; only the last may be short."""
        block, size = stored.block, self._block_size
        name = block.hash.hex()[:12]
        if (block.parent, block.start) != (self._tip, self.num_tokens):
            raise IntegrityError(f"block {name} does not follow the one before")
        if self.num_tokens % size or len(block.tokens) > size:
            raise IntegrityError(f"block {name} is not of {size} tokens")
        if not is_sound(stored):
            raise IntegrityError(f"block {name} is not named by its tokens")
        self._tip = block.hash
        self.num_tokens += len(block.tokens)
        # Or a bundle without end would fill the disk.
        if self.num_tokens > self._entry.num_tokens:
            raise IntegrityError(f"block {name} goes beyond the entry")


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


def _admit(
    blocks: BlockStore,
    catalog: Catalog,
    found: Unpacked,
    name: str | None,
    *,
    replace: bool,
) -> Entry:
    """Publish the blocks that the store lacks, and commit the entry.

    Raises:
        EntryExistsError: The name belongs to something else.
        KVStoreError: With the store's own blocks, the entry could not be restored.
        OSError: The disk is full or fails.
    """
    replaceable(catalog, name, found.chain, replace)
    for _ in range(_TRIES):
        held = _held(blocks, found.chain)
        _check_restorable(found, held)
        with _prepared(blocks.folder, found, held) as prepared:
            # Before the lock, which evicting takes itself.
            nbytes = sum(shard.header.nbytes for shard in prepared)
            make_room(blocks, nbytes, frozenset(b.hash for b in found.chain.blocks))
            with files.locked(blocks.folder.lock, exclusive=True):
                # Another process may have taken the name meanwhile.
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
                    described=found.entry,
                )
            if entry:
                return entry
    raise _vanishing()


def _held(blocks: BlockStore, chain: Chain) -> Held:
    """Return the blocks that the store has and can read."""
    held: Held = {}
    for block in chain.blocks:
        place = blocks.index.place_of(block)
        if place is None:
            continue
        try:
            held[block.hash] = blocks.stored(place)
        except IntegrityError:
            # The damaged copy has left the index; a good one may take its place.
            continue
    return held


def _check_restorable(found: Unpacked, held: Held) -> None:
    """Refuse what could not be loaded, since the store's own blocks stay."""
    blocks = [held.get(s.block.hash, s) for s in found.blocks]
    if not is_restorable(found.chain.layout, blocks, found.chain.num_tokens):
        raise KVStoreError(
            "the store has blocks of this bundle without the states or windows that"
            " its entry needs, and what it has is never replaced",
            hint="import it into another store",
        )


@contextmanager
def _prepared(
    folder: StoreFolder, found: Unpacked, held: Held
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
                    opened = stack.enter_context(open_shard_at(staged.path))
                    copy = staged_copy(folder.staging, opened, wanted)
                    staged = stack.enter_context(copy)
            except FileNotFoundError as error:
                raise _vanishing() from error
            prepared.append(staged)
        yield prepared


def _publish(
    blocks: BlockStore, found: Unpacked, held: Held, prepared: Sequence[StagedShard]
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
