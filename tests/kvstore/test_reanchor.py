"""Re-anchored rows: near what is computed, marked, and never stored."""

import copy

import mlx.core as mx
import pytest
from kit import load_beside
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

import kvstore
from kvstore.caches.live import Provenance, read_provenance
from kvstore.models.reanchor import NUM_FRESH, reanchor_prompt
from kvstore.models.rotation import LayerRotation, measure_rotation

architectures = load_beside("architectures")
HEAD, OLD, NEW = list(range(10, 40)), [3, 4, 5], [6, 7, 8, 9, 6]
TAIL = [(7 * i * i + 3 * i) % 97 + 10 for i in range(120)]
TOKENS, PROMPT = HEAD + OLD + TAIL, HEAD + NEW + TAIL + [5, 6]


@pytest.fixture(scope="module")
def model():
    """A model whose keys can be moved."""
    return architectures.make_model("llama", layer_types=["full_attention"] * 4)


@pytest.fixture(scope="module")
def rotations(model):
    """How they are."""
    return measure_rotation(model)


def compute(model, tokens):
    """Return a prompt cache of these tokens."""
    held = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=held))
    return held


def sides(cache):
    """Return its keys and values, without the room for more."""
    return [side[:, :, : cache.offset] for side in (cache.keys, cache.values)]


def error(found, expected, rows):
    """Return how far keys and values of some rows are from others, at worst."""
    return max(
        float(mx.abs(one[:, :, rows] - other[:, :, rows]).max())
        for cache, exact in zip(found, expected, strict=True)
        for one, other in zip(sides(cache), sides(exact), strict=True)
    )


def test_what_is_the_same_in_front_is_kept_and_what_differs_is_computed(
    model, rotations
):
    """Only what stands behind the fresh tokens is taken over."""
    held = compute(model, TOKENS)
    before = [copy.copy(cache) for cache in held]
    found = reanchor_prompt(model, rotations, held, TOKENS, PROMPT)
    assert found.num_kept == len(HEAD)
    assert found.num_computed == len(NEW) + NUM_FRESH
    assert found.num_moved == len(TAIL) - NUM_FRESH
    assert found.rest == PROMPT[len(HEAD + NEW + TAIL) :]
    exact = compute(model, HEAD + NEW + TAIL)
    first = len(HEAD + NEW) + NUM_FRESH
    assert error(found.prompt_cache, exact, slice(0, first)) < 1e-4
    assert error(held, before, slice(None)) == 0


def test_in_the_first_layer_moved_rows_are_those_of_their_new_places(model, rotations):
    """There no token has seen another, so all of the difference is the rotation."""
    found = reanchor_prompt(model, rotations, compute(model, TOKENS), TOKENS, PROMPT)
    exact = compute(model, HEAD + NEW + TAIL)
    assert error(found.prompt_cache[:1], exact[:1], slice(None)) < 1e-4


def test_without_the_rotation_rows_are_far_off(model, rotations):
    """It is what makes the keys fit."""
    still = [LayerRotation(lambda keys, by: keys, "", 0.0, 0.0) for _ in rotations]
    held, exact = compute(model, TOKENS), compute(model, HEAD + NEW + TAIL)
    found = []
    for how in (rotations, still):
        made = reanchor_prompt(model, how, held, TOKENS, PROMPT).prompt_cache
        found.append(error(made[:1], exact[:1], slice(None)))
    assert found[0] < 1e-3 * found[1]


def test_several_changes_are_a_chain(model, rotations):
    """Behind each change some tokens are computed, and the rest is taken over."""
    tokens = HEAD + OLD + TAIL + OLD + TAIL[::-1]
    prompt = HEAD + NEW + TAIL + NEW + NEW + TAIL[::-1] + [1]
    found = reanchor_prompt(model, rotations, compute(model, tokens), tokens, prompt)
    assert found.num_moved == 2 * (len(TAIL) - NUM_FRESH)
    assert found.num_kept + found.num_computed + found.num_moved == len(prompt) - 1
    exact = compute(model, prompt[:-1])
    assert error(found.prompt_cache[:1], exact[:1], slice(None)) < 1e-4


@pytest.mark.parametrize(
    "prompt",
    [TOKENS, [*TOKENS, 5], TOKENS[:50], HEAD + NEW + TAIL[:40], NEW, NEW * 50],
    ids=len,
)
def test_where_little_is_the_same_nothing_is_taken_over(model, rotations, prompt):
    """What only goes on, or shares too few tokens behind a change, is a plain hit."""
    held = compute(model, TOKENS)
    assert reanchor_prompt(model, rotations, held, TOKENS, prompt) is None


def test_re_anchored_rows_are_never_stored(model, rotations, store_path, caches):
    """Neither as they are, nor with more rows, nor cut, nor by another way."""
    held = compute(model, TOKENS)
    found = reanchor_prompt(model, rotations, held, TOKENS, PROMPT).prompt_cache
    mx.eval(model(mx.array([[5, 6]]), cache=found))
    assert read_provenance(found).is_moved
    cut = [copy.copy(cache) for cache in found]
    for cache in cut:
        cache.trim(10)
    with kvstore.Store(store_path, "raw") as store:
        for tokens, held in ((PROMPT, found), (PROMPT[:-10], cut)):
            for save in (store.save, store.snapshot, store.save_blocks):
                with pytest.raises(kvstore.UnsupportedCacheError, match="not stored"):
                    save(tokens, held, caches.MODEL)
        assert not store.entries()
    with kvstore.tier(
        model, path=store_path, fingerprint=caches.MODEL, min_tokens=1
    ) as tier:
        assert not tier.put(PROMPT, found)


def test_a_server_does_not_forget_the_mark(model, rotations, store_path, caches):
    """Rows that came out of a lossy restore are marked over it."""
    from kvstore.server import DiskPromptCache, ServedModel

    held = compute(model, TOKENS)
    served = ServedModel(caches.MODEL, (make_prompt_cache(model),))
    tier = DiskPromptCache(
        kvstore.Store(store_path, "raw"), lambda key: served, min_tokens=1
    )
    lossy = Provenance(len(PROMPT), 4)
    tier._disk._lineage.note(caches.MODEL.digest, PROMPT, lossy)
    found = reanchor_prompt(model, rotations, held, TOKENS, PROMPT)
    mx.eval(model(mx.array([found.rest]), cache=found.prompt_cache))
    tier.insert_cache("m", PROMPT, found.prompt_cache)
    tier.close()
    with kvstore.Store(store_path) as store:
        assert not store.entries()


def test_other_caches_and_tokens_are_refused(model, rotations):
    """Windows are not re-anchored, and rows must be those of the tokens."""
    with pytest.raises(kvstore.UnsupportedCacheError, match="RotatingKVCache"):
        reanchor_prompt(model, rotations, [RotatingKVCache(8)], TOKENS, PROMPT)
    held = compute(model, TOKENS)
    with pytest.raises(ValueError, match="rows for 152 tokens"):
        reanchor_prompt(model, rotations, held, TOKENS[:-1], PROMPT)
    with pytest.raises(ValueError, match="1 rotations"):
        reanchor_prompt(model, rotations[:1], held, TOKENS, PROMPT)
