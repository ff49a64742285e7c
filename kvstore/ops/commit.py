"""A save from its first block to its entry, which is what makes it count.

Blocks go first, without a lock; the entry last, under the store's exclusive lock, and
only over a chain that is whole at that moment.
"""

from __future__ import annotations

from contextlib import suppress

from ..caches.snapshot import Chain, Snapshot
from ..codecs.base import Codec
from ..errors import EntryExistsError, FormatError, IntegrityError
from ..format.block import Block, BlockHash, Progress
from ..format.entry import Entry, make_entry
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from .prune import Policy, plan_prune
from .save import Saver

# How often blocks that `prune` takes away meanwhile are written again.
_TRIES = 3


class Committer:
    """Saves prompt caches into one store.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        codec: For full blocks.
    """

    def __init__(
        self,
        blocks: BlockStore,
        catalog: Catalog,
        codec: Codec,
    ) -> None:
        self._blocks = blocks
        self._folder = blocks.folder
        self._catalog = catalog
        self._codec = codec

    def save(
        self,
        snapshot: Snapshot,
        *,
        name: str | None,
        replace: bool | Entry,
        progress: Progress,
    ) -> Entry:
        """Write what is missing of a prompt cache, and its entry.

        Raises:
            EntryExistsError: The name belongs to something else.
        """
        self.replaceable(name, snapshot.chain, replace)
        for _ in range(_TRIES):
            self.write_blocks(snapshot, progress)
            with files.locked(self._folder.lock, exclusive=True):
                entry = self._commit(name, snapshot.chain, snapshot.model, replace)
            if entry is not None:
                return entry
        # Nothing is freed while we hold the lock, by ourselves neither.
        with files.locked(self._folder.lock, exclusive=True):
            self._saver(snapshot).write_missing(_make_no_room, progress)
            entry = self._commit(name, snapshot.chain, snapshot.model, replace)
        if entry is not None:
            return entry
        raise IntegrityError(
            "blocks vanish from the store while they are saved",
            hint="is something else removing files from it?",
        )

    def write_blocks(self, snapshot: Snapshot, progress: Progress) -> None:
        """Write what is missing of a prompt cache."""
        needed = frozenset(block.hash for block in snapshot.chain.blocks)
        self._saver(snapshot).write_missing(
            lambda nbytes: self.make_room(nbytes, needed), progress
        )

    def missing(self, snapshot: Snapshot) -> list[Block]:
        """Return the blocks that would be written."""
        return self._saver(snapshot).missing()

    def _saver(self, snapshot: Snapshot) -> Saver:
        return Saver(self._blocks, self._codec, snapshot)

    def replaceable(
        self, name: str | None, chain: Chain, replace: bool | Entry
    ) -> Entry | None:
        """Return the entry that a save replaces, or ``None``."""
        old = self._catalog.holder(name, chain.tip.hex())
        if old is None or replace is True or chain.continues(old):
            return old
        if isinstance(replace, Entry) and replace.tip == old.tip:
            return old
        raise EntryExistsError(
            f"the name `{name}` is taken by an entry that this one does not continue",
            hint="choose another name, or replace it",
        )

    def _commit(
        self, name: str | None, chain: Chain, model: str, replace: bool | Entry
    ) -> Entry | None:
        """Write the entry; ``None`` where `prune` has taken blocks meanwhile."""
        # Another process may have taken the name meanwhile.
        old = self.replaceable(name, chain, replace)
        hashes = [block.hash for block in chain.blocks]
        places = self._blocks.index.longest_prefix(hashes)
        if len(places) < len(hashes):
            return None
        entry = make_entry(
            old,
            name=name,
            tip=chain.tip.hex(),
            root=chain.root.hex(),
            num_tokens=chain.num_tokens,
            nbytes=sum(place.nbytes for place in places),
            codec=self._codec.name,
            model=model,
        )
        return self._catalog.commit(entry)

    def make_room(self, nbytes: int, needed: frozenset[BlockHash]) -> None:
        """Evict what was used least recently, where bytes would pass the limit.

        Args:
            nbytes: Bytes that are to be added; nothing goes for more than the limit.
            needed: The blocks of which they are a part, which stay.
        """
        limit = self._folder.max_bytes
        if nbytes <= limit < sum(self._blocks.index.shards().values()) + nbytes:
            # A little more than needed, or every save would have to.
            max_bytes = max(0, limit - limit // 20 - nbytes)
            policy = Policy(max_bytes=max_bytes, needed=needed)
            with suppress(FormatError):  # a later release's entries stay as they are
                if plan_prune(self._blocks, policy).entries:
                    self._blocks.confirm()
                    plan_prune(self._blocks, policy).execute()


def _make_no_room(_: int) -> None:
    """Leave the store over its limit until the next save."""
