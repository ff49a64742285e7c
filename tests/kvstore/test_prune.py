"""What pruning frees, and what it must not touch."""

import os
import time

import pytest

import kvstore
from kvstore.ops.upkeep import prune

HOURS_AGO = time.time() - 3 * 3600


def disk_bytes(path):
    """Return the bytes of all shards on disk."""
    return sum(shard.stat().st_size for shard in path.glob("shards/*/*"))


def age(store):
    """Make all shards of a store look three hours old."""
    store._blocks.index._query("UPDATE shards SET added_at = ?", (HOURS_AGO,))


@pytest.fixture
def save(caches):
    """A function that saves one conversation and returns its tokens and cache."""

    def run(store, num_blocks, seed, *, name=None, extra=0):
        tokens, cache = caches.make_conversation(num_blocks, seed, extra=extra)
        store.save(tokens, cache, caches.MODEL, name=name)
        return tokens, cache

    return run


def is_held(store, caches, conversation):
    """Say whether a conversation is restored bit for bit."""
    tokens, cache = conversation
    restored, rest = store.load([*tokens, -1], caches.MODEL)
    return rest == [-1] and caches.rows_of(restored) == caches.rows_of(cache)


def test_what_no_entry_reaches_goes_after_an_hour(store_path, caches, save):
    """Blocks of a removed entry stay for an hour and are then freed to the byte."""
    with kvstore.Store(store_path, codec="raw") as store:
        gone, kept = save(store, 3, 1, name="gone"), save(store, 3, 2, name="kept")
        both = disk_bytes(store_path)
        store.remove("gone")
        assert store.plan_prune().freed_bytes == 0
        assert is_held(store, caches, gone)
        age(store)
        plan = store.plan_prune()
        assert disk_bytes(store_path) == both
        assert plan.execute() == plan.freed_bytes == both - disk_bytes(store_path)
        assert plan.freed_bytes == both // 2
        assert not is_held(store, caches, gone)
        assert is_held(store, caches, kept)
        assert store.verify() == []


def test_now_does_not_wait(store_path, save):
    """With `now`, unreachable blocks go however young they are."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 3, 1, name="gone")
        store.remove("gone")
        assert store.plan_prune(now=True).execute() > 0
        assert disk_bytes(store_path) == 0


def test_shared_blocks_stay(store_path, caches):
    """A prefix that another entry needs outlives the entry that brought it."""
    rows = caches.random_rows(64, 1)
    tokens = list(range(64))
    with kvstore.Store(store_path, codec="raw") as store:
        long = caches.grow(None, rows)
        store.save(tokens, long, caches.MODEL, name="long")
        short = caches.grow(None, rows[..., :32, :])
        store.save(tokens[:32], short, caches.MODEL, name="short")
        store.remove("long")
        store.plan_prune(now=True).execute()
        restored, _ = store.load_entry("short", caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(short)
        assert store.verify() == []


def test_a_shard_that_is_mostly_dead_is_rewritten(store_path, caches):
    """A shard with more than half of its bytes dead shrinks to its live blocks."""
    rows = caches.random_rows(16 * 10, 1)
    tokens = list(range(16 * 10))
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, caches.grow(None, rows), caches.MODEL, name="long")
        short = caches.grow(None, rows[..., :32, :])
        store.save(tokens[:32], short, caches.MODEL, name="short")
        before = disk_bytes(store_path)
        store.remove("long")
        plan = store.plan_prune(now=True)
        assert len(plan.repacked) == 1
        plan.execute()
        assert disk_bytes(store_path) < before / 4
        restored, _ = store.load_entry("short", caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(short)
        assert store.verify() == []


@pytest.mark.slow
def test_two_hundred_saves_never_pass_the_limit_by_more_than_a_shard(
    store_path, caches, save
):
    """Filled to twice its limit, a store keeps to it and to all that has a name."""
    with kvstore.Store(store_path, codec="raw") as store:
        named = [save(store, 2, seed, name=f"n{seed}") for seed in range(5)]
        one = disk_bytes(store_path) // 5
        limit = 100 * one
        store.set_limit(limit)
        for seed in range(5, 200):
            save(store, 2, seed, extra=seed % 7)
            assert disk_bytes(store_path) <= limit + 2 * one
        assert all(is_held(store, caches, conversation) for conversation in named)
        assert is_held(store, caches, caches.make_conversation(2, 199, extra=199 % 7))
        assert len(store.entries()) > 60
        assert store.verify(1.0) == []


def test_the_least_recently_used_goes_first(store_path, caches, save):
    """A conversation that was hit outlives one that was saved after it."""
    with kvstore.Store(store_path, codec="raw") as store:
        conversations = [save(store, 2, seed) for seed in range(4)]
        half = disk_bytes(store_path) // 2
        assert is_held(store, caches, conversations[0])
        plan = store.plan_prune(max_bytes=half)
        plan.execute()
        held = [is_held(store, caches, conversation) for conversation in conversations]
    assert held == [True, False, False, True]


def test_named_entries_go_last_and_pinned_ones_never(store_path, save):
    """Names are evicted only when asked for, and a pin holds even then."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 2, 1, name="named")
        save(store, 2, 2, name="pinned")
        save(store, 2, 3)
        store.pin("pinned")
        assert [e.name for e in store.plan_prune(max_bytes=0).entries] == [None]
        plan = store.plan_prune(max_bytes=0, named=True)
        assert [entry.name for entry in plan.entries] == [None, "named"]
        plan.execute()
        assert [entry.name for entry in store.entries()] == ["pinned"]


def test_what_was_not_used_for_long_goes(store_path, save):
    """`older_than_s` evicts by last use."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 2, 1)
        assert store.plan_prune(older_than_s=3600).entries == ()
        assert len(store.plan_prune(older_than_s=0).entries) == 1


def test_an_entry_saved_after_the_plan_keeps_its_blocks(store_path, caches, save):
    """What was committed between plan and execution is looked at again."""
    with kvstore.Store(store_path, codec="raw") as store:
        conversation = save(store, 2, 1, name="x")
        store.remove("x")
        plan = store.plan_prune(now=True)
        assert plan.removed
        store.save(*conversation, caches.MODEL, name="y")
        plan.execute()
        restored, _ = store.load_entry("y", caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(conversation[1])


def test_blocks_pruned_during_a_save_are_written_again(
    store_path, caches, save, monkeypatch
):
    """A save whose prefix is pruned under it still ends with all of its blocks."""
    from kvstore.ops import save as saving

    write = saving.save_blocks
    calls = []

    def pruned_after(*arguments):
        write(*arguments)
        calls.append(1)
        if len(calls) == 1:
            with kvstore.Store(store_path) as other:
                other.plan_prune(now=True).execute()

    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = save(store, 2, 1, name="x")
        store.remove("x")
        monkeypatch.setattr(saving, "save_blocks", pruned_after)
        store.save(tokens, cache, caches.MODEL, name="x")
        restored, _ = store.load_entry("x", caches.MODEL)
    assert len(calls) == 2
    assert caches.rows_of(restored) == caches.rows_of(cache)


def test_a_lost_index_row_does_not_make_blocks_dispensable(store_path, caches, save):
    """Blocks that only their shard knows are found again before anything is freed."""
    with kvstore.Store(store_path, codec="raw") as store:
        _, cache = save(store, 3, 1, name="x")
        store._blocks.index._query("DELETE FROM blocks WHERE num_tokens = 16")
        store.plan_prune(now=True).execute()
        restored, _ = store.load_entry("x", caches.MODEL)
    assert caches.rows_of(restored) == caches.rows_of(cache)


def test_what_crashes_left_goes_after_an_hour(store_path, save):
    """Staged files and shards without rows go when they are old, and only then."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 2, 1, name="x")
        staged = store_path / "tmp" / "left"
        staged.write_bytes(b"x")
        assert store.plan_prune(now=False).leftovers == ()
        os.utime(staged, (HOURS_AGO, HOURS_AGO))
        store.plan_prune().execute()
        assert not staged.exists()


def test_repair_saves_the_good_blocks_of_a_damaged_shard(
    store_path, caches, save, flip_bit
):
    """After a repair, verify is clean and what was whole is served."""
    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = save(store, 4, 1, name="x")
        other = save(store, 2, 2, name="other")
        last = store.chain("x")[-1]
        path = next(store_path.glob(f"shards/*/{last[0].shard}.safetensors"))
        flip_bit(path, (path.stat().st_size - 9) * 8)
        found = store.repair()
        assert {finding.kind for finding in found} >= {"damaged-block"}
        with pytest.raises(kvstore.IntegrityError):
            store.load_entry("x", caches.MODEL)
        restored, _ = store.load([*tokens, -1], caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(cache, 0, 48)
        assert is_held(store, caches, other)
        assert {finding.kind for finding in store.verify()} == {"missing-block"}
        store.save(tokens, cache, caches.MODEL, name="x")
        assert store.verify() == []


def test_renaming_moves_the_name(store_path, caches, save):
    """A renamed entry is found under its new name only, and no name is taken twice."""
    with kvstore.Store(store_path, codec="raw") as store:
        _, cache = save(store, 2, 1, name="old")
        save(store, 2, 2, name="taken")
        with pytest.raises(kvstore.EntryExistsError):
            store.rename("old", "taken")
        assert store.rename("old", "new").name == "new"
        assert sorted(entry.name for entry in store.entries()) == ["new", "taken"]
        restored, _ = store.load_entry("new", caches.MODEL)
    assert caches.rows_of(restored) == caches.rows_of(cache)


def test_stats_count_what_was_not_recomputed(store_path, caches, save):
    """Hits, restored tokens and bytes add up over processes."""
    with kvstore.Store(store_path, codec="planes+zstd") as store:
        tokens, _ = save(store, 2, 1, name="x")
        store.load([*tokens, -1], caches.MODEL)
        store.load([-5], caches.MODEL)
    with kvstore.Store(store_path) as store:
        counters = store.stats().counters
    assert (counters["hits"], counters["misses"]) == (1, 1)
    assert (counters["restored_tokens"], counters["missed_tokens"]) == (32, 2)
    assert counters["written_bytes"] == disk_bytes(store_path)
    # 2 layers, 2 sides, 2 heads, 64 numbers of 2 bytes, 32 tokens.
    assert counters["raw_bytes"] == 2 * 2 * 2 * 64 * 2 * 32
    assert 0 < counters["read_bytes"] < counters["raw_bytes"]


def test_the_grace_is_an_hour():
    """Unreachable blocks are kept for an hour."""
    assert prune.GRACE_S == 3600


def test_a_shard_published_again_while_it_is_pruned_stays(
    store_path, caches, save, monkeypatch
):
    """A save between the removal of rows and of the file keeps the file."""
    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = save(store, 2, 1, name="x")
        store.remove("x")
        plan = store.plan_prune(now=True)
        remove = prune.BlockStore.remove_unknown

        def saved_before(self, name):
            with kvstore.Store(store_path, codec="raw") as other:
                other._folder.lock.unlink()  # or it would wait for the pruner
                other.save(tokens, cache, caches.MODEL, name="again")
            remove(self, name)

        monkeypatch.setattr(prune.BlockStore, "remove_unknown", saved_before)
        plan.execute()
        restored, _ = store.load_entry("again", caches.MODEL)
    assert caches.rows_of(restored) == caches.rows_of(cache)


def test_a_pinned_entry_without_a_name_stays(store_path, save):
    """A pin holds for entries without a name too."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 2, 1)
        store.pin(store.entries()[0].id)
        store.plan_prune(max_bytes=0).execute()
        assert len(store.entries()) == 1


def test_staged_files_of_a_live_save_stay(store_path, save):
    """Not even `now` takes a file that a save is writing."""
    with kvstore.Store(store_path, codec="raw") as store:
        save(store, 2, 1)
        staged = store_path / "tmp" / "live"
        staged.write_bytes(b"x")
        store.plan_prune(now=True).execute()
        assert staged.exists()


def test_a_damaged_entry_protects_what_is_left_of_it(store_path, caches, save):
    """While an entry lacks a block, nothing that it may need is freed."""
    with kvstore.Store(store_path, codec="raw") as store:
        rows = caches.random_rows(64, 1)
        for length in (16, 32, 48, 64):
            cache = caches.grow(None, rows[..., :length, :])
            store.save(list(range(length)), cache, caches.MODEL, name="x")
        third = store.chain("x")[2][0]
        next(store_path.glob(f"shards/*/{third.shard}.safetensors")).unlink()
        store.plan_prune(now=True).execute()
        restored, rest = store.load([*range(64), -1], caches.MODEL)
    assert len(rest) == 33
    assert caches.rows_of(restored) == caches.rows_of(cache, 0, 32)


def test_prune_now_removes_a_conversation_from_a_shared_shard(store_path, caches, save):
    """After `rm` and `prune --now`, only what another entry needs is held."""
    rows = caches.random_rows(64, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        tokens = list(range(64))
        store.save(tokens, caches.grow(None, rows), caches.MODEL, name="secret")
        short = caches.grow(None, rows[..., :48, :])
        store.save(tokens[:48], short, caches.MODEL, name="short")
        store.remove("secret")
        store.plan_prune(now=True).execute()
        assert store.lookup([*tokens, -1], caches.MODEL).num_tokens == 48


def test_another_index_in_its_place_is_noticed(store_path, caches, save):
    """A process goes on with the index that another has put there."""
    with (
        kvstore.Store(store_path, codec="raw") as first,
        kvstore.Store(store_path, codec="raw") as second,
    ):
        save(first, 2, 1, name="a")
        second.repair()
        (store_path / "index.sqlite").unlink()
        second.load([1], caches.MODEL)
        conversation = save(first, 2, 2, name="b")
        assert is_held(second, caches, conversation)
