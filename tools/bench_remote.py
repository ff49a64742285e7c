"""Measure push and pull against plain obstore, with the same objects and server.

    python tools/bench_remote.py URL [--endpoint URL] [--region NAME] [--megabytes N]
        [--model MODEL --tokens N]

With a model, the time to the first token is measured instead: where a prompt is
computed, and where another store pulls what was pushed of it. The text that follows
must be the same.

The URL is a bucket, or a folder in one, that may be filled. Credentials come from the
environment. Each figure is a median; plain obstore moves the same shards
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
from typing import Any

from kvstore.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402  (after OpenBLAS)
from mlx_lm.models.cache import KVCache  # noqa: E402

import kvstore  # noqa: E402
from kvstore.remote.client import PART_BYTES, Client, Remote, ranges  # noqa: E402
from kvstore.remote.layout import shard_key  # noqa: E402
from kvstore.remote.pull import _DOWNLOADS  # noqa: E402
from kvstore.remote.push import _UPLOADS  # noqa: E402
from kvstore.remote.remotes import make_remote  # noqa: E402

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


def measure_first(
    remote: Remote, folder: Path, path: str, num_tokens: int, codec: str
) -> tuple[float, float, int]:
    """Return seconds to the first token, computed and pulled, and bytes pulled."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, tokenizer = load(path)[:2]
    text = (Path(__file__).parent.parent / "docs/FORMAT.md").read_text()
    tokens = tokenizer.encode(text)[:num_tokens]
    fingerprint = kvstore.Fingerprint.from_path(path)

    def go_on(cache: list[Any], rest: list[int], count: int) -> list[int]:
        steps = generate_step(
            mx.array(rest), model, prompt_cache=cache, max_tokens=count
        )
        return [int(token) for token, _ in steps]

    go_on(make_prompt_cache(model), tokens[:300], 1)  # kernels are compiled
    with kvstore.Store(folder / "here", codec) as here:
        cache = make_prompt_cache(model)
        computed_s = timed(lambda: go_on(cache, tokens, 1))
        trim_prompt_cache(cache, cache[0].offset - len(tokens))
        here.save(tokens, cache, fingerprint, name="doc")
        trim_prompt_cache(cache, 1)
        expected = go_on(cache, tokens[-1:], 32)
        here.remotes.add(remote)
        nbytes = here.remotes.push("doc").sent_bytes
    with kvstore.Store(folder / "there") as there:
        there.remotes.add(remote)

        def pull() -> None:
            there.remotes.pull("doc")
            go_on(*there.load(tokens, fingerprint), 1)

        pulled_s = timed(pull)
        assert expected == go_on(*there.load(tokens, fingerprint), 32)
    return computed_s, pulled_s, nbytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--endpoint")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--codec", default="exact")
    given = parser.parse_args()
    options = {"region": given.region} if given.url.startswith("s3://") else {}
    if given.endpoint:
        options["endpoint"] = given.endpoint
    rows = []
    for run in range(given.runs):
        remote = make_remote(
            "bench", f"{given.url}/{time.time_ns()}", options, is_trusted=True
        )
        with tempfile.TemporaryDirectory() as folder:
            if given.model:
                tokens, codec = given.tokens, given.codec
                path = Path(folder)
                rows.append(measure_first(remote, path, given.model, tokens, codec))
                continue
            seed = time.time_ns() % 10**9 + run
            rows.append(measure(remote, Path(folder), given.megabytes, seed))
    if given.model:
        first, pulled, nbytes = map(statistics.median, zip(*rows, strict=True))
        print(f"computed in {first:.2f} s; pulled in {pulled:.2f} s, {nbytes:,} bytes")
        return
    push, put, pull, get = map(statistics.median, zip(*rows, strict=True))
    print("|  | kvstore, MB/s | plain obstore, MB/s | |\n|---|---|---|---|")
    print(f"| push | {push:.0f} | {put:.0f} | {push / put:.0%} |")
    print(f"| pull | {pull:.0f} | {get:.0f} | {pull / get:.0%} |")


if __name__ == "__main__":
    main()
