"""Measure the kernels of turboquant, and a save and a load that use them.

    python tools/kernel_bench.py              # all kernels that this machine runs
    python tools/kernel_bench.py --store      # one save and one load as well
    TURBOQUANT_KERNELS=numpy python tools/kernel_bench.py --store

Seconds are the processor's, which other programs on the machine disturb least; GB/s
are of 16-bit rows, on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

import kvstore  # noqa: E402
from tools.bench import MODEL, SHAPE, random_cache  # noqa: E402
from turboquant import make_wh_rotation  # noqa: E402
from turboquant.kernels import best_kernels, native  # noqa: E402
from turboquant.kernels.numpy import NumpyKernels  # noqa: E402


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="save and load as well")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--codecs", nargs="*", default=["turbo4", "turbo4+zstd"])
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    measure_kernels()
    if options.store:
        print(f"\na store that uses the {best_kernels().name} kernels")
        measure_store(options.tokens, options.codecs)


def measure_kernels() -> None:
    """Print GB/s of encoding and decoding for some widths and lengths."""
    everything = [*native.load_all(), NumpyKernels()]
    print("encode / decode, GB/s".ljust(24), *(k.name.rjust(13) for k in everything))
    for dim in (64, 80, 128, 256):
        for bits in (2, 3, 4, 8):
            rates = [rates_of(kernels, dim, bits) for kernels in everything]
            cells = [f"{encode:.2f} / {decode:.2f}" for encode, decode in rates]
            name = f"D = {dim}, {bits} bits"
            print(name.ljust(24), *(cell.rjust(13) for cell in cells), flush=True)


def rates_of(kernels: Any, dim: int, bits: int) -> tuple[float, float]:
    """Return GB/s of encoding and of decoding blocks of keys."""
    random = np.random.default_rng(dim)
    wide = random.standard_normal((4, 8, 256, dim)).astype(np.float32)
    layers = list((wide.view(np.uint32) >> 16).astype(np.uint16))
    rotation = make_wh_rotation(dim)
    codes = kernels.encode_block(layers, bits, rotation, is_centred=True)

    def encode() -> None:
        kernels.encode_block(layers, bits, rotation, is_centred=True)

    def decode() -> None:
        kernels.decode_block(
            codes.planes, codes.norms, layers, bits, rotation, mean=codes.mean
        )

    gigabytes = sum(layer.nbytes for layer in layers) / 1e9
    return gigabytes / seconds(encode), gigabytes / seconds(decode)


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """Return the processor's time for some work, the median of a few."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def measure_store(num_tokens: int, codecs: list[str]) -> None:
    """Print the processor's time of a save and of a load."""
    prompt_cache = random_cache(num_tokens, *SHAPE, mx.bfloat16)
    tokens = list(range(num_tokens))
    for codec in codecs:
        with (
            tempfile.TemporaryDirectory() as folder,
            kvstore.Store(folder, codec=codec) as store,
        ):
            save = seconds(lambda: store.save(tokens, prompt_cache, MODEL), times=1)
            load = seconds(lambda: store.load(tokens, MODEL))
        print(f"{codec}, {num_tokens:,} tokens: save {save:.2f} s, load {load:.3f} s")


if __name__ == "__main__":
    main()
