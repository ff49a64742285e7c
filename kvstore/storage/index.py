"""SQLite: which shard holds which block. Opens no other file, knows no tensors.

The index is a cache of the shards' own headers: it may be thrown away, and what it
says is checked against the shard before it is believed.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from itertools import chain as chained
from itertools import islice, pairwise, starmap, takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import apsw

from ..errors import FormatError, IndexDamagedError, StoreLockedError
from ..format.block import EXACT_BITS, STATE_EXTRAS, Block, BlockHash
from ..format.documents import JSON
from . import files
from .cipher import Cipher


# A row as SQLite returns it, since a look makes hundreds.
class Place(NamedTuple):
    """Where the index says a block lies, and what may be asked of it."""

    # The block's hash.
    hash: BlockHash
    # Name of the shard that holds it.
    shard: str
    # How many tokens it has.
    num_tokens: int
    # Its bytes in the shard.
    nbytes: int
    # Its bits, doubled; 1 more where its codec loses nothing: of copies with as many
    # bits, lossless ones win.
    quality: int
    # How much it holds of windows and states: the rows of all its windows, outweighed
    # by a checkpoint. More makes a copy the better one.
    num_extras: int = 0

    @property
    def is_lossless(self) -> bool:
        """Whether its codec loses nothing."""
        return self.quality % 2 == 1

    @property
    def bits(self) -> int:
        """The fewest bits per number that its rows were coded in, or others were.

        These are rows that its own were computed from. ``EXACT_BITS`` where none were
        coded, 0 where nobody knows.
        """
        return self.quality // 2

    @property
    def is_exact(self) -> bool:
        """Whether nothing lossy went into its rows."""
        return self.bits == EXACT_BITS


class Link(NamedTuple):
    """What a block hangs from, and what it takes."""

    # Hash of the block before, or the root hash.
    parent: BlockHash
    # How many tokens it has.
    num_tokens: int
    # Its bytes in the shard, with its share of the header.
    nbytes: int


HASH_PREFIX = 8
"""Leading bytes of a hash that tell it from all others, where nothing depends on it."""


class Columns(NamedTuple):
    """What every block hangs from and what it takes, in the order of the table."""

    # The first ``HASH_PREFIX`` bytes of each hash, and of its parent, as written.
    hashes: bytearray
    parents: bytearray
    num_tokens: array[int]
    # In the shard, without a share of the header.
    nbytes: array[int]
    # The number of each one's shard.
    shards: array[int]


@dataclass(frozen=True, slots=True)
class Timing:
    """What was observed of computing or restoring rows of a model.

    All are sums over observations, in which older ones weigh less.
    """

    # Digest of the model's fingerprint.
    fingerprint: str
    # What was restored from, or ``None`` where rows were computed.
    codec: str | None
    # What the model was called last; advisory.
    model: str
    # Number of observations.
    num: float
    tokens: float
    seconds: float
    # Squares of tokens.
    squares: float
    # Products of tokens and seconds.
    products: float
    # When the last one was made, Unix seconds.
    measured_at: float


@dataclass(frozen=True, slots=True)
class Score:
    """What the requests of one conversation with a server took, in tokens."""

    # Tells it from others: as it is noted, a hash of how it begins; as it is written,
    # one of that, of the model and of a key of the store's.
    id: bytes
    # Digest of the model's fingerprint, and what the model was called last.
    fingerprint: str
    model: str
    num_requests: int
    # Rows of prompts that were held; of these, ``num_reanchored`` at most were moved.
    from_memory: int
    from_disk: int
    num_reanchored: int
    num_computed: int
    # Computed beyond what each prompt had more than the one before and its reply.
    num_again: int
    # The most of them in one request, and why: a cause of ``models.changes``, or words.
    worst: int
    why: str
    # Of the last prompt and its reply.
    num_tokens: int
    # When the first and the last request ended, Unix seconds.
    began_at: float
    used_at: float


SCHEMA_VERSION = 1
# Blocks that begin with the same token behind the same parent; a longer list costs
# more to compare than a shorter hit.
MAX_CHILDREN = 512
# What a counter of bytes written on one day begins with.
_WRITTEN = "written_on_"
_SCHEMA = """
CREATE TABLE shards (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    nbytes INTEGER NOT NULL,
    added_at REAL NOT NULL
);
CREATE TABLE roots (
    hash BLOB PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    layout TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX roots_by_fingerprint ON roots (fingerprint);
CREATE TABLE blocks (
    hash BLOB PRIMARY KEY,
    parent BLOB NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards (id),
    first_token INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    quality INTEGER NOT NULL,  -- its bits, doubled; 1 more where it is lossless
    extras INTEGER NOT NULL  -- rows of windows and states held
) WITHOUT ROWID;
CREATE INDEX blocks_by_parent ON blocks (parent, first_token);
CREATE INDEX blocks_by_shard ON blocks
    (shard, hash, num_tokens, nbytes, quality, extras);  -- all that a Place says
CREATE TABLE uses (  -- of blocks in which hits ended; may be lost
    hash BLOB PRIMARY KEY,
    used_at REAL NOT NULL,  -- by the last one
    summed REAL NOT NULL  -- all of them; `ops.worth` says how
) WITHOUT ROWID;
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE entries (  -- a second copy of each entry's file, by its id
    id TEXT PRIMARY KEY,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE damaged (  -- copies of blocks that are never to be indexed again
    hash BLOB NOT NULL,
    shard TEXT NOT NULL,
    PRIMARY KEY (hash, shard)
) WITHOUT ROWID;
"""
# Made when it is first written: an index of an earlier release lacks it, and that
# release reads an index that has it.
_TIMINGS = """
CREATE TABLE IF NOT EXISTS timings (  -- may be lost
    fingerprint TEXT NOT NULL,
    codec TEXT NOT NULL,  -- empty where rows were computed
    model TEXT NOT NULL,
    num REAL NOT NULL,
    tokens REAL NOT NULL,
    seconds REAL NOT NULL,
    squares REAL NOT NULL,
    products REAL NOT NULL,
    measured_at REAL NOT NULL,
    PRIMARY KEY (fingerprint, codec)
) WITHOUT ROWID
"""
# The same.
_SCORES = """
CREATE TABLE IF NOT EXISTS scores (  -- may be lost
    id BLOB PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    model TEXT NOT NULL,
    num_requests INTEGER NOT NULL,
    from_memory INTEGER NOT NULL,
    from_disk INTEGER NOT NULL,
    num_reanchored INTEGER NOT NULL,
    num_computed INTEGER NOT NULL,
    num_again INTEGER NOT NULL,
    worst INTEGER NOT NULL,
    why TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    began_at REAL NOT NULL,
    used_at REAL NOT NULL
) WITHOUT ROWID
"""
# With the key, ids of conversations are hashed: who has only these can try no guess at
# what was said. A purge makes another one, and nothing noted before it is written.
_SCORE_KEY = """
CREATE TABLE IF NOT EXISTS score_key (key BLOB NOT NULL, since REAL NOT NULL)
"""
# What the entries' files are known to hold, for as long as nobody touches them; made
# where an index of an earlier release lacks it.
_SEEN = """
CREATE TABLE IF NOT EXISTS seen (
    id TEXT PRIMARY KEY,
    stamp TEXT NOT NULL,  -- of the file when it was read
    digest BLOB NOT NULL,  -- of its bytes, which are those of its copy
    evictable INTEGER NOT NULL  -- its bytes, where a save may evict it; else 0
) WITHOUT ROWID
"""
# Shards whose headers were compared with the index, and what it said of them then.
_COMPARED = """
CREATE TABLE IF NOT EXISTS confirmed (  -- may be lost
    shard TEXT PRIMARY KEY,
    stamp TEXT NOT NULL,  -- of the file when its header was read
    digest BLOB NOT NULL,  -- of the rows of the blocks in it
    codecs TEXT NOT NULL  -- of these, in their order; once, where all have the same
) WITHOUT ROWID
"""
# No file was seen yet, but what may be evicted counts from now on.
_SEE_COPIES = """
INSERT OR IGNORE INTO seen SELECT id, '', x'', iif(
    json_extract(CAST(body AS TEXT), '$.name', '$.pinned') = '[null,false]',
    json_extract(CAST(body AS TEXT), '$.nbytes'), 0
) FROM entries
"""
_TIMING_COLUMNS = (
    "fingerprint, codec, model, num, tokens, seconds, squares, products, measured_at"
)
_SCORE_COLUMNS = ", ".join(field.name for field in fields(Score))
_FROM = "FROM blocks JOIN shards ON shards.id = blocks.shard "
_COLUMNS = """SELECT blocks.hash, shards.name, blocks.num_tokens, blocks.nbytes,
    blocks.quality, blocks.extras"""
_PLACE = f"{_COLUMNS} {_FROM}"
# Given a JSON list of hashes in hex.
_PLACES = f"""{_COLUMNS} FROM json_each(?) AS wanted
    CROSS JOIN blocks ON blocks.hash = unhex(wanted.value)
    JOIN shards ON shards.id = blocks.shard"""
_PLACE_AND_PARENT = f"{_COLUMNS}, blocks.parent {_FROM}"
# The same as `is_better`, of the copy that is new against the one that is there.
_BETTER = f"""
(excluded.extras >= {STATE_EXTRAS} AND blocks.extras < {STATE_EXTRAS})
OR (excluded.extras >= blocks.extras AND excluded.quality >= blocks.quality
    AND (excluded.extras > blocks.extras OR excluded.quality > blocks.quality))
"""
_SHARD_OF_BLOCK = "SELECT shard FROM blocks WHERE hash = ?1"
_SHARD_OF_NAME = "SELECT id FROM shards WHERE name = ?1"
_INSIDE = """SELECT name, 0, 0, 0, 0 FROM shards WHERE id = ({0}) UNION ALL
SELECT hash, num_tokens, nbytes, quality, extras FROM blocks INDEXED BY blocks_by_shard
    WHERE shard = ({0})"""
_BESIDE = "blocks INDEXED BY blocks_by_parent WHERE parent = ?1 AND first_token = ?2"
_TOLD = f"""SELECT hash, num_tokens FROM blocks WHERE hash = ?3 AND iif(
    EXISTS (SELECT 1 FROM {_BESIDE} LIMIT 1 OFFSET {MAX_CHILDREN - 1}), 1,
    EXISTS (SELECT 1 FROM {_BESIDE} AND +hash = ?3))"""
_INSIDES = (bytes, int, int, int, int)
_PLACE_KINDS = (bytes, str, int, int, int, int)
_SHARED_BYTES = 65_536
_SCORE_KEY_BYTES = 32
# How SQLite says that the file system maps no file shared; a full disk is another code.
_UNSHARED = (apsw.SQLITE_IOERR_SHMMAP, apsw.SQLITE_IOERR_SHMLOCK)


class Index:
    """An open index.

    Args:
        path: The database file.
        create: Make it, where an existing one is asked for otherwise.
        temporary: Keep it in memory, for a store that cannot be written to.
        copied: Fill it from the file, which is neither locked nor written to.
        timeout_s: How long to wait for another process's write.
        cipher: Of an encrypted store: of texts and bytes, hashes too, and of first
            tokens only what stands for them is written; of numbers, these.

    Attributes:
        identity: Device and inode, which tell this file from one that replaced it.
        is_temporary: It is in memory.

    Raises:
        IndexDamagedError: The file is damaged; throw it away and rebuild it.
        StoreLockedError: Another process kept it locked.
        FormatError: A newer release wrote it.
    """

    def __init__(
        self,
        path: Path,
        *,
        create: bool = False,
        temporary: bool = False,
        copied: bool = False,
        timeout_s: float = 10.0,
        cipher: Cipher | None = None,
    ) -> None:
        self.path = path
        self._cipher = cipher
        self.identity: tuple[int, int] | None = None
        self.is_temporary = temporary
        with self._translated():
            if create and not temporary:
                _touch(path)
            name = ":memory:" if temporary else str(path)
            self._connection = _connect(name, timeout_s, create)
            if copied:
                self._copy(path)
            if not temporary:
                self.identity = index_identity(path)
            self._prepare(create)

    def _copy(self, path: Path) -> None:
        # Whatever another process has not put into the file yet is left out.
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        source = apsw.Connection(f"{path.absolute().as_uri()}?immutable=1", flags)
        try:
            with self._connection.backup("main", source, "main") as copy:
                copy.step()
        finally:
            source.close()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block at once, or none of them.

        Raises:
            IndexDamagedError: Another process has rebuilt the index, so that what is
                written to this file is lost. A caller that holds the store's lock can
                only meet this at the start, since rebuilding takes that lock.
        """
        with self._translated():
            # IMMEDIATE takes the write lock now. A lock that a read had to be raised to
            # could meet another writer's and fail halfway.
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_current()
            yield
        except BaseException:
            # SQLite itself rolls back after some errors.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        with self._translated():
            try:
                self._connection.execute("COMMIT")
            except BaseException:
                # A COMMIT that failed, on a full disk say, leaves it open.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        # Whoever replaced the file meanwhile may have read the shards before this
        # COMMIT, so that what was written here is known to nobody.
        self._check_current()

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Let all queries inside the block see the same state."""
        with self._translated(), self._connection:
            yield

    def _check_current(self) -> None:
        if self.identity and self.identity != index_identity(self.path):
            raise self._damaged("another index has taken its place")

    def place(self, block: BlockHash) -> Place | None:
        """Return where a block lies, or ``None``."""
        rows = self._select(_PLACE + "WHERE blocks.hash = ?", (block,), _PLACE_KINDS)
        return Place(*rows[0]) if rows else None

    def place_of(self, block: Block) -> Place | None:
        """Return where a block lies, as :meth:`places_of` does."""
        return self.places_of([block])[0]

    def places_unchecked(self, hashes: Sequence[BlockHash]) -> list[Place | None]:
        """Return where blocks lie, without the look at parents of :meth:`places_of`.

        One statement looks for all of them.
        """
        written = json.dumps([*map(bytes.hex, map(self.written, hashes))])
        with self._translated():
            rows = self._connection.execute(_PLACES, [written]).fetchall()
        new = tuple.__new__  # which takes half as long as calling the class
        found = {
            row[0]: new(Place, row)
            for row in self._checked(self._shown(rows), _PLACE_KINDS)
        }
        return [found.get(block) for block in hashes]

    def places_of(self, blocks: Sequence[Block]) -> list[Place | None]:
        """Return where blocks lie, where the index knows them as what they are.

        Raises:
            IndexDamagedError: The index says otherwise, so it is damaged.
        """
        with self._snapshot():  # `prune` may drop a block between the looks
            hashes = [block.hash for block in blocks]
            found = list(chained.from_iterable(self._look(hashes)))
            held = [b for b, place in zip(blocks, found, strict=True) if place]
            told = dict(self._told_of(held))
        for block in held:
            if told.get(block.hash) != len(block.tokens):
                raise self._damaged(f"block {block.hash.hex()[:12]} is another there")
        return found

    def _told_of(self, blocks: Sequence[Block]) -> list[tuple[bytes, int]]:
        """Return hash and number of tokens of blocks that are found by their parents.

        So a prompt that leaves a chain halfway will look for them: by parent and first
        token alone, since a flipped bit may hide a row from one look and not from
        another. Behind a parent of more children than it looks at, all count.
        """
        keys = [
            (b.parent, self._first_of(b.parent, b.tokens[0]), b.hash) for b in blocks
        ]
        with self._translated():
            written = [[*map(self.written, key)] for key in keys]
            rows = self._connection.executemany(_TOLD, written).fetchall()
        return self._checked(self._shown(rows), (bytes, int))

    def chain(self, tip: BlockHash) -> Iterator[tuple[Place, BlockHash]]:
        """Yield the blocks from a tip backwards with their parents, up to a gap.

        The index's word only: whoever deletes by it checks where the chain ends.
        """
        query = _PLACE_AND_PARENT + "WHERE blocks.hash = ?"
        # A damaged index may hold a circle of parents.
        seen: set[BlockHash] = set()
        kinds = (*_PLACE_KINDS, bytes)
        while tip not in seen and (rows := self._select(query, (tip,), kinds)):
            seen.add(tip)
            tip = BlockHash(rows[0][6])
            yield Place(*rows[0][:6]), tip

    def all_blocks(self) -> dict[BlockHash, tuple[Place, BlockHash]]:
        """Return where every block lies, and its parent.

        Of the table itself, as who looks for one block reads it. A join goes by an
        index of the table, which may say otherwise where a bit has flipped.

        Raises:
            IndexDamagedError: The table is not in the order that a look goes by.
        """
        query = "SELECT id, name, nbytes FROM shards NOT INDEXED"
        shards = self._select(query, (), (int, str, int))
        names: dict[int, str] = {number: name for number, name, _ in shards}
        query = (
            "SELECT hash, shard, num_tokens, nbytes, quality, extras, parent"
            " FROM blocks NOT INDEXED"
        )
        written = self._execute(query, ())
        pairs = (*pairwise(shards), *pairwise(written))
        with self._translated():  # a flipped bit makes a hash of another type
            is_mixed = any(left[0] >= right[0] for left, right in pairs)
        if is_mixed:
            raise self._damaged("blocks are out of order")
        rows = self._checked(self._shown(written), (bytes, *(int,) * 5, bytes))
        return {
            BlockHash(block): (
                Place(block, names[shard], *numbers),
                BlockHash(parent),
            )
            for block, shard, *numbers, parent in rows
            if shard in names
        }

    def longest_prefix(self, chain: Sequence[BlockHash]) -> list[Place]:
        """Return the places of the leading blocks of ``chain`` up to the first gap."""
        # One state for the whole walk: `prune` drops blocks in any order.
        with self._snapshot():
            found = takewhile(bool, chained.from_iterable(self._look(chain)))
            return cast(list[Place], list(found))

    def _look(self, hashes: Sequence[BlockHash]) -> Iterator[list[Place | None]]:
        """Yield where blocks lie, in runs of those that were saved side by side."""
        at = 0
        while at < len(hashes):
            block = hashes[at]
            # A save put the next ones there too.
            known = self._places_in(_SHARD_OF_BLOCK, block)
            beside = map(known.get, hashes[at + 1 : at + len(known)])
            # A flipped bit may hide it there.
            run = [known.get(block) or self.place(block), *takewhile(bool, beside)]
            yield run
            at += len(run)

    def children(self, parent: BlockHash, first_token: int) -> list[Place]:
        """Return the places of blocks that follow ``parent`` with this token."""
        query = (
            "WHERE blocks.parent = ? AND blocks.first_token = ? ORDER BY blocks.hash"
            f" LIMIT {MAX_CHILDREN}"
        )
        values = (parent, self._first_of(parent, first_token))
        rows = self._select(_PLACE + query, values, _PLACE_KINDS)
        return list(starmap(Place, rows))

    def followers(self, parent: BlockHash) -> list[Place]:
        """Return the places of blocks that follow ``parent``, whatever they hold."""
        query = f"WHERE blocks.parent = ? ORDER BY blocks.hash LIMIT {MAX_CHILDREN}"
        rows = self._select(_PLACE + query, (parent,), _PLACE_KINDS)
        return list(starmap(Place, rows))

    def has_children(self, parent: BlockHash) -> bool:
        """Whether any block follows ``parent``."""
        query = "SELECT 1 FROM blocks WHERE parent = ? LIMIT 1"
        return bool(self._query(query, (parent,)))

    def places_in(self, shard: str) -> list[Place]:
        """Return the places of all blocks that the index puts into a shard."""
        return list(self._places_in(_SHARD_OF_NAME, shard).values())

    def _places_in(self, shard: str, value: bytes | str) -> dict[bytes, Place]:
        """Return the places of all blocks of the shard that a query finds."""
        # They lie side by side in the index of shards, where one costs a tenth of a
        # look. The first row is the shard's own; one that it does not know has none.
        rows = self._query(_INSIDE.format(shard), (value,))
        if not rows or not isinstance(name := rows[0][0], str):
            return {}
        del rows[0]
        new = tuple.__new__  # which takes half as long as calling the class
        return {
            block: new(Place, (block, name, tokens, size, quality, extras))
            for block, tokens, size, quality, extras in self._checked(rows, _INSIDES)
        }

    def rows_in(self, shard: str) -> list[tuple[Place, BlockHash]]:
        """Return the places of the blocks of a shard with their parents.

        Of the table itself, as :meth:`all_blocks` does.
        """
        hashes = [place.hash for place in self.places_in(shard)]
        marks = ",".join("?" * len(hashes))
        query = (
            f"{_PLACE_AND_PARENT}WHERE blocks.hash IN ({marks}) ORDER BY blocks.hash"
        )
        rows = self._select(query, hashes, (*_PLACE_KINDS, bytes))
        return [(Place(*row[:6]), BlockHash(row[6])) for row in rows]

    def lost_blocks(self) -> list[BlockHash]:
        """Return the blocks whose shard the index does not know."""
        query = "SELECT hash FROM blocks WHERE shard NOT IN (SELECT id FROM shards)"
        rows = self._select(query, (), (bytes,))
        return [BlockHash(block) for (block,) in rows]

    def roots(self, fingerprint: str) -> list[tuple[BlockHash, JSON]]:
        """Return the root hash and layout of everything one model has stored."""
        query = "SELECT hash, layout FROM roots WHERE fingerprint = ?"
        values = (fingerprint,)
        rows = self._select(query + " ORDER BY hash", values, (bytes, str))
        with self._translated():
            return [(BlockHash(root), json.loads(layout)) for root, layout in rows]

    def all_roots(self) -> list[tuple[BlockHash, str, Any]]:
        """Return root hash, fingerprint's digest and layout of everything."""
        query = "SELECT hash, fingerprint, layout FROM roots ORDER BY hash"
        rows = self._select(query, (), (bytes, str, str))
        with self._translated():
            return [
                (BlockHash(root), fingerprint, json.loads(layout))
                for root, fingerprint, layout in rows
            ]

    def root_hashes(self) -> set[BlockHash]:
        """Return the root hashes of everything."""
        query = "SELECT hash FROM roots"
        return {BlockHash(root) for (root,) in self._select(query, (), (bytes,))}

    def shards(self) -> dict[str, int]:
        """Return name and bytes of every shard."""
        query = "SELECT name, nbytes FROM shards ORDER BY name"
        return dict(self._select(query, (), (str, int)))

    def nbytes(self) -> int:
        """Return the bytes of all shards."""
        query = "SELECT coalesce(sum(nbytes), 0) FROM shards"
        return int(self._select(query, (), (int,))[0][0])

    def has_shard(self, name: str) -> bool:
        """Whether it knows a shard."""
        return bool(self._query("SELECT 1 FROM shards WHERE name = ?", (name,)))

    def contents(self) -> dict[str, tuple[float, list[Place]]]:
        """Return when each shard was added, Unix seconds, and the blocks in it."""
        query = "SELECT name, added_at FROM shards ORDER BY name"
        rows = self._select(query, (), (str, float))
        found: dict[str, tuple[float, list[Place]]] = {n: (at, []) for n, at in rows}
        for row in self._select(_PLACE + "ORDER BY blocks.hash", (), _PLACE_KINDS):
            if row[1] in found:  # else it was added just now
                found[row[1]][1].append(Place(*row))
        return found

    def added_at(self, shard: str) -> float:
        """Return when a shard was added, Unix seconds; 0 for one not known."""
        query = "SELECT added_at FROM shards WHERE name = ?"
        rows = self._select(query, (shard,), (float,))
        return float(rows[0][0]) if rows else 0.0

    def uses(self) -> dict[BlockHash, tuple[float, float]]:
        """Return when a hit last ended in each block, and the sum of all such hits.

        Both in Unix seconds; `ops.worth` says how hits are summed.
        """
        query = "SELECT hash, used_at, summed FROM uses"
        rows = self._select(query, (), (bytes, float, float))
        return {BlockHash(block): (used_at, summed) for block, used_at, summed in rows}

    def counters(self) -> dict[str, int]:
        """Return all counters by name."""
        return dict(self._select("SELECT name, value FROM counters", (), (str, int)))

    def count(self, **amounts: int) -> None:
        """Add to counters."""
        for name, amount in amounts.items():
            self._query(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name)"
                " DO UPDATE SET value = value + excluded.value",
                (name, amount),
            )

    def note_written(self, nbytes: int) -> None:
        """Count bytes for the day that it is, and let go of the days before."""
        name = _today()
        query = "DELETE FROM counters WHERE name LIKE ? AND name <> ?"
        self._query(query, (f"{_WRITTEN}%", name))
        self.count(**{name: nbytes})

    def written_today(self) -> int:
        """Return how many bytes of shards were written since midnight, UTC."""
        return self.counters().get(_today(), 0)

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """As :meth:`transaction`, for what a power cut may take."""
        # With a write-ahead log NORMAL still keeps the file whole; a power cut takes
        # the last transactions, which a use or a timing is not worth an fsync to keep.
        self._query("PRAGMA synchronous = NORMAL")
        try:
            with self.transaction():
                yield
        finally:
            self._query("PRAGMA synchronous = FULL")

    def note_use(
        self,
        block: BlockHash,
        used_at: float,
        add: Callable[[Sequence[float]], float],
    ) -> None:
        """Remember that a hit ended in a block.

        Args:
            block: The block.
            used_at: When, Unix seconds.
            add: Sums uses.
        """
        query = "SELECT summed FROM uses WHERE hash = ?"
        sums = [summed for (summed,) in self._select(query, (block,), (float,))]
        values = (block, used_at, add([*sums, used_at]))
        self._query("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", values)

    def timings(self, fingerprint: str | None = None) -> list[Timing]:
        """Return what was measured of one model, or of all, latest first."""
        if not self._has_table("timings"):
            return []
        kinds = (str, str, str, *(float,) * 6)
        query = (
            f"SELECT {_TIMING_COLUMNS} FROM timings"
            " WHERE ?1 IS NULL OR fingerprint = ?1 ORDER BY measured_at DESC"
        )
        return [
            Timing(fingerprint, codec or None, *rest)
            for fingerprint, codec, *rest in self._select(query, (fingerprint,), kinds)
        ]

    def put_timing(self, timing: Timing) -> None:
        """Remember what was measured, in place of what was known of the same."""
        self._query(_TIMINGS)
        values = astuple(replace(timing, codec=timing.codec or ""))
        self._query(
            f"INSERT OR REPLACE INTO timings ({_TIMING_COLUMNS})"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )

    def drop_timings(self, before: float) -> None:
        """Forget what was measured last before a time, Unix seconds."""
        self._query("DELETE FROM timings WHERE measured_at < ?", (before,))

    def scores(self) -> list[Score]:
        """Return what conversations have cost, the latest first."""
        if not self._has_table("scores"):
            return []
        kinds = (bytes, str, str, *(int,) * 7, str, int, float, float)
        query = f"SELECT {_SCORE_COLUMNS} FROM scores ORDER BY used_at DESC"
        return [Score(*row) for row in self._select(query, (), kinds)]

    def put_score(self, score: Score) -> None:
        """Remember what a conversation has cost, in place of what was known of it."""
        self._query(_SCORES)
        marks = ", ".join("?" * len(fields(Score)))
        query = f"INSERT OR REPLACE INTO scores ({_SCORE_COLUMNS}) VALUES ({marks})"
        self._query(query, astuple(score))

    def drop_scores(self, *, keep: int) -> None:
        """Forget what all but the latest conversations have cost."""
        latest = "SELECT id FROM scores ORDER BY used_at DESC LIMIT ?"
        self._query(f"DELETE FROM scores WHERE id NOT IN ({latest})", (keep,))

    def score_key(self) -> tuple[bytes, float]:
        """Return what ids of conversations are hashed with, and since when it is."""
        self._query(_SCORE_KEY)
        query = "SELECT key, since FROM score_key"
        if not self._query(query):
            self.forget_scores(since=0.0)
        key, since = self._select(query, (), (bytes, float))[0]
        return key, since

    def forget_scores(self, *, since: float) -> None:
        """Forget all that conversations have cost until a time, Unix seconds."""
        for table in (_SCORES, _SCORE_KEY):
            self._query(table)
        for table in ("scores", "score_key"):
            self._query(f"DELETE FROM {table}")
        key = secrets.token_bytes(_SCORE_KEY_BYTES)
        self._query("INSERT INTO score_key VALUES (?, ?)", (key, since))

    def _has_table(self, name: str) -> bool:
        # Asked, not made: a store that may only be read has no way to make it.
        query = f"SELECT 1 FROM sqlite_master WHERE name = '{name}'"
        return bool(self._query(query))

    def links(self) -> dict[BlockHash, Link]:
        """Return what every block hangs from and what it takes."""
        query = "SELECT hash, parent, num_tokens, nbytes, shard FROM blocks NOT INDEXED"
        rows = self._select(query, (), (bytes, bytes, int, int, int))
        sizes, inner = self.shard_sizes(), Counter[int]()
        for *_, nbytes, shard in rows:
            inner[shard] += nbytes
        return {
            BlockHash(block): Link(
                BlockHash(parent),
                num_tokens,
                -(-nbytes * sizes[shard] // max(1, inner[shard])),
            )
            for block, parent, num_tokens, nbytes, shard in rows
            if shard in sizes
        }

    def columns(self) -> Columns:
        """Return all blocks by columns, which take 40 bytes a block."""
        found = Columns(bytearray(), bytearray(), array("q"), array("q"), array("q"))
        with self._translated():
            rows = self._connection.execute(
                "SELECT substr(hash, 1, ?1), substr(parent, 1, ?1), num_tokens, nbytes,"
                " shard FROM blocks NOT INDEXED",
                (HASH_PREFIX,),
            )
            while part := list(chained.from_iterable(islice(rows, 1000))):
                found.hashes.extend(b"".join(part[::5]))
                found.parents.extend(b"".join(part[1::5]))
                for i, column in enumerate(found[2:], 2):
                    column.fromlist(part[i::5])
        size = HASH_PREFIX * len(found.nbytes)
        if not len(found.hashes) == len(found.parents) == size:
            raise self._damaged("a hash is too short")
        return found

    def shard_sizes(self) -> dict[int, int]:
        """Return the bytes of each shard by its number."""
        return dict(self._select("SELECT id, nbytes FROM shards", (), (int, int)))

    def entry(self, entry_id: str) -> bytes | None:
        """Return the copy of an entry's file, or ``None``."""
        query = "SELECT body FROM entries WHERE id = ?"
        rows = self._select(query, (entry_id,), (bytes,))
        return rows[0][0] if rows else None

    def put_entry(self, entry_id: str, body: bytes) -> None:
        """Keep a copy of an entry's file."""
        query = "INSERT OR REPLACE INTO entries VALUES (?, ?)"
        self._query(query, (entry_id, body))

    def drop_entry(self, entry_id: str) -> None:
        """Forget an entry."""
        self._query("DELETE FROM entries WHERE id = ?", (entry_id,))
        self._query("DELETE FROM seen WHERE id = ?", (entry_id,))

    def entries(self) -> dict[str, tuple[bytes, str, bytes]]:
        """Return the copies of entries whose files were seen, by their ids.

        Each with the stamp of its file then, and the digest of the file's bytes.
        """
        query = "SELECT id, body, stamp, digest FROM entries JOIN seen USING (id)"
        rows = self._select(query, (), (str, bytes, str, bytes))
        return {entry_id: (body, *rest) for entry_id, body, *rest in rows}

    def see_entry(
        self, entry_id: str, body: bytes, stamp: str, digest: bytes, evictable: int
    ) -> None:
        """Note what an entry's file holds, inside a transaction.

        A copy that is there stays: it may be newer than the file that was read.
        """
        query = "INSERT OR IGNORE INTO entries VALUES (?, ?)"
        self._query(query, (entry_id, body))
        values = (entry_id, stamp, digest, evictable)
        self._query("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", values)

    def entry_ids(self) -> set[str]:
        """Return the ids of all entries of which there is a copy."""
        rows = self._select("SELECT id FROM entries", (), (str,))
        return {entry_id for (entry_id,) in rows}

    def evictable_bytes(self) -> int:
        """Return the bytes of the entries that a save may evict, shared ones too."""
        query = "SELECT coalesce(sum(evictable), 0) FROM seen"
        return int(self._select(query, (), (int,))[0][0])

    def add_root(self, root: BlockHash, fingerprint: str, layout: Any) -> None:
        """Remember what a root hash stands for."""
        self._query(
            "INSERT OR REPLACE INTO roots VALUES (?, ?, ?)",
            (root, fingerprint, json.dumps(layout)),
        )

    def add_shard(self, name: str, nbytes: int, added_at: float) -> None:
        """Remember a shard; one that is known already stays as it is."""
        self._query(
            "INSERT OR IGNORE INTO shards (name, nbytes, added_at) VALUES (?, ?, ?)",
            (name, nbytes, added_at),
        )

    def add_block(self, block: Block, place: Place) -> None:
        """Remember where a block lies; only a better copy replaces an older one."""
        self._query(
            "INSERT INTO blocks SELECT ?1, ?2, id, ?3, ?4, ?5, ?6, ?7 FROM shards"
            " WHERE name = ?8 AND NOT EXISTS"
            " (SELECT 1 FROM damaged WHERE hash = ?1 AND damaged.shard = ?8)"
            " ON CONFLICT (hash) DO UPDATE SET parent = excluded.parent,"
            " shard = excluded.shard, first_token = excluded.first_token,"
            " num_tokens = excluded.num_tokens, nbytes = excluded.nbytes,"
            " quality = excluded.quality, extras = excluded.extras"
            f" WHERE {_BETTER}"
            # A shard that is not known cannot be better.
            " OR blocks.shard NOT IN (SELECT id FROM shards)",
            (
                block.hash,
                block.parent,
                self._first_of(block.parent, block.tokens[0]),
                len(block.tokens),
                place.nbytes,
                place.quality,
                place.num_extras,
                place.shard,
            ),
        )

    def drop_block(self, block: BlockHash, shard: str) -> None:
        """Forget a damaged copy of a block, for as long as the index lasts."""
        self._query("INSERT OR IGNORE INTO damaged VALUES (?, ?)", (block, shard))
        self._query(
            "DELETE FROM blocks WHERE hash = ?"
            " AND shard = (SELECT id FROM shards WHERE name = ?)",
            (block, shard),
        )

    def move_block(self, block: BlockHash, old: str, new: str) -> None:
        """Say that a block of one shard lies in another now."""
        self._query(
            "UPDATE blocks SET shard = (SELECT id FROM shards WHERE name = ?)"
            " WHERE hash = ? AND shard = (SELECT id FROM shards WHERE name = ?)",
            (new, block, old),
        )

    def replace_block(self, place: Place, old: str) -> None:
        """Say that a block of one shard lies there now, in a copy better or not."""
        self._query(
            "UPDATE blocks SET shard = (SELECT id FROM shards WHERE name = ?),"
            " nbytes = ?, quality = ?, extras = ?"
            " WHERE hash = ? AND shard = (SELECT id FROM shards WHERE name = ?)",
            (
                place.shard,
                place.nbytes,
                place.quality,
                place.num_extras,
                place.hash,
                old,
            ),
        )

    def is_damaged(self, block: BlockHash, shard: str) -> bool:
        """Whether a copy of a block was found to be damaged."""
        query = "SELECT 1 FROM damaged WHERE hash = ? AND shard = ?"
        return bool(self._query(query, (block, shard)))

    def trust_shard(self, name: str) -> None:
        """Take back what was said of damage in a shard: it was written anew."""
        self._query("DELETE FROM damaged WHERE shard = ?", (name,))

    def drop_shard(self, name: str) -> None:
        """Forget a shard and all blocks in it."""
        blocks = "FROM blocks WHERE shard = (SELECT id FROM shards WHERE name = ?)"
        self._query(f"DELETE FROM uses WHERE hash IN (SELECT hash {blocks})", (name,))
        self._query(f"DELETE {blocks}", (name,))
        self._query("DELETE FROM shards WHERE name = ?", (name,))
        self._query("DELETE FROM confirmed WHERE shard = ?", (name,))

    def compared(self) -> dict[str, tuple[str, bytes]]:
        """Return the shards that were compared: their stamps, and digests of rows."""
        query = "SELECT shard, stamp, digest FROM confirmed"
        rows = self._select(query, (), (str, str, bytes))
        return {shard: (stamp, digest) for shard, stamp, digest in rows}

    def compared_with(self, shard: str) -> tuple[str, bytes, list[str]] | None:
        """Return the same of one shard, and the codecs of its blocks."""
        query = "SELECT stamp, digest, codecs FROM confirmed WHERE shard = ?"
        rows = self._select(query, (shard,), (str, bytes, str))
        return (*rows[0][:2], rows[0][2].split()) if rows else None

    def note_compared(
        self, shard: str, stamp: str, digest: bytes, codecs: Sequence[str]
    ) -> None:
        """Remember what a shard was compared with."""
        query = "INSERT OR REPLACE INTO confirmed VALUES (?, ?, ?, ?)"
        is_one = len(set(codecs)) == 1
        named = " ".join(codecs[:1] if is_one else codecs)
        self._query(query, (shard, stamp, digest, named))

    def compact(self) -> None:
        """Write the file anew, so that no byte of a deleted row is left in it.

        Raises:
            StoreLockedError: Another process reads or writes it.
        """
        # Both tables name blocks by their hashes, by which a purged prompt would be
        # known.
        self._query("DELETE FROM uses WHERE hash NOT IN (SELECT hash FROM blocks)")
        shards = "SELECT name FROM shards"
        self._query(f"DELETE FROM damaged WHERE shard NOT IN ({shards})")
        self._query("VACUUM")
        # VACUUM goes through the log: the file has the old pages until the log is
        # folded into it.
        if self._query("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
            raise StoreLockedError(
                f"the index is in use by another process: {self.path}",
                hint="wait for the other kvstore process to finish",
            )

    def check(self) -> list[str]:
        """Return what SQLite's own check finds wrong; empty where nothing is.

        It misses two of three flipped bits, so it is no proof of health.
        """
        rows = self._query("PRAGMA integrity_check")
        return [text for (text,) in rows if text != "ok"]

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._shown(self._execute(sql, values))

    def _execute(self, sql: str, values: Sequence[Any]) -> list[Any]:
        """Return rows as they are written."""
        if self._cipher is not None:
            values = [self.written(value) for value in values]
        with self._translated():
            return self._connection.execute(sql, values).fetchall()

    def written(self, value: Any) -> Any:
        """Return what stands in the file for a value: that itself, or it hidden."""
        if self._cipher is None or not isinstance(value, str | bytes):
            return value
        # The letter tells text from bytes when it is read again.
        text = b"s" + value.encode() if isinstance(value, str) else b"b" + value
        return self._cipher.hide(text)

    def _shown(self, rows: list[Any]) -> list[Any]:
        """Return rows of what is written as rows of what it stands for."""
        if self._cipher is None:
            return rows
        with self._translated():
            return [tuple(map(self._value_of, row)) for row in rows]

    def _value_of(self, written: Any) -> Any:
        if self._cipher is None or not isinstance(written, bytes):
            return written  # a number, or what SQLite itself says
        value = self._cipher.show(written)
        return value[1:].decode() if value[:1] == b"s" else value[1:]

    def _first_of(self, parent: BlockHash, token: int) -> int:
        """Return what is written of the first token of a block."""
        if self._cipher is None:
            return token
        # With its parent: alone, equal tokens would be equal numbers, which can be
        # counted.
        return self._cipher.number(parent + token.to_bytes(8, "little", signed=True))

    def _select(
        self, sql: str, values: Sequence[Any], kinds: tuple[type, ...]
    ) -> list[Any]:
        """Return rows whose columns are of these types.

        SQLite checks types when it writes; a flipped bit makes another one.
        """
        return self._checked(self._query(sql, values), kinds)

    def _checked(self, rows: list[Any], kinds: tuple[type, ...]) -> list[Any]:
        if [*map(type, chained.from_iterable(rows))] != [*kinds] * len(rows):
            raise self._damaged("a column is of another type")
        return rows

    def _damaged(self, why: str) -> IndexDamagedError:
        return IndexDamagedError(f"{self.path}: {why}", self.path)

    def _prepare(self, create: bool) -> None:
        """Set the connection up, and create the tables where there are none.

        An index that is not ours is not written to.
        """
        if not create:
            self._check_version()
        for pragma in (
            "synchronous = FULL",
            "journal_size_limit = 4194304",
            "trusted_schema = OFF",
            "secure_delete = ON",  # of what is removed, no name is left in it
            "cell_size_check = ON",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        if create and self._version() == 0:
            with self.transaction():
                # Asked again under the lock: another process may have made the tables.
                if self._version() == 0:
                    self._connection.execute(_SCHEMA)
                    self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._check_version()
        query = "SELECT 1 FROM sqlite_master WHERE name IN ('seen', 'confirmed')"
        if len(self._query(query)) < 2:
            with self.transaction():
                self._connection.execute(_SEEN)
                self._connection.execute(_SEE_COPIES)
                self._connection.execute(_COMPARED)

    def _check_version(self) -> None:
        version = self._version()
        if version == 0:
            raise self._damaged("it has no schema")
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"index has schema {version}, this release reads {SCHEMA_VERSION}:"
                f" {self.path}",
                hint="upgrade mlx-kvstore, or delete the index: it is rebuilt",
            )

    def _version(self) -> int:
        return int(self._query("PRAGMA user_version")[0][0])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except (apsw.BusyError, apsw.LockedError) as error:
            raise StoreLockedError(
                f"the index is locked by another process: {self.path}",
                hint="wait for the other kvstore process to finish",
            ) from error
        except apsw.FullError as error:
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)
            ) from error
        except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError) as error:
            number = disk_error(self.path) or errno.EACCES
            places = (self.path, self.path.parent)
            is_writable = all(os.access(place, os.W_OK) for place in places)
            is_refused = isinstance(error, apsw.ReadOnlyError)
            if is_refused and is_writable and number == errno.EACCES:
                # A flipped bit in its header makes SQLite take it for read-only.
                raise self._damaged(str(error)) from error
            raise OSError(number, str(error), str(self.path)) from error
        except apsw.IOError as error:
            number = disk_error(self.path) or errno.EIO
            raise OSError(number, str(error), str(self.path)) from error
        except (apsw.Error, ValueError, TypeError, OverflowError) as error:
            # Whatever else SQLite objects to in our fixed statements is damage.
            raise self._damaged(str(error)) from error


def disk_error(path: Path) -> int:
    """Return the system's error that the state of an index's disk explains, or 0."""
    disk = os.statvfs(path.parent)
    if disk.f_flag & os.ST_RDONLY:
        return errno.EROFS
    # Without room SQLite cannot make the file that it shares with others.
    has_room = disk.f_bavail * disk.f_frsize >= _SHARED_BYTES
    has_inodes = disk.f_favail > 0 or disk.f_files == 0
    return 0 if has_room and has_inodes else errno.ENOSPC


def is_better(new: tuple[int, int], old: tuple[int, int]) -> bool:
    """Whether a copy of a block replaces another.

    It must be the better in one respect and the worse in none; but a checkpoint, which
    an entry cannot be restored without, counts above all.

    Args:
        new: Its extras and bits.
        old: The same of the copy that is there.
    """
    if new[0] >= STATE_EXTRAS > old[0]:
        return True
    return new != old and new[0] >= old[0] and new[1] >= old[1]


def _today() -> str:
    """Return the name of the counter of the day, UTC."""
    return _WRITTEN + time.strftime("%Y-%m-%d", time.gmtime(time.time()))


def index_identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, or ``None`` where there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _connect(name: str, timeout_s: float, create: bool) -> apsw.Connection:
    """Open an index with a write-ahead log, or without where no memory can be shared.

    All processes map a file that belongs to the log. 9p, FUSE and some network file
    systems map none. There a rollback journal does, with which readers and writers wait
    for each other.
    """

    def connect(*pragmas: str) -> apsw.Connection:
        # Without CREATE: an index that vanishes now is not to come back empty.
        connection = apsw.Connection(name, apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_timeout(int(timeout_s * 1000))
        for pragma in (*pragmas, "user_version"):  # the last one opens the log
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection

    try:
        connection = connect()
        is_new = connection.execute("PRAGMA user_version").fetchall() == [(0,)]
        if not (create and is_new):
            return connection
        connection.close()
        return connect("journal_mode = WAL")
    except apsw.IOError as error:
        if getattr(error, "extendedresult", 0) not in _UNSHARED:
            raise
    # Who has the index to itself reads the log without the map.
    return connect(
        "locking_mode = EXCLUSIVE", "journal_mode = DELETE", "locking_mode = NORMAL"
    )


def _touch(path: Path) -> None:
    """Create the file private before SQLite, which goes by umask, would."""
    try:
        os.close(files.create(path))
    except FileExistsError:
        return  # another process was faster
