"""A store over a base that is only read: what is found there, and that it stays."""

import os
import shutil

import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.errors import EntryNotFoundError, KVStoreError, StoreNotFoundError
from kvstore.server import DiskPromptCache, ServedModel
from kvstore.storage.folder import create_folder

BLOCK = 16


def state_of(folder):
    """Return all that can be seen of a folder: names, times and bytes."""
    return {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture
def base_path(tmp_path, empty_store):
    return shutil.copytree(empty_store, tmp_path / "base")


@pytest.fixture
def doc(base_path, caches):
    """Tokens and rows of an entry of the base."""
    tokens, cache = caches.make_conversation(4, 1, extra=3)
    with kvstore.Store(base_path, "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
    return tokens, cache


@pytest.fixture
def store(store_path, base_path, doc):
    """The store, whose base is compared with what it was in the end."""
    before = state_of(base_path)
    with kvstore.Store(store_path, "raw", base=base_path) as store:
        yield store
    assert before == state_of(base_path)


def test_what_the_base_has_is_found(store, doc, caches):
    """By its tokens, by its name, and in the list."""
    tokens, cache = doc
    assert len(tokens) == store.lookup([*tokens, 7], caches.MODEL).num_tokens
    found, rest = store.load([*tokens, 7], caches.MODEL)
    assert ([7], caches.rows_of(cache)) == (rest, caches.rows_of(found))
    found, held = store.load_entry("doc", caches.MODEL)
    assert (tokens, caches.rows_of(cache)) == (held, caches.rows_of(found))
    assert ["doc"] == [entry.name for entry in store.entries()]
    assert len(tokens) == sum(len(b.block.tokens) for _, b in store.chain("doc"))
    assert not store.stats().num_entries


def test_what_only_the_base_has_is_not_changed(store):
    """And the error says so, since a list shows it."""
    for act in (store.remove, store.traces_of, lambda n: store.pin(n, pinned=True)):
        with pytest.raises(EntryNotFoundError, match="`doc` is in the base"):
            act("doc")
    with pytest.raises(EntryNotFoundError, match="no entry `else`"):
        store.remove("else")


def test_own_comes_first(store, doc, caches):
    """An own entry hides the base's of its name, and of two equal hits it is read."""
    tokens, cache = caches.make_conversation(2, 5)
    store.save(tokens, cache, caches.MODEL, name="doc")
    assert [tokens] == [store.load_entry("doc", caches.MODEL)[1]]
    assert 1 == len(store.entries())
    assert len(doc[0]) == store.lookup([*doc[0], 7], caches.MODEL).num_tokens


def test_what_goes_on_from_the_base_needs_it_no_more(store, store_path, doc, caches):
    """Its blocks are copied as they are when it is saved."""
    tokens, _ = doc
    theirs = [(p.hash, b.digest) for p, b in store.chain("doc")]
    found, _ = store.load([*tokens, 7], caches.MODEL)
    caches.grow(found, caches.random_rows(BLOCK, 9))
    longer = [*tokens, *range(7, 7 + BLOCK)]
    store.save(longer, found, caches.MODEL, name="mine")
    with kvstore.Store(store_path) as alone:
        restored, held = alone.load_entry("mine", caches.MODEL)
    assert (longer, caches.rows_of(found)) == (held, caches.rows_of(restored))
    mine = [(p.hash, b.digest) for p, b in store.chain("mine")]
    assert theirs[:4] == mine[:4]


def test_lossy_rows_of_the_base_stay_lossy(store_path, base_path, caches):
    """Neither coded again nor taken for exact, though their mark was lost."""
    tokens, cache = caches.make_conversation(4, 1)
    with kvstore.Store(base_path, "turbo4") as base:
        base.save(tokens, cache, caches.MODEL, name="doc")
        bits = [stored.bits for _, stored in base.chain("doc")]
    with kvstore.Store(store_path, "raw", base=base_path) as store:
        found, _ = store.load_entry("doc", caches.MODEL)
        unmarked = caches.grow(None, caches.random_rows(0, 1))
        for new, old in zip(unmarked, found, strict=True):
            new.keys, new.values, new.offset = old.keys, old.values, old.offset
        store.save(tokens, unmarked, caches.MODEL, name="mine")
        assert bits == [stored.bits for _, stored in store.chain("mine")]


def test_exact_rows_are_better_than_a_lossy_base(store_path, base_path, caches):
    """What was computed here is written, though the base has a copy."""
    tokens, cache = caches.make_conversation(4, 1)
    with kvstore.Store(base_path, "turbo4") as base:
        base.save(tokens, cache, caches.MODEL, name="doc")
    with kvstore.Store(store_path, "raw", base=base_path) as store:
        store.save(tokens, cache, caches.MODEL, name="mine")
        found, _ = store.load_entry("mine", caches.MODEL, exact=True)
    assert caches.rows_of(cache) == caches.rows_of(found)


def test_a_server_reads_it_and_copies_what_it_keeps(store, store_path, doc, caches):
    """Only new rows wait in memory; the rest comes from the base when it is written."""
    tokens, _ = doc
    served = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
    prompt_cache = DiskPromptCache(store.reopen(), lambda key: served, min_tokens=1)
    found, rest = prompt_cache.fetch_nearest_cache("m", [*tokens, 7])
    assert [7] == rest
    caches.grow(found, caches.random_rows(BLOCK, 9))
    longer = [*tokens, *range(7, 7 + BLOCK)]
    prompt_cache.insert_cache("m", longer, found)
    assert prompt_cache.close()
    with kvstore.Store(store_path) as alone:
        assert len(longer) == alone.lookup([*longer, 1], caches.MODEL).num_tokens


@pytest.mark.parametrize("what", ["rows", "header", "index", "no index", "new shard"])
def test_a_base_is_never_changed(base_path, store_path, doc, caches, flip_bit, what):
    """Neither is what is damaged set aside, nor what is missing made."""
    (shard,) = base_path.glob("shards/*/*.safetensors")
    if what in ("rows", "header"):
        flip_bit(shard, -1 if what == "rows" else 800)
    elif what == "new shard":
        index = (base_path / "index.sqlite").read_bytes()
        with kvstore.Store(base_path, "raw") as base:
            base.save(*caches.make_conversation(2, 3), caches.MODEL)
        (base_path / "index.sqlite").write_bytes(index)
    else:
        (base_path / "index.sqlite").unlink()
        if what == "index":
            (base_path / "index.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 9000)
    (base_path / "lock").unlink()
    shutil.rmtree(base_path / "tmp")
    before = state_of(base_path)
    with kvstore.Store(store_path, "raw", base=base_path) as store:
        found = store.lookup([*doc[0], 7], caches.MODEL).num_tokens
        loaded = len(doc[0]) + 1 - len(store.load([*doc[0], 7], caches.MODEL)[1])
        held = len(doc[0])
        expected = {"rows": (held, 4 * BLOCK), "header": (0, 0)}
        assert expected.get(what, (held, held)) == (found, loaded)
        if what == "new shard":
            tokens, _ = caches.make_conversation(2, 3)
            assert 2 * BLOCK == store.lookup([*tokens, 7], caches.MODEL).num_tokens
        store.save(*doc, caches.MODEL, name="mine")
        assert doc[0] == store.load_entry("mine", caches.MODEL)[1]
    assert before == state_of(base_path)


def test_what_the_base_has_is_not_for_removal(store):
    """It is as if it were not there."""
    for change in (store.remove, store.pin, store.traces_of):
        with pytest.raises(EntryNotFoundError):
            change("doc")


def test_no_base_is_an_error(store_path, tmp_path):
    """So is one of blocks of another size, whose rows nobody would find."""
    with pytest.raises(StoreNotFoundError):
        kvstore.Store(store_path, base=tmp_path / "none")
    other = create_folder(tmp_path / "other", 32).path
    with pytest.raises(KVStoreError, match="blocks of 32 tokens"):
        kvstore.Store(store_path, base=other)


def test_the_command_line_reads_a_base(run_cli, store_path, base_path, doc, tmp_path):
    """Listed, inspected and exported; removed it is not."""

    def run(*words):
        return run_cli("--base", base_path, *words, store=store_path)

    assert "doc" in run("ls")[1]
    assert 0 == run("inspect", "doc")[0]
    assert 0 == run("ls", "--tree")[0]
    assert 0 == run("export", "doc", "-o", tmp_path / "doc.kvbundle")[0]
    assert os.path.getsize(tmp_path / "doc.kvbundle") > 0
    assert 1 == run("rm", "doc", "-y")[0]
