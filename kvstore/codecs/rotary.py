"""RoPE done and undone: keys as they were before their position rotated them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .floats import Floats


def angles(
    frequencies: npt.NDArray[np.float64], start: int, num_tokens: int
) -> tuple[Floats, Floats]:
    """Return cosine and sine, ``(L, T, pairs)``, for frequencies of ``(L, pairs)``.

    Where all layers have the same, ``L`` is 1.
    """
    if (frequencies == frequencies[:1]).all():
        frequencies = frequencies[:1]
    # In float64: in float32 a position of 100,000 would be off by 1/100.
    positions = np.arange(start, start + num_tokens, dtype=np.float64)
    angle = positions[:, None] * frequencies[:, None]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


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
