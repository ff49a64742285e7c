"""Every architecture goes on from the store as if it had never been stored."""

import importlib
import importlib.util

import mlx.core as mx
import numpy as np
import pytest
from kit import load_beside
from mlx_lm.models.cache import CacheList, make_prompt_cache

import kvstore
from kvstore.caches.fit import feed, shapes_of
from kvstore.storage.folder import create_folder

architectures = load_beside("architectures")
CANNOT = {*architectures.CANNOT_RUN, *architectures.CANNOT_STORE}
COVERED = [name for name in architectures.names() if name not in CANNOT]
# One of each make of prompt cache; the others are slow only by their number.
MAKES = (
    "baichuan_m1",  # CacheList of ArraysCache and RotatingKVCache
    "deepseek_v3",  # latent attention: keys and values differ in dimension
    "deepseek_v32",  # CacheList of two KVCache
    "falcon_h1",  # CacheList of ArraysCache and KVCache
    "gemma3_text",  # RotatingKVCache and KVCache
    "gemma3n",  # fewer caches than layers
    "hunyuan",  # caches that stay empty
    "iquestloopcoder",  # more caches than layers
    "jamba",  # ArraysCache and KVCache
    "llama4",  # ChunkedKVCache and KVCache
    "longcat_flash_ngram",  # tokens as a state
    "mamba2",  # ArraysCache only
    "minimax_m3_vl",  # CacheLists of one and of two, values of no dimension
    "nemotron-nas",  # a layer without a cache, and a cache that stays empty
    "recurrent_gemma",  # ArraysCache and RotatingKVCache
    "rwkv7",  # ArraysCache of three
    "smollm3",  # KVCache only
)
# Smooth ones: where experts or rows are picked by score, a pick between two random ones
# may flip, which costs that token up to 0.1 nats, while the median stays below 0.0005.
SMOOTH = (
    "afm7",
    "cohere2",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "hunyuan_v1_dense",
    "iquestloopcoder",
    "lfm2",
    "llama",
    "minicpm3",
    "nemotron-nas",
    "olmo_hybrid",
    "phi3",
    "qwen3",
    "qwen3_5",
    "smollm3",
)

PROMPT = [(7 * i * i + 3 * i) % 113 for i in range(100)]
TURN = [(5 * i + 11) % 109 for i in range(9)]
# Pieces of a prompt: below, at and beyond the window, at and off the end of a block.
PIECES = [(7,), (16,), (24,), (32,), (23, 2), (40, 24)]


def mostly_slow(names):
    """Return parameters of which those not in ``MAKES`` are slow."""
    return [
        name if name in MAKES else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory):
    """One store for all models, which tells them apart."""
    return create_folder(tmp_path_factory.mktemp("parity") / "store", 16).path


def through_store(path, model_name, codec="planes+zstd"):
    """Return a function that puts a prompt cache into a store and takes it out."""
    fingerprint = kvstore.Fingerprint({"weights": model_name}, model_name)

    def pass_through(prompt_cache, tokens):
        with kvstore.Store(path, codec) as store:
            store.save(tokens, prompt_cache, fingerprint, name="x", replace=True)
        with kvstore.Store(path) as store:
            restored, held = store.load_entry("x", fingerprint)
        assert held == tokens
        assert class_names(restored) == class_names(prompt_cache)
        return restored

    return pass_through


def class_names(prompt_cache):
    """Return the classes of caches, lists of them included."""
    return [
        class_names(cache.caches) if type(cache) is CacheList else type(cache).__name__
        for cache in prompt_cache
    ]


@pytest.mark.parametrize("name", mostly_slow(COVERED))
def test_rows_are_known_before_they_are_computed(name):
    """What a model fills its caches with is known without a prompt."""
    model = architectures.make_model(name)
    unfed, full = make_prompt_cache(model), make_prompt_cache(model)
    feed(model, unfed)
    architectures.feed(model, full, PROMPT)
    assert shapes_of(full) == shapes_of(unfed)


def converse(model, keep, pieces, *, num_tokens=32):
    """Return all logits of two turns, with the cache passed on by ``keep`` before each.

    Restored are a prefilled cache and one that decoding has filled.
    """
    cache = make_prompt_cache(model)
    tokens = PROMPT[: sum(pieces)]
    logits = architectures.feed(model, cache, tokens, *pieces)
    cache = keep(cache, tokens)
    more, seen = architectures.go_on(model, cache, logits, num_tokens)
    tokens = tokens + more
    cache = keep(cache, tokens)
    logits = architectures.feed(model, cache, TURN)
    _, seen_then = architectures.go_on(model, cache, logits, 8)
    return [*seen, logits, *seen_then]


def as_it_is(prompt_cache, tokens):
    """Return a prompt cache that no store has seen."""
    return prompt_cache


def assert_parity(model, path, name, pieces):
    """Compare two turns with those of a run that was not stored."""
    expected = converse(model, as_it_is, pieces)
    actual = converse(model, through_store(path, name), pieces)
    assert not any(mx.isnan(logits).any() for logits in expected)
    assert architectures.bits(actual) == architectures.bits(expected)


@pytest.mark.parametrize("name", COVERED)
def test_every_architecture_goes_on_bit_equal(shared_path, name):
    """Logits behind a restored cache have the bits of a run that was not stored."""
    model = architectures.make_model(name)
    assert_parity(model, shared_path, name, (40, 21))


@pytest.mark.parametrize("name", mostly_slow(COVERED))
def test_prompts_of_all_lengths_go_on_bit_equal(shared_path, name):
    """So they do for prompts that end around windows and blocks."""
    model = architectures.make_model(name)
    for pieces in PIECES:
        # Rows of the same tokens, computed in other pieces, have other bits.
        assert_parity(model, shared_path, f"{name} in {pieces}", pieces)


@pytest.mark.parametrize("name", mostly_slow(COVERED))
def test_bfloat16_goes_on_bit_equal(shared_path, name):
    """So they do in the dtype that models are used in."""
    model = architectures.make_model(name, mx.bfloat16)
    try:
        architectures.feed(model, make_prompt_cache(model), TURN)
    except RuntimeError as error:
        pytest.skip(f"MLX has no experts in bfloat16 on the CPU: {error}")
    assert_parity(model, shared_path, f"{name} in bfloat16", (40, 21))


def test_another_process_goes_on_bit_equal(shared_path, tmp_path, run_python):
    """A process that only has the store gives the same logits."""
    expected = {}
    for name in MAKES:
        model = architectures.make_model(name)
        cache = make_prompt_cache(model)
        architectures.feed(model, cache, PROMPT[:61], 40, 21)
        fingerprint = kvstore.Fingerprint({"weights": name}, name)
        with kvstore.Store(shared_path, "planes+zstd") as store:
            store.save(PROMPT[:61], cache, fingerprint, name=f"of {name}")
        logits = architectures.feed(model, cache, TURN)
        _, seen = architectures.go_on(model, cache, logits, 8)
        expected[name] = [logits, *seen]
    run_python(_RESTORE, shared_path, tmp_path / "logits", TURN, *MAKES)
    for name in MAKES:
        actual = mx.load(str(tmp_path / f"logits.{name}.npy"))
        assert architectures.bits(actual) == architectures.bits(expected[name])


_RESTORE = """
import json, sys
import mlx.core as mx
import architectures, kvstore

path, target, turn, *names = sys.argv[1:]
for name in names:
    model = architectures.make_model(name)
    fingerprint = kvstore.Fingerprint({"weights": name}, name)
    with kvstore.Store(path) as store:
        cache, _ = store.load_entry(f"of {name}", fingerprint)
    logits = architectures.feed(model, cache, json.loads(turn))
    _, seen = architectures.go_on(model, cache, logits, 8)
    mx.save(f"{target}.{name}.npy", mx.stack([logits, *seen]))
"""


@pytest.mark.parametrize("name", SMOOTH)
def test_codes_of_eight_bits_change_next_to_nothing(tmp_path, name):
    """Behind rows that were coded to 8 bits, next tokens have a KL of 0.001 or less."""
    model = architectures.make_model(name)
    cache = make_prompt_cache(model)
    tokens = PROMPT[:100]
    architectures.feed(model, cache, tokens, 60, 40)
    path = create_folder(tmp_path / "store", 16).path
    coded = through_store(path, name, "turbo8+zstd")(cache, tokens)
    following = [TURN[i % 9] + i for i in range(27)]
    divergence = kl(
        mx.stack([architectures.feed(model, cache, [t]) for t in following]),
        mx.stack([architectures.feed(model, coded, [t]) for t in following]),
    )
    with kvstore.Store(path) as store:
        codecs = {stored.codec for _, stored in store.chain("x")}
    assert codecs == {"turbo8+zstd", "planes+zstd"}
    assert 0 < np.mean(divergence) <= 0.001


def kl(expected, actual):
    """Return the KL divergence of every row of logits, in nats."""
    p, q = (np.array(x, np.float64) for x in (expected, actual))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("name", architectures.NO_MODELS)
def test_modules_left_out_hold_no_model(name):
    """What is taken for a part of models defines none."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    assert not hasattr(module, "ModelArgs")


@pytest.mark.parametrize("name", architectures.CANNOT_RUN)
def test_what_is_said_not_to_run_does_not(name):
    """An architecture listed as one that cannot be run here fails."""
    if mx.metal.is_available() and "Metal" in architectures.CANNOT_RUN[name]:
        pytest.skip("it runs on a Mac")

    def run():
        model = architectures.make_model(name)
        architectures.feed(model, make_prompt_cache(model), PROMPT[:2])

    with pytest.raises((RuntimeError, ImportError, SystemExit)):
        run()


@pytest.mark.parametrize("name", architectures.CANNOT_STORE)
def test_what_is_said_not_to_be_stored_is_refused_by_name(store_path, name):
    """A cache of a class of the architecture's own is refused, and the class named."""
    model = architectures.make_model(name)
    cache = make_prompt_cache(model)
    architectures.feed(model, cache, PROMPT[:40])
    fingerprint = kvstore.Fingerprint({"weights": name}, name)
    wanted = architectures.CANNOT_STORE[name]
    with (
        kvstore.Store(store_path) as store,
        pytest.raises(kvstore.UnsupportedCacheError, match=f"is a {wanted},"),
    ):
        store.save(PROMPT[:40], cache, fingerprint)
