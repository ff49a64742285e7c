"""What every codec keeps: the contract that a new one is held to by its name alone."""

import math
import tracemalloc
from dataclasses import replace

import hypothesis.strategies as st
import kit
import numpy as np
import pytest
from hypothesis import given, settings

from kvstore import CodecError, IntegrityError, codec_names, get_codec

LOSSLESS = ["raw", "planes"]
TURBO = [f"turbo{bits}" for bits in range(1, 9)]
# Every width once as keys' and once as values'.
MIXED = ["turbo5v3", "turbo8v1", "turbo1v8", "turbo6v7", "turbo7v6", "turbo4v2"]
LOSSY = [*TURBO, *MIXED]
ARRAYS = [*LOSSLESS, *LOSSY]
NAMES = [name + suffix for name in ARRAYS for suffix in ("", "+zstd")]
# Of normal vectors, the squared error of a Lloyd-Max quantizer of 1 to 8 bits.
ERRORS = [0.36338, 0.11748, 0.03455, 0.009501, 0.002505, 0.00064424, 0.00016348]
ERRORS.append(4.1185e-5)
SINKS = 4
every_codec = pytest.mark.parametrize("name", NAMES)
every_float = pytest.mark.parametrize("dtype", kit.FLOATS)
every_side = pytest.mark.parametrize("side", ["k", "v"])
# A warning is a computation that nobody thought of.
pytestmark = pytest.mark.filterwarnings("error")


def some_rows(dtype="BF16", *, side="k", start=0, shape=(2, 2, 16, 64)):
    """Return a description of rows."""
    return kit.Rows(side, start, shape, dtype)


def side_bits(name, side):
    """Return how many bits a coordinate of this side gets."""
    keys, _, values = name.removeprefix("turbo").partition("+")[0].partition("v")
    return int(keys if side == "k" else values or keys)


def check_declared(encoded):
    """Assert that the parts are those that the codec declares of such rows."""
    declared = encoded.codec.array.parts(encoded.rows)
    assert [f"{kit.PREFIX}{name}" for name in declared] == [
        part.name for part in encoded.parts
    ]
    for name, part in zip(declared, encoded.parts, strict=True):
        dtype, shape = declared[name]
        nbytes = math.prod(shape) * np.dtype(kit.NUMPY_DTYPES[dtype]).itemsize
        if not is_compressed(encoded, name):
            assert (dtype, shape, None) == (part.dtype, part.shape, part.raw_nbytes)
            assert nbytes == part.nbytes
        else:
            assert ("U8", (part.nbytes,)) == (part.dtype, part.shape)
            assert nbytes == part.raw_nbytes
    for name, array in encoded.open().items():
        assert declared[name][1] == array.shape
        assert np.dtype(kit.NUMPY_DTYPES[declared[name][0]]) == array.dtype


def is_compressed(encoded, part):
    """Whether a part goes through a compressor, which has a checksum."""
    codec = encoded.codec
    return codec.compressor is not None and codec.array.is_compressible(part)


def check_rows(name, x, rows, *, tokens=None):
    """Assert all that holds for any rows whatever; return what is decoded."""
    encoded = kit.encode_rows(name, x, rows)
    check_declared(encoded)
    opened = encoded.open()
    decoded, written = encoded.decode(opened), encoded.decode_into(opened)
    if encoded.codec.is_lossless:
        assert kit.bits_of(x) == kit.bits_of(decoded) == kit.bits_of(written)
        for count in range(rows.shape[2] if tokens is None else tokens):
            first = encoded.decode_into(opened, count)
            assert kit.bits_of(x[:, :, :count]) == kit.bits_of(first)
        return written
    with np.errstate(all="ignore"):
        for found in (decoded, written):
            check_lossy(x, found, rows, opened)
        check_agree(decoded, written, rows, opened.get("mean"))
    return written


def check_lossy(x, found, rows, opened):
    """Assert what a lossy codec keeps of any rows.

    The sinks keep every bit. A broken vector decodes to NaNs, a whole one to finite
    numbers, which lie no farther from it than zero does from what was coded of it.
    """
    sinks = max(0, min(SINKS - rows.start, rows.shape[2]))
    assert kit.bits_of(x[:, :, :sinks]) == kit.bits_of(found[:, :, :sinks])
    given, got = (kit.to_float64(a[:, :, sinks:], rows.dtype) for a in (x, found))
    broken = ~np.isfinite(given).all(axis=-1)
    assert np.isnan(got[broken]).all()
    assert np.isfinite(got[~broken]).all()
    coded = given
    if rows.side == "k":
        coded = given - kit.to_float64(opened["mean"], "F16")[:, :, None]
    lost = np.linalg.norm(given[~broken] - got[~broken], axis=-1)
    # Rounding to the dtype comes on top, of numbers as large as those decoded.
    eps, least = PRECISION[rows.dtype]
    most = np.linalg.norm(coded[~broken], axis=-1)
    size = np.linalg.norm(got[~broken], axis=-1) + most
    room = eps * size + least * math.sqrt(rows.shape[3])
    assert (lost <= most * (1 + 1e-5) + room).all()


# Of each dtype: the relative and the least absolute error of rounding.
PRECISION = {
    "F32": (2.0**-23, 2.0**-126),
    "F16": (2.0**-10, 2.0**-24),
    "BF16": (2.0**-7, 2.0**-126),
}


def check_agree(decoded, written, rows, mean):
    """Assert that the device and NumPy give the same rows, but for a last place.

    Both rotate in float32 and add the mean, each in its own order: they differ by some
    16 roundings of a vector and of its mean, and then by one step of the dtype.
    """
    eps, least = PRECISION[rows.dtype]
    one, two = (kit.to_float64(a, rows.dtype) for a in (decoded, written))
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    size = np.linalg.norm(np.where(np.isfinite(one), one, 0), axis=-1, keepdims=True)
    if mean is not None:
        size = size + np.linalg.norm(mean.astype(np.float64), axis=-1)[..., None, None]
    room = eps * np.abs(one) + 2.0**-20 * size + least
    assert (same | (np.abs(one - two) <= room)).all()


@every_codec
def test_a_name_makes_the_codec_of_that_name(name):
    """The registry gives one codec a name, the same each time."""
    assert name == get_codec(name).name
    assert get_codec(name) is get_codec(name)


def test_every_usual_codec_is_held_to_the_contract():
    """No codec is offered to users that these tests leave out."""
    assert [] == [name for name in codec_names() if name not in NAMES]


def test_all_pairs_of_widths_are_codecs():
    """Any width of keys goes with any other of values, and equal ones are one name."""
    for keys in range(1, 9):
        for values in range(1, 9):
            name = f"turbo{keys}" if keys == values else f"turbo{keys}v{values}"
            assert name == get_codec(name).name


@pytest.mark.parametrize(
    "name",
    ["", "+", "+zstd", "raw+", "raw+gzip", "raw+zstd+zstd", "Raw", "raw ", "turbo",
     "turbo0", "turbo9", "turbo44", "turbo4v", "turbo4v4", "turbo4v0", "turbo4v2v2",
     "turbo٤", "planes\n", "turbo4\n", "raw\0", "x" * 10_000],
)  # fmt: skip
def test_other_names_are_refused(name):
    """A name that is nearly one is none, and the error says what to choose."""
    with pytest.raises(CodecError) as caught:
        get_codec(name)
    assert caught.value.hint


@every_side
@every_float
@every_codec
def test_normal_rows_come_back(name, dtype, side):
    """All rows come back bit for bit, or nearly as near as the best quantizer does."""
    rows = some_rows(dtype, side=side, start=SINKS)
    x = kit.normal_rows(rows)
    found = check_rows(name, x, rows, tokens=3)
    if not get_codec(name).is_lossless:
        given, got = (kit.to_float64(a, dtype) for a in (x, found))
        lost = ((given - got) ** 2).sum() / (given**2).sum()
        rounding = PRECISION[dtype][0] ** 2
        assert lost < 1.1 * ERRORS[side_bits(name, side) - 1] + rounding


@every_side
@every_codec
def test_head_sizes_of_all_kinds_come_back(name, side):
    """Rows of every head size that a codec takes come back."""
    for dim in (8, 16, 24, 40, 56, 64, 72, 80, 96, 120, 128, 192, 256, 576):
        rows = some_rows(side=side, shape=(1, 2, 7, dim))
        check_rows(name, kit.normal_rows(rows, dim), rows, tokens=2)


@every_codec
def test_other_head_sizes_come_back_or_are_refused(name):
    """Any head size is stored, or refused before anything is encoded."""
    for dim in (1, 2, 3, 5, 7, 9, 12, 20, 63, 65, 100, 127):
        rows = some_rows(shape=(1, 2, 7, dim))
        x = kit.normal_rows(rows, dim)
        if get_codec(name).is_lossless:
            check_rows(name, x, rows, tokens=2)
        else:
            with pytest.raises(CodecError, match=f"not {dim}") as caught:
                get_codec(name).encode(x, rows, kit.PREFIX)
            assert caught.value.hint


@pytest.mark.parametrize("dtype", [d for d in kit.MLX_DTYPES if d not in kit.FLOATS])
@every_codec
def test_integers_come_back_or_are_refused(name, dtype):
    """Codes and states of integers are stored without loss, or refused."""
    rows = some_rows(dtype, shape=(2, 1, 3, 8))
    x = kit.random_bits(rows)
    if get_codec(name).is_lossless:
        check_rows(name, x, rows)
    else:
        with pytest.raises(CodecError, match=dtype):
            get_codec(name).encode(x, rows, kit.PREFIX)


@every_float
@every_codec
def test_few_rows_and_none_come_back(name, dtype):
    """A block of any length comes back, wherever the sinks end, an empty one too."""
    for start in (0, 2, 4, 1000):
        for tokens in (0, 1, 2, 3, 4, 5):
            for side in "kv":
                rows = some_rows(dtype, side=side, start=start, shape=(1, 2, tokens, 8))
                check_rows(name, kit.normal_rows(rows, tokens), rows)


@every_side
@every_float
@every_codec
def test_numbers_of_all_sizes_come_back(name, dtype, side):
    """Zeros, denormals, the largest numbers, infinities and NaNs break nothing."""
    rows = some_rows(dtype, side=side, start=2, shape=(1, 1, 12, 16))
    x = kit.normal_rows(rows).copy()
    top = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    sign = {"F32": 1 << 31, "F16": 1 << 15, "BF16": 1 << 15}[dtype]
    bits = x.view(np.uint32 if dtype == "F32" else np.uint16)[0, 0]
    bits[2] = 0
    bits[3] = sign  # minus zero
    bits[4] = 1  # the least denormal
    bits[5] = top - 1  # the largest number
    bits[6, 3] = top  # infinity
    bits[7, 3] = top | sign
    bits[8, 5] = top + 1  # a NaN that is to stay signalling
    bits[9] = top + 1 | sign
    bits[10, ::2] = sign | 1
    bits[11] = sign | top - 1
    check_rows(name, x, rows, tokens=2)


@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(kit.FLOATS),
    side=st.sampled_from("kv"),
    start=st.integers(0, 6),
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 3), st.integers(0, 9), st.integers(1, 9)
    ),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_rows_of_random_bits_come_back(name, dtype, side, start, shape, seed):
    """Whatever the bits are, they come back, or a lossy codec's bound holds."""
    shape = (*shape[:3], shape[3] * 8)
    rows = some_rows(dtype, side=side, start=start, shape=shape)
    check_rows(name, kit.random_bits(rows, seed), rows, tokens=1)


@every_float
@every_codec
def test_the_same_rows_give_the_same_bytes(name, dtype):
    """Encoding is deterministic and does not depend on how the rows lie in memory."""
    rows = some_rows(dtype)
    x = kit.normal_rows(rows)
    strided = np.zeros((2, 4, 40, 64), x.dtype)[:, ::2, 3:19]
    strided[...] = x
    expected = kit.encode_rows(name, x, rows)
    assert expected.parts == kit.encode_rows(name, x.copy(), rows).parts
    found = kit.encode_rows(name, strided, rows)
    assert expected.data == found.data
    assert expected.tensors == found.tensors


@every_codec
def test_encoding_leaves_the_rows_as_they_are(name):
    """The rows belong to a live cache: a codec only reads them."""
    rows = some_rows()
    x = kit.normal_rows(rows)
    before = kit.bits_of(x)
    x.flags.writeable = False
    encoded = kit.encode_rows(name, x, rows)
    encoded.decode_into(encoded.open())
    assert before == kit.bits_of(x)


# --- Parts that are not what the codec made. ---


def assert_refused_or_read(encoded, data, tensors):
    """Assert that parts are refused, or decode to rows; nothing else may happen."""
    try:
        opened = encoded.open(data, tensors)
    except (IntegrityError, CodecError):
        return False
    with np.errstate(all="ignore"):
        encoded.decode_into(opened)
        encoded.decode(opened)
    return True


def changed(encoded, number, **changes):
    """Return the tensors with one described otherwise."""
    tensors = encoded.tensors
    name = list(tensors)[number]
    return {**tensors, name: replace(tensors[name], **changes)}


@every_side
@every_codec
def test_a_part_described_otherwise_is_refused(name, side):
    """Another dtype, shape or raw size, and a part that is missing, are refused."""
    rows = some_rows(side=side)
    encoded = kit.encode_rows(name, kit.normal_rows(rows), rows)
    for number, (tensor, spec) in enumerate(encoded.tensors.items()):
        raw = spec.raw_nbytes
        changes = [
            {"dtype": "F16" if spec.dtype == "U8" else "U8"},
            {"dtype": "I8"},
            {"raw_nbytes": 2**62},
            {"raw_nbytes": 0 if raw is None else None},
            {"raw_nbytes": -1},
        ]
        if raw is None:
            changes += [
                {"shape": ()},
                {"shape": (*spec.shape[::-1], 1)},
                {"shape": (*spec.shape[:-1], spec.shape[-1] - 1)},
                {"shape": (2**40,)},
            ]
        else:
            changes += [{"raw_nbytes": raw + 1}, {"raw_nbytes": raw - 1}]
        for change in changes:
            with pytest.raises(IntegrityError, match=tensor):
                encoded.open(tensors=changed(encoded, number, **change))
        rest = {k: v for k, v in encoded.tensors.items() if k != tensor}
        with pytest.raises(IntegrityError, match="missing"):
            encoded.open(tensors=rest)


@every_codec
def test_a_part_of_another_length_is_refused(name):
    """A part that is cut short, or that has bytes behind it, is refused."""
    encoded = kit.encode_rows(name, kit.normal_rows(some_rows()), some_rows())
    for number, spec in enumerate(encoded.tensors.values()):
        nbytes = spec.end - spec.begin
        for cut in {0, 1, nbytes // 2, nbytes - 1} - {nbytes}:
            data = encoded.data[: spec.begin + cut]
            with pytest.raises(IntegrityError):
                encoded.open(data, changed(encoded, number, end=spec.begin + cut))
        data = encoded.data + bytes(9)
        longer = changed(encoded, number, begin=spec.begin, end=spec.end + 1)
        with pytest.raises(IntegrityError):
            encoded.open(data, longer)
        # The bytes themselves end too soon, whatever the header says.
        with pytest.raises(IntegrityError):
            encoded.open(encoded.data[: spec.end - 1])


@given(
    name=st.sampled_from(NAMES),
    side=st.sampled_from("kv"),
    bits=st.lists(st.integers(0, 2**20), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=200)
def test_flipped_bits_are_refused_or_give_rows(name, side, bits):
    """Bits that flip raise an error of ours, or are taken for other rows.

    Behind a compressor there is a checksum: then what is read is what was written.
    """
    rows = some_rows(side=side, shape=(1, 1, 8, 16))
    encoded = kit.encode_rows(name, kit.normal_rows(rows), rows)
    compressed = {part for part in encoded.open() if is_compressed(encoded, part)}
    data = bytearray(encoded.data)
    for bit in bits:
        bit %= 8 * len(data)
        data[bit // 8] ^= 1 << bit % 8
    read = assert_refused_or_read(encoded, bytes(data), encoded.tensors)
    assert read or compressed
    if read:
        good, opened = encoded.open(), encoded.open(bytes(data))
        for part in compressed:
            assert kit.bits_of(good[part]) == kit.bits_of(opened[part])


@given(name=st.sampled_from(NAMES), data=st.data())
@settings(max_examples=200)
def test_arbitrary_bytes_are_refused_or_give_rows(name, data):
    """Bytes that no codec made raise an error of ours, or are taken for rows."""
    rows = some_rows(side=data.draw(st.sampled_from("kv")), shape=(1, 1, 5, 8))
    encoded = kit.encode_rows(name, kit.normal_rows(rows), rows)
    size = len(encoded.data)
    octets = data.draw(st.binary(min_size=size, max_size=size))
    assert_refused_or_read(encoded, octets, encoded.tensors)


def bomb(nbytes):
    """Return a Zstandard frame of a few bytes that says it holds many zeros."""
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(bytes(nbytes))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("+zstd")])
def test_a_frame_of_more_than_it_should_hold_is_not_unpacked(name):
    """A frame that holds, or says that it holds, too much takes no memory."""
    rows = some_rows(shape=(1, 1, 8, 16))
    encoded = kit.encode_rows(name, kit.normal_rows(rows), rows)
    huge = 64 * 1024 * 1024
    frames = [
        bomb(huge),
        # Magic, a descriptor with a size of 8 bytes, window, and the size.
        bytes.fromhex("28b52ffd") + b"\xc0\x50" + (2**50).to_bytes(8, "little"),
        b"\x50\x2a\x4d\x18" + (2**31).to_bytes(4, "little"),  # a skippable frame
    ]
    for number, spec in enumerate(encoded.tensors.values()):
        for frame in frames:
            data = encoded.data[: spec.begin] + frame
            tensors = changed(encoded, number, end=spec.begin + len(frame))
            tracemalloc.start()
            try:
                with pytest.raises(IntegrityError):
                    encoded.open(data, tensors)
                assert tracemalloc.get_traced_memory()[1] < huge // 64
            finally:
                tracemalloc.stop()
