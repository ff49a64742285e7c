"""Vectors to codes and norms, and back, on MLX arrays of any device.

A vector becomes its length and a rotated direction, whose coordinates are close to
N(0, 1/D) and are rounded, each by itself, to the nearest Lloyd-Max centroid. The stored
norm is not the length: it is the factor that brings the rounded direction closest to
the vector. Vectors are taken as ``float32`` first. What has no direction is defined:

* A vector of zeros, or with no coordinate of at least ``2**-126``, decodes to zeros.
* A vector with a NaN or an infinity gets the norm NaN and decodes to NaNs throughout,
  as does any norm that is not finite: a broken vector never becomes plausible numbers.
* A finite vector decodes to finite numbers: a norm beyond ``float32``, and then a
  coordinate beyond the dtype asked for, becomes the largest finite number.

Knows how to quantize; knows nothing of caches, files or blocks of tokens.
"""

from __future__ import annotations

import math

import mlx.core as mx

from turboquant.codebook import decision_boundaries, lloyd_max_centroids
from turboquant.packing import pack_codes, unpack_codes
from turboquant.rotation import (
    LARGE,
    RESCALE,
    SMALL,
    TINY,
    Rotation,
    apply_wh_rotation,
    invert_wh_rotation,
)


def quantize_polar(
    x: mx.array, bits: int, rotation: Rotation
) -> tuple[mx.array, mx.array]:
    """Quantize vectors to ``bits`` bits per coordinate.

    Args:
        x: Vectors, shape ``(..., D)``, any float dtype.
        bits: Bits per coordinate, 1 to 8.
        rotation: A rotation of vectors of length ``D``.

    Returns:
        Packed codes, shape ``(..., D * bits // 8)``, ``uint8``, and norms, shape
        ``(...,)``, ``float32``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, ``D`` does not fit ``rotation``, or ``x`` is
            not of a float dtype.

    References:
        PolarQuant, arXiv:2502.02617; TurboQuant, arXiv:2504.19874, Algorithm 1.
    """
    levels = mx.array(lloyd_max_centroids(bits))
    # In x's own dtype, which is checked; float32 then changes nothing further.
    scaled, scale = _scale_to_middle(x)
    rotated = apply_wh_rotation(scaled, rotation)
    length = mx.sqrt(mx.sum(mx.square(rotated), axis=-1, keepdims=True))
    spread = rotated * (math.sqrt(rotation.dim) / mx.where(length > 0, length, 1))
    indices = _nearest_indices(spread, bits)
    rounded = levels[indices]
    norms = mx.sum(rotated * rounded, axis=-1) / mx.sum(mx.square(rounded), axis=-1)
    norms = norms * math.sqrt(rotation.dim) / scale
    return pack_codes(indices, bits), mx.minimum(norms, mx.finfo(mx.float32).max)


def dequantize_polar(
    codes: mx.array,
    norms: mx.array,
    bits: int,
    rotation: Rotation,
    *,
    dtype: mx.Dtype = mx.float32,
    mean: mx.array | None = None,
) -> mx.array:
    """Undo `quantize_polar`, but for the rounding.

    Args:
        codes: Packed codes, shape ``(..., D * bits // 8)``, ``uint8``.
        norms: Norms, shape ``(...,)``.
        bits: Bits per coordinate, 1 to 8.
        rotation: The rotation the vectors were quantized with.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        mean: What is added to the vectors, of a shape that broadcasts to ``(..., D)``.

    Returns:
        Vectors, shape ``(..., D)``, of ``dtype``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or the shapes or ``rotation`` do not fit.
    """
    levels = mx.array(lloyd_max_centroids(bits)) / math.sqrt(rotation.dim)
    if codes.shape != (*norms.shape, rotation.dim * bits // 8):
        raise ValueError(
            f"codes {codes.shape} and norms {norms.shape} do not fit {bits} bits "
            f"of dim {rotation.dim}"
        )
    directions = invert_wh_rotation(levels[unpack_codes(codes, bits)], rotation)
    norms = mx.where(mx.isfinite(norms), norms, math.nan).astype(mx.float32)
    vectors = directions * norms[..., None]
    if mean is not None:
        vectors = vectors + mean.astype(mx.float32)
    return _clamp(vectors, mx.finfo(dtype).max).astype(dtype)


def _scale_to_middle(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return vectors that are safe to square, and by what each was multiplied."""
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"vectors must be of a float dtype: got {x.dtype}")
    x = x.astype(mx.float32)
    is_finite = mx.all(mx.isfinite(x), axis=-1, keepdims=True)
    peak = mx.max(mx.abs(mx.where(is_finite, x, 0)), axis=-1, keepdims=True)
    scale = mx.where(peak < SMALL, RESCALE, mx.where(peak < LARGE, 1.0, 1 / RESCALE))
    scaled = mx.where(is_finite & (peak >= TINY), x, 0) * scale
    return scaled, mx.where(is_finite, scale, math.nan).squeeze(-1)


def _nearest_indices(spread: mx.array, bits: int) -> mx.array:
    """Count by bisection the boundaries that are not above each number."""
    boundaries = mx.array(decision_boundaries(bits))
    indices = mx.zeros(spread.shape, mx.uint32)
    for bit in reversed(range(bits)):
        middle = boundaries[indices + (2**bit - 1)]
        indices = indices + (spread >= middle).astype(mx.uint32) * 2**bit
    return indices.astype(mx.uint8)


def _clamp(x: mx.array, limit: float) -> mx.array:
    # Comparisons, not mx.clip: a NaN compares false and stays.
    return mx.where(x > limit, limit, mx.where(x < -limit, -limit, x))
