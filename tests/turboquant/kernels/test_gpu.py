"""The kernels of a GPU, run without one: their text compiled as C++.

A SIMD group is 32 fibers that meet at each shuffle (shim.h). Codes, norms, means and
rows are NumPy's to the bit.
"""

import ctypes
import hashlib
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import hatch_build
from turboquant import make_wh_rotation
from turboquant.kernels import gpu
from turboquant.kernels.numpy import NumpyKernels
from turboquant.packing import plane_widths

COMPILER = hatch_build.find_compiler()
SHIM = Path(__file__).with_name("shim.h").read_text()
DTYPES = {np.float32: 0, np.float16: 1, np.uint16: 2}
pytestmark = pytest.mark.filterwarnings("error")
compiled = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


class Kernels:
    """Some kernels, compiled; `edit` changes their text."""

    def __init__(self, folder, variants, edit=lambda text: text):
        self._libraries = {}
        for name, registers in variants:
            self._libraries[name] = self._compile(Path(folder), name, registers, edit)

    @staticmethod
    def _compile(folder, name, registers, edit):
        kernel = gpu._KERNELS[name]
        text = edit(gpu.source(name, registers, SHIM, "static void"))
        count = len(kernel.inputs) + len(kernel.outputs)
        values = [f"(uchar*)p[{i}]" for i in range(count)]
        values = [
            f"(const {gpu._POINTERS[n]}*)p[{i}]" if n in gpu._POINTERS else values[i]
            for i, n in enumerate((*kernel.inputs, *kernel.outputs))
        ]
        values += [f"n[{i}]" for i in range(len(kernel.numbers))]
        text += (
            "static void** p; static int* n;\n"
            f"static void one() {{ {gpu.entry(name, registers)}("
            f"{', '.join(values)}); }}\n"
            'extern "C" int run(void** pointers, int* numbers, int threads) {\n'
            "p = pointers; n = numbers;\n"
            "for (int at = 0; at < threads; at += 32)\n"
            "if (shim::run_group(at, one)) return 1;\nreturn 0; }\n"
        )
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        source.write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
        subprocess.run([*COMPILER, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    def run(self, name, arrays, numbers, threads):
        """Run each thread once; refuse lanes that parted ways."""
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        counts = (ctypes.c_int * len(numbers))(*numbers)
        if self._libraries[name].run(pointers, counts, threads):
            raise RuntimeError("lanes part ways")

    def encode(self, x, bits, rotation, is_centred):
        """Return planes, norms and mean of rows ``(H, T, D)``, as bytes."""
        heads, tokens, dim = x.shape
        rows, numbers = heads * tokens, (dim, DTYPES[x.dtype.type], heads, tokens)
        mean = np.full((heads, dim), 0x7777, np.uint16)
        if is_centred:
            self.run("mean", [x, mean], numbers, heads * dim)
        codes = np.full(rows * dim * bits // 8, 7, np.uint8)
        norms = np.full((4, rows), 7, np.uint8)
        tables = np.array(gpu._encoding_tables(rotation))
        arrays = [x, mean, tables, codes, norms]
        self.run("encode", arrays, (*numbers, bits, is_centred), 32 * rows)
        return codes.tobytes(), norms.T.tobytes(), mean.tobytes() if is_centred else b""

    def restore(self, data, segments, counts, rotation, shape, dtype):
        """Return the rows of a layer, ``(H, C, D)``, whose segments have so many."""
        which = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        heads, capacity, dim = shape
        out = np.full(shape, 7, dtype)
        tables = np.array(gpu._restoring_tables(rotation))
        arrays = [data, which, np.array(segments, np.int64), tables, out]
        numbers = (dim, DTYPES[dtype], heads, capacity, 0)
        self.run("restore", arrays, numbers, 32 * heads * capacity)
        return out


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield path


@pytest.fixture(scope="module")
def kernels(folder):
    return Kernels(folder, [("mean", 1), ("encode", 4), ("restore", 4)])


def as_dtype(x, dtype):
    """Return float32 numbers in a dtype; in uint16, cut to bfloat16."""
    if dtype == np.uint16:
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def some_rows(heads, tokens, dim, dtype):
    """Return rows of very different sizes, some of them not finite or all but zero."""
    random = np.random.default_rng((heads, tokens, dim))
    x = random.standard_normal((heads, tokens, dim)).astype(np.float32)
    x += 3 * random.standard_normal((heads, 1, dim)).astype(np.float32)
    odd = [0.0, -0.0, np.nan, np.inf, 2.0**-140, 2.0**-125, 2.0**-50, 2.0**-20, 2.0**60]
    odd += [3.0e38, 65504, -np.inf]
    with np.errstate(all="ignore"):
        for row, number in zip(x[0], odd, strict=False):
            row *= np.float32(number)
        x[-1, 0, 3] = np.nan
    return as_dtype(x, dtype)


def in_numpy(x, bits, rotation, is_centred):
    """Return what NumPy makes of rows: the object, and its bytes."""
    made = NumpyKernels().encode_block([x], bits, rotation, is_centred=is_centred)
    planes = b"".join(plane.tobytes() for plane in made.planes)
    mean = b"" if made.mean is None else made.mean.tobytes()
    return made, (planes, made.norms.tobytes(), mean)


def laid_out(arrays):
    """Return arrays one behind the other, as bytes, and where each begins."""
    data, places = b"", []
    for array in arrays:
        data += bytes(-len(data) % 16)
        places.append(len(data))
        data += array.tobytes()
    return np.frombuffer(data, np.uint8).copy(), places


CASES = [
    (dim, bits, dtype, (dim + bits) % 2 == 0)
    for dim in (8, 80, 104, 128)
    for bits, dtype in zip(range(1, 9), [*DTYPES] * 3, strict=False)
]


@compiled
def test_codes_are_those_of_numpy(kernels):
    """All widths and dtypes, powers of two and sums of them, centred or not."""
    for number, (dim, bits, dtype, is_centred) in enumerate(CASES):
        x, rotation = some_rows(2, 7 + number % 6, dim, dtype), make_wh_rotation(dim)
        _, wanted = in_numpy(x, bits, rotation, is_centred)
        case = dim, bits, dtype, is_centred
        assert kernels.encode(x, bits, rotation, is_centred) == wanted, case


@compiled
def test_rows_are_those_of_numpy(kernels):
    """Of codes, and of segments that are exact, split into planes, or empty."""
    for dim, bits, dtype, is_centred in CASES:
        x, rotation = some_rows(2, 11, dim, dtype), make_wh_rotation(dim)
        codes, _ = in_numpy(x, bits, rotation, is_centred)
        norms = np.moveaxis(codes.norms[0].view(np.uint8).reshape(2, 11, 4), -1, 0)
        octets = np.moveaxis(x.view(np.uint8).reshape(*x.shape, x.itemsize), -1, 0)
        mean = [] if codes.mean is None else [codes.mean]
        parts = [*codes.planes, norms, x, octets[:-1], octets[-1], *mean]
        data, places = laid_out(parts)
        widths = len(plane_widths(bits))
        norms_at, raw, low, high = places[widths : widths + 4]
        shape, means = (1, 2, 11), places[widths + 4 :] or [-1]
        segments = [
            gpu.segment(-1, shape, 0, [raw]),
            gpu.segment(bits, shape, 0, places[:widths], norms_at, means[0]),
            gpu.segment(-2, shape, -9, [low, high]),
            gpu.segment(0, shape, 0, []),
        ]
        wanted = np.zeros((2, 15, dim), dtype)
        NumpyKernels().decode_block(
            codes.planes, codes.norms, [wanted[:, :11]], bits, rotation, mean=codes.mean
        )
        wanted[:, :2], wanted[:, 9:13] = x[:, :2], x[:, :4]
        out = kernels.restore(
            data, segments, [2, 7, 4, 2], rotation, wanted.shape, dtype
        )
        assert out.tobytes() == wanted.tobytes(), (dim, bits, dtype, is_centred)


BUGS = {
    "a sign": ("ADD(other, -x[i])", "ADD(x[i], -other)"),
    "the order of a sum": ("[left - reach + c]", "[reach + c]"),
    "a lane that leaves": ("if (row >= all)", "if (row >= all || lane == 9)"),
    "a missing barrier": ("MUL(a, b);\n  }\n  BARRIER;", "MUL(a, b);\n  }"),
    "one boundary": ("spread >= boundaries", "spread > boundaries"),
}


@compiled
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, tmp_path):
    """What the shim runs is the text: a wrong one gives other codes, or none."""
    old, new = BUGS[bug]

    def edit(text):
        assert text.count(old) == 1
        return text.replace(old, new)

    kernels = Kernels(tmp_path, [("encode", 2)], edit)
    x, rotation = some_rows(2, 12, 40, np.float32), make_wh_rotation(40)
    _, wanted = in_numpy(x, 3, rotation, False)
    if bug == "a lane that leaves":
        with pytest.raises(RuntimeError, match="part ways"):
            kernels.encode(x, 3, rotation, False)
    else:
        assert kernels.encode(x, 3, rotation, False) != wanted


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
