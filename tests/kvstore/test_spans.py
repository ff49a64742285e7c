"""A prefix never ends inside what a model is fed as a unit."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, make_prompt_cache

from kvstore import Store
from kvstore.format.spans import last_end
from kvstore.server import DiskPromptCache, ServedModel

BLOCK = 16
CODECS = "raw", "turbo4+zstd"


@pytest.mark.parametrize(
    ("tokens", "end", "spans", "expected"),
    [
        ([1, -7, -7, -7, 2], 0, [], 0),
        ([1, -7, -7, -7, 2], 1, [], 1),
        ([1, -7, -7, -7, 2], 2, [], 1),
        ([1, -7, -7, -7, 2], 3, [], 1),
        ([1, -7, -7, -7, 2], 4, [], 4),
        ([-7, -7, -7], 2, [], 0),
        ([-7, -7, -8, -8], 2, [], 2),
        ([-7, -7, -8, -8], 3, [], 2),
        ([5, 5, 5, 5], 2, [], 2),
        ([0, 1, 2, 3, 4], 3, [(1, 4)], 1),
        ([0, 1, 2, 3, 4], 4, [(1, 4)], 4),
        ([0, 1, 2, 3, 4], 4, [(3, 5), (1, 4)], 1),
        ([-7, -7, 2, 3, 4], 3, [(1, 4)], 0),
    ],
)
def test_an_end_is_moved_in_front_of_a_unit(tokens, end, spans, expected):
    """Media and named spans, one behind another or one over another."""
    assert last_end(tokens, end, spans) == expected


@given(st.data())
def test_an_end_is_inside_of_nothing(data):
    """What is returned is the last position that no unit goes over."""
    tokens = data.draw(st.lists(st.sampled_from([-2, -1, 1]), min_size=1, max_size=12))
    position = st.integers(0, len(tokens))
    end, spans = data.draw(position), data.draw(st.lists(st.tuples(position, position)))

    def is_inside(at):
        in_media = 0 < at < len(tokens) and tokens[at - 1] == tokens[at] < 0
        return in_media or any(start < at < stop for start, stop in spans)

    allowed = [at for at in range(end + 1) if not is_inside(at)]
    assert last_end(tokens, end, spans) == max(allowed)


@pytest.fixture
def open_tier(store_path, caches):
    """A function that opens the tier, as a server does when it starts."""
    opened = []

    def open_(codec="raw"):
        served = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
        store = Store(store_path, codec)
        opened.append(DiskPromptCache(store, lambda _: served, min_tokens=1))
        return opened[-1]

    yield open_
    for tier in opened:
        tier.close()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("start", [0, 5, 2 * BLOCK])
def test_a_hit_ends_in_no_image(open_tier, caches, codec, start):
    """Wherever a second prompt parts from the first, in memory and on disk."""
    tokens, held = caches.make_conversation(5, 1)
    stop = start + 2 * BLOCK + 3
    tokens[start:stop] = [-9] * (stop - start)
    tier = open_tier(codec)
    tier.insert_cache("key", tokens, held)
    tier.flush()
    restarted = open_tier(codec)
    around = [max(1, at) for edge in (start, stop) for at in range(edge - 2, edge + 3)]
    for end in {*around, *range(1, len(tokens) + 1, 9), len(tokens)}:
        for again in (tier, restarted):
            prompt = [*tokens[:end], 7] if not start < end < stop else tokens[:stop]
            found, rest = again.fetch_nearest_cache("key", prompt)
            num_held = len(prompt) - len(rest)
            assert (found[0].offset if found else 0) == num_held
            assert not start < num_held < stop


@pytest.mark.parametrize("codec", CODECS)
def test_a_hit_ends_in_no_span_that_a_caller_names(open_tier, caches, codec):
    """The same for tokens that are no media; without the span more is held."""
    tokens, held = caches.make_conversation(4, 1)
    tier = open_tier(codec)
    tier.insert_cache("key", tokens, held)
    tier.flush()
    restarted = open_tier(codec)
    prompt = [*tokens[: 3 * BLOCK], 7, 8, 9]
    span = (BLOCK + 3, 3 * BLOCK + 2)
    for again in (tier, restarted):
        _, rest = again.fetch_nearest_cache("key", prompt, spans=[span])
        assert len(prompt) - len(rest) <= BLOCK + 3
        assert len(prompt) - len(rest) >= BLOCK
        assert len(again.fetch_nearest_cache("key", prompt)[1]) == 3


def test_a_store_says_where_it_had_to_stop(store_path, caches):
    """`load` and `lookup` agree, and the reason names the tokens."""
    tokens, held = caches.make_conversation(4, 1)
    tokens[20:60] = [-9] * 40
    with Store(store_path, "turbo4+zstd") as store:
        store.save(tokens, held, caches.MODEL)
        prompt = [*tokens[: 3 * BLOCK], *[-9] * 12, 7]
        match = store.lookup(prompt, caches.MODEL)
        assert (match.num_tokens, match.reason) == (BLOCK, "unit")
        assert match.detail.endswith("must be fed whole; it starts at 20")
        found, rest = store.load(prompt, caches.MODEL)
        assert (found[0].offset, rest) == (BLOCK, prompt[BLOCK:])
        wide = [(0, len(prompt))]
        assert store.lookup(prompt, caches.MODEL, spans=wide).num_tokens == 0
        assert store.load(prompt, caches.MODEL, spans=wide) == (None, prompt)


def test_damage_ends_a_hit_in_no_image(store_path, caches, monkeypatch):
    """Blocks that cannot be read any more, again and again, are a miss."""
    tokens, held = caches.make_conversation(4, 1)
    tokens[5:60] = [-9] * 55
    with Store(store_path, "raw") as store:
        store.save(tokens, held, caches.MODEL)
        restore = type(store._loader()).restore

        def cut_short(self, hit, progress, **options):
            from dataclasses import replace

            cut = replace(hit, num_tokens=2 * BLOCK, places=hit.places[:2])
            prompt_cache, done = restore(self, cut, progress, **options)
            return prompt_cache, replace(done, reason="damaged")

        monkeypatch.setattr(type(store._loader()), "restore", cut_short)
        assert store.load([*tokens, 7], caches.MODEL) == (None, [*tokens, 7])


def test_an_image_is_fed_whole_after_a_hit(store_path, loaded):
    """Wherever what is stored ends, logits are those of a run that was never cut.

    The model splices rows of its own in place of the patches, and, as mlx-lm's server,
    feeds none of an image that begins within the hit.
    """
    model, _, fingerprint = loaded
    start, stop = 20, 60
    text = [(7 * i + 3) % 250 for i in range(80)]
    key = [-9 if start <= i < stop else token for i, token in enumerate(text)]
    width = model.model.embed_tokens(mx.array([0])).shape[-1]
    image = mx.random.normal((stop - start, width), key=mx.random.key(1))

    def feed(cache, num_held, end):
        rows = model.model.embed_tokens(mx.array(text))
        if num_held <= start:  # an image that begins before counts as held
            rows[start:stop] = image.astype(rows.dtype)
        fed = rows[None, num_held:end]
        ids = mx.array([text[num_held:end]])
        logits = model(ids, cache=cache, input_embeddings=fed)
        mx.eval(logits, [c.state for c in cache])
        return logits[0, -1]

    expected = feed(make_prompt_cache(model), 0, len(text))
    with Store(store_path, "planes+zstd") as store:
        for end in (10, 20, 21, 33, 59, 60, 61, 79):
            held = make_prompt_cache(model)
            feed(held, 0, end)
            store.save(key[:end], held, fingerprint)
            found, rest = store.load(key, fingerprint)
            num_held = len(key) - len(rest)
            assert num_held == (start if start < end < stop else end)
            assert mx.allclose(
                feed(found, num_held, len(text)), expected, rtol=1e-3, atol=1e-3
            )
