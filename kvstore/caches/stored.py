"""What a stored block has of each array, and whether it can be restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..codecs import CodecFamily, find_codec, lossless_twin
from ..codecs.base import Array, Codec, Parts, Rows
from ..codecs.dtypes import MLX_DTYPES, NUMPY_DTYPES
from ..errors import IntegrityError
from ..format.block import STATE_EXTRAS, StoredBlock, TensorSpec
from .kinds import kind_named
from .kinds.base import rows_of
from .kinds.turboquant import CODED, codec_of
from .layout import Group, Layout, RowSpec, group_layers


def stored_pieces(
    stored: StoredBlock, groups: Sequence[Group], own: CodecFamily
) -> Iterator[tuple[Codec, Piece]]:
    """Yield what a stored block has of each array, by its header, and with what codec.

    Args:
        stored: The block.
        groups: The layers of its rows.
        own: The codecs that its store alone has.

    Raises:
        CodecError: There is no such codec.
        IntegrityError: The block is not what it says it is, or its basis is missing.
    """
    codec = find_codec(stored.codec, own)
    if codec.is_lossless != stored.is_lossless:
        raise IntegrityError(f"{stored.codec} is not what the block says it is")
    twin = lossless_twin(codec)
    start, stop = stored.block.start, stored.block.start + len(stored.block.tokens)
    for number, group in enumerate(groups):
        found = rows_stored(stored.tensors, number, group, start, stop)
        pieces = [Piece(number, group, rows) for _, rows in found]
        for piece in join_pieces(pieces) if codec.is_joint else pieces:
            name = piece.rows.side
            if name in CODED and f"{number}.{name}.norms" in stored.tensors:
                yield Codec(codec_of(group.layout), codec.compressor), piece
            else:
                yield codec if name in CODABLE else twin, piece


def open_piece(
    codec: Codec, piece: Piece, stored: StoredBlock, data: memoryview
) -> Parts:
    """Return what a codec made of a piece of a block, decompressed and checked.

    Raises:
        CodecError: The codec cannot hold such rows.
        IntegrityError: The tensors are not what it makes of such rows.
    """
    prefix = f"{piece.number}.{piece.rows.side}."
    return codec.open(data, stored.begin, stored.tensors, piece.rows, prefix)


def decode_piece(
    codec: Codec, piece: Piece, stored: StoredBlock, data: memoryview
) -> Array:
    """Return the rows of a piece of a block, ``(L, H, T, D)``.

    Raises:
        CodecError: The codec cannot hold such rows.
        IntegrityError: The tensors are not what it makes of such rows.
    """
    found = np.empty(piece.rows.shape, NUMPY_DTYPES[piece.rows.dtype])
    parts = open_piece(codec, piece, stored, data)
    codec.array.decode_into(parts, piece.rows, list(found))
    return found


CODABLE = ("k", "v", "kv")
"""The arrays that a lossy codec may code; all others are stored lossless."""


def rows_stored(
    tensors: Mapping[str, TensorSpec], number: int, group: Group, start: int, stop: int
) -> Iterator[tuple[str, Rows]]:
    """Yield the arrays of a group that a stored block has, and which rows of them.

    Raises:
        IntegrityError: A tensor has no whole number of rows.
    """
    for name, spec in group.layout.rows:
        if spec.kind == "rows":
            first = max(start, spec.begin)
            last = stop if spec.end is None else min(stop, spec.end)
        else:
            num_rows = _count_rows(tensors, f"{number}.{name}.", group, spec)
            first, last = stop - num_rows, stop
            if first < start or (num_rows > 1 and spec.kind != "window"):
                raise IntegrityError(f"tensor {number}.{name} has {num_rows} rows")
        if first < last:
            yield name, rows_of(group, name, first, last)


def _count_rows(
    tensors: Mapping[str, TensorSpec], prefix: str, group: Group, spec: RowSpec
) -> int:
    """Return how many rows of a window or state a stored block has."""
    sizes = [
        tensor.end - tensor.begin if tensor.raw_nbytes is None else tensor.raw_nbytes
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    ]
    width = len(group.layers) * spec.num_heads * spec.head_dim
    num_rows, rest = divmod(sum(sizes), width * MLX_DTYPES[spec.dtype].size)
    if rest:
        raise IntegrityError(f"tensor {prefix} has no whole number of rows")
    return num_rows


def is_restorable(
    layout: Layout, blocks: Sequence[StoredBlock], num_tokens: int
) -> bool:
    """Whether every layer can be rebuilt at a position in the last of all blocks."""
    for number, group in enumerate(group_layers(layout)):
        kind = kind_named(group.layout.cache_class)
        begin = kind.window_begin(group.layout, num_tokens)
        for name, spec in group.layout.rows:
            prefix = f"{number}.{name}."
            if spec.kind == "state":
                last = blocks[-1]
                has_state = _count_rows(last.tensors, prefix, group, spec) == 1
                if not has_state or _stop(last) != num_tokens:
                    return False
            if spec.kind == "window" and not all(
                _stop(block) - _count_rows(block.tensors, prefix, group, spec)
                <= max(block.block.start, begin)
                for block in blocks
                if _stop(block) > begin
            ):
                return False
    return True


def _stop(stored: StoredBlock) -> int:
    return stored.block.start + len(stored.block.tokens)


def count_extras(pieces: Sequence[Piece]) -> int:
    """Return how much of windows and states there is of a block.

    More rows are those before too, in every layer; a state outweighs all rows.
    """
    num_rows = sum(p.rows.shape[2] for p in pieces if p.kind == "window")
    has_state = any(piece.kind == "state" for piece in pieces)
    return num_rows + has_state * STATE_EXTRAS


@dataclass(frozen=True, slots=True)
class Piece:
    """What one array of some layers has of a block."""

    # The number of the group of layers.
    number: int
    group: Group
    # Which rows of which array.
    rows: Rows

    @property
    def kind(self) -> str:
        """What the array holds, as in :class:`RowSpec`."""
        return self.group.spec(self.rows.side).kind


def join_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """Return keys and values of equal shape as one piece; all else as it is."""
    found: list[Piece] = []
    for piece in pieces:
        rows = piece.rows
        if found and rows.side == "v" and found[-1].rows == replace(rows, side="k"):
            layers, heads, tokens, dim = rows.shape
            both = replace(rows, side="kv", shape=(layers, 2 * heads, tokens, dim))
            found[-1] = replace(piece, rows=both)
        else:
            found.append(piece)
    return found
