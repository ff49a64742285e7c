"""What a live prompt cache is and holds, whatever the classes of its layers.

Live caches are read by their attributes and only up to ``offset``: rows past it
are somebody's trimmed conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache as cached
from functools import reduce
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..codecs.base import Rows
from ..errors import ArgumentError, UnsupportedCacheError
from ..format.block import EXACT_BITS
from .kinds import find_kind, kind_of
from .kinds.base import Held, rows_of
from .layout import Group, LayerLayout, Layout, flatten, layer_signature
from .provenance import Provenance

if TYPE_CHECKING:
    from .layout import Signature


Array = npt.NDArray[np.generic]
PromptCache = list[Any]
"""mlx-lm's list of per-layer caches."""
# The attribute that carries a restored cache's provenance; copies keep it.
_PROVENANCE = "kvstore_provenance"
# What rows went through that a model has computed: nothing.
_COMPUTED = Provenance()
_ROWS_HINT = (
    "pass exactly the tokens that the model was fed: of a reply, all but the last"
)


def flatten_caches(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return all caches, those of a ``CacheList`` one by one."""
    found: list[Any] = []
    for cache in prompt_cache:
        found += flatten_caches(cache.caches) if is_list(cache) else [cache]
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
                yield name, rows_of(group, name, stop - 1, stop)
            continue
        last = stop if spec.end is None else min(stop, spec.end)
        if max(start, first) < last:
            yield name, rows_of(group, name, max(start, first), last)


def is_list(cache: Any) -> bool:
    """Whether a layer's cache is a ``CacheList``."""
    return type(cache) is _list_class()


@cached
def _list_class() -> type:
    # Imported here: mlx-lm takes a second.
    from mlx_lm.models.cache import CacheList

    return CacheList


def read_layout(prompt_cache: Sequence[Any], num_tokens: int) -> Layout:
    """Return how a prompt cache is built.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        ValueError: It is empty, a batch, or holds other than ``num_tokens`` rows.
    """
    check_classes(prompt_cache)
    layout = _read_layers(prompt_cache)
    if not any(layer.rows for layer in flatten(layout)):
        raise ArgumentError(
            f"the prompt cache is empty, for {num_tokens} tokens", hint=_ROWS_HINT
        )
    for number, cache in enumerate(flatten_caches(prompt_cache)):
        rows = getattr(cache, "offset", num_tokens)
        # A layer that the model never uses stays empty.
        if rows != num_tokens and kind_of(number, cache).held(cache):
            raise ArgumentError(
                f"layer {number} holds {rows} rows for {num_tokens} tokens",
                hint=_ROWS_HINT,
            )
    return layout


def _read_layers(prompt_cache: Sequence[Any]) -> Layout:
    layers: list[LayerLayout | Layout] = []
    for number, cache in enumerate(prompt_cache):
        if is_list(cache):
            layers.append(_read_layers(cache.caches))
            continue
        kind = kind_of(number, cache)
        try:
            layer = kind.read(cache)
        except (ValueError, UnsupportedCacheError) as error:
            raise type(error)(f"layer {number}: {error}") from error
        # One object for layers that are alike: it is compared, and hashed, fastest.
        is_like_last = layers and layers[-1] == layer
        layers.append(layers[-1] if is_like_last else layer)
    return tuple(layers)


def read_provenance(prompt_cache: Sequence[Any]) -> Provenance:
    """Return what a prompt cache remembers; a computed one has nothing lossy."""
    marks = (_provenance_of(n, c) for n, c in enumerate(flatten_caches(prompt_cache)))
    # Mostly all layers have one and the same.
    distinct = {id(mark): mark for mark in marks}.values()
    return reduce(Provenance.joined, distinct, _COMPUTED)


def _provenance_of(number: int, cache: Any) -> Provenance:
    kept: Provenance = getattr(cache, _PROVENANCE, _COMPUTED)
    # What a cache of codes was decoded to says so itself.
    coded = getattr(cache, "coded_tokens", 0)
    bits = getattr(cache, "coded_bits", 0) if coded else EXACT_BITS
    bits = min(bits, kind_of(number, cache).bits(cache))
    is_exact = not coded and bits == EXACT_BITS
    return kept if is_exact else kept.joined(Provenance(coded, bits))


def set_provenance(prompt_cache: Sequence[Any], provenance: Provenance) -> None:
    """Have a prompt cache remember what its rows went through."""
    for cache in flatten_caches(prompt_cache):
        setattr(cache, _PROVENANCE, provenance)


def check_classes(prompt_cache: Sequence[Any]) -> None:
    """Refuse a prompt cache that cannot be stored, before anything is in it.

    Raises:
        UnsupportedCacheError: A layer is of a class that cannot be stored.
    """
    for number, cache in enumerate(flatten_caches(prompt_cache)):
        kind_of(number, cache)


def signature(prompt_cache: Sequence[Any]) -> tuple[Signature, ...]:
    """Return class and parameters of each cache, which may be empty still."""
    check_classes(prompt_cache)
    return tuple(map(layer_signature, flatten(_read_layers(prompt_cache))))


def convert(prompt_cache: PromptCache, classes: Sequence[str] | None) -> PromptCache:
    """Decode the caches of codes whose place a ``KVCache`` is wanted in."""
    stored = [type(cache).__name__ for cache in flatten_caches(prompt_cache)]
    if classes is None or classes == stored:
        return prompt_cache
    converted: PromptCache = []
    # No cache of codes lies in a CacheList, so layers and classes agree in number.
    for cache, name in zip(prompt_cache, classes, strict=True):
        if type(cache).__name__ == name:
            converted.append(cache)
            continue
        decoded = cache.to_kv_cache()
        converted.append(decoded)
    mx.eval([cache.state for cache in converted])
    return converted


def is_cuttable(prompt_cache: Sequence[Any]) -> bool:
    """Whether the last rows can be dropped from all layers, at any time."""
    kinds = map(find_kind, flatten_caches(prompt_cache))
    return all(kind is not None and kind.is_cuttable for kind in kinds)


def count_rows(prompt_cache: Sequence[Any], at_most: int) -> int:
    """Return of how many tokens every layer has rows, up to a limit."""
    offsets: list[int] = [cache.offset for cache in _used(prompt_cache)]
    return min([at_most, *offsets])


def cut(prompt_cache: Sequence[Any], num_rows: int) -> int:
    """Drop rows of a cuttable prompt cache, and return how many all layers have now."""
    num_rows = count_rows(prompt_cache, num_rows)
    for cache in _used(prompt_cache):
        cache.trim(cache.offset - num_rows)
    return num_rows


def cut_copy(prompt_cache: PromptCache, num_tokens: int) -> PromptCache | None:
    """Return a prompt cache that ends after so many tokens; ``None`` if that cannot be.

    A draft model's caches may be a token behind the model's, so each has its own end.
    """
    from mlx_lm.models.cache import can_trim_prompt_cache

    flat = flatten_caches(prompt_cache)
    if all(getattr(cache, "offset", 0) <= num_tokens for cache in flat):
        return prompt_cache
    # A copy of a CacheList would share the caches in it.
    if len(flat) != len(prompt_cache) or not can_trim_prompt_cache(prompt_cache):
        return None
    copies = [copy.copy(cache) for cache in prompt_cache]
    for cache in copies:
        cache.trim(max(0, cache.offset - num_tokens))
    return copies


def _used(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return the caches that have rows; a layer that the model never uses has none."""
    return [
        cache
        for cache in flatten_caches(prompt_cache)
        if getattr(cache, "offset", None) is not None and not cache.empty()
    ]


def quantize(
    empty: PromptCache, bits: int | str | None, group_size: int
) -> PromptCache:
    """Return empty caches that will hold codes.

    Args:
        empty: Caches as the model makes them.
        bits: TurboQuant's name of its codes, such as ``"turbo3"``, or a number of bits
            of mlx-lm's codes; ``None`` for no codes.
        group_size: Numbers that share a scale, in mlx-lm's codes.
    """
    if bits is None:
        return empty
    if isinstance(bits, str):
        from turboquant.kv_cache import quantize_prompt_cache

        return quantize_prompt_cache(empty, bits)
    from mlx_lm.models.cache import KVCache

    return [
        cache.to_quantized(group_size=group_size, bits=bits)
        if isinstance(cache, KVCache)
        else cache
        for cache in empty
    ]
