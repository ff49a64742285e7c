"""Restoring on MLX's device gives what restoring in NumPy gives."""

import mlx.core as mx
import numpy as np
import pytest

import kvstore
from kvstore.caches import restore as restoring
from kvstore.ops import load as loading
from turboquant.kv_cache import TurboQuantKVCache

CODECS = ("raw", "planes", "planes+zstd", "turbo4+zstd", "turbo3", "turbo5v3", "turbo8")


def restored_by(way, monkeypatch, store, prompt, model):
    """Return what `load` gives with one way of restoring."""
    monkeypatch.setattr(loading, "start_restoring", way)
    return store.load(prompt, model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_the_device_restores_what_numpy_does(
    store_path, caches, monkeypatch, codec, dtype
):
    """Bit for bit where the codec is lossless, else but for the last place."""
    tokens, cut = list(range(100)), 87
    with kvstore.Store(store_path, codec=codec) as store:
        store.save(tokens, caches.make_cache(100, dtype=dtype), caches.MODEL)
        for prompt in ([*tokens, -1], [*tokens[:cut], -1]):
            (host, _), (device, rest) = (
                restored_by(way, monkeypatch, store, prompt, caches.MODEL)
                for way in (restoring.HostRestoring, restoring.DeviceRestoring)
            )
            assert device[0].offset == host[0].offset == len(prompt) - len(rest)
            assert device[0].keys.shape == host[0].keys.shape
            assert device[0].keys.dtype == dtype
            if codec.startswith("turbo"):
                assert worst_difference(host, device) <= 16 * mx.finfo(dtype).eps
            else:
                assert caches.rows_of(device) == caches.rows_of(host)


def worst_difference(left, right):
    """Return the largest difference relative to the largest number."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            x, y = (z[:, :, : a.offset].astype(mx.float32) for z in (x, y))
            gap = mx.abs(x - y).max() / mx.abs(x).max()
            worst = max(worst, gap.item())
    return worst


def test_the_device_restores_live_codes(store_path, caches, monkeypatch):
    """A cache of codes is restored on the device bit for bit."""
    rows = caches.random_rows(50, 1)
    cache = [TurboQuantKVCache(3) for _ in rows]
    for layer, pair in zip(cache, rows, strict=True):
        layer.update_and_fetch(pair[0], pair[1])
    monkeypatch.setattr(loading, "start_restoring", restoring.DeviceRestoring)
    with kvstore.Store(store_path) as store:
        store.save(list(range(50)), cache, caches.MODEL)
        for length in (2, 4, 5, 50):
            prompt = [*range(length), -1]
            restored, _ = store.load(prompt, caches.MODEL, like=cache)
            for a, b in zip(restored, cache, strict=True):
                got, kept = a.coded_keys.read(length), b.coded_keys.read(length)
                assert mx.array_equal(got, kept).item()


@pytest.mark.parametrize("shares", [True, False])
def test_a_mac_decodes_in_numpy_where_the_gpu_sees_it(shares, monkeypatch):
    """The way is tried first: a copy in place of a view would restore zeros."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    if not shares:
        monkeypatch.setattr(restoring.np, "asarray", np.array)
    restoring._shares_memory.cache_clear()
    found = restoring.start_restoring((), 1)
    wanted = restoring.HostRestoring if shares else restoring.DeviceRestoring
    assert type(found) is wanted
    restoring._shares_memory.cache_clear()
