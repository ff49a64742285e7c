"""Random signs and the Walsh-Hadamard transform. Knows nothing of bits or codes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Frozen: another domain is another rotation, and stored codes would decode to noise.
_SIGNS_DOMAIN = b"turboquant/wh-rotation/1"


# A vector whose largest coordinate lies outside of these is scaled by a power of two,
# which is exact, before it is squared.
SMALL = 2.0**-40
LARGE = 2.0**40
RESCALE = 2.0**84
# The least normal float32: a GPU may take anything below for zero.
TINY = 2.0**-126


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthonormal map of vectors, the same for the same arguments for ever.

    It flips the signs of some coordinates, then transforms each block of a power of two
    coordinates by an orthonormal Walsh-Hadamard matrix.

    Raises:
        ValueError: ``dim`` or ``seed`` is out of range.
    """

    # Length of the vectors, ``D``: a multiple of 8.
    dim: int
    # What the signs are drawn from, 0 to ``2**64 - 1``.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 8 or self.dim % 8:
            raise ValueError(f"dim must be a positive multiple of 8: {self.dim}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be 0 to 2**64 - 1: {self.seed}")

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The powers of two that add up to ``dim``, largest first: 80 = 64 + 16."""
        sizes = (1 << bit for bit in reversed(range(self.dim.bit_length())))
        return tuple(size for size in sizes if self.dim & size)

    @property
    def block_slices(self) -> tuple[slice, ...]:
        """Where each block of coordinates lies."""
        stops = accumulate(self.block_sizes)
        pairs = zip(self.block_sizes, stops, strict=True)
        return tuple(slice(stop - size, stop) for size, stop in pairs)


def make_wh_rotation(dim: int, seed: int = 0) -> Rotation:
    """Return the rotation of vectors of length ``dim`` that belongs to ``seed``.

    Raises:
        ValueError: ``dim`` is no positive multiple of 8, or ``seed`` is out of range.
    """
    return Rotation(dim, seed)


def apply_wh_rotation(x: mx.array, rotation: Rotation) -> mx.array:
    """Rotate vectors.

    Args:
        x: Vectors, shape ``(..., D)``, any float dtype.
        rotation: A rotation of vectors of length ``D``.

    Returns:
        Rotated vectors, the shape and dtype of ``x``, computed in ``float32``.

    Raises:
        ValueError: ``D`` does not fit ``rotation``, or ``x`` is not of a float dtype.

    References:
        QuaRot, arXiv:2404.00456, for random signs and a Hadamard matrix.
    """
    _check_vectors(x, rotation)
    signs = mx.array(rotation_signs(rotation))
    return _transform(x.astype(mx.float32) * signs, rotation).astype(x.dtype)


def invert_wh_rotation(x: mx.array, rotation: Rotation) -> mx.array:
    """Undo `apply_wh_rotation`.

    Args:
        x: Rotated vectors, shape ``(..., D)``, any float dtype.
        rotation: The rotation that was applied.

    Returns:
        Vectors, the shape and dtype of ``x``, computed in ``float32``.

    Raises:
        ValueError: ``D`` does not fit ``rotation``, or ``x`` is not of a float dtype.
    """
    _check_vectors(x, rotation)
    signs = mx.array(rotation_signs(rotation))
    return (_transform(x.astype(mx.float32), rotation) * signs).astype(x.dtype)


def rotation_signs(rotation: Rotation) -> NDArray[np.float32]:
    """Return the signs that come before the transform.

    Returns:
        Plus or minus one, shape ``(D,)``, ``float32``; read-only.
    """
    seed = rotation.seed.to_bytes(8, "little")
    dim = rotation.dim.to_bytes(4, "little")
    # A hash, not a random generator: no release can change what it gives.
    shake = hashlib.shake_128(_SIGNS_DOMAIN + seed + dim)
    digest = np.frombuffer(shake.digest(rotation.dim // 8), np.uint8)
    flips = np.unpackbits(digest, bitorder="little")
    return _read_only(np.where(flips == 1, -1, 1).astype(np.float32))


@lru_cache(maxsize=64)
def rotation_matrix(rotation: Rotation) -> NDArray[np.float32]:
    """Return the rotation as a matrix for row vectors.

    Returns:
        Shape ``(D, D)``, ``float32``, read-only: ``x @ matrix`` rotates, and
        ``x @ matrix.T`` undoes it.
    """
    matrix = np.zeros((rotation.dim, rotation.dim), np.float32)
    for size, block in zip(rotation.block_sizes, rotation.block_slices, strict=True):
        matrix[block, block] = _hadamard(size) / math.sqrt(size)
    return _read_only(rotation_signs(rotation)[:, None] * matrix)


def _hadamard(size: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _transform(x: mx.array, rotation: Rotation) -> mx.array:
    if x.size == 0:  # which mx.hadamard_transform refuses
        return x
    # Powers of two alone: MLX 0.32 corrupts memory at 72, 100 or 576.
    blocks = [mx.hadamard_transform(x[..., block]) for block in rotation.block_slices]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)


def _check_vectors(x: mx.array, rotation: Rotation) -> None:
    if x.ndim == 0 or x.shape[-1] != rotation.dim:
        raise ValueError(f"the rotation is of dim {rotation.dim}: got shape {x.shape}")
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"vectors must be of a float dtype: got {x.dtype}")


def _read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array.flags.writeable = False
    return array
