"""What a conversation leaves behind as it goes on is freed when the program ends."""

import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

import kvstore
from kvstore.errors import IntegrityError
from kvstore.ops import save


@pytest.fixture
def store(store_path):
    """A store of small blocks."""
    with kvstore.Store(store_path, "raw") as opened:
        yield opened


@pytest.fixture
def talk(store, caches):
    """A function that saves a conversation, a turn of some tokens at a time."""

    def save(*turns, name="chat", seed=1):
        cache, tokens = None, []
        for number, size in enumerate(turns):
            cache = caches.grow(cache, caches.random_rows(size, seed + number))
            tokens = tokens + [seed + number] * size
            store.save(tokens, cache, caches.MODEL, name=name)
        return tokens, cache

    return save


def test_ten_turns_leave_little_that_is_dead(store, talk):
    """Of each turn the full blocks stay, and the last tail; a quarter more at most."""
    talk(*[9] * 10)
    before = store.stats()
    assert before.nbytes > 1.5 * before.reached_bytes
    store.free_tails()
    after = store.stats()
    assert after.nbytes < 1.25 * after.reached_bytes
    assert store.verify() == []
    assert len(store.load_entry("chat", None)[1]) == 90


def test_a_tail_of_another_entry_stays(store, talk, caches):
    """Who has kept the conversation as it was, in any process, keeps it."""
    tokens, cache = talk(20)
    with kvstore.Store(store.path, "raw") as other:
        other.save(tokens, cache, caches.MODEL, name="kept")
    talk(20, 4)
    store.free_tails()
    store.load_entry("kept", None)
    store.load_entry("chat", None)
    assert store.verify() == []


def test_a_save_under_way_writes_what_was_freed(store, talk, caches, monkeypatch):
    """Another process counts on a tail that goes before its entry is there."""
    tokens, cache = talk(20)
    original, freed = save.save_blocks, []

    def save_blocks(*args):
        original(*args)
        if not freed:
            freed.append(True)
            talk(20, 4)
            store.free_tails()

    with kvstore.Store(store.path, "raw") as other:
        monkeypatch.setattr(save, "save_blocks", save_blocks)
        other.save(tokens, cache, caches.MODEL, name="late")
    assert freed
    assert store.load_entry("late", None)[1] == tokens


def test_a_snapshot_that_counts_on_a_freed_tail_is_refused(store, talk, caches):
    """It was not acknowledged, and what was stays as it is; a new one has all rows."""
    tokens, cache = talk(20, 4)
    with kvstore.Store(store.path, "raw") as other:
        snapshot = other.snapshot(tokens, cache, caches.MODEL)
        whole = [*tokens, *range(4)]
        whole_cache = caches.grow(cache, caches.random_rows(4, 7))
        store.save(whole, whole_cache, caches.MODEL, name="chat")
        store.free_tails()
        with pytest.raises(IntegrityError, match="vanish"):
            other.save_snapshot(snapshot, name="late")
        found, held = store.load_entry("chat", None)
        assert held == whole
        assert caches.rows_of(found) == caches.rows_of(whole_cache)
        assert [entry.name for entry in store.entries()] == ["chat"]
        assert store.verify() == []
        whole_cache[0].trim(4), whole_cache[1].trim(4)
        snapshot = other.snapshot(tokens, whole_cache, caches.MODEL)
        other.save_snapshot(snapshot, name="late")
    assert store.load_entry("late", None)[1] == tokens


def test_a_damaged_entry_stops_it(store, talk):
    """Nobody knows what an entry needs that cannot be read."""
    talk(20, 4)
    talk(9, name="other", seed=5)
    before = store.stats().nbytes
    (store.path / "entries" / f"{store.entry('other').id}.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        store.free_tails()
    assert store.stats().nbytes == before


def test_windows_to_go_back_to_stay(store, caches):
    """Of a model with windows, an older tail is the only way back."""
    cache = [RotatingKVCache(max_size=8), KVCache()]
    for size in (20, 24):
        caches.grow(cache, caches.random_rows(size - cache[1].offset, size))
        store.save(list(range(size)), cache, caches.MODEL, name="chat")
    before = store.stats().nbytes
    store.free_tails()
    assert store.stats().nbytes == before


def test_generate_frees_the_tail_of_its_last_turn(run_cli, tiny_model, tmp_path):
    """At the end of a command, without being asked."""
    words = ("--model", tiny_model, "--name", "chat", "--max-tokens", 4)
    for prompt in ("One.", "Two.", "Three."):
        code, _, err = run_cli("generate", *words, "--prompt", prompt)
        assert code == 0, err
    with kvstore.Store(tmp_path / "store") as store:
        found = store.stats()
    assert (found.num_shards, found.num_entries) == (1, 1)
