"""TurboQuantKVCache: TurboQuant codes, and the newest rows as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ...codecs.dtypes import MLX_DTYPES
from ...errors import UnsupportedCacheError
from ...format.chain import BLOCK_SIZE
from ..layout import LayerLayout, RowSpec
from .base import CacheKind, dtype_name, make_layout

if TYPE_CHECKING:
    from ...codecs.base import Array, Parts, Rows
    from ...codecs.turbo import Turbo
    from .base import Buffers, Held

_SIDES = {"k.coded": "coded_keys", "v.coded": "coded_values"}
CODED = tuple(_SIDES)
"""Arrays of which a block has either the codes of a live cache, or exact rows."""
LiveBlock = mx.array | dict[str, mx.array]
"""Rows of one layer, ``(1, H, T, D)``, or what ``CodedRows.append_codes`` takes."""


class TurboRows(CacheKind):
    """``TurboQuantKVCache``: its own codes, never decoded and encoded again."""

    name = "TurboQuantKVCache"
    is_exact = False
    is_cuttable = True

    def owns(self, cache: Any) -> bool:
        """Whether it is a ``TurboQuantKVCache``; asking imports nothing."""
        return type(cache).__module__ == "turboquant.kv_cache"

    def bits(self, cache: Any) -> int:
        """Return those of keys or of values."""
        return int(min(side.bits for _, side in _sides(cache)))

    def read(self, cache: Any) -> LayerLayout:
        """Return heads, dimensions and dtype of the rows, and the bits of the codes."""
        specs: dict[str, RowSpec] = {}
        for name, rows in _sides(cache):
            if rows.tail is not None:
                batch, heads, _, dim = rows.tail.shape
                if batch != 1:
                    raise ValueError(f"a batch of {batch}; store each by itself")
                specs[name] = RowSpec(heads, dim, dtype_name(rows.tail))
        bits = {f"{name[0]}_bits": rows.bits for name, rows in _sides(cache)}
        return make_layout(self.name, specs, **bits)

    def held(self, cache: Any) -> Held:
        """Return the rows that are no codes."""
        return {
            name: (rows.tail, rows.num_coded)
            for name, rows in _sides(cache)
            if rows.tail is not None
        }

    def build(self, layout: LayerLayout, buffers: Buffers, num_tokens: int) -> Any:
        """Return a ``TurboQuantKVCache`` of exact rows, or of blocks in order."""
        from turboquant.kv_cache import TurboQuantKVCache

        params = dict(layout.params)
        cache = TurboQuantKVCache(params["k_bits"], params["v_bits"])
        for name, blocks in buffers.items():
            rows = getattr(cache, _SIDES[name])
            if isinstance(blocks, mx.array):
                rows = rows.append(blocks).trim(num_tokens)
            else:
                rows = _joined(rows, blocks).trim(num_tokens).settle()
                # Here, since another thread may not compute what this one began.
                mx.eval(rows.arrays)
            setattr(cache, _SIDES[name], rows)
            cache.offset = num_tokens
        return cache


def check_blocks(prompt_cache: Sequence[Any], block_size: int) -> None:
    """Refuse live codes whose blocks are not those of a store.

    Raises:
        UnsupportedCacheError: They are of other sizes, or not those of all layers.
    """
    found = {
        rows.num_coded
        for cache in prompt_cache
        if TurboRows().owns(cache)
        for _, rows in _sides(cache)
        if rows.tail is not None
    }
    if found - {0} and (len(found) > 1 or block_size != BLOCK_SIZE):
        raise UnsupportedCacheError(
            f"live codes are of blocks of {BLOCK_SIZE} tokens, which end alike in all"
            " layers",
            hint="decode them with `to_kv_cache`",
        )


def codec_of(layout: LayerLayout) -> Turbo:
    """Return the codec that the codes of a layer are of."""
    from ...codecs.turbo import Turbo

    bits = dict(layout.params)
    return Turbo(bits["k_bits"], bits["v_bits"])


def read_codes(
    codec: Turbo, caches: Sequence[Any], rows: Rows
) -> dict[str, Array] | None:
    """Return the codes of some layers' rows, or ``None`` where they are exact."""
    from ...codecs.turbo import NUM_SINKS

    held = [getattr(cache, _SIDES[rows.side]) for cache in caches]
    if rows.start >= held[0].num_coded:
        return None
    # Codes start behind the sinks.
    first, last = rows.start - NUM_SINKS, rows.start - NUM_SINKS + rows.shape[2]
    live = {
        "codes": [side.codes[:, :, max(0, first) : last] for side in held],
        "norms": [side.norms[:, :, max(0, first) : last] for side in held],
        "sinks": [side.sinks for side in held],
    }
    if held[0].means is not None:
        block = rows.start // BLOCK_SIZE
        live["mean"] = [side.means[:, :, block] for side in held]
    if rows.dtype == "BF16":
        live["sinks"] = [sinks.view(mx.uint16) for sinks in live["sinks"]]
    stacked = {name: mx.concatenate(several) for name, several in live.items()}
    mx.eval(stacked)
    return codec.from_live({n: np.asarray(x) for n, x in stacked.items()}, rows)


def live_blocks(
    codec: Turbo | None, found: Array | Parts, rows: Rows
) -> list[LiveBlock]:
    """Return each layer's rows of a stored block.

    Args:
        codec: What their codes are of, or ``None`` where they are exact.
        found: Rows, ``(L, H, T, D)``, or the parts of codes.
        rows: Which they are.
    """
    dtype = MLX_DTYPES[rows.dtype]
    if not isinstance(found, Mapping):
        return [mx.array(x[None]).view(dtype) for x in found]
    assert codec is not None
    live = codec.to_live(found, rows)
    if "mean" in live:
        live["mean"] = live["mean"][:, :, None]
    blocks: list[LiveBlock] = []
    for i in range(rows.shape[0]):
        block = {name: mx.array(x[i][None]) for name, x in live.items()}
        if "sinks" in block:
            block["sinks"] = block["sinks"].view(dtype)
        blocks.append(block)
    return blocks


def _joined(rows: Any, blocks: Sequence[LiveBlock]) -> Any:
    for block in blocks:
        if isinstance(block, mx.array):
            rows = rows.append(block)
        else:
            # An older save had the rows before these, which were the newest then.
            rows = rows.settle(num_exact=0).append_codes(**block)
    return rows


def _sides(cache: Any) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(cache, side)) for name, side in _SIDES.items())
