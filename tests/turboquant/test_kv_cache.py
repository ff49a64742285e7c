"""A cache of codes behaves as mlx-lm's own, and is as small as its codes."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

from turboquant import dequantize_polar, make_wh_rotation, quantize_polar
from turboquant.kv_cache import (
    TurboQuantKVCache,
    parse_kv_bits,
    quantize_prompt_cache,
)

DIM = 64


class RoundedKVCache(KVCache):
    """mlx-lm's cache, of rows that went through the codec one by one."""

    def __init__(self, key_bits, value_bits):
        super().__init__()
        self.rounding = (key_bits, value_bits)

    def update_and_fetch(self, keys, values):
        """Append what the codec makes of the rows."""
        sinks = max(0, min(4 - self.offset, keys.shape[2]))
        rows = [
            mx.concatenate([x[:, :, :sinks], self._round(x[:, :, sinks:], bits)], 2)
            for x, bits in zip((keys, values), self.rounding, strict=True)
        ]
        return super().update_and_fetch(*rows)

    def _round(self, x, bits):
        if not x.shape[2]:
            return x
        rotation = make_wh_rotation(x.shape[-1])
        coded = quantize_polar(x, bits, rotation)
        return dequantize_polar(*coded, bits, rotation, dtype=x.dtype)


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with random weights and grouped heads."""
    mx.random.seed(3)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=128,
            num_hidden_layers=3,
            intermediate_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=DIM,
            rms_norm_eps=1e-5,
            vocab_size=200,
        )
    )
    mx.eval(model.parameters())
    return model


def make_rows(num_tokens, seed=0, *, heads=2, dtype=mx.float32):
    """Return random keys and values."""
    key = mx.random.key(seed)
    shape = (2, 1, heads, num_tokens, DIM)
    keys, values = mx.random.normal(shape, key=key).astype(dtype)
    return keys, values


def filled(num_tokens, *bits, seed=0):
    """Return a cache of codes over random rows."""
    cache = TurboQuantKVCache(*bits)
    cache.update_and_fetch(*make_rows(num_tokens, seed))
    return cache


def keys_and_values(cache):
    """Return the rows of a cache; mlx-lm 0.31 has no method for it."""
    if isinstance(cache, TurboQuantKVCache):
        return cache.keys_and_values()
    return [side[:, :, : cache.offset] for side in (cache.keys, cache.values)]


def same(left, right):
    """Say whether two caches hold the same rows, bit for bit."""
    pairs = zip(keys_and_values(left), keys_and_values(right), strict=True)
    return all(mx.array_equal(a, b).item() for a, b in pairs)


def greedy(model, prompt_cache, tokens, count=24):
    """Return greedily generated tokens."""
    steps = generate_step(
        mx.array(tokens), model, max_tokens=count, prompt_cache=prompt_cache
    )
    return [token for token, _ in steps]


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (5, 3)])
def test_generation_is_that_of_the_decoded_codes(model, bits):
    """Greedy text is that of a KVCache over rows that went through the codec."""
    prompt = [i * 7 % 200 for i in range(300)]
    coded = [TurboQuantKVCache(*bits) for _ in range(3)]
    decoded = [RoundedKVCache(*bits) for _ in range(3)]
    assert greedy(model, coded, prompt) == greedy(model, decoded, prompt)
    assert all(same(a, b) for a, b in zip(coded, decoded, strict=True))


def test_going_on_from_decoded_codes_gives_the_same_next_logits(model):
    """The next logits over codes are those over the codes decoded to a KVCache."""
    coded = quantize_prompt_cache(_prefilled(model, 200), "turbo4")
    decoded = [cache.to_kv_cache() for cache in coded]
    # The row that is fed is exact in the one and coded in the other.
    rows = [keys_and_values(cache) for cache in decoded]
    assert all(
        mx.array_equal(a, b).item()
        for cache, pair in zip(coded, rows, strict=True)
        for a, b in zip(cache.keys_and_values(), pair, strict=True)
    )
    logits = [model(mx.array([[5]]), cache=cache)[0, -1] for cache in (coded, decoded)]
    assert mx.abs(logits[0] - logits[1]).max().item() < 0.05


def _prefilled(model, num_tokens):
    prompt_cache = make_prompt_cache(model)
    mx.eval(model(mx.array([list(range(num_tokens))]), cache=prompt_cache))
    return prompt_cache


@pytest.mark.parametrize(("bits", "bytes_per_row"), [(4, 36), (3, 28), (2, 20)])
def test_memory_is_that_of_the_codes(bits, bytes_per_row):
    """A token takes its codes and norms in memory, within 3 per cent."""
    tokens = 4096
    cache = filled(tokens, bits)
    codes = tokens * 2 * 2 * bytes_per_row
    assert cache.nbytes == pytest.approx(codes, rel=0.03)
    kept = filled(tokens, bits).to_kv_cache()
    assert kept.nbytes / cache.nbytes > 6.5


@pytest.mark.parametrize("steps", [[300], [1] * 9, [3, 1, 252, 1, 1, 40], [4, 256, 1]])
def test_rows_are_coded_once_however_they_come(steps):
    """Rows appended in any portions are those appended in one."""
    keys, values = make_rows(sum(steps))
    cache = TurboQuantKVCache(4)
    start = 0
    for step in steps:
        stop = start + step
        cache.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        start = stop
    whole = TurboQuantKVCache(4)
    whole.update_and_fetch(keys, values)
    assert cache.offset == sum(steps)
    assert same(cache, whole)


def test_the_first_four_tokens_are_exact():
    """The attention sinks keep every bit."""
    keys, values = make_rows(10)
    cache = TurboQuantKVCache(2)
    got = cache.update_and_fetch(keys, values)
    for exact, rows in zip((keys, values), got, strict=True):
        assert mx.array_equal(rows[:, :, :4], exact[:, :, :4]).item()
        assert not mx.array_equal(rows[:, :, 4:], exact[:, :, 4:]).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_dtype_is_kept(dtype):
    """Rows come back in the dtype they came in; a 16-bit model stays one."""
    cache = TurboQuantKVCache(3)
    keys, values = cache.update_and_fetch(*make_rows(20, dtype=dtype))
    assert (keys.dtype, values.dtype) == (dtype, dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 297, 298, 300, 400])
def test_trim_takes_back_the_last_rows(count):
    """After a trim, what is appended follows the rows that are left."""
    cache, other = filled(300, 4), filled(300, 4)
    assert cache.trim(count) == min(count, 300)
    left = 300 - min(count, 300)
    assert (cache.offset, cache.size()) == (left, left)
    assert trim_prompt_cache([other], count) == min(count, 300)
    keys, values = make_rows(300)
    new_keys, new_values = make_rows(20, seed=9)
    got = cache.update_and_fetch(new_keys, new_values)
    fresh = TurboQuantKVCache(4)
    expected = fresh.update_and_fetch(
        mx.concatenate([keys[:, :, :left], new_keys], axis=2),
        mx.concatenate([values[:, :, :left], new_values], axis=2),
    )
    assert all(mx.array_equal(a, b).item() for a, b in zip(got, expected, strict=True))


def test_state_round_trips():
    """A cache made from another's state goes on like it."""
    cache = filled(50, 5, 3)
    other = TurboQuantKVCache.from_state(cache.state)
    assert same(cache, other)
    more = make_rows(10, seed=4)
    cache.update_and_fetch(*more)
    other.update_and_fetch(*more)
    assert same(cache, other)


def test_a_copy_is_a_copy():
    """A deep copy does not follow its original."""
    cache = filled(50, 4)
    other = copy.deepcopy(cache)
    cache.update_and_fetch(*make_rows(10, seed=4))
    assert other.offset == 50
    assert same(other, filled(50, 4))


def test_an_empty_cache_is_empty():
    """A new cache has no rows and takes no bytes."""
    cache = TurboQuantKVCache(4)
    assert (cache.empty(), cache.offset, cache.nbytes) == (True, 0, 0)
    assert cache.to_kv_cache().empty()
    assert not hasattr(cache, "bits")


def test_caches_merge_to_a_batch():
    """A batch of caches holds each one's decoded rows, padded on the left."""
    caches = [filled(20, 4), filled(12, 4, seed=1)]
    batch = TurboQuantKVCache.merge(caches)
    for i, cache in enumerate(caches):
        assert same(batch.extract(i), cache)


def test_what_comes_out_of_a_batch_says_that_it_was_coded():
    """Also when others have joined the batch, and some have left it."""
    batch = TurboQuantKVCache.merge([filled(20, 4), filled(12, 6)])
    batch.extend(TurboQuantKVCache.merge([filled(9, 3)]))
    batch.extend(BatchKVCache.merge([filled(7, 8).to_kv_cache()]))
    batch = copy.copy(batch)
    batch.filter([1, 2])
    for number, num_rows in enumerate([12, 9]):
        cache = batch.extract(number)
        assert (cache.coded_tokens, cache.coded_bits) == (num_rows, 3)


def test_masks_are_those_of_mlx_lm():
    """A cache of codes asks for the same mask as a KVCache of as many rows."""
    cache = filled(20, 4)
    plain = cache.to_kv_cache()
    assert cache.make_mask(1) == plain.make_mask(
        1, return_array=False, window_size=None
    )
    assert cache.make_mask(5) == "causal"
    ours = cache.make_mask(5, return_array=True, window_size=8)
    theirs = plain.make_mask(5, return_array=True, window_size=8)
    assert mx.array_equal(ours, theirs).item()


def test_quantizing_leaves_what_went_in(model):
    """The caches that are quantized still hold their own rows."""
    prompt_cache = _prefilled(model, 40)
    before = [keys_and_values(cache) for cache in prompt_cache]
    other = object()
    with pytest.raises(AttributeError):
        quantize_prompt_cache([*prompt_cache, other], "turbo3")
    coded = quantize_prompt_cache(prompt_cache, "turbo3v2")
    assert [type(cache) for cache in prompt_cache] == [KVCache] * 3
    assert [type(cache) for cache in coded] == [TurboQuantKVCache] * 3
    for cache, rows in zip(prompt_cache, before, strict=True):
        for a, b in zip(keys_and_values(cache), rows, strict=True):
            assert mx.array_equal(a, b).item()


@pytest.mark.parametrize(
    ("mode", "bits"), [("turbo3", (3, 3)), ("turbo5v3", (5, 3)), ("turbo8", (8, 8))]
)
def test_modes_name_bits(mode, bits):
    """A mode names the bits of keys and of values."""
    assert parse_kv_bits(mode) == bits


@pytest.mark.parametrize(
    "mode", ["turbo", "turbo9", "turbo0", "4", "turbo4v", "TURBO4"]
)
def test_other_modes_are_refused(mode):
    """What names no width is refused."""
    with pytest.raises(ValueError, match="not a mode"):
        parse_kv_bits(mode)
