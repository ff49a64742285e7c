"""TurboQuantKVCache: TurboQuant codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..layout import LayerLayout, RowSpec, Shapes
from .base import make_layout, row_spec
from .plain import PlainRows

if TYPE_CHECKING:
    from .base import Buffers, Held

# Leading tokens whose rows `TurboQuantKVCache` keeps uncoded: attention rests on them.
_SINKS = 4


class TurboRows(PlainRows):
    """``TurboQuantKVCache``: its own codes, never decoded and encoded again."""

    name = "TurboQuantKVCache"
    is_exact = False
    forms = ()

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``TurboQuantKVCache``; asking imports nothing."""
        return type(cache).__module__ == "turboquant.kv_cache"

    def bits(self, cache: Any) -> int:
        """Return those of keys or of values."""
        return int(min(side.bits for _, side in self._sides(cache)))

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, as far as the sinks tell; there may be no codes yet."""
        specs: dict[str, RowSpec] = {}
        bits = {f"{side}_bits": held.bits for side, held in self._sides(cache)}
        if cache.empty():
            return make_layout(self.name, specs, **bits)
        for side, held in self._sides(cache):
            sinks = row_spec(held.sinks)
            heads, dim = sinks.num_heads, sinks.head_dim
            specs[f"{side}.sinks"] = RowSpec(heads, dim, sinks.dtype, 0, _SINKS)
            specs[f"{side}.codes"] = RowSpec(heads, dim * held.bits // 8, "U8", _SINKS)
            specs[f"{side}.norms"] = RowSpec(heads, 1, "F32", _SINKS)
        return make_layout(self.name, specs, **bits)

    def held(self, cache: Any) -> Held:
        """Return sinks, codes and norms of both sides."""
        found: Held = {}
        for side, held in self._sides(cache):
            if held.sinks is not None:
                found[f"{side}.sinks"] = (held.sinks, 0)
            if held.codes is not None:
                found[f"{side}.codes"] = (held.codes, _SINKS)
                found[f"{side}.norms"] = (held.norms[..., None], _SINKS)
        return found

    def shapes(self, layout: LayerLayout) -> Shapes:
        """Return what the sinks are, which are not coded."""
        return super().shapes(
            replace(layout, rows=tuple(r for r in layout.rows if "sinks" in r[0]))
        )

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``TurboQuantKVCache``."""
        from turboquant.kv_cache import TurboQuantKVCache

        params = dict(layout.params)
        cache = TurboQuantKVCache(params["k_bits"], params["v_bits"])
        if not buffers:
            return cache
        for side, held in self._sides(cache):
            held.sinks = buffers[f"{side}.sinks"][:, :, :num_tokens]
            if num_tokens > _SINKS:
                held.codes = buffers[f"{side}.codes"]
                held.norms = buffers[f"{side}.norms"][..., 0]
        cache.offset = num_tokens
        return cache

    def _sides(self, cache: Any) -> Iterable[tuple[str, Any]]:
        return (("k", cache.coded_keys), ("v", cache.coded_values))
