"""Shards of an encrypted store: the same header and blocks, each sealed by itself.

Such a shard is a safetensors file too. Its tensors are `header`, which is what stands
before the data in a plain shard, and `0`, `1`, …, the bytes of the blocks. So one block
is read, and decrypted, without the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import pack

from ..format.block import StoredBlock
from ..format.documents import canonical_json, strict_json
from ..format.safetensors import parse_header
from .cipher import SALT_BYTES, TAG_BYTES, Cipher, Data

FORMAT = 1
_META = "kvstore_sealed"
_HEADER = "header"
Read = Callable[[memoryview, int], None]
"""Fills a buffer with the bytes of a file at an offset."""


def seal_shard(
    cipher: Cipher,
    header: bytes,
    blocks: Sequence[StoredBlock],
    data: Iterable[Iterable[Data]],
) -> Iterator[bytes]:
    """Yield the bytes of a sealed shard; the same shard gives the same bytes.

    Args:
        cipher: The store's.
        header: What stands before the data, with its length.
        blocks: What it says of the blocks.
        data: The bytes of each block, in pieces.
    """
    # By the header, which has the digest of every block: no other bytes are ever
    # sealed with the same key and number.
    salt = cipher.salt_of(header)
    sizes = {_HEADER: len(header)}
    sizes |= {str(n): b.end - b.begin for n, b in enumerate(blocks)}
    yield _outer_header(salt, sizes)
    parts = cipher.parts(salt)
    yield from parts.seal(0, [header], _HEADER)
    for number, (stored, pieces) in enumerate(zip(blocks, data, strict=True), 1):
        yield from parts.seal(number, pieces, stored.block.hash.hex())


def _outer_header(salt: bytes, sizes: dict[str, int]) -> bytes:
    meta = canonical_json({"format": FORMAT, "salt": salt.hex()}).decode()
    tensors: dict[str, object] = {"__metadata__": {_META: meta}}
    position = 0
    for name, size in sizes.items():
        end = position + size + TAG_BYTES
        tensors[name] = {
            "dtype": "U8",
            "shape": [end - position],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(tensors, separators=(",", ":")).encode()
    # The data of a safetensors file begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return pack("<Q", len(text)) + text


def is_sealed(outer: bytes) -> bool | None:
    """Whether a header is that of a sealed shard; ``None`` where it is no header."""
    metadata = outer[: outer.find(b"}")]
    if _META.encode() in metadata:
        return True
    return False if b'"kvstore":' in metadata else None


class SealedShard:
    """What the outer header of a sealed shard says.

    Args:
        cipher: The store's.
        outer: The outer header, without its length.
        size: Size of the file.

    Attributes:
        sizes: Bytes of the header that is sealed, and of each block.
        data_begin: Where the sealed bytes of the blocks start in the file.
        num_bytes: Bytes of the shard that is sealed.

    Raises:
        ValueError: It is no sealed shard.
        KeyError: The same.
    """

    def __init__(self, cipher: Cipher, outer: bytes, size: int) -> None:
        self._begin = 8 + len(outer)
        self._tensors, metadata = parse_header(outer, size - self._begin)
        meta = strict_json(metadata[_META], allow_floats=False)
        names = [_HEADER, *map(str, range(len(self._tensors) - 1))]
        if meta.keys() != {"format", "salt"} or meta["format"] != FORMAT:
            raise ValueError("it is sealed in another way")
        if list(self._tensors) != names:
            raise ValueError("it has other parts than a sealed shard")
        salt = bytes.fromhex(meta["salt"])
        if len(salt) != SALT_BYTES:
            raise ValueError("its salt has another size")
        self._parts = cipher.parts(salt)
        self.sizes = [e - b - TAG_BYTES for _, _, b, e in self._tensors.values()]
        self.data_begin = self._begin + self._tensors[_HEADER][3]
        self.num_bytes = sum(self.sizes)

    def open_header(self, read: Read) -> bytes:
        """Return what stands before the data in the shard that is sealed.

        Raises:
            ValueError: It was changed, or is another store's.
        """
        header = bytearray(self.sizes[0])
        self._open(_HEADER, 0, [memoryview(header)], read, _HEADER)
        return bytes(header)

    def open_block(
        self,
        number: int,
        stored: StoredBlock,
        buffers: Sequence[memoryview],
        read: Read,
    ) -> None:
        """Fill buffers with the bytes of a block, one after the other.

        Raises:
            ValueError: They were changed.
        """
        about = stored.block.hash.hex()
        self._open(str(number), number + 1, buffers, read, about)

    def _open(
        self,
        name: str,
        number: int,
        buffers: Sequence[memoryview],
        read: Read,
        about: str,
    ) -> None:
        offset = self._begin + self._tensors[name][2]

        def read_next(buffer: memoryview) -> None:
            nonlocal offset
            read(buffer, offset)
            offset += len(buffer)

        self._parts.open(number, buffers, read_next, about)
