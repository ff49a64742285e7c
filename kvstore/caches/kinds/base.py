"""What each cache class keeps of a sequence, and how a cache is built from it again.

One small class per kind of cache. An array of a layer holds one of these:

* ``rows``: a row per token, kept for good; a block has its own tokens' rows.
* ``window``: a row per token, of which the cache drops old ones. A block has the rows
  that were still there when it was saved.
* ``state``: no rows; what the layer is at one position. A block has it only where it
  was saved at its very end: a checkpoint.
* ``mark``: as ``state``, and a cache can be built without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx

from ...codecs.base import MLX_DTYPES
from ...errors import UnsupportedCacheError
from ..layout import LayerLayout, RowSpec

_DTYPE_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
# mlx-lm's caches grow by so many rows at a time.
_STEP = 256
Buffers = Mapping[str, mx.array]
"""What is restored, by name: rows as ``(1, H, rows, D)``, states ``(1, 1, 1, N)``."""
Held = dict[str, tuple[mx.array, int]]
"""What a cache holds, by name: an array, and the position of its first row."""


class Kind(Protocol):
    """One class of cache."""

    name: str
    """Of the class."""

    is_exact: bool
    """Whether it keeps what the model computed, to the bit."""

    def owns(self, cache: Any) -> bool:
        """Say whether a cache is of this very class; a subclass may keep more."""

    def read(self, cache: Any) -> LayerLayout:
        """Return the layout of a cache, without rows where it is empty."""

    def held(self, cache: Any) -> Held:
        """Return what the cache holds."""

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Return the first position that a cache of so many tokens needs a row of."""

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a cache that owns these buffers; an empty one where there are none."""


def capacity(num_tokens: int) -> int:
    """Return the rows of a buffer for so many tokens and the next, in whole steps."""
    return (num_tokens // _STEP + 1) * _STEP


def row_spec(array: mx.array) -> RowSpec:
    """Return heads, dimension and dtype of a buffer of one sequence."""
    batch, heads, _, dim = array.shape
    if batch != 1:
        raise ValueError(f"a batch of {batch}; store each by itself")
    return RowSpec(heads, dim, dtype_name(array))


def row_specs(held: Held) -> dict[str, RowSpec]:
    """Return heads, dimension and dtype of every array, by name."""
    return {name: row_spec(array) for name, (array, _) in held.items()}


def dtype_name(array: mx.array) -> str:
    """Return the safetensors name of an array's dtype.

    Raises:
        UnsupportedCacheError: It has none that a store keeps.
    """
    if array.dtype not in _DTYPE_NAMES:
        raise UnsupportedCacheError(f"{array.dtype} cannot be stored")
    return _DTYPE_NAMES[array.dtype]


def make_layout(name: str, specs: Mapping[str, RowSpec], **params: int) -> LayerLayout:
    """Return the layout of a layer, with its parameters in the order of their names."""
    return LayerLayout(name, tuple(sorted(params.items())), tuple(specs.items()))
