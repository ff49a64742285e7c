"""What each cache class keeps for a token, and how a cache is built from it again.

One small class per kind of cache. All of these are append-only: a token adds a row to
each array, and the rows of earlier tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import mlx.core as mx

from .codecs import MLX_DTYPES
from .errors import UnsupportedCacheError
from .types import LayerLayout, RowSpec

_DTYPE_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
# mlx-lm's caches grow by so many rows at a time.
_STEP = 256
_SINKS = 4

Arrays = Mapping[str, mx.array]
"""Rows by name, shape ``(1, H, rows, D)``."""


class Kind(Protocol):
    """One class of cache."""

    name: str
    """Of the class."""

    array_names: tuple[str, ...]
    """What it keeps, in the order in which it is stored."""

    def owns(self, cache: Any) -> bool:
        """Say whether a cache is of this very class; a subclass may keep more."""

    def read(self, cache: Any) -> LayerLayout:
        """Return the layout of a cache that has rows."""

    def arrays(self, cache: Any) -> dict[str, mx.array]:
        """Return its buffers, with at least the rows of all tokens."""

    def build(self, layout: LayerLayout, arrays: Arrays, num_tokens: int) -> Any:
        """Return a cache that owns these buffers."""


class PlainRows:
    """``KVCache``: keys and values as they are."""

    name = "KVCache"
    array_names: tuple[str, ...] = ("k", "v")

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``KVCache``."""
        from mlx_lm.models.cache import KVCache

        return type(cache) is KVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions and dtype of keys and values."""
        rows = {name: _spec(array) for name, array in self.arrays(cache).items()}
        return _layout(self.name, rows)

    def arrays(self, cache: Any) -> dict[str, mx.array]:
        """Return keys and values."""
        return {"k": cache.keys, "v": cache.values}

    def build(self, layout: LayerLayout, arrays: Arrays, num_tokens: int) -> Any:
        """Return a ``KVCache``."""
        from mlx_lm.models.cache import KVCache

        cache: Any = KVCache()
        cache.keys, cache.values = arrays["k"], arrays["v"]
        cache.offset = num_tokens
        return cache


class ConcatenatedRows(PlainRows):
    """``ConcatenateKVCache``: the same without room to grow."""

    name = "ConcatenateKVCache"

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``ConcatenateKVCache``."""
        from mlx_lm.models.cache import ConcatenateKVCache

        return type(cache) is ConcatenateKVCache

    def build(self, layout: LayerLayout, arrays: Arrays, num_tokens: int) -> Any:
        """Return a ``ConcatenateKVCache``, whose arrays are as long as its offset."""
        from mlx_lm.models.cache import ConcatenateKVCache

        cache: Any = ConcatenateKVCache()
        cache.keys, cache.values = (arrays[n][..., :num_tokens, :] for n in ("k", "v"))
        cache.offset = num_tokens
        return cache


class AffineRows:
    """``QuantizedKVCache``: packed codes, scales and biases, bit for bit."""

    name = "QuantizedKVCache"
    array_names: tuple[str, ...] = tuple(
        f"{side}.{part}" for side in "kv" for part in ("codes", "scales", "biases")
    )

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        return type(cache) is QuantizedKVCache

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, with group size and bits."""
        rows = {name: _spec(array) for name, array in self.arrays(cache).items()}
        return _layout(self.name, rows, bits=cache.bits, group_size=cache.group_size)

    def arrays(self, cache: Any) -> dict[str, mx.array]:
        """Return codes, scales and biases of both sides."""
        return dict(zip(self.array_names, (*cache.keys, *cache.values), strict=True))

    def build(self, layout: LayerLayout, arrays: Arrays, num_tokens: int) -> Any:
        """Return a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        params = dict(layout.params)
        cache: Any = QuantizedKVCache(params["group_size"], params["bits"])
        ordered = [arrays[name] for name in self.array_names]
        # Lists, since mlx-lm assigns to their items.
        cache.keys, cache.values = ordered[:3], ordered[3:]
        cache.offset = num_tokens
        return cache


class TurboRows:
    """``TurboQuantKVCache``: its own codes, never decoded and encoded again."""

    name = "TurboQuantKVCache"
    array_names: tuple[str, ...] = tuple(
        f"{side}.{part}" for side in "kv" for part in ("sinks", "codes", "norms")
    )

    def owns(self, cache: Any) -> bool:
        """Say whether it is a ``TurboQuantKVCache``; asking imports nothing."""
        return type(cache).__module__ == "turboquant.kv_cache"

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, as far as the sinks tell; there may be no codes yet."""
        rows: dict[str, RowSpec] = {}
        for side, held in self._sides(cache):
            sinks = _spec(held.sinks)
            heads, dim = sinks.num_heads, sinks.head_dim
            rows[f"{side}.sinks"] = RowSpec(heads, dim, sinks.dtype, 0, _SINKS)
            rows[f"{side}.codes"] = RowSpec(heads, dim * held.bits // 8, "U8", _SINKS)
            rows[f"{side}.norms"] = RowSpec(heads, 1, "F32", _SINKS)
        bits = {f"{side}_bits": held.bits for side, held in self._sides(cache)}
        return _layout(self.name, rows, **bits)

    def arrays(self, cache: Any) -> dict[str, mx.array]:
        """Return sinks, codes and norms of both sides."""
        found: dict[str, mx.array] = {}
        for side, held in self._sides(cache):
            found[f"{side}.sinks"] = held.sinks
            if held.codes is not None:
                found[f"{side}.codes"] = held.codes
                found[f"{side}.norms"] = held.norms[..., None]
        return found

    def build(self, layout: LayerLayout, arrays: Arrays, num_tokens: int) -> Any:
        """Return a ``TurboQuantKVCache``."""
        from turboquant.kv_cache import TurboQuantKVCache

        params = dict(layout.params)
        cache = TurboQuantKVCache(params["k_bits"], params["v_bits"])
        for side, held in self._sides(cache):
            held.sinks = arrays[f"{side}.sinks"][:, :, :num_tokens]
            if num_tokens > _SINKS:
                held.codes = arrays[f"{side}.codes"]
                held.norms = arrays[f"{side}.norms"][..., 0]
        cache.offset = num_tokens
        return cache

    def _sides(self, cache: Any) -> Iterable[tuple[str, Any]]:
        return (("k", cache.coded_keys), ("v", cache.coded_values))


KINDS: tuple[Kind, ...] = (PlainRows(), ConcatenatedRows(), AffineRows(), TurboRows())


def kind_named(name: str) -> Kind:
    """Return the kind of a cache class.

    Raises:
        ValueError: There is none.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"class {name!r}")


def kind_of(number: int, cache: Any) -> Kind:
    """Return the kind of one layer's cache.

    Raises:
        UnsupportedCacheError: It is of a class that cannot be stored.
    """
    for kind in KINDS:
        if kind.owns(cache):
            return kind
    names = ", ".join(kind.name for kind in KINDS)
    raise UnsupportedCacheError(
        f"layer {number} is a {type(cache).__name__}, which cannot be stored",
        hint=f"models whose layers are all of these can be stored: {names}",
    )


def capacity(num_tokens: int) -> int:
    """Return the rows of a buffer for so many tokens and the next, in whole steps."""
    return (num_tokens // _STEP + 1) * _STEP


def _spec(array: mx.array) -> RowSpec:
    """Return heads, dimension and dtype of a buffer of one sequence."""
    batch, heads, _, dim = array.shape
    if batch != 1:
        raise ValueError(f"a batch of {batch}; store each by itself")
    if array.dtype not in _DTYPE_NAMES:
        raise UnsupportedCacheError(f"rows of {array.dtype} cannot be stored")
    return RowSpec(heads, dim, _DTYPE_NAMES[array.dtype])


def _layout(name: str, rows: Mapping[str, RowSpec], **params: int) -> LayerLayout:
    return LayerLayout(name, tuple(sorted(params.items())), tuple(rows.items()))
