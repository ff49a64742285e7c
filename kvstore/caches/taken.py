"""Rows of a prompt cache that another thread is to write: taken, while it may grow.

They are taken as codes where those are made as fast as a copy. So what waits for a disk
is a quarter of the rows, and nothing is encoded while the model generates. What a GPU
makes stays there until somebody reads it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..codecs.base import Codec, Layers, Parts, nbytes
from ..codecs.on_device import DevicePart
from ..format.block import Block, BlockHash
from .provenance import Provenance
from .stored import Piece


@dataclass(frozen=True, slots=True)
class Share:
    """What one block has of arrays that a GPU makes for several."""

    # Rows ``(L, H, blocks * T, D)``, or a codec's parts of them.
    arrays: mx.array | Mapping[str, DevicePart]
    # Which of the blocks.
    number: int
    num_blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes of this block."""
        if isinstance(self.arrays, mx.array):
            return self.arrays.nbytes // self.num_blocks
        return sum(part.nbytes for part in self.arrays.values()) // self.num_blocks

    def read(self) -> Layers | Parts:
        """Have the block's part of them sent here, in any thread."""
        if not isinstance(self.arrays, mx.array):
            return {n: part.read(self.number) for n, part in self.arrays.items()}
        size = self.arrays.shape[2] // self.num_blocks
        first = self.number * size
        return list(np.asarray(self.arrays)[:, :, first : first + size])


Taken = Layers | Parts | Share


def copied(x: Layers | Parts) -> Layers | Parts:
    """Return rows or parts of codes in memory of their own."""
    # Copied, since MLX's buffers are to be freed by the thread that made them.
    if isinstance(x, list):
        # All at once: large arrays get large pages, each of which costs one fault.
        return list(np.stack(x))
    return {name: np.array(part) for name, part in x.items()}


class TakenRows:
    """Rows of some blocks, independent of the prompt cache.

    Args:
        taken: Per block its pieces, each with rows or codes of them.
        codecs: Per block the codec that it is stored in, of which its codes are.
        provenance: What the rows went through.
    """

    def __init__(
        self,
        taken: Mapping[BlockHash, list[tuple[Piece, Taken]]],
        codecs: Mapping[BlockHash, Codec],
        provenance: Provenance,
    ) -> None:
        self._taken = taken
        self.codecs = codecs
        self.provenance = provenance

    @property
    def hashes(self) -> frozenset[BlockHash]:
        """The blocks that were taken."""
        return frozenset(self._taken)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(
            x.nbytes if isinstance(x, Share) else nbytes(x)
            for found in self._taken.values()
            for _, x in found
        )

    def joined(self, other: TakenRows, hashes: Container[BlockHash]) -> TakenRows:
        """Return these rows, and of others those of blocks that have these hashes."""
        more = {block: rows for block, rows in other._taken.items() if block in hashes}
        provenance = self.provenance.joined(other.provenance)
        if not more:
            return self
        codecs = {**other.codecs, **self.codecs}
        return TakenRows({**more, **self._taken}, codecs, provenance)

    def pieces(self, block: Block) -> list[Piece]:
        """Return what was taken of a block."""
        return [piece for piece, _ in self._taken[block.hash]]

    def read(
        self, block: Block, codec: Codec | None = None
    ) -> Iterator[tuple[Piece, Layers | Parts]]:
        """Yield what was taken of a block; codes are of its codec in ``codecs``."""
        for piece, x in self._taken[block.hash]:
            yield piece, x.read() if isinstance(x, Share) else x
