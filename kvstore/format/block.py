"""Plain values that the parts of the store hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, NewType

if TYPE_CHECKING:
    from .documents import JSON


BlockHash = NewType("BlockHash", bytes)
"""SHA-256 of a parent hash and the tokens of one block, 32 bytes."""
Progress = Callable[[int, int], None]
"""Called with (done, total), like mlx-lm's ``prompt_progress_callback``."""


def ignore_progress(done: int, total: int) -> None:
    """Report progress to nobody."""


EXACT_BITS = 255
"""Stands for the bits of rows that nothing lossy went into."""
STATE_EXTRAS = 2**40
"""What a checkpoint adds to a block's extras; more than all windows have rows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens of a sequence and their place in its chain."""

    # Names the block.
    hash: BlockHash
    # Hash of the block before, or the root hash for the first.
    parent: BlockHash
    # Position of the first token in the sequence.
    start: int
    # The token ids; fewer than ``block_size`` only in a tail.
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One named array of an encoded block, on its way into a shard."""

    # ``<group>.<side>.<part>``, such as ``0.k.codes``.
    name: str
    # safetensors name of the element type.
    dtype: str
    shape: tuple[int, ...]
    # Its bytes, little-endian, row-major; in several buffers where they lie apart.
    data: bytes | memoryview | tuple[memoryview, ...]
    # Bytes before compression, or ``None`` where there was none.
    raw_nbytes: int | None = None

    @property
    def buffers(self) -> tuple[bytes | memoryview, ...]:
        """Its bytes, as the buffers that hold them."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return sum(map(len, self.buffers))


class LayerError(NamedTuple):
    """How far what a lossy codec stored of a layer is from what it was given."""

    # Its number, caches in a ``CacheList`` counted one by one.
    layer: int
    # ``k`` for keys, ``v`` for values.
    side: str
    # Root of the mean square of the errors, in that of the rows.
    error: float


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block and its parts."""

    block: Block
    # Name of the codec that made the parts.
    codec: str
    # That codec loses nothing.
    is_lossless: bool
    # As in :class:`Place`.
    bits: int
    # In the order in which they are written.
    parts: tuple[Part, ...]
    # As in :class:`Place`.
    num_extras: int = 0
    # Of some lossy blocks, those of their layers; of others nothing.
    errors: tuple[LayerError, ...] = ()
    # BLAKE3 of all parts, made by the thread that made them: they are in its cache.
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash the parts."""
        from .documents import blake3_hex

        object.__setattr__(self, "digest", blake3_hex(*self.buffers))

    @property
    def buffers(self) -> tuple[bytes | memoryview, ...]:
        """The bytes of all parts, as the buffers that hold them."""
        return tuple(chain.from_iterable(part.buffers for part in self.parts))


@dataclass(frozen=True, slots=True)
class Origin:
    """What computed the rows of a shard; the same for all of its blocks."""

    # The fingerprint's fields.
    fingerprint: JSON
    # JSON value that describes the layers.
    layout: Any


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a shard's header describes it."""

    # safetensors name of the element type.
    dtype: str
    shape: tuple[int, ...]
    # First byte, counted from the start of the data.
    begin: int
    # One past the last byte.
    end: int
    # Bytes before compression, or ``None`` where there was none.
    raw_nbytes: int | None


def describe_parts(parts: Iterable[Part]) -> dict[str, TensorSpec]:
    """Return how a header describes parts of which the first begins the data."""
    found, end = {}, 0
    for part in parts:
        begin, end = end, end + part.nbytes
        found[part.name] = TensorSpec(
            part.dtype, part.shape, begin, end, part.raw_nbytes
        )
    return found


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block as a shard's header describes it."""

    block: Block
    # Name of the codec of its parts.
    codec: str
    # That codec loses nothing.
    is_lossless: bool
    # As in :class:`Place`.
    bits: int
    # As in :class:`Place`.
    num_extras: int
    # BLAKE3 of its bytes in hex.
    digest: str
    # First byte of its range, counted from the start of the data.
    begin: int
    # One past the last byte.
    end: int
    # Its parts by name, in the order of their bytes.
    tensors: dict[str, TensorSpec]
    # As in :class:`EncodedBlock`; advisory.
    errors: tuple[LayerError, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether nothing lossy went into its rows."""
        return self.bits == EXACT_BITS


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself."""

    # What computed its rows.
    origin: Origin
    # Its blocks, in the order of their bytes.
    blocks: tuple[StoredBlock, ...]
    # Where the data starts in the file.
    data_begin: int
    # Size of the whole file.
    nbytes: int
    # Of an encrypted store: what opens its blocks.
    sealed: Any = field(default=None, compare=False)
