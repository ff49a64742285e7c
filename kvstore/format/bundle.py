"""Bundles: an entry and its blocks in one file, to hand over. Knows no store.

A bundle is a POSIX archive (ustar): a manifest, then the shards that it names. There is
one right sequence of bytes for a manifest, and the reader takes no other: every header
is compared with the one that we would have written, padding and end included. So there
are no links, no paths, no duplicates and nothing between or behind to be understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import pack
from typing import IO, Any

import blake3

from ..errors import FormatError, IntegrityError
from .block import Origin
from .chain import digest_fields, hash_root
from .documents import JSON, canonical_json, is_count, strict_json
from .entry import check_name

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


FORMAT = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
# What the eleven octal digits of an archive's header can say.
MAX_SHARD_BYTES = 8**11 - 1
_MAX_ENTRY_BYTES = 32_768
_MAX_TIME = 2.0**33
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself; most is as in :class:`Entry`."""

    # The entry's name, or ``None``.
    name: str | None
    # Hash of the last block in hex.
    tip: str
    # Hash that the first block has as parent, in hex.
    root: str
    # Tokens held.
    num_tokens: int
    # The codec asked for when the entry was saved.
    codec: str
    # What the model was called; advisory.
    model: str
    # Versions of kvstore, mlx and mlx-lm; advisory.
    made_with: dict[str, str]
    # When the name was first saved, Unix seconds.
    created_at: float
    # Tokens in a full block.
    block_size: int
    # What computed the rows.
    origin: Origin
    # SHA-256 in hex, and bytes, of each shard in the order of their tokens.
    shards: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """What to call the entry: its name, or the start of its last block's hash."""
        return self.name or self.tip[:12]


def refused(why: str) -> IntegrityError:
    """Return the error that a bundle is not what it should be."""
    return IntegrityError(
        f"the bundle is refused: {why}", hint="export it again, or copy it again"
    )


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Return a manifest with a digest of itself, as canonical JSON.

    Raises:
        ValueError: It is too large.
    """
    body: JSON = {
        "format": FORMAT,
        "entry": _entry(manifest),
        "block_size": manifest.block_size,
        "fingerprint": manifest.origin.fingerprint,
        "layout": manifest.origin.layout,
        "shards": [{"sha256": n, "nbytes": size} for n, size in manifest.shards],
    }
    data = canonical_json({"digest": _digest(body), **body})
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes is too large")
    return data


def _entry(manifest: Manifest) -> JSON:
    return {
        "name": manifest.name,
        "tip": manifest.tip,
        "root": manifest.root,
        "num_tokens": manifest.num_tokens,
        "codec": manifest.codec,
        "model": manifest.model,
        "made_with": manifest.made_with,
        "created_at": manifest.created_at,
    }


def _digest(body: JSON) -> str:
    return str(blake3.blake3(canonical_json(body)).hexdigest())


def parse_manifest(data: bytes) -> Manifest:
    """Return what a manifest says, having checked all of it that needs no shard.

    Raises:
        FormatError: A newer release wrote it.
        IntegrityError: It is not as we would have written it.
    """
    try:
        body = strict_json(data, allow_floats=True)
        _refuse_half_characters(body)
        if body.pop("digest") != _digest(body):
            raise ValueError("it does not match its digest")
        form = body["format"]
        if type(form) is int and form != FORMAT:
            raise FormatError(
                f"the bundle has format {form}, this release reads {FORMAT}",
                hint="upgrade mlx-kvstore",
            )
        manifest = _build(body)
        if data != manifest_to_bytes(manifest):  # JSON can be spelled in several ways
            raise ValueError("it has other fields than it should, or is spelled so")
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(f"its manifest: {error}") from error
    return manifest


def _refuse_half_characters(body: Any) -> None:
    """Refuse what JSON can spell and nobody can print or write to a file.

    Raises:
        ValueError: There is some.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a character") from error


def _build(body: JSON) -> Manifest:
    """Return the fields of a manifest, of whatever type they are."""
    return Manifest(
        **body["entry"],
        block_size=body["block_size"],
        origin=Origin(body["fingerprint"], body["layout"]),
        shards=tuple((shard["sha256"], shard["nbytes"]) for shard in body["shards"]),
    )


def _check(manifest: Manifest) -> None:
    """Check types and values of all fields.

    Raises:
        ValueError: One is not as it should be.
    """
    texts: list[Any] = [manifest.tip, manifest.root, manifest.codec, manifest.model]
    texts += manifest.made_with.values()
    texts += [name for name, _ in manifest.shards]
    if not all(type(text) is str for text in texts):
        raise ValueError("a field is no text")
    if manifest.name is not None and type(manifest.name) is not str:
        raise ValueError("its name is no text")
    check_name(manifest.name)
    if len(canonical_json(_entry(manifest))) > _MAX_ENTRY_BYTES:
        raise ValueError("its entry is too large")
    hashes = [manifest.tip, manifest.root, *(name for name, _ in manifest.shards)]
    if not all(_HEX.fullmatch(digits) for digits in hashes):
        raise ValueError("a hash is not 64 hex digits")
    time = manifest.created_at
    if type(time) not in (int, float) or not 0 <= time < _MAX_TIME:
        raise ValueError("a time is out of range")
    _check_sizes(manifest)
    origin = manifest.origin
    if type(origin.fingerprint) is not dict or type(origin.layout) is not list:
        raise ValueError("fingerprint or layout is missing")
    fingerprint = digest_fields(origin.fingerprint)
    root = hash_root(fingerprint, origin.layout)
    if root.hex() != manifest.root:
        raise ValueError("its root is not that of its fingerprint and layout")


def _check_sizes(manifest: Manifest) -> None:
    sizes = [size for _, size in manifest.shards]
    counts = [manifest.num_tokens, manifest.block_size, *sizes]
    if not all(is_count(count) and count for count in counts):
        raise ValueError("a size is no count")
    num_blocks = -(-manifest.num_tokens // manifest.block_size)
    if not 0 < len(sizes) <= num_blocks or max(sizes) > MAX_SHARD_BYTES:
        raise ValueError("its shards are too many or too large")
