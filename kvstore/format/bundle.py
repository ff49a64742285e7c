"""Bundles: a store of one entry in one tar file, to hand over.

A bundle is a POSIX archive (ustar) of `config.json`, one entry, the bases that its
blocks name and its shards, all as they lie in a store's folder: `tar xf` gives a folder
that ``Store`` opens. One entry has exactly one bundle. The reader compares every
header, all padding and the end with the bytes that the writer would have written, and
the parsers of the store read the files. So links, paths, duplicates and extensions are
refused without being understood.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from struct import pack
from typing import IO, Any

from ..errors import FormatError, IntegrityError
from .basis import MAX_BYTES as MAX_BASIS_BYTES
from .basis import parse_basis
from .block import Origin
from .chain import origin_root
from .config import (
    CONFIG,
    MAX_CONFIG_BYTES,
    StoreConfig,
    config_to_bytes,
    parse_config,
)
from .entry import (
    MAX_BYTES,
    Entry,
    check_name,
    entry_id,
    entry_to_bytes,
    normalize_name,
    parse_entry,
)
from .safetensors import MAX_HEADER_BYTES
from .shard import parse_shard_header
from .signature import (
    MAX_SIGNATURE_BYTES,
    Signature,
    check_signature,
    sign,
    signature_from_bytes,
    signature_to_bytes,
)

# The largest size that the eleven octal digits of a header can spell.
MAX_SHARD_BYTES = 8**11 - 1
_RECORD = 512
_END = bytes(2 * _RECORD)
_NAME, _SIZE = slice(0, 100), slice(124, 135)
_PART_BYTES = 1024 * 1024
_MAX_TIME = 2.0**33
_ENTRY = re.compile(r"entries/([0-9a-f]{32})\.json")
_BASIS = re.compile(r"bases/([0-9a-f]{64})\.safetensors")
_SIGNATURE = "signature.json"
_SHARD = re.compile(r"shards/(..)/(\1[0-9a-f]{62})\.safetensors")

Shard = tuple[str, int, Iterable[bytes | memoryview]]
"""Name, size and bytes of a shard."""


def is_bundle(start: bytes) -> bool:
    """Say by its first 512 bytes whether a file calls itself a bundle."""
    return start.startswith(CONFIG.encode() + b"\0")


def entry_member(entry: str) -> str:
    """Return the path of an entry's file in a bundle, as in a store."""
    return f"entries/{entry}.json"


def shard_member(name: str) -> str:
    """Return the path of a shard in a bundle, as in a store."""
    return f"shards/{name[:2]}/{name}.safetensors"


def basis_member(digest: str) -> str:
    """Return the path of a basis in a bundle, as in a store."""
    return f"bases/{digest}.safetensors"


def bundled_entry(entry: Entry, nbytes: int) -> Entry:
    """Return an entry as its bundle holds it: without what only its store knows."""
    return replace(
        entry,
        # A path may have bytes that are not text.
        model=entry.model.encode(errors="replace").decode(),
        nbytes=nbytes,
        updated_at=entry.created_at,
        pinned=False,
        signer="",  # who gives it on signs anew, or does not
        probe=None,  # its word would count as that of who takes it
    )


def write_bundle(
    file: IO[bytes],
    entry: Entry,
    block_size: int,
    shards: Sequence[Shard],
    *,
    bases: Mapping[str, bytes],
    secret: str | None = None,
) -> int:
    """Write a bundle and return its size in bytes.

    Args:
        file: Opened for writing bytes; need not be seekable.
        entry: From :func:`bundled_entry`.
        block_size: Tokens in a full block.
        shards: The shards of the entry's blocks, first to last.
        bases: The bases that those name, by their digests.
        secret: The key to sign it with.

    Raises:
        IntegrityError: A reader would refuse such an entry.
    """
    _check_entry(entry)
    config = config_to_bytes(StoreConfig(entry.id, block_size))
    data = entry_to_bytes(entry)
    nbytes = _write_member(file, CONFIG, len(config), [config])
    nbytes += _write_member(file, entry_member(entry.id), len(data), [data])
    if secret is not None:
        named = [*sorted(bases), *(name for name, *_ in shards)]
        described = _description(config, data, named)
        signed = signature_to_bytes(sign(secret, "bundle", described))
        nbytes += _write_member(file, _SIGNATURE, len(signed), [signed])
    for digest, basis in sorted(bases.items()):
        nbytes += _write_member(file, basis_member(digest), len(basis), [basis])
    for name, size, parts in shards:
        nbytes += _write_member(file, shard_member(name), size, parts)
    return nbytes + _write(file, _END)


def _description(config: bytes, entry: bytes, names: Sequence[str]) -> list[str]:
    """Return what tells every file of a bundle in its order, but the signature."""
    return [*(hashlib.sha256(data).hexdigest() for data in (config, entry)), *names]


class BundleReader:
    """Reads a bundle from its beginning; it need not be seekable.

    Args:
        file: Opened for reading bytes.

    Attributes:
        entry: The entry.
        block_size: Tokens in a full block.
        signer: The public key that signed it, which is checked at its end; or nothing.
        bases: The bases that come with it, by their digests.
        origin: What computed the rows, as the first shard says. The entry's root is
            that of this fingerprint and layout.

    Raises:
        FormatError: It is no bundle, or one of a newer release.
        IntegrityError: It is not one that this format's writer would have written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.block_size, store, config = self._read_config()
        self.entry, entry = self._read_entry(store)
        self._signature, header = self._read_signature(self._read(_RECORD))
        self.signer = self._signature.key if self._signature else ""
        self.bases: dict[str, bytes] = {}
        header = self._read_bases(header)
        self._described = _description(config, entry, [*self.bases])
        # Its header is read now, so that the model is known before any rows have come.
        self._first = self._next_shard(header)
        if self._first is None:
            raise refused("it has no shard")
        self._start, self.origin = self._read_origin(*self._first)
        if origin_root(self.origin).hex() != self.entry.root:
            raise refused("its root is not that of its fingerprint and layout")

    def shards(self) -> Iterator[tuple[str, int, Iterator[bytes]]]:
        """Yield name, size and bytes of each shard; the bytes are to be read in full.

        Raises:
            IntegrityError: Something else than a shard or the end follows.
        """
        shard, start = self._first, self._start
        while shard is not None:
            name, size = shard
            yield name, size, chain([start], self._parts(size - len(start)))
            self._skip_padding(size)
            shard, start = self._next_shard(self._read(_RECORD)), b""

    def _read_config(self) -> tuple[int, str, bytes]:
        """Return block size and the store's id, which is the entry's, and its bytes."""
        header = self._read(_RECORD, is_start=True)
        size = _member_size(header)
        # Headers are compared with what we would write: no field is read that could
        # mean two things.
        if not 0 < size <= MAX_CONFIG_BYTES or header != _header(CONFIG, size):
            raise refused("its first header is not one of a bundle")
        data = self._read(size)
        self._skip_padding(size)
        try:
            config = parse_config(Path(CONFIG), data)
        except IntegrityError as error:
            raise refused(str(error)) from error
        # JSON can be spelled in several ways; a bundle has one.
        if data != config_to_bytes(StoreConfig(config.id, config.block_size)):
            raise refused(f"its {CONFIG} has other fields, or another spelling")
        return config.block_size, config.id, data

    def _read_entry(self, store: str) -> tuple[Entry, bytes]:
        header = self._read(_RECORD)
        size = _member_size(header)
        match = _ENTRY.fullmatch(_member_name(header))
        if not match or size > MAX_BYTES or header != _header(match[0], size):
            raise refused("its second header is not that of an entry")
        data = self._read(size)
        self._skip_padding(size)
        try:
            entry = parse_entry(Path(match[0]), data)
        except IntegrityError as error:
            raise refused(str(error)) from error
        # A bundle is a store of one entry, and has the id of that.
        if entry.id != store:
            raise refused("its id is not its entry's")
        _check_entry(entry)
        return entry, data

    def _read_signature(self, header: bytes) -> tuple[Signature | None, bytes]:
        """Return the signature, where there is one, and the header behind it."""
        if _member_name(header) != _SIGNATURE:
            return None, header
        size = _member_size(header)
        if size > MAX_SIGNATURE_BYTES or header != _header(_SIGNATURE, size):
            raise refused("a header is not that of a signature")
        data = self._read(size)
        self._skip_padding(size)
        try:
            return signature_from_bytes(data), self._read(_RECORD)
        except ValueError as error:
            raise refused(str(error)) from error

    def _read_bases(self, header: bytes) -> bytes:
        """Take the bases that follow, and return the header behind them."""
        while match := _BASIS.fullmatch(_member_name(header)):
            digest, size = match[1], _member_size(header)
            held = sum(map(len, self.bases.values()))
            # In order, so that one entry has one bundle.
            is_next = all(other < digest for other in self.bases)
            is_small = held + size <= MAX_BASIS_BYTES
            if not (is_next and is_small) or header != _header(match[0], size):
                raise refused("a header is not that of a basis")
            data = self._read(size)
            self._skip_padding(size)
            try:
                parse_basis(data, digest)
            except IntegrityError as error:
                raise refused(str(error)) from error
            self.bases[digest] = data
            header = self._read(_RECORD)
        return header

    def _next_shard(self, header: bytes) -> tuple[str, int] | None:
        """Return name and size of the shard of a header; ``None`` at the end."""
        if not any(header):
            # An archive ends with two empty records, and nothing may hide behind them.
            if any(self._read(_RECORD)) or self._file.read(1):
                raise refused("something follows its end")
            # Only now has all been read that the signature is of.
            if self._signature is not None:
                check_signature(self._signature, "bundle", self._described)
            return None
        size = _member_size(header)
        match = _SHARD.fullmatch(_member_name(header))
        if not match or header != _header(match[0], size):
            raise refused("a header is not that of a shard")
        self._described.append(match[2])
        return match[2], size

    def _read_origin(self, name: str, size: int) -> tuple[bytes, Origin]:
        """Return the first bytes of a shard, and what they say computed it."""
        start = self._read(min(8, size))
        length = int.from_bytes(start, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise refused(f"shard {name[:12]}: header of {length} bytes")
        header = self._read(length)
        try:
            origin = parse_shard_header(header, size).origin
            _refuse_half_characters([origin.fingerprint, origin.layout])
        except (ValueError, KeyError, TypeError) as error:
            raise refused(f"shard {name[:12]}: {error}") from error
        return start + header, origin

    def _parts(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            part = self._file.read(min(left, _PART_BYTES))
            if not part:
                raise _cut_off()
            left -= len(part)
            yield part

    def _read(self, size: int, *, is_start: bool = False) -> bytes:
        """Return so many bytes; the first ones tell whether it is a bundle."""
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        if is_start and not is_bundle(data):
            raise FormatError(
                "this is no bundle",
                hint="`kvstore export` makes them; a cache file of mlx-lm's is given by"
                " its path, with `--model` and `--prompt`",
            )
        if len(data) < size:
            raise _cut_off()
        return data

    def _skip_padding(self, size: int) -> None:
        if any(self._read(-size % _RECORD)):
            raise refused("its padding is not empty")


def refused(why: str) -> IntegrityError:
    """Return the error that a bundle is not what it should be."""
    return IntegrityError(
        f"the bundle is refused: {why}", hint="export it again, or copy it again"
    )


def _cut_off() -> IntegrityError:
    return refused("it is cut off")


def _check_entry(entry: Entry) -> None:
    """Check what a bundle's entry must be beyond a well-formed one.

    Raises:
        IntegrityError: It is not.
    """
    try:
        check_name(entry.name)
        _refuse_half_characters(
            [entry.model, entry.made_with, entry.codec, entry.title]
        )
    except ValueError as error:
        raise refused(f"its entry: {error}") from error
    if entry.name is not None and entry.name != normalize_name(entry.name):
        raise refused("its entry's name is not in Unicode's NFC")
    if entry.id != entry_id(entry.name, entry.tip):
        raise refused("its entry has the id of another name")
    if not 0 <= entry.created_at < _MAX_TIME:
        raise refused("its entry: a time is out of range")
    if entry.pinned or entry.signer or entry.updated_at != entry.created_at:
        raise refused("its entry is pinned, was signed before or was updated")


def _refuse_half_characters(value: Any) -> None:
    """Refuse what JSON can spell and nobody can print or write to a file.

    Raises:
        ValueError: A text has half a surrogate pair.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a character") from error


def _member_name(header: bytes) -> str:
    return header[_NAME].rstrip(b"\0").decode("ascii", "replace")


def _member_size(header: bytes) -> int:
    """Return the size that a header states, or -1 where it states none."""
    digits = header[_SIZE]
    return int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else -1


def _write_member(
    file: IO[bytes], name: str, size: int, parts: Iterable[bytes | memoryview]
) -> int:
    """Write one file of the archive and return the bytes that it takes there."""
    if size > MAX_SHARD_BYTES:
        raise ValueError(f"{size} bytes do not fit into a bundle: {name}")
    nbytes = _write(file, _header(name, size))
    written = sum(_write(file, part) for part in parts)
    assert written == size, (name, written, size)
    return nbytes + written + _write(file, bytes(-size % _RECORD))


def _write(file: IO[bytes], data: bytes | memoryview) -> int:
    """Write all of ``data``, however short the single writes are."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    return len(data)


def _header(name: str, size: int) -> bytes:
    """Return the ustar header of a private file of this name and size.

    Written by hand, since `tarfile` has changed its bytes from release to release.
    """
    if not 0 <= size <= MAX_SHARD_BYTES:
        return b""  # equal to no header that can be read
    number = "{:07o}\0".format
    fields = pack(
        "100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x",
        name.encode(),
        number(0o600).encode(),
        number(0).encode(),
        number(0).encode(),
        f"{size:011o}\0".encode(),
        f"{0:011o}\0".encode(),
        b" " * 8,
        b"0",
        b"",
        b"ustar\0",
        b"00",
        b"",
        b"",
        number(0).encode(),
        number(0).encode(),
        b"",
    )
    return fields[:148] + f"{sum(fields):06o}\0 ".encode() + fields[156:]
