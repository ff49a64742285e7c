"""The bytes of floats, split into planes: first all low bytes, last all high ones.

Sign and exponent change little from number to number. Alone in a plane they
compress to a fraction, which between two mantissas they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from .base import MLX_DTYPES, NUMPY_DTYPES, Array, PartSpecs, Rows

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def split_planes(x: Array) -> Array:
    """Return the bytes of ``x``, shape ``S``, as ``uint8`` of shape ``(itemsize, *S)``.

    Plane 0 holds the least significant bytes.
    """
    octets = x.view(np.uint8).reshape(*x.shape, x.itemsize)
    return np.ascontiguousarray(np.moveaxis(octets, -1, 0))


def join_planes(planes: Array, out: Array) -> None:
    """Write into ``out`` the numbers whose bytes :func:`split_planes` split."""
    if planes.shape[0] == 2:
        # Twice as fast as two strided stores.
        wide = planes[1].astype(np.uint16)
        wide <<= 8
        wide |= planes[0]
        out.view(np.uint16)[...] = wide
        return
    octets = np.empty((*planes.shape[1:], planes.shape[0]), np.uint8)
    for i, plane in enumerate(planes):
        octets[..., i] = plane
    out[...] = octets.view(out.dtype)[..., 0]


@dataclass(frozen=True, slots=True)
class Planes:
    """Stores every bit, in one part ``planes`` of shape ``(itemsize, L, H, T, D)``."""

    usual_names: ClassVar[tuple[str, ...]] = ("planes",)
    name: str = "planes"
    is_lossless: bool = True

    @classmethod
    def from_name(cls, name: str) -> Planes | None:
        """Return this codec if it is the one named."""
        return cls() if name == "planes" else None

    def parts(self, rows: Rows) -> PartSpecs:
        """Return the one part."""
        itemsize = np.dtype(NUMPY_DTYPES[rows.dtype]).itemsize
        return {"planes": ("U8", (itemsize, *rows.shape))}

    def encode(self, x: Array, rows: Rows) -> dict[str, Array]:
        """Split the rows."""
        return {"planes": split_planes(np.ascontiguousarray(x))}

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Join the planes of each layer."""
        for number, layer in enumerate(layers):
            join_planes(parts["planes"][:, number, :, : layer.shape[1]], layer)

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Join the planes on the device."""
        planes = mx.array(parts["planes"])
        whole = _UNSIGNED[planes.shape[0]]
        joined = planes[0].astype(whole)
        for i in range(1, planes.shape[0]):
            joined = joined | (planes[i].astype(whole) << 8 * i)
        return joined.view(MLX_DTYPES[rows.dtype])
