"""TurboQuant: vectors to a few bits per coordinate, and back, without calibration.

Pure mathematics on arrays. Knows nothing of prompt caches, files or the store. The fast
paths for the CPU are in `turboquant.kernels.numpy`, which is imported by name.
"""

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

__all__ = [
    "Rotation",
    "apply_wh_rotation",
    "decision_boundaries",
    "dequantize_polar",
    "invert_wh_rotation",
    "lloyd_max_centroids",
    "make_wh_rotation",
    "pack_codes",
    "plane_widths",
    "quantize_polar",
    "rotation_matrix",
    "split_planes",
    "unpack_codes",
]
