"""The kernels on a GPU: rows to codes and back where the rows are.

One text serves all: it is Metal as it stands, and CUDA by a few macros. Codes, norms
and rows are the bytes of `turboquant.kernels.numpy`. CUDA runs PTX that
`tools/make_ptx.py` made of the text, since MLX would compile it anew in each process.

Before the first use a few rows are held against NumPy's. Where they differ there are no
kernels here, one warning says so, and the operations of MLX do the work.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.codebook import decision_boundaries
from turboquant.kernels import cuda
from turboquant.kernels.numpy import (
    NumpyKernels,
    index_table,
    scale_table,
    symbol_table,
    unscale_table,
)
from turboquant.packing import plane_widths
from turboquant.rotation import Rotation, make_wh_rotation, rotation_signs

Array = NDArray[Any]
Verb = Literal["encode", "restore"]
MAX_DIM = 256
"""Rows of codes of more numbers are not for these kernels."""

_FOLDER = Path(__file__).parent
PTX = _FOLDER / "ptx.zip"
"""What `tools/make_ptx.py` made: a member for each kernel."""
# Numbers in each lane of the 32 that work on a row; the compiler must know how many.
_REGISTERS = (2, 4, 8)
# As in common.metal.
_DTYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}


class _Kernel(NamedTuple):
    """What a kernel is given, in this order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: tuple[str, ...]
    # Threads that start together.
    num_threads: int


_KERNELS = {
    "mean": _Kernel(("x",), ("mean",), ("dim", "dtype", "num_heads", "num_rows"), 256),
    "encode": _Kernel(
        ("x", "mean", "tables"),
        ("codes", "norms"),
        ("dim", "dtype", "num_heads", "num_rows", "bits", "is_centred"),
        128,
    ),
    "restore": _Kernel(
        ("data", "which", "segments", "tables"),
        ("out",),
        ("dim", "dtype", "num_heads", "capacity", "layer"),
        256,
    ),
}
_POINTERS = {"which": "int", "segments": "wide", "tables": "float"}
_METAL = """
#pragma METAL fp contract(off)
typedef long wide;
#define DEVICE device
#define AT(place) ((const device uchar*)data + (place))
#define FUNCTION inline
#define UNROLL _Pragma("unroll")
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
#define FMA(a, b, c) fma(a, b, c)
#define SQRT(x) precise::sqrt(x)
#define FROM_HALF(bits) float(as_type<half>(ushort(bits)))
#define TO_HALF(x) uint(as_type<ushort>(half(x)))
#define BARRIER simdgroup_barrier(mem_flags::mem_threadgroup)
"""
_CUDA = """
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef long long wide;
struct Position { uint x, y; };
#define FUNCTION __device__ inline
#define UNROLL _Pragma("unroll")
#define DEVICE
// Of CUDA's segments, places are addresses.
#define AT(place) ((const uchar*)(place))
#define threadgroup __shared__
#define ADD(a, b) __fadd_rn(a, b)
#define MUL(a, b) __fmul_rn(a, b)
#define DIV(a, b) __fdiv_rn(a, b)
#define FMA(a, b, c) __fmaf_rn(a, b, c)
#define SQRT(x) __fsqrt_rn(x)
#define BARRIER __syncwarp()
#define simd_shuffle_xor(x, mask) __shfl_xor_sync(0xffffffffu, x, mask)
#define thread_position_in_grid \\
  Position{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y}
#define thread_position_in_threadgroup Position{threadIdx.x, 0}
#define thread_index_in_simdgroup (threadIdx.x & 31)
template <class To, class From> FUNCTION To as_type(From x) {
  union { From from; To to; } u = {x};
  return u.to;
}
FUNCTION float FROM_HALF(uint bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(ushort(bits)));
  return x;
}
FUNCTION uint TO_HALF(float x) {
  ushort bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
"""


def can(verb: Verb) -> bool:
    """Whether the GPU here has kernels for this, and they do what NumPy does."""
    return _checked(verb) is not None


def encode(
    x: mx.array, bits: int, rotation: Rotation, *, is_centred: bool
) -> tuple[list[mx.array], mx.array, mx.array | None]:
    """Quantize rows on the GPU; nothing is evaluated.

    Args:
        x: Rows, shape ``(L, H, T, D)``, ``float32``, ``float16`` or ``bfloat16``;
            ``D`` is at most `MAX_DIM`.
        bits: Bits per coordinate, 1 to 8.
        rotation: A rotation of rows of length ``D``.
        is_centred: Whether each head's mean is taken off its rows first.

    Returns:
        The planes of the codes, widest first, each ``(L, H, T, D * width // 8)``; the
        norms' bytes, least significant first, ``(4, L, H, T)``; and the means,
        ``float16`` of ``(L, H, D)``, or ``None``.
    """
    return _encode(_way("encode"), x, bits, rotation, is_centred)


def restore(
    data: mx.array,
    which: mx.array,
    segments: mx.array,
    rotation: Rotation | None,
    *,
    layer: int,
    shape: tuple[int, int, int, int],
    dtype: mx.Dtype,
) -> mx.array:
    """Restore one array of a layer on the GPU; nothing is evaluated.

    Args:
        data: What an upload's `data` returned; the upload is kept until the rows are
            evaluated.
        which: The segment of each row of a head, shape ``(C,)``, ``int32``.
        segments: What `segment` returns for each, ``int64``.
        rotation: The rotation that rows were quantized with; ``None`` where all are
            exact, whose ``D`` may be anything.
        layer: Which layer of those in the data.
        shape: Of the rows, ``(1, H, C, D)``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    inputs = [data, which, segments]
    return _restore(_way("restore"), inputs, rotation, layer, shape, dtype)


def segment(
    bits: int,
    shape: tuple[int, int, int],
    skip: int,
    planes: Sequence[int],
    norms: int = 0,
    mean: int = -1,
) -> list[int]:
    """Return what `restore` is told of consecutive rows that lie alike.

    Args:
        bits: Of a coordinate; 0 for rows of zeros, ``-1`` for exact rows, ``-2`` for
            exact rows whose bytes lie in two planes, the low ones and the high one.
        shape: Layers, heads and rows of each head, as they lie.
        skip: What added to the number of a row gives its place among those.
        planes: Where each plane begins, as an upload says.
        norms: Where the norms' bytes begin.
        mean: Where the means begin, or ``-1`` for none.
    """
    places = [*planes, 0, 0, 0][:3]
    return [bits, shape[2], math.prod(shape), skip, *places, norms, mean, 0]


def start_upload(nbytes: int = 0) -> Upload:
    """Return what sends bytes, likely so many, to where `restore` reads them."""
    return cuda.Upload(nbytes) if mx.cuda.is_available() else ArrayUpload()


class Upload(Protocol):
    """Bytes that kernels read; they go when this goes."""

    def send(self, parts: Sequence[Array]) -> list[int]:
        """Copy contiguous arrays, from any thread; return where each is, in bytes."""

    def receive(
        self, size: int, read: Callable[[Sequence[memoryview]], None]
    ) -> int | None:
        """Have bytes read to where they are sent from, from any thread.

        Args:
            size: How many.
            read: Fills buffers of so many in all.

        Returns:
            Where they are, or ``None``, and nothing is read, if they are too many.
        """

    def data(self) -> mx.array:
        """Return all that was sent."""


class ArrayUpload:
    """Bytes that become arrays of MLX's, for a GPU that shares the host's memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[mx.array] = []
        self._end = 0

    def send(self, parts: Sequence[Array]) -> list[int]:
        """Copy arrays."""
        flat = [part.reshape(-1).view(np.uint8) for part in parts]
        places, size = cuda.lay_out(flat)
        piece = np.zeros(size, np.uint8)
        cuda.gather(flat, places, 0, piece)
        begin = self._add(piece)
        return [begin + place for place in places]

    def receive(
        self, size: int, read: Callable[[Sequence[memoryview]], None]
    ) -> int | None:
        """Read the bytes."""
        piece = np.zeros(cuda.aligned(size), np.uint8)
        read([piece[:size].data])
        return self._add(piece)

    def _add(self, piece: Array) -> int:
        # As numbers of 64 bits, since MLX has no array of 2**31 elements.
        array = mx.array(piece.view(np.uint64))
        with self._lock:
            begin, self._end = self._end, self._end + piece.size
            self._pieces.append(array)
            return begin

    def data(self) -> mx.array:
        """Return them joined."""
        return mx.concatenate([*self._pieces, mx.zeros((8,), mx.uint64)])


def source(
    name: str,
    registers: int,
    prefix: str = _CUDA,
    kind: str = 'extern "C" __global__ void',
) -> str:
    """Return a kernel as CUDA, or as another language that is C++ in the main.

    Args:
        name: Its name.
        registers: Numbers in each lane.
        prefix: The macros that make the text that language.
        kind: What the function is there.
    """
    kernel = _KERNELS[name]
    given = [f"const {_POINTERS.get(each, 'uchar')}* {each}" for each in kernel.inputs]
    made = [f"uchar* {each}" for each in kernel.outputs]
    arguments = [*given, *made, *(f"int {each}" for each in kernel.numbers)]
    return (
        f"{prefix}{_text('common')}{kind}\n"
        f"{entry(name, registers)}({', '.join(arguments)}) {{\n"
        f"constexpr int R = {registers};\n{_text(name)}}}\n"
    )


def entry(name: str, registers: int) -> str:
    """Return the name of a kernel for so many numbers in a lane."""
    return f"turboquant_{name}_{registers}"


def variants() -> list[tuple[str, int]]:
    """Return every kernel that there is PTX of: its name and its numbers in a lane."""
    wide = [(name, r) for name in ("encode", "restore") for r in _REGISTERS]
    return [("mean", 1), *wide]


def _way(verb: Verb) -> str:
    way = _checked(verb)
    if way is None:
        raise RuntimeError("there are no kernels for this GPU")
    return way


def _checked(verb: Verb) -> str | None:
    """Return how kernels are run here, once they have done what NumPy does."""
    # The threads of a load all ask at first, and no compiler is made for that.
    with _checking:
        return _find_way(verb)


_checking = threading.RLock()


@cache
def _find_way(verb: Verb) -> str | None:
    ways = ["ptx", "cuda"] if mx.cuda.is_available() else []
    ways += ["metal"] if mx.metal.is_available() else []
    if os.environ.get("TURBOQUANT_KERNELS"):
        ways = []
    why = ""
    for way in ways:
        try:
            if _agrees(way, verb):
                return way
            why = "they give other numbers than NumPy"
        except Exception as error:  # whatever a compiler or a driver says
            why = why or str(error)
    if ways:
        warnings.warn(
            f"the GPU kernels of turboquant are not used here: {why}",
            RuntimeWarning,
            stacklevel=3,
        )
    return None


def _agrees(way: str, verb: Verb) -> bool:
    """Whether a few rows become the codes, or decode to the rows, that NumPy gives."""
    return all(_agrees_on(way, verb, dim, bits) for dim, bits in ((80, 3), (128, 4)))


def _agrees_on(way: str, verb: Verb, dim: int, bits: int) -> bool:
    rotation, (heads, tokens) = make_wh_rotation(dim), (2, 9)
    numbers = np.arange(heads * tokens * dim, dtype=np.float32)
    x = ((numbers * 7919) % 251 - 120).reshape(1, heads, tokens, dim)
    x[0, 0, :4, 5:] = np.array([[0], [np.inf], [2.0**-60], [2.0**60]])
    codes = NumpyKernels().encode_block(list(x), bits, rotation, is_centred=True)
    assert codes.mean is not None  # since it is centred
    norms = np.moveaxis(
        codes.norms.view(np.uint8).reshape(*codes.norms.shape, 4), -1, 0
    )
    made: list[Array] = [*codes.planes, np.ascontiguousarray(norms), codes.mean]
    if verb == "encode":
        planes, *rest = _encode(way, mx.array(x), bits, rotation, True)
        ours = [np.asarray(each) for each in (*planes, *rest)]
        return all(a.tobytes() == b.tobytes() for a, b in zip(ours, made, strict=True))
    upload = start_upload()
    *places, norms_at, mean_at = upload.send(made)
    shape = (1, heads, tokens)
    table = [
        segment(bits, shape, 0, places, norms_at, mean_at),
        segment(0, shape, 0, []),
    ]
    inputs = [
        upload.data(),
        mx.array(np.repeat([0, 1], [tokens, 1]).astype(np.int32)),
        mx.array(np.array(table, np.int64)),
    ]
    wanted = np.zeros((1, heads, tokens + 1, dim), np.float32)
    layers = list(wanted[:, :, :tokens])
    NumpyKernels().decode_block(
        codes.planes, codes.norms, layers, bits, rotation, mean=codes.mean
    )
    out = _restore(way, inputs, rotation, 0, wanted.shape, mx.float32)
    return np.asarray(out).tobytes() == wanted.tobytes()


def _encode(
    way: str, x: mx.array, bits: int, rotation: Rotation, is_centred: bool
) -> tuple[list[mx.array], mx.array, mx.array | None]:
    num_layers, num_heads, num_rows, dim = x.shape
    x = mx.contiguous(x)
    shape, rows = (
        (dim, _DTYPES[x.dtype], num_layers * num_heads, num_rows),
        x.size // dim,
    )
    mean = None
    if is_centred:
        outputs = [((num_layers, num_heads, dim), mx.float16)]
        threads = num_layers * num_heads * dim
        (mean,) = _launch(way, "mean", 1, [x], shape, outputs, threads)
    codes, norms = _launch(
        way,
        "encode",
        _registers(dim),
        [x, x if mean is None else mean, _encoding_tables(rotation)],
        (*shape, bits, int(is_centred)),
        [((rows * dim * bits // 8,), mx.uint8), ((4, *x.shape[:3]), mx.uint8)],
        32 * rows,
    )
    planes, begin = [], 0
    for width in plane_widths(bits):
        end = begin + rows * dim * width // 8
        planes.append(codes[begin:end].reshape(*x.shape[:3], dim * width // 8))
        begin = end
    return planes, norms, mean


def _restore(
    way: str,
    inputs: list[mx.array],
    rotation: Rotation | None,
    layer: int,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    _, num_heads, capacity, dim = shape
    (out,) = _launch(
        way,
        "restore",
        _registers(dim),
        [*inputs, _restoring_tables(rotation)],
        (dim, _DTYPES[dtype], num_heads, capacity, layer),
        [(shape, dtype)],
        32 * capacity,
        num_heads,
    )
    return out


def _launch(
    way: str,
    name: str,
    registers: int,
    inputs: list[mx.array],
    numbers: Sequence[int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    threads: int,
    times: int = 1,
) -> list[mx.array]:
    """Run a kernel: so many threads, some times."""
    size = _KERNELS[name].num_threads
    grid = (-(-threads // size) * size, times, 1)
    shapes, dtypes = [shape for shape, _ in outputs], [dtype for _, dtype in outputs]
    if way == "ptx":
        return mx.fast.precompiled_cuda_kernel(
            name=entry(name, registers),
            compiled_source=_ptx(entry(name, registers)),
            inputs=inputs,
            output_shapes=shapes,
            output_dtypes=dtypes,
            scalars=list(numbers),
            grid=grid,
            threadgroup=(size, 1, 1),
        )
    # More than seven, so that MLX does not place them in another address space.
    padded = np.array([*numbers, *[0] * 8], np.int32)
    made: list[mx.array] = _compiled(way, name)(
        inputs=[*inputs, mx.array(padded)],
        template=[("R", registers)],
        grid=grid,
        threadgroup=(size, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    return made


@cache
def _compiled(way: str, name: str) -> Any:
    """Return a kernel that MLX compiles when it is first run."""
    kernel = _KERNELS[name]
    names = [f"const int {n} = numbers[{i}];\n" for i, n in enumerate(kernel.numbers)]
    make = mx.fast.metal_kernel if way == "metal" else mx.fast.cuda_kernel
    return make(
        name=f"turboquant_{name}",
        input_names=[*kernel.inputs, "numbers"],
        output_names=list(kernel.outputs),
        source="".join(names) + _text(name),
        header=(_METAL if way == "metal" else _CUDA) + _text("common"),
    )


@cache
def _ptx(name: str) -> bytes:
    with zipfile.ZipFile(PTX) as archive:
        return archive.read(f"{name}.ptx")


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.metal").read_text()


def _registers(dim: int) -> int:
    return next((r for r in _REGISTERS if dim <= 32 * r), _REGISTERS[-1])


@lru_cache
def _encoding_tables(rotation: Rotation) -> mx.array:
    """Return levels and boundaries of each width, signs, scales and a root."""
    levels, boundaries = np.zeros(512, np.float32), np.zeros(512, np.float32)
    for bits in range(1, 9):
        levels[1 << bits : 2 << bits] = index_table(bits)
        boundaries[1 << bits : (2 << bits) - 1] = decision_boundaries(bits)
    root = np.array([math.sqrt(rotation.dim)], np.float32)
    parts: list[Array] = [
        levels,
        boundaries,
        rotation_signs(rotation),
        scale_table(rotation),
        root,
    ]
    return mx.array(np.concatenate(parts))


@lru_cache
def _restoring_tables(rotation: Rotation | None) -> mx.array:
    """Return the levels of each width by symbol, and what undoes the rotation."""
    if rotation is None:
        return mx.array([0.0])  # for any thread: `mx.zeros` would be one's own
    levels = np.zeros(512, np.float32)
    for bits in range(1, 9):
        levels[1 << bits : 2 << bits] = symbol_table(bits)
    return mx.array(np.concatenate([levels, unscale_table(rotation)]))
