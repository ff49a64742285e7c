"""How small the whole store is, and that its bytes are reproducible."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, HEADS, DIM, TOKENS = 4, 2, 128, 4096

SAVE = f"""
import sys
import mlx.core as mx
import kvstore
from mlx_lm.models.cache import KVCache

mx.random.seed(7)
cache = [KVCache() for _ in range({LAYERS})]
for layer in cache:
    shape = (1, {HEADS}, {TOKENS}, {DIM})
    rows = [mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)]
    layer.update_and_fetch(*rows)
model = kvstore.Fingerprint({{"weights": "random"}}, "random")
with kvstore.Store(sys.argv[1], codec=sys.argv[2]) as store:
    store.save(list(range({TOKENS})), cache, model, name="x")
"""


def save(path: Path, codec: str) -> None:
    """Save random rows, in a process of their own."""
    subprocess.run([sys.executable, "-c", SAVE, path, codec], check=True)


def digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard."""
    return {
        shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()
        for shard in path.glob("shards/*/*")
    }


@pytest.mark.parametrize(
    ("codec", "at_least"),
    [
        ("turbo2+zstd", 7.0),
        ("turbo3+zstd", 5.0),
        ("turbo4+zstd", 3.85),
        ("planes+zstd", 1.2),
    ],
)
def test_the_whole_store_is_so_much_smaller(tmp_path, codec, at_least):
    """All files of a store together are smaller than 16 bits a number by this ratio."""
    save(tmp_path / "store", codec)
    files = (path for path in (tmp_path / "store").rglob("*") if path.is_file())
    stored = sum(path.stat().st_size for path in files)
    assert LAYERS * HEADS * DIM * TOKENS * 2 * 2 / stored >= at_least


def test_a_second_process_writes_the_same_shards(tmp_path):
    """The same rows give byte-identical shards in another process."""
    for name in ("a", "b"):
        save(tmp_path / name, "turbo4+zstd")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")
