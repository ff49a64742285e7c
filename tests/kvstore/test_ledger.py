"""Entries are known from the index while their files are untouched, and never else."""

import os
import sqlite3

import pytest

import kvstore
from kvstore.ops import commit
from kvstore.storage import files, ledger, shards
from kvstore.storage.index import Index


@pytest.fixture
def filled(store_path, caches):
    """A store of three entries, two of which have names."""
    with kvstore.Store(store_path, "raw") as store:
        for seed, name in enumerate(["a", "b", None], 1):
            tokens, cache = caches.make_conversation(1, seed)
            store.save(tokens, cache, caches.MODEL, name=name)
    return store_path


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read as entries."""
    found, real = [], files.read_small

    def note(path, limit):
        if path.parent.name == "entries":
            found.append(path.stem)
        return real(path, limit)

    monkeypatch.setattr(ledger.files, "read_small", note)
    return found


def entries_of(path):
    """Return the entries of a store that is opened anew."""
    with kvstore.Store(path, create=False) as store:
        return store.entries()


def test_a_file_is_not_read_again(filled, read):
    """What was saved, or read once, is known."""
    known = entries_of(filled)
    assert [e.name for e in known] == [None, "b", "a"]
    assert not [name for name in read if name in {e.id for e in known}]
    (filled / "index.sqlite").unlink()
    assert entries_of(filled) == known
    read.clear()
    assert entries_of(filled) == known
    assert not [name for name in read if name in {e.id for e in known}]


def test_a_file_that_was_touched_is_read(filled, flip_bit):
    """By an older release, from a backup, or by a flipped bit."""
    known = {entry.name: entry for entry in entries_of(filled)}
    path = filled / "entries" / f"{known['a'].id}.json"
    flip_bit(path, 8 * 100)
    assert [e.name for e in entries_of(filled)] == [None, "b"]
    path.unlink()
    assert [e.name for e in entries_of(filled)] == [None, "b"]


def test_a_copy_that_is_not_the_file_is_not_believed(filled):
    """A crash may leave the index ahead of a file, and a disk may flip a bit of it."""
    known = entries_of(filled)
    with sqlite3.connect(filled / "index.sqlite") as index:
        for entry_id, body in index.execute("SELECT id, body FROM entries").fetchall():
            changed = body.replace(b'"num_tokens":16', b'"num_tokens":17')
            index.execute(
                "UPDATE entries SET body = ? WHERE id = ?", (changed, entry_id)
            )
    index.close()
    assert entries_of(filled) == known


def test_a_save_at_the_limit_looks_at_no_other_entry(filled, caches, read, monkeypatch):
    """Where only entries with names are left, nothing is planned."""
    with kvstore.Store(filled, "raw") as store:
        store.remove(store.entries()[0])
        store.plan_prune(now=True).execute()
        store.set_limit(store.stats().nbytes)
        monkeypatch.setattr(commit, "plan_confirmed", None)
        read.clear()
        tokens, cache = caches.make_conversation(1, 4)
        entry = store.save(tokens, cache, caches.MODEL, name="c")
        assert set(read) <= {entry.id}


def test_the_first_save_at_the_limit_reads_each_shard_once(
    store_path, caches, monkeypatch
):
    """It confirms the index before it frees anything, which costs no more than that."""
    headers, parse = [], shards.parse_shard_header

    def note(header, size):
        headers.append(size)
        return parse(header, size)

    with kvstore.Store(store_path, "raw") as store:
        for seed in range(1, 31):
            store.save(*caches.make_conversation(1, seed), caches.MODEL)
        store.set_limit(store.stats().nbytes)
    with kvstore.Store(store_path, "raw") as store:
        monkeypatch.setattr(shards, "parse_shard_header", note)
        store.save(*caches.make_conversation(1, 31), caches.MODEL)
        num_evicted = 31 - len(store.entries())
        assert num_evicted > 0
        # And what is evicted once more, and the new one staged and committed.
        assert len(headers) <= 30 + num_evicted + 2


def test_little_that_can_go_goes_when_it_is_more(store_path, caches):
    """Where names fill the store, the rest may pass the limit by a twentieth."""
    with kvstore.Store(store_path, "raw") as store:
        tokens, cache = caches.make_conversation(60, 1)
        store.save(tokens, cache, caches.MODEL, name="long")
        limit = store.stats().nbytes
        store.set_limit(limit)
        for seed in range(2, 12):
            store.save(*caches.make_conversation(1, seed), caches.MODEL)
            assert store.stats().nbytes < limit * 1.1
        assert 1 < len(store.entries()) < 11
        assert store.verify() == []


def test_an_index_without_what_was_seen_is_taken(filled):
    """An earlier release made it."""
    known = entries_of(filled)
    with sqlite3.connect(filled / "index.sqlite") as index:
        index.execute("DROP TABLE seen")
    index.close()
    opened = Index(filled / "index.sqlite")
    assert opened.evictable_bytes() == known[0].nbytes
    opened.close()
    assert entries_of(filled) == known


def test_a_store_that_may_only_be_read_is_listed(filled):
    """Nothing is noted then."""
    known = entries_of(filled)
    os.utime(filled / "entries" / f"{known[0].id}.json")
    with kvstore.Store(filled, create=False) as store:
        store._blocks.index._query("PRAGMA query_only = ON")
        assert store.entries() == known
