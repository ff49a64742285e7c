"""In which streams of bytes the coefficients of some layers lie, at one rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from turboquant.kernels.native import Places

from .streams import NUM_CLASSES, STREAMS

if TYPE_CHECKING:
    import numpy.typing as npt

    from .floats import Bools
    from .streams import Stream


class Layout:
    """What all blocks of some layers and one rate have in common.

    Args:
        sigma: Expected sizes of the coefficients in quarter octaves, ``(L, G, N)``.
        step: What they are rounded to, in quarter octaves.
    """

    def __init__(self, sigma: npt.NDArray[np.int8], step: int) -> None:
        self.step = np.float32(2.0 ** (step / 4))
        # Integers alone, so that who reads and who wrote cannot disagree.
        wide = sigma.astype(np.int64)
        self.classes = np.clip(wide - step + 12, 0, NUM_CLASSES - 1)
        # Those that hold something, and of what, ``(L, G, N)``.
        self.streams: list[tuple[Stream, Bools]] = []
        for stream in STREAMS:
            holds = (self.classes >= stream.first) & (self.classes <= stream.last)
            if holds.any():
                self.streams.append((stream, holds))
        self.places = Places(self.classes.shape, [holds for _, holds in self.streams])
