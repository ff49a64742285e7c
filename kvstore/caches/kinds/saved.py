"""One cache as mlx-lm's files have it. The kinds build caches from it.

A file is hostile input: what is read here is checked, and refused with ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ...codecs.dtypes import MLX_DTYPES

TO_0_28_0, FROM_0_28_1, IN_0_31, IN_0_32 = (
    "up to 0.28.0", "0.28.1 to 0.30", "0.31", "0.32",
)  # fmt: skip
"""The releases of mlx-lm that write files of the same layout."""
Releases = frozenset[str]
BEFORE_0_32: Releases = frozenset((TO_0_28_0, FROM_0_28_1, IN_0_31))
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class FileForm:
    """How some releases of mlx-lm write the caches of a class."""

    releases: Releases
    # The attributes that a file has beside the arrays, in its order. 0.32 keeps them
    # behind the arrays, the releases before as text in the metadata.
    numbers: tuple[str, ...] = ()
    # What these releases call the class, where it was renamed since.
    old_name: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array of the file, not read yet."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class SavedCache:
    """One cache as the file has it."""

    # Its class, by the name that the installed mlx-lm has for it.
    name: str
    # Its arrays, nested as mlx-lm nests them; ``None`` for one without rows.
    arrays: Any
    # Its other attributes, by name.
    numbers: Mapping[str, int]
    # Those in it, where it is a ``CacheList``.
    caches: tuple[SavedCache, ...] = ()

    def has_rows(self) -> bool:
        """Whether there are rows; the offset must say the same.

        Raises:
            ValueError: It does not.
        """
        is_empty = self.arrays is None
        if is_empty != (self.numbers.get("offset") == 0):
            raise ValueError("a layer has rows and no tokens, or tokens and no rows")
        return not is_empty


class FileArrays:
    """Reads arrays of an open file."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file = file
        self._begin = begin

    def read(self, tensor: Tensor) -> mx.array:
        """Return one array.

        Raises:
            ValueError: The file has become shorter.
        """
        if tensor.dtype not in MLX_DTYPES:
            raise ValueError(f"an array of {tensor.dtype}")
        dtype = MLX_DTYPES[tensor.dtype]
        raw = np.dtype(f"u{dtype.size}")
        self._file.seek(self._begin + tensor.begin)
        count = int(np.prod(tensor.shape, dtype=np.int64))
        values = np.fromfile(self._file, raw, count)
        return mx.array(values.reshape(tensor.shape)).view(dtype)

    def scalar(self, tensor: Tensor, kind: Any) -> Any:
        """Return what 0.32 wrote as an array: a number, a text, or ``None``."""
        if kind == "none" and tensor.shape == (0,):
            return None
        if tensor.dtype in ("I32", "I64", "U32"):
            if kind == "scalar" and tensor.shape == ():
                return int(np.asarray(self.read(tensor)).item())
            if kind == "string" and len(tensor.shape) == 1 and tensor.shape[0] < 64:
                codes = np.asarray(self.read(tensor))
                if ((codes >= 0) & (codes < 128)).all():
                    return bytes(codes.tolist()).decode("ascii")
        raise ValueError(f"a scalar of kind {str(kind)[:40]!r} and {tensor.dtype}")


def as_list(value: Any, length: int | None = None) -> list[Any]:
    """Return a list as it is, of so many items if a number is given."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError("a layer has other arrays than its class has")
    return value


def as_counts(pairs: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Return named numbers, each of which must be a count."""
    numbers = dict(pairs)
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"a layer's `{name}` is not a count")
    return numbers


def rows_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of rows of one sequence."""
    if not isinstance(tensor, Tensor) or len(tensor.shape) != 4:
        raise ValueError("an array has other dimensions than keys and values have")
    if tensor.shape[0] != 1 or 0 in tensor.shape[:3]:
        raise ValueError(f"an array of shape {tensor.shape} is no cache of one prompt")
    return tensor.shape


def float_pair(saved: SavedCache) -> tuple[Tensor, Tensor]:
    """Return keys and values, which agree in all but their last dimension."""
    keys, values = saved.arrays
    if rows_shape(keys)[:3] != rows_shape(values)[:3] or keys.shape[3] == 0:
        raise ValueError(f"keys of shape {keys.shape}, values of {values.shape}")
    if not (is_float(keys) and is_float(values)):
        raise ValueError(f"keys of {keys.dtype}, values of {values.dtype}")
    return keys, values


def is_float(tensor: Tensor) -> bool:
    """Whether a model computes in this dtype."""
    return tensor.dtype in _FLOATS


def first_rows(num_rows: int, there: int) -> slice:
    """Return the rows that are held; those behind are of a conversation cut off."""
    if num_rows > there:
        raise ValueError(f"{there} rows for {num_rows} tokens")
    return slice(num_rows)
