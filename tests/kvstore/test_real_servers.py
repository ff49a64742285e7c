"""Servers that others wrote, in processes of their own: moto's S3, and rclone's.

moto does what is needed; what it holds goes with the process.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from kit import load_beside

import kvstore
from kvstore.errors import RemoteError
from kvstore.remote.client import Limits
from kvstore.remote.probe import Probe
from kvstore.remote.remotes import make_remote

free_port = load_beside("servers").free_port
pytestmark = pytest.mark.slow
# rclone takes no shorter ones.
KEY, SECRET = "A" * 20, "b" * 40
LIMITS = Limits(5.0, 2.0, 1.0, 0, 1.0, tries=1)


class Server:
    """A server on a port of its own; `start` and `kill` as often as one likes."""

    def __init__(self, program, *words):
        self.port = free_port()
        found = shutil.which(program, path=Path(sys.executable).parent)
        assert found, f"{program} is not installed: see the extra `dev`"
        self._words = [found, *(word.format(port=self.port) for word in words)]
        self.start()

    def start(self):
        """Start it, and wait until it answers."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self._words, **quiet)
        deadline = time.monotonic() + 60
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self):
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    @property
    def remote(self):
        """A folder of its bucket."""
        options = {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1"}
        return make_remote("team", "s3://bucket/here", options, is_trusted=True)


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def server():
    server = Server("moto_server", "-p", "{port}")
    make_bucket(server)
    yield server
    server.kill()


def make_bucket(server):
    url = f"http://127.0.0.1:{server.port}/bucket"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()


@pytest.fixture
def opened(tmp_path, empty_store, server, caches):
    """Two stores, open and with the remote; the first has an entry."""
    paths = [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]
    with (
        kvstore.Store(paths[0], "raw") as left,
        kvstore.Store(paths[1], "raw") as right,
    ):
        tokens, cache = caches.make_conversation(5, 1, extra=3)
        left.save(tokens, cache, caches.MODEL, name="doc")
        probes = [store.remotes.add(server.remote) for store in (left, right)]
        assert [Probe(True, True, True, True)] * 2 == probes
        yield left, right


def test_all_that_is_needed_works(opened, caches):
    """Pushed, grown, pushed again, listed, and pulled by name and by tokens."""
    left, right = opened
    left.remotes.push("doc")
    tokens, cache = caches.make_conversation(9, 1, extra=5)
    left.save(tokens, cache, caches.MODEL, name="doc")
    assert 2 == left.remotes.push("doc").num_sent
    assert 0 == left.remotes.push("doc").num_sent
    assert ["doc"] == [one.entry.name for one in right.remotes.entries().values()]
    assert 64 == right.remotes.pull(tokens[:70], fingerprint=caches.MODEL).num_tokens
    assert len(tokens) == right.remotes.pull("doc").num_tokens
    mine, theirs = (s.load_entry("doc", caches.MODEL) for s in opened)
    assert (tokens, tokens) == (mine[1], theirs[1])
    assert caches.rows_of(mine[0]) == caches.rows_of(theirs[0])
    assert [] == right.verify()


def test_a_server_that_was_killed_is_gone_on_with(opened, server, caches):
    """While it is down, one clear error; then the same command does it."""
    left, right = opened
    server.kill()
    for store, work in ((left, "push"), (right, "pull")):
        client = store.remotes.client("team", LIMITS)
        with pytest.raises(RemoteError, match="remote `team`"):
            getattr(store.remotes, work)("doc", client)
    server.start()
    make_bucket(server)
    left.remotes.push("doc")
    right.remotes.pull("doc")
    tokens, _ = caches.make_conversation(5, 1, extra=3)
    assert tokens == right.load_entry("doc", caches.MODEL)[1]


def test_a_server_that_sends_ranges_as_if_they_were_all_is_refused(
    tmp_path, store_path
):
    """With rclone, 200 stands in place of 206, so nobody knows what has come."""
    (tmp_path / "served/bucket").mkdir(parents=True)
    words = ("serve", "s3", "--addr", "127.0.0.1:{port}", "--auth-key")
    server = Server("rclone", *words, f"{KEY},{SECRET}", str(tmp_path / "served"))
    try:
        with (
            kvstore.Store(store_path) as store,
            pytest.raises(RemoteError, match="sends no ranges"),
        ):
            store.remotes.add(server.remote)
    finally:
        server.kill()
