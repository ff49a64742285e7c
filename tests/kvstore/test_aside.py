"""Quarantine and `tmp` count for the limit; what a kill leaves goes."""

import os
from unittest.mock import patch

import pytest

import kvstore
from kvstore.storage import files
from kvstore.storage.index import Index

HOURS_AGO = 1e9


@pytest.fixture
def full(store_path, caches):
    """A store of one entry with a name, and 1,000 bytes in quarantine and in `tmp`."""
    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = caches.make_conversation(3, 1)
        store.save(tokens, cache, caches.MODEL, name="kept")
        for name in ("quarantine", "tmp"):
            (store_path / name / "junk").write_bytes(bytes(1000))
        yield store


def test_stats_tell_what_lies_aside(full):
    """In quarantine, and in `tmp`."""
    found = full.stats()
    assert (found.num_quarantined, found.quarantine_bytes) == (1, 1000)
    assert (found.num_staged, found.staged_bytes) == (1, 1000)


def test_a_save_at_the_limit_empties_what_lies_aside(full, caches):
    """What a save is writing stays; so does quarantine while there is room."""
    junk = [full.path / name / "junk" for name in ("quarantine", "tmp")]
    before = full.stats().nbytes
    full.save(*caches.make_conversation(1, 2), caches.MODEL, name="second")
    assert all(path.exists() for path in junk)
    os.utime(junk[1], (HOURS_AGO, HOURS_AGO))
    after = full.stats().nbytes
    full.set_limit(after + (after - before) + 900)
    full.save(*caches.make_conversation(1, 3), caches.MODEL, name="third")
    assert not any(path.exists() for path in junk)
    assert len(full.entries()) == 3
    assert full.verify() == []


def test_prune_empties_quarantine_where_the_rest_is_needed(full, caches):
    """Entries without a name go first."""
    full.save(*caches.make_conversation(1, 2), caches.MODEL)
    nbytes = full.stats().nbytes
    plan = full.plan_prune(max_bytes=nbytes)
    assert (len(plan.entries), plan.quarantine_bytes) == (1, 0)
    plan = full.plan_prune(max_bytes=nbytes // 2)
    assert plan.quarantine_bytes == 1000
    assert plan.execute() == plan.freed_bytes
    assert os.listdir(full.path / "quarantine") == []


def test_who_does_not_wait_empties_quarantine(full):
    """What was removed may lie there too."""
    assert full.plan_prune().quarantine_bytes == 0
    plan = full.plan_prune(now=True)
    assert plan.execute() == plan.freed_bytes == plan.quarantine_bytes == 1000
    assert os.listdir(full.path / "quarantine") == []


def test_quarantine_stays_while_an_entry_lacks_a_block(full, store_path, caches):
    """A shard there that is whole comes back instead."""
    (shard,) = store_path.glob("shards/*/*")
    shard.rename(store_path / "quarantine" / shard.name)
    with pytest.raises(kvstore.IntegrityError):
        full.load_entry("kept", caches.MODEL)  # and the index knows
    assert full.plan_prune(max_bytes=1).quarantine_bytes == 0
    full.repair()
    full.plan_prune(max_bytes=1).execute()
    assert os.listdir(store_path / "quarantine") == []
    assert full.load_entry("kept", caches.MODEL)


def test_a_copy_that_a_locked_index_kept_goes_with_the_next_prune(full):
    """The entry is removed all the same."""
    locked = kvstore.StoreLockedError("the index is locked")
    with patch.object(Index, "drop_entry", side_effect=locked):
        removed = full.remove("kept")
    assert full._blocks.index.entry_ids() == {removed.id}
    full.plan_prune().execute()
    assert full._blocks.index.entry_ids() == set()


def killed_while_writing(target):
    """Kill a process in the middle of a file that it writes."""
    if (child := os.fork()) == 0:
        with files.written_whole(target) as descriptor:
            os.write(descriptor, b"half")
            os._exit(9)
    os.waitpid(child, 0)


def test_a_kill_leaves_no_part_of_an_export(tmp_path, monkeypatch):
    """Where a file must have a name from the start, the next one removes it."""
    target = tmp_path / "bundle"
    if files._create_nameless(tmp_path) is not None:
        killed_while_writing(target)
        assert os.listdir(tmp_path) == []
    with files.written_whole(target) as descriptor:
        os.write(descriptor, b"whole")
    assert os.listdir(tmp_path) == ["bundle"]
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"whole", 0o600)
    monkeypatch.setattr(files, "_create_nameless", lambda folder: None)
    killed_while_writing(target)
    assert len(os.listdir(tmp_path)) == 2
    with files.written_whole(target) as descriptor, files.written_whole(target):
        os.write(descriptor, b"again")
        assert len(os.listdir(tmp_path)) == 3  # both that are being written
    assert os.listdir(tmp_path) == ["bundle"]
