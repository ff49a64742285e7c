"""What is to be saved: a chain of blocks, and the rows that a prompt cache has of them.

MLX's arrays are evaluated on the thread that made them, so who writes on another
thread takes the rows first, as NumPy arrays; else they are read block by block.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..codecs.base import Codec, Layers, Parts, nbytes
from ..format.block import Block, BlockHash, Origin
from ..format.chain import (
    digest_fields,
    hash_block_tokens,
    hash_root,
    mark_reanchored,
    split_tokens,
)
from ..format.documents import JSON
from ..format.entry import Entry
from . import live as caches
from .kinds.base import Held
from .kinds.turboquant import CODED, check_blocks, codec_of, read_codes
from .layout import Layout, flatten, group_layers, has_only_rows, layout_to_json
from .memory import is_shared
from .provenance import Provenance
from .stored import CODABLE, Piece


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of one sequence, in order."""

    # What the first block has as parent.
    root: BlockHash
    # How the prompt cache is built.
    layout: Layout
    # What computed their rows.
    origin: Origin
    # The blocks; the last may be a tail.
    blocks: tuple[Block, ...]

    @property
    def tip(self) -> BlockHash:
        """Hash of the last block."""
        return self.blocks[-1].hash

    @property
    def hashes(self) -> frozenset[BlockHash]:
        """Hashes of all blocks."""
        return frozenset(block.hash for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.blocks[-1].start + len(self.blocks[-1].tokens)

    @property
    def has_only_rows(self) -> bool:
        """Whether every prefix can be restored from the same blocks."""
        return has_only_rows(self.layout)

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
        """Whether an entry's tokens and model are those that this starts with."""
        if entry.root != self.root.hex():
            return False
        return self._has_end(bytes.fromhex(entry.tip), entry.num_tokens)

    def contains(self, other: Chain) -> bool:
        """Whether every prefix of another chain can be restored from this one."""
        return (
            self.root == other.root
            and self.has_only_rows
            and self._has_end(other.tip, other.num_tokens)
        )

    def _has_end(self, tip: bytes, num_tokens: int) -> bool:
        """Whether a chain that ends there is the beginning of this one."""
        if num_tokens > self.num_tokens:
            return False
        whole, rest = divmod(num_tokens, len(self.blocks[0].tokens))
        if not rest:
            return tip == self.blocks[whole - 1].hash
        block = self.blocks[whole]
        return tip == hash_block_tokens(block.parent, block.tokens[:rest])


def read_layers(held: Sequence[Held], piece: Piece) -> Layers:
    """Return rows of some layers, evaluated here, on the caller's thread.

    Where NumPy sees the memory of MLX's arrays, they are views of it: the caches are
    not to be written to meanwhile.
    """
    found = _find_rows(held, piece)
    if is_shared():
        arrays = [_as_bits(array) for array, _ in found]
        mx.eval(arrays)
        pairs = zip(arrays, found, strict=True)
        return [np.asarray(array)[0, :, rows] for array, (_, rows) in pairs]
    # Sent by the device at once.
    return list(np.asarray(_as_bits(_stack(found))))


def encode_layers(
    held: Sequence[Held], piece: Piece, codec: Codec | None
) -> Parts | None:
    """Return rows of some layers in a codec's parts, where a GPU can encode them."""
    encode = getattr(codec.array, "encode_on_device", None) if codec else None
    if encode is None or piece.rows.side not in CODABLE:
        return None
    parts: Parts | None = encode(_stack(_find_rows(held, piece)), piece.rows)
    return parts


def _find_rows(held: Sequence[Held], piece: Piece) -> list[tuple[mx.array, slice]]:
    """Return the array of each layer, and which of its rows are meant."""
    found, num_rows = [], piece.rows.shape[2]
    for layer in piece.group.layers:
        array, begin = held[layer][piece.rows.side]
        first = 0 if piece.kind in ("state", "mark") else piece.rows.start - begin
        found.append((array, slice(first, first + num_rows)))
    return found


def _stack(found: Sequence[tuple[mx.array, slice]]) -> mx.array:
    return mx.stack([array[0, :, rows] for array, rows in found])


def _as_bits(array: mx.array) -> mx.array:
    """Return an array as its bits, where NumPy lacks its dtype."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def _copied(x: Layers | Parts) -> Layers | Parts:
    """Return rows or parts of codes in memory of their own."""
    if isinstance(x, list):
        # All at once: large arrays get large pages, each of which costs one fault.
        return list(np.stack(x))
    return {name: np.array(part) for name, part in x.items()}


class LiveRows:
    """Rows of a prompt cache, read when they are wanted, on its own thread.

    Args:
        prompt_cache: mlx-lm's caches.
        layout: How it is built.
        tip: Where its states are to be stored: how many tokens it holds, or ``None``.

    Attributes:
        provenance: What the rows went through.
    """

    def __init__(
        self, prompt_cache: Sequence[Any], layout: Layout, tip: int | None
    ) -> None:
        self._caches = caches.flatten_caches(prompt_cache)
        self._held = caches.hold(prompt_cache)
        self._groups = group_layers(layout)
        self._tip = tip
        self.provenance: Provenance = caches.read_provenance(prompt_cache)

    def pieces(self, block: Block) -> list[Piece]:
        """Return what there is of a block."""
        stop = block.start + len(block.tokens)
        at_tip = stop == self._tip
        return [
            Piece(number, group, rows)
            for number, group in enumerate(self._groups)
            for _, rows in caches.rows_held(
                self._held, group, block.start, stop, at_tip
            )
        ]

    def read(
        self, block: Block, codec: Codec | None = None
    ) -> Iterator[tuple[Piece, Layers | Parts]]:
        """Yield what there is of a block, in an array ``(H, T, D)`` for each layer.

        Of rows that are in codes, those; and what the codec makes of rows, if it is
        given and they lie on a GPU that can encode.
        """
        for piece in self.pieces(block):
            group, rows = piece.group, piece.rows
            codes: Parts | None = None
            if rows.side in CODED:
                members = [self._caches[layer] for layer in group.layers]
                codes = read_codes(codec_of(group.layout), members, rows)
            if codes is None:
                codes = encode_layers(self._held, piece, codec)
            yield piece, read_layers(self._held, piece) if codes is None else codes

    def take(self, blocks: Iterable[Block]) -> TakenRows:
        """Return the rows of some blocks, for another thread."""
        # Copied, since MLX's buffers are to be freed by the thread that made them.
        taken = {
            block.hash: [(piece, _copied(x)) for piece, x in self.read(block)]
            for block in blocks
        }
        return TakenRows(taken, self.provenance)


class TakenRows:
    """Rows of some blocks, independent of the prompt cache.

    Args:
        taken: Per block its pieces, each with what :meth:`LiveRows.read` yields.
        provenance: What the rows went through.
    """

    def __init__(
        self,
        taken: dict[BlockHash, list[tuple[Piece, Layers | Parts]]],
        provenance: Provenance,
    ) -> None:
        self._taken = taken
        self.provenance = provenance

    @property
    def hashes(self) -> frozenset[BlockHash]:
        """The blocks that were taken."""
        return frozenset(self._taken)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(nbytes(x) for found in self._taken.values() for _, x in found)

    def joined(self, other: TakenRows, hashes: Container[BlockHash]) -> TakenRows:
        """Return these rows, and of others those of blocks that have these hashes."""
        more = {block: rows for block, rows in other._taken.items() if block in hashes}
        provenance = self.provenance.joined(other.provenance)
        return TakenRows({**more, **self._taken}, provenance) if more else self

    def pieces(self, block: Block) -> list[Piece]:
        """Return what was taken of a block."""
        return [piece for piece, _ in self._taken[block.hash]]

    def read(
        self, block: Block, codec: Codec | None = None
    ) -> Iterator[tuple[Piece, Layers | Parts]]:
        """Yield what was taken of a block, as :meth:`LiveRows.read` does."""
        yield from self._taken[block.hash]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The blocks one save will write, copied so that another thread can write them."""

    chain: Chain
    # What it has of them, or of those that the store lacks.
    rows: LiveRows | TakenRows
    # What the model is called; advisory.
    model: str

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks whose rows are at hand."""
        if isinstance(self.rows, LiveRows):
            return self.chain.blocks
        return tuple(b for b in self.chain.blocks if b.hash in self.rows.hashes)

    def take(self, blocks: Iterable[Block]) -> Snapshot:
        """Return the same with copies of the rows of some blocks, and of no others."""
        assert isinstance(self.rows, LiveRows)  # what is taken needs no taking
        return replace(self, rows=self.rows.take(blocks))


def take_live(
    chain: Chain, prompt_cache: Sequence[Any], tip: int | None, model: str
) -> Snapshot:
    """Return a live prompt cache as something to be saved.

    Args:
        chain: Its blocks, or the leading ones.
        prompt_cache: mlx-lm's caches.
        tip: Where its states are to be stored: how many tokens it holds, or ``None``.
        model: What the model is called.
    """
    return Snapshot(chain, LiveRows(prompt_cache, chain.layout, tip), model)


def make_chain(
    fingerprint: JSON,
    prompt_cache: Sequence[Any],
    tokens: Sequence[int],
    block_size: int,
) -> Chain:
    """Return the chain of blocks that a prompt cache's tokens make.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``tokens``.
    """
    layout = caches.read_layout(prompt_cache, len(tokens))
    check_blocks(caches.flatten_caches(prompt_cache), block_size)
    if caches.read_provenance(prompt_cache).num_moved:
        # Under a root of their own nobody finds them who did not ask for such rows.
        fingerprint = mark_reanchored(fingerprint)
    origin = Origin(fingerprint, layout_to_json(layout))
    root = hash_root(digest_fields(fingerprint), origin.layout)
    return Chain(root, layout, origin, tuple(split_tokens(root, tokens, block_size)))
