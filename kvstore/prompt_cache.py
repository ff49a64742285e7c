"""Prompt caches to rows per block, and back. The only file that touches mlx-lm caches.

Live caches are read by their attributes and only up to ``offset``: rows past it are
somebody's trimmed conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .errors import IntegrityError, UnsupportedCacheError
from .types import JSON, LayerLayout, Layout, Provenance, RowSpec, Side

Array = npt.NDArray[np.generic]

PromptCache = list[Any]
"""mlx-lm's list of per-layer caches."""

SIDES: tuple[Side, Side] = ("k", "v")

_MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _MLX_DTYPES.items()}
_MAX_LAYERS = 4096
_MAX_DIM = 65_536
# mlx-lm's KVCache grows by so many rows at a time.
_STEP = 256
# The attribute that carries a restored cache's provenance; copies keep it.
_PROVENANCE = "kvstore_provenance"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of equal layout, which are stacked into one tensor.

    Attributes:
        layout: The layout that they share.
        layers: Their numbers.
    """

    layout: LayerLayout
    layers: tuple[int, ...]

    def spec(self, side: Side) -> RowSpec:
        """Return what a token adds to one side."""
        return side_spec(self.layout, side)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token adds to all of these layers."""
        specs = (self.layout.keys, self.layout.values)
        one = sum(s.num_heads * s.head_dim * _MLX_DTYPES[s.dtype].size for s in specs)
        return one * len(self.layers)


def group_layers(layout: Layout) -> list[Group]:
    """Return the groups of a layout, in the order of their first layers."""
    members: dict[LayerLayout, list[int]] = {}
    for number, layer in enumerate(layout):
        members.setdefault(layer, []).append(number)
    return [Group(layer, tuple(numbers)) for layer, numbers in members.items()]


def read_layout(prompt_cache: Sequence[Any], num_tokens: int) -> Layout:
    """Return how a prompt cache is built.

    Args:
        prompt_cache: mlx-lm's caches, one per layer.
        num_tokens: How many tokens' rows it must hold.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``num_tokens`` rows.
    """
    if not prompt_cache:
        raise ValueError("the prompt cache has no layers")
    layers = [_read_layer(i, cache) for i, cache in enumerate(prompt_cache)]
    for number, cache in enumerate(prompt_cache):
        if cache.offset != num_tokens:
            raise ValueError(
                f"layer {number} holds {cache.offset} rows for {num_tokens} tokens"
            )
    return tuple(layers)


def check_classes(prompt_cache: Sequence[Any]) -> None:
    """Refuse a prompt cache that cannot be stored, before anything is in it.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
    """
    for number, cache in enumerate(prompt_cache):
        _check_class(number, cache)


def layout_classes(prompt_cache: Sequence[Any]) -> tuple[str, ...]:
    """Return the class of each layer's cache; it may be empty still."""
    return tuple(type(cache).__name__ for cache in prompt_cache)


def split(
    prompt_cache: Sequence[Any], group: Group, side: Side, start: int, stop: int
) -> Array:
    """Return rows of some layers as NumPy holds them, shape ``(L, H, T, D)``.

    They are evaluated here, on the caller's thread.
    """
    caches = [prompt_cache[number] for number in group.layers]
    arrays = [cache.keys if side == "k" else cache.values for cache in caches]
    rows = mx.stack([array[0, :, start:stop, :] for array in arrays])
    if rows.dtype == mx.bfloat16:
        rows = rows.view(mx.uint16)
    mx.eval(rows)
    return np.asarray(rows)


def read_provenance(prompt_cache: Sequence[Any]) -> Provenance:
    """Return what a prompt cache remembers; a computed one has nothing lossy."""
    marks = [getattr(cache, _PROVENANCE, Provenance()) for cache in prompt_cache]
    return Provenance(
        max(mark.coded_tokens for mark in marks), all(mark.is_exact for mark in marks)
    )


class Restoring:
    """A prompt cache being rebuilt, layer by layer, in the buffers it will own.

    Args:
        layout: How it is built.
        num_tokens: How many tokens' rows there will be.

    Attributes:
        capacity: Rows in each buffer: whole steps, and room for the next token.
    """

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self.capacity = (num_tokens // _STEP + 1) * _STEP
        self._arrays = [
            {side: self._allocate(side_spec(layer, side)) for side in SIDES}
            for layer in layout
        ]
        mx.eval(self._arrays)
        # MLX shares its memory with NumPy, and nothing has read the arrays yet.
        self._views: list[dict[Side, Array]] = [
            {side: np.asarray(array)[0] for side, array in arrays.items()}
            for arrays in self._arrays
        ]

    def rows(self, layer: int, side: Side, start: int, stop: int) -> Array:
        """Return a writable view of rows, shape ``(H, stop - start, D)``."""
        return self._views[layer][side][:, start:stop, :]

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Return the prompt cache with ``num_tokens`` rows.

        Args:
            num_tokens: Rows that have been written.
            provenance: What they went through.
        """
        from mlx_lm.models.cache import KVCache

        # Without the views, a cache is the only owner and grows in place.
        self._views.clear()
        restored: PromptCache = []
        for layer, arrays in zip(self._layout, self._arrays, strict=True):
            cache: Any = KVCache()
            cache.keys = _as_dtype(arrays.pop("k"), layer.keys.dtype)
            cache.values = _as_dtype(arrays.pop("v"), layer.values.dtype)
            cache.offset = num_tokens
            setattr(cache, _PROVENANCE, provenance)
            restored.append(cache)
        mx.eval([(cache.keys, cache.values) for cache in restored])
        return restored

    def _allocate(self, spec: RowSpec) -> mx.array:
        dtype = mx.uint16 if spec.dtype == "BF16" else _MLX_DTYPES[spec.dtype]
        return mx.zeros((1, spec.num_heads, self.capacity, spec.head_dim), dtype)


def side_spec(layer: LayerLayout, side: Side) -> RowSpec:
    """Return what a token adds to one side of a layer."""
    return layer.keys if side == "k" else layer.values


def layout_to_json(layout: Layout) -> list[JSON]:
    """Return a layout as a JSON value."""
    return [
        {
            "class": layer.cache_class,
            "k": [layer.keys.num_heads, layer.keys.head_dim, layer.keys.dtype],
            "v": [layer.values.num_heads, layer.values.head_dim, layer.values.dtype],
        }
        for layer in layout
    ]


def layout_from_json(value: Any) -> Layout:
    """Return the layout that a JSON value describes.

    Raises:
        IntegrityError: It describes none.
    """
    try:
        if not 0 < len(value) <= _MAX_LAYERS:
            raise ValueError(f"{len(value)} layers")
        return tuple(_layer_from_json(layer) for layer in value)
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"a shard's layout cannot be read: {error}") from error


def _layer_from_json(value: JSON) -> LayerLayout:
    if value["class"] != "KVCache":
        raise ValueError(f"class {value['class']!r}")
    return LayerLayout(
        "KVCache", _spec_from_json(value["k"]), _spec_from_json(value["v"])
    )


def _spec_from_json(value: Any) -> RowSpec:
    heads, dim, dtype = value
    if dtype not in _MLX_DTYPES:
        raise ValueError(f"dtype {dtype!r}")
    if type(heads) is not int or type(dim) is not int:
        raise ValueError("a size is not an integer")
    if not (0 < heads <= _MAX_DIM and 0 < dim <= _MAX_DIM):
        raise ValueError(f"{heads} heads of dimension {dim}")
    return RowSpec(heads, dim, dtype)


def _check_class(number: int, cache: Any) -> None:
    from mlx_lm.models.cache import KVCache

    # A subclass may keep more than keys and values, so the class itself only.
    if type(cache) is not KVCache:
        raise UnsupportedCacheError(
            f"layer {number} is a {type(cache).__name__}, which cannot be stored",
            hint="models whose layers are all KVCache can be stored",
        )


def _read_layer(number: int, cache: Any) -> LayerLayout:
    """Return the layout of one layer's cache."""
    _check_class(number, cache)
    if cache.keys is None or cache.values is None:
        raise ValueError(f"layer {number} is empty")
    return LayerLayout(
        "KVCache", _read_spec(number, cache.keys), _read_spec(number, cache.values)
    )


def _read_spec(number: int, array: mx.array) -> RowSpec:
    batch, heads, _, dim = array.shape
    if batch != 1:
        raise ValueError(f"layer {number} is a batch of {batch}; store each by itself")
    if array.dtype not in _DTYPE_NAMES:
        raise UnsupportedCacheError(f"layer {number} holds {array.dtype}")
    return RowSpec(heads, dim, _DTYPE_NAMES[array.dtype])


def _as_dtype(array: mx.array, dtype: str) -> mx.array:
    """Return the bits of ``array`` as the dtype that they are of."""
    return array.view(mx.bfloat16) if dtype == "BF16" else array
