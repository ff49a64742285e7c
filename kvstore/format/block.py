"""Plain values that the parts of the store hand to each other. No behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from .documents import JSON

BlockHash = NewType("BlockHash", bytes)
"""SHA-256 of a parent hash and the tokens of one block, 32 bytes."""
Progress = Callable[[int, int], None]
"""Called with (done, total), like mlx-lm's ``prompt_progress_callback``."""


STATE_EXTRAS = 2**40
"""What a checkpoint adds to a block's extras; more than all windows have rows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens of a sequence and their place in its chain.

    Attributes:
        hash: Names the block.
        parent: Hash of the block before, or the root hash for the first.
        start: Position of the first token in the sequence.
        tokens: The token ids; fewer than ``block_size`` only in a tail.
    """

    hash: BlockHash
    parent: BlockHash
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One named array of an encoded block, on its way into a shard.

    Attributes:
        name: ``<group>.<side>.<part>``, such as ``0.k.codes``.
        dtype: safetensors name of the element type.
        shape: Its shape.
        data: Its bytes, little-endian, row-major.
        raw_nbytes: Bytes before compression, or ``None`` where there was none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
    raw_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block and its parts.

    Attributes:
        block: The block.
        codec: Name of the codec that made the parts.
        is_lossless: That codec loses nothing.
        is_exact: Lossless, and nothing lossy went into computing the rows.
        parts: In the order in which they are written.
        num_extras: As in :class:`Place`.
    """

    block: Block
    codec: str
    is_lossless: bool
    is_exact: bool
    parts: tuple[Part, ...]
    num_extras: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What computed the rows of a shard; the same for all of its blocks.

    Attributes:
        fingerprint: The fingerprint's fields.
        layout: JSON value that describes the layers.
        tenant: Keeps apart what must not be shared.
    """

    fingerprint: JSON
    layout: Any
    tenant: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a shard's header describes it.

    Attributes:
        dtype: safetensors name of the element type.
        shape: Its shape.
        begin: First byte, counted from the start of the data.
        end: One past the last byte.
        raw_nbytes: Bytes before compression, or ``None`` where there was none.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    raw_nbytes: int | None


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block as a shard's header describes it.

    Attributes:
        block: The block.
        codec: Name of the codec of its parts.
        is_lossless: That codec loses nothing.
        is_exact: Lossless, and nothing lossy went into computing the rows.
        num_extras: As in :class:`Place`.
        digest: BLAKE3 of its bytes in hex.
        begin: First byte of its range, counted from the start of the data.
        end: One past the last byte.
        tensors: Its parts by name, in the order of their bytes.
    """

    block: Block
    codec: str
    is_lossless: bool
    is_exact: bool
    num_extras: int
    digest: str
    begin: int
    end: int
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        origin: What computed its rows.
        blocks: Its blocks, in the order of their bytes.
        data_begin: Where the data starts in the file.
        nbytes: Size of the whole file.
    """

    origin: Origin
    blocks: tuple[StoredBlock, ...]
    data_begin: int
    nbytes: int
