"""A basis as arrays to compute with: what a model's rows look like.

Keys are taken before their position rotated them. A row less its mean, divided by its
own scale, times ``inverse`` gives coefficients; ``matrix`` takes them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from ..format.basis import SIDES, BasisFile, BasisGroup
from .base import Array, Rows
from .floats import Floats

_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8}


@dataclass(frozen=True)
class FittedSide:
    """Keys or values of some layers, each array of shape ``(L, H, …)``."""

    # Coefficients to rows, ``(L, H, D, D)``.
    matrix: Floats
    # ``(L, H, D)``.
    mean: Floats
    # Expected size of a coefficient in quarter octaves, ``(L, H, D)``.
    sigma: npt.NDArray[np.int8]
    # What a row's size says of its scale, ``(L, H, 3)``; for encoding alone.
    importance: Floats

    @cached_property
    def inverse(self) -> Floats:
        """Rows to coefficients, ``(L, H, D, D)``; for encoding alone."""
        return np.linalg.inv(self.matrix.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class FittedLayers:
    """Some layers of equal shape."""

    group: BasisGroup
    sides: dict[str, FittedSide]
    # Angle per token of each pair of a key's numbers, ``(L, pairs)``.
    frequencies: npt.NDArray[np.float64]

    def indices(self, layers: tuple[int, ...]) -> list[int]:
        """Return where layers of the model are in the arrays."""
        return [self.group.layers.index(layer) for layer in layers]


@dataclass(frozen=True)
class Fitted:
    """A whole basis."""

    layers: tuple[FittedLayers, ...]
    # Name of a rate to its step in quarter octaves.
    steps: dict[str, int]

    def covering(self, rows: Rows) -> FittedLayers | None:
        """Return what covers all of these rows, or ``None``."""
        if rows.side not in SIDES or not rows.layers:
            return None
        for fitted in self.layers:
            group = fitted.group
            shape = (group.num_heads, group.head_dim)
            if shape == (rows.shape[1], rows.shape[3]) and set(rows.layers) <= set(
                group.layers
            ):
                return fitted
        return None


def fitted_from_file(file: BasisFile) -> Fitted:
    """Return a basis to compute with.

    Raises:
        IntegrityError: It holds numbers with which nothing can be decoded.
    """
    specs = file.specs()
    arrays = {
        name: np.frombuffer(file.tensors[name], _DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in specs.items()
    }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise IntegrityError(f"tensor {name} of a basis is not finite")
    layers = tuple(
        FittedLayers(
            group,
            {side: _side(arrays, f"{number}.{side}.") for side in SIDES},
            arrays[f"{number}.frequencies"].astype(np.float64),
        )
        for number, group in enumerate(file.groups)
    )
    return Fitted(layers, file.steps)


def _side(arrays: dict[str, Array], prefix: str) -> FittedSide:
    matrix, scale, mean, sigma, importance = (
        arrays[prefix + name]
        for name in ("matrix", "scale", "mean", "sigma", "importance")
    )
    scaled = matrix.astype(np.float32) * scale.astype(np.float32)[..., None, None]
    return FittedSide(
        scaled,
        mean.astype(np.float32),
        sigma.astype(np.int8),
        importance.astype(np.float32),
    )
