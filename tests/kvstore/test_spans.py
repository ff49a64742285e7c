"""A prefix never ends inside what a model is fed as a unit."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from kvstore import Store
from kvstore.format.spans import last_end
from kvstore.ops import load as loading
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
        restore = loading.restore

        def cut_short(blocks, hit, progress, **options):
            from dataclasses import replace

            cut = replace(hit, num_tokens=2 * BLOCK, places=hit.places[:2])
            prompt_cache, done = restore(blocks, cut, progress, **options)
            return prompt_cache, replace(done, reason="damaged")

        monkeypatch.setattr(loading, "restore", cut_short)
        assert store.load([*tokens, 7], caches.MODEL) == (None, [*tokens, 7])


class Prompt:
    """A prompt of 80 tokens, of which the model is given some as rows of images.

    As mlx-lm's server, it feeds none of an image that begins within a hit.
    """

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.tokens = [(7 * i + 3) % 250 for i in range(80)]
        self.key = list(self.tokens)
        for start, stop in images:
            self.key[start:stop] = [-9 - start] * (stop - start)

    def feed(self, cache, num_held, end):
        """Feed what is not held, and return the last token's log probabilities."""
        rows = self.model.model.embed_tokens(mx.array(self.tokens))
        for start, stop in self.images:
            if num_held <= start:
                shape = (stop - start, rows.shape[-1])
                image = mx.random.normal(shape, key=mx.random.key(start))
                rows[start:stop] = image.astype(rows.dtype)
        ids = mx.array([self.tokens[num_held:end]])
        logits = self.model(ids, cache=cache, input_embeddings=rows[None, num_held:end])
        mx.eval(logits, [c.state for c in cache])
        return nn.log_softmax(logits[0, -1])

    def hits(self, store, fingerprint):
        """Yield, for each end of what is stored, where the hit ends and its error."""
        expected = self.feed(make_prompt_cache(self.model), 0, 80)
        for end in range(1, 80):
            held = make_prompt_cache(self.model)
            self.feed(held, 0, end)
            store.save(self.key[:end], held, fingerprint)
            found, rest = store.load(self.key, fingerprint)
            num_held = len(self.key) - len(rest)
            found = found or make_prompt_cache(self.model)
            error = mx.abs(self.feed(found, num_held, 80) - expected).max().item()
            yield end, num_held, error


@pytest.fixture
def calm(tiny_model):
    """The tiny model's shape, with weights by which small errors stay small."""
    config = json.loads((tiny_model / "config.json").read_text())
    mx.random.seed(0)
    return Model(ModelArgs.from_dict(config))


@pytest.mark.parametrize("codec", ["planes+zstd", "turbo8+zstd", "turbo4+zstd"])
def test_images_are_fed_whole_after_a_hit(tmp_path, empty_store, caches, calm, codec):
    """Wherever what is stored ends, a model says what it says without a hit.

    What codes change is measured on the same prompt without images.
    """
    images = [(20, 45), (45, 60), (70, 75)]
    errors = {}
    for name, shown in (("text", []), ("images", images)):
        with Store(shutil.copytree(empty_store, tmp_path / name), codec) as store:
            prompt = Prompt(calm, shown)
            found = list(prompt.hits(store, caches.MODEL))
        for end, num_held, _ in found:
            inside = [at for at in shown if at[0] < num_held < at[1]]
            assert not inside, (end, num_held)
        errors[name] = max(error for _, _, error in found)
        if codec == "planes+zstd":  # nothing is given away either
            before = [next((a for a, b in shown if a < n < b), n) for n in range(1, 80)]
            assert [num_held for _, num_held, _ in found] == before
    cut = make_prompt_cache(calm)
    prompt.feed(cut, 0, 33)
    whole = prompt.feed(make_prompt_cache(calm), 0, 80)
    lost = mx.abs(prompt.feed(cut, 33, 80) - whole).max().item()
    own = errors["text"] if codec != "planes+zstd" else 1e-5
    assert errors["images"] <= 2 * own
    assert lost > 4 * own  # or the above would say nothing
