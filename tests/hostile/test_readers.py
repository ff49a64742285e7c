"""Hostile files: every reader refuses each of them, and reads and allocates little."""

import hashlib
import io
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import click
import kit
import pytest
from hostile import files as hostile
from mlx_lm.models.cache import save_prompt_cache

import kvstore
from kvstore.caches.mlx_files import open_cache_file
from kvstore.cli.options import read_request
from kvstore.errors import IndexDamagedError
from kvstore.format import bundle
from kvstore.format.basis import basis_digest, basis_to_bytes, parse_basis
from kvstore.format.signature import (
    new_secret,
    sign,
    signature_from_bytes,
    signature_to_bytes,
)
from kvstore.remote.client import Remote
from kvstore.remote.layout import EntryKey, parse_document
from kvstore.remote.remotes import add_remote, read_remotes
from kvstore.storage import keys
from kvstore.storage.bases import (
    add_basis,
    basis_path,
    calibration_path,
    read_basis,
    read_calibration,
    write_calibration,
)
from kvstore.storage.folder import create_folder, open_folder, read_config
from kvstore.storage.index import Index
from kvstore.storage.shards import list_shards, open_shard_at, shard_path

caches = kit.load_beside("caches")
make_basis = kit.load_beside("test_bases").make_basis
FOUND = kit.load_beside("test_calibrate").FOUND
# A reader may take some times as much as there is, and this.
_ROOM, _TIMES = 2_000_000, 30
# Of what is the user's own, any object will do that JSON's library reads.
_OBJECTS = frozenset(
    {
        "two keys of one name",
        "20,000 keys",
        "an empty object",
        "half a character",
        "a format that is true",
        "a format of 2^200",
    }
)


def _as_it_is(text):
    return text


def _as_header(text):
    return struct.pack("<Q", len(text)) + text


def _as_member(text):
    header = bundle._header(bundle.CONFIG, len(text))
    return header + text + bytes(-len(text) % 512) + bytes(1024)


@dataclass
class Reader:
    """What reads a kind of file, and a good file of that kind."""

    path: Path
    read: Callable[[], object]
    # How a text lies in such a file where it has JSON.
    wrap: Callable[[bytes], bytes] = _as_it_is
    # Files that are not hostile to this reader, since it looks at nothing of them.
    harmless: frozenset[str] = field(default_factory=frozenset)
    good: bytes = b""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store that has one of everything, and a user's own files beside it."""
    path = tmp_path_factory.mktemp("made")
    folder = create_folder(path / "store", 16)
    cache = caches.make_cache(40, layers=1, heads=1, dim=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(path / "config"))
        keys.new_signing_key()
        keys.trust_signer("alice", keys.own_key())
        with kvstore.Store(folder.path) as store:
            store.save(list(range(40)), cache, caches.MODEL, name="doc")
            with (path / "bundle").open("wb") as file:
                store.export_bundle("doc", file, secret=keys.signing_key())
    add_basis(folder, basis_to_bytes(make_basis()))
    add_remote(folder, Remote("team", "s3://bucket/where", {}, False))
    write_calibration(folder, FOUND)
    save_prompt_cache(str(path / "cache.safetensors"), cache)
    said = sign(new_secret(), "bundle", [])
    (path / "signature").write_bytes(signature_to_bytes(said))
    (path / "request").write_bytes(b'{"prompt":"Hello"}')
    (path / "basis").write_bytes(basis_to_bytes(make_basis()))
    (path / "document").touch()
    (path / "model").mkdir()
    (path / "model/config.json").write_bytes(b'{"model_type":"llama"}')
    (path / "model/model.safetensors").write_bytes(_as_header(b"{}"))
    return path


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of that store, and of what lies beside it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/config"))
    shutil.copytree(made, tmp_path / "home")
    return open_folder(tmp_path / "home/store")


def _entry(home):
    with kvstore.Store(home.path, create=False) as store:
        ref = store.entry("doc").id
    path = home.entry_path(ref)
    return Reader(path, lambda: kit.read_entry(home, ref))


def _shard(home):
    path = shard_path(home.shards, list_shards(home.shards)[0])

    def read():
        with open_shard_at(path) as opened:
            return list(opened.read(opened.header.blocks))

    return Reader(path, read, _as_header)


def _config(home):
    return Reader(
        home.path / "config.json", lambda: read_config(home.path / "config.json")
    )


def _bundle(home):
    path = home.path.parent / "bundle"

    def read():
        with path.open("rb") as file, kvstore.Store(home.path, create=False) as store:
            return store.import_bundle(file, name="taken")

    return Reader(path, read, _as_member)


def _basis(home):
    digest = basis_digest(basis_to_bytes(make_basis()))
    return Reader(
        basis_path(home, digest), lambda: read_basis(home, digest), _as_header
    )


def _foreign_basis(home):
    path = home.path.parent / "basis"

    def read():
        data = kit.read_small(path, 1 << 20)
        parse_basis(data, basis_digest(data))

    return Reader(path, read, _as_header)


def _calibration(home):
    path = calibration_path(home, FOUND.fingerprint)
    return Reader(path, lambda: read_calibration(home, FOUND.fingerprint))


def _index(home):
    def read():
        with closing(Index(home.index)) as index:
            if problems := index.check():
                raise IndexDamagedError("; ".join(problems), path=home.index)

    # SQLite knows from the first page how many follow, and ends the last itself.
    harmless = {"twice", "with a byte more", "a terabyte behind it"}
    harmless |= {"without its last byte"}
    return Reader(home.index, read, harmless=frozenset(harmless))


def _signature(home):
    path = home.path.parent / "signature"
    return Reader(path, lambda: signature_from_bytes(kit.read_small(path, 1024)))


def _signers(home):
    # Nobody is trusted.
    harmless = frozenset({"an empty object"})
    return Reader(keys._signers_path(), keys.read_signers, harmless=harmless)


def _own_key(home):
    # A line that does not end.
    harmless = frozenset({"without its last byte"})
    return Reader(keys._secret_path(), keys.signing_key, harmless=harmless)


def _model(home):
    path = home.path.parent / "model/config.json"
    return Reader(
        path,
        lambda: kvstore.Fingerprint.from_path(path.parent),
        harmless=_OBJECTS | {"UTF-16"},
    )


def _remotes(home):
    return Reader(home.path / "remotes.json", lambda: read_remotes(home))


def _document(home):
    path = home.path.parent / "document"

    def read():
        data = kit.read_small(path, 1 << 24)
        digest = hashlib.sha256(data).hexdigest()
        return parse_document(EntryKey("ab" * 32, "cd" * 8, digest), data)

    return Reader(path, read)


def _cache_file(home):
    path = home.path.parent / "cache.safetensors"
    like = caches.make_cache(0, layers=1, heads=1, dim=8)
    return Reader(path, lambda: open_cache_file(path, like).read(), _as_header)


def _request(home):
    path = home.path.parent / "request"

    def read():
        return read_request("--request", io.BytesIO(kit.read_small(path, 1 << 24)))

    return Reader(path, read, harmless=_OBJECTS)


READERS = {
    "entry": _entry,
    "shard": _shard,
    "configuration": _config,
    "bundle": _bundle,
    "basis": _basis,
    "basis of others": _foreign_basis,
    "calibration": _calibration,
    "index": _index,
    "signature": _signature,
    "signers": _signers,
    "secret key": _own_key,
    "remotes": _remotes,
    "remote document": _document,
    "cache file of mlx-lm": _cache_file,
    "request": _request,
    "configuration of a model": _model,
}


def bytes_read():
    """Return how many bytes this process has read, where the system tells."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


def try_to_read(reader, data, hole):
    """Return what is wrong with how a hostile file was read, or nothing."""
    for path in reader.path.parent.glob(f"{reader.path.name}*"):
        path.unlink()  # SQLite's helpers too
    reader.path.write_bytes(data)
    if hole:
        with reader.path.open("r+b") as file:
            file.truncate(hostile.TERABYTE)
    before = bytes_read()
    tracemalloc.start()
    try:
        reader.read()
        is_refused = False
    except (kvstore.KVStoreError, ValueError, click.UsageError):
        is_refused = True
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    read = bytes_read() - before
    most = _ROOM + _TIMES * len(data)
    wrong = [] if is_refused else ["was accepted"]
    wrong += [f"took {peak:,} bytes"] if peak > most else []
    wrong += [f"read {read:,} bytes"] if read > most else []
    return ", ".join(wrong)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_every_hostile_file(home, name):
    """No hostile file is accepted, nor read or allocated for beyond its own size."""
    reader = READERS[name](home)
    good = reader.path.read_bytes()
    if good:
        reader.read()  # else nothing would be shown by a refusal
    texts = {kind: reader.wrap(text) for kind, text in hostile.JSON.items()}
    cases = {**hostile.BYTES, **texts, **(hostile.damaged(good) if good else {})}
    holes = {"a terabyte of zeros": b"", "a terabyte behind it": good}
    wrong = {
        kind: why
        for kind, data in (cases | holes).items()
        if kind not in reader.harmless
        and (why := try_to_read(reader, data, kind in holes))
    }
    assert wrong == {}
