"""Rows that came out of codes are never exact again, whatever they went through."""

import copy

import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

import kvstore
from kvstore.caches.live import read_provenance
from turboquant import quantize_prompt_cache


def batched(prompt_cache, folder):
    """Merge two of them into a batch, and take one out of it."""
    return [BatchKVCache.merge([cache, cache]).extract(0) for cache in prompt_cache]


def written(prompt_cache, folder):
    """Write and read it with mlx-lm's own functions."""
    save_prompt_cache(str(folder / "x.safetensors"), prompt_cache)
    return load_prompt_cache(str(folder / "x.safetensors"))


def copied(prompt_cache, folder):
    """Copy it as mlx-lm's server does."""
    return copy.deepcopy(prompt_cache)


def coded(prompt_cache, folder):
    """Code its rows in more bits than they had, and decode them."""
    live = quantize_prompt_cache(prompt_cache, "turbo8")
    return [cache.to_kv_cache() for cache in live]


@pytest.mark.parametrize("way", [batched, written, copied, coded])
@pytest.mark.parametrize("begins", ["lossy", "exact"])
def test_lossy_rows_stay_lossy(way, begins, store_path, tmp_path, caches):
    """What is computed on restored rows is not exact, and they are not coded again."""
    tokens = list(range(70))
    prompt_cache = caches.make_cache(48)
    if begins == "exact":  # one block, with two lossy ones behind it
        with kvstore.Store(store_path, codec="raw") as store:
            first = caches.make_cache(16)
            for mine, other in zip(first, prompt_cache, strict=True):
                mine.keys, mine.values = other.keys, other.values
            store.save(tokens[:16], first, caches.MODEL)
    with kvstore.Store(store_path, codec="turbo2") as store:
        store.save(tokens[:48], prompt_cache, caches.MODEL)
    with kvstore.Store(store_path, codec="turbo8") as store:
        held, rest = store.load(tokens[:49], caches.MODEL)
        assert rest == [48]
        went = caches.grow(way(held, tmp_path), caches.random_rows(22, 5))
        entry = store.save(tokens, went, caches.MODEL)
        bits = [place.bits for place, _ in store.chain(entry.id)]
        assert bits == [255 if begins == "exact" else 2, 2, 2, 2, 2]
        restored, _ = store.load_entry(entry.id, caches.MODEL)
        assert caches.rows_of(restored, 0, 48) == caches.rows_of(held, 0, 48)


def test_lossy_rows_stay_lossy_while_they_grow(store_path, caches):
    """So it is with what is handed over step by step."""
    tokens = list(range(70))
    with kvstore.Store(store_path, codec="turbo2") as store:
        store.save(tokens[:48], caches.make_cache(48), caches.MODEL)
    with kvstore.Store(store_path, codec="raw") as store:
        held, _ = store.load(tokens[:49], caches.MODEL)
        went = caches.grow(batched(held, None), caches.random_rows(22, 5))
        assert store.save_blocks(tokens, went, caches.MODEL) == 64
        assert store.load([*tokens, 1], caches.MODEL, exact=True)[0] is None


def test_what_is_computed_anew_takes_the_place_of_lossy_rows(store_path, caches):
    """Other bits are other rows, though the same process restored the lossy ones."""
    tokens = list(range(40))
    exact = caches.make_cache(40)
    with kvstore.Store(store_path, codec="turbo2") as store:
        store.save(tokens, exact, caches.MODEL)
        store.load([*tokens, 1], caches.MODEL)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, exact, caches.MODEL)
        found, rest = store.load([*tokens, 1], caches.MODEL, exact=True)
        assert rest == [1]
        assert caches.rows_of(found) == caches.rows_of(exact)


def test_a_damaged_copy_is_no_reason_to_call_rows_lossy(store_path, caches, flip_bit):
    """It is replaced by what was computed."""
    tokens = list(range(16))
    with kvstore.Store(store_path, codec="turbo2") as store:
        store.save(tokens, caches.make_cache(16), caches.MODEL)
        (shard,) = store.path.glob("shards/*/*.safetensors")
    flip_bit(shard, -1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, caches.make_cache(16), caches.MODEL)
        found, _ = store.load([*tokens, 1], caches.MODEL, exact=True)
        assert caches.rows_of(found) == caches.rows_of(caches.make_cache(16))


def test_codes_of_coded_rows_have_the_fewer_bits(caches):
    """A live cache of codes remembers what its rows went through before."""
    rows = caches.make_cache(300)
    once = [c.to_kv_cache() for c in quantize_prompt_cache(rows, "turbo2")]
    again = quantize_prompt_cache(once, "turbo8")
    assert read_provenance(again).bits == 2
    assert read_provenance([c.to_kv_cache() for c in again]).bits == 2
    assert read_provenance(quantize_prompt_cache(rows, "turbo8")).bits == 8


def test_live_codes_that_were_decoded_for_a_batch_are_lossy(store_path, caches):
    """No store has ever had these rows."""
    tokens = list(range(40))
    live = quantize_prompt_cache(caches.make_cache(40), "turbo3")
    held = [cache.merge([cache, cache]).extract(1) for cache in live]
    with kvstore.Store(store_path, codec="turbo8") as store:
        entry = store.save(tokens, held, caches.MODEL)
        assert [place.bits for place, _ in store.chain(entry.id)] == [3, 3, 3]
        again, _ = store.load_entry(entry.id, caches.MODEL)
        assert caches.rows_of(again) == caches.rows_of(held)


def test_stored_codes_that_were_decoded_are_lossy(store_path, tmp_path, caches):
    """Their blocks are those of another class of cache."""
    tokens = list(range(40))
    live = quantize_prompt_cache(caches.make_cache(40), "turbo3")
    with kvstore.Store(store_path, codec="turbo8") as store:
        store.save(tokens, live, caches.MODEL)
        asked = {"like": caches.make_cache(0), "from_codes": True}
        held, rest = store.load([*tokens, 1], caches.MODEL, **asked)
        assert rest == [1]
        entry = store.save(tokens, batched(held, tmp_path), caches.MODEL)
        assert {place.bits for place, _ in store.chain(entry.id)} == {3}
        assert all(block.is_lossless for _, block in store.chain(entry.id))


def test_a_part_of_a_lossy_block_is_lossy(store_path, tmp_path, caches):
    """A hit may end inside a tail that was computed on coded rows."""
    tokens = list(range(40))
    coded = [
        c.to_kv_cache() for c in quantize_prompt_cache(caches.make_cache(300), "turbo2")
    ]
    for cache in coded:
        cache.trim(300 - 9)
    with kvstore.Store(store_path, codec="turbo8") as store:
        store.save(tokens[:9], coded, caches.MODEL)
        held, rest = store.load([*tokens[:5], -1, -2], caches.MODEL)
        assert rest == [-1, -2]
        went = caches.grow(batched(held, tmp_path), caches.random_rows(20, 5))
        entry = store.save([*tokens[:5], *range(90, 110)], went, caches.MODEL)
        assert [place.bits for place, _ in store.chain(entry.id)] == [2, 2]


def test_rows_that_codes_keep_as_they_are_prove_nothing(store_path, caches):
    """Another prompt that begins with the same few tokens is exact."""
    exact = caches.make_cache(40)
    coded = [cache.to_kv_cache() for cache in quantize_prompt_cache(exact, "turbo2")]
    with kvstore.Store(store_path, codec="raw") as store:
        store.save([1, 2, 3, 4, *range(10, 19)], cut(coded, 13), caches.MODEL)
        live = quantize_prompt_cache(exact, "turbo3")
        store.save([1, 2, 3, *range(60, 97)], live, caches.MODEL)
        entry = store.save([1, 2, 3, 4, *range(20, 56)], exact, caches.MODEL)
        assert all(place.is_exact for place, _ in store.chain(entry.id))


def cut(prompt_cache, num_tokens):
    """Return copies with so many rows."""
    found = copy.deepcopy(prompt_cache)
    for cache in found:
        cache.trim(cache.offset - num_tokens)
    return found
