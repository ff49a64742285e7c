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


def test_codes_are_those_of_numpy(launch, as_gpu):
    """All widths and dtypes, powers of two and sums of them, centred or not."""
    as_gpu(launch)
    for number, (dim, bits, dtype, is_centred) in enumerate(CASES):
        x, rotation = some_rows(dim, 6 + number % 2, dtype), make_wh_rotation(dim)
        options = {"is_centred": is_centred}
        wanted = NUMPY.encode_block(list(bits_of(x)), bits, rotation, **options)
        planes, norms, mean = gpu.encode(x, bits, rotation, **options)
        octets = np.moveaxis(np.array(norms), 0, -1)
        case = dim, bits, dtype, is_centred
        for ours, theirs in zip(planes, wanted.planes, strict=True):
            assert np.array_equal(np.array(ours), theirs), case
        assert octets.tobytes() == wanted.norms.tobytes(), case
        assert (mean is not None) == is_centred
        if mean is not None:
            assert np.array(mean).tobytes() == wanted.mean.tobytes(), case


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


BUGS = {
    "a sign": ("lane & reach ? -1.0f : 1.0f", "lane & reach ? 1.0f : -1.0f"),
    "the order of a sum": ("[left - reach + c]", "[reach + c]"),
    "a lane that leaves": ("if (row >= all)", "if (row >= all || lane == 9)"),
    "a missing barrier": ("MUL(a, b);\n  }\n  BARRIER;", "MUL(a, b);\n  }"),
    "one boundary": ("spread >= boundaries", "spread > boundaries"),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_planted_bug_is_found(bug, tmp_path, as_gpu):
    """Wrong kernels are told at their first use, by one warning, and not used."""
    old, new = BUGS[bug]

    def edit(text):
        assert text.count(old) == 1 or "encode_4" not in text
        return text.replace(old, new)

    as_gpu(make_launch(tmp_path, edit))
    why = "part ways" if bug == "a lane that leaves" else "other numbers than NumPy"
    with pytest.warns(RuntimeWarning, match=why):
        assert not gpu.can("encode")
    assert not gpu.can("encode")
    with pytest.raises(RuntimeError, match="no kernels"):
        gpu.encode(mx.zeros((1, 1, 4, 8)), 4, make_wh_rotation(8), is_centred=False)


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
