"""The kernels of a GPU, run without one: their text compiled as C++.

A SIMD group is 32 fibers that meet at each shuffle (shim.h). Codes, norms, means and
rows are NumPy's to the bit.
"""

import hashlib
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from shim import COMPILER, make_launch
from standins import run_on_a_thread

from turboquant import make_wh_rotation
from turboquant.kernels import gpu
from turboquant.kernels.numpy import NumpyKernels

NUMPY = NumpyKernels()
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
pytestmark = pytest.mark.filterwarnings("error")


def bits_of(x):
    """Return an array as NumPy's, bfloat16 as its bits."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def some_rows(dim, tokens, dtype):
    """Return rows of very different sizes, some of them not finite or all but zero."""
    random = np.random.default_rng((dim, tokens))
    x = random.standard_normal((2, 2, tokens, dim)).astype(np.float32)
    x += 3 * random.standard_normal((2, 2, 1, dim)).astype(np.float32)
    odd = [0.0, -0.0, np.nan, np.inf, 2.0**-140, 2.0**-125, 2.0**-50, 2.0**-20, 2.0**60]
    odd += [3.0e38, 65504, -np.inf]
    with np.errstate(all="ignore"):
        for row, number in zip(x[0].reshape(-1, dim), odd, strict=False):
            row *= np.float32(number)
    x[1, 0, 3, 1] = np.nan
    return mx.array(x).astype(dtype)


CASES = [
    (dim, bits, dtype, (dim + bits) % 2 == 0)
    for dim in (8, 104, 128)
    for bits, dtype in zip(range(1, 9), DTYPES * 3, strict=False)
]


# Layers, blocks, rows before those meant and behind them.
LAYOUTS = [(2, 1, 0, 0), (1, 2, 0, 3), (2, 3, 5, 1), (2, 1, 1, 0)]


def in_buffers(x, num_blocks, begin=0, room=0):
    """Return rows ``(L, H, blocks * T, D)`` as caches have them, among others."""
    padding = [(0, 0), (0, 0), (begin, room), (0, 0)]
    layers = [
        (mx.pad(layer[None], padding, constant_values=3.25), begin) for layer in x
    ]
    return gpu.Buffers(layers, x.shape[2] // num_blocks, num_blocks)


def joined(arrays, axis=1):
    """Return what several launches made of layers one after another."""
    return np.concatenate([np.array(array) for array in arrays], axis)


def check_codes(x, rows, bits, is_centred, case):
    """Hold codes of rows in buffers against NumPy's of each block."""
    rotation = make_wh_rotation(x.shape[-1])
    made = gpu.encode(rows, bits, rotation, is_centred=is_centred)
    norms = joined([codes.norms for codes in made], axis=2)
    assert all((codes.mean is not None) == is_centred for codes in made)
    blocks = np.split(bits_of(x), rows.num_blocks, axis=2)
    for number, block in enumerate(blocks):
        wanted = NUMPY.encode_block(list(block), bits, rotation, is_centred=is_centred)
        for plane, theirs in enumerate(wanted.planes):
            ours = joined([codes.planes[plane] for codes in made])[number]
            assert np.array_equal(ours, theirs), case
        octets = np.moveaxis(norms[number], 0, -1)
        assert octets.tobytes() == wanted.norms.tobytes(), case
        if is_centred:
            mean = joined([codes.mean for codes in made])[number]
            assert mean.tobytes() == wanted.mean.tobytes(), case


def test_codes_are_those_of_numpy(launch, as_gpu):
    """All widths and dtypes, powers of two and sums of them, centred or not.

    The rows are those of one block or of several, in buffers of one layer or two.
    """
    as_gpu(launch)
    for number, (dim, bits, dtype, is_centred) in enumerate(CASES):
        layers, blocks, begin, room = LAYOUTS[number % len(LAYOUTS)]
        x = some_rows(dim, (6 + number % 2) * blocks, dtype)[:layers]
        rows = in_buffers(x, blocks, begin, room)
        case = dim, bits, dtype, is_centred, layers, blocks, begin, room
        check_codes(x, rows, bits, is_centred, case)


@pytest.mark.parametrize("num_layers", [16, 33])
def test_each_layer_is_read_from_its_own_buffer(launch, as_gpu, num_layers):
    """All that one launch is given, and those of the next launches."""
    as_gpu(launch)
    x = np.random.default_rng(0).standard_normal((num_layers, 2, 6, 8))
    x = mx.array(x.astype(np.float16))
    rows = in_buffers(x, 2, 1, 1)
    made = gpu.encode(rows, 3, make_wh_rotation(8), is_centred=True)
    assert len(made) == -(-num_layers // 16)
    check_codes(x, rows, 3, True, num_layers)
    assert np.array_equal(joined(gpu.pick(rows, range(3)))[1], bits_of(x)[:, :, 3:])


def test_buffers_may_differ(launch, as_gpu):
    """Layers whose buffers have other room, or other rows before, are no less right."""
    as_gpu(launch)
    x = some_rows(8, 6, mx.bfloat16)
    x = mx.concatenate([x, x[:, :, ::-1]])
    rooms = [(0, 2), (0, 2), (3, 2), (0, 5)]
    layers = [
        in_buffers(one[None], 1, *room).layers[0]
        for one, room in zip(x, rooms, strict=True)
    ]
    rows = gpu.Buffers(layers, 3, 2)
    assert len(gpu.pick(rows, range(1))) == 3
    check_codes(x, rows, 4, True, rooms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_are_copied_as_they_are(launch, as_gpu, dtype):
    """Of each block, to the bit."""
    as_gpu(launch)
    x = some_rows(24, 10, dtype)
    rows, exact = in_buffers(x, 2, 2, 3), bits_of(x)
    for which in (range(5), range(1, 5, 2), range(4, 5), range(5)[7:]):
        picked = joined(gpu.pick(rows, which))
        for number in range(2):
            wanted = exact[:, :, 5 * number :][:, :, list(which)]
            assert picked[number].tobytes() == wanted.tobytes(), which
    behind = in_buffers(x, 1, 2, 3).behind(4)
    picked = joined(gpu.pick(behind, range(6)))[0]
    assert picked.tobytes() == exact[:, :, 4:].tobytes()


def test_no_row_outside_a_buffer_is_read(launch, as_gpu):
    """A GPU would read on, into another array."""
    as_gpu(launch)
    rows, rotation = in_buffers(some_rows(8, 6, mx.float16), 2), make_wh_rotation(8)
    outside = [
        rows._replace(num_blocks=3),
        rows._replace(num_rows=4),
        rows._replace(layers=[(array, 1) for array, _ in rows.layers]),
        rows._replace(layers=[(array, -1) for array, _ in rows.layers]),
    ]
    for beyond in outside:
        with pytest.raises(ValueError, match="other rows"):
            gpu.encode(beyond, 4, rotation, is_centred=False)
    with pytest.raises(ValueError, match="no such rows"):
        gpu.pick(rows, range(4))
    with pytest.raises(ValueError, match="several blocks"):
        rows.behind(1)


def test_rows_are_those_of_numpy(launch, as_gpu):
    """Of codes, and of segments that are exact, split into planes, or empty."""
    as_gpu(launch)
    for dim, bits, dtype, is_centred in CASES:
        x, rotation = some_rows(dim, 6, dtype), make_wh_rotation(dim)
        exact = bits_of(x)
        codes = NUMPY.encode_block(list(exact), bits, rotation, is_centred=is_centred)
        wanted = np.zeros((2, 2, 9, dim), exact.dtype)
        NUMPY.decode_block(
            codes.planes, codes.norms, list(wanted[:, :, :6]), bits, rotation,
            mean=codes.mean,
        )  # fmt: skip
        wanted[:, :, :2], wanted[:, :, 5:7] = exact[:, :, :2], exact[:, :, :2]
        norms, octets = (
            np.moveaxis(array.view(np.uint8).reshape(*array.shape, -1), -1, 0)
            for array in (codes.norms, exact)
        )
        mean = [] if codes.mean is None else [codes.mean]
        parts = [*codes.planes, norms, exact, octets[:-1], octets[-1], *mean]
        upload = gpu.start_upload()
        places = upload.send([np.ascontiguousarray(part) for part in parts])
        count = len(codes.planes)
        norms_at, raw, low, high, *means = places[count:]
        segments = [
            gpu.segment(-1, codes.norms.shape, 0, [raw]),
            gpu.segment(bits, codes.norms.shape, 0, places[:count], norms_at, *means),
            gpu.segment(-2, codes.norms.shape, -5, [low, high]),
            gpu.segment(0, codes.norms.shape, 0, []),
        ]
        which = np.repeat(np.arange(4, dtype=np.int32), [2, 3, 2, 2])
        for layer in range(2):
            out = gpu.restore(
                upload.data(),
                mx.array(which),
                mx.array(np.array(segments, np.int64)),
                rotation,
                layer=layer,
                shape=(1, 2, 9, dim),
                dtype=dtype,
            )
            case = dim, bits, dtype, is_centred
            assert bits_of(out).tobytes() == wanted[layer].tobytes(), case


# By kernel: what is planted, in the place of what.
BUGS = {
    "encode_4": {
        "a sign": ("lane & reach ? -1.0f : 1.0f", "lane & reach ? 1.0f : -1.0f"),
        "the order of a sum": ("[left - reach + c]", "[reach + c]"),
        "a lane that leaves": ("if (block >= num", "if (lane == 9 || block >= num"),
        "a missing barrier": ("MUL(a, b);\n  }\n  BARRIER;", "MUL(a, b);\n  }"),
        "one boundary": ("spread >= boundaries", "spread > boundaries"),
        "another layer": ("((i) & 1 ? b : a)", "(a)"),
        "the room of a head": ("* capacity", "* (num_rows * num_blocks)"),
        "the first row": (" + begin", ""),
        "the first block": ("wide(block) * num_rows", "0"),
        "the order of layers": (
            "block * num_layers + layer",
            "layer * num_blocks + block",
        ),
        "the order of norms": ("wide(block * 3 + k)", "wide(k)"),
    },
    "mean_1": {
        "a mean of other rows": (" + begin", ""),
        "a mean elsewhere": ("wide(block) * num_layers + layer", "wide(layer)"),
    },
    "pick_1": {
        "other rows picked": ("first + in_head", "in_head"),
        "rows picked too close": ("/ dim * step", "/ dim"),
    },
}


@pytest.mark.parametrize(
    ("kernel", "bug"), [(kernel, bug) for kernel in BUGS for bug in BUGS[kernel]]
)
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_planted_bug_is_found(kernel, bug, tmp_path, as_gpu):
    """Wrong kernels are told at their first use, by one warning, and not used."""
    old, new = BUGS[kernel][bug]

    def edit(text):
        if f"turboquant_{kernel}(" not in text:
            return text
        assert text.count(old) == 1
        return text.replace(old, new)

    as_gpu(make_launch(tmp_path, edit))
    why = "part ways" if bug == "a lane that leaves" else "other numbers than NumPy"
    with pytest.warns(RuntimeWarning, match=why):
        assert not gpu.can("encode")
    assert not gpu.can("encode")
    rows = in_buffers(mx.zeros((1, 1, 4, 8)), 1)
    with pytest.raises(RuntimeError, match="no kernels"):
        gpu.encode(rows, 4, make_wh_rotation(8), is_centred=False)


@pytest.mark.parametrize("rotation", [None, make_wh_rotation(24)])
def test_tables_that_one_thread_makes_are_for_any(rotation):
    """They are kept for good, and so must not be left to be computed."""
    gpu._restoring_tables.cache_clear()
    tables = run_on_a_thread(gpu._restoring_tables, rotation)
    assert np.isfinite(np.asarray(tables)).all()


def test_the_ptx_is_of_this_text():
    """Whoever changes a kernel has to run tools/make_ptx.py."""
    with zipfile.ZipFile(gpu.PTX) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist()}
    wanted = {}
    for name, registers in gpu.variants():
        digest = hashlib.sha256(gpu.source(name, registers).encode()).hexdigest()
        wanted[f"{gpu.entry(name, registers)}.ptx"] = f"// {digest}"
    assert {name: text.split("\n")[0] for name, text in found.items()} == wanted
    assert all(".entry " + n.removesuffix(".ptx") in text for n, text in found.items())
