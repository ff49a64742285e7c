"""An index that is replaced, and shards that are removed, while others work."""

import threading
from dataclasses import replace

import pytest

import kvstore
from kvstore.errors import IndexDamagedError
from kvstore.storage import blocks as blocks_module
from kvstore.storage.blocks import BlockStore, replace_index
from kvstore.storage.index import index_identity


@pytest.fixture
def store(store_path, caches):
    """A store with one named entry."""
    with kvstore.Store(store_path, "raw") as store:
        save(store, caches, 1, "one")
        yield store


def save(store, caches, seed, name):
    """Save a conversation of three blocks."""
    tokens, prompt_cache = caches.make_conversation(3, seed)
    store.save(tokens, prompt_cache, caches.MODEL, name=name)


def rebuild_index(store):
    """Do what another process does that finds the index damaged."""
    folder = store._folder
    replace_index(folder, index_identity(folder.index))


def check(path, caches, names):
    """Prune all that can be freed, and load every entry."""
    with kvstore.Store(path) as fresh:
        fresh.plan_prune(now=True).execute()
        for name in names:
            fresh.load_entry(name, caches.MODEL)
        assert fresh.verify(read_data=1.0) == []


def test_a_save_into_an_index_that_was_replaced_counts(store, store_path, caches):
    """A store that was open meanwhile takes the new index; both entries are there."""
    rebuild_index(store)
    save(store, caches, 2, "two")
    check(store_path, caches, ["one", "two"])


def test_a_save_counts_though_the_index_is_replaced_meanwhile(
    store, store_path, caches, monkeypatch
):
    """The new index has not seen the shard when it takes the old one's place."""
    publish, is_first = blocks_module.publish_shard, [True]

    def replace_and_publish(*arguments):
        if is_first.pop() if is_first else False:
            rebuild_index(store)
        return publish(*arguments)

    monkeypatch.setattr(blocks_module, "publish_shard", replace_and_publish)
    save(store, caches, 2, "two")
    assert not is_first
    check(store_path, caches, ["one", "two"])


def test_shards_that_come_while_the_index_is_built_are_in_it(
    store, store_path, caches, monkeypatch
):
    """A shard that another process adds before the new index takes its place."""
    aside = blocks_module._set_index_aside

    def save_and_set_aside(folder):
        monkeypatch.setattr(blocks_module, "_set_index_aside", aside)
        with store._blocks.index.transaction():
            for staged in kept:
                store._blocks.add(staged, 0.0)
        aside(folder)

    kept = []
    monkeypatch.setattr(
        BlockStore, "add_new", lambda self, staged, _: kept.append(keep(staged[0]))
    )
    tokens, prompt_cache = caches.make_conversation(3, 2)
    with pytest.raises(kvstore.IntegrityError):
        store.save(tokens, prompt_cache, caches.MODEL, name="two")
    del kept[1:]
    monkeypatch.undo()
    monkeypatch.setattr(blocks_module, "_set_index_aside", save_and_set_aside)
    rebuild_index(store)
    with kvstore.Store(store_path) as fresh:
        assert fresh.lookup(tokens, caches.MODEL).num_tokens > 16


def keep(staged):
    """Copy a staged shard: its own file goes when the save ends."""
    path = staged.path.with_name("kept")
    path.write_bytes(staged.path.read_bytes())
    return replace(staged, path=path)


def test_who_compares_while_a_shard_goes_finds_no_damage(
    store, store_path, caches, monkeypatch
):
    """Rows go before the file; meanwhile the index and the folder differ."""
    remove, threads, errors = BlockStore.remove_unknown, [], []

    def compare():
        try:
            with kvstore.Store(store_path) as other:
                other._blocks.confirm()
        except Exception as error:  # a thread's own would be lost
            errors.append(error)

    def compare_and_remove(self, name):
        if not threads:
            threads.append(threading.Thread(target=compare))
            threads[0].start()
            threads[0].join(0.5)  # it waits for the lock that this thread holds
        remove(self, name)

    monkeypatch.setattr(BlockStore, "remove_unknown", compare_and_remove)
    store.remove("one")
    store.plan_prune(now=True).execute()
    threads[0].join()
    rebuilt = list(store._folder.quarantine.iterdir())
    assert errors == rebuilt == []


def test_an_entry_is_read_however_often_prune_moves_it(store, caches, monkeypatch):
    """The third look holds the lock under which shards are removed."""
    looks, chain = [], BlockStore.chain

    def moved_twice(self, entry):
        looks.append(entry)
        if len(looks) < 3:
            raise kvstore.IntegrityError("moved")
        lock = store._folder.lock
        with (
            pytest.raises(kvstore.StoreLockedError),
            kvstore.storage.files.locked(lock, exclusive=True, timeout_s=0.1),
        ):
            pass
        return chain(self, entry)

    monkeypatch.setattr(BlockStore, "chain", moved_twice)
    store.load_entry("one", caches.MODEL)
    assert len(looks) == 3


def test_a_shard_that_gets_a_needed_block_meanwhile_is_not_dropped(
    store, caches, monkeypatch
):
    """Another `prune` may have just packed blocks into a shard that looked dead."""
    save(store, caches, 2, "two")
    kept, dead = store.chain("one"), store.chain("two")
    store.remove("two")
    drop = BlockStore.drop_shards

    def move_and_drop(self, shards):
        for place, _ in kept:
            self.index.move_block(place.hash, place.shard, dead[0][0].shard)
        drop(self, shards)

    monkeypatch.setattr(BlockStore, "drop_shards", move_and_drop)
    store.plan_prune(now=True).execute()
    index = store._blocks.index
    assert all(index.place(place.hash) is not None for place, _ in kept)


def test_an_index_found_damaged_under_the_lock_is_rebuilt_without_it(
    store, caches, monkeypatch
):
    """Rebuilding takes the lock that the third look holds."""
    looks, chain = [], BlockStore.chain

    def damaged_third(self, entry):
        looks.append(entry)
        if len(looks) < 3:
            raise kvstore.IntegrityError("moved")
        if len(looks) == 3:
            raise IndexDamagedError("it lies", self.folder.index)
        return chain(self, entry)

    monkeypatch.setattr(BlockStore, "chain", damaged_third)
    store.load_entry("one", caches.MODEL)
    assert len(looks) == 4
