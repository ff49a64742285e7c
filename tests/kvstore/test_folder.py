"""The store's folder: made once, recognised, refused where it is something else."""

import json
import os
import stat
import subprocess
import sys

import pytest
from blake3 import blake3

import kvstore
from kvstore.errors import FormatError, IntegrityError, StoreNotFoundError
from kvstore.format.config import CONFIG_COPY
from kvstore.format.documents import canonical_json
from kvstore.storage.folder import create_folder, default_path, open_folder

CREATE = """
import sys
from pathlib import Path
from kvstore.storage.folder import create_folder
sys.stdin.readline()
print(create_folder(Path(sys.argv[1])).config.id)
"""


def content(path):
    """Return everything under a folder, with the bytes of files."""
    return {
        str(child.relative_to(path)): child.read_bytes() if child.is_file() else None
        for child in path.rglob("*")
    }


def modes(path):
    """Return the permission bits of everything under a folder, and its own."""
    return {stat.S_IMODE(child.stat().st_mode) for child in (path, *path.rglob("*"))}


def test_a_store_is_made_and_opened_again(tmp_path):
    """What was created is opened with the same id and block size."""
    made = create_folder(tmp_path / "a" / "store", 32)
    assert made == open_folder(tmp_path / "a" / "store")
    assert 32 == made.block_size


def test_backups_leave_a_store_out(store_path):
    """It has the mark of a cache folder, as the specification of that spells it."""
    mark = b"Signature: 8a477f597d28d172789f06886806bc55"
    assert (store_path / "CACHEDIR.TAG").read_bytes().startswith(mark)


def test_creating_twice_gives_the_same_store(tmp_path):
    """A store that is there stays as it is, whatever block size is asked for."""
    made = create_folder(tmp_path / "store", 32)
    assert made == create_folder(tmp_path / "store", 64)


def test_what_another_process_has_set_stays(store_path):
    """A limit or a policy is no damage, and goes by no other setting or repair."""
    with kvstore.Store(store_path) as early, kvstore.Store(store_path) as late:
        late.set_policy(is_signed_only=True)
        assert early.verify() == []
        early.set_limit(10**9)
        assert early.config.is_signed_only
        late.set_limit(10**8)
        (store_path / CONFIG_COPY).write_bytes(b"damaged")
        assert [finding.kind for finding in early.repair()] == ["damaged-config"]
    now = open_folder(store_path)
    assert (now.config.is_signed_only, now.config.max_bytes) == (True, 10**8)


def test_two_stores_have_two_ids(tmp_path):
    """An id is drawn for each store."""
    made = [create_folder(tmp_path / name) for name in "ab"]
    assert made[0].config.id != made[1].config.id


def test_an_empty_folder_becomes_a_store(tmp_path):
    """A folder with nothing in it may be taken."""
    assert create_folder(tmp_path).path == tmp_path


def test_a_half_made_store_is_finished(tmp_path):
    """What a killed process left of a store is completed by the next one."""
    (tmp_path / "store" / "entries").mkdir(parents=True)
    (tmp_path / "store" / "lock").touch()
    assert create_folder(tmp_path / "store") == open_folder(tmp_path / "store")


def test_processes_that_create_at_once_get_the_same_store(tmp_path):
    """Whoever comes second opens what the first one made."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, tmp_path / "store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ids = {process.communicate(timeout=300)[0] for process in processes}
    assert {open_folder(tmp_path / "store").config.id + "\n"} == ids


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_store_is_private_whatever_the_umask(tmp_path, caches, umask):
    """Folders are 0700, files 0600 and shards 0400."""
    import kvstore

    before = os.umask(umask)
    try:
        path = create_folder(tmp_path / "store", 16).path
        with kvstore.Store(path) as store:
            tokens, cache = caches.make_conversation(2, 1, extra=3)
            store.save(tokens, cache, caches.MODEL, name="x")
            # While it is open, SQLite's own files are there too.
            assert (path / "index.sqlite-wal").exists()
            assert {0o700, 0o600, 0o400} == modes(path)
            shards = list(path.glob("shards/*/*.safetensors"))
            assert {0o400} == {stat.S_IMODE(s.stat().st_mode) for s in shards}
    finally:
        os.umask(before)


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path):
    """A folder that holds somebody's files is not made a store."""
    (tmp_path / "thesis.txt").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(StoreNotFoundError, match="not a kvstore store"):
        create_folder(tmp_path)
    with pytest.raises(StoreNotFoundError, match="not a kvstore store"):
        open_folder(tmp_path)
    assert before == content(tmp_path)


def test_a_file_is_refused_and_left_as_it_is(tmp_path):
    """A file is not a store."""
    (tmp_path / "x").write_bytes(b"mine")
    for function in (create_folder, open_folder):
        with pytest.raises(StoreNotFoundError, match="not a folder"):
            function(tmp_path / "x")
    assert b"mine" == (tmp_path / "x").read_bytes()


def test_nothing_is_created_by_opening(tmp_path):
    """A store that is not there is an error with a hint, and stays away."""
    with pytest.raises(StoreNotFoundError, match="no store at") as caught:
        open_folder(tmp_path / "store")
    assert caught.value.hint
    assert 10 == caught.value.exit_code
    assert {} == content(tmp_path)


def sealed(**fields):
    """Return a configuration whose digest is right, whatever else it says."""
    body = {"format": 1, "id": "a", "block_size": 256, **fields}
    digest = blake3(canonical_json(body)).hexdigest()
    return canonical_json({**body, "digest": digest})


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 60_000,
        b"{}",
        b'{"format":1}',
        b'{"format":1,"id":"a"}',
        b'{"format":1,"id":"a","block_size":256}',
        sealed(id=7),
        sealed(block_size="256"),
        sealed(block_size=0),
        sealed(block_size=-256),
        sealed(block_size=2.5),
        sealed(block_size=True),
        sealed(format="1"),
        sealed(max_bytes=0),
        sealed().replace(b'"a"', b'"b"'),
        b" " * 70_000,
    ],
)
def test_a_damaged_configuration_is_said_to_be_one(store_path, config):
    """A configuration that cannot be read names its file and the remedy."""
    for name in ("config.json", "config.copy.json"):
        (store_path / name).write_bytes(config)
    for function in (create_folder, open_folder):
        with pytest.raises(IntegrityError) as caught:
            function(store_path)
        assert store_path / "config.json" == caught.value.path
        assert caught.value.hint
    assert config == (store_path / "config.json").read_bytes()


@pytest.mark.parametrize(
    "config",
    [{"format": 3, "id": "a", "block_size": 256}, {"format": 9, "whatever": []}],
)
def test_a_newer_store_is_not_a_damaged_one(store_path, config):
    """A format of a later release is told apart, whatever else it has."""
    for name in ("config.json", "config.copy.json"):
        (store_path / name).write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"format {config['format']}"):
        open_folder(store_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVSTORE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/kvstore"),
        ({"HOME": "/c"}, "/c/.cache/kvstore"),
        ({"KVSTORE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/kvstore"),
    ],
)
def test_the_default_folder_follows_the_environment(monkeypatch, environment, expected):
    """KVSTORE_DIR goes before XDG_CACHE_HOME, and that before the home folder."""
    for name in ("KVSTORE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert expected == str(default_path())
