"""The quantizer on the CPU, in NumPy, without a compiler.

Encoding does nothing but elementwise IEEE arithmetic in a fixed order, on columns of
vectors: a vector gives the same bytes on every machine and among any neighbours.
Decoding is a table look-up and a matrix product, whose last place may differ between
machines. Both work in pieces that stay in a core's cache.

Knows planes and buffers; knows nothing of caches, files or blocks of tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turboquant.codebook import decision_boundaries, lloyd_max_centroids
from turboquant.packing import (
    indices_to_symbols,
    plane_fields,
    plane_widths,
    symbols_to_indices,
)
from turboquant.quantizer import LARGE, RESCALE, SMALL, TINY
from turboquant.rotation import Rotation, rotation_matrix, rotation_signs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_PIECE_FLOATS = 49152
_MAX_PRODUCT = 2**18
_MIN_ROWS = 8
# Up to so many bits, comparing with every boundary is faster than a look-up.
_MAX_COMPARED_BITS = 4
# Cells of the look-up table of boundaries: each is narrower than two of those at 8 bits
# lie apart, and together they reach beyond the outermost.
_NUM_CELLS = 2048
_CELLS_PER_UNIT = 128

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# By dtype of a decoding buffer; uint16 holds bfloat16 bits.
_LARGEST = {
    np.dtype(np.float32): _FLOAT32_MAX,
    np.dtype(np.float16): float(np.finfo(np.float16).max),
    np.dtype(np.uint16): 3.3895313892515355e38,
}


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
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(len(vectors), _PIECE_FLOATS // rotation.dim):
            columns, scale = _scaled_columns(vectors[piece])
            indices, norm = _quantize_columns(columns, bits, rotation)
            codes[piece] = _pack_columns(indices, bits).T
            np.minimum(norm / scale, _FLOAT32_MAX, out=norms[piece])
    shape = x.shape[:-1]
    return codes.reshape(*shape, codes.shape[1]), norms.reshape(shape)


def decode_into(
    planes: Sequence[Bytes],
    norms: Floats,
    out: NDArray[Any],
    bits: int,
    rotation: Rotation,
    *,
    mean: NDArray[np.floating] | None = None,
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
    _check_decode(planes, norms, out, bits, rotation, mean)
    limit = _LARGEST[out.dtype]
    norms = _finite_or_nan(norms)[..., None]
    mean = None if mean is None else _finite_or_nan(mean)[:, None, :]
    if _bound(norms, mean, bits) < limit:
        limit = math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        for heads, tokens in _head_pieces(*out.shape):
            target = out[heads, tokens]
            directions = _directions(
                [plane[heads, tokens] for plane in planes], bits, rotation
            )
            sums = target if target.dtype == np.float32 else directions
            np.multiply(directions, norms[heads, tokens], out=sums)
            if mean is not None:
                sums += mean[heads]
            if limit < math.inf:
                np.clip(sums, -limit, limit, out=sums)
            if sums is not target:
                _convert(sums, target)


def _pieces(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _scaled_columns(vectors: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return vectors as columns that are safe to square, and each one's factor."""
    columns = np.array(vectors.T, np.float32, order="C")
    peak = np.abs(columns).max(axis=0)
    scale = np.ones_like(peak)
    scale[peak < SMALL] = RESCALE
    scale[peak >= LARGE] = 1 / RESCALE
    is_finite = np.isfinite(peak)
    columns[:, ~is_finite | (peak < TINY)] = 0
    if (scale != 1).any():
        columns *= scale
    scale[~is_finite] = np.nan
    return columns, scale


def _quantize_columns(
    columns: Floats, bits: int, rotation: Rotation
) -> tuple[Bytes, Floats]:
    """Return centroid indices, shape ``(D, n)``, and norms, shape ``(n,)``."""
    root = np.float32(math.sqrt(rotation.dim))
    rotated = _rotate_columns(columns, rotation)
    length = np.sqrt(_sum_rows(rotated * rotated))
    length[length == 0] = 1
    stretch: Floats = np.divide(root, length)
    indices = _nearest_indices(rotated * stretch, bits)
    rounded = np.take(_levels(bits), indices, mode="wrap")
    norms = _sum_rows(rotated * rounded)
    np.multiply(rounded, rounded, out=rounded)
    return indices, norms / _sum_rows(rounded) * root


def _rotate_columns(columns: Floats, rotation: Rotation) -> Floats:
    columns *= rotation_signs(rotation)[:, None]
    blocks = [_hadamard_columns(columns[block]) for block in rotation.block_slices]
    for block, size in zip(blocks, rotation.block_sizes, strict=True):
        block *= np.float32(1 / math.sqrt(size))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _hadamard_columns(columns: Floats) -> Floats:
    """Return the transform, not yet orthonormal; ``columns`` is overwritten."""
    source, target = columns, np.empty_like(columns)
    half = len(columns) // 2
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


def _check_decode(
    planes: Sequence[Bytes],
    norms: Floats,
    out: NDArray[Any],
    bits: int,
    rotation: Rotation,
    mean: NDArray[np.floating] | None,
) -> None:
    widths = plane_widths(bits)
    if out.ndim != 3 or out.shape[-1] != rotation.dim or out.dtype not in _LARGEST:
        raise ValueError(f"cannot decode into {out.dtype} of shape {out.shape}")
    shapes = [(*out.shape[:2], rotation.dim * width // 8) for width in widths]
    if [plane.shape for plane in planes] != shapes:
        raise ValueError(f"planes of {bits} bits must have the shapes {shapes}")
    if any(plane.dtype != np.uint8 for plane in planes):
        raise ValueError("planes must be of dtype uint8")
    if norms.shape != out.shape[:2]:
        raise ValueError(f"norms must have the shape {out.shape[:2]}: {norms.shape}")
    if mean is not None and mean.shape != (out.shape[0], rotation.dim):
        raise ValueError(f"mean of {mean.shape} does not fit {out.shape}")


def _finite_or_nan(x: NDArray[np.floating]) -> Floats:
    # One NaN for all: the rounding to bfloat16 would carry another's payload over.
    return np.where(np.isfinite(x), x, np.nan).astype(np.float32)


def _bound(norms: Floats, mean: Floats | None, bits: int) -> float:
    """Return what no decoded coordinate exceeds."""
    bound = _peak(norms) * lloyd_max_centroids(bits)[-1]
    if mean is not None:
        bound += _peak(mean)
    return 1.001 * bound


def _peak(x: Floats) -> float:
    return float(np.fmax.reduce(np.abs(x), axis=None, initial=0))


def _head_pieces(
    num_heads: int, num_tokens: int, dim: int
) -> Iterator[tuple[slice, slice]]:
    num_vectors = max(1, _PIECE_FLOATS // dim)
    for heads in _pieces(num_heads, num_vectors // max(1, num_tokens)):
        for tokens in _pieces(num_tokens, num_vectors):
            yield heads, tokens


def _directions(planes: Sequence[Bytes], bits: int, rotation: Rotation) -> Floats:
    """Return decoded vectors of norm about 1, shape ``(H, T, D)``."""
    table = _level_table(bits)
    levels = np.take(table, _table_indices(planes, bits), axis=0, mode="wrap")
    num_vectors = planes[0].shape[0] * planes[0].shape[1]
    rows = _rows_per_product(num_vectors, rotation.dim)
    directions: Floats = np.matmul(
        levels.reshape(-1, rows, rotation.dim),
        _unrotation(rotation, plane_widths(bits)[0]),
    )
    return directions.reshape(*planes[0].shape[:2], rotation.dim)


def _rows_per_product(num_vectors: int, dim: int) -> int:
    """Return how many vectors to multiply at once: a divisor of ``num_vectors``."""
    # OpenBLAS starts its threads at 2**18 multiplications, and they spin: beside busy
    # cores a call was seen to take 50 times longer. Too few rows are slow as well.
    most = max(1, (_MAX_PRODUCT - 1) // dim**2)
    rows = math.gcd(num_vectors, 1 << (most.bit_length() - 1))
    return rows if rows >= _MIN_ROWS else num_vectors


def _table_indices(planes: Sequence[Bytes], bits: int) -> NDArray[Any]:
    """Join each byte of the widest plane with the other planes' fields beside it."""
    widest, *others = planes
    if not others:
        return widest
    indices = widest.astype(np.uint16)
    shift = 8
    for plane, width in zip(others, plane_widths(bits)[1:], strict=True):
        runs = indices.reshape(*plane.shape[:2], -1, plane.shape[2])
        for run, beside in enumerate(_fields_beside(plane_widths(bits)[0], width)):
            runs[:, :, run] |= np.take(beside << shift, plane, mode="wrap")
        shift += 8 // plane_widths(bits)[0] * width
    return indices


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
def _levels(bits: int) -> Floats:
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
def _unrotation(rotation: Rotation, width: int) -> Floats:
    """Return the inverse rotation for coordinates in the order of a plane's fields."""
    order = np.arange(rotation.dim).reshape(8 // width, -1).T.ravel()
    inverse = rotation_matrix(rotation).T[order].astype(np.float64)
    return (inverse / math.sqrt(rotation.dim)).astype(np.float32)


@lru_cache
def _level_table(bits: int) -> Floats:
    """Return the levels of the coordinates of each value of `_table_indices`."""
    widths = plane_widths(bits)
    num_fields = 8 // widths[0]
    keys = np.arange(2 ** (num_fields * bits))
    symbols = np.zeros((len(keys), num_fields), np.int64)
    for width in widths:
        for field in range(num_fields):
            value = (keys >> (field * width)) & (2**width - 1)
            symbols[:, field] = symbols[:, field] << width | value
        keys = keys >> (num_fields * width)
    indices = symbols_to_indices(symbols.astype(np.uint8), bits)
    table: Floats = _levels(bits)[indices]
    return table


@lru_cache
def _fields_beside(widest: int, width: int) -> NDArray[np.uint16]:
    """Return, by run of the widest plane and byte of another, the fields they share.

    A byte of the other plane covers as many bytes of the widest as it is narrower, one
    in each run; their coordinates are every so-many-th of its own.
    """
    num_runs = widest // width
    values = np.arange(256)
    beside = np.zeros((num_runs, 256), np.uint16)
    for run in range(num_runs):
        for field in range(8 // widest):
            value = (values >> ((run + field * num_runs) * width)) & (2**width - 1)
            beside[run] |= (value << (field * width)).astype(np.uint16)
    return beside
