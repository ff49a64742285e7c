"""DiskPromptCache: memory first, then disk; right rows, and never in the way."""

import gc
import os
import shutil
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from kvstore import Store
from kvstore.caches import live as caches_module
from kvstore.caches.provenance import Provenance
from kvstore.errors import StoreLockedError
from kvstore.fingerprint import Fingerprint
from kvstore.server import DiskPromptCache, ServedModel
from turboquant.kv_cache import TurboQuantKVCache

KEY, OTHER_KEY = ("model", None, None), ("other", None, None)


@pytest.fixture
def models(caches):
    """What the keys of a server stand for."""
    empty = ([KVCache(), KVCache()],)
    return {
        KEY: ServedModel(caches.MODEL, empty),
        OTHER_KEY: ServedModel(caches.OTHER_WEIGHTS, empty),
    }


@pytest.fixture
def open_tier(store_path, models):
    """A function that opens the tier, as a server does when it starts."""
    opened = []

    def open_(codec="raw", **options):
        options = {"min_tokens": 1, **options}
        tier = DiskPromptCache(Store(store_path, codec), models.__getitem__, **options)
        opened.append(tier)
        return tier

    yield open_
    for tier in opened:
        tier.close()


def restart(tier, open_tier, **options):
    """Return what a server has after it was stopped and started."""
    tier.close()
    return open_tier(**options)


def extracted(prompt_cache):
    """Return a prompt cache as a batch gives it back: new objects, no marks."""
    found = []
    for cache in prompt_cache:
        new = KVCache()
        new.keys, new.values = (
            mx.contiguous(side[..., : cache.offset, :])
            for side in (cache.keys, cache.values)
        )
        new.offset = cache.offset
        found.append(new)
    return found


def test_a_restart_loses_nothing(open_tier, caches):
    """What was inserted is there again, with the same bits, in another process."""
    tokens, held = caches.make_conversation(3, 1, extra=5)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    found, rest = restart(tier, open_tier).fetch_nearest_cache(KEY, [*tokens, 7, 8])
    assert rest == [7, 8]
    assert caches.rows_of(found) == caches.rows_of(held)


def test_one_token_is_always_left(open_tier, caches):
    """A prompt that is wholly held, in memory or on disk, leaves its last token."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    for again in (tier, restart(tier, open_tier)):
        found, rest = again.fetch_nearest_cache(KEY, tokens)
        assert rest == tokens[-1:]
        assert found[0].offset == len(tokens) - 1


def test_what_memory_holds_is_not_read(open_tier, caches, log):
    """The disk is left alone where it has no more than memory."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier.flush()
    found, rest = tier.fetch_nearest_cache(KEY, [*tokens, *range(7000, 7100)])
    assert (found[0].offset, len(rest)) == (len(tokens), 100)
    assert not any("read from disk" in line for line in log())


def test_the_disk_is_asked_for_more_than_memory_holds(open_tier, caches, log):
    """A longer prefix on disk wins over a shorter one in memory."""
    tokens, held = caches.make_conversation(4, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    again = restart(tier, open_tier)
    again.insert_cache(KEY, tokens[:20], caches.make_cache(20, 1))
    _found, rest = again.fetch_nearest_cache(KEY, [*tokens, 1])
    assert rest == [1]
    assert any("20 in memory: 64 read from disk" in line for line in log())


def test_models_are_kept_apart(open_tier, caches):
    """The same tokens of another model are another prompt."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    again = restart(tier, open_tier)
    assert again.fetch_nearest_cache(OTHER_KEY, tokens) == (None, tokens)
    assert again.fetch_nearest_cache(KEY, tokens)[1] == tokens[-1:]


def test_other_weights_under_the_same_key_are_another_model(open_tier, caches, models):
    """Rows in memory do not outlive the weights that computed them."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    models[KEY] = models[OTHER_KEY]
    assert tier.fetch_nearest_cache(KEY, tokens) == (None, tokens)


def test_a_model_that_cannot_be_told_is_served_from_memory(open_tier, caches, log):
    """Where nobody knows what a key stands for, mlx-lm's own cache is left."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache("nobody", tokens, held)
    assert tier.fetch_nearest_cache("nobody", tokens)[1] == tokens[-1:]
    tier.flush()
    assert not tier.store.entries()
    assert any("served from memory only" in line for line in log())


def test_rows_out_of_codes_stay_marked_through_a_batch(open_tier, caches, store_path):
    """Nothing computed on a lossy restore is served as exact or coded again."""
    tokens, held = caches.make_conversation(3, 1)
    tier = open_tier("turbo4")
    tier.insert_cache(KEY, tokens, held)
    tier = restart(tier, open_tier, codec="turbo4")
    # Stored after the codes, in a block of its own behind the first two.
    longer = [*tokens[:40], *range(5000, 5040)]
    found, rest = tier.fetch_nearest_cache(KEY, longer)
    assert len(rest) < len(longer)
    went_on = extracted(caches.grow(found, caches.random_rows(len(rest), 2)))
    assert caches_module.read_provenance(went_on) == Provenance()
    tier.insert_cache(KEY, longer, went_on)
    tier.close()
    with Store(store_path) as store:
        assert store.load([*longer, 1], caches.MODEL, exact=True)[0] is None
        again, rest = store.load([*longer, 1], caches.MODEL)
        assert rest == [1]
        # Up to there rows are coded once: the rest of that block is not.
        assert caches.rows_of(again, 32, 48) == caches.rows_of(went_on, 32, 48)
        assert not caches_module.read_provenance(again).is_exact


def test_a_row_ahead_is_not_kept(open_tier, caches):
    """mlx-lm may have computed a token that it has not told of yet."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens[:-1], held)
    found, rest = restart(tier, open_tier).fetch_nearest_cache(KEY, tokens)
    assert rest == tokens[-1:]
    assert caches.rows_of(found) == caches.rows_of(held, 0, len(tokens) - 1)


def test_a_token_without_a_row_is_not_kept(open_tier, caches):
    """A token that was told of and not fed is left for the next prompt."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, [*tokens, 5], held)
    _found, rest = restart(tier, open_tier).fetch_nearest_cache(KEY, [*tokens, 5, 6])
    assert rest == [5, 6]


def test_caches_of_a_draft_model_may_be_behind(open_tier, caches):
    """Where layers hold different numbers of rows, what all have is kept."""
    tokens, held = caches.make_conversation(2, 1)
    held[1].trim(1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    assert held[0].offset == len(tokens)
    found, rest = restart(tier, open_tier).fetch_nearest_cache(KEY, tokens)
    assert rest == tokens[-1:]
    assert [cache.offset for cache in found] == [len(tokens) - 1] * 2


def test_a_window_that_is_ahead_is_not_kept(open_tier, caches, log):
    """A wrapped window cannot go back, and its rows are of other tokens."""
    tier = open_tier()
    held = [RotatingKVCache(8), RotatingKVCache(8)]
    caches.grow(held, caches.random_rows(20, 1))
    tier.insert_cache(KEY, list(range(19)), held)
    assert any("no rows of exactly 19 tokens" in line for line in log())
    assert tier.fetch_nearest_cache(KEY, list(range(25)))[0] is None
    tier.flush()
    assert not tier.store.entries()


@pytest.mark.parametrize("num_ahead", [-1, 1])
def test_memory_holds_exactly_the_tokens_it_says(open_tier, caches, num_ahead):
    """What mlx-lm counts wrong would put every later row in the wrong place."""
    tokens, held = caches.make_conversation(3, 1)
    first = tokens[: 20 - num_ahead]
    partly = caches.make_cache(len(tokens), 1)
    for cache in partly:
        cache.trim(len(tokens) - 20)
    tier = open_tier()
    tier.insert_cache(KEY, first, partly)
    found, rest = tier.fetch_nearest_cache(KEY, tokens)
    num_held = len(tokens) - len(rest)
    assert num_held == min(20, len(first))
    assert [cache.offset for cache in found] == [num_held] * 2
    assert caches.rows_of(found) == caches.rows_of(held, 0, num_held)


def test_a_kind_of_cache_is_kept_that_the_server_can_use(open_tier, caches, models):
    """What another program stored in another class is not handed out."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    models[KEY] = ServedModel(caches.MODEL, ([RotatingKVCache(8) for _ in range(2)],))
    again = restart(tier, open_tier)
    assert again.fetch_nearest_cache(KEY, [*tokens, 1])[0] is None


def test_codes_of_another_program_are_no_rows_of_ours(open_tier, caches):
    """What ran with `kv_bits="turbo3"` is not handed to a server that did not ask."""
    tokens, held = caches.make_conversation(2, 1)
    codes = [TurboQuantKVCache(3) for _ in held]
    for layer, cache in zip(codes, held, strict=True):
        sides = (side[..., : len(tokens), :] for side in (cache.keys, cache.values))
        layer.update_and_fetch(*sides)
    tier = open_tier()
    tier.store.save(tokens, codes, caches.MODEL)
    assert tier.fetch_nearest_cache(KEY, [*tokens, 1]) == (None, [*tokens, 1])


def test_the_longest_kind_is_taken(open_tier, caches, models):
    """Of several kinds that a server can use, the one with most stored is read."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    kinds = ([RotatingKVCache(8) for _ in range(2)], [KVCache(), KVCache()])
    models[KEY] = ServedModel(caches.MODEL, kinds)
    again = restart(tier, open_tier)
    assert type(again.fetch_nearest_cache(KEY, [*tokens, 1])[0][0]) is KVCache


@pytest.mark.parametrize(
    "error", [OSError(5, "I/O"), StoreLockedError("x"), KeyError()]
)
def test_a_failing_disk_costs_the_disk_only(open_tier, caches, monkeypatch, log, error):
    """Whatever the store raises, memory goes on, and the log says so."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()

    def fail(*_args, **_options):
        raise error

    for name in ("lookup", "load", "snapshot"):
        monkeypatch.setattr(Store, name, fail)
    tier.insert_cache(KEY, tokens, held)
    found, rest = tier.fetch_nearest_cache(KEY, [*tokens, *range(40)])
    assert (found[0].offset, len(rest)) == (len(tokens), 40)
    assert [line.startswith(("kvstore: not kept", "kvstore: not read"))
            for line in log() if "taken for" not in line] == [True, True]  # fmt: skip


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("odd")])
def test_a_save_that_fails_is_tried_again_with_the_next(
    open_tier, caches, monkeypatch, error
):
    """The writing thread lives on, and what is missing is copied again."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    save = Store.save_snapshot
    errors = [error]

    def fail_once(self, *args, **options):
        if errors:
            raise errors.pop()
        return save(self, *args, **options)

    monkeypatch.setattr(Store, "save_snapshot", fail_once)
    tier.insert_cache(KEY, tokens, held)
    tier.flush()
    longer = caches.grow(held, caches.random_rows(3, 3))
    tier.insert_cache(KEY, [*tokens, 1, 2, 3], longer)
    again = restart(tier, open_tier)
    assert again.fetch_nearest_cache(KEY, [*tokens, 1, 2, 3, 4])[1] == [4]


@pytest.mark.parametrize("limit", [None, 10_000_000])
def test_a_store_that_is_deleted_is_made_again(
    open_tier, caches, store_path, log, limit
):
    """What comes after is kept, under the same size limit; nobody starts anew."""
    tier = open_tier()
    if limit:
        tier.store.set_limit(limit)
    tier.insert_cache(KEY, *caches.make_conversation(2, 1))
    assert tier.flush(30)
    shutil.rmtree(store_path)
    tokens, held = caches.make_conversation(3, 2)
    tier.insert_cache(KEY, tokens, held)
    assert tier.flush(30)
    assert any("made again" in line for line in log())
    again = restart(tier, open_tier)
    assert again.store._folder.config.max_bytes == limit
    assert again.fetch_nearest_cache(KEY, [*tokens, 1])[1] == [1]


def test_no_store_is_made_where_a_disk_is_gone(
    open_tier, caches, store_path, monkeypatch
):
    """What lies at its mount point is of another disk, and no place for a store."""
    tier = open_tier()
    real = Path.stat
    store_path.rename(store_path.with_name("elsewhere"))

    def stat(self, **options):
        found = real(self, **options)
        number = found.st_dev + (self == store_path.parent)
        return os.stat_result([*found[:2], number, *found[3:10]])

    monkeypatch.setattr(Path, "stat", stat)
    tier.insert_cache(KEY, *caches.make_conversation(2, 1))
    assert tier.flush(30)
    assert not store_path.exists()


@pytest.fixture
def slow_disk(monkeypatch):
    """An event that every save waits for."""
    go_on = threading.Event()
    save = Store.save_snapshot

    def wait(self, *args, **options):
        assert go_on.wait(30)
        return save(self, *args, **options)

    monkeypatch.setattr(Store, "save_snapshot", wait)
    yield go_on
    go_on.set()


def test_a_slow_disk_keeps_nobody_waiting(open_tier, caches, slow_disk):
    """Inserting and fetching go on while nothing can be written."""
    tier = open_tier()
    for seed in range(1, 5):
        tokens, held = caches.make_conversation(2, seed)
        tier.insert_cache(KEY, tokens, held)
        assert tier.fetch_nearest_cache(KEY, [*tokens, 1])[1] == [1]
    assert not tier.flush(0.01)
    slow_disk.set()
    assert tier.flush(30)


def test_what_is_kept_is_what_was_inserted(open_tier, caches, slow_disk):
    """Rows that come later, while the disk is slow, do not get in."""
    tokens, held = caches.make_conversation(2, 1)
    before = caches.rows_of(held)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    held[0].trim(20)
    caches.grow(held[:1], caches.random_rows(20, 9, layers=1))
    slow_disk.set()
    found, _ = restart(tier, open_tier).fetch_nearest_cache(KEY, [*tokens, 1])
    assert caches.rows_of(found) == before


def test_what_is_on_its_way_is_not_copied_again(open_tier, caches, slow_disk):
    """The blocks of a turn that waits are left out of the next."""
    tokens, held = caches.make_conversation(4, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    waiting = tier._disk._writer._queued_bytes
    longer = caches.grow(held, caches.random_rows(caches.BLOCK, 2))
    tier.insert_cache(KEY, [*tokens, *range(16)], longer)
    assert tier._disk._writer._queued_bytes - waiting == waiting // 4


def test_only_so_much_may_wait(open_tier, caches, slow_disk, log):
    """Beyond the bound nothing more is kept, and the log says so."""
    tier = open_tier(max_queued_bytes=1)
    for seed in (1, 2, 3):
        tier.insert_cache(KEY, *caches.make_conversation(2, seed))
    assert sum("too much is waiting" in line for line in log()) == 2
    slow_disk.set()


def test_what_waits_counts_for_memory(open_tier, caches, slow_disk):
    """Prompt caches in memory give way to rows that wait to be written."""
    held = caches.make_conversation(2, 1)[1]
    size = sum(cache.nbytes for cache in held)
    tier = open_tier(max_bytes=2 * size)
    for seed in (1, 2, 3):
        tier.insert_cache(KEY, *caches.make_conversation(2, seed))
    waiting = tier._disk.queued_bytes
    assert waiting > 0
    assert tier.nbytes == size  # two would take all that is allowed
    tier.trim_to(n_bytes=waiting)
    assert tier.nbytes == 0
    slow_disk.set()


def test_what_is_computed_sooner_is_not_read(open_tier, caches, log):
    """Where loading is measured to be slower than prefill, it is declined."""
    tokens, held = caches.make_conversation(8, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier = restart(tier, open_tier)
    for number in range(4, 8):
        prompt = [*tokens[: 16 * number], 1]
        assert tier.fetch_nearest_cache(KEY, prompt)[1] == [1]
    tier.store.note_prefill(caches.MODEL, 1_000_000, 0.001)
    assert tier.fetch_nearest_cache(KEY, tokens) == (None, tokens)
    assert "declined: read in" in log()[-1]
    # A machine that computes slowly reads again.
    for _ in range(100):
        tier.store.note_prefill(caches.MODEL, 100, 1000.0)
    assert tier.fetch_nearest_cache(KEY, tokens)[1] == tokens[-1:]


def test_a_disk_slower_than_the_model_is_given_up(open_tier, caches, monkeypatch, log):
    """A read that takes longer than computing ends, and is not tried again at once."""
    tokens, held = caches.make_conversation(4, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier = restart(tier, open_tier)
    monkeypatch.setattr("kvstore.server.disk._MIN_READ_S", -1.0)
    tier.store.note_prefill(caches.MODEL, 1_000_000, 1e-6)
    assert tier.fetch_nearest_cache(KEY, tokens) == (None, tokens)
    assert "slower than the model: 16 of 63 tokens" in log()[-1]
    assert tier.fetch_nearest_cache(KEY, tokens) == (None, tokens)
    assert "declined: the disk was too slow just now" in log()[-1]


def test_hits_count_for_what_is_evicted(open_tier, caches):
    """The writing thread writes down what the reading one has used."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier = restart(tier, open_tier)
    tier.fetch_nearest_cache(KEY, tokens)
    tier.insert_cache(KEY, *caches.make_conversation(2, 2))
    tier.flush()
    with Store(tier.store.path) as other:
        assert other.stats().counters["hits"] == 1


def test_few_tokens_are_neither_kept_nor_read(open_tier, caches, log):
    """A prompt below the minimum costs no disk."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier(min_tokens=len(tokens) + 1)
    tier.insert_cache(KEY, tokens, held)
    tier.flush()
    assert not tier.store.entries()
    with Store(tier.store.path) as store:
        store.save(tokens, held, caches.MODEL)
    again = restart(tier, open_tier, min_tokens=len(tokens) + 1)
    assert again.fetch_nearest_cache(KEY, [*tokens, 1]) == (None, [*tokens, 1])


def test_the_disk_keeps_its_reserve(open_tier, caches, log):
    """Nothing is written that would leave less free than is reserved."""
    tier = open_tier(min_free_bytes=1 << 62)
    tier.insert_cache(KEY, *caches.make_conversation(2, 1))
    tier.flush()
    assert not tier.store.entries()
    assert any("are reserved" in line for line in log())


def test_a_conversation_is_one_entry(open_tier, caches):
    """Each turn takes the place of the one before; shared beginnings stay."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, caches.make_cache(32, 1), cache_type="system")
    for turn in range(3):
        tokens = [*tokens, *range(100 * turn, 100 * turn + 7)]
        held = caches.grow(held, caches.random_rows(7, turn + 5))
        tier.insert_cache(KEY, tokens, held)
        tier.flush()
    assert sorted(e.num_tokens for e in tier.store.entries()) == [32, 32 + 21]


def test_a_pinned_turn_stays(open_tier, caches):
    """What a person has pinned is not taken away by the turn that follows."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier.flush()
    (entry,) = tier.store.entries()
    tier.store.pin(entry.id)
    caches.grow(held, caches.random_rows(1, 3))
    tier.insert_cache(KEY, [*tokens, 1], held)
    tier.flush()
    assert len(tier.store.entries()) == 2


def test_damage_is_computed_anew(open_tier, caches, flip_bit, log):
    """A damaged block is a miss from there on, and is written again."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    tier.insert_cache(KEY, tokens, held)
    tier.close()
    (shard,) = (tier.store.path / "shards").glob("??/*.safetensors")
    flip_bit(shard, 8 * (shard.stat().st_size - 3))
    again = open_tier()
    found, rest = again.fetch_nearest_cache(KEY, [*tokens, 1])
    assert (found[0].offset, len(rest)) == (16, 17)
    assert caches.rows_of(found) == caches.rows_of(held, 0, 16)
    again.insert_cache(KEY, tokens, held)
    assert restart(again, open_tier).fetch_nearest_cache(KEY, [*tokens, 1])[1] == [1]


def test_a_stall_is_measured(open_tier, caches):
    """How long an insertion, or a step of a prefill, has kept its thread is known."""
    for keep in (DiskPromptCache.insert_cache, DiskPromptCache.keep_prefill):
        tier = open_tier()
        assert tier.longest_stall_s == 0
        begin = time.perf_counter()
        keep(tier, KEY, *caches.make_conversation(2, 1))
        assert 0 < tier.longest_stall_s < time.perf_counter() - begin
        tier.close()


def test_a_real_model_goes_on_with_the_same_bits(store_path, loaded):
    """After a restart, logits are those of a server that was never stopped."""
    from kvstore.models.session import prefill

    model, _, fingerprint = loaded
    served = ServedModel(fingerprint, (make_prompt_cache(model),))
    tokens = [(7 * i + 3) % 250 for i in range(70)]
    held = prefill(model, tokens)
    first = DiskPromptCache(Store(store_path, "planes+zstd"), lambda _: served)
    first.insert_cache(KEY, tokens, held)
    first.close()
    second = DiskPromptCache(Store(store_path, "planes+zstd"), lambda _: served)
    found, rest = second.fetch_nearest_cache(KEY, [*tokens, 5])
    second.close()
    assert rest == [5]
    expected, logits = (model(mx.array([[5]]), cache=c) for c in (held, found))
    assert mx.array_equal(expected, logits)


class Foreign:
    """A cache of a class that mlx-lm does not have."""

    offset = 5


class Unhashable:
    """A key as some servers have: the model itself."""

    __hash__ = None


def test_a_foreign_cache_costs_its_entry_only(open_tier, caches, log):
    """What is no cache of mlx-lm's is not kept, and raises nothing."""
    tier = open_tier()
    tier.insert_cache(KEY, [1, 2, 3, 4, 5], [Foreign()])
    assert any("not kept" in line for line in log())
    assert tier.fetch_nearest_cache(KEY, [1, 2, 3])[0] is None


def test_memory_holds_what_the_disk_cannot(open_tier, log):
    """A cache that nobody knows is served as mlx-lm's own class serves it."""

    class Unknown(Foreign):
        nbytes = 1
        is_trimmable = staticmethod(lambda: False)

    tier = open_tier()
    tier.insert_cache(KEY, [1, 2, 3, 4, 5], [Unknown()])
    found, rest = tier.fetch_nearest_cache(KEY, [1, 2, 3, 4, 5, 6])
    assert isinstance(found[0], Unknown)
    assert rest == [6]
    assert any("memory only: layer 0 is a Unknown" in line for line in log())


def test_what_waits_is_written_when_nobody_has_the_tier(store_path, models, caches):
    """A server need not call `close`; the end of the process is such an end, too."""
    tier = DiskPromptCache(Store(store_path, "raw"), models.__getitem__, min_tokens=1)
    tier.insert_cache(KEY, *caches.make_conversation(3, 1))
    del tier
    gc.collect()
    with Store(store_path) as store:
        assert len(store.entries()) == 1


@pytest.mark.parametrize("is_known", [True, False])
def test_a_key_that_cannot_be_hashed_raises_nothing(open_tier, caches, is_known):
    """The model is known by its fingerprint, or not at all."""
    tokens, held = caches.make_conversation(2, 1)
    tier = open_tier()
    if is_known:
        known = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
        tier._describe = lambda _: known
    tier.insert_cache(Unhashable(), tokens, held)
    rest = tier.fetch_nearest_cache(Unhashable(), tokens)[1]
    assert rest == (tokens[-1:] if is_known else tokens)


def test_a_malformed_fingerprint_is_refused_at_once():
    """Not by the thread that writes, when it is too late."""
    with pytest.raises(TypeError, match="dict of fields, not a str"):
        Fingerprint("ab" * 32)


def test_what_comes_after_the_end_is_not_kept(open_tier, caches, log):
    """The writing thread has gone: nothing may wait for it."""
    tier = open_tier()
    tier.close()
    tier.insert_cache(KEY, *caches.make_conversation(2, 1))
    assert any("it is closed" in line for line in log())
    assert tier.flush(timeout_s=60)


def test_an_insertion_does_not_wait_for_a_read(open_tier, caches):
    """Another thread may be reading from a slow disk."""
    tier = open_tier()
    tier.insert_cache(KEY, *caches.make_conversation(2, 1))
    with tier._disk._reading:
        work = caches.make_conversation(2, 2)
        mx.eval([cache.state for cache in work[1]])
        other = threading.Thread(target=tier.insert_cache, args=(KEY, *work))
        other.start()
        other.join(60)
        assert not other.is_alive()
    tier.flush()
    assert len(tier.store.entries()) == 2
