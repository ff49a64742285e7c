"""Rows are taken for another thread without a second copy of them, or a wait."""

import shutil
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, ConcatenateKVCache, KVCache
from standins import run_on_a_thread

import kvstore
from kvstore.caches.snapshot import LiveRows
from kvstore.caches.taken import Share
from kvstore.server.prefill import view
from turboquant.kernels import best_kernels, gpu

MODEL = kvstore.Fingerprint({"weights": "a"})
BLOCK, LARGE = 16, 5 * 256 + 9
FEW = 3 * BLOCK + 9


def make_caches(num_tokens, num_layers=2, heads=2, dim=128):
    """Return a prompt cache of half floats."""
    random, found = np.random.default_rng(0), []
    for _ in range(num_layers):
        cache = KVCache()
        x = random.standard_normal((2, 1, heads, num_tokens, dim)).astype(np.float16)
        cache.update_and_fetch(mx.array(x[0]), mx.array(x[1]))
        mx.eval(cache.keys, cache.values)
        found.append(cache)
    return found


def nbytes_of(num_tokens):
    """Return what so many rows take."""
    return num_tokens * 2 * 2 * 2 * 128 * 2


def tokens_of(num_tokens):
    """Return as many tokens."""
    return list(range(num_tokens))


def overwrite(prompt_cache):
    """Change all rows in place, as if the caches had moved on."""
    for cache in prompt_cache:
        cache.keys[...] = mx.zeros_like(cache.keys)
        cache.values[...] = mx.zeros_like(cache.values)
        mx.eval(cache.keys, cache.values)


def shards_of(path):
    """Return the names of a store's shards, which tell their bytes."""
    return sorted(shard.name for shard in path.rglob("*.safetensors"))


@pytest.fixture
def open_small(tmp_path, empty_store):
    """Return what opens a store of small blocks in a folder of this name."""

    def use(name, codec):
        if not (tmp_path / name).exists():
            shutil.copytree(empty_store, tmp_path / name)
        return kvstore.Store(tmp_path / name, codec=codec)

    return use


@pytest.fixture
def large(tmp_path):
    """Return what measures a snapshot: what it has, and what it took at most."""

    def use(codec, num_held=0):
        live = make_caches(LARGE)
        with kvstore.Store(tmp_path / "large", codec=codec) as store:
            if num_held:
                held = [cut(cache, num_held) for cache in live]
                store.save(tokens_of(num_held), held, MODEL)
            store.snapshot(tokens_of(LARGE), live, MODEL)  # tables are made once
            tracemalloc.start()
            taken = store.snapshot(tokens_of(LARGE), live, MODEL)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return taken.rows.nbytes, peak

    return use


@pytest.fixture(params=["cpu", "gpu"])
def device(request, launch, as_gpu, monkeypatch):
    """Have MLX's device be the CPU, or a GPU whose kernels run as C++."""
    if request.param == "gpu":
        as_gpu(launch)
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    return request.param


@pytest.mark.parametrize("codec", ["turbo4+zstd", "turbo5v3", "planes+zstd", "raw"])
def test_what_is_taken_is_what_would_be_saved(tmp_path, open_small, device, codec):
    """To the byte, whatever becomes of the prompt cache; another thread writes it."""
    with open_small("saved", codec) as store:
        store.save(tokens_of(FEW), make_caches(FEW), MODEL)
    live = make_caches(FEW)
    with open_small("taken", codec) as store:
        snapshot = store.snapshot(tokens_of(FEW), live, MODEL)
        overwrite(live)
    del live

    def save():
        with open_small("taken", codec) as store:
            store.save_snapshot(snapshot)

    run_on_a_thread(save)
    assert shards_of(tmp_path / "saved") == shards_of(tmp_path / "taken")


def test_many_layers_are_taken_as_they_would_be_saved(
    tmp_path, open_small, launch, as_gpu, monkeypatch
):
    """By several launches, of blocks in several runs, some with samples of errors."""
    num_tokens = 18 * BLOCK + 3
    live = make_caches(num_tokens, num_layers=17, heads=1, dim=16)
    with open_small("saved", "turbo3") as store:
        store.save(tokens_of(num_tokens), live, MODEL)
    with open_small("taken", "turbo3") as store, monkeypatch.context() as patched:
        as_gpu(launch)
        patched.setattr(mx, "default_device", lambda: mx.gpu)
        snapshot = store.snapshot(tokens_of(num_tokens), live, MODEL)
        overwrite(live)
        store.save_snapshot(snapshot)
        assert store._blocks.chain(store.entries()[0])[16][1].errors
    assert shards_of(tmp_path / "saved") == shards_of(tmp_path / "taken")


@pytest.mark.parametrize(("num_layers", "num_launches"), [(3, 3), (16, 3), (32, 6)])
def test_a_step_is_few_operations(
    open_small, launch, as_gpu, monkeypatch, num_layers, num_launches
):
    """Whatever the layers: their rows are read in place, and nothing is joined."""
    seen = []

    def count(way, name, registers, inputs, numbers, outputs, *threads):
        seen.append(name)
        return [mx.zeros(*output) for output in outputs]

    def refuse(*arrays, **options):
        raise AssertionError("an operation for each layer")

    live = make_caches(10 * BLOCK, num_layers, dim=8)
    first = [cut(cache, 2 * BLOCK) for cache in live]
    as_gpu(launch)
    with open_small("store", "turbo4") as store, monkeypatch.context() as patched:
        store.save(tokens_of(2 * BLOCK), first, MODEL)
        patched.setattr(mx, "default_device", lambda: mx.gpu)
        assert gpu.can("encode")
        patched.setattr(gpu, "_launch", count)
        patched.setattr(mx, "concatenate", refuse)
        snapshot = store.snapshot(tokens_of(10 * BLOCK), live, MODEL)
    assert len(snapshot.rows.hashes) == 8
    assert len(seen) == num_launches
    assert set(seen) == {"mean", "encode"}


def padded(num_tokens):
    """Return a prompt's caches out of those of a batch, behind another's padding."""
    batch = [BatchKVCache([0, 5]) for _ in range(2)]
    for cache, one in zip(batch, make_caches(num_tokens + 5), strict=True):
        rows = (x[:, :, : num_tokens + 5] for x in (one.keys, one.values))
        cache.update_and_fetch(*(mx.repeat(x, 2, 0) for x in rows))
    return view(batch, 1)


def concatenated(num_tokens):
    """Return caches that are as long as their rows, in buffers that are longer."""
    found = [ConcatenateKVCache() for _ in range(2)]
    for cache, one in zip(found, make_caches(num_tokens), strict=True):
        cache.keys, cache.values = one.keys, one.values
        cache.offset = num_tokens
        cache.keys = cache.keys[:, :, :num_tokens]
        cache.values = cache.values[:, :, :num_tokens]
    return found


@pytest.mark.parametrize("make", [padded, concatenated, make_caches])
def test_no_array_is_copied_whole_for_a_kernel(
    tmp_path, open_small, launch, as_gpu, monkeypatch, make
):
    """MLX does so with views; of these only the rows that are meant are copied."""
    seen = []

    def noted(way, name, registers, inputs, *others):
        mx.eval(inputs)
        seen.extend(inputs)
        return launch(way, name, registers, inputs, *others)

    live = make(10 * BLOCK)
    with open_small("saved", "turbo4") as store:
        store.save(tokens_of(10 * BLOCK), live, MODEL)
    as_gpu(noted)
    with open_small("taken", "turbo4") as store, monkeypatch.context() as patched:
        patched.setattr(mx, "default_device", lambda: mx.gpu)
        snapshot = store.snapshot(tokens_of(10 * BLOCK), live, MODEL)
        store.save_snapshot(snapshot)
    assert len(seen) > 4 * gpu.MAX_BUFFERS
    assert all(memoryview(array).c_contiguous for array in seen)
    assert shards_of(tmp_path / "saved") == shards_of(tmp_path / "taken")


@pytest.mark.skipif(best_kernels().name == "numpy", reason="slower than a copy")
def test_what_waits_is_codes(large):
    """Four bits of sixteen, but for the tail; there never was a copy of the rows."""
    taken, peak = large("turbo4")
    assert taken < 0.28 * nbytes_of(LARGE)
    assert peak < 0.5 * nbytes_of(LARGE)


def test_rows_are_copied_once(large):
    """Where no codes of them wait, and only those that the store lacks."""
    taken, peak = large("raw", num_held=4 * 256)
    assert taken == nbytes_of(256 + 9)
    assert peak < 1.3 * taken


def cut(cache, num_tokens):
    """Return a cache of the first rows of another."""
    found = KVCache()
    keys, values = (x[:, :, :num_tokens] for x in (cache.keys, cache.values))
    found.update_and_fetch(keys, values)
    return found


@pytest.mark.parametrize("codec", ["turbo4", "raw"])
def test_nothing_leaves_a_gpu_when_it_is_taken(
    open_small, launch, as_gpu, monkeypatch, codec
):
    """It makes codes or copies, and they stay there until they are written."""

    def refuse(*arrays):
        raise AssertionError("the generating thread waits")

    as_gpu(launch)
    live = make_caches(FEW)
    with open_small("store", codec) as store, monkeypatch.context() as patched:
        patched.setattr(mx, "default_device", lambda: mx.gpu)
        assert gpu.can("encode")
        patched.setattr(Share, "read", refuse)
        patched.setattr(LiveRows, "read", refuse)
        snapshot = store.snapshot(tokens_of(FEW), live, MODEL)
        assert {type(x) for xs in snapshot.rows._taken.values() for _, x in xs} == {
            Share
        }
    with open_small("store", codec) as store:
        assert store.save_snapshot(snapshot).num_tokens == FEW


def test_a_block_is_of_the_codec_that_it_was_taken_for(open_small):
    """Whatever the store that writes it makes of others."""
    with open_small("store", "turbo4") as store:
        snapshot = store.snapshot(tokens_of(FEW), make_caches(FEW), MODEL)
    with open_small("store", "turbo3") as store:
        store.save_snapshot(snapshot)
        stored = store._blocks.chain(store.entries()[0])
    assert ["turbo4"] * 3 + ["raw"] == [block.codec for _, block in stored]
