"""ArraysCache: states that can be stored at one position only."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..layout import LayerLayout, RowSpec
from .base import CacheKind, dtype_name, make_layout
from .saved import (
    BEFORE_0_32,
    FROM_0_28_1,
    IN_0_32,
    TO_0_28_0,
    FileArrays,
    FileForm,
    SavedCache,
    Tensor,
    as_list,
)

if TYPE_CHECKING:
    from .base import Buffers, Held

_MAX_STATES = 4096


class States(CacheKind):
    """``ArraysCache``: recurrent states, which cannot be cut."""

    name = "ArraysCache"
    is_exact = True
    forms = (
        FileForm(BEFORE_0_32 | {IN_0_32}),
        FileForm(frozenset((TO_0_28_0, FROM_0_28_1)), old_name="MambaCache"),
    )

    def owns(self, cache: Any) -> bool:
        """Whether it is an ``ArraysCache``."""
        from mlx_lm.models.cache import ArraysCache

        return type(cache) is ArraysCache

    def read(self, cache: Any) -> LayerLayout:
        """Return shape and dtype of each state that there is."""
        if cache.left_padding is not None or cache.lengths is not None:
            raise ValueError("a batch; store each by itself")
        specs = {}
        params = {"size": len(cache.cache)}
        for i, state in enumerate(cache.cache):
            if state is not None:
                specs[f"state{i}"] = _state_spec(state)
                params |= {f"shape{i}.{j}": n for j, n in enumerate(state.shape)}
        return make_layout(self.name, specs, **params)

    def held(self, cache: Any) -> Held:
        """Return the states."""
        return {
            f"state{i}": (state.reshape(1, 1, 1, -1), 0)
            for i, state in enumerate(cache.cache)
            if state is not None
        }

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return an ``ArraysCache``."""
        from mlx_lm.models.cache import ArraysCache

        params = dict(layout.params)
        if params["size"] > _MAX_STATES:
            raise ValueError(f"{params['size']} states")
        cache: Any = ArraysCache(params["size"])
        for name, state in buffers.items():
            shape = _shape(params, name.removeprefix("state"))
            cache[int(name.removeprefix("state"))] = state.reshape(shape)
        return cache

    def parse_state(self, state: Any) -> SavedCache:
        """Return a cache of one prompt; 0.32 writes of a batch what else it needs."""
        states, padding, lengths = as_list(state, 3)
        if padding is not None or lengths is not None:
            raise ValueError("it holds a batch")
        return SavedCache(self.name, as_list(states), {})

    def parse_older(self, state: Any, numbers: Mapping[str, int]) -> SavedCache:
        """Return a cache of the states, however many."""
        return SavedCache(self.name, as_list(state), numbers)

    def num_arrays(self, cache: Any) -> int:
        """Return how many states there can be."""
        return len(cache.cache)

    def mismatch(self, saved: SavedCache, like: Any) -> str | None:
        """Return that there are more or fewer states than the model's, if so."""
        num_states = len(saved.arrays)
        is_same = num_states == len(like.cache)
        return None if is_same else f"has {num_states} states"

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache of the states that the file has."""
        from mlx_lm.models.cache import ArraysCache

        cache: Any = ArraysCache(len(saved.arrays))
        for number, tensor in enumerate(saved.arrays):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != (1,):
                raise ValueError("a state is not that of one prompt")
            if 0 in tensor.shape:
                raise ValueError(f"a state of shape {tensor.shape}")
            cache[number] = data.read(tensor)
        return cache


def _state_spec(array: mx.array) -> RowSpec:
    if array.shape[0] != 1:
        raise ValueError(f"a batch of {array.shape[0]}; store each by itself")
    return RowSpec(1, array.size, dtype_name(array), kind="state")


def _shape(params: Mapping[str, int], number: str) -> tuple[int, ...]:
    """Return the shape of a state, which the layout holds a number at a time."""
    names = map(f"shape{number}.{{}}".format, count())
    return tuple(params[name] for name in takewhile(params.__contains__, names))
