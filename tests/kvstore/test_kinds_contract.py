"""What every cache class keeps: class x dtype x codec x the point where a hit is cut.

A class that is registered joins by its name in ``MAKERS``.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

import kvstore
from kvstore.caches.kinds import known_kinds
from turboquant import TurboQuantKVCache

LAYERS, BLOCK, WINDOW, TOTAL = 2, 16, 24, 40
MAKERS = {
    "KVCache": KVCache,
    "ConcatenateKVCache": ConcatenateKVCache,
    "QuantizedKVCache": lambda: QuantizedKVCache(group_size=64, bits=4),
    "TurboQuantKVCache": lambda: TurboQuantKVCache(4),
    "RotatingKVCache": lambda: RotatingKVCache(max_size=WINDOW, keep=4),
    "ChunkedKVCache": lambda: ChunkedKVCache(WINDOW),
    "ArraysCache": lambda: ArraysCache(1),
}
# The classes whose rows stay for good, so that a hit may end anywhere.
CUT_ANYWHERE = set(MAKERS) - {"RotatingKVCache", "ChunkedKVCache", "ArraysCache"}
# The classes that hold numbers of their own, which no codec may touch.
CODED = {"QuantizedKVCache", "TurboQuantKVCache"}
CUTS = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 39, 40]
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def fed(kind, rows):
    """Return a prompt cache of one class that has seen some rows."""
    prompt_cache = [MAKERS[kind]() for _ in range(LAYERS)]
    see(prompt_cache, rows)
    return prompt_cache


def see(prompt_cache, rows):
    """Give every layer more rows; return what attention then sees, as numbers.

    Rows of a rotated window come in the order of their numbers: they have no other.
    """
    seen = []
    for layer, cache in enumerate(prompt_cache):
        if isinstance(cache, ArraysCache):
            before = 0 if cache[0] is None else cache[0]
            cache[0] = before + rows[layer, 0].sum(axis=2)
            seen.append([numbers(cache[0])])
            continue
        if isinstance(cache, ChunkedKVCache):
            cache.maybe_trim_front()
        found = cache.update_and_fetch(rows[layer, 0], rows[layer, 1])
        order = in_order if isinstance(cache, RotatingKVCache) else numbers
        seen.append([order(leaf) for side in found for leaf in leaves(side)])
    return seen


def leaves(value):
    """Return the arrays of what a cache gives to attention."""
    if isinstance(value, mx.array):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def numbers(array):
    """Return an array as float64."""
    return np.array(array.astype(mx.float32), np.float64)


def in_order(array):
    """Return the rows of each head, sorted by their first number."""
    rows = numbers(array)
    order = np.argsort(rows[..., :1], axis=2)
    return np.take_along_axis(rows, order, axis=2)


def assert_same(found, expected, *, is_exact):
    """Assert that attention sees the same numbers, or those within a codec's error."""
    for found_layer, expected_layer in zip(found, expected, strict=True):
        for got, wanted in zip(found_layer, expected_layer, strict=True):
            assert got.shape == wanted.shape
            if is_exact:
                assert np.array_equal(got, wanted)
            else:
                error = np.linalg.norm(got - wanted)
                assert error < 0.25 * np.linalg.norm(wanted)


def test_every_registered_class_is_held_to_the_contract():
    """A new class has to come in here, or this fails."""
    assert {kind.name for kind in known_kinds()} == set(MAKERS)


@pytest.mark.parametrize("codec", ["raw", "planes+zstd", "turbo4+zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_cut_hit_goes_on_as_a_cache_that_saw_no_more(
    store_path, caches, kind, dtype, codec
):
    """Wherever a hit ends, the next row meets what it would without a store."""
    rows = caches.random_rows(TOTAL + 1, 1, dtype=DTYPES[dtype])
    stored, more = rows[..., :TOTAL, :], rows[..., TOTAL:, :]
    is_exact = kind in CODED or not codec.startswith("turbo") or kind == "ArraysCache"
    with kvstore.Store(store_path, codec=codec) as store:
        cache = fed(kind, stored)
        store.save(list(range(TOTAL)), cache, caches.MODEL)
        for cut in CUTS:
            prompt = [*range(cut), -7]
            restored, rest = store.load(prompt, caches.MODEL, like=cache)
            held = cut + 1 - len(rest)
            assert rest == [*range(held, cut), -7]
            assert (restored is None) == (held == 0)
            if kind in CUT_ANYWHERE:
                assert held == cut if is_exact else held >= cut - cut % BLOCK
            if cut == TOTAL:
                assert held == TOTAL
            if restored is None:
                continue
            expected = fed(kind, rows[..., :held, :])
            assert [type(c) for c in restored] == [type(c) for c in expected]
            seen = see(restored, more), see(expected, more)
            assert_same(*seen, is_exact=is_exact)
