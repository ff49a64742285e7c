"""An object store behind a bad connection, and one that somebody has poisoned."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kvstore
from kvstore.errors import IntegrityError, RemoteError, SignerError
from kvstore.format.signature import new_secret
from kvstore.remote.client import Client, Limits
from kvstore.remote.layout import (
    EntryKey,
    RemoteEntry,
    document_of,
    parse_document,
    signed,
)
from kvstore.remote.remotes import make_remote
from kvstore.storage.keys import signing_key

FAULTS = ("cut", "stall", "corrupt")
NAMES = ("a", "b", "c")
# What a client waits for, and what a stalled connection takes longer than.
_SILENCE_S, _STALL_S = 0.3, 0.8
_LIMITS = Limits(2.0, _SILENCE_S, 1.0, 0, 1.0, tries=2)
_TRIES = 200
_BUCKET = "kvstore-campaign"


class Proxy:
    """Hands TCP connections on to a server, and breaks those that it is told to.

    Args:
        endpoint: URL of the server.
        choose: Called with the first bytes of each request; returns a fault or nothing.
            ``cut``, ``stall`` and ``corrupt`` happen to the reply, behind some of its
            bytes; with ``lose`` the server does as it was asked, and nobody is told.
        chance: Where in a reply.

    Attributes:
        counts: How often each fault has happened.
    """

    def __init__(
        self,
        endpoint: str,
        choose: Callable[[bytes], str | None],
        chance: random.Random,
    ) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port or 80)
        self._choose, self._chance = choose, chance
        self.counts: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        # A thread that waits in `accept` is not woken by `close` alone.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        """Hand one connection on: a fault is chosen anew for each request."""
        with near, suppress(OSError), socket.create_connection(self._server) as far:
            fault: list[str | None] = [None]
            back = threading.Thread(target=self._reply, args=(near, far, fault))
            back.daemon = True
            back.start()
            while data := near.recv(65_536):
                if data[:5] in (b"GET /", b"PUT /", b"POST ", b"HEAD "):
                    fault[0] = self._choose(data)
                far.sendall(data)

    def _reply(
        self, near: socket.socket, far: socket.socket, fault: list[str | None]
    ) -> None:
        with suppress(OSError):
            while data := far.recv(65_536):
                what, fault[0] = fault[0], None
                if what is not None:
                    self.counts[what] += 1
                    at = self._chance.randrange(len(data))
                if what == "corrupt":
                    data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
                if what in ("cut", "stall"):
                    near.sendall(data[:at])
                if what == "stall":
                    time.sleep(_STALL_S)
                if what in ("cut", "stall", "lose"):
                    break
                near.sendall(data)
        for end in (near, far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class World:
    """A store with entries, an object store, and stores that pull.

    Args:
        folder: For all of them.
        empty: A store to be copied.
        caches: Makers of prompt caches.
        server: The object store in memory; a real one is at ``KVSTORE_S3_ENDPOINT``.
    """

    def __init__(self, folder: Path, empty: Path, caches: Any, server: Any) -> None:
        self.folder, self.empty, self.caches = folder, empty, caches
        self.endpoint = os.environ.get("KVSTORE_S3_ENDPOINT") or server.endpoint
        self._number = 0
        self.path = shutil.copytree(empty, folder / "here")
        with kvstore.Store(self.path, "raw") as store:
            for seed, name in enumerate(NAMES, 1):
                tokens, cache = caches.make_conversation(3 * seed, seed, extra=3)
                store.save(tokens, cache, caches.MODEL, name=name)
        self.rows = {name: self.load(self.path, name) for name in NAMES}

    def load(self, path: Path, name: str) -> Any:
        """Return tokens and rows of an entry, to the bit."""
        with kvstore.Store(path, create=False) as store:
            cache, tokens = store.load_entry(name, self.caches.MODEL)
        return tokens, self.caches.rows_of(cache)

    def new_store(self) -> Path:
        """Return another store."""
        self._number += 1
        return shutil.copytree(self.empty, self.folder / f"there-{self._number}")

    def client(
        self, prefix: str, endpoint: str | None = None, *, is_trusted: bool = True
    ) -> Client:
        """Return a part of the object store that nobody else uses."""
        options = {"endpoint": endpoint or self.endpoint, "region": "us-east-1"}
        url = f"s3://{_BUCKET}/{prefix}"
        remote = make_remote("team", url, options, is_trusted=is_trusted)
        return Client(remote, _LIMITS if endpoint else None)


@contextmanager
def made_world(folder: Path, empty: Path, kit: Any) -> Iterator[World]:
    """Make a world whose keys and credentials nobody else has."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "id")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "secret")
    os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
    server = kit.load_beside("s3server").S3Server()
    try:
        yield World(folder, empty, kit.load_beside("caches"), server)
    finally:
        server.close()


def persist(work: Callable[[], Any], told: Counter[str]) -> Any:
    """Do something again until it succeeds, and count what was in the way."""
    for _ in range(_TRIES):
        try:
            return work()
        except (IntegrityError, RemoteError) as error:
            told[type(error).__name__] += 1
    raise AssertionError(f"it never succeeds: {told}")


def push_and_pull(
    world: World, number: int, choose: Callable[[bytes], str | None], seed: int
) -> tuple[Counter[str], Counter[str]]:
    """Push and pull all entries by a bad connection, and compare what arrived.

    Returns:
        How often each fault happened, and what was told of them.
    """
    told: Counter[str] = Counter()
    proxy = Proxy(world.endpoint, choose, random.Random(seed))
    prefix, path = f"{os.getpid()}-{seed}-{number}", world.new_store()
    client = world.client(prefix, proxy.endpoint)
    try:
        with kvstore.Store(world.path) as here, kvstore.Store(path) as there:
            for name in NAMES:
                key = persist(lambda name=name: here.remotes.push(name, client), told)
                key = key.key.path
                persist(lambda key=key: there.remotes.pull(key, client), told)
    finally:
        proxy.close()
    for name in NAMES:
        assert world.load(path, name) == world.rows[name], name
    with kvstore.Store(path) as store:
        assert store.verify() == []
    good = world.client(prefix)
    for key in good.keys("v1"):
        data = good.read_whole(key, 1 << 30)
        if "/shards/" in key:  # named by its header
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        assert hashlib.sha256(data).hexdigest() in key, key
    return proxy.counts, told


@dataclass(frozen=True, slots=True)
class Pushed:
    """An entry in a remote, to be poisoned."""

    world: World
    client: Client
    key: EntryKey
    chance: random.Random

    @property
    def document(self) -> RemoteEntry:
        """The entry as its document has it."""
        return parse_document(self.key, self.client.read_whole(str(self.key), 1 << 30))


def poisons() -> dict[str, Callable[[Pushed], EntryKey]]:
    """Return what can be done to a remote by somebody who may write to it."""
    return {
        "shard truncated": _truncated,
        "shard flipped": _flipped,
        "shard of others": _exchanged,
        "document truncated": _truncated_document,
        "document flipped": _flipped_document,
        "replayed": _replayed,
        "wrong model": _relabelled,
        "wrong signer": _forged,
        "signed by nobody": _unsigned,
        "wrong digest": _misnamed,
    }


def poison_once(world: World, number: int, chance: random.Random) -> str:
    """Poison one object, pull, and see that it is named and that nothing is seen.

    Returns:
        What was done.
    """
    what, act = chance.choice(sorted(poisons().items()))
    client = world.client(f"{os.getpid()}-p-{number}", is_trusted=False)
    path = world.new_store()
    with kvstore.Store(world.path) as here:
        key = here.remotes.push(chance.choice(NAMES), client).key
    bad = act(Pushed(world, client, key, chance))
    try:
        with kvstore.Store(path) as there:
            try:
                there.remotes.pull(bad.path, client)
            except (IntegrityError, SignerError) as error:
                is_named = "remote" in str(error)
            else:
                raise AssertionError(f"taken in: {what}")
            assert is_named, what
            assert there.entries() == []
        assert not any(path.glob("shards/*/*")), what
    finally:
        shutil.rmtree(path)
    return what


def _overwrite(client: Client, key: str, data: bytes) -> None:
    client._store.put(key, data)  # which a client of ours never does


def _shard(at: Pushed) -> tuple[str, bytes]:
    key = at.chance.choice(at.client.keys("v1/shards"))
    return key, at.client.read_whole(key, 1 << 30)


def _put(client: Client, entry: RemoteEntry) -> EntryKey:
    key, data = document_of(entry)
    _overwrite(client, str(key), data)
    return key


def _truncated(at: Pushed) -> EntryKey:
    path, data = _shard(at)
    _overwrite(at.client, path, data[: at.chance.randrange(len(data))])
    return at.key


def _flipped(at: Pushed) -> EntryKey:
    path, data = _shard(at)
    place = at.chance.randrange(len(data))
    bit = 1 << at.chance.randrange(8)
    _overwrite(
        at.client, path, data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    )
    return at.key


def _exchanged(at: Pushed) -> EntryKey:
    path, data = _shard(at)
    shards = [p.read_bytes() for p in sorted(at.world.path.glob("shards/*/*"))]
    others = [other for other in shards if other != data]
    _overwrite(at.client, path, at.chance.choice(others))
    return at.key


def _truncated_document(at: Pushed) -> EntryKey:
    data = at.client.read_whole(str(at.key), 1 << 30)
    _overwrite(at.client, str(at.key), data[: at.chance.randrange(len(data))])
    return at.key


def _flipped_document(at: Pushed) -> EntryKey:
    data = at.client.read_whole(str(at.key), 1 << 30)
    place = at.chance.randrange(len(data))
    _overwrite(
        at.client,
        str(at.key),
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
    )
    return at.key


def _replayed(at: Pushed) -> EntryKey:
    data = at.client.read_whole(str(at.key), 1 << 30)
    part = at.chance.choice(("fingerprint", "entry_id", "digest"))
    digits = "".join(
        at.chance.choices("0123456789abcdef", k=len(getattr(at.key, part)))
    )
    other = replace(at.key, **{part: digits})
    _overwrite(at.client, str(other), data)
    return other


def _relabelled(at: Pushed) -> EntryKey:
    mine = replace(at.document, fingerprint=f"{at.chance.getrandbits(256):064x}")
    # Whoever holds the trusted key may be wrong too.
    return _put(at.client, signed(mine, signing_key()))


def _forged(at: Pushed) -> EntryKey:
    entry = at.document
    theirs = signed(entry, new_secret())
    if at.chance.random() < 0.5:  # the name of one key, the signature of another
        value = theirs.signature.value
        theirs = replace(entry, signature=replace(entry.signature, value=value))
    return _put(at.client, theirs)


def _unsigned(at: Pushed) -> EntryKey:
    return _put(at.client, replace(at.document, signature=None))


def _misnamed(at: Pushed) -> EntryKey:
    entry = at.document
    number = at.chance.randrange(len(entry.shards))
    shards = list(entry.shards)
    digest = f"{at.chance.getrandbits(256):064x}"
    shards[number] = replace(shards[number], name=digest)
    return _put(at.client, signed(replace(entry, shards=tuple(shards)), signing_key()))
