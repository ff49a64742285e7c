"""Shards: reproducible, readable by others, and never believed unchecked."""

import hashlib
import json
import os
import struct
from dataclasses import replace

import blake3
import mlx.core as mx
import numpy as np
import pytest
import safetensors

from kvstore.errors import FormatError, IntegrityError
from kvstore.format import shard as shards
from kvstore.format.block import EXACT_BITS, EncodedBlock, LayerError, Origin, Part
from kvstore.format.chain import hash_root, split_tokens
from kvstore.format.config import StoreConfig
from kvstore.format.documents import canonical_json
from kvstore.storage import files
from kvstore.storage import shards as storage_shards
from kvstore.storage.folder import StoreFolder
from kvstore.storage.shards import (
    list_shards,
    open_shard,
    open_shard_at,
    publish_shard,
    quarantine_shard,
    shard_path,
    staged_copy,
    staged_shard,
)

ORIGIN = Origin({"weights": "a", "scale": 1.5}, [{"class": "KVCache"}])
ROOT = hash_root("ab" * 32, ORIGIN.layout)
BLOCKS = list(split_tokens(ROOT, [-5, *range(40)], 16))
NO_DIGEST = "0" * 64


def make_part(name, dtype, shape, seed, raw_nbytes=None):
    """Return a part of random bytes."""
    size = int(np.prod(shape)) * {"U8": 1, "F16": 2, "F32": 4}[dtype]
    # The low bits of floats only: no NaN, which would not equal itself.
    data = np.random.default_rng(seed).integers(0, 60, size, np.uint8).tobytes()
    return Part(name, dtype, shape, data, raw_nbytes)


def encode(number, block):
    """Return a block with a few parts of different dtypes."""
    parts = (
        make_part("0.k.codes", "U8", (2, 2, 3, 8), number, 500),
        make_part("0.k.mean", "F16", (2, 2, 5), number + 100),
        make_part("0.v.rows", "F32", (2, 1, 3), number + 200),
    )
    errors = (LayerError(0, "k", 0.125), LayerError(3, "v", 0.0)) if number else ()
    return EncodedBlock(block, "turbo4+zstd", False, 4, parts, errors=errors)


ENCODED = [encode(number, block) for number, block in enumerate(BLOCKS)]

WRITE = """
import sys, runpy
from pathlib import Path
names = runpy.run_path(sys.argv[1])
print(names["write"](Path(sys.argv[2])))
"""


def of(folder):
    """Return a store in the clear."""
    return StoreFolder(folder, StoreConfig("0" * 32, 16))


def write(folder, blocks=None, origin=ORIGIN):
    """Write a shard and return its name."""
    for name in ("tmp", "shards"):
        (folder / name).mkdir(exist_ok=True)
    blocks = ENCODED if blocks is None else blocks
    with staged_shard(of(folder), origin, blocks) as staged:
        publish_shard(folder / "shards", staged)
        return staged.name


def path_of(folder, name):
    """Return a shard's file."""
    return shard_path(folder / "shards", name)


def read(folder, name):
    """Return a shard's header and the bytes of its blocks."""
    with open_shard(of(folder), name) as opened:
        return opened.header, [bytes(b) for b in opened.read(opened.header.blocks)]


def put(folder, data):
    """Write bytes as a shard of some name, and return the name."""
    name = "ab" * 32
    path = path_of(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def unpack(data):
    """Return a shard's tensors, what it says of itself, and its data."""
    (length,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + length])
    about = json.loads(tensors.pop("__metadata__")["kvstore"])
    return tensors, about, data[8 + length :]


def forge(tensors, about, data):
    """Return the bytes of a shard whose header digest is right, whatever it says."""
    if isinstance(about, dict) and "header_digest" in about:
        about = {**about, "header_digest": NO_DIGEST}
    metadata = {"kvstore": canonical_json(about).decode()}
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":"))
    header = text.encode() + b" " * (-len(text.encode()) % 8)
    digest = blake3.blake3(header).hexdigest()
    field = '\\"header_digest\\":\\"%s\\"'
    header = header.replace((field % NO_DIGEST).encode(), (field % digest).encode())
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture
def shard(tmp_path):
    """The bytes of a good shard."""
    return path_of(tmp_path, write(tmp_path)).read_bytes()


def test_what_was_written_is_read(tmp_path):
    """Blocks, parts, origin and bytes come back."""
    header, data = read(tmp_path, write(tmp_path))
    assert ORIGIN == header.origin
    assert BLOCKS == [stored.block for stored in header.blocks]
    for encoded, stored, octets in zip(ENCODED, header.blocks, data, strict=True):
        assert b"".join(part.data for part in encoded.parts) == octets
        assert encoded == shards.as_written(stored, memoryview(octets))


def test_the_same_input_gives_the_same_bytes(tmp_path, run_python):
    """Two folders and two processes write the same shard."""
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    name = write(tmp_path)
    assert name == write(tmp_path / "b")
    assert f"{name}\n" == run_python(WRITE, __file__, tmp_path / "c").stdout
    assert (
        path_of(tmp_path, name).read_bytes()
        == path_of(tmp_path / "c", name).read_bytes()
    )


def test_a_shard_is_named_by_its_header(tmp_path):
    """Its name is the SHA-256 of what stands before the data, its digests included."""
    name = write(tmp_path)
    data = path_of(tmp_path, name).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert name == hashlib.sha256(data[: 8 + size]).hexdigest()
    with open_shard(of(tmp_path), name) as opened:
        assert name == opened.name()


def test_a_shard_is_read_only_and_leaves_nothing_behind(tmp_path):
    """A shard has mode 0400, and the staging folder is empty again."""
    name = write(tmp_path)
    assert 0o400 == path_of(tmp_path, name).stat().st_mode & 0o777
    assert [] == os.listdir(tmp_path / "tmp")


def test_a_shard_that_is_not_published_is_gone(tmp_path):
    """What was staged and not renamed leaves no file."""
    (tmp_path / "tmp").mkdir()
    with staged_shard(of(tmp_path), ORIGIN, ENCODED) as staged:
        assert staged.path.exists()
    assert [] == os.listdir(tmp_path / "tmp")


def test_a_shard_is_synced_before_it_can_be_published(tmp_path, monkeypatch):
    """Every byte is on the disk by the time that a shard may be renamed."""
    (tmp_path / "tmp").mkdir()
    sizes = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size)
    )
    with staged_shard(of(tmp_path), ORIGIN, ENCODED) as staged:
        assert [staged.header.nbytes] == sizes


@pytest.mark.parametrize("framework", ["numpy", "mlx"])
def test_the_safetensors_library_reads_a_shard(tmp_path, framework):
    """A shard is a safetensors file: names, dtypes, shapes and numbers are right."""
    path = path_of(tmp_path, write(tmp_path))
    with safetensors.safe_open(path, framework=framework) as opened:
        assert {
            f"{number}.{part.name}"
            for number, encoded in enumerate(ENCODED)
            for part in encoded.parts
        } == set(opened.keys())
        for number, encoded in enumerate(ENCODED):
            for part in encoded.parts:
                array = np.array(opened.get_tensor(f"{number}.{part.name}"))
                assert part.shape == array.shape
                assert bytes(part.data) == array.tobytes()


def test_mlx_reads_a_shard(tmp_path):
    """`mx.load` gives the same numbers."""
    path = path_of(tmp_path, write(tmp_path))
    loaded = mx.load(str(path))
    for number, encoded in enumerate(ENCODED):
        for part in encoded.parts:
            array = np.array(loaded[f"{number}.{part.name}"])
            assert (part.shape, bytes(part.data)) == (array.shape, array.tobytes())


def test_a_block_lies_in_one_piece_with_one_digest(shard):
    """The parts of a block follow each other, and its digest covers just them."""
    tensors, about, data = unpack(shard)
    position = 0
    for number, (encoded, row) in enumerate(zip(ENCODED, about["blocks"], strict=True)):
        begin = position
        for part in encoded.parts:
            offsets = tensors[f"{number}.{part.name}"]["data_offsets"]
            assert [position, position + len(part.data)] == offsets
            position += len(part.data)
        assert row["digest"] == blake3.blake3(data[begin:position]).hexdigest()


def test_the_data_starts_at_a_multiple_of_eight(shard):
    """The header is padded with spaces, as the format says."""
    (length,) = struct.unpack("<Q", shard[:8])
    assert 0 == length % 8


def test_every_flipped_bit_of_the_header_is_refused(tmp_path, flip_bit):
    """No bit of length or header can change unnoticed."""
    shard = path_of(tmp_path, write(tmp_path, ENCODED[2:])).read_bytes()
    (length,) = struct.unpack("<Q", shard[:8])
    unnoticed = []
    for bit in range((8 + length) * 8):
        name = put(tmp_path, flip_bit(shard, bit))
        try:
            read(tmp_path, name)
            unnoticed.append(bit)
        except IntegrityError as error:
            if error.path != path_of(tmp_path, name) or not error.hint:
                unnoticed.append(bit)
    assert [] == unnoticed


def test_a_shard_cut_off_anywhere_is_refused(tmp_path, shard):
    """A truncated shard is refused, at whatever byte it ends."""
    (length,) = struct.unpack("<Q", shard[:8])
    inside = range(8 + length + 1, len(shard), 17)
    for size in (*range(0, 8 + length + 1, 29), 8 + length, *inside, len(shard) - 1):
        name = put(tmp_path, shard[:size])
        with pytest.raises(IntegrityError):
            read(tmp_path, name)


def test_a_shard_with_bytes_appended_is_refused(tmp_path, shard):
    """A shard that is longer than it says is refused."""
    name = put(tmp_path, shard + b"\0")
    with pytest.raises(IntegrityError, match="the data at"):
        read(tmp_path, name)


def test_a_flipped_bit_of_the_data_spoils_just_its_block(tmp_path, shard, flip_bit):
    """A block that does not match its digest is named; its neighbours are read."""
    (length,) = struct.unpack("<Q", shard[:8])
    header, good = read(tmp_path, put(tmp_path, shard))
    for number, stored in enumerate(header.blocks):
        for at in (stored.begin, (stored.begin + stored.end) // 2, stored.end - 1):
            name = put(tmp_path, flip_bit(shard, (8 + length + at) * 8 + at % 8))
            with open_shard(of(tmp_path), name) as opened:
                for other, block in enumerate(opened.header.blocks):
                    if other != number:
                        assert [good[other]] == [bytes(b) for b in opened.read([block])]
                        continue
                    with pytest.raises(IntegrityError) as caught:
                        list(opened.read([block]))
                    assert block.block.hash.hex() == caught.value.block


@pytest.mark.parametrize("portion", [1, 7, 64, 10**6])
@pytest.mark.parametrize("sizes", [(), (0, 3, 20, 0, 5), (13,)])
def test_a_block_is_read_and_checked_in_portions(tmp_path, monkeypatch, portion, sizes):
    """Whatever the portions and the buffers are, a block is whole or refused."""
    monkeypatch.setattr(storage_shards, "_PORTION_BYTES", portion)
    path = path_of(tmp_path, write(tmp_path))
    whole = path.read_bytes()
    with open_shard_at(path) as opened:
        stored = opened.header.blocks[1]
        first, size = opened.header.data_begin + stored.begin, stored.end - stored.begin
        rest = size - sum(sizes)
        buffers = [memoryview(bytearray(n)) for n in (*sizes, rest)]
        opened.read_into(stored, buffers)
        assert b"".join(buffers) == whole[first : first + size]
    for at in (first, first + size // 2, first + size - 1):
        path.chmod(0o600)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with open_shard_at(path) as opened, pytest.raises(IntegrityError):
            opened.read_into(opened.header.blocks[1], buffers)


def test_blocks_before_the_damaged_one_are_yielded(tmp_path, shard, flip_bit):
    """A read of several blocks gives those that precede the damage."""
    name = put(tmp_path, flip_bit(shard, len(shard) * 8 - 1))
    with open_shard(of(tmp_path), name) as opened:
        blocks = opened.read(opened.header.blocks)
        assert len(next(blocks)) > 0
        assert len(next(blocks)) > 0
        with pytest.raises(IntegrityError):
            next(blocks)


def test_a_missing_shard_is_not_a_damaged_one(tmp_path):
    """A shard that is not there is a FileNotFoundError."""
    with (
        pytest.raises(FileNotFoundError),
        open_shard(of(tmp_path), "ab" * 32),
    ):
        pass


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "AB" * 32, "ab" * 33])
def test_a_name_that_is_none_opens_nothing(tmp_path, name):
    """A shard's name is 64 hex digits, so it cannot point elsewhere."""
    with pytest.raises(ValueError, match="not the name of a shard"):
        shard_path(tmp_path, name)


def test_only_shards_are_listed(tmp_path):
    """What the store did not write is not taken for a shard."""
    name = write(tmp_path)
    folder = path_of(tmp_path, name).parent
    (folder / "notes.safetensors").write_bytes(b"mine")
    (folder / f"{name}.safetensors.bak").write_bytes(b"mine")
    assert [name] == list_shards(tmp_path / "shards")


def test_a_quarantined_shard_keeps_its_bytes(tmp_path, shard):
    """What cannot be read is moved, not deleted."""
    (tmp_path / "quarantine").mkdir()
    name = put(tmp_path, shard[:100])
    aside = quarantine_shard(tmp_path / "shards", name, tmp_path / "quarantine")
    assert shard[:100] == aside.read_bytes()
    assert name not in list_shards(tmp_path / "shards")


def test_a_shard_that_cannot_be_read_back_is_not_published(tmp_path):
    """A block that our own check refuses is never acknowledged."""
    (tmp_path / "tmp").mkdir()
    odd = replace(ENCODED[0], bits=EXACT_BITS)
    with (
        pytest.raises(IntegrityError, match="calls itself exact"),
        staged_shard(of(tmp_path), ORIGIN, [odd]),
    ):
        pass
    assert [] == os.listdir(tmp_path / "tmp")


@pytest.mark.parametrize(
    "origin",
    [
        Origin({"header_digest": "ab" * 32}, ORIGIN.layout),
        Origin({"a": f'"header_digest":"{NO_DIGEST}"'}, ORIGIN.layout),
        Origin({"b": f'\\"header_digest\\":\\"{NO_DIGEST}'}, ORIGIN.layout),
    ],
)
def test_no_text_can_pass_for_the_header_digest(tmp_path, origin):
    """What looks like the digest's field elsewhere in a header does no harm."""
    header, _ = read(tmp_path, write(tmp_path, origin=origin))
    assert origin == header.origin


def test_a_field_that_spells_a_blank_digest_is_refused_when_written(tmp_path):
    """What a reader could not tell from the header's own digest is not written."""
    twice = Origin({"header_digest": "0" * 64}, [])
    with pytest.raises(ValueError, match="blank header digest"):
        write(tmp_path, origin=twice)


def edit_row(**changes):
    """Return an edit that changes fields of the first row of the block table."""

    def edit(tensors, about):
        about["blocks"][0].update(changes)

    return edit


def edit_about(**changes):
    """Return an edit that changes fields of what a shard says of itself."""

    def edit(tensors, about):
        about.update(changes)

    return edit


def drop(name):
    """Return an edit that takes a field of the first row away."""

    def edit(tensors, about):
        del about["blocks"][0][name]

    return edit


def rename(old, new):
    """Return an edit that gives a tensor another name."""

    def edit(tensors, about):
        tensors[new] = tensors.pop(old)

    return edit


def scatter(tensors, about):
    """Let two blocks swap tensors of equal size."""
    left, right = tensors["0.0.k.mean"], tensors["1.0.k.mean"]
    left["data_offsets"], right["data_offsets"] = (
        right["data_offsets"],
        left["data_offsets"],
    )


def multiply(tensors, about):
    """Say that there are 65 blocks."""
    about["blocks"] = [about["blocks"][0]] * 65


HOSTILE = {
    "a scattered block": scatter,
    "65 blocks": multiply,
    "a block without a tensor": lambda t, a: a["blocks"].append(a["blocks"][0]),
    "a tensor of no block": lambda t, a: a["blocks"].pop(),
    "a tensor without a number": rename("0.0.k.codes", "x.0.k.codes"),
    "a tensor of a negative block": rename("0.0.k.codes", "-1.0.k.codes"),
    "two spellings of one tensor": rename("0.0.v.rows", "00.0.k.codes"),
    "a raw size of no tensor": edit_row(raw={"0.k.other": 1}),
    "a negative raw size": edit_row(raw={"0.k.codes": -1}),
    "a raw size that is no integer": edit_row(raw={"0.k.codes": 1.5}),
    "a raw size of true": edit_row(raw={"0.k.codes": True}),
    "a raw size of 2^63": edit_row(raw={"0.k.codes": 2**63}),
    "raw sizes that are a list": edit_row(raw=[]),
    "tokens of text": edit_row(tokens=["1"]),
    "tokens of floats": edit_row(tokens=[1.0]),
    "tokens of true": edit_row(tokens=[True]),
    "tokens of null": edit_row(tokens=[None]),
    "a token of 2^63": edit_row(tokens=[2**63]),
    "no tokens": edit_row(tokens=[]),
    "tokens that are an object": edit_row(tokens={}),
    "a negative start": edit_row(start=-1),
    "extras below nothing": edit_row(extras=-1),
    "extras of 2^63": edit_row(extras=2**63),
    "a start of 1.0": edit_row(start=1.0),
    "a start of true": edit_row(start=True),
    "a hash of capitals": edit_row(hash="AB" * 32),
    "a hash that is short": edit_row(hash="ab"),
    "a hash that is a number": edit_row(hash=7),
    "a parent of null": edit_row(parent=None),
    "a digest of null": edit_row(digest=None),
    "a codec that is a number": edit_row(codec=7),
    "lossless as a number": edit_row(lossless=1),
    "exact as text": edit_row(exact="yes"),
    "exact and lossy": edit_row(exact=True, lossless=False),
    "a row that is a list": lambda t, a: a.update(blocks=[[]] * 3),
    "a row that is null": lambda t, a: a.update(blocks=[None] * 3),
    "a row that is text": lambda t, a: a.update(blocks=["raw"] * 3),
    "rows that are an object": edit_about(blocks={}),
    "no rows": edit_about(blocks=[]),
    "a fingerprint that is a list": edit_about(fingerprint=[]),
    "a layout that is an object": edit_about(layout={}),
    "a format of text": edit_about(format="1"),
    "a format of true": edit_about(format=True),
    "no format": edit_about(format=None),
    "bits of text": edit_row(bits="4"),
    "bits below none": edit_row(bits=-1),
    "bits of exact rows": edit_row(bits=255),
    **{
        f"no {name}": drop(name)
        for name in ("hash", "parent", "start", "tokens", "codec", "lossless",
                     "exact", "digest", "raw")
    },
}  # fmt: skip


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_with_a_right_digest_is_refused(tmp_path, shard, edit):
    """What a header says is checked even where all digests are right."""
    tensors, about, data = unpack(shard)
    edit(tensors, about)
    name = put(tmp_path, forge(tensors, about, data))
    with pytest.raises(IntegrityError, match="shard cannot be read"):
        read(tmp_path, name)


def test_the_forgery_itself_is_readable(tmp_path, shard):
    """The test above fails for its edits, not for how they are made."""
    assert shard == forge(*unpack(shard))


@pytest.mark.parametrize(
    "errors",
    [
        {},
        ["x"],
        [[]],
        [[-1, "k", 0.1]],
        [[True, "k", 0.1]],
        [[0, "x", 0.1]],
        [[0, "k", "0.1"]],
        [[0, "k", True]],
        [[0, "k", -0.1]],
        [[0, "k", 1e200]],
        [[0, "k", 10**400]],
        [[0, "k", 0.1], [0, "k", 0.2]],
        [[1, "k", 0.1], [0, "k", 0.1]],
        [[n, "k", 0.1] for n in range(9000)],
    ],
    ids=lambda errors: str(errors)[:40],
)
def test_errors_that_cannot_be_are_none(tmp_path, shard, errors):
    """They are only advice: no block is lost for them."""
    tensors, about, data = unpack(shard)
    edit_row(errors=errors)(tensors, about)
    header, _ = read(tmp_path, put(tmp_path, forge(tensors, about, data)))
    assert () == header.blocks[0].errors
    assert header.blocks[1].errors


def test_an_error_may_be_an_integer(tmp_path, shard):
    """JSON has one kind of number."""
    tensors, about, data = unpack(shard)
    edit_row(errors=[[0, "k", 1]])(tensors, about)
    header, _ = read(tmp_path, put(tmp_path, forge(tensors, about, data)))
    assert ((0, "k", 1),) == header.blocks[0].errors


@pytest.mark.parametrize("about", [[], None, 7, "x", {}, [["header_digest", "x"]]])
def test_metadata_that_is_no_object_is_refused(tmp_path, shard, about):
    """Whatever JSON stands in the metadata, the answer is an IntegrityError."""
    tensors, _, data = unpack(shard)
    name = put(tmp_path, forge(tensors, about, data))
    with pytest.raises(IntegrityError, match="shard cannot be read"):
        read(tmp_path, name)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"kvstore": "{"}, {"kvstore": "[" * 9000}, {"kvstore": "NaN"}],
)
def test_a_safetensors_file_of_others_is_refused(tmp_path, shard, metadata):
    """A file that is no shard of ours is said to be unreadable."""
    tensors, _, data = unpack(shard)
    if metadata is not None:
        tensors["__metadata__"] = metadata
    header = json.dumps(tensors).encode()
    name = put(tmp_path, struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(IntegrityError, match="shard cannot be read"):
        read(tmp_path, name)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path, shard, length):
    """The length is checked before anything is allocated."""
    name = put(tmp_path, struct.pack("<Q", length) + shard[8:])
    with pytest.raises(IntegrityError):
        read(tmp_path, name)


def test_a_newer_format_is_not_damage(tmp_path, shard):
    """A shard of a later release is told apart from a damaged one."""
    tensors, about, data = unpack(shard)
    about["format"] = 2
    name = put(tmp_path, forge(tensors, about, data))
    with pytest.raises(FormatError, match="format 2"):
        read(tmp_path, name)


def test_short_writes_and_reads_give_the_same_shard(tmp_path, monkeypatch):
    """System calls that do less than they were asked change nothing."""
    (tmp_path / "b").mkdir()
    name = write(tmp_path)
    expected = read(tmp_path, name)
    original_write, original_read = os.writev, os.preadv
    monkeypatch.setattr(
        os, "writev", lambda fd, data: original_write(fd, [data[0][:13]])
    )
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: original_read(fd, [buffers[0][:11]], at)
    )
    assert name == write(tmp_path / "b")
    assert expected == read(tmp_path / "b", name)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, False),
        (63, False),
        (64, True),
    ],
)
def test_a_shard_is_full_at_64_blocks(blocks, expected):
    """A shard takes no more than 64 blocks."""
    assert expected == shards.is_full([ENCODED[0]] * blocks)


def test_a_shard_is_full_at_64_megabytes():
    """A shard takes no more bytes than it should hold."""
    part = Part("0.k.rows", "U8", (1 << 25,), bytes(1 << 25))
    half = replace(ENCODED[0], parts=(part,))
    assert not shards.is_full([half])
    assert shards.is_full([half, half])


def test_a_shard_never_has_more_tensors_than_a_reader_accepts():
    """A shard is full before its tensors are too many to be read."""
    parts = tuple(make_part(f"{i}.k.rows", "U8", (1,), i) for i in range(1000))
    many = replace(ENCODED[0], parts=parts)
    assert [False, False, False, True] == [
        shards.is_full([many] * count) for count in (1, 2, 3, 4)
    ]


def test_reading_opens_the_file_once_and_closes_it(tmp_path, monkeypatch):
    """Header and data come from one descriptor, which is closed."""
    name = write(tmp_path)
    opened = []
    original = files.open_regular
    monkeypatch.setattr(
        files, "open_regular", lambda path: opened.append(path) or original(path)
    )
    before = len(os.listdir("/dev/fd"))
    read(tmp_path, name)
    assert [path_of(tmp_path, name)] == opened
    assert before == len(os.listdir("/dev/fd"))


def test_a_copy_is_the_same_shard(tmp_path):
    """All blocks of a shard, copied, give its very bytes; some give a smaller one."""
    name = write(tmp_path)
    with open_shard(of(tmp_path), name) as opened:
        blocks = opened.header.blocks
        header = shards.shard_header(opened.header.origin, blocks)
        with staged_copy(of(tmp_path), opened, blocks) as copy:
            assert copy.name == name
        with staged_copy(of(tmp_path), opened, blocks[1:2]) as copy:
            assert [b.block for b in copy.header.blocks] == [BLOCKS[1]]
            with open_shard_at(copy.path) as other:
                (data,) = other.read(other.header.blocks)
        assert [bytes(data)] == [bytes(d) for d in opened.read(blocks[1:2])]
    assert path_of(tmp_path, name).read_bytes().startswith(header)
    assert [] == os.listdir(tmp_path / "tmp")


def test_stored_blocks_are_grouped_as_a_save_groups_them(tmp_path):
    """A shard closes after the same block, whoever fills it."""
    parts = tuple(make_part(f"{i}.k.rows", "U8", (1,), i) for i in range(1000))
    name = write(tmp_path, [replace(ENCODED[0], parts=parts)])
    (stored,) = read(tmp_path, name)[0].blocks
    assert [4, 4, 1] == [len(group) for group in shards.group_blocks([stored] * 9)]
    (stored,) = read(tmp_path, write(tmp_path, ENCODED[:1]))[0].blocks
    assert [64, 6] == [len(group) for group in shards.group_blocks([stored] * 70)]
    assert [] == list(shards.group_blocks([]))
