"""What conversations with a server cost is kept: counts and a reason, and no text."""

import json
import signal
import sqlite3
import time
from dataclasses import replace

import pytest
from kit import load_beside

import kvstore
from kvstore.ops.scores import MAX_SCORES, add
from kvstore.storage.index import Score

beside = load_beside("servers")


def request(number, *, computed=100, memory=0, generated=10, why="text", at=0.0):
    """Return the score of one request of a conversation."""
    name = number.to_bytes(8, "big")
    tokens = computed + memory + generated
    return Score(
        name, "model", "m", 1, memory, 0, 0, computed, 0, 0, why, tokens, at, at
    )


def test_what_is_new_is_not_computed_again():
    """A prompt that goes on from the one before and its reply costs what it adds."""
    score = add(None, request(1, computed=1000))
    score = add(score, request(1, memory=1010, computed=40))
    assert (score.num_computed, score.num_again, score.why) == (1040, 0, "")
    score = add(score, request(1, memory=20, computed=1070, why="clock"))
    assert (score.num_again, score.worst, score.why) == (1040, 1040, "clock")
    # The worst request says why, a little is no reason.
    score = add(score, request(1, memory=1000, computed=150, why="tools"))
    assert (score.num_requests, score.worst, score.why) == (4, 1040, "clock")


def test_the_latest_are_kept(store_path):
    """Through a restart, and no more than there may be."""
    with kvstore.Store(store_path) as store:
        for number in range(MAX_SCORES + 10):
            store.notes.add_request(request(number, at=float(number)))
        assert len(store.scores()) == MAX_SCORES
        store.notes.add_request(request(100, memory=110, computed=5, at=1e6))
    with kvstore.Store(store_path) as store:
        found = store.scores()
        assert len(found) == MAX_SCORES
        assert found[0] == replace(
            request(100, computed=105, memory=110, why=""),
            id=found[0].id,
            num_requests=2,
            num_tokens=125,
            began_at=100.0,
            used_at=1e6,
        )


def test_purging_forgets_them(store_path, caches, run_cli):
    """The hash of how a conversation begins would tell who guesses it."""
    with kvstore.Store(store_path) as store:
        store.save([1, 2, 3], caches.make_cache(3), caches.MODEL, name="it")
        store.notes.add_request(request(1))
        assert store.scores()
    assert run_cli("rm", "it", "--purge", "--yes", store=store_path)[0] == 0
    with kvstore.Store(store_path) as store:
        assert store.scores() == []


def test_who_guesses_how_a_conversation_begins_cannot_tell(tmp_path):
    """What is written is hashed with a key of the store, which a restart keeps."""
    ids = []
    for folder in ("one", "one", "other"):
        with kvstore.Store(tmp_path / folder) as store:
            store.notes.add_request(request(1))
            ids += [score.id for score in store.scores()]
    assert request(1).id not in ids
    assert ids[0] == ids[1] != ids[2]


def test_models_that_are_asked_the_same_are_kept_apart(store_path):
    """A helper that is shown how the conversation begins makes no prompt shorter."""
    with kvstore.Store(store_path) as store:
        store.notes.add_request(request(1, computed=5000))
        store.notes.add_request(replace(request(1, computed=300), fingerprint="helper"))
        store.notes.add_request(request(1, memory=5010, computed=40))
        found = {score.fingerprint: score for score in store.scores()}
        assert found["model"].num_requests == 2
        assert [score.num_again for score in found.values()] == [0, 0]


def test_a_purge_reaches_what_a_server_has_not_written_yet(store_path):
    """What it notes from then on is kept, under another key."""
    with kvstore.Store(store_path) as server, kvstore.Store(store_path) as other:
        server.notes.add_request(request(2, at=time.time()))
        server.scores()
        before = server.scores()[0].id
        server.notes.add_request(request(1, at=time.time()))
        other.purge()
        server.notes.add_request(request(2, at=time.time()))
        (left,) = server.scores()
        assert left.num_computed == request(2).num_computed
        assert left.id != before


@pytest.mark.parametrize(
    "change", ["scores SET num_tokens = 'x'", "score_key SET key = 1"]
)
def test_a_damaged_score_takes_nothing_else_with_it(store_path, change):
    """What is noted beside it is written, and scores are kept from then on."""
    with kvstore.Store(store_path) as store:
        store.notes.add_request(request(1))
        store.scores()
        with sqlite3.connect(store_path / "index.sqlite") as index:
            index.execute(f"UPDATE {change}")
        store.notes.add_reanchored(0.5)
        store.notes.add_request(request(1))
        assert store.stats().counters["reanchored_checks"] == 1
        store.notes.add_request(request(1, at=time.time()))
        assert len(store.scores()) == 1


def test_an_index_of_an_earlier_release_has_none(store_path):
    """And is read all the same."""
    with kvstore.Store(store_path) as store:
        assert store.scores() == []


SECRET = "The treasurer is called Wilhelmina. "


@pytest.mark.slow
def test_serve_keeps_score(tiny_model, tmp_path, run_cli):
    """Of each conversation, also after a kill; a clock is given as the reason."""
    servers = beside.Servers(tmp_path / "home")
    store, said = tmp_path / "store", [{"role": "user", "content": SECRET * 20}]
    server = servers.kvstore(store, tiny_model)
    for turn in range(4):
        head = f"It is 2026-11-27, 09:{turn:02}:17. Answer."
        answer = server.ask([{"role": "system", "content": head}, *said])
        said += [
            {"role": "assistant", "content": beside.said(answer)},
            {"role": "user", "content": "And then? " * 10},
        ]
    server.ask("Something else, by somebody else. " * 10)
    # What a request has cost is written by the next save.
    server.wait_for("kept", 60)
    server.ask("A third thing, so that there is a save. " * 10)
    server.stop(signal.SIGTERM)
    server = servers.kvstore(store, tiny_model)
    server.ask([{"role": "system", "content": head.replace(":03:", ":59:")}, *said])
    assert server.stop() == 0
    servers.close()
    code, out, _ = run_cli("--json", "stats", "--sessions", store=store)
    assert code == 0
    first = json.loads(out)[0]
    assert first["num_requests"] == 5
    assert first["cause"] == "clock"
    assert "last message" in first["why"]
    assert first["num_again"] > 3 * len(SECRET) * 20
    assert len(json.loads(out)) == 3
    code, out, _ = run_cli("stats", "--sessions", store=store)
    assert "3 sessions" in out
    rows = sqlite3.connect(store / "index.sqlite").execute("SELECT * FROM scores")
    assert not any("Wilhelmina" in str(value) for row in rows for value in row)
