import hashlib
import warnings

import mlx.core as mx
import numpy as np
import pytest
import reference

from turboquant import (
    decision_boundaries,
    dequantize_polar,
    make_wh_rotation,
    quantize_polar,
    split_planes,
)
from turboquant.kernels.numpy import _nearest_indices, decode_into, encode

ALL_BITS = range(1, 9)
DIMS = [64, 80, 96, 128, 192, 256, 576]
DTYPES = [np.float32, np.float16, np.uint16]
ROTATION = make_wh_rotation(64)
FLOAT32_MAX = np.finfo(np.float32).max


@pytest.fixture(autouse=True)
def _no_warnings():
    """No input, however odd, makes NumPy warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normal_vectors(*shape: int) -> np.ndarray:
    """Return N(0, 1) numbers, the same for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def decode(codes, norms, bits, rotation, *, dtype=np.float32, mean=None):
    """Return decoded vectors in a new buffer."""
    out = np.empty((*norms.shape, rotation.dim), dtype)
    decode_into(split_planes(codes, bits), norms, out, bits, rotation, mean=mean)
    return out


def to_float32(out: np.ndarray) -> np.ndarray:
    """Return a buffer's numbers, where uint16 holds bfloat16."""
    if out.dtype == np.uint16:
        return (out.astype(np.uint32) << 16).view(np.float32)
    return out.astype(np.float32)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_encoding_matches_oracle(bits: int, dim: int) -> None:
    """Indices differ from the oracle's only where a coordinate lies on a boundary."""
    rotation = make_wh_rotation(dim, 7)
    x = normal_vectors(20, dim)
    expected, expected_norms = reference.quantize(x, bits, rotation)

    codes, norms = encode(x, bits, rotation)

    indices = reference.unpack(codes, bits).astype(int)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    spread = reference.rotate(x, rotation) / length * np.sqrt(dim)
    boundaries = np.array(decision_boundaries(bits))
    for at in np.argwhere(indices != expected):
        at = tuple(at)
        assert abs(indices[at] - int(expected[at])) == 1
        assert np.abs(spread[at] - boundaries).min() < 1e-5
    is_same = (indices == expected).all(-1)
    assert is_same.mean() > 0.5
    np.testing.assert_allclose(norms[is_same], expected_norms[is_same], rtol=1e-6)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", [64, 80, 576])
def test_encoding_agrees_with_mlx(bits: int, dim: int) -> None:
    """Both implementations decode to the same vectors, but for a few roundings."""
    rotation = make_wh_rotation(dim)
    x = normal_vectors(2, 50, dim)

    codes, norms = encode(x, bits, rotation)
    mlx_codes, mlx_norms = map(np.array, quantize_polar(mx.array(x), bits, rotation))

    assert (codes == mlx_codes).mean() > 0.999
    np.testing.assert_allclose(norms, mlx_norms, rtol=1e-2)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_decoding_matches_oracle(bits: int, dim: int) -> None:
    """Codes decode to what the definition says."""
    rotation = make_wh_rotation(dim, 7)
    indices, norms = reference.quantize(normal_vectors(3, 7, dim), bits, rotation)
    codes = reference.pack(indices, bits)

    decoded = decode(codes, norms.astype(np.float32), bits, rotation)

    expected = reference.dequantize(indices, norms, bits, rotation)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "digest"),
    [
        (1, "2d41bbeef90407c2"),
        (2, "e3813eb68e2bf83a"),
        (3, "f8aa11932b47d10b"),
        (4, "ce94f17c62bdcf97"),
        (5, "1706c661f458cca6"),
        (6, "daaf8dc933b539a2"),
        (7, "5c8d5a0eba847495"),
        (8, "571327571ab2549d"),
    ],
)
def test_encoded_bytes_are_frozen(bits: int, digest: str) -> None:
    """The same vectors give the same codes and norms, bit for bit, on any machine."""
    numbers = np.arange(50 * 80, dtype=np.float32)
    x = ((numbers * 7919) % 251 - 125).reshape(50, 80) / 32

    codes, norms = encode(x, bits, make_wh_rotation(80))

    data = codes.tobytes() + norms.astype("<f4").tobytes()
    assert digest == hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80])
def test_neighbours_change_nothing(bits: int, dim: int) -> None:
    """A vector alone gives the bytes that it gives among others, huge ones too."""
    rotation = make_wh_rotation(dim)
    x = normal_vectors(2000, dim)
    x[7] *= 1e30
    codes, norms = encode(x, bits, rotation)

    for at in (0, 7, 767, 768, 1999):
        code, norm = encode(x[at], bits, rotation)
        assert (codes[at].tobytes(), norms[at]) == (code.tobytes(), norm)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_indices_are_exact_around_boundaries(bits: int) -> None:
    """The floats next to every boundary, and far out, get the exact index."""
    boundaries = np.array(decision_boundaries(bits), np.float32)
    below, above = (np.nextafter(boundaries, np.float32(to)) for to in (-99, 99))
    far = np.array([-24, -8.1, 8.1, 24], np.float32)
    grid = np.linspace(-9, 9, 40001, dtype=np.float32)
    spread = np.concatenate([below, boundaries, above, far, grid])

    indices = _nearest_indices(spread, bits)

    np.testing.assert_array_equal(
        indices, np.searchsorted(boundaries, spread, side="right")
    )


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_fills_a_slice_of_a_buffer(bits: int, dtype: type) -> None:
    """Decoding writes into the rows it is given and into no other."""
    num_heads, num_tokens = 3, 300
    codes, norms = encode(normal_vectors(num_heads, num_tokens, 64), bits, ROTATION)
    buffer = np.full((num_heads, 512, 64), 7, dtype)

    part = buffer[:, 100:400]
    decode_into(split_planes(codes, bits), norms, part, bits, ROTATION)

    expected = decode(codes, norms, bits, ROTATION, dtype=dtype)
    tolerance = 0.05 if dtype == np.uint16 else 1e-2
    np.testing.assert_allclose(to_float32(part), to_float32(expected), atol=tolerance)
    assert (buffer[:, :100] == 7).all()
    assert (buffer[:, 400:] == 7).all()


@pytest.mark.parametrize(
    ("dtype", "mlx_dtype"),
    list(zip(DTYPES, [mx.float32, mx.float16, mx.bfloat16], strict=True)),
)
def test_decoding_agrees_with_mlx(dtype: type, mlx_dtype: mx.Dtype) -> None:
    """Every dtype decodes as it does on MLX, to within its last place."""
    codes, norms = encode(normal_vectors(2, 50, 64), 4, ROTATION)

    decoded = decode(codes, norms, 4, ROTATION, dtype=dtype)

    mlx = dequantize_polar(mx.array(codes), mx.array(norms), 4, ROTATION)
    expected = np.array(mlx.astype(mlx_dtype).astype(mx.float32))
    # An ulp where two sums round to either side; no more than a few in a hundred.
    eps = 2 * mx.finfo(mlx_dtype).eps
    np.testing.assert_allclose(to_float32(decoded), expected, rtol=eps, atol=1e-5)
    if dtype != np.float32:
        assert (to_float32(decoded) == expected).mean() > 0.95


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Decoding to bfloat16 is decoding to float32, and MLX's rounding."""
    x = normal_vectors(2, 500, 64)
    codes, norms = encode(x, 8, ROTATION)
    exact = mx.array(decode(codes, norms, 8, ROTATION))

    decoded = decode(codes, norms, 8, ROTATION, dtype=np.uint16)

    expected = exact.astype(mx.bfloat16).view(mx.uint16)
    np.testing.assert_array_equal(decoded, np.array(expected))


def test_bfloat16_ties_go_to_even() -> None:
    """A sum halfway between two bfloat16 numbers becomes the even one."""
    codes, norms = np.zeros((2, 1, 32), np.uint8), np.zeros((2, 1), np.float32)
    mean = np.ones((2, 64), np.float32) + np.array([[1], [3]], np.float32) * 2.0**-8

    decoded = decode(codes, norms, 4, ROTATION, dtype=np.uint16, mean=mean)

    assert [[[0x3F80] * 64], [[0x3F82] * 64]] == decoded.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean_dtype", [np.float16, np.float32])
def test_mean_is_added_to_its_head(dtype: type, mean_dtype: type) -> None:
    """Each head's mean is added after decoding, before rounding."""
    codes, norms = encode(normal_vectors(3, 40, 64), 4, ROTATION)
    mean = normal_vectors(3, 64).astype(mean_dtype)
    exact = decode(codes, norms, 4, ROTATION) + mean[:, None].astype(np.float32)

    decoded = decode(codes, norms, 4, ROTATION, dtype=dtype, mean=mean)

    eps = {np.float32: 1e-6, np.float16: 2**-11, np.uint16: 2**-8}[dtype]
    np.testing.assert_allclose(to_float32(decoded), exact, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_decode_to_zeros(dtype: type) -> None:
    """Zeros and subnormals have norm 0 and come back as zeros."""
    x = np.zeros((1, 2, 64), np.float32)
    x[0, 1] = 2.0**-127

    codes, norms = encode(x, 4, ROTATION)

    assert not norms.any()
    assert not to_float32(decode(codes, norms, 4, ROTATION, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_vectors_decode_to_nan(bad: float, dtype: type) -> None:
    """One number that is not finite breaks its vector, and no other."""
    x = normal_vectors(1, 3, 64)
    x[0, 1, 17] = bad
    zero_codes, _ = encode(np.zeros(64, np.float32), 4, ROTATION)

    codes, norms = encode(x, 4, ROTATION)
    decoded = to_float32(decode(codes, norms, 4, ROTATION, dtype=dtype))

    assert [[False, True, False]] == np.isnan(norms).tolist()
    assert zero_codes.tolist() == codes[0, 1].tolist()
    assert np.isnan(decoded[0, 1]).all()
    assert np.isfinite(decoded[0, [0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "payload"])
def test_broken_norms_and_means_decode_to_nan(bad, dtype: type) -> None:
    """Neither a norm nor a mean that is not finite gives finite numbers."""
    # All ones but the sign: rounding it up to bfloat16 would give minus zero.
    payload = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    bad = payload if isinstance(bad, str) else np.float32(bad)
    codes = np.zeros((2, 3, 32), np.uint8)
    norms, mean = np.ones((2, 3), np.float32), np.zeros((2, 64), np.float32)
    norms[0, 1], mean[1, 5] = bad, bad

    decoded = decode(codes, norms, 4, ROTATION, dtype=dtype, mean=mean)

    is_nan = np.zeros((2, 3, 64), bool)
    is_nan[0, 1], is_nan[1, :, 5] = True, True
    np.testing.assert_array_equal(np.isnan(to_float32(decoded)), is_nan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_mean", [False, True])
def test_overflow_is_clamped(dtype: type, has_mean: bool) -> None:
    """What exceeds the dtype becomes its largest finite number, with its sign."""
    largest = {
        np.float32: FLOAT32_MAX,
        np.float16: np.float32(65504),
        np.uint16: np.array(0x7F7F0000, np.uint32).view(np.float32),
    }[dtype]
    x = np.zeros((1, 1, 64), np.float32)
    x[..., :2] = [1, -1]
    codes, norms = encode(x, 4, ROTATION)
    mean = x[0] * largest if has_mean else None

    # Without a mean just about the largest, with one about twice that.
    norms = np.minimum(norms, 1) * largest
    out = decode(codes, norms, 4, ROTATION, dtype=dtype, mean=mean)

    decoded = to_float32(out)
    assert np.isfinite(decoded).all()
    if has_mean:
        assert [largest, -largest] == decoded[0, 0, :2].tolist()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(np.float16, 65504), (np.uint16, 3.3895313892515355e38)]
)
def test_overflow_of_the_mean_is_clamped(dtype: type, largest: float) -> None:
    """A mean beyond the dtype becomes its largest finite number, with its sign."""
    codes, norms = np.zeros((1, 1, 32), np.uint8), np.zeros((1, 1), np.float32)
    mean = np.repeat([[FLOAT32_MAX, -FLOAT32_MAX]], 32, axis=1)

    decoded = decode(codes, norms, 4, ROTATION, dtype=dtype, mean=mean)

    assert to_float32(decoded).tolist() == [[[largest] * 32 + [-largest] * 32]]


def test_finite_vectors_get_finite_norms() -> None:
    """A norm beyond float32 is the largest finite number."""
    _, norms = encode(np.full((1, 64), 3e38, np.float32), 4, ROTATION)

    assert [FLOAT32_MAX] == norms.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_any_float_dtype_is_taken_as_float32(dtype: type) -> None:
    """Another float dtype gives the bytes of the same numbers in float32."""
    x = normal_vectors(10, 64).astype(dtype)
    expected = encode(x.astype(np.float32), 4, ROTATION)

    encoded = encode(x, 4, ROTATION)

    assert [a.tobytes() for a in expected] == [a.tobytes() for a in encoded]


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 5, 64)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    """Codes and norms have the leading shape of the input."""
    codes, norms = encode(np.ones(shape, np.float32), 3, ROTATION)

    assert ((*shape[:-1], 24), np.uint8) == (codes.shape, codes.dtype)
    assert (shape[:-1], np.float32) == (norms.shape, norms.dtype)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_decodes_to_nothing(shape: tuple[int, int]) -> None:
    """No heads or no tokens are no error."""
    codes, norms = np.zeros((*shape, 32), np.uint8), np.zeros(shape, np.float32)

    assert (*shape, 64) == decode(codes, norms, 4, ROTATION).shape


def test_strided_input_is_encoded() -> None:
    """A slice of a cache, which is not contiguous, gives the bytes of its copy."""
    cache = normal_vectors(3, 512, 64)
    part = cache[:, 100:300]

    expected = encode(part.copy(), 4, ROTATION)

    encoded = encode(part, 4, ROTATION)
    assert [a.tobytes() for a in expected] == [a.tobytes() for a in encoded]


def test_encoding_leaves_its_input_alone() -> None:
    """The vectors are the same after encoding."""
    x = normal_vectors(10, 64)
    x.flags.writeable = False

    encode(x, 4, ROTATION)


@pytest.mark.parametrize(
    "change",
    [
        {"planes": []},
        {"planes": [np.zeros((2, 3, 24), np.uint8)]},
        {"planes": [np.zeros((2, 3, 32), np.int8)]},
        {"norms": np.ones((3, 2), np.float32)},
        {"out": np.empty((2, 3, 80), np.float32)},
        {"out": np.empty((2, 3, 64), np.float64)},
        {"out": np.empty((6, 64), np.float32)},
        {"bits": 9},
        {"mean": np.ones(64, np.float32)},
    ],
)
def test_decoding_refuses_what_does_not_fit(change: dict) -> None:
    """A shape or dtype that does not fit the others is refused."""
    arguments = {
        "planes": [np.zeros((2, 3, 32), np.uint8)],
        "norms": np.ones((2, 3), np.float32),
        "out": np.empty((2, 3, 64), np.float32),
        "bits": 4,
        "rotation": ROTATION,
    }
    decode_into(**arguments)

    with pytest.raises(ValueError, match=r"planes|norms|decode|mean|bits"):
        decode_into(**{**arguments, **change})


def test_encoding_refuses_what_does_not_fit() -> None:
    """Vectors of another length, integers, and bits without a quantizer are refused."""
    with pytest.raises(ValueError, match="dim 64"):
        encode(np.ones((2, 80), np.float32), 4, ROTATION)
    with pytest.raises(ValueError, match="float dtype"):
        encode(np.ones((2, 64), np.int32), 4, ROTATION)
    with pytest.raises(ValueError, match="1 to 8"):
        encode(np.ones((2, 64), np.float32), 0, ROTATION)
