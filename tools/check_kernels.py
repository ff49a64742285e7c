"""Hold the kernels of an instruction set that this machine lacks against NumPy.

Cases and NumPy's answers are written to a file. A program that links the kernels reads
it, on an emulator or on another machine:

    python tools/check_kernels.py neon --compiler aarch64-linux-gnu-g++ \
        --runner "qemu-aarch64 -L /usr/aarch64-linux-gnu"
    python tools/check_kernels.py avx512 --folder there  # and run `there/check` there
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import hatch_build  # noqa: E402
from turboquant import decision_boundaries, make_wh_rotation  # noqa: E402
from turboquant.kernels import numpy as kernels  # noqa: E402
from turboquant.rotation import Rotation, rotation_signs  # noqa: E402

DTYPES = (np.float32, np.float16, np.uint16)
DIMS = (8, 24, 64, 80, 128, 200, 256)
SHAPE = (2, 37)  # heads, rows


def main() -> int:
    """Write, compile and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets = ["sse2", "avx2", "avx512", "avx512vnni", "neon"]
    parser.add_argument("isa", choices=sets)
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--runner", default="", help="what runs the program")
    parser.add_argument("--folder", type=Path, help="write there, and run nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "cases", "wb") as file:
            write_cases(file)
        program = compile_program(options.isa, shlex.split(options.compiler), folder)
        if options.folder:
            return 0
        command = [*shlex.split(options.runner), str(program), str(folder / "cases")]
        return subprocess.run(command, check=False).returncode


def compile_program(isa: str, compiler: list[str], folder: Path) -> Path:
    """Link the kernels of one instruction set with check_kernels.cpp."""
    sets = itertools.chain(*hatch_build.SETS.values())
    width, flags = next((width, flags) for name, width, flags in sets if name == isa)
    defines = [f"-DISA={isa}", f"-DVW={width}"]
    kernel, program = folder / "kernel.o", folder / "check"
    command = [*compiler, *hatch_build.FLAGS, *defines]
    source = str(hatch_build.KERNELS / "kernel.cpp")
    run([*command, *shlex.split(flags), "-c", source, "-o", str(kernel)])
    source = str(Path(__file__).with_suffix(".cpp"))
    run([*command, source, str(kernel), "-static", "-o", str(program)])
    return program


def run(command: list[str]) -> None:
    """Run a compiler."""
    subprocess.run(command, check=True)


def write_cases(file: BinaryIO) -> None:
    """Write every width, length and dtype, with and without a mean."""
    random = np.random.default_rng(1)
    for dim, bits, number, is_centred in itertools.product(
        DIMS, range(1, 9), range(len(DTYPES)), (False, True)
    ):
        rows = make_rows(random, dim, DTYPES[number])
        head = np.array([dim, bits, number, *SHAPE], np.int32)
        write(file, head)
        for array in case(rows, bits, is_centred):
            write(file, array)


def make_rows(
    random: np.random.Generator, dim: int, dtype: type
) -> np.ndarray[Any, Any]:
    """Return rows of very different sizes, some of them odd, shape ``(H, T, D)``."""
    x = (
        random.standard_normal((*SHAPE, dim))
        * 2.0 ** random.integers(-8, 8, SHAPE)[..., None]
    )
    x[0, :12] = np.array(
        [0, -0.0, np.nan, np.inf, -np.inf, 3e38, 1e-45, 2.0**-126, 2.0**-127, 2.0**40,
         2.0**-40, 65504]
    )[:, None]  # fmt: skip
    x[1, 0, 1], x[1, 1, 2], x[1, 2, 3] = np.nan, np.inf, 1e30
    x[1, 3] = np.arange(dim) == 3
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32)
        if dtype == np.uint16:
            return (wide.view(np.uint32) >> 16).astype(np.uint16)
        return wide.astype(dtype)


def case(
    rows: np.ndarray[Any, Any], bits: int, is_centred: bool
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield what check_kernels.cpp reads of one case, in its order."""
    rotation = make_wh_rotation(rows.shape[2])
    numpy = kernels.NumpyKernels()
    codes = numpy.encode_block([rows], bits, rotation, is_centred=is_centred)
    decoded = np.empty_like(rows)
    numpy.decode_block(
        codes.planes, codes.norms, [decoded], bits, rotation, mean=codes.mean
    )
    yield rows
    yield np.empty(0) if codes.mean is None else codes.mean.astype(np.float32)
    yield from tables(bits, rotation)
    yield sums_of(rows)
    yield codes.norms
    yield decoded
    yield from codes.planes


def tables(bits: int, rotation: Rotation) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the tables of an encoding and a decoding job."""
    yield kernels.index_table(bits)
    yield kernels.symbol_table(bits)
    yield np.array(decision_boundaries(bits), np.float32)
    yield rotation_signs(rotation)
    yield kernels.scale_table(rotation)
    yield kernels.unscale_table(rotation)


def sums_of(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return each head's sum over its rows, padded as the kernels pad it."""
    heads, _, dim = rows.shape
    sums = np.zeros((heads, -(-dim // 16) * 16), np.float32)
    with np.errstate(all="ignore"):
        sums[:, :dim] = np.add.reduce(kernels._to_float32(rows), axis=1)
    return sums


def write(file: BinaryIO, array: np.ndarray[Any, Any]) -> None:
    """Write an array as the number of its bytes, and them."""
    data = np.ascontiguousarray(array).tobytes()
    file.write(len(data).to_bytes(8, "little") + data)


if __name__ == "__main__":
    sys.exit(main())
