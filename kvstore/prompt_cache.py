"""Prompt caches to rows per block, and back.

With `layers.py`, which knows the cache classes, the only file that touches mlx-lm's
caches. Live caches are read by their attributes and only up to ``offset``: rows past it
are somebody's trimmed conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .codecs import MLX_DTYPES, Rows
from .errors import IntegrityError, UnsupportedCacheError
from .layers import Held, kind_named, kind_of
from .layout import Group, flatten, group_layers
from .types import (
    LayerLayout,
    Layout,
    ListLayout,
    Provenance,
    RowSpec,
    StoredBlock,
    TensorSpec,
)

Array = npt.NDArray[np.generic]

PromptCache = list[Any]
"""mlx-lm's list of per-layer caches."""

Signature = tuple[str, tuple[tuple[str, int], ...]]
"""Class of a cache, and the parameters that it was made with."""

CODABLE = ("k", "v")
"""The arrays that a lossy codec may code; all others are stored lossless."""

# The attribute that carries a restored cache's provenance; copies keep it.
_PROVENANCE = "kvstore_provenance"


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
    marks = [_provenance_of(n, c) for n, c in enumerate(flatten_caches(prompt_cache))]
    return Provenance(
        max(mark.coded_tokens for mark in marks), all(mark.is_exact for mark in marks)
    )


def _provenance_of(number: int, cache: Any) -> Provenance:
    kept: Provenance | None = getattr(cache, _PROVENANCE, None)
    if kept is None:
        # What a cache of codes was decoded to says so itself.
        coded = getattr(cache, "coded_tokens", 0)
        kept = Provenance(coded, is_exact=not coded)
    return replace(kept, is_exact=kept.is_exact and kind_of(number, cache).is_exact)


def mark(prompt_cache: Sequence[Any], provenance: Provenance) -> None:
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


def fits(layout: Layout, wanted: Sequence[Signature], *, decoding: bool) -> bool:
    """Say whether caches of these classes and parameters can be had from a layout.

    Args:
        layout: How the stored cache is built.
        wanted: Class and parameters of each cache.
        decoding: A ``KVCache`` may be decoded from a ``TurboQuantKVCache``.
    """
    stored = [layer_signature(layer) for layer in flatten(layout)]
    # What is decoded lies in no CacheList.
    decoding = decoding and not any(isinstance(layer, ListLayout) for layer in layout)
    decodable = ("TurboQuantKVCache", "KVCache")
    return len(stored) == len(wanted) and all(
        was == asked or (decoding and (was[0], asked[0]) == decodable)
        for was, asked in zip(stored, wanted, strict=True)
    )


def layer_signature(layer: LayerLayout) -> Signature:
    """Return class and parameters of the cache of one layer."""
    # The shapes of states are known only when there are states.
    params = [pair for pair in layer.params if not pair[0].startswith("shape")]
    return layer.cache_class, tuple(params)


def convert(
    prompt_cache: PromptCache, wanted: Sequence[Signature] | None
) -> PromptCache:
    """Decode the caches of codes whose place a ``KVCache`` is wanted in."""
    classes = [name for name, _ in wanted or ()]
    stored = [type(cache).__name__ for cache in flatten_caches(prompt_cache)]
    if wanted is None or classes == stored:
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
