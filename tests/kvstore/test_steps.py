"""What a step of a server costs the host, and what it notices though it asks less."""

import shutil

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

import kvstore
from kvstore.caches import snapshot as snapshots
from kvstore.codecs import get_codec
from kvstore.errors import ArgumentError
from kvstore.format import chain
from kvstore.ops import save

BLOCK, STEP = 16, 64
MODEL = kvstore.Fingerprint({"weights": "a"})


@pytest.fixture
def store(store_path):
    """An empty store of small blocks."""
    with kvstore.Store(store_path, codec="raw") as store:
        yield store


def tokens_of(caches):
    """Return tokens for the rows of some caches."""
    return list(range(caches[0].offset))


def cut(caches, num_tokens):
    """Return caches of the first rows of others."""
    found = []
    for cache in caches:
        first = KVCache()
        first.update_and_fetch(
            cache.keys[..., :num_tokens, :], cache.values[..., :num_tokens, :]
        )
        found.append(first)
    return found


def taken_of(store, caches, **options):
    """Return what a snapshot takes: where each of its blocks starts."""
    taken = store.snapshot(tokens_of(caches), caches, MODEL, **options)
    return taken, [block.start for block in taken.blocks]


@pytest.fixture
def counted(store, monkeypatch):
    """How often each of what takes time was done."""
    counts = dict.fromkeys(("sql", "json", "layout", "hash"), 0)

    def count(name, module, function):
        real = getattr(module, function)

        def noted(*arguments):
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, function, noted)

    def trace(*_):
        counts["sql"] += 1
        return True

    count("json", chain, "canonical_json")
    count("layout", snapshots, "layout_to_json")
    count("hash", chain, "hash_block_tokens")
    store._blocks.index._connection.exec_trace = trace
    yield counts
    store._blocks.index._connection.exec_trace = None


def test_a_step_costs_as_much_behind_any_prompt(store, counted, caches):
    """Nothing of a layout is written anew, and the index is asked once."""
    whole, costs = caches.make_cache(20 * STEP, 1), []
    for stop in range(STEP, 20 * STEP + 1, STEP):
        live = cut(whole, stop)
        counted.update(dict.fromkeys(counted, 0))
        _, taken = taken_of(store, live)
        costs.append(dict(counted))
        assert list(range(stop - STEP, stop, BLOCK)) == taken
        store.save(tokens_of(live), live, MODEL)
    assert 1 == costs[2]["sql"]
    assert 0 == costs[2]["layout"]
    assert STEP // BLOCK == costs[2]["hash"]
    assert costs[2] == costs[-1]
    assert costs[0]["layout"] == 1


def test_a_step_looks_at_no_block_that_is_stored_well(store, monkeypatch, caches):
    """It is as good as a block of these rows can be."""
    whole, asked = caches.make_cache(8 * STEP, 1), []
    real = save.is_better
    monkeypatch.setattr(save, "is_better", lambda *a: asked.append(a) or real(*a))
    live = cut(whole, 7 * STEP)
    store.save(tokens_of(live), live, MODEL)
    asked.clear()
    assert list(range(7 * STEP, 8 * STEP, BLOCK)) == taken_of(store, whole)[1]
    assert asked == []


@pytest.mark.parametrize("held", ["raw", "turbo4", "turbo2"])
@pytest.mark.parametrize("codec", ["raw", "turbo4", "turbo2"])
@pytest.mark.parametrize("extra", [0, 5])
def test_worse_blocks_are_taken_and_no_others(store_path, caches, held, codec, extra):
    """A tail is without loss wherever it is stored."""
    num_tokens = 6 * BLOCK + extra
    live = caches.make_cache(num_tokens, 1)
    with kvstore.Store(store_path, codec=held) as store:
        store.save(tokens_of(live), live, MODEL)
    with kvstore.Store(store_path, codec=codec) as store:
        _, taken = taken_of(store, live)
    is_worse = get_codec(codec).bits > get_codec(held).bits
    assert ([*range(0, 6 * BLOCK, BLOCK)] if is_worse else []) == taken


def remove_shard(path):
    """Remove the shard that another process has written first."""
    shard = min(path.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    shard.unlink()


def prune(path):
    """Have a store without entries forget all blocks."""
    with kvstore.Store(path) as other:
        other.plan_prune(now=True, max_bytes=1).execute()


PRUNE = """
import sys, kvstore
with kvstore.Store(sys.argv[1]) as store:
    store.plan_prune(now=True, max_bytes=1).execute()
"""


@pytest.mark.parametrize("how", ["shard", "prune", "process", "index", "store"])
def test_what_vanishes_between_two_steps_is_taken_again(store, caches, run_python, how):
    """Whoever has removed it; what is then saved is whole."""
    whole = caches.make_cache(3 * STEP, 1)
    for stop in (STEP, 2 * STEP):
        live = cut(whole, stop)
        assert list(range(stop - STEP, stop, BLOCK)) == taken_of(store, live)[1]
        store.save_blocks(tokens_of(live), live, MODEL)
    {
        "shard": lambda: remove_shard(store.path),
        "prune": lambda: prune(store.path),
        "process": lambda: run_python(PRUNE, store.path),
        "index": lambda: store._blocks.index.path.unlink(),
        "store": lambda: shutil.rmtree(store.path),
    }[how]()
    if how == "store":
        assert store.remake()
    taken, starts = taken_of(store, whole)
    first = {"shard": STEP, "index": 2 * STEP}.get(how, 0)
    gone = range(0, STEP, BLOCK) if how == "shard" else ()
    kept = range(2 * STEP if how == "shard" else first, 3 * STEP, BLOCK)
    assert [*gone, *kept] == starts
    store.save_snapshot(taken)
    restored, rest = store.load([*tokens_of(whole), 0], MODEL)
    assert rest == [0]
    assert caches.rows_of(restored) == caches.rows_of(whole)


def test_an_index_that_says_otherwise_than_a_shard_is_made_anew(store, caches):
    """At each step, also of what it has told before."""
    live = caches.make_cache(STEP, 1)
    store.save(tokens_of(live), live, MODEL)
    for change in ("quality = 8", "extras = 7"):
        assert taken_of(store, live)[1] == []
        said = store._blocks.index.all_blocks()
        store._blocks.index._query(f"UPDATE blocks SET {change}")
        assert taken_of(store, live)[1] == []
        assert store._blocks.index.all_blocks() == said


def roots_of(store, *calls):
    """Return the roots of chains that one store makes, one after the other."""
    return [store._make_chain(range(BLOCK), c, model).root for c, model in calls]


def test_a_root_is_that_of_its_own_model_and_layout(store_path, store, caches):
    """Whatever was asked for before: equal roots are those that a new store makes."""
    models = [MODEL, kvstore.Fingerprint({"weights": 1}), caches.MODEL]
    models += [kvstore.Fingerprint({"weights": one}) for one in (1.0, True)]
    rotating = [RotatingKVCache(max_size=BLOCK) for _ in range(2)]
    for cache in rotating:
        cache.update_and_fetch(*[mx.zeros((1, 2, BLOCK, 64), mx.bfloat16)] * 2)
    layouts = [
        caches.make_cache(BLOCK, 1),
        caches.make_cache(BLOCK, 1, layers=3),
        caches.make_cache(BLOCK, 1, dim=32),
        caches.make_cache(BLOCK, 1, dtype=mx.float16),
        rotating,
        [*caches.make_cache(BLOCK, 1), *rotating, *caches.make_cache(BLOCK, 1)],
    ]
    calls = [(layout, model) for layout in layouts for model in models]
    anew = []
    for call in calls:
        store._root = None
        anew += roots_of(store, call)
    assert len(set(anew)) == len(calls)
    assert roots_of(store, *calls, *reversed(calls)) == [*anew, *reversed(anew)]


def test_fields_that_change_later_change_no_origin(store, caches):
    """A fingerprint is made of a dict, which its owner may write to."""
    live = caches.make_cache(BLOCK, 1)
    fields = {"weights": "a"}
    first = store._make_chain(tokens_of(live), live, kvstore.Fingerprint(fields))
    fields["weights"] = "b"
    again = store._make_chain(tokens_of(live), live, MODEL)
    assert again.root == first.root
    assert again.origin.fingerprint == {"weights": "a"}
    changed = store._make_chain(tokens_of(live), live, kvstore.Fingerprint(fields))
    assert changed.root != first.root


@pytest.mark.parametrize("wrong", [5, None, [[1, 2]], ["a"], [1.0] * BLOCK, "ab"])
def test_wrong_tokens_are_told_before_wrong_rows(store, caches, wrong):
    """Though the number of rows is wrong too."""
    live = caches.make_cache(BLOCK, 1)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="tokens are integers"):
            store.snapshot(wrong, live, MODEL)
        store.snapshot(tokens_of(live), live, MODEL)
