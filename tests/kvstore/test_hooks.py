"""A program is told of hits and evictions, and may have an entry read ahead."""

import errno
import sys
from pathlib import Path

import pytest

import kvstore
from kvstore.errors import IndexDamagedError


def test_each_load_is_a_record(store_path, caches):
    """A hit says how much was restored, a miss why nothing was."""
    loads = []
    tokens, cache = caches.make_conversation(3, 1)
    with kvstore.Store(
        store_path, "raw", on_load=lambda *told: loads.append(told)
    ) as s:
        s.load(tokens, caches.MODEL)
        s.save(tokens, cache, caches.MODEL, name="one")
        s.load([*tokens, -1], caches.MODEL)
        s.load_entry("one", caches.MODEL)
        with s.reopen() as other:
            other.load([5, *tokens], caches.MODEL)
    held = len(tokens)
    told = [(match.num_tokens, match.num_prompt_tokens) for match, _ in loads]
    assert told == [(0, held), (held, held + 1), (held, held), (0, held + 1)]
    assert loads[0][0].reason == "fingerprint"
    assert loads[3][0].reason == "divergence"
    assert all(seconds > 0 for _, seconds in loads)


def test_what_is_evicted_is_told(store_path, caches):
    """By a save at the limit, and by a plan; what was removed by hand is not."""
    gone = []
    with kvstore.Store(store_path, "raw", on_evict=gone.append) as store:
        for seed in range(4):
            tokens, cache = caches.make_conversation(2, seed)
            saved = store.save(tokens, cache, caches.MODEL)
            if not seed:
                store.set_limit(3 * saved.nbytes)
        assert [store.remove(store.entries()[-1]).id] != [e.id for e in gone]
        assert gone
        before = len(gone)
        left = {entry.id for entry in store}
        store.plan_prune(max_bytes=0).execute()
        assert {entry.id for entry in gone[before:]} == left
        assert len({entry.id for entry in gone}) == len(gone)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "of another disk"),
        IndexDamagedError("of another store", Path("index.sqlite")),
        KeyError("of no store"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_callback_raises_is_no_error_of_the_store(store_path, caches, error):
    """It reaches the caller, once all is freed, and the index stays in use."""

    def fail(entry):
        raise error

    with kvstore.Store(store_path, "raw", on_evict=fail) as store:
        tokens, cache = caches.make_conversation(2, 1)
        store.save(tokens, cache, caches.MODEL)
        before = store.path.joinpath("index.sqlite").stat().st_ino
        with pytest.raises(type(error)) as raised:
            store.plan_prune(max_bytes=0).execute()
        assert raised.value is error
        assert store.path.joinpath("index.sqlite").stat().st_ino == before
        assert not store.entries()
        assert store.stats().nbytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what is read")
def test_an_entry_is_read_ahead(store_path, caches):
    """All of its bytes are read, by another thread, and it loads as before."""

    def num_read():
        told = Path("/proc/self/io").read_text()
        return int(told.partition("rchar: ")[2].split()[0])

    tokens, cache = caches.make_conversation(3, 1)
    with kvstore.Store(store_path, "raw") as store:
        entry = store.save(tokens, cache, caches.MODEL, name="one")
        before = num_read()
        store.prefetch("one").join()
        assert num_read() - before > entry.nbytes
        restored, _ = store.load([*tokens, -1], caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(cache)
        with pytest.raises(kvstore.EntryNotFoundError):
            store.prefetch("two")
