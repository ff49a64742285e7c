"""The writing thread: in order, never in the way, and honest about what is lost."""

import logging
import threading
import time

import pytest

from kvstore import Store
from kvstore.errors import StoreLockedError
from kvstore.server.disk import Disk, ServedModel
from kvstore.server.writer import Job, Writer


@pytest.fixture
def store(store_path):
    """The store that snapshots are taken for."""
    with Store(store_path, "raw") as opened:
        yield opened


@pytest.fixture
def writer(store_path):
    """A writer without a reserve."""
    opened = Writer(
        lambda: Store(store_path, "raw"), min_free_bytes=0, max_queued_bytes=1 << 40
    )
    yield opened
    opened.close()


@pytest.fixture
def log(caplog, monkeypatch):
    """A function that returns what the writer has logged so far."""
    monkeypatch.setattr(logging.getLogger("kvstore"), "propagate", True)
    caplog.set_level(logging.INFO, "kvstore")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def saves(monkeypatch):
    """A list of what becomes of the next saves: errors, or `None` for what is usual.

    The first waits until the list's event is set.
    """

    class Saves(list):
        go_on = threading.Event()

    outcomes = Saves()
    save = Store.save_snapshot

    def save_or_fail(self, *args, **options):
        assert outcomes.go_on.wait(30)
        error = outcomes.pop(0) if outcomes else None
        if error is not None:
            raise error
        return save(self, *args, **options)

    monkeypatch.setattr(Store, "save_snapshot", save_or_fail)
    yield outcomes
    outcomes.go_on.set()


def put(writer, store, caches, tokens, held, *, is_shared=False):
    """Have a prompt cache written, without what is on its way."""
    snapshot = store.snapshot(tokens, held, caches.MODEL, without=writer.pending)
    assert writer.put(Job(snapshot, is_shared, lambda tokens: ""))


def wait_for_begin(writer):
    """Wait until the first of the queue is being written."""
    deadline = time.monotonic() + 30
    while not writer._has_begun:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_fails_is_written_with_what_builds_on_it(writer, store, caches, saves):
    """An error costs an entry, and not those that were copied without its blocks."""
    tokens, held = caches.make_conversation(3, 1)
    other, other_held = caches.make_conversation(2, 2)
    put(writer, store, caches, tokens[:32], caches.make_cache(32, 1))
    wait_for_begin(writer)  # or the third would take it with it
    before = caches.rows_of(caches.make_cache(32, 1))
    put(writer, store, caches, other, other_held)
    longer = caches.grow(caches.make_cache(32, 1), caches.random_rows(9, 3))
    put(writer, store, caches, [*tokens[:32], *range(9)], longer)
    saves += [OSError(5, "I/O")]
    saves.go_on.set()
    assert writer.flush(30)
    found, rest = store.load([*tokens[:32], *range(9), 1], caches.MODEL)
    assert rest == [1]
    assert caches.rows_of(found, 0, 32) == before
    assert caches.rows_of(found) == caches.rows_of(longer)
    assert len(store.entries()) == 2
    assert held[0].offset == 48


def test_the_reserve_costs_no_later_conversation(writer, store, caches, saves, log):
    """What was declined for its size takes nothing else with it."""
    writer._min_free_bytes = 1 << 62
    put(writer, store, caches, *caches.make_conversation(2, 1))
    saves.go_on.set()
    assert writer.flush(30)
    writer._min_free_bytes = 0
    put(writer, store, caches, *caches.make_conversation(2, 1))
    assert writer.flush(30)
    assert [line for line in log() if "are reserved" in line]
    assert len(store.entries()) == 1


def test_so_much_is_written_in_a_day(store, store_path, caches, log, monkeypatch):
    """Also after a restart, with one line a day; what is there stays, and is read."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    first, *others = (caches.make_conversation(3, seed) for seed in range(4))
    size = 0

    def written(*conversations):
        """Put them as a server that has just started; return how many are there."""
        writer = Writer(
            lambda: Store(store_path, "raw"),
            min_free_bytes=0,
            max_queued_bytes=1 << 40,
            max_daily_bytes=size * 5 // 2 if size else None,
        )
        for tokens, held in conversations:
            put(writer, store, caches, tokens, held)
            assert writer.flush(30)
        writer.close()
        return len(store.entries())

    def written_today():
        return store.run(lambda blocks: blocks.index.written_today())

    assert written(first) == 1
    size = written_today()
    assert size == store.stats().nbytes
    assert written(*others) == 2
    assert written(*others) == 2
    assert len([line for line in log() if "GB are written today" in line]) == 2
    assert store.lookup([*first[0], 1], caches.MODEL).num_tokens == len(first[0])
    now[0] += 86_400
    assert written_today() == 0
    assert written(*others) == 4
    assert len([n for n in store.stats().counters if n.startswith("written_on")]) == 1


def test_what_is_too_much_for_a_day_costs_no_smaller_conversation(
    store, store_path, caches, log
):
    """A large one that does not fit is left out, and what fits is written."""
    large, small = caches.make_conversation(9, 1), caches.make_conversation(2, 2)
    writer = Writer(
        lambda: Store(store_path, "raw"),
        min_free_bytes=0,
        max_queued_bytes=1 << 40,
        max_daily_bytes=sum(cache.nbytes for cache in large[1]) // 2,
    )
    for tokens, held in (large, small):
        put(writer, store, caches, tokens, held)
        assert writer.flush(30)
    writer.close()
    assert [entry.num_tokens for entry in store.entries()] == [len(small[0])]
    assert len([line for line in log() if "GB are written today" in line]) == 1


@pytest.mark.parametrize("error", [StoreLockedError("locked"), OSError(5, "I/O")])
def test_a_turn_that_cannot_be_superseded_now_is_later(
    writer, store, caches, monkeypatch, log, error
):
    """A save counts whatever becomes of the entry before it."""
    remove = Store.remove
    errors = [error]

    def fail_once(self, ref):
        if errors:
            raise errors.pop()
        return remove(self, ref)

    monkeypatch.setattr(Store, "remove", fail_once)
    tokens, held = caches.make_conversation(2, 1)
    for turn in range(3):
        put(writer, store, caches, tokens, held)
        assert writer.flush(30)
        tokens = [*tokens, turn]
        caches.grow(held, caches.random_rows(1, turn))
    assert [entry.num_tokens for entry in store.entries()] == [34]
    assert not any("not kept" in line for line in log())


def test_conversations_in_turn_stay_under_the_limit(store_path, caches):
    """What is evicted for a turn is never what the turn builds on."""
    with Store(store_path, "raw") as store:
        held = {
            seed: [*caches.make_conversation(6, seed, extra=seed)] for seed in range(5)
        }
        for tokens, cache in held.values():
            entry = store.save(tokens, cache, caches.MODEL)
        limit = 4 * entry.nbytes
        store.set_limit(limit)
        for turn in range(4):
            for pair in held.values():
                pair[0] = [*pair[0], *range(50 * turn, 50 * turn + 20)]
                caches.grow(pair[1], caches.random_rows(20, turn))
                snapshot = store.snapshot(pair[0], pair[1], caches.MODEL)
                with Store(store_path, "raw") as other:
                    other.save_snapshot(snapshot)
                assert store.load([*pair[0], 1], caches.MODEL)[1] == [1]
        assert store.stats().nbytes <= 2 * limit


@pytest.mark.parametrize("is_evicting", [False, True])
def test_no_save_is_lost_to_what_an_earlier_one_evicts(
    store_path, caches, monkeypatch, is_evicting
):
    """At the limit, a turn keeps what it goes on from, though others wait before it.

    Its blocks are looked for before the others evict something, or meanwhile.
    """
    with Store(store_path, "raw") as store:
        old, old_cache = caches.make_conversation(6, 1)
        limit = 2 * store.save(old, old_cache, caches.MODEL).nbytes
        store.set_limit(limit)
    served = ServedModel(caches.MODEL, ([],))
    disk = Disk(Store(store_path, "raw"), min_tokens=1)
    started, go_on = threading.Event(), threading.Event()
    spare, save = Writer._spare, Store.save_snapshot

    def spare_slowly(self):
        found = spare(self)
        started.set()
        assert not is_evicting or go_on.wait(30)
        return found

    def save_slowly(self, *args, **options):
        assert is_evicting or go_on.wait(30)
        return save(self, *args, **options)

    monkeypatch.setattr(Writer, "_spare", spare_slowly)
    monkeypatch.setattr(Store, "save_snapshot", save_slowly)
    for seed in (2, 3):
        assert disk.keep(served, *caches.make_conversation(6, seed), is_shared=False)
    assert not is_evicting or started.wait(30)
    longer = [*old, *range(20)]
    caches.grow(old_cache, caches.random_rows(20, 4))
    assert disk.keep(served, longer, old_cache, is_shared=False)
    go_on.set()
    assert disk.flush(30)
    with Store(store_path, "raw") as store:
        found, rest = store.load([*longer, 1], caches.MODEL)
    disk.close()
    assert rest == [1]
    assert caches.rows_of(found) == caches.rows_of(old_cache)


def turns_of(caches, seed, lengths):
    """Return the tokens and prompt cache of a conversation after each of its turns."""
    tokens, _ = caches.make_conversation(9, seed)
    rows = caches.random_rows(len(tokens), seed)
    return [(tokens[:n], caches.grow(None, rows[..., :n, :])) for n in lengths]


def test_what_waits_of_one_conversation_is_saved_once(writer, store, caches, saves):
    """The last of its turns takes the others with it; their ends are not written."""
    put(writer, store, caches, *caches.make_conversation(2, 1))
    turns = turns_of(caches, 2, (40, 70, 100))
    for turn in turns:
        put(writer, store, caches, *turn)
    assert [job.snapshot.chain.num_tokens for job in writer._jobs] == [32, 100]
    assert writer.queued_bytes == sum(job.rows.nbytes for job in writer._jobs)
    saves.go_on.set()
    assert writer.flush(30)
    assert sorted(entry.num_tokens for entry in store.entries()) == [32, 100]
    found, rest = store.load([*turns[-1][0], 1], caches.MODEL)
    assert rest == [1]
    assert caches.rows_of(found) == caches.rows_of(turns[-1][1])


def test_what_others_build_on_waits_in_its_place(writer, store, caches, saves):
    """A turn from which another conversation went on, and what is shared, stay."""
    put(writer, store, caches, *caches.make_conversation(2, 1))
    first, last = turns_of(caches, 2, (40, 100))
    put(writer, store, caches, *first)
    beginning, held = turns_of(caches, 2, (32,))[0]
    fork = [*beginning, *range(9)], caches.grow(held, caches.random_rows(9, 5))
    put(writer, store, caches, *fork)
    put(writer, store, caches, *last)
    put(writer, store, caches, *turns_of(caches, 3, (40,))[0], is_shared=True)
    put(writer, store, caches, *turns_of(caches, 3, (70,))[0])
    lengths = [job.snapshot.chain.num_tokens for job in writer._jobs]
    assert lengths == [32, 40, 41, 100, 40, 70]
    saves.go_on.set()
    assert writer.flush(30)
    for tokens, held in (fork, last):
        found, rest = store.load([*tokens, 1], caches.MODEL)
        assert rest == [1]
        assert caches.rows_of(found) == caches.rows_of(held)


def test_an_end_with_a_time_limit_says_what_is_not_kept(
    writer, store, caches, saves, log
):
    """A disk that is too slow costs what waits, and not more than that time."""
    for seed in (1, 2, 3):
        put(writer, store, caches, *caches.make_conversation(2, seed))
    wait_for_begin(writer)
    assert not writer.close(0.1)
    (line,) = [line for line in log() if "not kept" in line]
    assert "not kept: 3 prompts of 96 tokens in all, 0.1 MB of rows and codes" in line
    saves.go_on.set()
    writer._thread.join(30)
    assert len(store.entries()) == 1  # the one that was being written
