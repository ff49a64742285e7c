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
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx

from ...codecs.base import Rows
from ...codecs.dtypes import MLX_DTYPES
from ...errors import UnsupportedCacheError
from ...format.block import EXACT_BITS
from ..layout import Group, LayerLayout, RowSpec, Shapes
from .saved import IN_0_32, FileArrays, FileForm, SavedCache, as_counts, as_list

_DTYPE_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
# mlx-lm's caches grow by so many rows at a time.
STEP = 256
Buffers = Mapping[str, mx.array]
"""What is restored, by name: rows as ``(1, H, rows, D)``, states ``(1, 1, 1, N)``."""
Held = dict[str, tuple[mx.array, int]]
"""What a cache holds, by name: an array, and the position of its first row."""


class CacheKind(Protocol):
    """All that the store knows about one class of cache. Derive each kind from it."""

    name: str
    """Of the class."""

    is_exact: bool
    """Whether it keeps what the model computed, to the bit; else codes of it."""

    is_cuttable: bool = False
    """Whether ``trim`` can drop the last rows at any time, and leaves the others."""

    forms: tuple[FileForm, ...] = ()
    """How mlx-lm's releases write it; empty where files of it are not read."""

    stands_for: str = ""
    """The class in whose place an option of mlx-lm's puts this one."""

    fixed_by_model: tuple[str, ...] = ()
    """The numbers of a file that must be those of the model's own cache."""

    def owns(self, cache: Any) -> bool:
        """Whether a cache is of this very class; a subclass may keep more.

        Asked once of a class: the answer may depend on nothing else.
        """

    def bits(self, cache: Any) -> int:
        """Return the bits per number of codes, the fewest; ``EXACT_BITS`` of none."""
        return EXACT_BITS if self.is_exact else 0

    def read(self, cache: Any) -> LayerLayout:
        """Return the layout of a cache, without rows where it is empty."""

    def held(self, cache: Any) -> Held:
        """Return what the cache holds."""

    def shapes(self, layout: LayerLayout) -> Shapes:
        """Return what a model computes that fills such a cache, by side or state."""
        return {
            name.partition(".")[0]: (spec.num_heads, spec.head_dim, spec.dtype)
            for name, spec in layout.rows
            if spec.kind != "mark"
        }

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Return the first position that a cache of so many tokens needs a row of.

        That is 0 where it drops none.
        """
        return 0

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a cache that owns these buffers; an empty one where there are none."""

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache that a file has.

        Args:
            saved: The cache as the file's header has it.
            data: Reads its arrays.
            num_tokens: How many tokens the file's other layers hold.

        Raises:
            ValueError: Its arrays are not what such a cache has.
        """
        raise ValueError(f"files of a {self.name} are not read")

    def parse_state(self, state: Any) -> SavedCache:
        """Return the cache that 0.32 wrote as this list of arrays and numbers.

        Raises:
            ValueError: It is not what such a cache has.
        """
        (form,) = (form for form in self.forms if IN_0_32 in form.releases)
        keys, values, *numbers = as_list(state, 2 + len(form.numbers))
        arrays = None if keys is None and values is None else (keys, values)
        named = as_counts(zip(form.numbers, numbers, strict=True))
        return SavedCache(self.name, arrays, named)

    def parse_older(self, state: Any, numbers: Mapping[str, int]) -> SavedCache:
        """Return the cache that a release before 0.32 wrote as these arrays.

        Raises:
            ValueError: They are not what such a cache has.
        """
        keys, values = as_list(state, 2)
        return SavedCache(self.name, (keys, values), numbers)

    def num_arrays(self, cache: Any) -> int:
        """Return how many arrays mlx-lm writes of such a cache."""
        return 2

    def mismatch(self, saved: SavedCache, like: Any) -> str | None:
        """Return what keeps a file's cache from being like the model's, if anything."""
        for name in self.fixed_by_model:
            wanted, found = getattr(like, name, None), saved.numbers.get(name)
            if wanted is not None and found != wanted:
                return f"has {name} {found}, the model {wanted}"
        return None


def capacity(num_tokens: int) -> int:
    """Return the rows of a buffer for so many tokens and the next, in whole steps."""
    return (num_tokens // STEP + 1) * STEP


def row_spec(array: mx.array) -> RowSpec:
    """Return heads, dimension and dtype of a buffer of one sequence."""
    batch, heads, _, dim = array.shape
    if batch != 1:
        raise ValueError(f"a batch of {batch}; store each by itself")
    return _plain_spec(heads, dim, dtype_name(array))


@lru_cache(maxsize=256)
def _plain_spec(num_heads: int, head_dim: int, dtype: str) -> RowSpec:
    """Return the same object for all layers that are alike."""
    return RowSpec(num_heads, head_dim, dtype)


def row_specs(held: Held) -> dict[str, RowSpec]:
    """Return heads, dimension and dtype of every array, by name."""
    return {name: row_spec(array) for name, (array, _) in held.items()}


def dtype_name(array: mx.array) -> str:
    """Return the safetensors name of an array's dtype.

    Raises:
        UnsupportedCacheError: It has none that a store keeps.
    """
    name = _DTYPE_NAMES.get(array.dtype)
    if name is None:
        raise UnsupportedCacheError(f"{array.dtype} cannot be stored")
    return name


def make_layout(name: str, specs: Mapping[str, RowSpec], **params: int) -> LayerLayout:
    """Return the layout of a layer, with its parameters in the order of their names."""
    return LayerLayout(name, tuple(sorted(params.items())), tuple(specs.items()))


def rows_of(group: Group, name: str, first: int, last: int) -> Rows:
    """Return tokens `first` to `last` of one array of some layers."""
    spec = group.spec(name)
    shape = (len(group.layers), spec.num_heads, last - first, spec.head_dim)
    return Rows(name, first, shape, spec.dtype, group.layers)
