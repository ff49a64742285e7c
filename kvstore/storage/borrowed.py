"""The blocks of a store that is only read: a share, a stick, a snapshot.

Nothing in its folder is ever written, moved or locked, whatever it allows: what turns
out to be damaged is forgotten in memory only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import KVStoreError
from .blocks import BlockStore, index_in_memory
from .folder import open_folder
from .index import Index


def open_borrowed(path: Path, block_size: int) -> BorrowedBlocks:
    """Return the blocks of a store that is only read.

    Raises:
        StoreNotFoundError: There is no store.
        KVStoreError: Its blocks have another size.
    """
    folder = open_folder(path, is_borrowed=True)
    if folder.block_size != block_size:
        raise KVStoreError(
            f"the base has blocks of {folder.block_size} tokens, and the store of"
            f" {block_size}: {path}",
            hint="use another store with it",
        )
    return BorrowedBlocks(folder)


class BorrowedBlocks(BlockStore):
    """The blocks of a store that is never written to.

    Its index is copied into memory, and what has come since is read from the shards. If
    it turns out to be damaged, another is made from the shards alone.
    """

    @property
    def index(self) -> Index:
        """A copy of the index in memory."""
        if self._opened is None:
            self._opened = index_in_memory(self.folder, is_trusted=self._is_trusted)
            self._is_trusted = False  # it is closed only where it was damaged
        return self._opened

    @contextmanager
    def _nothing_freed(self) -> Iterator[None]:
        yield  # whoever owns it may prune it at any time

    def _quarantine(self, shard: str) -> None:
        pass
