"""Compiled kernels and NumPy write the same stores, and read them alike."""

import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.codecs import planes, turbo
from kvstore.storage.folder import create_folder
from turboquant.kernels import native
from turboquant.kernels.numpy import NumpyKernels

BLOCK = 16
# Layers, heads, tokens (a tail or none) and head dimension.
SHAPES = [(2, 2, 40, 64), (1, 3, 48, 80), (3, 1, 33, 128), (2, 2, 70, 24)]
CODECS = ["raw", "planes+zstd", "turbo4", "turbo3+zstd", "turbo5v3", "turbo8v1+zstd"]
DTYPES = itertools.cycle([mx.bfloat16, mx.float16, mx.float32])
CASES = [
    (*case, dtype)
    for case, dtype in zip(itertools.product(SHAPES, CODECS), DTYPES, strict=False)
]


def cache_of(shape, dtype):
    """Return a prompt cache of rows around a mean, some of them very large or small."""
    layers, heads, tokens, dim = shape
    caches = []
    for number in range(layers):
        mx.random.seed(number)
        x = mx.random.normal((2, 1, heads, tokens, dim))
        x = x * mx.exp(2 * mx.random.normal((2, 1, heads, tokens, 1)))
        x = x + 3 * mx.random.normal((2, 1, heads, 1, dim))
        cache = KVCache()
        cache.update_and_fetch(*x.astype(dtype))
        caches.append(cache)
    return caches


@pytest.mark.skipif(not native.load_all(), reason="nothing is compiled here")
@pytest.mark.parametrize(("shape", "codec", "dtype"), CASES)
def test_the_kernels_of_a_store_do_not_show(
    tmp_path, monkeypatch, caches, shape, codec, dtype
):
    """Shards have the same names whatever encoded them, and give the same rows."""
    prompt_cache, tokens = cache_of(shape, dtype), list(range(shape[2]))
    names, rows = [], []
    for kernels in (NumpyKernels(), native.load_all()[0]):
        for module in (planes, turbo):
            monkeypatch.setattr(module, "best_kernels", lambda found=kernels: found)
        path = create_folder(tmp_path / kernels.name, BLOCK).path
        with kvstore.Store(path, codec) as store:
            store.save(tokens, prompt_cache, caches.MODEL, name="x")
            restored, _ = store.load_entry("x", caches.MODEL)
        names.append(sorted(p.name for p in path.glob("shards/??/*")))
        rows.append(caches.rows_of(restored))
    assert len(names[0]) == 1
    assert names[0] == names[1]
    assert rows[0] == rows[1]
