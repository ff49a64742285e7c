"""A basis: written in one way, read only as it was written, kept in the store."""

import json
import stat
import struct
from dataclasses import replace

import numpy as np
import pytest

from kvstore.errors import FormatError, IntegrityError
from kvstore.format.basis import (
    BasisFile,
    BasisGroup,
    basis_digest,
    basis_to_bytes,
    parse_basis,
)
from kvstore.format.safetensors import ITEM_SIZES
from kvstore.storage.bases import (
    add_basis,
    basis_path,
    list_bases,
    read_basis,
    remove_basis,
)
from kvstore.storage.folder import create_folder

GROUPS = (
    BasisGroup((0, 2), 2, 8, 2, 4, True),
    BasisGroup((1,), 1, 16, 1, 0, False),
)


def make_basis(groups=GROUPS, **changes):
    """Return a basis of bytes that mean nothing."""
    basis = BasisFile(groups, {"1": -3, "1.5": -5}, {"contexts": 2}, {})
    random = np.random.default_rng(1)
    tensors = {
        name: random.bytes(int(np.prod(shape)) * ITEM_SIZES[dtype])
        for name, (dtype, shape) in basis.specs().items()
    }
    return replace(basis, tensors=tensors, **changes)


def with_meta(data, **changes):
    """Return a basis whose metadata says something else."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["kvstore_basis"]) | changes
    header["__metadata__"]["kvstore_basis"] = json.dumps(meta)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def parse(data):
    """Return a basis from bytes under their own digest."""
    return parse_basis(data, basis_digest(data))


def test_a_basis_comes_back():
    """What a file holds is what was written, and writing it again gives its bytes."""
    basis = make_basis()
    data = basis_to_bytes(basis)
    found = parse(data)
    assert basis.groups == found.groups
    assert basis.steps == found.steps
    assert basis.about == found.about
    assert basis.tensors == {name: bytes(x) for name, x in found.tensors.items()}
    assert data == basis_to_bytes(found)


def test_a_basis_of_another_digest_is_refused():
    """The name of a basis is the digest of its bytes: one bit makes it another."""
    data = basis_to_bytes(make_basis())
    digest = basis_digest(data)
    for position in (0, 9, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(IntegrityError, match="digest"):
            parse_basis(bytes(changed), digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": []},
        {"groups": {}},
        {"groups": [{}]},
        {"groups": [1]},
        {"steps": {}},
        {"steps": {"1": 1.5}},
        {"steps": {"1": True}},
        {"steps": {"1": 10**9}},
        {"steps": {"1": 257}},
        {"steps": []},
        {"about": 1},
        {"more": 1},
        {"format": True},
        {"format": "1"},
    ],
)
def test_other_metadata_is_refused(changes):
    """A basis that says something else of itself is damaged, whatever its digest."""
    data = with_meta(basis_to_bytes(make_basis()), **changes)
    with pytest.raises((IntegrityError, FormatError)):
        parse(data)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [2, 0]},
        {"layers": [0, 0]},
        {"layers": [0, 1]},
        {"layers": []},
        {"layers": [0, 2**40]},
        {"layers": [0, "2"]},
        {"num_heads": 0},
        {"num_heads": 3},
        {"num_heads": 2.0},
        {"head_dim": 2**20},
        {"num_joined": 0},
        {"num_joined": 1},
        {"num_joined": 3},
        {"num_joined": True},
        {"num_pairs": 5},
        {"num_pairs": -1},
        {"is_traditional": 1},
        {"extra": 1},
    ],
)
def test_a_group_that_cannot_be_is_refused(change):
    """Layers are in order and covered once; sizes are those of the tensors."""
    data = basis_to_bytes(make_basis())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    groups = json.loads(header["__metadata__"]["kvstore_basis"])["groups"]
    groups[0] |= change
    with pytest.raises(IntegrityError):
        parse(with_meta(data, groups=groups))


def test_a_basis_of_a_newer_release_is_told_apart():
    """Who reads it must upgrade; nothing is damaged."""
    with pytest.raises(FormatError, match="format 2"):
        parse(with_meta(basis_to_bytes(make_basis()), format=2))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_a_basis_that_is_cut_is_refused(size):
    """A file that ends too soon is damaged, under its own digest too."""
    with pytest.raises(IntegrityError):
        parse(basis_to_bytes(make_basis())[:size])


def test_a_tensor_of_another_size_is_not_written():
    """A basis that could not be read back is not written."""
    basis = make_basis()
    short = {**basis.tensors, "1.scale": b""}
    with pytest.raises(ValueError, match=r"1\.scale"):
        basis_to_bytes(replace(basis, tensors=short))


def test_a_store_keeps_a_basis_under_its_digest(tmp_path):
    """It is found by its digest, cannot be written to, and lies there once."""
    folder = create_folder(tmp_path / "store")
    assert [] == list_bases(folder)
    data = basis_to_bytes(make_basis())
    digest = add_basis(folder, data)
    assert digest == add_basis(folder, data) == basis_digest(data)
    assert [digest] == list_bases(folder)
    assert data == basis_to_bytes(read_basis(folder, digest))
    path = basis_path(folder, digest)
    assert 0o400 == stat.S_IMODE(path.stat().st_mode)
    assert [] == list(folder.staging.iterdir())
    remove_basis(folder, digest)
    assert [] == list_bases(folder)


def test_a_basis_that_is_missing_or_damaged_is_an_integrity_error(tmp_path):
    """Nothing is decoded with a basis other than the one that was named."""
    folder = create_folder(tmp_path / "store")
    with pytest.raises(IntegrityError, match="lacks the basis"):
        read_basis(folder, "ab" * 32)
    digest = add_basis(folder, basis_to_bytes(make_basis()))
    path = basis_path(folder, digest)
    path.chmod(0o600)
    path.write_bytes(basis_to_bytes(make_basis(steps={"1": 7})))
    with pytest.raises(IntegrityError, match="digest"):
        read_basis(folder, digest)


def test_bytes_that_are_no_basis_are_not_added(tmp_path):
    """What cannot be read back is not acknowledged."""
    folder = create_folder(tmp_path / "store")
    with pytest.raises(IntegrityError):
        add_basis(folder, b"no basis at all")
    assert [] == list_bases(folder)


@pytest.mark.parametrize("name", ["", "../config", "AB" * 32, "ab" * 31, "a/" * 32])
def test_no_other_name_becomes_a_path(tmp_path, name):
    """A block names a digest, and nothing else reaches the folder."""
    with pytest.raises(ValueError, match="digest"):
        basis_path(create_folder(tmp_path / "store"), name)
