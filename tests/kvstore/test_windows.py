"""Windows and recurrent states: restored only where they are right, on real layers."""

import random
import shutil
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from kit import load_beside
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import kvstore
from kvstore.caches.restore import (
    DeviceRestoring,
    HostRestoring,
    KernelRestoring,
)
from kvstore.ops import load as loading

architectures = load_beside("architectures")
feed, go_on, bits = architectures.feed, architectures.go_on, architectures.bits

WINDOW, BLOCK, STEP = architectures.WINDOW, 16, 10
CAPPED = "qwen3 with max_kv_size"
WINDOWS = ("gemma3_text", "llama4", CAPPED)
STATES = ("falcon_h1", "mamba2", "jamba")
BOTH = ("recurrent_gemma", "baichuan_m1")

TOKENS = [(7 * i * i + 3 * i) % 113 for i in range(61)]
TURN = [(5 * i + 11) % 109 for i in range(9)]
MODEL = kvstore.Fingerprint({"weights": "tiny"}, "tiny")

windows = pytest.mark.parametrize("kind", WINDOWS)
states = pytest.mark.parametrize("kind", STATES)
kinds = pytest.mark.parametrize("kind", [*WINDOWS, "falcon_h1", "recurrent_gemma"])


@lru_cache
def model_of(kind):
    """Return a tiny model."""
    return architectures.make_model(kind.partition(" ")[0])


def empty_cache(kind):
    """Return an empty prompt cache of a model."""
    return make_prompt_cache(model_of(kind), WINDOW if kind == CAPPED else None)


def sizes_of(num_tokens, step):
    """Return the sizes of the pieces in which a prompt is fed."""
    whole, rest = divmod(num_tokens, step)
    return [step] * whole + [rest] * (rest > 0)


def prefilled(kind, tokens, step, after=None):
    """Return a prompt cache of some tokens, fed in steps, and the last logits."""
    cache, done = empty_cache(kind), 0
    for size in sizes_of(len(tokens), step):
        logits = feed(model_of(kind), cache, tokens[done : done + size])
        done += size
        if after:
            after(tokens[:done], cache)
    return cache, logits


def flat(prompt_cache):
    """Return all caches, those of a list one by one."""
    found = []
    for cache in prompt_cache:
        found += flat(cache.caches) if type(cache) is CacheList else [cache]
    return found


def first_cut(prompt_cache):
    """Return the first position at which the rows still there make a full window."""
    cuts = [0]
    for cache in flat(prompt_cache):
        if type(cache) is RotatingKVCache:
            dropped = cache.offset - min(cache.offset, cache.keys.shape[2])
            cuts.append(dropped + cache.max_size if dropped else 0)
        if type(cache) is ChunkedKVCache:
            dropped = cache.start_position
            cuts.append(dropped + cache.chunk_size if dropped else 0)
    return max(cuts)


def assert_full(prompt_cache, num_tokens):
    """Check that no layer has fewer rows than its model needs at this position."""
    for cache in flat(prompt_cache):
        if type(cache) is RotatingKVCache:
            assert cache.offset == num_tokens
            assert cache.keys.shape[2] >= min(num_tokens, cache.max_size)
        if type(cache) is ChunkedKVCache:
            assert cache.offset == num_tokens
            held = cache.offset - cache.start_position
            assert held >= min(num_tokens, cache.chunk_size)


def assert_goes_on(kind, prompt_cache, num_tokens, following, step=61):
    """Check what a cache gives after more tokens, against a run in steps as its own.

    The steps matter where a window keeps the first rows: mlx-lm counts these too.
    """
    alone, _ = prefilled(kind, TOKENS[:num_tokens], step)
    expected = feed(model_of(kind), alone, following)
    assert_full(prompt_cache, num_tokens)
    actual = feed(model_of(kind), prompt_cache, following)
    assert np.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [7, 24, 32, 61])
@pytest.mark.parametrize("step", [61, STEP, 1], ids=["whole", "in steps", "singly"])
@kinds
def test_two_turns_are_bit_equal(store_path, kind, step, num_tokens):
    """Logits behind a restored cache are those of a run that was not stored."""
    model, tokens = model_of(kind), TOKENS[:num_tokens]
    cache, logits = prefilled(kind, tokens, step)
    more, expected = go_on(model, cache, logits, 32)
    expected.append(feed(model, cache, TURN))
    expected += go_on(model, cache, expected[-1], 4)[1]

    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, logits = prefilled(
            kind, tokens, step, lambda t, c: store.save_blocks(t, c, MODEL)
        )
        store.save(tokens, cache, MODEL, name="x")
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, held = store.load_entry("x", MODEL)
        assert held == tokens
        assert_full(cache, num_tokens)
        again, actual = go_on(model, cache, logits, 32)
        assert again == more
        store.save([*tokens, *more], cache, MODEL, name="x")
    with kvstore.Store(store_path) as store:
        cache, rest = store.load([*tokens, *more, *TURN], MODEL)
    assert rest == TURN
    actual.append(feed(model, cache, TURN))
    actual += go_on(model, cache, actual[-1], 4)[1]
    assert bits(actual) == bits(expected)


@pytest.mark.parametrize("step", [61, 1])
@kinds
def test_what_decodes_on_a_device_decodes_the_same(
    store_path, monkeypatch, launch, as_gpu, kind, step
):
    """Restoring on MLX's device gives the bits that restoring in NumPy gives."""
    as_gpu(launch)
    cache, _ = prefilled(kind, TOKENS, step)
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS, cache, MODEL, name="x")
        restored = [cache]
        for way in (HostRestoring, DeviceRestoring, KernelRestoring):
            monkeypatch.setattr(loading, "start_restoring", way)
            restored.append(store.load_entry("x", MODEL)[0])
    logits = [feed(model_of(kind), each, TURN) for each in restored]
    assert len(set(bits(logits))) == 1


@pytest.mark.parametrize("step", [61, 40, 1])
@windows
def test_a_window_is_restorable_as_far_as_its_rows_were_there(store_path, kind, step):
    """After one save at the end, a hit ends where a full window of rows was held."""
    cache, _ = prefilled(kind, TOKENS, step)
    cut = first_cut(cache)
    assert cut == {61: 0, 40: 40 if kind == "llama4" else 41}.get(
        step, 60 if kind == "llama4" else 61
    )
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS, cache, MODEL)
        for at in range(1, 61):
            match = store.lookup([*TOKENS[:at], -5], MODEL)
            assert match.num_tokens == (at if at >= cut else 0)
            assert (match.reason == "checkpoint") == (at < cut)
        for at in {max(cut, 1), 48, 60} & set(range(cut, 61)):
            restored, rest = store.load([*TOKENS[:at], *TURN], MODEL)
            assert rest == TURN
            assert_goes_on(kind, restored, at, TURN, step)
        if cut > 1:
            prompt = [*TOKENS[: cut - 1], *TURN]
            assert store.load(prompt, MODEL) == (None, prompt)


@pytest.mark.parametrize("at", [5, 16, 20, 33, 40, 47, 60])
@windows
def test_a_window_is_restorable_wherever_its_rows_were_captured(store_path, kind, at):
    """Saved as it grows, a prompt is restorable at every token, at the right rows."""
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(
            kind, TOKENS, STEP, lambda t, c: store.save_blocks(t, c, MODEL)
        )
        store.save(TOKENS, cache, MODEL)
        for num_tokens in range(1, 61):
            match = store.lookup([*TOKENS[:num_tokens], -5], MODEL)
            assert (match.num_tokens, match.reason) == (num_tokens, "whole")
        restored, _ = store.load([*TOKENS[:at], *TURN], MODEL)
    assert_goes_on(kind, restored, at, TURN, STEP)


@windows
def test_a_window_that_wrapped_in_place_stays_rolled(store_path, kind):
    """Restored where it was saved, a window has its write position; nowhere before."""
    cache, _ = prefilled(kind, TOKENS, 1)
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS, cache, MODEL)
        restored, _ = store.load([*TOKENS, *TURN], MODEL)
    for old, new in zip(cache, restored, strict=True):
        if type(old) is RotatingKVCache:
            assert old._idx < old.offset
            assert (old._idx, old.offset) == (new._idx, new.offset)
            assert bits([old.keys, old.values]) == bits([new.keys, new.values])


@pytest.mark.parametrize("kind", [*STATES, *BOTH])
def test_a_state_is_restorable_only_where_it_was_saved(store_path, kind):
    """A hit ends at the last checkpoint, also where that lies inside a block."""
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(
            kind, TOKENS, STEP, lambda t, c: store.save_blocks(t, c, MODEL)
        )
        store.save(TOKENS, cache, MODEL)
        for at in range(1, 62):
            checkpoint = 61 if at == 61 else at // STEP * STEP
            match = store.lookup([*TOKENS[:at], -5], MODEL)
            assert match.num_tokens == checkpoint
            assert match.reason == ("whole" if at == checkpoint else "checkpoint")
            # One token is left over for the model to be fed.
            match = store.lookup(TOKENS[:at], MODEL)
            assert match.num_tokens == (at - 1) // STEP * STEP
        for at in (10, 39, 40, 59, 61):
            restored, rest = store.load([*TOKENS[:at], *TURN], MODEL)
            num_tokens = 61 if at == 61 else at // STEP * STEP
            assert rest == [*TOKENS[num_tokens:at], *TURN]
            assert_goes_on(kind, restored, num_tokens, rest)


@states
def test_without_checkpoints_only_the_end_is_restorable(store_path, kind):
    """A state that was not captured is never cut out of a later one."""
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(
            kind,
            TOKENS,
            BLOCK,
            lambda t, c: store.save_blocks(t, c, MODEL, checkpoint=False),
        )
        store.save(TOKENS, cache, MODEL)
        for at in range(1, 61):
            prompt = [*TOKENS[:at], -5]
            match = store.lookup(prompt, MODEL)
            assert (match.num_tokens, match.reason) == (0, "checkpoint")
            assert "the last checkpoint before is at 0" in match.detail
            assert store.load(prompt, MODEL) == (None, prompt)
        assert store.lookup([*TOKENS, -5], MODEL).num_tokens == 61


@states
def test_a_turn_can_be_taken_back(store_path, kind):
    """After a second turn, the end of the first is a checkpoint still."""
    first, second = TOKENS[:40], TOKENS
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(kind, first, 40)
        store.save(first, cache, MODEL, name="x")
        feed(model_of(kind), cache, second[40:])
        store.save(second, cache, MODEL, name="x")
        for prompt in ([*first, *TURN], [*second[:50], *TURN], second):
            restored, rest = store.load(prompt, MODEL)
            assert rest == prompt[40:]
            assert_goes_on(kind, restored, 40, rest)


@pytest.mark.parametrize("window", [8, 24])
def test_a_checkpoint_outlives_a_copy_with_more_rows(store_path, window):
    """A block that has a state keeps it when the same block comes with more rows."""
    model = architectures.make_model("recurrent_gemma", attention_window_size=window)
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache = make_prompt_cache(model)
        feed(model, cache, TOKENS[:32], *[1] * 32)
        store.save(TOKENS[:32], cache, MODEL, name="short")
        longer = make_prompt_cache(model)
        feed(model, longer, TOKENS)
        store.save(TOKENS, longer, MODEL, name="long")
        short, _ = store.load_entry("short", MODEL)
        long, _ = store.load_entry("long", MODEL)
    assert bits([feed(model, short, TURN)]) == bits([feed(model, cache, TURN)])
    assert bits([feed(model, long, TURN)]) == bits([feed(model, longer, TURN)])


def test_windows_of_two_sizes_are_each_complete(store_path):
    """A block keeps the rows of the smaller window when it comes with none of them."""
    models = [
        architectures.make_model("gemma3_text", sliding_window=window)
        for window in (8, 40)
    ]
    parts = (slice(0, 4), slice(4, 8))

    def run(num_tokens, step):
        cache = [c for model in models for c in make_prompt_cache(model)]
        for model, part in zip(models, parts, strict=True):
            feed(model, cache[part], TOKENS[:num_tokens], *sizes_of(num_tokens, step))
        return cache

    def answers(cache):
        pairs = zip(models, parts, strict=True)
        return [feed(model, cache[part], TURN) for model, part in pairs]

    with kvstore.Store(store_path, "planes+zstd") as store:
        short, long = run(48, 1), run(61, 1)
        store.save(TOKENS[:48], short, MODEL, name="short")
        store.save(TOKENS, long, MODEL, name="long")
        for name, cache in (("short", short), ("long", long)):
            restored, _ = store.load_entry(name, MODEL)
            assert bits(answers(restored)) == bits(answers(cache))
        # What has more rows of the larger window only is written too.
        assert store.lookup([*TOKENS[:53], -5], MODEL).num_tokens == 48
        store.save(TOKENS, run(61, 40), MODEL, name="long")
        restored, _ = store.load([*TOKENS[:53], *TURN], MODEL)
    expected = answers(run(53, 40))
    for actual, logits in zip(answers(restored), expected, strict=True):
        assert np.allclose(actual, logits, atol=1e-4)


def test_an_entry_without_its_state_is_refused(tmp_path, store_path):
    """An entry whose state is missing is an error, never an empty state."""
    other_path = shutil.copytree(store_path, tmp_path / "other")
    cache, _ = prefilled("falcon_h1", TOKENS[:48], 48)
    with kvstore.Store(other_path, "planes+zstd") as store:
        store.save_blocks(TOKENS[:48], cache, MODEL, checkpoint=False)
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS[:48], cache, MODEL, name="x")
    for path in store_path.glob("entries/*.json"):
        shutil.copy(path, other_path / "entries")
    with (
        kvstore.Store(other_path) as store,
        pytest.raises(kvstore.IntegrityError, match="a state or rows of a window"),
    ):
        store.load_entry("x", MODEL)


def test_bytes_grow_with_tokens_and_not_with_the_window(store_path):
    """Each step of a growing prompt adds the bytes of its own rows, once."""
    prompt = [(11 * i * i + i) % 113 for i in range(1024)]
    cache = empty_cache("gemma3_text")
    per_token = sum(2 * 2 * 16 * 4 for _ in cache)  # sides, heads, dimension, bytes
    step, sizes = 64, [0]
    with kvstore.Store(store_path, "raw") as store:
        for stop in range(step, 1025, step):
            feed(model_of("gemma3_text"), cache, prompt[stop - step : stop])
            store.save(prompt[:stop], cache, MODEL, name="x")
            sizes.append(store.stats().nbytes)
    growth = np.diff(sizes)
    headers = 4 * 2_500  # of four blocks
    assert step * per_token <= growth.min()
    assert growth.max() <= step * per_token + headers


def test_bytes_of_states_grow_with_the_checkpoints(tmp_path, store_path):
    """A checkpoint costs one state, whatever the tokens before it."""
    prompt = [(11 * i * i + i) % 113 for i in range(512)]
    state = 0
    sizes = {}
    for step in (64, 512):
        path = shutil.copytree(store_path, tmp_path / f"every {step}")
        with kvstore.Store(path, "raw") as store:

            def save(tokens, cache, store=store, step=step):
                at_stride = len(tokens) % step == 0
                store.save_blocks(tokens, cache, MODEL, checkpoint=at_stride)

            cache, _ = prefilled("falcon_h1", prompt, 64, save)
            sizes[step] = store.stats().nbytes
        state = sum(c.nbytes for c in flat(cache) if type(c) is ArraysCache)
    assert 7 * state <= sizes[64] - sizes[512] <= 7 * (state + 2_500)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama4", "falcon_h1"])
def test_damage_gives_right_rows_or_a_miss(tmp_path, store_path, flip_bit, kind):
    """Wherever a bit flips in a shard, a load is right as far as it goes."""
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(
            kind, TOKENS, STEP, lambda t, c: store.save_blocks(t, c, MODEL)
        )
        store.save(TOKENS, cache, MODEL, name="x")
    shards = sorted(path.relative_to(store_path) for path in store_path.glob("*/??/*"))
    chosen, found = random.Random(5), set()
    for number in range(24):
        path = shutil.copytree(store_path, tmp_path / f"{number}")
        shard = path / chosen.choice(shards)
        # Most of a small shard is its header; half of the flips go behind it.
        size = shard.stat().st_size * 8
        header = int.from_bytes(shard.read_bytes()[:8], "little") * 8
        flip_bit(shard, chosen.randrange(header if number % 2 else 0, size))
        with kvstore.Store(path) as store:
            restored, rest = store.load([*TOKENS, *TURN], MODEL)
        num_tokens = 70 - len(rest)
        found.add(num_tokens)
        if restored is not None:
            assert_goes_on(kind, restored, num_tokens, rest)
        shutil.rmtree(path)
    assert len(found) > 1
    assert max(found) < 61 or 61 in found


@kinds
def test_forks_share_blocks_and_give_their_own_tokens(store_path, kind):
    """Two continuations of one prefix store it once, and each restores only itself."""
    prefix, model = TOKENS[:32], model_of(kind)
    ways = {"a": [3, 1, 4, 1, 5, 9, 2, 6] * 3, "b": [2, 7, 1, 8, 2, 8] * 4}
    with kvstore.Store(store_path, "planes+zstd") as store:
        cache, _ = prefilled(kind, prefix, 32)
        store.save_blocks(prefix, cache, MODEL)
        for name, way in ways.items():
            forked, rest = store.load([*prefix, *way], MODEL)
            assert rest == way
            feed(model, forked, way)
            store.save([*prefix, *way], forked, MODEL, name=name)
        chains = [[p.hash for p, _ in store.chain(name)] for name in ways]
        shared = set(chains[0]) & set(chains[1])
        assert [len(chain) for chain in chains] == [4, 4]
        assert shared == set(chains[0][:2])
        for name, way in ways.items():
            restored, held = store.load_entry(name, MODEL)
            assert held == [*prefix, *way]
            alone, _ = prefilled(kind, prefix, 32)
            feed(model, alone, way)
            expected, actual = feed(model, alone, TURN), feed(model, restored, TURN)
            assert bits([actual]) == bits([expected])


def test_missing_states_and_empty_layers_stay_so(store_path):
    """A state that is None and a layer that is unused come back as they were."""

    def filled(cache, num_rows=20):
        rows = mx.random.normal((2, 1, 2, num_rows, 16), key=mx.random.key(1))
        cache.update_and_fetch(rows[0], rows[1])
        return cache

    partly = ArraysCache(3)
    partly[1] = mx.arange(24).reshape(1, 2, 3, 4)
    before = [
        filled(KVCache()),
        KVCache(),
        RotatingKVCache(8),
        filled(RotatingKVCache(8, keep=4)),
        ChunkedKVCache(8),
        ArraysCache(2),
        partly,
        CacheList(ArraysCache(1), filled(RotatingKVCache(8)), KVCache()),
        CacheList(CacheList(filled(ChunkedKVCache(8)))),
    ]
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(list(range(20)), before, MODEL, name="x")
        after, _ = store.load_entry("x", MODEL)
    for old, new in zip(flat(before), flat(after), strict=True):
        assert type(old) is type(new)
        assert old.empty() == new.empty()
    assert after[6].cache[::2] == [None, None]
    assert bits(after[6].cache[1:2]) == bits(partly.cache[1:2])
    assert after[6].cache[1].shape == (1, 2, 3, 4)
    for old, new in zip(flat(before), flat(after), strict=True):
        if not old.empty() and type(old) is not ArraysCache:
            for cache in (old, new):
                if type(cache) is ChunkedKVCache:
                    cache.maybe_trim_front()  # as its model does
                filled(cache, 1)
            assert bits(old.keys_and_values()) == bits(new.keys_and_values())
    assert (after[2].max_size, after[3].keep, after[4].chunk_size) == (8, 4, 8)


def test_a_draft_model_is_stored_behind_its_model(store_path):
    """The caches of two models, one list, go on bit-equal in both."""
    pair = ("gemma3_text", "falcon_h1")

    def run(kind, cache):
        _, seen = go_on(model_of(kind), cache, feed(model_of(kind), cache, TURN), 4)
        return bits(seen)

    cache = [c for kind in pair for c in prefilled(kind, TOKENS, 40)[0]]
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS, cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert len(restored) == len(cache) == 8
    for kind, part in zip(pair, (slice(0, 4), slice(4, 8)), strict=True):
        assert run(kind, restored[part]) == run(kind, cache[part])


def test_a_cache_may_be_quantized_later(store_path):
    """Rows saved before, and codes after, are each restored as what they were."""
    model = architectures.make_model("qwen3", head_dim=32)
    cache = make_prompt_cache(model)
    feed(model, cache, TOKENS[:40])
    like = make_prompt_cache(model)
    with kvstore.Store(store_path, "planes+zstd") as store:
        store.save(TOKENS[:40], cache, MODEL, name="early")
        cache = [c.to_quantized(group_size=32, bits=8) for c in cache]
        feed(model, cache, TOKENS[40:])
        store.save(TOKENS, cache, MODEL, name="late")
        late, _ = store.load([*TOKENS, *TURN], MODEL, like=cache)
        assert [type(c) for c in late] == [QuantizedKVCache] * 4
        assert bits([feed(model, late, TURN)]) == bits([feed(model, cache, TURN)])
        early, rest = store.load([*TOKENS, *TURN], MODEL, like=like)
        assert ([type(c) for c in early], len(rest)) == ([KVCache] * 4, 30)


def test_windows_and_states_stay_exact_under_a_lossy_codec(store_path):
    """A lossy codec takes the rows of a `KVCache`, and nothing else."""
    kind = "gemma3_text"
    cache, _ = prefilled(kind, TOKENS, 40)
    with kvstore.Store(store_path, "turbo4+zstd") as store:
        store.save(TOKENS, cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    for old, new in zip(cache, restored, strict=True):
        kept = old.keys[:, :, -WINDOW:] if type(old) is RotatingKVCache else old.keys
        same = bits([kept[:, :, :WINDOW]]) == bits([new.keys[:, :, :WINDOW]])
        assert same == (type(old) is RotatingKVCache)
