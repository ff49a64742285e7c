"""What is to be saved: a chain of blocks, and the rows that a prompt cache has of them.

MLX's arrays are evaluated on the thread that made them, so who writes on another
thread takes the rows first (`TakenRows`); else they are read block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from turboquant.kernels import gpu

from ..codecs.base import Array, Codec, Layers, Parts
from ..codecs.on_device import DevicePart
from ..codecs.parallel import NUM_THREADS, map_in_order
from ..codecs.turbo import Turbo
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
from .kinds.base import STEP, Held
from .kinds.turboquant import CODED, check_blocks, codec_of, read_codes
from .layer_errors import SAMPLE, is_measured, sample_layers, sample_on_device
from .layout import Layout, flatten, group_layers, has_only_rows, layout_to_json
from .memory import is_shared
from .provenance import Provenance
from .stored import CODABLE, Piece
from .taken import Share, Taken, TakenRows, copied

# Blocks that a GPU copies at once. So many rows lie there twice for a moment, and
# while MLX moves them to the host, it keeps the interpreter's lock.
_MAX_COPIED = 4
# Blocks that it encodes at once, of which only the codes are made and moved.
_MAX_CODED = 8

Split = Callable[[BlockHash], Iterable[Block]]
"""Returns the blocks of a prompt, given what the first has as parent."""


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


def _encode_layers(
    held: Sequence[Held],
    piece: Piece,
    block: Block,
    codec: Codec | None,
    num_blocks: int = 1,
) -> dict[str, DevicePart] | None:
    """Return a codec's parts of rows of some blocks, where a GPU can encode them.

    Args:
        held: What the caches hold.
        piece: What the first of the blocks has of an array.
        block: The first of the blocks.
        codec: The codec, if any.
        num_blocks: How many blocks like it there are, one behind the other.

    Returns:
        Parts, and a sample of the rows where errors are measured; not evaluated.
    """
    turbo = _device_codec(codec, piece)
    if codec is None or turbo is None:
        return None
    buffers = _find_buffers(held, piece, num_blocks)
    x = gpu.Buffers(buffers, piece.rows.shape[2], num_blocks)
    parts = turbo.encode_on_device(x, piece.rows)
    if is_measured(block, codec):
        parts[SAMPLE] = sample_on_device(x)
    return parts


def _device_codec(codec: Codec | None, piece: Piece) -> Turbo | None:
    """Return the codec that a GPU encodes such rows in; ``None`` where it copies."""
    turbo = codec.array if codec else None
    if not isinstance(turbo, Turbo) or piece.rows.side not in CODABLE:
        return None
    return turbo if turbo.is_for_device(piece.rows) else None


def _find_buffers(
    held: Sequence[Held], piece: Piece, num_blocks: int
) -> list[tuple[mx.array, int]]:
    """Return of each layer a contiguous array, and the first row of it that is meant.

    MLX copies an array that is not contiguous whole before a kernel reads it, and does
    not say which are. The buffers of a ``KVCache`` are, and grow by `STEP` rows; where
    they have another length, they may be views, and the rows meant are copied.
    """
    is_plain = piece.group.layout.cache_class == "KVCache"
    return [
        (array, rows.start)
        if is_plain and not array.shape[2] % STEP
        else (mx.contiguous(array[:, :, rows]), 0)
        for array, rows in _find_rows(held, piece, num_blocks)
    ]


def _find_rows(
    held: Sequence[Held], piece: Piece, num_blocks: int = 1
) -> list[tuple[mx.array, slice]]:
    """Return the array of each layer, and which of its rows are meant."""
    found, num_rows = [], piece.rows.shape[2] * num_blocks
    for layer in piece.group.layers:
        array, begin = held[layer][piece.rows.side]
        first = 0 if piece.kind in ("state", "mark") else piece.rows.start - begin
        found.append((array, slice(first, first + num_rows)))
    return found


def _stack(found: Sequence[tuple[mx.array, slice]]) -> mx.array:
    """Return the rows of all layers in memory of their own."""
    # Of a single array, MLX would return that itself.
    nothing = found[0][0][:0, :, found[0][1]]
    return mx.concatenate([nothing, *(array[:1, :, rows] for array, rows in found)])


def _as_bits(array: mx.array) -> mx.array:
    """Return an array as its bits, where NumPy lacks its dtype."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


class _Wanted(NamedTuple):
    """A block that is to be taken."""

    block: Block
    codec: Codec
    pieces: list[Piece]


def _likeness(item: tuple[int, _Wanted]) -> tuple[Any, ...]:
    """Return what is equal for blocks that are alike and one behind the other."""
    number, (block, codec, pieces) = item
    size = len(block.tokens)
    shapes = [(p.number, p.rows.shape, p.rows.start - block.start) for p in pieces]
    sides = [piece.rows.side for piece in pieces]
    is_coded = all(_device_codec(codec, piece) for piece in pieces)
    most = _MAX_CODED if is_coded else _MAX_COPIED
    # The first block of a sequence has rows that are coded otherwise.
    where = block.start - number * size, block.start == 0, number // most
    return *where, size, codec.name, is_measured(block, codec), shapes, sides


def _take(piece: Piece, x: Layers | Parts, wanted: _Wanted) -> Layers | Parts:
    """Return codes of rows where they are made as fast as a copy, else a copy."""
    turbo, rows = wanted.codec.array, piece.rows
    if not isinstance(turbo, Turbo) or isinstance(x, Mapping):
        return copied(x)
    is_codable = rows.side in CODABLE and turbo.is_quick(rows)
    if not is_codable:
        return copied(x)
    parts = cast("dict[str, Array]", turbo.encode(x, rows))
    if is_measured(wanted.block, wanted.codec):
        parts[SAMPLE] = sample_layers(x)
    return parts


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
        # Of no block it is settled, unlike of `TakenRows`.
        self.codecs: Mapping[BlockHash, Codec] = {}

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
            if codes is None and (
                made := _encode_layers(self._held, piece, block, codec)
            ):
                mx.eval(made)
                codes = {name: part.read(0) for name, part in made.items()}
            yield piece, read_layers(self._held, piece) if codes is None else codes

    def take(
        self, blocks: Iterable[Block], codec_of_block: Callable[[Block], Codec]
    ) -> TakenRows:
        """Return the rows of some blocks, for another thread; the caches may grow then.

        Args:
            blocks: The blocks, in order.
            codec_of_block: Returns the codec that a block is stored in.
        """
        wanted = [_Wanted(b, codec_of_block(b), self.pieces(b)) for b in blocks]
        has_codes = any(p.rows.side in CODED for one in wanted for p in one.pieces)
        on_device = mx.default_device() == mx.gpu and not has_codes
        found = self._take_there(wanted) if on_device else self._take_here(wanted)
        taken = {one.block.hash: pieces for one, pieces in found}
        codecs = {one.block.hash: one.codec for one in wanted}
        return TakenRows(taken, codecs, self.provenance)

    def _take_here(
        self, wanted: Sequence[_Wanted]
    ) -> Iterable[tuple[_Wanted, list[tuple[Piece, Taken]]]]:
        """Encode or copy rows out of the caches' memory, some blocks at a time."""

        def take(
            item: tuple[_Wanted, list[tuple[Piece, Layers | Parts]]],
        ) -> tuple[_Wanted, list[tuple[Piece, Taken]]]:
            one, read = item
            return one, [(piece, _take(piece, x, one)) for piece, x in read]

        read = ((one, list(self.read(one.block))) for one in wanted)
        return map_in_order(take, read, NUM_THREADS, nbytes=lambda _: 0, max_bytes=0)

    def _take_there(
        self, wanted: Sequence[_Wanted]
    ) -> Iterable[tuple[_Wanted, list[tuple[Piece, Taken]]]]:
        """Have a GPU encode or copy rows, of blocks that are alike at once.

        It is waited for: until it is done the caches' arrays have two owners, and MLX
        would copy whole arrays before it writes the next token's rows to them.
        """
        found: list[tuple[_Wanted, list[tuple[Piece, Taken]]]] = []
        all_made: list[mx.array | dict[str, DevicePart]] = []
        for _, alike in groupby(enumerate(wanted), key=_likeness):
            run = [one for _, one in alike]
            made = [self._make(p, run[0], len(run)) for p in run[0].pieces]
            mx.async_eval(made)
            all_made += made
            for number, one in enumerate(run):
                shares = [Share(arrays, number, len(run)) for arrays in made]
                found.append((one, list(zip(one.pieces, shares, strict=True))))
        mx.eval(all_made)
        return found

    def _make(
        self, piece: Piece, first: _Wanted, num_blocks: int
    ) -> mx.array | dict[str, DevicePart]:
        """Return what is taken of an array of some blocks, not evaluated yet."""
        block, codec, _ = first
        made = _encode_layers(self._held, piece, block, codec, num_blocks)
        return made or _as_bits(_stack(_find_rows(self._held, piece, num_blocks)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The blocks one save will write, taken so that another thread can write them."""

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

    def take(
        self, blocks: Iterable[Block], codec_of_block: Callable[[Block], Codec]
    ) -> Snapshot:
        """Return the same with rows of some blocks as :meth:`LiveRows.take` does."""
        assert isinstance(self.rows, LiveRows)  # what is taken needs no taking
        return replace(self, rows=self.rows.take(blocks, codec_of_block))


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


@dataclass(frozen=True, slots=True)
class Root:
    """What all blocks descend from that a model has computed for one kind of cache."""

    # What the first block has as parent.
    hash: BlockHash
    # Of the model's fingerprint.
    digest: str
    layout: Layout
    # The layout as a JSON value.
    described: list[JSON]


def make_root(fingerprint: JSON, layout: Layout, last: Root | None = None) -> Root:
    """Return the root of a model and a layout; the last one, where it is that."""
    digest = digest_fields(fingerprint)
    if last is not None and (last.digest, last.layout) == (digest, layout):
        return last
    described = layout_to_json(layout)
    return Root(hash_root(digest, described), digest, layout, described)


def make_chain(
    fingerprint: JSON,
    prompt_cache: Sequence[Any],
    tokens: Sequence[int],
    block_size: int,
    split: Split | None = None,
    last: Root | None = None,
) -> tuple[Chain, Root]:
    """Return the chain of blocks that a prompt cache's tokens make, and its root.

    Args:
        fingerprint: Fields of what computed it.
        prompt_cache: mlx-lm's caches.
        tokens: Exactly the tokens whose rows are in them.
        block_size: Tokens of a block.
        split: Makes the blocks.
        last: A root that was made before, which is that of this chain as a rule.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``tokens``.
    """
    layout = caches.read_layout(prompt_cache, len(tokens))
    check_blocks(caches.flatten_caches(prompt_cache), block_size)
    if caches.read_provenance(prompt_cache).num_moved:
        # Under a root of their own nobody finds them who did not ask for such rows.
        fingerprint = mark_reanchored(fingerprint)
    root = make_root(fingerprint, layout, last)
    origin = Origin(fingerprint, root.described)
    blocks = split(root.hash) if split else split_tokens(root.hash, tokens, block_size)
    return Chain(root.hash, root.layout, origin, tuple(blocks)), root
