"""Codes of a live cache are stored as they are, block by block."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from standins import run_on_a_thread

import kvstore
from kvstore.caches import restore
from kvstore.caches.snapshot import make_chain, take_live
from kvstore.codecs import get_codec
from turboquant.kv_cache import TurboQuantKVCache

BLOCK = 256


def grown(cache, num_tokens, seed, caches, dtype=mx.bfloat16):
    """Append random rows to every layer."""
    rows = caches.random_rows(num_tokens, seed, dim=32, dtype=dtype)
    for layer, side in zip(cache, rows, strict=True):
        layer.update_and_fetch(*side)
    return cache


def fresh():
    """Return an empty prompt cache of codes."""
    return [TurboQuantKVCache(5, 3) for _ in range(2)]


def bits_of(cache):
    """Return the bits of all rows, and how many are codes."""
    return [
        (bytes(memoryview(mx.contiguous(rows.read().view(mx.uint8)))), rows.num_coded)
        for layer in cache
        for rows in (layer.coded_keys, layer.coded_values)
    ]


@pytest.mark.parametrize("way", [restore.HostRestoring, restore.DeviceRestoring])
@pytest.mark.parametrize("codec", ["raw", "planes+zstd", "turbo2+zstd"])
def test_codes_are_kept_to_the_bit(tmp_path, caches, codec, way, monkeypatch):
    """What is restored holds the same codes, and goes on to the same bits."""
    monkeypatch.setattr("kvstore.ops.load.start_restoring", way)
    with kvstore.Store(tmp_path / "s", codec) as store:
        for num_tokens in (256, 257, 700):
            cache = grown(fresh(), num_tokens, num_tokens, caches)
            tokens = [num_tokens, *range(1, num_tokens)]
            entry = store.save(tokens, cache, caches.MODEL)
            restored, _ = store.load_entry(entry.id, caches.MODEL)
            assert bits_of(restored) == bits_of(cache)
            more = [grown(c, 300, 9, caches) for c in (restored, cache)]
            assert bits_of(more[0]) == bits_of(more[1])


def test_codes_take_the_bytes_of_codes(tmp_path, caches):
    """Whole blocks but the newest are stored in their few bits a number."""
    with kvstore.Store(tmp_path / "s", "planes+zstd") as store:
        sizes = [
            store.save(
                [n, *range(1, n)], grown(fresh(), n, 1, caches), caches.MODEL
            ).nbytes
            for n in (BLOCK, 4 * BLOCK)
        ]
    bits = (sizes[1] - sizes[0]) * 8 / (3 * BLOCK * 2 * 2 * 2 * 32)
    assert bits < 4 + 32 / 32 + 0.6  # 5 and 3, a norm, means and headers


@pytest.mark.parametrize("cut", [3, 4, 100, 255, 256, 257, 511, 513, 690])
def test_a_hit_may_end_anywhere(tmp_path, caches, cut):
    """Inside a coded block or behind it, the rows are those that the cache had."""
    cache = grown(fresh(), 700, 1, caches)
    with kvstore.Store(tmp_path / "s", "planes+zstd") as store:
        store.save(list(range(700)), cache, caches.MODEL)
        restored, rest = store.load([*range(cut), -1], caches.MODEL, like=cache)
    assert rest == [-1]
    for layer in cache:
        layer.trim(700 - cut)
    assert [rows for rows, _ in bits_of(restored)] == [r for r, _ in bits_of(cache)]
    restored = grown(restored, 3, 5, caches)
    assert {layer.offset for layer in restored} == {cut + 3}


def test_what_was_the_newest_block_is_coded_once(tmp_path, caches):
    """Blocks that a save had exact are coded when later codes are behind them."""
    cache = fresh()
    with kvstore.Store(tmp_path / "s", "planes+zstd") as store:
        for num_tokens in (BLOCK, 2 * BLOCK, 2 * BLOCK + 9, 4 * BLOCK):
            missing = num_tokens - cache[0].offset
            grown(cache, missing, num_tokens, caches)
            store.save(list(range(num_tokens)), cache, caches.MODEL, name="x")
        restored, _ = store.load_entry("x", caches.MODEL)
        assert bits_of(restored) == bits_of(cache)
        store.save([*range(4 * BLOCK)], restored, caches.MODEL, name="y")
        assert not list(store.verify())


def test_codes_can_be_taken_for_another_thread(tmp_path, caches):
    """A snapshot has copies of the codes, whatever becomes of the cache."""
    cache = grown(fresh(), 300, 1, caches)
    chain, _ = make_chain(caches.MODEL.fields, cache, range(300), BLOCK)
    live, codec = take_live(chain, cache, 300, ""), get_codec("turbo4")
    taken = live.take(chain.blocks, lambda block: codec)
    keys, values = (x["codes"] for _, x in taken.rows.read(chain.blocks[0]))
    assert (keys.nbytes, values.nbytes) == (2 * 2 * 252 * 16, 2 * 2 * 252 * 8)


def test_codes_that_one_thread_loads_are_for_any(tmp_path, caches):
    """Nothing of them is left to be computed by the thread that loaded them."""
    cache = grown(fresh(), 800, 1, caches)
    with kvstore.Store(tmp_path / "s", "raw") as store:
        store.save(list(range(800)), cache, caches.MODEL)

    def load():
        with kvstore.Store(tmp_path / "s", "raw") as store:
            return store.load([*range(800), -1], caches.MODEL, like=cache)

    restored, rest = run_on_a_thread(load)
    assert rest == [-1]
    assert bits_of(restored) == bits_of(cache)


def test_decoded_codes_are_not_exact(tmp_path, caches):
    """Rows that a user decoded are never served as exact, nor coded again."""
    codes = grown(fresh(), 300, 1, caches)
    cache = [layer.to_kv_cache() for layer in codes]
    with kvstore.Store(tmp_path / "s", "turbo4+zstd") as store:
        store.save(list(range(300)), cache, caches.MODEL, name="x")
        rows = [row for _, row in store.chain("x")]
        assert not any(row.is_exact for row in rows)
        assert rows[0].is_lossless


def test_codes_are_decoded_where_rows_are_asked_for(tmp_path, caches):
    """Only by `from_codes`; what was coded stays marked so."""
    codes = grown(fresh(), 300, 1, caches)
    like = [KVCache() for _ in codes]
    prompt = [*range(300), -1]
    with kvstore.Store(tmp_path / "s", "raw") as store:
        store.save(list(range(300)), codes, caches.MODEL)
        assert store.load(prompt, caches.MODEL, like=like)[0] is None
        found, rest = store.load(prompt, caches.MODEL, like=like, from_codes=True)
        store.save(list(range(300)), found, caches.MODEL, name="rows")
        assert not any(row.is_exact for _, row in store.chain("rows"))
    assert rest == [-1]
    for layer, kept in zip(found, codes, strict=True):
        assert mx.array_equal(layer.keys[:, :, :300], kept.coded_keys.read()).item()


def test_codes_of_other_blocks_are_refused(store_path, caches):
    """A store of other blocks would have to decode and code them again."""
    cache = grown(fresh(), 300, 1, caches)
    with (
        kvstore.Store(store_path, "raw") as store,
        pytest.raises(kvstore.UnsupportedCacheError, match="blocks of 256 tokens"),
    ):
        store.save(list(range(300)), cache, caches.MODEL)
