"""What is evicted first: uses fade, and what is computed slowly is kept longer."""

import time
from dataclasses import replace

import pytest

import kvstore
from kvstore.ops.upkeep import prune
from kvstore.ops.upkeep.prune import eviction_order
from kvstore.ops.worth import HALF_LIFE_S, sum_uses
from kvstore.storage.index import Index


@pytest.fixture
def clock(monkeypatch):
    """Sets the time; days of it pass in no time."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def pass_days(days):
        now[0] += days * 86_400

    return pass_days


def use(path, tokens, model, times):
    """Load a conversation in as many processes' lives."""
    for _ in range(times):
        with kvstore.Store(path) as store:
            assert len(store.load([*tokens, 9], model)[1]) == 1


def order(path, names):
    """Return the numbers of conversations as they would be evicted."""
    with kvstore.Store(path) as store:
        return [names[entry.num_tokens] for entry in store.run(eviction_order)]


def test_two_uses_at_once_count_as_one_that_is_a_half_life_later():
    """And what is old adds next to nothing."""
    assert sum_uses([100.0, 100.0]) == 100.0 + HALF_LIFE_S
    assert sum_uses([sum_uses([100.0, 100.0])] * 2) == 100.0 + 2 * HALF_LIFE_S
    assert 0 < sum_uses([0.0, 20 * HALF_LIFE_S]) - 20 * HALF_LIFE_S < 1


def test_what_is_asked_once_goes_before_what_goes_on(store_path, caches, clock):
    """A sub-agent's prompt of today is worth less than a chat that went on yesterday.

    Next month, neither helps: the chat goes first.
    """
    chat, helper = (caches.make_conversation(blocks, blocks) for blocks in (2, 3))
    names = {len(chat[0]): "chat", len(helper[0]): "helper"}
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*chat, caches.MODEL)
    use(store_path, chat[0], caches.MODEL, times=4)
    clock(1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*helper, caches.MODEL)
    assert order(store_path, names) == ["helper", "chat"]
    clock(30)
    use(store_path, helper[0], caches.MODEL, times=1)
    assert order(store_path, names) == ["chat", "helper"]


def test_a_hit_in_what_others_share_is_no_use(store_path, caches, clock):
    """Whoever asks for the shared rules keeps neither of two chats under them."""
    rows = caches.random_rows(64, 1)
    rules = list(range(32))
    older, newer = (
        ([*rules, *range(start, start + length)], caches.grow(None, rows[..., :end, :]))
        for start, length, end in ((100, 16, 48), (200, 32, 64))
    )
    names = {48: "older", 64: "newer"}
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*older, caches.MODEL)
        clock(0.1)
        store.save(*newer, caches.MODEL)
    use(store_path, rules, caches.MODEL, times=8)
    assert order(store_path, names) == ["older", "newer"]
    use(store_path, older[0], caches.MODEL, times=1)
    assert order(store_path, names) == ["newer", "older"]


def test_what_takes_long_to_compute_is_kept_longer(store_path, caches, clock):
    """Rows of a fast model go before those of a slow one that are a day older."""
    slow, fast = caches.MODEL, caches.OTHER_WEIGHTS
    first, second = (caches.make_conversation(blocks, 1) for blocks in (2, 3))
    names = {len(first[0]): "slow", len(second[0]): "fast"}
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*first, slow)
        clock(1)
        store.save(*second, fast)
        assert order(store_path, names) == ["slow", "fast"]
        store.note_prefill(slow, 1000, 40.0)
        store.note_prefill(fast, 1000, 1.0)
    assert order(store_path, names) == ["fast", "slow"]


def test_entries_of_tenants_are_as_slow_as_their_model(store_path, caches, clock):
    """And so is what was re-anchored: a speed is the model's, whoever asks for it."""
    slow, fast = caches.MODEL, caches.OTHER_WEIGHTS
    names, models = {}, {"fast": fast.with_salt("b"), "slow": slow.with_salt("a")}
    with kvstore.Store(store_path, codec="raw") as store:
        for number, (name, model) in enumerate(reversed(models.items())):
            tokens, prompt_cache = caches.make_conversation(2 + number, 1)
            names[len(tokens)] = name
            store.save(tokens, prompt_cache, model)
            clock(1)
        assert order(store_path, names) == ["slow", "fast"]
        store.note_prefill(slow, 1000, 40.0)
        store.note_prefill(fast.with_salt("c"), 1000, 1.0)
    assert order(store_path, names) == ["fast", "slow"]


def test_worth_is_asked_for_only_where_something_goes(store_path, caches, monkeypatch):
    """A plan that evicts nothing reads neither uses nor speeds."""
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*caches.make_conversation(2, 1), caches.MODEL)
        monkeypatch.setattr(prune, "advantages", None)
        monkeypatch.setattr(Index, "uses", None)
        assert store.plan_prune(max_bytes=10**9).entries == ()
        with pytest.raises(TypeError):
            store.plan_prune(max_bytes=1)


def test_a_helper_model_keeps_to_its_own_limit(store_path, caches, clock):
    """However much it asks, the conversation of three days ago stays."""
    helper = replace(caches.OTHER_WEIGHTS, label="helper")
    chat, *prompts = (caches.make_conversation(3, seed) for seed in range(9))
    limit, evicted = 0, []

    def ask(conversations):
        with kvstore.Store(
            store_path, "raw", limits={"helper": limit}, on_evict=evicted.append
        ) as store:
            for prompt in conversations:
                clock(0.1)
                store.save(*prompt, helper)
            held = [e for e in store.entries() if e.model == "helper"]
            return len(held), sum(entry.nbytes for entry in held)

    with kvstore.Store(store_path, "raw") as store:
        size = store.save(*chat, caches.MODEL).nbytes
        store.set_limit(100 * size)
    clock(3)
    limit = 4 * size
    assert ask(prompts) == (3, 3 * size)
    assert {entry.model for entry in evicted} == {"helper"}
    with kvstore.Store(store_path, "raw") as store:
        for tokens, is_there in [
            (chat, True),
            (prompts[-1], True),
            (prompts[0], False),
        ]:
            model = caches.MODEL if tokens is chat else helper
            assert bool(store.lookup([*tokens[0], 1], model).num_tokens) == is_there


def test_at_the_limit_of_all_a_model_past_its_own_goes_first(store_path, caches, clock):
    """Though what it has was used later than everything else."""
    helper = replace(caches.OTHER_WEIGHTS, label="helper")
    first, *prompts = (caches.make_conversation(3, seed) for seed in range(4))
    with kvstore.Store(store_path, "raw") as store:
        size = store.save(*first, caches.MODEL).nbytes
        for prompt in prompts:
            clock(1)
            store.save(*prompt, helper)
    with kvstore.Store(store_path, "raw", limits={"helper": size * 5 // 2}) as store:
        plan = store.plan_prune()
        assert [entry.model for entry in plan.entries] == ["helper"]
        plan = store.plan_prune(max_bytes=2 * size)
        assert [e.model for e in plan.entries[:2]] == ["helper", caches.MODEL.label]
