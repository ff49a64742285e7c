"""A bundle to staged shards, of which everything is checked. Knows no index.

Blocks are checked by the same functions that load them, so what passes can be loaded.
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
from ..format.bundle import BundleReader, Manifest, refused
from ..storage import files
from ..storage.blocks import header_root, is_sound
from ..storage.folder import StoreFolder
from ..storage.shards import OpenShard, StagedShard, open_shard_at

# Decoded, since a frame of a few bytes can stand for gigabytes. A block of 256 tokens
# takes 1.3 GB with 61 layers of 128 heads of 192 and 128 coordinates in 16 bits, more
# than which no model has that mlx-lm runs; and what a bundle holds has to fit into a
# machine's memory at once.
_MAX_BLOCK_BYTES = 2 * 1024**3
_MAX_BUNDLE_BYTES = 512 * 1024**3
# `prune` takes staged files for forgotten after an hour.
_TOUCH_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A bundle that is staged in a store and not yet seen."""

    # What it says of itself.
    manifest: Manifest
    # The blocks.
    chain: Chain
    # The same as its shards describe them.
    blocks: tuple[StoredBlock, ...]
    # Its shards, not yet synced.
    shards: tuple[StagedShard, ...]


def open_bundle(
    file: IO[bytes] | BundleReader, fingerprint: Fingerprint | None = None
) -> BundleReader:
    """Return a bundle of the model wanted, as far as its manifest tells.

    It needs no store, so none has to be made for what is refused here.

    Args:
        file: The bundle, or one that this has returned.
        fingerprint: Of the model wanted; ``None`` takes any.

    Raises:
        FormatError: It is no bundle, or one of a newer release.
        IntegrityError: It is damaged.
        FingerprintError: Another model made it.
    """
    bundle = file if isinstance(file, BundleReader) else BundleReader(file)
    if fingerprint is not None:
        stored = Fingerprint(bundle.manifest.origin.fingerprint)
        refuse_other(bundle.manifest.label, stored, fingerprint)
    return bundle


def check_fits(manifest: Manifest, folder: StoreFolder) -> None:
    """Refuse a bundle that cannot go into this store.

    Args:
        manifest: What it says of itself.
        folder: The store.

    Raises:
        KVStoreError: Its blocks are of another size.
    """
    if manifest.block_size != folder.block_size:
        raise KVStoreError(
            f"the bundle has blocks of {manifest.block_size} tokens, and the store of"
            f" {folder.block_size}: {folder.path}",
            hint="import it into another store",
        )


@contextmanager
def unpacked(
    folder: StoreFolder, bundle: BundleReader, progress: Progress
) -> Iterator[Unpacked]:
    """Stage the shards of a bundle, and check all of it; they go unless published.

    Args:
        folder: The store.
        bundle: The bundle, read up to its first shard.
        progress: Called with (tokens checked, tokens in all).

    Raises:
        FormatError: It has a shard of a newer release.
        IntegrityError: Anything is not as it must be.
        OSError: The disk is full or fails.
    """
    manifest = bundle.manifest
    _check_room(folder, manifest)
    inspector = _Inspector(manifest)
    found: list[StagedShard] = []
    touched_at = time.monotonic()
    with ExitStack() as stack:
        for name, parts in bundle.shards():
            path = stack.enter_context(files.staged_path(folder.staging))
            _receive(path, name, parts)
            with _refusing(name, path), open_shard_at(path) as opened:
                inspector.inspect(opened)
            found.append(StagedShard(path, name, opened.header))
            progress(inspector.num_tokens, manifest.num_tokens)
            if time.monotonic() - touched_at > _TOUCH_EVERY_S:
                touched_at = time.monotonic()
                for staged in found:
                    os.utime(staged.path)
        chain = inspector.finish()
        yield Unpacked(manifest, chain, tuple(inspector.blocks), tuple(found))


def _check_room(folder: StoreFolder, manifest: Manifest) -> None:
    """Say at once that the disk is too full, and not after a gigabyte.

    Raises:
        OSError: It is.
    """
    disk = os.statvfs(folder.staging)
    if sum(size for _, size in manifest.shards) > disk.f_bavail * disk.f_frsize:
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
        manifest: What the bundle says of itself.

    Attributes:
        blocks: Those that were found good.
        num_tokens: How many tokens they have.
    """

    def __init__(self, manifest: Manifest) -> None:
        try:
            self._layout = known_layout(manifest.origin.layout)
            check_layout(self._layout, manifest.num_tokens)
            get_codec(manifest.codec)
        except (IntegrityError, CodecError) as error:
            raise refused(str(error)) from error
        self._manifest = manifest
        self._groups = group_layers(self._layout)
        self._root = BlockHash(bytes.fromhex(manifest.root))
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
        if header_root(opened.header) != self._root or not opened.header.blocks:
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
            IntegrityError: It is another than the manifest says, or cannot be restored.
        """
        manifest = self._manifest
        if (self._tip.hex(), self.num_tokens) != (manifest.tip, manifest.num_tokens):
            raise refused("its blocks end elsewhere than it says")
        if not is_restorable(self._layout, self.blocks, self.num_tokens):
            raise refused("a state or rows of a window are missing")
        blocks = tuple(stored.block for stored in self.blocks)
        return Chain(self._root, self._layout, manifest.origin, blocks)

    def _follow(self, stored: StoredBlock) -> None:
        """Take the next block of the chain; only the last may be short."""
        block, size = stored.block, self._manifest.block_size
        name = block.hash.hex()[:12]
        if (block.parent, block.start) != (self._tip, self.num_tokens):
            raise IntegrityError(f"block {name} does not follow the one before")
        if self.num_tokens % size or len(block.tokens) > size:
            raise IntegrityError(f"block {name} is not of {size} tokens")
        if not is_sound(stored):
            raise IntegrityError(f"block {name} is not named by its tokens")
        self._tip = block.hash
        self.num_tokens += len(block.tokens)


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
