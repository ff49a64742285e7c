"""Reading blocks: the index's word is checked, damage is taken out of it."""

from dataclasses import replace

import pytest

import kvstore
from kvstore.errors import IndexDamagedError, IntegrityError
from kvstore.format import shard as shards
from kvstore.format.chain import origin_root
from kvstore.storage import blocks as reading
from kvstore.storage.blocks import BlockStore, index_shard
from kvstore.storage.folder import open_folder
from kvstore.storage.index import Index
from kvstore.storage.shards import (
    list_shards,
    open_shard,
    publish_shard,
    shard_path,
    staged_shard,
)

TOKENS = list(range(1000, 1048))


@pytest.fixture
def folder(store_path, caches):
    """A store with one entry of three blocks."""
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(*caches.make_conversation(3, 1), caches.MODEL, name="x")
    return open_folder(store_path)


@pytest.fixture
def index(folder):
    """Its index."""
    opened = Index(folder.index)
    yield opened
    opened.close()


@pytest.fixture
def reader(folder, index):
    """What reads it."""
    return BlockStore(folder)


def name_of(folder):
    """Return the name of the only shard."""
    (name,) = list_shards(folder.shards)
    return name


def path_of(folder):
    """Return the file of the only shard."""
    return shard_path(folder.shards, name_of(folder))


def rewrite(folder, index, change, origin=None):
    """Put a changed shard, with right digests, in place of the only one."""
    old = name_of(folder)
    with open_shard(folder, old) as opened:
        blocks = [
            change(shards.as_written(stored, data))
            for stored, data in zip(
                opened.header.blocks, opened.read(opened.header.blocks), strict=True
            )
        ]
        origin = origin or opened.header.origin
    with index.transaction():
        index.drop_shard(old)
    shard_path(folder.shards, old).unlink()
    with staged_shard(folder, origin, blocks) as staged:
        publish_shard(folder.shards, staged)
        with index.transaction():
            index_shard(index, staged.name, staged.header, 0.0)
    return staged.name


def read(folder, index, reader):
    """Read all blocks of the only shard."""
    name = name_of(folder)
    with open_shard(folder, name) as opened:
        root = origin_root(opened.header.origin)
    return list(reader.read(name, index.places_in(name), root))


def test_blocks_are_read_with_their_bytes(folder, index, reader):
    """What the index places in a shard is read from it."""
    found = read(folder, index, reader)
    assert 3 == len(found)
    assert all(len(data) == stored.end - stored.begin for stored, data in found)


def test_a_header_is_read_once(folder, index, reader, monkeypatch):
    """Shards never change, so one look at a header is enough."""
    opened = []
    original = open_shard
    monkeypatch.setattr(
        reading, "open_shard", lambda *a: opened.append(a) or original(*a)
    )
    for place in index.places_in(name_of(folder)) * 3:
        reader.stored(place)
    assert 1 == len(opened)


def test_a_missing_shard_is_dropped_from_the_index(folder, index, reader):
    """A miss heals the row that led to it."""
    places = index.places_in(name_of(folder))
    path_of(folder).unlink()
    with pytest.raises(IntegrityError, match="is missing") as caught:
        reader.stored(places[0])
    assert caught.value.hint
    assert {} == index.shards()
    assert index.place(places[1].hash) is None


def test_an_unreadable_shard_goes_to_quarantine(folder, index, reader, flip_bit):
    """A header that cannot be read takes its shard out of the way."""
    path = path_of(folder)
    flip_bit(path, 200)
    place = index.places_in(path.stem)[0]
    with pytest.raises(IntegrityError, match="cannot be read"):
        reader.stored(place)
    assert {} == index.shards()
    assert not path.exists()
    assert (folder.quarantine / path.name).exists()


def test_a_damaged_block_is_dropped_alone(folder, index, reader, flip_bit):
    """The neighbours of a damaged block stay in the index, and the shard in place."""
    path = path_of(folder)
    flip_bit(path, path.stat().st_size * 8 - 1)
    with pytest.raises(IntegrityError, match="digest") as caught:
        read(folder, index, reader)
    assert index.place(bytes.fromhex(caught.value.block)) is None
    assert 2 == len(index.links())
    assert path.exists()


@pytest.mark.parametrize(
    "lie",
    [
        {"num_tokens": 15},
        {"nbytes": 1},
        {"quality": 9},
        {"quality": 8},
        {"hash": bytes(32)},
    ],
)
def test_an_index_that_says_otherwise_is_damaged_and_not_the_shard(
    folder, index, reader, lie
):
    """A place that its shard does not confirm is the index's fault."""
    place = index.places_in(name_of(folder))[0]._replace(**lie)
    with pytest.raises(IndexDamagedError) as caught:
        reader.stored(place)
    assert folder.index == caught.value.path
    assert path_of(folder).exists()
    assert 3 == len(index.links())


def test_a_name_that_is_no_shards_is_the_index_s_fault(folder, index, reader):
    """A name that cannot be a file's name points at the index."""
    place = index.places_in(name_of(folder))[0]._replace(shard="../../x")
    with pytest.raises(IndexDamagedError) as caught:
        reader.stored(place)
    assert folder.index == caught.value.path


def test_a_shard_of_another_model_is_not_taken(folder, index, reader, caches):
    """Right tokens under a wrong fingerprint are refused, digests or no."""
    with open_shard(folder, name_of(folder)) as opened:
        origin = opened.header.origin
        root = origin_root(opened.header.origin)
    foreign = replace(origin, fingerprint=caches.OTHER_WEIGHTS.fields)
    name = rewrite(folder, index, lambda block: block, foreign)
    with pytest.raises(IntegrityError, match="another model or layout"):
        list(reader.read(name, index.places_in(name), root))


def shift(encoded):
    """Say that a block starts one block later than it does."""
    block = encoded.block
    return replace(encoded, block=replace(block, start=block.start + 16))


def test_a_block_at_a_wrong_place_is_not_restored_there(folder, index, caches):
    """The position in a header is checked against the chain."""
    rewrite(folder, index, shift)
    with kvstore.Store(folder.path) as store:
        assert (None, [*TOKENS, 7]) == store.load([*TOKENS, 7], caches.MODEL)
        with pytest.raises(IntegrityError):
            store.load_entry("x", caches.MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "turbo4", "bits": 4, "is_lossless": False},
        {"codec": "raw+zstd"},
        {"codec": "planes"},
        {"codec": "nonsense"},
        {"codec": ""},
        {"codec": "turbo4"},
    ],
)
def test_a_block_of_another_codec_than_it_says_is_not_decoded(
    folder, index, caches, changes
):
    """What the codec would have made is compared with what is there."""
    rewrite(folder, index, lambda encoded: replace(encoded, **changes))
    with kvstore.Store(folder.path) as store:
        assert (None, [*TOKENS, 7]) == store.load([*TOKENS, 7], caches.MODEL)
        with pytest.raises(IntegrityError, match="cannot be decoded"):
            store.load_entry("x", caches.MODEL)


def drop_part(encoded):
    """Leave a part of a block out."""
    return replace(encoded, parts=encoded.parts[:-1])


def reshape_part(encoded):
    """Give the first part another shape of the same size."""
    first, *rest = encoded.parts
    return replace(encoded, parts=(replace(first, shape=first.shape[::-1]), *rest))


def retype_part(encoded):
    """Give the first part another dtype of the same size."""
    first, *rest = encoded.parts
    return replace(encoded, parts=(replace(first, dtype="F16"), *rest))


@pytest.mark.parametrize("change", [drop_part, reshape_part, retype_part])
def test_parts_that_do_not_fit_are_not_decoded(folder, index, caches, change):
    """Every part of a block has the dtype and shape that its layout asks for."""
    rewrite(folder, index, change)
    with kvstore.Store(folder.path) as store:
        assert (None, [*TOKENS, 7]) == store.load([*TOKENS, 7], caches.MODEL)
        with pytest.raises(IntegrityError, match="cannot be decoded"):
            store.load_entry("x", caches.MODEL)


def test_the_rewriting_itself_does_no_harm(folder, index, caches):
    """The tests above fail for what they change, not for how they change it."""
    rewrite(folder, index, lambda encoded: encoded)
    with kvstore.Store(folder.path) as store:
        restored, tokens = store.load_entry("x", caches.MODEL)
    assert TOKENS == tokens
    assert caches.rows_of(caches.make_cache(48, 1)) == caches.rows_of(restored)
