"""ChunkedKVCache: the rows of the newest chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedCacheError
from ..layout import LayerLayout, RowSpec
from .base import CacheKind, make_layout, row_spec
from .saved import (
    BEFORE_0_32,
    IN_0_32,
    FileArrays,
    FileForm,
    SavedCache,
    first_rows,
    float_pair,
)

if TYPE_CHECKING:
    from .base import Buffers, Held


class ChunkedRows(CacheKind):
    """``ChunkedKVCache``: the rows from ``start_position`` on."""

    name = "ChunkedKVCache"
    is_exact = True
    fixed_by_model = ("chunk_size",)
    forms = (
        FileForm(BEFORE_0_32, ("chunk_size", "start_position")),
        FileForm(frozenset((IN_0_32,)), ("offset", "chunk_size", "start_position")),
    )

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``ChunkedKVCache``."""
        from mlx_lm.models.cache import ChunkedKVCache

        return type(cache) is ChunkedKVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions, dtype and the length of a chunk.

        Raises:
            UnsupportedCacheError: It holds fewer rows than attention needs.
        """
        specs = {}
        if cache.keys is not None:
            # mlx-lm 0.31 lets go of rows where the end of its buffer is empty.
            num_rows = cache.offset - cache.start_position
            if num_rows < min(cache.offset, cache.chunk_size):
                raise UnsupportedCacheError(
                    f"{num_rows} rows are left of {cache.chunk_size}; mlx-lm before"
                    " 0.32 drops too many"
                )
            for side, array in (("k", cache.keys), ("v", cache.values)):
                spec = row_spec(array)
                shape = (spec.num_heads, spec.head_dim, spec.dtype)
                specs[f"{side}.window"] = RowSpec(*shape, 0, None, "window")
        return make_layout(self.name, specs, chunk_size=cache.chunk_size)

    def held(self, cache: Any) -> Held:
        """Return the rows that are still there."""
        if cache.keys is None:
            return {}
        rows = cache.offset - cache.start_position
        sides = (("k", cache.keys), ("v", cache.values))
        return {
            f"{side}.window": (array[:, :, :rows], cache.start_position)
            for side, array in sides
        }

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Return where the last ``chunk_size`` rows begin."""
        return max(0, num_tokens - dict(layout.params)["chunk_size"])

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``ChunkedKVCache``."""
        from mlx_lm.models.cache import ChunkedKVCache

        cache: Any = ChunkedKVCache(dict(layout.params)["chunk_size"])
        if buffers:
            cache.keys, cache.values = buffers["k.window"], buffers["v.window"]
            cache.offset = num_tokens
            cache.start_position = num_tokens - cache.keys.shape[2]
        return cache

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache of the rows between its start and its offset."""
        from mlx_lm.models.cache import ChunkedKVCache

        start = saved.numbers["start_position"]
        cache: Any = ChunkedKVCache(saved.numbers["chunk_size"])
        if not saved.has_rows():
            return cache
        keys, values = float_pair(saved)
        # The releases before 0.32 forget the offset; other layers tell it.
        offset = saved.numbers.get("offset", num_tokens)
        if start >= offset or offset - start < min(offset, saved.numbers["chunk_size"]):
            raise ValueError(f"rows of {offset} tokens from {start} on")
        rows = first_rows(offset - start, keys.shape[2])
        cache.keys, cache.values = (data.read(t)[:, :, rows] for t in (keys, values))
        cache.offset, cache.start_position = offset, start
        return cache
