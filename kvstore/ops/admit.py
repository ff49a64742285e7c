"""A bundle that was checked into a store: all of it at once, or nothing.

What the store has already stays as it is and is not written again: rows that it
computed itself are never replaced by rows that come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace as changed

from ..caches.layout import group_layers
from ..caches.stored import is_restorable
from ..errors import IntegrityError, KVStoreError
from ..format.block import BlockHash, StoredBlock
from ..format.bundle import Manifest
from ..format.chain import digest_fields
from ..format.entry import MAX_LABEL, Entry, make_entry
from ..storage import files
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from ..storage.shards import StagedShard, open_shard_at, staged_copy
from .commit import Committer
from .import_bundle import Unpacked

# How often it is tried again where the store has changed meanwhile.
_TRIES = 3
Held = dict[BlockHash, StoredBlock]
"""The blocks that a store has, as its own shards describe them."""


class Admission:
    """Takes one bundle into a store.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        committer: Knows who may have a name, and makes room.
        found: The bundle, staged in this store and checked.
    """

    def __init__(
        self,
        blocks: BlockStore,
        catalog: Catalog,
        committer: Committer,
        found: Unpacked,
    ) -> None:
        self._blocks = blocks
        self._folder = blocks.folder
        self._index = blocks.index
        self._catalog = catalog
        self._committer = committer
        self._found = found
        self._chain = found.chain

    def admit(self, name: str | None, *, replace: bool) -> Entry:
        """Publish the blocks that the store lacks, and commit the entry.

        Raises:
            EntryExistsError: The name belongs to something else.
            KVStoreError: With the store's own blocks, the entry could not be restored.
            OSError: The disk is full or fails.
        """
        self._committer.replaceable(name, self._chain, replace)
        for _ in range(_TRIES):
            held = self._held()
            self._check_restorable(held)
            with self._prepared(held) as prepared:
                # Before the lock, which evicting takes itself.
                nbytes = sum(shard.header.nbytes for shard in prepared)
                needed = frozenset(block.hash for block in self._chain.blocks)
                self._committer.make_room(nbytes, needed)
                entry = self._commit(name, replace, held, prepared)
            if entry is not None:
                return entry
        raise _vanishing()

    def _held(self) -> Held:
        """Return the blocks that the store has and can read."""
        held: Held = {}
        for block in self._chain.blocks:
            place = self._index.place_of(block)
            if place is None:
                continue
            try:
                held[block.hash] = self._blocks.stored(place)
            except IntegrityError:
                # A damaged copy is out of the index now; a good one may take its place.
                continue
        return held

    def _check_restorable(self, held: Held) -> None:
        """Refuse what could not be loaded, with our blocks in the place of its own."""
        blocks = [held.get(s.block.hash, s) for s in self._found.blocks]
        if not is_restorable(self._chain.layout, blocks, self._chain.num_tokens):
            raise KVStoreError(
                "the store has blocks of this bundle without the states or windows that"
                " its entry needs, and what it has is never replaced",
                hint="import it into another store",
            )

    @contextmanager
    def _prepared(self, held: Held) -> Iterator[list[StagedShard]]:
        """Yield synced shards of just the blocks that the store lacks."""
        prepared = []
        with ExitStack() as stack:
            for staged in self._found.shards:
                blocks = staged.header.blocks
                wanted = [b for b in blocks if b.block.hash not in held]
                if not wanted:
                    continue
                try:
                    if len(wanted) == len(blocks):
                        files.sync_file(staged.path)
                    else:
                        source = open_shard_at(staged.path)
                        opened = stack.enter_context(source)
                        copy = staged_copy(self._folder.staging, opened, wanted)
                        staged = stack.enter_context(copy)
                except FileNotFoundError as error:
                    raise _vanishing() from error
                prepared.append(staged)
            yield prepared

    def _commit(
        self,
        name: str | None,
        replace: bool,
        held: Held,
        prepared: Sequence[StagedShard],
    ) -> Entry | None:
        """Publish and write the entry; ``None`` where the store has changed meanwhile.

        The lock keeps `prune` from what is published before the entry needs it.
        """
        manifest, chain = self._found.manifest, self._chain
        with files.locked(self._folder.lock, exclusive=True):
            # Another process may have taken the name meanwhile.
            old = self._committer.replaceable(name, chain, replace)
            if not self._publish(held, prepared):
                return None
            places = self._index.longest_prefix([block.hash for block in chain.blocks])
            if len(places) < len(chain.blocks):
                return None
            entry = make_entry(
                old,
                name=name,
                tip=manifest.tip,
                root=manifest.root,
                num_tokens=manifest.num_tokens,
                nbytes=sum(place.nbytes for place in places),
                codec=manifest.codec,
                model=manifest.model,
            )
            return self._catalog.commit(_described(entry, old, manifest))

    def _publish(self, held: Held, prepared: Sequence[StagedShard]) -> bool:
        """Publish shards and tell the index; ``False`` where it knows others by now."""
        origin, index = self._chain.origin, self._index
        with index.transaction():
            for block in self._chain.blocks:
                if (index.place(block.hash) is None) == (block.hash in held):
                    return False
            groups = group_layers(self._chain.layout)
            self._blocks.add_new(prepared, sum(g.token_bytes for g in groups))
            digest = digest_fields(origin.fingerprint)
            index.add_root(self._chain.root, digest, origin.layout)
        return True


def _described(entry: Entry, old: Entry | None, manifest: Manifest) -> Entry:
    """Return an entry with what was first said of it; only a longer one is news."""
    source = old if old is not None and old.tip == manifest.tip else manifest
    return changed(
        entry,
        codec=source.codec,
        model=source.model[:MAX_LABEL],
        made_with=source.made_with,
        created_at=old.created_at if old else manifest.created_at,
    )


def _vanishing() -> IntegrityError:
    return IntegrityError(
        "files vanish from the store while they are imported",
        hint="is something else removing files from it?",
    )
