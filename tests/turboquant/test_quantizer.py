import mlx.core as mx
import numpy as np
import pytest
import reference

from turboquant import (
    decision_boundaries,
    dequantize_polar,
    make_wh_rotation,
    quantize_polar,
)

ALL_BITS = range(1, 9)
DIMS = [64, 80, 96, 128, 192, 256, 576]
MSE = [0.36338, 0.11748, 0.03455, 0.009501, 0.002505, 0.00064424, 0.00016348, 4.1185e-5]
ROTATION = make_wh_rotation(64)


def normal_vectors(*shape: int) -> np.ndarray:
    """Return N(0, 1) numbers, the same for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def round_trip(x: np.ndarray, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return vectors as 4 bits leave them."""
    codes, norms = quantize_polar(mx.array(x), 4, ROTATION)
    return dequantize_polar(codes, norms, 4, ROTATION, dtype=dtype)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_quantizing_matches_oracle(bits: int, dim: int) -> None:
    """Indices differ from the oracle's only where a coordinate lies on a boundary."""
    rotation = make_wh_rotation(dim, 7)
    x = normal_vectors(20, dim)
    expected, expected_norms = reference.quantize(x, bits, rotation)

    codes, norms = quantize_polar(mx.array(x), bits, rotation)

    indices = reference.unpack(np.array(codes), bits).astype(int)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    spread = reference.rotate(x, rotation) / length * np.sqrt(dim)
    boundaries = np.array(decision_boundaries(bits))
    for at in np.argwhere(indices != expected):
        at = tuple(at)
        assert abs(indices[at] - int(expected[at])) == 1
        assert np.abs(spread[at] - boundaries).min() < 1e-5
    is_same = (indices == expected).all(-1)
    assert is_same.mean() > 0.5
    np.testing.assert_allclose(
        np.array(norms)[is_same], expected_norms[is_same], rtol=3e-5
    )


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_dequantizing_matches_oracle(bits: int, dim: int) -> None:
    """Codes decode to what the definition says."""
    rotation = make_wh_rotation(dim, 7)
    indices, norms = reference.quantize(normal_vectors(20, dim), bits, rotation)
    expected = reference.dequantize(indices, norms, bits, rotation)

    codes = mx.array(reference.pack(indices, bits))
    decoded = dequantize_polar(codes, mx.array(norms, mx.float32), bits, rotation)

    np.testing.assert_allclose(np.array(decoded), expected, atol=1e-5)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(
    ("dim", "least"), [(64, 0.90), (80, 0.91), (128, 0.94), (576, 0.97)]
)
def test_error_is_near_theory(bits: int, dim: int, least: float) -> None:
    """Normal vectors lose what Lloyd-Max must, or less: short ones have no tail."""
    rotation = make_wh_rotation(dim)
    x = normal_vectors(500, dim)

    decoded = dequantize_polar(
        *quantize_polar(mx.array(x), bits, rotation), bits, rotation
    )

    error = np.square(np.array(decoded) - x).sum() / np.square(x).sum()
    assert least < error / MSE[bits - 1] < 1.005


def test_one_spike_is_spread() -> None:
    """A vector with one large coordinate loses no more than it would at one bit."""
    x = np.zeros((1, 64), np.float32)
    x[0, 5] = 100

    np.testing.assert_allclose(np.array(round_trip(x)), x, atol=1e-4)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    """Codes, norms and decoded vectors have the leading shape of the input."""
    codes, norms = quantize_polar(mx.ones(shape), 3, ROTATION)

    assert ((*shape[:-1], 24), mx.uint8) == (codes.shape, codes.dtype)
    assert (shape[:-1], mx.float32) == (norms.shape, norms.dtype)
    assert shape == dequantize_polar(codes, norms, 3, ROTATION).shape


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_dtype(dtype: mx.Dtype) -> None:
    """A vector of any float dtype is quantized as the same numbers in float32."""
    x = mx.array(normal_vectors(4, 64)).astype(dtype)
    expected = quantize_polar(x.astype(mx.float32), 4, ROTATION)

    quantized = quantize_polar(x, 4, ROTATION)

    assert all(mx.array_equal(*pair) for pair in zip(expected, quantized, strict=True))
    assert dtype == dequantize_polar(*quantized, 4, ROTATION, dtype=dtype).dtype


def test_zeros_decode_to_zeros() -> None:
    """A vector of zeros has norm 0 and comes back as zeros."""
    codes, norms = quantize_polar(mx.zeros((2, 64)), 4, ROTATION)

    assert [0, 0] == norms.tolist()
    assert not dequantize_polar(codes, norms, 4, ROTATION).any()


def test_subnormals_decode_to_zeros() -> None:
    """A vector with no normal float32 number counts as zeros."""
    x = np.full((1, 64), 2.0**-127, np.float32)

    assert not round_trip(x).any()


@pytest.mark.parametrize("exponent", [-126, -100, -41, -40, 39, 40, 100, 122])
def test_scale_changes_nothing_but_the_norm(exponent: int) -> None:
    """Vectors of any size in float32's range get the codes of middling ones."""
    x = np.clip(normal_vectors(5, 64), -1, 1)
    x[:, 0] = 1
    scaled = np.ldexp(x, exponent)
    expected, expected_norms = quantize_polar(mx.array(x), 4, ROTATION)

    codes, norms = quantize_polar(mx.array(scaled), 4, ROTATION)

    # Below 2**-100, coordinates become subnormal before they are rounded.
    assert (np.array(codes) == np.array(expected)).mean() > 0.99
    np.testing.assert_allclose(
        np.array(norms), np.ldexp(np.array(expected_norms), exponent), rtol=1e-2
    )


def test_huge_norm_is_clamped() -> None:
    """A finite vector whose norm exceeds float32 gets the largest and stays finite."""
    x = np.full((1, 64), 3e38, np.float32)
    _, norms = quantize_polar(mx.array(x), 4, ROTATION)

    assert np.finfo(np.float32).max == norms.item()
    assert np.isfinite(np.array(round_trip(x))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_vectors_decode_to_nan(bad: float) -> None:
    """One number that is not finite breaks its vector, and no other."""
    x = normal_vectors(3, 64)
    x[1, 17] = bad
    codes, norms = quantize_polar(mx.array(x), 4, ROTATION)
    zero_codes, _ = quantize_polar(mx.zeros((1, 64)), 4, ROTATION)

    decoded = np.array(dequantize_polar(codes, norms, 4, ROTATION))

    assert [False, True, False] == np.isnan(np.array(norms)).tolist()
    assert zero_codes[0].tolist() == codes[1].tolist()
    assert np.isnan(decoded[1]).all()
    assert np.isfinite(decoded[[0, 2]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_norms_decode_to_nan(bad: float) -> None:
    """A norm that is not finite never gives finite numbers."""
    decoded = dequantize_polar(
        mx.zeros((1, 32), mx.uint8), mx.array([bad]), 4, ROTATION
    )

    assert mx.isnan(decoded).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_overflow_is_clamped(dtype: mx.Dtype) -> None:
    """What exceeds the dtype becomes its largest finite number, with its sign."""
    largest = mx.finfo(dtype).max
    x = np.zeros((2, 64), np.float32)
    x[:, 0] = largest, -largest
    # The level nearest to 1 is 1.05 at 5 bits: the largest norm decodes to more.
    codes, norms = quantize_polar(mx.array(x), 5, ROTATION)
    norms = mx.minimum(norms * 1.5, mx.finfo(mx.float32).max)

    decoded = dequantize_polar(codes, norms, 5, ROTATION, dtype=dtype)

    assert mx.isfinite(decoded).all()
    if dtype != mx.float32:
        assert [largest, -largest] == decoded[:, 0].tolist()


def test_arguments_must_fit() -> None:
    """Shapes, dtypes and bits that do not fit are refused."""
    with pytest.raises(ValueError, match="float dtype"):
        quantize_polar(mx.ones((2, 64), mx.int32), 4, ROTATION)
    with pytest.raises(ValueError, match="dim 64"):
        quantize_polar(mx.ones((2, 80)), 4, ROTATION)
    with pytest.raises(ValueError, match="1 to 8"):
        quantize_polar(mx.ones((2, 64)), 9, ROTATION)
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        dequantize_polar(mx.zeros((2, 24), mx.uint8), mx.ones((2,)), 4, ROTATION)
