"""Samples that are held in files while a basis is fitted to them. Knows no model."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..codecs.base import Array
from ..codecs.fitting import Sample
from ..codecs.floats import narrow
from ..storage import files


def hold(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples that lie in a file without a name, their gradients in 16 bits.

    The file is gone with the last of them, or with the process.

    Raises:
        OSError: The disk is full or fails.
    """
    arrays = [array for sample in samples for array in _arrays(sample)]
    with tempfile.TemporaryFile(prefix="kvstore-", buffering=0) as file:
        files.write_all(file.fileno(), *(x.data.cast("B") for x in arrays))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped, offset = [], 0
    for array in arrays:
        flat = np.frombuffer(data, array.dtype, array.size, offset)
        mapped.append(flat.reshape(array.shape))
        offset += array.nbytes
    rest = iter(mapped)
    return [
        replace(s, x=next(rest), gradients=tuple(next(rest) for _ in s.gradients))
        for s in samples
    ]


def _arrays(sample: Sample) -> list[Array]:
    """Return rows and gradients as they are written."""
    drawn = [narrow(each.astype(np.float32), "BF16") for each in sample.gradients]
    return [np.ascontiguousarray(sample.x), *drawn]
