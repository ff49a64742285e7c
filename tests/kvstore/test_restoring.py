"""Restoring on MLX's device gives what restoring in NumPy gives."""

import gc
import os
import resource
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import kvstore
from kvstore.caches import memory
from kvstore.caches import restore as restoring
from kvstore.codecs import Rows, get_codec
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


@pytest.mark.parametrize(("number", "codec"), list(enumerate(CODECS)))
def test_a_kernel_restores_what_numpy_does(
    store_path, caches, monkeypatch, launch, as_gpu, number, codec
):
    """Bit for bit, from the tail as from codes, and zeros behind the last row."""
    as_gpu(launch)
    tokens, dtype = list(range(40)), (mx.float32, mx.float16, mx.bfloat16)[number % 3]
    with kvstore.Store(store_path, codec=codec) as store:
        store.save(tokens, caches.make_cache(40, dtype=dtype), caches.MODEL)
        for prompt in ([*tokens, -1], [*tokens[:37], -1]):
            (host, _), (device, rest) = (
                restored_by(way, monkeypatch, store, prompt, caches.MODEL)
                for way in (restoring.HostRestoring, restoring.KernelRestoring)
            )
            assert device[0].offset == host[0].offset == len(prompt) - len(rest)
            for a, b in zip(device, host, strict=True):
                for ours, theirs in ((a.keys, b.keys), (a.values, b.values)):
                    assert ours.dtype == dtype
                    assert mx.array_equal(ours, theirs).item()


def worst_difference(left, right):
    """Return the largest difference relative to the largest number."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            x, y = (z[:, :, : a.offset].astype(mx.float32) for z in (x, y))
            gap = mx.abs(x - y).max() / mx.abs(x).max()
            worst = max(worst, gap.item())
    return worst


@pytest.mark.parametrize("way", [restoring.DeviceRestoring, restoring.KernelRestoring])
def test_the_device_restores_live_codes(
    store_path, caches, monkeypatch, launch, as_gpu, way
):
    """A cache of codes is restored on the device bit for bit."""
    as_gpu(launch)
    rows = caches.random_rows(50, 1)
    cache = [TurboQuantKVCache(3) for _ in rows]
    for layer, pair in zip(cache, rows, strict=True):
        layer.update_and_fetch(pair[0], pair[1])
    monkeypatch.setattr(loading, "start_restoring", way)
    with kvstore.Store(store_path) as store:
        store.save(list(range(50)), cache, caches.MODEL)
        for length in (2, 4, 5, 50):
            prompt = [*range(length), -1]
            restored, _ = store.load(prompt, caches.MODEL, like=cache)
            for a, b in zip(restored, cache, strict=True):
                got, kept = a.coded_keys.read(), b.coded_keys.read()[:, :, :length]
                assert mx.array_equal(got, kept).item()


@pytest.mark.parametrize("shares", [True, False])
def test_a_mac_decodes_in_numpy_where_the_gpu_sees_it(shares, monkeypatch):
    """The way is tried first: a copy in place of a view would restore zeros."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(restoring.gpu, "can", lambda verb: False)
    if not shares:
        monkeypatch.setattr(memory.np, "asarray", np.array)
    memory._shares_memory.cache_clear()
    found = restoring.start_restoring((), 1)
    wanted = restoring.HostRestoring if shares else restoring.DeviceRestoring
    assert type(found) is wanted
    memory._shares_memory.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("codec", ["raw", "planes", "turbo4"])
def test_rows_that_no_block_brings_are_zeros(
    store_path, caches, monkeypatch, codec, dtype
):
    """Behind the last row, and behind damage, nothing of the memory before is left."""
    fresh = restoring.uninitialised

    def used(shapes):
        arrays = fresh(shapes)
        for array in arrays.values():
            np.asarray(array).view(np.uint8)[...] = 255
        return arrays

    monkeypatch.setattr(restoring, "uninitialised", used)
    tokens, original = list(range(512)), caches.make_cache(512, dtype=dtype)
    with kvstore.Store(store_path, codec=codec) as store:
        store.save(tokens, original, caches.MODEL)
        (shard,) = store_path.rglob("*.safetensors")
        for num_rows in (512, 496):
            restored, _ = store.load([*tokens, -1], caches.MODEL)
            assert restored[0].offset == num_rows
            for cache, saved in zip(restored, original, strict=True):
                for got, kept in (
                    (cache.keys, saved.keys),
                    (cache.values, saved.values),
                ):
                    assert not mx.any(got[:, :, num_rows:]).item()
                    if codec != "turbo4":
                        same = got[:, :, :num_rows] == kept[:, :, :num_rows]
                        assert mx.all(same).item()
            shard.chmod(0o600)
            with shard.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))


def test_a_load_that_met_damage_lets_go_of_its_rows(store_path, caches, monkeypatch):
    """At once, though errors know frames: nobody collects garbage in time."""
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(list(range(512)), caches.make_cache(512), caches.MODEL)
        (shard,) = store_path.rglob("*.safetensors")
        shard.chmod(0o600)
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        kept = []
        fresh = restoring.HostRestoring
        monkeypatch.setattr(
            loading,
            "start_restoring",
            lambda *given: kept.append(weakref.ref(each := fresh(*given))) or each,
        )
        gc.collect()
        gc.disable()
        try:
            restored, _ = store.load([*range(512), -1], caches.MODEL)
            assert restored[0].offset == 496
            assert [each() for each in kept] == [None, None]
        finally:
            gc.enable()


def test_codes_of_more_than_a_block_are_refused():
    """A live cache has a mean for each block, which those would lack."""
    rows = Rows("k.coded", 0, (1, 1, 300, 64), "F16")
    with pytest.raises(kvstore.IntegrityError, match="no block's"):
        restoring._LiveBlocks().write(get_codec("turbo4"), {}, None, rows)


def test_uninitialised_arrays_are_written_through_numpy():
    """Arrays of any shape, none of them cleared, own the memory that NumPy writes."""
    arrays = restoring.uninitialised(
        {"a": ((2, 3), "F32"), "b": ((1, 0, 4), "U16"), "c": ((5,), "U8")}
    )
    np.asarray(arrays["a"])[...] = 1.5
    np.asarray(arrays["c"])[...] = 7
    assert arrays["a"].sum().item() == 9.0
    assert (arrays["b"].shape, arrays["b"].dtype) == ((1, 0, 4), mx.uint16)
    assert arrays["c"].tolist() == [7] * 5


def test_large_arrays_take_few_page_faults():
    """The system gives their memory in large pages where it has some."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages to give")
    nbytes = 64 * 1024 * 1024
    # Small ones, such as those of a window, have no large page.
    shapes = {f"small {i}": ((64,), "U8") for i in range(8)} | {"a": ((nbytes,), "U8")}
    array = np.asarray(restoring.uninitialised(shapes)["a"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array[::4096] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < nbytes / 4096 / 8
