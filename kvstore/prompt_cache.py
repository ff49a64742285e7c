"""Prompt caches to rows per block, and back.

With `layers.py`, which knows the cache classes, the only file that touches mlx-lm's
caches. Live caches are read by their attributes and only up to ``offset``: rows past it
are somebody's trimmed conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .codecs import MLX_DTYPES, Codec, Rows
from .errors import IntegrityError, UnsupportedCacheError
from .layers import capacity, kind_named, kind_of
from .types import JSON, LayerLayout, Layout, Provenance, RowSpec

Array = npt.NDArray[np.generic]

Parts = Mapping[str, Array]
"""The named arrays that a codec made of rows."""

PromptCache = list[Any]
"""mlx-lm's list of per-layer caches."""

CODABLE = ("k", "v")
"""The arrays that a lossy codec may code; all others are stored lossless."""

_MAX_LAYERS = 4096
_MAX_SIZE = 2**20
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

    def spec(self, name: str) -> RowSpec:
        """Return what a token adds to one array."""
        return dict(self.layout.rows)[name]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token adds to all of these layers."""
        one = sum(
            spec.num_heads * spec.head_dim * MLX_DTYPES[spec.dtype].size
            for _, spec in self.layout.rows
            if spec.end is None
        )
        return one * len(self.layers)


def group_layers(layout: Layout) -> list[Group]:
    """Return the groups of a layout, in the order of their first layers."""
    members: dict[LayerLayout, list[int]] = {}
    for number, layer in enumerate(layout):
        members.setdefault(layer, []).append(number)
    return [Group(layer, tuple(numbers)) for layer, numbers in members.items()]


def rows_in(group: Group, start: int, stop: int) -> Iterator[tuple[str, Rows]]:
    """Yield the arrays that have rows for some tokens, and which rows those are."""
    for name, spec in group.layout.rows:
        first = max(start, spec.begin)
        last = stop if spec.end is None else min(stop, spec.end)
        if first < last:
            shape = (len(group.layers), spec.num_heads, last - first, spec.head_dim)
            yield name, Rows(name, first, shape, spec.dtype)


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
    check_classes(prompt_cache)
    return tuple(
        _read_layer(number, cache, num_tokens)
        for number, cache in enumerate(prompt_cache)
    )


def read_provenance(prompt_cache: Sequence[Any]) -> Provenance:
    """Return what a prompt cache remembers; a computed one has nothing lossy."""
    marks = [getattr(cache, _PROVENANCE, Provenance()) for cache in prompt_cache]
    return Provenance(
        max(mark.coded_tokens for mark in marks), all(mark.is_exact for mark in marks)
    )


def check_classes(prompt_cache: Sequence[Any]) -> None:
    """Refuse a prompt cache that cannot be stored, before anything is in it.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
    """
    for number, cache in enumerate(prompt_cache):
        kind_of(number, cache)


def layout_classes(prompt_cache: Sequence[Any]) -> tuple[str, ...]:
    """Return the class of each layer's cache; it may be empty still."""
    return tuple(type(cache).__name__ for cache in prompt_cache)


def fits(layout: Layout, classes: Sequence[str], *, decoding: bool) -> bool:
    """Say whether caches of these classes can be had from a layout.

    Args:
        layout: How the stored cache is built.
        classes: The class wanted of each layer.
        decoding: A ``KVCache`` may be decoded from a ``TurboQuantKVCache``.
    """
    stored = [layer.cache_class for layer in layout]
    decodable = ("TurboQuantKVCache", "KVCache")
    return len(stored) == len(classes) and all(
        pair[0] == pair[1] or (decoding and pair == decodable)
        for pair in zip(stored, classes, strict=True)
    )


def convert(prompt_cache: PromptCache, classes: Sequence[str] | None) -> PromptCache:
    """Decode the caches of codes whose place a ``KVCache`` is wanted in."""
    if classes is None or tuple(classes) == layout_classes(prompt_cache):
        return prompt_cache
    converted: PromptCache = []
    for cache, wanted in zip(prompt_cache, classes, strict=True):
        if type(cache).__name__ == wanted:
            converted.append(cache)
            continue
        decoded = cache.to_kv_cache()
        mark = Provenance(coded_tokens=cache.offset, is_exact=False)
        setattr(decoded, _PROVENANCE, mark)
        converted.append(decoded)
    mx.eval([cache.state for cache in converted])
    return converted


def split(prompt_cache: Sequence[Any], group: Group, name: str, rows: Rows) -> Array:
    """Return rows of some layers as NumPy holds them, shape ``(L, H, T, D)``.

    They are evaluated here, on the caller's thread.
    """
    begin = group.spec(name).begin
    first, last = rows.start - begin, rows.start - begin + rows.shape[2]
    arrays = [
        kind_of(number, prompt_cache[number]).arrays(prompt_cache[number])[name]
        for number in group.layers
    ]
    stacked = mx.stack([array[0, :, first:last, :] for array in arrays])
    if stacked.dtype == mx.bfloat16:
        stacked = stacked.view(mx.uint16)
    mx.eval(stacked)
    return np.asarray(stacked)


class Restoring(Protocol):
    """A prompt cache being rebuilt, block by block."""

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode the rows of one array of one block up to token ``stop``."""

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Return the prompt cache with ``num_tokens`` rows.

        Args:
            num_tokens: Rows that have been written.
            provenance: What they went through.
        """


def start_restoring(layout: Layout, num_tokens: int) -> Restoring:
    """Return what rebuilds a prompt cache fastest on MLX's default device."""
    if mx.default_device() == mx.cpu:
        return HostRestoring(layout, num_tokens)
    return DeviceRestoring(layout, num_tokens)


class HostRestoring:
    """Decodes layer by layer, in NumPy, into the buffers that the caches will own.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        rows = capacity(num_tokens)
        self._arrays = [
            {name: _allocate(spec, rows) for name, spec in layer.rows}
            for layer in layout
        ]
        mx.eval(self._arrays)
        # MLX shares its memory with NumPy, and nothing has read the arrays yet.
        self._views: list[dict[str, Array]] = [
            {name: np.asarray(array)[0] for name, array in arrays.items()}
            for arrays in self._arrays
        ]

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode into the buffers."""
        begin = group.spec(rows.side).begin
        first, last = rows.start - begin, max(rows.start, stop) - begin
        for i, layer in enumerate(group.layers):
            out = self._views[layer][rows.side][:, first:last, :]
            codec.array.decode_into(parts, rows, i, out)

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Hand the buffers over."""
        # Without the views, a cache is the only owner and grows in place.
        self._views.clear()
        typed = [
            {name: _as_dtype(arrays.pop(name), spec.dtype) for name, spec in layer.rows}
            for layer, arrays in zip(self._layout, self._arrays, strict=True)
        ]
        return _build(self._layout, typed, num_tokens, provenance)


class DeviceRestoring:
    """Decodes all layers of a block at once, on MLX's device, and joins the blocks.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._num_rows = capacity(num_tokens)
        self._pieces: list[dict[str, list[mx.array]]] = [
            {name: [] for name, _ in layer.rows} for layer in layout
        ]

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode on the device, evaluated at once so that the codes can go."""
        decoded = codec.array.decode(parts, rows)
        pieces = [
            decoded[i : i + 1, :, : max(0, stop - rows.start)]
            for i in range(len(group.layers))
        ]
        mx.async_eval(pieces)
        for layer, piece in zip(group.layers, pieces, strict=True):
            self._pieces[layer][rows.side].append(piece)

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Join the blocks of each layer, with room for the next token."""
        joined = [
            {name: self._join(pieces.pop(name), spec) for name, spec in layer.rows}
            for layer, pieces in zip(self._layout, self._pieces, strict=True)
        ]
        return _build(self._layout, joined, num_tokens, provenance)

    def _join(self, pieces: list[mx.array], spec: RowSpec) -> mx.array:
        held = sum(piece.shape[2] for piece in pieces)
        last = self._num_rows if spec.end is None else min(self._num_rows, spec.end)
        shape = (1, spec.num_heads, last - spec.begin - held, spec.head_dim)
        room = mx.zeros(shape, MLX_DTYPES[spec.dtype])
        return mx.concatenate([*pieces, room], axis=2)


def _build(
    layout: Layout,
    arrays: Sequence[dict[str, mx.array]],
    num_tokens: int,
    provenance: Provenance,
) -> PromptCache:
    """Return caches that own these buffers, evaluated on this thread."""
    restored: PromptCache = []
    for layer, buffers in zip(layout, arrays, strict=True):
        cache = kind_named(layer.cache_class).build(layer, buffers, num_tokens)
        setattr(cache, _PROVENANCE, provenance)
        restored.append(cache)
    mx.eval([cache.state for cache in restored])
    return restored


def layout_to_json(layout: Layout) -> list[JSON]:
    """Return a layout as a JSON value."""
    return [
        {
            "class": layer.cache_class,
            "params": dict(layer.params),
            "rows": {
                name: [s.num_heads, s.head_dim, s.dtype, s.begin, s.end]
                for name, s in layer.rows
            },
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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"a shard's layout cannot be read: {error}") from error


def _layer_from_json(value: JSON) -> LayerLayout:
    kind = kind_named(value["class"])
    # In the kind's own order, since JSON objects are sorted on disk.
    rows = tuple(
        (name, _spec_from_json(value["rows"][name])) for name in kind.array_names
    )
    if len(rows) != len(value["rows"]):
        raise ValueError(f"a {kind.name} with other arrays than it has")
    params = tuple(sorted(value["params"].items()))
    if not all(type(number) is int for _, number in params):
        raise ValueError("a parameter is not an integer")
    return LayerLayout(kind.name, params, rows)


def _spec_from_json(value: Any) -> RowSpec:
    heads, dim, dtype, begin, end = value
    if dtype not in MLX_DTYPES:
        raise ValueError(f"dtype {dtype!r}")
    if not all(type(n) is int for n in (heads, dim, begin, end or 0)):
        raise ValueError("a size is not an integer")
    if not (0 < heads * dim <= _MAX_SIZE and heads > 0 and 0 <= begin <= _MAX_SIZE):
        raise ValueError(f"{heads} heads of dimension {dim} from token {begin}")
    if end is not None and not begin < end <= _MAX_SIZE:
        raise ValueError(f"rows from token {begin} to {end}")
    return RowSpec(heads, dim, dtype, begin, end)


def _read_layer(number: int, cache: Any, num_tokens: int) -> LayerLayout:
    """Return the layout of one layer's cache."""
    if cache.empty():
        raise ValueError(f"layer {number} is empty")
    if cache.offset != num_tokens:
        raise ValueError(
            f"layer {number} holds {cache.offset} rows for {num_tokens} tokens"
        )
    try:
        return kind_of(number, cache).read(cache)
    except (ValueError, UnsupportedCacheError) as error:
        raise type(error)(f"layer {number}: {error}") from error


def _allocate(spec: RowSpec, rows: int) -> mx.array:
    """Return a zeroed buffer; bfloat16 as its bits, which NumPy can write."""
    dtype = mx.uint16 if spec.dtype == "BF16" else MLX_DTYPES[spec.dtype]
    last = rows if spec.end is None else min(rows, spec.end)
    return mx.zeros((1, spec.num_heads, last - spec.begin, spec.head_dim), dtype)


def _as_dtype(array: mx.array, dtype: str) -> mx.array:
    """Return the bits of ``array`` as the dtype that they are of."""
    return array.view(mx.bfloat16) if dtype == "BF16" else array
