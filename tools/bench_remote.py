"""Measure push and pull against plain obstore, with the same objects and server.

    python tools/bench_remote.py URL [--endpoint URL] [--region NAME] [--megabytes N]

The URL is a bucket, or a folder in one, that may be filled. Credentials come from
the environment. Each figure is the median of three; plain obstore moves the same shards
with as many threads and parts of the same size, and checks nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.remote.client import PART_BYTES, Client, Remote, ranges
from kvstore.remote.layout import shard_key
from kvstore.remote.pull import _DOWNLOADS
from kvstore.remote.push import _UPLOADS
from kvstore.remote.remotes import make_remote

RUNS = 3
MODEL = kvstore.Fingerprint({"weights": "bench", "config": {}, "adapter": None}, "m")
# One token takes 32 kB: 8 layers of 8 heads of 128 coordinates, keys and values.
LAYERS, HEADS, DIM = 8, 8, 128


def make_entry(path: Path, megabytes: int, seed: int) -> None:
    """Save random rows of this size in a new store."""
    num_tokens = megabytes * 1_000_000 // (LAYERS * HEADS * DIM * 2 * 2)
    cache = [KVCache() for _ in range(LAYERS)]
    for number, layer in enumerate(cache):
        key = mx.random.key(seed * LAYERS + number)
        rows = mx.random.normal((2, 1, HEADS, num_tokens, DIM), key=key)
        layer.update_and_fetch(*rows.astype(mx.bfloat16))
    with kvstore.Store(path, "raw") as store:
        store.save([seed, *range(1, num_tokens)], cache, MODEL, name="doc")


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_put(client: Client, shards: list[Path]) -> None:
    """Put shards under other names, as obstore does by itself."""

    def put(path: Path) -> None:
        client._store.put(
            f"plain/{path.name}", path, chunk_size=PART_BYTES, max_concurrency=4
        )

    with ThreadPoolExecutor(_UPLOADS) as pool:
        list(pool.map(put, shards))


def plain_get(client: Client, shards: list[Path], folder: Path) -> None:
    """Get shards in ranges, and write them to files."""
    parts = [
        (path, *part) for path in shards for part in ranges(0, path.stat().st_size)
    ]

    def get(part: tuple[Path, int, int]) -> None:
        path, begin, end = part
        data = client._store.get_range(shard_key(path.stem), start=begin, end=end)
        target = folder / path.name
        target.touch()
        with target.open("r+b") as file:
            file.seek(begin)
            file.write(memoryview(data))

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(get, parts))


def measure(remote: Remote, folder: Path, megabytes: int, seed: int) -> list[float]:
    """Return MB/s of push, plain put, pull and plain get."""
    here, there, bare = folder / "here", folder / "there", folder / "bare"
    bare.mkdir()
    make_entry(here, megabytes, seed)
    shards = sorted(here.glob("shards/*/*"))
    nbytes = sum(shard.stat().st_size for shard in shards)
    client = Client(remote, create=True)
    with kvstore.Store(here) as left, kvstore.Store(there) as right:
        for store in (left, right):
            store.remotes.add(remote)
        seconds = [
            timed(lambda: left.remotes.push("doc")),
            timed(lambda: plain_put(client, shards)),
            timed(lambda: right.remotes.pull("doc")),
            timed(lambda: plain_get(client, shards, bare)),
        ]
    return [nbytes / second / 1e6 for second in seconds]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--endpoint")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--megabytes", type=int, default=500)
    given = parser.parse_args()
    options = {"region": given.region} if given.url.startswith("s3://") else {}
    if given.endpoint:
        options["endpoint"] = given.endpoint
    rows = []
    for run in range(RUNS):
        remote = make_remote(
            "bench", f"{given.url}/{time.time_ns()}", options, is_trusted=True
        )
        with tempfile.TemporaryDirectory() as folder:
            seed = time.time_ns() % 10**9 + run
            rows.append(measure(remote, Path(folder), given.megabytes, seed))
    push, put, pull, get = map(statistics.median, zip(*rows, strict=True))
    print("|  | kvstore, MB/s | plain obstore, MB/s | |\n|---|---|---|---|")
    print(f"| push | {push:.0f} | {put:.0f} | {push / put:.0%} |")
    print(f"| pull | {pull:.0f} | {get:.0f} | {pull / get:.0%} |")


if __name__ == "__main__":
    main()
