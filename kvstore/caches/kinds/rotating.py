"""RotatingKVCache: the last rows of a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..layout import LayerLayout, RowSpec
from .base import CacheKind, make_layout, row_spec
from .saved import (
    FROM_0_28_1,
    IN_0_31,
    IN_0_32,
    TO_0_28_0,
    FileArrays,
    FileForm,
    SavedCache,
    float_pair,
)

if TYPE_CHECKING:
    from .base import Buffers, Held


class RotatingRows(CacheKind):
    """``RotatingKVCache``: the first ``keep`` rows and a window, in temporal order.

    Once it has wrapped in place, its write position is kept too: attention over rows
    in another order differs in the last bit.
    """

    name = "RotatingKVCache"
    is_exact = True
    stands_for = "KVCache"  # `--max-kv-size`
    fixed_by_model = ("max_size", "keep")
    forms = (
        FileForm(
            frozenset((TO_0_28_0,)), ("keep", "max_size", "step", "offset", "_idx")
        ),
        FileForm(
            frozenset((FROM_0_28_1, IN_0_31)), ("keep", "max_size", "offset", "_idx")
        ),
        FileForm(frozenset((IN_0_32,)), ("offset", "keep", "max_size", "_idx")),
    )

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``RotatingKVCache``."""
        from mlx_lm.models.cache import RotatingKVCache

        return type(cache) is RotatingKVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions and dtype, window and keep."""
        specs: dict[str, RowSpec] = {}
        if cache.keys is not None:
            for side, array in (("k", cache.keys), ("v", cache.values)):
                spec = row_spec(array)
                shape = (spec.num_heads, spec.head_dim, spec.dtype)
                if cache.keep:
                    specs[f"{side}.keep"] = RowSpec(*shape, 0, cache.keep)
                window = RowSpec(*shape, cache.keep, None, "window")
                specs[f"{side}.window"] = window
            specs["index"] = RowSpec(1, 1, "U32", kind="mark")
        return make_layout(self.name, specs, keep=cache.keep, max_size=cache.max_size)

    def held(self, cache: Any) -> Held:
        """Return the rows that are still there, in temporal order."""
        if cache.keys is None:
            return {}
        found: Held = {}
        for side, array in (("k", cache.keys), ("v", cache.values)):
            rows = cache._temporal_order(array)[:, :, : cache.offset]
            first = cache.offset - rows.shape[2] + cache.keep
            if cache.keep:
                found[f"{side}.keep"] = (rows[:, :, : cache.keep], 0)
            found[f"{side}.window"] = (rows[:, :, cache.keep :], first)
        if cache.offset > cache.keys.shape[2] > cache._idx:
            index = mx.array([cache._idx], mx.uint32).reshape(1, 1, 1, 1)
            found["index"] = (index, cache.offset)
        return found

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Return where the window of ``max_size`` rows, less ``keep``, begins."""
        params = dict(layout.params)
        keep = params["keep"]
        return max(keep, num_tokens - (params["max_size"] - keep))

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``RotatingKVCache``, rolled to where it had wrapped."""
        from mlx_lm.models.cache import RotatingKVCache

        params = dict(layout.params)
        cache: Any = RotatingKVCache(params["max_size"], params["keep"])
        if not buffers:
            return cache
        keep = params["keep"]
        sides = []
        for side in ("k", "v"):
            window = buffers[f"{side}.window"]
            kept = [buffers[f"{side}.keep"][:, :, :num_tokens]] if keep else []
            sides.append(mx.concatenate([*kept, window], axis=2))
        cache.offset, cache._idx = num_tokens, sides[0].shape[2]
        index = int(np.asarray(buffers["index"]).item()) if "index" in buffers else -1
        # Anything else is no place where it could have wrapped.
        if cache._idx == params["max_size"] > index >= keep:
            cache._idx = index
            sides = [_rolled(side, keep, cache._idx) for side in sides]
        cache.keys, cache.values = sides
        return cache

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache with its rows in the order that they have in the file."""
        from mlx_lm.models.cache import RotatingKVCache

        numbers = saved.numbers
        offset, keep = numbers["offset"], numbers["keep"]
        max_size, index = numbers["max_size"], numbers["_idx"]
        has_rows = saved.has_rows()
        if not keep < max_size:
            raise ValueError(f"a window of {max_size} that keeps {keep}")
        cache: Any = RotatingKVCache(max_size, keep)
        if not has_rows:
            return cache
        keys, values = float_pair(saved)
        num_rows = keys.shape[2]
        # Rows lie in temporal order up to the end, or have wrapped at the index.
        is_whole = offset <= num_rows and index == offset
        is_wrapped = num_rows < offset and max(keep, 1) <= index <= num_rows
        if not is_whole and not (is_wrapped and num_rows >= max_size):
            raise ValueError(
                f"a window of {num_rows} rows, {offset} tokens, index {index}"
            )
        if is_wrapped and index < num_rows and num_rows != max_size:
            raise ValueError(f"a window of {num_rows} rows that wrapped at {max_size}")
        cache.keys, cache.values = (data.read(t)[:, :, :offset] for t in (keys, values))
        cache.offset, cache._idx = offset, index
        return cache


def _rolled(rows: mx.array, keep: int, index: int) -> mx.array:
    """Return rows in temporal order as a cache that wrote up to ``index`` has them."""
    newest = rows.shape[2] - (index - keep)
    parts = [rows[:, :, :keep], rows[:, :, newest:], rows[:, :, keep:newest]]
    return mx.concatenate(parts, axis=2)
