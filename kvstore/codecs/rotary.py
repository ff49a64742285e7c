"""RoPE done and undone: keys as they were before their position rotated them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .floats import Floats


Doubles = npt.NDArray[np.float64]
_SPAN = 256


def angles(frequencies: Doubles, start: int, num_tokens: int) -> tuple[Floats, Floats]:
    """Return cosine and sine, ``(L, T, pairs)``, for frequencies of ``(L, pairs)``.

    Where all layers have the same, ``L`` is 1.
    """
    if (frequencies == frequencies[:1]).all():
        frequencies = frequencies[:1]
    shape = (len(frequencies), num_tokens, frequencies.shape[1])
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for number, each in enumerate(frequencies):
        _turn_from(start, each, cos[number], sin[number])
    return cos, sin


def _turn_from(start: int, frequencies: Doubles, cos: Floats, sin: Floats) -> None:
    """Write cosine and sine of one layer, ``(T, pairs)``.

    A position is the last multiple of 256 and what is left: the cosines and sines of
    what is left are known, and those of a sum are four products.
    """
    end = start + len(cos)
    near = _first_angles(frequencies.tobytes())
    for begin in range(start - start % _SPAN, end, _SPAN):
        first, last = max(start, begin), min(end, begin + _SPAN)
        c, s = (x[first - begin : last - begin] for x in near)
        # In float64: in float32 a position of 100,000 would be off by 1/100.
        angle = begin * frequencies
        far_cos, far_sin = np.cos(angle), np.sin(angle)
        cos[first - start : last - start] = far_cos * c - far_sin * s
        sin[first - start : last - start] = far_sin * c + far_cos * s


@lru_cache(maxsize=16)
def _first_angles(frequencies: bytes) -> tuple[Doubles, Doubles]:
    """Return cosine and sine of the first positions, ``(256, pairs)``."""
    angle = np.arange(_SPAN)[:, None] * np.frombuffer(frequencies, np.float64)
    return np.cos(angle), np.sin(angle)


def rotate(x: Floats, cos: Floats, sin: Floats, *, is_traditional: bool) -> Floats:
    """Return rows ``(…, T, D)`` rotated by angles ``(…, T, pairs)``.

    With ``-sin`` in place of ``sin`` they are rotated back.
    """
    out = x.copy()
    first, second = _halves(cos.shape[-1], is_traditional)
    one, two = x[..., first], x[..., second]
    out[..., first] = one * cos - two * sin
    out[..., second] = one * sin + two * cos
    return out


def rotate_on_device(
    x: mx.array, cos: mx.array, sin: mx.array, *, is_traditional: bool
) -> mx.array:
    """Do what :func:`rotate` does, on MLX's device."""
    pairs = cos.shape[-1]
    first, second = _halves(pairs, is_traditional)
    one, two = x[..., first], x[..., second]
    turned = [one * cos - two * sin, one * sin + two * cos]
    if is_traditional:
        joined = mx.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
    else:
        joined = mx.concatenate(turned, axis=-1)
    return mx.concatenate([joined, x[..., 2 * pairs :]], axis=-1)


def _halves(pairs: int, is_traditional: bool) -> tuple[slice, slice]:
    if is_traditional:
        return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    return slice(0, pairs), slice(pairs, 2 * pairs)
