"""The quantizer written as its definition reads: slow, plain, in double precision.

Tests hold every other implementation against this one. Nothing else uses it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from turboquant.codebook import decision_boundaries, lloyd_max_centroids
from turboquant.packing import plane_widths
from turboquant.rotation import rotation_signs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from turboquant.rotation import Rotation


def rotate(x: NDArray[np.floating], rotation: Rotation) -> NDArray[np.float64]:
    """Return rotated vectors, shape ``(..., D)``."""
    return (x.astype(np.float64) * rotation_signs(rotation)) @ hadamard(rotation)


def unrotate(x: NDArray[np.floating], rotation: Rotation) -> NDArray[np.float64]:
    """Undo `rotate`."""
    return (x.astype(np.float64) @ hadamard(rotation)) * rotation_signs(rotation)


@lru_cache
def hadamard(rotation: Rotation) -> NDArray[np.float64]:
    """Return the block-diagonal orthonormal Walsh-Hadamard matrix, shape ``(D, D)``."""
    matrix = np.zeros((rotation.dim, rotation.dim))
    start = 0
    for size in rotation.block_sizes:
        for row in range(size):
            for column in range(size):
                sign = -1 if (row & column).bit_count() % 2 else 1
                matrix[start + row, start + column] = sign / np.sqrt(size)
        start += size
    return matrix


def quantize(
    x: NDArray[np.floating], bits: int, rotation: Rotation
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return centroid indices, shape ``(..., D)``, and norms, shape ``(...,)``."""
    indices = np.zeros(x.shape, np.uint8)
    norms = np.zeros(x.shape[:-1])
    for at in np.ndindex(norms.shape):
        indices[at], norms[at] = _quantize_vector(x[at], bits, rotation)
    return indices, norms


def dequantize(
    indices: NDArray[np.uint8],
    norms: NDArray[np.floating],
    bits: int,
    rotation: Rotation,
) -> NDArray[np.float64]:
    """Return vectors, shape ``(..., D)``, not clamped to any dtype."""
    levels = np.array(lloyd_max_centroids(bits)) / np.sqrt(rotation.dim)
    norms = np.where(np.isfinite(norms), norms, np.nan)
    return unrotate(levels[indices], rotation) * norms[..., None]


def pack(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return packed codes, shape ``(..., D * bits // 8)``."""
    dim = indices.shape[-1]
    planes = []
    shift = bits
    for width in plane_widths(bits):
        shift -= width
        plane = np.zeros((*indices.shape[:-1], dim * width // 8), np.uint8)
        for coordinate in range(dim):
            place, byte = divmod(coordinate, dim * width // 8)
            symbols = _symbol_table(bits)[indices[..., coordinate]]
            field = (symbols >> shift) & (2**width - 1)
            plane[..., byte] |= (field << (place * width)).astype(np.uint8)
        planes.append(plane)
    return np.concatenate(planes, axis=-1)


def unpack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Undo `pack`."""
    dim = codes.shape[-1] // bits * 8
    symbols = np.zeros((*codes.shape[:-1], dim), np.int64)
    start = 0
    for width in plane_widths(bits):
        for coordinate in range(dim):
            place, byte = divmod(coordinate, dim * width // 8)
            field = (codes[..., start + byte] >> (place * width)) & (2**width - 1)
            symbols[..., coordinate] = symbols[..., coordinate] << width | field
        start += dim * width // 8
    return np.argsort(_symbol_table(bits))[symbols].astype(np.uint8)


def _quantize_vector(
    x: NDArray[np.floating], bits: int, rotation: Rotation
) -> tuple[NDArray[np.uint8], float]:
    with np.errstate(over="ignore"):
        vector = x.astype(np.float32).astype(np.float64)
    is_finite = bool(np.isfinite(vector).all())
    if not is_finite or np.abs(vector).max() < 2.0**-126:
        vector = np.zeros(rotation.dim)
    rotated = rotate(vector, rotation)
    length = np.linalg.norm(rotated)
    spread = rotated * np.sqrt(rotation.dim) / (length if length > 0 else 1)
    indices = np.searchsorted(decision_boundaries(bits), spread, side="right")
    direction = np.array(lloyd_max_centroids(bits))[indices] / np.sqrt(rotation.dim)
    norm = rotated @ direction / (direction @ direction)
    norm = min(norm, float(np.finfo(np.float32).max))
    return indices.astype(np.uint8), norm if is_finite else np.nan


def _symbol_table(bits: int) -> NDArray[np.int64]:
    """Return the symbol of each centroid index: for odd widths, magnitude and sign."""
    num_levels = 2**bits
    if bits == 1 or bits % 2 == 0:
        return np.arange(num_levels)
    half = num_levels // 2
    below = [2 * (half - 1 - index) + 1 for index in range(half)]
    above = [2 * (index - half) for index in range(half, num_levels)]
    return np.array(below + above)
