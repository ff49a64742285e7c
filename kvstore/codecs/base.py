"""What every codec is: rows of one side of one block to named arrays, and back.

Knows nothing of files, hashes or prompt caches. Rows are NumPy arrays in the dtype
they are stored in; bfloat16, which NumPy lacks, travels as its bits in ``uint16``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from ..format.block import EXACT_BITS, Part, TensorSpec, describe_parts
from .dtypes import NUMPY_DTYPES
from .zstd import Zstd

Array = npt.NDArray[np.generic]
Parts = Mapping[str, Array]
"""The named arrays that a codec made of rows."""
Layers = list[Array]
"""Rows of some layers, each of shape ``(H, T, D)``."""
Encoded = Array | Layers
"""A part as it comes out of encoding: an array, or one for each layer."""


def map_arrays(function: Callable[[Array], Array], x: Any) -> Any:
    """Return what a function makes of an array, or of each of several, as they are."""
    if isinstance(x, Mapping):
        return {name: function(part) for name, part in x.items()}
    return [function(part) for part in x] if isinstance(x, list) else function(x)


def nbytes(x: Array | Layers | Parts) -> int:
    """Return the bytes of an array, or of several."""
    if isinstance(x, Mapping):
        return sum(part.nbytes for part in x.values())
    return sum(part.nbytes for part in x) if isinstance(x, list) else x.nbytes


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of one array of one block are."""

    # Name of the array: ``k`` and ``v`` are keys and values, ``kv`` both, the heads
    # of the keys first.
    side: str
    # Position in the sequence of the first token.
    start: int
    # ``(L, H, T, D)``: layers, KV heads, tokens, head dimension.
    shape: tuple[int, int, int, int]
    # safetensors name of the element type.
    dtype: str
    # Which layers of the model they are of, where that is known.
    layers: tuple[int, ...] = ()


PartSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a part to its dtype and shape. A first dimension of ``-n`` is one of 0 to
``n``, as the rows demand."""


class ArrayCodec(Protocol):
    """Rows to named arrays; it may lose something.

    It may have three methods more. ``check(parts, rows)`` raises ``IntegrityError`` for
    parts that no encoding gives, though their shapes fit. ``runs(rows)``, where the
    kernels of a GPU can read its parts, returns the :class:`Run` of a block's rows.
    ``decode_sides_into(parts, rows, layers)``, where keys and values are coded
    together, writes those of each layer into two buffers.
    """

    @property
    def name(self) -> str:
        """The name in the registry."""

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""

    def parts(self, rows: Rows) -> PartSpecs:
        """Return dtype and shape of every part that encoding such rows gives.

        Raises:
            CodecError: This codec cannot hold such rows.
        """

    def is_compressible(self, part: str) -> bool:
        """Whether a compressor is worth its time on a part."""

    def encode(self, layers: Sequence[Array], rows: Rows) -> dict[str, Encoded]:
        """Encode rows of some layers, each of shape ``(H, T, D)``, strided or not.

        They may be a live cache's own memory, which is not to be written to.
        """

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Write each layer's rows into its buffer, shape ``(H, T, D)``, strided or not.

        Buffers of a lossless codec may have fewer tokens: the first ones then.
        """

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Return all layers' rows, ``(L, H, T, D)``, computed on MLX's device."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of all layers that lie alike in their parts, for a kernel of a GPU."""

    # Of each head, the next ones of the block.
    num_rows: int
    # Of a coordinate; 0 where the rows are exact.
    bits: int
    # The parts with planes of codes, widest first; or with exact rows, as they are or
    # as their low bytes and their high ones.
    planes: tuple[str, ...]
    # The part with the norms' bytes, least significant first.
    norms: str | None = None
    # The part with what is added to the rows of each head.
    mean: str | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """An array codec, and a bytes codec behind it or none."""

    # Rows to named arrays.
    array: ArrayCodec
    # What each named array then goes through, or ``None``.
    compressor: Zstd | None = None
    # By what its copies are compared with others, where its model was measured.
    rank: int | None = None

    @property
    def name(self) -> str:
        """The name in the registry, such as ``turbo4+zstd``."""
        suffix = f"+{self.compressor.name}" if self.compressor else ""
        return self.array.name + suffix

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return self.array.is_lossless

    @property
    def is_joint(self) -> bool:
        """Whether keys and values are coded together, where they have equal shapes."""
        return bool(getattr(self.array, "is_joint", False))

    @property
    def bits(self) -> int:
        """``EXACT_BITS`` if lossless; else the fewest that a number is coded in.

        Of one with a basis, those of a `turbo` that loses as much.
        """
        if self.is_lossless:
            return EXACT_BITS
        return self.rank or min(getattr(self.array, "bits", 0), EXACT_BITS - 1)

    def encode(
        self, layers: Sequence[Array] | Parts, rows: Rows, prefix: str
    ) -> list[Part]:
        """Encode rows of some layers to parts named ``prefix`` and on.

        Parts may be views of the rows, which must stay as they are for so long.

        Rows that are in codes of this codec already are only packed.

        Raises:
            CodecError: This codec cannot hold such rows.
        """
        specs = self.array.parts(rows)  # refuses the rows before any work is done
        encoded: Mapping[str, Encoded] = (
            layers if isinstance(layers, Mapping) else self.array.encode(layers, rows)
        )
        return [
            _pack(f"{prefix}{name}", dtype, encoded[name], self._compressor_of(name))
            for name, (dtype, _) in specs.items()
        ]

    def open(
        self, data: memoryview, begin: int, tensors: Mapping[str, TensorSpec],
        rows: Rows, prefix: str,
    ) -> dict[str, Array]:  # fmt: skip
        """Return the named arrays of one side, decompressed and checked.

        Args:
            data: The bytes of the block.
            begin: Where those bytes start in the shard's data.
            tensors: What the shard's header says of the block's tensors.
            rows: What the rows must be.
            prefix: What the names of this side's tensors start with.

        Raises:
            IntegrityError: The tensors are not what this codec makes of such rows.
        """
        opened: dict[str, Array] = {}
        for name, (dtype, shape) in self.array.parts(rows).items():
            spec = tensors.get(prefix + name)
            if spec is None:
                raise IntegrityError(f"tensor {prefix}{name} is missing")
            part = data[spec.begin - begin : spec.end - begin]
            try:
                shape = _found_shape(spec, dtype, shape)
                raw = _unpack(part, spec, dtype, shape, self._compressor_of(name))
            except ValueError as error:
                raise IntegrityError(f"tensor {prefix}{name}: {error}") from error
            opened[name] = np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)
        # A protocol's isinstance takes longer than all the rest of a block.
        check = getattr(self.array, "check", None)
        if check is not None:
            check(opened, rows)
        return opened

    def decode_parts(self, parts: Sequence[Part], rows: Rows, prefix: str) -> Array:
        """Return the rows that :meth:`encode` made parts of, ``(L, H, T, D)``.

        Raises:
            IntegrityError: The parts are not what this codec makes of such rows.
        """
        opened = self.open_parts(parts, rows, prefix)
        found = np.empty(rows.shape, NUMPY_DTYPES[rows.dtype])
        self.array.decode_into(opened, rows, list(found))
        return found

    def open_parts(
        self, parts: Sequence[Part], rows: Rows, prefix: str
    ) -> dict[str, Array]:
        """Return what :meth:`open` does, of parts that are in no shard yet."""
        data = b"".join(octets for part in parts for octets in part.buffers)
        return self.open(memoryview(data), 0, describe_parts(parts), rows, prefix)

    def _compressor_of(self, part: str) -> Zstd | None:
        return self.compressor if self.array.is_compressible(part) else None


def _pack(name: str, dtype: str, encoded: Encoded, compressor: Zstd | None) -> Part:
    if isinstance(encoded, list):
        if compressor is None:
            shape = (len(encoded), *encoded[0].shape)
            return Part(name, dtype, shape, tuple(_contiguous(encoded)))
        encoded = np.stack(encoded)
    data = _octets(np.ascontiguousarray(encoded))
    if compressor is None:
        return Part(name, dtype, encoded.shape, data)
    packed = compressor.compress(data)
    return Part(name, "U8", (len(packed),), packed, raw_nbytes=len(data))


def _contiguous(layers: Sequence[Array]) -> Iterator[memoryview]:
    """Yield the bytes of layers in order, in place where a head's lie side by side."""
    for layer in layers:
        whole = layer.flags.c_contiguous
        for array in [layer] if whole else layer:
            yield _octets(np.ascontiguousarray(array))


def _octets(array: Array) -> memoryview:
    # Flat bytes: a memoryview of an array without rows cannot be cast.
    return array.reshape(-1).view(np.uint8).data


def _unpack(
    data: memoryview, spec: TensorSpec, dtype: str, shape: tuple[int, ...],
    compressor: Zstd | None,
) -> bytes | memoryview:  # fmt: skip
    """Return the raw bytes of a tensor of this dtype and shape."""
    nbytes = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    if compressor is None:
        if (spec.dtype, spec.shape, spec.raw_nbytes) != (dtype, shape, None):
            raise ValueError("has another dtype or shape than its codec makes")
        if len(data) != nbytes:
            raise ValueError(f"has {len(data)} bytes in place of {nbytes}")
        return data
    if spec.dtype != "U8" or spec.raw_nbytes != nbytes:
        raise ValueError("has another raw size than its codec makes")
    return compressor.decompress(data, nbytes)


def _found_shape(
    spec: TensorSpec, dtype: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of a part whose first dimension is what was stored.

    Raises:
        ValueError: It is larger than it may be, or no whole number.
    """
    if shape[0] >= 0:
        return shape
    raw = spec.end - spec.begin if spec.raw_nbytes is None else spec.raw_nbytes
    width = math.prod(shape[1:]) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    count, rest = divmod(raw, width)
    if rest or count > -shape[0]:
        raise ValueError("has another size than its codec makes")
    return (count, *shape[1:])
