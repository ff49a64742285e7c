"""ArraysCache: states that can be stored at one position only."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..layout import LayerLayout, RowSpec
from .base import dtype_name, make_layout

if TYPE_CHECKING:
    from .base import Buffers, Held

_MAX_STATES = 4096


class States:
    """``ArraysCache``: recurrent states, which cannot be cut."""

    name = "ArraysCache"
    is_exact = True

    def owns(self, cache: Any) -> bool:
        """Say whether it is an ``ArraysCache``."""
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

    def window_begin(self, layout: LayerLayout, num_tokens: int) -> int:
        """Say that it has no window."""
        return 0

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


def _state_spec(array: mx.array) -> RowSpec:
    if array.shape[0] != 1:
        raise ValueError(f"a batch of {array.shape[0]}; store each by itself")
    return RowSpec(1, array.size, dtype_name(array), kind="state")


def _shape(params: Mapping[str, int], number: str) -> tuple[int, ...]:
    """Return the shape of a state, which the layout holds a number at a time."""
    names = map(f"shape{number}.{{}}".format, count())
    return tuple(params[name] for name in takewhile(params.__contains__, names))
