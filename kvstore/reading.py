"""Blocks from shards, with what the index says checked against the shard itself.

What turns out to be missing or damaged is dropped from the index, so that it is
missed at once the next time and written anew by the next save.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import shards
from .errors import IntegrityError, StoreLockedError
from .folder import StoreFolder
from .index import Index
from .indexing import header_root, is_sound, place_in
from .types import BlockHash, Entry, Origin, Place, ShardHeader, StoredBlock

_MAX_HEADERS = 256

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


class Reader:
    """Reads the blocks of one store.

    Args:
        folder: The store.
        index: Its index.

    Attributes:
        index: The same.
    """

    def __init__(self, folder: StoreFolder, index: Index) -> None:
        self.index = index
        self._folder = folder
        self._headers: OrderedDict[str, tuple[Stamp, ShardHeader]] = OrderedDict()

    def stored(self, place: Place) -> StoredBlock:
        """Return what a shard's header says of a block.

        Raises:
            IntegrityError: The shard is missing or damaged, or lacks the block.
        """
        with self._healing(place.shard):
            return self._find(self._header(place.shard), place)

    def chain(self, entry: Entry) -> list[tuple[Place, StoredBlock]]:
        """Return the blocks of an entry, first to last.

        Raises:
            IntegrityError: One is missing or damaged.
        """
        found: list[tuple[Place, StoredBlock]] = []
        block, stop = entry.tip, entry.num_tokens
        while stop > 0:
            place = self._place(block)
            stored = self.stored(place)
            if stored.block.start + len(stored.block.tokens) != stop:
                raise IntegrityError(f"block {block[:12]} is out of place", block=block)
            found.append((place, stored))
            block, stop = stored.block.parent.hex(), stored.block.start
        if block != entry.root:
            raise IntegrityError("the entry's first block is not a first block")
        return found[::-1]

    def origin(self, entry: Entry) -> Origin:
        """Return what computed an entry.

        Raises:
            IntegrityError: Its last block is missing or damaged.
        """
        return self.origin_at(self._place(entry.tip))

    def origin_at(self, place: Place) -> Origin:
        """Return what computed a block.

        Raises:
            IntegrityError: Its shard is missing or damaged.
        """
        with self._healing(place.shard):
            return self._header(place.shard).origin

    def _place(self, block: str) -> Place:
        place = self.index.place(BlockHash(bytes.fromhex(block)))
        if place is None:
            raise IntegrityError(
                f"block {block[:12]} is missing",
                block=block,
                hint="save the prompt again; `kvstore verify` finds more",
            )
        return place

    def read(
        self, shard: str, places: Sequence[Place], root: BlockHash
    ) -> Iterator[tuple[StoredBlock, memoryview]]:
        """Yield blocks of one shard with their bytes, all of it checked.

        Args:
            shard: The shard's name.
            places: Blocks in it.
            root: The root hash that they descend from.

        Raises:
            IntegrityError: The shard is missing or damaged, or lacks a block.
        """
        with (
            self._healing(shard),
            shards.open_shard(self._folder.shards, shard) as opened,
        ):
            # First, since an index that lies is no reason to distrust a shard.
            blocks = [self._find(opened.header, place) for place in places]
            if header_root(opened.header) != root:
                raise IntegrityError(
                    f"shard belongs to another model or layout: {opened.path}",
                    path=opened.path,
                )
            yield from zip(blocks, opened.read(blocks), strict=True)

    def _header(self, shard: str) -> ShardHeader:
        """Return a shard's header, read once for as long as nobody touches the file."""
        status = shards.shard_path(self._folder.shards, shard).stat()
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        kept = self._headers.get(shard)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        with shards.open_shard(self._folder.shards, shard) as opened:
            self._headers[shard] = (stamp, opened.header)
        if len(self._headers) > _MAX_HEADERS:
            self._headers.popitem(last=False)
        return opened.header

    def _find(self, header: ShardHeader, place: Place) -> StoredBlock:
        """Return a block of a shard that is what the index says of it.

        Raises:
            IntegrityError: It is not, so the index is damaged.
        """
        for stored in header.blocks:
            is_it = stored.block.hash == place.hash  # at once for nearly all
            if is_it and place_in(place.shard, stored) == place and is_sound(stored):
                return stored
        raise IntegrityError(
            f"the index is damaged: shard {place.shard[:12]} does not hold block"
            f" {place.hash.hex()[:12]} as it says",
            path=self._folder.index,
        )

    @contextmanager
    def _healing(self, shard: str) -> Iterator[None]:
        """Take what is missing or damaged out of the index.

        Raises:
            IntegrityError: Something was.
        """
        try:
            yield
        except ValueError as error:
            raise IntegrityError(
                f"the index is damaged: {error}", path=self._folder.index
            ) from error
        except FileNotFoundError as error:
            self._forget(shard, None)
            raise IntegrityError(
                f"shard {shard[:12]} is missing",
                path=self._folder.shards / shard[:2] / f"{shard}.safetensors",
                hint="save the prompt again",
            ) from error
        except IntegrityError as error:
            if error.path != self._folder.index:
                self._forget(shard, error.block)
                if error.block is None:
                    self._quarantine(shard)
            raise

    def _forget(self, shard: str, block: str | None) -> None:
        """Drop a block, or all of a shard, from the index."""
        self._headers.pop(shard, None)
        try:
            with self.index.transaction():
                if block is None:
                    self.index.drop_shard(shard)
                else:
                    self.index.drop_block(BlockHash(bytes.fromhex(block)), shard)
        except (StoreLockedError, OSError):
            return  # read-only or busy: the next reader finds the same and tries again

    def _quarantine(self, shard: str) -> None:
        try:
            shards.quarantine_shard(self._folder.shards, shard, self._folder.quarantine)
        except (OSError, ValueError):
            return  # it stays, unread: the index no longer names it
