"""Every class of append-only cache is stored as what it keeps, and rebuilt from it."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
)
from standins import run_on_a_thread

import kvstore
from kvstore.caches import kinds as registry
from kvstore.caches import live
from kvstore.caches.kinds import _KINDS, register_kind
from kvstore.caches.kinds.arrays import _shape
from kvstore.caches.kinds.plain import PlainRows
from kvstore.caches.mlx_files import open_cache_file, write_prompt_cache
from turboquant.kv_cache import TurboQuantKVCache

LAYERS = 2
MAKERS = {
    "KVCache": KVCache,
    "ConcatenateKVCache": ConcatenateKVCache,
    "QuantizedKVCache 4": lambda: QuantizedKVCache(group_size=64, bits=4),
    "QuantizedKVCache 8": lambda: QuantizedKVCache(group_size=32, bits=8),
    "TurboQuantKVCache 4": lambda: TurboQuantKVCache(4),
    "TurboQuantKVCache 5v3": lambda: TurboQuantKVCache(5, 3),
}
kinds = pytest.mark.parametrize("kind", MAKERS)


def filled(kind, rows):
    """Return a prompt cache of one class over some rows."""
    prompt_cache = [MAKERS[kind]() for _ in range(LAYERS)]
    return extended(prompt_cache, rows)


def extended(prompt_cache, rows):
    """Append rows to every layer."""
    for layer, cache in enumerate(prompt_cache):
        cache.update_and_fetch(rows[layer, 0], rows[layer, 1])
    return prompt_cache


def fetched(prompt_cache):
    """Return the bits of all that the layers give to attention."""

    def bits(value):
        if isinstance(value, mx.array):
            return bytes(memoryview(mx.contiguous(value).view(mx.uint8)))
        return [bits(item) for item in value]

    return [bits(keys_and_values(cache)) for cache in prompt_cache]


def keys_and_values(cache):
    """Return what a cache holds; mlx-lm 0.31 has no method for it."""
    if isinstance(cache, TurboQuantKVCache):
        return cache.keys_and_values()
    return tree_map(lambda x: x[..., : cache.offset, :], [cache.keys, cache.values])


@kinds
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 16, 17, 40, 300])
def test_what_is_restored_goes_on_as_if_never_stored(
    store_path, caches, kind, num_tokens
):
    """A restored cache holds the same bits, and takes more rows to the same bits."""
    rows = caches.random_rows(num_tokens, 1)
    more = caches.random_rows(30, 2)
    tokens = list(range(num_tokens))
    with kvstore.Store(store_path, codec="turbo4+zstd") as store:
        cache = filled(kind, rows)
        if kind == "KVCache" or ("Turbo" in kind and num_tokens > 256):
            return  # it is coded here; other tests have it in lossless codecs
        if kind == "ConcatenateKVCache":
            store = kvstore.Store(store_path, codec="planes+zstd")
        store.save(tokens, cache, caches.MODEL, name="x")
        restored, held = store.load_entry("x", caches.MODEL)
    assert held == tokens
    assert [type(c) for c in restored] == [type(c) for c in cache]
    assert fetched(restored) == fetched(cache)
    assert fetched(extended(restored, more)) == fetched(extended(cache, more))


def test_keys_without_values_go_on_in_another_thread(store_path, caches):
    """Those of an indexer, whose values have no dimension."""
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 1, 20, 64)), mx.zeros((1, 1, 20, 0)))
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(list(range(20)), [cache], caches.MODEL)

    def load():
        with kvstore.Store(store_path) as store:
            return store.load([*range(20), -1], caches.MODEL)

    (restored,), rest = run_on_a_thread(load)
    restored.update_and_fetch(mx.ones((1, 1, 3, 64)), mx.zeros((1, 1, 3, 0)))
    mx.eval(restored.state)
    assert rest == [-1]
    assert restored.keys[:, :, :23].sum().item() == 23 * 64


@kinds
def test_a_second_turn_writes_its_rows_and_one_block_at_most(store_path, caches, kind):
    """Growing a restored cache adds a shard of the new rows."""
    rows = caches.random_rows(40, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        first = store.save(list(range(40)), filled(kind, rows), caches.MODEL, name="x")
        cache, _ = store.load_entry("x", caches.MODEL)
        before = fetched(cache)
        extended(cache, caches.random_rows(10, 2))
        store.save(list(range(50)), cache, caches.MODEL, name="x")
        assert len(store.chain("x")) == 4
        per_token = first.nbytes / 40
        written = store.stats().counters["written_bytes"] - first.nbytes
        assert written < 26 * per_token + 10_000
        again, _ = store.load(list(range(41)), caches.MODEL, like=cache)
        assert fetched(again) == before


@kinds
def test_a_hit_may_end_anywhere_in_lossless_blocks(store_path, caches, kind):
    """A prompt that diverges inside a block restores the rows before, to the bit."""
    rows = caches.random_rows(40, 1)
    for cut in (1, 2, 3, 4, 5, 15, 16, 17, 33):
        with kvstore.Store(store_path, codec="raw") as store:
            cache = filled(kind, rows)
            store.save(list(range(40)), cache, caches.MODEL, name="x")
            restored, rest = store.load([*range(cut), -7], caches.MODEL, like=cache)
        assert rest == [-7]
        assert fetched(restored) == fetched(filled(kind, rows[..., :cut, :]))


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "Quant" in kind])
def test_live_codes_are_kept_to_the_bit_and_are_not_exact(store_path, caches, kind):
    """A quantized live cache loses nothing more, and is for who asks for codes only."""
    cache = filled(kind, caches.random_rows(40, 1))
    prompt = [*range(40), -1]
    with kvstore.Store(store_path, codec="turbo2+zstd") as store:
        store.save(list(range(40)), cache, caches.MODEL, name="x")
        assert all(row.is_lossless for _, row in store.chain("x"))
        restored, _ = store.load(prompt, caches.MODEL, like=cache)
        assert fetched(restored) == fetched(cache)
        options = {"like": cache, "exact": True}
        assert store.load(prompt, caches.MODEL, **options) == (None, prompt)
        assert store.load(prompt, caches.MODEL) == (None, prompt)


def test_like_asks_for_parameters_too(store_path, caches):
    """A cache of other bits than were asked for is no hit."""
    cache = filled("QuantizedKVCache 4", caches.random_rows(40, 1))
    prompt = [*range(40), -1]
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(list(range(40)), cache, caches.MODEL, name="x")
        for bits, expected in ((4, [-1]), (8, prompt)):
            like = [QuantizedKVCache(group_size=64, bits=bits) for _ in range(LAYERS)]
            assert store.load(prompt, caches.MODEL, like=like)[1] == expected


def test_early_and_late_layers_may_differ(store_path, caches):
    """A prompt cache of several classes is stored layer by layer."""
    rows = caches.random_rows(40, 1, layers=4)
    cache = [MAKERS[kind]() for kind in ("KVCache", "QuantizedKVCache 4") * 2]
    extended(cache, rows)
    with kvstore.Store(store_path, codec="planes+zstd") as store:
        store.save(list(range(40)), cache, caches.MODEL, name="x")
        restored, _ = store.load_entry("x", caches.MODEL)
    assert fetched(restored) == fetched(cache)


class Subclass(KVCache):
    """Keeps more than its base, for all that the store knows."""


@pytest.mark.parametrize(
    "other",
    [BatchKVCache([0]), Subclass(), CacheList(KVCache(), Subclass())],
    ids=lambda cache: type(cache).__name__,
)
def test_other_classes_are_refused_by_name(store_path, caches, other):
    """A class that cannot be stored is named with its layer, and nothing is written."""
    cache = [*caches.make_cache(20), other]
    with kvstore.Store(store_path, codec="raw") as store:
        with pytest.raises(kvstore.UnsupportedCacheError) as caught:
            store.save(list(range(20)), cache, caches.MODEL, name="x")
        named = "Subclass" if isinstance(other, CacheList) else type(other).__name__
        assert f"is a {named}, which cannot be stored" in str(caught.value)
        assert store.entries() == []
    assert list(store_path.glob("shards/*/*")) == []


def test_a_window_that_lacks_rows_is_refused(store_path, caches):
    """What mlx-lm 0.31 leaves of a chunk now and then is not saved as if whole."""
    rows = caches.random_rows(300, 1, layers=1)
    (cache,) = extended([ChunkedKVCache(256)], rows)
    cache.keys, cache.values = cache.keys[:, :, 256:], cache.values[:, :, 256:]
    cache.start_position = 256
    refused = pytest.raises(kvstore.UnsupportedCacheError, match="44 rows are left")
    with kvstore.Store(store_path) as store:
        with refused:
            store.save(list(range(300)), [cache], caches.MODEL)
        assert store.entries() == []


def test_a_class_from_outside_can_be_registered(
    tmp_path, store_path, caches, monkeypatch
):
    """One object teaches the store a class: blocks, and mlx-lm's files of it.

    A name can be taken once.
    """

    class Outside(KVCache):
        pass

    class OutsideRows(PlainRows):
        name = "Outside"

        def owns(self, cache):
            return type(cache) is Outside

        def build(self, layout, buffers, num_tokens):
            cache = super().build(layout, buffers, num_tokens)
            cache.__class__ = Outside
            return cache

    monkeypatch.setattr(registry, "_OF_CLASS", {})
    monkeypatch.setattr(registry, "_KINDS", list(_KINDS))
    assert registry.find_kind(Outside()) is None
    register_kind(OutsideRows())
    with pytest.raises(ValueError, match="already"):
        register_kind(OutsideRows())
    cache = extended([Outside()], caches.random_rows(20, 1, layers=1))
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(list(range(20)), cache, caches.MODEL, name="x")
        restored, _ = store.load_entry("x", caches.MODEL)
    assert type(restored[0]) is Outside
    assert fetched(restored) == fetched(cache)
    write_prompt_cache(tmp_path / "x.safetensors", cache, "a/model")
    read = open_cache_file(tmp_path / "x.safetensors", [Outside()]).read()
    assert type(read[0]) is Outside
    assert fetched(read) == fetched(cache)


@kinds
@pytest.mark.parametrize("cut_at", [1, 4, 5, 16, 39])
def test_a_cut_cache_goes_on_as_one_that_never_had_the_rows(caches, kind, cut_at):
    """Every cuttable class drops its last rows and leaves the others as they were."""
    rows, more = caches.random_rows(40, 1), caches.random_rows(30, 2)
    cache = filled(kind, rows)
    if not live.is_cuttable(cache):
        assert kind == "ConcatenateKVCache"
        return
    assert live.cut(cache, cut_at) == cut_at
    shorter = filled(kind, rows[..., :cut_at, :])
    assert fetched(cache) == fetched(shorter)
    assert fetched(extended(cache, more)) == fetched(extended(shorter, more))


class Unwalked(dict):
    """Parameters that may be asked for, but not gone through."""

    def items(self):
        """Refuse."""
        raise AssertionError

    __iter__ = keys = values = items


def test_a_state_finds_its_shape_among_many_parameters():
    """Thousands of states with thousands of parameters take no time."""
    params = Unwalked({f"shape3.{axis}": axis + 2 for axis in range(3)})
    assert _shape(params, "3") == (2, 3, 4)
    assert _shape(params, "30") == ()
