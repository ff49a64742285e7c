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

from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .codecs import MLX_DTYPES
from .errors import UnsupportedCacheError
from .types import LayerLayout, RowSpec

_DTYPE_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
# mlx-lm's caches grow by so many rows at a time.
_STEP = 256
_SINKS = 4
_MAX_STATES = 4096

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
        return _layout(self.name, _row_specs(self.held(cache)))

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
        specs = _row_specs(self.held(cache))
        return _layout(self.name, specs, bits=cache.bits, group_size=cache.group_size)

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


class TurboRows(PlainRows):
    """``TurboQuantKVCache``: its own codes, never decoded and encoded again."""

    name = "TurboQuantKVCache"
    is_exact = False

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``TurboQuantKVCache``; asking imports nothing."""
        return type(cache).__module__ == "turboquant.kv_cache"

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, as far as the sinks tell; there may be no codes yet."""
        specs: dict[str, RowSpec] = {}
        bits = {f"{side}_bits": held.bits for side, held in self._sides(cache)}
        if cache.empty():
            return _layout(self.name, specs, **bits)
        for side, held in self._sides(cache):
            sinks = _row_spec(held.sinks)
            heads, dim = sinks.num_heads, sinks.head_dim
            specs[f"{side}.sinks"] = RowSpec(heads, dim, sinks.dtype, 0, _SINKS)
            specs[f"{side}.codes"] = RowSpec(heads, dim * held.bits // 8, "U8", _SINKS)
            specs[f"{side}.norms"] = RowSpec(heads, 1, "F32", _SINKS)
        return _layout(self.name, specs, **bits)

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


class RotatingRows:
    """``RotatingKVCache``: the first ``keep`` rows and a window, in temporal order.

    Once it has wrapped in place, its write position is kept too: attention over rows
    in another order differs in the last bit.
    """

    name = "RotatingKVCache"
    is_exact = True

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``RotatingKVCache``."""
        from mlx_lm.models.cache import RotatingKVCache

        return type(cache) is RotatingKVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions and dtype, window and keep."""
        specs: dict[str, RowSpec] = {}
        if cache.keys is not None:
            for side, array in (("k", cache.keys), ("v", cache.values)):
                spec = _row_spec(array)
                shape = (spec.num_heads, spec.head_dim, spec.dtype)
                if cache.keep:
                    specs[f"{side}.keep"] = RowSpec(*shape, 0, cache.keep)
                window = RowSpec(*shape, cache.keep, None, "window")
                specs[f"{side}.window"] = window
            specs["index"] = RowSpec(1, 1, "U32", kind="mark")
        return _layout(self.name, specs, keep=cache.keep, max_size=cache.max_size)

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


class ChunkedRows:
    """``ChunkedKVCache``: the rows from ``start_position`` on."""

    name = "ChunkedKVCache"
    is_exact = True

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``ChunkedKVCache``."""
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
                spec = _row_spec(array)
                shape = (spec.num_heads, spec.head_dim, spec.dtype)
                specs[f"{side}.window"] = RowSpec(*shape, 0, None, "window")
        return _layout(self.name, specs, chunk_size=cache.chunk_size)

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


class States:
    """``ArraysCache``: recurrent states, which cannot be cut."""

    name = "ArraysCache"
    is_exact = True

    def owns(self, cache: Any) -> bool:
        """Say whether it is an ``ArraysCache``."""
        from mlx_lm.models.cache import ArraysCache

        return type(cache) is ArraysCache

    def read(self, cache: Any) -> LayerLayout:
        """Return shape and dtype of each state that there is."""
        if cache.left_padding is not None or cache.lengths is not None:
            raise ValueError("a batch; store each by itself")
        specs = {}
        params = {"size": len(cache.cache)}
        for i, state in enumerate(cache.cache):
            if state is not None:
                specs[f"state{i}"] = _state_spec(state)
                params |= {f"shape{i}.{j}": n for j, n in enumerate(state.shape)}
        return _layout(self.name, specs, **params)

    def held(self, cache: Any) -> Held:
        """Return the states."""
        return {
            f"state{i}": (state.reshape(1, 1, 1, -1), 0)
            for i, state in enumerate(cache.cache)
            if state is not None
        }

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Say that it has no window."""
        return 0

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return an ``ArraysCache``."""
        from mlx_lm.models.cache import ArraysCache

        params = dict(layout.params)
        if params["size"] > _MAX_STATES:
            raise ValueError(f"{params['size']} states")
        cache: Any = ArraysCache(params["size"])
        for name, state in buffers.items():
            shape = _shape(params, name.removeprefix("state"))
            cache[int(name.removeprefix("state"))] = state.reshape(shape)
        return cache


_KINDS: list[Kind] = [
    PlainRows(),
    ConcatenatedRows(),
    AffineRows(),
    TurboRows(),
    RotatingRows(),
    ChunkedRows(),
    States(),
]


def register(kind: Kind) -> None:
    """Have the store keep a class of cache from outside mlx-lm.

    Derive from the kind here that is most like it, and say in ``owns`` which class is
    meant. What is stored bears the kind's ``name``; every process that loads it must
    register the kind too.

    Raises:
        ValueError: There is a kind of this name.
    """
    if any(known.name == kind.name for known in _KINDS):
        raise ValueError(f"there is a kind of cache named {kind.name!r} already")
    _KINDS.append(kind)


def kind_named(name: str) -> Kind:
    """Return the kind of a cache class.

    Raises:
        ValueError: There is none.
    """
    for kind in _KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"class {name!r}")


def kind_of(number: int, cache: Any) -> Kind:
    """Return the kind of one layer's cache.

    Raises:
        UnsupportedCacheError: It is of a class that cannot be stored.
    """
    for kind in _KINDS:
        if kind.owns(cache):
            return kind
    names = ", ".join(kind.name for kind in _KINDS)
    raise UnsupportedCacheError(
        f"layer {number} is a {type(cache).__name__}, which cannot be stored",
        hint=f"models whose layers are all of these can be stored: {names}",
    )


def capacity(num_tokens: int) -> int:
    """Return the rows of a buffer for so many tokens and the next, in whole steps."""
    return (num_tokens // _STEP + 1) * _STEP


def _row_spec(array: mx.array) -> RowSpec:
    """Return heads, dimension and dtype of a buffer of one sequence."""
    batch, heads, _, dim = array.shape
    if batch != 1:
        raise ValueError(f"a batch of {batch}; store each by itself")
    return RowSpec(heads, dim, _dtype_name(array))


def _row_specs(held: Held) -> dict[str, RowSpec]:
    return {name: _row_spec(array) for name, (array, _) in held.items()}


def _state_spec(array: mx.array) -> RowSpec:
    if array.shape[0] != 1:
        raise ValueError(f"a batch of {array.shape[0]}; store each by itself")
    return RowSpec(1, array.size, _dtype_name(array), kind="state")


def _dtype_name(array: mx.array) -> str:
    if array.dtype not in _DTYPE_NAMES:
        raise UnsupportedCacheError(f"{array.dtype} cannot be stored")
    return _DTYPE_NAMES[array.dtype]


def _shape(params: Mapping[str, int], number: str) -> tuple[int, ...]:
    """Return the shape of a state, which the layout holds a number at a time."""
    names = map(f"shape{number}.{{}}".format, count())
    return tuple(params[name] for name in takewhile(params.__contains__, names))


def _rolled(rows: mx.array, keep: int, index: int) -> mx.array:
    """Return rows in temporal order as a cache that wrote up to ``index`` has them."""
    newest = rows.shape[2] - (index - keep)
    parts = [rows[:, :, :keep], rows[:, :, newest:], rows[:, :, keep:newest]]
    return mx.concatenate(parts, axis=2)


def _layout(name: str, specs: Mapping[str, RowSpec], **params: int) -> LayerLayout:
    return LayerLayout(name, tuple(sorted(params.items())), tuple(specs.items()))
