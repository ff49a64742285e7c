"""Recompressing: exact blocks get another codec because a user asks; others stay."""

from unittest.mock import patch

import kit
import pytest

import kvstore
from kvstore.storage.blocks import BlockStore

fitted = kit.load_beside("test_fit_store")
TOKENS = fitted.TOKENS
MODEL = fitted.MODEL


@pytest.fixture
def store(tmp_path):
    """Return a store with an exact entry, and a longer one that shares its blocks."""
    with kvstore.Store(tmp_path / "store", "planes+zstd") as opened:
        opened.save(TOKENS, fitted.fitted_cache(600), MODEL, name="doc")
        yield opened


def codecs_of(store, ref="doc"):
    """Return the codecs of an entry's blocks."""
    return [stored.codec for _, stored in store.chain(ref)]


def rows_of(store, ref="doc"):
    """Return the bits of an entry's rows."""
    found, _ = store.load_entry(ref, MODEL)
    return [kit.bits_of(x) for x in fitted.rows_of(found)]


def test_exact_blocks_get_another_codec(store, tmp_path):
    """They are as if saved so; the tail stays, and the entry says what it was."""
    before = store.entry("doc")
    done = store.recompress("doc", "turbo4+zstd")
    assert ["turbo4+zstd", "turbo4+zstd", "planes+zstd"] == codecs_of(store)
    assert ("turbo4+zstd", "planes+zstd") == (
        done.codec, done.made_with["recompressed from"]
    )  # fmt: skip
    assert done == store.entry("doc")
    assert done.nbytes < before.nbytes
    with kvstore.Store(tmp_path / "other", "turbo4+zstd") as other:
        other.save(TOKENS, fitted.fitted_cache(600), MODEL, name="doc")
        assert rows_of(other) == rows_of(store)
    assert [] == store.verify()


def test_the_old_copies_are_gone(store):
    """They do not come back when the index is built anew, and take no room."""
    before = store.stats().nbytes
    store.recompress("doc", "turbo4+zstd")
    assert store.stats().nbytes * 2 < before
    (store.path / "index.sqlite").unlink()
    with kvstore.Store(store.path) as again:
        assert "turbo4+zstd" == codecs_of(again)[0]
        again.plan_prune(now=True).execute()
        assert rows_of(again)


def test_nothing_lossy_is_coded_again(store):
    """What went through codes stays, to the bit, whatever is asked."""
    store.recompress("doc", "turbo4+zstd")
    entry, rows = store.entry("doc"), rows_of(store)
    assert entry == store.recompress("doc", "turbo2+zstd")
    assert rows == rows_of(store)
    loaded, _ = store.load_entry("doc", MODEL)
    with kvstore.Store(store.path.parent / "other", "planes") as other:
        copied = other.save(TOKENS, loaded, MODEL, name="doc")
        assert not any(stored.is_exact for _, stored in other.chain("doc")[:2])
        assert copied == other.recompress("doc", "turbo2+zstd")
        assert rows == rows_of(other)


def test_an_entry_that_shares_blocks_can_be_loaded(store):
    """Its blocks are the new ones; what follows them is as exact as before."""
    tokens = [*TOKENS[:512], *range(5000, 5400)]
    cache = fitted.fitted_cache(912)
    store.save(tokens, cache, MODEL, name="longer")
    store.recompress("doc", "turbo4+zstd")
    assert ["turbo4+zstd"] * 2 + ["planes+zstd"] * 2 == codecs_of(store, "longer")
    assert rows_of(store, "longer")
    assert [] == store.verify()


def test_what_a_pinned_entry_has_stays_exact(store):
    """Another entry that shares its blocks can be recompressed; its own are exact."""
    tokens = [*TOKENS[:256], *range(5000, 5400)]
    store.save(tokens, fitted.fitted_cache(656), MODEL, name="longer")
    store.pin("doc")
    store.recompress("longer", "turbo4+zstd")
    assert ["planes+zstd"] * 3 == codecs_of(store)
    assert ["planes+zstd", "turbo4+zstd"] == codecs_of(store, "longer")[:2]
    store.recompress("doc", "turbo4+zstd")
    assert "turbo4+zstd" == codecs_of(store)[0]


def test_a_block_that_the_index_lost_is_not_lost(store):
    """Shards are compared with the index before any of them goes."""
    tokens = [*TOKENS[:512], *range(5000, 5400)]
    with kvstore.Store(store.path.parent / "two", "planes+zstd") as two:
        two.save(tokens, fitted.fitted_cache(912), MODEL, name="longer")
        two.save(TOKENS[:512], fitted.fitted_cache(512), MODEL, name="doc")
        (name,) = (two.path / "shards").glob("*/*.safetensors")
        place, _ = two.chain("longer")[-1]
        forget = "DELETE FROM blocks WHERE hash = ?"
        two._blocks.index._query(forget, (place.hash,))
        two.recompress("doc", "turbo4+zstd")
        assert not name.exists()
        assert ["turbo4+zstd"] * 2 + ["planes+zstd"] * 2 == codecs_of(two, "longer")
        assert rows_of(two, "longer")
        assert [] == two.verify()


@pytest.mark.parametrize("step", ["replace", "drop_copies", "repack", "drop_shards"])
def test_an_error_on_the_way_loses_nothing(store, step):
    """The entry can be loaded after it, and recompressed."""
    store.save(list(range(9000, 9300)), fitted.fitted_cache(300, 3), MODEL)
    with (
        patch.object(BlockStore, step, side_effect=OSError(28, "full")),
        pytest.raises(OSError, match="full"),
    ):
        store.recompress("doc", "turbo4+zstd")
    assert rows_of(store)
    assert [] == store.verify()
    store.recompress("doc", "turbo4+zstd")
    assert "turbo4+zstd" == codecs_of(store)[0]
    store.plan_prune(now=True).execute()
    assert rows_of(store)


def test_the_verb_asks_and_tells(store, run_cli):
    """It needs to know into what, and a yes, since what was exact is not afterwards."""
    words = ("recompress", "doc")
    assert run_cli(*words, "-y")[0] == 2
    assert run_cli(*words, "--quality", "small")[0] != 0
    assert "planes+zstd" == codecs_of(store)[0]
    code, out, err = run_cli(*words, "--quality", "small", "-y")
    assert (code, "recompressed `doc`" in out) == (0, True), err
    assert "turbo4+zstd" == codecs_of(store)[0]
    assert "nothing of `doc`" in run_cli(*words, "--quality", "small", "-y")[1]
