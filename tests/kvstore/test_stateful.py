"""A store under random use against a plain model in memory, over all cache classes.

What a token adds to a layer is made from the tokens up to it. So what any prefix must
restore to is known without keeping anything.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

import kvstore
from kvstore.caches.live import flatten_caches, hold
from kvstore.storage.folder import create_folder
from turboquant.kv_cache import TurboQuantKVCache

BLOCK, HEADS, DIM, WINDOW = 8, 2, 32, 12
MODEL = kvstore.Fingerprint({"weights": "stateful"}, "stateful")
MAKERS = {
    "rows": lambda: [KVCache(), KVCache()],
    "codes": lambda: [QuantizedKVCache(32, 4), TurboQuantKVCache(4), KVCache()],
    "concatenated": lambda: [ConcatenateKVCache()],
    "windows": lambda: [RotatingKVCache(WINDOW), KVCache(), RotatingKVCache(WINDOW, 4)],
    "chunked": lambda: [ChunkedKVCache(WINDOW), KVCache()],
    "states": lambda: [ArraysCache(2), KVCache()],
    "lists": lambda: [CacheList(ArraysCache(1), KVCache()), RotatingKVCache(WINDOW)],
}


def draw(tokens, what, size):
    """Return numbers that stand for what ``tokens`` add; the same ones each time."""
    text = f"{what}:{','.join(map(str, tokens))}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def rows(tokens, start, layer):
    """Return keys and values of the tokens from ``start`` on."""
    made = [
        draw(tokens[: i + 1], layer, 2 * HEADS * DIM).reshape(2, HEADS, 1, DIM)
        for i in range(start, len(tokens))
    ]
    keys, values = np.concatenate(made, axis=2)
    return mx.array(keys[None]), mx.array(values[None])


def feed(prompt_cache, tokens, start, step):
    """Let a prompt cache grow to ``tokens``, some at a time, as a model would."""
    for begin in range(start, len(tokens), step):
        part = tokens[: begin + step]
        for layer, cache in enumerate(flatten_caches(prompt_cache)):
            if isinstance(cache, ArraysCache):
                for i in range(len(cache.cache)):
                    cache[i] = mx.array(draw(part, f"{layer}s{i}", 6)).reshape(1, 2, 3)
                continue
            if isinstance(cache, ChunkedKVCache):
                cache.maybe_trim_front()
            cache.update_and_fetch(*rows(part, begin, layer))
    return prompt_cache


def bits_of(held):
    """Return all that a prompt cache holds, by layer, name and position."""
    found = {}
    for layer, arrays in enumerate(held):
        for name, (array, begin) in arrays.items():
            if name == "index":
                continue
            for i in range(array.shape[2]):
                row = mx.contiguous(array[0, :, i])
                found[layer, name, begin + i] = bytes(memoryview(row.view(mx.uint8)))
    return found


def trimmed(held, num_tokens):
    """Return what is held of the tokens before ``num_tokens``."""
    return {key: bits for key, bits in bits_of(held).items() if key[2] < num_tokens}


class StoreMachine(RuleBasedStateMachine):
    """Saves, extends, forks, trims, prunes and loads."""

    kind = "rows"

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        create_folder(self.folder / "store", BLOCK)
        self.store = kvstore.Store(self.folder / "store", codec="planes+zstd")
        self.live = [([], None)]
        self.named = {}

    def teardown(self):
        """Remove the store."""
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(
        which=st.integers(0, 9),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        step=st.sampled_from([1, 5, 16, 40]),
    )
    def extend(self, which, tokens, step):
        """A conversation goes on."""
        which %= len(self.live)
        old, cache = self.live[which]
        new = old + tokens
        cache = feed(cache or MAKERS[self.kind](), new, len(old), step)
        self.live[which] = (new, cache)

    @rule(which=st.integers(0, 9), name=st.sampled_from("abcd"))
    def save(self, which, name):
        """A conversation is saved, under a name of its own."""
        tokens, cache = self.live[which % len(self.live)]
        if tokens:
            self.store.save(tokens, cache, MODEL, name=name, replace=True)
            self.named[name] = list(tokens)

    @rule(which=st.integers(0, 9))
    def save_blocks(self, which):
        """A growing conversation is stored without a name."""
        tokens, cache = self.live[which % len(self.live)]
        if tokens:
            self.store.save_blocks(tokens, cache, MODEL)

    @precondition(lambda self: self.named)
    @rule(data=st.data(), cut=st.integers(0, 40), tail=st.lists(st.integers(0, 2)))
    def load(self, data, cut, tail):
        """A prompt that shares a prefix with something saved is restored."""
        base = self.named[data.draw(st.sampled_from(sorted(self.named)))]
        prompt = [*base[: max(0, len(base) - cut)], *tail, 1]
        like = MAKERS[self.kind]()
        cache, rest = self.store.load(prompt, MODEL, like=like)
        assert rest
        assert rest == prompt[len(prompt) - len(rest) :]
        if cache is not None:
            self.check(cache, prompt[: len(prompt) - len(rest)])
            self.live.append((prompt[: len(prompt) - len(rest)], cache))
            self.live = self.live[-6:]

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def load_entry(self, data):
        """What was saved under a name comes back whole."""
        name = data.draw(st.sampled_from(sorted(self.named)))
        cache, tokens = self.store.load_entry(name, MODEL)
        assert tokens == self.named[name]
        self.check(cache, tokens)

    @rule(which=st.integers(0, 9), count=st.integers(1, 12))
    def trim(self, which, count):
        """A conversation takes back its last tokens, where its caches can."""
        tokens, cache = self.live[which % len(self.live)]
        # mlx-lm's ConcatenateKVCache forgets a trim when it next grows.
        if len(tokens) <= count or self.kind not in ("rows", "codes"):
            return
        for layer in cache:
            layer.trim(count)
        self.live[which % len(self.live)] = (tokens[:-count], cache)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def remove(self, data):
        """A name is given up."""
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.store.remove(name)
        del self.named[name]

    @rule(now=st.booleans())
    def prune(self, now):
        """What no name reaches is freed."""
        self.store.plan_prune(now=now).execute()

    @rule()
    def reopen(self):
        """Another process goes on."""
        self.store.close()
        self.store = kvstore.Store(self.folder / "store", codec="planes+zstd")

    @invariant()
    def names_are_those_that_were_saved(self):
        """The store lists exactly what has a name."""
        names = {entry.name: entry.num_tokens for entry in self.store.entries()}
        assert names == {name: len(tokens) for name, tokens in self.named.items()}

    def check(self, cache, tokens):
        """Compare a restored cache with one that was never stored."""
        fresh = feed(MAKERS[self.kind](), tokens, 0, len(tokens))
        restored, expected = trimmed(hold(cache), len(tokens)), bits_of(hold(fresh))
        assert restored
        assert restored.keys() <= expected.keys()
        assert restored == {key: expected[key] for key in restored}
        for layer in flatten_caches(cache):
            if hasattr(layer, "offset"):
                assert layer.offset == len(tokens)
            if isinstance(layer, RotatingKVCache):
                assert layer.keys.shape[2] >= min(len(tokens), WINDOW)


@pytest.mark.parametrize("kind", MAKERS)
def test_random_use_agrees_with_a_plain_model(kind):
    """Whatever is done to a store, what it restores is what was computed."""

    class Machine(StoreMachine):
        pass

    Machine.kind = kind
    Machine.TestCase.settings = settings(
        max_examples=12, stateful_step_count=25, deadline=None
    )
    Machine.TestCase().runTest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_long_random_use_agrees_with_a_plain_model(kind):
    """The same, for minutes."""

    class Machine(StoreMachine):
        pass

    Machine.kind = kind
    Machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=60, deadline=None
    )
    Machine.TestCase().runTest()
