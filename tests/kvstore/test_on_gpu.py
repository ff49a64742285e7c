"""A GPU saves the shards that a CPU saves, and loads the rows that it loads."""

import shutil

import mlx.core as mx
import pytest

import kvstore
from kvstore.codecs.turbo import Turbo

TOKENS = list(range(40))


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
