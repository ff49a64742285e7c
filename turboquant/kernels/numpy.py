"""The kernels in NumPy, without a compiler: what the others are held against.

All of it is elementwise IEEE arithmetic in a fixed order, on columns of vectors: a
vector gives the same bytes on every machine and among any neighbours, and codes decode
to the same numbers. No BLAS is called, whose threads spin beside a busy core. The work
is done in pieces that stay in a core's cache.

Knows planes and buffers; knows nothing of caches, files or blocks of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turboquant.codebook import decision_boundaries, lloyd_max_centroids
from turboquant.packing import (
    indices_to_symbols,
    plane_fields,
    plane_widths,
    split_planes,
    symbols_to_indices,
)
from turboquant.rotation import (
    LARGE,
    RESCALE,
    SMALL,
    TINY,
    Rotation,
    rotation_signs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_PIECE_FLOATS = 49152
# Up to so many bits, comparing with every boundary is faster than a look-up.
_MAX_COMPARED_BITS = 4
# Cells of the look-up table of boundaries: each is narrower than two of those at 8 bits
# lie apart, and together they reach beyond the outermost.
_NUM_CELLS = 2048
_CELLS_PER_UNIT = 128

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT16_MAX = float(np.finfo(np.float16).max)
# By dtype of a decoding buffer; uint16 holds bfloat16 bits.
_LARGEST = {
    np.dtype(np.float32): _FLOAT32_MAX,
    np.dtype(np.float16): _FLOAT16_MAX,
    np.dtype(np.uint16): 3.3895313892515355e38,
}


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """What `encode_block` makes of rows."""

    # Widest first, each of shape (L, H, T, D * width // 8).
    planes: list[Bytes]
    # Shape (L, H, T).
    norms: Floats
    # What was taken off the rows, shape (L, H, D), or None.
    mean: NDArray[np.float16] | None


class NumpyKernels:
    """The kernels that work everywhere."""

    name = "numpy"

    def encode_block(
        self,
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        is_centred: bool,
    ) -> BlockCodes:
        """Quantize the rows of some layers."""
        check_encode(layers, bits, rotation)
        shape = (len(layers), *layers[0].shape[:2])
        codes = np.empty((*shape, rotation.dim * bits // 8), np.uint8)
        norms = np.empty(shape, np.float32)
        mean = np.empty((*shape[:2], rotation.dim), np.float16) if is_centred else None
        for number, layer in enumerate(layers):
            wide = _to_float32(layer)
            if mean is not None:
                mean[number] = _mean(wide)
                with np.errstate(over="ignore", invalid="ignore"):
                    wide -= mean[number][:, None].astype(np.float32)
            codes[number], norms[number] = encode(wide, bits, rotation)
        return BlockCodes(list(split_planes(codes, bits)), norms, mean)

    def decode_block(
        self,
        planes: Sequence[NDArray[Any]],
        norms: Floats,
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        mean: NDArray[Any] | None = None,
    ) -> None:
        """Decode rows into one buffer for each layer."""
        check_decode(planes, norms, layers, bits, rotation, mean)
        for number, layer in enumerate(layers):
            decode_into(
                [plane[number] for plane in planes],
                norms[number],
                layer,
                bits,
                rotation,
                mean=None if mean is None else mean[number],
            )

    def split_bytes(self, layers: Sequence[NDArray[Any]]) -> list[Bytes]:
        """Return the bytes of some layers' numbers, plane by plane."""
        x = np.stack(layers)
        octets = x.view(np.uint8).reshape(*x.shape, x.itemsize)
        return [np.ascontiguousarray(octets[..., i]) for i in range(x.itemsize)]

    def join_bytes(
        self, planes: Sequence[NDArray[Any]], layers: Sequence[NDArray[Any]]
    ) -> None:
        """Write numbers whose bytes lie in planes."""
        for number, layer in enumerate(layers):
            octets = np.empty((*layer.shape, len(planes)), np.uint8)
            for i, plane in enumerate(planes):
                octets[..., i] = plane[number, :, : layer.shape[1]]
            layer[...] = octets.view(layer.dtype)[..., 0]


def encode(x: NDArray[Any], bits: int, rotation: Rotation) -> tuple[Bytes, Floats]:
    """Quantize vectors to ``bits`` bits per coordinate, as `quantize_polar` does.

    Args:
        x: Vectors, shape ``(..., D)``, any float dtype of NumPy; taken as ``float32``.
        bits: Bits per coordinate, 1 to 8.
        rotation: A rotation of vectors of length ``D``.

    Returns:
        Packed codes, shape ``(..., D * bits // 8)``, ``uint8``, and norms, shape
        ``(...,)``, ``float32``; the same bytes for the same vector, always.

    Raises:
        ValueError: ``bits`` is not 1 to 8, ``D`` does not fit ``rotation``, or ``x`` is
            not of a float dtype.
    """
    if x.ndim == 0 or x.shape[-1] != rotation.dim:
        raise ValueError(f"the rotation is of dim {rotation.dim}: got shape {x.shape}")
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"vectors must be of a float dtype: got {x.dtype}")
    plane_widths(bits)
    vectors = x.reshape(-1, rotation.dim)
    codes = np.empty((len(vectors), rotation.dim * bits // 8), np.uint8)
    norms = np.empty(len(vectors), np.float32)
    # In pieces that stay in a core's cache: a transform passes over them log2(D) times.
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(len(vectors), _PIECE_FLOATS // rotation.dim):
            columns, scale = _scaled_columns(vectors[piece])
            indices, norm = _quantize_columns(columns, bits, rotation)
            codes[piece] = _pack_columns(indices, bits).T
            np.minimum(norm / scale, _FLOAT32_MAX, out=norms[piece])
    shape = x.shape[:-1]
    return codes.reshape(*shape, codes.shape[1]), norms.reshape(shape)


def decode_into(
    planes: Sequence[NDArray[Any]],
    norms: Floats,
    out: NDArray[Any],
    bits: int,
    rotation: Rotation,
    *,
    mean: NDArray[Any] | None = None,
) -> None:
    """Decode vectors of several heads into a buffer, as `dequantize_polar` does.

    Args:
        planes: The planes of the codes (`split_planes`), widest first, each of shape
            ``(H, T, D * width // 8)``, ``uint8``.
        norms: Norms, shape ``(H, T)``, ``float32``.
        out: Buffer to fill, shape ``(H, T, D)``, of any strides, ``float32``,
            ``float16``, or ``uint16``, which is filled with the bits of ``bfloat16``.
        bits: Bits per coordinate, 1 to 8.
        rotation: The rotation the vectors were quantized with.
        mean: What is added to every vector of a head, shape ``(H, D)``, any float
            dtype; a coordinate of it that is not finite makes its sums NaN.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or a shape, a dtype or ``rotation`` does not
            fit.
    """
    check_decode(
        [plane[None] for plane in planes], norms[None], [out], bits, rotation,
        None if mean is None else mean[None],
    )  # fmt: skip
    limit = _LARGEST[out.dtype]
    norms = finite_or_nan(norms)
    mean = None if mean is None else finite_or_nan(mean)
    # Clipping takes a pass over all rows, and hardly any block has numbers that large.
    if _bound(norms, mean, bits) < limit:
        limit = math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        for head, tokens in _head_pieces(*out.shape):
            columns = _decode_columns(
                [plane[head, tokens] for plane in planes], bits, rotation
            )
            columns *= norms[head, tokens]
            if mean is not None:
                columns += mean[head][:, None]
            if limit < math.inf:
                np.clip(columns, -limit, limit, out=columns)
            _convert(columns, out[head, tokens].T)


def check_encode(layers: Sequence[NDArray[Any]], bits: int, rotation: Rotation) -> None:
    """Refuse rows that `encode_block` cannot take.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or a shape, a dtype or ``rotation`` does not
            fit.
    """
    plane_widths(bits)
    _check_layers(layers, rotation)


def check_decode(
    planes: Sequence[NDArray[Any]],
    norms: Floats,
    layers: Sequence[NDArray[Any]],
    bits: int,
    rotation: Rotation,
    mean: NDArray[Any] | None,
) -> None:
    """Refuse what `decode_block` cannot decode.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or a shape, a dtype or ``rotation`` does not
            fit.
    """
    widths = plane_widths(bits)
    shape = _check_layers(layers, rotation)
    shapes = [(*shape, rotation.dim * width // 8) for width in widths]
    if [plane.shape for plane in planes] != shapes:
        raise ValueError(f"planes of {bits} bits must have the shapes {shapes}")
    if any(plane.dtype != np.uint8 for plane in planes):
        raise ValueError("planes must be of dtype uint8")
    if norms.shape != shape:
        raise ValueError(f"norms must have the shape {shape}: {norms.shape}")
    if mean is not None and mean.shape != (*shape[:2], rotation.dim):
        raise ValueError(f"mean of {mean.shape} does not fit {shape}")


def _check_layers(
    layers: Sequence[NDArray[Any]], rotation: Rotation
) -> tuple[int, int, int]:
    """Return how many layers, heads and tokens there are."""
    kinds = {(layer.dtype, layer.shape) for layer in layers}
    if len(kinds) != 1:
        raise ValueError("layers must be of one dtype and one shape, and not none")
    dtype, shape = kinds.pop()
    if len(shape) != 3 or shape[2] != rotation.dim or dtype not in _LARGEST:
        raise ValueError(
            f"cannot encode or decode rows of {dtype} and shape {shape} with a rotation"
            f" of dim {rotation.dim}"
        )
    return len(layers), shape[0], shape[1]


def _to_float32(x: NDArray[Any]) -> Floats:
    """Return numbers, or the bits of bfloat16 in uint16, as a new array."""
    if x.dtype != np.uint16:
        return np.array(x, np.float32, order="C")
    wide = np.array(x, np.uint32, order="C")
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _mean(x: Floats) -> NDArray[np.float16]:
    """Return each head's mean over the tokens: ``(H, T, D)`` to ``(H, D)``."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Row by row, since rows are contiguous.
        return round_mean(np.add.reduce(x, axis=1), x.shape[1])


def round_mean(sums: Floats, num_tokens: int) -> NDArray[np.float16]:
    """Return as float16 the means that have these sums."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (sums.astype(np.float64) / max(1, num_tokens)).astype(np.float32)
    # A coordinate with NaN or an infinity in it is not centred.
    mean = np.where(np.isfinite(mean), mean, np.float32(0))
    return np.clip(mean, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


def _pieces(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _scaled_columns(vectors: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return vectors as columns that are safe to square, and each one's factor."""
    columns = np.array(vectors.T, np.float32, order="C")
    peak = np.abs(columns).max(axis=0)
    scale = np.ones_like(peak)
    # Powers of two change no bit of a mantissa, so that the codes stay the same.
    scale[peak < SMALL] = RESCALE
    scale[peak >= LARGE] = 1 / RESCALE
    is_finite = np.isfinite(peak)
    columns[:, ~is_finite | (peak < TINY)] = 0
    if (scale != 1).any():
        columns *= scale
    # Its norm becomes NaN by this, and with it all of the vector that is decoded.
    scale[~is_finite] = np.nan
    return columns, scale


def _quantize_columns(
    columns: Floats, bits: int, rotation: Rotation
) -> tuple[Bytes, Floats]:
    """Return centroid indices, shape ``(D, n)``, and norms, shape ``(n,)``."""
    root = np.float32(math.sqrt(rotation.dim))
    rotated = _rotate_columns(columns, rotation)
    length = np.sqrt(_sum_rows(rotated * rotated))
    # A vector of zeros has no direction: the centroids nearest to zero get norm 0.
    length[length == 0] = 1
    stretch: Floats = np.divide(root, length)
    indices = _nearest_indices(rotated * stretch, bits)
    rounded = np.take(index_table(bits), indices, mode="wrap")
    # Least squares: of all multiples of the rounded direction, the nearest to the
    # vector.
    norms = _sum_rows(rotated * rounded)
    np.multiply(rounded, rounded, out=rounded)
    return indices, norms / _sum_rows(rounded) * root


def _rotate_columns(columns: Floats, rotation: Rotation) -> Floats:
    columns *= rotation_signs(rotation)[:, None]
    rotated = _transform_columns(columns, rotation)
    rotated *= scale_table(rotation)[:, None]
    return rotated


def _transform_columns(columns: Floats, rotation: Rotation) -> Floats:
    """Transform each block, not yet orthonormal; ``columns`` is overwritten."""
    blocks = [_hadamard_columns(columns[block]) for block in rotation.block_slices]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _hadamard_columns(columns: Floats) -> Floats:
    """Return the transform, not yet orthonormal; ``columns`` is overwritten."""
    source, target = columns, np.empty_like(columns)
    half = len(columns) // 2
    # Two buffers in turn. The order of the sums is part of the format: another order
    # rounds otherwise, and compiled kernels must give the same bytes.
    while half:
        pairs = source.reshape(-1, 2, half * columns.shape[1])
        sums = target.reshape(pairs.shape)
        np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        source, target = target, source
        half //= 2
    return source


def _sum_rows(rows: Floats) -> Floats:
    """Return the sum of all rows, by folding them in place."""
    # np.sum picks its order by the shape and the machine.
    num_rows = len(rows)
    while num_rows > 1:
        half = num_rows // 2
        rows[:half] += rows[num_rows - half : num_rows]
        num_rows -= half
    first: Floats = rows[0]
    return first


def _nearest_indices(spread: Floats, bits: int) -> Bytes:
    """Count the boundaries that are not above each number."""
    if bits > _MAX_COMPARED_BITS:
        return _look_up_indices(spread, bits)
    indices = np.zeros(spread.shape, np.uint8)
    is_above = np.empty(spread.shape, np.bool_)
    for boundary in _boundaries(bits):
        np.greater_equal(spread, boundary, out=is_above)
        indices += is_above.view(np.uint8)
    return indices


def _look_up_indices(spread: Floats, bits: int) -> Bytes:
    lowest, next_boundary = _cell_tables(bits)
    cells = spread * np.float32(_CELLS_PER_UNIT)
    cells += np.float32(_NUM_CELLS // 2)
    np.clip(cells, 0, _NUM_CELLS - 1, out=cells)
    cell = cells.astype(np.intp)
    # A cell holds at most one boundary, so one comparison puts the index right.
    indices = np.take(lowest, cell, mode="wrap")
    is_above = spread >= np.take(next_boundary, cell, mode="wrap")
    indices += is_above.view(np.uint8)
    return indices


def _pack_columns(indices: Bytes, bits: int) -> Bytes:
    symbols = indices_to_symbols(indices, bits)
    planes = [
        _pack_plane((symbols >> shift) & (2**width - 1), width)
        for width, shift in plane_fields(bits)
    ]
    return planes[0] if len(planes) == 1 else np.concatenate(planes)


def _pack_plane(fields: Bytes, width: int) -> Bytes:
    parts = fields.reshape(8 // width, -1, fields.shape[1])
    plane: Bytes = parts[0]
    for place in range(1, len(parts)):
        plane |= parts[place] << np.uint8(place * width)
    return plane


def finite_or_nan(x: NDArray[np.floating]) -> Floats:
    """Return a float32 copy, with one NaN for all that is not finite."""
    # One for all: the rounding to bfloat16 would carry another's payload over.
    return np.where(np.isfinite(x), x, np.nan).astype(np.float32, order="C")


def _bound(norms: Floats, mean: Floats | None, bits: int) -> float:
    """Return what no decoded coordinate exceeds."""
    bound = _peak(norms) * lloyd_max_centroids(bits)[-1]
    if mean is not None:
        bound += _peak(mean)
    # A little more, since sums are rounded on the way.
    return 1.001 * bound


def _peak(x: Floats) -> float:
    return float(np.fmax.reduce(np.abs(x), axis=None, initial=0))


def _head_pieces(
    num_heads: int, num_tokens: int, dim: int
) -> Iterator[tuple[int, slice]]:
    for head in range(num_heads):
        for tokens in _pieces(num_tokens, _PIECE_FLOATS // dim):
            yield head, tokens


def _decode_columns(
    planes: Sequence[NDArray[Any]], bits: int, rotation: Rotation
) -> Floats:
    """Return vectors of norm about 1, shape ``(D, T)``, from planes of ``(T, …)``."""
    symbols = np.zeros((rotation.dim, len(planes[0])), np.uint8)
    for plane, (width, shift) in zip(planes, plane_fields(bits), strict=True):
        columns = np.ascontiguousarray(plane.T)
        # Coordinates ``D/n`` apart share a byte, so that each of its fields is a run of
        # rows.
        runs = symbols.reshape(8 // width, *columns.shape)
        for place, run in enumerate(runs):
            field = (columns >> np.uint8(place * width)) & np.uint8(2**width - 1)
            run |= field << np.uint8(shift)
    levels = np.take(symbol_table(bits), symbols, mode="clip")
    directions = _transform_columns(levels, rotation)
    directions *= unscale_table(rotation)[:, None]
    return directions


def _convert(sums: Floats, target: NDArray[Any]) -> None:
    if target.dtype != np.uint16:
        target[...] = sums
        return
    # To the nearest, ties to even; no NaN here has a payload that could carry over.
    bits = sums.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    target[...] = rounded


@lru_cache
def index_table(bits: int) -> Floats:
    """Return the level of each index, shape ``(2**bits,)``."""
    return np.array(lloyd_max_centroids(bits), np.float32)


@lru_cache
def _boundaries(bits: int) -> Floats:
    return np.array(decision_boundaries(bits), np.float32)


@lru_cache
def _cell_tables(bits: int) -> tuple[Bytes, Floats]:
    """Return each cell's lowest index, and the boundary where the next one begins."""
    # Begun early by a quarter, since the sum that picks a cell is rounded.
    cells = np.arange(_NUM_CELLS) - _NUM_CELLS // 2 - 0.25
    boundaries = _boundaries(bits)
    lowest = np.searchsorted(boundaries, cells / _CELLS_PER_UNIT, side="right")
    return lowest.astype(np.uint8), np.append(boundaries, np.float32(np.inf))[lowest]


@lru_cache
def scale_table(rotation: Rotation) -> Floats:
    """Return what makes each coordinate of a transform orthonormal, shape ``(D,)``."""
    scales: Floats = (1 / np.sqrt(_sizes(rotation))).astype(np.float32)
    return scales


@lru_cache
def unscale_table(rotation: Rotation) -> Floats:
    """Return what each coordinate of transformed levels is multiplied by, ``(D,)``.

    It undoes the signs, makes the transform orthonormal and the levels of length 1.
    """
    factors = 1 / np.sqrt(_sizes(rotation) * rotation.dim)
    signed: Floats = (factors * rotation_signs(rotation)).astype(np.float32)
    return signed


def _sizes(rotation: Rotation) -> NDArray[np.int64]:
    """Return the size of the block that each coordinate is in."""
    return np.repeat(rotation.block_sizes, rotation.block_sizes)


@lru_cache
def symbol_table(bits: int) -> Floats:
    """Return the level of each symbol, shape ``(2**bits,)``."""
    symbols = np.arange(2**bits, dtype=np.uint8)
    levels: Floats = index_table(bits)[symbols_to_indices(symbols, bits)]
    return levels
