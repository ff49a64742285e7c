"""The blocks of a store: shards, and the index that says what lies in which.

The index is never believed: what it says is compared with the shard itself.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import blake3

from ..errors import FormatError, IndexDamagedError, IntegrityError, StoreLockedError
from ..format.basis import bases_named
from ..format.block import EXACT_BITS, BlockHash, Origin, ShardHeader, StoredBlock
from ..format.chain import (
    digest_fields,
    hash_block_tokens,
    hash_root,
    origin_root,
)
from ..format.entry import Entry, entry_to_bytes
from . import files
from .bases import basis_size, remove_basis
from .folder import StoreFolder
from .index import Index, Place, disk_error, index_identity, is_better
from .ledger import load_entry, see_entries, stamp_of
from .shards import (
    StagedShard,
    list_shards,
    open_shard,
    publish_shard,
    quarantine_shard,
    reopen_shard,
    shard_file,
    shard_path,
    staged_copy,
)

T = TypeVar("T")
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a store that can be read and not be written to."""
_NO_FILE = (*READ_ONLY, errno.ENOSPC)
# What SQLite puts beside the index.
_LOGS = ("-wal", "-shm")
# A bad sector, or something else in a shard's place: a folder, a link, another's file.
_UNREADABLE = (
    errno.EIO,
    errno.EINVAL,
    errno.ELOOP,
    errno.EPERM,
    errno.EACCES,
    errno.ENXIO,
)


def open_index(folder: StoreFolder) -> Index:
    """Return the store's index, rebuilt from the shards where it is missing or damaged.

    Raises:
        StoreLockedError: Another process kept it locked.
        FormatError: A newer release wrote it.
    """
    seen = index_identity(folder.index)
    if seen is not None:
        try:
            if files.is_regular(folder.index) and all(
                files.is_regular(_beside(folder.index, suffix), or_missing=True)
                for suffix in _LOGS
            ):
                return Index(folder.index, cipher=folder.cipher)
        except IndexDamagedError:
            pass  # rebuilt below, outside of the handler
        replace_index(folder, seen)
    else:
        with files.locked(folder.lock, exclusive=True):
            if not folder.index.exists():
                _build_index(folder)
    return Index(folder.index, cipher=folder.cipher)


def replace_index(folder: StoreFolder, seen: tuple[int, int] | None) -> None:
    """Put a damaged index into quarantine and build another from the shards.

    Args:
        folder: The store.
        seen: The identity of the damaged file; if another process has replaced it
            meanwhile, nothing is left to do.
    """
    # Several processes meet the same damage at once; the first one to get the lock
    # rebuilds, and the others find another file in place.
    with files.locked(folder.lock, exclusive=True):
        if index_identity(folder.index) in (seen, None):
            _build_index(folder)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _set_index_aside(folder: StoreFolder) -> None:
    aside = folder.quarantine / f"index-{secrets.token_hex(4)}.sqlite"
    # The log first: were it left behind alone, SQLite would replay it over the next
    # file.
    for suffix in (*_LOGS, ""):
        with suppress(FileNotFoundError):
            files.publish(_beside(folder.index, suffix), _beside(aside, suffix))


def _build_index(folder: StoreFolder) -> None:
    """Build the index beside and rename it into place, whole or not at all.

    What was there before goes to quarantine, a write-ahead log that is all that is
    left of it too: SQLite would replay it over the new one.
    """
    with files.staged_path(folder.staging) as path:
        try:
            index = Index(path, create=True, cipher=folder.cipher)
            try:
                index_folder(index, folder)
                _copy_entries(index, folder)
            finally:
                index.close()  # which folds the write-ahead log into the file
            # Durable before the old one goes, or a power cut would leave neither.
            files.sync_file(path)
            _set_index_aside(folder)
            files.publish(path, folder.index)
            # Shards that others told the old index of while this one was built. Who
            # still uses the old one is refused: see `Index.transaction`.
            with closing(Index(folder.index, cipher=folder.cipher)) as index:
                index_folder(index, folder)
        finally:
            for suffix in _LOGS:
                _beside(path, suffix).unlink(missing_ok=True)


def index_in_memory(folder: StoreFolder, *, is_trusted: bool) -> Index:
    """Return an index in memory, for a store that cannot be written to.

    Args:
        folder: The store.
        is_trusted: Copy the store's index, and read only the shards that came since;
            otherwise all of them.
    """
    index = Index(folder.index, create=True, temporary=True)
    if is_trusted:
        with suppress(OSError, IndexDamagedError, StoreLockedError, FormatError):
            copied = Index(
                folder.index, temporary=True, copied=True, cipher=folder.cipher
            )
            index.close()
            index = copied
    index_new(index, folder)
    return index


def _copy_entries(index: Index, folder: StoreFolder) -> None:
    """Put the second copy of every readable entry into a new index."""
    read = []
    for path in folder.entries.iterdir():
        if (entry_id := folder.entry_of(path.name)) is None:
            continue
        with suppress(OSError, IntegrityError, FormatError):
            stamp = stamp_of(path.lstat())
            entry = load_entry(folder, entry_id)
            index.put_entry(entry.id, entry_to_bytes(entry))
            read.append((entry, stamp))
    see_entries(index, read)


_MAX_HEADERS = 256


class Described(NamedTuple):
    """What the rows of a block went through."""

    codec: str
    # As in :class:`Place`.
    bits: int
    # That codec loses nothing.
    is_lossless: bool

    @property
    def is_exact(self) -> bool:
        """Whether nothing lossy went into its rows."""
        return self.bits == EXACT_BITS


class BlockStore:
    """The blocks of one store: finds, reads, adds and drops them.

    It alone knows how a shard and its rows in the index become visible together, and it
    heals the index: what turns out to be missing or damaged is dropped, so that the
    next save writes it anew, and an index that is wrong is rebuilt from the shards.

    Use it from one thread.

    Args:
        folder: The store.
        on_evict: Called with each entry that was evicted, once it is gone.

    Attributes:
        folder: The same; a new size limit takes the place of the old one here.
        on_evict: The same.
        limits: What entries of some models may take, by what the model is called.
    """

    def __init__(
        self, folder: StoreFolder, on_evict: Callable[[Entry], None] | None = None
    ) -> None:
        self.folder = folder
        self.on_evict = on_evict
        self.limits: Mapping[str, int] = {}
        self._opened: Index | None = None
        # The error for which the index is in memory, if it is.
        self._refusal: int | None = None
        self._is_trusted = True
        self._is_running = False
        # As text: each step of a server asks for the stamp of every shard of a prompt.
        self._shards = str(folder.shards)
        self._headers: OrderedDict[str, tuple[str, ShardHeader]] = OrderedDict()
        self._compared: OrderedDict[str, tuple[str, dict[Place, str]]] = OrderedDict()

    @property
    def index(self) -> Index:
        """The index, opened when first needed and rebuilt where it is missing."""
        if self._opened is None:
            try:
                self._opened, self._is_trusted = open_index(self.folder), True
            except OSError as error:
                self.take_memory(error)
        assert self._opened is not None
        return self._opened

    def take_memory(self, error: OSError, *, is_read: bool = False) -> None:
        """Take an index in memory, for a store that may only be read or has no room.

        Args:
            error: What using the file has ended with; raised if it is another one.
            is_read: Make it from the shards. A copy lacks what is in the write-ahead
                log, and whoever frees blocks by it compares it with the shards first.
        """
        if error.errno not in _NO_FILE:
            raise error
        self.close()
        self._refusal = error.errno
        is_trusted = self._is_trusted and not is_read
        self._opened = index_in_memory(self.folder, is_trusted=is_trusted)
        self._is_trusted = False  # it is closed only where it was damaged

    def refuse_memory(self) -> None:
        """Refuse to write what only an index in memory would know.

        Raises:
            OSError: It is in memory, and this is why.
        """
        if self.index.is_temporary and (number := self._refusal) is not None:
            raise OSError(number, os.strerror(number), str(self.folder.index))

    def leave_memory(self) -> None:
        """Go back to the index's file, without the shards that were freed meanwhile."""
        self.close()
        try:
            index = self.index
            with index.transaction():
                for name in index.shards():
                    if not shard_path(self.folder.shards, name).exists():
                        index.drop_shard(name)
        except (OSError, StoreLockedError, IndexDamagedError):
            return  # still no room: whoever misses a shard drops its rows

    def close(self) -> None:
        """Close the index; it is opened again where it is needed."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work``; where the index turns out to be damaged, rebuild it first.

        A run inside ``work`` does not rebuild: it passes the error on to this one.
        Rebuilding takes the store's lock, which ``work`` may hold at that moment.
        """
        if self._is_running:
            return work()
        self._is_running = True
        try:
            return self._run(work)
        finally:
            self._is_running = False

    def _run(self, work: Callable[[], T]) -> T:
        # Another process may have rebuilt the index since the last run.
        if self._opened is not None and self._is_outdated(self._opened):
            self.close()
        try:
            return work()
        except IndexDamagedError:
            pass  # rebuilt below, outside of the handler
        index = self._opened
        self.close()
        if index is None or not index.is_temporary:
            try:
                replace_index(self.folder, index.identity if index else None)
            except OSError as error:
                self.take_memory(error)
        return work()

    def _is_outdated(self, index: Index) -> bool:
        """Whether another index is in place, or there is room for one now."""
        path = self.folder.index
        if not index.is_temporary:
            return index.identity != index_identity(path)
        return self._refusal == errno.ENOSPC != disk_error(path)

    def run_again(self, work: Callable[[], T]) -> T:
        """Run ``work``, and twice more if it meets damage.

        `prune` may move a block at each look. It cannot at the third, which holds the
        lock that `prune` takes.
        """
        try:
            return self.run(work)
        except IntegrityError as error:
            # Another shard may hold a good copy, or `prune` have moved a block.
            self.run(self.confirm)
            with suppress(IntegrityError):
                return self.run(work)
            with suppress(IntegrityError):
                return self.run(lambda: self._run_locked(work))
            raise error from None  # it says what was wrong, not what is missing now

    def _run_locked(self, work: Callable[[], T]) -> T:
        with self._nothing_freed():
            return work()

    @contextmanager
    def _nothing_freed(self) -> Iterator[None]:
        """Hold the lock that `prune` takes to remove shards, where there can be one."""
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.folder.lock, exclusive=False))
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
            yield

    def confirm(self, only: Collection[str] | None = None) -> None:
        """Compare the index with all shards; whoever removes shards does this first.

        Call it without the store's lock.

        Args:
            only: Shards whose headers are read again; of all others only those that
                somebody has touched, or of which the index says something else than
                when they were compared last. All are read where it is ``None``.

        Raises:
            IndexDamagedError: The index says something else.
        """
        try:
            return confirm_folder(self.index, self.folder, only)
        except IndexDamagedError:
            if self.index.is_temporary:
                raise
        # Another process may have been removing a shard: rows go before the file.
        with files.locked(self.folder.lock, exclusive=True):
            confirm_folder(self.index, self.folder)

    def held(self, places: Iterable[Place | None]) -> list[Place | None]:
        """Return the places whose shards have what is said, ``None`` for all others.

        Args:
            places: Where blocks lie, or ``None``; those of a shard behind each other.
        """
        found: list[Place | None] = []
        for shard, run in groupby(places, lambda place: place.shard if place else None):
            some = list(run)
            is_held = shard is not None and self._holds(shard, filter(None, some))
            found += some if is_held else [None] * len(some)
        return found

    def _holds(self, shard: str, places: Iterable[Place]) -> bool:
        """Whether a shard is there and can be read, and has some blocks."""
        some = list(places)
        try:
            with self.healing(shard):
                is_known = all(map(self._contents(shard).__contains__, some))
            return is_known or bool(self.describe(some))
        except (FormatError, IntegrityError):
            return False

    def describe(self, places: Iterable[Place]) -> list[Described]:
        """Return what blocks went through, as their shards say.

        A header is not read again that was compared with the index, as long as nobody
        has touched the shard's file or its rows since.

        Raises:
            IntegrityError: A shard is missing or damaged, or lacks a block.
        """
        found = []
        for shard, run in groupby(places, key=lambda place: place.shard):
            with self.healing(shard):
                known = self._contents(shard)
                for place in run:
                    codec = known.get(place)
                    if codec is None:
                        codec = self._find(self._header(shard), place).codec
                    found.append(Described(codec, place.bits, place.is_lossless))
        return found

    def _contents(self, shard: str) -> Mapping[Place, str]:
        """Return the blocks of a shard with their codecs; none where nobody knows."""
        # The stamp is asked each time: a cached word counts only for the file it was
        # read of.
        stamp = stamp_of(os.stat(shard_file(self._shards, shard)))
        kept = self._compared.get(shard)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        noted = self.index.compared_with(shard)
        if noted is None or noted[0] != stamp:
            return {}
        rows = self.index.rows_in(shard)
        # One name stands for all blocks where all have the same codec.
        codecs = noted[2] * len(rows) if len(noted[2]) == 1 else noted[2]
        if _digest(rows) != noted[1] or len(codecs) != len(rows):
            return {}
        places = (place for place, _ in rows)
        found = dict(zip(places, codecs, strict=True))
        self._compared[shard] = stamp, found
        if len(self._compared) > _MAX_HEADERS:
            self._compared.popitem(last=False)
        return found

    def add(self, staged: StagedShard, added_at: float) -> None:
        """Publish a shard and index it, inside a transaction of the index.

        Args:
            staged: The shard, synced.
            added_at: Since when its blocks are in the store, Unix seconds.

        Raises:
            OSError: There is no index but in memory, for a full disk say.
        """
        self.refuse_memory()
        for basis in bases_named(staged.header.blocks):
            basis_size(self.folder, basis)  # one that `prune` has removed meanwhile
        # The file first: rows must never point at a shard that a crash kept from
        # existing. A file without rows is only waste, which `prune` finds.
        publish_shard(self.folder.shards, staged)
        index_shard(self.index, staged.name, staged.header, added_at)
        self.index.note_written(staged.header.nbytes)
        # Nobody knows better than who has just written both, so that the first look
        # for room need not read every shard.
        path = shard_path(self.folder.shards, staged.name)
        rows = self.index.rows_in(staged.name)
        _note(self.index, staged.name, staged.header, stamp_of(path.lstat()), rows)

    def add_new(self, staged: Sequence[StagedShard], token_bytes: int) -> None:
        """Publish shards of new blocks, as :meth:`add` does, and count them.

        Args:
            staged: The shards, synced.
            token_bytes: What one token's rows take in memory.
        """
        num_tokens = 0
        for shard in staged:
            # Shards are named by their bytes, so this may be one that was damaged
            # before.
            self.index.trust_shard(shard.name)
            self.add(shard, time.time())
            num_tokens += sum(len(b.block.tokens) for b in shard.header.blocks)
        self.index.count(
            written_bytes=sum(shard.header.nbytes for shard in staged),
            raw_bytes=num_tokens * token_bytes,
        )

    def add_root(self, root: BlockHash, origin: Origin) -> None:
        """Tell the index what blocks descend from, should it not know."""
        digest = digest_fields(origin.fingerprint)
        if (root, origin.layout) not in self.index.roots(digest):
            with self.index.transaction():
                self.index.add_root(root, digest, origin.layout)

    def drop_shards(self, shards: Mapping[str, Sequence[Place]]) -> None:
        """Drop the rows of shards, then their files.

        Args:
            shards: What is to go, and the blocks that each was seen to hold. One that
                another process has pointed blocks at since then stays.
        """
        with self.index.transaction():
            gone = [
                name
                for name, places in shards.items()
                if set(self.index.places_in(name)) == set(places)
            ]
            # Rows go first: whoever looks in between finds no block, not a missing
            # file.
            for name in gone:
                self.index.drop_shard(name)
        for name in gone:
            self.remove_unknown(name)

    def unnamed_bases(self, digests: Iterable[str]) -> set[str]:
        """Return those of some bases that no block names, as far as can be told.

        Where a shard cannot be read, nobody knows what it names.
        """
        named: dict[str, set[str]] = {}
        return set(digests).difference(*named.values()) if self._see(named) else set()

    def remove_bases(self, choose: Callable[[], Iterable[str]]) -> int:
        """Remove those of some bases that no block names, and return their bytes.

        Args:
            choose: Returns them, at the moment when nobody else can publish a shard.
        """
        named: dict[str, set[str]] = {}
        nbytes = 0
        if not self._see(named):  # most are read before others have to wait
            return 0
        # Who publishes a shard holds the same write lock of the index.
        with self.index.transaction():
            if self._see(named):
                for basis in set(choose()).difference(*named.values()):
                    nbytes += basis_size(self.folder, basis)
                    remove_basis(self.folder, basis)
        return nbytes

    def _see(self, named: dict[str, set[str]]) -> bool:
        """Note which bases shards name that are not noted yet; say if all could be."""
        for shard in set(list_shards(self.folder.shards)) - named.keys():
            try:
                with open_shard(self.folder, shard) as opened:
                    named[shard] = bases_named(opened.header.blocks)
            except FileNotFoundError:
                continue  # pruned just now
            except (IntegrityError, FormatError, OSError):
                return False
        return True

    def remove_unknown(self, name: str) -> None:
        """Remove the file of a shard, unless somebody has just published it again."""
        # Who publishes holds the same write lock of the index.
        with self.index.transaction():
            if not self.index.has_shard(name):
                with suppress(FileNotFoundError):
                    files.remove(shard_path(self.folder.shards, name))

    def replace(self, staged: StagedShard, old: Mapping[BlockHash, str]) -> None:
        """Publish copies of blocks, and point the index at them, even at worse ones.

        The old copies stay in their shards until :meth:`drop_copies`. If the index is
        rebuilt before that, it points at the better copies again.

        Args:
            staged: The shard, synced.
            old: In which shard each block lies.
        """
        with self.index.transaction():
            self.index.trust_shard(staged.name)
            self.add(staged, time.time())
            for stored in staged.header.blocks:
                place = place_in(staged.name, stored)
                self.index.replace_block(place, old[place.hash])

    def drop_copies(self, shards: Iterable[str]) -> None:
        """Rewrite shards without the blocks that lie elsewhere; hold no lock."""
        for name in shards:
            self.repack(name, {place.hash for place in self.index.places_in(name)})
            with files.locked(self.folder.lock, exclusive=True):
                self.drop_shards({name: ()})  # unless something is left there

    def repack(self, name: str, kept: set[BlockHash]) -> None:
        """Write some blocks of a shard into another, and point there.

        Their bytes are copied, never decoded.
        """
        folder = self.folder
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(open_shard(folder, name))
                stored = [b for b in opened.header.blocks if b.block.hash in kept]
                if not stored:
                    return
                copy = staged_copy(folder, opened, stored)
                staged = stack.enter_context(copy)
            except (IntegrityError, FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                return  # it stays as it is, for `verify` to report
            with self.index.transaction():
                self.add(staged, self.index.added_at(name))
                for block in kept:
                    self.index.move_block(block, name, staged.name)

    def stored(self, place: Place) -> StoredBlock:
        """Return what a shard's header says of a block.

        Raises:
            IntegrityError: The shard is missing or damaged, or lacks the block.
        """
        with self.healing(place.shard):
            return self._find(self._header(place.shard), place)

    def chain(self, entry: Entry) -> list[tuple[Place, StoredBlock]]:
        """Return the blocks of an entry, first to last.

        Raises:
            IntegrityError: One is missing or damaged.
        """
        found: list[tuple[Place, StoredBlock]] = []
        # By counting down tokens, not by parents alone: the walk ends even in a circle.
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
        with self.healing(place.shard):
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
        with self.healing(shard):
            header, blocks = self._locate(shard, places, root)
            opened = reopen_shard(self.folder.shards, shard, header)
            yield from zip(blocks, opened.read(blocks), strict=True)

    def locate(
        self, shard: str, places: Sequence[Place], root: BlockHash
    ) -> tuple[ShardHeader, list[StoredBlock]]:
        """Return a shard's header, and what it says of some blocks.

        Whoever then reads their bytes hands the errors to :meth:`healing`.

        Args:
            shard: The shard's name.
            places: Blocks in it.
            root: The root hash that they descend from.

        Raises:
            IntegrityError: The shard is missing or damaged, or lacks a block.
        """
        with self.healing(shard):
            return self._locate(shard, places, root)

    def _locate(
        self, shard: str, places: Sequence[Place], root: BlockHash
    ) -> tuple[ShardHeader, list[StoredBlock]]:
        header = self._header(shard)
        # First, since an index that lies is no reason to distrust a shard.
        blocks = [self._find(header, place) for place in places]
        if origin_root(header.origin) != root:
            path = shard_path(self.folder.shards, shard)
            raise IntegrityError(
                f"shard belongs to another model or layout: {path}", path=path
            )
        return header, blocks

    def _header(self, shard: str) -> ShardHeader:
        """Return a shard's header, read once for as long as nobody touches the file."""
        stamp = stamp_of(shard_path(self.folder.shards, shard).stat())
        kept = self._headers.get(shard)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        with open_shard(self.folder, shard) as opened:
            self._headers[shard] = (stamp, opened.header)
        if len(self._headers) > _MAX_HEADERS:
            self._headers.popitem(last=False)
        return opened.header

    def _find(self, header: ShardHeader, place: Place) -> StoredBlock:
        """Return a block of a shard that is what the index says of it.

        Raises:
            IndexDamagedError: It is not.
        """
        for stored in header.blocks:
            is_it = stored.block.hash == place.hash  # at once for nearly all
            if is_it and place_in(place.shard, stored) == place and is_sound(stored):
                return stored
        raise IndexDamagedError(
            f"shard {place.shard[:12]} does not hold block"
            f" {place.hash.hex()[:12]} as it says",
            self.folder.index,
        )

    @contextmanager
    def healing(self, shard: str) -> Iterator[None]:
        """Take what is missing or damaged out of the index.

        Raises:
            IntegrityError: Something was.
        """
        try:
            yield
        except ValueError as error:
            raise IndexDamagedError(str(error), self.folder.index) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            self._forget_missing(shard)
            raise IntegrityError(
                f"shard {shard[:12]} is missing",
                path=shard_path(self.folder.shards, shard),
                hint="save the prompt again",
            ) from error
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            # The file stays in place, since a disk error may be temporary.
            self._forget(shard, None)
            raise IntegrityError(
                f"shard {shard[:12]} cannot be read: {error}",
                path=shard_path(self.folder.shards, shard),
                hint="save the prompt again; `kvstore verify` finds more",
            ) from error
        except IntegrityError as error:
            # One bad block leaves the others of its shard in use; a bad header condemns
            # all.
            self._forget(shard, error.block)
            if error.block is None:
                self._quarantine(shard)
            raise

    def _forget_missing(self, shard: str) -> None:
        """Drop a shard from the index, unless somebody has just published it again."""
        # Who publishes holds the same write lock of the index.
        self._headers.pop(shard, None)
        with self._writable(), self.index.transaction():
            if not shard_path(self.folder.shards, shard).exists():
                self.index.drop_shard(shard)

    def _forget(self, shard: str, block: str | None) -> None:
        """Drop a block, or all of a shard, from the index."""
        self._headers.pop(shard, None)
        with self._writable(), self.index.transaction():
            if block is None:
                self.index.drop_shard(shard)
            else:
                self.index.drop_block(BlockHash(bytes.fromhex(block)), shard)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Pass over what cannot be written now: the next reader tries it again."""
        with suppress(StoreLockedError, OSError):  # busy or read-only
            yield

    def _quarantine(self, shard: str) -> None:
        try:
            quarantine_shard(self.folder.shards, shard, self.folder.quarantine)
        except (OSError, ValueError):
            return  # it stays, unread: the index no longer names it


def is_sound(stored: StoredBlock) -> bool:
    """Whether a block's hash is that of its parent and tokens."""
    block = stored.block
    return hash_block_tokens(block.parent, block.tokens) == block.hash


def index_shard(index: Index, name: str, header: ShardHeader, added_at: float) -> None:
    """Tell the index what lies in a shard, and since when, in Unix seconds."""
    origin = header.origin
    fingerprint = digest_fields(origin.fingerprint)
    root = hash_root(fingerprint, origin.layout)
    index.add_root(root, fingerprint, origin.layout)
    index.add_shard(name, header.nbytes, added_at)
    # A block whose hash is not that of its tokens would be found by a prompt it does
    # not hold.
    for stored in filter(is_sound, header.blocks):
        index.add_block(stored.block, place_in(name, stored))


def place_in(shard: str, stored: StoredBlock) -> Place:
    """Return the place of a block in a shard."""
    return Place(
        stored.block.hash,
        shard,
        len(stored.block.tokens),
        stored.end - stored.begin,
        2 * stored.bits + stored.is_lossless,
        stored.num_extras,
    )


def index_folder(index: Index, folder: StoreFolder) -> None:
    """Tell the index of every shard in the store that can be read."""
    for _ in _index_each(index, folder):
        pass


def index_new(index: Index, folder: StoreFolder) -> None:
    """Tell the index of the shards that it does not know."""
    for _ in _index_each(index, folder, same=set(index.shards())):
        pass


def confirm_folder(
    index: Index, folder: StoreFolder, only: Collection[str] | None = None
) -> None:
    """Tell the index of every shard, and compare what it then says with all of them.

    Whoever removes shards by the index's word does this first. Copies that were found
    damaged need not be known.

    Args:
        index: The index.
        folder: The store.
        only: As :meth:`BlockStore.confirm` takes it.

    Raises:
        IndexDamagedError: The index says something else.
    """
    copies: dict[BlockHash, list[tuple[Place, BlockHash]]] = {}
    told = index.all_blocks()
    rows, stamps = _by_shard(told), _stamps(folder)
    digests = {shard: _digest(inside) for shard, inside in rows.items()}
    now = {name: (stamp, digests.get(name, b"")) for name, stamp in stamps.items()}
    before = {} if only is None else index.compared()
    same = {n for n, seen in before.items() if now.get(n) == seen}
    # A block that hangs from nothing known is read again: its root may have been lost
    # from the index alone, and only the header can say.
    same &= set(index.shards()) - _rootless(index, told) - set(only or ())
    compared = {}
    for name, header in _index_each(index, folder, told, same):
        if name in now and all(_is_told(told, name, b) for b in header.blocks):
            compared[name] = header
        for stored in filter(is_sound, header.blocks):
            # A block may lie in several shards. The index has to name one of these
            # copies, and may name any.
            copy = (place_in(name, stored), stored.block.parent)
            copies.setdefault(stored.block.hash, []).append(copy)
    for block, known in copies.items():
        if told.get(block) in known:
            continue
        # Others save and prune meanwhile.
        found = next(index.chain(block), None)
        # Gone with their shards, which another process has pruned, or set aside.
        left = [p for p, _ in known if not index.is_damaged(block, p.shard)]
        if found is None and not any(_is_there(folder, place) for place in left):
            continue
        if found not in known and not _is_so(folder, found):
            raise IndexDamagedError(
                f"block {block.hex()[:12]} is not where it says", folder.index
            )
    # A store that may only be read is compared anew each time.
    if compared:
        with suppress(StoreLockedError, OSError), index.unsynced():
            for name, header in compared.items():
                _note(index, name, header, stamps[name], rows.get(name, ()))


def _note(
    index: Index,
    name: str,
    header: ShardHeader,
    stamp: str,
    rows: Sequence[tuple[Place, BlockHash]],
) -> None:
    """Note that an index says of a shard what its header does."""
    codecs = {stored.block.hash: stored.codec for stored in header.blocks}
    if all(place.hash in codecs for place, _ in rows):
        named = [codecs[place.hash] for place, _ in rows]
        index.note_compared(name, stamp, _digest(rows), named)


def _by_shard(
    told: Mapping[BlockHash, tuple[Place, BlockHash]],
) -> dict[str, list[tuple[Place, BlockHash]]]:
    found: dict[str, list[tuple[Place, BlockHash]]] = {}
    for place, parent in told.values():
        found.setdefault(place.shard, []).append((place, parent))
    return found


def _digest(rows: Iterable[tuple[Place, BlockHash]]) -> bytes:
    """Return a digest of what an index says of blocks, in the order of their hashes."""
    digest = blake3.blake3()
    for place, parent in rows:
        numbers = (place.num_tokens, place.nbytes, place.bits, place.num_extras)
        data = struct.pack("<4q?", *numbers, place.is_lossless)
        digest.update(place.hash + parent + data)
    return digest.digest()


def _rootless(
    index: Index, told: Mapping[BlockHash, tuple[Place, BlockHash]]
) -> set[str]:
    """Return shards with blocks of which the index knows neither parent nor root."""
    begins = index.root_hashes() | told.keys()
    return {place.shard for place, parent in told.values() if parent not in begins}


def _stamps(folder: StoreFolder) -> dict[str, str]:
    """Return what changes where the file of a shard does."""
    found, shards = {}, folder.shards
    for name in list_shards(shards):
        with suppress(FileNotFoundError):
            found[name] = stamp_of(os.lstat(shard_path(shards, name)))
    return found


def _is_there(folder: StoreFolder, place: Place) -> bool:
    return shard_path(folder.shards, place.shard).exists()


def _is_so(folder: StoreFolder, found: tuple[Place, BlockHash] | None) -> bool:
    """Whether a place is right after all: others save and prune meanwhile."""
    if found is None:
        return False
    place, parent = found
    try:
        with open_shard(folder, place.shard) as opened:
            return (place, parent) in [
                (place_in(place.shard, stored), stored.block.parent)
                for stored in opened.header.blocks
            ]
    except (IntegrityError, FormatError, OSError, ValueError):
        return False


def _index_each(
    index: Index,
    folder: StoreFolder,
    told: Mapping[BlockHash, tuple[Place, BlockHash]] = MappingProxyType({}),
    same: Collection[str] = (),
) -> Iterator[tuple[str, ShardHeader]]:
    """Tell the index of one shard after the other, and yield name and header.

    Args:
        index: The index.
        folder: The store.
        told: What the index says of blocks; a shard that it knows is not told again.
        same: Shards to pass over.
    """
    # Their layouts are parsed too: a damaged one has the index rebuilt.
    shards, roots = set(index.shards()), {root for root, *_ in index.all_roots()}
    for name in list_shards(folder.shards):
        if name in same:
            continue
        try:
            with open_shard(folder, name) as opened:
                header = opened.header
            added_at = shard_path(folder.shards, name).stat().st_mtime
        except (IntegrityError, FormatError, OSError):
            continue  # it stays where it is, and `verify` reports it
        is_told = name in shards and origin_root(header.origin) in roots
        if is_told and all(_is_told(told, name, b) for b in header.blocks):
            yield name, header
            continue
        with index.transaction():
            # `prune` holds the same write lock while it removes the file.
            is_there = shard_path(folder.shards, name).exists()
            if is_there:
                index_shard(index, name, header, added_at)
        if is_there:
            yield name, header


def _is_told(
    told: Mapping[BlockHash, tuple[Place, BlockHash]], name: str, stored: StoredBlock
) -> bool:
    """Whether the index knows this copy of a block, or another one."""
    known = told.get(stored.block.hash)
    if known is None:
        return False
    mine = place_in(name, stored)
    if known[0].shard == name:
        return known == (mine, stored.block.parent)
    new, old = ((place.num_extras, place.bits) for place in (mine, known[0]))
    return not is_better(new, old)
