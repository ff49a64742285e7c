"""The kernels in C++, one set for each instruction set of this processor.

A plain shared library called through ctypes, which lets go of the interpreter's lock.
Codes and norms are the bytes of `turboquant.kernels.numpy`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turboquant.codebook import decision_boundaries
from turboquant.kernels.long_rows import (
    Bases,
    Basis,
    Coefficients,
    Long,
    Places,
    Rounding,
    Stream,
    Turns,
    WholeMatrices,
    check_long,
    whole_shape,
)
from turboquant.kernels.numpy import (
    BlockCodes,
    NumpyKernels,
    check_decode,
    check_encode,
    finite_or_nan,
    index_table,
    round_mean,
    scale_table,
    symbol_table,
    unscale_table,
)
from turboquant.packing import plane_widths
from turboquant.rotation import Rotation, make_wh_rotation, rotation_signs

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

LIBRARY = Path(__file__).with_name("_native.so")
_ABI = 6
# Best first.
_INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "neon", "sse2")
# Rows of so many numbers, and bits: AVX-512 does all but the first row by row.
_TRIED = (80, 3), (64, 4), (128, 3), (128, 4), (256, 2)
_VERBS = (
    "encode", "decode", "sum", "split", "join", "restore", "multiply", "round",
)  # fmt: skip
# As in kernel.h; uint16 holds bfloat16 bits.
_DTYPES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(np.uint16): 2,
}
# The least that the kernels read of a table.
_TABLE_FLOATS = 16


class _Job(ctypes.Structure):
    """`Job` of kernel.h, field by field."""

    _fields_ = (
        ("dim", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("heads", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("norm_byte_stride", ctypes.c_int64),
        ("norm_row_stride", ctypes.c_int64),
        ("mean", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


class _Bytes(ctypes.Structure):
    """`Bytes` of kernel.h, field by field."""

    _fields_ = (
        ("itemsize", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("plane_stride", ctypes.c_int64),
        ("heads", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
    )


class _Product(ctypes.Structure):
    """`Product` of kernel.h, field by field."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class _Tables:
    """What depends on bits and rotation alone."""

    levels: Floats
    boundaries: Floats
    signs: Floats
    factors: Floats


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The kernels of one instruction set; NumPy moves the bytes of odd numbers."""

    name: str
    _encode: Callable[..., int]
    _decode: Callable[..., int]
    _sum: Callable[..., int]
    _split: Callable[..., int]
    _join: Callable[..., int]
    _restore: Callable[..., int]
    _multiply: Callable[..., int]
    _round: Callable[..., int]

    def encode_block(
        self,
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        is_centred: bool,
    ) -> BlockCodes:
        """Quantize the rows of some layers."""
        check_encode(layers, bits, rotation)
        layers = _with_one_stride(layers)
        shape = (len(layers), *layers[0].shape[:2])
        planes = [
            np.empty((*shape, rotation.dim * width // 8), np.uint8)
            for width in plane_widths(bits)
        ]
        norms = np.empty(shape, np.float32)
        mean = self._mean(layers, rotation) if is_centred else None
        call = _Call(layers, planes, norms, mean, _encoding_tables(bits, rotation))
        call.run(self._encode, bits)
        return BlockCodes(planes, norms, mean)

    def decode_block(
        self,
        planes: Sequence[NDArray[Any]],
        norms: Floats,
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        mean: NDArray[Any] | None = None,
    ) -> None:
        """Decode rows into one buffer for each layer."""
        check_decode(planes, norms, layers, bits, rotation, mean)
        buffers = [_writable(layer) for layer in layers]
        targets = _with_one_stride(buffers)
        planes = [np.ascontiguousarray(plane) for plane in planes]
        norms = np.ascontiguousarray(norms, np.float32)
        call = _Call(targets, planes, norms, mean, _decoding_tables(bits, rotation))
        call.run(self._decode, bits)
        _copy_back(targets, buffers)

    def restore_long(
        self,
        coefficients: Coefficients,
        bases: Bases,
        scales: Floats,
        turns: Turns,
        out: Sequence[Sequence[NDArray[Any]]],
    ) -> None:
        """Write the rows of some layers, which are small integers in bases.

        Args:
            coefficients: Of all layers.
            bases: What takes them to rows.
            scales: What each row is multiplied with, ``(L, G, T)``.
            turns: How keys are turned.
            out: Of each layer keys, then values, in one array ``(2 H, T, D)`` or
                several of some heads each, of any strides, of the dtypes that
                `encode_block` takes; ``D`` is a multiple of 8.

        Raises:
            MemoryError: The kernels find no memory to work in.
            ValueError: A shape does not fit.
        """
        check_long(coefficients, bases, scales, turns, out)
        buffers = [_writable(x) for sides in out for x in sides]
        _, num_rows, dim = buffers[0].shape
        if not num_rows:
            return
        targets = _with_one_stride(buffers)
        heads = np.concatenate([_head_addresses(x) for x in targets])
        streams = (Stream * len(coefficients.streams))(*coefficients.streams)
        scales, cos, sin = (
            np.ascontiguousarray(x, np.float32) for x in (scales, turns.cos, turns.sin)
        )
        job = Long(
            num_layers=len(out),
            num_parts=scales.shape[1],
            num_joined=bases.num_joined,
            dim=dim,
            num_pairs=cos.shape[2],
            is_traditional=bases.is_traditional,
            dtype=_DTYPES[buffers[0].dtype],
            num_streams=len(streams),
            num_rows=num_rows,
            row_stride=targets[0].strides[1],
            heads=heads.ctypes.data,
            streams=ctypes.addressof(streams),
            layers=ctypes.addressof(bases.table),
            scales=scales.ctypes.data,
            cos=cos.ctypes.data,
            sin=sin.ctypes.data,
            turn_stride=cos[0].size if len(cos) > 1 else 0,
        )
        if self._restore(ctypes.byref(job)):
            raise MemoryError("the kernels found no memory to work in")
        _copy_back(targets, buffers)

    def round_matrices(
        self, matrices: Floats, counts: NDArray[np.int32]
    ) -> WholeMatrices:
        """Round the matrices of one layer, as restoring rows of 16 bits does.

        Args:
            matrices: ``(G, N, N)``.
            counts: How many columns of each are needed.

        Raises:
            ValueError: A shape does not fit.
        """
        parts, width = matrices.shape[:2]
        if width % 16 or matrices.shape[2] != width or counts.shape != (parts,):
            raise ValueError(f"{counts.shape} columns of matrices {matrices.shape}")
        if counts.max(initial=0) > width or counts.min(initial=0) < 0:
            raise ValueError(f"more or fewer columns than there are: {counts}")
        matrices = np.ascontiguousarray(matrices, np.float32)
        factors = np.empty((parts, width), np.float32)
        numbers = [np.empty(whole_shape(width, count), np.int16) for count in counts]
        for part, count in enumerate(counts):
            tables = (matrices[part], numbers[part], factors[part])
            addresses = (x.ctypes.data for x in tables)
            self._round(ctypes.byref(Rounding(width, int(count), *addresses)))
        return WholeMatrices(numbers, factors)

    def multiply(self, rows: Floats, matrix: Floats) -> Floats:
        """Return rows ``(T, N)`` times the transpose of a matrix ``(N, N)``.

        Every product is added in its order, whatever the machine.

        Args:
            rows: Of a length that 16 divides.
            matrix: What they are multiplied with.

        Raises:
            MemoryError: The kernels find no memory to work in.
            ValueError: A shape does not fit.
        """
        if rows.shape[1] % 16 or matrix.shape != (rows.shape[1],) * 2:
            raise ValueError(f"rows {rows.shape} times a matrix {matrix.shape}")
        rows, matrix = (np.ascontiguousarray(x, np.float32) for x in (rows, matrix))
        out = np.empty_like(rows)
        addresses = (x.ctypes.data for x in (rows, matrix, out))
        if self._multiply(ctypes.byref(_Product(*rows.shape, *addresses))):
            raise MemoryError("the kernels found no memory to work in")
        return out

    def split_bytes(self, layers: Sequence[NDArray[Any]]) -> list[Bytes]:
        """Return the bytes of some layers' numbers, plane by plane."""
        if not _can_move(layers):
            return NumpyKernels().split_bytes(layers)
        # Each by itself, so that one that was compressed can go before the others.
        shape = (len(layers), *layers[0].shape)
        planes = [np.empty(shape, np.uint8) for _ in range(layers[0].itemsize)]
        _move(self._split, planes, layers)
        return planes

    def join_bytes(
        self, planes: Sequence[NDArray[Any]], layers: Sequence[NDArray[Any]]
    ) -> None:
        """Write numbers whose bytes lie in planes."""
        if _can_move(layers):
            buffers = [_writable(layer) for layer in layers]
            _move(self._join, [np.ascontiguousarray(p) for p in planes], buffers)
        else:
            NumpyKernels().join_bytes(planes, layers)

    def _mean(
        self, layers: Sequence[NDArray[Any]], rotation: Rotation
    ) -> NDArray[np.float16]:
        """Return each head's mean row, shape ``(L, H, D)``."""
        num_heads, num_rows, dim = layers[0].shape
        # The kernels write whole vectors.
        sums = np.zeros((len(layers), num_heads, -(-dim // 16) * 16), np.float32)
        call = _Call(layers, [], sums, None, _encoding_tables(1, rotation))
        call.run(lambda job: self._sum(job, ctypes.c_void_p(sums.ctypes.data)), 1)
        return round_mean(sums[:, :, :dim], num_rows)


class _Call:
    """One call of a kernel: its arguments, which it keeps alive."""

    def __init__(
        self,
        layers: Sequence[NDArray[Any]],
        planes: Sequence[NDArray[Any]],
        norms: Floats,
        mean: NDArray[Any] | None,
        tables: _Tables,
    ) -> None:
        self._layers = layers
        self._planes = planes
        self._norms = norms
        self._mean = None if mean is None else finite_or_nan(mean)
        self._tables = tables

    def run(self, function: Callable[..., int], bits: int) -> None:
        """Call a kernel where there are rows.

        Raises:
            MemoryError: Its working memory cannot be had.
        """
        first, mean, tables = self._layers[0], self._mean, self._tables
        num_heads, num_rows, dim = first.shape
        if not num_heads or not num_rows:
            return
        heads = np.concatenate([_head_addresses(layer) for layer in self._layers])
        planes = np.array([plane.ctypes.data for plane in self._planes], np.uintp)
        job = _Job(
            dim=dim,
            bits=bits,
            dtype=_DTYPES[first.dtype],
            num_heads=len(heads),
            num_rows=num_rows,
            row_stride=first.strides[1],
            heads=heads.ctypes.data,
            planes=planes.ctypes.data,
            norms=self._norms.ctypes.data,
            norm_byte_stride=1,
            norm_row_stride=4,
            mean=None if mean is None else mean.ctypes.data,
            levels=tables.levels.ctypes.data,
            boundaries=tables.boundaries.ctypes.data,
            signs=tables.signs.ctypes.data,
            factors=tables.factors.ctypes.data,
        )
        if function(ctypes.byref(job)):
            raise MemoryError("the kernels found no memory to work in")


def _can_move(layers: Sequence[NDArray[Any]]) -> bool:
    """Whether the kernels move the bytes of such numbers, head by head."""
    first = layers[0]
    size, dim = first.itemsize, first.shape[2]
    return size in (2, 4) and all(
        layer.strides[1:] == (dim * size, size) and layer.dtype == first.dtype
        for layer in layers
    )


def _move(
    function: Callable[..., int],
    planes: Sequence[NDArray[Any]],
    layers: Sequence[NDArray[Any]],
) -> None:
    _, num_rows, dim = layers[0].shape
    heads = np.concatenate([_head_addresses(layer) for layer in layers])
    addresses = np.array([plane.ctypes.data for plane in planes], np.uintp)
    job = _Bytes(
        itemsize=layers[0].itemsize,
        num_heads=len(heads),
        count=num_rows * dim,
        plane_stride=planes[0].shape[2] * dim,
        heads=heads.ctypes.data,
        planes=addresses.ctypes.data,
    )
    function(ctypes.byref(job))


def load_all(library: Path = LIBRARY) -> list[NativeKernels]:
    """Return the kernels that this processor can run, fastest first.

    None where there is no library, or one that was compiled from other sources.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        if loaded.turboquant_abi() != _ABI:
            return []
    except (OSError, AttributeError):
        return []
    return [
        NativeKernels(name, *_functions(loaded, name))
        for name in _INSTRUCTION_SETS
        if loaded.turboquant_supports(name.encode())
        and hasattr(loaded, f"turboquant_encode_{name}")
    ]


def agrees(kernels: NativeKernels) -> bool:
    """Whether some rows get the codes, and decode to the rows, that they should.

    Of every type of numbers, and of integers in a basis.
    """
    return all(_agrees_on(kernels, *way) for way in _TRIED) and _has_products(kernels)


def _agrees_on(kernels: NativeKernels, dim: int, bits: int) -> bool:
    numbers = np.arange(17 * dim, dtype=np.float32).reshape(1, 1, 17, dim)
    floats = (numbers * 7919) % 251 - 120
    halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
    return all(
        _trial(kernels, list(rows), bits) == _trial(NumpyKernels(), list(rows), bits)
        for rows in (floats, floats.astype(np.float16), halves)
    )


def _trial(
    kernels: NativeKernels | NumpyKernels, rows: Sequence[NDArray[Any]], bits: int
) -> list[bytes]:
    """Return all that kernels make of rows, there and back, as bytes."""
    rotation = make_wh_rotation(rows[0].shape[-1])
    codes = kernels.encode_block(rows, bits, rotation, is_centred=True)
    out = [np.empty_like(layer) for layer in rows]
    mean = codes.mean
    kernels.decode_block(codes.planes, codes.norms, out, bits, rotation, mean=mean)
    made: list[NDArray[Any]] = [*codes.planes, codes.norms, *out]
    return [array.tobytes() for array in made]


def _has_products(kernels: NativeKernels) -> bool:
    """Whether products are right: of integers, so that no order of sums matters."""
    width, num_rows = 32, 17
    q = np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width) % 7 - 3
    matrix = np.arange(width * width, dtype=np.float32).reshape(1, width, width) % 5 - 2
    mean = np.arange(width, dtype=np.float32)[None]
    wide = q @ matrix[0].T
    places = Places((1, 1, width), [np.ones((1, 1, width), np.bool_)])
    coefficients = Coefficients(places)
    coefficients.add((q.T + 127).astype(np.uint8), None, 127, 1)
    # A quarter of a turn: of each pair the second is taken off, and the two swapped.
    zero, one = (np.full((1, 2, 8, 16), x, np.float32) for x in (0, 1))
    scales, turns = np.ones((1, 1, num_rows), np.float32), Turns(zero, one)
    # Of rows of 16 bits the matrix is rounded, to integers.
    whole = kernels.round_matrices(matrix, places.counts[0])
    basis = Basis(matrix, mean, whole)
    bases = Bases(places, [basis], num_joined=1, is_traditional=False)
    out = np.empty((2, num_rows, width // 2), np.float32)
    halves = np.zeros(out.shape, np.uint16)
    for each in (out, halves):
        kernels.restore_long(coefficients, bases, scales, turns, [[each]])
    first, second, values = np.split(wide + mean, [8, 16], axis=1)
    expected = np.concatenate([-second, first, values], axis=1)
    rows = np.concatenate((halves.astype(np.uint32) << 16).view(np.float32), axis=1)
    return (
        np.array_equal(np.concatenate(out, axis=1), expected)
        and np.allclose(rows, expected, rtol=2.0**-8, atol=0.01)
        and np.array_equal(kernels.multiply(q, matrix[0]), wide)
    )


def _functions(library: ctypes.CDLL, name: str) -> list[Callable[..., int]]:
    return [getattr(library, f"turboquant_{verb}_{name}") for verb in _VERBS]


def _with_one_stride(layers: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Return layers whose rows are contiguous and equally far apart, copied or not."""
    strides = {(layer.strides[1], layer.strides[2]) for layer in layers}
    if len(strides) == 1 and strides.pop()[1] == layers[0].itemsize:
        return layers
    return [np.array(layer, order="C") for layer in layers]


def _copy_back(
    targets: Sequence[NDArray[Any]], buffers: Sequence[NDArray[Any]]
) -> None:
    """Write what was written aside, since buffers had other strides."""
    for target, buffer in zip(targets, buffers, strict=True):
        if target is not buffer:
            buffer[...] = target


def _writable(layer: NDArray[Any]) -> NDArray[Any]:
    if not layer.flags.writeable:
        raise ValueError("a buffer to decode into is read-only")
    return layer


def _head_addresses(layer: NDArray[Any]) -> NDArray[np.int64]:
    steps = np.arange(layer.shape[0], dtype=np.int64) * layer.strides[0]
    return steps + layer.ctypes.data


@lru_cache
def _encoding_tables(bits: int, rotation: Rotation) -> _Tables:
    boundaries = np.array(decision_boundaries(bits), np.float32)
    signs = np.ascontiguousarray(rotation_signs(rotation))
    return _Tables(
        _padded(index_table(bits)), _padded(boundaries), signs, scale_table(rotation)
    )


@lru_cache
def _decoding_tables(bits: int, rotation: Rotation) -> _Tables:
    levels, factors = _padded(symbol_table(bits)), unscale_table(rotation)
    return _Tables(levels, levels, factors, factors)


def _padded(table: Floats) -> Floats:
    return np.append(table, np.zeros(_TABLE_FLOATS, np.float32))
