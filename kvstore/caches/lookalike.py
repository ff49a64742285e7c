"""Cache classes from outside mlx-lm that do what one of mlx-lm's does.

mlx-vlm and others bring copies of mlx-lm's classes. A copy is known by what it does: it
is fed the same rows as mlx-lm's, and must return the same bits, also after its rows
went through a store. Then its rows are those of mlx-lm's class, and are shared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..codecs import get_codec
from ..errors import KVStoreError, UnsupportedCacheError
from .kinds import find_kind, known_kinds
from .live import PromptCache, check_classes, is_list
from .restore import start_restoring
from .snapshot import LiveRows, make_chain

# What a class of others may raise where mlx-lm's would not.
_FOREIGN_ERRORS = (
    ArithmeticError,
    AttributeError,
    KVStoreError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_HEADS, _DIM, _BLOCK = 2, 64, 256


class Lookalikes:
    """Turns a server's prompt caches into mlx-lm's, and back. Copies no rows.

    Args:
        empty: A prompt cache as the server makes it, before anything is in it.

    Raises:
        UnsupportedCacheError: A layer does not do what any class of mlx-lm does.
    """

    def __init__(self, empty: Sequence[Any]) -> None:
        self._theirs = list(empty)
        twins: dict[Any, Any] = {}
        self._ours = [_twin(n, cache, twins) for n, cache in enumerate(self._theirs)]
        check_classes(self._ours)

    @property
    def empty(self) -> PromptCache:
        """The empty prompt cache, of mlx-lm's classes."""
        return self._ours

    def to_ours(self, prompt_cache: Sequence[Any]) -> PromptCache:
        """Return mlx-lm's caches that hold the same arrays.

        Raises:
            UnsupportedCacheError: It is of other classes, or holds more than rows.
        """
        if len(prompt_cache) != len(self._theirs):
            raise UnsupportedCacheError(
                f"{len(prompt_cache)} layers where the model has {len(self._theirs)}"
            )
        layers = zip(prompt_cache, self._theirs, self._ours, strict=True)
        return [_to_ours(n, *layer) for n, layer in enumerate(layers)]

    def to_theirs(self, prompt_cache: Sequence[Any]) -> list[Any]:
        """Return caches of the server's classes that hold the arrays of mlx-lm's."""
        pairs = zip(prompt_cache, self._theirs, strict=True)
        return [_to_theirs(cache, empty) for cache, empty in pairs]


def _is_known(cache: Any) -> bool:
    return is_list(cache) or find_kind(cache) is not None


def _to_ours(number: int, cache: Any, empty: Any, ours: Any) -> Any:
    if _is_known(cache):
        return cache
    if type(cache) is not type(empty):
        raise UnsupportedCacheError(
            f"layer {number} is a {_name(cache)}, and was a {_name(empty)} when empty"
        )
    for name in vars(cache).keys() - vars(ours).keys() - {"kvstore_provenance"}:
        if not _is_same(vars(cache)[name], vars(empty).get(name)):
            raise UnsupportedCacheError(
                f"layer {number}, a {_name(cache)}, holds more than rows: `{name}`"
            )
    return _filled(ours, cache, vars(ours))


def _to_theirs(cache: Any, empty: Any) -> Any:
    return cache if _is_known(empty) else _filled(empty, cache, vars(cache))


def _copied(cache: Any) -> Any:
    """Return a copy that shares no list with a cache."""
    return _filled(cache, cache, vars(cache))


def _filled(empty: Any, source: Any, names: Any) -> Any:
    """Return a copy of an empty cache that holds what another one does."""
    found = copy.copy(empty)
    for name in {*names, "kvstore_provenance"}:
        if hasattr(source, name):
            value = getattr(source, name)
            setattr(found, name, list(value) if isinstance(value, list) else value)
    return found


def _is_same(value: Any, other: Any) -> bool:
    """Whether an attribute is still what it was in the empty cache."""
    if value is other:
        return True
    is_plain = isinstance(value, bool | int | float | str)
    return is_plain and type(value) is type(other) and bool(value == other)


def _name(cache: Any) -> str:
    return f"{type(cache).__module__}.{type(cache).__qualname__}"


def _twin(number: int, empty: Any, known: dict[Any, Any]) -> Any:
    """Return mlx-lm's cache that does the same as this empty one of another class."""
    if _is_known(empty):
        return empty
    key = (type(empty), repr(sorted(vars(empty).items())))
    if key not in known:
        known[key] = next(filter(lambda ours: _agree(empty, ours), _alike(empty)), None)
    if known[key] is None:
        raise UnsupportedCacheError(
            f"layer {number} is a {_name(empty)}, which does not do what any cache"
            " class of mlx-lm does",
            hint="register a kind for it: `kvstore.register_kind`",
        )
    return _copied(known[key])


def _alike(empty: Any) -> list[Any]:
    """Return empty caches of mlx-lm's that have no attribute which this one lacks.

    Those with the most attributes come first.
    """
    found = []
    for kind in known_kinds():
        try:
            ours = kind.build(kind.read(empty), {}, 0)
        except _FOREIGN_ERRORS:
            continue  # it is not of this kind
        if all(hasattr(empty, name) for name in vars(ours)):
            found.append(ours)
    return sorted(found, key=lambda ours: -len(vars(ours)))


def _agree(theirs: Any, ours: Any) -> bool:
    """Whether two empty caches do the same, to the bit, with the same rows."""
    try:
        return _agrees(theirs, ours)
    except _FOREIGN_ERRORS:
        return False


def _agrees(empty: Any, ours: Any) -> bool:
    theirs, mine, num_fed = _copied(empty), _copied(ours), 0
    window = getattr(ours, "max_size", 0) or 0
    for seed, num_rows in enumerate((7, 1, 1, 20, window, 1, 1, 3)):
        if not num_rows:
            continue
        fed = _feed(theirs, num_rows, seed), _feed(mine, num_rows, seed)
        num_fed += num_rows
        if not _are_equal(*fed):
            return False
        # It goes on from rows that were stored.
        theirs = _filled(
            empty, _stored(_filled(ours, theirs, vars(ours)), num_fed), vars(ours)
        )
        mine = _stored(mine, num_fed)
    return True


def _feed(cache: Any, num_rows: int, seed: int) -> Any:
    """Give a cache new rows, or states if it has none, and return what it returns."""
    shape = (2, 1, _HEADS, num_rows, _DIM)
    rows = mx.random.normal(shape, mx.float32, key=mx.random.key(seed))
    if hasattr(cache, "update_and_fetch"):
        fetched = cache.update_and_fetch(rows[0], rows[1])
        if hasattr(cache, "maybe_trim_front"):  # which models with chunks call
            cache.maybe_trim_front()
        return fetched
    for number in range(len(cache.cache)):
        cache[number] = rows[:1, 0, 0] + number
    return [cache[number] for number in range(len(cache.cache))]


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, mx.array) and isinstance(other, mx.array):
        is_alike = one.shape == other.shape and one.dtype == other.dtype
        return is_alike and bool(mx.array_equal(one, other, equal_nan=True))
    if not isinstance(one, tuple | list) or not isinstance(other, tuple | list):
        return False
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(_are_equal(*pair) for pair in pairs)


def _stored(cache: Any, num_rows: int) -> Any:
    """Return a cache of mlx-lm's as it comes out of a store."""
    chain, _ = make_chain({}, [cache], range(num_rows), _BLOCK)
    codec, rows = get_codec("raw"), LiveRows([cache], chain.layout, num_rows)
    restoring = start_restoring(chain.layout, num_rows)
    for block in chain.blocks:
        stop = block.start + len(block.tokens)
        for piece, layers in rows.read(block):
            assert isinstance(layers, list)  # mlx-lm has no codes of ours
            parts = {"rows": np.stack(layers)}
            restoring.write(codec, parts, piece.group, piece.rows, stop)
    (found,) = restoring.finish(num_rows, rows.provenance)
    return found
