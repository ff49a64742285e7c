"""A prompt cache to blocks in shards: what is missing is encoded, once, and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import prompt_cache as caches
from . import shards
from .codecs import Codec, Rows, lossless_twin
from .errors import FormatError, IntegrityError
from .fingerprint import Fingerprint
from .folder import StoreFolder
from .hashing import hash_block_tokens, hash_root, split_tokens
from .index import STATE_EXTRAS, Index, is_better
from .indexing import index_shard
from .layout import Group, flatten, group_layers, layout_to_json
from .reading import Reader
from .types import (
    Block,
    BlockHash,
    EncodedBlock,
    Entry,
    Layout,
    Origin,
    Part,
    Place,
    Progress,
    Provenance,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of one sequence, in order.

    Attributes:
        root: What the first block has as parent.
        layout: How the prompt cache is built.
        origin: What computed their rows.
        blocks: The blocks; the last may be a tail.
    """

    root: BlockHash
    layout: Layout
    origin: Origin
    blocks: tuple[Block, ...]

    @property
    def tip(self) -> BlockHash:
        """Hash of the last block."""
        return self.blocks[-1].hash

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.blocks[-1].start + len(self.blocks[-1].tokens)

    @property
    def has_states(self) -> bool:
        """Whether there are layers that can be restored at checkpoints only."""
        specs = (spec for layer in flatten(self.layout) for _, spec in layer.rows)
        return any(spec.kind == "state" for spec in specs)

    def without_tail(self, block_size: int) -> Chain | None:
        """Return the full blocks only, or ``None`` where there are none."""
        full = tuple(b for b in self.blocks if len(b.tokens) == block_size)
        return replace(self, blocks=full) if full else None

    def continues(self, entry: Entry) -> bool:
        """Say whether an entry's tokens and model are those that this starts with."""
        if entry.root != self.root.hex() or entry.num_tokens > self.num_tokens:
            return False
        size = len(self.blocks[0].tokens)
        whole, rest = divmod(entry.num_tokens, size)
        if not rest:
            return entry.tip == self.blocks[whole - 1].hash.hex()
        block = self.blocks[whole]
        return entry.tip == hash_block_tokens(block.parent, block.tokens[:rest]).hex()


class Saver:
    """Writes the blocks of one prompt cache.

    Args:
        folder: The store.
        reader: Reads its blocks.
        index: Its index.
        codec: For full blocks; a tail is stored lossless.
        prompt_cache: mlx-lm's caches.
        chain: Its blocks, or the leading ones.
        tip: Where its states are to be stored: how many tokens it holds, or ``None``.
    """

    def __init__(
        self,
        folder: StoreFolder,
        reader: Reader,
        index: Index,
        codec: Codec,
        prompt_cache: Sequence[Any],
        chain: Chain,
        tip: int | None,
    ) -> None:
        self._folder = folder
        self._reader = reader
        self._index = index
        self._codec = codec
        self._chain = chain
        self._tip = tip
        self._groups = group_layers(chain.layout)
        self._held = caches.hold(prompt_cache)
        if not any(
            name in caches.CODABLE for g in self._groups for name, _ in g.layout.rows
        ):
            self._codec = lossless_twin(codec)
        self._provenance: Provenance = caches.read_provenance(prompt_cache)

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
        wanted = [block for block in self._chain.blocks if self._is_wanted(block)]
        for batch in self._batches(wanted):
            self._write(batch, make_room)
            last = batch[-1].block
            progress(last.start + len(last.tokens), total)
        self._remember_root()
        progress(total, total)

    def _is_wanted(self, block: Block) -> bool:
        """Say whether the store lacks a block, or an exact copy that we have."""
        place = self._index.place_of(block)
        if place is None or not self._is_there(place):
            return True
        mine = self._num_extras(block), self._is_exact(block)
        return is_better(mine, (place.num_extras, place.is_exact))

    def _is_there(self, place: Place) -> bool:
        """Say whether a block's shard is there and can be read, as the index says."""
        try:
            self._reader.stored(place)
        except FormatError:
            return False
        except IntegrityError as error:
            if error.path == self._folder.index:
                raise
            return False
        return True

    def _remember_root(self) -> None:
        """Tell the index what the blocks descend from, should it not know."""
        origin = self._chain.origin
        digest = Fingerprint(origin.fingerprint).digest
        root = (self._chain.root, origin.layout)
        if root not in self._index.roots(digest, origin.tenant):
            with self._index.transaction():
                self._index.add_root(root[0], digest, origin.tenant, root[1])

    def _rows(self, block: Block) -> Iterator[tuple[int, Group, str, Rows]]:
        """Yield what there is of a block: group and its number, array, rows."""
        stop = block.start + len(block.tokens)
        at_tip = stop == self._tip
        for number, group in enumerate(self._groups):
            found = caches.rows_held(self._held, group, block.start, stop, at_tip)
            for name, rows in found:
                yield number, group, name, rows

    def _num_extras(self, block: Block) -> int:
        """Return how much of windows and states there is of a block.

        More rows are those before too, in every layer; a state outweighs all rows.
        """
        found = [
            (group.spec(name).kind, rows) for _, group, name, rows in self._rows(block)
        ]
        num_rows = sum(rows.shape[2] for kind, rows in found if kind == "window")
        has_state = any(kind == "state" for kind, _ in found)
        return num_rows + has_state * STATE_EXTRAS

    def _codec_of(self, block: Block) -> Codec:
        """Return the codec for one block; no row is ever encoded lossily twice."""
        is_tail = len(block.tokens) < self._folder.block_size
        if is_tail or block.start < self._provenance.coded_tokens:
            return lossless_twin(self._codec)
        return self._codec

    def _is_exact(self, block: Block) -> bool:
        return self._provenance.is_exact and self._codec_of(block).is_lossless

    def _batches(self, blocks: Sequence[Block]) -> Iterator[list[EncodedBlock]]:
        """Encode blocks and group them to shards."""
        batch: list[EncodedBlock] = []
        for block in blocks:
            batch.append(self._encode(block))
            if shards.is_full(batch):
                yield batch
                batch = []
        if batch:
            yield batch

    def _encode(self, block: Block) -> EncodedBlock:
        codec = self._codec_of(block)
        twin = lossless_twin(codec)
        parts: list[Part] = []
        for number, group, name, rows in self._rows(block):
            x = caches.split(self._held, group, name, rows)
            array_codec = codec if name in caches.CODABLE else twin
            parts += array_codec.encode(x, rows, f"{number}.{name}.")
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
        with shards.staged_shard(self._folder.staging, origin, batch) as staged:
            make_room(staged.header.nbytes)
            with self._index.transaction():
                shards.publish_shard(self._folder.shards, staged)
                self._index.trust_shard(staged.name)
                index_shard(self._index, staged.name, staged.header, time.time())
                self._index.count(
                    written_bytes=staged.header.nbytes,
                    raw_bytes=sum(len(encoded.block.tokens) for encoded in batch)
                    * sum(group.token_bytes for group in self._groups),
                )


def make_chain(
    fingerprint: Fingerprint,
    prompt_cache: Sequence[Any],
    tenant: str,
    tokens: Sequence[int],
    block_size: int,
) -> Chain:
    """Return the chain of blocks that a prompt cache's tokens make.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``tokens``.
    """
    layout = caches.read_layout(prompt_cache, len(tokens))
    origin = Origin(fingerprint.fields, layout_to_json(layout), tenant)
    root = hash_root(fingerprint.digest, origin.layout, tenant)
    return Chain(root, layout, origin, tuple(split_tokens(root, tokens, block_size)))
