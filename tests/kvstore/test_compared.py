"""A plan reads the headers of shards that changed or that go, and no others."""

import os

import pytest

import kvstore
from kvstore.storage import blocks


@pytest.fixture
def store(store_path, caches):
    """A store of three entries of two blocks each, one of which has no name."""
    with kvstore.Store(store_path, codec="raw") as store:
        for seed, name in enumerate(["a", "b", None], 1):
            tokens, cache = caches.make_conversation(2, seed)
            store.save(tokens, cache, caches.MODEL, name=name)
        yield store


@pytest.fixture
def opened(monkeypatch):
    """The names of the shards whose headers are read."""
    found, real = [], blocks.open_shard

    def note(folder, name):
        found.append(name)
        return real(folder, name)

    monkeypatch.setattr(blocks, "open_shard", note)
    return found


def shard_of(store, name):
    """Return the name of the shard of an entry."""
    return store.chain(name)[0][0].shard


def test_an_unchanged_shard_is_not_read(store, opened):
    """Whoever wrote it has compared it; an index that was rebuilt does so once."""
    assert store.plan_prune().execute() == 0
    assert opened == []
    store._blocks.index._query("DELETE FROM confirmed")
    store.plan_prune()
    assert len(set(opened)) == 3
    opened.clear()
    assert store.plan_prune().execute() == 0
    assert opened == []


@pytest.mark.parametrize("what", ["file", "rows"])
def test_what_changed_is_read(store, opened, what):
    """The file itself, or what the index says of it."""
    store.plan_prune()
    shard = shard_of(store, "a")
    opened.clear()
    if what == "file":
        os.utime(store.path / "shards" / shard[:2] / f"{shard}.safetensors", (1, 1))
    else:
        change = "UPDATE blocks SET quality = 8 WHERE shard ="
        query = f"{change} (SELECT id FROM shards WHERE name = ?)"
        store._blocks.index._query(query, (shard,))
    store.plan_prune()
    assert shard in opened
    assert store.verify() == []


def test_what_is_to_go_is_read(store, opened):
    """However often it was compared before."""
    store.plan_prune()
    unnamed = next(entry for entry in store.entries() if entry.name is None)
    shard = shard_of(store, unnamed.id)
    opened.clear()
    plan = store.plan_prune(max_bytes=1)
    assert list(plan.removed) == [shard] == opened
    assert plan.execute() == plan.freed_bytes
    assert len(store.verify()) == 0
    assert len(store) == 2


def test_what_an_entry_lacks_is_looked_for_in_all_shards(store, caches):
    """A worse copy that the index did not know takes the place of a lost better one."""
    tokens, cache = caches.make_conversation(2, 9)
    with kvstore.Store(store.path, codec="turbo4") as lossy:
        lossy.save(tokens, cache, caches.MODEL, name="twice")
    store.save(tokens, cache, caches.MODEL, name="twice")
    better = shard_of(store, "twice")
    store.plan_prune()
    store._blocks._forget(better, None)
    (store.path / "shards" / better[:2] / f"{better}.safetensors").unlink()
    plan = store.plan_prune(now=True)
    assert plan.is_whole
    plan.execute()
    assert store.verify() == []
    assert store.load_entry("twice", caches.MODEL)[1] == tokens


@pytest.mark.parametrize("is_shard_lost", [False, True])
def test_a_copy_that_the_index_lost_is_not_removed(store, caches, is_shard_lost):
    """Of two copies the better one's file goes: the other one takes its place."""
    tokens, cache = caches.make_conversation(2, 9)
    with kvstore.Store(store.path, codec="turbo4") as lossy:
        lossy.save(tokens, cache, caches.MODEL, name="twice")
        worse = shard_of(lossy, "twice")
    store.save(tokens, cache, caches.MODEL, name="twice")
    better = shard_of(store, "twice")
    for path in (store.path / "shards").rglob("*.safetensors"):
        os.utime(path, (1, 1))
    store.plan_prune()
    if is_shard_lost:
        store._blocks.index._query("DELETE FROM shards WHERE name = ?", (worse,))
    (store.path / "shards" / better[:2] / f"{better}.safetensors").unlink()
    store.plan_prune().execute()
    assert store.verify() == []
    assert store.load_entry("twice", caches.MODEL)[1] == tokens


def test_a_root_that_the_index_lost_is_found_again(store, caches):
    """Without it nothing of a model is found, though all of it is stored."""
    tokens, cache = caches.make_conversation(2, 1)
    store.plan_prune()
    store._blocks.index._query("DELETE FROM roots")
    store.plan_prune()
    _, rest = store.load(tokens, caches.MODEL, like=cache)
    assert len(rest) == 1


@pytest.mark.parametrize(("codec", "num_read"), [("raw", 0), ("turbo4", 1)])
@pytest.mark.parametrize("what", ["nothing", "file", "rows", "note"])
def test_an_append_reads_what_changed(
    store_path, caches, opened, codec, num_read, what
):
    """Of shards that nobody touched none is read, but one to know lossy rows again."""
    tokens, cache = caches.make_conversation(5, 3)
    for num_tokens in (16, 32, 48):
        with kvstore.Store(store_path, codec) as store:
            some = caches.make_cache(num_tokens, num_tokens)
            store.save(tokens[:num_tokens], some, caches.MODEL, name="x")
    shards = set(store_path.rglob("*.safetensors"))
    if what == "file":
        for path in shards:
            os.utime(path, (1, 1))
    opened.clear()
    with kvstore.Store(store_path, codec) as store:
        index = store._blocks.index
        if what == "rows":
            index._query("UPDATE blocks SET nbytes = nbytes + 1")
        if what == "note":
            index._query("UPDATE confirmed SET codecs = 'a b'")
        assert store.save(tokens, cache, caches.MODEL, name="x").num_tokens == 80
    assert len(shards) == 3
    read = {path.stem for path in shards}.intersection(opened)
    assert len(read) == (num_read if what == "nothing" else 3)
    with kvstore.Store(store_path, codec) as store:
        assert store.verify() == []
        assert store.load_entry("x", caches.MODEL)[1] == tokens
