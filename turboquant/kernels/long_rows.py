"""Rows as small integers in a basis, as the compiled kernels take them.

Keys and values of some heads are one long row. Knows shapes and addresses; calls no
kernel.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# As in kernel.h.
_NO_STREAM = 255


class Stream(ctypes.Structure):
    """`Stream` of kernel.h, field by field."""

    _fields_ = (
        ("limit", ctypes.c_int32),
        ("per_byte", ctypes.c_int32),
        ("low_bits", ctypes.c_int32),
        ("packed", ctypes.c_void_p),
        ("packed_stride", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("low_stride", ctypes.c_int64),
        ("plane_stride", ctypes.c_int64),
    )


class LongLayer(ctypes.Structure):
    """`LongLayer` of kernel.h, field by field."""

    _fields_ = (
        ("kinds", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


class Long(ctypes.Structure):
    """`Long` of kernel.h, field by field."""

    _fields_ = (
        ("num_layers", ctypes.c_int32),
        ("num_parts", ctypes.c_int32),
        ("num_joined", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("num_pairs", ctypes.c_int32),
        ("is_traditional", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_streams", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("heads", ctypes.c_void_p),
        ("streams", ctypes.c_void_p),
        ("layers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("turn_stride", ctypes.c_int64),
    )


class Rounding(ctypes.Structure):
    """`Rounding` of kernel.h, field by field."""

    _fields_ = (
        ("width", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("matrix", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


class Places:
    """In which stream of bytes each coefficient is, of layers of ``G`` parts.

    Args:
        shape: ``(L, G, N)``.
        streams: Which coefficients each stream holds, of that shape.
    """

    def __init__(
        self, shape: tuple[int, int, int], streams: Sequence[NDArray[np.bool_]]
    ) -> None:
        self.kinds = np.full(shape, _NO_STREAM, np.uint8)
        self.ranks = np.zeros(shape, np.int32)
        for number, holds in enumerate(streams):
            self.kinds[holds] = number
            self.ranks[holds] = np.arange(np.count_nonzero(holds))
        self.sizes = [int(np.count_nonzero(holds)) for holds in streams]
        behind = np.where(self.kinds == _NO_STREAM, 0, np.arange(1, shape[2] + 1))
        # From which coefficient of a part on there is none.
        self.counts = behind.max(axis=2, initial=0).astype(np.int32)


class Coefficients:
    """Small integers as they lie in bytes.

    Args:
        places: Where each is.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.streams: list[Stream] = []
        # Of how many rows there is a coefficient in every stream.
        self.num_rows = sys.maxsize
        self._held: list[NDArray[Any]] = []

    def add(
        self,
        packed: NDArray[Any],
        low: NDArray[Any] | None,
        limit: int,
        per_byte: int,
    ) -> None:
        """Give the bytes of the next stream.

        Args:
            packed: A row of bytes for each coefficient of the stream.
            low: Planes of their low bits, each a row for each of them, or nothing.
            limit: The largest magnitude of what is packed.
            per_byte: How many rows share a byte.

        Raises:
            ValueError: There are more or fewer than the stream holds.
        """
        size = self.places.sizes[len(self.streams)]
        if len(packed) != size or (low is not None and low.shape[1] != size):
            raise ValueError(f"a stream of {size} has bytes of {len(packed)}")
        packed = np.ascontiguousarray(packed)
        stream = Stream(limit, per_byte, 0, packed.ctypes.data, packed.shape[1])
        self.num_rows = min(self.num_rows, packed.shape[1] * per_byte)
        self._held.append(packed)  # alive for as long as its address is
        if low is not None:
            low = np.ascontiguousarray(low)
            stream.low_bits, stream.low_stride = len(low), low.shape[2]
            stream.low, stream.plane_stride = low.ctypes.data, size * low.shape[2]
            self.num_rows = min(self.num_rows, low.shape[2] * 8)
            self._held.append(low)
        self.streams.append(stream)


@dataclass(frozen=True, slots=True)
class WholeMatrices:
    """The matrices of one layer, rounded to integers of 16 bits."""

    # Of each part ``(N / 8, C / 2, 8, 2)``: as many columns as its coefficients need.
    numbers: Sequence[NDArray[np.int16]]
    # What the integers of each row count, ``(G, N)``.
    factors: Floats


@dataclass(frozen=True, slots=True)
class Basis:
    """What takes the coefficients of one layer to its rows."""

    # ``(G, N, N)`` and ``(G, N)``.
    matrix: Floats
    mean: Floats
    # Of the matrix, or nothing: then rows of 16 bits have it rounded anew.
    whole: WholeMatrices | None = None


class Bases:
    """What takes the coefficients of some layers to their rows.

    Args:
        places: Where the coefficients are.
        layers: The basis of each layer.
        num_joined: Heads whose keys and values make one part.
        is_traditional: Whether neighbours are the pairs that a key's position turns.

    Raises:
        ValueError: A shape does not fit.
    """

    def __init__(
        self,
        places: Places,
        layers: Sequence[Basis],
        *,
        num_joined: int,
        is_traditional: bool,
    ) -> None:
        if len(layers) != len(places.kinds):
            raise ValueError(f"bases of {len(layers)} layers")
        self.places = places
        self.num_joined = num_joined
        self.is_traditional = is_traditional
        self._held: list[Any] = []  # alive for as long as their addresses are
        table = (self._layer(number, basis) for number, basis in enumerate(layers))
        self.table = (LongLayer * len(layers))(*table)

    def _layer(self, number: int, basis: Basis) -> LongLayer:
        places = self.places
        _check_basis(basis, places.counts[number], places.kinds.shape[2])
        tables = [
            np.ascontiguousarray(table, np.float32)
            for table in (basis.matrix, basis.mean)
        ]
        found = [places.kinds[number], places.ranks[number], places.counts[number]]
        layer = LongLayer(*(array.ctypes.data for array in (*found, *tables)))
        self._held += tables
        if basis.whole is not None:
            addresses = [x.ctypes.data for x in basis.whole.numbers]
            pointers = (ctypes.c_void_p * len(addresses))(*addresses)
            layer.whole = ctypes.addressof(pointers)
            layer.factors = basis.whole.factors.ctypes.data
            self._held += [pointers, basis.whole]
        return layer


@dataclass(frozen=True, slots=True)
class Turns:
    """Cosine and sine of the positions of some rows, 16 rows at a time.

    Each ``(L, ceil(T / 16), pairs, 16)``; where all layers have the same, ``L`` is 1.
    """

    cos: Floats
    sin: Floats


def whole_shape(width: int, count: int) -> tuple[int, int, int, int]:
    """Return the shape of a matrix's integers, of so many columns."""
    return width // 8, (int(count) + 1) // 2, 8, 2


def check_long(
    coefficients: Coefficients,
    bases: Bases,
    scales: Floats,
    turns: Turns,
    out: Sequence[Sequence[NDArray[Any]]],
) -> None:
    """Refuse what the kernels would read or write beyond its end.

    Raises:
        ValueError: A shape does not fit.
    """
    places = coefficients.places
    layers, parts, width = places.kinds.shape
    num_rows, dim = out[0][0].shape[1:]
    heads = [sum(map(len, sides)) for sides in out]
    turned = turns.cos.shape
    if (
        bases.places is not places
        or scales.shape != (layers, parts, num_rows)
        or turned[:1] not in ((1,), (layers,))
        or (turned[1:2], turned[3:]) != ((-(-num_rows // 16),), (16,))
        or (turns.sin.shape != turned or 2 * turned[2] > dim or dim % 8)
        or heads != [2 * bases.num_joined * parts] * layers
        or width != 2 * bases.num_joined * dim
        or num_rows > coefficients.num_rows
        or len(coefficients.streams) != len(places.sizes)
        or len({(x.shape[1:], x.dtype) for sides in out for x in sides}) > 1
    ):
        shape = heads, num_rows, dim
        raise ValueError(f"coefficients and a basis of other rows than {shape}")


def _check_basis(basis: Basis, counts: NDArray[np.int32], width: int) -> None:
    """Refuse a basis of another shape."""
    parts = len(counts)
    if (basis.matrix.shape, basis.mean.shape) != (
        (parts, width, width),
        (parts, width),
    ):
        raise ValueError("a basis of other rows")
    whole = basis.whole
    if whole is not None and (
        whole.factors.shape != (parts, width)
        or [x.shape for x in whole.numbers]
        != [whole_shape(width, count) for count in counts]
    ):
        raise ValueError("matrices were rounded for other coefficients")
