"""Small integers to bytes, grouped by how large they are expected to be.

Coefficients of equal class have about the same size in steps. A stream holds those of
a class or two: few levels are packed several to a byte, many take a byte, and the low
bits of the largest, which are noise, lie apart. What is then left of a stream's bytes
is for an entropy coder, which needs to look for no repetitions.

Frozen: the streams are part of what `fit` means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.generic]
"""Of dtype `uint8`."""
Integers = npt.NDArray[np.int16]

NUM_CLASSES = 40
FIRST_CODED = 5
"""Coefficients of lower classes are below 0.3 of a step, and are not coded."""


@dataclass(frozen=True, slots=True)
class Stream:
    """How the coefficients of some neighbouring classes are stored."""

    # The classes, the last one included.
    first: int
    last: int
    # The largest magnitude of what stands in a byte.
    limit: int
    # How many coefficients share a byte.
    per_byte: int = 1
    # How many low bits lie apart.
    low_bits: int = 0

    @property
    def levels(self) -> int:
        """How many values one coefficient has in a byte."""
        return 2 * self.limit + 1

    @property
    def most(self) -> int:
        """The largest magnitude of a coefficient."""
        return self.limit << self.low_bits

    def width(self, num_tokens: int) -> int:
        """Return how many bytes the coefficients of so many tokens take."""
        return -(-num_tokens // self.per_byte)


STREAMS = (
    Stream(5, 5, 2, per_byte=3),
    Stream(6, 7, 2, per_byte=3),
    Stream(8, 8, 7, per_byte=2),
    Stream(9, 10, 7, per_byte=2),
    Stream(11, 12, 7, per_byte=2),
    *(Stream(first, first + 1, 127) for first in range(13, 27, 2)),
    *(
        Stream(first, min(first + 1, 39), 127, low_bits=(first - 19) // 4)
        for first in range(27, 40, 2)
    ),
)


def pack_integers(q: Integers, stream: Stream) -> tuple[Bytes, Bytes]:
    """Pack coefficients, shape ``(N, T)``, none larger than ``stream.most``.

    Returns:
        Bytes, shape ``(N, stream.width(T))``, and the low bits, shape
        ``(stream.low_bits, N, ceil(T / 8))``.
    """
    low = [np.packbits((q >> bit) & 1 != 0, axis=1) for bit in range(stream.low_bits)]
    shifted = (q >> stream.low_bits) + stream.limit
    width = stream.width(q.shape[1])
    padding = width * stream.per_byte - q.shape[1]
    digits = np.pad(shifted, ((0, 0), (0, padding)), constant_values=stream.limit)
    digits = digits.reshape(len(q), width, stream.per_byte)
    packed = digits @ _powers(stream)
    none = np.zeros((0, len(q), -(-q.shape[1] // 8)), np.uint8)
    return packed.astype(np.uint8), np.stack(low) if low else none


def unpack_integers(
    packed: Bytes, low: Bytes, stream: Stream, num_tokens: int
) -> Integers:
    """Return coefficients, shape ``(N, T)``; the opposite of packing them."""
    padded = packed.shape[1] * stream.per_byte
    q: Integers = _table(stream)[packed].reshape(len(packed), padded)[:, :num_tokens]
    if not stream.low_bits:
        return q
    q = q << stream.low_bits
    for bit, plane in enumerate(low):
        ones = np.unpackbits(plane, axis=1, count=num_tokens)
        q |= ones.astype(np.int16) << bit
    return q


def are_packed(packed: Bytes, stream: Stream) -> bool:
    """Whether every byte is one that packing gives."""
    return not packed.size or int(packed.max()) < stream.levels**stream.per_byte


def _powers(stream: Stream) -> Integers:
    """Return what each coefficient of a byte counts."""
    powers = [stream.levels**place for place in range(stream.per_byte)]
    return np.array(powers, np.int16)


@lru_cache(maxsize=len(STREAMS))
def _table(stream: Stream) -> Integers:
    """Return the coefficients of every byte, shape ``(256, stream.per_byte)``."""
    octets = np.arange(256)[:, None] // _powers(stream) % stream.levels
    return (octets - stream.limit).astype(np.int16)
