"""KVCache and ConcatenateKVCache: one row a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..layout import LayerLayout
from .base import CacheKind, make_layout, row_specs
from .saved import (
    BEFORE_0_32,
    IN_0_32,
    FileArrays,
    FileForm,
    SavedCache,
    first_rows,
    float_pair,
    rows_shape,
)

if TYPE_CHECKING:
    from .base import Buffers, Held


class PlainRows(CacheKind):
    """``KVCache``: keys and values as they are."""

    name = "KVCache"
    is_exact = True
    is_cuttable = True
    forms: tuple[FileForm, ...] = (
        FileForm(BEFORE_0_32),
        FileForm(frozenset((IN_0_32,)), ("offset",)),
    )

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``KVCache``."""
        from mlx_lm.models.cache import KVCache

        return type(cache) is KVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions and dtype of keys and values."""
        return make_layout(self.name, row_specs(self.held(cache)))

    def held(self, cache: Any) -> Held:
        """Return keys and values, but not those of no dimension."""
        if cache.keys is None:
            return {}
        sides = {"k": (cache.keys, 0), "v": (cache.values, 0)}
        return {name: side for name, side in sides.items() if side[0].shape[3]}

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``KVCache``."""
        from mlx_lm.models.cache import KVCache

        cache: Any = KVCache()
        if buffers:
            cache.keys = buffers["k"]
            cache.values = buffers["v"] if "v" in buffers else _no_values(cache.keys)
            cache.offset = num_tokens
        return cache

    def parse_older(self, state: Any, numbers: Mapping[str, int]) -> SavedCache:
        """Return a cache whose offset is the number of its rows, if it names none."""
        saved = super().parse_older(state, numbers)
        if "offset" in numbers:
            return saved
        offset = rows_shape(saved.arrays[0])[2]
        return SavedCache(self.name, saved.arrays, {**numbers, "offset": offset})

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache of the rows up to its offset."""
        layout = make_layout(self.name, {})
        if not saved.has_rows():
            return self.build(layout, {}, 0)
        keys, values = float_pair(saved)
        offset = saved.numbers["offset"]
        rows = first_rows(offset, keys.shape[2])
        sides = {"k": data.read(keys)[:, :, rows], "v": data.read(values)[:, :, rows]}
        return self.build(layout, sides, offset)


class ConcatenatedRows(PlainRows):
    """``ConcatenateKVCache``: the same without room to grow."""

    name = "ConcatenateKVCache"
    is_cuttable = False  # `trim` leaves the rows in its arrays, before the next ones
    forms = ()

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``ConcatenateKVCache``."""
        from mlx_lm.models.cache import ConcatenateKVCache

        return type(cache) is ConcatenateKVCache

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``ConcatenateKVCache``, whose arrays are as long as its offset."""
        from mlx_lm.models.cache import ConcatenateKVCache

        cache: Any = ConcatenateKVCache()
        if buffers:
            cache.keys = buffers["k"][..., :num_tokens, :]
            cache.values = buffers["v"][..., :num_tokens, :]
            cache.offset = num_tokens
        return cache


def _no_values(keys: mx.array) -> mx.array:
    """Return values of no dimension: an indexer has keys only."""
    found = mx.zeros((*keys.shape[:3], 0), keys.dtype)
    # Nothing is held of it, so nobody else sees to it that another thread finds it
    # computed.
    mx.eval(found)
    return found
