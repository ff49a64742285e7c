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

from turboquant.kernels import best_kernels

from .base import Array, Encoded, PartSpecs, Rows, Run
from .dtypes import MLX_DTYPES, NUMPY_DTYPES

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


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

    def encode(self, layers: Sequence[Array], rows: Rows) -> dict[str, Encoded]:
        """Split the rows."""
        *low, high = best_kernels().split_bytes(layers)
        # Two planes are views: a copy is made of three low ones alone.
        lower = {"low": low[0][None] if len(low) == 1 else np.stack(low)} if low else {}
        return {**lower, "high": high}

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Join the planes of each layer."""
        best_kernels().join_bytes(_planes(parts), layers)

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Join the planes on the device."""
        planes = [mx.array(plane) for plane in _planes(parts)]
        whole = _UNSIGNED[len(planes)]
        joined = planes[0].astype(whole)
        for i in range(1, len(planes)):
            joined = joined | (planes[i].astype(whole) << 8 * i)
        return joined.view(MLX_DTYPES[rows.dtype])

    def runs(self, rows: Rows) -> list[Run]:
        """Return one run of exact rows, their low bytes before the high ones."""
        return [Run(rows.shape[2], 0, tuple(self.parts(rows)))]


def _planes(parts: Mapping[str, Array]) -> list[Array]:
    """Return the planes, least significant bytes first."""
    return [*parts.get("low", ()), parts["high"]]
