"""How a prompt cache is built: groups of equal layers, and the layout as JSON.

Knows no arrays and no caches, only what `layers.py` says of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .codecs import MLX_DTYPES
from .errors import IntegrityError
from .layers import kind_named
from .types import JSON, LayerLayout, Layout, ListLayout, RowSpec

_MAX_LAYERS = 4096
_MAX_SIZE = 2**28
_MAX_NESTING = 8


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


def has_only_rows(layout: Layout) -> bool:
    """Say whether a prompt cache can be rebuilt wherever its rows are stored."""
    specs = (spec for layer in flatten(layout) for _, spec in layer.rows)
    return all(spec.kind == "rows" for spec in specs)


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
