"""A GPU saves the shards that a CPU saves, and loads the rows that it loads."""

import shutil

import kit
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.codecs import fitting
from kvstore.codecs.fit import Fit
from kvstore.codecs.turbo import Turbo
from kvstore.errors import KVStoreError
from kvstore.storage.bases import add_basis
from kvstore.storage.folder import open_folder
from turboquant.kernels import gpu

TOKENS = list(range(40))
MODEL = kvstore.Fingerprint({"weights": "fitted"})


def fitted_rows():
    """Return half floats that a basis can be fitted to, ``(L, 2, H, T, D)``."""
    random = np.random.default_rng(5)
    directions = random.standard_normal((2, 2, 1, 16, 16))
    x = random.standard_normal((2, 2, 2, 512, 16)) * 2.0 ** -np.arange(16)
    return (x @ directions).astype(np.float16)


def make_basis(rows):
    """Return the file of a basis that was fitted to rows."""
    group = fitting.make_group((0, 1), 2, 16, fitting.NO_ROTATION)
    fit = fitting.GroupFit(group, fitting.NO_ROTATION)
    joined = rows.reshape(2, 4, 512, 16)
    fit.add(fitting.Sample(0, "F16", joined))
    return fitting.finish_basis([fit], {})


def make_caches(rows):
    """Return a prompt cache of the first 40 rows."""
    caches = [KVCache() for _ in rows]
    for cache, pair in zip(caches, rows[:, :, None, :, :40], strict=True):
        cache.update_and_fetch(*map(mx.array, pair))
    return caches


def arrays_of(prompt_cache):
    """Return all rows of a prompt cache."""
    return [np.array(x) for c in prompt_cache for x in c.keys_and_values()]


@pytest.fixture
def on_gpu(launch, as_gpu, monkeypatch):
    """What has MLX's device be a GPU from now on, whose kernels run as C++."""

    def use():
        as_gpu(launch)
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)

    return use


@pytest.mark.parametrize("codec", ["turbo4", "turbo3+zstd", "turbo5v3", "planes"])
def test_a_gpu_saves_the_same_shards(tmp_path, empty_store, caches, on_gpu, codec):
    """To the byte, so under the same names; and it loads the same rows, to the bit."""
    names, loaded = [], []
    for place in ("cpu", "gpu"):
        if place == "gpu":
            on_gpu()
        path = shutil.copytree(empty_store, tmp_path / place)
        with kvstore.Store(path, codec=codec) as store:
            store.save(TOKENS, caches.make_cache(40), caches.MODEL)
            loaded.append(store.load([*TOKENS, -1], caches.MODEL)[0])
        shards = path.rglob("*.safetensors")
        names.append(sorted(path.name for path in shards))
    assert names[0] == names[1]
    assert caches.rows_of(loaded[0]) == caches.rows_of(loaded[1])


def test_a_gpu_encodes_what_it_can(store_path, caches, on_gpu, monkeypatch):
    """Rows of full blocks are encoded where they are, and their codes alone move."""

    def refuse(self, layers, rows):
        raise AssertionError("rows were encoded by the CPU")

    on_gpu()
    monkeypatch.setattr(Turbo, "encode", refuse)
    with kvstore.Store(store_path, codec="turbo4") as store:
        store.save(TOKENS, caches.make_cache(40), caches.MODEL)
        restored, _ = store.load([*TOKENS, -1], caches.MODEL)
        assert restored[0].offset == 40


def test_a_gpu_decodes_fit(tmp_path, empty_store, on_gpu, monkeypatch):
    """Its products give what the CPU's give, but for rounding; sinks lose nothing."""
    rows, tokens = fitted_rows(), list(range(40))
    path = shutil.copytree(empty_store, tmp_path / "store")
    digest = add_basis(open_folder(path), make_basis(rows))
    loaded = []
    with kvstore.Store(path, codec=f"fit3@{digest}+zstd") as store:
        store.save(tokens, make_caches(rows), MODEL)
        loaded.append(store.load([*tokens, -1], MODEL)[0])
        on_gpu()
        monkeypatch.setattr(Fit, "decode_into", None)
        loaded.append(store.load([*tokens, -1], MODEL)[0])
    for one, two in zip(*map(arrays_of, loaded), strict=True):
        assert np.abs(one - two).max() <= 2.0**-9 * np.abs(one).max()
        for exact in (slice(0, 4), slice(32, None)):
            assert kit.bits_of(one[:, :, exact]) == kit.bits_of(two[:, :, exact])
    # The last block was stored without loss, and room behind it is blank.
    assert not np.any(np.asarray(loaded[1][0].keys)[:, :, 40:])


@pytest.mark.parametrize(
    "error", [MemoryError("full"), RuntimeError("cudaMallocAsync: out of memory")]
)
def test_a_full_gpu_is_told(store_path, caches, on_gpu, monkeypatch, error):
    """And what is stored stays as it is: once there is room, it is loaded."""

    def refuse(self, size, read):
        raise error

    with kvstore.Store(store_path, codec="turbo4") as store:
        store.save(TOKENS, caches.make_cache(40), caches.MODEL)
        on_gpu()
        with monkeypatch.context() as full:
            full.setattr(gpu.ArrayUpload, "receive", refuse)
            with pytest.raises(KVStoreError, match="no room for the rows of 40 tokens"):
                store.load([*TOKENS, -1], caches.MODEL)
        assert store.load([*TOKENS, -1], caches.MODEL)[0][0].offset == 40
