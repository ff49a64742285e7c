"""Save and load of an encrypted store against a plain one, in turns.

    python tools/bench_encrypted.py [--tokens 2048] [--rounds 7] [--folder DIR]

The shape of an 8B model, bfloat16. Each round saves into a fresh store and loads it
with the page cache warm, first plain, then encrypted. The shortest times of the
processor and their ratio are printed; other work disturbs them less than the clock.
Random rows, which compress by 1.45 to 1, as real ones do.
"""

import argparse
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.storage import vault
from kvstore.storage.folder import create_folder

LAYERS, HEADS, DIM = 32, 8, 128
CODECS = ("raw", "planes+zstd", "turbo4+zstd")
MODEL = kvstore.Fingerprint({"model": "bench"})


def make_cache(num_tokens):
    mx.random.seed(1)
    caches = [KVCache() for _ in range(LAYERS)]
    for cache in caches:
        shape = (1, HEADS, num_tokens, DIM)
        rows = [mx.random.normal(shape, mx.bfloat16) for _ in range(2)]
        mx.eval(cache.update_and_fetch(*rows))
    return caches


def run(folder, codec, encryption, tokens, cache):
    """Return the seconds of a save and of a load."""
    create_folder(folder, encryption=encryption)
    with kvstore.Store(folder, codec) as store:
        begin = time.process_time()
        store.save(tokens, cache, MODEL, name="bench")
        saved = time.process_time()
        restored, _ = store.load([*tokens, 1], MODEL)
        mx.eval([layer.state for layer in restored])
        return saved - begin, time.process_time() - saved


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    tokens, cache = list(range(args.tokens)), make_cache(args.tokens)
    print("codec          save plain, encrypted, ratio   load plain, encrypted, ratio")
    for codec in CODECS:
        seconds = {False: [], True: []}
        for number in range(args.rounds):
            for is_encrypted in (False, True):
                with tempfile.TemporaryDirectory(dir=args.folder) as name:
                    home = Path(name)
                    key = vault.keep_by_file(vault.new_key(), home / "key")
                    encryption = key if is_encrypted else None
                    found = run(home / "store", codec, encryption, tokens, cache)
                    if number:  # the first round warms up
                        seconds[is_encrypted].append(found)
        plain, sealed = (
            [min(part) for part in zip(*seconds[which], strict=True)]
            for which in (False, True)
        )
        cells = [
            f"{p:8.3f} s {s:8.3f} s {s / p:6.2f}"
            for p, s in zip(plain, sealed, strict=True)
        ]
        print(f"{codec:12} {cells[0]}   {cells[1]}")


if __name__ == "__main__":
    main()
