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
from .layers import Held, capacity, kind_named, kind_of
from .types import (
    JSON,
    LayerLayout,
    Layout,
    ListLayout,
    Provenance,
    RowSpec,
    StoredBlock,
    TensorSpec,
)

Array = npt.NDArray[np.generic]

Parts = Mapping[str, Array]
"""The named arrays that a codec made of rows."""

PromptCache = list[Any]
"""mlx-lm's list of per-layer caches."""

CODABLE = ("k", "v")
"""The arrays that a lossy codec may code; all others are stored lossless."""

_MAX_LAYERS = 4096
_MAX_SIZE = 2**28
_MAX_NESTING = 8
# The attribute that carries a restored cache's provenance; copies keep it.
_PROVENANCE = "kvstore_provenance"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of equal layout, which are stacked into one tensor.

    Attributes:
        layout: The layout that they share.
        layers: Their numbers, caches in a ``CacheList`` counted one by one.
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
            if spec.end is None and spec.kind in ("rows", "window")
        )
        return one * len(self.layers)


def group_layers(layout: Layout) -> list[Group]:
    """Return the groups of a layout, in the order of their first layers."""
    members: dict[LayerLayout, list[int]] = {}
    for number, layer in enumerate(flatten(layout)):
        members.setdefault(layer, []).append(number)
    return [Group(layer, tuple(numbers)) for layer, numbers in members.items()]


def flatten(layout: Sequence[LayerLayout | ListLayout]) -> list[LayerLayout]:
    """Return the layouts of all caches, those of a ``CacheList`` one by one."""
    found: list[LayerLayout] = []
    for layer in layout:
        found += flatten(layer.caches) if isinstance(layer, ListLayout) else [layer]
    return found


def flatten_caches(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return all caches, those of a ``CacheList`` one by one."""
    found: list[Any] = []
    for cache in prompt_cache:
        found += flatten_caches(cache.caches) if _is_list(cache) else [cache]
    return found


def hold(prompt_cache: Sequence[Any]) -> list[Held]:
    """Return what each cache holds."""
    caches = flatten_caches(prompt_cache)
    return [kind_of(i, cache).held(cache) for i, cache in enumerate(caches)]


def rows_held(
    held: Sequence[Held], group: Group, start: int, stop: int, at_tip: bool
) -> Iterator[tuple[str, Rows]]:
    """Yield the arrays of which caches hold something for some tokens, and its rows.

    Args:
        held: What each cache holds.
        group: The layers meant.
        start: Position of the first token.
        stop: Position behind the last one.
        at_tip: That is where the caches are.
    """
    for name, spec in group.layout.rows:
        first = spec.begin
        if spec.kind != "rows":
            if any(name not in held[layer] for layer in group.layers):
                continue  # a mark that not all layers have
            first = max(held[layer][name][1] for layer in group.layers)
        if spec.kind in ("state", "mark"):
            if at_tip:
                yield name, _rows_of(group, name, stop - 1, stop)
            continue
        last = stop if spec.end is None else min(stop, spec.end)
        if max(start, first) < last:
            yield name, _rows_of(group, name, max(start, first), last)


def rows_stored(
    tensors: Mapping[str, TensorSpec], number: int, group: Group, start: int, stop: int
) -> Iterator[tuple[str, Rows]]:
    """Yield the arrays of a group that a stored block has, and which rows of them.

    Args:
        tensors: What the shard's header says of the block's tensors.
        number: The group's number.
        group: The layers meant.
        start: Position of the block's first token.
        stop: Position behind its last one.

    Raises:
        IntegrityError: A tensor has no whole number of rows.
    """
    for name, spec in group.layout.rows:
        if spec.kind == "rows":
            first = max(start, spec.begin)
            last = stop if spec.end is None else min(stop, spec.end)
        else:
            num_rows = _count_rows(tensors, f"{number}.{name}.", group, spec)
            first, last = stop - num_rows, stop
            if first < start or (num_rows > 1 and spec.kind != "window"):
                raise IntegrityError(f"tensor {number}.{name} has {num_rows} rows")
        if first < last:
            yield name, _rows_of(group, name, first, last)


def _count_rows(
    tensors: Mapping[str, TensorSpec], prefix: str, group: Group, spec: RowSpec
) -> int:
    """Return how many rows of a window or state a stored block has."""
    sizes = [
        tensor.end - tensor.begin if tensor.raw_nbytes is None else tensor.raw_nbytes
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    ]
    width = len(group.layers) * spec.num_heads * spec.head_dim
    num_rows, rest = divmod(sum(sizes), width * MLX_DTYPES[spec.dtype].size)
    if rest:
        raise IntegrityError(f"tensor {prefix} has no whole number of rows")
    return num_rows


def _rows_of(group: Group, name: str, first: int, last: int) -> Rows:
    spec = group.spec(name)
    shape = (len(group.layers), spec.num_heads, last - first, spec.head_dim)
    return Rows(name, first, shape, spec.dtype)


def _is_list(cache: Any) -> bool:
    from mlx_lm.models.cache import CacheList

    return type(cache) is CacheList


def read_layout(prompt_cache: Sequence[Any], num_tokens: int) -> Layout:
    """Return how a prompt cache is built.

    Args:
        prompt_cache: mlx-lm's caches, one per layer.
        num_tokens: How many tokens' rows it must hold.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``num_tokens`` rows.
    """
    check_classes(prompt_cache)
    layout = _read_layers(prompt_cache)
    if not any(layer.rows for layer in flatten(layout)):
        raise ValueError(f"the prompt cache is empty, for {num_tokens} tokens")
    for number, cache in enumerate(flatten_caches(prompt_cache)):
        rows = getattr(cache, "offset", num_tokens)
        # A layer that the model never uses stays empty.
        if rows != num_tokens and kind_of(number, cache).held(cache):
            raise ValueError(
                f"layer {number} holds {rows} rows for {num_tokens} tokens"
            )
    return layout


def _read_layers(prompt_cache: Sequence[Any]) -> Layout:
    layers: list[LayerLayout | ListLayout] = []
    for number, cache in enumerate(prompt_cache):
        if _is_list(cache):
            layers.append(ListLayout(_read_layers(cache.caches)))
            continue
        kind = kind_of(number, cache)
        try:
            layers.append(kind.read(cache))
        except (ValueError, UnsupportedCacheError) as error:
            raise type(error)(f"layer {number}: {error}") from error
    return tuple(layers)


def read_provenance(prompt_cache: Sequence[Any]) -> Provenance:
    """Return what a prompt cache remembers; a computed one has nothing lossy."""
    caches = flatten_caches(prompt_cache)
    marks = [getattr(cache, _PROVENANCE, Provenance()) for cache in caches]
    return Provenance(
        max(mark.coded_tokens for mark in marks), all(mark.is_exact for mark in marks)
    )


def check_classes(prompt_cache: Sequence[Any]) -> None:
    """Refuse a prompt cache that cannot be stored, before anything is in it.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
    """
    for number, cache in enumerate(flatten_caches(prompt_cache)):
        kind_of(number, cache)


def layout_classes(prompt_cache: Sequence[Any]) -> tuple[str, ...]:
    """Return the class of each layer's cache; it may be empty still."""
    return tuple(type(cache).__name__ for cache in flatten_caches(prompt_cache))


def fits(layout: Layout, classes: Sequence[str], *, decoding: bool) -> bool:
    """Say whether caches of these classes can be had from a layout.

    Args:
        layout: How the stored cache is built.
        classes: The class wanted of each layer.
        decoding: A ``KVCache`` may be decoded from a ``TurboQuantKVCache``.
    """
    stored = [layer.cache_class for layer in flatten(layout)]
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
    # No cache of codes lies in a CacheList, so layers and classes agree in number.
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


def split(held: Sequence[Held], group: Group, name: str, rows: Rows) -> Array:
    """Return rows of some layers as NumPy holds them, shape ``(L, H, T, D)``.

    They are evaluated here, on the caller's thread.
    """
    is_state = group.spec(name).kind in ("state", "mark")
    pieces = []
    for layer in group.layers:
        array, begin = held[layer][name]
        first = 0 if is_state else rows.start - begin
        pieces.append(array[0, :, first : first + rows.shape[2], :])
    stacked = mx.stack(pieces)
    if stacked.dtype == mx.bfloat16:
        stacked = stacked.view(mx.uint16)
    mx.eval(stacked)
    return np.asarray(stacked)


def has_only_rows(layout: Layout) -> bool:
    """Say whether a prompt cache can be rebuilt wherever its rows are stored."""
    specs = (spec for layer in flatten(layout) for _, spec in layer.rows)
    return all(spec.kind == "rows" for spec in specs)


def is_restorable(
    layout: Layout, blocks: Sequence[StoredBlock], num_tokens: int
) -> bool:
    """Say whether every layer can be rebuilt at a position inside the last block.

    Args:
        layout: How the prompt cache is built.
        blocks: All blocks up to there.
        num_tokens: The position.
    """
    for number, group in enumerate(group_layers(layout)):
        kind = kind_named(group.layout.cache_class)
        begin = kind.window_begin(group.layout, num_tokens)
        for name, spec in group.layout.rows:
            prefix = f"{number}.{name}."
            if spec.kind == "state":
                last = blocks[-1]
                has_state = _count_rows(last.tensors, prefix, group, spec) == 1
                if not has_state or _stop(last) != num_tokens:
                    return False
            if spec.kind == "window" and not all(
                _stop(block) - _count_rows(block.tensors, prefix, group, spec)
                <= max(block.block.start, begin)
                for block in blocks
                if _stop(block) > begin
            ):
                return False
    return True


def _stop(stored: StoredBlock) -> int:
    return stored.block.start + len(stored.block.tokens)


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


class _Target:
    """Which rows of each array a restored prompt cache needs."""

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self.layers = flatten(layout)
        self._num_tokens = num_tokens

    def begin(self, layer: LayerLayout, name: str, spec: RowSpec) -> int:
        """Return the position of the first row."""
        if spec.kind != "window":
            return spec.begin
        kind = kind_named(layer.cache_class)
        return max(spec.begin, kind.window_begin(layer, self._num_tokens))

    def num_rows(self, layer: LayerLayout, name: str, spec: RowSpec) -> int:
        """Return how many rows the buffer has, room for the next ones included."""
        if spec.kind == "window":
            return max(0, self._num_tokens - self.begin(layer, name, spec))
        if spec.kind != "rows":
            return 1
        rows = capacity(self._num_tokens)
        return (rows if spec.end is None else min(rows, spec.end)) - spec.begin

    def cut(self, group: Group, rows: Rows, stop: int) -> tuple[int, slice]:
        """Return where in its buffer a block's rows go, and which of them."""
        spec = group.spec(rows.side)
        if spec.kind in ("state", "mark"):
            return 0, slice(0, 1)
        begin = self.begin(group.layout, rows.side, spec)
        first = max(rows.start, begin)
        last = max(first, min(stop, rows.start + rows.shape[2]))
        return first - begin, slice(first - rows.start, last - rows.start)


class HostRestoring:
    """Decodes layer by layer, in NumPy, into the buffers that the caches will own.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._target = _Target(layout, num_tokens)
        self._arrays = [
            {
                name: _allocate(spec, self._target.num_rows(layer, name, spec))
                for name, spec in layer.rows
                if spec.kind != "mark"
            }
            for layer in self._target.layers
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
        where, which = self._target.cut(group, rows, stop)
        for i, layer in enumerate(group.layers):
            if rows.side not in self._views[layer]:
                self._add(layer, rows.side, group.spec(rows.side))
            view = self._views[layer][rows.side]
            out = view[:, where : where + which.stop - which.start]
            if which.start == 0:
                codec.array.decode_into(parts, rows, i, out)
            else:
                whole = np.empty(rows.shape[1:], view.dtype)
                codec.array.decode_into(parts, rows, i, whole)
                out[...] = whole[:, which]

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Hand the buffers over."""
        # Without the views, a cache is the only owner and grows in place.
        self._views.clear()
        typed = [
            {
                name: _as_dtype(arrays.pop(name), spec.dtype)
                for name, spec in layer.rows
                if name in arrays
            }
            for layer, arrays in zip(self._target.layers, self._arrays, strict=True)
        ]
        return _build(self._layout, typed, num_tokens, provenance)

    def _add(self, layer: int, name: str, spec: RowSpec) -> None:
        """Allocate a buffer for what not every block has."""
        array = _allocate(spec, 1)
        mx.eval(array)
        self._arrays[layer][name] = array
        self._views[layer][name] = np.asarray(array)[0]


class DeviceRestoring:
    """Decodes all layers of a block at once, on MLX's device, and joins the blocks.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._target = _Target(layout, num_tokens)
        self._pieces: list[dict[str, list[mx.array]]] = [
            {name: [] for name, spec in layer.rows if spec.kind != "mark"}
            for layer in self._target.layers
        ]

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode on the device, evaluated at once so that the codes can go."""
        _, which = self._target.cut(group, rows, stop)
        decoded = codec.array.decode(parts, rows)
        pieces = [decoded[i : i + 1, :, which] for i in range(len(group.layers))]
        mx.async_eval(pieces)
        for layer, piece in zip(group.layers, pieces, strict=True):
            self._pieces[layer].setdefault(rows.side, []).append(piece)

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Join the blocks of each layer, with room for the next token."""
        joined = [
            {
                name: self._join(layer, name, spec, pieces.pop(name))
                for name, spec in layer.rows
                if name in pieces
            }
            for layer, pieces in zip(self._target.layers, self._pieces, strict=True)
        ]
        return _build(self._layout, joined, num_tokens, provenance)

    def _join(
        self, layer: LayerLayout, name: str, spec: RowSpec, pieces: list[mx.array]
    ) -> mx.array:
        missing = self._target.num_rows(layer, name, spec)
        missing -= sum(piece.shape[2] for piece in pieces)
        shape = (1, spec.num_heads, missing, spec.head_dim)
        room = [mx.zeros(shape, MLX_DTYPES[spec.dtype])] if missing else []
        return mx.concatenate([*pieces, *room], axis=2)


def _build(
    layout: Layout,
    buffers: Sequence[dict[str, mx.array]],
    num_tokens: int,
    provenance: Provenance,
) -> PromptCache:
    """Return caches that own these buffers, evaluated on this thread."""
    restored = _build_layers(layout, iter(buffers), num_tokens)
    for cache in flatten_caches(restored):
        setattr(cache, _PROVENANCE, provenance)
    # An empty layer has no state to evaluate.
    mx.eval([kept for held in hold(restored) for kept in held.values()])
    return restored


def _build_layers(
    layout: Sequence[LayerLayout | ListLayout],
    buffers: Iterator[dict[str, mx.array]],
    num_tokens: int,
) -> PromptCache:
    from mlx_lm.models.cache import CacheList

    built: PromptCache = []
    for layer in layout:
        if isinstance(layer, ListLayout):
            built.append(CacheList(*_build_layers(layer.caches, buffers, num_tokens)))
        else:
            kind = kind_named(layer.cache_class)
            built.append(kind.build(layer, next(buffers), num_tokens))
    return built


def layout_to_json(layout: Sequence[LayerLayout | ListLayout]) -> list[JSON]:
    """Return a layout as a JSON value."""
    return [
        {"class": "CacheList", "caches": layout_to_json(layer.caches)}
        if isinstance(layer, ListLayout)
        else {
            "class": layer.cache_class,
            "params": dict(layer.params),
            "rows": [
                [name, s.num_heads, s.head_dim, s.dtype, s.begin, s.end, s.kind]
                for name, s in layer.rows
            ],
        }
        for layer in layout
    ]


def layout_from_json(value: Any) -> Layout:
    """Return the layout that a JSON value describes.

    Raises:
        IntegrityError: It describes none.
    """
    try:
        return _layers_from_json(value, _MAX_NESTING)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"a shard's layout cannot be read: {error}") from error


def _layers_from_json(value: Any, nesting: int) -> Layout:
    if not 0 < len(value) <= _MAX_LAYERS or nesting == 0:
        raise ValueError(f"{len(value)} layers")
    return tuple(
        ListLayout(_layers_from_json(layer["caches"], nesting - 1))
        if layer["class"] == "CacheList"
        else _layer_from_json(layer)
        for layer in value
    )


def _layer_from_json(value: JSON) -> LayerLayout:
    kind = kind_named(value["class"])
    rows = tuple((str(name), _spec_from_json(spec)) for name, *spec in value["rows"])
    if len(dict(rows)) != len(rows):
        raise ValueError("an array comes twice")
    params = tuple(sorted(value["params"].items()))
    if not all(type(number) is int and number >= 0 for _, number in params):
        raise ValueError("a parameter is not a count")
    return LayerLayout(kind.name, params, rows)


def _spec_from_json(value: Any) -> RowSpec:
    heads, dim, dtype, begin, end, kind = value
    if dtype not in MLX_DTYPES or kind not in ("rows", "window", "state", "mark"):
        raise ValueError(f"dtype {dtype!r} of {kind!r}")
    if not all(type(n) is int for n in (heads, dim, begin, end or 0)):
        raise ValueError("a size is not an integer")
    if not (heads > 0 and 0 < heads * dim <= _MAX_SIZE and 0 <= begin <= _MAX_SIZE):
        raise ValueError(f"{heads} heads of dimension {dim} from token {begin}")
    if end is not None and not begin < end <= _MAX_SIZE:
        raise ValueError(f"rows from token {begin} to {end}")
    return RowSpec(heads, dim, dtype, begin, end, kind)


def _allocate(spec: RowSpec, num_rows: int) -> mx.array:
    """Return a zeroed buffer; bfloat16 as its bits, which NumPy can write."""
    dtype = mx.uint16 if spec.dtype == "BF16" else MLX_DTYPES[spec.dtype]
    return mx.zeros((1, spec.num_heads, num_rows, spec.head_dim), dtype)


def _as_dtype(array: mx.array, dtype: str) -> mx.array:
    """Return the bits of ``array`` as the dtype that they are of."""
    return array.view(mx.bfloat16) if dtype == "BF16" else array
