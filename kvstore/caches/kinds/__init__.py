"""The registry of cache classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import IntegrityError, UnsupportedCacheError
from ..layout import Layout, flatten, layout_from_json
from .arrays import States
from .chunked import ChunkedRows
from .plain import ConcatenatedRows, PlainRows
from .quantized import AffineRows
from .rotating import RotatingRows
from .turboquant import TurboRows

if TYPE_CHECKING:
    from .base import CacheKind

_KINDS: list[CacheKind] = [
    PlainRows(),
    ConcatenatedRows(),
    AffineRows(),
    TurboRows(),
    RotatingRows(),
    ChunkedRows(),
    States(),
]
# What `owns` has said of classes, since each step of a server asks it of every layer.
_OF_CLASS: dict[type, CacheKind] = {}


def register_kind(kind: CacheKind) -> None:
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


def known_kinds() -> tuple[CacheKind, ...]:
    """Return the kinds of all classes that can be stored."""
    return tuple(_KINDS)


def kind_named(name: str) -> CacheKind:
    """Return the kind of a cache class.

    Raises:
        ValueError: There is none.
    """
    for kind in _KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"class {name!r}")


def known_layout(value: Any) -> Layout:
    """Return the layout that a JSON value describes, if every class is registered.

    Raises:
        IntegrityError: It describes none, or names a class that is not registered.
    """
    layout = layout_from_json(value)
    try:
        for layer in flatten(layout):
            kind_named(layer.cache_class)
    except ValueError as error:
        raise IntegrityError(f"a shard's layout cannot be read: {error}") from error
    return layout


def holds_codes(layout: Layout) -> bool:
    """Whether a layer of a layout keeps codes, as a run does that was asked to."""
    return any(not kind_named(layer.cache_class).is_exact for layer in flatten(layout))


def find_kind(cache: Any) -> CacheKind | None:
    """Return the kind of one layer's cache, if its class can be stored."""
    found = _OF_CLASS.get(type(cache))
    if found is None:
        found = next((kind for kind in _KINDS if kind.owns(cache)), None)
        if found is not None:
            _OF_CLASS[type(cache)] = found
    return found


def kind_of(number: int, cache: Any) -> CacheKind:
    """Return the kind of one layer's cache.

    Raises:
        UnsupportedCacheError: It is of a class that cannot be stored.
    """
    kind = find_kind(cache)
    if kind is not None:
        return kind
    names = ", ".join(kind.name for kind in _KINDS)
    raise UnsupportedCacheError(
        f"layer {number} is a {type(cache).__name__}, which cannot be stored",
        hint=f"models whose layers are all of these can be stored: {names}",
    )
