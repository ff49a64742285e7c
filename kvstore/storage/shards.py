"""Shard files: stage, publish, open, read, quarantine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import unpack

from ..errors import IntegrityError
from ..format.block import EncodedBlock, Origin, ShardHeader, StoredBlock
from ..format.documents import blake3_hex
from ..format.safetensors import MAX_HEADER_BYTES
from ..format.shard import _HEX, _describe, as_written, parse_shard_header, shard_header
from . import files

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
    """A shard that is written and synced and not yet seen."""

    # Where it lies now.
    path: Path
    # What it will be called.
    name: str
    # What it says of itself.
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
        parsed = parse_shard_header(header[8:], size)
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

        Raises:
            IntegrityError: A block's bytes disagree with its digest.
        """
        for stored in blocks:
            data = _uninitialised(stored.end - stored.begin)
            self.read_into(stored, [data])
            yield data

    def read_into(self, stored: StoredBlock, buffers: Sequence[memoryview]) -> None:
        """Fill buffers with the bytes of a block, one after the other; in any thread.

        Args:
            stored: The block.
            buffers: Writable bytes, of as many as the block has.

        Raises:
            IntegrityError: The bytes disagree with the block's digest.
        """
        self._fill(buffers, self.header.data_begin + stored.begin)
        if blake3_hex(*buffers) == stored.digest:
            return
        # A cable or memory that erred once does not condemn a block.
        files.forget_cached(self._descriptor)
        self._fill(buffers, self.header.data_begin + stored.begin)
        if blake3_hex(*buffers) != stored.digest:
            block = stored.block.hash.hex()
            raise IntegrityError(
                f"block {block[:12]} does not match its digest: {self.path}",
                path=self.path,
                block=block,
                hint="save the prompt again; `kvstore verify --read-data` finds more",
            )

    def read_header(self) -> memoryview:
        """Return the bytes before the data: the header with its length."""
        return self._read(0, self.header.data_begin)

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, which is to be its name."""
        digest = hashlib.sha256()
        for begin in range(0, self.header.nbytes, _READ_BYTES):
            size = min(_READ_BYTES, self.header.nbytes - begin)
            digest.update(self._read(begin, size))
        return digest.hexdigest()

    def _read(self, offset: int, size: int) -> memoryview:
        data = _uninitialised(size)
        self._fill([data], offset)
        return data

    def _fill(self, buffers: Sequence[memoryview], offset: int) -> None:
        try:
            files.read_into(self._descriptor, buffers, offset)
        except EOFError as error:
            raise _damaged(self.path, str(error)) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _uninitialised(size: int) -> memoryview:
    """Return a buffer of any bytes: a bytearray would be cleared first."""
    # Imported here, since listing a store reads no block.
    import numpy as np

    return np.empty(size, np.uint8).data


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
        try:
            header = _read_header(descriptor, path, size)
        except IntegrityError:
            # Read again before a whole shard is condemned for one misread.
            files.forget_cached(descriptor)
            header = _read_header(descriptor, path, size)
        yield OpenShard(descriptor, path, header)
    finally:
        os.close(descriptor)


@contextmanager
def reopen_shard(folder: Path, name: str, header: ShardHeader) -> Iterator[OpenShard]:
    """Open a shard whose header has been read, for the data of its blocks.

    What is read is checked with the digests in that header, so nothing is trusted that
    another file may have brought meanwhile.

    Raises:
        FileNotFoundError: There is no such shard.
    """
    path = shard_path(folder, name)
    descriptor, _ = files.open_regular(path)
    try:
        yield OpenShard(descriptor, path, header)
    finally:
        os.close(descriptor)


def quarantine_shard(folder: Path, name: str, quarantine: Path) -> Path:
    """Move a shard that cannot be read out of the way; return where it is now."""
    target = quarantine / f"{name}.safetensors"
    files.publish(shard_path(folder, name), target)
    return target


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
        files.read_into(descriptor, [memoryview(prefix)], 0)
        (length,) = unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = bytearray(length)
        files.read_into(descriptor, [memoryview(header)], 8)
        return parse_shard_header(bytes(header), size)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
