import math

import numpy as np
import pytest

from turboquant import decision_boundaries, lloyd_max_centroids

ALL_BITS = range(1, 9)


def density(x: np.ndarray) -> np.ndarray:
    """Return the density of N(0, 1)."""
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tail(x: np.ndarray) -> np.ndarray:
    """Return the mass of N(0, 1) above each number."""
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])


def cells(boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mass and the mean of N(0, 1) between positive boundaries."""
    edges = np.concatenate([[0], boundaries, [math.inf]])
    mass = -np.diff(tail(edges))
    return mass, -np.diff(density(edges)) / mass


def solve_lloyd_max(bits: int) -> np.ndarray:
    """Return the positive levels, by Newton's method on the boundaries."""
    num_cells = 2 ** (bits - 1)
    x = np.linspace(0, 3, num_cells + 1)[1:-1] if bits > 1 else np.zeros(0)
    for _ in range(50):
        mass, mean = cells(x)
        error = x - (mean[:-1] + mean[1:]) / 2
        if np.abs(error).max(initial=0) < 1e-15:
            break
        edges = np.concatenate([[0], x])
        # How each mean moves with the boundary below and the one above it.
        with_lower = density(edges) * (mean - edges) / mass
        with_upper = density(x) * (x - mean[:-1]) / mass[:-1]
        jacobian = np.diag(1 - (with_upper + with_lower[1:]) / 2)
        jacobian -= np.diag(with_lower[1:-1] / 2, -1)
        jacobian -= np.diag(with_upper[1:] / 2, 1)
        x = np.sort(np.abs(x - np.linalg.solve(jacobian, error)))
    return cells(x)[1]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_centroids_solve_lloyd_max(bits: int) -> None:
    """The constants are what Lloyd-Max converges to."""
    positive = lloyd_max_centroids(bits)[2 ** (bits - 1) :]

    np.testing.assert_allclose(positive, solve_lloyd_max(bits), rtol=1e-11)


@pytest.mark.parametrize(
    ("bits", "mse"),
    [
        (1, 0.36338),
        (2, 0.11748),
        (3, 0.03455),
        (4, 0.009501),
        (5, 0.002505),
        (6, 0.00064424),
        (7, 0.00016348),
        (8, 0.000041185),
    ],
)
def test_error_is_the_known_one(bits: int, mse: float) -> None:
    """The expected squared error of N(0, 1) is the one in the literature."""
    positive = slice(2 ** (bits - 1), None)
    levels = np.array(lloyd_max_centroids(bits))[positive]
    mass, mean = cells(np.array(decision_boundaries(bits))[positive])

    assert mse == pytest.approx(
        1 - 2 * np.sum(mass * (2 * mean - levels) * levels), rel=2e-4
    )


@pytest.mark.parametrize("bits", ALL_BITS)
def test_centroids_ascend_and_mirror(bits: int) -> None:
    """There are two to the bits levels, ascending, symmetric about zero."""
    levels = lloyd_max_centroids(bits)

    assert 2**bits == len(levels)
    assert sorted(levels) == list(levels)
    assert levels == tuple(-level for level in reversed(levels))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_boundaries_are_midpoints(bits: int) -> None:
    """A boundary is as far from the level below as from the one above."""
    levels = np.array(lloyd_max_centroids(bits))
    boundaries = np.array(decision_boundaries(bits))

    np.testing.assert_allclose(boundaries - levels[:-1], levels[1:] - boundaries)
    assert boundaries[len(boundaries) // 2] == 0


def test_one_bit_is_the_mean_of_half_a_normal() -> None:
    """One bit stores the sign, and the level is the square root of 2/π."""
    assert pytest.approx(math.sqrt(2 / math.pi), rel=1e-15) == lloyd_max_centroids(1)[1]


@pytest.mark.parametrize("bits", [0, 9, -1])
@pytest.mark.parametrize("function", [lloyd_max_centroids, decision_boundaries])
def test_bits_must_be_1_to_8(function, bits: int) -> None:
    """Any other number of bits is refused, by its value."""
    with pytest.raises(ValueError, match=f"1 to 8: {bits}"):
        function(bits)
