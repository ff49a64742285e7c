"""The compiled kernels give what NumPy gives: codes, norms, means and rows, to the bit.

Each instruction set of this processor is tested; none where nothing is compiled.
"""

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from turboquant import make_wh_rotation
from turboquant.kernels import native
from turboquant.kernels.numpy import BlockCodes, NumpyKernels

NUMPY = NumpyKernels()
COMPILED = native.load_all()
DTYPES = [np.float32, np.float16, np.uint16]
# Powers of two, sums of them, and widths that no vector register divides.
DIMS = [8, 16, 24, 64, 72, 80, 96, 128, 200, 256, 576, 1000]

pytestmark = pytest.mark.filterwarnings("error")
every_set = pytest.mark.parametrize("kernels", COMPILED, ids=lambda each: each.name)
every_width = pytest.mark.parametrize("bits", range(1, 9))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def as_dtype(x: np.ndarray, dtype: type) -> np.ndarray:
    """Return float32 numbers in a dtype; in uint16, cut to bfloat16."""
    if dtype == np.uint16:
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def some_layers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Return rows of very different sizes, shape ``(L, H, T, D)``, around a mean."""
    random = np.random.default_rng(shape)
    x = random.standard_normal(shape) * np.exp(2 * random.standard_normal(shape[:3]))[
        ..., None
    ] + 3 * random.standard_normal((*shape[:2], 1, shape[3]))
    return as_dtype(x.astype(np.float32), dtype)


def odd_layers(dim: int, dtype: type) -> np.ndarray:
    """Return what a row can hold: not finite, zero, subnormal, at a limit, tied."""
    numbers = [0.0, -0.0, 1, np.nan, -np.nan, np.inf, -np.inf, 3.0e38, -3.0e38, 65504]
    numbers += [sign * 2.0**power * (1 + step * 2.0**-7) for sign in (1, -1)
                for power in (-149, -133, -127, -126, -41, -40, -24, -14, 39, 40, 127)
                for step in (0, 1, -0.25)]  # fmt: skip
    rows = []
    for number in numbers:
        rows.append(np.full(dim, number))
        rows.append(np.where(np.arange(dim) == dim // 3, number, 0))
        rows.append(np.where(np.arange(dim) == dim - 1, number, 1))
    rows.append(np.arange(dim) - dim / 2)
    rows.append(np.arange(dim) % 2)
    with np.errstate(all="ignore"):
        return as_dtype(np.array(rows, np.float32)[None, None], dtype)


def bits_of(codes: BlockCodes) -> list[bytes]:
    """Return all that was encoded as bytes."""
    mean = [] if codes.mean is None else [codes.mean]
    return [array.tobytes() for array in (*codes.planes, codes.norms, *mean)]


def decoded(kernels, codes, shape, dtype, bits, rotation) -> np.ndarray:
    """Return decoded rows, from a buffer that was full of something else."""
    out = np.full(shape, 7, dtype)
    kernels.decode_block(
        codes.planes, codes.norms, out, bits, rotation, mean=codes.mean
    )
    return out


def assert_same(kernels, layers, bits, rotation, *, dtypes=DTYPES) -> None:
    """Assert that kernels encode and decode as NumPy does."""
    for is_centred in (False, True):
        expected = NUMPY.encode_block(layers, bits, rotation, is_centred=is_centred)
        codes = kernels.encode_block(layers, bits, rotation, is_centred=is_centred)
        assert bits_of(expected) == bits_of(codes)
        shape = (len(layers), *layers[0].shape)
        for dtype in dtypes:
            theirs, ours = (
                decoded(each, codes, shape, dtype, bits, rotation)
                for each in (NUMPY, kernels)
            )
            assert theirs.tobytes() == ours.tobytes()


@every_set
@every_width
@every_dtype
def test_rows_of_every_width_and_dtype(kernels, bits, dtype) -> None:
    """Rows of 128 numbers get the same codes and decode to the same rows."""
    layers = some_layers(2, 3, 70, 128, dtype=dtype)
    assert_same(kernels, layers, bits, make_wh_rotation(128))


@every_set
@every_width
@pytest.mark.parametrize("dim", DIMS)
def test_rows_of_every_length(kernels, bits, dim) -> None:
    """Each block of a length that is no power of two is transformed by itself."""
    layers = some_layers(1, 2, 21, dim, dtype=np.uint16)
    assert_same(kernels, layers, bits, make_wh_rotation(dim, 5), dtypes=[np.uint16])


@every_set
@every_dtype
@pytest.mark.parametrize("num_rows", [*range(1, 18), 31, 32, 33, 1000])
def test_any_number_of_rows(kernels, dtype, num_rows) -> None:
    """Rows that do not fill a group are neither lost nor written beyond."""
    layers = some_layers(1, 2, num_rows, 72, dtype=dtype)
    assert_same(kernels, layers, 3, make_wh_rotation(72), dtypes=[dtype])


@every_set
@every_width
@every_dtype
@pytest.mark.parametrize("dim", [64, 80])
def test_odd_numbers(kernels, bits, dtype, dim) -> None:
    """NaN, infinity, zeros, subnormals and limits are treated as NumPy treats them."""
    assert_same(kernels, odd_layers(dim, dtype), bits, make_wh_rotation(dim))


@every_set
@every_width
@every_dtype
def test_any_codes_and_norms(kernels, bits, dtype) -> None:
    """What no encoder wrote decodes as it does in NumPy: any codes, norms and means."""
    random = np.random.default_rng(bits)
    shape, rotation = (2, 3, 50), make_wh_rotation(96)
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    codes = BlockCodes(
        [random.integers(0, 256, (*shape, 12 * w), np.uint8) for w in widths],
        random.integers(0, 2**32, shape, np.uint32).view(np.float32),
        random.integers(0, 2**16, (2, 3, 96), np.uint16).view(np.float16),
    )
    theirs, ours = (
        decoded(each, codes, (*shape, 96), dtype, bits, rotation)
        for each in (NUMPY, kernels)
    )
    assert theirs.tobytes() == ours.tobytes()


VIEWS = {
    "reversed tokens": lambda x: x[:, :, ::-1],
    "every second token": lambda x: x[:, :, ::2],
    "reversed heads": lambda x: x[:, ::-1],
    "tokens before heads": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
    "numbers apart": lambda x: x.repeat(2, axis=3)[..., ::2],
    "numbers first": lambda x: x.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1),
    "inside a buffer": lambda x: np.pad(x, ((0, 0), (0, 0), (3, 9), (0, 0)))[
        :, :, 3:-9
    ],
    "layers of their own": lambda x: [layer.copy() for layer in x],
    "layers of unlike strides": lambda x: [x[0], x[1].repeat(2, axis=1)[:, ::2]],
}


@every_set
@every_dtype
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(kernels, dtype, view) -> None:
    """Rows are read where they lie, and written there and nowhere else."""
    rotation, layers = make_wh_rotation(64), some_layers(2, 3, 40, 64, dtype=dtype)
    seen = VIEWS[view](layers)
    assert_same(kernels, seen, 4, rotation, dtypes=[])

    codes = NUMPY.encode_block(seen, 4, rotation, is_centred=True)
    theirs, ours = VIEWS[view](layers.copy()), VIEWS[view](layers.copy())
    for each, out in ((NUMPY, theirs), (kernels, ours)):
        each.decode_block(codes.planes, codes.norms, out, 4, rotation, mean=codes.mean)
    for one, other in zip(theirs, ours, strict=True):
        assert one.tobytes() == other.tobytes()
        assert whole(one).tobytes() == whole(other).tobytes()


def whole(view: np.ndarray) -> np.ndarray:
    """Return the memory that a view is of."""
    return view if view.base is None else view.base


@every_set
def test_planes_of_any_strides(kernels) -> None:
    """Planes and norms that are not contiguous decode as their copies do."""
    rotation = make_wh_rotation(64)
    x = some_layers(2, 3, 40, 64)
    codes = NUMPY.encode_block(x, 3, rotation, is_centred=False)
    apart = BlockCodes(
        [plane.repeat(2, axis=2)[:, :, ::2] for plane in codes.planes],
        codes.norms.repeat(3, axis=2)[:, :, ::3],
        None,
    )
    one, other = (
        decoded(kernels, each, x.shape, np.float32, 3, rotation)
        for each in (codes, apart)
    )
    assert one.tobytes() == other.tobytes()


@every_set
@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, 0), (3, 1, 0)])
def test_nothing_gives_nothing(kernels, shape) -> None:
    """No heads or no tokens are no error."""
    assert_same(kernels, np.empty((*shape, 64), np.float32), 4, make_wh_rotation(64))


REFUSED = {
    "another length": {"layers": np.empty((2, 3, 5, 72), np.float32)},
    "another dtype": {"layers": np.empty((2, 3, 5, 64), np.float64)},
    "layers of two shapes": {
        "layers": [np.empty((3, 5, 64), np.float32), np.empty((3, 4, 64), np.float32)]
    },
    "layers of two dtypes": {
        "layers": [np.empty((3, 5, 64), np.float32), np.empty((3, 5, 64), np.float16)]
    },
    "no layer": {"layers": []},
    "rows without heads": {"layers": np.empty((2, 5, 64), np.float32)},
    "bits": {"bits": 9},
    "no bits": {"bits": 0},
    "no planes": {"planes": []},
    "planes of another shape": {"planes": [np.zeros((2, 3, 5, 24), np.uint8)]},
    "planes of another dtype": {"planes": [np.zeros((2, 3, 5, 32), np.int8)]},
    "norms of another shape": {"norms": np.ones((2, 5, 3), np.float32)},
    "mean of another shape": {"mean": np.ones((3, 64), np.float32)},
}


@pytest.mark.parametrize("kernels", [NUMPY, *COMPILED], ids=lambda each: each.name)
@pytest.mark.parametrize("change", REFUSED)
def test_what_does_not_fit_is_refused(kernels, change) -> None:
    """No kernel is called with arrays of which one does not fit the others."""
    arguments = {
        "planes": [np.zeros((2, 3, 5, 32), np.uint8)],
        "norms": np.ones((2, 3, 5), np.float32),
        "layers": np.empty((2, 3, 5, 64), np.float32),
        "bits": 4,
        "rotation": make_wh_rotation(64),
        "mean": None,
    }
    message = "rows|layers|planes|norms|mean|bits"
    kernels.decode_block(**arguments)
    changed = {**arguments, **REFUSED[change]}
    with pytest.raises(ValueError, match=message):
        kernels.decode_block(**changed)
    if REFUSED[change].keys() & {"layers", "bits"}:
        with pytest.raises(ValueError, match=message):
            kernels.encode_block(
                changed["layers"], changed["bits"], changed["rotation"], is_centred=True
            )


@pytest.mark.parametrize("kernels", [NUMPY, *COMPILED], ids=lambda each: each.name)
def test_a_buffer_that_is_read_only_stays_as_it_is(kernels) -> None:
    """Memory that NumPy holds for read-only is not written."""
    codes = [np.zeros((1, 1, 4, 32), np.uint8)]
    out = np.full((1, 1, 4, 64), 7, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kernels.decode_block(
            codes, np.ones((1, 1, 4), np.float32), out, 4, make_wh_rotation(64)
        )
    assert (out == 7).all()


@every_set
def test_threads_disturb_each_other_not(kernels) -> None:
    """Calls on several threads at once give what one call gives."""
    from concurrent.futures import ThreadPoolExecutor

    rotation = make_wh_rotation(128)
    layers = some_layers(1, 4, 600, 128, dtype=np.uint16)
    expected = bits_of(NUMPY.encode_block(layers, 4, rotation, is_centred=True))

    def encode(_):
        return bits_of(kernels.encode_block(layers, 4, rotation, is_centred=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(encode, range(12)))


@every_set
def test_kernels_agree_with_numpy(kernels) -> None:
    """The check before first use takes kernels that are right."""
    assert native.agrees(kernels)


def test_kernels_that_are_wrong_are_not_used(monkeypatch, recwarn) -> None:
    """A library that gives other codes than NumPy is left alone, with one warning."""
    from turboquant import kernels as module

    class Wrong(NumpyKernels):
        name = "wrong"

        def encode_block(self, layers, bits, rotation, *, is_centred):
            codes = super().encode_block(layers, bits, rotation, is_centred=is_centred)
            codes.planes[0][..., 0] ^= 1
            return codes

    monkeypatch.delenv("TURBOQUANT_KERNELS", raising=False)
    monkeypatch.setattr(native, "load_all", lambda: [Wrong()])
    chosen = module.best_kernels.__wrapped__()

    assert "numpy" == chosen.name
    assert 1 == len(recwarn)
    assert "the wrong kernels" in str(recwarn[0].message)


def test_numpy_can_be_wanted(monkeypatch) -> None:
    """TURBOQUANT_KERNELS=numpy keeps to NumPy; another value is refused."""
    from turboquant.kernels import best_kernels

    monkeypatch.setenv("TURBOQUANT_KERNELS", "numpy")
    assert "numpy" == best_kernels.__wrapped__().name
    monkeypatch.setenv("TURBOQUANT_KERNELS", "fast")
    with pytest.raises(ValueError, match="TURBOQUANT_KERNELS"):
        best_kernels.__wrapped__()


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_library_that_cannot_be_loaded_is_none(tmp_path, content) -> None:
    """Without a library, or with a broken one, there are no compiled kernels."""
    path = tmp_path / "_native.so"
    if content is not None:
        path.write_bytes(content)
    assert [] == native.load_all(path)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="no compiler and emulator for AArch64",
)
def test_neon_under_an_emulator() -> None:
    """Every width, length and dtype gives NumPy's bytes on AArch64 too."""
    tool = Path(native.__file__).parents[2] / "tools/check_kernels.py"
    command = [sys.executable, tool, "neon", "--compiler=aarch64-linux-gnu-g++"]
    done = subprocess.run(
        [*command, "--runner=qemu-aarch64"], capture_output=True, text=True
    )
    assert (0, "336 cases, 0 bad\n") == (done.returncode, done.stdout), done.stderr


@every_set
@pytest.mark.parametrize("dtype", [np.uint8, *DTYPES, np.int64])
@pytest.mark.parametrize("shape", [(2, 3, 16, 64), (3, 1, 5, 7), (1, 2, 1, 40)])
def test_bytes_are_split_and_joined_as_by_numpy(kernels, dtype, shape):
    """Planes are NumPy's, and the first rows come back out of them, strided or not."""
    *outer, num_rows, dim = shape
    random = np.random.default_rng(shape)
    width = dim * np.dtype(dtype).itemsize
    room = random.integers(0, 256, (*outer, num_rows + 3, width), np.uint8)
    layers = list(room.view(dtype)[:, :, :num_rows])
    planes = kernels.split_bytes(layers)
    assert np.array_equal(NUMPY.split_bytes(layers), planes)
    for each in (kernels, NUMPY):
        out = np.full((*outer, num_rows + 2, dim), 7, dtype)
        each.join_bytes(planes, list(out[:, :, : num_rows - 1]))
        # By their bytes: some are NaN.
        assert out[:, :, :-3].tobytes() == np.stack(layers)[:, :, :-1].tobytes()
        assert (out[:, :, -3:] == 7).all()


@every_set
@pytest.mark.parametrize("verb", ["decode", "multiply", "restore"])
def test_one_wrong_kernel_is_enough(kernels, verb) -> None:
    """Kernels of which one gives a wrong number do not agree."""
    right = getattr(kernels, f"_{verb}")

    def wrong(job, *rest):
        status = right(job, *rest)
        made = job._obj.out if verb == "multiply" else job._obj.heads
        if verb != "multiply":
            made = ctypes.c_void_p.from_address(made).value
        ctypes.memset(made, 0x55, 4)
        return status

    assert not native.agrees(replace(kernels, **{f"_{verb}": wrong}))


@every_set
@pytest.mark.parametrize("verb", ["encode", "decode"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_kernels_that_are_wrong_for_some_rows_are_not_used(kernels, verb, dim) -> None:
    """Rows of common lengths have code of their own in some sets."""
    right = getattr(kernels, f"_{verb}")

    def wrong(job):
        status = right(job)
        made = job._obj.heads if verb == "decode" else job._obj.planes
        if job._obj.dim == dim:
            ctypes.memset(ctypes.c_void_p.from_address(made).value, 0x55, 4)
        return status

    assert not native.agrees(replace(kernels, **{f"_{verb}": wrong}))


@every_set
@pytest.mark.parametrize("shapes", [((3, 16), (32, 32)), ((3, 24), (24, 24))])
def test_products_of_other_shapes_are_refused(kernels, shapes) -> None:
    """A matrix has as many rows and columns as what it is multiplied with."""
    rows, matrix = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match="times a matrix"):
        kernels.multiply(rows, matrix)
