"""A cache of codes behaves as mlx-lm's own, and is as small as its codes."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

from kvstore.codecs import Rows, get_codec
from turboquant import dequantize_polar, make_wh_rotation, quantize_polar
from turboquant.kv_cache import (
    BLOCK,
    NUM_SINKS,
    TurboQuantKVCache,
    parse_kv_bits,
    quantize_prompt_cache,
)

DIM = 64


class RoundedKVCache(KVCache):
    """mlx-lm's cache, of whose rows all whole blocks but the newest are rounded."""

    def __init__(self, key_bits, value_bits):
        super().__init__()
        self.rounding = (key_bits, value_bits)
        self.num_rounded = 0

    def update_and_fetch(self, keys, values):
        """Append rows, return them as they are, and round."""
        found = super().update_and_fetch(keys, values)
        while self.offset - self.num_rounded > BLOCK:
            block = slice(self.num_rounded, self.num_rounded + BLOCK)
            for side, bits in zip(("keys", "values"), self.rounding, strict=True):
                rows = getattr(self, side)
                rows[:, :, block] = self._round(rows[:, :, block], bits, side)
            self.num_rounded += BLOCK
        return found

    def _round(self, rows, bits, side):
        sinks = 0 if self.num_rounded else NUM_SINKS
        rest = rows[:, :, sinks:].astype(mx.float32)
        mean = mx.mean(rest, axis=2, keepdims=True).astype(mx.float16)
        mean = mean if side == "keys" else mx.zeros_like(mean)
        rotation = make_wh_rotation(rows.shape[-1])
        coded = quantize_polar(rest - mean, bits, rotation)
        kept = dequantize_polar(*coded, bits, rotation, dtype=rows.dtype, mean=mean)
        return mx.concatenate([rows[:, :, :sinks], kept], axis=2)


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
    prompt = [i * 7 % 200 for i in range(500)]
    coded = [TurboQuantKVCache(*bits) for _ in range(3)]
    decoded = [RoundedKVCache(*bits) for _ in range(3)]
    assert greedy(model, coded, prompt) == greedy(model, decoded, prompt)
    assert all(same(a, b) for a, b in zip(coded, decoded, strict=True))


def test_going_on_from_decoded_codes_gives_the_same_next_logits(model):
    """The next logits over codes are those over the codes decoded to a KVCache."""
    coded = quantize_prompt_cache(_prefilled(model, 300), "turbo4")
    decoded = [cache.to_kv_cache() for cache in coded]
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
    tokens = mx.arange(num_tokens)[None] % 200
    mx.eval(model(tokens, cache=prompt_cache))
    return prompt_cache


@pytest.mark.parametrize(("bits", "bytes_per_row"), [(4, 36), (3, 28), (2, 20)])
def test_memory_is_that_of_the_codes(bits, bytes_per_row):
    """Codes and norms, a mean of the keys per block, and the newest block as it is."""
    tokens, heads, blocks = 4096, 2, 15
    cache = filled(tokens, bits)
    exact = (BLOCK + NUM_SINKS) * DIM * 4 * 2 * heads
    coded = (blocks * BLOCK - NUM_SINKS) * bytes_per_row * 2 * heads
    assert cache.nbytes == exact + coded + blocks * DIM * 2 * heads


@pytest.mark.parametrize("heads", [1, 2])
def test_rows_that_were_coded_are_let_go_of(heads):
    """What is coded at once keeps none of the rows that it was made of."""
    mx.clear_cache()
    before = mx.get_active_memory()
    plain = KVCache()
    plain.update_and_fetch(*make_rows(4096, heads=heads))
    (coded,) = quantize_prompt_cache([plain], "turbo4")
    del plain
    assert mx.get_active_memory() - before < coded.nbytes + 100_000


@pytest.mark.parametrize("steps", [[600], [1] * 9, [3, 1, 252, 1, 1, 300], [4, 256, 1]])
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


@pytest.mark.parametrize("num_rows", [256, 257, 512, 600])
def test_whole_blocks_but_the_newest_are_those_of_the_store(num_rows):
    """Each is coded as a stored one; the sinks and the newest are exact."""
    codec = get_codec("turbo3").array
    keys, values = make_rows(num_rows)
    keys = keys + mx.arange(DIM)  # with a mean to take off
    cache = TurboQuantKVCache(3)
    cache.update_and_fetch(keys, values)
    coded = (num_rows - 1) // BLOCK * BLOCK
    pairs = zip("kv", (keys, values), cache.keys_and_values(), strict=True)
    for name, exact, found in pairs:
        assert mx.array_equal(found[:, :, coded:], exact[:, :, coded:]).item()
        assert mx.array_equal(found[:, :, :4], exact[:, :, :4]).item()
        for start in range(0, coded, BLOCK):
            block = np.array(exact[:, :, start : start + BLOCK])
            rows = Rows(name, start, block.shape, "F32")
            # The sinks of all layers, joined as they are where they are read.
            parts = {k: np.asarray(v) for k, v in codec.encode(block, rows).items()}
            stored = codec.decode(parts, rows)
            gap = mx.abs(found[:, :, start : start + BLOCK] - stored)
            assert mx.mean(gap).item() < 1e-5


def test_rows_are_exact_while_they_are_appended():
    """What one call appends, the same call returns as it came."""
    keys, values = make_rows(600)
    cache = TurboQuantKVCache(2)
    for exact, rows in zip(
        (keys, values), cache.update_and_fetch(keys, values), strict=True
    ):
        assert mx.array_equal(rows, exact).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_dtype_is_kept(dtype):
    """Rows come back in the dtype they came in; a 16-bit model stays one."""
    cache = TurboQuantKVCache(3)
    keys, values = cache.update_and_fetch(*make_rows(20, dtype=dtype))
    assert (keys.dtype, values.dtype) == (dtype, dtype)


@pytest.mark.parametrize("count", [0, 1, 43, 44, 45, 60, 295, 296, 297, 300, 400])
def test_trim_takes_back_the_last_rows(count):
    """After a trim, what is appended follows the rows that are left as they were."""
    cache, other = filled(300, 4), filled(300, 4)
    before = cache.keys_and_values()
    assert cache.trim(count) == min(count, 300)
    left = 300 - min(count, 300)
    assert (cache.offset, cache.size()) == (left, left)
    assert trim_prompt_cache([other], count) == min(count, 300)
    cache.update_and_fetch(*make_rows(20, seed=9))
    other.update_and_fetch(*make_rows(20, seed=9))
    assert same(cache, other)
    pairs = zip(cache.keys_and_values(), before, make_rows(20, seed=9), strict=True)
    for found, rows, new in pairs:
        assert mx.array_equal(found[:, :, :left], rows[:, :, :left]).item()
        # Behind a part of a coded block, rows are coded with its mean.
        limit = 0 if left >= BLOCK or left <= NUM_SINKS else 0.25
        error = mx.linalg.norm((found[:, :, left:] - new).flatten())
        assert error.item() <= limit * mx.linalg.norm(new.flatten()).item()


def test_a_shallow_copy_may_be_trimmed():
    """What is taken back from a copy stays in the original."""
    cache = filled(300, 4)
    other = copy.copy(cache)
    other.trim(200)
    other.update_and_fetch(*make_rows(5, seed=4))
    assert same(cache, filled(300, 4))


def test_state_round_trips():
    """A cache made from another's state goes on like it."""
    cache = filled(300, 5, 3)
    other = TurboQuantKVCache.from_state(cache.state)
    assert same(cache, other)
    more = make_rows(10, seed=4)
    cache.update_and_fetch(*more)
    other.update_and_fetch(*more)
    assert same(cache, other)


def test_a_copy_is_a_copy():
    """A deep copy does not follow its original."""
    cache = filled(300, 4)
    other = copy.deepcopy(cache)
    cache.update_and_fetch(*make_rows(10, seed=4))
    assert other.offset == 300
    assert same(other, filled(300, 4))


def test_an_empty_cache_is_empty():
    """A new cache has no rows and takes no bytes."""
    cache = TurboQuantKVCache(4)
    assert (cache.empty(), cache.offset, cache.nbytes) == (True, 0, 0)
    assert cache.to_kv_cache().empty()
    assert not hasattr(cache, "bits")


def test_caches_merge_to_a_batch():
    """A batch of caches holds each one's decoded rows, padded on the left."""
    caches = [filled(300, 4), filled(12, 4, seed=1)]
    batch = TurboQuantKVCache.merge(caches)
    for i, cache in enumerate(caches):
        assert same(batch.extract(i), cache)


def test_what_comes_out_of_a_batch_says_that_it_was_coded():
    """Also when others have joined the batch, and some have left it."""
    batch = TurboQuantKVCache.merge([filled(270, 4), filled(262, 6)])
    batch.extend(TurboQuantKVCache.merge([filled(259, 3)]))
    batch.extend(BatchKVCache.merge([filled(7, 8).to_kv_cache()]))
    batch = copy.copy(batch)
    batch.filter([1, 2])
    for number, num_rows in enumerate([262, 259]):
        cache = batch.extract(number)
        assert (cache.coded_tokens, cache.coded_bits) == (num_rows, 3)


def test_no_batch_of_mlx_lm_takes_decoded_rows_in_unmarked():
    """It is refused, before it has changed, whichever way they would come in."""
    plain, coded = KVCache(), filled(270, 3)
    plain.update_and_fetch(*filled(9, 8).keys_and_values())
    batch = BatchKVCache.merge([plain])
    with pytest.raises(AttributeError, match="a batch of codes has no `keys`"):
        batch.extend(TurboQuantKVCache.merge([coded]))
    with pytest.raises(AttributeError, match="no attribute 'keys'"):
        BatchKVCache.merge([plain, coded])
    assert batch.offset.tolist() == [9]
    mixed = TurboQuantKVCache.merge([coded, plain])
    assert mixed.extract(1).coded_bits == 3
    assert mixed.offset.tolist() == [270, 9]


def test_what_is_in_codes_is_not_quantized_again():
    """`mlx_lm.generate --kv-bits` leaves it as it is."""
    cache = filled(270, 3)
    assert cache.to_quantized(group_size=32, bits=8) is cache


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
