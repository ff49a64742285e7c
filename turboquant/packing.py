"""Centroid indices to bit-packed planes and back. Knows nothing of their meaning.

The index of a coordinate counts centroids from the lowest. It is packed as a *symbol*
of ``bits`` bits. For an even width, and for 1, the symbol is the index. For another odd
width its high bits are the magnitude, counted away from zero, and its lowest bit is the
sign, 1 below zero: the magnitude then carries all of the redundancy, since a sign is
incompressible.

A symbol is cut, from its high bits down, into fields of 8, 4, 2 or 1 bits. The fields
of one width from all coordinates of a vector make a *plane*. Its byte ``j`` holds, from
its low bits up, the coordinates ``j``, ``j + D/n``, ``j + 2D/n``, … where ``n`` fields
fit a byte, so that packing and unpacking work on whole runs of coordinates.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

ArrayT = TypeVar("ArrayT", mx.array, NDArray[Any])

_PLANE_WIDTHS = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the field width of each plane, widest first.

    A plane of width ``w`` takes ``D * w // 8`` bytes of a vector.

    Args:
        bits: Bits per coordinate, 1 to 8.

    Raises:
        ValueError: ``bits`` is not 1 to 8.
    """
    if bits not in _PLANE_WIDTHS:
        raise ValueError(f"bits must be 1 to 8: {bits!r}")
    return _PLANE_WIDTHS[bits]


def pack_codes(indices: mx.array, bits: int) -> mx.array:
    """Pack centroid indices.

    Args:
        indices: Shape ``(..., D)``, ``uint8``, each below ``2**bits``; ``D`` a multiple
            of 8.
        bits: Bits per coordinate, 1 to 8.

    Returns:
        The planes of each vector, one after the other, shape ``(..., D * bits // 8)``,
        ``uint8``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``D`` is no multiple of 8.
    """
    symbols = indices_to_symbols(indices, bits)
    if indices.shape[-1] % 8:
        raise ValueError(f"the last axis must be a multiple of 8: {indices.shape}")
    planes = [
        _pack_plane((symbols >> shift) & (2**width - 1), width)
        for width, shift in plane_fields(bits)
    ]
    return mx.concatenate(planes, axis=-1)


def unpack_codes(codes: mx.array, bits: int) -> mx.array:
    """Undo `pack_codes`.

    Args:
        codes: Packed codes, shape ``(..., D * bits // 8)``, ``uint8``.
        bits: Bits per coordinate, 1 to 8.

    Returns:
        Centroid indices, shape ``(..., D)``, ``uint8``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or the last axis does not fit it.
    """
    planes = split_planes(codes, bits)
    symbols = mx.zeros((*codes.shape[:-1], codes.shape[-1] // bits * 8), mx.uint8)
    for plane, (width, shift) in zip(planes, plane_fields(bits), strict=True):
        symbols = symbols | (_unpack_plane(plane, width) << shift)
    return symbols_to_indices(symbols, bits)


def split_planes(codes: ArrayT, bits: int) -> tuple[ArrayT, ...]:
    """Cut packed codes into their planes; concatenation along the last axis undoes it.

    Args:
        codes: Packed codes, shape ``(..., D * bits // 8)``, ``uint8``, of MLX or NumPy.
        bits: Bits per coordinate, 1 to 8.

    Returns:
        One array for each of `plane_widths`, shape ``(..., D * width // 8)``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or the last axis does not fit it.
    """
    widths = plane_widths(bits)
    if codes.shape[-1] % bits:
        raise ValueError(f"codes of {bits} bits cannot have shape {codes.shape}")
    eighth = codes.shape[-1] // bits
    stops = accumulate(widths)
    return tuple(
        codes[..., (stop - width) * eighth : stop * eighth]
        for width, stop in zip(widths, stops, strict=True)
    )


def plane_fields(bits: int) -> Iterator[tuple[int, int]]:
    """Yield each plane's width and how far its field lies above the lowest bit.

    Raises:
        ValueError: ``bits`` is not 1 to 8.
    """
    shift = bits
    for width in plane_widths(bits):
        shift -= width
        yield width, shift


def indices_to_symbols(indices: ArrayT, bits: int) -> ArrayT:
    """Return what is packed for each centroid index.

    Args:
        indices: Centroid indices, any shape, ``uint8``, of MLX or NumPy.
        bits: Bits per coordinate, 1 to 8.

    Raises:
        ValueError: ``bits`` is not 1 to 8.
    """
    if not _has_sign_plane(bits):
        return indices
    mask = 2 ** (bits - 1) - 1
    is_negative: ArrayT = 1 - (indices >> (bits - 1))
    magnitude: ArrayT = (indices ^ (is_negative * mask)) & mask
    symbols: ArrayT = (magnitude << 1) | is_negative
    return symbols


def symbols_to_indices(symbols: ArrayT, bits: int) -> ArrayT:
    """Undo `indices_to_symbols`.

    Raises:
        ValueError: ``bits`` is not 1 to 8.
    """
    if not _has_sign_plane(bits):
        return symbols
    is_negative: ArrayT = symbols & 1
    magnitude: ArrayT = (symbols >> 1) ^ (is_negative * (2 ** (bits - 1) - 1))
    is_positive: ArrayT = 1 - is_negative
    indices: ArrayT = magnitude | (is_positive << (bits - 1))
    return indices


def _has_sign_plane(bits: int) -> bool:
    return plane_widths(bits)[-1] == 1 and bits > 1


def _pack_plane(fields: mx.array, width: int) -> mx.array:
    first, *others = mx.split(fields, 8 // width, axis=-1)
    for place, part in enumerate(others, start=1):
        first = first | (part << (place * width))
    return first


def _unpack_plane(plane: mx.array, width: int) -> mx.array:
    mask = 2**width - 1
    parts = [(plane >> shift) & mask for shift in range(0, 8, width)]
    return mx.concatenate(parts, axis=-1)
