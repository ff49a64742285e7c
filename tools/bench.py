"""Seconds and bytes of saving and loading, per codec, beside mlx-lm's own file.

One run, one table: prefill on a real model, then per codec save, load and load to the
first logits, the load split into read, check, zstd, decode and evaluate; the same for
`save_prompt_cache`, `load_prompt_cache` of mlx-lm, and for a plain copy of the bytes,
which is the limit. Every figure is a median. With `--cold`, as root on Linux, the page
cache is dropped before each load. `--growth` measures random rows of the model's shape
from 1,000 to 32,000 tokens.

    python tools/bench.py MODEL [--tokens N] [--growth] [--cold] [--json F] [--plot F]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvstore.blas import load_openblas
from kvstore.storage.shards import OpenShard

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
from kvstore.caches import live as caches  # noqa: E402
from kvstore.caches import restore as restoring  # noqa: E402
from kvstore.caches.layout import group_layers  # noqa: E402
from kvstore.codecs import (  # noqa: E402
    planes,
    raw,
    turbo,
    zstd,
)

CODECS = ("raw", "planes+zstd", "turbo4+zstd", "turbo3+zstd", "turbo2+zstd")
GROWTH = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
MODEL = kvstore.Fingerprint({"weights": "measured"}, "measured")
# Where the time of a load goes: what is measured, and the functions that do it.
PHASES = {
    "read": [(OpenShard, "_read")],
    "check": [(OpenShard, "_check")],
    "zstd": [(zstd.Zstd, "decompress")],
    "decode": [
        (raw.Raw, "decode_into"),
        (planes.Planes, "decode_into"),
        (turbo.Turbo, "decode_into"),
    ],
    "evaluate": [
        (restoring.HostRestoring, "__init__"),
        (restoring.HostRestoring, "finish"),
    ],
}


@dataclass
class Row:
    """One line of the table; seconds, and bytes on disk."""

    what: str
    num_tokens: int
    nbytes: int
    save_s: float
    load_s: float
    cold_s: float | None = None
    first_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    from mlx_lm import load

    model, tokenizer = load(options.model)[:2]
    tokens = read_tokens(tokenizer, options.tokens)
    prefills = [prefill(model, tokens) for _ in range(options.prefills)]
    prefill_s = statistics.median(seconds for seconds, _ in prefills)
    prompt_cache = prefills[-1][1]
    print(f"{os.uname().sysname} {os.uname().machine}, mlx {mx.__version__}", end="")
    print(f" on {mx.default_device()}, OpenBLAS {'yes' if OPENBLAS else 'no'}")
    print(f"prefill of {len(tokens):,} tokens: {prefill_s:.2f} s\n")
    rows = measure_all(tokens, prompt_cache, options, model)
    print_table(rows, prefill_s)
    growth = measure_growth(prompt_cache, options) if options.growth else []
    if growth:
        print()
        print_table(growth, None)
    write_results(options, prefill_s, rows, growth)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or repository that mlx-lm loads")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--codec", action="append", help="only these codecs")
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--cold", action="store_true", help="drop the page cache too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def read_tokens(tokenizer: Any, count: int) -> list[int]:
    """Return tokens of Python's own language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return list(tokenizer.encode(text))[:count]


def prefill(model: Any, tokens: list[int]) -> tuple[float, list[Any]]:
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


def measure_all(
    tokens: list[int],
    prompt_cache: list[Any],
    options: argparse.Namespace,
    model: Any | None,
) -> list[Row]:
    """Return a row for each codec, for mlx-lm's file and for a plain copy."""
    rows = [
        measure_codec(name, tokens, prompt_cache, options, model)
        for name in options.codec or CODECS
    ]
    rows.append(measure_mlx_lm(tokens, prompt_cache, options, model))
    rows.append(measure_copy(tokens, prompt_cache, options))
    return rows


def measure_codec(
    codec: str,
    tokens: list[int],
    prompt_cache: list[Any],
    options: argparse.Namespace,
    model: Any | None,
) -> Row:
    """Save and load with one codec."""
    saves = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.repeats):
            path = Path(folder) / str(i)
            with kvstore.Store(path, codec=codec) as store:
                began = time.perf_counter()
                store.save(tokens, prompt_cache, MODEL, name="x")
                saves.append(time.perf_counter() - began)
        nbytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        with kvstore.Store(path, codec=codec) as store:
            restore = restorer(store, tokens)
            row = Row(codec, len(tokens), nbytes, statistics.median(saves), 0.0)
            time_load(row, restore, options, model)
            row.phases = time_phases(restore, options.repeats)
    return row


def restorer(store: kvstore.Store, tokens: list[int]) -> Callable[[], Any]:
    """Return a function that restores a prompt and what is left to feed."""
    return lambda: store.load(tokens, MODEL)


def time_load(
    row: Row,
    restore: Callable[[], Any],
    options: argparse.Namespace,
    model: Any | None,
) -> None:
    """Fill in the medians of a load: warm, cold, and to the first logits."""
    row.load_s = median_of(options.repeats, restore)
    if options.cold:
        row.cold_s = median_of(options.repeats, restore, before=drop_page_cache)
    if model is not None:

        def first_logits() -> None:
            prompt_cache, rest = restore()
            mx.eval(model(mx.array([rest]), cache=prompt_cache)[:, -1])

        row.first_s = median_of(options.repeats, first_logits)


def median_of(
    repeats: int, run: Callable[[], Any], before: Callable[[], None] | None = None
) -> float:
    """Return the median seconds of a function, after one run that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        if before is not None:
            before()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def drop_page_cache() -> None:
    """Make the next read come from the disk; Linux, as root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def time_phases(restore: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the median seconds that each phase of a load takes."""
    runs = []
    for _ in range(repeats):
        with clocks() as spent:
            restore()
        runs.append(dict(spent))
    return {name: statistics.median(run[name] for run in runs) for name in PHASES}


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Measure the phases of what runs inside."""
    spent = dict.fromkeys(PHASES, 0.0)
    originals = []
    for phase, functions in PHASES.items():
        for owner, name in functions:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, clocked(getattr(owner, name), phase, spent))
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def clocked(
    function: Callable[..., Any], phase: str, spent: dict[str, float]
) -> Callable[..., Any]:
    """Return a function that adds its time to a phase."""

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[phase] += time.perf_counter() - began

    return timed


def measure_mlx_lm(
    tokens: list[int],
    prompt_cache: list[Any],
    options: argparse.Namespace,
    model: Any | None,
) -> Row:
    """Save and load as mlx-lm does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        save_s = median_of(
            options.repeats, lambda: save_prompt_cache(str(path), prompt_cache)
        )

        def restore() -> tuple[list[Any], list[int]]:
            restored = load_prompt_cache(str(path))
            mx.eval([cache.state for cache in restored])
            trim_prompt_cache(restored, 1)
            return restored, tokens[-1:]

        row = Row("mlx-lm's file", len(tokens), path.stat().st_size, save_s, 0.0)
        time_load(row, restore, options, model)
    return row


def measure_copy(
    tokens: list[int], prompt_cache: list[Any], options: argparse.Namespace
) -> Row:
    """Write and read the bytes of the rows, and nothing else: the limit."""
    held = caches.hold(prompt_cache)
    rows = [
        caches.split(held, group, name, rows).data.cast("B")
        for group in group_layers(caches.read_layout(prompt_cache, len(tokens)))
        for name, rows in caches.rows_held(held, group, 0, len(tokens), True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"

        def write() -> None:
            with path.open("wb") as file:
                for data in rows:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())

        save_s = median_of(options.repeats, write)
        row = Row("plain copy", len(tokens), path.stat().st_size, save_s, 0.0)
        time_load(row, path.read_bytes, options, None)
    return row


def measure_growth(
    prompt_cache: Sequence[Any], options: argparse.Namespace
) -> list[Row]:
    """Return rows for random prompt caches of the model's shape, of many lengths."""
    rows = []
    for num_tokens in GROWTH:
        grown = [random_cache(cache, num_tokens) for cache in prompt_cache]
        rows += measure_all(list(range(num_tokens)), grown, options, None)
        del grown
    return rows


def random_cache(like: Any, num_tokens: int) -> KVCache:
    """Return a cache of random rows in the shape of another."""
    cache = KVCache()
    sides = []
    for side in (like.keys, like.values):
        shape = (1, side.shape[1], num_tokens, side.shape[3])
        sides.append(mx.random.normal(shape).astype(side.dtype))
    cache.update_and_fetch(*sides)
    mx.eval(cache.state)
    return cache


def print_table(rows: Sequence[Row], prefill_s: float | None) -> None:
    """Print what was measured."""
    phases = "  ".join(f"{name.upper():>8}" for name in PHASES)
    print(
        f"{'':14} {'TOKENS':>7} {'MB':>8} {'SAVE S':>8} {'LOAD S':>8} {'COLD S':>8}"
        f" {'FIRST S':>8} {'RATIO':>6}  {phases}"
    )
    for row in rows:
        ratio = (
            "" if not (row.first_s and prefill_s) else f"{prefill_s / row.first_s:.0f}x"
        )
        spent = "  ".join(f"{row.phases[name]:8.4f}" for name in row.phases)
        print(
            f"{row.what:14} {row.num_tokens:7,} {row.nbytes / 1e6:8.2f}"
            f" {row.save_s:8.3f} {row.load_s:8.3f} {show(row.cold_s)}"
            f" {show(row.first_s)} {ratio:>6}  {spent}"
        )


def show(seconds: float | None) -> str:
    """Return seconds, or blanks."""
    return f"{'':8}" if seconds is None else f"{seconds:8.3f}"


def write_results(
    options: argparse.Namespace,
    prefill_s: float,
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
