"""What an earlier release stored is read for ever."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

import kvstore
from kvstore.storage.folder import create_folder

GOLDEN = Path(__file__).parent / "golden"
TOKENS = [7, -3, *range(38)]
MODEL = kvstore.Fingerprint(
    {"weights": "golden", "config": {"rope_theta": 1e4}, "adapter": None}, "golden"
)


def make_cache():
    """Return the prompt cache whose store is kept: rows, a window, a state."""
    random = np.random.default_rng(2026)
    shape = (2, 2, 1, 2, len(TOKENS), 64)
    rows = mx.array(random.standard_normal(shape).astype(np.float32))
    cache = [KVCache(), RotatingKVCache(12, 4), ArraysCache(1)]
    for layer, pair in zip(cache, rows.astype(mx.bfloat16), strict=False):
        layer.update_and_fetch(pair[0], pair[1])
    cache[2][0] = mx.array(random.standard_normal((1, 3, 4)).astype(np.float32))
    return cache


def test_a_store_of_format_1_is_read(tmp_path):
    """The kept shard and entry restore what was saved then."""
    path = create_folder(tmp_path / "store", 16).path
    (shard,) = GOLDEN.glob("[0-9a-f]*.safetensors")
    shutil.copy(shard, path / "shards" / shard.name[:2] / shard.name)
    (entry,) = GOLDEN.glob("*.json")
    shutil.copy(entry, path / "entries" / entry.name)
    with kvstore.Store(path) as store:
        assert store.verify() != []  # there is no index yet
        cache, tokens = store.load_entry("golden", MODEL)
        assert store.verify() == []
        stored = [stored for _, stored in store.chain("golden")]
        assert [4, 4, 255] == [block.bits for block in stored]
        assert [True, False, False] == [bool(block.errors) for block in stored]
        loss = store.loss("golden")
        assert (0.004, 0.0035) == (loss.worst.kl, loss.probe.kl)
    assert tokens == TOKENS
    saved = make_cache()
    rows, kept = cache[0].keys[..., :40, :], saved[0].keys[..., :40, :]
    assert mx.array_equal(rows[..., 32:, :], kept[..., 32:, :]).item()
    assert mx.array_equal(rows[..., :4, :], kept[..., :4, :]).item()
    gap = mx.abs((rows - kept)[..., 4:32, :].astype(mx.float32))
    assert 0 < gap.mean().item() < 0.1
    assert cache[1].offset == 40
    assert mx.array_equal(
        cache[1].keys,
        saved[1]._temporal_order(saved[1].keys)[..., [0, 1, 2, 3, *range(-8, 0)], :],
    ).item()
    assert mx.array_equal(cache[2][0], saved[2][0]).item()
