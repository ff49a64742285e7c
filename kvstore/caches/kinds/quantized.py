"""QuantizedKVCache: affine codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layout import LayerLayout
from .base import make_layout, row_specs
from .plain import PlainRows

if TYPE_CHECKING:
    from .base import Buffers, Held


class AffineRows(PlainRows):
    """``QuantizedKVCache``: packed codes, scales and biases, bit for bit."""

    name = "QuantizedKVCache"
    is_exact = False
    _names = tuple(f"{s}.{p}" for s in "kv" for p in ("codes", "scales", "biases"))

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        return type(cache) is QuantizedKVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, with group size and bits."""
        specs = row_specs(self.held(cache))
        return make_layout(
            self.name, specs, bits=cache.bits, group_size=cache.group_size
        )

    def held(self, cache: Any) -> Held:
        """Return codes, scales and biases of both sides."""
        if cache.keys is None:
            return {}
        arrays = zip(self._names, (*cache.keys, *cache.values), strict=True)
        return {name: (array, 0) for name, array in arrays}

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        params = dict(layout.params)
        cache: Any = QuantizedKVCache(params["group_size"], params["bits"])
        if buffers:
            ordered = [buffers[name] for name in self._names]
            # Lists, since mlx-lm assigns to their items.
            cache.keys, cache.values = ordered[:3], ordered[3:]
            cache.offset = num_tokens
        return cache
