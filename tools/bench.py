"""Saving and loading, beside mlx-lm's files and a plain copy, all in one run.

Every round runs each contestant once, so that what else the machine does meets all of
them; figures are medians, of seconds and of the processor's seconds, and the memory
that a load or a save takes above what it starts with, in parts of the cache. mlx-lm
and the copy check nothing. mlx-lm does not wait for the disk, we do: so its file is
saved a second time, with a sync, and each job begins with nothing left to write. Its
load maps nothing: all is evaluated, so that every byte is in memory, as after ours.

    python tools/bench.py MODEL            # a prompt of a real model, and its prefill
    python tools/bench.py --shape          # random rows of a model of 8 billion
    python tools/bench.py --shape --cold   # as root on Linux: the page cache dropped
    python tools/bench.py MODEL --growth   # 1,000 to 64,000 tokens, and an append
    python tools/bench.py --index 1000000  # the index of so many blocks
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

from kvstore.blas import load_openblas  # noqa: E402

OPENBLAS = load_openblas()

import mlx.core as mx  # noqa: E402  (after OpenBLAS)
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import kvstore  # noqa: E402
from kvstore.storage.files import sync_file  # noqa: E402

CODECS = ("raw", "planes+zstd", "turbo4", "turbo4+zstd", "turbo3+zstd", "turbo2+zstd")
GROWTH = (1_000, 4_000, 16_000, 64_000)
TURN = 256
# Layers, KV heads and head dimension of a model of 8 billion parameters.
SHAPE = (32, 8, 128)
MODEL = kvstore.Fingerprint({"weights": "measured"}, "measured")
STOCK = "mlx-lm's file"
SYNCED = "… and synced"
Cache = list[Any]


@dataclass
class Contestant:
    """One way to keep a prompt cache: how it is saved, and loaded."""

    what: str
    # Removes what the save before left: all of them write new files. Does not count.
    prepare: Callable[[], object]
    save: Callable[[], object]
    load: Callable[[], Cache | None]
    nbytes: Callable[[], int]


@dataclass
class Row:
    """Medians of one contestant: seconds, and bytes on disk."""

    what: str
    num_tokens: int
    nbytes: int
    save_s: float
    save_cpu_s: float
    load_s: float
    load_cpu_s: float
    # What a save and a load take in memory above the cache, in parts of it.
    save_peak: float | None
    load_peak: float | None
    cold_s: float | None = None
    first_s: float | None = None
    # Of a turn of 256 tokens, in a store just opened and in the same store the next.
    append_s: float | None = None
    next_s: float | None = None


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    if options.index:
        print(json.dumps(measure_index(options.index), indent=1))
        return
    print(f"{os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores", end="")
    print(f", mlx {mx.__version__} on {mx.default_device()}", end="")
    print(f", OpenBLAS {'yes' if OPENBLAS else 'no'}, load {os.getloadavg()[0]:.1f}")
    model, prefill_s = None, None
    if options.model:
        from mlx_lm import load

        model, tokenizer = load(options.model)[:2]
        tokens = read_tokens(tokenizer, options.tokens)
        prefills = [prefill(model, tokens) for _ in range(3)]
        prefill_s = statistics.median(seconds for seconds, _ in prefills)
        prompt_cache = prefills[-1][1]
        print(f"prefill of {len(tokens):,} tokens: {prefill_s:.2f} s")
    else:
        tokens = list(range(options.tokens))
        prompt_cache = random_cache(options.tokens, *SHAPE, mx.bfloat16)
    rows = measure(tokens, prompt_cache, options, model)
    print_table(rows, prefill_s)
    growth = measure_growth(prompt_cache, options) if options.growth else []
    write_results(options, prefill_s, rows, growth)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or repository of mlx-lm")
    parser.add_argument("--shape", action="store_true", help="random rows instead")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--codec", action="append", help="only these codecs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--cold", action="store_true", help="drop the page cache too")
    parser.add_argument("--index", type=int, help="blocks of an index to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not (options.model or options.shape or options.index):
        parser.error("give a model, --shape or --index")
    return options


def read_tokens(tokenizer: Any, count: int) -> list[int]:
    """Return tokens of Python's own language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return list(tokenizer.encode(text))[:count]


def prefill(model: Any, tokens: list[int]) -> tuple[float, Cache]:
    """Return the seconds to the first token as mlx-lm computes it, and the cache."""
    prompt_cache = make_prompt_cache(model)
    began = time.perf_counter()
    steps = generate_step(
        mx.array(tokens), model, max_tokens=1, prompt_cache=prompt_cache
    )
    next(steps)
    seconds = time.perf_counter() - began
    steps.close()
    trim_prompt_cache(prompt_cache, prompt_cache[0].offset - len(tokens))
    return seconds, prompt_cache


def random_cache(
    num_tokens: int, layers: int, heads: int, dim: int, dtype: mx.Dtype
) -> Cache:
    """Return a prompt cache of a mean for each head, and noise."""
    made = []
    for number in range(layers):
        mx.random.seed(number)
        sides = [
            mx.random.normal((1, heads, num_tokens, dim))
            + mx.random.normal((1, heads, 1, dim))
            for _ in range(2)
        ]
        cache = KVCache()
        cache.update_and_fetch(*(side.astype(dtype) for side in sides))
        mx.eval(cache.state)
        made.append(cache)
    return made


def measure(
    tokens: list[int], prompt_cache: Cache, options: argparse.Namespace, model: Any
) -> list[Row]:
    """Return a row for each codec, for mlx-lm's files and for a plain copy."""
    nbytes = sum(cache.nbytes for cache in prompt_cache)
    with tempfile.TemporaryDirectory() as folder:
        all_ways = contestants(Path(folder), tokens, prompt_cache, options.codec)
        seen: dict[tuple[str, str], list[Sample]] = {}
        for _ in range(options.repeats):
            for way in all_ways:
                way.prepare()
                jobs = [("save", way.save), ("load", way.load)]
                if model is not None and way.what != "plain copy":
                    jobs.append(("first", lambda way=way: first_logits(model, way)))
                for job, work in jobs:
                    # Nobody's sync waits for what another has left to the disk.
                    os.sync()
                    seen.setdefault((way.what, job), []).append(sample(work, nbytes))
                if options.cold:
                    drop_page_cache()
                    seen.setdefault((way.what, "cold"), []).append(sample(way.load, 1))
        return [to_row(way, len(tokens), seen) for way in all_ways]


def contestants(
    folder: Path, tokens: list[int], prompt_cache: Cache, codecs: Sequence[str] | None
) -> list[Contestant]:
    """Return all ways to keep a prompt cache."""
    quantized = [cache.to_quantized(64, 4) for cache in prompt_cache]
    mx.eval([cache.state for cache in quantized])
    plain = {STOCK: prompt_cache, "mlx-lm, 4 bits": quantized}
    found = [stock(folder / what, what, kept) for what, kept in plain.items()]
    found.insert(1, stock(folder / "synced", SYNCED, prompt_cache, is_synced=True))
    found.append(copy(folder / "copy", prompt_cache))
    stored = codecs or CODECS
    return found + [ours(folder / name, name, tokens, prompt_cache) for name in stored]


def ours(path: Path, codec: str, tokens: list[int], prompt_cache: Cache) -> Contestant:
    """Return our way with one codec."""

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        kvstore.Store(path, codec=codec).close()

    def save() -> None:
        with kvstore.Store(path, codec=codec) as store:
            store.save(tokens, prompt_cache, MODEL, name="x")

    def load() -> Cache:
        with kvstore.Store(path, codec=codec) as store:
            return store.load_entry("x", MODEL)[0]

    def nbytes() -> int:
        shards = path.rglob("*.safetensors")
        return sum(shard.stat().st_size for shard in shards)

    return Contestant(codec, prepare, save, load, nbytes)


def stock(
    path: Path, what: str, prompt_cache: Cache, *, is_synced: bool = False
) -> Contestant:
    """Return mlx-lm's way, which writes one file; it does not wait for the disk."""
    name = f"{path}.safetensors"

    def load() -> Cache:
        restored: Cache = load_prompt_cache(name)
        mx.eval([cache.state for cache in restored])
        return restored

    def nbytes() -> int:
        return Path(name).stat().st_size

    def save() -> None:
        save_prompt_cache(name, prompt_cache)
        if is_synced:
            sync_file(Path(name))

    return Contestant(what, partial(_remove, Path(name)), save, load, nbytes)


def copy(path: Path, prompt_cache: Cache) -> Contestant:
    """Return a way to write and read the bytes of the rows, and nothing else."""
    sides = [side for cache in prompt_cache for side in cache.state[:2]]
    octets = [mx.contiguous(side).view(mx.uint8) for side in sides]
    mx.eval(octets)

    def save() -> None:
        with path.open("wb") as file:
            for array in octets:
                file.write(memoryview(array))
            file.flush()
            os.fsync(file.fileno())

    def load() -> None:
        path.read_bytes()

    size = path.stat
    return Contestant(
        "plain copy", partial(_remove, path), save, load, lambda: size().st_size
    )


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def first_logits(model: Any, way: Contestant) -> None:
    """Load, and feed the last token again."""
    prompt_cache = way.load()
    if not all(isinstance(cache, KVCache) for cache in prompt_cache or []):
        return
    trim_prompt_cache(prompt_cache, 1)
    mx.eval(model(mx.array([[1]]), cache=prompt_cache)[:, -1])


@dataclass
class Sample:
    """One run of something."""

    wall_s: float
    cpu_s: float
    # In parts of a number of bytes; ``None`` where nobody tells.
    peak: float | None


def sample(work: Callable[[], object], nbytes: int) -> Sample:
    """Run something, and say what it took."""
    with watched() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    kept = result if isinstance(result, list) else []
    above = peak[0] - sum(getattr(cache, "nbytes", 0) for cache in kept)
    return Sample(wall, cpu, above / nbytes if peak[0] else None)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Yield a list that has, at the end, the most bytes taken above the beginning."""
    mx.clear_cache()
    # What was freed is to go back to the system, or taking it again would not show.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    began, most, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident_bytes() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def resident_bytes() -> int:
    """Return the memory of this process, or 0 where there is no ``/proc``."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def drop_page_cache() -> None:
    """Make the next read come from the disk; Linux, as root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def to_row(
    way: Contestant, num_tokens: int, seen: dict[tuple[str, str], list[Sample]]
) -> Row:
    """Return the medians of a contestant."""

    def median(job: str, name: str) -> Any:
        values = [getattr(one, name) for one in seen.get((way.what, job), [])]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return Row(
        way.what, num_tokens, way.nbytes(),
        median("save", "wall_s"), median("save", "cpu_s"),
        median("load", "wall_s"), median("load", "cpu_s"),
        median("save", "peak"), median("load", "peak"),
        median("cold", "wall_s"), median("first", "wall_s"),
    )  # fmt: skip


def measure_growth(like: Cache, options: argparse.Namespace) -> list[Row]:
    """Return rows for random prompt caches of a model's shape, of many lengths."""
    keys, rows = like[0].keys, []
    for num_tokens in GROWTH:
        shape = (len(like), keys.shape[1], keys.shape[3], keys.dtype)
        grown = random_cache(num_tokens + 2 * TURN, *shape)
        whole = list(range(num_tokens + 2 * TURN))
        trim_prompt_cache(grown, 2 * TURN)
        some = measure(whole[:num_tokens], grown, options, None)
        for row in some:
            if row.what in (options.codec or CODECS):
                took = measure_appends(row.what, whole, grown, options.repeats)
                row.append_s, row.next_s = took
        print_table(some, None)
        rows += some
    return rows


def measure_appends(
    codec: str, tokens: list[int], prompt_cache: Cache, repeats: int
) -> tuple[float, ...]:
    """Return the processor's seconds of a turn in a store just opened, and the next.

    Rows that a cache was trimmed of are there still.
    """
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            with kvstore.Store(folder, codec=codec) as store:
                store.save(tokens[: -2 * TURN], prompt_cache, MODEL, name="x")
            with kvstore.Store(folder, codec=codec) as store:
                for left, taken in zip((TURN, 0), seconds, strict=True):
                    for cache in prompt_cache:
                        cache.offset += TURN
                    some = tokens[: len(tokens) - left]
                    began = time.process_time()
                    store.save(some, prompt_cache, MODEL, name="x")
                    taken.append(time.process_time() - began)
            trim_prompt_cache(prompt_cache, 2 * TURN)
    return tuple(map(statistics.median, seconds))


def measure_index(num_blocks: int) -> dict[str, Any]:
    """Return what the index of so many blocks takes, in chains of 512."""
    from kvstore.storage.index import Index

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        fill_index(path, num_blocks)
        opens, prefixes = [], []
        for _ in range(5):
            began = time.process_time()
            index = Index(path)
            opens.append(time.process_time() - began)
            index.close()
        index = Index(path)
        for number in range(0, num_blocks // 512, max(1, num_blocks // 512 // 40)):
            chain = [block_hash(512 * number + i) for i in range(512)]
            began = time.process_time()
            assert len(index.longest_prefix(chain)) == 512
            prefixes.append(time.process_time() - began)
        index.close()
        code = _STATS.format(path=str(path))
        sums = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return {
            "blocks": num_blocks,
            "megabytes": round(path.stat().st_size / 1e6),
            "open_ms": 1000 * statistics.median(opens),
            "prefix_of_512_ms": 1000 * statistics.median(prefixes),
            **json.loads(sums.stdout),
        }


_STATS = """
import json, resource, time
from pathlib import Path
import numpy
from kvstore.ops.stats import _Reach
from kvstore.storage.index import Index
index = Index(Path({path!r}))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before, began = peak(), time.process_time()
_Reach(index)
seconds = time.process_time() - began
print(json.dumps({{"sums_s": seconds, "sums_megabytes": peak() - before}}))
"""


def block_hash(number: int) -> bytes:
    """Return the hash of a block of the measured index."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def fill_index(path: Path, num_blocks: int) -> None:
    """Write an index of chains of 512 blocks, 64 in a shard."""
    import numpy as np

    from kvstore.storage.index import _SCHEMA, Index

    index = Index(path, create=True)
    index._query("PRAGMA synchronous = OFF")
    later = [line for line in _SCHEMA.split(";") if "CREATE INDEX blocks_by" in line]
    for line in later:
        index._query(f"DROP INDEX {line.split()[2]}")
    hashes = np.frombuffer(b"".join(map(block_hash, range(num_blocks))), "V32")
    # In the order of the table, and its indexes at last: ten times as fast.
    order = np.argsort(hashes.view(">u8")[::4], kind="stable")
    with index.transaction():
        for shard in range(1, -(-num_blocks // 64) + 1):
            index.add_shard(f"{shard:064x}", 69_000, 1.0)
        for number in map(int, order):
            parent = hashes[number - 1].tobytes() if number % 512 else bytes(32)
            row = (hashes[number].tobytes(), parent, number // 64 + 1)
            index._query(
                "INSERT INTO blocks VALUES (?, ?, ?, 7, 256, 1000, 511, 0)", row
            )
    for line in later:
        index._query(line)
    index.close()


def print_table(rows: Sequence[Row], prefill_s: float | None) -> None:
    """Print what was measured, and how it stands to mlx-lm's own file."""
    print(
        f"\n{'':14} {'TOKENS':>7} {'MB':>8} {'SAVE S':>8} {'CPU S':>7} {'LOAD S':>8}"
        f" {'CPU S':>7} {'COLD S':>7} {'FIRST S':>7} {'APPEND':>7} {'NEXT':>7}"
        f" {'PEAK':>11} {'SAVE':>6} {'LOAD':>6} {'COLD':>6} {'PREFILL':>7}"
    )
    base = next(row for row in rows if row.what == STOCK)
    for row in rows:
        peaks = f"{show(row.save_peak, 5, 2)} {show(row.load_peak, 5, 2)}"
        print(
            f"{row.what:14} {row.num_tokens:7,} {row.nbytes / 1e6:8.2f}"
            f" {row.save_s:8.3f} {row.save_cpu_s:7.3f} {row.load_s:8.3f}"
            f" {row.load_cpu_s:7.3f} {show(row.cold_s)} {show(row.first_s)}"
            f" {show(row.append_s)} {show(row.next_s)} {peaks}"
            f" {ratio(row.save_s, base.save_s)}"
            f" {ratio(row.load_s, base.load_s)} {ratio(row.cold_s, base.cold_s)}"
            f" {ratio(prefill_s, row.first_s):>7}"
        )


def ratio(above: float | None, below: float | None) -> str:
    """Return a ratio, or blanks."""
    return f"{above / below:5.2f}x" if above and below else " " * 6


def show(value: float | None, width: int = 7, digits: int = 3) -> str:
    """Return a number, or blanks."""
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def write_results(
    options: argparse.Namespace,
    prefill_s: float | None,
    rows: Sequence[Row],
    growth: Sequence[Row],
) -> None:
    """Write JSON and plot, where they are asked for."""
    if options.json:
        results = {
            "prefill_s": prefill_s,
            "rows": [asdict(row) for row in rows],
            "growth": [asdict(row) for row in growth],
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(growth or rows, options.plot)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw bytes, save and load time over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    titles = {
        "nbytes": "MB on disk",
        "save_s": "seconds to save",
        "load_s": "… to load",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for what in dict.fromkeys(row.what for row in rows):
            mine = [row for row in rows if row.what == what]
            scale = 1e6 if name == "nbytes" else 1
            values = [getattr(row, name) / scale for row in mine]
            axis.plot([row.num_tokens for row in mine], values, "o-", label=what, ms=3)
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
