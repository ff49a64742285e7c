"""A remote behind a server's memory and disk: what it finds, and what it may cost."""

import shutil
import threading
import time

import pytest
from mlx_lm.models.cache import KVCache

from kvstore import Store
from kvstore.errors import KVStoreError
from kvstore.remote.remotes import make_remote
from kvstore.server import DiskPromptCache, ServedModel
from kvstore.server import remote as tiers
from kvstore.server.remote import RemoteTier

BLOCK = 16
KEY = ("model", None, None)


@pytest.fixture
def paths(tmp_path, empty_store, s3_server):
    """Two stores with one remote, as of two servers."""
    url, options = "s3://bucket/some/where", s3_server.options
    remote = make_remote("team", url, options, is_trusted=True)
    paths = [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]
    for path in paths:
        with Store(path, "raw") as store:
            store.remotes.add(remote)
    return paths


@pytest.fixture
def serve(paths, caches):
    """A function that starts the prompt cache of one of the servers."""
    opened = []

    def open_(which, *, exact=False, **options):
        store = Store(paths[which], "raw")
        tier = RemoteTier(store, **{"timeout_s": 60.0, **options})
        model = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
        opened.append(
            DiskPromptCache(
                store, lambda key: model, min_tokens=1, exact=exact, remote=tier
            )
        )
        return opened[-1]

    yield open_
    for prompt_cache in opened:
        prompt_cache.close()


@pytest.fixture
def pushed(paths, caches):
    """Tokens and rows of an entry that the first store has pushed."""
    tokens, cache = caches.make_conversation(4, 1, extra=3)
    with Store(paths[0], "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
        store.remotes.push("doc")
    return tokens, cache


def test_what_another_pushed_is_found(serve, pushed, caches, s3_server, paths):
    """Looked for once, pulled without its name, and on disk from then on."""
    tokens, cache = pushed
    served = serve(1)
    found, rest = served.fetch_nearest_cache(KEY, [*tokens, 7])
    assert [7] == rest
    assert caches.rows_of(cache) == caches.rows_of(found)
    s3_server.log.clear()
    assert [7] == served.fetch_nearest_cache(KEY, [*tokens, 7])[1]
    assert [] == s3_server.log
    with Store(paths[1]) as store:
        assert [None] == [entry.name for entry in store.entries()]


def test_of_a_prompt_that_goes_on_otherwise_the_shared_blocks_come(serve, pushed):
    """No more than they is read."""
    prompt = [*pushed[0][: 2 * BLOCK + 5], 7, 7]
    assert 7 == len(serve(1).fetch_nearest_cache(KEY, prompt)[1])


def test_what_is_saved_is_offered(serve, caches):
    """A second server finds what the first has computed."""
    tokens, cache = caches.make_conversation(3, 2)
    first = serve(0, is_pushing=True)
    first.insert_cache(KEY, tokens, cache)
    assert first.flush()
    assert first._disk._remote.flush(60)
    assert [7] == serve(1).fetch_nearest_cache(KEY, [*tokens, 7])[1]


def test_without_a_word_nothing_is_sent(serve, caches, s3_server):
    """A remote that is only looked in gets nothing."""
    first = serve(0)
    first.insert_cache(KEY, *caches.make_conversation(3, 2))
    assert first.flush()
    assert not s3_server.keys("/v1/entries/")


def test_a_remote_that_is_down_is_pushed_to_later(
    serve, caches, s3_server, monkeypatch
):
    """What waits meanwhile is sent when it is back."""
    monkeypatch.setattr(tiers, "_PAUSE_S", 0.2)
    s3_server.fault = lambda request: 503
    first = serve(0, is_pushing=True, timeout_s=0.1)
    first.insert_cache(KEY, *caches.make_conversation(3, 2))
    assert first.flush()
    assert not first._disk._remote.flush(0.3)
    s3_server.fault = lambda request: None
    assert first._disk._remote.flush(60)
    assert 1 == len(s3_server.keys("/v1/entries/"))


def test_a_slow_remote_is_waited_for_once_and_comes_later(
    serve, pushed, s3_server, log
):
    """The next prompt asks it nothing; what came meanwhile is on disk."""
    prompt = [*pushed[0], 7]
    s3_server.fault = lambda request: time.sleep(0.3)
    served = serve(1, timeout_s=0.1)
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    assert any("takes longer than 0.1 s" in line for line in log())
    s3_server.fault = lambda request: None
    assert served._disk._remote._is_idle.wait(60)
    assert [7] == served.fetch_nearest_cache(KEY, prompt)[1]


@pytest.fixture
def lingering(monkeypatch):
    """Threads that pull live on behind their work, as on a busy machine."""
    end, run = threading.Event(), threading.Thread.run

    def run_on(self):
        run(self)
        if self.name == "kvstore-pull":
            end.wait(60)

    monkeypatch.setattr(threading.Thread, "run", run_on)
    yield
    end.set()


def test_a_remote_that_fails_is_left_alone_for_a_while(
    serve, pushed, s3_server, lingering
):
    """One prompt pays for it; after the pause it is asked again."""
    prompt = [*pushed[0], 7]
    s3_server.fault = lambda request: 503
    served = serve(1)
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    num_asked = len(s3_server.log)
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    assert num_asked == len(s3_server.log)
    s3_server.fault = lambda request: None
    served._disk._remote._asked_again_at = 0.0
    assert [7] == served.fetch_nearest_cache(KEY, prompt)[1]


def test_what_is_computed_sooner_is_not_pulled(serve, pushed, s3_server, caches):
    """Three pulls have told how long one takes."""
    served = serve(1)
    tier, digest = served._disk._remote, caches.MODEL.digest
    served.store.note_prefill(caches.MODEL, 10_000, 0.001)
    for _ in range(3):
        new = tiers.observe(digest, "remote", 67, seconds=1.0, at=time.time())
        tier._pulls[digest] = tiers.add(tier._pulls.get(digest), new)
    prompt = [*pushed[0], 7]
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    assert "remote declined" in served.lookup_of(prompt).reason
    assert not s3_server.sent("GET", "/v1/shards/")


def test_poison_is_named_and_serves_nobody(serve, pushed, s3_server, log):
    """The server goes on, and does not ask for it at each prompt."""
    (shard,) = s3_server.keys("/v1/shards/")
    data = s3_server.objects[shard]
    s3_server.objects[shard] = data[:-1] + bytes([data[-1] ^ 1])
    prompt = [*pushed[0], 7]
    served = serve(1)
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    assert any("is refused" in line for line in log())
    s3_server.log.clear()
    assert prompt == served.fetch_nearest_cache(KEY, prompt)[1]
    assert [] == s3_server.log


def test_rows_of_fewer_bits_than_are_wanted_are_not_pulled(
    paths, serve, caches, s3_server
):
    """Their headers tell, before any row is read."""
    tokens, cache = caches.make_conversation(3, 1)
    with Store(paths[0], "turbo4") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
        store.remotes.push("doc")
    s3_server.log.clear()
    assert [*tokens, 7] == serve(1, exact=True).fetch_nearest_cache(KEY, [*tokens, 7])[
        1
    ]
    assert 1 == s3_server.sent("GET", "/v1/shards/")


def test_a_remote_that_the_store_does_not_know_is_an_error(paths):
    """At the start, not at the first prompt."""
    with Store(paths[0]) as store, pytest.raises(KVStoreError, match="no remote `x`"):
        RemoteTier(store, "x")
