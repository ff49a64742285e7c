"""What is worked out once for all blocks of a `fit` codec, and kept with it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from turboquant.kernels.long_rows import Bases, Basis, Places

from .streams import NUM_CLASSES, STREAMS

if TYPE_CHECKING:
    import numpy.typing as npt

    from turboquant.kernels.long_rows import WholeMatrices
    from turboquant.kernels.native import NativeKernels

    from .base import Rows
    from .fitted import FittedLayers
    from .floats import Bools
    from .streams import Stream


class Layout:
    """In which streams the coefficients of some layers lie, at one rate.

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


class Kept:
    """What was worked out for the blocks so far."""

    def __init__(self) -> None:
        # By the numbers of the layers.
        self._layouts: dict[tuple[FittedLayers, tuple[int, ...]], Layout] = {}
        self._bases: dict[tuple[Layout, bool], Bases] = {}
        # By where a layer is in the arrays.
        self._whole: dict[tuple[FittedLayers, int], WholeMatrices] = {}
        # Threads that decode the first blocks need the same at the same time.
        self._lock = threading.Lock()

    def layout(self, layers: FittedLayers, rows: Rows, step: int) -> Layout:
        """Return the layout of rows that a basis covers."""
        key = layers, rows.layers
        with self._lock:
            if key not in self._layouts:
                sigma = layers.sigma[layers.indices(rows.layers)]
                self._layouts[key] = Layout(sigma, step)
            return self._layouts[key]

    def bases(
        self, kernels: NativeKernels, rows: Rows, layers: FittedLayers, layout: Layout
    ) -> Bases:
        """Return what takes coefficients to rows of their dtype."""
        key = layout, rows.dtype == "F32"
        with self._lock:
            if key not in self._bases:
                made = [
                    self._basis(kernels, layers, which, None if key[1] else counts)
                    for which, counts in zip(
                        layers.indices(rows.layers), layout.places.counts, strict=True
                    )
                ]
                group = layers.group
                self._bases[key] = Bases(
                    layout.places,
                    made,
                    num_joined=group.num_joined,
                    is_traditional=group.is_traditional,
                )
            return self._bases[key]

    def _basis(
        self,
        kernels: NativeKernels,
        layers: FittedLayers,
        which: int,
        counts: npt.NDArray[np.int32] | None,
    ) -> Basis:
        """Return the basis of one layer, rounded where it is to be."""
        matrix, mean = layers.matrix[which], layers.mean[which]
        if counts is None:
            return Basis(matrix, mean)
        key = layers, which
        if key not in self._whole:
            self._whole[key] = kernels.round_matrices(matrix, counts)
        return Basis(matrix, mean, self._whole[key])
