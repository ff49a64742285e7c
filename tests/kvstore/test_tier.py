"""kvstore.tier: any thread, any cache class by what it does, and never in the way."""

import copy
import threading

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import kvstore
from kvstore.caches.lookalike import Lookalikes


@pytest.fixture
def open_tier(store_path, caches):
    """A function that opens the tier of a model, as a server does when it starts."""
    opened = []

    def open_(make_cache=lambda: [KVCache(), KVCache()], codec="raw", **options):
        options = {"min_tokens": 1, "fingerprint": caches.MODEL, **options}
        tier = kvstore.tier(
            None, make_cache=make_cache, path=store_path, codec=codec, **options
        )
        opened.append(tier)
        return tier

    yield open_
    for tier in opened:
        tier.close()


def in_a_thread(work, *arguments):
    """Return what a function returns on a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work(*arguments)))
    thread.start()
    thread.join(60)
    return found[0]


def evaluated(prompt_cache):
    """Return a prompt cache whose arrays any thread may read."""
    mx.eval([cache.state for cache in prompt_cache])
    return prompt_cache


class Copied:
    """What mlx-lm's classes have, as others copy it: not derived from them."""

    def __init__(self, *arguments):
        self.__dict__.update(vars(self.model(*arguments)))


def copied(cls):
    """Return a class of no relation to mlx-lm's that has the same methods."""
    body = {
        name: value
        for base in reversed(cls.__mro__[:-1])
        for name, value in vars(base).items()
        if name not in ("__dict__", "__weakref__", "__init__", "__new__")
    }
    return type(cls.__name__, (Copied,), body | {"model": cls})


class Doubling(KVCache):
    """One that does not hold what the model computes."""

    def update_and_fetch(self, keys, values):
        """Hold twice the keys."""
        return super().update_and_fetch(keys * 2, values)


EMPTY = [
    (KVCache,),
    (ConcatenateKVCache,),
    (QuantizedKVCache, 64, 8),
    (RotatingKVCache, 24),
    (RotatingKVCache, 32, 4),
    (ChunkedKVCache, 24),
    (ArraysCache, 2),
]


def test_a_restart_loses_nothing(open_tier, caches):
    """What was put is fetched again, with the same bits, in another process."""
    tokens, held = caches.make_conversation(3, 1, extra=5)
    tier = open_tier()
    assert tier.put(tokens, held)
    tier.close()
    found, rest = open_tier().fetch([*tokens, 7, 8])
    assert rest == [7, 8]
    assert caches.rows_of(found) == caches.rows_of(held)


def test_every_thread_may_fetch_and_put(open_tier, caches):
    """Rows go from one thread to another, several at a time."""
    tier = open_tier()
    work = [caches.make_conversation(3, seed) for seed in range(1, 7)]
    for _, held in work:
        evaluated(held)
    threads = [threading.Thread(target=tier.put, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert tier.flush(60)
    for tokens, held in work:
        found, rest = in_a_thread(tier.fetch, [*tokens, 1])
        assert (rest, caches.rows_of(found)) == ([1], caches.rows_of(held))
        assert in_a_thread(tier.put, [*tokens, 1], found) is True


def test_only_the_first_rows_are_kept(open_tier, caches):
    """What the server has gone on to compute is left out, and its cache unchanged."""
    tokens, held = caches.make_conversation(3, 1)
    tier = open_tier()
    assert tier.put(tokens, held, upto=20)
    tier.flush()
    found, rest = tier.fetch(tokens)
    assert rest == tokens[20:]
    assert caches.rows_of(found) == caches.rows_of(held, 0, 20)
    assert [cache.offset for cache in held] == [len(tokens)] * 2


def test_a_last_token_without_rows_is_left_out(open_tier, caches):
    """What was sampled last was not fed yet."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    assert tier.put([*tokens, 5], held)
    tier.flush()
    assert tier.fetch([*tokens, 5, 6])[1] == [5, 6]


def test_a_wrapped_window_is_not_cut(open_tier, caches, log):
    """It has forgotten the rows that it would need there."""
    tier = open_tier(lambda: [RotatingKVCache(8)])
    held = caches.grow([RotatingKVCache(8)], caches.random_rows(20, 1, layers=1))
    assert not tier.put(list(range(20)), held, upto=19)
    assert any("no rows of exactly 19 tokens" in line for line in log())
    assert tier.put(list(range(20)), held)


def test_what_memory_holds_is_not_read(open_tier, caches):
    """A server says how much it holds, and gets only what is more."""
    tokens, held = caches.make_conversation(3, 1)
    tier = open_tier()
    tier.put(tokens, held)
    tier.flush()
    assert tier.fetch([*tokens, 1], held=len(tokens)) == (None, [*tokens, 1])
    assert tier.fetch([*tokens, 1], held=10)[1] == [1]


@pytest.mark.parametrize("make", EMPTY, ids=lambda make: make[0].__name__)
def test_copies_of_classes_are_known_by_what_they_do(open_tier, make):
    """Another project's copy of a class goes into the store and comes out of it."""
    cls, *arguments = make
    other = copied(cls)
    tier = open_tier(lambda: [other(*arguments) for _ in range(2)])
    held, tokens = [other(*arguments), other(*arguments)], list(range(40))
    feed(held, 40, 1)
    assert tier.put(tokens, held)
    tier.close()
    found, rest = open_tier(lambda: [other(*arguments) for _ in range(2)]).fetch(
        [*tokens, 1]
    )
    assert rest == [1]
    assert [type(cache) for cache in found] == [other, other]
    assert bits(feed(found, 1, 2)) == bits(feed(held, 1, 2))


def test_a_copy_shares_with_the_class_that_it_copies(open_tier, caches):
    """The rows are the same, so a server and mlx-lm find each other's."""
    other = copied(KVCache)
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.put(tokens, held)
    tier.close()
    found, _ = open_tier(lambda: [other(), other()]).fetch([*tokens, 1])
    assert caches.rows_of(found) == caches.rows_of(held)
    assert type(found[0]) is other


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_class_that_does_something_else_is_refused_at_once(open_tier, is_listed):
    """It looks like a `KVCache`, and its rows are not those that it was given."""
    with pytest.raises(kvstore.UnsupportedCacheError, match="Doubling") as caught:
        open_tier(lambda: [CacheList(Doubling())] if is_listed else [Doubling()])
    assert caught.value.hint


@pytest.mark.parametrize("cls", [KVCache, RotatingKVCache])
def test_a_lookalike_that_loses_what_is_stored_is_refused(cls):
    """It returns the right rows until it is filled from a store."""

    class Forgetful(copied(cls)):
        def update_and_fetch(self, keys, values):
            known, self._fed = getattr(self, "_fed", 0), self.offset + keys.shape[2]
            found = super().update_and_fetch(keys, values)
            return (
                (found[0] * 0, found[1])
                if known != self.offset - keys.shape[2]
                else found
            )

    with pytest.raises(kvstore.UnsupportedCacheError, match="Forgetful"):
        Lookalikes([Forgetful(32)] if cls is RotatingKVCache else [Forgetful()])


def test_what_a_cache_holds_beside_its_rows_is_not_lost(open_tier, caches, log):
    """Who holds more than rows is not kept at all."""
    other = copied(KVCache)
    tier = open_tier(lambda: [other(), other()])
    tokens, _ = caches.make_conversation(2, 1)
    held = caches.grow([other(), other()], caches.random_rows(32, 1))
    held[1].scale = 3.0
    assert not tier.put(tokens, held)
    assert any("holds more than rows: `scale`" in line for line in log())


class Foreign:
    """No prompt cache at all."""


@pytest.mark.parametrize(
    ("tokens", "prompt_cache"),
    [
        ([1, 2, 3], [Foreign(), Foreign()]),
        ([1, 2, 3], [KVCache()]),
        ([1, 2, 3], [KVCache(), KVCache()]),
        ([1, 2, 3], None),
        ([], [KVCache(), KVCache()]),
        (["a"], [KVCache(), KVCache()]),
    ],
)
def test_nothing_is_raised_into_the_server(open_tier, tokens, prompt_cache):
    """What cannot be kept is not kept, and what cannot be found is a miss."""
    tier = open_tier()
    assert tier.put(tokens, prompt_cache) is False
    assert tier.fetch(tokens) == (None, tokens)


def test_a_broken_store_raises_nothing(open_tier, caches, store_path, log):
    """The folder has gone while the server runs, and something else is there."""
    import shutil

    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    shutil.rmtree(store_path)
    store_path.write_text("no folder")
    assert not tier.put(tokens, held)
    assert tier.fetch(tokens) == (None, tokens)
    tier.close()
    assert any(line.startswith("kvstore: not") for line in log())


def test_nothing_is_found_or_kept_after_the_end(open_tier, caches):
    """A request that is still served then goes on without the disk."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.put(tokens, held)
    tier.close()
    tier.close()
    assert tier.put(tokens, held) is False
    assert tier.fetch(tokens) == (None, tokens)
    assert tier.flush(1)


FORGETFUL = """
import sys, caches, kvstore
from mlx_lm.models.cache import KVCache
tier = kvstore.tier(
    None, path=sys.argv[1], codec="raw", min_tokens=1, fingerprint=caches.MODEL,
    make_cache=lambda: [KVCache(), KVCache()],
)
for seed in range(1, 9):
    tier.put(*caches.make_conversation(3, seed))
"""


def test_what_waits_is_written_when_the_process_ends(store_path, run_python, caches):
    """A server need not call `close`."""
    run_python(FORGETFUL, store_path)
    with kvstore.Store(store_path) as store:
        assert len(store.entries()) == 8


def test_lossy_rows_stay_marked_by_way_of_a_copied_class(open_tier, caches):
    """What was decoded from codes is not taken for computed when it comes back."""
    other = copied(KVCache)
    make = lambda: [other(), other()]  # noqa: E731
    tokens, _ = caches.make_conversation(3, 1)
    held = caches.grow(make(), caches.random_rows(len(tokens), 1))
    tier = open_tier(make, "turbo4")
    tier.put(tokens, held)
    tier.flush()
    found, _ = tier.fetch([*tokens, 1])
    longer = [*tokens, *range(16)]
    tier.put(longer, caches.grow(found, caches.random_rows(16, 2)))
    tier.close()
    with kvstore.Store(tier._disk.store.path) as store:
        like = [KVCache(), KVCache()]
        assert store.lookup(longer, caches.MODEL, like=like).num_tokens >= 48
        assert not store.lookup(longer, caches.MODEL, like=like, exact=True).num_tokens


def test_a_real_model_goes_on_with_the_same_bits(store_path, loaded, tiny_model):
    """The fingerprint of the folder is that of `generate`; logits are the same."""
    from kvstore.models.session import prefill

    model, _, fingerprint = loaded
    tokens = [(7 * i + 3) % 250 for i in range(70)]
    held = prefill(model, tokens)
    with kvstore.tier(
        model, model_path=tiny_model, path=store_path, codec="planes+zstd"
    ) as tier:
        assert tier.fingerprint == fingerprint
        assert tier.put(tokens, held)
        tier.flush()
        found, rest = tier.fetch([*tokens, 5])
    assert rest == [5]
    expected, logits = (model(mx.array([[5]]), cache=c) for c in (held, found))
    assert mx.array_equal(expected, logits)
    with kvstore.tier(model, path=store_path, codec="raw") as live:
        assert live.fingerprint == kvstore.Fingerprint.of(model)
    assert len(make_prompt_cache(model)) == len(held)


def feed(prompt_cache, num_rows, seed):
    """Give each cache new rows, or states, and return what it returns."""
    found = []
    for number, cache in enumerate(prompt_cache):
        key = mx.random.key(10 * seed + number)
        rows = mx.random.normal((2, 1, 2, num_rows, 64), key=key)
        if hasattr(cache, "update_and_fetch"):
            if hasattr(cache, "maybe_trim_front"):
                cache.maybe_trim_front()
            found.append(cache.update_and_fetch(rows[0], rows[1]))
            continue
        found.append([copy.copy(state) for state in cache.cache])
        cache[0], cache[1] = rows[0, :, 0], rows[1, :, 1]
    return found


def bits(found):
    """Return nested arrays as bytes."""
    if isinstance(found, tuple | list):
        return [bits(each) for each in found]
    return None if found is None else bytes(memoryview(mx.contiguous(found)))


def test_another_implementation_shares_nothing(store_path, loaded, tiny_model):
    """Of the same weights, another package may compute other rows."""
    ours = loaded[0]

    class Model(type(ours)):
        __module__ = "another.models.llama"

    with kvstore.tier(ours, model_path=tiny_model, path=store_path) as one:
        other = copy.copy(ours)
        other.__class__ = Model
        with kvstore.tier(other, model_path=tiny_model, path=store_path) as two:
            assert one.fingerprint == kvstore.Fingerprint.from_path(tiny_model)
            assert two.fingerprint == one.fingerprint.with_salt("another")
