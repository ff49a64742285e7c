"""Bundles: an entry and its blocks in one file, to hand over. Knows no store.

A bundle is a POSIX archive (ustar): a manifest, then the shards that it names. There is
one right sequence of bytes for a manifest, and the reader takes no other: every header
is compared with the one that we would have written, padding and end included. So there
are no links, no paths, no duplicates and nothing between or behind to be understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from struct import pack
from typing import IO

from .errors import FormatError, IntegrityError
from .manifests import (
    MAX_MANIFEST_BYTES,
    Manifest,
    manifest_to_bytes,
    parse_manifest,
    refused,
)

MANIFEST = "kvstore-bundle.json"
_RECORD = 512
_END = bytes(2 * _RECORD)
_SIZE = slice(124, 135)
_PART_BYTES = 1024 * 1024


def is_bundle(start: bytes) -> bool:
    """Say by its first 512 bytes whether a file calls itself a bundle."""
    return start.startswith(MANIFEST.encode() + b"\0")


def shard_member(name: str) -> str:
    """Return what a shard is called in a bundle."""
    return f"shards/{name}.safetensors"


def write_bundle(
    file: IO[bytes],
    manifest: Manifest,
    contents: Iterable[Iterable[bytes | memoryview]],
) -> int:
    """Write a bundle and return its size in bytes.

    Args:
        file: Where it goes; need not be seekable.
        manifest: What it says of itself.
        contents: The bytes of each shard that the manifest names.

    Raises:
        IntegrityError: A reader would refuse such a manifest.
        ValueError: The manifest would be too large.
    """
    data = manifest_to_bytes(manifest)
    parse_manifest(data)  # what nobody could read is not to be handed over
    nbytes = _write_member(file, MANIFEST, len(data), [data])
    for (name, size), parts in zip(manifest.shards, contents, strict=True):
        nbytes += _write_member(file, shard_member(name), size, parts)
    return nbytes + _write(file, _END)


class BundleReader:
    """Reads a bundle from its beginning; it need not be seekable.

    Nothing that it says is believed before it is compared with what it must be.

    Args:
        file: Opened for reading bytes.

    Attributes:
        manifest: What the bundle says of itself.

    Raises:
        FormatError: It is no bundle, or one of a newer release.
        IntegrityError: It is not one that we would have written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        header = self._read(_RECORD, is_start=True)
        digits = header[_SIZE]
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else 0
        if not 0 < size <= MAX_MANIFEST_BYTES or header != _header(MANIFEST, size):
            raise refused("its first header is not one of ours")
        data = self._read(size)
        self._skip_padding(size)
        self.manifest = parse_manifest(data)

    def shards(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the name of each shard with its bytes, all of which are to be taken.

        Raises:
            IntegrityError: It does not go on as the manifest says, or goes on behind.
        """
        for name, size in self.manifest.shards:
            if self._read(_RECORD) != _header(shard_member(name), size):
                raise refused(f"the header of shard {name[:12]} is not one of ours")
            yield name, self._parts(size)
            self._skip_padding(size)
        if self._read(len(_END)) != _END:
            raise refused("it does not end as it should")
        if self._file.read(1):
            raise refused("something follows its end")

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


def _cut_off() -> IntegrityError:
    return refused("it is cut off")


def _write_member(
    file: IO[bytes], name: str, size: int, parts: Iterable[bytes | memoryview]
) -> int:
    """Write one file of the archive and return what it takes there."""
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

    Frozen: `tarfile` has changed its bytes from release to release.
    """
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
