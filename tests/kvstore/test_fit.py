"""Stored rows are held against the model before one of them is decoded."""

import io

import mlx.core as mx
import mlx_lm
import pytest
from kit import stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache

import kvstore
from kvstore.caches import restore
from kvstore.caches.fit import feed, shapes_of
from kvstore.models.load import LoadedModel
from kvstore.models.session import CacheOptions, load_empty_cache, make_empty_cache
from turboquant import quantize_prompt_cache

TOKENS = [(7 * i) % 250 for i in range(70)]
OTHER = {
    "layers": {"layers": 3},
    "heads": {"heads": 1},
    "dimension": {"dim": 8},
    "dtype": {"dtype": mx.float16},
}


def forged(caches, loaded, **changes):
    """Return a prompt cache like the tiny model's, but for what is given."""
    own = shapes_of(fed(loaded))[0]["k"]
    layers = len(loaded[0].layers)
    options = {"layers": layers, "heads": own[0], "dim": own[1], "dtype": mx.float32}
    return caches.make_cache(len(TOKENS), **options | changes)


def fed(loaded):
    """Return the tiny model's caches with some rows in them."""
    made = mlx_lm.models.cache.make_prompt_cache(loaded[0])
    feed(loaded[0], made)
    return made


def like(loaded, kv_bits=None):
    """Return the tiny model's empty caches."""
    return make_empty_cache(
        LoadedModel(*loaded), CacheOptions(kv_bits=kv_bits, kv_group_size=32)
    )


@pytest.mark.parametrize("what", OTHER)
def test_rows_of_another_shape_are_a_miss(store_path, caches, loaded, what):
    """A reply is the model's own, whatever is filed under its fingerprint."""
    model, tokenizer, fingerprint = loaded
    with kvstore.Store(store_path, "raw") as store:
        cache = forged(caches, loaded, **OTHER[what])
        store.save(TOKENS, cache, fingerprint, name="forged")
        match = store.lookup(TOKENS, fingerprint, like=like(loaded))
        assert match.num_tokens == 0
        assert "does not fit it: layer" in match.detail
        responses = stream_generate(
            model, tokenizer, TOKENS, store=store, fingerprint=fingerprint, max_tokens=3
        )
        said = [response.token for response in responses]
        expected = mlx_lm.stream_generate(model, tokenizer, TOKENS, 3)
        assert said == [response.token for response in expected]
        with kvstore.tier(model, fingerprint=fingerprint, path=store_path) as tier:
            found, _ = tier.fetch([*TOKENS, 1])  # what was just computed
            assert shapes_of(found) == shapes_of(fed(loaded))


@pytest.mark.parametrize("kv_bits", [None, 8, "turbo4"])
def test_rows_of_the_model_fit_it(store_path, caches, loaded, kv_bits):
    """Its own rows are found, as codes and as decoded ones."""
    _, _, fingerprint = loaded
    plain = forged(caches, loaded)
    kept = plain
    if kv_bits == 8:
        kept = [cache.to_quantized(32, 8) for cache in plain]
    elif kv_bits:
        kept = quantize_prompt_cache(plain, kv_bits)
    with kvstore.Store(store_path, "raw") as store:
        store.save(TOKENS, kept, fingerprint)
        wanted = like(loaded, kv_bits)
        assert store.load(TOKENS, fingerprint, like=wanted)[0] is not None
        if kv_bits == "turbo4":
            found, _ = store.load(
                TOKENS, fingerprint, like=like(loaded), from_codes=True
            )
            assert type(found[0]) is KVCache


def bundle_of(path, cache, fingerprint):
    """Return the bundle of an entry of these caches."""
    data = io.BytesIO()
    with kvstore.Store(path, "raw") as store:
        store.export_bundle(store.save(TOKENS, cache, fingerprint).id, data)
    data.seek(0)
    return data


@pytest.mark.parametrize("what", OTHER)
def test_a_bundle_of_another_shape_is_refused(
    tmp_path, caches, tiny_model, loaded, what
):
    """Nothing of it is in the store afterwards."""
    wanted, fingerprint = load_empty_cache(str(tiny_model))
    cache = forged(caches, loaded, **OTHER[what])
    data = bundle_of(tmp_path / "theirs", cache, fingerprint)
    with kvstore.Store(tmp_path / "mine") as mine:
        with pytest.raises(kvstore.IntegrityError, match="not of this model: layer"):
            mine.import_bundle(data, fingerprint=fingerprint, like=wanted)
        assert (mine.entries(), mine.verify()) == ([], [])


def test_a_bundle_of_codes_of_the_model_is_taken(tmp_path, caches, loaded):
    """Options choose the classes of the caches, and no heads or dimensions."""
    coded = [cache.to_quantized(32, 8) for cache in forged(caches, loaded)]
    data = bundle_of(tmp_path / "theirs", coded, loaded[2])
    with kvstore.Store(tmp_path / "mine") as mine:
        entry = mine.import_bundle(data, fingerprint=loaded[2], like=like(loaded))
        found, _ = mine.load_entry(entry.id, loaded[2])
    assert type(found[0]) is QuantizedKVCache


def test_more_than_the_memory_is_refused(tmp_path, caches, loaded, monkeypatch):
    """By an import, by a load, and by a load of an entry."""
    data = bundle_of(tmp_path / "theirs", forged(caches, loaded), loaded[2])
    monkeypatch.setattr(restore, "memory_bytes", lambda: 1000)
    with kvstore.Store(tmp_path / "mine") as mine:
        with pytest.raises(kvstore.IntegrityError, match="this machine's memory"):
            mine.import_bundle(data)
        assert mine.entries() == []
    with kvstore.Store(tmp_path / "theirs") as theirs:
        (entry,) = theirs.entries()
        assert theirs.load(TOKENS, loaded[2]) == (None, TOKENS)
        with pytest.raises(kvstore.IntegrityError, match="this machine's memory"):
            theirs.load_entry(entry.id, loaded[2])
