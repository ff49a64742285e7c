import mlx.core as mx
import numpy as np
import pytest
import reference

from turboquant import (
    Rotation,
    apply_wh_rotation,
    invert_wh_rotation,
    make_wh_rotation,
    rotation_matrix,
)
from turboquant.rotation import rotation_signs

DIMS = [8, 24, 64, 80, 96, 128, 192, 256, 576]


def normal_vectors(dim: int, num: int = 40) -> np.ndarray:
    """Return N(0, 1) numbers, the same for the same dim."""
    return np.random.default_rng(dim).standard_normal((num, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("dim", "seed", "flips"),
    [
        (64, 0, "889de58b7f5b095d"),
        (64, 1, "f4cdb73c84ee1d50"),
        (80, 0, "7bea85b4d3f7eeba2ac6"),
        (128, 2**64 - 1, "8caa7814ff270b3a2f8d1ae2b46471e1"),
    ],
)
def test_signs_are_frozen(dim: int, seed: int, flips: str) -> None:
    """A dim and a seed give the same signs for ever."""
    signs = rotation_signs(Rotation(dim, seed))

    assert flips == np.packbits(signs < 0, bitorder="little").tobytes().hex()


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [(8, (8,)), (80, (64, 16)), (96, (64, 32)), (192, (128, 64)), (576, (512, 64))],
)
def test_blocks_are_powers_of_two(dim: int, sizes: tuple[int, ...]) -> None:
    """A dim is cut into powers of two, largest first."""
    assert sizes == Rotation(dim).block_sizes


def test_blocks_cover_all_coordinates() -> None:
    """Blocks follow on one another from the first coordinate to the last."""
    assert (slice(0, 64), slice(64, 96), slice(96, 104)) == Rotation(104).block_slices


@pytest.mark.parametrize("dim", [0, -8, 4, 7, 20, 100])
def test_dim_must_be_a_multiple_of_8(dim: int) -> None:
    """Vectors of any other length than a positive multiple of 8 are refused."""
    with pytest.raises(ValueError, match=f"multiple of 8: {dim}"):
        make_wh_rotation(dim)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_must_fit_8_bytes(seed: int) -> None:
    """A seed that does not fit in 64 bits is refused."""
    with pytest.raises(ValueError, match="seed must be"):
        make_wh_rotation(64, seed)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_matches_oracle(dim: int) -> None:
    """Rotating on MLX does what the definition says."""
    rotation = make_wh_rotation(dim, 3)
    x = normal_vectors(dim)

    rotated = np.array(apply_wh_rotation(mx.array(x), rotation))

    np.testing.assert_allclose(rotated, reference.rotate(x, rotation), atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_inverse_undoes_rotation(dim: int) -> None:
    """Inverting a rotation gives the vectors back."""
    rotation = make_wh_rotation(dim)
    x = normal_vectors(dim)

    back = invert_wh_rotation(apply_wh_rotation(mx.array(x), rotation), rotation)

    np.testing.assert_allclose(np.array(back), x, atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_matrix_is_orthonormal(dim: int) -> None:
    """The matrix times its transpose is the identity."""
    matrix = rotation_matrix(make_wh_rotation(dim, 5)).astype(np.float64)

    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_matrix_rotates_rows(dim: int) -> None:
    """Vectors times the matrix are the rotated vectors."""
    rotation = make_wh_rotation(dim, 5)
    x = normal_vectors(dim)

    rotated = x @ rotation_matrix(rotation)

    np.testing.assert_allclose(rotated, reference.rotate(x, rotation), atol=1e-5)


def test_matrix_is_cached_and_read_only() -> None:
    """Equal rotations share one matrix, so nobody may write to it."""
    matrix = rotation_matrix(make_wh_rotation(64, 9))

    assert matrix is rotation_matrix(make_wh_rotation(64, 9))
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1


def test_seeds_give_different_rotations() -> None:
    """Another seed is another rotation."""
    first, second = (rotation_matrix(make_wh_rotation(64, seed)) for seed in (0, 1))

    assert not np.array_equal(first, second)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_rotation_keeps_shape_and_dtype(dtype: mx.Dtype) -> None:
    """A rotated array has the shape and the dtype it had."""
    rotation = make_wh_rotation(80)

    rotated = apply_wh_rotation(mx.ones((2, 3, 80), dtype), rotation)

    assert ((2, 3, 80), dtype) == (rotated.shape, rotated.dtype)


def test_no_vectors_rotate_to_none() -> None:
    """An empty array stays empty."""
    assert (0, 64) == apply_wh_rotation(mx.zeros((0, 64)), Rotation(64)).shape


@pytest.mark.parametrize("rotate", [apply_wh_rotation, invert_wh_rotation])
def test_vectors_must_fit(rotate) -> None:
    """Vectors of another length or of integers are refused."""
    with pytest.raises(ValueError, match="dim 64"):
        rotate(mx.ones((2, 128)), Rotation(64))
    with pytest.raises(ValueError, match="float dtype"):
        rotate(mx.ones((2, 64), mx.int32), Rotation(64))
