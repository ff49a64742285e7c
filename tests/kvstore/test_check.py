"""Verify, repair, rebuild: what they say, and what they leave alone."""

import os
import shutil

import pytest

import kvstore
from kvstore.format import shard as shards
from kvstore.format.chain import hash_root
from kvstore.ops.upkeep import check
from kvstore.storage.blocks import (
    confirm_folder,
    index_folder,
    open_index,
    replace_index,
)
from kvstore.storage.folder import open_folder
from kvstore.storage.index import Index, index_identity
from kvstore.storage.shards import open_shard, publish_shard, staged_shard


@pytest.fixture
def folder(store_path, caches):
    """A store with three entries: two share a prefix, one has no name."""
    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = caches.make_conversation(3, 1)
        store.save(tokens, cache, caches.MODEL, name="long")
        tokens, cache = caches.make_conversation(2, 1)
        store.save(tokens, caches.make_cache(32, 1), caches.MODEL, name="short")
        store.save(*caches.make_conversation(1, 2, extra=5), caches.MODEL)
    return open_folder(store_path)


def find(folder, read_data=1.0):
    """Return the findings, sorted."""
    findings = check.verify(folder, read_data, lambda done, total: None)
    return sorted(findings, key=lambda f: (f.kind, f.path))


def shard_files(folder):
    """Return the shards, largest first."""
    found = folder.shards.glob("*/*.safetensors")
    return sorted(found, key=lambda path: -path.stat().st_size)


def spoil(path, at):
    """Change one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def test_a_sound_store_has_no_findings(folder):
    """Where nothing is wrong, nothing is found."""
    assert [] == find(folder)


def test_a_new_store_has_no_findings(store_path):
    """A store in which nothing was saved yet lacks nothing."""
    assert [] == find(open_folder(store_path))
    assert not (store_path / "index.sqlite").exists()


def test_a_finding_says_what_where_and_who_suffers(folder):
    """A damaged block is found with its file, and every entry that needs it."""
    path = shard_files(folder)[0]
    with open_shard(folder, path.stem) as opened:
        first = opened.header.blocks[0]
        begin = opened.header.data_begin
    spoil(path, begin + first.begin)
    where = str(path.relative_to(folder.path))
    kinds = [(f.kind, f.path) for f in find(folder) if f.path == where]
    assert [("damaged-block", where)] == kinds
    named = {
        entry for f in find(folder) if f.kind == "missing-block" for entry in f.entries
    }
    assert {"long", "short"} == named
    assert all(first.block.hash.hex()[:12] in f.detail for f in find(folder)[:1])


def test_only_headers_are_read_where_no_data_is_asked_for(folder):
    """With `read_data=0`, damage to data goes unnoticed, and that to headers not."""
    big, small = shard_files(folder)
    spoil(big, -1)
    assert [] == find(folder, read_data=0.0)
    spoil(small, 20)
    assert {"damaged-shard", "missing-block"} == {f.kind for f in find(folder, 0.0)}


def test_progress_counts_shards(folder):
    """Progress goes from nothing to the number of shards."""
    calls = []
    check.verify(folder, 1.0, lambda *call: calls.append(call))
    assert [(0, 2), (1, 2), (2, 2)] == calls


def test_what_a_killed_save_left_is_no_finding(folder, caches, tmp_path):
    """A shard that no entry needs may be unknown to the index; staged files stay."""
    other = tmp_path / "other"
    with kvstore.Store(other, codec="raw") as store:
        store.save(*caches.make_conversation(1, 7), caches.MODEL)
    (extra,) = other.glob("shards/*/*.safetensors")
    shutil.copy(extra, folder.shards / extra.parent.name / extra.name)
    (folder.staging / "leftover").write_bytes(b"x")
    assert [] == find(folder)


def test_a_shard_that_entries_need_is_to_be_indexed(folder):
    """An index that lacks what entries need is found to."""
    path = shard_files(folder)[0]
    index = Index(folder.index)
    with index.transaction():
        index.drop_shard(path.stem)
    index.close()
    assert [("unindexed-shard", str(path.relative_to(folder.path)))] == [
        (f.kind, f.path) for f in find(folder)
    ]


def test_a_good_copy_elsewhere_is_enough(folder, caches):
    """An entry whose block lies damaged in one shard and good in another is whole."""
    before = set(shard_files(folder))
    with kvstore.Store(folder.path, codec="planes") as store:
        index = store._blocks.index
        with index.transaction():
            for path in before:
                index.drop_shard(path.stem)
        tokens, _ = caches.make_conversation(3, 1)
        store.save(tokens, caches.make_cache(48, 1), caches.MODEL, name="long")
    spoil(max(before, key=lambda path: path.stat().st_size), -1)
    assert [] == [f for f in find(folder) if f.entries]
    with kvstore.Store(folder.path) as store:
        restored, _ = store.load_entry("long", caches.MODEL)
    assert caches.rows_of(caches.make_cache(48, 1)) == caches.rows_of(restored)


def test_repairing_keeps_the_good_blocks_of_a_damaged_shard(folder, caches):
    """One bad block costs itself, not its neighbours."""
    path = shard_files(folder)[0]
    spoil(path, -1)  # of the third block
    with kvstore.Store(folder.path, codec="raw") as store:
        assert "damaged-block" in {f.kind for f in store.repair()}
        assert ["missing-block"] == [f.kind for f in store.verify()]
        restored, _ = store.load([*range(1000, 1048), 7], caches.MODEL)
        expected = caches.rows_of(caches.make_cache(48, 1), 0, 32)
        assert expected == caches.rows_of(restored)
        assert store.load_entry("short", caches.MODEL)
    assert not path.exists()
    assert (folder.quarantine / path.name).exists()


def test_repairing_puts_damaged_entries_aside(folder):
    """What cannot be read, and of which there is no copy, is kept to be looked at."""
    path = next(folder.entries.iterdir())
    path.write_bytes(b"x")
    folder.index.unlink()
    check.repair(folder)
    assert [] == find(folder)
    (aside,) = folder.quarantine.glob("entry-*")
    assert b"x" == aside.read_bytes()


def test_repairing_a_sound_store_changes_nothing(folder):
    """Where nothing is found, nothing is touched, not even the index."""
    before = index_identity(folder.index)
    assert [] == check.repair(folder)
    assert before == index_identity(folder.index)
    assert [] == os.listdir(folder.quarantine)


def all_rows(folder):
    """Return what an index says, but for times."""
    index = Index(folder.index)
    try:
        names = sorted(index.shards().items())
        return names, [index.places_in(name) for name, _ in names]
    finally:
        index.close()


def test_a_rebuilt_index_says_the_same(folder, caches):
    """Everything but times and counters is found again in the shards."""
    before = all_rows(folder)
    for path in folder.path.glob("index.sqlite*"):
        path.unlink()
    open_index(folder).close()
    assert before == all_rows(folder)
    assert [] == find(folder)


def test_an_index_is_replaced_only_by_whoever_saw_the_damaged_one(folder):
    """A second process that saw the same damage leaves the new index alone."""
    seen = index_identity(folder.index)
    replace_index(folder, seen)
    fresh = index_identity(folder.index)
    assert seen != fresh
    replace_index(folder, seen)
    assert fresh == index_identity(folder.index)


def test_an_interrupted_rebuild_leaves_no_half_index(folder, monkeypatch):
    """Until it is whole, a rebuilt index is not seen."""
    for path in folder.path.glob("index.sqlite*"):
        path.unlink()

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.storage.blocks.index_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            open_index(folder)
    assert not folder.index.exists()
    open_index(folder).close()
    assert [] == find(folder)


def test_an_index_that_agrees_is_confirmed(folder):
    """Nothing is said of an index that is right, and what it lacked it then has."""
    index = Index(folder.index)
    confirm_folder(index, folder)
    name = shard_files(folder)[0].stem
    before = index.places_in(name)
    with index.transaction():
        index.drop_shard(name)
    confirm_folder(index, folder)
    assert before == index.places_in(name)
    index.close()


def test_an_index_that_disagrees_is_damaged(folder):
    """A row that contradicts its shard is damage of the index."""
    index = Index(folder.index)
    with index.transaction():
        index._query("UPDATE blocks SET parent = zeroblob(32)")
    with pytest.raises(kvstore.IndexDamagedError) as caught:
        confirm_folder(index, folder)
    assert folder.index == caught.value.path
    index.close()


def test_an_unreadable_shard_does_not_stop_the_others(folder):
    """One bad shard is passed over when the index is told of all."""
    big, small = shard_files(folder)
    spoil(big, 20)
    index = Index(folder.staging / "fresh.sqlite", create=True)
    index_folder(index, folder)
    assert [small.stem] == list(index.shards())
    index.close()


def test_a_shard_whose_blocks_are_not_what_their_hashes_say_is_found(folder, caches):
    """Right digests over wrong hashes are still damage."""
    from dataclasses import replace

    path = shard_files(folder)[0]
    with open_shard(folder, path.stem) as opened:
        blocks = [
            shards.as_written(stored, data)
            for stored, data in zip(
                opened.header.blocks, opened.read(opened.header.blocks), strict=True
            )
        ]
        origin = opened.header.origin
    odd = replace(blocks[0], block=replace(blocks[0].block, tokens=(9,) * 16))
    with staged_shard(folder, origin, [odd]) as staged:
        publish_shard(folder.shards, staged)
    assert ["damaged-block"] == [f.kind for f in find(folder)]
    assert "not named by its tokens" in find(folder)[0].detail
    assert hash_root(caches.MODEL.digest, origin.layout) == blocks[0].block.parent


def test_what_is_evicted_meanwhile_is_not_reported(store_path, caches, monkeypatch):
    """Another process frees an entry that was listed, before the index is looked at."""
    with kvstore.Store(store_path, "raw") as store:
        store.save(*caches.make_conversation(2, 1), caches.MODEL, name="kept")
        store.save(*caches.make_conversation(2, 2), caches.MODEL)
        original = check._check_index

        def evict_first(*args):
            with kvstore.Store(store_path) as other:
                assert other.plan_prune(max_bytes=1, now=True).execute() > 0
            return original(*args)

        monkeypatch.setattr(check, "_check_index", evict_first)
        assert store.verify() == []
