"""Seconds of saving and loading on a GPU, beside mlx-lm's own file and a prefill.

    python tools/gpu_bench.py --tokens 16384 --json gpu.json

Rows are random, of the shape of a model of 8 billion parameters. Every figure is a
median; a load is done when its rows are on the device. The store is open, as it is in
a server; "first" is the first load of a process, which opens it, without the imports.
"taken" is what a server's generating thread does with 2,048 tokens that were computed,
and what memory that takes above the cache's. `fit2` has rows and a basis of noise.
The last line says whether stores that the GPU encoded are those that the native kernels
and NumPy write: a shard is named by what it holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

import kvstore  # noqa: E402
from kvstore.caches.snapshot import make_chain  # noqa: E402
from kvstore.codecs.fitted import fitted_from_file  # noqa: E402
from kvstore.codecs.rotary import angles, rotate_on_device  # noqa: E402
from kvstore.format.basis import (  # noqa: E402
    BasisFile,
    BasisGroup,
    basis_digest,
    basis_to_bytes,
    parse_basis,
)
from kvstore.storage.bases import add_basis  # noqa: E402
from kvstore.storage.folder import open_folder  # noqa: E402
from turboquant.kernels import best_kernels, gpu  # noqa: E402

# Layers, KV heads and head dimension of a model of 8 billion parameters.
SHAPE = (32, 8, 128)
MODEL = kvstore.Fingerprint({"weights": "measured"}, "measured")
BLOCK = 256
TAKEN_BLOCKS = 8
CODECS = ("turbo4", "turbo4+zstd", "turbo3", "raw", "planes+zstd")
# Layers, KV heads, head dimension, tokens and dtype of stores to be compared.
STORES = (
    (3, 2, 128, 700, mx.bfloat16),
    (2, 3, 64, 600, mx.float32),
    (2, 2, 80, 513, mx.float16),
    (2, 1, 256, 512, mx.bfloat16),
)
COMPARED = ("raw", "planes+zstd", "turbo4", "turbo4+zstd", "turbo3+zstd", "turbo5v3")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where stores are written")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--first", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        print(seconds_of_first_load(options.first, options.tokens))
        return
    if options.names:
        print(json.dumps(names_of_stores(options.names)))
        return
    kernels = {verb: gpu._checked(verb) for verb in ("restore", "encode")}
    print(f"{mx.device_info()['device_name']}, MLX {mx.__version__}, kernels {kernels}")
    found: dict[str, Any] = {"kernels": kernels, "device": mx.device_info()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found["seconds"] = measure(Path(folder), options)
        if not options.no_fit:
            found["seconds"] |= measure_fit(Path(folder), options.tokens)
        if not options.no_prefill:
            prefill = make_prefill(options.tokens)
            each = [seconds(prefill) for _ in range(3)]
            found["seconds"]["prefill"] = statistics.median(each)
            print(f"{'prefill':34} {found['seconds']['prefill']:8.4f} s")
        found["same"] = compare_stores(Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the medians of saves, loads and a prefill, by name."""
    num_tokens, found = options.tokens, {}
    prompt_cache = make_cache(*SHAPE, num_tokens, mx.bfloat16)
    nbytes = sum(array.nbytes for c in prompt_cache for array in (c.keys, c.values))

    def note(name: str, work: Callable[[], Any], times: int = 5) -> None:
        each = [seconds(work) for _ in range(times)]
        found[name] = statistics.median(each)
        rates = f"{nbytes / found[name] / 1e9:7.2f} GB/s"
        print(f"{name:34} {found[name]:8.4f} s {rates}", flush=True)

    path = str(folder / "mlx.safetensors")
    note("mlx-lm save", lambda: save_prompt_cache(path, prompt_cache), 3)
    note("mlx-lm load", lambda: evaluated(load_prompt_cache(path)))
    os.unlink(path)
    tokens = list(range(num_tokens))
    for codec in options.codecs:
        stores = (folder / f"{codec}-{number}" for number in itertools.count())

        def save(codec: str = codec, stores: Any = stores) -> None:
            with kvstore.Store(next(stores), codec=codec) as store:
                store.save(tokens, prompt_cache, MODEL)

        note(f"{codec} save", save, 3)
        with kvstore.Store(folder / f"{codec}-0", codec=codec) as store:

            def load(store: kvstore.Store = store) -> None:
                evaluated(store.load([*tokens, -1], MODEL)[0])

            load()
            note(f"{codec} load", load, 9)
        held = make_chain(MODEL.fields, prompt_cache, tokens, BLOCK)[0].blocks
        held = {block.hash for block in held[:-TAKEN_BLOCKS]}
        with kvstore.Store(folder / f"{codec}-taken", codec=codec) as store:

            def take(store: kvstore.Store = store, held: Any = held) -> None:
                store.snapshot(tokens, prompt_cache, MODEL, without=held)

            mx.reset_peak_memory()
            before = mx.get_active_memory()
            note(f"{codec} taken, {TAKEN_BLOCKS * BLOCK:,} tokens", take, 9)
            peak = mx.get_peak_memory() - before
            print(f"{'  memory above the cache':34} {peak / 1e6:8.1f} MB")
    command = [sys.executable, __file__, "--tokens", str(num_tokens), "--first"]
    for codec in options.codecs[:2]:
        first = float(run([*command, str(folder / f"{codec}-0")]))
        found[f"{codec} first load"] = first
        print(f"{codec + ' first load':34} {first:8.4f} s", flush=True)
    return found


def measure_fit(folder: Path, num_tokens: int) -> dict[str, float]:
    """Return medians of loads of `fit2`, beside mlx-lm's of the same rows."""
    data = make_basis(*SHAPE)
    prompt_cache = make_fitted_cache(data, num_tokens)
    path, tokens = str(folder / "fitted.safetensors"), list(range(num_tokens))
    save_prompt_cache(path, prompt_cache)
    kvstore.Store(folder / "fit").close()
    codec = f"fit2@{add_basis(open_folder(folder / 'fit'), data)}+zstd"
    with kvstore.Store(folder / "fit", codec=codec) as store:
        entry = store.save(tokens, prompt_cache, MODEL)
        del prompt_cache
        loads: dict[str, Callable[[], Any]] = {
            "mlx-lm load of those rows": lambda: load_prompt_cache(path),
            "fit2 load": lambda: store.load([*tokens, -1], MODEL)[0],
        }
        found = {}
        for name, load in loads.items():
            evaluated(load())
            each = [seconds(lambda load=load: evaluated(load())) for _ in range(5)]
            found[name] = statistics.median(each)
            print(f"{name:34} {found[name]:8.4f} s", flush=True)
    bits = 8 * entry.nbytes / (2 * num_tokens * SHAPE[0] * SHAPE[1] * SHAPE[2])
    print(f"{'  bits of a number':34} {bits:8.2f}")
    return found


def make_basis(layers: int, heads: int, dim: int) -> bytes:
    """Return a basis of noise, of two heads each."""
    group = BasisGroup(tuple(range(layers)), heads, dim, 2, dim // 2, False)
    random, width = np.random.default_rng(0), group.width
    shape = (layers, group.num_parts)
    turned = np.linalg.qr(random.standard_normal((width, width)))[0]
    arrays = {
        "frequencies": np.tile(1e4 ** (-np.arange(dim // 2) / (dim // 2)), (layers, 1)),
        "matrix": np.broadcast_to(turned, (*shape, width, width)),
        "scale": np.ones(shape),
        "mean": random.standard_normal((*shape, width)),
        "sigma": np.broadcast_to(np.linspace(14, -20, width), (*shape, width)),
        "features": np.broadcast_to([[0.0] * 4, [1.0] * 4], (*shape, 2, 4)),
        "importance": np.zeros((*shape, 12)),
    }
    held = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1"}
    tensors = {
        f"0.{name}": arrays[name].astype(held[dtype]).tobytes()
        for name, (dtype, _) in group.tensors().items()
    }
    return basis_to_bytes(BasisFile((group,), {"2": 0}, {}, tensors))


def make_fitted_cache(data: bytes, num_tokens: int) -> list[Any]:
    """Return a prompt cache of rows as a basis of one group expects them."""
    (layers,) = fitted_from_file(parse_basis(data, basis_digest(data))).layers
    group, caches = layers.group, []
    cos, sin = (
        mx.array(x)[:, None] for x in angles(layers.frequencies[:1], 0, num_tokens)
    )
    for layer in range(len(group.layers)):
        sizes = mx.array(2.0 ** (layers.sigma[layer].astype(np.float32) / 4))
        shape = (group.num_parts, num_tokens, group.width)
        q = mx.random.normal(shape, key=mx.random.key(layer)) * sizes[:, None]
        wide = q @ mx.array(layers.matrix[layer]).swapaxes(-1, -2)
        wide = wide + mx.array(layers.mean[layer])[:, None]
        x = wide.reshape(*shape[:2], 2, group.num_joined, group.head_dim)
        x = x.transpose(2, 0, 3, 1, 4).reshape(2, group.num_heads, num_tokens, -1)
        keys = rotate_on_device(x[:1], cos, sin, is_traditional=False)
        cache = KVCache()
        cache.update_and_fetch(keys.astype(mx.bfloat16), x[1:].astype(mx.bfloat16))
        mx.eval(cache.keys, cache.values)
        caches.append(cache)
    return caches


def seconds_of_first_load(folder: Path, num_tokens: int) -> float:
    """Return how long the first load of this process takes, imports left out."""
    import transformers  # noqa: F401  (mlx-lm's, which takes long)

    begin = time.perf_counter()
    with kvstore.Store(folder) as store:
        evaluated(store.load([*range(num_tokens), -1], MODEL)[0])
    return time.perf_counter() - begin


def compare_stores(folder: Path) -> dict[str, bool]:
    """Return whether stores are the same, whatever encoded them."""
    script = [sys.executable, __file__, "--names"]
    paths = {name: folder / name for name in ("gpu", "native", "numpy")}
    names = {
        "gpu": json.loads(run([*script, str(paths["gpu"])])),
        "native": json.loads(run([*script, str(paths["native"])], MLX_DEVICE="cpu")),
        "numpy": json.loads(
            run(
                [*script, str(paths["numpy"])],
                MLX_DEVICE="cpu",
                TURBOQUANT_KERNELS="numpy",
            )
        ),
    }
    how = {way: found.pop("kernels") for way, found in names.items()}
    same = {
        store: names["gpu"][store] == names["native"][store] == names["numpy"][store]
        for store in names["gpu"]
    }
    print(f"{sum(same.values())} of {len(same)} stores are the same: {how}")
    return same


def names_of_stores(folder: Path) -> dict[str, Any]:
    """Return the names of the shards of some stores, and what encoded them."""
    on_gpu = os.environ.get("MLX_DEVICE") != "cpu"
    if not on_gpu:
        mx.set_default_device(mx.cpu)
    found: dict[str, Any] = {"kernels": best_kernels().name}
    if on_gpu:
        found["kernels"] = gpu._checked("encode")
    for shape, codec in itertools.product(STORES, COMPARED):
        prompt_cache, num_tokens = make_cache(*shape), shape[3]
        name = f"{codec} {shape}"
        with kvstore.Store(folder / name, codec=codec) as store:
            store.save(list(range(num_tokens)), prompt_cache, MODEL)
        shards = (folder / name).rglob("*.safetensors")
        found[name] = sorted(path.stem for path in shards)
    return found


def make_cache(
    layers: int, heads: int, dim: int, num_tokens: int, dtype: mx.Dtype
) -> list[Any]:
    """Return a prompt cache of a mean for each head, and noise: the same ever."""
    caches = []
    random = np.random.default_rng(dim)
    part = mx.array(random.standard_normal((1, heads, 1024, dim)), mx.float32)
    rows = mx.tile(part, (1, 1, -(-num_tokens // 1024), 1))[:, :, :num_tokens]
    for _ in range(layers):
        sides = []
        for _ in range(2):
            mean = mx.array(2 * random.standard_normal((1, heads, 1, dim)), mx.float32)
            sides.append((rows + mean).astype(dtype))
        cache = KVCache()
        cache.update_and_fetch(*sides)
        mx.eval(cache.state)
        caches.append(cache)
    return caches


def make_prefill(num_tokens: int) -> Callable[[], Any]:
    """Return what computes a prompt on a model of random weights."""
    from mlx_lm.models import llama

    layers, heads, dim = SHAPE
    model = llama.Model(
        llama.ModelArgs.from_dict(
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "num_hidden_layers": layers,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "num_key_value_heads": heads,
                "head_dim": dim,
                "rms_norm_eps": 1e-5,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
                "tie_word_embeddings": False,
            }
        )
    )
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    prompt = mx.random.randint(0, 100_000, (1, num_tokens))

    def prefill() -> None:
        prompt_cache = make_prompt_cache(model)
        for begin in range(0, num_tokens, 2048):
            logits = model(prompt[:, begin : begin + 2048], cache=prompt_cache)
            evaluated(prompt_cache)
        mx.eval(logits)

    return prefill


def evaluated(prompt_cache: list[Any]) -> None:
    """Wait until all rows are there."""
    mx.eval([cache.state for cache in prompt_cache])


def seconds(work: Callable[[], Any]) -> float:
    """Return how long some work takes, what it leaves to the device included."""
    mx.synchronize()
    begin = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - begin


def run(command: list[str], **environment: str) -> str:
    """Return the last line that a program prints."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
