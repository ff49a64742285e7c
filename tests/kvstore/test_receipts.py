"""What re-anchoring costs is measured behind the back of a server, and bounded."""

import json
import logging
import math
import queue
import weakref
from contextlib import closing
from types import SimpleNamespace

import mlx.core as mx
import pytest
from kit import load_beside
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.caches.reanchor import head
from kvstore.server import DiskPromptCache, ServedModel, app
from kvstore.server.generator import mixed_generator
from kvstore.server.provider import Provider
from kvstore.server.receipts import Receipts

architectures, beside = load_beside("architectures"), load_beside("servers")
HEAD, TAIL = (
    list(range(10, 40)),
    [(7 * i * i + 3 * i + i // 9) % 89 + 10 for i in range(300)],
)
REPLY = [11, 52, 7, 33, 90, 41, 18, 77, 5, 60]


def prompt(number):
    """Return a prompt whose head differs from all others."""
    return [*HEAD, number, number + 3, number + 1, *TAIL, 5]


def make_model(sharpness=1.0):
    """Return a model; where attention is sharp, what was read before matters more."""
    made = architectures.make_model("llama", layer_types=["full_attention"] * 4)
    for layer in made.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            part = getattr(layer.self_attn, name)
            part.weight = part.weight * sharpness
    return made


def feed(model, tokens, prompt_cache):
    """Return the log probabilities of what follows each token."""
    logits = model(mx.array([tokens]), cache=prompt_cache)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Server:
    """What `serve` is made of, without mlx-lm's part."""

    def __init__(self, store_path, model, fingerprint, max_kl):
        self.model, self.measured = model, []
        self.near = kvstore.Reanchoring(model)
        self.receipts = Receipts(model, max_kl, self.measured.append, self.stop)
        self.tier = DiskPromptCache(kvstore.Store(store_path, "raw"), self.describe)
        self.fingerprint, self.close = fingerprint, self.tier.close

    def describe(self, _):
        """Return the model as a server has it."""
        empty = (make_prompt_cache(self.model),)
        return ServedModel(
            self.fingerprint, empty, near=self.near, receipts=self.receipts
        )

    def stop(self):
        """Re-anchor nothing any more."""
        self.near = self.receipts = None

    def ask(self, tokens):
        """Serve a request; return how many rows were re-anchored, and the cache."""
        held, rest = self.tier.fetch_nearest_cache("m", tokens)
        held = held or make_prompt_cache(self.model)
        mx.eval(feed(self.model, [*rest, *REPLY], held))
        self.tier.insert_cache("m", [*tokens, *REPLY], held)
        assert self.tier.flush()
        return self.tier.lookup_of(tokens).num_reanchored, held

    def work(self):
        """Do all that there is to do, and return in how many steps."""
        for number in range(1000):
            if self.receipts is None or not self.receipts.step():
                return number
        raise AssertionError


@pytest.fixture
def log(caplog, monkeypatch):
    """A function that returns what was logged so far."""
    monkeypatch.setattr(logging.getLogger("kvstore"), "propagate", True)
    caplog.set_level(logging.INFO, "kvstore")
    return lambda text: [r for r in caplog.records if text in r.getMessage()]


def test_what_is_measured_is_what_the_exact_rows_say(store_path, caches):
    """A little at a time, and nothing that the server holds is changed by it."""
    model = make_model()
    with closing(Server(store_path, model, caches.MODEL, 1.0)) as server:
        server.ask(prompt(1))
        assert server.work() == 0
        moved, held = server.ask(prompt(2))
        assert moved > 200
        before = [mx.array(cache.keys) for cache in held]
        assert server.work() > len(prompt(2)) // 32
        tokens = [*prompt(2), *REPLY]
        exact = make_prompt_cache(model)
        feed(model, tokens[:-64], exact)
        right = feed(model, tokens[-64:], exact)
        for cache in held:
            cache.trim(64)
        found = feed(model, tokens[-64:], held)
        kl = (mx.exp(right) * (right - found)).sum(axis=-1).mean().item()
        assert server.measured == [pytest.approx(kl, rel=0.05, abs=1e-7)]
        assert kl > 1e-7
        for cache, keys in zip(held, before, strict=True):
            rows = len(tokens) - 64
            assert mx.array_equal(cache.keys[:, :, :rows], keys[:, :, :rows])


def test_a_request_in_between_is_answered_as_ever(store_path, caches):
    """In the middle of a comparison."""
    model = make_model()
    with closing(Server(store_path, model, caches.MODEL, 1.0)) as server:
        server.ask(prompt(1))
        server.ask(prompt(2))
        expected = feed(model, TAIL[:50], make_prompt_cache(model)).tolist()
        for _ in range(7):
            assert server.receipts.step()
            assert feed(model, TAIL[:50], make_prompt_cache(model)).tolist() == expected
        server.work()
        assert len(server.measured) == 1


def test_one_request_in_eight_is_measured(store_path, caches):
    """The first, and none that had no re-anchored rows."""
    with closing(Server(store_path, make_model(), caches.MODEL, 1.0)) as server:
        for number in range(11):
            moved, _ = server.ask(prompt(number))
            assert (moved > 0) == (number > 0)
            server.work()
        assert len(server.measured) == 2
        server.tier.store.notes.add_reanchored(server.measured[0])
        stats = server.tier.store.stats()
        assert stats.reanchored_kl == pytest.approx(server.measured[0], abs=1e-9)
        assert stats.counters["reanchored_checks"] == 1


def test_a_model_that_it_does_not_suit_is_left_alone(store_path, caches, log):
    """The budget that one keeps is beyond another, whose prompts are computed then."""
    found = {}
    for name, sharpness in (("blunt", 1.0), ("sharp", 12.0)):
        model = make_model(sharpness)
        path = store_path / name
        with closing(Server(path, model, caches.MODEL, 0.05)) as server:
            server.ask(prompt(1))
            moved = []
            for number in (2, 3, 4):
                moved.append(server.ask(prompt(number))[0] > 0)
                server.work()
            # What was re-anchored is in memory still, and is not found there.
            server.tier.fetch_nearest_cache("m", [*prompt(2), *REPLY, 1])
            again = server.tier.lookup_of([*prompt(2), *REPLY, 1])
            found[name] = moved, again.num_reanchored > 0
            assert again.from_memory + again.from_disk >= len(HEAD)
    assert found["blunt"] == ([True, True, True], True)
    assert found["sharp"] == ([True, False, False], False)
    assert len(log("nothing is re-anchored any more")) == 1


def test_one_more_cache_is_held_at_a_time(store_path, caches, monkeypatch):
    """The exact rows are gone before those that are compared with them are copied."""
    made, alive = [], []

    def make(model):
        found = make_prompt_cache(model)
        made.extend(map(weakref.ref, found))
        return found

    def copy(prompt_cache, num_tokens):
        alive.append(sum(one() is not None for one in made))
        return head(prompt_cache, num_tokens)

    model = make_model()
    with closing(Server(store_path, model, caches.MODEL, 1.0)) as server:
        server.ask(prompt(1))
        server.ask(prompt(2))
        monkeypatch.setattr("mlx_lm.models.cache.make_prompt_cache", make)
        monkeypatch.setattr("kvstore.server.receipts.head", copy)
        server.work()
    assert len(server.measured) == 1
    assert (len(made), alive) == (4, [0] * 4)


def test_what_is_no_number_is_beyond_every_budget(store_path):
    """As where logits overflow: it is not counted, and nothing is re-anchored."""
    stopped = []
    with kvstore.Store(store_path) as store:
        receipts = Receipts(
            None, 1.0, store.notes.add_reanchored, lambda: stopped.append(1)
        )
        receipts._judge(math.nan)
        assert stopped == [1]
        assert store.stats().reanchored_kl is None


def test_a_model_that_is_loaded_again_stays_stopped(caches):
    """Where a server goes from one model to another, and back."""
    provider = Provider.__new__(Provider)
    vars(provider).update(
        model=make_model(), _reanchor=1.0, _note_kl=[].append, _stopped=set()
    )
    for loaded, is_near in (("a", True), ("b", True), ("a", False), ("b", True)):
        provider.loaded = caches.MODEL.with_salt(loaded)
        provider._measure()
        assert (provider.near is not None) == is_near
        if loaded == "a" and is_near:
            provider._stop_reanchoring()


def test_it_works_only_while_nothing_is_asked():
    """After a second of that, and who comes is served before the next step."""
    kind = mixed_generator(app._copy_module("mlx_lm.server"))
    generator, steps = kind.__new__(kind), []
    receipts = SimpleNamespace(step=lambda: steps.append(1) or True)
    waits, get = [], queue.Queue.get

    class Requests(queue.Queue):
        def get(self, block=True, timeout=None):
            waits.append(timeout)
            return get(self, block, 0.0)

    vars(generator).update(
        requests=Requests(),
        model_provider=SimpleNamespace(receipts=receipts),
        _num_idle=0,
        _is_distributed=False,
    )
    for _ in range(10):
        assert generator._next_request(0.0) is None
    assert steps == []
    for _ in range(5):
        assert generator._next_request(10.0) is None
    assert waits == [0.0] * 15
    assert len(steps) == 5
    generator._next_request(None)  # a batch is being computed
    assert generator._next_request(0.0) is None
    generator._num_idle = 100
    generator.requests.put("a request")
    assert generator._next_request(10.0) == "a request"
    assert len(steps) == 5
    assert generator._num_idle == 0


@pytest.mark.slow
def test_a_server_keeps_to_its_budget(tiny_model, tmp_path, run_cli):
    """`serve --reanchor-max-kl`: measured, told by `stats`, and stopped beyond it."""
    for budget, goes_on in (("9", True), ("0", False)):
        servers = beside.Servers(tmp_path / f"home{budget}")
        store = tmp_path / f"store{budget}"
        server = servers.kvstore(store, tiny_model, "--reanchor-max-kl", budget)
        moved = []
        for turn in range(3):
            head = f"Today is Monday, 09:{turn:02}:17. Answer briefly."
            text = "Read the file, and say what is in it. " * (20 + turn)
            roles = [("system", head), ("user", text)]
            answer = server.ask([{"role": r, "content": c} for r, c in roles])
            moved.append(answer.usage.kvstore["reanchored_tokens"] > 0)
            if turn == 1:
                server.wait_for("moved what is said next by KL")
            server.wait_for_kept(answer.usage.prompt_tokens - 1)
        assert moved == [False, True, goes_on]
        assert ("nothing is re-anchored any more" in server.text()) != goes_on
        servers.close()
        found = json.loads(run_cli("stats", "--json", store=store)[1])
        assert found["counters"]["reanchored_checks"] == 1
        assert "moved what is said by KL" in run_cli("stats", store=store)[1]
