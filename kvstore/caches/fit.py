"""Whether stored rows are such as a model computes: layers, heads, dimensions, dtype.

An empty prompt cache does not say what rows will fill it. So the model is fed a few
tokens, of which nothing is computed: MLX knows shapes before it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kinds import kind_named, kind_of
from .layout import (
    LayerLayout,
    Layout,
    Shapes,
    Signature,
    flatten,
    layer_signature,
)
from .live import flatten_caches, signature

# The attribute by which an empty cache tells what will fill it.
_EXPECTED = "kvstore_expected"
# A layer may keep the last few tokens themselves, of which there must be as many.
_NUM_FED = 16

FindShapes = Callable[[], Sequence[Shapes] | None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the cache of one layer must be, to be restored for a model."""

    signature: Signature
    # Returns what the model fills each cache with, as far as anybody knows.
    find_shapes: FindShapes | None
    # Its number.
    number: int

    def why_foreign(self, layer: LayerLayout) -> str | None:
        """Return why a layer's rows are not such as the model computes, if so."""
        shapes = self.find_shapes() if self.find_shapes else None
        if shapes is None or (found := _shapes(layer)) == shapes[self.number]:
            return None
        given = shapes[self.number]
        return f"layer {self.number}: stored {_list(found)}, given {_list(given)}"


def feed(model: Any, prompt_cache: Sequence[Any]) -> None:
    """Feed a model some tokens, without computing anything of them."""
    model(mx.zeros((1, _NUM_FED), mx.int32), cache=prompt_cache)


def shapes_of(prompt_cache: Sequence[Any]) -> list[Shapes]:
    """Return what each cache has been filled with."""
    flat = enumerate(flatten_caches(prompt_cache))
    return [_shapes(kind_of(number, cache).read(cache)) for number, cache in flat]


def expect_rows(prompt_cache: Sequence[Any], find_shapes: FindShapes) -> None:
    """Note on empty caches what rows the model will fill them with.

    They may be caches of codes, whose class does not tell.

    Args:
        prompt_cache: The caches.
        find_shapes: Asked when there is something to be held against it; it returns
            what :func:`shapes_of` does for such caches that the model has been fed, or
            ``None``.
    """
    for cache in flatten_caches(prompt_cache):
        setattr(cache, _EXPECTED, find_shapes)


def wanted_of(prompt_cache: Sequence[Any]) -> tuple[Wanted, ...]:
    """Return what each layer of a prompt cache wants that may be empty."""
    pairs = zip(signature(prompt_cache), flatten_caches(prompt_cache), strict=True)
    return tuple(
        Wanted(found, getattr(cache, _EXPECTED, None), number)
        for number, (found, cache) in enumerate(pairs)
    )


def why_unfit(
    layout: Layout, wanted: Sequence[Wanted], *, decoding: bool = False
) -> str | None:
    """Return why no prompt cache like this can be had from a layout, if so.

    Args:
        layout: How the stored cache is built.
        wanted: What each layer must be.
        decoding: A ``KVCache`` may be decoded from a ``TurboQuantKVCache``.
    """
    # What is decoded lies in no CacheList.
    decoding = decoding and not any(isinstance(layer, tuple) for layer in layout)
    stored = flatten(layout)
    if len(stored) == len(wanted):
        for number, (was, asked) in enumerate(zip(stored, wanted, strict=True)):
            found, given = layer_signature(was), asked.signature
            is_decoded = (found[0], given[0]) == ("TurboQuantKVCache", "KVCache")
            if found != given and not (decoding and is_decoded):
                return f"layer {number}: stored {_show(found)}, given {_show(given)}"
    return why_foreign(layout, wanted)


def why_foreign(layout: Layout, wanted: Sequence[Wanted]) -> str | None:
    """Return why no option of a model's makes it compute such rows, if so.

    Options choose the classes of its caches; they change no number of layers or heads.
    """
    stored = flatten(layout)
    if len(stored) != len(wanted):
        return f"layers: stored {len(stored)}, given {len(wanted)}"
    pairs = zip(stored, wanted, strict=True)
    return next((why for was, asked in pairs if (why := asked.why_foreign(was))), None)


def _shapes(layer: LayerLayout) -> Shapes:
    return kind_named(layer.cache_class).shapes(layer)


def _show(found: Signature) -> str:
    name, params = found
    inside = ", ".join(f"{key}={value}" for key, value in params)
    return f"{name}({inside})" if inside else name


def _list(shapes: Shapes) -> str:
    found = [f"{name} {h} x {d} {t}" for name, (h, d, t) in sorted(shapes.items())]
    return ", ".join(found) or "no rows"
