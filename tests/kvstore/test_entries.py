"""Entry files: what is written is read back, and damage is never believed."""

import json
from contextlib import suppress
from dataclasses import asdict, replace

import blake3
import pytest

import kvstore
from kvstore.errors import FormatError, IntegrityError
from kvstore.format import entry as entries
from kvstore.format.calibration import Measured
from kvstore.format.config import StoreConfig
from kvstore.format.documents import canonical_json
from kvstore.format.entry import MAX_BYTES, Entry
from kvstore.format.probe import Probe
from kvstore.storage.blocks import BlockStore
from kvstore.storage.entries import (
    list_ids,
    read_entry,
    remove_entries,
    write_entry,
)
from kvstore.storage.folder import StoreFolder, open_folder

ENTRY = Entry(
    id=entries.entry_id("handbök", ""),
    name="handbök",
    tip="ab" * 32,
    root="cd" * 32,
    num_tokens=1234,
    nbytes=56789,
    codec="turbo4+zstd",
    model="a model",
    made_with={"mlx": "0.32.4"},
    created_at=1732446000.1234567,
    updated_at=1732446001.25,
    pinned=False,
    title="First words",
    receipts=(Measured("turbo4+zstd", 4.2, 0.004, 0.0005, 0.97),),
    probe=Probe(0.004, 0.97, 64, "0a" * 32),
    signer="ef" * 32,
)


@pytest.fixture
def folder(tmp_path):
    """A store in the clear, of which there are entries alone."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "entries").mkdir()
    return StoreFolder(tmp_path, StoreConfig("0" * 32, 16))


def write(folder, entry=ENTRY):
    """Write an entry and return its file."""
    write_entry(folder, entry)
    return folder.entry_path(entry.id)


def forge(folder, **changes):
    """Write an entry with fields changed and a digest that is right."""
    body = {"format": 1, **asdict(ENTRY), **changes}
    body = {key: value for key, value in body.items() if value is not forge}
    digest = blake3.blake3(canonical_json(body)).hexdigest()
    path = folder.entry_path(ENTRY.id)
    path.write_bytes(canonical_json({**body, "digest": digest}))


@pytest.mark.parametrize("name", [None, "x", "ä ö", "a" * 200, '"\\', "日本"])
def test_an_entry_is_read_as_it_was_written(folder, name):
    """Every field comes back, whatever the name."""
    entry = replace(ENTRY, name=name, id=entries.entry_id(name, ENTRY.tip))
    write(folder, entry)
    assert entry == read_entry(folder, entry.id)
    assert [entry.id] == list_ids(folder)


def test_ids_are_frozen():
    """An id is the same in every release: it is the name of a file."""
    assert "7c350f5d5f96f944cdacdb1baaf93a31" == entries.entry_id("handbook", "")
    assert "8dc22f002a724eb7e23402346ca25274" == entries.entry_id(None, "ab" * 32)


def test_a_name_has_one_id_whatever_it_points_at():
    """The id of a named entry depends on the name only."""
    assert entries.entry_id("x", "a") == entries.entry_id("x", "b")
    assert entries.entry_id("x", "a") != entries.entry_id("y", "a")
    assert entries.entry_id(None, "a") != entries.entry_id(None, "b")


def test_no_name_is_the_tip_of_an_entry_without_one():
    """A name cannot be chosen so that it takes the place of an entry without one."""
    tip = "ab" * 32
    assert entries.entry_id(None, tip) not in {
        entries.entry_id(name, tip) for name in (tip, f"tip {tip}", "", "None")
    }


def test_an_entry_that_is_not_there_is_none(folder):
    """A missing file is an answer."""
    assert read_entry(folder, "0" * 32) is None


def test_a_removed_entry_is_gone(store_path):
    """What was removed is neither read nor listed."""
    blocks = BlockStore(open_folder(store_path))
    folder = blocks.folder
    write_entry(folder, ENTRY)
    remove_entries(blocks, [ENTRY.id])
    blocks.close()
    assert read_entry(folder, ENTRY.id) is None
    assert [] == list_ids(folder)


def test_every_flipped_bit_is_detected(folder, flip_bit):
    """No single bit of an entry's file can change unnoticed."""
    path = write(folder)
    good = path.read_bytes()
    unnoticed = []
    for bit in range(len(good) * 8):
        path.write_bytes(flip_bit(good, bit))
        with suppress(IntegrityError):
            unnoticed.append((bit, read_entry(folder, ENTRY.id)))
    assert [] == unnoticed


def test_damage_names_the_file_and_the_remedy(folder, flip_bit):
    """The error of a damaged entry says which file, and what to do."""
    path = write(folder)
    flip_bit(path, 300)
    with pytest.raises(IntegrityError, match="entry file is damaged") as caught:
        read_entry(folder, ENTRY.id)
    assert path == caught.value.path
    assert "save it again" in caught.value.hint


def test_every_truncation_is_detected(folder):
    """An entry's file that is cut short anywhere is damaged."""
    path = write(folder)
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(IntegrityError):
            read_entry(folder, ENTRY.id)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 500,
        b"\xff\xfe\x00",
        b"null",
        b"7",
        b"[]",
        b'["digest", "format"]',
        b'"digest format"',
        b"{}",
        b'{"digest": null, "format": null}',
        b'{"digest": "x", "format": 1, "name": NaN}',
        b'{"digest": "x", "format": 1, "name": 1e999}',
        b'{"digest": "x", "format": 1, "name": "\\ud800"}',
        b'{"digest": "x", "format": 1, "n": ' + b"9" * 5000 + b"}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b" " * 70_000,
    ],
)
def test_what_is_no_entry_is_damaged(folder, data):
    """Any bytes at all give an entry or an IntegrityError."""
    folder.entry_path(ENTRY.id).write_bytes(data)
    with pytest.raises(IntegrityError):
        read_entry(folder, ENTRY.id)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 7},
        {"tip": "AB" * 32},
        {"tip": "ab" * 31},
        {"tip": None},
        {"root": ["cd" * 32]},
        {"num_tokens": -1},
        {"num_tokens": 0},
        {"num_tokens": 1.0},
        {"num_tokens": True},
        {"num_tokens": "1"},
        {"nbytes": None},
        {"nbytes": -1},
        {"codec": None},
        {"model": 7},
        {"made_with": []},
        {"made_with": {"mlx": 7}},
        {"created_at": "now"},
        {"updated_at": None},
        {"updated_at": True},
        {"pinned": 1},
        {"pinned": None},
        {"format": "1"},
        {"format": True},
        {"format": None},
        {"signer": "ef"},
        {"surprise": 1},
        {"nbytes": forge},
    ],
)
def test_a_field_of_the_wrong_type_is_damage(folder, changes):
    """Types are checked even where the digest is right."""
    forge(folder, **changes)
    with pytest.raises(IntegrityError):
        read_entry(folder, ENTRY.id)


def test_the_forgery_itself_is_readable(folder):
    """The tests above fail for the change they make, not for how they make it."""
    forge(folder)
    assert ENTRY == read_entry(folder, ENTRY.id)


def test_a_file_under_another_id_is_damaged(folder):
    """A file renamed to another entry's id does not take its place."""
    path = write(folder)
    other = entries.entry_id("other", "")
    path.rename(folder.entry_path(other))
    with pytest.raises(IntegrityError, match=ENTRY.id):
        read_entry(folder, other)


def test_a_newer_format_is_not_damage(folder):
    """An entry of a later release is told apart, whatever fields it has."""
    forge(folder, format=2, surprise=1)
    with pytest.raises(FormatError, match="format 2"):
        read_entry(folder, ENTRY.id)


def test_other_files_are_not_taken_for_entries(folder):
    """What the store did not write is not listed."""
    write(folder)
    for name in ("notes.json", f".{ENTRY.id}.json", f"{ENTRY.id}.json~", "x"):
        (folder.entries / name).write_text("mine")
    (folder.entries / "folder.json").mkdir()
    assert [ENTRY.id] == list_ids(folder)


def test_the_file_is_json_that_others_can_read(folder):
    """An entry is one JSON object with the documented fields."""
    body = json.loads(write(folder).read_bytes())
    assert json.loads(canonical_json({**asdict(ENTRY), "format": 1})) == {
        key: value for key, value in body.items() if key != "digest"
    }


def test_a_package_without_metadata_has_no_version(tmp_path, monkeypatch, caches):
    """A half-removed package, whose version is `None`, does not spoil an entry."""
    (tmp_path / "mlx_lm-0.31.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with kvstore.Store(tmp_path / "store", codec="raw") as store:
        entry = store.save(*caches.make_conversation(1, 1), caches.MODEL, name="x")
        assert "mlx-lm" not in entry.made_with
        assert entry == store.entry("x")


@pytest.mark.parametrize(
    "changes", [{"made_with": {"mlx": None}}, {"codec": 7}, {"model": "x" * MAX_BYTES}]
)
def test_what_could_not_be_read_again_is_not_written(folder, changes):
    """An entry that no reader takes is refused, and the good one of its name stays."""
    write(folder)
    with pytest.raises(IntegrityError):
        write(folder, replace(ENTRY, **changes))
    assert ENTRY == read_entry(folder, ENTRY.id)
