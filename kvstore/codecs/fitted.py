"""A basis as arrays to compute with: what a model's rows look like.

Keys are taken before their position rotated them. The keys and values of one token, in
some heads of a layer, make one long row. Less its mean, divided by its own scale,
times ``inverse`` it gives coefficients; ``matrix`` takes them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from ..blas import one_thread
from ..errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..format.basis import BasisFile, BasisGroup
    from .base import Array, Rows
    from .floats import Bools, Floats

Number = TypeVar("Number", bound=np.generic)
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8}
# In deviations of the logarithm of a size. Of 80,000 ordinary rows none passed 9.4;
# of a sink every token has 11 and more in some layer.
_FAR = 10


@dataclass(frozen=True, eq=False)
class FittedLayers:
    """Some layers of equal shape, each array ``(L, G, …)``."""

    group: BasisGroup
    # Angle per token of each pair of a key's numbers, ``(L, pairs)``.
    frequencies: npt.NDArray[np.float64]
    # Coefficients to rows, ``(L, G, N, N)``.
    matrix: Floats
    # ``(L, G, N)``.
    mean: Floats
    # Expected size of a coefficient in quarter octaves, ``(L, G, N)``.
    sigma: npt.NDArray[np.int8]
    # Mean and deviation of what tells a row's scale; for encoding alone.
    features: Floats
    # What they say of it; for encoding alone.
    importance: Floats

    @cached_property
    def inverse(self) -> Floats:
        """Rows to coefficients, ``(L, G, N, N)``; for encoding alone."""
        with one_thread():
            found = np.linalg.inv(self.matrix.astype(np.float64))
        return found.astype(np.float32)

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
        if rows.side != "kv" or not rows.layers:
            return None
        for fitted in self.layers:
            group = fitted.group
            shape = (2 * group.num_heads, group.head_dim)
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
    arrays: dict[str, Array] = {
        name: np.frombuffer(file.tensors[name], _DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in file.specs().items()
    }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise IntegrityError(f"tensor {name} of a basis is not finite")
    layers = tuple(
        fitted_from_arrays(
            group, {name: arrays[f"{number}.{name}"] for name in group.tensors()}
        )
        for number, group in enumerate(file.groups)
    )
    return Fitted(layers, file.steps)


def fitted_from_arrays(group: BasisGroup, arrays: dict[str, Array]) -> FittedLayers:
    """Return some layers of a basis to compute with, from its tensors by name.

    Raises:
        IntegrityError: Its matrix is too large for numbers of 32 bits.
    """
    wide = arrays["matrix"].astype(np.float32)
    with np.errstate(over="ignore"):
        wide *= arrays["scale"].astype(np.float32)[..., None, None]
    if not np.isfinite(wide).all():
        raise IntegrityError("the matrix of a basis is not finite")
    return FittedLayers(
        group,
        arrays["frequencies"].astype(np.float64),
        wide,
        arrays["mean"].astype(np.float32),
        arrays["sigma"].astype(np.int8),
        arrays["features"].astype(np.float32),
        arrays["importance"].astype(np.float32),
    )


def joined(x: npt.NDArray[Number], group: BasisGroup) -> npt.NDArray[Number]:
    """Return keys and values ``(…, 2 H, T, D)`` as long rows ``(…, G, T, N)``."""
    parts = np.moveaxis(_heads(x, group), (-4, -2), (-5, -4))
    return parts.reshape(*parts.shape[:-3], group.width)


def divided(long: Floats, group: BasisGroup) -> Floats:
    """Return long rows ``(…, G, T, N)`` as keys and values ``(…, 2 H, T, D)``."""
    *more, _, tokens, _ = long.shape
    parts = long.reshape(*long.shape[:-1], 2, group.num_joined, group.head_dim)
    x = np.moveaxis(parts, (-5, -4), (-4, -2))
    return x.reshape(*more, 2 * group.num_heads, tokens, group.head_dim)


def put_long(
    sides: Sequence[Array], group: BasisGroup, where: Bools, long: Array
) -> None:
    """Write long rows, ``(n, N)``, over some of keys and values, each ``(H, T, D)``.

    Args:
        sides: Keys and values.
        group: How they are joined.
        where: Over which, ``(G, T)``.
        long: The rows, in that order.
    """
    rows = long.reshape(-1, 2, group.num_joined, group.head_dim)
    for number, side in enumerate(sides):
        parts = side.reshape(group.num_parts, group.num_joined, *side.shape[1:])
        parts.swapaxes(1, 2)[where] = rows[:, number]


def describe(sizes: Floats, features: Floats) -> Floats:
    """Return the numbers that tell the scales of long rows, ``(…, G, T, 6 h)``.

    They are the sizes of each head's key and value, less their mean and divided by
    their deviation, their squares, and the products of neighbours.

    Args:
        sizes: Of :func:`log_sizes`.
        features: Mean and deviation, ``(…, G, 2, 2 h)``.
    """
    x = (sizes - features[..., :1, :]) / features[..., 1:, :]
    x = np.clip(np.nan_to_num(x), -4, 4)
    one = np.ones_like(x[..., :1])
    return np.concatenate([one, x, x**2, x[..., :-1] * x[..., 1:]], axis=-1)


def are_strange(sizes: Floats, features: Floats) -> Bools:
    """Return which tokens have a row unlike all that was learned from, ``(T,)``.

    Where a prompt begins with one token many times, each is such a sink of attention as
    the first. Nothing that was learned tells what an error in its rows does.

    Args:
        sizes: Of :func:`log_sizes`, ``(L, G, T, 2 h)``.
        features: Mean and deviation, ``(L, G, 2, 2 h)``.
    """
    distance = np.abs(sizes - features[..., :1, :])
    return np.asarray((distance > _FAR * features[..., 1:, :]).any(axis=(0, 1, 3)))


def log_sizes(centred: Floats, group: BasisGroup) -> Floats:
    """Return the logarithm of each head's key's and value's size, ``(…, 2 h)``.

    Args:
        centred: Long rows less their mean, ``(…, G, T, N)``.
        group: How they are joined.
    """
    shape = (*centred.shape[:-1], 2 * group.num_joined, group.head_dim)
    heads = centred.reshape(shape)
    sizes = np.maximum(np.linalg.norm(heads, axis=-1), np.float32(1e-6))
    return np.asarray(np.log2(sizes), np.float32)


def _heads(x: npt.NDArray[Number], group: BasisGroup) -> npt.NDArray[Number]:
    *more, _, tokens, dim = x.shape
    return x.reshape(*more, 2, group.num_parts, group.num_joined, tokens, dim)
