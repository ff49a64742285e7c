"""How far the rows that a lossy codec stored are from those it was given, by layer.

It is measured on a sample: one token in 64, of one block in 16. Where rows are encoded
before they are handed on, their sample goes with the codes. Where a layer has NaN or
infinity, the block has no errors at all: a reader would take those of the other layers
for the errors of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from turboquant.kernels import gpu

from ..codecs.base import Array, Codec, Layers, Parts
from ..codecs.floats import Floats, widen
from ..codecs.on_device import DevicePart
from ..format.block import Block, LayerError, Part
from ..format.documents import is_amount
from .stored import Piece

SAMPLE = "sample"
"""Names the sample among the parts of codes; it is no part, and never stored."""
_EVERY_BLOCK = 16
# Not the first: the first rows of a prompt are kept as they are.
_TOKENS = slice(7, None, 64)


def is_measured(block: Block, codec: Codec) -> bool:
    """Whether errors are measured in a block that a codec encodes."""
    period = _EVERY_BLOCK * len(block.tokens)
    return not codec.is_lossless and block.start % period == 0


def sample_layers(layers: Layers) -> Array:
    """Return the rows of some tokens of a block, ``(L, H, T / 64, D)``."""
    return np.stack([x[:, _TOKENS] for x in layers])


def sample_on_device(x: gpu.Buffers) -> DevicePart:
    """Return such rows of several blocks, copied by a GPU."""
    return DevicePart(gpu.pick(x, range(x.num_rows)[_TOKENS]))


def errors_of(
    codec: Codec, piece: Piece, layers: Layers | Parts, parts: Sequence[Part]
) -> Iterator[LayerError]:
    """Yield the errors in each layer of a piece of a block.

    Of codes without a sample nothing is known. The error of broken rows is infinite.

    Args:
        codec: What encoded it.
        piece: What it is.
        layers: Its rows, or codes of them.
        parts: What the codec made of them.
    """
    if codec.is_lossless or (exact := _sample_of(layers)) is None:
        return
    rows = piece.rows
    found = codec.decode_parts(parts, rows, f"{piece.number}.{rows.side}.")
    pairs = (widen(x, rows.dtype) for x in (exact, found[:, :, _TOKENS]))
    # Of both sides, the heads of the keys come first.
    halves = (np.split(x, len(rows.side), axis=1) for x in pairs)
    for side, *both in zip(rows.side, *halves, strict=True):
        for layer, *pair in zip(piece.group.layers, *both, strict=True):
            yield LayerError(layer, side, _relative_error(*pair))


def known_errors(errors: Iterable[LayerError]) -> tuple[LayerError, ...]:
    """Return the errors of a block in order, or nothing where one is too large."""
    found = tuple(sorted(errors))
    return found if all(is_amount(one.error) for one in found) else ()


def _sample_of(layers: Layers | Parts) -> Array | None:
    return layers.get(SAMPLE) if isinstance(layers, Mapping) else sample_layers(layers)


def _relative_error(exact: Floats, found: Floats) -> float:
    """Return the root of the mean square of errors over that of the rows."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = _sum_of_squares(exact)
        error = _sum_of_squares(found - exact)
    if not math.isfinite(size + error) or (error and not size):
        return math.inf
    # Added up in numbers of 64 bits, machines of another order say the same.
    return float(f"{math.sqrt(error / size) if error else 0.0:.3g}")


def _sum_of_squares(x: Floats) -> float:
    return float(np.square(x, dtype=np.float64).sum())
