"""The `fit` codecs: integers in a basis, found by its digest, refused where wrong."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import hypothesis.strategies as st
import kit
import numpy as np
import pytest
from hypothesis import given, settings

from kvstore import CodecError, IntegrityError, codec_names, get_codec
from kvstore.codecs import FitFamily, find_codec, fit, fitting
from kvstore.codecs.floats import narrow
from kvstore.codecs.streams import STREAMS, are_packed, pack_integers, unpack_integers
from kvstore.format.basis import BasisFile, BasisGroup, basis_digest, basis_to_bytes
from kvstore.format.basis import parse_basis as parse
from turboquant.kernels import native
from turboquant.kernels.numpy import NumpyKernels

LAYERS = (0, 3)
SHAPE = (2, 4, 64, 16)
RATES = ("1", "1.5", "2", "3", "4")
pytestmark = pytest.mark.filterwarnings("error")


def some_rows(dtype="F32", *, start=4, shape=SHAPE, layers=LAYERS):
    """Return a description of rows."""
    return kit.Rows("kv", start, shape, dtype, layers)


def model_rows(rows, seed=0):
    """Return rows as a model has them: few directions have most of the energy."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(7).standard_normal((*SHAPE[:2], 16, 16))
    sizes = 2.0 ** -np.arange(16)[:, None] * 8
    x = random.standard_normal(rows.shape) @ (sizes * directions)
    x = (x + 3).astype(np.float32)
    if rows.dtype == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(kit.NUMPY_DTYPES[rows.dtype])


@pytest.fixture(scope="module")
def basis():
    """Return the file of a basis that was fitted to such rows."""
    rotation = fitting.Rotation(np.array([1.0, 0.1, 0.01]), is_traditional=True)
    fit = fitting.GroupFit(fitting.make_group(LAYERS, 2, 16, rotation), rotation)
    for start in (4, 256, 512):
        x = model_rows(some_rows(start=start), start)
        fit.add(fitting.Sample(start, "F32", x))
    return fitting.finish_basis([fit], {"contexts": 3})


@pytest.fixture(scope="module")
def codec_of(basis):
    """Return what makes the codec of a rate."""
    digest = basis_digest(basis)
    family = FitFamily(lambda asked: parse(basis, asked))
    return lambda rate, end="+zstd": find_codec(f"fit{rate}@{digest}{end}", family)


def encoded(codec, x, rows):
    """Return what a codec makes of rows, as it lies in a shard."""
    return kit.Encoded(codec, rows, codec.encode(x, rows, kit.PREFIX))


def check_both(found):
    """Return the rows that NumPy decodes, which are those of the device, nearly."""
    opened = found.open()
    written, decoded = found.decode_into(opened), found.decode(opened)
    one, two = (kit.to_float64(a, found.rows.dtype) for a in (written, decoded))
    size = np.abs(np.where(np.isfinite(one), one, 0)).max(initial=1)
    eps = {"F32": 2.0**-18, "F16": 2.0**-9, "BF16": 2.0**-6}[found.rows.dtype]
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    near = np.abs(np.where(same, 0, one) - np.where(same, 0, two)) <= eps * size
    assert near.all()
    return written


# --- Integers and bytes. ---


@given(
    number=st.integers(0, len(STREAMS) - 1),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 33)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_integers_come_back(number, shape, seed):
    """Whatever a stream holds comes back, in few enough bytes."""
    stream = STREAMS[number]
    most = stream.most
    q = np.random.default_rng(seed).integers(-most, most, shape, np.int16, True)
    packed, low = pack_integers(q, stream)
    assert (shape[0], stream.width(shape[1])) == packed.shape
    assert are_packed(packed, stream)
    assert (q == unpack_integers(packed, low, stream, shape[1])).all()


def test_the_streams_are_those_of_the_first_release():
    """A class lies in the stream, and a number in the bits, that it always did."""
    digest = hashlib.sha256()
    for stream in STREAMS:
        q = np.arange(3 * 20).reshape(3, 20) * 37 % (2 * stream.most + 1) - stream.most
        packed, low = pack_integers(q.astype(np.int16), stream)
        digest.update(f"{stream.first} {stream.last} {packed.shape}".encode())
        digest.update(packed.tobytes() + low.tobytes())
    assert GOLDEN_STREAMS == digest.hexdigest()


GOLDEN_STREAMS = "aa496853d36dcef97f653590ef7198ab451a858c774731801cca580504be29cf"


def plain_basis():
    """Return a basis with which nothing is rounded but to the step."""
    group = BasisGroup((0,), 1, 8, 1, 0, False)
    values = {
        "frequencies": np.zeros((1, 0)),
        "matrix": np.broadcast_to(np.eye(16), (1, 1, 16, 16)),
        "scale": np.ones((1, 1)),
        "mean": np.full((1, 1, 16), 0.5),
        "sigma": np.arange(16).reshape(1, 1, 16) * 3 - 10,
        "features": np.full((1, 1, 2, 2), 2.0),
        "importance": np.zeros((1, 1, 6)),
    }
    held = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8}
    basis = BasisFile((group,), {"2": 0}, {}, {})
    tensors = {
        name: values[name.rpartition(".")[2]].astype(held[dtype]).tobytes()
        for name, (dtype, _) in basis.specs().items()
    }
    return replace(basis, tensors=tensors)


def plain_codec(end=""):
    """Return the codec of that basis."""
    data = basis_to_bytes(plain_basis())
    digest = basis_digest(data)
    family = FitFamily(lambda asked: parse(data, asked))
    return find_codec(f"fit2@{digest}{end}", family)


def as_heads(long):
    """Return long rows, ``(1, 1, T, 16)``, as a key and a value of one head."""
    return np.concatenate(np.split(long, 2, axis=-1), axis=1).astype(np.float32)


def test_a_block_has_the_parts_of_the_first_release():
    """The same integers in the same basis are the same bytes for ever."""
    rows = some_rows(start=2, shape=(1, 2, 12, 8), layers=(0,))
    long = np.random.default_rng(3).integers(-99, 99, (1, 1, 12, 16)) * 0.25
    long *= 2.0 ** (np.arange(16) - 8)
    long[..., 5, 3] = np.nan
    x = as_heads(long)
    found = encoded(plain_codec(), x, rows)
    names = [part.name.removeprefix(kit.PREFIX) for part in found.parts]
    assert GOLDEN_NAMES == names
    assert GOLDEN_PARTS == hashlib.sha256(found.data).hexdigest()
    assert kit.bits_of(x[:, :, :2]) == kit.bits_of(found.open()["sinks"])


GOLDEN_NAMES = [
    "exponents",
    "c5",
    "c8",
    "c11",
    "c13",
    "c17",
    "c19",
    "c23",
    "c25",
    "c29",
    "b29",
    "c31",
    "b31",
    "c35",
    "b35",
    "c37",
    "b37",
    "c39",
    "b39",
    "exact",
    "sinks",
]
GOLDEN_PARTS = "a0bcfbf80eabc18e6be5446e1d791df702fc0a2c934667c456277ebbe2029605"


def test_numbers_lie_within_half_a_step():
    """What is coded comes back rounded to the step, about the mean."""
    rows = some_rows(start=4, shape=(1, 2, 40, 8), layers=(0,))
    sizes = np.array([0 if sigma < -7 else 1 for sigma in range(-10, 38, 3)])
    long = np.random.default_rng(1).uniform(-1.9, 1.9, (1, 1, 40, 16)) * sizes + 0.5
    x = as_heads(long)
    written = check_both(encoded(plain_codec("+zstd"), x, rows))
    assert np.abs(written - x).max() <= 0.5 + 1e-5


# --- Rows. ---


@pytest.mark.parametrize("dtype", kit.FLOATS)
def test_more_bits_are_nearer(codec_of, dtype):
    """Rows come back, the nearer the more bits they take, of about the rate named."""
    rows = some_rows(dtype)
    x = model_rows(rows, 99)
    given = kit.to_float64(x, dtype)
    errors, sizes = [], []
    for rate in RATES:
        found = encoded(codec_of(rate), x, rows)
        lost = kit.to_float64(check_both(found), dtype) - given
        errors.append((lost**2).mean())
        sizes.append(len(found.data) * 8 / x.size)
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < errors[0] / 16
    assert sorted(sizes) == sizes
    assert sizes[0] < 3


def test_rates_are_what_the_rows_take(codec_of):
    """Keys and values together take no more bits than the rate says."""
    for rate in RATES:
        nbytes = numbers = 0
        for seed in (4, 5):
            rows = some_rows()
            x = model_rows(rows, seed)
            nbytes += len(encoded(codec_of(rate), x, rows).data)
            numbers += x.size
        assert nbytes * 8 / numbers <= float(rate) * 1.05


@pytest.mark.parametrize("dtype", kit.FLOATS)
@pytest.mark.parametrize("end", ["", "+zstd"])
def test_few_rows_and_none_come_back(codec_of, dtype, end):
    """A block of any length comes back, and its sinks bit for bit."""
    for start in (0, 2, 4, 100_000):
        for tokens in (0, 1, 3, 4, 5, 9):
            rows = some_rows(dtype, start=start, shape=(2, 4, tokens, 16))
            x = model_rows(rows, tokens)
            written = check_both(encoded(codec_of("4", end), x, rows))
            sinks = max(0, min(4 - start, tokens))
            assert kit.bits_of(x[:, :, :sinks]) == kit.bits_of(written[:, :, :sinks])


@pytest.mark.parametrize("kernels", native.load_all(), ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", kit.FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 16, 61])
@pytest.mark.parametrize("rate", ["1", "4"])
def test_kernels_give_what_numpy_gives(
    codec_of, monkeypatch, kernels, dtype, tokens, rate
):
    """Integers are the same, and rows but for the last places, strided or not."""
    rows = some_rows(dtype, start=2, shape=(2, 4, tokens, 16))
    x = model_rows(rows, 3)
    x[0, 1, 7 % max(tokens, 1) :][:1] = 100  # a row that is kept as it is
    found, decoded = [], []
    for each in (kernels, NumpyKernels()):
        monkeypatch.setattr(fit, "best_kernels", lambda each=each: each)
        found.append(encoded(codec_of(rate), x, rows))
        decoded.append(check_both(found[0]))
        held = np.zeros((2, 4, tokens, 24), x.dtype)
        buffers = [layer[..., 5:21] for layer in held]
        codec_of(rate).array.decode_into(found[0].open(), rows, buffers)
        assert kit.bits_of(np.stack(buffers)) == kit.bits_of(decoded[-1])
        assert not held[..., :5].any()
        assert not held[..., 21:].any()
    assert found[0].data == found[1].data
    one, two = (kit.to_float64(a, dtype) for a in decoded)
    eps = {"F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
    assert np.abs(one - two).max(initial=0) <= eps * np.abs(one).max(initial=1)


@pytest.mark.parametrize("dtype", kit.FLOATS)
def test_every_instruction_set_decodes_the_same_bits(codec_of, monkeypatch, dtype):
    """A block is the same rows on any machine that has kernels."""
    rows = some_rows(dtype, start=2, shape=(2, 4, 61, 16))
    x = model_rows(rows, 3)
    found = encoded(codec_of("4"), x, rows)
    decoded = set()
    for kernels in native.load_all():
        monkeypatch.setattr(fit, "best_kernels", lambda each=kernels: each)
        decoded.add(kit.bits_of(found.decode_into(found.open())))
    assert len(decoded) == bool(native.load_all())


@pytest.mark.parametrize("kernels", [*native.load_all()[:1], NumpyKernels()])
@pytest.mark.parametrize("layers", [LAYERS, (0, 1)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_keys_and_values_go_to_buffers_of_their_own(
    codec_of, monkeypatch, kernels, layers, is_strided
):
    """Rows are those of one buffer for both, of rows that no basis covers too."""
    monkeypatch.setattr(fit, "best_kernels", lambda: kernels)
    rows = some_rows("BF16", start=2, layers=layers)
    x = model_rows(rows, 3)
    x[0, 1, 7] = 100  # a row that is kept as it is
    found = encoded(codec_of("2"), x, rows)
    keys, values = (np.zeros((2, 2, 64, 16 + 8 * n), x.dtype) for n in (0, is_strided))
    sides = [(keys[n], values[n, ..., :16]) for n in range(2)]
    found.codec.array.decode_sides_into(found.open(), rows, sides)
    made = np.stack([np.concatenate(each) for each in sides])
    assert kit.bits_of(found.decode_into(found.open())) == kit.bits_of(made)
    assert not values[..., 16:].any()


def test_matrices_are_rounded_once_for_all_blocks(codec_of, basis, monkeypatch):
    """Of 16-bit rows each layer's are, and two rates' are kept: rows stay the same."""
    if fit._kernels_for(16) is None:
        pytest.skip("NumPy rounds no matrix")
    rows, given, made = some_rows("BF16"), native.NativeKernels.round_matrices, []
    found = {
        rate: encoded(codec_of(rate), model_rows(rows, 3), rows)
        for rate in ("1", "2", "3")
    }
    first = {rate: each.decode_into(each.open()) for rate, each in found.items()}

    def counted(*of):
        made.append(of)
        return given(*of)

    monkeypatch.setattr(native.NativeKernels, "round_matrices", counted)
    family = FitFamily(lambda asked: parse(basis, asked))
    for rates, rounded in (("11", 2), ("2121", 4), ("3", 6), ("1", 6), ("2", 8)):
        for rate in rates:
            name = found[rate].codec.name
            each = replace(found[rate], codec=find_codec(name, family))
            again = each.decode_into(each.open())
            assert kit.bits_of(first[rate]) == kit.bits_of(again)
        assert rounded == len(made)
    made.clear()
    codec = find_codec(
        found["2"].codec.name, FitFamily(lambda asked: parse(basis, asked))
    )
    fresh = replace(found["2"], codec=codec)
    with ThreadPoolExecutor(8) as pool:
        blocks = pool.map(lambda _: fresh.decode_into(fresh.open()), range(32))
        assert {kit.bits_of(first["2"])} == {kit.bits_of(block) for block in blocks}
    assert len(made) == 2  # though eight threads wanted them at once
    made.clear()
    alone = some_rows("BF16", shape=(1, *SHAPE[1:]), layers=(3,))
    codec = find_codec(found["2"].codec.name, family)
    other = encoded(codec, model_rows(rows, 3)[1:], alone)
    other.decode_into(other.open())
    assert not made  # whose matrices are known from among all


@pytest.mark.parametrize("dtype", kit.FLOATS)
def test_rows_that_do_not_fit_are_kept_as_they_are(codec_of, dtype):
    """NaNs, infinities, the largest numbers and other directions keep every bit."""
    rows = some_rows(dtype)
    x = model_rows(rows).copy()
    top = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    bits = x.view(np.uint32 if dtype == "F32" else np.uint16)
    bits[0, 0, 3, 1] = top
    bits[0, 1, 4, 5] = top + 1
    bits[1, 0, 5] = top - 1
    bits[1, 1, 6, 2] = top - 1
    written = check_both(encoded(codec_of("2"), x, rows))
    for where in ((0, 0, 3), (0, 1, 4), (1, 0, 5), (1, 1, 6)):
        assert kit.bits_of(x[where]) == kit.bits_of(written[where])
    assert np.isfinite(kit.to_float64(written[1, 1, 7:], dtype)).all()


@pytest.mark.parametrize("dtype", kit.FLOATS)
def test_tokens_unlike_all_that_was_learned_from_are_kept_in_all_layers(
    codec_of, dtype
):
    """Where a value is far too small in one layer, no layer's row is coded."""
    rows = some_rows(dtype)
    x = model_rows(rows).copy()
    x[1, 2, 5] = 0
    written = check_both(encoded(codec_of("2"), x, rows))
    assert kit.bits_of(x[:, :, 5]) == kit.bits_of(written[:, :, 5])
    assert kit.bits_of(x[:, :, 6]) != kit.bits_of(written[:, :, 6])


@given(
    dtype=st.sampled_from(kit.FLOATS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50)
def test_rows_of_random_bits_break_nothing(codec_of, dtype, seed):
    """Whatever the bits are, they are kept where they fit nothing."""
    rows = some_rows(dtype, start=2, shape=(2, 4, 9, 16))
    x = kit.random_bits(rows, seed)
    with np.errstate(all="ignore"):
        written = check_both(encoded(codec_of("2"), x, rows))
    broken = ~np.isfinite(kit.to_float64(x, dtype)).all(axis=-1)
    assert kit.bits_of(x[broken]) == kit.bits_of(written[broken])


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (0, 1)},
        {"layers": ()},
        {"shape": (2, 4, 64, 8)},
        {"shape": (2, 2, 64, 16)},
        {"dtype": "I32"},
        {"side": "window"},
        {"side": "k"},
    ],
)
def test_rows_that_the_basis_does_not_cover_lose_nothing(codec_of, change):
    """Of layers, sizes and arrays that the basis does not know, every bit is kept."""
    rows = replace(some_rows(), **change)
    x = kit.random_bits(rows)
    found = encoded(codec_of("1"), x, rows)
    assert kit.bits_of(x) == kit.bits_of(found.decode_into(found.open()))
    assert kit.bits_of(x) == kit.bits_of(found.decode(found.open()))


def test_one_layer_of_a_group_is_coded_as_it_is_among_all(codec_of):
    """Layers are found by their numbers, not by where they stand."""
    rows = some_rows()
    x = model_rows(rows)
    whole = encoded(codec_of("2"), x, rows)
    alone = some_rows(shape=(1, *SHAPE[1:]), layers=(3,))
    found = encoded(codec_of("2"), x[1:], alone)
    both = whole.decode_into(whole.open())
    assert kit.bits_of(both[1:]) == kit.bits_of(found.decode_into(found.open()))


def test_the_same_rows_give_the_same_bytes(codec_of, basis):
    """Encoding does not depend on how rows lie in memory, and fitting repeats."""
    rows = some_rows()
    x = model_rows(rows)
    strided = np.zeros((2, 8, 70, 16), x.dtype)[:, ::2, 3:67]
    strided[...] = x
    assert encoded(codec_of("2"), x, rows).data == (
        encoded(codec_of("2"), strided, rows).data
    )


# --- Names. ---


def test_no_fit_codec_is_offered_without_a_basis():
    """Who has no basis cannot choose what needs one."""
    assert [] == [name for name in codec_names() if name.startswith("fit")]
    for name in ("fit2", "fit2+zstd", f"fit2@{'ab' * 32}"):
        with pytest.raises(CodecError):
            get_codec(name)


def test_a_rate_that_the_basis_lacks_is_refused(codec_of):
    """The error says which rates there are."""
    with pytest.raises(CodecError, match="no rate 7") as caught:
        codec_of("7")
    assert "1.5" in caught.value.hint


@pytest.mark.parametrize("end", ["+", "+gzip", "+zstd+zstd"])
def test_other_compressors_are_refused(codec_of, end):
    """A name that is nearly one is none."""
    with pytest.raises(CodecError):
        codec_of("2", end)


def test_the_largest_half_float_is_the_end():
    """As the kernels write it; NumPy alone would write infinity."""
    wide = np.array([1e5, -1e9, 65504.0, 1.0], np.float32)
    assert [65504, -65504, 65504, 1] == narrow(wide, "F16").tolist()


def test_threads_that_ask_at_once_share_a_basis():
    """Each would hold one of its own, of a hundred megabytes."""
    data, reads = basis_to_bytes(plain_basis()), []
    barrier, found = threading.Barrier(8), []

    def read(asked):
        reads.append(asked)
        time.sleep(0.05)
        return parse(data, asked)

    family = FitFamily(read)

    def ask():
        barrier.wait()
        found.append(find_codec(f"fit2@{basis_digest(data)}", family).array)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (1, 8) == (len(reads), len(found))
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize(
    ("name", "value"), [("0.mean", np.nan), ("0.scale", np.inf), ("0.scale", 3e38)]
)
def test_a_basis_of_numbers_that_are_none_is_refused(name, value):
    """What would decode to NaN is damaged, whoever made its digest."""
    basis = plain_basis()
    size = len(basis.tensors[name]) // 4
    tensors = {**basis.tensors, name: np.full(size, value, "<f4").tobytes()}
    # A matrix of ones is multiplied by the scale.
    count = len(basis.tensors["0.matrix"]) // 2
    tensors["0.matrix"] = np.full(count, 2, "<f2").tobytes()
    data = basis_to_bytes(replace(basis, tensors=tensors))
    family = FitFamily(lambda asked: parse(data, asked))
    with pytest.raises(IntegrityError, match="finite"):
        find_codec(f"fit2@{basis_digest(data)}", family)


# --- Parts that are not what the codec made. ---


def with_part(found, name, change):
    """Return the bytes of a block with one part changed."""
    opened = {key: np.array(value) for key, value in found.open().items()}
    opened[name] = change(opened[name])
    return [
        kit.Part(part.name, part.dtype, opened[key].shape, opened[key].tobytes())
        for part in found.parts
        for key in [part.name.removeprefix(kit.PREFIX)]
    ]


def changed(value):
    """Return what puts a value into the first place."""

    def change(array):
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("exponents", changed(13)),
        ("exponents", changed(254)),
        ("exponents", changed(255)),
        ("exact", lambda rows: np.zeros((1, 64), rows.dtype)),
        ("exact", lambda rows: np.zeros((129, 64), rows.dtype)),
        ("exact", lambda rows: np.zeros((1, 63), rows.dtype)),
    ],
)
def test_parts_that_contradict_each_other_are_refused(codec_of, name, change):
    """A scale out of range, and exact rows without marks, are refused."""
    rows = some_rows()
    found = encoded(codec_of("2", ""), model_rows(rows), rows)
    assert not len(found.open()["exact"])
    with pytest.raises(IntegrityError):
        replace(found, parts=with_part(found, name, change)).open()


def test_bytes_that_no_coefficients_give_are_refused():
    """Each stream's bytes are bounded by the levels that it has."""
    rows = some_rows(start=4, shape=(1, 2, 12, 8), layers=(0,))
    found = encoded(plain_codec(), np.zeros(rows.shape, np.float32), rows)
    for part in found.parts:
        name = part.name.removeprefix(kit.PREFIX)
        if name.startswith("c"):
            bad = with_part(found, name, changed(255))
            with pytest.raises(IntegrityError, match="coefficient"):
                replace(found, parts=bad).open()


@pytest.mark.parametrize("end", ["", "+zstd"])
def test_a_part_described_otherwise_is_refused(codec_of, end):
    """Another dtype, shape or size, and a part that is missing, are refused."""
    rows = some_rows(start=0)
    found = encoded(codec_of("3", end), model_rows(rows), rows)
    for name, spec in found.tensors.items():
        raw = spec.raw_nbytes
        changes = [{"dtype": "I8"}, {"raw_nbytes": 2**62}, {"raw_nbytes": -64}]
        changes += [{"raw_nbytes": 7 if raw is None else raw + 1}]
        changes += [{"shape": (2**40,)}] if raw is None else []
        for change in changes:
            tensors = {**found.tensors, name: replace(spec, **change)}
            with pytest.raises(IntegrityError, match=name):
                found.open(tensors=tensors)
        rest = {key: value for key, value in found.tensors.items() if key != name}
        with pytest.raises(IntegrityError, match="missing"):
            found.open(tensors=rest)


@given(
    end=st.sampled_from(["", "+zstd"]),
    bits=st.lists(st.integers(0, 2**20), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=100)
def test_flipped_bits_are_refused_or_give_rows(codec_of, end, bits):
    """Bits that flip raise an error of ours, or are taken for other rows."""
    rows = some_rows(start=0, shape=(2, 4, 9, 16))
    found = encoded(codec_of("2", end), model_rows(rows), rows)
    data = bytearray(found.data)
    for bit in bits:
        data[bit % (8 * len(data)) // 8] ^= 1 << bit % 8
    try:
        opened = found.open(bytes(data))
    except IntegrityError:
        return
    with np.errstate(all="ignore"):
        found.decode_into(opened)
        found.decode(opened)


# --- Rotation. ---


@pytest.mark.parametrize("is_traditional", [False, True])
@pytest.mark.parametrize("turned", [16, 8])
def test_the_rotation_of_keys_is_found_in_them(is_traditional, turned):
    """Of all usual rotations, keys tell by which they were rotated."""
    frequencies = 1e5 ** (-np.arange(0, turned, 2) / turned)
    group = fitting.make_group(
        LAYERS, 2, 16, fitting.Rotation(frequencies, is_traditional)
    )
    samples = []
    for start in (4, 260, 1004):
        plain = fitting.Sample(start, "F32", model_rows(some_rows(), start))
        back = -np.tile(frequencies, (2, 1))
        samples.append(replace(plain, x=fitting.unrotated(plain, plain.x, back, group)))
    found = fitting.find_rotation(samples, fitting.usual_rotations(16))
    assert (frequencies == found.frequencies).all()
    assert is_traditional == found.is_traditional


# --- Gradients. ---


def test_errors_go_where_they_do_no_harm():
    """Of numbers of equal size, those that gradients point at are kept more exactly."""
    random = np.random.default_rng(3)
    rows = some_rows(shape=(1, 2, 600, 16), layers=(0,))
    fit = fitting.GroupFit(
        fitting.make_group((0,), 1, 16, fitting.NO_ROTATION), fitting.NO_ROTATION
    )
    for _ in range(3):
        x = random.standard_normal(rows.shape, np.float32)
        gradient = random.standard_normal(rows.shape, np.float32)
        gradient[:, 0, :, 8:] /= 16
        # Rows of small values matter, and tell so.
        x[:, 1, ::7] /= 16
        gradient[:, :, ::7] *= 16
        fit.add(fitting.Sample(4, "F32", x, (gradient,)))
    data = fitting.finish_basis([fit], {})
    family = FitFamily(lambda asked: parse(data, asked))
    codec = find_codec(f"fit3@{basis_digest(data)}+zstd", family)
    lost = np.square(check_both(encoded(codec, x, rows)) - x)
    assert lost[:, 0, :, 8:].mean() > 20 * lost[:, 0, :, :8].mean()
    ordinary = np.arange(600) % 7 != 0
    assert lost[:, 0, ordinary, :8].mean() > 4 * lost[:, 0, ::7, :8].mean()


def test_a_regression_finds_what_harm_was_made_with():
    """Weights come back from noisy numbers that were made with them."""
    random = np.random.default_rng(2)
    told = np.concatenate(
        [np.ones((4000, 1)), random.standard_normal((4000, 3))], axis=1
    )
    weights = np.array([0.5, 1.0, -2.0, 0.0])
    harm = np.exp(told @ weights) * random.gamma(0.3, 1 / 0.3, 4000)
    found = fitting.regress(told.astype(np.float32), harm.astype(np.float32))
    assert np.abs(found - weights).max() < 0.2
