"""Time and memory of a basis: fitting, encoding and decoding, for a model of any shape.

The model has random weights, and rows of the shape given; its own layers are narrow, so
that reading and gradients take less than those of a real one. `turbo4+zstd` and
`planes+zstd` are measured beside. By default the rows are those of an 8B model with
half its layers, of float32; with `--bf16` they are stored as 16 bits, as models of that
size have them.

    python tools/fit_bench.py [--layers N] [--heads N] [--dim D] [--contexts N] [--bf16]
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from kvstore.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402  (after OpenBLAS)
import numpy as np  # noqa: E402
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402

import kvstore  # noqa: E402
from kvstore.format.basis import basis_digest  # noqa: E402
from kvstore.models.calibrate import CONTEXT, PREFIX, fit_model  # noqa: E402
from kvstore.models.session import prefill  # noqa: E402
from kvstore.storage.bases import add_basis  # noqa: E402
from kvstore.storage.folder import create_folder  # noqa: E402

_VOCABULARY = 1000


def main() -> None:
    """Measure and print."""
    options = parse_options()
    model = make_model(options)
    chosen = random.Random(1)
    contexts = [
        chosen.choices(range(_VOCABULARY), k=CONTEXT) for _ in range(options.contexts)
    ]
    begin = Watch()
    basis = fit_model(model, contexts, "random", lambda done, total: None)
    size = len(basis) / 1e6
    print(f"fit to {options.contexts} texts: {begin}; basis {size:.1f} MB", flush=True)
    prompt_cache = prefill(model, contexts[0][:PREFIX], caches(model))
    for cache in prompt_cache if options.bf16 else ():
        rows = (x.astype(mx.bfloat16) for x in (cache.keys, cache.values))
        cache.keys, cache.values = rows
    with tempfile.TemporaryDirectory() as folder:
        fitted = [f"fit{rate}@{basis_digest(basis)}" for rate in (1, 2, 3)]
        for codec in ("turbo4", "planes", *fitted):
            path = Path(folder) / codec[:6]
            add_basis(create_folder(path), basis)
            measure(path, f"{codec}+zstd", contexts[0][:PREFIX], prompt_cache)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8, help="of keys and values")
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="store rows of 16 bits")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> Any:
    """Return a model of random weights with such rows."""
    mx.random.seed(0)
    args = ModelArgs(
        model_type="llama", hidden_size=256, num_hidden_layers=options.layers,
        intermediate_size=256, num_attention_heads=options.heads, rms_norm_eps=1e-5,
        vocab_size=_VOCABULARY, num_key_value_heads=options.heads,
        head_dim=options.dim, rope_theta=500_000, max_position_embeddings=8192,
    )  # fmt: skip
    model = Model(args)
    mx.eval(model.parameters())
    return model


def caches(model: Any) -> list[Any]:
    """Return empty caches for a model."""
    from mlx_lm.models.cache import make_prompt_cache

    found: list[Any] = make_prompt_cache(model)
    return found


def measure(path: Path, codec: str, tokens: list[int], prompt_cache: list[Any]) -> None:
    """Print what a codec takes to save a prompt, and to load it."""
    fingerprint = kvstore.Fingerprint({"weights": "random"}, "random")
    with kvstore.Store(path, codec) as store:
        watch = Watch()
        entry = store.save(tokens, prompt_cache, fingerprint, name="first")
        saved = str(watch)
        store.load_entry("first", fingerprint)
        loads = []
        for _ in range(5):
            watch = Watch()
            found = store.load_entry("first", fingerprint)[0]
            mx.eval([cache.state for cache in found])
            loads.append((*watch.passed(), str(watch)))
    count = sum(x.size for cache in prompt_cache for x in cache.keys_and_values())
    median = sorted(loads, key=lambda each: each[1])[2][-1]
    bits = entry.nbytes * 8 / count
    print(f"{codec[:4]:6} {bits:5.2f} bits  save {saved};  load {median}", flush=True)


class Watch:
    """What passes from its making on."""

    def __init__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def passed(self) -> tuple[float, float]:
        """Return seconds, and seconds of the processor."""
        now = (time.perf_counter(), time.process_time())
        wall, processor = np.subtract(now, self._began)
        return float(wall), float(processor)

    def __str__(self) -> str:
        """Return both, and the most memory that there was."""
        wall, processor = self.passed()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return f"{wall:.2f} s, of the processor {processor:.2f}, peak {peak:.1f} GiB"


if __name__ == "__main__":
    main()
