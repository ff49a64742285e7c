"""The bytes of floats, split into planes: first all low bytes, last all high ones.

Sign and exponent, the highest byte, change little from number to number. Alone in a
plane they compress to a fraction, which between two mantissas they do not. The other
bytes are noise, which no compressor makes smaller, so none is tried on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from .base import MLX_DTYPES, NUMPY_DTYPES, Array, PartSpecs, Rows, Run

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def split_planes(x: Array) -> Array:
    """Return the bytes of ``x``, shape ``S``, as ``uint8`` of shape ``(itemsize, *S)``.

    Plane 0 holds the least significant bytes.
    """
    octets = x.view(np.uint8).reshape(*x.shape, x.itemsize)
    return np.ascontiguousarray(np.moveaxis(octets, -1, 0))


def join_planes(planes: Sequence[Array], out: Array) -> None:
    """Write into ``out`` the numbers whose bytes :func:`split_planes` split."""
    if len(planes) == 2:
        # Twice as fast as two strided stores.
        wide = planes[1].astype(np.uint16)
        wide <<= 8
        wide |= planes[0].view(np.uint8)
        out.view(np.uint16)[...] = wide
        return
    octets = np.empty((*planes[0].shape, len(planes)), np.uint8)
    for i, plane in enumerate(planes):
        octets[..., i] = plane
    out[...] = octets.view(out.dtype)[..., 0]


@dataclass(frozen=True, slots=True)
class Planes:
    """Stores every bit.

    Parts: ``high``, the highest byte of each number, ``(L, H, T, D)``; and the others
    in ``low``, ``(itemsize - 1, L, H, T, D)``, where a number has more than one.
    """

    usual_names: ClassVar[tuple[str, ...]] = ("planes",)
    name: str = "planes"
    is_lossless: bool = True

    @classmethod
    def from_name(cls, name: str) -> Planes | None:
        """Return this codec if it is the one named."""
        return cls() if name == "planes" else None

    def parts(self, rows: Rows) -> PartSpecs:
        """Return both parts, or the one of rows of single bytes."""
        num_low = np.dtype(NUMPY_DTYPES[rows.dtype]).itemsize - 1
        low: PartSpecs = {"low": ("U8", (num_low, *rows.shape))} if num_low else {}
        return {**low, "high": ("U8", rows.shape)}

    def is_compressible(self, part: str) -> bool:
        """The high plane alone."""
        return part == "high"

    def encode(self, x: Array, rows: Rows) -> dict[str, Array]:
        """Split the rows."""
        planes = split_planes(np.ascontiguousarray(x))
        return {"low": planes[:-1], "high": planes[-1]}

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Join the planes of each layer."""
        for number, layer in enumerate(layers):
            join_planes([p[number, :, : layer.shape[1]] for p in _planes(parts)], layer)

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Join the planes on the device."""
        planes = [mx.array(plane) for plane in _planes(parts)]
        whole = _UNSIGNED[len(planes)]
        joined = planes[0].astype(whole)
        for i in range(1, len(planes)):
            joined = joined | (planes[i].astype(whole) << 8 * i)
        return joined.view(MLX_DTYPES[rows.dtype])

    def runs(self, parts: Mapping[str, Array], rows: Rows) -> list[Run]:
        """Return one run of exact rows, their low bytes before the high ones."""
        planes = [parts[name] for name in ("low", "high") if name in parts]
        return [Run(rows.shape[2], 0, tuple(planes))]


def _planes(parts: Mapping[str, Array]) -> list[Array]:
    """Return the planes, least significant bytes first."""
    return [*parts.get("low", ()), parts["high"]]
