import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turboquant import (
    pack_codes,
    plane_widths,
    split_planes,
    unpack_codes,
)
from turboquant.packing import indices_to_symbols, symbols_to_indices

ALL_BITS = range(1, 9)
DIMS = [8, 64, 80, 96, 128, 192, 256, 576]


def random_indices(bits: int, dim: int) -> np.ndarray:
    """Return indices of 10 vectors, the same for the same dim."""
    return np.random.default_rng(dim).integers(0, 2**bits, (2, 5, dim), np.uint8)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_packing_matches_oracle(bits: int, dim: int) -> None:
    """Packed bytes are those of the definition."""
    indices = random_indices(bits, dim)

    codes = np.array(pack_codes(mx.array(indices), bits))

    np.testing.assert_array_equal(codes, reference.pack(indices, bits))


@pytest.mark.parametrize("bits", ALL_BITS)
@settings(deadline=None)  # MLX's first call on a busy machine is slow
@given(data=st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    """Any indices come back from their codes."""
    shape = st.tuples(st.integers(1, 3), st.integers(1, 20).map(lambda n: 8 * n))
    elements = st.integers(0, 2**bits - 1)
    indices = data.draw(hnp.arrays(np.uint8, shape, elements=elements))

    codes = pack_codes(mx.array(indices), bits)

    assert (len(indices), indices.shape[1] * bits // 8) == codes.shape
    np.testing.assert_array_equal(np.array(unpack_codes(codes, bits)), indices)


@pytest.mark.parametrize(
    ("bits", "codes"),
    [
        (1, "00ff"),
        (2, "0055aaff"),
        (3, "3399993333cc"),
        (4, "80d52a7fc4196eb3"),
    ],
)
def test_packed_bytes_are_frozen(bits: int, codes: str) -> None:
    """The same indices give the same bytes for ever."""
    indices = np.arange(16, dtype=np.uint8) * 5 % 2**bits

    assert codes == np.array(pack_codes(mx.array(indices), bits)).tobytes().hex()


def test_nibbles_hold_coordinates_half_a_vector_apart() -> None:
    """Byte j of 4 bits holds coordinate j, and in its high nibble j + D/2."""
    indices = mx.array(np.arange(16, dtype=np.uint8))

    codes = np.array(pack_codes(indices, 4))

    assert [j | (j + 8) << 4 for j in range(8)] == codes.tolist()


def test_odd_width_splits_magnitude_from_sign() -> None:
    """Of 3 bits, the magnitude counts from zero, and the sign is 1 below zero."""
    indices = np.arange(8, dtype=np.uint8)

    symbols = indices_to_symbols(indices, 3)

    assert [3, 2, 1, 0, 0, 1, 2, 3] == (symbols >> 1).tolist()
    assert [1, 1, 1, 1, 0, 0, 0, 0] == (symbols & 1).tolist()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_symbols_are_a_permutation(bits: int) -> None:
    """Every index has its own symbol, and gets back from it."""
    indices = np.arange(2**bits, dtype=np.uint8)

    symbols = indices_to_symbols(indices, bits)

    assert indices.tolist() == sorted(symbols.tolist())
    assert indices.tolist() == symbols_to_indices(symbols, bits).tolist()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_planes_add_up_to_the_bits(bits: int) -> None:
    """The widths of the planes, each of which divides a byte, add up to the bits."""
    widths = plane_widths(bits)

    assert bits == sum(widths)
    assert all(8 % width == 0 for width in widths)
    assert sorted(widths, reverse=True) == list(widths)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_planes_join_to_the_codes(bits: int) -> None:
    """Planes have their widths and are the codes when joined, on MLX and on NumPy."""
    codes = reference.pack(random_indices(bits, 80), bits)

    planes = split_planes(codes, bits)

    assert [10 * width for width in plane_widths(bits)] == [p.shape[-1] for p in planes]
    np.testing.assert_array_equal(np.concatenate(planes, axis=-1), codes)
    for plane, mlx_plane in zip(
        planes, split_planes(mx.array(codes), bits), strict=True
    ):
        np.testing.assert_array_equal(np.array(mlx_plane), plane)


def test_shapes_must_fit() -> None:
    """A last axis that cannot be packed or unpacked is refused."""
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_codes(mx.zeros((2, 12), mx.uint8), 4)
    with pytest.raises(ValueError, match="3 bits"):
        unpack_codes(mx.zeros((2, 8), mx.uint8), 3)
    with pytest.raises(ValueError, match="1 to 8"):
        plane_widths(9)
