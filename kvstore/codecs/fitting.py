"""Rows of a model to a basis: what `kvstore calibrate` computes.

Each head gets a matrix of its own, in which its rows' coefficients are uncorrelated and
an error of one step in any of them does equal harm. What an error does is told by a
metric; from rows alone, every number of a head is taken to matter alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..format.basis import SIDES, BasisFile, BasisGroup, basis_to_bytes
from ..format.documents import JSON
from .base import Array, Codec, Rows
from .fit import NUM_SINKS, Fit
from .fitted import fitted_from_file
from .floats import Floats, widen
from .rotary import angles, rotate

Doubles = npt.NDArray[np.float64]
RATES = ("1", "1.5", "2", "3", "4")
"""Bits per number that each step is chosen for."""
VALUE_RATIO = 2.4
"""How much coarser values are than keys, relative to their sizes; measured."""
_STEPS = range(-48, 49)
_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class Sample:
    """The keys and values of some tokens, one behind the other."""

    # Position in the sequence of the first token.
    start: int
    # safetensors name of the element type.
    dtype: str
    # Each ``(L, H, T, D)``, held as NumPy holds the dtype.
    keys: Array
    values: Array

    def side(self, name: str) -> Array:
        """Return keys or values."""
        return self.keys if name == "k" else self.values


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a key's position rotates it, in all of some layers."""

    # Angle per token of each pair, ``(pairs,)``.
    frequencies: Doubles
    is_traditional: bool


NO_ROTATION = Rotation(np.zeros(0), is_traditional=False)


def fit_rows(
    samples: Sequence[Sample],
    layers: tuple[int, ...],
    rotation: Rotation,
    about: JSON,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bytes:
    """Return the file of a basis, fitted to rows alone.

    Args:
        samples: Rows as the model computed them, without loss.
        layers: Which layers of the model they are of.
        rotation: How positions rotate keys.
        about: How they came about.
        progress: Called with (rates done, rates in all).
    """
    _, heads, _, dim = samples[0].keys.shape
    group = BasisGroup(
        layers, heads, dim, len(rotation.frequencies), rotation.is_traditional
    )
    tensors: dict[str, Array] = {
        "0.frequencies": np.tile(rotation.frequencies, (len(layers), 1))
    }
    for side in SIDES:
        for name, array in _fit_side(samples, side, rotation).items():
            tensors[f"0.{side}.{name}"] = array
    blank = BasisFile((group,), dict.fromkeys(RATES, 0), about, {})
    raw = {
        name: tensors[name].astype(_HELD[dtype]).tobytes()
        for name, (dtype, _) in blank.specs().items()
    }
    unset = BasisFile((group,), blank.steps, about, raw)
    steps = choose_steps(unset, samples, layers, progress)
    return basis_to_bytes(BasisFile((group,), steps, about, raw))


_HELD = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1"}


def choose_steps(
    basis: BasisFile,
    samples: Sequence[Sample],
    layers: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> dict[str, int]:
    """Return, for each rate, the finest step with which samples take no more bits."""
    sizes: dict[int, float] = {}

    def bits(step: int) -> float:
        if step not in sizes:
            tried = BasisFile(basis.groups, {"0": step}, {}, basis.tensors)
            sizes[step] = _measure(tried, samples, layers)
        return sizes[step]

    steps: dict[str, int] = {}
    for done, rate in enumerate(RATES):
        progress(done, len(RATES))
        low, high = _STEPS[0], _STEPS[-1]
        while low < high:
            middle = (low + high) // 2
            if bits(middle) > float(rate):
                low = middle + 1
            else:
                high = middle
        steps[rate] = low
    progress(len(RATES), len(RATES))
    return steps


def _measure(
    basis: BasisFile, samples: Sequence[Sample], layers: tuple[int, ...]
) -> float:
    """Return the bits per number that samples take, without exact sinks."""
    array = Fit("0", "0" * 64, fitted_from_file(basis))
    codec = Codec(array, array.compressor)
    nbytes = count = 0
    for sample in samples:
        for side in SIDES:
            x = sample.side(side)
            shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
            rows = Rows(side, sample.start, shape, sample.dtype, layers)
            parts = codec.encode(x, rows, "")
            nbytes += sum(len(part.data) for part in parts if part.name != "sinks")
            count += x.size
    return nbytes * 8 / count


def _fit_side(
    samples: Sequence[Sample], side: str, rotation: Rotation
) -> dict[str, Array]:
    """Return the tensors of keys or of values, by name."""
    rows = [unrotated(sample, side, rotation) for sample in samples]
    # Values are taken about zero: their size says how much they matter.
    mean = _mean(rows) if side == "k" else np.zeros_like(_mean(rows))
    centred = [x - mean[:, :, None] for x in rows]
    importance = np.zeros((*mean.shape[:2], 3))
    if side == "v":
        importance[..., 0] = -2 * _mean_size(centred)
        importance[..., 1] = 2
    scaled = [_scaled(x, importance) for x in centred]
    covariance = _covariance(scaled)
    dim = mean.shape[-1]
    size = np.trace(covariance, axis1=-2, axis2=-1) / dim
    ratio = VALUE_RATIO if side == "v" else 1.0
    metric = np.eye(dim) / np.maximum(size, _LEAST)[..., None, None] / ratio**2
    matrix, scale = solve(covariance, metric)
    restored = matrix.astype(np.float64) * scale[..., None, None].astype(np.float64)
    inverse = np.linalg.inv(restored)
    power = np.einsum("lhij,lhjk,lhik->lhi", inverse, covariance, inverse)
    sigma = np.floor(2 * np.log2(np.maximum(power, _LEAST)))
    return {
        "matrix": matrix,
        "scale": scale,
        "mean": mean,
        "sigma": np.clip(sigma, -128, 127),
        "importance": importance,
    }


def solve(covariance: Doubles, metric: Doubles) -> tuple[Array, Array]:
    """Return matrices, float16 with their scales, that uncorrelate and weigh errors.

    Args:
        covariance: Of rows, ``(L, H, D, D)``.
        metric: What an error does, ``(L, H, D, D)``, positive definite.
    """
    values, vectors = np.linalg.eigh(metric)
    root = np.sqrt(np.maximum(values, _LEAST * values.max(axis=-1, keepdims=True)))
    half = vectors * root[..., None, :] @ vectors.swapaxes(-1, -2)
    back = vectors / root[..., None, :] @ vectors.swapaxes(-1, -2)
    _, turned = np.linalg.eigh(half @ covariance @ half)
    matrix = back @ turned[..., ::-1]
    scale = np.abs(matrix).max(axis=(-1, -2)).astype(np.float32)
    return (matrix / scale[..., None, None]).astype(np.float16), scale


def unrotated(sample: Sample, side: str, rotation: Rotation) -> Floats:
    """Return the rows behind the sinks, keys rotated back to position 0."""
    sinks = max(0, NUM_SINKS - sample.start)
    x = widen(np.ascontiguousarray(sample.side(side)[:, :, sinks:]), sample.dtype)
    if side == "v" or not len(rotation.frequencies):
        return x
    frequencies = rotation.frequencies[None]
    cos, sin = angles(frequencies, sample.start + sinks, x.shape[2])
    return rotate(x, cos[0], -sin[0], is_traditional=rotation.is_traditional)


def find_rotation(
    samples: Sequence[Sample], candidates: Sequence[Rotation]
) -> Rotation:
    """Return the rotation without which keys are the most alike."""

    def spread(rotation: Rotation) -> float:
        rows = [unrotated(sample, "k", rotation) for sample in samples]
        mean = _mean(rows)
        covariance = _covariance([x - mean[:, :, None] for x in rows])
        values = np.linalg.eigvalsh(covariance)
        floor = 1e-6 * values.max(axis=-1, keepdims=True)
        return float(np.log(np.maximum(values, floor + _LEAST)).mean())

    return min(candidates, key=spread)


def usual_rotations(dim: int, more: Sequence[float] = ()) -> list[Rotation]:
    """Return the rotations that models of this head size have, and none.

    Args:
        dim: ``D``.
        more: Further bases than the usual ones.
    """
    found = [NO_ROTATION]
    for base in dict.fromkeys((*more, 1e4, 1e5, 5e5, 1e6, 5e6, 8e6, 1e7)):
        for turned in dict.fromkeys((dim, dim // 2, dim // 4)):
            frequencies = base ** (-np.arange(0, turned - 1, 2) / turned)
            found += [Rotation(frequencies, is_old) for is_old in (False, True)]
    return found


def _mean(rows: Sequence[Floats]) -> Doubles:
    """Return each head's mean, ``(L, H, D)``."""
    total = sum(x.sum(axis=2, dtype=np.float64) for x in rows)
    return np.asarray(total / sum(x.shape[2] for x in rows))


def _mean_size(rows: Sequence[Array]) -> Doubles:
    """Return the mean of the logarithm of each head's norms, ``(L, H)``."""
    sizes = [np.log2(np.maximum(np.linalg.norm(x, axis=-1), 1e-6)) for x in rows]
    return np.asarray(np.concatenate(sizes, axis=-1).mean(axis=-1))


def _scaled(x: Array, importance: Doubles) -> Array:
    """Return rows divided by the scales that they will have."""
    size = np.log2(np.maximum(np.linalg.norm(x, axis=-1), 1e-6))
    constant, linear, square = np.moveaxis(importance[:, :, None], -1, 0)
    exponents = np.rint(constant + linear * size + square * size**2)
    return np.asarray(x / np.exp2(np.clip(exponents, -6, 6) / 2)[..., None])


def _covariance(rows: Sequence[Array]) -> Doubles:
    """Return each head's second moments, ``(L, H, D, D)``."""
    wide = (x.astype(np.float64) for x in rows)
    total = sum(x.swapaxes(-1, -2) @ x for x in wide)
    return np.asarray(total / sum(x.shape[2] for x in rows))
