"""Makers of tiny prompt caches, for tests and for the processes that tests start."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache

import kvstore

BLOCK = 16
MODEL = kvstore.Fingerprint(
    {"weights": "a", "config": {"rope_theta": 1e4}, "adapter": None}, "model-a"
)
OTHER_WEIGHTS = kvstore.Fingerprint({**MODEL.fields, "weights": "b"}, "model-b")
OTHER_ADAPTER = kvstore.Fingerprint({**MODEL.fields, "adapter": "c"}, "model-c")


def random_rows(num_tokens, seed, *, layers=2, heads=2, dim=64, dtype=mx.bfloat16):
    """Return rows as a model would add them: per layer, keys and values."""
    shape = (layers, 2, 1, heads, num_tokens, dim)
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def grow(prompt_cache, rows):
    """Append rows to a prompt cache, made now where it is None."""
    prompt_cache = prompt_cache or [KVCache() for _ in range(rows.shape[0])]
    for layer, cache in enumerate(prompt_cache):
        cache.update_and_fetch(rows[layer, 0], rows[layer, 1])
    return prompt_cache


def make_cache(num_tokens, seed=0, **options):
    """Return a prompt cache of random rows."""
    return grow(None, random_rows(num_tokens, seed, **options))


def make_conversation(num_blocks, seed, *, extra=0):
    """Return tokens and prompt cache of a conversation that no other seed shares."""
    num_tokens = num_blocks * BLOCK + extra
    tokens = [1000 * seed + i for i in range(num_tokens)]
    return tokens, make_cache(num_tokens, seed)


def rows_of(prompt_cache, start=0, stop=None):
    """Return the bits of some rows of every layer, keys and values."""
    stop = prompt_cache[0].offset if stop is None else stop
    return [
        bytes(memoryview(mx.contiguous(side[..., start:stop, :]).view(mx.uint8)))
        for cache in prompt_cache
        for side in (cache.keys, cache.values)
    ]


def cache_of(tokens):
    """Return the prompt cache that :func:`make_work` gives these tokens."""
    return make_cache(len(tokens), tokens[0] // 1000)


def make_work(base):
    """Return what a process saves, in order: name, tokens, prompt cache."""
    work = []
    for i, (name, num_tokens) in enumerate(
        [
            ("chat", 2 * BLOCK + 3),
            ("other", 3 * BLOCK),
            ("chat", 2 * BLOCK + 3),
            (None, BLOCK + 1),
            ("chat", BLOCK + 7),
            (f"own {base}", 2 * BLOCK),
        ]
    ):
        tokens = [1000 * (base + i + 1) + j for j in range(num_tokens)]
        work.append((name, tokens, cache_of(tokens)))
    return work
