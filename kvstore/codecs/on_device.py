"""What a GPU makes of the rows of blocks that are alike, until somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .base import Array


class DevicePart(NamedTuple):
    """A codec's part of some blocks, as several launches make it of some layers each.

    It is joined where it is read: on the device that would be as many operations more.
    """

    # Of some layers after others; the first axis is that of the blocks.
    arrays: Sequence[mx.array]
    # The axis of the layers in what one block has.
    axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(array.nbytes for array in self.arrays)

    def read(self, number: int) -> Array:
        """Return what one block has, from any thread once it is evaluated."""
        found = [np.asarray(array)[number] for array in self.arrays]
        return np.concatenate(found, self.axis) if len(found) > 1 else found[0]
