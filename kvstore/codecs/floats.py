"""Rows of a model's dtype as float32, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .dtypes import NUMPY_DTYPES

if TYPE_CHECKING:
    from .base import Array

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
_LARGEST_F16 = np.float32(np.finfo(np.float16).max)


def widen(x: Array, dtype: str) -> Floats:
    """Return rows, held as ``dtype`` is held in NumPy, as float32."""
    if dtype != "BF16":
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrow(wide: Floats, dtype: str) -> Array:
    """Return finite rows rounded to the nearest of a dtype, ties to even."""
    if dtype == "F16":  # as the kernels do, whose largest is the dtype's
        wide = np.clip(wide, -_LARGEST_F16, _LARGEST_F16)
    if dtype != "BF16":
        return wide.astype(NUMPY_DTYPES[dtype])
    bits = np.ascontiguousarray(wide).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
