"""The rows as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .base import Array, Encoded, PartSpecs, Rows, Run
from .dtypes import MLX_DTYPES


@dataclass(frozen=True, slots=True)
class Raw:
    """Stores every bit, in one part ``rows``."""

    usual_names: ClassVar[tuple[str, ...]] = ("raw",)
    name: str = "raw"
    is_lossless: bool = True

    @classmethod
    def from_name(cls, name: str) -> Raw | None:
        """Return this codec if it is the one named."""
        return cls() if name == "raw" else None

    def parts(self, rows: Rows) -> PartSpecs:
        """Return the one part."""
        return {"rows": (rows.dtype, rows.shape)}

    def is_compressible(self, part: str) -> bool:
        """All parts."""
        return True

    def encode(self, layers: Sequence[Array], rows: Rows) -> dict[str, Encoded]:
        """Return the rows, from where they are."""
        return {"rows": list(layers)}

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Copy the rows."""
        for layer, stored in zip(layers, parts["rows"], strict=True):
            layer[...] = stored[:, : layer.shape[1]]

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Move the rows to the device."""
        return mx.array(parts["rows"]).view(MLX_DTYPES[rows.dtype])

    def runs(self, rows: Rows) -> list[Run]:
        """Return one run of exact rows."""
        return [Run(rows.shape[2], 0, ("rows",))]
