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
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.codebook import decision_boundaries
from turboquant.kernels import cuda
from turboquant.kernels.numpy import (
    BlockCodes,
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

MAX_BUFFERS = 16
"""Layers that one launch reads: Metal passes 31 buffers in all."""

_FOLDER = Path(__file__).parent
PTX = _FOLDER / "ptx.zip"
"""What `tools/make_ptx.py` made: a member for each kernel."""
# Numbers in each lane of the 32 that work on a row; the compiler must know how many.
_REGISTERS = (2, 4, 8)
# As in common.metal.
_DTYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}


class Buffers(NamedTuple):
    """Rows of blocks that are alike, where caches have them; the same of each layer."""

    # Of each layer a buffer ``(1, H, capacity, D)``, ``float32``, ``float16`` or
    # ``bfloat16``, and which of its rows is the first one meant. Buffers that are not
    # contiguous are copied whole.
    layers: Sequence[tuple[mx.array, int]]
    # Rows of each block; a block begins where the one before it ends.
    num_rows: int
    num_blocks: int = 1

    def behind(self, count: int) -> Buffers:
        """Return the rows of one block without so many at its beginning."""
        if not count:
            return self
        if self.num_blocks != 1:
            raise ValueError("rows of several blocks do not lie one behind the other")
        layers = [(array, begin + count) for array, begin in self.layers]
        return Buffers(layers, self.num_rows - count)


class Codes(NamedTuple):
    """What one launch makes of the rows of some layers."""

    # Widest first, each ``(blocks, L, H, T, D * width // 8)``.
    planes: list[mx.array]
    # Their bytes, least significant first: ``(blocks, 4, L, H, T)``.
    norms: mx.array
    # ``float16`` of ``(blocks, L, H, D)``, if rows were centred.
    mean: mx.array | None


class _Kernel(NamedTuple):
    """What a kernel is given, in this order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: tuple[str, ...]
    # Threads that start together.
    num_threads: int


_BUFFERS = tuple(f"x{i}" for i in range(MAX_BUFFERS))
# What `_read_from` says of the rows.
_ROWS = (
    "dim",
    "dtype",
    "num_layers",
    "num_heads",
    "capacity",
    "begin",
    "num_rows",
    "num_blocks",
)
_KERNELS = {
    "mean": _Kernel(_BUFFERS, ("mean",), _ROWS, 256),
    "pick": _Kernel(
        _BUFFERS, ("picked",), (*_ROWS, "first", "num_picked", "step"), 256
    ),
    "encode": _Kernel(
        (*_BUFFERS, "mean", "tables"),
        ("codes", "codes1", "codes2", "norms"),
        (*_ROWS, "bits", "is_centred"),
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
    rows: Buffers, bits: int, rotation: Rotation, *, is_centred: bool
) -> list[Codes]:
    """Quantize rows on the GPU; nothing is evaluated.

    Args:
        rows: The rows; ``D`` is at most `MAX_DIM`.
        bits: Bits per coordinate, 1 to 8.
        rotation: A rotation of rows of length ``D``.
        is_centred: Whether its mean is taken off the rows of each block's head first.

    Returns:
        What each launch makes: some layers after others.
    """
    way = _way("encode")
    return [_encode(way, one, bits, rotation, is_centred) for one in _launches(rows)]


def pick(rows: Buffers, which: range) -> list[mx.array]:
    """Copy some rows of each block on the GPU; nothing is evaluated.

    Args:
        rows: The rows.
        which: Those of each block that are copied.

    Returns:
        Of some layers after others, ``(blocks, L, H, len(which), D)``, in the dtype of
        the rows, ``bfloat16`` as its bits in ``uint16``.
    """
    way = _way("encode")
    return [_pick(way, one, which) for one in _launches(rows)]


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
    return [("mean", 1), ("pick", 1), *wide]


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
    rotation, heads, tokens = make_wh_rotation(dim), 2, 9
    # Two layers, two blocks behind other rows, and room behind them.
    shape = (2, heads, 2 * tokens + 3, dim)
    numbers = np.arange(math.prod(shape), dtype=np.float32)
    x = ((numbers * 7919) % 251 - 120).reshape(shape)
    x[0, 0, 2:6, 5:] = np.array([[0], [np.inf], [2.0**-60], [2.0**60]])
    blocks = [x[:, :, begin : begin + tokens] for begin in (2, 2 + tokens)]
    codes = [
        NumpyKernels().encode_block(list(block), bits, rotation, is_centred=True)
        for block in blocks
    ]
    if verb == "restore":
        return _agrees_on_rows(way, codes[0], bits, rotation)
    rows = Buffers([(mx.array(layer[None]), 2) for layer in x], tokens, 2)
    made = _encode(way, rows, bits, rotation, True)
    picked = _pick(way, rows, range(3, 9, 5))
    assert made.mean is not None  # since it is centred
    ours = [np.asarray(a) for a in (*made.planes, made.norms, made.mean, picked)]
    return all(
        a[number].tobytes() == b.tobytes()
        for number, block in enumerate(blocks)
        for a, b in zip(ours, [*_parts(codes[number]), block[:, :, 3::5]], strict=True)
    )


def _agrees_on_rows(way: str, codes: BlockCodes, bits: int, rotation: Rotation) -> bool:
    layers, heads, tokens, _ = codes.planes[0].shape
    shape = (layers, heads, tokens)
    upload = start_upload()
    *places, norms_at, mean_at = upload.send(_parts(codes))
    table = [
        segment(bits, shape, 0, places, norms_at, mean_at),
        segment(0, shape, 0, []),
    ]
    inputs = [
        upload.data(),
        mx.array(np.repeat([0, 1], [tokens, 1]).astype(np.int32)),
        mx.array(np.array(table, np.int64)),
    ]
    wanted = np.zeros((layers, 1, heads, tokens + 1, rotation.dim), np.float32)
    NumpyKernels().decode_block(
        codes.planes,
        codes.norms,
        list(wanted[:, 0, :, :tokens]),
        bits,
        rotation,
        mean=codes.mean,
    )
    ours = [
        _restore(way, inputs, rotation, layer, one.shape, mx.float32)
        for layer, one in enumerate(wanted)
    ]
    return np.stack(list(map(np.asarray, ours))).tobytes() == wanted.tobytes()


def _parts(codes: BlockCodes) -> list[Array]:
    """Return planes, the norms' bytes and means as they are stored."""
    assert codes.mean is not None  # since they are centred
    octets = codes.norms.view(np.uint8).reshape(*codes.norms.shape, 4)
    norms = np.ascontiguousarray(np.moveaxis(octets, -1, 0))
    return [*codes.planes, norms, codes.mean]


def _launches(rows: Buffers) -> Iterator[Buffers]:
    """Yield rows of as many layers as one launch reads; their buffers are alike."""

    def likeness(layer: tuple[mx.array, int]) -> tuple[Any, ...]:
        array, begin = layer
        return array.shape, array.dtype, begin

    for _, alike in groupby(rows.layers, likeness):
        layers = list(alike)
        for i in range(0, len(layers), MAX_BUFFERS):
            yield rows._replace(layers=layers[i : i + MAX_BUFFERS])


def _read_from(rows: Buffers) -> tuple[list[mx.array], tuple[int, ...]]:
    """Return the buffers and the numbers that say which of their rows are meant."""
    arrays, begin = [array for array, _ in rows.layers], rows.layers[0][1]
    batch, num_heads, capacity, dim = arrays[0].shape
    end = begin + rows.num_rows * rows.num_blocks
    if batch != 1 or not 0 <= begin <= end <= capacity:
        raise ValueError("the buffers have other rows than those meant")
    numbers = (dim, _DTYPES[arrays[0].dtype], len(arrays), num_heads, capacity, begin)
    padding = arrays[-1:] * (MAX_BUFFERS - len(arrays))
    return [*arrays, *padding], (*numbers, rows.num_rows, rows.num_blocks)


def _encode(
    way: str, rows: Buffers, bits: int, rotation: Rotation, is_centred: bool
) -> Codes:
    buffers, numbers = _read_from(rows)
    dim, _, num_layers, num_heads, *_ = numbers
    heads, times = (rows.num_blocks, num_layers, num_heads), num_layers
    mean = None
    if is_centred:
        outputs = [((*heads, dim), mx.float16)]
        threads = rows.num_blocks * num_heads * dim
        (mean,) = _launch(way, "mean", 1, buffers, numbers, outputs, threads, times)
    widths = plane_widths(bits)
    shapes: list[tuple[int, ...]] = [
        (*heads, rows.num_rows, dim * width // 8) for width in widths
    ]
    # A kernel has all its outputs.
    shapes += [(1,)] * (3 - len(widths))
    shapes += [(rows.num_blocks, 4, num_layers, num_heads, rows.num_rows)]
    *planes, norms = _launch(
        way,
        "encode",
        _registers(dim),
        [*buffers, _no_mean() if mean is None else mean, _encoding_tables(rotation)],
        (*numbers, bits, int(is_centred)),
        [(shape, mx.uint8) for shape in shapes],
        32 * rows.num_blocks * num_heads * rows.num_rows,
        times,
    )
    return Codes(planes[: len(widths)], norms, mean)


def _pick(way: str, rows: Buffers, which: range) -> mx.array:
    buffers, numbers = _read_from(rows)
    dim, _, num_layers, num_heads, *_ = numbers
    shape = (rows.num_blocks, num_layers, num_heads, len(which), dim)
    dtype = mx.uint16 if buffers[0].dtype == mx.bfloat16 else buffers[0].dtype
    if not which:
        return mx.zeros(shape, dtype)
    if not 0 <= which[0] <= which[-1] < rows.num_rows:
        raise ValueError("a block has no such rows")
    (picked,) = _launch(
        way,
        "pick",
        1,
        buffers,
        (*numbers, which.start, len(which), which.step),
        [(shape, dtype)],
        math.prod(shape) // num_layers,
        num_layers,
    )
    return picked


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
            ensure_row_contiguous=True,
        )
    # More than seven, so that MLX does not place them in another address space.
    padded = np.array([*numbers, *[0] * 8], np.int32)
    made: list[mx.array] = _compiled(way, name)(
        inputs=[*inputs, mx.array(padded)],
        # With the dtype in its name: MLX would compile it anew where that changes.
        template=[("R", registers), ("T", inputs[0].dtype)],
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


@cache
def _no_mean() -> mx.array:
    return mx.array(np.zeros(8, np.float16))


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
