"""How a prompt cache is built: groups of equal layers, and the layout as JSON.

Knows no arrays and no caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..codecs.dtypes import MLX_DTYPES
from ..errors import IntegrityError
from ..format.documents import JSON

Signature = tuple[str, tuple[tuple[str, int], ...]]
"""Class of a cache, and the parameters that it was made with."""
Shapes = dict[str, tuple[int, int, str]]
"""Heads, dimension and dtype of what a model computes for a layer, by name."""


def layer_signature(layer: LayerLayout) -> Signature:
    """Return class and parameters of the cache of one layer."""
    # The shapes of states are known only when there are states.
    params = [pair for pair in layer.params if not pair[0].startswith("shape")]
    return layer.cache_class, tuple(params)


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One array of one layer: the row that a token adds to it."""

    # ``H``, the number of KV heads.
    num_heads: int
    # ``D``, the length of one head's row.
    head_dim: int
    # safetensors name of the element type, such as ``BF16``.
    dtype: str
    # Position of the first token that has a row.
    begin: int = 0
    # Position behind the last one that has, or ``None``.
    end: int | None = None
    # What it holds; `caches/kinds/base.py` says what each means.
    kind: Literal["rows", "window", "state", "mark"] = "rows"


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """How one layer of a prompt cache is built."""

    # Name of the cache class.
    cache_class: str
    # What it was made with, such as bits and group size, by name.
    params: tuple[tuple[str, int], ...]
    # Its arrays by name; ``k`` and ``v`` are keys and values as they are, and only
    # these may be coded.
    rows: tuple[tuple[str, RowSpec], ...]


Layout = tuple["LayerLayout | Layout", ...]
"""One layout per layer of a prompt cache, in order; of a ``CacheList`` a tuple too."""
_MAX_LAYERS = 4096
_MAX_SIZE = 2**28
_MAX_NESTING = 8


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of equal layout, which are stacked into one tensor."""

    # The layout that they share.
    layout: LayerLayout
    # Their numbers, caches in a ``CacheList`` counted one by one.
    layers: tuple[int, ...]

    def spec(self, name: str) -> RowSpec:
        """Return what a token adds to one array; ``kv`` is as ``k``."""
        return dict(self.layout.rows)["k" if name == "kv" else name]

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
    numbers: list[int] = []
    last: LayerLayout | None = None
    for number, layer in enumerate(flatten(layout)):
        # To hash a layout takes longer than all else here.
        if layer is not last:
            numbers, last = members.setdefault(layer, []), layer
        numbers.append(number)
    return [Group(layer, tuple(numbers)) for layer, numbers in members.items()]


def flatten(layout: Layout) -> list[LayerLayout]:
    """Return the layouts of all caches, those of a ``CacheList`` one by one."""
    found: list[LayerLayout] = []
    for layer in layout:
        found += flatten(layer) if isinstance(layer, tuple) else [layer]
    return found


def has_only_rows(layout: Layout) -> bool:
    """Whether a prompt cache can be rebuilt wherever its rows are stored."""
    specs = (spec for layer in flatten(layout) for _, spec in layer.rows)
    return all(spec.kind == "rows" for spec in specs)


def layout_to_json(layout: Layout) -> list[JSON]:
    """Return a layout as a JSON value."""
    return [
        {"class": "CacheList", "caches": layout_to_json(layer)}
        if isinstance(layer, tuple)
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
        _layers_from_json(layer["caches"], nesting - 1)
        if layer["class"] == "CacheList"
        else _layer_from_json(layer)
        for layer in value
    )


def _layer_from_json(value: JSON) -> LayerLayout:
    name = value["class"]
    if type(name) is not str:
        raise ValueError("a class is no text")
    rows = tuple((str(name), _spec_from_json(spec)) for name, *spec in value["rows"])
    if len(dict(rows)) != len(rows):
        raise ValueError("an array comes twice")
    params = tuple(sorted(value["params"].items()))
    if not all(type(number) is int and number >= 0 for _, number in params):
        raise ValueError("a parameter is not a count")
    return LayerLayout(name, params, rows)


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
