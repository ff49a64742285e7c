import numpy as np
import pytest
import reference

from turboquant import lloyd_max_centroids, make_wh_rotation


@pytest.mark.parametrize("dim", [64, 80, 576])
def test_hadamard_is_its_own_inverse(dim: int) -> None:
    """The orthonormal Walsh-Hadamard matrix squared is the identity."""
    matrix = reference.hadamard(make_wh_rotation(dim))

    np.testing.assert_allclose(matrix @ matrix, np.eye(dim), atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_undoes_pack(bits: int) -> None:
    """The oracle reads what it packs."""
    indices = np.random.default_rng(0).integers(0, 2**bits, (3, 80), np.uint8)

    np.testing.assert_array_equal(
        indices, reference.unpack(reference.pack(indices, bits), bits)
    )


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_indices_are_of_the_nearest_centroids(bits: int) -> None:
    """No other centroid is nearer to a rotated coordinate than its own."""
    rotation = make_wh_rotation(64)
    x = np.random.default_rng(1).standard_normal((10, 64))

    indices, _ = reference.quantize(x, bits, rotation)

    length = np.linalg.norm(x, axis=-1, keepdims=True)
    spread = reference.rotate(x, rotation) / length * 8
    distances = np.abs(spread[..., None] - np.array(lloyd_max_centroids(bits)))
    np.testing.assert_array_equal(indices, distances.argmin(-1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_norm_is_of_least_squares(bits: int) -> None:
    """Any other norm decodes to a vector farther away."""
    rotation = make_wh_rotation(64)
    x = np.random.default_rng(2).standard_normal((10, 64)).astype(np.float32)
    indices, norms = reference.quantize(x, bits, rotation)

    def error(factor: float) -> np.ndarray:
        decoded = reference.dequantize(indices, norms * factor, bits, rotation)
        return np.square(decoded - x).sum(-1)

    assert (error(1) < error(0.999)).all()
    assert (error(1) < error(1.001)).all()
