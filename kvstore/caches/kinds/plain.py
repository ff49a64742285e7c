"""KVCache and ConcatenateKVCache: one row a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layout import LayerLayout
from .base import make_layout, row_specs

if TYPE_CHECKING:
    from .base import Buffers, Held


class PlainRows:
    """``KVCache``: keys and values as they are."""

    name = "KVCache"
    is_exact = True

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``KVCache``."""
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

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Say that it has no window."""
        return 0

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``KVCache``."""
        from mlx_lm.models.cache import KVCache

        cache: Any = KVCache()
        if buffers:
            cache.keys = buffers["k"]
            # An indexer has keys only.
            cache.values = buffers.get("v", cache.keys[..., :0])
            cache.offset = num_tokens
        return cache


class ConcatenatedRows(PlainRows):
    """``ConcatenateKVCache``: the same without room to grow."""

    name = "ConcatenateKVCache"

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``ConcatenateKVCache``."""
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
