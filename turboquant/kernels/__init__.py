"""Blocks of rows to codes and back on the CPU: compiled kernels, or NumPy without them.

Both make the codes that `turboquant.quantizer` defines, the same bytes on any machine.
The environment variable ``TURBOQUANT_KERNELS`` set to ``numpy`` keeps to NumPy.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from turboquant.kernels.numpy import BlockCodes
    from turboquant.rotation import Rotation


class Kernels(Protocol):
    """What can encode and decode blocks."""

    @property
    def name(self) -> str:
        """``numpy``, or the instruction set that the kernels are compiled for."""

    def encode_block(
        self,
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        is_centred: bool,
    ) -> BlockCodes:
        """Quantize the rows of some layers to ``bits`` bits per coordinate.

        Args:
            layers: For each layer its rows, shape ``(H, T, D)``, of any strides,
                ``float32``, ``float16``, or ``uint16`` with the bits of ``bfloat16``.
            bits: Bits per coordinate, 1 to 8.
            rotation: A rotation of rows of length ``D``.
            is_centred: Whether each head's mean is taken off its rows first.

        Raises:
            ValueError: ``bits`` is not 1 to 8, or a shape, a dtype or ``rotation`` does
                not fit.
        """

    def decode_block(
        self,
        planes: Sequence[NDArray[Any]],
        norms: NDArray[np.float32],
        layers: Sequence[NDArray[Any]],
        bits: int,
        rotation: Rotation,
        *,
        mean: NDArray[Any] | None = None,
    ) -> None:
        """Decode rows into one buffer for each layer.

        Args:
            planes: The planes of the codes (`split_planes`), widest first, each of
                shape ``(L, H, T, D * width // 8)``, ``uint8``.
            norms: Norms, shape ``(L, H, T)``, ``float32``.
            layers: ``L`` buffers to fill, each of shape ``(H, T, D)``, of any strides,
                of the dtypes that `encode_block` takes.
            bits: Bits per coordinate, 1 to 8.
            rotation: The rotation the rows were quantized with.
            mean: What is added to every row of a head, shape ``(L, H, D)``, any float
                dtype; a coordinate of it that is not finite makes its sums NaN.

        Raises:
            ValueError: ``bits`` is not 1 to 8, or a shape, a dtype or ``rotation`` does
                not fit.
        """

    def split_bytes(self, layers: Sequence[NDArray[Any]]) -> list[NDArray[np.uint8]]:
        """Return the bytes of some layers' numbers, plane by plane.

        Args:
            layers: For each layer its rows, shape ``(H, T, D)``, of any strides and
                one dtype.

        Returns:
            One plane for each byte of a number, the least significant first, each of
            shape ``(L, H, T, D)``.
        """

    def join_bytes(
        self, planes: Sequence[NDArray[Any]], layers: Sequence[NDArray[Any]]
    ) -> None:
        """Write numbers whose bytes lie in planes.

        Args:
            planes: One for each byte of a number, least significant first, each of
                shape ``(L, H, T, D)``, ``uint8``.
            layers: ``L`` buffers to fill, of any strides; they may have fewer than
                ``T`` rows, which are the first ones then.
        """


@lru_cache(maxsize=1)
def best_kernels() -> Kernels:
    """Return the fastest kernels that work on this machine, the same ones every time.

    Raises:
        ValueError: ``TURBOQUANT_KERNELS`` is set to something other than ``numpy``.
    """
    wanted = os.environ.get("TURBOQUANT_KERNELS", "")
    if wanted not in ("", "numpy"):
        raise ValueError(f"TURBOQUANT_KERNELS can be `numpy` or nothing: {wanted!r}")
    # Late: whoever only names the kernels loads neither.
    from . import native, numpy

    available = [] if wanted else native.load_all()
    for kernels in available:
        if native.agrees(kernels):
            return kernels
        warnings.warn(
            f"the {kernels.name} kernels of turboquant give wrong codes here and are"
            " not used",
            RuntimeWarning,
            stacklevel=2,
        )
    return numpy.NumpyKernels()
