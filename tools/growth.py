"""Bytes, save time and load time of windowed and recurrent models, over tokens.

Random rows in the shape of a model with sliding windows (5 layers of 1,024 tokens to
one whole layer) and of one with recurrent states (3 to one) are stored as a prefill
would, 2,048 tokens at a time, from 1,000 to 32,000 tokens, with a turn of 200 tokens
behind it. The slope is that of a straight line through the logarithms: 1 is linear.

    python tools/growth.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

import kvstore

LENGTHS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
STEP, TURN, WINDOW = 2048, 200, 1024
HEADS, DIM = 4, 64
STATE = (1, 16, 64, 64)
MODEL = kvstore.Fingerprint({"weights": "random"}, "random")


def sliding() -> list[Any]:
    """Return an empty prompt cache with windows."""
    return [KVCache() if i % 6 == 5 else RotatingKVCache(WINDOW) for i in range(12)]


def recurrent() -> list[Any]:
    """Return an empty prompt cache with states."""
    return [KVCache() if i % 4 == 3 else ArraysCache(2) for i in range(12)]


def feed(prompt_cache: list[Any], num_tokens: int) -> None:
    """Add random rows, and a random state, for some tokens."""
    shape = (1, HEADS, num_tokens, DIM)
    for cache in prompt_cache:
        if isinstance(cache, ArraysCache):
            cache[0] = mx.random.normal((1, 3, HEADS * DIM)).astype(mx.bfloat16)
            cache[1] = mx.random.normal(STATE)
        else:
            rows = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2))
            cache.update_and_fetch(*rows)
    mx.eval([cache.state for cache in prompt_cache])


def measure(make: Callable[[], list[Any]], num_tokens: int) -> tuple[float, ...]:
    """Return bytes, seconds to save, bytes of a turn, and seconds to load."""
    prompt_cache, tokens = make(), list(range(num_tokens + TURN))
    with (
        tempfile.TemporaryDirectory() as folder,
        kvstore.Store(Path(folder) / "store") as store,
    ):
        save_s = 0.0
        for start in range(0, num_tokens, STEP):
            stop = min(start + STEP, num_tokens)
            feed(prompt_cache, stop - start)
            began = time.perf_counter()
            if stop < num_tokens:
                store.save_blocks(tokens[:stop], prompt_cache, MODEL)
            else:
                store.save(tokens[:stop], prompt_cache, MODEL, name="x")
            save_s += time.perf_counter() - began
        nbytes = store.stats().nbytes
        feed(prompt_cache, TURN)
        store.save(tokens, prompt_cache, MODEL, name="x")
        turn = store.stats().nbytes - nbytes
        loads = []
        for _ in range(3):
            began = time.perf_counter()
            store.load_entry("x", MODEL)
            loads.append(time.perf_counter() - began)
    return nbytes, save_s, turn, sorted(loads)[1]


def slope(values: list[float]) -> float:
    """Return the slope of the logarithms over those of the lengths."""
    return float(np.polyfit(np.log(LENGTHS), np.log(values), 1)[0])


def main() -> None:
    """Measure and print."""
    for make in (sliding, recurrent):
        print(f"\n{make.__name__:10} {'TOKENS':>7} {'MB':>8} {'SAVE S':>8}", end="")
        print(f" {'TURN MB':>8} {'LOAD S':>8}")
        rows = []
        for num_tokens in LENGTHS:
            rows.append(measure(make, num_tokens))
            nbytes, save_s, turn, load_s = rows[-1]
            print(
                f"{'':10} {num_tokens:7,} {nbytes / 1e6:8.2f} {save_s:8.3f}"
                f" {turn / 1e6:8.2f} {load_s:8.3f}"
            )
        slopes = [slope([row[i] for row in rows]) for i in range(4)]
        print(f"{'slope':10} {'':7}", *(f"{value:8.2f}" for value in slopes))


if __name__ == "__main__":
    main()
