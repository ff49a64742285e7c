"""TurboQuant: vectors to a few bits per coordinate, and back, without calibration.

Pure mathematics on arrays. Knows nothing of files or the store. The fast path for the
CPU is in `turboquant.kernels`, which is imported by name. `TurboQuantKVCache`, a live
cache of codes, needs mlx-lm, which is imported when that class is first used.
"""

from typing import TYPE_CHECKING

from turboquant.codebook import decision_boundaries, lloyd_max_centroids
from turboquant.packing import pack_codes, plane_widths, split_planes, unpack_codes
from turboquant.quantizer import dequantize_polar, quantize_polar
from turboquant.rotation import (
    Rotation,
    apply_wh_rotation,
    invert_wh_rotation,
    make_wh_rotation,
    rotation_matrix,
)

if TYPE_CHECKING:
    from turboquant.kv_cache import (
        TurboQuantKVCache,
        parse_kv_bits,
        quantize_prompt_cache,
    )

__all__ = [
    "Rotation",
    "TurboQuantKVCache",
    "apply_wh_rotation",
    "decision_boundaries",
    "dequantize_polar",
    "invert_wh_rotation",
    "lloyd_max_centroids",
    "make_wh_rotation",
    "pack_codes",
    "parse_kv_bits",
    "plane_widths",
    "quantize_polar",
    "quantize_prompt_cache",
    "rotation_matrix",
    "split_planes",
    "unpack_codes",
]

_OF_THE_LIVE_CACHE = {"TurboQuantKVCache", "parse_kv_bits", "quantize_prompt_cache"}


def __getattr__(name: str) -> object:
    """Return a name of the live cache, and import mlx-lm for it."""
    if name in _OF_THE_LIVE_CACHE:
        from turboquant import kv_cache

        return getattr(kv_cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for what completes them."""
    return __all__
