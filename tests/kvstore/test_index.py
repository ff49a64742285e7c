"""The index: places of blocks, better copies, transactions, damage told apart."""

import errno
import os
import random
import stat
import subprocess
import sys
from contextlib import closing, suppress

import apsw
import pytest

from kvstore.errors import (
    FormatError,
    IndexDamagedError,
    KVStoreError,
    StoreLockedError,
)
from kvstore.format.block import EXACT_BITS, Block
from kvstore.format.chain import hash_block_tokens, hash_root, split_tokens
from kvstore.storage.cipher import Cipher
from kvstore.storage.index import MAX_CHILDREN, Index, Place

ROOT = hash_root("ab" * 32, [])
CHAIN = list(split_tokens(ROOT, list(range(50)), 16))
SHARD, OTHER = "a1" * 32, "b2" * 32
LAYOUT = [{"class": "KVCache", "k": [2, 64, "F32"], "v": [2, 64, "F32"]}]


class Stop(BaseException):
    """What an interrupt looks like to the code under test."""


@pytest.fixture
def path(tmp_path):
    """Where an index is to be."""
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path):
    """An open index."""
    opened = Index(path, create=True)
    yield opened
    opened.close()


def place_of(block, shard=SHARD, *, lossless=True, bits=EXACT_BITS, nbytes=100):
    """Return a place for a block."""
    return Place(block.hash, shard, len(block.tokens), nbytes, 2 * bits + lossless)


def fill(index, blocks=CHAIN, shard=SHARD, **options):
    """Add blocks to an index, in one transaction."""
    with index.transaction():
        index.add_root(ROOT, "ab" * 32, LAYOUT)
        index.add_shard(shard, 1000, 5.0)
        for block in blocks:
            index.add_block(block, place_of(block, shard, **options))


def test_a_block_is_found_where_it_was_put(index):
    """The index returns what it was told, and nothing for others."""
    fill(index)
    assert [place_of(block) for block in CHAIN] == [index.place(b.hash) for b in CHAIN]
    assert index.place(ROOT) is None
    assert len(CHAIN) == len(index.links())


def test_many_blocks_are_found_by_one_statement(index):
    """In the order in which they are asked for, wherever they lie, and ``None``."""
    fill(index, CHAIN[:2])
    fill(index, CHAIN[3:], OTHER)
    wanted = [CHAIN[3], CHAIN[2], CHAIN[0], CHAIN[1], CHAIN[0]]
    statements = []
    index._connection.exec_trace = lambda *told: statements.append(told) or True
    found = index.places_unchecked([block.hash for block in wanted])
    assert len(statements) == 1
    assert found == [index.place(block.hash) for block in wanted]
    assert found[1] is None
    assert [OTHER, SHARD] == [place.shard for place in found[:3] if place]
    assert index.places_unchecked([]) == []


def test_many_blocks_are_found_where_hashes_are_hidden(path):
    """An encrypted store's index names none of them."""
    cipher = Cipher(bytes(range(32)), "a store")
    with closing(Index(path, create=True, cipher=cipher)) as index:
        fill(index)
        hashes = [block.hash for block in CHAIN]
        assert index.places_unchecked(hashes) == [place_of(b) for b in CHAIN]


def test_a_column_of_another_type_is_damage_to_many(index):
    """As it is to one."""
    fill(index)
    index._connection.execute("UPDATE blocks SET nbytes = x'00'")
    with pytest.raises(IndexDamagedError, match="another type"):
        index.places_unchecked([CHAIN[0].hash])


def test_an_index_survives_being_closed(path):
    """What was committed is there in the next process."""
    index = Index(path, create=True)
    fill(index)
    index.close()
    again = Index(path)
    assert place_of(CHAIN[0]) == again.place(CHAIN[0].hash)
    assert {SHARD: 1000} == again.shards()
    assert [(ROOT, LAYOUT)] == again.roots("ab" * 32)
    again.close()


def test_the_longest_prefix_ends_at_the_first_gap(index):
    """Blocks behind a gap do not count."""
    fill(index, [CHAIN[0], CHAIN[1], CHAIN[3]])
    hashes = [block.hash for block in CHAIN]
    assert [place_of(b) for b in CHAIN[:2]] == index.longest_prefix(hashes)
    assert [] == index.longest_prefix([])


def test_a_prefix_goes_on_in_other_shards(index):
    """Blocks of one chain may lie anywhere, among those of others."""
    fill(index, [CHAIN[0], CHAIN[2]])
    fill(index, [CHAIN[1], CHAIN[3]], OTHER)
    expected = [place_of(b, (SHARD, OTHER)[i % 2]) for i, b in enumerate(CHAIN[:4])]
    assert expected == index.longest_prefix([block.hash for block in CHAIN[:4]])


def test_children_are_found_by_parent_and_first_token(index):
    """Only blocks that begin with the token asked for are returned."""
    fill(index)
    assert [place_of(CHAIN[1])] == index.children(CHAIN[0].hash, 16)
    assert [] == index.children(CHAIN[0].hash, 17)
    assert index.has_children(CHAIN[0].hash)
    assert not index.has_children(CHAIN[-1].hash)


def test_so_many_children_and_no_more(index):
    """A parent with very many children costs a bounded amount of work."""
    tails = [
        Block(hash_block_tokens(ROOT, (7, i)), ROOT, 0, (7, i))
        for i in range(MAX_CHILDREN + 5)
    ]
    fill(index, tails)
    assert MAX_CHILDREN == len(index.children(ROOT, 7))
    assert list(map(place_of, tails)) == index.places_of(tails)


QUALITIES = [(False, 3), (True, 3), (False, 4), (True, 4), (True, EXACT_BITS)]


@pytest.mark.parametrize("first", range(len(QUALITIES)))
@pytest.mark.parametrize("second", range(len(QUALITIES)))
def test_only_a_better_copy_replaces_an_older_one(index, first, second):
    """More bits win, then what is lossless; equals stay."""
    for number, shard in ((first, SHARD), (second, OTHER)):
        lossless, bits = QUALITIES[number]
        fill(index, CHAIN[:1], shard, lossless=lossless, bits=bits)
    place = index.place(CHAIN[0].hash)
    lossless, bits = QUALITIES[max(first, second)]
    shard = OTHER if second > first else SHARD
    assert place_of(CHAIN[0], shard, lossless=lossless, bits=bits) == place


def test_a_damaged_copy_stays_out(index):
    """A copy that was found damaged is not indexed again, another one is."""
    fill(index)
    with index.transaction():
        index.drop_block(CHAIN[0].hash, SHARD)
    assert index.place(CHAIN[0].hash) is None
    fill(index)
    assert index.place(CHAIN[0].hash) is None
    fill(index, CHAIN[:1], OTHER)
    assert place_of(CHAIN[0], OTHER) == index.place(CHAIN[0].hash)


def test_a_shard_written_anew_is_trusted_again(index):
    """What is known of a shard's damage ends when it is replaced."""
    fill(index)
    with index.transaction():
        index.drop_block(CHAIN[0].hash, SHARD)
        index.trust_shard(SHARD)
    fill(index)
    assert place_of(CHAIN[0]) == index.place(CHAIN[0].hash)


def test_a_copy_elsewhere_is_not_dropped(index):
    """A damaged copy takes no place away from a block that lies elsewhere."""
    fill(index, CHAIN[:1], OTHER)
    with index.transaction():
        index.drop_block(CHAIN[0].hash, SHARD)
    assert place_of(CHAIN[0], OTHER) == index.place(CHAIN[0].hash)


def test_a_shard_goes_with_its_blocks(index):
    """Forgetting a shard forgets its blocks and no others."""
    fill(index, CHAIN[:2])
    fill(index, CHAIN[2:], OTHER)
    with index.transaction():
        index.drop_shard(SHARD)
    assert {OTHER: 1000} == index.shards()
    assert [place_of(b, OTHER) for b in sorted(CHAIN[2:], key=lambda b: b.hash)] == (
        index.places_in(OTHER)
    )
    assert [] == index.places_in(SHARD)


def test_a_block_of_no_known_shard_is_not_added(index):
    """A block's place needs its shard's row."""
    with index.transaction():
        index.add_block(CHAIN[0], place_of(CHAIN[0], OTHER))
    assert index.place(CHAIN[0].hash) is None
    assert [] == index.lost_blocks()


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ValueError])
def test_a_transaction_that_fails_changes_nothing(index, error):
    """Whatever interrupts a transaction, all of it is undone."""
    fill(index, CHAIN[:1])

    def change():
        with index.transaction():
            index.add_block(CHAIN[1], place_of(CHAIN[1]))
            index.drop_shard(SHARD)
            raise error

    with pytest.raises(error):
        change()
    assert place_of(CHAIN[0]) == index.place(CHAIN[0].hash)
    assert index.place(CHAIN[1].hash) is None
    fill(index)  # and the next one works


def test_a_full_disk_in_a_transaction_undoes_it(index):
    """The error is the operating system's, and the index goes on working."""
    fill(index, CHAIN[:1])
    connection = index._connection
    pages = connection.execute("PRAGMA page_count").fetchall()[0][0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    def grow():
        with index.transaction():
            for number in range(1000):
                index.add_shard(f"{number:064x}", 1, 1.0)

    with pytest.raises(OSError, match="No space left"):
        grow()
    assert {SHARD: 1000} == index.shards()
    fill(index, CHAIN[1:2])
    assert place_of(CHAIN[1]) == index.place(CHAIN[1].hash)


@pytest.mark.parametrize(
    ("error", "free", "flags", "number"),
    [
        (apsw.IOError, 0, 0, errno.ENOSPC),
        (apsw.IOError, 1000, 0, errno.EIO),
        (apsw.ReadOnlyError, 1000, os.ST_RDONLY, errno.EROFS),
        (apsw.CantOpenError, 1000, 0, errno.EACCES),
    ],
)
def test_what_the_disk_refuses_is_told_apart(
    index, monkeypatch, error, free, flags, number
):
    """SQLite's word is the same for a full disk and a failing one."""
    disk = os.statvfs_result((4096, 4096, 1000, free, free, 9, 9, 9, flags, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with (
        pytest.raises(OSError, match=r"refused|space|read-only") as caught,
        index._translated(),
    ):
        raise error("refused")
    assert caught.value.errno == number


def test_another_process_that_writes_is_waited_for_and_not_for_ever(index, path):
    """A lock held for too long is said to be one."""
    impatient = Index(path, timeout_s=0.1)
    with (
        index.transaction(),
        pytest.raises(StoreLockedError, match="locked by another process"),
        impatient.transaction(),
    ):
        pass
    with impatient.transaction():
        pass
    impatient.close()


def test_readers_go_on_while_another_process_writes(index, path):
    """A transaction under way is invisible, and keeps nobody from reading."""
    fill(index, CHAIN[:1])
    reader = Index(path, timeout_s=0.1)
    with index.transaction():
        index.add_block(CHAIN[1], place_of(CHAIN[1]))
        assert place_of(CHAIN[0]) == reader.place(CHAIN[0].hash)
        assert reader.place(CHAIN[1].hash) is None
    assert place_of(CHAIN[1]) == reader.place(CHAIN[1].hash)
    reader.close()


def test_the_index_is_private_whatever_the_umask(path):
    """The database and the files beside it are the owner's alone."""
    before = os.umask(0)
    try:
        index = Index(path, create=True)
        fill(index)
        files = [path, *path.parent.glob("index.sqlite-*")]
        assert len(files) > 1
        assert {0o600} == {stat.S_IMODE(file.stat().st_mode) for file in files}
        index.close()
    finally:
        os.umask(before)


def test_commits_reach_the_disk(index):
    """Durability is FULL in a write-ahead log: an acknowledged save stays."""
    names = ("journal_mode", "synchronous")
    rows = [index._connection.execute(f"PRAGMA {n}").fetchall()[0][0] for n in names]
    assert ["wal", 2] == rows


UNSHARED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The mmap of a file system that shares no memory: none for SQLite's -shm files. */
void *mmap64(void *to, size_t size, int prot, int flags, int fd, off_t start) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = fd < 0 ? -1 : readlink(link, name, sizeof name);
    if (n > 4 && !memcmp(name + n - 4, "-shm", 4)) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap64");
    return real(to, size, prot, flags, fd, start);
}
void *mmap(void *to, size_t size, int prot, int flags, int fd, off_t start) {
    return mmap64(to, size, prot, flags, fd, start);
}
"""
ADD_SHARDS = """
import os, sys
from kvstore.storage.index import Index
from pathlib import Path
for name in sys.argv[2:]:
    index = Index(Path(sys.argv[1]), create=True)
    with index.transaction():
        index.add_shard(name, 1, 0.0)
print(*index.shards())
sys.stdout.flush()
os._exit(0)  # as a killed process does: what is in the log stays there
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux")
def test_an_index_works_where_no_memory_can_be_shared(path, tmp_path):
    """On 9p or FUSE it is made, read, written, taken over with its log; and back."""
    source, shim = tmp_path / "unshared.c", tmp_path / "unshared.so"
    source.write_text(UNSHARED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)

    def add(path, *names, **env):
        command = [sys.executable, "-c", ADD_SHARDS, path, *names]
        env = {**os.environ, **env}
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "" == run.stderr
        return run.stdout.split()

    unshared = {"LD_PRELOAD": str(shim)}
    assert ["a", "b"] == add(path, "a", "b", **unshared)
    assert ["a", "b", "c"] == add(path, "c")
    logged = path.with_name("logged.sqlite")
    assert ["a"] == add(logged, "a")
    assert logged.with_name("logged.sqlite-wal").stat().st_size > 0
    assert ["a", "b"] == add(logged, "b", **unshared)
    assert ["a", "b", "c"] == add(logged, "c")


@pytest.mark.parametrize(
    "data", [b"hello", b"\0" * 4096, b"SQLite format 3\0" + b"\xff" * 4080]
)
def test_a_file_that_is_no_database_is_damage(path, data):
    """Garbage in place of the index is an IndexDamagedError that names the file."""
    path.write_bytes(data)
    with pytest.raises(IndexDamagedError) as caught:
        Index(path)
    assert path == caught.value.path


def test_a_newer_schema_is_not_damage(path):
    """An index of a later release is refused, and the hint says that it may go."""
    Index(path, create=True).close()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FormatError, match="schema 99") as caught:
        Index(path)
    assert "rebuilt" in caught.value.hint


def answer(path):
    """Ask an index everything; return the answers."""
    index = Index(path)
    try:
        return [
            index.longest_prefix([block.hash for block in CHAIN]),
            [index.children(b.parent, b.tokens[0]) for b in CHAIN],
            index.roots("ab" * 32),
            index.shards(),
            index.places_in(SHARD),
            index.lost_blocks(),
            index.check(),
            index.counters(),
            index.uses(),
            list(index.chain(CHAIN[-1].hash)),
        ]
    finally:
        index.close()


@pytest.mark.parametrize("seed", range(4))
def test_damage_gives_an_answer_or_our_error(path, flip_bit, seed):
    """Whatever bits flip in the file, only our own errors come out."""
    index = Index(path, create=True)
    fill(index)
    index.close()
    good = path.read_bytes()
    chance = random.Random(seed)
    for _ in range(100):
        data = good
        for _ in range(chance.choice([1, 1, 1, 3, 100])):
            data = flip_bit(data, chance.randrange(len(good) * 8))
        path.write_bytes(data)
        with suppress(KVStoreError):
            answer(path)
        for beside in path.parent.glob("index.sqlite-*"):
            beside.unlink()


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 4097, 12_000])
def test_a_truncated_index_gives_an_answer_or_our_error(path, size):
    """A file that is cut short is damage, and nothing else."""
    index = Index(path, create=True)
    fill(index)
    index.close()
    path.write_bytes(path.read_bytes()[:size])
    with suppress(IndexDamagedError):
        assert [] == answer(path)[0]


@pytest.mark.parametrize("values", ["NULL", "'x'", "x'00'", "1.5", "-1", "1 << 62"])
@pytest.mark.parametrize(
    "column", ["num_tokens", "nbytes", "quality", "shard", "parent", "first_token"]
)
def test_a_column_of_the_wrong_type_is_damage_or_answered(path, column, values):
    """SQLite checks types when it writes and not when it reads; we do."""
    index = Index(path, create=True)
    fill(index)
    index._connection.execute("PRAGMA writable_schema = ON")
    index._connection.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '')"
    )
    index.close()
    connection = apsw.Connection(str(path))
    connection.execute(f"UPDATE blocks SET {column} = {values}")
    connection.close()
    with suppress(IndexDamagedError):
        places, *_ = answer(path)
        kinds = {(type(place.num_tokens), type(place.nbytes)) for place in places}
        assert kinds <= {(int, int)}


def test_a_block_that_another_drops_between_two_queries_is_no_damage(index, path):
    """Both queries see one state; the next look finds nothing."""
    fill(index)
    other, look = Index(path), index._query

    def drop_after(*query):
        found = look(*query)
        with other.transaction():
            other.drop_shard(SHARD)
        return found

    index._query = drop_after
    assert index.place_of(CHAIN[0]) == place_of(CHAIN[0])
    del index._query
    assert index.place_of(CHAIN[0]) is None
    other.close()


def test_blocks_that_are_out_of_order_are_damage(index, path):
    """A look by hash would miss what a look through all of them finds."""
    fill(index)
    assert len(index.all_blocks()) == len(CHAIN)
    index.close()
    first = min(block.hash for block in CHAIN)
    path.write_bytes(path.read_bytes().replace(first, b"\xff" + first[1:]))
    with pytest.raises(IndexDamagedError, match="out of order"):
        Index(path).all_blocks()


def test_all_blocks_are_read_where_one_is_looked_for(index):
    """By the table: an index of it, which a join goes by, may say otherwise."""
    fill(index)
    seen = []
    index._connection.exec_trace = lambda cursor, sql, _: seen.append(sql) or True
    index.all_blocks()
    index._connection.exec_trace = None
    plans = [index._query(f"EXPLAIN QUERY PLAN {sql}") for sql in seen]
    details = [detail for plan in plans for *_, detail in plan]
    assert sorted(details) == ["SCAN blocks", "SCAN shards"]
