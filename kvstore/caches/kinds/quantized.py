"""QuantizedKVCache: affine codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layout import LayerLayout, Shapes
from .base import CacheKind, make_layout, row_specs
from .saved import (
    FROM_0_28_1,
    IN_0_31,
    IN_0_32,
    TO_0_28_0,
    FileArrays,
    FileForm,
    SavedCache,
    as_list,
    first_rows,
    is_float,
    rows_shape,
)

if TYPE_CHECKING:
    from .base import Buffers, Held


class AffineRows(CacheKind):
    """``QuantizedKVCache``: packed codes, scales and biases, bit for bit."""

    name = "QuantizedKVCache"
    is_exact = False
    is_cuttable = True
    stands_for = "KVCache"  # `--kv-bits`
    forms = (
        FileForm(frozenset((TO_0_28_0,)), ("step", "offset", "group_size", "bits")),
        FileForm(
            frozenset((FROM_0_28_1, IN_0_31, IN_0_32)), ("offset", "group_size", "bits")
        ),
    )
    _names = tuple(f"{s}.{p}" for s in "kv" for p in ("codes", "scales", "biases"))

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        return type(cache) is QuantizedKVCache

    def bits(self, cache: Any) -> int:
        """Return its own."""
        return int(cache.bits)

    def read(self, cache: Any) -> LayerLayout:
        """Return what it keeps, with group size and bits."""
        specs = row_specs(self.held(cache))
        return make_layout(
            self.name, specs, bits=cache.bits, group_size=cache.group_size
        )

    def held(self, cache: Any) -> Held:
        """Return codes, scales and biases of both sides."""
        if cache.keys is None:
            return {}
        arrays = zip(self._names, (*cache.keys, *cache.values), strict=True)
        return {name: (array, 0) for name, array in arrays}

    def shapes(self, layout: LayerLayout) -> Shapes:
        """Return what the codes stand for."""
        rows, bits = dict(layout.rows), dict(layout.params)["bits"]
        return {
            side: (codes.num_heads, codes.head_dim * 32 // bits, scales.dtype)
            for side in "kv"
            if (codes := rows.get(f"{side}.codes"))
            and (scales := rows.get(f"{side}.scales"))
        }

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``QuantizedKVCache``."""
        from mlx_lm.models.cache import QuantizedKVCache

        params = dict(layout.params)
        cache: Any = QuantizedKVCache(params["group_size"], params["bits"])
        if buffers:
            ordered = [buffers[name] for name in self._names]
            # Lists, since mlx-lm assigns to their items.
            cache.keys, cache.values = ordered[:3], ordered[3:]
            cache.offset = num_tokens
        return cache

    def from_file(self, saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
        """Return a cache of the codes up to its offset."""
        offset, group_size, bits = (
            saved.numbers[name] for name in ("offset", "group_size", "bits")
        )
        has_rows = saved.has_rows()
        if group_size not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8):
            raise ValueError(f"groups of {group_size} with {bits} bits")
        layout = make_layout(self.name, {}, bits=bits, group_size=group_size)
        if not has_rows:
            return self.build(layout, {}, 0)
        sides = [as_list(side, 3) for side in saved.arrays]
        shapes = {_check_codes(side, group_size, bits) for side in sides}
        if len(shapes) != 1:
            raise ValueError(f"keys and values of shapes {sorted(shapes)}")
        rows = first_rows(offset, shapes.pop()[1])
        arrays = [data.read(tensor)[:, :, rows] for side in sides for tensor in side]
        return self.build(layout, dict(zip(self._names, arrays, strict=True)), offset)


def _check_codes(side: list[Any], group_size: int, bits: int) -> tuple[int, ...]:
    """Return heads and rows of codes, scales and biases that belong together."""
    codes, scales, biases = side
    shapes = [rows_shape(tensor) for tensor in side]
    same = shapes[0][:3] == shapes[1][:3] and shapes[1] == shapes[2]
    # 32 bits of codes in a number, and as many codes as the groups have.
    if not same or shapes[0][3] * 32 != shapes[1][3] * group_size * bits:
        raise ValueError(f"codes, scales and biases of shapes {shapes}")
    if (
        codes.dtype != "U32"
        or not is_float(scales)
        or biases.dtype != scales.dtype
        or 0 in shapes[0]
    ):
        raise ValueError(f"codes of {codes.dtype}, scales of {scales.dtype}")
    return shapes[0][1:3]
