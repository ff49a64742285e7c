"""What a GPU makes of the rows of blocks that are alike, until somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .base import Array


class DevicePart(NamedTuple):
    """One part of a codec's, of some blocks; each launch made it for some layers.

    Whoever reads it joins the arrays: on the device each join would be one more
    operation.
    """

    # One from each launch, in the order of the layers. The first axis counts blocks.
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
