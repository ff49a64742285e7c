"""Shards: immutable safetensors files of encoded blocks. Knows folders, not SQL.

A shard is named by the SHA-256 of its bytes. Its header carries a digest of itself,
and of the bytes of each block, so both are checked on every read without reading
the rest of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import pack, unpack
from typing import Any

import blake3

from . import files
from .errors import FormatError, IntegrityError
from .hashing import canonical_json
from .safetensors_header import (
    MAX_HEADER_BYTES,
    is_count,
    parse_header,
    strict_json,
)
from .types import (
    JSON,
    Block,
    BlockHash,
    EncodedBlock,
    Origin,
    Part,
    ShardHeader,
    StoredBlock,
    TensorSpec,
)

FORMAT = 1
MAX_BLOCKS = 64
MAX_BYTES = 64 * 1024 * 1024
MAX_PARTS = 4096
_NO_DIGEST = "0" * 64
_HEX = re.compile(r"[0-9a-f]{64}")
_TOKEN_LIMIT = 2**63
_READ_BYTES = 8 * 1024 * 1024


def shard_path(folder: Path, name: str) -> Path:
    """Return where the shard with this name lies.

    Raises:
        ValueError: ``name`` is no shard's name.
    """
    if not _HEX.fullmatch(name):
        raise ValueError(f"not the name of a shard: {name!r}")
    return folder / name[:2] / f"{name}.safetensors"


def list_shards(folder: Path) -> list[str]:
    """Return the names of all shards, sorted."""
    paths = folder.glob("??/*.safetensors")
    return sorted(path.stem for path in paths if _HEX.fullmatch(path.stem))


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard that is written and synced and not yet seen.

    Attributes:
        path: Where it lies now.
        name: What it will be called.
        header: What it says of itself.
    """

    path: Path
    name: str
    header: ShardHeader


@contextmanager
def staged_shard(
    staging: Path, origin: Origin, blocks: Sequence[EncodedBlock]
) -> Iterator[StagedShard]:
    """Write a shard into ``staging`` and sync it; it goes unless published.

    The same origin and blocks give the same bytes.
    """
    header = shard_header(origin, [_describe(block) for block in blocks])
    sha256 = hashlib.sha256()
    with files.staged(staging) as (path, descriptor):
        for data in (header, *(part.data for block in blocks for part in block.parts)):
            sha256.update(data)
            files.write_all(descriptor, data)
        os.fchmod(descriptor, 0o400)
        files.sync(descriptor)
        size = os.fstat(descriptor).st_size
        # What we cannot read back must not be acknowledged.
        parsed = _parse(header[8:], size)
        yield StagedShard(path, sha256.hexdigest(), parsed)


@contextmanager
def staged_copy(
    staging: Path, opened: OpenShard, blocks: Sequence[StoredBlock]
) -> Iterator[StagedShard]:
    """Write some blocks of a shard into another: bytes are copied, never decoded.

    Raises:
        IntegrityError: A block's bytes disagree with its digest.
    """
    data = opened.read(blocks)
    copies = [as_written(b, d) for b, d in zip(blocks, data, strict=True)]
    with staged_shard(staging, opened.header.origin, copies) as staged:
        yield staged


def publish_shard(folder: Path, shard: StagedShard) -> None:
    """Rename a staged shard to its name."""
    files.publish(shard.path, shard_path(folder, shard.name))


class OpenShard:
    """A shard opened once: header and data come from the same file.

    Attributes:
        path: The file.
        header: What it says of itself, checked.
    """

    def __init__(self, descriptor: int, path: Path, header: ShardHeader) -> None:
        self._descriptor = descriptor
        self.path = path
        self.header = header

    def read(self, blocks: Sequence[StoredBlock]) -> Iterator[memoryview]:
        """Yield the bytes of each block, having checked its digest.

        Neighbours are read together.

        Raises:
            IntegrityError: A block's bytes disagree with its digest.
        """
        for run in _neighbours(blocks):
            begin = run[0].begin
            data = self._read_range(begin, run[-1].end)
            for stored in run:
                part = data[stored.begin - begin : stored.end - begin]
                self._check(stored, part)
                yield part

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, which is to be its name."""
        digest = hashlib.sha256()
        for begin in range(0, self.header.nbytes, _READ_BYTES):
            size = min(_READ_BYTES, self.header.nbytes - begin)
            digest.update(self._read(begin, size))
        return digest.hexdigest()

    def _read_range(self, begin: int, end: int) -> memoryview:
        return self._read(self.header.data_begin + begin, end - begin)

    def _read(self, offset: int, size: int) -> memoryview:
        # Imported here, since listing a store reads no block.
        import numpy as np

        # Uninitialised: a bytearray would be cleared first.
        data = np.empty(size, np.uint8).data
        try:
            files.read_into(self._descriptor, data, offset)
        except EOFError as error:
            raise _damaged(self.path, str(error)) from error
        return data

    def _check(self, stored: StoredBlock, data: memoryview) -> None:
        if _blake3(data) != stored.digest:
            block = stored.block.hash.hex()
            raise IntegrityError(
                f"block {block[:12]} does not match its digest: {self.path}",
                path=self.path,
                block=block,
                hint="save the prompt again; `kvstore verify --read-data` finds more",
            )


@contextmanager
def open_shard(folder: Path, name: str) -> Iterator[OpenShard]:
    """Open a shard and check its header.

    Raises:
        FileNotFoundError: There is no such shard.
        IntegrityError: Its header cannot be read.
        FormatError: A newer release wrote it.
    """
    with open_shard_at(shard_path(folder, name)) as opened:
        yield opened


@contextmanager
def open_shard_at(path: Path) -> Iterator[OpenShard]:
    """Open a shard that lies elsewhere, as :func:`open_shard` does."""
    descriptor, size = files.open_regular(path)
    try:
        yield OpenShard(descriptor, path, _read_header(descriptor, path, size))
    finally:
        os.close(descriptor)


def quarantine_shard(folder: Path, name: str, quarantine: Path) -> Path:
    """Move a shard that cannot be read out of the way; return where it is now."""
    target = quarantine / f"{name}.safetensors"
    files.publish(shard_path(folder, name), target)
    return target


def as_written(stored: StoredBlock, data: memoryview) -> EncodedBlock:
    """Return a stored block as it was when it was encoded."""
    parts = tuple(
        Part(
            name,
            spec.dtype,
            spec.shape,
            data[spec.begin - stored.begin : spec.end - stored.begin],
            spec.raw_nbytes,
        )
        for name, spec in stored.tensors.items()
    )
    return EncodedBlock(
        stored.block,
        stored.codec,
        stored.is_lossless,
        stored.is_exact,
        parts,
        stored.num_extras,
    )


def is_full(blocks: Sequence[EncodedBlock]) -> bool:
    """Say whether a shard of these blocks takes no further one like the last."""
    return _is_full(
        [(sum(len(p.data) for p in block.parts), len(block.parts)) for block in blocks]
    )


def group_blocks(blocks: Iterable[StoredBlock]) -> Iterator[list[StoredBlock]]:
    """Group stored blocks to shards, as a save of all of them would."""
    group: list[StoredBlock] = []
    for stored in blocks:
        group.append(stored)
        if _is_full([(b.end - b.begin, len(b.tensors)) for b in group]):
            yield group
            group = []
    if group:
        yield group


def _is_full(sizes: Sequence[tuple[int, int]]) -> bool:
    """Say whether blocks of so many bytes and tensors fill a shard."""
    nbytes = sum(size for size, _ in sizes)
    parts = sum(count for _, count in sizes) + sizes[-1][1]
    return len(sizes) >= MAX_BLOCKS or nbytes >= MAX_BYTES or parts > MAX_PARTS


def shard_header(origin: Origin, blocks: Sequence[StoredBlock]) -> bytes:
    """Return what stands before the data in a shard of just these blocks.

    That is the header with its length, padded so that the data starts at 8 bytes. The
    blocks may come from several shards.

    Raises:
        ValueError: It would be too large.
    """
    tensors: JSON = {}
    position = 0
    for number, stored in enumerate(blocks):
        for name, spec in stored.tensors.items():
            end = position + spec.end - spec.begin
            tensors[f"{number}.{name}"] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
    meta = {
        "format": FORMAT,
        "header_digest": _NO_DIGEST,
        "fingerprint": origin.fingerprint,
        "layout": origin.layout,
        "tenant": origin.tenant,
        "blocks": [_row(stored) for stored in blocks],
    }
    about = {"__metadata__": {"kvstore": canonical_json(meta).decode()}}
    text = json.dumps({**about, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"shard header of {len(text)} bytes is too large")
    return pack("<Q", len(text)) + _seal(text)


def _describe(encoded: EncodedBlock) -> StoredBlock:
    """Return a block as the header of a shard of its own would describe it."""
    digest = blake3.blake3()
    tensors: dict[str, TensorSpec] = {}
    begin = end = 0
    for part in encoded.parts:
        digest.update(part.data)
        begin, end = end, end + len(part.data)
        tensors[part.name] = TensorSpec(
            part.dtype, part.shape, begin, end, part.raw_nbytes
        )
    return StoredBlock(
        encoded.block,
        encoded.codec,
        encoded.is_lossless,
        encoded.is_exact,
        encoded.num_extras,
        digest.hexdigest(),
        0,
        end,
        tensors,
    )


def _row(stored: StoredBlock) -> JSON:
    """Return one row of the block table."""
    return {
        "hash": stored.block.hash.hex(),
        "parent": stored.block.parent.hex(),
        "start": stored.block.start,
        "tokens": list(stored.block.tokens),
        "codec": stored.codec,
        "lossless": stored.is_lossless,
        "exact": stored.is_exact,
        "extras": stored.num_extras,
        "digest": stored.digest,
        "raw": {
            name: spec.raw_nbytes
            for name, spec in stored.tensors.items()
            if spec.raw_nbytes is not None
        },
    }


def _digest_field(digest: str) -> bytes:
    """Return the header digest as it stands in the header's escaped JSON."""
    return f'\\"header_digest\\":\\"{digest}\\"'.encode()


def _seal(text: bytes) -> bytes:
    """Put the digest of the header with 64 zeros in its place."""
    digest = _blake3(text)
    return text.replace(_digest_field(_NO_DIGEST), _digest_field(digest), 1)


def _blake3(data: bytes | memoryview) -> str:
    # Threads pay only on long inputs.
    threads = blake3.blake3.AUTO if len(data) > 1_000_000 else 1
    return str(blake3.blake3(data, max_threads=threads).hexdigest())


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"shard cannot be read: {path}: {why}",
        path=path,
        hint="save the prompt again; `kvstore verify` lists what is affected",
    )


def _read_header(descriptor: int, path: Path, size: int) -> ShardHeader:
    """Read and check the header of an open shard."""
    try:
        prefix = bytearray(8)
        files.read_into(descriptor, memoryview(prefix), 0)
        (length,) = unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = bytearray(length)
        files.read_into(descriptor, memoryview(header), 8)
        return _parse(bytes(header), size)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _parse(header: bytes, size: int) -> ShardHeader:
    """Return what a header says, having checked all of it.

    Raises:
        ValueError: Anything is not as it should be.
        FormatError: A newer release wrote it.
    """
    data_begin = 8 + len(header)
    tensors, metadata = parse_header(header, size - data_begin)
    meta = strict_json(metadata["kvstore"], allow_floats=True)
    digest = _field(meta, "header_digest", str)
    blank = header.replace(_digest_field(digest), _digest_field(_NO_DIGEST))
    if digest != _blake3(blank):
        raise ValueError("header does not match its digest")
    form = _field(meta, "format", int)
    if form != FORMAT:
        raise FormatError(
            f"shard has format {form}, this release reads {FORMAT}",
            hint="upgrade mlx-kvstore",
        )
    origin = Origin(
        _field(meta, "fingerprint", dict),
        _field(meta, "layout", list),
        _field(meta, "tenant", str),
    )
    blocks = _parse_blocks(_field(meta, "blocks", list), tensors)
    return ShardHeader(origin, blocks, data_begin, size)


def _field(value: Any, name: str, kind: type) -> Any:
    """Return a field of exactly this type."""
    if not isinstance(value, dict) or type(value.get(name)) is not kind:
        raise ValueError(f"field {name} is missing or not of type {kind.__name__}")
    return value[name]


def _parse_blocks(rows: list[Any], tensors: JSON) -> tuple[StoredBlock, ...]:
    """Return the block table, every tensor being some block's."""
    if len(rows) > MAX_BLOCKS:
        raise ValueError(f"{len(rows)} blocks, more than {MAX_BLOCKS}")
    owned: dict[str, JSON] = {str(number): {} for number in range(len(rows))}
    for name, spec in tensors.items():
        number, _, part = name.partition(".")
        if number not in owned:
            raise ValueError(f"tensor {name} belongs to no block")
        owned[number][part] = spec
    return tuple(
        _parse_block(row, parts)
        for row, parts in zip(rows, owned.values(), strict=True)
    )


def _parse_block(row: JSON, parts: JSON) -> StoredBlock:
    """Return one row of the block table with its tensors."""
    raw = _field(row, "raw", dict)
    if not parts or not set(raw) <= set(parts):
        raise ValueError("a block's tensors do not fit its row")
    if not all(is_count(size) for size in raw.values()):
        raise ValueError("a raw size is not a count")
    specs = {
        name: TensorSpec(dtype, shape, begin, end, raw.get(name))
        for name, (dtype, shape, begin, end) in parts.items()
    }
    begin = min(spec.begin for spec in specs.values())
    end = max(spec.end for spec in specs.values())
    if sum(spec.end - spec.begin for spec in specs.values()) != end - begin:
        raise ValueError("a block is scattered over the shard")
    extras = _field(row, "extras", int)
    if not is_count(extras):
        raise ValueError("a block's extras are not a count")
    is_lossless, is_exact = _field(row, "lossless", bool), _field(row, "exact", bool)
    if is_exact and not is_lossless:
        raise ValueError("a lossy block calls itself exact")
    return StoredBlock(
        _parse_chain(row),
        _field(row, "codec", str),
        is_lossless,
        is_exact,
        extras,
        _field(row, "digest", str),
        begin,
        end,
        specs,
    )


def _parse_chain(row: JSON) -> Block:
    """Return hash, parent, start and tokens of a row."""
    names = [_field(row, name, str) for name in ("hash", "parent")]
    if not all(_HEX.fullmatch(name) for name in names):
        raise ValueError("a hash is not 64 hex digits")
    tokens = _field(row, "tokens", list)
    if not all(type(t) is int and -_TOKEN_LIMIT <= t < _TOKEN_LIMIT for t in tokens):
        raise ValueError("a token is not a 64-bit integer")
    start = _field(row, "start", int)
    if not tokens or not is_count(start):
        raise ValueError("a block has no tokens or a bad start")
    block, parent = (BlockHash(bytes.fromhex(name)) for name in names)
    return Block(block, parent, start, tuple(tokens))


def _neighbours(blocks: Sequence[StoredBlock]) -> Iterator[list[StoredBlock]]:
    """Group blocks whose bytes touch, so that each group is one read."""
    run: list[StoredBlock] = []
    for stored in blocks:
        if run and run[-1].end != stored.begin:
            yield run
            run = []
        run.append(stored)
    if run:
        yield run
