"""One file, one bit, one misread, one bad sector: nothing else may hang on it."""

import errno
import os
import shutil
import subprocess
import sys
import unicodedata
from contextlib import contextmanager, suppress
from unittest.mock import Mock

import pytest

import kvstore
from kvstore.ops import commit
from kvstore.ops.upkeep.prune import eviction_order
from kvstore.storage import blocks as storage_blocks
from kvstore.storage import entries as storage_entries
from kvstore.storage import files
from kvstore.storage.folder import create_folder

ROOT = os.geteuid() == 0


@pytest.fixture
def saved(store_path, caches):
    """A store with one pinned conversation; its tokens and rows."""
    tokens, cache = caches.make_conversation(4, 1, extra=5)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, cache, caches.MODEL, name="chat")
        store.pin("chat")
    return store_path, tokens, cache


def num_held(path, tokens, model):
    """Return how many tokens of a conversation a store gives back."""
    with kvstore.Store(path) as store:
        return len(tokens) + 1 - len(store.load([*tokens, 7], model)[1])


# --- Acknowledged is readable. ---


def test_a_package_without_metadata_costs_no_save(store_path, caches, monkeypatch):
    """A broken installation answers no version; the entry does without it."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: None)
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        entry = store.save(tokens, cache, caches.MODEL, name="chat")
        assert entry.made_with == {}
        assert store.entry("chat") == entry
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


@pytest.mark.parametrize("field", ["made_with", "model"])
def test_what_could_not_be_read_back_does_not_replace_an_entry(
    saved, caches, monkeypatch, field
):
    """Whatever makes an entry unreadable, the save fails and the old entry stays."""
    path, tokens, _ = saved
    wrong = {"made_with": {"mlx": None}, "model": "x" * 70_000}[field]
    make = kvstore.format.entry.make_entry

    def broken(*arguments, **options):
        entry = make(*arguments, **options)
        object.__setattr__(entry, field, wrong)
        return entry

    monkeypatch.setattr("kvstore.ops.commit.make_entry", broken)
    longer, cache = caches.make_conversation(5, 1)
    with kvstore.Store(path, codec="raw") as store:
        with pytest.raises(kvstore.IntegrityError):
            store.save(longer, cache, caches.MODEL, name="chat", replace=True)
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


# --- An entry's file. ---


def test_a_flipped_bit_in_an_entry_frees_nothing(saved, caches, flip_bit):
    """Its blocks stay, whatever is asked, and a repair brings the entry back."""
    path, tokens, _ = saved
    (entry,) = path.glob("entries/*.json")
    good = entry.read_bytes()
    for bit in range(0, len(good) * 8, 101):
        entry.write_bytes(good)
        flip_bit(entry, bit)
        with kvstore.Store(path, codec="raw") as store:
            store.plan_prune(now=True, max_bytes=0).execute()
            other, cache = caches.make_conversation(1, 50)
            store.save(other, cache, caches.MODEL)
        assert num_held(path, tokens, caches.MODEL) == len(tokens)
    with kvstore.Store(path) as store:
        assert "damaged-entry" in [f.kind for f in store.repair()]
        assert store.load_entry("chat", caches.MODEL)[1] == tokens
        assert store.entry("chat").pinned
        assert store.verify() == []
    assert entry.read_bytes() == good


def test_a_kill_in_a_repair_loses_no_entry(saved, caches, flip_bit, monkeypatch):
    """Until its copy is in its place, an entry's damaged file is there."""
    path, tokens, _ = saved
    (entry,) = path.glob("entries/*.json")
    flip_bit(entry, 800)

    def killed(*arguments):
        raise KeyboardInterrupt

    with kvstore.Store(path) as store:
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr("kvstore.ops.upkeep.check.write_entry", killed)
            store.repair()
        store.plan_prune(now=True).execute()
        store.repair()
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_lies_in_the_place_of_an_entry_stops_no_eviction(store_path, caches, kind):
    """Its copy tells what it was; a save at the limit evicts it."""
    with kvstore.Store(store_path, codec="raw") as store:
        for start in range(3):
            tokens, cache = caches.make_conversation(4, start)
            store.save(tokens, cache, caches.MODEL)
        (first, *_) = store.run(eviction_order)
        file = store_path / "entries" / f"{first.id}.json"
        file.unlink()
        {
            "folder": file.mkdir,
            "pipe": lambda: os.mkfifo(file),
            "link": lambda: file.symlink_to(store_path / "config.json"),
        }[kind]()
        store.set_limit(store.stats().nbytes)
        tokens, cache = caches.make_conversation(4, 9)
        store.save(tokens, cache, caches.MODEL)
        assert first.id not in {entry.id for entry in store.run(eviction_order)}
        assert not os.path.lexists(file)
        assert store.verify() == []


def test_an_entry_that_nothing_tells_stops_all_freeing(saved, caches, flip_bit):
    """With its copy gone too, nobody knows which blocks it needs."""
    path, tokens, _ = saved
    (entry,) = path.glob("entries/*.json")
    flip_bit(entry, 800)
    for index in path.glob("index.sqlite*"):
        index.unlink()
    other, cache = caches.make_conversation(3, 2)
    with kvstore.Store(path, codec="raw") as store:
        store.save(other, cache, caches.MODEL)
        plan = store.plan_prune(now=True, max_bytes=0)
        assert plan.entries == ()
        assert plan.execute() == 0
    assert num_held(path, tokens, caches.MODEL) == len(tokens)


def test_a_removed_entry_does_not_come_back(saved, caches):
    """Its second copy goes with it, and when it is renamed."""
    path, _, _ = saved
    with kvstore.Store(path) as store:
        store.rename("chat", "talk")
        store.remove("talk")
        store.repair()
        assert store.entries() == []
    index = b"".join(p.read_bytes() for p in path.glob("index.sqlite*"))
    with kvstore.Store(path) as store:
        assert store.plan_prune(now=True).execute() > 0
        assert store.entries() == []
    assert b"chat" not in index


# --- One misread. ---


@pytest.mark.parametrize("where", ["header", "data"])
def test_one_misread_condemns_nothing(saved, caches, monkeypatch, where):
    """What a cable delivers wrong once is read again before anything is set aside."""
    path, tokens, cache = saved
    real, left = os.preadv, [1]

    def preadv(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        is_it = (offset == 8) == (where == "header") and offset >= 8 and count > 100
        if left and is_it:
            left.pop()
            buffers[0][50] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with kvstore.Store(path) as store:
        restored, held = store.load_entry("chat", caches.MODEL)
    assert not left
    assert held == tokens
    assert caches.rows_of(restored) == caches.rows_of(cache)
    assert os.listdir(path / "quarantine") == []


def test_a_whole_shard_comes_back_from_quarantine(saved, caches):
    """What was misread more than once and is whole after all is taken back."""
    path, tokens, _ = saved
    for shard in path.glob("shards/*/*.safetensors"):
        shard.rename(path / "quarantine" / shard.name)
    assert num_held(path, tokens, caches.MODEL) == 0
    with kvstore.Store(path) as store:
        store.repair()
        assert store.verify(read_data=True) == []
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


# --- config.json. ---


@pytest.mark.parametrize("name", ["config.json", "config.copy.json"])
def test_any_bit_of_a_configuration_may_flip(saved, caches, flip_bit, name):
    """The other copy is read, nothing else changes, and a repair writes both again."""
    path, tokens, _ = saved
    with kvstore.Store(path) as store:
        store.set_limit(5_000_000)
        expected = store._folder
    good = (path / name).read_bytes()
    for bit in range(len(good) * 8):
        flip_bit(path / name, bit)
        with kvstore.Store(path, create=False) as store:
            assert store._folder == expected
        (path / name).write_bytes(good)
    for damage in (b"", b"{}", None):
        (path / name).unlink()
        if damage is not None:
            (path / name).write_bytes(damage)
        with kvstore.Store(path) as store:
            # One that is missing, left out of a bundle say, is made at once.
            wrong = [] if damage is None else ["damaged-config"]
            assert [f.kind for f in store.verify()] == wrong
            store.repair()
            assert store.verify() == []
        assert (path / name).read_bytes() == good
    assert num_held(path, tokens, caches.MODEL) == len(tokens)


@pytest.mark.parametrize("name", ["config.json", "config.copy.json"])
def test_a_folder_in_a_configuration_place_is_put_aside(saved, name):
    """No rename replaces a folder, so a repair moves it away first."""
    path, _, _ = saved
    (path / name).unlink()
    (path / name).mkdir()
    with kvstore.Store(path, create=False) as store:
        store.repair()
        assert store.verify() == []
    assert (path / name).is_file()


def test_without_either_configuration_it_is_no_store(saved):
    """A folder without both is refused, and nothing in it is touched."""
    path, _, _ = saved
    for name in ("config.json", "config.copy.json"):
        (path / name).write_bytes(b"{}")
    with pytest.raises(kvstore.IntegrityError, match="configuration is damaged"):
        kvstore.Store(path)
    for name in ("config.json", "config.copy.json"):
        (path / name).unlink()
    with pytest.raises(kvstore.StoreNotFoundError):
        kvstore.Store(path)


# --- Others at work. ---


def test_a_shard_that_is_pruned_meanwhile_is_not_indexed(saved, caches, monkeypatch):
    """`confirm` has read a header, and goes on after another process pruned it."""
    path, _, _ = saved
    dead, cache = caches.make_conversation(2, 9)
    with kvstore.Store(path, codec="raw") as store:
        store.save_blocks(dead, cache, caches.MODEL)
    real, waiting = storage_blocks.Index.transaction, []

    @contextmanager
    def transaction(self):
        if waiting:
            waiting.pop()
            with kvstore.Store(path) as other:
                assert other.plan_prune(now=True).execute() > 0
        with real(self):
            yield

    with kvstore.Store(path, codec="raw") as store:
        store.stats()
        monkeypatch.setattr(storage_blocks.Index, "transaction", transaction)
        waiting.append(1)
        store._blocks.run(store._blocks.confirm)
        monkeypatch.undo()
        assert store.verify() == []


@pytest.mark.parametrize("verb", ["chain", "fingerprint_of", "is_like", "load_entry"])
def test_a_block_that_moves_meanwhile_is_found(store_path, caches, monkeypatch, verb):
    """Whoever asks for an entry looks again where `prune` has rewritten a shard."""
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*caches.make_conversation(3, 1), caches.MODEL, name="long")
        store.save(tokens, caches.make_cache(32, 1), caches.MODEL, name="short")
        store.remove("long")
        ask = {
            "chain": lambda: [b.block.tokens for _, b in store.chain("short")],
            "fingerprint_of": lambda: store.fingerprint_of("short").fields,
            "is_like": lambda: store.is_like("short", cache),
            "load_entry": lambda: store.load_entry("short", caches.MODEL)[1],
        }[verb]
        real, waiting = storage_blocks.BlockStore._place, [1]

        def _place(self, block):
            place = real(self, block)
            if waiting:
                waiting.pop()
                with kvstore.Store(store_path) as other:
                    assert other.plan_prune(now=True).execute() > 0
            return place

        monkeypatch.setattr(storage_blocks.BlockStore, "_place", _place)
        found = ask()
        assert [] == waiting
        assert ask() == found


def test_a_shard_that_comes_back_meanwhile_stays_indexed(saved, caches, monkeypatch):
    """Who missed a shard drops no rows of one that was published since."""
    path, _, _ = saved
    (shard,) = path.glob("shards/*/*.safetensors")
    real = storage_blocks.Index.transaction

    @contextmanager
    def transaction(self):
        if not shard.exists():  # its writer was faster
            (path / "aside").rename(shard)
        with real(self):
            yield

    with kvstore.Store(path, codec="raw") as store:
        store.stats()
        shard.rename(path / "aside")
        monkeypatch.setattr(storage_blocks.Index, "transaction", transaction)
        with pytest.raises(kvstore.IntegrityError, match="is missing"):
            store._blocks.chain(store.entry("chat"))
        monkeypatch.undo()
        assert 5 == len(store._blocks.chain(store.entry("chat")))


# --- One bad sector. ---


def replace_by(kind, path):
    """Put something else into a shard's place."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("kind", ["EIO", "folder", "fifo", "link"])
def test_a_shard_that_cannot_be_read_stops_no_housekeeping(
    saved, caches, monkeypatch, kind
):
    """Verify, prune, repair and saves at the limit go on past it and name it."""
    path, tokens, _ = saved
    (bad,) = path.glob("shards/*/*.safetensors")
    other, cache = caches.make_conversation(3, 2)
    with kvstore.Store(path, codec="raw") as store:
        store.save(other, cache, caches.MODEL, name="other")
    if kind == "EIO":
        real = files.open_regular

        def open_regular(target):
            if target == bad:
                raise OSError(errno.EIO, "Input/output error", str(target))
            return real(target)

        monkeypatch.setattr(files, "open_regular", open_regular)
    else:
        replace_by(kind, bad)
    with kvstore.Store(path, codec="raw") as store:
        found = {f.path: f for f in store.verify()}
        assert str(bad.relative_to(path)) in found
        store.plan_prune(now=True).execute()
        assert store.load([*other, 7], caches.MODEL)[1] == [7]
        assert len(store.load([*tokens, 7], caches.MODEL)[1]) == len(tokens) + 1
        store.set_limit(1)
        store.plan_prune(now=True, max_bytes=0).execute()
        store.set_limit(10**9)
        more, more_cache = caches.make_conversation(2, 3)
        store.save(more, more_cache, caches.MODEL, name="more")
        store.repair()
        assert store.load_entry("other", caches.MODEL)[1] == other
        assert store.load_entry("more", caches.MODEL)[1] == more
        monkeypatch.undo()  # a new file lies on good sectors
        again, again_cache = caches.make_conversation(4, 1, extra=5)
        store.save(again, again_cache, caches.MODEL, name="chat", replace=True)
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


# --- A full disk. ---


def test_a_full_disk_can_be_pruned(store_path, caches, monkeypatch):
    """Where SQLite finds no room for its files, `prune` frees some without them."""
    kept, cache = caches.make_conversation(3, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(kept, cache, caches.MODEL, name="kept")
        store.save(*caches.make_conversation(3, 2), caches.MODEL)
    real = storage_blocks.open_index
    full = len(list(store_path.glob("shards/*/*.safetensors")))

    def open_index(folder):
        if len(list(folder.path.glob("shards/*/*.safetensors"))) == full:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder.index))
        return real(folder)

    monkeypatch.setattr(storage_blocks, "open_index", open_index)
    more = caches.make_conversation(2, 3)
    with kvstore.Store(store_path, codec="raw") as store:
        with pytest.raises(OSError, match="No space left"):
            store.save(*more, caches.MODEL)
        assert store.plan_prune(max_bytes=1, now=True).execute() > 0
        assert [] == store.verify()
        assert ["kept"] == [entry.name for entry in store.entries()]
        store.save(*more, caches.MODEL)
        assert store.load_entry("kept", caches.MODEL)[1] == kept
        assert [] == store.verify()


@pytest.fixture(params=["no bytes", "no inodes"])
def full_store(request, saved, tmp_path):
    """A copy of the store on a disk that is full, and what fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=6m,nr_inodes=400" if request.param == "no inodes" else "size=6m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    path, filler = shutil.copytree(saved[0], disk / "store"), disk / "filler"
    filler.mkdir()
    with suppress(OSError):
        for number in range(500):
            (filler / str(number)).touch()
            if request.param == "no bytes":
                (filler / str(number)).write_bytes(bytes(65_536))
    with suppress(OSError), (filler / "0").open("ab", buffering=0) as file:
        while request.param == "no bytes":
            file.write(bytes(512))
    yield path, filler
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(not ROOT, reason="only root can mount")
@pytest.mark.parametrize("state", ["whole", "no index", "damaged index"])
def test_a_store_on_a_full_disk_can_be_read(saved, full_store, caches, tmp_path, state):
    """As one that may only be read; it keeps what it is given once there is room."""
    _, tokens, cache = saved
    path, filler = full_store
    if state != "whole":
        index = path / "index.sqlite"
        with index.open("r+b") as file:  # a shorter one would make room
            file.write(b"x" * index.stat().st_size)
        if state == "no index":
            index.rename(filler / "index")
    with kvstore.Store(path, create=False) as store:
        for _ in range(2):
            assert [entry.name for entry in store.entries()] == ["chat"]
            assert store.lookup([*tokens, 7], caches.MODEL).num_tokens == len(tokens)
            restored, rest = store.load([*tokens, 7], caches.MODEL)
            assert caches.rows_of(restored) == caches.rows_of(cache)
            assert rest == [7]
            assert store.load_entry("chat", caches.MODEL)[1] == tokens
            assert store.explain([*tokens, 7], caches.MODEL).match.num_tokens
            assert store.stats().num_entries == 1
            if state == "whole":
                assert store.verify() == []
        with (tmp_path / "bundle").open("wb") as file:
            assert store.export_bundle("chat", file) > 0
        for write in (
            lambda: store.save(*caches.make_conversation(1, 4), caches.MODEL),
            lambda: store.pin("chat"),
            lambda: store.rename("chat", "other"),
        ):
            with pytest.raises(OSError, match="No space left") as caught:
                write()
            assert caught.value.errno == errno.ENOSPC
        if state == "whole":
            command = [sys.executable, "-m", "kvstore", "--store", path, "stats"]
            subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(filler)
        more, more_cache = caches.make_conversation(1, 4)
        store.save(more, more_cache, caches.MODEL, name="more")
    with kvstore.Store(path, create=False) as store:
        assert store.load_entry("more", caches.MODEL)[1] == more
        assert store.load_entry("chat", caches.MODEL)[1] == tokens
        assert store.verify() == []


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_a_full_disk_can_be_pruned_while_others_have_it_open(full_store, caches):
    """The index can be opened then, and only not be written to."""
    path, filler = full_store
    shutil.rmtree(filler)
    with kvstore.Store(path, "raw") as store, kvstore.Store(path) as other:
        tokens, cache = caches.make_conversation(4, 2)
        store.save(tokens, cache, caches.MODEL, name="kept")
        for seed in (3, 4):
            store.save(*caches.make_conversation(4, seed), caches.MODEL)
        assert other.stats().num_entries == 4
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        assert store.plan_prune(max_bytes=1, now=True).execute() > 0
        assert {entry.name for entry in other.entries()} == {"chat", "kept"}
        filler.unlink()
        other.save(*caches.make_conversation(4, 5), caches.MODEL, name="more")
        for one in (store, other):
            assert one.load_entry("kept", caches.MODEL)[1] == tokens
            assert one.verify() == []
            assert one.stats().num_entries == 3


# --- Clocks. ---


def test_a_clock_that_was_ahead_delays_nothing(store_path, caches, monkeypatch):
    """What was saved ten years from now is freed and evicted like anything else."""
    import time

    real = time.time
    ahead = caches.make_conversation(3, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + 10 * 365 * 86_400)
            store.save(*ahead, caches.MODEL)
            store.save_blocks(*caches.make_conversation(3, 2), caches.MODEL)
        store.save(*caches.make_conversation(3, 3), caches.MODEL)
        assert store.plan_prune().execute() > 0
        (oldest, _) = store.plan_prune(max_bytes=0).entries
        assert oldest.num_tokens == len(ahead[0])
        assert oldest.updated_at > real()
        for entry in store.entries():
            store.remove(entry)
        store.plan_prune(now=True).execute()
        assert store.stats().num_shards == 0


@pytest.mark.parametrize("file_too", [False, True])
def test_what_a_clock_dated_ahead_grows_old(store_path, caches, monkeypatch, file_too):
    """From when its file was written, or from the first prune that cannot tell."""
    import time

    real, day = time.time, 86_400

    def evicted(days: float) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + days * day)
            plan = store.plan_prune(older_than_s=30 * day, named=True)
            plan.execute()
            return len(plan.entries)

    with kvstore.Store(store_path, codec="raw") as store:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + 400 * day)
            store.save(*caches.make_conversation(3, 1), caches.MODEL, name="old")
        (path,) = (store_path / "entries").rglob("*.json")
        if file_too:
            os.utime(path, (real() + 400 * day,) * 2)
        assert evicted(1) == 0
        assert evicted(29) == 0
        # Of the file nobody knew how old it was a day from now.
        assert evicted(30.5) == (0 if file_too else 1)
        assert evicted(31.5) == (1 if file_too else 0)


# --- Links, modes, names. ---


def test_a_link_in_the_index_place_is_not_followed(saved, caches, tmp_path):
    """Another program's database stays as it is; the index is rebuilt beside it."""
    import sqlite3

    path, tokens, _ = saved
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("create table precious (x)")
        database.execute("pragma user_version = 1")
    before = other.read_bytes()
    for index in path.glob("index.sqlite*"):
        index.unlink()
    (path / "index.sqlite").symlink_to(other)
    assert num_held(path, tokens, caches.MODEL) == len(tokens)
    assert other.read_bytes() == before
    assert not (path / "index.sqlite").is_symlink()


LINKED = ["shards", "shards/00", "entries", "tmp", "quarantine", "bases"]


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_that_is_a_link_is_refused(saved, tmp_path, name):
    """A store is where it is."""
    path, _, _ = saved
    (path / name).mkdir(exist_ok=True)
    shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        kvstore.Store(path)


def test_a_folder_in_the_index_place_is_replaced(saved, caches):
    """Whatever stands there: the index can be thrown away."""
    path, tokens, _ = saved
    for index in path.glob("index.sqlite*"):
        index.unlink()
    (path / "index.sqlite").mkdir()
    assert num_held(path, tokens, caches.MODEL) == len(tokens)


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_lies_beside_the_index_is_put_aside_with_it(
    saved, caches, tmp_path, kind, suffix
):
    """SQLite's own files are files, or the index is built anew."""
    path, tokens, _ = saved
    place = path / f"index.sqlite{suffix}"
    place.unlink(missing_ok=True)
    {
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: place.symlink_to(tmp_path / "elsewhere"),
    }[kind]()
    assert num_held(path, tokens, caches.MODEL) == len(tokens)
    with kvstore.Store(path, codec="raw") as store:
        tokens, cache = caches.make_conversation(4, 7)
        store.save(tokens, cache, caches.MODEL, name="more")
        assert store.verify() == []
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_another_process_may_open_the_index_meanwhile(
    saved, caches, monkeypatch, suffix
):
    """SQLite's own files that come while they are looked at cost no good index."""
    path, tokens, _ = saved
    place, before = path / f"index.sqlite{suffix}", (path / "index.sqlite").stat()
    place.unlink(missing_ok=True)
    lstat = type(path).lstat

    def look(self):
        try:
            return lstat(self)
        finally:
            if self == place:
                place.touch()

    monkeypatch.setattr(type(path), "lstat", look)
    assert num_held(path, tokens, caches.MODEL) == len(tokens)
    assert (path / "index.sqlite").stat().st_ino == before.st_ino


def test_a_bad_sector_in_the_index_is_repaired(saved, caches, monkeypatch):
    """What SQLite cannot read is reported, and a repair builds another index."""
    path, tokens, _ = saved
    before = (path / "index.sqlite").stat().st_ino
    bad = OSError(errno.EIO, "disk I/O error")
    with kvstore.Store(path) as store, monkeypatch.context() as patch:
        patch.setattr("kvstore.storage.index.Index.check", Mock(side_effect=bad))
        assert ["damaged-index"] == [f.kind for f in store.repair()]
    assert (path / "index.sqlite").stat().st_ino != before
    assert num_held(path, tokens, caches.MODEL) == len(tokens)


def test_a_file_in_the_place_of_a_folder_of_shards_is_a_miss(saved, caches):
    """What lay in it is missing, and nothing else."""
    path, tokens, _ = saved
    for part in (path / "shards").iterdir():
        shutil.rmtree(part)
        part.touch()
    assert num_held(path, tokens, caches.MODEL) == 0


def test_a_calibration_that_cannot_be_read_stops_nothing(saved, caches):
    """A bad sector under it, or a folder in its place, costs what was measured."""
    path, _, _ = saved
    bad = path / "bases" / f"{caches.MODEL.digest}.json"
    bad.mkdir(parents=True)
    tokens, cache = caches.make_conversation(4, 7)
    with kvstore.Store(path, codec="turbo4") as store:
        store.save(tokens, cache, caches.MODEL, name="lossy")
        store.loss("lossy")
        store.plan_prune(now=True).execute()
        assert [f.path for f in store.verify()] == [str(bad.relative_to(path))]


def test_parents_are_private_whatever_the_umask(tmp_path):
    """Nobody else can put another folder in a store's place."""
    path = tmp_path / "parent" / "deep" / "store"
    before = os.umask(0)
    try:
        kvstore.Store(path).close()
    finally:
        os.umask(before)
    modes = {p: p.stat().st_mode & 0o777 for p in (path, *path.parents[:2])}
    assert set(modes.values()) == {0o700}


@pytest.mark.parametrize("name", ["", "entries", "shards"])
def test_a_store_that_everybody_may_write_to_is_refused(saved, name):
    """Who may write into it, or a folder of it, decides what the model has read."""
    path, _, _ = saved
    (path / name).chmod(0o777)
    with pytest.raises(PermissionError, match="everybody may write"):
        kvstore.Store(path)
    (path / name).chmod(0o755)
    kvstore.Store(path).close()


def test_one_name_has_one_spelling(store_path, caches):
    """A name typed on a Mac is the one typed elsewhere."""
    tokens, cache = caches.make_conversation(2, 1)
    forms = [unicodedata.normalize(form, "café") for form in ("NFD", "NFC")]
    with kvstore.Store(store_path, codec="raw") as store:
        for name in forms:
            store.save(tokens, cache, caches.MODEL, name=name)
            assert store.entry(name).name == forms[1]
        assert len(store.entries()) == 1
        store.rename(forms[0], "x")
        assert store.rename("x", forms[0]).name == forms[1]


def test_a_name_cannot_hide_an_entry(store_path, caches):
    """What looks like an id is no name, so `rm ID` finds that entry."""
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        entry = store.save(tokens, cache, caches.MODEL)
        with pytest.raises(ValueError, match="not like an id"):
            store.save(tokens, cache, caches.MODEL, name=entry.id)
        assert store.remove(entry).id == entry.id


def test_a_path_that_is_no_text_is_refused_as_such(tmp_path):
    """It is not called a damaged index."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(kvstore.StoreNotFoundError, match="UTF-8"):
        kvstore.Store(path)


def test_whatever_lies_in_tmp_is_cleared(saved):
    """A folder of another program does not keep `prune` from its work."""
    path, _, _ = saved
    (path / "tmp" / "x").mkdir()
    (path / "tmp" / "x" / "y").write_bytes(b"z")
    os.utime(path / "tmp" / "x", (1e9, 1e9))
    with kvstore.Store(path) as store:
        store.plan_prune().execute()
    assert os.listdir(path / "tmp") == []


@pytest.mark.parametrize(
    ("place", "name"), [(commit, "make_entry"), (storage_entries, "write_entry")]
)
def test_a_save_into_a_store_that_is_deleted_meanwhile_counts(
    store_path, caches, monkeypatch, place, name
):
    """Another one lies in its place when its entry is committed."""
    real, done = getattr(place, name), []

    def replaced(*arguments, **options):
        if not done:
            done.append(store_path.rename(store_path.with_name("deleted")))
            create_folder(store_path, 16)
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, replaced)
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="chat")
    with kvstore.Store(store_path) as store:
        assert store.load_entry("chat", caches.MODEL)[1] == tokens
        assert store.verify() == []


@pytest.mark.parametrize("name", ["config.json", "config.copy.json"])
def test_a_store_whose_making_was_cut_off_is_whole_when_it_is_opened(store_path, name):
    """One of the two configurations is missing."""
    data = (store_path / name).read_bytes()
    (store_path / name).unlink()
    with kvstore.Store(store_path) as store:
        assert store.verify() == []
    assert (store_path / name).read_bytes() == data


# --- A store that may only be read. ---


@pytest.fixture
def read_only(saved, tmp_path):
    """The store on a mount that cannot be written to."""
    path = tmp_path / "read-only"
    path.mkdir()
    commands = [
        ["mount", "--bind", saved[0], path],
        ["mount", "-o", "remount,bind,ro", path],
    ]
    for command in commands:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount here")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(not ROOT, reason="only root can mount")
@pytest.mark.parametrize("has_index", [True, False])
def test_a_read_only_store_can_be_read(saved, read_only, caches, tmp_path, has_index):
    """It is listed, looked up, loaded, verified and exported; writes say why not."""
    path, tokens, cache = saved
    if not has_index:
        for index in path.glob("index.sqlite*"):
            index.unlink()
    with kvstore.Store(read_only, create=False) as store:
        assert [entry.name for entry in store.entries()] == ["chat"]
        assert store.lookup([*tokens, 7], caches.MODEL).num_tokens == len(tokens)
        restored, rest = store.load([*tokens, 7], caches.MODEL)
        assert caches.rows_of(restored) == caches.rows_of(cache)
        assert rest == [7]
        if has_index:
            assert store.verify(read_data=True) == []
        with (tmp_path / "bundle").open("wb") as file:
            assert store.export_bundle("chat", file) > 0
        assert store.stats().num_entries == 1
        for write in (
            lambda: store.save(*caches.make_conversation(1, 4), caches.MODEL),
            lambda: store.pin("chat"),
            lambda: store.remove("chat"),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                write()
            assert caught.value.errno == errno.EROFS
    for verb in (["ls"], ["stats"], ["inspect", "chat"]):
        command = [sys.executable, "-m", "kvstore", "--store", read_only, *verb]
        subprocess.run(command, check=True, capture_output=True)
