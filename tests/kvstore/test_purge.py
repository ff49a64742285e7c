"""What was removed for good is in no byte of the store."""

import os
import subprocess
import sys

import pytest

import kvstore
from kvstore.storage import files

SECRET = range(2_000_000_000, 2_000_000_016)


@pytest.fixture
def store(store_path, caches):
    """A store with a chat that nobody shares, and another one."""
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(list(SECRET), caches.make_cache(16, 5), caches.MODEL, name="secret")
        tokens, cache = caches.make_conversation(3, 1)
        store.save(tokens, cache, caches.MODEL, name="kept")
        yield store


def traces(path):
    """Return the files that hold the name or a token of the chat that was removed."""
    words = [b"secret", *(str(token).encode() for token in SECRET)]
    words += [token.to_bytes(4, "big") for token in SECRET]  # as SQLite has them
    held = [file for file in path.rglob("*") if file.is_file()]
    return [f for f in held if any(word in f.read_bytes() for word in words)]


def test_without_a_purge_the_tokens_stay(store, store_path):
    """The search finds what it is to find."""
    store.remove("secret")
    assert traces(store_path)


@pytest.mark.parametrize("where", ["shards", "quarantine", "damaged", "tmp", "index"])
def test_a_purge_leaves_no_byte(store, store_path, caches, where):
    """Wherever it lies: beside good shards, put aside, damaged, or half written."""
    (shard,) = {
        store_path / "shards" / place.shard[:2] / f"{place.shard}.safetensors"
        for place, _ in store.chain("secret")
    }
    data = shard.read_bytes()
    store.remove("secret")
    if where == "quarantine":
        shard.rename(store_path / "quarantine" / shard.name)
    elif where == "damaged":
        shard.chmod(0o600)
        shard.write_bytes(data[:100] + b"x" + data[101:])
    elif where == "tmp":
        (store_path / "tmp" / "0f").write_bytes(data)
    elif where == "index":
        store.plan_prune(now=True).execute()
    store.purge()
    assert [] == traces(store_path)
    assert [] == os.listdir(store_path / "quarantine") + os.listdir(store_path / "tmp")
    assert [] == store.verify()
    assert store.load_entry("kept", caches.MODEL)


def test_a_purge_takes_back_what_others_need(store, store_path, caches):
    """A whole shard in quarantine is some entry's, and is not deleted."""
    for path in store_path.glob("shards/*/*.safetensors"):
        path.rename(store_path / "quarantine" / path.name)
    store.remove("secret")
    store.purge()
    assert [] == traces(store_path)
    assert store.load_entry("kept", caches.MODEL)


def test_what_is_being_written_stays(store, store_path):
    """A save that is under way keeps its files, and the purge says so."""
    store.remove("secret")
    with files.staged(store_path / "tmp") as (path, _):
        with pytest.raises(kvstore.KVStoreError, match="another process is writing"):
            store.purge()
        assert path.exists()
    store.purge()
    assert [] == traces(store_path)


def test_where_an_entry_hides_what_it_needs_nothing_is_purged(store, store_path):
    """While an entry lacks a block, the purge refuses, and says what to do."""
    kept = {place.shard for place, _ in store.chain("kept")}
    for name in kept:
        (store_path / "shards" / name[:2] / f"{name}.safetensors").unlink()
    store.remove("secret")
    with pytest.raises(kvstore.KVStoreError, match="stays on disk"):
        store.purge()
    store.remove("kept")
    store.purge()
    assert [] == traces(store_path)


def test_rm_purges(store, store_path):
    """`kvstore rm NAME --purge`, and without a name what was removed before."""
    command = [sys.executable, "-m", "kvstore", "--store", store_path, "rm", "-y"]
    subprocess.run([*command, "secret", "--purge"], check=True, capture_output=True)
    assert [] == traces(store_path)
    done = subprocess.run([*command, "--purge"], check=True, capture_output=True)
    assert b"removed nothing, for good" in done.stdout + done.stderr


FORMS = {
    "hash in hex": lambda block, tokens: block.hex().encode(),
    "hash": lambda block, tokens: bytes(block),
    "tokens": lambda block, tokens: b",".join(str(t).encode() for t in tokens[8:16]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_that_is_left_is_found(store, store_path, form):
    """Wherever a purge does not come, and in whatever form."""
    ((block, _),) = store.traces_of("secret").items()
    traces = store.traces_of("secret") | store.traces_of("kept")
    (store_path / "notes").write_bytes(b"x" + FORMS[form](block, SECRET) + b"x")
    store.remove("secret")
    with pytest.raises(kvstore.KVStoreError, match=r"still in the store: .*notes"):
        store.purge(traces)
    (store_path / "notes").unlink()
    store.purge(traces)


def test_what_another_entry_shares_is_not_looked_for(store, caches):
    """Its blocks stay, and so does another conversation that says the same."""
    tokens = list(SECRET)
    other = caches.OTHER_WEIGHTS
    store.save(tokens, caches.make_cache(16, 5), other, name="same text")
    traces = store.traces_of("secret") | store.traces_of("kept")
    store.remove("secret")
    store.purge(traces)
    assert store.load([*tokens, 1], other)[0] is not None


def test_what_is_no_shard_ends_no_purge(store, store_path):
    """Its first bytes, which say how long a header is, may say anything."""
    removed = store.traces_of("secret")
    (store_path / "shards/00/notes").write_text("hello world")
    store.remove("secret")
    store.purge(removed)
    assert [] == traces(store_path)
