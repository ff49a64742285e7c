"""Shard files: stage, publish, open, read, quarantine and take back."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING

import blake3

from ..errors import FormatError, IntegrityError
from ..format.block import EncodedBlock, Origin, ShardHeader, StoredBlock
from ..format.documents import blake3_hex
from ..format.safetensors import MAX_HEADER_BYTES
from ..format.shard import (
    _HEX,
    as_written,
    describe_block,
    parse_shard_header,
    shard_header,
)
from . import files
from .cipher import Cipher
from .sealed import SealedShard, is_sealed, seal_shard

if TYPE_CHECKING:
    from .folder import StoreFolder

_SUFFIX = ".safetensors"
# Small enough that a processor's cache holds it, large enough that a few threads seldom
# wait for the interpreter's lock.
_PORTION_BYTES = 8 * 1024 * 1024


def shard_path(folder: Path, name: str) -> Path:
    """Return where the shard with this name lies.

    Raises:
        ValueError: ``name`` is no shard's name.
    """
    return Path(shard_file(str(folder), name))


def shard_file(folder: str, name: str) -> str:
    """Return the path of a shard as text; to make a ``Path`` takes five times as long.

    Raises:
        ValueError: ``name`` is no shard's name.
    """
    if not _HEX.fullmatch(name):
        raise ValueError(f"not the name of a shard: {name!r}")
    return f"{folder}/{name[:2]}/{name}{_SUFFIX}"


def list_shards(folder: Path) -> list[str]:
    """Return the names of all shards, sorted."""
    found: list[str] = []
    # Of thousands of files, which `Path.glob` takes four times as long for.
    with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as parts:
        for part in parts:
            with suppress(OSError), os.scandir(part.path) as items:
                found += [item.name.removesuffix(_SUFFIX) for item in items
                          if item.name.endswith(_SUFFIX)]  # fmt: skip
    return sorted(name for name in found if _HEX.fullmatch(name))


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
    folder: StoreFolder, origin: Origin, blocks: Sequence[EncodedBlock]
) -> Iterator[StagedShard]:
    """Write a shard into the store's `tmp` and sync it; it goes unless published.

    The same origin and blocks give the same bytes.
    """
    stored = [describe_block(block) for block in blocks]
    header = shard_header(origin, stored)
    pieces = (block.buffers for block in blocks)
    written: Iterable[Sequence[bytes | memoryview]] = chain([[header]], pieces)
    if folder.cipher is not None:
        sealed = seal_shard(folder.cipher, header, stored, pieces)
        written = ([part] for part in sealed)
    with files.staged(folder.staging) as (path, descriptor):
        for buffers in written:
            files.write_all(descriptor, *buffers)
        # Nobody is to write to it again: its name tells its bytes.
        os.fchmod(descriptor, 0o400)
        files.sync(descriptor)
        # What we cannot read back must not be acknowledged.
        with open_shard_at(path, folder.cipher) as opened:
            found = StagedShard(path, opened.name(), opened.header)
        yield found


def receive_shard(
    folder: StoreFolder, path: Path, name: str, parts: Iterator[bytes]
) -> None:
    """Write a shard that comes from elsewhere to a new file.

    In an encrypted store it is sealed block by block, and has another name. Of a plain
    one neither name nor blocks are checked here.

    Raises:
        IntegrityError: What is to be sealed is not what its name says.
    """
    if folder.cipher is not None:
        parts = _sealed_on_the_way(folder.cipher, name, parts)
    descriptor = files.create(path)
    try:
        for part in parts:
            files.write_all(descriptor, part)
        os.fchmod(descriptor, 0o400)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise IntegrityError(str(error)) from error
    finally:
        os.close(descriptor)


def _sealed_on_the_way(
    cipher: Cipher, name: str, parts: Iterator[bytes]
) -> Iterator[bytes]:
    """Yield the bytes of a sealed shard while those of the plain one come in.

    Raises:
        ValueError: They are not those of a shard of this name.
    """
    held = bytearray()

    def take(size: int) -> bytes:
        while len(held) < size:
            part = next(parts, None)
            if part is None:
                raise ValueError("it is shorter than it says")
            held.extend(part)
        data = bytes(held[:size])
        del held[:size]
        return data

    start = take(8)
    (length,) = unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"header of {length} bytes")
    header = start + take(length)
    if hashlib.sha256(header).hexdigest() != name:
        raise ValueError("it has another header than its name says")
    # The size of the data is what the header says; that it is right shows at the end.
    blocks = parse_shard_header(header[8:], None).blocks

    def block(stored: StoredBlock) -> list[bytes]:
        data = take(stored.end - stored.begin)
        # Key and numbers follow from the header: other bytes than its digests say,
        # sealed with them, would tell the bytes of the shard that it is a header of.
        if blake3_hex(data) != stored.digest:
            raise ValueError("a block does not match its digest")
        return [data]

    yield from seal_shard(cipher, header, blocks, map(block, blocks))
    if held or next(parts, None):
        raise ValueError("it is longer than it says")


@contextmanager
def staged_copy(
    folder: StoreFolder, opened: OpenShard, blocks: Sequence[StoredBlock]
) -> Iterator[StagedShard]:
    """Write some blocks of a shard into another: bytes are copied, never decoded.

    Raises:
        IntegrityError: A block's bytes disagree with its digest.
    """
    data = opened.read(blocks)
    copies = [as_written(b, d) for b, d in zip(blocks, data, strict=True)]
    with staged_shard(folder, opened.header.origin, copies) as staged:
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

    def read_into(
        self,
        stored: StoredBlock,
        buffers: Sequence[memoryview],
        *,
        at_once: bool = False,
    ) -> None:
        """Fill buffers with the bytes of a block, one after the other; in any thread.

        Args:
            stored: The block.
            buffers: Writable bytes, of as many as the block has.
            at_once: By one call: many threads would wait for the interpreter's lock
                at each.

        Raises:
            IntegrityError: The bytes disagree with the block's digest.
        """
        portion = stored.end - stored.begin if at_once else _PORTION_BYTES
        if self._has_filled(stored, buffers, portion):
            return
        # A cable or memory that erred once does not condemn a block.
        files.forget_cached(self._descriptor)
        if not self._has_filled(stored, buffers, portion):
            block = stored.block.hash.hex()
            raise IntegrityError(
                f"block {block[:12]} does not match its digest: {self.path}",
                path=self.path,
                block=block,
                hint="save the prompt again; `kvstore verify --read-data` finds more",
            )

    def _has_filled(
        self, stored: StoredBlock, buffers: Sequence[memoryview], portion: int
    ) -> bool:
        """Read the bytes of a block; whether they are those that were written."""
        sealed = self.header.sealed
        if sealed is None:
            begin = self.header.data_begin + stored.begin
            return self._fill_hashed(buffers, begin, portion) == stored.digest
        number = self.header.blocks.index(stored)
        try:
            sealed.open_block(
                number, stored, buffers, lambda part, at: self._fill([part], at)
            )
        except ValueError:
            return False
        return True  # a tag is a digest with a key

    def read_header(self) -> memoryview:
        """Return the bytes before those of the blocks: the header with its length."""
        sealed = self.header.sealed
        data = _uninitialised(sealed.data_begin if sealed else self.header.data_begin)
        self._fill([data], 0)
        return data

    def name(self) -> str:
        """Return what the file is to be called: the SHA-256 of its header.

        The header has the digest of each block, so that this tells every byte.
        """
        return hashlib.sha256(self.read_header()).hexdigest()

    def _fill_hashed(
        self, buffers: Sequence[memoryview], offset: int, portion: int
    ) -> str:
        """Fill buffers, and return the BLAKE3 of what they hold then."""
        digest = blake3.blake3()
        # What was just read is still in the processor's cache when it is hashed.
        for parts in _portions(buffers, portion):
            self._fill(parts, offset)
            offset += sum(map(len, parts))
            for part in parts:
                digest.update(part)
        return digest.hexdigest()

    def _fill(self, buffers: Sequence[memoryview], offset: int) -> None:
        try:
            files.read_into(self._descriptor, buffers, offset)
        except EOFError as error:
            raise _damaged(self.path, str(error)) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _portions(buffers: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Yield the bytes of buffers, in order, ``size`` or up to twice that at a time."""
    parts: list[memoryview] = []
    nbytes = 0
    for buffer in buffers:
        for begin in range(0, len(buffer), size):
            parts.append(buffer[begin : begin + size])
            nbytes += len(parts[-1])
            if nbytes >= size:
                yield parts
                parts, nbytes = [], 0
    if parts:
        yield parts


def _uninitialised(size: int) -> memoryview:
    """Return a buffer of any bytes: a bytearray would be cleared first."""
    # Imported here, since listing a store reads no block.
    import numpy as np

    return np.empty(size, np.uint8).data


@contextmanager
def open_shard(folder: StoreFolder, name: str) -> Iterator[OpenShard]:
    """Open a shard and check its header.

    Raises:
        FileNotFoundError: There is no such shard.
        IntegrityError: Its header cannot be read.
        FormatError: A newer release wrote it.
    """
    path = shard_path(folder.shards, name)
    with open_shard_at(path, folder.cipher) as opened:
        yield opened


@contextmanager
def open_shard_at(path: Path, cipher: Cipher | None = None) -> Iterator[OpenShard]:
    """Open a shard that lies elsewhere, as :func:`open_shard` does."""
    descriptor, size = files.open_regular(path)
    try:
        try:
            header = _read_header(descriptor, path, size, cipher)
        except IntegrityError:
            # Read again before a whole shard is condemned for one misread.
            files.forget_cached(descriptor)
            header = _read_header(descriptor, path, size, cipher)
        yield OpenShard(descriptor, path, header)
    finally:
        os.close(descriptor)


def reopen_shard(folder: Path, name: str, header: ShardHeader) -> OpenShard:
    """Open a shard whose header has been read, for the data of its blocks.

    What is read is checked with the digests in that header, so nothing is trusted that
    another file may have brought meanwhile. It is closed once nobody has it any more.

    Raises:
        FileNotFoundError: There is no such shard.
    """
    path = shard_path(folder, name)
    descriptor, _ = files.open_regular(path)
    opened = OpenShard(descriptor, path, header)
    weakref.finalize(opened, os.close, descriptor)
    return opened


def quarantine_shard(folder: Path, name: str, quarantine: Path) -> Path:
    """Move a shard that cannot be read out of the way; return where it is now."""
    target = quarantine / f"{name}.safetensors"
    files.publish(shard_path(folder, name), target)
    return target


def take_back(folder: StoreFolder) -> None:
    """Take shards out of the quarantine that are whole: they were misread once.

    The store's lock is held; the index does not know them yet.
    """
    for path in folder.quarantine.glob("*.safetensors"):
        with suppress(IntegrityError, FormatError, OSError, ValueError):
            with open_shard_at(path, folder.cipher) as opened:
                for _ in opened.read(opened.header.blocks):
                    pass  # a damaged one is an error
                is_whole = opened.name() == path.stem
            target = shard_path(folder.shards, path.stem)
            if is_whole and not target.exists():
                files.publish(path, target)


def empty_quarantine(folder: StoreFolder) -> int:
    """Remove what is in quarantine for good reason, and return its bytes.

    The store's lock is held.
    """
    take_back(folder)
    found = files.sizes_in(folder.quarantine)
    for path in found:
        files.remove_any(path)
    return sum(found.values())


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"shard cannot be read: {path}: {why}",
        path=path,
        hint="save the prompt again; `kvstore verify` lists what is affected",
    )


def _read_header(
    descriptor: int, path: Path, size: int, cipher: Cipher | None
) -> ShardHeader:
    header = bytearray()
    try:
        prefix = bytearray(8)
        files.read_into(descriptor, [memoryview(prefix)], 0)
        (length,) = unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = bytearray(length)
        files.read_into(descriptor, [memoryview(header)], 8)
        if cipher is None:
            return parse_shard_header(bytes(header), size)
        sealed = SealedShard(cipher, bytes(header), size)
        inner = sealed.open_header(
            lambda part, at: files.read_into(descriptor, [part], at)
        )
        parsed = parse_shard_header(inner[8:], sealed.num_bytes)
        sizes = [stored.end - stored.begin for stored in parsed.blocks]
        if sealed.sizes != [len(inner), *sizes]:
            raise ValueError("its parts have other sizes than its header says")
        return replace(parsed, nbytes=size, sealed=sealed)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        if is_sealed(bytes(header)) is (cipher is None):
            which = "shard" if cipher is None else "store"
            raise FormatError(
                f"only the {which} is encrypted: {path}",
                hint="put the store's own configuration back",
            ) from error
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
