"""A prompt cache to blocks in shards: what is missing is encoded, once, and written."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..caches import live as caches
from ..caches.layout import group_layers
from ..caches.snapshot import Snapshot
from ..caches.stored import CODABLE, Piece, count_extras
from ..codecs import Codec, lossless_twin
from ..format import shard as shards
from ..format.block import Block, EncodedBlock, Part, Progress
from ..storage.blocks import BlockStore
from ..storage.index import is_better
from ..storage.shards import staged_shard

# With two cores, the model has both of them.
NUM_ENCODERS = max(1, min(4, (os.cpu_count() or 1) // 2))


class Saver:
    """Writes the blocks of one prompt cache.

    Args:
        blocks: The store's blocks.
        codec: For full blocks; a tail is stored lossless.
        snapshot: What is to be saved.
    """

    def __init__(
        self,
        blocks: BlockStore,
        codec: Codec,
        snapshot: Snapshot,
    ) -> None:
        self._blocks = blocks
        self._folder = blocks.folder
        self._snapshot = snapshot
        self._chain = snapshot.chain
        self._rows = snapshot.rows
        self._groups = group_layers(snapshot.chain.layout)
        names = {name for group in self._groups for name, _ in group.layout.rows}
        is_codable = not names.isdisjoint(CODABLE)
        self._codec = codec if is_codable else lossless_twin(codec)

    def missing(self) -> list[Block]:
        """Return the blocks that the store lacks, or has no copy of as good as ours."""
        return [block for block in self._snapshot.blocks if self._is_wanted(block)]

    def write_missing(
        self, make_room: Callable[[int], None], progress: Progress
    ) -> None:
        """Encode and write every block that the store lacks.

        No lock is held while a codec works.

        Args:
            make_room: Called with the bytes of a shard that is about to be added.
            progress: Called with (tokens saved, tokens in all).
        """
        total = sum(len(block.tokens) for block in self._chain.blocks)
        progress(0, total)
        for batch in self._batches(self.missing()):
            self._write(batch, make_room)
            last = batch[-1].block
            progress(last.start + len(last.tokens), total)
        self._blocks.add_root(self._chain.root, self._chain.origin)
        progress(total, total)

    def _is_wanted(self, block: Block) -> bool:
        """Whether the store lacks a block, or an exact copy that we have."""
        place = self._blocks.index.place_of(block)
        if place is None or not self._blocks.has(place):
            return True
        mine = self._num_extras(block), self._is_exact(block)
        return is_better(mine, (place.num_extras, place.is_exact))

    def _num_extras(self, block: Block) -> int:
        return count_extras(self._rows.pieces(block))

    def _codec_of(self, block: Block) -> Codec:
        """Return the codec for one block; no row is ever encoded lossily twice."""
        is_tail = len(block.tokens) < self._folder.block_size
        if is_tail or block.start < self._rows.provenance.coded_tokens:
            return lossless_twin(self._codec)
        return self._codec

    def _is_exact(self, block: Block) -> bool:
        return self._rows.provenance.is_exact and self._codec_of(block).is_lossless

    def _batches(self, blocks: Sequence[Block]) -> Iterator[list[EncodedBlock]]:
        """Encode blocks and group them to shards."""
        batch: list[EncodedBlock] = []
        for encoded in self._encode_all(blocks):
            batch.append(encoded)
            if shards.is_full(batch):
                yield batch
                batch = []
        if batch:
            yield batch

    def _encode_all(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """Encode blocks in order, some at a time where there are cores for it."""
        if NUM_ENCODERS == 1:
            yield from (self._encode(block, self._rows.read(block)) for block in blocks)
            return
        with ThreadPoolExecutor(NUM_ENCODERS, "kvstore-encoder") as pool:
            waiting: deque[tuple[Future[EncodedBlock], object]] = deque()
            for block in blocks:
                # Read, and let go of, here: MLX's arrays belong to this thread.
                pieces = list(self._rows.read(block))
                waiting.append((pool.submit(self._encode, block, pieces), pieces))
                if len(waiting) > NUM_ENCODERS:
                    yield waiting.popleft()[0].result()
            while waiting:
                yield waiting.popleft()[0].result()

    def _encode(
        self, block: Block, pieces: Iterable[tuple[Piece, caches.Array]]
    ) -> EncodedBlock:
        codec = self._codec_of(block)
        twin = lossless_twin(codec)
        parts: list[Part] = []
        for piece, x in pieces:
            name = piece.rows.side
            array_codec = codec if name in CODABLE else twin
            parts += array_codec.encode(x, piece.rows, f"{piece.number}.{name}.")
        # Windows have moved on and states were elsewhere; only tokens are left.
        parts = parts or [Part("nothing", "U8", (1,), bytes(1))]
        return EncodedBlock(
            block,
            codec.name,
            codec.is_lossless,
            self._is_exact(block),
            tuple(parts),
            self._num_extras(block),
        )

    def _write(
        self, batch: Sequence[EncodedBlock], make_room: Callable[[int], None]
    ) -> None:
        """Stage a shard, then publish and index it in one transaction."""
        origin = self._chain.origin
        with staged_shard(self._folder.staging, origin, batch) as staged:
            make_room(staged.header.nbytes)
            with self._blocks.index.transaction():
                token_bytes = sum(group.token_bytes for group in self._groups)
                self._blocks.add_new([staged], token_bytes)
